"""API keys and the console's sign-in: SQLite in the workspace, of every secret only a hash.

A key is `fq_<id>_<secret>`; the id finds its row, the 256 random bits of the secret make a plain sha256 enough (there is nothing to guess
that a slow hash would protect). Signing in on the console exchanges a key for a random session token, so the cookie is never the key itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from fastq.errors import ConfigurationError, FastqError, WorkspaceError
from fastq.workspace import Workspace

Role = Literal["recommend", "analyst", "admin"]
ROLES: tuple[Role, ...] = ("recommend", "analyst", "admin")  # each may do all that those before it may
SESSION_SECONDS = 12 * 3600
FRESH_SECONDS = 0.5  # how long a revoked key may still be let in
COOKIE = "fastq_session"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys(id TEXT PRIMARY KEY, hash TEXT NOT NULL, role TEXT NOT NULL, created_at INTEGER NOT NULL, revoked_at INTEGER);
CREATE TABLE IF NOT EXISTS sessions(hash TEXT PRIMARY KEY, key_id TEXT NOT NULL, expires_at INTEGER NOT NULL);
"""


class NotSignedIn(FastqError):
    """No key, or one that is not known or was revoked."""


class NotAllowed(FastqError):
    """The key's role does not reach this far."""


@dataclass(frozen=True)
class Caller:
    """Who asks: the key's id (never the key) and its role."""

    key_id: str
    role: Role

    def require(self, role: Role) -> None:
        """Raises `NotAllowed` unless this caller's role includes `role`."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise NotAllowed(f"a key with the role {role} is needed; this one has {self.role}")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@contextlib.contextmanager
def _database(workspace: Workspace) -> Iterator[sqlite3.Connection]:
    """One short transaction on the key file, which is made for this user only."""
    workspace.make(workspace.state)
    try:
        os.close(os.open(workspace.keys, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(workspace.keys, timeout=5)
    except (OSError, sqlite3.Error) as error:
        raise WorkspaceError(f"{workspace.keys}: the key file cannot be opened ({error}); check its owner") from None
    try:
        connection.executescript(_SCHEMA)
        with connection:
            yield connection
    except sqlite3.Error as error:
        raise WorkspaceError(f"{workspace.keys}: the key file cannot be used ({error}); check the disk, or restore a backup") from None
    finally:
        connection.close()


def create_key(workspace: Workspace, role: str) -> dict[str, str]:
    """A new key as `{id, key, role}`. The key itself is nowhere kept: what is not written down now is lost."""
    if role not in ROLES:
        raise ConfigurationError(f"--role {role}: expected one of {', '.join(ROLES)}")
    key_id, secret = secrets.token_hex(4), secrets.token_hex(32)
    key = f"fq_{key_id}_{secret}"
    with _database(workspace) as database:
        database.execute("INSERT INTO keys(id, hash, role, created_at) VALUES (?, ?, ?, ?)", (key_id, _digest(key), role, int(time.time())))
    return {"id": key_id, "key": key, "role": role}


def list_keys(workspace: Workspace) -> list[dict[str, object]]:
    """Every key that was ever made, oldest first: id, role, created_at and revoked_at (seconds since 1970, or None)."""
    if not workspace.keys.exists():
        return []
    with _database(workspace) as database:
        rows = database.execute("SELECT id, role, created_at, revoked_at FROM keys ORDER BY created_at, rowid").fetchall()
    return [dict(zip(("id", "role", "created_at", "revoked_at"), row, strict=True)) for row in rows]


def revoke_key(workspace: Workspace, key_id: str) -> None:
    """From now on (half a second at most, in servers that run) the key and its sessions open nothing."""
    with _database(workspace) as database:
        found = database.execute("UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", (int(time.time()), key_id)).rowcount
        database.execute("DELETE FROM sessions WHERE key_id = ?", (key_id,))
    if not found:
        raise ConfigurationError(f"{key_id}: no such key id; `fastq keys list` shows them")


@dataclass
class Keys:
    """The keys of a workspace as a server sees them, read again when the last look is older than `FRESH_SECONDS`."""

    workspace: Workspace
    _read_at: float = -1.0
    _valid: dict[str, tuple[str, Role]] = field(default_factory=dict)  # id -> hash, role
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _current(self) -> dict[str, tuple[str, Role]]:
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_SECONDS:
                valid: dict[str, tuple[str, Role]] = {}
                if self.workspace.keys.exists():
                    with _database(self.workspace) as database:
                        valid = {row[0]: (row[1], row[2]) for row in database.execute("SELECT id, hash, role FROM keys WHERE revoked_at IS NULL")}
                self._valid, self._read_at = valid, time.monotonic()
            return self._valid

    def any(self) -> bool:
        """Whether there is a key that opens anything."""
        return bool(self._current())

    def verify(self, authorization: str | None, session: str | None = None) -> Caller:
        """The caller behind an `Authorization: Bearer KEY` header, or behind a console session's token. Raises `NotSignedIn`."""
        if authorization is not None:
            scheme, _, key = authorization.partition(" ")
            key = key.strip()
            if scheme.lower() != "bearer" or not key:
                raise NotSignedIn("expected the header Authorization: Bearer KEY; `fastq keys create --role ROLE` makes a key")
            return self._caller(key)
        if session:
            return self._session(session)
        raise NotSignedIn("a key is needed: send the header Authorization: Bearer KEY; `fastq keys create --role ROLE` makes one")

    def _caller(self, key: str) -> Caller:
        valid = self._current()
        parts = key.split("_")
        key_id = parts[1] if len(parts) == 3 else ""
        kept, role = valid.get(key_id, ("", "recommend"))
        # An unknown id is compared too, so that the time taken does not tell which ids exist.
        if not hmac.compare_digest(kept or "0" * 64, _digest(key)) or not kept:
            raise NotSignedIn("this key is not known here, or it was revoked; `fastq keys list` shows the ids of those that are")
        return Caller(key_id, role)

    def sign_in(self, key: str) -> tuple[str, Caller]:
        """Exchange a key for a session token, which the console keeps as a cookie for `SESSION_SECONDS`."""
        caller = self._caller(key.strip())
        token, now = secrets.token_hex(32), int(time.time())
        with _database(self.workspace) as database:
            database.execute("DELETE FROM sessions WHERE expires_at < ?", (now,))
            database.execute("INSERT INTO sessions VALUES (?, ?, ?)", (_digest(token), caller.key_id, now + SESSION_SECONDS))
        return token, caller

    def sign_out(self, token: str) -> None:
        """The session opens nothing any more."""
        with _database(self.workspace) as database:
            database.execute("DELETE FROM sessions WHERE hash = ?", (_digest(token),))

    def _session(self, token: str) -> Caller:
        with _database(self.workspace) as database:
            row = database.execute(
                "SELECT keys.id, keys.role FROM sessions JOIN keys ON keys.id = key_id WHERE sessions.hash = ? AND expires_at > ? AND revoked_at IS NULL",
                (_digest(token), int(time.time())),
            ).fetchone()
        if row is None:
            raise NotSignedIn("this sign-in has ended; sign in again at /console")
        return Caller(row[0], row[1])
