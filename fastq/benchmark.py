"""FAST-Q beside its peers: the same logs, the same players, the same features of a state, and either a simulator's truth or the gate's estimates.

A *cell* is one method on one log: learned, then valued. Every cell is kept as it is finished, so a benchmark that was stopped goes on where
it was. Methods are compared on the last step of their training, never the best one, and paired: each log and each luck of the simulator is
met by all of them.

fastq               this project's `default`
paper               its published form, the preset `paper`, for as many gradient steps as d3rlpy's methods; on a catalogue its actor proposes and its critics
                    re-rank
boosting-now        gradient boosting of the immediate weighted reward on state and action; acts by the best of the proposals and of random actions near them,
                    on a catalogue by the best item
boosting-week       the same on the weighted reward summed over the next seven decisions
boosting-each       one model of the immediate reward per objective, weighted sum
td3-bc, rebrac, cql, iql, bc   d3rlpy's, where it is installed (`pip install 'fastq[rivals]'`), on the weighted reward, discount 0.9; not on a catalogue,
                    whose items they cannot choose
NAME of a policy    what the logging platform ran, with its noise; `mixture` is the platform itself
best-known          on the simulator: the best linear policy that a fixed search in the truth finds (`worlds.best_known`)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fastq import evaluation, features, learner, records, windows, worlds
from fastq.environment import last_as_long_as_the_parent, prepare
from fastq.errors import ConfigurationError, RequestError, WorkspaceError
from fastq.features import Encoding, PlayerStates
from fastq.paper import STAGE_TWO
from fastq.platform import OWN_POLICY, CatalogueAction, Platform, Training, load_platform
from fastq.platform import PAPER as PUBLISHED
from fastq.policy import NEAREST_ITEMS
from fastq.windows import Windows, held_out_players
from fastq.workspace import Workspace, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[Any]]
Choose = Callable[[PlayerStates], Array]  # noise-free actions [n, D] in raw units
Progress = Callable[[str, int, int, dict[str, float]], None]

PAPER = "paper"  # the published form of FAST-Q
BOOSTING = ("boosting-now", "boosting-week", "boosting-each")
D3RLPY = {"td3-bc": "TD3PlusBCConfig", "rebrac": "ReBRACConfig", "cql": "CQLConfig", "iql": "IQLConfig", "bc": "BCConfig"}
METHODS = (OWN_POLICY, PAPER, *BOOSTING, *D3RLPY)
BEST, BEST_KNOWN = "best-known", "best-known.json"
RECENT = (1, 3, 7)  # periods that the rivals' features average over, beside the whole window
WEEK = 7  # decisions summed by boosting-week
CANDIDATES, NEAR = 32, 2.0  # random actions per proposal set, and how far from a proposal they lie, in that policy's own noise
ITEM_ROWS = 256  # states whose items are ranked at once
DISCOUNT = 0.9  # of the rivals, who know one objective only
TRUTH_PLAYERS, TRUTH_DAYS = 1_000, 30
TRUTH_SEED = 50_000  # luck that no log of a benchmark has seen
LEAST_SEEDS = 2  # for an interval


@dataclass(frozen=True)
class Study:
    """One benchmark on simulated platforms: which worlds, which seeds of log and training, how large, how long the rivals train."""

    worlds: tuple[str, ...] = ("arena",)
    seeds: tuple[int, ...] = tuple(range(10))
    players: int = 2_000
    days: int = 40
    methods: tuple[str, ...] = METHODS
    steps: int = 20_000  # gradient steps of each d3rlpy method

    def key(self, world: str) -> str:
        """Equal for studies whose cells of a world can stand for each other."""
        said = json.dumps([world, repr(worlds.world(world)), self.players, self.days, self.steps])
        return f"{world}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"


def installed(method: str) -> bool:
    """Whether what a method needs is there."""
    return method not in D3RLPY or importlib.util.find_spec("d3rlpy") is not None


def checked_methods(asked: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The methods that can be run here, and a sentence for each that cannot. Raises `RequestError` for a name that is none."""
    for name in asked:
        if name not in METHODS:
            raise RequestError(f"{name!r} is no method of the benchmark; expected some of {', '.join(METHODS)}")
    left_out = [name for name in asked if not installed(name)]
    notes = [f"{', '.join(left_out)} left out: d3rlpy is not installed; pip install 'fastq[rivals]'"] if left_out else []
    chosen = tuple(dict.fromkeys([OWN_POLICY, *(name for name in asked if name not in left_out)]))
    return chosen, notes


