"""Propensities that a log lacks: how near the estimated ones are to the truth, what never gets one, and what an evaluation makes of them."""

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from scipy.stats import norm, truncnorm

from fastq import densities, evaluation, features, records, report, windows, worlds
from fastq.platform import OWN_POLICY, load_platform, platform_from_tree
from fastq.workspace import Workspace

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """Logs of the arena, all propensities known, proposals left out: what each policy executed is all there is to learn from."""
    root = tmp_path_factory.mktemp("arena")
    worlds.write_logs(worlds.world("arena"), root, players=400, days=20, seed=3)
    platform = load_platform(root)
    read = records.read_records(platform)
    data = windows.build(platform, read, features.build_rows(platform, read))
    other = np.arange(len(data.policies)) != data.policy[:, None]
    return replace(data, proposals=np.where(other[:, :, None], np.nan, data.proposals), chance=np.where(other, np.nan, data.chance))


def without(data, gone):
    """The same logs, nothing known of the density of the actions at `gone` [N]."""
    return replace(data, propensity=np.where(gone, np.nan, data.propensity), law=np.where(gone[:, None], np.nan, data.law))


def half(data):
    return without(data, np.random.default_rng(0).random(len(data)) < 0.5)


def logged(root, action, dimension, players=500, days=4, items=0):
    """Logs of one policy whose action is drawn by `action(mood, rng)`; the mood is all that is logged of the state."""
    rng = np.random.default_rng(0)
    who, when = np.repeat(np.arange(players), days), np.tile(np.arange(days), players)
    mood = rng.normal(size=len(who))
    taken = action(mood, rng)
    base = {"player_id": who.astype(str), "decided_at": [START + timedelta(days=int(d), hours=2) for d in when]}
    chosen = {"item_id": np.char.add("i", taken.astype(str))} if items else {"size": taken.astype(float)}
    tables = {
        "activity": {"player_id": who.astype(str), "occurred_at": [START + timedelta(days=int(d), hours=1) for d in when], "mood": mood},
        "decisions": base | {"decision_id": np.arange(len(who)).astype(str), "policy": ["one"] * len(who), "joy": rng.normal(size=len(who))} | chosen,
        "items": {"item_id": [f"i{i}" for i in range(items)], "price": np.arange(items, dtype=float)},
    }
    for name, table in tables.items():
        pl.DataFrame(table).write_parquet(root / f"{name}.parquet")
    continuous = {"kind": "continuous", "dimensions": {"size": dimension}}
    platform = platform_from_tree(
        {
            "platform": "shop", "logs": {name: f"{name}.parquet" for name in tables if items or name != "items"},
            "state": {"window": 3, "period": "1d", "measures": {"mood": {"aggregate": "mean"}}}, "policies": ["one"], "objectives": {"joy": {}},
            "action": {"kind": "catalogue", "features": {"price": {"kind": "numeric"}}} if items else continuous,
        }, root, "fastq.yaml",
    )  # fmt: skip
    read = records.read_records(platform)
    data = windows.build(platform, read, features.build_rows(platform, read))
    return data, data.matrix[data.partial, 0].astype(float)


# ---- near the truth ------------------------------------------------------------------------------------------------------


def test_estimated_log_densities_are_near_the_true_ones_and_do_not_depend_on_the_run(arena):
    found = densities.estimate(without(arena, np.ones(len(arena), bool)))
    inside = ~densities.atoms(arena)
    np.testing.assert_array_equal(found.rows, inside)
    off = np.log(found.windows.propensity[inside]) - np.log(arena.propensity[inside])
    assert abs(np.median(off)) < 0.05
    assert np.median(np.abs(off)) < 0.2
    assert np.sqrt(np.mean(off**2)) < 0.5
    # weights divide by the estimate: one that is far too small would outweigh all others
    assert np.exp(-off).max() < 100
    assert (off < -np.log(10)).mean() < 0.001
    np.testing.assert_array_equal(found.windows.propensity, densities.estimate(without(arena, np.ones(len(arena), bool))).windows.propensity)
    for each in found.calibrations:
        assert not each.poor, each.sentence
        assert each.log_likelihood > each.baseline + 0.5
        for levels in each.coverage.values():
            for level, share in levels.items():
                assert share == pytest.approx(float(level), abs=0.05)
        for slices in each.pit.values():
            assert sum(slices) == pytest.approx(1, abs=1e-6)


