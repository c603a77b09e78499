"""What training costs beside a bare PyTorch loop of the same arithmetic: fused Adam, gathered batches, nothing else. `make bench-train`.

The bare loop has no Lightning, no record, no progress; its windows are gathered by an index that was worked out once for all decisions, which is the
quickest there is where memory does not count. Ours runs as a user's does: Lightning, the record after each epoch, progress told. Both check held-out
players after each epoch. DECISIONS=3000000 sets the size of the largest log of the slope.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import polars as pl
import torch

from fastq import learner, representation
from fastq.platform import platform_from_tree
from fastq.representation import RepresentationModule
from fastq.windows import Windows

EPOCHS = 7  # of each; the first is left out of the median
WINDOW, MEASURES, DIMENSIONS, OBJECTIVES, POLICIES = 30, 12, 3, 5, 3
LARGEST = int(os.environ.get("DECISIONS", "300000"))


def synthetic(n, days=30, epochs=EPOCHS, late=0.02):
    """Transitions of n decisions, one a day, laid out as `windows.build` does; 2 % of them with a late version of a row."""
    rng = np.random.default_rng(0)
    players = n // days
    n = players * days
    tree = {
        "platform": "bench",
        "logs": {"decisions": "d.parquet", "activity": "a.parquet", "players": "p.parquet"},
        "state": {"window": WINDOW, "measures": {f"m{i}": {} for i in range(MEASURES)}, "attributes": {"tenure": {"kind": "numeric"}}},
        "policies": [f"b{k}" for k in range(POLICIES)],
        "action": {"kind": "continuous", "dimensions": {f"a{i}": {"low": -4, "high": 4} for i in range(DIMENSIONS)}},
        "objectives": {f"o{i}": {"weight": 1.0 if i else -1.0} for i in range(OBJECTIVES)},
        "training": {"epochs": epochs},
    }
    platform = platform_from_tree(tree, Path(), "bench")
    grid = 1 + n
    late_n = int(n * late)
    matrix = rng.standard_normal((grid + n + late_n, MEASURES + DIMENSIONS + OBJECTIVES), np.float32)  # grid, partial rows, late versions
    matrix[0] = np.nan
    player = np.repeat(np.arange(players), days)
    day = np.tile(np.arange(days), players)
    moment = day * 86_400_000_000 + 43_200_000_000
    decided = np.concatenate([[0], moment, np.zeros(n, np.int64), np.zeros(late_n, np.int64)])
    first = 1 + player * days
    whose = np.sort(rng.choice(np.flatnonzero(day > 2), late_n, replace=False))
    versions = np.stack([whose, np.full(late_n, WINDOW - 2), grid + n + np.arange(late_n)], 1)
    policy = rng.integers(0, POLICIES, n)
    action = rng.normal(size=(n, DIMENSIONS)) + policy[:, None]
    signal = matrix[1 : 1 + n, :1] * action[:, :1]
    reward = 0.3 * signal + rng.normal(size=(n, OBJECTIVES))
    proposals = np.full((n, POLICIES, DIMENSIONS), np.nan)
    proposals[np.arange(n), policy] = action
    unknown = np.full(n, np.nan)
    following = np.where(day < days - 1, np.arange(n) + 1, -1)
    return Windows(
        platform=platform, catalogue=None, decision_id=[f"d{i}" for i in range(n)], player_ids=[f"p{i}" for i in range(players)],
        policies=list(platform.policies), matrix=matrix,
        decided=decided, end=first + day - 1, first=first, partial=grid + np.arange(n), late=versions,
        moment=moment, player=player, policy=policy, last_policy=np.where(day > 0, np.roll(policy, 1), -1), action=action,
        item=np.full(n, -1), proposals=proposals,
        propensity=unknown, assignment=unknown, law=np.full((n, POLICIES), np.nan), chance=np.full((n, POLICIES), np.nan), reward=reward, following=following,
        elapsed=np.where(following >= 0, 1.0, 0.0), terminated=np.zeros(n, bool), attributes=pl.DataFrame({"tenure": rng.normal(size=n)}),
    )  # fmt: skip


class Gathered:
    """The plainest way to a batch of windows: everything worked out once, one index."""

    def __init__(self, data, encoding):
        everybody = np.arange(len(data))
        self.matrix = torch.from_numpy(encoding.rows(data.matrix))
        self.index = torch.from_numpy(data.rows_of(everybody))
        self.known = torch.cat([torch.from_numpy(data.known(part, data.rows_of(part))) for part in np.array_split(everybody, 64)])
        self.attributes = torch.from_numpy(encoding.attributes(data.attributes, len(data)))
        self.last = torch.from_numpy(data.last_policy)
        self.lagged = torch.arange(self.matrix.shape[1]) % (self.matrix.shape[1] // 2) >= MEASURES

    def gather(self, index, hide=None):
        x, last, f = self.matrix[self.index[index]], self.last[index], self.matrix.shape[1] // 2
        known = self.known[index]
        x[:, :, f - OBJECTIVES : f] *= known
        x[:, :, -OBJECTIVES:] *= known
        if hide is not None:
            x = torch.where(hide[:, None, None] & self.lagged, 0.0, x)
            last = torch.where(hide, -1, last)
        return x, self.attributes[index], representation.branch_weights(last, POLICIES)


def bare(module, rows, batch_size, step):
    """Seconds of each epoch of the bare loop."""
    module.configure_optimizers()
    taken = []
    for epoch in range(EPOCHS):
        began = time.perf_counter()
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))]
        for start in range(len(rows) // batch_size):
            step(module, order[start * batch_size : (start + 1) * batch_size])
        module.on_train_epoch_end()
        taken.append(time.perf_counter() - began)
    return taken


def stage_1_step(module, index):
    (optimizer,) = module.optimizers_
    optimizer.zero_grad()
    module.training_step(index).backward()
    optimizer.step()


class Watched:
    """Training as it is, with the time of each epoch of each stage and both modules as they went in."""

    def __init__(self, monkeypatch):
        self.seconds, self.modules = {}, {}
        fit = representation.fit

        def watched(module, rows, batch_size, each_epoch, **options):
            self.modules[each_epoch.stage] = (module, rows, batch_size)
            self.began = time.perf_counter()
            fit(module, rows, batch_size, each_epoch, **options)

        for place in (representation, learner):
            monkeypatch.setattr(place, "fit", watched)

    def progress(self, stage, done, total, metrics):
        now = time.perf_counter()
        self.seconds.setdefault(stage, []).append(now - self.began)
        self.began = now


def test_both_stages_beside_a_bare_loop(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setattr(representation.EachEpoch, "__init__", never_early(representation.EachEpoch.__init__))
    data = synthetic(60_000)
    watched = Watched(monkeypatch)
    policy = learner.train(data.platform, data, tmp_path, on_progress=watched.progress)
    ours, rates = {}, []
    for stage, (module, rows, batch_size) in watched.modules.items():
        ours[stage] = median(watched.seconds[stage][1:])
        if stage == "representation":
            plain = RepresentationModule(
                module.network.requires_grad_(True).train(), module.states, module.targets, module.validation, seed=0, epochs=EPOCHS, learning_rate=1e-3,
                balance=0.1,
            )  # fmt: skip
            plain.states = Gathered(data, policy.encoding)
            taken = bare(plain, rows, batch_size, stage_1_step)
        else:
            module.values.requires_grad_(True)
            module.actor.requires_grad_(True)
            module.each_epoch, module.history, module.epochs_done = lambda _: None, [], 0
            taken = bare(module, rows, batch_size, lambda module, index: module.training_step(index))
        plainly = median(taken[1:])
        rates.append(plainly / ours[stage])
        steps = len(rows) // batch_size
        print(f"\n{stage}: ours {1e3 * ours[stage] / steps:.1f} ms a step, bare {1e3 * plainly / steps:.1f}; {plainly / ours[stage]:.2f} of it, bar 0.85")
    assert min(rates) >= 0.85


def never_early(made):
    """Patience without end, so that both run the same epochs."""

    def __init__(self, stage, record, patience, *rest):  # noqa: N807
        made(self, stage, record, 10**6, *rest)

    return __init__


def measure(n):
    """One training of n decisions in this process: seconds, and memory beyond what the libraries take, beside matrix and model."""
    torch.set_num_threads(1)
    data = synthetic(n, epochs=1)
    small = synthetic(3_000, epochs=1)
    learner.train(small.platform, small)  # libraries and kernels are loaded by now
    matrix = data.matrix.nbytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.process_time()
    learner.train(data.platform, data)
    seconds = time.process_time() - began
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"{len(data)} {seconds:.2f} {matrix} {more}")


def test_cost_grows_with_the_rows():
    sizes = [n for n in (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000) if n <= LARGEST]
    found = []
    for n in sizes:
        done = subprocess.run([sys.executable, __file__, str(n)], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        decisions, seconds, matrix, more = map(float, done.stdout.split()[-4:])
        found.append((decisions, seconds))
        each = f"{int(decisions):>9,} decisions: {seconds:7.1f} CPU-s, {1e6 * seconds / decisions:6.0f} µs each"
        print(f"\n{each}; matrix {matrix / 1e6:7.1f} MB, training {more / 1e6:7.1f} MB more")
    slope = np.polyfit(*np.log(np.array(found[-3:])).T, 1)[0]
    print(f"CPU time grows with the power {slope:.2f} of the rows")
    assert slope < 1.1


if __name__ == "__main__":
    measure(int(sys.argv[1]))
