import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from regard.kernels.linear import channel_softmax
from regard.layers.sla import SparseLinearAttention
from tests.layers.contract import jitter

DIM = 4


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def explicit(layer, q, k, v, critical, negligible, block):
    """O_s and O_l, block by block, straight from the paper."""
    heads, q_len, kv_len, group = q.shape[1], q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    columns = [range(j, min(j + block, kv_len)) for j in range(0, kv_len, block)]
    sparse, linear = torch.zeros_like(q), torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(heads):
            keys, values = k[b, h // group], v[b, h // group]
            for top in range(0, q_len, block):
                rows = range(top, min(top + block, q_len))
                pooled = sum(q[b, h, i] for i in rows) / len(rows)
                scores = torch.stack(
                    [pooled @ (sum(keys[j] for j in c) / len(c)) / math.sqrt(DIM) for c in columns]
                ).tolist()
                n = len(columns)
                ranked = sorted(range(n), key=lambda c, s=scores: (-s[c], c))
                high = max(1, math.floor(critical * n + 1e-9))
                low = math.floor(negligible * n + 1e-9) if layer.linear == "marginal" else 0
                marginal = range(n) if layer.linear == "all" else ranked[high : max(n - low, high)]
                near = [j for c in sorted(ranked[:high]) for j in columns[c]]
                far = [j for c in marginal for j in columns[c]]
                for i in rows:
                    weights = torch.softmax(torch.stack([q[b, h, i] @ keys[j] / math.sqrt(DIM) for j in near]), 0)
                    sparse[b, h, i] = sum(w * values[j] for w, j in zip(weights, near, strict=True))
                    phi = torch.softmax(q[b, h, i], 0)
                    state = sum((torch.outer(torch.softmax(keys[j], 0), values[j]) for j in far), torch.zeros(DIM, DIM))
                    mass = sum((phi @ torch.softmax(keys[j], 0) for j in far), torch.tensor(0.0))
                    linear[b, h, i] = phi @ state.to(phi) / (mass + 1e-5)
    return sparse, linear


@settings(max_examples=12)
@given(
    lengths=st.tuples(st.integers(1, 13), st.integers(1, 13)), block=st.integers(1, 4),
    kv_heads=st.integers(1, 2), group=st.integers(1, 2), shares=st.sampled_from([(0.05, 0.1), (0.3, 0.4), (0.5, 0.5)]),
    linear=st.sampled_from(["marginal", "rest", "all"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_formula_block_by_block(lengths, block, kv_heads, group, shares, linear, seed):
    layer = jitter(SparseLinearAttention(DIM, *shares, linear, block=block)).double()
    q = draw((2, kv_heads * group, lengths[0], DIM), seed)
    k, v = draw((2, kv_heads, lengths[1], DIM), seed + 1), draw((2, kv_heads, lengths[1], DIM), seed + 2)
    sparse, rest = explicit(layer, q, k, v, *shares, block)
    found = layer.parts(q, k, v)
    torch.testing.assert_close(found[0], sparse, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(found[1], rest, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(layer(q, k, v), sparse + rest @ layer.proj.weight.T, atol=1e-10, rtol=1e-9)


def test_starts_as_sparse_attention_and_learns_from_there():
    layer = SparseLinearAttention(DIM, 0.25, 0.25, block=4)
    q, k, v = (draw((1, 2, 32, DIM), s, torch.float32).requires_grad_() for s in range(3))
    torch.testing.assert_close(layer(q, k, v), layer.parts(q, k, v)[0])
    layer(q, k, v).square().sum().backward()
    for x in (layer.proj.weight, q, k, v):
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


def test_critical_everywhere_is_dense_attention():
    layer = SparseLinearAttention(DIM, 1, 0, block=4)
    q, k, v = (draw((1, 2, 18, DIM), s) for s in range(3))
    sparse, rest = layer.double().parts(q, k, v)
    torch.testing.assert_close(sparse, F.scaled_dot_product_attention(q, k, v))
    assert (rest == 0).all()


def test_classes():
    layer = SparseLinearAttention(DIM, 0.25, 0.25, block=2)
    q, k = draw((1, 2, 8, DIM), 0), draw((1, 2, 16, DIM), 1)
    found = layer.classes(q, k)
    assert found.shape == (1, 2, 4, 8)
    assert found.dtype == torch.int8
    assert torch.equal((found == 1).sum(-1), torch.full((1, 2, 4), 2))
    assert torch.equal((found == -1).sum(-1), torch.full((1, 2, 4), 2))
    moved = layer.classes(q, k + 7 * draw((1, 2, 1, DIM), 5))
    assert torch.equal(moved, found)  # what all keys have in common moves no choice
    pooled = q.unflatten(2, (4, 2)).mean(3) @ k.unflatten(2, (8, 2)).mean(3).mT
    assert torch.equal(found == 1, pooled >= pooled.topk(2, -1).values[..., -1:])


def test_the_feature_map_of_the_rest():
    assert torch.equal(channel_softmax(torch.zeros(1, 4)), torch.full((1, 4), 0.25))
    layer = SparseLinearAttention(DIM, linear="all", block=4, feature=lambda x: F.elu(x) + 1)
    q, k, v = (draw((1, 1, 9, DIM), s) for s in range(3))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    torch.testing.assert_close(layer.parts(q, k, v)[1], weights @ v / (weights.sum(-1, keepdim=True) + 1e-5))


def test_bfloat16():
    layer = jitter(SparseLinearAttention(DIM, 0.25, 0.25, block=4)).bfloat16()
    q, k, v = (draw((1, 2, 18, DIM), s).bfloat16() for s in range(3))
    assert layer(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("match", "how"),
    [
        ("linear", {"linear": "none"}),
        ("kh must lie in", {"critical": -0.1}),
        ("critical and negligible must add to 1 at most", {"critical": 0.7, "negligible": 0.4}),
        ("block must be an integer >= 1", {"block": 0}),
    ],
)
def test_refusals(match, how):
    with pytest.raises((ValueError, TypeCheckError), match=match):
        SparseLinearAttention(DIM, **how)
