"""An axis through ordered groups: where it comes from, and whether it is more than the largest spread."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.steer.directions import mean_difference, principal

__all__ = ["Agreement", "agreement", "level_axis", "level_means"]


def level_axis(x: Float[Tensor, "n dim"], level: Int[Tensor, "n"]) -> Float[Tensor, "dim"]:
    """The unit vector from the mean of the lowest level to that of the highest.

    Levels between the two have no part in it, so their order along it is a finding; that of the two ends is not.

    Raises:
        ValueError: one level only, or two means that coincide.
    """
    lowest, highest = level.min(), level.max()
    if lowest == highest:
        raise ValueError(f"level must hold two levels at least, got only {int(lowest)}")
    axis = mean_difference(x[level == highest], x[level == lowest])
    if axis.norm() == 0:
        raise ValueError("the means of the lowest and the highest level coincide")
    return axis / axis.norm()


def level_means(
    x: Float[Tensor, "n dim"], level: Int[Tensor, "n"], axis: Float[Tensor, "dim"]
) -> Float[Tensor, "levels"]:
    """The mean coordinate along the axis of each level, in the levels' order."""
    along = x.double() @ axis.double()
    return torch.stack([along[level == g].mean() for g in level.unique()])


class Agreement(NamedTuple):
    """How an axis and the first principal component agree.

    `cosine`: |cos| of the two; `share`: of the variance on the component; `chance` [draws]: the same |cos| for axes
    from levels dealt out at random.
    """

    cosine: float
    share: float
    chance: Float[Tensor, "draws"]


def agreement(x: Float[Tensor, "n dim"], level: Int[Tensor, "n"], *, draws: int = 500, seed: int = 0) -> Agreement:
    """|cos| of `level_axis` and the first principal component of the rows of x, and what chance gives.

    A component that carries most of the variance lies near the difference of any two groups, so the cosine is read
    against axes from random assignments of the same levels to the rows.
    """
    first, share = principal(x.double(), 1)
    generator = torch.Generator().manual_seed(seed)
    chance = []
    for _ in range(draws):
        dealt = level[torch.randperm(len(level), generator=generator).to(level.device)]
        chance.append((level_axis(x.double(), dealt) @ first[0]).abs())
    cosine = (level_axis(x.double(), level) @ first[0]).abs()
    return Agreement(float(cosine), float(share[0]), torch.stack(chance))
