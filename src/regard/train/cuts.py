"""Matrices of a model cut to some of their components: the most curved, as many at random, or a truncated SVD."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.train.curvature import Factors, components, top_products

__all__ = ["Spectrum", "at_random", "edited", "truncated"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A weight ``W = U_G C U_A^T`` in the components of its `Factors`; component (i, j) has curvature ``lam_i mu_j``.

    Attributes:
        weight: W ``[out, in]``.
        turned, turn_out, turn_in: C, U_G and U_A, float64.
        lam, mu: eigenvalues of G and A, none below 0.
    """

    weight: Float[Tensor, "out in"]
    turned: Float[Tensor, "out in"]
    turn_out: Float[Tensor, "out out"]
    turn_in: Float[Tensor, "in in"]
    lam: Float[Tensor, "out"]
    mu: Float[Tensor, "in"]

    @classmethod
    def of(cls, weight: Tensor, factors: Factors) -> Spectrum:
        """The components of a copy of a weight."""
        kept = weight.detach().clone()
        return cls(kept, *components(kept, factors.A, factors.G))

    def top(self, rho: float | int) -> Bool[Tensor, "out in"]:
        """The most curved components that together hold ``rho`` of the curvature; see `top_products`."""
        return top_products(self.lam, self.mu, rho)

    def cut(self, mask: Bool[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``U_G (C * mask) U_A^T`` in W's dtype; of ``top(rho)`` it is `curvature_edit`."""
        return (self.turn_out @ (self.turned * mask) @ self.turn_in.T).to(self.weight.dtype)


def at_random(mask: Bool[Tensor, "out in"], generator: torch.Generator) -> Bool[Tensor, "out in"]:
    """As many components as the mask keeps, drawn at random."""
    flat = mask.flatten()
    return flat[torch.randperm(len(flat), generator=generator).to(flat.device)].view(mask.shape)


def truncated(weight: Float[Tensor, "out in"], share: float | int) -> Float[Tensor, "out in"]:
    """The weight's SVD cut to a share of its rank: ``max(1, round(share * min(out, in)))`` of the largest values.

    Raises:
        ValueError: share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    rank = max(1, round(share * len(s)))
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight.dtype)


def edited(model: Model, weights: Mapping[str, Tensor]) -> Model:
    """A copy of a model in which the modules named have these weights.

    Raises:
        ValueError: a weight of another shape.
    """
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            own = other.get_submodule(name).weight
            assert isinstance(own, Tensor)
            if own.shape != weight.shape:
                raise ValueError(f"weight of {name} must be {tuple(own.shape)}, got {tuple(weight.shape)}")
            own.copy_(weight)
    return other
