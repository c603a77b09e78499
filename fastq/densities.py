"""The law of each behaviour policy's action given the state, estimated where the logs do not give it.

Per policy and dimension a ridge regression of the state gives an index; around it stands a normal law whose centre and spread follow the index by maximum
likelihood: clipped to the bounds where the logs show actions upon them, truncated where they show none, its mass in a cell where the dimension has a
step. Later dimensions follow the residuals of earlier ones. Items of a catalogue: multinomial logistic regression, mixed with the items' frequencies
as far as that predicts better. What is said of a player comes from models that saw none of that player (cross-fitting over `FOLDS` folds).

Known propensities always win. An action upon a bound of a continuous dimension has no density, known or estimated, and a decision of our own without a
propensity never gets one: what cannot be drawn again must not be learned from as if it could.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr

from fastq.platform import OWN_POLICY
from fastq.windows import Windows, described
from fastq.workspace import Workspace, replacing

FOLDS = 3
FEWEST = 50  # decisions of a policy below which its law is not estimated
DECISIONS = 60_000  # that a law is learned from, at most, of whole players; all are estimated
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # that an index chooses among, per row, on features of mean square 1
FITTED = 8_000  # decisions that a law's centre and spread are fitted on, at most
LEAST_LOG = -700.0  # of an estimated density, so that it stays a positive number
LEAST_SPREAD = 1e-3  # of a dimension's range: a law is never taken to be narrower
SLIPS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)  # shares of actions drawn from anywhere in the bounds: far out no law may be as thin as the normal one, for it divides
LEVELS = (0.5, 0.8, 0.95)  # of the central intervals whose coverage is reported
POOR_COVERAGE = 0.1  # by which a central interval may miss its level before the law counts as poorly calibrated
POOR_RELIABILITY = 0.2  # share of the probability that may lie on the wrong items
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99)  # of the logistic model; the rest is the items' frequencies, which exclude nothing
MOST_ITEMS = 200  # of a catalogue for which the state is asked; beyond it frequencies alone
ITEM_ROWS = 4_000  # decisions that the logistic model is fitted on, at most
BINS = 10  # of the PIT histogram and of the reliability table

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Calibration:
    """How well one policy's estimated law predicts its own actions, of players whom the model had not seen.

    decisions: that it was judged on; estimated: decisions of this policy that got their propensity from it; atoms: share of its decisions upon a bound,
    which have no density.
    log_likelihood: mean log density (or probability) of its actions; baseline: the same of a law that does not look at the state.
    coverage: per dimension the share of actions in the central intervals at `LEVELS`; pit: per dimension the shares of actions in ten slices of equal
    probability (0.1 each where the law is right). reliability: (mean probability, share that happened, pairs) per bin, of items of a catalogue.
    error: root mean square difference to the log propensities that are known; None where none is. poor: whether to mistrust it, with the reason in `sentence`.
    """

    policy: str
    decisions: int
    estimated: int
    atoms: float
    log_likelihood: float | None
    baseline: float | None
    coverage: dict[str, dict[str, float]]
    pit: dict[str, list[float]]
    reliability: list[tuple[float, float, int]]
    error: float | None
    poor: bool
    sentence: str


@dataclass(frozen=True)
class Told:
    """What models that saw none of the player say of the executed actions, NaN where they were not asked.

    log_density, baseline [N]: under the law, and under one that does not look at the state; cumulative [N, D, 2]: probability of less, and of at most that
    much; probability [N, C] of every item of a catalogue.
    """

    log_density: Array
    baseline: Array
    cumulative: Array
    probability: Array | None = None


@dataclass(frozen=True)
class Estimated:
    """windows: with estimated `propensity` and `law` where they were missing; rows [N] bool: where that is so; calibrations: per policy that needed it."""

    windows: Windows
    rows: Array
    calibrations: list[Calibration]


def estimate(windows: Windows, seed: int = 0) -> Estimated:
    """Fill in the propensities that are not known, and at those decisions the laws of the other policies, so that they may be weighed against all.

    Deterministic. Costs nothing where every propensity is known.
    """
    atom = atoms(windows)
    ours = np.array([name == OWN_POLICY for name in windows.policies])
    wanted = ~np.isfinite(windows.propensity) & ~atom & ~ours[windows.policy]
    if not wanted.any():
        return Estimated(windows, wanted, [])
    fold, learned = _folds(windows, seed)
    x = described(windows)
    law, found = windows.law.copy(), []
    for k in np.flatnonzero(~ours).tolist():
        mine = windows.policy == k
        name, share = windows.policies[k], float(atom[mine].mean()) if mine.any() else 0.0
        if (mine & learned).sum() < FEWEST or len(np.unique(windows.player[mine & learned])) < FOLDS:
            if (mine & wanted).any():
                said = f"{name}: {mine.sum():,} decisions are too few to estimate its propensities from; their weights stay unknown"
                found.append(Calibration(name, int(mine.sum()), 0, share, None, None, {}, {}, [], None, poor=True, sentence=said))
            continue
        told = (_items if windows.catalogue is not None else _numbers)(windows, k, x, fold, learned, mine | wanted)
        here = wanted & ~np.isfinite(law[:, k])
        law[here, k] = np.exp(np.maximum(told.log_density[here], LEAST_LOG))
        if (mine & wanted).any():
            found.append(_judged(windows, k, told, atom, int((wanted & mine).sum())))
    propensity = np.where(wanted, law[np.arange(len(windows)), windows.policy], windows.propensity)
    filled = wanted & np.isfinite(propensity)
    law[~filled] = windows.law[~filled]
    return Estimated(replace(windows, propensity=propensity, law=law), filled, found)


def atoms(windows: Windows) -> Array:
    """[N] whether the executed action lies exactly on a bound of a continuous dimension."""
    if windows.catalogue is not None:
        return np.zeros(len(windows), bool)
    return ((windows.action == windows.platform.bounds[:, 0]) | (windows.action == windows.platform.bounds[:, 1])).any(1)


def _folds(windows: Windows, seed: int) -> tuple[Array, Array]:
    """[N] each decision's fold, by player, and [N] whether it is among those that are learned from."""
    rng = np.random.default_rng(seed)
    players = rng.permutation(len(windows.player_ids))
    fold = np.empty(len(players), np.int64)
    fold[players] = np.arange(len(players)) % FOLDS
    number = np.bincount(windows.player, minlength=len(players))[players]
    drawn = np.empty(len(players), bool)
    drawn[players] = np.cumsum(number) <= max(DECISIONS, number[0] if len(number) else 0)
    return fold[windows.player], drawn[windows.player]


