"""`make bench-serve`: the endpoint behind Ray Serve against a bare FastAPI endpoint behind the same Ray Serve, in the same run.

Both servers are up at once and measured in turns, by load from another process on loopback: keep-alive connections, each sending its next request
when the last one was answered. A request asks for one of 100,000 players at random: the state is read from the online store, the decision is
on disk before the answer leaves. Medians over rounds; processor time is that of all processes of a server, divided by its requests.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import Body, FastAPI

PLAYERS = int(os.environ.get("FASTQ_BENCH_PLAYERS", "100000"))
ROUNDS, SECONDS = int(os.environ.get("FASTQ_BENCH_ROUNDS", "3")), 4.0
CONNECTIONS = (1, 16, 64)


# ---- load, in a process of its own ----------------------------------------------------------------------------------------
class Connection(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it is answered."""

    def __init__(self, ask, until, done):
        self.ask, self.until, self.done = ask, until, done
        self.buffer, self.taken, self.statuses = b"", [], {}

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        if time.perf_counter() > self.until:
            self.transport.close()
            return
        self.sent = time.perf_counter()
        self.transport.write(self.ask())

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        status = int(head[9:12])
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.taken.append(time.perf_counter() - self.sent)
        self.buffer = b""
        self.send()

    def connection_lost(self, _):
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, path: str, key: str, lines: list[bytes], connections: int, seconds: float) -> dict:
    """Answers per second, latencies and statuses of closed loops; `lines`: the bodies to choose from."""

    def ask() -> bytes:
        body = random.choice(lines)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    loop, until = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = []
    for _ in range(connections):
        done = loop.create_future()
        _, protocol = await loop.create_connection(lambda done=done: Connection(ask, until, done), "127.0.0.1", port)
        made.append((protocol, done))
    started = time.perf_counter()
    await asyncio.wait([done for _, done in made], timeout=seconds + 20)
    spent = time.perf_counter() - started
    taken = np.concatenate([p.taken for p, _ in made]) * 1e3
    statuses: dict[int, int] = {}
    for protocol, _ in made:
        for status, times in protocol.statuses.items():
            statuses[status] = statuses.get(status, 0) + times
    p50, p99 = np.quantile(taken, [0.5, 0.99]).tolist() if len(taken) else (float("nan"), float("nan"))
    return {"rps": len(taken) / spent, "p50": p50, "p99": p99, "statuses": statuses, "n": int(sum(statuses.values()))}


# ---- the bare endpoint, in a server of its own --------------------------------------------------------------------------------
def bare(_: dict) -> object:
    """A FastAPI endpoint that takes a JSON body and gives a small one, deployed exactly as ours."""
    from ray import serve

    from serving.app import close_replica_port, deployment

    def make() -> FastAPI:
        close_replica_port()
        app = FastAPI()

        @app.post("/v1/recommendations")
        async def nothing(body: Annotated[dict, Body()]) -> dict:
            return {"recommendations": [{"player_id": body["players"][0], "propensity": 0.5}]}

        @app.get("/readyz")
        async def readyz() -> dict:
            return {"status": "ready"}

        return app

    return serve.deployment(**deployment())(serve.ingress(make)()).bind()


def serve_bare(workspace: str, port: int) -> None:
    from fastq.environment import prepare
    from fastq.platform import load_platform
    from fastq.workspace import Workspace
    from serving import app

    platform = load_platform(workspace)
    prepare(Workspace(platform.root))
    app.build = bare
    app.serve(platform, "127.0.0.1", port)


# ---- the workspace ------------------------------------------------------------------------------------------------------------
def workspace_with_players(directory: Path) -> Path:
    """A small trained platform whose online store holds `PLAYERS` players with the states of its own."""
    import polars as pl

    from fastq import worlds
    from fastq.platform import load_platform
    from feature_repo import store

    fastq = str(Path(sys.executable).with_name("fastq"))
    worlds.write_logs(worlds.world("arena"), directory, players=300, days=30, seed=100)
    file = directory / "fastq.yaml"
    file.write_text(file.read_text().replace("preset: default", "preset: default, epochs: 2"))
    made = subprocess.run([fastq, "retrain", "--json"], cwd=directory, capture_output=True, text=True, check=False)
    version = json.loads(made.stdout)["version"]
    if not json.loads(made.stdout)["promoted"]:
        subprocess.run([fastq, "promote", version, "--force", "--reason", "benchmark"], cwd=directory, check=True, capture_output=True)
    platform = load_platform(directory)
    known = store.materialized(platform)
    many = known.sample(PLAYERS, with_replacement=True, seed=0).with_columns(player_id=pl.format("q{}", pl.int_range(PLAYERS)))
    store.materialize(platform, many)
    return directory


