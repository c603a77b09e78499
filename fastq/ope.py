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
  logger says it never does) is refused. No weight is ever clipped.
- rewards [N, M] may be NaN where an outcome is not known: for that objective the row is left out like one without a weight. Both are right as
  long as what is missing is missing for reasons that the action did not cause.
- q [N, M] is a model's value of the logged action, v [N, M] its value of the row's state under the target, both predicted by a model that never
  saw the row's player (`fitted_q`). v must be the target's expectation of that same q, exactly or by drawn actions: right weights repair a wrong q,
  not a v that belongs to another. A column that is all NaN says that there is no model for that objective.
- player [N] holds any integers; rows of one player are never taken for independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastq.errors import RequestError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST_EFFECTIVE_PLAYERS = 100.0  # below it the normal approximation behind every interval is not to be had
LARGEST_TOP_SHARE = 0.30  # share of all weight that the heaviest 1 % of rows may carry
LEAST_OVERLAP = 0.05  # mean of min(1, weight): what target and logger have in common
LEAST_MEASURED = 0.50  # share of rows that have both a weight and an outcome
LARGEST_WEIGHT_GAP = 0.10  # distance of the mean weight from 1, where it is also more than three standard errors
LARGEST_UNREACHED = 0.01  # share of rows, times their discount, whose paths all have weight 0 at some later decision
LARGEST_UNUSABLE = 0.01  # share of resamples in which the estimator is not defined; over one half there is no interval at all
POOLED_PLAYERS = 2_000  # more players than this are pooled into so many groups before resampling
RESAMPLED_NUMBERS = 2_000_000  # float64 numbers per batch of resamples, which bounds the memory
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # strengths that `fitted_q` chooses among, per row, on features of mean square 1


