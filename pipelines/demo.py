"""The demo's story: logs, validation, training, evaluation, the gate, serving, recommendations, one explanation, and what to try next.

It does what a user would do, with the commands a user would use. A stopped demo goes on at the step where it was; nothing it starts
outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastq import worlds
from fastq.environment import free_ports
from fastq.errors import ConfigurationError, FastqError
from fastq.platform import FILE_NAME, OWN_POLICY, Platform, load_platform
from fastq.workspace import Workspace, replacing
from pipelines.retrain import retrain
from pipelines.turn import drawn, keep_report, relative
from pipelines.validate import validate_logs

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastq.policy import Policy

MARK = "demo.json"  # in .fastq/: what this demo was asked to be, so that nobody else's directory is ever emptied
WHAT = ("logs", "seed", "players", "days")
READY_SECONDS, STOP_SECONDS = 180, 60
HELD_OUT = 0.5  # of the simulated players
TRUTH_PLAYERS, TRUTH_DAYS, TRUTH_SEED = 1_000, 30, 1_000  # a platform of its own, on luck that no log has seen


def demo(directory: Path, *, logs: str = "arena", seed: int = 0, players: int = 3_000, days: int = 40, fresh: bool = False) -> dict[str, Any]:
    """Run the whole loop in `directory`; the answer holds what was validated, learned, measured, served and explained."""
    begun = time.monotonic()
    asked = {"logs": logs, "seed": seed} | ({"players": players, "days": days} if logs == "arena" else {})
    workspace = Workspace(directory.resolve())
    with drawn() as show:
        show("writing the logs", 0, 1, {})
        note = written(workspace, asked, fresh=fresh)
        show("writing the logs", 1, 1, {})
        platform = load_platform(workspace.root / FILE_NAME)
        document: dict[str, Any] = {
            "workspace": str(directory),
            "logs": logs,
            "note": note,
            "objectives": {n: o.weight for n, o in platform.objectives.items()},
        }
        document |= learned(platform, workspace.state / MARK, show, resume=not fresh)
        if logs == "arena":
            show("asking the simulator for the truth", 0, 2, {})
            document["truth"] = in_truth(platform, document["version"])
            show("asking the simulator for the truth", 1, 2, {})
            document["explanations"] = of_explanations(platform, document["version"])
            show("asking the simulator for the truth", 2, 2, {})
        else:
            document["on_policy"] = on_policy(platform)
        if document["promoted"]:
            show("serving", 0, 3, {})
            with served(platform) as ask:
                show("serving", 1, 3, {})
                document["recommendations"] = ask("recommend", "POST", "/v1/recommendations", {"players": some_players(platform, 10)})["recommendations"]
                show("serving", 2, 3, {})
                decisions = [row["decision_id"] for row in document["recommendations"]]
                against = platform.policies[0]
                answers = [ask("analyst", "POST", "/v1/explanations", {"decision_id": decision, "against": against}) for decision in decisions]
                document["explanation"] = max(answers, key=clearness)
            show("serving", 3, 3, {})
    document["seconds"] = round(time.monotonic() - begun)
    return document


def written(workspace: Workspace, asked: Mapping[str, Any], *, fresh: bool) -> str:
    """The logs and `fastq.yaml`, moved into place only when they are whole; returns what has to be said of them."""
    mark, partial = workspace.state / MARK, workspace.state / "writing"
    earlier = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else None
    if earlier is None and workspace.root.exists() and any(workspace.root.iterdir()):
        raise ConfigurationError(f"{workspace.root}: is not empty and holds no demo; name another directory")
    if earlier is not None and (fresh or {k: v for k, v in earlier.items() if k in WHAT} != dict(asked)):
        if not fresh:
            raise ConfigurationError(
                f"{workspace.root}: holds a demo of other logs ({', '.join(f'{k} {v}' for k, v in earlier.items() if k in WHAT)}); "
                "start afresh with --fresh, or name another directory"
            )
        for name in ("logs", FILE_NAME):
            _remove(workspace.root / name)
        _remove(workspace.state)
        earlier = None
    if earlier is not None and (workspace.root / FILE_NAME).exists():
        return str(earlier["note"])
    workspace.make(workspace.root, workspace.state)
    with replacing(mark) as file:
        file.write_text(json.dumps(dict(asked) | {"note": ""}), encoding="utf-8")
    _remove(partial)
    note = ""
    if asked["logs"] == "arena":
        worlds.write_logs(worlds.world("arena"), partial, asked["players"], asked["days"], asked["seed"])
    else:
        note = worlds.open_bandit(partial, cache=workspace.state / "downloads")
    platform_file = partial / FILE_NAME
    text = platform_file.read_text(encoding="utf-8")
    # the gate's evidence comes from players who were held out: of a simulated platform there may be as many as it takes to show what was learned
    training = f"seed: {asked['seed']}" + (f", holdout: {HELD_OUT}" if asked["logs"] == "arena" else "")
    platform_file.write_text(text.replace("seed: 0", training), encoding="utf-8")
    _remove(workspace.root / "logs")
    os.replace(partial / "logs", workspace.root / "logs")
    with replacing(mark) as file:
        file.write_text(json.dumps(dict(asked) | {"note": note}), encoding="utf-8")
    os.replace(platform_file, workspace.root / FILE_NAME)  # last: it says that all of it is there
    _remove(partial)
    return note


def learned(platform: Platform, mark: Path, show: Any, *, resume: bool) -> dict[str, Any]:
    """What validation and retraining said; kept in the mark, so that a demo that is run again goes on after them."""
    noted = json.loads(mark.read_text(encoding="utf-8"))
    if "learned" not in noted:
        validation = validate_logs(platform, show)
        noted["learned"] = {"validation": validation, **retrain(platform, resume=resume, on_progress=show)}
        with replacing(mark) as file:
            file.write_text(json.dumps(noted), encoding="utf-8")
    found: dict[str, Any] = noted["learned"]
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def some_players(platform: Platform, n: int) -> list[str]:
    """The ids of `n` players of the accepted decisions."""
    from fastq.records import read_tables

    return sorted(read_tables(platform).decisions["player_id"].unique().to_list())[:n]


def clearness(explanation: Mapping[str, Any]) -> float:
    """How many times its doubt a contrast's difference is: what makes the most telling of several explanations."""
    contrast = explanation["contrast"]
    doubt = contrast["high"] - contrast["low"]
    return abs(contrast["difference"]) / doubt if doubt > 0 else 0.0


