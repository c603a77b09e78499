"""From what an off-policy estimator sums per player to an answer with an interval, diagnostics and a verdict; `fastq.ope` holds the estimators.

Units, shapes and the meaning of missing numbers are told at the top of `fastq.ope`, which hands on every public name of this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
LARGEST_CHANGED = 0.10  # share of the weight that an estimator may change on purpose: the bias that this brings is in no interval
LARGEST_NEGATIVE = 0.25  # share of a fitted density ratio, in absolute value, that may lie below 0, where no true one lies
LARGEST_APART = 3.5  # standard errors between a fitted ratio of states and the same ratio one step back
LARGEST_WIDTH = 2.0  # width of an interval over the size of what it measures: beyond it not even the sign of a plain mean is known
LARGEST_UNUSABLE = 0.01  # share of resamples in which the estimator is not defined; over one half there is no interval at all
POOLED_PLAYERS = 2_000  # more players than this are pooled into so many groups before resampling
RESAMPLED_NUMBERS = 2_000_000  # float64 numbers per batch of resamples, which bounds the memory


@dataclass(frozen=True)
class Estimate:
    """One number with everything that is needed to believe it or not. `value`, `low`, `high`, `standard_error` are finite, in the objective's unit.

    objective: column of `rewards`, None for the weighted sum. ess: Kish's effective number of rows, (sum w)^2 / sum w^2; the number of rows for an
    estimator without weights. top_share: share of all weight in the heaviest 1 % of rows. overlap: mean of min(1, weight), which estimates
    E_s[sum_a min(target(a|s), logger(a|s))]: 1 for the logger itself, 0 for disjoint laws. Both are None for an estimator without weights.
    verdict: "trust", or "do not trust: " and the reasons; an estimator that changes weights on purpose says what it did: "trust: 3.0% of all weight …".
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
        return self.verdict.startswith("trust")


@dataclass(frozen=True)
class Refusal:
    """An estimator that cannot answer on these rows, and why."""

    estimator: str
    objective: int | None
    reason: str


LESSENED = "is taken away from decisions that would count many times"  # what estimators that change weights have in common


@dataclass(frozen=True)
class Support:
    """How well the logs cover the target, for one objective.

    ess, top_share, overlap as in `Estimate`; effective_players: Kish's number on the weights summed per player; measured: share of rows with a weight and
    an outcome; mean_weight: mean over the rows with a known weight, 1 wherever it is within three standard errors (clustered by player) of 1;
    modelled: the value comes from the model alone; unreached: the largest share of rows, times their discount, that are still on their way at some
    decision where none of them has weight left; changed: share of the weight that the estimator changed on purpose: switched off, shrunk
    away, moved to shorter returns or to a kernel that a bound cuts; negative: share of a fitted density ratio, in absolute value, below 0; apart:
    standard errors between the value by a fitted ratio of states and the value by that ratio one step back; setting: the
    threshold, shrinkage or bandwidth in use, None where there is none or where objectives differ; done: what became of the changed share, in words
    that go on from "3 % of all weight".
    """

    ess: float
    effective_players: float
    top_share: float | None
    overlap: float | None
    measured: float
    mean_weight: float
    modelled: bool = False
    unreached: float = 0.0
    changed: float = 0.0
    negative: float = 0.0
    apart: float = 0.0
    setting: float | None = None
    done: str = LESSENED


