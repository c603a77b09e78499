"""Sequential tests of drift and of promises kept, and what fastq brought against the holdout: all may be looked at at any time.

Two kinds, for two questions.

*Has something changed since the last retraining?* (`look`) Each hour the last 1, 3 and 7 days, always whole days so that the daily cycle cancels, are
held against the logs that the last retraining learned from. One false-alarm budget, `ALPHA` in `HORIZON` days, is spent in equal parts on every
window and test (Bonferroni: it holds however windows and tests depend on each other); what a window that moves on by the hour may spend in an hour is
less, since it mostly sees the same days again (`crossing`). So false alarms are expected in at most 5 % of 90 days for ever, and asking twice in an hour
costs nothing. The unit is the player, whose values of a window are first averaged; where days differ by more than their players explain, the days' own
spread counts instead, with Student's quantiles for how few they are.

*Does the champion bring what its promotion promised?* (`broken_promises`) The same windows, on its own decisions alone, against the lower end of what the
gate's estimator promised. Outcomes are compared with what the policy expected of the very same states and actions, which takes away what players differ
by (control variates), and all objectives are also watched together, in the combination in which "each a little worse" stands out most from chance.

*Does the champion's state still hide who acts?* (`balance_lost`) Once a day a fresh probe is taught, on players never trained on, to name the acting
policy from the balanced state, in the same windows, and held against probes of as many players in the days before the promotion.

*What is the mean of something since it began?* (`lift`, guardrails) A confidence sequence: the normal mixture of Robbins 1970 (Ann. Math. Statist. 41,
1397), made asymptotic and studentised as by Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024 (Ann. Statist. 52, arXiv:2103.06476, theorem 2.2), on
the time scale of information, 1 / standard error^2 by player, in which an accumulating mean moves like a Brownian motion although players come back
(Scharfstein, Tsiatis and Robins 1997, J. Am. Statist. Assoc. 92).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import optimize, stats

from fastq.assignment import held_out
from fastq.errors import ConfigurationError
from fastq.features import unpack_states
from fastq.platform import OWN_POLICY, Platform
from fastq.records import Parts, Records, decision_logs, read_heard, read_records, read_served, reading_log, served_log
from fastq.windows import Windows, held_out_players
from fastq.workspace import Workspace

if TYPE_CHECKING:
    from fastq.policy import Policy

Floats = NDArray[np.float64]
Family = Literal["state", "action", "propensity", "policies", "outcome", "volume", "answers", "promise", "balance"]

ALPHA, HORIZON = 0.05, 90  # false alarms expected in so many days, over all tests together
PROMISED_SHARE = 0.5  # of the budget: promises are few, and a tenth less is hard to see
TOGETHER_SHARE = 0.5  # of that: for all objectives together
WINDOWS = (1, 3, 7)  # days
DAY = timedelta(days=1)
REFERENCE_DAYS = 28  # at most, the newest
LEVEL_DAYS = 7  # the newest of them say where things stand, all of them how much a day differs from the seven before it
LEAST_DAYS, LEAST_PLAYERS = 5, 20  # below them nothing is tested
DESIGN = 1_000.0  # decisions at which a confidence sequence is narrowest
CLIP = (0.005, 0.995)  # quantiles of the reference to which values are cut: one player's record must not hide or make a finding
TOP_ITEMS = 5  # of each policy in a catalogue
MOSTLY = 0.9  # share of a window's decisions for which what was expected must be known, else outcomes are compared as they are
MOST_EXPECTED = 50_000  # decisions for which it is asked: beyond them noise is no concern
PROBE = "probe of the balanced state"
PROBE_FOLDS, MOST_PROBED = 5, 5_000  # parts of the players, of whom there are at most so many
PROBE_RIDGE = 10.0  # on 64 numbers of about unit size; few players must not be learned by heart


# ---- bounds that hold at all times -----------------------------------------------------------------------------------------
def anytime_radius(error: float, scale: float, freedom: float, level: float = 0.95) -> float:
    """Half the width of a two-sided confidence sequence around an estimate with standard error `error`.

    With n = (scale / error)^2, the information in units of one decision, and r = DESIGN / (2 ln(1/a) + ln(1 + 2 ln(1/a))), a = 1 - level:
    error * sqrt((n + r) / n * ln((n + r) / (r a^2))); then widened as Student's quantile of `freedom` is against the normal one.
    """
    if not (error > 0 and scale > 0):
        return 0.0
    alpha = 1 - level
    r = DESIGN / (2 * math.log(1 / alpha) + math.log(1 + 2 * math.log(1 / alpha)))
    n = (scale / error) ** 2
    z = math.sqrt((n + r) / n * math.log((n + r) / (r * alpha**2)))
    return error * float(_as_student(z, freedom))


def _as_student(z: float, freedom: float) -> float:
    """The quantile of Student's distribution that is passed as rarely as `z` of the normal one."""
    return float(stats.t.isf(stats.norm.sf(z), max(freedom, 1.0)))


@dataclass(frozen=True)
class Mean:
    """A mean per decision with its standard error by player. scale: standard deviation of one decision."""

    value: float
    error: float
    scale: float
    players: int
    decisions: int


def mean_by_player(values: Floats, player: NDArray[Any]) -> Mean:
    """Of decisions [N] of players [N] (any labels): sum / number, linearised, with a player's decisions as one draw."""
    _, index = np.unique(player, return_inverse=True)
    total, count = np.bincount(index, values), np.bincount(index).astype(float)
    players, decisions = len(count), len(values)
    mean = float(total.sum() / count.sum())
    residual = (total - mean * count) / count.sum()
    error = math.sqrt(float((residual**2).sum()) * players / max(players - 1, 1))
    return Mean(mean, error, float(values.std()), players, decisions)


