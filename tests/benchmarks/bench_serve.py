"""`make bench-serve`: the endpoint behind Ray Serve against a bare FastAPI endpoint behind the same Ray Serve, in the same run.

Both servers are up at once and measured in turns, by load from another process on loopback: keep-alive connections, each sending its next request
when the last one was answered. A request asks for one of 100,000 players at random: the state is read from the online store, the decision is
on disk before the answer leaves. Medians over rounds; processor time is that of all processes of a server, divided by its requests.

Then what fails while something of a server is killed, taken away or replaced under a steady load: each fault must leave no more failures than its bound
allows, and at the end nothing that was acknowledged may be missing.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import pytest
from fastapi import Body, FastAPI

from fastq import features, registry
from fastq.environment import free_ports
from fastq.errors import BundleError
from fastq.platform import load_platform
from fastq.workspace import Workspace
from feature_repo import store
from serving import app, auth

PLAYERS = int(os.environ.get("FASTQ_BENCH_PLAYERS", "100000"))
ROUNDS, SECONDS = int(os.environ.get("FASTQ_BENCH_ROUNDS", "3")), 4.0
FLOOD_SECONDS = float(os.environ.get("FASTQ_BENCH_FLOOD_SECONDS", "20"))
CONNECTIONS = (1, 16, 64)
LOAD = str(Path(__file__).with_name("load.py"))


# ---- the bare endpoint, in a server of its own --------------------------------------------------------------------------------
def bare(_: str, **options: object) -> object:
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

    return serve.deployment(**deployment(), **options)(serve.ingress(make)()).bind()


def serve_bare(workspace: str, port: int) -> None:
    from fastq.environment import prepare

    platform = load_platform(workspace)
    prepare(Workspace(platform.root))
    app.application = bare
    app.serve(platform, "127.0.0.1", port)


# ---- the workspace ------------------------------------------------------------------------------------------------------------
def workspace_with_players(directory: Path) -> Path:
    """A small trained platform whose online store holds `PLAYERS` players with the states of its own."""
    import polars as pl

    from fastq import worlds

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

    def __init__(self, command: list[str], workspace: Path, port: int, ready: str = "/readyz") -> None:
        self.workspace, self.port = workspace, port
        self.log = (workspace / "server.log").open("w")
        self.process = subprocess.Popen(command, cwd=workspace, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True)
        until = time.monotonic() + 180
        while True:
            assert self.process.poll() is None and time.monotonic() < until, (workspace / "server.log").read_text()[-2000:]
            try:
                said = ready != "/readyz" or "fastq serves" in (workspace / "server.log").read_text()  # else a proxy may answer that outlived its server
                if said and httpx.get(f"http://127.0.0.1:{port}{ready}", timeout=5).status_code == 200:
                    break
                time.sleep(0.3)
            except httpx.HTTPError:
                time.sleep(0.3)

    def cpu(self) -> float:
        """Seconds of processor time that all processes of this server have taken."""
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


class Mlflow(Server):
    """`mlflow models serve` of the champion: states come ready-made in the request, nothing is read and nothing is logged."""

    CODE = """
import mlflow, numpy as np, torch
from fastq import Policy
from fastq.features import PlayerStates

