"""The held-out report per objective, and the promotion gate with its reasons.

Everything is estimated on players that training never saw. What is estimated: the mean over their logged decision states of the
discounted sum that follows if the policy alone acts from then on, per objective and in weighted sum; a behaviour policy's value is
counterfactual too. The gate compares a candidate with the champion, or with the best behaviour policy, on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from fastq import densities, features, ope
from fastq.densities import Calibration
from fastq.equations import action_features
from fastq.platform import OWN_POLICY, Platform
from fastq.policy import Policy, Situation
from fastq.windows import Windows, held_out_players

STEPS = 1  # decisions that the second opinion corrects by weights before the model takes over
LEAST_CHANCE = 0.01  # an estimated probability of being assigned to a policy is never taken to be smaller
LEAST_PLAYERS = 2
LEAST_SEGMENT_PLAYERS = 30.0  # effective players that a segment named in the platform file needs
LEAST_BOOTSTRAP_ALPHA = 0.01  # of 1,000 resamples the outermost 10 still say where a tail lies; beyond it goes on as the normal one does
FADING = 0.9  # per decision, of what was done to a player before: the last ten count most, so that habits show; 0.8 and 0.95 do about as well
DISAGREEMENT = 2.0  # standard errors by which two answers to one question may differ before a warning


@dataclass(frozen=True)
class Attempt:
    """One judgement of a candidate by the gate: when, on data until when (both microseconds since 1970), and how it ended."""

    at: int
    data_until: int
    promoted: bool


@dataclass(frozen=True)
class Report:
    """What the logs say of a candidate. `estimates`: one record per policy, objective (None: weighted sum) and estimator, as `fastq evaluate --json`.

    difference: the candidate against `against`, paired on the same rows. guardrails: mean immediate value under the policy as served. segments: the
    difference per value of each attribute in `evaluation.segments`. cross_checks: the candidate's weighted sum by its own Q, by the fitted Q of the evaluation
    and by the doubly robust default; warnings: where they disagree. alpha: the error rate of this attempt, with its reason in `alpha_because`.
    densities: how well the propensities that the logs lack were estimated, per policy; empty where none had to be.
    reasons: why the gate refused; empty if `promoted`. data_until: the newest decision, RFC 3339.
    """

    estimates: list[dict[str, Any]]
    against: str
    difference: dict[str, Any] | None
    guardrails: list[dict[str, Any]]
    promoted: bool
    reasons: list[str]
    players: int
    decisions: int
    segments: list[dict[str, Any]] = field(default_factory=list)
    cross_checks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    alpha: float = 0.025
    alpha_because: str = ""
    data_until: str = ""
    densities: list[Calibration] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """One policy to be valued on N held-out decisions: expected action features [N, P] and importance weights [N]."""

    name: str
    features: np.ndarray
    weights: np.ndarray
    estimated: bool  # the weights rest on an estimated assignment
    propensities: float = 0.0  # share of the decisions whose weights rest on estimated propensities
    doubt: str = ""  # why these are not to be trusted


@dataclass(frozen=True)
class Held:
    """The held-out decisions, with what the candidate's representation says of their states."""

    windows: Windows
    rows: np.ndarray  # [N] into windows
    at: Situation
    following: np.ndarray  # [N] into rows
    phi: np.ndarray  # [N, P] of the logged action
    state: np.ndarray  # [N, 1 + absence + …] what the evaluation's own value model sees of the states
    free: int  # the first columns of `state`, the intercept and the absence, which are not shrunk
    past: int  # the last columns of `state`, from `treatment`
    estimated: np.ndarray  # [N] whether the decision's propensity is an estimate
    calibrations: list[Calibration]  # of these estimates
    sums: dict[bytes, ope.LoggedSums | ope.Refusal] = field(default_factory=dict, compare=False)  # per discounts: what all targets share, once made

    @property
    def doubt(self) -> str:
        """Why the estimated propensities are not to be trusted; empty where they are, or where all are known."""
        return "; ".join(each.sentence for each in self.calibrations if each.poor)


