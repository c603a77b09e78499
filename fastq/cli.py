"""The front door: every command, what it prints and what it ends with.

Standard output carries the answer alone, a table for people or one JSON document for programs; progress, logs and whatever
libraries print go to standard error. Everything heavy is imported inside a command, so `fastq --help` costs a third of a second.
This is the only module that may open the entry points.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from fastq import terminal
from fastq.errors import ConfigurationError, FastqError, GateRefused
from fastq.terminal import Document

if TYPE_CHECKING:
    from datetime import timedelta

    from rich.console import RenderableType

    from fastq.platform import Platform

View = Callable[[Document], Iterable["RenderableType | bytes"]]  # bytes: as they are

CRASHED = 70  # EX_SOFTWARE: a mistake of ours, told apart from 1 (a gate refused) and 2 (usage or configuration)
LONGEST_WAIT = 24 * 3_600.0  # seconds for which --wait waits
PICTURES = (".png", ".svg", ".pdf")
PATIENCE = 10.0  # seconds in which repeated signals do not cut the cleaning up short

app = typer.Typer(
    name="fastq",
    help="Better recommendation policies from logs of several behaviour policies: validated, trained, evaluated off-policy, explained and served.",
    epilog="Commands work on the directory of a fastq.yaml: the current one, or --workspace DIR. They end with 0 when done, "
    "1 when a gate refused the data or the model, 2 when the command or the configuration is wrong. Start with: fastq demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(help="Keys of the endpoint and the console; only hashes are kept.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")

WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", metavar="DIR", help="The directory of fastq.yaml.", show_default="the current directory")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else there.")]
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Kept in the audit log with who and when.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Log no decision.")]


class DemoLogs(StrEnum):
    """What the demo runs on."""

    arena = "arena"
    open_bandit = "open-bandit"


class ExportFormat(StrEnum):
    """What another runtime can read."""

    onnx = "onnx"


class Role(StrEnum):
    """What a key may do; each includes those before it."""

    recommend = "recommend"
    analyst = "analyst"
    admin = "admin"


# ---- the loop ----------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the demo's workspace is made.", show_default="fastq-demo")] = Path("fastq-demo"),
    logs: Annotated[DemoLogs, typer.Option(help="A simulated platform whose truth is known, or the Open Bandit Dataset's real logs.")] = DemoLogs.arena,
    seed: Annotated[int, typer.Option(help="Of the simulated platform and of the training.", min=0)] = 0,
    players: Annotated[int, typer.Option(help="Players of the simulated platform.", min=10)] = 3_000,
    days: Annotated[int, typer.Option(help="Days of the simulated platform.", min=10)] = 40,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Start afresh in a directory that holds an earlier demo, or go on where it stopped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A simulated platform end to end, from logs to an explanation.

    Logs, validation, features, training, evaluation, promotion, serving, recommendations and one explanation; says what it did and
    where to look next.
    """
    with answering(as_json) as answer:
        from fastq.environment import prepare
        from fastq.workspace import Workspace

        prepare(Workspace(directory))
        from pipelines import demo as story

        document = story.demo(directory, logs=logs.value, seed=seed, players=players, days=days, fresh=fresh)
        answer(document, story.account)
    _end(refused=not document["promoted"])


