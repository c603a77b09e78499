"""The topology of `infra/compose.yaml`, where no container runs: PostgreSQL, Redis, MLflow, Prefect with a worker, S3; one whole turn of the loop on it.

The commands of the servers are those that the file says, with loopback in place of its network's names.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import boto3
import httpx
import psycopg
import pytest
import redis
import yaml

from fastq import load_platform, worlds
from fastq.environment import DEFAULTS, free_ports

INFRA = Path(__file__).parents[2] / "infra"
BIN = Path(sys.executable).parent
NAMES = ("decisions", "activity", "proposals", "players")


@dataclass
class Servers:
    """Where each listens, and what a client of theirs has in its environment."""

    postgres: str  # the URL without a database
    redis: str
    mlflow: str
    prefect: str
    storage: str
    env: dict[str, str]


def waiting(done, seconds, log):
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError, OSError):
            if found := done():
                return found
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.3)


def answers(url):
    return httpx.get(url, timeout=5, trust_env=False).status_code == 200


def composed(service, replaced):
    """The command of a service of the compose file, and the variables of its environment that name another service."""
    said = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"][service]

    def ours(text):
        for old, new in replaced.items():
            text = text.replace(old, new)
        assert not re.search(r"\$\{|postgres:5432|0\.0\.0\.0", text), text
        return text

    command = [ours(word) for word in (*said["entrypoint"], *said["command"])]
    return [BIN / command[0], *command[1:]], {name: ours(value) for name, value in said.get("environment", {}).items()}


@pytest.fixture(scope="module")
def servers(postgres_server, redis_server, running, tmp_path_factory):
    home = tmp_path_factory.mktemp("servers")
    url = postgres_server.url.rpartition("/")[0]
    address = url.rpartition("@")[2]
    with psycopg.connect(postgres_server.url, autocommit=True) as database:
        for statement in ("CREATE DATABASE prefect;", *(INFRA / "postgres-init.sql").read_text().splitlines()):
            database.execute(statement)
    s3, mlflow, prefect = free_ports(3)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name not in DEFAULTS} | {
        "HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": "of-the-test",
        "AWS_SECRET_ACCESS_KEY": "of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    replaced = {
        "postgres:5432": address,
        "${POSTGRES_PASSWORD}": "none",
        "0.0.0.0": "127.0.0.1",
        "--port=5000": f"--port={mlflow}",
        "4200": str(prefect),
        "--artifacts-destination=/artifacts": "--artifacts-destination=s3://artifacts",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(running([BIN / "moto_server", "-H", "127.0.0.1", "-p", s3], home / "s3.log", env))
        for name in ("mlflow", "prefect"):
            command, more = composed(name, replaced)
            stack.enter_context(running(command, home / f"{name}.log", env | more))
        storage = f"http://127.0.0.1:{s3}"
        waiting(lambda: answers(f"{storage}/moto-api/data.json"), 200, home / "s3.log")
        for bucket in ("logs", "artifacts"):
            bucket_of(storage).create_bucket(Bucket=bucket)
        waiting(lambda: answers(f"http://localhost:{mlflow}/health"), 300, home / "mlflow.log")
        waiting(lambda: answers(f"http://localhost:{prefect}/api/health"), 300, home / "prefect.log")
        yield Servers(url, redis_server.url, f"http://localhost:{mlflow}", f"http://127.0.0.1:{prefect}/api", storage, env)


def bucket_of(storage):
    keys = {"aws_access_key_id": "of-the-test", "aws_secret_access_key": "of-the-test", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=storage, **keys)


@pytest.fixture(scope="module")
def shop(servers, tmp_path_factory):
    """A workspace whose logs lie in a bucket and whose services are the servers."""
    made = tmp_path_factory.mktemp("made")
    worlds.write_logs(worlds.world("arena"), made, players=300, days=24, seed=100)
    for path in (made / "logs").rglob("*.parquet"):
        bucket_of(servers.storage).upload_file(str(path), "logs", str(path.relative_to(made / "logs")))
    shutil.rmtree(made / "logs")
    tree = yaml.safe_load((made / "fastq.yaml").read_text())
    tree["logs"] = {name: where.replace("logs/", "s3://logs/", 1) for name, where in tree["logs"].items()}
    tree["training"] = {"preset": "default", "epochs": 4}
    tree["services"] = {"mlflow": servers.mlflow, "online_store": servers.redis}
    (made / "fastq.yaml").write_text(yaml.safe_dump(tree))
    return made


@pytest.mark.slow
@pytest.mark.timeout(1_500)
def test_one_turn_of_the_loop_on_real_servers(fastq, servers, running, shop, tmp_path):
    def command(*arguments, code=0):
        said = fastq(*arguments, "--json", cwd=shop, code=code, PREFECT_API_URL=servers.prefect, **servers.env)
        return json.loads(said.stdout)

    deployed = command("deploy", "--server", servers.prefect)
    worker = [BIN / "prefect", "worker", "start", "--pool", deployed["pool"], "--type", "process"]
    with (
        httpx.Client(base_url=servers.prefect, timeout=30, trust_env=False) as prefect,
        running(worker, tmp_path / "worker.log", servers.env | {"PREFECT_API_URL": servers.prefect}),
    ):
        run = prefect.post(f"/deployments/{deployed['deployments'][0]['id']}/create_flow_run", json={}).json()["id"]
        ended = ("COMPLETED", "FAILED", "CRASHED")
        state = waiting(lambda: (s := prefect.get(f"/flow_runs/{run}").json()["state"])["type"] in ended and s, 900, tmp_path / "worker.log")
        assert state["type"] == "COMPLETED", (state, (tmp_path / "worker.log").read_text()[-3000:])
    [model] = command("models")["models"]
    if "champion" not in model["aliases"]:  # a model this small may well be refused
        command("promote", model["version"], "--force", "--reason", "the test goes on")

    key = command("keys", "create", "--role", "admin")["key"]
    (port,) = free_ports(1)
    log = tmp_path / "serve.log"
    with (
        running([BIN / "fastq", "serve", "--port", port, "--workspace", shop], log, servers.env),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False) as endpoint,
    ):
        waiting(lambda: endpoint.get("/readyz").status_code == 200, 400, log)
        [answer] = endpoint.post("/v1/recommendations", json={"players": ["p00000"]}).json()["recommendations"]
        assert (answer["policy"], answer["model_version"], answer["degraded"] or "stale") == ("fastq", model["version"], answer["degraded"] or "stale")
        assert answer["value"] is not None, "the state came out of Redis"
        outcome = {"outcomes": [{"decision_id": answer["decision_id"], "returns": 1.0, "cost": 0.1}]}
        assert endpoint.post("/v1/outcomes", json=outcome).json() == {"accepted": 1, "already_known": 0}
        assert endpoint.get("/v1/models").json()["models"][0]["aliases"] == ["champion"]
    document = command("validate")
    decided = command("query", f"SELECT policy, returns FROM decisions WHERE decision_id = '{answer['decision_id']}'")
    assert decided["rows"] == [["fastq", 1.0]], "tomorrow's logs are today's answers"
    assert document["accepted"] > 4_000

    # it was there and nowhere else
    with psycopg.connect(f"{servers.postgres}/prefect") as database:
        assert ("COMPLETED",) in database.execute("SELECT state_type FROM flow_run WHERE id = %s", (run,)).fetchall()
    with psycopg.connect(f"{servers.postgres}/mlflow") as database:
        assert database.execute("SELECT name, version FROM model_versions").fetchall() == [("arena", 1)]
    assert redis.Redis.from_url(servers.redis).dbsize() >= 300
    kept = [item["Key"] for item in bucket_of(servers.storage).list_objects_v2(Bucket="artifacts")["Contents"]]
    assert any(name.endswith("bundle/bundle.json") for name in kept)
    state_of = shop / ".fastq"
    assert not list(state_of.rglob("mlflow.db")) + list(state_of.rglob("prefect.db")) + list((shop / "logs").rglob("*"))
    assert load_platform(shop).services.mlflow == servers.mlflow
