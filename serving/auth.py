"""API keys and the console's sign-in: SQLite in the workspace, of every secret only a hash.

A key is `fq_<id>_<secret>`; the id finds its row, the 256 random bits of the secret make a plain sha256 enough (there is nothing to guess
that a slow hash would protect). Signing in on the console exchanges a key for a random session token, so the cookie is never the key itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from fastq.errors import ConfigurationError, FastqError, WorkspaceError
from fastq.platform import Tokens as TokenSettings
from fastq.workspace import Workspace, settled

logger = logging.getLogger("fastq.serving")
Role = Literal["recommend", "analyst", "admin"]
ROLES: tuple[Role, ...] = ("recommend", "analyst", "admin")  # each may do all that those before it may
SESSION_SECONDS = 12 * 3600
FRESH_SECONDS = 0.5  # how long a revoked key may still be let in
COOKIE = "fastq_session"
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]  # public keys alone: what can be verified cannot be forged
MOST_TOKENS = 10_000  # that were checked and are remembered until they expire

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys(id TEXT PRIMARY KEY, hash TEXT NOT NULL, role TEXT NOT NULL, created_at INTEGER NOT NULL, revoked_at INTEGER,
    expires_at INTEGER);
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
        if not any(column[1] == "expires_at" for column in connection.execute("PRAGMA table_info(keys)")):  # a file of an earlier release
            connection.execute("ALTER TABLE keys ADD COLUMN expires_at INTEGER")
        with connection:
            yield connection
    except sqlite3.Error as error:
        raise WorkspaceError(f"{workspace.keys}: the key file cannot be used ({error}); check the disk, or restore a backup") from None
    finally:
        connection.close()


def create_key(workspace: Workspace, role: str, expires: timedelta | None = None) -> dict[str, str]:
    """A new key as `{id, key, role}`, good for ever or until `expires` from now. The key itself is nowhere kept: what is not written down now is lost."""
    if role not in ROLES:
        raise ConfigurationError(f"--role {role}: expected one of {', '.join(ROLES)}")
    key_id, secret = secrets.token_hex(4), secrets.token_hex(32)
    key = f"fq_{key_id}_{secret}"
    with _database(workspace) as database:
        now = int(time.time())
        until = None if expires is None else now + int(expires.total_seconds())
        database.execute("INSERT INTO keys(id, hash, role, created_at, expires_at) VALUES (?, ?, ?, ?, ?)", (key_id, _digest(key), role, now, until))
    return {"id": key_id, "key": key, "role": role}


def list_keys(workspace: Workspace) -> list[dict[str, object]]:
    """Every key that was ever made, oldest first: id, role, created_at, revoked_at and expires_at (seconds since 1970, or None)."""
    if not workspace.keys.exists():
        return []
    with _database(workspace) as database:
        rows = database.execute("SELECT id, role, created_at, revoked_at, expires_at FROM keys ORDER BY created_at, rowid").fetchall()
    return [dict(zip(("id", "role", "created_at", "revoked_at", "expires_at"), row, strict=True)) for row in rows]


def revoke_key(workspace: Workspace, key_id: str) -> None:
    """From now on (half a second at most, in servers that run) the key and its sessions open nothing."""
    with _database(workspace) as database:
        found = database.execute("UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", (int(time.time()), key_id)).rowcount
        database.execute("DELETE FROM sessions WHERE key_id = ?", (key_id,))
    if not found:
        raise ConfigurationError(f"{key_id}: no such key id; `fastq keys list` shows them")


@dataclass
class Tokens:
    """JSON Web Tokens of the issuer that `serving.tokens` names: signature, issuer, audience and expiry are checked, each token once."""

    settings: TokenSettings
    root: Path
    _known: dict[str, tuple[Caller, float]] = field(default_factory=dict)
    _client: Any = None

    def knows(self, token: str) -> bool:
        """Whether a token was checked already."""
        return token in self._known

    def verify(self, token: str) -> Caller:
        """The caller behind a token. Raises `NotSignedIn`."""
        if (kept := self._known.get(token)) is not None:
            if kept[1] > time.time():
                return kept[0]
            del self._known[token]
        import jwt

        try:
            claims = jwt.decode(
                token, self._key(token), algorithms=ALGORITHMS, issuer=self.settings.issuer, audience=self.settings.audience,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )  # fmt: skip
        except jwt.PyJWTError as error:
            raise NotSignedIn(f"this token does not open anything here: {str(error).rstrip('.').lower()}") from None
        except (OSError, ValueError, KeyError) as error:
            logger.error("serving.tokens.jwks cannot be read: %s", error)
            raise NotSignedIn("tokens cannot be checked now; the server's log says why") from None
        given = claims.get(self.settings.role_claim)
        roles = [role for role in ROLES if role in (given if isinstance(given, list) else [given])]
        if not roles:
            raise NotSignedIn(f"this token names no role of ours in {self.settings.role_claim!r}; expected one of {', '.join(ROLES)}")
        caller = Caller(f"token:{claims['sub']}", roles[-1])
        if len(self._known) >= MOST_TOKENS:
            self._known.clear()
        self._known[token] = (caller, float(claims["exp"]))
        return caller

    def _key(self, token: str) -> Any:
        import jwt

        where = self.settings.jwks
        if where.startswith("https://"):
            self._client = self._client or jwt.PyJWKClient(where, cache_keys=True, lifespan=300, timeout=5)
            return self._client.get_signing_key_from_jwt(token)
        keys = jwt.PyJWKSet.from_json((self.root / where).read_text(encoding="utf-8"))
        return keys[jwt.get_unverified_header(token)["kid"]]


@dataclass
class Keys:
    """The keys of a workspace as a server sees them, read again when the last look is older than `FRESH_SECONDS`."""

    workspace: Workspace
    tokens: Tokens | None = None
    _read_at: float = -1.0
    _seen: tuple[int, int] | None = None
    _valid: dict[str, tuple[str, Role, float]] = field(default_factory=dict)  # id -> hash, role, when it expires
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _current(self) -> dict[str, tuple[str, Role, float]]:
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_SECONDS:
                seen = self._changed()
                if seen is None or seen != self._seen:
                    valid: dict[str, tuple[str, Role, float]] = {}
                    if seen is not None:
                        with _database(self.workspace) as database:
                            rows = database.execute("SELECT id, hash, role, expires_at FROM keys WHERE revoked_at IS NULL").fetchall()
                        valid = {row[0]: (row[1], row[2], math.inf if row[3] is None else row[3]) for row in rows}
                    self._valid, self._seen = valid, seen if seen is not None and settled(seen[0]) else None
                self._read_at = time.monotonic()
            return self._valid

    def _changed(self) -> tuple[int, int] | None:
        """What changes with the key file; None where there is none."""
        try:
            found = self.workspace.keys.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size

    def any(self) -> bool:
        """Whether there is a key or an issuer of tokens that opens anything."""
        return self.tokens is not None or any(expires > time.time() for _, _, expires in self._current().values())

    def remote(self, authorization: str | None) -> bool:
        """Whether `verify` may have to ask a token's issuer, and so take a while."""
        if self.tokens is None or authorization is None or not self.tokens.settings.jwks.startswith("https://"):
            return False
        return authorization.count(".") == 2 and not self.tokens.knows(authorization.partition(" ")[2].strip())

    def verify(self, authorization: str | None, session: str | None = None) -> Caller:
        """The caller behind an `Authorization: Bearer KEY` header, or behind a console session's token. Raises `NotSignedIn`."""
        if authorization is not None:
            scheme, _, key = authorization.partition(" ")
            key = key.strip()
            if scheme.lower() != "bearer" or not key:
                raise NotSignedIn("expected the header Authorization: Bearer KEY; `fastq keys create --role ROLE` makes a key")
            if self.tokens is not None and key.count(".") == 2:
                return self.tokens.verify(key)
            return self._caller(key)
        if session:
            return self._session(session)
        raise NotSignedIn("a key is needed: send the header Authorization: Bearer KEY; `fastq keys create --role ROLE` makes one")

    def _caller(self, key: str) -> Caller:
        valid = self._current()
        parts = key.split("_")
        key_id = parts[1] if len(parts) == 3 else ""
        kept, role, expires = valid.get(key_id, ("", "recommend", math.inf))
        # An unknown id is compared too, so that the time taken does not tell which ids exist.
        if not hmac.compare_digest(kept or "0" * 64, _digest(key)) or not kept:
            raise NotSignedIn("this key is not known here, or it was revoked; `fastq keys list` shows the ids of those that are")
        if expires <= time.time():
            raise NotSignedIn("this key has expired; `fastq keys create --role ROLE` makes another")
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
            now = int(time.time())
            row = database.execute(
                "SELECT keys.id, keys.role FROM sessions JOIN keys ON keys.id = key_id WHERE sessions.hash = ? AND sessions.expires_at > ?"
                " AND revoked_at IS NULL AND coalesce(keys.expires_at, ?) > ?",
                (_digest(token), now, now + 1, now),
            ).fetchone()
        if row is None:
            raise NotSignedIn("this sign-in has ended; sign in again at /console")
        return Caller(row[0], row[1])
