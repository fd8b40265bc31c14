import pytest
import torch

from regard.measures.imprint import grid_imprint


def test_a_repeating_error_is_all_imprint_and_noise_is_almost_none():
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(1, 3, 4, 4, generator=generator)
    assert grid_imprint(tile.repeat(5, 1, 3, 2), 4) == pytest.approx(1.0)
    noise = torch.randn(50, 3, 16, 16, generator=generator)
    assert grid_imprint(noise, 4) == pytest.approx(15 / (50 * 256), rel=0.5)
    assert 0.3 < grid_imprint(noise + tile.repeat(50, 1, 4, 4), 4) < 0.7


def test_equals_the_sum_over_classes():
    error = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = error.mean((0, 2, 3))
    between = 0.0
    for a in range(3):
        for b in range(3):
            part = error[:, :, a::3, b::3]
            between += part[:, 0].numel() * float((part.mean((0, 2, 3)) - mean).square().sum())
    total = float((error - mean[:, None, None]).square().sum())
    assert grid_imprint(error, 3) == pytest.approx(between / total, rel=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="window must be at least 2 and divide 6 and 8, got 4"):
        grid_imprint(torch.randn(1, 1, 6, 8), 4)
    with pytest.raises(ValueError, match="error must vary"):
        grid_imprint(torch.ones(1, 1, 4, 4), 2)
