"""The console as an analyst uses it, in a real browser: the whole way from signing in to signing out, with and without a script, by keyboard alone."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest

from fastq import registry
from fastq.workspace import Workspace

HOSTILE = """"><img src=x onerror="alert(1)"><script>alert(2)</script>"""
PAGES = {
    "find": "/console",
    "player": "/console/player?id={player}",
    "typed": "/console/player?id={player}&against=action&a.0=5&a.1=49&a.2=1",
    "what-if": "/console/what-if?player={player}&w.4=-2",
    "policies": "/console/policies",
    "models": "/console/models",
    "health": "/console/health",
    "nothing": "/console/player?id=nobody",
}


def numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-")) for found in re.findall(r"[+−-]?\d+(?:\.\d+)?", text)]


def test_from_signing_in_to_signing_out(analyst, console, keep) -> None:
    page = analyst(None)
    keep(page, "sign-in")
    page.fill("#key", "fq_wrong")
    page.click("main button")
    assert "not known here" in page.inner_text("[role=alert]")
    page.fill("#key", console.keys["admin"])
    page.click("main button")

    # find
    page.fill("#q", console.player[-3:])
    page.press("#q", "Enter")
    page.click(f"table a:text-is('{console.player}')")
    assert page.inner_text("h1") == console.player

    # explain: the sentence, and parts that add up to the total as they are printed
    assert "instead of what" in page.inner_text(".headline")
    worth = page.locator("section:has(#worth) table.parts")
    shown = [numbers(text)[0] for text in worth.locator("tbody td.n").all_inner_texts()]
    total = numbers(worth.locator("tr.total td.n").inner_text())[0]
    assert sum(shown) == pytest.approx(total, abs=1e-6)
    assert page.locator("figure.panel").count() >= len(console.platform.state.measures)

    # contrast, with a policy and with an action of one's own
    page.select_option("#against", "retain")
    page.click("text=Compare >> nth=-1")
    assert page.inner_text("#compare") == "Against retain"
    table = page.locator("#contrast table.parts")
    assert sum(numbers(t)[0] for t in table.locator("tbody td.n").all_inner_texts()) == pytest.approx(
        numbers(table.locator("tr.total td.n").inner_text())[0], abs=1e-6
    )
    keep(page, "contrast")
    page.click("summary:has-text('An action of my own')")
    page.select_option("#against", "action")
    page.fill("[id='a.1']", "49")
    page.click("#contrast button")
    assert "a.1=49" in page.url
    assert "Against the action you typed" in page.inner_text("#compare")

    # drag
    page.click("text=What if we did something else?")
    before = page.inner_text("#answer")
    bonus = page.locator("[id='a.1']")
    box = bonus.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    page.mouse.down()
    for share in (0.5, 0.7, 0.9):
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
    page.mouse.up()
    page.wait_for_function("old => document.getElementById('answer').innerText !== old", arg=before)
    page.wait_for_function("() => location.search.includes('a.1=')")
    keep(page, "dragged")
    assert "under your weights" in page.inner_text("#answer .headline")
    shown_now = page.inner_text("#answer")
    page.wait_for_timeout(300)
    page.reload()  # the address alone gives the same answer to a colleague
    assert page.inner_text("#answer") == shown_now or page.input_value("[id='a.1']") != ""

    # promote, with a reason, and back
    page.click("nav >> text=Models")
    card = page.locator(".version", has_text=f"Version {console.refused}")
    assert "The gate refused it." in card.inner_text()
    card.locator("summary").click()
    card.locator("textarea").fill("we want to see it for a week")
    card.locator("text=Promote >> nth=-1").click()
    assert "not shown to be better" in page.inner_text("[role=alert]")
    card = page.locator(".version", has_text=f"Version {console.refused}")
    card.locator("summary").click()
    card.locator("textarea").fill("we want to see it for a week")
    card.locator("input[type=checkbox]").check()
    card.locator("text=Promote >> nth=-1").click()
    assert f"Version {console.refused} is the champion." in page.inner_text("[role=status]")
    assert registry.champion(console.platform) == console.refused
    said = json.loads(Workspace(console.platform.root).audit.read_text().splitlines()[-1])
    assert said["reason"] == "we want to see it for a week"
    keep(page, "promoted")
    page.fill("#whyback", "seen enough")
    page.click("text=Roll back to version")
    assert registry.champion(console.platform) == "1"

    # sign out
    page.click("text=Sign out")
    assert page.locator("#key").count() == 1
    page.go_back()
    page.reload()
    assert page.locator("#key").count() == 1