def difference(first: Mean, second: Mean, level: float = 0.95) -> tuple[float, float, float]:
    """value, low, high of `first` less `second`, two groups of players drawn apart; the bounds hold at all times at once."""
    error = math.hypot(first.error, second.error)
    scale = math.sqrt((first.scale**2 + second.scale**2) / 2)
    parts = [(m.error**4 / max(m.players - 1, 1)) for m in (first, second)]
    freedom = error**4 / sum(parts) if sum(parts) > 0 else math.inf
    value, radius = first.value - second.value, anytime_radius(error, scale, freedom, level)
    return value, value - radius, value + radius


# ---- lift ------------------------------------------------------------------------------------------------------------------
def lift(platform: Platform, *, since: datetime | None = None, level: float = 0.95) -> dict[str, Any]:
    """What `fastq` brought per decision against the holdout: `rows: [{objective, value, low, high, players}]`, `objective` null for the weighted sum.

    By intention to treat: every player counts where chance put them, whatever was served in the end. Only decisions that fastq served count, or, where
    a platform logs its decisions itself, those of `fastq` and of the holdout's policy. Where one side has no outcome yet there are no rows, but `reasons`.
    Raises `ConfigurationError` where there is no holdout.
    """
    holdout = platform.serving.holdout
    if holdout.policy is None or holdout.share <= 0:
        raise ConfigurationError(
            "serving.holdout: there is nobody to compare with; set a share and a policy, as in {share: 0.1, policy: " + platform.policies[0] + "}"
        )
    served = read_served(platform).select("decision_id", "player_id", "decided_at")
    begin = served["decided_at"].min() if since is None else since
    decisions = read_records(platform, begin if isinstance(begin, datetime) else None).decisions
    if served.is_empty():
        own = decisions.filter(pl.col("policy") == OWN_POLICY)
        begin = own["decided_at"].min() if since is None else since
        decisions = decisions.filter(pl.col("policy").is_in([OWN_POLICY, holdout.policy]) & (pl.col("decided_at") >= begin))  # none where it is null
        first = decisions.sort("decided_at").group_by("player_id").agg((pl.col("policy").first() == holdout.policy).alias("held"))
        decisions = decisions.join(first, on="player_id")
    else:
        decisions = decisions.join(served.select("decision_id"), on="decision_id", how="semi").filter(pl.col("decided_at") >= begin)
        players = decisions.select("player_id").unique()
        held = [held_out(platform, p) for p in players["player_id"]]
        decisions = decisions.join(players.with_columns(pl.Series("held", held, pl.Boolean)), on="player_id")
    rows, reasons = lift_rows(platform, decisions, level)
    group = decisions.filter("held")["player_id"].n_unique()
    shown = begin.isoformat().replace("+00:00", "Z") if isinstance(begin, datetime) else None
    return {"policy": OWN_POLICY, "against": holdout.policy, "level": level, "since": shown, "held": group, "rows": rows, "reasons": reasons}


def lift_rows(platform: Platform, decisions: pl.DataFrame, level: float = 0.95) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of `lift` from decisions with `player_id`, `held` and the objectives; and why there are none, where there are none."""
    names = list(platform.objectives)
    weighted = pl.sum_horizontal(pl.col(n) * w for n, w in zip(names, platform.weights.tolist(), strict=True))
    whole = decisions.with_columns(pl.when(pl.all_horizontal(pl.col(n).is_not_null() for n in names)).then(weighted).alias("weighted sum"))
    rows, reasons = [], []
    for name in (*names, None):
        column = name or "weighted sum"
        known = whole.filter(pl.col(column).is_not_null())
        sides = [known.filter(side) for side in (~pl.col("held"), pl.col("held"))]
        short = [said for said, side in zip((OWN_POLICY, "the holdout"), sides, strict=True) if side["player_id"].n_unique() < 2]
        if short:
            reasons.append(f"{column}: known for fewer than two players of {' and of '.join(short)}; outcomes have to arrive first")
            continue
        means = [mean_by_player(side[column].to_numpy(), side["player_id"].to_numpy()) for side in sides]
        value, low, high = difference(means[0], means[1], level)
        rows.append({"objective": name, "value": value, "low": low, "high": high, "players": sum(m.players for m in means)})
    return rows, reasons


# ---- what is watched -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """What the reference says of values before they are averaged: where they are cut, their middle, and for propensities of the actions' usual place."""

    low: float = -math.inf
    high: float = math.inf
    middle: float = 0.0
    spread: float = 1.0


@dataclass(frozen=True)
class Moments:
    """Of one test in one window: mean over players of their means, its variance by player (for counts: the count), and how many players."""

    mean: float
    variance: float
    players: int


@dataclass(frozen=True)
class Watched:
    """One test's reference. days: mean of each day, the newest first; daily: mean variance of a day's mean by player.

    mean, error: of the newest `LEVEL_DAYS` days, with its standard error by player. day_variance, drift: see `habits`.
    """

    family: Family
    mean: float
    error: float
    days: list[float]
    daily: float
    day_variance: float
    drift: float


@dataclass(frozen=True)
class Found:
    """One finding. z: standard errors off; p: how rarely chance alone goes so far."""

    key: str
    family: Family
    window: int
    was: float
    now: float
    z: float
    p: float
    players: int


