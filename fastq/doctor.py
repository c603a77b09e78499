"""What is installed, reachable, stale or misconfigured, each with the mend. It looks and changes nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import ipaddress
import json
import os
import shutil
import socket
import sqlite3
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl
from filelock import FileLock, Timeout

from fastq import features, records, registry
from fastq.errors import ConfigurationError, FastqError
from fastq.platform import FILE_NAME, Platform, load_platform
from fastq.sources import parsed, scans
from fastq.workspace import FORMAT, STAGING, Workspace, format_of

Status = Literal["ok", "warning", "wrong"]
Keys = Callable[[Workspace], list[dict[str, Any]]]

PACKAGES = ("torch", "pytorch-lightning", "polars", "great-expectations", "feast", "mlflow", "prefect", "ray", "fastapi", "duckdb")
CONNECT_SECONDS = 2.0
FREE_BYTES, FREE_SHARE = 2 * 2**30, 0.05  # below either of them a retraining may not fit
ENOUGH_FILES = 4_096  # open at once: Ray's workers and the decision log's readers
OURS = ("PREFECT_HOME", "FASTQ_SERVED_WORKSPACE")  # environment variables that name the workspace a process belongs to
BACKED_UP_DAYS = 8


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `mend` is what to do, empty where all is well."""

    name: str
    status: Status
    says: str
    mend: str = ""


def examine(root: Path, keys: Keys) -> dict[str, Any]:
    """`passed` (nothing is wrong) and `checks: [{name, status, says, mend}]`; `keys` lists the endpoint's keys of a workspace."""
    found = [*_installed(), *_machine(root)]
    try:
        platform = load_platform(root / FILE_NAME)
    except ConfigurationError as error:
        found.append(Check("fastq.yaml", "wrong", str(error), "mend the line that is named; fastq init writes a new one from your logs"))
        return _document(found)
    found.append(Check("fastq.yaml", "ok", f"platform {platform.platform}: {len(platform.policies)} policies, {len(platform.objectives)} objectives"))
    for look in (_workspace, _logs, _services, _models, _monitor, _processes, lambda p: _keys(p, keys)):
        if look is _models and any(check.name == "services.mlflow" and check.status == "wrong" for check in found):
            continue  # it would be asked for minutes
        try:
            found += look(platform)
        except (FastqError, OSError, ValueError, KeyError, AttributeError, sqlite3.Error, pl.exceptions.PolarsError) as error:  # it looks at damaged things
            found.append(Check("looking", "wrong", f"{' '.join(str(error).split())[:300]}", "see the message; fastq backup before anything is changed by hand"))
    return _document(found)


def _document(found: list[Check]) -> dict[str, Any]:
    order = {"wrong": 0, "warning": 1, "ok": 2}
    return {"passed": all(check.status != "wrong" for check in found), "checks": [asdict(c) for c in sorted(found, key=lambda c: order[c.status])]}


# ---- the machine -------------------------------------------------------------------------------------------------------------
def _installed() -> Iterator[Check]:
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("installed", "wrong", f"missing: {', '.join(missing)}", "pip install -r requirements.lock, in the environment that fastq runs in")
    yield Check("installed", "ok", f"Python {sys.version.split()[0]}, {', '.join(versions)}")


def _machine(root: Path) -> Iterator[Check]:
    import psutil

    usage = shutil.disk_usage(root)
    low = usage.free < FREE_BYTES or usage.free < FREE_SHARE * usage.total
    yield Check(
        "disk",
        "wrong" if usage.free < FREE_BYTES / 4 else "warning" if low else "ok",
        f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}",
        "free some space: a full disk refuses decisions (503) rather than lose them" if low else "",
    )
    memory = psutil.virtual_memory().available / 2**30
    yield Check("memory", "ok" if memory > 2 else "warning", f"{memory:.1f} GiB available", "" if memory > 2 else "training and serving want 2 GiB each")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < ENOUGH_FILES
    yield Check(
        "open files",
        "warning" if few else "ok",
        f"{soft:,} at once",
        f"ulimit -n {min(hard, 65_536) if hard > 0 else 65_536} before fastq serve" if few else "",
    )
    if not os.access(root, os.W_OK):
        yield Check("owner", "wrong", f"{root} cannot be written by this user", "run as its owner, or chown it")


