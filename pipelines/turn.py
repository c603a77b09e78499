"""How a flow runs in a workspace, and the turn of the loop that it belongs to.

A turn is one passage from logs to the gate. Its id is an input of every task, so a task that has finished comes back from its small JSON
result when a stopped turn is resumed, and is done afresh in the next turn. What is larger than JSON lies in the turn's directory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.cache_policies import INPUTS, NO_CACHE, TASK_SOURCE

from fastq.environment import free_ports, prepare
from fastq.errors import FastqError, WorkspaceError
from fastq.platform import FILE_NAME, Platform, load_platform
from fastq.workspace import Workspace, replacing

Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, steps done, steps at most, metrics

_HEAL = (ConnectionError, TimeoutError, sqlite3.OperationalError)
# of Redis, PostgreSQL and HTTP clients, which are not imported for this; also what is made from them, as psycopg's AdminShutdown
_HEAL_NAMES = {"ConnectionError", "OperationalError", "TimeoutException", "TimeoutError", "Timeout", "TransportError", "RetryError"}


def _silent(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
    pass


# Inputs alone would not do: two tasks with equal inputs would give each other's results.
ONCE_A_TURN: dict[str, Any] = {"cache_policy": INPUTS + TASK_SOURCE, "persist_result": True, "result_serializer": "json"}
EACH_TIME: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}

progress: ContextVar[Progress] = ContextVar("progress", default=_silent)


def heals(task: Any, run: Any, state: Any) -> bool:
    """Whether what failed may succeed when it is tried again. A step that took longer than its limit would again."""
    if state.name == "TimedOut":
        return False
    try:
        state.result()
    except BaseException as error:  # noqa: BLE001 - whatever it was, it is only looked at
        return may_heal(error)
    return False


def may_heal(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a connection or a busy database; a refusal or a mistake of ours does not heal."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    if any(isinstance(seen, KeyboardInterrupt | SystemExit) for seen in chain):  # whoever stopped it wants it stopped, whatever a library made of that
        return False
    return any(isinstance(seen, _HEAL) or not _HEAL_NAMES.isdisjoint(kind.__name__ for kind in type(seen).__mro__) or _broken_server(seen) for seen in chain)


def _broken_server(error: BaseException) -> bool:
    """Whether a server answered that the fault is its own: Prefect's and MLflow's do while their database is away."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return (isinstance(status, int) and status >= 500) or getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE"


RETRIES: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [2, 10], "retry_condition_fn": heals}
PATIENCE = RETRIES | {"retries": 4, "retry_delay_seconds": [2, 10, 30, 60]}  # nobody waits for a turn, and a server takes a minute to come back


def limited(step: Any, platform: Platform) -> Any:
    """A step of a turn: it may take `operations.step_limit` at most, and is tried again for longer; its results are found again whatever the limit was."""
    return step.with_options(timeout_seconds=platform.operations.step_limit.total_seconds(), **PATIENCE)


# ---- turns -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Turn:
    """An unfinished passage through the loop. `directory` holds the record of the training and the bundle to be."""

    id: str
    since: str | None
    directory: Path


def begin(platform: Platform, since: datetime | None = None, *, resume: bool = False) -> Turn:
    """The stopped turn, if it is to be resumed and `fastq.yaml` says what it said then; else a new one, which forgets what was left lying."""
    workspace = Workspace(platform.root)
    noted = workspace.runs / "turn.json"
    said = platform.model_dump_json()
    if resume:
        with contextlib.suppress(OSError, ValueError, KeyError):
            old = json.loads(noted.read_text(encoding="utf-8"))
            if old["platform"] == said and (since is None or old["since"] == since.isoformat()):
                return Turn(old["id"], old["since"], workspace.runs / old["id"])
    forget(workspace)
    name = uuid.uuid4().hex
    turn = Turn(name, since.isoformat() if since else None, workspace.runs / name)
    workspace.make(workspace.runs, turn.directory)
    with replacing(noted) as partial:
        partial.write_text(json.dumps({"id": turn.id, "since": turn.since, "platform": said, "started_at": datetime.now(UTC).isoformat()}), encoding="utf-8")
    return turn


