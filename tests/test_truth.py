"""`fastq.truth` must tell true explanations from false ones; asked of a small model of the arena."""

import dataclasses

import numpy as np
import pytest

from fastq import explanation, report, truth, worlds

SMALL = {"people": 40, "lives": 4, "days": 8, "seed": 4711}


@pytest.fixture(scope="module")
def found(policy):
    return truth.examine(policy, worlds.world("arena"), **SMALL)


def test_it_says_what_was_asked_and_the_same_each_time(policy, found):
    assert 5 < found["states"] <= SMALL["people"]
    assert [row["of"] for row in found["contrasts"]] == [found["states"]] * 2
    assert len(found["pairs"]) == 2 * found["states"]
    assert truth.examine(policy, worlds.world("arena"), **SMALL) == found


def test_the_true_difference_is_the_simulators(policy, found):
    """The action's own luck falls out: an action against itself differs by nothing, and more of what costs nothing but money costs money."""
    start = truth._lived(worlds.world("arena"), 40, 4711)
    low, high = policy.platform.bounds.T
    parts = truth._true_parts(policy, start, np.stack([np.tile(low, (40, 1)), np.tile(low, (40, 1)), np.tile(high, (40, 1))]), 3, 2)
    assert (parts[:, 0] == parts[:, 1]).all()
    cost = list(policy.platform.objectives).index("cost")
    here = ~start.gone & start.served()
    assert (parts[:, 2, here, cost, 0] < parts[:, 0, here, cost, 0]).any()
    assert (parts[:, 2, here, cost, 0] <= parts[:, 0, here, cost, 0]).all()


def test_who_opens_the_app_today_is_luck_of_each_life(policy):
    """It is drawn before the decision and known to nobody then: lives that shared it would tell a difference that no log can hold."""
    start = truth._lived(worlds.world("arena"), 40, 4711)
    low, high = policy.platform.bounds.T
    lives = truth._true_parts(policy, start, np.stack([np.tile((low + high) / 2, (40, 1))] * 2), 60, 1)
    here = ~start.gone & start.served()
    played = lives[:, 0, here, list(policy.platform.objectives).index("dwell"), 0] > 0
    np.testing.assert_allclose(played.mean(0), start.opening[here], atol=0.25)  # four standard errors of 60 tosses
    assert ((played.mean(0) > 0.05) & (played.mean(0) < 0.95)).sum() > here.sum() / 2
    assert (lives[:, 0] == lives[:, 1]).all()  # and of both branches


def test_explanations_that_lie_are_found_out(policy, found, monkeypatch):
    """Differences at the edge of what is believed, ten times too sure: fewer intervals hold, fewer reasons do."""
    honest = explanation.explain

    def lying(*arguments, **options):
        why = honest(*arguments, **options)
        c = why.contrast
        half = (c.high - c.difference) / 10
        parts = -10 * np.abs(c.parts)
        false = dataclasses.replace(c, difference=c.high, low=c.high - half, high=c.high + half, parts=parts)
        return dataclasses.replace(why, contrast=false)

    monkeypatch.setattr(explanation, "explain", lying)
    lied = truth.examine(policy, worlds.world("arena"), **SMALL)
    assert lied["contrasts"][1]["share"] < found["contrasts"][1]["share"] - 0.2


def test_deleting_what_matters_moves_more_than_deleting_at_random(found):
    one = found["deletion"][0]
    assert one["by_attribution"] > 1.2 * one["at_random"]
    assert one["at_random"] > one["least_first"]


def test_errors_grow_with_the_grade(found):
    graded = found["warnings"]["grades"]
    assert [row["grade"] for row in graded] == list(explanation.GRADES)
    assert sum(row["of"] for row in graded) == 2 * found["states"]
    known = [row["error"] for row in graded if row["of"] >= 5]
    assert known[-1] > 2 * known[0]
    assert found["warnings"]["area"] > 0.6


def test_the_page_says_it_all_and_loads_nothing(found):
    page = report.truth_page("arena <b>1</b>", found)
    assert "arena &lt;b&gt;1&lt;/b&gt;" in page
    assert f"{found['contrasts'][0]['share']:.0%} of {found['states']}" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_shares_of_nothing_are_none():
    assert truth._share(np.array([], bool)) == {"share": None, "low": None, "high": None, "of": 0}
    assert truth._share(np.array([True] * 9 + [False]))["low"] == pytest.approx(0.5958, abs=1e-4)  # Wilson's, by hand
