"""Bands of pairs: there and back, the mirror, and plus attention against the whole square in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.layers.band import PlusAttention, band_valid, from_band, to_band, transpose_band
from tests.oracles import band as oracle


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dim=4, joined="cell", seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PlusAttention(dim, joined=joined).to(dtype)


sizes = st.tuples(st.integers(0, 9), st.integers(0, 12))


@given(sizes, st.sampled_from([(), (3,), (2, 2)]))
def test_there_and_back(size, features):
    n, width = size
    square = random(2, n, n, *features)
    band = to_band(square, width)
    assert band.shape == (2, n, 2 * width + 1, *features)
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= width
    kept = torch.where(near.reshape(n, n, *[1] * len(features)), square, 7.0)
    assert torch.equal(from_band(band, fill=7.0), kept)
    assert torch.equal(to_band(from_band(band), width), band)


@given(sizes)
def test_cells_are_the_pairs_they_say(size):
    n, width = size
    lengths = torch.tensor([n, n // 2, 0])
    valid = band_valid(n, width, lengths)
    for b, length in enumerate(lengths.tolist()):
        for i in range(n):
            for c in range(2 * width + 1):
                j = i + c - width
                assert bool(valid[b, i, c]) == (i < length and 0 <= j < length)


@given(sizes)
def test_the_mirror_is_the_transposed_square(size):
    n, width = size
    square = random(2, n, n, 3)
    band = to_band(square, width)
    assert torch.equal(transpose_band(band), to_band(square.transpose(1, 2), width))
    assert torch.equal(transpose_band(transpose_band(band)), band)


@given(st.integers(1, 6), st.integers(0, 7), st.integers(0, 6), st.sampled_from(["cell", "mirror"]))
def test_plus_attention_is_the_formula(n, width, short, joined):
    made = layer(joined=joined, seed=n)
    square = random(2, n, n, 4, seed=width)
    lengths = torch.tensor([n, min(short, n)])
    with torch.no_grad():
        found = from_band(made(to_band(square, width), lengths=lengths))
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[b], oracle.plus(square[b], width, length, made, joined), atol=1e-10, rtol=1e-9)


def test_a_cell_sees_its_row_and_its_column_and_nothing_else():
    n, width = 7, 2
    for joined in ("cell", "mirror"):
        made = layer(joined=joined)
        x = to_band(random(1, n, n, 4), width).requires_grad_()
        out = made(x)
        for i, c in ((3, 1), (0, 3), (6, 0)):
            j = i + c - width
            (grad,) = torch.autograd.grad(out[0, i, c].sum(), x, retain_graph=True)
            felt = from_band(grad.abs().sum(-1))[0] > 0
            expected = torch.zeros(n, n, dtype=torch.bool)
            expected[i, :] = True
            expected[:, j if joined == "cell" else i] = True
            expected &= (torch.arange(n)[:, None] - torch.arange(n)).abs() <= width
            assert torch.equal(felt, expected)


def test_on_symmetric_pairs_the_column_of_a_cell_is_the_row_of_its_mirror():
    """With one weight for rows and columns."""
    made, mirror = layer(), layer(joined="mirror")
    with torch.no_grad():
        for x in (made, mirror):
            x.column_qkv.load_state_dict(x.row_qkv.state_dict())
        mirror.load_state_dict(made.state_dict())
        square = random(1, 5, 5, 4)
        square = square + square.transpose(1, 2)
        band = to_band(square, 2)
        rows = made._along(band, made.row_qkv, band_valid(5, 2))
        one = torch.cat([rows, transpose_band(rows)], -1)
        two = torch.cat([rows, rows], -1)
        valid = band_valid(5, 2)[..., None]
        torch.testing.assert_close(made(band), made.merge(one) * valid)
        torch.testing.assert_close(mirror(band), made.merge(two) * valid)


def test_garbage_in_padding_changes_nothing():
    made = layer()
    x = to_band(random(1, 6, 6, 4), 2)
    lengths = torch.tensor([4])
    dirty = x.masked_fill(~band_valid(6, 2, lengths)[..., None], torch.nan)
    with torch.no_grad():
        clean = made(x, lengths=lengths)
        assert torch.equal(made(dirty, lengths=lengths), clean)
    assert clean.isfinite().all()
    assert (clean[:, 4:] == 0).all()


def test_gradients_are_those_of_finite_differences():
    made = layer(2)
    x = to_band(random(1, 4, 4, 2), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: made(t, lengths=torch.tensor([3])), (x,))


def test_single_precision_is_near_double():
    made = layer()
    x = to_band(random(2, 9, 9, 4), 3)
    with torch.no_grad():
        want = made(x)
        got = made.float()(x.float())
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_take_is_refused_by_name():
    made = layer()
    with pytest.raises(ValueError, match="context must be None"):
        made(random(1, 3, 3, 4), context=random(1, 3, 3, 4))
    with pytest.raises(ValueError, match="band must have 2 width"):
        made(random(1, 3, 4, 4))
    with pytest.raises(ValueError, match="joined must be"):
        PlusAttention(4, joined="rolled")
    with pytest.raises(ValueError, match="width"):
        to_band(random(1, 3, 3), -1)
