"""Players who stay forgotten, and files without one of them.

Of a forgotten player a salted hash stays, so that the platform's own logs, which still hold them, do not bring them back: `staging` leaves out whoever
`Forgotten` holds. The salt is random and never leaves the workspace, so a hash says nothing to anybody who has not got both the workspace and the id.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from filelock import FileLock, Timeout

from fastq.errors import WorkspaceError
from fastq.workspace import Workspace, replacing

FILE = "forgotten.json"


@dataclass(frozen=True)
class Forgotten:
    """Ids that were forgotten in a workspace, by keyed hash: those of players or, under the same salt, those of their decisions."""

    salt: bytes
    hashes: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.hashes)

    def __contains__(self, player_id: str) -> bool:
        return bool(self.hashes) and self.keyed(player_id) in self.hashes

    def keyed(self, one: str) -> str:
        """What is kept of an id: it says nothing without the salt."""
        return hashlib.blake2b(one.encode(), key=self.salt, digest_size=16).hexdigest()

    def holds(self, ids: pl.Series) -> pl.Series:
        """Which of these rows are of forgotten ids; False for null."""
        if not self.hashes:
            return pl.repeat(value=False, n=len(ids), eager=True)
        gone = [one for one in ids.unique().drop_nulls().to_list() if one in self]
        return ids.is_in(pl.Series(gone, dtype=pl.String).implode()).fill_null(value=False)


def forgotten(workspace: Workspace) -> Forgotten:
    """Whoever was forgotten here. Raises `WorkspaceError` where that can no longer be told: reading on would bring them back."""
    path = workspace.state / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Forgotten(bytes.fromhex(tree["salt"]), frozenset(tree["players"]))
    except FileNotFoundError:
        return Forgotten(b"", frozenset())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(f"{path}: damaged ({type(error).__name__}), so nobody knows who was forgotten; restore it from a backup") from None


def remember(workspace: Workspace, player_id: str) -> bool:
    """Note that a player is forgotten from now on; whether that is new."""
    with workspace.lock("forgotten", wait_seconds=60):
        known = forgotten(workspace)
        salt = known.salt or secrets.token_bytes(32)
        grown = Forgotten(salt, known.hashes | {Forgotten(salt, known.hashes).keyed(player_id)})
        if grown == known:
            return False
        with replacing(workspace.state / FILE) as partial:
            partial.write_text(json.dumps({"salt": salt.hex(), "players": sorted(grown.hashes)}), encoding="utf-8")
            partial.chmod(0o600)
        return True


# ---- files without a player ----------------------------------------------------------------------------------------------
def strike_table(path: Path, player_id: str, decision_ids: Sequence[str]) -> int:
    """Rewrite a Parquet file without the rows of a player, told by `player_id` or by `decision_id`; returns how many there were."""
    try:
        scan = pl.scan_parquet(path, glob=False)
        names = scan.collect_schema().names()
        mine = [pl.col("player_id").cast(pl.String) == player_id] * ("player_id" in names)
        mine += [pl.col("decision_id").cast(pl.String).is_in(pl.Series(decision_ids, dtype=pl.String).implode())] * ("decision_id" in names)
        if not mine:
            return 0
        theirs = pl.any_horizontal(one.fill_null(value=False) for one in mine)
        number = int(scan.select(theirs.sum()).collect(engine="streaming").item() or 0)
        if number:
            with replacing(path) as partial:
                scan.filter(~theirs).sink_parquet(partial)
    except FileNotFoundError:
        return 0  # replaced meanwhile
    except pl.exceptions.PolarsError as error:
        raise WorkspaceError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); remove it, or restore it from a backup") from None
    return number


def strike_page(path: Path, ids: Sequence[str]) -> int:
    """Rewrite a report without the rows of tables that quote one of these ids as JSON does; returns how many there were."""
    text = path.read_text(encoding="utf-8")
    quoted = {html.escape(json.dumps(i, ensure_ascii=ascii_only)).replace("&quot;", "&#34;") for i in ids for ascii_only in (True, False)}
    if not any(one in text for one in quoted):
        return 0
    rows = [row for row in re.findall(r"<tr\b.*?</tr>", text, re.DOTALL) if any(one in row for one in quoted)]
    for row in rows:
        text = text.replace(row, "", 1)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return len(rows)


def strike_log(path: Path, player_id: str) -> dict[str, int]:
    """Delete a player from one server's log of decisions, which may be written to meanwhile; rows by table.

    Idempotency keys keep the decisions of others in the same request. What was deleted is overwritten in the file; and where no server holds it, the file
    is written anew, since SQLite leaves copies of rows that it moved in the slack of its pages.
    """
    removed: dict[str, int] = {}
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
            database.execute("PRAGMA secure_delete=ON")
            database.execute("BEGIN IMMEDIATE")
            mine = "(SELECT decision_id FROM decisions WHERE player_id = :player)"
            requests = database.execute(
                f"SELECT key, decision_ids FROM requests WHERE EXISTS (SELECT 1 FROM json_each(requests.decision_ids) WHERE value IN {mine})",  # noqa: S608 - constants only
                {"player": player_id},
            ).fetchall()
            ids = {row[0] for row in database.execute("SELECT decision_id FROM decisions WHERE player_id = :player", {"player": player_id})}
            for key, kept in requests:
                others = [i for i in json.loads(kept) if i not in ids]
                if others:
                    database.execute("UPDATE requests SET decision_ids = ? WHERE key = ?", (json.dumps(others), key))
                else:
                    database.execute("DELETE FROM requests WHERE key = ?", (key,))
            removed["requests"] = len(requests)
            for table in ("outcomes", "executed"):
                removed[table] = database.execute(f"DELETE FROM {table} WHERE decision_id IN {mine}", {"player": player_id}).rowcount  # noqa: S608 - constants only
            for table in ("activity", "decisions"):
                removed[table] = database.execute(f"DELETE FROM {table} WHERE player_id = :player", {"player": player_id}).rowcount  # noqa: S608 - constants only
            database.execute("COMMIT")
            unheld = FileLock(path.with_suffix(".db.lock"), mode=0o600)  # as `serving.decision_log` locks it
            with contextlib.suppress(Timeout), unheld.acquire(timeout=0):
                database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # as far as readers allow
    except sqlite3.Error as error:
        raise WorkspaceError(
            f"{path}: the log of served decisions cannot be changed ({error}); free disk space or mend the disk, then run this again"
        ) from None
    return removed


def strike_arrays(directory: Path, what: Sequence[str]) -> int:
    """Remove files that no id stands in but whose rows may be the player's; they are made anew from the tables. Returns how many."""
    found = [path for pattern in what for path in directory.rglob(pattern)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)
