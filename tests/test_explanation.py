"""Explanations of small policies that were really trained: sums, reasons, attributions, evidence, and the words made of them."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastq import explanation, features, learner, windows, worlds
from fastq.errors import RequestError
from fastq.explanation import as_dict, decisive_reasons, explain, integrated_gradients, sentences
from fastq.features import PlayerStates
from fastq.platform import load_platform, platform_from_tree
from fastq.policy import Policy
from fastq.records import read_records
from fastq.report import explanation_figure

ITEMS = {"a": (1.0, "x"), "b": (2.0, "x"), "c": (3.0, "y"), "d": (4.0, "y"), "twin of d": (4.0, "y")}


def trained(platform) -> tuple[Policy, windows.Windows]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    records = read_records(platform)
    built = windows.build(platform, records, features.build_rows(platform, records))
    return learner.train(platform, built), built


@pytest.fixture(scope="session")
def arena(tmp_path_factory):
    """A policy of the simulated platform, hardly trained, and states it was not trained on and on."""
    directory = tmp_path_factory.mktemp("arena")
    platform = load_platform(worlds.write_logs(worlds.world(), directory, players=80, days=16, end=date(2026, 3, 1)))
    policy, built = trained(platform.model_copy(update={"training": platform.training.model_copy(update={"epochs": 2})}))
    rows = np.random.default_rng(0).permutation(len(built))[:60]
    return policy.with_version("3"), built.states(rows), built.action[rows]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A policy over a catalogue: one-step episodes, no activity, two items that are described the same."""
    directory = tmp_path_factory.mktemp("shelf")
    (directory / "logs").mkdir()
    rng, n = np.random.default_rng(0), 600
    likes = rng.choice(["x", "y"], n)
    policies = np.where(np.arange(n) % 2 == 0, "uniform", "cheap")
    laws = {"uniform": dict.fromkeys(ITEMS, 0.2), "cheap": dict(zip(ITEMS, [0.4, 0.3, 0.1, 0.1, 0.1], strict=True))}
    item = [str(rng.choice(list(ITEMS), p=list(laws[policy].values()))) for policy in policies]
    click = rng.random(n) < np.where([ITEMS[i][1] == like for i, like in zip(item, likes, strict=True)], 0.7, 0.1)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    ids, when = [f"p{i}" for i in range(n)], [start + timedelta(minutes=i) for i in range(n)]
    propensity = [laws[policy][i] for policy, i in zip(policies, item, strict=True)]
    decisions = {"decision_id": ids, "player_id": ids, "decided_at": when, "policy": policies, "propensity": propensity, "item_id": item, "click": click * 1.0}
    prices, kinds = zip(*ITEMS.values(), strict=True)
    tables = {"decisions": decisions, "players": {"player_id": ids, "likes": likes}, "items": {"item_id": list(ITEMS), "price": prices, "kind": kinds}}
    for name, table in tables.items():
        pl.DataFrame(table).write_parquet(directory / "logs" / f"{name}.parquet")
    tree = {
        "platform": "shelf", "logs": {name: f"logs/{name}.parquet" for name in tables},
        "state": {"period": "1d", "window": 2, "attributes": {"likes": {"kind": "categorical"}}}, "policies": ["uniform", "cheap"],
        "action": {"kind": "catalogue", "features": {"price": {"kind": "numeric"}, "kind": {"kind": "categorical"}}},
        "objectives": {"click": {"discount": 0}}, "training": {"epochs": 2},
    }  # fmt: skip
    policy, built = trained(platform_from_tree(tree, directory, "fastq.yaml"))
    return policy, built.states(np.arange(8))


@pytest.fixture(scope="session")
def why(arena):
    policy, states, _ = arena
    return explain(policy, states, against="retain", weights={"cost": -5.0})


