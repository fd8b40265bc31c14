"""What `explain` counts is what is there, and its time is a number."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regard
from regard.kernels.attend import BACKENDS
from regard.kernels.explain import explain
from regard.patterns import Causal, Neighborhood, Sinks, Window, per_head
from tests.kernels.calls import ANY_LENGTH


@given(
    st.sampled_from([*ANY_LENGTH, per_head([Causal(), Window(3), Window(0), Window(90) | Sinks(2)])]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2),
    st.sampled_from(sorted(BACKENDS)),
)
def test_counts_are_exact(pattern, q_len, kv_len, batch, name):
    q, k = torch.zeros(batch, 4, q_len, 16), torch.zeros(batch, 2, kv_len, 16)
    v = torch.zeros(batch, 2, kv_len, 24)
    told = explain(q, k, v, pattern, backend=name)
    start = kv_len - q_len
    i, j = torch.arange(start, start + q_len)[:, None], torch.arange(kv_len)[None]
    pairs = pattern.allows(i, j, torch.arange(4)[:, None, None]).expand(4, q_len, kv_len)
    assert told.backend == name
    assert told.pairs == batch * 4 * q_len * kv_len
    assert told.allowed == batch * int(pairs.sum())
    assert told.allowed <= told.computed
    assert told.full <= told.blocks
    assert told.operations >= 2 * (16 + 24) * told.allowed
    assert math.isfinite(told.predicted)
    assert told.predicted >= 0
    if name == "reference":
        assert told.block == []
        assert told.computed == told.pairs
    if name == "flex":
        ((bq, bk),) = told.block
        blocks = [pairs[:, a : a + bq, b : b + bk] for a in range(0, q_len, bq) for b in range(0, kv_len, bk)]
        listed = [x[h] for x in blocks for h in range(4) if bool(x[h].any())]
        assert told.blocks == batch * len(listed)
        assert told.full == batch * sum(bool(x.all()) for x in listed)
        assert told.partial == told.blocks - told.full
        assert told.computed == batch * sum(x.numel() for x in listed)


def test_it_prints_what_it_knows():
    q = torch.zeros(1, 2, 256, 16)
    text = str(explain(q, q, q, Window(40), backend="flex"))
    for line in ("backend     flex", "blocks      6 of 128 x 128 (0 full, 6 partial), closed form", "predicted"):
        assert line in text
    text = str(regard.explain(q, q, q, Window(40)))
    assert "backend     blocked" in text
    assert "not flex: compiles for seconds on a CPU" in text
    assert "density     0.1476 of 131,072 pairs allowed" in text


def test_a_grid_is_told_in_tiles():
    q = torch.zeros(1, 1, 24 * 24, 16)
    told = explain(q, q, q, Neighborhood((24, 24), (5, 5)), backend="flex", q_start=0)
    assert told.allowed == 24 * 24 * 25
    assert "tiles of 8x16" in str(told)


def test_refusals_are_those_of_attend():
    q = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match='backend="flex" refuses this call'):
        explain(q, q, q, backend="flex")
    with pytest.raises(ValueError, match="bias must broadcast"):
        explain(q, q, q, bias=torch.zeros(3))
