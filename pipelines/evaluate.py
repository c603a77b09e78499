"""Flow `evaluate`: what a model would bring, estimated from logs of other policies on players it never learned from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefect import flow, task

from fastq import features, records, registry, windows
from fastq.errors import BundleError
from fastq.platform import Platform
from fastq.workspace import Workspace
from pipelines.materialize import windows_of
from pipelines.train import trained_policy
from pipelines.turn import EACH_TIME, ONCE_A_TURN, RETRIES, Progress, platform_of, progress, running

if TYPE_CHECKING:
    from fastq.policy import Policy

BUNDLE = "bundle"  # in the turn's directory: the trained policy together with its evaluation


def registered_policy(platform: Platform, reference: str) -> Policy:
    return registry.load_policy(f"models:/{platform.platform}/{registry.resolve(platform, reference)}", platform.root)


def comparable_champion(platform: Platform) -> tuple[Policy | None, list[str]]:
    """The champion to be measured against; one that was made for other features can't be run on these windows, which is said."""
    version = registry.champion(platform)
    if version is None:
        return None, []
    try:
        return registered_policy(platform, version), []
    except BundleError as error:
        if "other features" not in str(error):
            raise
        return None, [f"champion version {version} was made for other features than fastq.yaml describes now, so the behaviour policies are the measure"]


def plain(tree: Any) -> Any:
    """A tree as JSON can hold it: NaN and infinity become null."""
    return json.loads(json.dumps(tree, default=lambda value: value.item()), parse_constant=lambda _: None)


@task(name="evaluate", **ONCE_A_TURN)
def evaluate_trained(workspace: str, turn: str, run_id: str) -> dict[str, Any]:
    """Judge this turn's policy against the champion; the bundle that is registered carries the report."""
    from fastq import evaluation

    platform = platform_of(workspace)
    directory = Workspace(platform.root).runs / turn
    progress.get()("evaluating", 0, 1, {})
    policy = trained_policy(directory)
    champion, notes = comparable_champion(platform)
    report = evaluation.evaluate(policy, windows_of(workspace, turn), champion)
    document = plain(report.to_dict())
    shutil.rmtree(directory / BUNDLE, ignore_errors=True)
    replace(policy, details=policy.details | {"evaluation": document}).save(directory / BUNDLE)
    with registry.start_run(platform, "", {}, resume=run_id) as run:
        run.log({f"{row['policy']}/{row['objective'] or 'weighted sum'}/{row['estimator']}": row["value"] for row in report.estimates})
        run.document("evaluation.json", document)
        run.picture("estimates", _intervals(report.estimates))
    progress.get()("evaluating", 1, 1, {})
    return {"promoted": report.promoted, "reasons": [*report.reasons, *notes], "estimates": plain(report.estimates)}


def _intervals(estimates: list[dict[str, Any]]) -> Any:
    """The estimates of the weighted sum with their intervals."""
    from matplotlib.figure import Figure

    rows = [row for row in estimates if row["objective"] is None] or estimates
    figure = Figure(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for height, row in enumerate(reversed(rows)):
        axis.plot([row["low"], row["high"]], [height, height], color="tab:blue")
        axis.plot(row["value"], height, "o", color="tab:blue")
    axis.set_yticks(range(len(rows)), [f"{row['policy']} ({row['estimator']})" for row in reversed(rows)])
    axis.set_xlabel("weighted sum per decision")
    return figure


@task(name="estimate", **RETRIES, **EACH_TIME)
def estimate(workspace: str, model: str, against: str | None) -> dict[str, Any]:
    """Estimates on the logs as they are now, served decisions among them."""
    from fastq import evaluation

    platform = platform_of(workspace)
    tell = progress.get()
    tell("evaluating", 0, 2, {})
    version = registry.resolve(platform, model)
    policy = registered_policy(platform, version)
    other = registered_policy(platform, against) if against else None
    read = records.read_records(platform)
    data = windows.build(platform, read, features.build_rows(platform, read))
    tell("evaluating", 1, 2, {})
    report = evaluation.evaluate(policy, data, other)
    tell("evaluating", 2, 2, {})
    names = {"model": platform.platform, "version": version, "against": other.version if other else None}
    return {**names, **plain(report.to_dict()), "estimates": plain(report.estimates)}


@flow(name="evaluate", persist_result=False, validate_parameters=False)
def evaluate_flow(workspace: str, model: str, against: str | None) -> dict[str, Any]:
    document: dict[str, Any] = estimate(workspace, model, against)
    return document


def evaluate(platform: Platform, model: str | None = None, against: str | None = None, on_progress: Progress | None = None) -> dict[str, Any]:
    """Off-policy estimates of a version or alias (default: the champion, else the newest version), beside `against` if given."""
    if model is None:
        known = registry.models(platform)
        model = registry.champion(platform) or (known[0]["version"] if known else registry.CHAMPION)
    with running(platform, on_progress):
        document: dict[str, Any] = evaluate_flow(str(platform.root), model, against)
        return document
