"""`make docs`: no warning, nothing fetched from elsewhere, and every command, route and public name is in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastq

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", str(ROOT / "docs" / "mkdocs.yml"), "--site-dir", str(made)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-3000:]  # a warning is printed, and is an error
    return made


def test_it_reads_without_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        fetched = re.findall(r"""<(?:script|img|iframe)[^>]+src=["'](?:https?:)?//[^"']+|<link[^>]+href=["'](?:https?:)?//[^"']+""", page.read_text())
        assert fetched == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]http", sheet.read_text()), sheet
    assert "assets/worker.js" in (site / "index.html").read_text(), "without it the search of pages on the disk stays mute"
    assert (site / "search" / "search_index.js").exists()


def test_nothing_public_is_missing(site):
    python = (site / "reference" / "python.html").read_text()
    assert {name for name in fastq.__all__ if f".{name}" in python} == set(fastq.__all__)
    from serving.endpoint import OPEN

    http, commands = (re.sub(r"<[^>]+>", "", (site / "reference" / f"{name}.html").read_text()) for name in ("http", "commands"))
    for route in ("/v1/recommendations", "/v1/outcomes", "/v1/activity", "/v1/explanations", "/v1/query", "/v1/players/{player_id}", *OPEN - {"/openapi.json"}):
        assert re.search(rf"(GET|POST) {re.escape(route)}", http), route
    for command in ("demo", "init", "retrain", "schedule", "deploy", "monitor", "backup", "restore", "doctor", "keys create"):
        assert f"fastq {command}" in commands
    assert "--resume" in commands


def test_each_user_starts_with_what_the_readme_has_run(site):
    """The pages for the three users hold sections of README, which tests/claims runs; they add no command of their own."""
    for name in ("engineer", "analyst", "developer"):
        source = (ROOT / "docs" / "pages" / f"{name}.md").read_text()
        taken = re.findall(r"\{\{ README: (.+?) \}\}", source)
        assert len(taken) >= 2, name
        assert "```" not in source, f"{name}.md: an example that nothing runs; it belongs into README"
        assert "{{" not in (site / f"{name}.html").read_text()
