"""The endpoint as a client sees it: contract section 5, in this process; and once behind Ray Serve, as `fastq serve` runs it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

from fastq import assignment, registry
from fastq.environment import free_ports
from fastq.errors import BundleError, ConfigurationError, WorkspaceError
from fastq.platform import Cap, Platform, load_platform
from fastq.workspace import Workspace
from feature_repo import store
from serving import app, auth, bodies, decision_log, desk, endpoint, metrics, online, pages, refusals
from serving.metrics import ProxyRefusals


@pytest.fixture(scope="module")
def platform(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    return load_platform(shutil.copytree(trained, tmp_path_factory.mktemp("served") / "workspace"))


@pytest.fixture(scope="module")
def keys(platform: Platform) -> dict[str, str]:
    return {role: auth.create_key(Workspace(platform.root), role)["key"] for role in auth.ROLES}


@pytest.fixture(scope="module")
def client(platform: Platform, keys: dict[str, str]):
    with TestClient(endpoint.create_app(platform), raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def player(platform: Platform) -> str:
    frame = store.materialized(platform).sort("seen_at", "player_id", descending=[True, False], nulls_last=True)
    return str(frame["player_id"][0])


@pytest.fixture
def call(client: TestClient, keys: dict[str, str]):
    """`call("post", route, body, role)` gives status and JSON; every refusal is a problem, and none shows our insides."""

    def send(method: str, route: str, body: object = None, role: str | None = "analyst", raw: bytes | None = None, **headers: str):
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        auth_header = {"Authorization": f"Bearer {keys[role]}"} if role else {}
        answer = client.request(method, route, content=content, headers={"Content-Type": "application/json", **auth_header, **headers}, follow_redirects=False)
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json()
            assert problem["status"] == answer.status_code
            assert problem["detail"]
            assert "Traceback" not in answer.text
            assert 'File "' not in answer.text
        return answer.status_code, answer.json()

    return send


def action(platform: Platform) -> dict[str, float]:
    return {name: float(low + 0.25 * (high - low)) for name, (low, high) in zip(platform.dimension_names, platform.bounds, strict=True)}


# ---- who may ----------------------------------------------------------------------------------------------------------------
ROUTES = [
    ("POST", "/v1/recommendations", "recommend"),
    ("POST", "/v1/outcomes", "recommend"),
    ("POST", "/v1/activity", "recommend"),
    ("POST", "/v1/explanations", "analyst"),
    ("POST", "/v1/query", "analyst"),
    ("GET", "/v1/players/p1", "analyst"),
    ("GET", "/v1/models", "analyst"),
    ("GET", "/v1/decisions/d1", "analyst"),
    ("GET", "/console", "analyst"),
    ("GET", "/v1/nothing", "analyst"),
]


@pytest.mark.parametrize(("method", "route", "needed"), ROUTES)
def test_each_route_needs_its_role(call, client: TestClient, keys: dict[str, str], method: str, route: str, needed: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}, {"Cookie": f"{auth.COOKIE}=wrong"}):
        answer = client.request(method, route, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    for role in auth.ROLES:
        status = client.request(method, route, headers={"Authorization": f"Bearer {keys[role]}"}).status_code
        assert (status == 403) == (auth.ROLES.index(role) < auth.ROLES.index(needed)), (role, status)
        assert status != 401


def test_every_route_there_is_wants_a_key_that_is_still_good(client: TestClient, keys: dict[str, str], platform: Platform) -> None:
    workspace = Workspace(platform.root)
    expired = auth.create_key(workspace, "admin", timedelta(seconds=-1))["key"]
    revoked = auth.create_key(workspace, "admin")
    auth.revoke_key(workspace, revoked["id"])
    time.sleep(auth.FRESH_SECONDS + 0.1)  # what a server may still not know
    found = {(method, path) for path, methods in client.get("/openapi.json").json()["paths"].items() for method in methods}
    found |= {(method.lower(), route.path) for route in pages.router(client.app.state.desk, client.app.state.paper).routes for method in route.methods}
    shut = {(method, path) for method, path in found if path not in endpoint.OPEN and not pages.needs_no_key(path, method.upper())}
    assert len(shut) > 15
    for method, path in sorted(shut):
        where = re.sub(r"{[^}]*}", "x", path)
        for given in (None, "fq_00000000_wrong", expired, revoked["key"]):
            answer = client.request(method, where, headers={"Authorization": f"Bearer {given}"} if given else {})
            assert answer.status_code == 401, (method, where, given)
        lower = client.request(method, where, headers={"Authorization": f"Bearer {keys['recommend']}"})
        assert (lower.status_code == 403) == (path not in endpoint.RECOMMEND), (method, where, lower.status_code)


def test_health_needs_no_key(client: TestClient) -> None:
    for route in endpoint.OPEN:
        assert client.get(route).status_code == 200


def test_a_wrong_method_and_a_wrong_path_are_problems(call) -> None:
    assert call("PUT", "/v1/models")[0] == 405
    assert call("GET", "/v1/nothing")[0] == 404


def test_the_body_is_not_read_before_the_key(call) -> None:
    assert call("POST", "/v1/recommendations", role=None, raw=b"{")[0] == 401


# ---- recommendations ----------------------------------------------------------------------------------------------------------
def test_recommendations_are_complete_and_logged(call, platform: Platform, player: str) -> None:
    status, body = call("POST", "/v1/recommendations", {"players": [player, "nobody-yet"]}, "recommend")
    assert status == 200
    first, second = body["recommendations"]
    assert set(first) == {
        "player_id",
        "decision_id",
        "decided_at",
        "action",
        "units",
        "propensity",
        "value",
        "by_objective",
        "policy",
        "model_version",
        "degraded",
    }
    assert first["player_id"] == player
    assert first["degraded"] is None
    assert second["degraded"]
    assert set(first["units"]) == set(platform.dimension_names)
    for answer in (first, second):
        status, card = call("GET", f"/v1/decisions/{answer['decision_id']}")
        assert status == 200
        assert {name: card[name] for name in answer} == answer
        assert card["outcomes"] == {}


def test_a_dry_run_is_not_logged(call, player: str) -> None:
    decision = call("POST", "/v1/recommendations", {"players": [player], "dry_run": True})[1]["recommendations"][0]
    assert call("GET", f"/v1/decisions/{decision['decision_id']}")[0] == 404


def test_integer_ids_are_strings_inside(call) -> None:
    assert call("POST", "/v1/recommendations", {"players": [17], "dry_run": True})[1]["recommendations"][0]["player_id"] == "17"


def test_an_inline_state_is_answered(call, platform: Platform) -> None:
    attributes = {name: 90 if a.kind == "numeric" else "never seen" for name, a in platform.state.attributes.items()}
    history = [[None] * len(platform.state.measures)] + [[1.0] * len(platform.state.measures)] * (platform.state.window - 1)
    status, body = call("POST", "/v1/recommendations", {"states": [{"player_id": "inline", "history": history, "attributes": attributes}], "dry_run": True})
    assert status == 200, body
    assert body["recommendations"][0]["value"] is not None
    assert body["recommendations"][0]["degraded"] is None


def test_the_same_idempotency_key_gives_the_same_decisions(call, player: str) -> None:
    body = {"players": [player, "nobody-yet"]}
    first = call("POST", "/v1/recommendations", body, "recommend", **{"Idempotency-Key": "once"})
    assert call("POST", "/v1/recommendations", body, "recommend", **{"Idempotency-Key": "once"}) == first
    assert call("POST", "/v1/recommendations", {"players": [player]}, "recommend", **{"Idempotency-Key": "once"})[0] == 422
    for nothing in ("", "k" * 301):  # an empty one would stand for every request that forgot to fill it in
        status, said = call("POST", "/v1/recommendations", body, "recommend", **{"Idempotency-Key": nothing})
        assert (status, said["detail"]) == (422, "Idempotency-Key: expected 1 to 300 characters")
    other = call("POST", "/v1/recommendations", body, "admin", **{"Idempotency-Key": "once"})  # another caller's key is another matter
    assert other[1] != first[1]


def test_bad_requests_are_refused_in_words(call, platform: Platform, player: str) -> None:
    name, low = platform.dimension_names[0], platform.bounds[0, 0]
    bodies = [
        {},
        {"players": []},
        {"states": []},
        {"players": "p1"},
        {"players": [player], "colour": 1},
        {"players": [player], "states": []},
        {"players": [None]},
        {"players": [True]},
        {"players": [""]},
        {"players": [1.5]},
        {"players": ["p"] * 1001},
        {"players": [player], "limits": {name: {"high": low - 1}}},
        {"players": [player], "limits": {"nothing": {"high": 5}}},
        {"players": [player], "limits": {name: {"up": 5}}},
        {"players": [player], "exploration": 2},
        {"players": [player], "exploration": -0.1},
        {"players": [player], "explore": "yes"},
        {"players": [player], "eligible": ["a"]},
        {"players": [player], "eligible": []},
        {"players": [player], "top_k": 0},
        {"players": [player], "top_k": 3},
        {"states": [{"player_id": "x", "history": [[1, 2]], "attributes": {}}]},
        {"states": [{"player_id": "x"}]},
        [],
        "players",
        7,
        None,
    ]
    for body in bodies:
        status, problem = call("POST", "/v1/recommendations", raw=json.dumps(body).encode())
        assert status == 422, (body, status, problem)
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"players": [NaN]}', b'{"players": ["a"], "exploration": Infinity}', b'{"players": ["\\ud800"]}'):
        status, problem = call("POST", "/v1/recommendations", raw=raw)
        assert status == 422, (raw[:20], problem)


def test_too_large_a_body_is_413_however_it_is_sent(call, client: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MOST_BYTES", 2**20)
    assert call("POST", "/v1/recommendations", raw=b" " * (2**20 + 1))[0] == 413
    chunks = (b" " * 2**16 for _ in range(17))
    answer = client.post("/v1/recommendations", content=chunks, headers={"Authorization": f"Bearer {keys['recommend']}", "Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")


def test_requests_at_once_share_batches_and_each_gets_its_own(client: TestClient, call, platform: Platform) -> None:
    players = store.materialized(platform)["player_id"].head(40).to_list()
    before = batches(client)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda p: call("POST", "/v1/recommendations", {"players": [p]}, "recommend"), players))
    assert [a["recommendations"][0]["player_id"] for _, a in answers] == players
    assert len({a["recommendations"][0]["decision_id"] for _, a in answers}) == 40
    assert batches(client) - before <= 40


def batches(client: TestClient) -> int:
    return int(next(float(line.split()[1]) for line in client.get("/metrics").text.splitlines() if line.startswith("fastq_batch_players_count")))


def test_a_large_request_is_answered_in_order(call, platform: Platform) -> None:
    players = (store.materialized(platform)["player_id"].to_list() * 10)[:1000]
    status, body = call("POST", "/v1/recommendations", {"players": players, "dry_run": True})
    assert status == 200
    assert [r["player_id"] for r in body["recommendations"]] == players


# ---- outcomes and activity -------------------------------------------------------------------------------------------------------
def test_outcomes_are_all_or_nothing_and_idempotent(call, platform: Platform, player: str) -> None:
    objectives = list(platform.objectives)
    first, second = (r["decision_id"] for r in call("POST", "/v1/recommendations", {"players": [player, player]})[1]["recommendations"])
    body = {"outcomes": [{"decision_id": first, objectives[0]: 0.7, objectives[1]: 0}]}
    assert call("POST", "/v1/outcomes", body, "recommend") == (200, {"accepted": 1, "already_known": 0})
    assert call("POST", "/v1/outcomes", body, "recommend") == (200, {"accepted": 0, "already_known": 1})
    fresh = {"decision_id": second, objectives[0]: 0.1}
    status, problem = call("POST", "/v1/outcomes", {"outcomes": [fresh, {"decision_id": "never", objectives[0]: 1.0}]}, "recommend")
    assert (status, problem["ids"]) == (404, ["never"])
    assert call("POST", "/v1/outcomes", {"outcomes": [fresh, {"decision_id": first, objectives[0]: 0.8}]}, "recommend")[0] == 409
    assert call("POST", "/v1/outcomes", {"outcomes": [fresh]}, "recommend") == (200, {"accepted": 1, "already_known": 0})
    assert call("POST", "/v1/outcomes", {"outcomes": [{"decision_id": first, objectives[0]: 0.8}], "correct": True})[0] == 200
    assert call("GET", f"/v1/decisions/{first}")[1]["outcomes"] == {objectives[0]: 0.8, objectives[1]: 0.0}
    for executed in (False, action(platform)):
        assert call("POST", "/v1/outcomes", {"outcomes": [{"decision_id": second, "executed": executed}], "correct": True}) == (
            200,
            {"accepted": 1, "already_known": 0},
        )
        assert call("GET", f"/v1/decisions/{second}")[1]["executed"] == executed
    for wrong in (
        {"outcomes": []},
        {"outcomes": [{"decision_id": first}]},
        {"outcomes": [{"decision_id": first, "nothing": 1}]},
        {"outcomes": [{"decision_id": first, objectives[0]: "much"}]},
        {"outcomes": [{"decision_id": first, "executed": {"nothing": 1}}]},
        {},
    ):
        assert call("POST", "/v1/outcomes", wrong)[0] == 422, wrong


def test_activity_is_seen_by_the_next_recommendation(call, platform: Platform) -> None:
    measure, other = list(platform.state.measures)[:2]
    now = datetime.now(UTC)
    event = {"player_id": "newcomer", "occurred_at": (now - timedelta(minutes=1)).isoformat(), measure: 1.0}
    assert call("POST", "/v1/recommendations", {"players": ["newcomer"]})[1]["recommendations"][0]["value"] is None
    assert call("POST", "/v1/activity", {"events": [event]}, "recommend") == (200, {"accepted": 1, "already_known": 0, "degraded": None})
    assert call("POST", "/v1/activity", {"events": [event]}, "recommend")[1]["already_known"] == 1
    answer = call("POST", "/v1/recommendations", {"players": ["newcomer"]})[1]["recommendations"][0]
    assert answer["value"] is not None
    assert answer["degraded"] is None
    status, card = call("GET", "/v1/players/newcomer")
    assert status == 200
    assert [row[measure] for row in card["history"] if row[measure] is not None] == [1.0]
    assert card["history"][-1][other] is None
    for wrong in (
        {"events": []},
        {"events": [{**event, "nothing": 1}]},
        {"events": [{**event, "occurred_at": "yesterday"}]},
        {"events": [{**event, "occurred_at": now.replace(tzinfo=None).isoformat()}]},
        {"events": [{**event, "occurred_at": (now + timedelta(days=2)).isoformat()}]},
        {"events": [{**event, "occurred_at": "0001-01-01T00:00:00Z"}]},
        {"events": [{**event, measure: 1e300}]},  # no 32-bit state or column of SQL could hold it
        {"events": [{"player_id": "x", "occurred_at": now.isoformat()}]},
    ):
        assert call("POST", "/v1/activity", wrong)[0] == 422, wrong


# ---- explanations and look-ups ---------------------------------------------------------------------------------------------------
def test_an_explanation_over_http(call, platform: Platform, player: str) -> None:
    decision = call("POST", "/v1/recommendations", {"players": [player]})[1]["recommendations"][0]
    status, why = call(
        "POST", "/v1/explanations", {"decision_id": decision["decision_id"], "against": action(platform), "weights": {next(iter(platform.objectives)): 2}}
    )
    assert status == 200, why
    assert why["action"] == decision["action"]
    assert why["value"] == pytest.approx(decision["value"], rel=1e-6)
    assert why["what_if"] is not None
    assert call("POST", "/v1/explanations", {"decision_id": "never"})[0] == 404
    assert call("POST", "/v1/explanations", {"player_id": "nobody-yet"})[0] == 404
    for wrong in (
        {},
        {"decision_id": "a", "player_id": "b"},
        {"player_id": player, "against": "nobody"},
        {"player_id": player, "against": {"nothing": 1}},
        {"player_id": player, "weights": {"nothing": 1}},
    ):
        assert call("POST", "/v1/explanations", wrong)[0] == 422, wrong


def test_sql_over_http(call, player: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decision = call("POST", "/v1/recommendations", {"players": [player]})[1]["recommendations"][0]
    text = f"SELECT player_id, decided_at, propensity FROM decisions WHERE decision_id = '{decision['decision_id']}'"
    status, body = call("POST", "/v1/query", {"sql": text})
    assert (status, body["columns"], body["truncated"]) == (200, ["player_id", "decided_at", "propensity"], False)
    assert body["rows"] == [[decision["player_id"], decision["decided_at"], decision["propensity"]]]
    for wrong in (
        {"sql": "DROP VIEW decisions"},
        {"sql": "SELECT * FROM read_text('/etc/passwd')"},
        {"sql": "SELEC"},
        {"sql": ""},
        {"sql": 1},
        {"sql": "x", "rows": 1},
        {},
    ):
        assert call("POST", "/v1/query", wrong)[0] == 422, wrong
    monkeypatch.setattr(endpoint, "QUERY_SECONDS", 1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        endless = pool.submit(call, "POST", "/v1/query", {"sql": "SELECT count(*) FROM range(10000000) a, range(10000000) b"})
        assert call("POST", "/v1/recommendations", {"players": [player], "dry_run": True})[0] == 200  # served meanwhile
        assert not endless.done()
        status, problem = endless.result()
    assert (status, "longer than 1 seconds" in problem["detail"]) == (422, True)


def test_models_and_players_and_decisions_can_be_looked_up(call, player: str) -> None:
    models = call("GET", "/v1/models")[1]["models"]
    assert [m["version"] for m in models if "champion" in m["aliases"]] == [models[0]["version"]]
    assert call("GET", f"/v1/players/{player}")[1]["degraded"] is None
    assert call("GET", "/v1/players/nobody-yet")[0] == 404
    assert call("GET", "/v1/players/eu%2Fnobody")[1]["detail"].startswith("eu/nobody: "), "an id may hold a slash"
    assert call("GET", "/v1/decisions/never")[0] == 404


def test_openapi_names_every_route_and_its_security(client: TestClient, platform: Platform) -> None:
    document = client.get("/openapi.json").json()
    assert {
        "/v1/recommendations",
        "/v1/outcomes",
        "/v1/activity",
        "/v1/explanations",
        "/v1/players/{player_id}",
        "/v1/models",
        "/v1/decisions/{decision_id}",
    } <= set(document["paths"])
    for path, methods in document["paths"].items():
        assert all(("security" in operation) == (path not in endpoint.OPEN) for operation in methods.values())
    assert set(platform.objectives) <= set(document["components"]["schemas"]["Outcome"]["properties"])


# ---- the console -------------------------------------------------------------------------------------------------------------------
def test_signing_in_on_the_console(client: TestClient, keys: dict[str, str]) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml"}
    form = client.get("/console", headers=browser)
    assert (form.status_code, "<form" in form.text) == (200, True)
    assert client.get("/console").status_code == 401
    assert client.post("/console", data={"key": "wrong"}, headers=browser).status_code == 401
    assert client.post("/console", data={"key": keys["recommend"]}, headers=browser).status_code == 403
    assert client.post("/console", data={"key": keys["analyst"]}, headers={**browser, "Origin": "https://elsewhere.example"}).status_code == 403
    answer = client.post("/console", data={"key": keys["analyst"]}, headers=browser, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert keys["analyst"].lower() not in cookie
    page = client.get("/console", headers=browser)
    assert page.status_code == 200
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text
    assert client.get("/v1/models").status_code == 200  # the cookie is the analyst
    token = re.search(r'name="csrf" value="([0-9a-f]+)"', page.text).group(1)
    assert client.post("/console/sign-out", headers=browser).status_code == 403  # only a page of this session may
    assert client.post("/console/sign-out", data={"csrf": token}, headers=browser, follow_redirects=False).status_code == 303
    client.cookies.clear()
    assert client.get("/v1/models", headers={"Cookie": answer.headers["set-cookie"].split(";")[0]}).status_code == 401


# ---- operation -----------------------------------------------------------------------------------------------------------------------
def test_a_log_that_cannot_be_written_is_503_and_nothing_is_served(platform: Platform, keys: dict[str, str], player: str) -> None:
    with TestClient(endpoint.create_app(platform)) as client:
        bearer = {"Authorization": f"Bearer {keys['recommend']}"}
        log = client.portal.call(desk_of, client.app).service.log
        log._database.execute("PRAGMA query_only = ON")
        log._reconnect = lambda: None  # the disk stays broken
        assert client.get("/readyz").status_code == 503
        answer = client.post("/v1/recommendations", json={"players": [player]}, headers=bearer)
        assert (answer.status_code, answer.headers["content-type"], answer.headers["retry-after"]) == (503, "application/problem+json", "1")
        assert "recommendations" not in answer.json()
        assert client.post("/v1/recommendations", json={"players": [player], "dry_run": True}, headers=bearer).status_code == 200
        log._database.execute("PRAGMA query_only = OFF")
        assert client.post("/v1/recommendations", json={"players": [player]}, headers=bearer).status_code == 200


async def desk_of(application):
    return application.state.desk


def test_the_online_store_gone_is_said_and_answers_go_on(platform: Platform, keys: dict[str, str], player: str) -> None:
    directory = Workspace(platform.root).feast
    with TestClient(endpoint.create_app(platform)) as client:
        bearer = {"Authorization": f"Bearer {keys['analyst']}"}
        directory.rename(directory.with_name("away"))
        try:
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            answer = client.post("/v1/recommendations", json={"players": [player]}, headers=bearer).json()["recommendations"][0]
            assert "online store" in answer["degraded"]
            assert client.get(f"/v1/players/{player}", headers=bearer).status_code == 503
            event = {"player_id": player, "occurred_at": datetime.now(UTC).isoformat(), next(iter(platform.state.measures)): 1.0}
            kept = client.post("/v1/activity", json={"events": [event]}, headers=bearer)
            assert (kept.status_code, bool(kept.json()["degraded"])) == (200, True)
        finally:
            directory.with_name("away").rename(directory)
        until = time.monotonic() + 10
        while client.portal.call(desk_of, client.app).service.log.unapplied() and time.monotonic() < until:
            time.sleep(0.1)
        assert not client.portal.call(desk_of, client.app).service.log.unapplied()


def test_without_the_registry_the_model_in_service_serves_on(platform: Platform, keys: dict[str, str], player: str) -> None:
    directory = Workspace(platform.root).mlflow
    with TestClient(endpoint.create_app(platform)) as client:
        directory.rename(directory.with_name("mlflow away"))
        try:
            time.sleep(2 * desk.FOLLOW_SECONDS)
            bearer = {"Authorization": f"Bearer {keys['recommend']}"}
            answer = client.post("/v1/recommendations", json={"players": [player]}, headers=bearer)
            assert (answer.status_code, answer.json()["recommendations"][0]["policy"]) == (200, "fastq")
            assert client.get("/readyz").status_code == 200
        finally:
            shutil.rmtree(directory, ignore_errors=True)  # an empty one, if the registry was asked meanwhile
            directory.with_name("mlflow away").rename(directory)


def test_without_a_champion_the_server_is_up_and_not_ready(platform: Platform, tmp_path: Path, keys: dict[str, str]) -> None:
    workspace = shutil.copytree(platform.root, tmp_path / "workspace")
    shutil.rmtree(workspace / ".fastq" / "mlflow")
    with TestClient(endpoint.create_app(load_platform(workspace))) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        answer = client.post("/v1/recommendations", json={"players": ["p1"]}, headers={"Authorization": f"Bearer {keys['recommend']}"})
        assert answer.status_code == 503


def test_a_new_champion_is_taken_and_a_damaged_one_is_not(trained: Path, tmp_path: Path) -> None:
    platform = load_platform(shutil.copytree(trained, tmp_path / "workspace"))
    key = auth.create_key(Workspace(platform.root), "recommend")["key"]
    first = registry.champion(platform)
    bundles = []
    for number in range(2):
        bundle = shutil.copytree(registry.fetch(platform, first), tmp_path / f"bundle-{number}")
        for path in bundle.iterdir():
            path.chmod(0o600)
        with registry.start_run(platform, "again", {}) as run:
            bundles.append(registry.register(platform, run.id, bundle))
    with TestClient(endpoint.create_app(platform)) as client:
        assert version(client, key) == first
        registry.promote(platform, bundles[0], reason="test", forced=True)
        assert wait_for(client, key, bundles[0])
        registry.fetch(platform, bundles[1])
        weights = Workspace(platform.root).models / bundles[1] / "weights.safetensors"
        weights.chmod(0o600)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
        with pytest.raises(BundleError, match="is not the file"):
            registry.promote(platform, bundles[1], reason="test", forced=True)
        # somebody who goes round us
        registry._client(platform).set_registered_model_alias(platform.platform, registry.CHAMPION, bundles[1])
        time.sleep(2.5)
        assert version(client, key) == bundles[0]
        assert "fastq_models_refused_total 1.0" in client.get("/metrics").text
        registry.promote(platform, first, reason="test", forced=True)
        assert wait_for(client, key, first)


def test_the_registry_is_asked_when_it_has_changed_and_not_every_second(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask takes milliseconds of the interpreter, a second's slowest requests; a promotion is taken as soon as ever."""
    platform = load_platform(shutil.copytree(trained, tmp_path / "workspace"))
    key = auth.create_key(Workspace(platform.root), "recommend")["key"]
    bundle = shutil.copytree(registry.fetch(platform, registry.champion(platform)), tmp_path / "bundle")
    with registry.start_run(platform, "again", {}) as run:
        second = registry.register(platform, run.id, bundle)
    asked, champion = [], registry.champion
    monkeypatch.setattr(registry, "champion", lambda of: asked.append(time.monotonic()) or champion(of))
    monkeypatch.setattr(desk, "FOLLOW_SECONDS", 0.05)
    with TestClient(endpoint.create_app(platform)) as client:
        time.sleep(1.5)
        settled = len(asked)
        time.sleep(1)
        assert len(asked) == settled <= 8
        registry.promote(platform, second, reason="test", forced=True)
        assert wait_for(client, key, second)


