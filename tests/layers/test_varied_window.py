import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from regard.layers.grid import windowed
from regard.layers.varied_window import VariedWindowAttention, coverage
from tests.layers.contract import check_gradients, check_refusals, jitter, tokens
from tests.oracles.varied_window import varied_window

DIM, HEADS = 8, 2


def layer_of(shape, window, **how):
    return jitter(VariedWindowAttention(DIM, HEADS, shape, window, **{"position_kernel": None} | how))


def still(layer):
    """No scale, no offset."""
    with torch.no_grad():
        for p in (*layer.scale.parameters(), *layer.offset.parameters()):
            p.zero_()
    return layer


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    window=st.integers(1, 3),
    rel_bias=st.booleans(),
    mask_outside=st.booleans(),
    far=st.sampled_from([1, 5]),
    seed=st.integers(0, 99),
)
def test_equals_the_formula_one_query_at_a_time(shape, window, rel_bias, mask_outside, far, seed):
    layer = layer_of(shape, min(window, *shape), rel_bias=rel_bias, mask_outside=mask_outside).double()
    with torch.no_grad():
        layer.offset.weight *= far  # some windows leave the map whole
    x = tokens(1, shape[0] * shape[1], DIM, seed, torch.float64)
    torch.testing.assert_close(layer(x), varied_window(layer, x), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize(("shape", "window"), [((8, 8), 4), ((6, 9), 3), ((4, 4), 4), ((3, 1), 1)])
@pytest.mark.parametrize("mask_outside", [False, True])
def test_starts_as_window_attention(shape, window, mask_outside):
    layer = still(layer_of(shape, window, mask_outside=mask_outside))
    plain = windowed(DIM, HEADS, shape, window, rel_bias=True)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = tokens(2, shape[0] * shape[1], DIM)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    fresh = VariedWindowAttention(DIM, HEADS, shape, window)
    assert all((p == 0).all() for p in (*fresh.scale.parameters(), *fresh.offset.parameters(), fresh.rel_bias))


def test_padding_is_a_key_unless_outside_is_masked():
    shape, window = (5, 7), 3
    x = tokens(1, 35, DIM)
    plain = windowed(DIM, HEADS, shape, window, rel_bias=True)
    for masked in (True, False):
        layer = still(layer_of(shape, window, mask_outside=masked))
        plain.load_state_dict(layer.state_dict(), strict=False)
        off = (layer(x) - plain(x)).abs().amax(-1).view(shape)
        assert (off[:3, :6] < 1e-5).all()  # the windows that the map fills
        assert bool((off[3:] < 1e-5).all()) == masked
        assert bool((off[:, 6] < 1e-5).all()) == masked


@pytest.mark.parametrize(("axis", "tokens_away"), [(0, (0, 4)), (1, (4, 0))])
def test_an_offset_of_one_window_reads_the_next_window(axis, tokens_away):
    """``2 side / (side - 1)`` along x (the first of a head's pair) reads the window to the right."""
    side, w = 12, 4
    layer = still(layer_of((side, side), w)).double()
    with torch.no_grad():
        layer.offset.bias[axis::2] = 2 * side / (side - 1)
    x = tokens(1, side * side, DIM, dtype=torch.float64)
    down, right = tokens_away
    q, k, v = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unflatten(3, (side, side))
    y = layer(x).unflatten(1, (side, side))
    at = torch.arange(w * w)
    row, column = at // w, at % w
    bias = layer.rel_bias[:, row[:, None] - row + w - 1, column[:, None] - column + w - 1]
    for r in range(0, side - down, w):
        for c in range(0, side - right, w):
            own = (..., slice(r, r + w), slice(c, c + w), slice(None))
            away = (..., slice(r + down, r + down + w), slice(c + right, c + right + w), slice(None))
            flat = [t.flatten(2, 3) for t in (q[own], k[away], v[away])]
            z = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=bias)
            expected = layer.proj(z.transpose(1, 2).flatten(2)).unflatten(1, (w, w))
            torch.testing.assert_close(y[0, r : r + w, c : c + w], expected[0], atol=1e-9, rtol=1e-8)


def test_points_and_boxes():
    layer = still(layer_of((6, 6), 3))
    x = tokens(2, 36, DIM)
    points = layer.points(x)
    assert points.shape == (2, HEADS, 2, 2, 3, 3, 2)
    assert torch.equal(points[0, 0, 1, 0, 2, 1], torch.tensor([5.0, 1.0]))  # y, then x
    assert torch.equal(coverage(layer, x)[1, 1, 0, 1], torch.tensor([0.0, 3.0, 2.0, 5.0]))
    with torch.no_grad():
        layer.scale.bias[:2] = torch.tensor([1.0, -2.0])  # head 0: twice as wide, upside down at the same height
    box = coverage(layer, x)[0, :, 0, 1]
    torch.testing.assert_close(box, torch.tensor([[0.0, 2.0, 2.0, 6.0], [0.0, 3.0, 2.0, 5.0]]))
    assert layer.points(x)[0, 0, 0, 1, 0, 0, 0] == 2


def test_a_window_that_reads_nothing_is_zero_with_mask_outside():
    for masked in (True, False):
        layer = still(layer_of((4, 4), 2, mask_outside=masked))
        with torch.no_grad():
            layer.offset.bias.fill_(50.0)
        x = tokens(1, 16, DIM).requires_grad_()
        y = layer(x)
        assert torch.equal(y[0], layer.proj.bias.expand(16, -1))
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_contract():
    for layer, length in ((layer_of((5, 7), 3, position_kernel=3), 35), (layer_of((4, 6), 2, mask_outside=True), 24)):
        check_gradients(layer, tokens(2, length, DIM))
        check_refusals(layer, length, DIM)
        assert layer(tokens(0, length, DIM)).shape == (0, length, DIM)
    assert layer_of((1, 1), 1)(tokens(2, 1, DIM)).isfinite().all()


def test_scales_and_offsets_learn_from_their_zeros():
    layer = VariedWindowAttention(DIM, HEADS, (8, 8), 4)
    layer(tokens(2, 64, DIM)).square().sum().backward()
    for p in (layer.scale.weight, layer.scale.bias, layer.offset.weight, layer.offset.bias):
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0


def test_bfloat16_reads_the_places_of_float32():
    """Near token 300, steps of bfloat16 are two tokens wide."""
    layer = still(VariedWindowAttention(DIM, HEADS, (2, 320), 2, position_kernel=None)).to(torch.bfloat16)
    x = tokens(1, 640, DIM).to(torch.bfloat16)
    assert layer.points(x).dtype == torch.float32
    assert torch.equal(layer.points(x)[0, 0, 0, 150, :, :, 1], torch.tensor([[300.0, 301.0]] * 2))
    assert layer(x).dtype == torch.bfloat16
    wide = still(VariedWindowAttention(DIM, HEADS, (2, 320), 2, position_kernel=None))
    wide.load_state_dict({name: p.float() for name, p in layer.state_dict().items()})
    torch.testing.assert_close(layer(x).float(), wide(x.float()), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("match", "how"),
    [
        ("heads must be at least 1 and divide dim", {"heads": 3}),
        ("window must be in 1..4", {"window": 5}),
        ("window must be in 1..4", {"window": 0}),
        (r"shape must be \(height, width\)", {"shape": (4, 4, 4)}),
        ("kernel must be odd", {"position_kernel": 4}),
    ],
)
def test_refusals(match, how):
    with pytest.raises((ValueError, TypeCheckError), match=match):
        VariedWindowAttention(**{"dim": DIM, "heads": HEADS, "shape": (4, 6), "window": 2} | how)
