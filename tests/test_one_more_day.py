"""What is kept from turn to turn changes nothing: after every kind of new day the features are those that everything read anew would give, bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from fastq import features, forgetting, load_platform, records, windows
from fastq.environment import prepare
from fastq.platform import Platform
from fastq.windows import Windows
from fastq.workspace import Workspace
from feature_repo import store
from pipelines import materialize
from serving.decision_log import Decision, now_us, open_log

DAY, START, PLAYERS = timedelta(days=1), datetime(2026, 1, 1, tzinfo=UTC), 12
TREE: dict[str, Any] = {
    "platform": "shop",
    "logs": {"decisions": "decisions/*.parquet", "activity": "activity/*.parquet", "players": "players.parquet"},
    "state": {"period": "1d", "window": 4, "measures": {"rounds": {}}, "attributes": {"channel": {"kind": "categorical"}}},
    "policies": ["careful", "bold"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 10}}},
    "objectives": {"joy": {"known_after": "1d"}},
}


def write_day(root: Path, day: int, name: str | None = None, *, seed: int = 0, players: range = range(PLAYERS), ids: str = "") -> None:
    """A file of each log for some players and a day; `ids` stands before those of the decisions."""
    draw = np.random.default_rng([100 + day, seed])
    who = [p for p in players if draw.random() < 0.6] or [players[0]]
    n, name = len(who), name or f"{day:02d}"
    at = [START + day * DAY + timedelta(hours=6 + 12 * hour) for hour in draw.random(n)]
    decisions = {
        "decision_id": [f"{ids}{day:02d}-{p:02d}" for p in who], "player_id": [f"p{p:02d}" for p in who], "decided_at": at,
        "policy": ["bold" if p % 2 else "careful" for p in who], "goal": draw.uniform(0, 10, n), "joy": draw.normal(size=n),
    }  # fmt: skip
    for table in ("decisions", "activity"):
        (root / table).mkdir(exist_ok=True)
    pl.DataFrame(decisions).write_parquet(root / "decisions" / f"{name}.parquet")
    events = {"player_id": decisions["player_id"], "occurred_at": [a - timedelta(hours=2) for a in at], "rounds": draw.gamma(2, 1, n)}
    pl.DataFrame(events).write_parquet(root / "activity" / f"{name}.parquet")


def configure(root: Path, tree: dict[str, Any]) -> None:
    players = {"player_id": [f"p{p:02d}" for p in range(PLAYERS + 2)], "channel": ["ads", None] * (PLAYERS // 2 + 1)}
    pl.DataFrame(players).write_parquet(root / "players.parquet")
    (root / "fastq.yaml").write_text(yaml.safe_dump(tree))


@dataclasses.dataclass
class Turns:
    """A workspace, and what the feature store was asked for and wrote in its last turn."""

    root: Path
    number: int = 0
    asked: int = 0
    written: int = 0

    def turn(self) -> Windows:
        self.number += 1
        platform, turn = load_platform(self.root), f"turn {self.number}"
        records.write_tables(records.read_records(platform), Workspace(self.root))
        materialize.build_features.fn(str(self.root), turn)
        return materialize.windows_of(str(self.root), turn)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Turns:
    prepare()
    turns = Turns(tmp_path / "shop")
    turns.root.mkdir()
    configure(turns.root, TREE)
    for day in range(5):
        write_day(turns.root, day)
    pointers, same = store.historical_pointers, store._standing

    def asked(platform: Platform, decisions: pl.DataFrame) -> pl.DataFrame:
        turns.asked = len(decisions)
        return pointers(platform, decisions)

    def written(*arguments: Any) -> pl.Series:
        stands = same(*arguments)
        turns.written = int((~stands).sum())
        return stands

    monkeypatch.setattr(store, "historical_pointers", asked)
    monkeypatch.setattr(store, "_standing", written)
    return turns


def content(data: Windows) -> dict[str, bytes | list[str] | Any]:
    """All of the transitions but their settings; NaN equals itself."""
    said: dict[str, Any] = {}
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        said[field.name] = value.tobytes() if isinstance(value, np.ndarray) else value.to_dicts() if isinstance(value, pl.DataFrame) else value
    return {name: value for name, value in said.items() if name not in ("platform", "catalogue")}


def assert_as_if_new(shop: Turns, data: Windows, elsewhere: Path) -> None:
    """Transitions and states are those of the same logs in a workspace that has never seen any, laid without the feature store's help."""
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(shop.root, elsewhere, ignore=shutil.ignore_patterns(".fastq"))
    if (gone := shop.root / ".fastq" / forgetting.FILE).exists():
        (elsewhere / ".fastq").mkdir()
        shutil.copy(gone, elsewhere / ".fastq")
    fresh = load_platform(elsewhere)
    read = records.read_records(fresh)
    whole = windows.build(fresh, read, features.build_rows(fresh, read))
    for (name, mine), theirs in zip(content(data).items(), content(whole).values(), strict=True):
        assert mine == theirs, name
    platform = load_platform(shop.root)
    packing, wanted = features.packing(platform), features.online_states(platform, features.online_frame(fresh, read, datetime.now(UTC)))
    opened = store.open_store(platform)
    try:
        held = features.pack_online(packing, store.read_states(opened, wanted.player_ids, data.matrix.shape[1]))
    finally:
        opened.close()
    for player, mine, theirs in zip(wanted.player_ids, held, features.pack_online(packing, wanted), strict=True):
        assert features.same_state(packing, mine, theirs), player


