"""A served policy: its law is the density it says, draws repeat, limits and steps hold, a bundle comes back the same."""

import json
import warnings
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from scipy import integrate
from scipy.stats import qmc

from fastq import Policy, load_platform
from fastq.errors import BundleError, ConfigurationError, RequestError
from fastq.features import PlayerStates
from fastq.platform import platform_from_tree
from fastq.policy import _directions, acting, uniforms


@pytest.fixture
def states(data):
    return data.states(np.arange(0, len(data), 7))


def with_platform(policy, **changes):
    """The same policy on a platform whose file says something else."""
    tree = policy.platform.model_dump(mode="json")
    for path, value in changes.items():
        *branches, leaf = path.split("__")
        branch = tree
        for name in branches:
            branch = branch[name]
        branch[leaf] = value
    return replace(policy, platform=platform_from_tree(tree, policy.platform.root, "test"))


def test_recommendations_lie_in_bounds_and_their_values_add_up(policy, states):
    found = policy.recommend(states)
    low, high = policy.platform.bounds.T
    assert found.action.shape == (len(states), 3)
    assert ((found.action >= low) & (found.action <= high)).all()
    assert (found.propensity > 0).all() and np.isfinite(found.propensity).all()
    np.testing.assert_allclose(found.value, found.by_objective @ policy.platform.weights, rtol=1e-12)
    parts = policy.parts(policy.encode(states), found.action[:, None])[:, 0]
    np.testing.assert_allclose(parts.sum(-1), found.by_objective, rtol=1e-12, atol=1e-12)


def test_the_same_seeds_draw_the_same_actions_alone_and_in_a_batch(policy, states):
    whole = policy.recommend(states)
    again = policy.recommend(states, seeds=whole.seeds)
    np.testing.assert_array_equal(whole.action, again.action)
    one = PlayerStates(states.history[5:6], states.attributes[5:6], states.actions[5:6], states.objectives[5:6], states.policies[5:6])
    alone = policy.recommend(one, seeds=whole.seeds[5:6])
    np.testing.assert_allclose(alone.action, whole.action[5:6], rtol=1e-5, atol=1e-5)  # float32 networks in batches of another size
    np.testing.assert_array_equal(alone.action, policy.recommend(one, seeds=whole.seeds[5:6]).action)


def test_without_exploration_the_best_action_has_no_propensity(policy, states):
    first, second = policy.recommend(states, explore=False), policy.recommend(states, explore=False)
    np.testing.assert_array_equal(first.action, second.action)
    np.testing.assert_array_equal(first.action, first.mean)
    assert np.isnan(first.propensity).all()
    assert np.isnan(with_platform(policy, serving__exploration=0.0).recommend(states).propensity).all()


@pytest.mark.parametrize("share", [1e-300, 1e-12, 1e-7])
def test_noise_and_limits_too_narrow_for_floats_have_no_density_instead_of_a_wrong_one(policy, states, share):
    found = policy.recommend(states, exploration=share)
    np.testing.assert_array_equal(found.action, found.mean)
    assert np.isnan(found.propensity).all()
    low, high = policy.platform.bounds[1]
    narrow = {policy.platform.dimension_names[1]: {"low": low, "high": low + min(share, 1e-9) * (high - low)}}
    for limited in (policy.recommend(states, limits=narrow), policy.recommend(states, limits=narrow, exploration=1e-5)):
        assert np.isnan(limited.propensity).all()
        assert np.isnan(policy.density(limited.action, limited.mean, narrow)).all()
    wider = policy.recommend(states, exploration=1e-5)
    assert np.isfinite(wider.propensity).all() and (wider.action != wider.mean).all()


def test_propensities_are_the_density_of_the_drawn_actions(policy, states):
    one = PlayerStates(np.repeat(states.history[3:4], 40_000, 0), pl.concat([states.attributes[3:4]] * 40_000))
    found = policy.recommend(one, seeds=np.arange(40_000, dtype=np.uint64))
    low, high = np.quantile(found.action, 0.25, 0), np.quantile(found.action, 0.75, 0)
    inside = ((found.action > low) & (found.action < high)).all(1)
    assert np.mean(inside / found.propensity) / np.prod(high - low) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("mean", [1.0, 4.3, 20.0])
