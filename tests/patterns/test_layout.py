"""Layouts against the evaluation of every pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard.patterns as rp
from regard.patterns import Pattern
from tests.oracles import layout as oracle
from tests.patterns import catalogue

# The annotations' checker looks at a random item of a sequence, which hypothesis notices where it draws one.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
BLOCK = st.integers(1, 17) | st.tuples(st.integers(1, 17), st.integers(1, 17))


def check(pattern, q_len, kv_len, q_start, block):
    got = pattern.layout(q_len, kv_len, block, q_start)
    listed, full = oracle.layout(pattern, q_len, kv_len, block, q_start)
    some, every = got.dense()
    assert torch.equal(some, listed)
    assert torch.equal(every, full)
    for a, b in zip(got.indptr[:-1].tolist(), got.indptr[1:].tolist(), strict=True):
        assert (got.indices[a:b].diff() > 0).all(), "key blocks of a row must ascend"
    return got


@pytest.mark.parametrize("cls", catalogue.LEAVES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_every_class(cls, data):
    n = data.draw(st.integers(1, 40))
    n = n if catalogue.LEAVES[cls](n) is not None else n + 1
    pattern = data.draw(catalogue.LEAVES[cls](n))
    assert type(pattern) is cls
    size = data.draw(st.tuples(*[st.integers(1, 40)] * 2, st.integers(0, 40)))
    size = size if catalogue.fits(pattern, *size) else (n, n, 0)
    check(pattern, *size, data.draw(BLOCK))


def test_the_catalogue_is_whole():
    algebra = {rp.And, rp.Or, rp.Not, rp.PerHead, rp.PerSample, rp.Permuted, rp.Snap, rp.Transposed}
    public = {x for x in vars(rp).values() if isinstance(x, type) and issubclass(x, Pattern)}
    assert public - algebra - {Pattern, rp.StaticPattern} == set(catalogue.LEAVES)


@settings(max_examples=80)
@given(catalogue.cases(per_head=True))
def test_compositions(case):
    check(*case)
