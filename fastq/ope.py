"""What a policy would have earned, read off logs that other policies wrote.

Everything here is a function of arrays: N logged decisions (rows), P players, M objectives. Weights and discounts have no unit; values
carry the unit of their objective, per decision (one step) or per discounted episode (sequential).

An estimator returns `Terms`: its equation, summed per player, before any division. All of them have the one form

    V_m = sum_k  (sum_p numerator[p, m, k]) / (sum_p denominator[p, m, k])

a sum of ratios of player sums, which is why one bootstrap, one difference and one set of diagnostics serve every estimator:

    terms = doubly_robust(rewards, weights, q, v, player)
    answers = estimate(terms, objective_weights=[1.0, -1.0], rng=np.random.default_rng(0))     # one Estimate or Refusal per objective, then the sum's

Conventions that hold everywhere
- weights [N] are target density over logger density of the action that was executed. 0 is a fact (the target never does this; an action on a
  bound, which is an atom, against a target with a density): the row stays in every denominator. NaN means that a density is not known: the
  row is left out of the weighted terms, numerator and denominator, and still counts in the model's term. Infinity (the target acts where the
  logger says it never does) is refused. No weight is ever clipped in silence: the estimators that change weights on purpose (`switch_doubly_robust`,
  `shrunk_doubly_robust`, `magic`) are named after it, and their verdict says what share of the weight they changed.
- rewards [N, M] may be NaN where an outcome is not known: for that objective the row is left out like one without a weight. Both are right as
  long as what is missing is missing for reasons that the action did not cause.
- q [N, M] is a model's value of the logged action, v [N, M] its value of the row's state under the target, both predicted by a model that never
  saw the row's player (`fitted_q`). v must be the target's expectation of that same q, exactly or by drawn actions: right weights repair a wrong q,
  not a v that belongs to another. A column that is all NaN says that there is no model for that objective.
- player [N] holds any integers; rows of one player are never taken for independent.

Where an estimator has a threshold, shrinkage or bandwidth, `slope` chooses it on the log itself, per objective. The interval takes the choice, like a
fitted model, as given; the rule keeps the bias that it lets in within the order of the interval's width, no lower: hence what the verdict says.

Each estimator by its name: `inverse_propensity`, `self_normalised`, `direct_method`, `doubly_robust`, `self_normalised_doubly_robust`,
`switch_doubly_robust`, `shrunk_doubly_robust`, `kernel_smoothed` for one step; `per_decision`, `sequential_doubly_robust`, `magic`, `marginal`,
`marginal_doubly_robust` for sequences; `fitted_q` and `density_ratio` are the models that they need. `estimate_bounded` alone needs no large numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from fastq.errors import RequestError
from fastq.intervals import (
    LARGEST_APART,
    LARGEST_CHANGED,
    LARGEST_NEGATIVE,
    LARGEST_TOP_SHARE,
    LARGEST_UNREACHED,
    LARGEST_UNUSABLE,
    LARGEST_WEIGHT_GAP,
    LARGEST_WIDTH,
    LEAST_EFFECTIVE_PLAYERS,
    LEAST_MEASURED,
    LEAST_OVERLAP,
    LESSENED,
    POOLED_PLAYERS,
    Bools,
    Clusters,
    Estimate,
    Floats,
    Interval,
    Ints,
    Refusal,
    Support,
    Terms,
    as_finite_table,
    as_flags,
    as_table,
    as_vector,
    bootstrap_by_player,
    clusters_of,
    confidence_sequence,
    controlled,
    effective_sample_size,
    empirical_bernstein,
    estimate,
    no_model,
    no_support,
    overlap_and_mean,
    paired_difference,
    ratio_or_zero,
    refuse_level,
    refuse_negative,
    refuse_other_rows,
    subset,
    support_of,
    terms_of,
    usable_weights,
    verdict,
    worst_support,
)

__all__ = [
    "LARGEST_APART",
    "LARGEST_CHANGED",
    "LARGEST_NEGATIVE",
    "LARGEST_TOP_SHARE",
    "LARGEST_UNREACHED",
    "LARGEST_UNUSABLE",
    "LARGEST_WEIGHT_GAP",
    "LARGEST_WIDTH",
    "LEAST_EFFECTIVE_PLAYERS",
    "LEAST_MEASURED",
    "LEAST_OVERLAP",
    "DensityRatio",
    "DoubleReinforcement",
    "Estimate",
    "FittedQ",
    "Interval",
    "LoggedSums",
    "Refusal",
    "Support",
    "Terms",
    "balanced_weights",
    "bootstrap_by_player",
    "confidence_sequence",
    "controlled",
    "density_ratio",
    "direct_method",
    "double_reinforcement",
    "doubly_robust",
    "effective_sample_size",
    "empirical_bernstein",
    "estimate",
    "estimate_bounded",
    "fitted_q",
    "inverse_propensity",
    "inverse_variance_weights",
    "kernel_smoothed",
    "kernel_weights",
    "logged_sums",
    "magic",
    "marginal",
    "marginal_doubly_robust",
    "naive_weights",
    "paired_difference",
    "per_decision",
    "reinforced",
    "self_normalised",
    "self_normalised_doubly_robust",
    "sequential_doubly_robust",
    "shrunk_doubly_robust",
    "slope",
    "subset",
    "switch_doubly_robust",
    "verdict",
    "worst_support",
]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # strengths that `fitted_q` and `density_ratio` choose among, per row, on features of mean square 1
FIT_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # those of q in `double_reinforcement`
PAST_SHRUNK = 0.1  # what is shrunk of what was done before passes for the player's own; not at all is noise where players are few; measured in infra/log.md
RATIO_RIDGE = 1e-3  # of its ratio: a stronger one leaves the future out, a weaker one is noise; measured in infra/log.md
THRESHOLDS = (0.999, 0.99, 0.95, 0.9, 0.75, 0.5)  # quantiles of the weights that are not 0, tried by `switch_doubly_robust` after infinity
SHRINKAGES = (1e3, 1e2, 1e1, 3.0, 1.0, 0.1)  # multiples of the mean square of the weights, tried by `shrunk_doubly_robust` after infinity
REFITTED_NUMBERS = 500_000  # float64 numbers per batch of refits, which bounds the memory
BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0, 3 / 2)  # multiples of each action's standard deviation, tried by `kernel_smoothed`


@dataclass(frozen=True)
class FittedQ:
    """Held-out values of a linear fitted Q evaluation, in each objective's unit.

    q [N, M]: of the logged action; v [N, M]: of the state under the target; coefficients [F, M, d] per fold that was held out; fold [N]: which of
    them predicted the row; ridge [M]: the strength chosen; radius [M]: largest spectral radius among the folds (below 1: the iteration converges).
    """

    q: Floats
    v: Floats
    coefficients: Floats
    fold: Ints
    ridge: Floats
    radius: Floats


@dataclass(frozen=True)
class DoubleReinforcement:
    """`double_reinforcement`'s answer and what it was made of: q, v, u [N, M], each row predicted without its player; u: ratio of occupancies of states."""

    terms: Terms
    q: Floats
    v: Floats
    u: Floats


@dataclass(frozen=True)
class DensityRatio:
    """Held-out ratios of the target's discounted occupancy, begun anew at every row, to the log's distribution of states and actions; without unit.

    ratio [N, M]: at the logged state and action, per objective's discount, below 0 where the linear class misses the truth; coefficients [F, M, d] per
    fold that was held out; fold [N]: which of them made the row's; ridge [M]: the strength chosen; loss [M]: the minimax loss of the held-out ratios.
    """

    ratio: Floats
    coefficients: Floats
    fold: Ints
    ridge: Floats
    loss: Floats


# --- weights ---------------------------------------------------------------------------------------------------------------------------------


def naive_weights(target_density: ArrayLike, logger_density: ArrayLike, atom: ArrayLike | None = None) -> Floats:
    """rho_i = pi(a_i|s_i) / beta_{j(i)}(a_i|s_i), each row against the logger that acted (Agarwal et al. 2017, arXiv:1703.06180).

    target_density, logger_density [N]: densities (or probabilities) of the executed action, in the same unit; NaN where not known. atom [N] marks
    actions exactly on a bound: weight 0 whatever the densities. Infinite where the target acts and the logger never does.
    """
    target, logger = as_vector("target_density", target_density), as_vector("logger_density", logger_density)
    refuse_other_rows(target_density=target, logger_density=logger)
    refuse_negative(target_density=target, logger_density=logger)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(target == 0, 0.0, target / logger)
    if atom is not None:
        weights = np.where(as_flags("atom", atom, len(target)), 0.0, weights)
    return weights


def balanced_weights(target_density: ArrayLike, logger_densities: ArrayLike, logger_shares: ArrayLike, atom: ArrayLike | None = None) -> Floats:
    """rho_i = pi(a_i|s_i) / sum_k share_k(s_i) beta_k(a_i|s_i): the mixture of all loggers as the one logger.

    Agarwal et al. 2017, "Effective evaluation using logged bandit feedback from multiple loggers", arXiv:1703.06180.
    Never more variance than the naive weights; needs the law of every logger at every row. target_density [N]; logger_densities [N, K];
    logger_shares [K] or [N, K]: probability with which each logger was assigned to act, summing to 1. A logger with share 0 may be NaN.
    """
    target, loggers = as_vector("target_density", target_density), np.asarray(logger_densities, dtype=np.float64)
    if loggers.ndim != 2:
        raise RequestError(f"logger_densities: expected [rows, loggers], got an array of shape {loggers.shape}")
    shares = np.asarray(logger_shares, dtype=np.float64)
    if shares.shape not in (loggers.shape, loggers.shape[1:]):
        raise RequestError(f"logger_shares: expected shape {loggers.shape[1:]} or {loggers.shape}, got {shares.shape}")
    refuse_negative(logger_shares=shares)
    if not np.allclose(shares.sum(-1), 1.0, rtol=0, atol=1e-6):
        raise RequestError("logger_shares: expected shares that sum to 1; give the probability with which each logger was assigned to act")
    mixture = np.where(shares > 0, shares * loggers, 0.0).sum(1)
    return naive_weights(target, mixture, atom)


