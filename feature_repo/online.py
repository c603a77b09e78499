"""Feast's online stores read where Feast wrote: one value per player out of its own tables and keys, by one prepared statement or one round trip.

`get_online_features` costs a fifth of a millisecond per player beside the store itself: it builds a message per feature, one per entity, and takes them
apart again. Feast defines and writes; the suite in `tests/contracts` holds what is read here to what Feast answers, on each store.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from feature_repo.definitions import STATE_FIELD, STATE_VIEW

if TYPE_CHECKING:
    from feast import FeatureStore

MAPPED = 2**30  # bytes of the embedded store that are read without a copy
SELECTED = 50  # players in one SQLite statement; all sizes up to it fit the connection's cache of prepared statements


class Values(Protocol):
    """One online store's values, by Feast's entity key."""

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The serialized value of each key, None where there is none."""

    def remove(self, key: bytes) -> int:
        """Delete everything that is kept under a key, in every view; returns the number of rows."""

    def close(self) -> None: ...


def open_values(feast: FeatureStore, online: Path | None) -> Values:
    """The values of an open feature store; `online` is the embedded store's file."""
    kind = feast.config.online_store.type
    if kind == "sqlite":
        assert online is not None
        return _Sqlite(online, _table(feast))
    return _Redis(feast) if kind == "redis" else _Postgres(feast)


def prepare(feast: FeatureStore, file: Path | None) -> None:
    """Settings that a store keeps, made once its table is there; repeating them changes nothing."""
    if file is not None:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA journal_mode=WAL")  # readers go on while states are written
    elif feast.config.online_store.type == "postgres":
        from feast.infra.utils.postgres.connection_utils import _get_conn
        from psycopg import sql

        # a state of more than 2 kB would lie outside its row, in pieces that cost three look-ups more
        with contextlib.closing(_get_conn(feast.config.online_store)) as connection, connection:
            inside = "SELECT attstorage = 'm' FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'value'"
            if connection.execute(inside, (f'"{_table(feast)}"',)).fetchone() == (False,):
                connection.execute(sql.SQL("ALTER TABLE {} ALTER COLUMN value SET STORAGE MAIN").format(sql.Identifier(_table(feast))))


def entity_prefix() -> bytes:
    """What stands before the length and the text of a player's id in Feast's entity keys (version 3)."""
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return bytes(serialize_entity_key(EntityKey(join_keys=["player_id"], entity_values=[Value(string_val="")]), 3)[:-4])


def entity_keys(prefix: bytes, player_ids: Sequence[str]) -> list[bytes]:
    """Feast's entity keys of players."""
    encoded = [player.encode() for player in player_ids]
    return [prefix + struct.pack("<I", len(text)) + text for text in encoded]


def _table(feast: FeatureStore) -> str:
    return f"{feast.config.project}_{STATE_VIEW}"


class _Sqlite:
    def __init__(self, path: Path, table: str) -> None:
        self._path, self._table = path, f'"{table}"'
        self._reader = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        self._reader.execute(f"PRAGMA mmap_size={MAPPED}")
        self._lock = threading.Lock()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found: dict[bytes, bytes] = {}
        with self._lock:
            for start in range(0, len(keys), SELECTED):
                some = keys[start : start + SELECTED]
                marks = ",".join("?" * len(some))
                query = f"SELECT entity_key, value FROM {self._table} WHERE entity_key IN ({marks}) AND feature_name = '{STATE_FIELD}'"  # noqa: S608 - our own names
                found.update(self._reader.execute(query, some).fetchall())
        return [found.get(key) for key in keys]

    def remove(self, key: bytes) -> int:
        database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA secure_delete=ON")  # zeros over what was there, not only a free page
            removed = database.execute(f"DELETE FROM {self._table} WHERE entity_key = ?", (key,)).rowcount  # noqa: S608 - our own name
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # as far as readers allow
        finally:
            database.close()
        return removed

    def close(self) -> None:
        self._reader.close()


class _Redis:
    def __init__(self, feast: FeatureStore) -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import RedisOnlineStore

        self._client: Any = RedisOnlineStore()._get_client(feast.config.online_store)  # noqa: SLF001 - a client of our own, as Feast's settings say
        self._project, self._field = feast.config.project.encode(), _mmh3(f"{STATE_VIEW}:{STATE_FIELD}")

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if len(keys) == 1:
            return [self._client.hget(keys[0] + self._project, self._field)]
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hget(key + self._project, self._field)
            return list(pipe.execute())

    def remove(self, key: bytes) -> int:
        return int(self._client.delete(key + self._project))

    def close(self) -> None:
        self._client.close()


class _Postgres:
    def __init__(self, feast: FeatureStore) -> None:
        from feast.infra.utils.postgres.connection_utils import _get_conn
        from psycopg import sql

        self._connection: Any = _get_conn(feast.config.online_store)
        self._connection.set_autocommit(True)
        table = sql.Identifier(_table(feast))
        self._select = sql.SQL("SELECT entity_key, value FROM {} WHERE entity_key = ANY(%b) AND feature_name = {}").format(table, sql.Literal(STATE_FIELD))
        self._select_one = sql.SQL("SELECT value FROM {} WHERE entity_key = %b AND feature_name = {}").format(table, sql.Literal(STATE_FIELD))
        self._delete = sql.SQL("DELETE FROM {} WHERE entity_key = %s").format(table)

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._connection.cursor(binary=True) as cursor:
            if len(keys) == 1:
                row = cursor.execute(self._select_one, (keys[0],), prepare=True).fetchone()
                return [row[0] if row else None]
            found = dict(cursor.execute(self._select, (list(keys),), prepare=True).fetchall())
        return [found.get(key) for key in keys]

    def remove(self, key: bytes) -> int:
        return int(self._connection.execute(self._delete, (key,)).rowcount)

    def close(self) -> None:
        self._connection.close()