@pytest.mark.parametrize(("scheme", "width"), list(product(("light", "dark"), (1280, 390))))
def test_no_accessibility_violation_and_no_sideways_scrolling_on_any_page(analyst, console, keep, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page, found = analyst(None, color_scheme=scheme, viewport={"width": width, "height": 900}), []

    def look(name: str) -> None:
        keep(page, f"{name}-{scheme}-{width}")
        result = Axe().run(page)
        found.extend(f"{name}: {v['id']}: {v['help']}: {[n['html'][:120] for n in v['nodes'][:3]]}" for v in result.response["violations"])
        if page.evaluate("document.documentElement.scrollWidth") > width:
            found.append(f"{name}: wider than the screen")

    look("sign-in")
    page.fill("#key", console.keys["admin"])
    page.click("main button")
    for name, address in PAGES.items():
        page.goto(console.url + address.format(player=console.player))
        look(name)
        tall = page.eval_on_selector_all("table.list tbody tr", "rows => Math.max(0, ...rows.map(row => row.offsetHeight))")
        if tall > 160:  # squeezed columns, one word a line
            found.append(f"{name}: a row of a table is {tall} pixels tall")
    assert not found, "\n".join(found)


def test_without_a_script_the_form_answers(analyst, console) -> None:
    page = analyst(java_script_enabled=False)
    page.goto(f"{console.url}/console/what-if?player={console.player}&w.4=-2.5&a.1=40")
    assert "under your weights" in page.inner_text("#answer .headline")
    page.click("#what-if button")
    assert "w.4=-2.5" in page.url
    assert "under your weights" in page.inner_text("#answer .headline")
    page.goto(f"{console.url}/console/player?id={console.player}")
    assert "instead of what" in page.inner_text(".headline")


def test_the_keyboard_alone_is_enough(analyst, console) -> None:
    page = analyst(None)
    page.wait_for_function("document.activeElement.id === 'key'")  # the field has the focus already
    page.keyboard.type(console.keys["analyst"])
    page.keyboard.press("Enter")
    page.wait_for_selector(".top nav")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "find":
            break
    page.keyboard.type(console.player)
    page.keyboard.press("Enter")
    page.wait_for_url("**q=**")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == console.player:
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "where the focus is cannot be seen"
    page.keyboard.press("Enter")
    page.wait_for_url("**/player?**")
    page.goto(f"{console.url}/console/what-if?player={console.player}")
    page.focus("[id='w.4']")
    before = page.inner_text("#answer")
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("old => document.getElementById('answer').innerText !== old", arg=before)


def test_what_is_written_into_an_address_or_a_field_never_runs(analyst, console) -> None:
    page = analyst("admin")
    for address in (
        "?q=",
        "/player?id=",
        "/decision?id=",
        f"/player?id={console.player}&against=",
        f"/what-if?player={console.player}&w.0=",
        "/policies?objective=",
        "/models?done=",
    ):
        page.goto(f"{console.url}/console{address}{HOSTILE}")
        assert page.locator("img, script:not([src^='/console/assets/'])").count() == 0
    page.fill("#find", HOSTILE)
    page.press("#find", "Enter")
    assert page.input_value("#q") == HOSTILE


def test_two_analysts_do_not_end_each_others_sessions(analyst, console) -> None:
    one, other = analyst(), analyst()
    one.goto(f"{console.url}/console/player?id={console.player}")
    other.goto(f"{console.url}/console/player?id={console.other}")
    one.click("text=Sign out")
    assert one.locator("#key").count() == 1
    other.reload()
    assert other.inner_text("h1") == console.other


def test_a_page_on_paper_has_its_charts_and_no_forms(analyst, console, keep) -> None:
    page = analyst()
    page.goto(f"{console.url}/console/player?id={console.player}")
    page.emulate_media(media="print")
    assert not page.is_visible(".top")
    assert not page.is_visible("#contrast form")
    assert page.is_visible("#contrast table.parts svg")
    keep(page, "paper")