def hold(policy: Policy, windows: Windows) -> Held:
    """The decisions of the players held out of training, propensities that were not logged estimated; all of them where too few were held out."""
    found = densities.estimate(windows, policy.platform.training.seed)
    windows = found.windows
    out = held_out_players(windows.player_ids, policy.platform.training.holdout, policy.platform.training.seed)[windows.player]
    if len(np.unique(windows.player[out])) < LEAST_PLAYERS:
        out[:] = True
    rows = np.flatnonzero(out)
    place = np.full(len(windows), -1)
    place[rows] = np.arange(len(rows))
    following = np.where(windows.following[rows] >= 0, place[windows.following[rows]], -1)
    phi = action_features(torch.from_numpy(policy.units.standard(windows.action[rows])), policy.polynomial).numpy()
    at = situations(policy, windows, rows)
    # all that decides who acts and what each would do stands beside the state itself: what is left out would pass for an effect of the action
    state = np.concatenate([at.b.double().numpy(), at.psi.numpy()[:, 1:], at.expected.numpy().reshape(len(rows), -1), at.assignment.numpy()[:, 1:]], 1)
    unshrunk = np.concatenate([np.ones((len(rows), 1)), absence(windows, rows)], 1)
    past = treatment(at, phi, following)
    seen = np.concatenate([unshrunk, state - state.mean(0), past - past.mean(0)], 1)
    return Held(windows, rows, at, following, phi, seen, unshrunk.shape[1], past.shape[1], found.rows[rows], found.calibrations)


def treatment(at: Situation, phi: np.ndarray, following: np.ndarray) -> np.ndarray:
    """[N, H] what was done to the player before this decision: fading sums over the earlier decisions of three things that were so at each.

    By how much the action's features phi [N, P] differed from those expected of the policies together, these expected ones, and who was expected to act. As
    far as the representation knows what the policies chose by, the difference beside it is chance, and what follows it is its doing, late effects too (Robins
    et al. 2000, "Marginal structural models", doi:10.1097/00001648-200009000-00011). `following` [N] as in `Held`: a path starts with nothing. Columns
    that are the same for all are left out, so that there are none where every player decides once.
    """
    reference, assignment = at.reference.numpy(), at.assignment.numpy()[:, 1:]
    here = np.concatenate([phi - reference, reference, assignment], 1)
    found = np.zeros_like(here)
    now = np.setdiff1d(np.arange(len(phi)), following)
    while len(now := now[following[now] >= 0]):
        found[following[now]] = FADING * found[now] + (1 - FADING) * here[now]
        now = following[now]
    return found[:, np.ptp(found, axis=0) > 0] if len(found) else found


def absence(windows: Windows, rows: np.ndarray, chunk: int = 65_536) -> np.ndarray:
    """[N, A] whether nothing was seen of the player for the last 1, 2, … periods, up to `churn` of them; none that is the same for all.

    A player who stays away for as long as `churn` is gone, and the way there is steep and rare: shrunk, or left to what is learned of the
    state, values would not go down to zero at its end, and everything before it would be valued too high.
    """
    state = windows.platform.state
    most = min(state.churn, state.window)
    gone = np.zeros((len(rows), most))
    for start in range(0, len(rows), chunk) if state.measures else ():
        seen = np.isfinite(windows.raw(rows[start : start + chunk])[:, -most:, : len(state.measures)]).any(2)
        gone[start : start + chunk] = ~np.logical_or.accumulate(seen[:, ::-1], axis=1)
    return gone[:, np.ptp(gone, axis=0) > 0] if len(rows) else gone[:, :0]


def situations(policy: Policy, windows: Windows, rows: np.ndarray, chunk: int = 16_384) -> Situation:
    """The critic's view of logged decisions, through the very path that serving takes."""
    parts = [policy.situations(policy.encode(windows.states(rows[start : start + chunk]))) for start in range(0, len(rows), chunk)]
    return Situation(**{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].__dataclass_fields__})


