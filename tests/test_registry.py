"""The registry on a real MLflow store in SQLite: versions are written once, aliases move, what is damaged is refused."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastq import features, registry
from fastq.errors import BundleError, ConfigurationError, GateRefused, RequestError, UnknownPlayerError, WorkspaceError
from fastq.platform import platform_from_tree
from fastq.workspace import Workspace

TREE = {
    "platform": "arena",
    "logs": {"decisions": "d.parquet"},
    "state": {"period": "1d", "window": 3},
    "policies": ["stretch", "retain"],
    "action": {"kind": "continuous", "dimensions": {"target": {"low": 1, "high": 20}}},
    "objectives": {"returns": {}},
}
ROOT = Path(__file__).parents[1]
FEATURES = features.fingerprint(platform_from_tree(dict(TREE), Path(), "fastq.yaml"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """MLflow's tables, made once: building them takes longer than any test here."""
    root = tmp_path_factory.mktemp("empty")
    registry.models(platform_from_tree(dict(TREE), root, "fastq.yaml"))
    return Workspace(root).mlflow / "mlflow.db"


@pytest.fixture
def platform(tmp_path, empty_store):
    workspace = Workspace(tmp_path)
    workspace.make(workspace.mlflow)
    shutil.copy(empty_store, workspace.mlflow)
    return platform_from_tree(dict(TREE), tmp_path, "fastq.yaml")


def bundle(directory, weight=1.0, feature_fingerprint=FEATURES):
    """A directory as `Policy.save` writes it, with one weight."""
    directory.mkdir(parents=True)
    save_file({"w": np.array([weight])}, directory / "weights.safetensors")
    digest = hashlib.sha256((directory / "weights.safetensors").read_bytes()).hexdigest()
    (directory / "bundle.json").write_text(json.dumps({"features": feature_fingerprint, "files": {"weights.safetensors": digest}}))
    return directory


def registered(platform, weight, **about):
    """A new version with the gate's blessing, unless told otherwise."""
    with registry.start_run(platform, "a run", {}) as run:
        pass
    version = registry.register(platform, run.id, bundle(platform.root / f"made-{weight}", weight))
    registry.record_verdict(platform, version, **{"passed": True, "reasons": ["better than retain"]} | about)
    return version


def audit(platform):
    return [json.loads(line) for line in Workspace(platform.root).audit.read_text().splitlines()]


def test_a_workspace_without_models(platform):
    assert registry.models(platform) == []
    assert registry.champion(platform) is None
    with pytest.raises(UnknownPlayerError, match="none was trained yet"):
        registry.fetch(platform)
    with pytest.raises(UnknownPlayerError, match="no champion before"):
        registry.rollback(platform)


def test_a_run_keeps_what_it_is_given(platform):
    import matplotlib.figure

    with registry.start_run(platform, "retrain", {"epochs": 3}, {"git": "abc"}) as run:
        run.log({"loss": 2.0, "joy (mean)": 0.5}, step=0)
        run.log({"loss": 1.0}, step=1)
        run.picture("loss", matplotlib.figure.Figure())
        run.document("evaluation.json", {"promoted": True})
    kept = run.client.get_run(run.id)
    assert (kept.info.status, kept.data.params, kept.data.tags["git"]) == ("FINISHED", {"epochs": "3"}, "abc")
    assert [(m.step, m.value) for m in run.client.get_metric_history(run.id, "loss")] == [(0, 2.0), (1, 1.0)]
    assert kept.data.metrics["joy _mean_"] == 0.5
    assert run.curves() == {"loss": [(0, 2.0), (1, 1.0)], "joy _mean_": [(0, 0.5)]}
    assert kept.info.artifact_uri.startswith(str(Workspace(platform.root).mlflow / "artifacts"))
    assert [a.path for a in run.client.list_artifacts(run.id)] == ["evaluation.json", "pictures"]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_stops_says_so_and_can_go_on(platform, error, status):
    def stopped():
        with registry.start_run(platform, "retrain", {}) as run:
            started.append(run)
            run.log({"loss": 1.0})
            raise error

    started = []
    with pytest.raises(error):
        stopped()
    (run,) = started
    assert run.client.get_run(run.id).info.status == status
    assert run.client.get_run(run.id).data.metrics == {"loss": 1.0}
    with registry.start_run(platform, "retrain", {}, resume=run.id) as again:
        again.log({"loss": 0.5}, step=1)
    assert again.id == run.id
    assert run.client.get_run(run.id).info.status == "FINISHED"
    with registry.start_run(platform, "retrain", {}, resume="0" * 32) as new:
        pass
    assert new.id != run.id


