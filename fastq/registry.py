"""The seam to MLflow: runs, write-once bundles, aliases. Nothing else imports it, and nothing of it is imported before it is needed.

A model is a bundle, a directory of safetensors and JSON (`Policy.save`); no pickle is written or read. The registered model carries the
platform's name. Its versions carry the gate's verdict and the bundle's checksum as tags; its aliases say what each is for:

    champion    what serving serves          previous    the champion before it, for `rollback`
    challenger  registered last, not (yet) promoted

By default runs and versions stand in SQLite in the workspace and files beside it; `services.mlflow` names a tracking server instead.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastq import environment
from fastq.errors import BundleError, ConfigurationError, FastqError, GateRefused, RequestError, UnknownPlayerError, WorkspaceError
from fastq.platform import FILE_NAME, Platform, load_platform
from fastq.workspace import Workspace, json_lines, settled

if TYPE_CHECKING:
    from fastq.policy import Policy

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
FLUSH_SECONDS = 2.0  # one metric costs MLflow 15 ms alone and 0.08 ms in a batch
_DIGEST_TAG = "bundle_sha256"


# ---- the connection ----------------------------------------------------------------------------------------------------
@functools.cache
def _connected(store: str, root: Path) -> Any:
    """A client of a store that exists: two processes that create one SQLite store at once would break it, so the first comes alone."""
    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"):
        os.environ.setdefault(name, environment.DEFAULTS[name])
    if not store.startswith("sqlite:"):  # by default MLflow asks a server that is gone for four minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    workspace = Workspace(root)
    workspace.make(workspace.mlflow)
    with workspace.lock("mlflow", wait_seconds=120):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=store, registry_uri=store)
        client.search_experiments(max_results=1)  # creates or upgrades the tables, and says now whether a server answers
        return client


def _client(platform: Platform) -> Any:
    """MLflow's client; raises `ConfigurationError` where the store does not answer."""
    service = platform.services.mlflow
    root = platform.root.resolve()
    store = f"sqlite:///{Workspace(root).mlflow / 'mlflow.db'}" if service == "sqlite" else service
    if service == "sqlite" and not (Workspace(root).mlflow / "mlflow.db").exists():
        _connected.cache_clear()  # the workspace was deleted under us
    try:
        return _connected(store, root)
    except FastqError:
        raise
    except Exception as error:
        shown = "MLflow's store in the workspace" if service == "sqlite" else service.rsplit("@", 1)[-1]
        raise ConfigurationError(f"services.mlflow: {shown} does not answer ({type(error).__name__}: {_first_line(error)})") from error


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    """MLflow's errors as one sentence of ours."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise WorkspaceError(f"MLflow: {doing} failed ({_first_line(error)}); check services.mlflow and the disk's free space") from error


def _first_line(error: BaseException) -> str:
    return re.sub(r"//[^/@\s]+@", "//", (str(error).strip().splitlines() or [""])[0])[:300]  # without the password of a URL


# ---- runs --------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """One MLflow run that is under way. Metrics are gathered and sent in batches; what is not yet sent goes when the run ends."""

    id: str
    client: Any
    _waiting: list[Any] = field(default_factory=list)
    _sent_at: float = field(default_factory=time.monotonic)

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep metrics of one step; NaN and infinity are kept as they are."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._waiting += [Metric(_metric_name(name), float(value), now, step) for name, value in metrics.items()]
        if time.monotonic() - self._sent_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting, self._sent_at = self._waiting, [], time.monotonic()
        if waiting:
            with _translated("logging metrics"):
                self.client.log_batch(self.id, metrics=waiting)

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Every metric of the run so far, those from before it was resumed too: (step, value), one per step, the last one logged."""
        self.flush()
        with _translated("reading metrics"):
            names = self.client.get_run(self.id).data.metrics
            found = {name: {m.step: m.value for m in sorted(self.client.get_metric_history(self.id, name), key=lambda m: m.timestamp)} for name in names}
        return {name: sorted(points.items()) for name, points in found.items()}

    def picture(self, name: str, figure: Any) -> None:
        """Keep a Matplotlib figure as `pictures/NAME.png`."""
        with _translated("keeping a picture"):
            self.client.log_figure(self.id, figure, f"pictures/{name}.png")

    def document(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a JSON document as an artifact."""
        with _translated("keeping a document"):
            self.client.log_dict(self.id, dict(content), name)

    def page(self, name: str, content: str) -> None:
        """Keep a text, such as an HTML page, as an artifact."""
        with _translated("keeping a page"):
            self.client.log_text(self.id, content, name)


def _metric_name(name: str) -> str:
    """MLflow's metric names hold letters, digits and _-. :/ only."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)


@contextlib.contextmanager
def start_run(platform: Platform, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, resume: str | None = None) -> Iterator[Run]:
    """A run in the platform's experiment, ended as FINISHED, FAILED or (on Ctrl-C) KILLED; `resume` goes on with the run of that id.

    So does the tag `turn` with the turn's run, where whoever began it, or the store, died before its id could be noted.
    """
    client = _client(platform)
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    run_id = None
    if resume is not None:
        with contextlib.suppress(MlflowException):  # gone with its store: then it is a new one
            run_id = client.get_run(resume).info.run_id
            client.update_run(run_id, status="RUNNING")
    if run_id is None:
        with _translated("starting a run"):
            experiment, labels = _experiment(platform, client), dict(tags or {})
            run_id = _run_of_turn(client, experiment, labels.get("turn"))
            if run_id is None:
                run_id = client.create_run(experiment, run_name=name, tags=labels).info.run_id
            client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])
    run = Run(run_id, client)
    ended = "FAILED"
    try:
        yield run
        ended = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        ended = "KILLED"
        raise
    finally:
        # a store that is gone must not hide why the run ended
        with contextlib.suppress(WorkspaceError) if ended != "FINISHED" else contextlib.nullcontext():
            run.flush()
            with _translated("ending a run"):
                client.set_terminated(run_id, status=ended)


