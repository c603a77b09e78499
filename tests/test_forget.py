"""Forgetting a player: out of everything that is kept, for good, while serving goes on; nobody else loses a row."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from fastq import queries, records, registry
from fastq.backup import backup
from fastq.errors import UnknownPlayerError, WorkspaceError
from fastq.forgetting import FILE, forgotten, remember, strike_page
from fastq.platform import Platform, load_platform, platform_from_tree
from fastq.workspace import Workspace
from feature_repo import store
from pipelines.forget import forget
from pipelines.recommend_all import recommend_all
from pipelines.validate import validate_logs
from serving import online
from serving.decision_log import Event, Reported, Request, now_us
from serving.online import Ask


def copied(root: Path, to: Path) -> Path:
    """A workspace of its own: MLflow notes where artifacts lie as absolute paths, and the original's are not to be touched."""
    shutil.copytree(root, to)
    with contextlib.closing(sqlite3.connect(to / ".fastq" / "mlflow" / "mlflow.db")) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(root), str(to)))
        runs = {run for (run,) in database.execute("SELECT run_uuid FROM runs")}
    for left in (to / ".fastq" / "mlflow" / "artifacts").iterdir():  # of other tests, whose copies of this workspace wrote to the original
        if left.name not in runs:
            shutil.rmtree(left)
    Workspace(to).backups.unlink(missing_ok=True)  # those are the original's
    return to


