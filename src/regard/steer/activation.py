"""Steering by changing hidden states along directions: functions that return edits for `intervene`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.steer.directions import gram_schmidt, project
from regard.watch.anatomy import Anatomy
from regard.watch.edits import Edit
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["add_direction", "remove_at_each", "remove_directions", "take_elsewhere"]


def add_direction(
    site: Site, direction: Float[Tensor, "*rows dim"], alpha: float | int, scale: float | int = 1.0
) -> list[Edit]:
    """`x + alpha * scale * d / ||d||` at a site.

    Args:
        site: where, a part that is a vector a token.
        direction: d, one for all or one a row, [dim] or what broadcasts to the site's shape.
        alpha: strength, in units of `scale`; negative for the other way.
        scale: such as the mean norm of the states there, without which a strength says little.

    Raises:
        ValueError: a direction of length 0, or a scale that is not positive.
    """
    norm = direction.norm(dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError("direction has length 0, so it points nowhere")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return [Edit(site, "add", value=direction / norm, alpha=float(alpha * scale))]


def remove_directions(
    site: Site, basis: Float[Tensor, "k dim"], around: Float[Tensor, "dim"] | None = None
) -> list[Edit]:
    """`x - P (x - c)` at a site, P the projection on the span of the orthonormal rows of `basis`.

    `directions.remove` as edits: around the origin, or around a point such as a mean, which then stays where it is.
    """
    edits = [Edit(site, "project_out", basis=basis)]
    if around is not None:
        edits.append(Edit(site, "add", value=(around @ basis.T) @ basis))
    return edits


def remove_at_each(
    model: nn.Module,
    inputs: Any,
    sites: Sequence[Site],
    bases: Sequence[Float[Tensor, "_ dim"]],
    means: Sequence[Float[Tensor, "dim"]],
    anatomy: Anatomy | None = None,
) -> tuple[list[Edit], list[Tensor]]:
    """Removal at several sites of one run, each with directions and a mean of its own, and how much each takes away.

    The same direction removed at one layer only may be written again by a later one.

    Args:
        model, inputs: the run.
        sites: in the order in which the run meets them.
        bases: orthonormal rows, one set a site.
        means: what stays where it is, one a site.
        anatomy: as in `intervene`.

    Returns:
        The edits; and for each site the coordinates `(x - c) . e_i` that are removed there, after the removals at the
        sites before it, in x's shape with k in place of dim.
    """
    edits: list[Edit] = []
    taken = []
    for site, basis, mean in zip(sites, bases, means, strict=True):
        x = trace(model, inputs, site, edits=edits, anatomy=anatomy)[site]
        taken.append(project(x - mean, basis))
        edits += remove_directions(site, basis, mean)
    return edits, taken


def take_elsewhere(sites: Sequence[Site], taken: Sequence[Tensor], dim: int, generator: torch.Generator) -> list[Edit]:
    """The control of `remove_at_each`: the same coordinates taken away along random orthonormal directions.

    So every vector loses a part of equal length at every site.
    """
    edits = []
    for site, amount in zip(sites, taken, strict=True):
        random = torch.randn(amount.shape[-1], dim, generator=generator, dtype=torch.float64)
        edits.append(Edit(site, "add", value=-amount @ gram_schmidt(random).to(amount)))
    return edits