@dataclass(frozen=True)
class Estimate:
    """One number with everything that is needed to believe it or not. `value`, `low`, `high`, `standard_error` are finite, in the objective's unit.

    objective: column of `rewards`, None for the weighted sum. ess: Kish's effective number of rows, (sum w)^2 / sum w^2; the number of rows for an
    estimator without weights. top_share: share of all weight in the heaviest 1 % of rows. overlap: mean of min(1, weight), which estimates
    E_s[sum_a min(target(a|s), logger(a|s))]: 1 for the logger itself, 0 for disjoint laws. Both are None for an estimator without weights.
    verdict: "trust", or "do not trust: " and the reasons.
    """

    estimator: str
    objective: int | None
    value: float
    low: float
    high: float
    standard_error: float
    ess: float
    top_share: float | None
    overlap: float | None
    rows: int
    players: int
    verdict: str

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against the interval."""
        return self.verdict == "trust"


@dataclass(frozen=True)
class Refusal:
    """An estimator that cannot answer on these rows, and why."""

    estimator: str
    objective: int | None
    reason: str


@dataclass(frozen=True)
class Support:
    """How well the logs cover the target, for one objective.

    ess, top_share, overlap as in `Estimate`; effective_players: Kish's number on the weights summed per player; measured: share of rows with a weight and
    an outcome; mean_weight: mean over the rows with a known weight, 1 wherever it is within three standard errors (clustered by player) of 1;
    modelled: the value comes from the model alone; unreached: the largest share of rows, times their discount, that are still on their way at some
    decision where none of them has weight left.
    """

    ess: float
    effective_players: float
    top_share: float | None
    overlap: float | None
    measured: float
    mean_weight: float
    modelled: bool = False
    unreached: float = 0.0


@dataclass(frozen=True)
class Terms:
    """An estimator summed per player: numerator and denominator [P, M, K], with the diagnostics of each objective.

    players [P] are the ids met in `player`, sorted; rows is N; refusals [M] hold the reason where an objective cannot be answered, else None.
    """

    estimator: str
    players: Ints
    rows: int
    numerator: Floats
    denominator: Floats
    support: tuple[Support, ...]
    refusals: tuple[str | None, ...]

    def values(self) -> Floats:
        """[M] point estimates, NaN where the objective is refused."""
        values = _ratios(self.numerator.sum(0), self.denominator.sum(0)).sum(1)
        return np.where([reason is None for reason in self.refusals], values, np.nan)


@dataclass(frozen=True)
class Interval:
    """Bootstrap answer for C combinations of objectives, each [C]; unusable: share of resamples in which the combination is not defined."""

    value: Floats
    low: Floats
    high: Floats
    standard_error: Floats
    unusable: Floats


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


# --- weights ---------------------------------------------------------------------------------------------------------------------------------


def naive_weights(target_density: ArrayLike, logger_density: ArrayLike, atom: ArrayLike | None = None) -> Floats:
    """rho_i = pi(a_i|s_i) / beta_{j(i)}(a_i|s_i), each row against the logger that acted (Agarwal et al. 2017, arXiv:1703.06180).

    target_density, logger_density [N]: densities (or probabilities) of the executed action, in the same unit; NaN where not known. atom [N] marks
    actions exactly on a bound: weight 0 whatever the densities. Infinite where the target acts and the logger never does.
    """
    target, logger = _vector("target_density", target_density), _vector("logger_density", logger_density)
    _same_rows(target_density=target, logger_density=logger)
    _not_negative(target_density=target, logger_density=logger)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(target == 0, 0.0, target / logger)
    if atom is not None:
        weights = np.where(_flags("atom", atom, len(target)), 0.0, weights)
    return weights


def balanced_weights(target_density: ArrayLike, logger_densities: ArrayLike, logger_shares: ArrayLike, atom: ArrayLike | None = None) -> Floats:
    """rho_i = pi(a_i|s_i) / sum_k share_k(s_i) beta_k(a_i|s_i): the mixture of all loggers as the one logger.

    Agarwal et al. 2017, "Effective evaluation using logged bandit feedback from multiple loggers", arXiv:1703.06180.
    Never more variance than the naive weights; needs the law of every logger at every row. target_density [N]; logger_densities [N, K];
    logger_shares [K] or [N, K]: probability with which each logger was assigned to act, summing to 1. A logger with share 0 may be NaN.
    """
    target, loggers = _vector("target_density", target_density), np.asarray(logger_densities, dtype=np.float64)
    if loggers.ndim != 2:
        raise RequestError(f"logger_densities: expected [rows, loggers], got an array of shape {loggers.shape}")
    shares = np.asarray(logger_shares, dtype=np.float64)
    if shares.shape not in (loggers.shape, loggers.shape[1:]):
        raise RequestError(f"logger_shares: expected shape {loggers.shape[1:]} or {loggers.shape}, got {shares.shape}")
    _not_negative(logger_shares=shares)
    if not np.allclose(shares.sum(-1), 1.0, rtol=0, atol=1e-6):
        raise RequestError("logger_shares: expected shares that sum to 1; give the probability with which each logger was assigned to act")
    mixture = np.where(shares > 0, shares * loggers, 0.0).sum(1)
    return naive_weights(target, mixture, atom)


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
    reward, weight = _table("rewards", rewards), _vector("weights", weights)
    clusters = _clusters(player, rewards=reward, weights=weight)
    known, no_law = _usable_weights(weight)
    numerators, denominators, supports, refusals = [], [], [], []
    for outcome in reward.T:
        measured = np.isfinite(known) & np.isfinite(outcome)
        path_weight = np.where(measured, known, 0.0)
        numerators.append([clusters.sums(path_weight * np.where(measured, outcome, 0.0))])
        denominators.append([clusters.sums(path_weight if normalised else measured)])
        supports.append(_support(path_weight, measured, known, clusters))
        refusals.append(no_law or _no_support(path_weight, measured, clusters))
    return _terms(estimator, clusters, numerators, denominators, supports, refusals)


def direct_method(v: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/N) sum_i v(s_i), the model's word alone; v [N] or [N, M] from `fitted_q`.

    Its interval holds the spread of the states and not the model's own error, so it is never trusted.
    """
    values = _table("v", v)
    clusters = _clusters(player, v=values)
    everyone = np.ones(len(values))
    support = Support(float(len(values)), float(len(clusters.players)), None, None, measured=1.0, mean_weight=1.0, modelled=True)
    refusals = [_no_model(column, column) for column in values.T]
    numerators = [[clusters.sums(column)] for column in values.T]
    return _terms("direct_method", clusters, numerators, [[clusters.sums(everyone)]] * len(numerators), [support] * len(numerators), refusals)


