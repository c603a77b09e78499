"""Flow `compact`: the retention of served decisions. What learning and estimating need stays; what only explanations as of then need goes when it is old.

The state that a decision saw is most of a row. After `operations.keep_states` it is dropped, as are idempotency keys; decisions, propensities and
outcomes stay for ever. A server may write meanwhile: each piece is one short transaction, and rows keep their ids. Backups expire here too, so that they
do where nobody makes new ones by the day.
"""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from prefect import flow, task

from fastq import backup, records
from fastq.errors import WorkspaceError
from fastq.platform import Platform
from fastq.workspace import Workspace, replacing
from pipelines.turn import EACH_TIME, RETRIES, Progress, platform_of, progress, running

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
    expired = backup.expire(Workspace(platform.root), platform.operations.keep_backups, datetime.fromisoformat(now))
    return {"states": dropped, "before": before.isoformat(), "bytes": freed, "files": len(files), "backups": expired}


def _of_log(path: Path, before: int) -> int:
    """Of one server's log; the space is given back where nobody else has the file open, else used again by new rows."""
    dropped = 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as log:
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
    document: dict[str, Any] = drop_old_states(workspace, now)
    return document


def compact(platform: Platform, on_progress: Progress | None = None) -> dict[str, Any]:
    """Drop what `operations.keep_states` says is old; says how many states and how many bytes that were."""
    with Workspace(platform.root).lock("compact", 60), running(platform, on_progress):
        document: dict[str, Any] = compact_flow(str(platform.root), datetime.now(UTC).isoformat())
        return document
