"""The whole panel of off-policy estimators at size: 1 million decisions of 50,000 players, 10 objectives, every estimator with its bootstrap.

Bars: 60 s on 2 cores; at its peak the process holds at most 3 times the arrays, these included. `make bench ARGS="-k ope"`.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import psutil

from fastq import ope

ROWS, PLAYERS, OBJECTIVES, FEATURES, ACTIONS = 1_000_000, 50_000, 10, 12, 2
SECONDS, TIMES_THE_ARRAYS = 60.0, 3.0


def million_decisions() -> dict[str, np.ndarray]:
    """Noise of the right shapes: what is measured is time and memory, not truth. Every player decides 20 times and leaves after the last."""
    draw = np.random.default_rng(0)
    last = np.arange(ROWS) % (ROWS // PLAYERS) == ROWS // PLAYERS - 1
    actions = draw.normal(size=(ROWS, ACTIONS))
    log = {
        "rewards": draw.normal(size=(ROWS, OBJECTIVES)),
        "weights": draw.exponential(size=ROWS),
        "discount": np.where(last, 0.0, 0.9)[:, None] * np.ones(OBJECTIVES),
        "following": np.where(last, -1, np.arange(ROWS) + 1),
        "truncated": np.zeros(ROWS, dtype=bool),
        "player": np.repeat(np.arange(PLAYERS), ROWS // PLAYERS),
        "x_logged": np.column_stack([np.ones(ROWS), draw.normal(size=(ROWS, FEATURES - 1))]),
        "x_target": np.column_stack([np.ones(ROWS), draw.normal(size=(ROWS, FEATURES - 1))]),
        "actions": actions,
        "target_actions": np.clip(actions + draw.normal(size=actions.shape), -5, 5),
        "logger_density": np.exp(-0.5 * np.square(actions).sum(1)) / (2 * np.pi),
    }
    log["rewards"][draw.random((ROWS, OBJECTIVES)) < 0.01] = np.nan
    return log


class Peak(threading.Thread):
    """The largest resident memory seen, looked at every 5 ms: the high-water mark of the process itself cannot be set back."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.bytes, self.over = psutil.Process(), 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.bytes = max(self.bytes, self.process.memory_info().rss)


def test_the_panel_on_a_million_decisions():
    import scipy.optimize  # noqa: F401 - its memory is no part of the measurement

    empty = psutil.Process().memory_info().rss
    log = million_decisions()
    rewards, weights, player = log["rewards"], log["weights"], log["player"]
    sequence = {name: log[name] for name in ("discount", "following", "truncated", "player")}
    peak = Peak()
    peak.start()
    begun = time.perf_counter()

    fit = ope.fitted_q(log["x_logged"], log["x_target"], rewards, **sequence, rng=np.random.default_rng(1))
    fitted = time.perf_counter() - begun
    assert isinstance(fit, ope.FittedQ)
    ratio = ope.density_ratio(log["x_logged"], log["x_target"], rewards, **sequence, rng=np.random.default_rng(1))
    assert isinstance(ratio, ope.DensityRatio)
    q, v = fit.q, fit.v
    arrays = sum(array.nbytes for array in log.values()) + q.nbytes + v.nbytes + ratio.ratio.nbytes

    def reinforced() -> ope.Terms:
        """The platform's default; its models are fitted in it."""
        state, logged, target = log["x_logged"][:, :-ACTIONS], log["x_logged"][:, -ACTIONS:], log["x_target"][:, -ACTIONS:]
        found = ope.double_reinforcement(state, logged, target, rewards, weights, **sequence, rng=np.random.default_rng(4))
        assert isinstance(found, ope.DoubleReinforcement)
        return found.terms

    kernel = [log[name] for name in ("actions", "target_actions", "logger_density")] + [np.array([[-6.0, 6.0]] * ACTIONS), player]
    panel = (
        lambda: ope.inverse_propensity(rewards, weights, player),
        lambda: ope.self_normalised(rewards, weights, player),
        lambda: ope.direct_method(v, player),
        lambda: ope.doubly_robust(rewards, weights, q, v, player),
        lambda: ope.self_normalised_doubly_robust(rewards, weights, q, v, player),
        lambda: ope.switch_doubly_robust(rewards, weights, q, v, player),
        lambda: ope.shrunk_doubly_robust(rewards, weights, q, v, player),
        lambda: ope.kernel_smoothed(rewards, *kernel, q=q, v=v),
        lambda: ope.per_decision(rewards, weights, v, **sequence, steps=4),
        lambda: ope.per_decision(rewards, weights, v, **sequence, steps=4, normalised=True),
        lambda: ope.sequential_doubly_robust(rewards, weights, q, v, **sequence, steps=4),
        lambda: ope.sequential_doubly_robust(rewards, weights, q, v, **sequence, steps=4, normalised=True),
        lambda: ope.magic(rewards, weights, q, v, **sequence, steps=4, rng=np.random.default_rng(2)),
        lambda: ope.marginal(rewards, ratio.ratio, **sequence),
        lambda: ope.marginal_doubly_robust(rewards, ratio.ratio, q, v, **sequence),
        reinforced,
    )
    print(f"\n{'fitted_q':45} {fitted:6.1f} s\n{'density_ratio':45} {time.perf_counter() - begun - fitted:6.1f} s")
    for estimator in panel:
        at = time.perf_counter()
        terms = estimator()
        summed = time.perf_counter() - at
        answers = ope.estimate(terms, objective_weights=np.ones(OBJECTIVES), rng=np.random.default_rng(3))
        print(f"{terms.estimator:45} {time.perf_counter() - at:6.1f} s, of which {summed:.1f} s for the sums; peak so far {(peak.bytes - empty) / arrays:.2f}")
        assert len(answers) == OBJECTIVES + 1
        del terms
    took = time.perf_counter() - begun
    peak.over.set()
    peak.join()
    times = (peak.bytes - empty) / arrays
    print(f"all of them: {took:.1f} s (bar {SECONDS:.0f}); arrays {arrays / 1e6:.0f} MB, at the peak {times:.2f} times that (bar {TIMES_THE_ARRAYS:.0f})")
    assert times <= TIMES_THE_ARRAYS
    assert took <= SECONDS