def doubly_robust(rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/N) sum_i v(s_i) + (1/n) sum_i rho_i (r_i - q(s_i, a_i)), the first over all N rows, the second over the n with weight and outcome.

    Dudik, Langford and Li 2011, arXiv:1103.4601: right when the weights are right or the model is.
    """
    return _one_step("doubly_robust", rewards, weights, q, v, player, normalised=False)


def self_normalised_doubly_robust(rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike) -> Terms:
    """V = (1/N) sum_i v(s_i) + sum_i rho_i (r_i - q(s_i, a_i)) / sum_i rho_i (Thomas and Brunskill 2016, arXiv:1604.00923, with one step)."""
    return _one_step("self_normalised_doubly_robust", rewards, weights, q, v, player, normalised=True)


def _one_step(estimator: str, rewards: ArrayLike, weights: ArrayLike, q: ArrayLike, v: ArrayLike, player: ArrayLike, *, normalised: bool) -> Terms:
    reward = _table("rewards", rewards)
    rows = len(reward)
    nothing_follows, never = np.full(rows, -1), np.zeros(rows, dtype=bool)
    terms = sequential_doubly_robust(reward, weights, q, v, np.zeros_like(reward), nothing_follows, never, player, steps=1, normalised=normalised)
    return replace(terms, estimator=estimator)


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
    reward, weight, value = _table("rewards", rewards), _vector("weights", weights), _table("v", v)
    clusters = _clusters(player, rewards=reward, weights=weight, v=value)
    episode = _episode(reward, discount, following, truncated, clusters, steps=steps)
    known, no_law = _usable_weights(weight)
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
        supports.append(replace(_support(total, measured, known, clusters), unreached=unreached))
        refusals.append(no_law or _no_model(model, model) or _no_support(total, measured, clusters))
    return _terms("weighted_per_decision" if normalised else "per_decision", clusters, numerators, denominators, supports, refusals)


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
    reward, weight, value, action_value = _table("rewards", rewards), _vector("weights", weights), _table("v", v), _table("q", q)
    clusters = _clusters(player, rewards=reward, weights=weight, v=value, q=action_value)
    episode = _episode(reward, discount, following, truncated, clusters, steps=steps)
    known, no_law = _usable_weights(weight)
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
        supports.append(replace(_support(total, measured_row, known, clusters), unreached=unreached))
        refusals.append(no_law or _no_model(model, action_model) or _no_support(total, measured_row, clusters))
    name = "self_normalised_sequential_doubly_robust" if normalised else "sequential_doubly_robust"
    return _terms(name, clusters, numerators, denominators, supports, refusals)


# --- answers ---------------------------------------------------------------------------------------------------------------------------------


def estimate(
    terms: Terms, *, objective_weights: ArrayLike | None = None, rng: np.random.Generator, level: float = 0.95, resamples: int = 1_000
) -> tuple[Estimate | Refusal, ...]:
    """One answer per objective, and with `objective_weights` [M] one more for sum_m weight_m V_m (objective None), each with its interval.

    The sum has its own interval, drawn on the same resamples, and the worst support among the objectives that weigh in it; it is refused
    if one of those is. level: nominal coverage of the intervals, for each number by itself.
    """
    objectives = len(terms.refusals)
    selections: list[tuple[int | None, Floats]] = [(objective, row) for objective, row in enumerate(np.eye(objectives))]
    if objective_weights is not None:
        total = _vector("objective_weights", objective_weights)
        if total.shape != (objectives,) or not np.isfinite(total).all():
            raise RequestError(f"objective_weights: expected {objectives} finite numbers, got {np.asarray(objective_weights).tolist()}")
        selections.append((None, total))
    refused = [_refusal_reason(terms, row) for _, row in selections]
    answered = [row for (_, row), reason in zip(selections, refused, strict=True) if reason is None]
    if not answered:
        return tuple(Refusal(terms.estimator, objective, str(reason)) for (objective, _), reason in zip(selections, refused, strict=True))
    usable = [reason is None for reason in terms.refusals]
    interval = bootstrap_by_player(
        terms.numerator[:, usable], terms.denominator[:, usable], np.stack(answered)[:, usable], rng=rng, level=level, resamples=resamples
    )
    answers: list[Estimate | Refusal] = []
    place = 0
    for (objective, row), reason in zip(selections, refused, strict=True):
        if reason is not None:
            answers.append(Refusal(terms.estimator, objective, reason))
            continue
        value, low, high, error = (float(each[place]) for each in (interval.value, interval.low, interval.high, interval.standard_error))
        unusable = float(interval.unusable[place])
        place += 1
        if unusable > 0.5:
            answers.append(Refusal(terms.estimator, objective, f"{unusable:.0%} of the resamples hold no row with weight"))
            continue
        support = worst_support(each for each, weight in zip(terms.support, row, strict=True) if weight != 0)
        words = verdict(support, unusable=unusable, standard_error=error)
        answers.append(
            Estimate(
                terms.estimator, objective, value, low, high, error, support.ess, support.top_share, support.overlap, terms.rows, len(terms.players), words
            )
        )
    return tuple(answers)


def _refusal_reason(terms: Terms, row: Floats) -> str | None:
    """Why the combination `row` of objectives cannot be answered."""
    if not row.any():
        return "every objective has weight 0"
    mine = [objective for objective, reason in enumerate(terms.refusals) if reason is not None and row[objective] != 0]
    if not mine:
        return None
    reason = str(terms.refusals[mine[0]])
    return reason if np.count_nonzero(row) == 1 else f"objective {mine[0]}: {reason}"


def paired_difference(first: Terms, second: Terms) -> Terms:
    """V(first) - V(second) on the same rows, so that what both share cancels in the interval; give it to `estimate`.

    The two may be of different estimators. Diagnostics are the worse of the two.
    """
    if first.rows != second.rows or not np.array_equal(first.players, second.players) or len(first.refusals) != len(second.refusals):
        raise RequestError("paired_difference: expected both estimates on the same rows, players and objectives")
    return Terms(
        first.estimator if first.estimator == second.estimator else f"{first.estimator} - {second.estimator}",
        first.players,
        first.rows,
        np.concatenate([first.numerator, -second.numerator], axis=2),
        np.concatenate([first.denominator, second.denominator], axis=2),
        tuple(worst_support(pair) for pair in zip(first.support, second.support, strict=True)),
        tuple(one or other for one, other in zip(first.refusals, second.refusals, strict=True)),
    )


def bootstrap_by_player(
    numerator: Floats, denominator: Floats, combinations: Floats, *, rng: np.random.Generator, level: float = 0.95, resamples: int = 1_000
) -> Interval:
    """Studentised cluster bootstrap of combinations @ V, V_m = sum_k sum_p numerator / sum_p denominator.

    Efron and Tibshirani 1993, chapter 12: interval [V - t_{1-a/2} s, V - t_{a/2} s], a = 1 - level, with t* = (V* - V) / s* over draws of P
    players with replacement, a player's rows all together. s is the linearised standard error sqrt(P / (P-1) sum_p psi_p^2),
    psi_p = sum_k (numerator_p - ratio_k denominator_p) / denominator_k, computed anew in each resample: that makes the interval follow skewed
    weights. A ratio 0/0 counts as 0.

    numerator, denominator [P, M, K], P >= 2, denominators not negative; combinations [C, M]. More than `POOLED_PLAYERS` players are first pooled
    at random into that many groups: a sum of whole players is as independent as they are, and skewness is kept. Resamples in which a
    denominator or the spread vanishes are left out and their share told. A combination that never varies has low = high = value.
    """
    if not 0 < level < 1:
        raise RequestError(f"level: expected a number between 0 and 1, got {level}")
    if numerator.shape != denominator.shape or numerator.ndim != 3 or combinations.shape[1:] != numerator.shape[1:2]:
        shapes = f"{numerator.shape}, {denominator.shape}, {combinations.shape}"
        raise RequestError(f"bootstrap: expected [players, objectives, terms] twice and [combinations, objectives], got {shapes}")
    players, _, terms = numerator.shape
    if players < 2:
        raise RequestError("bootstrap: expected at least two players")
    tops, bottoms = numerator.reshape(players, -1), denominator.reshape(players, -1)
    if players > POOLED_PLAYERS:
        order = rng.permutation(players)
        starts = np.linspace(0, players, POOLED_PLAYERS, endpoint=False).astype(np.int64)
        tops, bottoms = (np.add.reduceat(sums[order], starts, axis=0) for sums in (tops, bottoms))
        players = POOLED_PLAYERS
    expanded = np.repeat(combinations, terms, axis=1)

    def linearised(draws: Floats) -> tuple[Floats, Floats, Floats]:
        """(value [B, C], standard error [B, C], denominators [B, M K]) of B draws [B, P]: how often each player came up."""
        bottom = draws @ bottoms
        ratio = _ratios(draws @ tops, bottom)
        slope = _ratios(expanded, bottom[:, None])
        # One product of two matrices, not a stack of small ones: BLAS is many times faster at it.
        influence = slope.reshape(-1, expanded.shape[1]) @ tops.T - (slope * ratio[:, None]).reshape(-1, expanded.shape[1]) @ bottoms.T
        spread = np.einsum("bcp,bp->bc", influence.reshape(*slope.shape[:2], players) ** 2, draws)
        return ratio @ expanded.T, np.sqrt(players / (players - 1) * spread), bottom

    (value,), (error,), (whole,) = linearised(np.ones((1, players)))
    # What rounding leaves of a spread that is zero: of a difference of two equal policies, rounded parts of the summands, not of their sum.
    least = 1e-12 * (np.abs(_ratios(expanded, whole[None])) @ np.abs(tops).sum(0))
    drawn = np.full((resamples, len(combinations)), np.nan)
    at_once = max(1, RESAMPLED_NUMBERS // (players * len(combinations)))
    for start in range(0, resamples, at_once):
        batch = drawn[start : start + at_once]
        picks = rng.integers(players, size=(len(batch), players)) + players * np.arange(len(batch))[:, None]
        draws = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape).astype(np.float64)
        again, spread, bottom = linearised(draws)
        gone = ((bottom == 0) & (whole > 0)).astype(np.float64) @ np.abs(expanded).T > 0
        np.divide(again - value, spread, out=batch, where=(spread > least) & ~gone)
    low, high, varies = value.copy(), value.copy(), error > least
    unusable = np.where(varies, np.isnan(drawn).mean(0), 0.0)
    for place in np.flatnonzero(unusable < varies):
        upper, lower = np.nanquantile(drawn[:, place], [(1 + level) / 2, (1 - level) / 2])
        low[place], high[place] = value[place] - upper * error[place], value[place] - lower * error[place]
    return Interval(value, low, high, np.where(varies, error, 0.0), unusable)


def empirical_bernstein(values: ArrayLike, low: float, high: float, *, level: float = 0.95) -> tuple[float, float]:
    """(lower, upper) bound of the mean that holds at every sample size: mean -+ [sqrt(2 s^2 l / n) + 7 (high - low) l / (3 (n - 1))], l = ln(4 / (1 - level)).

    Maurer and Pontil 2009, arXiv:0907.3740, theorem 4, half the error on each side; s^2 with n - 1. values [n]: independent, so one per player,
    never one per row; low, high: the range that they cannot leave, known beforehand. The bounds are cut to that range.
    """
    sample = _vector("values", values)
    if len(sample) < 2:
        raise RequestError("empirical_bernstein: expected at least two values")
    if not (np.isfinite(sample).all() and sample.min() >= low and sample.max() <= high):
        raise RequestError(f"empirical_bernstein: expected values between {low} and {high}")
    if not 0 < level < 1:
        raise RequestError(f"level: expected a number between 0 and 1, got {level}")
    log_term = math.log(4 / (1 - level))
    width = math.sqrt(2 * float(sample.var(ddof=1)) * log_term / len(sample)) + 7 * (high - low) * log_term / (3 * (len(sample) - 1))
    mean = float(sample.mean())
    return max(low, mean - width), min(high, mean + width)


def effective_sample_size(weights: ArrayLike) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965): how many equal weights would be as precise; 0 where all are 0. weights [n], not negative."""
    sample = _vector("weights", weights)
    squares = float(sample @ sample)
    return float(sample.sum()) ** 2 / squares if squares > 0 else 0.0


