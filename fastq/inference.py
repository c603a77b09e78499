"""A first `fastq.yaml` from somebody's own logs, with the reason beside each guess.

What cannot be guessed is asked for by name: an error says which option of `fastq init` settles it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from fastq.errors import ConfigurationError, LogsError
from fastq.platform import FILE_NAME, OWN_POLICY, RESERVED_COLUMNS, format_duration, platform_from_tree
from fastq.sources import Kind, naming, parsed, scans

# Words of a column's name. They decide only where the numbers leave it open; each use is marked in the file.
OBJECTIVE = (
    r"rewards?|revenues?|returns?|returned|clicks?|clicked|conversions?|converted|costs?|spend|spent|profits?|margins?|ltv|gmv|engage\w*|dwell|ratings?"
    r"|satisf\w*|retention|retained|churn\w*|purchase[sd]?|orders?|ordered|outcomes?|complain\w*|refund\w*|watched|completed"
)
ACTION = r"actions?|bonus\w*|prices?|discounts?|targets?|goals?|limits?|offers?|budgets?|bids?|doses?|thresholds?|frequency|amounts?|gifts?|levels?"
HARM = r"costs?|expenses?|loss|losses|churn\w*|complain\w*|refund\w*|unsubscribe\w*|penalty|penalties"
LEVEL = r"rates?|ratios?|shares?|means?|avg|averages?|levels?|mood|scores?|balances?|ratings?|prices?|ages?|temperatures?|prob\w*|percent\w*|pct|index"
PERIODS = [timedelta(minutes=15), timedelta(hours=1), timedelta(hours=6), timedelta(hours=12), timedelta(days=1), timedelta(weeks=1)]
STEPS = [100, 50, 25, 20, 10, 5, 2, 1, 0.5, 0.25, 0.1]  # grids that people choose, in an action's own unit
# Columns with reserved names that each log has of its own; elsewhere they are left out, and the file says so.
OWN_COLUMNS = {
    "decisions": {"decision_id", "player_id", "decided_at", "policy", "propensity", "assignment", "model_version", "item_id"},
    "activity": {"player_id", "occurred_at", "recorded_at"},
    "players": {"player_id", "valid_from"},
    "proposals": {"decision_id", "policy", "propensity", "assignment", "item_id"},
    "items": {"item_id"},
}
PARSED_SHARE = 0.99  # of a text column's values that must be numbers for it to be a column of numbers


@dataclass(frozen=True)
class Log:
    """A log as `fastq init` got it: its path relative to the workspace, its columns in canonical types, and each one's kind."""

    option: str
    path: str
    frame: pl.DataFrame
    kinds: dict[str, Kind]

    def reserved(self) -> list[str]:
        """Columns whose names mean something else to fastq, so that they can be no measure, attribute, action or objective."""
        return [c for c in self.frame.columns if c in RESERVED_COLUMNS and c not in OWN_COLUMNS[self.option.removeprefix("--")]]

    def numbers(self) -> list[str]:
        return [c for c, kind in self.kinds.items() if kind == "number" and c not in RESERVED_COLUMNS]


