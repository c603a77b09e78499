"""From a player to an answer, on a really trained model, a real online store and a real decision log."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastq import assignment, features, records, registry
from fastq.errors import BundleError, RequestError, UnknownPlayerError
from fastq.platform import Holdout, Platform, load_platform, platform_from_tree
from fastq.policy import LEAST
from fastq.workspace import Workspace
from feature_repo import store
from serving import online
from serving.decision_log import Event, Reported, now_us
from serving.online import Ask, InlineState, Question, Service, StoreUnavailable


@pytest.fixture
def platform(trained: Path, tmp_path: Path) -> Platform:
    """A workspace of its own with the trained champion."""
    return load_platform(shutil.copytree(trained, tmp_path / "workspace"))


@pytest.fixture
def service(platform: Platform):
    with online.open_service(platform) as opened:
        yield opened


@pytest.fixture
def players(platform: Platform) -> list[str]:
    """Players who were seen yesterday, so that nothing about them is stale."""
    frame = store.materialized(platform).sort("seen_at", "player_id", descending=[True, False], nulls_last=True)
    return frame["player_id"].head(8).to_list()


def decided(service: Service, ask: Ask):
    found = online.decide(service, [ask])[0]
    if isinstance(found, Exception):
        raise found
    return found


def some_action(platform: Platform) -> dict[str, float]:
    return {name: float(low + 0.25 * (high - low)) for name, (low, high) in zip(platform.dimension_names, platform.bounds, strict=True)}


# ---- recommendations ---------------------------------------------------------------------------------------------------
def test_a_known_player_gets_a_scored_action_inside_its_bounds(service: Service, players: list[str]) -> None:
    platform = service.platform
    decision = decided(service, Ask(players=(players[0],)))[0]
    answer = online.answer(platform, decision)
    assert answer["degraded"] is None
    assert answer["policy"] == "fastq"
    assert answer["model_version"] == service.current().version
    assert answer["propensity"] > 0
    assert answer["value"] == pytest.approx(
        sum(answer["by_objective"][name] * w for name, w in zip(platform.objectives, platform.weights, strict=True)), rel=1e-9
    )
    for name, (low, high) in zip(platform.dimension_names, platform.bounds, strict=True):
        assert low <= answer["action"][name] <= high
    assert answer["decided_at"].endswith("Z")
    assert datetime.now(UTC) - datetime.fromisoformat(answer["decided_at"]) < timedelta(minutes=1)


def test_a_player_of_whom_nothing_is_known_gets_the_default_action_and_is_marked(service: Service) -> None:
    answer = online.answer(service.platform, decided(service, Ask(players=("nobody-yet",)))[0])
    assert answer["action"] == service.platform.default_action()
    assert (answer["value"], answer["by_objective"], answer["propensity"]) == (None, None, None)
    assert "unknown player" in answer["degraded"]
    assert answer["policy"] == "fastq"


def pushed(platform: Platform, player_id: str, **values: object) -> None:
    """Let the online store know a player by these columns alone."""
    row = store.materialized(platform).head(1)
    width = len(row["window"][0]) // platform.state.window
    frame = features.empty_frame(platform, pl.Series(["x"]), width, now_us() // features.microseconds(platform) - 1).with_columns(player_id=pl.lit(player_id))
    schema = features.online_schema(platform)
    frame = frame.with_columns(pl.lit(value).cast(schema[name]).alias(name) for name, value in values.items())
    store.push(store.open_store(platform), frame.select(list(schema)))


def test_a_player_of_whom_only_attributes_are_known_is_scored_and_marked(service: Service) -> None:
    platform = service.platform
    name = next(n for n, a in platform.state.attributes.items() if a.kind == "numeric")
    pushed(platform, "newcomer", **{name: 10.0})
    answer = online.answer(platform, decided(service, Ask(players=("newcomer",)))[0])
    assert answer["value"] is not None
    assert "cold start" in answer["degraded"]


def test_a_stale_player_is_scored_and_the_age_is_said(service: Service) -> None:
    platform = service.platform
    pushed(platform, "sleeper", seen_at=datetime.now(UTC) - 9 * platform.state.period)
    pushed(platform, "awake", seen_at=datetime.now(UTC) - 2 * platform.state.period)
    sleeper, awake = (online.answer(platform, d) for d in decided(service, Ask(players=("sleeper", "awake"))))
    assert "stale" in sleeper["degraded"]
    assert online._spoken(9 * platform.state.period) in sleeper["degraded"]
    assert sleeper["value"] is not None
    assert awake["degraded"] is None


def test_without_the_online_store_answers_are_degraded_and_come_back_with_it(service: Service, players: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "RETRY_SECONDS", 0.0)
    directory = Workspace(service.platform.root).feast
    assert decided(service, Ask(players=(players[0],)))[0].detail.get("degraded") is None
    directory.rename(directory.with_name("away"))
    answer = online.answer(service.platform, decided(service, Ask(players=(players[0],)))[0])
    assert "online store" in answer["degraded"]
    assert answer["action"] == service.platform.default_action()
    assert answer["value"] is None
    with pytest.raises(StoreUnavailable):
        online.explain_question(service, Question(player_id=players[0]))
    directory.with_name("away").rename(directory)
    assert decided(service, Ask(players=(players[0],)))[0].detail.get("degraded") is None


def test_without_exploration_the_best_action_is_given_each_time_and_has_no_propensity(service: Service, players: list[str]) -> None:
    first, second = (decided(service, Ask(players=(players[0],), explore=False))[0] for _ in range(2))
    assert first.action == second.action == first.detail["mean"]
    assert first.propensity is None
    noisy = {json.dumps(decided(service, Ask(players=(players[0],)))[0].action) for _ in range(3)}
    assert len(noisy) == 3


def test_limits_hold_for_the_policy_and_for_the_default_action(service: Service, players: list[str]) -> None:
    platform = service.platform
    name, low, high = platform.dimension_names[-1], *platform.bounds[-1]
    edge = float(low + 0.1 * (high - low))
    for decision in decided(service, Ask(players=(players[0], "nobody-yet"), limits={name: {"high": edge}})):
        assert low <= decision.action[name] <= edge
    one = decided(service, Ask(players=(players[0],), limits={name: {"low": edge, "high": edge}}))[0]
    assert one.action[name] == pytest.approx(edge)
    assert one.propensity is None
    for limits, says in [({name: {"high": float(low - 1)}}, name), ({"nothing": {"high": 1.0}}, "nothing")]:
        with pytest.raises(RequestError, match=says):
            decided(service, Ask(players=("nobody-yet",), limits=limits))


def test_one_wrong_request_of_a_batch_fails_alone(service: Service, players: list[str]) -> None:
    good, wrong, other = online.decide(
        service, [Ask(players=(players[0],)), Ask(players=(players[0],), limits={"nothing": {"high": 1.0}}), Ask(players=(players[1],), explore=False)]
    )
    assert isinstance(wrong, RequestError)
    assert good[0].player_id == players[0]
    assert other[0].player_id == players[1]


def test_a_decision_can_be_drawn_again_bit_for_bit_and_hardly_depends_on_who_else_asked(service: Service) -> None:
    everybody = store.materialized(service.platform)["player_id"].to_list()
    together = [d for some in (everybody, everybody[:20], everybody[:1]) for d in decided(service, Ask(players=tuple(some)))]
    assert len({d.detail["slot"][0] for d in together}) > 1, "batches of one size alone"
    service.log.append(together).result(10)
    for at in (0, 7, 70, len(together) - 1):
        decision = service.log.find(together[at].decision_id)
        again = online.replay(service, decision)
        assert dict(zip(service.platform.dimension_names, again.action[0].tolist(), strict=True)) == decision.action
        assert float(again.propensity[0]) == decision.propensity
        assert float(again.value[0]) == decision.detail["value"]
        policy = service.current().policy
        alone = policy.draw(policy.encode(features.unpack_states(service.platform, [decision.state])), explore=True, seeds=again.seeds)
        np.testing.assert_allclose(alone.action, again.action, rtol=1e-5)


def test_a_state_is_kept_bit_for_bit(service: Service, players: list[str]) -> None:
    reading = online.read_states(service, service.current(), players[:3], datetime.now(UTC))
    for row in range(3):
        back = features.unpack_states(service.platform, features.pack_states(reading.states)[row : row + 1])
        for name in ("history", "actions", "objectives"):
            np.testing.assert_array_equal(getattr(back, name)[0], getattr(reading.states, name)[row])
        assert {name: values[0] for name, values in back.attributes.items()} == {name: values[row] for name, values in reading.states.attributes.items()}
        assert list(back.policies) == [reading.states.policies[row]]


def test_what_was_served_and_reported_is_in_the_next_state(service: Service, players: list[str]) -> None:
    platform, player = service.platform, players[0]
    first = decided(service, Ask(players=(player,)))[0]
    before = online.read_states(service, service.current(), [player], datetime.now(UTC)).states
    service.log.append([first]).result(10)
    tomorrow = datetime.now(UTC) + platform.state.period
    rolled = online.read_states(service, service.current(), [player], tomorrow).states
    served = np.array([first.action[name] for name in platform.dimension_names], np.float32)
    assert not np.array_equal(before.actions[0, -1], served)
    assert any(np.array_equal(row, served) for row in rolled.actions[0, -2:])
    objective = next(iter(platform.objectives))
    service.log.report([Reported(first.decision_id, {objective: 0.625})]).result(10)
    later = datetime.now(UTC) + (1 + int(max(platform.known_after))) * platform.state.period
    assert 0.625 in online.read_states(service, service.current(), [player], later).states.objectives[0, :, 0]
    assert 0.625 not in online.read_states(service, service.current(), [player], datetime.now(UTC)).states.objectives[0, :, 0]  # not known yet


def test_new_activity_is_seen_by_the_next_recommendation_and_counted_once(service: Service) -> None:
    platform = service.platform
    measure = next(n for n, m in platform.state.measures.items() if m.aggregate == "sum")
    now = now_us()
    events = [Event("newcomer", now - 2_000_000 - k, {measure: 2.0}) for k in range(3)]
    assert "unknown" in decided(service, Ask(players=("newcomer",)))[0].detail["degraded"]
    service.log.record_activity(events).result(10)
    assert online.apply_activity(service) == 3
    assert online.apply_activity(service) == 0
    assert service.log.record_activity(events).result(10) == (0, 3)
    assert online.apply_activity(service) == 0
    reading = online.read_states(service, service.current(), ["newcomer"], datetime.now(UTC))
    assert reading.known == [True]
    assert np.nansum(reading.states.history[0, :, list(platform.state.measures).index(measure)]) == 6.0
    assert decided(service, Ask(players=("newcomer",)))[0].detail["value"] is not None


# ---- inline states ------------------------------------------------------------------------------------------------------
def inline(platform: Platform, **changes: object) -> InlineState:
    attributes = {name: 3.0 if a.kind == "numeric" else "never seen" for name, a in platform.state.attributes.items()}
    state = InlineState("inline", [[1.0] * len(platform.state.measures)] * platform.state.window, attributes)
    return replace(state, **changes)


def test_an_inline_state_is_the_policys_own_answer(service: Service) -> None:
    platform, policy = service.platform, service.current().policy
    decision = decided(service, Ask(states=(inline(platform),), explore=False))[0]
    attributes = pl.DataFrame({name: [3.0] if a.kind == "numeric" else ["never seen"] for name, a in platform.state.attributes.items()})
    own = policy.recommend(features.PlayerStates(np.ones((1, platform.state.window, len(platform.state.measures))), attributes), explore=False)
    assert decision.detail["value"] == pytest.approx(float(own.value[0]), rel=1e-12)
    assert decision.detail.get("degraded") is None
    assert decision.player_id == "inline"


def test_an_inline_state_of_the_wrong_shape_is_refused_by_name(service: Service) -> None:
    platform = service.platform
    numeric = next(n for n, a in platform.state.attributes.items() if a.kind == "numeric")
    cases = [
        ({"history": [[1.0, 2.0]]}, r"states\[0\]\.history.*window"),
        ({"history": [[1.0]] * platform.state.window}, r"states\[0\]\.history.*measures"),
        ({"attributes": {"nothing": 1.0}}, "nothing"),
        ({"attributes": {numeric: "many"}}, numeric),
        ({"actions": [[1.0]]}, r"states\[0\]\.actions"),
        ({"objectives": [[1.0]]}, r"states\[0\]\.objectives"),
        ({"policy": "nobody"}, "nobody"),
    ]
    for changes, says in cases:
        with pytest.raises(RequestError, match=says):
            decided(service, Ask(states=(inline(platform, **changes),)))


def test_an_inline_state_that_no_accepted_log_could_have_made_is_refused(service: Service) -> None:
    """What a log's row is quarantined for: a measure past its `min` or `max`, an action past its bounds. Rounding is forgiven, null says nothing."""
    platform = service.platform
    window, measures, dimensions = platform.state.window, list(platform.state.measures), platform.dimension_names
    high = platform.bounds[0, 1]

    def history(name: str, value: float | None) -> list[list[float | None]]:
        return [[1.0] * len(measures)] * (window - 1) + [[value if measure == name else 1.0 for measure in measures]]

    def actions(value: float) -> list[list[float | None]]:
        return [[None] * len(dimensions)] * (window - 1) + [[value, *map(float, platform.bounds[1:, 0])]]

    last = window - 1
    for changes, says in (
        ({"history": history("win_rate", 1.5)}, rf"states\[0\]\.history\[{last}\]: win_rate: expected at least 0 and at most 1 in a period, .* got 1\.5"),
        ({"history": history("win_rate", -0.1)}, "win_rate: expected at least 0"),
        ({"history": history("rating", 0.5)}, "rating: expected at least 1 and at most 5"),
        ({"history": history("games", -1.0)}, "games: expected at least 0 in a period"),
        ({"actions": actions(1.01 * high)}, rf"states\[0\]\.actions\[{last}\]: {dimensions[0]}: expected .* at most {high:g}"),
    ):
        with pytest.raises(RequestError, match=says):
            decided(service, Ask(states=(inline(platform, **changes),)))
    for changes in (
        {"history": history("games", 1e6)},
        {"history": history("rating", None)},
        {"history": history("win_rate", 1.0000001)},
        {"actions": actions(float(np.float32(high) * np.float32(1.0000001)))},
    ):
        assert decided(service, Ask(states=(inline(platform, **changes),)))