# ---- reasons, by hand ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([[3, 0], [-2, 0]], [("a", "immediate")]),  # 3 > 2: one is enough
        ([[2, 1], [-2, 0]], [("a", "immediate"), ("a", "long_term")]),  # 2 is not more than 2
        ([[1, 2], [4, -5]], [("b", "immediate"), ("a", "long_term")]),  # largest first: 4 + 2 > 5, and 1 is not needed
        ([[1, 1], [1, -1.5]], [("a", "immediate"), ("a", "long_term")]),  # equal ones in the order of the file
        ([[0.5, 0], [0.25, 0]], [("a", "immediate")]),  # no drawback: the largest alone is more than nothing
        ([[1, 0], [-1, 0]], []),  # no difference
        ([[1, 0], [-2, 0]], []),  # a disadvantage
        ([[0, 0], [0, 0]], []),
        ([[0.1, 0.2], [0.3, -0.3]], [("b", "immediate"), ("a", "long_term")]),  # 0.3 is not more than 0.3, however floats add up
        ([[0.1, 0.2], [-0.3, 0]], [("a", "long_term"), ("a", "immediate")]),  # floats say 4e-17 is left: all reasons are needed, none is missing
    ],
)
def test_the_fewest_reasons_that_outweigh_every_drawback(differences, expected):
    assert decisive_reasons(np.array([differences], float), ["a", "b"]) == [expected]


def test_reasons_are_sufficient_and_minimal_whatever_the_numbers():
    rng = np.random.default_rng(0)
    differences = np.round(rng.normal(0, 1, (500, 3, 2)), 1) * 10.0 ** rng.integers(-4, 5, (500, 1, 1))
    for parts, reasons in zip(differences, decisive_reasons(differences, ["a", "b", "c"]), strict=True):
        advantages = {(name, horizon): parts[i, j] for i, name in enumerate("abc") for j, horizon in enumerate(explanation.HORIZONS)}
        loss = -sum(v for v in advantages.values() if v < 0)
        if sum(advantages.values()) <= 1e-9 * np.abs(parts).sum():
            continue
        assert sum(advantages[r] for r in reasons) > loss
        assert sum(sorted(advantages.values(), reverse=True)[: len(reasons) - 1]) <= loss * (1 + 1e-9)