# ---- the workspace -----------------------------------------------------------------------------------------------------------
def _workspace(platform: Platform) -> Iterator[Check]:
    workspace = Workspace(platform.root)
    number = format_of(workspace)
    if number > FORMAT:
        yield Check(
            "workspace", "wrong", f"of format {number}; this fastq knows {FORMAT}", "install the version that wrote it, or restore a backup of this one's"
        )
    else:
        yield Check("workspace", "ok", f"format {number}, {sum(1 for _ in workspace.state.rglob('*')) if workspace.state.exists() else 0:,} files in .fastq")
    if workspace.state.exists() and workspace.state.stat().st_mode & 0o077:
        yield Check("privacy", "warning", ".fastq can be read by other users of this machine", f"chmod 700 {workspace.state}")
    if (workspace.root / STAGING).exists():
        finish = (
            "any fastq command finishes it" if (workspace.root / STAGING / "swap.json").exists() else f"it changed nothing: rm -r {workspace.root / STAGING}"
        )
        yield Check("restore", "warning", "a restore was stopped here", finish)
    held = [path for path in sorted(workspace.state.rglob("*.lock")) if _held(path)] if workspace.state.exists() else []
    if held:
        yield Check("locks", "ok", f"at work: {', '.join(path.stem for path in held)}")
    if (workspace.runs / "turn.json").exists() and not any(path.name == "retrain.lock" for path in held):
        began = "some time ago"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            began = json.loads((workspace.runs / "turn.json").read_text(encoding="utf-8"))["started_at"]
        yield Check("retraining", "warning", f"one that began {began:.16} was stopped", "fastq retrain --resume goes on where it was")
    for path in records.decision_logs(platform):
        with records.reading_log(path) as log:
            said = log.execute("PRAGMA quick_check").fetchone()[0]
        if said != "ok":
            yield Check("decision log", "wrong", f"{path.name}: {said}", "stop fastq serve, move the file away, restore it from a backup")


def _held(path: Path) -> bool:
    try:
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _logs(platform: Platform) -> Iterator[Check]:
    for table, column in (("decisions", "decided_at"), ("activity", "occurred_at"), ("players", None), ("proposals", None), ("items", None)):
        source = getattr(platform.logs, table)
        if source is None:
            continue
        try:
            files = list(scans(platform.root, f"{FILE_NAME}: logs.{table}", source))
        except FastqError as error:
            yield Check(f"logs.{table}", "wrong", str(error), "export it again, or mend its path in fastq.yaml")
            continue
        newest = _newest(files, column) if column else None
        limit = platform.state.period * platform.serving.stale_after
        age = datetime.now(UTC) - newest if newest is not None else None
        old = age is not None and age > limit
        when = f", the newest row of {newest:%Y-%m-%d %H:%M} UTC" if newest is not None else ""
        yield Check(f"logs.{table}", "warning" if old else "ok", f"{len(files):,} files{when}", "look why nothing newer arrives" if old else "")


def _newest(files: list[tuple[str, pl.LazyFrame]], column: str) -> datetime | None:
    """The newest moment of a column in the last file by name; None where it holds none."""
    with contextlib.suppress(pl.exceptions.PolarsError, OSError, KeyError):
        rows = files[-1][1]
        moment = parsed(pl.col(column), "time", rows.collect_schema()[column])
        found = None if moment is None else rows.select(moment.max()).collect().item()
        if isinstance(found, datetime):
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return None


# ---- the services ------------------------------------------------------------------------------------------------------------
def _services(platform: Platform) -> Iterator[Check]:
    named = {"services.mlflow": platform.services.mlflow, "services.online_store": platform.services.online_store, "services.ray": platform.services.ray}
    if url := os.environ.get("PREFECT_API_URL"):
        named["PREFECT_API_URL"] = url
    for key, uri in named.items():
        parts = urllib.parse.urlsplit(uri)
        if not parts.scheme or parts.hostname is None:
            yield Check(key, "ok", f"{uri}: embedded")
            continue
        port = parts.port or {"redis": 6379, "rediss": 6379, "postgresql": 5432, "ray": 10001, "https": 443}.get(parts.scheme.split("+")[0], 80)
        shown = f"{parts.scheme}://{parts.hostname}:{port}"  # a password in it is not for the eye
        try:
            socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            yield Check(key, "wrong", f"{shown}: {error.strerror or error}", f"start it, or mend {key}; until then nothing that needs it works")
        else:
            yield Check(key, "ok", f"{shown} answers")


