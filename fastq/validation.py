"""The data gate: Great Expectations judges how often the rows of the logs broke each rule of the platform file.

Polars counts (`records.metrics`), because it sees NaN and infinity everywhere and takes one pass; Great Expectations holds the
suite, one expectation for each rule, and gives the verdict. What a log looked like when it was last accepted is kept as a `Profile`, and
the next one is held against it: how many rows came, and how far what they hold has moved.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from fastq.platform import Platform
from fastq.records import TABLES, AnyRecords, Counts, Parts, Severity, row_rules, several, table_rules
from fastq.workspace import Workspace, replacing

SAMPLE = 100_000  # rows at most that a distribution is told from
FEWEST = 200  # rows below which none is
BINS = 10
LEAST_VOLUME, MOST_VOLUME = 0.5, 2.0  # of the earlier rows, or of the earlier rows per period
GX_SEVERITY: dict[Severity, str] = {"stop": "critical", "quarantine": "warning", "warn": "info"}


@dataclass(frozen=True)
class Rule:
    """What became of one rule: `failed` rows broke it (or columns, policies, whatever it counts)."""

    rule: str
    failed: int
    severity: Severity
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """Whether the logs may be learned from. `reasons` has a sentence for each stopping rule that failed, `warnings` for what else is worth knowing."""

    passed: bool
    rules: list[Rule]
    reasons: list[str]
    warnings: list[str]


def rules_of(platform: Platform) -> dict[str, Severity]:
    """Every rule that a platform file implies, and what breaking it does: stop, quarantine the row, or warn."""
    logged = [table for table in TABLES if getattr(platform.logs, table) is not None]
    stop: dict[str, Severity] = {"decisions.accepted.some": "stop", **{f"{table}.quarantined.share": "stop" for table in logged}}
    rows = {rule.name: rule.severity for table in logged for rule in row_rules(platform, table)}
    warn: dict[str, Severity] = dict.fromkeys([*table_rules(platform), *_against_earlier(platform)], "warn")
    rules: dict[str, Severity] = {**stop, **rows, **warn}
    return rules | dict.fromkeys((rule for rule in platform.validation.stop if rule in rules), "stop")


# ---- against earlier runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What accepted logs looked like: `rows` by table; `newest` decision; `rate`, decisions per period; and by the name of a quantity the
    inner edges of ten bins that its values filled evenly then, with the share of values in each.
    """

    rows: dict[str, int]
    newest: str | None
    rate: float
    edges: dict[str, list[float]]
    shares: dict[str, list[float]]


def _against_earlier(platform: Platform) -> list[str]:
    tables = [f"{table}.rows.volume" for table in TABLES if getattr(platform.logs, table) is not None]
    return [*tables, "decisions.rate.volume", *dict.fromkeys(_watched(platform).values())]


def _watched(platform: Platform) -> dict[str, str]:
    """By the name of each quantity whose distribution is watched, its rule."""
    measures = {f"activity.{measure}": f"activity.{measure}.shift" for measure in platform.state.measures}
    return measures | {f"decisions.{policy}.{column}": f"decisions.{policy}.shift" for policy in platform.policies for column in platform.action_columns}


def profile(platform: Platform, records: AnyRecords) -> Profile:
    """What these logs look like, for the next ones to be held against."""
    values = _values(platform, records)
    edges = {name: np.unique(np.quantile(found, np.linspace(0, 1, BINS + 1)[1:-1])).tolist() for name, found in values.items() if len(found) >= FEWEST}
    shares = {name: _shares(values[name], inner).tolist() for name, inner in edges.items()}
    rows = {table: counts.accepted for table, counts in records.counts.items()}
    rate, newest = _rate(platform, records.held("decisions"))
    return Profile(rows, newest.isoformat() if newest else None, rate, edges, shares)