def test_what_a_crash_left_of_a_registration_or_a_promotion_is_finished_by_the_next(platform, monkeypatch):
    """Cut off at each call to MLflow that changes a name, and done again: names are whole, and there is one version."""
    client = registry._client(platform)
    whole = {name: getattr(client, name) for name in ("set_registered_model_alias", "delete_registered_model_alias")}

    def dying(at, deed):
        """`deed`, cut off at the call number `at` (done or not); whether it came that far."""
        seen = []
        with monkeypatch.context() as patch:
            for name, method in whole.items():

                def call(*arguments, method=method):
                    seen.append(arguments)
                    if len(seen) == at // 2 + 1 and at % 2 == 0:
                        raise KeyboardInterrupt
                    method(*arguments)
                    if len(seen) == at // 2 + 1:
                        raise KeyboardInterrupt

                patch.setattr(client, name, call)
            try:
                deed()
            except KeyboardInterrupt:
                return True
        return False

    registry.promote(platform, registered(platform, 1.0))
    with registry.start_run(platform, "a run", {}) as run:
        pass
    made = bundle(platform.root / "made-2", 2.0)
    assert dying(0, lambda: registry.register(platform, run.id, made))
    assert [model["aliases"] for model in registry.models(platform)] == [[], ["champion"]]
    version = registry.register(platform, run.id, made)
    registry.record_verdict(platform, version, passed=True, reasons=[])
    assert [model["aliases"] for model in registry.models(platform)] == [["challenger"], ["champion"]]
    cuts = 0
    while dying(cuts, lambda: registry.promote(platform, version)):
        assert registry.champion(platform) in ("1", "2")
        assert len(registry.verify(registry.fetch(platform))["files"]) == 1
        cuts += 1
    assert cuts >= 3
    assert [(line["action"], line["version"]) for line in registry.history(platform)] == [("promote", "1"), ("promote", "2")], "each deed once"
    assert [model["aliases"] for model in registry.models(platform)] == [["champion"], ["previous"]]
    assert registry.rollback(platform) == "1"


def test_aliases_move_and_every_move_is_audited(platform):
    one, two = registered(platform, 1.0), registered(platform, 2.0)
    three = registered(platform, 3.0, passed=False, reasons=["cost 0.2 is above its ceiling 0.1"])
    assert (one, two, three) == ("1", "2", "3")
    assert registry.promote(platform, one, who="ada") == "1"
    assert registry.promote(platform, two, reason="better", who="ada") == "2"
    assert registry.promote(platform, two, who="ada") == "2"  # already is: nothing moves, nothing is written
    aliases = {m["version"]: m["aliases"] for m in registry.models(platform)}
    assert aliases == {"3": ["challenger"], "2": ["champion"], "1": ["previous"]}

    with pytest.raises(GateRefused, match="ceiling") as refused:
        registry.promote(platform, three)
    assert refused.value.reasons == ["cost 0.2 is above its ceiling 0.1"]
    with pytest.raises(RequestError, match="reason"):
        registry.promote(platform, three, forced=True, reason=" ")
    registry.promote(platform, three, forced=True, reason="a test", who="bob")
    assert {m["version"]: m["aliases"] for m in registry.models(platform)} == {"3": ["champion"], "2": ["previous"], "1": []}
    said = [m["verdict"] for m in registry.models(platform)]
    assert said == ["refused: cost 0.2 is above its ceiling 0.1; forced: a test", *["passed: better than retain"] * 2]

    assert registry.rollback(platform, who="eve", reason="worse") == "2"
    assert registry.champion(platform) == "2"
    assert registry.rollback(platform, who="eve") == "3"
    assert [(a["who"], a["action"], a["version"], a["previous"], a["reason"], a["forced"]) for a in audit(platform)] == [
        ("ada", "promote", "1", None, "", False),
        ("ada", "promote", "2", "1", "better", False),
        ("bob", "promote", "3", "2", "a test", True),
        ("eve", "rollback", "2", "3", "worse", False),
        ("eve", "rollback", "3", "2", "", False),
    ]
    assert registry.history(platform) == audit(platform)


