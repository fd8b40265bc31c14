"""Queries and keys without a model, of a known structure: what a route finds in them, and what it cannot, is known.

Each draws ``(q, k)``, ``[batch, heads, length, head_dim]``, samples and heads independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ar_qk", "block_constant_qk", "clusters_qk", "grid_qk"]

QK = tuple[Tensor, Tensor]


def ar_qk(
    length: int,
    dim: int,
    rho: float | int,
    amp: float | int,
    generator: torch.Generator,
    *,
    batch: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> QK:
    """Neighbours alike: ``y_t = rho y_{t-1} + sqrt(1 - rho^2) n_t``, n ~ N(0, 1), q and k on their own; q times amp.

    Stationary, of variance 1 (``y_0 ~ N(0, 1)``), so the correlation over t tokens is ``rho^t``; ``rho = 0`` is noise,
    in which no key tells of its neighbours.

    Raises:
        ValueError: rho outside [-1, 1], or a size below 1.
    """
    _sizes(length=length, dim=dim, batch=batch, heads=heads)
    if not -1 <= rho <= 1:
        raise ValueError(f"rho must be in [-1, 1], got {rho}")
    y = _noise((length, 2, batch, heads, dim), generator)
    step = (1 - float(rho) ** 2) ** 0.5
    for t in range(1, length):
        torch.add(step * y[t], y[t - 1], alpha=float(rho), out=y[t])
    q, k = y.permute(1, 2, 3, 0, 4).contiguous().to(dtype)
    return q * amp, k


def grid_qk(
    grid: Sequence[int],
    widths: Sequence[float | int],
    amp: float | int,
    noise: float | int,
    generator: torch.Generator,
    *,
    dim: int = 48,
    batch: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> QK:
    """Places on a grid, near along some axes: ``x = [cos(p w), sin(p w)] + noise n``, ``q = k = sqrt(amp) x``.

    p are the coordinates of a token (row-major), ``w ~ N(0, 1)[axes, dim / 2] * sqrt(widths)``, one draw a head and
    sample. Without noise ``q_i . k_j`` is about ``amp dim / 2 exp(-sum_a widths_a (p_i - p_j)_a^2 / 2)``: a kernel that
    decays fast along axes with a large width.

    Raises:
        ValueError: widths that are not one number >= 0 an axis, amp below 0, an odd dim, or a size below 1.
    """
    sizes, wide = tuple(grid), torch.tensor([float(w) for w in widths], dtype=torch.float64)
    _sizes(**{f"grid[{a}]": n for a, n in enumerate(sizes)}, dim=dim, batch=batch, heads=heads)
    if not sizes or len(wide) != len(sizes) or bool((wide < 0).any()):
        raise ValueError(f"widths must be one number >= 0 for each of the {len(sizes)} axes, got {list(widths)}")
    if dim % 2:
        raise ValueError(f"dim must be even (cosines and sines), got {dim}")
    if amp < 0:
        raise ValueError(f"amp must be >= 0 (its root is taken), got {amp}")
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sizes)).view(-1, len(sizes))
    omega = _noise((batch, heads, len(sizes), dim // 2), generator) * wide.sqrt()[:, None]
    angle = places @ omega
    x = torch.cat([angle.cos(), angle.sin()], -1)
    x = (x + noise * _noise((batch, heads, prod(sizes), dim), generator)) * float(amp) ** 0.5
    return x.to(dtype), x.to(dtype)


def block_constant_qk(
    blocks: int,
    block: int,
    dim: int,
    generator: torch.Generator,
    *,
    noise: float | int = 0.0,
    batch: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> QK:
    """Blocks of equal tokens: one q and one k ~ N(0, 1) for each of ``blocks`` blocks, repeated ``block`` times.

    Pooled scores then are the scores. ``noise``: so many times N(0, 1) on every token.

    Raises:
        ValueError: a size below 1.
    """
    _sizes(blocks=blocks, block=block, dim=dim, batch=batch, heads=heads)
    x = _noise((2, batch, heads, blocks, dim), generator).repeat_interleave(block, 3)
    if noise:
        x = x + noise * _noise(x.shape, generator)
    q, k = x.to(dtype)
    return q, k


def clusters_qk(
    length: int,
    clusters: int,
    dim: int,
    noise: float | int,
    amp: float | int,
    generator: torch.Generator,
    *,
    batch: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> QK:
    """Tokens of a few kinds in any order: each a random centre ~ N(0, 1) plus noise n, normalised; q is amp times k.

    ``k = LayerNorm(centre + noise n)`` without affine parameters. Nothing is local: the tokens of a kind are spread
    over the whole sequence. Under a causal rule early rows have few of their kind before them; judge the rows
    ``length / 2`` and on.

    Raises:
        ValueError: a size below 1.
    """
    _sizes(length=length, clusters=clusters, dim=dim, batch=batch, heads=heads)
    centres = _noise((batch, heads, clusters, dim), generator)
    which = torch.randint(clusters, (batch, heads, length, 1), generator=generator).expand(-1, -1, -1, dim)
    x = centres.gather(2, which) + noise * _noise((batch, heads, length, dim), generator)
    k = F.layer_norm(x, (dim,)).to(dtype)
    return k * amp, k


def _noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)


def _sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
