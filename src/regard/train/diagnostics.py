"""What training did to a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["weight_drift", "weights"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, by name, to measure `weight_drift` from."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def weight_drift(before: Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor]) -> dict[str, float]:
    """How far each matrix moved: ``|W - W0|_F / |W0|_F``, in float64, for the parameters of two dimensions.

    Args:
        before: W0 by name, as `weights` gives them.
        after: the model trained, or its weights.

    Raises:
        ValueError: the names or a shape differ, or a matrix was 0.
    """
    now = weights(after) if isinstance(after, nn.Module) else after
    if set(now) != set(before):
        raise ValueError(
            f"before and after must hold the same parameters, they differ in {sorted(set(now) ^ set(before))}"
        )
    drift = {}
    for name, start in before.items():
        if now[name].shape != start.shape:
            raise ValueError(f"{name} must keep its shape, {tuple(start.shape)} became {tuple(now[name].shape)}")
        if start.ndim != 2:
            continue
        size = float(start.double().norm())
        if size == 0:
            raise ValueError(f"{name} was 0, so there is nothing to measure its drift by")
        drift[name] = float((now[name].double() - start.double()).norm()) / size
    return drift
