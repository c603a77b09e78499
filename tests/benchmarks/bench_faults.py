"""`make bench-faults`: a retraining ended by kill -9 or SIGTERM at each of its steps in turn, then `fastq retrain --resume`; counted and timed.

    FAULTS=folder python tests/benchmarks/bench_faults.py            goes on where it was stopped, one JSON line per fault in folder/faults.jsonl
    FAULTS=folder python tests/benchmarks/bench_faults.py in-turn    one turn that dies at each step in turn, resumed: half the time (… SIGTERM: of that)
    FAULTS=folder python tests/benchmarks/bench_faults.py servers    PostgreSQL, Redis, MLflow and Prefect each killed at such a step, and started again

The command is the front door's own, in a process of its own; only where it dies is put in from outside. The gate is made to pass, so that each turn
promotes: version 2 over version 1, which stands there before. What an undisturbed turn leaves is what each disturbed one has to leave.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import yaml

MARK = "FASTQ_FAULT_RUN"  # in the environment of whatever the command starts
# What stands before `main()`: `strike(point)` where a turn passes, and death at the point that is asked for.
DRIVER = """
import os, signal, sys, time
wanted, number, passed = os.environ["POINT"], int(os.environ["SIGNAL"]), open(os.environ["PASSED"], "a")
somebody_else = os.environ.get("STRUCK")

def strike(point):
    global wanted
    passed.write(point + "\\n")
    passed.flush()
    if point == wanted and somebody_else:
        wanted = None
        open(somebody_else, "w").close()
        while os.path.exists(somebody_else):
            time.sleep(0.02)
    elif point == wanted:
        os.kill(os.getpid(), number)
        time.sleep(1)  # SIGTERM is heard between two instructions

from fastq.environment import prepare
from fastq.workspace import Workspace
from pathlib import Path
prepare(Workspace(Path.cwd()))
import dataclasses
from fastq import evaluation, learner
from pipelines import retrain
from prefect.task_engine import SyncTaskRunEngine
from mlflow import MlflowClient

do, success, judge, train, record = retrain.StepsDone.do, SyncTaskRunEngine.handle_success, evaluation.evaluate, learner.train, Workspace.record

def done(self, step, *arguments):
    strike(f"{step.name}: begins")
    found = do(self, step, *arguments)
    strike(f"{step.name}: result kept")
    return found

def succeeded(self, result, transaction):
    strike(f"{self.task.name}: done, result not kept")
    return success(self, result, transaction)

def trained(*arguments, on_progress, **named):
    def tell(stage, done, total, metrics):
        on_progress(stage, done, total, metrics)
        strike(f"train: {stage}, epoch {done}")
    return train(*arguments, on_progress=tell, **named)

def recorded(self, who, action, **said):
    record(self, who, action, **said)
    strike(f"audit: {action}")

def around(name, of):
    method = getattr(MlflowClient, name)
    def call(self, *arguments, **named):
        strike(f"MLflow: before {of(arguments, named)}")
        found = method(self, *arguments, **named)
        strike(f"MLflow: after {of(arguments, named)}")
        return found
    setattr(MlflowClient, name, call)