def served_target(policy: Policy, held: Held, name: str = OWN_POLICY) -> Target:
    """A trained policy as it would be served: its law's features and density at the logged actions."""
    windows, rows = held.windows, held.rows
    at = situations(policy, windows, rows) if name != OWN_POLICY else held.at
    if policy.catalogue is not None:
        total, items = policy.item_scores(at, policy.platform.weights, None)
        law = policy.item_law(total, at, policy.platform.serving.exploration).numpy()
        features = np.einsum("bc,bcp->bp", law, policy.catalogue.embedding[items].astype(float))
        density = (law * (items == windows.item[rows, None])).sum(1)
        weights = ope.naive_weights(density, logging_density(windows, rows), np.zeros(len(rows), bool))
        return resting(Target(name, features, weights, estimated=False), held, held.estimated)
    return continuous_target(name, policy, held, policy.best_units(at, policy.platform.weights, *policy.platform.bounds.T))


def continuous_target(name: str, policy: Policy, held: Held, mean: torch.Tensor) -> Target:
    """What would be served around the noise-free actions `mean` [N, D] (standardised): the platform's law and its density at the logged actions."""
    windows, rows, bounds = held.windows, held.rows, policy.platform.bounds
    density = policy.density(windows.action[rows], policy.on_grid(policy.units.raw(mean.numpy()), *bounds.T))
    on_bound = ((windows.action[rows] == bounds[:, 0]) | (windows.action[rows] == bounds[:, 1])).any(1)
    atom = on_bound & ~np.isfinite(windows.propensity[rows])
    weights = ope.naive_weights(density, logging_density(windows, rows), atom)
    return resting(Target(name, policy.served_features(mean).numpy(), weights, estimated=False), held, held.estimated)


def resting(target: Target, held: Held, on: np.ndarray) -> Target:
    """The target, saying that its weights rest on estimated propensities at the decisions `on` [N], if any."""
    return replace(target, propensities=float(on.mean()), doubt=held.doubt) if on.any() else target


def logging_density(windows: Windows, rows: np.ndarray) -> np.ndarray:
    """[N] density of the logged action: under all policies together where every law and chance is known, else under the one that acted.

    The mixture's weights are bounded by what any policy does, so their variance is never larger (Agarwal et al. 2017, arXiv 1703.06180).
    """
    mixture = windows.mixture(rows)
    return np.where(np.isfinite(mixture), mixture, windows.propensity[rows])


def behaviour_target(policy: Policy, held: Held, k: int) -> Target:
    """Behaviour policy `k`: what it would do by the experts; its density over that of all policies together where every law and chance is known.

    Elsewhere weight 1 / chance of being assigned where it acted, 0 where another did: the same in expectation, with more variance. The chance is the
    logged one; else the representation's classifier estimates it, and the target says so.
    """
    windows, rows = held.windows, held.rows
    acted = windows.policy[rows] == k
    logged = windows.assignment[rows]
    mixture = windows.mixture(rows)
    balanced = np.isfinite(mixture) & (mixture > 0)
    estimated = bool((acted & ~balanced & ~np.isfinite(logged)).any())
    if estimated:
        logged = np.maximum(held.at.assignment[:, k].numpy(), LEAST_CHANCE)
    weights = np.where(acted, 1.0 / np.where(acted, logged, 1.0), 0.0)
    weights[balanced] = np.nan_to_num(windows.law[rows, k][balanced]) / mixture[balanced]
    return resting(Target(windows.policies[k], held.at.expected[:, k].numpy(), weights, estimated), held, balanced & held.estimated)


@dataclass(frozen=True)
class Panel:
    """The estimators' sums for one target, best first, and the model behind them (None where there was too little to fit one)."""

    terms: list[ope.Terms]
    model: ope.DoubleReinforcement | None


def effects(held: Held, phi: np.ndarray) -> np.ndarray:
    """[N, …] what the evaluation's value model sees of actions: their features beside the reference's, and what the candidate says that these would change."""
    difference = phi - held.at.reference.numpy()
    said = np.einsum("bmtp,bp->bmt", held.at.slope.numpy(), difference).reshape(len(phi), -1)
    return np.concatenate([difference, said], 1)