def verdict(support: Support, *, unusable: float = 0.0, standard_error: float = 1.0) -> str:
    """The words "trust", or "do not trust: " with every reason, by the thresholds at the top of this module."""
    doubts = []
    if support.modelled:
        doubts.append("the interval leaves out the model's own error")
    if support.effective_players < LEAST_EFFECTIVE_PLAYERS:
        doubts.append(f"the weights leave {support.effective_players:.0f} effective players, {LEAST_EFFECTIVE_PLAYERS:.0f} are needed")
    if support.top_share is not None and support.top_share > LARGEST_TOP_SHARE:
        doubts.append(f"1 % of the rows carry {support.top_share:.0%} of the weight")
    if support.overlap is not None and support.overlap < LEAST_OVERLAP:
        doubts.append(f"target and logger overlap by {support.overlap:.1%} only")
    if support.measured < LEAST_MEASURED:
        doubts.append(f"only {support.measured:.0%} of the rows have both a propensity and an outcome")
    if abs(support.mean_weight - 1) > LARGEST_WEIGHT_GAP:
        doubts.append(f"the weights average {support.mean_weight:.2f} where they should average 1: propensities or support are wrong")
    if support.unreached > LARGEST_UNREACHED:
        doubts.append(f"{support.unreached:.0%} of the value lies behind decisions where no path has weight left")
    if unusable > LARGEST_UNUSABLE:
        doubts.append(f"{unusable:.0%} of the resamples hold no row with weight")
    if standard_error == 0:
        doubts.append("the value never varies between players")
    return "do not trust: " + "; ".join(doubts) if doubts else "trust"


