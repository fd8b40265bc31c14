"""Every way to list keys, on every backend that computes gradients here, against pairs written down by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.patterns import Routed
from tests.patterns.routes import routed


def by_hand(q, k, v, pairs):
    """(out, lse) of one softmax over the pairs, float64."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5
    lse = scores.masked_fill(~pairs, -torch.inf).logsumexp(-1)
    some = pairs.any(-1)
    p = torch.where(pairs, (scores - torch.where(some, lse, 0)[..., None]).exp(), 0)
    return p @ v.repeat_interleave(group, 1), lse


def averaged(case, q, k, v):
    """The mean of what each group gives a query."""
    outs, count = 0, 0
    r = case.routed
    groups = max(len(head) for sample in case.listed for head in sample)
    for n in range(groups):
        pairs = torch.zeros(case.batch, case.heads, r.q_len, r.kv_len, dtype=torch.bool)
        there = torch.zeros(case.batch, case.heads, r.q_len)
        for b in range(case.batch):
            for h in range(case.heads):
                for i, keys in case.listed[b % len(case.listed)][h][n].items():
                    pairs[b, h, i, sorted(keys)] = True
                    there[b, h, i] = 1
        if r.within is not None:
            pairs &= case.static(r.within)
        outs = outs + by_hand(q, k, v, pairs)[0]
        count = count + there
    return outs / count.clamp(min=1)[..., None]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@settings(max_examples=50)
@given(case=routed(), seed=st.integers(0, 99))
def test_against_pairs_by_hand(backend, case, seed):
    r, g = case.routed, torch.Generator().manual_seed(seed)
    shapes = [(case.heads, r.q_len, 4), (case.kv_heads, r.kv_len, 4), (case.kv_heads, r.kv_len, 3)]
    inputs = [torch.randn(case.batch, *s, generator=g, dtype=torch.float64) for s in shapes]
    weight, slope = (torch.randn(case.batch, case.heads, r.q_len, n, generator=g).double() for n in (3, 1))

    def loss(out, lse):
        total = (out * weight).sum()
        return total if lse is None else total + (torch.where(lse == -torch.inf, 0, lse) * slope[..., 0]).sum()

    mean = r.repeats == "mean"
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    got = attend(*mine, r, q_start=r.q_start, backend=backend, return_lse=not mean)
    out, lse = (got, None) if mean else got
    want, want_lse = (averaged(case, *theirs), None) if mean else by_hand(*theirs, case.pairs())
    assert torch.allclose(out, want, atol=1e-10)
    if lse is not None:
        assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
        assert torch.allclose(lse, want_lse, atol=1e-10)
    loss(out, lse).backward()
    torch.autograd.backward(loss(want, want_lse))
    for x, y in zip(mine, theirs, strict=True):
        assert torch.allclose(x.grad, y.grad.nan_to_num(0), atol=1e-9)


def test_a_decision_for_each_kv_head_needs_no_word():
    """R = kv heads is taken as such by attend; other numbers are refused."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    index = torch.tensor([[0], [1]])[None, :, None].expand(1, 2, 3, 1)
    routed_ = Routed.blocks(index, block=2, q_len=6, kv_len=6)
    out = attend(q, k, k, routed_)
    assert torch.equal(out, attend(q, k, k, routed_.over(4)))
    assert torch.allclose(out[:, :2], attend(q[:, :2], k[:, :1, :2], k[:, :1, :2], q_start=0), atol=1e-6)
    assert torch.allclose(out[:, 2:], attend(q[:, 2:], k[:, 1:, 2:4], k[:, 1:, 2:4], q_start=0), atol=1e-6)
    with pytest.raises(ValueError, match="pattern is one of 3 heads, got q with 4"):
        attend(q, k, k, Routed.blocks(index[:, :1].expand(1, 3, 3, 1), block=2, q_len=6, kv_len=6))
