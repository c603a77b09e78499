"""The doctor finds what is wrong with a workspace, and says the mend."""

import json
import os
import socket
import subprocess
import sys

import pytest

from fastq import doctor
from fastq.platform import FILE_NAME
from fastq.workspace import Workspace

TREE = {
    "platform": "shop",
    "logs": {"decisions": "d.csv"},
    "state": {"period": "1d"},
    "policies": ["a", "b"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 1}}},
    "objectives": {"joy": {}},
}


@pytest.fixture
def shop(tmp_path):
    write(tmp_path)
    (tmp_path / "d.csv").write_text("decision_id,player_id,decided_at,policy,goal,joy\n1,p,2026-01-01T00:00:00Z,a,0.5,1\n")
    return tmp_path


def write(root, **changes):
    (root / FILE_NAME).write_text(json.dumps({**TREE, **changes}))


def checks(root, keys=lambda _: []):
    document = doctor.examine(root, keys)
    assert document["passed"] == all(check["status"] != "wrong" for check in document["checks"])
    for check in document["checks"]:
        assert bool(check["mend"]) == (check["status"] != "ok"), check
    return {check["name"]: check for check in document["checks"]}


def test_a_fresh_workspace_is_told_what_comes_next(shop):
    found = checks(shop)
    assert found["champion"]["mend"] == "fastq retrain"
    assert found["logs.decisions"]["status"] == "warning"  # of last winter
    assert all(check["status"] != "wrong" for check in found.values())


def test_a_broken_configuration_is_a_finding(shop):
    write(shop, polices=["a"])
    assert "did you mean 'policies'" in checks(shop)["fastq.yaml"]["says"]


def test_logs_that_are_not_there(shop):
    (shop / "d.csv").unlink()
    assert checks(shop)["logs.decisions"]["status"] == "wrong"


def test_services_that_do_not_answer_are_named_without_their_password(shop):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        write(shop, services={"online_store": f"redis://:secret@127.0.0.1:{listening.getsockname()[1]}", "mlflow": "http://127.0.0.1:9"})
        found = checks(shop)
    assert found["services.online_store"]["status"] == "ok"
    assert found["services.mlflow"]["status"] == "wrong"
    assert "secret" not in json.dumps(found)


def test_a_stopped_retraining_and_a_stopped_restore(shop):
    workspace = Workspace(shop)
    workspace.make(workspace.runs)
    (workspace.runs / "turn.json").write_text(json.dumps({"started_at": "2026-03-01T03:00:00+00:00"}))
    (shop / ".fastq-restore").mkdir()
    found = checks(shop)
    assert "--resume" in found["retraining"]["mend"]
    assert found["restore"]["status"] == "warning"
    with workspace.lock("retrain"):
        assert "retraining" not in checks(shop)  # it runs


def test_keys_that_others_can_read(shop):
    workspace = Workspace(shop)
    workspace.make()
    workspace.keys.touch(0o644)
    workspace.keys.chmod(0o644)
    assert checks(shop, lambda _: [{"role": "admin", "revoked_at": None}])["keys"]["status"] in ("ok", "wrong")
    assert not doctor.examine(shop, lambda _: [{"role": "admin", "revoked_at": None}])["passed"]


def test_a_process_that_was_left_behind_and_a_port_that_is_open_to_all(shop):
    program = "import socket, time; s = socket.create_server(('0.0.0.0', 0)); print('ready', flush=True); time.sleep(60)"
    # its parent is gone before the doctor looks: what a killed server leaves
    start = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {program!r}]); print(p.pid, flush=True)"
    env = os.environ | {"FASTQ_SERVED_WORKSPACE": str(shop)}
    with subprocess.Popen([sys.executable, "-c", start], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        pid = int(parent.stdout.readline())
        parent.stdout.readline()
        parent.wait()
        try:
            found = checks(shop)
        finally:
            os.kill(pid, 9)
    assert f"kill {pid}" in found["left over"]["mend"]
    assert "0.0.0.0" in found["listening"]["says"]
    assert str(pid) in found["listening"]["says"]