def long_values(platform: Platform, read: Records, until: Reached, days: int, shapes: Mapping[str, Shape]) -> pl.DataFrame:
    """`key, family, day, player_id, value`: what each player did on each of the `days` whole days before its log ends (day 0 is the last), cut.

    Without `shapes` the values are as they are, and the tests that compare with a middle are missing.
    """
    frames = [_of_decisions(platform, _days(read.decisions, "decided_at", until.decisions, days), shapes)]
    if read.activity is not None and platform.state.measures:
        frames.append(_of_activity(platform, _days(read.activity, "occurred_at", until.activity, days)))
    values = pl.concat(frames).group_by("key", "family", "day", "player_id").agg(pl.col("value").mean())
    if not shapes:
        return values
    ends = {"key": list(shapes), **{name: [getattr(shape, name) for shape in shapes.values()] for name in ("low", "high", "middle")}}
    cut = values.join(pl.DataFrame(ends), on="key", how="left")
    cut = cut.with_columns(pl.col("value").clip(pl.col("low").fill_null(-math.inf), pl.col("high").fill_null(math.inf)))
    apart = pl.col("value") - pl.col("middle").fill_null(0.0)
    states = cut.filter(pl.col("family") == "state").with_columns(key="spread of " + pl.col("key"), value=apart.abs())
    return pl.concat([cut, states]).select(values.columns)


def _days(frame: pl.DataFrame | Parts, column: str, until: datetime, days: int) -> pl.DataFrame:
    found = frame.filter((pl.col(column) < until) & (pl.col(column) >= until - days * DAY))
    inside = found.collect() if isinstance(found, Parts) else found
    return inside.with_columns(((pl.lit(until) - pl.col(column) - pl.duration(microseconds=1)).dt.total_days()).cast(pl.Int32).alias("day"))


def _of_activity(platform: Platform, events: pl.DataFrame) -> pl.DataFrame:
    how = {"sum": pl.Expr.sum, "mean": pl.Expr.mean, "min": pl.Expr.min, "max": pl.Expr.max, "last": pl.Expr.last, "count": pl.Expr.count}
    daily = events.group_by("day", "player_id").agg(how[m.aggregate](pl.col(n)).cast(pl.Float64).alias(n) for n, m in platform.state.measures.items())
    return _long(daily, list(platform.state.measures), "state", "")


def _of_decisions(platform: Platform, decisions: pl.DataFrame, shapes: Mapping[str, Shape]) -> pl.DataFrame:
    base = decisions.filter(pl.col("policy") != OWN_POLICY)
    frames = []
    for policy in platform.policies:
        acted = base.filter(pl.col("policy") == policy)
        if platform.dimension_names:
            frames.append(_long(acted, platform.dimension_names, "action", f"{policy}: "))
            frames.append(_agreement(platform, acted, policy, shapes))
        else:
            known = [k.removeprefix(f"{policy}: item ") for k in shapes if k.startswith(f"{policy}: item ")]
            items = known or acted["item_id"].value_counts(sort=True)["item_id"].head(TOP_ITEMS).to_list()
            shares = acted.with_columns((pl.col("item_id") == item).cast(pl.Float64).alias(f"item {item}") for item in items)
            frames.append(_long(shares, [f"item {item}" for item in items], "action", f"{policy}: "))
        propensity = acted.filter(pl.col("propensity").is_not_null()).with_columns(pl.col("propensity").log().alias("log propensity"))
        frames.append(_long(propensity, ["log propensity"], "propensity", f"{policy}: "))
        frames.append(_long(acted, list(platform.objectives), "outcome", f"{policy}: "))
    share = base.with_columns((pl.col("policy") == policy).cast(pl.Float64).alias(policy) for policy in platform.policies)
    frames.append(_long(share, platform.policies, "policies", "share of "))
    return pl.concat(frames)


def _agreement(platform: Platform, acted: pl.DataFrame, policy: str, shapes: Mapping[str, Shape]) -> pl.DataFrame:
    """Whether unlikely actions are logged with small propensities: the product of an action's distance from the policy's usual one and its log propensity.

    Propensities that belong to other decisions keep their distribution; this is where they show.
    """
    names, law = platform.dimension_names, shapes.get(f"{policy}: log propensity")
    if law is None or any(f"{policy}: {n}" not in shapes for n in names):
        return _long(acted.head(0).with_columns(pl.lit(0.0).alias("agreement")), ["agreement"], "propensity", f"{policy}: ")
    off = sum(((pl.col(n) - shapes[f"{policy}: {n}"].middle) / shapes[f"{policy}: {n}"].spread).clip(-3, 3) ** 2 for n in names) / len(names)
    seen = ((pl.col("propensity").log() - law.middle) / law.spread).clip(-3, 3)
    both = acted.filter(pl.col("propensity").is_not_null()).with_columns((seen * (off - 1)).alias("agreement"))
    return _long(both, ["agreement"], "propensity", f"{policy}: ")


def _long(frame: pl.DataFrame, names: list[str], family: Family, prefix: str) -> pl.DataFrame:
    columns = [pl.col(n).cast(pl.Float64) for n in names]
    long = frame.select("day", pl.col("player_id").cast(pl.String), *columns).unpivot(
        index=["day", "player_id"], on=names, variable_name="key", value_name="value"
    )
    kept = long.filter(pl.col("value").is_finite())
    return kept.select(pl.lit(prefix).add(pl.col("key")).alias("key"), pl.lit(family).alias("family"), "day", "player_id", "value")


def volumes(read: Records, until: datetime, days: int) -> dict[str, list[float]]:
    """Decisions and active players of each of the `days` whole days before `until`, the last one first."""
    found = {}
    for key, frame, column, count in (
        ("decisions a day", read.decisions, "decided_at", pl.len()),
        ("active players a day", read.activity, "occurred_at", pl.col("player_id").n_unique()),
    ):
        if frame is not None and frame.height:
            by_day = dict(_days(frame, column, until, days).group_by("day").agg(count.alias("n")).select("day", "n").iter_rows())
            found[key] = [float(by_day.get(day, 0)) for day in range(days)]
    return found


