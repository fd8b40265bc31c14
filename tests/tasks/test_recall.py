"""Passkey: the digit, its place, its solver, and that nothing else tells it."""

import pytest
import torch

from regard.tasks.recall import Passkey


def draw(task, n=3000, seed=0, **how):
    return task.batch(n, torch.Generator().manual_seed(seed), **how)


def test_one_digit_at_its_place_and_the_question_last():
    task = Passkey(20, 16)
    batch = draw(task)
    shown = batch.input_ids[:, :-1]
    assert ((shown < 10).sum(1) == 1).all()
    place = batch.spans["key"][:, 0]
    digit = shown.gather(1, place[:, None])[:, 0]
    assert torch.equal(digit, batch.labels[:, -1])
    assert torch.equal(digit, batch.input_ids[:, -1])
    assert (shown[:, -1] == 15).all()
    assert ((shown == 15).sum(1) == 1).all()
    assert (batch.labels[:, :-1] == -100).all()
    assert torch.equal(task.distance(batch), 19 - place)


def test_the_solver_answers_from_the_prompt_alone():
    task = Passkey(12, 14, digits=5)
    for sample in draw(task, 50):
        prompt = sample.input_ids[0, :-1]
        assert task.solve(prompt) == int(sample.labels[0, -1])
        blank = torch.where(prompt < 5, 7, prompt)
        assert task.solve(blank) is None


def test_nothing_but_the_digit_tells_the_answer():
    """Answers are uniform given the place and given every filler token."""
    task = Passkey(8, 14, digits=5)
    batch = draw(task, 40_000)
    answer = batch.labels[:, -1]
    assert (torch.bincount(answer) / 40_000 - 0.2).abs().max() < 0.01
    for place in range(7):
        at = batch.spans["key"][:, 0] == place
        assert abs(at.float().mean() - 1 / 7) < 0.01
        assert (torch.bincount(answer[at], minlength=5) / at.sum() - 0.2).abs().max() < 0.03
        for token in range(5, 13):
            given = batch.input_ids[:, place] == token
            assert (torch.bincount(answer[given], minlength=5) / given.sum() - 0.2).abs().max() < 0.04


def test_a_distance_can_be_fixed():
    task = Passkey(10, 16)
    for distance in (1, 9):
        assert (task.distance(draw(task, 20, distance=distance)) == distance).all()
    for distance in (0, 10):
        with pytest.raises(ValueError, match=r"distance must be in 1\.\.9"):
            draw(task, 1, distance=distance)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="length must be at least 2"):
        Passkey(1)
    with pytest.raises(ValueError, match="digits must be at least 2"):
        Passkey(digits=1)
    with pytest.raises(ValueError, match="vocab must be at least digits \\+ 2 = 12"):
        Passkey(vocab=11)