class Recommend(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        torch.set_num_threads(1)
        self.policy = Policy.load(context.artifacts["bundle"])

    def predict(self, context, model_input, params=None):
        found = self.policy.recommend(PlayerStates(**{name: np.asarray(model_input[name], np.float32) for name in ("history", "actions", "objectives")}))
        return [{"action": a, "propensity": p, "value": v} for a, p, v in zip(found.action.tolist(), found.propensity.tolist(), found.value.tolist())]

mlflow.models.set_model(Recommend())
"""

    def __init__(self, workspace: Path, directory: Path, port: int) -> None:
        import mlflow
        import numpy as np

        platform = load_platform(workspace)
        (directory / "recommend.py").write_text(self.CODE)
        bundle = registry.fetch(platform, registry.champion(platform))
        mlflow.pyfunc.save_model(str(directory / "mlflow"), python_model=str(directory / "recommend.py"), artifacts={"bundle": str(bundle)})
        known = features.states_at(platform, store.materialized(platform, 300), datetime.now(UTC))
        self.states = directory / "states"
        lines = []
        for i in range(len(known.history)):
            given = {name: np.nan_to_num(getattr(known, name)[i : i + 1]).tolist() for name in ("history", "actions", "objectives")}
            lines.append(json.dumps({"inputs": given}))
        self.states.write_text("\n".join(lines))
        program = str(Path(sys.executable).with_name("mlflow"))
        command = [program, "models", "serve", "-m", str(directory / "mlflow"), "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local", "-w", "1"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow calls uvicorn by its name
        super().__init__(["env", f"PATH={path}", *command], workspace, port, "/ping")


def measured(server: Server, key: str, bodies: Path, connections: int, path: str = "/v1/recommendations", seconds: float = SECONDS, rate: float = 0.0) -> dict:
    before = server.cpu()
    command = [sys.executable, LOAD, str(server.port), path, key, str(bodies), str(connections), str(seconds), str(rate)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**found, "cpu_ms": 1e3 * (server.cpu() - before) / max(found["n"], 1)}


def test_the_endpoint_against_a_bare_one(tmp_path: Path) -> None:
    kept = os.environ.get("FASTQ_BENCH_WORKSPACE")  # made by an earlier run, to save two minutes
    workspace = Path(kept) if kept and (Path(kept) / "fastq.yaml").exists() else workspace_with_players(Path(kept) if kept else tmp_path / "arena")
    shutil.rmtree(Workspace(workspace).served, ignore_errors=True)
    empty = tmp_path / "bare"
    shutil.copytree(workspace, empty, ignore=lambda _, names: {n for n in names if n in ("logs", "features", "feast", "served", "prefect", "tables", "runs")})
    key = auth.create_key(Workspace(workspace), "analyst")["key"]
    players, explained = tmp_path / "players", tmp_path / "explained"
    players.write_text("\n".join(json.dumps({"players": [f"q{i}"]}) for i in range(PLAYERS)))
    explained.write_text("\n".join(json.dumps({"player_id": f"q{i}", "against": "retain"}) for i in range(0, PLAYERS, 97)))
    one, other = free_ports(2)
    servers: list[Server] = []
    rows, bars = [], []
    try:
        servers.append(Server([str(Path(sys.executable).with_name("fastq")), "serve", "--port", str(one)], workspace, one))
        servers.append(Server([sys.executable, __file__, str(empty), str(other)], empty, other))
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
        most, unloaded = next((row[2], row[4]) for row in reversed(rows) if row[0] == "fastq")
        half = measured(ours, key, players, 64, seconds=10, rate=most / 2)
        bars.append((f"half of saturation ({most / 2:.0f}/s over 64 connections): p99 {half['p99']:.1f} ms", half["p99"] <= 20))
        flood = measured(ours, key, players, 512, seconds=FLOOD_SECONDS, rate=2 * most)
        assert set(flood["statuses"]) <= {"200", "429", "503"} and not flood["refused_without_retry_after"], flood
        refused = 1 - flood["statuses"]["200"] / flood["n"]
        said = f"{2 * most:.0f}/s over 512 connections for {FLOOD_SECONDS:.0f} s: {flood['rps']:.0f}/s answered, {refused:.0%} refused"
        bars.append((f"{said}, p99 {flood['p99']:.0f} ms, {flood['p99'] / unloaded:.1f} times that at 64 connections", flood["p99"] <= 2 * unloaded))
        theirs.stop()
        servers.remove(theirs)
        servers.append(mlflow := Mlflow(workspace, tmp_path, *free_ports(1)))
        measured(mlflow, key, mlflow.states, 64, "/invocations", 3)
        rival = measured(mlflow, key, mlflow.states, 64, "/invocations", 6)
        assert set(rival["statuses"]) == {"200"}, rival
        bars.append((f"mlflow models serve, ready-made states, no log: {rival['rps']:.0f}/s at 64 connections", most > rival["rps"]))
    finally:
        for server in servers:
            server.stop()
        sys.stdout.write("\n\nendpoint  connections  requests/s  p50 ms  p99 ms  CPU ms/request\n")
        for name, connections, rps, p50, p99, cpu in rows:
            sys.stdout.write(f"{name:8}  {connections:11}  {rps:10.0f}  {p50:6.2f}  {p99:6.1f}  {cpu:14.2f}\n")
        for text, reached in bars:
            sys.stdout.write(f"{'reached' if reached else 'MISSED ':8} {text}\n")


# ---- faults under load --------------------------------------------------------------------------------------------------------
CLIENTS, EACH_SECONDS = 4, 0.06  # about sixty requests per second


class Load:
    """Clients that ask again and again, over connections that they keep; what became of every request, and every decision that was acknowledged.

    Nothing is asked twice: a connection that is closed without an answer is a failure, and so is a refusal.
    """

    def __init__(self, port: int, key: str, players: list[str]) -> None:
        self.port, self.key, self.players = port, key, players
        self.seen: list[tuple[float, int, float]] = []  # when it was sent, status (0: the connection failed, -1: 429 or 503 with Retry-After), seconds
        self.acknowledged: list[str] = []
        self.last: dict = {}
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def run(self, seed: int) -> None:
        bearer = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=bearer, timeout=20, trust_env=False) as client:
            for number in range(10**9):
                if self.stop.is_set():
                    return
                sent, status = time.monotonic(), 0
                with contextlib.suppress(httpx.HTTPError):
                    answer = client.post("/v1/recommendations", json={"players": [self.players[(number * CLIENTS + seed) % len(self.players)]]})
                    status = -1 if answer.status_code in (429, 503) and "retry-after" in answer.headers else answer.status_code
                    if status == 200:
                        self.last = answer.json()["recommendations"][0]
                        self.acknowledged.append(self.last["decision_id"])
                self.seen.append((sent, status, time.monotonic() - sent))
                time.sleep(EACH_SECONDS)

    def during(self, what: str, seconds: float, most_failed: int, back_within: float, most_refused: int = 0) -> None:
        """Let the load go on after a fault; then count."""
        started = time.monotonic()
        time.sleep(seconds)
        mine = [entry for entry in self.seen if entry[0] >= started - 0.5]
        refused = sum(entry[1] == -1 for entry in mine)
        failed = sum(entry[1] not in (200, -1) for entry in mine)
        back = max((sent + took - started for sent, status, took in mine if status != 200), default=0.0)
        slowest = max(took for _, _, took in mine)
        counts = f"{len(mine):6} requests {failed:4} failed, {refused:4} refused with Retry-After"
        sys.stdout.write(f"{what:34} {counts}, last after {back:5.1f} s, slowest {slowest:5.2f} s\n")
        assert failed <= most_failed, (what, [entry for entry in mine if entry[1] not in (200, -1)][:5])
        assert refused <= most_refused, what
        assert back <= back_within, what
        assert any(status == 200 for sent, status, _ in mine if sent > started + back), f"{what}: nothing was answered afterwards"

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)


def of(workspace: Path, what: str) -> list[psutil.Process]:
    """Processes of the server whose title or command says `what`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(app.MARK) == str(workspace) and what in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_faults_under_load(trained: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(trained, tmp_path / "arena"))
    platform = load_platform(workspace)
    space = Workspace(workspace)
    key = auth.create_key(space, "analyst")["key"]
    players = store.materialized(platform)["player_id"].to_list()
    first = registry.champion(platform)
    copies = []
    for number in range(2):
        bundle = Path(shutil.copytree(registry.fetch(platform, first), tmp_path / f"bundle-{number}"))
        for path in bundle.iterdir():
            path.chmod(0o600)
        with registry.start_run(platform, "again", {}) as run:
            copies.append(registry.register(platform, run.id, bundle))
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).with_name("fastq")), "serve", "--port", str(port)]
    server = Server(command, workspace, port)
    sys.stdout.write("\n\n")
    load = Load(port, key, players)
    try:
        load.during("nothing", 4, 0, 0)
        registry.promote(platform, copies[0], reason="a fault test", forced=True)
        load.during("a new champion", 5, 0, 0)
        assert load.last["model_version"] == copies[0]

        registry.fetch(platform, copies[1])
        weights = space.models / copies[1] / "weights.safetensors"
        weights.chmod(0o600)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
        with pytest.raises(BundleError):
            registry.promote(platform, copies[1], reason="a fault test", forced=True)
        registry._client(platform).set_registered_model_alias(platform.platform, registry.CHAMPION, copies[1])  # as in MLflow's own page
        load.during("a corrupt champion", 4, 0, 0)
        assert load.last["model_version"] == copies[0]
        registry.promote(platform, first, reason="a fault test", forced=True)

        space.mlflow.rename(space.mlflow.with_name("away"))
        load.during("the registry gone", 4, 0, 0)
        space.mlflow.with_name("away").rename(space.mlflow)

        space.feast.rename(space.feast.with_name("gone"))
        load.during("the online store gone", 4, 0, 0)
        assert "online store" in load.last["degraded"]
        space.feast.with_name("gone").rename(space.feast)
        load.during("… and back", 4, 0, 0)
        assert load.last["degraded"] is None or "stale" in load.last["degraded"]

        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /v1/recommendations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
            load.during("a client that never ends", 4, 0, 0)

        (replica,) = of(workspace, "ServeReplica")
        replica.kill()
        load.during("the only replica killed", 50, CLIENTS, 45, 10**6)  # it imports everything anew
        for proxy in of(workspace, "haproxy"):
            proxy.kill()
        load.during("the proxy killed", 20, 10**6, 10, 10**6)  # no door at first, then one that knows of no replica yet
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)  # everything, under load, and nothing is told
        server.process.wait(30)
        load.end()
    again = Server(command, workspace, port)
    try:
        count_after_kill(port, key, load.acknowledged)
    finally:
        again.stop()
        app.sweep(workspace, app.ray_directory(workspace))


