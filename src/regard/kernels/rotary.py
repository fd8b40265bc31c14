"""Rotary positions: the one rotation of queries and keys, and its way back."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["inverse_frequencies", "rotate", "turn", "unrotate"]


def inverse_frequencies(
    head_dim: int,
    theta: float | int = 10_000.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "pairs"]:
    """``theta^(-2p / head_dim)`` for the pairs p = 0 .. head_dim / 2 - 1, radians a position (arXiv 2104.09864).

    Raises:
        ValueError: head_dim is odd or below 2, or theta is not above 0.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2 for pairs to rotate, got {head_dim}")
    if not theta > 0:
        raise ValueError(f"theta must be above 0, got {theta}")
    pair = torch.arange(0, head_dim, 2, device=device, dtype=dtype)
    return 1.0 / theta ** (pair / head_dim)


def rotate(
    x: Float[Tensor, "*rows head_dim"],
    positions: Int[Tensor, "..."] | Float[Tensor, "..."],
    inv_freq: Float[Tensor, "pairs"] | Float[Tensor, "axes pairs"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "*rows head_dim"]:
    """Each vector turned by its position: pair p by the angle ``position * inv_freq[p]`` (arXiv 2104.09864).

    ``(a, b) -> (a cos - b sin, b cos + a sin)``, so that dot products of rotated vectors depend on differences of
    positions alone. Angles are computed in float32 (float64 for float64 x) from positions and frequencies as they are,
    as models do; the result is in the dtype of x.

    Args:
        x: vectors; where inv_freq has fewer than ``head_dim / 2`` pairs the first ``2 pairs`` dimensions turn and the
            others stay.
        positions: whole or not, negative too; broadcast to the rows of x, ``[length]`` or ``[batch, 1, length]`` for x
            of ``[batch, heads, length, head_dim]``.
        inv_freq: radians a position. With ``[axes, pairs]`` a position has one more axis of that many coordinates, and
            pair p turns by ``sum_a position[a] * inv_freq[a, p]``: grids, with zeros where an axis turns no pair.
        interleaved: pairs are dimensions (2p, 2p + 1), as GPT-J has them; otherwise (p, p + pairs), as Llama has them.

    Raises:
        ValueError: more pairs than x has, or positions that do not broadcast to the rows of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs, axes = inv_freq.shape[-1], inv_freq.ndim - 1
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"inv_freq has {pairs} pairs, x of head_dim {x.shape[-1]} has {x.shape[-1] // 2}")
    rows = tuple(x.shape[:-1])
    told = tuple(positions.shape)
    if axes and told[-1:] != tuple(inv_freq.shape[:1]):
        raise ValueError(f"positions must end in inv_freq's {inv_freq.shape[0]} axes, got shape {list(told)}")
    lead = told[: len(told) - axes]
    if len(lead) > len(rows) or any(m not in (1, n) for m, n in zip(lead[::-1], rows[::-1], strict=False)):
        raise ValueError(f"positions must broadcast to the rows {list(rows)} of x, got shape {list(told)}")
    at, frequency = positions.to(dtype), inv_freq.to(dtype)
    # one product for one axis, exactly what models compute; zeros of other axes add nothing to it
    angle = at[..., None] * frequency if not axes else (at[..., None] * frequency).sum(-2)
    return turn(x, angle, interleaved=interleaved)


def turn(
    x: Float[Tensor, "*rows head_dim"], angles: Float[Tensor, "... pairs"], *, interleaved: bool = False
) -> Float[Tensor, "*rows head_dim"]:
    """Each pair of each vector turned by an angle, the last step of `rotate`; angles broadcast to the rows."""
    dtype, pairs = torch.promote_types(x.dtype, torch.float32), angles.shape[-1]
    cos, sin = angles.to(dtype).cos(), angles.to(dtype).sin()
    head, tail = x[..., : 2 * pairs].to(dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = head.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    turned = turned.to(x.dtype)
    return torch.cat([turned, tail], dim=-1) if tail.shape[-1] else turned


def unrotate(
    x: Float[Tensor, "*rows head_dim"],
    positions: Int[Tensor, "..."] | Float[Tensor, "..."],
    inv_freq: Float[Tensor, "pairs"] | Float[Tensor, "axes pairs"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "*rows head_dim"]:
    """What `rotate` turned into x: rotation by ``-positions``, exact to the rounding of x's dtype."""
    return rotate(x, -positions, inv_freq, interleaved=interleaved)
