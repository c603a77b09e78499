"""The flows as a Prefect server runs them, by its schedules and workers; `fastq deploy` puts them there, as `infra/prefect.yaml` does by Prefect's own command.

A deployment takes the workspace's path alone: everything else stands in its `fastq.yaml`, which the worker's machine must see.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from prefect import flow, task

from fastq.environment import DEFAULTS, prepare
from fastq.errors import ConfigurationError, GateRefused, WorkspaceError
from fastq.platform import FILE_NAME, Platform, load_platform
from fastq.workspace import Workspace, replacing
from pipelines.notify import notify
from pipelines.turn import EACH_TIME, PATIENCE

HOURLY, NIGHTLY, WEEKLY = "7 * * * *", "30 4 * * *", "0 5 * * 0"
WAIT_FOR_ANOTHER = 12 * 3_600.0  # seconds
RUNS_WITH = {name: DEFAULTS[name] for name in ("PREFECT_CLIENT_RETRY_EXTRA_CODES",)}  # read before a flow of ours begins, whoever started the worker


def _platform(workspace: str) -> Platform:
    prepare(Workspace(Path(workspace)))
    return load_platform(Path(workspace) / FILE_NAME)


@flow(name="fastq retrain", persist_result=False, validate_parameters=False)
def retrain(workspace: str) -> dict[str, Any]:
    """One retraining; a stopped one goes on where it was. A refusal is an answer, not a failure: it is posted, and the run completes."""
    from pipelines.retrain import retrain as whole

    platform = _platform(workspace)
    try:
        found = whole(platform, resume=True, wait_seconds=WAIT_FOR_ANOTHER)
    except GateRefused as refusal:
        found = {"model": platform.platform, "version": None, "promoted": False, "reasons": refusal.reasons}
    except Exception as error:
        notify(platform, "failure", f"retraining failed: {error}", {"error": str(error)})
        raise
    if not found["promoted"]:
        notify(platform, "refusal", f"version {found['version'] or '(none)'} was not promoted: {'; '.join(found['reasons'])}", found)
    return found


@flow(name="fastq monitor", persist_result=False, validate_parameters=False)
def monitor(workspace: str) -> dict[str, Any]:
    """One look; a finding starts a retraining, by the deployment beside this one if there is one. Before the first retraining there is nothing to look at."""
    from pipelines.monitor import monitor as look

    platform = _platform(workspace)
    if not Workspace(platform.root).watched.exists():
        return {"findings": [], "new": [], "drift": False, "notes": ["nothing was trained yet, so there is nothing to compare with"]}
    found = look(platform)
    if found["drift"]:
        start_retraining(platform.platform)
    return found


@task(name="start a retraining", **PATIENCE, **EACH_TIME)
def start_retraining(name: str) -> None:
    """A finding is told once, so that a server which is away for a minute must not swallow what follows from it."""
    from prefect.deployments import run_deployment
    from prefect.exceptions import ObjectNotFound

    with contextlib.suppress(ObjectNotFound):
        run_deployment(f"fastq retrain/{name}-retrain", timeout=0, as_subflow=False)


@flow(name="fastq recommend-all", persist_result=False, validate_parameters=False)
def recommend_all(workspace: str) -> dict[str, Any]:
    """Everybody's recommendations into `recommendations.parquet` of the workspace."""
    from pipelines.recommend_all import recommend_all as batch

    platform = _platform(workspace)
    return batch(platform, platform.root / "recommendations.parquet")


@flow(name="fastq compact", persist_result=False, validate_parameters=False)
def compact(workspace: str) -> dict[str, Any]:
    """The retention of whatever would grow for ever (`operations.keep_…`)."""
    from pipelines.compact import compact as smaller

    return smaller(_platform(workspace))


def deploy(platform: Platform, server: str | None, pool: str, cron: str, zone: str) -> dict[str, Any]:
    """Put the four deployments onto a Prefect server, each at most once at a time; again is an update. Returns their names, times and ids.

    Raises `ConfigurationError` where no server is named, `WorkspaceError` where it can't be reached.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from pipelines.schedule import clock

    clock(cron, zone)
    url = server or PREFECT_API_URL.value()
    if not url:
        raise ConfigurationError("deploy: expected a Prefect server: --server http://127.0.0.1:4200/api, or PREFECT_API_URL (start one: prefect server start)")
    url = url.rstrip("/")
    with temporary_settings({PREFECT_API_URL: url}):
        try:
            made = _deployed(platform, pool, cron, zone)
        except Exception as error:
            import httpx

            if isinstance(error, httpx.HTTPError) or "connect" in str(error).lower():
                raise WorkspaceError(f"{url}: no Prefect server answers there ({error}); start one: prefect server start") from None
            raise
    with replacing(Workspace(platform.root).state / "deployed.json") as partial:
        partial.write_text(json.dumps({"server": url, "pool": pool}), encoding="utf-8")
    return {"server": url, "pool": pool, "deployments": made}


def _deployed(platform: Platform, pool: str, cron: str, zone: str) -> list[dict[str, Any]]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    made = []
    for step, when in ((retrain, cron), (monitor, HOURLY), (recommend_all, NIGHTLY), (compact, WEEKLY)):
        name = f"{platform.platform}-{step.name.removeprefix('fastq ')}"
        deployment = RunnerDeployment.from_flow(
            step,
            name=name,
            schedule=Cron(when, timezone=zone if step is retrain else "UTC"),
            parameters={"workspace": str(platform.root)},
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            entrypoint_type=EntrypointType.MODULE_PATH,
            work_pool_name=pool,
            job_variables={"env": RUNS_WITH},
            tags=["fastq", platform.platform],
        )
        made.append({"name": f"{step.name}/{name}", "when": f"{when} {zone if step is retrain else 'UTC'}", "id": str(deployment.apply())})
    return made