# ---- measures that only a demo has ------------------------------------------------------------------------------------------
def in_truth(platform: Platform, version: str) -> list[dict[str, Any]]:
    """What the new policy, each behaviour policy and their mixture bring in the simulator, per player and day, on the same luck.

    `low` and `high`: 95 % interval of the total's difference to the mixture, paired by player.
    """
    from fastq.features import PlayerStates
    from fastq.registry import load_policy

    world = worlds.world("arena")
    policy: Policy = load_policy(f"models:/{platform.platform}/{version}", platform.root)

    def act(states: Any) -> np.ndarray:
        return policy.recommend(
            PlayerStates(**states), seeds=np.random.default_rng(TRUTH_SEED).integers(0, 2**63, len(states["history"]), dtype=np.uint64)
        ).action

    played = {OWN_POLICY: worlds.true_values(world, act, TRUTH_PLAYERS, TRUTH_DAYS, TRUTH_SEED)}
    played |= {name: worlds.true_values(world, name, TRUTH_PLAYERS, TRUTH_DAYS, TRUTH_SEED) for name in (*world.policies, worlds.MIXTURE)}
    base = played[worlds.MIXTURE].by_player
    rows = []
    for name, value in played.items():
        difference = value.by_player - base
        half = 1.96 * float(difference.std(ddof=1)) / len(base) ** 0.5
        rows.append(
            {
                "policy": name,
                "total": value.total,
                "difference": float(difference.mean()),
                "low": float(difference.mean()) - half,
                "high": float(difference.mean()) + half,
                "objectives": dict(zip(platform.objectives, value.objectives.tolist(), strict=True)),
            }
        )
    return rows


def of_explanations(platform: Platform, version: str) -> dict[str, Any]:
    """Whether the version's explanations tell the truth; made once, kept as a page and as JSON beside its other reports, and with its MLflow run."""
    from fastq import registry, report, truth

    workspace = Workspace(platform.root)
    name = f"truth-{version}"
    kept = workspace.reports / f"{name}.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
    else:
        policy = registry.load_policy(f"models:/{platform.platform}/{version}", platform.root)
        found = truth.examine(policy, worlds.world("arena"))
        text = report.truth_page(f"{platform.platform} version {version}", found)
        registry.attach(platform, version, {"truth.html": text, "truth.json": json.dumps(found)})
        keep_report(platform, name, text, found)
    return {"report": relative(platform, kept.with_suffix(".html")), **{part: found[part] for part in ("contrasts", "reasons", "warnings", "deletion")}}