@dataclass(frozen=True)
class Terms:
    """An estimator summed per player: numerator and denominator [P, M, K], with the diagnostics of each objective.

    players [P] are the ids met in `player`, sorted; rows is N; refusals [M] hold the reason where an objective cannot be answered, else None.
    refits [G, M]: the values with one of G groups of players left out and every fitted model refitted without it, None where nothing is fitted or
    the fit is taken as given; from them the interval learns the model's own error. group [P]: which of them each player is in.
    """

    estimator: str
    players: Ints
    rows: int
    numerator: Floats
    denominator: Floats
    support: tuple[Support, ...]
    refusals: tuple[str | None, ...]
    refits: Floats | None = None
    group: Ints | None = None

    def values(self) -> Floats:
        """[M] point estimates, NaN where the objective is refused."""
        values = ratio_or_zero(self.numerator.sum(0), self.denominator.sum(0)).sum(1)
        return np.where([reason is None for reason in self.refusals], values, np.nan)

    def influences(self) -> Floats:
        """[P, M, K] what each player adds to each ratio's error, (numerator_p - ratio denominator_p) / sum denominator; 0 where nothing is measured."""
        whole = self.denominator.sum(0)
        return ratio_or_zero(self.numerator - ratio_or_zero(self.numerator.sum(0), whole) * self.denominator, whole)

    def refit_errors(self, combinations: Floats) -> Floats:
        """[C] delete-a-group jackknife standard errors of combinations [C, M], sqrt((G-1)/G sum_g (V_g - mean V_g)^2); 0 without refits.

        Shao and Tu 1995, "The Jackknife and Bootstrap", section 2.3: unlike the linearised error it moves every fitted model too.
        """
        if self.refits is None:
            return np.zeros(len(combinations))
        usable = np.array([reason is None for reason in self.refusals])
        values = self.refits[:, usable] @ combinations[:, usable].T
        return np.sqrt((len(values) - 1) * values.var(axis=0))

    def standard_errors(self) -> Floats:
        """[M] linearised standard errors, sqrt(P / (P-1) sum_p (sum_k influence)^2): players are independent, their rows are not."""
        pulls = self.influences().sum(2)
        return np.sqrt(len(pulls) / max(len(pulls) - 1, 1) * np.einsum("pm,pm->m", pulls, pulls))


@dataclass(frozen=True)
class Interval:
    """Bootstrap answer for C combinations of objectives, each [C]; unusable: share of resamples in which the combination is not defined."""

    value: Floats
    low: Floats
    high: Floats
    standard_error: Floats
    unusable: Floats


# --- answers ---------------------------------------------------------------------------------------------------------------------------------


def estimate(
    terms: Terms, *, objective_weights: ArrayLike | None = None, rng: np.random.Generator, level: float = 0.95, resamples: int = 1_000
) -> tuple[Estimate | Refusal, ...]:
    """One answer per objective, and with `objective_weights` [M] one more for sum_m weight_m V_m (objective None), each with its interval.

    The sum has its own interval, drawn on the same resamples, and the worst support among the objectives that weigh in it; it is refused
    if one of those is. level: nominal coverage of the intervals, for each number by itself. An interval is never narrower than the refits' error
    by Student's law with one degree of freedom fewer than there are groups (MacKinnon, Nielsen and Webb 2023, "Fast and reliable jackknife and bootstrap
    methods for cluster-robust inference", J. Applied Econometrics 38): 20 groups tell a spread no better than that.
    """
    objectives = len(terms.refusals)
    selections: list[tuple[int | None, Floats]] = [(objective, row) for objective, row in enumerate(np.eye(objectives))]
    if objective_weights is not None:
        total = as_vector("objective_weights", objective_weights)
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
    larger = ratio_or_zero(terms.refit_errors(np.stack(answered)), interval.standard_error)
    widening = np.maximum(1.0, larger if terms.refits is None else larger * _student_to_normal(level, len(terms.refits) - 1))
    # what a value is made of, so that a difference or a sum near zero is measured by its parts
    size = np.nan_to_num(np.abs(ratio_or_zero(terms.numerator.sum(0), terms.denominator.sum(0))).sum(1))
    answers: list[Estimate | Refusal] = []
    place = 0
    for (objective, row), reason in zip(selections, refused, strict=True):
        if reason is not None:
            answers.append(Refusal(terms.estimator, objective, reason))
            continue
        value, low, high, error = (float(each[place]) for each in (interval.value, interval.low, interval.high, interval.standard_error))
        unusable, wider = float(interval.unusable[place]), float(widening[place])
        low, high, error = value - wider * (value - low), value + wider * (high - value), max(1.0, float(larger[place])) * error
        place += 1
        if unusable > 0.5:
            answers.append(Refusal(terms.estimator, objective, f"{unusable:.0%} of the resamples hold no row with weight"))
            continue
        support = worst_support(each for each, weight in zip(terms.support, row, strict=True) if weight != 0)
        words = verdict(support, unusable=unusable, standard_error=error, width=float(ratio_or_zero(np.array(high - low), np.abs(row) @ size)))
        answers.append(
            Estimate(
                terms.estimator, objective, value, low, high, error, support.ess, support.top_share, support.overlap, terms.rows, len(terms.players), words
            )
        )
    return tuple(answers)


