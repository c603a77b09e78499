"""Logs of every kind in, good rows out, bad rows kept with their reasons; nothing is lost and nothing ends in a traceback."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import sqlite3
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from fastq import features, records
from fastq.errors import LogsError, WorkspaceError
from fastq.forgetting import strike_table
from fastq.platform import Logs, Platform, platform_from_tree
from fastq.records import LARGEST, Counts, Table, json_fields, read_records, read_served, read_tables, row_rules, suspect, write_tables
from fastq.workspace import Workspace

START = datetime.now(UTC).replace(hour=5, minute=0, second=0, microsecond=0) - timedelta(days=4)
TREE: dict[str, Any] = {
    "platform": "shop",
    "logs": {"decisions": "logs/decisions*", "activity": "logs/activity.parquet", "players": "logs/players.parquet"},
    "state": {
        "period": "1d",
        "window": 3,
        "churn": 5,
        "measures": {"rounds": {"aggregate": "sum", "min": 0}, "share": {"aggregate": "mean", "min": 0, "max": 1}},
        "attributes": {"age": {"kind": "numeric"}, "channel": {"kind": "categorical"}},
    },
    "policies": ["careful", "bold"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15, "unit": "rounds"}, "gift": {"low": 0, "high": 0.3}}},
    "objectives": {"joy": {}, "cost": {"weight": -1}},
}


def make(root: Path, **branches: Any) -> Platform:
    tree = copy.deepcopy(TREE)
    for name, branch in branches.items():
        tree[name] = {**tree[name], **branch} if isinstance(branch, dict) and name != "action" else branch
    return platform_from_tree(tree, root, "fastq.yaml")


def bare(root: Path, **branches: Any) -> Platform:
    """A platform of decisions alone."""
    return make(root, logs={"activity": None, "players": None}, state={"measures": {}, "attributes": {}}, **branches)


def good(n: int = 6) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "decision_id": [f"d{i}" for i in range(n)],
            "player_id": [f"p{i % 3}" for i in range(n)],
            "decided_at": [START + timedelta(days=i // 3) for i in range(n)],
            "policy": ["careful" if i % 2 else "bold" for i in range(n)],
            "propensity": [0.5 if i else None for i in range(n)],
            "goal": [1.0 + i for i in range(n)],
            "gift": [0.05 * i for i in range(n)],
            "joy": [0.1 * i if i < n - 1 else None for i in range(n)],
            "cost": [0.0] * n,
        },
        schema_overrides={"decided_at": pl.Datetime("us", "UTC"), "propensity": pl.Float64, "joy": pl.Float64},
    )


def write(root: Path, name: str, frame: pl.DataFrame) -> Path:
    path = root / "logs" / name
    path.parent.mkdir(exist_ok=True)
    match path.suffix:
        case ".parquet":
            frame.write_parquet(path)
        case ".csv":
            frame.write_csv(path)
        case ".ndjson":
            frame.with_columns(pl.col(pl.Datetime).dt.strftime("%Y-%m-%dT%H:%M:%S%.fZ")).write_ndjson(path)
    return path


def write_all(root: Path, decisions: pl.DataFrame) -> None:
    write(root, "decisions.parquet", decisions)
    events = {
        "player_id": ["p0", "p1", "p2", "p0"],
        "occurred_at": [START - timedelta(hours=h) for h in (9, 8, 7, 6)],
        "rounds": [1.0, 2.0, 3.0, 4.0],
        "share": [0.5] * 4,
    }
    write(root, "activity.parquet", pl.DataFrame(events))
    write(root, "players.parquet", pl.DataFrame({"player_id": ["p0", "p1", "p2"], "age": [20, 30, None], "channel": ["ads", "friend", "ads"]}))


def spoil(frame: pl.DataFrame, row: int, column: str, value: object) -> pl.DataFrame:
    return frame.with_columns(pl.when(pl.int_range(pl.len()) == row).then(pl.lit(value, frame.schema[column])).otherwise(column).alias(column))


# ---- good logs ------------------------------------------------------------------------------------------------------


def test_good_logs_are_accepted_whole_in_canonical_columns_and_order(tmp_path: Path) -> None:
    write_all(tmp_path, good().reverse())
    records = read_records(make(tmp_path))
    assert records.counts == {"decisions": Counts(6, 0, 0), "activity": Counts(4, 0, 0), "players": Counts(3, 0, 0)}
    assert records.decisions.columns == [
        "decision_id",
        "player_id",
        "decided_at",
        "policy",
        "propensity",
        "assignment",
        "model_version",
        "goal",
        "gift",
        "joy",
        "cost",
    ]
    assert records.decisions["decision_id"].to_list() == ["d0", "d3", "d1", "d4", "d2", "d5"]  # by player, then time
    assert records.decisions.schema["decided_at"] == pl.Datetime("us", "UTC")
    assert records.activity is not None
    assert records.activity.collect().columns == ["player_id", "occurred_at", "known_at", "rounds", "share"]
    assert records.activity.collect().select(pl.col("known_at") == pl.col("occurred_at")).to_series().all()
    assert records.players is not None
    assert records.players.to_dicts()[2] == {"player_id": "p2", "valid_from": None, "age": None, "channel": "ads"}
    assert records.proposals is None
    assert records.items is None
    assert records.quarantine.is_empty()
    assert not any(records.metrics.values())
    assert records.warnings == []


def test_parquet_csv_ndjson_and_a_query_give_the_same_records(tmp_path: Path) -> None:
    expected = None
    for name in ("decisions.parquet", "decisions.csv", "decisions.ndjson", "decisions.db"):
        root = tmp_path / name
        root.mkdir()
        path = write(root, name, good())
        source: object = f"logs/{name}"
        if name == "decisions.db":
            with sqlite3.connect(path) as database:
                database.execute(
                    "create table d(decision_id text, player_id text, decided_at text, policy text, propensity real, goal real, gift real, joy real, cost real)"
                )
                rows = good().with_columns(pl.col("decided_at").dt.strftime("%Y-%m-%d %H:%M:%S"))
                database.executemany("insert into d values (?,?,?,?,?,?,?,?,?)", rows.rows())
            database.close()
            source = {"uri": "sqlite://logs/decisions.db", "query": "select * from d"}
        records = read_records(bare(root).model_copy(update={"logs": Logs.model_validate({"decisions": source})}))
        assert records.counts["decisions"] == Counts(6, 0, 0), name
        expected = records.decisions if expected is None else expected
        assert_frame_equal(records.decisions, expected)


@pytest.mark.parametrize(
    "ids",
    [
        pl.Series([1, 2, 3]),
        pl.Series([1.0, 2.0, 3.0]),
        pl.Series(["1", "2", "3"]),
        pl.Series(["1", "2", "3"], dtype=pl.Categorical),
        pl.Series([1, 2, 3], dtype=pl.UInt8),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_ids_are_text_without_a_decimal_point(tmp_path: Path, ids: pl.Series, suffix: str) -> None:
    write(tmp_path, f"decisions.{suffix}", good(3).with_columns(decision_id=ids, player_id=ids))
    assert read_records(bare(tmp_path)).decisions.select("decision_id", "player_id").rows() == [("1", "1"), ("2", "2"), ("3", "3")]


INSTANT = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    "times",
    [
        ["2026-03-01T06:00:00Z"],
        ["2026-03-01 06:00:00"],
        ["2026-03-01 06:00"],
        ["2026-03-01T11:30:00+05:30"],
        ["2026-03-01T06:00:00.000000 UTC"],
        ["1772344800"],
        [1772344800],
        [1772344800000],
        [1772344800000000],
        [1772344800.0],
        [INSTANT],
        [INSTANT.replace(tzinfo=None)],
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv", "ndjson"])
def test_every_way_to_write_an_instant_is_read_as_that_instant(tmp_path: Path, times: list[Any], suffix: str) -> None:
    frame = good(1).with_columns(decided_at=pl.Series(times))
    if isinstance(times[0], datetime) and suffix == "ndjson":
        frame = frame.with_columns(pl.col("decided_at").cast(pl.String))
    path = tmp_path / "logs" / f"decisions.{suffix}"
    path.parent.mkdir()
    {"parquet": frame.write_parquet, "csv": frame.write_csv, "ndjson": frame.write_ndjson}[suffix](path)
    assert read_records(bare(tmp_path)).decisions["decided_at"].to_list() == [INSTANT]


def test_numbers_since_1970_are_told_apart_back_to_1990(tmp_path: Path) -> None:
    seconds = 631_152_000  # 1990-01-01
    numbers = pl.Series([seconds, seconds * 10**3, seconds * 10**6, seconds * 10**9])
    write(tmp_path, "decisions.parquet", good(4).with_columns(decided_at=numbers))
    assert read_records(bare(tmp_path)).decisions["decided_at"].unique().to_list() == [datetime(1990, 1, 1, tzinfo=UTC)]


def test_ids_that_are_not_all_whole_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    write(tmp_path, "decisions.csv", good(2).with_columns(player_id=pl.Series(["1.0", "1.5"])))
    assert read_records(bare(tmp_path)).decisions["player_id"].to_list() == ["1.0", "1.5"]


def test_a_date_alone_is_its_midnight(tmp_path: Path) -> None:
    write(tmp_path, "decisions.csv", good(2).with_columns(decided_at=pl.Series(["2026-03-01", "2026-03-02"])))
    assert read_records(bare(tmp_path)).decisions["decided_at"].to_list() == [INSTANT.replace(hour=0), INSTANT.replace(hour=0, day=2)]


def test_an_action_that_misses_its_bound_by_float32_is_on_it(tmp_path: Path) -> None:
    frame = good(2).with_columns(gift=pl.Series([float(np.float32(0.3)), 0.1]))
    assert frame["gift"][0] > 0.3
    write(tmp_path, "decisions.parquet", frame)
    assert read_records(bare(tmp_path)).decisions["gift"].to_list() == [0.3, 0.1]


# ---- bad rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("decision_id", None),
        ("player_id", None),
        ("player_id", ""),
        ("decided_at", None),
        ("policy", None),
        ("policy", "nobody"),
        ("propensity", 0.0),
        ("propensity", -0.1),
        ("propensity", math.nan),
        ("propensity", math.inf),
        ("goal", None),
        ("goal", math.nan),
        ("goal", -math.inf),
        ("goal", 0.99),
        ("goal", 15.01),
        ("gift", 0.3001),
        ("joy", math.nan),
        ("joy", math.inf),
        ("assignment", 0.0),
        ("assignment", 1.1),
        ("assignment", math.nan),
    ],
)
def test_a_bad_value_takes_its_row_and_no_other(tmp_path: Path, column: str, value: object) -> None:
    write(tmp_path, "decisions.parquet", spoil(good().with_columns(assignment=pl.lit(0.5)), 2, column, value))
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(5, 1, 0)
    (row,) = records.quarantine.to_dicts()
    assert (row["table"], row["file"], row["row"]) == ("decisions", "logs/decisions.parquet", 3)
    assert row["reason"].startswith(f"{column} ")
    assert ";" not in row["reason"].replace("number; leave", "")  # one defect, one complaint
    assert row["decision_id"] == ("d2" if column != "decision_id" else None)
    assert json.loads(row["content"])["player_id"] == ("p2" if column != "player_id" else None)
    broken = [name for name, failed in records.metrics.items() if failed and name.startswith(f"decisions.{column}.")]
    assert len(broken) == 1
    assert "d2" not in records.decisions["decision_id"]


def test_several_defects_of_one_row_are_all_named(tmp_path: Path) -> None:
    frame = spoil(spoil(spoil(good(), 1, "goal", 99.0), 1, "joy", math.nan), 1, "policy", "nobody")
    write(tmp_path, "decisions.parquet", frame)
    reason = read_records(bare(tmp_path)).quarantine["reason"].item()
    assert all(said in reason for said in ("goal 99.0 is outside its bounds 1 to 15 rounds", "joy NaN", "policy nobody is not one of careful, bold, fastq"))


def test_a_null_propensity_or_objective_is_no_defect(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good().with_columns(propensity=pl.lit(None, pl.Float64), joy=pl.lit(None, pl.Float64)))
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(6, 0, 0)
    assert any("no row has a propensity" in w for w in records.warnings)
    assert any("joy is never known" in w for w in records.warnings)


def test_repeats_are_counted_and_other_content_is_refused_while_the_first_stays(tmp_path: Path) -> None:
    frame = good()
    write(tmp_path, "decisions-2.parquet", pl.concat([frame[:1].with_columns(goal=2.5), frame[3:]]))  # d0 comes first in the other file
    write(tmp_path, "decisions-1.parquet", pl.concat([frame[:3], frame[1:2], frame[1:2].with_columns(gift=0.2)]))
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(6, 2, 1)  # 9 rows in
    refused = records.quarantine.select("file", "row", "decision_id", "goal").rows()
    assert refused == [("logs/decisions-1.parquet", 5, "d1", 2.0), ("logs/decisions-2.parquet", 1, "d0", 2.5)]
    assert records.quarantine["reason"].str.contains("decision_id d[01] has an earlier row").all()
    assert records.decisions.filter(decision_id="d0")["goal"].item() == 1.0


def test_rows_without_an_id_are_no_twins(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", spoil(spoil(good(), 1, "decision_id", None), 2, "decision_id", None))
    assert read_records(bare(tmp_path)).quarantine["reason"].to_list() == ["decision_id is missing"] * 2


def test_rows_that_repeat_a_nan_are_repeats_too(tmp_path: Path) -> None:
    frame = spoil(good(), 0, "joy", math.nan)
    write(tmp_path, "decisions.parquet", pl.concat([frame, frame]))
    assert read_records(bare(tmp_path)).counts["decisions"] == Counts(5, 1, 6)


def test_one_unreadable_field_is_one_quarantined_row_that_keeps_its_text(tmp_path: Path) -> None:
    frame = good().with_columns(pl.col("decided_at").dt.strftime("%F %T"), pl.col("goal").cast(pl.String), pl.col("gift").cast(pl.String))
    frame = spoil(spoil(spoil(frame, 1, "decided_at", "yesterday"), 2, "goal", "7 rounds"), 3, "gift", "7,5")
    for suffix in ("csv", "ndjson", "parquet"):
        root = tmp_path / suffix
        root.mkdir()
        write(root, f"decisions.{suffix}", frame)
        records = read_records(bare(root))
        assert records.counts["decisions"] == Counts(3, 3, 0)
        assert records.quarantine["reason"].to_list() == [
            "decided_at yesterday is not a timestamp",
            "goal 7 rounds is not a number",
            "gift 7,5 is not a number",
        ]
        assert [json.loads(c)[k] for c, k in zip(records.quarantine["content"], ("decided_at", "goal", "gift"), strict=True)] == [
            "yesterday",
            "7 rounds",
            "7,5",
        ]
        assert records.metrics["decisions.decided_at.readable"] == 1
        assert records.metrics["decisions.decided_at.present"] == 0


def test_a_catalogue_refuses_unknown_items_and_propensities_above_one(tmp_path: Path) -> None:
    action = {"kind": "catalogue", "features": {"price": {"kind": "numeric"}, "brand": {"kind": "categorical"}}}
    platform = make(tmp_path, logs={"activity": None, "players": None, "items": "logs/items.csv"}, state={"measures": {}, "attributes": {}}, action=action)
    write(tmp_path, "items.csv", pl.DataFrame({"item_id": [1, 2, 3, 3], "price": ["5", "inf", "7", "8"], "brand": ["a", "b", None, None]}))
    frame = good(4).drop("goal", "gift").with_columns(item_id=pl.Series([1, 9, 3, 1]), propensity=pl.Series([1.0, 0.5, 0.5, 1.5]))
    write(tmp_path, "decisions.parquet", frame)
    records = read_records(platform)
    assert records.counts["items"] == Counts(2, 2, 0)
    assert records.items is not None
    assert records.items.rows() == [("1", 5.0, "a"), ("3", 7.0, None)]
    reasons = dict(records.quarantine.filter(table="decisions").select("decision_id", "reason").iter_rows())
    assert reasons == {"d1": "item_id 9 is not in the items log", "d3": "propensity 1.5 is above 1, and a catalogue's propensities are probabilities"}
    assert records.decisions["item_id"].to_list() == ["1", "3"]


def test_a_step_is_a_grid_and_leaving_it_warns_beyond_float_error(tmp_path: Path) -> None:
    dimensions = {"goal": {"low": 1, "high": 15}, "gift": {"low": 0, "high": 0.3, "step": 0.1}}
    platform = bare(tmp_path, action={"kind": "continuous", "dimensions": dimensions})
    write(tmp_path, "decisions.parquet", good(4).with_columns(gift=pl.Series([0.1 + 0.2, float(np.float32(0.1)), 0.15, 0.0])))
    records = read_records(platform)
    assert records.counts["decisions"] == Counts(4, 0, 0)
    assert records.metrics["decisions.gift.grid"] == 1
    assert "decisions: 1 row break the rule decisions.gift.grid and are kept" in records.warnings


# ---- the other tables -----------------------------------------------------------------------------------------------


def test_events_are_held_to_their_measures_bounds_and_known_when_recorded(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    late = START + timedelta(hours=3)
    nan, inf = math.nan, math.inf
    rows = [
        ("p0", START, late, 1.0, 0.5),
        ("p0", START, None, 2.0, 1.0),
        ("p0", late, START, 3.0, None),  # recorded before it happened: a clock was wrong
        (None, START, None, 1.0, 0.5),
        ("p1", None, None, 1.0, 0.5),
        ("p1", START, None, -1.0, 0.5),
        ("p1", START, None, 1.0, 1.5),
        ("p2", START, None, nan, 0.5),
        ("p2", START, None, 1.0, inf),
        ("p0", START, late, 1.0, 0.5),
    ]
    schema = {
        "player_id": pl.String,
        "occurred_at": pl.Datetime("us", "UTC"),
        "recorded_at": pl.Datetime("us", "UTC"),
        "rounds": pl.Float64,
        "share": pl.Float64,
    }
    write(tmp_path, "activity.parquet", pl.DataFrame(rows, schema, orient="row"))
    records = read_records(make(tmp_path))
    assert records.counts["activity"] == Counts(3, 6, 1)
    assert records.activity is not None
    assert records.activity.collect()["known_at"].to_list() == [late, START, late]
    assert records.metrics["activity.recorded_at.order"] == 1
    assert records.quarantine["reason"].to_list() == [
        "player_id is missing",
        "occurred_at is missing",
        "rounds -1.0 is below its min 0",
        "share 1.5 is above its max 1",
        "rounds NaN is not a finite number",
        "share inf is not a finite number",
    ]


def test_events_that_differ_only_in_an_ignored_column_are_two_events(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    event = {"player_id": ["p0"] * 3, "occurred_at": [START] * 3, "rounds": [1.0] * 3, "share": [0.5] * 3, "event_id": ["a", "b", "b"]}
    write(tmp_path, "activity.parquet", pl.DataFrame(event))
    records = read_records(make(tmp_path))
    assert records.counts["activity"] == Counts(2, 0, 1)
    assert "activity: ignored columns that fastq.yaml does not name: event_id" in records.warnings


def test_a_count_needs_no_column_of_its_own(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    platform = make(tmp_path, state={"measures": {"visits": {"aggregate": "count"}}})
    records = read_records(platform)
    assert records.activity is not None
    assert records.activity.collect()["visits"].to_list() == [1.0] * 4


def test_players_may_have_several_versions_but_one_truth_each(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    rows = [
        ("p0", START, 20.0),
        ("p0", START + timedelta(days=1), 21.0),
        ("p0", START, 22.0),
        ("p1", None, math.inf),
        (None, None, 1.0),
        ("p2", None, 3.0),
        ("p2", None, 3.0),
    ]
    frame = pl.DataFrame(rows, {"player_id": pl.String, "valid_from": pl.Datetime("us", "UTC"), "age": pl.Float64}, orient="row").with_columns(
        channel=pl.lit("ads")
    )
    write(tmp_path, "players.parquet", frame)
    records = read_records(make(tmp_path))
    assert records.counts["players"] == Counts(3, 3, 1)
    assert records.quarantine["reason"].str.extract(r"^(\w+)").to_list() == ["player_id", "age", "player_id"]
    assert records.metrics["decisions.player_id.described"] == 2  # p1's decisions, twice
    assert records.counts["decisions"].quarantined == 0


def test_proposals_follow_the_rules_of_decisions_and_name_one(tmp_path: Path) -> None:
    platform = make(tmp_path, logs={"activity": None, "players": None, "proposals": "logs/proposals.parquet"}, state={"measures": {}, "attributes": {}})
    write(tmp_path, "decisions.parquet", spoil(good(), 4, "goal", 99.0))
    rows = [
        ("d0", "careful", 2.0, 0.1),
        ("d0", "bold", 3.0, 0.1),
        ("d0", "bold", 4.0, 0.1),
        ("d9", "bold", 3.0, 0.1),
        ("d4", "bold", 3.0, 0.1),
        ("d1", "bold", 16.0, 0.1),
        ("d1", "other", 3.0, 0.1),
    ]
    write(tmp_path, "proposals.parquet", pl.DataFrame(rows, ["decision_id", "policy", "goal", "gift"], orient="row"))
    records = read_records(platform)
    assert records.counts["proposals"] == Counts(2, 5, 0)
    assert records.proposals is not None
    assert records.proposals.columns == ["decision_id", "policy", "goal", "gift", "propensity", "assignment"]
    reasons = records.quarantine.filter(table="proposals")["reason"].to_list()
    assert "same decision_id and policy" in reasons[0]
    assert reasons[1:3] == ["decision_id d9 is not among the accepted decisions", "decision_id d4 is not among the accepted decisions"]
    assert "goal 16.0 is outside" in reasons[3]
    assert "policy other" in reasons[4]


def test_since_keeps_later_decisions_and_the_activity_they_look_back_on(tmp_path: Path) -> None:
    write_all(tmp_path, good(12).with_columns(gift=pl.lit(0.1)))  # days 0 to 3
    events = {"player_id": ["p0"] * 3, "occurred_at": [START + timedelta(days=d) for d in (-4, -3, 2)], "rounds": [1.0] * 3, "share": [0.5] * 3}
    write(tmp_path, "activity.parquet", pl.DataFrame(events))
    write(tmp_path, "proposals.parquet", pl.DataFrame({"decision_id": ["d0", "d11", "d99"], "policy": ["bold"] * 3, "goal": [2.0] * 3, "gift": [0.1] * 3}))
    records = read_records(make(tmp_path, logs={"proposals": "logs/proposals.parquet"}), since=START.replace(tzinfo=None) + timedelta(days=2))
    assert sorted(records.decisions["decision_id"]) == ["d10", "d11", "d6", "d7", "d8", "d9"]
    assert records.counts["activity"].accepted == 2  # window 3, churn 5: five days back
    assert records.counts["proposals"] == Counts(1, 0, 0)  # d0 is earlier, and whether d99 is or is unknown only a reading of all can tell


def test_since_the_beginning_of_time_is_all_of_it(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    assert read_records(make(tmp_path), since=datetime(1, 1, 1, tzinfo=UTC)).counts == read_records(make(tmp_path)).counts


# ---- what ends the reading ------------------------------------------------------------------------------------------


def refusal(platform: Platform) -> str:
    with pytest.raises(LogsError) as error:
        read_records(platform)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_or_an_unmatched_pattern_is_named(tmp_path: Path) -> None:
    assert "logs.decisions: no file matches logs/decisions*" in refusal(bare(tmp_path))
    assert "logs.decisions: no such file: logs/nothere.csv" in refusal(
        bare(tmp_path).model_copy(update={"logs": Logs.model_validate({"decisions": "logs/nothere.csv"})})
    )


@pytest.mark.parametrize("name", ["decisions.csv", "decisions.parquet", "decisions.ndjson"])
def test_an_empty_file_and_an_empty_table_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, good(0))
    assert name in refusal(bare(tmp_path))
    (tmp_path / "logs" / name).write_bytes(b"")
    assert name in refusal(bare(tmp_path))


def test_one_empty_file_among_others_is_no_matter(tmp_path: Path) -> None:
    write(tmp_path, "decisions-1.parquet", good())
    write(tmp_path, "decisions-2.parquet", good(0))
    assert read_records(bare(tmp_path)).counts["decisions"] == Counts(6, 0, 0)


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "decisions.parquet", good())
    path.write_bytes(path.read_bytes()[:-50])
    assert refusal(bare(tmp_path)).startswith("logs/decisions.parquet: cannot be read as Parquet")
    path.unlink()
    (tmp_path / "logs/decisions.xlsx").write_bytes(b"x")
    assert "ends in .parquet" in refusal(bare(tmp_path))


def test_a_line_that_is_no_row_is_one_refused_row(tmp_path: Path) -> None:
    """Of a CSV or NDJSON file; nothing of it is kept but where it stands and why, for whom it is of cannot be told, and that may be somebody forgotten."""
    write(tmp_path, "decisions.csv", good(4))
    write(tmp_path, "decisions.ndjson", good(7)[4:])
    lines = (tmp_path / "logs/decisions.csv").read_text().splitlines()
    (tmp_path / "logs/decisions.csv").write_bytes("\n".join([*lines[:2], lines[2] + ",secret", *lines[3:]]).encode() + b"\n\xff\xfe,secret\n")
    objects = (tmp_path / "logs/decisions.ndjson").read_text().splitlines()
    objects[2:3] = ["", objects[2][:-9], "null"]
    (tmp_path / "logs/decisions.ndjson").write_text("\n".join(objects))
    records = read_records(bare(tmp_path))
    assert records.quarantine.select("file", "row", "reason").rows() == [
        ("logs/decisions.csv", 2, "the line has 10 fields where the header has 9"),
        ("logs/decisions.csv", 5, "the line is not UTF-8 text"),
        ("logs/decisions.ndjson", 3, "the line is no JSON (Unterminated string starting at character 155)"),
        ("logs/decisions.ndjson", 4, "the line is no JSON object"),
    ]
    assert records.counts["decisions"] == Counts(5, 4, 0)
    assert records.metrics["decisions.line.readable"] == 4
    assert records.metrics["decisions.decision_id.present"] == 0
    assert not any(b"secret" in file.read_bytes() for file in Workspace(tmp_path).staged.rglob("*.arrow"))
    others = pl.concat([good(4), good(7)[4:]]).filter(~pl.col("decision_id").is_in(["d1", "d6"])).sort("player_id", "decided_at")
    assert_frame_equal(records.decisions.drop("assignment", "model_version"), others)


@pytest.mark.parametrize("beside", [[], ["null"]], ids=["read at once", "read by line"])
def test_half_of_a_character_is_no_other_id(tmp_path: Path, beside: list[str]) -> None:
    """Polars reads a lone surrogate as a zero character, so that a player would be somebody else."""
    write(tmp_path, "decisions.ndjson", good(5))
    path = tmp_path / "logs/decisions.ndjson"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"player_id":"', '"player_id":"secret\\ud800')
    path.write_text("\n".join([*lines, *beside]))
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(4, 1 + len(beside), 0)
    assert records.quarantine["row"].to_list() == [2, 6][: 1 + len(beside)]
    assert records.quarantine["reason"][0].startswith("the line ")
    assert "secret" not in str(records.quarantine.to_dicts())


def test_a_file_of_which_most_is_no_row_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good())
    (tmp_path / "logs/decisions.ndjson").write_text(json.dumps([{"decision_id": "d9"}, {"decision_id": "d8"}], indent=1))
    with pytest.raises(LogsError, match=r"decisions.ndjson: cannot be read as NDJSON \(most lines cannot be read; the first such is no JSON"):
        read_records(bare(tmp_path))
    (tmp_path / "logs/decisions.ndjson").unlink()
    text = good(8).write_csv().splitlines()
    (tmp_path / "logs/decisions.csv").write_text("\n".join([*text[:3], f'"{text[3]}', *text[4:]]))  # it would hide all that follows
    with pytest.raises(LogsError, match=r"decisions.csv: cannot be read as CSV \(line 9: unexpected end of data\)"):
        read_records(bare(tmp_path))


def test_a_missing_column_is_named_with_its_nearest(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good().rename({"gift": "gifts"}))
    said = refusal(bare(tmp_path))
    assert "logs/decisions.parquet: column 'gift' is missing, which action.dimensions.gift in fastq.yaml names" in said
    assert "did you mean 'gifts'?" in said


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("goal", pl.Series(["a", "b", "3"]), "column 'goal' holds values such as 'a', expected a number"),
        ("joy", pl.Series([[1], [2], [3]]), "column 'joy' is of type List(Int64), expected a number"),
        ("decided_at", pl.Series(["soon", "later", "2026-01-01"]), "column 'decided_at' holds values such as 'soon', expected a timestamp"),
        ("decided_at", pl.Series([1, 2, 3]), "column 'decided_at' holds values such as '1', expected a timestamp"),
        ("decided_at", pl.Series([True, False, True]), "column 'decided_at' is of type Boolean, expected a timestamp"),
        ("player_id", pl.Series([1.5, 2.5, 3.0]), "column 'player_id' holds values such as '1.5', expected an id"),
        ("player_id", pl.Series([START] * 3), "column 'player_id' is of type Datetime"),
        ("policy", pl.Series([b"a", b"b", b"c"]), "column 'policy' is of type Binary, expected text"),
    ],
)
def test_a_column_of_the_wrong_type_is_named_with_found_and_expected(tmp_path: Path, column: str, values: pl.Series, says: str) -> None:
    write(tmp_path, "decisions.parquet", good(3).with_columns(values.alias(column)))
    said = refusal(bare(tmp_path))
    assert said.startswith("logs/decisions.parquet: ")
    assert says in said


def test_a_query_that_fails_is_named_without_its_password(tmp_path: Path) -> None:
    logs = Logs.model_validate({"decisions": {"uri": "nonsense://user:secret@host/db", "query": "select 1"}})
    said = refusal(bare(tmp_path).model_copy(update={"logs": logs}))
    assert "logs.decisions: the query cannot be run" in said
    assert "secret" not in said
    logs = Logs.model_validate({"decisions": {"uri": "sqlite://gone.db", "query": "select 1"}})
    assert "no such file" in refusal(bare(tmp_path).model_copy(update={"logs": logs}))
    assert not (tmp_path / "gone.db").exists()


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_thin_logs_warn_and_are_not_refused(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good(1))
    assert any("there is one only" in w for w in read_records(bare(tmp_path)).warnings)
    write(tmp_path, "decisions.parquet", good(6).with_columns(player_id=pl.lit("p0"), policy=pl.lit("bold")))
    warnings = read_records(bare(tmp_path)).warnings
    assert any("all are of one player" in w for w in warnings)
    assert any("one policy only has acted, bold" in w for w in warnings)
    assert any("never acted: careful" in w for w in warnings)


def test_decisions_before_any_activity_old_logs_and_future_times_warn(tmp_path: Path) -> None:
    long_ago = START - timedelta(days=4)
    write_all(tmp_path, good().with_columns(pl.col("decided_at") - timedelta(days=4)))
    write(tmp_path, "activity.parquet", pl.DataFrame({"player_id": ["p0", "p1"], "occurred_at": [long_ago, START], "rounds": [1.0, 1.0], "share": [0.5, 0.5]}))
    records = read_records(make(tmp_path))
    assert records.metrics["decisions.activity.earlier"] == 5  # strictly before: only d3 of p0 saw anything
    assert records.metrics["decisions.decided_at.fresh"] == 1  # the newest is a week old, churn is five periods
    write(tmp_path, "decisions.parquet", spoil(good(), 0, "decided_at", datetime.now(UTC) + timedelta(days=2)))
    records = read_records(make(tmp_path))
    assert records.metrics["decisions.decided_at.past"] == 1
    assert records.metrics["decisions.decided_at.fresh"] == 0
    assert records.counts["decisions"].accepted == 6


@pytest.mark.parametrize("moment", [datetime(9999, 12, 31), datetime(1970, 1, 1), datetime(1, 1, 1), datetime(1899, 12, 30)])  # noqa: DTZ001 - in UTC
@pytest.mark.parametrize("table", ["decisions", "activity"])
def test_what_programs_write_for_no_time_is_refused_and_lays_no_grid_over_centuries(tmp_path: Path, table: str, moment: datetime) -> None:
    write_all(tmp_path, good())
    before = len(features.build_rows(make(tmp_path), read_records(make(tmp_path))))
    column = "decided_at" if table == "decisions" else "occurred_at"
    path = tmp_path / "logs" / f"{table}.parquet"
    more = pl.read_parquet(path).head(1).with_columns(pl.lit(moment, pl.Datetime("us", "UTC")).alias(column))
    write(tmp_path, path.name, pl.concat([pl.read_parquet(path), more if table == "activity" else more.with_columns(decision_id=pl.lit("d99"))]))
    records = read_records(make(tmp_path))
    assert records.quarantine.select("table", pl.col("reason").str.starts_with(f"{column} ")).rows() == [(table, True)]
    assert records.metrics[f"{table}.{column}.past"] == 0, "it is not said to be kept too"
    assert len(features.build_rows(make(tmp_path), records)) == before


# ---- served decisions -----------------------------------------------------------------------------------------------


def serve(
    root: Path, rows: list[tuple[Any, ...]], outcomes: list[tuple[Any, ...]] = (), executed: list[tuple[Any, ...]] = (), name: str = "a.db"
) -> sqlite3.Connection:
    """A server's log as serving/decision_log.py lays it out, left open: what is read may still stand in the WAL."""
    served = Workspace(root).served
    served.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(served / name)
    database.execute("pragma journal_mode=wal")
    database.execute(
        "create table if not exists decisions(decision_id text primary key, player_id text, decided_at integer, policy text, propensity real, "
        "model_version text, action text, detail text, state blob)"
    )
    database.execute(
        "create table if not exists outcomes(decision_id text, objective text, value real, recorded_at integer, primary key(decision_id, objective))"
    )
    database.execute("create table if not exists executed(decision_id text primary key, action text, recorded_at integer)")
    database.executemany("insert into decisions values (?, ?, ?, 'fastq', ?, '3', ?, '{}', x'00ff')", rows)
    database.executemany("insert into outcomes values (?, ?, ?, ?)", outcomes)
    database.executemany("insert into executed values (?, ?, ?)", executed)
    database.commit()
    return database


