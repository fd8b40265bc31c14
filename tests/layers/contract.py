"""What every layer on sequences keeps: shapes, finite gradients, its pattern, refusals by name."""

import pytest
import torch


def jitter(layer, seed=0):
    """Every parameter random, so that none is zero by its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return layer


def tokens(batch, length, dim, seed=1, dtype=torch.float32):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_gradients(layer, x):
    y = layer(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def reached(layer, length, dim):
    """Which output tokens depend on which input tokens, [q, k], from the Jacobian in float64."""
    layer = layer.double()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: layer(x), tokens(1, length, dim, dtype=torch.float64), vectorize=False
    )
    return jacobian[0, :, :, 0].abs().sum((1, 3)) != 0


def check_refusals(layer, length, dim, *, arguments=("context", "pattern", "state")):
    x = tokens(1, length, dim)
    for name in arguments:
        with pytest.raises((ValueError, TypeError), match=name):
            layer(x, **{name: x})
    with pytest.raises(ValueError, match=rf"x must have {length} tokens"):
        layer(tokens(1, length + 1, dim))
