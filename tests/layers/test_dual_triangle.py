"""Dual triangle attention: which half of a head sees what, and what it is equal to."""

import pytest
import torch

from regard.layers.dual_triangle import DualTriangleAttention
from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.patterns import Causal, Columns

DIM, HEADS = 24, 3


def make(**how):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return DualTriangleAttention(DIM, HEADS, **how).double()


def draw(length=7, batch=2):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("half", [0, 1])
def test_half_0_of_every_head_sees_no_future_and_half_1_no_past(half):
    layer, x = make(), draw(6, 1)
    width = DIM // HEADS // 2
    for head in range(HEADS):
        with torch.no_grad():
            layer.o_proj.weight.zero_()
            start = head * 2 * width + half * width
            layer.o_proj.weight[:width, start : start + width] = torch.eye(width, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0].abs().amax((1, 3))
        i, j = torch.arange(6)[:, None], torch.arange(6)
        seen = j <= i if half == 0 else j >= i
        assert (jacobian[~seen] == 0).all()
        assert (jacobian[seen] > 0).all()


@pytest.mark.parametrize("theta", [None, 50.0])
def test_equal_to_two_attentions_on_the_halves(theta):
    width = DIM // HEADS // 2
    layer = make(rope=None if theta is None else Rope(width, theta))
    x = draw()
    z = []
    with torch.no_grad():
        q, k, v = (p(x).unflatten(-1, (HEADS, 2, width)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        for half in (0, 1):
            a, b, c = (t[:, :, :, half].transpose(1, 2) for t in (q, k, v))
            if theta is not None:
                a, b = Rope(width, theta).rotate(a, b, torch.arange(7), torch.arange(7))
            scores = a @ b.mT / width**0.5
            future = torch.ones(7, 7).triu(1).bool()
            z.append(scores.masked_fill(future if half == 0 else future.T, -torch.inf).softmax(-1) @ c)
        expected = layer.o_proj(torch.stack(z, 3).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), expected)


def test_reversing_the_sequence_swaps_the_halves():
    """With the halves' weights exchanged, the reversed sequence gives the reversed output."""
    layer, other, x = make(), make(), draw()
    width = DIM // HEADS // 2

    def exchanged(w):
        return w.unflatten(0, (HEADS, 2, width)).flip(1).flatten(0, 2)

    with torch.no_grad():
        for a, b in ((layer.q_proj, other.q_proj), (layer.k_proj, other.k_proj), (layer.v_proj, other.v_proj)):
            b.weight.copy_(exchanged(a.weight))
        other.o_proj.weight.copy_(exchanged(layer.o_proj.weight.T).T)
        torch.testing.assert_close(other(x.flip(1)).flip(1), layer(x))


def test_no_parameters_more_than_ordinary_attention():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(make()) == count(MultiHead(DIM, HEADS))


def test_padding_is_a_pattern():
    layer, x = make(), draw(9, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, pattern=Columns(((0, 6),)))[:, :6], layer(x[:, :6]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of 2 heads = 6"):
        DualTriangleAttention(15, 3)
    with pytest.raises(ValueError, match=r"rope must be for half heads, Rope\(4\), got Rope\(8\)"):
        DualTriangleAttention(24, 3, Rope(8))
    with pytest.raises(ValueError, match="state must be None"):
        make().new_state()
    assert isinstance(make().pattern.allows(torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.Tensor)
    assert Causal() != make().pattern
