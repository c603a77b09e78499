"""One definition of every feature: against a slow plain reading of the contract, offline and online, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastq import features, windows
from fastq.errors import RequestError
from fastq.features import Encoding, PlayerStates
from fastq.platform import Platform, platform_from_tree
from fastq.records import Records

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
FIRST = (START - datetime(1970, 1, 1, tzinfo=UTC)) // DAY  # period index of the first day
TIME = pl.Datetime("us", "UTC")
NAN = math.nan
AGGREGATES = ("sum", "mean", "min", "max", "last", "count")
TREE: dict[str, Any] = {
    "platform": "arena",
    "logs": {"decisions": "d", "activity": "a", "players": "p"},
    "state": {
        "period": "1d", "window": 3, "churn": 2, "measures": {name: {"aggregate": name} for name in AGGREGATES},
        "attributes": {"tenure": {"kind": "numeric"}, "region": {"kind": "categorical"}},
    },
    "policies": ["stretch", "retain"],
    "action": {"kind": "continuous", "dimensions": {"target": {"low": 0, "high": 100}, "bonus": {"low": 0, "high": 100}}},
    "objectives": {"returns": {}, "ltv": {"known_after": "7d"}},
}  # fmt: skip


def platform_of(**state: Any) -> Platform:
    logs = {key: path for key, path in TREE["logs"].items() if key != "players" or state.get("attributes", True)}
    return platform_from_tree({**TREE, "logs": logs, "state": {**TREE["state"], **state}}, Path(), "fastq.yaml")


PLATFORM = platform_of(window=9)
NARROW = platform_of()


def decision(
    player: str, at: datetime, target: float = 1.0, policy: str = "retain", bonus: float = 0.0, returns: float | None = None, ltv: float | None = None
) -> dict[str, Any]:
    return {"player_id": player, "decided_at": at, "target": target, "policy": policy, "bonus": bonus, "returns": returns, "ltv": ltv}


def event(player: str, at: datetime, value: float | None, known_at: datetime | None = None) -> dict[str, Any]:
    return {"player_id": player, "occurred_at": at, "known_at": known_at or at, **dict.fromkeys(AGGREGATES, value)}


def records_of(
    platform: Platform, decisions: Sequence[dict[str, Any]], activity: Sequence[dict[str, Any]] | None = (), players: Sequence[dict[str, Any]] | None = None
) -> Records:
    numbered = [{"decision_id": f"d{i:03}", "propensity": 0.1, "assignment": None, "model_version": None, **d} for i, d in enumerate(decisions)]
    numbers = ["propensity", "assignment", *platform.dimension_names, *platform.objectives]
    schema: dict[str, Any] = {
        "decision_id": pl.String,
        "player_id": pl.String,
        "decided_at": TIME,
        "policy": pl.String,
        "model_version": pl.String,
        **dict.fromkeys(numbers, pl.Float64),
    }
    happened = {"player_id": pl.String, "occurred_at": TIME, "known_at": TIME, **dict.fromkeys(platform.state.measures, pl.Float64)}
    described = {
        "player_id": pl.String,
        "valid_from": TIME,
        **{name: pl.Float64 if a.kind == "numeric" else pl.String for name, a in platform.state.attributes.items()},
    }
    return Records(
        decisions=pl.DataFrame(numbered, schema=schema, orient="row").sort("player_id", "decided_at", "decision_id"),
        activity=None if activity is None else pl.DataFrame(activity, schema=happened).sort("player_id", "occurred_at", maintain_order=True),
        players=None if players is None else pl.DataFrame(players, schema=described),
        proposals=None,
        items=None,
        quarantine=pl.DataFrame(),
        counts={},
        metrics={},
        warnings=[],
    )


def same(found: Any, wanted: Any, what: str = "") -> None:
    """Bit for bit, with NaN in the same places."""
    np.testing.assert_array_equal(found, np.asarray(wanted, np.float32), err_msg=what)


def same_states(found: PlayerStates, wanted: PlayerStates, what: str = "") -> None:
    for part in ("history", "actions", "objectives"):
        assert getattr(found, part).dtype == getattr(wanted, part).dtype == np.float32
        same(getattr(found, part), getattr(wanted, part), f"{part} {what}")
    assert found.policies == wanted.policies, what
    assert found.attributes.equals(wanted.attributes) if wanted.attributes.width else not found.attributes.width, what


def online_states(platform: Platform, records: Records, player: str, at: datetime) -> PlayerStates:
    """As the endpoint would see the player; one of whom nothing is known gets an empty row."""
    width = features.row_width(platform, None)
    frame = features.online_frame(platform, records, at).filter(pl.col("player_id") == player)
    if frame.is_empty():
        frame = features.empty_frame(platform, pl.Series("player_id", [player]), width)
    return features.states_at(platform, frame, at)


def slow_state(platform: Platform, records: Records, player: str, at: datetime) -> PlayerStates:
    """The contract read aloud, one player, one moment; shares nothing with the code under test."""
    day = platform.state.period
    period = lambda moment: (moment - datetime(1970, 1, 1, tzinfo=UTC)) // day  # noqa: E731
    events = (
        [e for e in records.activity.iter_rows(named=True) if e["player_id"] == player and e["known_at"] < at]
        if records.activity is not None and platform.state.measures
        else []
    )
    decisions = [d for d in records.decisions.iter_rows(named=True) if d["player_id"] == player and d["decided_at"] < at]
    newest = (
        period(at) if any(period(t) == period(at) for t in [*(e["occurred_at"] for e in events), *(d["decided_at"] for d in decisions)]) else period(at) - 1
    )
    window, names, objectives = platform.state.window, list(platform.state.measures), list(platform.objectives)
    history, actions, outcomes = (np.full((1, window, n), np.nan) for n in (len(names), len(platform.dimension_names), len(objectives)))
    how = {"sum": sum, "mean": lambda v: sum(v) / len(v), "min": min, "max": max, "last": lambda v: v[-1], "count": len}
    for slot in range(window):
        here = newest - window + 1 + slot
        for j, name in enumerate(names):
            if values := [e[name] for e in events if period(e["occurred_at"]) == here and e[name] is not None]:
                history[0, slot, j] = how[platform.state.measures[name].aggregate](values)
        if acted := [d for d in decisions if period(d["decided_at"]) == here]:
            actions[0, slot] = [acted[-1][name] for name in platform.dimension_names]
            for m, name in enumerate(objectives):
                known_at = acted[-1]["decided_at"] + (platform.objectives[name].known_after or day)
                if known_at < at and acted[-1][name] is not None:
                    outcomes[0, slot, m] = acted[-1][name]
    versions = (
        []
        if records.players is None
        else [v for v in records.players.iter_rows(named=True) if v["player_id"] == player and (v["valid_from"] is None or v["valid_from"] < at)]
    )
    newest_version = max(versions, key=lambda v: v["valid_from"] or datetime(1, 1, 1, tzinfo=UTC), default={})
    types = {name: pl.Float64 if a.kind == "numeric" else pl.String for name, a in platform.state.attributes.items()}
    attributes = pl.DataFrame([{name: newest_version.get(name) for name in types}], schema=types) if types else pl.DataFrame(height=1)
    parts = [part.astype(np.float32) for part in (history, actions, outcomes)]
    return PlayerStates(parts[0], attributes, parts[1], parts[2], [decisions[-1]["policy"] if decisions else None])


def everywhere_the_same(platform: Platform, records: Records) -> None:
    """Every decision's state: as trained on, as served, as the contract says."""
    trained_on = windows.build(platform, records, features.build_rows(platform, records))
    ordered = records.decisions
    assert trained_on.decision_id == ordered["decision_id"].to_list()
    all_at_once = trained_on.states(np.arange(len(trained_on)))
    for i, (player, at) in enumerate(ordered.select("player_id", "decided_at").iter_rows()):
        what = f"of {player} at {at:%d %H:%M}"
        wanted = slow_state(platform, records, player, at)
        same_states(trained_on.states(np.array([i])), wanted, f"offline, {what}")
        same(all_at_once.history[i : i + 1], wanted.history, f"in a batch, {what}")
        same(all_at_once.objectives[i : i + 1], wanted.objectives, f"in a batch, {what}")
        same_states(online_states(platform, records, player, at), wanted, f"online, {what}")


