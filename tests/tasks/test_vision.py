import builtins

import pytest
import torch

from regard.tasks import vision
from regard.tasks.vision import IGNORED, Digits, SameMark, digits, quantised


def draw(task, n, seed=0):
    return task.batch(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "task", [SameMark(), SameMark(apart=False), SameMark((6, 9), 2, 3), SameMark((5, 7), 3, 4), SameMark((16, 16))]
)
def test_same_mark_is_what_it_says(task):
    x, labels = draw(task, 300)
    marks = x.sum(1)
    assert x.shape == (300, task.colours, *task.shape)
    assert (marks.flatten(1).sum(1) == 2).all()
    assert marks.max() == 1
    assert torch.equal(labels != IGNORED, marks > 0)
    asked = labels[labels != IGNORED].view(300, 2)
    assert (asked[:, 0] == asked[:, 1]).all()
    assert asked[:, 0].sum() == 150
    for image, answer in zip(x, labels, strict=True):
        assert torch.equal(task.solve(image), answer)
    place = marks.flatten(1).nonzero()[:, 1].view(300, 2)
    row, column = place // task.shape[1] // task.window, place % task.shape[1] // task.window
    together = (row[:, 0] == row[:, 1]) & (column[:, 0] == column[:, 1])
    assert not together.any() if task.apart else together.all()


def test_one_window_does_not_tell_the_answer():
    """The best guess from a mark's place and colour, learned on one half, is chance on the other."""
    x, labels = draw(SameMark(), 40000)
    image, colour, row, column = x.nonzero().unbind(1)
    answer = labels[image, row, column].double()
    key = colour * 64 + row * 8 + column
    train = image < 20000
    total = torch.zeros(256, dtype=torch.double).index_add(0, key[train], answer[train] - 0.5)
    right = ((total[key[~train]] > 0).double() == answer[~train]).double().mean()
    assert abs(float(right) - 0.5) < 0.015  # 40,000 guesses, two an image: three standard deviations
    for c in range(4):
        of_colour = answer[colour == c]
        assert abs(float(of_colour.mean()) - 0.5) < 4 * 0.5 / len(of_colour) ** 0.5


def test_same_mark_follows_the_generator():
    a, b, other = draw(SameMark(), 5), draw(SameMark(), 5), draw(SameMark(), 5, seed=1)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.labels, b.labels)
    assert not torch.equal(a.x, other.x)


def test_same_mark_refuses():
    with pytest.raises(ValueError, match="colours must be at least 2, got 1"):
        SameMark(colours=1)
    with pytest.raises(ValueError, match=r"window must be in 1\.\.8, got 9"):
        SameMark(window=9)
    with pytest.raises(ValueError, match="window must leave at least two windows"):
        SameMark(window=8)
    with pytest.raises(ValueError, match="window must be at least 2 to hold both marks"):
        SameMark(window=1, apart=False)
    with pytest.raises(ValueError, match="window must leave every token another one"):
        draw(SameMark((5, 5), window=4, apart=False), 200)


def test_digits_are_scikit_learns_and_split_by_index():
    from sklearn.datasets import load_digits

    found = load_digits()
    train, test = digits("train"), digits("test")
    assert train.x.shape == (1437, 1, 8, 8)
    assert test.x.shape == (360, 1, 8, 8)
    assert torch.equal(test.x[3, 0], torch.from_numpy(found.images[15]).float() / 16)
    assert test.labels[3] == found.target[15]
    assert train.x.max() == 1
    assert train.x.min() == 0
    known = {tuple(x.flatten().tolist()) for x in train.x}
    assert not any(tuple(x.flatten().tolist()) in known for x in test.x)  # no test digit is a training digit


def test_quantised_digits_use_every_level():
    for levels in (2, 8, 17):
        x = quantised(levels, "train")
        assert x.unique().tolist() == list(range(levels))
    assert torch.equal(quantised(17, "test"), (digits("test").x * 16).long())
    with pytest.raises(ValueError, match=r"levels must be in 2\.\.17, got 18"):
        quantised(18, "train")


def test_digits_are_pasted_whole():
    task = Digits("test", 32)
    x, labels = task.all(torch.Generator().manual_seed(0))
    plain = digits("test")
    assert x.shape == (360, 1, 32, 32)
    assert torch.equal(labels, plain.labels)
    assert torch.equal(x.flatten(1).sort(1).values[:, -64:], plain.x.flatten(1).sort(1).values)
    for image, digit in zip(x[:20, 0], plain.x[:20, 0], strict=True):
        assert any(torch.equal(image[i : i + 8, j : j + 8], digit) for i in range(25) for j in range(25))
    drawn = task.batch(7, torch.Generator().manual_seed(0))
    assert drawn.x.shape == (7, 1, 32, 32)
    with pytest.raises(ValueError, match="size must be at least 8"):
        Digits(size=7)
    with pytest.raises((ValueError, TypeError), match="split"):
        digits("valid")


def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    vision._digits.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'regard\[vision\]'"):
        digits("train")