# ---- what the rivals see and do --------------------------------------------------------------------------------------------
def state_features(platform: Platform, encoding: Encoding, policies: Sequence[str], states: PlayerStates) -> Array:
    """[n, P] float32: the newest row, means over the last 1, 3, 7 and all periods with the share that is known, attributes, who acted last.

    Made of exactly what FAST-Q's own states hold; nothing of the platform's secrets is in it.
    """
    raw = features.raw_windows(platform, states, len(encoding.mean))
    n, window, width = raw.shape
    encoded = encoding.rows(raw)
    values, known = encoded[..., :width], encoded[..., width:]
    columns = []
    for periods in (*(p for p in RECENT if p < window), window):
        count = known[:, -periods:].sum(1)
        columns += [values[:, -periods:].sum(1) / np.maximum(count, 1), count / periods]
    seen = known[:, :, : max(len(platform.state.measures), 1)].max(2)
    away = np.where(seen.max(1) > 0, seen[:, ::-1].argmax(1), window)[:, None] / window
    acted = np.zeros((n, len(policies)), np.float32)
    for i, name in enumerate(states.policies or ()):
        if name in policies:
            acted[i, policies.index(name)] = 1
    described = encoding.attributes(features.attribute_frame(platform, states), n)
    return np.concatenate([*columns, away, described, acted], 1).astype(np.float32)


@dataclass(frozen=True)
class Lessons:
    """What a rival learns from: N decisions of the players who are not held out.

    x [N, P] state features, action [N, D] raw units, reward [N, M] per objective, row [N] into the windows.
    """

    platform: Platform
    windows: Windows
    encoding: Encoding
    x: Array
    action: Array
    reward: Array
    row: Array

    def features(self, states: PlayerStates) -> Array:
        return state_features(self.platform, self.encoding, self.windows.policies, states)


def lessons(platform: Platform, data: Windows, chunk: int = 16_384) -> Lessons:
    """The decisions that FAST-Q learns from, as every rival sees them."""
    learning = ~held_out_players(data.player_ids, platform.training.holdout, platform.training.seed)[data.player]
    row = np.flatnonzero(learning)
    seen = data.matrix[np.unique(data.rows_of(row))]
    encoding = features.fit_encoding(platform, seen, features.attribute_rows(data.attributes, row))
    x = np.concatenate([state_features(platform, encoding, data.policies, data.states(row[i : i + chunk])) for i in range(0, len(row), chunk)])
    return Lessons(platform, data, encoding, x, data.action[row], data.reward[row], row)


