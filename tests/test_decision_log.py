"""The decision log: what was acknowledged is there, whatever happens after; what was not stored is said."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from fastq.platform import Platform, platform_from_tree
from fastq.records import read_served
from serving.decision_log import Decision, DecisionLog, Event, KeyReused, LogUnavailable, OutcomeConflict, Reported, Request, UnknownDecisions, now_us, open_log

TREE = {
    "platform": "arena",
    "logs": {"decisions": "logs/*.parquet"},
    "state": {"period": "1d", "window": 3},
    "policies": ["retain"],
    "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}, "gift": {"low": 0, "high": 40}}},
    "objectives": {"joy": {}, "cost": {"weight": -1}},
}


@pytest.fixture
def platform(tmp_path: Path) -> Platform:
    return platform_from_tree(json.loads(json.dumps(TREE)), tmp_path, "test")


@pytest.fixture
def log(platform: Platform) -> DecisionLog:
    made = open_log(platform)
    yield made
    made.close()


def decision(decision_id: str, player_id: str = "p1", at: int | None = None, goal: float = 5.0) -> Decision:
    return Decision(decision_id, player_id, at or now_us(), "fastq", 0.25, "3", {"goal": goal, "gift": 2.0}, {"value": 1.5}, b"state")


def test_an_acknowledged_decision_is_read_back_whole_by_another_process(platform: Platform, log: DecisionLog) -> None:
    kept = decision("d1")
    assert log.append([kept]).result(10) == [kept]
    other = open_log(platform)
    assert other.path != log.path  # two writers never share a file
    assert other.find("d1") == kept
    assert other.find("never") is None
    other.close()


def test_rows_are_those_that_the_next_ingest_reads(platform: Platform, log: DecisionLog) -> None:
    at = 1_700_000_000_000_000
    log.append([decision("d1", at=at), decision("d2", at=at), decision("d3", at=at)]).result(10)
    log.report(
        [Reported("d1", {"joy": 0.5}), Reported("d2", {"joy": 1.0}, executed=False), Reported("d3", {"joy": 2.0}, executed={"goal": 9.0, "gift": 2.0})]
    ).result(10)
    log.report([Reported("d1", {"joy": 0.75})], correct=True).result(10)
    with sqlite3.connect(log.path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    served, instead, other = read_served(platform).sort("decision_id").iter_rows(named=True)
    assert (served["player_id"], served["policy"], served["propensity"], served["model_version"], served["goal"], served["gift"]) == (
        "p1",
        "fastq",
        0.25,
        "3",
        5.0,
        2.0,
    )
    assert (served["joy"], served["cost"]) == (0.75, None)
    assert served["decided_at"] == datetime.fromtimestamp(at / 1e6, UTC)
    assert instead["joy"] is None  # what was not carried out teaches nothing
    assert (other["goal"], other["propensity"], other["joy"]) == (9.0, None, 2.0)


def test_what_queues_up_behind_a_commit_is_one_commit(log: DecisionLog) -> None:
    """64 callers at once need far fewer transactions than rows: the WAL's frames tell how many commits there were."""
    barrier = threading.Barrier(64)
    transactions: list[int] = []
    log._database.set_trace_callback(lambda statement: transactions.append(1) if statement.startswith("COMMIT") else None)

    def call(number: int) -> None:
        barrier.wait()
        for k in range(10):
            log.append([decision(f"d{number}-{k}")]).result(30)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.counts()["decisions"] == 640
    assert len(transactions) < 320


def test_one_decision_that_cannot_be_stored_takes_no_other_with_it(log: DecisionLog) -> None:
    log.append([decision("d0")]).result(10)
    inside, go = threading.Event(), threading.Event()
    held = log._submit(lambda _: (inside.set(), go.wait(10)))
    assert inside.wait(10)
    futures = [log.append([decision(name), decision(f"{name} too")]) for name in ("d1", "d0", "d2")]  # all of them wait for one commit
    go.set()
    held.result(10)
    assert [d.decision_id for d in futures[0].result(10) + futures[2].result(10)] == ["d1", "d1 too", "d2", "d2 too"]
    with pytest.raises(sqlite3.IntegrityError):
        futures[1].result(10)
    assert log.find("d0 too") is None
    assert log.counts()["decisions"] == 5


