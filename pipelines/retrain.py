"""Flow `retrain`: the whole loop from logs to the promotion gate, one task per step, resumable at each of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from prefect import flow, task

from fastq import registry
from fastq.platform import Platform
from fastq.workspace import Workspace
from pipelines.evaluate import BUNDLE, evaluate_trained
from pipelines.ingest import ingest_logs
from pipelines.materialize import build_features
from pipelines.promote import make_champion
from pipelines.train import train_policy
from pipelines.turn import ONCE_A_TURN, RETRIES, Progress, begin, forget, platform_of, running

WHO = "retrain"  # in the audit log


@task(name="register", **RETRIES, **ONCE_A_TURN)
def register_model(workspace: str, turn: str, run_id: str, passed: bool, reasons: list[str]) -> str:
    platform = platform_of(workspace)
    version = registry.register(platform, run_id, Workspace(platform.root).runs / turn / BUNDLE, {"turn": turn})
    registry.record_verdict(platform, version, passed=passed, reasons=reasons)
    return version


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain_flow(workspace: str, turn: str, since: str | None) -> dict[str, Any]:
    """One flow of tasks: a flow within a flow costs a second and shows nothing more."""
    ingest_logs(workspace, turn, since)
    build_features(workspace, turn)
    trained = train_policy(workspace, turn)
    judged = evaluate_trained(workspace, turn, trained["run_id"])
    version = register_model(workspace, turn, trained["run_id"], judged["promoted"], judged["reasons"])
    if judged["promoted"]:
        make_champion(workspace, version, "; ".join(judged["reasons"]), False, WHO)
    return {"version": version, "promoted": judged["promoted"], "reasons": judged["reasons"], "estimates": judged["estimates"]}


def retrain(platform: Platform, since: datetime | None = None, *, resume: bool = False, on_progress: Progress | None = None) -> dict[str, Any]:
    """Retrain, evaluate and, if the gate lets it pass, promote. With `resume` a stopped turn goes on where it was.

    Raises `GateRefused` where the logs were refused, and `WorkspaceError` where another process is retraining here.
    """
    workspace = Workspace(platform.root)
    with workspace.lock("retrain"), running(platform, on_progress):
        turn = begin(platform, since, resume=resume)
        found: dict[str, Any] = retrain_flow(str(platform.root), turn.id, turn.since)
        forget(workspace)
        return {"model": platform.platform, **found}
