"""In-context pairs: the exchange changes places and nothing else, the answer follows from the context alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.in_context import InContext, in_context_gap


def generator(seed):
    return torch.Generator().manual_seed(seed)


SMALL = InContext(classes=64, labels=8)


def named(task, x):
    """The label of every pair, from its vector."""
    vectors = task.label_vectors
    return torch.stack([(x[:, 1:-1:2] - v).abs().amax(-1) == 0 for v in vectors], -1).double().argmax(-1)


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 1000))
def test_a_sequence_holds_bursts_of_classes_and_asks_for_one(burst, present, seed):
    task = InContext(burst * present, 16, 40, burst, 0.0, 12, seed=seed)
    batch = task.batch(5, generator(seed))
    assert batch.x.shape == (5, task.length, 12)
    for x, label in zip(batch.x, batch.label.tolist(), strict=True):
        means, counts = torch.unique(x[:-1:2], dim=0, return_counts=True)  # without noise an x is its class
        assert len(means) == present
        assert counts.tolist() == [burst] * present
        where = (x[:-1:2] == x[-1]).all(-1)
        assert where.sum() == burst
        assert (named(task, x[None])[0][where] == label).all()


@given(st.sampled_from([("first", "middle"), ("last", "first"), (2, 7)]), st.integers(0, 1000))
def test_the_exchange_moves_two_labels_and_nothing_else(places, seed):
    one, two = SMALL.exchange(6, *places, generator(seed))
    a, b = ({"first": 0, "middle": 4, "last": 7}.get(p, p) for p in places)
    assert torch.equal(one.label, two.label)
    changed = (one.x != two.x).any(-1)
    assert changed.nonzero()[:, 1].view(6, 2).tolist() == [sorted([2 * a + 1, 2 * b + 1])] * 6
    assert torch.equal(one.x[:, 2 * a], one.x[:, 2 * b])
    for pick, (right, wrong) in ((one, (a, b)), (two, (b, a))):
        told = named(SMALL, pick.x)
        assert torch.equal(told[:, right], pick.label)
        assert (told[:, wrong] != pick.label).all()
        assert ((told == pick.label[:, None]).sum(1) == SMALL.burst).all()  # the wrong pair says what the others say
    assert torch.equal(one.x[:, 2 * a + 1], two.x[:, 2 * b + 1])


def test_the_solver_is_right_and_has_no_gap():
    task = InContext()
    batch = task.batch(600, generator(0))
    assert (task.solve(batch.x) == batch.label).double().mean() > 0.97
    one, two = task.exchange(600, "first", "middle", generator(1))
    assert (task.solve(one.x) == one.label).double().mean() > 0.97
    assert torch.equal(task.solve(one.x), task.solve(two.x))
    assert in_context_gap(task.solve, task, "first", "last", 300).abs().max() == 0


def test_the_gap_is_seen_by_a_model_that_looks_at_one_place():
    """Always naming pair a's label: right when a is right, wrong when b is."""
    gap = in_context_gap(lambda x: named(SMALL, x)[:, 0], SMALL, "first", "middle", 50)
    assert gap.tolist() == [1.0] * 50
    gap = in_context_gap(lambda x: named(SMALL, x)[:, 4], SMALL, "first", "middle", 50)
    assert gap.tolist() == [-1.0] * 50


def test_the_answer_follows_from_the_context_alone():
    """With all right labels of the context replaced by another one, the solver names that; the query says nothing."""
    task = InContext()
    one, _ = task.exchange(300, "first", "middle", generator(0))
    told = named(task, one.x)
    other = (one.label + 7) % task.labels
    x = one.x.clone()
    right = told == one.label[:, None]
    vectors = task.label_vectors[other][:, None].expand(-1, task.pairs, -1)
    x[:, 1:-1:2] = torch.where(right[..., None], vectors, x[:, 1:-1:2])
    assert (task.solve(x) == one.label).double().mean() < 0.02
    assert (task.solve(x) == other).double().mean() > 0.9


def test_neither_places_nor_labels_are_favoured():
    task = InContext()
    batch = task.batch(6000, generator(0))
    right = (named(task, batch.x) == batch.label[:, None]).double().mean(0)
    assert (right - right.mean()).abs().max() < 0.03
    one, _ = task.exchange(6000, 0, 4, generator(1))
    share = one.label.bincount(minlength=32) / 6000
    assert (share - 1 / 32).abs().max() < 4 * (1 / 32 / 6000) ** 0.5
    told = named(task, one.x)
    others = [p for p in range(8) if p not in (0, 4)]
    rate = (told == one.label[:, None]).double().mean(0)[others]
    assert (rate - 0.5).abs().max() < 0.04  # three of the six other pairs, wherever they stand


def test_the_spread_of_the_release_is_an_option():
    assert InContext().batch(200, generator(0)).x.std() == pytest.approx(64**-0.5, rel=0.02)
    assert InContext(std=1 / 64).batch(200, generator(0)).x.std() == pytest.approx(1 / 64, rel=0.02)


def test_the_same_seed_gives_the_same_batch():
    one, two = (InContext().batch(4, generator(7)) for _ in range(2))
    assert torch.equal(one.x, two.x)
    assert not torch.equal(one.x, InContext(seed=1).batch(4, generator(7)).x)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: InContext(burst=3), "burst must be at least 1 and divide"),
        (lambda: InContext(classes=1), "classes must be at least 2"),
        (lambda: InContext(labels=1), "labels must be at least 2"),
        (lambda: InContext(noise=-1.0), "noise must be >= 0"),
        (lambda: SMALL.exchange(1, "first", 0, generator(0)), "a and b must differ"),
        (lambda: SMALL.exchange(1, "front", 0, generator(0)), "a must be an index"),
        (lambda: SMALL.exchange(1, 0, 8, generator(0)), r"b must be an index in 0\.\.7"),
        (lambda: InContext(burst=8).exchange(1, 0, 1, generator(0)), "burst must leave two classes"),
    ],
)
def test_errors_name_the_argument(call, said):
    with pytest.raises(ValueError, match=said):
        call()
