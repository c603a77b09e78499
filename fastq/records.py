"""The log tables: good rows in canonical types, refused rows with their reasons, and how often each rule was broken.

Rows in = accepted + quarantined + repeated, for each table. Tables are judged part by part (`fastq.staging`) and stay on disk in their parts: the gate
holds one of them at a time, and only who learns from decisions has them all in memory. Decisions that fastq served are read beside the platform's own
logs and merged by `decision_id`; so are the events that its endpoint took. What cannot be read at all raises `LogsError`; a bad row never does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

import polars as pl
import pyarrow.parquet as pq

from fastq.errors import LogsError, WorkspaceError
from fastq.forgetting import forgotten
from fastq.platform import FILE_NAME, OWN_POLICY, CatalogueAction, Platform
from fastq.sources import BROKEN, DTYPES, EXPECTED, FILE, OTHERS, ROW, TIME, Column, naming, unread
from fastq.staging import Staged, stage
from fastq.workspace import Workspace, is_full, room

_T = TypeVar("_T")
Table = Literal["decisions", "activity", "players", "proposals", "items"]
Severity = Literal["stop", "quarantine", "warn"]

TABLES: tuple[Table, ...] = get_args(Table)
KEYS: dict[Table, list[str]] = {
    "decisions": ["decision_id"],
    "activity": [],
    "players": ["player_id", "valid_from"],
    "proposals": ["decision_id", "policy"],
    "items": ["item_id"],
}
AT_ONCE = 4  # parts at most that are looked at together
CONFLICT, EXECUTED, LOG, KNOWN, DIFFERS = "?conflict", "?executed", "?log", "?known", "?differs"  # columns beside a row's own, as in `sources`
BOUND_TOLERANCE = 1e-6  # of a dimension's range: actions logged in float32 miss their own bounds by less
PROBABILITY_TOLERANCE = 1e-6
READINGS = 5  # of the accepted tables at most, while they are replaced again and again; then nobody may replace them
LARGEST = 1e30  # of any number, either way: states are float32, and sums of events have to stay inside it
# Of any time: those that programs write for "none" or "for ever" would lay a player's grid over centuries.
EARLIEST, ZERO, AHEAD = datetime(1900, 1, 2, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC), timedelta(days=366)


@dataclass(frozen=True)
class Counts:
    """Rows of one table; their sum is the number of rows that were read."""

    accepted: int
    quarantined: int
    repeated: int


@dataclass(frozen=True)
class Parts:
    """Rows of a table, in parts that fit into memory each; all rows of one key stand in one part, in the order in which they were logged.

    Of events the key is the player, of decisions and proposals the decision.
    """

    parts: tuple[pl.LazyFrame, ...]

    def lazy(self) -> pl.LazyFrame:
        return pl.concat(self.parts, how="diagonal_relaxed")

    @property
    def height(self) -> int:
        return int(self.lazy().select(pl.len()).collect().item())

    def filter(self, predicate: pl.Expr) -> Parts:
        return Parts(tuple(part.filter(predicate) for part in self.parts))

    def select(self, *columns: str | pl.Expr) -> pl.DataFrame:
        """Some columns of all of them, in memory."""
        return self.lazy().select(*columns).collect(engine="streaming")

    def collect(self) -> pl.DataFrame:
        """All of them at once, events sorted by player_id, occurred_at."""
        return self.lazy().collect().sort("player_id", "occurred_at", maintain_order=True)


class AnyRecords(Protocol):
    """What is known of logs that were judged, whether their rows are in memory (`Records`) or not (`Judged`)."""

    @property
    def counts(self) -> Mapping[str, Counts]: ...
    @property
    def metrics(self) -> Mapping[str, int]: ...
    @property
    def warnings(self) -> Sequence[str]: ...
    def held(self, table: Table | Literal["quarantine"]) -> Parts:
        """The accepted rows of a table, or the refused ones of all; no part where the table is not logged."""


@dataclass(frozen=True)
class Records:
    """Every log table of a platform in canonical types; a table that `fastq.yaml` does not name is None.

    decisions   decision_id, player_id, decided_at, policy, propensity, assignment, model_version, the action columns, the
                objectives; sorted by player_id, decided_at, decision_id
    activity    player_id, occurred_at, known_at, the measures; on disk in their parts, or a frame of a few
    players     player_id, valid_from (null = always), the attributes
    proposals   decision_id, policy, the action columns, propensity, assignment
    items       item_id, the item features
    quarantine  table, file, row (from 1, in that file), reason, content (the row as it stood there, JSON text), then the rows' own columns
    counts      by table
    metrics     number of rows (or of whatever the rule counts) that break each rule, by rule name; 0 where all is well
    warnings    sentences
    read_at     when reading began; what the platform said of served decisions since may not be in the tables
    heard       per server's log, `recorded_at` (microseconds) of the newest event that is in the tables: all up to there are, none after
    """

    decisions: pl.DataFrame
    activity: Parts | pl.DataFrame | None
    players: pl.DataFrame | None
    proposals: pl.DataFrame | None
    items: pl.DataFrame | None
    quarantine: pl.DataFrame
    counts: dict[str, Counts]
    metrics: dict[str, int]
    warnings: list[str]
    read_at: datetime | None = None
    heard: dict[str, int] = field(default_factory=dict)

    def held(self, table: Table | Literal["quarantine"]) -> Parts:
        return Parts(parts_of(getattr(self, table)))


@dataclass(frozen=True)
class Judged:
    """Every log table of a platform, judged: as `Records`, but all rows stay on disk, in their parts, and are read again by whoever asks for them.

    accepted: in the columns of `Records`. refused: in those of its quarantine; within a part in the order of the files and their rows.
    """

    accepted: dict[Table, Parts]
    refused: Parts
    counts: dict[str, Counts]
    metrics: dict[str, int]
    warnings: list[str]
    read_at: datetime
    heard: dict[str, int]

    def held(self, table: Table | Literal["quarantine"]) -> Parts:
        return self.refused if table == "quarantine" else self.accepted.get(table, Parts(()))

    def records(self) -> Records:
        """The same in memory, events excepted."""
        tables = {table: _sorted(table, rows.lazy().collect()) for table, rows in self.accepted.items() if table != "activity"}
        return Records(
            decisions=tables["decisions"],
            activity=self.accepted.get("activity"),
            players=tables.get("players"),
            proposals=tables.get("proposals"),
            items=tables.get("items"),
            quarantine=self.refused.lazy().collect().sort(pl.col("table").cast(pl.Enum(TABLES)), "file", "row", nulls_last=True, maintain_order=True),
            counts=self.counts,
            metrics=self.metrics,
            warnings=self.warnings,
            read_at=self.read_at,
            heard=self.heard,
        )


def parts_of(rows: Parts | pl.DataFrame | None) -> tuple[pl.LazyFrame, ...]:
    """The parts of a table, however it is held."""
    return rows.parts if isinstance(rows, Parts) else () if rows is None else (rows.lazy(),)


def several(work: Callable[[int], _T], parts: int) -> list[_T]:
    """`work` of every part, in their order, some at a time: Polars and NumPy leave the interpreter to others meanwhile. How many bounds the memory."""
    if parts == 1:
        return [work(0)]
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, range(parts)))


@dataclass(frozen=True)
class RowRule:
    """A rule for each row: `broken` is true where it fails, `reason` then says what is wrong and names the column."""

    name: str
    broken: pl.Expr
    reason: pl.Expr
    severity: Severity
    within: tuple[str, float, float] | None = None  # a column, and a range of its numbers in which none breaks it


@dataclass(frozen=True)
class Finding:
    """How a table as a whole stands to a rule: how often it failed, and the sentence to show then."""

    rule: str
    failed: int
    sentence: str


# ---- what the tables hold -------------------------------------------------------------------------------------------


def columns_of(platform: Platform, table: Table) -> dict[str, Column]:
    """The columns that `table` has on this platform, in canonical order."""
    key, name, time = Column("id", nullable=False), Column("name", nullable=False), Column("time", nullable=False)
    probability, later = Column("number", optional=True), Column("time", optional=True)
    action = {d: Column("number", nullable=False, key=f"action.dimensions.{d}") for d in platform.dimension_names} or {"item_id": key}
    match table:
        case "decisions":
            given = {"decision_id": key, "player_id": key, "decided_at": time, "policy": name, "propensity": probability, "assignment": probability}
            objectives = {o: Column("number", key=f"objectives.{o}") for o in platform.objectives}
            return {**given, "model_version": Column("id", optional=True), **action, **objectives}
        case "activity":
            # a count needs no column of its own: each event is one
            measures = {m: Column("number", optional=measure.aggregate == "count", key=f"state.measures.{m}") for m, measure in platform.state.measures.items()}
            return {"player_id": key, "occurred_at": time, "recorded_at": later, **measures}
        case "players":
            attributes = {a: Column("number" if v.kind == "numeric" else "name", key=f"state.attributes.{a}") for a, v in platform.state.attributes.items()}
            return {"player_id": key, "valid_from": later, **attributes}
        case "proposals":
            return {"decision_id": key, "policy": name, **action, "propensity": probability, "assignment": probability}
        case "items":
            features = platform.action.features if isinstance(platform.action, CatalogueAction) else {}
            return {"item_id": key, **{f: Column("number" if v.kind == "numeric" else "name", key=f"action.features.{f}") for f, v in features.items()}}


@dataclass(frozen=True)
class Surroundings:
    """What the rules of a row need to know beyond the row; None leaves a rule without effect."""

    unread: frozenset[str] = frozenset()  # columns with values of the wrong type
    broken: bool = False  # whether `?broken` says of a line why it is no row
    decisions: bool = False  # whether `?known` says of a proposal if its decision is there
    items: pl.Series | None = None  # ids that an action may name
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class _Rules:
    """The rules of a table; a call adds one. within: a range of the column's numbers in which none breaks it."""

    table: Table
    added: list[RowRule] = field(default_factory=list)

    def __call__(
        self,
        column: str,
        name: str,
        broken: pl.Expr,
        complaint: str,
        value: pl.Expr | None = None,
        severity: Severity = "quarantine",
        within: tuple[float, float] | None = None,
    ) -> None:
        value = pl.col(column) if value is None else value
        reason = pl.concat_str(pl.lit(f"{column} "), value.cast(pl.String) + " ", pl.lit(complaint), ignore_nulls=True)
        whole = f"{self.table}.{column}.{name}"
        self.added.append(RowRule(whole, broken.fill_null(value=False), reason, severity, (column, *within) if within else None))