# ---- the reference ---------------------------------------------------------------------------------------------------------
def reference_of(platform: Platform, read: Records, like: Reached | None = None) -> tuple[dict[str, Watched], dict[str, Shape]]:
    """What the logs of a retraining look like, day by day; tests for which they say too little are left out.

    Days end at the hours of `like`: what a player does in a day depends on where the day is cut.
    """
    until = reached(read)
    if until is None:
        return {}, {}
    until = until.at_hours_of(like or until)
    begun = read.decisions["decided_at"].min()
    days = min(REFERENCE_DAYS, (until.full - begun) // DAY) if isinstance(begun, datetime) else 0
    raw = long_values(platform, read, until, max(days, 1), {})
    by_key = raw.group_by("key").agg(
        pl.col("value").quantile(CLIP[0]).alias("low"),
        pl.col("value").quantile(CLIP[1]).alias("high"),
        pl.col("value").median().alias("middle"),
        pl.col("value").std().alias("spread"),
    )
    indicator = raw.group_by("key").agg(pl.col("value").is_in([0.0, 1.0]).all().alias("flag"))  # shares are not cut
    shapes = {
        row["key"]: Shape(-math.inf if row["flag"] else row["low"], math.inf if row["flag"] else row["high"], row["middle"], max(row["spread"] or 0.0, 1e-9))
        for row in by_key.join(indicator, on="key").iter_rows(named=True)
    }
    values = long_values(platform, read, until, max(days, 1), shapes)
    watched = {}
    for (key, family), part in values.group_by("key", "family"):
        if (made := _watched(part, family)) is not None:
            watched[str(key)] = made
    for key, counts in volumes(read, until.full, days).items():
        if days >= LEAST_DAYS:
            level = counts[:LEVEL_DAYS]
            mean = float(np.mean(level))
            watched[key] = Watched("volume", mean, math.sqrt(mean / len(level)), counts, mean, *map(float, habits(counts)))
    return watched, {key: shape for key, shape in shapes.items() if key in watched}


def _watched(part: pl.DataFrame, family: Any) -> Watched | None:
    daily = part.group_by("day").agg(pl.col("value").mean().alias("mean"), pl.col("value").var().alias("variance"), pl.len().alias("n"))
    daily = daily.filter((pl.col("n") >= LEAST_PLAYERS) & pl.col("variance").is_not_null()).sort("day")
    if daily.height < LEAST_DAYS:
        return None
    level = moments(part.filter(pl.col("day").is_in(daily["day"].head(LEVEL_DAYS).implode())))
    each = float((daily["variance"] / daily["n"]).mean() or 0.0)  # type: ignore[arg-type]  # of floats it is one
    days = daily["mean"].to_list()
    return Watched(family, level.mean, math.sqrt(level.variance), days, each, *map(float, habits(days)))


def habits(days: Any) -> tuple[Floats, Floats]:
    """(variance of a day, drift) of daily means [..., R], the newest first.

    The variance is that of a day about the mean of the `LEVEL_DAYS` before it, less what that mean adds: what moves slowly is no noise. The drift is the
    slope per day of a straight line through all of them, 0 where it says no more than chance would (1 %).
    """
    values = np.asarray(days, float)
    count = values.shape[-1]
    if count >= LEVEL_DAYS + LEAST_DAYS:
        sums = np.cumsum(values, axis=-1)
        before = (sums[..., LEVEL_DAYS:] - sums[..., :-LEVEL_DAYS]) / LEVEL_DAYS
        variance = np.square(values[..., : count - LEVEL_DAYS] - before).mean(-1) / (1 + 1 / LEVEL_DAYS)
    else:
        variance = values.var(-1, ddof=1)
    at = np.arange(count) - (count - 1) / 2
    slope = (values * at).sum(-1) / (at**2).sum()
    rest = np.square(values - values.mean(-1, keepdims=True) - slope[..., None] * at).sum(-1)
    error = np.sqrt(np.maximum(rest / (count - 2) / (at**2).sum(), 1e-300))
    return variance, np.where(np.abs(slope) > error * float(stats.t.isf(0.005, count - 2)), np.abs(slope), 0.0)


def moments(part: pl.DataFrame) -> Moments:
    """Of one test's player-days in one window; a player's days are one draw."""
    mine = part.group_by("player_id", maintain_order=True).agg(pl.col("value").sum(), pl.len().alias("n"))  # the last bit of a sum depends on its order
    total, count = mine["value"].to_numpy(), mine["n"].to_numpy().astype(float)
    players = len(mine)
    if players < 2:
        return Moments(math.nan, math.inf, players)
    mean = float(total.sum() / count.sum())
    return Moments(mean, float(np.square((total - mean * count) / count.sum()).sum()) * players / (players - 1), players)


@dataclass(frozen=True)
class Reached:
    """How far the logs reach. decisions, activity: the end of the hour of the newest row; full: the last hour that all logs have certainly reached whole."""

    decisions: datetime
    activity: datetime
    full: datetime

    def at_hours_of(self, like: Reached) -> Reached:
        """No later than this, at the hours of the day of `like`."""
        pairs = ((self.decisions, like.decisions), (self.activity, like.activity), (self.full, like.full))
        return Reached(*(mine - (mine - theirs) % DAY for mine, theirs in pairs))


def reached(read: Records) -> Reached | None:
    """None where there are no decisions. Windows end where the logs do, not now: many come by the day.

    What fastq serves is there at once, so it doesn't say how far the platform's own logs have come, unless they have ended because it decides everything.
    """
    newest = read.decisions["decided_at"].max()
    if not isinstance(newest, datetime):
        return None
    others = read.decisions.filter(pl.col("policy") != OWN_POLICY)["decided_at"].max()
    if isinstance(others, datetime) and newest - others <= max(WINDOWS) * DAY:
        newest = others
    acted = read.activity.select(pl.col("occurred_at").max()).item() if read.activity is not None else None
    ends = [newest, acted if isinstance(acted, datetime) else newest]
    hours = [moment.replace(minute=0, second=0, microsecond=0) for moment in ends]
    return Reached(hours[0] + timedelta(hours=1), hours[1] + timedelta(hours=1), min(hours))


def as_exported(platform: Platform, read: Records) -> Records:
    """`read` as far as the platform's own exports reach, where part of its logs came over HTTP and was there before them.

    Else the last days would seem to lack what was only not exported yet, and nobody would miss exports that have stopped arriving. Exports that every
    window has left behind have ended for good: all comes over HTTP by then.
    """
    served, heard = read_served(platform).select("decision_id"), read_heard(platform, {}).select("player_id", "occurred_at")
    decisions, activity = read.decisions, read.activity
    others = decisions.join(served, on="decision_id", how="anti")["decided_at"].max()
    if (end := _end_of_exports(decisions["decided_at"].max(), others)) is not None:
        decisions = decisions.filter(pl.col("decided_at") <= end)
    if activity is not None and len(heard):
        newest = activity.select(pl.col("occurred_at").max()).item()
        recent = activity.filter(pl.col("occurred_at") >= newest - max(WINDOWS) * DAY).select("player_id", "occurred_at")
        if (end := _end_of_exports(newest, recent.join(heard, on=["player_id", "occurred_at"], how="anti")["occurred_at"].max())) is not None:
            activity = activity.filter(pl.col("occurred_at") <= end)
    return replace(read, decisions=decisions, activity=activity)


def _end_of_exports(newest: Any, exported: Any) -> datetime | None:
    """Where exports end, if what came over HTTP is newer, though not by more than the longest window."""
    if isinstance(newest, datetime) and isinstance(exported, datetime) and timedelta(0) < newest - exported <= max(WINDOWS) * DAY:
        return exported
    return None


# ---- the tests -------------------------------------------------------------------------------------------------------------
def surprise(watched: Watched, now: Moments, window: int) -> tuple[float, float]:
    """(z, p): standard errors between a window of whole days and the reference, and how rarely (two-sided) chance goes so far."""
    w = watched
    z, p = surprises(w.mean, w.error, w.daily, w.day_variance, w.drift, len(w.days), now.mean, now.variance, now.players, window)
    return float(z), float(p)


def surprises(
    mean: Any, error: Any, daily: Any, day_variance: Any, drift: Any, days: int, now_mean: Any, now_variance: Any, players: Any, window: int
) -> tuple[Floats, Floats]:
    """`surprise` of arrays: of `Watched` and `Moments`."""
    freedom = days - LEVEL_DAYS if days >= LEVEL_DAYS + LEAST_DAYS else days - 1
    # days that differ by more than their players explain: then the days are the sample
    by_day = day_variance > daily * float(stats.chi2.isf(0.01, freedom)) / freedom
    level = min(days, LEVEL_DAYS)
    variance = np.where(
        by_day, np.maximum(day_variance / window, now_variance) + np.maximum(day_variance / level, np.square(error)), now_variance + np.square(error)
    )
    variance = variance + np.square(drift * (level + window + 1) / 2)  # what was moving already has moved on since the middle of the level
    known = np.isfinite(variance) & np.isfinite(now_mean)
    z = np.where(known, now_mean - mean, 0.0) / np.sqrt(np.where(known, np.maximum(variance, 1e-300), 1.0))
    return z, 2 * stats.t.sf(np.abs(z), np.where(by_day, freedom, np.maximum(players - 1.0, 1.0)))


def crossing(z: float, window: int) -> float:
    """How likely chance alone takes the standardised mean of a window of whole days, looked at hourly for `HORIZON` days, above `z` at least once.

    The tail of a Gaussian process whose correlation falls from 1 like 1 - |t| / window, for looks that lie apart (Feingold, Brown and Siegmund 1993, Am.
    J. Hum. Genet. 53, 234, equation 3; exact to some percent for z above 3), and no more than all looks would give as if they had nothing in common.
    """
    step = z * math.sqrt(2 / (24 * window))
    half = float(stats.norm.cdf(step / 2))
    apart = (2 / step) * (half - 0.5) / (step / 2 * half + float(stats.norm.pdf(step / 2)))
    tail = float(stats.norm.sf(z))
    return min(tail + HORIZON / window * z * float(stats.norm.pdf(z)) * apart, 24 * HORIZON * tail)


@functools.lru_cache(maxsize=1024)
def largest(budget: float, window: int) -> float:
    """The one-sided p below which a window may be called a finding in any hour, so that chance does so in at most `budget` of `HORIZON` days."""
    return float(stats.norm.sf(optimize.brentq(lambda z: math.log(crossing(z, window)) - math.log(budget), 1.0, 12.0)))


def allowed(tests: int, window: int) -> float:
    """The two-sided p below which one of so many tests of one window is a finding: its part of the budget."""
    return 2 * largest(ALPHA * (1 - PROMISED_SHARE) / (2 * len(WINDOWS) * max(tests, 1)), window)


def look(platform: Platform, read: Records, watched: Mapping[str, Watched], shapes: Mapping[str, Shape], after: datetime) -> list[Found]:
    """What has changed: each test on the last days of `read`, the clearest window of each finding; none until they reach past `after`.

    The budget is that of one test more: `balance_lost`.
    """
    until = reached(read)
    if until is None or max(until.decisions, until.activity) <= after:
        return []
    found = []
    values = long_values(platform, read, until, max(WINDOWS), shapes)
    counts = volumes(read, until.full, max(WINDOWS))
    parts = {str(key[0]): part for key, part in values.group_by("key")}
    for key, reference in watched.items():
        best: Found | None = None
        for window in WINDOWS:
            if reference.family == "volume":
                mean = float(np.mean(counts[key][:window])) if key in counts else 0.0
                now = Moments(mean, max(mean, reference.mean) / window, 10**6)
            else:
                part = parts.get(key)
                now = moments(part.filter(pl.col("day") < window)) if part is not None else Moments(math.nan, math.inf, 0)
                if now.players < LEAST_PLAYERS:
                    continue
            z, p = surprise(reference, now, window)
            if p < allowed(len(watched) + 1, window) and (best is None or p < best.p):
                best = Found(key, reference.family, window, reference.mean, now.mean, z, p, now.players)
        found += [best] if best is not None else []
    return found


# ---- promises --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Promise:
    """What a promotion promised of the mean immediate outcome per decision, in a combination of which less is worse.

    weights: of the objectives in it, by name. value, low: estimate and lower end of the combination's mean under the policy as served.
    beyond: lower end of its mean less what the policy itself expects of the decisions' states and actions; None where that is not known.
    share: of the budget of all promises.
    """

    name: str
    weights: dict[str, float]
    value: float
    low: float
    beyond: float | None
    share: float


TOGETHER = "all objectives together"


def combinations(platform: Platform, outcomes: Floats, beyond: Floats) -> dict[str, dict[str, float]]:
    """What is promised, by name: weights of the objectives in each. outcomes, beyond: [N, M] immediate outcomes, and those less what was expected.

    Each objective and the weighted sum; and, where there are several, all of them in the direction in which a shortfall of the same share of each
    stands out most from chance, Fisher's discriminant: S^-1 d with S the covariance of `beyond` and d the mean outcomes, no weight of the wrong sign.
    Objectives that are known only later than others, and add less than a tenth to what is seen, are left out of that: it would have to wait for them.
    """
    names = list(platform.objectives)
    signs = np.where(platform.weights >= 0, 1.0, -1.0)
    found = {name: {name: float(sign)} for name, sign in zip(names, signs, strict=True)}
    found["weighted sum"] = dict(zip(names, platform.weights.tolist(), strict=True))
    beyond = beyond if np.isfinite(beyond).any() else outcomes
    whole = np.isfinite(beyond).all(1) & np.isfinite(outcomes).all(1)
    if len(names) < 2 or whole.sum() < LEAST_PLAYERS:
        return found
    shortfall = np.abs(outcomes[whole].mean(0))
    covariance = np.cov(beyond[whole] * signs, rowvar=False) + 1e-9 * np.eye(len(names))

    def direction(kept: NDArray[np.bool_]) -> tuple[Floats, float]:
        weights = np.zeros(len(names))
        weights[kept] = np.linalg.solve(covariance[np.ix_(kept, kept)], shortfall[kept])
        weights = np.maximum(weights, 0.0)
        return weights, float((weights @ shortfall) ** 2 / max(weights @ covariance @ weights, 1e-300))

    best, clear = direction(np.ones(len(names), bool))
    for wait in np.unique(platform.known_after):
        weights, seen = direction(platform.known_after <= wait)
        if seen >= 0.9 * clear:
            best = weights
            break
    if best.any():
        scaled = best * signs / np.abs(best).max()
        found[TOGETHER] = {name: float(weight) for name, weight in zip(names, scaled, strict=True) if weight}
    return found


def shares(names: Iterable[str]) -> dict[str, float]:
    """How the promises' budget is spent."""
    every = list(names)
    rest = [name for name in every if name != TOGETHER]
    first = TOGETHER_SHARE if TOGETHER in every else 0.0
    return {name: first if name == TOGETHER else (1 - first) / len(rest) for name in every}


def broken_promises(decisions: pl.DataFrame, promises: Iterable[Promise]) -> list[Found]:
    """Outcomes of one version's own decisions (all of them since it was promoted) that are worse than its promotion promised.

    decisions: `player_id`, `decided_at`, the objectives and, where it is known, what the policy expects of each: `with_expected`.
    """
    found: list[Found] = []
    for promise in promises:
        parts = [pl.sum_horizontal(pl.col(f"{of}{name}") * weight for name, weight in promise.weights.items()) for of in ("", "expected ")]
        there = all(f"expected {name}" in decisions.columns for name in promise.weights) and promise.beyond is not None
        known = decisions.filter(pl.all_horizontal(pl.col(name).is_not_null() for name in promise.weights))
        known = known.select("player_id", "decided_at", value=parts[0], expected=parts[1] if there else pl.lit(None, pl.Float64))
        newest = known["decided_at"].max()
        best: Found | None = None
        for window in WINDOWS:
            if not isinstance(newest, datetime):
                break
            until = newest.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)  # windows move on by the hour
            recent, bound, shift = known.filter(pl.col("decided_at") >= until - window * DAY), promise.low, 0.0
            told = recent.filter(pl.col("expected").is_finite())
            if promise.beyond is not None and len(told) >= MOSTLY * len(recent):
                shift = float(told["expected"].mean() or 0.0)  # type: ignore[arg-type]  # of floats it is one
                recent, bound = told.with_columns(value=pl.col("value") - pl.col("expected")), promise.beyond
            now = moments(recent.select("player_id", "value"))
            if now.players < LEAST_PLAYERS or not now.variance > 0:
                continue
            z = (now.mean - bound) / math.sqrt(now.variance)
            p = float(stats.t.cdf(z, now.players - 1))
            if p < largest(ALPHA * PROMISED_SHARE * promise.share / len(WINDOWS), window) and (best is None or p < best.p):
                sign = -1.0 if list(promise.weights.values()) == [-1.0] else 1.0  # of what weighs against, more is worse, and is shown as more
                best = Found(f"promised {promise.name}", "promise", window, sign * (bound + shift), sign * (now.mean + shift), sign * z, p, now.players)
        found += [best] if best is not None else []
    return found


