"""What the console's pages show: one function for each page, from what the service, the registry and the metrics say to what a template prints."""

from __future__ import annotations

import json
import math
import re
import threading
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from fastq import charts, explanation
from fastq.assignment import held_out
from fastq.errors import FastqError, RequestError, UnknownPlayerError
from fastq.features import microseconds
from fastq.platform import OWN_POLICY, Platform
from fastq.policy import RARE
from fastq.workspace import Workspace
from serving import online
from serving.decision_log import now_us
from serving.desk import Desk
from serving.online import Question, Service, Subject

FOUND = 25  # players listed at a time
CHOICES = 100  # values of an attribute that can be chosen from
SAMPLED = 2_000  # players from whose states the overlap is read
POINTS = 41  # along one dimension of the action
RECENT = 20  # served decisions listed
TOLD = 20  # lines of the audit log


def day(value: datetime | int) -> str:
    at = datetime.fromtimestamp(value / 1e6, UTC) if isinstance(value, int) else value
    return f"{at:%-d %b}"


def words(name: str) -> str:
    """A name of the platform's as words."""
    return name.replace("_", " ")


def address(path: str = "", **query: object) -> str:
    """A page's address; what is None is left out."""
    given = urllib.parse.urlencode([(name, str(value)) for name, value in query.items() if value is not None])
    return f"/console{'/' if path else ''}{path}{'?' if given else ''}{given}"


# ---- finding a player ------------------------------------------------------------------------------------------------------
@dataclass
class Players:
    """Who is known, with attributes: the file that the last turn materialised, read again when it changes."""

    platform: Platform
    _read: tuple[int, pl.DataFrame] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def frame(self) -> pl.DataFrame:
        from feature_repo import store

        with self._lock:
            written = store.state_file(self.platform).stat().st_mtime_ns
            if self._read is None or self._read[0] != written:
                found = store.known_players(self.platform).sort("seen_at", "player_id", descending=[True, False], nulls_last=True)
                self._read = written, found
            return self._read[1]


def players_page(service: Service, players: Players, asked: Mapping[str, str]) -> dict[str, Any]:
    """Players whose id holds what was typed and whose attributes are those asked for, seen last first."""
    platform, frame = service.platform, players.frame()
    wanted = asked.get("q", "").strip()
    conditions = [pl.col("player_id").str.contains(wanted, literal=True)] if wanted else []
    fields, narrowed = [], bool(wanted)
    for i, (name, attribute) in enumerate(platform.state.attributes.items()):
        if attribute.kind == "categorical":
            chosen = asked.get(f"is.{i}", "")
            known = frame[name].drop_nulls().value_counts(sort=True).head(CHOICES)[name].sort().to_list()
            fields.append({"name": name, "key": f"is.{i}", "kind": "categorical", "chosen": chosen, "known": known})
            conditions += [pl.col(name) == chosen] if chosen else []
            narrowed |= bool(chosen)
        else:
            least, most = (asked.get(f"{end}.{i}", "").strip() for end in ("min", "max"))
            fields.append({"name": name, "key": f".{i}", "kind": "numeric", "least": least, "most": most})
            conditions += [pl.col(name) >= _float(least, f"{name}, at least")] if least else []
            conditions += [pl.col(name) <= _float(most, f"{name}, at most")] if most else []
            narrowed |= bool(least or most)
    found = frame.filter(conditions) if conditions else frame
    if wanted:  # an id that is exactly this comes first
        found = found.sort(pl.col("player_id") != wanted, maintain_order=True)
    shown = found.head(FOUND)
    counts = service.log.counts()
    return {
        "fields": fields,
        "filtered": any(f.get("chosen") or f.get("least") or f.get("most") for f in fields),
        "narrowed": narrowed,
        "wanted": wanted,
        "exactly": wanted in shown["player_id"],
        "players": shown.to_dicts(),
        "attributes": list(platform.state.attributes),
        "number_found": len(found),
        "number_known": len(frame),
        "decisions": counts["decisions"],
        "version": service.model.version if service.model else None,
        "objectives": [{"name": name, "weight": o.weight} for name, o in platform.objectives.items()],
        "action": _dimensions(platform),
        "policies": platform.policies,
    }