AT = int((START + timedelta(days=5)).timestamp() * 1_000_000)
ACTION = json.dumps({"goal": 7.25, "gift": 0.1})


def test_served_decisions_stand_beside_the_platforms_own(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good())
    serve(
        tmp_path,
        [("s1", "p1", AT, 0.25, ACTION), ("s2", "p9", AT, None, ACTION)],
        [("s1", "joy", 0.5, 1), ("b1", "cost", 0.2, 2), ("s1", "unheard of", 1.0, 1)],
    )
    batch = read_served(bare(tmp_path)).head(1).with_columns(decision_id=pl.lit("b1"), joy=pl.lit(None, pl.Float64))
    batch.write_parquet(Workspace(tmp_path).served / "batch.parquet")
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(9, 0, 0)
    row = records.decisions.filter(decision_id="s1").row(0)
    assert row == ("s1", "p1", START + timedelta(days=5), "fastq", 0.25, None, "3", 7.25, 0.1, 0.5, None)
    assert records.decisions.filter(decision_id="b1").select("goal", "joy", "cost").row(0) == (7.25, None, 0.2)
    assert records.decisions.filter(decision_id="s2")["propensity"].item() is None


def test_with_which_chance_a_served_policy_was_chosen_is_read_back(tmp_path: Path) -> None:
    """From the column of a server's log, or from the details of an earlier version's."""
    write(tmp_path, "decisions.parquet", good())
    database = serve(tmp_path, [("s1", "p1", AT, 0.25, ACTION), ("s2", "p1", AT, 0.25, ACTION)])
    database.execute("update decisions set detail = '{\"assignment\": 0.9, \"seed\": 3}' where decision_id = 's1'")
    database.commit()
    assert read_records(bare(tmp_path)).decisions.filter(decision_id="s1")["assignment"].item() == 0.9
    database.execute("alter table decisions add column assignment real")
    database.execute("update decisions set assignment = 0.1 where decision_id = 's2'")
    database.commit()
    served = read_records(bare(tmp_path)).decisions.filter(pl.col("decision_id").is_in(["s1", "s2"]))
    assert served.select("decision_id", "assignment").rows() == [("s1", 0.9), ("s2", 0.1)]