class Server:
    """A server in a process group of its own."""

    def __init__(self, command: list[str], workspace: Path, port: int) -> None:
        import httpx

        self.workspace, self.port = workspace, port
        self.log = (workspace / "server.log").open("w")
        self.process = subprocess.Popen(command, cwd=workspace, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True)
        until = time.monotonic() + 180
        while True:
            assert self.process.poll() is None and time.monotonic() < until, (workspace / "server.log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)

    def cpu(self) -> float:
        """Seconds of processor time that all processes of this server have taken."""
        import psutil

        spent = 0.0
        for process in psutil.process_iter():
            try:
                if process.environ().get("FASTQ_SERVED_WORKSPACE") == str(self.workspace) or process.pid == self.process.pid:
                    spent += sum(process.cpu_times()[:2])
            except psutil.Error:
                continue
        return spent

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def measured(server: Server, key: str, bodies: Path, connections: int, path: str = "/v1/recommendations", seconds: float = SECONDS) -> dict:
    before = server.cpu()
    command = [sys.executable, __file__, "load", str(server.port), path, key, str(bodies), str(connections), str(seconds)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**found, "cpu_ms": 1e3 * (server.cpu() - before) / max(found["n"], 1)}


def test_the_endpoint_against_a_bare_one(tmp_path: Path) -> None:
    from fastq.environment import free_ports
    from fastq.workspace import Workspace
    from serving.auth import create_key

    kept = os.environ.get("FASTQ_BENCH_WORKSPACE")  # made by an earlier run, to save two minutes
    workspace = Path(kept) if kept and (Path(kept) / "fastq.yaml").exists() else workspace_with_players(Path(kept) if kept else tmp_path / "arena")
    shutil.rmtree(Workspace(workspace).served, ignore_errors=True)
    empty = tmp_path / "bare"
    shutil.copytree(workspace, empty, ignore=lambda _, names: {n for n in names if n in ("logs", "features", "feast", "served", "prefect", "tables", "runs")})
    key = create_key(Workspace(workspace), "analyst")["key"]
    players, explained = tmp_path / "players", tmp_path / "explained"
    players.write_text("\n".join(json.dumps({"players": [f"q{i}"]}) for i in range(PLAYERS)))
    explained.write_text("\n".join(json.dumps({"player_id": f"q{i}", "against": "retain"}) for i in range(0, PLAYERS, 97)))
    one, other = free_ports(2)
    servers: list[Server] = []
    rows, bars = [], []
    try:
        servers.append(Server([str(Path(sys.executable).with_name("fastq")), "serve", "--port", str(one)], workspace, one))
        servers.append(Server([sys.executable, __file__, "bare", str(empty), str(other)], empty, other))
        ours, theirs = servers
        for connections in CONNECTIONS:
            for server in servers:
                measured(server, key, players, connections, seconds=1.5)  # warm
            pairs = [(measured(theirs, key, players, connections), measured(ours, key, players, connections)) for _ in range(ROUNDS)]
            assert all(set(found["statuses"]) == {"200"} for pair in pairs for found in pair), pairs
            share, tail, later = (
                statistics.median(values) for values in zip(*((o["rps"] / b["rps"], o["p99"] / b["p99"], o["p50"] - b["p50"]) for b, o in pairs), strict=True)
            )
            rows += [
                (name, connections, *(statistics.median(found[column] for found in (pair[i] for pair in pairs)) for column in ("rps", "p50", "p99", "cpu_ms")))
                for i, name in enumerate(("bare", "fastq"))
            ]
            if connections == 1:
                bars.append((f"1 connection: p50 above bare {later:.2f} ms", later <= 3))
            else:
                bars.append((f"{connections} connections: {share:.2f} of bare requests/s", share >= 0.6))
                bars.append((f"{connections} connections: {tail:.2f} times bare p99", tail <= 2))
        why = measured(ours, key, explained, 1, "/v1/explanations", 6)
        bars.append((f"explanation: p99 {why['p99']:.1f} ms, p50 {why['p50']:.1f}", why["p99"] <= 50))
        flood = measured(ours, key, players, 512, seconds=8)
        refused = sum(n for status, n in flood["statuses"].items() if status in ("429", "503"))
        assert set(flood["statuses"]) <= {"200", "429", "503"}
        bars.append((f"512 connections: {flood['rps']:.0f}/s answered, p99 {flood['p99']:.0f} ms, {refused / flood['n']:.0%} refused with 429 or 503", True))
    finally:
        for server in servers:
            server.stop()
    sys.stdout.write("\n\nendpoint  connections  requests/s  p50 ms  p99 ms  CPU ms/request\n")
    for name, connections, rps, p50, p99, cpu in rows:
        sys.stdout.write(f"{name:8}  {connections:11}  {rps:10.0f}  {p50:6.2f}  {p99:6.1f}  {cpu:14.2f}\n")
    for text, reached in bars:
        sys.stdout.write(f"{'reached' if reached else 'MISSED ':8} {text}\n")


if __name__ == "__main__":
    if sys.argv[1] == "load":
        port, path, key, bodies, connections, seconds = sys.argv[2:]
        print(json.dumps(asyncio.run(load(int(port), path, key, Path(bodies).read_bytes().splitlines(), int(connections), float(seconds)))))
    else:
        serve_bare(sys.argv[2], int(sys.argv[3]))