def estimators(held: Held, target: Target, discount: np.ndarray, seed: int) -> Panel:
    """Double reinforcement learning; as second opinions its model corrected for `STEPS` decisions only, and alone. discount [N, M] per decision."""
    windows, rows = held.windows, held.rows
    reward, player = windows.reward[rows], windows.player[rows]
    sequence = {"discount": discount, "following": held.following, "truncated": windows.truncated[rows], "player": player}

    wanted, rng, key = effects(held, target.features), np.random.default_rng(seed), discount.tobytes() + bytes(str(seed), "ascii")
    if key not in held.sums:
        held.sums[key] = ope.logged_sums(held.state, effects(held, held.phi), reward, **sequence, rng=rng, free=held.free, past=held.past)
    shared, found = held.sums[key], None
    terms: list[ope.Terms] = []
    if isinstance(shared, ope.LoggedSums):
        found = ope.reinforced(shared, wanted, target.weights)
        terms.append(found.terms)
        q, v = found.q, found.v
    else:
        logged = effects(held, held.phi)
        state = held.state[:, : held.state.shape[1] - held.past]  # so few players tell nothing of late effects
        fitted = ope.fitted_q(np.hstack([state, logged]), np.hstack([state, wanted]), reward, **sequence, rng=rng, free=held.free)
        if isinstance(fitted, ope.Refusal):
            return Panel([ope.self_normalised(reward, target.weights, player)] if not discount.any() else [], None)
        q, v = fitted.q, fitted.v
    cut = ope.sequential_doubly_robust(reward, target.weights, q, v, **sequence, steps=STEPS, normalised=True)
    # beyond its steps the model is taken at its word
    terms.append(replace(cut, support=tuple(replace(each, modelled=bool(rate.any())) for each, rate in zip(cut.support, discount.T, strict=True))))
    if not discount.any():
        terms.append(ope.self_normalised(reward, target.weights, player))
    terms.append(ope.direct_method(v, player))
    return Panel(terms, found)


