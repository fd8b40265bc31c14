import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.layers.grid_rope import GridRope
from tests.oracles.grid_rope import turned


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    pairs=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    theta=st.sampled_from([10.0, 100.0, 10_000.0]),
)
def test_it_is_the_formula(shape, pairs, theta):
    pairs = (*pairs[: len(shape) - 1], pairs[-1] + 1)
    rope = GridRope(2 * sum(pairs), pairs, theta)
    angles = rope.angles(tuple(shape))
    x = torch.randn(1, 2, len(angles), rope.head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = rope(x, angles)
    for head in range(2):
        torch.testing.assert_close(out[0, head], turned(x[0, head], shape, pairs, theta), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_differences_of_coordinates_alone():
    rope = GridRope(12, (2, 2, 2))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12, generator=generator, dtype=torch.float64)
    angles = rope.angles((3, 4, 5)).double()
    scores = (rope(q.expand(1, 1, 60, 12), angles) @ rope(k.expand(1, 1, 60, 12), angles).mT)[0, 0]
    scores = scores.reshape(3, 4, 5, 3, 4, 5)
    torch.testing.assert_close(scores[0, 1, 3, 1, 3, 2], scores[1, 0, 2, 2, 2, 1], atol=1e-6, rtol=0)
    assert (scores[0, 0, 0, 0, 0, 1] - scores[0, 0, 1, 0, 0, 0]).abs() > 1e-3


def test_it_keeps_dtype_and_norm():
    rope = GridRope(8, (1, 3))
    x = torch.randn(2, 3, 6, 8, dtype=torch.bfloat16)
    out = rope(x, rope.angles((2, 3)))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float().norm(dim=-1), x.float().norm(dim=-1), atol=0.05, rtol=0.02)


def test_refusals():
    with pytest.raises(ValueError, match=r"pairs must add to head_dim / 2 = 4, got \(1, 2\)"):
        GridRope(8, (1, 2))
    with pytest.raises(ValueError, match="theta must be above 0"):
        GridRope(8, (2, 2), 0)
    with pytest.raises(ValueError, match="shape must have 2 axes"):
        GridRope(8, (2, 2)).angles((2, 3, 4))