def test_a_challenger_that_cannot_be_loaded_holds_up_no_exclusion(trained: Path, tmp_path: Path) -> None:
    workspace = shutil.copytree(trained, tmp_path / "workspace")
    (workspace / "excluded.csv").write_text("player_id\nsomebody\n")
    file = workspace / "fastq.yaml"
    file.write_text(file.read_text().replace("serving: {", 'serving: {exclude: excluded.csv, challenger: {share: 0.5, version: "99"}, '))
    platform = load_platform(workspace)
    assert platform.serving.challenger.version == "99"
    key = auth.create_key(Workspace(platform.root), "recommend")["key"]
    with TestClient(endpoint.create_app(platform)) as client:
        version(client, key)
        (workspace / "excluded.csv").write_text("player_id\nsomebody\np00001\n")
        until = time.monotonic() + 20
        while "excluded" not in str(why := degraded(client, key, "p00001")):
            assert time.monotonic() < until, f"still {why!r}"
            time.sleep(0.2)


def degraded(client: TestClient, key: str, player_id: str) -> str | None:
    answer = client.post("/v1/recommendations", json={"players": [player_id], "dry_run": True}, headers={"Authorization": f"Bearer {key}"})
    return answer.json()["recommendations"][0]["degraded"]


def version(client: TestClient, key: str) -> str:
    answer = client.post("/v1/recommendations", json={"players": ["nobody-yet"], "dry_run": True}, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    return answer.json()["recommendations"][0]["model_version"]


def wait_for(client: TestClient, key: str, wanted: str) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if version(client, key) == wanted:
            return True
    return False


def changed(platform: Platform, **serving: object) -> Platform:
    return platform.model_copy(update={"serving": platform.serving.model_copy(update=serving)})


def test_a_key_that_asks_too_often_is_told_when_to_come_back(platform: Platform, keys: dict[str, str]) -> None:
    with TestClient(endpoint.create_app(changed(platform, rate_limit=5))) as client:

        def ask(role: str):
            return client.post("/v1/recommendations", json={"players": ["nobody-yet"], "dry_run": True}, headers={"Authorization": f"Bearer {keys[role]}"})

        answers = [ask("recommend") for _ in range(40)]
        refused = [a for a in answers if a.status_code == 429]
        assert {a.status_code for a in answers} == {200, 429}
        assert 5 <= 40 - len(refused) <= 25
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].headers["content-type"] == "application/problem+json"
        assert ask("analyst").status_code == 200  # another key
        assert client.get("/healthz").status_code == 200
        assert f'fastq_refused_total{{reason="rate"}} {float(len(refused))}' in client.get("/metrics").text
        time.sleep(0.5)
        assert ask("recommend").status_code == 200


