"""Flow `monitor`: one look at what arrived since the last retraining; a finding is told once, drawn, posted and starts a retraining.

Under `.fastq/monitor/`: `reference.json` (what the last retraining's logs looked like), `promised-VERSION.json` (what the gate's estimates promise of
a version's immediate outcomes), `state.json` (findings that were told, by reference and version).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from prefect import flow, task

from fastq import features, monitoring, ope, records, registry, report, windows
from fastq.errors import UnknownPlayerError, WorkspaceError
from fastq.monitoring import DAY, WINDOWS, Shape, Watched
from fastq.platform import OWN_POLICY, Platform
from fastq.windows import Windows
from fastq.workspace import Workspace, replacing
from pipelines.materialize import windows_of
from pipelines.notify import notify
from pipelines.train import trained_policy
from pipelines.turn import EACH_TIME, ONCE_A_TURN, RETRIES, Progress, platform_of, progress, relative, running

if TYPE_CHECKING:
    from fastq.evaluation import Held, Target
    from fastq.policy import Policy

WHO = "monitor"  # in the audit log
WRONG_ANSWERS = 0.2  # share of degraded answers of a day above which something is amiss whatever was before
LEAST_ANSWERS = 50


# ---- what a retraining leaves for the monitor ----------------------------------------------------------------------------------
@task(name="note the reference", **RETRIES, **ONCE_A_TURN)
def note_reference(workspace: str, turn: str) -> dict[str, Any]:
    """What the logs look like, and what the new policy promises: the mean immediate value per decision as served, with the gate's estimator and level."""
    platform = platform_of(workspace)
    until = monitoring.reached(monitoring.as_exported(platform, records.read_tables(platform)))
    _write(platform, "reference.json", {"turn": turn, "until": max(until.decisions, until.activity).isoformat() if until else None, "by_hours": {}})
    directory, data = Workspace(platform.root).runs / turn, windows_of(workspace, turn)
    policy = trained_policy(directory)
    promised = promises(policy, data)
    day = _midnight(until.full) if until else None
    probes = monitoring.probes_before(policy, data, day) if day else {}
    balance = {"until": day.isoformat() if day else None, "probes": {str(window): asdict(probe) for window, probe in probes.items()}}
    for name, said in (("promised.json", [asdict(promise) for promise in promised]), ("balance.json", balance)):
        with replacing(directory / name) as partial:
            partial.write_text(json.dumps(said), encoding="utf-8")
    return {"promises": len(promised)}


def _midnight(moment: datetime) -> datetime:
    """The last one up to a moment."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def promises(policy: Policy, data: Windows) -> list[monitoring.Promise]:
    """What a policy promises, from logs that it has not learned from: by the gate's estimator at the gate's level, none where that refuses.

    Outcomes less what the policy expects of them are estimated as any other outcome.
    """
    from fastq import evaluation

    platform, held = policy.platform, evaluation.hold(policy, data)
    rows, target = held.rows, evaluation.served_target(policy, held)
    expected = np.full_like(held.windows.reward, np.nan)
    expected[rows] = policy.parts(held.at, held.windows.action[rows][:, None])[:, 0, :, 0]
    beyond = held.windows.reward - expected
    wanted = monitoring.combinations(platform, held.windows.reward[rows], beyond[rows])
    weights = np.array([[named.get(name, 0.0) for name in platform.objectives] for named in wanted.values()])
    low = [_estimated(platform, held, target, reward, weights) for reward in (held.windows.reward, beyond)]
    spent = monitoring.shares(wanted)
    return [
        monitoring.Promise(name, named, first.value, first.low, None if second is None else second.low, spent[name])
        for (name, named), first, second in zip(wanted.items(), *low, strict=True)
        if first is not None
    ]


def _estimated(platform: Platform, held: Held, target: Target, reward: np.ndarray, weights: np.ndarray) -> list[ope.Estimate | None]:
    """Of each combination [K, M] of the immediate rewards [N, M] under the target."""
    from fastq import evaluation

    if not np.isfinite(reward[held.rows]).any():
        return [None] * len(weights)
    asked = replace(held, windows=replace(held.windows, reward=reward))
    terms = evaluation.estimators(asked, target, np.zeros((len(held.rows), len(platform.objectives))), platform.training.seed).terms
    found: list[ope.Estimate | None] = []
    for combined in weights:
        rng = np.random.default_rng(platform.training.seed)
        answers = ope.estimate(terms[0], objective_weights=combined, rng=rng, level=1 - 2 * platform.training.alpha) if terms else []
        found.append(next((a for a in answers if a.objective is None and not isinstance(a, ope.Refusal)), None))
    return found


def keep_promise(workspace: str, turn: str, version: str) -> None:
    """What this turn's policy promises, and how well its state hid who acts, under the version that it became."""
    platform = platform_of(workspace)
    names = ("promised", "balance")
    said = {name: Workspace(platform.root).runs / turn / f"{name}.json" for name in names}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in said.items() if path.exists()}
    if found:
        _write(platform, f"promised-{version}.json", {"version": version, **found})