def _float(text: str, where: str) -> float:
    """Raises `RequestError` that names the field."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{where}: expected a number, got {text[:40]!r}")
    return value


def _dimensions(platform: Platform) -> list[dict[str, Any]]:
    if platform.action.kind == "catalogue":
        return []
    return [{"name": n, "unit": d.unit or "", "low": d.low, "high": d.high, "step": d.step} for n, d in platform.action.dimensions.items()]


# ---- a player now, a decision then -----------------------------------------------------------------------------------------
def asked_of(platform: Platform, query: Mapping[str, str], about: str) -> Question:
    """The question that an address asks. Raises `RequestError` where the id or a number is missing."""
    subject = query.get("id")
    if not subject:
        raise UnknownPlayerError("no id was given; find a player first")
    against: str | dict[str, Any] | None = query.get("against") or None
    if against == "action":
        against = typed_action(platform, query)
    elif against == "none":
        against = ""
    return Question(decision_id=subject, against=against) if about == "decision_id" else Question(player_id=subject, against=against)


def typed_action(platform: Platform, given: Mapping[str, str]) -> dict[str, Any]:
    """An action in the fields `a.0`, `a.1`, …, or `a.item`. Raises `RequestError` that names the dimension."""
    if not platform.dimension_names:
        return {"item_id": given.get("a.item", "").strip()}
    return online.checked_action(platform, {name: _float(given.get(f"a.{i}", ""), name) for i, name in enumerate(platform.dimension_names)}, "the action")


def subject_page(service: Service, question: Question) -> dict[str, Any]:
    """Everything on the page of a player now, or of a decision as it was decided then."""
    platform = service.platform
    try:
        subject = online.subject_of(service, Question(question.decision_id, question.player_id))
    except UnknownPlayerError as error:
        if question.player_id is None or not (given := service.log.recent([question.player_id], 0)):
            raise
        said = f"they were served {len(given)} decision{'s' * (len(given) != 1)} all the same, the last on {day(given[-1].decided_at)}"
        raise UnknownPlayerError(f"{error}; {said}: {explanation.amounts_words(given[-1].action, _units(platform))}") from None
    notice = None
    at = subject.policy.situations(subject.policy.encode(subject.states))
    usual = subject.policy.policies[int(at.assignment[0].argmax())]
    against = None if question.against == "" else usual if question.against is None else question.against
    try:
        answer = online.explain_subject(service, subject, Question(question.decision_id, question.player_id, against))
    except FastqError as error:  # a model that was deleted, an item that is no more: the rest can still be shown
        if question.against is None:
            raise
        notice, against = f"Cannot be compared with that: {error}", usual
        answer = online.explain_subject(service, subject, Question(question.decision_id, question.player_id, against))
    weights = dict(zip(platform.objectives, map(float, platform.weights), strict=True))
    contrast, attributions = answer["contrast"], answer["attributions"]
    moment = subject.decision.decided_at if subject.decision else now_us()
    past = _past(service, subject, moment)
    verdict = answer["evidence"]["verdict"]
    about = {"decision_id": question.decision_id} if question.decision_id else {"player_id": subject.player_id}
    return {
        "subject": subject,
        "about": about,
        "self_path": "decision" if question.decision_id else "player",
        "subject_id": question.decision_id or subject.player_id,
        "answer": answer,
        "notice": notice,
        "headline": _typeset(explanation.headline(answer, weights)),
        "attributes": _attributes(platform, subject),
        "policy_last": subject.states.policies[0] if subject.states.policies else None,
        "standing": _standing(service, subject),
        "dimensions": _shown_action(subject, at, answer),
        "parts": charts.parts_sum(answer["parts"], answer["value"], answer["low"], answer["high"]),
        "against": against if isinstance(against, str) else "action" if against else "none",
        "against_words": _against_words(against),
        "typed": against if isinstance(against, Mapping) else (contrast["action"] if contrast else answer["action"]),
        "alternatives": _alternatives(service, subject),
        "waterfall": None if contrast is None else charts.waterfall(
            contrast["parts"], contrast["decisive"], contrast["difference"], contrast["low"], contrast["high"]
        ),
        "responses": _responses(subject, at, answer),
        "moved": charts.amounts({words(n): v for n, v in attributions["measures"].items() if v}) if attributions else [],
        "moved_days": charts.columns(attributions["periods"], "how much each period of the history moved the value, oldest first") if attributions else "",
        "gap": attributions["completeness_gap"] if attributions else 0.0,
        "thin": _thin(verdict),
        "grade": _graded(
            answer["evidence"]["grade"], answer["evidence"]["width"], f"to {_against_words(against)}" if contrast else f"to what {usual} would do"
        ),
        "chances": sorted(zip(subject.policy.policies, at.assignment[0].tolist(), strict=True), key=lambda pair: -pair[1]),
        "outcomes": service.log.known([subject.decision.decision_id])[subject.decision.decision_id] if subject.decision else None,
        "decided_at": moment,
        "objectives": list(platform.objectives),
        "catalogue": platform.action.kind == "catalogue",
        **past,
    }  # fmt: skip


def _thin(verdict: str) -> list[str]:
    """What makes evidence thin, as sentences; none where it is not."""
    return [_typeset(why[0].upper() + why[1:]) for why in verdict.removeprefix("thin: ").split("; ")] if verdict.startswith("thin") else []


def _graded(name: str, width: float | None, between: str) -> dict[str, Any]:
    """The grade of the evidence in words and as a picture; `width` in times the usual, of the difference `between` the action and another."""
    names = list(explanation.GRADES)
    step = len(names) - names.index(name)
    return {"name": name, "names": names, "step": step, "width": width, "between": between, "meter": charts.meter(step, len(names))}


def _typeset(text: str) -> str:
    """Negative numbers with a true minus, as everywhere on a page."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", text)