def _models(platform: Platform) -> Iterator[Check]:
    workspace = Workspace(platform.root)
    if platform.services.mlflow == "sqlite" and not (workspace.mlflow / "mlflow.db").exists():
        yield Check("champion", "warning", "nothing was trained yet", "fastq retrain")
        return
    version = registry.champion(platform)
    if version is None:
        yield Check("champion", "warning", "no version was promoted, so nothing is served", "fastq models shows why; fastq retrain makes another")
        return
    try:
        bundle = registry.verify(registry.fetch(platform, version))
    except FastqError as error:
        yield Check("champion", "wrong", f"version {version}: {error}", "fastq rollback, then fastq retrain")
        return
    if bundle.get("features") != features.fingerprint(platform):
        yield Check("champion", "wrong", f"version {version} was made for other features than fastq.yaml describes now; serving refuses it", "fastq retrain")
        return
    yield Check("champion", "ok", f"version {version}, its files are those that were registered")


def _monitor(platform: Platform) -> Iterator[Check]:
    workspace = Workspace(platform.root)
    with contextlib.suppress(OSError, ValueError, KeyError):
        looked = datetime.fromisoformat(json.loads((workspace.monitor / "state.json").read_text(encoding="utf-8"))["looked_at"])
        hours = (datetime.now(UTC) - looked).total_seconds() / 3600
        yield Check(
            "monitor",
            "ok" if hours < 25 else "warning",
            f"looked {hours:.0f} hours ago",
            "" if hours < 25 else "fastq schedule looks each hour; fastq monitor looks now",
        )
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads((workspace.state / "schedule.json").read_text(encoding="utf-8"))
        running = _held(workspace.state / "schedule.lock")
        yield Check(
            "schedule",
            "ok" if running else "warning",
            f"{kept['cron']} {kept['zone']}",
            "" if running else "it does not run: fastq schedule, or a systemd unit (README)",
        )


# ---- what runs ---------------------------------------------------------------------------------------------------------------
def _processes(platform: Platform) -> Iterator[Check]:
    """Everything that carries this workspace's name in its environment: whether somebody still owns it, and where it listens."""
    import psutil

    root = str(platform.root.resolve())
    ours, owners = [], set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if any(environment.get(name, "").startswith(root) for name in OURS):
                ours.append(process)
            if "fastq" in " ".join(process.cmdline()[:3]) or process.pid == os.getpid():
                owners.add(process.pid)
    open_to_all, orphans = [], []
    for process in ours:
        with contextlib.suppress(psutil.Error, OSError):
            line = {process.pid, *(parent.pid for parent in process.parents())}
            if not line & owners:
                orphans.append(f"{process.pid} ({process.name()})")
            listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            beyond = [address for address in listening if not ipaddress.ip_address(address.ip.split("%")[0]).is_loopback]
            open_to_all += [f"{address.ip}:{address.port} ({process.name()} {process.pid})" for address in beyond]
    if orphans:
        yield Check("left over", "wrong", f"processes of commands that are no more: {', '.join(orphans)}", f"kill {' '.join(o.split()[0] for o in orphans)}")
    if open_to_all:
        yield Check(
            "listening", "warning", f"beyond this machine: {', '.join(sorted(set(open_to_all)))}", "put TLS and a firewall in front, or leave --host out"
        )
    else:
        yield Check("listening", "ok", "nothing of ours listens beyond this machine")


def _keys(platform: Platform, keys: Keys) -> Iterator[Check]:
    workspace = Workspace(platform.root)
    if not workspace.keys.exists():
        yield Check("keys", "warning", "there are none, so nobody can ask the endpoint", "fastq keys create --role recommend")
        return
    alive = [key for key in keys(workspace) if not key.get("revoked_at")]
    roles = ", ".join(sorted({key["role"] for key in alive})) or "none"
    yield Check("keys", "ok" if alive else "warning", f"{len(alive)} in use: {roles}", "" if alive else "fastq keys create --role recommend")
    if workspace.keys.stat().st_mode & 0o077:
        yield Check("keys", "wrong", "keys.db can be read by other users of this machine", f"chmod 600 {workspace.keys}")
