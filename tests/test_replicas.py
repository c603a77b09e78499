"""Several replicas, by `serve deploy serving/serve.yaml` and by `serving.replicas`: what one of them hears all know, and what one loses the others carry on.

Load comes over connections of its own while a champion is promoted, a replica is killed and the whole is deployed anew; every answer is counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
import psutil
import pytest
import yaml

from fastq import registry
from fastq.environment import DEFAULTS, free_ports
from fastq.platform import Platform, load_platform
from fastq.records import decision_logs, served_log
from fastq.workspace import Workspace
from feature_repo import store
from serving import app, auth, online

MOST = 3  # decisions for one player
BIN = Path(sys.executable).parent
SERVE_YAML = Path(app.__file__).with_name("serve.yaml")


@dataclass
class Load:
    """Clients that ask again and again, each over a connection of its own; what became of every request, and each decision that was acknowledged."""

    url: str
    key: str
    bodies: list[dict]
    clients: int = 8
    keyed: bool = False
    seen: list[tuple[float, object]] = field(default_factory=list)  # when it was answered, and with which status or failure
    answered: list[dict] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    so_far: int = 0

    def __enter__(self) -> Self:
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    def run(self, seed: int) -> None:
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60, trust_env=False) as client:
            number = seed
            while not self.stop.is_set():
                headers = {"Idempotency-Key": f"{id(self)}-{number}"} if self.keyed else {}
                try:
                    answer = client.post("/v1/recommendations", json=self.bodies[number % len(self.bodies)], headers=headers)
                    what: object = answer.status_code
                    if what == 200:
                        self.answered += answer.json()["recommendations"]
                    elif what in (429, 503):
                        what = (what, answer.headers.get("retry-after"))
                except httpx.ConnectError:
                    what = "refused"
                except httpx.HTTPError as error:
                    what = type(error).__name__
                self.seen.append((time.monotonic(), what))
                number += self.clients
                time.sleep(0.02)

    def counted(self, what: str, seconds: float, act: Callable[[], object] = lambda: None) -> Counter:
        """How requests ended since the last count, with an act and some seconds after it: none is in no count."""
        act()
        time.sleep(seconds)
        before, self.so_far = self.so_far, len(self.seen)
        found = Counter(how for _, how in self.seen[before : self.so_far])
        print(what, dict(found))
        return found


def replicas(root: Path) -> list[psutil.Process]:
    return [process for process in app.started_by(root) if "ServeReplica" in " ".join(process.cmdline())]


def deciding(root: Path) -> int:
    """How many replicas have opened their log, which each does before it answers."""
    found = 0
    for process in replicas(root):
        with contextlib.suppress(psutil.Error):
            found += any(Path(file.path).parent == Workspace(root).served and file.path.endswith(".db") for file in process.open_files())
    return found


def until(what: Callable[[], object], seconds: float = 120) -> object:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.1)
    return found


def ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    return False


@pytest.fixture
def platform(trained: Path, tmp_path: Path) -> Platform:
    """With a second version to promote, and a cap on what a player gets."""
    root = Path(shutil.copytree(trained, tmp_path / "workspace"))
    file = root / "fastq.yaml"
    file.write_text(file.read_text().replace("serving: {", f"serving: {{replicas: 2, frequency: {{most: {MOST}, per: 1d}}, "))
    platform = load_platform(root)
    bundle = shutil.copytree(registry.fetch(platform, registry.champion(platform)), tmp_path / "bundle")
    for path in bundle.iterdir():
        path.chmod(0o600)
    with registry.start_run(platform, "again", {}) as run:
        registry.register(platform, run.id, bundle)
    return platform


# ---- ray start, serve deploy --------------------------------------------------------------------------------------------------
@dataclass
class Cluster:
    """A Ray of one node on loopback, and what `serve` needs to be told of it."""

    url: str
    tree: dict
    env: dict[str, str]
    dashboard: str
    home: Path

    def deploy(self, **changes: object) -> None:
        self.tree["applications"][0]["deployments"][0].update(changes)
        file = self.home / "serve.yaml"
        file.write_text(yaml.safe_dump(self.tree))
        done = subprocess.run([str(BIN / "serve"), "deploy", str(file), "-a", self.dashboard], env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def cluster(platform: Platform, tmp_path: Path) -> Iterator[Cluster]:
    """`ray start --head`, as the head of serve.yaml says, with ports of its own: nobody else's Ray is touched, and `ray stop` would end them all."""
    gcs, client, dashboard, agent, http, stats, metrics, fallback = free_ports(8)
    home = app.ray_directory(tmp_path)  # a short name
    home.mkdir(exist_ok=True)
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text("0f" * 32)
    kept = app.ray_environment(platform.root, token, home, stats, metrics, fallback)
    env = {**os.environ, **DEFAULTS, **kept, "PYTHONPATH": str(SERVE_YAML.parents[1])}
    tree = yaml.safe_load(SERVE_YAML.read_text())
    tree["http_options"]["port"] = http
    tree["applications"][0]["args"]["workspace"] = str(platform.root)
    tree["applications"][0]["deployments"][0]["autoscaling_config"]["min_replicas"] = 2
    ports = [f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports += ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"]
    small = ["--disable-usage-stats", "--num-cpus=4", f"--object-store-memory={100 * 2**20}", f"--temp-dir={home}"]
    with (tmp_path / "ray.log").open("w") as log:
        command = [str(BIN / "ray"), "start", "--head", "--block", "--dashboard-host=127.0.0.1", *ports, *small]
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    made = Cluster(f"http://127.0.0.1:{http}", tree, env, f"http://127.0.0.1:{dashboard}", home)
    try:
        until(lambda: process.poll() is not None or "Ray runtime started" in (tmp_path / "ray.log").read_text())
        assert process.poll() is None, (tmp_path / "ray.log").read_text()
        yield made
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        app.sweep(platform.root, home)


@pytest.mark.slow
def test_two_replicas_deployed_by_serve_yaml(platform: Platform, cluster: Cluster) -> None:
    started = time.monotonic()
    cluster.deploy()
    until(lambda: ready(cluster.url))
    until(lambda: len(decision_logs(platform)) == 2)
    print(f"two replicas answer {time.monotonic() - started:.1f} s after serve deploy")
    key = auth.create_key(Workspace(platform.root), "analyst")["key"]
    second = max((str(model["version"]) for model in registry.models(platform)), key=int)
    players = store.materialized(platform)["player_id"].to_list()
    with Load(cluster.url, key, [{"players": [player]} for player in players]) as load:
        assert set(load.counted("two replicas", 4)) == {200}
        assert set(load.counted("a new champion", 5, lambda: registry.promote(platform, second, reason="a test", forced=True))) == {200}
        assert load.answered[-1]["model_version"] == second

        def kill() -> None:
            replicas(platform.root)[0].kill()
            until(lambda: deciding(platform.root) == 2)

        found = load.counted("one of two replicas killed, and back", 10, kill)
        assert sum(found.values()) - found[200] <= load.clients

        def deploy() -> None:
            before = {process.pid for process in replicas(platform.root)}
            cluster.deploy()
            until(lambda: len(now := {process.pid for process in replicas(platform.root)}) == 2 and not now & before, 240)

        cluster.tree["applications"][0]["args"]["again"] = "1"  # other arguments: every replica is replaced
        assert set(load.counted("both replaced by a new deployment", 3, deploy)) == {200}
        everything = load.answered
    # one player asked for by everybody at once, at both replicas
    hot = players[:6]
    with Load(cluster.url, key, [{"players": [player]} for player in hot], clients=12) as load:
        assert set(load.counted("six players, twelve callers", 3)) == {200}
    everything += load.answered
    logged = served_log(platform, "decisions")
    ids = logged["decision_id"].to_list()
    acknowledged = [answer["decision_id"] for answer in everything]
    print(f"acknowledged {len(acknowledged)}, in {len(decision_logs(platform))} files {len(ids)}")
    assert len(set(ids)) == len(ids), "a decision is in two files"
    assert len(set(acknowledged)) == len(acknowledged)
    assert not set(acknowledged) - set(ids), "acknowledged, and lost"
    drawn = Counter(answer["player_id"] for answer in everything if answer["value"] is not None)
    assert max(drawn.values()) == MOST, drawn.most_common(5)
    assert all(drawn[player] == MOST for player in hot)

    bearer = {"Authorization": f"Bearer {key}"}
    objective = next(iter(platform.objectives))
    told = {"outcomes": [{"decision_id": decision_id, objective: 1.0} for decision_id in acknowledged[:40]]}
    said = [
        httpx.post(f"{cluster.url}/v1/outcomes", json=told, headers=bearer, trust_env=False).json() for _ in range(8)
    ]  # connections of their own: both hear
    assert sum(answer["accepted"] for answer in said) == 40, said
    assert all(httpx.get(f"{cluster.url}/v1/decisions/{i}", headers=bearer, trust_env=False).json()["outcomes"] == {objective: 1.0} for i in acknowledged[:20])
    with online.open_service(platform) as service:
        again = [answer for answer in everything if answer["propensity"] is not None]
        for answer in again[:: max(1, len(again) // 60)]:
            decision = service.log.find(answer["decision_id"])
            found = online.replay(service, decision)
            assert online.action_dicts(platform, found.action)[0] == answer["action"]
            assert float(found.propensity[0]) == answer["propensity"]


# ---- fastq serve --------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_replicas_of_fastq_serve_lose_one_and_end(platform: Platform, tmp_path: Path) -> None:
    """Of requests with an Idempotency-Key none fails where a replica dies over them; SIGTERM under load cuts none that is under way."""
    (port,) = free_ports(1)
    url, key = f"http://127.0.0.1:{port}", auth.create_key(Workspace(platform.root), "analyst")["key"]
    bodies = [{"players": [player]} for player in store.materialized(platform)["player_id"].to_list()]
    with (tmp_path / "log").open("w") as log:
        command = [str(BIN / "fastq"), "serve", "--port", str(port), "--workspace", str(platform.root)]
        process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: process.poll() is not None or "fastq serves" in (tmp_path / "log").read_text(), 240)
        assert len(replicas(platform.root)) == 2, (tmp_path / "log").read_text()
        with Load(url, key, bodies, clients=12, keyed=True) as load:
            assert set(load.counted("two replicas, every request with a key", 3)) == {200}
            for _ in range(2):

                def kill() -> None:
                    replicas(platform.root)[0].kill()
                    until(lambda: deciding(platform.root) == 2)

                assert set(load.counted("one of two killed, and back", 10, kill)) == {200}
            kept = list(load.answered)
        with Load(url, key, bodies) as load:
            assert set(load.counted("two replicas", 2)) == {200}

            def end() -> None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0

            found = load.counted("SIGTERM", 0, end)
            assert set(found) <= {200, "refused"}
        kept += load.answered
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            app.sweep(platform.root, app.ray_directory(platform.root))
    ids = served_log(platform, "decisions")["decision_id"].to_list()
    acknowledged = {answer["decision_id"] for answer in kept}
    print(f"acknowledged {len(acknowledged)}, in {len(decision_logs(platform))} files {len(ids)}")
    assert len(set(ids)) == len(ids)
    assert not acknowledged - set(ids)
