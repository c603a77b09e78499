"""Every decision that was served, durably, before its answer leaves; outcomes, idempotency keys, hashed and activity beside it.

One SQLite file per writing process under `served/` (WAL, synchronous=FULL) and one writer thread per file: while a commit runs, what
arrives queues up and becomes the next commit. A timed window would only add its own delay. Two processes never share a file: each holds
a lock that dies with it. What must happen once whichever process hears of it (an outcome, an event, an Idempotency-Key) is written by one of them
at a time, after a look into the files of all. Batches (`served/*.parquet`, written by the flow `recommend_all`) are read beside the files.

    decisions(decision_id, player_id, decided_at, policy, propensity, model_version, action, detail, state, assignment)
    outcomes(decision_id, objective, value, recorded_at)     the row recorded last stands, whichever file holds it
    executed(decision_id, action, recorded_at)               what was done instead of the decision; action null: nothing was
    requests(key, digest, decision_ids, recorded_at)         idempotency keys
    activity(player_id, occurred_at, recorded_at, body, applied)   events that arrived over HTTP; applied: the online store has them

Times are microseconds since 1970 (UTC), bodies and actions JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import orjson
import polars as pl
from filelock import FileLock, Timeout

from fastq.errors import FastqError, RequestError, UnknownPlayerError, WorkspaceError
from fastq.platform import Platform
from fastq.workspace import Workspace, settled

logger = logging.getLogger("fastq.serving")
CHECKPOINT = 4_000  # rows, some 30 MB of the WAL, after which it is brought into the file
MAPPED = 2**30  # bytes of a file that are read without a copy
AT_ONCE = 3_000  # decisions in one statement, which may hold 32,766 values
PATIENCE = 5.0  # seconds that one process waits for another one's turn to end
T = TypeVar("T")
Action = dict[str, float] | dict[str, str | None]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions(decision_id TEXT PRIMARY KEY, player_id TEXT NOT NULL, decided_at INTEGER NOT NULL, policy TEXT NOT NULL, propensity REAL,
    model_version TEXT, action TEXT NOT NULL, detail TEXT NOT NULL, state BLOB, assignment REAL);
CREATE INDEX IF NOT EXISTS decisions_by_player ON decisions(player_id, decided_at);
CREATE TABLE IF NOT EXISTS outcomes(decision_id TEXT, objective TEXT, value REAL NOT NULL, recorded_at INTEGER NOT NULL, PRIMARY KEY(decision_id, objective));
CREATE TABLE IF NOT EXISTS executed(decision_id TEXT PRIMARY KEY, action TEXT, recorded_at INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS requests(key TEXT PRIMARY KEY, digest TEXT NOT NULL, decision_ids TEXT NOT NULL, recorded_at INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS activity(player_id TEXT, occurred_at INTEGER, recorded_at INTEGER NOT NULL, body TEXT, applied INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY(player_id, occurred_at, body));
CREATE INDEX IF NOT EXISTS activity_to_apply ON activity(recorded_at) WHERE applied = 0;
"""
_HEARD = (
    "SELECT player_id, occurred_at, body FROM json_each(?) AS asked JOIN activity ON player_id = json_extract(asked.value, '$[0]')"
    " AND occurred_at = json_extract(asked.value, '$[1]') AND body = json_extract(asked.value, '$[2]')"
)
_DECISION = "decision_id, player_id, decided_at, policy, propensity, model_version, action, detail, assignment"


@functools.cache
def _insert(rows: int) -> str:
    """The statement that stores so many decisions."""
    return f"INSERT INTO decisions({_DECISION}, state) VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)'] * rows)}"  # noqa: S608 - constants only


class LogUnavailable(FastqError):
    """The decision log cannot be written (disk full, I/O error): nothing of the request was stored, and nothing may be served."""


class KeyReused(RequestError):
    """An Idempotency-Key that came before with another request."""