retrain.StepsDone.do, SyncTaskRunEngine.handle_success, learner.train, Workspace.record = done, succeeded, trained, recorded
evaluation.evaluate = lambda *a, **k: dataclasses.replace(judge(*a, **k), promoted=True)
around("log_artifacts", lambda a, k: "the bundle's files")
around("create_model_version", lambda a, k: "the version")
around("set_registered_model_alias", lambda a, k: f"alias {a[1]}")
around("set_model_version_tag", lambda a, k: f"tag {a[2]}")
from fastq.cli import main
sys.argv = ["fastq", "retrain", "--json", *sys.argv[1:]]
main()
"""
TREE = {
    "platform": "shop",
    "logs": {"decisions": "decisions.parquet", "activity": "activity.parquet"},
    "state": {"period": "1d", "window": 5, "measures": {"rounds": {}}},
    "policies": ["careful", "bold"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}}},
    "objectives": {"joy": {}, "cost": {"weight": -1.0}},
    "training": {"epochs": 2},
}


def write_logs(root, days, players=80, seed=0):
    """Two policies with known densities; joy is highest where the goal is near the player's taste."""
    rng = np.random.default_rng(seed)
    taste, decisions, activity = rng.uniform(4, 10, players), [], []
    begin = np.datetime64("2026-03-01", "us")
    for day in range(days):
        bold = rng.random(players) < 0.5
        mean = np.where(bold, 1.3, 0.8) * taste
        goal = np.clip(rng.normal(mean, 1.0), 1.001, 14.999)
        density = np.exp(-((goal - mean) ** 2) / 2) / np.sqrt(2 * np.pi)
        for p in range(players):
            at = (begin + np.timedelta64(day, "D") + np.timedelta64(360 + p, "m")).item()
            known = {"joy": float(np.exp(-((goal[p] - taste[p]) ** 2) / 8)), "cost": 0.02 * goal[p]}
            about = {"decision_id": f"d{day}-{p}", "player_id": f"p{p}", "decided_at": at, "policy": "bold" if bold[p] else "careful"}
            decisions.append(about | {"propensity": density[p], "assignment": 0.5, "goal": goal[p]} | known)
            activity.append({"player_id": f"p{p}", "occurred_at": at - timedelta(hours=3), "rounds": float(rng.poisson(taste[p]))})
    pl.DataFrame(decisions).write_parquet(root / "decisions.parquet")
    pl.DataFrame(activity).write_parquet(root / "activity.parquet")


def retrain(root, *arguments, point="", number=signal.SIGKILL, passed=os.devnull, seconds=300, strike=None, **more):
    """(exit code, seconds, seconds after the answer, standard error, answer) of one `fastq retrain`, ended with all that it left.

    It waits at `point` while `strike()` is called, where that is given, else it dies there.
    """
    mark = f"{root}-{time.time_ns()}"
    struck = Path(f"{root}-struck")
    struck.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env |= more | ({"STRUCK": str(struck)} if strike else {})
    env |= {"POINT": point, "SIGNAL": str(int(number)), "PASSED": str(passed), MARK: mark, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.monotonic()
        command = [sys.executable, "-c", DRIVER, *arguments]
        process = subprocess.Popen(command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        answered = None
        while process.poll() is None and time.monotonic() - began < seconds:
            if answered is None and os.fstat(out.fileno()).st_size:
                answered = time.monotonic()
            if strike is not None and struck.exists():
                strike()
                struck.unlink()
            time.sleep(0.05)
        ended = time.monotonic()
        if process.poll() is None:
            process.kill()
        out.seek(0)
        err.seek(0)
        said, answer = err.read(), out.read()
    until = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()
    return {
        "code": process.wait(), "seconds": ended - began, "after the answer": None if answered is None else ended - answered, "stderr": said,
        "answer": json.loads(answer) if answer.startswith("{") else None, "left over": len(left), "left for": 20 - max(until - time.monotonic(), 0),
    }  # fmt: skip


def marked(mark):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def stands(root):
    """What a turn left in a workspace, as its users see it; equal after every fault, or something was lost or done twice."""
    state = root / ".fastq"
    with sqlite3.connect(state / "mlflow" / "mlflow.db") as mlflow:
        versions = mlflow.execute("SELECT version FROM model_versions ORDER BY version").fetchall()
        aliases = dict(mlflow.execute("SELECT alias, version FROM registered_model_aliases"))
        runs = mlflow.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall()
    weights = sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in (state / "mlflow").rglob("*.safetensors"))
    lines = [json.loads(line) for line in (state / "attempts.jsonl").read_text().splitlines()]
    return {
        "versions": [v for (v,) in versions],
        "aliases": aliases,
        "weights": weights,
        "MLflow's runs": runs,
        "judged by the gate": len({line["turn"] for line in lines}),  # a turn judged again after a crash counts once
        "decisions": hashlib.sha256(pl.read_parquet(state / "tables" / "decisions.parquet").sort("decision_id").write_csv().encode()).hexdigest(),
        "turns under way": [p.name for p in (state / "runs").iterdir()],
    }


def champion_is_whole(root):
    """Whether what would be served at this moment can be served: the champion is 1 or 2 and its files are those that were registered.

    In a process of its own: MLflow keeps connections to a database that has been replaced under it.
    """
    code = "import sys; from fastq import load_policy; sys.exit(load_policy('models:/shop@champion').version not in ('1', '2'))"
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False).returncode == 0


