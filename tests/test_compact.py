"""Retention of all that would grow: what is old goes by a time of its own, whatever learning, estimating and an audit need stays."""

import contextlib
import json
import os
import shutil
import sqlite3
from collections import Counter
from datetime import UTC, datetime, timedelta

import polars as pl

from fastq import registry
from fastq.platform import load_platform
from fastq.workspace import Workspace, replacing, sweep
from pipelines import compact
from pipelines.turn import running

TREE = {
    "platform": "shop",
    "logs": {"decisions": "d.parquet"},
    "state": {"period": "1d"},
    "policies": ["a", "b"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 1}}},
    "objectives": {"joy": {}},
    "operations": {"keep_states": "10d", "keep_quarantine": "10d", "keep_reports": "20d", "keep_models": None},
}


def test_old_states_go_and_the_rest_stays(tmp_path):
    from serving.decision_log import Decision, Request, now_us, open_log

    (tmp_path / "fastq.yaml").write_text(json.dumps(TREE))
    platform = load_platform(tmp_path)
    log = open_log(platform)
    day = 86_400_000_000
    for i in range(30):
        decision = Decision(f"d{i}", f"p{i}", now_us() - i * day, "fastq", 0.5, "1", {"goal": 0.5}, {"value": 1.0}, os.urandom(4_000))
        log.append([decision], Request(f"k{i}", "x")).result()
    now = datetime.now(UTC)
    batch = pl.DataFrame({"decision_id": ["b1", "b2"], "player_id": ["p", "q"], "decided_at": [now, now - timedelta(days=30)], "state": [b"s", b"s"]})
    batch.write_parquet(log.path.parent / "batch.parquet")
    try:
        said = compact.drop_old_states.fn(str(tmp_path), datetime.now(UTC).isoformat())  # a server has the file open, as it may
        log.append([Decision("later", "p", now_us(), "fastq", 0.5, "1", {"goal": 0.5}, {}, b"s")]).result()  # and goes on writing
    finally:
        log.close()
    assert said["states"] == 21
    assert log.path.stat().st_size < 30 * 4_000  # what the states alone took
    with sqlite3.connect(log.path) as database:
        rows = database.execute("SELECT decision_id, propensity, action, state IS NULL FROM decisions ORDER BY decided_at DESC").fetchall()
        assert database.execute("SELECT count(*) FROM requests").fetchone() == (30,)  # recorded just now
    assert len(rows) == 31
    assert [bool(gone) for *_, gone in rows] == [False] * 11 + [True] * 20
    assert all(propensity == 0.5 for _, propensity, *_ in rows)
    assert pl.read_parquet(log.path.parent / "batch.parquet")["state"].to_list() == [b"s", None]
    assert compact.drop_old_states.fn(str(tmp_path), datetime.now(UTC).isoformat())["states"] == 0


def test_each_store_has_a_time_of_its_own(tmp_path):
    (tmp_path / "fastq.yaml").write_text(json.dumps(TREE))
    space = Workspace(tmp_path)
    for place, names in ((space.quarantine, ["a.parquet"]), (space.reports, ["validation-a.html", "validation-a.json", "drift-a.svg", "evaluation-1.html"])):
        place.mkdir(parents=True)
        for days in (1, 15, 30):
            for name in names:
                file = place / name.replace("a.", f"{days}.")
                file.touch()
                os.utime(file, ((datetime.now(UTC) - timedelta(days=days)).timestamp(),) * 2)
    said = compact.drop_old_files.fn(str(tmp_path), datetime.now(UTC).isoformat())
    assert said == {"quarantine": 2, "reports": 3, "backups": [], "unfinished": 0}
    assert sorted(path.name for path in space.quarantine.iterdir()) == ["1.parquet"]
    kept = [f"{kind}-{days}.{suffix}" for kind, suffix in (("drift", "svg"), ("validation", "html"), ("validation", "json")) for days in (1, 15)]
    assert sorted(path.name for path in space.reports.iterdir()) == sorted([*kept, "evaluation-1.html"]), "what is told of a model is the model's"
    assert compact.drop_old_models.fn(str(tmp_path), datetime.now(UTC).isoformat()) == {"models": [], "runs": 0}, "none: for ever"


