import pytest
import torch

from regard.tasks.pointer import STEPS, WindowPointer
from regard.tasks.vision import IGNORED


def draw(task, n, seed=0):
    return task.batch(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", [WindowPointer(), WindowPointer((6, 4), 2, 3), WindowPointer((3, 3), 3, 2)])
def test_it_is_what_it_says(task):
    x, labels = draw(task, 100)
    w, (rows, columns) = task.window, task.windows
    assert x.shape == (100, task.channels, *task.shape)
    windows = x.unflatten(2, (rows, w)).unflatten(4, (columns, w)).permute(0, 2, 4, 1, 3, 5)
    assert (windows[:, :, :, :9].sum((3, 4, 5)) == 1).all()  # one pointer a window
    kinds = windows[:, :, :, 9:].sum((4, 5))
    assert ((kinds == 0) | (kinds == w * w)).all()  # one class, at all of its tokens
    assert torch.equal(labels != IGNORED, x[:, :9].sum(1) > 0)
    for image, answer in zip(x, labels, strict=True):
        assert torch.equal(task.solve(image), answer)


def test_the_answer_is_the_class_of_the_window_pointed_at():
    task = WindowPointer()
    x, labels = draw(task, 200)
    kind = x[:, 9:, ::4, ::4].argmax(1)
    for image, step, row, column in x[:, :9].nonzero().tolist():
        down, right = STEPS[step]
        assert labels[image, row, column] == kind[image, row // 4 + down, column // 4 + right]


def test_the_window_alone_tells_no_more_than_blind():
    """The best guess from pointer, own class and the window's place, learned on one half, scored on the other."""
    task = WindowPointer()
    x, labels = draw(task, 6000)
    image, step, row, column = x[:, :9].nonzero().unbind(1)
    own, answer = x[image, 9:, row, column].argmax(1), labels[image, row, column]
    key = ((row // 4 * 4 + column // 4) * 9 + step) * task.classes + own
    train = image < 3000
    seen = torch.zeros(16 * 9 * task.classes, task.classes)
    seen.index_put_((key[train], answer[train]), torch.ones(int(train.sum())), accumulate=True)
    right = (seen[key[~train]].argmax(1) == answer[~train]).double().mean()
    assert abs(float(right) - task.blind) < 0.015
    best = torch.where(step == 4, own, 0) == answer
    assert abs(float(best.double().mean()) - task.blind) < 0.015
    assert task.blind == pytest.approx((4 * (1 / 4 + 3 / 16) + 8 * (1 / 6 + 5 / 24) + 4 * (1 / 9 + 8 / 36)) / 16)


def test_it_follows_the_generator_and_refuses():
    a, b, other = draw(WindowPointer(), 3), draw(WindowPointer(), 3), draw(WindowPointer(), 3, 1)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.labels, b.labels)
    assert not torch.equal(a.x, other.x)
    with pytest.raises(ValueError, match="window must divide both sides"):
        WindowPointer((6, 6), 4)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        WindowPointer(classes=1)