# ---- how well ----------------------------------------------------------------------------------------------------------------
def _judged(windows: Windows, k: int, told: Told, atom: Array, estimated: int) -> Calibration:
    """What the laws said of policy k's own decisions, held against what it did."""
    mine = (windows.policy == k) & np.isfinite(told.log_density)
    inside, name = mine & ~atom, windows.policies[k]
    n = int(inside.sum())
    likelihood, baseline = (float(each[inside].mean()) if n else None for each in (told.log_density, told.baseline))
    known = inside & np.isfinite(windows.propensity)
    error = float(np.sqrt(np.square(told.log_density[known] - np.log(windows.propensity[known])).mean())) if known.any() else None
    coverage: dict[str, dict[str, float]] = {}
    pit: dict[str, list[float]] = {}
    reliability: list[tuple[float, float, int]] = []
    doubts = []
    if likelihood is not None and baseline is not None and likelihood < baseline - 0.01:
        doubts.append(f"its actions are predicted worse with the state than without ({likelihood:.3g} against {baseline:.3g} nats)")
    if told.probability is None:
        for d, dimension in enumerate(windows.platform.dimension_names):
            below, upto = told.cumulative[mine, d].T
            coverage[dimension] = {f"{level:g}": _share(below, upto, (1 - level) / 2, (1 + level) / 2) for level in LEVELS}
            pit[dimension] = [_share(below, upto, i / BINS, (i + 1) / BINS) for i in range(BINS)]
            off = [
                f"{dimension}: intervals of {level:.0%} hold {coverage[dimension][f'{level:g}']:.0%} of the actions"
                for level in LEVELS
                if abs(coverage[dimension][f"{level:g}"] - level) > POOR_COVERAGE + 3 * np.sqrt(level * (1 - level) / max(mine.sum(), 1))
            ]
            different = len(np.unique(windows.action[inside, d]))
            if off and windows.platform.steps[d] == 0 and different < n / 10:
                off.append(f"it takes {different:,} different values only: if they lie on a grid, give the dimension a step in fastq.yaml")
            doubts += off
    else:
        reliability, misplaced = _reliability(told.probability[mine], windows.item[mine])
        if misplaced > POOR_RELIABILITY:
            doubts.append(f"{misplaced:.0%} of the probability lies on items that it does not choose as often")
    gain = "" if likelihood is None or baseline is None else f", {likelihood - baseline:+.2f} nats per decision against a law without the state"
    said = f"{name}: calibrated on {n:,} decisions of players it had not seen{gain}"
    if doubts:
        said = f"{name}: its estimated propensities are poorly calibrated: {'; '.join(doubts)}"
    return Calibration(name, n, estimated, float(atom[windows.policy == k].mean()), likelihood, baseline, coverage, pit, reliability, error, bool(doubts), said)