def open_runs(root):
    """Runs that Prefect still takes for running."""
    with sqlite3.connect(root / ".fastq" / "prefect" / "prefect.db") as prefect:
        return prefect.execute("SELECT count(*) FROM flow_run WHERE state_type IN ('RUNNING', 'PENDING')").fetchone()[0]


def before(root):
    """A workspace with a champion whose logs have grown by a day since."""
    root.mkdir(parents=True)
    (root / "fastq.yaml").write_text(yaml.safe_dump(TREE))
    write_logs(root, 19)
    first = retrain(root)
    assert first["code"] == 0, first["stderr"][-2000:]
    write_logs(root, 20)
    return root


def fault(base, root, point, number):
    """One turn ended at `point`, and resumed: what was seen."""
    shutil.copytree(base, root)
    ended = retrain(root, point=point, number=number)
    whole = champion_is_whole(root)
    again = retrain(root, "--resume")
    found = {
        "point": point,
        "signal": signal.Signals(number).name,
        "code": ended["code"],
        "said": ended["stderr"].strip().splitlines(),
        "ended after": round(ended["seconds"], 1),
        "left over": ended["left over"] + again["left over"],
        "champion whole": whole,
        "resumed": again["code"],
        "recovered after": round(again["seconds"], 1),
        "lingered": again["after the answer"],
        "open runs": open_runs(root),
        "stands": stands(root),
    }
    if again["code"] != 0:
        found["stderr"] = again["stderr"][-1500:]
    shutil.rmtree(root)
    return found


def differences(seen, wanted):
    seen = json.loads(json.dumps(seen))
    return {name: [seen[name], value] for name, value in wanted.items() if seen[name] != value}


def in_turn(base, root, points, signalled=signal.SIGKILL):
    """One turn that dies at each point, one after the other, each time resumed: yields what was seen at each, and at last of the end."""
    shutil.copytree(base, root)
    for number, point in enumerate(points):
        ended = retrain(root, *["--resume"][: min(number, 1)], point=point, number=signalled)
        names = point.startswith(("MLflow", "audit", "promote", "register"))
        yield {
            "point": point,
            "code": ended["code"],
            "seconds": round(ended["seconds"], 1),
            "left over": ended["left over"],
            "gone after": round(ended["left for"], 1),
            "said": ended["stderr"].strip().splitlines()[-3:],
            "open runs": open_runs(root) if signalled != signal.SIGKILL else None,
            "champion whole": champion_is_whole(root) if names else None,
        }
        if ended["code"] not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            yield {"stderr": ended["stderr"][-1500:]}
            return
    again = retrain(root, "--resume")
    lines = [json.loads(line) for line in (root / ".fastq" / "audit.jsonl").read_text().splitlines()]
    said = sum(line["action"] == "promote" and line["version"] == "2" for line in lines)
    yield {
        "point": "none",
        "code": again["code"],
        "seconds": round(again["seconds"], 1),
        "open runs": open_runs(root),
        "audit lines": said,
        "stands": stands(root),
    }