# ---- exceptions to the policy ----------------------------------------------------------------------------------------------
def test_the_holdout_is_a_fixed_share_that_gets_the_proposal_that_came_along(service: Service, players: list[str]) -> None:
    policy = service.platform.policies[0]
    serving = service.platform.serving.model_copy(update={"holdout": Holdout(share=0.3, policy=policy)})
    service.platform = service.platform.model_copy(update={"serving": serving})
    ids = [f"player-{k}" for k in range(2000)]
    held = [p for p in ids if assignment.held_out(service.platform, p)]
    assert 0.25 < len(held) / len(ids) < 0.35
    proposal = some_action(service.platform)
    with_one = decided(service, Ask(players=(held[0],), proposals={policy: proposal}))[0]
    assert (with_one.policy, with_one.action, with_one.model_version, with_one.propensity) == (policy, proposal, None, None)
    by_player = decided(service, Ask(players=(held[0],), proposals={policy: {held[0]: proposal}}))[0]
    assert by_player.action == proposal
    without = decided(service, Ask(players=(held[0],)))[0]
    assert (without.policy, without.action) == ("fastq", service.platform.default_action())  # never the label of a policy that did not choose
    free = decided(service, Ask(players=tuple(p for p in players if not assignment.held_out(service.platform, p))))
    assert all(d.policy == "fastq" and d.assignment == pytest.approx(0.7) for d in free)
    with pytest.raises(RequestError, match="proposals"):
        decided(service, Ask(players=(held[0],), proposals={policy: {held[0]: {"nothing": 1}}}))