def worst_support(supports: Iterable[Support]) -> Support:
    """The worst of each diagnostic: what speaks against one part speaks against the whole."""
    each = list(supports)
    tops = [support.top_share for support in each if support.top_share is not None]
    overlaps = [support.overlap for support in each if support.overlap is not None]
    return Support(
        min(support.ess for support in each),
        min(support.effective_players for support in each),
        max(tops, default=None),
        min(overlaps, default=None),
        min(support.measured for support in each),
        max((support.mean_weight for support in each), key=lambda mean: abs(mean - 1)),
        any(support.modelled for support in each),
        max(support.unreached for support in each),
    )


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
) -> FittedQ | Refusal:
    """Linear fitted Q evaluation at its fixed point: q(s, a) = x(s, a) @ theta with

        (sum x x^T + n ridge D - sum d x x'^T) theta = sum x r,     x' = the next decision's features in expectation under the target

    Duan, Jia and Wang 2020, arXiv:2002.09516, algorithm 1, iterated to the end (LSTD-Q of Lagoudakis and Parr 2003). The sums run over the rows
    whose outcome and next decision are known; D is 1 on the diagonal, 0 for one constant column, the intercept; columns are scaled to mean
    square 1 first.

    x_logged [N, d]: features of the logged state and action; x_target [N, d]: their expectation over the target's actions in the same state.
    Other arguments as in `per_decision`. Players are dealt to `folds` at random; each row is predicted by a fit without its player's fold. The
    ridge is the one with the least projected Bellman error on held-out folds (Sutton et al. 2009, MSPBE), summed over folds: no truth is looked
    at. Where the iteration would not converge (spectral radius not under (1 + largest discount) / 2, so a horizon twice the discount's) the
    ridge is raised tenfold until it does. An objective without outcomes outside some fold gets columns of NaN. Refused with fewer than two
    players.
    """
    logged, target, reward = _finite_table("x_logged", x_logged), _finite_table("x_target", x_target), _table("rewards", rewards)
    if logged.shape != target.shape:
        raise RequestError(f"x_target: expected the shape of x_logged {logged.shape}, got {target.shape}")
    clusters = _clusters(player, x_logged=logged, rewards=reward)
    episode = _episode(reward, discount, following, truncated, clusters, steps=1)
    if len(clusters.players) < 2:
        return Refusal("fitted_q", None, "one player: nothing is left to hold out")
    folds = min(folds, len(clusters.players))
    fold = (rng.permutation(len(clusters.players)) % folds)[clusters.index]
    scale = np.sqrt(np.einsum("nd,nd->d", logged, logged) / len(logged))
    scale[scale == 0] = 1.0
    penalty = np.ones(logged.shape[1])
    constant = np.flatnonzero((np.ptp(logged, axis=0) == 0) & (logged[0] != 0))
    penalty[constant[:1]] = 0.0
    next_row = np.where(episode.following >= 0, episode.following, 0)

    rows, objectives, width = len(reward), reward.shape[1], logged.shape[1]
    coefficients = np.full((folds, objectives, width), np.nan)
    ridge, radius = np.full(objectives, np.nan), np.full(objectives, np.nan)
    for objective, (outcome, rate) in enumerate(zip(reward.T, episode.discount.T, strict=True)):
        counted = np.isfinite(outcome) & ~(episode.truncated & (rate > 0))
        sums = [_bellman_sums(logged, target, scale, outcome, rate, next_row, counted & (fold == held_out)) for held_out in range(folds)]
        total = _BellmanSums(
            np.sum([part.gram for part in sums], axis=0),
            np.sum([part.shifted for part in sums], axis=0),
            np.sum([part.earned for part in sums], axis=0),
            int(counted.sum()),
        )
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


