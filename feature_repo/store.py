"""The one seam to Feast: open, apply, find rows point in time, materialise, read and push.

The configuration is built in code from absolute paths (Feast resolves relative ones against the current directory); `feature_store.yaml`
beside this file says the same for people who use the `feast` command. Processes that read or write run under TZ=UTC
(`fastq.environment.prepare`): Feast's SQLite store keeps local times.
"""

from __future__ import annotations

import contextlib
import io
import sqlite3
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fastq import features
from fastq.errors import ConfigurationError, LogsError, WorkspaceError
from fastq.platform import Platform
from fastq.workspace import Workspace, replacing
from feature_repo.definitions import ROWS_FILE, ROWS_VIEW, STATE_FILE, STATE_VIEW, attribute_fields, definitions, feature_directory, project_name, state_columns

if TYPE_CHECKING:
    from feast import FeatureStore, RepoConfig

BATCH = 10_000  # players written in one transaction: readers wait for a short one, and memory stays flat
CHUNK = 1_000  # players read in one query; SQLite takes 32,766 parameters at most
_DRIVERS = {"redis": "redis", "postgres": "psycopg"}


@dataclass(frozen=True)
class PlayerStore:
    """An open feature store. `online` is the embedded online store's file and `identity` which file it was on opening; None for a server."""

    platform: Platform
    feast: FeatureStore
    online: Path | None
    identity: tuple[int, int] | None


# ---- configuration ---------------------------------------------------------------------------------------------------
def online_store_config(platform: Platform) -> dict[str, Any]:
    """`services.online_store` as Feast's settings: `sqlite`, `redis://[:PASSWORD@]HOST:PORT/DB` or `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`."""
    service = platform.services.online_store
    if service == "sqlite":
        return {"type": "sqlite", "path": str(Workspace(platform.root).feast / "online.db")}
    try:
        url = urllib.parse.urlsplit(service)
        port = url.port
    except ValueError as error:
        raise ConfigurationError(f"services.online_store: {service!r} is not a URL ({error})") from None
    if url.scheme in ("redis", "rediss") and url.hostname:
        parts = [f"{url.hostname}:{port or 6379}", f"db={url.path.strip('/') or 0}"]
        parts += [f"username={urllib.parse.unquote(url.username)}"] if url.username else []
        parts += [f"password={urllib.parse.unquote(url.password)}"] if url.password else []
        parts += ["ssl=true"] if url.scheme == "rediss" else []
        return {"type": "redis", "connection_string": ",".join(parts)}
    if url.scheme in ("postgresql", "postgres") and url.hostname and url.path.strip("/"):
        options = dict(urllib.parse.parse_qsl(url.query))
        return {
            "type": "postgres", "host": url.hostname, "port": port or 5432, "database": url.path.strip("/"), "db_schema": options.get("schema", "public"),
            "user": urllib.parse.unquote(url.username or ""), "password": urllib.parse.unquote(url.password or ""), "sslmode": options.get("sslmode", "prefer"),
        }  # fmt: skip
    raise ConfigurationError(f"services.online_store: expected sqlite, redis://HOST:PORT/DB or postgresql://USER:PASSWORD@HOST/DATABASE, got {service!r}")


def repository(platform: Platform) -> dict[str, Any]:
    """The whole of Feast's configuration, in the words of `feature_store.yaml`."""
    workspace = Workspace(platform.root)
    return {
        "project": project_name(platform),
        "provider": "local",
        "registry": {
            "registry_type": "sql", "path": f"sqlite:///{workspace.feast / 'registry.db'}", "cache_ttl_seconds": 60,
            "serve_features_while_materializing": True,  # without it Feast refuses reads while the next states are written
        },
        "offline_store": {"type": "duckdb"},  # the dask store loses entity rows, the ray store ignores the time to live
        "online_store": online_store_config(platform),
        "materialization": {"online_write_batch_size": BATCH},
        "entity_key_serialization_version": 3,
    }  # fmt: skip


