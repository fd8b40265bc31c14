import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.kernels.rectify import pooled_rest, rectified
from regard.patterns import Causal, Columns, Queries, Window, per_sample
from regard.patterns.routed import Routed
from regard.patterns.select import to_index
from regard.tasks.qk import block_constant_qk
from tests.oracles import rectify as oracle

GATES = ["gapr", "all", "none"]


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_blocks(lead, q_len, kv_len, block, share, seed, **how):
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    listed = torch.rand(*lead, rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    return Routed.blocks(*to_index(listed), block=block, q_len=q_len, kv_len=kv_len, q_start=0, **how)


def in_blocks(order, size):
    slots = [[t for t in order[n : n + size] if t >= 0] for n in range(0, len(order), size)]
    return slots


def asked(routed, batch=2, heads=2):
    """The pattern as a function of (sample, head, i, j)."""
    b, h, i, j = (
        torch.arange(n).view([-1 if m == axis else 1 for m in range(4)])
        for axis, n in enumerate((batch, heads, routed.q_len, routed.kv_len))
    )
    allowed = routed.allows(i, j, h, b).expand(batch, heads, routed.q_len, routed.kv_len).tolist()
    return lambda b, h, i, j: allowed[b][h][i][j]


@settings(max_examples=20)
@given(
    q_len=st.integers(1, 9), kv_len=st.integers(1, 9), block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kv_heads=st.integers(1, 2), group=st.integers(1, 2), decisions=st.sampled_from(["one", "kv", "each"]),
    gate=st.sampled_from(GATES), share=st.sampled_from([0.0, 0.4, 1.0]), keep=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_formula_one_block_at_a_time(
    q_len, kv_len, block, kv_heads, group, decisions, gate, share, keep, seed
):
    heads = kv_heads * group
    lead = (2, {"one": 1, "kv": kv_heads, "each": heads}[decisions])
    routed = random_blocks(
        lead, q_len, kv_len, block, share, seed, keep=Window(1) if keep else None, heads=heads if lead[1] > 1 else None
    )
    q, k, v = (
        draw((2, heads, q_len, 3), seed),
        draw((2, kv_heads, kv_len, 3), seed + 1),
        draw((2, kv_heads, kv_len, 2), 7),
    )
    blocks = [in_blocks(list(range(n)), size) for n, size in zip((q_len, kv_len), block, strict=True)]
    out, kept, rest = oracle.rectified(q, k, v, asked(routed, 2, heads), *blocks, gate=gate)
    found = pooled_rest(q, k, v, routed, gate=gate)
    torch.testing.assert_close(found.kept, kept, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(found.rest, rest, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(rectified(q, k, v, routed, gate=gate), out, atol=1e-10, rtol=1e-9)


@settings(max_examples=10)
@given(
    gate=st.sampled_from(GATES), text=st.integers(1, 5), share=st.sampled_from([0.0, 0.5]), ordered=st.booleans(),
    masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_text_orders_and_invalid_keys(gate, text, share, ordered, masked, seed):
    """Text keeps its place at the end, in blocks of its own, and is attended to by all; some of it may be padding."""
    seen, size = 8, 4
    n = seen + text
    order = list(range(n))
    if ordered:
        order = torch.randperm(seen, generator=torch.Generator().manual_seed(seed)).tolist()[:7]
        order = order[:5] + [-1] + order[5:] + [t for t in range(seen) if t not in order] + [-1] * 3
        order = order + list(range(seen, n))
    lead = torch.tensor(order)[None, None] if ordered else None
    rows = -(-len(order) // size)
    generator = torch.Generator().manual_seed(seed)
    listed = torch.rand(2, 2, rows, rows, generator=generator) < share
    valid = torch.ones(2, n, dtype=torch.bool)
    within = None
    if masked:
        valid[1, -1] = valid[0, 2] = False
        within = per_sample([Columns(((0, 2), (3, n))), Columns(((0, n - 1),))])
    routed = Routed.blocks(
        *to_index(listed), block=size, q_len=n, kv_len=n, q_order=lead, kv_order=lead, within=within,
        keep=Columns(((seen, n),)) | Queries(((seen, n),)),
    )  # fmt: skip
    q, k, v = (draw((2, 2, n, 3), seed + s) for s in range(3))
    blocks = in_blocks(order, size)
    q_blocks, k_blocks = blocks, [b for b in blocks if not b or b[0] < seen]
    out, kept, rest = oracle.rectified(
        q, k, v, asked(routed), q_blocks, k_blocks, gate, range(seen, n), lambda b, j: bool(valid[b, j])
    )
    how = {"gate": gate, "text": text, "valid": valid if masked else None}
    found = pooled_rest(q, k, v, routed, **how)
    torch.testing.assert_close(found.kept, kept, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(found.rest, rest, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(rectified(q, k, v, routed, **how), out, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(found.kept[:, :, seen:], torch.ones(2, 2, text, dtype=torch.float64))  # text is dense


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(["gapr", "all"]), st.integers(0, 99))
def test_exact_where_blocks_are_constant(blocks, block, gate, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = block_constant_qk(blocks, block, 8, generator, heads=2, dtype=torch.float64)
    q, k = q[:, :, : -(block - 1) or None], k[:, :, : -(block - 1) or None]  # a short last block
    v = draw((1, 2, k.shape[2], 3), seed)
    routed = random_blocks((1, 2), q.shape[2], k.shape[2], (block, block), 0.4, seed)
    torch.testing.assert_close(rectified(q, k, v, routed, gate=gate), attend(q, k, v, q_start=0), atol=1e-10, rtol=1e-8)


def test_each_order_of_a_sample_and_head_is_its_own():
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(8, generator=generator) for _ in range(4)]).view(2, 2, 8)
    listed = torch.rand(2, 2, 4, 4, generator=generator) < 0.4
    routed = Routed.blocks(*to_index(listed), block=2, q_len=8, kv_len=8, q_order=orders, kv_order=orders)
    q, k, v = (draw((2, 2, 8, 3), s) for s in range(3))
    found, allows = rectified(q, k, v, routed, gate="all"), asked(routed)
    for b in range(2):
        for h in range(2):
            blocks = in_blocks(orders[b, h].tolist(), 2)
            one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
            out, _, _ = oracle.rectified(*one, lambda _b, _h, i, j, b=b, h=h: allows(b, h, i, j), blocks, blocks, "all")
            torch.testing.assert_close(found[b : b + 1, h : h + 1], out, atol=1e-10, rtol=1e-9)


def test_half_precision_and_gradients():
    routed = random_blocks((1, 1), 16, 16, (4, 4), 0.5, 0)
    q, k, v = (draw((1, 2, 16, 8), s).to(torch.bfloat16).requires_grad_() for s in range(3))
    kept, rest = pooled_rest(q, k, v, routed, gate="all")
    assert kept.dtype == torch.float32
    assert rest.dtype == torch.bfloat16
    rectified(q, k, v, routed, gate="all").sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (q, k, v))


def test_autocast_changes_nothing():
    routed = random_blocks((1, 1), 16, 16, (4, 4), 0.5, 0)
    q, k, v = (draw((1, 2, 16, 8), s).float() for s in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = pooled_rest(q, k, v, routed)
    for a, b in zip(found, pooled_rest(q, k, v, routed), strict=True):
        assert torch.equal(a, b)


def test_refusals():
    q, k, v = (draw((1, 2, 8, 3), s) for s in range(3))
    routed = random_blocks((1, 1), 8, 8, (2, 2), 0.5, 0)
    with pytest.raises(ValueError, match="routed was decided for q_len=8, kv_len=8, got 6 and 8"):
        pooled_rest(q[:, :, :6], k, v, routed)
    with pytest.raises(ValueError, match=r"text must fill blocks of its own .* got 3 text keys of 8"):
        pooled_rest(q, k, v, routed, text=3)
    with pytest.raises(ValueError, match="routed must keep all 2 text keys"):
        pooled_rest(q, k, v, random_blocks((1, 1), 8, 8, (2, 2), 0.0, 0), text=2)
    with pytest.raises(ValueError, match=r"text must be in 0\.\.8"):
        pooled_rest(q, k, v, routed, text=9)
    with pytest.raises(ValueError, match=r"valid must say which keys routed\.within allows"):
        pooled_rest(q, k, v, random_blocks((1, 1), 8, 8, (2, 2), 0.5, 0, within=Causal()))
    with pytest.raises(ValueError, match="3 heads and None samples, got 2 and 1"):
        pooled_rest(q, k, v, random_blocks((1, 3), 8, 8, (2, 2), 0.5, 0))
    spans = Routed.spans(*torch.zeros(2, 1, 1, 8, 1, dtype=torch.int32), q_len=8, kv_len=8)
    with pytest.raises(ValueError, match="routed must list blocks"):
        pooled_rest(q, k, v, spans)
    orders = torch.stack([torch.arange(8), torch.arange(8).flip(0)])[None]
    index = torch.zeros(1, 2, 4, 1, dtype=torch.int32)
    apart = Routed.blocks(index, block=2, q_len=8, kv_len=8, q_order=orders, kv_order=orders, keep=Window(1))
    with pytest.raises(ValueError, match="routed must have one order"):
        pooled_rest(q, k, v, apart)
