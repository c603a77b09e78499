"""Why an action: parts that add up, a contrast with its decisive reasons, what moved the value, what evidence stands behind it.

Everything is made of what the policy itself says of the state: nothing is fitted to imitate it. Arrays first axis is B, one entry per
player; M objectives, W periods, D action dimensions. Horizons are `immediate` and `long_term`, in this order. All parts are weighted, so
they are in the unit of the value, the objectives' units times their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastq.errors import RequestError
from fastq.features import Catalogue, PlayerStates
from fastq.overlap import doubts
from fastq.policy import NEIGHBOURS, RARE, Encoded, Policy, Situation, action_dicts

HORIZONS = ("immediate", "long_term")
CERTAINTY = 1.645  # standard deviations on either side of a normal's mean that hold 90 %
FAR_STATE = 2.0  # times the usual distance; about 1 in 100 states of players who were never trained on lie further away
FAR_ACTION = 3.0  # standard deviations of a policy's own noise
LEAST_SPREAD = 0.01  # share of a dimension's range that counts as noise of a policy that has none
GRADES = {"ample": 0.25, "good": 0.5, "fair": 1.0, "thin": 1.5, "very thin": math.inf}  # best first: up to what, of one decision's stake, is not known
DISAGREEING = 0.25  # share of the parts' size that the twin critics may differ by
EDGES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # first pieces of the path of integrated gradients
POINTS = 8  # Gauss-Legendre points on each piece
ROUNDS = 5  # of cutting the pieces that do not add up in three
CUTS, NOTHING = np.array([1 / 3, 2 / 3]), 1e-2  # where a piece is cut, on a logarithmic scale; one from 0 begins there at this share of its end
ROWS = 4096  # states in one backward pass


@dataclass(frozen=True, eq=False)
class Contrast:
    """The action less another one, per player.

    against: the alternative's name, None for an action given as such; action [B, D] raw units or [B] item ids; difference, low, high [B],
    the 90 % interval; parts [B, M, 2], whose sum is the difference; decisive: per player the smallest set of (objective, horizon), largest
    first, that outweighs every drawback, empty unless the difference is positive.
    """

    against: str | None
    action: np.ndarray
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    parts: np.ndarray
    decisive: list[list[tuple[str, str]]]


@dataclass(frozen=True, eq=False)
class WhatIf:
    """The best action under other objective weights: action [B, D] or [B] item ids, value [B] and parts [B, M, 2] under those weights."""

    weights: dict[str, float]
    action: np.ndarray
    value: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True, eq=False)
class Attributions:
    """What of a player's history moved the value away from that of the same player with nothing known of the history.

    measures: name -> [B], each summed over its periods; `previous NAME` are the actions taken and the objective values that followed.
    periods [B, W], oldest first, each summed over everything known in it. Either adds up to the movement less completeness_gap [B].
    """

    measures: dict[str, np.ndarray]
    periods: np.ndarray
    completeness_gap: np.ndarray


@dataclass(frozen=True, eq=False)
class Evidence:
    """What stands behind an action.

    nearest [B, N] positions in `policy.reference`, and distance [B, N] between balanced states, where 1 is usual between a logged decision
    and its own nearest ones; disagreement [B] of the twin critics about the value; policies: who acts in at least 1 of 20 such states;
    width [B] of the contrast's interval (without one: of the difference to what the likeliest policy would do), in times what is usual between the policies'
    own actions, NaN for models that were not measured; verdict: `well supported`, or `thin: ` and why; grade: one of `GRADES`, by how
    much is not known of that difference beside what one decision accounts for (`Policy.stake`); at best `thin` where the verdict says so for other reasons.
    """

    nearest: np.ndarray
    distance: np.ndarray
    disagreement: np.ndarray
    policies: list[list[str]]
    width: np.ndarray
    verdict: list[str]
    grade: list[str]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why these actions, for B players.

    action [B, D] raw units or [B] item ids; value, low, high [B], the 90 % interval; parts [B, M, 2], `value == parts.sum((1, 2))` by
    construction; score: `value - caution - guardrail = total`, each [B]; at: the states' situations.
    """

    policy: Policy = field(repr=False)
    action: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    parts: np.ndarray
    score: dict[str, np.ndarray]
    contrast: Contrast | None
    what_if: WhatIf | None
    attributions: Attributions | None
    evidence: Evidence
    at: Situation = field(repr=False)

    def __len__(self) -> int:
        return len(self.value)


Against = str | Policy | Mapping[str, Any] | np.ndarray | tuple[str, Any]


