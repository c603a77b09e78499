"""The flows with every real component: Prefect's temporary server, Great Expectations, Feast, Lightning, MLflow, in a temporary workspace."""

import html
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import psycopg
import pytest
import redis
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from prefect.concurrency._asyncio import ConcurrencySlotAcquisitionError
from prefect.task_engine import TaskRunTimeoutError

from fastq import assignment, features, learner, records, registry
from fastq.errors import ConfigurationError, GateRefused, UnknownPlayerError, WorkspaceError
from fastq.platform import load_platform
from fastq.workspace import Workspace
from feature_repo import store
from pipelines import evaluate, ingest, recommend_all, retrain, train, turn, validate
from serving import online

PLAYERS, DAYS = 80, 20
TREE = {
    "platform": "shop",
    "logs": {"decisions": "decisions.parquet", "activity": "activity.parquet", "players": "players.csv"},
    "state": {"period": "1d", "window": 5, "measures": {"rounds": {"aggregate": "sum", "min": 0}}, "attributes": {"channel": {"kind": "categorical"}}},
    "policies": ["careful", "bold"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}}},
    "objectives": {"joy": {}, "cost": {"weight": -1.0}},
    "training": {"epochs": 2},
    "serving": {"exclude": "excluded.csv"},
}


def write_logs(root, players=PLAYERS, days=DAYS, seed=0):
    """Two policies with known densities; joy is highest where the goal is near the player's taste."""
    rng = np.random.default_rng(seed)
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    taste = rng.uniform(4, 10, players)
    decisions, activity = [], []
    for day in range(days):
        rounds = rng.poisson(taste)
        bold = rng.random(players) < 0.5
        mean = np.where(bold, 1.3, 0.8) * taste
        goal = np.clip(rng.normal(mean, 1.0), 1.001, 14.999)
        density = np.exp(-((goal - mean) ** 2) / 2) / np.sqrt(2 * np.pi)
        at = midnight - (days - day) * timedelta(days=1)
        for p in range(players):
            about = {"decision_id": f"d{day}-{p}", "player_id": f"p{p}", "decided_at": at + timedelta(hours=6, minutes=p)}
            known = {"joy": float(np.exp(-((goal[p] - taste[p]) ** 2) / 8)), "cost": 0.02 * goal[p]}
            decisions.append(about | {"policy": "bold" if bold[p] else "careful", "propensity": density[p], "assignment": 0.5, "goal": goal[p]} | known)
            activity.append({"player_id": f"p{p}", "occurred_at": at + timedelta(hours=3), "rounds": float(rounds[p])})
    pl.DataFrame(decisions).write_parquet(root / "decisions.parquet")
    pl.DataFrame(activity).write_parquet(root / "activity.parquet")
    pl.DataFrame({"player_id": [f"p{p}" for p in range(players)], "channel": ["ads"] * players}).write_csv(root / "players.csv")
    pl.DataFrame({"player_id": ["p3", "p4"]}).write_csv(root / "excluded.csv")
    (root / "fastq.yaml").write_text(yaml.safe_dump(TREE))
    return load_platform(root)


@pytest.fixture
def platform(tmp_path):
    return write_logs(tmp_path)


