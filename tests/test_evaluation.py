"""The held-out report and the gate: who is judged, by which weights, and what makes a candidate pass or fail."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import truncnorm

from fastq import evaluation, features, learner, ope, windows
from fastq.errors import TrainingError
from fastq.platform import OWN_POLICY, platform_from_tree
from fastq.records import Counts, Records

BEST, CENTRES, NOISE, HIGH = {"yes": 6.0, "no": 9.0}, np.array([5.0, 10.0]), 2.5, 15.0
COST = 0.1


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def shop(ids, days=10, seed=0):
    """One-step decisions whose truth is a formula: gain is -((size - best) / 4)^2, cost is size / 15. Both policies are noisy around 5 and 10.

    Their laws are truncated normals, logged exactly, the other policy's among the proposals.
    """
    rng = np.random.default_rng(seed)
    n = len(ids) * days
    player, day = np.repeat(np.arange(len(ids)), days), np.tile(np.arange(days), len(ids))
    calm = np.array(["no" if i % 3 == 0 else "yes" for i in range(len(ids))])
    which = rng.integers(0, 2, n)
    laws = [truncnorm((0 - c) / NOISE, (HIGH - c) / NOISE, c, NOISE) for c in CENTRES]
    drawn = np.stack([law.rvs(n, random_state=rng) for law in laws], 1)
    size, not_executed = drawn[np.arange(n), which], drawn[np.arange(n), 1 - which]
    best = np.array([BEST[c] for c in calm])[player]
    density = np.stack([law.pdf(size) for law in laws], 1)
    start = datetime(2026, 1, 1, 6, tzinfo=UTC)
    names, decision = np.array(["low", "high"]), [f"d{i}" for i in range(n)]
    decisions = pl.DataFrame({
        "decision_id": decision, "player_id": np.array(ids)[player], "decided_at": [start + timedelta(days=int(d)) for d in day], "policy": names[which],
        "propensity": density[np.arange(n), which], "assignment": np.full(n, 0.5), "model_version": pl.Series([None] * n, dtype=pl.String),
        "size": size, "gain": -(((size - best) / 4) ** 2) + rng.normal(0, 0.3, n), "cost": size / HIGH + rng.normal(0, 0.05, n),
    })  # fmt: skip
    proposals = pl.DataFrame({
        "decision_id": decision, "policy": names[1 - which], "size": not_executed,
        "propensity": density[np.arange(n), 1 - which], "assignment": np.full(n, 0.5),
    })  # fmt: skip
    attributes = pl.DataFrame({"player_id": ids, "valid_from": pl.Series([None] * len(ids), dtype=pl.Datetime("us", "UTC")), "calm": calm})
    tree = {
        "platform": "shop", "logs": {"decisions": "d.parquet", "players": "p.parquet"}, "state": {"window": 3, "attributes": {"calm": {"kind": "categorical"}}},
        "policies": ["low", "high"], "action": {"kind": "continuous", "dimensions": {"size": {"low": 0, "high": HIGH}}},
        "objectives": {"gain": {"weight": 1.0, "discount": 0}, "cost": {"weight": -COST, "discount": 0}}, "training": {"epochs": 10, "batch_size": 256},
    }  # fmt: skip
    platform = platform_from_tree(tree, Path(), "test")
    read = Records(decisions, None, attributes, proposals, None, pl.DataFrame(), {"decisions": Counts(n, 0, 0)}, {}, [])
    return platform, windows.build(platform, read, features.build_rows(platform, read))


@pytest.fixture(scope="module")
def known():
    """A platform with a known truth, what was learned from it, and the report on it."""
    platform, data = shop([f"p{i:04d}" for i in range(600)])
    candidate = learner.train(platform, data)
    return data, candidate, evaluation.evaluate(candidate, data)


@pytest.fixture(scope="module")
def report(policy, data):
    return evaluation.evaluate(policy, data)


def truth(law, calm):
    """Expected weighted sum [N] of a law of `size` for players of these kinds: the formula of `shop`, no sample."""
    mean, variance = law.mean(), law.var()
    best = np.array([BEST[c] for c in calm])
    return -((mean - best) ** 2 + variance) / 16 - COST * mean / HIGH


def weighted_sum(records, policy, estimator=None):
    """The records of the weighted sum of one policy, best estimator first."""
    return next(r for r in records if r["policy"] == policy and r["objective"] is None and estimator in {None, r["estimator"]})


def with_objectives(platform, **changed):
    """The platform with keys of some objectives changed."""
    objectives = {name: o.model_copy(update=changed.get(name, {})) for name, o in platform.objectives.items()}
    return platform.model_copy(update={"objectives": objectives})


# ---- who is judged -------------------------------------------------------------------------------------------------------


def test_players_are_either_learned_from_or_judged(policy, data):
    held = evaluation.hold(policy, data)
    out = windows.held_out_players(data.player_ids, policy.platform.training.holdout, policy.platform.training.seed)
    assert set(data.player[held.rows]) == set(np.flatnonzero(out[: len(data.player_ids)])) & set(data.player)
    assert 0.2 < out.mean() < 0.4
    # every decision of theirs is there, and what follows a decision is a decision of the same player
    assert len(held.rows) == out[data.player].sum()
    follows = held.following >= 0
    np.testing.assert_array_equal(data.following[held.rows][follows], held.rows[held.following[follows]])


def test_what_happened_to_judged_players_changes_nothing_that_is_learned():
    platform, data = shop([f"p{i:03d}" for i in range(60)], days=4)
    platform = platform.model_copy(update={"training": platform.training.model_copy(update={"epochs": 2})})
    out = windows.held_out_players(data.player_ids, platform.training.holdout, platform.training.seed)[data.player]
    assert 0 < out.sum() < len(out)
    changed = replace(data, reward=np.where(out[:, None], 1_000.0, data.reward), action=np.where(out[:, None], 15.0 - data.action, data.action))
    one, other = learner.train(platform, data), learner.train(platform, changed)
    for name in ("network", "values", "actor"):
        for (key, expected), found in zip(getattr(one, name).state_dict().items(), getattr(other, name).state_dict().values(), strict=True):
            assert torch.equal(expected, found), f"{name}.{key} saw players that it is judged on"
    np.testing.assert_array_equal(one.effects, other.effects)
    np.testing.assert_array_equal(one.units.centre, other.units.centre)
    assert not set(one.reference.decision_id) & {d for d, o in zip(data.decision_id, out, strict=True) if o}


def test_too_few_players_are_judged_on_what_was_learned_and_refused_for_it():
    candidates = [f"q{i}" for i in range(40)]
    platform, _ = shop(candidates[:1], days=1)
    out = windows.held_out_players(candidates, platform.training.holdout, platform.training.seed)
    platform, data = shop([name for name, held in zip(candidates, out, strict=True) if not held], days=4)
    platform = platform.model_copy(update={"training": platform.training.model_copy(update={"epochs": 1})})
    found = evaluation.evaluate(learner.train(platform, data), data)
    assert not found.promoted
    assert any(reason.startswith(f"{len(data.player_ids)} players are too few to hold some out") for reason in found.reasons)
    assert all("do not trust: these players were trained on" in row["verdict"] for row in found.estimates)


# ---- what is reported ----------------------------------------------------------------------------------------------------


def test_every_estimate_is_a_number_in_its_interval_with_words(report, policy):
    assert {row["policy"] for row in report.estimates} == {OWN_POLICY, *policy.platform.policies}
    assert {row["objective"] for row in report.estimates} == {None, *policy.platform.objectives}
    for row in report.estimates:
        assert row["low"] <= row["value"] <= row["high"], row
        assert row["ess"] > 0
        assert row["verdict"].startswith(("trust", "do not trust: "))
    assert {row["estimator"] for row in report.estimates} >= {"direct_method"}
    assert all(row["verdict"].startswith("do not trust: the model alone") for row in report.estimates if row["estimator"] == "direct_method")
    cut = [row for row in report.estimates if row["estimator"] == "self_normalised_sequential_doubly_robust" and row["objective"] is None]
    assert cut
    assert all("the interval leaves out the model's own error" in row["verdict"] for row in cut), "beyond one decision it is the model's word"
    assert report.decisions >= report.players > 0


def test_the_sum_is_the_weighted_sum_of_its_objectives(report, policy):
    names = list(policy.platform.objectives)
    kinds = {(row["policy"], row["estimator"]) for row in report.estimates}
    assert len(kinds) >= 2 * (1 + len(policy.platform.policies))
    for name, estimator in kinds:
        values = {row["objective"]: row["value"] for row in report.estimates if (row["policy"], row["estimator"]) == (name, estimator)}
        assert values[None] == pytest.approx(policy.platform.weights @ np.array([values[objective] for objective in names]), abs=1e-9)


# ---- weights -------------------------------------------------------------------------------------------------------------


def test_absence_counts_the_periods_in_which_nothing_was_seen(policy, data):
    rows = np.arange(0, len(data), 7)
    found = evaluation.absence(data, rows, chunk=50)
    seen = np.isfinite(data.raw(rows)[:, :, : len(policy.platform.state.measures)]).any(2)
    most = min(policy.platform.state.churn, seen.shape[1])
    away = np.array([next((k for k, there in enumerate(row[::-1]) if there), seen.shape[1]) for row in seen])
    wanted = (away[:, None] >= np.arange(1, most + 1)).astype(float)
    np.testing.assert_array_equal(found, wanted[:, np.ptp(wanted, axis=0) > 0])
    assert found.shape[1] > 2, "nobody in these logs stays away, so this shows nothing"


def test_what_was_done_before_fades_and_starts_anew_with_each_path(policy, data, monkeypatch):
    held = evaluation.hold(policy, data)
    at, phi = held.at[np.arange(5)], np.array([[1.0], [2.0], [4.0], [7.0], [9.0]])
    at = replace(
        at,
        reference=torch.tensor([[0.5], [1.0], [1.0], [3.0], [3.0]]).double(),
        assignment=torch.tensor([[0.4, 0.6], [0.5, 0.5], [0.2, 0.8], [0.0, 1.0], [0.0, 1.0]]),
    )
    # 0 is followed by 2 and that by 3; 1 by 4. By chance 0.5, 1, 3, 4, 6; the half of it fades
    monkeypatch.setattr(evaluation, "FADING", 0.5)
    found = evaluation.treatment(at, phi, np.array([2, 4, 3, -1, -1]))
    np.testing.assert_allclose(found[:, 0], [0, 0, 0.25, 0.125 + 1.5, 0.5])
    np.testing.assert_allclose(found[:, 1], [0, 0, 0.25, 0.125 + 0.5, 0.5])
    np.testing.assert_allclose(found[:, 2], [0, 0, 0.3, 0.15 + 0.4, 0.25], rtol=1e-6)
    assert evaluation.treatment(at, phi, np.full(5, -1)).shape == (5, 0), "nobody decided before"


def test_the_value_model_sees_what_was_done_before_and_nothing_of_now(policy, data):
    held = evaluation.hold(policy, data)
    wanted = evaluation.treatment(held.at, held.phi, held.following)
    assert held.past == wanted.shape[1] > held.phi.shape[1]
    np.testing.assert_allclose(held.state[:, -held.past :], wanted - wanted.mean(0))
    last = np.flatnonzero(held.following < 0)
    moved = held.phi.copy()
    moved[last] += 1  # nothing follows: no state may tell of it
    np.testing.assert_array_equal(evaluation.treatment(held.at, moved, held.following), wanted)
    # the ratio of states is that of the other columns, the value model is not
    target = evaluation.behaviour_target(policy, held, 0)
    blind = replace(held, state=held.state[:, : -held.past], past=0, sums={})
    sees, does_not = (evaluation.estimators(each, target, data.discount[held.rows], 0).model for each in (held, blind))
    np.testing.assert_allclose(sees.u, does_not.u, rtol=1e-5, atol=1e-6)
    assert np.abs(sees.q - does_not.q).mean() > 0.01


def test_a_behaviour_policy_weighs_by_its_density_over_that_of_all_and_else_by_its_chance_where_it_acted(policy, data):
    held = evaluation.hold(policy, data)
    law, chance = data.law[held.rows], data.chance[held.rows]
    whole = np.isfinite(law).all(1)
    assert 0.5 < whole.mean() < 1, "some actions lie on a bound and have no density"
    for k, name in enumerate(data.policies):
        target = evaluation.behaviour_target(policy, held, k)
        acted = data.policy[held.rows] == k
        assert (target.name, target.estimated) == (name, False)
        np.testing.assert_allclose(target.weights[whole], (law[:, k] / (law * chance).sum(1))[whole])
        np.testing.assert_allclose(target.weights[acted & ~whole], 1 / data.assignment[held.rows][acted & ~whole])
        assert not target.weights[~acted & ~whole].any()
        spread = target.weights.std() / np.sqrt(len(np.unique(data.player[held.rows])))
        assert target.weights.mean() == pytest.approx(1, abs=4 * spread)
        lone = evaluation.behaviour_target(policy, replace(held, windows=replace(data, law=np.full_like(data.law, np.nan))), k)
        assert lone.weights.std() > target.weights.std(), "one law known varies more than all of them"


def test_a_chance_that_was_not_logged_is_estimated_and_said(policy, data):
    held = evaluation.hold(policy, replace(data, assignment=np.full(len(data), np.nan), chance=np.full_like(data.chance, np.nan)))
    target = evaluation.behaviour_target(policy, held, 0)
    acted = data.policy[held.rows] == 0
    assert target.estimated
    np.testing.assert_allclose(target.weights[acted], 1 / np.maximum(held.at.assignment[:, 0].numpy()[acted], evaluation.LEAST_CHANCE))
    assert not target.weights[~acted].any()
    terms = evaluation.estimators(held, target, data.discount[held.rows], 0).terms
    words = {r["estimator"]: r["verdict"] for r in evaluation.described(terms, target, list(policy.platform.objectives), policy.platform.weights, 0, False)}
    assert words["direct_method"].startswith("do not trust")
    assert all(said.endswith("(weights from estimated assignment)") for name, said in words.items() if name != "direct_method")


def test_the_logger_is_the_mixture_where_all_of_it_is_known_and_else_who_acted(data):
    law = np.array([[0.2, 0.6, 0.1], [0.2, np.nan, 0.1], [0.2, 0.6, 0.1], [0.2, 0.6, 0.1], [np.nan, np.nan, np.nan]])
    chance = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, np.nan, 0.2], [0.5, 0.3, 0.1], [0.5, 0.3, 0.2]])
    law[3, 2], chance[3] = np.nan, [0.5, 0.3, 0.1]
    small = replace(data, law=law, chance=chance, propensity=np.array([0.2, 0.21, 0.22, 0.23, np.nan]))
    # 0.2 * 0.5 + 0.6 * 0.3 + 0.1 * 0.2 = 0.3; a law unknown, a chance unknown, chances that leave somebody out, nothing known
    np.testing.assert_allclose(evaluation.logging_density(small, np.arange(5)), [0.3, 0.21, 0.22, 0.23, np.nan])
    np.testing.assert_allclose(evaluation.logging_density(small, np.array([3, 0])), [0.23, 0.3])
    # a policy of which nothing is known, where the others' chances sum to 1, did not act then: our own, before it was first served
    chance, law = np.array([[0.5, 0.5, np.nan], [0.5, 0.3, np.nan]]), np.array([[0.2, 0.6, np.nan], [0.2, 0.6, np.nan]])
    new = replace(data, law=law, chance=chance, propensity=np.array([0.2, 0.21]))
    np.testing.assert_allclose(evaluation.logging_density(new, np.arange(2)), [0.4, 0.21])


def test_the_candidate_weighs_by_its_own_law_against_the_logger(policy, data):
    held = evaluation.hold(policy, data)
    target = evaluation.served_target(policy, held)
    mean = policy.recommend(data.states(held.rows[:50]), explore=False).action
    law = policy.density(data.action[held.rows[:50]], mean)
    expected = law / evaluation.logging_density(data, held.rows[:50])
    usable = np.isfinite(expected)
    assert usable.sum() > 25
    np.testing.assert_allclose(target.weights[:50][usable], expected[usable], rtol=1e-6, atol=1e-12)
    assert target.weights[np.isfinite(target.weights)].min() >= 0


def test_an_action_on_a_bound_weighs_nothing_and_an_unknown_propensity_is_no_number(policy, data):
    held = evaluation.hold(policy, data)
    inside = held.rows[((data.action > policy.platform.bounds[:, 0]) & (data.action < policy.platform.bounds[:, 1])).all(1)[held.rows]]
    atom, unknown = inside[0], inside[1]
    action, propensity, law, chance = data.action.copy(), data.propensity.copy(), data.law.copy(), data.chance.copy()
    action[atom, 0] = policy.platform.bounds[0, 1]
    action[unknown] = policy.recommend(data.states(np.array([unknown])), explore=False).action  # where the candidate surely acts
    for row in (atom, unknown):
        propensity[row], law[row], chance[row] = np.nan, np.nan, np.nan
    changed = replace(data, action=action, propensity=propensity, law=law, chance=chance)
    weights = dict(zip(held.rows, evaluation.served_target(policy, replace(held, windows=changed)).weights, strict=True))
    assert weights[atom] == 0
    assert np.isnan(weights[unknown])
    untouched = [row for row in held.rows if row not in (atom, unknown)]
    np.testing.assert_array_equal([weights[row] for row in untouched], np.delete(evaluation.served_target(policy, held).weights, [
        int(np.flatnonzero(held.rows == atom)[0]), int(np.flatnonzero(held.rows == unknown)[0])]))  # fmt: skip


# ---- the gate ------------------------------------------------------------------------------------------------------------


def terms_of(value, players=400, spread=1.0, seed=0):
    """Self-normalised terms of two objectives whose mean is 1 + `value` in the first and 1 in the second, ten rows a player."""
    rng = np.random.default_rng(seed)
    player = np.repeat(np.arange(players), 10)
    reward = rng.normal(0, spread, (len(player), 2))
    reward -= reward.mean(0)
    return ope.self_normalised(reward + np.array([1.0 + value, 1.0]), np.ones(len(player)), player)


def gate(panel, against, weights, alpha):
    """Reasons and difference of policies whose terms are given, no weights of theirs to control by."""
    panels = {name: evaluation.Panel([terms], None) for name, terms in panel.items()}
    return evaluation.gate_on_difference(panels, {}, against, None, weights, alpha, 0)[:2]


def test_the_gate_asks_for_a_lower_bound_above_zero():
    weights = np.array([1.0, -1.0])
    passes = lambda new, old: gate({OWN_POLICY: new, "old": old}, "old", weights, 0.025)  # noqa: E731
    reasons, found = passes(terms_of(0.5, seed=1), terms_of(0.0, seed=2))
    assert reasons == []
    # two independent means of 4,000 rows, two objectives each: standard error sqrt(4 / 4000) = 0.0316
    assert found["value"] == pytest.approx(0.5, abs=1e-9)
    assert found["low"] == pytest.approx(0.5 - 1.96 * 0.0316, abs=0.01)
    assert found["high"] == pytest.approx(0.5 + 1.96 * 0.0316, abs=0.01)
    (reason,), found = passes(terms_of(0.04, seed=1), terms_of(0.0, seed=2))  # better, but not shown to be
    assert "not shown to be better than old" in reason
    assert all(f"{found[name]:+.3g}" in reason for name in ("value", "low", "high"))
    assert found["low"] < 0 < found["value"]
    (reason,), _ = passes(terms_of(0.0, seed=2), terms_of(0.5, seed=1))
    assert "-0.5" in reason


def test_a_stricter_error_rate_refuses_what_a_laxer_one_lets_pass():
    panel = {OWN_POLICY: terms_of(0.075, seed=1), "old": terms_of(0.0, seed=2)}  # 2.4 standard errors
    weights = np.array([1.0, -1.0])
    assert gate(panel, "old", weights, 0.05)[0] == []
    assert gate(panel, "old", weights, 0.001)[0] != []


def test_a_rate_too_small_for_the_resamples_stretches_the_interval_as_the_normal_tail_goes():
    panel = {OWN_POLICY: terms_of(1.0, seed=1), "old": terms_of(0.0, seed=2)}
    weights, error = np.array([1.0, -1.0]), 0.0316
    _, at_one = gate(panel, "old", weights, 0.01)
    _, at_least = gate(panel, "old", weights, 1e-5)
    assert at_one["value"] - at_one["low"] == pytest.approx(2.326 * error, rel=0.15)
    assert (at_least["value"] - at_least["low"]) / (at_one["value"] - at_one["low"]) == pytest.approx(4.265 / 2.326, rel=1e-3)


def test_a_spread_known_from_twenty_refits_stretches_as_students_tail_goes():
    values = np.array([1.0, 0.0])
    refitted = {
        name: replace(terms, refits=terms.values() + np.where(np.arange(20) % 2, 0.02, -0.02)[:, None] * values * (name == OWN_POLICY))
        for name, terms in {OWN_POLICY: terms_of(1.0, seed=1), "old": terms_of(0.0, seed=2)}.items()
    }
    _, at_one = gate(refitted, "old", values, 0.01)
    _, at_least = gate(refitted, "old", values, 1e-5)
    # 19 degrees of freedom: 5.626 and 2.539 where the normal law has 4.265 and 2.326
    assert (at_least["value"] - at_least["low"]) / (at_one["value"] - at_one["low"]) == pytest.approx(5.6257 / 2.5395, rel=1e-3)


def test_evidence_of_too_few_players_is_refused_however_good_it_looks():
    panel = {OWN_POLICY: terms_of(5.0, players=40, seed=1), "old": terms_of(0.0, players=40, seed=2)}
    (reason,), found = gate(panel, "old", np.array([1.0, -1.0]), 0.025)
    assert found["low"] > 0
    assert reason.startswith("the evidence does not suffice: ")
    assert "40 effective players" in reason


def test_nothing_to_compare_with_is_a_refusal():
    (reason,), found = gate({OWN_POLICY: terms_of(1.0)}, OWN_POLICY, np.array([1.0, -1.0]), 0.025)
    assert "nothing to compare with" in reason
    assert found is None


def test_a_candidate_that_is_the_champion_is_no_better_than_it(known):
    data, candidate, _ = known
    found = evaluation.evaluate(candidate, data, replace(candidate, version="7"))
    assert found.against == f"{OWN_POLICY} 7"
    assert not found.promoted
    np.testing.assert_allclose([found.difference[name] for name in ("value", "low", "high")], 0, atol=1e-12)
    assert any(reason.startswith(f"not shown to be better than {OWN_POLICY} 7: the difference is ") for reason in found.reasons)


def test_a_clearly_better_policy_passes(known):
    _, _, found = known
    assert found.reasons == []
    assert found.promoted
    assert found.against == "low"  # near the best of two players in three
    assert 0 < found.difference["low"] <= found.difference["value"] <= found.difference["high"]


def test_the_estimates_hold_the_truth(known):
    data, candidate, found = known
    rows = evaluation.hold(candidate, data).rows
    calm = data.attributes[rows]["calm"].to_list()
    mean = candidate.recommend(data.states(rows), explore=False).action[:, 0]
    noise = candidate.platform.serving.exploration * HIGH
    own = truth(truncnorm((0 - mean) / noise, (HIGH - mean) / noise, mean, noise), calm).mean()
    behaviours = {name: truth(truncnorm((0 - c) / NOISE, (HIGH - c) / NOISE, c, NOISE), calm).mean() for name, c in zip(["low", "high"], CENTRES, strict=True)}
    assert own > max(behaviours.values()) + 0.3  # the planted gap, or the test would say little
    for name, value in {OWN_POLICY: own, **behaviours}.items():
        for estimator in ("double_reinforcement", "self_normalised_sequential_doubly_robust", "self_normalised"):
            row = weighted_sum(found.estimates, name, estimator)
            slack = 0.5 * (row["high"] - row["low"])  # six intervals of 95 % on one log: none may be far off
            assert row["low"] - slack < value < row["high"] + slack, (name, estimator, value, row)
    row = weighted_sum(found.estimates, OWN_POLICY)
    assert row["estimator"] == "double_reinforcement"
    assert row["low"] < own < row["high"]
    assert row["high"] - row["low"] < 0.3
    assert found.difference["low"] < own - behaviours["low"] < found.difference["high"]


@pytest.mark.parametrize(("bound", "moved", "word"), [("ceiling", -0.01, "ceiling"), ("floor", 0.01, "floor")])
def test_a_guardrail_that_may_be_broken_is_refused_by_name(known, bound, moved, word):
    data, candidate, _ = known
    held = evaluation.hold(candidate, data)
    target = evaluation.served_target(candidate, held)

    def gate(limit):
        return evaluation.gate_on_guardrails(held, target, with_objectives(candidate.platform, cost={bound: limit}), 0, 0.025)

    assert evaluation.gate_on_guardrails(held, target, candidate.platform, 0, 0.025) == ([], [])
    (free,), reasons = gate(10.0 if bound == "ceiling" else -10.0)
    assert reasons == []
    assert free["objective"] == "cost"
    assert 0.3 < free["low"] < free["value"] < free["high"] < 0.7  # size / 15 around 6 and 9
    _, (reason,) = gate(free["value"] + moved)
    assert reason.startswith(f"cost: {free['value']:.3g} per decision")
    assert f"the {word} is" in reason
    inside = (free["value"] + free["high"]) / 2 if bound == "ceiling" else (free["value"] + free["low"]) / 2
    assert gate(inside)[1], "the estimate keeps the guardrail, its interval does not"
    platform = with_objectives(candidate.platform, cost={bound: free["value"] + moved})
    whole = evaluation.evaluate(replace(candidate, platform=platform), data)
    assert not whole.promoted
    assert any(said.startswith("cost: ") for said in whole.reasons)


def test_a_guardrail_that_nothing_measures_is_refused(known):
    data, candidate, _ = known
    reward = data.reward.copy()
    reward[:, 1] = np.nan
    held = evaluation.hold(candidate, replace(data, reward=reward))
    target = evaluation.served_target(candidate, held)
    found, (reason,) = evaluation.gate_on_guardrails(held, target, with_objectives(candidate.platform, cost={"ceiling": 10.0}), 0, 0.025)
    assert found == []
    assert reason.startswith("cost: its guardrail cannot be checked: ")


def test_the_measure_is_the_best_behaviour_policy(known):
    _, _, found = known
    sums = {name: weighted_sum(found.estimates, name)["value"] for name in ("low", "high")}
    assert found.against == max(sums, key=sums.get)
    with pytest.raises(TrainingError):  # and a log of nobody leaves nothing to measure
        learner.train(*shop(["q0"], days=1))


# ---- what the gate asks beyond one good number --------------------------------------------------------------------------------


def test_the_error_rate_is_spent_over_attempts_and_not_granted_anew():
    now = datetime(2026, 5, 1, tzinfo=UTC)
    day = 86_400 * 10**6
    at = int(now.timestamp() * 1e6)
    assert evaluation.alpha_of_attempt(0.025, [], now)[0] == 0.025
    rates = [evaluation.alpha_of_attempt(0.025, [evaluation.Attempt(at - d * day, 0, False)], now)[0] for d in (1, 7, 365, 4_000)]
    np.testing.assert_allclose(rates, [0.025 / 365, 0.025 * 7 / 365, 0.025, 0.025])
    again, said = evaluation.alpha_of_attempt(0.025, [evaluation.Attempt(at, 0, False)] * 3, now)
    assert again == pytest.approx(0, abs=1e-8), "asking twice in a moment grants nothing"
    assert "attempt 4" in said
    # a year of nights spends what one attempt may, once more
    nights = [evaluation.Attempt(at + n * day, 0, False) for n in range(366)]
    spent = sum(evaluation.alpha_of_attempt(0.025, nights[:n], now + timedelta(days=n))[0] for n in range(366))
    assert spent == pytest.approx(0.05)


def test_the_same_logs_are_not_asked_again_after_a_promotion(known):
    data, _, found = known
    newest = int(data.moment.max())
    assert found.data_until == datetime.fromtimestamp(newest / 1e6, UTC).isoformat().replace("+00:00", "Z")
    assert evaluation.gate_on_data(data, []) == []
    assert evaluation.gate_on_data(data, [evaluation.Attempt(0, newest, False)]) == []
    assert evaluation.gate_on_data(data, [evaluation.Attempt(0, newest - 1, True)]) == []
    (reason,) = evaluation.gate_on_data(data, [evaluation.Attempt(0, newest, True), evaluation.Attempt(0, newest - 5, True)])
    assert "nothing was decided since the last promotion" in reason


def test_each_segment_needs_evidence_and_must_show_no_harm(known):
    data, candidate, _ = known
    platform = candidate.platform.model_copy(update={"evaluation": candidate.platform.evaluation.model_copy(update={"segments": ["calm"]})})
    held = evaluation.hold(candidate, data)
    target = evaluation.served_target(candidate, held)
    discount = np.zeros((len(held.rows), 2))
    panel = {t.name: evaluation.estimators(held, t, discount, 0) for t in (target, evaluation.behaviour_target(candidate, held, 0))}
    difference = ope.paired_difference(panel[OWN_POLICY].terms[0], panel[data.policies[0]].terms[0])
    found, reasons = evaluation.gate_on_segments(difference, held, target, platform, 0)
    assert [(row["attribute"], row["segment"]) for row in found] == [("calm", "no"), ("calm", "yes")]
    assert sum(row["players"] for row in found) == len(np.unique(data.player[held.rows]))
    assert reasons == []
    _, worse = evaluation.gate_on_segments(ope.paired_difference(panel[data.policies[0]].terms[0], panel[OWN_POLICY].terms[0]), held, target, platform, 0)
    assert any(reason.startswith("calm no: worse there, by -") for reason in worse)
    weights = np.where(data.attributes[held.rows]["calm"].to_numpy() == "no", 0.0, target.weights)
    _, (thin,) = evaluation.gate_on_segments(difference, held, replace(target, weights=weights), platform, 0)
    assert thin.startswith("calm no: the evidence does not suffice, 0 effective players")


def test_models_that_disagree_with_the_evidence_are_warned_of(known):
    data, candidate, found = known
    assert {row["estimator"] for row in found.cross_checks} >= {"fast_q", "double_reinforcement", "direct_method"}
    held = evaluation.hold(candidate, data)
    target = evaluation.served_target(candidate, held)
    panel = evaluation.estimators(held, target, np.zeros((len(held.rows), 2)), 0)
    boastful = replace(candidate, scale=candidate.scale * 50)
    _, warnings = evaluation.cross_checks(
        boastful, replace(held, at=evaluation.situations(boastful, data, held.rows)), target, panel, candidate.platform.weights, 0
    )
    assert any(warning.startswith("FAST-Q's own Q says ") and warning.endswith("they disagree") for warning in warnings)