def row_rules(platform: Platform, table: Table, around: Surroundings | None = None) -> list[RowRule]:
    """The rules that each row of `table` is held to."""
    around = around or Surroundings()
    columns = columns_of(platform, table)
    why = pl.col(BROKEN) if around.broken else pl.lit(None, pl.String)
    rule = _Rules(table, [RowRule(f"{table}.line.readable", why.is_not_null(), pl.concat_str(pl.lit("the line "), why), "quarantine")])
    for column, what in columns.items():
        value = pl.col(column)
        text = pl.col(unread(column)) if column in around.unread else pl.lit(None, pl.String)
        if what.kind != "name":
            rule(column, "readable", text.is_not_null(), f"is not {EXPECTED[what.kind][0]}", text)
        if not what.nullable:
            rule(column, "present", value.is_null() & text.is_null() & why.is_null(), "is missing")
        if what.kind == "number" and column not in ("propensity", "assignment"):
            rule(column, "finite", ~value.is_finite(), "is not a finite number", within=(-LARGEST, LARGEST))
            rule(column, "size", value.is_finite() & (value.abs() > LARGEST), f"is larger than {LARGEST:g}", within=(-LARGEST, LARGEST))
    if key := KEYS[table]:
        rule(key[0], "unique", pl.col(CONFLICT), f"has an earlier row with the same {' and '.join(key)} and other content; the first one stays")
    if "policy" in columns:
        _add_policy_rules(rule, platform)
        _add_action_rules(rule, platform, around)
    if table == "proposals":
        rule("decision_id", "known", ~pl.col(KNOWN) if around.decisions else pl.lit(value=False), "is not among the accepted decisions")
    if table == "activity":
        for name, measure in platform.state.measures.items():
            value = pl.col(name)
            if measure.min is not None:
                rule(name, "min", value.is_finite() & (value < measure.min), f"is below its min {measure.min:g}", within=(measure.min, math.inf))
            if measure.max is not None:
                rule(name, "max", value.is_finite() & (value > measure.max), f"is above its max {measure.max:g}", within=(-math.inf, measure.max))
        rule("recorded_at", "order", pl.col("recorded_at") < pl.col("occurred_at"), "is before occurred_at", severity="warn")
    for column in [c for c in ("decided_at", "occurred_at", "recorded_at") if c in columns]:
        at, last = pl.col(column), around.now + AHEAD
        rule(column, "possible", ~at.is_between(EARLIEST, last) | (at == ZERO), "is no time at which anything can have happened")
        if column != "recorded_at":
            # a day of slack, for clocks differ and a local time may pass for UTC
            rule(column, "past", at.is_between(around.now + timedelta(days=1), last, closed="right"), "is in the future", severity="warn")
    return rule.added