def inverse_variance_weights(weights: ArrayLike, logger: ArrayLike, rewards: ArrayLike | None = None) -> Floats:
    """rho_i n lambda_{j(i)}, lambda_k = (1 / s_k) / sum_j (n_j / s_j): every logger's naive estimate, weighted by the inverse of its variance.

    The weighted estimator of Agarwal et al. 2017, arXiv:1703.06180, theorem 2: never more variance than the naive weights, and unlike the balanced
    ones it needs no law but that of the logger that acted. weights [N]: `naive_weights`, NaN where not known; logger [N]: which logger acted, any
    integers; n_k: its rows with a known weight, n their sum. s_k: variance of rho r over them for rewards [N] of one objective; without rewards the
    mean of rho^2, which bounds it for every outcome in [-1, 1] and chooses nothing by what happened: right for several objectives at once.

    A logger that shows no variance (fewer than two known rows, or nothing but weight 0, so that nothing says that it covers the target) gets NaN: its
    rows are left out and counted as not measured. Infinite weights stay infinite and are refused where they are used.
    """
    naive = as_vector("weights", weights)
    refuse_negative(weights=naive)
    ids = np.asarray(logger)
    if ids.shape != naive.shape or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"logger: expected {len(naive)} whole numbers, got shape {ids.shape} of {ids.dtype}")
    acted = clusters_of(ids, weights=naive)
    known = np.isfinite(naive)
    products = np.where(known, naive, 0.0)
    if rewards is not None:
        outcome = as_vector("rewards", rewards)
        refuse_other_rows(weights=naive, rewards=outcome)
        known &= np.isfinite(outcome)
        products = np.where(known, products * outcome, 0.0)
    counts = acted.sums(known)
    if rewards is None:
        variance = ratio_or_zero(acted.sums(np.square(products)), counts)
    else:
        deviation = np.where(known, products - ratio_or_zero(acted.sums(products), counts)[acted.index], 0.0)
        variance = ratio_or_zero(acted.sums(np.square(deviation)), counts - 1)
    usable = (counts >= 2) & (variance > 0)
    precision = ratio_or_zero(usable.astype(np.float64), variance)
    share = np.where(usable, precision * counts[usable].sum() / max(float(counts @ precision), np.finfo(float).tiny), np.nan)
    return np.where(np.isinf(naive), naive, naive * share[acted.index])


def kernel_weights(
    actions: ArrayLike, target_actions: ArrayLike, logger_density: ArrayLike, bandwidth: ArrayLike, bounds: ArrayLike, atom: ArrayLike | None = None
) -> Floats:
    """rho_i = prod_k K(u_ik) / (h_k c_ik) / beta(a_i|s_i),  u_ik = (a_ik - pi_k(s_i)) / h_k,  K(u) = 3/4 (1 - u^2) on [-1, 1] (Epanechnikov)

    Kallus and Zhou 2018, "Policy evaluation and optimization with continuous treatments", arXiv:1802.06037, with a product kernel. c_ik is the share of
    the kernel around pi_k(s_i) that lies within the bounds (the cut-and-normalised boundary kernel of Gasser and Müller 1979), so that the smoothed
    target is a law on the allowed actions and its weights average 1, at the bounds too: in effect the target plays pi(s) with noise as wide as h.

    actions, target_actions [N, A] (or [N] for one dimension) in the actions' own units; logger_density [N]: joint density of the logged action, in
    the product of these units to the power -1, NaN where not known; bandwidth [A] or one number, above 0; bounds [A, 2]: least and greatest allowed
    action; atom [N]: actions that have a probability instead of a density: weight 0, as in `naive_weights`.
    """
    taken, wanted, limits = as_finite_table("actions", actions), as_finite_table("target_actions", target_actions), np.asarray(bounds, dtype=np.float64)
    width = taken.shape[1]
    if wanted.shape != taken.shape:
        raise RequestError(f"target_actions: expected the shape of actions {taken.shape}, got {wanted.shape}")
    if limits.shape != (width, 2) or not (np.isfinite(limits).all() and (limits[:, 0] < limits[:, 1]).all()):
        raise RequestError(f"bounds: expected {width} pairs of a least and a greater allowed action, got {limits.tolist()}")
    reach = np.asarray(bandwidth, dtype=np.float64)
    if reach.shape not in {(), (width,)} or not (np.isfinite(reach).all() and (reach > 0).all()):
        raise RequestError(f"bandwidth: expected {width} positive numbers or one, got {reach.tolist()}")
    outside = ((wanted < limits[:, 0]) | (wanted > limits[:, 1])).any(1)
    if outside.any():
        raise RequestError(f"target_actions: row {int(np.flatnonzero(outside)[0])} is outside the bounds")

    def below(u: Floats) -> Floats:
        """Share of the kernel to the left of u."""
        u = np.clip(u, -1.0, 1.0)
        return (2 + 3 * u - u**3) / 4

    density = np.ones(len(taken))
    for one, other, h, (least, greatest) in zip(taken.T, wanted.T, np.broadcast_to(reach, width), limits, strict=True):
        within = below((greatest - other) / h) - below((least - other) / h)
        density *= 0.75 * np.maximum(0.0, 1 - np.square((one - other) / h)) / (h * within)
    return naive_weights(density, logger_density, atom)


# --- one step --------------------------------------------------------------------------------------------------------------------------------


def inverse_propensity(rewards: ArrayLike, weights: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/n) sum_i rho_i r_i over the n rows with a weight and an outcome.

    Horvitz and Thompson 1952; for policies Strehl et al. 2010, arXiv:1003.0120. rewards [N] or [N, M], weights [N], player [N].
    """
    return _weighted_mean("inverse_propensity", rewards, weights, player, normalised=False)


def self_normalised(rewards: ArrayLike, weights: ArrayLike, player: ArrayLike) -> Terms:
    """V = sum_i rho_i r_i / sum_i rho_i over the rows with a weight and an outcome.

    Swaminathan and Joachims 2015, "The self-normalized estimator for counterfactual learning" (NIPS). Never outside the rewards' range.
    """
    return _weighted_mean("self_normalised", rewards, weights, player, normalised=True)


def _weighted_mean(estimator: str, rewards: ArrayLike, weights: ArrayLike, player: ArrayLike, *, normalised: bool) -> Terms:
    reward, weight = as_table("rewards", rewards), as_vector("weights", weights)
    clusters = clusters_of(player, rewards=reward, weights=weight)
    known, no_law = usable_weights(weight)
    law = overlap_and_mean(known, clusters)
    numerators, denominators, supports, refusals = [], [], [], []
    for outcome in reward.T:
        measured = np.isfinite(known) & np.isfinite(outcome)
        path_weight = np.where(measured, known, 0.0)
        numerators.append([clusters.sums(path_weight * np.where(measured, outcome, 0.0))])
        denominators.append([clusters.sums(path_weight if normalised else measured)])
        supports.append(support_of(path_weight, measured, law, clusters))
        refusals.append(no_law or no_support(path_weight, measured, clusters))
    return terms_of(estimator, clusters, numerators, denominators, supports, refusals)


def direct_method(v: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/N) sum_i v(s_i), the model's word alone; v [N] or [N, M] from `fitted_q`.

    Its interval holds the spread of the states and not the model's own error, so it is never trusted.
    """
    values = as_table("v", v)
    clusters = clusters_of(player, v=values)
    everyone = np.ones(len(values))
    support = Support(float(len(values)), float(len(clusters.players)), None, None, measured=1.0, mean_weight=1.0, modelled=True)
    refusals = [no_model(column, column) for column in values.T]
    numerators = [[clusters.sums(column)] for column in values.T]
    return terms_of("direct_method", clusters, numerators, [[clusters.sums(everyone)]] * len(numerators), [support] * len(numerators), refusals)


def doubly_robust(rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/N) sum_i v(s_i) + (1/n) sum_i rho_i (r_i - q(s_i, a_i)), the first over all N rows, the second over the n with weight and outcome.

    Dudik, Langford and Li 2011, arXiv:1103.4601: right when the weights are right or the model is.
    """
    return _one_step("doubly_robust", rewards, weights, q, v, player, normalised=False)


def self_normalised_doubly_robust(rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/N) sum_i v(s_i) + sum_i rho_i (r_i - q(s_i, a_i)) / sum_i rho_i (Thomas and Brunskill 2016, arXiv:1604.00923, with one step)."""
    return _one_step("self_normalised_doubly_robust", rewards, weights, q, v, player, normalised=True)


def switch_doubly_robust(
    rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike, *, thresholds: Sequence[float] | None = None
) -> Terms:
    """V = (1/N) sum_i v(s_i) + (1/n) sum_i rho_i 1(rho_i <= tau) (r_i - q(s_i, a_i)): the model alone where the weight is above the threshold.

    Wang, Agarwal and Dudik 2017, "Optimal and adaptive off-policy evaluation in contextual bandits", arXiv:1612.01205, SWITCH with the doubly robust
    estimator below tau. Weights are dropped on purpose: the verdict says what share of them, and does not trust the interval, which leaves out the
    model's error there, above `LARGEST_CHANGED`. thresholds: those that `slope` chooses among, per objective; one alone is taken as it is;
    infinity is the doubly robust estimator, 0 the direct method. By default: infinity, then the quantiles `THRESHOLDS` of the weights that are not 0.
    """
    rewards, q, v, weight = as_table("rewards", rewards), as_table("q", q), as_table("v", v), as_vector("weights", weights)
    if thresholds is None:
        positive = weight[np.isfinite(weight) & (weight > 0)]
        thresholds = [math.inf, *(np.quantile(positive, THRESHOLDS).tolist() if len(positive) else ())]

    def candidate(threshold: float) -> Terms:
        def kept(known: Floats) -> Floats:
            return np.where(known <= threshold, known, 0.0)

        done = f"goes to decisions that would count more than {threshold:.3g} times, for which the model answers alone"
        return _one_step("switch_doubly_robust", rewards, weight, q, v, player, normalised=False, setting=threshold, kept=kept, done=done)

    return slope(candidate(threshold) for threshold in _settings("thresholds", thresholds))


