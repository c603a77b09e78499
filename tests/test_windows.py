"""Transitions, and the proof that no state holds what was not known strictly before its decision: leaks are planted, then looked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from fastq import features, windows
from fastq.platform import Platform, platform_from_tree
from fastq.records import Records
from fastq.windows import Windows, held_out_players

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
FIRST = (START - datetime(1970, 1, 1, tzinfo=UTC)) // DAY
TIME = pl.Datetime("us", "UTC")
NAN = math.nan
HUGE = 2.0**20  # and one more is still told apart in float32
TREE: dict[str, Any] = {
    "platform": "arena",
    "logs": {"decisions": "d", "activity": "a", "players": "p", "proposals": "q"},
    "state": {
        "period": "1d",
        "window": 4,
        "churn": 3,
        "measures": {"games": {"aggregate": "sum"}, "best": {"aggregate": "max"}},
        "attributes": {"tenure": {"kind": "numeric"}},
    },
    "policies": ["stretch", "retain", "spend"],
    "action": {"kind": "continuous", "dimensions": {"target": {"low": 0, "high": 100}}},
    "objectives": {"returns": {"discount": 0.9}, "ltv": {"discount": 0.5, "known_after": "7d"}, "cost": {"discount": 0.0}},
}
ARENA = platform_from_tree(TREE, Path(), "fastq.yaml")


def decision(player: str, at: datetime, target: float = 1.0, policy: str = "retain", **more: Any) -> dict[str, Any]:
    return {"player_id": player, "decided_at": at, "target": target, "policy": policy, **more}


def event(player: str, at: datetime, value: float | None, known_at: datetime | None = None) -> dict[str, Any]:
    return {"player_id": player, "occurred_at": at, "known_at": known_at or at, "games": value, "best": value}


def proposal(decision_id: str, policy: str, target: float, propensity: float | None = None, assignment: float | None = None) -> dict[str, Any]:
    return {"decision_id": decision_id, "policy": policy, "target": target, "propensity": propensity, "assignment": assignment}


def records_of(
    decisions: Sequence[dict[str, Any]],
    activity: Sequence[dict[str, Any]] | None = (),
    players: Sequence[dict[str, Any]] | None = None,
    proposals: Sequence[dict[str, Any]] | None = None,
    platform: Platform = ARENA,
    items: pl.DataFrame | None = None,
) -> Records:
    action: dict[str, Any] = dict.fromkeys(platform.dimension_names, pl.Float64) or {"item_id": pl.String}
    chances = {"propensity": pl.Float64, "assignment": pl.Float64}
    schema = {"decision_id": pl.String, "player_id": pl.String, "decided_at": TIME, "policy": pl.String, **chances, "model_version": pl.String, **action}
    schema |= dict.fromkeys(platform.objectives, pl.Float64)
    numbered = [dict.fromkeys(schema) | {"decision_id": f"d{i}"} | d for i, d in enumerate(decisions)]
    happened = {"player_id": pl.String, "occurred_at": TIME, "known_at": TIME, "games": pl.Float64, "best": pl.Float64}
    return Records(
        decisions=pl.DataFrame(numbered, schema=schema).sort("player_id", "decided_at", "decision_id"),
        activity=None if activity is None else pl.DataFrame(activity, schema=happened).sort("player_id", "occurred_at", maintain_order=True),
        players=None if players is None else pl.DataFrame(players, schema={"player_id": pl.String, "valid_from": TIME, "tenure": pl.Float64}),
        proposals=None if proposals is None else pl.DataFrame(proposals, schema={"decision_id": pl.String, "policy": pl.String, **action, **chances}),
        items=items,
        quarantine=pl.DataFrame(),
        counts={},
        metrics={},
        warnings=[],
    )


def built(records: Records, platform: Platform = ARENA) -> Windows:
    return windows.build(platform, records, features.build_rows(platform, records))


def games(found: Windows) -> np.ndarray:
    """[N, window] of the first measure."""
    return found.states(np.arange(len(found))).history[:, :, 0]


def same(found: Any, wanted: Any) -> None:
    np.testing.assert_array_equal(np.asarray(found, float), np.asarray(wanted, float))


# ---- nothing of the future ---------------------------------------------------------------------------------------------------
def test_an_event_after_the_decision_is_not_in_its_state():
    events = [event("p", START, 1.0), event("p", START + 30 * HOUR, 2.0), event("p", START + 34 * HOUR, HUGE)]
    found = games(
        built(
            records_of([decision("p", START + 34 * HOUR), decision("p", START + 34 * HOUR + timedelta(microseconds=1)), decision("p", START + 2 * DAY)], events)
        )
    )
    same(found[0], [NAN, NAN, 1, 2])  # of the moment itself: not before it
    same(found[1], [NAN, NAN, 1, 2 + HUGE])
    same(found[2], [NAN, NAN, 1, 2 + HUGE])


def test_an_event_that_arrives_late_is_in_no_state_before_it_is_known():
    known = START + 3 * DAY + 5 * HOUR
    events = [event("p", START, 1.0), event("p", START + HOUR, HUGE, known), event("p", START + 3 * DAY, 4.0)]
    moments = [START + 12 * HOUR, START + DAY, START + 2 * DAY + HOUR, START + 3 * DAY + HOUR, known, known + timedelta(microseconds=1), START + 4 * DAY]
    found = built(records_of([decision("p", at) for at in moments], events))
    wanted = [
        [NAN, NAN, NAN, 1],  # the period under way
        [NAN, NAN, NAN, 1],  # just over
        [NAN, NAN, 1, NAN],  # a day ago, nothing of today known
        [1, NAN, NAN, 4],  # three days ago, today under way
        [1, NAN, NAN, 4],  # known at the very moment: not before it
        [1 + HUGE, NAN, NAN, 4],
        [1 + HUGE, NAN, NAN, 4],
    ]
    same(games(found), wanted)
    assert np.nanmax(found.matrix) >= HUGE, "the leak was planted"
    # best (max) is read from the same events
    same(found.states(np.arange(7)).history[:, :, 1], np.where(np.array(wanted) > HUGE / 2, HUGE, wanted))


def test_a_late_event_of_the_period_under_way_waits_until_it_is_known():
    events = [event("p", START + HOUR, 1.0), event("p", START + 2 * HOUR, HUGE, START + 5 * HOUR)]
    found = games(
        built(
            records_of([decision("p", START + 3 * HOUR), decision("p", START + 5 * HOUR), decision("p", START + 6 * HOUR), decision("p", START + DAY)], events)
        )
    )
    same(found[:, -1], [1, 1, 1 + HUGE, 1 + HUGE])


def test_a_period_of_which_everything_arrives_late_was_empty():
    events = [event("p", START, 1.0), event("p", START + DAY, HUGE, START + 10 * DAY)]
    found = games(built(records_of([decision("p", START + DAY + HOUR), decision("p", START + 2 * DAY), decision("p", START + 10 * DAY + HOUR)], events)))
    same(found, [[NAN, NAN, NAN, 1], [NAN, NAN, 1, NAN], [NAN] * 4])


def test_an_event_known_as_its_period_ends_is_unknown_to_a_decision_at_that_moment():
    events = [event("p", START + HOUR, 1.0), event("p", START + 2 * HOUR, HUGE, START + DAY)]
    found = games(built(records_of([decision("p", START + DAY), decision("p", START + DAY + HOUR)], events)))
    same(found, [[NAN, NAN, NAN, 1], [NAN, NAN, 1 + HUGE, NAN]])  # an hour later today is under way, by the first decision


def test_a_late_event_is_unknown_in_every_slot_of_the_window():
    events = [event("p", START, 1.0), event("p", START + HOUR, HUGE, START + 90 * DAY)]
    found = games(built(records_of([decision("p", START + d * DAY) for d in (1, 2, 3, 4, 5)], events)))
    same(found, [[1 if slot == age else NAN for slot in range(4)] for age in (3, 2, 1, 0, -1)])


def test_a_late_row_keeps_its_lagged_action():
    events = [event("p", START, HUGE, START + 20 * DAY)]
    found = built(records_of([decision("p", START + HOUR, 7.0, returns=3.0, ltv=HUGE), decision("p", START + 3 * DAY)], events))
    states = found.states(np.array([1]))
    assert np.isnan(states.objectives[0, :, 1]).all(), "not yet known"
    same(states.history[0, :, 0], [NAN] * 4)
    same(states.actions[0, :, 0], [NAN, 7, NAN, NAN])
    same(states.objectives[0, :, 0], [NAN, 3, NAN, NAN])


def test_late_rows_are_right_in_any_batch():
    rng = np.random.default_rng(0)
    events = [event(f"p{i}", START + d * DAY, 1.0, START + d * DAY + late * DAY) for i in range(4) for d in range(8) for late in rng.integers(0, 5, 2)]
    found = built(records_of([decision(f"p{i}", START + d * DAY + 6 * HOUR) for i in range(4) for d in range(8)], events))
    assert len(found.late) > 10
    one_by_one = np.concatenate([found.raw(np.array([i])) for i in range(len(found))])
    batch = rng.permutation(np.repeat(np.arange(len(found)), 3))  # decisions drawn with replacement, in any order
    np.testing.assert_array_equal(found.raw(batch), one_by_one[batch])


def test_an_objective_is_in_no_state_before_it_is_known():
    instant = timedelta(microseconds=1)
    at = START + 5 * HOUR
    later = [at + DAY, at + DAY + instant, at + 2 * DAY, at + 3 * DAY]
    found = built(records_of([decision("p", at, 9.0, returns=HUGE, ltv=HUGE), *(decision("p", moment, 0.0) for moment in later)]))
    states = found.states(np.arange(5))
    slots = states.actions[:, :, 0] == 9
    assert slots.sum(1).tolist() == [0, 1, 1, 1, 1]
    same([states.objectives[i, slots[i], 0][0] for i in range(1, 5)], [NAN, HUGE, HUGE, HUGE])  # exactly a day: not before it
    assert np.isnan(states.objectives[:, :, 1]).all(), "ltv takes a week"
    assert (found.reward[0, :2] == HUGE).all(), "what is learned from is another matter"


def test_an_objective_known_after_a_week_is_known_after_a_week():
    wide = platform_from_tree({**TREE, "state": {**TREE["state"], "window": 9}}, Path(), "fastq.yaml")
    moments = [START + 7 * DAY, START + 7 * DAY + HOUR]
    found = built(records_of([decision("p", START, 9.0, returns=1.0, ltv=HUGE), *(decision("p", at, 0.0) for at in moments)], platform=wide), wide)
    states = found.states(np.arange(3))
    same(states.objectives[1, -7, :2], [1, NAN])  # exactly a week: not before it
    same(states.objectives[2, -8, :2], [1, HUGE])  # an hour later; today's first decision is in the last slot
    assert states.actions[2, -1, 0] == 0


def test_attributes_are_those_of_the_moment():
    players = [{"player_id": "p", "valid_from": START, "tenure": 1.0}, {"player_id": "p", "valid_from": START + DAY, "tenure": HUGE}]
    found = built(records_of([decision("p", at) for at in (START, START + HOUR, START + DAY, START + DAY + HOUR)], (), players))
    assert found.attributes["tenure"].to_list() == [None, 1.0, 1.0, HUGE]
    assert found.states(np.array([3, 1])).attributes["tenure"].to_list() == [HUGE, 1.0]


def test_other_players_are_not_in_a_state():
    found = built(
        records_of(
            [decision("a", START + 5 * DAY), decision("b", START + HOUR), decision("b", START + 5 * DAY)],
            [event("a", START + 4 * DAY, HUGE), event("b", START, 1.0)],
        )
    )
    same(games(found), [[NAN, NAN, NAN, HUGE], [NAN, NAN, NAN, 1], [NAN] * 4])


def test_changing_the_future_changes_no_state():
    rng = np.random.default_rng(1)
    moments = [START + float(h) * HOUR for h in np.sort(rng.choice(240, 30, replace=False))]
    decisions = [decision("p", at, float(rng.integers(100)), returns=float(i), ltv=float(i)) for i, at in enumerate(moments)]
    events = [event("p", START + float(rng.integers(240)) * HOUR, float(i)) for i in range(60)]
    cut = moments[17]
    tampered_events = [e if e["occurred_at"] < cut else {**e, "games": HUGE, "best": HUGE} for e in events]
    tampered_decisions = [d if d["decided_at"] < cut else {**d, "target": 99.0, "returns": HUGE, "policy": "stretch"} for d in decisions]
    whole, tampered = built(records_of(decisions, events)), built(records_of(tampered_decisions, tampered_events))
    np.testing.assert_array_equal(whole.raw(np.arange(18)), tampered.raw(np.arange(18)))
    assert (whole.last_policy[:18] == [-1] + [0] * 17).all()
    assert np.nanmax(tampered.raw(np.arange(30))) >= HUGE


# ---- where windows lie -------------------------------------------------------------------------------------------------------
def test_first_decisions_are_padded_with_the_empty_row():
    found = built(
        records_of(
            [decision("a", START), decision("b", START + DAY), decision("b", START + DAY + HOUR)], [event("b", START, 1.0), event("b", START + DAY, 2.0)]
        )
    )
    assert found.rows_of(np.arange(2))[:, :3].tolist() == [[0, 0, 0], [0, 0, 0]]
    same(games(found), [[NAN] * 4, [NAN, NAN, NAN, 1], [NAN, NAN, 1, 2]])
    assert found.rows_of(np.array([0])).tolist() == [[0, 0, 0, 0]]
    assert np.isnan(found.matrix[0]).all()
    assert found.decided[0] == 0


def test_no_windows_are_copied():
    decisions = [decision(f"p{i}", START + d * DAY + 6 * HOUR) for i in range(5) for d in range(20)]
    events = [event(f"p{i}", START + d * DAY + 3 * HOUR, 1.0) for i in range(5) for d in range(20)]
    events += [event("p0", START + 3 * DAY, 1.0, START + 6 * DAY)]  # late in the states of 4.25, 5.25; and 3.25, whose day is under way
    found = built(records_of(decisions, events))
    grid, partial, late = 1 + 5 * 20, 5 * 20, 2
    assert len(found.matrix) == len(found.decided) == grid + partial + late
    assert found.late[:, 0].tolist() == [4, 5]
    assert found.late[:, 2].tolist() == [201, 202]
    same(games(found)[[3, 4, 5, 6], :], [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1]])


def test_nothing_is_appended_where_nothing_is_under_way_or_late():
    found = built(records_of([decision("p", START + d * DAY) for d in range(3)], [event("p", START + d * DAY, 1.0) for d in range(3)]))
    assert len(found.matrix) == 1 + 3
    assert found.partial.tolist() == [-1, -1, -1]
    assert len(found.late) == 0


def test_the_earlier_decision_of_the_same_day_is_the_newest_thing_known():
    found = built(records_of([decision("p", START + h * HOUR, float(h), returns=1.0) for h in (1, 2, 3)]))
    same(found.states(np.arange(3)).actions[:, :, 0], [[NAN] * 4, [NAN, NAN, NAN, 1], [NAN, NAN, NAN, 2]])
    # and an action beside the measures of the day so far
    found = built(
        records_of([decision("p", START + 2 * HOUR, 5.0), decision("p", START + 4 * HOUR)], [event("p", START + HOUR, 1.0), event("p", START + 3 * HOUR, 2.0)])
    )
    states = found.states(np.arange(2))
    same(states.history[:, -1, 0], [1, 3])
    same(states.actions[:, -1, 0], [NAN, 5])


def test_pointers_of_a_feature_store_give_the_same_windows():
    rng = np.random.default_rng(2)
    decisions = [decision(f"p{rng.integers(3)}", START + float(h) * HOUR) for h in rng.choice(300, 40, replace=False)]
    events = [
        event(f"p{rng.integers(3)}", START + float(h) * HOUR, float(h), START + float(h + rng.choice([0, 0, 30])) * HOUR) for h in rng.integers(0, 300, 60)
    ]
    records = records_of(decisions, events)
    rows = features.build_rows(ARENA, records)
    asked = records.decisions.select("decision_id", "player_id", "decided_at").sort("decided_at")
    complete = rows.frame.select("player_id", "event_timestamp", "row").sort("event_timestamp")
    pointers = asked.join_asof(complete, left_on="decided_at", right_on="event_timestamp", by="player_id", check_sortedness=False).select("decision_id", "row")
    assert pointers["row"].null_count() > 0
    mine, theirs = windows.build(ARENA, records, rows), windows.build(ARENA, records, rows, pointers.sample(fraction=1, shuffle=True, seed=0))
    np.testing.assert_array_equal(mine.rows_of(np.arange(40)), theirs.rows_of(np.arange(40)))
    np.testing.assert_array_equal(mine.raw(np.arange(40)), theirs.raw(np.arange(40)))
    assert mine.fingerprint() == theirs.fingerprint()


# ---- transitions ---------------------------------------------------------------------------------------------------------------
def test_transitions_of_several_players():
    decisions = [
        decision("b", START + 36 * HOUR, 3.0, "stretch", returns=3.0),
        decision("a", START, 1.0, "retain", returns=1.0, cost=0.5),
        decision("b", START, 2.0, "spend", ltv=2.0),
        decision("a", START + 2 * DAY, 4.0, "stretch"),
    ]
    found = built(records_of(decisions))
    assert found.decision_id == ["d1", "d3", "d2", "d0"]
    assert found.player_ids == ["a", "b"]
    assert found.player.tolist() == [0, 0, 1, 1]
    assert found.policies == ["stretch", "retain", "spend"]
    assert found.policy.tolist() == [1, 0, 2, 0]
    assert found.last_policy.tolist() == [-1, 1, -1, 2]
    assert found.following.tolist() == [1, -1, 3, -1]
    assert found.elapsed.tolist() == [2.0, 0.0, 1.5, 0.0]
    assert found.switched.tolist() == [True, False, True, False]
    same(found.action, [[1], [4], [2], [3]])
    same(found.reward, [[1, NAN, 0.5], [NAN] * 3, [NAN, 2, NAN], [3, NAN, NAN]])
    np.testing.assert_allclose(found.discount, [[0.81, 0.25, 0], [0, 0, 0], [0.9**1.5, 0.5**1.5, 0], [0, 0, 0]], rtol=1e-12)
    assert found.moment.tolist() == [features.epoch_microseconds(START + d) for d in (0 * DAY, 2 * DAY, 0 * DAY, 36 * HOUR)]
    assert len(found) == 4
    assert found.states(np.array([3, 0])).policies == ["spend", None]


def test_an_objective_without_a_future_has_none_at_the_same_moment_either():
    found = built(records_of([decision("p", START), decision("p", START)]))
    assert found.elapsed.tolist() == [0, 0]
    same(found.discount, [[1, 1, 0], [0, 0, 0]])
    assert found.last_policy.tolist() == [-1, -1], "neither was known to the other"


def test_a_player_who_leaves_is_terminated_and_one_near_the_end_of_the_log_is_truncated():
    # churn is three periods; p leaves on day 1 and comes back on day 9, q is seen to the end, r only six days before it
    decisions = [decision("p", START + d * DAY) for d in (0, 1, 2, 9)] + [decision("q", START + 8 * DAY)] + [decision("r", START + d * DAY) for d in (4, 10)]
    events = (
        [event("p", START + d * DAY + HOUR, 1.0) for d in (0, 1, 9)] + [event("q", START + d * DAY, 1.0) for d in (8, 10)] + [event("r", START + 4 * DAY, 1.0)]
    )
    found = built(records_of(decisions, events))
    #   p0, p1: active within the day; p2: idle since day 1, for three days on day 4, before the next decision: left; p9: near the end; q8: back in two days;
    #   r4: idle since, left before day 10; r10: a decision for somebody gone starts a new clock, and the log ends
    assert found.terminated.tolist() == [False, False, True, False, False, True, False]
    assert found.truncated.tolist() == [False, False, False, True, True, False, True]
    assert found.following.tolist() == [1, 2, 3, -1, -1, 6, -1]
    same(found.discount[:, 0], [0.9, 0.9, 0, 0, 0, 0, 0])  # past a departure nothing counts, even where the player came back


def test_decisions_in_the_course_of_an_absence_are_links_of_the_chain_whenever_in_the_log_they_are():
    """Early in a log one could look ahead and end the episode at once; late one could not. Both must be the same problem."""
    days = [0, 1, 2]  # the platform decides daily, until the player has been idle for three periods
    decisions = [decision(name, START + (d + late) * DAY) for name, late in (("early", 0), ("late", 10)) for d in days]
    events = [event(name, START + late * DAY, 1.0) for name, late in (("early", 0), ("late", 10))] + [event("z", START + 13 * DAY, 1.0)]
    found = built(records_of(decisions, events))
    assert found.terminated.tolist() == [False, False, True] * 2
    same(found.discount[:, 0], [0.9, 0.9, 0] * 2)


def test_churn_is_counted_from_the_last_activity_to_the_next_and_to_the_log_s_end():
    instant = timedelta(microseconds=1)
    for gap, left in ((3 * DAY - instant, False), (3 * DAY, True)):
        seen, then = event("p", START - HOUR, 1.0), START - HOUR + gap
        assert built(records_of([decision("p", START)], [seen, event("p", then, 1.0)])).terminated.tolist() == [left], "the player is back after the gap"
        others = built(records_of([decision("p", START)], [seen, event("z", then, 1.0)]))
        assert others.terminated.tolist() == [left], "the log goes on with others"
        assert others.truncated.tolist() == [not left]
        decided = built(records_of([decision("p", START), decision("z", then)], [seen]))
        assert decided.terminated.tolist() == [left, False], "the log goes on with decisions"
        never = built(records_of([decision("p", START), decision("z", START + gap)], [event("z", START, 1.0)]))
        assert never.terminated[0] == left, "somebody never seen: from the decision on"


def test_without_activity_nobody_is_seen_to_leave():
    for activity in (None, ()):
        found = built(records_of([decision("p", START), decision("p", START + 90 * DAY)], activity))
        assert found.terminated.tolist() == [False, False]
        assert found.truncated.tolist() == [False, True]


def test_proposals_are_filled_with_what_was_executed():
    decisions = [
        decision("p", START, 10.0, "retain", propensity=0.2, assignment=0.5),
        decision("p", START + DAY, 20.0, "stretch"),
        decision("q", START, 30.0, "stretch"),
    ]
    proposals = [
        proposal("d0", "stretch", 11.0, 0.3, 0.25),
        proposal("d1", "retain", 21.0),
        proposal("d1", "stretch", 20.0, None, 0.6),
        proposal("d0", "spend", 99.0, 9.0, 9.0),
    ]
    found = built(records_of(decisions, (), None, proposals))
    assert found.policies == ["stretch", "retain"], "spend never acted"
    same(found.proposals[:, :, 0], [[11, 10], [20, 21], [30, NAN]])
    same(found.law, [[0.3, 0.2], [NAN, NAN], [NAN, NAN]])
    same(found.chance, [[0.25, 0.5], [0.6, NAN], [NAN, NAN]])
    same(found.propensity, [0.2, NAN, NAN])
    same(found.assignment, [0.5, NAN, NAN])


def test_without_proposals_only_what_was_executed_is_known():
    for proposals in (None, ()):
        found = built(records_of([decision("p", START, 10.0, "retain"), decision("p", START + DAY, 20.0, "stretch")], (), None, proposals))
        same(found.proposals[:, :, 0], [[NAN, 10], [20, NAN]])


def test_the_platform_s_own_policy_is_one_more():
    found = built(records_of([decision("p", START, 1.0, "fastq"), decision("p", START + DAY, 2.0, "spend")]))
    assert found.policies == ["spend", "fastq"]
    assert found.policy.tolist() == [1, 0]
    assert found.last_policy.tolist() == [-1, 1]


def test_one_player_and_one_decision():
    for activity in (None, (), [event("p", START, 1.0)]):
        found = built(records_of([decision("p", START + HOUR, 5.0, returns=2.0)], activity))
        assert len(found) == 1
        assert found.following.tolist() == [-1]
        assert found.truncated.tolist() == [True]
        assert found.last_policy.tolist() == [-1]
        same(found.discount, [[0, 0, 0]])
        same(games(found), [[NAN, NAN, NAN, 1.0 if activity else NAN]])
        assert np.isnan(found.states(np.array([0])).actions).all()


def test_the_fingerprint_follows_what_was_learned_from():
    one = built(records_of([decision("p", START, 5.0, returns=2.0)], [event("p", START - HOUR, 1.0)])).fingerprint()
    assert one == built(records_of([decision("p", START, 5.0, returns=2.0)], [event("p", START - HOUR, 1.0)])).fingerprint()
    others = [
        records_of([decision("p", START, 6.0, returns=2.0)], [event("p", START - HOUR, 1.0)]),
        records_of([decision("p", START, 5.0, returns=3.0)], [event("p", START - HOUR, 1.0)]),
        records_of([decision("p", START + HOUR, 5.0, returns=2.0)], [event("p", START - HOUR, 1.0)]),
        records_of([decision("p", START, 5.0, returns=2.0)], [event("p", START - HOUR, 2.0)]),
    ]
    assert len({one, *(built(records).fingerprint() for records in others)}) == 5


# ---- catalogues ------------------------------------------------------------------------------------------------------------------
def test_a_catalogue():
    tree = {
        **TREE,
        "logs": {"decisions": "d", "activity": "a", "proposals": "q", "items": "i"},
        "state": {**TREE["state"], "attributes": {}},
        "action": {"kind": "catalogue", "features": {"price": {"kind": "numeric"}}},
    }
    shop = platform_from_tree(tree, Path(), "fastq.yaml")
    items = pl.DataFrame({"item_id": ["x", "y", "z"], "price": [1.0, 2.0, 6.0]})
    decisions = [{**decision("p", START + d * DAY, 0.0), "item_id": item} for d, item in enumerate(["z", "x", "z"])]
    for d in decisions:
        del d["target"]
    proposals = [{"decision_id": "d0", "policy": "stretch", "item_id": "y", "propensity": 0.3, "assignment": None}]
    decisions[1]["policy"] = "stretch"
    found = built(records_of(decisions, None, None, proposals, shop, items), shop)
    assert found.catalogue is not None
    embedding = found.catalogue.embedding
    # (price - 3) / sd, then scaled to a spread of 1: prices -2, -1, 3 over sqrt(14 / 3)
    np.testing.assert_allclose(embedding[:, 0], np.array([-2, -1, 3]) / np.sqrt(14 / 3), rtol=1e-6)
    assert found.item.tolist() == [2, 0, 2]
    same(found.action, embedding[[2, 0, 2]])
    same(found.proposals[0], embedding[[1, 2]])
    states = found.states(np.arange(3))
    same(states.actions[2], [[NAN], [NAN], *embedding[[2, 0]]])
    assert states.history.shape == (3, 4, 2)


# ---- players held out ------------------------------------------------------------------------------------------------------------
IDS = [f"player{i}" for i in range(4_000)]


def test_held_out_players_are_about_the_share_asked_for():
    for ids in (IDS, [str(i) for i in range(4_000)], [f"{i:032x}" for i in range(4_000)]):
        for share in (0.1, 0.3, 0.5):
            assert held_out_players(ids, share, 0).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4_000))
    assert not held_out_players(IDS, 0.0, 0).any()
    assert held_out_players(IDS, 1.0, 0).all()


def test_held_out_players_stay_whoever_joins():
    few = held_out_players(IDS[::2], 0.3, 7)
    np.testing.assert_array_equal(held_out_players(IDS, 0.3, 7)[::2], few)
    np.testing.assert_array_equal(held_out_players(IDS[::-1], 0.3, 7)[::-1], held_out_players(IDS, 0.3, 7))
    assert held_out_players(IDS, 0.5, 7)[held_out_players(IDS, 0.3, 7)].all(), "a larger share keeps those of a smaller one"


def test_held_out_players_are_the_same_in_every_run():
    assert np.flatnonzero(held_out_players([str(i) for i in range(20)], 0.3, 0)).tolist() == [1, 4, 10, 12, 14]


def test_another_seed_holds_out_others_independently():
    one, two = held_out_players(IDS, 0.3, 0), held_out_players(IDS, 0.3, 1)
    assert (one & two).mean() == pytest.approx(0.09, abs=4 * math.sqrt(0.09 * 0.91 / 4_000))


@pytest.mark.parametrize("delay", ["7d", "1h"])
def test_what_comes_before_a_moment_is_what_a_log_that_ends_there_tells(delay: str):
    objectives = {name: {**what, "known_after": delay} for name, what in TREE["objectives"].items()}
    platform = platform_from_tree({**TREE, "objectives": objectives}, Path(), "fastq.yaml")
    known = platform.objectives["ltv"].known_after
    assert known is not None
    draw = np.random.default_rng(3)
    hours = draw.uniform(0, 40 * 24, 150)
    told = [{"player_id": f"p{draw.integers(12)}", "at": START + float(h) * HOUR, "value": float(h)} for h in hours]
    events = [event(each["player_id"], each["at"], 1.0) for each in told[:60]]
    decisions = [
        decision(d["player_id"], d["at"], 2.0, ["stretch", "spend"][i % 2], decision_id=f"d{i}", returns=d["value"], ltv=d["value"])
        for i, d in enumerate(told[60:])
    ]
    cut = START + 25 * DAY
    decisions.append(decision("left", cut - 2 * DAY, decision_id="left"))  # that they have gone is known a day after the cut
    whole = built(records_of(decisions, [*events, event("z", cut - HOUR / 2, 1.0)]), platform)
    learned, asked = windows.split_by_time(whole, cut)
    until = [d if d["decided_at"] + known < cut else d | {"ltv": None, "returns": None} for d in decisions if d["decided_at"] < cut]
    cut_off = built(records_of(until, [e for e in [*events, event("z", cut - HOUR / 2, 1.0)] if e["occurred_at"] < cut]), platform)
    there = {name: i for i, name in enumerate(cut_off.decision_id)}
    mine = np.flatnonzero(learned)
    theirs = np.array([there[whole.decision_id[i]] for i in mine])
    assert len(mine) > 20
    same(whole.raw(mine), cut_off.raw(theirs))
    same(whole.reward[mine], cut_off.reward[theirs])
    same(whole.discount[mine], cut_off.discount[theirs])
    assert whole.terminated[mine].any()
    assert whole.terminated[mine].tolist() == cut_off.terminated[theirs].tolist()
    follows = [[w.decision_id[w.following[i]] for i in rows if not w.terminated[i] and w.following[i] >= 0] for w, rows in ((whole, mine), (cut_off, theirs))]
    assert follows[0] == follows[1]
    assert {whole.decision_id[i] for i in np.flatnonzero(asked)} == {d["decision_id"] for d in decisions if d["decided_at"] >= cut}
    assert (~learned & ~asked).any(), "what lies across is in neither"


def test_nobody():
    assert held_out_players([], 0.3, 0).tolist() == []
