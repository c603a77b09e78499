"""The held-out report per objective, and the promotion gate with its reasons.

Everything is estimated on players that training never saw. What is estimated: the mean over their logged decision states of the
discounted sum that follows if the policy alone acts from then on, per objective and in weighted sum; a behaviour policy's value is
counterfactual too. The gate compares a candidate with the champion, or with the best behaviour policy, on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fastq import ope
from fastq.equations import action_features
from fastq.platform import OWN_POLICY
from fastq.policy import Policy, Situation
from fastq.windows import Windows, held_out_players

STEPS = 1  # decisions that are corrected by weights before the model takes over: the product of weights of two continuous draws carries no more
LEAST_CHANCE = 0.01  # an estimated probability of being assigned to a policy is never taken to be smaller
LEAST_PLAYERS = 2


@dataclass(frozen=True)
class Report:
    """What the logs say of a candidate. `estimates`: one record per policy, objective (None: weighted sum) and estimator, as `fastq evaluate --json`.

    difference: the candidate against `against`, paired on the same rows. guardrails: mean immediate value under the policy as served.
    reasons: why the gate refused; empty if `promoted`.
    """

    estimates: list[dict[str, Any]]
    against: str
    difference: dict[str, Any] | None
    guardrails: list[dict[str, Any]]
    promoted: bool
    reasons: list[str]
    players: int
    decisions: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """One policy to be valued on N held-out decisions: expected action features [N, P] and importance weights [N]."""

    name: str
    features: np.ndarray
    weights: np.ndarray
    estimated: bool  # the weights rest on an estimated law


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


def hold(policy: Policy, windows: Windows) -> Held:
    """The decisions of the players held out of training; all of them where too few were held out."""
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
    return Held(windows, rows, at, following, phi, np.concatenate([unshrunk, state - state.mean(0)], 1), unshrunk.shape[1])


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
        return Target(name, features, ope.naive_weights(density, logging_density(windows, rows), np.zeros(len(rows), bool)), estimated=False)
    return continuous_target(name, policy, held, policy.best_units(at, policy.platform.weights, *policy.platform.bounds.T))


def continuous_target(name: str, policy: Policy, held: Held, mean: torch.Tensor) -> Target:
    """What would be served around the noise-free actions `mean` [N, D] (standardised): the platform's law and its density at the logged actions."""
    windows, rows, bounds = held.windows, held.rows, policy.platform.bounds
    density = policy.density(windows.action[rows], policy.on_grid(policy.units.raw(mean.numpy()), *bounds.T))
    on_bound = ((windows.action[rows] == bounds[:, 0]) | (windows.action[rows] == bounds[:, 1])).any(1)
    atom = on_bound & ~np.isfinite(windows.propensity[rows])
    return Target(name, policy.served_features(mean).numpy(), ope.naive_weights(density, logging_density(windows, rows), atom), estimated=False)


def logging_density(windows: Windows, rows: np.ndarray) -> np.ndarray:
    """[N] density of the logged action: under all policies together where every law and chance is known, else under the one that acted.

    The mixture's weights are bounded by what any policy does, so their variance is never larger (Agarwal et al. 2017, arXiv 1703.06180).
    """
    mixture: np.ndarray = (windows.law[rows] * windows.chance[rows]).sum(1)
    complete = np.isfinite(mixture) & (np.abs(windows.chance[rows].sum(1) - 1) < 1e-3)
    return np.where(complete, mixture, windows.propensity[rows])


def behaviour_target(policy: Policy, held: Held, k: int) -> Target:
    """Behaviour policy `k`: what it would do by the experts; weight 1 / chance of being assigned where it acted, 0 elsewhere.

    The chance is the logged one; else the representation's classifier estimates it, and the target says so.
    """
    windows, rows = held.windows, held.rows
    acted = windows.policy[rows] == k
    logged = windows.assignment[rows]
    estimated = bool((acted & ~np.isfinite(logged)).any())
    if estimated:
        logged = np.maximum(held.at.assignment[:, k].numpy(), LEAST_CHANCE)
    return Target(windows.policies[k], held.at.expected[:, k].numpy(), np.where(acted, 1.0 / np.where(acted, logged, 1.0), 0.0), estimated)


def estimators(held: Held, target: Target, discount: np.ndarray, seed: int) -> list[ope.Terms]:
    """The panel for one target, best first: doubly robust, self-normalised weights, the model alone. discount [N, M] per decision."""
    windows, rows = held.windows, held.rows
    reward, player = windows.reward[rows], windows.player[rows]
    truncated = windows.truncated[rows]

    def x(phi: np.ndarray) -> np.ndarray:
        difference = phi - held.at.reference.numpy()
        effects = np.einsum("bmtp,bp->bmt", held.at.slope.numpy(), difference).reshape(len(rows), -1)
        return np.concatenate([held.state, difference, effects], 1)

    rng = np.random.default_rng(seed)
    fitted = ope.fitted_q(x(held.phi), x(target.features), reward, discount, held.following, truncated, player, rng=rng, free=held.free)
    terms: list[ope.Terms] = []
    if isinstance(fitted, ope.FittedQ):
        terms += [
            ope.sequential_doubly_robust(reward, target.weights, fitted.q, fitted.v, discount, held.following, truncated, player, steps=STEPS, normalised=True),
            ope.direct_method(fitted.v, player),
        ]
    if not discount.any():
        terms.insert(1, ope.self_normalised(reward, target.weights, player))
    return terms


