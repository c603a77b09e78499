"""How a flow runs in a workspace, and the turn of the loop that it belongs to.

A turn is one passage from logs to the gate. Its id is an input of every task, so a task that has finished comes back from its small JSON
result when a stopped turn is resumed, and is done afresh in the next turn. What is larger than JSON lies in the turn's directory.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import shutil
import signal
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.cache_policies import INPUTS, NO_CACHE, TASK_SOURCE

from fastq.environment import prepare
from fastq.errors import FastqError, WorkspaceError
from fastq.platform import FILE_NAME, Platform, load_platform
from fastq.workspace import Workspace, replacing

Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, steps done, steps at most, metrics

_HEAL = (ConnectionError, TimeoutError, sqlite3.OperationalError)
# of Redis, PostgreSQL and HTTP clients, which are not imported for this
_HEAL_NAMES = {"ConnectionError", "OperationalError", "ReadTimeout", "ConnectTimeout", "TimeoutError"}


def _silent(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
    pass


# Inputs alone would not do: two tasks with equal inputs would give each other's results.
ONCE_A_TURN: dict[str, Any] = {"cache_policy": INPUTS + TASK_SOURCE, "persist_result": True, "result_serializer": "json"}
EACH_TIME: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}

progress: ContextVar[Progress] = ContextVar("progress", default=_silent)


def heals(task: Any, run: Any, state: Any) -> bool:
    """Whether what failed may succeed when it is tried again: a connection or a busy database, never a refusal or a mistake."""
    try:
        state.result()
    except BaseException as error:  # noqa: BLE001 - whatever it was, it is only looked at
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, _HEAL) or type(seen).__name__ in _HEAL_NAMES:
                return True
            seen = seen.__cause__ or seen.__context__
    return False


RETRIES: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [2, 10], "retry_condition_fn": heals}


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


@contextlib.contextmanager
def running(platform: Platform, on_progress: Progress | None = None) -> Iterator[None]:
    """Prefect's home and results in the workspace, its log quiet, and progress shown: on stderr, unless a callback is given."""
    workspace = Workspace(platform.root)
    prepare(workspace)
    workspace.make(workspace.prefect)  # Prefect makes its home, but not what it stands in
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import Settings

    # Prefect may have been imported before the workspace was known: its settings are read once more from the environment
    settings = SettingsContext(profile=get_settings_context().profile, settings=Settings())
    with settings, _quiet(), contextlib.ExitStack() as shown:
        start_server()
        token = progress.set(on_progress or shown.enter_context(drawn()))
        try:
            yield
        finally:
            progress.reset(token)


def start_server() -> None:
    """Start Prefect's temporary server, unless another one is set, out of reach of the terminal's Ctrl-C.

    Left to itself Prefect starts it in the foreground's group: Ctrl-C ends it before us, and our goodbyes to it are tried again for a minute.
    Raises `WorkspaceError` if it does not start.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None or not settings.server.ephemeral.enabled:
        return
    # It might choose 8000, where `fastq serve` listens unless told otherwise.
    SubprocessASGIServer._port_range = range(8001, 9000)  # noqa: SLF001 - there is no setting for it
    server, failures = SubprocessASGIServer(), []  # one per process: Prefect finds it running

    def start() -> None:
        try:
            server.start()
        except Exception as error:  # noqa: BLE001 - told by the thread that asked
            failures.append(error)

    # A thread hands the signals that it has blocked down to the processes it starts; ours stays free to be interrupted meanwhile.
    starting = threading.Thread(target=contextvars.copy_context().run, args=(start,))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        starting.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    starting.join()
    for error in failures:
        raise WorkspaceError(f"{settings.home}: Prefect's temporary server did not start ({error}); PREFECT_API_URL names another one") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only warnings of Prefect's reach the console, and of a refusal of ours nothing: whoever called tells it once, without a traceback.

    What Prefect keeps in its database is not touched. A level that the user set with PREFECT_LOGGING_LEVEL stays.
    """

    def wanted(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and "PREFECT_LOGGING_LEVEL" not in os.environ:
            return False
        refused = record.exc_info is not None and isinstance(record.exc_info[1], FastqError)
        said = record.getMessage()
        return not refused and "Finished in state Failed" not in said and "aborted by an interrupt signal" not in said  # whoever pressed Ctrl-C knows

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
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        begun: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
            if stage not in begun:
                begun[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(stage, highlight=False, markup=False)
            bars.update(begun[stage], completed=done, total=total)

        yield show
