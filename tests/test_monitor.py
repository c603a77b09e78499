"""The flow `monitor` on a trained workspace: a finding is told once and drawn; a broken guardrail rolls back, with a record of why."""

import json
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from fastq import evaluation, features, monitoring, records, registry, windows
from fastq.platform import load_platform
from fastq.workspace import Workspace
from pipelines import monitor


@pytest.fixture
def copy(trained, tmp_path):
    """The trained workspace, for one test to change."""
    root = tmp_path / "copy"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("*.lock"))
    return load_platform(root)


def look(platform):
    return monitor.one_look.fn(str(platform.root), datetime.now(UTC).isoformat())


def test_quiet_logs_find_nothing_and_a_changed_unit_is_told_once(copy):
    assert [finding["family"] for finding in look(copy)["findings"] if finding["family"] != "volume"] == []
    newest = max((copy.root / "logs" / "activity").glob("*.parquet"))
    events = pl.read_parquet(newest)
    later = events.with_columns(pl.col("occurred_at") + timedelta(days=1), minutes=pl.col("minutes") * 60)
    if "recorded_at" in later.columns:
        later = later.with_columns(pl.col("recorded_at") + timedelta(days=1))
    later.write_parquet(newest.with_name("zz-next-day.parquet"))
    found = look(copy)
    keys = [finding["key"] for finding in found["findings"]]
    assert "minutes" in keys
    assert found["drift"]
    finding = found["findings"][keys.index("minutes")]
    assert "<svg" in (copy.root / finding["picture"]).read_text()
    again = look(copy)
    assert "minutes" in [finding["key"] for finding in again["findings"]]  # it still stands
    assert again["new"] == []
    assert not again["drift"]  # but starts nothing a second time


def acting_by_the_state(platform, policy, since):
    """`decision_id, chosen`: a policy for each decision from `since` on, day by day, since who acted last is part of the state."""
    read, found = records.read_tables(platform), []
    for day in range(5):
        data = windows.build(platform, read, features.build_rows(platform, read))
        begun = int((since + timedelta(days=day)).timestamp() * 1e6)
        rows = np.flatnonzero((data.moment >= begun) & (data.moment < begun + 86_400_000_000))
        seen = evaluation.situations(policy, data, rows).b.numpy()[:, : len(platform.policies)]
        places = ((seen - seen.mean(0)) / seen.std(0)).argmax(1)
        found.append(pl.DataFrame({"decision_id": [data.decision_id[i] for i in rows], "chosen": [platform.policies[k] for k in places]}))
        acting = read.decisions.join(found[-1], on="decision_id", how="left", maintain_order="left")
        read = replace(read, decisions=acting.with_columns(policy=pl.coalesce("chosen", "policy")).drop("chosen"))
    return pl.concat(found)


def test_who_acts_told_by_the_state_again_is_found_once_for_a_champion(copy, policy, data):
    """As if the champion had been promoted four days ago: nothing is found, until who acts goes by three numbers of its state."""
    file = Workspace(copy.root).monitor / "promised-1.json"
    kept = json.loads(file.read_text())
    assert {"3", "7"} <= set(kept["balance"]["probes"])
    since = datetime.fromisoformat(kept["balance"]["until"]) - timedelta(days=4)
    probes = {window: asdict(probe) for window, probe in monitoring.probes_before(policy, data, since).items()}
    file.write_text(json.dumps(kept | {"balance": {"until": since.isoformat(), "probes": probes}}))
    assert monitoring.PROBE not in [finding["key"] for finding in look(copy)["findings"]]
    looked = Workspace(copy.root).monitor / "balance.json"
    assert json.loads(looked.read_text()) == {"version": "1", "until": kept["balance"]["until"], "found": None}

    chosen = acting_by_the_state(copy, policy, since)
    for path in sorted((copy.root / "logs" / "decisions").glob("*.parquet"))[-6:]:
        decisions = pl.read_parquet(path).join(chosen, on="decision_id", how="left")
        decisions.with_columns(policy=pl.coalesce("chosen", "policy")).drop("chosen").write_parquet(path)
    assert monitoring.PROBE not in look(copy)["new"], "it is asked once a day"
    looked.unlink()
    found = look(copy)
    (finding,) = [finding for finding in found["findings"] if finding["key"] == monitoring.PROBE]
    assert finding["now"] > finding["was"] + 0.1
    assert monitoring.PROBE in found["new"]
    assert f"{finding['now']:.4g}" in finding["says"]
    reference = Workspace(copy.root).monitor / "reference.json"
    reference.write_text(json.dumps(json.loads(reference.read_text()) | {"turn": "another"}))  # a retraining that was refused
    again = look(copy)
    assert monitoring.PROBE in [finding["key"] for finding in again["findings"]]
    assert monitoring.PROBE not in again["new"], "else each refused retraining would begin the next one"