def test_a_log_whose_server_was_stopped_before_it_had_made_its_tables_is_passed_by(tmp_path):
    (tmp_path / "fastq.yaml").write_text(json.dumps(TREE))
    served = Workspace(tmp_path).served
    served.mkdir(parents=True)
    with sqlite3.connect(served / "0000.db") as log:
        log.execute("CREATE TABLE other (x)")
    assert compact.drop_old_states.fn(str(tmp_path), datetime.now(UTC).isoformat())["states"] == 0
    assert compact._explained(load_platform(tmp_path)) == set()


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(tmp_path):
    space, before = Workspace(tmp_path), (datetime.now(UTC) - timedelta(hours=2)).timestamp()
    with contextlib.suppress(KeyboardInterrupt), replacing(space.features / "rows.parquet") as partial:
        (space.state / ".snapshot.a1b2c3d4").touch()
        left = [space.features / f".{name}" for name in ("rows.parquet.abcdefgh.parquet", "applied.a_b_c_d1")]
        for path in [*left, space.state / ".snapshot.a1b2c3d4", space.features / ".notes.parquet", space.features / "rows.parquet"]:
            path.touch()
            os.utime(path, (before, before))
        assert sweep(space) == 3
        assert partial.exists()
        assert sorted(path.name for path in space.features.iterdir() if path != partial) == [".notes.parquet", "rows.parquet"]


def test_a_platform_is_smaller_afterwards_and_serves_and_explains_as_before(trained, tmp_path, prefect_server):
    """The whole flow, a year and a day later: a refused model, old flow runs and their results go; the champion and another workspace's runs stay."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import PREFECT_API_URL, temporary_settings

    root = tmp_path / "copy"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("*.lock"))
    platform = load_platform(root)
    space = Workspace(root)
    client = registry._client(platform)
    bundle = registry.fetch(platform, "champion")
    versions = []
    for _ in range(2):
        with registry.start_run(platform, "another", {}) as run:
            pass
        versions.append(registry.register(platform, run.id, bundle))
    for version in versions:
        for kind in ("evaluation", "truth"):
            (space.reports / f"{kind}-{version}.html").touch()
    later = (datetime.now(UTC) + timedelta(days=400)).isoformat()
    with temporary_settings({PREFECT_API_URL: prefect_server}), running(platform):
        compact.compact_flow(str(root), datetime.now(UTC).isoformat())  # leaves a run of this workspace's; nothing is old
        with get_client(sync_client=True) as prefect:
            before = Counter(run.parameters.get("workspace") for run in prefect.read_flow_runs(limit=200, sort=FlowRunSort.END_TIME_DESC))
            said = compact.compact_flow(str(root), later)
            after = Counter(run.parameters.get("workspace") for run in prefect.read_flow_runs(limit=200, sort=FlowRunSort.END_TIME_DESC))
    assert before[str(root)] >= 1
    assert said["flow_runs"] == before[str(root)]
    assert after[str(root)] == 1, "the one under way"
    assert {other: n for other, n in after.items() if other != str(root)} == {other: n for other, n in before.items() if other != str(root)}
    assert said["models"] == versions[:1], "the newest is the challenger"
    assert sorted(path.name for path in space.reports.glob(f"*-{versions[0]}.*")) == [], "with what is told of it"
    assert {path.name for path in space.reports.glob(f"*-{versions[1]}.html")} == {f"evaluation-{versions[1]}.html", f"truth-{versions[1]}.html"}
    assert [m["aliases"] for m in registry.models(platform)] == [["challenger"], ["champion"]]
    assert registry.load_policy("models:/arena@champion", root).version == registry.champion(platform)
    assert client.get_run(client.get_model_version("arena", registry.champion(platform)).run_id).data.metrics, "with its curves"