def test_the_law_integrates_to_one_also_at_a_bound_and_under_limits(policy, mean):
    narrow = {"target_games": {"low": 3, "high": 9}}
    for limits, low, high in ((None, 1, 20), (narrow, 3, 9)):
        centre = np.array([[np.clip(mean, low, high), 25.0, 3.0]])

        def density(x, limits=limits, centre=centre):
            return policy.density(np.array([[x, 25.0, 3.0]]), centre, limits)[0]

        other = density(centre[0, 0]) / 1  # the other two dimensions stay at their mean: their densities are a common factor
        mass, _ = integrate.quad(density, low, high, points=[centre[0, 0]], limit=200)
        sd = 0.05 * 19
        alone = np.array([[centre[0, 0]]])
        from scipy.stats import truncnorm

        one = truncnorm.pdf(alone[0, 0], (low - alone[0, 0]) / sd, (high - alone[0, 0]) / sd, alone[0, 0], sd)
        assert mass == pytest.approx(other / one, rel=1e-6)
    assert policy.density(np.array([[10.0, 25.0, 3.0]]), np.array([[8.0, 25.0, 3.0]]), narrow)[0] == 0


def test_a_dimension_with_a_step_lives_on_its_grid(policy, states):
    stepped = with_platform(policy, action__dimensions__target_games__step=1.0)
    found = stepped.recommend(states)
    np.testing.assert_array_equal(found.action[:, 0], np.round(found.action[:, 0]))
    mean = np.array([[5.0, 25.0, 3.0]])
    grid = np.array([[k, 25.0, 3.0] for k in range(1, 21)])
    masses = stepped.density(grid, np.repeat(mean, 20, 0))
    smooth = policy.density(mean, mean)[0]
    one = 1 / (0.05 * 19 * np.sqrt(2 * np.pi))  # the density of the unstepped dimension at its own mean, far from both bounds
    assert masses.sum() == pytest.approx(smooth / one, rel=1e-4)  # mass of the cells, each of volume 1, adds up to 1


def test_limits_hold_and_those_that_leave_nothing_are_refused(policy, states):
    assert policy.recommend(states, limits={"bonus": {"high": 1.5}}).action[:, 1].max() <= 1.5
    fixed = policy.recommend(states, limits={"bonus": {"low": 2, "high": 2}})
    assert (fixed.action[:, 1] == 2).all() and np.isnan(fixed.propensity).all()
    for limits, says in (({"bonus": {"high": -5}}, "bonus"), ({"nothing": {"high": 5}}, "nothing"), ({"bonus": {"most": 5}}, "most")):
        with pytest.raises(RequestError, match=says):
            policy.recommend(states, limits=limits)


def test_states_of_the_wrong_shape_are_refused_by_name(policy, states):
    with pytest.raises(RequestError, match=r"window 30.*7 measures"):
        policy.recommend(PlayerStates(np.zeros((2, 5, 9)), np.zeros((2, 1))))
    with pytest.raises(RequestError, match=r"attributes.*tenure_days"):
        policy.recommend(PlayerStates(states.history, pl.DataFrame({"region": ["x"] * len(states)})))
    with pytest.raises(RequestError, match="policies"):
        policy.recommend(PlayerStates(states.history, states.attributes, policies=["retain"]))


def test_a_state_without_any_data_is_scored_like_any_other(policy):
    found = policy.recommend(PlayerStates(np.full((3, 30, 7), np.nan)))
    assert np.isfinite(found.value).all() and (found.propensity > 0).all()


def test_other_weights_move_the_best_action_the_way_they_point(policy, states):
    enc = policy.encode(states)
    cheap, dear = policy.best(enc, weights={"cost": -20}), policy.best(enc, weights={"cost": 0})
    cost = list(policy.platform.objectives).index("cost")
    of = [policy.parts(enc, action[:, None])[:, 0, cost].sum(-1).mean() for action in (cheap, dear)]
    assert of[0] < of[1]
    with pytest.raises(RequestError, match="happiness"):
        policy.best(enc, weights={"happiness": 1})


