"""argmax_position: the answer, chance, and the exact ceiling of models that see no order."""

from itertools import product

import pytest
import torch

from regard.tasks.position import ArgmaxPosition


def draw(task, n=2000, seed=0):
    return task.draw(n, torch.Generator().manual_seed(seed))


def test_the_answer_is_the_first_of_the_largest():
    ids, answer = draw(ArgmaxPosition(9, 4), 200)
    for row, index in zip(ids.tolist(), answer.tolist(), strict=True):
        assert index == row.index(max(row))
    assert ids.min() == 0
    assert ids.max() == 3


def test_equal_generators_draw_equal_batches_and_the_solver_is_right():
    task = ArgmaxPosition()
    (a, x), (b, y) = draw(task), draw(task)
    assert torch.equal(a, b)
    assert torch.equal(x, y)
    assert torch.equal(task.solve(a), x)


@pytest.mark.parametrize(("length", "vocab"), [(2, 2), (3, 2), (4, 3), (5, 2)])
def test_the_ceiling_is_that_of_the_best_guess_for_every_multiset(length, vocab):
    by_multiset = {}
    for row in product(range(vocab), repeat=length):
        counts = by_multiset.setdefault(tuple(sorted(row)), [0] * length)
        counts[row.index(max(row))] += 1
    best = sum(max(counts) for counts in by_multiset.values()) / vocab**length
    assert ArgmaxPosition(length, vocab).ceiling == pytest.approx(best, abs=1e-12)


def test_the_ceiling_of_the_paper_s_small_size():
    assert ArgmaxPosition(16, 32).ceiling == pytest.approx(0.0793, abs=5e-5)


def test_no_single_token_and_no_fixed_guess_tells_the_answer():
    """A leak would show as an index guessed far more often right than the ceiling allows."""
    task = ArgmaxPosition(16, 32)
    _, answer = draw(task, 40_000)
    share = torch.bincount(answer, minlength=16) / 40_000
    assert share.max() < task.ceiling + 0.006
    assert share.min() > 0.04


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        ArgmaxPosition(length=1)
    with pytest.raises(ValueError, match="vocab must be at least 2, got 1"):
        ArgmaxPosition(vocab=1)
