"""Of the logs only what is new is read, and nobody can tell from the records; what a log must not do between two readings is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from fastq import features, staging, windows
from fastq.errors import LogsError, WorkspaceError
from fastq.forgetting import remember, strike_arrays
from fastq.platform import Platform, platform_from_tree
from fastq.records import Counts, Records, judge, read_records
from fastq.workspace import Workspace

START = datetime.now(UTC).replace(hour=5, minute=0, second=0, microsecond=0) - timedelta(days=9)


def shop(root: Path, **logs: object) -> Platform:
    tree = {
        "platform": "shop",
        "logs": {"decisions": "decisions/*", "activity": "activity/*", **logs},
        "state": {
            "window": 3,
            "churn": 5,
            "measures": {"rounds": {"aggregate": "sum", "min": 0}, "mood": {"aggregate": "last"}, "visits": {"aggregate": "count"}},
        },
        "policies": ["careful", "bold"],
        "action": {"kind": "continuous", "dimensions": {"goal": {"low": 1, "high": 15}}},
        "objectives": {"joy": {}},
    }
    return platform_from_tree(tree, root, "fastq.yaml")


def day(number: int, players: int = 40) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One day's decisions and events; a few events of the day before arrive only now, some rows are bad, and some are delivered again."""
    draw = np.random.default_rng(number)
    at = START + timedelta(days=number)
    moments = [at + timedelta(minutes=int(m)) for m in draw.integers(0, 1000, players)]
    decisions = pl.DataFrame(
        {
            "decision_id": [f"d{number}-{i}" for i in range(players)],
            "player_id": [f"p{i}" for i in range(players)],
            "decided_at": moments,
            "policy": ["careful", "bold"] * (players // 2),
            "propensity": [0.1] * players,
            "goal": draw.uniform(1, 15, players) if number != 2 else [99.0, *draw.uniform(1, 15, players - 1)],
            "joy": draw.normal(size=players),
        }
    )
    n = 5 * players
    late = draw.random(n) < 0.1
    occurred = [at + timedelta(minutes=int(m)) - timedelta(days=int(is_late)) for m, is_late in zip(draw.integers(0, 1400, n), late, strict=True)]
    events = pl.DataFrame(
        {
            "player_id": [f"p{i}" for i in draw.integers(0, players, n)],
            "occurred_at": occurred,
            "recorded_at": [at + timedelta(hours=20) if is_late else None for is_late in late],
            "rounds": [-1.0, *draw.gamma(2, 1, n - 1)],
            "mood": draw.normal(size=n),
            "event": [f"e{number}-{i}" for i in range(n)],
        },
        schema_overrides={"recorded_at": pl.Datetime("us", "UTC")},
    )
    return decisions, pl.concat([events, events.head(3)])


def put(root: Path, number: int) -> None:
    for table, frame in zip(("decisions", "activity"), day(number), strict=True):
        (root / table).mkdir(exist_ok=True)
        frame.write_parquet(root / table / f"{number}.parquet")


def same(one: Records, other: Records) -> None:
    assert one.counts == other.counts
    assert_frame_equal(one.decisions, other.decisions)
    events = [records.activity.lazy().collect().sort("player_id", "occurred_at", maintain_order=True) for records in (one, other)]
    assert_frame_equal(*events)
    assert_frame_equal(one.quarantine, other.quarantine)


def held(records: Records) -> Records:
    """In memory, where it stays when the copy on disk goes."""
    return dataclasses.replace(records, activity=records.activity.collect())


def laid(platform: Platform, records: Records, **how: object) -> windows.Windows:
    return windows.build(platform, records, features.build_rows(platform, records), **how)


def test_what_was_read_once_is_not_read_again_and_nothing_else_is_different(tmp_path: Path) -> None:
    for number in (3, 1, 4, 0, 2):  # out of order: a day that was forgotten comes last
        put(tmp_path, number)
        records = read_records(shop(tmp_path))
    assert records.counts["activity"] == Counts(5 * 199, 5, 5 * 3)
    shutil.copytree(tmp_path / "decisions", tmp_path / "afresh" / "decisions")
    shutil.copytree(tmp_path / "activity", tmp_path / "afresh" / "activity")
    at_once = read_records(shop(tmp_path / "afresh"))
    same(records, at_once)
    assert laid(shop(tmp_path), records).fingerprint() == laid(shop(tmp_path / "afresh"), at_once).fingerprint()

    for path in (tmp_path / "activity").iterdir():  # the same to look at, but whoever reads it finds nothing
        status = path.stat()
        with path.open("r+b") as file:
            file.write(b"\0" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    same(read_records(shop(tmp_path)), records)
    (tmp_path / "activity" / "1.parquet").touch()
    with pytest.raises(LogsError, match=r"activity/1\.parquet: cannot be read as Parquet"):
        read_records(shop(tmp_path))


def test_since_leaves_files_alone_that_say_themselves_that_they_are_older(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path, number)
    whole = held(read_records(shop(tmp_path)))
    since = START + timedelta(days=3)
    expected = read_records(shop(tmp_path), since)
    for number in (0, 1, 2):  # their footers stand, and whoever reads more than those finds nothing
        path = tmp_path / "decisions" / f"{number}.parquet"
        shutil.copy(path, tmp_path / path.name)
        content = path.read_bytes()
        footer = int.from_bytes(content[-8:-4], "little") + 8
        path.write_bytes(b"PAR1" + b"\0" * (len(content) - footer - 4) + content[-footer:])
    shutil.rmtree(tmp_path / ".fastq")
    read = read_records(shop(tmp_path), since)
    assert_frame_equal(read.decisions, expected.decisions)
    assert read.counts == expected.counts
    with pytest.raises(LogsError, match="cannot be read as Parquet"):
        read_records(shop(tmp_path))
    for number in (0, 1, 2):
        shutil.copy(tmp_path / f"{number}.parquet", tmp_path / "decisions" / f"{number}.parquet")
    same(read_records(shop(tmp_path)), whole)  # what was left alone is read when it is wanted


def test_whoever_was_forgotten_never_gets_into_the_copy_and_is_counted(tmp_path: Path) -> None:
    """Nor do the proposals of their decisions, though these name nobody, and in whatever order the files come."""
    workspace, platform = Workspace(tmp_path), shop(tmp_path, proposals="proposals/*")
    (tmp_path / "proposals").mkdir()

    def deliver(number: int) -> None:
        put(tmp_path, number)
        for table, key in (("decisions", "decision_id"), ("activity", "event")):  # Arrow keeps texts of more than 12 bytes apart from their rows
            path = tmp_path / table / f"{number}.parquet"
            long = [pl.format("a player called {}", "player_id").alias("player_id"), pl.format("a thing called {}.", key).alias(key)]
            pl.read_parquet(path).with_columns(long).write_parquet(path)

    def propose(number: int) -> None:
        decisions = pl.read_parquet(tmp_path / "decisions" / f"{number}.parquet")
        decisions.select("decision_id", "policy", "goal").write_parquet(tmp_path / "proposals" / f"{number}.parquet")

    deliver(0)
    deliver(1)
    propose(0)
    before = held(read_records(platform))
    assert remember(workspace, "a player called p7")
    assert staging.strike(workspace) > 0
    read = read_records(platform)
    for table in ("decisions", "proposals"):
        rows = len(getattr(before, table).filter(pl.col("decision_id").is_in(["a thing called d0-7.", "a thing called d1-7."])))
        assert rows
        assert read.counts[table] == Counts(before.counts[table].accepted - rows, before.counts[table].quarantined, before.counts[table].repeated + rows)
        assert read.metrics[f"{table}.player_id.forgotten"] == rows
    events = len(before.activity.filter(pl.col("player_id") == "a player called p7"))
    assert read.counts["activity"].repeated == before.counts["activity"].repeated + events
    assert staging.strike(workspace) == 0  # the copy holds nobody who was forgotten

    deliver(2)  # the proposals come first: nobody knows yet whose they are
    propose(2)
    shutil.move(tmp_path / "decisions" / "2.parquet", tmp_path / "2.parquet")
    assert read_records(platform).counts["proposals"].quarantined == 40
    shutil.move(tmp_path / "2.parquet", tmp_path / "decisions" / "2.parquet")
    read = read_records(platform)
    assert read.metrics["proposals.player_id.forgotten"] == 2
    assert sum(dataclasses.astuple(read.counts["proposals"])) == 80
    kept = b"".join(path.read_bytes() for path in workspace.staged.rglob("*") if path.is_file())
    assert b"a player called p8" in kept
    assert not [trace for trace in (b"called p7", b"d0-7.", b"d1-7.", b"d2-7.") if trace in kept]


def test_players_in_many_parts_make_the_same_windows_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        put(tmp_path, number)
    whole = read_records(shop(tmp_path))
    one = laid(shop(tmp_path), whole)
    assert len(whole.activity.parts) == 1
    whole = held(whole)
    shutil.rmtree(Workspace(tmp_path).staged)
    monkeypatch.setattr(staging, "PART_BYTES", 5_000)
    put(tmp_path, 3)
    split = read_records(shop(tmp_path))
    assert len(split.activity.parts) >= 4
    same(whole, split)
    many = laid(shop(tmp_path), split)
    assert many.fingerprint() == one.fingerprint()
    assert (many.late == one.late).all()
    assert (many.terminated == one.terminated).all()
    assert len(one.late) > 0

    put(tmp_path, 4)  # the log grows into finer parts than those that its first days lie in
    monkeypatch.setattr(staging, "PART_BYTES", 1_500)
    grown = read_records(shop(tmp_path))
    assert len(grown.activity.parts) > len(split.activity.parts)
    grown = held(grown)
    shutil.rmtree(Workspace(tmp_path).staged)
    same(grown, read_records(shop(tmp_path)))


@pytest.mark.parametrize("parts", [(2, 8), (8, 2), (4, 4)])
def test_proposals_find_their_decisions_whatever_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[int, int]) -> None:
    (tmp_path / "proposals").mkdir()
    for number in range(3):
        put(tmp_path, number)
        proposed = pl.read_parquet(tmp_path / "decisions" / f"{number}.parquet").select("decision_id", policy=pl.lit("bold"), goal=pl.lit(3.0))
        stranger = proposed[:1].with_columns(decision_id=pl.lit(f"nobody's {number}"))
        pl.concat([proposed, stranger]).write_parquet(tmp_path / "proposals" / f"{number}.parquet")
    platform = shop(tmp_path, proposals="proposals/*")
    whole = [held(read_records(platform, since)) for since in (None, START + timedelta(days=2))]
    assert len(whole[0].quarantine.filter(table="proposals")) == 4  # the three strangers, and one whose decision was refused
    shutil.rmtree(tmp_path / ".fastq")
    numbers = iter([1, *parts])
    monkeypatch.setattr(staging, "_parts", lambda *_: next(numbers))
    split = [read_records(platform, since) for since in (None, START + timedelta(days=2))]
    for one, other in zip(whole, split, strict=True):
        same(one, other)
        assert_frame_equal(one.proposals, other.proposals)


def test_out_of_memory_s_reach_the_windows_are_the_same_and_leave_no_file(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, number)
    records = read_records(shop(tmp_path))
    here, mapped = laid(shop(tmp_path), records, memory=1 << 30), laid(shop(tmp_path), records, memory=0)
    assert isinstance(mapped.matrix, np.memmap)
    assert not isinstance(here.matrix, np.memmap)
    assert mapped.fingerprint() == here.fingerprint()
    index = np.arange(len(here))[::-3]
    np.testing.assert_array_equal(mapped.raw(index), here.raw(index))
    assert {p.name for p in Workspace(tmp_path).state.iterdir()} <= {"staged", "staged.lock", "format.json"}


def test_a_file_that_changed_or_went_is_noticed(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, number)
    assert read_records(shop(tmp_path)).metrics["activity.files.same"] == 0
    changed = day(1)[1].head(10)
    changed.write_parquet(tmp_path / "activity" / "1.parquet")
    (tmp_path / "activity" / "0.parquet").unlink()
    records = read_records(shop(tmp_path))
    assert records.metrics["activity.files.same"] == 2
    assert "activity/1.parquet has changed since it was last read; all of it was read again; activity/0.parquet is gone" in "".join(records.warnings)
    assert records.counts["activity"] == Counts(199 + 9, 2, 3)
    assert read_records(shop(tmp_path)).metrics["activity.files.same"] == 0


def test_a_column_s_type_is_one_in_all_files_and_at_all_times(tmp_path: Path) -> None:
    put(tmp_path, 0)
    put(tmp_path, 1)
    read_records(shop(tmp_path))
    spoilt = day(2)[1].with_columns(pl.col("rounds").cast(pl.String))
    spoilt.write_parquet(tmp_path / "activity" / "2.parquet")
    with pytest.raises(LogsError, match=r"activity/2\.parquet: column 'rounds' is of type String, but in activity/0\.parquet of type Float64; write it alike"):
        read_records(shop(tmp_path))
    (tmp_path / "activity" / "0.parquet").unlink()
    (tmp_path / "activity" / "1.parquet").unlink()
    with pytest.raises(
        LogsError, match=r"column 'rounds' is of type String, but was of type Float64 when activity/0\.parquet was last read; .* delete .*staged"
    ):
        read_records(shop(tmp_path))
    shutil.rmtree(Workspace(tmp_path).staged / "activity")
    assert read_records(shop(tmp_path)).counts["activity"] == Counts(199, 1, 3)


def test_numbers_of_another_width_are_numbers_and_a_new_column_is_reported(tmp_path: Path) -> None:
    put(tmp_path, 0)
    whole = day(1)[1].with_columns(pl.col("rounds").round().cast(pl.Int32), shoe_size=pl.lit(43))
    whole.write_parquet(tmp_path / "activity" / "1.parquet")
    records = read_records(shop(tmp_path))
    assert "activity: ignored columns that fastq.yaml does not name: event, shoe_size" in records.warnings
    day(2)[1].drop("mood").write_parquet(tmp_path / "activity" / "2.parquet")
    with pytest.raises(LogsError, match=r"activity/2\.parquet: column 'mood' is missing"):
        read_records(shop(tmp_path))


def test_what_is_delivered_again_with_a_new_column_is_a_repeat(tmp_path: Path) -> None:
    """Also as another format. Events that differ in nothing but an ignored column of one delivery stay two."""
    put(tmp_path, 0)
    again = pl.concat([day(0)[1].head(100), day(0)[1].head(1).with_columns(event=pl.lit("another"))])
    again.with_columns(shoe_size=pl.int_range(pl.len())).write_parquet(tmp_path / "activity" / "1.parquet")
    again.head(50).with_columns(pl.col(pl.Datetime).dt.strftime("%Y-%m-%dT%H:%M:%S%.fZ")).write_csv(tmp_path / "activity" / "2.csv")
    first = day(1)[1].filter(pl.col("rounds") > 0).head(1)
    pl.concat([first, first.with_columns(event=pl.lit("beside"))]).with_columns(shoe_size=pl.lit(44)).write_parquet(tmp_path / "activity" / "3.parquet")
    assert read_records(shop(tmp_path)).counts["activity"] == Counts(199 + 2, 1, 3 + 101 + 50)


def test_what_a_killed_reader_left_is_removed_and_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    put(tmp_path, 0)
    records = held(read_records(shop(tmp_path)))
    staged = Workspace(tmp_path).staged / "activity"
    (staged / "left-by-a-kill").mkdir()
    (staged / "state.json").write_text("{")
    same(read_records(shop(tmp_path)), records)
    assert len([p for p in staged.iterdir() if p.is_dir()]) == 1


def test_others_who_read_anew_take_nothing_from_one_who_reads_still(tmp_path: Path) -> None:
    """Rows stay on disk until they are asked for; meanwhile the same log is exported and read again, more than once."""
    put(tmp_path, 0)
    slow = judge(shop(tmp_path))
    for number in (1, 2, 3):
        shutil.rmtree(tmp_path / "decisions")
        shutil.rmtree(tmp_path / "activity")
        put(tmp_path, number)
        read_records(shop(tmp_path))
    assert slow.held("activity").height == 199
    staged = Workspace(tmp_path).staged / "activity"
    assert len([p for p in staged.iterdir() if p.is_dir()]) == 2, "what nobody reads is removed"
    strike_arrays(staged, ["*.arrow"])  # as forgetting does, whoever reads
    with pytest.raises(WorkspaceError, match="a player was forgotten; run the command again"):
        slow.records()
    del slow
    put(tmp_path, 4)
    read_records(shop(tmp_path))
    assert len([p for p in staged.iterdir() if p.is_dir()]) == 1


def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 0)
    read_records(shop(tmp_path))
    before = sorted(str(p) for p in Workspace(tmp_path).staged.rglob("*"))
    put(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pl.LazyFrame, "sink_ipc", full)
        with pytest.raises(WorkspaceError, match="the disk is full; nothing was changed"):
            read_records(shop(tmp_path))
    assert sorted(str(p) for p in Workspace(tmp_path).staged.rglob("*")) == before
    assert read_records(shop(tmp_path)).counts["activity"].accepted == 2 * 199


