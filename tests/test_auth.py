"""Keys: what opens, what does not, what is kept, and how soon a revoked key stops."""

from __future__ import annotations

import json
import sqlite3
import time
from datetime import timedelta
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from fastq.errors import ConfigurationError, WorkspaceError
from fastq.platform import Tokens as TokenSettings
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


def test_a_key_stops_to_open_anything_when_it_expires(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = auth.create_key(workspace, "analyst", timedelta(hours=1))
    keys = auth.Keys(workspace)
    assert keys.verify(f"Bearer {made['key']}").role == "analyst"
    token, _ = keys.sign_in(made["key"])
    assert keys.any()
    late = time.time() + 3_601
    monkeypatch.setattr(auth.time, "time", lambda: late)
    with pytest.raises(auth.NotSignedIn, match="expired"):
        keys.verify(f"Bearer {made['key']}")
    with pytest.raises(auth.NotSignedIn):
        keys.verify(None, token)
    assert not keys.any()


def test_a_key_file_of_an_earlier_release_goes_on(workspace: Workspace) -> None:
    made = auth.create_key(workspace, "admin")
    with sqlite3.connect(workspace.keys) as database:
        database.execute("ALTER TABLE keys DROP COLUMN expires_at")
    assert auth.Keys(workspace).verify(f"Bearer {made['key']}").role == "admin"
    assert auth.list_keys(workspace)[0]["expires_at"] is None


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory):
    """Somebody's sign-in: `issuer(role=…)` signs a token; its public keys lie in a file."""
    root, private = tmp_path_factory.mktemp("issuer"), ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key())) | {"kid": "one", "alg": "ES256", "use": "sig"}
    (root / "jwks.json").write_text(json.dumps({"keys": [public]}))

    def sign(key: object = private, algorithm: str = "ES256", kid: str = "one", **claims: object) -> str:
        said = {"iss": "https://id.example", "aud": "fastq", "sub": "ann", "exp": time.time() + 60, "role": "analyst"} | claims
        return jwt.encode({name: value for name, value in said.items() if value is not None}, key, algorithm, headers={"kid": kid})

    sign.tokens = auth.Tokens(TokenSettings(jwks="jwks.json", issuer="https://id.example", audience="fastq"), root)
    return sign


def test_tokens_of_the_issuer_open_as_their_role_says(workspace: Workspace, issuer) -> None:
    keys = auth.Keys(workspace, issuer.tokens)
    assert keys.any()
    assert keys.verify(f"Bearer {issuer()}") == auth.Caller("token:ann", "analyst")
    assert keys.verify(f"Bearer {issuer(role=['recommend', 'admin', 'else'])}").role == "admin"
    made = auth.create_key(workspace, "recommend")
    assert keys.verify(f"Bearer {made['key']}").role == "recommend"  # our own keys beside them


@pytest.mark.parametrize(
    "wrong",
    [
        {"exp": 1}, {"iss": "https://else.example"}, {"aud": "else"}, {"role": "king"}, {"role": None}, {"sub": None}, {"exp": None}, {"kid": "two"},
        {"key": ec.generate_private_key(ec.SECP256R1())}, {"key": "a shared secret of at least 32 bytes", "algorithm": "HS256"},
        {"key": None, "algorithm": "none"},
    ],
)  # fmt: skip
def test_any_other_token_opens_nothing(workspace: Workspace, issuer, wrong: dict) -> None:
    with pytest.raises(auth.NotSignedIn):
        auth.Keys(workspace, issuer.tokens).verify(f"Bearer {issuer(**wrong)}")


def test_a_token_that_was_checked_expires_all_the_same(workspace: Workspace, issuer) -> None:
    keys, token = auth.Keys(workspace, issuer.tokens), issuer(exp=time.time() + 1.2)
    assert keys.verify(f"Bearer {token}")
    time.sleep(1.3)
    with pytest.raises(auth.NotSignedIn, match="expired"):
        keys.verify(f"Bearer {token}")