def boosting(lesson: Lessons, method: str, seed: int) -> Choose:
    """Gradient boosting on state and action; the best of the cloned proposals and of random actions near them.

    What a team would build first. Each behaviour policy is cloned by one regression per dimension.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    def regressor() -> Any:
        stops = {"early_stopping": True, "validation_fraction": 0.15, "n_iter_no_change": 10}  # a head of noise ends after a few trees, and costs little
        return HistGradientBoostingRegressor(max_iter=150, learning_rate=0.08, min_samples_leaf=40, l2_regularization=1.0, random_state=seed, **stops)

    weights, data = lesson.platform.weights, lesson.windows
    targets = [(lesson.reward[:, j], weights[j]) for j in range(len(weights))] if method == "boosting-each" else [(weighted_sums(lesson, method), 1.0)]
    both = np.concatenate([lesson.x, lesson.action], 1)
    models = [(regressor().fit(both[np.isfinite(y)], y[np.isfinite(y)]), w) for y, w in targets if np.isfinite(y).any()]
    if not models:
        raise RequestError("no outcome of any decision is known; there is nothing to compare")
    clones, noise = [], []
    for k in range(len(data.policies)):
        own = data.policy[lesson.row] == k
        if own.any():
            cloned = [regressor().fit(lesson.x[own], lesson.action[own, d]) for d in range(lesson.action.shape[1])]
            clones.append(cloned)
            noise.append([float(np.std(lesson.action[own, d] - model.predict(lesson.x[own]))) for d, model in enumerate(cloned)])
    low, high = lesson.platform.bounds.T

    def scored(x: Array, candidates: Array) -> Array:
        """[n, C] of candidates [n, C, D]."""
        n, c, _ = candidates.shape
        rows = np.concatenate([np.repeat(x, c, 0), candidates.reshape(n * c, -1)], 1)
        return np.asarray(np.sum([w * model.predict(rows) for model, w in models], axis=0).reshape(n, c))

    def choose_items(states: PlayerStates) -> Array:
        """[n] ids: all items are ranked, or of a large catalogue those nearest to what the cloned policies propose."""
        assert data.catalogue is not None
        x, vectors = lesson.features(states), data.catalogue.embedding.astype(float)
        chosen = []
        for start in range(0, len(x), ITEM_ROWS):
            piece = x[start : start + ITEM_ROWS]
            nearest = np.broadcast_to(np.arange(len(vectors)), (len(piece), len(vectors)))
            if len(vectors) > NEAREST_ITEMS:
                proposals = torch.from_numpy(np.stack([np.stack([model.predict(piece) for model in cloned], 1) for cloned in clones], 1))
                distance = torch.cdist(proposals, torch.from_numpy(vectors)).amin(1)
                nearest = distance.topk(NEAREST_ITEMS, largest=False).indices.numpy()
            best = scored(piece, vectors[nearest]).argmax(1)
            chosen.append(nearest[np.arange(len(piece)), best])
        return np.array(data.catalogue.ids, object)[np.concatenate(chosen)]

    def choose(states: PlayerStates) -> Array:
        x = lesson.features(states)
        proposals = np.stack([np.stack([model.predict(x) for model in cloned], 1) for cloned in clones], 1)  # [n, K, D]
        rng = np.random.default_rng(seed)  # the same directions for everybody and always: a policy is a function of the state
        near = rng.integers(0, len(clones), CANDIDATES)
        around = proposals[:, near] + NEAR * np.array(noise)[near] * rng.standard_normal((CANDIDATES, proposals.shape[2]))
        candidates = np.clip(np.concatenate([proposals, around], 1), low, high)
        best: Array = candidates[np.arange(len(x)), scored(x, candidates).argmax(1)]
        return best

    return choose if data.catalogue is None else choose_items


def weighted_sums(lesson: Lessons, method: str) -> Array:
    """[N] the weighted reward of a decision, or of it and the player's next six: NaN where one of them is not known."""
    data, weights = lesson.windows, lesson.platform.weights
    now = data.reward @ weights
    if method != "boosting-week":
        return np.asarray(now[lesson.row])
    total, at = now[lesson.row].copy(), lesson.row.copy()
    alive = np.ones(len(at), bool)
    for _ in range(WEEK - 1):
        ended, at = data.terminated[at], data.following[at]
        alive &= ~ended
        total[alive & (at < 0)] = np.nan  # cut off by the log's end, which says nothing of the player
        alive &= at >= 0
        total += np.where(alive, now[at], 0.0)
        at = np.maximum(at, 0)
    return np.asarray(total)