def suspect(rules: Sequence[RowRule]) -> pl.Expr:
    """Whether a row may break one of the rules: true wherever one is broken, and what a number has to be is one question of its range."""
    ranges: dict[str, tuple[float, float]] = {}
    for column, low, high in (rule.within for rule in rules if rule.within):
        least, most = ranges.get(column, (-math.inf, math.inf))
        ranges[column] = max(least, low), min(most, high)
    outside = [~pl.col(column).is_between(low, high).fill_null(value=True) for column, (low, high) in ranges.items()]
    return pl.any_horizontal(*outside, *(rule.broken for rule in rules if not rule.within))


def _add_policy_rules(rule: _Rules, platform: Platform) -> None:
    known = [*platform.policies, OWN_POLICY]
    rule("policy", "known", ~pl.col("policy").is_in(known), f"is not one of {', '.join(known)}")
    propensity, assignment = pl.col("propensity"), pl.col("assignment")
    rule("propensity", "positive", ~(propensity.is_finite() & (propensity > 0)), "is not a positive, finite number; leave it empty where it is not known")
    if isinstance(platform.action, CatalogueAction):
        above = propensity.is_finite() & (propensity > 1 + PROBABILITY_TOLERANCE)
        rule("propensity", "probability", above, "is above 1, and a catalogue's propensities are probabilities")
    share = assignment.is_finite() & (assignment > 0) & (assignment <= 1 + PROBABILITY_TOLERANCE)
    rule("assignment", "probability", ~share, "is not a probability above 0 and up to 1")


def _add_action_rules(rule: _Rules, platform: Platform, around: Surroundings) -> None:
    if isinstance(platform.action, CatalogueAction):
        rule("item_id", "known", _stranger("item_id", around.items), "is not in the items log")
        return
    for name, d in platform.action.dimensions.items():
        value, slack = pl.col(name), BOUND_TOLERANCE * (d.high - d.low)
        within = d.low - slack, d.high + slack
        outside = value.is_finite() & ~value.is_between(*within)
        rule(name, "bounds", outside, f"is outside its bounds {d.low:g} to {d.high:g} {d.unit}".rstrip(), within=within)
        if d.step:
            nearest = d.low + ((value - d.low) / d.step).round() * d.step
            rule(name, "grid", value.is_finite() & ~outside & ((nearest - value).abs() > slack), f"is not on its grid of {d.step:g}", severity="warn")


def _stranger(column: str, known: pl.Series | None) -> pl.Expr:
    return pl.lit(value=False) if known is None else ~pl.col(column).is_in(known.implode())


def table_rules(platform: Platform) -> list[str]:
    """Names of the rules that look at a table as a whole; where they fail, they warn."""
    logged = [table for table in TABLES if getattr(platform.logs, table) is not None]
    names = ["rows.several", "player_id.several", "policy.several", "policy.acts", "propensity.given", "decided_at.fresh", "served.same"]
    names += [f"{objective}.known" for objective in platform.objectives]
    names += ["player_id.described"] * ("players" in logged) + ["activity.earlier"] * ("activity" in logged)
    each = [f"{table}.{rule}" for table in logged for rule in ("columns.used", "files.same")]
    each += [f"{table}.player_id.forgotten" for table in logged if table != "items"]
    return each + [f"decisions.{name}" for name in names]


# ---- reading and judging --------------------------------------------------------------------------------------------


def read_records(platform: Platform, since: datetime | None = None) -> Records:
    """All logs, judged as `judge` does, with the accepted rows in memory (events stay on disk)."""
    return judge(platform, since).records()


def judge(platform: Platform, since: datetime | None = None) -> Judged:
    """Read all logs that `fastq.yaml` names, the decisions that fastq served and the events that came over HTTP, and hold each row to the rules.

    With `since` (UTC): decisions and their proposals from then on, and the activity that their windows reach back to.
    Raises `LogsError` that names file and column if a table cannot be read at all.
    """
    now = datetime.now(UTC)
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    judged: dict[Table, _Table] = {}
    lost = frozenset[str]()
    heard = _heard(platform)
    up_to = dict(heard.group_by(LOG).agg(pl.col("recorded_at").max().dt.epoch("us")).rows())
    gone = forgotten(Workspace(platform.root))
    beside = {"decisions": _served(platform), "activity": heard.drop(LOG)}
    beside = {table: rows.filter(~gone.holds(rows["player_id"])) for table, rows in beside.items()}
    for table in ("items", "players", "activity", "decisions", "proposals"):  # decisions name items, and proposals decisions
        if (source := getattr(platform.logs, table)) is None:
            continue
        by = (KEYS[table] or ["player_id"])[0]  # repeats, and whatever else is told by several rows, stand in one part
        key, columns = f"{FILE_NAME}: logs.{table}", columns_of(platform, table)
        staged = stage(
            Workspace(platform.root), table, source, key, columns, by,
            apart=not KEYS[table], lost=lost if table == "proposals" else frozenset(), since=_reach(platform, table, since),
        )  # fmt: skip
        if table == "decisions":
            lost = staged.lost
        if not staged.rows + staged.left_out and beside.get(table, pl.DataFrame()).is_empty():
            mend = "export it again" if table == "decisions" else f"export it again, or leave logs.{table} out"
            raise LogsError(f"{FILE_NAME}: logs.{table}: {', '.join(staged.files[:3])}{', …' * (len(staged.files) > 3)}: no rows; {mend}")
        judged[table] = _judge(platform, table, staged, beside.get(table), judged, since, now)
    accepted = {table: found.accepted for table, found in judged.items()}
    findings = [finding for table in judged.values() for finding in table.findings]
    findings += _look_at_decisions(platform, accepted, now)
    return Judged(
        accepted=accepted,
        refused=Parts(tuple(part for table in TABLES if table in judged for part in judged[table].refused.parts)),
        counts={table: judged[table].counts for table in TABLES if table in judged},
        metrics={finding.rule: finding.failed for finding in findings},
        warnings=[finding.sentence for finding in findings if finding.failed and finding.sentence],
        read_at=now,
        heard=up_to,
    )


@dataclass(frozen=True)
class _Table:
    """One table, judged: its good rows and the refused ones, both to be read from their parts again, and what was found."""

    accepted: Parts
    refused: Parts
    counts: Counts
    findings: list[Finding]
    asked: Parts  # ids of all decisions from `since` on, refused ones among them