def _write(platform: Platform, name: str, tree: dict[str, Any]) -> None:
    with replacing(Workspace(platform.root).monitor / name) as partial:
        partial.write_text(json.dumps(tree), encoding="utf-8")


def _read(platform: Platform, name: str) -> dict[str, Any]:
    path = Workspace(platform.root).monitor / name
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WorkspaceError(f"{path}: damaged ({error}); remove it, the next retraining writes it again") from None
    return found


# ---- one look ------------------------------------------------------------------------------------------------------------------
@task(name="look", **RETRIES, **EACH_TIME)
def one_look(workspace: str, now: str) -> dict[str, Any]:
    """`findings` that stand, the `new` ones among them, and what was done about a broken guardrail."""
    platform, moment = platform_of(workspace), datetime.fromisoformat(now)
    tell = progress.get()
    tell("looking", 0, 3, {})
    kept = _read(platform, "reference.json")
    if not kept.get("until"):
        raise WorkspaceError(f"{platform.root}: there is nothing to compare with yet; run `fastq retrain` first")
    after = datetime.fromisoformat(kept["until"])
    read = monitoring.as_exported(platform, records.read_records(platform, min(after, moment) - (max(WINDOWS) + 1) * DAY))
    watched, shapes = _reference(platform, kept, read)
    tell("looking", 1, 3, {})
    version = registry.champion(platform)
    findings = [_finding(platform, found, watched) for found in monitoring.look(platform, read, watched, shapes, after)]
    findings += _stale(platform, read, moment) + _answers(platform, moment)
    notes: list[str] = []
    tests = (len(watched) + 2) * len(WINDOWS)
    rolled_back = None
    if version is not None:
        since = registry.promoted_at(platform, version)
        own = _of_champion(platform, version, since)
        said = _read(platform, f"promised-{version}.json")
        promised = [monitoring.Promise(**each) for each in said.get("promised", []) if "weights" in each]
        lost, asked = _balance(platform, version, said.get("balance") or {}, read, len(watched) + 1)
        findings += [_finding(platform, found, watched) for found in lost]
        tests += len(promised) * len(WINDOWS) + asked
        if promised and not own.is_empty():
            policy = registry.load_policy(f"models:/{platform.platform}/{version}", platform.root)
            known = monitoring.with_expected(platform, policy, own)
            findings += [_finding(platform, found, watched) for found in monitoring.broken_promises(known, promised)]
        for broken in monitoring.broken_guardrails(platform, own):
            finding, rolled_back = _roll_back(platform, version, broken)
            findings.append(finding)
            if rolled_back is not None:
                break
        notes.append(
            f"{own.height:,} decisions of champion {version} since it was promoted, {own.drop_nulls(list(platform.objectives)).height:,} with every outcome."
        )
    tell("looking", 2, 3, {})
    state = _read(platform, "state.json")
    again = state.get("turn") == kept["turn"]
    told = {key: at for key, at in state.get("told", {}).items() if again or key.endswith(f"@{version}")}  # a champion's own are told once, not each turn
    new = [finding for finding in findings if _told(finding, version) not in told]
    for finding in new:
        told[_told(finding, version)] = now
        finding["picture"] = _picture(platform, finding, watched)
    _write(platform, "state.json", {"turn": kept["turn"], "told": told, "looked_at": now, "findings": len(findings)})
    tell("looking", 3, 3, {})
    return {
        "version": version,
        "at": now,
        "from": kept["until"],
        "checked": tests,
        "findings": findings,
        "new": [finding["key"] for finding in new],
        "drift": any(finding["family"] not in ("volume", "answers", "guardrail") for finding in new),
        "rolled_back_to": rolled_back,
        "notes": notes,
    }


