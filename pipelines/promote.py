"""Flow `promote`: a version becomes the champion, if the gate let it pass or somebody overrules the gate with a reason."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from fastq import registry
from fastq.platform import Platform
from pipelines.turn import EACH_TIME, RETRIES, Progress, platform_of, running


@task(name="promote", **RETRIES, **EACH_TIME)
def make_champion(workspace: str, version: str, reason: str, forced: bool, who: str) -> str:
    return registry.promote(platform_of(workspace), version, reason=reason, forced=forced, who=who)


@flow(name="promote", persist_result=False, validate_parameters=False)
def promote_flow(workspace: str, version: str, reason: str, forced: bool, who: str) -> str:
    promoted: str = make_champion(workspace, version, reason, forced, who)
    return promoted


def promote(
    platform: Platform, version: str, *, reason: str = "", forced: bool = False, who: str = "fastq", on_progress: Progress | None = None
) -> dict[str, Any]:
    """Make a version the champion. Raises `GateRefused` with the gate's reasons."""
    with running(platform, on_progress):
        return {"model": platform.platform, "version": promote_flow(str(platform.root), version, reason, forced, who), "promoted": True}