def infer_platform_file(
    directory: Path,
    decisions: str,
    activity: str | None = None,
    players: str | None = None,
    proposals: str | None = None,
    items: str | None = None,
    actions: Sequence[str] | None = None,
    objectives: Sequence[str] | None = None,
) -> str:
    """The text of a `fastq.yaml` for logs in the contract's format, a comment at every guess.

    Paths are taken from the current directory and written relative to `directory`. `actions` and `objectives` name columns
    that need no guess. Raises `ConfigurationError` if a log lacks a column that every log of its kind has, or if no column
    can be an action or an objective.
    """
    given = {"decisions": decisions, "activity": activity, "players": players, "proposals": proposals, "items": items}
    logs = {table: _read(table, source, directory) for table, source in given.items() if source is not None}
    log = logs["decisions"]
    dimensions, goals = _actions_and_objectives(log, logs.get("proposals"), list(actions or []), list(objectives or []))
    taken = {*dimensions, *goals}
    period, once = _period(log)
    text = [
        f"# {FILE_NAME}, written by `fastq init` from the logs below. Each guess says why; correct what is wrong and run `fastq validate`.",
        "version: 1",
        f"platform: {_scalar(re.sub(r'[^A-Za-z0-9_.-]+', '-', directory.resolve().name).strip('-._')[:80] or 'platform')}  # guess: the directory's name",
        "logs:",
        *(line for table, read in logs.items() for line in _log(table, read)),
        "state:",
        *_state(log, period, once=once, activity=logs.get("activity") is not None),
        *_measures(logs.get("activity"), taken),
        *_described("attributes", logs.get("players"), taken, "  "),
        *_policies(log),
        "action:",
        *_action(dimensions, log, logs.get("proposals"), logs.get("items")),
        "objectives:",
        *(line for goal, reason in goals.items() for line in _objective(goal, reason, log, period, once=once)),
    ]
    written = "\n".join(text) + "\n"
    platform_from_tree(yaml.safe_load(written), directory, FILE_NAME)  # what we write, we can read
    return written


# ---- reading --------------------------------------------------------------------------------------------------------


def _read(table: str, source: str, directory: Path) -> Log:
    """One log with the type of every column settled by all of its values; columns of nested types are left out."""
    option = f"--{table}"
    frames = []
    for name, scan in scans(Path.cwd(), option, source):
        with naming(name):
            frames.append(scan.collect(engine="streaming"))
    with naming(source):
        raw = pl.concat(frames, how="diagonal_relaxed")
    if raw.is_empty():
        raise LogsError(f"{option}: {source}: holds no rows; there is nothing to infer from")
    wanted: dict[str, dict[str, Kind]] = {
        "decisions": {"decision_id": "id", "player_id": "id", "decided_at": "time", "policy": "name"},
        "activity": {"player_id": "id", "occurred_at": "time"},
        "players": {"player_id": "id"},
        "proposals": {"decision_id": "id", "policy": "name"},
        "items": {"item_id": "id"},
    }
    for column in wanted[table]:
        if column not in raw.columns:
            near = difflib.get_close_matches(column, raw.columns, n=1, cutoff=0.4)
            hint = f"perhaps {near[0]!r} is meant?" if near else f"it has {', '.join(raw.columns[:12])}"
            raise LogsError(f"{option}: {source}: column {column!r} is missing, and every log of {table} has it; rename a column: {hint}")
    columns, kinds = [], dict[str, Kind]()
    for column, dtype in raw.schema.items():
        kind = wanted[table].get(column) or _kind(raw[column])
        value = parsed(pl.col(column), kind, dtype) if kind else None
        if kind and value is not None:
            columns.append(value.alias(column))
            kinds[column] = kind
    with naming(source):
        frame = raw.select(columns)
    for column in wanted[table]:
        if column not in kinds or frame[column].count() == 0:
            raise LogsError(
                f"{option}: {source}: column {column!r} of type {raw.schema[column]} holds nothing that can be read as {_expected(wanted[table][column])}"
            )
    path = source if "://" in source else os.path.relpath(Path.cwd() / Path(source).expanduser(), directory.resolve())
    return Log(option, path, frame, kinds)


def _expected(kind: Kind) -> str:
    return {"id": "an id", "name": "text", "number": "a number", "time": "a timestamp"}[kind]


def _kind(column: pl.Series) -> Kind | None:
    dtype = column.dtype
    if dtype.is_numeric() or dtype == pl.Boolean:
        return "number"
    if isinstance(dtype, pl.Datetime | pl.Date):
        return "time"
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return "name"
    if dtype != pl.String:
        return None
    there = int(column.str.contains(r"\S").sum())
    for kind in ("number", "time"):
        value = parsed(pl.col(column.name), kind, dtype)
        if value is not None and there and column.to_frame().select(value).to_series().count() >= PARSED_SHARE * there:
            return kind
    return "name"