# ---- sums and intervals -----------------------------------------------------------------------------------------------------
def test_parts_add_up_and_are_those_of_the_recommendation(arena, why):
    policy, states, _ = arena
    np.testing.assert_allclose(why.parts.sum((1, 2)), why.value, rtol=1e-12)
    best = policy.recommend(states, explore=False)
    np.testing.assert_array_equal(why.action, best.action)
    np.testing.assert_allclose(why.value, best.value, rtol=1e-9)
    np.testing.assert_allclose(why.parts.sum(2), best.by_objective * policy.platform.weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(why.score["value"] - why.score["caution"] - why.score["guardrail"], why.score["total"], rtol=1e-12)
    np.testing.assert_allclose(why.score["value"], why.value, rtol=1e-9)


def test_a_contrast_is_the_difference_of_two_explanations(arena, why):
    policy, states, _ = arena
    other = explain(policy, states, actions=why.contrast.action, attributions=False)
    np.testing.assert_allclose(why.contrast.difference, why.value - other.value, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(why.contrast.parts, why.parts - other.parts, atol=1e-9)
    assert (np.abs(why.contrast.difference) > 1e-6).any()
    assert any(why.contrast.decisive)


def test_intervals_hold_their_estimate_and_have_width(why):
    for estimate, low, high in ((why.value, why.low, why.high), (why.contrast.difference, why.contrast.low, why.contrast.high)):
        assert (low <= estimate).all()
        assert (estimate <= high).all()
        assert (high - low > 0).mean() > 0.9
        assert np.isfinite(high - low).all()


def test_an_action_against_itself_makes_no_difference(arena):
    policy, states, _ = arena
    best = policy.best(policy.encode(states))
    same = explain(policy, states, against=best, attributions=False).contrast
    assert not same.difference.any()
    assert not (same.high - same.low).any()
    assert same.decisive == [[]] * len(states)


def test_what_if_is_best_under_its_weights_while_all_else_keeps_the_platforms(arena, why):
    policy, states, _ = arena
    plain = explain(policy, states, against="retain", attributions=False)
    np.testing.assert_array_equal(plain.value, why.value)
    np.testing.assert_array_equal(plain.contrast.parts, why.contrast.parts)
    assert plain.what_if is None
    np.testing.assert_allclose(why.what_if.parts.sum((1, 2)), why.what_if.value, rtol=1e-12)
    cost = list(policy.platform.objectives).index("cost")
    there = explain(policy, states, actions=why.what_if.action, attributions=False)
    np.testing.assert_allclose(why.what_if.parts[:, cost], there.parts[:, cost] * -5.0 / policy.platform.weights[cost], rtol=1e-7, atol=1e-12)
    reweighed = why.parts.sum(2) @ np.where(np.arange(5) == cost, -5.0 / policy.platform.weights[cost], 1.0)
    assert why.what_if.value.mean() > reweighed.mean()  # better under those weights than what is best under the platform's


# ---- alternatives -----------------------------------------------------------------------------------------------------------
def test_alternatives_of_every_kind(arena):
    policy, states, logged = arena
    names = policy.platform.dimension_names
    expert = explain(policy, states, against="retain", attributions=False).contrast
    np.testing.assert_array_equal(expert.action, policy.expert_actions(policy.encode(states))[:, policy.policies.index("retain")])
    typed = explain(policy, states, against=dict(zip(reversed(names), (1, 20.0, 6), strict=True)), attributions=False).contrast
    assert typed.action.tolist() == [[6.0, 20.0, 1.0]] * len(states)
    assert typed.against is None
    pair = explain(policy, states, against=("logged", logged), attributions=False).contrast
    bare = explain(policy, states, against=logged, attributions=False).contrast
    assert pair.against == "logged"
    np.testing.assert_array_equal(pair.difference, bare.difference)
    model = explain(policy, states, against=policy, attributions=False).contrast
    assert model.against == "model:3"
    assert not model.difference.any()


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ({"against": "nobody"}, r"'nobody' is not known; expected one of .*retain.*target_games"),
        ({"against": "logged"}, r"'logged' needs the actions themselves"),
        ({"against": {"target_games": 5}}, r"expected exactly target_games, bonus, nudges, got target_games"),
        ({"against": {"target_games": 5, "bonus": 2, "nudges": 1, "extra": 1}}, r"expected exactly"),
        ({"against": {"target_games": 5, "bonus": 1e9, "nudges": 1}}, r"against\.bonus: expected a number between 0 and .*, got 1e\+09"),
        ({"against": {"target_games": "5", "bonus": 2, "nudges": 1}}, r"against\.target_games: expected a number, got '5'"),
        ({"against": {"target_games": True, "bonus": 2, "nudges": 1}}, r"against\.target_games: expected a number, got True"),
        ({"against": {"target_games": float("nan"), "bonus": 2, "nudges": 1}}, r"against: expected finite numbers"),
        ({"against": np.zeros((2, 3))}, r"against: expected the shape \[1 players, 3 action dimensions\]; got \[2, 3\]"),
        ({"actions": [["a", "b", "c"]]}, r"actions: expected numbers of the shape"),
        ({"weights": {"joy": 1}}, r"weights: 'joy' is no objective; expected .*cost"),
        ({"weights": {"cost": float("inf")}}, r"weights\.cost: expected a finite number"),
    ],
)
def test_a_mistake_is_named(arena, question, says):
    policy, states, _ = arena
    with pytest.raises(RequestError, match=says):
        explain(policy, first(states), attributions=False, **question)


def first(states: PlayerStates, n: int = 1) -> PlayerStates:
    return PlayerStates(states.history[:n], states.attributes[:n], states.actions[:n], states.objectives[:n], states.policies[:n])


# ---- attributions -----------------------------------------------------------------------------------------------------------
def test_attributions_add_up_over_measures_and_over_periods(arena, why):
    policy, states, _ = arena
    moved = why.attributions
    enc = policy.encode(states)
    enc_nothing = type(enc)(torch.zeros_like(enc.x), enc.v, enc.branch)
    action = torch.from_numpy(why.action)
    movement = (policy.value(enc, action) - policy.value(enc_nothing, action)).detach().numpy()
    assert moved.periods.shape == (len(states), policy.platform.state.window)
    for total in (sum(moved.measures.values()), moved.periods.sum(1)):
        np.testing.assert_allclose(total + moved.completeness_gap, movement, atol=1e-5 * np.abs(why.value).max())  # two float32 passes
    assert np.abs(movement).max() > 0
    assert (np.abs(moved.completeness_gap) <= 0.02 * np.abs(movement) + 0.002 * np.abs(why.value) + 1e-6).all()
    dimensions, objectives = policy.platform.dimension_names, list(policy.platform.objectives)
    assert list(moved.measures) == [*policy.platform.state.measures, *(f"previous {name}" for name in [*dimensions, *objectives])]


