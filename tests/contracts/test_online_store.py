"""What every online store promises, run on the embedded SQLite, a real Redis and a real PostgreSQL: the same tests, none skipped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastq import features
from fastq.environment import prepare
from fastq.errors import WorkspaceError
from fastq.platform import Platform, platform_from_tree
from fastq.workspace import Workspace
from feature_repo import online, store
from feature_repo.definitions import STATE_FIELD, STATE_VIEW

DAY, AT = timedelta(days=1), datetime(2026, 1, 20, 12, tzinfo=UTC)
TREE = {
    "logs": {"decisions": "d.parquet", "activity": "a.parquet", "players": "p.parquet"},
    "state": {
        "period": "1d", "window": 3, "measures": {"games": {}, "win_rate": {"aggregate": "mean"}},
        "attributes": {"tenure": {"kind": "numeric"}, "region": {"kind": "categorical"}},
    },
    "policies": ["stretch", "retain"],
    "action": {"kind": "continuous", "dimensions": {"target": {"low": 1, "high": 20}}},
    "objectives": {"returns": {}},
}  # fmt: skip
WIDTH = 4
UNUSUAL = [
    "",
    " ",
    "a b",
    "a/b",
    "Ünï",
    "プレイヤー",
    "x'); DROP TABLE player_state; --",
    "*",
    "p1\n",
    '{"id": 1}',
    "-1",
    "1e9",
    "p" * 300,
    "P1",
    "\u200b",
    "%s",
    ":name",
]


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def server(request: pytest.FixtureRequest) -> object:
    return None if request.param == "sqlite" else request.getfixturevalue(f"{request.param}_server")


@pytest.fixture
def platform(server: object, tmp_path: Path, request: pytest.FixtureRequest) -> Platform:
    prepare()
    name = "c" + "".join(c for c in request.node.name if c.isalnum())[:40]  # a project of its own in the shared server
    return platform_from_tree({**TREE, "platform": name, "services": {"online_store": server.url if server else "sqlite"}}, tmp_path, "fastq.yaml")


def states(platform: Platform, ids: list[str], seed: int = 0, at: datetime = AT) -> pl.DataFrame:
    rng, n = np.random.default_rng(seed), len(ids)
    window = rng.normal(size=(n, 3, WIDTH)).astype(np.float32)
    window[rng.random((n, 3, WIDTH)) < 0.3] = np.nan
    said = features.epoch_microseconds(at)
    kept = features.OnlineStates(
        ids, window, rng.integers(0, 9, (n, 3, 2)).astype(np.float32), np.where(rng.random((n, 3)) < 0.5, 0, said - rng.integers(1, 10**11, (n, 3))),
        np.full(n, said // features.microseconds(platform) - 1), [None if i % 3 == 0 else "retain" for i in range(n)],
        np.array([features.NEVER if i % 4 == 0 else said - 1 - i for i in range(n)]), np.full(n, said), [{} if i % 2 else {"0000.db": i} for i in range(n)],
        {"tenure": np.where(rng.random(n) < 0.2, np.nan, rng.random(n)), "region": [None if i % 2 else f"région {i}" for i in range(n)]}, np.ones(n, bool),
    )  # fmt: skip
    return features.online_table(platform, kept)


def same(found: pl.DataFrame, wanted: pl.DataFrame) -> None:
    """Equal to the last bit, NaN equal to NaN."""
    assert found["player_id"].to_list() == wanted["player_id"].to_list()
    assert found.schema == wanted.schema
    for name in found.columns:
        mine, theirs = found[name].to_list(), wanted[name].to_list()
        if found.schema[name] == pl.List:
            assert np.array(mine).tobytes() == np.array(theirs).tobytes(), name
        else:
            assert mine == theirs, name


def event(player: str, games: float, at: datetime, *, log: str = "0000.db", recorded_at: int = 1) -> pl.DataFrame:
    frame = pl.DataFrame({"player_id": [player], "occurred_at": [at], "games": [games], "win_rate": [0.5], "log": [log], "recorded_at": [recorded_at]})
    return frame.with_columns(pl.col("occurred_at").cast(pl.Datetime("us", "UTC")))


def games_of(platform: Platform, opened: store.PlayerStore, player: str, at: datetime) -> float:
    """What the next decision sees of the period under way."""
    return float(features.states_at(platform, store.read_states(opened, [player], WIDTH), at).history[0, -1, 0])


# ---- writing and reading -----------------------------------------------------------------------------------------------------
def test_what_is_materialised_is_read_to_the_last_bit(platform: Platform) -> None:
    frame = states(platform, [f"p{i}" for i in range(57)])
    assert store.materialize(platform, frame) == 57
    same(store.materialized(platform), frame)
    same(store.read_online(store.open_store(platform), frame["player_id"].to_list()), frame)


def test_arrays_and_frames_say_the_same_and_unknown_players_have_an_empty_row(platform: Platform) -> None:
    frame = states(platform, [f"p{i}" for i in range(9)])
    store.materialize(platform, frame)
    opened, asked = store.open_store(platform), ["p3", "nobody", "p0", "p3"]
    found = store.read_states(opened, asked, WIDTH)
    assert (found.player_ids, found.stored.tolist(), found.known.tolist()) == (asked, [True, False, True, True], [True, False, True, True])
    same(features.online_table(platform, found).filter(pl.Series(found.stored)), frame[[3, 0, 3]])
    blank = features.states_at(platform, found, AT)
    assert np.isnan(blank.history[1]).all()
    assert (found.seen_at[1], found.read_at[1], found.policies[1], found.heard[1]) == (features.NEVER, features.NEVER, None, {})
    assert np.isnan(blank.attributes["tenure"][1])
    assert blank.attributes["region"][1] is None
    assert store.read_online(opened, ["nobody"]).schema == features.online_schema(platform)
    assert len(store.read_online(opened, [])) == len(store.read_states(opened, [], WIDTH)) == 0


def test_feast_reads_the_same_value_as_we_do(platform: Platform) -> None:
    """What is read past Feast is what Feast answers: should it lay out its tables or keys otherwise one day, this fails."""
    frame = states(platform, ["p0", "プレイヤー", "p2"])
    store.materialize(platform, frame)
    opened = store.open_store(platform)
    answer = opened.feast.get_online_features([f"{STATE_VIEW}:{STATE_FIELD}"], [{"player_id": p} for p in frame["player_id"]]).to_dict()
    assert answer[STATE_FIELD] == store._values(opened, frame["player_id"].to_list())
    assert all(answer[STATE_FIELD])


def test_unusual_ids_are_players_like_others(platform: Platform) -> None:
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    keys = [serialize_entity_key(EntityKey(join_keys=["player_id"], entity_values=[Value(string_val=p)]), 3) for p in UNUSUAL]
    assert online.entity_keys(online.entity_prefix(), UNUSUAL) == keys
    frame = states(platform, UNUSUAL)
    store.materialize(platform, frame[:5])
    opened = store.open_store(platform)
    store.push(opened, frame[5:])
    same(store.read_online(opened, UNUSUAL), frame)
    assert store.remove(opened, "*") > 0
    assert store.read_states(opened, UNUSUAL, WIDTH).stored.tolist() == [p != "*" for p in UNUSUAL]


def test_many_players_in_one_call(platform: Platform) -> None:
    frame = states(platform, [f"p{i}" for i in range(2_503)])  # more than one transaction, and more than one statement
    store.materialize(platform, frame)
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    told: list[int] = []
    same(store.read_online(store.open_store(platform), shuffled["player_id"].to_list(), told.append), shuffled)
    assert told == [1000, 2000, 2503]


# ---- writing again -------------------------------------------------------------------------------------------------------------
def test_the_last_to_write_stands_whatever_the_clocks_say(platform: Platform) -> None:
    ids = ["p0", "p1"]
    first, older, same_time = states(platform, ids, 1), states(platform, ids, 2, AT - 9 * DAY), states(platform, ids, 3)
    store.materialize(platform, first)
    opened, reader = store.open_store(platform), store.open_store(platform)
    for frame in (older, same_time, first):
        store.push(opened, frame)
        same(store.read_online(reader, ids), frame)
    store.materialize(platform, older)  # corrected values with unchanged dates
    same(store.read_online(reader, ids), older)


def test_a_new_event_is_in_the_next_read_within_a_second(platform: Platform) -> None:
    store.materialize(platform, states(platform, ["p0", "p1"]))
    opened, reader = store.open_store(platform), store.open_store(platform)
    before = games_of(platform, reader, "p1", AT + timedelta(minutes=1))
    started = time.monotonic()
    with store.exclusive(platform):
        store.push(opened, features.with_events(platform, store.read_online(opened, ["p1"]), event("p1", 7.0, AT)))
    now = games_of(platform, reader, "p1", AT + timedelta(minutes=1))
    took = time.monotonic() - started
    assert np.isnan(before) or before != now
    assert now == 7.0
    assert took < 1.0


def test_an_event_that_is_brought_twice_counts_once(platform: Platform) -> None:
    store.materialize(platform, states(platform, ["p1"]))
    opened = store.open_store(platform)
    for brought in (event("p1", 7.0, AT, recorded_at=5), event("p1", 7.0, AT, recorded_at=5), event("p1", 2.0, AT, recorded_at=4)):
        store.push(opened, features.with_events(platform, store.read_online(opened, ["p1"]), brought))
    assert games_of(platform, opened, "p1", AT + DAY / 24) == 7.0
    store.push(opened, features.with_events(platform, store.read_online(opened, ["p1"]), event("p1", 2.0, AT, log="0001.db", recorded_at=4)))
    assert games_of(platform, opened, "p1", AT + DAY / 24) == 9.0, "another server's log counts for itself"


def test_two_writers_of_one_player_lose_nothing(platform: Platform) -> None:
    store.materialize(platform, states(platform, ["p1"]))
    errors: list[BaseException] = []

    def write(log: str) -> None:
        try:
            opened = store.open_store(platform)
            for i in range(1, 11):
                with store.exclusive(platform):
                    store.push(opened, features.with_events(platform, store.read_online(opened, ["p1"]), event("p1", 1.0, AT, log=log, recorded_at=i)))
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    writers = [threading.Thread(target=write, args=(f"{i}.db",)) for i in range(3)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert not errors
    assert games_of(platform, store.open_store(platform), "p1", AT + DAY / 24) == 30.0


# ---- age ------------------------------------------------------------------------------------------------------------------------
def test_age_is_visible_and_nothing_expires(platform: Platform) -> None:
    long_ago = AT - 400 * DAY
    frame = states(platform, ["p0", "p1"], at=long_ago)
    store.materialize(platform, frame)
    found = store.read_states(store.open_store(platform), ["p1"], WIDTH)
    assert found.stored.tolist() == [True]
    assert found.seen_at.tolist() == [features.epoch_microseconds(long_ago) - 2]
    assert found.read_at.tolist() == [features.epoch_microseconds(long_ago)]
    assert found.period.tolist() == [features.epoch_microseconds(long_ago) // features.microseconds(platform) - 1]
    assert np.isnan(features.states_at(platform, found, AT).history).all(), "what lies before the window is no state"


def test_states_of_other_features_are_as_good_as_absent(platform: Platform) -> None:
    store.materialize(platform, states(platform, ["p0", "p1"]))
    tree = {**TREE, "platform": platform.platform, "services": {"online_store": platform.services.online_store}}
    tree["state"] = tree["state"] | {"measures": {"games": {"aggregate": "max"}, "win_rate": {"aggregate": "mean"}}}  # the same shape, another meaning
    other = platform_from_tree(tree, platform.root, "fastq.yaml")
    assert store.read_states(store.open_store(other), ["p0"], WIDTH).stored.tolist() == [False]
    assert store.read_online(store.open_store(other), ["p0"]).is_empty()
    store.push(store.open_store(other), states(other, ["p1"]))
    assert store.read_online(store.open_store(other), ["p0", "p1"])["player_id"].to_list() == ["p1"]
    assert store.read_states(store.open_store(platform), ["p0", "p1"], WIDTH + 1).stored.tolist() == [False, False], "nor of a catalogue of another width"


# ---- forgetting -----------------------------------------------------------------------------------------------------------------
def test_one_player_is_removed_and_no_other(platform: Platform) -> None:
    frame = states(platform, ["p1", "p10", "p100", "1"])
    store.materialize(platform, frame)
    opened, reader = store.open_store(platform), store.open_store(platform)
    assert len(store.read_online(reader, ["p1"])) == 1
    assert store.remove(opened, "p1") > 0
    assert store.read_online(reader, ["p1"]).is_empty()
    same(store.read_online(reader, ["p10", "p100", "1"]), frame[1:])
    assert store.remove(opened, "p1") == 0
    assert store.remove(opened, "never was") == 0


# ---- a store that goes away, and readers while states are written ------------------------------------------------------------------
def test_a_store_that_is_gone_says_so_and_comes_back(platform: Platform, server: object) -> None:
    frame = states(platform, ["p0"])
    store.materialize(platform, frame)
    opened = store.open_store(platform)
    file = Workspace(platform.root).feast / "online.db"
    stop, start = (lambda: file.rename(file.with_name("away")), lambda: file.with_name("away").rename(file))
    if server:
        stop, start = (lambda: server.stop(60), lambda: server.start().ready())
    stop()
    try:
        for attempt in (
            lambda: store.read_states(opened, ["p0"], WIDTH),
            lambda: store.read_online(opened, ["p0"]),
            lambda: store.push(opened, frame),
            lambda: store.remove(opened, "p0"),
            lambda: store.read_online(store.open_store(platform), ["p0"]),
        ):
            started = time.monotonic()
            with pytest.raises(WorkspaceError, match="online store") as said:
                attempt()
            assert "none@" not in str(said.value), "no password in a sentence"
            assert time.monotonic() - started < 5
    finally:
        start()
    same(store.read_online(store.open_store(platform), ["p0"]), frame)


@pytest.fixture
def reading(platform: Platform) -> Iterator[Callable[[store.PlayerStore, list[str]], tuple[list[BaseException], list[set[int]]]]]:
    """Readers in threads that note every error and every mixture of versions they see within one player."""
    stop, threads = threading.Event(), []

    def start(opened: store.PlayerStore, ids: list[str]) -> tuple[list[BaseException], list[set[int]]]:
        errors: list[BaseException] = []
        seen: list[set[int]] = []

        def read() -> None:
            while not stop.is_set():
                try:
                    found = store.read_states(opened, ids, WIDTH)
                    assert found.stored.all()
                    for row in range(len(ids)):
                        versions = set(np.unique(found.window[row]).tolist())
                        assert len(versions) == 1, "half a state"
                        seen.append(versions)
                except BaseException as error:  # noqa: BLE001 - told by the test
                    errors.append(error)

        threads.extend(threading.Thread(target=read) for _ in range(2))
        for thread in threads:
            thread.start()
        return errors, seen

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def test_reads_go_on_while_states_are_materialised(platform: Platform, reading: Callable[..., tuple[list[BaseException], list[set[int]]]]) -> None:
    ids = [f"p{i}" for i in range(3_000)]
    base = states(platform, ids)

    def version(number: int) -> pl.DataFrame:
        return base.with_columns(window=pl.Series(np.full((len(ids), 3 * WIDTH), number, np.float32)).cast(pl.List(pl.Float32)))

    store.materialize(platform, version(0))
    errors, seen = reading(store.open_store(platform), [ids[0], ids[1_500], ids[-1]])
    for number in (1, 2):
        store.materialize(platform, version(number))
    until = time.monotonic() + 5
    while {2.0} not in seen[-3:] and time.monotonic() < until:
        time.sleep(0.01)
    assert errors == []
    assert {v for versions in seen for v in versions} == {0.0, 1.0, 2.0}