def _run_of_turn(client: Any, experiment: str, turn: str | None) -> str | None:
    """The run that a turn began already, open again."""
    if turn is None:
        return None
    for run in client.search_runs([experiment], filter_string=f"tags.turn = '{turn}'", max_results=1):
        client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)
    return None


def _experiment(platform: Platform, client: Any) -> str:
    """The id of the platform's experiment; without a place of its own its artifacts would go to the current directory."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(platform.platform)
    if found is None:
        embedded = platform.services.mlflow == "sqlite"
        place = str(Workspace(platform.root.resolve()).mlflow / "artifacts") if embedded else None
        try:
            return str(client.create_experiment(platform.platform, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(platform.platform)  # another process was faster
            if found is None:
                raise
    return str(found.experiment_id)


# ---- versions ------------------------------------------------------------------------------------------------------------
def register(platform: Platform, run_id: str, bundle: Path, tags: Mapping[str, str] | None = None) -> str:
    """Keep a bundle with its run and make it the next version of the platform's model, the challenger. Returns the version.

    A run has one bundle: registering it again, after a crash, gives the version that is there.
    """
    verify(bundle)
    client = _client(platform)
    from mlflow.exceptions import MlflowException

    with Workspace(platform.root).lock("registry", wait_seconds=120), _translated("registering a model"):
        version = next((str(known.version) for known in _versions(platform, client) if known.run_id == run_id), None)
        if version is None:
            client.log_artifacts(run_id, str(bundle), "bundle")
            try:
                client.create_registered_model(platform.platform)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # register_model("runs:/…") would look for a pickled model; a version may point at any directory of its run
            labels = dict(tags or {}) | {_DIGEST_TAG: _sha256(bundle / "bundle.json")}
            version = str(client.create_model_version(platform.platform, source=f"runs:/{run_id}/bundle", run_id=run_id, tags=labels).version)
        if version not in _aliases(platform, client).values():  # also where a crash came between the version and its name
            client.set_registered_model_alias(platform.platform, CHALLENGER, version)
    return version


def record_verdict(platform: Platform, version: str, *, passed: bool, reasons: Sequence[str]) -> None:
    """What the gate said of a version, kept with it; `promote` goes by it."""
    client = _client(platform)
    found = _version(platform, client, version)
    with _translated("keeping the verdict"):
        client.set_model_version_tag(platform.platform, found.version, "verdict", "promoted" if passed else "refused")
        client.set_model_version_tag(platform.platform, found.version, "reasons", json.dumps(list(reasons)))


def attach(platform: Platform, version: str, pages: Mapping[str, str]) -> None:
    """Keep texts, name -> content, with the run that made a version: what was found out about it afterwards."""
    client = _client(platform)
    run = Run(_version(platform, client, version).run_id, client)
    for name, content in pages.items():
        run.page(name, content)


def models(platform: Platform) -> list[dict[str, Any]]:
    """All versions, newest first: version, aliases, created_at (RFC 3339), verdict (a sentence), none if there is no model yet."""
    client = _client(platform)
    with _translated("listing models"):
        aliases = _aliases(platform, client)
        return [
            {
                "version": str(v.version),
                "aliases": sorted(alias for alias, version in aliases.items() if version == str(v.version)),
                "created_at": datetime.fromtimestamp(v.creation_timestamp / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
                "verdict": _sentence(v.tags),
            }
            for v in _versions(platform, client)
        ]


def champion(platform: Platform) -> str | None:
    """The version that is to be served, None if no model was promoted yet."""
    client = _client(platform)
    with _translated("asking for the champion"):
        return _aliases(platform, client).get(CHAMPION)


def stamp(platform: Platform) -> object:
    """Differs between two looks if the registry was written to between them; None where only asking can tell: a server, or a change of this very moment.

    To ask costs milliseconds of Python, which whoever serves requests meanwhile waits for.
    """
    if platform.services.mlflow != "sqlite":
        return None
    found = []
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-journal"):
        with contextlib.suppress(FileNotFoundError):
            about = (Workspace(platform.root).mlflow / name).stat()
            found.append((name, about.st_ino, about.st_size, about.st_mtime_ns))
    return tuple(found) if found and settled(max(entry[3] for entry in found)) else None


def challenger(platform: Platform, champion: str) -> str | None:
    """The version that a share of the players gets, or that runs in shadow; None where none is configured, or it is the champion by now."""
    wanted = platform.serving.challenger
    if wanted.share == 0 and not wanted.shadow:
        return None
    try:
        version = resolve(platform, wanted.version or CHALLENGER)
    except UnknownPlayerError:
        if wanted.version is not None:
            raise
        return None  # nobody challenges now
    return None if version == champion else version


def promoted_at(platform: Platform, version: str) -> datetime | None:
    """When a version last became the champion, by promotion or by rollback; None where the audit log does not say."""
    for said in reversed(history(platform)):
        if said.get("action") in ("promote", "rollback") and str(said.get("version")) == version and "at" in said:
            return datetime.fromisoformat(said["at"])
    return None


def resolve(platform: Platform, reference: str) -> str:
    """The version that an alias or a version number names; raises `UnknownPlayerError` that lists what there is."""
    return str(_version(platform, _client(platform), reference).version)


def promote(platform: Platform, version: str, *, reason: str = "", forced: bool = False, who: str = "fastq") -> str:
    """Make a version the champion and the champion before it `previous`; returns the version.

    Raises `GateRefused` where the gate refused the version or never judged it; `forced` overrules that and needs a reason. Nothing overrules
    `BundleError`: a bundle that is damaged, or was made for other features than `fastq.yaml` describes now, can't be served.
    """
    if forced and not reason.strip():
        raise RequestError("promote: a forced promotion needs a reason, which is kept in the audit log")
    client = _client(platform)
    workspace = Workspace(platform.root)
    with workspace.lock("registry", wait_seconds=60):
        found = _version(platform, client, version)
        verdict = found.tags.get("verdict")
        if verdict != "promoted" and not forced:
            reasons = json.loads(found.tags.get("reasons", "[]")) or ["the gate never judged it; run `fastq retrain`"]
            raise GateRefused(f"{platform.platform} version {found.version} is not promoted", reasons)
        chosen = str(found.version)
        _for_these_features(platform, fetch(platform, chosen), f"{platform.platform} version {chosen}")
        with _translated("promoting"):
            aliases = _aliases(platform, client)
            before = aliases.get(CHAMPION)
            if before != chosen:
                said: dict[str, Any] = {"version": chosen, "previous": before, "reason": reason, "forced": forced}
                last = history(platform)[-1:]  # of a promotion that was cut off, and is finished now
                if not last or not {"action": "promote", **said}.items() <= last[0].items():
                    workspace.record(who, "promote", **said)
                if forced and verdict != "promoted":
                    client.set_model_version_tag(platform.platform, chosen, "forced", reason)
                if before is not None:
                    client.set_registered_model_alias(platform.platform, PREVIOUS, before)
                client.set_registered_model_alias(platform.platform, CHAMPION, chosen)
            if aliases.get(CHALLENGER) == chosen:
                client.delete_registered_model_alias(platform.platform, CHALLENGER)
    return chosen


def rollback(platform: Platform, *, who: str = "fastq", reason: str = "") -> str:
    """Make `previous` the champion again, and the champion `previous`; returns the version that is champion now."""
    client = _client(platform)
    workspace = Workspace(platform.root)
    with workspace.lock("registry", wait_seconds=60), _translated("rolling back"):
        aliases = _aliases(platform, client)
        back, now = aliases.get(PREVIOUS), aliases.get(CHAMPION)
        if back is None or back == now:
            raise UnknownPlayerError(f"{platform.platform}: there is no champion before this one; see `fastq models`, and `fastq promote VERSION`")
        workspace.record(who, "rollback", version=back, previous=now, reason=reason, forced=False)
        client.set_registered_model_alias(platform.platform, CHAMPION, back)
        if now is not None:
            client.set_registered_model_alias(platform.platform, PREVIOUS, now)
    return back


def _aliases(platform: Platform, client: Any) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(platform.platform).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _versions(platform: Platform, client: Any) -> list[Any]:
    name = platform.platform  # letters, digits, - _ . only: no quoting needed
    return sorted(_all_pages(functools.partial(client.search_model_versions, f"name = '{name}'")), key=lambda v: -int(v.version))


def _runs(platform: Platform, client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name(platform.platform)
    return [] if experiment is None else _all_pages(functools.partial(client.search_runs, [experiment.experiment_id]))


def _all_pages(search: Callable[..., Any]) -> list[Any]:
    """Everything that a search of MLflow's finds, which gives a page at a time."""
    page = search()
    found = list(page)
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found


