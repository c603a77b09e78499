"""Where things lie under `.fastq/`, how they are locked and how they are written whole or not at all.

One directory holds all of a platform's state, so deleting it deletes everything. Nothing here reads or interprets content.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastq.errors import WorkspaceError


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
    def quarantine(self) -> Path:
        """Refused rows with their reasons, one Parquet file per validation."""
        return self.state / "quarantine"

    @property
    def reports(self) -> Path:
        return self.state / "reports"

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
    def audit(self) -> Path:
        """Append-only JSON lines: promotions, rollbacks, pauses, who, when, why."""
        return self.state / "audit.jsonl"

    @property
    def paused(self) -> Path:
        """There while fastq is paused; says since when, by whom, and who decides instead (JSON)."""
        return self.state / "paused.json"

    def make(self, *directories: Path) -> None:
        """Create directories (default: the state directory) for this user only."""
        for directory in directories or (self.state,):
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise WorkspaceError(f"{directory}: cannot be created ({error.strerror}); check the directory's owner and the disk's free space") from None

    def record(self, who: str, action: str, **said: Any) -> None:
        """Append one line to the audit, durably, before what it tells is done: a line too many can be read, a deed without one cannot."""
        self.make()
        line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"), "who": who, "action": action, **said})
        with self.audit.open("a", encoding="utf-8") as log:
            log.write(line + "\n")
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it, durably, once the block ends well; on any error `path` is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