def test_more_than_can_be_answered_soon_is_refused_and_nothing_of_it_is_stored(
    platform: Platform, keys: dict[str, str], player: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "MOST_UNDER_WAY", 3)
    decide = online.decide
    monkeypatch.setattr(online, "decide", lambda *given: (time.sleep(0.05), decide(*given))[1])
    with TestClient(endpoint.create_app(platform)) as client, concurrent.futures.ThreadPoolExecutor(24) as pool:
        log = client.portal.call(desk_of, client.app).service.log
        before = log.counts()["decisions"]
        bearer = {"Authorization": f"Bearer {keys['recommend']}"}
        answers = list(pool.map(lambda _: client.post("/v1/recommendations", json={"players": [player]}, headers=bearer), range(120)))
        assert {a.status_code for a in answers} == {200, 503}
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
        assert log.counts()["decisions"] - before == sum(a.status_code == 200 for a in answers)


def test_long_questions_wait_in_a_short_line(platform: Platform) -> None:
    async def ask() -> list[str]:
        turns = desk.Turns(desk.Desk(platform, auth.Keys(Workspace(platform.root)), metrics.new_metrics()), 1)
        gone_on = asyncio.Event()

        async def one() -> str:
            try:
                async with turns.one():
                    await gone_on.wait()
            except refusals.Overloaded:
                return "refused"
            return "answered"

        asked = [asyncio.create_task(one()) for _ in range(desk.MOST_TURNS + 4)]
        await asyncio.sleep(0)
        gone_on.set()
        return await asyncio.gather(*asked)

    said = asyncio.run(ask())
    assert said == ["answered"] * (desk.MOST_TURNS + 1) + ["refused"] * 3


