"""Simulated platforms whose truth is known, and one real log, in the format of the platform's own logs.

`arena` is a gaming platform in the manner of arXiv 2504.21383: volatile players, three behaviour policies chosen by experiment-path
selection, a three-dimensional action, five objectives. All luck of the world is drawn from a counter-based generator keyed by (seed, day),
one row per player, so two policies that are compared meet the same players on the same days with the same luck.
`open_bandit` is the Open Bandit Dataset's small log.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from scipy.special import ndtr

from fastq.errors import ConfigurationError, RequestError
from fastq.platform import FILE_NAME, OWN_POLICY

Array = np.ndarray[Any, np.dtype[Any]]
States = dict[str, Any]
Act = Callable[[States], Array]

MEASURES = ("games", "win_rate", "minutes", "deposits", "rating", "reached", "opens")
OBJECTIVES = ("returns", "ltv", "engagement", "dwell", "cost")
SUMMARY = ("games_week", "games_last", "rating_last", "rating_week", "share_active", "idle", "reached_week", "deposits_week", "bonus_week", "nudges_week")
MIXTURE = "mixture"  # the logging platform itself: experiment-path selection over the behaviour policies
SESSIONS = 4  # at most so many sessions per player and day
OPENING = 0.6  # of a standard normal, below which a new player opens the app on the first day
LOOKBACK = 7  # days of history that the behaviour policies look at
DECISION_HOUR = 6  # UTC; everything a player does on that day happens later
_TARGET, _BONUS, _NUDGES = range(3)
_PEOPLE, _SHOCKS, _CHANCES, _CHOICES, _CLOCK = range(5)  # streams of luck


@dataclass(frozen=True)
class Dimension:
    """One dimension of the action, in raw units."""

    name: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Arena:
    """The parameters of the arena; a variant of the world is this record with other numbers.

    Units: action dimensions as named; moods and habits in standard deviations of a player population; probabilities per day.
    """

    name: str = "arena"
    policies: tuple[str, ...] = ("stretch", "retain", "spend")
    dimensions: tuple[Dimension, ...] = (Dimension("target_games", 1, 20, "games"), Dimension("bonus", 0, 50, "INR"), Dimension("nudges", 0, 6, "messages"))
    noise: tuple[float, ...] = (1.0, 3.5, 0.6)  # standard deviation of each behaviour policy around its mean, per dimension
    selection: float = 1.3  # sharpness of experiment-path selection; 0 is a randomised experiment, large means little overlap
    selection_floor: float = 0.03  # least probability of each policy
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, -1.0)
    discounts: tuple[float, ...] = (0.9, 0.95, 0.7, 0.9, 0.9)
    ceiling: float = 0.12  # mean cost per decision
    window: int = 30
    churn: int = 14  # days without activity after which the platform gives a player up
    # people
    taste: float = 0.35  # spread of the fixed part of log games wanted
    appetite: float = 1.35  # mean of log games wanted
    # mood
    mood_memory: float = 0.75
    volatility: float = 0.5  # daily shock to mood
    mood_on_want: float = 0.3
    # the challenge: how far above what a player wants today it is best set, and how narrow that is (log games)
    stretch_liked: float = 0.2
    mood_on_stretch: float = 0.28
    narrowness: float = 0.32
    frustration: float = 0.55
    growth: float = 0.5  # habit grows fastest with challenges that much harder than the most engaging ones (log games)
    # bonus, nudges
    bonus_half: float = 10.0  # INR at which a bonus has done 63 % of what it can
    entitlement: float = 0.3  # how fast paid bonuses are taken for granted
    consolation: float = 0.5  # what a bonus does for the mood of players who are down
    crowding: float = 0.004  # habit that each INR of bonus crowds out
    nudge_pull: float = 0.8
    annoyance: float = 0.13
    # presence
    presence: float = 0.5
    departure: float = -6.0
    # what the platform is given
    levels: tuple[tuple[float, ...], ...] = ()  # per dimension: actions are items of a catalogue, every combination of these values is one; without: numbers
    first: tuple[tuple[float, ...], ...] = ()  # per dimension 1 + 10 weights of `SUMMARY`: what the first policy does instead of stretching


# what `best_known` found on the arena, rounded: a linear policy of what is logged
BEST_ON_ARENA = (
    (-0.1787, 0.6626, 0.3717, 0.5846, -0.4125, -0.09024, -0.05396, 3.499, -0.0002357, -0.01598, -0.449),
    (1.864, 0.776, 0.1916, -0.6477, 2.468, 2.27, 1.648, -2.3, 1.06, -0.6152, -2.39),
    (0.7253, -0.06928, 0.04211, -0.2143, 0.3072, 0.5013, 0.05251, 0.3337, -0.05215, 0.02323, -0.6928),
)

WORLDS = {
    variant.name: variant
    for variant in (
        Arena(),
        # each policy keeps to its own kind of player and to its own narrow band of actions: little of the state space is shared
        Arena(name="narrow", selection=4.0, selection_floor=0.005, noise=(0.6, 2.0, 0.35)),
        # players whose mood turns daily: what was good yesterday tells little
        Arena(name="moody", mood_memory=0.4, volatility=1.0, mood_on_want=0.45, mood_on_stretch=0.4),
        # bonuses are dear: one that is seldom worth its price, and a ceiling that binds
        Arena(name="costly", weights=(1.0, 1.0, 1.0, 1.0, -3.0), ceiling=0.06, bonus_half=20.0),
        # one of the policies does already what the search in the truth finds, with little noise: there is nothing to gain
        Arena(name="settled", policies=("settled", "retain", "spend"), first=BEST_ON_ARENA, noise=(0.25, 1.0, 0.15)),
        # challenges come ready-made: 135 items, each a level, a bonus and a number of nudges
        Arena(name="catalogue", levels=((2, 3, 4, 5, 6, 8, 10, 13, 17), (0, 5, 10, 20, 35), (0, 1, 3))),
    )
}


def world(name: str = "arena") -> Arena:
    """The parameters of a simulated platform by its name."""
    if name not in WORLDS:
        raise RequestError(f"{name!r} is no simulated platform; expected one of {', '.join(WORLDS)}")
    return WORLDS[name]


def item_ids(world: Arena, action: Array) -> Array:
    """[...] ids of the items that actions [..., D] are, whatever lies between the levels taken as the nearest item; None where one is not known."""
    known = np.asarray(np.isfinite(action).all(-1))
    snapped = nearest_items(world, np.where(known[..., None], action, 0.0))
    names = [f"games{a:g}-bonus{b:g}-nudges{c:g}" if there else None for (a, b, c), there in zip(snapped.reshape(-1, 3).tolist(), known.ravel(), strict=True)]
    return np.array(names, object).reshape(known.shape)


def items(world: Arena) -> tuple[list[str], Array]:
    """Ids of a catalogue's items and what they are, [I, D] raw units."""
    every = np.stack(np.meshgrid(*world.levels, indexing="ij"), -1).reshape(-1, len(world.levels)).astype(float)
    return item_ids(world, every).tolist(), every


