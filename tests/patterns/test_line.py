"""A line between two lists: its pairs, its rows, its blocks, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import Causal, Line


@st.composite
def lines(draw):
    queries = sorted(draw(st.sets(st.integers(0, 30), max_size=8)))
    keys = [draw(st.integers(0, 34)) for _ in queries]
    return queries, keys, draw(st.integers(0, 3))


def explicit(line, q_len, kv_len, start):
    counterpart = dict(zip(line.queries, line.keys, strict=True))
    rows = [
        [i in counterpart and abs(j - counterpart[i]) <= line.width for j in range(kv_len)]
        for i in range(start, start + q_len)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(q_len, kv_len)


@given(lines(), st.integers(1, 40), st.integers(1, 40), st.integers(0, 8))
def test_its_pairs_and_counts_are_the_definition(line, q_len, kv_len, start):
    line = Line(*line)
    want = explicit(line, q_len, kv_len, start)
    at = torch.arange(start, start + q_len)[:, None]
    assert torch.equal(line.allows(at, torch.arange(kv_len)[None]), want)
    assert torch.equal(line.row_counts(q_len, kv_len, start), want.sum(1))
    both = line & Causal()
    assert torch.equal(both.row_counts(q_len, kv_len, start), (want & (torch.arange(kv_len) <= at)).sum(1))


@given(lines(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4, (2, 5)]))
def test_its_blocks_are_those_of_the_pairs(line, q_len, kv_len, block):
    line = Line(*line)
    layout = line.layout(q_len, kv_len, block, q_start=0)
    bq, bk = layout.block
    want = explicit(line, q_len, kv_len, 0)
    some, full = layout.dense()
    for i in range(-(-q_len // bq)):
        for j in range(-(-kv_len // bk)):
            tile = want[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            assert bool(some.reshape(-1, some.shape[-1])[i, j]) == bool(tile.any())
            assert bool(full.reshape(-1, full.shape[-1])[i, j]) == bool(tile.all())


def test_values():
    assert Line([1, 4], [0, 2]) == Line(torch.tensor([1, 4]), torch.tensor([0, 2]))
    assert hash(Line([1, 4], [0, 2])) == hash(Line((1, 4), (0, 2)))
    assert Line([1, 4], [0, 2]) != Line([1, 4], [0, 2], 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([3, 3], [0, 1]), "queries must be integers >= 0, strictly ascending"),
        (([-1, 3], [0, 1]), "queries must be"),
        (([1, 3], [0]), "keys must be 2 integers"),
        (([1, 3], [0, -2]), "keys must be 2 integers"),
        (([1], [0], -1), "width must be an integer >= 0"),
    ],
)
def test_errors_name_the_argument(arguments, said):
    with pytest.raises(ValueError, match=said):
        Line(*arguments)
