"""The README's commands and Python run as written, on logs that another program wrote; its table says what the code does."""

import os
import re
import sys
import time
import typing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
from pydantic import BaseModel
from scipy.stats import truncnorm

from fastq.environment import DEFAULTS
from fastq.platform import Platform

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAYERS, DAYS = 500, 16


def section(title):
    """The text under a heading, up to the next one of its rank."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text, language):
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def write_logs(directory):
    """Two policies whose laws are truncated normals around 4.5 and 10; `joy` is best at 7, which neither brings, and not known yet for the newest day."""
    rng, low, high, noise = np.random.default_rng(4), 0.5, 14.5, 2.0
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    players = [f"player-{p}" for p in range(PLAYERS)]
    directory.mkdir()
    for day in range(DAYS):
        at = midnight - (DAYS - day) * timedelta(days=1)
        bold = rng.random(PLAYERS) < 0.5
        mean = np.where(bold, 10.0, 4.5)
        law = truncnorm((low - mean) / noise, (high - mean) / noise, mean, noise)
        goal = law.rvs(random_state=rng)
        joy = 2 - ((goal - 7) / 3) ** 2 + rng.normal(0, 0.3, PLAYERS)
        decisions = {
            "decision_id": [f"{day}/{p}" for p in players], "player_id": players, "decided_at": [at + timedelta(hours=6)] * PLAYERS,
            "policy": np.where(bold, "bold", "careful"), "propensity": law.pdf(goal), "assignment": [0.5] * PLAYERS,
            "goal": goal, "joy": joy if day < DAYS - 1 else [None] * PLAYERS,
        }  # fmt: skip
        activity = {"player_id": players, "occurred_at": [at + timedelta(hours=3)] * PLAYERS, "rounds": rng.poisson(6, PLAYERS).astype(float)}
        pl.DataFrame(decisions, schema_overrides={"joy": pl.Float64}).write_parquet(directory / f"decisions-{day:02d}.parquet")
        pl.DataFrame(activity).write_parquet(directory / f"activity-{day:02d}.parquet")


def ready(process, port, seconds=240):
    """Whether the endpoint answers that it is ready, in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.3)
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5, trust_env=False).status_code == 200:
                return True
        except httpx.TransportError:
            continue
    return False


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A directory with somebody's logs and this installation as its `.venv`, so that not a word of the commands is changed."""
    base = tmp_path_factory.mktemp("readme")
    (base / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    write_logs(base / "logs")
    return base


def environment():
    """What a user has set: nothing of the tests' own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name not in DEFAULTS}


def test_the_first_two_commands_are_made():
    (block,) = blocks(section("Two commands"), "console")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in block.strip().splitlines():
        word, target = command.split()
        assert (word, target in targets) == ("make", True), command


def field_at(path):
    """The field of the platform tree at a key path in which `*` stands for any name."""
    model, field = Platform, None
    for step in path.split("."):
        if step == "*":
            continue
        field = model.model_fields[step]
        kinds = [k for k in (field.annotation, *typing.get_args(field.annotation)) if isinstance(k, type) and issubclass(k, BaseModel)]
        model = kinds[0] if kinds else model
    return field


def rows():
    """(key path, default as the table has it), one for each key."""
    for line in section("Optional keys of `fastq.yaml`").splitlines():
        if not line.startswith("| `"):
            continue
        keys, default, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        paths = re.findall(r"`([^`]+)`", keys)
        prefix = paths[0].rpartition(".")[0]
        defaults = default.split(", ")
        for i, path in enumerate(paths):
            yield path if i == 0 or not prefix else f"{prefix}.{path}", defaults[i if len(defaults) == len(paths) else 0]


@pytest.mark.parametrize(("path", "default"), [*rows()])
def test_an_optional_key_has_the_default_of_the_table(path, default):
    field = field_at(path)
    found = field.get_default(call_default_factory=True)
    if default in {"none", "one period"}:
        assert found is None
    elif default == "embedded":
        assert found in {"sqlite", "local"}
    else:
        assert str(found) == default or float(found) == float(default)


def test_the_table_names_keys_and_the_rest_of_the_tree_must_be_there():
    assert len([*rows()]) >= 20
    must = re.search(r"Only (.*?) must be there", section("Optional keys of `fastq.yaml`"), re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", must)) == {name for name, field in Platform.model_fields.items() if field.is_required()}


def test_what_the_readme_points_to_is_there_and_nothing_is_left_to_be_said():
    for path in re.findall(r"`((?:fastq|infra)/[\w./]*|[A-Z][\w.]+\.md|LICENSE)`", README):
        assert (ROOT / path).exists(), path
    assert "TODO" not in README
