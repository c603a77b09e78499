"""Which parts of the learner earn their place: `make bench-learning`. Development seeds only (100 to 199); others are for `fastq benchmark` to report.

Each variant learns from the same log of the arena with one part switched off. Asked of each: how near the predicted difference between what another
policy would do and what is recommended comes to the truth (both lived through on the same luck, followed by the variant's own policy); what the policy is
worth in truth; how much of the acting policy a fresh probe reads from the balanced state of players that were never trained on, and the largest
discrepancy (MMD) between two policies' states. Finished variants are kept in the folder CELLS, where a stopped run goes on. FASTQ_BENCH_PLAYERS, _DAYS,
_PEOPLE and _LIVES make it smaller.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fastq import equations, features, learner, records, windows, worlds
from fastq.features import PlayerStates
from fastq.platform import load_platform

PLAYERS, DAYS = int(os.environ.get("FASTQ_BENCH_PLAYERS", "800")), int(os.environ.get("FASTQ_BENCH_DAYS", "40"))
PEOPLE, LIVES, LIFE = int(os.environ.get("FASTQ_BENCH_PEOPLE", "150")), int(os.environ.get("FASTQ_BENCH_LIVES", "12")), 21
SEEDS = tuple(int(seed) for seed in os.environ.get("FASTQ_BENCH_SEEDS", "100,101").split(","))
BURN_IN = 20


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Nothing is switched off."""
    yield


def without_exploration() -> Any:
    return mock.patch.object(equations, "exploration_share", return_value=0.0)


def without_orthogonality() -> Any:
    """Actions are centred by their mean over all rows, outcomes by theirs: what a policy does in a state passes for an effect of the action."""

    def mean(x: np.ndarray, y: np.ndarray, group: np.ndarray, fold: np.ndarray, fit_on: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.nanmean(y[fit_on], 0), y.shape).copy()

    return mock.patch.object(learner, "out_of_fold", mean)