def _judge(
    platform: Platform,
    table: Table,
    staged: Staged,
    beside: pl.DataFrame | None,
    judged: Mapping[Table, _Table],
    since: datetime | None,
    now: datetime,
) -> _Table:
    """Split a table's rows, part by part; `beside` are the rows of it that fastq took down itself."""
    decisions, items = judged.get("decisions"), judged.get("items")
    around = Surroundings(
        unread=staged.unread,
        broken=staged.broken,
        decisions=table == "proposals",
        items=items.accepted.select("item_id").to_series() if items else None,
        now=now,
    )
    rules = row_rules(platform, table, around)
    severe, mild = ([rule for rule in rules if (rule.severity == "quarantine") is how] for how in (True, False))
    bad, suspected = pl.any_horizontal(rule.broken for rule in severe), suspect(severe)
    # each event is one to a count that has no column of its own
    counted = [m for m, measure in platform.state.measures.items() if table == "activity" and measure.aggregate == "count" and m not in staged.found]
    ones = [pl.lit(1.0).alias(m) for m in counted]

    kinds = staged.kinds

    def split(part: int) -> _Split:
        rows = staged.part(part).with_columns(ones)
        if table == "proposals" and decisions:
            known, asked = (_same_keys(ids, part, staged) for ids in (decisions.accepted, decisions.asked))
            rows = rows.with_columns(pl.col("decision_id").is_in(known.implode()).fill_null(value=True).alias(KNOWN))
        else:
            asked = pl.Series("decision_id", dtype=pl.String)
        if since is not None:
            rows = rows.filter(_from(platform, table, since, asked))
        rows, repeated = _without_repeats(rows, table, kinds)
        if beside is not None:
            mine = beside.filter(staged.mine(part)).with_columns(ones)
            mine = mine if since is None else mine.filter(_from(platform, table, since, asked))
            rows = _with_heard(platform, rows, mine) if table == "activity" else _with_served(platform, rows, mine)
        differ = pl.col(DIFFERS).sum() if DIFFERS in rows.collect_schema().names() else pl.lit(0)
        asking = [pl.len().alias("?rows"), suspected.any().alias("?bad"), differ.alias(DIFFERS), *(rule.broken.sum().alias(rule.name) for rule in mild)]
        height, some, differs, *broken = (number or 0 for number in rows.select(asking).collect(engine="in-memory").row(0))
        failed = {rule.name: number for rule, number in zip(mild, broken, strict=True)}
        spoiled, refused, good = 0, None, rows
        if some:  # most parts hold no bad row, and which rule each breaks is asked of these alone
            asking = [pl.len().alias("?rows"), *(rule.broken.sum().alias(rule.name) for rule in severe)]
            spoiled, *broken = (number or 0 for number in rows.filter(bad).select(asking).collect(engine="in-memory").row(0))
            failed |= {rule.name: number for rule, number in zip(severe, broken, strict=True)}
        if spoiled:
            refused = _quarantine(rows.filter(bad).sort(FILE, ROW, nulls_last=True, maintain_order=True), table, rules, staged.files)
            good = rows.filter(~bad)
        ids = rows.select("decision_id") if table == "decisions" and since is not None else None
        return _Split(_canonical(platform, table, good), refused, Counts(height - spoiled, spoiled, repeated), failed, differs, ids)

    splits = several(split, staged.parts)
    accepted, ids = [found.accepted for found in splits], [found.ids for found in splits if found.ids is not None]
    refused = [found.refused for found in splits if found.refused is not None]
    counts = Counts(*(sum(getattr(found.counts, each) for found in splits) for each in ("accepted", "quarantined", "repeated")))
    counts = replace(counts, repeated=counts.repeated + staged.left_out)
    failed = {rule.name: sum(found.failed.get(rule.name, 0) for found in splits) for rule in rules}
    differing = sum(found.differing for found in splits)
    refused = refused or [_quarantine(staged.part(0).head(0).with_columns(*ones, _no(CONFLICT), _no(KNOWN)), table, rules, staged.files)]
    findings = []
    if table != "items":
        said = f"{table}: {_rows(staged.left_out)} of players who were forgotten are left out, counted as repeated"
        findings.append(Finding(f"{table}.player_id.forgotten", staged.left_out, said))
    if table == "decisions":
        said = f"decisions: {_rows(differing)} of served decisions name another action than was served; what was served stands"
        findings.append(Finding("decisions.served.same", differing, said))
    for rule in rules:
        said = f"{table}: {_rows(failed[rule.name])} break the rule {rule.name} and are kept" if rule.severity == "warn" else ""
        findings.append(Finding(rule.name, failed[rule.name], said))
    others = f"{table}: ignored columns that fastq.yaml does not name: {', '.join(staged.ignored)}"
    findings.append(Finding(f"{table}.columns.used", len(staged.ignored), others))
    findings.append(Finding(f"{table}.files.same", len(staged.noticed), f"{table}: {'; '.join(staged.noticed)}"))
    return _Table(Parts(tuple(accepted)), Parts(tuple(refused)), counts, findings, Parts(tuple(ids)))


@dataclass(frozen=True)
class _Split:
    """A part of a table, judged: as `_Table`; failed: how many rows break each rule, differing: how many say something else than was served."""

    accepted: pl.LazyFrame
    refused: pl.LazyFrame | None
    counts: Counts
    failed: dict[str, int]
    differing: int
    ids: pl.LazyFrame | None


def _no(column: str) -> pl.Expr:
    return pl.lit(value=False).alias(column)


def _same_keys(ids: Parts, part: int, staged: Staged) -> pl.Series:
    """The decisions among `ids` that a part of the proposals may name. Both lie in parts by the hash of the id, whose numbers are powers of two."""
    n = len(ids.parts)
    mine = [rows.filter(staged.mine(part)) if n < staged.parts else rows for i, rows in enumerate(ids.parts) if i % staged.parts == part % n]
    found = pl.concat([rows.select("decision_id") for rows in mine]).drop_nulls().collect() if mine else pl.DataFrame(schema={"decision_id": pl.String})
    return found.to_series()


def _reach(platform: Platform, table: Table, since: datetime | None) -> tuple[str, datetime] | None:
    """The column of a table's times, and from when on they are looked at; None where all rows are."""
    if since is None or table not in ("decisions", "activity"):
        return None
    if table == "decisions":
        return "decided_at", since
    back = platform.state.period * max(platform.state.window, platform.state.churn)
    return "occurred_at", since - back if back < since - EARLIEST else EARLIEST


def _from(platform: Platform, table: Table, since: datetime, asked: pl.Series) -> pl.Expr:
    """Which rows of a table belong to decisions from `since` on (`asked`: their ids); rows without a time or an id do, so that they are refused by name."""
    if (reach := _reach(platform, table, since)) is not None:
        return (pl.col(reach[0]) >= reach[1]).fill_null(value=True)
    return pl.col("decision_id").is_in(asked.implode()).fill_null(value=True) if table == "proposals" else pl.lit(value=True)


