"""Keys: what opens, what does not, what is kept, and how soon a revoked key stops."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fastq.errors import ConfigurationError, WorkspaceError
from fastq.workspace import Workspace
from serving import auth


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_a_key_opens_with_its_role_and_only_its_hash_is_kept(workspace: Workspace) -> None:
    made = auth.create_key(workspace, "analyst")
    caller = auth.Keys(workspace).verify(f"Bearer {made['key']}")
    assert (caller.key_id, caller.role) == (made["id"], "analyst")
    kept = b"".join(path.read_bytes() for path in workspace.state.iterdir())
    assert made["key"].encode() not in kept
    assert made["key"].split("_")[2].encode() not in kept
    assert workspace.keys.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer fq_00000000_abc", "Bearer fq__"])
def test_anything_else_is_refused(workspace: Workspace, header: str | None) -> None:
    auth.create_key(workspace, "admin")
    with pytest.raises(auth.NotSignedIn):
        auth.Keys(workspace).verify(header)


def test_the_right_id_with_a_wrong_secret_is_refused(workspace: Workspace) -> None:
    first, second = auth.create_key(workspace, "admin"), auth.create_key(workspace, "admin")
    mixed = f"fq_{first['id']}_{second['key'].split('_')[2]}"
    with pytest.raises(auth.NotSignedIn):
        auth.Keys(workspace).verify(f"Bearer {mixed}")


@pytest.mark.parametrize(("role", "reaches"), [("recommend", 1), ("analyst", 2), ("admin", 3)])
def test_each_role_includes_those_before_it(workspace: Workspace, role: str, reaches: int) -> None:
    caller = auth.Keys(workspace).verify(f"Bearer {auth.create_key(workspace, role)['key']}")
    for position, needed in enumerate(auth.ROLES):
        if position < reaches:
            caller.require(needed)
        else:
            with pytest.raises(auth.NotAllowed, match=needed):
                caller.require(needed)


def test_a_revoked_key_and_its_session_stop_within_a_second(workspace: Workspace) -> None:
    made, keys = auth.create_key(workspace, "analyst"), auth.Keys(workspace)
    token, _ = keys.sign_in(made["key"])
    assert keys.verify(None, token).role == "analyst"
    assert keys.verify(f"Bearer {made['key']}").role == "analyst"
    auth.revoke_key(workspace, made["id"])
    time.sleep(1)
    with pytest.raises(auth.NotSignedIn):
        keys.verify(f"Bearer {made['key']}")
    with pytest.raises(auth.NotSignedIn):
        keys.verify(None, token)
    assert [k["revoked_at"] is not None for k in auth.list_keys(workspace)] == [True]


def test_a_key_made_while_a_server_runs_opens_within_a_second(workspace: Workspace) -> None:
    keys = auth.Keys(workspace)
    assert not keys.any()
    made = auth.create_key(workspace, "recommend")
    time.sleep(auth.FRESH_SECONDS + 0.1)
    assert keys.any()
    assert keys.verify(f"bearer {made['key']}").role == "recommend"


def test_a_session_ends_when_signed_out_and_when_its_time_is_over(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    made, keys = auth.create_key(workspace, "analyst"), auth.Keys(workspace)
    token, _ = keys.sign_in(made["key"])
    assert token not in made["key"]
    keys.sign_out(token)
    with pytest.raises(auth.NotSignedIn):
        keys.verify(None, token)
    monkeypatch.setattr(auth, "SESSION_SECONDS", -1)
    late, _ = keys.sign_in(made["key"])
    with pytest.raises(auth.NotSignedIn):
        keys.verify(None, late)


def test_mistakes_are_sentences(workspace: Workspace) -> None:
    with pytest.raises(ConfigurationError, match="recommend, analyst, admin"):
        auth.create_key(workspace, "root")
    with pytest.raises(ConfigurationError, match="no such key id"):
        auth.revoke_key(workspace, "nothere")
    workspace.keys.write_bytes(b"this is no database, it is a sentence that is long enough to be read as a header of one" * 20)
    with pytest.raises(WorkspaceError, match=r"keys\.db"):
        auth.create_key(workspace, "admin")