def evaluate(policy: Policy, windows: Windows, champion: Policy | None = None, *, on_step: Callable[[str], None] | None = None) -> Report:
    """Value the candidate, every behaviour policy and the champion on held-out players; then let the gate decide."""
    platform, seed = policy.platform, policy.platform.training.seed
    names = list(platform.objectives)
    say = on_step or (lambda _: None)
    held = hold(policy, windows)
    tested_on_training = not held_out_players(windows.player_ids, platform.training.holdout, seed)[windows.player[held.rows]].all()
    targets = [served_target(policy, held)]
    if champion is not None and champion.platform.fingerprint() == platform.fingerprint():
        targets.append(served_target(champion, held, f"{OWN_POLICY} {champion.version or 'champion'}"))
    targets += [behaviour_target(policy, held, k) for k, name in enumerate(windows.policies) if name != OWN_POLICY]

    discount = np.where((platform.discounts > 0) & windows.truncated[held.rows, None], platform.discounts, windows.discount[held.rows])
    panel: dict[str, list[ope.Terms]] = {}
    records: list[dict[str, Any]] = []
    for target in targets:
        say(f"estimating {target.name}")
        panel[target.name] = estimators(held, target, discount, seed)
        records += described(panel[target.name], target, names, platform.weights, seed, tested_on_training)

    against = champion_name(targets, records, champion is not None)
    reasons, difference = gate_on_difference(panel, against, platform.weights, platform.training.alpha, seed)
    if tested_on_training:
        reasons.append(f"{len(windows.player_ids)} players are too few to hold some out: the candidate would be judged on players it learned from")
    say("checking guardrails")
    guardrails, broken = gate_on_guardrails(held, targets[0], platform, seed)
    return Report(records, against, difference, guardrails, not (reasons + broken), reasons + broken, len(np.unique(windows.player[held.rows])), len(held.rows))


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
            elif target.estimated:
                words = f"{words} (weights from estimated assignment)"
            records.append(
                {
                    "policy": target.name,
                    "objective": None if answer.objective is None else names[answer.objective],
                    "estimator": answer.estimator,
                    "value": answer.value,
                    "low": answer.low,
                    "high": answer.high,
                    "ess": answer.ess,
                    "verdict": words,
                }
            )
    return records


def champion_name(targets: list[Target], records: list[dict[str, Any]], has_champion: bool) -> str:
    """Whom the candidate is measured against: the champion, else the behaviour policy with the largest estimated value."""
    if has_champion and len(targets) > 1 and targets[1].name.startswith(OWN_POLICY):
        return targets[1].name
    behaviours = [t.name for t in targets if not t.name.startswith(OWN_POLICY)]
    values = {r["policy"]: r["value"] for r in reversed(records) if r["objective"] is None and r["policy"] in behaviours}
    return max(behaviours, key=lambda name: values.get(name, -np.inf)) if behaviours else OWN_POLICY


def gate_on_difference(
    panel: dict[str, list[ope.Terms]], against: str, weights: np.ndarray, alpha: float, seed: int
) -> tuple[list[str], dict[str, Any] | None]:
    """Whether the lower bound of the difference to `against`, at error rate `alpha`, is above zero."""
    if against not in panel or not panel[OWN_POLICY] or not panel[against] or against == OWN_POLICY:
        return [f"there is nothing to compare with: no estimate of {against}"], None
    difference = ope.paired_difference(panel[OWN_POLICY][0], panel[against][0])
    answer = ope.estimate(difference, objective_weights=weights, rng=np.random.default_rng(seed), level=1 - 2 * alpha)[-1]
    if isinstance(answer, ope.Refusal):
        return [f"the difference to {against} cannot be estimated: {answer.reason}"], None
    found = {"value": answer.value, "low": answer.low, "high": answer.high, "ess": answer.ess, "estimator": answer.estimator, "verdict": answer.verdict}
    reasons = []
    if answer.low <= 0:
        reasons.append(
            f"not shown to be better than {against}: the difference is {answer.value:+.3g}, "
            f"but {answer.low:+.3g} to {answer.high:+.3g} at an error rate of {alpha:.1%}"
        )
    if not answer.trusted:
        reasons.append(f"the evidence does not suffice: {answer.verdict.removeprefix('do not trust: ')}")
    return reasons, found


def gate_on_guardrails(held: Held, candidate: Target, platform: Any, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Whether each ceiling and floor holds with its bound: the mean immediate value per decision under the policy as served."""
    guarded = [(j, name, o) for j, (name, o) in enumerate(platform.objectives.items()) if o.ceiling is not None or o.floor is not None]
    if not guarded:
        return [], []
    terms = estimators(held, candidate, np.zeros((len(held.rows), len(platform.objectives))), seed)
    answers = ope.estimate(terms[0], rng=np.random.default_rng(seed), level=1 - 2 * platform.training.alpha) if terms else ()
    found, reasons = [], []
    for j, name, objective in guarded:
        answer = answers[j] if answers else ope.Refusal("none", j, "no estimator could answer")
        if isinstance(answer, ope.Refusal):
            reasons.append(f"{name}: its guardrail cannot be checked: {answer.reason}")
            continue
        found.append({"objective": name, "ceiling": objective.ceiling, "floor": objective.floor, "value": answer.value, "low": answer.low, "high": answer.high})
        if objective.ceiling is not None and answer.high > objective.ceiling:
            reasons.append(f"{name}: {answer.value:.3g} per decision, and up to {answer.high:.3g} cannot be ruled out; the ceiling is {objective.ceiling:g}")
        if objective.floor is not None and answer.low < objective.floor:
            reasons.append(f"{name}: {answer.value:.3g} per decision, and as little as {answer.low:.3g} cannot be ruled out; the floor is {objective.floor:g}")
    return found, reasons
