"""What every test shares: the environment of the front door, one thread each, and the installed `fastq` command."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastq.environment import prepare


def pytest_configure(config):
    """Before any test module imports torch, Prefect or Ray: they read these once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # two cores shared by tests and what they start; also makes sums reproducible
    if "PREFECT_HOME" not in os.environ:
        config.prefect_home = tempfile.TemporaryDirectory(prefix="fastq-prefect-", ignore_cleanup_errors=True)
        config.add_cleanup(config.prefect_home.cleanup)
        os.environ["PREFECT_HOME"] = config.prefect_home.name
        os.environ["PREFECT_LOCAL_STORAGE_PATH"] = f"{config.prefect_home.name}/results"
    prepare()


@pytest.fixture(scope="session")
def fastq():
    """The installed command: `fastq("validate", "--json", cwd=workspace)` gives code, stdout and stderr. Never a traceback.

    Output goes through files: a process left behind would hold a pipe open, and the test with it.
    """
    command = Path(sys.executable).with_name("fastq")

    def run(*arguments, cwd, code=None, timeout=600, **environment):
        env = dict(os.environ) | {"COLUMNS": "200"} | environment  # one PREFECT_HOME for the session: migrating a fresh database takes ten seconds
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            finished = subprocess.run(
                [command, *map(str, arguments)], cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout, env=env, check=False
            )
            out.seek(0)
            err.seek(0)
            finished.stdout, finished.stderr = out.read(), err.read()
        assert "Traceback (most recent call last)" not in finished.stdout + finished.stderr, finished.stderr[-2000:]
        if code is not None:
            wanted = code if isinstance(code, tuple) else (code,)
            assert finished.returncode in wanted, f"ended with {finished.returncode}, wanted {code}: {(finished.stdout + finished.stderr)[-2000:]}"
        return finished

    return run


@pytest.fixture(scope="session")
def trained(fastq, tmp_path_factory):
    """A workspace with a champion, made once by the real commands from a small simulated platform's logs."""
    from fastq import worlds

    workspace = tmp_path_factory.mktemp("trained")
    worlds.write_logs(worlds.world("arena"), workspace, players=300, days=24, seed=100)
    file = workspace / "fastq.yaml"
    file.write_text(file.read_text().replace("preset: default", "preset: default, epochs: 4"))
    made = json.loads(fastq("retrain", "--json", cwd=workspace, code=(0, 1)).stdout)
    if not made["promoted"]:  # a model this small may well be refused; tests of serving need one all the same
        fastq("promote", made["version"], "--force", "--reason", "fixture of the tests", cwd=workspace, code=0)
    return workspace


@pytest.fixture(scope="session")
def policy(trained):
    """The champion of the `trained` workspace."""
    import torch

    from fastq import load_policy

    torch.set_num_threads(1)
    return load_policy("models:/arena@champion", trained)


@pytest.fixture(scope="session")
def data(trained):
    """The transitions of the `trained` workspace's accepted tables."""
    from fastq import features, load_platform, records, windows

    platform = load_platform(trained)
    read = records.read_tables(platform)
    return windows.build(platform, read, features.build_rows(platform, read))
