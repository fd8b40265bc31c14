"""Shapes rounded up to blocks: no less than the shape, no block too many, heads apart, densities without pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.patterns import AxisOrder, Causal, Diagonals, Routed, Window, per_head
from regard.plan.rounded import density_of, one_head, rounded, rounded_columns
from regard.plan.shapes import one_for_all, video_options
from tests.oracles.attention import attended


@given(
    st.sampled_from([(3, 4, 5), (2, 2, 9), (4, 4, 4)]), st.integers(0, 3), st.integers(0, 3), st.sampled_from([4, 8, 7])
)
def test_every_block_with_a_pair_and_no_other(shape, prefix, suffix, block):
    n, length = shape[1] * shape[2], prefix + shape[0] * shape[1] * shape[2] + suffix
    order = AxisOrder(shape, (1, 2, 0), prefix, suffix, block)
    pattern = Diagonals(n, 1, causal=False)
    i = torch.arange(length)
    exact = pattern.allows(i[:, None], i)
    for found, at in ((rounded(pattern, length, block), i), (rounded(pattern, length, block, order), order.inverse)):
        tile = at // block
        cells = int(tile.max()) + 1
        some = torch.zeros(cells, cells, dtype=torch.bool)
        for a, b in exact.nonzero().tolist():
            some[tile[a], tile[b]] = True
        wanted = some[tile[:, None], tile[None]]
        assert torch.equal(found.allows(i[:, None], i).expand(length, length), wanted)
        assert density_of(found, length, length) == pytest.approx(float(wanted.double().mean()))


@given(st.integers(0, 99), st.integers(1, 9), st.integers(0, 4), st.integers(0, 4), st.sampled_from([4, 16]))
def test_columns_are_those_of_each_head_and_text(seed, count, prefix, suffix, block):
    g = torch.Generator().manual_seed(seed)
    length = prefix + 40 + suffix
    columns = torch.stack([torch.randperm(40, generator=g)[:count].sort().values + prefix for _ in range(2)])
    routed = rounded_columns(columns, length, block, prefix=prefix, suffix=suffix)
    i = torch.arange(length)
    text = (i < prefix) | (i >= length - suffix)
    wanted = torch.stack([text | torch.isin(i, c) for c in columns])[:, None] | text[None, :, None]
    found = routed.allows(i[:, None], i, torch.arange(2)[:, None, None])
    assert torch.equal(found, wanted.expand(2, length, length))
    assert density_of(routed, length, length) == pytest.approx(float(found.double().mean()))
    q, k, v = torch.randn(3, 1, 2, length, 8, generator=g, dtype=torch.float64)
    out, lse = attend(q, k, v, routed, q_start=0, return_lse=True)
    want, want_lse = attended(q, k, v, routed, q_start=0)
    assert torch.allclose(out, want, atol=1e-9)
    assert torch.allclose(lse, want_lse, atol=1e-9)
    for head in range(2):
        alone = one_head(routed, head)
        assert isinstance(alone, Routed)
        assert alone.heads is None
        assert torch.equal(alone.allows(i[:, None], i).expand(length, length), found[head])


def test_patterns_of_other_kinds_are_left_to_themselves():
    both = per_head([Window(3), Causal()])
    assert one_head(both, 1) == Causal()
    assert density_of(Window(3), 9, 9) == Window(3).density(9, 9)


@pytest.mark.parametrize("block", [8, (16, 4), (12, 8)])
@pytest.mark.parametrize("text", [(0, 0), (3, 2)])
def test_options_rounded_up_hold_the_exact_ones(text, block):
    prefix, suffix = text
    length = prefix + 96 + suffix
    received = torch.rand(2, length, generator=torch.Generator().manual_seed(0))
    i, head = torch.arange(length), torch.arange(2)[:, None, None]
    how = {"prefix": prefix, "suffix": suffix}
    exact, blocks = (video_options((6, 4, 4), received, **how, block=b) for b in (None, block))
    assert list(exact) == list(blocks)
    for name, pattern in exact.items():
        more, less = (p.allows(i[:, None], i, head).expand(2, length, length) for p in (blocks[name], pattern))
        assert not bool((less & ~more).any()), name
        assert density_of(blocks[name], length, length) <= density_of(pattern, length, length) + 0.35, name
        if name in ("full", "stripe", "skip"):
            assert torch.equal(more, less), name
    for kind, pattern in one_for_all((6, 4, 4), 0.4, received, **how, block=block).items():
        assert 0.4 <= density_of(pattern, length, length) < 0.6, kind
