"""The README's commands and Python run as written, on logs that another program wrote; its table says what the code does."""

import json
import re
import signal
import sys
import typing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
import yaml
from pydantic import BaseModel
from scipy.stats import truncnorm

from fastq.platform import Platform, parse_duration

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAYERS, DAYS = 1_100, 16


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


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A directory with somebody's logs and this installation as its `.venv`, so that not a word of the commands is changed."""
    base = tmp_path_factory.mktemp("readme")
    (base / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    write_logs(base / "logs")
    return base


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
        assert found is None or found == []
    elif default == "embedded":
        assert found in {"sqlite", "local"}
    elif isinstance(found, timedelta):
        assert found == parse_duration(default)
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


@pytest.mark.slow
def test_your_own_logs_as_written(where, as_a_user):
    """The console block from its first line to its last, then what a backend sends, then the Python block in the workspace that came of it."""
    (console,) = blocks(section("Your own logs"), "console")
    (program,) = blocks(section("Your own logs"), "python")
    *commands, last = console.strip().splitlines()
    assert last.endswith("fastq serve")
    directory, said = where, []
    for command in commands:
        if command.startswith("cd "):
            directory /= command.removeprefix("cd ")
            continue
        run = as_a_user("-c", command, cwd=directory, command=("bash",)).wait()
        assert run.code == 0, f"{command}: {run.stdout[-1500:]}{run.stderr[-1500:]}"
        said.append(run.stdout)
    key = said[-1].strip().splitlines()[-1]  # as a person copies it

    server = as_a_user("-c", f"exec {last}", cwd=directory, command=("bash",))
    server.shows("fastq serves")
    address = re.search(r"http://\S+:\d+", server.stderr)[0]
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False) as client:
        answer = client.post("/v1/recommendations", json={"players": ["player-0", "player-1"], "explore": False})
        assert answer.status_code == 200, answer.text
        recommendations = answer.json()["recommendations"]
    assert [r["degraded"] for r in recommendations] == [None, None]
    assert all(5.5 < r["action"]["goal"] < 9.5 for r in recommendations)  # the best goal is 7, the two policies' means are 4.5 and 10
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(90).code in {0, 128 + signal.SIGTERM}
    server.gone()

    given = "import numpy as np\nhistory = np.full((2, window, 1), 6.0)\nattributes = None\n"
    window = yaml.safe_load((directory / "fastq.yaml").read_text())["state"]["window"]
    shown = "\nimport json\nprint(json.dumps([np.asarray(actions).tolist(), np.asarray(parts).sum((1, 2)).tolist()]))\n"
    run = as_a_user("-c", given.replace("window", str(window)) + program + shown, cwd=directory, command=(sys.executable,)).wait()
    assert run.code == 0, run.stderr[-2000:]
    actions, values = json.loads(run.stdout)
    assert np.shape(actions) == (2, 1)
    assert np.isfinite(values).all()


@pytest.mark.slow
def test_it_runs_by_itself_as_written(where, as_a_user):
    """The console block, in the workspace that the one before made; its last command is ended as systemd would."""
    (console,) = blocks(section("It runs by itself"), "console")
    *commands, last = console.strip().splitlines()
    directory = where
    for command in commands:
        if command.startswith("cd "):
            directory /= command.removeprefix("cd ")
            continue
        run = as_a_user("-c", command, cwd=directory, command=("bash",)).wait()
        assert run.code == 0, f"{command}: {run.stdout[-1500:]}{run.stderr[-1500:]}"
    assert (where / "shop.backup").stat().st_size > 100_000
    schedule = as_a_user("-c", f"exec {last}", cwd=directory, command=("bash",))
    schedule.shows("next retraining at")
    schedule.process.send_signal(signal.SIGTERM)
    assert schedule.wait(60).code == 128 + signal.SIGTERM
    schedule.gone()
