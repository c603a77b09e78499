"""What every test shares: the environment of the front door, one thread each, and the installed `fastq` command."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from fastq.environment import DEFAULTS, prepare

FASTQ = str(Path(sys.executable).with_name("fastq"))


def pytest_configure(config):
    """Before any test module imports torch, Prefect or Ray: they read these once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # two cores shared by tests and what they start; also makes sums reproducible
    if "PREFECT_HOME" not in os.environ or hasattr(config, "workerinput"):  # one for each of pytest-xdist's workers
        config.prefect_home = tempfile.TemporaryDirectory(prefix="fastq-prefect-", ignore_cleanup_errors=True)
        config.add_cleanup(config.prefect_home.cleanup)
        os.environ["PREFECT_HOME"] = config.prefect_home.name
        os.environ["PREFECT_LOCAL_STORAGE_PATH"] = f"{config.prefect_home.name}/results"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored, and what they start would too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so has `nohup`
    prepare()


@pytest.fixture(scope="session")
def prefect_server():
    """The address of one Prefect server for all commands of the session: each would pay seconds for its own. `as_a_user` has them pay."""
    from prefect.server.api.server import SubprocessASGIServer

    from pipelines.turn import start_server

    start_server()
    return SubprocessASGIServer().api_url  # the one that flows in this process find running


@pytest.fixture(scope="session")
def fastq(prefect_server):
    """The installed command: `fastq("validate", "--json", cwd=workspace)` gives code, stdout and stderr. Never a traceback.

    Output goes through files: a process left behind would hold a pipe open, and the test with it.
    """

    def run(*arguments, cwd, code=None, timeout=600, **environment):
        env = dict(os.environ) | {"COLUMNS": "200", "PREFECT_API_URL": prefect_server} | environment
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            finished = subprocess.run(
                [FASTQ, *map(str, arguments)], cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout, env=env, check=False
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


# ---- as a user runs it ------------------------------------------------------------------------------------------------------
MARKED = "FASTQ_TEST_RUN"  # in the environment of whatever a command starts, so that the test finds what it left behind
CALLS = "connect,sendto,sendmsg,sendmmsg"
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')


@dataclasses.dataclass
class Run:
    """A command that runs, or has."""

    process: subprocess.Popen
    mark: str
    out: Path
    err: Path
    trace: Path | None = None

    @property
    def code(self):
        return self.process.returncode

    @property
    def stdout(self):
        return self.out.read_text()

    @property
    def stderr(self):
        return self.err.read_text()

    def wait(self, seconds=600):
        self.process.wait(seconds)
        assert "Traceback (most recent call last)" not in self.stdout + self.stderr, self.stderr[-3000:]
        return self

    def shows(self, text, seconds=300):
        """Wait until the progress on standard error says `text`."""
        until = time.monotonic() + seconds
        while text not in self.stderr:
            assert self.process.poll() is None, f"ended with {self.code} before it said {text!r}: {self.stderr[-2000:]}"
            assert time.monotonic() < until, f"never said {text!r}: {self.stderr[-2000:]}"
            time.sleep(0.1)

    def left(self):
        """The processes that carry this run's mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKED) == self.mark:
                    found.append(process)
        return found

    def gone(self, seconds=20):
        """Whether nothing of it runs, after some seconds in which what was told to end may end."""
        until = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left, [p.cmdline() for p in left if p.is_running()]

    def interrupt(self):
        """Ctrl-C, as a terminal sends it: to every process of the foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def listening(self):
        """The (address, port) pairs on which this run or its children take connections."""
        connections = [connection for process in self.left() for connection in process.net_connections("inet")]
        return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}

    def strangers(self):
        """The addresses, of those that this run or its children sent or connected to, that are not this machine."""
        return {address for line in self.trace.read_text(errors="replace").splitlines() for address in addresses(line) if not at_home(address)}


def addresses(line):
    """The internet addresses that a traced system call names."""
    return [one or other for one, other in ADDRESS.findall(line)]


def at_home(address):
    """Whether one reaches nobody but this machine at an address. (To connect to the unspecified one is to connect to oneself.)"""
    found = ip_address(address)
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_unspecified


@pytest.fixture(scope="session")
def as_a_user(tmp_path_factory):
    """`as_a_user("demo", "here", cwd=…)` starts a command; `traced=True` under strace, which writes down each address that it or a child of it turns to."""
    runs = []

    def start(*arguments, cwd, traced=False, command=(FASTQ,)):
        files = tmp_path_factory.mktemp("run")
        env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name not in DEFAULTS}
        mark = str(files)
        prefix, trace = [], None
        if traced:
            assert shutil.which("strace"), "strace is missing: without it nobody knows what leaves the machine (apt-get install strace)"
            trace = files / "trace"
            prefix = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(trace)]
        with (files / "out").open("w") as out, (files / "err").open("w") as err:
            process = subprocess.Popen(
                [*prefix, *command, *map(str, arguments)],
                cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                env=env | {"COLUMNS": "200", MARKED: mark},
            )  # fmt: skip
        runs.append(Run(process, mark, files / "out", files / "err", trace))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.left():
            with contextlib.suppress(psutil.Error):
                process.kill()


# ---- what many tests look at ------------------------------------------------------------------------------------------------
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


@pytest.fixture
def trained_whole_and_resumed():
    """`(platform, data, directory, stage, epoch)`: the policies of a training that was never stopped, and of one killed there and resumed.

    Their networks are equal bit for bit.
    """
    import torch

    from fastq import learner

    class Killed(Exception):
        pass

    def both(platform, data, directory, stage, epoch):
        def kill(at, done, total, metrics):
            if at == stage and done == epoch:
                raise Killed

        whole = learner.train(platform, data, directory / "whole")
        with pytest.raises(Killed):
            learner.train(platform, data, directory / "cut", on_progress=kill)
        resumed = learner.train(platform, data, directory / "cut", resume=True)
        for name in ("network", "values", "actor"):
            for (key, expected), found in zip(getattr(whole, name).state_dict().items(), getattr(resumed, name).state_dict().values(), strict=True):
                assert torch.equal(expected, found), f"{name}.{key} differs"
        return whole, resumed

    return both


# ---- real servers, on loopback ports of their own ---------------------------------------------------------------------------
@pytest.fixture(scope="session")
def redis_server():
    """A Redis that keeps nothing but in memory, and what it holds when it is stopped."""
    import redis
    from topology import Server, program

    from fastq.environment import free_ports

    with tempfile.TemporaryDirectory(prefix="fastq-redis-") as directory:
        (port,) = free_ports(1)
        url = f"redis://127.0.0.1:{port}/0"
        command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "3600 1", "--dir", directory]
        server = Server(command, Path(directory) / "server.log", dict(os.environ), redis.Redis.from_url(url).ping, url=url).start().ready()
        yield server
        server.kill()


@pytest.fixture(scope="session")
def postgres_server():
    """A PostgreSQL with one database."""
    from topology import postgres

    from fastq.environment import free_ports

    with tempfile.TemporaryDirectory(prefix="fastq-postgres-", ignore_cleanup_errors=True) as directory:
        server = postgres(Path(directory), *free_ports(1))
        yield server
        server.stop(60)