class UnknownDecisions(UnknownPlayerError):
    """Outcomes for decisions that were never served; `ids` names them."""

    def __init__(self, ids: list[str]) -> None:
        super().__init__(f"never served here: {', '.join(ids[:20])}{f' and {len(ids) - 20} more' if len(ids) > 20 else ''}; nothing of this request was stored")
        self.ids = ids


class OutcomeConflict(RequestError):
    """An outcome that is already known with another value."""


@dataclass(frozen=True)
class Decision:
    """One served decision. `detail`: what the answer said beside the columns, and what a replay needs; `state`: see `fastq.features.pack_states`;
    `assignment`: with which probability the player fell to whoever decided, None where nothing is drawn.
    """

    decision_id: str
    player_id: str
    decided_at: int
    policy: str
    propensity: float | None
    model_version: str | None
    action: Action
    detail: dict[str, Any]
    state: bytes | None = None
    assignment: float | None = None

    def row(self) -> tuple[object, ...]:
        return (
            self.decision_id,
            self.player_id,
            self.decided_at,
            self.policy,
            self.propensity,
            self.model_version,
            orjson.dumps(self.action).decode(),
            orjson.dumps(self.detail).decode(),
            self.assignment,
            self.state,
        )


@dataclass(frozen=True)
class Reported:
    """What a platform says of one decision afterwards. `executed`: None says nothing, False: not carried out, else the action that was."""

    decision_id: str
    values: dict[str, float]
    executed: bool | Action | None = None


@dataclass(frozen=True)
class Known:
    """What has been reported of a decision so far, and when (us, 0: never); `executed` as in `Reported`."""

    values: dict[str, float] = field(default_factory=dict)
    executed: bool | Action | None = None
    heard_at: int = 0


@dataclass(frozen=True)
class Recent:
    """A decision of the last periods as it was executed, with what has been reported; `said_at`: when something of it was last heard (us)."""

    decision_id: str
    player_id: str
    decided_at: int
    policy: str
    action: Action
    values: dict[str, float]
    said_at: int
    drawn: bool  # by a model, rather than the default action


@dataclass(frozen=True)
class Request:
    """An Idempotency-Key (with the caller's key id in front) and the digest of the body it came with."""

    key: str
    digest: str

    @property
    def kept(self) -> str:
        """What is kept of the key: its hash, for a caller may name a player in it, and who is forgotten must be gone."""
        return hashlib.sha256(self.key.encode()).hexdigest()