def with_expected(platform: Platform, policy: Policy, decisions: pl.DataFrame) -> pl.DataFrame:
    """The decisions, with `expected NAME`: what `policy` expects at once of the action that was carried out, in the state that it saw.

    Null for decisions whose state was not kept, for those that no window reaches any more, and for all but the newest `MOST_EXPECTED`.
    """
    newest = [decisions.filter(pl.col(name).is_not_null())["decided_at"].max() for name in platform.objectives]
    reached = [moment for moment in newest if isinstance(moment, datetime)]
    since = min(reached) - (max(WINDOWS) + 1) * DAY if reached else datetime.max.replace(tzinfo=UTC)
    asked = decisions.filter(pl.col("decided_at") >= since).sort("decided_at").tail(MOST_EXPECTED)
    seen = served_states(platform, since).join(asked, on="decision_id") if len(asked) else asked
    action = ["item_id"] if policy.catalogue is not None else platform.dimension_names
    seen = seen.filter(pl.all_horizontal(pl.col(name).is_not_null() for name in action))
    names = [f"expected {name}" for name in platform.objectives]
    if seen.is_empty():
        return decisions.with_columns(pl.lit(None, pl.Float64).alias(name) for name in names)
    states = unpack_states(platform, seen["state"].to_list())
    actions = policy.as_actions(seen["item_id"].to_list()) if policy.catalogue is not None else seen.select(action).to_numpy()
    expected = policy.parts(policy.encode(states), np.asarray(actions, float)[:, None])[:, 0, :, 0]
    told = seen.select("decision_id").with_columns(pl.Series(name, expected[:, m]) for m, name in enumerate(names))
    return decisions.join(told, on="decision_id", how="left")


