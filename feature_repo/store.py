"""The one seam to Feast: open, apply, find rows point in time, materialise, read, push and remove.

The configuration is built in code from absolute paths (Feast resolves relative ones against the current directory); `feature_store.yaml`
beside this file says the same for people who use the `feast` command. Processes that read or write run under TZ=UTC
(`fastq.environment.prepare`): Feast's SQLite store keeps local times.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from fastq import features
from fastq.errors import ConfigurationError, FastqError, LogsError, WorkspaceError
from fastq.features import OnlineStates, Packing
from fastq.platform import Platform
from fastq.workspace import Workspace, replacing, room
from feature_repo import online
from feature_repo.definitions import ROWS_FILE, ROWS_VIEW, STATE_FIELD, STATE_FILE, STATE_VIEW, attribute_fields, definitions, feature_directory, project_name
from feature_repo.online import Values

if TYPE_CHECKING:
    from feast import FeatureStore, RepoConfig

BATCH = 2_000  # players written in one transaction: who pushes waits for one of these, and memory stays flat
CHUNK = 1_000  # players read at once where progress is told
PATIENCE = 60.0  # seconds to wait for another process's read, change and write of some states
_DRIVERS = {"redis": "redis", "postgres": "psycopg"}


@dataclass(frozen=True)
class PlayerStore:
    """An open feature store; any thread may read from it.

    `online` is the embedded online store's file and `identity` which file it was on opening, None for a server; `values` reads what Feast wrote there,
    by keys that begin with `prefix`.
    """

    platform: Platform
    feast: FeatureStore
    online: Path | None
    identity: tuple[int, int] | None
    values: Values
    prefix: bytes
    packing: Packing

    def close(self) -> None:
        """Let go of the connections."""
        self.values.close()
        _close(self.feast)


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
        # Feast would silently drop a write whose time is not newer than what is there: a corrected value, or a host whose clock is behind
        return {"type": "redis", "connection_string": ",".join(parts), "skip_dedup": True}
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
    file = workspace.feast / "online.db" if platform.services.online_store == "sqlite" else None
    return _opened(platform, _feature_store(platform), file)


def _opened(platform: Platform, feast: FeatureStore, file: Path | None) -> PlayerStore:
    with _translated(platform, file):
        identity, values = _identity(file), online.open_values(feast, file)
    return PlayerStore(platform, feast, file, identity, values, online.entity_prefix(), features.packing(platform))


def apply(platform: Platform) -> PlayerStore:
    """Register the platform's entity and views, create the online table, and open the store. Repeating it changes nothing."""
    feast, file = _applied(platform)
    return _opened(platform, feast, file)


def meaning(platform: Platform) -> str:
    """sha256 over everything but its rows that decides what the store answers."""
    attributes = {name: attribute.kind for name, attribute in platform.state.attributes.items()}
    versions = [version(package) for package in ("fastq", "feast")]
    said = [repository(platform), features.fingerprint(platform), attributes, str(feature_directory(platform)), versions]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _applied(platform: Platform, *, offline: bool = False) -> tuple[FeatureStore, Path | None]:
    """The store with everything registered. For reading `offline` alone nothing is done again that was done already: it takes longer than the reading."""
    workspace = Workspace(platform.root)
    workspace.make(workspace.feast, workspace.features)
    file = workspace.feast / "online.db" if platform.services.online_store == "sqlite" else None
    with workspace.lock("feast", wait_seconds=120), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Feast's notices of its own next release
        store, noted, digest = _feature_store(platform), workspace.feast / "applied", meaning(platform)
        if offline and noted.exists() and noted.read_text(encoding="utf-8") == digest and (workspace.feast / "registry.db").exists():
            return store, file
        with _translated(platform, file):
            with room(workspace.feast / "registry.db"):
                store.apply(definitions(platform).objects())  # makes the online store's tables too
            online.prepare(store, file)
        with replacing(noted) as partial:
            partial.write_text(digest, encoding="utf-8")
    return store, file


def _feature_store(platform: Platform) -> FeatureStore:
    config = _repo_config(platform)
    from feast import FeatureStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return FeatureStore(config=config)


def _close(feast: FeatureStore) -> None:
    """Close the connection that Feast keeps to an online store; it has no way of its own to do so."""
    kept = feast._get_provider().online_store  # noqa: SLF001
    for name in ("_conn", "_client"):
        if (connection := getattr(kept, name, None)) is not None:
            connection.close()
            setattr(kept, name, None)


