"""Our estimators against the Open Bandit Pipeline's (one step) and SCOPE-RL's (sequences) on the same arrays, by constants that these once computed.

`make bench-obp ARGS="-k constants"` installs obp 0.4.1 (Saito, Aihara, Matsutani and Narita 2021, arXiv:2008.07146) into a folder of its own and computes them
anew. Where all weights and outcomes are known the seven definitions are the same. Not compared, because they are not:
- how SWITCH's threshold and DRos's shrinkage are found: 0.4.1 takes them as given, ours are chosen by `slope`; here both get the same ones;
- DRos with a shrinkage of 0: 0/0 there where a weight is 0, the direct method here;
- rows without a weight or an outcome: NaN there, left out here, so the denominators differ;
- intervals: rows are resampled there, players here, and what is refitted differs;
- the replay method, of which we have none: it is `self_normalised` with a target that is deterministic and a logger that is uniform.

`make bench-obp ARGS="-k scope"` does the same with scope-rl 0.2.1 (Kiyohara and others 2023, arXiv:2311.18206). It values the state a trajectory begins in; to
ours every row is one, so ours is the mean of its values over the trajectories that begin at the first, second, ... step. Not compared:
- self-normalised ones over several steps: it divides a step's weights by the mean over trajectories that are as far from the first step, ours by the mean over
  all rows that are as far from their own start. Over one step they are the same, but for the 1e-10 that it adds to a denominator;
- trajectory-wise importance sampling and distributions of the return, of which we have none;
- marginal ones: its ratios are of each step, ours of the discounted visits, so they weigh other rows;
- kernels on continuous actions: its bandwidth is given, ours chosen.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastq import ope

TAU, SHRINKAGE = 2.0, 5.0
OBP = {
    "ipw": 1.369555528661744,
    "snipw": 1.42117614448961,
    "dm": 0.6933216912126756,
    "dr": 1.3762801647926313,
    "sndr": 1.4020219008911345,
    "switch-dr": 1.0075209657190654,
    "dr-os": 1.0430808501128288,
}
GAMMA = 0.9
SCOPE = {
    "dm": 0.9960007175331365,
    "pdis": 1.66585775047852,
    "dr": 1.908502991158502,
    "snpdis, one step": 0.7272968274322084,
    "sndr, one step": 0.746464022467655,
}


def logged_rounds() -> dict[str, np.ndarray]:
    """2,000 rounds over 8 actions: action, reward, pscore [N]; pi, q [N, 8]. Uniform draws and arithmetic alone, so that it is the same everywhere.

    The target never takes the last action in every fourth round, so some weights are 0; q is a poor model.
    """
    draw, n, actions = np.random.default_rng(2021), 2_000, 8
    rounds = np.arange(n)
    logger, pi = draw.random((n, actions)) + 0.05, draw.random((n, actions)) ** 3
    pi[::4, -1] = 0.0
    logger, pi = logger / logger.sum(1, keepdims=True), pi / pi.sum(1, keepdims=True)
    action = (draw.random((n, 1)) > logger.cumsum(1)[:, :-1]).sum(1)
    truth, q = draw.random((n, actions)), draw.random((n, actions))
    reward = truth[rounds, action] + 0.5 * (action % 3) + draw.random(n)
    return {"action": action, "reward": reward, "pscore": logger[rounds, action], "pi": pi, "q": q + 0.4 * truth}


def ours(action, reward, pscore, pi, q) -> dict[str, float]:
    rounds = np.arange(len(action))
    weights = ope.naive_weights(pi[rounds, action], pscore)
    one_step = {"rewards": reward, "weights": weights, "player": rounds}
    model = one_step | {"q": q[rounds, action], "v": (pi * q).sum(1)}
    terms = {
        "ipw": ope.inverse_propensity(**one_step),
        "snipw": ope.self_normalised(**one_step),
        "dm": ope.direct_method(model["v"], rounds),
        "dr": ope.doubly_robust(**model),
        "sndr": ope.self_normalised_doubly_robust(**model),
        "switch-dr": ope.switch_doubly_robust(**model, thresholds=[TAU]),
        "dr-os": ope.shrunk_doubly_robust(**model, shrinkages=[SHRINKAGE]),
    }
    return {name: float(each.values()[0]) for name, each in terms.items()}


def test_where_the_definition_is_the_same_the_value_is():
    found = ours(**logged_rounds())
    assert found == pytest.approx(OBP, rel=1e-6, abs=0)
    assert len({round(value, 4) for value in OBP.values()}) == len(OBP)  # so that none can stand for another


def logged_trajectories() -> dict[str, np.ndarray]:
    """200 trajectories of 5 steps over 4 actions, flat: action, reward, pscore [N]; pi, q [N, 4]."""
    draw, n, actions = np.random.default_rng(2024), 1_000, 4
    rounds = np.arange(n)
    logger, pi = draw.random((n, actions)) + 0.2, draw.random((n, actions)) ** 2 + 0.02
    logger, pi = logger / logger.sum(1, keepdims=True), pi / pi.sum(1, keepdims=True)
    action = (draw.random((n, 1)) > logger.cumsum(1)[:, :-1]).sum(1)
    return {"action": action, "reward": draw.random(n) + 0.3 * (action % 3), "pscore": logger[rounds, action], "pi": pi, "q": 2 * draw.random((n, actions))}


STEPS = 5


def ours_over_time(action, reward, pscore, pi, q) -> dict[str, float]:
    rows = np.arange(len(action))
    weights, nothing, model = ope.naive_weights(pi[rows, action], pscore), np.zeros(len(rows)), (q[rows, action], (pi * q).sum(1))
    last = rows % STEPS == STEPS - 1
    on = {"discount": np.where(last, 0, GAMMA), "following": np.where(last, -1, rows + 1), "truncated": np.zeros(len(rows), bool), "player": rows // STEPS}
    alone = {"discount": nothing, "following": np.full(len(rows), -1), "truncated": np.zeros(len(rows), bool), "player": rows}
    terms = {
        "dm": ope.direct_method(model[1], rows // STEPS),
        "pdis": ope.per_decision(reward, weights, nothing, **on),
        "dr": ope.sequential_doubly_robust(reward, weights, *model, **on),
        "snpdis, one step": ope.per_decision(reward, weights, nothing, **alone, normalised=True),
        "sndr, one step": ope.sequential_doubly_robust(reward, weights, *model, **alone, normalised=True),
    }
    return {name: float(each.values()[0]) for name, each in terms.items()}


def test_over_time_too():
    found = ours_over_time(**logged_trajectories())
    assert found == pytest.approx(SCOPE, rel=1e-6, abs=0)
    assert len({round(value, 3) for value in SCOPE.values()}) == len(SCOPE)