def _share(below: Array, upto: Array, left: float, right: float) -> float:
    """The share of actions between two probabilities, where an action that has a mass is spread evenly over it."""
    mass = upto - below
    within = np.clip(np.minimum(upto, right) - np.maximum(below, left), 0, None)
    return float(np.where(mass > 1e-9, within / np.maximum(mass, 1e-9), (below >= left) & (below < right)).mean())


def _reliability(probability: Array, item: Array) -> tuple[list[tuple[float, float, int]], float]:
    """Per tenth of the probability mass: mean probability, share that happened and number of pairs; and the mass that is misplaced beyond chance."""
    happened = np.zeros(probability.shape, bool)
    happened[np.arange(len(item)), item] = True
    flat, hit = probability.ravel(), happened.ravel()
    order = np.argsort(flat, kind="stable")
    mass = np.cumsum(flat[order])
    slot = np.minimum((mass / mass[-1] * BINS).astype(int), BINS - 1)
    number, said, found = (np.bincount(slot, weights=each, minlength=BINS) for each in (np.ones(len(slot)), flat[order], hit[order].astype(float)))
    table = [(float(said[b] / number[b]), float(found[b] / number[b]), int(number[b])) for b in range(BINS) if number[b]]
    return table, float(np.clip(np.abs(found - said) - 3 * np.sqrt(said), 0, None).sum() / said.sum())