def _without_repeats(rows: pl.LazyFrame, table: Table, kinds: list[int]) -> tuple[pl.LazyFrame, int]:
    """Rows that equal no earlier one in every column, marked where an earlier one has the same key; and how many were repeats.

    Of a table with a key, ignored columns are ignored here too; events have no key, and all that tells two apart may be ignored. Where a column is new,
    it tells apart the rows of files that have it: what is delivered again with it is a repeat. kinds: as `Staged` has them.
    """
    key = KEYS[table]
    names = rows.collect_schema().names()
    content = [c for c in names if c not in (FILE, ROW) and (c != OTHERS or not key)]
    alike = pl.col(key[0]).hash() if len(key) == 1 else pl.struct(key).hash() if key else pl.col("player_id").hash() ^ pl.col("occurred_at").hash()
    height, different = rows.select(pl.len(), alike.n_unique().alias("?different")).collect(engine="in-memory").row(0)
    if height == different:
        return rows.with_columns(_no(CONFLICT)), 0
    suspects = rows.select(FILE, ROW, alike.is_duplicated().alias("?suspect")).filter("?suspect").drop("?suspect").collect(engine="in-memory")
    # few, so whole rows are compared among these only
    twins = rows.join(suspects.lazy(), on=[FILE, ROW], how="semi", maintain_order="left").collect()
    conflict = ~pl.struct(key).is_first_distinct() & pl.col(key[0]).is_not_null() if key else pl.lit(value=False)
    whole = pl.col(BROKEN).is_null() if BROKEN in names else pl.lit(value=True)  # of a line that is no row nobody knows whether it came before
    known = ~pl.struct(content).is_first_distinct()
    if not key and len(set(kinds)) > 1:
        kind = pl.lit(pl.Series(kinds)).gather(pl.col(FILE))
        known |= kind != kind.first().over(pl.struct(c for c in content if c != OTHERS))
    twins = twins.select(FILE, ROW, repeated=known & whole, conflict=conflict)
    repeats = twins.filter("repeated").select(FILE, ROW)
    conflicts = twins.filter(pl.col("conflict") & ~pl.col("repeated")).select(FILE, ROW, pl.lit(value=True).alias(CONFLICT))
    if not repeats.is_empty():
        rows = rows.join(repeats.lazy(), on=[FILE, ROW], how="anti", maintain_order="left")
    if conflicts.is_empty():
        return rows.with_columns(_no(CONFLICT)), repeats.height
    rows = rows.join(conflicts.lazy(), on=[FILE, ROW], how="left", maintain_order="left").with_columns(pl.col(CONFLICT).fill_null(value=False))
    return rows, repeats.height


def _quarantine(rows: pl.LazyFrame, table: Table, rules: list[RowRule], files: list[str]) -> pl.LazyFrame:
    """Refused rows with their reasons, in the columns of `Records.quarantine`."""
    names = rows.collect_schema().names()
    columns = [c for c in names if c not in (FILE, ROW, OTHERS, BROKEN, CONFLICT, KNOWN, DIFFERS) and not (c.endswith("?") and c[:-1] in names)]
    # as it stood in the file, also where it is not of the column's type; and numbers as text, for JSON has no NaN
    as_read = [pl.coalesce(*([unread(c)] if unread(c) in names else []), pl.col(c).cast(pl.String)).alias(c) for c in columns]
    reasons = [pl.when(rule.broken).then(rule.reason) for rule in rules if rule.severity == "quarantine"]
    return rows.select(
        pl.lit(table).alias("table"),
        pl.lit(pl.Series(files, dtype=pl.String)).gather(FILE).fill_null("served").alias("file"),
        pl.col(ROW).cast(pl.Int64).alias("row"),
        pl.concat_str(reasons, separator="; ", ignore_nulls=True).alias("reason"),
        pl.struct(as_read).struct.json_encode().alias("content"),
        *(pl.lit(None, pl.String).alias(c) for c in ("decision_id", "player_id") if c not in columns),
        *(c for c in columns if c not in ("table", "file", "row", "reason", "content")),
    )


