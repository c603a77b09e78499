"""The flows on a real Prefect server with a process worker, as `fastq deploy` puts them there."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import httpx
import pytest

from fastq.environment import free_ports

PREFECT = str(Path(sys.executable).with_name("prefect"))


@pytest.mark.slow
def test_a_worker_runs_what_fastq_deploy_deployed(fastq, running, tmp_path):
    workspace = tmp_path / "shop"
    workspace.mkdir()
    tree = {
        "platform": "Shop_1", "logs": {"decisions": "nowhere.parquet"}, "state": {"period": "1d"}, "policies": ["a", "b"],
        "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 1}}}, "objectives": {"joy": {}},
    }  # fmt: skip
    (workspace / "fastq.yaml").write_text(json.dumps(tree))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    home = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env = home | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    server = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with running(server, tmp_path / "server.log", env), httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        _wait(lambda: client.get("/health").status_code == 200, 120, tmp_path / "server.log")
        for _ in range(2):  # again is an update
            said = json.loads(fastq("deploy", "--json", cwd=workspace, code=0, PREFECT_API_URL=url, PREFECT_HOME=str(tmp_path / "prefect")).stdout)
        assert [row["name"].rpartition("/")[2] for row in said["deployments"]] == [f"Shop_1-{n}" for n in ("retrain", "monitor", "recommend-all", "compact")]
        assert len(client.post("/deployments/filter", json={}).json()) == 4
        retrain = client.get(f"/deployments/{said['deployments'][0]['id']}").json()
        assert retrain["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
        assert retrain["global_concurrency_limit"]["limit"] == 1
        compact = said["deployments"][3]["id"]
        run = client.post(f"/deployments/{compact}/create_flow_run", json={}).json()["id"]
        worker = [PREFECT, "worker", "start", "--pool", said["pool"], "--type", "process"]
        with running(worker, tmp_path / "worker.log", env):

            def state():
                return client.get(f"/flow_runs/{run}").json()["state"]["type"]

            _wait(lambda: state() in ("COMPLETED", "FAILED", "CRASHED"), 180, tmp_path / "worker.log")
            assert state() == "COMPLETED", (tmp_path / "worker.log").read_text()[-3000:]
    refused = fastq("deploy", cwd=workspace, code=2, PREFECT_API_URL=url)  # it is gone now
    assert "prefect server start" in refused.stderr


def _wait(done, seconds, log):
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if done():
                return
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.5)