def forget(workspace: Workspace) -> None:
    """Remove what unfinished turns left: nothing of it can be resumed any more."""
    (workspace.runs / "turn.json").unlink(missing_ok=True)
    for left in workspace.runs.glob("*") if workspace.runs.exists() else ():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


# ---- running a flow ----------------------------------------------------------------------------------------------------
def platform_of(workspace: str) -> Platform:
    """Tasks get the workspace's path, which is JSON, and read the platform file there."""
    return load_platform(Path(workspace) / FILE_NAME)


def relative(platform: Platform, path: Path) -> str:
    """A path as answers show it: relative to the workspace."""
    return str(path.relative_to(platform.root))


def keep_report(platform: Platform, name: str, page: str, document: dict[str, Any]) -> dict[str, str]:
    """Keep a report in the workspace, as a page and as JSON; where they are, relative to it."""
    workspace = Workspace(platform.root)
    workspace.make(workspace.reports)
    html, tree = (workspace.reports / f"{name}.{suffix}" for suffix in ("html", "json"))
    for path, content in ((html, page), (tree, json.dumps(document, indent=1))):
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8")
    return {"report": relative(platform, html), "report_json": relative(platform, tree)}


@contextlib.contextmanager
def running(platform: Platform, on_progress: Progress | None = None, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Prefect's home and results in the workspace, its log quiet, and progress shown: on stderr, unless a callback is given.

    `meanwhile` is called while its temporary server starts, for seconds and in a process of its own: there is time for what the flow will import.
    """
    workspace = Workspace(platform.root)
    prepare(workspace)
    workspace.make(workspace.prefect)  # Prefect makes its home, but not what it stands in
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import Settings

    # Prefect may have been imported before the workspace was known: its settings are read once more from the environment
    settings = SettingsContext(profile=get_settings_context().profile, settings=Settings())
    from prefect import tags

    with settings, _quiet(), tags(process_tag()), contextlib.ExitStack() as shown:
        start_server(meanwhile)
        shown.enter_context(_prefect_answers())
        close_orphans()
        token = progress.set(on_progress or shown.enter_context(drawn()))
        try:
            yield
        finally:
            progress.reset(token)


@contextlib.contextmanager
def _prefect_answers() -> Iterator[None]:
    """What Prefect's client says of a server that is away for longer than it tries again, in one sentence; raised as `WorkspaceError`."""
    import httpx
    from prefect.settings import get_current_settings

    try:
        yield
    except Exception as error:
        theirs = isinstance(error, httpx.HTTPError) or type(error).__module__.partition(".")[0] == "prefect"  # in a flow nobody else speaks HTTPX
        if not theirs or isinstance(error, TimeoutError) or not may_heal(error):  # a step that took too long is no server that is away
            raise
        where = get_current_settings().api.url or "the temporary one"
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise WorkspaceError(f"Prefect's server ({where}) does not answer ({why}); what is done stays done: `fastq retrain --resume`") from error


# Deaf to the signals that a terminal or systemd sends to the whole group: it ends when its parent closes its standard input, or dies in whatever way.
_SERVER = """
import os, signal, sys, threading
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
import uvicorn
server = uvicorn.Server(uvicorn.Config("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=int(sys.argv[1]), log_level="error"))
def last_as_long_as_the_parent():
    while os.read(0, 1):
        pass
    server.should_exit = True
    threading.Event().wait(10)
    os._exit(0)  # still at it
threading.Thread(target=last_as_long_as_the_parent, daemon=True).start()
server.run()
sys.exit(0 if server.started else 3)  # 3 tells Prefect to try another port
"""


def start_server(meanwhile: Callable[[], object] = lambda: None) -> None:
    """Start Prefect's temporary server, unless another one is set, so that it ends with this process, after it and whatever ends it.

    Left to itself Prefect starts it within reach of the signals that end us: it goes first, and our goodbyes to it are tried again for a minute;
    and after a kill -9 it stays. Raises `WorkspaceError` if it does not start.
    """
    import prefect
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None or not settings.server.ephemeral.enabled:
        return

    def launched(port: int | None) -> subprocess.Popen[Any]:
        env = {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)}
        env |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}  # as Prefect starts it
        return subprocess.Popen([sys.executable, "-c", _SERVER, str(port)], env=env, stdin=subprocess.PIPE, cwd=prefect.__module_path__.parent)

    (port,) = free_ports(1)
    # To import what follows takes as long as half of the server's start. Where it is imported already, a server may be running.
    early = [] if "prefect.server.api.server" in sys.modules else [launched(port)]
    from prefect.server.api.server import SubprocessASGIServer

    # It might choose 8000, where `fastq serve` listens unless told otherwise.
    SubprocessASGIServer._port_range = range(8001, 9000)  # noqa: SLF001 - there is no setting for it
    server = SubprocessASGIServer()  # one per process: Prefect finds it running
    if server.running:
        return
    if early:
        server.port = port

    def run() -> subprocess.Popen[Any]:
        return early.pop() if early else launched(server.port)

    ending = server.stop

    def stop() -> None:
        if server.server_process is not None and server.server_process.stdin is not None:
            server.server_process.stdin.close()
        ending()

    server._run_uvicorn_command, server.stop = run, stop  # type: ignore[method-assign]  # noqa: SLF001 - as above
    try:
        with ThreadPoolExecutor(1) as beside:
            started = beside.submit(copy_context().run, server.start)
            meanwhile()
            started.result()
    except FastqError:  # of what was done meanwhile
        raise
    except Exception as error:
        raise WorkspaceError(f"{settings.home}: Prefect's temporary server did not start ({error}); PREFECT_API_URL names another one") from error


