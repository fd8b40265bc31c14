"""Orders of axes: maps and figures against explicit weights, the planted order found, the stored route exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.kernels.quantized import quantized_attend
from regard.patterns import AxisOrder, Causal, HilbertOrder, Routed, TileOrder, Window
from regard.plan import reorder
from regard.tasks.qk import grid_qk
from tests.oracles.attention import attended, attention


@st.composite
def cases(draw):
    """(q, k, orders, shape, block, prefix, suffix, scope)."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(3, 4, 5), (2, 2, 9), (6, 7), (13,), (1, 4, 4)]))
    n = torch.Size(shape).numel()
    prefix, suffix = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    length, batch = prefix + n + suffix, draw(st.integers(1, 2))
    q = 2 * torch.randn(batch, kv_heads * group, length, 8, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, 8, generator=g, dtype=torch.float64)
    orders = [*reorder.axis_orders(shape), HilbertOrder(shape), TileOrder(shape, 2)]
    block = draw(st.sampled_from([4, (8, 4), (3, 7), 64]))
    scope = draw(st.sampled_from([{}, {"scale": 0.7}, {"is_causal": True}, {"pattern": Window(6, 3), "q_start": 0}]))
    return q, k, orders, shape, block, prefix, suffix, scope


def explicit(case):
    """For each order (S, peak of weights, members) by float64 weights."""
    q, k, orders, _, block, prefix, suffix, scope = case
    weights, _, _ = attention(q, k, **scope)
    n = q.shape[2] - prefix - suffix
    inner = weights[:, :, prefix : prefix + n, prefix : prefix + n]
    bq, bk = (block, block) if isinstance(block, int) else block
    for order in orders:
        forward = order.forward
        rows = [[t for t in part.tolist() if t >= 0] for part in forward.split(bq)]
        columns = [[t for t in part.tolist() if t >= 0] for part in forward.split(bk)]
        mass = torch.zeros(*q.shape[:2], len(rows), len(columns), dtype=torch.float64)
        ratio = torch.ones_like(mass)
        for a, row in enumerate(rows):
            for b, column in enumerate(columns):
                part = inner[:, :, row][..., column]
                if not part.numel():
                    continue
                mass[:, :, a, b] = part.sum(-1).mean(-1)
                mean = part.mean((-2, -1))
                ratio[:, :, a, b] = torch.where(mean > 0, part.amax((-2, -1)) / mean.clamp(min=1e-300), 1)
        there = torch.tensor([[bool(row) and bool(column) for column in columns] for row in rows])
        yield mass, ratio, there


@given(cases())
def test_the_map_and_the_figures_are_those_of_explicit_weights(case):
    q, k, orders, _, block, prefix, suffix, scope = case
    found = reorder.block_mass(q, k, orders, block, prefix=prefix, suffix=suffix, **scope)
    figures = reorder.order_figures(q, k, orders, block, eps=0.1, prefix=prefix, suffix=suffix, **scope)
    for n, (mass, ratio, there) in enumerate(explicit(case)):
        assert torch.allclose(found[n], mass, atol=1e-12)
        assert torch.allclose(figures.peak[n], ratio[..., there].mean((0, 2)), rtol=1e-9)
        near = (mass[..., there] - 0.1).abs().amin() < 1e-9  # rounding may decide
        assert near or torch.allclose(figures.sparse[n], (mass < 0.1)[..., there].double().mean((0, 2)))


@pytest.mark.parametrize(("widths", "last"), [((0.01, 4, 4), 0), ((0.3, 4, 0.01), 2), ((0.3, 0.01, 4), 1)])
def test_the_axis_that_a_head_looks_along_becomes_the_innermost(widths, last):
    g = torch.Generator().manual_seed(0)
    q, k = grid_qk((8, 8, 8), widths, 3, 0.3, g, heads=2)
    chosen = reorder.choose_order(q, k, (8, 8, 8), 32)
    assert [order.axes[-1] for order in chosen] == [last, last]
    text = torch.randn(1, 2, 5, 48, generator=g)
    longer = [torch.cat([text, x, text], 2) for x in (q, k)]
    assert [o.axes[-1] for o in reorder.choose_order(*longer, (8, 8, 8), 32, prefix=5, suffix=5)] == [last, last]


def test_scores_of_orders():
    sparse, peak = torch.tensor([[0.2, 0.0], [0.6, 0.0]]), torch.tensor([[10.0, 2.0], [30.0, 6.0]])
    figures = reorder.Figures(sparse, peak)
    assert figures.best(1).tolist() == [1, 0]  # nothing is sparse: the first
    assert figures.best(0).tolist() == [0, 0]
    assert torch.allclose(figures.score(0.5)[:, 0], torch.tensor([(0.25 * 0.75) ** 0.5, (0.75 * 0.25) ** 0.5]))
    both = reorder.Figures.mean([figures, reorder.Figures(sparse * 0, peak * 3)])
    assert torch.allclose(both.sparse, sparse / 2)
    assert torch.allclose(both.peak, peak * 2)
    with pytest.raises(ValueError, match=r"a must be in \[0, 1\], got 2"):
        figures.score(2)