def without_shrinkage() -> Any:
    """One weak ridge for all objectives, whether unseen players confirm anything or not."""

    def plain(design: np.ndarray, residual: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return equations.ridge(design, residual, learner.RIDGES[0]).T, np.ones(residual.shape[1]), np.zeros(residual.shape[1])

    return mock.patch.object(learner, "confirmed_effects", plain)


def each_policy_alone() -> Any:
    """Whatever the log tells of who acts: a policy's decisions are compared among themselves, by its own noise."""

    def estimated(windows: Any, seen: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return torch.softmax(seen.assignment[torch.from_numpy(rows)].double(), -1).numpy(), np.zeros(len(rows), bool)

    return mock.patch.object(learner, "chance_to_act", estimated)


def without_modifiers() -> Any:
    """Effects that are the same in every state."""
    return mock.patch.object(learner, "INTERACTIONS", (0.0,))


def without_what_follows() -> Any:
    """An action is credited with what it brings at once, never with the state it leads to."""

    def nothing(windows: Any, _history: Any, rows: np.ndarray, _fold: Any) -> np.ndarray:
        return np.zeros((len(rows), windows.reward.shape[1]))

    return mock.patch.object(learner, "still_to_come", nothing)


def credited_with_the_players() -> Any:
    """An action that leads where good players often are is credited with the players."""
    found = learner.still_to_come

    def between(windows: Any, history: np.ndarray, rows: np.ndarray, fold: np.ndarray) -> np.ndarray:
        return found(replace(windows, player=np.zeros_like(windows.player)), history, rows, fold)

    return mock.patch.object(learner, "still_to_come", between)


VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "as it is": (whole, {}),
    "no balancing": (whole, {"balance": 0.0}),
    "balancing ten times as strong": (whole, {"balance": 1.0}),
    "… thirty times": (whole, {"balance": 3.0}),
    "no counterfactual exploration": (without_exploration, {}),
    "no orthogonality": (without_orthogonality, {}),
    "policies not compared with each other": (each_policy_alone, {}),
    "no shrinkage by unseen players": (without_shrinkage, {}),
    "no state-dependent effects": (without_modifiers, {}),
    "no caution": (whole, {"caution": 0.0}),
    "immediate outcomes only": (without_what_follows, {}),
    "players not told from states": (credited_with_the_players, {}),
    "the published form": (whole, {"preset": "paper", "epochs": 10, "learning_rate": 3e-4}),
}


def learned(seed: int, name: str, directory: Path) -> Any:
    """A variant's policy, on the log of a seed."""
    switched, changes = VARIANTS[name]
    path = worlds.write_logs(worlds.world(), directory, PLAYERS, DAYS, seed)
    platform = load_platform(path)
    training = platform.training.model_copy(update={"seed": seed} | changes)
    platform = platform.model_copy(update={"training": training})
    tables = records.read_records(platform)
    data = windows.build(platform, tables, features.build_rows(platform, tables))
    with switched():
        return learner.train(platform, data), data


def true_differences(policy: Any, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, K, M] predicted and true differences of values to what is recommended, for what each behaviour policy would do, and the truth's error by luck."""
    world = worlds.world()
    start, names = worlds.Simulation(world, PEOPLE, 7_000 + seed), np.array(world.policies)
    for _ in range(BURN_IN):
        behaviour = start.behaviour()
        start.step(behaviour.action, names[behaviour.policy].tolist())
    here = np.flatnonzero(start.served() & ~start.gone)
    at = policy.situations(policy.encode(PlayerStates(**start.states())))
    best, experts = policy.best(at), policy.expert_actions(at)
    actions = np.concatenate([best[None], experts.transpose(1, 0, 2)])
    totals = policy.parts(at, actions.transpose(1, 0, 2)).sum(-1)  # [n, 1 + K, M]
    c = len(actions)
    lives = start.copy(c * LIVES)
    lives.people = np.tile(np.arange(PEOPLE), c * LIVES) + np.repeat(np.arange(LIVES), c * PEOPLE) * PEOPLE
    lives.seed = 1_000_003 + seed  # other luck from here on, the same for all branches of a life
    found, discounts = np.zeros((LIVES, c, PEOPLE, len(world.weights))), np.array(world.discounts)
    action = np.tile(actions.reshape(c * PEOPLE, -1), (LIVES, 1))
    for day in range(LIFE):
        if day:
            action = policy.best(policy.encode(PlayerStates(**lives.states())))
        found += (lives.step(action) * discounts**day).reshape(found.shape)
    differences = found[:, 1:] - found[:, :1]
    luck = differences.std(0, ddof=1) / LIVES**0.5
    return (totals[:, 1:] - totals[:, :1])[here], differences.mean(0).transpose(1, 0, 2)[here], luck.transpose(1, 0, 2)[here]


def discrepancy(policy: Any, data: windows.Windows, seed: int) -> dict[str, float]:
    """Balance on players that were never trained on: a fresh probe's balanced accuracy, and the largest MMD between two policies' states."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.neural_network import MLPClassifier

    training = policy.platform.training
    held = np.flatnonzero(windows.held_out_players(data.player_ids, training.holdout, training.seed)[data.player])
    rows = np.random.default_rng(seed).permutation(held)[:4_000]
    b, acted = policy.embedding(policy.encode(data.states(rows))), data.policy[rows]
    b = (b - b.mean(0)) / np.maximum(b.std(0), 1e-6)
    even = np.concatenate(
        [np.flatnonzero(acted == k)[: np.bincount(acted).min()] for k in range(len(data.policies))]
    )  # as many of each, so that chance is 1 / K
    probe = MLPClassifier((32,), max_iter=60, early_stopping=True, random_state=0)
    said = cross_val_predict(probe, b[even], acted[even], groups=data.player[rows][even], cv=GroupKFold(4))
    sample = [torch.from_numpy(b[acted == k][:500]) for k in range(len(data.policies))]
    width = float(torch.pdist(torch.cat(sample)).median())
    mmd = max(float(equations.discrepancy(x, y, width)) for i, x in enumerate(sample) for y in sample[:i])
    return {"probe": float(balanced_accuracy_score(acted[even], said)), "mmd": mmd}


def measured(name: str, seed: int, directory: Path) -> dict[str, Any]:
    """One variant on one seed."""
    policy, data = learned(seed, name, directory)
    world, weights = worlds.world(), np.array(worlds.world().weights)
    predicted, truth, luck = true_differences(policy, seed)
    p, t = (predicted @ weights).ravel(), (truth @ weights).ravel()
    noise = float(np.mean(luck**2 @ weights**2))
    act = worlds.true_values(world, lambda s: policy.recommend(PlayerStates(**s), explore=False).action, 800, 30, 50_000 + seed)
    return {
        "value": act.total,
        "mixture": worlds.true_values(world, worlds.MIXTURE, 800, 30, 50_000 + seed).total,
        "error": max(float(np.mean((p - t) ** 2)) - noise, 0.0) ** 0.5,  # the truth's own luck taken out
        "spread": max(float(np.var(t)) - noise, 0.0) ** 0.5,  # what the error would be of the best constant
        "slope": float(np.cov(p, t)[0, 1] / max(np.var(p), 1e-12)),
        "own": policy.details["balance"],
    } | discrepancy(policy, data, seed)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_each_part_switched_off_in_turn(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cells = Path(os.environ.get("CELLS", str(tmp_path)))
    cells.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in SEEDS:
        kept = cells / f"{list(VARIANTS).index(name)}-{seed}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measured(name, seed, tmp_path / str(seed))))
        rows.append(json.loads(kept.read_text()))
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("value", "mixture", "error", "spread", "slope", "probe", "mmd")}
    print(
        f"\n{name}: value {mean['value']:.3f} (mixture {mean['mixture']:.3f}); error of differences {mean['error']:.2f} where the truth's spread is "
        f"{mean['spread']:.2f}, slope {mean['slope']:.2f}; probe {mean['probe']:.3f}, MMD {mean['mmd']:.3f}"
    )
    assert all(np.isfinite(value) for value in mean.values())
