"""Feast with its real stores: point in time offline, bit for bit online, the same configuration in code and in YAML."""

from __future__ import annotations

import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastq import features
from fastq.environment import prepare
from fastq.errors import ConfigurationError, LogsError, WorkspaceError
from fastq.platform import Platform, platform_from_tree
from feature_repo import store as feature_store
from feature_repo.definitions import attribute_fields, definitions

DAY = timedelta(days=1)
START = datetime(2026, 1, 1, tzinfo=UTC)
TREE = {
    "platform": "arena.eu",
    "logs": {"decisions": "d.parquet", "activity": "a.parquet", "players": "p.parquet"},
    "state": {
        "period": "1d", "window": 3, "measures": {"games": {}, "win_rate": {"aggregate": "mean"}},
        "attributes": {"tenure.days": {"kind": "numeric"}, "region": {"kind": "categorical"}},
    },
    "policies": ["stretch", "retain"],
    "action": {"kind": "continuous", "dimensions": {"target": {"low": 1, "high": 20}}},
    "objectives": {"returns": {}},
}  # fmt: skip
WIDTH = 3 * (2 + 1 + 1)


@pytest.fixture(autouse=True)
def _utc() -> None:
    prepare()


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    return platform_from_tree(dict(TREE), tmp_path, "fastq.yaml")


def rows_frame(entries: list[tuple[str, int, int, datetime | None]]) -> pl.DataFrame:
    """player_id, day (the period), row, when it became known (None: at its end)."""
    ends = [START + (day + 1) * DAY for _, day, _, _ in entries]
    return pl.DataFrame(
        {
            "player_id": [e[0] for e in entries],
            "period": [e[1] for e in entries],
            "row": [e[2] for e in entries],
            "event_timestamp": pl.Series(ends, dtype=pl.Datetime("us", "UTC")),
            "created_timestamp": pl.Series([e[3] or end for e, end in zip(entries, ends, strict=True)], dtype=pl.Datetime("us", "UTC")),
            "policy": pl.Series(["retain"] * len(entries)),
            "tenure.days": pl.Series([None] * len(entries), dtype=pl.Float64),
            "region": pl.Series(["in"] * len(entries)),
        }
    )


def decisions(entries: list[tuple[str, str, datetime]]) -> pl.DataFrame:
    return pl.DataFrame(entries, schema={"decision_id": pl.String, "player_id": pl.String, "decided_at": pl.Datetime("us", "UTC")}, orient="row")


