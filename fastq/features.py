"""The one definition of every feature: events to player-period rows, point in time, the same for training and for serving.

A *row* describes one player in one period: the measures (aggregated events), the action taken, the objective values that followed.
It is `F = measures + action dimensions + objectives` float32 numbers in raw units; NaN says "nothing is known", never zero.
A *state* is the `window` rows that end with the period under way if anything of it is known already, else with the one before.
What was not known strictly before a decision is not in its state: late events by their `known_at`, objective values by `known_after`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import polars as pl

from fastq.errors import RequestError
from fastq.platform import OWN_POLICY, CatalogueAction, Measure, Platform
from fastq.records import Records, parts_of, several

EMBEDDING_RANK = 16  # directions kept of a catalogue's one-hot and numeric item features
CLIP = 8.0  # standard deviations; beyond them a heavy-tailed measure would drown the rest of the state
PIECE = 65_536  # rows that are looked at together
UNSEEN = ""  # slot 0 of every vocabulary: values that training never saw, and nulls


Columns = Mapping[str, np.ndarray | list[str | None]]  # attribute to values [B]: float64 with NaN, or text with None


@dataclass(frozen=True)
class PlayerStates:
    """A batch of player states in raw units, oldest period first; NaN marks what is not known.

    history [B, window, measures]; attributes: one row per player, a frame, columns by name, or [B, G] in the platform file's order;
    actions [B, window, D] and objectives [B, window, M]: what was done and what followed; policies [B]: who acted last.
    """

    history: np.ndarray
    attributes: pl.DataFrame | Columns | np.ndarray | None = None
    actions: np.ndarray | None = None
    objectives: np.ndarray | None = None
    policies: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.history)


@dataclass(frozen=True)
class Catalogue:
    """Items as vectors: `embedding` [I, E] are the leading principal directions of the encoded item features."""

    ids: list[str]
    embedding: np.ndarray

    def positions(self, ids: Sequence[str | None]) -> np.ndarray:
        """[N] int64 position of each id, -1 where the catalogue does not hold it."""
        return np.array([self._where.get(item, -1) if item is not None else -1 for item in ids], np.int64)

    @functools.cached_property
    def _where(self) -> dict[str, int]:
        return {item: position for position, item in enumerate(self.ids)}


def build_catalogue(platform: Platform, items: pl.DataFrame) -> Catalogue:
    """Encode the items of a catalogue: numbers standardised, categories one-hot (ids too, where no features are named)."""
    assert isinstance(platform.action, CatalogueAction)
    items = items.sort("item_id")
    columns = []
    for name, feature in platform.action.features.items():
        if feature.kind == "numeric":
            values = items[name].cast(pl.Float64).to_numpy().astype(float)
            known = values[np.isfinite(values)]
            standard = (values - known.mean()) / max(float(known.std()), 1e-9) if len(known) else values
            columns.append(np.nan_to_num(standard)[:, None])
        else:
            columns.append(items.select(pl.col(name).cast(pl.String).fill_null(UNSEEN)).to_dummies().to_numpy().astype(float))
    encoded = np.concatenate(columns, 1) if columns else np.eye(len(items))
    centred = encoded - encoded.mean(0)
    _, size, directions = np.linalg.svd(centred, full_matrices=False)
    rank = max(1, min(EMBEDDING_RANK, int((size > 1e-9 * max(float(size[0]), 1.0)).sum())))
    signs = np.sign(directions[np.arange(rank), np.abs(directions[:rank]).argmax(1)])  # an SVD's signs are arbitrary; fix them
    embedding = centred @ (directions[:rank] * signs[:, None]).T
    return Catalogue(items["item_id"].to_list(), (embedding / max(float(embedding.std()), 1e-9)).astype(np.float32))


def action_width(platform: Platform, catalogue: Catalogue | None) -> int:
    """Numbers that describe one action: its dimensions, or the item embedding's width."""
    return catalogue.embedding.shape[1] if catalogue else len(platform.dimension_names)


def row_width(platform: Platform, catalogue: Catalogue | None) -> int:
    """F, the numbers in one player-period row."""
    return len(platform.state.measures) + action_width(platform, catalogue) + len(platform.objectives)


