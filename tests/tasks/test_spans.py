"""Marked spans: the answer follows from the tokens, from both markers and what lies between, and from nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.spans import MarkedSpans, span_f1


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def tasks(draw):
    shortest = draw(st.integers(2, 6))
    longest = draw(st.integers(shortest, 40))
    length = draw(st.integers(longest + 1, 120))
    return MarkedSpans(length, draw(st.integers(1, 4)), shortest, longest, draw(st.integers(4, 40)))


@given(tasks(), st.integers(0, 2**31))
def test_spans_are_marked_and_do_not_overlap(task, seed):
    batch = task.batch(3, generator(seed))
    assert batch.ids.shape == (3, task.length)
    for ids, spans in zip(batch.ids, batch.spans, strict=True):
        assert ids[0] == task.first
        covered = torch.zeros(task.length, dtype=torch.long)
        for i, j, kind in spans:
            assert task.shortest <= j - i + 1 <= task.longest
            assert ids[i] == task.filler + kind
            assert ids[j] == task.filler + task.types + kind
            covered[i : j + 1] += 1
        assert covered.max() <= 1
        opens = (ids >= task.filler) & (ids < task.filler + task.types)
        assert int(opens.sum()) == len(spans)


@given(tasks(), st.integers(0, 2**31))
def test_the_solver_finds_the_spans_from_the_tokens_alone(task, seed):
    batch = task.batch(3, generator(seed))
    assert [task.solve(ids) for ids in batch.ids] == batch.spans


def test_a_pair_cannot_be_judged_alone():
    task = MarkedSpans(512)
    batch = task.batch(40, generator(0))
    _, precision, recall = span_f1([task.naive(ids) for ids in batch.ids], batch.spans)
    assert recall == 1
    assert precision < 0.6
    assert span_f1([task.solve(ids) for ids in batch.ids], batch.spans) == (1.0, 1.0, 1.0)


def test_without_its_markers_an_entity_is_gone():
    task = MarkedSpans(256)
    batch = task.batch(10, generator(1))
    for ids, spans in zip(batch.ids, batch.spans, strict=True):
        for i, j, kind in spans:
            for gone in (i, j):
                less = ids.clone()
                less[gone] = 0
                assert (i, j, kind) not in task.solve(less)


def test_filler_tells_nothing():
    """Drawn anew, the filler leaves the spans as they are; places and types are spread."""
    task = MarkedSpans(256)
    batch = task.batch(200, generator(2))
    filler = batch.ids < task.filler
    other = torch.where(filler, torch.randint(task.filler, batch.ids.shape, generator=generator(3)), batch.ids)
    assert [task.solve(ids) for ids in other] == batch.spans
    kinds = torch.tensor([k for s in batch.spans for _, _, k in s]).bincount(minlength=3).double()
    assert (kinds / kinds.sum() - 1 / 3).abs().max() < 0.06
    starts = torch.tensor([i for s in batch.spans for i, _, _ in s]).double()
    assert abs(starts.mean() / 256 - 0.45) < 0.08
    sizes = torch.tensor([j - i + 1 for s in batch.spans for i, j, _ in s])
    assert sizes.min() == 2
    assert sizes.max() > 80


def test_labels_stand_at_both_places():
    task = MarkedSpans(12, 2, 2, 6)
    labels = task.labels([{(2, 5, 1)}, set()])
    assert labels.nonzero().tolist() == [[0, 2, 5, 1], [0, 5, 2, 1]]


def test_f1():
    told = [{(1, 2, 0), (4, 9, 1)}, {(0, 3, 2)}]
    f1, precision, recall = span_f1([{(1, 2, 0), (4, 9, 0)}, set()], told)
    assert (precision, recall) == (0.5, 1 / 3)
    assert f1 == pytest.approx(0.4)
    assert span_f1([set(), set()], told) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_batch():
    one, two = (MarkedSpans().batch(3, generator(7)) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert one.spans == two.spans


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shortest": 1}, "shortest and longest must be"),
        ({"length": 50}, "shortest and longest must be"),
        ({"types": 0}, "types must be at least 1"),
        ({"stray": 2.0}, "stray must be in"),
    ],
)
def test_errors_name_the_argument(wrong, said):
    with pytest.raises(ValueError, match=said):
        MarkedSpans(**wrong)