def shrunk_doubly_robust(
    rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike, *, shrinkages: Sequence[float] | None = None
) -> Terms:
    """V = (1/N) sum_i v(s_i) + (1/n) sum_i lambda rho_i / (rho_i^2 + lambda) (r_i - q(s_i, a_i)): doubly robust with optimistic shrinkage (DRos).

    Su, Dimakopoulou, Krishnamurthy and Dudik 2020, "Doubly robust off-policy evaluation with shrinkage", arXiv:1907.09623. Weights are shrunk on purpose:
    the verdict says by what share, as in `switch_doubly_robust`. shrinkages: the lambdas that `slope` chooses among, per objective; one alone is
    taken as it is; infinity is the doubly robust estimator, 0 the direct method. By default: infinity, then `SHRINKAGES` times the mean square weight.
    """
    rewards, q, v, weight = as_table("rewards", rewards), as_table("q", q), as_table("v", v), as_vector("weights", weights)
    if shrinkages is None:
        finite = weight[np.isfinite(weight)]
        square = float(np.square(finite).mean()) if len(finite) else 0.0
        shrinkages = [math.inf, *(square * each for each in SHRINKAGES if square > 0)]

    def candidate(shrinkage: float) -> Terms:
        def kept(known: Floats) -> Floats:
            return known / (1 + np.square(known) / shrinkage) if shrinkage > 0 else 0.0 * known

        done = f"is taken away, most from decisions that would count most (shrinkage {shrinkage:.3g})"
        return _one_step("shrunk_doubly_robust", rewards, weight, q, v, player, normalised=False, setting=shrinkage, kept=kept, done=done)

    return slope(candidate(shrinkage) for shrinkage in _settings("shrinkages", shrinkages))


def kernel_smoothed(
    rewards: ArrayLike,
    actions: ArrayLike,
    target_actions: ArrayLike,
    logger_density: ArrayLike,
    bounds: ArrayLike,
    player: ArrayLike,
    *,
    q: ArrayLike | None = None,
    v: ArrayLike | None = None,
    normalised: bool = True,
    bandwidths: Sequence[float] = BANDWIDTHS,
    corrected: bool = True,
    atom: ArrayLike | None = None,
) -> Terms:
    """A deterministic continuous target, valued by `kernel_weights` in place of the weights that it does not have:

        V(h) = (1/n) sum_i rho_i r_i;  sum_i rho_i r_i / sum_i rho_i (`normalised`);  with q and v: mean_i v(s_i) + the same of r_i - q(s_i, a_i)

    Kallus and Zhou 2018, arXiv:1802.06037, the plain, the self-normalised and the doubly robust form; v [N] or [N, M] is q at the target's own action.
    bandwidths: multiples of each action's standard deviation over the log; `slope` chooses among them, per objective, from the narrowest, which has least
    bias, to the widest. Others as in `kernel_weights`.

    A bandwidth that is right for the error is too wide for an interval: its bias, of the order h^2, is as large as the standard error. `corrected`
    (robust bias correction, Calonico, Cattaneo and Titiunik 2014; the generalised jackknife of Schucany and Sommers 1977) therefore answers with
    2 V(h) - V(sqrt(2) h) at the chosen h, in which h^2 cancels, and has its interval drawn on that. Where the target plays at a bound the bias is of the order
    h and does not cancel: the weight of rows whose kernel a bound cuts is counted as changed on purpose, and told.
    """
    taken, wanted = as_finite_table("actions", actions), as_finite_table("target_actions", target_actions)
    scale = taken.std(axis=0)
    limits = np.asarray(bounds, dtype=np.float64)
    if limits.shape == (taken.shape[1], 2):
        scale = np.where(scale > 0, scale, limits[:, 1] - limits[:, 0])
    if (q is None) != (v is None):
        raise RequestError("q, v: expected both or neither")
    rewards, q, v = as_table("rewards", rewards), None if q is None else as_table("q", q), None if v is None else as_table("v", v)

    def candidate(step: float) -> Terms:
        weights = kernel_weights(taken, wanted, logger_density, step * scale, limits, atom)
        if q is None or v is None:
            found = (self_normalised if normalised else inverse_propensity)(rewards, weights, player)
        else:
            found = (self_normalised_doubly_robust if normalised else doubly_robust)(rewards, weights, q, v, player)
        cut = ((wanted - step * scale < limits[:, 0]) | (wanted + step * scale > limits[:, 1])).any(1)
        finite = np.where(np.isfinite(weights), weights, 0.0)
        share = float(finite[cut].sum() / finite.sum()) if finite.any() else 0.0
        done = f"stands where a bound cuts off similar actions (bandwidth {step:.3g})"
        supports = tuple(replace(support, setting=step, changed=share, done=done) for support in found.support)
        return replace(found, estimator=f"kernel_{found.estimator}", support=supports)

    # 99 %: with six bandwidths, all of whose comparisons are to hold at once (the union bound of SLOPE's theorem), 95 % stops too early by chance
    chosen = slope((candidate(step) for step in sorted(_settings("bandwidths", bandwidths))), level=0.99)
    if not corrected:
        return chosen
    numerator, denominator = (np.concatenate([part, np.zeros_like(part)], axis=2) for part in (chosen.numerator, chosen.denominator))
    terms = chosen.numerator.shape[2]
    refusals = list(chosen.refusals)
    for step in {support.setting for support in chosen.support if support.setting is not None}:
        wider = candidate(math.sqrt(2) * step)
        for objective, support in enumerate(chosen.support):
            if support.setting == step:
                numerator[:, objective, :terms] *= 2
                numerator[:, objective, terms:] = -wider.numerator[:, objective]
                denominator[:, objective, terms:] = wider.denominator[:, objective]
                refusals[objective] = refusals[objective] or wider.refusals[objective]
    return replace(chosen, estimator=f"{chosen.estimator}_corrected", numerator=numerator, denominator=denominator, refusals=tuple(refusals))


def _settings(name: str, values: Sequence[float]) -> list[float]:
    """Thresholds and shrinkages from the largest down (least bias first); not negative."""
    settings = sorted((float(value) for value in values), reverse=True)
    if not settings or not all(value >= 0 for value in settings):
        raise RequestError(f"{name}: expected at least one number, none of them below 0, got {list(values)}")
    return settings


def _one_step(
    estimator: str,
    rewards: ArrayLike,
    weights: ArrayLike,
    q: ArrayLike,
    v: ArrayLike,
    player: ArrayLike,
    *,
    normalised: bool,
    setting: float | None = None,
    kept: Callable[[Floats], Floats] | None = None,
    done: str = LESSENED,
) -> Terms:
    """Doubly robust for one step; `kept`: what an estimator that changes weights makes of them, `done`: that in words, as in `Support`."""
    reward, weight, value, action_value = as_table("rewards", rewards), as_vector("weights", weights), as_table("v", v), as_table("q", q)
    clusters = clusters_of(player, rewards=reward, weights=weight, v=value, q=action_value)
    known, no_law = usable_weights(weight)
    law = overlap_and_mean(known, clusters)
    used = known if kept is None else kept(known)
    everyone = clusters.sums(np.ones(len(weight)))
    numerators, denominators, supports, refusals = [], [], [], []
    for outcome, model, action_model in zip(reward.T, value.T, action_value.T, strict=True):
        measured = np.isfinite(known) & np.isfinite(outcome)
        whole, left = (np.where(measured, each, 0.0) for each in (known, used))
        surprise = np.where(measured, outcome - action_model, 0.0)
        numerators.append([clusters.sums(model), clusters.sums(left * surprise)])
        denominators.append([everyone, clusters.sums(left if normalised else measured)])
        support = support_of(left, measured, law, clusters)
        if kept is not None:
            gone = 1 - float(left.sum()) / float(whole.sum()) if whole.any() else 0.0
            support = replace(support, modelled=not left.any(), changed=max(gone, 0.0), setting=setting, done=done)
        supports.append(support)
        refusals.append(no_law or no_model(model, action_model) or no_support(whole, measured, clusters))
    return terms_of(estimator, clusters, numerators, denominators, supports, refusals)


def slope(candidates: Iterable[Terms], *, level: float = 0.95) -> Terms:
    """Per objective, of one estimator under growing bias (thresholds falling, bandwidths widening) the last that all before it can bear:

        the largest i with |V_i - V_j| <= z SE(V_i - V_j) for all j < i, and the same for all smaller i;    z: normal quantile of `level`

    SLOPE, Su, Srinath and Krishnamurthy 2020, "Adaptive estimator selection for off-policy evaluation", arXiv:2002.07729, which compares with the sum of the
    two widths. That is the bound for estimates on two logs; these are on one, so the difference has a standard error of its own (by player, as in
    `paired_difference`), and Lepski's comparison, which SLOPE rests on, holds with it. It is never wider, so less bias is let in: switching on 300
    logs of 500 rows with a poor model, a bias of 0.01 and a root mean square error of 0.11 instead of 0.32 and 0.35. No truth is looked at.

    Candidates come with their bias growing and are read one at a time; one that is refused, or no more precise than one before it, is passed over.
    Where all are refused, the last one's reason stands.
    """
    refuse_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    chosen: Terms | None = None
    borne: list[list[tuple[float, Floats]]] = []
    closed: list[bool] = []
    for terms in candidates:
        if chosen is None:
            objectives = len(terms.refusals)
            borne, closed = [[] for _ in range(objectives)], [False] * objectives
            chosen = replace(terms, numerator=terms.numerator.copy(), denominator=terms.denominator.copy())
        if terms.numerator.shape != chosen.numerator.shape or not np.array_equal(terms.players, chosen.players):
            raise RequestError("slope: expected candidates on the same rows, players and objectives")
        supports, refusals = list(chosen.support), list(chosen.refusals)
        pulls = terms.influences().sum(2).T
        for objective, value in enumerate(terms.values().tolist()):
            before = borne[objective]
            if terms.refusals[objective] is None and not closed[objective]:
                # sums of players, so that what is kept of each candidate stays small however many there are
                pull = np.bincount(np.arange(pulls.shape[1]) % POOLED_PLAYERS, weights=pulls[objective]).astype(np.float64)
                correction = len(pull) / max(len(pull) - 1, 1)
                closed[objective] = any(abs(value - other) > z * math.sqrt(correction * float(np.square(pull - its).sum())) for other, its in before)
                if closed[objective] or any(pull @ pull >= its @ its for _, its in before):
                    continue
                before.append((value, pull))
            elif before:
                continue
            chosen.numerator[:, objective], chosen.denominator[:, objective] = terms.numerator[:, objective], terms.denominator[:, objective]
            supports[objective], refusals[objective] = terms.support[objective], terms.refusals[objective]
        chosen = replace(chosen, support=tuple(supports), refusals=tuple(refusals))
    if chosen is None:
        raise RequestError("slope: expected at least one candidate")
    return chosen


