"""Decisions and player rows to transitions: one `[rows, F]` matrix and indices into it, never copies of windows.

A state's rows are consecutive grid rows, so a decision needs only where its window ends. What differs from the grid is appended to
the matrix and pointed at: one partial row for the period under way, and versions of older rows whose events arrived late.
Termination is data: `discount` is 0 where the player churned.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import zlib
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import numpy as np
import polars as pl
import psutil

from fastq.errors import LogsError, WorkspaceError
from fastq.features import (
    Catalogue,
    Grid,
    PlayerRows,
    PlayerStates,
    action_matrix,
    aggregate,
    attribute_rows,
    attributes_at,
    epoch_microseconds,
    known_delay,
    microseconds,
    row_width,
)  # fmt: skip
from fastq.platform import OWN_POLICY, Platform
from fastq.records import Records, several
from fastq.workspace import Workspace

RECENT = (1, 7)  # periods at a window's end that are described by means of their own, beside the whole window
FARTHEST = 8.0  # standard deviations of a described state
LONG_AGO, FOREVER = int(np.iinfo(np.int64).min // 2), int(np.iinfo(np.int64).max)  # microseconds since 1970 of what never was, and never will be
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

    @property
    def open_ended(self) -> np.ndarray:
        """[N, M] something follows that the log does not hold, and that counts for the objective."""
        return self.truncated[:, None] & (self.platform.discounts > 0)

    @property
    def switched(self) -> np.ndarray:
        """[N] another policy makes the player's next decision."""
        return (self.following >= 0) & (self.policy[self.following] != self.policy)

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


def split_by_time(windows: Windows, at: datetime) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each: decisions all of which was known before `at` (objectives, and the next decision or that none comes), and those made from then on.

    Those between are in neither: what followed them lies on the other side.
    """
    cut, platform = epoch_microseconds(at), windows.platform
    gone = windows.moment + platform.state.churn * microseconds(platform)
    followed = np.where(windows.terminated, gone, np.where(windows.following >= 0, windows.moment[windows.following], windows.moment))
    told = windows.moment + known_delay(platform).max()
    return np.maximum(followed, told) < cut, windows.moment >= cut


@dataclass(frozen=True)
class _Lived:
    """What a part of the events tells about decisions of its players: `at` names those.

    begun, cells [B, measures]: the decisions of whose period something was known already, and what. versions [V, 2], older [V, measures]: (at, period) of
    older periods of which not all was known, and what was. before, after: the last event up to each decision of `at`, and the first one after it;
    `LONG_AGO` and `FOREVER` where there is none.
    """

    begun: np.ndarray
    cells: np.ndarray
    versions: np.ndarray
    older: np.ndarray
    at: np.ndarray
    before: np.ndarray
    after: np.ndarray


def _lived(platform: Platform, grid: Grid, decisions: pl.DataFrame, events: pl.DataFrame) -> _Lived:
    """`decisions` of the players of `grid` in the order of `at`, which is that of players and time."""
    n, width, length = len(grid), len(platform.state.measures), microseconds(platform)
    happened, heard = (events[name].dt.epoch("us").to_numpy() for name in ("occurred_at", "known_at"))
    period, player = happened // length, grid.players(decisions["player_id"])
    cell, asked = grid.places(events["player_id"], period), grid.begin[player] - grid.first[player] + decisions["period"].to_numpy()
    at, moment = decisions["at"].to_numpy(), decisions["moment"].to_numpy()

    beside, mine = _beside(cell, asked, n)
    sooner = happened[beside] <= moment[mine]
    first, last = np.full(n, FOREVER), np.full(n, LONG_AGO)
    np.minimum.at(first, cell, happened)
    np.maximum.at(last, cell, happened)
    place = np.arange(n)
    full = last > LONG_AGO
    back, ahead = np.maximum.accumulate(np.where(full, place, -1)), np.minimum.accumulate(np.where(full, place, n)[::-1])[::-1]
    back, ahead = np.append(back, -1)[asked - 1], np.append(ahead, n)[asked + 1]  # the nearest other periods in which something happened
    before = np.where(back >= grid.begin[player], last[back], LONG_AGO)
    after = np.where(ahead < grid.begin[player + 1], np.append(first, FOREVER)[ahead], FOREVER)
    np.maximum.at(before, mine[sooner], happened[beside[sooner]])
    np.minimum.at(after, mine[~sooner], happened[beside[~sooner]])

    known = (happened[beside] < moment[mine]) & (heard[beside] < moment[mine])
    begun, mine = np.unique(mine[known], return_inverse=True)
    cells = np.empty((len(begun), width))
    aggregate(platform, events[beside[known]], mine, cells)

    late = heard >= (period + 1) * length
    complete = np.full(n, LONG_AGO)  # when the last late event of a period was known
    np.maximum.at(complete, cell[late], heard[late])
    touched = np.flatnonzero(complete > LONG_AGO)
    begin = np.searchsorted(touched, np.maximum(asked - platform.state.window, grid.begin[player]))
    number = np.searchsorted(touched, asked) - begin
    whose, nth = _spread(number)
    old = touched[begin[whose] + nth]
    open_still = complete[old] >= moment[whose]
    whose, old = whose[open_still], old[open_still]
    order = np.argsort(old, kind="stable")
    whose, old = whose[order], old[order]
    beside, which = _beside(cell, old, n)
    known = heard[beside] < moment[whose[which]]
    older = np.empty((len(old), width))
    aggregate(platform, events[beside[known]], which[known], older)
    versions = np.stack([at[whose], grid.first[player[whose]] + old - grid.begin[player[whose]]], 1)
    return _Lived(at[begun], cells, versions, older, at, before, after)


def _opening(*keys: np.ndarray) -> np.ndarray:
    """[N] where the run of equal keys that each of N rows stands in begins."""
    at = np.arange(len(keys[0]))
    begins = np.any([np.append(True, key[1:] != key[:-1])[: len(at)] for key in keys], 0)
    return np.maximum.accumulate(np.where(begins, at, 0))


def _spread(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as `number` [N] says, and of each how many of the same came before."""
    whose = np.repeat(np.arange(len(number)), number)
    return whose, np.arange(len(whose)) - np.repeat(number.cumsum() - number, number)