@app.command(epilog="Quote a pattern, so that the shell hands it on whole: --decisions 'logs/decisions-*.parquet'")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The workspace to be; fastq.yaml is written there.")],
    decisions: Annotated[str, typer.Option(metavar="PATH", help="Path, pattern or URL of the decisions: Parquet, CSV or NDJSON.")],
    activity: Annotated[str | None, typer.Option(metavar="PATH", help="What players did: player_id, occurred_at, one numeric column per measure.")] = None,
    players: Annotated[str | None, typer.Option(metavar="PATH", help="Attributes of players.")] = None,
    proposals: Annotated[str | None, typer.Option(metavar="PATH", help="What each behaviour policy would have done.")] = None,
    items: Annotated[str | None, typer.Option(metavar="PATH", help="Item features, for a catalogue.")] = None,
    action: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A column of decisions that is an action dimension; repeat for each. Guessed if left out.")
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A column of decisions that is an objective; repeat for each. Guessed if left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a fastq.yaml that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write DIR/fastq.yaml from your own logs, guesses marked."""
    with answering(as_json) as answer:
        from fastq.environment import prepare
        from fastq.inference import infer_platform_file
        from fastq.platform import FILE_NAME
        from fastq.workspace import Workspace, replacing

        prepare()
        target = directory / FILE_NAME
        if target.exists() and not force:
            raise ConfigurationError(f"{target}: is already there; remove it, or replace it with --force")
        text = infer_platform_file(
            directory, decisions, activity=activity, players=players, proposals=proposals, items=items, actions=action, objectives=objective
        )
        Workspace(directory).make(directory)
        with replacing(target) as partial:
            partial.write_text(text, encoding="utf-8")
        guesses = [line.strip() for line in text.splitlines() if "#" in line]
        answer({"written": str(target), "guesses": guesses}, terminal.written)


@app.command("import")
def import_dataset(
    dataset: Annotated[list[str], typer.Argument(metavar="DATASET", help="A Minari data set's directory, or the id of one that was downloaded.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The workspace to be; fastq.yaml and logs/ are written there.")],
    window: Annotated[int, typer.Option(help="Steps that a state looks back.", min=1, max=1_000)] = 4,
    discount: Annotated[float, typer.Option(help="Of the reward, per step.", min=0, max=0.9999)] = 0.99,
    force: Annotated[bool, typer.Option("--force", help="Replace a fastq.yaml that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write DIR/fastq.yaml and logs from a Minari data set.

    An episode becomes a player, a step a day. Each data set is one behaviour policy; one alone is enough. Then: fastq retrain --workspace DIR
    """
    with answering(as_json) as answer:
        from fastq.environment import prepare

        prepare()
        from fastq.episodes import import_minari

        answer(import_minari(dataset, out, window=window, discount=discount, force=force), terminal.imported)


