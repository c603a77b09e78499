"""What people read: each command's document as tables and sentences for a terminal.

A view takes the document that `--json` would print and yields what rich prints, or bytes that go out as they are. rich is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

Document = Mapping[str, Any]


def _table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def _number(value: object) -> str:
    """Four significant digits, and a word for what is not there."""
    if value is None:
        return "none"
    return f"{value:,.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def written(document: Document) -> Iterable[RenderableType]:
    yield f"Written: {document['written']}, with {len(document['guesses'])} comments at what was guessed. Read them, then: fastq validate"


def validation(document: Document) -> Iterable[RenderableType]:
    failing = [rule for rule in document["rules"] if not rule["passed"]]  # a share that is allowed is no failure
    if failing:
        table = _table("Rules that rows broke", "rule", "rows", "severity", numbers=["rows"])
        for rule in failing:
            table.add_row(rule["rule"], f"{rule['failed']:,}", rule["severity"])
        yield table
    counts = ", ".join(f"{document[name]:,} {name}" for name in ("accepted", "quarantined", "repeated"))
    yield f"Decisions: {counts}; {len(document['rules'])} rules."
    for warning in document.get("warnings", []):
        yield f"[yellow]Warning:[/] {plain(warning)}"
    if any(rule["failed"] for rule in document["rules"] if rule["rule"].endswith(".quarantined.share")):  # of any table
        yield f"Refused rows with their reasons: {document['quarantine']}"
    yield f"Report: {document['report']}"
    yield "[green]Passed.[/]" if document["passed"] else "[red]Refused.[/] " + plain("; ".join(document.get("reasons", [])) or "see the report")


def training(document: Document) -> Iterable[RenderableType]:
    name = f"{document['model']} version {document['version']}"
    if document["promoted"]:
        yield f"[green]{name} is the champion.[/]"
    else:
        yield f"[red]{name} was not promoted.[/]" if document["version"] else f"[red]{document['model']}: no model was made.[/]"
    for reason in document["reasons"]:
        yield f"  {plain(reason)}"
    if start := document.get("start"):
        yield f"  Trained {plain(start)}."
    if not document["promoted"] and document["version"]:
        yield f"Look at it with fastq evaluate {document['version']}; fastq promote {document['version']} --force --reason TEXT overrules the gate."


def estimates(document: Document) -> Iterable[RenderableType]:
    table = _table(
        "Off-policy estimates",
        "policy",
        "objective",
        "estimator",
        "value",
        "low",
        "high",
        "rows that count",
        "verdict",
        numbers=["value", "low", "high", "rows that count"],
    )
    for row in document["estimates"]:
        objective = "weighted sum" if row["objective"] is None else row["objective"]
        table.add_row(row["policy"], objective, row["estimator"], *(_number(row[name]) for name in ("value", "low", "high", "ess")), plain(row["verdict"]))
    yield table
    for warning in document.get("warnings", []):
        yield f"[yellow]{plain(warning)}[/]"
    if difference := document.get("difference"):
        low, high = (_number(difference[name]) for name in ("low", "high"))
        yield f"Against {document['against']}: {_number(difference['value'])} ({low} to {high}), {plain(document['alpha_because'])}."
    for reason in document.get("reasons", []):
        yield f"The gate would refuse it: {plain(reason)}"
    if "report" in document:
        yield f"Report: {document['report']}"


def benchmark(document: Document) -> Iterable[RenderableType]:
    for found in document.get("worlds", ()):
        heads = ["value", "95 % interval", "way", "lead of fastq", "seconds"]
        table = _table(f"In truth, per player and day: {found['world']}", "method", *heads, numbers=heads)
        for row in found["rows"]:
            table.add_row(row["method"], f"{row['value']:.3f}", _between(row["low"], row["high"]), f"{row['way']:.0%}", _lead(row), _seconds(row))
        yield table
        if found["headline"]:
            changes = ", ".join(f"{name} {change['percent']:+.1f} %" for name, change in found["headline"]["changes"].items())
            yield f"Simulated A/B against the best rival, {found['headline']['against']}: {changes}."
    if "rows" in document:
        heads = ["value", "95 % interval", "rows that count", "seconds"]
        table = _table("Estimated off-policy, on players that no method saw", "method", *heads, "verdict", numbers=heads)
        for row in document["rows"]:
            interval, rows = _between(row["low"], row["high"]), _number(row["ess"])
            table.add_row(row["method"], _number(row["value"]), interval, rows, _seconds(row), plain(row["verdict"]))
        yield table
    for note in document["notes"]:
        yield f"[yellow]Note:[/] {plain(note)}"
    yield f"Picture: {document['picture']}; raw cells: {document['cells']}"


def _between(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _lead(row: Document) -> str:
    return f"{row['lead']:+.3f}" + ("" if row["lead_low"] is None else f" ({row['lead_low']:+.3f} to {row['lead_high']:+.3f})")


def _seconds(row: Document) -> str:
    return "" if row["seconds"] is None else f"{row['seconds']:.0f}"


def recommendations(document: Document) -> Iterable[RenderableType]:
    rows = document["recommendations"]
    actions = list(dict.fromkeys(name for row in rows for name in row["action"]))
    units = {name: unit for row in rows for name, unit in (row.get("units") or {}).items() if unit}
    heads = [f"{name} [{units[name]}]" if name in units else name for name in actions]
    table = _table(
        "Recommendations", "player", *(head.replace("[", "\\[") for head in heads), "value", "propensity", "decision", "note", numbers=["value", "propensity"]
    )
    for row in rows:
        shown = [_number(row["action"].get(name)) for name in actions]
        table.add_row(plain(row["player_id"]), *shown, _number(row["value"]), _number(row["propensity"]), row["decision_id"], plain(row["degraded"] or ""))
    yield table
    if rows:
        yield f"Model version {rows[0]['model_version']}. Why: fastq explain {rows[0]['decision_id']}"
    else:
        yield "[red]Nobody could be served.[/]"


def batch(document: Document) -> Iterable[RenderableType]:
    yield f"{document.get('players', 0):,} recommendations in {document['out']}."
    if document.get("degraded"):
        yield f"{document['degraded']:,} of them are degraded answers."


def explained(document: Document) -> Iterable[RenderableType]:
    yield f"{document['players']:,} players explained in {plain(document['out'])}, by model version {document['model_version']}, as of {document['at']}."
    if document["resumed"]:
        yield "What an earlier run had done was taken up."


def imported(document: Document) -> Iterable[RenderableType]:
    yield f"{document['episodes']:,} episodes, {document['steps']:,} steps, {document['terminated']:,} ended by themselves."
    yield f"Policies: {', '.join(document['policies'])}."
    yield f"Written to {plain(document['written'])}. Next, there: fastq retrain"


def exported(document: Document) -> Iterable[RenderableType]:
    parity = document["parity"]
    yield f"Version {document['model_version']} is in {plain(document['out'])}: {', '.join(document['files'])}."
    yield f"onnxruntime answers as fastq does for {parity['states']} states, to {parity['largest_difference']:.1g}. What goes in and comes out: model.json"


def views(document: Document) -> Iterable[RenderableType]:
    for view in document["tables"]:
        table = _table(plain(f"{view['name']}: {view['says']}"), "column", "type", "unit", "")
        for column in view["columns"]:
            table.add_row(*(plain(column[name]) for name in ("name", "type", "unit", "says")))
        yield table


def rows(document: Document) -> Iterable[RenderableType]:
    kinds = [{type(row[i]) for row in document["rows"]} - {type(None)} for i in range(len(document["columns"]))]
    table = _table("")
    for name, kind in zip(document["columns"], kinds, strict=True):
        table.add_column(plain(name), justify="right" if kind and kind <= {int, float} else "left", overflow="fold")
    for row in document["rows"]:
        table.add_row(*(plain(_cell(value)) for value in row))
    yield table
    yield f"{len(document['rows']):,} row{'s' * (len(document['rows']) != 1)}."


def _cell(value: object) -> str:
    """As a table shows it: whole numbers whole, others to six digits."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else _text(value)


