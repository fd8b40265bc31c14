"""Axes through ordered groups: planted ones are found, and chance is what it should be."""

import numpy as np
import pytest
import torch

from regard.steer.axes import agreement, level_axis, level_means


def planted(strength, n=15, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    level = torch.arange(1, 6).repeat_interleave(n)
    direction = torch.randn(dim, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    noise = torch.randn(len(level), dim, generator=generator, dtype=torch.float64)
    return strength * level[:, None] * direction + noise, level, direction


def test_the_axis_is_the_difference_of_the_ends():
    x, level, direction = planted(3.0)
    axis = level_axis(x, level)
    want = x[level == 5].mean(0) - x[level == 1].mean(0)
    np.testing.assert_allclose(axis, want / want.norm(), atol=1e-12)
    assert axis @ direction > 0.95
    means = level_means(x, level, axis)
    np.testing.assert_allclose(means, [(x[level == g] @ axis).mean() for g in range(1, 6)], atol=1e-12)
    assert (means.diff() > 0).all()


def test_levels_between_have_no_part_in_it():
    x, level, _ = planted(1.0)
    moved = torch.where(((level > 1) & (level < 5))[:, None], x + 100, x)
    assert torch.equal(level_axis(x, level), level_axis(moved, level))


def test_a_planted_axis_agrees_beyond_chance_and_noise_does_not():
    strong = agreement(*planted(3.0)[:2], draws=100)
    assert strong.cosine > 0.95
    assert strong.cosine > strong.chance.quantile(0.99)
    assert strong.share > 0.5
    within = 0
    for seed in range(10):
        none = agreement(*planted(0.0, seed=seed)[:2], draws=100)
        within += none.cosine <= float(none.chance.quantile(0.99))
    assert within >= 8


def test_one_large_direction_lies_near_any_difference():
    """The trap: without any order, the cosine may be large all the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(75, 12, generator=generator) * torch.tensor([20.0] + [0.1] * 11)
    assert agreement(x, torch.arange(1, 6).repeat_interleave(15), draws=50).chance.median() > 0.9


def test_what_has_no_axis_is_refused():
    with pytest.raises(ValueError, match="two levels at least, got only 2"):
        level_axis(torch.randn(3, 2), torch.full((3,), 2))
    with pytest.raises(ValueError, match="coincide"):
        level_axis(torch.ones(4, 2), torch.tensor([1, 1, 2, 2]))
