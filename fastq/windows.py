"""Decisions and player rows to transitions: one `[rows, F]` matrix and indices into it, never copies of windows.

A state's rows are consecutive grid rows, so a decision needs only where its window ends. What differs from the grid is appended to
the matrix and pointed at: one partial row for the period under way, and versions of older rows whose events arrived late.
Termination is data: `discount` is 0 where the player churned.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from fastq.features import Catalogue, PlayerRows, PlayerStates, action_matrix, aggregate_events, attribute_rows, attributes_at, known_delay, microseconds
from fastq.platform import OWN_POLICY, Platform
from fastq.records import Records


@dataclass(frozen=True)
class Windows:
    """N decisions as transitions, sorted by player and time.

    matrix [rows, F] float32 raw units and decided [rows] int64 (see `features.PlayerRows`), with appended versions.
    end, first [N]: last grid row of the window, and the player's first row (older ones are the empty row 0).
    partial [N]: row of the period under way, -1 where nothing of it was known; late [L, 3]: (decision, window slot, row) of late versions.
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

    def rows_of(self, index: np.ndarray) -> np.ndarray:
        """[B, window] matrix rows of the windows of these decisions."""
        window = self.platform.state.window
        partial = self.partial[index]
        shift = (partial >= 0).astype(np.int64)
        rows = self.end[index, None] + np.arange(-window + 1, 1) + shift[:, None]
        rows = np.where(rows < self.first[index, None], 0, rows)
        rows[:, -1] = np.where(partial >= 0, partial, rows[:, -1])
        if len(self.late):
            place = np.full(len(self), -1)
            place[index] = np.arange(len(index))
            mine = self.late[place[self.late[:, 0]] >= 0]
            slot = mine[:, 1] - shift[place[mine[:, 0]]]
            rows[place[mine[:, 0]][slot >= 0], slot[slot >= 0]] = mine[slot >= 0, 2]
            rows = rows[place[index]]  # a decision that is asked for twice gets the same window twice
        return rows

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
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def held_out_players(player_ids: list[str], share: float, seed: int) -> np.ndarray:
    """[P] bool: a `share` of players, the same ones in every run and however many others there are (a checksum of the id decides)."""
    salt = zlib.crc32(str(seed).encode())
    drawn = np.array([zlib.crc32(player.encode(), salt) for player in player_ids], np.uint64)
    # crc32 is linear, so near ids land near each other; one multiplication spreads them
    return ((drawn * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)).astype(float) / 2.0**53 < share