# ---- the same state offline and online -------------------------------------------------------------------------------------
A_WEEK = records_of(
    PLATFORM,
    [
        decision("p1", START + 5 * HOUR, 1.0, "stretch", returns=0.5, ltv=10.0),
        decision("p1", START + 9.5 * HOUR, 2.0, "retain", bonus=3.0, returns=0.25),  # the same day: stands
        decision("p1", START + 2 * DAY, 3.0, "retain", returns=1.0, ltv=30.0),  # exactly on the boundary between two days
        decision("p1", START + 2 * DAY + 23 * HOUR, 4.0, "stretch", returns=-1.0, ltv=40.0),
        decision("p1", START + 7 * DAY + 5 * HOUR, 5.0, "retain", returns=0.0),  # exactly when the first ltv is known
        decision("p1", START + 9 * DAY + 23 * HOUR, 6.0, "retain"),  # exactly when the fourth is
        decision("p1", START + 10 * DAY + 5 * HOUR, 7.0, "retain"),
        decision("p2", START + 3 * DAY, 8.0, "stretch"),
    ],
    [
        event("p1", START + 1 * HOUR, 7.0),
        event("p1", START + 5 * HOUR, 100.0),  # exactly at the decision: not before it
        event("p1", START + 6 * HOUR, 0.5),
        event("p1", START + 6.5 * HOUR, None),
        event("p1", START + DAY, 3.0, known_at=START + 2 * DAY + HOUR),  # arrives after the third decision
        event("p1", START + DAY + 2 * HOUR, 4.0, known_at=START + 2 * DAY),  # known exactly at the third decision: not before it
        event("p1", START + 2 * DAY + 2 * HOUR, 11.0, known_at=START + 2 * DAY + 23.5 * HOUR),  # of the period under way, late
        event("p1", START + 2 * DAY + 3 * HOUR, 12.0),
        event("p1", START + 8 * DAY, 13.0, known_at=START + 30 * DAY),
        event("p2", START + 9 * DAY, 1e9),
    ],
    [
        {"player_id": "p1", "valid_from": None, "tenure": 1.0, "region": "in"},
        {"player_id": "p1", "valid_from": START + 2 * DAY, "tenure": 2.0, "region": None},  # exactly at the third decision: not before it
        {"player_id": "p1", "valid_from": START + 7 * DAY, "tenure": 3.0, "region": "br"},
        {"player_id": "p3", "valid_from": None, "tenure": 9.0, "region": "us"},
    ],
)


def test_one_player_through_both_paths():
    everywhere_the_same(PLATFORM, A_WEEK)


def test_the_state_in_numbers():
    # the second decision of the first day: events of 1:00, 5:00 and 6:00 are before it, a null says nothing
    found = online_states(PLATFORM, A_WEEK, "p1", START + 9.5 * HOUR)
    same(found.history[0, -1], [107.5, 107.5 / 3, 0.5, 100.0, 0.5, 3.0])
    same(found.history[0, :-1], np.full((8, 6), NAN))
    same(found.actions[0, -1], [1.0, 0.0])
    same(found.objectives[0, -1], [NAN, NAN])
    assert found.policies == ["stretch"]
    # the seventh: day 0 holds its second decision, day 2 its second too; returns known after a day, ltv after seven
    found = online_states(PLATFORM, A_WEEK, "p1", START + 10 * DAY + 5 * HOUR)
    same(found.actions[0, :, 0], [NAN, 4.0, NAN, NAN, NAN, NAN, 5.0, NAN, 6.0])
    same(found.objectives[0, :, 0], [NAN, -1.0, NAN, NAN, NAN, NAN, 0.0, NAN, NAN])
    same(found.objectives[0, :, 1], [NAN, 40.0, NAN, NAN, NAN, NAN, NAN, NAN, NAN])
    same(found.history[0, :, 0], [7.0, 23.0, NAN, NAN, NAN, NAN, NAN, NAN, NAN])
    assert found.attributes.row(0) == (3.0, "br")


