"""Decisions and player rows to transitions: one `[rows, F]` matrix and indices into it, never copies of windows.

A state's rows are consecutive grid rows, so a decision needs only where its window ends. What differs from the grid is appended to
the matrix and pointed at: one partial row for the period under way, and versions of older rows whose events arrived late.
Termination is data: `discount` is 0 where the player churned.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
import psutil

from fastq.errors import LogsError, WorkspaceError
from fastq.features import (
    Catalogue,
    PlayerRows,
    PlayerStates,
    action_matrix,
    aggregate_events,
    attribute_rows,
    attributes_at,
    known_delay,
    microseconds,
    row_width,
)  # fmt: skip
from fastq.platform import OWN_POLICY, Platform
from fastq.records import Records
from fastq.workspace import Workspace

RECENT = (1, 7)  # periods at a window's end that are described by means of their own, beside the whole window
FARTHEST = 8.0  # standard deviations of a described state
ROUNDED = 5e-3  # by which probabilities that platforms log to three digits may miss a sum of 1


@dataclass(frozen=True)
class Windows:
    """N decisions as transitions, sorted by player and time.

    matrix [rows, F] float32 raw units and decided [rows] int64 (see `features.PlayerRows`), with appended versions.
    end, first [N]: last grid row of the window, and the player's first row (older ones are the empty row 0).
    partial [N]: row of the period under way, -1 where nothing of it was known; late [L, 3]: (decision, window slot, row) of late versions, by decision.
    moment [N] int64, microseconds since 1970. player [N] index into player_ids. policy, last_policy [N] index into policies, -1 for none.
    action [N, D] (raw units, or item embeddings), item [N] position in the catalogue or -1, proposals [N, K, D] NaN where unknown.
    propensity, assignment [N] NaN where unknown; law, chance [N, K]: density of the executed action under each policy, and the probability
    that it acts, NaN where unknown; reward [N, M] NaN where unknown.
    following [N] index of the player's next decision or -1; elapsed [N] periods until it; terminated [N]: nothing follows, the player left.
    """

    platform: Platform
    catalogue: Catalogue | None
    decision_id: list[str]
    player_ids: list[str]
    policies: list[str]
    matrix: np.ndarray
    decided: np.ndarray
    end: np.ndarray
    first: np.ndarray
    partial: np.ndarray
    late: np.ndarray
    moment: np.ndarray
    player: np.ndarray
    policy: np.ndarray
    last_policy: np.ndarray
    action: np.ndarray
    item: np.ndarray
    proposals: np.ndarray
    propensity: np.ndarray
    assignment: np.ndarray
    law: np.ndarray
    chance: np.ndarray
    reward: np.ndarray
    following: np.ndarray
    elapsed: np.ndarray
    terminated: np.ndarray
    attributes: pl.DataFrame

    def __len__(self) -> int:
        return len(self.moment)

    @property
    def discount(self) -> np.ndarray:
        """[N, M] discount from each decision to the one that follows; 0 where none does."""
        alive = (self.following >= 0) & ~self.terminated
        return np.where(alive[:, None] & (self.platform.discounts > 0), self.platform.discounts ** np.where(alive, self.elapsed, 1.0)[:, None], 0.0)

    @property
    def truncated(self) -> np.ndarray:
        """[N] the log ends here though the player may go on."""
        return (self.following < 0) & ~self.terminated

    def chances(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, K] how likely each policy was to be chosen, 0 where unknown, and [B] whether the log tells all of them; there they sum to 1.

        Where the known ones do, a policy without one could not act then, as ours could not before it was served.
        """
        chance = np.nan_to_num(self.chance[index])
        whole = chance.sum(1)
        told = np.abs(whole - 1) < ROUNDED
        return chance / np.where(told, whole, 1.0)[:, None], told

    def mixture(self, index: np.ndarray) -> np.ndarray:
        """[B] density of the executed action under all policies together, NaN where the chance, or the law, of one that may have acted is not known."""
        chance, told = self.chances(index)
        return np.where(told, np.where(chance > 0, self.law[index] * chance, 0.0).sum(1), np.nan)

    def rows_of(self, index: np.ndarray) -> np.ndarray:
        """[B, window] matrix rows of the windows of these decisions."""
        window = self.platform.state.window
        partial = self.partial[index]
        shift = (partial >= 0).astype(np.int64)
        rows = self.end[index, None] + np.arange(-window + 1, 1) + shift[:, None]
        rows = np.where(rows < self.first[index, None], 0, rows)
        rows[:, -1] = np.where(partial >= 0, partial, rows[:, -1])
        if len(self.late):  # those of one decision stand together, so that a batch costs what it holds and not what the log does
            begin = np.searchsorted(self._late_of, index)
            count = np.searchsorted(self._late_of, index, "right") - begin
            whose = np.repeat(np.arange(len(index)), count)
            which = np.arange(len(whose)) + np.repeat(begin - count.cumsum() + count, count)
            slot = self.late[which, 1] - shift[whose]
            inside = slot >= 0
            rows[whose[inside], slot[inside]] = self.late[which[inside], 2]
        return rows

    @cached_property
    def _late_of(self) -> np.ndarray:
        """[L] the decision of each late version, ascending."""
        return np.ascontiguousarray(self.late[:, 0])

    def rows_seen(self, index: np.ndarray, chunk: int = 16_384) -> np.ndarray:
        """Matrix rows, ascending, that lie in the window of any of these decisions."""
        seen = np.zeros(len(self.matrix), bool)
        for start in range(0, len(index), chunk):
            seen[self.rows_of(index[start : start + chunk])] = True
        return np.flatnonzero(seen)

    def known(self, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[B, window, M] which objective values in these windows were known strictly before their decisions."""
        known: np.ndarray = self.decided[rows][:, :, None] + known_delay(self.platform) < self.moment[index, None, None]
        return known

    def raw(self, index: np.ndarray) -> np.ndarray:
        """[B, window, F] the windows of these decisions in raw units, NaN where nothing was known."""
        rows = self.rows_of(index)
        windows = self.matrix[rows]
        objectives = windows[:, :, windows.shape[2] - len(self.platform.objectives) :]
        objectives[~self.known(index, rows)] = np.nan
        return windows

    def states(self, index: np.ndarray) -> PlayerStates:
        """The same as the public batch of states that `Policy.recommend` takes."""
        raw = self.raw(index)
        split_at = [len(self.platform.state.measures), raw.shape[2] - len(self.platform.objectives)]
        history, actions, objectives = np.split(raw, split_at, axis=2)
        names = [self.policies[p] if p >= 0 else None for p in self.last_policy[index]]
        return PlayerStates(history, attribute_rows(self.attributes, index), actions, objectives, names)

    def fingerprint(self) -> str:
        """sha256 over what was learned from: decisions, actions, outcomes and rows."""
        digest = hashlib.sha256()
        for array in (self.matrix, self.action, self.reward, self.moment):
            digest.update(np.ascontiguousarray(array).data)  # no copy of what lies in order, in memory or in a file
        return digest.hexdigest()


def described(windows: Windows, chunk: int = 16_384) -> np.ndarray:
    """[N, X] float32, standardised: what a classifier or a law may follow of each state, 0 where unknown.

    Means of the last periods and of the window, also as logarithms where positive, the newest known values, how much was seen and how long ago, attributes.
    """
    platform, parts = windows.platform, []
    for start in range(0, len(windows), chunk):
        raw = windows.raw(np.arange(start, min(start + chunk, len(windows))))
        known = np.isfinite(raw)
        total = np.where(known, raw, np.float32(0))
        seen = known[:, :, : len(platform.state.measures) or None].any(2)
        away = np.where(seen.any(1), seen[:, ::-1].argmax(1), seen.shape[1]).astype(np.float32)
        columns = [np.stack([away, np.minimum(away, 4), np.log1p(away)], 1)]
        for last in dict.fromkeys(min(each, raw.shape[1]) for each in (*RECENT, raw.shape[1])):
            count = known[:, -last:].sum(1)
            mean = np.divide(total[:, -last:].sum(1), count, out=np.full(count.shape, np.nan, np.float32), where=count > 0)
            columns += [mean, np.sign(mean) * np.log1p(np.abs(mean)), seen[:, -last:].mean(1, keepdims=True)]
        newest = raw.shape[1] - 1 - known[:, ::-1].argmax(1)
        columns.append(np.take_along_axis(raw, newest[:, None], 1)[:, 0])
        parts.append(np.concatenate(columns, 1, dtype=np.float32))
    parts = [np.concatenate(parts), *(_attribute(windows, name) for name in platform.state.attributes)]
    x = np.concatenate(parts, 1, dtype=np.float32)
    known = np.isfinite(x)
    count = np.maximum(known.sum(0), 1)
    x = np.where(known, x - np.where(known, x, 0).sum(0, dtype=float) / count, 0.0).astype(np.float32)
    spread = np.sqrt(np.square(x).sum(0, dtype=float) / count)
    return np.clip(x[:, spread > 1e-6] / spread[spread > 1e-6].astype(np.float32), -FARTHEST, FARTHEST)


def _attribute(windows: Windows, name: str) -> np.ndarray:
    column = windows.attributes[name]
    if windows.platform.state.attributes[name].kind == "numeric":
        return column.cast(pl.Float64).fill_null(np.nan).to_numpy()[:, None]
    dummies = column.cast(pl.String).to_dummies(drop_first=True)
    return dummies.to_numpy().astype(float) if dummies.width else np.empty((len(column), 0))  # all alike: Polars gives no rows either


def held_out_players(player_ids: list[str], share: float, seed: int) -> np.ndarray:
    """[P] bool: a `share` of players, the same ones in every run and however many others there are (a checksum of the id decides)."""
    salt = zlib.crc32(str(seed).encode())
    drawn = np.array([zlib.crc32(player.encode(), salt) for player in player_ids], np.uint64)
    # crc32 is linear, so near ids land near each other; one multiplication spreads them
    return ((drawn * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)).astype(float) / 2.0**53 < share


@dataclass(frozen=True)
class _Lived:
    """What a part of the events tells about the decisions `at` of its players."""

    begun: pl.DataFrame  # see `_partial_rows`
    versions: pl.DataFrame  # see `_late_versions`
    seen: pl.DataFrame  # at; before, after: the last event up to the decision, the first one after it


def _lived(platform: Platform, decisions: pl.DataFrame, events: pl.DataFrame) -> _Lived:
    events = events.with_columns(period=pl.col("occurred_at").dt.epoch("us").floordiv(microseconds(platform)))
    happened = events.select("player_id", happened=pl.col("occurred_at").dt.epoch("us")).sort("happened")
    asked = decisions.select("player_id", "moment", "at").sort("moment")

    def nearest(strategy: Literal["backward", "forward"], *, at_the_moment: bool) -> pl.DataFrame:
        found = asked.join_asof(
            happened, left_on="moment", right_on="happened", by="player_id", strategy=strategy, allow_exact_matches=at_the_moment, check_sortedness=False
        )
        return found.select("at", "happened")

    before, after = nearest("backward", at_the_moment=True), nearest("forward", at_the_moment=False)
    seen = before.select("at", before="happened").join(after.select("at", after="happened"), on="at")
    return _Lived(_partial_rows(platform, decisions, events), _late_versions(platform, decisions, events), seen)


def _churned(platform: Platform, decisions: pl.DataFrame, lived: list[_Lived], newest: int | None, following: np.ndarray) -> np.ndarray:
    """[N] bool: before the next decision, or the log's end, the player had been without activity for `churn` periods, and came back no sooner.

    Decisions in the course of an absence are links of the chain like any other: to end it at the first of them would take knowledge of the
    days after, which the last `churn` periods of a log don't have, and values learned there would not be those learned before. The clock
    runs from the last activity; for somebody who had been gone already when the decision was made, from the decision.
    """
    n = len(decisions)
    if newest is None or not n:
        return np.zeros(n, bool)
    gap = platform.state.churn * microseconds(platform)
    moment = decisions["moment"].to_numpy()
    last, back = np.full(n, np.iinfo(np.int64).min // 2), np.full(n, np.iinfo(np.int64).max)
    for part in lived:
        at = part.seen["at"].to_numpy()
        last[at], back[at] = (
            part.seen["before"].fill_null(np.iinfo(np.int64).min // 2).to_numpy(),
            part.seen["after"].fill_null(np.iinfo(np.int64).max).to_numpy(),
        )
    gone_at = np.where(moment - last < gap, last, moment) + gap
    end = max(int(moment.max()), newest)
    return (back >= gone_at) & (gone_at <= np.where(following >= 0, moment[following], end))


def _partial_rows(platform: Platform, decisions: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """What was known of the period under way, of which something had happened: `at` (the decision), measures."""
    pairs = decisions.lazy().select("player_id", "period", "at", "decided_at").join(events.lazy(), on=["player_id", "period"], maintain_order="right")
    pairs = pairs.filter((pl.col("occurred_at") < pl.col("decided_at")) & (pl.col("known_at") < pl.col("decided_at")))
    return aggregate_events(platform, pairs, keys=["at"], counts=False).collect(engine="in-memory")


def _late_versions(platform: Platform, decisions: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Older periods as they were known at a decision, where events of theirs arrived only later: `at`, `period`, measures."""
    length = microseconds(platform)
    late = events.lazy().filter(pl.col("known_at").dt.epoch("us") >= (pl.col("period") + 1) * length)
    late = late.group_by("player_id", "period").agg(known=pl.col("known_at").max())
    touched = decisions.lazy().select("player_id", "at", "decided_at", now="period").join(late, on="player_id")
    touched = touched.filter(
        (pl.col("period") < pl.col("now")) & (pl.col("period") > pl.col("now") - platform.state.window - 1) & (pl.col("known") >= pl.col("decided_at"))
    )
    touched = touched.select("player_id", "period", "at", "decided_at").collect(engine="in-memory").lazy()
    known = touched.join(events.lazy(), on=["player_id", "period"], maintain_order="right").filter(pl.col("known_at") < pl.col("decided_at"))
    cells = aggregate_events(platform, known, keys=["at", "period"], counts=False)
    return touched.select("at", "period").join(cells, on=["at", "period"], how="left").collect(engine="in-memory")


def _proposal_arrays(
    platform: Platform, records: Records, decisions: pl.DataFrame, policies: list[str], action: np.ndarray, policy: np.ndarray, catalogue: Catalogue | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """proposals [N, K, D], law [N, K], chance [N, K]; the executed action, its propensity and assignment fill the acting policy's slot."""
    n, k = len(decisions), len(policies)
    proposals, law, chance = np.full((n, k, action.shape[1]), np.nan), np.full((n, k), np.nan), np.full((n, k), np.nan)
    if records.proposals is not None and len(records.proposals):
        slots = pl.DataFrame({"policy": policies, "slot": np.arange(k)})
        known = records.proposals.join(decisions.select("decision_id", "at"), on="decision_id").join(slots, on="policy")
        at = known["at"].to_numpy(), known["slot"].to_numpy()
        proposals[at] = action_matrix(platform, known, catalogue)
        law[at], chance[at] = known["propensity"].cast(pl.Float64).to_numpy(), known["assignment"].cast(pl.Float64).to_numpy()
    own = np.arange(n), policy
    given = decisions["propensity"].cast(pl.Float64).to_numpy()
    proposals[own], law[own] = action, np.where(np.isfinite(given), given, law[own])
    assigned = decisions["assignment"].cast(pl.Float64).to_numpy()
    chance[own] = np.where(np.isfinite(assigned), assigned, chance[own])
    return proposals, law, chance


def _look_back(decisions: pl.DataFrame, placed: pl.DataFrame, found: pl.Series) -> None:
    """Raise `LogsError` where a pointer names a row that is not the player's own, or was not complete when the decision was made."""
    behind = found - placed["row"]  # periods since the player's first
    ahead = (placed["first"] + behind >= placed["period"]) | (behind < -1) | (placed["first"] + behind > placed["last"])
    if ahead.any():
        which = decisions["decision_id"].filter(ahead)
        said = f"{which[0]}: the feature store found a row that was not complete when it was decided ({len(which):,} of {len(found):,} decisions)"
        raise LogsError(f"{said}; nothing may be learned from what was not known; run `fastq retrain` to build the features anew")


def _empty(shape: tuple[int, int], workspace: Workspace, memory: int | None) -> np.ndarray:
    """A float32 matrix to be filled: in memory or, beyond the limit, in a file without a name, which is gone with whoever holds it."""
    size = 4 * shape[0] * shape[1]
    if size <= (psutil.virtual_memory().available // 2 if memory is None else memory):
        return np.empty(shape, np.float32)
    workspace.make()
    try:
        with tempfile.TemporaryFile(dir=workspace.state) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a signal in the middle of writing
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        raise WorkspaceError(f"{workspace.state}: no room for a feature table of {size / 1e9:.1f} GB, more than fits into memory ({error.strerror})") from None


def build(platform: Platform, records: Records, rows: PlayerRows, pointers: pl.DataFrame | None = None, memory: int | None = None) -> Windows:
    """Transitions of all accepted decisions.

    `pointers` (decision_id, row) name the last complete row before each decision, as a point-in-time feature store finds it; without
    them the grid is asked directly. A null pointer means that nothing was known yet. A matrix of more than `memory` bytes (half of what is
    free, unless said) is laid in a file that is mapped, with the same content.
    """
    n_measures, n_objectives, length = len(platform.state.measures), len(platform.objectives), microseconds(platform)
    decisions = records.decisions.sort("player_id", "decided_at", "decision_id").with_columns(
        at=pl.int_range(pl.len(), dtype=pl.Int64), moment=pl.col("decided_at").dt.epoch("us")
    )
    decisions = decisions.with_columns(period=pl.col("moment").floordiv(length))
    placed = decisions.select("player_id", "period").join(rows.spans, on="player_id", how="left", maintain_order="left")
    first = placed["row"].to_numpy()
    if pointers is None:
        complete = placed["period"] - 1
        found = pl.select(pl.when(complete.is_between(placed["first"], placed["last"])).then(placed["row"] + complete - placed["first"])).to_series()
    else:
        found = decisions.select("decision_id").join(pointers.select("decision_id", "row"), on="decision_id", how="left", maintain_order="left")["row"]
        _look_back(decisions, placed, found)
    # without a complete row yet, the window ends just before the player's first one
    end = found.fill_null(pl.Series(first - 1)).to_numpy().copy()

    action = action_matrix(platform, decisions, rows.catalogue)
    reward = decisions.select(pl.col(list(platform.objectives)).cast(pl.Float64)).to_numpy().astype(float)
    present = set(decisions["policy"].unique().to_list())
    policies = [name for name in [*platform.policies, OWN_POLICY] if name in present]
    slot = {name: k for k, name in enumerate(policies)}
    policy = decisions["policy"].replace_strict(slot, return_dtype=pl.Int64).cast(pl.Int64).to_numpy(writable=True)
    player_ids = decisions["player_id"].unique(maintain_order=True)
    player = decisions["player_id"].replace_strict(player_ids, np.arange(len(player_ids)), return_dtype=pl.Int64).to_numpy(writable=True)

    moment = decisions["moment"].to_numpy()
    n = len(decisions)
    same = np.append(player[1:] == player[:-1], False) if n else np.zeros(0, bool)
    following = np.where(same, np.arange(n) + 1, -1)
    elapsed = np.where(same, (np.append(moment[1:], 0) - moment) / length, 0.0)
    # of several decisions at one moment none was known to the others
    opening, first_of_player = (decisions.select(pl.col("at").first().over("player_id", *of)).to_series().to_numpy() for of in (["moment"], []))
    last_policy = np.where(opening > first_of_player, policy[opening - 1], -1)

    lived, newest = [], None
    for part, mine in decisions.with_columns(part=placed["part"]).drop_nulls("part").partition_by("part", as_dict=True).items():
        events = rows.events[part[0]].collect()
        lived.append(_lived(platform, mine, events))
    if rows.events:
        newest = max((m for m in (p.select(pl.col("occurred_at").dt.epoch("us").max()).collect().item() for p in rows.events) if m is not None), default=None)

    opening_of_day = decisions.select(pl.col("at").first().over("player_id", "period")).to_series().to_numpy()
    earlier = pl.DataFrame({"at": np.arange(n), "previous": opening - 1}).filter(pl.Series(opening - 1 >= opening_of_day))
    measures = dict.fromkeys(platform.state.measures, pl.Float64)
    begun = pl.concat([pl.DataFrame(schema={"at": pl.Int64, **measures}), *(part.begun for part in lived)], how="vertical_relaxed")
    begun = begun.join(earlier, on="at", how="full", coalesce=True).sort("at")
    versions = pl.concat([pl.DataFrame(schema={"at": pl.Int64, "period": pl.Int64, **measures}), *(part.versions for part in lived)], how="vertical_relaxed")
    versions = versions.sort("at", "period")

    grid = len(rows)
    matrix = _empty((grid + len(begun) + len(versions), row_width(platform, rows.catalogue)), Workspace(platform.root), memory)
    decided = np.zeros(len(matrix), np.int64)
    rows.lay(matrix[:grid], decided[:grid])
    matrix[grid:] = np.nan

    at, size = begun["at"].to_numpy(), grid
    block = matrix[size : size + len(begun)]
    block[:, :n_measures] = begun.select(pl.col(list(measures)).cast(pl.Float32)).to_numpy().reshape(len(begun), n_measures)
    previous = begun["previous"].fill_null(-1).to_numpy().astype(np.int64)
    acted = previous >= 0
    block[acted, n_measures : block.shape[1] - n_objectives] = action[previous[acted]]
    block[acted, block.shape[1] - n_objectives :] = reward[previous[acted]]
    if n:
        decided[size : size + len(begun)] = np.where(acted, moment[previous], 0)
    partial = np.full(n, -1, np.int64)
    partial[at] = size + np.arange(len(begun))
    size += len(begun)

    whose, when = versions["at"].to_numpy(), versions["period"].to_numpy()
    window_slot = when - decisions["period"].to_numpy()[whose] + platform.state.window  # slot in a window that ends one period before
    original = first[whose] + when - placed["first"].to_numpy()[whose]
    block = matrix[size:]
    block[:] = matrix[original]
    block[:, :n_measures] = versions.select(pl.col(list(measures)).cast(pl.Float32)).to_numpy().reshape(len(versions), n_measures)
    decided[size:] = decided[original]
    late = np.stack([whose, window_slot, size + np.arange(len(versions))], 1).astype(np.int64)

    proposals, law, chance = _proposal_arrays(platform, records, decisions, policies, action, policy, rows.catalogue)
    return Windows(
        platform=platform,
        catalogue=rows.catalogue,
        decision_id=decisions["decision_id"].to_list(),
        player_ids=player_ids.to_list(),
        policies=policies,
        matrix=matrix,
        decided=decided,
        end=end,
        first=first,
        partial=partial,
        late=late,
        moment=moment,
        player=player,
        policy=policy,
        last_policy=last_policy,
        action=action,
        item=rows.catalogue.positions(decisions["item_id"].to_list()) if rows.catalogue else np.full(n, -1),
        proposals=proposals,
        law=law,
        chance=chance,
        propensity=decisions["propensity"].cast(pl.Float64).to_numpy(),
        assignment=decisions["assignment"].cast(pl.Float64).to_numpy(),
        reward=reward,
        following=following,
        elapsed=elapsed,
        terminated=_churned(platform, decisions, lived, newest, following),
        attributes=attributes_at(platform, records.players, decisions["player_id"], decisions["decided_at"]),
    )
