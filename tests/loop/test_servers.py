"""The topology of `infra/compose.yaml`, where no container runs: PostgreSQL, Redis, MLflow, Prefect with a worker, S3; one whole turn of the loop on it.

The commands of the servers are those that the file says, with loopback in place of its network's names.
"""

import contextlib
import json
import shutil
import time

import httpx
import psycopg
import pytest
import redis
import yaml
from topology import BIN, bucket_of, topology

from fastq import load_platform, worlds
from fastq.environment import free_ports


@pytest.fixture(scope="module")
def servers():
    with topology(bucket=True) as made:
        yield made


def waiting(done, seconds, log):
    """What `done` gives at last; a server that is away in the meantime answers nothing, or that the fault is its own."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError, KeyError, psycopg.Error):
            if found := done():
                return found
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.3)


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


def training(servers):
    """Whether a model is being learned."""
    with psycopg.connect(f"{servers.postgres}/mlflow") as database:
        return database.execute("SELECT status FROM runs").fetchall() == [("RUNNING",)]


@pytest.mark.slow
@pytest.mark.timeout(1_500)
def test_one_turn_of_the_loop_on_real_servers_all_of_which_die_in_the_middle(fastq, servers, running, shop, tmp_path):
    def command(*arguments, code=0):
        said = fastq(*arguments, "--json", cwd=shop, code=code, PREFECT_API_URL=servers.prefect, **servers.env)
        return json.loads(said.stdout)

    deployed = command("deploy", "--server", servers.prefect)
    worker = [BIN / "prefect", "worker", "start", "--pool", deployed["pool"], "--type", "process"]
    with (
        httpx.Client(base_url=servers.prefect, timeout=30, trust_env=False) as prefect,
        running(worker, tmp_path / "worker.log", servers.env | {"PREFECT_API_URL": servers.prefect, "PREFECT_WORKER_QUERY_SECONDS": "1"}),
    ):
        run = prefect.post(f"/deployments/{deployed['deployments'][0]['id']}/create_flow_run", json={}).json()["id"]
        waiting(lambda: training(servers), 600, tmp_path / "worker.log")
        struck = [servers.servers[name] for name in ("postgres", "redis", "mlflow", "prefect")]
        for server in struck:
            server.kill()
        struck[0].start().ready()  # in which the others keep what they know; these take a quarter of a minute each to come back, and do so together
        for server in [server.start() for server in struck[1:]]:
            server.ready()
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
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)], "nothing lost, nothing twice"
    assert redis.Redis.from_url(servers.redis).dbsize() >= 300
    kept = [item["Key"] for item in bucket_of(servers.storage).list_objects_v2(Bucket="artifacts")["Contents"]]
    assert any(name.endswith("bundle/bundle.json") for name in kept)
    state_of = shop / ".fastq"
    assert not list(state_of.rglob("mlflow.db")) + list(state_of.rglob("prefect.db")) + list((shop / "logs").rglob("*"))
    assert load_platform(shop).services.mlflow == servers.mlflow