def truncated(centre):
    return truncnorm((0 - centre) / 2, (10 - centre) / 2, centre, 2)


def cell(size, centre):
    return (norm.cdf(size + 0.25, centre) - norm.cdf(size - 0.25, centre)) / 0.5


LAWS = {
    "truncated": ({}, lambda centre, rng: truncated(centre).rvs(len(centre), random_state=rng), lambda size, centre: truncated(centre).pdf(size)),
    "clipped": ({}, lambda centre, rng: np.clip(rng.normal(centre, 3), 0, 10), lambda size, centre: norm.pdf(size, centre, 3)),
    "on a grid": ({"step": 0.5}, lambda centre, rng: np.clip(np.round(rng.normal(centre) * 2) / 2, 0, 10), cell),
}


@pytest.mark.parametrize(("dimension", "draw", "density"), LAWS.values(), ids=LAWS)
def test_each_form_of_law_is_found(tmp_path, dimension, draw, density):
    data, mood = logged(tmp_path, lambda m, rng: draw(5 + 2 * m, rng), {"low": 0, "high": 10, **dimension})
    found = densities.estimate(data)
    inside = (data.action[:, 0] > 0) & (data.action[:, 0] < 10)
    assert inside.mean() > 0.7
    np.testing.assert_array_equal(np.isfinite(found.windows.propensity), inside)
    off = np.log(found.windows.propensity[inside]) - np.log(density(data.action[inside, 0], 5 + 2 * mood[inside]))
    assert np.median(np.abs(off)) < 0.06
    assert np.sqrt(np.mean(off**2)) < 0.15
    assert not found.calibrations[0].poor, found.calibrations[0].sentence


def test_items_are_predicted_by_the_state_where_it_matters(tmp_path):
    def chances(mood):
        score = np.exp(np.outer(mood, [-1.5, 0.0, 1.5]))
        return score / score.sum(1, keepdims=True)

    data, mood = logged(tmp_path, lambda m, rng: (rng.random((len(m), 1)) > chances(m).cumsum(1)).sum(1), {}, items=3)
    found = densities.estimate(data)
    off = np.log(found.windows.propensity) - np.log(chances(mood)[np.arange(len(data)), data.item])
    assert np.sqrt(np.mean(off**2)) < 0.15
    assert not found.calibrations[0].poor
    assert found.calibrations[0].log_likelihood > found.calibrations[0].baseline + 0.2
    assert all(abs(said - happened) < 0.1 for said, happened, _ in found.calibrations[0].reliability)


def test_a_law_of_another_kind_is_called_poorly_calibrated(tmp_path):
    data, _ = logged(tmp_path, lambda m, rng: np.where(rng.random(len(m)) < 0.5, 2.0, 8.0) + rng.normal(0, 0.05, len(m)), {"low": 0, "high": 10})
    found = densities.estimate(data)
    assert found.calibrations[0].poor
    assert "poorly calibrated: size: intervals of 50% hold" in found.calibrations[0].sentence


# ---- what never gets one -------------------------------------------------------------------------------------------------


def test_known_propensities_win_and_neither_atoms_nor_our_own_decisions_ever_get_an_estimate(arena):
    data = half(arena)
    ours = (np.arange(len(data)) % 5 == 0) & ~np.isfinite(data.propensity)
    data = replace(
        data,
        policies=[*data.policies, OWN_POLICY],
        policy=np.where(ours, 3, data.policy),
        law=np.hstack([data.law, np.full((len(data), 1), np.nan)]),
        chance=np.hstack([data.chance, np.full((len(data), 1), np.nan)]),
        proposals=np.concatenate([data.proposals, np.full_like(data.proposals[:, :1], np.nan)], 1),
    )
    found, known = densities.estimate(data), np.isfinite(data.propensity)
    assert found.rows.sum() > 1_000
    np.testing.assert_array_equal(found.windows.propensity[known], data.propensity[known])
    np.testing.assert_array_equal(found.windows.law[known], data.law[known])
    never = densities.atoms(data) | ours
    assert never.sum() > 1_000
    assert np.isnan(found.windows.propensity[never & ~known]).all()
    assert np.isnan(found.windows.law[never & ~known]).all()
    assert len(found.windows) == len(data), "nothing is dropped"
    assert {each.policy for each in found.calibrations} == {"stretch", "retain", "spend"}
    assert all(each.error < 0.5 for each in found.calibrations), "held against the half that is known"