@dataclass(frozen=True)
class _BellmanSums:
    """Over some rows: gram = sum x x^T, shifted = sum d x x'^T, earned = sum x r, count = how many."""

    gram: Floats
    shifted: Floats
    earned: Floats
    count: int

    def without(self, part: _BellmanSums) -> _BellmanSums:
        return _BellmanSums(self.gram - part.gram, self.shifted - part.shifted, self.earned - part.earned, self.count - part.count)


def _bellman_sums(logged: Floats, target: Floats, scale: Floats, outcome: Floats, rate: Floats, next_row: Ints, counted: Bools) -> _BellmanSums:
    x = logged[counted] / scale
    following = target[next_row[counted]] / scale * rate[counted, None]
    return _BellmanSums(x.T @ x, x.T @ following, x.T @ outcome[counted], len(x))


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


# --- what the functions above share ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clusters:
    """players [P] sorted ids; index [N] into them."""

    players: Ints
    index: Ints

    def sums(self, column: NDArray[np.generic]) -> Floats:
        """[P] sums of a column [N] over each player's rows."""
        return np.bincount(self.index, weights=column.astype(np.float64), minlength=len(self.players)).astype(np.float64)


@dataclass(frozen=True)
class _Episode:
    """discount [N, M], following [N], truncated [N], checked; steps: how many decisions the longest path that is asked for has."""

    discount: Floats
    following: Ints
    truncated: Bools
    steps: int