def test_one_range_of_points_would_not_add_up(arena, monkeypatch):
    """Why the path is cut: the same points spread once over it leave out what appears near its start."""
    policy, states, _ = arena
    enc, action = policy.encode(states), policy.best(policy.encode(states))
    cells, movement = integrated_gradients(policy, enc, action)
    monkeypatch.setattr(explanation, "EDGES", (0.0, 1.0))
    monkeypatch.setattr(explanation, "ROUNDS", 1)
    once, _ = integrated_gradients(policy, enc, action)
    assert np.abs(movement - cells.sum((1, 2))).mean() < 0.1 * np.abs(movement - once.sum((1, 2))).mean()


def test_what_is_not_known_is_given_no_part(arena):
    policy, states, _ = arena
    history = states.history[:5].copy()
    history[:, :-2] = np.nan
    history[:, :, 1] = np.nan
    quiet = explain(policy, PlayerStates(history, states.attributes[:5]))
    assert not quiet.attributions.periods[:, :-2].any()
    assert not quiet.attributions.measures[list(policy.platform.state.measures)[1]].any()
    assert not quiet.attributions.measures["previous bonus"].any()
    empty = explain(policy, PlayerStates(np.full_like(history, np.nan), states.attributes[:5]))
    assert not empty.attributions.periods.any()
    assert not empty.attributions.completeness_gap.any()


# ---- evidence -----------------------------------------------------------------------------------------------------------------
def test_a_logged_state_is_its_own_nearest_decision(arena):
    policy, _, _ = arena
    positions, distance = explanation._nearest(policy, policy.reference.embedding[[4, 9]])
    assert positions[:, 0].tolist() == [4, 9]
    np.testing.assert_allclose(distance[:, 0], 0, atol=1e-2)
    assert (np.diff(distance, axis=1) >= 0).all()


