"""Layouts to and from FlexAttention's BlockMask, against its own `create_block_mask` and against dense attention."""

import shutil

import jaxtyping
import pytest
import torch
from hypothesis import given
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from regard.patterns import BlockLayout, Causal, Segments, Sinks, Window, per_head, per_sample
from tests.oracles import layout as oracle
from tests.oracles.attention import attention
from tests.patterns import catalogue

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
PATTERNS = [
    Window(20) | Sinks(3),
    Segments([0] * 37 + [1] * 50 + [2] * 13),
    per_head([Causal(), Window(9, 9)]),
    per_sample([Causal(), ~Causal(), Window(30) & ~Sinks(4)]),
    per_sample([per_head([Causal(), Sinks(40)]), per_head([Window(5), Window(0, 50)]), per_head([Causal()] * 2)]),
]


@pytest.fixture
def unchecked():
    """Annotations are not checked while FlexAttention traces `allows`: the checker cannot be traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@given(catalogue.cases(per_head=True))
def test_there_and_back(case):
    pattern, q_len, kv_len, start, block = case
    layout = pattern.layout(q_len, kv_len, block, start)
    mask = layout.to_block_mask(pattern, start)
    assert BlockLayout.from_block_mask(mask) == layout
    listed, _ = oracle.layout(pattern, q_len, kv_len, block, start)
    assert torch.equal(mask.to_dense().bool(), listed)
    # what the backward pass walks: the same blocks, key-major
    back = layout.transpose().to_block_mask(pattern.transpose())
    for mine, its in (("kv_num_blocks", "q_num_blocks"), ("full_kv_num_blocks", "full_q_num_blocks")):
        assert torch.equal(getattr(back, mine), getattr(mask, its))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_create_block_mask(pattern):
    """The tables of PyTorch's own, which evaluates every pair."""
    ours = pattern.layout(96, 96, 16).to_block_mask(pattern)
    theirs = create_block_mask(ours.mask_mod, pattern.samples, pattern.heads, 96, 96, "cpu", 16)
    for counts, table in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert torch.equal(getattr(ours, counts), getattr(theirs, counts))
        there = torch.arange(6) < getattr(ours, counts)[..., None]
        assert torch.equal(getattr(ours, table)[there], getattr(theirs, table)[there])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("q_len", "start"), [(100, 0), (30, 70), (33, 5)])
def test_flex_attention_with_our_mask_is_dense(pattern, q_len, start, unchecked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, q_len, 16, generator=generator)
    k, v = torch.randn(2, 3, 2, 100, 16, generator=generator)
    mask = pattern.layout(q_len, 100, (16, 32), start).to_block_mask(pattern, start)
    # Uncompiled, FlexAttention evaluates the mask of every pair and leaves the blocks alone; so blocks that are absent
    # are dropped by hand, and full ones let all through, as its kernels do.
    some, every = pattern.layout(q_len, 100, (16, 32), start).dense()
    samples, heads = pattern.samples or 1, pattern.heads or 1

    def by_blocks(b, h, i, j):
        at = b.clamp(max=samples - 1), h.clamp(max=heads - 1), i // 16, j // 32
        return every[at] | (some[at] & mask.mask_mod(b, h, i, j))

    allowed = torch.stack(
        [torch.stack([oracle.pairs(pattern, q_len, 100, start, h, b) for h in range(2)]) for b in range(3)]
    )
    weights, _, _ = attention(q, k, allowed, q_start=start)
    want = weights @ v.double()
    got = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    tables = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    lean = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=(16, 32), mask_mod=by_blocks, seq_lengths=(q_len, 100))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=lean).double(), want, atol=2e-6, rtol=1e-5)


def test_a_mask_without_full_blocks():
    layout = Causal().layout(64, 64, 16)
    mask = layout.to_block_mask(Causal())
    listed = layout.dense()[0].int()
    counts, table = listed.sum(-1).int(), listed.argsort(dim=-1, descending=True, stable=True).int()
    found = BlockLayout.from_block_mask(
        BlockMask.from_kv_blocks(counts, table, BLOCK_SIZE=16, mask_mod=mask.mask_mod, seq_lengths=(64, 64))
    )
    assert torch.equal(found.indices, layout.indices)
    assert not found.full.any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_flex_attention_with_our_mask(unchecked):
    pattern = Window(100) | Sinks(3)
    q, k, v = torch.randn(3, 1, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    mask = pattern.layout(512, 512, 128).to_block_mask(pattern)
    got = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    weights, _, _ = attention(q, k, oracle.pairs(pattern, 512, 512))
    torch.testing.assert_close(got.double(), weights @ v.double(), atol=2e-6, rtol=1e-5)