@pytest.fixture(scope="module")
def lived_in(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A workspace in which a player, and another one beside them, left traces everywhere; the player's id and the other's."""
    root = copied(trained, tmp_path_factory.mktemp("forget") / "workspace")
    platform = load_platform(root)
    policy = registry.load_policy("models:/arena@champion", root)
    decisions = records.read_tables(platform).decisions
    player, other = decisions.filter(pl.col("decision_id").is_in(policy.reference.decision_id[:400]))["player_id"].unique(maintain_order=True)[:2]
    measure, objective = next(iter(platform.state.measures)), next(iter(platform.objectives))
    with online.open_service(platform) as service:
        for players in ((player,), (player, other), (other,)):
            decided = online.decide(service, [Ask(players=players)])[0]
            service.log.append(decided, Request(f"key of {len(players)} {players[0]}", "digest")).result(10)
            service.log.report([Reported(d.decision_id, {objective: 1.0}, executed=False) for d in decided]).result(10)
        service.log.record_activity([Event(p, now_us() - 1_000_000, {measure: 2.0}) for p in (player, other)]).result(10)
        online.apply_activity(service)
    recommend_all(platform, root / "all.parquet")
    queries.ask(platform, "SELECT count(*) FROM explanations")
    logged = pl.read_parquet(root / platform.logs.decisions).filter(pl.col("player_id") == player)
    logged.head(1).with_columns(decision_id=pl.lit("a-refused-decision"), policy=pl.lit("nobody")).write_parquet(
        (root / platform.logs.decisions).with_name("worse.parquet")
    )
    validate_logs(platform)
    return root, player, other


@pytest.fixture
def platform(lived_in: tuple[Path, str, str], tmp_path: Path) -> Platform:
    return load_platform(copied(lived_in[0], tmp_path / "workspace"))


def traces(root: Path, ids: set[str]) -> list[str]:
    """Files of the state directory that hold one of the ids, in a table's cell or in plain bytes."""
    found = []
    for path in sorted((root / ".fastq").rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes() if path.suffix != ".parquet" else json.dumps(pl.read_parquet(path).to_dicts(), default=str).encode()
        found += [f"{path.relative_to(root)}: {i}" for i in ids if i.encode() in content]
    return found


def rows_of(platform: Platform, player: str) -> int:
    return sum(
        (pl.read_parquet(path)["player_id"] == player).sum()
        for table in ("decisions", "activity")
        for path in Workspace(platform.root).tables.rglob(f"{table}*.parquet")
    )


def test_a_player_is_gone_from_everything_and_the_others_are_not(platform: Platform, lived_in: tuple[Path, str, str]) -> None:
    _, player, other = lived_in
    policy = registry.load_policy("models:/arena@champion", platform.root)
    directory = registry.fetch(platform)
    before, others = load_file(directory / "weights.safetensors"), rows_of(platform, other)
    ids = set(records.read_tables(platform).decisions.filter(pl.col("player_id") == player)["decision_id"]) | {"a-refused-decision"}
    ids |= set(records.served_log(platform, "decisions").filter(pl.col("player_id") == player)["decision_id"])
    with registry.start_run(platform, "killed before its bundle was registered", {}) as run:
        run.client.log_artifacts(run.id, str(directory), "bundle")
    assert traces(platform.root, {player, *ids})
    copy = Path(backup(platform.root, platform.root.parent / "before.fastq")["file"])
    left = Workspace(platform.root).features / ".player_rows.parquet.k1lled_0.parquet"  # by a retraining that was killed while it wrote
    left.write_bytes(b"PAR1" + player.encode())
    os.utime(left, ((datetime.now(UTC) - timedelta(hours=2)).timestamp(),) * 2)
    being_written = left.with_name(".player_rows.parquet.wr1tten_.parquet")
    being_written.write_bytes(b"PAR1")
    with online.open_service(platform) as service:  # serving goes on
        document = forget(platform, player)
        after = online.decide(service, [Ask(players=(other, player))])[0]
        assert after[0].detail.get("value") is not None
        assert "unknown player" in after[1].detail["degraded"]
    where = " ".join(entry["where"] for entry in document["removed"])
    assert document["player_id"] == player
    assert all(entry["rows"] > 0 for entry in document["removed"])
    places = ["tables/decisions", "tables/activity", "quarantine/", "features/player_rows", "features/player_state", "queries/explanations"]
    places.append("reports/validation")
    places += [f"served/0000.db, {table}" for table in ("decisions", "outcomes", "executed", "requests", "activity")]
    for place in [*places, "the online store (sqlite)", "the evidence of model version 1", f"run {run.id} and never registered"]:
        assert place in where, place
    assert any(entry["where"].startswith(".fastq/served/") and entry["where"].endswith(".parquet") for entry in document["removed"])
    being_written.unlink()  # raises where it had been taken away
    assert traces(platform.root, {player, *ids}) == []
    assert [(one["file"], one["until"]) for one in document["backups"]] == [(str(copy), None)]
    assert any("1 backup made here" in note and "operations.keep_backups" in note for note in document["notes"])

    assert rows_of(platform, other) == others
    assert len(store.read_online(store.open_store(platform), [player, other])) == 1
    known = records.served_log(platform, "decisions").filter(pl.col("player_id") == other)
    assert len(known) == 2
    assert len(records.served_log(platform, "outcomes").filter(pl.col("decision_id").is_in(known["decision_id"].implode()))) == 2
    with online.open_service(platform) as service:
        (kept,) = service.log.repeated(Request(f"key of 2 {player}", "digest"))
        assert kept.player_id == other
    again = registry.load_policy("models:/arena@champion", platform.root)
    left = load_file(registry.fetch(platform) / "weights.safetensors")
    stay = [i for i, decision in enumerate(policy.reference.decision_id) if decision not in ids]
    assert again.reference.decision_id == [policy.reference.decision_id[i] for i in stay]
    assert len(stay) < len(policy.reference.decision_id)
    for name, values in before.items():
        np.testing.assert_array_equal(left[name], values[stay] if name.startswith("reference.") else values, err_msg=name)


def test_the_platforms_own_logs_do_not_bring_the_player_back(platform: Platform, lived_in: tuple[Path, str, str], fastq) -> None:
    _, player, other = lived_in
    before = json.loads(fastq("validate", "--json", cwd=platform.root).stdout)
    said = json.loads(fastq("forget", player, "--json", cwd=platform.root, code=0).stdout)
    assert said["logs"] > 0
    again = json.loads(fastq("forget", player, "--json", cwd=platform.root, code=0).stdout)
    assert [entry["where"] for entry in again["removed"]] == []
    now = json.loads(fastq("validate", "--json", cwd=platform.root).stdout)
    # what was served to the player is gone from our own logs; their rows in the platform's are read and left out
    served = len(records.read_served(platform))
    assert now["repeated"] > before["repeated"]
    assert now["accepted"] + now["quarantined"] + now["repeated"] < before["accepted"] + before["quarantined"] + before["repeated"]
    read = records.read_records(platform)
    assert read.counts["decisions"].accepted + read.counts["decisions"].quarantined + read.counts["decisions"].repeated == _rows_in(platform) + served
    assert not read.decisions["player_id"].is_in([player]).any()
    assert read.decisions["player_id"].is_in([other]).any()
    assert any("forgotten" in sentence for sentence in now["warnings"])
    assert any(rule["rule"] == "decisions.player_id.forgotten" and rule["failed"] > 0 for rule in now["rules"])
    # what was read just now is a copy of logs that still hold the player, without them and their decisions' proposals
    logged = pl.read_parquet(platform.root / platform.logs.decisions)
    ids = set(logged.filter(pl.col("player_id") == player)["decision_id"])
    assert list(Workspace(platform.root).staged.rglob("*.arrow"))
    assert traces(platform.root, {player, *ids}) == []
    if read.proposals is not None:
        counts, rows = read.counts["proposals"], sum(len(pl.read_parquet(path)) for path in platform.root.glob(platform.logs.proposals))
        assert counts.accepted + counts.quarantined + counts.repeated == rows
        assert read.metrics["proposals.player_id.forgotten"] > 0


def _rows_in(platform: Platform) -> int:
    return sum(len(pl.read_parquet(path)) for path in platform.root.glob(platform.logs.decisions))


def test_new_events_of_a_forgotten_player_reach_no_state(platform: Platform, lived_in: tuple[Path, str, str]) -> None:
    _, player, other = lived_in
    forget(platform, player)
    measure = next(iter(platform.state.measures))
    with online.open_service(platform) as service:
        service.log.record_activity([Event(p, now_us() - 5, {measure: 2.0}) for p in (player, other)]).result(10)
        online.apply_activity(service)
        assert service.log.unapplied() == []
        assert online.read_states(service, service.current(), [player, other], online.datetime.now(online.UTC)).known == [False, True]
    assert records.read_records(platform).activity.filter(pl.col("player_id") == player).height == 0
    # the copies of the logs that hold nobody who was forgotten stay
    assert [entry["where"] for entry in forget(platform, player)["removed"]] == [".fastq/served/0000.db, activity"]
    assert list(Workspace(platform.root).staged.rglob("*.arrow"))


def test_an_unknown_player_is_said_and_nothing_is_noted(platform: Platform, fastq) -> None:
    with pytest.raises(UnknownPlayerError, match="nobody-at-all"):
        forget(platform, "nobody-at-all")
    assert not (platform.root / ".fastq" / FILE).exists()
    refused = fastq("forget", "nobody-at-all", "--json", cwd=platform.root, code=2)
    assert "nobody-at-all" in json.loads(refused.stdout)["error"]


def test_who_was_forgotten_is_a_salted_hash(tmp_path: Path) -> None:
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    assert [remember(one, "p1"), remember(one, "p1"), remember(one, "p2"), remember(two, "p1")] == [True, False, True, True]
    known = forgotten(one)
    assert known.holds(pl.Series(["p1", "p3", None, "p2", "p1"])).to_list() == [True, False, False, True, True]
    assert ("p1" in known, "p3" in known, "p1" in forgotten(Workspace(tmp_path))) == (True, False, False)
    text = (one.state / FILE).read_text()
    assert "p1" not in json.loads(text)["players"]
    assert not set(json.loads(text)["players"]) & set(json.loads((two.state / FILE).read_text())["players"]), "another salt, another hash"
    assert (one.state / FILE).stat().st_mode & 0o077 == 0
    (one.state / FILE).write_text(text[:-5])
    with pytest.raises(WorkspaceError, match="backup"):
        forgotten(one)


def test_a_report_loses_the_rows_that_quote_the_player_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    row = "<tr><td class='content'><code>{&#34;player_id&#34;:&#34;%s&#34;}</code></td></tr>"
    page.write_text("<table>" + row % "p1" + row % "p11" + row % "xp1" + "</table>")
    assert strike_page(page, ["p1"]) == 1
    assert page.read_text() == "<table>" + row % "p11" + row % "xp1" + "</table>"
    assert strike_page(page, ["p1"]) == 0


def test_a_log_with_a_line_that_is_no_row_is_searched_too_once_compact_is_done(tmp_path: Path) -> None:
    tree = {
        "platform": "shop",
        "logs": {"decisions": "decisions.csv"},
        "state": {},
        "policies": ["careful"],
        "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}}},
        "objectives": {"joy": {}},
    }
    lines = ["decision_id,player_id,decided_at,policy,goal,joy", "d1,p1,2026-11-01,careful,2,1", "x" + 9 * ",x", "d2,p1,2026-11-02,careful,3,1"]
    (tmp_path / "decisions.csv").write_text("\n".join(lines))
    platform = platform_from_tree(tree, tmp_path, "fastq.yaml")
    with ThreadPoolExecutor(1) as other, Workspace(tmp_path).lock("compact"):
        said = other.submit(forget, platform, "p1")
        with pytest.raises(TimeoutError):  # while batches are rewritten nobody is taken out of them: the later of the two would bring back who was
            said.result(2)
    assert said.result()["logs"] == 2