def test_the_evidence_is_thin_where_the_logs_share_too_few_states(arena):
    policy, states, _ = arena
    pair = {"policy": "stretch", "against": "retain", "answerable": False, "sentence": "retain acts in 12% of the states in which stretch does"}
    separate = replace(policy, details=policy.details | {"overlap": [pair, pair | {"policy": "spend", "answerable": True}]})
    acted = ["stretch", "spend"] * (len(states) // 2)
    states = replace(states, policies=acted)
    verdicts = explain(separate, states, against="retain", attributions=False).evidence.verdict
    assert [pair["sentence"] in verdict for verdict in verdicts] == [name == "stretch" for name in acted]
    assert all(verdict.startswith("thin: retain acts") for verdict in verdicts[::2])
    for untouched in (explain(separate, states, against="spend", attributions=False), explain(separate, states, attributions=False)):
        assert not any(pair["sentence"] in verdict for verdict in untouched.evidence.verdict)


def test_the_verdict_follows_the_numbers(arena):
    policy, states, _ = arena
    usual = explain(policy, states, attributions=False).evidence
    assert usual.verdict.count("well supported") > len(states) / 2
    for distance, verdict in zip(usual.distance, usual.verdict, strict=True):
        assert ("the nearest logged decisions are" in verdict) == (distance.mean() > explanation.FAR_STATE)
    extreme = explain(policy, states, actions=np.tile(policy.platform.bounds[:, 1], (len(states), 1)), attributions=False).evidence
    assert all("the action lies " in verdict for verdict in extreme.verdict)
    for k in (0.001, 0.2, 0.6):
        best = policy.best(policy.encode(states))
        other = best + k * (policy.platform.bounds[:, 1] - best)
        why = explain(policy, states, against=other, attributions=False)
        unknown = (why.contrast.high - why.contrast.difference) / (explanation.CERTAINTY * policy.stake(policy.platform.weights))
        for much, verdict, grade in zip(unknown, why.evidence.verdict, why.evidence.grade, strict=True):
            assert ("is known only to" in verdict) == (much > 1)
            assert (grade in {"thin", "very thin"}) == verdict.startswith("thin: ")  # the grade and the verdict never contradict each other
            assert (grade == "very thin") == (much > explanation.GRADES["thin"])
        assert as_dict(why)["evidence"]["grade"] == why.evidence.grade[0]
        assert np.isfinite(unknown).all()
    assert (unknown > 1).all()  # most of the way to the bounds
    assert list(explanation.GRADES.values()) == sorted(explanation.GRADES.values())
    assert explanation.grades(np.array([0.2, 0.2, 1.0, 9.0, np.nan, np.nan]), [False, True, False, True, False, True]) == [
        "ample", "thin", "fair", "very thin", "fair", "thin"
    ]  # fmt: skip
    assert "smaller than its doubt" not in str(why.evidence.verdict)  # a small difference is no sign of a large error


def test_an_interval_widens_with_the_distance_of_the_actions(arena):
    """Beyond what the effects' own doubt says: people who look alike respond differently, and the more so the further an action goes, to an end."""
    policy, states, _ = arena
    own = policy.details["own_response"]
    assert min(own["share"]) > 0
    older = replace(policy, details=policy.details | {"own_response": own | {"share": own["share"][0]}})  # one share for all dimensions
    alike = replace(policy, details=policy.details | {"own_response": own | {"share": own["share"][:1] * len(own["share"])}})
    before = replace(policy, details={"reach": policy.details["reach"]})  # the same reach, so that the same is recommended
    best = policy.best(policy.encode(states))
    halves = []
    for k in (0.1, 0.3, 0.9):
        other = best + k * (policy.platform.bounds[:, 1] - best)
        now, then = (explain(p, states, against=other, attributions=False) for p in (policy, before))
        half, narrow = (why.contrast.high - why.contrast.difference for why in (now, then))
        apart = np.square(policy.units.standard(best) - policy.units.standard(other)) @ np.array(own["share"])
        unexplained = policy.platform.weights @ np.array(own["covariance"]) @ policy.platform.weights
        variance = unexplained * (1 - np.exp(-apart * own["horizon"])) / own["horizon"]
        np.testing.assert_allclose(half**2 - narrow**2, explanation.CERTAINTY**2 * variance, rtol=1e-6)
        assert (variance < unexplained * np.minimum(apart, 1 / own["horizon"])).all()
        assert policy.stake(policy.platform.weights) == pytest.approx(np.sqrt(unexplained / own["horizon"]))
        one, same = (explain(p, states, against=other, attributions=False).contrast for p in (older, alike))
        np.testing.assert_array_equal(one.high, same.high)
        np.testing.assert_array_equal(now.contrast.difference, then.contrast.difference)
        np.testing.assert_allclose(now.evidence.width, half / (explanation.CERTAINTY * own["usual"]), rtol=1e-12)
        assert np.isnan(then.evidence.width).all()  # a bundle from before it was measured is explained without it
        assert as_dict(then)["evidence"]["width"] is None
        halves.append(half)
    assert (halves[0] < halves[1]).all()
    assert (halves[1] < halves[2]).all()


def test_policies_are_those_that_act_in_such_states(arena, why):
    policy, states, _ = arena
    probability = policy.policy_probability(policy.encode(states))
    assert why.evidence.policies == [[name for name, p in zip(policy.policies, row, strict=True) if p >= 0.05] for row in probability]


# ---- answers ------------------------------------------------------------------------------------------------------------------
def test_the_answer_is_strict_json_with_the_contracts_keys(why):
    answer = as_dict(why, 2, decision_id="d1", player_id="p1")
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    said = "decision_id player_id model_version action value low high score parts contrast what_if attributions evidence"
    assert set(answer) == {*said.split(), "units"}
    assert (answer["decision_id"], answer["player_id"], answer["model_version"]) == ("d1", "p1", "3")
    platform = why.policy.platform
    assert [(p["objective"], p["horizon"]) for p in answer["parts"]] == [(o, h) for o in platform.objectives for h in ("immediate", "long_term")]
    assert sum(p["value"] for p in answer["parts"]) == pytest.approx(answer["value"], rel=1e-12)
    assert sum(p["value"] for p in answer["contrast"]["parts"]) == pytest.approx(answer["contrast"]["difference"], rel=1e-9, abs=1e-12)
    assert sum(p["value"] for p in answer["what_if"]["parts"]) == pytest.approx(answer["what_if"]["value"], rel=1e-12)
    assert answer["contrast"]["against"] == "retain"
    assert answer["contrast"]["decisive"] == [list(reason) for reason in why.contrast.decisive[2]]
    assert len(answer["attributions"]["periods"]) == platform.state.window
    assert len(answer["evidence"]["nearest"]) == 5
    assert set(answer["evidence"]["nearest"][0]) == {"decision_id", "policy", "action", "distance"}
    assert set(answer["evidence"]["nearest"][0]["action"]) == set(platform.dimension_names)


def test_what_was_found_out_about_states_is_not_worked_out_again(arena, monkeypatch):
    policy, states, _ = arena
    alone, first_asked = (explain(policy, states, against=against, attributions=False) for against in ("retain", None))
    monkeypatch.setattr(explanation, "_nearest", lambda *_: pytest.fail("worked out again"))
    then = explain(policy, states, against="retain", attributions=False, beside=first_asked)
    assert [as_dict(then, i) for i in range(len(states))] == [as_dict(alone, i) for i in range(len(states))]


def test_without_questions_their_answers_are_null(arena):
    policy, states, _ = arena
    answer = as_dict(explain(policy, first(states), attributions=False), against="ignored")
    assert answer["contrast"] is None
    assert answer["what_if"] is None
    given = as_dict(explain(policy, first(states), against={"target_games": 5, "bonus": 2, "nudges": 1}, attributions=False))
    assert given["contrast"]["against"] == given["contrast"]["action"] == {"target_games": 5.0, "bonus": 2.0, "nudges": 1.0}


def test_sentences_say_only_numbers_of_the_answer(why):
    for i in range(len(why)):
        answer = as_dict(why, i)
        said = sentences(answer)
        assert 2 <= len(said) <= 4
        known = {explanation._number(n) for n in numbers_in(answer)} | {explanation._number(abs(n)) for n in numbers_in(answer)} | {"90"}
        words = " ".join(said).replace(answer["evidence"]["verdict"], "")
        assert set(re.findall(r"-?\d[\d,.]*(?:e-\d+)?(?<![,.])", words)) <= known, words
        assert ("more in weighted" in said[0]) == (answer["contrast"]["difference"] > 0)
        assert ("outweigh" in said[1] or "Nothing speaks against" in said[1]) == bool(answer["contrast"]["decisive"])
        assert ("may also" in said[0]) == (answer["contrast"]["low"] < 0 < answer["contrast"]["high"])


def numbers_in(tree) -> list[float]:
    if isinstance(tree, dict | list):
        return [n for branch in (tree.values() if isinstance(tree, dict) else tree) for n in numbers_in(branch)]
    return [tree] if isinstance(tree, int | float) and not isinstance(tree, bool) else []


def test_sentences_by_hand():
    parts = [{"objective": "returns", "horizon": "long_term", "value": 0.2}, {"objective": "cost", "horizon": "immediate", "value": -0.08}]
    contrast = {
        "against": "retain", "action": {"goal": 5.0, "bonus": 12.0}, "difference": 0.12, "low": 0.03, "high": 0.2,
        "parts": parts, "decisive": [["returns", "long_term"]],
    }  # fmt: skip
    answer = {
        "action": {"goal": 7.2, "bonus": 6.0}, "units": {"goal": "games", "bonus": "INR"}, "value": 1.07, "low": 0.8, "high": 1.3,
        "parts": parts, "contrast": contrast, "what_if": None, "evidence": {"policies": ["stretch", "retain"], "verdict": "well supported"},
    }  # fmt: skip
    assert sentences(answer) == [
        (
            "goal 7.2 games and bonus 6 INR instead of what retain would give, goal 5 games and bonus 12 INR: "
            "expected to bring 0.12 more in weighted objectives (90 % interval 0.03 to 0.2)."
        ),
        "returns later (+0.2) alone outweighs every drawback, of which cost now (-0.08) is the largest.",
        "It is well supported: stretch and retain acted in such states.",
    ]
    worse = sentences({**answer, "contrast": {**contrast, "against": "model:2", "difference": -0.004, "low": -0.01, "high": 0.002, "decisive": []}})
    assert "what model 2 would give" in worse[0]
    assert "0.004 less" in worse[0]
    assert "so it may also bring more" in worse[0]
    assert worse[1] == "What speaks against it weighs as much or more, most of all cost now (-0.08)."
    alone = sentences({**answer, "contrast": None, "units": {}, "evidence": {"policies": [], "verdict": "thin: nobody did this"}})
    assert alone[0] == "With goal 7.2 and bonus 6 the weighted objectives are expected to add up to 1.07 from now on (90 % interval 0.8 to 1.3)."
    assert alone[1] == "Of this, returns later (+0.2) brings the most and cost now (-0.08) takes the most."
    assert alone[2] == "The evidence is thin: nobody did this."


def test_the_picture_adds_up(why, tmp_path):
    answer = as_dict(why, 0, player_id="$p_1$")
    figure = explanation_figure(answer, tmp_path / "why.svg")
    assert "<svg" in (tmp_path / "why.svg").read_text()
    for axes, estimate, total in zip(figure.axes, (answer, answer["contrast"]), ("value", "difference"), strict=True):
        *bars, last = axes.patches
        assert [bar.get_width() for bar in bars] == pytest.approx([part["value"] for part in estimate["parts"]])
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(last.get_width()) == pytest.approx(estimate[total])
    assert len(explanation_figure({**answer, "contrast": None}).axes) == 1


# ---- catalogues ---------------------------------------------------------------------------------------------------------------
def test_items_are_explained_by_their_ids(shelf):
    policy, states = shelf
    n = len(states)
    best = explain(policy, states, against="cheap")
    assert set(best.action) <= set(ITEMS)
    np.testing.assert_allclose(best.parts.sum((1, 2)), best.value, rtol=1e-12)
    given = explain(policy, states, actions=["twin of d"] * n, against={"item_id": "a"}, weights={"click": 2.0}, attributions=False)
    assert given.action.tolist() == ["twin of d"] * n  # not the other item that is described the same
    answer = as_dict(given, 1)
    json.dumps(answer, allow_nan=False)
    assert answer["action"] == {"item_id": "twin of d"}
    assert answer["contrast"]["against"] == {"item_id": "a"}
    assert answer["what_if"]["value"] == pytest.approx(2 * best.value[1], rel=1e-6)
    assert all(set(near["action"]) == {"item_id"} and near["action"]["item_id"] in ITEMS for near in answer["evidence"]["nearest"])
    assert sentences(answer)[0].startswith("item twin of d instead of item a: ")
    np.testing.assert_array_equal(explain(policy, states, actions=policy.as_actions(["d"] * n), attributions=False).value, given.value)
    assert as_dict(best)["attributions"]["measures"].keys() == {"previous item", "previous click"}
    with pytest.raises(RequestError, match="'z' is not in the catalogue"):
        explain(policy, states, against={"item_id": "z"})
    with pytest.raises(RequestError, match="expected exactly item_id, got price"):
        explain(policy, states, against={"price": 1})


# ---- the sentence above everything -------------------------------------------------------------------------------------------
OBJECTIVES = {"joy": 1.0, "cost": -1.0, "trust": 0.5}
CLAIM = re.compile(r"\b(more|less) (joy|cost|trust) (now|later)( and (?:now|later))?")
WON_BACK = re.compile(r"what it (loses in|adds to) (joy|cost|trust) now it (wins back|saves) later")


def contrasted(values: list[float], low: float = 0.1, high: float = 0.1, verdict: str = "well supported") -> dict:
    """An answer of which only the contrast's parts matter, [objective][now, later] in one list."""
    parts = [
        {"objective": name, "horizon": horizon, "value": value}
        for (name, horizon), value in zip([(n, h) for n in OBJECTIVES for h in explanation.HORIZONS], values, strict=True)
    ]
    difference = float(np.sum(values))
    decisive = decisive_reasons(np.array(values).reshape(1, len(OBJECTIVES), 2), list(OBJECTIVES))[0]
    contrast = {
        "against": "retain", "action": {"games": 5.0, "gift": 12.0}, "difference": difference, "low": difference - low, "high": difference + high,
        "parts": parts, "decisive": [list(reason) for reason in decisive],
    }  # fmt: skip
    evidence = {"policies": ["retain"], "verdict": verdict}
    return {"action": {"games": 7.0, "gift": 6.0}, "units": {"games": "games", "gift": "INR"}, "contrast": contrast, "evidence": evidence}


@given(st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=6, max_size=6), st.floats(0, 1), st.sampled_from(["well supported", "thin: so"]))
def test_the_headline_never_contradicts_the_numbers(values: list[float], doubt: float, verdict: str) -> None:
    answer = contrasted(values, doubt, doubt, verdict)
    said, contrast = explanation.headline(answer, OBJECTIVES), answer["contrast"]
    parts = {(p["objective"], p["horizon"]): p["value"] for p in contrast["parts"]}
    assert said.startswith("7 games and 6 INR instead of what retain would give, 5 and 12: ")
    for how, objective, first, second in CLAIM.findall(said):
        for when in (first, second.removeprefix(" and ")):
            if when:
                moved = parts[objective, "immediate" if when == "now" else "long_term"] * OBJECTIVES[objective]
                assert (moved > 0) == (how == "more"), said
                assert moved != 0, said
    for gives, objective, takes in WON_BACK.findall(said):
        now, later = parts[objective, "immediate"], parts[objective, "long_term"]
        assert now < 0 < -now < later, said
        assert (gives, takes) == (("loses in", "wins back") if OBJECTIVES[objective] > 0 else ("adds to", "saves"))
    assert ("in all" in said) == (contrast["difference"] != 0)
    if contrast["difference"]:
        assert re.search(r"in all it is worth \S+ (more|less)", said).group(1) == ("more" if contrast["difference"] > 0 else "less")
    unclear = contrast["low"] < 0 < contrast["high"]
    assert ("not certain" in said) == (contrast["difference"] != 0 and unclear)
    assert ("as far as the data tell" in said) == (contrast["difference"] != 0 and unclear and verdict == "well supported")
    assert ("as far as so few data tell" in said) == (contrast["difference"] != 0 and verdict != "well supported")


