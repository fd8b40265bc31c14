import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.kernels.linear import block_linear, channel_softmax
from regard.patterns import BlockLayout, Causal, Full
from tests.oracles import linear as oracle


def elu1(x):
    return F.elu(x) + 1


@st.composite
def cases(draw):
    q_len, kv_len = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    block = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kv_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    per_head, per_sample = draw(st.booleans()), draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (batch if per_sample else 1, kv_heads * group if per_head else 1)
    n_q, n_k = -(-q_len // block[0]), -(-kv_len // block[1])
    listed = torch.rand(*shape, n_q, n_k, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    full = listed.clone()
    if kv_len % block[1]:
        full[..., -1] &= draw(st.booleans())  # a short last block may be called partial
    layout = BlockLayout.from_dense(listed, full, q_len, kv_len, block)
    dim, v_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    q = torch.randn(batch, kv_heads * group, q_len, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, kv_len, dim, generator=g, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, kv_len, v_dim, generator=g, dtype=torch.float64)
    return q, k, v, layout, listed


@given(cases(), st.sampled_from([channel_softmax, elu1]))
def test_equals_the_sum_over_pairs_with_gradients(case, feature):
    q, k, v, layout, listed = case

    def is_listed(b, h, i, j):
        return bool(listed[b % len(listed), h % listed.shape[1], i, j])

    weight = torch.randn(*q.shape[:3], v.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for mine in (True, False):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if mine:
            out = block_linear(*inputs, layout, feature=feature)
        else:
            out = oracle.block_linear(*inputs, is_listed, layout.block, feature)
            out = out + 0 * sum(x.sum() for x in inputs)  # there may be no pair at all
        gradients = torch.autograd.grad((out * weight).sum(), inputs)
        found.append([out, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_a_query_block_without_keys_is_zero():
    listed = torch.tensor([[True, True], [False, False]])
    layout = BlockLayout.from_dense(listed, listed, 4, 4, 2)
    q, k, v = (torch.randn(1, 1, 4, 3, requires_grad=True) for _ in range(3))
    out = block_linear(q, k, v, layout)
    assert (out[:, :, 2:] == 0).all()
    assert (out[:, :, :2] != 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@settings(max_examples=5)
@given(st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 99))
def test_half_precision_keeps_its_states_in_float32(dtype, seed):
    """Sums over 4096 keys: eight bits would lose whole blocks."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 4096, 8, generator=g).to(dtype)
    v = torch.ones(1, 1, 4096, 4).to(dtype)
    out = block_linear(q, k, v, Full().layout(4096, 4096, 64))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), torch.ones_like(out).float(), atol=4e-3, rtol=0)


@pytest.mark.parametrize(
    ("match", "layout"),
    [
        ("q_len=4 and kv_len=6, got one of 6 and 6", lambda: Full().layout(6, 6, 2)),
        ("1 or 2 heads", lambda: BlockLayout.from_dense(*[torch.ones(3, 2, 3, dtype=torch.bool)] * 2, 4, 6, 2)),
        ("1 or 1 samples", lambda: BlockLayout.from_dense(*[torch.ones(2, 1, 2, 3, dtype=torch.bool)] * 2, 4, 6, 2)),
        ("full blocks .* got 2 partial ones of 5", lambda: Causal().layout(4, 6, 2)),
        ("full blocks", lambda: Causal().layout(4, 6, (2, 5))),
    ],
)
def test_refusals(match, layout):
    q, k = torch.randn(1, 2, 4, 3), torch.randn(1, 1, 6, 3)
    with pytest.raises(ValueError, match=match):
        block_linear(q, k, k, layout())


def test_heads_that_do_not_group():
    with pytest.raises(ValueError, match="kv_heads must divide the 3 heads"):
        block_linear(torch.randn(1, 3, 4, 2), *torch.randn(2, 1, 2, 4, 2), Full().layout(4, 4, 2))


def test_autocast_changes_nothing():
    q, k, v = torch.randn(3, 1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    layout = Full().layout(16, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = block_linear(q, k, v, layout)
    assert torch.equal(found, block_linear(q, k, v, layout))