def test_the_wal_is_begun_anew_while_decisions_go_on(log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def grown(commits: int) -> int:
        for number in range(commits):
            log.append([decision(f"{log.counts()['decisions']} {number}", f"p{number}")]).result(10)
            if log._copier is not None:
                log._copier.join(10)
        return Path(f"{log.path}-wal").stat().st_size

    monkeypatch.setattr("serving.decision_log.CHECKPOINT", 10)
    most = grown(30)
    assert grown(300) < 2 * most
    assert log.counts()["decisions"] == 330


def test_kill_minus_nine_loses_nothing_that_was_acknowledged(platform: Platform, tmp_path: Path) -> None:
    program = f"""
import json, sys
from pathlib import Path
from fastq.platform import platform_from_tree
from serving.decision_log import Decision, now_us, open_log
log = open_log(platform_from_tree(json.loads({json.dumps(json.dumps(TREE))}), Path({str(tmp_path)!r}), "test"))
for number in range(100_000):
    log.append([Decision(f"d{{number}}", "p1", now_us(), "fastq", None, "1", {{"goal": 2.0, "gift": 0.0}}, {{}}, b"x" * 500)]).result(10)
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(200)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.read().splitlines()
    last = max(int(line) for line in acknowledged if line.strip().isdigit())
    log = open_log(platform)
    assert log.path.name == "0000.db"  # the dead process's lock died with it
    assert log.counts()["decisions"] in (last + 1, last + 2)  # the one under way may be there too
    log.append([decision("after")]).result(10)
    log.close()


def test_a_full_disk_refuses_and_stores_nothing_and_goes_on_when_there_is_room(log: DecisionLog) -> None:
    log.append([decision("before")]).result(10)
    pages = log._database.execute("PRAGMA page_count").fetchone()[0]
    log._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite itself then answers SQLITE_FULL
    big = [Decision(f"d{k}", "p1", now_us(), "fastq", None, "1", {"goal": 2.0, "gift": 0.0}, {}, os.urandom(4000)) for k in range(20)]
    with pytest.raises(LogUnavailable, match=r"full.*nothing of this request was stored"):
        log.append(big).result(10)
    assert log.counts()["decisions"] == 1
    log.append(big).result(10)
    assert log.counts()["decisions"] == 21


def test_a_closed_log_says_so(platform: Platform) -> None:
    log = open_log(platform)
    log.close()
    with pytest.raises(LogUnavailable, match="closed"):
        log.append([decision("d1")])


def test_the_same_idempotency_key_gives_the_same_decisions_again(platform: Platform, log: DecisionLog) -> None:
    first, asked = [decision("d1"), decision("d2", "p2")], Request("key:abc", "digest")
    assert log.append(first, asked).result(10) == first
    again = log.append([decision("d3"), decision("d4", "p2")], asked).result(10)
    assert [d.decision_id for d in again] == ["d1", "d2"]
    assert log.counts()["decisions"] == 2
    with pytest.raises(KeyReused):
        log.append([decision("d5")], Request("key:abc", "another")).result(10)
    other = open_log(platform)  # another replica knows the key too
    assert [d.decision_id for d in other.append([decision("d6")], asked).result(10)] == ["d1", "d2"]
    other.close()


def test_two_at_once_with_one_key_make_one_decision(log: DecisionLog) -> None:
    futures = [log.append([decision(f"d{k}")], Request("key:abc", "digest")) for k in range(50)]
    assert {f.result(10)[0].decision_id for f in futures} == {"d0"}
    assert log.counts()["decisions"] == 1


def test_outcomes_come_in_parts_and_repeats_change_nothing(log: DecisionLog) -> None:
    log.append([decision("d1"), decision("d2")]).result(10)
    assert log.report([Reported("d1", {"joy": 0.7}), Reported("d2", {"joy": 0.1})]).result(10) == (2, 0)
    assert log.report([Reported("d1", {"joy": 0.7})]).result(10) == (0, 1)
    assert log.report([Reported("d1", {"joy": 0.7, "cost": 0.2})]).result(10) == (1, 0)
    assert log.report([Reported("d2", {"cost": 0.3}), Reported("d2", {"cost": 0.3})]).result(10) == (1, 1)
    known = log.known(["d1", "d2"])
    assert known["d1"].values == {"joy": 0.7, "cost": 0.2}
    assert known["d2"].values == {"joy": 0.1, "cost": 0.3}


def test_an_unknown_id_or_another_value_stores_nothing(log: DecisionLog) -> None:
    log.append([decision("d1"), decision("d2")]).result(10)
    with pytest.raises(UnknownDecisions, match="never") as unknown:
        log.report([Reported("d1", {"joy": 0.7}), Reported("never", {"joy": 1.0})]).result(10)
    assert unknown.value.ids == ["never"]
    log.report([Reported("d1", {"joy": 0.7})]).result(10)
    with pytest.raises(OutcomeConflict, match="d1: joy"):
        log.report([Reported("d2", {"joy": 0.1}), Reported("d1", {"joy": 0.8})]).result(10)
    assert log.known(["d2"])["d2"].values == {}
    assert log.report([Reported("d1", {"joy": 0.8})], correct=True).result(10) == (1, 0)
    assert log.known(["d1"])["d1"].values == {"joy": 0.8}


def test_a_correction_through_another_replica_stands(platform: Platform, log: DecisionLog) -> None:
    log.append([decision("d1")]).result(10)
    log.report([Reported("d1", {"joy": 0.7})]).result(10)
    other = open_log(platform)
    with pytest.raises(OutcomeConflict):
        other.report([Reported("d1", {"joy": 0.9})]).result(10)
    time.sleep(0.001)
    other.report([Reported("d1", {"joy": 0.9})], correct=True).result(10)
    assert log.known(["d1"])["d1"].values == {"joy": 0.9}
    assert log.report([Reported("d1", {"joy": 0.9})]).result(10) == (0, 1)
    other.close()


def test_what_was_executed_instead(log: DecisionLog) -> None:
    log.append([decision("d1"), decision("d2"), decision("d3")]).result(10)
    log.report([Reported("d1", {}, executed=False), Reported("d2", {"joy": 1.0}, executed={"goal": 3.0, "gift": 0.0})]).result(10)
    recent = log.recent(["p1"], 0)
    assert {past.decision_id: past.action["goal"] for past in recent} == {"d2": 3.0, "d3": 5.0}
    assert log.report([Reported("d1", {}, executed=False)]).result(10) == (0, 1)
    with pytest.raises(OutcomeConflict, match="executed"):
        log.report([Reported("d1", {}, executed={"goal": 3.0, "gift": 0.0})]).result(10)


def test_recent_decisions_of_some_players_over_files_and_batches(platform: Platform, log: DecisionLog) -> None:
    day, now = 86_400_000_000, now_us()
    log.append([decision("old", "p1", now - 9 * day), decision("a", "p1", now - 2 * day), decision("b", "p2", now - day), decision("c", "p3", now)]).result(10)
    other = open_log(platform)
    other.append([decision("e", "p1", now - day, goal=7.0)]).result(10)
    other.report([Reported("a", {"cost": 0.4})]).result(10)
    other.close()
    batch(log.path.parent / "batch.parquet", now)
    recent = log.recent(["p1", "p2", "nobody"], now - 5 * day)
    assert [(past.decision_id, past.action["goal"], past.values.get("cost")) for past in recent if past.player_id == "p1"] == [
        ("a", 5.0, 0.4),
        ("e", 7.0, None),
        ("x1", 9.0, None),
    ]
    assert [past.decision_id for past in recent if past.player_id == "p2"] == ["b"]
    assert [past.decided_at for past in recent] == sorted(past.decided_at for past in recent)
    assert log.recent(["nobody"], 0) == []


def batch(path: Path, at: int) -> None:
    moment = datetime.fromtimestamp(at / 1e6, UTC)
    pl.DataFrame(
        {
            "decision_id": ["x1", "x2"],
            "player_id": ["p1", "p9"],
            "decided_at": [moment, moment],
            "policy": "fastq",
            "propensity": [0.5, None],
            "model_version": "3",
            "goal": [9.0, 2.0],
            "gift": [0.0, 1.0],
            "joy": None,
            "cost": None,
        },
        schema_overrides={"decided_at": pl.Datetime("us", "UTC"), "joy": pl.Float64, "cost": pl.Float64},
    ).write_parquet(path)


def test_rows_of_a_batch_are_decisions_too(log: DecisionLog) -> None:
    batch(log.path.parent / "batch.parquet", now_us())
    found = log.find("x1")
    assert found is not None
    assert (found.player_id, found.action, found.propensity, found.model_version) == ("p1", {"goal": 9.0, "gift": 0.0}, 0.5, "3")
    assert log.report([Reported("x2", {"joy": 1.0})]).result(10) == (1, 0)
    assert log.report([Reported("x2", {"joy": 1.0})]).result(10) == (0, 1)


def test_events_are_kept_once_and_wait_until_the_online_store_has_them(log: DecisionLog) -> None:
    events = [Event("p1", 1_000, {"rounds": 2.0}), Event("p1", 2_000, {"rounds": 1.0})]
    assert log.record_activity(events).result(10) == (2, 0)
    assert log.record_activity([*events, Event("p2", 1_000, {"rounds": 2.0})]).result(10) == (1, 2)
    waiting = log.unapplied()
    assert [e for _, e in waiting] == [*events, Event("p2", 1_000, {"rounds": 2.0})]
    log.applied([k for k, _ in waiting[:2]]).result(10)
    assert [e.player_id for _, e in log.unapplied()] == ["p2"]


def test_the_probe_really_writes(log: DecisionLog) -> None:
    log.probe().result(10)
    log._database.execute("PRAGMA query_only = ON")
    with pytest.raises(LogUnavailable):
        log.probe().result(10)


# ---- several servers of one workspace ------------------------------------------------------------------------------------------
WRITER = """
import json, sys
from pathlib import Path
from fastq.platform import platform_from_tree
from serving.decision_log import Decision, Event, OutcomeConflict, Reported, Request, now_us, open_log

name, root = sys.argv[1:]
platform = platform_from_tree(json.loads(TREE), Path(root), "test")
log = open_log(platform)

def decision(number):
    return Decision(f"{name}-{number}", "p1", now_us(), "fastq", 0.25, "3", {"goal": 5.0, "gift": 2.0}, {})

def said(number):
    try:
        return log.report([Reported(f"d{number}", {"cost": float(len(name) + number)})]).result(30)[0]
    except OutcomeConflict:
        return "conflict"

def say(what):
    print(json.dumps(what), flush=True)

def each(number, act):
    order = range(number) if name == "one" else range(number)[::-1]  # so that each is the first somewhere
    return [found for _, found in sorted((i, act(i)) for i in order)]

say(log.path.name)
for line in sys.stdin:
    what, number = json.loads(line)
    if what == "keys":
        say(each(number, lambda i: log.append([decision(i)], Request(f"key:{i}", "digest")).result(30)[0].decision_id))
    elif what == "events":
        say(each(number, lambda i: log.record_activity([Event("p1", 1_000 + i, {"joy": 1.0})]).result(30)[0]))
    elif what == "outcomes":
        say(each(number, lambda i: log.report([Reported(f"d{i}", {"joy": 1.0})]).result(30)[0]))
    elif what == "contradictions":
        say(each(number, said))
    elif what == "take":
        say(log.turns.take([str(number), "another"]))
    elif what == "give":
        say(log.turns.give([str(number), "another"]))
"""


class Writer:
    """A server's log in a process of its own: `ask` begins something there, `answer` waits for what came of it."""

    def __init__(self, platform: Platform, name: str) -> None:
        program = WRITER.replace("TREE", repr(json.dumps(TREE)), 1)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, name, str(platform.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        self.file = self.answer()

    def ask(self, what: str, number: int) -> None:
        print(json.dumps([what, number]), file=self.process.stdin, flush=True)

    def answer(self) -> object:
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def writers(platform: Platform) -> list[Writer]:
    both = [Writer(platform, name) for name in ("one", "other")]
    yield both
    for writer in both:
        writer.process.kill()
        writer.process.communicate()


def test_what_must_happen_once_happens_once_whichever_server_hears_of_it(platform: Platform, log: DecisionLog, writers: list[Writer]) -> None:
    """The same keys, events and outcomes at both at the same time: as a caller brings them again who got no answer in time."""
    n = 150
    assert {log.path.name, *(writer.file for writer in writers)} == {"0000.db", "0001.db", "0002.db"}
    log.append([decision(f"d{i}") for i in range(n)]).result(10)

    def both(what: str) -> list[list]:
        for writer in writers:
            writer.ask(what, n)
        return [writer.answer() for writer in writers]

    one, other = both("keys")
    assert one == other
    assert 0 < sum(name.startswith("one-") for name in one) < n, "only one of them wrote, so nothing was tried"
    assert log.counts()["decisions"] == 2 * n
    for what, table in (("events", "activity"), ("outcomes", "outcomes")):
        one, other = both(what)
        assert [a + b for a, b in zip(one, other, strict=True)] == [1] * n
        assert 0 < sum(one) < n
        assert log.counts()[table] == n
    one, other = both("contradictions")
    assert all(sorted(map(str, pair)) == ["1", "conflict"] for pair in zip(one, other, strict=True))
    kept = log.known([f"d{i}" for i in range(n)])
    assert [kept[f"d{i}"].values["cost"] for i in range(n)] == [(len("one") if first == 1 else len("other")) + i for i, first in enumerate(one)]


def test_a_player_is_one_servers_at_a_time_until_it_gives_them_back_or_dies(writers: list[Writer]) -> None:
    one, other = writers

    def ask(writer: Writer, what: str, number: int) -> object:
        writer.ask(what, number)
        return writer.answer()

    assert ask(one, "take", 1) is True
    assert ask(other, "take", 1) is False
    assert ask(other, "take", 2) is False  # "another" is not free, and 2 was not kept
    ask(one, "give", 1)
    assert ask(one, "take", 2) is True
    assert ask(other, "take", 2) is False
    one.process.kill()
    one.process.wait(10)
    assert ask(other, "take", 2) is True


def test_a_correction_through_another_server_stands_though_its_clock_is_behind(platform: Platform, log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import decision_log

    log.append([decision("d1")]).result(10)
    log.report([Reported("d1", {"joy": 1.0}, executed=False)]).result(10)
    other = open_log(platform)
    try:
        monkeypatch.setattr(decision_log, "now_us", lambda: time.time_ns() // 1000 - 3_600_000_000)
        other.report([Reported("d1", {"joy": 2.0}, executed={"goal": 9.0, "gift": 2.0})], correct=True).result(10)
        for reader in (log, other):
            known = reader.known(["d1"])["d1"]
            assert (known.values["joy"], known.executed) == (2.0, {"goal": 9.0, "gift": 2.0})
        assert read_served(platform)["joy"].to_list() == [2.0]
    finally:
        other.close()


def test_a_server_that_hangs_over_its_turn_hangs_no_decision_of_another(platform: Platform, log: DecisionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import decision_log

    monkeypatch.setattr(decision_log, "PATIENCE", 0.3)
    log.append([decision("d1")]).result(10)
    hung = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX, 1, 0); print(flush=True); sys.stdin.read()"
    lock = str(log.path.with_name("replicas.lock"))
    with subprocess.Popen([sys.executable, "-c", hung, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(LogUnavailable, match="another server"):
            log.report([Reported("d1", {"joy": 1.0})]).result(10)
        assert log.append([decision("d2")]).result(10)
        process.stdin.close()
    assert log.report([Reported("d1", {"joy": 1.0})]).result(10) == (1, 0)


def test_others_never_see_a_file_without_its_tables(platform: Platform, log: DecisionLog) -> None:
    """A server that starts makes its file while others read whatever file they find."""
    failed: list[Exception] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                log.recent(["p1"], 0)
            except Exception as error:  # noqa: BLE001 - whatever it is
                failed.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    others = [open_log(platform) for _ in range(30)]
    stop.set()
    reader.join()
    for other in others:
        other.close()
    assert not failed, failed