def _episode(reward: Floats, discount: ArrayLike, following: ArrayLike, truncated: ArrayLike, clusters: _Clusters, *, steps: int | None) -> _Episode:
    rate, after = _table("discount", discount), np.asarray(following)
    rows = len(reward)
    if rate.shape != reward.shape:
        raise RequestError(f"discount: expected the shape of rewards {reward.shape}, got {rate.shape}")
    if after.shape != (rows,) or not np.issubdtype(after.dtype, np.integer):
        raise RequestError(f"following: expected {rows} whole numbers, got shape {after.shape} of {after.dtype}")
    after = after.astype(np.int64)
    cut = _flags("truncated", truncated, rows)
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


def _terms(
    estimator: str,
    clusters: _Clusters,
    numerators: list[list[Floats]],
    denominators: list[list[Floats]],
    supports: list[Support],
    refusals: list[str | None],
) -> Terms:
    rows = len(clusters.index)
    if len(clusters.players) < 2:
        refusals = [f"{len(clusters.players)} player: an interval needs at least two"] * len(refusals)
    numerator, denominator = (np.moveaxis(np.array(columns), 2, 0) for columns in (numerators, denominators))
    return Terms(estimator, clusters.players, rows, numerator, denominator, tuple(supports), tuple(refusals))


def _support(weights: Floats, measured: Bools, known: Floats, clusters: _Clusters) -> Support:
    """Diagnostics of one objective: `weights` [N] as its terms use them, 0 where not measured; `known` [N] the one-step weights, NaN where not known."""
    heaviest = max(1, math.ceil(0.01 * np.count_nonzero(measured)))
    total = float(weights.sum())
    top = float(np.partition(weights, len(weights) - heaviest)[-heaviest:].sum()) / total if total > 0 else 0.0
    has_law = np.isfinite(known)
    one_step = np.where(has_law, known, 0.0)
    laws = int(np.count_nonzero(has_law))
    overlap, mean = (float(np.minimum(one_step, 1).sum()) / laws, float(one_step.sum()) / laws) if laws else (0.0, 0.0)
    deviation = clusters.sums(np.where(has_law, one_step - mean, 0.0))
    error = math.sqrt(float(deviation @ deviation)) / max(laws, 1)
    return Support(
        effective_sample_size(weights),
        effective_sample_size(clusters.sums(weights)),
        top,
        overlap,
        np.count_nonzero(measured) / len(weights),
        mean if abs(mean - 1) > 3 * error else 1.0,
    )