def served_states(platform: Platform, since: datetime) -> pl.DataFrame:
    """`decision_id, state` (see `features.pack_states`) of what was served since a moment, where the state was kept."""
    found = [pl.DataFrame(schema={"decision_id": pl.String(), "state": pl.Binary()})]
    query = f"select decision_id, state from decisions where state is not null and decided_at >= {int(since.timestamp() * 1_000_000)}"  # noqa: S608 - a number
    for path in decision_logs(platform):
        with reading_log(path) as database:
            found.append(pl.read_database(query, database, schema_overrides=found[0].schema, infer_schema_length=None))
    for path in sorted(Workspace(platform.root).served.glob("[!.]*.parquet")):
        if {"state", "decided_at"} <= set(pl.read_parquet_schema(path)):
            batch = pl.scan_parquet(path).filter((pl.col("decided_at") >= since) & pl.col("state").is_not_null())
            found.append(batch.select(pl.col("decision_id").cast(pl.String), "state").collect())
    return pl.concat(found).unique("decision_id", keep="first")


# ---- balance ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Probe:
    """How well fresh probes name the acting policy from the balanced state, each taught and asked on one window of days, mean over the windows.

    accuracy: balanced, 1 / policies is chance. variance: by player, with what the probes owe to the luck of what they were taught on. players: least of
    the windows. policies: whom they told apart. each: the accuracy of each window, the newest first.
    """

    accuracy: float
    variance: float
    players: int
    policies: list[str]
    each: list[float]


