"""Patterns chosen by sample: the blocked backend runs them apart, and gives what the dense reference gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels import blocked
from regard.kernels.attend import attend
from regard.patterns import Causal, Full, Routed, Sinks, Window, per_head, per_sample

CHOICES = (Full(), Sinks(2) | Window(3, 0), Window(1, 1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(0, 9),
    st.sampled_from([None, Causal(), per_head([Causal(), Window(4, 0)])]),
    st.sampled_from([None, Sinks(1)]),
    st.sampled_from([0, 1, 2]),
)
def test_it_is_attention_under_each_samples_own_pattern(which, queries, before, within, keep, biased):
    batch, keys = len(which), queries + before
    tensors = [drawn(batch, h, n, 8, seed=h) for h, n in ((2, queries), (1, keys), (1, keys))]
    bias = None if biased == 0 else drawn(batch if biased == 2 else 1, 1, queries, keys, seed=9)
    how = {"q_len": queries, "kv_len": keys, "within": within, "keep": keep, "heads": 2}
    routed = Routed.choose(CHOICES, torch.tensor(which)[:, None], **how)
    found = []
    for backend in ("blocked", "reference"):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out, lse = attend(q, k, v, routed, bias=bias, return_lse=True, backend=backend)
        (out.square().sum() + torch.where(lse.isfinite(), lse, 0).sum()).backward()
        found.append((out, lse, q.grad, k.grad, v.grad))
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)


def test_samples_of_one_choice_go_together_under_it_alone(monkeypatch):
    seen = []
    whole = blocked.run

    def spy(request):
        seen.append((request.pattern, len(request.q)))
        return whole(request)

    monkeypatch.setattr(blocked, "run", spy)
    q, k, v = drawn(3, 4, 2, 9, 8)
    routed = Routed.choose(CHOICES, torch.tensor([[1], [0], [1], [1]]), q_len=9, kv_len=9, within=Causal(), heads=2)
    attend(q, k, v, routed, backend="blocked")
    assert seen[1:] == [(Causal(), 1), (CHOICES[1] & Causal(), 3)]


@pytest.mark.parametrize("within", [None, per_sample([Causal(), Window(2, 0)])])
def test_decisions_by_head_and_rules_by_sample_stay_whole(within):
    q, k, v = drawn(3, 2, 2, 9, 8)
    which = torch.tensor([[0, 1], [1, 0]]) if within is None else torch.tensor([[0], [1]])
    routed = Routed.choose(CHOICES, which, q_len=9, kv_len=9, within=within, heads=2)
    want = attend(q, k, v, routed, backend="reference")
    torch.testing.assert_close(attend(q, k, v, routed, backend="blocked"), want)