@dataclass(frozen=True)
class Event:
    """One event of a player; `body` maps measures to values. `recorded_at`: when a log kept it, later than any event before it in that log; 0: not yet."""

    player_id: str
    occurred_at: int
    body: dict[str, float]
    recorded_at: int = field(default=0, compare=False)


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class ByteLocks:
    """Whose turn it is among the processes that write here: locks on single bytes of one file, which die with the process that holds them.

    Between processes alone, as POSIX has them: within one, threads must know of each other. The file is opened once, since closing it anywhere in the
    process would let go of everything.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether, within `PATIENCE`, no other process is inside of this; one that hangs in there shall hang nobody else."""
        mine = self._within(PATIENCE, lambda: self._taken(0))
        try:
            yield mine
        finally:
            if mine:
                self._let_go(0)

    def take(self, players: Iterable[str]) -> bool:
        """Keep these players to this process until `give`; False, with nothing kept, where another has one of them."""
        taken: list[str] = []
        for player in dict.fromkeys(players):
            if not self._taken(self._place(player)):
                self.give(taken)
                return False
            taken.append(player)
        return True

    def wait_and_take(self, players: Sequence[str]) -> bool:
        """`take`, tried again for `PATIENCE`."""
        return self._within(PATIENCE, lambda: self.take(players))

    def give(self, players: Iterable[str]) -> None:
        """Let others have them."""
        for player in players:
            self._let_go(self._place(player))

    def close(self) -> None:
        os.close(self._file)

    @staticmethod
    def _within(seconds: float, taken: Callable[[], bool]) -> bool:
        until = time.monotonic() + seconds
        while not (mine := taken()) and time.monotonic() < until:
            time.sleep(0.001)
        return mine

    def _taken(self, place: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):  # as POSIX leaves it to the system
            return False
        return True

    def _let_go(self, place: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    @staticmethod
    def _place(player: str) -> int:
        return 1 + int.from_bytes(hashlib.sha256(player.encode()).digest()[:7], "big")


class _Job(NamedTuple):
    """A piece of writing, and who waits for it. Where all it does is to store decisions, `rows` are these, and `kept` what it yields.

    `alone`: no other process may write meanwhile, since it looks into the files of all first.
    """

    run: Callable[[sqlite3.Connection], Any]
    waits: Future[Any]
    rows: Sequence[tuple[object, ...]] = ()
    kept: list[Decision] | None = None
    alone: bool = False


def _decision(row: sqlite3.Row | tuple[Any, ...], state: bytes | None = None) -> Decision:
    return Decision(row[0], row[1], row[2], row[3], row[4], row[5], json.loads(row[6]), json.loads(row[7]), state, row[8])


def _executed(action: str | None) -> bool | Action:
    return False if action is None else cast("Action", json.loads(action))


def _copy_wal(path: Path) -> None:
    """Bring what is in a file's WAL now into the file; writers go on."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as beside:
        beside.execute("PRAGMA synchronous=FULL")
        beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


class DecisionLog:
    """The writer of one file and the reader of all of them. Make it with `open_log`; `close` it."""

    def __init__(self, platform: Platform, path: Path, lock: FileLock) -> None:
        self.platform, self.path = platform, path
        self.turns = ByteLocks(path.with_name("replicas.lock"))
        self._lock = lock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting_since: float | None = None
        self._heard: int | None = None  # `recorded_at` of this file's newest event; the writer's
        self._readers: dict[Path, sqlite3.Connection] = {}
        self._reading = threading.RLock()
        self._batches: dict[Path, tuple[int, pl.DataFrame]] = {}
        self._together: tuple[tuple[tuple[Path, int], ...], pl.DataFrame] | None = None
        self._listed: tuple[int, list[Path], list[Path]] = (-1, [], [])
        self._database = self._connect()
        self._written = 0  # rows since the last checkpoint
        self._copier: threading.Thread | None = None  # that brings the WAL into the file
        self._writer = threading.Thread(target=self._write, name="decision-log", daemon=True)
        self._writer.start()

    # ---- writing ------------------------------------------------------------------------------------------------------
    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA wal_autocheckpoint=0")  # it would hold up the commit that does it: see `_checkpoint`
        database.executescript(_SCHEMA)
        if not any(column[1] == "assignment" for column in database.execute("PRAGMA table_info(decisions)")):  # a file of an earlier release
            database.execute("ALTER TABLE decisions ADD COLUMN assignment REAL")
        return database

    def _write(self) -> None:
        """The writer thread: one transaction for all that queued up while the last one was committed."""
        while True:
            jobs = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while jobs[-1] is not None:
                    jobs.append(self._jobs.get_nowait())
            self._waiting_since = time.monotonic()
            self._commit([job for job in jobs if job is not None and not job.alone])
            if alone := [job for job in jobs if job is not None and job.alone]:
                try:
                    with self.turns.alone() as mine:
                        self._commit(alone) if mine else self._refuse(alone, "another server writes here and does not come to an end")
                except OSError as error:  # a file system that has no locks to give
                    self._refuse([job for job in alone if not job.waits.done()], str(error))
            self._waiting_since = None
            if jobs[-1] is None:
                return
            self._written += sum(max(len(job.rows), 1) for job in jobs if job is not None)
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Between two commits: have the WAL brought into the file by another thread, since that takes the disk some fifty milliseconds.

        What is committed meanwhile is little, and brought in here: only a WAL that is in the file to its end is begun anew.
        """
        if self._copier is not None:
            if not self._copier.is_alive():
                self._copier, self._written = None, 0
                with contextlib.suppress(sqlite3.Error):  # the disk may be full; commits say so
                    self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        elif self._written >= CHECKPOINT:
            copier = threading.Thread(target=_copy_wal, args=(self.path,), name="decision-log-checkpoint", daemon=True)
            copier.start()
            self._copier = copier

    def _commit(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        try:
            done = self._stored_at_once(jobs) or self._one_by_one(jobs)
        except (sqlite3.Error, OSError) as error:
            self._reconnect()
            self._refuse(jobs, f"{error}; free disk space or mend the disk")
            return
        for job, (result, refusal) in zip(jobs, done, strict=True):
            if refusal is None:
                job.waits.set_result(result)
            else:
                job.waits.set_exception(refusal)

    def _refuse(self, jobs: list[_Job], why: str) -> None:
        logger.error("decision log %s: %s", self.path.name, why)
        for job in jobs:
            job.waits.set_exception(LogUnavailable(f"the decision log cannot be written ({why}); nothing of this request was stored: ask again"))

    def _stored_at_once(self, jobs: list[_Job]) -> list[tuple[Any, BaseException | None]] | None:
        """Decisions alone, stored by one statement that is its own transaction; None where there is something else among the jobs.

        Each call of SQLite's lets go of the interpreter, and may wait half a millisecond for the loop to give it back: a call per row is a row per wait.
        """
        rows = [row for job in jobs for row in job.rows]
        if not rows or len(rows) > AT_ONCE or any(job.kept is None for job in jobs):
            return None
        try:
            self._database.execute(_insert(len(rows)), list(itertools.chain.from_iterable(rows)))
        except sqlite3.IntegrityError:  # one of them: nothing was stored, and each is tried by itself
            return None
        return [(job.kept, None) for job in jobs]

    def _one_by_one(self, jobs: list[_Job]) -> list[tuple[Any, BaseException | None]]:
        """One transaction in which a job may fail without the others."""
        done: list[tuple[Any, BaseException | None]] = []
        self._database.execute("BEGIN IMMEDIATE")
        for job in jobs:
            self._database.execute("SAVEPOINT job")
            try:
                done.append((job.run(self._database), None))
            except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
                if not isinstance(error, sqlite3.IntegrityError):
                    raise  # the disk, so the whole commit
                self._database.execute("ROLLBACK TO job")
                done.append((None, error))
            except Exception as refused:  # noqa: BLE001 - this job alone: the others of the commit go on, its caller gets the error
                self._database.execute("ROLLBACK TO job")
                done.append((None, refused))
            self._database.execute("RELEASE job")
        self._database.execute("COMMIT")
        return done

    def _reconnect(self) -> None:
        """A connection that failed may be in any state; a new one recovers from the WAL as after a crash."""
        with contextlib.suppress(sqlite3.Error):
            self._database.rollback()
        try:
            fresh = self._connect()
        except (sqlite3.Error, OSError):
            return  # the old one goes on being refused until the disk is mended
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._database = fresh

    def _submit(
        self, job: Callable[[sqlite3.Connection], T], rows: Sequence[tuple[object, ...]] = (), kept: list[Decision] | None = None, *, alone: bool = False
    ) -> Future[T]:
        if not self._writer.is_alive():
            raise LogUnavailable("the decision log is closed: the server is stopping; ask another replica, or again after its start")
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a caller that goes away does not take its decision out of the log
        self._jobs.put(_Job(job, future, rows, kept, alone))
        return future

    @property
    def backlog(self) -> int:
        """Jobs that wait for the next commit."""
        return self._jobs.qsize()

    @property
    def lag_seconds(self) -> float:
        """How long the commit that runs now has been running."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def append(self, decisions: Sequence[Decision], request: Request | None = None) -> Future[list[Decision]]:
        """Store decisions; the future yields them once they are on disk, or those that the same `request` made before.

        It raises `KeyReused` where the key came with another body, `LogUnavailable` where nothing could be stored.
        """

        def job(database: sqlite3.Connection) -> list[Decision]:
            if request:
                found = self._request_in(database, request)
                if found is None:  # another process may have answered it: whoever gets no answer in time asks again, and comes to anyone
                    found = self.repeated(request)
                if found is not None:
                    return found
                ids = json.dumps([d.decision_id for d in decisions])
                database.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", (request.kept, request.digest, ids, now_us()))
            database.executemany(_insert(1), rows)
            return kept

        rows, kept = [d.row() for d in decisions], list(decisions)  # made by the caller's thread, so that the writer's holds nobody up
        return self._submit(job, rows, None if request else kept, alone=request is not None)

    def repeated(self, request: Request) -> list[Decision] | None:
        """The decisions that this request made before, in any file; None if it is new. Raises `KeyReused`."""
        for database in self._databases():
            with self._reading:
                found = self._request_in(database, request)
            if found is not None:
                return found
        return None

    @staticmethod
    def _request_in(database: sqlite3.Connection, request: Request) -> list[Decision] | None:
        row = database.execute("SELECT digest, decision_ids FROM requests WHERE key = ?", (request.kept,)).fetchone()
        if row is None:
            return None
        if row[0] != request.digest:
            raise KeyReused("this Idempotency-Key came before with another request; send a new key, or the same request")
        rows = database.execute(f"SELECT {_DECISION} FROM decisions WHERE decision_id IN (SELECT value FROM json_each(?))", (row[1],))  # noqa: S608 - constants only
        found = {r[0]: _decision(r) for r in rows}
        return [found[i] for i in json.loads(row[1])]

    def report(self, reported: Sequence[Reported], correct: bool = False) -> Future[tuple[int, int]]:
        """Store outcomes, all or nothing; yields how many said something new and how many did not.

        Raises `UnknownDecisions`, or `OutcomeConflict` where a known value differs and `correct` is off.
        """
        ids = list({r.decision_id for r in reported})
        served = self._served(ids)
        if unknown := [i for i in dict.fromkeys(r.decision_id for r in reported) if i not in served]:
            raise UnknownDecisions(unknown)

        def job(database: sqlite3.Connection) -> tuple[int, int]:
            others = self._databases()[1:]
            with self._reading:
                known = _known_in([database, *others], ids)
            accepted = 0
            for said in reported:
                before = known[said.decision_id]
                now = max(now_us(), before.heard_at + 1)  # what is said last stands, whatever the clocks of two machines say
                fresh = {name: value for name, value in said.values.items() if before.values.get(name) != value}
                differs = [name for name in fresh if name in before.values]
                done = said.executed if said.executed != before.executed else None
                if done is not None and before.executed is not None:
                    differs.append("executed")
                if differs and not correct:
                    raise OutcomeConflict(
                        f"{said.decision_id}: {', '.join(differs)} already known with another value; nothing of this request was stored"
                        ' (send "correct": true to replace it)'
                    )
                if not fresh and done is None:
                    continue
                accepted += 1
                database.executemany(
                    "INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?)", [(said.decision_id, name, value, now) for name, value in fresh.items()]
                )
                if done is not None:
                    database.execute(
                        "INSERT OR REPLACE INTO executed VALUES (?, ?, ?)", (said.decision_id, None if isinstance(done, bool) else json.dumps(done), now)
                    )
                known[said.decision_id] = Known({**before.values, **fresh}, done if done is not None else before.executed, now)
            return accepted, len(reported) - accepted

        return self._submit(job, alone=True)

    def record_activity(self, events: Sequence[Event]) -> Future[tuple[int, int]]:
        """Store events; yields how many were new and how many were there already, equal in every part."""
        rows = [(e.player_id, e.occurred_at, json.dumps(e.body, sort_keys=True)) for e in events]
        asked = json.dumps(rows)

        def job(database: sqlite3.Connection) -> tuple[int, int]:
            if self._heard is None:
                self._heard = int(database.execute("SELECT coalesce(max(recorded_at), 0) FROM activity").fetchone()[0])
            others, new = self._databases()[1:], 0
            with self._reading:
                elsewhere = {row for other in others for row in other.execute(_HEARD, (asked,))}
            for player, occurred_at, body in rows:
                if (player, occurred_at, body) in elsewhere:
                    continue
                # later than the one before, whatever the clock says: up to which event a state is complete is told by this moment alone
                self._heard = max(now_us(), self._heard + 1)
                row = (player, occurred_at, self._heard, body)
                new += database.execute("INSERT OR IGNORE INTO activity(player_id, occurred_at, recorded_at, body) VALUES (?, ?, ?, ?)", row).rowcount
            return new, len(rows) - new

        return self._submit(job, alone=True)

    def unapplied(self, limit: int = 10_000) -> list[tuple[int, Event]]:
        """Events of this file that the online store does not have yet, oldest first, with the key that `applied` takes."""
        with self._reading:
            rows = (
                self._reader(self.path)
                .execute(
                    "SELECT rowid, player_id, occurred_at, body, recorded_at FROM activity WHERE applied = 0 ORDER BY recorded_at, rowid LIMIT ?", (limit,)
                )
                .fetchall()
            )
        return [(row[0], Event(row[1], row[2], json.loads(row[3]), row[4])) for row in rows]

    def applied(self, keys: Sequence[int]) -> Future[None]:
        """Mark events as known to the online store."""

        def job(database: sqlite3.Connection) -> None:
            database.executemany("UPDATE activity SET applied = 1 WHERE rowid = ?", [(k,) for k in keys])

        return self._submit(job)

    def probe(self) -> Future[None]:
        """A real, empty write: yields None if the log can be written now."""

        def job(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM requests WHERE key = ''")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            database.execute(f"PRAGMA user_version = {int(version) % 1_000_000 + 1}")

        return self._submit(job)

    def close(self) -> None:
        """Commit what waits, then let go of the file."""
        self._jobs.put(None)
        self._writer.join()
        if self._copier is not None:
            self._copier.join()
        with self._reading:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()
        self._database.close()
        self.turns.close()
        self._lock.release()

    # ---- reading ------------------------------------------------------------------------------------------------------
    def _reader(self, path: Path) -> sqlite3.Connection:
        if path not in self._readers:
            reader = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5, isolation_level=None, check_same_thread=False)
            reader.execute(f"PRAGMA mmap_size={MAPPED}")  # each commit voids the pages that a reader has kept, and to map them again costs nothing
            self._readers[path] = reader
        return self._readers[path]

    def _databases(self) -> list[sqlite3.Connection]:
        """A reader for each file, our own first."""
        with self._reading:
            others = self._files()[0]
            for gone in set(self._readers) - {self.path, *others}:
                self._readers.pop(gone).close()
            return [self._reader(path) for path in (self.path, *others)]

    def _batch(self, path: Path) -> pl.DataFrame:
        """A batch without its states, sorted by player; read once."""
        written = path.stat().st_mtime_ns
        kept = self._batches.get(path)
        if kept is None or kept[0] != written:
            wanted = ["decision_id", "player_id", "decided_at", "policy", *self.platform.action_columns]
            frame = pl.scan_parquet(path).select(wanted).with_columns(pl.col("decision_id", "player_id").cast(pl.String)).collect().sort("player_id")
            kept = self._batches[path] = (written, frame)
        return kept[1]

    def _batches_together(self) -> pl.DataFrame | None:
        """All batches as one frame sorted by player, `at`: when (us); made anew when a file came, went or was written again."""
        files = self._batch_files()
        if not files:
            return None
        written = tuple((path, path.stat().st_mtime_ns) for path in files)
        with self._reading:
            if self._together is None or self._together[0] != written:
                frame = pl.concat([self._batch(path) for path in files], how="vertical_relaxed")
                self._together = written, frame.with_columns(pl.col("decided_at").dt.epoch("us").alias("at")).sort("player_id")
            return self._together[1]

    def _files(self) -> tuple[list[Path], list[Path]]:
        """The other processes' files, and the batches; the directory is listed again when it has changed."""
        changed = self.path.parent.stat().st_mtime_ns
        if changed != self._listed[0]:
            files = sorted(self.path.parent.iterdir())
            found = ([p for p in files if p.suffix == ".db" and p != self.path and not p.name.startswith(".")], [p for p in files if p.suffix == ".parquet"])
            self._listed = (changed if settled(changed) else -1, *found)
        return self._listed[1], self._listed[2]

    def _batch_files(self) -> list[Path]:
        return self._files()[1]

    def _served(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that were served, by any process."""
        wanted = set(ids)
        found: set[str] = set()
        for database in self._databases():
            if missing := wanted - found:
                with self._reading:
                    found.update(
                        r[0]
                        for r in database.execute(
                            "SELECT decision_id FROM decisions WHERE decision_id IN (SELECT value FROM json_each(?))", (json.dumps(list(missing)),)
                        )
                    )
        for path in self._batch_files():
            if missing := wanted - found:
                found.update(self._batch(path).filter(pl.col("decision_id").is_in(list(missing)))["decision_id"].to_list())
        return found

    def known(self, ids: Sequence[str]) -> dict[str, Known]:
        """What has been reported of each decision, from every file; what was recorded last stands."""
        databases = self._databases()
        with self._reading:
            return _known_in(databases, ids)

    def find(self, decision_id: str) -> Decision | None:
        """A decision with the state it saw, from any file or batch; None if it was never served."""
        for database in self._databases():
            with self._reading:
                row = database.execute(f"SELECT {_DECISION}, state FROM decisions WHERE decision_id = ?", (decision_id,)).fetchone()  # noqa: S608 - constants only
            if row is not None:
                return _decision(row, row[9])
        for path in self._batch_files():
            if self._batch(path).filter(pl.col("decision_id") == decision_id).is_empty():
                continue
            row = pl.scan_parquet(path).filter(pl.col("decision_id").cast(pl.String) == decision_id).collect().row(0, named=True)
            action = {name: row[name] for name in self.platform.action_columns}
            decided_at = pl.Series([row["decided_at"]]).dt.epoch("us")[0]
            detail = json.loads(row.get("detail") or "{}")
            return Decision(
                decision_id,
                str(row["player_id"]),
                decided_at,
                row["policy"],
                row.get("propensity"),
                row.get("model_version"),
                action,
                {"batch": path.name, **detail},
                row.get("state"),
                row.get("assignment"),
            )
        return None

    def recent(self, player_ids: Sequence[str], since: int) -> list[Recent]:
        """The players' decisions since a moment (us) as they were executed, oldest first; those that were reported as not carried out are left out."""
        wanted = orjson.dumps(list(dict.fromkeys(player_ids))).decode()
        query = (
            "SELECT decision_id, player_id, decided_at, policy, action, instr(detail, '\"seed\"') FROM decisions"
            " WHERE player_id IN (SELECT value FROM json_each(?)) AND decided_at >= ?"
        )
        rows: list[tuple[str, str, int, str, Action, bool]] = []
        for database in self._databases():
            with self._reading:
                rows += [(r[0], r[1], r[2], r[3], orjson.loads(r[4]), r[5] > 0) for r in database.execute(query, (wanted, since))]
        if (batches := self._batches_together()) is not None:
            players = pl.Series(list(dict.fromkeys(player_ids)), dtype=pl.String)
            low, high = (batches["player_id"].search_sorted(players, side).to_numpy() for side in ("left", "right"))
            if (low < high).any():
                part = batches[np.concatenate([np.arange(start, end) for start, end in zip(low, high, strict=True)])]
                rows += [
                    (r["decision_id"], r["player_id"], r["at"], r["policy"], {c: r[c] for c in self.platform.action_columns}, True)
                    for r in part.iter_rows(named=True)
                    if r["at"] >= since
                ]
        if not rows:
            return []
        known = self.known([r[0] for r in rows])
        found = []
        for decision_id, player_id, decided_at, policy, action, drawn in sorted(rows, key=lambda r: (r[2], r[0])):
            said = known[decision_id]
            if said.executed is not False:
                done = said.executed if isinstance(said.executed, dict) else action
                found.append(Recent(decision_id, player_id, decided_at, policy, done, said.values, max(decided_at, said.heard_at), drawn))
        return found

    def counts(self) -> dict[str, int]:
        """Rows of each table over all files."""
        databases = self._databases()
        with self._reading:
            tables = ("decisions", "outcomes", "activity")
            found = [sum(d.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for d in databases) for table in tables]  # noqa: S608 - constants only
        return dict(zip(tables, found, strict=True))


def _known_in(databases: Sequence[sqlite3.Connection], ids: Sequence[str]) -> dict[str, Known]:
    wanted = json.dumps(list(ids))
    values: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    executed: dict[str, tuple[int, str | None]] = {}
    heard = dict.fromkeys(ids, 0)
    for database in databases:
        for i, name, value, at in database.execute(
            "SELECT decision_id, objective, value, recorded_at FROM outcomes WHERE decision_id IN (SELECT value FROM json_each(?))", (wanted,)
        ):
            values[i][name] = max(values[i].get(name, (at, value)), (at, value))
            heard[i] = max(heard[i], at)
        for i, action, at in database.execute(
            "SELECT decision_id, action, recorded_at FROM executed WHERE decision_id IN (SELECT value FROM json_each(?))", (wanted,)
        ):
            if i not in executed or at >= executed[i][0]:
                executed[i] = (at, action)
            heard[i] = max(heard[i], at)
    return {i: Known({name: value for name, (_, value) in values[i].items()}, _executed(executed[i][1]) if i in executed else None, heard[i]) for i in ids}


def _begin(path: Path) -> None:
    """A file with its tables, if there is none yet: whole from the first moment, since others read it as soon as they see it."""
    if path.exists():
        return
    hidden = path.with_name(f".{path.name}")
    hidden.unlink(missing_ok=True)  # of a process that died here
    os.close(os.open(hidden, os.O_CREAT | os.O_RDWR, 0o600))
    with contextlib.closing(sqlite3.connect(hidden)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(_SCHEMA)
    hidden.replace(path)


def open_log(platform: Platform) -> DecisionLog:
    """The log of this process: the first file of the workspace that no other process is writing."""
    workspace = Workspace(platform.root)
    workspace.make(workspace.served)
    for number in range(10_000):
        path = workspace.served / f"{number:04d}.db"
        lock = FileLock(path.with_suffix(".db.lock"), mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        except OSError as error:
            raise WorkspaceError(
                f"{path}: the decision log cannot be opened ({error.strerror}); check the directory's owner and the disk's free space"
            ) from None
        try:
            _begin(path)
            log = DecisionLog(platform, path, lock)
            directory = os.open(workspace.served, os.O_RDONLY)
            os.fsync(directory)  # a new file must survive a power cut as its rows do
            os.close(directory)
        except (sqlite3.Error, OSError) as error:
            lock.release()
            raise WorkspaceError(f"{path}: the decision log cannot be opened ({error}); check the disk, or restore a backup") from None
        else:
            return log
    raise WorkspaceError(f"{workspace.served}: 10,000 processes are writing here; stop some")
