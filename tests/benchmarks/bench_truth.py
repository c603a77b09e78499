"""Do explanations tell the truth? Asked of the simulator, which knows: `make bench ARGS="-k truth"`.

One action against another in the same state: both are lived through on the same luck, many times over, and followed by the policy itself, as its values
say. Then: how often does the stated 90 % interval hold the true difference, do stated reasons hold, do warnings of thin evidence come where errors are
large; and, of the model alone, does deleting what an attribution calls important move the value more than deleting at random. FASTQ_BENCH_WORKSPACE names
a demo's workspace to use instead of training one, FASTQ_BENCH_BUNDLE a bundle.
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
from fastq.policy import Policy

PEOPLE, LIVES, DAYS = int(os.environ.get("FASTQ_BENCH_PEOPLE", "200")), int(os.environ.get("FASTQ_BENCH_LIVES", "24")), 30
BURN_IN, SEED = 25, int(os.environ.get("FASTQ_BENCH_SEED", "4711"))  # seeds from 100 to 199 are for choosing, all others for reporting


@pytest.fixture(scope="module")
def policy(fastq, tmp_path_factory):
    if given := os.environ.get("FASTQ_BENCH_BUNDLE"):
        return Policy.load(Path(given))
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


def true_parts(policy, start: worlds.Simulation, actions: np.ndarray) -> np.ndarray:
    """[LIVES, C, PEOPLE, M, 2] weighted parts of actions [C, PEOPLE, D] in truth: immediate, and discounted from then on under the policy itself.

    All lives of all players are one simulation, each life with luck of its own, which the C branches of a player share.
    """
    discounts, weights = np.array(start.world.discounts), np.array(start.world.weights)
    c, default = len(actions), [d.low for d in start.world.dimensions]
    lives = start.copy(c * LIVES)
    lives.people = np.tile(np.arange(PEOPLE), c * LIVES) + np.repeat(np.arange(LIVES), c * PEOPLE) * PEOPLE
    lives.seed = 1_000_003 + start.seed  # other luck from here on
    parts = np.zeros((LIVES, c, PEOPLE, len(weights), 2))
    action = np.tile(actions.reshape(c * PEOPLE, -1), (LIVES, 1))
    for day in range(DAYS):
        if day > 0:
            here, known = np.flatnonzero(~lives.gone & lives.served()), lives.states()
            arrays = {name: known[name][here] for name in ("history", "actions", "objectives")}
            states = PlayerStates(**arrays, attributes=lives.attributes[here], policies=[lives.last_policy[i] for i in here])
            action = np.tile(default, (len(lives), 1))  # of those who are not served, which moves nothing
            action[here] = policy.best(policy.encode(states))
        parts[..., min(day, 1)] += (lives.step(action) * discounts**day).reshape(LIVES, c, PEOPLE, -1)
    return parts * weights[:, None]


def test_truth_of_contrasts(policy) -> None:
    start, rng = lived(worlds.world("arena")), np.random.default_rng(SEED)
    states = PlayerStates(**start.states())
    at = policy.situations(policy.encode(states))
    recommended, experts = policy.best(at), policy.expert_actions(at)
    others = {
        "what a policy would do": experts[np.arange(PEOPLE), np.arange(PEOPLE) % experts.shape[1]],
        "typed at random": rng.uniform(*policy.platform.bounds.T, (PEOPLE, len(policy.platform.bounds))),
    }
    truth = true_parts(policy, start, np.stack([recommended, *others.values()]))
    here, names = ~start.gone & start.served(), list(policy.platform.objectives)
    errors, noise, widths, warned, counted, held, together = [], [], [], [], [], [], []
    own = {key: value for key, value in policy.details["own_response"].items() if key != "covariance"}
    print(f"\n{here.sum()} states, {LIVES} lives of {DAYS} days; own response {own}")
    for k, (name, other) in enumerate(others.items(), 1):
        why = explanation.explain(policy, states, actions=recommended, against=other, attributions=False)
        lives = truth[:, 0] - truth[:, k]
        difference, luck = lives.sum((2, 3)).mean(0), lives.sum((2, 3)).std(0, ddof=1) / LIVES**0.5
        error, half = why.contrast.difference - difference, why.contrast.high - why.contrast.difference
        covered = (np.abs(error) <= np.sqrt(half**2 + (explanation.CERTAINTY * luck) ** 2))[here].mean()
        plain = (np.abs(error) <= half)[here].mean()
        print(
            f"against {name}: 90 % intervals hold the truth in {covered:.1%} (the study's own luck not counted: {plain:.1%}); "
            f"half width {np.median(half[here]):.2f}, luck {np.median(luck[here]):.2f}, "
            f"mean error {error[here].mean():+.3f}, mean size of the error {np.abs(error[here]).mean():.2f}"
        )
        mean, doubt = lives.mean(0), lives.std(0, ddof=1) / LIVES**0.5
        for i in np.flatnonzero(here):
            cells = [(names.index(o), explanation.HORIZONS.index(h)) for o, h in why.contrast.decisive[i]]
            held += [(k, mean[i, j, t] > 0) for j, t in cells if abs(mean[i, j, t]) > 2 * doubt[i, j, t]]
            together += [(k, sum(mean[i, j, t] for j, t in cells) > 0)] if cells else []
        errors += np.abs(error[here]).tolist()
        noise += luck[here].tolist()
        widths += why.evidence.width[here].tolist()
        said = [verdict for verdict, chosen in zip(why.evidence.verdict, here, strict=True) if chosen]
        warned += [verdict != "well supported" for verdict in said]
        counted += [verdict.count(";") + 1 if verdict != "well supported" else 0 for verdict in said]
    for what, found in (("stated reasons that luck does not hide", held), ("decisive reasons of a contrast taken together", together)):
        by_kind = ", ".join(f"against {name} {np.mean([ok for at, ok in found if at == k]):.1%}" for k, name in enumerate(others, 1))
        print(f"{what} hold in {np.mean([ok for _, ok in found]):.1%} of {len(found)}: {by_kind}")
    beyond = np.sqrt(np.maximum(np.square(errors) - np.square(noise), 0))
    large = beyond >= np.quantile(beyond, 0.75)
    for name, score in (("the warning", warned), ("how many warnings", counted), ("the interval's stated width", widths)):
        print(f"errors in the largest quarter are told by {name}: area under the curve {roc_auc_score(large, np.array(score, float)):.2f}")
    thin = np.array(warned)
    print(f"{thin.mean():.0%} are called thin; mean error of those {beyond[thin].mean():.2f}, of the others {beyond[~thin].mean():.2f}")


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