# ---- servers that die in the middle --------------------------------------------------------------------------------------------
DOWN = 5.0  # seconds until whoever watches over a server starts it again; then it takes as long as it takes
STRUCK_AT = (
    "ingest: begins",
    "build features: begins",
    "train: begins",
    "train: representation, epoch 1",
    "evaluate: begins",
    "register: begins",
    "MLflow: after the version",
    "MLflow: after alias previous",
    "promote: done, result not kept",
)
SEED = """
import sys
from pathlib import Path
from fastq import load_platform, registry
platform = load_platform("fastq.yaml")
with registry.start_run(platform, "before", {}) as run:
    pass
registry.promote(platform, registry.register(platform, run.id, Path(sys.argv[1])), forced=True, reason="stands before")
"""


def platform_on(root, servers, name, days):
    root.mkdir(parents=True)
    services = {"mlflow": servers.mlflow, "online_store": servers.redis}
    (root / "fastq.yaml").write_text(yaml.safe_dump(TREE | {"platform": name, "services": services}))
    write_logs(root, days)


def stands_on(servers, root, name):
    """As `stands`, of a platform whose services are servers."""
    import psycopg
    import redis

    with psycopg.connect(f"{servers.postgres}/mlflow") as mlflow:
        versions = mlflow.execute("SELECT version FROM model_versions WHERE name = %s ORDER BY version", (name,)).fetchall()
        aliases = dict(mlflow.execute("SELECT alias, version FROM registered_model_aliases WHERE name = %s", (name,)).fetchall())
        runs = mlflow.execute("SELECT r.status, count(*) FROM runs r JOIN experiments e USING (experiment_id) WHERE e.name = %s GROUP BY 1", (name,)).fetchall()
        [(experiment,)] = mlflow.execute("SELECT experiment_id FROM experiments WHERE name = %s", (name,)).fetchall()
    with psycopg.connect(f"{servers.postgres}/prefect") as prefect:
        still = prefect.execute("SELECT count(*) FROM flow_run WHERE state_type IN ('RUNNING', 'PENDING')").fetchone()[0]
    state = root / ".fastq"
    lines = [json.loads(line) for line in (state / "attempts.jsonl").read_text().splitlines()]
    audit = [json.loads(line) for line in (state / "audit.jsonl").read_text().splitlines()]
    kept = servers.home / "artifacts" / str(experiment)
    return {
        "versions": [v for (v,) in versions],
        "aliases": {alias: str(version) for alias, version in aliases.items()},
        "weights": sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in kept.rglob("*.safetensors")),
        "MLflow's runs": [list(row) for row in runs],
        "judged by the gate": len({line["turn"] for line in lines}),
        "promoted in the audit": sum(line["action"] == "promote" and line["version"] == "2" for line in audit),
        "decisions": hashlib.sha256(pl.read_parquet(state / "tables" / "decisions.parquet").sort("decision_id").write_csv().encode()).hexdigest(),
        "players online": sum(1 for key in redis.Redis.from_url(servers.redis).scan_iter() if name.encode() in key),
        "turns under way": [p.name for p in (state / "runs").iterdir()],
        "open runs": still,
    }