def on_policy(platform: Platform) -> dict[str, Any]:
    """The random policy's value on its own rounds beside its estimate from the other policy's log, each with a 95 % interval.

    Allowed only here: which policy served a round was drawn by chance, so the mean of its own rounds is its value.
    """
    from fastq import ope
    from fastq.records import read_tables

    tables = read_tables(platform)
    rounds, objective = tables.decisions, next(iter(platform.objectives))
    assert tables.items is not None
    own, other = rounds.filter(policy="random"), rounds.filter(policy="bts")

    def estimate(terms: ope.Terms) -> dict[str, Any]:
        answer = ope.estimate(terms, rng=np.random.default_rng(0))[0]
        if isinstance(answer, ope.Refusal):
            return {"value": None, "low": None, "high": None, "ess": None, "verdict": answer.reason}
        return {"value": answer.value, "low": answer.low, "high": answer.high, "ess": answer.ess, "verdict": answer.verdict}

    uniform = 1 / len(tables.items)
    weights = uniform / other["propensity"].to_numpy()
    return {
        "objective": objective,
        "policy": "random",
        "own rounds": estimate(ope.self_normalised(own[objective].to_numpy()[:, None], np.ones(len(own)), np.arange(len(own)))),
        "from the other log": estimate(ope.self_normalised(other[objective].to_numpy()[:, None], weights, np.arange(len(other)))),
    }