@pytest.mark.parametrize("window", [1, 2])
def test_short_windows_through_both_paths(window: int):
    everywhere_the_same(platform_of(window=window), A_WEEK)


def test_other_periods_through_both_paths():
    everywhere_the_same(platform_of(window=5, period="6h"), A_WEEK)


def test_platforms_that_log_less_through_both_paths():
    bare = platform_of(window=4, attributes={})
    everywhere_the_same(
        bare, records_of(bare, A_WEEK.decisions.drop("decision_id", "propensity", "assignment", "model_version").to_dicts(), A_WEEK.activity.to_dicts())
    )
    barest = platform_of(window=4, attributes={}, measures={})
    everywhere_the_same(barest, records_of(barest, [decision("p1", START), decision("p1", START + HOUR), decision("p1", START + 3 * DAY, returns=1.0)], None))


def test_decisions_at_the_same_moment_do_not_know_of_each_other():
    both = [
        decision("p1", START + HOUR, 1.0, "stretch"),
        decision("p1", START + HOUR, 2.0, "retain"),
        decision("p1", START + HOUR, 3.0, "retain"),
        decision("p1", START + 2 * HOUR, 4.0, "stretch"),
    ]
    records = records_of(NARROW, both)
    everywhere_the_same(NARROW, records)
    same(online_states(NARROW, records, "p1", START + 2 * HOUR).actions[0, -1], [3.0, 0.0])


def moments(limit_days: int = 6) -> st.SearchStrategy[datetime]:
    return st.integers(0, limit_days * 4).map(lambda quarter: START + quarter * 6 * HOUR)  # coarse, so that times meet each other and the boundaries


values = st.one_of(st.none(), st.integers(-40, 40).map(lambda v: v / 8))
player_ids = st.sampled_from(["p1", "p2"])
some_decisions = st.lists(
    st.builds(decision, player_ids, moments(12), st.integers(0, 99).map(float), st.sampled_from(["stretch", "retain"]), returns=values, ltv=values),
    min_size=1,
    max_size=6,
)
some_events = st.lists(
    st.builds(
        lambda player, at, value, late: event(player, at, value, at + late * 6 * HOUR), player_ids, moments(), values, st.sampled_from([0, 0, 0, 1, 4, 10])
    ),
    max_size=10,
)
some_versions = st.fixed_dictionaries(
    {"player_id": player_ids, "valid_from": st.one_of(st.none(), moments()), "tenure": values, "region": st.sampled_from(["in", "br", None])}
)
some_players = st.one_of(st.none(), st.lists(some_versions, max_size=4, unique_by=lambda v: (v["player_id"], v["valid_from"])))
modest = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@modest
@given(some_decisions, some_events, some_players)
def test_any_logs_give_the_same_states_through_both_paths(decisions, events, players):
    everywhere_the_same(NARROW, records_of(NARROW, decisions, events, players))


# ---- online, in steps ----------------------------------------------------------------------------------------------------------
def known_before(records: Records, at: datetime) -> Records:
    return Records(
        records.decisions.filter(pl.col("decided_at") < at),
        records.activity.filter(pl.col("known_at") < at),
        records.players,
        None,
        None,
        records.quarantine,
        {},
        {},
        [],
    )


def in_steps(platform: Platform, records: Records, start: datetime, steps: Sequence[datetime]) -> pl.DataFrame:
    """The online frame at `start`, then what became known until each step, activity first, as the endpoint hears of it."""
    frame = features.online_frame(platform, known_before(records, start), start)
    for earlier, later in zip([start, *steps[:-1]], steps, strict=True):
        frame = features.with_events(platform, frame, records.activity.filter((pl.col("known_at") >= earlier) & (pl.col("known_at") < later)))
        frame = features.with_decisions(platform, frame, records.decisions.filter((pl.col("decided_at") >= earlier) & (pl.col("decided_at") < later)))
    return frame


def test_what_is_heard_in_steps_makes_the_same_state():
    for index, at in enumerate(A_WEEK.decisions.filter(pl.col("player_id") == "p1")["decided_at"]):
        for start in (START + 2 * HOUR, START + 9.5 * HOUR, START + 2 * DAY):
            if start <= at:
                frame = in_steps(PLATFORM, A_WEEK, start, [start + (at - start) / 2, at])
                found, wanted = features.states_at(PLATFORM, frame.filter(pl.col("player_id") == "p1"), at), slow_state(PLATFORM, A_WEEK, "p1", at)
                for part in ("history", "actions", "objectives"):
                    same(getattr(found, part), getattr(wanted, part), f"{part} of decision {index} from {start}")
                assert found.policies == wanted.policies


@modest
@given(some_decisions, some_events, st.lists(moments(12), min_size=1, max_size=3))
def test_any_logs_heard_in_steps_make_the_same_state(decisions, events, steps):
    # whatever came last counts as `last` online, for the cell does not keep when that was: here nothing is late
    records = records_of(
        NARROW,
        decisions,
        [{**e, "known_at": e["occurred_at"]} for e in events],
        [{"player_id": p, "valid_from": None, "tenure": 1.0, "region": "in"} for p in ("p1", "p2")],
    )
    steps = sorted(steps)
    at = steps[-1]
    states = features.states_at(NARROW, in_steps(NARROW, records, START, steps).sort("player_id"), at)
    frame = features.online_frame(NARROW, records, at).sort("player_id")
    for row, player in enumerate(["p1", "p2"]):
        wanted = slow_state(NARROW, records, player, at)
        mean = AGGREGATES.index("mean")  # the mean of what a cell held and what is new rounds twice
        np.testing.assert_allclose(states.history[row, :, mean], wanted.history[0, :, mean], rtol=3e-7)
        same(np.delete(states.history[row], mean, 1), np.delete(wanted.history[0], mean, 1), "history")
        same(states.actions[row], wanted.actions[0])
        same(states.objectives[row], wanted.objectives[0])
        assert states.policies[row] == wanted.policies[0]
    seen = in_steps(NARROW, records, START, steps).sort("player_id")["seen_at"].to_list()
    assert seen == frame["seen_at"].to_list()


