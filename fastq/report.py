"""Plots and HTML: what people look at. Every page is one file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fastq.overlap import Chances, Overlap
from fastq.platform import Platform
from fastq.records import TABLES, AnyRecords
from fastq.validation import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PAIRS = 12  # of policies in the picture; all are in the table
SHOWN_ROWS = 100  # quarantined rows on the page; all of them are in the Parquet file

_STYLE = """
  :root { --ink: #1c2024; --soft: #60666d; --paper: #fcfcfa; --card: #ffffff; --line: #dfe2e5; --good: #1b7f4b; --bad: #b3261e; --warn: #8a5a00; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e8eaed; --soft: #a2a9b0; --paper: #15181b; --card: #1c2024; --line: #343a40; --good: #5fcf94; --bad: #ff8f85; --warn: #e5b567; }
  }
  * { box-sizing: border-box; }
  body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
  h1 { margin: 0; font-size: 1.5rem; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.1rem; }
  p, ul { max-width: 48rem; margin: .4rem 0; } small, .soft { color: var(--soft); }
  .good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
  .verdict { border-left: 5px solid currentColor; padding: .25rem 0 .25rem 1rem; margin: 1.25rem 0; }
  .verdict > * { color: var(--ink); } .verdict > strong { font-size: 1.15rem; color: inherit; }
  .wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
  table { border-collapse: collapse; width: 100%; font-size: .9rem; }
  th, td { padding: .45rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
  tbody tr:last-child > * { border-bottom: 0; } th { font-weight: 600; color: var(--soft); }
  td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } code { font: .85rem ui-monospace, monospace; overflow-wrap: anywhere; }
  details { margin-top: .75rem; } summary { cursor: pointer; } td.reason { min-width: 20rem; } td.content { min-width: 22rem; }
  figure { margin: 1rem 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; } svg { width: 100%; height: auto; }
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{% block title %}{% endblock %}</title>
<style>{{ style }}</style>
</head>
<body>
{% block page %}{% endblock %}
</body>
</html>
"""

_VALIDATION_PAGE = """\
{% extends "page" %}
{% block title %}{{ platform }}: {{ "logs accepted" if verdict.passed else "logs refused" }}{% endblock %}
{% block page %}
<header>
  <h1>Logs of {{ platform }}</h1>
  <small>{{ at }} UTC{% if first %} · decisions from {{ first }} to {{ last }}{% endif %}</small>
</header>
<main>
<section class="verdict {{ 'good' if verdict.passed else 'bad' }}">
  <strong>{{ "Accepted" if verdict.passed else "Refused" }}</strong>
  <p>{{ sentence }}</p>
  {% if verdict.reasons %}<ul>{% for reason in verdict.reasons %}<li>{{ reason }}</li>{% endfor %}</ul>{% endif %}
</section>

<h2>Rows</h2>
<div class="wide"><table>
  <thead><tr><th>Table</th><th class="n">Read</th><th class="n">Accepted</th><th class="n">Quarantined</th><th class="n">Repeated</th></tr></thead>
  <tbody>{% for table, c in counts.items() %}
  <tr><td>{{ table }}</td><td class="n">{{ "{:,}".format(c.accepted + c.quarantined + c.repeated) }}</td><td class="n">{{ "{:,}".format(c.accepted) }}</td>
    <td class="n{{ ' bad' if c.quarantined }}">{{ "{:,}".format(c.quarantined) }}</td><td class="n">{{ "{:,}".format(c.repeated) }}</td></tr>{% endfor %}
  </tbody>
</table></div>

{% macro rules_table(rules) %}
<div class="wide"><table>
  <thead><tr><th>Rule</th><th>When broken</th><th class="n">Failed</th><th>Verdict</th></tr></thead>
  <tbody>{% for rule in rules %}
  <tr><td><code>{{ rule.rule }}</code></td><td>{{ does[rule.severity] }}</td><td class="n">{{ "{:,}".format(rule.failed) }}</td>
    <td class="{{ 'good' if rule.passed else 'warn' if rule.severity == 'warn' else 'bad' }}">{{ "kept" if rule.passed else "broken" }}</td></tr>{% endfor %}
  </tbody>