def told():
    """A progress callback and what it was told."""
    seen = []
    return seen, lambda *said: seen.append(said)


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A workspace after one whole turn that was stopped twice on its way: in the training and before the registration."""
    torch.set_num_threads(1)
    platform = write_logs(tmp_path_factory.mktemp("shop"))
    workspace = Workspace(platform.root)
    read, trained, begun = [], [], datetime.now(UTC)

    def stopping(stage, done, total, metrics):
        if stage == "value and actor" and done == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        whole = records.judge, learner.train
        patch.setattr(records, "judge", lambda *a, **k: read.append(1) or whole[0](*a, **k))
        patch.setattr(learner, "train", lambda *a, **k: trained.append(1) or whole[1](*a, **k))
        with pytest.raises(KeyboardInterrupt):
            retrain.retrain(platform, on_progress=stopping)
        stopped = sorted(p.name for p in (workspace.runs / json.loads((workspace.runs / "turn.json").read_text())["id"]).iterdir())
        patch.setattr(registry, "register", lambda *a, **k: (_ for _ in ()).throw(WorkspaceError("the disk is full")))
        with pytest.raises(WorkspaceError, match="disk is full"):
            retrain.retrain(platform, resume=True)
        patch.undo()
        patch.setattr(records, "judge", lambda *a, **k: read.append(1) or whole[0](*a, **k))
        patch.setattr(learner, "train", lambda *a, **k: trained.append(1) or whole[1](*a, **k))
        seen, on_progress = told()
        document = retrain.retrain(platform, resume=True, on_progress=on_progress)
    return platform, document, {"read": len(read), "trained": len(trained), "stopped": stopped, "seen": seen, "begun": begun}


def test_a_stopped_turn_goes_on_where_it_was(loop):
    platform, _, history = loop
    assert history["read"] == 1  # the logs were read once, in the first of three calls
    assert "learner.safetensors" in history["stopped"]
    assert history["trained"] == 2  # stopped in the first, finished in the second, not called in the third
    assert list(Workspace(platform.root).runs.iterdir()) == []
    client = registry._client(platform)
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert run.info.status == "FINISHED"


def test_what_was_trained_is_registered_with_its_evaluation(loop):
    platform, document, _ = loop
    assert (document["model"], document["version"]) == ("shop", "1")
    assert document["promoted"] or document["reasons"]
    (model,) = registry.models(platform)
    assert model["aliases"] == (["champion"] if document["promoted"] else ["challenger"])
    assert model["verdict"].startswith("passed" if document["promoted"] else "refused")
    details = registry.verify(registry.fetch(platform, "1"))["details"]
    assert details["evaluation"]["promoted"] == document["promoted"]
    client = registry._client(platform)
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert run.data.params["decisions"] == str(PLAYERS * DAYS)
    assert any(name.startswith("value and actor/") for name in run.data.metrics)
    told = {name.split("/", 1)[1] for name in run.data.metrics if name.startswith("diagnostics/")}
    assert {"value/joy", "returned/joy", "value/cost", "twin_disagreement", "balance/probe", "balance/chance"} <= told
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"bundle", "evaluation.html", "evaluation.json", "pictures"}
    assert {"pictures/estimates.png", "pictures/representation.png"} <= {a.path for a in client.list_artifacts(run.info.run_id, "pictures")}


def test_prefect_kept_the_states_of_the_tasks(loop):
    """In Prefect's own database, which all tests share: what ran in these three turns, what came back from its result, what failed and why."""
    from prefect.settings import get_current_settings

    since = loop[2]["begun"].strftime("%Y-%m-%d %H:%M:%S.%f")

    with sqlite3.connect(Path(get_current_settings().home) / "prefect.db") as database:
        states = database.execute(
            "SELECT name, state_name FROM task_run WHERE created >= ? AND flow_run_id IN (SELECT id FROM flow_run WHERE created >= ?) ORDER BY created",
            (since, since),
        ).fetchall()
    by_task = {name: [state for other, state in states if other.rsplit("-", 1)[0] == name] for name in ("ingest", "train", "register")}
    assert by_task["ingest"][:3] == ["Completed", "Cached", "Cached"], states
    assert "Cached" in by_task["train"], states
    assert by_task["register"][:2] == ["Failed", "Completed"], states


def test_online_states_are_those_of_the_logs(loop):
    platform, _, _ = loop
    read = records.read_tables(platform)
    frame = store.read_online(store.open_store(platform), ["p7", "p70"])
    wanted = features.online_frame(platform, read, frame["event_timestamp"][0] + timedelta(seconds=1)).filter(pl.col("player_id").is_in(["p7", "p70"]))
    wanted = wanted.sort("player_id", descending=True)
    got = frame.sort("player_id", descending=True)
    for name in ("window", "counts", "decided"):
        np.testing.assert_array_equal(np.array(got[name].to_list()), np.array(wanted[name].to_list()))
    assert got.select("period", "policy", "seen_at", "channel").equals(wanted.select("period", "policy", "seen_at", "channel"))