def explain(
    policy: Policy, states: PlayerStates, *, actions: Any = None, against: Against | None = None, weights: Mapping[str, float] | None = None,
    attributions: bool = True, beside: Explanation | None = None,
) -> Explanation:  # fmt: skip
    """Explain `actions` ([B, D] raw units, or [B] item ids; default: the noise-free best ones) in these states.

    `against` is a behaviour policy's name, another `Policy` (its best action, valued by this one), an action as a mapping, actions as an
    array, or a pair of a name and such an array (`("logged", array)`). Value, parts, contrast and attributions keep the platform's weights;
    `weights` only ask what would be best under others. `attributions=False` is some hundred times faster. `beside` is an explanation of the same
    states by the same policy: what it found out about them is not worked out again.
    Raises `RequestError` for names, shapes and numbers that are not the platform's.
    """
    at = policy.situations(policy.encode(states)) if beside is None else beside.at
    near = _nearest(policy, policy.embedding(at)) if beside is None else (beside.evidence.nearest, beside.evidence.distance)
    vectors, action = _given(policy, len(at), policy.best(at) if actions is None else actions, "actions")
    other = None if against is None else _alternative(policy, states, at, against)
    stacked = vectors[:, None] if other is None else np.stack([vectors, other[1]], 1)
    parts = policy.parts(at, stacked) * policy.platform.weights[:, None]
    value, doubt = parts[:, 0].sum((1, 2)), CERTAINTY * policy.doubt(at, stacked[:, :1])[:, 0]
    contrast = None
    if other is not None:
        differences = parts[:, 0] - parts[:, 1]
        difference, unsure = differences.sum((1, 2)), CERTAINTY * policy.doubt(at, stacked[:, :1], stacked[:, 1:])[:, 0]
        decisive = decisive_reasons(differences, list(policy.platform.objectives))
        contrast = Contrast(other[0], other[2], difference, difference - unsure, difference + unsure, differences, decisive)
    return Explanation(
        policy=policy, action=action, value=value, low=value - doubt, high=value + doubt, parts=parts[:, 0],
        score={name: score[:, 0] for name, score in policy.score(at, stacked[:, :1]).items()}, contrast=contrast,
        what_if=None if weights is None else _what_if(policy, at, weights),
        attributions=attribute(policy, policy.encode(states), vectors) if attributions else None,
        evidence=_evidence(policy, at, near, stacked, parts[:, 0], contrast, states.policies), at=at,
    )  # fmt: skip


# ---- actions, as they are given and as they are shown -------------------------------------------------------------------
def _items(catalogue: Catalogue, vectors: np.ndarray) -> np.ndarray:
    """[...] ids of the items nearest to embeddings [..., E]; of items with one embedding, the first."""
    flat = torch.from_numpy(np.ascontiguousarray(vectors, float)).reshape(-1, vectors.shape[-1])
    nearest = torch.cdist(flat, torch.from_numpy(catalogue.embedding).double()).argmin(1).numpy()
    return np.array(catalogue.ids, object)[nearest].reshape(vectors.shape[:-1])