def _student_to_normal(level: float, degrees: int) -> float:
    """How much wider a central interval of Student's law with these degrees of freedom is than one of the normal law."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(degrees, (1 + level) / 2) / ndtri((1 + level) / 2))


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

    The two may be of different estimators. Diagnostics are the worse of the two. Refits are paired too, group by group, where both have them; a value
    without refits counts as one that no refit moves.
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
        _paired_refits(first, second),
        second.group if first.group is None else first.group,
    )


def controlled(terms: Terms, control: ArrayLike, player: ArrayLike) -> Terms:
    """The same value less beta times the mean of a control whose expectation is known to be 0, beta_m = Cov(V_m, control) / Var(control).

    The control variate of least variance, which "Delta-OPE" (Jeunen and Ustimenko 2024, arXiv:2405.10024) chooses for differences of two policies, whose
    weights average the same; beta is estimated on the same players, a bias of the order 1 / P. control [N], NaN where it is not known: those rows are left
    out; player [N] as the terms' own.
    """
    values = as_vector("control", control)
    clusters = clusters_of(player, control=values)
    if not np.array_equal(clusters.players, terms.players):
        raise RequestError("controlled: expected a control on the same players")
    there = np.isfinite(values)
    top, bottom = clusters.sums(np.where(there, values, 0.0)), clusters.sums(there)
    pull = ratio_or_zero(top - ratio_or_zero(top.sum(), bottom.sum()) * bottom, bottom.sum())
    spread = float(pull @ pull)
    if spread == 0:
        return terms
    beta = terms.influences().sum(2).T @ pull / spread
    refits = terms.refits
    if refits is not None and terms.group is not None:
        tops, bottoms = (np.bincount(terms.group, weights=each, minlength=len(refits)) for each in (top, bottom))
        refits = refits - np.outer(ratio_or_zero(top.sum() - tops, bottom.sum() - bottoms), beta)
    numerator = np.concatenate([terms.numerator, -np.multiply.outer(top, beta)[:, :, None]], axis=2)
    denominator = np.concatenate([terms.denominator, np.repeat(bottom[:, None, None], len(beta), axis=1)], axis=2)
    return replace(terms, numerator=numerator, denominator=denominator, refits=refits)


def subset(terms: Terms, kept: Bools) -> Terms:
    """The same value over some of the players [P] alone, models as they are; the diagnostics stay those of all of them."""
    few = None if kept.sum() >= 2 else f"{int(kept.sum())} players: an interval needs at least two"
    return replace(
        terms,
        players=terms.players[kept],
        numerator=terms.numerator[kept],
        denominator=terms.denominator[kept],
        refusals=tuple(few or reason for reason in terms.refusals),
        refits=None,
        group=None,
    )


def _paired_refits(first: Terms, second: Terms) -> Floats | None:
    one, other = first.refits, second.refits
    if one is None and other is None:
        return None
    if one is not None and other is not None and one.shape != other.shape:
        raise RequestError("paired_difference: expected both estimates refitted on the same groups of players")
    return (first.values() if one is None else one) - (second.values() if other is None else other)


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
    refuse_level(level)
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
        ratio = ratio_or_zero(draws @ tops, bottom)
        slope = ratio_or_zero(expanded, bottom[:, None])
        # One product of two matrices, not a stack of small ones: BLAS is many times faster at it.
        influence = slope.reshape(-1, expanded.shape[1]) @ tops.T - (slope * ratio[:, None]).reshape(-1, expanded.shape[1]) @ bottoms.T
        spread = np.einsum("bcp,bp->bc", influence.reshape(*slope.shape[:2], players) ** 2, draws)
        return ratio @ expanded.T, np.sqrt(players / (players - 1) * spread), bottom

    (value,), (error,), (whole,) = linearised(np.ones((1, players)))
    # What rounding leaves of a spread that is zero: of a difference of two equal policies, rounded parts of the summands, not of their sum.
    least = 1e-12 * (np.abs(ratio_or_zero(expanded, whole[None])) @ np.abs(tops).sum(0))
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
    sample = _bounded("empirical_bernstein", values, low, high, level)
    log_term = math.log(4 / (1 - level))
    width = math.sqrt(2 * float(sample.var(ddof=1)) * log_term / len(sample)) + 7 * (high - low) * log_term / (3 * (len(sample) - 1))
    mean = float(sample.mean())
    return max(low, mean - width), min(high, mean + width)


def confidence_sequence(values: ArrayLike, low: float, high: float, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """(lower [n], upper [n]): bounds of the mean after 1, 2, ..., n values that hold at all of these moments at once, so one may look every night.

    The predictable plug-in empirical Bernstein sequence of Waudby-Smith and Ramdas 2024, arXiv:2010.09686, theorem 2, on x = (value - low) / (high - low):

        sum_i l_i x_i / sum_i l_i  -+  (ln(2 / a) + sum_i 4 (x_i - m_{i-1})^2 (-ln(1 - l_i) - l_i) / 4) / sum_i l_i,    a = 1 - level
        l_t = min(1/2, sqrt(2 ln(2 / a) / (s_{t-1} t ln(1 + t)))),  m_t = (1/2 + sum x) / (t + 1),  s_t = (1/4 + sum (x_i - m_i)^2) / (t + 1)

    intersected over time. values [n]: in the order in which they came, independent with one mean, so one per player; low, high: as in `empirical_bernstein`.
    For weights in [0, W] and outcomes in [a, b], one row per player, values = weight x outcome lie between min(0, W a) and max(0, W b).
    """
    sample = _bounded("confidence_sequence", values, low, high, level)
    x, t = (sample - low) / (high - low), np.arange(1, len(sample) + 1)
    log_term = math.log(2 / (1 - level))
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    # what each bet may know: the values before its own
    mean, variance = np.append(0.5, mean[:-1]), np.append(0.25, variance[:-1])
    bet = np.minimum(0.5, np.sqrt(2 * log_term / (variance * t * np.log1p(t))))
    staked = np.cumsum(bet)
    centre = np.cumsum(bet * x) / staked
    margin = (log_term + np.cumsum((x - mean) ** 2 * (-np.log1p(-bet) - bet))) / staked
    lower, upper = np.maximum.accumulate(np.maximum(centre - margin, 0)), np.minimum.accumulate(np.minimum(centre + margin, 1))
    return low + (high - low) * lower, low + (high - low) * upper


def _bounded(name: str, values: ArrayLike, low: float, high: float, level: float) -> Floats:
    """A sample of at least two values, after checking that it keeps to its range."""
    sample = as_vector("values", values)
    if len(sample) < 2:
        raise RequestError(f"{name}: expected at least two values")
    if not (low < high and np.isfinite(sample).all() and sample.min() >= low and sample.max() <= high):
        raise RequestError(f"{name}: expected values between {low} and {high}")
    refuse_level(level)
    return sample


def refuse_level(level: float) -> None:
    """A nominal coverage that is none, such as 95, is a mistake."""
    if not 0 < level < 1:
        raise RequestError(f"level: expected a number between 0 and 1, got {level}")


def effective_sample_size(weights: ArrayLike) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965): how many equal weights would be as precise; 0 where all are 0. weights [n], not negative."""
    sample = as_vector("weights", weights)
    squares = float(sample @ sample)
    return float(sample.sum()) ** 2 / squares if squares > 0 else 0.0


