"""Logs to windows at size: 10 million events of 12 measures and 100,000 players, and 10 million decisions through the whole gate.

Bars: at most 3 times a bare Polars scan and group-by of the same file (5 times for the gate), medians of 5 in turns; at its peak a process
holds at most 1.5 times the resulting matrix and 1 GB (the gate 2 GB, whatever the log's size); time and memory grow linearly from 100 thousand to 30
million events. `make bench-data`, or in pieces by ARGS="-k …"; logs, figures and the picture of the slope stay in `build/bench-data` (or $BENCH_DATA), 9 GB.
Each figure comes from a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

WHERE = Path(os.environ.get("BENCH_DATA", Path(__file__).parents[2] / "build" / "bench-data"))
EVENTS, EVENTS_PER_PLAYER, MEASURES, DAYS, DECISIONS_PER_PLAYER = 10_000_000, 100, 12, 60, 5
SIZES = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000]
START = datetime(2026, 1, 1, tzinfo=UTC)
ROUNDS = 5


def platform_tree(measures: int = MEASURES) -> dict:
    return {
        "platform": "bench",
        "logs": {"decisions": "decisions.parquet", **({"activity": "activity.parquet"} if measures else {"players": "players.parquet"})},
        "state": {
            "window": 30,
            "measures": {f"m{j}": {"aggregate": ["sum", "mean", "max", "count"][j % 4], "min": 0} for j in range(measures)},
            "attributes": {} if measures else {"age": {"kind": "numeric"}},
        },
        "policies": ["stay", "go"],
        "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 10}, "gift": {"low": 0, "high": 1}}},
        "objectives": {"joy": {}, "return": {}, "cost": {"weight": -1}},
    }


def players_of(draw: np.random.Generator, n: int, players: int) -> pl.Series:
    return pl.select("p" + pl.Series(draw.integers(0, players, n)).cast(pl.String).str.zfill(7)).to_series()


def moments(draw: np.random.Generator, n: int, first: float, last: float) -> pl.Series:
    """In order, as logs are written, at whole milliseconds."""
    at = np.sort(draw.integers(int(first * 86_400_000), int(last * 86_400_000), n)) * 1_000
    return pl.Series(at + int(START.timestamp() * 1e6)).cast(pl.Datetime("us", "UTC"))


def written(path: Path, chunks) -> None:
    """Chunk by chunk into one file, so that the generator itself needs little memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = None
    for chunk in chunks:
        table = chunk.to_arrow(compat_level=pl.CompatLevel.oldest())
        writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd", compression_level=1)
        writer.write_table(table)
    writer.close()
    partial.rename(path)


def decisions(draw: np.random.Generator, n: int, players: int, chunk: int = 500_000):
    for begin in range(0, n, chunk):
        m = min(chunk, n - begin)
        yield pl.DataFrame(
            {
                "decision_id": pl.select("d" + pl.int_range(begin, begin + m).cast(pl.String)).to_series(),
                "player_id": players_of(draw, m, players),
                "decided_at": moments(draw, m, DAYS * begin / n, DAYS * (begin + m) / n),
                "policy": pl.Series(np.array(["stay", "go"], object)[draw.integers(0, 2, m)], dtype=pl.String),
                "propensity": draw.uniform(0.01, 2, m),
                "goal": draw.uniform(0, 10, m),
                "gift": draw.uniform(0, 1, m),
                **{name: draw.normal(size=m) for name in ("joy", "return", "cost")},
            }
        )


def activity_log(n: int) -> Path:
    """A workspace with `n` events, in the order of time; one in a hundred was recorded some days late."""
    workspace = WHERE / f"activity-{n}"
    if (workspace / "fastq.yaml").exists():
        return workspace
    draw, players, chunk = np.random.default_rng(n), n // EVENTS_PER_PLAYER, 500_000

    def chunks():
        for begin in range(0, n, chunk):
            m = min(chunk, n - begin)
            at = moments(draw, m, DAYS * begin / n, DAYS * (begin + m) / n)
            late = np.where(draw.random(m) < 0.01, draw.uniform(0, 5 * 86_400e6, m), 0).astype(np.int64)
            known = at + pl.Series(late).cast(pl.Duration("us"))
            yield pl.DataFrame(
                {
                    "player_id": players_of(draw, m, players),
                    "occurred_at": at,
                    "recorded_at": known,
                    **{f"m{j}": draw.gamma(2.0, 1.0, m) for j in range(MEASURES)},
                }
            )

    written(workspace / "activity.parquet", chunks())
    written(workspace / "decisions.parquet", decisions(draw, players * DECISIONS_PER_PLAYER, players))
    (workspace / "fastq.yaml").write_text(json.dumps(platform_tree()))
    return workspace