def _canonical(platform: Platform, table: Table, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Accepted rows in exactly the columns that `Records` promises."""
    columns = list(columns_of(platform, table))
    match table:
        case "decisions" | "proposals":
            inside = [pl.col(name).clip(low, high) for name, (low, high) in zip(platform.dimension_names, platform.bounds.tolist(), strict=True)]
            probabilities = pl.col("assignment" if platform.dimension_names else ["assignment", "propensity"]).clip(upper_bound=1.0)
            return rows.with_columns(*inside, probabilities).select(columns)
        case "activity":
            # nothing is known before it happens, whatever a clock wrote
            known_at = pl.max_horizontal("recorded_at", "occurred_at").alias("known_at")
            return rows.select("player_id", "occurred_at", known_at, *platform.state.measures)
        case "players" | "items":
            return rows.select(columns)


def _sorted(table: Table, rows: pl.DataFrame) -> pl.DataFrame:
    if table != "decisions":
        return rows.sort(KEYS[table])
    order = rows["player_id"].cast(pl.Enum(rows["player_id"].unique().sort())).to_physical()  # numbers are quicker to compare than texts
    return rows.with_columns(order.alias("?order")).sort("?order", "decided_at", "decision_id").drop("?order")


def _look_at_decisions(platform: Platform, accepted: Mapping[Table, Parts], now: datetime) -> list[Finding]:
    """What is worth a warning about the decisions as a whole."""
    state, player, decided_at = platform.state, pl.col("player_id"), pl.col("decided_at")
    known = {name: pl.col(name).count().alias(f"?{name}") for name in ("propensity", *platform.objectives)}
    several_players, policies = (player != player.first()).any().alias("?players"), pl.col("policy").unique().implode().alias("?policies")
    asked = accepted["decisions"].lazy().select(pl.len().alias("?rows"), *known.values(), decided_at.max().alias("?newest"), several_players, policies)
    said = asked.collect(engine="streaming").row(0, named=True)
    rows, acted, newest = said["?rows"], sorted(said["?policies"]), said["?newest"]
    idle = [policy for policy in platform.policies if policy not in acted] if rows else []
    findings: list[Finding] = []

    def found(rule: str, failed: int, sentence: str) -> None:
        findings.append(Finding(f"decisions.{rule}", failed, f"decisions: {sentence}"))

    found("rows.several", int(rows == 1), "there is one only; nothing can be learned from one")
    found("player_id.several", int(rows > 1 and not said["?players"]), "all are of one player; nobody is left to evaluate on")
    found("policy.several", int(rows > 1 and len(acted) == 1), f"one policy only has acted, {', '.join(acted)}; there is none to compare it with")
    found("policy.acts", len(idle), f"named in policies of fastq.yaml, but never acted: {', '.join(idle)}")
    found("propensity.given", int(rows > 0 and said["?propensity"] == 0), "no row has a propensity; all will be estimated")
    stale = isinstance(newest, datetime) and now - newest > state.period * state.churn
    found("decided_at.fresh", int(stale), f"the newest was made at {newest!s:.16} UTC, more than {state.churn} periods ago")
    for objective in platform.objectives:
        found(f"{objective}.known", int(rows > 0 and said[f"?{objective}"] == 0), f"{objective} is never known; nothing can be learned about it")
    if (players := accepted.get("players")) is not None:
        asked = accepted["decisions"].lazy().join(players.lazy().select("player_id"), on="player_id", how="anti")
        strangers = int(asked.select(pl.len()).collect(engine="streaming").item())
        found("player_id.described", strangers, f"{_rows(strangers)} of players who are not in the players log; their attributes are unknown")
    if (activity := accepted.get("activity")) is not None:
        parts = [part.group_by("player_id").agg(pl.col("known_at").min().alias("?first")) for part in activity.parts]
        begun = pl.concat(several(lambda part: parts[part].collect(engine="in-memory"), len(parts)))
        asked = accepted["decisions"].lazy().join(begun.lazy(), on="player_id", how="left")
        unseen = (pl.col("?first") < pl.col("decided_at")).fill_null(value=False).not_().sum()
        early = int(asked.select(unseen).collect(engine="streaming").item() or 0)
        found("activity.earlier", early, f"{_rows(early)} before any activity of their player; their history is empty")
    return findings


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"


# ---- served decisions, and events that came over HTTP -----------------------------------------------------------------


def read_served(platform: Platform) -> pl.DataFrame:
    """The decisions that fastq served, with the outcomes that came in, in the columns of `Records.decisions`.

    An action that was executed instead replaces the served one, whose propensity then says nothing. A decision that was not
    executed keeps its row but teaches nothing: its objectives are null.
    """
    return _served(platform).drop(EXECUTED)


def _served(platform: Platform) -> pl.DataFrame:
    """As `read_served`, with `?executed`: false where the platform said that a decision was not carried out."""
    directory = Workspace(platform.root).served
    columns = {name: DTYPES[column.kind] for name, column in columns_of(platform, "decisions").items()}
    decisions, outcomes, instead = (served_log(platform, table) for table in ("decisions", "outcomes", "executed"))
    action = json_fields("action", {a: columns[a] for a in platform.action_columns})
    # an earlier version kept it among the details
    chosen = pl.coalesce("assignment", pl.col("detail").str.json_decode(pl.Struct({"assignment": pl.Float64()})).struct.field("assignment"))
    own = decisions.with_columns(pl.col("decided_at").cast(TIME), chosen.alias("assignment"), *action)
    bodies = [pl.DataFrame(schema=columns), own.drop("action", "detail")]
    for path in sorted(directory.glob("[!.]*.parquet")):
        with naming(str(path)):
            batch = pl.read_parquet(path)
            bodies.append(batch.select(pl.col(name).cast(dtype) for name, dtype in columns.items() if name in batch.columns))
    served = pl.concat(bodies, how="diagonal").unique("decision_id", keep="first", maintain_order=True)

    return _as_executed(platform, _with_outcomes(platform, served, outcomes), instead.with_columns(action))


def _with_outcomes(platform: Platform, served: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    known = outcomes.sort("recorded_at").unique(["decision_id", "objective"], keep="last")
    for objective in set(platform.objectives).intersection(known["objective"]):
        arrived = known.filter(pl.col("objective") == objective).select("decision_id", pl.col("value").alias("?value"))
        served = served.join(arrived, on="decision_id", how="left", maintain_order="left")
        served = served.with_columns(pl.coalesce("?value", objective).alias(objective)).drop("?value")
    return served


def _ids_served(workspace: Workspace) -> pl.Series:
    """Of every decision that fastq served, whether it was carried out or not."""
    found = [pl.Series("decision_id", dtype=pl.String)]
    for path in sorted(workspace.served.glob("[!.]*.db")):
        with reading_log(path) as database:
            if columns_there(database, "decisions"):
                found.append(pl.read_database("SELECT decision_id FROM decisions", database, schema_overrides={"decision_id": pl.String})["decision_id"])
    for path in sorted(workspace.served.glob("[!.]*.parquet")):
        with naming(str(path)):
            found.append(pl.read_parquet(path, columns=["decision_id"])["decision_id"].cast(pl.String))
    return pl.concat(found).unique()


def players_served(platform: Platform, since: datetime) -> pl.Series:
    """Ids of the players for whom fastq decided anything from a moment on, whatever the gate says of it."""
    found, query = [pl.Series("player_id", dtype=pl.String)], "SELECT DISTINCT player_id FROM decisions WHERE decided_at >= ?"
    for path in decision_logs(platform):
        with reading_log(path) as database:
            if columns_there(database, "decisions"):
                found.append(pl.Series("player_id", [player for (player,) in database.execute(query, (int(since.timestamp() * 1e6),))], pl.String))
    for path in sorted(Workspace(platform.root).served.glob("[!.]*.parquet")):
        with naming(str(path)):
            recent = pl.scan_parquet(path, glob=False).filter(pl.col("decided_at") >= since)
            found.append(recent.select(pl.col("player_id").cast(pl.String)).collect().to_series())
    return pl.concat(found).unique()


def _as_executed(platform: Platform, served: pl.DataFrame, instead: pl.DataFrame) -> pl.DataFrame:
    names, objectives = platform.action_columns, list(platform.objectives)
    done = instead.sort("recorded_at").unique("decision_id", keep="last")
    done = done.select("decision_id", *(pl.col(a).alias(f"{a} done") for a in names), pl.col("action").is_not_null().alias(EXECUTED))
    served = served.join(done, on="decision_id", how="left", maintain_order="left").with_columns(pl.col(EXECUTED).fill_null(value=True))
    same = pl.all_horizontal((pl.col(f"{a} done") == pl.col(a)).fill_null(value=True) for a in names)
    facts = [pl.when(pl.col(EXECUTED) & same).then("propensity").alias("propensity"), *(pl.coalesce(f"{a} done", a).alias(a) for a in names)]
    taught = [pl.when(EXECUTED).then(o).alias(o) for o in objectives]
    return served.with_columns(*facts, *taught).drop(f"{a} done" for a in names)


_SERVED: dict[str, dict[str, pl.DataType]] = {  # what is read of a server's log; `executed` says what was done instead, null: nothing was
    "decisions": {
        "decision_id": pl.String(),
        "player_id": pl.String(),
        "decided_at": pl.Int64(),
        "policy": pl.String(),
        "propensity": pl.Float64(),
        "model_version": pl.String(),
        "action": pl.String(),
        "assignment": pl.Float64(),
        "detail": pl.String(),
    },
    "outcomes": {"decision_id": pl.String(), "objective": pl.String(), "value": pl.Float64(), "recorded_at": pl.Int64()},
    "executed": {"decision_id": pl.String(), "action": pl.String(), "recorded_at": pl.Int64()},
    "activity": {"player_id": pl.String(), "occurred_at": pl.Int64(), "recorded_at": pl.Int64(), "body": pl.String()},
}


def served_log(platform: Platform, table: str, more: Mapping[str, pl.DataType] | None = None, *, named: bool = False) -> pl.DataFrame:
    """One table of all servers' logs, with `more` columns if asked for; a log of an earlier version may lack some of it. `named`: with `?log`, its file."""
    schema = _SERVED[table] | dict(more or {})
    found = [pl.DataFrame(schema=schema | ({LOG: pl.String()} if named else {}))]
    for path in decision_logs(platform):
        with reading_log(path) as database:
            if there := columns_there(database, table):
                query = f"select {', '.join(c if c in there else f'null as {c}' for c in schema)} from {table}"  # noqa: S608 - constants only
                rows = pl.read_database(query, database, schema_overrides=schema, infer_schema_length=None)
                found.append(rows.with_columns(pl.lit(path.name).alias(LOG)) if named else rows)
    return pl.concat(found)


def columns_there(database: sqlite3.Connection, table: str) -> set[str]:
    """Of a table in a server's log; none where the server was stopped before it had made that table."""
    return {column for (column,) in database.execute("select name from pragma_table_info(?)", (table,))}


def decision_logs(platform: Platform) -> list[Path]:
    """The logs of all servers of a workspace."""
    return sorted(Workspace(platform.root).served.glob("[!.]*.db"))


@contextlib.contextmanager
def reading_log(path: Path) -> Iterator[sqlite3.Connection]:
    """One server's log, which may be written to meanwhile. Raises `WorkspaceError` where it cannot be read, for which a full disk is a reason of its own."""
    try:
        with room(path), contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)) as database:
            yield database
    except (sqlite3.Error, pl.exceptions.PolarsError) as error:
        raise WorkspaceError(f"{path}: the log of served decisions cannot be read ({error}); restore it from a backup, or move it away") from None


