"""Every equation on numbers worked by hand (the arithmetic stands beside them), or against an independent brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fastq import equations

torch.set_num_threads(1)

NAN = math.nan


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: object, expected: object, rtol: float = 1e-12, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


# ---- Eq. 1 and 2: the reversed gradient ----------------------------------------------------------------------------------
def test_reverse_gradient_is_the_identity_forwards_and_minus_lam_backwards():
    x = tensor([1.0, -2.0]).requires_grad_()
    y = equations.reverse_gradient(x, 0.1)
    assert torch.equal(y, x)
    (y * tensor([3.0, 5.0])).sum().backward()
    close(x.grad, [-0.3, -0.5])  # -0.1 * 3, -0.1 * 5


def test_reverse_gradient_turns_only_its_own_branch():
    x = tensor([2.0]).requires_grad_()
    (4 * x + 3 * equations.reverse_gradient(x, 2.0)).sum().backward()
    close(x.grad, [-2.0])  # 4 - 2 * 3


def test_reversal_strength_grows_from_nothing_to_the_final_one():
    assert equations.reversal_strength(0.0, 0.7) == 0  # 2 / (1 + 1) - 1
    # exp(-10 * 0.1) = 0.36787944; 2 / 1.36787944 - 1 = 0.46211716
    assert equations.reversal_strength(0.1, 1.0) == pytest.approx(0.46211715726, rel=1e-10)
    assert equations.reversal_strength(0.1, 0.5) == pytest.approx(0.23105857863, rel=1e-10)
    assert equations.reversal_strength(1.0, 1.0) == pytest.approx(0.99990920426, rel=1e-10)  # 2 / (1 + 4.539993e-5) - 1


# ---- Eq. 3: the masked error -----------------------------------------------------------------------------------------------
def test_masked_squared_error_is_the_mean_over_what_is_known():
    predicted, observed = tensor([[1.0, 2.0], [3.0, 4.0]]), tensor([[0.0, NAN], [5.0, 1.0]])
    close(equations.masked_squared_error(predicted, observed), 14 / 3)  # (1 + 4 + 9) / 3


def test_masked_squared_error_teaches_nothing_about_the_unknown():
    predicted = tensor([1.0, 2.0, 7.0]).requires_grad_()
    equations.masked_squared_error(predicted, tensor([0.0, NAN, NAN])).backward()
    close(predicted.grad, [2.0, 0.0, 0.0])  # d/dp of (p - 0)^2 / 1


def test_masked_squared_error_of_nothing_is_zero_with_a_gradient_of_zero():
    predicted = tensor([1.0, 2.0]).requires_grad_()
    error = equations.masked_squared_error(predicted, tensor([NAN, NAN]))
    error.backward()
    assert error == 0
    close(predicted.grad, [0.0, 0.0])


# ---- Eq. 4: action features ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("u", "expected"),
    [
        ([2.0], [2, 4, 8]),
        ([2.0, -3.0], [2, -3, 4, -6, 9, 8, -27]),  # u; u1u1, u1u2, u2u2; cubes
        ([2.0, 3.0, 5.0], [2, 3, 5, 4, 6, 10, 9, 15, 25, 8, 27, 125]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -7.0], [1, 2, 3, 4, 5, 6, -7, 1, 4, 9, 16, 25, 36, 49, 1, 8, 27, 64, 125, 216, -343]),  # no cross terms
    ],
)
def test_action_features(u: list[float], expected: list[float]):
    found = equations.action_features(tensor(u), polynomial=True)
    assert found.tolist() == expected
    assert equations.feature_count(len(u), polynomial=True) == len(expected)
    assert equations.action_features(tensor(u), polynomial=False).tolist() == u
    assert equations.feature_count(len(u), polynomial=False) == len(u)


def test_action_features_of_a_batch_are_those_of_each_row():
    u = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = equations.action_features(u, polynomial=True)
    assert found.shape == (4, 5, 12)
    assert torch.equal(found[2, 3], equations.action_features(u[2, 3], polynomial=True))


def test_cross_terms_are_kept_up_to_six_dimensions():
    # six: 6 + 6 * 7 / 2 + 6 = 33; seven: 3 * 7 = 21
    for d, count in ((6, 33), (7, 21)):
        assert repr(equations.feature_count(d, polynomial=True)) == str(count)  # a whole number, which layers are made of
        assert equations.action_features(torch.ones(d), polynomial=True).shape == (count,)
        assert equations.action_features(torch.ones(2, d), polynomial=True).shape == (2, count)
        mean, sd = torch.zeros(2, d), torch.ones(d)
        assert equations.expected_features(mean, sd, -sd, sd).shape == (2, count)


def truncated_moments(mean: float, sd: float, low: float, high: float) -> list[float]:
    """E[x^k], k = 1, 2, 3, of a truncated normal, by quadrature of the density as the textbook has it."""

    def weight(x: float) -> float:
        return math.exp(-0.5 * ((x - mean) / sd) ** 2)

    mass = integrate.quad(weight, low, high, epsabs=0, epsrel=1e-13)[0]
    return [integrate.quad(lambda x, k=k: x**k * weight(x), low, high, epsabs=1e-14 * mass, epsrel=1e-13)[0] / mass for k in (1, 2, 3)]


@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_expected_features_are_the_integral_of_the_features(d: int):
    # around the mean, asymmetric, one edge near, the mean on an edge and outside, a wide law between near edges
    means = [[0.3, -0.2, 1.1, 0.5, 0.0, 2.0, -1.5][:d], [-1.0, 0.4, 0.2, -0.9, 1.0, 1.7, 0.6][:d]]
    sds = [0.5, 0.2, 1.3, 4.0, 0.7, 0.3, 0.9][:d]
    lows, highs = [-1.0, -0.3, -2.5, -1.0, 0.0, 0.5, -1.1][:d], [0.9, 3.0, 1.1, 1.5, 2.0, 1.9, 4.0][:d]
    found = equations.expected_features(tensor(means), tensor(sds), tensor(lows), tensor(highs))
    for row, mean in zip(found, means, strict=True):
        moments = np.array([truncated_moments(*law) for law in zip(mean, sds, lows, highs, strict=True)])
        cross = [(i, j) for i in range(d) for j in range(i, d)] if d <= 6 else [(i, i) for i in range(d)]
        second = [moments[i, 1] if i == j else moments[i, 0] * moments[j, 0] for i, j in cross]
        close(row, [*moments[:, 0], *second, *moments[:, 2]], rtol=1e-9, atol=1e-12)


def test_expected_features_of_a_law_without_truncation():
    # between edges 30 sd away: E x = mu, E x^2 = mu^2 + s^2, E x^3 = mu^3 + 3 mu s^2; mu = 2, s = 0.5: 2, 4.25, 8 + 1.5
    found = equations.expected_features(tensor([[2.0]]), tensor([0.5]), tensor([-13.0]), tensor([17.0]))
    close(found, [[2.0, 4.25, 9.5]])


def test_expected_features_agree_with_the_library_of_distributions():
    law = stats.truncnorm((-1 - 0.7) / 0.8, (2 - 0.7) / 0.8, loc=0.7, scale=0.8)
    close(equations.expected_features(tensor([[0.7]]), tensor([0.8]), tensor([-1.0]), tensor([2.0])), [[law.moment(k) for k in (1, 2, 3)]], rtol=1e-9)


# ---- Eq. 5: the return -----------------------------------------------------------------------------------------------------
def returned(r, discount, following, end_value, steps, open_ended=None):
    r = np.array(r, float).reshape(len(r), -1)
    discount, end_value = (np.broadcast_to(np.array(a, float).reshape(len(r), -1), r.shape) for a in (discount, end_value))
    open_ended = np.zeros(r.shape, bool) if open_ended is None else np.array(open_ended, bool).reshape(len(r), -1)
    return equations.horizon_return(r, discount, np.array(following), open_ended, end_value, steps)


def test_horizon_return_sums_and_then_bootstraps_at_the_state_reached():
    # from 0, two steps: 1 + 0.5 * 2 + 0.5 * 0.5 * V(2) = 2 + 0.25 * 100 = 27; one step: 1 + 0.5 * V(1) = 1 + 5 = 6
    r, discount, following, value = [1.0, 2.0, 4.0], [0.5, 0.5, 0.0], [1, 2, -1], [1.0, 10.0, 100.0]
    close(returned(r, discount, following, value, 2)[0], [27.0])
    close(returned(r, discount, following, value, 1)[0], [6.0])


def test_horizon_return_ends_where_the_player_left():
    # decision 1 is terminated: 1 + 0.5 * 2 and neither the later reward nor an end value; the last one is itself alone
    y = returned([1.0, 2.0, 4.0], [0.5, 0.0, 0.0], [1, 2, -1], [1e6, 1e6, 1e6], 3)
    close(y[:, 0], [2.0, 2.0, 4.0])


def test_horizon_return_is_unknown_where_it_would_go_on_past_the_log():
    # 2 is open-ended: whoever reaches it within the steps cannot know its sum
    r, discount, following, value = [1.0, 2.0, 4.0], [0.5, 0.5, 0.9], [1, 2, -1], [1.0, 10.0, 100.0]
    y = returned(r, discount, following, value, 2, open_ended=[0, 0, 1])
    close(y[:, 0], [27.0, NAN, NAN])  # 1 + 0.5 * 2 + 0.25 * 100 stops in time
    close(returned(r, discount, following, value, 3, open_ended=[0, 0, 1])[:, 0], [NAN, NAN, NAN])


def test_horizon_return_needs_only_the_rewards_it_sums():
    # the reward of 1 is unknown; 2 is beyond the termination at 1
    r, following, value = [1.0, NAN, 4.0], [1, 2, -1], [7.0, 7.0, 7.0]
    close(returned(r, [0.5, 0.0, 0.0], following, value, 2)[:, 0], [NAN, NAN, 4.0])
    close(returned(r, [0.5, 0.0, 0.0], following, value, 1)[:, 0], [4.5, NAN, 4.0])  # 1 + 0.5 * 7
    close(returned([1.0, 3.0, NAN], [0.5, 0.0, 0.0], following, value, 3)[:, 0], [2.5, 3.0, NAN])  # 1 + 0.5 * 3


def test_horizon_return_of_one_step_episodes_is_the_reward():
    close(returned([3.0, 5.0], [0.0, 0.0], [1, -1], [1e6, NAN], 4)[:, 0], [3.0, 5.0])


def test_horizon_return_weighs_each_objective_and_each_gap_by_itself():
    # objective 0: 0.9 per period, gaps of 2 and 1/2 periods; objective 1: one step; y0 = 1 + 0.81 * 2 + 0.81 * 0.9**0.5 * 4
    discount = [[0.9**2, 0.0], [0.9**0.5, 0.0], [0.0, 0.0]]
    y = returned([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], discount, [1, 2, -1], np.zeros((3, 2)), 5)
    close(y[0], [1 + 0.81 * 2 + 0.81 * math.sqrt(0.9) * 4, 10.0])
    close(y[1], [2 + math.sqrt(0.9) * 4, 20.0])


def test_horizon_return_follows_the_links_not_the_order():
    # 1 -> 2 -> 0: 2 + 0.5 * (4 + 0.5 * 1)
    close(returned([1.0, 2.0, 4.0], [0.0, 0.5, 0.5], [-1, 2, 0], [0.0, 0.0, 0.0], 3)[:, 0], [1.0, 4.25, 4.5])


def test_horizon_return_stays_where_nothing_follows():
    # 1 + 0.5 * V(0): nothing follows 0, so the state reached is its own, not the table's last
    close(returned([1.0, 3.0], [0.5, 0.0], [-1, -1], [10.0, 1000.0], 1)[:, 0], [6.0, 3.0])


# ---- Eq. 6 and 7: ridge and design -------------------------------------------------------------------------------------------
def test_ridge():
    x = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    y = np.array([[1.0, 2.0], [2.0, 0.0], [3.0, -2.0]])
    # x'x + I = [[3, 2], [2, 9]], determinant 23, inverse [[9, -2], [-2, 3]] / 23; x'y = [[4, 0], [10, -4]]
    close(equations.ridge(x, y, 1.0), np.array([[9 * 4 - 2 * 10, 8], [-2 * 4 + 3 * 10, -12]]) / 23)


def test_ridge_with_a_strength_for_each_column():
    # x'x + diag(1, 3) = [[2, 0], [0, 4]]; x'y = [1, 2]
    close(equations.ridge(np.eye(2), np.array([[1.0], [2.0]]), np.array([1.0, 3.0])), [[0.5], [0.5]])


def test_ridge_does_not_change_its_arguments():
    x, y = np.eye(2), np.ones((2, 1))
    equations.ridge(x, y, 5.0)
    assert (x == np.eye(2)).all()
    assert (y == 1).all()


def test_orthogonal_design_is_each_modifier_times_each_centred_feature():
    found = equations.orthogonal_design(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 20.0, 30.0], [-1.0, 0.0, 1.0]]))
    assert found.tolist() == [[10, 20, 30, 20, 40, 60], [-3, 0, 3, -4, 0, 4]]


# ---- Eq. 8: the sandwich -----------------------------------------------------------------------------------------------------
def test_sandwich_of_one_column_by_hand():
    # x = 1, 2, 3; e = 1, -1, 2; A = 14 + 1 = 15; scores 1, -2, 6, squares 1 + 4 + 36 = 41; freedom 3/2 * 3/2 = 9/4
    # prior: var(e) = (1 + 1 + 4 - 4/3) / 2 = 7/3, times 1 / 15^2
    found = equations.clustered_covariance(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [-1.0], [2.0]]), np.arange(3), 1.0)
    close(found, [[[[9 / 4 * 41 / 225 + 7 / 3 / 225]]]])


def test_rows_of_one_cluster_are_one_observation():
    # the same with rows 0 and 1 of one player: scores 1 - 2 = -1 and 6, squares 1 + 36 = 37; freedom 2/1 * 3/2 = 3
    found = equations.clustered_covariance(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [-1.0], [2.0]]), np.array([0, 0, 1]), 1.0)
    close(found, [[[[3 * 37 / 225 + 7 / 3 / 225]]]])


def test_clusters_may_have_any_numbers():
    x, e = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [-1.0], [2.0]])
    for cluster in ([1, 1, 2], [-1, -1, 0], [5, 5, -7]):
        close(equations.clustered_covariance(x, e, np.array(cluster), 1.0), [[[[3 * 37 / 225 + 7 / 3 / 225]]]])


def test_one_degree_of_freedom_is_left_where_rows_are_one_more_than_columns():
    # x = 1, 2; e = 1, -1: A = 5 + 1 = 6, scores 1 and -2, squares 5; freedom 2/1 * 2/1 = 4; prior: var(e) = 2, times 1 / 6^2
    found = equations.clustered_covariance(np.array([[1.0], [2.0]]), np.array([[1.0], [-1.0]]), np.arange(2), 1.0)
    close(found, [[[[4 * 5 / 36 + 2 / 36]]]])


def test_one_cluster_per_row_is_the_textbook_sandwich():
    rng = np.random.default_rng(0)
    x, e, strength = rng.normal(size=(40, 3)), rng.normal(size=(40, 2)), 0.5
    inverse = np.linalg.inv(x.T @ x + strength * np.eye(3))
    found = equations.clustered_covariance(x, e, rng.permutation(40), strength)
    assert found.shape == (2, 2, 3, 3)
    for j in range(2):
        for k in range(2):
            meat = sum(e[i, j] * e[i, k] * np.outer(x[i], x[i]) for i in range(40))
            prior = np.cov(e.T)[j, k] * strength * inverse @ inverse
            close(found[j, k], 40 / 39 * 40 / 37 * inverse @ meat @ inverse + prior, rtol=1e-9, atol=1e-12)


def test_clusters_count_wherever_their_rows_stand():
    rng = np.random.default_rng(1)
    x, e, cluster = rng.normal(size=(30, 2)), rng.normal(size=(30, 2)), rng.integers(0, 7, 30)
    order = rng.permutation(30)
    close(equations.clustered_covariance(x, e, cluster, 0.1), equations.clustered_covariance(x[order], e[order], cluster[order], 0.1), rtol=1e-9, atol=1e-14)


def test_repeating_a_player_s_row_within_the_player_teaches_nothing_new():
    rng = np.random.default_rng(2)
    x, e, cluster = rng.normal(size=(50, 1)), rng.normal(size=(50, 1)), np.arange(50)
    once = equations.clustered_covariance(x, e, cluster, 1e-6)[0, 0, 0, 0]
    twice = equations.clustered_covariance(np.repeat(x, 2, 0), np.repeat(e, 2, 0), np.repeat(cluster, 2), 1e-6)[0, 0, 0, 0]
    close(twice, once * (100 / 99) / (50 / 49), rtol=1e-6)  # up to the correction for degrees of freedom; by row it would be halved
    assert equations.clustered_covariance(np.repeat(x, 2, 0), np.repeat(e, 2, 0), np.arange(100), 1e-6)[0, 0, 0, 0] < 0.6 * once


def test_a_dead_design_keeps_the_variance_of_the_prior():
    # nothing varies: A = strength I, the prior is var(e) / strength; var of 1, -1, 2 is 7/3
    found = equations.clustered_covariance(np.zeros((3, 2)), np.array([[1.0], [-1.0], [2.0]]), np.arange(3), 0.25)
    close(found[0, 0], 7 / 3 / 0.25 * np.eye(2))


# ---- Eq. 9 to 13 --------------------------------------------------------------------------------------------------------------
def test_lower_bound():
    # 1 - 2 * 3; a variance that rounding made negative counts as none (sqrt(1e-12) = 1e-6 is left)
    close(equations.lower_bound(tensor([1.0, 1.0]), tensor([9.0, -1.0]), 2.0), [-5.0, 1.0 - 2e-6], rtol=1e-11)


def test_lower_bound_has_a_gradient_where_there_is_no_doubt():
    variance = tensor([0.0]).requires_grad_()
    equations.lower_bound(tensor([1.0]), variance, 1.0).sum().backward()
    assert torch.isfinite(variance.grad).all()


def test_td_target_takes_the_twin_whose_weighted_total_is_smaller():
    # w = (1, -1): twin 0 is worth 5 - 1 = 4, twin 1 is worth 4 - 3 = 1: twin 1, whole. A minimum per head would give 4 and 1.
    q_next = tensor([[[5.0, 1.0]], [[4.0, 3.0]]])
    close(equations.td_target(tensor([[1.0, 2.0]]), tensor([[0.5, 0.9]]), q_next, tensor([1.0, -1.0])), [[1 + 0.5 * 4, 2 + 0.9 * 3]])
    # w = (1, 1): 6 against 7: twin 0
    close(equations.td_target(tensor([[1.0, 2.0]]), tensor([[0.5, 0.9]]), q_next, tensor([1.0, 1.0])), [[1 + 0.5 * 5, 2 + 0.9 * 1]])

    # w = (0.1, 1): 0.5 + 1 = 1.5 against 0.4 + 1.2 = 1.6: twin 0; by 5 / 0.1 + 1 against 4 / 0.1 + 1.2 it would be twin 1
    close(equations.td_target(tensor([[0.0, 0.0]]), tensor([[1.0, 1.0]]), tensor([[[5.0, 1.0]], [[4.0, 1.2]]]), tensor([0.1, 1.0])), [[5.0, 1.0]])

    # a tie, 6 against 6: the first
    close(equations.td_target(tensor([[0.0, 0.0]]), tensor([[1.0, 1.0]]), tensor([[[5.0, 1.0]], [[4.0, 2.0]]]), tensor([1.0, 1.0])), [[5.0, 1.0]])


def test_td_target_chooses_for_each_row_by_itself():
    q_next = tensor([[[1.0], [9.0]], [[2.0], [8.0]]])
    close(equations.td_target(torch.zeros(2, 1).double(), tensor([[1.0], [1.0]]), q_next, tensor([1.0])), [[1.0], [8.0]])


def test_td_target_of_a_player_who_left_is_the_reward():
    close(equations.td_target(tensor([[3.0]]), tensor([[0.0]]), tensor([[[7.0]], [[8.0]]]), tensor([1.0])), [[3.0]])


def test_behaviour_weight():
    close(equations.behaviour_weight(tensor([1.0, -3.0, 2.0]), 2.5), 1.25)  # 2.5 / 2
    close(equations.behaviour_weight(tensor([0.0, 0.0]), 2.5), 2.5e6)  # never a division by nothing
    q = tensor([1.0]).requires_grad_()
    assert not equations.behaviour_weight(q, 1.0).requires_grad, "the scale is no way for the actor to earn"


def test_exploration_share():
    assert equations.exploration_share(0.0) == 0
    assert equations.exploration_share(0.5) == pytest.approx(0.3)
    assert equations.exploration_share(1.0) == 0.6
    assert equations.exploration_share(0.25, final=0.2) == pytest.approx(0.05)
    assert equations.exploration_share(3.0) == 0.6
    assert equations.exploration_share(-1.0) == 0


def test_soft_update_moves_targets_a_share_of_the_way_in_place():
    target, source = tensor([1.0, 2.0]), tensor([3.0, -2.0])
    first, second = tensor([10.0]), tensor([0.0])
    equations.soft_update([target, first], [source, second], 0.25)
    close(target, [1.5, 1.0])  # 0.75 * 1 + 0.25 * 3, 0.75 * 2 - 0.25 * 2
    close(first, [7.5])
    close(source, [3.0, -2.0])


# ---- Eq. 3b: how far two samples of states are apart ---------------------------------------------------------------------------
def test_discrepancy_by_hand():
    # k(x, x') over {0, 1}: (1 + e^-1/4 + e^-1/4 + 1) / 4; one y at 2 with itself 1; k(x, y): (e^-4/4 + e^-1/4) / 2, width 2
    near, far = math.exp(-0.25), math.exp(-1.0)
    expected = (2 + 2 * near) / 4 + 1 - 2 * (far + near) / 2
    close(equations.discrepancy(tensor([[0.0], [1.0]]), tensor([[2.0]]), 2.0), math.sqrt(expected))
    assert float(equations.discrepancy(tensor([[0.0], [1.0]]), tensor([[1.0], [0.0]]), 2.0)) == 0


# ---- Eq. 14 to 18: the published form ---------------------------------------------------------------------------------------
def test_difficulty_weights_follow_what_the_adversary_named_and_never_vanish():
    close(equations.difficulty_weights(tensor([5.0, 0.0, 2.0])), [0.6, 0.1, 0.3])  # (6, 1, 3) / 10
    close(equations.difficulty_weights(tensor([0.0, 0.0])), [0.5, 0.5])


def test_share_values_are_softmax_shares_of_the_value_and_nothing_for_an_objective_that_lowers_it():
    q, logits = tensor([2.0, -4.0]), tensor([[0.0, 100.0, math.log(3.0)], [math.log(2.0), 0.0, math.log(2.0)]])
    shares = equations.share_values(q, logits, torch.tensor([True, False, True]))
    close(shares, [[0.5, 0.0, 1.5], [-2.0, 0.0, -2.0]])  # 2 * (1, 3) / 4 and -4 * (2, 2) / 4
    close(equations.share_values(q, logits, torch.tensor([True, True, True])).sum(-1), q)


def test_the_published_critic_loss_weighs_the_value_against_its_shares():
    q, target = tensor([1.0, 3.0]), tensor([2.0, NAN])
    shares, immediate = tensor([[0.5, 0.2], [1.0, 2.0]]), tensor([[0.5, NAN], [3.0, 1.0]])
    # 0.75 * (1 - 2)^2 + 0.25 * ((0)^2 + (1 - 3)^2 + (2 - 1)^2) / 3
    close(equations.published_critic_loss(q, target, shares, immediate), 0.75 + 0.25 * 5 / 3)


def test_smoothed_actions_move_by_clipped_noise():
    # 0.2 * 1; 0.2 * -10 = -2, clipped to -0.5
    close(equations.smoothed_action(tensor([1.0, 1.0]), tensor([1.0, -10.0])), [1.2, 0.5])
    close(equations.smoothed_action(tensor([1.0, 1.0]), tensor([2.0, 2.0]), sd=1.0, most=1.5), [2.5, 2.5])


def test_the_cloning_actor_weighs_the_value_by_its_own_size():
    q, u = tensor([1.0, -3.0]).requires_grad_(), tensor([[1.0, 0.0], [0.0, 2.0]]).requires_grad_()
    cloned = tensor([[0.0, 0.0], [0.0, 0.0]])
    loss = equations.cloning_actor_loss(q, u, cloned, 2.5)
    close(loss.detach(), 2.5 / 2 + 5 / 4)  # -(2.5 / 2) * (-1) + (1 + 4) / 4
    loss.backward()
    close(q.grad, [-0.625, -0.625])  # the size itself is not differentiated
    close(u.grad, [[0.5, 0.0], [0.0, 1.0]])