def probe(state: NDArray[Any], label: NDArray[Any], player: NDArray[Any], policies: list[str], windows: list[NDArray[np.bool_]]) -> Probe | None:
    """Of decisions: state [N, Z], label [N] index into policies, player [N] index; windows [N] each. None where a policy acted too seldom in one of them.

    Ridge classifiers on four parts of the players in five are asked about the fifth. Accuracies of such parts are not independent: their variance is
    multiplied by 1 + 5 / 4 (Nadeau and Bengio 2003, Mach. Learn. 52, 239).
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GroupKFold, cross_val_predict

    each, least = [], len(player)
    shortfall = np.zeros(int(player.max(initial=0)) + 1)
    for inside in windows:
        x, y, who = state[inside], label[inside], player[inside]
        acted = [len(np.unique(who[y == k])) for k in range(len(policies))]
        if len(policies) < 2 or min(acted) < LEAST_PLAYERS:
            return None
        said = cross_val_predict(RidgeClassifier(alpha=PROBE_RIDGE, class_weight="balanced"), x, y, groups=who, cv=GroupKFold(PROBE_FOLDS))
        right, count = (said == y).astype(float), np.bincount(y)
        of_policy = np.bincount(y, right) / count
        each.append(float(of_policy.mean()))
        least = min(least, len(np.unique(who)))
        shortfall += np.bincount(who, (right - of_policy[y]) / count[y], len(shortfall)) / (len(policies) * len(windows))
    luck = 1 + PROBE_FOLDS / (PROBE_FOLDS - 1)
    return Probe(float(np.mean(each)), luck * float((shortfall**2).sum()) * least / max(least - 1, 1), least, policies, each)


def probes_before(policy: Policy, data: Windows, until: datetime) -> dict[int, Probe]:
    """By window: what probes of so many days found in the last `LEVEL_DAYS` before `until`, midnight; a window is missing where there is too little."""
    state, label, player, day, policies = _states_of(policy, data, until, LEVEL_DAYS)
    pieces = {window: [(day >= start) & (day < start + window) for start in range(0, LEVEL_DAYS - window + 1, window)] for window in WINDOWS}
    found = {window: probe(state, label, player, policies, inside) for window, inside in pieces.items()}
    return {window: each for window, each in found.items() if each is not None}


def _states_of(
    policy: Policy, data: Windows, until: datetime, days: int, most: int = MOST_PROBED
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], list[str]]:
    """Balanced state, acting policy, player and day (0 is the last before `until`) of the behaviour policies' decisions by players never trained on."""
    from fastq import evaluation

    platform = policy.platform
    day = (int(until.timestamp() * 1e6) - 1 - data.moment) // int(DAY.total_seconds() * 1e6)
    names = [name for name in platform.policies if name in data.policies]
    places = np.array([names.index(name) if name in names else -1 for name in data.policies], int)
    among = probed_players(platform, data.player_ids, most)
    rows = np.flatnonzero(among[data.player] & (places[data.policy] >= 0) & (day >= 0) & (day < days))
    state = evaluation.situations(policy, data, rows).b.double().numpy() if len(rows) else np.zeros((0, 1))
    return state, places[data.policy[rows]], data.player[rows], day[rows], names