RAYS_PROXY = """global
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout server 3600s
    errorfile 502 {0}/500.http
    errorfile 503 {0}/500.http
    option redispatch 1
    retry-on conn-failure
frontend prometheus
    bind :{1}
frontend http_frontend
    bind 127.0.0.1:{2}
    default_backend http-fastq
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \'%[path]\' not found. Ping http://.../-/routes for available routes."
backend http-fastq
    default-server fastinter 250ms downinter 250ms fall 2 rise 2 inter 5s check
    server SERVE_REPLICA_fastq-fastq-6lgqhh9y 127.0.0.1:30000 check observe layer4 error-limit 3 on-error mark-down
    server SERVE_PROXY_ACTOR-fallback-fb 127.0.0.1:25035 check backup
listen stats
  bind *:{3}
"""


def test_the_proxy_is_shut_and_has_an_end_to_its_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    metrics, door, stats = free_ports(3)
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    said = tmp_path / "haproxy.cfg"
    said.write_text(RAYS_PROXY.format(tmp_path, metrics, door, stats))
    script = app.closed_haproxy(tmp_path, stats, metrics)
    for _ in range(2):  # Ray starts it again with the same file
        checked = subprocess.run([str(script), "-c", "-f", str(said)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
    lines = [line.strip() for line in said.read_text().splitlines()]
    assert {line for line in lines if line.startswith("bind")} == {f"bind 127.0.0.1:{port}" for port in (metrics, door, stats)}
    assert lines.count(f"timeout connect {app.NEAR}") == 1
    assert lines.count(f"timeout queue {app.PATIENCE}") == lines.count("option http-buffer-request") == 1
    assert [line.count("maxconn") for line in lines if line.startswith("server ")] == [1]
    assert lines.count("retry-on conn-failure empty-response") == lines.count("http-request deny deny_status 503") == 1
    assert [line for line in lines if "disable-l7-retry" in line] == [
        "http-request disable-l7-retry if { path /v1/recommendations } !{ req.hdr(Idempotency-Key) -m found }"
    ]
    assert f"errorfile 503 {tmp_path / '503.http'}" in lines
    head, _, body = (tmp_path / "503.http").read_bytes().decode().partition("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head and "Retry-After: 1" in head and json.loads(body)["status"] == 503


def test_a_pause_reaches_a_running_server_within_a_second(client: TestClient, call, platform: Platform, player: str) -> None:
    policy = platform.policies[0]
    assignment.pause(platform, policy, who="test")
    try:
        until = time.monotonic() + 1
        body = {"players": [player], "proposals": {policy: action(platform)}}
        while (answer := call("POST", "/v1/recommendations", body, "recommend")[1]["recommendations"][0])["policy"] != policy:
            assert time.monotonic() < until, "still fastq's after a second"
        assert answer["action"] == action(platform)
        assert "paused" in answer["degraded"]
        assert (client.get("/readyz").status_code, client.get("/readyz").json()["status"]) == (200, "paused")
        assert "fastq_paused 1.0" in client.get("/metrics").text
    finally:
        assignment.resume(platform, who="test")
    until = time.monotonic() + 1
    while call("POST", "/v1/recommendations", body, "recommend")[1]["recommendations"][0]["policy"] != "fastq":
        assert time.monotonic() < until, "still paused after a second"
    assert client.get("/readyz").json()["status"] == "ready"


def test_two_requests_at_once_cannot_both_have_the_last_of_a_budget(platform: Platform, keys: dict[str, str], player: str) -> None:
    with TestClient(endpoint.create_app(changed(platform, frequency=Cap(most=1)))) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        bearer, fresh = {"Authorization": f"Bearer {keys['recommend']}"}, f"{player}"
        log = client.portal.call(desk_of, client.app).service.log
        had = sum(past.drawn for past in log.recent([fresh], time.time_ns() // 1000 - 86_400_000_000))
        answers = list(pool.map(lambda _: client.post("/v1/recommendations", json={"players": [fresh]}, headers=bearer).json(), range(16)))
        drawn = [a for a in answers if a["recommendations"][0]["propensity"] is not None]
        assert len(drawn) == max(1 - had, 0)
        assert len(answers) == 16
        store_only = store.materialized(platform)["player_id"].tail(1).item()
        answers = list(pool.map(lambda _: client.post("/v1/recommendations", json={"players": [store_only]}, headers=bearer).json(), range(16)))
        assert sum(a["recommendations"][0]["propensity"] is not None for a in answers) == 1


def test_metrics_count(client: TestClient, call, player: str) -> None:
    call("POST", "/v1/recommendations", {"players": [player, "nobody-yet"]})
    text = client.get("/metrics").text
    for line in (
        "fastq_decisions_total{",
        'fastq_degraded_total{reason="unknown player"}',
        'fastq_requests_total{method="POST",route="/v1/recommendations",status="200"}',
        "fastq_model_info{version=",
        "fastq_decision_log_backlog 0.0",
        "fastq_cold_starts_total",
        'fastq_propensity_bucket{le="1.0",model_version=',
        "fastq_action_share_count{dimension=",
        "fastq_paused 0.0",
    ):
        assert line in text, line
    assert player not in text


def test_what_the_proxy_refused_is_counted(tmp_path: Path) -> None:
    """The proxy's own words, a fragment of HAProxy 2.8's `show stat`; and one that says nothing or is not there."""
    said = "# pxname,svname,qcur,econ,hrsp_5xx\nhttp,FRONTEND,,,9\nfastq,r0,0,4,2\nfastq,BACKEND,0,7,9\nother,BACKEND,0,1,1\n\n"
    address = tmp_path / "admin.sock"
    (tmp_path / "node").mkdir()
    with socket.socket(socket.AF_UNIX) as proxy, concurrent.futures.ThreadPoolExecutor(1) as pool:
        proxy.bind(str(tmp_path / "node" / "admin.sock"))
        proxy.listen()

        def answer(text: str) -> bytes:
            with proxy.accept()[0] as asked:
                heard = asked.recv(100)
                asked.sendall(text.encode())
            return heard

        heard = pool.submit(answer, said)
        (family,) = ProxyRefusals(address).collect()
        assert [sample.value for sample in family.samples] == [8]
        assert heard.result() == b"show stat\n"
        heard = pool.submit(answer, "")
        (family,) = ProxyRefusals(address).collect()
        assert [sample.value for sample in family.samples] == [0]
        heard.result()
    (family,) = ProxyRefusals(tmp_path / "nowhere").collect()
    assert family.samples == []


def test_a_clock_that_jumps_loses_and_repeats_nothing(call, platform: Platform, player: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two days ahead, then a day back behind where it was: what is served, reported and posted stands, and the newest word counts."""
    shift, objective, measure = timedelta(), next(iter(platform.objectives)), next(iter(platform.state.measures))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + shift

    read = decision_log.now_us
    monkeypatch.setattr(online, "datetime", Clock)
    for module in (decision_log, online, bodies):
        monkeypatch.setattr(module, "now_us", lambda: read() + round(shift.total_seconds() * 1e6))
    served: list[str] = []
    for days in (0, 2, -1, 0):
        shift = timedelta(days=days)
        status, answer = call("POST", "/v1/recommendations", {"players": [player] * 3}, "recommend")
        assert status == 200, answer
        served += [decision["decision_id"] for decision in answer["recommendations"]]
        reported = {"outcomes": [{"decision_id": served[0], objective: 1.0 + days}], "correct": True}
        assert call("POST", "/v1/outcomes", reported, "recommend") == (200, {"accepted": 1, "already_known": 0})
        assert call("GET", f"/v1/decisions/{served[0]}")[1]["outcomes"][objective] == 1.0 + days
        event = {"player_id": player, "occurred_at": Clock.now(UTC).isoformat(), measure: 1}
        assert call("POST", "/v1/activity", {"events": [event]}, "recommend") == (200, {"accepted": 1, "already_known": 0, "degraded": None})
        assert call("POST", "/v1/activity", {"events": [event]}, "recommend")[1]["already_known"] == 1
    assert len(set(served)) == len(served)
    assert all(call("GET", f"/v1/decisions/{decision}")[0] == 200 for decision in served)
    assert all(call("POST", "/v1/explanations", {"decision_id": decision})[0] == 200 for decision in served[::3])


# ---- behind Ray Serve ------------------------------------------------------------------------------------------------------------------
def test_a_server_without_a_champion_or_with_an_open_door_does_not_start(platform: Platform, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    shutil.copy(platform.root / "fastq.yaml", workspace)
    bare = load_platform(workspace)
    with pytest.raises(BundleError, match="no champion"):
        app.serve(bare)
    with pytest.raises(ConfigurationError, match="fastq keys create"):
        app.serve(bare, "0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="cannot be listened on"):
            app.serve(platform, "127.0.0.1", taken.getsockname()[1])
    with Workspace(platform.root).lock("serve"), pytest.raises(WorkspaceError, match="serve"):
        app.serve(platform)


def start(workspace: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    program = "import sys; from fastq.cli import main; sys.argv = ['fastq', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", program, "serve", "--port", str(port), "--workspace", str(workspace)]
    with log.open("ab") as said:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
    until = time.monotonic() + 180
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-2000:]
        if "fastq serves" in log.read_text():  # readiness alone might be that of a proxy that outlived its server
            assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
            return process
        time.sleep(0.3)
    raise AssertionError(log.read_text()[-2000:])


def ours(workspace: Path) -> dict[int, set[str]]:
    """Processes that a server of this workspace has started, and the addresses they listen on."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(app.MARK) == str(workspace):
                found[process.pid] = {c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_serve_from_start_to_kill_to_start_to_a_clean_end(trained: Path, tmp_path: Path) -> None:
    """kill -9 of the whole group loses nothing that was acknowledged; SIGTERM ends with 0, frees the port and leaves no process and no file of Ray's."""
    workspace = shutil.copytree(trained, tmp_path / "workspace")
    key = auth.create_key(Workspace(workspace), "analyst")["key"]
    (port,) = free_ports(1)
    log, url, bearer = tmp_path / "log", f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}
    process = start(workspace, port, log)
    try:
        assert set().union(*ours(workspace).values()) == {"127.0.0.1"}
        ids = [
            httpx.post(f"{url}/v1/recommendations", json={"players": ["nobody-yet"]}, headers=bearer).json()["recommendations"][0]["decision_id"]
            for _ in range(20)
        ]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        log.unlink()
        process = start(workspace, port, log)  # on the same port, which the dead server's proxy may still hold
        assert [i for i in ids if httpx.get(f"{url}/v1/decisions/{i}", headers=bearer).status_code != 200] == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            app.sweep(workspace, app.ray_directory(workspace))
    assert "Traceback" not in log.read_text()
    assert ours(workspace) == {}
    assert not app.ray_directory(workspace).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
