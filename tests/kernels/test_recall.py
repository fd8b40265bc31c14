"""Kept mass, and the three controls of equal width: from the definition, by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.kernels.recall import kept_mass, local_blocks, oracle_blocks, random_blocks
from regard.patterns import Causal, Full, Sinks, TileOrder, Window, per_head
from regard.patterns.block_topk import BlockTopK
from regard.patterns.decided import Routed
from regard.patterns.select import topk


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(batch=2, heads=4, kv_heads=2, q_len=40, kv_len=40, dim=8, seed=0):
    g = seeded(seed)
    q = 2 * torch.randn(batch, heads, q_len, dim, generator=g, dtype=torch.float64)
    return q, torch.randn(batch, kv_heads, kv_len, dim, generator=g, dtype=torch.float64)


def weights(q, k, within, q_start):
    """Softmax weights ``[batch, heads, q_len, kv_len]`` within a pattern, and its pairs."""
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    allowed = pairs(within, q.shape[0], heads, q_len, kv_len, q_start)
    scores = q @ k.repeat_interleave(heads // k.shape[1], 1).mT / q.shape[3] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(), allowed


def pairs(pattern, batch, heads, q_len, kv_len, q_start):
    i, j = torch.arange(q_len)[:, None] + q_start, torch.arange(kv_len)[None]
    head, sample = torch.arange(heads)[:, None, None], torch.arange(batch)[:, None, None, None]
    pattern = Full() if pattern is None else pattern
    return pattern.allows(i, j, head, sample).expand(batch, heads, q_len, kv_len)


@given(
    lengths=st.sampled_from([(40, 40), (7, 40), (40, 25)]),
    pattern=st.sampled_from([Window(4), Sinks(2) | Window(3), Sinks(1), per_head([Window(2), Window(9)] * 2)]),
    within=st.sampled_from([None, Causal(), Window(12)]),
    scale=st.sampled_from([None, 0.7]),
)
def test_kept_mass_is_the_sum_of_the_weights(lengths, pattern, within, scale):
    q_len, kv_len = lengths
    q, k = drawn(q_len=q_len, kv_len=kv_len)
    mass = kept_mass(q, k, pattern, within=within, scale=scale)
    p, allowed = weights(q * (1 if scale is None else scale * 8**0.5), k, within, kv_len - q_len)
    want = (p * pairs(pattern, 2, 4, q_len, kv_len, kv_len - q_len)).sum(-1)
    want = torch.where(allowed.any(-1), want, 1)
    torch.testing.assert_close(mass, want, atol=1e-12, rtol=0)
    assert float(mass.max()) <= 1


def test_kept_mass_of_a_route_is_of_what_it_was_decided_within():
    q, k = drawn()
    routed = BlockTopK((8, 4), select=topk(2), keep=Sinks(1))(q, k, within=Causal())
    p, _ = weights(q, k, Causal(), 0)
    want = (p * pairs(routed, 2, 4, 40, 40, 0)).sum(-1)
    torch.testing.assert_close(kept_mass(q, k, routed), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(kept_mass(q, k, routed, within=Causal()), want, atol=1e-12, rtol=0)
    narrow, _ = weights(q, k, Window(10), 0)
    want = (narrow * pairs(routed, 2, 4, 40, 40, 0)).sum(-1)
    torch.testing.assert_close(kept_mass(q, k, routed, within=Window(10)), want, atol=1e-12, rtol=0)


def test_kept_mass_is_differentiable():
    q, k = (x.requires_grad_() for x in drawn())
    got = torch.autograd.grad(kept_mass(q, k, Window(3), within=Causal()).log().sum(), (q, k))
    p, allowed = weights(q, k, Causal(), 0)
    want = torch.autograd.grad((p * (allowed & pairs(Window(3), 2, 4, 40, 40, 0))).sum(-1).log().sum(), (q, k))
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-10, rtol=0)


ROUTES = {
    "each": {"block": (8, 4), "heads": "each"},
    "kv": {"block": (8, 4), "heads": "kv"},
    "all": {"block": (8, 8), "heads": "all"},
    "keep": {"block": (8, 4), "heads": "each", "keep": Sinks(2) | Window(3)},
    "single": {"block": (1, 4), "heads": "each"},
    "tokens": {"block": (1, 1), "heads": "kv"},
    "tiles": {"block": (8, 8), "heads": "each", "order": TileOrder((5, 8), (2, 4))},
}


def routed_of(name, q, k, width=3):
    within = None if name == "tiles" else Causal()
    return BlockTopK(select=topk(width), **ROUTES[name])(q, k, within=within)


def mass_by_blocks(q, k, routed):
    """``[batch, decisions, rows, columns]``: mass and whether any pair is allowed, not counting what keep holds."""
    batch, heads, q_len, kv_len = *q.shape[:3], k.shape[2]
    p, allowed = weights(q, k, routed.within, routed.q_start)
    if routed.keep is not None:
        kept = pairs(routed.keep, batch, heads, q_len, kv_len, routed.q_start)
        p, allowed = p * ~kept, allowed & ~kept
    order = routed.q_order
    q_slots, k_slots = (torch.arange(n) if order is None else order[0, 0] for n in (q_len, kv_len))
    shape = (batch, heads, routed.n_rows, routed.n_columns)
    mass, may = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    for a, i in enumerate(q_slots.tolist()):
        for b, j in enumerate(k_slots.tolist()):
            if i >= 0 and j >= 0:
                at = (slice(None), slice(None), a // routed.block[0], b // routed.block[1])
                mass[at] += p[:, :, i, j]
                may[at] |= allowed[:, :, i, j]
    return mass.unflatten(1, (routed.decisions, -1)).sum(2), may.unflatten(1, (routed.decisions, -1)).any(2)


@pytest.mark.parametrize("name", ROUTES)
def test_controls_have_the_same_width_and_choose_among_the_same(name):
    q, k = drawn()
    routed = routed_of(name, q, k)
    _, may = mass_by_blocks(q, k, routed)
    controls = [random_blocks(routed, seeded(n)) for n in range(3)] + [
        local_blocks(routed),
        oracle_blocks(q, k, routed),
    ]
    for control in controls:
        assert (control.within, control.keep, control.block) == (routed.within, routed.keep, routed.block)
        assert control.score is None
        checked = Routed.blocks(  # refuses what is not ascending, repeated, out of range
            control.index, control.count, block=control.block, q_len=40, kv_len=40, q_order=control.q_order,
            kv_order=control.kv_order,
        )  # fmt: skip
        assert checked.index.shape[:3] == routed.index.shape[:3]
        n = may.shape[-1]
        chosen = torch.zeros(*may.shape[:-1], n + 1, dtype=torch.bool)
        chosen = chosen.scatter_(-1, control.index.long() % (n + 1), True)[..., :n]
        # as many as listed, or all there are; what keep covers only after all the others
        assert torch.equal(control.count, torch.minimum(routed.count, may.sum(-1).int())) or routed.keep is not None
        wasted = chosen & ~may
        assert not (wasted.any(-1) & (may & ~chosen).any(-1)).any()
    draws = torch.stack([c.index for c in controls[:3]]) if len({c.index.shape for c in controls[:3]}) == 1 else None
    assert draws is None or not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("name", ROUTES)
def test_the_oracle_has_the_most_mass(name):
    q, k = drawn()
    routed = routed_of(name, q, k)
    mass, may = mass_by_blocks(q, k, routed)
    oracle = oracle_blocks(q, k, routed)
    got = mass.gather(-1, oracle.index.clamp(min=0).long()).masked_fill(oracle.index < 0, 0).sum(-1)
    n = routed.count.long()[..., None]
    best = mass.masked_fill(~may, 0).sort(-1, descending=True).values
    want = torch.where(torch.arange(best.shape[-1]) < n, best, 0).sum(-1)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    others = [routed, random_blocks(routed, seeded(1)), local_blocks(routed)]
    kept, *rest = (float(kept_mass(q, k, x).mean()) for x in (oracle, *others))
    if routed.decisions == 4:
        assert kept >= max(rest) - 1e-12


def test_local_blocks_are_the_nearest():
    index = torch.tensor([[[[0, 3, 5, -1], [0, 1, 4, 5], [-1] * 4]]])
    routed = Routed.blocks(index, block=(4, 2), q_len=12, kv_len=12, q_start=0)
    got = local_blocks(routed)
    # row 0: queries 0..3, centre 2; centres of key blocks 1, 3, 5, 7, 9, 11. Row 1: centre 6.
    assert got.index[0, 0].tolist() == [[0, 1, 2, -1], [1, 2, 3, 4], [-1] * 4]
    causal = Routed.blocks(index, block=(4, 2), q_len=12, kv_len=12, q_start=0, within=Causal())
    assert local_blocks(causal).index[0, 0].tolist() == [[0, 1, -1, -1], [0, 1, 2, 3], [-1] * 4]


def test_random_blocks_are_uniform():
    index = torch.tensor([[[[1, 2]]]])
    routed = Routed.blocks(index, block=(4, 2), q_len=4, kv_len=10)
    counts = torch.zeros(5)
    g = seeded()
    for _ in range(500):
        counts[random_blocks(routed, g).index[0, 0, 0].long()] += 1
    assert (counts / 500 - 0.4).abs().max() < 0.07
    again = [random_blocks(routed, seeded(3)).index for _ in range(2)]
    assert torch.equal(*again)


def test_attention_over_a_control_runs():
    q, k = drawn()
    routed = routed_of("keep", q, k)
    out, lse = attend(q, k, k, oracle_blocks(q, k, routed), return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_spans_and_groups_are_refused_by_name():
    start = torch.zeros(1, 1, 8, 1, dtype=torch.int)
    spans = Routed.spans(start, start + 3, q_len=8, kv_len=8)
    groups = Routed.groups(torch.arange(8).view(1, 1, 2, 4), torch.arange(8).view(1, 1, 2, 4), q_len=8, kv_len=8)
    for like in (spans, groups):
        with pytest.raises(ValueError, match=r"like must list blocks or tokens.*spans and groups"):
            local_blocks(like)
