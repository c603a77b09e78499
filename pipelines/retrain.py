"""Flow `retrain`: the whole loop from logs to the promotion gate, one task per step, resumable at each of them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.context import TagsContext

from fastq import registry
from fastq.platform import Platform
from fastq.workspace import Workspace
from pipelines import monitor
from pipelines.evaluate import BUNDLE, evaluate_trained, keep_evaluation
from pipelines.ingest import ingest_logs
from pipelines.materialize import build_features
from pipelines.promote import make_champion
from pipelines.train import train_policy
from pipelines.turn import ONCE_A_TURN, RETRIES, Progress, begin, forget, limited, platform_of, running

WHO = "retrain"  # in the audit log


@task(name="register", **RETRIES, **ONCE_A_TURN)
def register_model(workspace: str, turn: str, run_id: str, passed: bool, reasons: list[str]) -> str:
    platform = platform_of(workspace)
    version = registry.register(platform, run_id, Workspace(platform.root).runs / turn / BUNDLE, {"turn": turn})
    registry.record_verdict(platform, version, passed=passed, reasons=reasons)
    bundle = registry.verify(Workspace(platform.root).runs / turn / BUNDLE)
    keep_evaluation(platform, version, bundle["details"]["evaluation"])
    return version


STEPS = ("ingest", "build features", "train", "evaluate", "note the reference", "register", "promote")


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain_flow(workspace: str, turn: str, since: str | None) -> dict[str, Any]:
    """One flow of tasks: a flow within a flow costs a second and shows nothing more. Progress and verdict are artifacts of the run."""
    platform = platform_of(workspace)
    step = StepsDone(platform)
    step.do(ingest_logs, workspace, turn, since)
    step.do(build_features, workspace, turn)
    trained = step.do(train_policy, workspace, turn)
    judged = step.do(evaluate_trained, workspace, turn, trained["run_id"])
    step.do(monitor.note_reference, workspace, turn)
    version = step.do(register_model, workspace, turn, trained["run_id"], judged["promoted"], judged["reasons"])
    monitor.keep_promise(workspace, turn, version)
    if judged["promoted"]:
        step.do(make_champion, workspace, version, "; ".join([judged["because"], *judged["reasons"]]), False, WHO)
    found = {"version": version, "promoted": judged["promoted"], "reasons": judged["reasons"], "estimates": judged["estimates"], "start": trained["start"]}
    step.verdict(found)
    return found


class StepsDone:
    """The steps of a turn as they are done: each under its time limit, shown as one progress artifact of the flow run."""

    def __init__(self, platform: Platform) -> None:
        self.platform, self.done = platform, 0
        made = create_progress_artifact(0.0, key=f"{_key(platform)}-progress", description=f"Retraining of {platform.platform}: {STEPS[0]}")
        self.artifact = cast("UUID", made)  # a coroutine only where one is awaited

    def do(self, step: Any, *arguments: Any) -> Any:
        with TagsContext(current_tags=set()):  # the flow run's tag is no task's: for each tag of a task the server is asked for a slot, and not twice
            found = limited(step, self.platform)(*arguments)
        self.done += 1
        next_one = STEPS[self.done] if self.done < len(STEPS) else "done"
        update_progress_artifact(self.artifact, 100.0 * self.done / len(STEPS), description=f"Retraining of {self.platform.platform}: {next_one}")
        return found

    def verdict(self, found: dict[str, Any]) -> None:
        """Report and verdict, for whoever looks at the run in Prefect."""
        update_progress_artifact(self.artifact, 100.0, description=f"Retraining of {self.platform.platform}: done")
        said = "was promoted" if found["promoted"] else "was not promoted"
        lines = [f"# {self.platform.platform} version {found['version']} {said}", *(f"- {reason}" for reason in found["reasons"]), f"- start: {found['start']}"]
        create_markdown_artifact("\n".join(lines), key=f"{_key(self.platform)}-verdict")
        rows = [row for row in found["estimates"] if row["objective"] is None]
        create_table_artifact(rows, key=f"{_key(self.platform)}-estimates", description="Weighted sum per decision, estimated on held-out players")


def _key(platform: Platform) -> str:
    """A platform's name as Prefect takes it in keys: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", platform.platform.lower()).strip("-")


def retrain(
    platform: Platform, since: datetime | None = None, *, resume: bool = False, wait_seconds: float = 0.0, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Retrain, evaluate and, if the gate lets it pass, promote. With `resume` a stopped turn goes on where it was.

    Raises `GateRefused` where the logs were refused, and `WorkspaceError` where another process is still retraining here after `wait_seconds`.
    """
    workspace = Workspace(platform.root)
    with workspace.lock("retrain", wait_seconds), running(platform, on_progress):
        turn = begin(platform, since, resume=resume)
        found: dict[str, Any] = retrain_flow(str(platform.root), turn.id, turn.since)
        forget(workspace)
        return {"model": platform.platform, **found}