def test_whatever_a_new_day_brings_the_features_are_those_of_everything_read_anew(shop: Turns, tmp_path: Path) -> None:
    new = tmp_path / "new"
    first = shop.turn()
    assert (shop.asked, shop.written) == (len(first), PLAYERS + 2)
    assert_as_if_new(shop, first, new)

    again = shop.turn()
    assert (shop.asked, content(again)) == (0, content(first)), "nothing is new"
    assert shop.written <= 2, "those of whom only attributes are known may have come into another day"

    write_day(shop.root, 5)
    assert_as_if_new(shop, data := shop.turn(), new)
    assert 0 < shop.asked == len(data) - len(first)
    assert 0 < shop.written < PLAYERS, "only whoever was there on the new day"

    write_day(shop.root, 6, players=range(6))
    for day in (2, -3):  # late: of days that were read already, and of one before anybody's first, which moves where their rows begin
        write_day(shop.root, day, f"late {day}", seed=1, players=range(5, PLAYERS), ids="late ")
    assert_as_if_new(shop, data := shop.turn(), new)
    assert shop.asked < len(data), "of players whose rows begin where they did only what is new is asked"

    corrected = pl.read_parquet(shop.root / "decisions" / "03.parquet")  # others, on another day, with other outcomes, under the ids that were there
    other = corrected["player_id"].reverse(), corrected["decided_at"] - DAY, corrected["joy"] + 1
    corrected.with_columns(other).write_parquet(shop.root / "decisions" / "03.parquet")
    assert_as_if_new(shop, shop.turn(), new)

    shutil.copy(shop.root / "decisions" / "05.parquet", shop.root / "decisions" / "07 and 05.parquet")  # delivered again
    pl.read_parquet(shop.root / "decisions" / "04.parquet").with_columns(goal=pl.col("goal") / 2).write_parquet(shop.root / "decisions" / "07 and 04.parquet")
    before = data = shop.turn()
    assert_as_if_new(shop, data, new)
    assert shop.asked == 0, "what was there stays, whatever else is said under its id"

    (shop.root / "decisions" / "01.parquet").unlink()
    assert_as_if_new(shop, data := shop.turn(), new)
    assert len(data) < len(before)

    forgetting.remember(Workspace(shop.root), "p05")
    assert_as_if_new(shop, data := shop.turn(), new)
    assert "p05" not in data.player_ids

    configure(shop.root, TREE | {"state": TREE["state"] | {"period": "12h", "churn": 20}})
    assert_as_if_new(shop, data := shop.turn(), new)
    assert shop.asked == len(data), "what a row means has changed"
    assert shop.written >= PLAYERS


