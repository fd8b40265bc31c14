"""Orders of grids: permutations by hand, curves that step to neighbours, ends that share no block."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import AxisOrder, HilbertOrder, Neighborhood, TileOrder


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from(["axes", "hilbert", "tiles"]),
)
def test_ends_stay_and_share_no_block(shape, prefix, suffix, block, kind):
    if kind == "axes":
        order = AxisOrder(shape, range(len(shape))[::-1], prefix, suffix, block)
    elif kind == "hilbert":
        order = HilbertOrder(shape, prefix, suffix, block)
    else:
        order = TileOrder(shape, 2, prefix=prefix, suffix=suffix)
        block = 2 ** len(shape)
    forward, n = order.forward.tolist(), order.n
    assert sorted(i for i in forward if i >= 0) == list(range(n))
    assert len(forward) == order.n_padded
    assert [forward[p] for p in order.inverse.tolist()] == list(range(n))
    parts = [range(prefix), range(prefix, n - suffix), range(n - suffix, n)]
    kinds = [[next(m for m, part in enumerate(parts) if i in part) for i in forward if i >= 0]]
    assert kinds[0] == sorted(kinds[0])
    assert forward[:prefix] == list(range(prefix))
    assert [i for i in forward if i >= n - suffix] == list(range(n - suffix, n))
    if block > 1:
        for at in range(0, len(forward), block):
            own = {next(m for m, part in enumerate(parts) if i in part) for i in forward[at : at + block] if i >= 0}
            assert len(own) <= 1
    x = torch.randn(2, n, 3)
    assert torch.equal(order.undo(order.apply(x)), x)


def test_axes_by_hand():
    for axes in permutations(range(3)):
        shape = (2, 3, 4)
        walk = []
        for at in product(*(range(shape[a]) for a in axes)):
            place = [0] * 3
            for a, x in zip(axes, at, strict=True):
                place[a] = x
            walk.append((place[0] * 3 + place[1]) * 4 + place[2])
        assert AxisOrder(shape, axes).forward.tolist() == walk
    there, back = AxisOrder((2, 3, 4), (1, 2, 0)), AxisOrder((3, 4, 2), (2, 0, 1))
    assert back.apply(there.apply(torch.arange(24), 0), 0).tolist() == list(range(24))


@pytest.mark.parametrize("shape", [(16,), (8, 8), (4, 4, 4), (8, 8, 8), (2, 2, 2, 2)])
def test_the_curve_steps_to_neighbours(shape):
    at = torch.stack(torch.unravel_index(HilbertOrder(shape).forward, shape))
    assert (at.diff(dim=1).abs().sum(0) == 1).all()


def test_blocks_of_the_curve_are_compact():
    """Blocks of 64 of a video: sides of at most 8 along the curve, a whole frame's width in row-major order."""
    shape = (8, 16, 16)
    at = torch.stack(torch.unravel_index(HilbertOrder(shape).forward, shape)).view(3, -1, 64)
    spread = (at.amax(2) - at.amin(2) + 1).prod(0)
    assert spread.max() <= 64


def test_arguments():
    assert AxisOrder((2, 3), (1, 0)) == AxisOrder((2, 3), [1, 0])
    assert hash(HilbertOrder((2, 3), prefix=1)) == hash(HilbertOrder((2, 3), prefix=1))
    assert TileOrder((4, 4), 2) != TileOrder((4, 4), 2, prefix=1)
    with pytest.raises(ValueError, match=r"axes must be a permutation of the 2 axes of shape, got \(0, 0\)"):
        AxisOrder((2, 3), (0, 0))
    with pytest.raises(ValueError, match="prefix must be an integer >= 0"):
        HilbertOrder((2, 3), prefix=-1)
    grid = Neighborhood((4, 4), 3)
    assert grid.permute(TileOrder((4, 4), 2)).closed_form
    with pytest.raises(ValueError, match="order must be of the pattern's 16 positions, got one of 17"):
        grid.permute(TileOrder((4, 4), 2, prefix=1))
