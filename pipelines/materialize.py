"""Flow `materialize`: accepted tables to feature rows, their pointers found point in time by Feast, and every player's state online."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from prefect import flow, task

from fastq import features, records, windows
from fastq.features import PlayerRows
from fastq.forgetting import forgotten
from fastq.platform import Platform
from fastq.records import Records
from fastq.windows import Windows
from fastq.workspace import Workspace, replacing
from feature_repo import store
from pipelines.distribute import with_cells
from pipelines.turn import ONCE_A_TURN, RETRIES, Progress, platform_of, progress, running

POINTERS_FILE = "pointers.parquet"


def _known_by(read: Records, at: datetime) -> bool:
    """Whether everything in the tables was known before `at`, so that the offline rows are the online ones too."""
    newest = [read.decisions["decided_at"].max()] + ([read.activity.select(pl.col("known_at").max()).item()] if read.activity is not None else [])
    return all(isinstance(moment, datetime) and moment < at for moment in newest if moment is not None)


@task(name="build features", **RETRIES, **ONCE_A_TURN)
def build_features(workspace: str, turn: str) -> dict[str, Any]:
    """Rows to the offline store, a pointer for each decision back from it, states to the online store."""
    platform = platform_of(workspace)
    tell, steps = progress.get(), 4
    tell("building features", 0, steps, {})
    read = records.read_tables(platform)
    rows = features.build_rows(platform, read)
    store.publish_rows(platform, rows.frame)
    tell("building features", 1, steps, {})
    pointers = _pointers(platform, read, rows)
    tell("building features", 2, steps, {})
    now = datetime.now(UTC)
    frame = features.online_frame(platform, read, now, rows if _known_by(read, now) else None)
    tell("building features", 3, steps, {})
    players = store.materialize(platform, frame, records.players_served(platform, now - (platform.state.window + 1) * platform.state.period))
    _catch_up(platform, frame, read)
    tell("building features", steps, steps, {})
    return {"rows": len(rows.frame), "decisions": len(pointers), "without_history": pointers["row"].null_count(), "players": players, "at": now.isoformat()}


def _pointers(platform: Platform, read: Records, rows: PlayerRows) -> pl.DataFrame:
    """The row before each decision, as the feature store finds it; kept for `windows_of`, and for the next turn.

    A player's rows lie one for each period from the first on, so it would find the same one again for a decision made when it was, wherever the first is
    the same, however many have come since. It is asked for the others only, or for all of them where something else decides on what it answers.
    """
    path, meaning = Workspace(platform.root).features / POINTERS_FILE, store.meaning(platform)
    begun = rows.spans.select("player_id", "first", start="row")
    asked = read.decisions.select("decision_id", "player_id", "decided_at").join(begun, on="player_id", how="left", maintain_order="left")
    row, others = _answered(asked, _kept(path, meaning))
    row = row.scatter(others.arg_true(), store.historical_pointers(platform, asked.filter(others))["row"])
    found = asked.select("decision_id", "decided_at", "first", "start", row=row)
    with replacing(path) as partial:
        found.write_parquet(partial, metadata={"meaning": meaning})
    return found


def _answered(asked: pl.DataFrame, kept: pl.DataFrame) -> tuple[pl.Series, pl.Series]:
    """The row that stands for each decision, where what was found for it in the turn before still does; and for which it does not."""
    then = asked.join(kept, on="decision_id", how="left", suffix=" then", maintain_order="left")
    same = (then["decided_at"] == then["decided_at then"]) & (then["first"] == then["first then"])
    return then["start"] + then["row"] - then["start then"], ~same.fill_null(value=False)


def _kept(path: Path, meaning: str) -> pl.DataFrame:
    """The pointers of the turn before; none, where they can't be read or mean something else."""
    try:
        if pl.read_parquet_metadata(path).get("meaning") == meaning:
            return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        pass  # they are found anew
    times = {"decided_at": pl.Datetime("us", "UTC")} | dict.fromkeys(("first", "start", "row"), pl.Int64())
    return pl.DataFrame(schema={"decision_id": pl.String(), **times})


def _catch_up(platform: Platform, frame: pl.DataFrame, read: Records) -> None:
    """Events that the endpoint took since the logs were read: servers pushed them onto states that have just been replaced.

    Each state says what it has heard, so whatever a server pushes meanwhile counts once.
    """
    with store.exclusive(platform):
        events = records.read_heard(platform, read.heard)
        events = events.filter(~forgotten(Workspace(platform.root)).holds(events["player_id"]))
        if events.is_empty() or frame.is_empty():
            return
        players = events["player_id"].unique()
        concerned = frame.filter(pl.col("player_id").is_in(players.implode()))
        # one row at least, from which the width of a new player's is read
        changed = features.with_events(platform, concerned if len(concerned) else frame[:1], events).filter(pl.col("player_id").is_in(players.implode()))
        opened = store.open_store(platform)
        try:
            store.push(opened, changed)
        finally:
            opened.close()


@functools.lru_cache(maxsize=1)
def windows_of(workspace: str, turn: str) -> Windows:
    """The transitions of the accepted tables, with the pointers that Feast found; kept for the next task of this turn in this process."""
    platform = platform_of(workspace)
    read = records.read_tables(platform)
    pointers = pl.read_parquet(Workspace(platform.root).features / POINTERS_FILE, columns=["decision_id", "row"])
    rows = features.build_rows(platform, read)
    if platform.services.ray != "local":
        rows = with_cells(platform, rows, turn=turn)
    return windows.build(platform, read, rows, pointers)


@flow(name="materialize", persist_result=False, validate_parameters=False)
def materialize_flow(workspace: str, turn: str) -> dict[str, Any]:
    document: dict[str, Any] = build_features(workspace, turn)
    return document


def materialize(platform: Platform, on_progress: Progress | None = None) -> dict[str, Any]:
    """Bring the feature store up to the accepted tables."""
    import uuid

    with Workspace(platform.root).lock("retrain"), running(platform, on_progress):
        document: dict[str, Any] = materialize_flow(str(platform.root), uuid.uuid4().hex)
        return document