def _reference(platform: Platform, kept: dict[str, Any], read: records.Records) -> tuple[dict[str, Watched], dict[str, Shape]]:
    """What the last retraining's logs looked like in days that end at the hours at which the logs end now; made once for each of these hours."""
    like = monitoring.reached(read)
    if like is None:
        return {}, {}
    hours = f"{like.decisions.hour}-{like.activity.hour}-{like.full.hour}"
    if hours not in kept.setdefault("by_hours", {}):
        made = monitoring.reference_of(platform, monitoring.as_exported(platform, records.read_tables(platform)), like)
        kept["by_hours"][hours] = monitoring.as_json(*made)
        _write(platform, "reference.json", kept)
    return monitoring.from_json(kept["by_hours"][hours])


def _told(finding: dict[str, Any], version: str | None) -> str:
    """Under what a finding is noted as told: with the version where it is the champion's and not the logs'."""
    return f"{finding['key']}@{version if finding['family'] in ('promise', 'balance') else ''}"


def _balance(platform: Platform, version: str, before: dict[str, Any], read: records.Records, tests: int) -> tuple[list[monitoring.Found], int]:
    """Whether the champion's state tells again who acts, asked once for each whole day of the logs; and how many windows could be asked."""
    probes = {int(window): monitoring.Probe(**probe) for window, probe in before.get("probes", {}).items()}
    reached = monitoring.reached(read)
    if not probes or reached is None:
        return [], 0
    since, until = datetime.fromisoformat(before["until"]), _midnight(reached.full)
    kept = _read(platform, "balance.json")
    if kept.get("version") != version or kept.get("until") != until.isoformat():
        found = None
        if until > since:
            policy = registry.load_policy(f"models:/{platform.platform}/{version}", platform.root)
            data = _probed(platform, until)
            found = monitoring.balance_lost(policy, data, probes, since, until, tests) if data is not None else None
        kept = {"version": version, "until": until.isoformat(), "found": asdict(found) if found else None}
        _write(platform, "balance.json", kept)
    return [monitoring.Found(**kept["found"])] if kept["found"] else [], len(probes)


def _probed(platform: Platform, until: datetime) -> Windows | None:
    """The transitions of the last days before `until` of those players whose states are probed; what they did before, as far as their windows reach."""
    whole = records.read_records(platform, until - max(WINDOWS) * DAY - platform.state.window * platform.state.period)
    ids = whole.decisions["player_id"].unique().sort().to_list()
    chosen = pl.Series([name for name, probed in zip(ids, monitoring.probed_players(platform, ids), strict=True) if probed], dtype=pl.String)
    among = pl.col("player_id").is_in(chosen.implode())
    decisions = whole.decisions.filter(among & (pl.col("decided_at") < until))
    if decisions.is_empty():
        return None
    read = replace(whole, decisions=decisions, activity=whole.activity.filter(among) if whole.activity is not None else None, proposals=None)
    return windows.build(platform, read, features.build_rows(platform, read))


def _finding(platform: Platform, found: monitoring.Found, watched: Any) -> dict[str, Any]:
    return {
        "key": found.key,
        "family": found.family,
        "says": monitoring.sentence(found),
        "was": found.was,
        "now": found.now,
        "window": found.window,
        "z": found.z,
        "p": found.p,
        "players": found.players,
        "picture": None,
    }


def _stale(platform: Platform, read: records.Records, moment: datetime) -> list[dict[str, Any]]:
    """Logs that have stopped arriving: nothing new for `serving.stale_after` periods."""
    limit = platform.state.period * platform.serving.stale_after
    found = []
    for name, frame, column in (("decisions", read.decisions, "decided_at"), ("activity", read.activity, "known_at")):
        newest = frame.select(pl.col(column).max()).item() if frame is not None and frame.height else None
        if frame is not None and (not isinstance(newest, datetime) or moment - newest > limit):
            since = f"since {newest:%Y-%m-%d %H:%M} UTC" if isinstance(newest, datetime) else "at all since the last retraining"
            says = f"the {name} log has stopped arriving: nothing {since}, and {monitoring_span(limit)} are allowed"
            found.append(_plain_finding(f"{name} log", "volume", says))
    return found


