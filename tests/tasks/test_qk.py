"""Queries and keys of a known structure: the structure is there, and nothing else."""

import pytest
import torch

from regard.tasks.qk import ar_qk, block_constant_qk, clusters_qk, grid_qk


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


DRAWN = {
    "ar": lambda g, **how: ar_qk(12, 4, 0.9, 2, g, **how),
    "grid": lambda g, **how: grid_qk((3, 4), (1, 0.5), 3, 0.3, g, dim=4, **how),
    "blocks": lambda g, **how: block_constant_qk(3, 4, 4, g, noise=0.1, **how),
    "clusters": lambda g, **how: clusters_qk(12, 3, 4, 0.5, 2, g, **how),
}


@pytest.mark.parametrize("name", DRAWN)
def test_shapes_dtypes_and_the_generator_alone_decide(name):
    draw = DRAWN[name]
    q, k = draw(seeded(), batch=2, heads=3, dtype=torch.float64)
    assert q.shape == k.shape == (2, 3, 12, 4)
    assert q.dtype == k.dtype == torch.float64
    torch.manual_seed(5)
    again, _ = draw(seeded(), batch=2, heads=3, dtype=torch.float64)
    assert torch.equal(q, again)
    other, _ = draw(seeded(1), batch=2, heads=3, dtype=torch.float64)
    assert not torch.equal(q, other)
    assert not torch.equal(q[0, 0], q[1, 0])  # samples and heads are draws of their own
    assert not torch.equal(q[0, 0], q[0, 1])


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.97])
def test_ar_is_the_recursion_and_stationary(rho):
    q, k = ar_qk(60, 8, rho, 2, seeded(), heads=2, dtype=torch.float64)
    n = torch.randn(60, 2, 1, 2, 8, generator=seeded(), dtype=torch.float64)
    want = [n[0]]
    for t in range(1, 60):
        want.append(rho * want[-1] + (1 - rho**2) ** 0.5 * n[t])
    want = torch.stack(want, -2)
    torch.testing.assert_close(q, 2 * want[0])
    torch.testing.assert_close(k, want[1])
    q, k = ar_qk(40, 16, rho, 1, seeded(), batch=2000)
    assert abs(float(q[:, :, -1].var()) - 1) < 0.03
    assert abs(float(k[:, :, 0].var()) - 1) < 0.03
    assert abs(float((k[:, :, 1:] * k[:, :, :-1]).mean()) - rho) < 0.02
    assert abs(float((k[:, :, 5:] * k[:, :, :-5]).mean()) - rho**5) < 0.02
    assert abs(float((q * k).mean())) < 0.02  # q and k know nothing of each other


def test_grid_is_the_kernel():
    """Without noise the score is the Gaussian kernel of the distance, wide axes fast."""
    widths = (2.0, 0.05)
    q, k = grid_qk((5, 7), widths, 3, 0, seeded(), dim=64, heads=400, dtype=torch.float64)
    assert torch.equal(q, k)
    score = (q @ k.mT).mean((0, 1)) / (3 * 32)
    at = torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0)).double()
    d2 = (at[:, None] - at[None]) ** 2
    want = torch.exp(-(d2[..., 0] * widths[0] + d2[..., 1] * widths[1]) / 2)
    assert float((score - want).abs().max()) < 0.03
    noisy, same = grid_qk((5, 7), widths, 3, 0.5, seeded(), dim=64, heads=400, dtype=torch.float64)
    assert torch.equal(noisy, same)
    assert abs(float((noisy - q).var()) - 3 * 0.25) < 0.02


def test_blocks_are_constant_and_noise_is_on_every_token():
    q, k = block_constant_qk(6, 5, 8, seeded())
    for x in (q, k):
        tiles = x.view(6, 5, 8)
        assert torch.equal(tiles, tiles[:, :1].expand_as(tiles))
        assert len(tiles[:, 0].unique(dim=0)) == 6
    assert not torch.equal(q, k)
    noisy, _ = block_constant_qk(6, 500, 8, seeded(), noise=0.3)
    inside = noisy.view(6, 500, 8).std(1)
    assert float((inside - 0.3).abs().max()) < 0.05


def test_clusters_are_normalised_and_shared_by_q_and_k():
    q, k = clusters_qk(400, 4, 32, 0.2, 2, seeded(), dtype=torch.float64)
    torch.testing.assert_close(q, 2 * k)
    torch.testing.assert_close(k.mean(-1), torch.zeros(1, 1, 400, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(k.var(-1, unbiased=False), torch.ones(1, 1, 400, dtype=torch.float64), atol=1e-4, rtol=0)
    alike = (k[0, 0] @ k[0, 0].T) / 32 > 0.6
    kinds = alike.int().unique(dim=0)
    assert len(kinds) == 4  # four kinds, every token in exactly one
    assert (kinds.sum(0) == 1).all()
    assert (kinds.sum(1) > 60).all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda g: ar_qk(0, 4, 0.5, 1, g), "length must be an integer >= 1"),
        (lambda g: ar_qk(4, 4, 1.5, 1, g), r"rho must be in \[-1, 1\]"),
        (lambda g: grid_qk((3, 4), (1,), 1, 0, g), "one number >= 0 for each of the 2 axes"),
        (lambda g: grid_qk((3, 0), (1, 1), 1, 0, g), r"grid\[1\] must be"),
        (lambda g: grid_qk((3,), (1,), 1, 0, g, dim=5), "dim must be even"),
        (lambda g: grid_qk((3,), (1,), -1, 0, g), "amp must be >= 0"),
        (lambda g: block_constant_qk(2, 0, 4, g), "block must be an integer >= 1"),
        (lambda g: clusters_qk(2, 3, 4, 0, 1, g, heads=0), "heads must be an integer >= 1"),
    ],
)
def test_refusals_name_the_argument(call, told):
    with pytest.raises(ValueError, match=told):
        call(seeded())