def verdict(support: Support, *, unusable: float = 0.0, standard_error: float = 1.0, width: float = 0.0) -> str:
    """The words "trust", or "do not trust: " with every reason, by the thresholds at the top of this module; what share was changed is told either way.

    width: of the interval, over the sum of the absolute parts that the value is made of (for a difference those of both policies).
    """
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
    if support.changed > LARGEST_CHANGED:
        doubts.append(f"{_changed(support)}, and the interval leaves out the bias that this brings")
    if support.negative > LARGEST_NEGATIVE:
        doubts.append(f"{support.negative:.0%} of the fitted density ratio lies below 0: its features are too poor, or its rows too few")
    if support.apart > LARGEST_APART:
        doubts.append(
            f"the fitted ratio of states and the same one step back lie {support.apart:.1f} standard errors apart: its features miss some of the past"
        )
    if unusable > LARGEST_UNUSABLE:
        doubts.append(f"{unusable:.0%} of the resamples hold no row with weight")
    if width > LARGEST_WIDTH:
        doubts.append(f"the interval is {width:.1f} times as wide as what it measures: too few outcomes to say more")
    if standard_error == 0:
        doubts.append("the value never varies between players")
    if doubts:
        return "do not trust: " + "; ".join(doubts)
    return f"trust: {_changed(support)}" if support.changed > 0 else "trust"