def monitoring_span(span: timedelta) -> str:
    """A span of time in words."""
    hours = span.total_seconds() / 3600
    return f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} hours"


def _answers(platform: Platform, moment: datetime) -> list[dict[str, Any]]:
    """Whether too many answers of the last day rested on no known, fresh state, beyond doubt."""
    from scipy import stats

    served, unknown, degraded = monitoring.degraded_answers(platform, moment - DAY, moment)
    found = []
    for name, count in (("players who are not known", unknown), ("degraded answers", degraded)):
        if served >= LEAST_ANSWERS and float(stats.binom.sf(count - 1, served, WRONG_ANSWERS)) < monitoring.allowed(2, 1):
            found.append(_plain_finding(name, "answers", f"{count:,} of {served:,} answers of the last day were for {name}: {count / served:.0%}"))
    return found


def _plain_finding(key: str, family: str, says: str) -> dict[str, Any]:
    return {"key": key, "family": family, "says": says, "was": None, "now": None, "window": 1, "z": None, "p": None, "players": None, "picture": None}


def _of_champion(platform: Platform, version: str, since: datetime | None) -> pl.DataFrame:
    """The champion's own decisions since it was promoted, with what followed."""
    decisions = records.read_records(platform, since).decisions
    own = decisions.filter((pl.col("policy") == OWN_POLICY) & (pl.col("model_version") == version))
    return own if since is None else own.filter(pl.col("decided_at") >= since)


def _roll_back(platform: Platform, version: str, broken: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Make the champion before this one the champion again, with a record of why; where there is none, say what else can be done."""
    beyond = "above its ceiling" if broken["bound"] == "ceiling" else "below its floor"
    edge = broken["low"] if broken["bound"] == "ceiling" else broken["high"]
    why = f"{broken['objective']} of version {version} is {beyond} of {broken['limit']:g}: {broken['value']:.4g} per decision, its bound {edge:.4g}"
    try:
        back: str | None = registry.rollback(platform, who=WHO, reason=why)
        says = f"{why}; rolled back to version {back}"
    except UnknownPlayerError:
        back, says = None, f"{why}; there is no champion before it to roll back to: fastq pause serves a behaviour policy at once"
    if back is not None:
        notify(platform, "rollback", says, {"version": version, "findings": [broken]})
    return _plain_finding(f"guardrail {broken['objective']} of version {version}", "guardrail", says), back


def _picture(platform: Platform, finding: dict[str, Any], watched: Any) -> str | None:
    """The reference's days and where it is now, as a file beside the other reports."""
    if finding["key"] not in watched:
        return None
    reference = watched[finding["key"]]
    name = "".join(c if c.isalnum() else "-" for c in finding["key"])[:60]
    path = Workspace(platform.root).reports / f"drift-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{name}.svg"
    with replacing(path) as partial:
        report.drift_figure(finding["says"], list(reversed(reference.days)), reference.daily**0.5, finding["now"], finding["window"]).savefig(
            partial, format="svg"
        )
    return relative(platform, path)


@flow(name="monitor", persist_result=False, validate_parameters=False)
def monitor_flow(workspace: str, now: str) -> dict[str, Any]:
    document: dict[str, Any] = one_look(workspace, now)
    return document


def monitor(platform: Platform, now: datetime | None = None, on_progress: Progress | None = None) -> dict[str, Any]:
    """One look, at the wall clock's now. Raises `WorkspaceError` where nothing was trained yet."""
    moment = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    with Workspace(platform.root).lock("monitor", 600), running(platform, on_progress):
        document: dict[str, Any] = monitor_flow(str(Path(platform.root)), moment)
    told = [f["says"] for f in document["findings"] if f["key"] in document["new"] and f["family"] != "guardrail"]
    if told:
        notify(platform, "drift", "; ".join(told[:5]), {"version": document["version"], "findings": document["findings"]})
    return document