def test_the_gate_is_told_once_per_turn_and_its_report_is_kept(loop):
    platform, document, _ = loop
    (attempt,) = registry.attempts(platform)  # although the turn was stopped and resumed twice
    assert attempt["promoted"] == document["promoted"]
    assert attempt["alpha"] == platform.training.alpha
    reports = Workspace(platform.root).reports
    tree = json.loads((reports / "evaluation-1.json").read_text())
    assert tree["promoted"] == document["promoted"]
    page = (reports / "evaluation-1.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "shop version 1" in page
    assert "<svg" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\((?!#)""", page), "a page that loads something from elsewhere"
    for words in (*tree["reasons"], "Cross-checks", "double reinforcement", "careful", "bold"):
        assert html.escape(words) in page.replace("&#39;", "&#x27;"), words


def test_evaluate_estimates_each_policy(loop):
    platform, _, _ = loop
    document = evaluate.evaluate(platform)
    assert (platform.root / document["report"]).exists()
    assert document["version"] == "1"
    assert {row["objective"] for row in document["estimates"]} == {"joy", "cost", None}
    assert {"careful", "bold", "fastq"} <= {row["policy"] for row in document["estimates"]}
    assert all(row["low"] <= row["value"] <= row["high"] for row in document["estimates"])
    with pytest.raises(UnknownPlayerError, match="versions 1"):
        evaluate.evaluate(platform, "9")


def test_everybody_gets_one_logged_recommendation(loop, tmp_path):
    platform, document, _ = loop
    if not document["promoted"]:
        with pytest.raises(GateRefused):
            registry.promote(platform, "1")
        registry.promote(platform, "1", forced=True, reason="a test of what comes after", who="test")
    dry = recommend_all.recommend_all(platform, tmp_path / "dry.csv", dry_run=True)
    assert (dry["players"], dry["logged"], dry["degraded"]) == (PLAYERS - 2, False, 0)
    assert len(records.read_served(platform)) == 0
    assert len(pl.read_csv(tmp_path / "dry.csv")) == PLAYERS - 2

    out = tmp_path / "all.parquet"
    assert recommend_all.recommend_all(platform, out)["logged"]
    batch = pl.read_parquet(out)
    assert set(batch["player_id"]) == {f"p{p}" for p in range(PLAYERS)} - {"p3", "p4"}
    assert batch["decision_id"].n_unique() == len(batch) == PLAYERS - 2
    assert batch["goal"].is_between(1, 15).all()
    assert (batch["propensity"] > 0).all()
    assert batch["model_version"].unique().to_list() == ["1"]
    assert np.isfinite(batch["value"].to_numpy()).all()
    assert batch["joy"].null_count() == len(batch)
    served = records.read_served(platform).sort("decision_id")
    assert served.select("decision_id", "goal", "propensity").equals(batch.sort("decision_id").select("decision_id", "goal", "propensity"))

    again = validate.validate_logs(platform)  # tomorrow's logs are today's answers
    assert again["passed"]
    assert again["accepted"] == PLAYERS * DAYS + len(batch)

    policy, now = registry.load_policy("models:/shop@champion", platform.root), datetime.now(UTC)
    rows = recommend_all.States(platform, now, policy, recommend_all.served_since(platform, now)).read(["p7"])
    assert rows.window[0, -1, 1] == np.float32(batch.filter(pl.col("player_id") == "p7")["goal"].item())  # what was served is in the next state at once
    assert rows.policies == ["fastq"]
    with pytest.raises(ConfigurationError, match="parquet"):
        recommend_all.recommend_all(platform, tmp_path / "all.xlsx")


def test_a_stopped_batch_goes_on_and_says_what_the_endpoint_says(loop, tmp_path, monkeypatch):
    platform, _, _ = loop
    if registry.champion(platform) is None:
        registry.promote(platform, "1", forced=True, reason="a test of what comes after", who="test")
    players = recommend_all.everybody(platform)
    with online.open_service(platform) as service:
        before = {d.player_id: d for d in online.decide(service, [online.Ask(players=tuple(players), explore=False)])[0]}
    monkeypatch.setattr(recommend_all, "PIECE", len(players) // 3)
    monkeypatch.setattr(recommend_all, "AT_ONCE", 1)
    decided = recommend_all.decided

    def stopping(platform, states, plan, policies, some, first):
        if first > 0:
            raise KeyError("pulled out")
        return decided(platform, states, plan, policies, some, first)

    served = len(records.read_served(platform))
    monkeypatch.setattr(recommend_all, "decided", stopping)
    with pytest.raises(KeyError):
        recommend_all.recommend_all(platform, tmp_path / "all.parquet")
    [piece] = Workspace(platform.root).batch.glob("*.parquet")
    ids = pl.read_parquet(piece)["decision_id"].to_list()
    assert len(records.read_served(platform)) == served, "logged before it was whole"
    monkeypatch.setattr(recommend_all, "decided", decided)
    assert recommend_all.recommend_all(platform, tmp_path / "all.parquet")["players"] == len(players)
    batch = pl.read_parquet(tmp_path / "all.parquet")
    assert batch["decision_id"].n_unique() == batch["player_id"].n_unique() == len(players)
    assert set(ids) < set(batch["decision_id"]), "decided a second time"
    assert not Workspace(platform.root).batch.exists()

    with online.open_service(platform) as service:
        for row in batch.head(5).rows(named=True):
            kept = service.log.find(row["decision_id"])
            theirs = before[row["player_id"]]
            ours, other = (features.unpack_states(platform, [d.state]) for d in (kept, theirs))
            np.testing.assert_array_equal(ours.history, other.history)
            np.testing.assert_array_equal(ours.actions, other.actions)
            assert kept.detail["mean"] == pytest.approx(theirs.action, rel=1e-5)
            assert online.replay(service, kept).action[0].tolist() == [row["goal"]]  # bit for bit
            why = online.explain_question(service, online.Question(decision_id=row["decision_id"]))
            assert why["value"] == pytest.approx(row["value"], rel=1e-6)


@pytest.mark.parametrize("where", ["processes", "ray"])
def test_a_batch_is_the_same_wherever_its_pieces_are_decided(loop, tmp_path, monkeypatch, where):
    platform, _, _ = loop
    if registry.champion(platform) is None:
        registry.promote(platform, "1", forced=True, reason="a test of what comes after", who="test")
    root = Path(shutil.copytree(platform.root, tmp_path / "workspace"))
    players = recommend_all.everybody(load_platform(root))
    monkeypatch.setattr(recommend_all, "PIECE", len(players) // 4)
    plan, directory = recommend_all.planned(load_platform(root), str(tmp_path / "all.parquet"), dry_run=False)
    in_threads = recommend_all.decide.fn(str(root), plan, str(directory))
    here = [pl.read_parquet(path) for path in in_threads[0]]
    assert len(here) >= 4

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(recommend_all, "desk_of", lambda *_: pytest.fail("decided in this process"))
    if where == "processes":
        monkeypatch.setattr(recommend_all, "MANY", 2)
        monkeypatch.setattr(recommend_all.os, "cpu_count", lambda: 2)
        found = recommend_all.decide.fn(str(root), plan, str(elsewhere))
    else:
        import ray

        (root / "fastq.yaml").write_text(yaml.safe_dump(TREE | {"services": {"ray": "auto"}}))
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR", log_to_driver=False)
        try:
            found = recommend_all.decide.fn(str(root), plan, str(elsewhere))
        finally:
            ray.shutdown()
    assert found[1] is in_threads[1] is True
    assert [Path(path).name for path in found[0]] == [Path(path).name for path in in_threads[0]]
    for path, frame in zip(found[0], here, strict=True):
        assert pl.read_parquet(path).equals(frame)  # bit for bit, states and all


def test_no_batch_while_fastq_is_paused(loop, tmp_path):
    platform, _, _ = loop
    assignment.pause(platform, who="test")
    try:
        with pytest.raises(GateRefused, match="paused"):
            recommend_all.recommend_all(platform, tmp_path / "all.parquet")
    finally:
        assert assignment.resume(platform, who="test")


def test_without_the_online_store_everybody_is_degraded(loop, tmp_path):
    platform, _, _ = loop
    if registry.champion(platform) is None:
        registry.promote(platform, "1", forced=True, reason="a test of what comes after", who="test")
    online = Workspace(platform.root).feast / "online.db"
    online.rename(online.with_suffix(".away"))
    try:
        found = recommend_all.recommend_all(platform, tmp_path / "all.parquet", dry_run=True)
    finally:
        online.with_suffix(".away").rename(online)
    assert found["players"] == found["degraded"] == PLAYERS - 2


def test_validate_answers_and_keeps_what_it_refused(platform):
    frame = pl.read_parquet(platform.root / "decisions.parquet")
    bad = frame[:1].with_columns(decision_id=pl.lit("bad"), goal=pl.lit(99.0))
    pl.concat([frame, bad]).write_parquet(platform.root / "decisions.parquet")
    seen, on_progress = told()
    document = validate.validate_logs(platform, on_progress)
    assert (document["passed"], document["accepted"], document["quarantined"], document["repeated"]) == (True, PLAYERS * DAYS, 1, 0)
    refused = pl.read_parquet(platform.root / document["quarantine"])
    assert refused["decision_id"].to_list() == ["bad"]
    assert "goal" in refused["reason"][0]
    assert (platform.root / document["report"]).read_text().startswith("<!")
    assert {"rule", "failed", "severity"} <= set(document["rules"][0])
    assert json.loads(json.dumps(document)) == document
    assert seen[-1][1:3] == (1, 1)


def test_a_refused_log_overwrites_nothing(platform, capfd):
    ingest.ingest(platform)
    before = records.read_tables(platform).decisions
    frame = pl.read_parquet(platform.root / "decisions.parquet").with_columns(goal=pl.when(pl.int_range(pl.len()) < 100).then(99.0).otherwise("goal"))
    frame.write_parquet(platform.root / "decisions.parquet")
    for refused in (ingest.ingest, retrain.retrain):
        with pytest.raises(GateRefused, match="decisions") as said:
            refused(platform)
        assert said.value.reasons
    assert records.read_tables(platform).decisions.equals(before)
    assert registry.models(platform) == []
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_stretch_of_the_logs_is_not_held_to_the_rows_of_the_whole(platform):
    since = datetime.now(UTC) - timedelta(days=2)
    said = {}
    for what in (None, since.isoformat()):
        said[what] = ingest.ingest_logs.fn(str(platform.root), "turn", what)
    assert said[since.isoformat()]["accepted"] < PLAYERS * DAYS / 2
    assert not [w for w in said[since.isoformat()]["warnings"] if "part of them is missing" in w]
    pl.read_parquet(platform.root / "decisions.parquet").filter(pl.col("decided_at") > since).write_parquet(platform.root / "decisions.parquet")
    now = ingest.ingest_logs.fn(str(platform.root), "turn", None)
    assert any("decisions: " in warning and "part of them is missing" in warning for warning in now["warnings"])


def test_one_retraining_at_a_time(platform):
    with Workspace(platform.root).lock("retrain"), pytest.raises(WorkspaceError, match="busy"):
        retrain.retrain(platform)


def test_turns(platform):
    first = turn.begin(platform, datetime(2026, 1, 1, tzinfo=UTC))
    assert first.since == "2026-01-01T00:00:00+00:00"
    assert turn.begin(platform, resume=True) == first
    changed = platform.model_copy(update={"policies": ["bold", "careful"]})
    second = turn.begin(changed, resume=True)  # another fastq.yaml: nothing to go on with
    assert second.id != first.id
    assert not first.directory.exists()
    third = turn.begin(changed)
    assert {second.id, third.id} - {second.id}
    turn.forget(Workspace(platform.root))
    assert list(Workspace(platform.root).runs.iterdir()) == []


ASKED = httpx.Request("POST", "http://127.0.0.1:4200/api/flow_runs")


def answered(status):
    return httpx.HTTPStatusError("an answer", request=ASKED, response=httpx.Response(status, request=ASKED))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (sqlite3.OperationalError("locked"), True),
        (psycopg.errors.AdminShutdown("terminating connection"), True),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), True),
        (httpx.ReadError("", request=ASKED), True),
        (answered(500), True),  # a server whose database is away
        (MlflowException("terminating connection", error_code=TEMPORARILY_UNAVAILABLE), True),
        (answered(404), False),
        (MlflowException("no such run"), False),
        (psycopg.errors.UndefinedTable("no such table"), False),
        (GateRefused("logs", ["bad"]), False),
        (ValueError(), False),
    ],
)
def test_only_what_can_heal_is_tried_again(error, expected):
    class State:
        name = "Failed"

        def result(self):
            raise WorkspaceError("wrapped") from error

    assert turn.heals(None, None, State()) is expected


@pytest.mark.parametrize("error", [httpx.ConnectError("refused", request=ASKED), answered(503), httpx.ReadTimeout("", request=ASKED)])
def test_a_prefect_server_that_stays_away_is_one_sentence(error):
    with pytest.raises(WorkspaceError, match=r"Prefect's server .* does not answer .* `fastq retrain --resume`") as said, turn._prefect_answers():
        raise error
    assert turn.may_heal(said.value), "a schedule tries again"


def test_what_prefect_refuses_is_no_server_that_is_away():
    with pytest.raises(httpx.HTTPStatusError), turn._prefect_answers():
        raise answered(422)
    with pytest.raises(TaskRunTimeoutError), turn._prefect_answers():
        raise TaskRunTimeoutError("a step took longer than its limit")
    with pytest.raises(WorkspaceError, match="Prefect's server"), turn._prefect_answers():
        raise ConcurrencySlotAcquisitionError("no slot") from httpx.ConnectError("refused", request=ASKED)


def test_a_step_of_a_turn_outlasts_the_restart_of_a_server(platform):
    """Each of them: what no step heals, the whole turn would die of."""
    for step in (retrain.ingest_logs, retrain.build_features, retrain.train_policy, retrain.evaluate_trained, retrain.register_model, retrain.make_champion):
        made = turn.limited(step, platform)
        assert (made.retry_condition_fn, made.retries) == (turn.heals, len(made.retry_delay_seconds))
        assert sum(made.retry_delay_seconds) >= 60


def test_what_took_longer_than_its_limit_is_not_tried_again():
    class State:
        name = "TimedOut"

        def result(self):
            raise TimeoutError

    assert turn.heals(None, None, State()) is False


def test_progress_without_a_terminal_is_one_line_per_stage(capsys):
    with turn.drawn() as show:
        show("train", 0, 3, {})
        show("train", 1, 3, {"loss": 1.0})
        show("evaluate", 0, 1, {})
    assert capsys.readouterr().err.split() == ["train", "evaluate"]


def test_the_state_of_prefect_stays_in_the_workspace(platform):
    """From a process that imported Prefect before it knew the workspace, and set nothing."""
    code = "import sys; from pipelines import validate; from fastq import load_platform; print(validate.validate_logs(load_platform(sys.argv[1]))['passed'])"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(platform.root / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    (platform.root / "home").mkdir()
    ended = subprocess.run([sys.executable, "-c", code, str(platform.root)], env=env, cwd=platform.root, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
    assert ended.stderr == "reading and judging the logs\n"
    assert (Workspace(platform.root).prefect / "prefect.db").exists()
    assert not list((platform.root / "home").rglob("prefect.db"))
    assert train  # imported with the others: every flow's module loads
