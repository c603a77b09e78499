"""How often the default estimator's interval holds the truth, and what the gate makes of challengers, in worlds whose truth is simulated.

Bars: coverage of 95 % between 93 and 97 % among trusted estimates, at least half of them trusted, over 2,000 logs per world; of worse challengers at
most 5 % pass a gate of 2.5 %, of better ones at least 80 % at 4,000 players. `make bench-ope`; LOGS=200 makes it shorter. Each log leaves one line of
JSON in the folder CELLS, and a run that was stopped goes on behind the last.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from fastq import evaluation, ope
from fastq.platform import OWN_POLICY

LOGS = int(os.environ.get("LOGS", "2000"))
CELLS = Path(os.environ.get("CELLS", Path(tempfile.gettempdir()) / "fastq-bench-ope"))
PLAYERS, DAYS, LEAVES, DISCOUNTS = 300, 15, 0.08, np.array([0.9, 0.7])
WEIGHTS = np.array([1.0, -0.5])
NOISE = 0.6  # standard deviation of every policy's action


@dataclass(frozen=True)
class Line:
    """A player is one number x; the action moves it, pays best near x / 2, and costs. Who acts depends on x, so the logs are confounded.

    curve: what the value model, linear in x and tanh x, doesn't see; hidden: spread of the error with which x is seen, so that the past tells more;
    discount: of both objectives.
    """

    name: str
    curve: float = 0.3
    hidden: float = 0.0
    one_step: bool = False

    @property
    def discount(self) -> np.ndarray:
        return np.zeros(2) if self.one_step else DISCOUNTS


WORLDS = [Line("one step", one_step=True), Line("sequence"), Line("sequence, curved", curve=0.6), Line("sequence, partly hidden", hidden=0.4)]
TARGETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"new": lambda x: 0.3 + 0.4 * x, "first": lambda x: 0.5 * x, "second": lambda x: -0.4 + 0.1 * x}


def lived(world: Line, x: np.ndarray, seen: np.ndarray, action: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One day: rewards [n, 2], the next x and what is seen of it."""
    reward = np.stack([1 + 0.4 * x - world.curve * (action - 0.5 * x) ** 2 + 0.4 * rng.standard_normal(len(x)), 0.3 * action**2], 1)
    after = 0.7 * x + 0.4 * action + 0.5 * rng.standard_normal(len(x))
    return reward, after, after + world.hidden * rng.standard_normal(len(x))