def _text(value: object) -> str:
    """As CSV has it: nothing for null, JSON for what is nested."""
    import orjson

    if value is None:
        return ""
    return orjson.dumps(value).decode() if isinstance(value, list | dict | bool) else str(value)


def comma_separated(document: Document) -> Iterable[bytes]:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(document["columns"])
    writer.writerows([_text(value) for value in row] for row in document["rows"])
    yield text.getvalue().encode()


def _parts_table(title: str, parts: Iterable[Document], total: float) -> Any:
    table = _table(title, "objective", "horizon", "part", numbers=["part"])
    for part in parts:
        table.add_row(part["objective"], part["horizon"].replace("_", " "), f"{part['value']:+.4f}")
    table.add_section()
    table.add_row("sum", "", f"{total:+.4f}", style="bold")
    return table


def _action(action: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in action.items())


def explanation(document: Document) -> Iterable[RenderableType]:
    yield f"[bold]{plain(document['player_id'])}[/]: {plain(_action(document['action']))} (model version {document['model_version']})"
    yield _parts_table(f"Value {document['value']:+.4f}, between {document['low']:+.4f} and {document['high']:+.4f}", document["parts"], document["value"])
    score = document["score"]
    yield f"Ranked by {score['total']:+.4f} = value {score['value']:+.4f} - caution {score['caution']:.4f} - guardrail {score['guardrail']:.4f}"
    if contrast := document.get("contrast"):
        against = contrast["against"] if isinstance(contrast["against"], str) else "the action given"
        title = f"Against {against} ({_action(contrast['action'])}): {contrast['difference']:+.4f}, between {contrast['low']:+.4f} and {contrast['high']:+.4f}"
        yield _parts_table(plain(title), contrast["parts"], contrast["difference"])
        decisive = ", ".join(f"{objective} ({horizon.replace('_', ' ')})" for objective, horizon in contrast["decisive"])
        yield f"Enough to decide it: {decisive}" if decisive else "Nothing speaks for it over the alternative."
    if what_if := document.get("what_if"):
        yield _parts_table(f"Under other weights: {plain(_action(what_if['action']))}", what_if["parts"], what_if["value"])
    attributions, evidence = document["attributions"], document["evidence"]
    strongest = sorted(attributions["measures"].items(), key=lambda pair: -abs(pair[1]))[:5]
    if strongest:
        yield (
            "Moved most by " + ", ".join(f"{plain(name)} {value:+.4f}" for name, value in strongest) + f" (unexplained: {attributions['completeness_gap']:.4f})"
        )
    acting = plain(", ".join(evidence["policies"]) or "none")
    yield f"Evidence: {evidence['grade']}; {plain(evidence['verdict'])}; policies that act in such a state: {acting}"