def _changed(support: Support) -> str:
    return f"{support.changed:.1%} of all weight {support.done}"


def worst_support(supports: Iterable[Support]) -> Support:
    """The worst of each diagnostic: what speaks against one part speaks against the whole."""
    each = list(supports)
    tops = [support.top_share for support in each if support.top_share is not None]
    overlaps = [support.overlap for support in each if support.overlap is not None]
    done = {support.done for support in each if support.changed > 0}
    return Support(
        min(support.ess for support in each),
        min(support.effective_players for support in each),
        max(tops, default=None),
        min(overlaps, default=None),
        min(support.measured for support in each),
        max((support.mean_weight for support in each), key=lambda mean: abs(mean - 1)),
        any(support.modelled for support in each),
        max(support.unreached for support in each),
        max(support.changed for support in each),
        max(support.negative for support in each),
        max(support.apart for support in each),
        each[0].setting if len({support.setting for support in each}) == 1 else None,
        done.pop() if len(done) == 1 else LESSENED,
    )


# --- what the estimators share ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """players [P] sorted ids; index [N] into them; starts [P]: each player's first row where every player's rows lie together, else None."""

    players: Ints
    index: Ints
    starts: Ints | None

    def sums(self, column: NDArray[np.generic]) -> Floats:
        """[P] sums of a column [N] over each player's rows."""
        numbers = column.astype(np.float64, copy=False)
        if self.starts is not None:  # several times faster than counting
            return np.add.reduceat(numbers, self.starts)
        return np.bincount(self.index, weights=numbers, minlength=len(self.players)).astype(np.float64)


