"""Flow `validate`: read the logs, judge them, keep the report and the refused rows."""

from __future__ import annotations

import gc
import importlib
import json
import threading
import uuid
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from prefect import flow, task

from fastq import overlap, records, report, validation
from fastq.platform import Platform
from fastq.records import AnyRecords, Judged
from fastq.workspace import Workspace, replacing
from pipelines.turn import EACH_TIME, RETRIES, Progress, platform_of, progress, relative, running

AHEAD = ("great_expectations", "sklearn.ensemble", "sklearn.model_selection", "matplotlib.figure")  # what the verdict, the overlap and the report import


def read(platform: Platform, since: datetime | None = None) -> Judged:
    """The logs, judged, as `records.judge` does; what to say of them takes seconds to import, and is imported meanwhile."""
    ahead = threading.Thread(target=lambda: [importlib.import_module(name) for name in AHEAD], daemon=True)  # an error does not wait for it
    gc.disable()  # modules are for good: collecting while they are read is a fifth of reading them
    try:
        ahead.start()
        found = records.judge(platform, since)
        ahead.join()  # two threads that import what imports each other may see halves of it
    finally:
        gc.enable()
    return found


def judged(platform: Platform, read: AnyRecords, *, whole: bool = True) -> dict[str, Any]:
    """The verdict on records as `fastq validate --json` gives it; it, its HTML report and the quarantine are kept beside earlier ones.

    `whole`: whether these are all of the logs, and not a stretch of them, which has fewer rows than were there before.
    """
    workspace = Workspace(platform.root)
    reference = validation.read_profile(workspace)
    reference = reference if whole or reference is None else replace(reference, rows={})
    verdict = validation.validate(platform, read, reference)
    shared = overlap.chances(platform, read) if verdict.passed else None
    pairs = overlap.overlaps(platform, shared) if verdict.passed else []
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
    page, quarantine = workspace.reports / f"validation-{name}.html", workspace.quarantine / f"{name}.parquet"
    workspace.make(workspace.reports, workspace.quarantine)
    with replacing(quarantine) as partial:
        read.held("quarantine").lazy().sink_parquet(partial)
    with replacing(page) as partial:
        partial.write_text(report.validation_page(platform, read, verdict, pairs, shared), encoding="utf-8")
    decisions = read.counts["decisions"]
    document = {
        "passed": verdict.passed,
        "accepted": decisions.accepted,
        "quarantined": decisions.quarantined,
        "repeated": decisions.repeated,
        "quarantine": relative(platform, quarantine),
        "rules": [{"rule": rule.rule, "failed": rule.failed, "severity": rule.severity, "passed": rule.passed} for rule in verdict.rules],
        "report": relative(platform, page),
        "reasons": verdict.reasons,
        "warnings": verdict.warnings,
        "overlap": [asdict(pair) for pair in pairs],
    }
    with replacing(page.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(document), encoding="utf-8")
    return document


@task(name="read the logs and judge them", **RETRIES, **EACH_TIME)
def read_and_judge(workspace: str) -> dict[str, Any]:
    platform = platform_of(workspace)
    progress.get()("reading and judging the logs", 0, 1, {})
    document = judged(platform, read(platform))
    progress.get()("reading and judging the logs", 1, 1, {})
    return document


@flow(name="validate", persist_result=False, validate_parameters=False)
def validate_flow(workspace: str) -> dict[str, Any]:
    document: dict[str, Any] = read_and_judge(workspace)
    return document


def validate_logs(platform: Platform, on_progress: Progress | None = None) -> dict[str, Any]:
    """Validate the logs of a workspace; `passed` says whether they may be learned from. Changes nothing that training reads."""
    with running(platform, on_progress):
        document: dict[str, Any] = validate_flow(str(platform.root))
        return document