</table></div>
{% endmacro %}
<h2>Rules</h2>
{% if broken %}<p>{{ broken | length }} of {{ verdict.rules | length }} rules are broken.</p>{{ rules_table(broken) }}
{% else %}<p>All {{ verdict.rules | length }} rules are kept.</p>{% endif %}
<details><summary>{{ kept | length }} rules that are kept</summary>{{ rules_table(kept) }}</details>

{% if warnings %}<h2>Worth knowing</h2>
<ul>{% for warning in warnings %}<li>{{ warning }}</li>{% endfor %}</ul>{% endif %}

{% if overlaps %}<h2>Where the policies meet</h2>
<p>How often one policy is to be found in the states in which another acts, told by a classifier of players it had not seen. Where it is not,
  nobody can tell from these logs what it would have brought.</p>
{% if picture %}<img class="wide" alt="For each pair of policies, how their states are spread over the chance that the one rather than the other acts"
  src="data:image/png;base64,{{ picture }}">{% endif %}
<div class="wide"><table>
  <thead><tr><th>In the states of</th><th>acts too</th><th class="n">Decisions</th><th class="n">Share of states</th><th class="n">Overlap</th>
    <th>Counterfactuals</th></tr></thead>
  <tbody>{% for pair in overlaps %}
  <tr><td>{{ pair.policy }}</td><td>{{ pair.against }}</td><td class="n">{{ "{:,}".format(pair.decisions) if pair.decisions else "too few" }}</td>
    <td class="n">{{ "{:.0%}".format(pair.shared) if pair.shared is not none }}</td>
    <td class="n">{{ "{:.2f}".format(pair.common) if pair.common is not none }}</td>
    <td class="{{ 'good' if pair.answerable else 'warn' }}">{{ "can be answered" if pair.answerable else "cannot be answered" }}</td></tr>{% endfor %}
  </tbody>
</table></div>{% endif %}

<h2>Quarantined rows</h2>
{% if rows %}
<p>{% if total > rows | length %}The first {{ rows | length }} of {{ "{:,}".format(total) }}; all{% else %}All{% endif %}
  are in the quarantine's Parquet file, with their reasons.</p>
<div class="wide"><table>
  <thead><tr><th>Table</th><th>File and row</th><th>Reason</th><th>Content</th></tr></thead>
  <tbody>{% for row in rows %}
  <tr><td>{{ row.table }}</td><td>{{ row.file }}{% if row.row %}<br><span class="soft">row {{ "{:,}".format(row.row) }}</span>{% endif %}</td>
    <td class="reason">{{ row.reason }}</td><td class="content"><code>{{ row.content }}</code></td></tr>{% endfor %}
  </tbody>
