"""Do explanations tell the truth? Asked of the simulator that a model's logs came from, which knows.

One action against another in the same state: both are lived through on the same luck, many times over, and followed by the policy itself, as its
values say. Then: how often does the stated interval hold the true difference, do stated reasons hold, do warnings of thin evidence come where
errors are large; and, of the model alone, does deleting what an attribution calls important move the value more than deleting at random.

Arrays: P players who are served today, M objectives, D action dimensions; all parts are weighted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from fastq import explanation, worlds
from fastq.features import PlayerStates
from fastq.policy import Policy

Array = np.ndarray[Any, np.dtype[Any]]
BURN_IN = 25  # days that the logging platform runs before anybody is asked
LIFE = 1_000_003  # added to the seed, so that the lives to come have luck that the days before them had not
LARGE = 0.75  # errors above this quantile are those that a warning should have come before
CERTAIN = 2.0  # standard errors of the study's own luck that a part must exceed before its sign is asked
DELETED = (1, 2, 3, 5)  # measures at a time
SHUFFLES = 8  # random orders of deletion
KINDS = ("what a policy would do", "typed at random")


def examine(policy: Policy, world: worlds.Arena, *, people: int = 150, lives: int = 12, days: int = 30, seed: int = 4711) -> dict[str, Any]:
    """What holds of this policy's explanations in `world`, as plain JSON; deterministic in its arguments.

    states, lives, days, seed: what was asked. contrasts: per kind of alternative the 90 % interval's coverage (`share`, with the 95 % interval
    of that share; the study's own luck is added to the stated one), its half width, the error's mean and size. pairs: true and stated difference of each
    player, for the picture. reasons: shares of single stated reasons, and of a contrast's decisive ones taken together, that hold, and how many were
    asked. warnings: area under the curve that finds the largest quarter of errors, by the grade of the evidence, by the verdict alone (a yes or no) and by the
    stated width; mean errors where evidence was called thin and elsewhere; grades: how many were given each, and their mean error. deletion: how far the
    value moves when k measures are deleted, by attribution, at random, the least first.
    """
    start, grades = _lived(world, people, seed), list(explanation.GRADES)
    states = PlayerStates(**start.states())
    here = ~start.gone & start.served()
    at = policy.situations(policy.encode(states))
    recommended, experts = policy.best(at), policy.expert_actions(at)
    low, high = policy.platform.bounds.T
    typed = np.random.default_rng(seed).uniform(low, high, (people, len(low)))
    others = dict(zip(KINDS, (experts[np.arange(people), np.arange(people) % experts.shape[1]], typed), strict=True))
    truth = _true_parts(policy, start, np.stack([recommended, *others.values()]), lives, days)
    contrasts, reasons, pairs, errors = [], [], [], []
    for k, (kind, other) in enumerate(others.items(), 1):
        why = explanation.explain(policy, states, actions=recommended, against=other, attributions=False)
        assert why.contrast is not None
        lived = truth[:, 0, here] - truth[:, k, here]
        true, luck = lived.sum((2, 3)).mean(0), lived.sum((2, 3)).std(0, ddof=1) / math.sqrt(lives)
        stated, half = why.contrast.difference[here], (why.contrast.high - why.contrast.difference)[here]
        held = np.abs(stated - true) <= np.hypot(half, explanation.CERTAINTY * luck)
        contrasts.append({
            "against": kind, **_share(held), "half_width": float(np.median(half)), "luck": float(np.median(luck)),
            "mean_error": float((stated - true).mean()), "size_of_error": float(np.abs(stated - true).mean()),
        })  # fmt: skip
        pairs += [{"against": kind, "true": float(t), "stated": float(s), "half": float(h)} for t, s, h in zip(true, stated, half, strict=True)]
        reasons += _reasons(lived, [why.contrast.decisive[i] for i in np.flatnonzero(here)], list(policy.platform.objectives))
        beyond = np.sqrt(np.maximum((stated - true) ** 2 - luck**2, 0))
        said = [(why.evidence.verdict[i] != "well supported", grades.index(why.evidence.grade[i])) for i in np.flatnonzero(here)]
        errors.append(np.stack([beyond, *np.array(said, float).T, why.evidence.width[here]]))
    return {
        "states": int(here.sum()), "lives": lives, "days": days, "seed": seed, "contrasts": contrasts, "pairs": pairs,
        "reasons": {name: _share(np.array([ok for one, ok in reasons if one == name])) for name in ("single", "together")},
        "warnings": _warnings(*np.concatenate(errors, 1)), "deletion": deletion(policy, states),
    }  # fmt: skip


def deletion(policy: Policy, states: PlayerStates, seed: int = 0) -> list[dict[str, float]]:
    """How far the value of the best action moves, on average, when k measures of a player are as if never known: by attribution, at random, the least first."""
    enc = policy.encode(states)
    action, platform = policy.best(enc), policy.platform
    moved = np.stack(list(explanation.attribute(policy, enc, action).measures.values()), 1)  # in the order of a state's columns
    widths = {"history": len(platform.state.measures), "actions": len(platform.dimension_names), "objectives": len(platform.objectives)}
    columns = [(where, j) for where, width in widths.items() for j in range(width)]
    by_size = np.argsort(-np.abs(moved), 1)
    base = policy.value_seen(enc, action)

    def without(order: Array, k: int) -> float:
        arrays: dict[str, Any] = {name: np.array(getattr(states, name), float) for name in widths}
        for i, row in enumerate(order):
            for place in row[:k]:
                where, j = columns[place]
                arrays[where][i, :, j] = np.nan
        return float(np.abs(policy.value_seen(policy.encode(dataclasses.replace(states, **arrays)), action) - base).mean())

    shuffled = np.argsort(np.random.default_rng(seed).random((SHUFFLES, *by_size.shape)), 2)
    return [
        {
            "measures": k, "by_attribution": without(by_size, k), "at_random": float(np.mean([without(order, k) for order in shuffled])),
            "least_first": without(by_size[:, ::-1], k),
        }
        for k in DELETED if k <= len(columns)
    ]  # fmt: skip


def _lived(world: worlds.Arena, people: int, seed: int) -> worlds.Simulation:
    """Players as the logging platform left them."""
    simulation, names = worlds.Simulation(world, people, seed), np.array(world.policies)
    for _ in range(BURN_IN):
        behaviour = simulation.behaviour()
        simulation.step(behaviour.proposals[np.arange(people), behaviour.policy], names[behaviour.policy].tolist())
    return simulation


def _true_parts(policy: Policy, start: worlds.Simulation, actions: Array, lives: int, days: int) -> Array:
    """[lives, C, P, M, 2] parts of actions [C, P, D] in truth: immediate, and discounted from then on under the policy itself.

    All lives of all players are one simulation, each life with luck of its own, which the C branches of a player share.
    """
    c, people = actions.shape[:2]
    discounts, weights = np.array(start.world.discounts), np.array(start.world.weights)
    lived = start.copy(c * lives)
    lived.people = np.tile(np.arange(people), c * lives) + np.repeat(np.arange(lives), c * people) * people
    lived.seed = start.seed + LIFE
    # who opens the app today is luck that lies ahead of the decision like all later luck, so each life has its own, which the branches share
    coin = np.random.default_rng([start.seed, LIFE]).random((lives, 1, people))
    lived.active = np.broadcast_to(coin < start.opening, (lives, c, people)).ravel() & ~lived.gone
    parts = np.zeros((lives, c, people, len(weights), 2))
    action = np.tile(actions.reshape(c * people, -1), (lives, 1))
    for day in range(days):
        if day > 0:
            here, known = np.flatnonzero(~lived.gone & lived.served()), lived.states()
            arrays = {name: known[name][here] for name in ("history", "actions", "objectives")}
            states = PlayerStates(**arrays, attributes=lived.attributes[here], policies=[lived.last_policy[i] for i in here])
            action = np.tile([d.low for d in start.world.dimensions], (len(lived), 1))  # of those who are not served, which moves nothing
            action[here] = policy.best(policy.encode(states))
        parts[..., min(day, 1)] += (lived.step(action) * discounts**day).reshape(lives, c, people, -1)
    weighted: Array = parts * weights[:, None]
    return weighted


def _reasons(lived: Array, decisive: list[list[tuple[str, str]]], objectives: list[str]) -> list[tuple[str, bool]]:
    """Whether each decisive reason holds whose sign luck does not hide, and whether each contrast's together do; lived [lives, P, M, 2]."""
    mean, doubt = lived.mean(0), lived.std(0, ddof=1) / math.sqrt(len(lived))
    found = []
    for i, stated in enumerate(decisive):
        cells = [(i, objectives.index(objective), explanation.HORIZONS.index(horizon)) for objective, horizon in stated]
        found += [("single", bool(mean[cell] > 0)) for cell in cells if abs(mean[cell]) > CERTAIN * doubt[cell]]
        found += [("together", bool(sum(mean[cell] for cell in cells) > 0))] if cells else []
    return found


def _warnings(error: Array, thin: Array, grade: Array, width: Array) -> dict[str, Any]:
    large, warned = error >= np.quantile(error, LARGE), thin > 0

    def area(score: Array) -> float | None:
        return float(roc_auc_score(large, score)) if large.any() and not large.all() and np.isfinite(score).all() else None

    def mean(of: Array) -> float | None:
        return float(error[of].mean()) if of.any() else None

    graded = [{"grade": name, "of": int((grade == i).sum()), "error": mean(grade == i)} for i, name in enumerate(explanation.GRADES)]
    areas = {"area": area(grade), "area_of_verdict": area(thin), "area_of_width": area(width)}
    return {**areas, "thin": float(warned.mean()), "error_thin": mean(warned), "error_else": mean(~warned), "grades": graded}


def _share(held: Array) -> dict[str, float | None]:
    """A share with its 95 % interval (Wilson 1927)."""
    if len(held) == 0:
        return {"share": None, "low": None, "high": None, "of": 0}
    found = binomtest(int(held.sum()), len(held))
    interval = found.proportion_ci(method="wilson")
    return {"share": float(held.mean()), "low": float(interval.low), "high": float(interval.high), "of": len(held)}
