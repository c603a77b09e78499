"""The networks in NumPy, which answer, against the modules, which learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastq.policy import CHUNKS, Situation


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_both_ways_through_the_networks_see_the_same(policy, data, rows):
    enc = policy.encode(data.states(np.arange(rows)))
    enc.x[-1] = 0  # a history of which nothing is known
    ours = policy.look(enc)
    with torch.no_grad():
        theirs = policy.situation(enc)
    for name in Situation.__dataclass_fields__:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype and one.shape == other.shape, name
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("reach", [1.0, 0.4])
def test_both_ways_find_actions_that_are_as_good(policy, data, reach):
    """Where two candidates are all but equal, rounding may choose either; so what is compared is what they are worth."""
    policy = replace(policy, details=policy.details | {"reach": reach})
    low, high = policy.edges({policy.platform.dimension_names[1]: {"high": float(policy.platform.bounds[1].mean())}})
    at = policy.look(policy.encode(data.states(np.arange(200))))
    ours, theirs = policy._search(at, low, high), policy.best_units(at, policy.platform.weights, low, high).numpy()
    worth = policy.score(at, policy.units.raw(np.stack([ours, theirs], 1)))["total"]
    np.testing.assert_allclose(worth[:, 0], worth[:, 1], rtol=1e-9, atol=1e-9)
    assert (np.abs(ours - theirs).max(1) < 1e-9).mean() > 0.99
    gone = policy._distance(at, torch.from_numpy(ours)[:, None]).max()
    assert gone > 0.5 * reach
    assert (policy.units.raw(ours) <= high + 1e-9).all() and (policy.units.raw(ours) >= low - 1e-9).all()


def test_a_row_says_the_same_whatever_stands_beside_it(policy, data):
    """What a replay rests on: in a batch of the same size and at the same place, bit for bit."""
    enc = policy.encode(data.states(np.arange(CHUNKS[2])))
    others = policy.encode(data.states(np.arange(CHUNKS[2]) + 40))
    for part in ("x", "v", "branch"):
        getattr(others, part)[7] = getattr(enc, part)[7]
    one, other = policy.look(enc), policy.look(others)
    for name in Situation.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name)[7], getattr(other, name)[7], err_msg=name)
