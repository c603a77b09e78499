"""Killed at any moment of reading the logs or materialising, or the disk full: nothing lost, nothing twice, what was there before is there still."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
TURN = """
import os, resource, signal, sys
from fastq.environment import prepare
from fastq.platform import load_platform
from fastq.workspace import Workspace
platform = load_platform(sys.argv[1])
prepare(Workspace(platform.root))
import feast.infra.online_stores.sqlite as sqlite
from fastq import records
from fastq.errors import FastqError
from feature_repo import store
from pipelines import materialize
kind, at, seen = sys.argv[2], int(sys.argv[3]), 0
store.BATCH = 10

def audit(event, arguments):
    global seen
    if event == "os.rename" and ".lock" not in str(arguments[0]):
        seen += 1
        if kind == "rename" and seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "count":
            print(f"rename {seen}: {arguments[1]}")

write, batches = sqlite.SqliteOnlineStore.online_write_batch, 0
def writing(self, config, table, data, progress):
    global batches
    batches += 1
    if kind == "batch" and batches == at:
        import datetime
        class Cut(list):
            def __iter__(self):
                for i, row in enumerate(list.__iter__(self)):
                    if i == len(self) // 2:
                        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a transaction
                    yield row
        data = Cut(data)
    return write(self, config, table, data, progress)
sqlite.SqliteOnlineStore.online_write_batch = writing
sys.addaudithook(audit)
if kind == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
try:
    records.write_tables(records.read_records(platform), Workspace(platform.root))
    materialize.build_features.fn(str(platform.root), "turn")
except FastqError as error:
    sys.exit(f"refused: {error}")
"""


def turn(platform: Platform, kind: str = "run", at: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", TURN, str(platform.root), kind, str(at)], capture_output=True, text=True, timeout=300, check=False)


def write_logs(root: Path, days: int, shift: float = 0.0) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    decisions, events = [], []
    for day in range(days):
        at = midnight - (DAYS + 1 - day) * timedelta(days=1)
        for p in range(PLAYERS):
            about = {"decision_id": f"d{day}-{p}", "player_id": f"p{p}", "decided_at": at + timedelta(hours=6), "policy": "careful" if p % 2 else "bold"}
            decisions.append(about | {"propensity": 0.5, "goal": 2.0 + p % 7 + shift, "joy": float(day)})
            events.append({"player_id": f"p{p}", "occurred_at": at + timedelta(hours=3), "rounds": 1.0 + p})
    pl.DataFrame(decisions).write_parquet(root / "decisions.parquet")
    pl.DataFrame(events).write_parquet(root / "activity.parquet")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A workspace after one turn, whose logs have grown since, and whose server took an event meanwhile."""
    root = tmp_path_factory.mktemp("before") / "shop"
    root.mkdir()
    (root / "fastq.yaml").write_text(yaml.safe_dump(TREE))
    write_logs(root, DAYS - 1)
    platform = load_platform(root)
    assert turn(platform).returncode == 0
    write_logs(root, DAYS, shift=0.5)
    log = open_log(platform)
    log.record_activity([Event("p1", now_us() - 1_000_000, {"rounds": 100.0})]).result(10)
    log.close()
    return platform


def everything(platform: Platform) -> dict[str, object]:
    """What a turn leaves: the accepted tables, the features and each player's state, without when it was made."""
    read = records.read_tables(platform)
    directory = Workspace(platform.root).features
    opened = store.open_store(platform)
    states = store.read_states(opened, [f"p{p}" for p in range(PLAYERS)], WIDTH)
    opened.close()
    assert not np.isnan(states.window).all(axis=(1, 2)).any()
    return {
        "decisions": read.decisions.to_dicts(),
        "activity": pl.read_parquet(Workspace(platform.root).tables / "activity.parquet").sort("player_id", "occurred_at").to_dicts(),
        "rows": pl.read_parquet(directory / "player_rows.parquet").sort("row").to_dicts(),
        "pointers": pl.read_parquet(directory / "pointers.parquet").sort("decision_id").to_dicts(),
        "states": [part.tobytes() for part in (np.nan_to_num(states.window, nan=-1.0), states.counts, states.decided, states.period)],
    }


@pytest.fixture(scope="module")
def undisturbed(before: Platform, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], int]:
    """What a turn leaves that nothing disturbs, and the number of its renames."""
    platform = load_platform(shutil.copytree(before.root, tmp_path_factory.mktemp("undisturbed") / "shop"))
    done = turn(platform, "count")
    assert done.returncode == 0, done.stderr[-2000:]
    renames = [line for line in done.stdout.splitlines() if line.startswith("rename ")]
    assert any("tables" in line for line in renames)
    assert any("player_state" in line for line in renames)
    return everything(platform), len(renames)


@pytest.mark.parametrize(("kind", "at"), [("rename", 2), ("batch", 3)])
def test_killed_and_run_again(before: Platform, undisturbed: tuple[dict[str, object], int], tmp_path: Path, kind: str, at: int) -> None:
    """Between the two renames that swap the tables; and when a batch of states is half written."""
    wanted, _ = undisturbed
    old = everything(before)
    platform = load_platform(shutil.copytree(before.root, tmp_path / "shop"))
    assert turn(platform, kind, at).returncode == -signal.SIGKILL
    left = everything(platform)  # everything can be read: what was there before, or whole what is there now
    assert [left["decisions"] in (old["decisions"], wanted["decisions"]), left["rows"] in (old["rows"], wanted["rows"])] == [True, True]
    again = turn(platform)
    assert again.returncode == 0, again.stderr[-2000:]
    assert everything(platform) == wanted
    assert not list(Workspace(platform.root).state.glob(".tables.*")), "what the killed one left is removed"


def test_a_full_disk_is_said_and_changes_nothing(before: Platform, undisturbed: tuple[dict[str, object], int], tmp_path: Path) -> None:
    """No file may grow beyond two kilobytes, so that not even a table can be written."""
    platform = load_platform(shutil.copytree(before.root, tmp_path / "shop"))
    old = everything(platform)
    refused = turn(platform, "full", 2_000)
    assert refused.returncode == 1
    assert "refused:" in refused.stderr, refused.stderr[-2000:]
    assert "disk" in refused.stderr.rsplit("refused:", 1)[1]
    assert everything(platform) == old
    assert turn(platform).returncode == 0
    assert everything(platform) == undisturbed[0]