def _identity(file: Path | None) -> tuple[int, int] | None:
    """Which file the embedded store is; raises `WorkspaceError` if there is none."""
    if file is None:
        return None
    try:
        found = file.stat()
    except OSError:
        raise WorkspaceError(f"{file}: the online store is not there; run `fastq retrain` to fill it again, or put it back") from None
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
    store, _ = _applied(platform, offline=True)
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
def materialize(platform: Platform, frame: pl.DataFrame, served: pl.Series | None = None) -> int:
    """Make `frame` (`fastq.features.online_frame`) what the online store answers; returns the number of players.

    The Parquet file behind the view is replaced whole; then Feast materialises, in batches of one transaction each, the states that are not what the store
    holds already: of all players most were not there since. Not so those of players for whom something was `served` that may still be laid over them: what
    they have of it `read_at` says, which then has to be that of `frame`. What was pushed after `frame` was read is overwritten: bring it again
    (`OnlineStates.heard` says what a row holds).
    """
    path, now = feature_directory(platform) / STATE_FILE, datetime.now(UTC)
    feast, file = _applied(platform)
    states = _stored(platform, frame, now)
    stands = _standing(platform, feast, file, states)
    if served is not None:
        stands &= ~states["player_id"].is_in(served.implode())
    before = states.select("player_id").join(_written(path), on="player_id", how="left", maintain_order="left")["event_timestamp"]
    with replacing(path) as partial:
        # the time of writing is the event time, by which Feast chooses
        states.with_columns(pl.when(stands).then(before).fill_null(pl.col("event_timestamp")).alias("event_timestamp")).write_parquet(partial)
    if stands.all():
        _close(feast)
        return len(frame)
    # Feast announces itself on stdout and draws a bar on stderr; stdout belongs to --json
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _translated(platform, file):
        warnings.simplefilter("ignore")
        feast.materialize(start_date=now - timedelta(milliseconds=1), end_date=now + timedelta(milliseconds=1), feature_views=[STATE_VIEW])
    _close(feast)
    return len(frame)


def _standing(platform: Platform, feast: FeatureStore, file: Path | None, states: pl.DataFrame) -> pl.Series:
    """Which of these states say nothing else than what the online store holds of their players."""
    opened, ids = _opened(platform, feast, file), states["player_id"].to_list()
    try:
        held = (value for start in range(0, len(ids), CHUNK) for value in _values(opened, ids[start : start + CHUNK]))
        pairs = zip(held, states[STATE_FIELD], strict=True)
        return pl.Series([value is not None and features.same_state(opened.packing, value, state) for value, state in pairs], dtype=pl.Boolean)
    finally:
        opened.values.close()


def _written(path: Path) -> pl.DataFrame:
    """When each player's state was last written, as the file behind the view says; of nobody, where there is none that can be read."""
    times = {"player_id": pl.String(), "event_timestamp": pl.Datetime("us", "UTC")}
    try:
        return pl.read_parquet(path, columns=list(times))
    except (OSError, pl.exceptions.PolarsError):
        return pl.DataFrame(schema=times)