def count_after_kill(port: int, key: str, acknowledged: list[str]) -> None:
    """Whether the server that started again knows every decision that was acknowledged: all counted by SQL, each found by its id, none twice.

    What a connection that was closed without an answer had asked is asked once more over another one, and how often is said.
    """
    closed = 0

    def asked(method: str, path: str, **body: object) -> httpx.Response:
        nonlocal closed
        for last in (False, True):
            try:
                return client.request(method, path, **body)
            except httpx.TransportError:
                if last:
                    raise
                closed += 1
        raise AssertionError

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False) as client:
        sql = "SELECT count(*), count(DISTINCT decision_id) FROM recommendations"
        said = asked("POST", "/v1/query", json={"sql": sql})
        assert said.status_code == 200, said.text
        ((rows, distinct),) = said.json()["rows"]
        missing = [i for i in acknowledged if asked("GET", f"/v1/decisions/{i}").status_code != 200]
    said = f"acknowledged {len(acknowledged)} ({len(set(acknowledged))} different), in the log {rows} ({distinct} different)"
    sys.stdout.write(f"{said}, missing {len(missing)}, asked again after a closed connection {closed}: after kill -9 of everything under load\n")
    assert not missing
    assert rows == distinct >= len(set(acknowledged)) == len(acknowledged)
    assert closed <= 1