def decision_log(n: int) -> Path:
    workspace = WHERE / f"decisions-{n}"
    if (workspace / "fastq.yaml").exists():
        return workspace
    draw, players = np.random.default_rng(n), n // 50
    written(workspace / "decisions.parquet", decisions(draw, n, players))
    pl.DataFrame({"player_id": [f"p{i:07d}" for i in range(players)], "age": draw.integers(18, 80, players)}).write_parquet(workspace / "players.parquet")
    (workspace / "fastq.yaml").write_text(json.dumps(platform_tree(measures=0)))
    assert run("reference", workspace)["quantities"] > 0
    return workspace


# ---- what is measured, each in a process of its own -------------------------------------------------------------------------
def bare(workspace: Path, table: str) -> dict:
    """Scan the file and group it by player and day, every number summed: the least that anybody does with it."""
    at, scan = {"activity": "occurred_at", "decisions": "decided_at"}[table], pl.scan_parquet(workspace / f"{table}.parquet")
    day = pl.col(at).dt.epoch("us").floordiv(86_400_000_000).alias("day")
    cells = scan.group_by("player_id", day).agg(pl.col(pl.Float64).sum()).collect(engine="streaming")
    return {"rows": cells.height}


def windows(workspace: Path) -> dict:
    """From the logs as they lie there, nothing of them read before, to windows that training can take."""
    from fastq import features, load_platform, records
    from fastq import windows as transitions

    platform = load_platform(workspace)
    read = records.read_records(platform)
    stages = {"read_records": time.perf_counter()}
    data = transitions.build(platform, read, features.build_rows(platform, read))
    stages["windows"] = time.perf_counter()
    assert (
        read.counts["activity"].accepted + read.counts["activity"].repeated == pl.scan_parquet(workspace / "activity.parquet").select(pl.len()).collect().item()
    )
    return {"rows": len(data.matrix), "matrix": data.matrix.nbytes, "decisions": len(data), "stages": stages}


def validate(workspace: Path) -> dict:
    """The whole gate, nothing of the log read before: judge, hold against earlier logs, the verdict of Great Expectations, overlap, report and quarantine."""
    from fastq import load_platform
    from pipelines.validate import judged, read

    platform = load_platform(workspace)
    document = judged(platform, read(platform))
    assert document["accepted"] == pl.scan_parquet(workspace / "decisions.parquet").select(pl.len()).collect().item()
    return {"rules": len(document["rules"])}


def reference(workspace: Path) -> dict:
    """What this log looks like, for the gate to hold it against."""
    from fastq import load_platform, records, validation

    platform = load_platform(workspace)
    profile = validation.profile(platform, records.judge(platform))
    (workspace / "reference.json").write_text(json.dumps(dataclasses.asdict(profile)))
    return {"quantities": len(profile.edges)}


def data_half(workspace: Path) -> dict:
    """What a retraining does before it learns: read, judge and keep the logs, build the features, fill both stores, lay the transitions."""
    from pipelines.ingest import ingest_logs
    from pipelines.materialize import build_features, windows_of

    stages, turn = {}, "turn"
    ingest_logs.fn(str(workspace), turn, None)
    stages["read, judge, keep"] = time.perf_counter()
    build_features.fn(str(workspace), turn)
    stages["features, stores"] = time.perf_counter()
    data = windows_of(str(workspace), turn)
    stages["transitions"] = time.perf_counter()
    return {"decisions": len(data), "fingerprint": data.fingerprint(), "stages": stages}