def _beside(cell: np.ndarray, asked: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of an event and a question about its cell, in the order of the events: indices into `cell` and into `asked`, which ascends; n cells."""
    number = np.bincount(asked, minlength=n)
    begin = number.cumsum() - number
    event = np.flatnonzero(number[cell])
    which, nth = _spread(number[cell[event]])
    return event[which], begin[cell[event[which]]] + nth


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
    last, back = np.full(n, LONG_AGO), np.full(n, FOREVER)
    for part in lived:
        last[part.at], back[part.at] = part.before, part.after
    gone_at = np.where(moment - last < gap, last, moment) + gap
    end = max(int(moment.max()), newest)
    return (back >= gone_at) & (gone_at <= np.where(following >= 0, moment[following], end))


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
        # NumPy would ask for huge pages, for which the kernel first tidies up what reading the logs has left: five times what filling them takes
        return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.float32).reshape(shape)
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
        found = pointers["row"]
        if not pointers["decision_id"].equals(decisions["decision_id"]):
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
    opening, first_of_player, opening_of_day = (_opening(player, *of) for of in ((moment,), (), (decisions["period"].to_numpy(),)))
    last_policy = np.where(opening > first_of_player, policy[opening - 1], -1)

    parts = decisions.with_columns(part=placed["part"]).drop_nulls("part").partition_by("part")

    def live(i: int) -> _Lived:
        part = int(parts[i]["part"][0])
        return _lived(platform, rows.grid(part), parts[i], rows.events[part].collect(engine="in-memory"))

    lived = several(live, len(parts))
    nothing = np.empty(0, np.int64), np.empty((0, n_measures)), np.empty((0, 2), np.int64), np.empty((0, n_measures))
    told = zip(nothing, *((part.begun, part.cells, part.versions, part.older) for part in lived), strict=True)
    begun, cells, versions, older = (np.concatenate(each) for each in told)
    in_order = np.lexsort(versions.T[::-1])
    versions, older = versions[in_order], older[in_order]

    previous = np.where(opening - 1 >= opening_of_day, opening - 1, -1)  # an earlier one of the same period
    under_way = previous >= 0
    under_way[begun] = True

    grid = len(rows)
    matrix = _empty((grid + int(under_way.sum()) + len(versions), row_width(platform, rows.catalogue)), Workspace(platform.root), memory)
    decided = np.zeros(len(matrix), np.int64)
    rows.lay(matrix[:grid], decided[:grid])
    matrix[grid:] = np.nan

    partial = np.where(under_way, grid - 1 + under_way.cumsum(), -1)
    acted = np.flatnonzero(previous >= 0)
    matrix[partial[begun], :n_measures] = cells
    matrix[partial[acted], n_measures : matrix.shape[1] - n_objectives] = action[previous[acted]]
    matrix[partial[acted], matrix.shape[1] - n_objectives :] = reward[previous[acted]]
    decided[partial[acted]] = moment[previous[acted]]

    whose, when = versions.T
    window_slot = when - decisions["period"].to_numpy()[whose] + platform.state.window  # slot in a window that ends one period before
    original = first[whose] + when - placed["first"].to_numpy()[whose]
    version = len(matrix) - len(versions) + np.arange(len(versions))
    matrix[version] = matrix[original]
    matrix[version, :n_measures] = older
    decided[version] = decided[original]
    late = np.stack([whose, window_slot, version], 1)

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
        terminated=_churned(platform, decisions, lived, rows.newest, following),
        attributes=attributes_at(platform, records.players, decisions["player_id"], decisions["decided_at"]),
    )
