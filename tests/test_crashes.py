"""Killed at any moment of reading the logs or materialising, or the disk full: nothing lost, nothing twice, what was there before is there still."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from fastq import records
from fastq.platform import Platform, load_platform
from fastq.workspace import Workspace
from feature_repo import store
from serving.decision_log import Event, now_us, open_log

PLAYERS, DAYS, WIDTH = 40, 6, 3
TREE = {
    "platform": "shop",
    "logs": {"decisions": "decisions.parquet", "activity": "activity.parquet"},
    "state": {"period": "1d", "window": 5, "measures": {"rounds": {}}},
    "policies": ["careful", "bold"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}}},
    "objectives": {"joy": {}},
}
# Everything is imported once; each turn is a fork of it, which dies where it is told to. It passes a point wherever something under the workspace is about to
# change: a file or directory made, renamed or removed, a Parquet or Arrow file half written, a statement that changes a database (of many alike the first).
TURNS = """
import json, os, re, resource, signal, sqlite3, sys
from collections import Counter
from pathlib import Path
from fastq.environment import prepare
from fastq.platform import load_platform
from fastq.workspace import Workspace
prepare(Workspace(Path(sys.argv[1])))
import feast.infra.online_stores.sqlite, great_expectations, matplotlib.figure, polars, sklearn.ensemble, sklearn.model_selection
from fastq import records
from fastq.errors import FastqError
from feature_repo import store
from pipelines import ingest, materialize, validate
store.BATCH = 10
STEPS = {
    "ingest": lambda root: ingest.ingest_logs.fn(root, "turn", None),
    "validate": lambda root: validate.read_and_judge.fn(root),
    "tables": lambda root: records.write_tables(records.read_records(load_platform(root)), Workspace(Path(root))),
    "materialize": lambda root: materialize.build_features.fn(root, "turn"),
}