def forgotten(document: Document) -> Iterable[RenderableType]:
    if document["removed"]:
        table = _table(f"Removed {plain(document['player_id'])}", "where", "rows", numbers=["rows"])
        for entry in document["removed"]:
            table.add_row(plain(entry["where"]), f"{entry['rows']:,}")
        yield table
    else:
        yield f"Nothing is kept of {plain(document['player_id'])} any more."
    yield from document["notes"]


def new_key(document: Document) -> Iterable[RenderableType]:
    yield f"Key {document['id']} ({document['role']}), shown this once:"
    yield f"[bold]{document['key']}[/]"


def keys(document: Document) -> Iterable[RenderableType]:
    table = _table("API keys", "id", "role", "created", "expires", "revoked")
    for key in document["keys"]:
        table.add_row(key["id"], key["role"], key["created_at"], key["expires_at"] or "", key["revoked_at"] or "")
    yield table if document["keys"] else "There are no keys yet: fastq keys create --role recommend"


def models(document: Document) -> Iterable[RenderableType]:
    table = _table("Models", "version", "aliases", "created", "verdict")
    for model in document["models"]:
        table.add_row(str(model["version"]), ", ".join(model["aliases"]), str(model["created_at"]), plain(str(model["verdict"])))
    yield table if document["models"] else "There are no models yet: fastq retrain"
    if "history" in document:
        done = _table("History", "when", "who", "what", "version", "why")
        for line in document["history"]:
            what = f"{line['action']}{' (forced)' if line.get('forced') else ''}"
            done.add_row(str(line["at"]), plain(str(line["who"])), what, str(line.get("version") or ""), plain(str(line.get("reason") or "")))
        yield done


