"""Backups of a workspace: taken while it is written to, refused where they are not what was written, put back whole or not at all."""

import gzip
import io
import json
import os
import shutil
import sqlite3
import tarfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fastq import workspace as workspaces
from fastq.backup import KEY_VARIABLE, backup, expire, kept_backups, key_from, restore
from fastq.errors import ConfigurationError, WorkspaceError
from fastq.forgetting import forgotten, remember
from fastq.workspace import STAGING, Workspace, finish_restore, format_of, keep, replacing, undo_upgrade, upgrade

KEY = "0123456789abcdef-a-key-of-the-test"


@pytest.fixture
def made(tmp_path):
    """A small workspace with one of each kind of file."""
    root = tmp_path / "shop"
    workspace = Workspace(root)
    workspace.make(root, workspace.served, workspace.state / "tables")
    (root / "fastq.yaml").write_text("platform: shop\n")
    (root / "logs").mkdir()
    (root / "logs" / "a.parquet").write_bytes(os.urandom(200_000))
    (workspace.tables / "decisions.parquet").write_bytes(b"rows")
    workspace.audit.write_text('{"action": "promote"}\n')
    with sqlite3.connect(workspace.served / "0000.db") as log:
        log.execute("PRAGMA journal_mode=WAL")
        log.execute("CREATE TABLE decisions(id INTEGER PRIMARY KEY, twin INTEGER)")
    return root