def serve(platform, version, cost, first=0, players=200):
    """Served decisions of one version whose cost comes out around the given one."""
    from serving.decision_log import Decision, Reported, now_us, open_log

    action = dict.fromkeys(platform.dimension_names, 2.0)
    ids = range(first, first + players)
    rows = [Decision(f"v{version}-{p}", f"p{p:05d}", now_us(), "fastq", 0.1, version, action, {}, None) for p in ids]
    log = open_log(platform)
    try:
        log.append(rows).result()
        spread = [cost * (0.5 + (p % 11) / 10) for p in ids]
        log.report([Reported(row.decision_id, {"cost": value}) for row, value in zip(rows, spread, strict=True)]).result()
    finally:
        log.close()


def test_a_champion_that_breaks_its_ceiling_is_rolled_back_with_a_reason(copy):
    client = registry._client(copy)
    first = client.get_model_version(copy.platform, "1")
    client.create_model_version(copy.platform, source=first.source, run_id=first.run_id, tags=dict(first.tags))
    registry.promote(copy, "2", forced=True, reason="the test's second version")
    ceiling = copy.objectives["cost"].ceiling
    serve(copy, "2", 0.7 * ceiling)
    assert look(copy)["rolled_back_to"] is None
    assert registry.champion(copy) == "2"
    serve(copy, "2", 3 * ceiling, first=200)
    found = look(copy)
    assert found["rolled_back_to"] == "1"
    assert registry.champion(copy) == "1"
    last = json.loads(Workspace(copy.root).audit.read_text().splitlines()[-1])
    assert (last["action"], last["who"]) == ("rollback", "monitor")
    assert "above its ceiling" in last["reason"]
    assert look(copy)["rolled_back_to"] is None  # version 1 has broken nothing


def test_exports_that_stop_while_http_goes_on_are_missed(copy, monkeypatch):
    """A tenth of the players comes over HTTP, up to now. The platform's own exports end: told after `serving.stale_after` periods, and not before."""
    from serving.decision_log import Decision, Event, open_log

    read = records.read_records(copy)
    ends = [read.decisions["decided_at"].max(), read.activity.select(pl.col("known_at").max()).item()]
    ended = max(ends)
    action, days = dict.fromkeys(copy.dimension_names, 2.0), copy.serving.stale_after
    log = open_log(copy)
    try:
        for day in range(1, days + 2):
            at = int((ended + timedelta(days=day)).timestamp() * 1e6)
            log.append([Decision(f"served-{day}-{p}", f"p{p:05d}", at, "fastq", 0.1, "1", action, {}, None) for p in range(30)]).result()
            log.record_activity([Event(f"p{p:05d}", at, {"games": 1.0}, at) for p in range(30)]).result()
    finally:
        log.close()

    def missed(moment):
        return [f["says"] for f in monitor.one_look.fn(str(copy.root), moment.isoformat())["findings"] if f["family"] == "volume" and "stopped" in f["says"]]

    assert missed(min(ends) + timedelta(days=days, hours=-1)) == []
    found = missed(ended + timedelta(days=days, hours=2))
    assert [says.split(" has ")[0] for says in found] == ["the decisions log", "the activity log"]
    assert all("stopped arriving: nothing since" in says for says in found)
    with monkeypatch.context() as patch:  # what came over HTTP alone would hide it
        patch.setattr(monitoring, "as_exported", lambda _, read: read)
        assert missed(ended + timedelta(days=days, hours=2)) == []