def daily_log(n: int) -> Path:
    """A workspace with `n` decisions, a file for each day; the last one lies beside, still to come."""
    workspace, draw, players = WHERE / f"daily-{n}", np.random.default_rng(n), n // 50
    shutil.rmtree(workspace, ignore_errors=True)
    platform = platform_tree(measures=0)
    for day in range(DAYS):
        chunk = next(decisions(draw, n // DAYS, players, chunk=n))
        ids, at = pl.select(f"d{day:03d}-" + pl.int_range(len(chunk)).cast(pl.String)).to_series(), moments(draw, len(chunk), day, day + 1)
        written(workspace / ("decisions" if day < DAYS - 1 else ".") / f"{day:03d}.parquet", [chunk.with_columns(decision_id=ids, decided_at=at)])
    pl.DataFrame({"player_id": [f"p{i:07d}" for i in range(players)], "age": draw.integers(18, 80, players)}).write_parquet(workspace / "players.parquet")
    (workspace / "fastq.yaml").write_text(json.dumps(platform | {"logs": platform["logs"] | {"decisions": "decisions/*.parquet"}}))
    return workspace


def run(what: str, workspace: Path, *more: str, again: bool = False) -> dict:
    if not again:
        shutil.rmtree(workspace / ".fastq", ignore_errors=True)
    if (workspace / "reference.json").exists():
        (workspace / ".fastq").mkdir()
        shutil.copy(workspace / "reference.json", workspace / ".fastq" / "reference.json")
    os.sync()  # what the last one wrote is not this one's to wait for
    finished = subprocess.run([sys.executable, __file__, what, str(workspace), *more], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def in_turns(*runs) -> list[dict]:
    """The median of `ROUNDS` of each, taken in turns: what else the machine does is then the same for all."""
    found = [[run(*one) for one in runs] for _ in range(ROUNDS)]
    return [
        {key: float(np.median([turn[i][key] for turn in found])) for key in ("wall", "cpu", "peak")} | {"all": [turn[i] for turn in found]}
        for i in range(len(runs))
    ]


def show(name: str, found: dict, against: dict | None = None) -> None:
    ratio = "" if against is None else f"; {found['wall'] / against['wall']:.2f} times the time, {found['cpu'] / against['cpu']:.2f} times the processor time"
    print(f"\n{name}: {found['wall']:.2f} s, {found['cpu']:.2f} s of processor time, peak {found['peak'] / 1e9:.2f} GB{ratio}")


@pytest.mark.timeout(3_600)
def test_ten_million_events_to_windows():
    workspace = activity_log(EVENTS)
    plain, ours = in_turns(("bare", workspace, "activity"), ("windows", workspace))
    show("bare", plain)
    show("windows", ours, plain)
    matrix = ours["all"][0]["matrix"]
    print(f"matrix {matrix / 1e9:.2f} GB, allowed {(1.5 * matrix + 1e9) / 1e9:.2f} GB; stages {ours['all'][-1]['stages']}")
    assert ours["peak"] <= 1.5 * matrix + 1e9
    assert ours["wall"] <= 3 * plain["wall"]


@pytest.mark.timeout(3_600)
def test_ten_million_decisions_through_the_gate():
    workspace = decision_log(10_000_000)
    plain, ours = in_turns(("bare", workspace, "decisions"), ("validate", workspace))
    show("bare", plain)
    show("validate", ours, plain)
    assert ours["wall"] <= 5 * plain["wall"]
    assert ours["peak"] <= 2e9


@pytest.mark.timeout(3_600)
def test_one_new_day_on_ten_million_decisions():
    """The data half of a retraining after one more day, beside that of the first one, which reads everything. DECISIONS of them."""
    n = int(os.environ.get("DECISIONS", "10000000"))
    workspace = daily_log(n)
    try:
        run("data_half", workspace)
        (workspace / f"{DAYS - 1:03d}.parquet").rename(workspace / "decisions" / f"{DAYS - 1:03d}.parquet")
        day = run("data_half", workspace, again=True)
        whole = run("data_half", workspace)
    finally:
        shutil.rmtree(workspace)
    show(f"data half of {whole['decisions']:,} decisions, everything new", whole)
    show("one new day", day, whole)
    print(f"stages {whole['stages']} and {day['stages']}")
    assert day["fingerprint"] == whole["fingerprint"], "the same transitions, whatever was read before"
    assert day["cpu"] <= whole["cpu"] / 10


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("n", SIZES)
def test_events_of_one_size(n):
    """A point of the slope, kept: pieces of the whole need not be measured in one go."""
    (WHERE / f"windows-{n}.json").write_text(json.dumps(run("windows", activity_log(n))))


@pytest.mark.timeout(3_600)
def test_time_and_memory_grow_linearly():
    from matplotlib.figure import Figure

    found = [json.loads((WHERE / f"windows-{n}.json").read_text()) for n in SIZES]
    n = np.array(SIZES, float)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    slopes = {}
    for axes, (key, unit, scale) in zip(figure.subplots(1, 2), (("cpu", "seconds of processor time", 1), ("peak", "GB at its peak", 1e9)), strict=True):
        values = np.array([one[key] / scale for one in found])
        # what a process needs before it has seen a row is no part of the growth
        per_event, at_rest = np.polyfit(n, values, 1, w=1 / n**0.5)
        slopes[key] = np.polyfit(np.log(n[2:]), np.log(np.maximum(values[2:] - at_rest, 1e-9)), 1)[0]
        axes.plot(n / 1e6, values, "o")
        axes.plot(n / 1e6, at_rest + per_event * n, "-", lw=1)
        axes.set(xlabel="million events", ylabel=unit, title=f"{per_event * 1e6:.2f} a million, power {slopes[key]:.2f}")
    figure.savefig(WHERE / "slope.png", dpi=80)
    for size, one in zip(SIZES, found, strict=True):
        print(f"\n{size:>12,} events: {one['wall']:.2f} s, {one['cpu']:.2f} s of processor time, {one['peak'] / 1e9:.2f} GB", end="")
    print(f"\nfrom a million on, time grows with the power {slopes['cpu']:.2f} and memory with {slopes['peak']:.2f} of the events; {WHERE / 'slope.png'}")
    assert slopes["cpu"] <= 1.15
    assert slopes["peak"] <= 1.15


if __name__ == "__main__":
    what, workspace, *more = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    begun, used = time.perf_counter(), time.process_time()
    answer = {"bare": bare, "windows": windows, "validate": validate, "reference": reference, "data_half": data_half}[what](Path(workspace), *more)
    answer |= {"wall": time.perf_counter() - begun, "cpu": time.process_time() - used, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if "stages" in answer:
        answer["stages"] = {name: round(at - begun, 2) for name, at in answer["stages"].items()}
    print(json.dumps(answer))