def logged(world: Line, players: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`players` players of up to DAYS days under a mixture of the policies `first` and `second`; rows sorted by player and day."""
    x = rng.standard_normal(players)
    seen, alive = x + world.hidden * rng.standard_normal(players), np.ones(players, bool)
    days = []
    for day in range(DAYS):
        chance = 0.15 + 0.7 / (1 + np.exp(-1.5 * seen))
        means = np.stack([TARGETS["first"](seen), TARGETS["second"](seen)], 1)
        which = (rng.random(players) > chance).astype(int)
        action = means[np.arange(players), which] + NOISE * rng.standard_normal(players)
        reward, x_after, seen_after = lived(world, x, seen, action, rng)
        leaves = rng.random(players) < LEAVES
        density = np.exp(-0.5 * ((action[:, None] - means) / NOISE) ** 2)
        mixture = density[:, 0] * chance + density[:, 1] * (1 - chance)
        who = np.flatnonzero(alive)
        days.append(
            {"player": who, "day": np.full(len(who), day), "x": x[who], "seen": seen[who], "action": action[who], "reward": reward[who],
             "mixture": mixture[who], "left": leaves[who]}
        )  # fmt: skip
        alive &= ~leaves
        x, seen = x_after, seen_after
    log = {name: np.concatenate([each[name] for each in days]) for name in days[0]}
    order = np.lexsort((log["day"], log["player"]))
    log = {name: column[order] for name, column in log.items()}
    log["truncated"] = log["day"] == DAYS - 1  # whoever leaves on the last day is not seen to have left, as in a real log: else only leavers would count there
    log["left"] &= ~log["truncated"]
    last = log["left"] | log["truncated"]
    log["following"] = np.where(last, -1, np.arange(len(last)) + 1)
    log["discount"] = np.where(log["left"][:, None], 0.0, world.discount)
    return log


def past(log: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What was seen and done before, fading by half each day, 0 before the first: a window of history, as a representation is given one."""
    seen, action = np.zeros((2, len(log["seen"])))
    for row in np.flatnonzero(log["following"] >= 0):  # a player's rows are in order
        seen[row + 1], action[row + 1] = 0.5 * (seen[row] + log["seen"][row]), 0.5 * (action[row] + log["action"][row])
    return seen, action


def summed(world: Line, log: dict[str, np.ndarray], seed: int) -> ope.LoggedSums:
    """What all targets share."""
    seen, action = log["seen"], log["action"]
    state = np.column_stack([np.ones(len(seen)), seen, np.tanh(seen), *past(log)])
    found = ope.logged_sums(
        state, np.column_stack([action, action * seen, action**2]), log["reward"], log["discount"], log["following"],
        log["truncated"] & ~np.full(len(seen), world.one_step), log["player"], rng=np.random.default_rng(seed),
    )  # fmt: skip
    assert isinstance(found, ope.LoggedSums)
    return found


def terms(sums: ope.LoggedSums, log: dict[str, np.ndarray], target: str) -> ope.Terms:
    seen, action = log["seen"], log["action"]
    mean = TARGETS[target](seen)
    weights = np.exp(-0.5 * ((action - mean) / NOISE) ** 2) / log["mixture"]
    return ope.reinforced(sums, np.column_stack([mean, mean * seen, mean**2 + NOISE**2]), weights).terms


def truth(world: Line, target: str) -> float:
    """The weighted sum that follows from the logs' decision states when the target alone acts: simulated, to a twentieth of an estimate's error."""
    players = 1_000_000 if world.one_step else 200_000
    rng = np.random.default_rng(7_000_000)
    log = logged(world, players // 4, rng)
    pick = rng.integers(0, len(log["x"]), players)
    x, seen, carry, total = log["x"][pick], log["seen"][pick], np.ones((players, 2)), np.zeros((players, 2))
    for _ in range(1 if world.one_step else 60):
        action = TARGETS[target](seen) + NOISE * rng.standard_normal(players)
        reward, x, seen = lived(world, x, seen, action, rng)
        total += carry * reward
        carry = carry * world.discount * (rng.random(players) >= LEAVES)[:, None]
    return float((total @ WEIGHTS).mean())


def cells(name: str, make: Callable[[int], dict[str, object]], logs: int = LOGS) -> list[dict[str, object]]:
    """`logs` lines of JSON, those that are there already read and the others made."""
    CELLS.mkdir(parents=True, exist_ok=True)
    path = CELLS / f"{name}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as out:
        for log in range(len(done), logs):
            done.append(make(log))
            out.write(json.dumps(done[-1]) + "\n")
            out.flush()
    return done[:logs]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_coverage(world: Line):
    true = cells(f"truth {world.name}", lambda _: {target: truth(world, target) for target in TARGETS}, 1)[0]

    def measured(log: int) -> dict[str, object]:
        seen = logged(world, PLAYERS, np.random.default_rng([11, log]))
        sums = summed(world, seen, log)
        found = {target: terms(sums, seen, target) for target in TARGETS}
        answers = {**found, "new - first": ope.paired_difference(found["new"], found["first"])}
        return {
            name: [answer.value, answer.low, answer.high, answer.trusted]
            for name, each in answers.items()
            if isinstance(answer := ope.estimate(each, objective_weights=WEIGHTS, rng=np.random.default_rng(log))[-1], ope.Estimate)
        }

    rows = cells(f"coverage {world.name}", measured)
    print()
    for name in [*TARGETS, "new - first"]:
        wanted = true[name] if name in true else true["new"] - true["first"]
        found = np.array([row[name] for row in rows], dtype=float)
        trusted = found[:, 3] == 1
        holds = (found[:, 1] <= wanted) & (wanted <= found[:, 2])
        error = found[:, 0] - wanted
        low, high = wilson(int(holds[trusted].sum()), int(trusted.sum()))
        print(
            f"{world.name:24} {name:12} truth {wanted:6.3f} bias {error.mean():+.3f} sd {error.std():.3f} half {(found[:, 2] - found[:, 1]).mean() / 2:.3f} "
            f"coverage {holds.mean():.3f}, of the trusted {holds[trusted].mean():.3f} ({low:.3f} to {high:.3f}; {trusted.mean():.0%} of {len(rows)} logs)"
        )
        assert trusted.mean() >= 0.5
        assert low <= 0.97  # what chance may have done on so many logs is the interval's
        assert high >= 0.93


def wilson(count: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, spread = (count + z**2 / 2) / (of + z**2), z / (of + z**2) * np.sqrt(count * (of - count) / max(of, 1) + z**2 / 4)
    return float(share - spread), float(share + spread)


def gated(world: Line, share: float, log: int, players: int) -> list[str]:
    """Why the gate refuses a challenger that goes `share` of the way from `first` to `new`, on `players` held-out players; empty where it promotes."""
    seen = logged(world, players, np.random.default_rng([23, log]))
    sums = summed(world, seen, log)
    TARGETS["challenger"] = lambda x: (1 - share) * TARGETS["first"](x) + share * TARGETS["new"](x)
    panel = {name: evaluation.Panel([terms(sums, seen, target)], None) for name, target in ((OWN_POLICY, "challenger"), ("first", "first"))}
    del TARGETS["challenger"]
    return evaluation.gate_on_difference(panel, {}, "first", None, WEIGHTS, 0.025, log)[0]


@pytest.mark.parametrize(("share", "most", "least"), [(-0.05, 0.05, 0.0), (0.05, 1.0, 0.8), (0.2, 1.0, 0.8)])
def test_the_gate_at_4_000_players(share: float, most: float, least: float):
    """A third of 4,000 players is held out. 5 % of the way is 0.05 in a sum of 4.7."""
    logs = max(LOGS // 4, 1)
    rows = cells(f"gate {share}", lambda log: {"reasons": gated(WORLDS[1], share, log, 1_200)}, logs)
    passed = sum(row["reasons"] == [] for row in rows)
    low, high = wilson(passed, len(rows))
    doubted = sum(any("evidence does not suffice" in reason for reason in row["reasons"]) for row in rows)
    print(f"\na challenger {share:+.0%} of the way: {passed} of {len(rows)} promoted ({low:.1%} to {high:.1%}), {doubted} refused for want of evidence")
    assert low <= most
    assert high >= least


def test_a_year_of_nights_promotes_a_worse_one_at_most_once_in_20():
    """A challenger exactly as good as the champion is asked about every night, on the last 40 days: as hard as it gets. Standard errors as the unit."""
    years, nights, window = 2_000, 365, 40
    rng = np.random.default_rng(0)
    fresh = rng.standard_normal((years, nights + window))
    total = np.cumsum(np.pad(fresh, ((0, 0), (1, 0))), axis=1)
    z = (total[:, window:] - total[:, :-window]) / np.sqrt(window)
    begun, day = datetime(2026, 1, 1, tzinfo=UTC), 86_400_000_000
    asked = [evaluation.Attempt(int(begun.timestamp() * 1e6) + night * day, 0, promoted=False) for night in range(nights + 1)]
    alphas = [evaluation.alpha_of_attempt(0.025, asked[:night], begun + timedelta(days=night))[0] for night in range(nights + 1)]
    promoted = (z > np.array([NormalDist().inv_cdf(1 - alpha) for alpha in alphas])).any(1).mean()
    granted = (z > NormalDist().inv_cdf(0.975)).any(1).mean()
    print(f"\npromoted within a year: {promoted:.1%} of {years} champions as good as the challenger; {granted:.1%} were 2.5 % granted anew each night")
    assert promoted <= 0.05
