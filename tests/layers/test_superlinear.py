"""Superlinear attention: spans from their formula, the layer from its definition, who learns through what."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.layers.position import Rope
from regard.layers.superlinear import SuperlinearAttention
from regard.patterns import Causal, Window, select
from regard.patterns.superlinear import Superlinear
from regard.train.objectives import span_mass
from tests.oracles import superlinear as oracle


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(route=None, heads=2, kv_heads=1, **how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SuperlinearAttention(8, heads, route, kv_heads=kv_heads, **how).double()


@given(
    st.sampled_from([1.5, 1.85, 2, 2.5]),
    st.integers(1, 4),
    st.sampled_from([0.5, 1, 2, 3]),
    st.sampled_from([0, 0.5, 1]),
    st.integers(0, 300),
)
def test_spans_and_window_are_their_formulas(p, s, b, f, t):
    route = Superlinear(p, s, 3, b, f)
    each, window = oracle.spans(t, p, s, b, f)
    start, stop = route.spans(torch.tensor([t]), route.steps(t + 1))
    assert [set(range(lo, hi)) for lo, hi in zip(start[0].tolist(), stop[0].tolist(), strict=True)] == each
    keys = torch.arange(t + 1)
    assert set(keys[(route.window & Causal()).allows(torch.tensor(t), keys)].tolist()) == window
    later = route.steps(t + 50)  # anchors that this query does not have
    start, stop = route.spans(torch.tensor([t]), later)
    assert (start < stop).sum() == len(each)


@pytest.mark.parametrize("b", [2, 1])
def test_reach_of_two_covers_every_past_key_and_one_does_not(b):
    missing = 0
    for t in range(700):
        each, window = oracle.spans(t, 2, 3, b, 1 if b == 1 else 0)
        missing += set().union(window, *each) != set(range(t + 1))
    assert (missing == 0) == (b == 2)


@pytest.mark.parametrize(
    "route", [Superlinear(), Superlinear(k=1), Superlinear(1.85, 2, 2, 1, 1), Superlinear(s=1, k=9)]
)
def test_the_layer_is_its_definition(route):
    layer, x = made(route), drawn(2, 60, 8)
    q1, q2, k, v = (
        proj(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        for proj in (layer.search_proj, layer.q_proj, layer.k_proj, layer.v_proj)
    )
    want = torch.zeros(2, 2, 60, 4, dtype=torch.float64)
    got = layer(x)
    for n in range(2):
        for h in range(2):
            out, chosen = oracle.attend(
                q1[n, h], q2[n, h], k[n, 0], v[n, 0], route.p, route.s, route.k, route.b, route.f
            )
            want[n, h] = torch.tensor(out)
            counts = (layer.routed.start < layer.routed.stop)[n, h].sum(-1).tolist()
            assert counts == [len(c) for c in chosen]
    torch.testing.assert_close(got, layer.o_proj(want.transpose(1, 2).flatten(2)), rtol=0, atol=1e-9)


def test_stepping_gives_the_numbers_of_one_pass():
    layer, x = made(position=Rope(4)).float(), drawn(1, 40, 8).float()
    state = layer.new_state()
    steps = [layer(part, state=state) for part in x.split([20, 1, 1, 18], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-4, atol=1e-5)


def test_summaries_are_appended_to_and_what_lies_within_uses_up_no_choice():
    route, q, k = Superlinear(), drawn(1, 2, 50, 4), drawn(1, 2, 50, 4, seed=1)
    whole = route(q, k)
    grown = route.select(q[:, :, -3:], route.summarize(k[:, :, 20:], past=route.summarize(k[:, :, :20])))
    assert torch.equal(grown.start[0, :, :, : whole.start.shape[3]], whole.start[:, :, -3:][0])
    near = (route & Window(30))(q, k)
    assert not torch.equal(near.start, whole.start)
    anchors = near.stop - 1  # f = 0
    assert (anchors[near.start < near.stop] >= 49 - 49).all()
    rows = torch.arange(50)[:, None].expand_as(near.start[0, 0])
    some = (near.start < near.stop)[0, 0]
    assert ((rows - anchors[0, 0])[some] <= 30).all()


def test_queries_looked_at_in_pieces_choose_the_same(monkeypatch):
    route, k = Superlinear(within=Causal()), drawn(2, 1, 57, 4, seed=1)
    found = {}
    for held, graph in ((select._CACHED, False), (1, False), (200, False), (1, True)):
        monkeypatch.setattr(select, "_CACHED", held)
        found[held, graph] = route(drawn(2, 2, 57, 4).requires_grad_(graph), k)
    whole, *others = found.values()
    for routed in others:
        assert torch.equal(routed.start, whole.start)
        assert torch.equal(routed.stop, whole.stop)
        torch.testing.assert_close(routed.score.detach(), whole.score)
    assert others[-1].score.requires_grad
    assert not torch.equal(whole.start, route(drawn(2, 2, 57, 4, seed=2), k).start)


def test_search_learns_through_the_gate_alone_and_not_at_all_from_one_span():
    x = drawn(1, 40, 8)
    for k, learns in ((3, True), (1, False)):
        layer = made(Superlinear(k=k))
        layer(x).square().sum().backward()
        gradient = layer.search_proj.weight.grad
        assert (gradient is not None and bool(gradient.abs().max() > 1e-9)) == learns
        assert layer.q_proj.weight.grad.abs().max() > 1e-6
    layer = made()
    layer(x[:, :10]).square().sum().backward()  # no query has an anchor
    assert layer.search_proj.weight.grad is None or layer.search_proj.weight.grad.abs().max() == 0
    layer = made(distill=span_mass)
    assert set(layer.aux) == set()
    layer(x)
    layer.aux["span_mass"].backward()
    assert layer.search_proj.weight.grad.abs().max() > 1e-6
    assert layer.q_proj.weight.grad is None
    layer.eval()(x)
    assert layer.aux == {}


def test_span_mass_is_the_cross_entropy_with_dense_mass():
    route, q, k = Superlinear(), drawn(2, 4, 37, 4), drawn(2, 2, 37, 4, seed=1)
    steps = route.steps(37)
    scores = route.scores(drawn(2, 4, 37, 4, seed=2), k, 0, steps).requires_grad_()
    start, stop = route.spans(torch.arange(37), steps)
    total = found = 0.0
    for b in range(2):
        for h in range(4):
            for t in range(37):
                row = np.array((k[b, h // 2, : t + 1] @ q[b, h, t] / 2).tolist())
                weights = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
                each = [(lo, hi) for lo, hi in zip(start[t].tolist(), stop[t].tolist(), strict=True) if lo < hi]
                if each:
                    told = np.array(scores[b, h, t, : len(each)].tolist())
                    log = told - told.max() - math.log(np.exp(told - told.max()).sum())
                    mass = np.array([weights[lo:hi].sum() for lo, hi in each])
                    found, total = found - float((mass * log).sum()), total + float(mass.sum())
    for tile in (256, 5):
        torch.testing.assert_close(span_mass(scores, start, stop, q, k, tile).item(), found / total, rtol=1e-9, atol=0)
    span_mass(scores, start, stop, q, k).backward()
    assert scores.grad.isfinite().all()


def test_what_does_not_fit():
    for how, told in (
        ({"p": 1}, "p must be above 1"),
        ({"s": 0}, "s must be"),
        ({"k": 0}, "k must be"),
        ({"b": -1}, "b must"),
    ):
        with pytest.raises(ValueError, match=told):
            Superlinear(**how)
    with pytest.raises(ValueError, match=r"pattern must be None or Causal\(\)"):
        made()(drawn(1, 4, 8), pattern=Window(3))