def tree(root):
    """Every file below a directory with its content; databases by their rows, for their bytes may differ."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.endswith((".lock", "-wal", "-shm")):
            if path.suffix == ".db":
                with sqlite3.connect(path) as database:
                    found[name] = database.execute("SELECT * FROM decisions ORDER BY id").fetchall()
            else:
                found[name] = path.read_bytes()
    return found


def test_backups_expire_all_but_the_newest_and_nothing_else(made, tmp_path):
    workspace, day = Workspace(made), timedelta(days=1)
    names = ["a.fastq", "b.fastq", "gone.fastq", "c.fastq"]
    for name in names:
        assert backup(made, tmp_path / name, KEY if name == "b.fastq" else None)["expired"] == []
    (tmp_path / "gone.fastq").unlink()
    (tmp_path / "a.fastq").rename(tmp_path / "moved.fastq")
    (tmp_path / "a.fastq").write_text("somebody else's")
    later = datetime.now(UTC) + 40 * day
    assert [Path(one["file"]).name for one in kept_backups(workspace)] == ["b.fastq", "c.fastq"]
    assert expire(workspace, None, later) == expire(workspace, 50 * day, later) == []
    assert expire(workspace, 30 * day, later) == [str(tmp_path / "b.fastq")]
    assert sorted(path.name for path in tmp_path.glob("*.fastq")) == ["a.fastq", "c.fastq", "moved.fastq"]
    assert backup(made, tmp_path / "d.fastq", keep=timedelta(0))["expired"] == [str(tmp_path / "c.fastq")]


def test_a_backup_that_is_replaced_is_as_old_as_its_last_writing(made, tmp_path):
    for line in ("2020-01-01T00:00:00+00:00", "2020-01-02T00:00:00+00:00"):
        Workspace(made).append(Workspace(made).backups, {"at": line, "file": str(tmp_path / "nightly")})
    backup(made, tmp_path / "nightly")
    backup(made, tmp_path / "weekly", keep=timedelta(days=30))
    assert {Path(one["file"]).name for one in kept_backups(Workspace(made))} == {"nightly", "weekly"}


def test_who_was_forgotten_since_stays_forgotten(made, tmp_path):
    workspace = Workspace(made)
    remember(workspace, "p1")
    backup(made, tmp_path / "b")
    remember(workspace, "p2")
    backup(made, tmp_path / "newer")
    assert restore(made, tmp_path / "b", overwrite=True)["forgotten"] == 1
    known = forgotten(workspace)
    assert [p in known for p in ("p1", "p2", "p3")] == [True, True, False]
    assert (workspace.state / "forgotten.json").stat().st_mode & 0o077 == 0
    assert len(kept_backups(workspace)) == 2, "the newer one is known too, so that it can expire"
    (workspace.state / "forgotten.json").write_text("{")  # what a backup is there to mend
    assert restore(made, tmp_path / "b", overwrite=True)["forgotten"] == 0
    assert "p1" in forgotten(workspace)


@pytest.mark.parametrize("key", [None, KEY])
def test_what_was_backed_up_comes_back(made, tmp_path, key):
    said = backup(made, tmp_path / "b", key)
    assert (said["encrypted"], said["size"]) == (key is not None, (tmp_path / "b").stat().st_size)
    assert (tmp_path / "b").stat().st_mode & 0o077 == 0  # players' data: for this user alone
    restored = restore(tmp_path / "elsewhere", tmp_path / "b", key)
    assert tree(tmp_path / "elsewhere") == tree(made)
    assert restored["files"] == said["files"]
    assert not (tmp_path / "elsewhere" / STAGING).exists()
    assert (tmp_path / "elsewhere" / ".fastq").stat().st_mode & 0o077 == 0
    if key is not None:
        assert b"fastq.yaml" not in (tmp_path / "b").read_bytes()


def test_a_database_is_copied_in_one_committed_state_while_it_is_written_to(made, tmp_path):
    """Two rows per transaction: a copy that saw half of one would have an odd number."""
    stop, written = threading.Event(), []

    def writes():
        with sqlite3.connect(Workspace(made).served / "0000.db", timeout=30) as log:
            while not stop.is_set():
                n = len(written)
                log.execute("INSERT INTO decisions(twin) VALUES (?)", (n,))
                log.execute("INSERT INTO decisions(twin) VALUES (?)", (n,))
                log.commit()
                written.append(n)

    writer = threading.Thread(target=writes)
    writer.start()
    try:
        seen = []
        for i in range(5):
            before = len(written)
            backup(made, tmp_path / f"b{i}")
            restore(tmp_path / f"r{i}", tmp_path / f"b{i}")
            rows = tree(tmp_path / f"r{i}")[".fastq/served/0000.db"]
            assert len(rows) % 2 == 0
            assert [twin for _, twin in rows] == [n for pair in range(len(rows) // 2) for n in (pair, pair)]
            assert len(rows) >= 2 * before  # nothing that was committed before is missing
            seen.append(len(rows))
        assert seen[-1] > seen[0]  # it was indeed written to meanwhile
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("key", [None, KEY])
def test_every_changed_byte_is_noticed(made, tmp_path, key):
    backup(made, tmp_path / "b", key)
    whole = (tmp_path / "b").read_bytes()
    for place in range(40, len(whole), len(whole) // 23):
        (tmp_path / "bad").write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        with pytest.raises((WorkspaceError, ConfigurationError)):
            restore(tmp_path / "to", tmp_path / "bad", key)
        assert list((tmp_path / "to").iterdir()) == []
    for cut in (len(whole) // 2, len(whole) - 20, 10):
        (tmp_path / "bad").write_bytes(whole[:cut])
        with pytest.raises((WorkspaceError, ConfigurationError)):
            restore(tmp_path / "to", tmp_path / "bad", key)
    assert list((tmp_path / "to").iterdir()) == []


def test_a_sealed_backup_opens_with_its_key_alone(made, tmp_path, monkeypatch):
    backup(made, tmp_path / "b", KEY)
    with pytest.raises(ConfigurationError, match="--key-file"):
        restore(tmp_path / "to", tmp_path / "b")
    with pytest.raises(WorkspaceError, match="another one"):
        restore(tmp_path / "to", tmp_path / "b", KEY + "x")
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ConfigurationError, match="at least 16"):
        key_from(None)
    (tmp_path / "k").write_text(KEY + "\nanything\n")
    assert key_from(tmp_path / "k") == KEY


def hostile(path, *entries):
    """A backup with these entries, its manifest right for them."""
    import hashlib

    told = {name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body, _ in entries}
    about = json.dumps({"version": 1, "format": 1, "root": "/x", "at": "2026"}).encode()
    with gzip.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, body, kind in [("fastq-backup.json", about, tarfile.REGTYPE), *entries, ("manifest.json", json.dumps(told).encode(), tarfile.REGTYPE)]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, len(body) if kind == tarfile.REGTYPE else 0
            entry.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            archive.addfile(entry, io.BytesIO(body))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../out", tarfile.REGTYPE),
        ("/tmp/fastq-out", tarfile.REGTYPE),
        ("a/../../out", tarfile.REGTYPE),
        (".fastq-restore/swap.json", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("hard", tarfile.LNKTYPE),
    ],
)
def test_an_archive_cannot_reach_out_of_the_workspace(tmp_path, name, kind):
    hostile(tmp_path / "b", ("fastq.yaml", b"x", tarfile.REGTYPE), (name, b"evil", kind))
    with pytest.raises(WorkspaceError, match="no plain file inside a workspace"):
        restore(tmp_path / "in" / "to", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", "in", "to"]
    hostile(tmp_path / "good", ("fastq.yaml", b"x", tarfile.REGTYPE))  # the same, without the evil: the test can pass
    restore(tmp_path / "in" / "to", tmp_path / "good")


def test_links_in_a_workspace_are_not_followed(made, tmp_path):
    (tmp_path / "secret").write_text("not the workspace's")
    (made / "logs" / "link").symlink_to(tmp_path / "secret")
    (made / "outside").symlink_to(tmp_path)
    backup(made, tmp_path / "b")
    restore(tmp_path / "to", tmp_path / "b")
    assert not any("secret" in str(p) or p.name in ("link", "outside") for p in (tmp_path / "to").rglob("*"))


def test_a_living_workspace_is_replaced_only_when_told_and_newer_logs_stay(made, tmp_path):
    backup(made, tmp_path / "b")
    before = tree(made)
    (made / "logs" / "b.parquet").write_bytes(b"newer")
    (made / "logs" / "a.parquet").write_bytes(b"grown")
    Workspace(made).audit.write_text("later\n")
    with pytest.raises(WorkspaceError, match="--overwrite"):
        restore(made, tmp_path / "b")
    assert Workspace(made).audit.read_text() == "later\n"
    with Workspace(made).lock("retrain"), pytest.raises(WorkspaceError, match=r"retrain\.lock is held"):
        restore(made, tmp_path / "b", overwrite=True)
    restore(made, tmp_path / "b", overwrite=True)
    after = tree(made)
    assert after.pop("logs/b.parquet") == b"newer"
    assert after.pop("logs/a.parquet") == b"grown"  # ours is `.fastq` and `fastq.yaml`; the platform's logs are its own
    assert after == {name: content for name, content in before.items() if name != "logs/a.parquet"}


def test_stopped_at_any_rename_the_state_is_the_old_or_the_new_one(made, tmp_path, monkeypatch):
    backup(made, tmp_path / "b")
    (made / "fastq.yaml").write_text("platform: later\n")
    Workspace(made).audit.write_text("later\n")
    (made / "logs" / "a.parquet").unlink()
    old, stops = tree(made), 0
    new = None
    whole = os.replace
    for stop_at in range(30):
        count = 0

        def stopping(source, target, stop_at=stop_at):
            nonlocal count
            count += 1
            if count > stop_at:
                raise KeyboardInterrupt
            whole(source, target)

        monkeypatch.setattr(os, "replace", stopping)
        try:
            restore(made, tmp_path / "b", overwrite=True)
            monkeypatch.undo()
            break
        except KeyboardInterrupt:
            stops += 1
            monkeypatch.undo()
        finished = finish_restore(made)  # what the next command does
        if not finished:
            assert tree(made) == old
        else:
            new = tree(made)
            assert (made / "fastq.yaml").read_text() == "platform: shop\n"
            assert Workspace(made).audit.read_text() == '{"action": "promote"}\n'
            assert "logs/a.parquet" in new
            (made / "fastq.yaml").write_text("platform: later\n")
            Workspace(made).audit.write_text("later\n")
            (made / "logs" / "a.parquet").unlink()
    assert new is not None
    assert stops >= 5


def test_a_backup_in_the_workspace_does_not_hold_earlier_ones(made):
    for key in (None, KEY):
        backup(made, made / f"backup-{key is None}", key)
    said = backup(made, made / "third")
    assert said["files"] == len([name for name in tree(made) if not name.startswith(("backup-", "third"))])


def test_a_workspace_of_a_newer_version_is_refused(made):
    Workspace(made).format_file.write_text('{"format": 99}')
    with pytest.raises(WorkspaceError, match="newer fastq"):
        upgrade(Workspace(made))


def test_an_upgrade_can_be_undone(made, monkeypatch):
    workspace = Workspace(made)
    workspace.format_file.unlink()  # as before there were numbers
    assert format_of(workspace) == 0
    assert upgrade(workspace) == 0
    assert format_of(workspace) == workspaces.FORMAT == 1

    def step(workspace):
        keep(workspace, workspace.audit, 1)
        with replacing(workspace.audit) as partial:
            partial.write_text("of format 2")

    monkeypatch.setattr(workspaces, "FORMAT", 2)
    monkeypatch.setitem(workspaces.UPGRADES, 1, step)
    assert upgrade(workspace) == 1
    assert workspace.audit.read_text() == "of format 2"
    assert undo_upgrade(workspace) == 1
    assert workspace.audit.read_text() == '{"action": "promote"}\n'


def test_a_real_workspace_works_where_its_backup_was_restored(fastq, trained, tmp_path):
    """Everything but its place is the same: models, answers, and what MLflow keeps by absolute paths."""
    (tmp_path / "key").write_text(KEY)
    fastq("backup", tmp_path / "b", "--key-file", tmp_path / "key", cwd=trained, code=0)
    fastq("restore", tmp_path / "b", "--workspace", tmp_path / "to", cwd=tmp_path, code=2)
    said = json.loads(fastq("restore", tmp_path / "b", "--json", "--workspace", tmp_path / "to", "--key-file", tmp_path / "key", cwd=tmp_path, code=0).stdout)
    assert said["files"] > 50
    fastq("restore", tmp_path / "b", "--key-file", tmp_path / "key", cwd=tmp_path / "to", code=2)  # it lives already
    assert fastq("models", "--json", cwd=tmp_path / "to").stdout == fastq("models", "--json", cwd=trained).stdout
    shutil.rmtree(tmp_path / "to" / ".fastq" / "models")  # so that the registry must find its own copy
    with sqlite3.connect(tmp_path / "to" / ".fastq" / "mlflow" / "mlflow.db") as store:
        assert str(trained) not in "".join(store.iterdump())
    there = json.loads(fastq("recommend", "p00001", "--dry-run", "--json", cwd=tmp_path / "to", code=0).stdout)
    assert there["recommendations"][0]["degraded"] is None
    assert json.loads(fastq("doctor", "--json", cwd=tmp_path / "to", code=0).stdout)["passed"]
