"""The table of variables: telemetry off in every dependency, the user's own choice respected, UTC whatever was set."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastq.environment import DEFAULTS, free_ports, prepare
from fastq.workspace import Workspace


@pytest.fixture
def bare(monkeypatch):
    for name in [*DEFAULTS, "PREFECT_HOME", "PREFECT_LOCAL_STORAGE_PATH"]:
        monkeypatch.setenv(name, "")  # so that what `prepare` sets is undone afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TZ", "UTC")
    yield monkeypatch
    time.tzset()


def test_everything_is_set_and_the_users_choice_stays(bare, tmp_path):
    bare.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    prepare(Workspace(tmp_path))
    assert {name: os.environ[name] for name in DEFAULTS} == DEFAULTS | {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    assert os.environ["PREFECT_HOME"] == str(tmp_path / ".fastq" / "prefect")
    assert os.environ["PREFECT_LOCAL_STORAGE_PATH"] == str(tmp_path / ".fastq" / "prefect" / "results")
    assert not (tmp_path / ".fastq").exists()  # says where things will lie, makes nothing


def test_without_a_workspace_prefects_home_is_left_alone(bare):
    prepare()
    assert "PREFECT_HOME" not in os.environ


def test_the_zone_is_utc_whatever_it_was(bare):
    bare.setenv("TZ", "America/New_York")
    time.tzset()
    assert time.localtime(0).tm_hour == 19  # the other zone did take hold
    prepare()
    assert time.localtime(0).tm_hour == 0


@pytest.mark.parametrize(
    "question",
    [
        "from mlflow.telemetry.utils import is_telemetry_disabled as off; print(off())",
        "from prefect._internal.analytics.enabled import is_telemetry_enabled as on; print(not on())",
        "from prefect.settings import get_current_settings as s; print(not s().server.analytics_enabled)",
        "from ray._common.usage import usage_lib; print(not usage_lib.usage_stats_enabled())",
    ],
    ids=["mlflow", "prefect", "prefect-server", "ray"],
)
def test_the_libraries_themselves_say_that_they_report_nothing(question, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name not in DEFAULTS and name != "CI"} | {"HOME": str(tmp_path)}
    program = f"from fastq.environment import prepare; prepare(); {question}"
    answer = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False, timeout=120)
    assert answer.stdout.strip() == "True", answer.stderr[-1000:]


def test_free_ports_are_free_different_and_never_given_to_a_connection():
    found = free_ports(5)
    assert len(set(found)) == 5
    given_out_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(found) < max(given_out_from, 20_000)
    with contextlib.ExitStack() as held:
        for port in found:
            held.enter_context(socket.socket()).bind(("127.0.0.1", port))