def run(root, steps, past, limit, full, told):
    seen = Counter()

    def strike(point, half=None):
        point = re.sub(r"[0-9a-f]{32}|[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}|(?<=[.])[a-z0-9_]{8}(?=[./]|$)", "*", point.replace(root, ""))
        seen[point] += 1
        often = seen[point]
        point += f" ({often})"
        if past is not None and often <= (3 if "statement" in point else 1) and point not in past:
            if half is not None:
                half()
            os.write(told, json.dumps({"point": point}).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        where = str(arguments[0]) if arguments else ""
        if not where.startswith(root) or ".lock" in where:
            return
        elif event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and os.path.exists(where) or event == "os.mkdir" and not os.path.exists(where):
            strike(f"{event} {where}")
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            strike(f"write {where}")

    def connect(*arguments, **named):
        database = connects(*arguments, **named)
        if full:
            database.execute("pragma max_page_count = 1")
        database.set_trace_callback(lambda said: re.match("(?i)select|-- |pragma|begin", said) or strike("statement " + " ".join(said.split()[:3])))
        return database

    connects = sqlite3.connect
    sqlite3.connect = sqlite3.dbapi2.connect = connect

    def halfway(owner, name):
        write = getattr(owner, name)
        def writing(frame, to, *arguments, **named):
            there = set(Path(root).rglob("*.arrow"))
            def half():
                write(frame, to, *arguments, **named)
                for file in [to] if isinstance(to, (str, Path)) else set(Path(root).rglob("*.arrow")) - there:
                    os.truncate(file, os.stat(file).st_size // 2)
            strike(f"half of {name} {to if isinstance(to, (str, Path)) else ''}", half)
            return write(frame, to, *arguments, **named)
        setattr(owner, name, writing)

    halfway(polars.LazyFrame, "sink_parquet")
    halfway(polars.LazyFrame, "sink_ipc")
    sys.addaudithook(audit)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for step in steps:
        STEPS[step](root)

for line in sys.stdin:
    asked = json.loads(line)
    reading, told = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        try:
            run(**asked, told=told)
            said = {"done": True}
        except FastqError as error:
            said = {"refused": str(error)}
        except BaseException as error:
            said = {"accident": repr(error)}
        os.write(told, json.dumps(said).encode())
        os._exit(0)
    os.close(told)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    print("said", json.dumps({**json.loads(said), "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}), flush=True)
"""


class Turns:
    """`turns(root, ["ingest", "materialize"])` runs these steps in a process of their own, and gives what became of it.

    past: the points that it does not die at; None: it does not die. limit: bytes that no file may grow beyond. full: no database may grow by a page.
    """

    def __init__(self, home: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork has no threads but its own
        self._process = subprocess.Popen([sys.executable, "-c", TURNS, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __call__(self, platform: Platform, *steps: str, past: list[str] | None = None, limit: int = 0, full: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"root": str(platform.root), "steps": steps or ("ingest", "materialize"), "past": past, "limit": limit, "full": full}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # others print too
            if line.startswith("said "):
                answer: dict[str, Any] = json.loads(line.removeprefix("said "))
                return answer
        pytest.fail("the process that runs the turns has ended")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Turns]:
    turns = Turns(tmp_path_factory.mktemp("turns"))
    yield turns
    turns.close()


def write_logs(root: Path, days: int, players: int, shift: float = 0.0) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    decisions, events = [], []
    for day in range(days):
        at = midnight - (DAYS + 1 - day) * timedelta(days=1)
        for p in range(players):
            about = {"decision_id": f"d{day}-{p}", "player_id": f"p{p}", "decided_at": at + timedelta(hours=6), "policy": "careful" if p % 2 else "bold"}
            decisions.append(about | {"propensity": 0.5, "goal": 2.0 + p % 7 + shift, "joy": float(day)})
            events.append({"player_id": f"p{p}", "occurred_at": at + timedelta(hours=3), "rounds": 1.0 + p})
    pl.DataFrame(decisions).write_parquet(root / "decisions.parquet")
    pl.DataFrame(events).write_parquet(root / "activity.parquet")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, turns: Turns) -> Platform:
    """A workspace after one turn, whose logs have grown since, by players too, and whose server took an event meanwhile."""
    root = tmp_path_factory.mktemp("before") / "shop"
    root.mkdir()
    (root / "fastq.yaml").write_text(yaml.safe_dump(TREE))
    write_logs(root, DAYS - 1, PLAYERS // 2)
    platform = load_platform(root)
    assert turns(platform) == {"done": True, "signal": 0}
    write_logs(root, DAYS, PLAYERS, shift=0.5)
    log = open_log(platform)
    log.record_activity([Event("p1", now_us() - 1_000_000, {"rounds": 100.0})]).result(10)
    log.close()
    return platform


def everything(platform: Platform) -> dict[str, Any]:
    """What a turn leaves: the accepted tables, what they look like, the features and each player's state, without when it was made."""
    read, workspace = records.read_tables(platform), Workspace(platform.root)
    opened = store.open_store(platform)
    states = store.read_states(opened, [f"p{p}" for p in range(PLAYERS)], WIDTH)
    opened.close()
    parts = (np.nan_to_num(states.window, nan=-1.0), states.counts, states.decided, states.period)
    return {
        "decisions": read.decisions.to_dicts(),
        "counts": read.counts,
        "activity": pl.read_parquet(workspace.tables / "activity.parquet").sort("player_id", "occurred_at").to_dicts(),
        "reference": workspace.reference.read_text(),
        "overlap": workspace.overlap.read_text(),
        "rows": pl.read_parquet(workspace.features / "player_rows.parquet").sort("row").to_dicts(),
        "pointers": pl.read_parquet(workspace.features / "pointers.parquet").sort("decision_id").to_dicts(),
        **{f"state of p{p}": [part[p].tobytes() for part in parts] for p in range(PLAYERS)},
    }


@pytest.fixture(scope="module")
def undisturbed(before: Platform, turns: Turns, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a turn leaves that nothing disturbs."""
    platform = load_platform(shutil.copytree(before.root, tmp_path_factory.mktemp("undisturbed") / "shop"))
    assert turns(platform) == {"done": True, "signal": 0}
    left = everything(platform)
    assert len({str(left[f"state of p{p}"]) for p in range(PLAYERS)}) == PLAYERS, "each has a state of their own"
    return left


def whole(left: dict[str, Any], old: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether each part is the one from before or the new one."""
    return all(left[part] in (old[part], wanted[part]) for part in wanted)


def test_killed_at_each_step_in_turn(before: Platform, undisturbed: dict[str, Any], turns: Turns, tmp_path: Path) -> None:
    """Each run dies at the first point where none has died yet, and goes on from what the last one left; the one that passes them all is as good as any."""
    platform, old = load_platform(shutil.copytree(before.root, tmp_path / "shop")), everything(before)
    past: list[str] = []
    for step in ("ingest", "materialize"):
        while "point" in (ended := turns(platform, step, past=past)):
            assert ended["signal"] == signal.SIGKILL
            past.append(ended["point"])
            assert whole(everything(platform), old, undisturbed), past[-1]
        assert ended == {"done": True, "signal": 0}, ended
    assert everything(platform) == undisturbed
    for kind in (
        "half of sink_ipc",
        "half of sink_parquet",
        "os.rename /.fastq/tables",
        "os.rename /.fastq/.tables",
        "state.json",
        "INSERT",
        "UPDATE",
        "COMMIT",
    ):
        assert any(kind in point for point in past), kind
    assert not list(Workspace(platform.root).state.glob(".tables.*")), "what the killed ones left is removed"


def test_a_full_disk_is_said_and_changes_nothing(before: Platform, undisturbed: dict[str, Any], turns: Turns, tmp_path: Path) -> None:
    """No file may grow beyond so many bytes, from hardly any to enough; and no database by a page."""
    platform, old = load_platform(shutil.copytree(before.root, tmp_path / "shop")), everything(before)
    refused = [turns(platform, "validate", limit=500)["refused"]]  # no server runs, so that whoever reads its log has to make what readers share
    assert ".db: the disk is full" in refused[0]
    with contextlib.closing(sqlite3.connect(next(Workspace(platform.root).served.glob("*.db")))) as server:
        server.execute("select * from activity").fetchall()  # as a running one has it: what readers share of the log is there already
        for step in ("validate", "ingest"):
            limit = 500
            while "refused" in (ended := turns(platform, step, limit=limit)):
                refused.append(ended["refused"])
                assert everything(platform) == old
                limit *= 2
            assert ended == {"done": True, "signal": 0}
            assert whole(everything(platform), old, undisturbed)
            if step == "validate":  # alone, since the gate's report is larger than these tables are
                refused.append(turns(platform, "tables", limit=500)["refused"])
                assert everything(platform) == old
        between = everything(platform)
        assert [between[part] for part in ("decisions", "activity", "rows")] == [undisturbed["decisions"], undisturbed["activity"], old["rows"]]
        refused += [turns(platform, "materialize", **how)["refused"] for how in ({"limit": 500}, {"full": True})]
    assert whole(everything(platform), between, undisturbed)
    assert all("the disk is full" in said for said in refused), refused
    for place in ("staged/", "reports/", "tables", "player_rows.parquet", ".db"):
        assert any(f"{place}" in said for said in refused), (place, refused)
    assert turns(platform) == {"done": True, "signal": 0}
    assert everything(platform) == undisturbed