def estimate_bounded(
    rewards: ArrayLike, weights: ArrayLike, player: ArrayLike, *, largest_weight: float, low: ArrayLike, high: ArrayLike, level: float = 0.95
) -> tuple[Estimate | Refusal, ...]:
    """`self_normalised` with an interval that holds at every number of players: all values t in [low, high] for which

        |mean_p Z_p(t)| <= sqrt(2 s^2(t) l / n) + 7 R l / (3 (n - 1)),     Z_p(t) = sum_{i of p} rho_i (r_i - t)
        R = L W (high - low),  l = ln(4 / (1 - level))

    The empirical Bernstein bound (Maurer and Pontil 2009, arXiv:0907.3740, theorem 4) of Z, whose mean is 0 at the true ratio, inverted as Fieller
    (1954) did; n players with a weight and an outcome, at most L rows each, taken as given. rewards [N] or [N, M], weights [N], player [N];
    largest_weight W: the greatest weight there can be, known from the laws and not read off the log (a floor under every propensity gives one);
    low, high: one number or [M], the range that outcomes cannot leave. A player's own number of rows must not depend on the actions.
    """
    refuse_level(level)
    reward, weight = as_table("rewards", rewards), as_vector("weights", weights)
    terms = self_normalised(reward, weight, player)
    clusters = clusters_of(player, rewards=reward, weights=weight)
    heavy = np.flatnonzero(np.isfinite(weight) & (weight > largest_weight))
    if len(heavy) or not math.isfinite(largest_weight):
        where = f"row {int(heavy[0])} weighs {weight[heavy[0]]:g}" if len(heavy) else "expected a finite bound"
        raise RequestError(f"largest_weight: {where}, the bound is {largest_weight:g}")
    objectives = reward.shape[1]
    least, greatest = (np.broadcast_to(np.asarray(each, dtype=np.float64), objectives) for each in (low, high))
    if not (np.isfinite(least).all() and np.isfinite(greatest).all() and (least < greatest).all()):
        raise RequestError("low, high: expected finite numbers, the lower one first")
    beyond = (reward < least) | (reward > greatest)
    if beyond.any():
        row, objective = (int(each[0]) for each in np.nonzero(beyond))
        raise RequestError(f"rewards: row {row} holds {reward[row, objective]:g}, outside {least[objective]:g} to {greatest[objective]:g}")
    answers: list[Estimate | Refusal] = []
    errors, values = terms.standard_errors(), terms.values()
    log_term = math.log(4 / (1 - level))
    for objective, reason in enumerate(terms.refusals):
        if reason is not None:
            answers.append(Refusal("bounded_self_normalised", objective, reason))
            continue
        rows = clusters.sums(np.isfinite(weight) & np.isfinite(reward[:, objective]))
        there = rows > 0
        top, bottom, players = terms.numerator[there, objective, 0], terms.denominator[there, objective, 0], int(there.sum())
        a, b, value = float(least[objective]), float(greatest[objective]), float(values[objective])
        slack = 7 * float(rows.max()) * largest_weight * (b - a) * log_term / (3 * (players - 1))

        def gap(t: float, side: float, top: Floats = top, bottom: Floats = bottom, slack: float = slack) -> float:
            """Above 0 while t, on this side of the value, is still within the bound."""
            z = top - t * bottom
            return side * float(z.mean()) + math.sqrt(2 * float(z.var(ddof=1)) * log_term / len(z)) + slack

        # the gap is convex in t and above 0 at the value, so beyond it there is one end at most
        lower = a if gap(a, -1.0) >= 0 else _root(lambda t: gap(t, -1.0), a, value)
        upper = b if gap(b, 1.0) >= 0 else _root(lambda t: gap(t, 1.0), b, value)
        # nothing here rests on the normal approximation, so nothing is asked of the effective number of players
        support = terms.support[objective]
        words = verdict(replace(support, effective_players=math.inf), standard_error=float(errors[objective]))
        answers.append(
            Estimate(
                "bounded_self_normalised",
                objective,
                value,
                lower,
                upper,
                float(errors[objective]),
                support.ess,
                support.top_share,
                support.overlap,
                terms.rows,
                len(terms.players),
                words,
            )
        )
    return tuple(answers)


def _root(function: Callable[[float], float], outside: float, inside: float) -> float:
    """The end of an interval, from outside: `function` is below 0 at `outside` and not below 0 at `inside`; 100 halvings reach the last digit."""
    for _ in range(100):
        middle = (outside + inside) / 2
        if function(middle) < 0:
            outside = middle
        else:
            inside = middle
    return outside


# --- sequential ------------------------------------------------------------------------------------------------------------------------------


def per_decision(
    rewards: ArrayLike,
    weights: ArrayLike,
    v: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    steps: int | None = None,
    normalised: bool = False,
) -> Terms:
    """V = mean over rows i of  sum_{h < steps} g_{i,h} w_{i,h} r_{i+h}  +  g_{i,steps} w_{i,steps-1} v(s_{i+steps})

    along the player's own next decisions i+1, i+2, ... of row i, with w_{i,h} the product of the weights of rows i to i+h (w_{i,-1} = 1) and g_{i,h} the
    product of the discounts of rows i to i+h-1 (g_{i,0} = 1). Precup, Sutton and Singh 2000, "Eligibility traces for off-policy policy
    evaluation" (per-decision importance sampling); cut after `steps` decisions it is the partial importance sampling estimator of Thomas and
    Brunskill 2016, arXiv:1604.00923. `normalised` divides each step's w by its own mean (weighted per-decision). Every row is a
    start state: what is estimated is the mean over rows of the discounted sum from there on, had the target alone acted.

    rewards, v, discount [N] or [N, M]; weights [N]; following [N]: row of the player's next decision, -1 for none; discount: to that decision, 0
    where the episode terminated; truncated [N]: the log ended first (following is -1, discount above 0). steps None: to the end.
    A path that meets a truncated row, a missing outcome or a missing weight takes v of that row's state for all that is left (a table of zeros: nothing);
    like a terminated one it stays in the later steps' denominators with the weight that it has.
    """
    reward, weight, value = as_table("rewards", rewards), as_vector("weights", weights), as_table("v", v)
    clusters = clusters_of(player, rewards=reward, weights=weight, v=value)
    episode = _episode(reward, discount, following, truncated, clusters, steps=steps)
    known, no_law = usable_weights(weight)
    law = overlap_and_mean(known, clusters)
    numerators, denominators, supports, refusals = [], [], [], []
    for outcome, model, rate in zip(reward.T, value.T, episode.discount.T, strict=True):
        stops = ~np.isfinite(known) | ~np.isfinite(outcome) | (episode.truncated & (rate > 0))
        row, going = np.arange(len(reward)), np.ones(len(reward), dtype=bool)
        path, carry, total = np.ones(len(reward)), np.ones(len(reward)), np.zeros(len(reward))
        top, bottom, unreached = [np.zeros(len(reward))], [np.ones(len(reward))], 0.0
        for _ in range(episode.steps):
            stopping = going & stops[row]
            top[-1] += np.where(stopping, carry * path * model[row], 0.0)
            going = going & ~stopping
            path = np.where(going, path * known[row], path)
            earned = np.where(going, carry * path, 0.0)
            total += earned
            top.append(earned * np.where(going, outcome[row], 0.0))
            bottom.append(path if normalised else np.ones(len(reward)))
            if not earned.any():
                unreached = max(unreached, float(carry[going].sum()) / len(reward))
            carry = np.where(going, carry * rate[row], 0.0)
            going = going & (episode.following[row] >= 0)
            row = np.where(going, episode.following[row], row)
        top[-1] += np.where(going, carry * path * model[row], 0.0)
        measured = ~stops
        numerators.append([clusters.sums(column) for column in top])
        denominators.append([clusters.sums(column) for column in bottom])
        supports.append(replace(support_of(total, measured, law, clusters), unreached=unreached))
        refusals.append(no_law or no_model(model, model) or no_support(total, measured, clusters))
    return terms_of("weighted_per_decision" if normalised else "per_decision", clusters, numerators, denominators, supports, refusals)


def sequential_doubly_robust(
    rewards: ArrayLike,
    weights: ArrayLike,
    q: ArrayLike,
    v: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    steps: int | None = None,
    normalised: bool = False,
) -> Terms:
    """V = mean_i v(s_i) + sum_{h < steps} mean_i g_{i,h} w_{i,h} (r_{i+h} + d_{i+h} v(s_{i+h+1}) - q(s_{i+h}, a_{i+h}))

    with w, g as in `per_decision`. Jiang and Li 2016, arXiv:1511.03722, unrolled; `normalised` divides each step's weights by their
    own mean: the weighted doubly robust estimator of Thomas and Brunskill 2016, arXiv:1604.00923. To the end it is right when the
    weights are right or the model is; cut after `steps`, what the model gets wrong beyond them stays in, times g_{i,steps}.

    Arguments as in `per_decision`, and q [N] or [N, M]. A path that meets a truncated row or a missing weight is lost from there on, one
    that meets a missing outcome for that step. Lost paths hand what they stand for to those still on their way at the same step (redistribution to the right,
    Efron 1967), not to those that terminated, which stay with a correction of 0 and the weight that they had: else what ends early, and so is always seen
    to the end, would count too much. What makes a row truncated must be known before what follows it: all rows too near to the log's
    end to see a termination, not only those that nothing was seen to follow.
    """
    reward, weight, value, action_value = as_table("rewards", rewards), as_vector("weights", weights), as_table("v", v), as_table("q", q)
    clusters = clusters_of(player, rewards=reward, weights=weight, v=value, q=action_value)
    episode = _episode(reward, discount, following, truncated, clusters, steps=steps)
    known, no_law = usable_weights(weight)
    law = overlap_and_mean(known, clusters)
    next_row = np.where(episode.following >= 0, episode.following, 0)
    numerators, denominators, supports, refusals = [], [], [], []
    for outcome, model, action_model, rate in zip(reward.T, value.T, action_value.T, episode.discount.T, strict=True):
        lost_row = (episode.truncated & (rate > 0)) | ~np.isfinite(known)
        surprise = outcome + np.where(episode.following >= 0, rate * model[next_row], 0.0) - action_model
        measured_row = np.isfinite(outcome) & ~lost_row
        row, going = np.arange(len(reward)), np.ones(len(reward), dtype=bool)
        path, carry, stands_for, total = np.ones(len(reward)), np.ones(len(reward)), np.ones(len(reward)), np.zeros(len(reward))
        top, bottom, unreached = [model], [np.ones(len(reward))], 0.0
        for _ in range(episode.steps):
            stands_for = _hand_over(stands_for, going, ~lost_row[row])
            measured = _hand_over(stands_for, going, measured_row[row])
            path = np.where(going & (stands_for > 0), path * known[row], path)
            path_weight = measured * path
            earned = np.where(going, carry * path_weight, 0.0)
            total += earned
            top.append(earned * np.where(going & (measured > 0), surprise[row], 0.0))
            bottom.append(path_weight if normalised else measured)
            if not earned.any():
                unreached = max(unreached, float((carry * measured)[going].sum()) / len(reward))
            carry = np.where(going, carry * rate[row], 0.0)
            going = going & (episode.following[row] >= 0)
            row = np.where(going, episode.following[row], row)
        numerators.append([clusters.sums(column) for column in top])
        denominators.append([clusters.sums(column) for column in bottom])
        supports.append(replace(support_of(total, measured_row, law, clusters), unreached=unreached))
        refusals.append(no_law or no_model(model, action_model) or no_support(total, measured_row, clusters))
    name = "self_normalised_sequential_doubly_robust" if normalised else "sequential_doubly_robust"
    return terms_of(name, clusters, numerators, denominators, supports, refusals)


