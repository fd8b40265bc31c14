"""RepeatedTokens: what repeats is asked for, and only that."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.batch import IGNORED
from regard.tasks.repeated import RepeatedTokens


@st.composite
def tasks(draw):
    length = draw(st.integers(8, 150))
    lo = draw(st.integers(2, length - 3))
    hi = draw(st.integers(lo, length - 2))
    return RepeatedTokens(length, range(1, draw(st.integers(40, 200))), 0, (lo, hi))


@given(tasks(), st.integers(0, 2**31))
def test_periods_spans_and_labels(task, seed):
    batch = task.batch(4, torch.Generator().manual_seed(seed))
    assert batch.input_ids.shape == (4, task.length)
    for one in batch:
        x, labels = one.input_ids[0], one.labels[0]
        start, end = one.spans["first"][0].tolist()
        size = end - start
        assert start == 1
        assert task.segment[0] <= size <= task.segment[1]
        assert x[0] == task.bos
        assert task.bos not in x[1:]
        assert torch.equal(x[1 + size :], x[1 : len(x) - size])
        assert (labels[: 1 + size] == IGNORED).all()
        assert torch.equal(labels[1 + size :], x[1 + size :])
        assert one.spans["second"][0].tolist() == [1 + size, min(1 + 2 * size, task.length)]
        for name in ("first", "second"):
            s, e = one.spans[name][0].tolist()
            assert one.groups[name][0].nonzero().flatten().tolist() == list(range(s, e))


@given(st.integers(0, 2**31))
def test_the_solver_gives_the_labels_once_a_few_tokens_have_repeated(seed):
    task = RepeatedTokens(80, range(1, 1000), 0, (12, 30))
    one = task.batch(1, torch.Generator().manual_seed(seed))
    size = int(one.spans["first"][0, 1]) - 1
    for p in range(1 + size + 3, task.length):  # from three repeated tokens of 999 on, the period is certain
        assert task.solve(one.input_ids[0, :p]) == one.labels[0, p]


@given(st.integers(0, 2**31))
def test_nothing_can_be_known_before_the_least_period_is_over(seed):
    task = RepeatedTokens(80, range(1, 1000), 0, (12, 30))
    one = task.batch(1, torch.Generator().manual_seed(seed))
    assert all(task.solve(one.input_ids[0, :p]) is None for p in range(1, 13))


def test_the_testbed_of_the_spec_is_the_default():
    batch = RepeatedTokens().batch(3, torch.Generator().manual_seed(0))
    assert batch.input_ids.shape == (3, 65)
    assert int(batch.input_ids.max()) < 64


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"segment": (0, 3)}, "segment"),
        ({"segment": (12, 64)}, "segment"),
        ({"tokens": range(64)}, "bos"),
        ({"tokens": range(1, 2)}, "two ids"),
    ],
)
def test_errors_name_the_argument(wrong, said):
    with pytest.raises(ValueError, match=said):
        RepeatedTokens(**wrong)
