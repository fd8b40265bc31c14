"""Layouts against the evaluation of every pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard.patterns as rp
from regard.patterns import BlockLayout, Causal, Pattern, Sinks, Window
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
    algebra = {rp.And, rp.Or, rp.Not, rp.PerHead, rp.PerSample, rp.Permuted, rp.Routed, rp.Snap, rp.Transposed}
    public = {x for x in vars(rp).values() if isinstance(x, type) and issubclass(x, Pattern)}
    assert public - algebra - {Pattern, rp.StaticPattern} == set(catalogue.LEAVES)


@settings(max_examples=80)
@given(catalogue.cases(per_head=True))
def test_compositions(case):
    check(*case)


@given(catalogue.cases(per_head=True), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_transpose_coarsen_and_density(case, factor):
    pattern, q_len, kv_len, start, block = case
    layout = pattern.layout(q_len, kv_len, block, start)
    turned = layout.transpose()
    for mine, its in zip(turned.dense(), layout.dense(), strict=True):
        assert torch.equal(mine, its.transpose(-1, -2))
    assert turned.transpose() == layout
    bq, bk = layout.block
    larger = (bq * factor[0], bk * factor[1])
    assert layout.coarsen(factor) == pattern.layout(q_len, kv_len, larger, start)
    some, every = layout.dense()
    assert BlockLayout.from_dense(some, every, q_len, kv_len, block) == layout
    cells = some.repeat_interleave(bq, -2).repeat_interleave(bk, -1)[..., :q_len, :kv_len]
    assert layout.density == pytest.approx(cells.double().mean().item())


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("rule", ["paper", "release"])
def test_rows_of_video_frames_are_slices(rule, sink):
    """Where blocks divide frames, `Radial` takes another way; both give the same."""
    for frames, tokens, block, start, q_len in [(7, 12, (4, 6), 0, 84), (9, 8, (2, 8), 22, 40), (1, 6, (3, 2), 3, 3)]:
        pattern = rp.Radial(frames, tokens, sink, rule, block=2 if rule == "release" else None)
        got = pattern.layout(q_len, frames * tokens, block, start)
        assert got == Pattern.layout(pattern, q_len, frames * tokens, block, start)


def test_a_million_tokens():
    n = 1 << 20
    layout = ((Window(1023) | Sinks(4)) & Causal()).layout(n, n, 128)
    assert layout.n_blocks == 8 * 9 // 2 + 8184 * 9 + 8183  # the window, and the sinks' block where it is apart
    assert int(layout.full.sum()) == 7 * 8 // 2 + 8184 * 7
    assert layout.indices.dtype == torch.int32


def test_empty_sides():
    for q_len, kv_len in [(0, 9), (9, 0), (0, 0)]:
        layout = Causal().layout(q_len, kv_len, 4, 0)
        assert (layout.n_blocks, layout.n_q_blocks) == (0, -(-q_len // 4))
        assert layout.density == 0.0
        assert layout.transpose().n_q_blocks == -(-kv_len // 4)
        assert layout.coarsen(2).n_blocks == 0


def test_values_and_errors():
    layout = Causal().layout(9, 9, 4)  # the last block is one pair, and full
    assert layout != Causal().layout(9, 9, 3)
    assert layout != 3
    assert layout == Window(9).layout(9, 9, (4, 4))
    assert "BlockLayout(9 x 9 by (4, 4): 6 blocks (4 full)" in repr(layout)
    assert layout.nbytes == 4 * 8 + 6 * 4 + 6
    with pytest.raises(ValueError, match=r"indptr must have .* = 4 entries, got 3"):
        BlockLayout(layout.indptr[:3], layout.indices, layout.full, 9, 9, (4, 4))
    with pytest.raises(ValueError, match=r"indices and full must have .* = 6 entries, got 5 and 5"):
        BlockLayout(layout.indptr, layout.indices[:5], layout.full[:5], 9, 9, (4, 4))
    with pytest.raises(ValueError, match=r"some must end in \(3, 3\) blocks"):
        BlockLayout.from_dense(torch.ones(2, 3).bool(), torch.ones(2, 3).bool(), 9, 9, 4)
    with pytest.raises(ValueError, match="factor must be an integer >= 1"):
        layout.coarsen(0)