def read_profile(workspace: Workspace) -> Profile | None:
    """What the logs looked like when they were last accepted; None before the first time."""
    try:
        return Profile(**json.loads(workspace.reference.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_profile(workspace: Workspace, reference: Profile) -> None:
    workspace.make()
    with replacing(workspace.reference) as partial:
        partial.write_text(json.dumps(asdict(reference)), encoding="utf-8")


def _values(platform: Platform, records: AnyRecords, after: datetime | None = None) -> dict[str, np.ndarray]:
    """By the name of each quantity that is watched, its known values (of a sample of rows): each measure, and what each policy did."""
    decisions, events = records.held("decisions"), records.held("activity")
    if after is not None:
        decisions, events = decisions.filter(pl.col("decided_at") > after), events.filter(pl.col("occurred_at") > after)
    found: dict[str, np.ndarray] = {}
    # policies that seldom act are told from as many rows as the others, so each has a sample of its own
    often = dict(decisions.lazy().group_by("policy").len().collect(engine="streaming").rows())
    theirs = {policy: (pl.col("policy") == policy, often[policy]) for policy in platform.policies if policy in often}
    for policy, some in _every(decisions, platform.action_columns, theirs).items():
        found |= {f"decisions.{policy}.{column}": _numbers(some[column]) for column in platform.action_columns}
    if measures := list(platform.state.measures):
        accepted = records.counts.get("activity", Counts(0, 0, 0)).accepted
        some = _every(events, measures, {"all": (pl.lit(value=True), accepted)})["all"]
        found |= {f"activity.{measure}": some[measure].drop_nulls().to_numpy() for measure in measures}
    return found


def _numbers(actions: pl.Series) -> np.ndarray:
    """Actions as they are; items as numbers in [0, 1) that tell them apart, which is all that bins of equal filling ask for."""
    if actions.dtype != pl.String:
        return actions.to_numpy()
    items = actions.unique()
    return actions.replace_strict(items, [zlib.crc32(item.encode()) / 2**32 for item in items], return_dtype=pl.Float64).to_numpy()


def _every(rows: Parts, columns: list[str], of: Mapping[str, tuple[pl.Expr, int]]) -> dict[str, pl.DataFrame]:
    """By name: some of the rows for which an expression is true, of which there are so many, evenly from all of them."""
    if not of:
        return {}

    def sampled(part: int) -> list[pl.DataFrame]:
        some = (rows.parts[part].filter(which).select(columns).gather_every(max(1, height // SAMPLE)) for which, height in of.values())
        return pl.collect_all(some, engine="in-memory")

    none = [pl.DataFrame(schema=rows.parts[0].select(columns).collect_schema())] * len(of)
    return {name: pl.concat(each) for name, each in zip(of, zip(none, *several(sampled, len(rows.parts)), strict=True), strict=True)}


def _shares(values: np.ndarray, edges: list[float]) -> np.ndarray:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) / max(len(values), 1)


def _rate(platform: Platform, decisions: Parts) -> tuple[float, datetime | None]:
    """Decisions per period, from the first to the last, 0 where they lie within one; and the last one's moment."""
    at = pl.col("decided_at")
    rows, first, last = decisions.lazy().select(pl.len(), at.min().alias("first"), at.max().alias("last")).collect(engine="streaming").row(0)
    periods = (last - first) / platform.state.period if rows else 0.0
    return rows / periods if periods >= 1 else 0.0, last


def shift(now: np.ndarray, then: np.ndarray) -> float:
    """Population stability index of two vectors of shares: the sum of (now - then) log(now / then). Below 0.1 nothing moved, above 0.25 much did."""
    now, then = np.maximum(now, 1e-4), np.maximum(then, 1e-4)
    return float(((now - then) * np.log(now / then)).sum())


def _moved(platform: Platform, records: AnyRecords, reference: Profile | None) -> tuple[dict[str, int], list[str]]:
    """How often each rule against earlier runs failed, and a sentence for each that did. Without an earlier run none fails."""
    failed = dict.fromkeys(_against_earlier(platform), 0)
    said: list[str] = []
    if reference is None:
        return failed, said
    for table, before in reference.rows.items():
        now = records.counts[table].accepted if table in records.counts else 0
        if f"{table}.rows.volume" in failed and now < LEAST_VOLUME * before:
            failed[f"{table}.rows.volume"] = 1
            said.append(f"{table}: {now:,} rows, when last accepted there were {before:,}; logs only grow, so part of them is missing")
    newest = datetime.fromisoformat(reference.newest) if reference.newest else None
    rate = _rate(platform, records.held("decisions").filter(pl.col("decided_at") > newest))[0] if newest else 0.0
    if rate and reference.rate and not LEAST_VOLUME <= rate / reference.rate <= MOST_VOLUME:
        failed["decisions.rate.volume"] = 1
        said.append(f"decisions: {rate:,.0f} a period since {reference.newest:.16}, before that {reference.rate:,.0f}")
    # the whole log may have been replaced, and in a long log a new stretch drowns: both are looked at
    for when, values in (("", _values(platform, records)), (f" since {reference.newest:.16}", _values(platform, records, newest) if newest else {})):
        for name, found in values.items():
            if name not in reference.edges or len(found) < FEWEST:
                continue
            moved = shift(_shares(found, reference.edges[name]), np.array(reference.shares[name]))
            if moved > platform.validation.max_shift:
                failed[_watched(platform)[name]] += 1
                said.append(
                    f"{name.replace('.', ': ', 1)} has moved by {moved:.2f}{when} (population stability index; {platform.validation.max_shift:g} is allowed)"
                )
    return failed, said


# ---- the verdict ------------------------------------------------------------------------------------------------------


def validate(platform: Platform, records: AnyRecords, reference: Profile | None = None) -> Verdict:
    """Judge the records by the platform's rules and, where there is a `reference`, by what logs looked like before.

    The gate fails if a stopping rule fails: no decision is left, or more than `validation.max_quarantined` of a table's rows
    (repeats left out) are quarantined. A rule that was not measured counts as broken and stops.
    """
    moved, said = _moved(platform, records, reference)
    measured = {**records.metrics, **moved, "decisions.accepted.some": int(records.counts["decisions"].accepted == 0)}
    allowed = dict.fromkeys(rules_of(platform), 0)
    for table, counts in records.counts.items():
        measured[f"{table}.quarantined.share"] = counts.quarantined
        # the product of a decimal share and a count may fall short of the whole number it stands for
        allowed[f"{table}.quarantined.share"] = math.floor(platform.validation.max_quarantined * (counts.accepted + counts.quarantined) + 1e-9)
    rules = _judge(rules_of(platform), measured, allowed)
    reasons = [_reason(platform, records, rule, measured) for rule in rules if rule.severity == "stop" and not rule.passed]
    return Verdict(not reasons, rules, reasons, [*records.warnings, *said])


def _judge(severities: dict[str, Severity], measured: dict[str, int], allowed: dict[str, int]) -> list[Rule]:
    """Each rule as an expectation over one row of counts."""
    import great_expectations as gx
    import pandas as pd

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    at_most = gx.expectations.ExpectColumnMaxToBeBetween
    expectations = [at_most(column=rule, max_value=allowed[rule], severity=GX_SEVERITY[severity]) for rule, severity in severities.items()]
    suite = context.suites.add(gx.ExpectationSuite(name="logs", expectations=expectations))
    batch = context.data_sources.add_pandas("records").add_dataframe_asset("metrics").add_batch_definition_whole_dataframe("now")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="logs", data=batch, suite=suite))
    outcome = definition.run(batch_parameters={"dataframe": pd.DataFrame([measured])}, result_format="BASIC")
    by_rule: dict[str, Any] = {result.expectation_config.kwargs["column"]: result for result in outcome.results}
    rules = []
    for rule, severity in severities.items():
        result = by_rule[rule]
        observed = result.result.get("observed_value")  # None: the column is not there
        rules.append(Rule(rule, 0 if observed is None else int(observed), "stop" if observed is None else severity, bool(result.success)))
    return rules


def _reason(platform: Platform, records: AnyRecords, rule: Rule, measured: dict[str, int]) -> str:
    table = next(t for t in TABLES if rule.rule.startswith(f"{t}."))
    counts = records.counts.get(table)
    if rule.rule not in measured or counts is None:
        return f"the rule {rule.rule} was not measured"
    if rule.rule == "decisions.accepted.some":
        return "no decision is left to learn from"
    if rule.rule != f"{table}.quarantined.share":
        return f"the rule {rule.rule}, which fastq.yaml lets stop, failed {rule.failed:,} times"
    rows, limit = counts.accepted + counts.quarantined, platform.validation.max_quarantined
    often = sorted((r.name for r in row_rules(platform, table) if r.severity == "quarantine"), key=lambda name: -measured.get(name, 0))[:1]
    said = f"{rule.failed:,} of {rows:,} rows of {table} ({rule.failed / max(rows, 1):.2%}) are quarantined, more than {limit:.2%}"
    most = "".join(f"; most often for {name} ({measured.get(name, 0):,})" for name in often)
    return f"{said}{most}; mend the logs, correct fastq.yaml, or raise validation.max_quarantined"