def test_a_wrong_proposal_is_refused_whoever_it_is_for(service: Service, players: list[str]) -> None:
    policy, proposal = service.platform.policies[0], some_action(service.platform)
    name, (low, high) = service.platform.dimension_names[0], service.platform.bounds[0]
    assert service.platform.serving.holdout.share == 0
    ask = Ask(players=(players[0],), proposals={policy: proposal})
    assert decided(service, ask)[0].policy == "fastq"
    for proposals, says in (
        ({"retian": proposal}, "'retian' is no policy of this platform; expected"),
        ({policy: {**proposal, name: float(high) + 1}}, rf"proposals.{policy}.{name}: expected a number"),
        ({policy: {"p1": {**proposal, name: None}}}, rf"proposals.{policy}.p1.{name}: expected a number"),
        ({policy: {name: 1.0}}, rf"proposals.{policy}.{name}: expected an action"),
    ):
        with pytest.raises(RequestError, match=says):
            decided(service, replace(ask, proposals=proposals))
    middle = float(low + high) / 2
    limits = {name: {"low": middle}}
    assert decided(service, replace(ask, proposals={policy: {**proposal, name: middle}}, limits=limits))
    with pytest.raises(RequestError, match=rf"{name}: {low:g} lies outside of the request's limits, {middle:g} to {high:g}"):
        decided(service, replace(ask, proposals={policy: {**proposal, name: float(low)}}, limits=limits))