def test_too_few_decisions_get_none_and_that_is_said(arena):
    few = np.flatnonzero(arena.policy == 0)[densities.FEWEST - 1 :]
    data = without(replace(arena, policy=np.where(np.isin(np.arange(len(arena)), few), 1, arena.policy)), np.ones(len(arena), bool))
    found = densities.estimate(data)
    said = next(each for each in found.calibrations if each.policy == "stretch")
    assert said.poor
    assert said.sentence.startswith(f"stretch: {densities.FEWEST - 1} decisions are too few")
    assert np.isnan(found.windows.propensity[data.policy == 0]).all()
    assert np.isfinite(found.windows.propensity[(data.policy == 1) & ~densities.atoms(data)]).all()


# ---- what an evaluation makes of them ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(policy, data):
    return evaluation.evaluate(policy, data)


@pytest.mark.parametrize("known", ["half", "none"])
def test_an_evaluation_without_propensities_says_what_one_with_them_says(policy, data, full, known):
    gone = np.ones(len(data), bool) if known == "none" else np.random.default_rng(0).random(len(data)) < 0.5
    found = evaluation.evaluate(policy, without(data, gone))
    assert "weights from estimated propensities of" in found.difference["verdict"]
    for row in full.estimates:
        if row["objective"] is None and row["estimator"] == "double_reinforcement":
            other = next(r for r in found.estimates if all(r[key] == row[key] for key in ("policy", "objective", "estimator")))
            standard_error = (row["high"] - row["low"]) / 3.92
            assert other["value"] == pytest.approx(row["value"], abs=0.5 * standard_error), row["policy"]
            assert other["high"] - other["low"] == pytest.approx(row["high"] - row["low"], rel=0.25), row["policy"]
    kinds = {(row["policy"], row["objective"], row["estimator"]) for row in full.estimates}
    assert {(row["policy"], row["objective"], row["estimator"]) for row in found.estimates} == kinds, "no estimator is refused for it"
    for row in found.estimates:
        assert ("weights from estimated propensities of" in row["verdict"]) == (row["estimator"] != "direct_method"), row
    assert found.densities
    assert not [each.sentence for each in found.densities if each.poor]
    page = report.evaluation_page(policy.platform, found.to_dict())
    assert all(text in page for text in ("Propensities that were not logged", found.densities[0].sentence.split(",")[0]))


def test_an_evaluation_with_all_propensities_estimates_none(policy, full):
    assert full.densities == []
    assert not any("estimated propensities" in row["verdict"] for row in [*full.estimates, full.difference])
    assert "Propensities that were not logged" not in report.evaluation_page(policy.platform, full.to_dict())


def test_what_rests_on_a_poor_estimate_is_not_trusted(policy, data):
    held = evaluation.hold(policy, without(data, np.ones(len(data), bool)))
    poor = replace(held.calibrations[0], poor=True, sentence="stretch: a sentence")
    target = evaluation.served_target(policy, replace(held, calibrations=[poor, *held.calibrations[1:]]))
    _, said = evaluation.valued(policy, held, target)
    assert all(row["verdict"].startswith("do not trust: ") for row in said)
    assert "stretch: a sentence" in said[0]["verdict"]


def test_calibrations_are_kept_and_read_again(tmp_path, arena):
    found = densities.estimate(half(arena)).calibrations
    assert densities.read_calibrations(Workspace(tmp_path)) == []
    densities.write_calibrations(Workspace(tmp_path), found)
    assert [asdict(each) for each in densities.read_calibrations(Workspace(tmp_path))] == [asdict(each) for each in found]