def magic(
    rewards: ArrayLike,
    weights: ArrayLike,
    q: ArrayLike,
    v: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    rng: np.random.Generator,
    steps: int | None = None,
    normalised: bool = True,
    level: float = 0.9,
) -> Terms:
    """V = sum_j x_j g_j over the step returns g_0 (the model alone), g_1, ..., g_J of `sequential_doubly_robust`, x >= 0, sum x = 1, with x least in

        x' (Omega + b b') x,     Omega: covariance of the g_j, by player,     b_j: distance of g_j from a confidence interval of g_J

    Thomas and Brunskill 2016, "Data-efficient off-policy policy evaluation for reinforcement learning", arXiv:1604.00923, MAGIC; the interval of g_J
    is the studentised one of `bootstrap_by_player` at `level` in place of their percentiles, and is made to hold g_J itself. Arguments as in
    `sequential_doubly_robust`. The verdict says what share of the mixture lies on returns shorter than the longest: their
    bias is in no interval. x is chosen per objective and taken as given by the interval.
    """
    from scipy.optimize import nnls

    terms = sequential_doubly_robust(rewards, weights, q, v, discount, following, truncated, player, steps=steps, normalised=normalised)
    terms = replace(terms, estimator="magic")
    usable = np.flatnonzero([reason is None for reason in terms.refusals])
    if not len(usable):
        return terms
    numerator, supports = terms.numerator.copy(), list(terms.support)
    players = len(terms.players)
    last = bootstrap_by_player(terms.numerator[:, usable], terms.denominator[:, usable], np.eye(len(usable)), rng=rng, level=level, resamples=200)
    influences = terms.influences()
    ratios = ratio_or_zero(terms.numerator.sum(0), terms.denominator.sum(0))
    for place, objective in enumerate(usable.tolist()):
        returns, pulls = np.cumsum(ratios[objective]), np.cumsum(influences[:, objective], axis=1)
        low, high = min(last.low[place], returns[-1]), max(last.high[place], returns[-1])
        bias = np.maximum(0, np.maximum(low - returns, returns - high))
        # rows of the root of Omega + b b': least squares with x >= 0 and one row of ones has, up to its length, the minimum on the simplex (Karush-Kuhn-Tucker)
        root = np.vstack([np.linalg.qr(math.sqrt(players / (players - 1)) * pulls, mode="r"), bias])
        size = float(np.abs(root).max())
        mixture = np.zeros(len(returns))
        mixture[-1] = 1.0
        if size > 0:
            found = nnls(np.vstack([root / size, np.ones(len(returns))]), np.append(np.zeros(len(root)), 1.0))[0]
            mixture = found / found.sum()
        # correction h is in every return longer than h
        numerator[:, objective] *= np.cumsum(mixture[::-1])[::-1]
        done = "is moved to sums of fewer decisions, which the model ends"
        supports[objective] = replace(supports[objective], changed=max(0.0, 1 - float(mixture[-1])), setting=None, done=done)
    return replace(terms, numerator=numerator, support=tuple(supports))


def marginal(
    rewards: ArrayLike,
    ratio: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    normalised: bool = False,
) -> Terms:
    """V = (1/n) sum_i w(s_i, a_i) r_i, or `normalised` sum_i w_i r_i / sum_i w_i (1 - d_i), over the n rows whose outcome and next decision are known.

    Marginalised importance sampling: Liu et al. 2018, arXiv:1810.12429; with ratios of states and actions the minimax weight learning of Uehara, Huang and
    Jiang 2020, arXiv:1910.12809. One ratio stands for the product of all weights on the way, so the variance does not grow with the horizon.
    ratio [N] or [N, M]: `density_ratio`'s; others as in `per_decision`. sum w (1 - d) / n is 1 for right ratios, whatever they are: its distance
    from 1 is told as the mean weight. The interval leaves out the ratio's own error, so it is never trusted: `marginal_doubly_robust` repairs that.
    """
    return _marginal("marginal", rewards, ratio, None, None, discount, following, truncated, player, normalised=normalised)


def marginal_doubly_robust(
    rewards: ArrayLike,
    ratio: ArrayLike,
    q: ArrayLike,
    v: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    normalised: bool = False,
) -> Terms:
    """V = mean_i v(s_i) + (1/n) sum_i w(s_i, a_i) (r_i + d_i v(s'_i) - q(s_i, a_i)), the second over the rows whose outcome and next decision are known.

    Double reinforcement learning: Kallus and Uehara 2020, arXiv:1908.08526, cross-fitted: `density_ratio` and `fitted_q` predict each player without
    that player. Right when the ratios are right or the model is; of least possible variance when both are, and their errors enter as a product.
    `normalised` divides by sum w (1 - d) instead of n. Arguments as in `marginal` and `sequential_doubly_robust`.
    """
    return _marginal("marginal_doubly_robust", rewards, ratio, q, v, discount, following, truncated, player, normalised=normalised)


def _marginal(
    estimator: str,
    rewards: ArrayLike,
    ratio: ArrayLike,
    q: ArrayLike | None,
    v: ArrayLike | None,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    normalised: bool,
) -> Terms:
    reward, ratios = as_table("rewards", rewards), as_table("ratio", ratio)
    ratios = np.broadcast_to(ratios, reward.shape) if ratios.shape[1:] == (1,) and len(ratios) == len(reward) else ratios
    if ratios.shape != reward.shape:
        raise RequestError(f"ratio: expected the shape of rewards {reward.shape}, got {ratios.shape}")
    value, action_value = (None, None) if q is None or v is None else (as_table("v", v), as_table("q", q))
    models = {} if value is None or action_value is None else {"v": value, "q": action_value}
    clusters = clusters_of(player, rewards=reward, **models)
    episode = _episode(reward, discount, following, truncated, clusters, steps=1)
    everyone = clusters.sums(np.ones(len(reward)))
    numerators, denominators, supports, refusals = [], [], [], []
    for objective, (outcome, weight, rate) in enumerate(zip(reward.T, ratios.T, episode.discount.T, strict=True)):
        measured = np.isfinite(outcome) & np.isfinite(weight) & ~(episode.truncated & (rate > 0))
        used = np.where(measured, weight, 0.0)
        surprise, reason, top, bottom = outcome, None, [], []
        if value is not None and action_value is not None:
            model, action_model = value[:, objective], action_value[:, objective]
            reason, top, bottom = no_model(model, action_model), [clusters.sums(model)], [everyone]
            surprise = outcome - action_model
            led = np.flatnonzero(episode.following >= 0)
            surprise[led] += rate[led] * model[episode.following[led]]
        ended = used * (1 - rate)
        numerators.append([*top, clusters.sums(used * np.where(measured, surprise, 0.0))])
        denominators.append([*bottom, clusters.sums(ended if normalised else measured)])
        size = np.abs(used)
        support = support_of(size, measured, overlap_and_mean(np.where(measured, ended, np.nan), clusters), clusters)
        negative = float(size[used < 0].sum()) / float(size.sum()) if size.any() else 0.0
        supports.append(replace(support, modelled=value is None, negative=negative))
        if not np.isfinite(weight).any():
            reason = reason or "there is no density ratio for this objective"
        elif normalised and float(ended.sum()) <= 0:
            reason = reason or "the density ratios, times 1 - discount, do not sum to a positive number"
        refusals.append(reason or no_support(size, measured, clusters))
    name = f"self_normalised_{estimator}" if normalised else estimator
    return terms_of(name, clusters, numerators, denominators, supports, refusals)


# --- everything fitted in one place ------------------------------------------------------------------------------------------------------------


def double_reinforcement(
    state: ArrayLike,
    logged: ArrayLike,
    target: ArrayLike,
    rewards: ArrayLike,
    weights: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    rng: np.random.Generator,
    free: int = 1,
    past: int = 0,
    folds: int = 5,
    groups: int = 20,
    largest_weight: float | None = None,
) -> DoubleReinforcement | Refusal:
    """V = mean_i v(s_i) + (1/n) sum_i u(s_i) rho_i (r_i + d_i v(s'_i) - q(s_i, a_i)): marginal doubly robust, with everything in it fitted here.

    Double reinforcement learning (Kallus and Uehara 2020, arXiv:1908.08526) with the ratio of occupancies split into what is known, the weight rho of the
    action, and a ratio of states alone, u(s) = E[w | s] with w the minimax ratio of `density_ratio`. So no model's error is left in the action's part;
    with a discount of 0 u is 1 and this is `doubly_robust`; else what the fits get wrong enters as a product of two errors. u below 0, where
    no ratio lies, is taken for 0 and its share told as `negative`; `overlap` and `mean_weight` are those of rho.

    rho above `largest_weight` counts as that much, by default the square root of the number of players (Ionides 2008, "Truncated importance sampling"): a bias
    that vanishes as the players grow, and no single decision on which all hangs. The share of the weight that this takes away is told as `changed`.

    u rests on features that hold all of the past that matters. That is checked: 1 + d rho u of the decision before, where there is one, has to say the
    same as u; by how many standard errors the two values lie apart is told as `apart`.

    Cross-fitted: a player's q, v and u come from the other folds. The refits leave out each of `groups` of players in turn, models and all, so that
    the interval holds the error of the fits too; not where every discount is 0, for with known weights any q is right on average and its spread shows.

    state [N, S]: features of the state, an intercept first, the first `free` not shrunk, the last `past` telling what was done to the player before, and what
    was expected to be done: those are for q alone, and shrunk `PAST_SHRUNK` times as much as others. Whoever happened to be treated well does well for a
    while: without these columns q takes him for a better player, and a target that treats all so for the maker of such. A target that acts alike
    all the time goes in them where no log went: a ratio that they enter would be noise. logged [N, A]: features of the logged action in its state;
    target [N, A]: their expectation under the target. Others as in `sequential_doubly_robust`. The ridge of q is chosen on held-out folds, as in
    `fitted_q`; that of u is `RATIO_RIDGE`. Refused with fewer players than groups; an objective without outcomes once some fold and group are left out
    has no model and is refused by name.

    Several targets on one log share most of the work: `logged_sums` once, then `reinforced` for each, which is all that this does.
    """
    log = logged_sums(state, logged, rewards, discount, following, truncated, player, rng=rng, free=free, past=past, folds=folds, groups=groups)
    return log if isinstance(log, Refusal) else reinforced(log, target, weights, largest_weight=largest_weight)


