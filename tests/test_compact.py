"""Retention of served decisions: old states go, whatever learning and estimating need stays."""

import json
import os
import sqlite3
from datetime import UTC, datetime, timedelta

import polars as pl

from fastq.platform import load_platform
from pipelines import compact

TREE = {
    "platform": "shop",
    "logs": {"decisions": "d.parquet"},
    "state": {"period": "1d"},
    "policies": ["a", "b"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 1}}},
    "objectives": {"joy": {}},
    "operations": {"keep_states": "10d"},
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
