"""Two nodes of a Ray cluster work out the same features as one machine does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl
import pytest

from fastq import features, staging, windows, worlds
from fastq.errors import WorkspaceError
from fastq.platform import load_platform
from fastq.records import read_records, read_tables, write_tables
from fastq.workspace import Workspace
from pipelines.distribute import with_cells


@pytest.fixture
def two_nodes():
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes_make_what_one_machine_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_nodes: None) -> None:
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
    (Workspace(tmp_path).tables / "activity.parquet").write_bytes(b"gone")
    with pytest.raises(WorkspaceError, match=r"services\.ray: local: the cluster could not work out the features"):
        with_cells(platform, rows)