@app.command()
def validate(workspace: WorkspaceOption = Path(), as_json: JsonOption = False) -> None:
    """Judge the logs: verdict, report, quarantine of bad rows."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from pipelines.validate import validate_logs

        document = validate_logs(platform)
        answer(document, terminal.validation)
    _end(refused=not document["passed"])


@app.command()
def retrain(
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Leave out decisions made before this time: 2026-03-01, or 2026-03-01T06:00:00Z.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stopped run was.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a retraining that is under way here, instead of refusing.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """The whole flow, from logs to the promotion gate."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from pipelines.retrain import retrain as flow

        try:
            document = flow(platform, since=None if since is None else _moment(since), resume=resume, wait_seconds=LONGEST_WAIT if wait else 0.0)
        except GateRefused as refusal:  # the logs were refused, so there is no version
            document = {"model": platform.platform, "version": None, "promoted": False, "reasons": refusal.reasons}
        answer(document, terminal.training)
    _end(refused=not document["promoted"])


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A version or an alias.", show_default="champion")] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Another version or alias, to be estimated beside it.")] = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """What a model would bring, estimated off-policy.

    Estimates of the model and of the behaviour policies, each with an interval and a verdict on itself.
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from pipelines.evaluate import evaluate as flow

        document = flow(platform, model, against)
        answer(document, terminal.estimates)
    _end(refused=_nothing_to_trust(document, platform))


@app.command(epilog="Cells are kept as they are finished under .fastq/benchmark: run the same command again and it goes on where it was stopped.")
def benchmark(
    world: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A simulated platform; repeat for several. Without it: this workspace's own logs."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A rival; repeat for several. All that can be run, if left out.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of log and training, paired over all methods (simulator).", min=1)] = 10,
    first_seed: Annotated[int, typer.Option(help="The first of them.", min=0)] = 0,
    players: Annotated[int, typer.Option(help="Players of each simulated log.", min=50)] = 2_000,
    days: Annotated[int, typer.Option(help="Days of each simulated log.", min=10)] = 40,
    steps: Annotated[int, typer.Option(help="Gradient steps of each d3rlpy method.", min=1)] = 20_000,
    processes: Annotated[int, typer.Option(help="Simulated logs that are learned from at a time, by a process of a gigabyte or so each.", min=1)] = 1,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """FAST-Q against its rivals and the behaviour policies.

    On simulated platforms in truth, or on your own logs by the gate's off-policy estimates.
    """
    with answering(as_json) as answer:
        from fastq import benchmark as study
        from fastq.environment import prepare
        from fastq.platform import FILE_NAME
        from fastq.workspace import Workspace

        methods = tuple(method) if method else study.METHODS
        if not world and not (workspace / FILE_NAME).exists():
            raise ConfigurationError(f"{workspace / FILE_NAME}: not there, so there are no logs to compare on; name a simulated platform with --world")
        place = Workspace(workspace.resolve())
        prepare(place)
        place.make()
        from pipelines.turn import drawn

        with place.lock("benchmark"), drawn() as show:
            if world:
                asked = study.Study(tuple(world), tuple(range(first_seed, first_seed + seeds)), players, days, methods, steps)
                document = study.on_simulator(asked, place.state / "benchmark", show, processes)
            else:
                document = study.on_logs(_platform(workspace), methods, steps, show)
        answer(document, terminal.benchmark)


# ---- serving -----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; put a firewall before any other than loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535)] = 8000,
    workspace: WorkspaceOption = Path(),
) -> None:
    """Run the endpoint and the analyst console until a signal."""
    platform = _platform(workspace)
    from serving.app import serve as run_server

    run_server(platform, host, port)


@app.command()
def recommend(
    players: Annotated[list[str] | None, typer.Argument(metavar="PLAYER", help="Ids of players.", show_default=False)] = None,
    everybody: Annotated[bool, typer.Option("--all", help="Every player that is known, in one batch; needs --out.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Parquet file of a batch: one row per player, the columns of decisions.")] = None,
    dry_run: DryRunOption = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Recommend for some players now, or for all into a file."""
    with answering(as_json) as answer:
        if everybody == bool(players):
            raise ConfigurationError("recommend: expected either the ids of players, or --all with --out FILE")
        if everybody != (out is not None):
            raise ConfigurationError("recommend: --all and --out FILE go together; a few players are printed")
        platform = _platform(workspace)
        if out is not None:
            from pipelines.recommend_all import recommend_all

            document = recommend_all(platform, out, dry_run=dry_run)
            served = bool(document.get("players"))
            answer(document, terminal.batch)
        else:
            from serving.online import recommend as recommend_online

            document = recommend_online(platform, list(players or []), dry_run=dry_run)
            served = bool(document["recommendations"])
            answer(document, terminal.recommendations)
    _end(refused=not served)