# ---- the endpoint, as a user starts it ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def served(platform: Platform) -> Iterator[Any]:
    """`fastq serve` in a process group of its own, gone when the block ends; yields `ask(role, method, route, body)`."""
    import httpx

    command = [sys.executable, "-m", "fastq.cli"]
    keys = {
        role: json.loads(
            subprocess.run([*command, "keys", "create", "--role", role, "--json"], cwd=platform.root, check=True, capture_output=True, text=True).stdout
        )
        for role in ("recommend", "analyst")
    }
    (port,) = free_ports(1)
    log = (platform.root / ".fastq" / "serve.log").open("w")
    server = subprocess.Popen(
        [*command, "serve", "--port", str(port)], cwd=platform.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:

            def ask(role: str, method: str, route: str, body: Any = None) -> Any:
                answer = client.request(method, route, json=body, headers={"Authorization": f"Bearer {keys[role]['key']}"})
                if answer.status_code != 200:
                    raise FastqError(f"{method} {route} answered {answer.status_code}: {answer.text}")
                return answer.json()

            _wait_until_ready(client, server, Path(log.name))
            yield ask
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        log.close()
        for key in keys.values():  # made for this run alone
            subprocess.run([*command, "keys", "revoke", key["id"]], cwd=platform.root, check=False, capture_output=True)


def _wait_until_ready(client: Any, server: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise FastqError(f"fastq serve ended with {server.returncode} before it was ready; see {log}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.3)
    raise FastqError(f"fastq serve was not ready within {READY_SECONDS} s; see {log}")


# ---- the account --------------------------------------------------------------------------------------------------------------
def account(document: Mapping[str, Any]) -> Iterable[RenderableType]:
    """What happened, for people."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, name in enumerate(columns):
            made.add_column(escape(name), justify="left" if i == 0 else "right")
        return made

    validation = document["validation"]
    counts = ", ".join(f"{validation[name]:,} {name}" for name in ("accepted", "quarantined", "repeated"))
    yield f"[bold]Validated[/]  decisions: {counts}; {len(validation['rules'])} rules. Report: {document['workspace']}/{validation['report']}"
    if document["note"]:
        yield escape(document["note"])
    yield ""
    estimates = table(
        "Estimated from the logs, on held-out players (weighted sum, discounted)", "policy", "value", "95 % interval", "rows that count", "verdict"
    )
    seen = set()
    for row in document["estimates"]:
        if row["objective"] is None and row["policy"] not in seen:  # the best estimator of each policy; fastq evaluate shows all
            seen.add(row["policy"])
            estimates.add_row(
                row["policy"], f"{row['value']:.4g}", f"{row['low']:.4g} to {row['high']:.4g}", f"{row['ess']:,.0f}", row["verdict"].partition(":")[0]
            )
    yield estimates
    yield ""
    if truth := document.get("truth"):
        names = list(document["objectives"])
        shown = table("In the simulator's truth, per player and day (95 % interval)", "policy", *names, "sum", "against the mixture")
        for row in truth:
            style = "bold" if row["policy"] == OWN_POLICY else ""
            shown.add_row(
                row["policy"],
                *(f"{row['objectives'][name]:.3f}" for name in names),
                f"{row['total']:.3f}",
                f"{row['difference']:+.3f} ± {(row['high'] - row['low']) / 2:.3f}",
                style=style,
            )
        yield shown
        yield ""
        said = document["explanations"]
        held = " and ".join(f"{row['share']:.0%} (against {row['against']})" for row in said["contrasts"])
        yield f"Asked of its explanations: 90 % intervals hold the true difference in {held}. Report: {document['workspace']}/{said['report']}"
        yield ""
    if found := document.get("on_policy"):
        own, other = found["own rounds"], found["from the other log"]
        if own["value"] is not None and other["value"] is not None:
            inside = other["low"] <= own["value"] <= other["high"]
            yield (
                f"The random policy's {found['objective']} rate on its own rounds is {own['value']:.3%} ({own['low']:.3%} to {own['high']:.3%}); "
                f"estimated from the rounds of Thompson sampling alone it is {other['value']:.3%} ({other['low']:.3%} to {other['high']:.3%}, "
                f"{other['ess']:,.0f} rows that count; {escape(other['verdict'])}). "
                f"The interval {'holds' if inside else 'misses'} the on-policy value."
            )
            yield ""
    if not document["promoted"]:
        yield f"[red]{document['model']} version {document['version']} was not promoted:[/]"
        for reason in document["reasons"]:
            yield f"  {escape(reason)}"
        yield f"Nothing is served without a champion. Look at it: cd {document['workspace']} && fastq evaluate {document['version']}"
        return
    yield f"[bold green]{document['model']} version {document['version']} is the champion[/] and answered over HTTP:"
    recommendations = document["recommendations"]
    columns = list(recommendations[0]["action"])
    units = recommendations[0]["units"]
    served_table = table("Ten recommendations", "player", *(f"{name} [{units[name]}]" if units.get(name) else name for name in columns), "value", "propensity")
    for row in recommendations:
        action = [f"{row['action'][name]:.1f}" if isinstance(row["action"][name], float) else str(row["action"][name]) for name in columns]
        served_table.add_row(
            escape(row["player_id"]),
            *action,
            "none" if row["value"] is None else f"{row['value']:.3f}",
            "none" if row["propensity"] is None else f"{row['propensity']:.3g}",
        )
    yield served_table
    yield ""
    why = document["explanation"]
    contrast = why["contrast"]
    parts = table(
        f"Why this, for {escape(why['player_id'])}, and not what {contrast['against']} would do (the clearest case of the ten)",
        "objective",
        "horizon",
        "this",
        f"{contrast['against']}",
        "difference",
    )
    for mine, difference in zip(why["parts"], contrast["parts"], strict=True):
        parts.add_row(
            mine["objective"],
            mine["horizon"].replace("_", " "),
            f"{mine['value']:+.4f}",
            f"{mine['value'] - difference['value']:+.4f}",
            f"{difference['value']:+.4f}",
        )
    parts.add_section()
    parts.add_row("sum", "", f"{why['value']:+.4f}", f"{why['value'] - contrast['difference']:+.4f}", f"{contrast['difference']:+.4f}", style="bold")
    yield parts
    yield f"The difference lies between {contrast['low']:+.4f} and {contrast['high']:+.4f} (90 %). Evidence: {escape(why['evidence']['verdict'])}."
    yield ""
    where = document["workspace"]
    yield f"[bold]Next[/]  cd {where}"
    yield "  fastq explain " + why["decision_id"] + f" --against {contrast['against']}"
    yield "  fastq evaluate"
    yield "  fastq keys create --role analyst && fastq serve"
    yield f"Done in {document['seconds']} s."