def _churned(platform: Platform, decisions: pl.DataFrame, activity: pl.DataFrame | None, following: np.ndarray) -> np.ndarray:
    """[N] bool: before the next decision, or the log's end, the player had been without activity for `churn` periods, and came back no sooner.

    Decisions in the course of an absence are links of the chain like any other: to end it at the first of them would take knowledge of the
    days after, which the last `churn` periods of a log don't have, and values learned there would not be those learned before. The clock
    runs from the last activity; for somebody who had been gone already when the decision was made, from the decision.
    """
    if activity is None or not platform.state.measures or activity.is_empty() or decisions.is_empty():
        return np.zeros(len(decisions), bool)
    gap = platform.state.churn * microseconds(platform)
    events = activity.select("player_id", happened=pl.col("occurred_at").dt.epoch("us")).sort("happened")
    asked = decisions.select("player_id", "moment", order=pl.int_range(pl.len())).sort("moment")

    def seen(strategy: Literal["backward", "forward"], *, at_the_moment: bool) -> pl.Series:
        found = asked.join_asof(
            events, left_on="moment", right_on="happened", by="player_id", strategy=strategy, allow_exact_matches=at_the_moment, check_sortedness=False
        )
        return found.sort("order")["happened"]

    before, after = seen("backward", at_the_moment=True), seen("forward", at_the_moment=False)
    moment = decisions["moment"].to_numpy()
    last, back = before.fill_null(np.iinfo(np.int64).min // 2).to_numpy(), after.fill_null(np.iinfo(np.int64).max).to_numpy()
    gone_at = np.where(moment - last < gap, last, moment) + gap
    end = max(int(moment.max()), int(events["happened"].max()))  # type: ignore[arg-type]  # an int column's max
    return (back >= gone_at) & (gone_at <= np.where(following >= 0, moment[following], end))


def _partial_rows(platform: Platform, decisions: pl.DataFrame, activity: pl.DataFrame | None) -> pl.DataFrame:
    """What was known of the period under way: `at` (the decision), measures, and `previous`, the earlier decision of that period."""
    opening = decisions.select("at", previous=pl.col("at").first().over("player_id", "moment") - 1, opening=pl.col("at").first().over("player_id", "period"))
    earlier = opening.filter(pl.col("previous") >= pl.col("opening")).select("at", "previous")
    names = list(platform.state.measures)
    if activity is None or not names:
        return earlier.with_columns(pl.lit(None, pl.Float64).alias(name) for name in names)
    events = activity.with_columns(period=pl.col("occurred_at").dt.epoch("us").floordiv(microseconds(platform)))
    pairs = decisions.lazy().select("player_id", "period", "at", "decided_at").join(events.lazy(), on=["player_id", "period"], maintain_order="right")
    pairs = pairs.filter((pl.col("occurred_at") < pl.col("decided_at")) & (pl.col("known_at") < pl.col("decided_at")))
    begun = aggregate_events(platform, pairs, keys=["at"]).collect(engine="streaming")
    return begun.join(earlier, on="at", how="full", coalesce=True).sort("at")


def _late_versions(platform: Platform, decisions: pl.DataFrame, activity: pl.DataFrame | None) -> pl.DataFrame:
    """Older periods as they were known at a decision, where events of theirs arrived only later: `at`, `period`, measures."""
    names = list(platform.state.measures)
    length = microseconds(platform)
    if activity is None or not names:
        return pl.DataFrame(schema={"at": pl.Int64, "period": pl.Int64} | dict.fromkeys(names, pl.Float64))
    events = activity.lazy().with_columns(period=pl.col("occurred_at").dt.epoch("us").floordiv(length))
    late = (
        events.filter(pl.col("known_at").dt.epoch("us") >= (pl.col("period") + 1) * length).group_by("player_id", "period").agg(known=pl.col("known_at").max())
    )
    touched = decisions.lazy().select("player_id", "at", "decided_at", now="period").join(late, on="player_id")
    touched = touched.filter(
        (pl.col("period") < pl.col("now")) & (pl.col("period") > pl.col("now") - platform.state.window - 1) & (pl.col("known") >= pl.col("decided_at"))
    )
    touched = touched.select("player_id", "period", "at", "decided_at")
    known = touched.join(events, on=["player_id", "period"], maintain_order="right").filter(pl.col("known_at") < pl.col("decided_at"))
    cells = aggregate_events(platform, known, keys=["at", "period"])
    return touched.select("at", "period").join(cells, on=["at", "period"], how="left").collect(engine="streaming").sort("at", "period")


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
    proposals[own], law[own] = action, decisions["propensity"].cast(pl.Float64).to_numpy()
    assigned = decisions["assignment"].cast(pl.Float64).to_numpy()
    chance[own] = np.where(np.isfinite(assigned), assigned, chance[own])
    return proposals, law, chance


def build(platform: Platform, records: Records, rows: PlayerRows, pointers: pl.DataFrame | None = None) -> Windows:
    """Transitions of all accepted decisions.

    `pointers` (decision_id, row) name the last complete row before each decision, as a point-in-time feature store finds it; without
    them the grid is asked directly. A null pointer means that nothing was known yet.
    """
    n_measures, n_objectives, length = len(platform.state.measures), len(platform.objectives), microseconds(platform)
    decisions = records.decisions.sort("player_id", "decided_at", "decision_id").with_columns(
        at=pl.int_range(pl.len(), dtype=pl.Int64), moment=pl.col("decided_at").dt.epoch("us")
    )
    decisions = decisions.with_columns(period=pl.col("moment").floordiv(length))
    if pointers is None:
        pointers = decisions.select("decision_id", "player_id", period=pl.col("period") - 1).join(
            rows.frame.select("player_id", "period", "row"), on=["player_id", "period"], how="left"
        )
    base = decisions.select("decision_id", "player_id").join(pointers.select("decision_id", "row"), on="decision_id", how="left", maintain_order="left")
    starts = rows.frame.group_by("player_id").agg(first=pl.col("row").min(), start=pl.col("period").min())
    placed = decisions.select("player_id", "period").join(starts, on="player_id", how="left", maintain_order="left")
    first = placed["first"].fill_null(1).to_numpy()
    # without a complete row yet, the window ends just before the player's first one
    end = base["row"].fill_null(pl.Series(first - 1)).to_numpy().copy()

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

    extra, extra_decided, partial = [rows.matrix], [rows.decided], np.full(n, -1, np.int64)
    begun = _partial_rows(platform, decisions, records.activity)
    at, size = begun["at"].to_numpy(), len(rows.matrix)
    block = np.full((len(begun), rows.matrix.shape[1]), np.nan, np.float32)
    block[:, :n_measures] = begun.select(pl.col(list(platform.state.measures)).cast(pl.Float64)).to_numpy().reshape(len(begun), n_measures)
    previous = begun["previous"].fill_null(-1).to_numpy().astype(np.int64)
    acted = previous >= 0
    block[acted, n_measures : block.shape[1] - n_objectives] = action[previous[acted]]
    block[acted, block.shape[1] - n_objectives :] = reward[previous[acted]]
    extra.append(block)
    extra_decided.append(np.where(acted, moment[previous], 0) if n else np.zeros(0, np.int64))
    partial[at] = size + np.arange(len(begun))
    size += len(begun)

    versions = _late_versions(platform, decisions, records.activity)
    whose, when = versions["at"].to_numpy(), versions["period"].to_numpy()
    window_slot = when - decisions["period"].to_numpy()[whose] + platform.state.window  # slot in a window that ends one period before
    original = first[whose] + when - placed["start"].fill_null(0).to_numpy()[whose]
    block = rows.matrix[original].copy()
    block[:, :n_measures] = versions.select(pl.col(list(platform.state.measures)).cast(pl.Float64)).to_numpy()
    extra.append(block)
    extra_decided.append(rows.decided[original])
    late = np.stack([whose, window_slot, size + np.arange(len(versions))], 1).astype(np.int64)

    proposals, law, chance = _proposal_arrays(platform, records, decisions, policies, action, policy, rows.catalogue)
    return Windows(
        platform=platform,
        catalogue=rows.catalogue,
        decision_id=decisions["decision_id"].to_list(),
        player_ids=player_ids.to_list(),
        policies=policies,
        matrix=np.concatenate(extra),
        decided=np.concatenate(extra_decided),
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
        terminated=_churned(platform, decisions, records.activity, following),
        attributes=attributes_at(platform, records.players, decisions["player_id"], decisions["decided_at"]),
    )