def _version(platform: Platform, client: Any, reference: str) -> Any:
    reference = str(reference).removeprefix("@")
    with _translated("asking for a model"):
        aliases = _aliases(platform, client)
        wanted = aliases.get(reference, reference)
        versions = _versions(platform, client)
    for version in versions:
        if str(version.version) == wanted:
            return version
    if not versions:
        raise UnknownPlayerError(f"{platform.platform}: no model {reference!r}; none was trained yet, run `fastq retrain`")
    numbers = ", ".join(str(v.version) for v in versions[:20])
    named = ", ".join(sorted(aliases)) or "none"
    raise UnknownPlayerError(f"{platform.platform}: no model {reference!r}; there are the versions {numbers} and the aliases {named}")


def _sentence(tags: Mapping[str, str]) -> str:
    reasons = "; ".join(json.loads(tags.get("reasons", "[]")))
    verdict = {"promoted": "passed", "refused": "refused"}.get(tags.get("verdict", ""), "not judged")
    said = f"{verdict}: {reasons}" if reasons else verdict
    return f"{said}; forced: {tags['forced']}" if "forced" in tags else said


def history(platform: Platform) -> list[dict[str, Any]]:
    """The audit log, oldest first: at, who, action, and what belongs to it (version, previous, reason, forced)."""
    return json_lines(Workspace(platform.root).audit)