def test_a_served_decision_that_is_exported_again_is_one_row_with_the_objectives_of_both(tmp_path: Path) -> None:
    serve(tmp_path, [("s1", "p1", AT, 0.25, ACTION), ("s2", "p2", AT, 0.5, ACTION)], [("s1", "joy", 0.5, 1)])
    export = good(2).with_columns(
        decision_id=pl.Series(["s1", "s2"]),
        player_id=pl.Series(["p1", "p2"]),
        policy=pl.lit("fastq"),
        joy=pl.lit(0.9),
        cost=pl.lit(0.3),
        goal=pl.Series([7.25, 8.0]),
    )
    export = export.with_columns(gift=pl.lit(0.1), propensity=pl.lit(None, pl.Float64))
    write(tmp_path, "decisions.parquet", pl.concat([good(), export, export]))
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(8, 0, 2)
    rows = records.decisions.filter(pl.col("decision_id").is_in(["s1", "s2"])).sort("decision_id")
    assert rows.select("goal", "propensity", "joy", "cost", "model_version").rows() == [(7.25, 0.25, 0.5, 0.3, "3"), (7.25, 0.5, 0.9, 0.3, "3")]
    assert records.metrics["decisions.served.same"] == 1  # s2 was exported with another goal


def test_a_second_export_of_a_served_decision_with_other_content_is_refused_as_it_stood(tmp_path: Path) -> None:
    serve(tmp_path, [("s1", "p1", AT, 0.25, ACTION)])
    export = good(2).with_columns(decision_id=pl.lit("s1"), goal=pl.Series([7.25, 3.5]))
    write(tmp_path, "decisions.parquet", pl.concat([good(1), export]))
    records = read_records(bare(tmp_path))
    assert records.counts["decisions"] == Counts(2, 1, 0)
    assert records.quarantine.select("decision_id", "goal").row(0) == ("s1", 3.5)