def nearest_items(world: Arena, action: Array) -> Array:
    """Actions [..., D] moved to the nearest item, dimension by dimension; as they are where actions are numbers."""
    if not world.levels:
        return action
    return np.stack([np.array(levels, float)[np.abs(action[..., j, None] - levels).argmin(-1)] for j, levels in enumerate(world.levels)], -1)


def item_table(world: Arena) -> pl.DataFrame:
    """The catalogue's log: its level as a name, since what a level does is no matter of its height, and its bonus and nudges as numbers."""
    names, what = items(world)
    return pl.DataFrame({"item_id": names, "level": [f"{games:g} games" for games in what[:, _TARGET]], "bonus": what[:, _BONUS], "nudges": what[:, _NUDGES]})


def _catalogue_tree() -> dict[str, Any]:
    return {"kind": "catalogue", "features": {"level": {"kind": "categorical"}, "bonus": {"kind": "numeric"}, "nudges": {"kind": "numeric"}}}


def platform_tree(world: Arena) -> dict[str, Any]:
    """The content of the `fastq.yaml` that goes with the logs of a world."""
    known_after = dict.fromkeys(OBJECTIVES, "18h") | {"returns": "42h"}
    objectives: dict[str, dict[str, Any]] = {
        name: {"weight": weight, "discount": discount, "known_after": known_after[name]}
        for name, weight, discount in zip(OBJECTIVES, world.weights, world.discounts, strict=True)
    }
    objectives["cost"]["ceiling"] = world.ceiling
    return {
        "version": 1,
        "platform": world.name,
        "logs": {
            "decisions": "logs/decisions/*.parquet",
            "activity": "logs/activity/*.parquet",
            "players": "logs/players.parquet",
            "proposals": "logs/proposals/*.parquet",
            **({"items": "logs/items.parquet"} if world.levels else {}),
        },
        "state": {
            "period": "1d",
            "window": world.window,
            "churn": world.churn,
            "measures": {
                "games": {"aggregate": "sum", "min": 0},
                "win_rate": {"aggregate": "mean", "min": 0, "max": 1},
                "minutes": {"aggregate": "sum", "min": 0},
                "deposits": {"aggregate": "sum", "min": 0},
                "rating": {"aggregate": "mean", "min": 1, "max": 5},
                "reached": {"aggregate": "max", "min": 0, "max": 1},
                "opens": {"aggregate": "sum", "min": 0},
            },
            "attributes": {
                "tenure_days": {"kind": "numeric"},
                "region": {"kind": "categorical"},
                "device": {"kind": "categorical"},
                "channel": {"kind": "categorical"},
            },
        },
        "policies": list(world.policies),
        "assignment": "decision",
        "action": _catalogue_tree()
        if world.levels
        else {
            "kind": "continuous",
            "default": {"target_games": 5, "bonus": 0, "nudges": 1},
            "dimensions": {d.name: {"low": d.low, "high": d.high, "unit": d.unit} for d in world.dimensions},
        },
        "objectives": objectives,
        "training": {"preset": "default", "seed": 0},
        "serving": {"exploration": 0.05},
    }


def bounds(world: Arena) -> Array:
    """[D, 2] low and high of each action dimension, raw units."""
    return np.array([[d.low, d.high] for d in world.dimensions], float)


def _generator(seed: int, day: int, stream: int) -> np.random.Generator:
    # a Philox key is two 64-bit words; rows are filled in order, so player i's luck does not depend on how many players there are
    return np.random.Generator(np.random.Philox(key=[np.uint64(seed), np.uint64(day * 8 + stream)]))