def struck_servers(folder):
    """Each server killed at each of these points and started again: yields what was seen, resumed where the turn did not ride it out."""
    sys.path.append(str(Path(__file__).parents[1]))
    from topology import topology

    log = folder / "servers.jsonl"
    done = {(line["server"], line["point"]) for line in map(json.loads, log.read_text().splitlines())} if log.exists() else set()
    with topology() as servers:
        home = servers.home
        env = {name: value for name, value in servers.env.items() if name not in os.environ} | {"PREFECT_API_URL": servers.prefect}
        platform_on(home / "first", servers, "first", 19)
        first = retrain(home / "first", **env)
        assert first["code"] == 0, first["stderr"][-3000:]
        bundle = home / "first" / ".fastq" / "models" / "1"

        def turn(name, server=None, point=""):
            root = home / name
            platform_on(root, servers, name, 20)
            subprocess.run([sys.executable, "-c", SEED, str(bundle)], cwd=root, check=True, env=os.environ | env)

            back = []

            def strike():
                servers.servers[server].kill()
                back.append(threading.Timer(DOWN, servers.servers[server].start))
                back[0].start()

            found = retrain(root, point=point, strike=strike if server else None, seconds=500, **env)
            for timer in back:
                timer.join()
            for one in servers.servers.values():
                one.ready()
            return root, found

        root, whole = turn("undisturbed")
        assert whole["code"] == 0, whole["stderr"][-3000:]
        wanted = json.loads(json.dumps(stands_on(servers, root, "undisturbed")))
        print(f"an undisturbed turn takes {whole['seconds']:.1f} s: {wanted}", flush=True)
        for number, (server, point) in enumerate(itertools.product(("postgres", "redis", "mlflow", "prefect"), STRUCK_AT)):
            if (server, point) in done:
                continue
            name = f"struck{number}"
            root, ended = turn(name, server, point)
            again, before = None, None
            if ended["code"] != 0:
                before = stands_on(servers, root, name) if "evaluate" not in point and "begins" not in point else None
                again = retrain(root, "--resume", **env)
            found = {
                "server": server,
                "point": point,
                "code": ended["code"],
                "seconds": round(ended["seconds"], 1),
                "longer by": round(ended["seconds"] - whole["seconds"], 1),
                "said": ended["stderr"].strip().splitlines()[-4:] if ended["code"] != 0 else "",
                "aliases then": before and before["aliases"],
                "left over": ended["left over"],
                "resumed": again and again["code"],
                "recovered after": again and round(again["seconds"], 1),
                "differs": differences(stands_on(servers, root, name), wanted),
            }
            with log.open("a") as out:
                out.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


def main():
    if "servers" in sys.argv:
        return struck_servers(Path(os.environ.get("FAULTS") or tempfile.mkdtemp(prefix="fastq-faults-")))
    return deaths()


def deaths():
    folder = Path(os.environ.get("FAULTS") or tempfile.mkdtemp(prefix="fastq-faults-"))
    base, log = folder / "base", folder / "faults.jsonl"
    if not base.exists():
        shutil.rmtree(folder / "made", ignore_errors=True)
        before(folder / "made").rename(base)
    # An absolute path stands in MLflow's database: each copy has to lie where the first one lay.
    place = folder / "made"
    shutil.rmtree(place, ignore_errors=True)
    wanted, points = folder / "undisturbed.json", folder / "points"
    if not wanted.exists():
        shutil.copytree(base, place)
        points.unlink(missing_ok=True)
        whole = retrain(place, passed=points)
        assert whole["code"] == 0, whole["stderr"][-2000:]
        wanted.write_text(json.dumps({"seconds": whole["seconds"], "stands": stands(place), "open": open_runs(place)}))
        shutil.rmtree(place)
    undisturbed = json.loads(wanted.read_text())
    # where a result was kept the next step begins, and before one call to MLflow is after the other
    every = [point for point in dict.fromkeys(points.read_text().splitlines()) if "result kept" not in point and "MLflow: before" not in point]
    done = {(line["point"], line["signal"]) for line in map(json.loads, log.read_text().splitlines())} if log.exists() else set()
    print(f"an undisturbed turn takes {undisturbed['seconds']:.1f} s and passes {len(every)} points")
    if "in-turn" in sys.argv:
        signalled = signal.SIGTERM if "SIGTERM" in sys.argv else signal.SIGKILL
        for found in in_turn(base, place, every, signalled):
            if "stands" in found:
                found["differs"] = differences(found.pop("stands"), undisturbed["stands"])
            print(json.dumps(found), flush=True)
        return
    for number in (signal.SIGKILL, signal.SIGTERM):
        for point in every:
            if (point, number.name) in done or (number == signal.SIGTERM and not ("begins" in point or "epoch 1" in point)):
                continue
            shutil.rmtree(place, ignore_errors=True)
            found = fault(base, place, point, number)
            found["differs"] = differences(found.pop("stands"), undisturbed["stands"])
            with log.open("a") as out:
                out.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