</table></div>
{% else %}<p>None.</p>{% endif %}
</main>
{% endblock %}
"""


def validation_page(platform: Platform, records: AnyRecords, verdict: Verdict, overlaps: Sequence[Overlap] = (), chances: Chances | None = None) -> str:
    """The validation report as one HTML page: verdict, rows, rules, warnings, where policies meet, and the first quarantined rows with their reasons."""
    decisions = records.counts["decisions"]
    sentence = f"{decisions.accepted:,} decisions are good, {decisions.quarantined:,} are quarantined and {decisions.repeated:,} are repeats."
    at = pl.col("decided_at")
    first, last = records.held("decisions").lazy().select(at.min().alias("first"), at.max().alias("last")).collect(engine="streaming").row(0)
    shown = ["table", "file", "row", "reason", "content"]
    refused = [part.select(shown).head(SHOWN_ROWS).collect() for part in records.held("quarantine").parts]
    rows = pl.concat(refused).sort("file", "row", nulls_last=True).sort(pl.col("table").cast(pl.Enum(TABLES)), maintain_order=True)
    return _rendered(
        _VALIDATION_PAGE,
        platform=platform.platform,
        first=f"{first!s:.10}" if first else None,
        last=f"{last!s:.10}" if last else None,
        verdict=verdict,
        sentence=sentence,
        counts=records.counts,
        broken=[rule for rule in verdict.rules if not rule.passed],
        kept=[rule for rule in verdict.rules if rule.passed],
        does={"stop": "stops", "quarantine": "quarantines the row", "warn": "warns"},
        warnings=verdict.warnings,
        overlaps=overlaps,
        picture=_overlap_picture(chances) if chances else None,
        rows=rows.head(SHOWN_ROWS).to_dicts(),
        total=sum(counts.quarantined for counts in records.counts.values()),
    )


def _overlap_picture(chances: Chances) -> str:
    """For each pair of policies the states of the one (up) and of the other (down) by the chance that the first acts rather than the second; PNG, base64."""
    from matplotlib.figure import Figure

    pairs = [(a, b) for a in range(len(chances.policies)) for b in range(a)][:MOST_PAIRS]
    columns = min(len(pairs), 3)
    figure = Figure(figsize=(3.4 * columns, 2.2 * -(-len(pairs) // columns)), layout="constrained", facecolor="white")
    for axes, (a, b) in zip(figure.subplots(-(-len(pairs) // columns), columns, squeeze=False).flat, pairs, strict=False):
        chance = chances.chance[:, b] / (chances.chance[:, a] + chances.chance[:, b])
        for policy, sign, colour in ((b, 1, GAIN), (a, -1, LOSS)):
            height, edges = np.histogram(chance[chances.acted == policy], bins=20, range=(0, 1))
            axes.bar(edges[:-1], sign * height / max(height.sum(), 1), width=0.05, align="edge", color=colour, label=_literal(chances.policies[policy]))
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_yticks([])
        axes.set_xlabel(_literal(f"chance of {chances.policies[b]} rather than {chances.policies[a]}"), fontsize=8, color=SOFT)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "left", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


# ---- one candidate before the gate --------------------------------------------------------------------------------------------
_EVALUATION_PAGE = """\
{% extends "page" %}
{% block title %}{{ title }}: {{ "passed" if d.promoted else "refused" }}{% endblock %}
{% block page %}
<header>
  <h1>{{ title }}</h1>
  <small>{{ at }} UTC · {{ "{:,}".format(d.decisions) }} decisions of {{ "{:,}".format(d.players) }} players that training never saw
    · decisions until {{ d.data_until or "unknown" }}</small>
