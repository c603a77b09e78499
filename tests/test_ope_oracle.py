"""Our one-step estimators against the Open Bandit Pipeline's on the same arrays, by constants that it once computed.

`make bench-obp ARGS="-k constants"` installs obp 0.4.1 (Saito, Aihara, Matsutani and Narita 2021, arXiv:2008.07146) into a folder of its own and computes them
anew. Where all weights and outcomes are known the seven definitions are the same. Not compared, because they are not:
- how SWITCH's threshold and DRos's shrinkage are found: 0.4.1 takes them as given, ours are chosen by `slope`; here both get the same ones;
- DRos with a shrinkage of 0: 0/0 there where a weight is 0, the direct method here;
- rows without a weight or an outcome: NaN there, left out here, so the denominators differ;
- intervals: rows are resampled there, players here, and what is refitted differs;
- the replay method, of which we have none: it is `self_normalised` with a target that is deterministic and a logger that is uniform.
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
