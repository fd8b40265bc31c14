"""The pool: a chain that forgets all but the last token, and partners of equal difficulty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.pool import MarkovFiller, matched


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_steps_have_the_stated_odds_and_forget():
    task = MarkovFiller(length=3, tokens=3, temperature=(0.5, 0.5))
    ids = task.batch(60_000, seeded())
    odds = (task.scores / 0.5).softmax(-1)
    assert (torch.bincount(ids[:, 0], minlength=3) / 60_000 - 1 / 3).abs().max() < 0.01
    for x in range(3):
        for before in range(3):
            then = ids[(ids[:, 1] == x) & (ids[:, 0] == before), 2]
            assert (torch.bincount(then, minlength=3) / len(then) - odds[x]).abs().max() < 2.5 * len(then) ** -0.5
    assert torch.equal(task.batch(5, seeded(1)), task.batch(5, seeded(1)))


def test_low_temperatures_are_easier():
    def entropy(t):
        odds = (MarkovFiller(temperature=(t, t)).scores / t).softmax(-1)
        return float(-(odds * odds.log()).sum(-1).mean())

    assert entropy(0.15) < 2.0 < 4.0 < entropy(3.0)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 4), st.integers(0, 99))
def test_partners_are_distinct_and_no_free_one_is_nearer(n, each, more, seed):
    wanted = torch.rand(n, generator=seeded(seed))
    offered = torch.rand(n * each + more, generator=seeded(seed + 1))
    found = matched(wanted, offered, each)
    assert found.shape == (n, each)
    assert found.unique().numel() == n * each
    free = torch.ones(len(offered), dtype=torch.bool)
    free[found.flatten()] = False
    for value, partners in zip(wanted, found, strict=True):
        if free.any():
            nearest = (offered[free] - value).abs().min()
            assert ((offered[partners] - value).abs() <= nearest + 1e-12).all()


def test_refusals():
    with pytest.raises(ValueError, match="offered must hold at least 4"):
        matched(torch.rand(2), torch.rand(3), each=2)
    with pytest.raises(ValueError, match=r"no value left within 0\.1 of 0; the nearest is 1"):
        matched(torch.zeros(1), torch.ones(2), widest=0.1)
    with pytest.raises(ValueError, match="temperature must be"):
        MarkovFiller(temperature=(0.0, 1.0))
    with pytest.raises(ValueError, match="tokens at least 2"):
        MarkovFiller(tokens=1)
