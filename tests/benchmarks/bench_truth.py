"""Do explanations tell the truth? Asked of the simulator, which knows: `make bench ARGS="-k truth"`.

One action against another in the same state: both are lived through on the same luck, many times over, and followed by the policy itself, as its values
say. Then: how often does the stated 90 % interval hold the true difference, do stated reasons hold, do warnings of thin evidence come where errors are
large; and, of the model alone, does deleting what an attribution calls important move the value more than deleting at random. FASTQ_BENCH_WORKSPACE names
a demo's workspace to use instead of training one.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fastq import explanation, registry, worlds
from fastq.features import PlayerStates
from fastq.platform import load_platform

PEOPLE, LIVES, DAYS = int(os.environ.get("FASTQ_BENCH_PEOPLE", "160")), int(os.environ.get("FASTQ_BENCH_LIVES", "32")), 30
BURN_IN, SEED = 25, 4_711


@pytest.fixture(scope="module")
def policy(fastq, tmp_path_factory):
    if given := os.environ.get("FASTQ_BENCH_WORKSPACE"):
        root = Path(given)
    else:
        root = tmp_path_factory.mktemp("truth")
        worlds.write_logs(worlds.world("arena"), root, seed=100)
        fastq("retrain", "--json", cwd=root, code=(0, 1))
    platform = load_platform(root)
    return registry.load_policy(f"models:/{platform.platform}@{registry.resolve(platform, 'champion')}", root)


def lived(world: worlds.Arena) -> worlds.Simulation:
    """Players as the logging platform left them."""
    simulation, names = worlds.Simulation(world, PEOPLE, SEED), np.array(world.policies)
    for _ in range(BURN_IN):
        behaviour = simulation.behaviour()
        simulation.step(behaviour.proposals[np.arange(PEOPLE), behaviour.policy], names[behaviour.policy].tolist())
    return simulation


def stacked(simulations: list[worlds.Simulation]) -> PlayerStates:
    import polars as pl

    parts = [s.states() for s in simulations]
    arrays = {name: np.concatenate([p[name] for p in parts]) for name in ("history", "actions", "objectives")}
    return PlayerStates(**arrays, attributes=pl.concat([p["attributes"] for p in parts]), policies=[n for p in parts for n in p["policies"]])


def true_differences(policy, start: worlds.Simulation, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[LIVES, PEOPLE, M, 2] weighted parts of `one` less `other` in truth: immediate, and discounted from then on under the policy itself."""
    discounts, weights = np.array(start.world.discounts), np.array(start.world.weights)
    branches = [start.copy(2) for _ in range(LIVES)]
    for life, simulation in enumerate(branches):
        simulation.seed = 1_000_003 * (life + 1)  # other luck from here on; the same for both branches
    parts = np.zeros((LIVES, 2 * PEOPLE, len(weights), 2))
    for day in range(DAYS):
        action = np.concatenate([one, other]) if day == 0 else policy.recommend(stacked(branches), explore=False).action
        for life, simulation in enumerate(branches):
            acted = action if day == 0 else action[life * 2 * PEOPLE : (life + 1) * 2 * PEOPLE]
            parts[life, :, :, min(day, 1)] += simulation.step(acted) * discounts**day
    parts *= weights[:, None]
    return parts[:, :PEOPLE] - parts[:, PEOPLE:]