def test_what_was_executed_replaces_what_was_served_and_what_was_not_teaches_nothing(tmp_path: Path) -> None:
    rows = [(i, "p1", AT, 0.25, ACTION) for i in ("other", "same", "nothing")]
    outcomes = [(i, "joy", 0.5, 1) for i in ("other", "same", "nothing")]
    executed = [("other", json.dumps({"goal": 2.0}), 5), ("same", ACTION, 5), ("nothing", None, 5)]
    serve(tmp_path, rows, outcomes, executed)
    write(tmp_path, "decisions.parquet", pl.concat([good(), good(1).with_columns(decision_id=pl.lit("nothing"), cost=pl.lit(0.4))]))
    taught = (
        read_records(bare(tmp_path)).decisions.filter(policy="fastq").sort("decision_id").select("decision_id", "goal", "gift", "propensity", "joy", "cost")
    )
    assert taught.rows() == [("nothing", 7.25, 0.1, None, None, None), ("other", 2.0, 0.1, None, 0.5, None), ("same", 7.25, 0.1, 0.25, 0.5, None)]


def test_no_name_of_an_objective_or_dimension_is_in_the_way(tmp_path: Path) -> None:
    """Names that reading uses itself, or might."""
    renamed = {"goal": "first", "gift": "file", "joy": "objective", "cost": "arrived"}
    bounds = {"first": {"low": 1, "high": 15}, "file": {"low": 0, "high": 0.3}}
    tree = {**copy.deepcopy(TREE), "logs": {"decisions": "logs/d*"}, "state": {}, "action": {"kind": "continuous", "dimensions": bounds}}
    platform = platform_from_tree({**tree, "objectives": {"objective": {}, "arrived": {}}}, tmp_path, "fastq.yaml")
    write(tmp_path, "decisions.parquet", spoil(good(), 1, "gift", 9.0).rename(renamed))
    serve(tmp_path, [("s1", "p1", AT, 0.25, json.dumps({"first": 7.0, "file": 0.1}))], [("s1", "objective", 0.7, 1), ("s1", "arrived", 0.2, 1)])
    records = read_records(platform)
    assert records.decisions.filter(decision_id="s1").select("first", "file", "objective", "arrived").row(0) == (7.0, 0.1, 0.7, 0.2)
    assert records.quarantine.select("row", "first").row(0) == (2, 2.0)  # the quarantine's own columns come first
    assert json.loads(records.quarantine["content"].item())["file"] == "9.0"