# ---- databases -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgresql():
    """The address of a PostgreSQL server of this test's own."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert binaries, "PostgreSQL is missing (apt-get install postgresql): logs in databases are a promise"
    as_nobody = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    directory = Path(tempfile.mkdtemp(prefix="fastq-postgres-"))
    if as_nobody:
        shutil.chown(directory, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = directory / "data"
    subprocess.run([*as_nobody, binaries[-1] / "initdb", "-D", data, "-U", "shop", "--auth=trust", "--no-sync"], check=True, capture_output=True, cwd=directory)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off"
    control = [*as_nobody, binaries[-1] / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-l", directory / "log", "-o", options, "start"], check=True, capture_output=True, cwd=directory)
    yield f"postgresql://shop@127.0.0.1:{port}/postgres", [*as_nobody, binaries[-1] / "psql", "-h", "127.0.0.1", "-p", str(port), "-U", "shop", "postgres"]
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd=directory)
    shutil.rmtree(directory)


TABLE = "decision_id text, player_id bigint, decided_at {time}, policy text, propensity double precision, goal numeric(6, 2), joy double precision"


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_query_s_answer_is_a_log_like_any_other(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    rows = [(f"d{i}", i % 3, f"{START + timedelta(hours=i):%Y-%m-%d %H:%M:%S}", "bold", 0.5, 2.25, None if i == 5 else 0.5 * i) for i in range(6)]
    if database == "sqlite":
        uri = "sqlite://shop.db"
        with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as made, made:
            made.execute(f"create table decisions ({TABLE.format(time='text')})")
            made.executemany("insert into decisions values (?, ?, ?, ?, ?, ?, ?)", rows)
    else:
        uri, psql = request.getfixturevalue("postgresql")
        values = ", ".join("(" + ", ".join("null" if v is None else f"'{v}'" for v in row) + ")" for row in rows)
        script = f"create table decisions ({TABLE.format(time='timestamp with time zone')}); set time zone 'UTC'; insert into decisions values {values};"
        subprocess.run([*psql, "-v", "ON_ERROR_STOP=1", "-q", "-c", script], check=True, capture_output=True, cwd="/")
    tree = shop(tmp_path).model_dump(mode="json")
    tree["logs"] = {"decisions": {"uri": uri, "query": "select * from decisions"}}
    tree["state"] |= {"measures": {}}
    platform = platform_from_tree(tree, tmp_path, "fastq.yaml")
    for _ in range(2):
        records = read_records(platform)
        assert records.counts["decisions"] == Counts(6, 0, 0)
        assert records.decisions["player_id"].to_list() == ["0", "0", "1", "1", "2", "2"]
        assert records.decisions["decided_at"].min() == START
        assert records.decisions["goal"].unique().to_list() == [2.25]
        assert records.decisions.filter(pl.col("decision_id") == "d5")["joy"].to_list() == [None]