@dataclass(frozen=True)
class _Alike:
    """Objectives known in the same rows, whose discounts differ by a factor alone, summed per group of players over these rows, x being scaled.

    factors: (largest discount, objectives); there [N]: the rows; share [N]: discount over the largest; gram [G, d, d] = sum x x^T; moved [G, d, S] =
    sum share x s'^T with s' the next decision's state; earned [G, d, M] = sum x r; whole [G, d] = sum x; count [G]; metric [d, d]: the mean gram inverted.
    """

    factors: tuple[tuple[float, Ints], ...]
    there: Bools
    share: Floats
    gram: Floats
    moved: Floats
    earned: Floats
    whole: Floats
    count: Ints
    metric: Floats


@dataclass(frozen=True)
class LoggedSums:
    """What `reinforced` needs of a log whichever the target, made by `logged_sums`: checked arrays, the players' groups [N], sums over each group."""

    states: Floats
    logged: Floats
    reward: Floats
    episode: _Episode
    clusters: Clusters
    group: Ints
    groups: int
    folds: int
    free: int
    past: int
    scale: Floats
    counted: Bools
    alike: tuple[_Alike, ...]

    @property
    def after(self) -> Ints:
        """[N] the row of the next decision, 0 where there is none."""
        return np.maximum(self.episode.following, 0)


def logged_sums(
    state: ArrayLike,
    logged: ArrayLike,
    rewards: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    rng: np.random.Generator,
    free: int = 1,
    past: int = 0,
    folds: int = 5,
    groups: int = 20,
) -> LoggedSums | Refusal:
    """The part of `double_reinforcement` that no target changes; arguments as there."""
    states, actions, reward = as_finite_table("state", state), as_finite_table("logged", logged), as_table("rewards", rewards)
    if folds < 2 or groups % folds:
        raise RequestError(f"groups: expected a multiple of folds, and at least 2 folds, got {groups} and {folds}")
    if not 1 <= free <= states.shape[1] or np.ptp(states[:, 0]) > 0 or not states[0, 0]:
        raise RequestError(f"state, free: expected an intercept in the first column and 1 to {states.shape[1]} free ones, got {free}")
    if not 0 <= past <= states.shape[1] - free:
        raise RequestError(f"past: expected 0 to {states.shape[1] - free} columns behind the free ones, got {past}")
    clusters = clusters_of(player, state=states, logged=actions, rewards=reward)
    episode = _episode(reward, discount, following, truncated, clusters, steps=1)
    if len(clusters.players) < groups:
        return Refusal("double_reinforcement", None, f"fewer than {groups} players: too few to refit the models without some of them")
    group = (rng.permutation(len(clusters.players)) % groups)[clusters.index]
    scale = np.sqrt(np.concatenate([np.einsum("nd,nd->d", each, each) for each in (states, actions)]) / len(states))
    scale[scale == 0] = 1.0
    counted = np.isfinite(reward) & ~(episode.truncated[:, None] & (episode.discount > 0))
    largest = np.where(episode.discount.any(0), episode.discount.max(0), 1.0)
    patterns: dict[bytes, list[int]] = {}
    for objective in range(reward.shape[1]):
        same = (episode.discount[:, objective] / largest[objective]).tobytes() + counted[:, objective].tobytes()
        patterns.setdefault(hashlib.sha256(same).digest(), []).append(objective)
    after, by_group = np.maximum(episode.following, 0), [np.flatnonzero(group == each) for each in range(groups)]
    squares: dict[bytes, tuple[Floats, Floats]] = {}
    found = []
    for each in patterns.values():
        objectives = np.array(each)
        there, share = counted[:, each[0]], episode.discount[:, each[0]] / largest[each[0]]
        seen = squares.get(hashlib.sha256(there.tobytes()).digest())
        gram = np.zeros((groups, len(scale), len(scale))) if seen is None else seen[0]
        moved, earned = np.zeros((groups, len(scale), states.shape[1])), np.zeros((groups, len(scale), reward.shape[1]))
        whole, count = np.zeros((groups, len(scale))), np.zeros(groups, dtype=np.int64)
        for place, rows in enumerate(by_group):
            mine = rows[there[rows]]
            x: Floats = np.hstack([states[mine], actions[mine]]) / scale
            if seen is None:
                gram[place] = x.T @ x
            if share.any():
                moved[place] = x.T @ (states[after[mine]] / scale[: states.shape[1]] * share[mine, None])
            earned[place][:, objectives] = x.T @ reward[np.ix_(mine, objectives)]
            whole[place], count[place] = x.sum(0), len(mine)
        metric = np.linalg.pinv(gram.sum(0) / max(int(count.sum()), 1), hermitian=True) if seen is None else seen[1]
        squares[hashlib.sha256(there.tobytes()).digest()] = gram, metric
        factors = tuple((float(rate), objectives[largest[objectives] == rate]) for rate in np.unique(largest[objectives]))
        found.append(_Alike(factors, there, share, gram, moved, earned, whole, count, metric))
    return LoggedSums(states, actions, reward, episode, clusters, group, groups, folds, free, past, scale, counted, tuple(found))