# ---- runs whose process died ---------------------------------------------------------------------------------------------
def process_tag() -> str:
    """What tells this process from every other one, of this machine and of others: host, pid and when it began."""
    import psutil

    return f"process:{socket.gethostname()}:{os.getpid()}:{int(psutil.Process().create_time())}"


def died(tag: str) -> bool:
    """Whether a tag names a process of this machine that is no more."""
    import psutil

    match tag.split(":"):
        case ["process", host, pid, began] if host == socket.gethostname():
            try:
                return int(psutil.Process(int(pid)).create_time()) != int(began)
            except psutil.NoSuchProcess:
                return True
    return False


def close_orphans() -> int:
    """End in Prefect's books, as crashed, the runs whose process died: nobody else would. Returns how many there were."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import Crashed

    open_states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]))
    closed = 0
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=open_states), sort=FlowRunSort.START_TIME_ASC, limit=200):
            if any(died(tag) for tag in run.tags):
                client.set_flow_run_state(run.id, Crashed(message="its process died; the next retraining goes on where it was"), force=True)
                closed += 1
    return closed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only warnings of Prefect's reach the console, and of a refusal of ours nothing: whoever called tells it once, without a traceback.

    What Prefect keeps in its database is not touched. A level that the user set with PREFECT_LOGGING_LEVEL stays.
    """

    def wanted(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and "PREFECT_LOGGING_LEVEL" not in os.environ:
            return False
        error = record.exc_info[1] if record.exc_info else None
        refused = error is not None and (isinstance(error, FastqError) or may_heal(error))  # the one is told at the end, the other tried again
        said = record.getMessage()
        stopped = "aborted by an interrupt signal" in said or "aborted by a termination signal" in said  # whoever sent it knows
        return not refused and not stopped and "Finished in state" not in said

    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("prefect").setLevel(logging.WARNING)  # for good: the temporary server says goodbye when the process ends
    consoles = list(logging.getLogger().handlers)  # Prefect's console is a handler of the root, and shows what other libraries say too
    for console in consoles:
        console.addFilter(wanted)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(wanted)


@contextlib.contextmanager
def drawn() -> Iterator[Progress]:
    """Progress on stderr: a bar per stage in a terminal, one line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        begun: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
            if stage not in begun:
                begun[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(stage, highlight=False, markup=False)
            bars.update(begun[stage], completed=done, total=total)

        yield show
