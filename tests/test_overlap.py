"""Policies that act in the same states share them all, policies that act in others share none, and the logs' answerable questions follow from that."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastq import overlap, report, validation
from fastq.platform import Platform, platform_from_tree
from fastq.records import read_records
from fastq.workspace import Workspace

START = datetime(2026, 1, 1, tzinfo=UTC)


def logged(root: Path, separation: float, players: int = 300, days: int = 4) -> Platform:
    """`keen` acts where much is played, `calm` where little is, by a logistic law of slope `separation`; `rare` nearly never."""
    draw = np.random.default_rng(0)
    n = players * days
    who, when = np.repeat(np.arange(players), days), np.tile(np.arange(days), players)
    played = draw.normal(size=n)
    keen = draw.random(n) < 0.5 + 0.5 * np.tanh(separation * played / 2)
    policy = np.where(keen, "keen", "calm").astype(object)
    policy[:5] = "rare"
    activity = {"player_id": who, "occurred_at": [START + timedelta(days=int(d), hours=1) for d in when], "played": played}
    decisions = {
        "decision_id": np.arange(n),
        "player_id": who,
        "decided_at": [START + timedelta(days=int(d), hours=2) for d in when],
        "policy": policy.tolist(),
        "propensity": [0.1] * n,
        "goal": draw.uniform(0, 10, n),
        "joy": draw.normal(size=n),
    }
    pl.DataFrame(activity).write_parquet(root / "activity.parquet")
    pl.DataFrame(decisions).write_parquet(root / "decisions.parquet")
    tree = {
        "platform": "shop",
        "logs": {"decisions": "decisions.parquet", "activity": "activity.parquet"},
        "state": {"window": 3, "measures": {"played": {"aggregate": "mean"}}},
        "policies": ["keen", "calm", "rare"],
        "action": {"kind": "continuous", "dimensions": {"goal": {"low": 0, "high": 10}}},
        "objectives": {"joy": {}},
    }
    return platform_from_tree(tree, root, "fastq.yaml")


def of(platform: Platform) -> dict[tuple[str, str], overlap.Overlap]:
    return {(pair.policy, pair.against): pair for pair in overlap.overlaps(platform, overlap.chances(platform, read_records(platform)))}


@pytest.mark.parametrize(("separation", "common", "answerable"), [(0.0, (0.85, 1.0), True), (1.0, (0.5, 0.8), True), (200.0, (0.0, 0.1), False)])
def test_what_two_policies_share_is_what_they_were_made_to_share(tmp_path: Path, separation: float, common: tuple[float, float], answerable: bool) -> None:
    pairs = of(logged(tmp_path, separation))
    for pair in (pairs["keen", "calm"], pairs["calm", "keen"]):
        assert common[0] <= pair.common <= common[1]
        assert pair.answerable is answerable
        assert ("can be told" if answerable else "cannot be told") in pair.sentence
    rare = pairs["keen", "rare"]
    assert (rare.answerable, rare.shared) == (False, None)
    assert "too few decisions" in rare.sentence


def test_it_is_kept_and_shown_without_a_network(tmp_path: Path) -> None:
    platform = logged(tmp_path, 1.0)
    records = read_records(platform)
    chances = overlap.chances(platform, records)
    pairs = overlap.overlaps(platform, chances)
    overlap.write_overlaps(Workspace(tmp_path), pairs)
    assert overlap.read_overlaps(Workspace(tmp_path)) == pairs
    page = report.validation_page(platform, records, validation.validate(platform, records), pairs, chances)
    assert "Where the policies meet" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("data:image", "")


def test_without_two_policies_nothing_is_said(tmp_path: Path) -> None:
    platform = logged(tmp_path, 0.0, players=2)
    assert not any(pair.answerable for pair in of(platform).values())
    assert overlap.read_overlaps(Workspace(tmp_path)) == []


def test_what_the_logs_do_not_share_is_said_of_a_player_by_who_acted_last(tmp_path: Path) -> None:
    pairs = [
        asdict(pair) for pair in overlap.overlaps(logged(tmp_path, 200.0), overlap.chances(logged(tmp_path, 200.0), read_records(logged(tmp_path, 200.0))))
    ]
    where_keen, where_calm, nobody, itself = overlap.doubts(pairs, "calm", ["keen", "calm", None, "calm"])
    assert re.match("calm acts in [0-4]% of the states in which keen does", where_keen)
    assert (where_calm, itself) == ("", "")
    assert nobody, "no policy's states hold calm, so whoever acted last it cannot be told"
    shared = [pair | {"answerable": True} if pair["policy"] == "keen" else pair for pair in pairs]
    assert overlap.doubts(shared, "calm", ["keen", None]) == ["", ""]
    assert overlap.doubts(pairs, None, ["keen"]) == overlap.doubts([], "calm", ["keen"]) == [""]


def test_an_evaluation_s_verdicts_on_a_policy_say_where_it_is_not_to_be_found() -> None:
    pairs = [overlap.Overlap("keen", "calm", 9, 0.3, 0.3, answerable=False, sentence="calm acts in 30%"),
             overlap.Overlap("rare", "calm", 9, 0.1, 0.1, answerable=False, sentence="calm acts in 10%"),
             overlap.Overlap("calm", "keen", 9, 0.9, 0.9, answerable=True, sentence="keen acts in 90%")]  # fmt: skip
    row = {"value": 1.0, "verdict": "trustworthy"}
    document = {"against": "calm", "difference": row, "estimates": [row | {"policy": name} for name in ("fastq", "keen", "calm")], "reasons": []}
    told = overlap.said_in(document, pairs)
    assert [one["verdict"] for one in told["estimates"]] == ["trustworthy", "trustworthy", "trustworthy; calm acts in 10%"]
    assert told["difference"]["verdict"] == "trustworthy; calm acts in 10%"
    assert overlap.said_in(document | {"difference": None}, pairs)["difference"] is None
