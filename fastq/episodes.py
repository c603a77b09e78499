"""Minari data sets (episodes of a Gymnasium environment) as logs, with the `fastq.yaml` that `fastq retrain` takes.

An episode is a player, a step is a day: its observation is an event at 6 o'clock, its decision falls at noon, and what it was rewarded with is known before
the next one. Each data set is one behaviour policy, so one data set is a platform with one policy. Time carries how episodes end: what terminated is silent
for longer than `state.churn`, what was truncated lasts until the log's end. (If nothing was truncated, the last episode counts as cut off there: some log's end
there must be.) Propensities are not in such data; they are estimated when they are asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from fastq.errors import ConfigurationError, FastqError, LogsError
from fastq.platform import FILE_NAME, OWN_POLICY, platform_from_tree
from fastq.workspace import Workspace, replacing

CHURN = 2  # periods: a step is one, so a player who is still there is never silent for as long
LAST_DAY = datetime(2026, 1, 1, tzinfo=UTC)  # of the log; no data set says when it was made
DAY = 86_400_000_000  # microseconds
SEEN, DECIDED = DAY // 4, DAY // 2  # when in a day the observation is seen, and the decision made
LARGEST_OBSERVATION = 512  # numbers; what has more is a picture, for which this is no place
REWARD = "reward"


@dataclass(frozen=True)
class Episode:
    """T steps: observations [T, O], actions [T, D] (or positions [T] of a discrete space), rewards [T], and whether it ended by itself."""

    name: str
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def import_minari(sources: Sequence[str], directory: Path, *, window: int, discount: float, force: bool = False) -> dict[str, Any]:
    """Write `directory`/fastq.yaml and `directory`/logs from Minari data sets of one environment; returns what was written.

    `sources` are directories that hold `data/main_data.hdf5`, or ids of data sets that were downloaded. Raises `ConfigurationError` for a space that is no
    recommendation, `LogsError` for what cannot be read.
    """
    if missing := [name for name in ("minari", "h5py") if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(f"import: {', '.join(missing)} is not installed; pip install 'fastq[minari]'")
    target = directory / FILE_NAME
    if target.exists() and not force:
        raise ConfigurationError(f"{target}: is already there; remove it, or replace it with --force")
    opened = [opened_dataset(source) for source in sources]
    policies = policy_names([dataset.spec.dataset_id for dataset in opened])
    first = opened[0].spec
    for dataset in opened[1:]:
        if (dataset.spec.observation_space, dataset.spec.action_space) != (first.observation_space, first.action_space):
            raise ConfigurationError(f"{dataset.spec.dataset_id}: has other observations or actions than {first.dataset_id}; import them apart")
    measures = observation_names(first.observation_space)
    found = []
    for source, policy, dataset in zip(sources, policies, opened, strict=True):
        with naming(source):
            found += [(policy, episode) for episode in episodes(dataset)]
    if not found:
        raise LogsError(f"{', '.join(sources)}: holds no episode with a step; there is nothing to learn from")
    action, columns = action_tree(first.action_space, np.concatenate([episode.actions for _, episode in found]))
    days = days_of([episode for _, episode in found])
    decisions, activity = [], []
    for (policy, episode), day in zip(found, days, strict=True):
        steps = np.arange(len(episode.rewards))
        player, at = f"{policy}/{episode.name}", (day + steps) * DAY
        acted = {"item_id": pl.Series(episode.actions.astype(str))} if not columns else dict(zip(columns, episode.actions.T, strict=True))
        ids = pl.Series([f"{player}/{step}" for step in steps])
        whose = pl.repeat(player, len(steps), eager=True)
        decisions.append(
            pl.DataFrame({"decision_id": ids, "player_id": whose, "decided_at": at + DECIDED, "policy": pl.repeat(policy, len(steps), eager=True)}
                         | {"propensity": pl.Series([None] * len(steps), dtype=pl.Float64)} | acted | {REWARD: episode.rewards})
        )  # fmt: skip
        activity.append(pl.DataFrame({"player_id": whose, "occurred_at": at + SEEN} | dict(zip(measures, episode.observations.T, strict=True))))
    tables = {"decisions": pl.concat(decisions), "activity": pl.concat(activity)}
    if not columns:
        tables["items"] = pl.DataFrame(
            {"item_id": [str(k) for k in range(int(first.action_space.start), int(first.action_space.start + first.action_space.n))]}
        )
    Workspace(directory).make(directory, directory / "logs")
    for name, frame in tables.items():
        moments = pl.col("^(decided|occurred)_at$").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        with replacing(directory / "logs" / f"{name}.parquet") as partial:
            frame.with_columns(moments).write_parquet(partial)
    tree = {
        "version": 1,
        "platform": re.sub(r"[^A-Za-z0-9_.-]+", "-", str(first.dataset_id)).strip("-._")[:80] or "minari",
        "logs": {name: f"logs/{name}.parquet" for name in tables},
        "state": {"period": "1d", "window": window, "churn": CHURN, "measures": {name: {"aggregate": "last"} for name in measures}},
        "policies": policies,
        "action": action,
        "objectives": {REWARD: {"weight": 1.0, "discount": discount, "known_after": "12h"}},
    }
    platform_from_tree(tree, directory, FILE_NAME)  # what we write, we can read
    head = f"# {FILE_NAME}, written by `fastq import` from {', '.join(str(d.spec.dataset_id) for d in opened)}: an episode is a player, a step is a day.\n"
    with replacing(target) as partial:
        partial.write_text(head + yaml.safe_dump(tree, sort_keys=False, width=160), encoding="utf-8")
    return {
        "written": str(target),
        "policies": policies,
        "episodes": len(found),
        "steps": len(tables["decisions"]),
        "terminated": sum(episode.terminated for _, episode in found),
        "measures": measures,
        "action": columns or ["item_id"],
    }


def opened_dataset(source: str) -> Any:
    """A Minari data set by its directory or, of one that was downloaded, by its id."""
    import minari

    here = next((path for path in (Path(source), Path(source) / "data") if (path / "metadata.json").is_file()), None)
    with naming(source):
        try:
            return minari.load_dataset(source) if here is None else minari.MinariDataset(here)
        except FileNotFoundError:
            where = os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")
            said = f"{source}: no directory with data/metadata.json, and no data set of that id in {where}; `minari download {source}` fetches one"
            raise LogsError(said) from None


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn what HDF5, Arrow, JSON and the library's own checks say into a sentence that names the data set."""
    try:
        yield
    except FastqError:
        raise
    except Exception as error:
        raise LogsError(f"{source}: cannot be read as a Minari data set ({' '.join(str(error).split())[:200]})") from error