def reinforced(log: LoggedSums, target: ArrayLike, weights: ArrayLike, *, largest_weight: float | None = None) -> DoubleReinforcement:
    """`double_reinforcement` of one target on what `logged_sums` made of the log; target [N, A] and weights [N] as there."""
    wanted, weight = as_finite_table("target", target), as_vector("weights", weights)
    refuse_other_rows(rewards=log.reward, target=wanted, weights=weight)
    if wanted.shape != log.logged.shape:
        raise RequestError(f"target: expected the shape of logged {log.logged.shape}, got {wanted.shape}")
    reward, episode, clusters, group, groups, folds = log.reward, log.episode, log.clusters, log.group, log.groups, log.folds
    known, no_law = usable_weights(weight)
    law, whole_weight = overlap_and_mean(known, clusters), float(np.nansum(known))
    limit = math.sqrt(len(clusters.players)) if largest_weight is None else largest_weight
    known = np.minimum(known, limit)
    changed = 1 - float(np.nansum(known)) / whole_weight if whole_weight > 0 else 0.0
    measured = log.counted & np.isfinite(known)[:, None]
    theta, gamma = _fits(log, wanted)

    rows, objectives = reward.shape
    q, v, u = (np.full(reward.shape, np.nan, order="F") for _ in range(3))  # as `as_table` wants them, which would copy them else
    pulled, valued = np.zeros((groups, objectives)), np.zeros((groups, objectives))  # summed over the rows left in each refit
    at_once = max(1, REFITTED_NUMBERS // (groups * objectives))
    for place in range(groups):
        fold, mine = place % folds, np.flatnonzero(group == place)
        refitted = np.arange(groups) % folds != fold  # the groups without which this group's model is another one
        pull, value = np.zeros((1 + np.count_nonzero(refitted), objectives)), np.zeros((1 + np.count_nonzero(refitted), objectives))
        for some in np.array_split(mine, max(1, math.ceil(len(mine) / at_once))):
            x_target, next_target = (np.hstack([log.states[each], wanted[each]]) for each in (some, log.after[some]))
            q_left = _product(np.hstack([log.states[some], log.logged[some]]), theta[fold])
            follows = np.where((episode.following[some] >= 0)[:, None], episode.discount[some], 0.0)
            surprise = reward[some][:, None] + follows[:, None] * _product(next_target, theta[fold]) - q_left
            u_left = _product(log.states[some], gamma[fold])
            used = np.where(np.isfinite(known[some]), known[some], 0.0)[:, None, None]
            pull += np.where(measured[some][:, None], np.maximum(u_left, 0) * used * surprise, 0.0).sum(0)
            value += _product(x_target.sum(0, keepdims=True), theta[fold])[0]
            q[some], v[some], u[some] = q_left[:, 0], x_target @ theta[fold][:, 0], u_left[:, 0]
        for total, part in ((pulled, pull), (valued, value)):
            total[refitted] += part[1:]
            total[~refitted & (np.arange(groups) != place)] += part[0]
    begun, used_in = np.bincount(group, minlength=groups), np.stack([np.bincount(group, column, groups) for column in measured.T], 1)
    refits = valued / (rows - begun)[:, None] + ratio_or_zero(pulled, used_in.sum(0) - used_in)

    occupied = np.maximum(u, 0)

    def summed(ratio: Floats) -> Terms:
        sequence = (episode.discount, episode.following, episode.truncated, clusters.players[clusters.index])
        return _marginal("double_reinforcement", reward, ratio, q, v, *sequence, normalised=False)

    terms = summed(occupied * known[:, None])
    # the states of today are those that the log begins with, or that the target came to from yesterday's: what u says there can be checked one step back
    led = np.flatnonzero(episode.following >= 0)
    before = np.full(rows, -1)
    before[episode.following[led]] = led
    came = (before >= 0) & np.isfinite(known[before])
    back = np.asfortranarray(episode.discount[before])  # in place, for it may be as large as the log
    back *= np.where(came, known[before], 0.0)[:, None]
    back *= occupied[before]
    back += 1
    back[before < 0] = 1.0
    back[(before >= 0) & ~came] = occupied[(before >= 0) & ~came]
    back *= known[:, None]
    del occupied
    gap = paired_difference(summed(back), terms)
    apart = np.where(episode.discount.any(0), np.abs(ratio_or_zero(np.nan_to_num(gap.values()), gap.standard_errors())), 0.0)
    below = ratio_or_zero(np.maximum(-u, 0).sum(0), np.abs(u).sum(0))
    terms = replace(
        terms,
        refits=refits if episode.discount.any() else None,  # with a ratio of 1 no error of q is left: any q gives an unbiased value, and the spread shows
        group=group[np.unique(clusters.index, return_index=True)[1]],
        support=tuple(
            replace(
                support,
                overlap=law[0],
                mean_weight=law[1],
                changed=changed,
                setting=limit if changed else None,
                negative=float(share),
                apart=float(z),
                done=f"is taken away, so that no decision counts more than {limit:.3g} times",
            )
            for support, share, z in zip(terms.support, below, apart, strict=True)
        ),
        refusals=tuple(no_law or reason for reason in terms.refusals),
    )
    return DoubleReinforcement(terms, q, v, u)


def _product(x: Floats, coefficients: Floats) -> Floats:
    """x [n, d] @ coefficients [d, L, M] as one product of two matrices, [n, L, M]."""
    found: Floats = x @ coefficients.reshape(len(coefficients), -1)
    return found.reshape(len(x), *coefficients.shape[1:])


def _fits(log: LoggedSums, target: Floats) -> tuple[list[Floats], list[Floats]]:
    """Per fold that is held out: coefficients of q [d, L, M] and of u [S, L, M], fitted on all others, then without one more group, for each not in the fold.

    Everything is a function of sums over groups of players, so leaving one out costs small systems of equations and no pass over the rows.
    """
    groups, folds, scale, after = log.groups, log.folds, log.scale, log.after
    states, width, objectives = log.states.shape[1], len(scale), log.reward.shape[1]
    left = 1 + groups - groups // folds
    theta, gamma = ([np.full((size, left, objectives), np.nan) for _ in range(folds)] for size in (width, states))
    by_group = [np.flatnonzero(log.group == each) for each in range(groups)]
    starts = np.stack([np.concatenate([log.states[mine].sum(0), target[mine].sum(0)]) for mine in by_group]) / scale
    begun = np.array([len(mine) for mine in by_group])
    for each in log.alike:
        moved = np.zeros_like(each.gram)
        if each.share.any():
            for place, mine in enumerate(rows_of[each.there[rows_of]] for rows_of in by_group):
                x = np.hstack([log.states[mine], log.logged[mine]]) / scale
                moved[place, :, :states] = each.moved[place]
                moved[place, :, states:] = x.T @ (target[after[mine]] / scale[states:] * each.share[mine, None])
        _fit_alike(each, moved, starts, begun, log, theta, gamma)
    return theta, gamma


def _fit_alike(each: _Alike, moved: Floats, starts: Floats, begun: Ints, log: LoggedSums, theta: list[Floats], gamma: list[Floats]) -> None:
    """Fill in `theta`, `gamma` for the objectives of `each`; scaled: moved [G, d, d] = sum share x x'^T, starts [G, d] = sum x_target over begun [G] rows."""
    states, width, folds, scale = log.states.shape[1], len(log.scale), log.folds, log.scale
    fold = np.arange(log.groups) % folds
    penalty = np.diag(np.r_[np.zeros(log.free), np.ones(states - log.free - log.past), np.full(log.past, PAST_SHRUNK), np.ones(width - states)])
    least = 1e-9 * np.eye(width)  # columns that are sums of others must not divide by 0
    rated = states - log.past
    seen = np.r_[0:rated, states:width]  # the columns that the ratio rests on
    smooth = 1e-3 * np.diag(np.r_[0.0, np.ones(rated - 1)])
    sums: list[Floats] = [each.gram, moved, each.earned, each.whole, each.count.astype(np.float64), starts, begun.astype(np.float64)]
    total = [one.sum(0) for one in sums]
    fewest = min(total[4] - sums[4][fold == held_out].sum() - sums[4][fold != held_out].max() for held_out in range(folds))
    if fewest <= 0:  # without some fold and group nothing is known: no model of this objective, rather than one with holes
        return

    def averages(summed: Sequence[Floats]) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """gram, moved, earned, mean, start."""
        gram, passed, earned, mean, start = (one / max(float(summed[rows]), 1.0) for one, rows in zip((*summed[:4], summed[5]), (4, 4, 4, 4, 6), strict=True))
        return gram, passed, earned, mean, start

    def model(gram: Floats, passed: Floats, earned: Floats, rate: float, ridge: float) -> Floats:
        return np.linalg.solve(gram + ridge * penalty + least - rate * passed, earned).astype(np.float64)

    parts = [[one[fold == held_out].sum(0) for one in sums] for held_out in range(folds)]
    rests = [[one - other for one, other in zip(total, part, strict=True)] for part in parts]
    chosen: list[tuple[float, float, Ints]] = []  # factor, ridge of q, objectives
    for rate, objectives in each.factors:
        errors = np.zeros((len(FIT_RIDGES), len(objectives)))
        for part, rest in zip(parts, rests, strict=True):
            gram, passed, earned, _, _ = averages(part)
            gram_of, passed_of, earned_of, _, _ = averages(rest)
            for place, ridge in enumerate(FIT_RIDGES):
                surprise = earned[:, objectives] - (gram - rate * passed) @ model(gram_of, passed_of, earned_of[:, objectives], rate, ridge)
                errors[place] += float(part[4]) * np.einsum("dm,de,em->m", surprise, each.metric, surprise)
        best = errors.argmin(0)
        chosen += [(rate, FIT_RIDGES[place], objectives[best == place]) for place in np.unique(best)]
    still = not each.share.any()
    for held_out, rest in enumerate(rests):
        for place, without in enumerate([None, *np.flatnonzero(fold != held_out)]):
            left = rest if without is None else [one - other[without] for one, other in zip(rest, sums, strict=True)]
            gram, passed, earned, mean, start = averages(left)
            for rate, ridge, objectives in chosen:
                theta[held_out][:, place, objectives] = model(gram, passed, earned[:, objectives], rate, ridge) / scale[:, None]
            if still:
                for _, objectives in each.factors:
                    gamma[held_out][:, place, objectives] = np.r_[1.0 / scale[0], np.zeros(states - 1)][:, None]
                continue
            gram, passed, mean, start = gram[np.ix_(seen, seen)], passed[np.ix_(seen, seen)], mean[seen], start[seen]
            # alpha of `density_ratio` with A = gram - rate moved: what does not depend on the rate is worked out once
            solved = passed @ np.linalg.solve(gram + least[: len(seen), : len(seen)], np.column_stack([passed.T, start]))
            fixed, both = gram + RATIO_RIDGE * (gram - np.outer(mean, mean)) + least[: len(seen), : len(seen)], passed + passed.T
            alpha = [np.linalg.solve(fixed - rate * both + rate**2 * solved[:, :-1], start - rate * solved[:, -1]) for rate, _ in each.factors]
            ratios = np.linalg.solve(gram[:rated, :rated] + smooth, gram[:rated] @ np.stack(alpha, 1)) / scale[:rated, None]
            for (_, objectives), ratio in zip(each.factors, ratios.T, strict=True):
                gamma[held_out][:, place, objectives] = np.r_[ratio, np.zeros(log.past)][:, None]


# --- the model -------------------------------------------------------------------------------------------------------------------------------


def fitted_q(
    x_logged: ArrayLike,
    x_target: ArrayLike,
    rewards: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    rng: np.random.Generator,
    folds: int = 5,
    ridges: Sequence[float] = RIDGES,
    free: int = 0,
) -> FittedQ | Refusal:
    """Linear fitted Q evaluation at its fixed point: q(s, a) = x(s, a) @ theta with

        (sum x x^T + n ridge D - sum d x x'^T) theta = sum x r,     x' = the next decision's features in expectation under the target

    Duan, Jia and Wang 2020, arXiv:2002.09516, algorithm 1, iterated to the end (LSTD-Q of Lagoudakis and Parr 2003). The sums run over the rows
    whose outcome and next decision are known; D is 1 on the diagonal, 0 for one constant column, the intercept, and for the first `free` columns;
    columns are scaled to mean square 1 first.

    x_logged [N, d]: features of the logged state and action; x_target [N, d]: their expectation over the target's actions in the same state.
    Other arguments as in `per_decision`. Players are dealt to `folds` at random; each row is predicted by a fit without its player's fold. The
    ridge is the one with the least projected Bellman error on held-out folds (Sutton et al. 2009, MSPBE), summed over folds: no truth is looked
    at. Where the iteration would not converge (spectral radius not under (1 + largest discount) / 2, so a horizon twice the discount's) the
    ridge is raised tenfold until it does. An objective without outcomes outside some fold gets columns of NaN. Refused with fewer than two
    players.
    """
    design = _design(x_logged, x_target, rewards, discount, following, truncated, player, rng=rng, folds=folds)
    if design is None:
        return Refusal("fitted_q", None, "one player: nothing is left to hold out")
    logged, target, fold, scale, folds = design.logged, design.target, design.fold, design.scale, design.folds
    penalty = np.ones(logged.shape[1])
    constant = np.flatnonzero((np.ptp(logged, axis=0) == 0) & (logged[0] != 0))
    penalty[constant[:1]] = 0.0
    penalty[:free] = 0.0

    rows, objectives, width = len(logged), design.reward.shape[1], logged.shape[1]
    coefficients = np.full((folds, objectives, width), np.nan)
    ridge, radius = np.full(objectives, np.nan), np.full(objectives, np.nan)
    for objective, rate in enumerate(design.episode.discount.T):
        sums, total = design.sums(objective)
        if any(part.count == total.count for part in sums):
            continue
        limit = (1 + float(rate.max())) / 2
        metric = np.linalg.pinv(total.gram / total.count, hermitian=True)
        best = math.inf
        solved: list[tuple[Floats, float, float] | None] = [None] * folds
        for strength in sorted(ridges):
            # where a weaker ridge had to be raised this far already, the answer is the same
            solved = [
                done if done and done[2] >= strength else _fixed_point(total.without(part), strength, penalty, limit)
                for part, done in zip(sums, solved, strict=True)
            ]
            answers = [done for done in solved if done]
            error = 0.0
            for part, (theta, _, _) in zip(sums, answers, strict=True):
                surprise = part.earned - (part.gram - part.shifted) @ theta
                error += float(surprise @ metric @ surprise) / max(part.count, 1)
            if error < best:
                best, ridge[objective] = error, strength
                coefficients[:, objective] = np.stack([theta for theta, _, _ in answers])
                radius[objective] = max(size for _, size, _ in answers)
    coefficients /= scale
    q, v = np.empty((rows, objectives)), np.empty((rows, objectives))
    for held_out in range(folds):
        mine = fold == held_out
        q[mine], v[mine] = logged[mine] @ coefficients[held_out].T, target[mine] @ coefficients[held_out].T
    return FittedQ(q, v, coefficients, fold, ridge, radius)


def density_ratio(
    x_logged: ArrayLike,
    x_target: ArrayLike,
    rewards: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    rng: np.random.Generator,
    folds: int = 5,
    ridges: Sequence[float] = RIDGES,
) -> DensityRatio | Refusal:
    """w(s, a) = x(s, a) @ alpha, the ratio of the target's discounted occupancy to the log, with alpha least in

        max_f (E[w (f(s, a) - d f(s', target))] - E[f(s, target)])^2 / E[f^2]  +  ridge Var[w],     f(s, a) = x(s, a) @ beta
        (A G^-1 A' + ridge C) alpha = A G^-1 m,     A = E[x (x - d x')'],  G = E[x x'],  C = Cov[x],  m = E[x_target]

    Uehara, Huang and Jiang 2020, "Minimax weight and Q-function learning", arXiv:1910.12809: MWL with both classes linear, in closed form; with the
    penalty the linear case of DualDICE and its kin (Nachum et al. 2019, arXiv:1906.04733; Yang et al. 2020, arXiv:2007.03438). They penalise E[w^2], which
    pulls the known mean, E[w (1 - d)] = 1, off its value by ridge / (1 - d)^2; Var[w] leaves it. m is over all rows, each a start. Without a ridge
    and on the same rows, `marginal` gives `fitted_q`'s value.

    Arguments and cross-fitting as in `fitted_q`; rewards say only which rows have an outcome, so that the ratio is to those. The ridge is the one
    whose held-out ratios, all folds together, have the least minimax loss. An objective without outcomes outside some fold gets columns of NaN. Refused
    with fewer than two players.
    """
    design = _design(x_logged, x_target, rewards, discount, following, truncated, player, rng=rng, folds=folds)
    if design is None:
        return Refusal("density_ratio", None, "one player: nothing is left to hold out")
    rows, objectives, width, folds = len(design.reward), design.reward.shape[1], design.logged.shape[1], design.folds
    coefficients, ratio = np.full((folds, objectives, width), np.nan), np.empty((rows, objectives))
    ridge, loss = np.full(objectives, np.nan), np.full(objectives, np.nan)
    starts = np.stack([design.target[design.fold == held_out].sum(0) / design.scale for held_out in range(folds)])
    begun = np.bincount(design.fold, minlength=folds)
    for objective in range(objectives):
        sums, total = design.sums(objective)
        if any(part.count in {0, total.count} for part in sums):
            continue
        metric = np.linalg.pinv(total.gram / total.count, hermitian=True)
        best = math.inf
        for strength in sorted(ridges):
            answers, missed = [], -starts.sum(0) / rows
            for held_out, part in enumerate(sums):
                rest = total.without(part)
                moments, gram = (rest.gram - rest.shifted) / rest.count, rest.gram / rest.count
                wanted = (starts.sum(0) - starts[held_out]) / (rows - begun[held_out])
                spread = gram - np.outer(rest.mean, rest.mean)
                inverse = np.linalg.pinv(gram, hermitian=True)
                alpha = np.linalg.lstsq(moments @ inverse @ moments.T + strength * spread, moments @ inverse @ wanted, rcond=None)[0].astype(np.float64)
                answers.append(alpha)
                missed += (part.gram - part.shifted).T @ alpha / total.count
            error = float(missed @ metric @ missed)
            if error < best:
                best, ridge[objective], loss[objective] = error, strength, error
                coefficients[:, objective] = np.stack(answers)
    coefficients /= design.scale
    for held_out in range(folds):
        mine = design.fold == held_out
        ratio[mine] = design.logged[mine] @ coefficients[held_out].T
    return DensityRatio(ratio, coefficients, design.fold, ridge, loss)


@dataclass(frozen=True)
class _Design:
    """What the linear models are fitted on: checked arrays, the players' folds [N], the scale [d] of the columns, the row of the next decision [N]."""

    logged: Floats
    target: Floats
    reward: Floats
    episode: _Episode
    fold: Ints
    folds: int
    scale: Floats

    def sums(self, objective: int) -> tuple[list[_BellmanSums], _BellmanSums]:
        """Per fold and in all, over the rows whose outcome and next decision are known."""
        outcome, rate = self.reward[:, objective], self.episode.discount[:, objective]
        counted = np.isfinite(outcome) & ~(self.episode.truncated & (rate > 0))
        next_row = np.where(self.episode.following >= 0, self.episode.following, 0)
        sums = [
            _bellman_sums(self.logged, self.target, self.scale, outcome, rate, next_row, counted & (self.fold == held_out)) for held_out in range(self.folds)
        ]
        total = _BellmanSums(
            np.sum([part.gram for part in sums], axis=0),
            np.sum([part.shifted for part in sums], axis=0),
            np.sum([part.earned for part in sums], axis=0),
            np.sum([part.whole for part in sums], axis=0),
            int(counted.sum()),
        )
        return sums, total


def _design(
    x_logged: ArrayLike,
    x_target: ArrayLike,
    rewards: ArrayLike,
    discount: ArrayLike,
    following: ArrayLike,
    truncated: ArrayLike,
    player: ArrayLike,
    *,
    rng: np.random.Generator,
    folds: int,
) -> _Design | None:
    """None for a single player. Players are dealt to folds at random; columns are to be divided by their root mean square."""
    logged, target, reward = as_finite_table("x_logged", x_logged), as_finite_table("x_target", x_target), as_table("rewards", rewards)
    if logged.shape != target.shape:
        raise RequestError(f"x_target: expected the shape of x_logged {logged.shape}, got {target.shape}")
    clusters = clusters_of(player, x_logged=logged, rewards=reward)
    episode = _episode(reward, discount, following, truncated, clusters, steps=1)
    if len(clusters.players) < 2:
        return None
    folds = min(folds, len(clusters.players))
    fold = (rng.permutation(len(clusters.players)) % folds)[clusters.index]
    scale = np.sqrt(np.einsum("nd,nd->d", logged, logged) / len(logged))
    scale[scale == 0] = 1.0
    return _Design(logged, target, reward, episode, fold, folds, scale)


@dataclass(frozen=True)
class _BellmanSums:
    """Over some rows: gram = sum x x^T, shifted = sum d x x'^T, earned = sum x r, whole = sum x, count = how many."""

    gram: Floats
    shifted: Floats
    earned: Floats
    whole: Floats
    count: int

    @property
    def mean(self) -> Floats:
        return self.whole / self.count

    def without(self, part: _BellmanSums) -> _BellmanSums:
        return _BellmanSums(self.gram - part.gram, self.shifted - part.shifted, self.earned - part.earned, self.whole - part.whole, self.count - part.count)


def _bellman_sums(logged: Floats, target: Floats, scale: Floats, outcome: Floats, rate: Floats, next_row: Ints, counted: Bools) -> _BellmanSums:
    x = logged[counted] / scale
    following = target[next_row[counted]] / scale * rate[counted, None]
    return _BellmanSums(x.T @ x, x.T @ following, x.T @ outcome[counted], x.sum(0), len(x))


def _fixed_point(sums: _BellmanSums, ridge: float, penalty: Floats, limit: float) -> tuple[Floats, float, float]:
    """(theta, spectral radius, ridge) of theta <- (gram + n ridge D)^-1 (earned + shifted theta), the ridge raised until the radius is under `limit`."""
    while ridge < 1e12:
        regular = sums.gram + sums.count * ridge * np.diag(penalty)
        step: Floats = np.linalg.lstsq(regular, np.column_stack([sums.shifted, sums.earned]), rcond=None)[0].astype(np.float64)
        radius = float(np.abs(np.linalg.eigvals(step[:, :-1])).max())
        if radius < limit:
            theta: Floats = np.linalg.solve(np.eye(len(penalty)) - step[:, :-1], step[:, -1]).astype(np.float64)
            return theta, radius, ridge
        ridge = max(ridge, 1e-6) * 10
    raise RequestError("discount: expected numbers below 1, or episodes that terminate; the discounted sum does not converge")


@dataclass(frozen=True)
class _Episode:
    """discount [N, M], following [N], truncated [N], checked; steps: how many decisions the longest path that is asked for has."""

    discount: Floats
    following: Ints
    truncated: Bools
    steps: int


def _episode(reward: Floats, discount: ArrayLike, following: ArrayLike, truncated: ArrayLike, clusters: Clusters, *, steps: int | None) -> _Episode:
    rate, after = as_table("discount", discount), np.asarray(following)
    rows = len(reward)
    if rate.shape != reward.shape:
        raise RequestError(f"discount: expected the shape of rewards {reward.shape}, got {rate.shape}")
    if after.shape != (rows,) or not np.issubdtype(after.dtype, np.integer):
        raise RequestError(f"following: expected {rows} whole numbers, got shape {after.shape} of {after.dtype}")
    after = after.astype(np.int64)
    cut = as_flags("truncated", truncated, rows)
    if not ((rate >= 0) & (rate <= 1)).all():
        row = int(np.flatnonzero(~((rate >= 0) & (rate <= 1)).all(1))[0])
        raise RequestError(f"discount: row {row} holds {rate[row].tolist()}; expected numbers from 0 to 1")
    # Rows are in time order within a player, so a path only ever moves on: that is what ends the loops below.
    wrong = (after < -1) | (after >= rows) | ((after >= 0) & (after <= np.arange(rows)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise RequestError(f"following: row {row} is followed by row {int(after[row])}; expected a later row, or -1 for none")
    strangers = (after >= 0) & (clusters.index[after] != clusters.index)
    if strangers.any():
        raise RequestError(f"following: row {int(np.flatnonzero(strangers)[0])} is followed by a row of another player")
    if (cut & (after >= 0)).any():
        row = int(np.flatnonzero(cut & (after >= 0))[0])
        raise RequestError(f"truncated: row {row} is followed by another decision; expected it for a player's last row only")
    ended = (after < 0) & ~cut & (rate > 0).any(1)
    if ended.any():
        raise RequestError(f"discount: row {int(np.flatnonzero(ended)[0])} is a player's last; expected discount 0 (terminated) or truncated")
    if steps is not None and steps < 1:
        raise RequestError(f"steps: expected at least 1, got {steps}")
    longest, walk = 1, after
    while steps is None and len(walk := walk[walk >= 0]):
        longest, walk = longest + 1, after[walk]
    return _Episode(rate, after, cut, steps or longest)


def _hand_over(stands_for: Floats, going: Bools, kept: Bools) -> Floats:
    """[N] how many paths each path stands for, once those `going` but not `kept` have handed theirs to those going and kept."""
    before, after = float(stands_for[going].sum()), float(stands_for[going & kept].sum())
    return np.where(going, np.where(kept, stands_for * (before / after if after > 0 else 0.0), 0.0), stands_for)
