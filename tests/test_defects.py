"""Whatever is wrong with a log, and however much at once: no traceback, no value changed, good rows arrive, and the counts add up."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastq import features, windows
from fastq.errors import LogsError
from fastq.platform import platform_from_tree
from fastq.records import read_records

START = datetime.now(UTC).replace(hour=5, minute=0, second=0, microsecond=0) - timedelta(days=9)
TREE = {
    "platform": "shop",
    "logs": {"decisions": "decisions/*", "activity": "activity/*"},
    "state": {"window": 3, "churn": 5, "measures": {"rounds": {"aggregate": "sum", "min": 0}, "mood": {"aggregate": "last"}}},
    "policies": ["careful", "bold"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}}},
    "objectives": {"joy": {}},
}
GOOD = 6  # rows of each file and table that nothing is wrong with; more than can be spoilt, or a column would be of another type

# what may be wrong with one field, as it stands in the file
WRONG: dict[str, dict[str, list[Any]]] = {
    "decisions": {
        "decision_id": [None, ""],
        "player_id": [None, " "],
        "decided_at": [None, "yesterday", "2026-13-01T00:00:00Z"],
        "policy": [None, "nobody"],
        "propensity": ["0", "-1", "inf", "a third"],
        "goal": [None, "0.5", "15.5", "nan", "much"],
        "joy": ["inf", "some"],
    },
    "activity": {"player_id": [None], "occurred_at": [None, "once"], "rounds": ["-0.5", "inf", "few"], "mood": ["-inf", "fine"]},
}
# and what may stand in a file of text where a row should
BROKEN = {"csv": [b"x" + 12 * b",x", b"caf\xe9,p1"], "ndjson": [b'{"player_id": "p1", "goal":', b"[1, 2]"]}
defect = st.one_of(
    st.tuples(st.just("broken"), st.tuples(st.sampled_from(["decisions", "activity"]), st.integers(0, 1))),
    st.tuples(st.just("spoilt"), st.sampled_from([(t, c, v) for t, columns in WRONG.items() for c, values in columns.items() for v in values])),
    st.tuples(st.sampled_from(["repeated", "same id"]), st.tuples(st.sampled_from(["decisions", "activity"]), st.integers(0, GOOD - 1))),
)
files = st.lists(st.tuples(st.lists(defect, max_size=4), st.sampled_from(["csv", "ndjson", "parquet"]), st.booleans()), min_size=1, max_size=3)


def good_row(table: str, file: int, i: int) -> dict[str, str | None]:
    at = START + timedelta(days=file, hours=i, microseconds=7 * i + 1)
    if table == "activity":
        recorded = (at + timedelta(days=2)).isoformat() if i % 3 == 0 else None  # known late
        return {
            "player_id": f"p{i % 3}",
            "occurred_at": at.isoformat(),
            "recorded_at": recorded,
            "rounds": repr(0.1 * (i + 7 * file)),
            "mood": repr(-1 / (i + 3)),
        }
    joy = None if i == 1 else repr(i / 3 - file)
    policy = ["careful", "bold"][i % 2]
    row = {"decision_id": f"d{file}-{i}", "player_id": f"p{i % 3}", "decided_at": at.isoformat(), "policy": policy}
    return {**row, "propensity": repr(1 / (i + 2)) if i else None, "goal": repr(1 + i / 7), "joy": joy}


def written(path: Path, rows: list[dict[str, str | None]], kind: str, broken: list[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    frame = pl.DataFrame(rows, schema=dict.fromkeys(rows[0], pl.String))
    if kind == "ndjson":
        path.with_suffix(".ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        (frame.write_csv if kind == "csv" else frame.write_parquet)(path.with_suffix(f".{kind}"))
    if kind in BROKEN:
        lines = path.with_suffix(f".{kind}").read_bytes().splitlines()
        lines[2:2] = [BROKEN[kind][which] for which in broken]
        path.with_suffix(f".{kind}").write_bytes(b"\n".join(lines) + b"\n")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files)
def test_every_defect_with_every_other(drawn: list[tuple[list[tuple[str, Any]], str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        platform = platform_from_tree(TREE, root, "fastq.yaml")
        expected: dict[str, Counter[str]] = {"decisions": Counter(), "activity": Counter()}
        for number, (defects, kind, reverse) in enumerate(drawn):
            rows: dict[str, list[dict[str, str | None]]] = {t: [good_row(t, number, i) for i in range(GOOD)] for t in WRONG}
            broken = {table: [how[1] for what, how in defects if what == "broken" and how[0] == table] for table in WRONG}
            for n, (what, how) in enumerate(defects):
                table = how[0]
                if what == "broken":
                    expected[table]["quarantined"] += kind in BROKEN
                    continue
                fresh = good_row(table, number, GOOD + n)
                if what == "spoilt":
                    fresh[how[1]] = how[2]
                elif what == "repeated":
                    fresh = dict(rows[table][how[1]])
                elif table == "decisions":
                    fresh["decision_id"] = rows[table][how[1]]["decision_id"]
                rows[table].append(fresh)
                fate = "repeated" if what == "repeated" else "accepted" if what == "same id" and table == "activity" else "quarantined"
                expected[table][fate] += 1
            for table, all_rows in rows.items():
                expected[table]["accepted"] += GOOD
                # out of order in the file; but the first of an id stays, and of these the good one comes first
                written(root / table / str(number), all_rows[:GOOD][::-1] + all_rows[GOOD:] if reverse else all_rows, kind, broken[table])
            records = read_records(platform)  # after each delivery, as ingest would
        for table, fates in expected.items():
            assert {fate: getattr(records.counts[table], fate) for fate in ("accepted", "quarantined", "repeated")} == dict.fromkeys(
                ("accepted", "quarantined", "repeated"), 0
            ) | dict(fates)
        assert records.quarantine.height == sum(fates["quarantined"] for fates in expected.values())
        assert records.quarantine["reason"].str.len_chars().min() != 0
        assert records.quarantine["reason"].null_count() == 0
        wanted = [good_row("decisions", number, i) for number in range(len(drawn)) for i in range(GOOD)]
        found = {row["decision_id"]: row for row in records.decisions.to_dicts()}
        for row in wanted:
            arrived = found[row["decision_id"]]
            for name in ("propensity", "goal", "joy"):
                assert arrived[name] == (None if row[name] is None else float(row[name]))
            assert arrived["decided_at"] == datetime.fromisoformat(row["decided_at"])
        events = records.activity.collect()
        known = Counter(zip(events["player_id"], events["occurred_at"], events["known_at"], events["rounds"], events["mood"], strict=True))
        for number in range(len(drawn)):
            for row in (good_row("activity", number, i) for i in range(GOOD)):
                at = datetime.fromisoformat(row["occurred_at"])
                recorded = datetime.fromisoformat(row["recorded_at"]) if row["recorded_at"] else at
                assert known[row["player_id"], at, recorded, float(row["rounds"]), float(row["mood"])] >= 1
        data = windows.build(platform, records, features.build_rows(platform, records))
        assert len(data) == records.counts["decisions"].accepted


def test_a_feature_store_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    """Also where what lies ahead is an event of an earlier day that arrived late: its period is over, but not before the decision."""
    for table in WRONG:
        written(tmp_path / table / "0", [good_row(table, file, i) for file in range(3) for i in range(GOOD)], "parquet", [])
    platform = platform_from_tree(TREE, tmp_path, "fastq.yaml")
    records = read_records(platform)
    rows = features.build_rows(platform, records)
    honest = windows.build(platform, records, rows)
    pointers = pl.DataFrame({"decision_id": honest.decision_id, "row": honest.end})
    assert windows.build(platform, records, rows, pointers).fingerprint() == honest.fingerprint()
    leaking = pointers.with_columns(row=pl.when(pl.col("decision_id") == "d1-0").then(pl.col("row") + 1).otherwise("row"))
    with pytest.raises(LogsError, match=r"d1-0: .*was not complete when it was decided"):
        windows.build(platform, records, rows, leaking)
    somebody_else = pointers.with_columns(row=pl.when(pl.col("decision_id") == "d1-0").then(len(rows) - 1).otherwise("row"))
    with pytest.raises(LogsError, match="d1-0"):
        windows.build(platform, records, rows, somebody_else)
