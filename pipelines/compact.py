"""Flow `compact`: the retention of whatever would grow for ever. What learning, estimating and an audit need stays; each other store has its own time.

Served decisions: the state that one saw is most of a row. After `operations.keep_states` it is dropped, as are idempotency keys; decisions, propensities
and outcomes stay, for they are the logs. A server may write meanwhile: each piece is one short transaction, and rows keep their ids. Refused rows, reports
and pictures, models that never were champion with MLflow's runs, flow runs in Prefect's books and backups go after times of their own (`operations.keep_…`).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from prefect import flow, task

from fastq import backup, records, registry
from fastq.errors import WorkspaceError
from fastq.platform import Platform
from fastq.workspace import Workspace, json_lines, replacing, sweep
from pipelines.turn import EACH_TIME, RETRIES, Progress, platform_of, progress, running

WHO = "compact"  # in the audit log
PAGE = 100  # of Prefect's runs
PIECE = 5_000  # rows of one transaction: a server waits for no longer than that takes


@task(name="drop old states", **RETRIES, **EACH_TIME)
def drop_old_states(workspace: str, now: str) -> dict[str, Any]:
    platform = platform_of(workspace)
    before = datetime.fromisoformat(now) - platform.operations.keep_states
    files = [*records.decision_logs(platform), *sorted(Workspace(platform.root).served.glob("[!.]*.parquet"))]
    size = sum(path.stat().st_size for path in files)
    dropped = 0
    for i, path in enumerate(files):
        progress.get()("dropping old states", i, len(files), {})
        dropped += _of_batch(path, before) if path.suffix == ".parquet" else _of_log(path, int(before.timestamp() * 1e6))
    freed = size - sum(path.stat().st_size for path in files)
    return {"states": dropped, "before": before.isoformat(), "bytes": freed, "files": len(files)}


@task(name="drop old files", **RETRIES, **EACH_TIME)
def drop_old_files(workspace: str, now: str) -> dict[str, Any]:
    """Refused rows, the reports of validations, what the monitor drew, backups, and what killed writers left. What is told of a model is the model's."""
    platform, moment = platform_of(workspace), datetime.fromisoformat(now)
    space, keep = Workspace(platform.root), platform.operations
    reports = [*space.reports.glob("validation-*"), *space.reports.glob("drift-*")]
    return {
        "quarantine": _older(space.quarantine.glob("*.parquet"), keep.keep_quarantine, moment),
        "reports": _older(reports, keep.keep_reports, moment),
        "backups": backup.expire(space, keep.keep_backups, moment),
        "unfinished": sweep(space),
    }


def _older(files: Iterable[Path], keep: timedelta | None, now: datetime) -> int:
    """Delete the files that were written longer ago than `keep`; how many."""
    gone = [path for path in files if keep is not None and path.is_file() and path.stat().st_mtime < (now - keep).timestamp()]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


@task(name="drop old models", **RETRIES, **EACH_TIME)
def drop_old_models(workspace: str, now: str) -> dict[str, Any]:
    """Versions that never were champion, unless a decision that can still be explained was theirs; with what was told of them."""
    platform = platform_of(workspace)
    space, keep = Workspace(platform.root), platform.operations.keep_models
    if keep is None:
        return {"models": [], "runs": 0}
    turn = (json_lines(space.runs / "turn.json") or [{}])[0]
    gone, runs = registry.retire(platform, datetime.fromisoformat(now) - keep, _explained(platform), turn.get("id"), WHO)
    for version in gone:
        told = [path for kind in ("evaluation", "truth") for path in space.reports.glob(f"{kind}-{version}.*")]
        for path in (*told, space.monitor / f"promised-{version}.json"):
            path.unlink(missing_ok=True)
    return {"models": gone, "runs": runs}


def _explained(platform: Platform) -> set[str]:
    """The versions of which a served decision still has its state, and so its explanation."""
    found: set[str | None] = set()
    for path in records.decision_logs(platform):
        with records.reading_log(path) as log:
            if {"model_version", "state"} <= records.columns_there(log, "decisions"):
                found |= {version for (version,) in log.execute("SELECT DISTINCT model_version FROM decisions WHERE state IS NOT NULL")}
    for path in Workspace(platform.root).served.glob("[!.]*.parquet"):
        if {"state", "model_version"} <= set(pl.read_parquet_schema(path)):
            found |= set(pl.scan_parquet(path, glob=False).filter(pl.col("state").is_not_null()).select("model_version").unique().collect()["model_version"])
    return {str(version) for version in found if version is not None}