def _attributes(platform: Platform, subject: Subject) -> dict[str, Any]:
    """What is known of the player, None where it is not; a state read just now holds columns, one that was kept a frame."""
    known = subject.states.attributes
    if not platform.state.attributes or known is None or isinstance(known, np.ndarray):
        return {}
    row = known.row(0, named=True) if isinstance(known, pl.DataFrame) else {name: column[0] for name, column in known.items()}
    return {name: None if value != value else value for name, value in row.items()}  # noqa: PLR0124 - NaN alone differs from itself


def _standing(service: Service, subject: Subject) -> str | None:
    """What keeps the recommendation from being served to this player, in words."""
    if subject.decision:
        return None
    if service.pause is not None:
        return "fastq is paused: nobody is recommended anything by it. What follows is what the model would say."
    if subject.player_id in service.excluded:
        return "This player is excluded: nothing is recommended to them. What follows is what the model would say."
    if service.platform.serving.holdout.share and held_out(service.platform, subject.player_id):
        return f"This player is held out for measurement and stays with {service.platform.serving.holdout.policy}. What follows is what the model would say."
    return None


def _past(service: Service, subject: Subject, moment: int) -> dict[str, Any]:
    """The weeks before `moment` as small charts on one axis, and the decisions in them."""
    platform, length, window = service.platform, microseconds(service.platform), service.platform.state.window
    first = moment // length - window
    history = np.asarray(subject.states.history[0], float)
    actions = None if subject.states.actions is None else np.asarray(subject.states.actions[0], float)
    outcomes = None if subject.states.objectives is None else np.asarray(subject.states.objectives[0], float)
    recent = [one for one in service.log.recent([subject.player_id], first * length) if one.decided_at < moment]
    served = {one.decided_at // length - first: one for one in recent}
    decided = np.isfinite(actions).any(1) if actions is not None else np.zeros(window, bool)
    marks = []
    for i in range(window):
        when = day((first + i) * length)
        if (one := served.get(i)) is not None:
            what = explanation.amounts_words(one.action, _units(platform))
            marks.append(charts.Mark(i, f"{when}, {one.policy}: {what}", address("decision", id=one.decision_id)))
        elif decided[i]:
            what = ""
            if platform.dimension_names and actions is not None:
                what = ": " + explanation.amounts_words(dict(zip(platform.dimension_names, map(float, actions[i]), strict=True)), _units(platform))
            marks.append(charts.Mark(i, f"{when}, from the platform's logs{what}"))
    nothing = {"measures": _empty(platform.state.measures, history), "followed": _empty(platform.objectives, outcomes)}
    measures = [
        charts.series(words(name), "", history[:, j], marks, bars=m.aggregate in {"sum", "count", "max"})
        for j, (name, m) in enumerate(platform.state.measures.items()) if words(name) not in nothing["measures"]
    ]  # fmt: skip
    done = [
        charts.series(words(d["name"]), d["unit"], actions[:, j], marks, bars=True, bounds=(min(0.0, d["low"]), d["high"]))
        for j, d in enumerate(_dimensions(platform)) if actions is not None and decided.any()
    ]  # fmt: skip
    followed = [
        charts.series(words(name), "", outcomes[:, j], marks, bars=True)
        for j, name in enumerate(platform.objectives) if outcomes is not None and words(name) not in nothing["followed"]
    ]  # fmt: skip
    listed = [
        {
            "decision_id": one.decision_id,
            "decided_at": one.decided_at,
            "policy": one.policy,
            "action": explanation.amounts_words(one.action, _units(platform)),
            "outcomes": one.values,
        }
        for one in reversed(recent[-RECENT:])
    ]
    return {
        "measures": measures, "done": done, "followed": followed, "nothing": nothing, "marks": charts.decisions_strip(marks, window) if marks else None,
        "number_marked": len(marks),
        "first_day": day(first * length), "last_day": day((first + window - 1) * length), "periods": window, "listed": listed,
    }  # fmt: skip


def _empty(names: Iterable[str], values: np.ndarray | None) -> list[str]:
    """Which columns of the weeks [W, names] hold nothing, as words."""
    return [words(name) for j, name in enumerate(names) if values is None or not np.isfinite(values[:, j]).any()]


def _units(platform: Platform) -> dict[str, str]:
    return {d["name"]: d["unit"] for d in _dimensions(platform)}


def _reach(subject: Subject, at: Any) -> np.ndarray:
    """[2, D] how far the evidence reaches, in raw units and inside the bounds."""
    d = len(subject.policy.platform.bounds)
    return np.clip(subject.policy.units.raw(at.reach[0].numpy()[:, :d]), *subject.policy.platform.bounds.T)


def _shown_action(subject: Subject, at: Any, answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each dimension of the action on its allowed range."""
    platform = subject.policy.platform
    if not platform.dimension_names:
        return []
    reach, contrast = _reach(subject, at), answer["contrast"]
    return [
        {**d, "value": answer["action"][d["name"]], "other": contrast["action"][d["name"]] if contrast else None,
         "gauge": charts.gauge(
             d["low"], d["high"], (float(reach[0, j]), float(reach[1, j])), answer["action"][d["name"]], contrast["action"][d["name"]] if contrast else None
         )}
        for j, d in enumerate(_dimensions(platform))
    ]  # fmt: skip


def _responses(subject: Subject, at: Any, answer: Mapping[str, Any]) -> list[charts.Panel]:
    """How the value changes, against that of the action itself, as one dimension moves and the others stay."""
    policy = subject.policy
    platform = policy.platform
    if not platform.dimension_names:
        return []
    chosen = np.array([answer["action"][name] for name in platform.dimension_names], float)
    contrast, reach = answer["contrast"], _reach(subject, at)
    own = policy.parts(at, chosen[None, None]).sum(-1)[0] @ platform.weights
    experts = policy.expert_actions(at)[0]
    acts = set(answer["evidence"]["policies"])
    drawn = []
    for j, d in enumerate(_dimensions(platform)):
        low, high = max(d["low"], float(reach[0, j])), min(d["high"], float(reach[1, j]))
        along = np.unique(np.append(np.linspace(low, high, POINTS), np.clip(chosen[j], low, high)))
        tried = np.repeat(chosen[None], len(along), 0)
        tried[:, j] = along
        value = policy.parts(at, tried[None]).sum(-1)[0] @ platform.weights - own[0]
        half = explanation.CERTAINTY * policy.doubt(at, tried[None], np.repeat(chosen[None, None], len(along), 1))[0]
        drawn.append(
            charts.response(
                charts.Response(
                    words(d["name"]), d["unit"], d["low"], d["high"], (low, high), along, value, half, float(chosen[j]),
                    contrast["action"][d["name"]] if contrast else None,
                    {name: float(experts[k, j]) for k, name in enumerate(policy.policies) if name in acts},
                    [near["action"][d["name"]] for near in answer["evidence"]["nearest"] if d["name"] in near["action"]],
                )
            )
        )  # fmt: skip
    return drawn


def _alternatives(service: Service, subject: Subject) -> list[tuple[str, str]]:
    """What an action may be compared with, as (value, words)."""
    from fastq import registry

    found = [(name, f"{name} (policy)") for name in subject.policy.policies]
    if subject.logged is not None:
        found.append(("logged", "what was really done" if subject.decision else "what was last done"))
    try:
        versions = [str(model["version"]) for model in registry.models(service.platform)]
    except FastqError:  # the registry is away; the page need not be
        versions = []
    found += [(f"model:{version}", f"model {version}") for version in versions if version != subject.policy.version]
    return [*found, ("action", "an action of my own"), ("none", "nothing")]


def _against_words(against: object) -> str:
    if isinstance(against, str):
        return {"logged": "what was really done"}.get(against, against.replace("model:", "model ", 1))
    return "the action you typed" if against else ""


# ---- what if -----------------------------------------------------------------------------------------------------------------
def what_if_page(service: Service, given: Mapping[str, str]) -> dict[str, Any]:
    """The sliders and the answer to where they stand. Fields: `player` or `decision`, `w.0`, `w.1`, … weights, `a.0`, … the action."""
    platform = service.platform
    player, decision = given.get("player") or None, given.get("decision") or None
    if (player is None) == (decision is None):
        raise UnknownPlayerError("no player was named; find one first")
    subject = online.subject_of(service, Question(decision, player))
    policy = subject.policy
    usual = dict(zip(platform.objectives, map(float, platform.weights), strict=True))
    weights = {name: _float(given[f"w.{i}"], name) if f"w.{i}" in given else weight for i, (name, weight) in enumerate(usual.items())}
    usual_action = {f"a.{i}": str(subject.action[name]) for i, name in enumerate(platform.dimension_names)} or {"a.item": str(subject.action.get("item_id"))}
    action = typed_action(platform, usual_action | dict(given))
    found = explanation.imagine(policy, subject.states, online.as_array(policy, subject.action), online.as_array(policy, action), weights)
    names = [(objective, horizon) for objective in platform.objectives for horizon in explanation.HORIZONS]
    parts = [{"objective": o, "horizon": h, "value": v} for (o, h), v in zip(names, found.parts.ravel().tolist(), strict=True)]
    sliders = []
    for i, (name, weight) in enumerate(weights.items()):
        edge = max(3 * abs(usual[name]), abs(weight), 1.0)
        low, high = (-edge, 0.0) if usual[name] < 0 and weight <= 0 else (0.0, edge) if usual[name] > 0 and weight >= 0 else (-edge, edge)
        sliders.append({"key": f"w.{i}", "name": name, "value": weight, "low": low, "high": high, "step": (high - low) / 60, "usual": usual[name]})
    moves = [
        {**d, "key": f"a.{i}", "value": action[d["name"]], "usual": subject.action[d["name"]], "step": d["step"] or (d["high"] - d["low"]) / 200}
        for i, d in enumerate(_dimensions(platform))
    ]
    rows = [
        {"name": said, "action": _action_of(platform, found.actions[key]), "platform": found.values[key][0], "yours": found.values[key][1]}
        for key, said in (("recommended", "recommended"), ("best", "best under your weights"), ("imagined", "your action"))
    ]
    return {
        "subject": subject, "about": {"decision": decision} if decision else {"player": player}, "self_path": "decision" if decision else "player",
        "subject_id": decision or player, "sliders": sliders, "moves": moves, "rows": rows, "dimensions": _dimensions(platform), "found": found,
        "same_weights": all(math.isclose(weights[n], usual[n], abs_tol=1e-12) for n in weights), "item": action.get("item_id", ""),
        "catalogue": not platform.dimension_names,
        "waterfall": charts.waterfall(parts, found.decisive, found.difference, found.low, found.high) if found.parts.any() else None,
        "items": policy.catalogue.ids[:500] if policy.catalogue is not None else [],
        "thin": _thin(found.verdict),
        "grade": _graded(found.grade, found.width if math.isfinite(found.width) else None, "to what the likeliest policy would do"),
    }  # fmt: skip


def _action_of(platform: Platform, action: Any) -> dict[str, Any]:
    return dict(zip(platform.dimension_names, map(float, action), strict=True)) if platform.dimension_names else {"item_id": str(action)}


# ---- policies ------------------------------------------------------------------------------------------------------------------
@dataclass
class Overlap:
    """How far the policies meet in the same states, over players as they are now; found once per model and turn."""

    platform: Platform
    _found: tuple[tuple[str, int], dict[str, Any]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, service: Service) -> dict[str, Any]:
        """policies; `matrix` [K][K]: in the states where one acts, how often another would; `share` [K]; `usual` [K][D] what each does on average; players."""
        from fastq import features
        from feature_repo import store

        model = service.current()
        with self._lock:
            key = (model.version, store.state_file(self.platform).stat().st_mtime_ns)
            if self._found is None or self._found[0] != key:
                frame = store.materialized(self.platform, SAMPLED)
                at = model.policy.situations(model.policy.encode(features.states_at(self.platform, frame, frame["event_timestamp"][0])))
                chance = at.assignment.numpy()
                matrix = (chance.T @ chance) / np.maximum(chance.sum(0), 1e-9)[:, None]
                usual = np.zeros((chance.shape[1], 0))
                if model.policy.catalogue is None:
                    usual = (chance[:, :, None] * model.policy.expert_actions(at)).sum(0) / chance.sum(0)[:, None]
                self._found = key, {
                    "policies": model.policy.policies, "matrix": matrix.tolist(), "share": chance.mean(0).tolist(),
                    "usual": usual.tolist(), "players": len(frame),
                }  # fmt: skip
            return self._found[1]


def policies_page(service: Service, sample: Overlap, objective: str | None) -> dict[str, Any]:
    """The overlap of the policies, and what each is estimated to bring, by the report that stands with the model."""
    platform, overlap = service.platform, sample.of(service)
    report = service.current().policy.details.get("evaluation") or {}
    wanted = objective if objective in platform.objectives else None
    rows = [row for row in report.get("estimates", []) if row["objective"] == wanted]
    first = {row["policy"]: row for row in reversed(rows)}  # the panel's first estimator is the one that the gate goes by
    ordered = sorted(first.values(), key=lambda row: -row["value"])
    drawn = charts.intervals([(row["value"], row["low"], row["high"], "own" if row["policy"] == OWN_POLICY else "behaviour") for row in ordered])
    digits = max(0, charts.digits_for(max((abs(row["value"]) for row in ordered), default=1.0) or 1.0) - 1)
    return {
        "overlap": overlap,
        "cells": [[charts.heat(value) for value in row] for row in overlap["matrix"]],
        "lonely": [
            overlap["policies"][k] for k, row in enumerate(overlap["matrix"])
            if len(row) > 1 and max(v for j, v in enumerate(row) if j != k) < RARE
        ],
        "estimates": [
            {**row, "chart": chart, "shown": f"{row['value']:.{digits}f}", "range": f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"}
            for row, chart in zip(ordered, drawn, strict=True)
        ],
        "others": [row for row in rows if row is not first.get(row["policy"])],
        "difference": report.get("difference"),
        "compared": report.get("against"),
        "guardrails": report.get("guardrails", []),
        "players": report.get("players"),
        "judged": report.get("decisions"),
        "objective": wanted,
        "objectives": list(platform.objectives),
        "dimensions": _dimensions(platform),
        "version": service.current().version,
    }  # fmt: skip


# ---- models --------------------------------------------------------------------------------------------------------------------
def models_page(desk: Desk) -> dict[str, Any]:
    """The registered versions, and the last lines of the audit log."""
    from fastq import registry

    service, workspace = desk.open(), Workspace(desk.platform.root)
    found = [
        {**model, "passed": model["verdict"].startswith("passed"), "sentence": model["verdict"].split(": ", 1)[0],
         "reasons": model["verdict"].split(": ", 1)[1].split("; ") if ": " in model["verdict"] else []}
        for model in registry.models(desk.platform)
    ]  # fmt: skip
    aliases = {alias: model["version"] for model in found for alias in model["aliases"]}
    return {
        "models": found,
        "champion": aliases.get(registry.CHAMPION),
        "previous": aliases.get(registry.PREVIOUS),
        "in_service": service.model.version if service.model else None,
        "audit": told(workspace),
    }


def told(workspace: Workspace) -> list[dict[str, Any]]:
    """The last lines of the audit log, newest first."""
    if not workspace.audit.exists():
        return []
    lines = workspace.audit.read_text(encoding="utf-8", errors="replace").splitlines()[-TOLD:]
    found = []
    for line in reversed(lines):
        try:
            said = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if isinstance(said, dict):
            found.append({name: said.get(name) for name in ("at", "who", "action", "version", "previous", "reason", "forced")})
    return found


def change_champion(platform: Platform, form: Mapping[str, str], who: str) -> str:
    """Do what the form says and give the version that is champion now. Raises `RequestError` without a reason, `GateRefused` unless forced."""
    from fastq import registry

    reason = form.get("reason", "").strip()
    if not reason:
        raise RequestError("A reason is needed; it is kept in the audit log.")
    if form.get("what") == "rollback":
        return registry.rollback(platform, who=who, reason=reason)
    return registry.promote(platform, form.get("version", ""), reason=reason, forced=form.get("forced") == "yes", who=who)


# ---- health --------------------------------------------------------------------------------------------------------------------
def health_page(desk: Desk, state: Mapping[str, str]) -> dict[str, Any]:
    """How this process does since it started, by its own metrics."""
    from fastq import registry

    metrics, service = desk.metrics, desk.open()
    routes = []
    for route, buckets, total in _histograms(metrics.seconds, "route"):
        if route.startswith(("/v1/", "/console")):
            shown = [_quantile(buckets, total, share) for share in (0.5, 0.95, 0.99)]
            counts = np.diff([0.0, *(count for _, count in buckets)]).tolist()
            label = f"{route}: {total:.0f} answers in {len(buckets)} classes of latency from 1 ms to over 10 s"
            routes.append({"route": route, "total": int(total), "quantiles": [_milliseconds(q) for q in shown], "chart": charts.histogram(counts, label, 22)})
    served = sum(s.value for s in _samples(metrics.decisions, "_total"))
    degraded = {s.labels["reason"]: s.value for s in _samples(metrics.degraded, "_total")}
    try:
        models = registry.models(desk.platform)
    except FastqError:
        models = []
    return {
        "state": {name: said for name, said in state.items() if name != "paused"},
        "paused": None if state["paused"] == "no" else state["paused"],
        "ready": state["champion"] == "ok" and state["log"] == "ok",
        "routes": sorted(routes, key=lambda r: -r["total"]),
        "served": int(served),
        "degraded": sorted(degraded.items(), key=lambda pair: -pair[1]),
        "degraded_share": sum(degraded.values()) / served if served else None,
        "lag": service.log.lag_seconds,
        "backlog": service.log.backlog,
        "counts": service.log.counts(),
        "trained": models[0] if models else None,
        "version": service.model.version if service.model else None,
        "audit": told(Workspace(desk.platform.root))[:5],
        "at": datetime.now(UTC),
    }


def _samples(metric: Any, suffix: str) -> list[Any]:
    return [sample for family in metric.collect() for sample in family.samples if sample.name.endswith(suffix)]


def _histograms(metric: Any, label: str) -> list[tuple[str, list[tuple[float, float]], float]]:
    """(label's value, cumulative counts by upper bound, number) of each histogram."""
    found: dict[str, list[tuple[float, float]]] = {}
    for sample in _samples(metric, "_bucket"):
        found.setdefault(sample.labels[label], []).append((float(sample.labels["le"]), sample.value))
    return [(name, sorted(buckets), max(count for _, count in buckets)) for name, buckets in found.items()]


def _quantile(buckets: Sequence[tuple[float, float]], total: float, share: float) -> float:
    """Seconds, interpolated inside the bucket; the last bound where it lies beyond."""
    below, start = 0.0, 0.0
    for bound, count in buckets:
        if count >= share * total and math.isfinite(bound):
            return start + (bound - start) * (share * total - below) / ((count - below) or 1.0)
        below, start = count, bound if math.isfinite(bound) else start
    return start


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