def json_fields(column: str, fields: Mapping[str, pl.DataType]) -> list[pl.Expr]:
    """Fields of a column of JSON objects, null where one is not there; numbers to the last digit, which `json_path_match` would change."""
    decoded = pl.col(column).str.json_decode(pl.Struct(dict(fields)))
    return [decoded.struct.field(name).alias(name) for name in fields]


def _heard(platform: Platform) -> pl.DataFrame:
    """Events that the endpoint took, in the columns of the activity log: known from when they came; and `?log`, the server's file that holds them."""
    events = served_log(platform, "activity", named=True)
    values = json_fields("body", dict.fromkeys(platform.state.measures, pl.Float64()))
    return events.select(LOG, "player_id", pl.col("occurred_at", "recorded_at").cast(pl.Datetime("us")).dt.replace_time_zone("UTC"), *values)


def read_heard(platform: Platform, after: Mapping[str, int]) -> pl.DataFrame:
    """Events that the endpoint took and that `after` (a `Records.heard`) does not reach, as `features.with_events` takes them."""
    events = _heard(platform).with_columns(pl.col("recorded_at").dt.epoch("us"), log=pl.col(LOG))
    known = pl.col("log").replace_strict(dict(after), default=0, return_dtype=pl.Int64) if after else pl.lit(0)
    return events.filter(pl.col("recorded_at") > known).drop(LOG).sort("recorded_at")


def _with_heard(platform: Platform, frame: pl.LazyFrame, heard: pl.DataFrame) -> pl.LazyFrame:
    """Events that came over HTTP beside the platform's own; one that was exported again is one row, known from when either says that it was."""
    if heard.is_empty():
        return frame
    key = {"?player": pl.col("player_id"), "?moment": pl.col("occurred_at")}
    for i, (name, measure) in enumerate(platform.state.measures.items()):
        # exports are often float32; and of what is counted the value says nothing
        key[f"?{i}"] = pl.col(name).is_not_null() if measure.aggregate == "count" else pl.col(name).fill_nan(None).cast(pl.Float32)
    ours = heard.with_columns(**key).sort("recorded_at").unique(list(key), keep="first", maintain_order=True)  # replicas may each have taken it
    theirs = frame.with_columns(**key)
    first = ours.select(*key, pl.col("recorded_at").alias("?first"))
    merged = theirs.join(first.lazy(), on=list(key), how="left", nulls_equal=True, maintain_order="left")
    merged = merged.with_columns(recorded_at=pl.min_horizontal("recorded_at", "?first")).select(frame.collect_schema().names())
    alone = ours.lazy().join(theirs, on=list(key), how="anti", nulls_equal=True, maintain_order="left").select(heard.columns)
    return pl.concat([merged, alone], how="diagonal").with_columns(pl.col(CONFLICT).fill_null(value=False))


def _with_served(platform: Platform, rows: pl.LazyFrame, served: pl.DataFrame) -> pl.LazyFrame:
    """Served decisions beside the platform's own rows; one that was exported again is one row: as served, objectives of both.

    `?differs` says where an exported one names another action than was served; the column is there if any was served.
    """
    if served.is_empty():
        return rows
    names = rows.collect_schema().names()
    ours_as = served.rename(lambda c: c if c == "decision_id" else f"{c} served").lazy()
    beside = rows.join(ours_as, on="decision_id", how="left", maintain_order="left")
    ours = pl.col(f"{EXECUTED} served").is_not_null() & ~pl.col(CONFLICT)
    facts = ["player_id", "decided_at", "policy", "propensity", "model_version", *platform.action_columns]
    other = [pl.col(a) != pl.col(f"{a} served") for a in platform.action_columns]
    if platform.dimension_names:
        slack = (BOUND_TOLERANCE * (platform.bounds[:, 1] - platform.bounds[:, 0])).tolist()
        other = [(pl.col(a) - pl.col(f"{a} served")).abs() > s for a, s in zip(platform.dimension_names, slack, strict=True)]
    merged: dict[str, pl.Expr] = {fact: pl.col(f"{fact} served") for fact in facts}
    merged["assignment"] = pl.coalesce("assignment served", "assignment")
    merged |= {o: pl.when(f"{EXECUTED} served").then(pl.coalesce(f"{o} served", o)) for o in platform.objectives}
    differs = (ours & pl.any_horizontal(other)).fill_null(value=False).alias(DIFFERS)
    facts_of_both = [pl.when(ours).then(value).otherwise(name).alias(name) for name, value in merged.items()]
    exported = beside.with_columns(differs, *facts_of_both).select(*names, DIFFERS)
    alone = served.lazy().join(rows.select("decision_id"), on="decision_id", how="anti", maintain_order="left").drop(EXECUTED)
    return pl.concat([exported, alone], how="diagonal").with_columns(pl.col(CONFLICT, DIFFERS).fill_null(value=False))


