"""The unit costs in `infra/scale.md`: CPU-seconds and bytes per million decisions, player-days, requests and explanations, on the simulated platform."""

import time
from pathlib import Path

import numpy as np

from fastq import features, records, windows, worlds
from fastq.platform import load_platform
from fastq.workspace import Workspace

PLAYERS, DAYS = 2_000, 40


def size(directory):
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def test_unit_costs(tmp_path, policy, data):
    rows = []

    def measured(what, per, count, unit):
        class Clock:
            def __enter__(self):
                self.began = time.process_time()

            def __exit__(self, *_):
                rows.append((what, (time.process_time() - self.began) / count * per, unit))

        return Clock()

    worlds.write_logs(worlds.world("arena"), tmp_path, players=PLAYERS, days=DAYS, seed=0)
    platform = load_platform(tmp_path)
    with measured("warm up", 1, 1, ""):
        records.read_records(platform)
    million = 1_000_000
    read = records.read_records(platform)
    decisions, events = len(read.decisions), len(read.activity)
    with measured("read and judge the logs", million, decisions, "CPU-s per million decisions (with their activity)"):
        read = records.read_records(platform)
    with measured("keep the accepted tables", million, decisions, "CPU-s per million decisions"):
        records.write_tables(read, Workspace(platform.root))
    with measured("feature rows", million, decisions, "CPU-s per million decisions"):
        built = features.build_rows(platform, read)
    with measured("transitions", million, decisions, "CPU-s per million decisions"):
        made = windows.build(platform, read, built)
    with measured("online states", million, PLAYERS, "CPU-s per million players"):
        from datetime import UTC, datetime

        features.online_frame(platform, read, datetime.now(UTC))
    states = data.states(np.resize(np.arange(len(data)), 20_000))
    policy.recommend(states)
    with measured("recommend, in batches", million, 20_000, "CPU-s per million players"):
        policy.recommend(states)
    some = data.states(np.resize(np.arange(len(data)), 1_000))
    policy.explain(some, against="retain")
    with measured("explain (parts and contrast)", million, 1_000, "CPU-s per million explanations"):
        policy.explain(some, against="retain")
    print(f"\n{decisions:,} decisions and {events:,} events of {PLAYERS:,} players in {DAYS} days")
    for what, value, unit in rows[1:]:
        print(f"{what:32s} {value:12,.1f} {unit}")
    logs, tables = size(tmp_path / "logs"), size(Workspace(platform.root).tables)
    print(f"{'logs on disk':32s} {logs / decisions * million / 2**20:12,.0f} MiB per million decisions (with activity and proposals)")
    print(f"{'accepted tables on disk':32s} {tables / decisions * million / 2**20:12,.0f} MiB per million decisions")
    print(f"{'transitions in memory':32s} {made.matrix.nbytes / decisions * million / 2**20:12,.0f} MiB per million decisions")
    assert all(value > 0 for _, value, _ in rows[1:])