def test_a_headline_without_an_alternative_says_where_evidence_is_thin() -> None:
    answer = contrasted([0.1] * 6) | {"contrast": None, "value": 1.0, "low": 0.5, "high": 1.5}
    assert explanation.headline(answer, OBJECTIVES) == "7 games and 6 INR: expected to be worth 1 from now on, 90 % interval 0.5 to 1.5."
    thin = answer | {"evidence": {"policies": [], "verdict": "thin: nobody did this"}}
    assert explanation.headline(thin, OBJECTIVES).endswith("0.5 to 1.5, though few data stand behind it.")


def test_the_headline_of_the_house_example() -> None:
    said = explanation.headline(contrasted([-0.1, 0.3, 0.2, 0.0, 0.0, -0.02]), OBJECTIVES)
    assert said.startswith("7 games and 6 INR instead of what retain would give, 5 and 12: what it loses in joy now it wins back later")
    assert explanation.headline(contrasted([0.0, 0.0, 0.2, 0.0, 0.0, 0.0]), OBJECTIVES).startswith(
        "7 games and 6 INR instead of what retain would give, 5 and 12: it means less cost now; in all it is worth 0.2 more, 90 % interval 0.1 to 0.3."
    )
    unsure = explanation.headline(contrasted([0.0, 0.0, 0.2, 0.0, 0.0, 0.0], 0.5), OBJECTIVES)
    assert (
        "12: as far as the data tell, it means less cost now; in all it is worth 0.2 more, 90 % interval -0.3 to 0.3, so it is not certain which is better."
        in unsure
    )
    against = explanation.headline(contrasted([-0.3, 0.1, 0.0, 0.0, 0.0, 0.0]), OBJECTIVES)
    assert "it means less joy now, which more joy later does not make up for; in all it is worth 0.2 less" in against


def test_an_imagined_action_adds_up_under_both_weights(arena) -> None:
    policy, states, _ = arena
    one = PlayerStates(
        *(None if part is None else part[:1] for part in (states.history, states.attributes, states.actions, states.objectives, states.policies))
    )
    recommended = explain(policy, one, attributions=False).action
    imagined = np.array([[(low + high) / 2 for low, high in policy.platform.bounds]])
    weights = {"cost": -3.0}
    found = explanation.imagine(policy, one, recommended, imagined, weights)
    assert found.values["imagined"][1] - found.values["recommended"][1] == pytest.approx(found.difference, abs=1e-9)
    assert found.parts.sum() == pytest.approx(found.difference, abs=1e-12)
    assert found.low <= found.difference <= found.high
    usual = explanation.imagine(policy, one, recommended, imagined, {})
    contrast = explain(policy, one, actions=imagined, against=recommended, attributions=False).contrast
    assert (usual.difference, usual.low, usual.high) == pytest.approx((contrast.difference[0], contrast.low[0], contrast.high[0]))
    assert usual.values["recommended"][0] == pytest.approx(usual.values["recommended"][1])
    with pytest.raises(RequestError, match="fun"):
        explanation.imagine(policy, one, recommended, imagined, {"fun": 1.0})