def write_calibrations(workspace: Workspace, found: Sequence[Calibration]) -> None:
    """Keep what was last estimated."""
    workspace.make()
    with replacing(workspace.densities) as partial:
        partial.write_text(json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8")


def read_calibrations(workspace: Workspace) -> list[Calibration]:
    """The calibrations that were last kept; none where nothing had to be estimated."""
    try:
        kept = json.loads(workspace.densities.read_text(encoding="utf-8"))
        return [Calibration(**each | {"reliability": [tuple(row) for row in each["reliability"]]}) for each in kept]
    except (OSError, ValueError, TypeError, KeyError):
        return []


# ---- items -------------------------------------------------------------------------------------------------------------------
def _items(windows: Windows, k: int, x: Array, fold: Array, learned: Array, asked: Array) -> Told:
    """Probabilities of the catalogue's items under policy k, where `asked`: a logistic model of the state mixed with frequencies, none of them 0."""
    from sklearn.linear_model import LogisticRegression

    assert windows.catalogue is not None
    n, items = len(windows), len(windows.catalogue.ids)
    usable = (windows.policy == k) & learned & (windows.item >= 0)
    frequency, model = np.full((n, items), np.nan, np.float32), np.full((n, items), np.nan, np.float32)
    for held in range(FOLDS):
        rows, out = np.flatnonzero(usable & (fold != held)), np.flatnonzero(asked & (fold == held))
        if len(rows) < FEWEST or not len(out):
            continue
        count = np.bincount(windows.item[rows], minlength=items)
        frequency[out] = (count + 1 / items) / (len(rows) + 1)
        some = rows[:: -(-len(rows) // ITEM_ROWS)]
        present = np.unique(windows.item[some])
        if len(present) > 1 and items <= MOST_ITEMS and x.shape[1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fit that ends early is as good as it predicts, which is measured
                fitted = LogisticRegression(C=0.05, max_iter=40).fit(x[some], windows.item[some])
            model[out] = 0.0
            model[np.ix_(out, fitted.classes_)] = fitted.predict_proba(x[out])
        else:
            model[out] = frequency[out]
    judged = np.flatnonzero(usable & asked & np.isfinite(frequency[:, 0]))
    chosen = judged, windows.item[judged]
    share = max(SHARES, key=lambda part: float(np.log(part * model[chosen] + (1 - part) * frequency[chosen]).mean()))
    probability = share * model + (1 - share) * frequency
    at = np.arange(n), np.maximum(windows.item, 0)
    return Told(np.log(probability[at].astype(float)), np.log(frequency[at].astype(float)), np.full((n, 0, 2), np.nan), probability)


# ---- numbers ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Law:
    """A normal law of one dimension, scaled to [0, 1]: log spread s0 + s1 m, centre c0 + c1 m + c2 m² + c3 m inside the bounds + earlier dimensions' residuals.

    coefficients [2 + X]: s0, s1, c; a design [N, X] has the columns 1, m (the index), m², m in [0, 1], residuals. clipped: what falls beyond a bound lies
    upon it; else the law is truncated.
    """

    coefficients: Array
    step: float
    clipped: bool

    def spread(self, design: Array) -> Array:
        return np.exp(np.clip(design[:, :2] @ self.coefficients[:2], np.log(LEAST_SPREAD), np.log(10.0)))

    def log_density(self, y: Array, design: Array) -> tuple[Array, Array, Array]:
        """[N] log density at y (upon a bound of a clipped law the log mass), and its slopes by the centre and by the log spread."""
        centre, spread = design @ self.coefficients[2:], self.spread(design)
        z = (y - centre) / spread
        value, by_centre, by_spread = -0.5 * z**2 - np.log(spread) - 0.5 * np.log(2 * np.pi), z / spread, z**2 - 1
        massive = np.full(len(y), self.step > 0) | (self.clipped & ((y <= 0) | (y >= 1)))
        if massive.any():
            value[massive], by_centre[massive], by_spread[massive] = _log_mass(*self._edges(y[massive]), centre[massive], spread[massive])
            value -= np.log(self.step) if self.step else 0.0
        if not self.clipped:
            whole = _log_mass(np.full(len(y), -self.step / 2), np.full(len(y), 1 + self.step / 2), centre, spread)
            value, by_centre, by_spread = value - whole[0], by_centre - whole[1], by_spread - whole[2]
        return value, by_centre, by_spread

    def _edges(self, y: Array) -> tuple[Array, Array]:
        left, right = y - self.step / 2, y + self.step / 2
        return (np.where(y <= 0, -np.inf, left), np.where(y >= 1, np.inf, right)) if self.clipped else (left, right)

    def cumulative(self, y: Array, design: Array) -> tuple[Array, Array]:
        """[N] probability of less than y and of at most y; they differ by a cell's or a bound's mass."""
        centre, spread = design @ self.coefficients[2:], self.spread(design)
        below, upto = (ndtr((edge - centre) / spread) for edge in self._edges(y))
        if self.clipped:
            return np.where(y >= 1, ndtr((1 - self.step / 2 - centre) / spread), below), upto
        low, high = ndtr((-self.step / 2 - centre) / spread), ndtr((1 + self.step / 2 - centre) / spread)
        whole = np.maximum(high - low, 1e-12)
        return np.clip((below - low) / whole, 0, 1), np.clip((upto - low) / whole, 0, 1)


def _log_mass(left: Array, right: Array, centre: Array, spread: Array) -> tuple[Array, Array, Array]:
    """[N] log of the normal mass between two edges, without cancellation in the tails, and its slopes by the centre and by the log spread."""
    a, b = (left - centre) / spread, (right - centre) / spread
    upper = a > 0
    high, low = log_ndtr(np.where(upper, -a, b)), log_ndtr(np.where(upper, -b, a))
    mass = high + np.log1p(-np.exp(np.minimum(low - high, -1e-12)))

    def ratio(edge: Array) -> Array:
        return np.exp(np.minimum(-0.5 * np.square(edge) - 0.5 * np.log(2 * np.pi) - mass, 50.0))

    at_a, at_b = ratio(a), ratio(b)
    finite_a, finite_b = np.where(np.isfinite(a), a, 0.0), np.where(np.isfinite(b), b, 0.0)
    return mass, (at_a - at_b) / spread, finite_a * at_a - finite_b * at_b


def _most_likely(y: Array, design: Array, step: float, *, clipped: bool) -> tuple[_Law, float]:
    """The law by maximum likelihood, and its mean loss."""
    start = np.concatenate([[np.log(max(float((y - design[:, 1]).std()), LEAST_SPREAD)), 0.0], np.eye(design.shape[1])[1]])
    pull = 1e-4 * np.concatenate([[0.0, 1.0], np.ones(design.shape[1])])  # towards the index as it is, where the data do not say

    def loss(coefficients: Array) -> tuple[float, Array]:
        value, by_centre, by_spread = _Law(coefficients, step, clipped).log_density(y, design)
        slope = np.concatenate([design[:, :2].T @ by_spread, design.T @ by_centre]) / len(y)
        off = coefficients - start
        return float(-value.mean() + (pull * off**2).sum()), -slope + 2 * pull * off

    found = minimize(loss, start, jac=True, method="BFGS", options={"maxiter": 50, "gtol": 1e-4})
    coefficients = found.x if np.isfinite(found.x).all() and np.isfinite(found.fun) else start
    return _Law(coefficients, step, clipped), float(found.fun if np.isfinite(found.fun) else np.inf)


def _indices(x: Array, y: Array) -> tuple[Array, Array]:
    """[1 + X, D] coefficients of ridge regressions of y [N, D], and [N, D] what they say of each row when it is left out, whose error chooses the strengths."""
    centre, mean = x.mean(0, dtype=float), y.mean(0)
    off = x - centre.astype(x.dtype)
    values, vectors = np.linalg.eigh((off.T @ off).astype(float) / len(x))
    turned = off @ vectors.astype(x.dtype)
    along = turned.T @ (y - mean) / len(x)
    coefficients, alone, least = np.empty(along.shape), np.empty(y.shape), np.full(y.shape[1], np.inf)
    for strength in RIDGES:
        shrunk = 1 / (np.maximum(values, 0) + strength)
        weight = shrunk[:, None] * along
        hat = np.minimum((np.square(turned) @ shrunk + 1) / len(x), 0.9)
        said = y - (y - mean - turned @ weight) / (1 - hat)[:, None]
        error = np.square(y - said).mean(0)
        better = error < least
        coefficients[:, better], alone[:, better], least = (vectors @ weight)[:, better], said[:, better], np.minimum(error, least)
    return np.concatenate([(mean - centre @ coefficients)[None], coefficients]), alone


def _numbers(windows: Windows, k: int, x: Array, fold: Array, learned: Array, asked: Array) -> Told:
    """Density and cumulative probabilities of the executed actions under policy k, where `asked`.

    A proposal that was logged is an action of the policy, whether executed or not: all of them are learned from.
    """
    low, high = windows.platform.bounds.T
    wide = high - low
    steps = windows.platform.steps / wide
    taken, executed = (windows.proposals[:, k] - low) / wide, (windows.action - low) / wide
    usable = np.isfinite(taken).all(1) & learned
    n, dimensions = executed.shape
    told = Told(np.full(n, np.nan), np.full(n, np.nan), np.full((n, dimensions, 2), np.nan))
    for held in range(FOLDS):
        rows, out = np.flatnonzero(usable & (fold != held)), np.flatnonzero(asked & (fold == held))
        if len(rows) < FEWEST or not len(out):
            continue
        some = np.arange(0, len(rows), -(-len(rows) // FITTED))
        coefficients, alone = _indices(x[rows], taken[rows])
        index, index_out = alone[some], coefficients[0] + x[out] @ coefficients[1:]
        residual, residual_out = taken[rows][some] - index, executed[out] - index_out
        log_density, baseline = np.zeros(len(out)), np.zeros(len(out))
        for d in range(dimensions):
            y, asked_of = taken[rows[some], d], executed[out, d]
            design, design_out = _design(index[:, d], residual[:, :d]), _design(index_out[:, d], residual_out[:, :d])
            on_bound = bool(((taken[rows, d] <= 0) | (taken[rows, d] >= 1)).any())
            forms = (True, False) if steps[d] else (on_bound,)
            law, _ = min((_most_likely(y, design, float(steps[d]), clipped=form) for form in forms), key=lambda each: each[1])
            flat, flat_out = _design(np.full(len(y), y.mean()), residual[:, :0]), _design(np.full(len(out), y.mean()), residual_out[:, :0])
            marginal, _ = _most_likely(y, flat, law.step, clipped=law.clipped)
            within = law.log_density(y, design)[0][(y > 0) & (y < 1)]
            share = SLIPS[int(np.argmax([_slipped(within, slip).sum() for slip in SLIPS]))]
            log_density += _slipped(law.log_density(asked_of, design_out)[0], share)
            baseline += marginal.log_density(asked_of, flat_out)[0]
            told.cumulative[out, d] = (1 - share) * np.stack(law.cumulative(asked_of, design_out), 1) + share * np.clip(asked_of, 0, 1)[:, None]
        told.log_density[out], told.baseline[out] = log_density - np.log(wide).sum(), baseline - np.log(wide).sum()
    return told


def _slipped(log_density: Array, share: float) -> Array:
    return np.logaddexp(np.log1p(-share) + log_density, np.log(share))


def _design(index: Array, residuals: Array) -> Array:
    # a policy that keeps its aim inside the bounds before it adds noise follows the index no further than that
    return np.concatenate([np.ones((len(index), 1)), np.stack([index, index**2, np.clip(index, 0, 1)], 1), residuals], 1)