@given(
    st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(0, 1)
)
def test_the_heaviest_blocks(seed, n_q, n_kv, density, least):
    g = torch.Generator().manual_seed(seed)
    mass = torch.randint(0, 4, (3, n_q, n_kv), generator=g).double()  # many ties
    kept = reorder.heaviest(mass, density, least)
    count = max(int(density * n_q * n_kv + 1e-9), least * n_q)
    assert kept.sum((1, 2)).tolist() == [count] * 3
    if least:
        assert bool(kept.gather(2, mass.argmax(2, keepdim=True)).all())
    else:
        for m, x in zip(mass, kept, strict=True):
            if 0 < count < n_q * n_kv:
                assert m[x].min() >= m[~x].max()
                tied = m == m[x].min()  # of equals those that come first
                assert not bool((x[tied].int().diff() > 0).any())


def test_needed_density():
    mass = torch.tensor([[0.5, 0.3], [0.15, 0.05]])
    assert [float(reorder.needed_density(mass, s)) for s in (0.5, 0.6, 0.9, 0.95, 1.0)] == [0.25, 0.5, 0.75, 0.75, 1.0]


@given(cases(), st.sampled_from([0.1, 0.4, 1.0]), st.sampled_from(["reference", "blocked"]))
def test_the_stored_route_attends_over_its_blocks_and_to_all_text(case, density, backend):
    q, k, orders, shape, block, prefix, suffix, _ = case
    g = torch.Generator().manual_seed(0)
    heads, n, length = q.shape[1], torch.Size(shape).numel(), q.shape[2]
    mine = [orders[i % len(reorder.axis_orders(shape))] for i in range(heads)]
    masses = reorder.block_mass(q, k, mine, block, prefix=prefix, suffix=suffix)
    kept = torch.stack([reorder.heaviest(m[0, h], density) for h, m in enumerate(masses)])
    routed = reorder.reordered(kept, mine, block, prefix=prefix, suffix=suffix)
    bq, bk = (block, block) if isinstance(block, int) else block
    slot = torch.stack([order.inverse for order in mine])
    wanted = torch.ones(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        wanted[h, prefix : prefix + n, prefix : prefix + n] = kept[h][slot[h][:, None] // bq, slot[h][None] // bk]
    i = torch.arange(length)
    allowed = routed.allows(i[:, None], i, torch.arange(heads)[:, None, None])
    assert torch.equal(allowed.expand_as(wanted), wanted)
    v = torch.randn(*k.shape[:3], 5, generator=g, dtype=torch.float64)
    out, lse = attend(q, k, v, routed, q_start=0, return_lse=True, backend=backend)
    want, want_lse = attended(q, k, v, routed, q_start=0)
    assert torch.allclose(out, want, atol=1e-9)
    assert torch.allclose(lse, want_lse, atol=1e-9)


def test_it_is_kept_in_a_file(tmp_path):
    q, k = grid_qk((4, 4, 4), (0.01, 4, 4), 3, 0.3, torch.Generator().manual_seed(0), heads=2)
    order = AxisOrder((4, 4, 4), (1, 2, 0))
    (mass,) = reorder.block_mass(q, k, [order], 16)
    routed = reorder.reordered(reorder.heaviest(mass[0], 0.3), [order] * 2, 16)
    routed.save(tmp_path / "route.safetensors")
    assert Routed.load(tmp_path / "route.safetensors").equal(routed)


def test_integers_in_the_order_of_the_route():
    """Attention on integers quantises blocks of slots: as on tokens that were reordered before."""
    g = torch.Generator().manual_seed(0)
    q, k = (x.double() for x in grid_qk((4, 5, 5), (0.01, 4, 4), 3, 0.3, g, heads=2))
    v = torch.randn(q.shape, generator=g, dtype=torch.float64)
    order = AxisOrder((4, 5, 5), (1, 2, 0))
    (mass,) = reorder.block_mass(q, k, [order], 20)
    kept = reorder.heaviest(mass[0], 0.4)
    found = quantized_attend(q, k, v, reorder.reordered(kept, [order] * 2, 20), q_start=0)
    slots = [order.apply(x) for x in (q, k, v)]
    index = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    index = torch.where(torch.arange(5) < kept.sum(-1, keepdim=True), index, -1)
    plain = Routed.blocks(index[None], block=20, q_len=100, kv_len=100)
    assert torch.allclose(found, order.undo(quantized_attend(*slots, plain, block=20)), atol=1e-12)
    with pytest.raises(ValueError, match="block must be that of the ordered route"):
        quantized_attend(q, k, v, reorder.reordered(kept, [order] * 2, 20), q_start=0, block=64)
    kept_too = reorder.reordered(kept, [order] * 2, 20)
    object.__setattr__(kept_too, "keep", Causal())
    with pytest.raises(ValueError, match="with keep"):
        quantized_attend(q, k, v, kept_too, q_start=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: reorder.block_mass(q, q, [], 4), "at least one Order"),
        (lambda q: reorder.block_mass(q, q, reorder.axis_orders((3, 4)), 4), "orders must be of the 16 tokens"),
        (lambda q: reorder.block_mass(q, q[:, :, 1:], reorder.axis_orders((4, 4)), 4), "the same tokens"),
        (lambda q: reorder.choose_order(q, q, (4, 5)), r"shape must have the 16 tokens .* got \(4, 5\)"),
        (lambda q: reorder.heaviest(q[0], 1.5), "density must be in"),
        (lambda q: reorder.heaviest(q[0], 0.5, 9), r"at_least must be in \[0, 8\]"),
        (lambda q: reorder.reordered(q[0] > 0, reorder.axis_orders((4, 4)), 4), r"blocks must be \[heads, 4, 4\]"),
        (lambda q: reorder.reordered(q[0] > 0, reorder.axis_orders((4,)), 4), "one for each of the 2 heads"),
    ],
)
def test_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 2, 16, 8))
