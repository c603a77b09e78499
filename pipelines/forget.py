"""`fastq forget`: one player out of everything that the workspace and its stores keep, and a salted hash that keeps them out."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from fastq import registry, staging
from fastq.backup import kept_backups
from fastq.errors import FastqError, UnknownPlayerError
from fastq.forgetting import forgotten, remember, strike_arrays, strike_log, strike_page, strike_table
from fastq.platform import FILE_NAME, Platform
from fastq.records import KEYS, columns_of, decision_logs, served_log
from fastq.sources import UnreadableError, by_line, naming, parsed, sources_of
from fastq.workspace import Workspace, is_partial, sweep
from feature_repo import store
from pipelines.turn import forget as forget_turns
from pipelines.turn import relative

logger = logging.getLogger("fastq")
ARRAYS = ("*.npy", "*.arrow")  # laid out by row, without ids


def forget(platform: Platform, player_id: str, who: str = "fastq") -> dict[str, Any]:
    """Remove a player; `removed` says from where, and how many rows. A second time finds nothing and says so.

    First the hash, so that whatever reads the logs meanwhile leaves the player out; then the files, while no retraining runs; then the stores. Serving goes
    on. Raises `UnknownPlayerError` where nothing is kept of the player, neither here nor in the platform's logs.
    """
    workspace = Workspace(platform.root)
    earlier = player_id in forgotten(workspace)
    exported, ids = _exported(platform, player_id)
    ids |= _decided(platform, player_id)
    if not earlier and not exported and not ids and not _is_kept(platform, player_id):
        raise UnknownPlayerError(f"{player_id}: nothing is kept of this player, and the logs do not name them; check the id")
    remember(workspace, player_id)
    removed: list[dict[str, Any]] = []

    def took(where: str, rows: int) -> None:
        if rows:
            removed.append({"where": where, "rows": rows})

    # `compact` rewrites batches too: of two who read and replace one file the later brings back what the other took out
    with workspace.lock("retrain", wait_seconds=120), workspace.lock("queries", wait_seconds=600), workspace.lock("compact", wait_seconds=600):
        sweep(workspace)
        for path in _tables(workspace):
            took(relative(platform, path), strike_table(path, player_id, sorted(ids)))
        for page in sorted(workspace.reports.glob("*.html")):
            took(relative(platform, page), strike_page(page, [player_id, *sorted(ids)]))
        took(f"{relative(platform, workspace.staged)}, copies of the logs that are made anew", staging.strike(workspace))
        if removed:  # what stands in files without ids is made anew from the tables, and a stopped retraining can't go on with other ones
            for directory in (workspace.features, workspace.tables):
                took(f"{relative(platform, directory)}, files that are made anew", strike_arrays(directory, ARRAYS))
            forget_turns(workspace)
    for log in decision_logs(platform):
        for table, rows in strike_log(log, player_id).items():
            took(f"{relative(platform, log)}, {table}", rows)
    if (workspace.feast / "registry.db").exists():
        opened = store.open_store(platform)
        try:
            with store.exclusive(platform):
                took(f"the online store ({platform.services.online_store.split(':')[0]})", store.remove(opened, player_id))
        finally:
            opened.close()
    for version, rows in registry.strike(platform, sorted(ids), who).items():
        took(f"the evidence of model version {version}", rows)
    for run, rows in registry.strike_unregistered(platform, sorted(ids)).items():
        took(f"a bundle that was kept with run {run} and never registered", rows)
    copies, keep = kept_backups(workspace), platform.operations.keep_backups
    backups: list[dict[str, Any]] = [{**one, "until": (datetime.fromisoformat(one["at"]) + keep).isoformat() if keep else None} for one in copies]
    return {"player_id": player_id, "removed": removed, "logs": exported, "backups": backups, "notes": _notes(exported, backups)}


def _notes(exported: int, backups: list[dict[str, Any]]) -> list[str]:
    notes = [
        "A running server keeps the model's evidence in memory: restart it.",
        "Copies of backups elsewhere, and files that --out or --parquet wrote, still hold the player.",
    ]
    if backups:
        last = max((str(one["until"]) for one in backups if one["until"]), default=None)
        goes = f"they expire until {last}, once there is a newer one" if last else "they stay: operations.keep_backups, such as 30d, lets them expire"
        notes.append(f"{len(backups)} backup{'s' * (len(backups) > 1)} made here may still hold the player; {goes}.")
    if exported:
        notes.insert(0, f"The platform's own logs still hold {exported:,} rows of the player; they are left out whenever the logs are read.")
    return notes


def _tables(workspace: Workspace) -> list[Path]:
    """Every Parquet file that is kept here; not those that are being written, or never were finished, which `sweep` removes."""
    return sorted(path for path in workspace.state.rglob("*.parquet") if not is_partial(path))


def _decided(platform: Platform, player_id: str) -> set[str]:
    """Ids of the player's decisions in everything kept here: tables, quarantine, batches and the servers' logs."""
    served = served_log(platform, "decisions")
    ids = set(served.filter(pl.col("player_id") == player_id)["decision_id"])
    for path in _tables(Workspace(platform.root)):
        scan = pl.scan_parquet(path, glob=False)
        if {"player_id", "decision_id"} <= set(scan.collect_schema().names()):
            mine = scan.filter(pl.col("player_id").cast(pl.String) == player_id).select(pl.col("decision_id").cast(pl.String))
            ids |= set(mine.collect()["decision_id"].drop_nulls())
    return ids


def _is_kept(platform: Platform, player_id: str) -> bool:
    """Whether any table here names the player, though no decision does."""
    if not served_log(platform, "activity").filter(pl.col("player_id") == player_id).is_empty():
        return True
    for path in _tables(Workspace(platform.root)):
        scan = pl.scan_parquet(path, glob=False)
        if "player_id" in scan.collect_schema().names() and scan.filter(pl.col("player_id").cast(pl.String) == player_id).head(1).collect().height:
            return True
    return False


def _exported(platform: Platform, player_id: str) -> tuple[int, set[str]]:
    """How many rows of the player the platform's own logs hold, and the ids of their decisions: evidence of old models may name those alone."""
    rows, ids = 0, set()
    for table in KEYS:
        source = getattr(platform.logs, table)
        if source is None or "player_id" not in columns_of(platform, table):
            continue
        columns = columns_of(platform, table)
        try:
            for one in sources_of(platform.root, f"{FILE_NAME}: logs.{table}", source):
                try:
                    mine = _rows_of(one.name, one.scan(platform.root), player_id)
                except UnreadableError:
                    if not one.has_lines:
                        raise
                    mine = _rows_of(one.name, by_line(one, columns), player_id)
                rows += len(mine)
                ids |= set(mine["decision_id"].drop_nulls()) if "decision_id" in columns else set()
        except FastqError as error:
            logger.warning("logs.%s could not be searched for the player: %s", table, " ".join(str(error).split())[:200])
    return rows, ids


def _rows_of(name: str, scan: pl.LazyFrame, player_id: str) -> pl.DataFrame:
    """`player_id` and `decision_id` (null where it is not there) of the player's rows in one file."""
    with naming(name):
        schema = scan.collect_schema()
        texts = {c: parsed(pl.col(c), "id", schema[c]) if c in schema else None for c in ("player_id", "decision_id")}
        ids = [(pl.lit(None, pl.String) if text is None else text).alias(c) for c, text in texts.items()]
        return scan.select(ids).filter(pl.col("player_id") == player_id).collect()