def test_an_alias_is_the_version_that_it_names_now(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(registry, "resolve", lambda _, name: asked.append(name) or service.current().version)
    for _ in range(2):
        assert service.policy_of("champion") is service.current().policy
    assert asked == ["champion", "champion"]  # what it named before is not what it names for ever


def test_excluded_players_get_the_default_action(platform: Platform, players: list[str]) -> None:
    (platform.root / "excluded.csv").write_text(f"player_id\n{players[0]}\n")
    platform = platform.model_copy(update={"serving": platform.serving.model_copy(update={"exclude": "excluded.csv"})})
    with online.open_service(platform) as service:
        out, still_in = decided(service, Ask(players=(players[0], players[1])))
    assert out.action == platform.default_action()
    assert "excluded" in out.detail["degraded"]
    assert "value" not in out.detail
    assert "value" in still_in.detail


def test_a_clock_that_jumps_harms_no_decision(service: Service, players: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        offset = timedelta(0)

        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + cls.offset

    monkeypatch.setattr(online, "datetime", Clock)
    ids = []
    for jump in (timedelta(0), timedelta(days=3), timedelta(hours=-5), timedelta(days=-400), timedelta(0)):
        Clock.offset = jump
        decisions = decided(service, Ask(players=tuple(players)))
        assert all(d.propensity > 0 and np.isfinite(d.detail["value"]) for d in decisions)
        service.log.append(decisions).result(10)
        ids += [d.decision_id for d in decisions]
    assert len(set(ids)) == service.log.counts()["decisions"] == 5 * len(players)
    kept = service.log.find(ids[-1])
    assert dict(zip(service.platform.dimension_names, online.replay(service, kept).action[0].tolist(), strict=True)) == kept.action


def under(service: Service, **serving: object) -> Platform:
    """The service's platform with other settings of `serving`, which it follows from now on."""
    tree = service.platform.model_dump(mode="json")
    tree["serving"] |= serving
    service.platform = platform_from_tree(tree, service.platform.root, "test")
    service.model = replace(service.model, policy=replace(service.model.policy, platform=service.platform))
    return service.platform


def test_a_pause_stops_every_decision_at_once_and_ends_as_fast(service: Service, players: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "PAUSE_SECONDS", 0.0)
    platform, policy = service.platform, service.platform.policies[1]
    assignment.pause(platform, policy, who="test")
    proposal = some_action(platform)
    proposed, plain = (decided(service, Ask(players=(players[0],), proposals=given))[0] for given in ({policy: proposal}, None))
    assert (proposed.policy, proposed.action, proposed.propensity, proposed.model_version) == (policy, proposal, None, None)
    assert (plain.policy, plain.action, plain.propensity) == ("fastq", platform.default_action(), None)
    assert "paused" in online.answer(platform, proposed)["degraded"] and policy in online.answer(platform, proposed)["degraded"]
    low = {platform.dimension_names[0]: {"high": float(platform.bounds[0, 0])}}
    assert decided(service, Ask(players=(players[0],), limits=low))[0].action[platform.dimension_names[0]] == platform.bounds[0, 0]
    Workspace(platform.root).paused.write_text("not JSON")  # somebody meant to pause
    assert "paused" in decided(service, Ask(players=(players[0],)))[0].detail["degraded"]
    assert assignment.resume(platform, who="test")
    assert decided(service, Ask(players=(players[0],)))[0].propensity > 0


def test_a_challenger_gets_its_share_or_only_watches(service: Service, players: list[str]) -> None:
    champion = service.current()
    rival = replace(champion, version="99", policy=replace(champion.policy, version="99"))
    platform = under(service, challenger={"share": 0.4}, holdout={"share": 0.2, "policy": service.platform.policies[0]})
    service.challenger = rival
    everybody = store.materialized(platform)["player_id"].to_list()
    found = {d.player_id: d for d in decided(service, Ask(players=tuple(everybody)))}
    for player, decision in found.items():
        if assignment.held_out(platform, player):
            assert decision.assignment == pytest.approx(0.2)
        else:
            challenged = assignment.challenged(platform, player)
            assert (decision.model_version, decision.assignment) == ("99" if challenged else champion.version, pytest.approx(0.32 if challenged else 0.48))
    assert {d.model_version for d in found.values() if d.propensity} == {"99", champion.version}
    service.log.append(list(found.values())).result(10)
    logged = records.read_served(platform)  # the contract's column, as training reads it
    assert dict(zip(logged["decision_id"], logged["assignment"], strict=True)) == {d.decision_id: d.assignment for d in found.values()}

    under(service, challenger={"share": 0.0, "shadow": True}, holdout={"share": 0.0})
    watched = decided(service, Ask(players=(players[0],)))[0]
    assert (watched.model_version, watched.assignment) == (champion.version, None)
    assert watched.detail["shadow"]["model_version"] == "99"
    assert watched.detail["shadow"]["action"] == pytest.approx(watched.action)  # the same model and seed
    assert "shadow" not in online.answer(service.platform, watched)


def test_a_frequency_cap_counts_what_a_model_decided(service: Service, players: list[str]) -> None:
    platform = under(service, frequency={"most": 2, "per": "1h"})
    for _ in range(2):
        one = decided(service, Ask(players=(players[0],)))
        assert one[0].propensity > 0
        service.log.append(one).result(10)
    for _ in range(2):
        capped = decided(service, Ask(players=(players[0], players[1])))
        assert (capped[0].action, capped[0].propensity) == (platform.default_action(), None)
        assert "frequency cap" in capped[0].detail["degraded"]
        assert capped[1].propensity > 0
        service.log.append(capped[:1]).result(10)  # a default action counts for nothing, or the cap would never end
    with pytest.raises(RequestError, match="once"):
        decided(service, Ask(players=(players[0], players[0])))


def test_a_budget_truncates_the_law_and_its_density_is_exact(service: Service, players: list[str]) -> None:
    player = players[0]
    name = service.platform.dimension_names[-1]
    low, high = service.platform.bounds[-1]
    platform = under(service, budgets={name: {"most": float(high)}}, exploration=0.3)
    given = 0.0
    for _ in range(12):
        decision = decided(service, Ask(players=(player,)))[0]
        left = float(high) - given
        assert low <= decision.action[name] <= max(left, low) + 1e-9
        if 0 < given < high - low:
            assert decision.detail["limits"][name]["high"] == pytest.approx(left)
            assert f"left of {name}" in decision.detail["degraded"]
            mean, action = (np.array([list(a.values())]) for a in (decision.detail["mean"], decision.action))
            density = service.current().policy.density(action, mean, {name: {"high": left}})
            if left - low <= LEAST * (high - low):  # floats are a grid there, and there is no density to tell
                assert decision.propensity is None and np.isnan(density[0])
            else:
                assert decision.propensity == pytest.approx(float(density[0]), rel=1e-9)
                wider = service.current().policy.density(action, mean, None)
                assert decision.propensity > float(wider[0])  # renormalised, not clipped
        service.log.append([decision]).result(10)
        again = online.replay(service, decision)
        assert dict(zip(platform.dimension_names, again.action[0].tolist(), strict=True)) == decision.action
        given += decision.action[name]
    assert given <= high + 1e-9


# ---- explanations --------------------------------------------------------------------------------------------------------
def test_a_past_decision_is_explained_as_it_was_decided(service: Service, players: list[str]) -> None:
    platform = service.platform
    decision = decided(service, Ask(players=(players[0],)))[0]
    service.log.append([decision]).result(10)
    measure = next(iter(platform.state.measures))
    service.log.record_activity([Event(players[0], now_us() - 1_000_000, {measure: 50.0})]).result(10)
    online.apply_activity(service)  # the player has moved on; the explanation must not
    why = online.explain_question(service, Question(decision_id=decision.decision_id, against=some_action(platform)))
    assert why["action"] == decision.action
    assert why["model_version"] == decision.model_version
    assert why["value"] == pytest.approx(decision.detail["value"], rel=1e-6)
    assert sum(p["value"] for p in why["parts"]) == pytest.approx(why["value"])
    assert why["contrast"]["action"] == pytest.approx(some_action(platform))
    assert online.explain_question(service, Question(decision_id=decision.decision_id)) == online.explain_question(
        service, Question(decision_id=decision.decision_id)
    )


def test_every_alternative_that_the_contract_names(service: Service, players: list[str]) -> None:
    platform, player = service.platform, players[0]
    decision = decided(service, Ask(players=(player,)))[0]
    service.log.append([decision]).result(10)
    version = service.current().version
    for against in (platform.policies[0], "logged", f"model:{version}", some_action(platform)):
        assert online.explain_question(service, Question(player_id=player, against=against))["contrast"]["against"] == against
    assert online.explain_question(service, Question(player_id=player, against="logged"))["contrast"]["action"] == pytest.approx(decision.action)
    assert online.explain_question(service, Question(player_id=player, against=f"model:{version}"))["contrast"]["difference"] == pytest.approx(0, abs=1e-9)
    assert online.explain_question(service, Question(player_id=player))["contrast"] is None
    assert online.explain_question(service, Question(player_id=player, weights={next(iter(platform.objectives)): 3.0}))["what_if"]["parts"]
    for nobody in ("nobody", "model:"):
        with pytest.raises(RequestError, match="against"):
            online.explain_question(service, Question(player_id=player, against=nobody))
    with pytest.raises(RequestError, match="weights"):
        online.explain_question(service, Question(player_id=player, weights={"nothing": 1.0}))
    with pytest.raises(UnknownPlayerError):
        online.explain_question(service, Question(player_id=player, against="model:99"))


def test_what_was_never_decided_or_seen_cannot_be_explained(service: Service) -> None:
    for question in (Question(decision_id="never"), Question(player_id="nobody-yet")):
        with pytest.raises(UnknownPlayerError):
            online.explain_question(service, question)


# ---- in the terminal -----------------------------------------------------------------------------------------------------
def test_recommend_and_explain_without_a_server(platform: Platform, players: list[str]) -> None:
    dry = online.recommend(platform, players[:1], dry_run=True)["recommendations"][0]
    real = online.recommend(platform, [players[0], "nobody-yet"])["recommendations"]
    assert [r["player_id"] for r in real] == [players[0], "nobody-yet"]
    with online.open_service(platform) as service:
        assert service.log.find(dry["decision_id"]) is None
        assert service.log.counts()["decisions"] == 2
    assert online.explain(platform, real[0]["decision_id"])["decision_id"] == real[0]["decision_id"]
    now = online.explain(platform, players[0], against=platform.policies[0])
    assert now["player_id"] == players[0]
    assert now["decision_id"] is None
    with pytest.raises(RequestError, match="at least one"):
        online.recommend(platform, [])


def test_without_a_champion_it_says_what_to_do(platform: Platform) -> None:
    shutil.rmtree(Workspace(platform.root).mlflow)
    with pytest.raises(BundleError, match="fastq retrain") as refused:
        online.recommend(platform, ["p1"])
    assert refused.value.exit_code == 1


def test_a_bundle_for_other_features_is_refused(platform: Platform) -> None:
    other = platform.model_copy(update={"state": platform.state.model_copy(update={"churn": 3, "window": platform.state.window + 1})})
    with pytest.raises(BundleError, match="other features"):
        online.load_model(other)


def test_exploration_is_todays_setting_not_the_bundles(platform: Platform) -> None:
    quiet = platform.model_copy(update={"serving": platform.serving.model_copy(update={"exploration": 0.0})})
    with online.open_service(quiet) as service:
        decision = decided(service, Ask(players=("nobody-yet", store.materialized(platform)["player_id"][0])))[1]
    assert decision.propensity is None
    assert decision.action == decision.detail["mean"]