def attempts(platform: Platform, before: str | None = None) -> list[dict[str, Any]]:
    """What the gate was asked in this workspace, oldest first: turn, at and data_until (microseconds since 1970), promoted, alpha, reasons.

    A turn that was judged again after a crash counts once; `before` leaves out that turn, whose error rate must not depend on itself.
    """
    by_turn = {str(line["turn"]): line for line in json_lines(Workspace(platform.root).attempts)}
    return [line for turn, line in by_turn.items() if turn != before]


def record_attempt(platform: Platform, turn: str, *, at: int, data_until: int, promoted: bool, alpha: float, reasons: Sequence[str]) -> None:
    """Keep one judgement of the gate, before anything is made of it."""
    workspace = Workspace(platform.root)
    line = {"turn": turn, "at": at, "data_until": data_until, "promoted": promoted, "alpha": alpha, "reasons": list(reasons)}
    workspace.append(workspace.attempts, line)


# ---- bundles -------------------------------------------------------------------------------------------------------------
def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def verify(directory: Path) -> dict[str, Any]:
    """Check a bundle's files against the checksums in its `bundle.json`, which is returned; raises `BundleError` that names the file."""
    try:
        tree = json.loads((directory / "bundle.json").read_text(encoding="utf-8"))
        listed = dict(tree["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{directory}: not a readable bundle, bundle.json is missing or damaged ({type(error).__name__})") from None
    for name, expected in listed.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise BundleError(f"{directory}: bundle.json names {name!r}, which is outside the bundle")
        try:
            found = _sha256(directory / name)
        except OSError:
            raise BundleError(f"{directory}: {name} is missing from the bundle") from None
        if found != expected:
            raise BundleError(f"{directory}: {name} is not the file this bundle was written with (sha256 {found[:12]}…, expected {str(expected)[:12]}…)")
    return dict(tree)


def fetch(platform: Platform, reference: str = CHAMPION) -> Path:
    """A verified copy of a version's bundle under `workspace.models/VERSION`: downloaded once, never changed, checked at every call.

    Raises `BundleError` where a file is not the one that was registered.
    """
    client = _client(platform)
    version = _version(platform, client, reference)
    workspace = Workspace(platform.root)
    target = workspace.models / str(version.version)
    if not target.exists():
        workspace.make(workspace.models)
        with workspace.lock("models", wait_seconds=300):
            for partial in workspace.models.glob(".fetch-*"):
                shutil.rmtree(partial, ignore_errors=True)  # under the lock nobody else is at work: left by a process that was killed
            if not target.exists():
                _download(client, version, target)
    _same(version, target)
    return target


def _download(client: Any, version: Any, target: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
    try:
        with _translated(f"fetching version {version.version}"):
            got = Path(client.download_artifacts(version.run_id, "bundle", str(partial)))
        _same(version, got)
        for path in got.rglob("*"):
            if path.is_file():
                path.chmod(0o400)
                with path.open("rb") as content:
                    os.fsync(content.fileno())
        got.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same(version: Any, directory: Path) -> None:
    """The bundle is whole, and the one that was registered under this version."""
    verify(directory)
    if version.tags.get(_DIGEST_TAG) not in (None, _sha256(directory / "bundle.json")):
        raise BundleError(f"{directory}: not the bundle that was registered as version {version.version}; remove this directory to fetch it again")


def strike(platform: Platform, decision_ids: Sequence[str], who: str = "fastq") -> dict[str, int]:
    """Take logged decisions out of the evidence that every version's bundle holds; rows by version, those without any are left out.

    The one exception to write-once: the weights stay bit for bit, the evidence loses those rows, and the bundle, its copy here and the checksum it was
    registered with are replaced together. The audit log tells that it happened, not whose rows they were. See infra/decisions/0013.
    """
    if not decision_ids:
        return {}
    client = _client(platform)
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    workspace, wanted, removed = Workspace(platform.root), frozenset(decision_ids), {}
    with _translated("listing models"):
        versions = _versions(platform, client)
    for version in versions:
        name = str(version.version)
        directory = fetch(platform, name)
        rows = [i for i, decision in enumerate(verify(directory)["reference"]["decision_id"]) if decision in wanted]
        if not rows:
            continue
        with workspace.lock("registry", wait_seconds=120), workspace.lock("models", wait_seconds=300), _translated(f"replacing the bundle of version {name}"):
            partial = Path(tempfile.mkdtemp(prefix=".fetch-", dir=workspace.models))
            try:
                _without_evidence(directory, partial / "bundle", rows)
                workspace.record(who, "forget", version=name, rows=len(rows))
                # not client.log_artifacts, which remembers where a run's artifacts lay, though the workspace be moved
                where = client.get_run(version.run_id).info.artifact_uri
                get_artifact_repository(where).log_artifacts(str(partial / "bundle"), "bundle")
                client.set_model_version_tag(platform.platform, name, _DIGEST_TAG, _sha256(partial / "bundle" / "bundle.json"))
                directory.rename(partial / "before")
                (partial / "bundle").rename(directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        removed[name] = len(rows)
    return removed


def strike_unregistered(platform: Platform, decision_ids: Sequence[str]) -> dict[str, int]:
    """Delete bundles that a stop between keeping and registering them left with their runs, where their evidence names one of these; rows by run."""
    if not decision_ids:
        return {}
    client = _client(platform)
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    removed, wanted = {}, frozenset(decision_ids)
    with Workspace(platform.root).lock("registry", wait_seconds=120), _translated("looking for bundles that were never registered"):
        registered = {version.run_id for version in _versions(platform, client)}
        for run in _runs(platform, client):
            if run.info.run_id in registered:
                continue
            artifacts = get_artifact_repository(run.info.artifact_uri)
            if not any(Path(file.path).name == "bundle.json" for file in artifacts.list_artifacts("bundle")):
                continue
            with tempfile.TemporaryDirectory() as partial:
                tree = json.loads(Path(artifacts.download_artifacts("bundle/bundle.json", partial)).read_text(encoding="utf-8"))
            if rows := len(wanted.intersection(tree["reference"]["decision_id"])):
                artifacts.delete_artifacts("bundle")
                removed[run.info.run_id] = rows
    return removed


def retire(platform: Platform, before: datetime, needed: Collection[str] = (), busy: str | None = None, who: str = "fastq") -> tuple[list[str], int]:
    """Delete the versions that were registered before a moment and that nobody can ask for any more, and how many runs went, theirs and those without any.

    What stays: what an alias names, whatever ever was champion or was rolled back from, the newest, the `needed` ones, and the run of the turn `busy`.
    The audit log is told first. A run that is deleted on a server stands in MLflow's bin, files and all, until `mlflow gc` is run there; the embedded
    store is emptied.
    """
    client, workspace = _client(platform), Workspace(platform.root)
    oldest = int(before.timestamp() * 1000)
    with workspace.lock("registry", wait_seconds=120), workspace.lock("models", wait_seconds=300), _translated("retiring models"):
        versions = _versions(platform, client)
        stays = {*needed, *_aliases(platform, client).values(), *(str(v.version) for v in versions[:1])}
        promotions = [said for said in history(platform) if said.get("action") in ("promote", "rollback")]
        stays |= {str(said[key]) for said in promotions for key in ("version", "previous") if said.get(key)}
        gone = [v for v in versions if v.creation_timestamp < oldest and str(v.version) not in stays]
        for version in gone:
            name = str(version.version)
            workspace.record(who, "retire", version=name, reason=f"registered before {before:%Y-%m-%d}, never champion, and nothing needs it")
            client.delete_model_version(platform.platform, name)
            shutil.rmtree(workspace.models / name, ignore_errors=True)
        kept = {version.run_id for version in versions} - {version.run_id for version in gone}
        runs = [r.info.run_id for r in _runs(platform, client) if r.info.start_time < oldest and r.info.run_id not in kept and r.data.tags.get("turn") != busy]
        for run in runs:
            client.delete_run(run)
    if runs and platform.services.mlflow == "sqlite":
        store = client.tracking_uri
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", store, "--tracking-uri", store]  # also what a stop left in the bin
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
            raise WorkspaceError(f"MLflow: emptying its bin failed ({said[:300]})")
    return [str(version.version) for version in gone], len(runs)


def _without_evidence(bundle: Path, target: Path, rows: Sequence[int]) -> None:
    """A copy of a bundle without these rows of its evidence, whole and with its own checksums."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(bundle, target, copy_function=shutil.copyfile)
    tree = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    arrays = load_file(bundle / "weights.safetensors")
    for name in ("reference.embedding", "reference.action"):
        arrays[name] = np.ascontiguousarray(np.delete(arrays[name], rows, axis=0))
    save_file(arrays, target / "weights.safetensors")
    gone = set(rows)
    tree["reference"] = {name: [value for i, value in enumerate(values) if i not in gone] for name, values in tree["reference"].items()}
    tree["files"]["weights.safetensors"] = _sha256(target / "weights.safetensors")
    (target / "bundle.json").write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")
    for path in target.rglob("*"):
        if path.is_file():
            path.chmod(0o400)
            with path.open("rb") as content:
                os.fsync(content.fileno())
    verify(target)


def load_policy(uri: str | Path, workspace: Path | None = None) -> Policy:
    """The policy of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a bundle's directory.

    Names are resolved in the workspace: the directory `workspace`, else the current one, where `fastq.yaml` stands. Raises `UnknownPlayerError`
    where there is no such model, `BundleError` where it is damaged or was made for other features than `fastq.yaml` describes now.
    """
    from fastq.policy import Policy

    text = str(uri)
    if not text.startswith("models:"):
        verify(Path(uri))
        return Policy.load(Path(uri))
    platform = load_platform((workspace or Path()) / FILE_NAME)
    name, reference = _parsed(text)
    if name != platform.platform:
        raise UnknownPlayerError(f"{text}: the model of this workspace is called {platform.platform!r}; expected models:/{platform.platform}@champion")
    version = resolve(platform, reference)
    directory = fetch(platform, version)
    _for_these_features(platform, directory, text)
    return Policy.load(directory, version=version)


def _for_these_features(platform: Platform, directory: Path, name: str) -> None:
    from fastq import features

    if verify(directory).get("features") != features.fingerprint(platform):
        raise BundleError(f"{name}: was made for other features than {platform.root / FILE_NAME} describes now; run `fastq retrain`")


def _parsed(uri: str) -> tuple[str, str]:
    """Name and alias or version of a `models:` URI."""
    rest = uri.removeprefix("models:").lstrip("/")
    for separator in ("@", "/"):
        name, found, reference = rest.partition(separator)
        if found and name and reference and "/" not in name + reference:
            return name, reference
    raise RequestError(f"{uri}: expected models:/NAME@ALIAS, models:/NAME/VERSION or a directory")