def _hand_over(stands_for: Floats, going: Bools, kept: Bools) -> Floats:
    """[N] how many paths each path stands for, once those `going` but not `kept` have handed theirs to those going and kept."""
    before, after = float(stands_for[going].sum()), float(stands_for[going & kept].sum())
    return np.where(going, np.where(kept, stands_for * (before / after if after > 0 else 0.0), 0.0), stands_for)


def _usable_weights(weights: Floats) -> tuple[Floats, str | None]:
    """Weights with infinities as NaN, and the refusal that an infinity brings."""
    _not_negative(weights=weights)
    infinite = np.flatnonzero(np.isinf(weights))
    if not len(infinite):
        return weights, None
    reason = f"in {len(infinite)} rows, row {int(infinite[0])} first, the target acts where the logger's propensity is 0"
    return np.where(np.isinf(weights), np.nan, weights), reason


def _no_support(weights: Floats, measured: Bools, clusters: _Clusters) -> str | None:
    if np.count_nonzero(clusters.sums(measured)) < 2:
        return "fewer than two players have a row with both a propensity and an outcome"
    weighted = np.count_nonzero(clusters.sums(weights))
    if weighted == 0:
        return "no overlap: every weight is 0, the logs never do what the target does"
    return "only one player has weight: nothing tells how the value varies" if weighted == 1 else None


def _no_model(v: Floats, q: Floats) -> str | None:
    if np.isfinite(v).all() and np.isfinite(q).all():
        return None
    if np.isnan(v).all() and np.isnan(q).all():
        return "there is no model of this objective"
    raise RequestError("q, v: expected finite values in every row of an objective, or NaN in all of them")


def _clusters(player: ArrayLike, **arrays: Floats) -> _Clusters:
    """Players of the rows, after checking that every array has as many rows and every table as many objectives."""
    ids = np.asarray(player)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"player: expected one whole number per row, got shape {ids.shape} of {ids.dtype}")
    _same_rows(player=ids, **arrays)
    if not len(ids):
        raise RequestError("player: expected at least one row")
    players, index = np.unique(ids, return_inverse=True)
    return _Clusters(players.astype(np.int64), index.astype(np.int64))


def _same_rows(**arrays: NDArray[np.generic]) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError("expected the same number of rows in " + ", ".join(f"{name} ({length})" for name, length in lengths.items()))
    widths = {name: array.shape[1] for name, array in arrays.items() if array.ndim == 2 and name in {"rewards", "q", "v"}}
    if len(set(widths.values())) > 1:
        raise RequestError("expected the same number of objectives in " + ", ".join(f"{name} ({width})" for name, width in widths.items()))


def _vector(name: str, values: ArrayLike) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise RequestError(f"{name}: expected one number per row, got an array of shape {column.shape}")
    return column


def _table(name: str, values: ArrayLike) -> Floats:
    """[N] or [N, M] as [N, M]; NaN is allowed, infinity is not."""
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2:
        raise RequestError(f"{name}: expected [rows] or [rows, objectives], got an array of shape {table.shape}")
    if np.isinf(table).any():
        raise RequestError(f"{name}: row {int(np.flatnonzero(np.isinf(table).any(1))[0])} is infinite")
    return table


def _finite_table(name: str, values: ArrayLike) -> Floats:
    table = _table(name, values)
    if np.isnan(table).any():
        raise RequestError(f"{name}: row {int(np.flatnonzero(np.isnan(table).any(1))[0])} is NaN; expected a finite number for every feature")
    return table


def _flags(name: str, values: ArrayLike, rows: int) -> Bools:
    flags = np.asarray(values)
    if flags.shape != (rows,) or flags.dtype != np.bool_:
        raise RequestError(f"{name}: expected {rows} booleans, got shape {flags.shape} of {flags.dtype}")
    return flags


def _not_negative(**arrays: Floats) -> None:
    for name, array in arrays.items():
        if (array < 0).any():
            row = int(np.flatnonzero((array < 0).reshape(len(array), -1).any(1))[0])
            raise RequestError(f"{name}: row {row} is below 0")


def _ratios(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, 0 where bottom is 0: a term that nothing measures adds nothing."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom != 0)