def materialized(platform: Platform, most: int | None = None) -> pl.DataFrame:
    """The frame that was materialised last: the file behind the online view. Newer pushes are in the store only. Of more than `most` players, every nth."""
    path = state_file(platform)
    try:
        scanned = pl.scan_parquet(path, glob=False).select("player_id", STATE_FIELD)
        if most is not None:
            scanned = scanned.gather_every(max(1, -(-scanned.select(pl.len()).collect().item() // most)))
        kept = scanned.collect()
    except pl.exceptions.ColumnNotFoundError:
        raise WorkspaceError(f"{path}: was written by an earlier release; run `fastq retrain`") from None
    packed = kept[STATE_FIELD].to_list()
    packing = features.packing(platform)
    width = features.packed_width(packing, packed)
    return features.online_table(platform, features.unpack_online(packing, kept["player_id"].to_list(), packed, width))


def state_file(platform: Platform) -> Path:
    """Where the frame that was materialised last lies. Raises `WorkspaceError` if none was yet."""
    path = feature_directory(platform) / STATE_FILE
    if not path.exists():
        raise WorkspaceError(f"{path}: no player states yet; run `fastq retrain`")
    return path


def known_players(platform: Platform) -> pl.DataFrame:
    """`player_id`, `seen_at` and the attributes of every player who was materialised last."""
    return materialized(platform).select("player_id", "seen_at", *platform.state.attributes)


@contextlib.contextmanager
def exclusive(platform: Platform) -> Iterator[None]:
    """Hold this while states are read, changed and pushed: of two processes that do so at once one would lose what the other added."""
    with Workspace(platform.root).lock("online", wait_seconds=PATIENCE):
        yield


def push(store: PlayerStore, frame: pl.DataFrame) -> None:
    """Write these players' states (columns of `online_frame`) to the online store now; the next read sees them. The last one to write stands."""
    _present(store)
    for batch in _stored(store.platform, frame, datetime.now(UTC)).iter_slices(BATCH):
        with warnings.catch_warnings(), _translated(store.platform, store.online):
            warnings.simplefilter("ignore")
            store.feast.write_to_online_store(STATE_VIEW, df=batch.to_pandas())


def read_states(store: PlayerStore, player_ids: Sequence[str], width: int) -> OnlineStates:
    """What is kept of these players, one row each in their order, as arrays; `width` is F (`fastq.features.row_width`), that of the model to be asked.

    A player of whom nothing is stored, or whose state holds other features than fastq.yaml or the catalogue describe now, has an empty row and `stored`
    False. Nothing expires here: `seen_at`, `period` and `read_at` say how old a row is. Raises `WorkspaceError` if the store is gone or was replaced since
    it was opened: open it again, or answer without states.
    """
    return features.unpack_online(store.packing, player_ids, _values(store, player_ids), width)


def read_online(store: PlayerStore, player_ids: Sequence[str], progress: Callable[[int], None] | None = None) -> pl.DataFrame:
    """The stored rows of these players (columns of `online_frame`), in their order; players of whom nothing is stored are left out. As `read_states`."""
    packed: list[bytes | None] = []
    for start in range(0, len(player_ids), CHUNK):
        packed += _values(store, player_ids[start : start + CHUNK])
        if progress:
            progress(len(packed))
    _present(store)
    there = [i for i, value in enumerate(packed) if value is not None and value.startswith(store.packing.mark)]
    width = features.packed_width(store.packing, packed)
    states = features.unpack_online(store.packing, [player_ids[i] for i in there], [packed[i] for i in there], width)
    return features.online_table(store.platform, states).filter(pl.Series(states.stored))


def remove(store: PlayerStore, player_id: str) -> int:
    """Delete what the online store keeps of a player; returns the number of its rows."""
    _present(store)
    with _translated(store.platform, store.online):
        return store.values.remove(online.entity_keys(store.prefix, [player_id])[0])


def _values(store: PlayerStore, player_ids: Sequence[str]) -> list[bytes | None]:
    from feast.protos.feast.types.Value_pb2 import Value

    _present(store)
    with _translated(store.platform, store.online):
        found = store.values.read(online.entity_keys(store.prefix, player_ids))
    return [None if value is None else Value.FromString(value).bytes_val for value in found]


def _stored(platform: Platform, frame: pl.DataFrame, now: datetime) -> pl.DataFrame:
    """An online frame as the view's rows. Their event time is that of writing; what a state knows of time is inside it, to the microsecond."""
    packed = features.pack_online(features.packing(platform), features.online_states(platform, frame))
    moment = pl.lit(now, pl.Datetime("us", "UTC"))
    return pl.DataFrame({"player_id": frame["player_id"], STATE_FIELD: pl.Series(packed, dtype=pl.Binary)}).with_columns(
        event_timestamp=moment, created_timestamp=moment
    )


def _present(store: PlayerStore) -> None:
    """The embedded store's file is still the one that was opened; an open SQLite connection would go on answering from a file that was moved away."""
    if store.online is not None and _identity(store.online) != store.identity:
        raise WorkspaceError(f"{store.online}: the online store was replaced while it was open; open it again")


@contextlib.contextmanager
def _translated(platform: Platform, file: Path | None) -> Iterator[None]:
    """Feast and its drivers raise what they like; to us the store either answers or is unavailable, for which a full disk is a reason of its own."""
    where = file or platform.services.online_store.rsplit("@", 1)[-1]
    try:
        with room(where, "each player's state is the one before or the new one"):
            yield
    except FastqError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise WorkspaceError(f"{where}: the online store does not answer ({said}); check services.online_store, or run `fastq retrain`") from error