def fingerprint(platform: Platform) -> str:
    """sha256 over everything that decides what a feature row means; a model is served only where it is the same."""
    meaning = {
        "period": platform.state.period.total_seconds(),
        "window": platform.state.window,
        "measures": {name: measure.aggregate for name, measure in platform.state.measures.items()},
        "attributes": {name: attribute.kind for name, attribute in platform.state.attributes.items()},
        "action": platform.action.model_dump(mode="json", exclude={"default"}),
        "objectives": dict(zip(platform.objectives, platform.known_after.tolist(), strict=True)),
        "policies": platform.policies,
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


# ---- time ------------------------------------------------------------------------------------------------------------
def microseconds(platform: Platform) -> int:
    """The length of a period in microseconds."""
    return round(platform.state.period.total_seconds() * 1e6)


def known_delay(platform: Platform) -> np.ndarray:
    """[M] microseconds from a decision to the moment each objective's value is known."""
    return np.round(platform.known_after * microseconds(platform)).astype(np.int64)


def epoch_microseconds(at: datetime) -> int:
    """Microseconds since 1970 of a moment; a naive one is UTC."""
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return round((at - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)


def _moment(platform: Platform, column: str) -> pl.Expr:
    return pl.col(column).dt.epoch("us").floordiv(microseconds(platform)).alias("period")


def _seen(platform: Platform) -> pl.Expr:
    """When a decision shows that its player is there. Our own do not, made for whoever is asked for, unless no activity is logged at all."""
    others = pl.lit(value=True) if platform.logs.activity is None else pl.col("policy") != OWN_POLICY
    return pl.when(others).then("decided_at").alias("seen_at")


# ---- offline: the table of rows ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlayerRows:
    """The offline feature table: where the rows of each player lie, and what is to stand in them.

    spans: player_id, part (of the activity), first and last (periods), row (of the first period; the others follow it); sorted by player_id.
    acted: the last decision of each player and period, with its `row`. events: the activity in its parts. newest: when the last of them happened,
    microseconds since 1970. ready: what `cells_of` gives of each part, where another machine has worked it out.
    Row 0 is empty and stands for every period before a player's first. The table itself is laid when it is asked for.
    """

    platform: Platform
    catalogue: Catalogue | None
    players: pl.DataFrame | None
    spans: pl.DataFrame
    acted: pl.DataFrame
    events: tuple[pl.LazyFrame, ...]
    newest: int | None = None
    ready: tuple[pl.LazyFrame, ...] | None = None

    def __len__(self) -> int:
        """Rows of the table, the empty one among them."""
        return 1 + int(self.spans.select((pl.col("last") - pl.col("first") + 1).sum()).item())

    def lay(self, matrix: np.ndarray, decided: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Write the table into `matrix` [rows, F] float32, raw units, NaN where nothing is known; and beside it:

        decided [rows] int64, microseconds since 1970 of the decision whose action and objectives the row holds, 0 for none;
        counts [rows, measures] float32, events behind each cell, which only the online store needs.
        """
        measures, n_objectives = list(self.platform.state.measures), len(self.platform.objectives)
        matrix.fill(np.nan)
        decided.fill(0)
        if counts is not None:
            counts.fill(0)

        def lay_part(part: int) -> None:
            at, cells, number = self._cells(part, counted=counts is not None)
            matrix[at, : len(measures)] = cells
            if counts is not None:
                counts[at] = number

        several(lay_part, len(self.events) if measures else 0)
        at = self.acted["row"].to_numpy()
        matrix[at, len(measures) : matrix.shape[1] - n_objectives] = action_matrix(self.platform, self.acted, self.catalogue)
        matrix[at, matrix.shape[1] - n_objectives :] = self.acted.select(pl.col(list(self.platform.objectives)).cast(pl.Float64)).to_numpy()
        decided[at] = self.acted["decided"].to_numpy()

    def grid(self, part: int) -> Grid:
        """The periods of the players of a part of the events."""
        return Grid.of(self._spans_of(part))

    def _spans_of(self, part: int) -> pl.DataFrame:
        return self.spans.filter(pl.col("part") == part)

    def _cells(self, part: int, *, counted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Rows of the table that a part of the events tells of, their cells [rows, measures] and, if asked for, numbers of events [rows, measures]."""
        names, spans = list(self.platform.state.measures), self._spans_of(part)
        grid = Grid.of(spans)
        row = np.arange(len(grid)) + np.repeat(spans["row"].to_numpy() - grid.begin[:-1], np.diff(grid.begin))
        if self.ready is not None:
            ready = self.ready[part].collect()
            number = ready.select(f"{name}#" for name in names).to_numpy() if counted else None
            return row[grid.places(ready["player_id"], ready["period"].to_numpy())], ready.select(names).to_numpy(), number
        events = self.events[part].select("player_id", "occurred_at", *names).collect()
        cells, number = np.empty((len(grid), len(names)), np.float32), np.empty((len(grid), len(names)), np.float32) if counted else None
        aggregate(self.platform, events, grid.places(events["player_id"], periods(self.platform, events["occurred_at"])), cells, number)
        return row, cells, number

    @cached_property
    def _laid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, n_measures = len(self), len(self.platform.state.measures)
        laid = np.empty((n, row_width(self.platform, self.catalogue)), np.float32), np.empty(n, np.int64), np.empty((n, n_measures), np.float32)
        self.lay(*laid)
        return laid

    @property
    def matrix(self) -> np.ndarray:
        """[rows, F] as `lay` writes it, in memory."""
        return self._laid[0]

    @property
    def decided(self) -> np.ndarray:
        """[rows] as `lay` writes it, in memory."""
        return self._laid[1]

    @property
    def counts(self) -> np.ndarray:
        """[rows, measures] as `lay` writes it, in memory."""
        return self._laid[2]

    @cached_property
    def frame(self) -> pl.DataFrame:
        """The rows but the empty one: player_id, period, event_timestamp (when it is complete), created_timestamp, row, policy, attributes."""
        complete = pl.from_epoch((pl.col("period") + 1) * microseconds(self.platform), time_unit="us").dt.replace_time_zone("UTC")
        grid = (
            self.spans.select("player_id", pl.int_ranges("first", pl.col("last") + 1).alias("period"))
            .explode("period", empty_as_null=False)
            .with_columns(row=pl.int_range(1, pl.len() + 1, dtype=pl.Int64), event_timestamp=complete, created_timestamp=complete)
            .join(self.acted.select("row", "policy"), on="row", how="left", maintain_order="left")
        )
        return grid.hstack(attributes_at(self.platform, self.players, grid["player_id"], grid["event_timestamp"]))


@dataclass(frozen=True)
class Grid:
    """A place for each period of some players, from the first to the last one of each.

    ids: of P players, sorted; first [P]: the first period of each; begin [P + 1]: the place of that one, and at last how many places there are.
    """

    ids: pl.Series
    first: np.ndarray
    begin: np.ndarray

    @classmethod
    def of(cls, spans: pl.DataFrame) -> Grid:
        """Of spans as `PlayerRows` has them."""
        first, last = spans["first"].to_numpy(), spans["last"].to_numpy()
        return cls(spans["player_id"], first, np.concatenate([[0], (last - first + 1).cumsum()]))

    def __len__(self) -> int:
        return int(self.begin[-1])

    def players(self, player_ids: pl.Series) -> np.ndarray:
        """[N] int64 position of each id among `ids`, where all of them are to be found."""
        return player_ids.cast(pl.Enum(self.ids)).to_physical().cast(pl.Int64).to_numpy()  # a third of what a join takes

    def places(self, player_ids: pl.Series, period: np.ndarray) -> np.ndarray:
        """[N] int64 place of each player's period."""
        return (self.begin[:-1] - self.first)[self.players(player_ids)] + period


def periods(platform: Platform, moments: pl.Series) -> np.ndarray:
    """[N] int64 period of each moment."""
    return moments.dt.epoch("us").to_numpy() // microseconds(platform)


def aggregate(platform: Platform, events: pl.DataFrame, cell: np.ndarray, cells: np.ndarray, counts: np.ndarray | None = None) -> None:
    """Write what N events say into `cells` [n, measures], NaN where none says anything, and how many say it into `counts` [n, measures].

    cell [N] int64: which one each belongs to. This is what every cell of every state is made by; events are added in the order in which they
    stand, so that the same ones give the same bits.
    """
    n, measures = len(cells), platform.state.measures
    if any(measure.aggregate == "last" for measure in measures.values()):
        in_time = np.argsort(events["occurred_at"].to_numpy(), kind="stable")
        events, cell = events[in_time], cell[in_time]
    every = np.bincount(cell, minlength=n)
    for j, (name, measure) in enumerate(measures.items()):
        values = events[name].cast(pl.Float64).to_numpy()
        known = ~np.isnan(values)
        at, number = cell, every
        if not known.all():
            at, values = cell[known], values[known]
            number = np.bincount(at, minlength=n)
        cells[:, j] = np.where(number > 0, _aggregated(measure, at, values, number), np.nan)
        if counts is not None:
            counts[:, j] = number


def _aggregated(measure: Measure, at: np.ndarray, values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """[n] what comes of the values for each place, of which there are `number`; anything where that is 0."""
    n = len(number)
    if measure.aggregate in ("min", "max"):
        which, found = (np.minimum, np.full(n, np.inf)) if measure.aggregate == "min" else (np.maximum, np.full(n, -np.inf))
        which.at(found, at, values)
        return found
    if measure.aggregate == "last":
        found = np.empty(n)
        found[at] = values  # of several for one place NumPy keeps the last
        return found
    if measure.aggregate == "count":
        return number
    total = np.bincount(at, values, n)
    return total if measure.aggregate == "sum" else total / np.maximum(number, 1)


def cells_of(platform: Platform, events: pl.LazyFrame) -> pl.DataFrame:
    """What the events of a part say of each period in which something happened: player_id, period, and of each measure `measure` and `measure#`, how many
    events say it; the same wherever it is worked out.
    """
    seen, names = events.collect(), list(platform.state.measures)
    period = periods(platform, seen["occurred_at"])
    spans = seen.select("player_id", period=pl.Series(period)).group_by("player_id").agg(first=pl.col("period").min(), last=pl.col("period").max())
    grid = Grid.of(spans.sort("player_id"))
    place = grid.places(seen["player_id"], period)
    cells, counts = np.empty((len(grid), len(names))), np.empty((len(grid), len(names)), np.int64)
    aggregate(platform, seen, place, cells, counts)
    there = np.flatnonzero(np.bincount(place, minlength=len(grid)))
    player = np.searchsorted(grid.begin, there, "right") - 1
    about = {"player_id": grid.ids[player], "period": grid.first[player] + there - grid.begin[player]}
    return pl.DataFrame(about | {name: cells[there, j] for j, name in enumerate(names)} | {f"{name}#": counts[there, j] for j, name in enumerate(names)})


def action_matrix(platform: Platform, frame: pl.DataFrame, catalogue: Catalogue | None) -> np.ndarray:
    """[N, D] the actions of a frame as numbers: raw units, or item embeddings (NaN for an unknown item)."""
    if catalogue is None:
        return frame.select(pl.col(platform.dimension_names).cast(pl.Float64)).to_numpy().astype(float).reshape(len(frame), len(platform.dimension_names))
    positions = catalogue.positions(frame["item_id"].to_list())
    return np.where(positions[:, None] >= 0, catalogue.embedding[positions], np.nan).astype(float)


def build_rows(platform: Platform, records: Records) -> PlayerRows:
    """Lay every player's history on the grid of periods, from the first thing seen of them to the last."""
    catalogue = build_catalogue(platform, records.items) if records.items is not None and isinstance(platform.action, CatalogueAction) else None
    decisions = records.decisions.with_columns(_moment(platform, "decided_at"), decided=pl.col("decided_at").dt.epoch("us"))
    # the last one of each player and period: they stand in the order of both, and to group them would take ten times as long
    ends = [pl.col(key) != pl.col(key).shift(-1) for key in ("player_id", "period")]
    acted = decisions.filter(pl.any_horizontal(ends).fill_null(value=True))
    events = parts_of(records.activity) if platform.state.measures else ()

    def seen(rows: pl.LazyFrame, at: str, part: int | None) -> pl.DataFrame:
        reach = pl.col(at).min().alias("first"), pl.col(at).max().alias("last"), pl.lit(part, pl.Int64).alias("part")
        return rows.group_by("player_id").agg(*reach).collect(engine="in-memory")

    lived = several(lambda part: seen(events[part].select("player_id", "occurred_at"), "occurred_at", part), len(events))
    newest = pl.concat([players["last"] for players in lived]).dt.epoch("us").max() if lived else None
    together = pl.concat([seen(decisions.lazy(), "decided_at", None), *lived]).group_by("player_id")
    spans = together.agg(pl.col("first").min(), pl.col("last").max(), pl.col("part").max())
    spans = spans.with_columns(_moment(platform, c).alias(c) for c in ("first", "last")).sort("player_id")
    spans = spans.with_columns(row=1 + (pl.col("last") - pl.col("first") + 1).cum_sum().shift(1, fill_value=0))
    places = acted.select("player_id").join(spans, on="player_id", how="left", maintain_order="left")
    acted = acted.with_columns(row=places["row"] + acted["period"] - places["first"])
    return PlayerRows(platform, catalogue, records.players, spans, acted, events, newest)  # type: ignore[arg-type]  # polars types a maximum as any literal


def attributes_at(platform: Platform, players: pl.DataFrame | None, player_ids: pl.Series, at: pl.Series) -> pl.DataFrame:
    """The attributes of each player as they were known strictly before each moment, in the platform file's order, null where unknown."""
    names = list(platform.state.attributes)
    types = {name: pl.Float64 if a.kind == "numeric" else pl.String for name, a in platform.state.attributes.items()}
    wanted = pl.DataFrame({"player_id": player_ids, "at": at}).with_row_index("order")
    if not names:
        return pl.DataFrame(height=len(wanted))
    if players is None:
        return pl.DataFrame({name: pl.Series([None] * len(wanted), dtype=types[name]) for name in names})
    if "valid_from" not in players.columns or players["valid_from"].null_count() == len(players):  # one version of each, which is no question of time
        joined = wanted.join(players.unique("player_id", keep="last"), on="player_id", how="left", maintain_order="left")
        return joined.select(pl.col(name).cast(types[name]) for name in names)
    always = pl.datetime(1, 1, 1, time_unit="us", time_zone="UTC")
    versions = players.with_columns(pl.col("valid_from").fill_null(always))
    joined = wanted.sort("at").join_asof(
        versions.sort("valid_from"), left_on="at", right_on="valid_from", by="player_id", allow_exact_matches=False, check_sortedness=False
    )
    return joined.sort("order").select(pl.col(name).cast(types[name]) for name in names)


# ---- online: what is kept of each player, rolled to the moment it is read ---------------------------------------------------
NEVER = 0  # microseconds since 1970 of what never happened
_MARK = 8  # bytes in front of a packed state that say what features it holds
_READ_AT = 32  # where in it `read_at` stands, behind mark, width, period and seen_at


@dataclass(frozen=True)
class OnlineStates:
    """What the online store keeps of B players, as arrays; `states_at` turns it into states. Oldest period first, NaN marks what is not known.

    window [B, W, F] float32, counts [B, W, measures] float32 and decided [B, W] int64 as in `PlayerRows`; period [B] int64, that of the newest row.
    policies [B]: who acted last. seen_at [B] int64: when the player was seen last, microseconds since 1970, `NEVER` for never.
    read_at [B] int64: decisions and outcomes from before it are in the row, later ones may be. heard [B]: per server's log, `recorded_at` of the
    newest event that is in the row; events are in it up to there and no further, so none is counted twice. attributes: name to values [B].
    stored [B] bool: False where nothing at all is kept of the player; such a row is empty.
    """

    player_ids: list[str]
    window: np.ndarray
    counts: np.ndarray
    decided: np.ndarray
    period: np.ndarray
    policies: list[str | None]
    seen_at: np.ndarray
    read_at: np.ndarray
    heard: list[dict[str, int]]
    attributes: dict[str, np.ndarray | list[str | None]]
    stored: np.ndarray

    def __len__(self) -> int:
        return len(self.player_ids)

    @property
    def known(self) -> np.ndarray:
        """[B] bool: whether anything at all is known of the player: that they were seen, or an attribute."""
        found = self.seen_at != NEVER
        for values in self.attributes.values():
            found |= ~np.isnan(values) if isinstance(values, np.ndarray) else np.array([v is not None for v in values], bool)
        return found

    def attribute_frame(self) -> pl.DataFrame:
        """The attributes in the platform file's order, null where unknown."""
        columns = {name: pl.Series(v).fill_nan(None) if isinstance(v, np.ndarray) else pl.Series(v, dtype=pl.String) for name, v in self.attributes.items()}
        return pl.DataFrame(columns)


def online_states(platform: Platform, frame: pl.DataFrame) -> OnlineStates:
    """An online frame as arrays, which share no memory with it."""
    n, w, n_measures = len(frame), platform.state.window, len(platform.state.measures)

    def stacked(column: str, dtype: type) -> np.ndarray:
        rows = frame[column]
        return np.array((rows.list.to_array(len(rows[0])) if rows.dtype == pl.List else rows).to_numpy(), dtype)

    def epoch(column: str) -> np.ndarray:
        return frame[column].dt.epoch("us").fill_null(NEVER).to_numpy().copy()

    attributes: dict[str, np.ndarray | list[str | None]] = {
        name: frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy().copy() if a.kind == "numeric" else frame[name].to_list()
        for name, a in platform.state.attributes.items()
    }
    return OnlineStates(
        frame["player_id"].to_list(),
        stacked("window", np.float32).reshape(n, w, -1) if n else np.empty((0, w, row_width(platform, None)), np.float32),
        stacked("counts", np.float32)[:, : w * n_measures].reshape(n, w, n_measures) if n else np.empty((0, w, n_measures), np.float32),
        stacked("decided", np.float64).astype(np.int64).reshape(n, w) if n else np.empty((0, w), np.int64),
        frame["period"].to_numpy().copy(),
        frame["policy"].to_list(),
        epoch("seen_at"),
        epoch("event_timestamp"),
        [json.loads(text) if text else {} for text in frame["heard"]],
        attributes,
        np.ones(n, bool),
    )


def online_table(platform: Platform, states: OnlineStates) -> pl.DataFrame:
    """The inverse of `online_states`."""
    n, schema = len(states), online_schema(platform)

    def moments(values: np.ndarray) -> pl.Series:
        return pl.Series(values).replace(NEVER, None).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")

    columns: dict[str, pl.Series] = {
        "player_id": pl.Series(states.player_ids, dtype=pl.String),
        "event_timestamp": moments(states.read_at),
        "window": pl.Series(states.window.reshape(n, -1) if n else [], dtype=None if n else schema["window"]),
        "counts": pl.Series(
            (states.counts.reshape(n, -1) if states.counts.shape[2] else np.zeros((n, 1), np.float32)) if n else [], dtype=None if n else schema["counts"]
        ),
        "decided": pl.Series(states.decided.astype(float) if n else [], dtype=None if n else schema["decided"]),
        "period": pl.Series(states.period),
        "policy": pl.Series(states.policies, dtype=pl.String),
        "seen_at": moments(states.seen_at),
        "heard": pl.Series([json.dumps(heard) if heard else None for heard in states.heard], dtype=pl.String),
    }
    frame = pl.DataFrame(columns)
    return (frame.hstack(states.attribute_frame()) if states.attributes else frame).select(pl.col(name).cast(kind) for name, kind in schema.items())


def online_frame(platform: Platform, records: Records, at: datetime, rows: PlayerRows | None = None) -> pl.DataFrame:
    """What the online store keeps of every player at `at`, as a frame with the columns of `online_schema`; `states_at` turns it into states.

    `event_timestamp` is when the records were read, if that was before `at`: what was said since is not in them.
    """
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    now = epoch_microseconds(at)
    moment = pl.lit(now).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    known = Records(
        decisions=records.decisions.filter(pl.col("decided_at") < moment),
        activity=records.activity.filter(pl.col("known_at") < moment) if records.activity is not None else None,
        players=records.players,
        proposals=None,
        items=records.items,
        quarantine=records.quarantine,
        counts=records.counts,
        metrics=records.metrics,
        warnings=records.warnings,
    )
    read_at = min(at, records.read_at or at)
    rows = rows or build_rows(platform, known)
    newest = rows.frame.group_by("player_id", maintain_order=True).agg(pl.col("row").first().alias("first"), pl.col("row").last(), pl.col("period").last())
    idx = newest["row"].to_numpy()[:, None] + np.arange(-platform.state.window + 1, 1)
    idx = np.where(idx < newest["first"].to_numpy()[:, None], 0, idx)
    ids = newest["player_id"]
    if records.players is not None:
        ids = pl.concat([ids, records.players["player_id"].unique(maintain_order=True)]).unique(maintain_order=True)
    strangers = len(ids) - len(newest)  # players of whom only attributes are known
    idx = np.concatenate([idx, np.zeros((strangers, idx.shape[1]), idx.dtype)])
    seen = [known.decisions.select("player_id", _seen(platform))]
    if known.activity is not None:
        seen.append(known.activity.select("player_id", pl.col("occurred_at").alias("seen_at")))
    seen_at = pl.concat(seen).group_by("player_id").agg(pl.col("seen_at").max())
    acted = known.decisions.group_by("player_id", maintain_order=True).agg(pl.col("policy").last())
    frame = pl.DataFrame(
        {
            "player_id": ids,
            "window": pl.Series(rows.matrix[idx].reshape(len(ids), idx.shape[1] * rows.matrix.shape[1])),
            "counts": pl.Series(
                rows.counts[idx].reshape(len(ids), idx.shape[1] * rows.counts.shape[1]) if rows.counts.shape[1] else np.zeros((len(ids), 1), np.float32)
            ),
            "decided": pl.Series(rows.decided[idx].astype(float)),
            "period": pl.concat([newest["period"], pl.Series([now // microseconds(platform) - 1] * strangers, dtype=pl.Int64)]),
        }
    )
    frame = frame.join(acted, on="player_id", how="left", maintain_order="left").join(seen_at, on="player_id", how="left", maintain_order="left")
    moments = pl.Series("at", [at], dtype=pl.Datetime("us", "UTC")).new_from_index(0, len(frame))
    frame = frame.hstack(attributes_at(platform, records.players, frame["player_id"], moments))
    said = pl.lit(epoch_microseconds(read_at)).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    heard = pl.lit(json.dumps(dict(records.heard)) if records.heard else None, pl.String)
    return frame.with_columns(event_timestamp=said, heard=heard).select(list(online_schema(platform)))


def online_schema(platform: Platform) -> dict[str, pl.DataType | type[pl.DataType]]:
    """Names and types of the online frame, in order; `window`, `counts` and `decided` are flattened, oldest period first.

    `event_timestamp` is `OnlineStates.read_at`, `heard` its cursors as JSON.
    """
    return {
        "player_id": pl.String,
        "event_timestamp": pl.Datetime("us", "UTC"),
        "window": pl.List(pl.Float32),
        "counts": pl.List(pl.Float32),
        "decided": pl.List(pl.Float64),
        "period": pl.Int64,
        "policy": pl.String,
        "seen_at": pl.Datetime("us", "UTC"),
        "heard": pl.String,
        **{name: pl.Float64 if a.kind == "numeric" else pl.String for name, a in platform.state.attributes.items()},
    }


def _rolled(values: np.ndarray, shift: np.ndarray, fill: float) -> np.ndarray:
    """Each player's rows moved `shift` periods into the past; the new periods hold `fill`. What is given stays as it is."""
    window, moved = values.shape[1], values.copy()
    shift = np.minimum(shift, window)
    for by in set(shift.tolist()) - {0}:  # nearly always one, and the same for all
        rows = slice(None) if (shift == by).all() else shift == by
        moved[rows, : window - by], moved[rows, window - by :] = values[rows, by:], fill
    return moved


def states_at(platform: Platform, online: OnlineStates | pl.DataFrame, at: datetime) -> PlayerStates:
    """The states of players (an online frame, or its arrays) as they are at `at`: rolled to the period under way, without what is not yet known.

    Their attributes are a frame where a frame was given, else columns.
    """
    framed = isinstance(online, pl.DataFrame)
    online = online_states(platform, online) if isinstance(online, pl.DataFrame) else online
    now = epoch_microseconds(at)
    shift = np.maximum(now // microseconds(platform) - 1 - online.period, 0)
    values, decided = (_rolled(online.window, shift, np.nan), _rolled(online.decided, shift, 0)) if shift.any() else (online.window, online.decided)
    split_at = [len(platform.state.measures), values.shape[2] - len(platform.objectives)]
    history, actions, objectives = np.split(values, split_at, axis=2)
    unknown = decided[:, :, None] + known_delay(platform) >= now
    known = np.where(unknown, np.float32(np.nan), objectives)
    return PlayerStates(history, online.attribute_frame() if framed else online.attributes, actions, known, online.policies)


def with_events(platform: Platform, frame: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """The online frame after new activity (`player_id`, `occurred_at`, measures): the same cells that the offline table would hold.

    Events that carry the server's `log` they came from and their `recorded_at` (microseconds) count once, however often they are brought: those
    that a row has heard are left out. Events older than the window change nothing; players who are not in the frame get a row of their own.
    """
    frame = _including(platform, frame, events["player_id"])
    if events.is_empty():
        return frame
    states = online_states(platform, frame)
    where = {player: i for i, player in enumerate(states.player_ids)}
    heard = states.heard
    if "log" in events.columns:
        about = events.select("player_id", "log", "recorded_at").rows()
        events = events.filter(pl.Series([moment > heard[where[player]].get(log, NEVER) for player, log, moment in about], dtype=pl.Boolean))
        for player, log, moment in about:
            heard[where[player]][log] = max(moment, heard[where[player]].get(log, NEVER))
    window, counts, decided = states.window, states.counts, states.decided
    whose = np.array([where[player] for player in events["player_id"]], np.int64)
    (row, when), cell = np.unique(np.stack([whose, periods(platform, events["occurred_at"])]), axis=1, return_inverse=True)
    told, told_by = np.empty((len(row), len(platform.state.measures))), np.empty((len(row), len(platform.state.measures)), np.int64)
    aggregate(platform, events, cell.ravel(), told, told_by)
    newest = states.period.copy()
    if platform.state.measures:  # without any, events have no place in a row
        np.maximum.at(newest, row, when)
    window, counts, decided, period = _advanced(window, counts, decided, states.period, newest)
    slot = when - period[row] + platform.state.window - 1
    for j, measure in enumerate(platform.state.measures.values()):
        inside = (slot >= 0) & (told_by[:, j] > 0)
        r, s, new, extra = row[inside], slot[inside], told[inside, j], told_by[inside, j]
        window[r, s, j] = _combined(measure, window[r, s, j].astype(float), counts[r, s, j], new, extra)
        counts[r, s, j] += extra
    seen_at = states.seen_at.copy()
    np.maximum.at(seen_at, whose, events["occurred_at"].dt.epoch("us").to_numpy())
    return online_table(platform, replace(states, window=window, counts=counts, decided=decided, period=period, seen_at=seen_at))


def with_decisions(platform: Platform, frame: pl.DataFrame, decisions: pl.DataFrame, catalogue: Catalogue | None = None) -> pl.DataFrame:
    """The online frame after served decisions (canonical columns): their actions and outcomes become lagged features."""
    frame = _including(platform, frame, decisions["player_id"])
    if decisions.is_empty():
        return frame
    states = online_states(platform, frame)
    where = {player: i for i, player in enumerate(states.player_ids)}
    decisions = decisions.sort("decided_at", "decision_id")
    return online_table(
        platform,
        lay_decisions(
            platform,
            states,
            np.array([where[player] for player in decisions["player_id"]], np.int64),
            decisions["decided_at"].dt.epoch("us").to_numpy(),
            decisions["policy"].to_list(),
            action_matrix(platform, decisions, catalogue),
            decisions.select(pl.col(list(platform.objectives)).cast(pl.Float64)).to_numpy(),
        ),
    )


def lay_decisions(
    platform: Platform,
    states: OnlineStates,
    row: np.ndarray,
    decided_at: np.ndarray,
    policies: Sequence[str],
    actions: np.ndarray,
    objectives: np.ndarray,
) -> OnlineStates:
    """The states after N decisions in the order of time: whose `row` [N], when `decided_at` [N] (microseconds), actions [N, D], objectives [N, M].

    Laying a decision twice changes nothing; an objective that is NaN here and known in the row stays known.
    """
    if not len(row):
        return states
    n_measures, n_objectives = len(platform.state.measures), len(platform.objectives)
    when = decided_at // microseconds(platform)
    newest = states.period.copy()
    np.maximum.at(newest, row, when)
    window, counts, decided, period = _advanced(states.window, states.counts, states.decided, states.period, newest)
    places = row * (when.max() - when.min() + 1) + when - when.min()
    _, last = np.unique(places[::-1], return_index=True)  # of several in one period the last one stands
    last = len(row) - 1 - last
    slot = when[last] - period[row[last]] + platform.state.window - 1
    last, slot = last[slot >= 0], slot[slot >= 0]
    stands = decided[row[last], slot] <= decided_at[last]  # unless the row holds a later one already
    last, slot = last[stands], slot[stands]
    r = row[last]
    told = objectives[last]
    same = (decided[r, slot] == decided_at[last])[:, None] & np.isnan(told)
    window[r, slot, n_measures : window.shape[2] - n_objectives] = actions[last]
    window[r, slot, window.shape[2] - n_objectives :] = np.where(same, window[r, slot, window.shape[2] - n_objectives :], told)
    decided[r, slot] = decided_at[last]

    acted, seen_at, newest_decision = list(states.policies), states.seen_at.copy(), decided.max(1)
    ours_counts = platform.logs.activity is None
    for i, at, policy in zip(row.tolist(), decided_at.tolist(), policies, strict=True):
        if at >= newest_decision[i]:  # an outcome may be told of a decision that others have followed
            acted[i] = policy
        if (ours_counts or policy != OWN_POLICY) and at > seen_at[i]:  # as `_seen` has it
            seen_at[i] = at
    return replace(states, window=window, counts=counts, decided=decided, period=period, policies=acted, seen_at=seen_at)


def empty_states(platform: Platform, player_ids: Sequence[str], width: int, period: int = 0) -> OnlineStates:
    """Online rows of players of whom nothing is known; `width` is F."""
    n, window = len(player_ids), platform.state.window
    return OnlineStates(
        list(player_ids),
        np.full((n, window, width), np.nan, np.float32),
        np.zeros((n, window, len(platform.state.measures)), np.float32),
        np.zeros((n, window), np.int64),
        np.full(n, period, np.int64),
        [None] * n,
        np.full(n, NEVER, np.int64),
        np.full(n, NEVER, np.int64),
        [{} for _ in range(n)],
        {name: np.full(n, np.nan) if a.kind == "numeric" else [None] * n for name, a in platform.state.attributes.items()},
        np.zeros(n, bool),
    )


def empty_frame(platform: Platform, player_ids: pl.Series, width: int, period: int = 0) -> pl.DataFrame:
    """`empty_states` as an online frame."""
    return online_table(platform, empty_states(platform, player_ids.to_list(), width, period))


def _including(platform: Platform, frame: pl.DataFrame, player_ids: pl.Series) -> pl.DataFrame:
    missing = player_ids.unique(maintain_order=True).filter(~player_ids.unique(maintain_order=True).is_in(frame["player_id"].implode()))
    if missing.is_empty():
        return frame
    if frame.is_empty():
        raise RequestError("expected at least one known player beside the new ones: the width of a row is read from the frame")
    width = len(frame["window"][0]) // platform.state.window
    return pl.concat([frame, empty_frame(platform, missing, width).select(frame.columns).cast(frame.schema)])


def _advanced(
    values: np.ndarray, counts: np.ndarray, decided: np.ndarray, period: np.ndarray, newest: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rolled forward where something newer than the newest row has happened."""
    shift = np.maximum(newest - period, 0)
    return _rolled(values, shift, np.nan), _rolled(counts, shift, 0.0), _rolled(decided, shift, 0.0), np.maximum(period, newest)


def _combined(measure: Measure, old: np.ndarray, n_old: np.ndarray, new: np.ndarray, n_new: np.ndarray) -> np.ndarray:
    """A cell that held `old` from `n_old` events after `n_new` further ones whose own aggregate is `new`."""
    before = np.where(n_old > 0, old, 0.0)
    if measure.aggregate in ("sum", "count"):
        return before + new
    if measure.aggregate == "mean":
        return (before * n_old + new * n_new) / (n_old + n_new)
    if measure.aggregate == "last":
        return new
    both = np.minimum(old, new) if measure.aggregate == "min" else np.maximum(old, new)
    return np.where(n_old > 0, both, new)


# ---- one player's state as bytes -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Packing:
    """How the rows of one platform are packed for the online store: a record of fixed size, then what is text, as JSON.

    `mark` says what features a record holds; bytes that were written for other ones are as good as absent. No pickle.
    """

    mark: bytes
    window: int
    measures: int
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]

    def record(self, width: int) -> np.dtype:
        """The record's type where a row has `width` numbers (F)."""
        return _record(self.window, self.measures, len(self.numeric), width)


def packing(platform: Platform) -> Packing:
    """The packing of a platform's rows."""
    kinds = {name: attribute.kind for name, attribute in platform.state.attributes.items()}
    mark = bytes.fromhex(fingerprint(platform))[:_MARK]
    numeric = tuple(name for name, kind in kinds.items() if kind == "numeric")
    return Packing(mark, platform.state.window, len(platform.state.measures), numeric, tuple(name for name in kinds if name not in numeric))


@functools.cache
def _record(window: int, measures: int, numeric: int, width: int) -> np.dtype:
    return np.dtype(
        [
            ("mark", f"S{_MARK}"), ("width", "<i8"), ("period", "<i8"), ("seen_at", "<i8"), ("read_at", "<i8"),
            ("window", "<f4", (window, width)), ("counts", "<f4", (window, measures)), ("decided", "<i8", (window,)), ("numeric", "<f8", (numeric,)),
        ]
    )  # fmt: skip


def pack_online(how: Packing, states: OnlineStates) -> list[bytes]:
    """Each player's row as the online store keeps it; `unpack_online` reads it, bit for bit."""
    n, width = len(states), states.window.shape[2]
    table = np.zeros(n, how.record(width))
    table["mark"], table["width"] = how.mark, width
    for name in ("period", "seen_at", "read_at", "window", "counts", "decided"):
        table[name] = getattr(states, name)
    for j, name in enumerate(how.numeric):
        table["numeric"][:, j] = states.attributes[name]
    texts = zip(states.policies, states.heard, *(states.attributes[name] for name in how.categorical), strict=True)
    return [fixed.tobytes() + orjson.dumps(text) for fixed, text in zip(table, texts, strict=True)]


def same_state(how: Packing, one: bytes, other: bytes) -> bool:
    """Whether two packed states of a player say the same, whenever each was read and whatever logs had been heard then.

    Where they do, the older one may stand: of what it has not heard nothing is the player's.
    """
    if one[:_READ_AT] != other[:_READ_AT]:
        return False
    size = how.record(int.from_bytes(one[_MARK : _MARK + 8], "little")).itemsize
    if one[_READ_AT + 8 : size] != other[_READ_AT + 8 : size]:
        return False
    (policy, _, *texts), (before, _, *others) = orjson.loads(one[size:]), orjson.loads(other[size:])
    return (policy, texts) == (before, others)


def packed_width(how: Packing, packed: Sequence[bytes | None]) -> int:
    """F of the states among these that were written last; 0 where none holds the features of now."""
    newest = max((value[_MARK : _MARK + 40] for value in packed if value is not None and value.startswith(how.mark)), key=_read_at, default=None)
    return 0 if newest is None else int.from_bytes(newest[:8], "little")


def _read_at(head: bytes) -> int:
    at = _READ_AT - _MARK
    return int.from_bytes(head[at : at + 8], "little", signed=True)


def unpack_online(how: Packing, player_ids: Sequence[str], packed: Sequence[bytes | None], width: int) -> OnlineStates:
    """The rows of players out of their bytes, one per player in their order; where there are none, or they hold other features, an empty one."""
    record = how.record(width)
    blank = _blank(how, width)
    size, head = record.itemsize, blank[: _MARK + 8]
    stored = [value is not None and value.startswith(head) for value in packed]
    kept = [value if there and value is not None else blank for value, there in zip(packed, stored, strict=True)]
    table = np.frombuffer(b"".join([value[:size] for value in kept]), record)
    texts = [orjson.loads(value[size:]) for value in kept]
    attributes: dict[str, np.ndarray | list[str | None]] = {name: table["numeric"][:, j] for j, name in enumerate(how.numeric)}
    attributes |= {name: [text[2 + j] for text in texts] for j, name in enumerate(how.categorical)}
    return OnlineStates(
        list(player_ids), table["window"], table["counts"], table["decided"], table["period"], [text[0] for text in texts], table["seen_at"],
        table["read_at"], [text[1] for text in texts], attributes, np.array(stored, bool),
    )  # fmt: skip


@functools.cache
def _blank(how: Packing, width: int) -> bytes:
    table = np.zeros(1, how.record(width))
    table["mark"], table["width"], table["window"], table["numeric"] = how.mark, width, np.nan, np.nan
    return table[0].tobytes() + orjson.dumps([None, {}, *([None] * len(how.categorical))])


_STATE_PARTS = ("history", "actions", "objectives")
_SPARSE = b"\x01"  # how a packed state of today begins; those of earlier releases are zlib streams, which begin otherwise


def pack_states(states: PlayerStates) -> list[bytes]:
    """Each state, bit for bit (float32) as the policy saw it, for the decision log; `unpack_states` reads it. No pickle.

    What is known, behind one bit per number that says whether it is: mantissas hardly compress, and what is not known takes no room.
    """
    n = len(states)
    parts = [np.asarray(getattr(states, name), "<f4").reshape(n, -1) for name in _STATE_PARTS]
    shapes = [list(getattr(states, name).shape[1:]) for name in _STATE_PARTS]
    numbers = np.concatenate(parts, 1)
    known = ~np.isnan(numbers)
    marks, values, ends = np.packbits(known, 1), numbers[known].tobytes(), (4 * known.sum(1).cumsum()).tolist()
    packed, start = [], 0
    for row, (attributes, end) in enumerate(zip(_attribute_rows(states), ends, strict=True)):
        head = orjson.dumps([shapes, attributes, states.policies[row] if states.policies else None])
        packed.append(b"".join((_SPARSE, struct.pack("<I", len(head)), head, marks[row].tobytes(), values[start:end])))
        start = end
    return packed


def _attribute_rows(states: PlayerStates) -> list[dict[str, Any]]:
    """Each player's attributes by name, None where unknown."""
    given = states.attributes
    if isinstance(given, pl.DataFrame):
        return given.rows(named=True) if given.width else [{} for _ in range(len(states))]
    if not isinstance(given, Mapping):
        return [{} for _ in range(len(states))]
    columns = [[None if v != v else v for v in c.tolist()] if isinstance(c, np.ndarray) else c for c in given.values()]  # noqa: PLR0124 - NaN alone
    return [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)] if columns else [{} for _ in range(len(states))]


def unpack_states(platform: Platform, packed: Sequence[bytes]) -> PlayerStates:
    """States that `pack_states` kept, as one batch in their order."""
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in _STATE_PARTS}
    attributes: list[dict[str, Any]] = []
    policies: list[str | None] = []
    for one in packed:
        if one[:1] == _SPARSE:
            size = struct.unpack_from("<I", one, 1)[0]
            shapes, about, policy = orjson.loads(one[5 : 5 + size])
            total = sum(math.prod(shape) for shape in shapes)
            marks, values = one[5 + size : 5 + size + -(-total // 8)], one[5 + size + -(-total // 8) :]
            numbers = np.full(total, np.nan, np.float32)
            numbers[np.unpackbits(np.frombuffer(marks, np.uint8), count=total).astype(bool)] = np.frombuffer(values, "<f4")
        else:
            head, _, body = zlib.decompress(one).partition(b"\n")
            header = json.loads(head)
            shapes, about, policy = [header["shapes"][name] for name in _STATE_PARTS], header["attributes"], header["policy"]
            numbers = np.frombuffer(body, "<f4")
        at = 0
        for name, shape in zip(_STATE_PARTS, shapes, strict=True):
            arrays[name].append(numbers[at : at + math.prod(shape)].reshape(shape))
            at += math.prod(shape)
        attributes.append(about)
        policies.append(policy)
    columns: dict[str, np.ndarray | list[str | None]] = {
        name: np.array([row.get(name) for row in attributes], float) if a.kind == "numeric" else [row.get(name) for row in attributes]
        for name, a in platform.state.attributes.items()
    }
    return PlayerStates(np.stack(arrays["history"]), columns, np.stack(arrays["actions"]), np.stack(arrays["objectives"]), policies)


# ---- states as the networks' inputs --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Units:
    """Standard units of actions: `(raw - centre) / width` with the logged actions' mean and standard deviation, [D] each."""

    centre: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, action: np.ndarray, catalogue: bool) -> Units:
        """From logged actions [N, D]; a catalogue's embeddings are standard already."""
        if catalogue or not len(action):
            return cls(np.zeros(action.shape[1]), np.ones(action.shape[1]))
        width = np.nanstd(action, 0)
        return cls(np.nanmean(action, 0), np.where(width > 1e-9, width, 1.0))

    def standard(self, raw: np.ndarray) -> np.ndarray:
        return (raw - self.centre) / self.width

    def raw(self, standard: np.ndarray) -> np.ndarray:
        return self.centre + self.width * standard


@dataclass(frozen=True)
class Encoding:
    """Standardisation and vocabularies, fitted on training players only; plain data that a bundle keeps as JSON.

    mean, scale [F]; numeric: attribute -> (mean, scale); vocabularies: attribute -> known values, slot 0 for unseen ones.
    """

    mean: np.ndarray
    scale: np.ndarray
    numeric: dict[str, tuple[float, float]]
    vocabularies: dict[str, list[str]]

    @functools.cached_property
    def _slots(self) -> dict[str, dict[str, int]]:
        """Per vocabulary the slot of each known value."""
        return {name: {value: slot for slot, value in enumerate(values, 1)} for name, values in self.vocabularies.items()}

    @functools.cached_property
    def attribute_width(self) -> int:
        return 2 * len(self.numeric) + sum(1 + len(values) for values in self.vocabularies.values())

    def rows(self, raw: np.ndarray) -> np.ndarray:
        """[..., F] raw units to [..., 2F] float32: standardised values (0 where unknown), then presence marks."""
        raw = raw.astype(np.float32, copy=False)
        f = raw.shape[-1]
        rows = np.empty((*raw.shape[:-1], 2 * f), np.float32)
        known = np.isfinite(raw)
        standard = (raw - self.mean) / self.scale
        rows[..., :f] = np.where(known, np.minimum(np.maximum(standard, -CLIP), CLIP), np.float32(0))
        rows[..., f:] = known
        return rows

    def attributes(self, attributes: pl.DataFrame | Columns | np.ndarray | None, n: int) -> np.ndarray:
        """[n, attribute_width] float32: numbers standardised with a presence mark, categories one-hot with an unseen slot."""
        names = [*self.numeric, *self.vocabularies]
        columns: Columns
        if isinstance(attributes, Mapping):
            columns = attributes
        elif isinstance(attributes, pl.DataFrame):
            if missing := [name for name in names if name not in attributes.columns]:
                raise RequestError(f"attributes: expected the columns {', '.join(names)}; missing: {', '.join(missing)}")
            columns = {name: attributes[name].to_numpy() for name in self.numeric} | {
                name: attributes[name].cast(pl.String).to_list() for name in self.vocabularies
            }
        elif attributes is None:
            columns = {name: np.full(n, np.nan) for name in self.numeric} | {name: [None] * n for name in self.vocabularies}
        else:
            raise RequestError("attributes: expected a frame here; arrays are named first")
        encoded = np.zeros((n, self.attribute_width), np.float32)
        at = 0
        for name, (mean, scale) in self.numeric.items():
            values = np.asarray(columns[name], float)
            known = np.isfinite(values)
            encoded[:, at] = np.where(known, np.clip((values - mean) / scale, -CLIP, CLIP), 0)
            encoded[:, at + 1] = known
            at += 2
        for name, known_values in self.vocabularies.items():
            slots = self._slots[name]
            encoded[np.arange(n), at + np.array([slots.get(str(value), 0) if value is not None else 0 for value in columns[name]], np.int64).reshape(n)] = 1
            at += 1 + len(known_values)
        return encoded


def fit_encoding(platform: Platform, matrix: np.ndarray, attributes: pl.DataFrame, rows: np.ndarray | None = None) -> Encoding:
    """Standardisation from the rows [rows, F] (only those that `rows` names) and attributes of training players.

    Piece by piece, so that a matrix that lies in a mapped file is read and never copied.
    """
    pieces = [slice(start, start + PIECE) for start in range(0, len(matrix) if rows is None else len(rows), PIECE)]

    def summed(what: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.sum([what(matrix[piece if rows is None else rows[piece]]) for piece in pieces], 0) if pieces else np.zeros(matrix.shape[1])

    count = np.maximum(summed(lambda part: np.isfinite(part).sum(0)), 1)
    mean = summed(lambda part: np.where(np.isfinite(part), part, 0).sum(0, dtype=float)) / count
    scale = np.sqrt(summed(lambda part: np.where(np.isfinite(part), (part - mean) ** 2, 0).sum(0, dtype=float)) / count)
    numeric, vocabularies = {}, {}
    for name, attribute in platform.state.attributes.items():
        if attribute.kind == "numeric":
            values = attributes[name].drop_nulls().drop_nans()
            spread = values.std() if len(values) > 1 else None
            numeric[name] = (float(values.mean() or 0.0), float(spread or 1.0))  # type: ignore[arg-type]  # polars types a mean as any Python literal
        else:
            vocabularies[name] = sorted(attributes[name].cast(pl.String).drop_nulls().unique().to_list())
    return Encoding(mean.astype(np.float32), np.where(scale > 1e-6, scale, 1.0).astype(np.float32), numeric, vocabularies)


def raw_windows(platform: Platform, states: PlayerStates, width: int) -> np.ndarray:
    """[B, window, F] float32 of a batch of states; raises `RequestError` that names the part whose shape is wrong."""
    n, window = len(states.history), platform.state.window
    n_measures, n_objectives = len(platform.state.measures), len(platform.objectives)
    d = width - n_measures - n_objectives
    parts = []
    for name, given, columns, meaning in (
        ("history", states.history, n_measures, "measures"),
        ("actions", states.actions, d, "action dimensions"),
        ("objectives", states.objectives, n_objectives, "objectives"),
    ):
        if given is None:
            parts.append(np.full((n, window, columns), np.nan, np.float32))
            continue
        array = np.asarray(given)
        if array.shape != (n, window, columns):
            raise RequestError(f"{name}: expected the shape [players, window {window}, {columns} {meaning}], got {list(array.shape)}")
        parts.append(array.astype(np.float32, copy=False))
    return np.concatenate(parts, 2)


def attribute_rows(frame: pl.DataFrame, index: np.ndarray) -> pl.DataFrame:
    """Some rows of the players' attributes, in the order of `index`; a platform without attributes has a frame without columns, and so without rows."""
    return frame[index] if frame.width else frame


def attribute_frame(platform: Platform, states: PlayerStates) -> pl.DataFrame | Columns | None:
    """The attributes of a batch as a frame, or as columns where they came as those; an array's columns are taken in the platform file's order."""
    names, n = list(platform.state.attributes), len(states.history)
    given = states.attributes
    if isinstance(given, Mapping) and names:
        if set(names) <= given.keys() and all(len(given[name]) == n for name in names):
            return given
        raise RequestError(f"attributes: expected {n} values for each of {', '.join(names)}")
    if given is None or not names:
        return None if names else pl.DataFrame()
    if not isinstance(given, pl.DataFrame):
        array = np.asarray(given)
        if array.shape != (n, len(names)):
            raise RequestError(f"attributes: expected the shape [{n} players, {len(names)} attributes: {', '.join(names)}], got {list(array.shape)}")
        given = pl.DataFrame(
            {
                name: pl.Series(array[:, j].tolist(), strict=False)
                if platform.state.attributes[name].kind == "numeric"
                else [None if v is None else str(v) for v in array[:, j]]
                for j, name in enumerate(names)
            }
        )
    if missing := [name for name in names if name not in given.columns]:
        raise RequestError(f"attributes: expected the columns {', '.join(names)}; missing: {', '.join(missing)}")
    if len(given) != n:
        raise RequestError(f"attributes: expected {n} rows, one per player of history, got {len(given)}")
    numeric = [name for name, a in platform.state.attributes.items() if a.kind == "numeric"]
    try:
        return given.select(names).with_columns(pl.col(numeric).cast(pl.Float64))
    except pl.exceptions.PolarsError as error:
        raise RequestError(f"attributes: expected numbers in {', '.join(numeric)} ({error})") from None