def policy_names(dataset_ids: Sequence[str]) -> list[str]:
    """What tells the data sets apart: the last part of each id without its version, or the whole id where that is not enough."""
    short = [re.sub(r"-v\d+$", "", name.rsplit("/", 1)[-1]) for name in dataset_ids]
    names = short if len(set(short)) == len(short) else list(dataset_ids)
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{', '.join(names)}: expected each data set once")
    return [name if name != OWN_POLICY else f"{name}-data" for name in names]


def episodes(dataset: Any) -> Iterator[Episode]:
    """The episodes that have a step. The observation after the last one is left out: nothing was decided on it."""
    space, actions = dataset.spec.observation_space, dataset.spec.action_space
    for episode in dataset.iterate_episodes():
        steps = len(episode.rewards)
        if steps == 0:
            continue
        seen = flat(space, episode.observations, steps + 1)[:steps]
        acted = np.asarray(episode.actions).reshape(steps, -1) if actions.shape else np.asarray(episode.actions).reshape(steps)
        yield Episode(str(int(episode.id)), seen, acted, np.asarray(episode.rewards, float), bool(episode.terminations[-1]))


def observation_names(space: Any, prefix: str = "o") -> list[str]:
    """A name for each number of an observation: `o3`, `o_position_1`."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        inner = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        return [name for key, part in inner for name in observation_names(part, f"{prefix}_{re.sub(r'[^A-Za-z0-9]+', '_', str(key))}_")]
    if isinstance(space, spaces.Discrete):
        size = int(space.n)
    elif isinstance(space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
        size = int(np.prod(space.shape)) or 1
    else:
        raise ConfigurationError(
            f"import: expected observations of numbers (Box, Discrete, MultiBinary, MultiDiscrete, or Dict and Tuple of them), got {space}"
        )
    if size > LARGEST_OBSERVATION:
        raise ConfigurationError(f"import: an observation of {size:,} numbers is a picture; expected at most {LARGEST_OBSERVATION}")
    return [f"{prefix}{i}" for i in range(size)]


def flat(space: Any, observed: Any, n: int) -> np.ndarray:
    """[n, O] observations as numbers, in the order of `observation_names`; a discrete one as one column per value."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return np.concatenate([flat(part, observed[key], n) for key, part in space.spaces.items()], 1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flat(part, observed[i], n) for i, part in enumerate(space.spaces)], 1)
    if isinstance(space, spaces.Discrete):
        return np.eye(int(space.n))[np.asarray(observed, int).reshape(n) - int(space.start)]
    return np.asarray(observed, float).reshape(n, -1)


def action_tree(space: Any, actions: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """The platform file's `action`, and the names of its columns; none for a discrete space, whose values are the items of a catalogue."""
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return {"kind": "catalogue"}, []
    if isinstance(space, spaces.Box):
        low, high, step = space.low.reshape(-1).astype(float), space.high.reshape(-1).astype(float), None
    elif isinstance(space, spaces.MultiDiscrete):
        low, step = np.asarray(space.start, float).reshape(-1), 1.0
        high = low + np.asarray(space.nvec, float).reshape(-1) - 1
    else:
        raise ConfigurationError(f"import: expected actions that are numbers or one of several (Box, MultiDiscrete, Discrete), got {space}")
    done = actions.reshape(len(actions), -1)
    # a dimension without bounds has those of what was done; what lies a rounding error outside is inside
    low, high = np.minimum(np.where(np.isfinite(low), low, done.min(0)), done.min(0)), np.maximum(np.where(np.isfinite(high), high, done.max(0)), done.max(0))
    names = [f"a{i}" for i in range(len(low))]
    if flat_ones := [name for name, a, b in zip(names, low, high, strict=True) if a >= b]:
        raise ConfigurationError(f"import: action {flat_ones[0]} has one value only; there is nothing to choose")
    dimensions = {n: {"low": float(a), "high": float(b), **({"step": step} if step else {})} for n, a, b in zip(names, low, high, strict=True)}
    return {"kind": "continuous", "dimensions": dimensions}, names


def days_of(found: Sequence[Episode]) -> list[int]:
    """On which day (since 1970) each episode begins, so that its end says what it was: silence, or the log's end."""
    last = int(LAST_DAY.timestamp() // 86_400)
    cut = [not episode.terminated for episode in found]
    if not any(cut):
        cut[-1] = True
    ends = [last if open_ended else last - CHURN - 1 for open_ended in cut]
    return [end - len(episode.rewards) + 1 for end, episode in zip(ends, found, strict=True)]
