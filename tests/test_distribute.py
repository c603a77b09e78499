"""Two nodes of a Ray cluster work out the same features as one machine does."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import ray
import torch

from fastq import features, learner, staging, windows, worlds
from fastq.errors import ConfigurationError, WorkspaceError
from fastq.platform import load_platform
from fastq.records import read_records, read_tables, write_tables
from fastq.workspace import Workspace
from pipelines import distribute, train
from pipelines.distribute import followed, with_cells
from pipelines.materialize import POINTERS_FILE, windows_of


@pytest.fixture
def two_nodes():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes_make_what_one_machine_makes_and_one_that_is_left_does_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_nodes: None) -> None:
    worlds.write_logs(worlds.world("arena"), tmp_path, players=200, days=12, seed=100)
    platform = load_platform(tmp_path)
    monkeypatch.setattr(staging, "PART_BYTES", 20_000)
    write_tables(read_records(platform), Workspace(tmp_path))
    read = read_tables(platform)
    rows = features.build_rows(platform, read)
    told: list[dict] = []
    shared = with_cells(platform, rows, told)
    assert len(told) == len(rows.events) >= 4
    assert len({part["node"] for part in told}) == 2, "both nodes had a part in it"
    alone, together = windows.build(platform, read, rows), windows.build(platform, read, shared)
    assert together.fingerprint() == alone.fingerprint()
    assert alone.matrix.tobytes() == together.matrix.tobytes()

    # and it is their cells that are laid
    spoilt = dataclasses.replace(shared, ready=tuple(part.with_columns(pl.col("games") + 1) for part in shared.ready))
    assert windows.build(platform, read, spoilt).fingerprint() != alone.fingerprint()

    # one of them dies in the middle of its first part: the other does what it leaves
    died, head, whole = tmp_path / "died", ray.get_runtime_context().get_node_id(), distribute.work_out

    def dying(item: dict) -> dict:
        if ray.get_runtime_context().get_node_id() != head and not died.exists():
            died.touch()
            os.kill(os.getppid(), signal.SIGKILL)  # the node's own process, and with it everything on the node
            time.sleep(60)
        return whole(item)

    left: list[dict] = []
    with monkeypatch.context() as patch:
        patch.setattr(distribute, "work_out", dying)
        after = windows.build(platform, read, with_cells(platform, rows, left))
    assert died.exists()
    assert [node["NodeID"] for node in ray.nodes() if node["Alive"]] == [head]
    assert sorted(part["part"] for part in left) == list(range(len(rows.events)))
    assert after.matrix.tobytes() == alone.matrix.tobytes()

    # once in a turn, also for workers that hold every processor there is: nobody is asked again
    with_cells(platform, rows, turn="now")
    with monkeypatch.context() as patch:
        patch.setattr(ray.data, "from_items", lambda *_, **__: pytest.fail("asked again"))
        kept = with_cells(platform, rows, turn="now")
        assert windows.build(platform, read, kept).matrix.tobytes() == alone.matrix.tobytes()
        with pytest.raises(pytest.fail.Exception):
            with_cells(platform, rows, turn="the next one")

    # and where what it reads is gone, that is said
    (Workspace(tmp_path).tables / "activity.parquet").write_bytes(b"gone")
    with pytest.raises(WorkspaceError, match=r"services\.ray: local: the cluster could not work out the features"):
        with_cells(platform, rows)


def test_two_workers_learn_what_one_process_learns(tmp_path: Path, two_nodes: None) -> None:
    """Ray Train with Lightning by `training.workers: 2`: the value on players held out is the one process's to 1e-4, and progress arrives."""
    torch.set_num_threads(1)
    worlds.write_logs(worlds.world("arena"), tmp_path, players=150, days=12, seed=100)
    file = tmp_path / "fastq.yaml"
    file.write_text(file.read_text().replace("preset: default", "preset: default, epochs: 3, batch_size: 256, workers: 2"))
    platform = load_platform(tmp_path)
    write_tables(read_records(platform), Workspace(tmp_path))
    read = read_tables(platform)
    data = windows.build(platform, read, features.build_rows(platform, read))
    pointers = pl.DataFrame({"decision_id": data.decision_id, "row": np.where(data.end >= data.first, data.end, -1)})
    Workspace(tmp_path).make(Workspace(tmp_path).features, Workspace(tmp_path).runs / "turn")
    pointers.with_columns(pl.when(pl.col("row") >= 0).then("row")).write_parquet(Workspace(tmp_path).features / POINTERS_FILE)
    told = []
    together = train.learn_together(platform, "turn", None, lambda *said: told.append(said))
    assert [(stage, done) for stage, done, *_ in told] == [(stage, done) for stage in ("representation", "value and actor") for done in (1, 2, 3)]

    again = windows_of(str(tmp_path), "turn")
    assert again.fingerprint() == data.fingerprint()
    alone = learner.train(platform, again)
    held_out = np.flatnonzero(windows.held_out_players(again.player_ids, platform.training.holdout, platform.training.seed)[again.player])
    one, two = (policy.recommend(again.states(held_out), explore=False).value.mean() for policy in (alone, together))
    assert two == pytest.approx(one, rel=1e-4)
    for before, after in zip(alone.details["history"]["representation"], together.details["history"]["representation"], strict=True):
        assert after == pytest.approx(before, rel=1e-3)
    # had each worker drawn its own luck, or its own means, they would have gone other ways
    other = learner.train(platform.model_copy(update={"training": platform.training.model_copy(update={"seed": 1})}), again)
    assert other.recommend(again.states(held_out), explore=False).value.mean() != pytest.approx(one, rel=1e-4)


def test_what_workers_tell_is_told_once_and_whole(tmp_path: Path) -> None:
    told = []
    with followed(tmp_path / "progress", lambda *said: told.append(said)), (tmp_path / "progress").open("a") as file:
        for epoch in (1, 2):
            file.write(f'["stage", {epoch}, 2, {{"loss": 0.5}}]\n')
            file.flush()
    assert told == [("stage", 1, 2, {"loss": 0.5}), ("stage", 2, 2, {"loss": 0.5})]


def test_what_whoever_is_told_raises_is_not_lost(tmp_path: Path) -> None:
    def refuse(stage: str, *_: object) -> None:
        raise OSError(f"the book of {stage} is full")

    with pytest.raises(OSError, match="the book of value is full"), followed(tmp_path / "progress", refuse):
        (tmp_path / "progress").write_text('["value", 1, 2, {}]\n')


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ("batch_size: 1023, workers: 2", "multiple of workers"),
        ("preset: paper, workers: 2", "by one process"),
        ("accelerator: cuda, workers: 2", "learn on their processors"),
    ],
)
def test_parts_that_would_not_be_equal_are_refused(tmp_path: Path, training: str, says: str) -> None:
    worlds.write_logs(worlds.world("arena"), tmp_path, players=10, days=2)
    file = tmp_path / "fastq.yaml"
    file.write_text(file.read_text().replace("preset: default", training))
    with pytest.raises(ConfigurationError, match=says):
        load_platform(tmp_path)