def _logistic(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def summarise(history: Array, actions: Array) -> Array:
    """[n, 10] what the behaviour policies look at, named in `SUMMARY`: the last week of measures [n, W, 7] and actions [n, W, 3], all logged."""
    games, rating, reached, deposits = (history[:, -LOOKBACK:, MEASURES.index(name)] for name in ("games", "rating", "reached", "deposits"))
    seen, days = ~np.isnan(games), games.shape[1]
    active = seen.sum(1)

    def mean(values: Array, otherwise: float) -> Array:
        there = ~np.isnan(values)
        count = there.sum(1)
        return np.where(count > 0, np.where(there, values, 0.0).sum(1) / np.maximum(count, 1), otherwise)

    def last(values: Array, otherwise: Array) -> Array:
        there = ~np.isnan(values)
        newest = values.shape[1] - 1 - there[:, ::-1].argmax(1)
        return np.where(there.any(1), values[np.arange(len(values)), newest], otherwise)

    games_week, rating_week = mean(games, 4.0), mean(rating, 3.0)
    idle = np.where(seen.any(1), seen[:, ::-1].argmax(1), days)
    bonus, nudges = mean(actions[:, -LOOKBACK:, _BONUS], 8.0), mean(actions[:, -LOOKBACK:, _NUDGES], 1.5)
    columns = [games_week, last(games, games_week), last(rating[:, -3:], rating_week), rating_week, active / LOOKBACK, idle, mean(reached, 0.5)]
    return np.stack([*columns, np.log1p(np.where(seen, deposits, 0.0).sum(1) / LOOKBACK), bonus, nudges], 1)


def policy_means(world: Arena, summary: Array) -> Array:
    """[n, K, D] the mean action of each behaviour policy, inside the bounds.

    `stretch` sets targets above the week's play, `retain` easy ones with reminders and rising bonuses for players who stay away,
    `spend` pays large bonuses to those who deposit. In a world with a `first` policy, that one stands in the place of `stretch`.
    """
    s = dict(zip(SUMMARY, summary.T, strict=True))
    games, idle, lazy = s["games_week"], s["idle"], 1 - s["share_active"]
    stretch = np.stack([1.55 * games + 0.5, 4 + 2 * s["share_active"], 0.8 + 0.1 * idle], 1)
    retain = np.stack([0.6 * games + 0.5, 6 + 6 * lazy, 1.4 + 0.3 * np.minimum(idle, 4)], 1)
    spend = np.stack([0.85 * games + 0.5, 12 + 2.5 * s["deposits_week"], 1.0 + 0 * games], 1)
    if world.first:
        weights = np.array(world.first)
        stretch = weights[:, 0] + summary @ weights[:, 1:].T
    low, high = bounds(world).T
    return np.clip(np.stack([stretch, retain, spend], 1), low, high)


def selection_probabilities(world: Arena, summary: Array) -> Array:
    """[n, K] experiment-path selection: the probability with which each policy is chosen to act, from the player's logged week."""
    s = dict(zip(SUMMARY, summary.T, strict=True))
    keen = 2 * s["share_active"] - 1
    logits = world.selection * np.stack([0.8 * keen + 0.5 * (s["rating_week"] - 3), 0.25 * s["idle"] - 0.7 * keen, 0.6 * (s["deposits_week"] - 2.0)], 1)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return np.asarray(world.selection_floor + (1 - len(world.policies) * world.selection_floor) * shares)


def action_density(world: Arena, action: Array, mean: Array) -> Array:
    """Density per raw units of `action` [..., D] under a Gaussian around `mean` clipped to the bounds; NaN on a bound, which is an atom.

    For a catalogue the probability of the item, which is exact everywhere.
    """
    if world.levels:
        action, mean = np.broadcast_arrays(action, mean)
        chances = []
        for j, law in enumerate(_level_laws(world, mean)):
            at = np.abs(action[..., j, None] - world.levels[j]).argmin(-1)
            chances.append(np.take_along_axis(law, at[..., None], -1)[..., 0])
        return np.asarray(np.prod(chances, 0))
    sigma, (low, high) = np.array(world.noise), bounds(world).T
    density = np.exp(-0.5 * ((action - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return np.where(((action > low) & (action < high)).all(-1), density.prod(-1), np.nan)


def _level_laws(world: Arena, mean: Array) -> list[Array]:
    """Per dimension [..., levels] the probability of each level around `mean` [..., D]: a normal's density there, normalised."""
    laws = []
    for j, levels in enumerate(world.levels):
        log = -0.5 * ((np.array(levels) - mean[..., j, None]) / world.noise[j]) ** 2
        law = np.exp(log - log.max(-1, keepdims=True))
        laws.append(law / law.sum(-1, keepdims=True))
    return laws


@dataclass(frozen=True)
class Behaviour:
    """What the logging platform does on one day.

    policy [n] index of the one that acts; action [n, D] executed; proposals [n, K, D] what each would have executed;
    assignment [n, K] probability of each being chosen; propensity [n, K] density of the executed action under each, NaN on a bound.
    """

    policy: Array
    action: Array
    proposals: Array
    assignment: Array
    propensity: Array


@dataclass(frozen=True)
class Sessions:
    """One day's events, [n, 4] each: second of the day (NaN: no such session) and the measures [n, 4, 7]."""

    second: Array
    measures: Array


class Simulation:
    """A world that runs: `reset`, then per day `states`, `behaviour` or a policy of one's own, and `step`.

    Days are counted from 0. `active` [n] says who opens the app today (not known to anyone at decision time), `opening` [n] with which chance that was
    drawn, `gone` [n] who has left for good.
    """

    def __init__(self, world: Arena, players: int, seed: int) -> None:
        self.world = world
        self.reset(players, seed)

    def reset(self, players: int, seed: int) -> None:
        """New players, no history. `players` people of seed `seed` are the first of any larger population of that seed."""
        w, self.seed, self.day = self.world, seed, 0
        draws = _generator(seed, 0, _PEOPLE).standard_normal((players, 12))
        uniform = 0.5 * (1 + np.tanh(0.8 * draws[:, 6:9]))  # close to the normal distribution function, enough to cut categories from
        self.people = np.arange(players)  # whose luck each row has
        self.taste, self.spender, self.tolerance, self.skill, self.greed = draws[:, :5].T
        tenure = np.exp(4.5 + 0.9 * draws[:, 5])
        region = np.digitize(uniform[:, 0] + 0.12 * self.taste, [0.2, 0.45, 0.65, 0.85])
        device = np.digitize(uniform[:, 1] + 0.18 * self.spender, [0.4, 0.8])
        channel = np.digitize(uniform[:, 2] + 0.18 * self.tolerance, [0.35, 0.7])
        self.attributes = pl.DataFrame(
            {
                "tenure_days": np.floor(tenure),
                "region": np.array(["east", "north", "west", "south", "metro"])[region],
                "device": np.array(["feature", "android", "ios"])[device],
                "channel": np.array(["ads", "search", "friend"])[channel],
            }
        )
        self.appetite = w.appetite + w.taste * self.taste
        self.mood, self.habit = 0.6 * draws[:, 9], 0.35 * (np.log(tenure) - 4.5) + 0.4 * draws[:, 10]
        self.fatigue, self.annoyed, self.entitled = np.zeros(players), np.zeros(players), np.zeros(players)
        self.active, self.opening = draws[:, 11] < OPENING, np.full(players, ndtr(OPENING))
        self.gone, self.idle = np.zeros(players, bool), np.zeros(players, int)
        blank = np.full((players, len(MEASURES)), np.nan), np.full((players, len(w.dimensions)), np.nan), np.full((players, len(OBJECTIVES)), np.nan)
        self.history, self.actions, self.objectives = ([array] * w.window for array in blank)
        self.last_policy: list[str | None] = [None] * players
        self.sessions = Sessions(np.full((players, SESSIONS), np.nan), np.full((players, SESSIONS, len(MEASURES)), np.nan))
        self._summary: Array | None = None

    def copy(self, times: int = 1) -> Simulation:
        """The same world at the same moment; `times` copies of every player (all of them, then all again) share that player's luck."""
        twin: Simulation = object.__new__(Simulation)
        for name, value in vars(self).items():
            setattr(twin, name, np.concatenate([value] * times) if isinstance(value, np.ndarray) else value)
        twin.attributes, twin.last_policy = pl.concat([self.attributes] * times), self.last_policy * times
        window = self.world.window  # only as much of the past as a policy can see
        for name in ("history", "actions", "objectives"):
            past = getattr(self, name)[-window:]
            tiled = {id(a): np.concatenate([a] * times) for a in past}  # the days before the first are one and the same array
            setattr(twin, name, [tiled[id(a)] for a in past])
        twin.sessions = Sessions(np.concatenate([self.sessions.second] * times), np.concatenate([self.sessions.measures] * times))
        return twin

    def __len__(self) -> int:
        return len(self.people)

    def states(self) -> States:
        """What is known when today's decisions are made, ready for `PlayerStates(**states)`.

        history [n, W, measures], actions [n, W, D], objectives [n, W, M]: the complete past days, oldest first, raw units, NaN where nothing is
        known (no activity, no decision, or a value not yet known: `returns` waits for the day after). attributes: a frame; policies: who acted last.
        """
        window = self.world.window
        objectives = np.stack(self.objectives[-window:], 1)
        objectives[:, -1, OBJECTIVES.index("returns")] = np.nan
        return {
            "history": np.stack(self.history[-window:], 1),
            "attributes": self.attributes,
            "actions": np.stack(self.actions[-window:], 1),
            "objectives": objectives,
            "policies": list(self.last_policy),
        }

    def summary(self) -> Array:
        """[n, 10] the columns of `SUMMARY` for today's states."""
        if self._summary is None:
            self._summary = summarise(np.stack(self.history[-LOOKBACK:], 1), np.stack(self.actions[-LOOKBACK:], 1))
        return self._summary

    def proposals(self) -> Array:
        """[n, K, D] mean action of each behaviour policy today."""
        return policy_means(self.world, self.summary())

    def behaviour(self, rng: np.random.Generator | None = None) -> Behaviour:
        """Draw who acts and what everyone would do; without `rng` from the world's own luck, so that runs of one seed agree."""
        rng = rng or _generator(self.seed, self.day, _CHOICES)
        k, d = len(self.world.policies), len(self.world.dimensions)
        # one normal row per player of the seed, looked up by person: copies of a player make the same draws
        draws = rng.standard_normal((int(self.people.max()) + 1, k * d + 2))[self.people]
        low, high = bounds(self.world).T
        means, assignment = self.proposals(), selection_probabilities(self.world, self.summary())
        normal = draws[:, 2:].reshape(-1, k, d)
        proposals = np.clip(means + normal * np.array(self.world.noise), low, high)
        for j, law in enumerate(_level_laws(self.world, means)):  # of a catalogue: the level at which the law has passed the same luck
            passed = (ndtr(normal[..., j])[..., None] > law.cumsum(-1)).sum(-1)
            proposals[..., j] = np.array(self.world.levels[j], float)[np.minimum(passed, law.shape[-1] - 1)]
        # the radius of two independent normals is Rayleigh, so this is exactly uniform
        chance = np.exp(-0.5 * (draws[:, 0] ** 2 + draws[:, 1] ** 2))
        policy = np.minimum((chance[:, None] > assignment.cumsum(1)).sum(1), k - 1)
        action = proposals[np.arange(len(self)), policy]
        return Behaviour(policy, action, proposals, assignment, action_density(self.world, action[:, None], means))

    def served(self) -> Array:
        """[n] who gets a decision today: everyone seen within the last `churn` days (new players count as seen)."""
        return np.asarray(self.idle < self.world.churn)

    def step(self, action: Array, policies: Sequence[str | None] | None = None) -> Array:
        """Live through one day under `action` [n, D] (raw units, clipped to the bounds or the nearest item); the day's objectives [n, M], in the order
        of `OBJECTIVES`.

        Players who have left bring 0 in every objective, whatever is recommended to them. `self.sessions` then holds the day's events.
        """
        w = self.world
        people = int(self.people.max()) + 1
        normal = _generator(self.seed, self.day, _SHOCKS).standard_normal((people, 10 + 3 * SESSIONS))[self.people]
        chance = _generator(self.seed, self.day, _CHANCES).random((people, 8 + 3 * SESSIONS))[self.people]
        low, high = bounds(w).T
        action = nearest_items(w, np.clip(np.asarray(action, float), low, high))
        target, bonus, nudges = action.T
        served, active = self.served(), self.active & ~self.gone

        # what the player wants today, and how well the challenge meets it
        want = np.exp(self.appetite + w.mood_on_want * self.mood + 0.2 * self.habit - 0.35 * self.fatigue)
        gap = np.log(target / want) - (w.stretch_liked + w.mood_on_stretch * self.mood)
        fit = np.exp(-0.5 * (gap / w.narrowness) ** 2)
        too_hard = np.minimum(np.maximum(gap - 0.5, 0), 1.5)
        lure = np.exp(0.5 * self.greed) * (1 - np.exp(-bonus / w.bonus_half)) / (1 + self.entitled)
        lure = np.minimum(lure, 2.0)
        expected = want * np.maximum(0.85 + 0.35 * fit + 0.25 * lure - 0.25 * too_hard, 0.2)
        games = np.floor(np.maximum(expected + 0.8 * np.sqrt(expected) * normal[:, 0], 0) + chance[:, 0])
        reached = games >= target

        # the day's objectives
        engagement = np.maximum(0.75 * fit * (0.6 + 0.4 * np.minimum(games / target, 1)) + 0.2 * lure - 0.2 * too_hard + 0.06 * normal[:, 1], 0)
        per_game = 6 * np.exp(0.25 * self.skill + 0.45 * normal[:, 2])
        pays = chance[:, 1] < _logistic(-0.9 + 0.5 * self.mood + 0.7 * self.spender + 0.35 * fit + 0.25 * lure - 0.3 * too_hard)
        deposit = np.where(pays, 10 * np.ceil(4 * np.exp(0.5 * self.spender + 0.8 * normal[:, 3])), 0.0)
        cost = (bonus * reached * active + nudges) / 50

        self.sessions = self._sessions(active, games, per_game, deposit, reached, nudges, normal[:, 10:], chance[:, 8:])
        day = _aggregate(self.sessions)
        dwell = np.nan_to_num(day[:, MEASURES.index("minutes")]) / 60

        # tomorrow: mood reacts to wins, reached and missed targets; habit grows by well-set challenges; bonuses are soon taken for granted
        won = np.nan_to_num(day[:, MEASURES.index("win_rate")] - 0.5)
        content = np.where(reached, 0.15 + 0.5 * fit + w.consolation * lure * _logistic(-2 * self.mood), -0.15 - w.frustration * too_hard)
        self.mood = w.mood_memory * self.mood + active * (0.5 * won + content - 0.1) - 0.1 * self.annoyed + w.volatility * normal[:, 4]
        grows = np.exp(-0.5 * ((gap - w.growth) / w.narrowness) ** 2)
        self.habit = 0.93 * self.habit + active * (0.4 * grows - 0.08 - 0.1 * too_hard - w.crowding * bonus * reached) - 0.03 * ~active + 0.05 * normal[:, 5]
        self.fatigue = 0.75 * self.fatigue + active * 0.12 * np.maximum(games / np.exp(self.appetite) - 0.8, -0.5)
        self.entitled = 0.9 * self.entitled + w.entitlement * bonus * reached * active / 10
        self.annoyed = 0.9 * self.annoyed + w.annoyance * np.maximum(nudges - 1 - 0.5 * self.tolerance, 0) * served
        pull = w.nudge_pull * np.log1p(nudges) * served * np.exp(0.3 * self.tolerance) / (1 + self.annoyed)
        self.idle = np.where(active, 0, self.idle + 1)
        leaves = chance[:, 2] < _logistic(w.departure - 0.8 * self.mood - 0.8 * self.habit + 0.8 * self.annoyed)
        self.gone = self.gone | leaves | (self.idle >= w.churn)
        drawn = 0.6 * self.mood + 0.9 * self.habit + pull + 0.4 * active
        pushed = 0.6 * self.fatigue + 0.4 * self.annoyed + 0.15 * np.minimum(self.idle, 5)
        self.opening = _logistic(w.presence + drawn - pushed) * ~self.gone
        self.active = chance[:, 3] < self.opening

        objectives = np.stack([self.active * 1.0, active * deposit / 100, active * engagement, active * dwell, cost], 1)
        objectives[~served] = 0.0
        self.history.append(day)
        self.actions.append(np.where(served[:, None], action, np.nan))
        self.objectives.append(np.where(served[:, None], objectives, np.nan))
        acted = policies if policies is not None else [OWN_POLICY] * len(self)
        self.last_policy = [now if s else before for now, before, s in zip(acted, self.last_policy, served, strict=True)]
        self.day += 1
        self._summary = None
        return objectives

    def _sessions(self, active: Array, games: Array, per_game: Array, deposit: Array, reached: Array, nudges: Array, normal: Array, chance: Array) -> Sessions:
        """The day cut into at most four sessions; whoever opens the app has at least one, perhaps without a game."""
        order = np.arange(SESSIONS)
        n = np.clip(np.ceil(games / 3), 1, SESSIONS)
        there = active[:, None] & (order < n[:, None])
        played = np.floor(games / n)[:, None] + (order < (games - np.floor(games / n) * n)[:, None])
        odds = np.clip(0.5 + 0.08 * self.skill + 0.05 * self.mood, 0.1, 0.9)[:, None]
        won = np.clip(np.floor(played * odds + np.sqrt(played * odds * (1 - odds)) * normal[:, :SESSIONS] + chance[:, :SESSIONS]), 0, played)
        minutes = np.round(1 + played * per_game[:, None] * np.exp(0.3 * normal[:, SESSIONS : 2 * SESSIONS]), 1)
        rating = np.clip(np.round(3 + 0.8 * self.mood[:, None] + 0.7 * normal[:, 2 * SESSIONS :]), 1, 5)
        rating[chance[:, SESSIONS : 2 * SESSIONS] < 0.35] = np.nan  # not every session is rated
        first, final = order == 0, order == n[:, None] - 1
        opens = np.floor(nudges * _logistic(0.3 + 0.7 * self.tolerance - self.annoyed) + chance[:, -1])
        win_rate = np.where(played > 0, won / np.maximum(played, 1), np.nan)
        measures = np.stack([played, win_rate, minutes, deposit[:, None] * first, rating, (reached[:, None] & final) * 1.0, opens[:, None] * first], 2)
        # sessions spread over half past six to a quarter to midnight, in order
        second = np.floor(3600 * (DECISION_HOUR + 0.5) + (order + chance[:, 2 * SESSIONS :]) / n[:, None] * 17.25 * 3600)
        return Sessions(np.where(there, second, np.nan), np.where(there[:, :, None], measures, np.nan))


def _aggregate(sessions: Sessions) -> Array:
    """[n, measures] one day's sessions as the platform file aggregates them; NaN where there is no value."""
    there = ~np.isnan(sessions.measures)
    count = there.sum(1)
    total = np.where(there, sessions.measures, 0.0).sum(1)
    day = np.where(count > 0, total, np.nan)
    for name in ("win_rate", "rating"):
        j = MEASURES.index(name)
        day[:, j] /= np.maximum(count[:, j], 1)
    return np.asarray(day)  # `reached` is 1 in at most one session, so its sum is its maximum


# ---- logs -----------------------------------------------------------------------------------------------------------------
def write_logs(world: Arena, directory: Path | str, players: int = 2_000, days: int = 40, seed: int = 0, end: date | None = None) -> Path:
    """Run the logging platform and write `fastq.yaml` and `logs/` into `directory`; one Parquet file per table and day.

    `end` is the last day of the log (UTC), by default yesterday. The log is cut at the midnight after it: what was not known then is null.
    Returns the path of the platform file.
    """
    directory = Path(directory)
    end = end or datetime.now(UTC).date() - timedelta(days=1)
    for table in ("decisions", "activity", "proposals"):
        folder = directory / "logs" / table
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.parquet"):  # an earlier, longer log must not shine through
            old.unlink()
    simulation = Simulation(world, players, seed)
    ids = player_ids(players)
    names = np.array(world.policies)
    if world.levels:
        item_table(world).write_parquet(directory / "logs" / "items.parquet")

    def acted_on(action: Array) -> dict[str, Any]:
        """The columns of actions [n, D]."""
        return {"item_id": item_ids(world, action).tolist()} if world.levels else {d.name: action[:, j] for j, d in enumerate(world.dimensions)}

    for day in range(days):
        on = end - timedelta(days=days - 1 - day)
        served, behaviour = simulation.served(), simulation.behaviour()
        objectives = simulation.step(behaviour.action, names[behaviour.policy].tolist())
        if day >= days - 1:
            objectives[:] = np.nan
        elif day == days - 2:
            objectives[:, OBJECTIVES.index("returns")] = np.nan
        who = np.flatnonzero(served)
        player = pl.Series("player_id", ids).gather(who)
        decision = pl.Series("decision_id", f"{on:%Y%m%d}-" + player)
        moment = _moment(on, 3600 * DECISION_HOUR + _generator(seed, day, _CLOCK).integers(0, 900, players)[who])
        acted = behaviour.policy[who]
        pl.DataFrame(
            {
                "decision_id": decision,
                "player_id": player,
                "decided_at": moment,
                "policy": names[acted],
                "propensity": behaviour.propensity[who, acted],
                "assignment": behaviour.assignment[who, acted],
                **acted_on(behaviour.action[who]),
                **{name: objectives[who, j] for j, name in enumerate(OBJECTIVES)},
            },
            nan_to_null=True,
        ).write_parquet(directory / "logs" / "decisions" / f"{on}.parquet")
        pl.DataFrame(
            {
                "decision_id": decision.gather(np.repeat(np.arange(len(who)), len(names))),
                "policy": np.tile(names, len(who)),
                **acted_on(behaviour.proposals[who].reshape(-1, len(world.dimensions))),
                "propensity": behaviour.propensity[who].ravel(),
                "assignment": behaviour.assignment[who].ravel(),
            },
            nan_to_null=True,
        ).write_parquet(directory / "logs" / "proposals" / f"{on}.parquet")
        row, session = np.nonzero(~np.isnan(simulation.sessions.second))
        values = simulation.sessions.measures[row, session]
        pl.DataFrame(
            {
                "player_id": pl.Series(ids).gather(row),
                "occurred_at": _moment(on, simulation.sessions.second[row, session].astype(int)),
                **{name: values[:, j] for j, name in enumerate(MEASURES)},
            },
            nan_to_null=True,
        ).sort("occurred_at", maintain_order=True).write_parquet(directory / "logs" / "activity" / f"{on}.parquet")
    simulation.attributes.insert_column(0, pl.Series("player_id", ids)).write_parquet(directory / "logs" / "players.parquet")
    head = f"# The simulated platform {world.name!r}: {players} players, {days} days up to {end}, seed {seed}.\n"
    return _write_platform_file(directory, platform_tree(world), head)


def player_ids(players: int) -> list[str]:
    """The ids under which a world's players appear in its logs, in the order of a simulation's rows."""
    return [f"p{i:05d}" for i in range(players)]


def _moment(on: date, second: Array) -> pl.Series:
    midnight = int(datetime.combine(on, time(), UTC).timestamp())
    return pl.from_epoch(pl.Series(midnight + second, dtype=pl.Int64), time_unit="s").dt.cast_time_unit("us").dt.replace_time_zone("UTC")


def _write_platform_file(directory: Path, tree: dict[str, Any], head: str) -> Path:
    """The platform file in the order of the contract's example; leaves of at most one level stand on one line."""

    class Dumper(yaml.SafeDumper):
        def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
            leaf = 0 < len(mapping) <= 4 and not any(isinstance(value, dict) for value in mapping.values())
            return super().represent_mapping(tag, mapping, flow_style=leaf)

        def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
            return super().represent_sequence(tag, sequence, flow_style=True)

    path = directory / FILE_NAME
    path.write_text(head + yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=160, allow_unicode=True), encoding="utf-8")
    return path


# ---- truth ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrueValue:
    """What a policy brings in truth.

    objectives [M]: mean immediate value per player and day; players who have left go on to count, with 0. total: their weighted sum.
    per_decision [M]: the same per decision, over players who still get one (what a guardrail bounds, and what logs show).
    by_player [n]: each player's mean weighted value per day, for paired comparisons. decided: share of player-days with a decision.
    """

    objectives: Array
    total: float
    per_decision: Array
    by_player: Array
    decided: float


def true_values(world: Arena, act: Act | str, players: int = 1_000, days: int = 30, seed: int = 100, burn_in: int = 14) -> TrueValue:
    """Run `act` for `days` days after `burn_in` days under the logging platform, on the luck of `seed`.

    `act` maps `Simulation.states()` to actions [n, D] in raw units (of items: what they are), or names a behaviour policy or "mixture" (both with their noise).
    """
    simulation = Simulation(world, players, seed)
    names = np.array(world.policies)
    if isinstance(act, str) and act not in (*world.policies, MIXTURE):
        raise RequestError(f"{act!r} is no behaviour policy of {world.name}; expected one of {', '.join((*world.policies, MIXTURE))}")
    total, decided = np.zeros((players, len(OBJECTIVES))), 0
    for day in range(burn_in + days):
        if day < burn_in or isinstance(act, str):
            behaviour = simulation.behaviour()
            acting = np.full(players, world.policies.index(act)) if day >= burn_in and isinstance(act, str) and act != MIXTURE else behaviour.policy
            action, policies = behaviour.proposals[np.arange(players), acting], names[acting].tolist()
        else:
            assert not isinstance(act, str)
            action, policies = np.asarray(act(simulation.states()), float), [OWN_POLICY] * players
            if action.shape != (players, len(world.dimensions)) or not np.isfinite(action).all():
                raise RequestError(f"the policy returned actions of shape {action.shape}; expected finite numbers [{players}, {len(world.dimensions)}]")
        served = simulation.served()
        objectives = simulation.step(action, policies)
        if day >= burn_in:
            total += objectives
            decided += int(served.sum())
    mean, weights = total.mean(0) / days, np.array(world.weights)
    return TrueValue(mean, float(mean @ weights), total.sum(0) / max(decided, 1), total @ weights / days, decided / (players * days))


@dataclass(frozen=True)
class LinearPolicy:
    """action = clip(centre + weights @ standardised summary): a linear policy of logged features. weights [D, 1 + 10], mean and scale [10]."""

    world: Arena
    weights: Array
    mean: Array
    scale: Array

    def __call__(self, states: States) -> Array:
        return linear_actions(self.world, self.weights[None], self.standardised(summarise(states["history"], states["actions"])))

    def standardised(self, summary: Array) -> Array:
        """[n, 1 + 10] with a leading 1."""
        return np.concatenate([np.ones((len(summary), 1)), (summary - self.mean) / self.scale], 1)


def linear_actions(world: Arena, weights: Array, features: Array) -> Array:
    """Actions [C * n, D] of C linear policies [C, D, P], each on its own n rows of `features` [C * n, P]."""
    low, high = bounds(world).T
    rows = features.reshape(len(weights), -1, features.shape[1])
    return np.clip(np.einsum("cnp,cdp->cnd", rows, weights).reshape(len(features), -1), low, high)


def best_known(
    world: Arena, seed: int = 0, generations: int = 30, population: int = 48, players: int = 160, burn_in: int = 10, days: int = 21, myopic: bool = False
) -> LinearPolicy:
    """The best linear policy of logged features that a fixed search in the truth finds: the definition of "best known".

    Cross-entropy method: `population` candidates per generation, all on the same luck (new luck each generation, from a range of seeds
    of its own), a quarter survives, started at the mean of the behaviour policies. A candidate's score is its true weighted value less 10
    times what its cost per decision exceeds the ceiling by. `myopic` scores each day by its immediate objectives alone, as a deviation of
    one day from the logging platform: what a platform gets that looks no further than tomorrow.
    """
    rng = np.random.default_rng(seed)
    sample, summaries, means = Simulation(world, 1_000, 1_000_000 + seed), [], []
    for day in range(burn_in + days):
        if day >= burn_in:
            summaries.append(sample.summary())
            means.append((selection_probabilities(world, sample.summary())[:, :, None] * sample.proposals()).sum(1))
        sample.step(sample.behaviour().action)
    summary, mean_action = np.concatenate(summaries), np.concatenate(means)
    start = LinearPolicy(world, np.zeros((len(world.dimensions), 1 + summary.shape[1])), summary.mean(0), np.maximum(summary.std(0), 1e-6))
    features = start.standardised(summary)
    centre = np.linalg.lstsq(features, mean_action, rcond=None)[0].T
    spread = np.ptp(bounds(world), axis=1)[:, None] * np.where(np.arange(features.shape[1]) == 0, 0.12, 0.05)
    elite = population // 4
    for generation in range(generations):
        candidates = centre + spread * rng.standard_normal((population, *centre.shape))
        candidates[0] = centre
        scores = _scores(start, candidates, players, 2_000_000 + 1_000 * seed + generation, burn_in, days, myopic)
        best = candidates[np.argsort(-scores)[:elite]]
        centre, spread = best.mean(0), 0.3 * spread + 0.7 * best.std(0)
    return LinearPolicy(world, centre, start.mean, start.scale)


def _scores(start: LinearPolicy, candidates: Array, players: int, seed: int, burn_in: int, days: int, myopic: bool) -> Array:
    """[C] the score of each candidate of `best_known`, all on the same players and luck."""
    world, count = start.world, len(candidates)
    logging = Simulation(world, players, seed)
    for _ in range(burn_in):
        logging.step(logging.behaviour().action)
    total, decided = np.zeros((count, len(OBJECTIVES))), np.zeros(count)
    running = logging.copy(count)
    for _ in range(days):
        if myopic:
            running = logging.copy(count)
        decided += running.served().reshape(count, -1).sum(1)
        total += running.step(linear_actions(world, candidates, start.standardised(running.summary()))).reshape(count, players, -1).sum(1)
        if myopic:
            logging.step(logging.behaviour().action)
    excess = np.maximum(total[:, OBJECTIVES.index("cost")] / np.maximum(decided, 1) - world.ceiling, 0)
    return np.asarray(total @ np.array(world.weights) / (players * days) - 10 * excess)


# ---- a real log -------------------------------------------------------------------------------------------------------------
OPEN_BANDIT_ATTRIBUTION = (
    "Open Bandit Dataset (small), © ZOZO, Inc., licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). "
    "Saito, Aihara, Matsutani, Narita: Open Bandit Dataset and Pipeline, arXiv 2008.07146. "
    "Changes: columns renamed to fastq's log format, user-item affinities left out."
)
OBP_WHEEL = "obp-0.4.1-py3-none-any.whl"
OBP_SHA256 = "87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208"
_OPEN_BANDIT = ("random", "bts")


def open_bandit(directory: Path | str, wheel: Path | str | None = None, cache: Path | str | None = None) -> str:
    """Write the Open Bandit Dataset's small logs (campaign "all") as `fastq.yaml` and `logs/` into `directory`; returns the attribution to print.

    Two policies chose fashion items on a shop's front page in one week of November 2019, by an A/B test per impression: `random` (uniform
    over 80 items) and `bts` (Bernoulli Thompson sampling, trained before that week). The files, as they are: 10,000 rows per policy, sampled
    from 26 million, so impressions have gaps and hardly two rows share a moment; `timestamp`, `item_id` 0 to 79, `position` 1 to 3 (left, centre,
    right), `click` (38 and 42 clicks), `propensity_score` (probability of that item at that position: 1/80, and 0.000045 to 0.954), four hashed
    user features (3, 5, 9 and 9 values) and 80 counts of the user's past clicks per item, of which 96 % of the rows have none. There is no user
    id. `item_context.csv` has one number and three hashed categories per item; the hashes of the two policies' copies are salted differently
    but name the same groups, so the copy beside `random` stands for both.

    What is made of it: one round is one player with an id of its own, episodes of one step (discount 0), the click as the objective, no activity. The user
    features are attributes of the player, and so is `position`: it was given with the round, not chosen, and `bts` acts by it. The affinities are
    left out. `assignment` is not logged, so it is not written.

    `wheel` is `obp-0.4.1-py3-none-any.whl`, in which the files travel (its code is not used). Without it, pip fetches it into `cache` (default:
    `.fastq/downloads` in `directory`) and its checksum is compared; what is there already is not fetched again.
    Licence of the data: CC BY 4.0, ZOZO, Inc.
    """
    directory = Path(directory)
    source = Path(wheel) if wheel is not None else _fetched_wheel(Path(cache) if cache is not None else directory / ".fastq" / "downloads")
    try:
        with zipfile.ZipFile(source) as archive:
            rounds = {name: pl.read_csv(io.BytesIO(archive.read(f"obp/dataset/obd/{name}/all/all.csv"))) for name in _OPEN_BANDIT}
            items = pl.read_csv(io.BytesIO(archive.read("obp/dataset/obd/random/all/item_context.csv")))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{source}: expected the wheel {OBP_WHEEL}, which holds the Open Bandit Dataset ({error})") from None
    users, features = [f"user_feature_{j}" for j in range(4)], [f"item_feature_{j}" for j in range(4)]
    decisions = pl.concat(
        log.select(
            pl.format("{}-{}", pl.lit(name), pl.col("").cast(pl.String).str.zfill(5)).alias("decision_id"),
            pl.col("timestamp").str.to_datetime(time_unit="us", time_zone="UTC").alias("decided_at"),
            pl.lit(name).alias("policy"),
            pl.col("propensity_score").alias("propensity"),
            pl.col("item_id").cast(pl.String),
            pl.col("click").cast(pl.Float64),
            pl.col("position").cast(pl.String),
            *users,
        )
        for name, log in rounds.items()
    ).with_columns(player_id=pl.col("decision_id"))
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    columns = ["decision_id", "player_id", "decided_at", "policy", "propensity", "item_id", "click"]
    decisions.select(columns).sort("decided_at").write_parquet(logs / "decisions.parquet")
    decisions.select("player_id", "position", *users).write_parquet(logs / "players.parquet")
    items.select(pl.col("item_id").cast(pl.String), *features).write_parquet(logs / "items.parquet")
    tree = {
        "version": 1,
        "platform": "open-bandit",
        "logs": {"decisions": "logs/decisions.parquet", "players": "logs/players.parquet", "items": "logs/items.parquet"},
        "state": {"period": "1d", "window": 1, "measures": {}, "attributes": {name: {"kind": "categorical"} for name in ("position", *users)}},
        "policies": list(_OPEN_BANDIT),
        "assignment": "decision",
        "action": {"kind": "catalogue", "features": {name: {"kind": "numeric" if name == features[0] else "categorical"} for name in features}},
        "objectives": {"click": {"weight": 1.0, "discount": 0.0}},
        "training": {"preset": "default", "seed": 0},
    }
    _write_platform_file(directory, tree, f"# {OPEN_BANDIT_ATTRIBUTION}\n")
    return OPEN_BANDIT_ATTRIBUTION


def _fetched_wheel(cache: Path) -> Path:
    """The wheel in `cache`, fetched by pip if it is not there yet; refused if it is not the file that was looked at."""
    path = cache / OBP_WHEEL
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(cache)]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, "obp==0.4.1"], capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["pip wrote no file"])[-1]
            raise ConfigurationError(f"obp==0.4.1 could not be fetched with pip into {cache} ({reason}); get {OBP_WHEEL} by other means and give its path")
    if hashlib.sha256(path.read_bytes()).hexdigest() != OBP_SHA256:
        raise ConfigurationError(f"{path}: not the published {OBP_WHEEL} (its sha256 differs); delete it and try again")
    return path