# ---- the accepted tables on disk ------------------------------------------------------------------------------------


def write_tables(records: Records, workspace: Workspace) -> None:
    """Keep the accepted tables, the quarantine and the counts under `workspace.tables`, all of them or nothing.

    Decisions lie in two files of the same columns: `served.parquet` has those that fastq served, whether or not the platform exported them again.
    """
    with workspace.lock("tables", wait_seconds=60):
        _recover(workspace)
        partial = Path(tempfile.mkdtemp(prefix=".tables.", dir=workspace.state))
        replaced = Path(f"{partial}.old")
        try:
            # served ones by themselves, so that whoever lays over them what came since need not find them among all others
            ours = records.decisions["decision_id"].is_in(_ids_served(workspace).implode())
            (records.decisions.filter(~ours) if ours.any() else records.decisions).write_parquet(partial / "decisions.parquet")
            records.decisions.filter(ours).write_parquet(partial / "served.parquet")
            for table in ("players", "proposals", "items", "quarantine"):
                if (frame := getattr(records, table)) is not None:
                    frame.write_parquet(partial / f"{table}.parquet")
            parts = _write_events(parts_of(records.activity), partial / "activity.parquet")
            counts = {table: [c.accepted, c.quarantined, c.repeated] for table, c in records.counts.items()}
            read_at = records.read_at.isoformat() if records.read_at else None
            found = {"counts": counts, "metrics": records.metrics, "warnings": records.warnings}
            summary = {**found, "read_at": read_at, "heard": records.heard, "parts": parts}
            (partial / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
            if workspace.tables.exists():
                workspace.tables.rename(replaced)
            partial.rename(workspace.tables)
        except Exception as error:
            if is_full(error):
                raise WorkspaceError(f"{workspace.tables}: the disk is full; the tables are as they were: free some space and run the command again") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _write_events(events: tuple[pl.LazyFrame, ...], path: Path) -> list[int]:
    """All parts behind each other in one file; returns the rows of each."""
    heights = []
    with contextlib.ExitStack() as stack:
        writer = None
        for part in events:
            table = part.collect().to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1))
            writer.write_table(table, row_group_size=1 << 18)
            heights.append(table.num_rows)
    return heights


def _read_events(path: Path, parts: list[int] | None) -> Parts:
    rows = pl.scan_parquet(path, glob=False)
    if parts is None:  # an earlier version's
        return Parts((rows,))
    if sum(parts) != rows.select(pl.len()).collect().item():  # a player was forgotten, so that rows have moved up
        return Parts(tuple(rows.filter(pl.col("player_id").hash() % len(parts) == part) for part in range(len(parts))))
    starts = [0, *itertools.accumulate(parts)]
    return Parts(tuple(rows.slice(start, height) for start, height in zip(starts, parts, strict=False)))


def read_events(platform: Platform) -> Parts | None:
    """The accepted events alone; None where there are none. Raises `WorkspaceError` as `read_tables`."""
    directory = Workspace(platform.root).tables
    if not (directory / "activity.parquet").exists():
        return None
    try:
        return _read_events(directory / "activity.parquet", json.loads((directory / "summary.json").read_text(encoding="utf-8")).get("parts"))
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"{directory}: damaged ({' '.join(str(error).split())[:200]}); run `fastq retrain` again") from None


def _recover(workspace: Workspace) -> None:
    """Put back the tables of a process that was killed between two renames, and remove what it left; under the lock nobody else is at work."""
    for replaced in workspace.state.glob(".tables.*.old"):
        if not workspace.tables.exists():
            replaced.rename(workspace.tables)
    for left in workspace.state.glob(".tables.*"):
        shutil.rmtree(left, ignore_errors=True)


def written(workspace: Workspace) -> tuple[int, int] | None:
    """Which writing of the accepted tables lies there, None where there is none: the same before and after reading, all that was read belongs together."""
    try:
        found = workspace.tables.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def put_back(workspace: Workspace) -> None:
    """Wait for whoever replaces the tables just now, and put them back where that process was killed; nothing where they lie in their place."""
    if not workspace.tables.exists() and workspace.state.exists():
        with workspace.lock("tables", wait_seconds=60):
            _recover(workspace)


def read_tables(platform: Platform) -> Records:
    """The tables that `write_tables` kept, all of one writing; a validation may replace them meanwhile.

    Raises `WorkspaceError` if there are none, or if they were written for another `fastq.yaml`.
    """
    workspace = Workspace(platform.root)
    for again in range(READINGS):
        put_back(workspace)
        before = written(workspace)
        try:
            found = _read_tables(platform)
        except WorkspaceError:
            if written(workspace) == before and (before or again):  # none at all may have been the moment between two renames
                raise
        else:
            if written(workspace) == before:
                return found
    with workspace.lock("tables", wait_seconds=60):  # they are replaced again and again
        return _read_tables(platform)


def _read_tables(platform: Platform) -> Records:
    directory = Workspace(platform.root).tables
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        frames = {path.stem: pl.read_parquet(path) for path in directory.glob("*.parquet") if path.stem != "activity"}
        activity = read_events(platform)
        counts = {table: Counts(*numbers) for table, numbers in summary["counts"].items()}
        metrics, warnings = summary["metrics"], summary["warnings"]
        read_at, heard = datetime.fromisoformat(summary["read_at"]) if summary.get("read_at") else None, dict(summary.get("heard", {}))
        decisions, quarantine = frames["decisions"], frames["quarantine"]
        if (served := frames.get("served")) is not None and not served.is_empty():  # an earlier version kept all in one file
            decisions = frames["decisions"] = _sorted("decisions", pl.concat([decisions, served]))
    except FileNotFoundError:
        raise WorkspaceError(f"{directory}: no accepted logs here yet; run `fastq retrain`") from None
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise WorkspaceError(f"{directory}: damaged ({' '.join(str(error).split())[:200]}); run `fastq retrain` again") from None
    for table in TABLES:
        empty = pl.DataFrame(schema={name: DTYPES[column.kind] for name, column in columns_of(platform, table).items()})
        wanted = None if getattr(platform.logs, table) is None else _canonical(platform, table, empty.lazy()).collect_schema()
        there = frames[table].schema if table in frames else activity.lazy().collect_schema() if table == "activity" and activity is not None else None
        if there != wanted:
            raise WorkspaceError(f"{directory}: {table} was written for another fastq.yaml; run `fastq retrain` again")
    others = (frames.get("players"), frames.get("proposals"), frames.get("items"))
    return Records(decisions, activity, *others, quarantine, counts, metrics, warnings, read_at, heard)