def test_what_nobody_can_ask_for_is_retired_and_nothing_else(platform):
    """Six versions: 1 was champion, 2 is previous, 4 is champion, 3 and 5 never were, 6 is the newest; 5 decided what is still explained."""
    for weight in range(1, 7):
        registered(platform, float(weight), **({} if weight in (1, 2, 4) else {"passed": False}))
    for version in ("1", "2", "4"):
        registry.promote(platform, version)
    with (
        registry.start_run(platform, "never registered", {}, {"turn": "long ago"}) as lost,
        registry.start_run(platform, "under way", {}, {"turn": "now"}) as busy,
    ):
        pass
    client, copy = registry._client(platform), registry.fetch(platform, "3")
    where = Path(client.get_run(client.get_model_version("arena", "3").run_id).info.artifact_uri)
    assert registry.retire(platform, datetime.now(UTC) - timedelta(days=1), {"5"}, "now") == ([], 0), "nothing is that old"
    later = datetime.now(UTC) + timedelta(seconds=1)
    assert (copy.exists(), (where / "bundle").exists()) == (True, True)
    assert registry.retire(platform, later, {"5"}, "now", who="ada") == (["3"], 2)
    assert [m["version"] for m in registry.models(platform)] == ["6", "5", "4", "2", "1"]
    assert not copy.exists()
    assert not where.exists(), "its files are gone from the store"
    with sqlite3.connect(Workspace(platform.root).mlflow / "mlflow.db") as database:
        kept = {run for (run,) in database.execute("SELECT run_uuid FROM runs")}
    assert busy.id in kept
    assert lost.id not in kept
    assert len(kept) == 6
    assert (audit(platform)[-1]["action"], audit(platform)[-1]["version"], audit(platform)[-1]["who"]) == ("retire", "3", "ada")
    assert registry.rollback(platform) == "2", "the way back is open"
    assert registry.retire(platform, later, {"5"}, "now") == ([], 0)
    assert registered(platform, 7.0) == "7", "no number comes twice"


def test_a_version_that_was_never_judged_is_not_promoted(platform):
    with registry.start_run(platform, "a run", {}) as run:
        pass
    version = registry.register(platform, run.id, bundle(platform.root / "made"), {"data": "abc"})
    assert registry.models(platform)[0]["verdict"] == "not judged"
    with pytest.raises(GateRefused, match="never judged"):
        registry.promote(platform, version)


def test_a_bundle_made_for_other_features_is_not_promoted_by_anything(platform):
    with registry.start_run(platform, "a run", {}) as run:
        pass
    version = registry.register(platform, run.id, bundle(platform.root / "made", feature_fingerprint="other"))
    registry.record_verdict(platform, version, passed=True, reasons=[])
    for forced in (False, True):
        with pytest.raises(BundleError, match="made for other features"):
            registry.promote(platform, version, forced=forced, reason="I insist")
    assert registry.champion(platform) is None
    assert registry.history(platform) == []


def test_attempts_outlive_the_process_and_a_turn_counts_once(platform):
    assert registry.attempts(platform) == []
    for turn, at, promoted in (("a", 1, False), ("b", 2, False), ("b", 3, True)):  # b was judged again after a crash
        registry.record_attempt(platform, turn, at=at, data_until=at * 10, promoted=promoted, alpha=0.025, reasons=["because"])
    with Workspace(platform.root).attempts.open("a") as torn:
        torn.write('{"turn": "c", "at"')  # a crash in the middle of a line
    assert [(line["turn"], line["at"], line["promoted"]) for line in registry.attempts(platform)] == [("a", 1, False), ("b", 3, True)]
    assert [line["turn"] for line in registry.attempts(platform, before="b")] == ["a"]


def test_registering_again_after_a_crash_gives_the_same_version(platform):
    with registry.start_run(platform, "a run", {}) as run:
        pass
    made = bundle(platform.root / "made")
    assert [registry.register(platform, run.id, made) for _ in range(2)] == ["1", "1"]
    assert len(registry.models(platform)) == 1


def test_unknown_models_are_answered_with_what_there_is(platform):
    registry.promote(platform, registered(platform, 1.0))
    for reference in ("7", "challenger", "@previous", "one"):
        with pytest.raises(UnknownPlayerError, match="versions 1 and the aliases champion"):
            registry.resolve(platform, reference)
    assert registry.resolve(platform, "champion") == registry.resolve(platform, "@champion") == registry.resolve(platform, "1") == "1"


def test_a_fetched_bundle_is_whole_and_stays(platform):
    registry.promote(platform, registered(platform, 1.0))
    got = registry.fetch(platform)
    assert got == Workspace(platform.root).models / "1"
    assert registry.verify(got)["features"] == FEATURES
    stamp = (got / "weights.safetensors").stat()
    assert registry.fetch(platform, "1") == got
    assert (got / "weights.safetensors").stat().st_mtime_ns == stamp.st_mtime_ns
    assert [p.name for p in got.parent.iterdir()] == ["1"]

    weights = got / "weights.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"weights\.safetensors is not the file"):
        registry.fetch(platform)


