import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.layers.folding import fold
from regard.layers.grid import GridAttention, window_grid, windowed
from regard.layers.neighborhood import NeighborhoodAttention
from regard.patterns import Blocks, Causal, Congruent, Full, Grid, Neighborhood, Same, Segments
from tests.layers.contract import check_gradients, check_refusals, jitter, reached, tokens
from tests.oracles import layers as oracle
from tests.vision import import_timm

DIM, HEADS = 8, 2


def allows(grid):
    def of_pair(q, k):
        return all(
            bool(axis.allows(torch.tensor(a), torch.tensor(b))) for axis, a, b in zip(grid.axes, q, k, strict=True)
        )

    return of_pair


KINDS = {
    "blocks": lambda p, n: Blocks(p % n + 1),
    "congruent": lambda p, n: Congruent(p % n + 1),
    "segments": lambda p, n: Segments(tuple(p // 3**i % 3 for i in range(n))),
    "full": lambda p, n: Full(),
    "same": lambda p, n: Same(),
    "past": lambda p, n: Causal(),
    "future": lambda p, n: Causal(future=True),
}
sides = st.tuples(st.integers(1, 4), st.sampled_from(sorted(KINDS)), st.integers(0, 242))
grids = st.lists(sides, min_size=1, max_size=3)


def grid_of(drawn):
    return Grid(tuple(KINDS[kind](p, n) for n, kind, p in drawn), tuple(n for n, _, _ in drawn))


@settings(max_examples=15)
@given(grids)
def test_any_grid_equals_the_loop_over_queries(drawn):
    grid = grid_of(drawn)
    layer = jitter(GridAttention(DIM, HEADS, grid)).double()
    length = math.prod(grid.shape)
    x = tokens(2, length, DIM, dtype=torch.float64)
    expected = oracle.grid_attention(layer, x, allows(grid), grid.shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-9)


@given(grids)
def test_foldings_hold_each_token_once_and_only_allowed_pairs(drawn):
    grid = grid_of(drawn)
    folding = fold(grid)
    if folding is None:
        return
    length = math.prod(grid.shape)
    assert sorted(folding.table[folding.table >= 0].tolist()) == list(range(length))
    assert torch.equal(folding.table.flatten()[folding.slot], torch.arange(length))
    pairs = torch.zeros(length, length, dtype=torch.bool)
    groups, size = folding.table.shape
    mask = (
        torch.ones(groups, size, size, dtype=torch.bool)
        if folding.mask is None
        else folding.mask.expand(groups, -1, -1)
    )
    for g, a, b in itertools.product(range(groups), range(size), range(size)):
        q, k = int(folding.table[g, a]), int(folding.table[g, b])
        assert k >= 0 or not mask[g, a, b]  # padding is never a key
        assert mask[g, a].any()  # and no slot is without one
        if q >= 0 and k >= 0:
            pairs[q, k] |= mask[g, a, b]
    place = torch.arange(length)
    assert torch.equal(pairs, grid.allows(place[:, None], place[None]).expand(length, length))


def place(mode, window, shape):
    if mode == "plain":
        return lambda c: tuple(x % window for x in c)
    if mode == "grid":
        return lambda c: tuple(x // (n // window) for x, n in zip(c, shape, strict=True))
    half = window // 2
    return lambda c: tuple(x if x < half else (x - half) % window for x in c)


@pytest.mark.parametrize(
    ("mode", "shape", "window"),
    [("plain", (4, 6), 2), ("plain", (5, 7), 3), ("grid", (4, 6), 2), ("grid", (6, 3), 3), ("shifted", (6, 5), 2)],
)
def test_relative_bias_indexes_places_in_the_group(mode, shape, window):
    layer = jitter(windowed(DIM, HEADS, shape, window, mode, rel_bias=True)).double()
    assert layer.folded
    x = tokens(2, math.prod(shape), DIM, dtype=torch.float64)
    expected = oracle.grid_attention(layer, x, allows(layer.grid), shape, place(mode, window, shape))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-9)
    check_gradients(layer, x)


@pytest.mark.parametrize("rel_bias", [False, True])
@pytest.mark.parametrize(
    ("mode", "shape", "window"), [("plain", (5, 7), 3), ("grid", (6, 4), 2), ("shifted", (5, 6), 4)]
)
def test_windows_obey_their_pattern_exactly(mode, shape, window, rel_bias):
    layer = jitter(windowed(4, 2, shape, window, mode, rel_bias))
    length = math.prod(shape)
    index = torch.arange(length)
    assert torch.equal(reached(layer, length, 4), layer.grid.allows(index[:, None], index[None]))


def test_contract():
    for layer, length in (
        (windowed(DIM, HEADS, (5, 7), 3), 35),
        (GridAttention(DIM, HEADS, Grid((Full(), Causal()), (3, 5))), 15),
        (GridAttention(DIM, HEADS, Grid((Same(),), (1,))), 1),
        (NeighborhoodAttention(DIM, HEADS, (9, 11), (3, 5)), 99),
    ):
        jitter(layer)
        check_gradients(layer, tokens(2, length, DIM)) if length > 1 else layer(tokens(2, 1, DIM))
        check_refusals(layer, length, DIM)
        assert layer(tokens(0, length, DIM)).shape == (0, length, DIM)


def test_padding_slots_do_not_leak():
    """Changing the token that fills padded slots changes only what may see it."""
    layer = jitter(windowed(DIM, HEADS, (5, 5), 3))
    x = tokens(1, 25, DIM)
    moved = x.clone()
    moved[0, 0] += 100.0  # token 0 stands in for padding
    changed = (layer(x) != layer(moved)).any(-1)[0]
    grid = window_grid((5, 5), 3)
    index = torch.arange(25)
    assert torch.equal(changed, grid.allows(index, torch.zeros(25, dtype=torch.long)))


@pytest.mark.parametrize(
    ("shape", "window", "stride", "dilation", "causal"),
    [((9,), 3, 1, 1, False), ((7, 9), (3, 5), 1, 1, False), ((8, 8), 4, 2, 1, False), ((8, 9), 3, 1, (2, 3), False),
     ((7, 6), 3, 1, 1, (True, False)), ((3, 4, 5), 3, 1, 1, False)],
)  # fmt: skip
def test_neighborhoods_equal_the_loop_over_queries(shape, window, stride, dilation, causal):
    layer = jitter(NeighborhoodAttention(DIM, HEADS, shape, window, stride, dilation, causal)).double()
    x = tokens(2, math.prod(shape), DIM, dtype=torch.float64)
    expected = oracle.grid_attention(layer, x, neighbors(shape, window, stride, dilation, causal), shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-9)


def neighbors(shape, window, stride, dilation, causal):
    """The predicate of the papers, from the formula, one coordinate at a time."""
    n = len(shape)
    w, s, d = ([v] * n if isinstance(v, int) else list(v) for v in (window, stride, dilation))
    c = [causal] * n if isinstance(causal, bool) else list(causal)

    def of_axis(a, q, k):
        if q % d[a] != k % d[a]:
            return False
        length = len(range(q % d[a], shape[a], d[a]))
        q, k = q // d[a], k // d[a]
        if c[a]:
            leader = min(q // s[a] * s[a] + s[a] - 1, length - 1)
            return max(leader - w[a] + 1, 0) <= k <= q
        leader = min(q // s[a] * s[a] + s[a] // 2, length - 1)
        lo = min(max(leader - w[a] // 2, 0), length - w[a])
        return lo <= k < lo + w[a]

    return lambda q, k: all(of_axis(a, q[a], k[a]) for a in range(n))


def test_large_neighborhoods_go_through_attend_and_small_ones_run_dense():
    assert not NeighborhoodAttention(DIM, HEADS, (20, 20), 5).folded
    assert NeighborhoodAttention(DIM, HEADS, (5, 5), 5).folded  # dense attention
    assert not GridAttention(DIM, HEADS, Grid((Full(), Causal()), (40, 40))).folded  # a mask of 2.6 million pairs
    assert GridAttention(DIM, HEADS, Grid((Full(), Full()), (40, 40))).folded  # no mask


def test_shifted_windows_are_swins_roll_and_mask():
    """Roll by half a window, attend in plain windows with Swin's region mask, roll back."""
    shape, window = (8, 12), 4
    layer = jitter(windowed(DIM, HEADS, shape, window, "shifted", rel_bias=False)).double()
    plain = windowed(DIM, HEADS, shape, window)
    plain.load_state_dict(layer.state_dict())
    x = tokens(2, 96, DIM, dtype=torch.float64)
    half = window // 2
    region = torch.zeros(shape, dtype=torch.long)
    for number, (a, b) in enumerate(itertools.product([(0, -window), (-window, -half), (-half, None)], repeat=2)):
        region[slice(*a), slice(*b)] = number
    rolled = torch.roll(x.unflatten(1, shape), (-half, -half), (1, 2)).flatten(1, 2)
    index = torch.arange(96)
    windows = plain.grid.allows(index[:, None], index[None]) & (region.flatten()[:, None] == region.flatten()[None])
    q, k, v = plain.double().qkv(rolled).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=windows)
    y = plain.proj(y.transpose(1, 2).flatten(2))
    y = torch.roll(y.unflatten(1, shape), (half, half), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(layer(x), y, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_windows_and_strided_grids_are_timms_maxvit(kind):
    import_timm()
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    shape, size, dim = (8, 12), 4, 16
    torch.manual_seed(0)
    cfg = MaxxVitTransformerCfg(dim_head=8, window_size=(size, size), grid_size=(size, size), rel_pos_type="bias")
    theirs = PartitionAttentionCl(dim, kind, cfg).eval()
    jitter(theirs)
    ours = windowed(dim, 2, shape, size, "plain" if kind == "block" else "grid", rel_bias=True)
    head_first = theirs.attn.head_first
    weight, bias = theirs.attn.qkv.weight, theirs.attn.qkv.bias
    if head_first:  # rows are (head, qkv, d), ours are (qkv, head, d)
        weight = weight.unflatten(0, (2, 3, 8)).transpose(0, 1).flatten(0, 2)
        bias = bias.unflatten(0, (2, 3, 8)).transpose(0, 1).flatten()
    table = theirs.attn.rel_pos.relative_position_bias_table  # [(2P-1)^2, heads]
    with torch.no_grad():
        ours.qkv.weight.copy_(weight)
        ours.qkv.bias.copy_(bias)
        ours.proj.load_state_dict(theirs.attn.proj.state_dict())
        ours.rel_bias.copy_(table.T.unflatten(1, (2 * size - 1, 2 * size - 1)))
        x = tokens(2, 96, dim)
        expected = theirs._partition_attn(x.unflatten(1, shape)).flatten(1, 2)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="heads must be at least 1 and divide dim, got dim=8, heads=3"):
        windowed(8, 3, (4, 4), 2)
    with pytest.raises(ValueError, match=r"window must divide every side of \(6, 4\) in grid mode"):
        windowed(8, 2, (6, 4), 4, "grid")
    with pytest.raises(ValueError, match=r"window must be in 1\.\.4"):
        windowed(8, 2, (4, 4), 5)
    with pytest.raises(ValueError, match="window must be even to be shifted"):
        windowed(8, 2, (9, 9), 3, "shifted")
    with pytest.raises((ValueError, TypeError), match="mode"):
        windowed(8, 2, (4, 4), 2, "cyclic")
    with pytest.raises(ValueError, match="rel_bias must be False"):
        GridAttention(8, 2, Neighborhood((20, 20), 3), rel_bias=True)
    with pytest.raises(ValueError, match="window"):
        NeighborhoodAttention(8, 2, (5, 5), 6)
