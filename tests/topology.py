"""The topology of `infra/compose.yaml` where no container runs: its servers by the file's own commands, each to be killed and started again."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import psycopg
import redis
import yaml

from fastq.environment import DEFAULTS, free_ports

INFRA = Path(__file__).parents[1] / "infra"
BIN = Path(sys.executable).parent
PASSWORD = "of-the-test"
KEYS = {"AWS_ACCESS_KEY_ID": "of-the-test", "AWS_SECRET_ACCESS_KEY": "of-the-test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1"}
ON_DISK, IN_A_BUCKET = "--artifacts-destination=/artifacts", "--artifacts-destination=s3://artifacts"


@dataclass
class Server:
    """One server in a group of its own. `answers` says whether it does by now; url: as `services.online_store` takes it, of those that can be one."""

    command: list[str]
    log: Path
    env: dict[str, str]
    answers: Callable
    user: str | None = None
    url: str = ""
    process: subprocess.Popen | None = None

    def start(self):
        with self.log.open("ab") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self.process = subprocess.Popen(self.command, **streams, env=self.env, cwd=self.log.parent, user=self.user, start_new_session=True)
        return self

    def ready(self, seconds=300):
        """Wait until it answers."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError, OSError, redis.RedisError, psycopg.Error):
                if self.answers():
                    return self
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.3)

    def kill(self):
        """`kill -9`, of everything that it started too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.process.pid)
            for one in (whole, *whole.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait(30)

    def stop(self, seconds=5):
        """As a terminal would, which gives it so long to end, and whatever is left after that by force."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
                return


@dataclass
class Topology:
    """Where each listens, and what a client of theirs has in its environment. home: where they keep what they keep; postgres: the URL without a database."""

    home: Path
    postgres: str
    redis: str
    mlflow: str
    prefect: str
    storage: str
    env: dict[str, str]
    servers: dict[str, Server] = field(default_factory=dict)


def answers(url):
    return httpx.get(url, timeout=5, trust_env=False).status_code == 200


def composed(service, replaced):
    """The command of a service of the compose file, and the variables of its environment."""
    said = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"][service]

    def ours(text):
        for old, new in replaced.items():
            text = text.replace(old, new)
        assert not re.search(r"\$\{|postgres:5432|0\.0\.0\.0", text), text
        return text.replace("$$", "$")

    first, *rest = [ours(word) for word in (*said.get("entrypoint", []), *said["command"])]
    found = BIN / first if (BIN / first).exists() else first
    return [str(found), *rest], {name: ours(value) for name, value in said.get("environment", {}).items()}


def program(name):
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    assert found, f"{name} is missing (apt-get install redis-server postgresql)"
    return found


def postgres(home, port):
    """It refuses to run as root, so there it runs as its own user."""
    user = "postgres" if os.geteuid() == 0 else None
    home.mkdir(exist_ok=True)
    if user:
        shutil.chown(home, user)
    made = [program("initdb"), "-D", str(home / "data"), "-U", "fastq", "--auth=trust", "--encoding=UTF8", "--no-sync"]
    subprocess.run(made, cwd=home, check=True, user=user, capture_output=True)
    command = [program("postgres"), "-D", str(home / "data"), "-p", str(port), "-h", "127.0.0.1", "-k", str(home)]
    url = f"postgresql://fastq:none@127.0.0.1:{port}/postgres"

    def there():
        psycopg.connect(url, connect_timeout=2).close()
        return True

    return Server(command, home / "server.log", dict(os.environ), there, user, url).start().ready()


@contextlib.contextmanager
def topology(*, bucket=False):
    """All of it, running; with a `bucket` MLflow's files lie in an S3, moto's, that has another one, `logs`."""
    with tempfile.TemporaryDirectory(prefix="fastq-servers-", ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        home.chmod(0o755)  # PostgreSQL has a user of its own
        with _running(home, bucket) as made:
            yield made


@contextlib.contextmanager
def _running(home, bucket):
    database, store, s3, mlflow, prefect = free_ports(5)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name not in DEFAULTS}
    storage = f"http://127.0.0.1:{s3}"
    cloud = KEYS | {"AWS_ENDPOINT_URL": storage, "MLFLOW_S3_ENDPOINT_URL": storage, "AWS_ALLOW_HTTP": "true"}
    env = inherited | {"HOME": str(home), "PREFECT_HOME": str(home / "prefect")} | (cloud if bucket else {})
    replaced = {
        "postgres:5432": f"127.0.0.1:{database}",
        "${POSTGRES_PASSWORD}": "none",
        "${REDIS_PASSWORD:?choose one}": PASSWORD,
        "redis-server": f"redis-server --port {store} --bind 127.0.0.1",
        "0.0.0.0": "127.0.0.1",
        "--port=5000": f"--port={mlflow}",
        "4200": str(prefect),
        ON_DISK: IN_A_BUCKET if bucket else f"--artifacts-destination={home / 'artifacts'}",
    }
    url = f"redis://:{PASSWORD}@127.0.0.1:{store}/0"
    answering = {
        "redis": redis.Redis.from_url(url).ping,
        "mlflow": lambda: answers(f"http://localhost:{mlflow}/health"),
        "prefect": lambda: answers(f"http://localhost:{prefect}/api/health"),
    }
    made = Topology(home, f"postgresql://fastq:none@127.0.0.1:{database}", url, f"http://localhost:{mlflow}", f"http://127.0.0.1:{prefect}/api", storage, env)
    try:
        made.servers["postgres"] = postgres(home / "postgres", database)
        with psycopg.connect(made.servers["postgres"].url, autocommit=True) as connection:
            for statement in ("CREATE DATABASE prefect;", *(INFRA / "postgres-init.sql").read_text().splitlines()):
                connection.execute(statement)
        if bucket:
            command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(s3)]
            made.servers["s3"] = Server(command, home / "s3.log", env, lambda: answers(f"{storage}/moto-api/data.json")).start().ready()
            for name in ("logs", "artifacts"):
                bucket_of(storage).create_bucket(Bucket=name)
        for name, there in answering.items():
            command, more = composed(name, replaced)
            made.servers[name] = Server(command, home / f"{name}.log", env | more, there).start()
        for server in made.servers.values():
            server.ready()
        yield made
    finally:
        for server in reversed(made.servers.values()):
            server.stop()


def bucket_of(storage):
    import boto3

    keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"], "region_name": KEYS["AWS_REGION"]}
    return boto3.client("s3", endpoint_url=storage, **keys)
