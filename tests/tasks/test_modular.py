"""ModAdd and ModMarker: the answers, splits without a mirror image, nothing but the marked values tells the answer."""

from itertools import pairwise

import pytest
import torch

from regard.tasks.batch import IGNORED
from regard.tasks.modular import ModAdd, ModMarker


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("by", ["unordered", "ordered"])
def test_the_splits_are_all_pairs_each_once(by):
    task = ModAdd(11, 0.6, seed=3, by=by)
    train, test = (set(map(tuple, task.pairs(s).tolist())) for s in ("train", "test"))
    assert not train & test
    assert train | test == {(a, b) for a in range(11) for b in range(11)}
    units = 66 if by == "unordered" else 121
    kept = {(min(x), max(x)) for x in train} if by == "unordered" else train
    assert len(kept) == round(0.6 * units)
    assert train != set(map(tuple, ModAdd(11, 0.6, seed=4, by=by).pairs("train").tolist()))


def test_no_mirror_image_of_a_test_pair_is_trained_on():
    """The leak that the split of ordered pairs has: looking b + a up answers most of its test pairs."""

    def looked_up(task):
        known = set(map(tuple, task.pairs("train").tolist()))
        test = task.pairs("test").tolist()
        return sum((b, a) in known for a, b in test) / len(test)

    assert looked_up(ModAdd(23)) == 0
    assert looked_up(ModAdd(23, by="ordered")) > 0.5


def test_sums():
    task = ModAdd(7, 0.5)
    whole = task.whole("test")
    assert len(whole) == len(task.pairs("test"))
    for one in (whole, task.batch(20, seeded(), "train"), task.batch(20, seeded(), "test")):
        for row, label in zip(one.input_ids.tolist(), one.labels.tolist(), strict=True):
            assert row[2:] == [7, (row[0] + row[1]) % 7]
            assert label == [IGNORED] * 3 + row[3:]
            assert task.solve(torch.tensor(row[:3])) == row[3]
    drawn = set(map(tuple, task.batch(400, seeded(), "test").input_ids[:, :2].tolist()))
    assert drawn == set(map(tuple, task.pairs("test").tolist()))


def test_neither_term_alone_tells_the_sum():
    ids = ModAdd(23).whole("test").input_ids
    best = 0
    for term in (0, 1):
        table = torch.zeros(23, 23).index_put_((ids[:, term], ids[:, 3]), torch.ones(len(ids)), accumulate=True)
        assert table.max() == 1  # each other term once: any answer to a known term is as good as any other
        best = max(best, float(table.max(1).values.sum() / len(ids)))
    assert best < 0.15


@pytest.mark.parametrize("task", [ModMarker(), ModMarker(3, 4, 12), ModMarker(7, 3, 20, 2, decoys=True)])
def test_marked_values(task):
    batch = task.batch(300, seeded(1))
    assert batch.input_ids.shape == (300, task.length + 1)
    for i, row in enumerate(batch.input_ids.tolist()):
        at = [p for p, token in enumerate(row) if token == task.marker]
        assert len(at) == task.markers
        assert all(later - p >= 3 for p, later in pairwise(at))
        values = [row[p + 1] for p in at]
        assert max(values) < task.modulus
        assert row[-2] == task.question
        assert row[:-2].count(task.question) == 0
        assert row[-1] == sum(values) % task.modulus == task.solve(torch.tensor(row[:-1]))
        assert batch.groups["markers"][i].nonzero().flatten().tolist() == at
        assert batch.groups["values"][i].nonzero().flatten().tolist() == [p + 1 for p in at]
    assert (batch.labels[:, :-1] == IGNORED).all()
    again = task.batch(300, seeded(1))
    assert torch.equal(batch.input_ids, again.input_ids)


def test_places_are_uniform_over_the_choices_that_fit():
    task = ModMarker(2, 2, 9)
    batch = task.batch(6000, seeded(2))
    places = [tuple(row.nonzero().flatten().tolist()) for row in batch.groups["markers"]]
    fit = [(a, b) for a in range(9) for b in range(a + 3, 9) if b + 2 <= 8]
    counts = [places.count(choice) for choice in fit]
    assert sum(counts) == 6000
    assert min(counts) > 0.85 * 6000 / len(fit)
    assert max(counts) < 1.15 * 6000 / len(fit)


@pytest.mark.parametrize(("decoys", "right"), [(False, 1.0), (True, 0.2)])
def test_who_ignores_the_markers_fails_among_decoys(decoys, right):
    task = ModMarker(decoys=decoys)
    batch = task.batch(4000, seeded(3))
    shown = batch.input_ids[:, :-1]
    every = torch.where(shown < 5, shown, 0).sum(1) % 5
    assert float((every == batch.labels[:, -1]).double().mean()) == pytest.approx(right, abs=0.03)
    # One marked value alone tells nothing.
    first = shown[batch.groups["values"][:, :-1]].view(-1, 2)[:, 0]
    table = torch.zeros(5, 5).index_put_((first, batch.labels[:, -1]), torch.ones(4000), accumulate=True)
    assert float(table.max(1).values.sum() / 4000) < 0.25


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="p must be at least 2, got 1"):
        ModAdd(1)
    with pytest.raises(ValueError, match=r"share must leave pairs in both splits of 276, got 1.0"):
        ModAdd(23, 1.0)
    with pytest.raises(ValueError, match="by must be 'unordered' or 'ordered', got 'rows'"):
        ModAdd(by="rows")
    with pytest.raises(ValueError, match="split must be one of"):
        ModAdd().pairs("dev")
    with pytest.raises(ValueError, match="length must be at least 6, got 5"):
        ModMarker(length=5)
    with pytest.raises(ValueError, match="modulus must be at least 2, got 1"):
        ModMarker(1)