def test_outcomes_reported_last_stand_whichever_file_holds_them(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good())
    serve(tmp_path, [("s1", "p1", AT, 0.25, ACTION)], [("s1", "joy", 0.1, 9)], name="b.db")
    serve(tmp_path, [], [("s1", "joy", 0.7, 10)], name="a.db")
    assert read_served(bare(tmp_path))["joy"].to_list() == [0.7]


def test_served_decisions_are_held_to_the_platform_file_as_it_is_now(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good())
    serve(tmp_path, [("s1", "p1", AT, 0.25, json.dumps({"goal": 99, "gift": 0.1}))])
    records = read_records(bare(tmp_path))
    assert records.quarantine.select("file", "row", "decision_id").row(0) == ("served", None, "s1")


def hear(root: Path, events: list[tuple[str, int, int, dict[str, float]]], name: str = "a.db") -> None:
    """Events that POST /v1/activity accepted, beside what `serve` lays out."""
    database = serve(root, [], name=name)
    database.execute(
        "create table if not exists activity(player_id text, occurred_at integer, recorded_at integer not null, body text, "
        "applied integer not null default 0, primary key(player_id, occurred_at, body))"
    )
    database.executemany("insert into activity values (?, ?, ?, ?, 1)", [(*event, json.dumps(body, sort_keys=True)) for *event, body in events])
    database.commit()