def evaluate(
    policy: Policy,
    windows: Windows,
    champion: Policy | None = None,
    *,
    attempts: Sequence[Attempt] = (),
    now: datetime | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Value the candidate, every behaviour policy and the champion on held-out players; then let the gate decide.

    attempts: what the gate said in this workspace before, oldest first; they set the error rate of this attempt, and how new its data have to be.
    """
    platform, seed = policy.platform, policy.platform.training.seed
    say = on_step or (lambda _: None)
    held = hold(policy, windows)
    targets = [served_target(policy, held)]
    if champion is not None and champion.platform.fingerprint() == platform.fingerprint():
        targets.append(served_target(champion, held, f"{OWN_POLICY} {champion.version or 'champion'}"))
    targets += [behaviour_target(policy, held, k) for k, name in enumerate(windows.policies) if name != OWN_POLICY]

    panel: dict[str, Panel] = {}
    records: list[dict[str, Any]] = []
    for target in targets:
        say(f"estimating {target.name}")
        panel[target.name], said = valued(policy, held, target)
        records += said

    alpha, because = alpha_of_attempt(platform.training.alpha, attempts, now or datetime.now(UTC))
    against = champion_name(targets, records, champion is not None)
    reasons, difference, terms = gate_on_difference(panel, {target.name: target for target in targets}, against, held, platform.weights, alpha, seed)
    if difference is not None and (rests := rests_on(targets[0])):
        difference = difference | {"verdict": f"{difference['verdict']} ({rests})"}
    if targets[0].doubt:
        reasons.append(f"the evidence rests on propensities that are not known: {targets[0].doubt}")
    if learned_from(policy, held):
        reasons.append(f"{len(windows.player_ids)} players are too few to hold some out: the candidate would be judged on players it learned from")
    say("checking guardrails")
    guardrails, broken = gate_on_guardrails(held, targets[0], platform, seed, alpha)
    segments, thin = gate_on_segments(terms, held, targets[0], platform, seed) if terms is not None else ([], [])
    checks, warnings = cross_checks(policy, held, targets[0], panel[targets[0].name], platform.weights, seed)
    stale = gate_on_data(windows, attempts)
    reasons = [*reasons, *broken, *thin, *stale]
    if policy.fingerprint != features.fingerprint(windows.platform):
        reasons.append("the candidate was made for other features than these logs were read with")
    newest = datetime.fromtimestamp(int(windows.moment.max()) / 1e6, UTC).isoformat(timespec="seconds").replace("+00:00", "Z") if len(windows) else ""
    return Report(
        records, against, difference, guardrails, not reasons, reasons, len(np.unique(windows.player[held.rows])), len(held.rows),
        segments, checks, warnings, alpha, because, newest, held.calibrations,
    )  # fmt: skip


def valued(policy: Policy, held: Held, target: Target) -> tuple[Panel, list[dict[str, Any]]]:
    """The panel of one target, and what it says as records, best estimator first."""
    platform, windows = policy.platform, held.windows
    discount = np.where((platform.discounts > 0) & windows.truncated[held.rows, None], platform.discounts, windows.discount[held.rows])
    panel = estimators(held, target, discount, platform.training.seed)
    names, seed = list(platform.objectives), platform.training.seed
    return panel, described(panel.terms, target, names, platform.weights, seed, learned_from(policy, held))


def learned_from(policy: Policy, held: Held) -> bool:
    """Whether too few players could be held out, so that these are players the policy learned from."""
    training, windows = policy.platform.training, held.windows
    return not held_out_players(windows.player_ids, training.holdout, training.seed)[windows.player[held.rows]].all()


def alpha_of_attempt(alpha: float, attempts: Sequence[Attempt], now: datetime) -> tuple[float, str]:
    """The error rate of this attempt: `alpha` for a workspace's first, then `alpha` per year, as it accrues between attempts.

    However often the gate is asked, the chance that it ever lets a worse policy pass in a year is then at most 2 `alpha` (the union bound). Asking
    twice in a row costs nothing but power: what has not accrued can't be spent.
    """
    if not attempts:
        return alpha, f"error rate {alpha:.3g}: the first attempt in this workspace"
    days = max(0.0, (now.timestamp() - attempts[-1].at / 1e6) / 86_400)
    rate = max(alpha * min(days / 365, 1.0), 1e-9)
    return rate, f"error rate {rate:.2g}: attempt {len(attempts) + 1}, {days:.2g} days after the last; {alpha:.3g} a year are spent as they accrue"


def gate_on_data(windows: Windows, attempts: Sequence[Attempt]) -> list[str]:
    """Whether anything was logged since the last promotion: the same logs can't be asked again until they say yes."""
    seen = max((attempt.data_until for attempt in attempts if attempt.promoted), default=None)
    newest = int(windows.moment.max()) if len(windows) else 0
    if seen is None or newest > seen:
        return []
    when = datetime.fromtimestamp(newest / 1e6, UTC)
    return [f"nothing was decided since the last promotion: the newest decision in these logs is of {when:%Y-%m-%d %H:%M} UTC"]


def cross_checks(policy: Policy, held: Held, target: Target, panel: Panel, weights: np.ndarray, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The candidate's weighted sum by FAST-Q's own Q, by the evaluation's fitted Q and by the doubly robust default; warnings where they disagree."""
    phi = torch.from_numpy(target.features)
    own = float((policy.totals(held.at, phi[:, None])[:, 0, :, 0].numpy() @ weights).mean())
    checks = [{"estimator": "fast_q", "value": own, "low": None, "high": None, "verdict": "do not trust: the model's own word, on what it was trained for"}]
    answers = {}
    for terms in panel.terms:
        answer = ope.estimate(terms, objective_weights=weights, rng=np.random.default_rng(seed))[-1]
        if isinstance(answer, ope.Estimate):
            answers[terms.estimator] = answer
            checks.append({"estimator": terms.estimator, "value": answer.value, "low": answer.low, "high": answer.high, "verdict": answer.verdict})
    best = next(iter(answers.values()), None)
    if best is None:
        return checks, []
    said = {"FAST-Q's own Q": own} | ({"the fitted Q evaluation": answers["direct_method"].value} if "direct_method" in answers else {})
    return checks, [
        f"{name} says {value:.3g}, {best.estimator.replace('_', ' ')} {best.value:.3g} ± {best.standard_error:.2g}: they disagree"
        for name, value in said.items()
        if abs(value - best.value) > DISAGREEMENT * best.standard_error
    ]


def described(terms: list[ope.Terms], target: Target, names: list[str], weights: np.ndarray, seed: int, tested_on_training: bool) -> list[dict[str, Any]]:
    """Estimates as records; the model's alone stands in where every estimator with weights was refused, marked as not to be trusted."""
    records = []
    for each in terms:
        for answer in ope.estimate(each, objective_weights=weights, rng=np.random.default_rng(seed)):
            if isinstance(answer, ope.Refusal):
                continue
            words = answer.verdict
            if tested_on_training:
                words = f"do not trust: these players were trained on ({words})"
            elif each.estimator == "direct_method":
                words = "do not trust: the model alone, without a correction by weights"
            elif rests := rests_on(target):
                words = f"do not trust: {target.doubt} ({rests})" if target.doubt else f"{words} ({rests})"
            records.append(
                {
                    "policy": target.name,
                    "objective": None if answer.objective is None else names[answer.objective],
                    "estimator": answer.estimator,
                    "value": answer.value,
                    "low": answer.low,
                    "high": answer.high,
                    "ess": answer.ess,
                    "top_share": answer.top_share,
                    "overlap": answer.overlap,
                    "verdict": words,
                }
            )
    return records


def rests_on(target: Target) -> str:
    """What is estimated of what the weights rest on, in words; empty where all of it was logged."""
    parts = ["assignment"] if target.estimated else []
    if target.propensities:
        parts.append("propensities" if target.propensities > 0.999 else f"propensities of {target.propensities:.0%} of the decisions")
    return f"weights from estimated {' and '.join(parts)}" if parts else ""


def champion_name(targets: list[Target], records: list[dict[str, Any]], has_champion: bool) -> str:
    """Whom the candidate is measured against: the champion, else the behaviour policy with the largest estimated value."""
    if has_champion and len(targets) > 1 and targets[1].name.startswith(OWN_POLICY):
        return targets[1].name
    behaviours = [t.name for t in targets if not t.name.startswith(OWN_POLICY)]
    values = {r["policy"]: r["value"] for r in reversed(records) if r["objective"] is None and r["policy"] in behaviours}
    return max(behaviours, key=lambda name: values.get(name, -np.inf)) if behaviours else OWN_POLICY


def bound(answer: ope.Estimate, terms: ope.Terms, alpha: float, asked: float) -> tuple[float, float]:
    """Bounds at error rate `alpha` per side of the interval of `terms` drawn at `asked`; a smaller rate stretches it as the tail goes on.

    That is the normal tail, or Student's where the spread was learned from a few refits: out there it is many times as heavy.
    """
    if alpha >= asked:
        return answer.low, answer.high
    stretch = NormalDist().inv_cdf(1 - alpha) / NormalDist().inv_cdf(1 - asked)
    if terms.refits is not None:
        stretch = float(np.divide(*stdtrit(len(terms.refits) - 1, [1 - alpha, 1 - asked])))
    return answer.value - stretch * (answer.value - answer.low), answer.value + stretch * (answer.high - answer.value)


def gate_on_difference(
    panel: dict[str, Panel], targets: dict[str, Target], against: str, held: Held | None, weights: np.ndarray, alpha: float, seed: int
) -> tuple[list[str], dict[str, Any] | None, ope.Terms | None]:
    """Whether the lower bound of the difference to `against`, at error rate `alpha`, is above zero.

    Paired on the same rows, with the difference of both policies' weights, which is 0 in expectation, as control variate where it is known (`held`).
    """
    mine, other = panel.get(OWN_POLICY), panel.get(against)
    if mine is None or other is None or not mine.terms or not other.terms or against == OWN_POLICY:
        return [f"there is nothing to compare with: no estimate of {against}"], None, None
    difference = ope.paired_difference(mine.terms[0], other.terms[0])
    if held is not None:
        control = targets[OWN_POLICY].weights - targets[against].weights
        difference = ope.controlled(difference, control, held.windows.player[held.rows])
    asked = max(alpha, LEAST_BOOTSTRAP_ALPHA)
    answer = ope.estimate(difference, objective_weights=weights, rng=np.random.default_rng(seed), level=1 - 2 * asked)[-1]
    if isinstance(answer, ope.Refusal):
        return [f"the difference to {against} cannot be estimated: {answer.reason}"], None, None
    low, high = bound(answer, difference, alpha, asked)
    found = {
        "value": answer.value, "low": low, "high": high, "standard_error": answer.standard_error, "ess": answer.ess, "top_share": answer.top_share,
        "overlap": answer.overlap, "estimator": answer.estimator, "verdict": answer.verdict,
    }  # fmt: skip
    reasons = []
    if low <= 0:
        reasons.append(
            f"not shown to be better than {against}: the difference is {answer.value:+.3g}, but {low:+.3g} to {high:+.3g} at an error rate of {alpha:.2%}"
        )
    if not answer.trusted:
        reasons.append(f"the evidence does not suffice: {answer.verdict.removeprefix('do not trust: ')}")
    return reasons, found, difference


def gate_on_segments(difference: ope.Terms, held: Held, candidate: Target, platform: Platform, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Whether evidence suffices in every value of each attribute in `evaluation.segments`, and shows no harm there (at the gate's yearly level)."""
    found, reasons = [], []
    player = held.windows.player[held.rows]
    last = np.append(np.flatnonzero(np.diff(player)), len(player) - 1)  # the newest decision of each player: rows are sorted by player and time
    weight = np.bincount(player, weights=np.where(np.isfinite(candidate.weights), candidate.weights, 0.0))[player[last]]
    for name in platform.evaluation.segments:
        values = held.windows.attributes[held.rows[last]][name].cast(str).fill_null("unknown").to_numpy()
        for value in np.unique(values):
            mine = values == value
            players, effective = int(mine.sum()), ope.effective_sample_size(weight[mine])
            answer = ope.estimate(
                ope.subset(difference, mine), objective_weights=platform.weights, rng=np.random.default_rng(seed), level=1 - 2 * platform.training.alpha
            )[-1]
            numbers = (
                {"value": None, "low": None, "high": None} if isinstance(answer, ope.Refusal) else {n: getattr(answer, n) for n in ("value", "low", "high")}
            )
            found.append({"attribute": name, "segment": str(value), "players": players, "effective_players": effective, **numbers})
            if effective < LEAST_SEGMENT_PLAYERS or isinstance(answer, ope.Refusal):
                reasons.append(
                    f"{name} {value}: the evidence does not suffice, {effective:.0f} effective players of {players}; {LEAST_SEGMENT_PLAYERS:.0f} are needed"
                )
            elif answer.high < 0:
                reasons.append(f"{name} {value}: worse there, by {answer.value:+.3g} ({answer.low:+.3g} to {answer.high:+.3g})")
    return found, reasons


def gate_on_guardrails(held: Held, candidate: Target, platform: Platform, seed: int, alpha: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Whether each ceiling and floor holds with its bound: the mean immediate value per decision under the policy as served."""
    guarded = [(j, name, o) for j, (name, o) in enumerate(platform.objectives.items()) if o.ceiling is not None or o.floor is not None]
    if not guarded:
        return [], []
    terms = estimators(held, candidate, np.zeros((len(held.rows), len(platform.objectives))), seed).terms
    asked = max(alpha, LEAST_BOOTSTRAP_ALPHA)
    answers = ope.estimate(terms[0], rng=np.random.default_rng(seed), level=1 - 2 * asked) if terms else ()
    found, reasons = [], []
    for j, name, objective in guarded:
        answer = answers[j] if answers else ope.Refusal("none", j, "no estimator could answer")
        if isinstance(answer, ope.Refusal):
            reasons.append(f"{name}: its guardrail cannot be checked: {answer.reason}")
            continue
        low, high = bound(answer, terms[0], alpha, asked)
        limits = {"ceiling": objective.ceiling, "floor": objective.floor}
        found.append({"objective": name, **limits, "value": answer.value, "low": low, "high": high, "verdict": answer.verdict})
        if objective.ceiling is not None and high > objective.ceiling:
            reasons.append(f"{name}: {answer.value:.3g} per decision, and up to {high:.3g} cannot be ruled out; the ceiling is {objective.ceiling:g}")
        if objective.floor is not None and low < objective.floor:
            reasons.append(f"{name}: {answer.value:.3g} per decision, and as little as {low:.3g} cannot be ruled out; the floor is {objective.floor:g}")
    return found, reasons
