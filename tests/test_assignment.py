"""Who decides: shares that never change, their probabilities, exclusions, and the pause that stops everything at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastq import assignment
from fastq.cli import app
from fastq.errors import ConfigurationError, WorkspaceError
from fastq.platform import Platform, platform_from_tree
from fastq.workspace import Workspace

PLAYERS = [f"player-{k}" for k in range(20_000)]


def platform_of(root: Path, **serving: object) -> Platform:
    tree = {
        "platform": "arena",
        "logs": {"decisions": "logs/*.parquet"},
        "state": {},
        "policies": ["stretch", "retain"],
        "action": {"kind": "continuous", "dimensions": {"bonus": {"low": 0, "high": 50}}},
        "objectives": {"returns": {}},
        "serving": serving,
    }
    return platform_from_tree(tree, root, "test")


def test_shares_are_kept_and_do_not_lean_on_each_other(tmp_path: Path) -> None:
    platform = platform_of(tmp_path, holdout={"share": 0.3, "policy": "retain"}, challenger={"share": 0.2})
    held = np.array([assignment.held_out(platform, p) for p in PLAYERS])
    rival = np.array([assignment.challenged(platform, p) for p in PLAYERS])
    assert held.mean() == pytest.approx(0.3, abs=0.015)
    assert rival.mean() == pytest.approx(0.2, abs=0.015)
    assert rival[held].mean() == pytest.approx(0.2, abs=0.02)
    more = platform_of(tmp_path, holdout={"share": 0.4, "policy": "retain"})
    assert all(assignment.held_out(more, p) for p, was in zip(PLAYERS, held, strict=True) if was), "a larger share keeps those of a smaller one"
    assert not any(assignment.held_out(platform_of(tmp_path, holdout={"share": 0.3}), p) for p in PLAYERS[:100]), "held out for nobody"


def test_probabilities_add_up(tmp_path: Path) -> None:
    platform = platform_of(tmp_path, holdout={"share": 0.3, "policy": "retain"}, challenger={"share": 0.2})
    found = [
        assignment.probability(platform, held=True),
        assignment.probability(platform, held=False, by_challenger=True),
        assignment.probability(platform, held=False),
    ]
    assert found == pytest.approx([0.3, 0.14, 0.56])
    assert assignment.probability(platform, held=False, challenger=False) == pytest.approx(0.7)
    assert assignment.probability(platform_of(tmp_path), held=False) is None


def test_excluded_players_are_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("player_id\n0012\np2\n")
    assert assignment.excluded_players(platform_of(tmp_path, exclude="out.csv")) == {"0012", "p2"}
    assert assignment.excluded_players(platform_of(tmp_path)) == frozenset()
    with pytest.raises(ConfigurationError, match="player_id"):
        assignment.excluded_players(platform_of(tmp_path, exclude="missing.csv"))


def test_pausing_is_idempotent_audited_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    platform = platform_of(tmp_path)
    space = Workspace(tmp_path)
    first, new = assignment.pause(platform, "retain", who="ann", reason="bonus too high")
    again, twice = assignment.pause(platform, "retain", who="bob")
    assert (new, twice, again) == (True, False, first)
    assert assignment.pause_of(space) == first
    other, changed = assignment.pause(platform, "stretch", who="bob")
    assert (other.policy, changed) == ("stretch", True)
    with pytest.raises(ConfigurationError, match="stretch, retain"):
        assignment.pause(platform, "nobody", who="ann")
    assert (assignment.resume(platform, who="ann"), assignment.resume(platform, who="ann")) == (True, False)
    assert assignment.pause_of(space) is None
    told = [json.loads(line) for line in space.audit.read_text().splitlines()]
    assert [(line["action"], line["who"], line.get("policy")) for line in told] == [
        ("pause", "ann", "retain"),
        ("pause", "bob", "stretch"),
        ("resume", "ann", None),
    ]
    space.paused.write_text("{")
    with pytest.raises(WorkspaceError, match="fastq pause"):
        assignment.pause_of(space)
    assert assignment.pause(platform, None, who="ann")[0].policy is None


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "fastq.yaml").write_text(json.dumps(platform_of(tmp_path).model_dump(mode="json", exclude_none=True)))
    runner = CliRunner()

    def run(*arguments: str) -> dict:
        found = runner.invoke(app, [*arguments, "--workspace", str(tmp_path)])
        assert found.exit_code == 0, found.output
        return found

    run("pause", "--policy", "retain")
    assert assignment.pause_of(Workspace(tmp_path)).policy == "retain"
    run("resume")
    assert assignment.pause_of(Workspace(tmp_path)) is None


@pytest.mark.parametrize(
    ("serving", "says"),
    [
        ({"budgets": {"nothing": {"most": 3}}}, "bonus"),
        ({"item_frequency": {"most": 1}}, "catalogue"),
        ({"challenger": {"share": 1.5}}, "share"),
        ({"frequency": {"most": -1}}, "most"),
        ({"frequency": {"mots": 1}}, "most"),
        ({"tokens": {"jwks": "keys.json"}}, "issuer"),
    ],
)
def test_wrong_settings_are_refused_in_words(tmp_path: Path, serving: dict, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        platform_of(tmp_path, **serving)