def states(platform: Platform, n: int, at: datetime, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    window = rng.normal(size=(n, WIDTH)).astype(np.float32)
    window[rng.random((n, WIDTH)) < 0.3] = np.nan
    frame = pl.DataFrame(
        {
            "player_id": [f"p{i}" for i in range(n)],
            "event_timestamp": pl.Series([at] * n, dtype=pl.Datetime("us", "UTC")),
            "window": pl.Series(window),
            "counts": pl.Series(rng.integers(0, 9, (n, 6)).astype(np.float32)),
            "decided": pl.Series(np.where(rng.random((n, 3)) < 0.5, 0.0, 1.7672256e15 + rng.integers(0, 10**9, (n, 3)))),
            "period": pl.Series(rng.integers(20_000, 20_500, n)),
            "policy": [None if i % 3 == 0 else "retain" for i in range(n)],
            "seen_at": [None if i % 4 == 0 else at - timedelta(microseconds=int(ago)) for i, ago in enumerate(rng.integers(1, 10**12, n))],
            "heard": [None if i % 7 == 0 else f'{{"0000.db": {i}}}' for i in range(n)],
            "tenure.days": [None if i % 5 == 0 else float(i) / 3 for i in range(n)],
            "region": [None if i % 2 else "in" for i in range(n)],
        }
    )
    return frame.cast(dict(features.online_schema(platform)))


def bits(frame: pl.DataFrame) -> dict[str, object]:
    """Content in which NaN equals NaN."""
    arrays = {name: np.array(frame[name].to_list(), np.float64).tobytes() for name in ("window", "counts", "decided")}
    return arrays | frame.drop(*arrays).to_dict(as_series=False)


def test_pointers_are_point_in_time(platform: Platform) -> None:
    late = START + 2.5 * DAY
    feature_store.publish_rows(platform, rows_frame([("a", 0, 1, None), ("a", 1, 2, late), ("a", 2, 3, None), ("b", 0, 4, None)]))
    asked = decisions(
        [
            ("during the first period", "a", START + 0.5 * DAY),  # nothing is complete yet
            ("at the end of period 0", "a", START + DAY),  # row 1 ended exactly then
            ("a microsecond earlier", "a", START + DAY - timedelta(microseconds=1)),
            ("before row 2 was known", "a", START + 2 * DAY + timedelta(hours=1)),  # it ended, but arrived at 2.5
            ("after row 2 was known", "a", START + 2.6 * DAY),
            ("twice the same moment", "a", START + 2.6 * DAY),
            ("newest", "a", START + 3.9 * DAY),
            ("other player", "b", START + 1.5 * DAY),
            ("too long ago", "b", START + 9 * DAY),
            ("unknown player", "z", START + 2 * DAY),
        ]
    )
    found = feature_store.historical_pointers(platform, asked)
    assert found["decision_id"].to_list() == asked["decision_id"].to_list()
    assert found["row"].to_list() == [None, 1, None, 1, 2, 2, 3, 4, None, None]


def test_definitions_that_stand_are_not_applied_for_every_reading_and_changed_ones_are(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast import FeatureStore

    applied, whole = [], FeatureStore.apply
    monkeypatch.setattr(FeatureStore, "apply", lambda self, objects, **k: applied.append(objects) or whole(self, objects, **k))
    feature_store.publish_rows(platform, rows_frame([("a", 0, 1, None)]))
    asked = decisions([("x", "a", START + 1.5 * DAY)])
    assert [feature_store.historical_pointers(platform, asked)["row"].item() for _ in range(3)] == [1, 1, 1]
    assert len(applied) == 1
    longer = platform.model_copy(update={"state": platform.state.model_copy(update={"period": 2 * DAY})})
    assert feature_store.historical_pointers(longer, decisions([("x", "a", START + 4.5 * DAY)]))["row"].item() == 1  # features are kept for two periods
    assert len(applied) == 2
    (platform.root / ".fastq" / "feast" / "registry.db").unlink()
    assert feature_store.historical_pointers(longer, asked)["row"].item() == 1
    assert len(applied) == 3


def test_pointers_refuse_ids_that_are_there_twice(platform: Platform) -> None:
    feature_store.publish_rows(platform, rows_frame([("a", 0, 1, None)]))
    with pytest.raises(LogsError, match="each decision_id once"):
        feature_store.historical_pointers(platform, decisions([("x", "a", START + DAY), ("x", "a", START + 1.5 * DAY)]))


def test_no_decisions_no_pointers(platform: Platform) -> None:
    feature_store.publish_rows(platform, rows_frame([("a", 0, 1, None)]))
    assert feature_store.historical_pointers(platform, decisions([])).schema == {"decision_id": pl.String, "row": pl.Int64}


def test_online_round_trip_is_bit_for_bit(platform: Platform, capsys: pytest.CaptureFixture[str]) -> None:
    frame = states(platform, 57, START)
    assert feature_store.materialize(platform, frame) == 57
    assert capsys.readouterr().out == ""
    assert bits(feature_store.materialized(platform)) == bits(frame)
    opened = feature_store.open_store(platform)
    wanted = ["p3", "nobody", "p0", "p56"]
    read = feature_store.read_online(opened, wanted)
    assert read.schema == features.online_schema(platform)
    assert read["player_id"].to_list() == ["p3", "p0", "p56"]
    assert bits(read) == bits(frame[[3, 0, 56]])
    assert read["event_timestamp"].to_list() == [START] * 3
    arrays = feature_store.read_states(opened, wanted, 4)
    assert (arrays.player_ids, arrays.stored.tolist()) == (wanted, [True, False, True, True])
    assert bits(features.online_table(platform, arrays).filter(pl.Series(arrays.stored))) == bits(read)
    assert feature_store.read_online(opened, ["nobody"]).is_empty()
    assert feature_store.read_online(opened, []).schema == features.online_schema(platform)


def test_what_is_pushed_is_read_next(platform: Platform) -> None:
    frame = states(platform, 12, START)
    feature_store.materialize(platform, frame)
    opened, reader = feature_store.open_store(platform), feature_store.open_store(platform)
    feature_store.read_online(reader, ["p1"])
    newer = states(platform, 12, START + DAY, seed=1)[:5]
    feature_store.push(opened, newer)
    assert bits(feature_store.read_online(reader, [f"p{i}" for i in range(12)])) == bits(pl.concat([newer, frame[5:]]))


def test_materialising_again_replaces(platform: Platform) -> None:
    feature_store.materialize(platform, states(platform, 9, START))
    corrected = states(platform, 9, START, seed=2)  # the same event time: corrected values of the same day
    feature_store.materialize(platform, corrected)
    assert bits(feature_store.read_online(feature_store.open_store(platform), [f"p{i}" for i in range(9)])) == bits(corrected)


def test_more_players_than_one_query(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = states(platform, 25, START)
    feature_store.materialize(platform, frame)
    monkeypatch.setattr(feature_store, "CHUNK", 10)
    seen: list[int] = []
    assert bits(feature_store.read_online(feature_store.open_store(platform), frame["player_id"].to_list(), seen.append)) == bits(frame)
    assert seen == [10, 20, 25]


def test_a_store_that_was_moved_away_is_said(platform: Platform) -> None:
    with pytest.raises(WorkspaceError, match="fastq retrain"):
        feature_store.open_store(platform)
    with pytest.raises(WorkspaceError, match="fastq retrain"):
        feature_store.historical_pointers(platform, decisions([]))
    feature_store.materialize(platform, states(platform, 3, START))
    opened = feature_store.open_store(platform)
    assert len(feature_store.read_online(opened, ["p1"])) == 1
    online = platform.root / ".fastq" / "feast" / "online.db"
    online.rename(online.with_name("away.db"))
    with pytest.raises(WorkspaceError, match="not there"):
        feature_store.read_online(opened, ["p1"])
    with pytest.raises(WorkspaceError, match="not there"):
        feature_store.open_store(platform)
    feature_store.materialize(platform, states(platform, 3, START))
    with pytest.raises(WorkspaceError, match="open it again"):
        feature_store.read_online(opened, ["p1"])
    assert len(feature_store.read_online(feature_store.open_store(platform), ["p1"])) == 1


def test_the_embedded_store_lets_readers_go_on(platform: Platform) -> None:
    feature_store.apply(platform)
    with sqlite3.connect(platform.root / ".fastq" / "feast" / "online.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_definitions_follow_the_platform(platform: Platform) -> None:
    found = definitions(platform)
    fields = attribute_fields(platform)
    assert list(fields.values()) == ["attribute_0_tenure_days", "attribute_1_region"]
    assert [f.name for f in found.player_state.features] == ["state"]
    assert found.player_rows.ttl == 2 * DAY
    assert found.player_rows.batch_source.created_timestamp_column == "created_timestamp"


def test_the_yaml_says_what_the_code_does(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast.repo_config import load_repo_config

    monkeypatch.setenv("FASTQ_PLATFORM", "arena_eu")
    monkeypatch.setenv("FASTQ_WORKSPACE", str(platform.root))
    path = Path(feature_store.__file__).parent / "feature_store.yaml"
    written, built = load_repo_config(path.parent, path), feature_store._repo_config(platform)
    written.repo_path = built.repo_path
    assert written.model_dump() == built.model_dump()
    assert (written.registry.path, written.online_store.path) == (built.registry.path, built.online_store.path)


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ("redis://:s%40crt@cache:6380/2", {"type": "redis", "connection_string": "cache:6380,db=2,password=s@crt", "skip_dedup": True}),
        ("redis://cache", {"type": "redis", "connection_string": "cache:6379,db=0", "skip_dedup": True}),
        (
            "postgresql://u:p@db/feast?sslmode=disable",
            {"type": "postgres", "host": "db", "port": 5432, "database": "feast", "db_schema": "public", "user": "u", "password": "p", "sslmode": "disable"},
        ),
    ],
)
def test_services_by_url(platform: Platform, service: str, expected: dict[str, object]) -> None:
    tree = TREE | {"services": {"online_store": service}}
    assert feature_store.online_store_config(platform_from_tree(tree, platform.root, "fastq.yaml")) == expected


@pytest.mark.parametrize("service", ["sqlight", "mysql://db/x", "redis://", "postgresql://db", "redis://cache:port/0"])
def test_an_unknown_service_is_one_sentence(platform: Platform, service: str) -> None:
    wrong = platform_from_tree(TREE | {"services": {"online_store": service}}, platform.root, "fastq.yaml")
    with pytest.raises(ConfigurationError, match=r"services\.online_store"):
        feature_store.online_store_config(wrong)


@pytest.mark.parametrize("address", ["redis://:secret@127.0.0.1:1/0", "postgresql://shop:secret@127.0.0.1:1/shop"])
def test_a_server_that_is_not_there_is_one_sentence_without_its_password(platform: Platform, address: str) -> None:
    away = platform.model_copy(update={"services": platform.services.model_copy(update={"online_store": address})})
    with pytest.raises(WorkspaceError, match="the online store does not answer") as refused:
        feature_store.materialize(away, states(away, 2, START))
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_importing_loads_no_feast() -> None:
    import subprocess
    import sys

    code = "import feature_repo.store, feature_repo.definitions, sys; sys.exit('feast' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1], env=os.environ).returncode == 0


def test_a_platform_whose_name_has_a_hyphen_gets_a_project_that_sqlite_takes():
    from types import SimpleNamespace

    from feature_repo.definitions import project_name

    assert project_name(SimpleNamespace(platform="open-bandit.v1")) == "open_bandit_v1"


def test_feasts_types_are_not_checked_at_each_call_and_others_are():
    import feast
    import typeguard

    assert not {"check_argument_types", "TypeCheckMemo"} & set(feast.Entity.__init__.__code__.co_names + feast.FeatureView.__init__.__code__.co_names)

    @typeguard.typechecked
    def half(x: int) -> float:
        return x / 2

    with pytest.raises(typeguard.TypeCheckError):
        half("two")
