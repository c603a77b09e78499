"""Feast's objects for one platform, generated from its `fastq.yaml` and `fastq.features`; nothing is stated here a second time.

player_rows    offline: one row per player and period, a pointer (`row`) into the matrix of `fastq.features.PlayerRows`, and attributes
player_state   online: what `fastq.features.OnlineStates` keeps of each player, as one value: read in one look-up, whatever the number of features
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastq import features
from fastq.platform import Platform
from fastq.workspace import Workspace

if TYPE_CHECKING:
    from feast import Entity, FeatureView

ROWS_VIEW = "player_rows"
STATE_VIEW, STATE_FIELD = "player_state", "state"
ROWS_FILE = "player_rows.parquet"
STATE_FILE = "player_state.parquet"


@dataclass(frozen=True)
class Definitions:
    """What `feast apply` gets."""

    player: Entity
    player_rows: FeatureView
    player_state: FeatureView

    def objects(self) -> list[Any]:
        return [self.player, self.player_rows, self.player_state]


def project_name(platform: Platform) -> str:
    """Feast's project; its names hold letters, digits and underscores only: its SQLite store puts them into names of tables."""
    return re.sub(r"[^A-Za-z0-9_]", "_", platform.platform)


def attribute_fields(platform: Platform) -> dict[str, str]:
    """Attribute to the name of its Feast field: numbered, since Feast's names may not hold what a log's column may."""
    return {name: f"attribute_{i}_{re.sub(r'[^A-Za-z0-9_]', '_', name)}" for i, name in enumerate(platform.state.attributes)}


def definitions(platform: Platform) -> Definitions:
    """Entity and feature views of a platform; the Parquet files behind them are named by absolute path, so any directory will do to apply them."""
    from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Bytes, Float64, Int64, String

    directory = Workspace(platform.root).features
    attributes = {field: Float64 if platform.state.attributes[name].kind == "numeric" else String for name, field in attribute_fields(platform).items()}

    def source(name: str, file: str) -> FileSource:
        times = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created_timestamp"}
        return FileSource(name=name, path=str(directory / file), file_format=ParquetFormat(), **times)

    player = Entity(name="player", join_keys=["player_id"], value_type=ValueType.STRING, description="a player, by the platform's own id")
    player_rows = FeatureView(
        name=ROWS_VIEW, entities=[player], online=False, source=source("player_rows_source", ROWS_FILE),
        # the row before a decision ended at most one period earlier; a longer life only makes the join dearer
        ttl=2 * platform.state.period,
        schema=[Field(name="player_id", dtype=String), Field(name="row", dtype=Int64), Field(name="period", dtype=Int64), Field(name="policy", dtype=String),
                *(Field(name=field, dtype=kind) for field, kind in attributes.items())],
        tags={"fingerprint": features.fingerprint(platform)},
    )  # fmt: skip
    player_state = FeatureView(
        name=STATE_VIEW, entities=[player], online=True,
        source=PushSource(name="player_state_push", batch_source=source("player_state_source", STATE_FILE)),
        schema=[Field(name="player_id", dtype=String), Field(name=STATE_FIELD, dtype=Bytes)],
        tags={"fingerprint": features.fingerprint(platform)},
    )  # fmt: skip
    return Definitions(player, player_rows, player_state)


def feature_directory(platform: Platform) -> Path:
    """Where the Parquet files behind the views stand."""
    return Workspace(platform.root).features
