"""Flow `evaluate`: what a model would bring, estimated from logs of other policies on players it never learned from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prefect import flow, task

from fastq import densities, features, overlap, records, registry, report, windows
from fastq.errors import BundleError
from fastq.platform import Platform
from fastq.workspace import Workspace
from pipelines.materialize import windows_of
from pipelines.train import trained_policy
from pipelines.turn import EACH_TIME, ONCE_A_TURN, RETRIES, Progress, keep_report, platform_of, progress, running

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
    before = [evaluation.Attempt(line["at"], line["data_until"], line["promoted"]) for line in registry.attempts(platform, before=turn)]
    data, now = windows_of(workspace, turn), datetime.now(UTC)
    found = evaluation.evaluate(policy, data, champion, attempts=before, now=now)
    shared = overlap.read_overlaps(Workspace(platform.root))
    document = overlap.said_in(plain(found.to_dict()), shared) | {"notes": notes}
    densities.write_calibrations(Workspace(platform.root), found.densities)
    registry.record_attempt(
        platform,
        turn,
        at=int(now.timestamp() * 1e6),
        data_until=int(data.moment.max()),
        promoted=found.promoted,
        alpha=found.alpha,
        reasons=found.reasons,
    )
    shutil.rmtree(directory / BUNDLE, ignore_errors=True)
    replace(policy, details=policy.details | {"evaluation": document, "overlap": [asdict(pair) for pair in shared]}).save(directory / BUNDLE)
    with registry.start_run(platform, "", {}, resume=run_id) as run:
        run.log({f"{row['policy']}/{row['objective'] or 'weighted sum'}/{row['estimator']}": row["value"] for row in found.estimates})
        run.document("evaluation.json", document)
        run.picture("estimates", report.estimates_figure(document["estimates"]))
        run.page("evaluation.html", report.evaluation_page(platform, document))
    progress.get()("evaluating", 1, 1, {})
    return {"promoted": found.promoted, "reasons": [*found.reasons, *notes], "because": because(document), "estimates": plain(found.estimates)}


def because(document: dict[str, Any]) -> str:
    """Why a candidate passed, in one sentence for the audit log."""
    if document["difference"] is None or not document["promoted"]:
        return ""
    value, low, high = (document["difference"][name] for name in ("value", "low", "high"))
    return f"the gate passed it: better than {document['against']} by {value:.3g} ({low:.3g} to {high:.3g}), {document['alpha_because']}"


def keep_evaluation(platform: Platform, version: str, document: dict[str, Any]) -> dict[str, str]:
    """Keep one candidate's report; where it lies."""
    return keep_report(platform, f"evaluation-{version}", report.evaluation_page(platform, document, version), document)


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
    asked = [] if version == registry.champion(platform) else registry.attempts(platform)  # the champion need not pass again
    before = [evaluation.Attempt(line["at"], line["data_until"], line["promoted"]) for line in asked]
    found = evaluation.evaluate(policy, data, other, attempts=before)
    document = overlap.said_in(plain(found.to_dict()), overlap.read_overlaps(Workspace(platform.root)))
    densities.write_calibrations(Workspace(platform.root), found.densities)
    tell("evaluating", 2, 2, {})
    kept = keep_evaluation(platform, version, document)
    return {"model": platform.platform, "version": version, **document, **kept}


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
