"""What an analyst waits for: pages, sliders, SQL and explanations of everybody, at 100,000 players and 10 million decisions; `make bench-analyst`.

Bars (95th percentile of the server's own time): a player's page 300 ms, a slider 100 ms; SQL at most 1.2 times bare DuckDB on the same Parquet; everybody's
parts and contrast 5,000 players a second on two cores, with attributions 200. Smaller: FASTQ_BENCH_PLAYERS, FASTQ_BENCH_ROWS.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time

import duckdb
import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from fastq import features, queries, records, registry
from fastq.platform import load_platform
from fastq.workspace import SETTLED_NS, Workspace
from feature_repo import store
from serving import auth, endpoint, explain_all

PLAYERS, ROWS = int(os.environ.get("FASTQ_BENCH_PLAYERS", "100_000")), int(os.environ.get("FASTQ_BENCH_ROWS", "10_000_000"))
SERVED = {"none": 0, "few": 10_000, "many": 500_000, "not known as such": 10_000}  # decisions by fastq that are in the accepted tables too
REPEATS = 5
QUESTIONS = {
    "by policy": "SELECT policy, count(*) AS decisions, avg(returns) AS returns, avg(cost) AS cost FROM {decisions} GROUP BY policy ORDER BY policy",
    "by day": "SELECT decided_at::DATE AS day, count(*) AS decisions, avg(engagement) AS engagement FROM {decisions} GROUP BY day ORDER BY day",
    "dearest players": "SELECT player_id, sum(cost) AS paid FROM {decisions} GROUP BY player_id ORDER BY paid DESC, player_id LIMIT 20",
}


@pytest.fixture(scope="module")
def platform(trained, tmp_path_factory):
    """The trained workspace, its players and decisions repeated under new ids."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    platform = load_platform(shutil.copytree(trained, tmp_path_factory.mktemp("bench") / "workspace"))
    few = store.materialized(platform)
    many = few[np.arange(PLAYERS) % len(few)].with_columns(player_id=pl.Series([f"q{i:07d}" for i in range(PLAYERS)]))
    store.materialize(platform, many)
    path = Workspace(platform.root).tables / "decisions.parquet"
    logged = pl.read_parquet(path)
    pieces = [
        logged.with_columns(
            pl.format("{}-{}", "decision_id", pl.lit(k)).alias("decision_id"), pl.format("{}-{}", "player_id", pl.lit(k % 50)).alias("player_id")
        )
        for k in range(-(-ROWS // len(logged)))
    ]
    pl.concat(pieces).head(ROWS).write_parquet(path)
    return platform


def percentile(seconds: list[float], share: float = 0.95) -> float:
    return 1000 * float(np.quantile(seconds, share))


def test_pages_and_sliders(platform) -> None:
    key = auth.create_key(Workspace(platform.root), "analyst")["key"]
    rng = np.random.default_rng(0)
    with TestClient(endpoint.create_app(platform), headers={"Authorization": f"Bearer {key}"}) as client:

        def timed(address: str, **query: object) -> float:
            started = time.perf_counter()
            assert client.get(address, params=query).status_code == 200
            return time.perf_counter() - started

        players = [f"q{i:07d}" for i in rng.integers(0, PLAYERS, 120)]
        for player in players[:10]:
            timed("/console/player", id=player)
            timed("/console/what-if", player=player)
        first = timed("/console", q="q000")
        page = [timed("/console/player", id=player, against="retain") for player in players]
        slider = [timed("/console/what-if", player=player, **{"w.4": -rng.uniform(0, 3), "a.1": rng.uniform(0, 50)}) for player in players]
        search = [timed("/console", q=player[:6]) for player in players[:40]]
    print(f"\nplayer page  p50 {percentile(page, 0.5):.0f} ms, p95 {percentile(page):.0f} ms (bar 300)")
    print(f"slider       p50 {percentile(slider, 0.5):.0f} ms, p95 {percentile(slider):.0f} ms (bar 100)")
    print(f"search       p50 {percentile(search, 0.5):.0f} ms, p95 {percentile(search):.0f} ms; the first one {1000 * first:.0f} ms")


def test_everybody(platform) -> None:
    policy = registry.load_policy(f"models:/{platform.platform}@champion", platform.root)
    frame = store.materialized(platform, 16_384)
    for attributions, n in ((False, min(8_192, len(frame))), (True, 512)):
        pieces = [frame[start : min(start + explain_all.CHUNK, n)] for start in range(0, n, explain_all.CHUNK)]  # as the command takes them
        chunks = [features.states_at(platform, piece, frame["event_timestamp"][0]) for piece in pieces]
        rates = []
        for _ in range(3):
            started, used = time.perf_counter(), time.process_time()
            for chunk in chunks:
                explain_all.rows(policy, chunk, "retain", attributions=attributions)
            rates.append((n / (time.perf_counter() - started), n / (time.process_time() - used)))
        wall, cpu = (statistics.median(column) for column in zip(*rates, strict=True))
        what, bar = ("with attributions", 200) if attributions else ("parts and contrast", 5_000)
        print(f"\n{what}: {wall:,.0f} players/s by the clock, {cpu:,.0f} per processor second (bar {bar:,} on two)")


@pytest.mark.parametrize("served", SERVED)
def test_sql_against_bare_duckdb(platform, served: str) -> None:
    """With the platform's logs alone; and with decisions among them, scattered over all players, that fastq served, which the view must count once.

    A validation that finds a server's log knows which they are; one that did not leaves them to be looked for by whoever asks.
    """
    workspace = Workspace(platform.root)
    kept = records.read_tables(platform)
    total, batch = kept.decisions.height, workspace.served / "bench.parquet"
    ours = np.random.default_rng(1).choice(total, SERVED[served], replace=False)
    workspace.make(workspace.served)
    batch.unlink(missing_ok=True)
    if served == "not known as such":
        records.write_tables(kept, workspace)
    kept.decisions[ours].with_columns(policy=pl.lit("fastq")).write_parquet(batch)
    if served != "not known as such":
        records.write_tables(kept, workspace)
    del kept
    started = time.perf_counter()
    queries._opened(platform, frozenset({"decisions"}), 4_096).close()
    opened = time.perf_counter() - started
    time.sleep(2 * SETTLED_NS / 1e9)
    queries._opened(platform, frozenset({"decisions"}), 4_096).close()  # what was too new before is kept now
    started = time.perf_counter()
    connection = queries._opened(platform, frozenset({"decisions"}), 4_096)
    again = time.perf_counter() - started
    bare = duckdb.connect(config={"threads": max(1, min(4, os.cpu_count() or 2))})
    bare.execute("SET TimeZone = 'UTC'")
    same = f"read_parquet(['{workspace.tables / 'decisions.parquet'}', '{workspace.tables / 'served.parquet'}'])"
    assert connection.execute("SELECT count(*) FROM decisions").fetchone() == (total,)
    for name, question in QUESTIONS.items():
        ratios, own = [], []
        for _ in range(REPEATS):
            started = time.perf_counter()
            connection.execute(question.format(decisions="decisions")).fetchall()
            between = time.perf_counter()
            bare.execute(question.format(decisions=same)).fetchall()
            ended = time.perf_counter()
            own.append(between - started)
            ratios.append((between - started) / (ended - between))
        print(f"\nSQL, {total:,} rows, served: {served}; {name}: {statistics.median(own):.2f} s, {statistics.median(ratios):.2f} times bare DuckDB (bar 1.2)")
    print(f"the connection, with its views: {opened:.2f} s, and {again:.2f} s where nothing changed since the last")
    connection.close()
