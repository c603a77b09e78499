"""The environment that our dependencies see: nothing reported to anybody, UTC, quiet, and their state inside the workspace.

Prefect, Ray, MLflow, Great Expectations and OpenMP read environment variables when they are imported, so the front door and
each entry point call `prepare` before they import any of them. Children (Ray's workers, Prefect's server) inherit the result.
What the user has set already wins, save for the time zone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import threading
import time
from multiprocessing import parent_process
from pathlib import Path

from fastq.errors import WorkspaceError
from fastq.workspace import Workspace

DEFAULTS = {
    # Nothing is reported to anybody.
    "DO_NOT_TRACK": "true",  # Prefect takes 1, true or yes; MLflow takes "true" only
    "GX_ANALYTICS_ENABLED": "false",
    "FEAST_USAGE": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads that wait must sleep: OpenMP's spinning ones turn 60 ms training steps into 1,000 ms beside a busy neighbour.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Prefect's temporary server: a fresh database needs more than the default 20 s on a busy machine, and its farewell is 150 lines of noise.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # a page for each event that a server which is away was not told of
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # what its server answers while its database is away; 429, 502, 503 and no answer are tried again as it is
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Ray Serve behind HAProxy costs a tenth of the processor time per request of the Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # default 30: how long a stop takes
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # with the next line: a killed proxy is back after 6 s instead of 25 s
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's log files say the same
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # a page of addresses on each SIGTERM
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray is about to make the default; silences its warning of that
    "MPLBACKEND": "Agg",  # pictures go to files; no display is asked for
}

# Loggers that report each start, advertise their makers' other products, or warn of what only the libraries themselves can mend.
TALKERS = (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "mlflow.store.db.utils",
    "alembic",
    "great_expectations",
    "py.warnings",
)


def prepare(workspace: Workspace | None = None) -> None:
    """Set what is not set yet; with a workspace also where Prefect keeps its database and results. Cheap, and harmless when repeated.

    The time zone is set whatever it was before: Feast's embedded online store writes local times, so a process in another zone
    would read every feature hours too old.
    """
    os.environ["TZ"] = "UTC"
    time.tzset()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if workspace is not None:
        home = workspace.prefect.resolve()
        os.environ.setdefault("PREFECT_HOME", str(home))
        os.environ.setdefault("PREFECT_LOCAL_STORAGE_PATH", str(home / "results"))  # small JSON files, from which a stopped flow resumes


def last_as_long_as_the_parent() -> None:
    """Of a process that works for another: deaf to the terminal's Ctrl-C, which the parent hears and hands on; gone when the parent is, whatever ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def free_ports(n: int) -> list[int]:
    """Ports of loopback that nobody listens on now, all different.

    Below those that the system gives to outgoing connections, where that leaves enough: one of them could take a port before it is listened on.
    """
    try:
        given_out_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):  # not Linux
        given_out_from = 32_768
    found: list[int] = []
    for port in random.sample(range(10_000, max(given_out_from, 20_000)), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == n:
            return found
    raise WorkspaceError(f"there are no {n} free ports between 10000 and {given_out_from}")