@app.command()
def explain(
    subject: Annotated[
        str | None,
        typer.Argument(metavar="DECISION|PLAYER", help="A decision that was served, as it was decided then; or a player, as of now.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="What to compare with: a behaviour policy, logged, model:VERSION, or an action as dimension=value,dimension=value."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="OBJECTIVE=WEIGHT,…", help="What if the objectives weighed otherwise: cost=-2,joy=1. Those left out keep their weight."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: .png, .svg or .pdf.")] = None,
    everybody: Annotated[
        bool, typer.Option("--all", help="Every player that is known, into a file; needs --out. Run again, it goes on where it was stopped.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File of --all: .parquet, .csv or .ndjson, one row per player.")] = None,
    attributions: Annotated[
        bool, typer.Option("--attributions", help="With --all: also what of the history moved each value, which takes far longer.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --all: start afresh instead of going on.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Why this action: parts that add up, contrast, evidence."""
    with answering(as_json) as answer:
        if everybody == (subject is not None):
            raise ConfigurationError("explain: expected either one decision or player, or --all with --out FILE")
        if everybody != (out is not None) or ((attributions or fresh) and not everybody):
            raise ConfigurationError("explain: --all and --out FILE go together, --attributions and --fresh with them; one explanation is printed")
        if everybody and (weights is not None or picture is not None):
            raise ConfigurationError("explain: --weights and --picture go with one decision or player")
        platform = _platform(workspace)
        compared = None if against is None else _alternative(platform, against)
        if out is not None:
            from serving.explain_all import explain_all

            with _counting("explaining") as progress:
                found = explain_all(platform, out, compared, attributions=attributions, fresh=fresh, on_progress=progress)
            answer(found, terminal.explained)
            return
        reweighted = None if weights is None else _weights(platform, weights)
        if picture is not None:
            from fastq.workspace import check_target

            check_target("--picture", picture, PICTURES)
        from serving.online import explain as explain_online

        document = explain_online(platform, str(subject), against=compared, weights=reweighted)
        if picture is not None:
            _draw(document, picture)
        answer(document, terminal.explanation)


@app.command()
def query(
    sql: Annotated[str | None, typer.Argument(metavar="SQL", help="One SELECT over the views that --tables lists.", show_default=False)] = None,
    tables: Annotated[bool, typer.Option("--tables", help="List the views instead, every column with its unit.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on standard output.")] = False,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Parquet file instead.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many rows.")] = 10_000,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Analysts' SQL over decisions, outcomes, explanations."""
    with answering(as_json) as answer:
        if tables == (sql is not None):
            raise ConfigurationError("query: expected either one SELECT, in quotes, or --tables")
        if as_json + as_csv + (parquet is not None) > 1 or (tables and (as_csv or parquet is not None)):
            raise ConfigurationError("query: expected one of --json, --csv and --parquet FILE at most, and with --tables --json alone")
        platform = _platform(workspace)
        from fastq import queries

        if sql is None:
            answer(queries.tables(platform), terminal.views)
            return
        found = queries.ask(platform, sql, rows=limit)
        if parquet is not None:
            found.write(parquet)
            answer({"rows": found.table.num_rows, "out": str(parquet)}, lambda document: [f"{document['rows']:,} rows in {terminal.plain(document['out'])}."])
        else:
            answer(found.document(), terminal.comma_separated if as_csv else terminal.rows)
        if found.truncated and not as_json:
            sys.stderr.write(f"There are more than {limit:,} rows; --limit N shows more.\n")


@app.command()
def forget(
    player: Annotated[str, typer.Argument(metavar="PLAYER", help="The platform's id of the player.")],
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Remove one player from everything kept here; says from where.

    A salted hash stays, so that the platform's own logs do not bring the player back. Serving may go on meanwhile; a retraining may not.
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from pipelines.forget import forget as flow

        answer(flow(platform, player, who=_who()), terminal.forgotten)


@keys_app.command("create")
def keys_create(
    role: Annotated[Role, typer.Option(help="recommend: recommendations and their outcomes; analyst: also explanations and the console; admin: all.")],
    expires: Annotated[str | None, typer.Option(metavar="DURATION", help="After which it opens nothing any more, such as 12h or 90d; default: never.")] = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it once; only its hash is kept."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq.platform import parse_duration
        from fastq.workspace import Workspace
        from serving.auth import create_key

        try:
            until = None if expires is None else cast("timedelta", parse_duration(expires))
        except ValueError as error:
            raise ConfigurationError(f"--expires {expires}: {error}") from None
        answer(create_key(Workspace(platform.root), role.value, until), terminal.new_key)


@keys_app.command("list")
def keys_list(workspace: WorkspaceOption = Path(), as_json: JsonOption = False) -> None:
    """Ids and roles of the keys there are."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq.workspace import Workspace
        from serving.auth import list_keys

        moments = ("created_at", "revoked_at", "expires_at")
        answer({"keys": [{**key, **{name: _stamp(key[name]) for name in moments}} for key in list_keys(Workspace(platform.root))]}, terminal.keys)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id that `keys list` shows.")],
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Let a key open nothing any more, at once."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq.workspace import Workspace
        from serving.auth import revoke_key

        revoke_key(Workspace(platform.root), key_id)
        answer({"revoked": key_id}, lambda document: [f"Key {document['revoked']} is revoked."])


# ---- the registry ------------------------------------------------------------------------------------------------------


@app.command()
def models(
    history: Annotated[bool, typer.Option("--history", help="Who promoted, rolled back or paused what, when and why, too.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """List the versions, their aliases and the gate's verdicts."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq import registry

        answer({"models": registry.models(platform)} | ({"history": registry.history(platform)} if history else {}), terminal.models)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A version that `models` shows.")],
    force: Annotated[bool, typer.Option("--force", help="Promote although the gate refused; needs --reason.")] = False,
    reason: ReasonOption = "",
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion, which serving serves."""
    with answering(as_json) as answer:
        if force and not reason.strip():
            raise ConfigurationError("promote: --force needs --reason TEXT, which is kept with who and when")
        platform = _platform(workspace)
        from fastq import registry

        registry.promote(platform, version, reason=reason.strip(), forced=force, who=_who())
        answer({"model": platform.platform, "version": version, "promoted": True, "forced": force}, terminal.promoted)


@app.command()
def export(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where recommend.onnx, score.onnx, model.json and example.json are written.")],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A version or an alias.", show_default="champion")] = None,
    form: Annotated[ExportFormat, typer.Option("--format", help="What another runtime can read.")] = ExportFormat.onnx,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Write a model for a runtime that is not ours.

    Graphs from raw windows to the noise-free action and the value's parts, a description of every input and output, and an example to check a port with.
    Nothing is left behind unless onnxruntime answers as fastq does.
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        if out.exists() and not out.is_dir():
            raise ConfigurationError(f"--out {out}: is a file; expected a directory to write to")
        from fastq import registry
        from fastq.export import export_onnx

        reference = registry.resolve(platform, model or registry.CHAMPION)
        answer(export_onnx(registry.load_policy(f"models:/{platform.platform}/{reference}", platform.root), out), terminal.exported)


@app.command()
def rollback(
    reason: ReasonOption = "",
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Make the champion before this one the champion again."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq import registry

        version = registry.rollback(platform, who=_who(), reason=reason.strip())
        answer({"model": platform.platform, "version": str(version), "promoted": True}, terminal.promoted)


@app.command()
def pause(
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose proposals are served meanwhile; default: the holdout's policy, else the default action.")
    ] = None,
    reason: ReasonOption = "",
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Take fastq out of every decision at once, also in servers that run."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq.assignment import pause as pause_platform

        made, changed = pause_platform(platform, policy, who=_who(), reason=reason.strip())
        answer({"paused": True, "policy": made.policy, "since": made.since, "changed": changed}, terminal.paused)


@app.command()
def resume(
    reason: ReasonOption = "",
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Let fastq decide again."""
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq.assignment import resume as resume_platform

        answer({"paused": False, "changed": resume_platform(platform, who=_who(), reason=reason.strip())}, terminal.paused)


# ---- by itself ----------------------------------------------------------------------------------------------------------
CronOption = Annotated[str, typer.Option(metavar="EXPRESSION", help="When to retrain: minute, hour, day of month, month, day of week.")]
ZoneOption = Annotated[str, typer.Option(metavar="ZONE", help="In which the times are meant, such as Europe/Berlin.")]


@app.command()
def schedule(
    cron: CronOption = "0 3 * * *",
    timezone: ZoneOption = "UTC",
    look: Annotated[bool, typer.Option("--monitor/--no-monitor", help="Look for drift each hour, and retrain on a finding.")] = True,
    workspace: WorkspaceOption = Path(),
) -> None:
    """Retrain by the clock and by drift, until a signal.

    In the foreground, for one machine. A stopped retraining goes on where it was, a missed time is made up for once, and what can heal is tried again.
    """
    platform = _platform(workspace)
    from pipelines.schedule import schedule as keep

    keep(platform, cron, timezone, look=look, say=_say)


@app.command()
def deploy(
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="The Prefect server's API, as http://127.0.0.1:4200/api.", show_default="PREFECT_API_URL")
    ] = None,
    pool: Annotated[str, typer.Option(metavar="NAME", help="The process work pool; made if it is not there.")] = "fastq",
    cron: CronOption = "0 3 * * *",
    timezone: ZoneOption = "UTC",
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """The flows onto a Prefect server, for its workers.

    retrain, monitor, recommend-all and compact as deployments of a process work pool, with their schedules; then: prefect worker start --pool fastq
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from pipelines.deployments import deploy as onto

        answer(onto(platform, server, pool, cron, timezone), terminal.deployed)


@app.command()
def monitor(workspace: WorkspaceOption = Path(), as_json: JsonOption = False) -> None:
    """One look now: drift, and promises kept.

    States, actions, propensities, unknown and degraded answers, volume and freshness against the logs that the last retraining learned from;
    outcomes against what was promised at promotion. May be run as often as you like: each hour spends its share of one false-alarm budget.
    Ends with 1 where something was found.
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from pipelines.monitor import monitor as look

        document = look(platform)
        answer(document, terminal.monitored)
    _end(refused=bool(document["findings"]))


@app.command()
def lift(
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Count from this time on.", show_default="the first served decision")] = None,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """What fastq brought against the holdout, per objective.

    Intervals that hold at all times at once: look as often as you like, and stop when you have seen enough.
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq.monitoring import lift as measured

        document = measured(platform, since=None if since is None else _moment(since), level=level)
        answer(document, terminal.lifted)
    _end(refused=not document["rows"])


@app.command()
def doctor(workspace: WorkspaceOption = Path(), as_json: JsonOption = False) -> None:
    """What is wrong here, each with the mend.

    What is installed, reachable, stale, left over or misconfigured. Ends with 1 where something is wrong.
    """
    with answering(as_json) as answer:
        from fastq.environment import prepare
        from fastq.platform import FILE_NAME
        from fastq.workspace import Workspace

        if not (workspace / FILE_NAME).exists():
            _platform(workspace)  # which says so
        prepare(Workspace(workspace))
        from fastq.doctor import examine
        from serving.auth import list_keys

        document = examine(workspace, list_keys)
        answer(document, terminal.examined)
    _end(refused=not document["passed"])


# ---- keeping it ---------------------------------------------------------------------------------------------------------
KeyFileOption = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", help="Its first line is the key; else the environment's FASTQ_BACKUP_KEY is, if it is set.")
]


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write; one that is there is replaced.")],
    key_file: KeyFileOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """The whole workspace into one file, while it runs.

    With fastq.yaml, everything under .fastq and the logs that lie in the workspace; consistent, with a checksum of each file, and encrypted if there is a key.
    """
    with answering(as_json) as answer:
        platform = _platform(workspace)
        from fastq import backup as backups

        answer(backups.backup(platform.root, file, backups.key_from(key_file), platform.operations.keep_backups), terminal.backed_up)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What backup wrote.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the workspace that is there; newer logs of yours stay.")] = False,
    key_file: KeyFileOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """A workspace out of its backup, whole or not at all.

    Everything is verified before anything is replaced; stopped halfway the old state stands. Only what runs in the workspace must be stopped before.
    """
    with answering(as_json) as answer:
        from fastq.environment import prepare

        prepare()
        from fastq import backup as backups

        answer(backups.restore(workspace, file, backups.key_from(key_file), overwrite=overwrite), terminal.restored)


# ---- in and out --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[Callable[[Document, View], None]]:
    """Give the one function that reaches standard output; until the end of the block everybody else's output goes to standard error.

    A refusal is a JSON document too: `error`, and `reasons` where a gate gave them.
    """
    sys.stdout.flush()
    kept = os.dup(1)  # not inherited by children, so a daemon that outlives us holds nobody's pipe open
    os.dup2(2, 1)

    def answer(document: Document, view: View) -> None:
        if as_json:
            import orjson

            options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS
            out.write(orjson.dumps(document, default=str, option=options).decode() + "\n")  # NaN becomes null: JSON has no other word
        else:
            from rich.console import Console

            console = Console(file=out, highlight=False)
            for part in view(document):
                out.write(part.decode()) if isinstance(part, bytes) else console.print(part)
        out.flush()

    with os.fdopen(kept, "w", encoding="utf-8") as out, contextlib.redirect_stdout(sys.stderr):
        try:
            yield answer
        except (FastqError, OSError) as error:
            if as_json and (mistake := _mistake(error)) is not None:
                answer({"error": mistake[0], **({"reasons": error.reasons} if isinstance(error, GateRefused) else {})}, lambda _: [])
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 1)


def _end(*, refused: bool) -> None:
    if refused:
        raise typer.Exit(1)


def _platform(directory: Path) -> Platform:
    """The platform of a workspace, with the environment made ready for everything that is imported after."""
    from fastq.environment import prepare
    from fastq.platform import load_platform
    from fastq.workspace import Workspace, finish_restore, upgrade

    finish_restore(directory)
    platform = load_platform(directory)
    upgrade(Workspace(platform.root))
    prepare(Workspace(platform.root))
    return platform


def _moment(text: str) -> Any:
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigurationError(f"--since {text}: expected a time such as 2026-03-01 or 2026-03-01T06:00:00Z") from None


def _numbers(option: str, text: str, known: list[str], what: str) -> dict[str, float]:
    """`name=number,name=number`, with names out of `known`."""
    import math

    numbers = {}
    for piece in text.split(","):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if name not in known or not equals:
            raise ConfigurationError(f"{option} {text}: {name!r} is not {what}=number; there is {', '.join(known)}")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ConfigurationError(f"{option} {text}: expected a number for {name}, got {value!r}") from None
        if not math.isfinite(numbers[name]):
            raise ConfigurationError(f"{option} {text}: expected a finite number for {name}")
    return numbers


def _weights(platform: Platform, text: str) -> dict[str, float]:
    return _numbers("--weights", text, list(platform.objectives), "objective")


def _alternative(platform: Platform, text: str) -> str | dict[str, float] | dict[str, str]:
    """What `--against` names: a behaviour policy, `logged`, `model:VERSION`, or an action in raw units."""
    if text in platform.policies or text == "logged" or text.startswith("model:"):
        return text
    if "=" not in text:
        raise ConfigurationError(
            f"--against {text}: expected {', '.join(platform.policies)}, logged, model:VERSION, or an action as {platform.action_columns[0]}=…"
        )
    if not platform.dimension_names:
        name, _, item = text.partition("=")
        if name.strip() != "item_id" or not item.strip():
            raise ConfigurationError(f"--against {text}: expected item_id=ID")
        return {"item_id": item.strip()}
    action = _numbers("--against", text, platform.dimension_names, "dimension")
    if missing := [name for name in platform.dimension_names if name not in action]:
        raise ConfigurationError(f"--against {text}: an action needs every dimension; missing: {', '.join(missing)}")
    return action


def _nothing_to_trust(document: Document, platform: Platform) -> bool:
    """Whether no estimate of the weighted sum of any model, as opposed to the behaviour policies, may be trusted."""
    verdicts = [row["verdict"] for row in document["estimates"] if row["objective"] is None and row["policy"] not in platform.policies]
    return not any(verdict.startswith("trust") for verdict in verdicts)


@contextlib.contextmanager
def _counting(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, moved by calls with how much is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def _who() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _stamp(seconds: object) -> str | None:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z") if isinstance(seconds, int | float) else None


def _say(text: str) -> None:
    """One line of what a command that stays does."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _draw(document: Document, picture: Path) -> None:
    from fastq.report import explanation_figure
    from fastq.workspace import replacing

    figure = explanation_figure(document)
    with replacing(picture) as partial:
        figure.savefig(partial, format=picture.suffix[1:], bbox_inches="tight")


# ---- start and end -----------------------------------------------------------------------------------------------------


def run(arguments: list[str]) -> int:
    """Run one command line and give its exit code; a user's mistake is one sentence on standard error."""
    received = _stop_on_signals()
    code: object = None
    try:
        code = app(arguments, prog_name="fastq", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 128 + signal.SIGINT
    except SystemExit as stop:  # Lightning leaves by this when it is interrupted, with codes that say success
        code = stop.code if isinstance(stop.code, int) and stop.code else 128 + signal.SIGTERM
    except Exception as error:  # noqa: BLE001 - the last one to see it
        if not received:  # else it only tells what the signal ended before us, as Prefect's server
            code = _failure(error)
    if received:
        sys.stderr.write(f"\nstopped by {signal.Signals(received[0]).name}\n")
        return 128 + received[0]
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """The console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' advice to their own callers is not for ours
    ended: list[int] = []
    atexit.register(_leave, ended)  # before any library's, so it runs after theirs
    code = run(sys.argv[1:])
    ended.append(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.dup2(2, 1)  # what libraries still say while the process ends is no part of the answer
    sys.exit(code)


def _leave(ended: list[int]) -> None:
    """The end, when everybody has cleaned up: what Python would do now is to take some thousand modules apart, for seconds in which nobody gets anything."""
    if ended:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(ended[0])


def _failure(error: Exception) -> int:
    """The exit code of a command that could not do its work, after one sentence of why; for a mistake of ours, after where it happened."""
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE  # whoever read us has gone, as with `| head`
    if (mistake := _mistake(error)) is not None:
        return _sentence(*mistake)
    traceback.print_exception(error)
    return CRASHED


def _mistake(error: Exception) -> tuple[str, int] | None:
    """What the user can mend, as a sentence, and the exit code; None for a mistake of ours."""
    match error:
        case FastqError():
            return str(error), error.exit_code
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOSPC | errno.EDQUOT | errno.EMFILE):
            return f"{error.filename or 'the workspace'}: {(error.strerror or str(error)).lower()}; check its owner and the free space of the disk", 2
        case OSError(errno=errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENAMETOOLONG | errno.ELOOP):
            return f"{error.filename2 or error.filename or 'a path'}: {(error.strerror or str(error)).lower()}; expected the name of a file to write", 2
    return None


def _sentence(text: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style="red"))
    return code


def _usage(error: typer.TyperException) -> int:
    show = getattr(error, "show", None)
    if show is None:
        return _sentence(str(error), 2)
    show()
    return int(getattr(error, "exit_code", 2))


def _stop_on_signals() -> list[int]:
    """End by unwinding, as on Ctrl-C, on SIGTERM and SIGHUP too: what holds processes or half-written files cleans up.

    Gives the list that the first signal is put into. A shell that starts us in the background has SIGINT ignored; that stays.
    """
    received: list[int] = []
    since = [0.0]

    def stop(number: int, _frame: FrameType | None) -> None:
        if received and time.monotonic() - since[0] < PATIENCE:
            return  # still cleaning up after the first
        received.append(number)
        since[0] = time.monotonic()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    return received


if __name__ == "__main__":
    main()
