"""How fast attention fades with the distance between frames and within a frame of a video."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["EnergyDecay", "energy_by_distance", "energy_decay"]


_STEEP = 30.0  # nats a step: no weight beyond the first


class EnergyDecay(NamedTuple):
    """Slopes of a head's log weight and how well the two tell its distances; see `energy_decay`.

    ``frame``: nats lost a frame of distance; ``space``: nats lost a token of raster distance; ``fit``: at most 1.
    """

    frame: Tensor
    space: Tensor
    fit: Tensor


def energy_by_distance(
    q: Float[Tensor, "batch heads n head_dim"],
    k: Float[Tensor, "batch kv_heads n head_dim"],
    frames: int,
    tokens: int,
    scale: float | int | None = None,
) -> Float[Tensor, "heads frames tokens"]:
    """Mean weight of the pairs at each distance, ``E[D, d] = mean of P_qk over |i - j| = D, |u - v| = d``, in float64.

    q is token u of frame i and k token v of frame j of a video in raster order, ``n = frames * tokens``; P is the full
    softmax over all n keys. One query frame at a time: ``tokens * n`` weights a head are held.

    Args:
        q, k: queries and keys as attention takes them; query head h meets key head ``h // (heads // kv_heads)``.
        frames, tokens: frames and tokens of a frame.
        scale: of the scores; None: ``1 / sqrt(head_dim)``.
    """
    batch, heads, n, dim = q.shape
    if frames < 1 or tokens < 1 or n != frames * tokens or k.shape[2] != n:
        raise ValueError(
            f"q and k must have frames * tokens = {frames} * {tokens} tokens, got {n} queries and {k.shape[2]} keys"
        )
    if heads % k.shape[1]:
        raise ValueError(f"heads must be a multiple of k's {k.shape[1]} heads, got {heads}")
    scale = dim**-0.5 if scale is None else scale
    keys = k.double().repeat_interleave(heads // k.shape[1], 1).mT
    place = torch.arange(tokens, device=q.device)
    apart = (place[:, None] - place[None]).abs().flatten()
    total = q.new_zeros(heads, frames, tokens, dtype=torch.float64)
    for i in range(frames):
        weights = (scale * q[:, :, i * tokens : (i + 1) * tokens].double() @ keys).softmax(-1)
        pairs = weights.sum(0).unflatten(-1, (frames, tokens)).transpose(1, 2).flatten(2)
        by_space = q.new_zeros(heads, frames, tokens, dtype=torch.float64).index_add_(2, apart, pairs)
        total.index_add_(1, (torch.arange(frames, device=q.device) - i).abs(), by_space)
    return total / (batch * _pairs(frames, q.device)[:, None] * _pairs(tokens, q.device))


def _pairs(n: int, device: torch.device) -> Tensor:
    """How many of n x n pairs lie at each distance."""
    distance = torch.arange(n, device=device)
    return torch.where(distance == 0, n, 2 * (n - distance)).double()


def energy_decay(mean_weight: Float[Tensor, "*heads frames tokens"]) -> EnergyDecay:
    """The slopes a and b for which ``softmax(-a |i - j| - b |u - v|)`` is nearest to the head.

    Nearest in cross-entropy over all queries, which is the model with the head's own mean frame distance and mean
    distance in the frame; it factorises, so each slope is one root. (A line through log E would come out low: far
    distances belong to queries at the border, which share their mass among fewer keys.) Radial Attention
    (arXiv 2506.19852) sizes its windows after such a decay; a global head has slopes near 0. ``fit`` is
    ``1 - KL(head | model) / KL(head | uniform)`` of the mass at each distance.

    Args:
        mean_weight: as `energy_by_distance` gives it; at least two distances each way.

    Returns:
        Slopes in nats, negative where weight grows with distance, infinite where all mass is at one end.

    Raises:
        ValueError: fewer than two distances each way, or weights that do not sum to 1 a query.
    """
    frames, tokens = mean_weight.shape[-2:]
    if frames < 2 or tokens < 2:
        raise ValueError(f"mean_weight must have at least 2 x 2 distances, got {frames} x {tokens}")
    device = mean_weight.device
    uniform = _pairs(frames, device)[:, None] * _pairs(tokens, device) / (frames * tokens)  # pairs a query
    mass = mean_weight.double().reshape(-1, frames, tokens) * uniform
    if ((mass.sum((1, 2)) - 1).abs() > 1e-3).any():
        raise ValueError(f"mean_weight must sum to 1 over the pairs of a query, got {mass.sum((1, 2)).tolist()}")
    frame = _slope((mass.sum(2) * torch.arange(frames, device=device)).sum(1), frames)
    space = _slope((mass.sum(1) * torch.arange(tokens, device=device)).sum(1), tokens)
    model = _mass(frame, frames)[:, :, None] * _mass(space, tokens)[:, None]
    left, all_of_it = (torch.special.xlogy(mass, mass / m).sum((1, 2)) for m in (model, uniform / (frames * tokens)))
    fit = torch.where(all_of_it > 0, 1 - left / all_of_it, torch.ones_like(left))
    return EnergyDecay(*(x.view(mean_weight.shape[:-2]) for x in (frame, space, fit)))


def _mass(slope: Tensor, n: int) -> Tensor:
    """Mass at each distance on an axis of n under ``softmax(-slope * distance)``, mean over its queries, [heads, n]."""
    distance = torch.arange(n, dtype=torch.float64, device=slope.device)
    near = -slope.clamp(-_STEEP, _STEEP)[:, None] * distance
    ahead = torch.cat([torch.full_like(near[:, :1], -torch.inf), near[:, 1:].logcumsumexp(1)], 1)
    total = torch.logaddexp(torch.logaddexp(ahead, ahead.flip(1)), torch.zeros_like(near))  # of each query
    # A query x has one key at distance d on each side that has room: all queries but the first d, and but the last d.
    room = (-total).flip(1).logcumsumexp(1).flip(1)
    both = near + room + torch.where(distance == 0, 0.0, torch.tensor(2.0, dtype=torch.float64).log().item())
    return both.exp() / n


def _slope(mean_distance: Tensor, n: int) -> Tensor:
    """The slope whose model has this mean distance, by bisection; infinite beyond `_STEEP`."""
    distance = torch.arange(n, dtype=torch.float64, device=mean_distance.device)
    low, high = torch.full_like(mean_distance, -_STEEP), torch.full_like(mean_distance, _STEEP)
    for _ in range(60):
        middle = (low + high) / 2
        far = (_mass(middle, n) * distance).sum(1) > mean_distance  # the model looks too far: steeper
        low, high = torch.where(far, middle, low), torch.where(far, high, middle)
    slope = (low + high) / 2
    return torch.where(slope.abs() > 0.999 * _STEEP, slope.sign() * torch.inf, slope)
