"""Passkeys: the digit or pair, its place, its solver, and that nothing else tells it."""

import pytest
import torch

from regard.tasks.recall import KeyedPasskey, Passkey


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


def test_pairs_at_their_places_and_the_question_last():
    task = KeyedPasskey(30, keys=5, values=3, noise=10, pairs=4)
    batch = draw(task)
    shown = batch.input_ids[:, :-1]
    pair = (shown >= 8) & (shown < 8 + 15)
    assert torch.equal(pair, batch.groups["pairs"][:, :-1])
    assert (pair.sum(1) == 4).all()
    keys = ((shown[pair] - 8) // 3).view(-1, 4)
    assert all(len(set(row)) == 4 for row in keys.tolist())
    asked = shown.gather(1, batch.spans["pair"][:, :1])[:, 0] - 8
    assert torch.equal(asked // 3, shown[:, -1] - 3)
    assert torch.equal(asked % 3, batch.labels[:, -1])
    assert torch.equal(batch.labels[:, -1], batch.input_ids[:, -1])
    assert (batch.labels[:, :-1] == -100).all()
    assert ((shown[:, :-1] >= 8) & (shown[:, :-1] < task.vocab)).all()
    assert torch.equal(task.distance(batch), 29 - batch.spans["pair"][:, 0])


def test_the_keyed_solver_answers_from_the_prompt_alone():
    task = KeyedPasskey(20, keys=4, values=3, noise=6, pairs=3)
    for sample in draw(task, 50):
        prompt = sample.input_ids[0, :-1]
        assert task.solve(prompt) == int(sample.labels[0, -1])
        prompt[sample.spans["pair"][0, 0]] = task.vocab - 1
        assert task.solve(prompt) is None


def test_nothing_but_the_pair_asked_for_tells_the_value():
    """Answers are uniform given the question, the place and the other pair; any pair's value gives the floor."""
    task = KeyedPasskey(9, keys=3, values=4, noise=3, pairs=2)
    batch = draw(task, 60_000)
    answer, shown = batch.labels[:, -1], batch.input_ids[:, :-1]
    for given in [shown[:, -1] == 4 + key for key in range(3)] + [batch.spans["pair"][:, 0] == p for p in range(8)]:
        assert (torch.bincount(answer[given], minlength=4) / given.sum() - 0.25).abs().max() < 0.03
    other = batch.groups["pairs"].clone()
    other[torch.arange(len(other)), batch.spans["pair"][:, 0]] = False
    value = (batch.input_ids[other] - 7) % 4
    assert abs((value == answer).float().mean() - 0.25) < 0.01
    first = batch.groups["pairs"].int().argmax(1)
    named = (batch.input_ids[torch.arange(len(first)), first] - 7) % 4
    assert abs((named == answer).float().mean() - task.floor) < 0.01
    assert task.floor == 0.625


def test_a_distance_can_be_fixed_for_pairs():
    task = KeyedPasskey(16)
    for distance in (1, 15):
        batch = draw(task, 20, distance=distance)
        assert (task.distance(batch) == distance).all()
        assert all(task.solve(s.input_ids[0, :-1]) == int(s.labels[0, -1]) for s in batch)
    with pytest.raises(ValueError, match=r"distance must be in 1\.\.15"):
        draw(task, 1, distance=16)


def test_keyed_arguments_that_do_not_fit():
    for how, told in (
        ({"keys": 0}, "keys must be at least 1"),
        ({"values": 1}, "values must be at least 2"),
        ({"pairs": 9}, "pairs must be at most keys = 8"),
        ({"length": 4}, "length must be at least pairs \\+ 1 = 5"),
    ):
        with pytest.raises(ValueError, match=told):
            KeyedPasskey(**how)
