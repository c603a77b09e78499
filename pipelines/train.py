"""Flow `train`: transitions to a policy (Lightning), with parameters, metrics, curves and the policy itself kept in an MLflow run."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, task

from fastq import registry
from fastq.errors import BundleError, TrainingError
from fastq.platform import Platform
from fastq.windows import Windows, held_out_players
from fastq.workspace import Workspace, replacing
from pipelines.distribute import connected, followed
from pipelines.materialize import build_features, windows_of
from pipelines.turn import ONCE_A_TURN, Progress, begin, forget, platform_of, progress, running

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastq.policy import Policy

AFRESH = "afresh"
TOGETHER, PROGRESS_FILE, REFUSED = "together", "progress.jsonl", "refused.txt"  # in the turn's directory: what workers learned, how far they are, why not
TRAINED = "trained"  # in the turn's directory: the policy as it was learned, before its evaluation is known


@task(name="train", **ONCE_A_TURN)
def train_policy(workspace: str, turn: str) -> dict[str, Any]:
    """Learn a policy. A stopped training goes on in its run from its last epoch."""
    from fastq import learner

    platform = platform_of(workspace)
    directory = Workspace(platform.root).runs / turn
    data = windows_of(workspace, turn)
    noted, tell = directory / "run.json", progress.get()
    earlier = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    begun, why = start_of(platform, data, earlier.get("from"))
    tags = {"turn": turn, "fingerprint": platform.fingerprint(), "start": why}
    with registry.start_run(platform, f"retrain {turn[:8]}", _parameters(platform, data), tags, resume=earlier.get("run_id")) as run:
        with replacing(noted) as partial:
            partial.write_text(json.dumps({"run_id": run.id, "from": begun.version if begun else AFRESH}), encoding="utf-8")

        def on_progress(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
            tell(stage, done, total, metrics)
            run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=done)

        try:
            if platform.training.workers > 1:
                policy = learn_together(platform, turn, begun.version if begun else None, on_progress)
            else:
                policy = learner.train(platform, data, directory, resume=True, on_progress=on_progress, start=begun)
        except SystemExit as stopped:  # Lightning's answer to Ctrl-C and SIGTERM; its code would say "refused" or even "done"
            raise KeyboardInterrupt from stopped
        stages: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(dict)
        for name, points in run.curves().items():
            stage, _, metric = name.partition("/")
            stages[stage][metric] = points
        for stage, found in stages.items():
            run.picture(stage.replace(" ", "_"), _curves(stage, found))
        told = policy.details.get("diagnostics", {}) | {f"balance/{name}": value for name, value in policy.details["balance"].items()}
        run.log({f"diagnostics/{name}": value for name, value in told.items()})
    made = directory / TRAINED
    shutil.rmtree(made, ignore_errors=True)  # left by a process that was killed while it saved
    policy.save(made)
    return {"run_id": run.id, "decisions": len(data), "players": len(data.player_ids), "start": why}


def start_of(platform: Platform, data: Windows, said: str | None = None) -> tuple[Policy | None, str]:
    """The champion, from which training goes on where the logs alone have grown; None where it starts afresh; and a sentence that says which, and why.

    `said` is what a stopped training had begun from, which it goes on from: a version, or `AFRESH`.
    """
    from fastq.features import fit_encoding

    version = registry.champion(platform) if said is None else said
    if version is None or version == AFRESH:
        return None, "afresh: there is no champion to go on from" if version is None else "afresh, as before it was stopped"
    try:
        policy = registry.load_policy(f"models:/{platform.platform}/{version}", platform.root)
    except BundleError as error:
        return None, f"afresh: {error}"
    ours, its = platform.training.model_dump(), policy.platform.training.model_dump()
    changed = [name for name in ours if name not in ("epochs", "seed", "alpha", "workers", "accelerator") and ours[name] != its[name]]
    before = int(policy.details.get("decisions", 0))
    learning = ~held_out_players(data.player_ids, platform.training.holdout, platform.training.seed)[data.player]
    known = fit_encoding(platform, data.matrix[:1], data.attributes.filter(learning)).vocabularies
    new = [name for name, values in known.items() if not set(values) <= set(policy.encoding.vocabularies.get(name, []))]
    reason = (
        f"fastq.yaml describes states, actions or objectives otherwise than when champion {version} was made"
        if policy.platform.fingerprint() != platform.fingerprint()
        else f"training.{', training.'.join(changed)} changed since champion {version}"
        if changed
        else f"the policies that acted are {', '.join(data.policies)}, and champion {version} knew {', '.join(policy.policies)}"
        if list(policy.policies) != list(data.policies)
        else f"{', '.join(new)} took values that champion {version} does not know"
        if new
        else "the preset paper always learns from the start"
        if platform.training.preset == "paper"
        else "items of a catalogue are encoded anew"
        if policy.catalogue is not None
        else f"the logs have not grown: champion {version} learned from {before:,} decisions"
        if len(data) <= before
        else None
    )
    if reason is not None:
        return None, f"afresh: {reason}"
    return policy, f"from champion {version}: the definition is the same, and the logs grew from {before:,} to {len(data):,} decisions"


def trained_policy(directory: Path) -> Policy:
    """What `train_policy` learned in this turn."""
    return policy_of(directory / TRAINED)


def policy_of(bundle: Path) -> Policy:
    from fastq.policy import Policy

    return Policy.load(bundle)


def _parameters(platform: Platform, data: Windows) -> dict[str, Any]:
    said = {f"training.{name}": value for name, value in platform.training.model_dump(mode="json").items()}
    for name, objective in platform.objectives.items():
        said |= {f"objectives.{name}.{key}": value for key, value in objective.model_dump(mode="json").items() if value is not None}
    return said | {"decisions": len(data), "players": len(data.player_ids), "policies": ", ".join(data.policies), "state.window": platform.state.window}


def _curves(stage: str, found: dict[str, list[tuple[int, float]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.8 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        axis.plot(*zip(*points, strict=True))
        axis.set_ylabel(name)
    axes[-1].set_xlabel("epoch")
    axes[0].set_title(stage)
    return figure


def learn_together(platform: Platform, turn: str, start: str | None, on_progress: Progress) -> Policy:
    """The same training by `training.workers` processes of Ray Train, each with Lightning and its part of every batch; the first one keeps record and policy.

    Raises `WorkspaceError` where the cluster cannot be reached or a worker fails twice; what a worker refuses is raised as it was.
    """
    directory = Workspace(platform.root).runs / turn
    config = {"workspace": str(platform.root.resolve()), "turn": turn, "start": start}
    for left in (TOGETHER, "ray"):
        shutil.rmtree(directory / left, ignore_errors=True)
    (directory / REFUSED).unlink(missing_ok=True)
    # what goes wrong where progress is told is not the cluster's fault, so that is what lies around
    with followed(directory / PROGRESS_FILE, on_progress), connected(platform, "train", platform.training.workers):
        import ray.train
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            learn_part,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(num_workers=platform.training.workers, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="ray", storage_path=str(directory.resolve()), failure_config=ray.train.FailureConfig(max_failures=1)),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:  # no error of Ray's own tree
            raise RuntimeError(str(error)) from error
    if (directory / REFUSED).exists():
        raise TrainingError((directory / REFUSED).read_text(encoding="utf-8"))
    return policy_of(directory / TOGETHER)


def learn_part(config: dict[str, Any]) -> None:
    """One worker's training, on whichever node: the record makes it go on where a killed group was."""
    import ray.train
    import torch

    from fastq import learner
    from fastq.representation import Part

    torch.set_num_threads(1)
    platform, turn = platform_of(config["workspace"]), config["turn"]
    directory = Workspace(platform.root).runs / turn
    context = ray.train.get_context()
    part = Part(context.get_world_rank(), context.get_world_size())
    start = None if config["start"] is None else registry.load_policy(f"models:/{platform.platform}/{config['start']}", platform.root)

    def tell(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        with (directory / PROGRESS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps([stage, done, total, metrics]) + "\n")

    try:
        policy = learner.train(platform, windows_of(config["workspace"], turn), directory, resume=True, on_progress=tell, start=start, part=part)
    except TrainingError as refusal:  # all of them come to it alike; to try again would not heal it
        if part.rank == 0:
            (directory / REFUSED).write_text(str(refusal), encoding="utf-8")
        return
    if part.rank == 0:
        shutil.rmtree(directory / TOGETHER, ignore_errors=True)
        policy.save(directory / TOGETHER)


@flow(name="train", persist_result=False, validate_parameters=False)
def train_flow(workspace: str, turn: str) -> dict[str, Any]:
    build_features(workspace, turn)
    document: dict[str, Any] = train_policy(workspace, turn)
    return document


def train(platform: Platform, *, resume: bool = False, on_progress: Progress | None = None) -> dict[str, Any]:
    """Train on the accepted tables and register the model, unjudged: the gate is `retrain`'s and `promote`'s."""
    workspace = Workspace(platform.root)
    with workspace.lock("retrain"), running(platform, on_progress):
        turn = begin(platform, resume=resume)
        found: dict[str, Any] = train_flow(str(platform.root), turn.id)
        version = registry.register(platform, found["run_id"], turn.directory / TRAINED)
        forget(workspace)
        return {"model": platform.platform, "version": version, **found}