def _given(policy: Policy, n: int, given: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Actions as vectors [n, D] and as they are shown, [n, D] or [n] item ids. Raises `RequestError` naming shape, item or bound."""
    d = len(policy.units.centre)
    try:
        array = np.asarray(given)
        array = array if array.dtype.kind in "OSU" and policy.catalogue is not None else array.astype(float)
    except (TypeError, ValueError):
        raise RequestError(f"{where}: expected numbers of the shape [{n} players, {d}]") from None
    if array.dtype.kind != "f":
        if array.shape != (n,):
            raise RequestError(f"{where}: expected {n} item ids, one per player of history, got the shape {list(array.shape)}")
        return policy.as_actions(array), array.astype(object)
    if array.shape != (n, d):
        columns = f"{d} action dimensions]" if policy.catalogue is None else f"{d} numbers of an item's embedding], or one item id per player"
        raise RequestError(f"{where}: expected the shape [{n} players, {columns}; got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise RequestError(f"{where}: expected finite numbers in every dimension")
    if policy.catalogue is not None:
        return array, _items(policy.catalogue, array)
    low, high = policy.platform.bounds.T
    outside = np.argwhere((array < low - 1e-6 * (high - low)) | (array > high + 1e-6 * (high - low)))  # float32 on the way rounds past a bound
    if len(outside):
        row, j = outside[0]
        raise RequestError(f"{where}.{policy.platform.dimension_names[j]}: expected a number between {low[j]:g} and {high[j]:g}, got {array[row, j]:g}")
    return array, array


def _alternative(policy: Policy, states: PlayerStates, at: Situation, against: Against) -> tuple[str | None, np.ndarray, np.ndarray]:
    """The name of what an action is held against (None: it has none), its vectors [B, D], and how it is shown."""
    n = len(at)
    if isinstance(against, Policy):
        return (f"model:{against.version}" if against.version else "another model", *_given(policy, n, _best_elsewhere(policy, against, states), "against"))
    if isinstance(against, str):
        if against not in policy.policies:
            wanted = f"expected one of {', '.join(policy.policies)}, or an action with {', '.join(policy.platform.action_columns)}"
            if against == "logged" or against.startswith("model:"):  # a policy knows neither the log nor the registry
                raise RequestError(f"against: {against!r} needs the actions themselves, as the pair (name, actions); or {wanted}")
            raise RequestError(f"against: {against!r} is not known; {wanted}")
        return (against, *_given(policy, n, policy.expert_actions(at)[:, policy.policies.index(against)], "against"))
    if isinstance(against, Mapping):
        columns = policy.platform.action_columns
        if set(against) != set(columns):
            raise RequestError(f"against: expected exactly {', '.join(columns)}, got {', '.join(map(str, against)) or 'nothing'}")
        if policy.catalogue is not None:
            return (None, *_given(policy, n, np.full(n, str(against["item_id"]), object), "against"))
        if wrong := [name for name in columns if isinstance(against[name], bool) or not isinstance(against[name], int | float | np.number)]:
            raise RequestError(f"against.{wrong[0]}: expected a number, got {against[wrong[0]]!r}")
        return (None, *_given(policy, n, np.tile([float(against[name]) for name in columns], (n, 1)), "against"))
    if isinstance(against, tuple):
        return (against[0], *_given(policy, n, against[1], "against"))
    return (None, *_given(policy, n, against, "against"))


def _best_elsewhere(policy: Policy, other: Policy, states: PlayerStates) -> np.ndarray:
    """What another model would do, as this one takes it."""
    here, there = policy.platform.action_columns, other.platform.action_columns
    if here != there:
        raise RequestError(f"against: the other model acts on {', '.join(there)}, this one on {', '.join(here)}")
    best = other.best(other.encode(states))
    return best if other.catalogue is None else _items(other.catalogue, best)


def _what_if(policy: Policy, at: Situation, weights: Mapping[str, Any]) -> WhatIf:
    names = list(policy.platform.objectives)
    for name, weight in weights.items():
        if name not in names:
            raise RequestError(f"weights: {name!r} is no objective; expected {', '.join(names)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float | np.number) or not math.isfinite(weight):
            raise RequestError(f"weights.{name}: expected a finite number, got {weight!r}")
    wanted = {name: float(weights.get(name, usual)) for name, usual in zip(names, policy.platform.weights, strict=True)}
    vectors, action = _given(policy, len(at), policy.best(at, weights=wanted), "what_if")
    parts = policy.parts(at, vectors[:, None])[:, 0] * np.array(list(wanted.values()))[:, None]
    return WhatIf({name: float(weight) for name, weight in weights.items()}, action, parts.sum((1, 2)), parts)


@dataclass(frozen=True, eq=False)
class Imagined:
    """One player's action that somebody imagines, beside the recommended one and the best one under `weights`, all valued under `weights` and the platform's.

    actions: `recommended`, `best`, `imagined`, each [D] raw units or an item id; values: name -> (platform's weights, these weights);
    difference, low, high: imagined less recommended under these weights, with the 90 % interval; parts [M, 2] of it; decisive as in `Contrast`; verdict, width
    and grade of the evidence as in `Evidence`.
    """

    weights: dict[str, float]
    actions: dict[str, Any]
    values: dict[str, tuple[float, float]]
    difference: float
    low: float
    high: float
    parts: np.ndarray
    decisive: list[tuple[str, str]]
    verdict: str
    width: float
    grade: str


def imagine(policy: Policy, states: PlayerStates, recommended: Any, imagined: Any, weights: Mapping[str, float]) -> Imagined:
    """What one player's `imagined` action would be worth against the `recommended` one, if the objectives weighed otherwise; without training.

    Both actions as [1, D] raw units or [1] item ids. Raises `RequestError` for names and numbers that are not the platform's.
    """
    at = policy.situations(policy.encode(states))
    best = _what_if(policy, at, weights)
    wanted = {name: float(weights.get(name, usual)) for name, usual in zip(policy.platform.objectives, policy.platform.weights, strict=True)}
    given = {name: _given(policy, 1, action, "action") for name, action in (("recommended", recommended), ("best", best.action), ("imagined", imagined))}
    stacked = np.stack([vectors for vectors, _ in given.values()], 1)
    unweighted, these = policy.parts(at, stacked)[0], np.array(list(wanted.values()))
    values = {name: (float(p.sum(1) @ policy.platform.weights), float(p.sum(1) @ these)) for name, p in zip(given, unweighted, strict=True)}
    parts = (unweighted[2] - unweighted[0]) * these[:, None]
    difference, half = float(parts.sum()), CERTAINTY * float(policy.doubt(at, stacked[:, 2:], stacked[:, :1], weights=wanted)[0, 0])
    near = _nearest(policy, policy.embedding(at))
    evidence = _evidence(policy, at, near, stacked[:, 2:], unweighted[2:] * policy.platform.weights[:, None], None)
    return Imagined(
        wanted, {name: action[0] for name, (_, action) in given.items()}, values, difference, difference - half, difference + half, parts,
        decisive_reasons(parts[None], list(policy.platform.objectives))[0], evidence.verdict[0], float(evidence.width[0]), evidence.grade[0],
    )  # fmt: skip


# ---- reasons --------------------------------------------------------------------------------------------------------------
def decisive_reasons(differences: np.ndarray, objectives: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Per player the minimal sufficient explanation of a preference (Juozapaitis et al. 2019, section 4.2), from differences [B, M, 2].

    The fewest positive differences, largest first, whose sum is more than all negative ones take away; equal ones in the order of the
    platform file, immediate first. Empty where the differences add up to nothing or less.
    """
    flat = differences.reshape(len(differences), -1)
    gains, loss = np.maximum(flat, 0), np.maximum(-flat, 0).sum(1)
    order = np.argsort(-gains, 1, kind="stable")
    reached = np.cumsum(np.take_along_axis(gains, order, 1), 1)
    enough = reached > (loss * (1 + 1e-12))[:, None]  # the margin keeps "more" true in whichever order somebody adds them up again
    count = np.where(enough.any(1), enough.argmax(1) + 1, (gains > 0).sum(1))
    count = np.where(flat.sum(1) > 0, count, 0)
    names = [(objective, horizon) for objective in objectives for horizon in HORIZONS]
    return [[names[j] for j in row[:k]] for row, k in zip(order, count, strict=True)]


# ---- attributions ------------------------------------------------------------------------------------------------------
def attribute(policy: Policy, enc: Encoded, actions: np.ndarray) -> Attributions:
    """What of the histories moved the values of actions [B, D]: integrated gradients (arXiv 1703.01365).

    From "nothing is known of this history", with the attributes and the last policy kept.
    """
    cells, change = integrated_gradients(policy, enc, actions)
    f = cells.shape[2] // 2
    known = cells[:, :, :f] + cells[:, :, f:]  # a value and its presence mark are one cell
    platform, d = policy.platform, len(policy.units.centre)
    previous = [f"previous {name}" for name in platform.dimension_names or ["item"] * d] + [f"previous {name}" for name in platform.objectives]
    measures = {name: np.zeros(len(enc)) for name in [*platform.state.measures, *previous]}
    for j, name in enumerate([*platform.state.measures, *previous]):
        measures[name] += known[:, :, j].sum(1)
    return Attributions(measures, known.sum(2), change - known.sum((1, 2)))


def integrated_gradients(policy: Policy, enc: Encoded, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attribution of the value to every number of `enc.x`, [B, W, 2F], and the movement [B] that they should add up to.

    The encoder averages over what is present, so most of the value appears within the first thousandth of the straight path from zero,
    where evenly spread points never look: with 256 of them 5 to 20 % was missing. Integrals over pieces of one path add up; so each piece
    is integrated by itself, and cut in three until what its ends differ by is accounted for to 1 % of the movement.
    """
    from captum.attr import IntegratedGradients

    def together(x: Tensor, v: Tensor, branch: Tensor, action: Tensor) -> Tensor:
        # rows do not touch each other, so one sum has all their gradients; captum would ask for each
        return policy.value(Encoded(x, v, branch), action).sum()[None]

    method, given = IntegratedGradients(together), torch.from_numpy(np.ascontiguousarray(actions))
    n, size = len(enc), ROWS // POINTS

    def along(row: np.ndarray, share: np.ndarray) -> Tensor:
        """States a share of the way from nothing known."""
        return enc.x[torch.from_numpy(row)] * torch.from_numpy(share).to(enc.x.dtype)[:, None, None]

    def values_along(row: np.ndarray, share: np.ndarray) -> np.ndarray:
        pieces = [(row[at : at + ROWS], share[at : at + ROWS]) for at in range(0, len(row), ROWS)]
        return np.concatenate([policy.value_seen(Encoded(along(r, s), enc.v[r], enc.branch[r]), actions[r]) for r, s in pieces])

    everyone = np.arange(n)
    grid = values_along(np.repeat(everyone, len(EDGES)), np.tile(EDGES, n)).reshape(n, len(EDGES))
    change = grid[:, -1] - grid[:, 0]
    tolerance = (0.01 * np.abs(change) + 0.001 * np.abs(grid[:, -1])) / 4
    row, low, high = np.repeat(everyone, len(EDGES) - 1), np.tile(EDGES[:-1], n), np.tile(EDGES[1:], n)
    ends = np.stack([grid[:, :-1].ravel(), grid[:, 1:].ravel()], 1)  # the values at low and at high
    total = np.zeros(enc.x.shape)
    for rounds_left in reversed(range(ROUNDS)):
        unfinished = []
        for start in range(0, len(row), size):
            r, a, b = (array[start : start + size] for array in (row, low, high))
            cells = method.attribute(
                along(r, b).requires_grad_(), baselines=along(r, a), additional_forward_args=(enc.v[r], enc.branch[r], given[r]),
                n_steps=POINTS, method="gausslegendre",
            )  # fmt: skip
            cells = cells.detach().cpu().numpy().astype(float)
            rise = ends[start : start + size, 1] - ends[start : start + size, 0]
            done = (np.abs(rise - cells.sum((1, 2))) <= tolerance[r]) | (rounds_left == 0)
            np.add.at(total, r[done], cells[done])
            unfinished.append(np.flatnonzero(~done) + start)
        again = np.concatenate(unfinished)
        if len(again) == 0:
            break
        row, low, high, ends = row[again], low[again], high[again], ends[again]
        begin = np.where(low > 0, low, high * NOTHING)[:, None]  # what bends the path lies at scales, not at distances
        cuts = begin ** (1 - CUTS) * high[:, None] ** CUTS
        inside = values_along(np.repeat(row, len(CUTS)), cuts.ravel()).reshape(cuts.shape)
        edges, heights = np.column_stack([low, cuts, high]), np.column_stack([ends[:, 0], inside, ends[:, 1]])
        row = np.repeat(row, len(CUTS) + 1)
        low, high = edges[:, :-1].ravel(), edges[:, 1:].ravel()
        ends = np.stack([heights[:, :-1].ravel(), heights[:, 1:].ravel()], 1)
    return total, change


# ---- evidence ----------------------------------------------------------------------------------------------------------
def _nearest(policy: Policy, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B, N] positions of the nearest logged decisions and their distances, in units of the usual distance between such neighbours."""
    centre, width, standard = policy.reference.standard
    if len(standard) < 2:
        return np.zeros((len(embedding), len(standard)), np.int64), np.full((len(embedding), len(standard)), np.nan)
    k = min(NEIGHBOURS, len(standard) - 1)
    asked, square = torch.from_numpy((embedding - centre) / width), standard.square().sum(1)
    # which are nearest needs no root, and no square of what is asked; how far away they are is measured on those alone
    found = torch.cat([torch.addmm(square, piece, standard.T, alpha=-2).topk(k, largest=False).indices for piece in asked.split(256)])
    distance = torch.linalg.vector_norm((asked[:, None] - standard[found]).double(), dim=2)
    order = distance.argsort(stable=True, dim=1)
    return found.gather(1, order).numpy(), distance.gather(1, order).numpy() / policy.reference.usual


def _spreads_away(policy: Policy, actions: np.ndarray, expected: np.ndarray, acts: np.ndarray) -> np.ndarray:
    """[B, C] how far actions [B, C, D] are from what the nearest acting policy does on average (expected [B, K, D], acts [B, K]).

    In standard deviations of that policy's own noise: the dimension that is furthest away; for an item the root mean square, since single
    directions of an embedding mean nothing.
    """
    spread = policy.spread * policy.units.width
    least = LEAST_SPREAD * (np.diff(policy.platform.bounds, axis=1)[:, 0] if policy.catalogue is None else 1.0)
    away = np.abs(actions[:, :, None] - expected[:, None]) / np.maximum(spread, least)
    by_policy = away.max(3) if policy.catalogue is None else np.sqrt((away**2).mean(3))
    nearest: np.ndarray = np.where(acts[:, None], by_policy, np.inf).min(2)
    return nearest


def _evidence(
    policy: Policy, at: Situation, near: tuple[np.ndarray, np.ndarray], actions: np.ndarray, parts: np.ndarray, contrast: Contrast | None,
    acted: Sequence[str | None] | None = None,
) -> Evidence:  # fmt: skip
    probability, disagreement = policy.policy_probability(at), policy.disagreement(at)
    nearest, distance = near
    acts = probability >= np.minimum(probability.max(1, keepdims=True), RARE)  # among very many policies none may reach the share
    away = _spreads_away(policy, actions, policy.expert_actions(at), acts)
    policies = [[name for name, does in zip(policy.policies, row, strict=True) if does] for row in acts]
    size = np.abs(parts).sum((1, 2))
    likeliest = probability.argmax(1)
    doers = [policy.policies[k] for k in likeliest]
    if contrast is not None:
        half = contrast.high - contrast.difference
    else:
        half = CERTAINTY * policy.doubt(at, actions[:, :1], policy.expert_actions(at)[np.arange(len(at)), likeliest][:, None])[:, 0]
    usual = policy.details.get("own_response", {}).get("usual")  # bundles from before it was measured do not say
    times = half / (CERTAINTY * usual) if usual else np.full(len(at), np.nan)
    stake = CERTAINTY * policy.stake(policy.platform.weights)
    unknown = half / stake if stake > 0 else np.full(len(at), np.nan)
    against = contrast.against if contrast is not None else None
    unshared = doubts(policy.details.get("overlap", ()), against, acted or [None] * len(at))
    verdicts = []
    for i in range(len(at)):
        why = [unshared[i]] if unshared[i] else []
        if distance.shape[1] == 0 or np.isnan(distance[i]).any():
            why.append("too few logged decisions were kept to say how unusual this state is")
        elif distance[i].mean() > FAR_STATE:
            why.append(f"the nearest logged decisions are {distance[i].mean():.1f} times as far from this state as they usually are from each other")
        doer = " and ".join(policies[i]) if len(policies[i]) < 3 else "the policies that act"
        whose = "its" if len(policies[i]) == 1 else "their"
        if away[i, 0] > FAR_ACTION:
            why.append(f"the action lies {_number(away[i, 0])} times as far from what {doer} would do here as {whose} decisions usually stray from it")
        if contrast is not None and away[i, 1] > FAR_ACTION:
            far = f"{_number(away[i, 1])} times as far from what {doer} would do here as {whose} decisions usually stray from it"
            why.append(f"what it is compared with lies {far}")
        if unknown[i] > GRADES["fair"]:
            what = "the difference" if contrast is not None else f"the difference to what {doers[i]} would do here"
            why.append(f"{what} is known only to {_number(half[i])} either way, and one decision accounts for some {_number(stake)}")
        if disagreement[i] > DISAGREEING * size[i]:
            why.append(f"the two critics differ by {_number(disagreement[i])} about the value")
        verdicts.append(f"thin: {'; '.join(why)}" if why else "well supported")
    return Evidence(nearest, distance, disagreement, policies, times, verdicts, grades(unknown, [verdict != "well supported" for verdict in verdicts]))


def grades(unknown: np.ndarray, thin: Sequence[bool]) -> list[str]:
    """One of `GRADES` for what is not known [B] of differences, in one decision's stake (NaN: not measured, `fair`); `thin` at best where warned."""
    names = list(GRADES)
    at = np.searchsorted(list(GRADES.values()), np.where(np.isfinite(unknown), unknown, GRADES["fair"]))
    return [names[max(i, names.index("thin")) if warned else i] for i, warned in zip(at.tolist(), thin, strict=True)]


# ---- as people and programs read it ------------------------------------------------------------------------------------
def as_dict(
    explanation: Explanation, i: int = 0, *, decision_id: str | None = None, player_id: str | None = None, model_version: str | None = None, against: Any = None
) -> dict[str, Any]:
    """Player i's part as `POST /v1/explanations` answers it: strict JSON.

    Beside the contract's keys: `units` of the action, `weights` in `what_if`, `width` and `grade` in `evidence`. `model_version` is the policy's own unless
    given; `against` names the alternative where the explanation was made with a bare array. A nearest decision's `distance` is 1 where it is as near as
    logged decisions usually are to each other.
    """
    policy, platform = explanation.policy, explanation.policy.platform

    def shown(action: np.ndarray) -> dict[str, Any]:
        return action_dicts(platform, action[i : i + 1])[0]

    def listed(parts: np.ndarray) -> list[dict[str, Any]]:
        names = [(objective, horizon) for objective in platform.objectives for horizon in HORIZONS]
        return [{"objective": name, "horizon": horizon, "value": value} for (name, horizon), value in zip(names, parts[i].ravel().tolist(), strict=True)]

    answer: dict[str, Any] = {
        "decision_id": decision_id, "player_id": player_id, "model_version": model_version if model_version is not None else policy.version,
        "action": shown(explanation.action),
        "units": {name: dimension.unit for name, dimension in platform.action.dimensions.items()} if platform.action.kind == "continuous" else {},
        "value": float(explanation.value[i]), "low": float(explanation.low[i]), "high": float(explanation.high[i]),
        "score": {name: float(score[i]) for name, score in explanation.score.items()}, "parts": listed(explanation.parts),
        "contrast": None, "what_if": None, "attributions": None,
    }  # fmt: skip
    if (contrast := explanation.contrast) is not None:
        named = against if against is not None else contrast.against
        answer["contrast"] = {
            "against": named if named is not None else shown(contrast.action), "action": shown(contrast.action),
            "difference": float(contrast.difference[i]), "low": float(contrast.low[i]), "high": float(contrast.high[i]),
            "parts": listed(contrast.parts), "decisive": [list(reason) for reason in contrast.decisive[i]],
        }  # fmt: skip
    if (what_if := explanation.what_if) is not None:
        answer["what_if"] = {"action": shown(what_if.action), "value": float(what_if.value[i]), "parts": listed(what_if.parts), "weights": what_if.weights}
    if (moved := explanation.attributions) is not None:
        answer["attributions"] = {
            "measures": {name: float(amount[i]) for name, amount in moved.measures.items()}, "periods": moved.periods[i].tolist(),
            "completeness_gap": float(moved.completeness_gap[i]),
        }  # fmt: skip
    evidence, reference = explanation.evidence, policy.reference
    logged = reference.action[evidence.nearest[i]]
    actions = action_dicts(platform, logged if policy.catalogue is None else _items(policy.catalogue, np.nan_to_num(logged)))
    answer["evidence"] = {
        "nearest": [
            {"decision_id": reference.decision_id[at], "policy": reference.policy[at], "action": done, "distance": far if math.isfinite(far) else None}
            for at, done, far in zip(evidence.nearest[i], actions, evidence.distance[i].tolist(), strict=True)
        ],
        "disagreement": float(evidence.disagreement[i]), "policies": evidence.policies[i],
        "width": float(evidence.width[i]) if math.isfinite(evidence.width[i]) else None, "verdict": evidence.verdict[i], "grade": evidence.grade[i],
    }  # fmt: skip
    return answer


def _number(x: float) -> str:
    """Three significant digits, so that what is not zero never reads as zero and no sign is lost; large numbers in full."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def action_words(action: Mapping[str, Any], units: Mapping[str, str]) -> str:
    """An action as a phrase: `goal 7.2 rounds and gift 6 INR`, `item a17`."""
    if set(action) == {"item_id"}:
        return f"item {action['item_id']}"
    return joined([f"{name} {_number(value)} {units.get(name, '')}".rstrip() for name, value in action.items()])


def joined(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def part_words(part: Mapping[str, Any]) -> str:
    """One part's name as a phrase: `returns now`, `returns later`."""
    return f"{part['objective']} {'now' if part['horizon'] == 'immediate' else 'later'}"


def _signed(part: Mapping[str, Any]) -> str:
    return f"{part_words(part)} ({'+' if part['value'] > 0 else ''}{_number(part['value'])})"


def sentences(answer: Mapping[str, Any]) -> list[str]:
    """An explanation (as `as_dict` or the endpoint gives it) in three or four plain sentences; each number in them is one of its own."""
    units, contrast, evidence = answer.get("units") or {}, answer.get("contrast"), answer["evidence"]
    what = action_words(answer["action"], units)
    if contrast is None:
        said = [f"With {what} the weighted objectives are expected to add up to {_number(answer['value'])} from now on ({_interval(answer)})."]
        said.append(_largest_parts(answer["parts"]))
    else:
        said = [_difference(what, contrast, units), _decision(contrast)]
    thin = evidence["verdict"] != "well supported"
    very = "very " if evidence.get("grade") == "very thin" else ""
    known = f", with {evidence['grade']} evidence" if "grade" in evidence else ""
    supported = f"It is well supported{known}: {joined(evidence['policies'])} acted in such states."
    said.append(f"The evidence is {very}{evidence['verdict']}." if thin else supported)
    if what_if := answer.get("what_if"):
        weighed = joined([f"{name} weighed {_number(weight)}" for name, weight in what_if.get("weights", {}).items()]) or "the objectives weighed otherwise"
        best = action_words(what_if["action"], units)
        said.append(f"If {weighed}, {best} would be best, worth {_number(what_if['value'])} under those weights.")
    return said


def _interval(estimate: Mapping[str, Any]) -> str:
    return f"90 % interval {_number(estimate['low'])} to {_number(estimate['high'])}"


def _difference(what: str, contrast: Mapping[str, Any], units: Mapping[str, str]) -> str:
    against, difference, instead = contrast["against"], contrast["difference"], action_words(contrast["action"], units)
    if against == "logged":
        instead = f"what was logged, {instead}"
    elif isinstance(against, str):
        instead = f"what {against.replace('model:', 'model ', 1)} would give, {instead}"
    if difference == 0:
        return f"{what} instead of {instead}: no difference is expected."
    more, less = ("more", "less") if difference > 0 else ("less", "more")
    unclear = f", so it may also bring {less}" if contrast["low"] < 0 < contrast["high"] else ""
    return f"{what} instead of {instead}: expected to bring {_number(abs(difference))} {more} in weighted objectives ({_interval(contrast)}{unclear})."


def _decision(contrast: Mapping[str, Any]) -> str:
    by_name = {(part["objective"], part["horizon"]): part for part in contrast["parts"]}
    drawbacks = sorted((part for part in contrast["parts"] if part["value"] < 0), key=lambda part: part["value"])
    reasons = [by_name[objective, horizon] for objective, horizon in contrast["decisive"]]
    if not reasons:
        return f"What speaks against it weighs as much or more, most of all {_signed(drawbacks[0])}." if drawbacks else "Nothing tells the two apart."
    if not drawbacks:
        return f"Nothing speaks against it; the largest gain is {_signed(reasons[0])}."
    outweigh = "alone outweighs" if len(reasons) == 1 else "together outweigh"
    return f"{joined([_signed(part) for part in reasons])} {outweigh} every drawback, of which {_signed(drawbacks[0])} is the largest."


def _largest_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    gain, drawback = max(parts, key=lambda part: part["value"]), min(parts, key=lambda part: part["value"])
    said = [f"{_signed(gain)} brings the most"] if gain["value"] > 0 else []
    said += [f"{_signed(drawback)} takes the most"] if drawback["value"] < 0 else []
    return f"Of this, {joined(said)}." if said else "No objective moves."


# ---- one sentence above everything ---------------------------------------------------------------------------------------
def amounts_words(action: Mapping[str, Any], units: Mapping[str, str], *, bare: bool = False) -> str:
    """An action by its amounts alone, `7 games and 6 INR`, where no two dimensions share a unit; `bare` leaves the units out: `5 and 12`."""
    named = [units.get(name) or "" for name in action]
    if set(action) == {"item_id"} or len(action) == 1 or not all(named) or len(set(named)) < len(named):
        return action_words(action, units)
    return joined([_number(value) if bare else f"{_number(value)} {units[name]}" for name, value in action.items()])


def headline(answer: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    """Why this and not the alternative, in one sentence for people who do not program; `weights` of the objectives say what more and less mean.

    Made of the contrast's parts alone, and of no part that it does not name rightly: each "more", "less", "now" and "later" is the sign of one of
    them in the objective's own unit. Where the interval holds both signs, or the evidence is thin, it says that first. Without an alternative it says what
    is expected.
    """
    units, contrast = answer.get("units") or {}, answer.get("contrast")
    what = amounts_words(answer["action"], units)
    if contrast is None:
        doubt = ", though few data stand behind it" if answer["evidence"]["verdict"] != "well supported" else ""
        return f"{_capital(what)}: expected to be worth {_number(answer['value'])} from now on, {_interval(answer)}{doubt}."
    against = contrast["against"]
    # an amount that rounds alike would read as the same, so then both are named in full
    other = amounts_words(contrast["action"], units, bare=True)
    if other == amounts_words(answer["action"], units, bare=True):
        other = amounts_words(contrast["action"], units)
    if against == "logged":
        instead = f"of what was last done, {other}"
    elif isinstance(against, str):
        instead = f"of what {against.replace('model:', 'model ', 1)} would give, {other}"
    else:
        instead = f"of {other}"
    difference = contrast["difference"]
    if difference == 0:
        return f"{_capital(what)} instead {instead}: no difference is expected."
    worth = f"in all it is worth {_number(abs(difference))} {'more' if difference > 0 else 'less'}, {_interval(contrast)}"
    thin = answer["evidence"]["verdict"] != "well supported"
    said = _why(contrast, weights)
    if contrast["low"] < 0 < contrast["high"]:
        worth += ", so it is not certain which is better"
        said = f"as far as {'so few data' if thin else 'the data'} tell, {said}"
    elif thin:
        said = f"as far as so few data tell, {said}"
    return f"{_capital(what)} instead {instead}: {said}; {worth}."


def _why(contrast: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    """What speaks for it, and what that makes up for; or, where the alternative is better, what speaks against it."""
    parts = {(part["objective"], part["horizon"]): float(part["value"]) for part in contrast["parts"]}
    drawbacks = sorted((key for key, value in parts.items() if value < 0), key=lambda key: parts[key])
    if contrast["difference"] <= 0:
        gains = sorted((key for key, value in parts.items() if value > 0), key=lambda key: -parts[key])
        against = f"it means {_changes(drawbacks[:2], parts, weights)}"
        return f"{against}, which {_changes(gains[:1], parts, weights)} does not make up for" if gains else against
    reasons = [(objective, horizon) for objective, horizon in contrast["decisive"]]
    clauses, won_back = [], []
    for objective in dict.fromkeys(objective for objective, _ in reasons):
        now, later = parts.get((objective, HORIZONS[0]), 0.0), parts.get((objective, HORIZONS[1]), 0.0)
        if now < 0 < later and later > -now and (objective, HORIZONS[1]) in reasons:
            gives, takes = ("loses in", "wins back") if weights[objective] > 0 else ("adds to", "saves")
            won_back.append(f"what it {gives} {objective} now it {takes} later")
    told = {key for key in reasons if any(f" {key[0]} now it " in clause for clause in won_back)}
    if rest := [key for key in reasons if key not in told]:
        clauses.append(f"it means {_changes(rest, parts, weights)}")
    clauses += won_back
    left = [key for key in drawbacks if not any(f" {key[0]} now it " in clause for clause in won_back)]
    said = joined(clauses)
    return f"{said}, which outweighs {_changes(left[:1], parts, weights)}" if left else said


def _changes(keys: Sequence[tuple[str, str]], parts: Mapping[tuple[str, str], float], weights: Mapping[str, float]) -> str:
    """`less cost now and more engagement now and later`: each part's sign in its objective's own unit."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for objective, horizon in keys:
        more = parts[objective, horizon] * (1 if weights[objective] >= 0 else -1) > 0
        grouped.setdefault(("more" if more else "less", objective), []).append("now" if horizon == HORIZONS[0] else "later")
    return joined([f"{how} {objective} {joined(sorted(when, reverse=True))}" for (how, objective), when in grouped.items()])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