def terms_of(
    estimator: str,
    clusters: Clusters,
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


def support_of(weights: Floats, measured: Bools, law: tuple[float, float], clusters: Clusters) -> Support:
    """Diagnostics of one objective: `weights` [N] as its terms use them, 0 where not measured; `law`: what `overlap_and_mean` says of the one-step weights."""
    heaviest = max(1, math.ceil(0.01 * np.count_nonzero(measured)))
    total = float(weights.sum())
    # Selecting among a million is slow; the heaviest 1 % are all among those above the 97 % point of every 97th row, or else among all.
    heavy = weights[weights >= np.quantile(weights[::97], 0.97)]
    heavy = heavy if len(heavy) >= heaviest else weights
    top = float(np.partition(heavy, len(heavy) - heaviest)[-heaviest:].sum()) / total if total > 0 else 0.0
    share = np.count_nonzero(measured) / len(weights)
    return Support(effective_sample_size(weights), effective_sample_size(clusters.sums(weights)), top, law[0], share, law[1])


def overlap_and_mean(known: Floats, clusters: Clusters) -> tuple[float, float]:
    """`Support`'s overlap and mean weight of one-step weights [N], NaN where not known; they are the same for every objective."""
    has_law = np.isfinite(known)
    one_step = np.where(has_law, known, 0.0)
    laws = int(np.count_nonzero(has_law))
    overlap, mean = (float(np.minimum(one_step, 1).sum()) / laws, float(one_step.sum()) / laws) if laws else (0.0, 0.0)
    deviation = clusters.sums(np.where(has_law, one_step - mean, 0.0))
    error = math.sqrt(float(deviation @ deviation)) / max(laws, 1)
    return overlap, mean if abs(mean - 1) > 3 * error else 1.0


def usable_weights(weights: Floats) -> tuple[Floats, str | None]:
    """Weights with infinities as NaN, and the refusal that an infinity brings."""
    refuse_negative(weights=weights)
    infinite = np.flatnonzero(np.isinf(weights))
    if not len(infinite):
        return weights, None
    reason = f"in {len(infinite)} rows, row {int(infinite[0])} first, the target acts where the logger's propensity is 0"
    return np.where(np.isinf(weights), np.nan, weights), reason


def no_support(weights: Floats, measured: Bools, clusters: Clusters) -> str | None:
    if np.count_nonzero(clusters.sums(measured)) < 2:
        return "fewer than two players have a row with both a propensity and an outcome"
    weighted = np.count_nonzero(clusters.sums(weights))
    if weighted == 0:
        return "no overlap: every weight is 0, the logs never do what the target does"
    return "only one player has weight: nothing tells how the value varies" if weighted == 1 else None


def no_model(v: Floats, q: Floats) -> str | None:
    if np.isfinite(v).all() and np.isfinite(q).all():
        return None
    if np.isnan(v).all() and np.isnan(q).all():
        return "there is no model of this objective"
    raise RequestError("q, v: expected finite values in every row of an objective, or NaN in all of them")


def clusters_of(player: ArrayLike, **arrays: Floats) -> Clusters:
    """Players of the rows, after checking that every array has as many rows and every table as many objectives."""
    ids = np.asarray(player)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"player: expected one whole number per row, got shape {ids.shape} of {ids.dtype}")
    refuse_other_rows(player=ids, **arrays)
    if not len(ids):
        raise RequestError("player: expected at least one row")
    players, index = np.unique(ids, return_inverse=True)
    together = bool((np.diff(index) >= 0).all())
    starts = np.flatnonzero(np.diff(index, prepend=-1)) if together else None
    return Clusters(players.astype(np.int64), index.astype(np.int64), starts)


def refuse_other_rows(**arrays: NDArray[np.generic]) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError("expected the same number of rows in " + ", ".join(f"{name} ({length})" for name, length in lengths.items()))
    widths = {name: array.shape[1] for name, array in arrays.items() if array.ndim == 2 and name in {"rewards", "q", "v"}}
    if len(set(widths.values())) > 1:
        raise RequestError("expected the same number of objectives in " + ", ".join(f"{name} ({width})" for name, width in widths.items()))


def as_vector(name: str, values: ArrayLike) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise RequestError(f"{name}: expected one number per row, got an array of shape {column.shape}")
    return column


def as_table(name: str, values: ArrayLike) -> Floats:
    """[N] or [N, M] as [N, M]; NaN is allowed, infinity is not. Each objective lies in one piece: many times faster to read than every M-th number."""
    table = np.asarray(values, dtype=np.float64, order="F")
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2:
        raise RequestError(f"{name}: expected [rows] or [rows, objectives], got an array of shape {table.shape}")
    if np.isinf(table).any():
        raise RequestError(f"{name}: row {int(np.flatnonzero(np.isinf(table).any(1))[0])} is infinite")
    return table


def as_finite_table(name: str, values: ArrayLike) -> Floats:
    table = as_table(name, values)
    if np.isnan(table).any():
        raise RequestError(f"{name}: row {int(np.flatnonzero(np.isnan(table).any(1))[0])} is NaN; expected a finite number for every feature")
    return table


def as_flags(name: str, values: ArrayLike, rows: int) -> Bools:
    flags = np.asarray(values)
    if flags.shape != (rows,) or flags.dtype != np.bool_:
        raise RequestError(f"{name}: expected {rows} booleans, got shape {flags.shape} of {flags.dtype}")
    return flags


def refuse_negative(**arrays: Floats) -> None:
    for name, array in arrays.items():
        if (array < 0).any():
            row = int(np.flatnonzero((array < 0).reshape(len(array), -1).any(1))[0])
            raise RequestError(f"{name}: row {row} is below 0")


def ratio_or_zero(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, 0 where bottom is 0: a term that nothing measures adds nothing."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom != 0)