def test_a_bundle_changed_in_the_store_is_refused(platform):
    registered(platform, 1.0)
    (stored,) = Workspace(platform.root).mlflow.glob("artifacts/*/artifacts/bundle")
    other = bundle(platform.root / "other", 9.0)
    for name in ("bundle.json", "weights.safetensors"):  # whole in itself, but not what was registered
        (stored / name).write_bytes((other / name).read_bytes())
    with pytest.raises(BundleError, match="not the bundle that was registered as version 1"):
        registry.fetch(platform, "1")
    assert list(Workspace(platform.root).models.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda d: (d / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda d: (d / "bundle.json").write_text("{"), "bundle.json is missing or damaged"),
        (lambda d: (d / "bundle.json").unlink(), "bundle.json is missing or damaged"),
        (lambda d: (d / "bundle.json").write_text(json.dumps({"files": {"../x": "0"}})), "outside the bundle"),
    ],
)
def test_damage_is_named(tmp_path, harm, says):
    made = bundle(tmp_path / "made")
    registry.verify(made)
    harm(made)
    with pytest.raises(BundleError, match=says):
        registry.load_policy(made)


def test_a_run_that_was_begun_but_never_noted_is_gone_on_with_in_its_turn(platform, monkeypatch):
    from mlflow.exceptions import MlflowException

    def gone(*_arguments, **_named):
        raise MlflowException("the server died")

    with monkeypatch.context() as away:
        away.setattr(type(registry._client(platform)), "log_batch", gone)
        with pytest.raises(WorkspaceError, match="starting a run failed"), registry.start_run(platform, "retrain", {"epochs": 3}, {"turn": "a"}):
            pass
    ids = []
    for turn in ("a", "b"):
        with registry.start_run(platform, "retrain", {"epochs": 3}, {"turn": turn}) as run:
            ids.append(run.id)
    client = registry._client(platform)
    found = {run.data.tags["turn"]: run for run in registry._runs(platform, client)}
    assert {turn: run.info.run_id for turn, run in found.items()} == dict(zip("ab", ids, strict=True))
    assert len(registry._runs(platform, client)) == 2
    assert [(run.info.status, run.data.params) for run in found.values()] == [("FINISHED", {"epochs": "3"})] * 2


def test_names_of_models(platform):
    (platform.root / "fastq.yaml").write_text(json.dumps(TREE))
    with registry.start_run(platform, "a run", {}) as run:
        pass
    version = registry.register(platform, run.id, bundle(platform.root / "made", feature_fingerprint="other"))
    for uri in ("models:arena", "models:/arena", "models:/arena@", "models:/a/b/c"):
        with pytest.raises(RequestError, match="expected models:/"):
            registry.load_policy(uri, platform.root)
    with pytest.raises(UnknownPlayerError, match="models:/arena@champion"):
        registry.load_policy("models:/shop@champion", platform.root)
    with pytest.raises(UnknownPlayerError, match="aliases challenger"):
        registry.load_policy("models:/arena@champion", platform.root)
    with pytest.raises(ConfigurationError, match=r"fastq\.yaml"):
        registry.load_policy("models:/arena/1", platform.root / "elsewhere")
    with pytest.raises(BundleError, match="made for other features"):
        registry.load_policy(f"models:/arena/{version}", platform.root)
    assert registry.verify(registry.fetch(platform, version))["features"] != features.fingerprint(platform)


def test_processes_that_begin_at_once_share_one_store(tmp_path):
    platform = platform_from_tree(dict(TREE), tmp_path, "fastq.yaml")
    code = (
        "import sys; from pathlib import Path; from fastq import registry; from fastq.platform import load_platform\n"
        "p = load_platform(sys.argv[1])\nwith registry.start_run(p, 'a run', {}) as run: run.log({'loss': 1.0})"
    )
    (platform.root / "fastq.yaml").write_text(json.dumps(TREE))
    children = [subprocess.Popen([sys.executable, "-c", code, str(platform.root)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(child.communicate()[1], child.returncode) for child in children]
    assert [code for _, code in ended] == [0, 0, 0], ended
    client = registry._client(platform)
    (experiment,) = [e for e in client.search_experiments() if e.name == "arena"]
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_a_server_that_is_gone_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    platform = platform_from_tree(TREE | {"services": {"mlflow": "http://user:secret@127.0.0.1:9/"}}, tmp_path, "fastq.yaml")
    with pytest.raises(ConfigurationError, match=r"services\.mlflow: 127\.0\.0\.1:9/ does not answer") as said:
        registry.models(platform)
    assert "secret" not in str(said.value)


def test_importing_loads_no_mlflow():
    code = "import fastq.registry, sys; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, env=os.environ).returncode == 0
