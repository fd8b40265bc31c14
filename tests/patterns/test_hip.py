"""HiP against the text in plain Python; what it keeps, what it refuses, and that nothing to come is looked at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.patterns import Blocks, Causal, Window, Within, per_sample
from regard.patterns.candidates import candidates
from regard.patterns.hip import HiP
from regard.patterns.routed import Refresh
from tests.oracles.attention import attended
from tests.oracles.hip import chosen_blocks


def drawn(q_len, kv_len, batch=2, heads=4, kv_heads=2, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, h, n, dim, generator=g, dtype=torch.float64) for h, n in ((heads, q_len), (kv_heads, kv_len))
    )


def listed(routed, sample, head):
    return [row[:n].tolist() for row, n in zip(routed.index[sample, head], routed.count[sample, head], strict=True)]


@given(
    lengths=st.sampled_from([(90, 90), (33, 90), (1, 90), (5, 61), (40, 40), (90, 31)]),
    block=st.sampled_from([(8, 2), (4, 1), (8, 3)]),
    stride=st.integers(1, 3),
    blocks=st.sampled_from([1, 3, 4, 8]),
    sink=st.sampled_from([0, 3, 6]),
    within=st.sampled_from([None, Causal(), Window(50), Blocks(23) | Window(3)]),
)
def test_it_chooses_what_the_text_says(lengths, block, stride, blocks, sink, within):
    q_len, kv_len = lengths
    q, k = drawn(q_len, kv_len)
    route = HiP(blocks * block[1], block, stride, window=9, sink=sink)
    routed = route(q, k, within=within)
    may = None
    if within is not None:
        may = candidates(within, q_len, kv_len, block)[0, 0].tolist()
    for sample in range(2):
        for head in range(4):
            want, _ = chosen_blocks(
                q[sample, head], k[sample, head // 2], k_keys=route.k, block=block, stride=stride, window=9, sink=sink,
                q_start=kv_len - q_len, may=may,
            )  # fmt: skip
            assert listed(routed, sample, head) == want


def test_samples_padded_differently():
    q, k = drawn(60, 60)
    route = HiP(6, (4, 2), 1, window=6, sink=2)
    within = per_sample([Within(Causal(), 0, 60), Within(Causal(), 25, 60)])
    routed = route(q, k, within=within)
    for sample, start in ((0, 0), (1, 25)):
        may = candidates(Within(Causal(), start, 60), 60, 60, (4, 2))[0, 0].tolist()
        want, _ = chosen_blocks(
            q[sample, 1], k[sample, 0], k_keys=6, block=(4, 2), stride=1, window=6, sink=2, q_start=0, may=may
        )
        assert listed(routed, sample, 1) == want
    assert int(routed.index[1][routed.index[1] >= 0].min()) >= 12


def test_nothing_after_a_query_is_looked_at():
    """Changing keys and queries after a query block changes neither its blocks nor its outputs."""
    q, k = drawn(96, 96, batch=1)
    route = HiP(8, (8, 2), 2, window=8, sink=2)
    before = route(q, k)
    out = attend(q, k, k, before, q_start=0)
    for t in (40, 64):
        q2, k2 = q.clone(), k.clone()
        q2[:, :, t:], k2[:, :, t:] = 7, -3
        after = route(q2, k2)
        rows = t // 8
        assert torch.equal(before.index[:, :, :rows], after.index[:, :, :rows])
        assert torch.equal(before.count[:, :, :rows], after.count[:, :, :rows])
        torch.testing.assert_close(attend(q2, k2, k2, after, q_start=0)[:, :, :t], out[:, :, :t])
    causal = Causal().allows(torch.arange(96)[:, None], torch.arange(96))
    for head in range(4):
        pairs = before.allows(torch.arange(96)[:, None], torch.arange(96), torch.tensor(head), torch.tensor(0))
        assert not (pairs & ~causal).any()
        assert pairs.diagonal().all()


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_attention_over_it_and_its_gradients(backend):
    q, k = (x.requires_grad_() for x in drawn(70, 70))
    routed = HiP(8, (16, 2), 2, window=16, sink=3)(q, k, within=Causal())
    got = attend(q, k, k, routed, return_lse=True, backend=backend)
    want = attended(q, k, k, routed, q_start=0)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(x[0].sin().sum(), (q, k)) for x in (got, want)]
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-10, rtol=0)


def test_decoding_appends_and_decides_alike():
    q, k = drawn(50, 50)
    route = HiP(6, (4, 2), 1, window=4, sink=2)
    summary = route.summarize(k[:, :, :47])
    for t in range(47, 50):
        summary = route.summarize(k[:, :, t : t + 1], past=summary)
        step = route.select(q[:, :, t : t + 1], summary)
        whole = route(q[:, :, t : t + 1], k[:, :, : t + 1])
        assert step.equal(whole)
    kept = Refresh(route, every=8)
    first = kept.select(q[:, :, 40:41], route.summarize(k[:, :, :41]))
    later = kept.select(q[:, :, 44:45], route.summarize(k[:, :, :45]))
    assert torch.equal(first.index, later.index)
    assert later.allows(torch.tensor(44), torch.tensor(44), torch.tensor(0), torch.tensor(0))  # the window moves along


def test_dots_are_those_of_the_search():
    for kv_len, blocks in ((128, 4), (200, 3), (97, 8)):
        q, k = drawn(kv_len, kv_len, batch=1, heads=1, kv_heads=1)
        route = HiP(2 * blocks, (8, 2), 2, window=8, sink=4)
        _, dots = chosen_blocks(
            q[0, 0], k[0, 0], k_keys=2 * blocks, block=(8, 2), stride=2, window=8, sink=4, q_start=0
        )
        assert dots <= route.dots(kv_len, kv_len) <= 2 * dots + 64 * blocks  # a range of one block has one half
        assert route.cost(kv_len, kv_len, 4) == 4 * route.dots(kv_len, kv_len)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"k": 3}, "k must be a multiple of the key block 2"),
        ({"window": 63}, "window must be >= the query block 64"),
        ({"stride": 0}, "stride must be an integer >= 1"),
        ({"sink": -1}, "sink must be an integer >= 0"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"block": (64, 0)}, "block"),
    ],
)
def test_refusals_name_the_argument(how, told):
    with pytest.raises(ValueError, match=told):
        HiP(**how)


def test_scores_that_are_no_numbers_are_refused():
    q, k = drawn(60, 60)
    k[0, 0, 20] = torch.nan
    with pytest.raises(ValueError, match=r"scores must be numbers.*NaN"):
        HiP(4, (4, 2), 1, window=4, sink=0)(q, k)