# ---- guessing -------------------------------------------------------------------------------------------------------


def _actions_and_objectives(log: Log, proposals: Log | None, actions: list[str], objectives: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Columns of the action and objectives, each with the reason; a catalogue's `item_id` is no such column."""
    numbers = log.numbers()
    for option, names in (("--action", actions), ("--objective", objectives)):
        for name in names:
            if name not in numbers and not (option == "--action" and name == "item_id" and "item_id" in log.kinds):
                near = difflib.get_close_matches(name, numbers, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(numbers) or 'none: there is no such column'}"
                raise ConfigurationError(f"{option} {name}: no column of numbers of that name in {log.path}; {hint}")
    if both := set(actions).intersection(objectives):
        raise ConfigurationError(f"--action and --objective: {', '.join(sorted(both))} cannot be both")
    catalogue = "item_id" in log.kinds and (not actions or "item_id" in actions)
    dimensions = dict.fromkeys([a for a in actions if a != "item_id"], "")
    goals = dict.fromkeys(objectives, "")
    for name in numbers:
        if name in dimensions or name in goals:
            continue
        if catalogue or (actions and not objectives):
            goals[name] = "a number, and not part of the action"
        elif actions and objectives:
            continue
        elif objectives:
            dimensions[name] = "a number, and not among the objectives"
        else:
            reason, is_action = _role(name, log, proposals)
            (dimensions if is_action else goals)[name] = reason
    if not catalogue and not dimensions:
        raise ConfigurationError(
            f"{log.path}: no column looks like an action; name them with --action, among {', '.join(numbers) or 'columns of numbers, or add item_id'}"
        )
    if not goals:
        raise ConfigurationError(
            f"{log.path}: no column looks like an objective; name them with --objective, among {', '.join(numbers) or 'columns of numbers'}"
        )
    if catalogue and dimensions:
        raise ConfigurationError(f"--action: {', '.join(dimensions)} cannot stand beside item_id; an action is an item or numbers")
    order = {name: i for i, name in enumerate(log.frame.columns)}
    return {n: dimensions[n] for n in sorted(dimensions, key=order.__getitem__)}, {n: goals[n] for n in sorted(goals, key=order.__getitem__)}


def _role(name: str, log: Log, proposals: Log | None) -> tuple[str, bool]:
    """Why a column of the decisions is an action (True) or an objective (False)."""
    column = log.frame[name]
    if proposals is not None and name in proposals.numbers():
        return "the proposals have it too", True
    if column.null_count():
        recent = log.frame.sort("decided_at", nulls_last=False).tail(max(1, column.len() // 50))[name]
        return ("not known yet for the newest decisions" if recent.null_count() else "not known for every decision"), False
    if hit := _hits(OBJECTIVE, name):
        return f"by its name ({hit})", False
    if hit := _hits(ACTION, name):
        return f"by its name ({hit})", True
    if column.n_unique() <= 2:
        return "never more than two values, as something that happens or does not", False
    low, high = column.min(), column.max()
    if ((column == low) | (column == high)).mean() > 2.5 / column.len():  # type: ignore[operator]
        return "always known, and some values lie exactly on the ends of its range", True
    return "always known", True


def _hits(pattern: str, name: str) -> str:
    """The words of a column's name that match, for a reason; empty if none does."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    return ", ".join(word for word in dict.fromkeys(words) if re.fullmatch(pattern, word))


def _period(log: Log) -> tuple[timedelta, bool]:
    """The grid nearest to the typical time between two decisions of a player; and whether no player ever has two."""
    gaps = log.frame.sort("player_id", "decided_at").select(pl.col("decided_at").diff().over("player_id").alias("gap")).drop_nulls()["gap"]
    gap = gaps.filter(gaps > timedelta(0)).median()
    if not isinstance(gap, timedelta):
        return timedelta(days=1), True
    return min(PERIODS, key=lambda period: abs(math.log(period / gap))), False


def _log(table: str, log: Log) -> list[str]:
    said = "fastq keeps this name for a column of its own; rename the column to use it"
    return [f"  {table}: {_scalar(log.path)}", *(f"    # left out: {name}: {said}" for name in log.reserved())]


def _state(log: Log, period: timedelta, *, once: bool, activity: bool) -> list[str]:
    first, last = log.frame["decided_at"].min(), log.frame["decided_at"].max()
    spanned = (last - first) / period  # type: ignore[operator]
    window = min(30, max(1, int(spanned / 2))) if activity or not once else 1
    why = "half of the time that the logs span, up to 30" if window > 1 else "there is no history to speak of"
    return [
        f"  period: {format_duration(period)}  # guess: {'no player has two decisions' if once else 'the usual time between two decisions of a player'}",
        f"  window: {window}  # guess: periods of history; {why}",
        "  churn: 14  # guess: periods without activity after which a player counts as gone",
    ]


def _measures(activity: Log | None, taken: set[str]) -> list[str]:
    if activity is None:
        return ["  measures: {}"]
    lines = []
    for name in activity.numbers():
        if name in taken:
            lines.append(f"    # left out: {name} is also a column of the decisions; rename one of the two to use it")
            continue
        column = activity.frame[name].drop_nulls()
        values = column.filter(column.is_finite())
        low, high = values.min(), values.max()
        unit = values.len() > 0 and low >= 0 and high <= 1 and not (values == values.round()).all()  # type: ignore[operator]
        if hit := _hits(LEVEL, name):
            aggregate, why = "mean", f"by its name ({hit})"
        elif values.len() and low < 0:  # type: ignore[operator]
            aggregate, why = "mean", "some values are negative, as a level's may be"
        elif unit:
            aggregate, why = "mean", "all values lie between 0 and 1, as a rate's do"
        else:
            aggregate, why = "sum", "an amount"
        bounds = (", min: 0" if values.len() and low >= 0 else "") + (", max: 1" if unit else "")  # type: ignore[operator]
        lines.append(f"    {_scalar(name)}: {{aggregate: {aggregate}{bounds}}}  # guess: {why}")
        taken.add(name)
    return ["  measures:", *lines] if any(not line.lstrip().startswith("#") for line in lines) else ["  measures: {}", *lines]


def _described(key: str, log: Log | None, taken: set[str], indent: str) -> list[str]:
    """Attributes of players or features of items: numeric or categorical."""
    if log is None:
        return [f"{indent}{key}: {{}}"]
    lines = []
    for name, kind in log.kinds.items():
        if name in RESERVED_COLUMNS:
            continue
        values = log.frame[name].drop_nulls()
        if name in taken:
            lines.append(f"{indent}  # left out: {name} has the name of another column that is used; rename one of the two to use it")
        elif kind == "time":
            lines.append(f"{indent}  # left out: {name} is a time; write it as a number, such as days since then, to use it")
        elif kind == "name" and values.len() > 20 and values.n_unique() > values.len() / 2:
            lines.append(f"{indent}  # left out: {name} differs from row to row, as a name does")
        else:
            kind_text, why = ("numeric", "numbers") if kind == "number" else ("categorical", f"text, {values.n_unique()} different")
            lines.append(f"{indent}  {_scalar(name)}: {{kind: {kind_text}}}  # guess: {why}")
            taken.add(name)
    return [f"{indent}{key}:", *lines] if any(not line.lstrip().startswith("#") for line in lines) else [f"{indent}{key}: {{}}", *lines]


def _policies(log: Log) -> list[str]:
    acted = log.frame.filter(pl.col("policy") != OWN_POLICY).group_by("policy").len().sort("len", "policy", descending=[True, False])
    policies = acted["policy"].to_list()
    if not policies:
        raise ConfigurationError(f"{log.path}: column 'policy' names no behaviour policy; it should say which of them made each decision")
    several = log.frame.drop_nulls("policy").group_by("player_id").agg(pl.len(), pl.col("policy").n_unique().alias("policies")).filter(pl.col("len") > 1)
    sticks = len(policies) > 1 and several.height > 0 and (several["policies"] == 1).all()
    why = "each player stays with one policy" if sticks else "players meet several policies, or there is one only"
    return [
        f"policies: [{', '.join(map(_scalar, policies))}]  # found in the logs, the one that acted most often first",
        f"assignment: {'player' if sticks else 'decision'}  # guess: {why}",
    ]


def _action(dimensions: dict[str, str], log: Log, proposals: Log | None, items: Log | None) -> list[str]:
    if not dimensions:
        features = _described("features", items, set(), "  ") if items is not None else []
        return ["  kind: catalogue  # guess: the decisions have item_id", *features]
    lines = ["  kind: continuous", "  dimensions:  # add a unit to each, such as unit: INR"]
    for name, reason in dimensions.items():
        column = log.frame[name].drop_nulls()
        values = column.filter(column.is_finite())
        if proposals is not None and name in proposals.kinds:
            proposed = proposals.frame[name].drop_nulls()
            values = pl.concat([values, proposed.filter(proposed.is_finite())])
        if values.is_empty():
            raise ConfigurationError(
                f"{log.path}: column {name!r} holds no finite number, so it cannot be an action; leave it out or name others with --action"
            )
        low, high, why = _bounds(values)
        grid = _grid(values, low, high)
        step = f", step: {grid:g}" if grid else ""
        reasons = [reason] * bool(reason) + [why] + ["all values lie on that grid"] * bool(grid)
        lines.append(f"    {_scalar(name)}: {{low: {_number(low)}, high: {_number(high)}{step}}}  # guess: {'; '.join(reasons)}")
    return lines


def _bounds(values: pl.Series) -> tuple[float, float, str]:
    """The range of the values, rounded outwards where no values pile up on its ends."""
    least, most = float(values.min()), float(values.max())  # type: ignore[arg-type]
    if least == most:
        return least, least + 1, "one value only was ever seen, so the range is made up"
    unit = 10.0 ** (math.floor(math.log10(most - least)) - 1)
    ends = []
    for end, rounded in ((least, math.floor(least / unit) * unit), (most, math.ceil(most / unit) * unit)):
        piled = int((values == end).sum()) > 2
        ends.append((end if piled else float(f"{rounded:.12g}"), piled))
    (low, low_piled), (high, high_piled) = ends
    if low_piled and high_piled:
        return low, high, "bounds on which several actions lie"
    return low, high, f"values from {least:.6g} to {most:.6g}, rounded outwards"


def _grid(values: pl.Series, low: float, high: float) -> float | None:
    """The coarsest usual step that all values lie on, if there are enough of them to tell."""
    if values.len() < 20:
        return None
    for step in STEPS:
        steps = (values - low) / step
        if high - low >= 2 * step and ((steps - steps.round()).abs() < 1e-6).all():
            return step
    return None


def _objective(name: str, reason: str, log: Log, period: timedelta, *, once: bool) -> list[str]:
    harm = _hits(HARM, name)
    weight, why = ("-1.0", f"less is better, by its name ({harm})") if harm else ("1.0", "more is better")
    keys = f"weight: {weight}"
    if once:
        keys += ", discount: 0"
        why += "; no player has two decisions, so nothing follows"
    known = log.frame.filter(pl.col(name).is_not_null())["decided_at"].max()
    newest = log.frame["decided_at"].max()
    lag = (newest - known) / period if known is not None else 0.0  # type: ignore[operator]
    if lag > 1.5:
        delay = period * math.ceil(lag)
        keys += f", known_after: {format_duration(delay)}"
        why += f"; known only for decisions older than {format_duration(delay)}"
    return [f"  {_scalar(name)}: {{{keys}}}  # guess: {reason}{'; ' * bool(reason)}{why}"]


# ---- writing --------------------------------------------------------------------------------------------------------


def _scalar(value: Any) -> str:
    """A value as YAML would write it within a flow mapping, quoted where it must be."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]


def _number(value: float) -> str:
    return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