def _repo_config(platform: Platform) -> RepoConfig:
    tree = repository(platform)
    kind = tree["online_store"]["type"]
    try:
        from feast import RepoConfig
        from feast.errors import FeastExtrasDependencyImportError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                config = RepoConfig(**tree)
                _ = config.online_store  # imports the driver
            except FeastExtrasDependencyImportError:
                raise ConfigurationError(f"services.online_store: {kind} needs the package {_DRIVERS[kind]!r}; run `pip install {_DRIVERS[kind]}`") from None
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"services.online_store: {kind} needs the module {error.name!r}; run `pip install {_DRIVERS.get(kind, kind)}`") from None
    return config


# ---- opening and applying --------------------------------------------------------------------------------------------
def open_store(platform: Platform) -> PlayerStore:
    """Open the feature store of a workspace; raises `WorkspaceError` if nothing was ever applied there, or its online store is gone."""
    workspace = Workspace(platform.root)
    if not (workspace.feast / "registry.db").exists():
        raise WorkspaceError(f"{workspace.feast}: no feature store here yet; run `fastq retrain` to fill it")
    online = workspace.feast / "online.db" if platform.services.online_store == "sqlite" else None
    return PlayerStore(platform, _feature_store(platform), online, _identity(online))


def apply(platform: Platform) -> PlayerStore:
    """Register the platform's entity and views, create the online table, and open the store. Repeating it changes nothing."""
    workspace = Workspace(platform.root)
    workspace.make(workspace.feast, workspace.features)
    online = workspace.feast / "online.db" if platform.services.online_store == "sqlite" else None
    with workspace.lock("feast", wait_seconds=120):
        store = _feature_store(platform)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Feast's notices of its own next release
            store.apply(definitions(platform).objects())
        if online is not None:
            with contextlib.closing(sqlite3.connect(online)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # kept in the file: readers go on while states are written
    return PlayerStore(platform, store, online, _identity(online))


def _feature_store(platform: Platform) -> FeatureStore:
    config = _repo_config(platform)
    from feast import FeatureStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return FeatureStore(config=config)


def _identity(online: Path | None) -> tuple[int, int] | None:
    """Which file the embedded store is; raises `WorkspaceError` if there is none."""
    if online is None:
        return None
    try:
        found = online.stat()
    except OSError:
        raise WorkspaceError(f"{online}: the online store is not there; run `fastq retrain` to fill it again, or put it back") from None
    return found.st_dev, found.st_ino


# ---- offline ---------------------------------------------------------------------------------------------------------
def publish_rows(platform: Platform, frame: pl.DataFrame) -> Path:
    """Write the frame of `fastq.features.PlayerRows` as the Parquet file behind `player_rows`."""
    path = feature_directory(platform) / ROWS_FILE
    columns = ["player_id", "event_timestamp", "created_timestamp", "row", "period", "policy"]
    with replacing(path) as partial:
        frame.select(*columns, *(pl.col(name).alias(field) for name, field in attribute_fields(platform).items())).write_parquet(partial)
    return path


def historical_pointers(platform: Platform, decisions: pl.DataFrame) -> pl.DataFrame:
    """`decision_id`, `row`: the last row that was complete and known when each decision was made, null where there was none.

    `decisions` needs decision_id, player_id and decided_at. One row comes back per decision, in their order.
    """
    if not (feature_directory(platform) / ROWS_FILE).exists():
        raise WorkspaceError(f"{feature_directory(platform) / ROWS_FILE}: no feature rows yet; run `fastq retrain`")
    store = apply(platform).feast
    asked = decisions.select("decision_id", "player_id", pl.col("decided_at").alias("event_timestamp"))
    if asked.is_empty():
        return pl.DataFrame(schema={"decision_id": pl.String, "row": pl.Int64})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast and ibis warn about each other's next release
        # a value that became known after the decision is no feature of it: without the filter Feast goes by event time alone
        found = store.get_historical_features(entity_df=asked.to_pandas(), features=[f"{ROWS_VIEW}:row"], filter_by_created_timestamp=True).to_arrow()
    answer = pl.from_arrow(found)
    assert isinstance(answer, pl.DataFrame)
    rows = answer.select("decision_id", pl.col("row").cast(pl.Int64))
    if len(rows) != len(asked) or rows["decision_id"].n_unique() != len(asked):
        raise LogsError(f"the feature store answered {len(rows)} rows for {len(asked)} decisions; expected each decision_id once")
    return asked.select("decision_id").join(rows, on="decision_id", how="left", maintain_order="left")


# ---- online ----------------------------------------------------------------------------------------------------------
def materialize(platform: Platform, frame: pl.DataFrame) -> int:
    """Make `frame` (`fastq.features.online_frame`) what the online store answers; returns the number of players.

    The Parquet file behind the view is replaced whole, then Feast materialises it in batches, each one transaction.
    """
    path = feature_directory(platform) / STATE_FILE
    with replacing(path) as partial:
        _stored(platform, frame).write_parquet(partial)
    store = apply(platform)
    if frame.is_empty():
        return 0
    times = frame["event_timestamp"]
    first, last = times.min(), times.max()
    assert isinstance(first, datetime) and isinstance(last, datetime)
    # Feast announces itself on stdout and draws a bar on stderr; stdout belongs to --json
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        store.feast.materialize(start_date=first - timedelta(seconds=1), end_date=last + timedelta(seconds=1), feature_views=[STATE_VIEW])
    return len(frame)


def materialized(platform: Platform) -> pl.DataFrame:
    """The frame that was materialised last: the file behind the online view. Newer pushes are in the store only."""
    path = feature_directory(platform) / STATE_FILE
    try:
        return _restored(platform, pl.read_parquet(path, glob=False))
    except FileNotFoundError:
        raise WorkspaceError(f"{path}: no player states yet; run `fastq retrain`") from None


def push(store: PlayerStore, frame: pl.DataFrame) -> None:
    """Write these players' states (columns of `online_frame`) to the online store now; the next read sees them.

    Their event time becomes this moment: Redis keeps the newest event and ignores an equal one, SQLite and PostgreSQL the last one written.
    """
    _present(store)
    now = datetime.now(UTC)
    for batch in _stored(store.platform, frame.with_columns(event_timestamp=pl.lit(now, pl.Datetime("us", "UTC")))).iter_slices(BATCH):
        with warnings.catch_warnings(), _translated(store):
            warnings.simplefilter("ignore")
            store.feast.write_to_online_store(STATE_VIEW, df=batch.to_pandas())


def read_online(store: PlayerStore, player_ids: Sequence[str], progress: Callable[[int], None] | None = None) -> pl.DataFrame:
    """The stored rows of these players (columns of `online_frame`), in their order; players of whom nothing is stored are left out.

    Raises `WorkspaceError` if the store is gone or was replaced since it was opened: open it again, or answer without a state.
    `event_timestamp` is exact to the second. Feast applies no time to live online: the reader judges age by `seen_at` and `period`.
    """
    _present(store)
    parts = []
    for start in range(0, len(player_ids), CHUNK):
        parts.append(_read(store, list(player_ids[start : start + CHUNK])))
        if progress:
            progress(min(start + CHUNK, len(player_ids)))
    return pl.concat(parts) if parts else pl.DataFrame(schema=features.online_schema(store.platform))


def _read(store: PlayerStore, player_ids: list[str]) -> pl.DataFrame:
    schema, fields = features.online_schema(store.platform), attribute_fields(store.platform)
    columns = {name: fields.get(name, name) for name in schema if name not in ("player_id", "event_timestamp")}
    with _translated(store):
        wanted = [f"{STATE_VIEW}:{field}" for field in columns.values()]
        answer = store.feast.get_online_features(features=wanted, entity_rows=[{"player_id": p} for p in player_ids]).proto  # as dicts it would cost twice
    at = {name: position for position, name in enumerate(answer.metadata.feature_names.val)}
    periods = answer.results[at["period"]]
    there = [i for i, value in enumerate(periods.values) if value.WhichOneof("val") is not None]
    data: dict[str, pl.Series] = {
        "player_id": pl.Series([player_ids[i] for i in there], dtype=pl.String),
        "event_timestamp": _moments(pl.Series([periods.event_timestamps[i].seconds * 1_000_000 for i in there], dtype=pl.Int64)),
    }
    for name, field in columns.items():
        data[name] = _column([answer.results[at[field]].values[i] for i in there], schema[name])
    return pl.DataFrame(data).select(list(schema))


def _column(values: list[Any], kind: Any) -> pl.Series:
    """Feast's values as a column; in numbers that may be missing Feast writes NaN for null."""
    if kind == pl.List(pl.Float32):
        return _arrays([v.float_list_val.val for v in values], np.float32).cast(kind)
    if kind == pl.List(pl.Float64):
        return _arrays([v.double_list_val.val for v in values], np.float64).cast(kind)
    if kind == pl.String:
        return pl.Series([v.string_val if v.WhichOneof("val") else None for v in values], dtype=pl.String)
    if kind == pl.Int64:
        return pl.Series([v.int64_val for v in values], dtype=pl.Int64)
    numbers = pl.Series([v.double_val if v.WhichOneof("val") else None for v in values], dtype=pl.Float64).fill_nan(None)
    return numbers if kind == pl.Float64 else _moments(numbers)


def _moments(microseconds: pl.Series) -> pl.Series:
    """Microseconds since 1970 as moments in UTC."""
    return microseconds.cast(pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _arrays(values: list[Any], dtype: type) -> pl.Series:
    if not values:
        return pl.Series([], dtype=pl.List(pl.Float32 if dtype is np.float32 else pl.Float64))
    return pl.Series(np.stack([np.array(v, dtype) for v in values]))


def _stored(platform: Platform, frame: pl.DataFrame) -> pl.DataFrame:
    """An online frame with Feast's field names and types, and `created_timestamp`."""
    fields = attribute_fields(platform)
    schema = features.online_schema(platform)
    moments = [name for name, kind in schema.items() if kind == pl.Datetime("us", "UTC") and name != "event_timestamp"]
    frame = frame.select(pl.col(name).cast(kind) for name, kind in schema.items())
    frame = frame.with_columns(pl.col(name).dt.epoch("us").cast(pl.Float64) for name in moments)
    kept = ["player_id", "event_timestamp", *state_columns(platform)]
    return frame.rename(fields).select(kept).with_columns(created_timestamp=pl.col("event_timestamp"))


def _restored(platform: Platform, stored: pl.DataFrame) -> pl.DataFrame:
    """The inverse of `_stored`."""
    schema, names = features.online_schema(platform), {field: name for name, field in attribute_fields(platform).items()}
    frame = stored.rename(names)
    moments = [name for name, kind in schema.items() if kind == pl.Datetime("us", "UTC") and name != "event_timestamp"]
    return frame.with_columns(_moments(frame[name]) for name in moments).select(list(schema))


def _present(store: PlayerStore) -> None:
    """The embedded store's file is still the one that was opened; an open SQLite connection would go on answering from a file that was moved away."""
    if store.online is not None and _identity(store.online) != store.identity:
        raise WorkspaceError(f"{store.online}: the online store was replaced while it was open; open it again")


@contextlib.contextmanager
def _translated(store: PlayerStore) -> Iterator[None]:
    """Feast and its drivers raise what they like; to us the store either answers or is unavailable."""
    try:
        yield
    except Exception as error:
        where = store.online or store.platform.services.online_store.rsplit("@", 1)[-1]
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise WorkspaceError(f"{where}: the online store does not answer ({said}); check services.online_store, or run `fastq retrain`") from error