def redis_server(port: int, directory: Path) -> subprocess.Popen:
    """A Redis that keeps on disk what it is told."""
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--appendonly", "yes", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as probe:
            probe.sendall(b"PING\r\n")
            if probe.recv(64).startswith(b"+PONG"):
                return process
        time.sleep(0.1)
    raise AssertionError("Redis does not answer")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own for the decision log has to be mounted")
def test_faults_of_redis_and_of_the_disk_under_load(trained: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(trained, tmp_path / "arena"))
    ours, redis_port = free_ports(2)
    frame = store.materialized(load_platform(workspace))
    file = workspace / "fastq.yaml"
    file.write_text(f"{file.read_text()}\nservices: {{online_store: 'redis://127.0.0.1:{redis_port}/0'}}\n")
    platform, space = load_platform(workspace), Workspace(workspace)
    redis = redis_server(redis_port, tmp_path)
    store.materialize(platform, frame)
    key = auth.create_key(space, "analyst")["key"]
    space.served.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(space.served)], check=True)
    server = Server([str(Path(sys.executable).with_name("fastq")), "serve", "--port", str(ours)], workspace, ours)
    sys.stdout.write("\n\n")
    load = Load(ours, key, frame["player_id"].to_list())
    try:
        load.during("nothing, states in Redis", 4, 0, 0)
        redis.kill()
        redis.wait()
        load.during("Redis killed", 5, 0, 0)
        assert "online store" in load.last["degraded"]
        redis = redis_server(redis_port, tmp_path)
        load.during("… and back", 5, 0, 0)
        assert load.last["degraded"] is None or "stale" in load.last["degraded"]

        before, filler = len(load.seen), space.served / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        time.sleep(4)
        statuses = [status for _, status, _ in load.seen[before:]]
        said = f"{statuses.count(503):4} answered with 503, {statuses.count(200)} with 200"
        sys.stdout.write(f"{'the disk of the log full':34} {len(statuses):6} requests {said}\n")
        assert set(statuses) <= {200, 503} and 503 in statuses
        filler.unlink()
        load.during("… and with room again", 5, 10**6, 2)
        load.end()
        with httpx.Client(base_url=f"http://127.0.0.1:{ours}", headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False) as client:
            missing = [i for i in load.acknowledged[:: max(1, len(load.acknowledged) // 50)] if client.get(f"/v1/decisions/{i}").status_code != 200]
        assert not missing
    finally:
        load.end()
        server.stop()
        redis.kill()
        subprocess.run(["umount", "-l", str(space.served)], check=True)


if __name__ == "__main__":
    serve_bare(sys.argv[1], int(sys.argv[2]))
