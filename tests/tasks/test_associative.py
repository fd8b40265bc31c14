"""Associative recall and copying: where everything stands, solvers, and that nothing else tells the answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.associative import AssociativeRecall
from regard.tasks.copying import Copying


def draw(task, n=200, seed=0):
    return task.batch(n, torch.Generator().manual_seed(seed))


@st.composite
def recalls(draw):
    pairs = draw(st.integers(1, 9))
    queries = draw(st.integers(1, pairs))
    spare = draw(st.integers(0, 20))
    return AssociativeRecall(
        2 * pairs + 2 * queries + spare,
        pairs,
        queries,
        keys=draw(st.integers(pairs, 12)),
        values=draw(st.integers(2, 6)),
        filler=3,
    )


@given(recalls(), st.integers(0, 10**6))
def test_pairs_come_first_and_some_of_them_again(task, seed):
    batch = draw(task, 5, seed)
    said = 2 * task.pairs
    assert batch.input_ids.shape == (5, task.length)
    for sample in batch:
        ids, labels = sample.input_ids[0], sample.labels[0]
        keys, values = ids[0:said:2], ids[1:said:2]
        assert (keys < task.keys).all()
        assert len(keys.unique()) == task.pairs
        assert ((values >= task.keys) & (values < task.keys + task.values)).all()
        asked = (labels >= 0).nonzero().flatten()
        assert len(asked) == task.queries
        assert (asked > said).all()
        assert torch.equal(sample.groups["asked"][0].nonzero().flatten(), asked - 1)
        table = dict(zip(keys.tolist(), values.tolist(), strict=True))
        again = ids[asked - 1].tolist()
        assert len(set(again)) == task.queries
        assert [table[k] for k in again] == labels[asked].tolist() == ids[asked].tolist()
        rest = torch.ones(task.length, dtype=torch.bool)
        rest[:said] = rest[asked] = rest[asked - 1] = False
        assert (ids[rest] >= task.keys + task.values).all()
        a, b = sample.spans["answer"][0].tolist()
        c, d = sample.spans["pair"][0].tolist()
        assert torch.equal(ids[c:d], ids[a - 1 : b])


@given(recalls(), st.integers(0, 10**6))
def test_recall_is_solved_from_the_prompt_alone(task, seed):
    for sample in draw(task, 3, seed):
        ids, labels = sample.input_ids[0], sample.labels[0]
        for p in (labels >= 0).nonzero().flatten().tolist():
            assert task.solve(ids[:p]) == int(labels[p])
            hidden = ids[:p].clone()
            hidden[: 2 * task.pairs] = task.vocab - 1  # the pairs are gone, and the keys that were asked before stay
            assert task.solve(hidden) is None
        assert task.solve(torch.tensor([task.vocab - 1])) is None


def test_nothing_but_the_pair_tells_the_value():
    """Values are uniform given the key, the place and the order of the question."""
    task = AssociativeRecall(24, pairs=4, queries=2, keys=5, values=4, filler=2)
    batch = draw(task, 30_000)
    row, place = (batch.labels >= 0).nonzero().unbind(1)
    answer = batch.labels[row, place] - task.keys
    assert (torch.bincount(answer) / len(answer) - 0.25).abs().max() < 0.01
    key = batch.input_ids[row, place - 1]
    for condition in [*(key == k for k in range(5)), *(place == p for p in place.unique())]:
        counts = torch.bincount(answer[condition], minlength=4)
        assert counts.sum() > 1000
        assert (counts / counts.sum() - 0.25).abs().max() < 0.04


@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 10**6))
def test_a_copy_is_the_stretch_again(stretch, tokens, seed):
    task = Copying(2 * stretch + 1, tokens)
    assert task.stretch == stretch
    for sample in draw(task, 3, seed):
        ids, labels = sample.input_ids[0], sample.labels[0]
        assert torch.equal(ids[:stretch], ids[stretch + 1 :])
        assert ids[stretch] == tokens
        assert (ids == tokens).sum() == 1
        assert (labels[: stretch + 1] == -100).all()
        assert torch.equal(labels[stretch + 1 :], ids[:stretch])
        for p in range(stretch + 1, task.length):
            assert task.solve(ids[:p]) == int(labels[p])
        assert task.solve(ids[:stretch]) is None
        assert task.solve(ids) is None


def test_tokens_of_a_stretch_are_independent():
    ids = draw(Copying(9, 3), 30_000).input_ids
    for a in range(4):
        for b in range(a):
            joint = torch.bincount(3 * ids[:, a] + ids[:, b], minlength=9) / len(ids)
            assert (joint - 1 / 9).abs().max() < 0.01


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AssociativeRecall(16, pairs=8, queries=1), "length must be at least 2 pairs"),
        (lambda: AssociativeRecall(64, pairs=9, queries=1, keys=8), "pairs must be at most keys = 8, got 9"),
        (lambda: AssociativeRecall(64, pairs=4, queries=5), "queries must be at most pairs = 4, got 5"),
        (lambda: AssociativeRecall(64, pairs=0), "pairs must be at least 1"),
        (lambda: AssociativeRecall(64, values=1), "values must be at least 2"),
        (lambda: Copying(10), "length must be odd"),
        (lambda: Copying(11, 1), "tokens must be at least 2"),
    ],
)
def test_arguments_that_do_not_fit(make, said):
    with pytest.raises(ValueError, match=said):
        make()