def at(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def test_events_that_came_over_http_stand_beside_the_platforms_own(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    before = read_records(make(tmp_path))
    heard = START + timedelta(hours=1, microseconds=7)
    hear(tmp_path, [("p1", at(START), at(heard), {"rounds": 5.0, "share": 0.25}), ("p9", at(START), at(heard), {"share": 1e-05, "gone": 3.0})])
    hear(tmp_path, [("p1", at(START), at(heard) + 9, {"rounds": 5.0, "share": 0.25})], name="b.db")  # asked again, of another replica
    records = read_records(make(tmp_path))
    assert records.activity is not None
    assert records.activity.collect().filter(pl.col("occurred_at") == START).rows() == [("p1", START, heard, 5.0, 0.25), ("p9", START, heard, None, 1e-05)]
    assert records.counts["activity"] == Counts(6, 0, 0)
    assert records.activity.collect().filter(pl.col("occurred_at") < START).equals(before.activity.collect())
    assert records.counts["decisions"] == before.counts["decisions"]
    assert_frame_equal(records.decisions, before.decisions)
    later = read_records(make(tmp_path), since=START + timedelta(days=6))  # five days back from there, START is no more
    assert later.counts["activity"].accepted == 0


def test_an_event_that_is_exported_again_counts_once_and_is_known_from_when_it_first_was(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    hour = timedelta(hours=1)
    twice = [("p0", START, None, 1 / 3, None), ("p1", START, START + 5 * hour, 2.0, 0.5), ("p2", START, START + hour, 3.0, 0.5)]
    schema = {"player_id": pl.String, "occurred_at": pl.Datetime("us", "UTC"), "recorded_at": pl.Datetime("us", "UTC")}
    export = pl.DataFrame([*twice, twice[0], ("p2", START, None, 4.0, 0.5)], {**schema, "rounds": pl.Float32, "share": pl.Float32}, orient="row")
    heard = [("p0", {"rounds": 1 / 3}), ("p1", {"rounds": 2.0, "share": 0.5}), ("p2", {"rounds": 3.0, "share": 0.5}), ("p2", {"rounds": 3.0})]
    hear(tmp_path, [(player, at(START), at(START + 2 * hour), body) for player, body in heard])
    for name in ("activity.parquet", "activity.csv"):
        write(tmp_path, name, export)
        records = read_records(make(tmp_path, logs={"activity": f"logs/{name}"}))
        assert records.activity is not None
        assert records.counts["activity"] == Counts(5, 0, 1)
        known = records.activity.collect().select("player_id", (pl.col("known_at") - START) / hour, "share").rows()
        assert known == [("p0", 2, None), ("p1", 2, 0.5), ("p2", 1, 0.5), ("p2", 0, 0.5), ("p2", 2, None)]


def test_events_that_came_over_http_are_held_to_their_measures(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    hear(tmp_path, [("p1", at(START), at(START), {"rounds": -1.0, "share": 0.5})])
    records = read_records(make(tmp_path))
    assert records.counts["activity"] == Counts(4, 1, 0)
    assert records.metrics["activity.rounds.min"] == 1
    assert records.quarantine.select("table", "file", "row", "player_id").row(0) == ("activity", "served", None, "p1")
    assert records.quarantine["reason"].item() == "rounds -1.0 is below its min 0"


def test_each_event_is_one_to_a_count_that_has_no_column(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    export = pl.DataFrame({"player_id": ["p0"], "occurred_at": [START], "rounds": [1.0], "share": [0.5]})
    write(tmp_path, "activity.parquet", export)
    hear(tmp_path, [("p0", at(START), at(START), {"rounds": 1.0, "share": 0.5}), ("p1", at(START), at(START), {"rounds": 1.0, "visits": 2.0})])
    records = read_records(make(tmp_path, state={"measures": {**TREE["state"]["measures"], "visits": {"aggregate": "count"}}}))
    assert records.activity is not None
    assert records.activity.collect().select("player_id", "visits").rows() == [("p0", 1.0), ("p1", 1.0)]


def test_an_empty_export_is_no_matter_where_events_came_over_http(tmp_path: Path) -> None:
    write_all(tmp_path, good())
    write(tmp_path, "activity.parquet", pl.read_parquet(tmp_path / "logs" / "activity.parquet").clear())
    hear(tmp_path, [("p1", at(START), at(START), {"rounds": 1.0})])
    assert read_records(make(tmp_path)).counts["activity"] == Counts(1, 0, 0)


def test_a_damaged_decision_log_is_named(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good())
    Workspace(tmp_path).served.mkdir(parents=True)
    (Workspace(tmp_path).served / "a.db").write_bytes(b"not a database, by any means" * 99)
    with pytest.raises(WorkspaceError, match=r"a\.db: the log of served decisions cannot be read"):
        read_records(bare(tmp_path))


def test_a_decision_log_that_was_only_just_made_is_empty(tmp_path: Path) -> None:
    Workspace(tmp_path).served.mkdir(parents=True)
    sqlite3.connect(Workspace(tmp_path).served / "a.db").close()
    (Workspace(tmp_path).served / "a.db").touch()
    assert read_served(bare(tmp_path)).is_empty()
    write(tmp_path, "decisions.parquet", good())
    write_tables(read_records(bare(tmp_path)), Workspace(tmp_path))  # asks it by itself which decisions were served
    assert read_tables(bare(tmp_path)).decisions.height == good().height


# ---- tables on disk -------------------------------------------------------------------------------------------------


def test_tables_are_read_back_as_they_were_written_and_replaced_whole(tmp_path: Path) -> None:
    write_all(tmp_path, spoil(good(), 2, "goal", 99.0))
    platform = make(tmp_path)
    records = read_records(platform)
    for _ in range(2):
        write_tables(records, Workspace(tmp_path))
        again = read_tables(platform)
        for table in ("decisions", "players", "quarantine"):
            assert_frame_equal(getattr(again, table), getattr(records, table))
        assert_frame_equal(again.activity.collect(), records.activity.collect())
        assert (again.counts, again.metrics, again.warnings) == (records.counts, records.metrics, records.warnings)
    assert {p.name for p in Workspace(tmp_path).state.iterdir()} <= {"tables", "tables.lock", "staged", "staged.lock", "format.json"}


def test_tables_that_are_replaced_while_they_are_read_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read is of one writing: one validation's counts beside another's rows would be nobody's."""
    write_all(tmp_path, good())
    platform, workspace = make(tmp_path), Workspace(tmp_path)
    before = read_records(platform)
    after = dataclasses.replace(before, decisions=before.decisions.head(1), metrics={**before.metrics, "turn": 2.0})
    replaced: list[int] = []
    read = records.read_events

    def meanwhile(asked: Platform) -> Any:
        if len(replaced) < times:  # between the summary and the rows' end
            replaced.append(1)
            with monkeypatch.context() as within:  # the last reading is under the lock, where nobody else replaces them
                within.setattr(Workspace, "lock", lambda *_, **__: contextlib.nullcontext())
                write_tables(after if len(replaced) % 2 else before, workspace)
        return read(asked)

    write_tables(before, workspace)
    monkeypatch.setattr(records, "read_events", meanwhile)
    for times, wanted in ((1, after), (2, before), (records.READINGS, after)):
        replaced.clear()
        found = read_tables(platform)
        assert len(replaced) == times
        assert_frame_equal(found.decisions, wanted.decisions)
        assert found.metrics == wanted.metrics
        write_tables(before, workspace)


def test_what_was_served_lies_by_itself_and_is_read_back_among_the_others(tmp_path: Path) -> None:
    write(tmp_path, "decisions.parquet", good())
    serve(tmp_path, [("s1", "p1", AT, 0.25, ACTION), ("s2", "p9", AT, None, ACTION)])
    records, kept = read_records(bare(tmp_path)), Workspace(tmp_path).tables / "served.parquet"
    write_tables(records, Workspace(tmp_path))
    assert pl.read_parquet(kept)["decision_id"].to_list() == ["s1", "s2"]
    assert_frame_equal(read_tables(bare(tmp_path)).decisions, records.decisions)
    assert strike_table(kept, "p9", []) == 1
    assert read_tables(bare(tmp_path)).decisions["decision_id"].to_list() == [i for i in records.decisions["decision_id"] if i != "s2"]
    kept.write_bytes(b"junk")
    with pytest.raises(WorkspaceError, match="damaged"):
        read_tables(bare(tmp_path))


def test_tables_that_are_missing_of_another_platform_or_damaged_are_refused_with_the_mend(tmp_path: Path) -> None:
    platform = make(tmp_path)
    with pytest.raises(WorkspaceError, match="run `fastq retrain`"):
        read_tables(platform)
    write_all(tmp_path, good())
    write_tables(read_records(platform), Workspace(tmp_path))
    with pytest.raises(WorkspaceError, match=r"players was written for another fastq\.yaml"):
        read_tables(make(tmp_path, state={"attributes": {"age": {"kind": "categorical"}}}))
    (Workspace(tmp_path).tables / "decisions.parquet").write_bytes(b"junk")
    with pytest.raises(WorkspaceError, match="damaged"):
        read_tables(platform)


# ---- whatever comes -------------------------------------------------------------------------------------------------

numbers = st.one_of(st.none(), st.floats(), st.floats(1, 15), st.integers(-3, 20), st.sampled_from(["", "x", "NaN", "1e400", "7", "７", "<b>", "null", "\x00"]))
times = st.one_of(
    st.none(),
    st.datetimes(),
    st.integers(-(2**62), 2**62),
    st.sampled_from(["", "2026-03-01", "0000-00-00", "2026-02-30T25:61:00Z", "9999-12-31T23:59:59+23:59"]),
)
ids = st.one_of(st.none(), st.sampled_from(["a", "b", "", " ", "1.0", "💥"]), st.integers(0, 3))
names = st.one_of(st.none(), st.sampled_from(["careful", "bold", "fastq", "nobody", ""]))
row = st.fixed_dictionaries(
    {
        "decision_id": ids,
        "player_id": ids,
        "decided_at": times,
        "policy": names,
        "propensity": numbers,
        "goal": numbers,
        "gift": numbers,
        "joy": numbers,
        "cost": numbers,
    }
)


near = st.sampled_from([lowest + slip for lowest in (0.0, 0.3, 1.0, 15.0, LARGEST, -LARGEST) for slip in (0.0, 1e-9, -1e-9, 1e-3, -1e-3)])
numbers_or_none = st.lists(st.none() | near | st.floats(), min_size=1, max_size=40)


@given(numbers_or_none, st.sampled_from([("activity", "rounds"), ("activity", "share"), ("decisions", "goal"), ("decisions", "gift"), ("decisions", "joy")]))
def test_no_number_that_breaks_a_rule_passes_the_first_look(values: list[float | None], where: tuple[Table, str]) -> None:
    table, column = where
    rules = [rule for rule in row_rules(make(Path()), table) if rule.severity == "quarantine" and rule.name.startswith(f"{table}.{column}.")]
    assert {rule.name.rsplit(".", 1)[1] for rule in rules if rule.within} >= {"finite", "size"}
    frame = pl.DataFrame({column: pl.Series(values, dtype=pl.Float64)}).select(suspect=suspect(rules), bad=pl.any_horizontal(rule.broken for rule in rules))
    assert frame.filter(pl.col("bad") & ~pl.col("suspect")).is_empty()


def as_text(value: object) -> str | None:
    return None if value is None else value.isoformat() if isinstance(value, datetime) else str(value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(row, min_size=1, max_size=3), st.sampled_from(["csv", "parquet", "ndjson", "typed"]), st.integers(0, 2))
def test_whatever_the_rows_hold_each_is_accepted_quarantined_or_repeated(rows: list[dict[str, Any]], kind: str, copies: int) -> None:
    # more good rows than wild ones, so that a wild one is a bad row and not a column of another type
    rows = [*rows, *({**r, "decided_at": r["decided_at"].replace(tzinfo=None)} for r in good(6).to_dicts()), *rows[:copies]]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "logs").mkdir()
        if kind == "typed":
            typed = {
                name: (datetime if name == "decided_at" else float if column.dtype.is_float() else str)
                for name, column in zip(good().columns, good(), strict=True)
            }
            values = {name: [r[name] if isinstance(r[name], is_a) else None for r in rows] for name, is_a in typed.items()}
            pl.DataFrame(values, schema_overrides={"decided_at": pl.Datetime("us")}).write_parquet(root / "logs/decisions.parquet")
        elif kind == "ndjson":
            lines = [
                json.dumps({k: as_text(v) if isinstance(v, datetime) or (isinstance(v, float) and not math.isfinite(v)) else v for k, v in r.items()})
                for r in rows
            ]
            (root / "logs/decisions.ndjson").write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            frame = pl.DataFrame([{k: as_text(v) for k, v in r.items()} for r in rows], schema=dict.fromkeys(rows[0], pl.String))
            (frame.write_csv if kind == "csv" else frame.write_parquet)(root / f"logs/decisions.{kind}")
        records = read_records(bare(root))
        counts = records.counts["decisions"]
        blank = sum(all(as_text(v) in (None, "") for v in r.values()) for r in rows) if kind == "csv" else 0
        assert len(rows) - blank <= counts.accepted + counts.quarantined + counts.repeated <= len(rows)
        assert counts.accepted == records.decisions.height
        assert counts.quarantined == records.quarantine.height
        assert records.quarantine["reason"].str.len_chars().min() != 0
        assert records.quarantine["reason"].null_count() == 0
        assert records.decisions.select("decision_id", "player_id", "decided_at", "policy", "goal", "gift").null_count().sum_horizontal().item() == 0
        assert records.decisions["goal"].is_between(1, 15).all()
        assert records.decisions["decision_id"].is_unique().all()
        assert all(json.loads(content) for content in records.quarantine["content"])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["csv", "parquet", "ndjson"]))
def test_any_bytes_end_in_a_sentence(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "logs").mkdir()
        (root / f"logs/decisions.{suffix}").write_bytes(content)
        with pytest.raises(LogsError, match=f"decisions.{suffix}"):
            read_records(bare(root))


def test_numbers_come_out_of_json_to_the_last_digit():
    numbers = np.random.default_rng(0).normal(size=2_000).tolist()
    frame = pl.DataFrame({"body": [json.dumps({"a": n}) for n in numbers] + ["{}", '{"a": null}', '{"a": 3}']})
    assert frame.select(json_fields("body", {"a": pl.Float64()}))["a"].to_list() == [*numbers, None, None, 3.0]