def test_what_is_kept_may_be_damaged_or_old(shop: Turns, tmp_path: Path) -> None:
    pointers = Workspace(shop.root).features / materialize.POINTERS_FILE
    data = shop.turn()
    pointers.write_bytes(pointers.read_bytes()[:-40])
    assert content(shop.turn()) == content(data)
    assert shop.asked == len(data)
    pl.read_parquet(pointers).write_parquet(pointers, metadata={"meaning": "another definition, or another version"})
    assert content(shop.turn()) == content(data)
    assert shop.asked == len(data)
    pl.read_parquet(pointers).select("decision_id", "row").write_parquet(pointers)  # an earlier version's
    assert content(shop.turn()) == content(data)
    assert shop.asked == len(data)
    state = Workspace(shop.root).features / "player_state.parquet"
    state.write_bytes(b"no Parquet")
    assert_as_if_new(shop, shop.turn(), tmp_path / "new")
    assert pl.read_parquet(state)["event_timestamp"].null_count() == 0


def test_a_state_that_somebody_changed_meanwhile_is_written_again(shop: Turns, tmp_path: Path) -> None:
    shop.turn()
    platform = load_platform(shop.root)
    opened = store.open_store(platform)
    frame = store.read_online(opened, ["p01", "p02"])
    event = pl.DataFrame({"player_id": ["p01"], "occurred_at": [frame["seen_at"][0]], "rounds": [7.0]})
    store.push(opened, features.with_events(platform, frame, event).filter(pl.col("player_id") == "p01"))
    store.remove(opened, "p02")
    opened.close()
    assert_as_if_new(shop, shop.turn(), tmp_path / "new")
    assert 2 <= shop.written <= 4


def test_a_state_over_which_a_decision_may_be_laid_says_when_it_was_read(shop: Turns) -> None:
    """What the gate refuses is in no state; nor is it to be laid over one for being newer than that."""
    shop.turn()
    platform = load_platform(shop.root)

    def read_at(*players: str) -> list[int]:
        opened = store.open_store(platform)
        found: list[int] = store.read_states(opened, players, 3).read_at.tolist()
        opened.close()
        return found

    before, log = read_at("p01", "p02", "p03"), open_log(platform)
    log.append([Decision("refused", "p01", now_us(), "fastq", 0.5, "1", {"goal": 99.0}, {})]).result()
    log.close()
    batch = pl.DataFrame({"decision_id": ["b"], "player_id": ["p02"], "decided_at": [datetime.now(UTC)], "policy": ["fastq"], "goal": [99.0]})
    batch.write_parquet(Workspace(shop.root).served / "batch.parquet")
    shop.turn()
    after = read_at("p01", "p02", "p03")
    assert [now > then for now, then in zip(after, before, strict=True)] == [True, True, False]


def test_states_that_say_the_same_are_told_from_others(shop: Turns) -> None:
    shop.turn()
    platform = load_platform(shop.root)
    packing, opened = features.packing(platform), store.open_store(platform)
    states = store.read_states(opened, ["p01"], 3)
    opened.close()

    def packed(**changed: Any) -> bytes:
        return features.pack_online(packing, dataclasses.replace(states, **changed))[0]

    later = packed(read_at=states.read_at + 1, heard=[{"0000.db": 5}])
    assert later != packed()
    assert features.same_state(packing, packed(), later)
    others = [
        {"window": states.window + 1}, {"counts": states.counts + 1}, {"decided": states.decided + 1}, {"period": states.period + 1},
        {"policies": [None]}, {"seen_at": states.seen_at + 1}, {"attributes": {"channel": ["web"]}},
    ]  # fmt: skip
    for changed in others:
        assert not features.same_state(packing, packed(), packed(**changed)), changed
    wider = np.concatenate([states.window, states.window], 2)
    assert not features.same_state(packing, packed(), packed(window=wider))
