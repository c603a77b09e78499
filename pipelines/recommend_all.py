"""Flow `recommend_all`: one recommendation for every player that is known, into a file, and into the decision log."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from prefect import flow, task

from fastq import features, registry
from fastq.errors import ConfigurationError, UnknownPlayerError, WorkspaceError
from fastq.platform import OWN_POLICY, Platform
from fastq.workspace import Workspace, replacing
from feature_repo import store
from pipelines.turn import EACH_TIME, RETRIES, Progress, platform_of, progress, running

_WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".parquet": pl.DataFrame.write_parquet,
    ".csv": pl.DataFrame.write_csv,
    ".ndjson": pl.DataFrame.write_ndjson,
}


@task(name="read states", **RETRIES, **EACH_TIME)
def read_states(workspace: str) -> tuple[pl.DataFrame, bool]:
    """The online rows of every player who may be recommended something, and whether the online store gave them.

    Without the store the states that were materialised last are used, and all answers count as degraded.
    """
    platform = platform_of(workspace)
    latest = store.materialized(platform)
    left_out = excluded(platform)
    players = [p for p in latest["player_id"] if p not in left_out and not held_out(platform, p)]
    if not players:
        raise UnknownPlayerError("no player to recommend anything to: none is known, or serving.exclude and serving.holdout leave nobody")
    tell = progress.get()
    try:
        frame = store.read_online(store.open_store(platform), players, lambda done: tell("reading states", done, len(players), {}))
    except WorkspaceError:
        return latest.filter(pl.col("player_id").is_in(players)), False
    missing = [p for p in players if p not in set(frame["player_id"])] if len(frame) < len(players) else []
    return pl.concat([frame, latest.filter(pl.col("player_id").is_in(missing))]), True


@task(name="decide", **EACH_TIME)
def decide(workspace: str, frame: pl.DataFrame) -> pl.DataFrame:
    """One decision per player, in the columns of `decisions`, with the policy's `value` beside them."""
    from fastq.policy import action_frame

    platform = platform_of(workspace)
    policy = registry.load_policy(f"models:/{platform.platform}@{registry.CHAMPION}", platform.root)
    # how much to explore is the operator's to say today, whatever it was when the model was trained
    policy = replace(policy, platform=policy.platform.model_copy(update={"serving": platform.serving, "root": platform.root}))
    at = datetime.now(UTC)
    progress.get()("recommending", 0, len(frame), {})
    found = policy.recommend(features.states_at(platform, frame, at))
    progress.get()("recommending", len(frame), len(frame), {})
    n = len(frame)
    holdout = platform.serving.holdout
    about = pl.DataFrame(
        {
            "decision_id": [uuid.uuid4().hex for _ in range(n)],
            "player_id": frame["player_id"],
            "decided_at": pl.Series([at] * n, dtype=pl.Datetime("us", "UTC")),
            "policy": [OWN_POLICY] * n,
            "propensity": pl.Series(np.asarray(found.propensity, float)).fill_nan(None),
            "assignment": pl.Series([1 - holdout.share if holdout.share > 0 else None] * n, dtype=pl.Float64),
            "model_version": [policy.version] * n,
        }
    )
    unknown = pl.DataFrame({name: pl.Series([None] * n, dtype=pl.Float64) for name in platform.objectives})
    return about.hstack(action_frame(platform, found.action)).hstack(unknown).with_columns(value=pl.Series(np.asarray(found.value, float)))


@task(name="write", **EACH_TIME)
def write(workspace: str, decisions: pl.DataFrame, out: str, dry_run: bool) -> None:
    """First the log, then the file: a decision that nobody may carry out teaches nothing wrong, one that is carried out unlogged is lost."""
    platform = platform_of(workspace)
    space = Workspace(platform.root)
    if not dry_run:
        space.make(space.served)
        with replacing(space.served / f"{uuid.uuid4().hex}.parquet") as partial:
            decisions.drop("value").write_parquet(partial)
    with replacing(Path(out)) as partial:
        _WRITERS[Path(out).suffix](decisions, partial)


@task(name="remember", **RETRIES, **EACH_TIME)
def remember(workspace: str, decisions: pl.DataFrame) -> None:
    """What was recommended becomes a lagged feature at once. Rows are read again just before, so that what serving wrote meanwhile stays."""
    platform = platform_of(workspace)
    catalogue = None
    if not platform.dimension_names:
        policy = registry.load_policy(f"models:/{platform.platform}@{registry.CHAMPION}", platform.root)
        catalogue = policy.catalogue
    opened = store.open_store(platform)
    for start in range(0, len(decisions), store.CHUNK):
        batch = decisions[start : start + store.CHUNK]
        with store.exclusive(platform):
            frame = store.read_online(opened, batch["player_id"].to_list())
            if len(frame):
                store.push(opened, features.with_decisions(platform, frame, batch.filter(pl.col("player_id").is_in(frame["player_id"].implode())), catalogue))
        progress.get()("keeping states", min(start + store.CHUNK, len(decisions)), len(decisions), {})


def excluded(platform: Platform) -> frozenset[str]:
    """Players who are never recommended anything: the column `player_id` of the file that `serving.exclude` names."""
    if platform.serving.exclude is None:
        return frozenset()
    path = platform.root / platform.serving.exclude
    try:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
        return frozenset(frame["player_id"].cast(pl.String).drop_nulls())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigurationError(f"{path}: serving.exclude: expected a file with a column player_id ({' '.join(str(error).split())[:200]})") from None


def held_out(platform: Platform, player_id: str) -> bool:
    """Whether a player stays with a behaviour policy; the same rule as serving's, so the same players."""
    if platform.serving.holdout.share == 0:
        return False
    digest = hashlib.sha256(f"{platform.platform}/holdout/{player_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < platform.serving.holdout.share


def _stale(platform: Platform, frame: pl.DataFrame) -> int:
    """Players of whom nothing was seen for `serving.stale_after` periods, or ever."""
    oldest = datetime.now(UTC) - platform.serving.stale_after * platform.state.period
    return int(frame.select((pl.col("seen_at").is_null() | (pl.col("seen_at") < oldest)).sum()).item())


@flow(name="recommend_all", persist_result=False, validate_parameters=False)
def recommend_all_flow(workspace: str, out: str, dry_run: bool) -> dict[str, Any]:
    frame, fresh = read_states(workspace)
    decisions = decide(workspace, frame)
    write(workspace, decisions, out, dry_run)
    if fresh and not dry_run:
        remember(workspace, decisions)
    degraded = _stale(platform_of(workspace), frame) if fresh else len(frame)
    return {"players": len(decisions), "model_version": decisions["model_version"][0], "degraded": degraded, "logged": not dry_run}


def recommend_all(platform: Platform, out: str | Path, dry_run: bool = False, on_progress: Progress | None = None) -> dict[str, Any]:
    """Recommend for every player into `out` (.parquet, .csv or .ndjson), one row each: the columns of `decisions`, and `value`.

    Players of `serving.exclude` and of the holdout get no row. With `dry_run` nothing is logged.
    """
    if Path(out).suffix not in _WRITERS:
        raise ConfigurationError(f"--out {out}: expected a name that ends in {', '.join(_WRITERS)}")
    with running(platform, on_progress):
        found: dict[str, Any] = recommend_all_flow(str(platform.root), str(Path(out).resolve()), dry_run)
        return {"out": str(out), **found}
