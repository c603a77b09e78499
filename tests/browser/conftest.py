"""One server and one browser for all tests here: the system's Chromium, driven without a network."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from fastq import registry
from fastq.environment import free_ports
from fastq.platform import load_platform
from fastq.workspace import Workspace
from feature_repo import store
from serving import auth, endpoint

PICTURES = Path(os.environ.get("FASTQ_PICTURES") or Path(__file__).parents[2] / ".pictures")  # kept after the run, to be looked at


class Console:
    """A served console: its address, keys by role, a player seen lately, a version that the gate refused."""

    def __init__(self, root: Path, port: int) -> None:
        self.platform = load_platform(root)
        self.url = f"http://127.0.0.1:{port}"
        self.keys = {role: auth.create_key(Workspace(root), role)["key"] for role in auth.ROLES}
        known = store.known_players(self.platform).sort("seen_at", descending=True, nulls_last=True)
        self.player, self.other = known["player_id"][:2].to_list()
        with registry.start_run(self.platform, "again", {}) as run:
            self.refused = registry.register(self.platform, run.id, registry.fetch(self.platform))
        registry.record_verdict(self.platform, self.refused, passed=False, reasons=["not shown to be better than version 1"])


@pytest.fixture(scope="session")
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium here: the console is tested in a real browser (apt-get install chromium)")
        pytest.skip("no chromium here (apt-get install chromium)")
    return found


@pytest.fixture(scope="session")
def console(chromium, trained, tmp_path_factory):
    """The console of a copy of the `trained` workspace, on a free port of loopback."""
    (port,) = free_ports(1)
    served = Console(shutil.copytree(trained, tmp_path_factory.mktemp("browser") / "workspace"), port)
    server = uvicorn.Server(uvicorn.Config(endpoint.create_app(served.platform), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive(), "the server ended while it started"
        assert time.monotonic() < until, "the server did not start within two minutes"
        time.sleep(0.1)
    yield served
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def analyst(browser, console):
    """`analyst(role)` is a page of a fresh browser that signed in. Afterwards: no error on it, and no request to anybody but the console."""
    contexts, wrong = [], []

    def open_page(role: str | None = "analyst", **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} and "status of" not in said.text else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(console.url) else wrong.append(f"a request to {request.url}"))
        page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
        page.goto(f"{console.url}/console")
        if role is not None:
            page.fill("#key", console.keys[role])
            page.click("main button")
            page.wait_for_selector(".top nav")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="session")
def keep():
    """`keep(page, name)` takes a picture of the whole page and keeps it."""
    PICTURES.mkdir(exist_ok=True)

    def take(page, name: str) -> None:
        page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    return take
