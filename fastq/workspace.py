"""Where things lie under `.fastq/`, how they are locked and how they are written whole or not at all; their format and its upgrades.

One directory holds all of a platform's state, so deleting it deletes everything. Nothing here reads or interprets content.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastq.errors import ConfigurationError, WorkspaceError

FORMAT = 1  # of what lies under `.fastq/`; a workspace without the number is of format 0
STAGING = ".fastq-restore"  # beside `.fastq/`: a restore under way
ABANDONED = timedelta(hours=1)  # since a file that is being written was last written to: its writer is no more
SETTLED_NS = 100_000_000  # longer than a tick of any file system's clock
_PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}(\.[a-z]+)?")  # `tempfile` draws the eight characters


def settled(changed_ns: int) -> bool:
    """Whether a file or directory that was last changed then is told by that time: of two changes within a tick of the clock it shows one."""
    return time.time_ns() - changed_ns > SETTLED_NS


@dataclass(frozen=True)
class Workspace:
    """The paths of one workspace; `root` is the directory of `fastq.yaml`. Making one touches no disk."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / ".fastq"

    @property
    def tables(self) -> Path:
        """Accepted log tables as Parquet, the last that passed validation."""
        return self.state / "tables"

    @property
    def staged(self) -> Path:
        """Copies of the logs in canonical types, not yet judged, so that no file is read twice; to delete them costs time only."""
        return self.state / "staged"

    @property
    def quarantine(self) -> Path:
        """Refused rows with their reasons, one Parquet file per validation."""
        return self.state / "quarantine"

    @property
    def reports(self) -> Path:
        return self.state / "reports"

    @property
    def reference(self) -> Path:
        """What the logs looked like when they were last accepted; the next ones are held against it."""
        return self.state / "reference.json"

    @property
    def overlap(self) -> Path:
        """How much of the state space each pair of policies shared in the logs that were last accepted."""
        return self.state / "overlap.json"

    @property
    def densities(self) -> Path:
        """How well the propensities that the logs lack were last estimated, per policy."""
        return self.state / "densities.json"

    @property
    def features(self) -> Path:
        """Feature rows (Parquet, .npy) that Feast and training read."""
        return self.state / "features"

    @property
    def feast(self) -> Path:
        """Feast's registry and embedded online store."""
        return self.state / "feast"

    @property
    def served(self) -> Path:
        """Decisions that fastq served: `*.db` (live, one writer each) and `*.parquet` (batches)."""
        return self.state / "served"

    @property
    def models(self) -> Path:
        """Verified copies of registered bundles, by version; never changed once there."""
        return self.state / "models"

    @property
    def runs(self) -> Path:
        """Training under way: the learner's record, from which a stopped run resumes."""
        return self.state / "runs"

    @property
    def batch(self) -> Path:
        """Recommendations for everybody under way: a piece for each few thousand players, from which a stopped batch goes on. No retraining's to clear."""
        return self.state / "batch"

    @property
    def mlflow(self) -> Path:
        return self.state / "mlflow"

    @property
    def prefect(self) -> Path:
        return self.state / "prefect"

    @property
    def keys(self) -> Path:
        """SQLite file of API keys, hashes only."""
        return self.state / "keys.db"

    @property
    def monitor(self) -> Path:
        """What the champion promised, what its logs looked like, and what has been found since."""
        return self.state / "monitor"

    @property
    def watched(self) -> Path:
        """What the logs looked like that were last learned from, which the monitor holds new ones against; not there before the first retraining."""
        return self.monitor / "reference.json"

    @property
    def format_file(self) -> Path:
        """JSON: `format`, the number of the layout of `.fastq/`."""
        return self.state / "format.json"

    @property
    def audit(self) -> Path:
        """Append-only JSON lines: promotions, rollbacks, pauses, who, when, why."""
        return self.state / "audit.jsonl"

    @property
    def paused(self) -> Path:
        """There while fastq is paused; says since when, by whom, and who decides instead (JSON)."""
        return self.state / "paused.json"

    @property
    def attempts(self) -> Path:
        """Append-only JSON lines: each judgement of a candidate by the promotion gate, from which the next one's error rate follows."""
        return self.state / "attempts.jsonl"

    @property
    def backups(self) -> Path:
        """Append-only JSON lines: which backups were made, where and when, so that they can expire."""
        return self.state / "backups.jsonl"

    def make(self, *directories: Path) -> None:
        """Create directories (default: the state directory) for this user only."""
        for directory in directories or (self.state,):
            try:
                fresh = not self.state.exists() and self.state in (directory, *directory.parents)
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                if fresh and not self.format_file.exists():
                    with replacing(self.format_file) as partial:
                        partial.write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
            except OSError as error:
                raise WorkspaceError(f"{directory}: cannot be created ({error.strerror}); check the directory's owner and the disk's free space") from None

    def record(self, who: str, action: str, **said: Any) -> None:
        """Append one line to the audit, durably, before what it tells is done: a line too many can be read, a deed without one cannot."""
        self.append(self.audit, {"at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"), "who": who, "action": action, **said})

    def append(self, path: Path, line: Mapping[str, Any]) -> None:
        """One JSON line at the end of a file, durably; what a crash left of the line before stands on a line of its own."""
        self.make()
        with path.open("ab+") as log:
            length = log.seek(0, os.SEEK_END)
            log.seek(max(length - 1, 0))
            cut_off = log.read() not in (b"", b"\n")
            log.write(b"\n" * cut_off + json.dumps(dict(line)).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    @contextlib.contextmanager
    def lock(self, name: str, wait_seconds: float = 0.0) -> Iterator[None]:
        """Hold `name` for this process; a lock dies with the process that holds it.

        Raises `WorkspaceError` if another process still holds it after `wait_seconds`.
        """
        self.make()
        lock = FileLock(self.state / f"{name}.lock")
        try:
            lock.acquire(timeout=wait_seconds)
        except Timeout:
            raise WorkspaceError(f"{self.root}: another process is busy with {name!r} here; wait for it, or stop it") from None
        try:
            yield
        finally:
            lock.release()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """What `Workspace.append` wrote, oldest first; a line that a crash cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            found.append(dict(json.loads(line)))
    return found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it, durably, once the block ends well; on any error `path` is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        with room(path):
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a file's name says that somebody is writing it, or was killed while they did: as `replacing` and `backup` name them."""
    return _PARTIAL.fullmatch(path.name) is not None


def sweep(workspace: Workspace) -> int:
    """Remove what writers who were killed left beside the files that they were writing; returns how many. What is being written is younger and stays."""
    left = [path for path in workspace.state.rglob(".*") if is_partial(path) and not {workspace.mlflow, workspace.prefect} & set(path.parents)]
    swept = 0
    for path in left:
        with contextlib.suppress(FileNotFoundError):  # whoever writes it was about to rename it
            if path.is_file() and time.time() - path.stat().st_mtime > ABANDONED.total_seconds():
                path.unlink()
                swept += 1
    return swept


@contextlib.contextmanager
def room(where: Path | str, left: str = "what was there before is there still") -> Iterator[None]:
    """Raises `WorkspaceError` where what is written finds the disk full, and says what is `left` then; any other error stays what it is."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise WorkspaceError(f"{where}: the disk is full; {left}: free some space and run the command again") from error
        raise


def check_target(option: str, path: Path, suffixes: Iterable[str]) -> None:
    """Raises `ConfigurationError` where a file that a long command shall end with can't be written: said before the work, not after it."""
    if path.suffix not in suffixes:
        raise ConfigurationError(f"{option} {path}: expected a name that ends in {', '.join(suffixes)}")
    there = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        why = "is a directory" if path.is_dir() else f"{there} {'cannot be written' if there.is_dir() else 'is no directory'}"
        raise ConfigurationError(f"{option} {path}: {why}; expected the name of a file to write")


def is_full(error: BaseException) -> bool:
    """Whether an error says that a file may not grow: a full disk, a quota, a limit on its size. Polars and databases tell it in their text alone.

    SQLite calls it an I/O error where what the readers of a database share can't grow, which each of them makes where there is none.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    said = [*(f"os error {number})" for number in numbers), os.strerror(errno.ENOSPC), "database or disk is full"]
    shared = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE"
    return shared or (isinstance(error, OSError) and error.errno in numbers) or any(words in str(error) for words in said)


def fsync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- the format and its upgrades ---------------------------------------------------------------------------------------
def _numbered(_workspace: Workspace) -> None:
    """Format 1 is format 0 with its number written down: nothing else changes."""


UPGRADES: dict[int, Callable[[Workspace], None]] = {0: _numbered}  # from each format to the next; changes nothing that `KEPT` does not hold
KEPT = "before-format-{}"  # under `.fastq/`: what an upgrade changed, as it was; `undo_upgrade` puts it back


def format_of(workspace: Workspace) -> int:
    """The format of a workspace; that of this version where there is no state yet. Raises `WorkspaceError` where it can't be read."""
    if not workspace.state.exists():
        return FORMAT
    try:
        return int(json.loads(workspace.format_file.read_text(encoding="utf-8"))["format"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(f'{workspace.format_file}: cannot be read ({error}); restore it from a backup, or write {{"format": {FORMAT}}}') from None


def upgrade(workspace: Workspace) -> int:
    """Bring a workspace to this version's format, step by step, each kept undoable; returns the format that it had.

    Raises `WorkspaceError` where it is of a newer version. A step that is cut off is done again: it starts from what was kept.
    """
    before = format_of(workspace)
    if before > FORMAT:
        raise WorkspaceError(
            f"{workspace.state}: was written by a newer fastq (format {before}, this one knows {FORMAT}); install that version, or restore a backup"
        )
    if before == FORMAT or not workspace.state.exists():
        return before
    with workspace.lock("upgrade", wait_seconds=60):
        for step in range(format_of(workspace), FORMAT):
            UPGRADES[step](workspace)
            with replacing(workspace.format_file) as partial:
                partial.write_text(json.dumps({"format": step + 1}), encoding="utf-8")
    return before


def keep(workspace: Workspace, path: Path, step: int) -> None:
    """Called by an upgrade's step before it changes `path`: a copy that `undo_upgrade` puts back. What is kept already stays."""
    kept = workspace.state / KEPT.format(step) / path.relative_to(workspace.state)
    if not kept.exists():
        with replacing(kept) as partial:
            shutil.copyfile(path, partial)


def undo_upgrade(workspace: Workspace) -> int:
    """Put back what the last upgrade changed, for the version before; returns the format that stands then."""
    last = format_of(workspace) - 1
    if last < 0:
        raise WorkspaceError(f"{workspace.state}: there is no upgrade to undo; it is of the oldest format")
    kept = workspace.state / KEPT.format(last)
    for path in sorted(kept.rglob("*")) if kept.exists() else ():
        if path.is_file():
            with replacing(workspace.state / path.relative_to(kept)) as partial:
                shutil.copyfile(path, partial)
    with replacing(workspace.format_file) as partial:
        partial.write_text(json.dumps({"format": last}), encoding="utf-8")
    return last


def finish_restore(root: Path) -> bool:
    """Do the renames of a restore that was stopped after its point of no return; whether there was one. Cheap where there was none."""
    staging = root / STAGING
    journal = staging / "swap.json"
    if not journal.exists():
        return False
    lock = FileLock(staging / "swap.lock")
    with lock:
        try:
            names = json.loads(journal.read_text(encoding="utf-8"))
        except FileNotFoundError:  # another process was faster
            return False
        for name in names:
            new, old = staging / "new" / name, staging / "old" / name
            if not new.exists():
                continue  # done before the stop
            (root / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (root / name).exists():
                old.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.replace(root / name, old)
            os.replace(new, root / name)
        fsync_directory(root)
        journal.unlink()
    shutil.rmtree(staging, ignore_errors=True)
    return True
