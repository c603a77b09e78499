"""A demo, run once for every test that looks at it."""

import contextlib
import os
import signal
import subprocess

import pytest

SMALL = ("--players", "3000", "--days", "40")  # as many as the gate needs


@pytest.fixture(scope="session")
def small():
    """Arguments of a demo that is small, and yet large enough for the gate."""
    return SMALL


@pytest.fixture(scope="session")
def demo(as_a_user, tmp_path_factory):
    """A small demo, from the first to the last step, traced: its workspace and its run."""
    base = tmp_path_factory.mktemp("demo")
    run = as_a_user("demo", "shop", "--json", *SMALL, cwd=base, traced=True).wait(1_200)
    return base / "shop", run


@pytest.fixture(scope="session")
def running():
    """A server in a group of its own and in its log's directory, ended with all that it started; `with` a command, a log and an environment.

    A worker of Prefect's ends at its second SIGTERM.
    """

    @contextlib.contextmanager
    def run(command, log, env):
        with log.open("w") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            process = subprocess.Popen(list(map(str, command)), **streams, env=env, cwd=log.parent, start_new_session=True)
        try:
            yield process
        finally:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(3)

    return run