def deployed(document: Document) -> Iterable[RenderableType]:
    table = _table(f"Deployments on {plain(document['server'])}", "deployment", "when", "id")
    for row in document["deployments"]:
        table.add_row(row["name"], row["when"], row["id"])
    yield table
    yield f"A worker runs them: PREFECT_API_URL={plain(document['server'])} prefect worker start --pool {plain(document['pool'])}"


def monitored(document: Document) -> Iterable[RenderableType]:
    yield f"{document['checked']} tests on what arrived from {document['from'] or 'nowhere'} to {document['at']}, against version {document['version']}'s logs."
    for finding in document["findings"]:
        yield f"[red]{plain(finding['says'])}[/]" + (f" Picture: {plain(finding['picture'])}" if finding.get("picture") else "")
    for note in document["notes"]:
        yield plain(note)
    if document.get("rolled_back_to"):
        yield f"[red]Rolled back to version {document['rolled_back_to']}.[/]"
    if not document["findings"]:
        yield "[green]Nothing was found.[/]"


def lifted(document: Document) -> Iterable[RenderableType]:
    if not document["rows"]:
        for reason in document["reasons"]:
            yield f"[red]{plain(reason)}[/]"
        return
    title = f"{document['policy']} less {document['against']}, per decision, {document['level']:.0%} at all times"
    table = _table(plain(title), "objective", "value", "low", "high", "players", numbers=["value", "low", "high", "players"])
    for row in document["rows"]:
        table.add_row(row["objective"] or "weighted sum", *(_number(row[name]) for name in ("value", "low", "high")), f"{row['players']:,}")
    yield table
    yield f"{document['held']:,} held-out players stay with {plain(document['against'])}; counted from {document['since']} on."


def examined(document: Document) -> Iterable[RenderableType]:
    table = _table("", "", "what", "found")
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]look[/]", "wrong": "[red]wrong[/]"}
    for check in document["checks"]:
        mend = f"\n[dim]→ {plain(check['mend'])}[/]" if check["mend"] else ""
        table.add_row(marks[check["status"]], check["name"], plain(check["says"]) + mend)
    yield table


def backed_up(document: Document) -> Iterable[RenderableType]:
    sealed = "encrypted" if document["encrypted"] else "not encrypted: whoever has the file has your players' data"
    yield f"{document['files']:,} files, {document['bytes'] / 2**20:,.1f} MiB, in {plain(document['file'])} ({document['size'] / 2**20:,.1f} MiB, {sealed})."
    yield from (f"Expired, deleted: {plain(file)}" for file in document["expired"])


def restored(document: Document) -> Iterable[RenderableType]:
    kept = f"; {document['kept']:,} files of your own that were there stayed as they are" if document["kept"] else ""
    yield f"The workspace of {document['made_at']}, {document['files']:,} files, is in {plain(document['root'])}{kept}. Look it over: fastq doctor"
    if document["forgotten"]:
        yield f"{document['forgotten']:,} players were forgotten since and stand in it again: `fastq retrain` leaves them out; forget them again for the rest."


def promoted(document: Document) -> Iterable[RenderableType]:
    yield f"[green]{document['model']} version {document['version']} is the champion.[/]"


def paused(document: Document) -> Iterable[RenderableType]:
    if document["paused"]:
        instead = f"every player gets the proposal of {document['policy']}" if document["policy"] else "every player gets the default action"
        yield f"[yellow]Paused[/] since {document['since']}: {plain(instead)}. `fastq resume` ends it."
    else:
        yield "[green]fastq decides again.[/]" if document["changed"] else "fastq was not paused."


def plain(text: str) -> str:
    """Text of somebody else's, which must not be read as markup."""
    from rich.markup import escape

    return escape(text)