def test_truth_of_contrasts(policy) -> None:
    world = worlds.world("arena")
    start = lived(world)
    states, rng = PlayerStates(**start.states()), np.random.default_rng(0)
    at = policy.situations(policy.encode(states))
    recommended, experts = policy.best(at), policy.expert_actions(at)
    kind = np.arange(PEOPLE) % 4
    typed = rng.uniform(*policy.platform.bounds.T, (PEOPLE, len(policy.platform.bounds)))
    other = np.where((kind < experts.shape[1])[:, None], experts[np.arange(PEOPLE), np.minimum(kind, experts.shape[1] - 1)], typed)
    why = explanation.explain(policy, states, actions=recommended, against=other, attributions=False)
    truth = true_differences(policy, start, recommended, other)
    here = ~start.gone & start.served()
    difference, luck = truth.sum((2, 3)).mean(0), truth.sum((2, 3)).std(0, ddof=1) / LIVES**0.5
    error, half = np.abs(why.contrast.difference - difference), why.contrast.high - why.contrast.difference
    print(f"\n{here.sum()} states, {LIVES} lives of {DAYS} days; median error of the truth itself {np.median(luck[here]):.3f}")
    print(f"median half width of the stated intervals {np.median(half[here]):.3f}")
    for name, chosen in (("policies", here & (kind < 3)), ("typed at random", here & (kind == 3))):
        covered = (error <= np.sqrt(half**2 + (explanation.CERTAINTY * luck) ** 2))[chosen].mean()
        bias = (why.contrast.difference - difference)[chosen]
        spread = np.corrcoef(why.contrast.difference[chosen], difference[chosen])[0, 1]
        print(f"against {name}: 90 % intervals hold the truth in {covered:.1%} of {chosen.sum()}; mean error {bias.mean():+.3f}, correlation {spread:.2f}")
    mean, doubt = truth.mean(0), truth.std(0, ddof=1) / LIVES**0.5
    held, together = [], []
    names = list(policy.platform.objectives)
    for i in np.flatnonzero(here):
        cells = [(names.index(o), explanation.HORIZONS.index(h)) for o, h in why.contrast.decisive[i]]
        held += [mean[i, j, k] > 0 for j, k in cells if abs(mean[i, j, k]) > 2 * doubt[i, j, k]]
        if cells:
            together.append(sum(mean[i, j, k] for j, k in cells) > 0)
    print(f"stated reasons: {np.mean(held):.1%} of the {len(held)} that luck does not hide hold")
    print(f"the decisive ones of a contrast together hold in {np.mean(together):.1%} of {len(together)}")
    thin = np.array([verdict != "well supported" for verdict in why.evidence.verdict])
    beyond = np.sqrt(np.maximum(error**2 - luck**2, 0))
    large = beyond >= np.quantile(beyond[here], 0.75)
    why_thin = np.array([verdict.count(";") + 1 if verdict != "well supported" else 0 for verdict in why.evidence.verdict])
    for name, score in (("the warning", thin), ("how many warnings", why_thin), ("the interval's width", half)):
        print(f"errors in the largest quarter are told by {name}: area under the curve {roc_auc_score(large[here], score[here].astype(float)):.2f}")


def test_truth_of_attributions(policy) -> None:
    start, rng = lived(worlds.world("arena")), np.random.default_rng(0)
    states = PlayerStates(**start.states())
    enc = policy.encode(states)
    action = policy.best(enc)
    moved = explanation.attribute(policy, enc, action).measures
    platform = policy.platform
    columns = {name: ("history", j) for j, name in enumerate(platform.state.measures)}
    columns |= {f"previous {name}": ("actions", j) for j, name in enumerate(platform.dimension_names)}
    columns |= {f"previous {name}": ("objectives", j) for j, name in enumerate(platform.objectives)}
    names = list(moved)
    by_size = np.argsort(-np.abs(np.stack([moved[name] for name in names], 1)), 1)
    base = policy.parts(enc, action[:, None])[:, 0].sum(2) @ platform.weights

    def without(order: np.ndarray, places: slice) -> float:
        """How far the value moves, on average, without some measures of each player."""
        arrays = {name: np.array(getattr(states, name), float) for name in ("history", "actions", "objectives")}
        for i, row in enumerate(order):
            for place in row[places]:
                where, j = columns[names[place]]
                arrays[where][i, :, j] = np.nan
        enc = policy.encode(dataclasses.replace(states, **arrays))
        return float(np.abs(policy.parts(enc, action[:, None])[:, 0].sum(2) @ platform.weights - base).mean())

    random = np.argsort(rng.random((8, *by_size.shape)), 2)
    for k in (1, 2, 3, 5):
        chance = np.mean([without(order, slice(0, k)) for order in random])
        most, least = without(by_size, slice(0, k)), without(by_size[:, ::-1], slice(0, k))
        print(f"\n{k} measures deleted move the value by {most:.3f} by attribution, {chance:.3f} at random, {least:.3f} the least")
    print("each alone, by rank: " + ", ".join(f"{without(by_size, slice(k, k + 1)):.3f}" for k in range(6)))