def test_late_events_are_added_to_their_own_cell_in_every_aggregate_that_needs_no_order():
    frame = features.online_frame(NARROW, records_of(NARROW, [], [event("p1", START + HOUR, 4.0), event("p1", START + DAY, 1.0)]), START + 2 * DAY)
    frame = features.with_events(NARROW, frame, records_of(NARROW, [], [event("p1", START + 2 * HOUR, 7.0), event("p1", START + 3 * HOUR, -2.0)]).activity)
    history = features.states_at(NARROW, frame, START + 2 * DAY).history
    same(history[0, 1], [9.0, 3.0, -2.0, 7.0, -2.0, 3.0])  # 4 + 7 - 2, 9 / 3; the last one of those
    same(history[0, 2], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    same(history[0, 0], [NAN] * 6)


def test_events_heard_together_count_in_the_order_of_time():
    frame = features.online_frame(NARROW, records_of(NARROW, [decision("p1", START)]), START + HOUR)
    heard = records_of(NARROW, [], [event("p1", START + 3 * HOUR, 1.0), event("p1", START + 5 * HOUR, 2.0), event("p1", START + 4 * HOUR, 3.0)]).activity
    frame = features.with_events(NARROW, frame, heard.sort("last"))  # by value, not by time
    same(features.states_at(NARROW, frame, START + 6 * HOUR).history[0, -1], [6.0, 2.0, 1.0, 3.0, 2.0, 3.0])


def test_what_is_heard_of_one_player_leaves_the_others_as_they_were():
    records = records_of(NARROW, [decision(p, START + HOUR, 5.0) for p in ("p1", "p2")], [event(p, START, 4.0) for p in ("p1", "p2")])
    frame = features.online_frame(NARROW, records, START + 2 * HOUR)
    before = features.states_at(NARROW, frame, START + DAY)
    heard = features.with_events(NARROW, frame, records_of(NARROW, [], [event("p1", START + DAY, 1.0)]).activity)
    heard = features.with_decisions(NARROW, heard, records_of(NARROW, [decision("p1", START + DAY, 6.0)]).decisions)
    after = features.states_at(NARROW, heard, START + DAY)
    for part in ("history", "actions", "objectives"):
        same(getattr(after, part)[1], getattr(before, part)[1], part)
    assert heard["player_id"].to_list() == ["p1", "p2"]


def test_events_older_than_the_window_change_nothing():
    before = features.online_frame(NARROW, records_of(NARROW, [], [event("p1", START + 5 * DAY, 4.0)]), START + 6 * DAY)
    after = features.with_events(NARROW, before, records_of(NARROW, [], [event("p1", START + 2 * DAY, 7.0), event("p1", START + 3 * DAY, 8.0)]).activity)
    same(features.states_at(NARROW, after, START + 6 * DAY).history[0, :, 0], [8.0, NAN, 4.0])


def test_an_event_without_a_value_leaves_a_cell_as_it_was():
    frame = features.online_frame(NARROW, records_of(NARROW, [], [event("p1", START, 4.0)]), START + DAY)
    frame = features.with_events(NARROW, frame, records_of(NARROW, [], [event("p1", START + HOUR, None), event("p1", START + DAY, None)]).activity)
    same(features.states_at(NARROW, frame, START + 2 * DAY).history[0], [[NAN] * 6, [4.0, 4.0, 4.0, 4.0, 4.0, 1.0], [NAN] * 6])


def test_an_outcome_that_is_told_later_fills_its_row_and_forgets_nothing_newer():
    decisions = [decision("p1", START, 1.0, "stretch"), decision("p1", START + DAY, 2.0, "retain", returns=5.0)]
    records = records_of(NARROW, decisions)
    frame = features.online_frame(NARROW, records, START + 2 * DAY + HOUR)
    told = records.decisions.head(1).with_columns(returns=pl.lit(3.0))
    frame = features.with_decisions(NARROW, frame, told)
    states = features.states_at(NARROW, frame, START + 2 * DAY + HOUR)
    same(states.actions[0, :, 0], [NAN, 1.0, 2.0])
    same(states.objectives[0, :, 0], [NAN, 3.0, 5.0])
    assert states.policies == ["retain"], "retain acted last, whatever was told of stretch"
    assert frame["seen_at"].to_list() == [START + DAY]


def test_an_outcome_of_the_earlier_decision_of_a_day_does_not_replace_the_later_one():
    records = records_of(NARROW, [decision("p1", START, 1.0, "stretch"), decision("p1", START + HOUR, 2.0, "retain", returns=5.0)])
    frame = features.online_frame(NARROW, records, START + 2 * HOUR)
    frame = features.with_decisions(NARROW, frame, records.decisions.head(1).with_columns(returns=pl.lit(3.0)))
    states = features.states_at(NARROW, frame, START + 2 * DAY)
    same(states.actions[0, :, 0], [NAN, 2.0, NAN])
    same(states.objectives[0, :, 0], [NAN, 5.0, NAN])
    assert states.policies == ["retain"]


def test_a_correction_of_the_same_decision_stands():
    records = records_of(NARROW, [decision("p1", START, 1.0, returns=3.0)])
    frame = features.online_frame(NARROW, records, START + HOUR)
    frame = features.with_decisions(NARROW, frame, records.decisions.with_columns(returns=pl.lit(4.0)))
    same(features.states_at(NARROW, frame, START + DAY + HOUR).objectives[0, :, 0], [NAN, NAN, 4.0])


def test_without_measures_activity_does_not_move_the_window():
    platform = platform_of(measures={})
    frame = features.online_frame(platform, records_of(platform, [decision("p1", START, 5.0)]), START + HOUR)
    heard = features.with_events(platform, frame, pl.DataFrame({"player_id": ["p1"], "occurred_at": pl.Series([START + DAY], dtype=TIME)}))
    for at in (START + DAY + HOUR, START + 2 * DAY):
        same(features.states_at(platform, heard, at).actions, features.states_at(platform, frame, at).actions)
    assert heard["seen_at"].to_list() == [START + DAY]


def test_rolling_over_empty_periods():
    records = records_of(NARROW, [decision("p1", START + 2 * HOUR, 5.0, returns=1.0)], [event("p1", START + HOUR, 4.0)])
    frame = features.online_frame(NARROW, records, START + 3 * HOUR)
    for days, games in ((0.5, [NAN, NAN, 4.0]), (1, [NAN, NAN, 4.0]), (2, [NAN, 4.0, NAN]), (3.9, [4.0, NAN, NAN]), (4, [NAN] * 3), (400, [NAN] * 3)):
        states = features.states_at(NARROW, frame, START + days * DAY)
        same(states.history[0, :, 0], games, f"after {days} days")
        same(states.actions[0, :, 0], [5.0 if g == 4.0 else NAN for g in games])
        same(states.objectives[0, :, 0], [1.0 if g == 4.0 and days > 1 else NAN for g in games])  # known 26 hours in
        assert states.policies == ["retain"]
    later = features.with_events(NARROW, frame, records_of(NARROW, [], [event("p1", START + 2 * DAY, 6.0)]).activity)
    same(features.states_at(NARROW, later, START + 2 * DAY + HOUR).history[0, :, 0], [4.0, NAN, 6.0])


def test_an_objective_becomes_known_strictly_after_its_delay():
    frame = features.online_frame(PLATFORM, records_of(PLATFORM, [decision("p1", START + HOUR, returns=1.0, ltv=2.0)]), START + 2 * HOUR)
    instant = timedelta(microseconds=1)
    for at, known in (
        (START + DAY + HOUR, [NAN, NAN]),
        (START + DAY + HOUR + instant, [1.0, NAN]),
        (START + 7 * DAY + HOUR, [1.0, NAN]),
        (START + 7 * DAY + HOUR + instant, [1.0, 2.0]),
    ):
        states = features.states_at(PLATFORM, frame, at)
        same(states.objectives[0, ~np.isnan(states.actions[0, :, 0])], [known], str(at))


def test_a_new_player_joins_by_an_event_or_a_decision():
    frame = features.online_frame(NARROW, records_of(NARROW, [decision("p1", START)]), START + HOUR)
    frame = features.with_events(NARROW, frame, records_of(NARROW, [], [event("p8", START + DAY, 3.0)]).activity)
    frame = features.with_decisions(NARROW, frame, records_of(NARROW, [decision("p9", START + DAY, 6.0, "stretch")]).decisions)
    states = features.states_at(NARROW, frame, START + DAY + HOUR)
    assert frame["player_id"].to_list() == ["p1", "p8", "p9"]
    assert frame.schema == features.online_schema(NARROW)
    same(states.history[:, -1, 0], [NAN, 3.0, NAN])
    same(states.actions[:, -1, 0], [1.0, NAN, 6.0])  # of p1 nothing new: the window ends the day before
    assert states.policies == ["retain", None, "stretch"]
    assert frame["seen_at"].to_list() == [START, START + DAY, START + DAY]


def test_players_of_whom_only_attributes_are_known_have_a_row():
    frame = features.online_frame(PLATFORM, A_WEEK, START + 4 * DAY).sort("player_id")
    states = features.states_at(PLATFORM, frame, START + 4 * DAY)
    assert frame["player_id"].to_list() == ["p1", "p2", "p3"]
    assert frame["policy"].to_list() == ["stretch", "stretch", None]
    assert np.isnan(states.history[2]).all()
    assert states.attributes.row(2) == (9.0, "us")
    assert frame["seen_at"].to_list() == [START + 2 * DAY + 23 * HOUR, START + 3 * DAY, None]


def test_being_served_does_not_make_a_player_look_alive():
    decisions = [decision("p1", START, policy="stretch"), decision("p1", START + 2 * DAY, 5.0, policy="fastq"), decision("p2", START + DAY, policy="fastq")]
    records = records_of(NARROW, decisions, [event("p3", START, 1.0)])
    frame = features.online_frame(NARROW, records, START + 3 * DAY).sort("player_id")
    assert frame["seen_at"].to_list() == [START, None, START]
    served = records_of(NARROW, [decision(p, START + 3 * DAY, 6.0, policy="fastq") for p in ("p1", "p3", "p4")]).decisions
    frame = features.with_decisions(NARROW, frame, served)
    assert frame["seen_at"].to_list() == [START, None, START, None]
    assert frame["policy"].to_list() == ["fastq"] * 4, "it has acted all the same"
    same(features.states_at(NARROW, frame, START + 4 * DAY).actions[[0, 2, 3], -1, 0], [6.0, 6.0, 6.0])
    frame = features.with_decisions(NARROW, frame, records_of(NARROW, [decision("p3", START + 4 * DAY), decision("p4", START, policy="stretch")]).decisions)
    assert frame["seen_at"].to_list() == [START, None, START + 4 * DAY, START]


def test_where_no_activity_is_logged_decisions_are_all_that_is_seen():
    tree = {**TREE, "logs": {"decisions": "d", "players": "p"}, "state": {**TREE["state"], "measures": {}}}
    platform = platform_from_tree(tree, Path(), "fastq.yaml")
    frame = features.online_frame(platform, records_of(platform, [decision("p1", START, policy="fastq")], None), START + DAY)
    assert frame["seen_at"].to_list() == [START]
    frame = features.with_decisions(platform, frame, records_of(platform, [decision("p1", START + DAY, policy="fastq")], None).decisions)
    assert frame["seen_at"].to_list() == [START + DAY]


def test_nothing_known_at_all():
    everything = [records_of(NARROW, []), known_before(A_WEEK, START), records_of(NARROW, [], None)]
    for records in everything:
        frame = features.online_frame(NARROW, records, START + DAY)
        assert features.states_at(NARROW, frame, START + DAY).history.shape == (len(frame), 3, 6)
        assert len(windows.build(NARROW, records, features.build_rows(NARROW, records))) == 0


def test_activity_before_any_decision_gives_states_too():
    frame = features.online_frame(NARROW, records_of(NARROW, [], [event("p1", START, 2.0)]), START + DAY)
    states = features.states_at(NARROW, frame, START + DAY)
    same(states.history[0, :, 0], [NAN, NAN, 2.0])
    assert np.isnan(states.actions).all()
    assert states.policies == [None]


def test_rows_are_the_same_from_lists_as_from_arrays_and_never_shared_with_the_frame():
    arrays = features.online_frame(NARROW, A_WEEK, START + 4 * DAY)
    lists = arrays.cast(dict(features.online_schema(NARROW)))  # as the store gives them
    assert (arrays.schema["window"], lists.schema["window"]) == (pl.Array(pl.Float32, 30), pl.List(pl.Float32))
    history = features.states_at(NARROW, arrays, START + 4 * DAY).history
    for frame in (arrays, lists, pl.concat([lists[:1], lists[1:]], rechunk=False)):
        states = features.online_states(NARROW, frame)
        for name in ("window", "counts", "decided"):
            part = getattr(states, name)
            assert part.dtype == (np.int64 if name == "decided" else np.float32)
            np.testing.assert_array_equal(part.reshape(len(frame), -1), np.array(frame[name].to_list(), part.dtype))
            part[:] = -1
        same(features.states_at(NARROW, frame, START + 4 * DAY).history, history)


def test_a_naive_moment_is_utc():
    frame = features.online_frame(PLATFORM, A_WEEK, datetime(2026, 1, 3))  # noqa: DTZ001 - that is the point
    assert frame.sort("player_id").equals(features.online_frame(PLATFORM, A_WEEK, START + 2 * DAY).sort("player_id"))
    assert features.epoch_microseconds(datetime(1970, 1, 2)) == 86_400_000_000  # noqa: DTZ001


# ---- rows ------------------------------------------------------------------------------------------------------------------------
def test_every_aggregate_of_a_period():
    # in the order of time: 3, 1, (nothing), 8 on the first day; nothing at all on the second; one null on the third; -0.5 on the fourth
    events = [event("p1", START + 5 * HOUR, 8.0), event("p1", START + HOUR, 3.0), event("p1", START + 2 * HOUR, 1.0), event("p1", START + 3 * HOUR, None)]
    events += [event("p1", START + 2 * DAY, None), event("p1", START + 3 * DAY, -0.5)]
    rows = features.build_rows(NARROW, records_of(NARROW, [], events))
    same(rows.matrix[:, :6], [[NAN] * 6, [12.0, 4.0, 1.0, 8.0, 8.0, 3.0], [NAN] * 6, [NAN] * 6, [-0.5, -0.5, -0.5, -0.5, -0.5, 1.0]])
    same(rows.counts[:, 0], [0, 3, 0, 0, 1])


def test_the_last_event_of_a_moment_is_the_last_one_logged():
    events = [event("p1", START + HOUR, float(value)) for value in range(40)]
    assert features.build_rows(NARROW, records_of(NARROW, [], events)).matrix[1, AGGREGATES.index("last")] == 39


def test_rows_run_from_the_first_thing_seen_to_the_last():
    records = records_of(
        NARROW,
        [decision("p1", START + 3 * DAY), decision("p2", START + DAY)],
        [event("p1", START + DAY, 1.0), event("p2", START + 2 * DAY - timedelta(microseconds=1), 5.0)],
    )
    rows = features.build_rows(NARROW, records)
    assert rows.frame.select("player_id", "period", "row").rows() == [("p1", FIRST + 1, 1), ("p1", FIRST + 2, 2), ("p1", FIRST + 3, 3), ("p2", FIRST + 1, 4)]
    assert rows.frame["event_timestamp"].to_list() == [START + days * DAY for days in (2, 3, 4, 2)]
    assert rows.frame["policy"].to_list() == [None, None, "retain", "retain"]
    assert rows.matrix.dtype == np.float32
    assert np.isnan(rows.matrix[0]).all()
    same(rows.matrix[:, 0], [NAN, 1.0, NAN, NAN, 5.0])


def test_the_last_decision_of_a_period_stands():
    records = records_of(NARROW, [decision("p1", START + 20 * HOUR, 2.0, returns=None), decision("p1", START + 4 * HOUR, 1.0, "stretch", 7.0, returns=9.0)])
    rows = features.build_rows(NARROW, records)
    same(rows.matrix[1, 6:], [2.0, 0.0, NAN, NAN])  # the whole of it: nothing of the earlier one shines through
    assert rows.decided.tolist() == [0, features.epoch_microseconds(START + 20 * HOUR)]
    assert rows.frame["policy"].to_list() == ["retain"]


def test_attributes_are_those_valid_strictly_before():
    found = features.attributes_at(
        PLATFORM,
        A_WEEK.players,
        pl.Series(["p1"] * 4 + ["p2"]),
        pl.Series([START + 7 * DAY + HOUR, START, START + 2 * DAY, START + 2 * DAY + HOUR, START], dtype=TIME),
    )
    assert found.rows() == [(3.0, "br"), (1.0, "in"), (1.0, "in"), (2.0, None), (None, None)]
    assert found.schema == {"tenure": pl.Float64, "region": pl.String}


def test_the_fingerprint_changes_with_what_a_row_means_only():
    one = features.fingerprint(PLATFORM)
    assert features.fingerprint(platform_of(window=9)) == one
    assert features.fingerprint(platform_of(window=9, churn=9)) == one
    others = [
        NARROW, platform_of(window=9, period="2d"), platform_of(window=9, measures={**TREE["state"]["measures"], "sum": {"aggregate": "mean"}}),
        platform_of(window=9, attributes={"tenure": {"kind": "categorical"}, "region": {"kind": "categorical"}}),
    ]  # fmt: skip
    assert len({one, *map(features.fingerprint, others)}) == 5


# ---- catalogues -------------------------------------------------------------------------------------------------------------------
def shop(features_: dict[str, Any]) -> Platform:
    logs = {"decisions": "d", "items": "i"}
    return platform_from_tree({**TREE, "logs": logs, "state": {"window": 3}, "action": {"kind": "catalogue", "features": features_}}, Path(), "fastq.yaml")


ITEMS = pl.DataFrame({"item_id": ["c", "a", "b", "d"], "price": [1.0, 2.0, None, 10.0], "brand": ["x", "y", None, "x"]})


def test_the_catalogue_s_embedding_does_not_depend_on_the_order_of_items():
    platform = shop({"price": {"kind": "numeric"}, "brand": {"kind": "categorical"}})
    one, two = features.build_catalogue(platform, ITEMS), features.build_catalogue(platform, ITEMS.reverse())
    assert one.ids == two.ids == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(one.embedding, two.embedding)
    assert one.embedding.dtype == np.float32
    assert one.embedding.std() == pytest.approx(1, rel=1e-6)
    assert features.action_width(platform, one) == one.embedding.shape[1] == 3  # centred price and three brands that sum to 1


def test_the_embedding_keeps_the_distances_between_items():
    # price standardised: mean 13/3, values 2, 1, 10 and a missing one at the mean; brands one-hot
    platform = shop({"price": {"kind": "numeric"}, "brand": {"kind": "categorical"}})
    found = features.build_catalogue(platform, ITEMS)
    prices = np.array([2.0, 13 / 3, 1.0, 10.0])  # a, b, c, d
    brands = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]], float)
    encoded = np.column_stack([(prices - 13 / 3) / np.std([2.0, 1.0, 10.0]), brands])
    apart = np.linalg.norm(encoded[:, None] - encoded[None], axis=2)
    mine = np.linalg.norm(found.embedding[:, None].astype(float) - found.embedding[None], axis=2)
    np.testing.assert_allclose(mine / mine[0, 1], apart / apart[0, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_an_embedding_points_where_its_leading_feature_does(seed: int):
    # an SVD's directions may point either way, on another machine another way: the largest weight of each is positive here
    values = np.random.default_rng(seed).normal(size=(30, 4)) @ np.diag([1.0, 2.0, 3.0, 4.0])
    items = pl.DataFrame({"item_id": [f"{i:02}" for i in range(30)], **{f"f{j}": values[:, j] for j in range(4)}})
    found = features.build_catalogue(shop({f"f{j}": {"kind": "numeric"} for j in range(4)}), items)
    directions = np.linalg.lstsq((values - values.mean(0)) / values.std(0), found.embedding.astype(float), rcond=None)[0]
    assert (directions[np.abs(directions).argmax(0), range(4)] > 0).all()


def test_items_without_features_are_told_apart_by_their_ids():
    found = features.build_catalogue(shop({}), ITEMS)
    apart = np.linalg.norm(found.embedding[:, None] - found.embedding[None], axis=2)[~np.eye(4, dtype=bool)]
    np.testing.assert_allclose(apart, apart[0], rtol=1e-5)
    assert apart[0] > 0.1


@pytest.mark.parametrize("items", [ITEMS.head(1), ITEMS.with_columns(price=pl.lit(None, pl.Float64)), ITEMS.with_columns(price=pl.lit(3.0), brand=pl.lit("x"))])
def test_a_catalogue_that_tells_little_is_still_finite(items: pl.DataFrame):
    found = features.build_catalogue(shop({"price": {"kind": "numeric"}, "brand": {"kind": "categorical"}}), items)
    assert np.isfinite(found.embedding).all()
    assert found.embedding.shape[1] >= 1


def test_large_catalogues_are_cut_to_their_leading_directions():
    items = pl.DataFrame({"item_id": [f"{i:03}" for i in range(50)]})
    assert features.build_catalogue(shop({}), items).embedding.shape == (50, features.EMBEDDING_RANK)


def test_positions_in_a_catalogue():
    found = features.build_catalogue(shop({}), ITEMS)
    assert found.positions(["d", "a", "zzz", None]).tolist() == [3, 0, -1, -1]
    matrix = features.action_matrix(shop({}), pl.DataFrame({"item_id": ["d", "zzz"]}), found)
    np.testing.assert_array_equal(matrix[0], found.embedding[3].astype(float))
    assert np.isnan(matrix[1]).all()


# ---- encoding -----------------------------------------------------------------------------------------------------------------------
ENCODING = Encoding(np.array([10.0, 0.0], np.float32), np.array([2.0, 0.5], np.float32), {"tenure": (4.0, 2.0)}, {"region": ["br", "in"]})


def test_rows_are_standardised_marked_and_clipped():
    raw = np.array([[14.0, NAN], [NAN, 0.25], [1e9, -1e9], [np.inf, 0.0]])
    found = ENCODING.rows(raw)
    assert found.dtype == np.float32
    same(found, [[2, 0, 1, 0], [0, 0.5, 0, 1], [8, -8, 1, 1], [0, 0, 0, 1]])


def test_attributes_are_encoded_with_a_slot_for_the_unseen():
    frame = pl.DataFrame({"tenure": [8.0, None, 1e9, NAN], "region": ["in", "br", "mars", None]})
    # tenure: standardised, known; region: unseen, br, in
    same(ENCODING.attributes(frame, 4), [[2, 1, 0, 0, 1], [0, 0, 0, 1, 0], [8, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    same(ENCODING.attributes(None, 2), [[0, 0, 1, 0, 0]] * 2)
    assert ENCODING.attribute_width == 5
    assert ENCODING.attributes(frame.clear(), 0).shape == (0, 5)


def test_attributes_that_are_missing_are_named():
    with pytest.raises(RequestError, match="expected the columns tenure, region; missing: region"):
        ENCODING.attributes(pl.DataFrame({"tenure": [1.0]}), 1)


def test_an_encoding_is_fitted_on_what_is_known():
    matrix = np.array([[1.0, 5.0, NAN], [3.0, NAN, NAN], [NAN, 5.0, NAN]], np.float32)
    attributes = pl.DataFrame({"tenure": [1.0, 3.0, None, NAN], "region": ["in", None, "br", "in"]})
    found = features.fit_encoding(PLATFORM, matrix, attributes)
    same(found.mean, [2, 5, 0])
    same(found.scale, [1, 1, 1])  # sd of 1 and 3; nothing varies; nothing known
    assert found.numeric == {"tenure": (2.0, pytest.approx(math.sqrt(2)))}
    assert found.vocabularies == {"region": ["br", "in"]}
    nothing = features.fit_encoding(
        PLATFORM, matrix, pl.DataFrame({"tenure": pl.Series([None], dtype=pl.Float64), "region": pl.Series([None], dtype=pl.String)})
    )
    assert nothing.numeric == {"tenure": (0.0, 1.0)}
    assert nothing.vocabularies == {"region": []}


def test_fitting_keeps_large_values_apart():
    matrix = np.array([[1e6 + 1], [1e6 - 1]], np.float32)
    found = features.fit_encoding(PLATFORM, matrix, pl.DataFrame({"tenure": [1.0], "region": ["in"]}))
    np.testing.assert_allclose([found.mean[0], found.scale[0]], [1e6, 1.0], rtol=1e-6)


# ---- states that callers give -----------------------------------------------------------------------------------------------------
WIDTH = 6 + 2 + 2
HISTORY = np.arange(2 * 3 * 6, dtype=float).reshape(2, 3, 6)


def test_a_batch_of_states_becomes_windows():
    actions, objectives = np.full((2, 3, 2), 0.5), np.full((2, 3, 2), -1.0)
    found = features.raw_windows(NARROW, PlayerStates(HISTORY, None, actions, objectives), WIDTH)
    assert found.dtype == np.float32
    same(found, np.concatenate([HISTORY, actions, objectives], 2))
    same(features.raw_windows(NARROW, PlayerStates(HISTORY.tolist()), WIDTH), np.concatenate([HISTORY, np.full((2, 3, 4), NAN)], 2))  # type: ignore[arg-type]
    assert len(PlayerStates(HISTORY)) == 2


@pytest.mark.parametrize(
    ("states", "sentence"),
    [
        (PlayerStates(HISTORY[:, :2]), r"history: expected the shape \[players, window 3, 6 measures\], got \[2, 2, 6\]"),
        (PlayerStates(HISTORY[:, :, :5]), r"history: expected the shape .* 6 measures\], got \[2, 3, 5\]"),
        (PlayerStates(HISTORY[0]), r"history: expected the shape .* got \[3, 6\]"),
        (PlayerStates(HISTORY, None, np.zeros((2, 3, 1))), r"actions: expected the shape .* 2 action dimensions\], got \[2, 3, 1\]"),
        (PlayerStates(HISTORY, None, np.zeros((1, 3, 2))), r"actions: expected the shape .* got \[1, 3, 2\]"),
        (PlayerStates(HISTORY, None, None, np.zeros((2, 3, 3))), r"objectives: expected the shape .* 2 objectives\], got \[2, 3, 3\]"),
    ],
)
def test_a_wrong_shape_is_named(states: PlayerStates, sentence: str):
    with pytest.raises(RequestError, match=sentence):
        features.raw_windows(NARROW, states, WIDTH)


@pytest.mark.parametrize(
    "attributes",
    [
        pl.DataFrame({"region": ["in", None], "extra": [1, 2], "tenure": [3, None]}),
        np.array([[3.0, "in"], [None, None]], object),
        np.array([[3, "in"], [NAN, None]], object),
    ],
)
def test_attributes_as_a_frame_or_an_array(attributes: pl.DataFrame | np.ndarray):
    found = features.attribute_frame(NARROW, PlayerStates(HISTORY, attributes))
    assert found is not None
    assert found.columns == ["tenure", "region"]
    assert found["tenure"].dtype == pl.Float64
    assert found["tenure"].fill_nan(None).to_list() == [3.0, None]
    assert found["region"].to_list() == ["in", None]


def test_an_array_of_texts_is_read_too():
    found = features.attribute_frame(NARROW, PlayerStates(HISTORY, np.array([["3.5", "in"], ["4", "br"]])))
    assert found is not None
    assert found.rows() == [(3.5, "in"), (4.0, "br")]


def test_no_attributes():
    assert features.attribute_frame(NARROW, PlayerStates(HISTORY)) is None
    found = features.attribute_frame(platform_of(attributes={}), PlayerStates(HISTORY, np.zeros((2, 0))))
    assert found is not None
    assert found.width == 0


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        (np.zeros((2, 3)), r"attributes: expected the shape \[2 players, 2 attributes: tenure, region\], got \[2, 3\]"),
        (np.zeros(2), r"attributes: expected the shape .* got \[2\]"),
        (pl.DataFrame({"tenure": [1.0, 2.0]}), r"expected the columns tenure, region; missing: region"),
        (pl.DataFrame({"tenure": [1.0], "region": ["in"]}), r"expected 2 rows, one per player of history, got 1"),
        (pl.DataFrame({"tenure": ["long", "short"], "region": ["in", "in"]}), r"expected numbers in tenure"),
        (np.array([["long", "in"], [1.0, "in"]], object), r"expected numbers in tenure"),
    ],
)
def test_wrong_attributes_are_named(attributes: pl.DataFrame | np.ndarray, sentence: str):
    with pytest.raises(RequestError, match=sentence):
        features.attribute_frame(NARROW, PlayerStates(HISTORY, attributes))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_rows_are_moved_each_by_its_own_periods(shift: list[int]):
    values = np.arange(len(shift) * 4 * 2, dtype=np.float32).reshape(len(shift), 4, 2)
    kept = values.copy()
    moved = features._rolled(values, np.array(shift), np.nan)
    for row, by in enumerate(shift):
        same(moved[row], np.concatenate([values[row, by:], np.full((min(by, 4), 2), np.nan)]))
    same(values, kept)
