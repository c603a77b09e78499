"""The console's pages as a browser gets them, without a browser: who may, what a form must bring, what is shown where something is wanting."""

from __future__ import annotations

import html
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from fastapi.testclient import TestClient

from fastq import registry
from fastq.platform import Platform, load_platform
from fastq.workspace import Workspace
from feature_repo import store
from serving import auth, endpoint, pages, views
from serving.online import Question

BROWSER = {"Accept": "text/html,application/xhtml+xml"}
HOSTILE = """"><script>document.title='taken'</script><img src=x onerror=alert(1)>{{ 7*7 }}&amp;"""
CHANGES = [("/console/sign-out", {}), ("/console/models", {"what": "rollback", "reason": "x"}), ("/console/what-if", {"player": "p00001"})]


@pytest.fixture(scope="module")
def platform(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    return load_platform(shutil.copytree(trained, tmp_path_factory.mktemp("console") / "workspace"))


@pytest.fixture(scope="module")
def keys(platform: Platform) -> dict[str, str]:
    return {role: auth.create_key(Workspace(platform.root), role)["key"] for role in auth.ROLES}


@pytest.fixture(scope="module")
def second(platform: Platform) -> str:
    """Another version of the same bundle, refused by the gate."""
    with registry.start_run(platform, "again", {}) as run:
        version = registry.register(platform, run.id, registry.fetch(platform))
    registry.record_verdict(platform, version, passed=False, reasons=["not shown to be better than <b>1</b>"])
    return version


@pytest.fixture(scope="module")
def app(platform: Platform, second: str):
    made = endpoint.create_app(platform)
    with TestClient(made):
        yield made


@pytest.fixture
def visit(app, keys: dict[str, str]):
    """`visit(role)` is a browser that signed in with that role's key; `visit(None)` one that did not."""

    def signed_in(role: str | None) -> TestClient:
        client = TestClient(app, headers=BROWSER, follow_redirects=True, raise_server_exceptions=False)
        if role is not None:
            assert client.post("/console", data={"key": keys[role]}).status_code == 200
        return client

    return signed_in


@pytest.fixture(scope="module")
def player(platform: Platform) -> str:
    return str(store.known_players(platform).sort("seen_at", descending=True, nulls_last=True)["player_id"][0])


def token(page: str) -> str:
    return re.search(r'name="csrf" value="([0-9a-f]+)"', page).group(1)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def harmless(page: str) -> Elements:
    """Nothing of the page runs or loads but our own script, whatever was written into it."""
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in {"iframe", "object", "embed", "base", "style"}
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href", "action", "formaction"):
            assert (attributes.get(name) or "/console").startswith(("/console", "/metrics", "#main")), (tag, attributes)
        assert tag != "script" or attributes["src"].startswith("/console/assets/console.js?")
    return elements


# ---- who may -----------------------------------------------------------------------------------------------------------------
PAGES = ["/console", "/console/player?id=PLAYER", "/console/what-if?player=PLAYER", "/console/policies", "/console/models", "/console/health"]


@pytest.mark.parametrize("address", PAGES)
def test_every_page_is_whole_linkable_and_allows_nothing_from_elsewhere(visit, player: str, address: str) -> None:
    address = address.replace("PLAYER", player)
    answer = visit("analyst").get(address)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    harmless(answer.text)
    assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    form = visit(None).get(address)  # a colleague without a session gets the form, and after it this page
    assert 'name="key"' in form.text
    assert f'name="wanted" value="{html.escape(address)}"' in form.text


def test_signing_in_leads_where_one_wanted_to_go_and_nowhere_else(visit, app, keys: dict[str, str], player: str) -> None:
    client = TestClient(app, headers=BROWSER, follow_redirects=False)
    for wanted, leads in (
        (f"/console/player?id={player}", f"/console/player?id={player}"),
        ("https://elsewhere.example/", "/console"),
        ("//elsewhere.example/console", "/console"),
        ("/console/..//elsewhere.example", "/console"),
        ("/v1/models", "/console"),
    ):
        assert client.post("/console", data={"key": keys["analyst"], "wanted": wanted}).headers["location"] == leads


def test_forged_stale_and_foreign_sessions_open_nothing(visit, app, keys: dict[str, str], platform: Platform) -> None:
    signed_in = visit("analyst")
    cookie = signed_in.cookies[auth.COOKIE]
    for forged in ("", "x", cookie[:-1] + ("0" if cookie[-1] != "0" else "1"), cookie.upper(), f"{cookie}; {auth.COOKIE}=x"[:200].replace(cookie, "0" * 64)):
        answer = TestClient(app, headers=BROWSER, cookies={auth.COOKIE: forged}).get("/console/models")
        assert 'name="key"' in answer.text
        assert "Version 1" not in answer.text
    with auth._database(Workspace(platform.root)) as database:
        database.execute("UPDATE sessions SET expires_at = 1")
    stale = signed_in.get("/console/models")
    assert "has ended" in stale.text
    assert 'name="key"' in stale.text


def test_a_key_that_was_revoked_ends_its_sessions(app, platform: Platform) -> None:
    key = auth.create_key(Workspace(platform.root), "analyst")
    time.sleep(auth.FRESH_SECONDS)
    client = TestClient(app, headers=BROWSER)
    assert "Sign out" in client.post("/console", data={"key": key["key"]}).text
    auth.revoke_key(Workspace(platform.root), key["id"])
    assert "Sign out" not in client.get("/console").text


@pytest.mark.parametrize(("address", "form"), CHANGES)
def test_a_form_of_another_site_changes_nothing(visit, platform: Platform, player: str, address: str, form: dict[str, str]) -> None:
    client = visit("admin")
    audit = Workspace(platform.root).audit.read_text()
    right = token(client.get("/console").text)
    wrong = token(visit("admin").get("/console").text)  # of another session
    refused = [
        client.post(address, data=form),
        client.post(address, data=form | {"csrf": wrong}),
        client.post(address, data=form | {"csrf": "é"}),
        client.post(address, data=form | {"csrf": right}, headers={"Origin": "https://elsewhere.example"}),
        client.post(address, data=form | {"csrf": right}, headers={"Sec-Fetch-Site": "cross-site"}),
    ]
    assert [answer.status_code for answer in refused] == [403] * len(refused)
    assert "Sign out" in client.get("/console").text
    assert Workspace(platform.root).audit.read_text() == audit


def test_a_browser_signs_in_with_a_form_that_was_made_here(app, keys: dict[str, str]) -> None:
    client = TestClient(app, headers=BROWSER | {"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}, follow_redirects=False)
    assert client.post("/console", data={"key": keys["analyst"]}).status_code == 403
    csrf = token(client.get("/console").text)
    answer = client.post("/console", data={"key": keys["analyst"], "csrf": csrf})
    assert answer.status_code == 303
    assert {"httponly", "samesite=strict"} <= set(answer.headers["set-cookie"].lower().split("; "))


def test_too_small_a_role_neither_signs_in_nor_promotes(visit, app, keys: dict[str, str], second: str, platform: Platform) -> None:
    assert TestClient(app, headers=BROWSER).post("/console", data={"key": keys["recommend"]}).status_code == 403
    analyst = visit("analyst")
    page = analyst.get("/console/models").text
    assert "<textarea" not in page
    answer = analyst.post("/console/models", data={"what": "promote", "version": second, "reason": "because", "forced": "yes", "csrf": token(page)})
    assert answer.status_code == 403
    assert "a key with the role admin is needed" in answer.text.lower()
    assert registry.champion(platform) == "1"


# ---- promotion ---------------------------------------------------------------------------------------------------------------
def test_promotion_and_rollback_take_a_reason_which_is_kept(visit, platform: Platform, second: str) -> None:
    admin = visit("admin")
    page = admin.get("/console/models").text
    harmless(page)
    assert "not shown to be better than &lt;b&gt;1&lt;/b&gt;" in page
    form = {"what": "promote", "version": second, "csrf": token(page)}
    for wanting, said in (({"reason": " "}, "A reason is needed"), ({"reason": "because"}, "not shown to be better")):
        refused = admin.post("/console/models", data=form | wanting)
        assert refused.status_code == 409
        assert said in refused.text
        assert registry.champion(platform) == "1"
    assert f"Version {second} is the champion." in admin.post("/console/models", data=form | {"reason": HOSTILE, "forced": "yes"}).text
    assert registry.champion(platform) == second
    line = json.loads(Workspace(platform.root).audit.read_text().splitlines()[-1])
    assert (line["action"], line["version"], line["reason"], line["forced"]) == ("promote", second, HOSTILE, True)
    assert line["who"].startswith("key ")
    after = harmless(admin.get("/console/models").text)
    assert HOSTILE in after.text
    back = admin.post("/console/models", data={"what": "rollback", "reason": "it was worse", "csrf": token(page)})
    assert "Version 1 is the champion." in back.text
    assert registry.champion(platform) == "1"
    assert json.loads(Workspace(platform.root).audit.read_text().splitlines()[-1])["reason"] == "it was worse"


# ---- players -------------------------------------------------------------------------------------------------------------------
def test_players_are_found_by_a_part_of_their_id_and_by_attribute(visit, platform: Platform, player: str) -> None:
    analyst = visit("analyst")
    known = store.known_players(platform)
    assert f">{player}</a>" in analyst.get("/console", params={"q": player[-4:]}).text
    region = known["region"][0]
    place = list(platform.state.attributes).index("region")
    page = analyst.get("/console", params={f"is.{place}": region}).text
    assert f"{len(known.filter(known['region'] == region)):,} of {len(known):,} players" in page
    assert "Nobody is known under this" in analyst.get("/console", params={"q": HOSTILE}).text
    harmless(analyst.get("/console", params={"q": HOSTILE, f"is.{place}": HOSTILE}).text)
    tenure = list(platform.state.attributes).index("tenure_days")
    assert analyst.get("/console", params={f"min.{tenure}": "many"}).status_code == 422


def test_a_player_nobody_knows_one_without_decisions_and_one_with_one(visit, keys: dict[str, str]) -> None:
    analyst = visit("analyst")
    for address in (f"/console/player?id={HOSTILE}", "/console/player", "/console/what-if", "/console/decision?id=none", "/console/nowhere"):
        nobody = analyst.get(address)
        assert nobody.status_code == 404
        harmless(nobody.text)
    bearer = {"Authorization": f"Bearer {keys['admin']}"}
    at = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    assert analyst.post("/v1/activity", json={"events": [{"player_id": HOSTILE, "occurred_at": at, "games": 3}]}, headers=bearer).status_code == 200
    page = analyst.get("/console/player", params={"id": HOSTILE})
    assert page.status_code == 200
    assert HOSTILE in harmless(page.text).text
    assert "No decision is on record" in page.text
    assert "Nothing is known of win rate" in page.text  # one line, and no empty charts
    assert page.text.count("no data</span></figcaption>") == 0
    assert "What followed" not in page.text
    decision = analyst.post("/v1/recommendations", json={"players": [HOSTILE]}, headers=bearer).json()["recommendations"][0]
    page = analyst.get("/console/player", params={"id": HOSTILE}).text
    assert f"/console/decision?id={decision['decision_id']}" in page
    assert "nothing reported yet" in page
    harmless(page)
    then = analyst.get("/console/decision", params={"id": decision["decision_id"]})
    assert then.status_code == 200
    assert "As it was decided then" in then.text
    assert HOSTILE in harmless(then.text).text
    analyst.post("/v1/outcomes", json={"outcomes": [{"decision_id": decision["decision_id"], "returns": 0.625}]}, headers=bearer)
    assert "0.625" in analyst.get("/console/decision", params={"id": decision["decision_id"]}).text
    assert analyst.get("/console/what-if", params={"decision": decision["decision_id"]}).status_code == 200


def test_a_player_s_attributes_are_shown_now_and_as_they_were_then(visit, keys: dict[str, str], platform: Platform, player: str) -> None:
    analyst, bearer = visit("analyst"), {"Authorization": f"Bearer {keys['admin']}"}
    decision = analyst.post("/v1/recommendations", json={"players": [player]}, headers=bearer).json()["recommendations"][0]
    known = store.known_players(platform).row(by_predicate=pl.col("player_id") == player, named=True)
    for address in (f"/console/player?id={player}", f"/console/decision?id={decision['decision_id']}"):
        page = analyst.get(address).text
        for name in platform.state.attributes:
            value = f"{known[name]:g}" if isinstance(known[name], float | int) else known[name]
            assert f"<dt>{name.replace('_', ' ')}</dt><dd>{value}</dd>" in page, (address, name)


def test_a_player_nobody_knows_who_was_served_all_the_same_is_told_of(visit, keys: dict[str, str]) -> None:
    analyst, bearer = visit("analyst"), {"Authorization": f"Bearer {keys['admin']}"}
    asked = {"players": ["came unseen"]}
    (made,) = analyst.post("/v1/recommendations", json=asked, headers=bearer).json()["recommendations"]
    assert made["degraded"]
    page = analyst.get("/console/player", params={"id": "came unseen"})
    assert page.status_code == 404
    assert "nothing is known of this player; they were served 1 decision all the same, the last on " in page.text


def test_numbers_in_a_sentence_have_the_minus_that_all_others_have() -> None:
    said = "90 % interval -0.2 to -1e-05, retain-2 and p-7: 2026-11-26"
    assert views._typeset(said) == "90 % interval −0.2 to −1e-05, retain-2 and p-7: 2026-11-26"


@pytest.mark.parametrize("against", ["stretch", "retain", "logged", "model:2", "none", "action"])
def test_an_action_is_compared_with_whatever_is_asked_for(visit, platform: Platform, player: str, against: str) -> None:
    typed = {f"a.{i}": str(low) for i, (low, _) in enumerate(platform.bounds)} if against == "action" else {}
    page = visit("analyst").get("/console/player", params={"id": player, "against": against, **typed})
    assert page.status_code == 200
    assert "Cannot be compared" not in page.text
    harmless(page.text)
    headline = re.search(r'<p class="headline">(.*?)</p>', page.text, re.DOTALL).group(1)
    assert ("instead of" in headline) == (against != "none")


def test_what_cannot_be_compared_is_said_and_the_rest_is_shown(visit, platform: Platform, player: str) -> None:
    for against in ("model:99", "nobody", HOSTILE):
        page = visit("analyst").get("/console/player", params={"id": player, "against": against})
        assert page.status_code == 200
        assert "Cannot be compared with that" in page.text
        assert "What it is worth" in page.text
        harmless(page.text)
    assert visit("analyst").get("/console/player", params={"id": player, "against": "action", "a.0": "nan"}).status_code == 422


def test_a_model_that_is_deleted_meanwhile_is_missed_only_where_it_is_needed(visit, app, platform: Platform, player: str) -> None:
    with registry.start_run(platform, "short-lived", {}) as run:
        version = registry.register(platform, run.id, registry.fetch(platform))
    analyst = visit("analyst")
    assert f"model {version}" in analyst.get("/console/player", params={"id": player}).text
    registry._client(platform).delete_model_version(platform.platform, version)
    page = analyst.get("/console/player", params={"id": player, "against": f"model:{version}"})
    assert page.status_code == 200
    assert "Cannot be compared with that" in page.text
    admin = visit("admin")
    form = {"what": "promote", "version": version, "reason": "late", "forced": "yes", "csrf": token(admin.get("/console/models").text)}
    assert admin.post("/console/models", data=form).status_code == 409


def test_whatever_stands_in_the_logs_is_shown_as_text(app, platform: Platform, player: str) -> None:
    """Attributes, policies, items, units and decisions as hostile as they can be, on every page that shows them."""

    def poisoned(value):
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, dict):
            return {name: poisoned(one) for name, one in value.items()}
        return [poisoned(one) for one in value] if isinstance(value, list) else value

    service, made = app.state.desk.open(), app.state.paper
    about = {"signed_in": auth.Caller("k", "admin"), "here": "/console", "csrf": "c", "asked": HOSTILE}
    shown = views.subject_page(service, Question(player_id=player))
    for name in ("attributes", "listed", "headline", "against_words", "policy_last", "standing", "notice", "thin", "self_path", "subject_id", "first_day"):
        shown[name] = HOSTILE if shown[name] is None else poisoned(shown[name])
    shown["answer"]["evidence"] = poisoned(shown["answer"]["evidence"])
    shown["chances"] = [(HOSTILE, share) for _, share in shown["chances"]]
    shown["alternatives"] = [(HOSTILE, HOSTILE)]
    shown["dimensions"] = [d | {"unit": HOSTILE} for d in shown["dimensions"]]
    for name in ("measures", "done", "followed", "responses"):
        shown[name] = [replace(panel, name=HOSTILE, unit=HOSTILE) for panel in shown[name]]
    for name in ("parts", "waterfall"):
        shown[name] = replace(shown[name], rows=[replace(row, objective=HOSTILE) for row in shown[name].rows])
    page = harmless(made.page("player.html", **about, **shown).body.decode())
    assert page.text.count(HOSTILE) > 40
    health = poisoned(views.health_page(app.state.desk, {"champion": HOSTILE, "log": "ok", "store": HOSTILE, "paused": HOSTILE}))
    health |= {"routes": [], "trained": None}
    harmless(made.page("health.html", **about, **health).body.decode())


def test_two_analysts_at_once_get_their_own_answers(visit, platform: Platform) -> None:
    players = store.known_players(platform)["player_id"].head(2).to_list()
    told: dict[str, set[str]] = {p: set() for p in players}

    def read(player_id: str) -> None:
        client = visit("analyst")
        for _ in range(3):
            page = client.get("/console/player", params={"id": player_id}).text
            told[player_id].add(re.search(r'<p class="headline">(.*?)</p>', page, re.DOTALL).group(1))
            assert f"<h1>{player_id}</h1>" in page

    threads = [threading.Thread(target=read, args=(p,)) for p in players]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(told[p]) for p in players] == [1, 1]
    assert told[players[0]] != told[players[1]]


def test_the_form_and_the_script_get_the_same_answer(visit, player: str) -> None:
    analyst = visit("analyst")
    asked = {"player": player, "w.4": "-2.5", "a.1": "20"}
    whole = analyst.get("/console/what-if", params=asked).text
    piece = analyst.post("/console/what-if", data=asked, headers={"X-CSRF-Token": token(whole), "Accept": "*/*"}).text
    assert "<html" not in piece
    answer = whole[whole.index('<section aria-labelledby="three">') : whole.index("</main>")]
    assert piece.split() == answer[: answer.rindex("</section>") + len("</section>")].split()
    wrong = analyst.post("/console/what-if", data=asked | {"w.4": "much"}, headers={"X-CSRF-Token": token(whole), "Accept": "*/*"})
    assert wrong.status_code == 422
    assert "cost" in wrong.text


def test_assets_are_open_kept_and_nothing_else_lies_beside_them(visit) -> None:
    stranger = visit(None)
    for name, kind in pages.ASSETS.items():
        answer = stranger.get(f"/console/assets/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert "immutable" in answer.headers["cache-control"]
    for name in ("player.html", "..%2fpages.py", "base.html"):
        assert stranger.get(f"/console/assets/{name}").status_code == 404