def probed_players(platform: Platform, player_ids: list[str], most: int = MOST_PROBED) -> NDArray[np.bool_]:
    """[P] the players whom training never saw, at most so many of them, the same ones each time; of all players where those are too few."""
    training = platform.training
    out: NDArray[np.bool_] = held_out_players(player_ids, training.holdout, training.seed)
    out = out if out.sum() >= 2 * LEAST_PLAYERS else np.ones_like(out)
    return out & held_out_players(player_ids, min(1.0, most / max(int(out.sum()), 1)), training.seed + 1)


def balance_lost(policy: Policy, data: Windows, before: Mapping[int, Probe], since: datetime, until: datetime, tests: int) -> Found | None:
    """Whether fresh probes of the days from `since` on, up to `until`, both midnights, name the acting policy better than those before the promotion.

    Of the drift tests' budget it spends the part of one of so many `tests`, in equal parts on the windows and on the days of `HORIZON`, since it looks
    once a day. As many players as before at most: a probe that is taught on more knows more.
    """
    most = max((each.players for each in before.values()), default=0)
    state, label, player, day, policies = _states_of(policy, data, until, max(WINDOWS), most)
    best: Found | None = None
    for window, was in before.items():
        now = probe(state, label, player, policies, [day < window]) if until - window * DAY >= since and policies == was.policies else None
        if now is None:
            continue
        z = (now.accuracy - was.accuracy) / math.sqrt(max(now.variance + was.variance, 1e-12))
        p = float(stats.t.sf(z, now.players - 1))
        if p < balance_allowed(tests) and (best is None or p < best.p):
            best = Found(PROBE, "balance", window, was.accuracy, now.accuracy, z, p, now.players)
    return best


def balance_allowed(tests: int) -> float:
    """The one-sided p below which a daily probe of one window is a finding, beside so many tests of drift."""
    return ALPHA * (1 - PROMISED_SHARE) / (max(tests, 1) * len(WINDOWS) * HORIZON)


# ---- guardrails and answers ------------------------------------------------------------------------------------------------
def broken_guardrails(platform: Platform, decisions: pl.DataFrame, level: float = 0.98) -> list[dict[str, Any]]:
    """Ceilings and floors that the mean of these decisions, looked at at any time, has certainly passed: the bound of its confidence sequence is beyond."""
    found = []
    for name, objective in platform.objectives.items():
        known = decisions.filter(pl.col(name).is_not_null())
        if (objective.ceiling is None and objective.floor is None) or known["player_id"].n_unique() < LEAST_PLAYERS:
            continue
        mean = mean_by_player(known[name].to_numpy(), known["player_id"].to_numpy())
        radius = anytime_radius(mean.error, mean.scale, mean.players - 1, level)
        said = {"objective": name, "value": mean.value, "low": mean.value - radius, "high": mean.value + radius, "decisions": mean.decisions}
        if objective.ceiling is not None and mean.value - radius > objective.ceiling:
            found.append({**said, "bound": "ceiling", "limit": objective.ceiling})
        if objective.floor is not None and mean.value + radius < objective.floor:
            found.append({**said, "bound": "floor", "limit": objective.floor})
    return found


def degraded_answers(platform: Platform, after: datetime, until: datetime) -> tuple[int, int, int]:
    """(answers, unknown players, degraded answers) that were served between two moments."""
    log = served_log(platform, "decisions", {"detail": pl.String()})
    inside = log.with_columns(pl.from_epoch("decided_at", time_unit="us").dt.replace_time_zone("UTC")).filter(pl.col("decided_at").is_between(after, until))
    why = inside["detail"].str.json_path_match("$.degraded").fill_null("")
    held = why.str.starts_with("held out")
    return inside.height, int(why.str.starts_with("unknown player").sum()), int(((why != "") & ~held).sum())


SAYS: dict[Family, str] = {
    "state": "players' {key} a day",
    "action": "what a policy does has changed: {key}",
    "propensity": "propensities do not look like those learned from: {key}",
    "policies": "who decides has changed: {key}",
    "outcome": "what follows has changed: {key}",
    "volume": "{key}",
    "answers": "{key}",
    "promise": "the champion does not keep what was promised: {key}",
    "balance": "the champion's state tells again which policy acts: {key}, accuracy",
}


def sentence(found: Found) -> str:
    """One finding for people."""
    span = "the last day" if found.window == 1 else f"the last {found.window} days"
    against = "at worst" if found.family == "promise" else "before"
    return f"{SAYS[found.family].format(key=found.key)}: {found.now:.4g} in {span}, {found.was:.4g} {against} ({found.z:+.1f} standard errors)"


def as_json(watched: Mapping[str, Watched], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """A reference as JSON has it; without infinities."""
    kept = {key: {n: (v if math.isfinite(v) else None) for n, v in asdict(shape).items()} for key, shape in shapes.items()}
    return {"watched": {key: asdict(w) for key, w in watched.items()}, "shapes": kept}


def from_json(tree: Mapping[str, Any]) -> tuple[dict[str, Watched], dict[str, Shape]]:
    """What `as_json` wrote."""
    watched = {key: Watched(**w) for key, w in tree["watched"].items()}
    ends = {"low": -math.inf, "high": math.inf}
    return watched, {key: Shape(**{n: (ends[n] if v is None else v) for n, v in s.items()}) for key, s in tree["shapes"].items()}