</header>
<main>
<section class="verdict {{ 'good' if d.promoted else 'bad' }}">
  <strong>{{ "The gate passed it" if d.promoted else "The gate refused it" }}</strong>
  {% if d.difference %}<p>Against {{ d.against }}, on the same decisions: {{ plus(d.difference.value) }}, {{ plus(d.difference.low) }} to
    {{ plus(d.difference.high) }} at {{ d.alpha_because }}. {{ d.difference.verdict | capitalize }}; {{ rows(d.difference.ess) }} rows count,
    {{ share(d.difference.top_share) }} of the weight lies in the heaviest 1 % of rows, overlap {{ share(d.difference.overlap) }}.</p>{% endif %}
  {% if d.reasons %}<ul>{% for reason in d.reasons %}<li>{{ reason }}</li>{% endfor %}</ul>{% endif %}
  {% if d.notes %}<ul class="soft">{% for note in d.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
</section>

<h2>What each policy would bring, acting alone</h2>
<p>The mean over the held-out players' decision states of the discounted sum that follows; intervals of 95 %, which hold the error of the fitted models too.</p>
<figure>{{ picture }}</figure>

{% if d.warnings %}<section class="verdict warn"><strong>The cross-checks disagree</strong>
  <ul>{% for warning in d.warnings %}<li>{{ warning }}</li>{% endfor %}</ul></section>{% endif %}
<h2>Cross-checks of the candidate's weighted sum</h2>
<div class="wide"><table>
  <thead><tr><th>By</th><th class="n">Value</th><th class="n">Low</th><th class="n">High</th><th>Verdict</th></tr></thead>
  <tbody>{% for row in d.cross_checks %}
  <tr><td>{{ words(row.estimator) }}</td><td class="n">{{ number(row.value) }}</td>
    <td class="n">{{ number(row.low) }}</td>
    <td class="n">{{ number(row.high) }}</td>
    <td class="{{ tone(row.verdict) }}">{{ row.verdict }}</td></tr>{% endfor %}
  </tbody>
</table></div>

{% if d.guardrails %}<h2>Guardrails, per decision</h2>
<div class="wide"><table>
  <thead><tr><th>Objective</th><th class="n">Value</th><th class="n">Low</th><th class="n">High</th>
    <th class="n">Floor</th><th class="n">Ceiling</th><th>Verdict</th></tr></thead>
  <tbody>{% for row in d.guardrails %}
  <tr><td>{{ row.objective }}</td><td class="n">{{ number(row.value) }}</td>
    <td class="n">{{ number(row.low) }}</td>
    <td class="n">{{ number(row.high) }}</td>
    <td class="n">{{ number(row.floor) }}</td><td class="n">{{ number(row.ceiling) }}</td>
    <td class="{{ tone(row.verdict) }}">{{ row.verdict }}</td></tr>{% endfor %}
  </tbody>
</table></div>{% endif %}

{% if d.segments %}<h2>Segments: the difference to {{ d.against }}</h2>
<div class="wide"><table>
  <thead><tr><th>Segment</th><th class="n">Players</th><th class="n">That count</th><th class="n">Difference</th>
    <th class="n">Low</th><th class="n">High</th></tr></thead>
  <tbody>{% for row in d.segments %}
  <tr><td>{{ row.attribute }}: {{ row.segment }}</td><td class="n">{{ row.players }}</td><td class="n">{{ rows(row.effective_players) }}</td>
    <td class="n">{{ number(row.value) }}</td>
    <td class="n">{{ number(row.low) }}</td><td class="n">{{ number(row.high) }}</td></tr>{% endfor %}
  </tbody>
</table></div>{% endif %}

{% if d.densities %}<h2>Propensities that were not logged</h2>
<p>They are estimated, per policy, by models that saw none of the player they speak of. What rests on them is marked in every verdict. An action upon a bound
  has no density and gets none.</p>
<div class="wide"><table>
  <thead><tr><th>Policy</th><th class="n">Estimated</th><th class="n">Upon a bound</th><th class="n">Log likelihood</th><th class="n">Without the state</th>
    <th>Intervals of 50, 80, 95 % hold</th><th>In words</th></tr></thead>
  <tbody>{% for row in d.densities %}
  <tr><td>{{ row.policy }}</td><td class="n">{{ "{:,}".format(row.estimated) }}</td><td class="n">{{ share(row.atoms) }}</td>
    <td class="n">{{ number(row.log_likelihood) }}</td><td class="n">{{ number(row.baseline) }}</td>
    <td>{% for name, levels in row.coverage.items() %}{{ name }}: {{ shares(levels.values()) }}{{ "" if loop.last else "; " }}{% endfor %}</td>
    <td class="{{ 'warn' if row.poor else 'good' }}">{{ row.sentence }}</td></tr>{% endfor %}
  </tbody>
</table></div>{% endif %}

<h2>All estimates</h2>
<div class="wide"><table>
  <thead><tr><th>Policy</th><th>Objective</th><th>Estimator</th><th class="n">Value</th>
    <th class="n">Low</th><th class="n">High</th><th class="n">Rows that count</th>
    <th class="n">In the top 1 %</th><th class="n">Overlap</th><th>Verdict</th></tr></thead>
  <tbody>{% for row in d.estimates %}
  <tr><td>{{ row.policy }}</td><td>{{ row.objective or "weighted sum" }}</td><td>{{ words(row.estimator) }}</td><td class="n">{{ number(row.value) }}</td>
    <td class="n">{{ number(row.low) }}</td><td class="n">{{ number(row.high) }}</td><td class="n">{{ rows(row.ess) }}</td>
    <td class="n">{{ share(row.top_share) }}</td>
    <td class="n">{{ share(row.overlap) }}</td><td class="{{ tone(row.verdict) }}">{{ row.verdict }}</td></tr>{% endfor %}
  </tbody>
</table></div>
</main>
{% endblock %}
"""


def evaluation_page(platform: Platform, document: Mapping[str, Any], version: str | None = None) -> str:
    """What the logs say of one candidate (as `evaluation.Report.to_dict`), and what the gate made of it, as one HTML page with its picture inside."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4g}"

    return _rendered(
        _EVALUATION_PAGE,
        title=f"{platform.platform} version {version}" if version else f"A candidate for {platform.platform}",
        d={"notes": [], "densities": [], **document},
        picture=_safe(_as_svg(estimates_figure(document["estimates"]))),
        number=number,
        plus=lambda value: f"{value:+.4g}",
        rows=lambda value: f"{value:,.0f}",
        share=lambda value: "–" if value is None else f"{value:.0%}",
        shares=lambda values: ", ".join(f"{value:.0%}" for value in values),
        words=lambda name: "FAST-Q's own Q" if name == "fast_q" else name.replace("_", " "),
        tone=lambda verdict: "good" if verdict.startswith("trust") else "warn",
    )


def estimates_figure(estimates: Sequence[Mapping[str, Any]]) -> Figure:
    """The weighted sum of every policy with its interval, the best estimator of each; an open circle where the verdict is not to trust it."""
    from matplotlib.figure import Figure

    best: dict[str, Mapping[str, Any]] = {}
    for row in estimates:
        if row["objective"] is None:
            best.setdefault(row["policy"], row)
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(best)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for place, row in enumerate(best.values()):
        axes.plot([row["low"], row["high"]], [place, place], color=GAIN, lw=2, solid_capstyle="butt")
        axes.plot(row["value"], place, "o", color=GAIN, ms=8, mfc=GAIN if row["verdict"].startswith("trust") else "white")
        axes.text(row["high"], place, f"  {row['value']:.4g}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(best)), [_literal(name) for name in best])
    axes.set_ylim(len(best) - 0.5, -0.5)
    axes.set_xlabel("weighted sum, discounted; open: do not trust", fontsize=8, color=SOFT)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color="#e5e8eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure


def _rendered(page: str, **values: Any) -> str:
    """One of the pages above, in the frame that all share."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(loader=DictLoader({"page": _PAGE}), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(page).render(style=_safe(_STYLE), at=f"{datetime.now(UTC):%Y-%m-%d %H:%M}", **values)


def _as_svg(figure: Figure) -> str:
    """The picture as an element of a page: no file, no link, nothing that says when or where it was drawn."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _safe(text: str) -> Any:
    """Markup of our own, which a template must not escape."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - the style sheet above and Matplotlib's drawing, in which names are drawn as outlines


# ---- whether explanations tell the truth ------------------------------------------------------------------------------------
_TRUTH_PAGE = """\
{% extends "page" %}
{% block title %}{{ title }}: do its explanations tell the truth?{% endblock %}
{% block page %}
<header>
  <h1>Do the explanations of {{ title }} tell the truth?</h1>
  <small>{{ at }} UTC · asked of the simulator: {{ d.states }} players who were served on a platform of their own (seed {{ d.seed }}), each action lived
    through {{ d.lives }} times for {{ d.days }} days on the same luck</small>
</header>
<main>
<h2>Stated and true differences</h2>
<p>The recommended action against another one in the same state, what it brings from then on under the policy itself. Of intervals of 90 % nine in ten should
  hold the truth; what the simulation itself does not know is added to them.</p>
<figure>{{ picture }}</figure>
<div class="wide"><table>
  <thead><tr><th>Against</th><th class="n">Intervals that hold the truth</th><th class="n">95 % of that share</th><th class="n">Half width</th>
    <th class="n">Mean error</th><th class="n">Size of an error</th></tr></thead>
  <tbody>{% for row in d.contrasts %}
  <tr><td>{{ row.against }}</td><td class="n">{{ share(row.share) }} of {{ row.of }}</td><td class="n">{{ share(row.low) }} to {{ share(row.high) }}</td>
    <td class="n">{{ number(row.half_width) }}</td><td class="n">{{ number(row.mean_error) }}</td>
    <td class="n">{{ number(row.size_of_error) }}</td></tr>{% endfor %}
  </tbody>
</table></div>

<h2>Stated reasons</h2>
<ul>
  <li>{{ share(d.reasons.single.share) }} of {{ d.reasons.single.of }} single reasons whose truth luck does not hide hold.</li>
  <li>{{ share(d.reasons.together.share) }} of {{ d.reasons.together.of }} sets of decisive reasons speak for the action in truth, taken together.</li>
</ul>

<h2>Warnings</h2>
<ul>
  <li>Evidence is called thin for {{ share(d.warnings.thin) }}; the mean error is {{ number(d.warnings.error_thin) }} there and
    {{ number(d.warnings.error_else) }} elsewhere.</li>
  <li>The largest quarter of errors is told by the grade of the evidence with an area under the curve of {{ number(d.warnings.area) }}, by the yes or no of
    the verdict with {{ number(d.warnings.area_of_verdict) }}, by the stated width of the interval with {{ number(d.warnings.area_of_width) }} (0.5 is chance,
    1 is always).</li>
</ul>
<div class="wide"><table>
  <thead><tr><th>Grade of the evidence</th><th class="n">Given to</th><th class="n">Mean error</th></tr></thead>
  <tbody>{% for row in d.warnings.grades %}
  <tr><td>{{ row.grade }}</td><td class="n">{{ row.of }}</td><td class="n">{{ number(row.error) }}</td></tr>{% endfor %}
  </tbody>
</table></div>

<h2>Attributions</h2>
<p>How far the model's value moves when measures of a player are as if never known: those that the attribution calls most important, any, the least
  important.</p>
<div class="wide"><table>
  <thead><tr><th class="n">Deleted</th><th class="n">By attribution</th><th class="n">At random</th><th class="n">The least first</th></tr></thead>
  <tbody>{% for row in d.deletion %}
  <tr><td class="n">{{ row.measures }}</td><td class="n">{{ number(row.by_attribution) }}</td><td class="n">{{ number(row.at_random) }}</td>
    <td class="n">{{ number(row.least_first) }}</td></tr>{% endfor %}
  </tbody>
</table></div>
</main>
{% endblock %}
"""


def truth_page(title: str, document: Mapping[str, Any]) -> str:
    """What `truth.examine` found of one model's explanations, as one HTML page with its picture inside."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return _rendered(
        _TRUTH_PAGE,
        title=title,
        d=document,
        picture=_safe(_as_svg(truth_figure(document["pairs"]))),
        number=number,
        share=lambda value: "–" if value is None else f"{value:.0%}",
    )


def truth_figure(pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Stated differences with their intervals over the true ones, a panel per kind of alternative; on the line the two agree."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(pair["against"] for pair in pairs))
    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        true, stated, half = np.array([[pair["true"], pair["stated"], pair["half"]] for pair in pairs if pair["against"] == kind]).T
        ends = [min(true.min(), stated.min()), max(true.max(), stated.max())]
        axes.plot(ends, ends, color=SOFT, lw=1, ls=(0, (4, 3)))
        axes.errorbar(true, stated, half, fmt="o", ms=3, color=GAIN, ecolor="#a9cdd2", elinewidth=0.8)
        axes.set_title(_literal(f"against {kind}"), fontsize=9, color=INK)
        axes.set_xlabel("true difference", fontsize=8, color=SOFT)
        axes.set_ylabel("stated, with its 90 % interval", fontsize=8, color=SOFT)
        axes.tick_params(colors=INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# ---- one explanation as a picture -----------------------------------------------------------------------------------------
INK, SOFT, GAIN, LOSS, TOTAL = "#1c2024", "#60666d", "#1b7f8c", "#c8553d", "#3b4252"  # gain and loss differ in lightness too, for every kind of sight


def explanation_figure(answer: Mapping[str, Any], path: Path | None = None) -> Figure:
    """One explanation (as the endpoint answers it) as a figure: parts that start where the last one ended and end at the total.

    Beside them, where there is an alternative, what it differs by. `path` also writes it, in the format of its suffix (.png, .svg, .pdf).
    """
    from matplotlib.figure import Figure

    from fastq.explanation import action_words, part_words, sentences

    contrast, units = answer.get("contrast"), answer.get("units") or {}
    rows = len(answer["parts"]) + 1
    figure = Figure(figsize=(12.5 if contrast else 8.0, 2.7 + 0.36 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2 if contrast else 1, squeeze=False)[0]
    names = [part_words(part) for part in answer["parts"]]
    _add_up(axes[0], names, [part["value"] for part in answer["parts"]], answer, "value")
    axes[0].set_title(_literal(f"Value of {action_words(answer['action'], units)}"), loc="left", fontsize=11, color=INK, wrap=True)
    if contrast:
        decisive = {tuple(reason) for reason in contrast["decisive"]}
        marked = [(part["objective"], part["horizon"]) in decisive for part in contrast["parts"]]
        _add_up(axes[1], names, [part["value"] for part in contrast["parts"]], contrast, "difference", marked)
        alternative = f"{contrast['against']}: " if isinstance(contrast["against"], str) else ""
        axes[1].set_title(_literal(f"Difference from {alternative}{action_words(contrast['action'], units)}"), loc="left", fontsize=11, color=INK, wrap=True)
    said = "\n".join(line for sentence in sentences(answer) for line in wrap(sentence, 150 if contrast else 95))
    figure.supxlabel(_literal(said), x=0.01, ha="left", fontsize=9, color=SOFT, linespacing=1.5)
    who = answer.get("player_id") or answer.get("decision_id") or "one player"
    version = f" (model version {answer['model_version']})" if answer.get("model_version") else ""
    figure.suptitle(_literal(f"Why {who} gets {action_words(answer['action'], units)}{version}"), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _add_up(axes: Axes, names: list[str], values: list[float], estimate: Mapping[str, Any], total: str, marked: list[bool] | None = None) -> None:
    """Bars from top to bottom, each from where the last one ended, then their sum with its 90 % interval."""
    ends = [sum(values[: i + 1]) for i in range(len(values))]
    starts, last = [0.0, *ends[:-1]], len(values)
    axes.barh(range(last), values, left=starts, height=0.62, color=[GAIN if value >= 0 else LOSS for value in values])
    axes.barh(last, estimate[total], height=0.62, color=TOTAL)
    axes.errorbar(estimate[total], last, xerr=[[estimate[total] - estimate["low"]], [estimate["high"] - estimate[total]]], color="black", capsize=4, lw=1.3)
    for i, end in enumerate(ends):
        axes.plot([end, end], [i + 0.31, i + 0.69], color=SOFT, lw=0.8)  # hands the running sum to the next bar
    shown = [0.0, *ends, estimate["low"], estimate["high"]]
    room = (max(shown) - min(shown)) or 1.0
    digits = max(0, 3 - math.floor(math.log10(room)))  # one precision in a column, so that what is read adds up too
    for i, (start, value) in enumerate(zip([*starts, 0.0], [*values, estimate[total]], strict=True)):
        right = max(start, start + value) if i < last else max(estimate["high"], 0.0)
        axes.text(right + 0.015 * room, i, f"{value:+z.{digits}f}", va="center", fontsize=9, color=INK, fontweight="bold" if i == last else "normal")
    axes.set_yticks(range(last + 1), [_literal(name) for name in names] + [f"{total}, 90 % interval"], fontsize=9)
    for label, bold in zip(axes.get_yticklabels(), [*(marked or [False] * last), True], strict=True):
        label.set_fontweight("bold" if bold else "normal")
    axes.axvline(0, color=INK, lw=0.9)
    axes.axhline(last - 0.5, color=SOFT, lw=0.6)
    axes.set_xlim(min(shown) - 0.05 * room, max(shown) + 0.2 * room)
    axes.set_ylim(last + 0.6, -0.6)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="x", color="#e5e8eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    meaning = "\nbold: enough to outweigh every drawback" if marked and any(marked) else ""
    axes.set_xlabel(f"objective × weight; now: from this decision, later: from all that follow{meaning}", fontsize=8, color=SOFT)


def _literal(text: str) -> str:
    """Text of somebody else's, which must not be read as a formula."""
    return text.replace("$", r"\$")


# ---- one finding of the monitor as a picture ---------------------------------------------------------------------------------
def drift_figure(says: str, days: list[float], doubt: float, now: float, window: int) -> Figure:
    """The reference's days, oldest first, with the band in which nine days of ten lie (`doubt`: a day's standard error), and the mean of the last `window`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
    axes = figure.subplots()
    middle = sum(days) / len(days)
    half = 1.645 * max(doubt, (sum((d - middle) ** 2 for d in days) / max(len(days) - 1, 1)) ** 0.5)
    axes.axhspan(middle - half, middle + half, color="#e5e8eb", lw=0)
    axes.axhline(middle, color=SOFT, lw=0.8)
    axes.plot(range(-len(days), 0), days, color=INK, marker="o", ms=3, lw=1)
    axes.plot([0.5, 0.5 + window], [now, now], color=LOSS, lw=3, solid_capstyle="butt")
    axes.set_title(_literal("\n".join(wrap(says, 95))), loc="left", fontsize=10, color=INK)
    axes.set_xlabel("days before (grey: nine of ten days of the last retraining's logs) and now (red)", fontsize=8, color=SOFT)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return figure
