"""Flow `ingest`: logs and served decisions through the validation gate into the accepted tables."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from prefect import flow, task

from fastq import overlap, records, validation
from fastq.errors import GateRefused
from fastq.platform import Platform
from fastq.workspace import Workspace
from pipelines.turn import ONCE_A_TURN, RETRIES, Progress, begin, forget, platform_of, progress, running
from pipelines.validate import judged, read


@task(name="ingest", **RETRIES, **ONCE_A_TURN)
def ingest_logs(workspace: str, turn: str, since: str | None) -> dict[str, Any]:
    """Read, judge and keep; a refused log overwrites nothing. `turn` makes the result this turn's own."""
    platform = platform_of(workspace)
    progress.get()("reading and judging the logs", 0, 1, {})
    found = read(platform, datetime.fromisoformat(since) if since else None)
    document = judged(platform, found, whole=since is None)
    if not document["passed"]:
        raise GateRefused(f"the logs were refused (report: {document['report']})", document["reasons"])
    kept = Workspace(platform.root)
    reference = validation.profile(platform, found)
    records.write_tables(found.records(), kept)
    if since is None:  # a stretch of the logs is no measure for the whole
        validation.write_profile(kept, reference)
    overlap.write_overlaps(kept, [overlap.Overlap(**pair) for pair in document["overlap"]])
    progress.get()("reading and judging the logs", 1, 1, {})
    return document


@flow(name="ingest", persist_result=False, validate_parameters=False)
def ingest_flow(workspace: str, turn: str, since: str | None) -> dict[str, Any]:
    document: dict[str, Any] = ingest_logs(workspace, turn, since)
    return document


def ingest(platform: Platform, since: datetime | None = None, on_progress: Progress | None = None) -> dict[str, Any]:
    """Replace the accepted tables; a stopped retraining can't be resumed on other tables, so it is forgotten. Raises `GateRefused`."""
    with Workspace(platform.root).lock("retrain"), running(platform, on_progress):
        turn = begin(platform, since)
        document: dict[str, Any] = ingest_flow(str(platform.root), turn.id, turn.since)
        forget(Workspace(platform.root))
        return document