def test_the_score_is_value_less_caution_less_guardrail(policy, states):
    enc = policy.encode(states)
    action = policy.recommend(states, explore=False).action[:, None]
    score = policy.score(enc, action)
    np.testing.assert_allclose(score["value"] - score["caution"] - score["guardrail"], score["total"], rtol=1e-12)
    assert (score["caution"] >= 0).all()
    theirs = np.where(acting(torch.from_numpy(policy.policy_probability(enc))), policy.score(enc, policy.expert_actions(enc))["total"], -np.inf)
    assert (score["total"][:, 0] >= theirs.max(1) - 1e-6).all(), "the best candidate is behind the action of a policy that acts in such a state"


def test_doubt_weighs_what_the_file_says_and_more_among_items_where_no_reach_bounds_them(policy, states):
    enc, experts = policy.encode(states), policy.expert_actions(policy.encode(states))

    def given(caution):
        training = policy.platform.training.model_copy(update={"caution": caution})
        return replace(policy, platform=policy.platform.model_copy(update={"training": training}))

    one, three = (given(caution).score(enc, experts)["caution"] for caution in (1.0, 3.0))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-12)
    np.testing.assert_allclose(policy.score(enc, experts)["caution"], 0.5 * one, rtol=1e-12)
    assert replace(policy, catalogue=object()).caution == 8.0
    assert replace(given(1.0), catalogue=object()).caution == 1.0


def test_doubt_of_an_action_against_itself_is_nothing_and_grows_outwards(policy, states):
    enc = policy.encode(states)
    mean = policy.expert_actions(enc)[:, :1]
    assert policy.doubt(enc, mean, mean).max() == 0
    step = np.array([0.5, 1.0, 0.2])
    near, far = policy.doubt(enc, mean + step, mean), policy.doubt(enc, mean + 4 * step, mean)
    assert (far > near).mean() > 0.99


def test_a_bundle_comes_back_the_same_and_a_damaged_one_is_refused(policy, states, tmp_path):
    policy.save(tmp_path / "bundle")
    again = Policy.load(tmp_path / "bundle")
    found, expected = again.recommend(states, explore=False), policy.recommend(states, explore=False)
    np.testing.assert_array_equal(found.action, expected.action)
    np.testing.assert_array_equal(found.value, expected.value)
    assert again.fingerprint == policy.fingerprint
    weights = tmp_path / "bundle" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        Policy.load(tmp_path / "bundle")
    (tmp_path / "bundle" / "bundle.json").unlink()
    with pytest.raises(BundleError, match="not a readable bundle"):
        Policy.load(tmp_path / "bundle")
    assert not list(tmp_path.rglob("*.pkl")), "no pickle is written"


def test_a_bundle_is_plain_json_and_safetensors(policy, tmp_path):
    policy.save(tmp_path / "bundle")
    tree = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"bundle.json", "weights.safetensors"}
    assert tree["features"] == policy.fingerprint and set(tree["files"]) == {"weights.safetensors"}


def test_uniforms_are_uniform_and_a_pure_function_of_the_seed():
    drawn = uniforms(np.arange(200_000, dtype=np.uint64), 3)
    assert drawn.min() > 0 and drawn.max() < 1
    np.testing.assert_allclose(drawn.mean(0), 0.5, atol=0.003)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(3), atol=0.01)
    np.testing.assert_array_equal(drawn[7:8], uniforms(np.array([7], np.uint64), 3))
    # splitmix64 of seed 0: its first output is 0xE220A8397B1DCDAF (reference implementation)
    assert uniforms(np.zeros(1, np.uint64), 1)[0, 0] == ((0xE220A8397B1DCDAF >> 11) + 0.5) / 2**53


def test_a_platform_file_that_is_not_there_names_the_mend(tmp_path):
    with pytest.raises(ConfigurationError, match="fastq init"):
        load_platform(tmp_path)


def test_the_directions_of_the_search_are_scipys_sobol_points_to_the_last_bit():
    """Decisions that were served before are drawn again by them."""
    for d in (1, 2, 3, 8, 40):
        for n in (1, 16, 100, 128):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scipy's, of numbers that are no power of 2
                expected = qmc.Sobol(d, scramble=False).random(n) * 2 - 1
            np.testing.assert_array_equal(_directions(d, n), expected)
