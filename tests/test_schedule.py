"""Retraining by the clock and by drift: which times are kept, what is tried again, what is told to whom."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import psutil
import pytest

from fastq.errors import ConfigurationError, WorkspaceError
from fastq.platform import platform_from_tree
from fastq.workspace import Workspace
from pipelines import deployments, notify, schedule
from pipelines.schedule import clock, due, note
from pipelines.turn import running

TREE = {
    "platform": "shop",
    "logs": {"decisions": "nowhere.parquet"},
    "state": {"period": "1d"},
    "policies": ["a", "b"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 1}}},
    "objectives": {"joy": {}},
}
PROMOTED = {"version": "2", "promoted": True, "reasons": []}
QUIET = {"findings": [], "drift": False}


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "fastq.yaml").write_text(json.dumps(TREE))
    return platform_from_tree(TREE, tmp_path, "a test")


@pytest.fixture
def posted(monkeypatch):
    """What a webhook was sent."""
    seen = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(notify.VARIABLE, f"http://127.0.0.1:{server.server_port}/secret")
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_an_hour_that_is_left_out_or_comes_twice_is_kept_once():
    berlin = clock("30 2 * * *", "Europe/Berlin")
    spring = berlin.next_after(at("2026-03-28T12:00"))
    assert spring == at("2026-03-29T01:00")  # 02:30 is not there; 03:00 summer time is right after
    assert berlin.next_after(spring) == at("2026-03-30T00:30")
    autumn = berlin.next_after(at("2026-10-24T12:00"))
    assert autumn == at("2026-10-25T00:30")
    assert berlin.next_after(autumn) == at("2026-10-26T01:30")  # not again an hour later


@pytest.mark.parametrize("wrong", ["", "0 3 * *", "61 * * * *", "0 0 31 2 *", "soon"])
def test_a_cron_expression_that_says_nothing_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="--cron"):
        clock(wrong)


def test_a_zone_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="--timezone"):
        clock("0 3 * * *", "Europe/Nowhere")


def test_missed_times_are_made_up_for_once_and_a_clock_set_back_is_survived(shop):
    workspace, nightly = Workspace(shop.root), clock("0 3 * * *")
    assert due(workspace, nightly, "0 3 * * *", at("2026-03-05T12:00")) == at("2026-03-06T03:00")  # a new plan owes nothing
    note(workspace, cron="0 3 * * *", zone="UTC", planned="2026-03-02T03:00:00+00:00")
    assert due(workspace, nightly, "0 3 * * *", at("2026-03-02T12:00")) == at("2026-03-03T03:00")
    assert due(workspace, nightly, "0 3 * * *", at("2026-03-05T12:00")) == at("2026-03-05T03:00")  # three were missed, one is made up for
    assert due(workspace, nightly, "0 3 * * *", at("2026-03-02T02:00")) == at("2026-03-03T03:00")  # an hour back: not the same night twice
    assert due(workspace, nightly, "0 3 * * *", at("2025-03-02T02:00")) == at("2025-03-02T03:00")  # a year back: not a year's wait
    assert due(workspace, clock("0 4 * * *"), "0 4 * * *", at("2026-03-05T12:00")) == at("2026-03-06T04:00")


def run(shop, monkeypatch, answers, *, ticks, look=True, back_off=(0.0, 0.0), begun=True):
    """The schedule on a clock that jumps, with prepared answers of its children; returns what it did and said."""
    did, said, now = [], [], [at("2026-03-01T02:59")]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return now[0].astimezone(tz)

    def one_try(_platform, what):
        did.append((what, now[0].strftime("%H:%M")))
        found = answers[what]
        return found.pop(0) if isinstance(found, list) else found

    def until():
        now[0] += timedelta(minutes=1)
        return now[0] >= at("2026-03-01T02:59") + timedelta(minutes=ticks)

    if begun:  # there was a retraining before
        Workspace(shop.root).monitor.mkdir(parents=True, exist_ok=True)
        (Workspace(shop.root).monitor / "reference.json").touch()
    monkeypatch.setattr(schedule, "datetime", Clock)
    monkeypatch.setattr(schedule, "one_try", one_try)
    monkeypatch.setattr(schedule.time, "sleep", lambda _: None)
    schedule.schedule(shop, "0 3 * * *", look=look, say=said.append, until=until, back_off=back_off)
    return did, said


def test_it_retrains_at_its_time_and_looks_each_hour(shop, monkeypatch):
    did, said = run(shop, monkeypatch, {"retrain": PROMOTED, "monitor": QUIET}, ticks=180)
    assert [what for what in did if what[0] == "retrain"] == [("retrain", "03:00")]
    assert 2 <= sum(what == "monitor" for what, _ in did) <= 3
    assert any("version 2 is the champion" in line for line in said)


def test_nobody_looks_before_there_is_anything_to_compare_with(shop, monkeypatch, posted):
    did, _ = run(shop, monkeypatch, {"retrain": {"error": "no logs yet", "heals": False}}, ticks=180, begun=False)
    assert {what for what, _ in did} == {"retrain"}
    assert [body["says"] for body in posted] == ["retrain failed: no logs yet"], "and that it cannot look yet is no failure"
    assert not deployments.monitor.fn(str(shop.root))["drift"]


def test_a_retraining_that_a_finding_asks_for_is_asked_for_again_where_the_server_is_away(shop, monkeypatch):
    asked = []

    def away_at_first(name, **_):
        asked.append(name)
        if len(asked) == 1:
            raise ConnectionError("the server is away")

    Workspace(shop.root).monitor.mkdir(parents=True)
    (Workspace(shop.root).monitor / "reference.json").touch()
    monkeypatch.setattr("prefect.deployments.run_deployment", away_at_first)
    monkeypatch.setattr("pipelines.monitor.monitor", lambda _: {"drift": True})
    with monkeypatch.context() as patch, running(shop):
        patch.setattr(deployments, "start_retraining", deployments.start_retraining.with_options(retry_delay_seconds=0))
        assert deployments.monitor(str(shop.root)) == {"drift": True}
    assert asked == ["fastq retrain/shop-retrain"] * 2


def test_drift_starts_a_retraining(shop, monkeypatch):
    finding = {"findings": [{"says": "minutes a day: 60 times as many"}], "drift": True}
    did, said = run(shop, monkeypatch, {"retrain": PROMOTED, "monitor": [finding, QUIET, QUIET]}, ticks=60)
    assert [what for what, _ in did] == ["retrain", "monitor", "retrain"]
    assert "minutes a day: 60 times as many" in said
    assert not schedule.noted(Workspace(shop.root))["drift"]


def test_a_retraining_for_drift_that_a_stop_prevented_is_made_up_for(shop, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(_platform, what, *_):
        if what == "retrain":
            raise Killed
        return {"findings": [], "drift": True}

    note(Workspace(shop.root), cron="0 3 * * *", zone="UTC", planned="2026-03-01T03:00:00+00:00")
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "work", killed)
        with pytest.raises(Killed):
            run(shop, patch, {}, ticks=60)
    note(Workspace(shop.root), planned="2026-03-01T03:00:00+00:00")
    did, _ = run(shop, monkeypatch, {"retrain": PROMOTED}, ticks=5, look=False)
    assert did == [("retrain", "02:59")]
    did, _ = run(shop, monkeypatch, {"retrain": PROMOTED}, ticks=5, look=False)
    assert did == [], "once"


def test_it_compacts_once_a_week(shop, monkeypatch):
    answers = {"retrain": PROMOTED, "compact": {"states": 3}}
    did, _ = run(shop, monkeypatch, answers, ticks=5, look=False)
    assert [what for what, _ in did] == ["retrain"], "the first week begins"
    note(Workspace(shop.root), compacted="2026-02-22T02:30:00+00:00", planned="2026-03-01T03:00:00+00:00")
    did, _ = run(shop, monkeypatch, answers, ticks=60 * 24, look=False)
    assert did == [("compact", "03:00")], "seven days and a half hour later, once"
    assert schedule.noted(Workspace(shop.root))["compacted"].startswith("2026-03-01")


def test_only_what_can_heal_is_tried_again_and_bad_news_is_posted(shop, monkeypatch, posted):
    gone = {"error": "PostgreSQL went away", "heals": True}
    did, _ = run(shop, monkeypatch, {"retrain": [gone, gone, PROMOTED]}, ticks=5, look=False)
    assert [what for what, _ in did] == ["retrain"] * 3
    assert posted == []
    Workspace(shop.root).state.joinpath("schedule.json").unlink()
    did, _ = run(shop, monkeypatch, {"retrain": [{"error": "no such column", "heals": False}]}, ticks=5, look=False)
    assert [what for what, _ in did] == ["retrain"]
    Workspace(shop.root).state.joinpath("schedule.json").unlink()
    run(shop, monkeypatch, {"retrain": [{"version": "3", "promoted": False, "reasons": ["not shown to be better"]}]}, ticks=5, look=False)
    assert [(body["event"], body["platform"]) for body in posted] == [("failure", "shop"), ("refusal", "shop")]
    assert "no such column" in posted[0]["says"]
    assert posted[1]["detail"] == {"version": "3", "reasons": ["not shown to be better"]}


def test_a_webhook_that_does_not_answer_fails_nothing(shop, monkeypatch):
    monkeypatch.setenv(notify.VARIABLE, "http://127.0.0.1:9/")
    assert not notify.notify(shop, "failure", "something")


def test_a_webhook_that_refuses_is_told_of_without_its_address(shop, posted, monkeypatch, caplog):
    monkeypatch.setattr("httpx.post", lambda *_, **__: httpx.Response(404))
    assert not notify.notify(shop, "failure", "something")
    assert [record.getMessage() for record in caplog.records] == ["the webhook did not take a failure: HTTP 404"] * notify.TRIES


def test_one_schedule_runs_in_a_workspace(shop):
    with Workspace(shop.root).lock("schedule"), pytest.raises(WorkspaceError, match="busy"):
        schedule.schedule(shop, "0 3 * * *", until=lambda: True)


def test_a_child_tells_what_went_wrong(shop):
    """The real child: there are no logs, which does not heal."""
    found = schedule.one_try(shop, "retrain")
    assert "nowhere.parquet" in found["error"]
    assert not found["heals"]


def test_a_child_that_is_killed_may_be_tried_again(shop):
    """The real child, killed as soon as it is there."""

    def kill():
        us = psutil.Process()
        while not (children := [c for c in us.children() if "pipelines.schedule" in c.cmdline()]):
            time.sleep(0.02)
        children[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    found = schedule.one_try(shop, "retrain")
    killer.join()
    assert found == {"error": "its process ended with -9, without a word", "heals": True}
