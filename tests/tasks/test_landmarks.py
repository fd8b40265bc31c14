"""Landmarks: where they go, and that a batch keeps its meaning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.landmarks import insert_landmarks, is_landmark
from regard.tasks.recall import KeyedPasskey


@given(st.integers(0, 20), st.integers(1, 7))
def test_one_after_every_so_many(length, every):
    ids = torch.arange(length)[None]
    out = insert_landmarks(ids, every, 99)[0].tolist()
    want = []
    for i in range(length):
        want.append(i)
        if len([x for x in want if x != 99]) % every == 0:
            want.append(99)
    assert out == want
    assert is_landmark(len(out), every).tolist() == [x == 99 for x in out]


def test_a_batch_keeps_its_meaning():
    task = KeyedPasskey(20)
    batch = task.batch(40, torch.Generator().manual_seed(0))
    moved = insert_landmarks(batch, 4, task.vocab)
    mark = is_landmark(26, 4)
    assert moved.input_ids.shape == (40, 26)
    assert (moved.input_ids[:, mark] == task.vocab).all()
    assert torch.equal(moved.input_ids[:, ~mark], batch.input_ids)
    assert torch.equal(moved.labels[:, ~mark], batch.labels)
    assert (moved.labels[:, mark] == -100).all()
    assert not moved.groups["pairs"][:, mark].any()
    assert torch.equal(moved.groups["pairs"][:, ~mark], batch.groups["pairs"])
    rows = torch.arange(40)
    for name in ("pair", "answer"):
        start, stop = moved.spans[name].unbind(1)
        assert torch.equal(moved.input_ids[rows, start], batch.input_ids[rows, batch.spans[name][:, 0]])
        assert (stop - start == 1).all()
    assert moved.valid.all()


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="every must be at least 1"):
        insert_landmarks(torch.arange(4), 0, 9)
    with pytest.raises(ValueError, match="landmark must be an id that the text does not have, got 3"):
        insert_landmarks(torch.arange(4), 2, 3)
