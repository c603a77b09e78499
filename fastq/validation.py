"""The data gate: Great Expectations judges how often the rows of the logs broke each rule of the platform file.

Polars counts (`records.metrics`), because it sees NaN and infinity everywhere and takes one pass; Great Expectations holds the
suite, one expectation for each rule, and gives the verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastq.platform import Platform
from fastq.records import TABLES, Records, Severity, row_rules, table_rules

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
    """Whether the logs may be learned from. `reasons` has a sentence for each stopping rule that failed."""

    passed: bool
    rules: list[Rule]
    reasons: list[str]


def rules_of(platform: Platform) -> dict[str, Severity]:
    """Every rule that a platform file implies, and what breaking it does: stop, quarantine the row, or warn."""
    logged = [table for table in TABLES if getattr(platform.logs, table) is not None]
    stop: dict[str, Severity] = {"decisions.accepted.some": "stop", **{f"{table}.quarantined.share": "stop" for table in logged}}
    rows = {rule.name: rule.severity for table in logged for rule in row_rules(platform, table)}
    return {**stop, **rows, **dict.fromkeys(table_rules(platform), "warn")}


def validate(platform: Platform, records: Records) -> Verdict:
    """Judge the records by the platform's rules.

    The gate fails if a stopping rule fails: no decision is left, or more than `validation.max_quarantined` of a table's rows
    (repeats left out) are quarantined. A rule that was not measured counts as broken and stops.
    """
    measured = {**records.metrics, "decisions.accepted.some": int(records.counts["decisions"].accepted == 0)}
    allowed = dict.fromkeys(rules_of(platform), 0)
    for table, counts in records.counts.items():
        measured[f"{table}.quarantined.share"] = counts.quarantined
        # the product of a decimal share and a count may fall short of the whole number it stands for
        allowed[f"{table}.quarantined.share"] = math.floor(platform.validation.max_quarantined * (counts.accepted + counts.quarantined) + 1e-9)
    rules = _judge(rules_of(platform), measured, allowed)
    reasons = [_reason(platform, records, rule, measured) for rule in rules if rule.severity == "stop" and not rule.passed]
    return Verdict(not reasons, rules, reasons)


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


def _reason(platform: Platform, records: Records, rule: Rule, measured: dict[str, int]) -> str:
    table = next(t for t in TABLES if rule.rule.startswith(f"{t}."))
    counts = records.counts.get(table)
    if rule.rule not in measured or counts is None:
        return f"the rule {rule.rule} was not measured"
    if rule.rule == "decisions.accepted.some":
        return "no decision is left to learn from"
    rows, limit = counts.accepted + counts.quarantined, platform.validation.max_quarantined
    often = sorted((r.name for r in row_rules(platform, table) if r.severity == "quarantine"), key=lambda name: -measured.get(name, 0))[:1]
    said = f"{rule.failed:,} of {rows:,} rows of {table} ({rule.failed / max(rows, 1):.2%}) are quarantined, more than {limit:.2%}"
    most = "".join(f"; most often for {name} ({measured.get(name, 0):,})" for name in often)
    return f"{said}{most}; mend the logs, correct fastq.yaml, or raise validation.max_quarantined"
