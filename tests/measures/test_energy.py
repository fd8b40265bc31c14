"""Energy decay against sums over pairs, and slopes that were put there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.measures.energy import energy_by_distance, energy_decay


def distances(frames, tokens):
    place = torch.arange(frames * tokens)
    frame = (place[:, None] // tokens - place[None] // tokens).abs()
    return frame, (place[:, None] % tokens - place[None] % tokens).abs()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2)]))
def test_mean_weight_at_each_distance(frames, tokens, batch, heads):
    generator = torch.Generator().manual_seed(frames * 100 + tokens * 10 + batch)
    n, (h, kv) = frames * tokens, heads
    q = torch.randn(batch, h, n, 8, generator=generator)
    k = torch.randn(batch, kv, n, 8, generator=generator)
    weights = (q.double() @ k.double().repeat_interleave(h // kv, 1).mT / 8**0.5).softmax(-1)
    frame, space = distances(frames, tokens)
    got = energy_by_distance(q, k, frames, tokens)
    for d in range(frames):
        for e in range(tokens):
            here = (frame == d) & (space == e)
            assert torch.allclose(got[:, d, e], weights[..., here].mean((0, 2)))


@given(st.integers(2, 6), st.integers(2, 6), st.floats(-1, 2).filter(lambda x: abs(x) > 1e-3), st.floats(-1, 2))
def test_slopes_that_were_put_there(frames, tokens, alpha, beta):
    """Exactly, whatever the border does."""
    frame, space = distances(frames, tokens)
    weights = (-alpha * frame - beta * space).double().softmax(-1)
    table = torch.stack(
        [torch.stack([weights[(frame == d) & (space == e)].mean() for e in range(tokens)]) for d in range(frames)]
    )
    found = energy_decay(table[None])
    assert float(found.frame) == pytest.approx(alpha, abs=1e-6)
    assert float(found.space) == pytest.approx(beta, abs=1e-6)
    assert float(found.fit) == pytest.approx(1, abs=1e-6)


def test_heads_without_a_scale():
    table = torch.full((2, 3, 4), 1 / 12, dtype=torch.float64)  # a global head, and one that sees only itself
    table[1] = 0
    table[1, 0, 0] = 1
    found = energy_decay(table)
    assert found.frame.tolist() == [pytest.approx(0, abs=1e-6), float("inf")]
    assert found.space.tolist() == [pytest.approx(0, abs=1e-6), float("inf")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: energy_by_distance(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2), 2, 4), r"2 \* 4 tokens, got 6"),
        (lambda: energy_by_distance(torch.ones(1, 3, 6, 2), torch.ones(1, 2, 6, 2), 2, 3), "multiple of k's 2 heads"),
        (lambda: energy_decay(torch.ones(1, 5)), "at least 2 x 2 distances, got 1 x 5"),
        (lambda: energy_decay(torch.ones(2, 2)), "must sum to 1 over the pairs of a query"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()