@task(name="drop old runs", **RETRIES, **EACH_TIME)
def drop_old_runs(workspace: str, now: str) -> dict[str, Any]:
    """This workspace's flow runs that ended long ago, with what Prefect keeps of them; a server of several platforms keeps the others'."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    platform, moment = platform_of(workspace), datetime.fromisoformat(now)
    keep, space = platform.operations.keep_runs, Workspace(platform.root)
    if keep is None:
        return {"flow_runs": 0, "results": 0}
    old, dropped, others = FlowRunFilter(end_time=FlowRunFilterEndTime(before_=moment - keep)), 0, 0
    with get_client(sync_client=True) as client:
        while runs := client.read_flow_runs(flow_run_filter=old, sort=FlowRunSort.END_TIME_DESC, limit=PAGE, offset=others):
            for run in runs:
                if run.parameters.get("workspace") != workspace:
                    others += 1
                    continue
                with contextlib.suppress(ObjectNotFound):  # of a flow within one that is gone already
                    shown = {"artifacts": {"flow_run_id": {"any_": [str(run.id)]}}}  # the client's own way sends nulls, which the server refuses
                    for artifact in client.request("POST", "/artifacts/filter", json=shown).json():
                        client.delete_artifact(artifact["id"])
                    client.delete_flow_run(run.id)
                dropped += 1
    results = _older(space.prefect.joinpath("results").rglob("*"), keep, moment)
    return {"flow_runs": dropped, "results": results}


def _of_log(path: Path, before: int) -> int:
    """Of one server's log; the space is given back where nobody else has the file open, else used again by new rows."""
    dropped = 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as log:
            if "state" not in records.columns_there(log, "decisions"):  # of a server that was stopped before it had made its tables
                return 0
            last = 0
            while rows := log.execute(
                "SELECT rowid FROM decisions WHERE rowid > ? AND decided_at < ? AND state IS NOT NULL LIMIT ?", (last, before, PIECE)
            ).fetchall():
                last = rows[-1][0]
                log.execute("BEGIN IMMEDIATE")
                log.executemany("UPDATE decisions SET state = NULL WHERE rowid = ?", rows)
                log.execute("COMMIT")
                dropped += len(rows)
            log.execute("DELETE FROM requests WHERE recorded_at < ?", (before,))
            with contextlib.suppress(sqlite3.OperationalError):  # a server has it open: what was dropped is used again by its new rows
                log.execute("PRAGMA busy_timeout = 1000")
                log.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                log.execute("VACUUM")
                log.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # busy: it heals
        raise WorkspaceError(f"{path}: the log of served decisions cannot be read ({error}); restore it from a backup") from None
    return dropped


def _of_batch(path: Path, before: datetime) -> int:
    """Of one batch of `recommend --all`, which is written anew and whole."""
    schema = pl.read_parquet_schema(path)
    if "state" not in schema:
        return 0
    batch = pl.read_parquet(path)
    old = (pl.col("decided_at") < before) & pl.col("state").is_not_null()
    dropped = int(batch.select(old.sum()).item())
    if dropped:
        with replacing(path) as partial:
            batch.with_columns(pl.when(old).then(None).otherwise(pl.col("state")).alias("state")).write_parquet(partial)
    return dropped


@flow(name="compact", persist_result=False, validate_parameters=False)
def compact_flow(workspace: str, now: str) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for step in (drop_old_states, drop_old_files, drop_old_models, drop_old_runs):  # states first: a model is needed no longer than they are
        document |= step(workspace, now)
    return document


def compact(platform: Platform, on_progress: Progress | None = None) -> dict[str, Any]:
    """Drop what `operations.keep_…` say is old, and say how much of each that was."""
    with Workspace(platform.root).lock("compact", 60), running(platform, on_progress):
        document: dict[str, Any] = compact_flow(str(platform.root), datetime.now(UTC).isoformat())
        return document