def d3rlpy_rival(lesson: Lessons, method: str, seed: int, steps: int) -> Choose:
    """One of d3rlpy's methods with its published settings: weighted reward, standardised states, actions scaled to [-1, 1]."""
    import d3rlpy

    logging.getLogger("d3rlpy").setLevel(logging.ERROR)
    d3rlpy.seed(seed)
    data, (low, high) = lesson.windows, lesson.platform.bounds.T
    reward = data.reward @ lesson.platform.weights
    usable = np.isfinite(reward[lesson.row])
    row = lesson.row[usable]
    last = np.append(data.player[row[1:]] != data.player[row[:-1]], True)
    terminal = data.terminated[row]
    dataset = d3rlpy.dataset.MDPDataset(
        observations=lesson.x[usable],
        actions=lesson.action[usable].astype(np.float32),
        rewards=reward[row].astype(np.float32),
        terminals=terminal.astype(np.float32),
        timeouts=(last & ~terminal).astype(np.float32),
    )
    config = getattr(d3rlpy.algos, D3RLPY[method])
    options: dict[str, Any] = {} if method == "bc" else {"gamma": DISCOUNT}
    scaler = d3rlpy.preprocessing.MinMaxActionScaler(minimum=low, maximum=high)
    rival = config(batch_size=256, action_scaler=scaler, **options).create(device="cpu:0")
    quiet: dict[str, Any] = {"show_progress": False, "logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "save_interval": 2}  # after the only epoch: never
    rival.fit(dataset, n_steps=steps, n_steps_per_epoch=steps, experiment_name=method, **quiet)

    def choose(states: PlayerStates) -> Array:
        return np.clip(np.asarray(rival.predict(lesson.features(states)), float), low, high)

    return choose


def learn(method: str, platform: Platform, data: Windows, seed: int, steps: int, on_progress: Progress | None = None) -> Choose:
    """A method's policy from these logs, without noise."""
    if method in (OWN_POLICY, PAPER):
        training = platform.training.model_copy(update={"accelerator": "cpu"})  # where the rivals learn
        if method == PAPER:
            said = {"preset": "paper", "epochs": published_epochs(platform, data, steps)}
            training = Training.model_validate(training.model_dump(include={"seed", "holdout", "alpha", "accelerator"}) | said)
        platform = platform.model_copy(update={"training": training})
        data = replace(data, platform=platform)
        policy = learner.train(platform, data, on_progress=on_progress)
        return lambda states: policy.recommend(states, explore=False).action
    lesson = lessons(platform, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' words about each other's next release
        return boosting(lesson, method, seed) if method in BOOSTING else d3rlpy_rival(lesson, method, seed, steps)


def published_epochs(platform: Platform, data: Windows, steps: int) -> int:
    """Epochs of the preset `paper` whose second stage takes as many gradient steps as the rivals do, at most the published 100 (and 2,000)."""
    learning = ~held_out_players(data.player_ids, platform.training.holdout, platform.training.seed)[data.player]
    batches = max(int(0.85 * learning.sum()) // int(PUBLISHED["batch_size"]), 1)
    return int(min(max(round(steps / (STAGE_TWO * batches)), 1), PUBLISHED["epochs"]))


# ---- on the simulator, in truth ---------------------------------------------------------------------------------------------
def on_simulator(study: Study, directory: Path, on_progress: Progress | None = None, processes: int = 1) -> dict[str, Any]:
    """Run or resume a study, so many logs at a time as `processes`; cells lie in `directory`. How many there are changes what is found by rounding alone.

    The document has a table per world, `headline`, and where the raw cells are.
    """
    methods, notes = checked_methods(study.methods)
    if len(study.seeds) < LEAST_SEEDS:
        notes.append("one seed gives no interval; name at least two with --seeds")
    tell = on_progress or (lambda *_: None)
    study = replace(study, worlds=tuple(dict.fromkeys(study.worlds)))
    here = {name: [method for method in methods if not (worlds.world(name).levels and method in D3RLPY)] for name in study.worlds}
    notes += [f"{name}: d3rlpy's methods choose numbers, not items, and are left out there" for name, left in here.items() if len(left) < len(methods)]
    jobs = [(name, seed) for name in study.worlds for seed in study.seeds]
    total, done = sum(len(here[name]) + 1 for name, _ in jobs), 0
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {name: {} for name in study.worlds}

    def told(count: int) -> None:
        nonlocal done
        done += count
        tell("benchmark", done, total, {})

    told(0)
    if processes == 1:
        for name, seed in jobs:
            found[name][seed] = cells_of_a_log(name, seed, study, here[name], directory, told, on_progress)
    else:
        for (name, seed), cells in at_once(processes, study, here, directory, jobs):
            found[name][seed] = cells
            told(len(here[name]) + 1)
    tables = [table(worlds.world(name), here[name], {seed: found[name][seed] for seed in study.seeds}) for name in study.worlds]
    return {
        "on": "simulator",
        "worlds": tables,
        "seeds": list(study.seeds),
        "notes": notes,
        "cells": str(directory),
        "picture": str(picture(tables, directory / "benchmark.png")),
    }


def cells_of_a_log(
    name: str, seed: int, study: Study, methods: Sequence[str], directory: Path, told: Callable[[int], None], on_progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """All cells of one log of a world: the policies whose truth needs no log, then each method; `told` counts them."""
    world, cells = worlds.world(name), directory / study.key(name)
    cells.mkdir(parents=True, exist_ok=True)
    found = kept(cells / f"seed-{seed}-known.json", partial(known_policies, world, seed, cells))
    told(1)
    with simulated(world, study, seed, cells) as log:
        for method in methods:
            compute = partial(learned_cell, method, world, seed, study.steps, log, on_progress)
            found[method] = kept(cells / f"seed-{seed}-{method}.json", compute)
            told(1)
    return found


def at_once(
    processes: int, study: Study, methods: Mapping[str, Sequence[str]], directory: Path, jobs: Sequence[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], dict[str, dict[str, Any]]]]:
    """The cells of these logs, as they are finished, by processes of one thread each. However this ends they are gone, with what they wrote for themselves.

    Raises `WorkspaceError` where one of them died.
    """
    others = set(active_children())
    with ProcessPoolExecutor(processes, get_context("spawn"), _alone) as workers:
        try:
            for search in [workers.submit(_known_best, name, directory / study.key(name)) for name in study.worlds]:
                search.result()  # before seeds of one world would each begin it
            under_way = {workers.submit(cells_of_a_log, name, seed, study, methods[name], directory, _nobody): (name, seed) for name, seed in jobs}
            for ended in as_completed(under_way):
                yield under_way[ended], ended.result()
        except BaseException as error:
            workers.shutdown(wait=False, cancel_futures=True)
            for child in set(active_children()) - others:
                child.terminate()
            if isinstance(error, BrokenExecutor):
                raise WorkspaceError("a process ended before its cell was done, most likely for want of memory; use fewer --processes") from error
            raise
        finally:
            for name in study.worlds:
                for left in (directory / study.key(name)).glob("logs-*"):
                    shutil.rmtree(left, ignore_errors=True)


def _alone() -> None:
    """Of a process that computes cells: quiet, and arithmetic in one thread, for there are as many processes as are wanted."""
    last_as_long_as_the_parent()
    prepare()
    threadpool_limits(1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _known_best(name: str, cells: Path) -> None:
    cells.mkdir(parents=True, exist_ok=True)
    kept(cells / BEST_KNOWN, partial(best_known, worlds.world(name)))


def _nobody(_: int) -> None:
    """Cells that are counted by whoever gets all of a log's."""


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell as it was kept, or computed now and kept."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document
    document = compute()
    with replacing(path) as file:
        file.write_text(json.dumps(document), encoding="utf-8")
    return document


@contextlib.contextmanager
def simulated(world: worlds.Arena, study: Study, seed: int, cells: Path) -> Iterator[Callable[[], tuple[Platform, Windows]]]:
    """The logs of one seed, written and read when the first cell asks for them, removed afterwards."""
    directory = cells / f"logs-{seed}"
    read: list[tuple[Platform, Windows]] = []

    def log() -> tuple[Platform, Windows]:
        if not read:
            path = worlds.write_logs(world, directory, study.players, study.days, seed)
            path.write_text(path.read_text(encoding="utf-8").replace("seed: 0", f"seed: {seed}"), encoding="utf-8")
            platform = load_platform(path)
            tables = records.read_records(platform)
            read.append((platform, windows.build(platform, tables, features.build_rows(platform, tables))))
        return read[0]

    try:
        yield log
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def known_policies(world: worlds.Arena, seed: int, cells: Path) -> dict[str, Any]:
    """The platform's own policies, their mixture and the best known one, in truth."""
    best = kept(cells / BEST_KNOWN, partial(best_known, world))
    act = worlds.LinearPolicy(world, *(np.array(best[name]) for name in ("weights", "mean", "scale")))
    return {name: valued(world, name, seed) for name in (*world.policies, worlds.MIXTURE)} | {BEST: valued(world, act, seed)}


def best_known(world: worlds.Arena) -> dict[str, Any]:
    found = worlds.best_known(world)
    return {"weights": found.weights.tolist(), "mean": found.mean.tolist(), "scale": found.scale.tolist()}


def learned_cell(
    method: str, world: worlds.Arena, seed: int, steps: int, log: Callable[[], tuple[Platform, Windows]], on_progress: Progress | None
) -> dict[str, Any]:
    platform, data = log()
    began = time.perf_counter()
    choose = learn(method, platform, data, seed, steps, on_progress)
    seconds = time.perf_counter() - began

    def act(states: worlds.States) -> Array:
        if data.catalogue is None:
            return choose(PlayerStates(**states))
        ids = worlds.item_ids(world, states["actions"])
        there = data.catalogue.positions(ids.ravel().tolist()).reshape(ids.shape)
        actions = np.where(there[..., None] >= 0, data.catalogue.embedding[there], np.nan)
        known, what = worlds.items(world)
        where = {name: i for i, name in enumerate(known)}
        return what[[where[name] for name in choose(PlayerStates(**states | {"actions": actions}))]]

    return valued(world, act, seed) | {"seconds": seconds}


def valued(world: worlds.Arena, act: worlds.Act | str, seed: int) -> dict[str, Any]:
    """A policy's true value on the luck of `seed`, the same for all methods of that seed."""
    truth = worlds.true_values(world, act, TRUTH_PLAYERS, TRUTH_DAYS, TRUTH_SEED + seed)
    objectives = dict(zip(worlds.OBJECTIVES, truth.objectives.tolist(), strict=True))
    return {"value": truth.total, "objectives": objectives, "cost_per_decision": float(truth.per_decision[-1])}


def table(world: worlds.Arena, methods: Sequence[str], found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """One world's rows, best first: value, how far it is from the mixture to the best known, and FAST-Q's lead over it, paired by seed."""
    names = [*methods, *world.policies, worlds.MIXTURE, BEST]
    value = {name: np.array([found[seed][name]["value"] for seed in found]) for name in names}
    reach = value[BEST] - value[worlds.MIXTURE]
    rows: list[dict[str, Any]] = []
    for name in names:
        mean, low, high = t_interval(value[name])
        lead, lead_low, lead_high = t_interval(value[OWN_POLICY] - value[name])
        rows.append(
            {
                "world": world.name,
                "method": name,
                "value": mean,
                "low": low,
                "high": high,
                "way": float((value[name] - value[worlds.MIXTURE]).mean() / reach.mean()),
                "lead": lead,
                "lead_low": lead_low,
                "lead_high": lead_high,
                "seconds": float(np.mean([found[seed][name].get("seconds", 0.0) for seed in found])) if name in methods else None,
                "objectives": {o: float(np.mean([found[seed][name]["objectives"][o] for seed in found])) for o in worlds.OBJECTIVES},
            }
        )
    rows.sort(key=itemgetter("value"), reverse=True)
    return {"world": world.name, "rows": rows, "headline": headline(methods, found)}


def headline(methods: Sequence[str], found: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """A simulated A/B test: FAST-Q against the rival with the largest mean value, the five quantities of arXiv 2504.21383 in per cent."""
    rivals = [name for name in methods if name != OWN_POLICY]
    if not rivals:
        return None
    rival = max(rivals, key=lambda name: float(np.mean([found[seed][name]["value"] for seed in found])))
    changes = {}
    for objective in worlds.OBJECTIVES:
        ours, theirs = (np.array([found[seed][name]["objectives"][objective] for seed in found]) for name in (OWN_POLICY, rival))
        mean, low, high = t_interval(ours - theirs)
        unit = max(abs(float(theirs.mean())), 1e-12) / 100
        changes[objective] = {"percent": mean / unit, "low": None if low is None else low / unit, "high": None if high is None else high / unit}
    return {"against": rival, "changes": changes}


def t_interval(values: Array, level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean and Student's interval of independent values; no interval for fewer than two."""
    mean = float(values.mean())
    if len(values) < LEAST_SEEDS:
        return mean, None, None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


# ---- on a platform's own logs, estimated --------------------------------------------------------------------------------------
def on_logs(platform: Platform, methods: Sequence[str] = METHODS, steps: int = 20_000, on_progress: Progress | None = None) -> dict[str, Any]:
    """Learn by every method on these logs and estimate each off-policy on players that none of them saw, by the gate's own estimator.

    Every learned policy is valued as it would be served: around its action with `serving.exploration`'s logged noise.
    """
    chosen, notes = checked_methods(methods)
    if isinstance(platform.action, CatalogueAction) and len(chosen) > 1:
        chosen, notes = (OWN_POLICY,), [*notes, "the rivals choose numbers, not items: on a catalogue FAST-Q is compared with the behaviour policies alone"]
    if platform.serving.exploration == 0:
        raise ConfigurationError(
            "fastq.yaml: serving.exploration: expected more than 0; a policy without noise has no density, so it cannot be estimated from logs"
        )
    tell = on_progress or (lambda *_: None)
    directory = Workspace(platform.root).state / "benchmark"
    tables = records.read_records(platform)
    data = windows.build(platform, tables, features.build_rows(platform, tables))
    version = hashlib.sha256(f"{data.fingerprint()}{platform.model_dump_json()}{steps}".encode()).hexdigest()[:10]
    cells = directory / f"logs-{version}"
    (cells / OWN_POLICY).mkdir(parents=True, exist_ok=True)
    own = learner.train(platform, data, cells / OWN_POLICY, resume=True, on_progress=on_progress)
    held = evaluation.hold(own, data)
    targets, seconds = [evaluation.served_target(own, held)], dict[str, float]()
    for i, method in enumerate(chosen[1:], 1):
        tell("benchmark", i, len(chosen), {})
        cell = kept(cells / f"{method}.json", partial(rival_actions, method, platform, data, held, steps))
        seconds[method] = cell["seconds"]
        targets.append(evaluation.continuous_target(method, own, held, torch.from_numpy(own.units.standard(np.array(cell["action"])))))
    targets += [evaluation.behaviour_target(own, held, k) for k, name in enumerate(data.policies) if name != OWN_POLICY]
    rows: list[dict[str, Any]] = []
    for target in targets:
        said = [record for record in evaluation.valued(own, held, target)[1] if record["objective"] is None]
        rows += [record | {"method": target.name, "seconds": seconds.get(target.name)} for record in said[:1]]  # the best estimator that did not refuse
    rows.sort(key=itemgetter("value"), reverse=True)
    tell("benchmark", len(chosen), len(chosen), {})
    return {
        "on": platform.platform,
        "rows": rows,
        "cells": str(cells),
        "notes": notes,
        "picture": str(picture([{"world": platform.platform, "rows": rows}], cells / "benchmark.png")),
    }


def rival_actions(method: str, platform: Platform, data: Windows, held: evaluation.Held, steps: int, chunk: int = 16_384) -> dict[str, Any]:
    """What a rival would do in every held-out state."""
    began = time.perf_counter()
    choose = learn(method, platform, data, platform.training.seed, steps)
    seconds = time.perf_counter() - began
    action = np.concatenate([choose(data.states(held.rows[i : i + chunk])) for i in range(0, len(held.rows), chunk)])
    return {"seconds": seconds, "action": action.tolist()}


# ---- the picture ----------------------------------------------------------------------------------------------------------------
def picture(tables: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Every method's value with its interval, one panel per world; ours in colour."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=(7.5, 0.6 + sum(0.5 + 0.3 * len(t["rows"]) for t in tables)), layout="constrained")
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=[max(len(t["rows"]), 1) for t in tables])[:, 0]
    for axis, found in zip(axes, tables, strict=True):
        rows = found["rows"][::-1]
        for y, row in enumerate(rows):
            ours = row["method"] == OWN_POLICY
            if row["low"] is not None:
                axis.plot([row["low"], row["high"]], [y, y], color="#1f6feb" if ours else "#8b949e", linewidth=2.5, solid_capstyle="round")
            axis.plot(row["value"], y, "o", color="#1f6feb" if ours else "#57606a", markersize=6)
        axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axis.set_title(found["world"], loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("true value per player and day, with a 95 % interval over seeds" if "lead" in rows[0] else "estimated value, with a 95 % interval")
        axis.grid(visible=True, axis="x", color="#d0d7de", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(left=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path
