"""Attention of the tokens of an n-D grid, dense where the grid falls into groups: windows, rows, strides."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from regard.kernels.attend import attend
from regard.layers.folding import Folding, fold
from regard.layers.refuse import need_heads, need_length, refuse
from regard.patterns import Blocks, Congruent, Grid, Segments

__all__ = ["GridAttention", "Mode", "window_grid", "windowed"]

Mode = Literal["plain", "shifted", "grid"]


class GridAttention(nn.Module):
    """Multi-head softmax attention under a `Grid`: ``softmax(q k^T / sqrt(dim / heads) + bias) v`` over allowed pairs.

    Inside, tokens are reordered so that the groups of the grid lie together. Windows, strided grids, rows and columns
    (axes `Blocks`, `Congruent`, `Segments`, `Same`, `Full`) run as a batch of dense problems, and so do axes that leave
    at least 40 % of the pairs of a group of at most 1,024 tokens (`Causal`); anything sparser, as neighborhoods are,
    goes through `kernels.attend`. `folded` says which; ``table`` then lists the tokens of each group (-1 pads), which
    is what `regard.watch.fold.Fold` needs to watch the layer. Windows that the map does not fill are padded inside;
    padding is never attended to.

    Args:
        dim: width.
        heads: must divide dim.
        grid_pattern: which tokens meet; its shape is that of the tokens, row-major.
        rel_bias: a learned bias ``[heads, 2 s_1 - 1, 2 s_2 - 1, ...]`` for groups of s_1 x s_2 x ... tokens, indexed
            by the difference of the places in the group (for a strided grid: grid coordinates, not pixels). Starts at
            0. Needs a grid that runs dense.
        bias: of the q, k, v projection.

    Raises:
        ValueError: heads that do not divide dim; a relative bias where there are no groups.
    """

    table: Tensor
    slot: Tensor
    mask: Tensor | None
    offset: Tensor

    def __init__(self, dim: int, heads: int, grid_pattern: Grid, rel_bias: bool = False, bias: bool = True):
        super().__init__()
        need_heads(dim, heads)
        self.heads, self.grid = heads, grid_pattern
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim)
        folding = fold(grid_pattern)
        self.folded = folding is not None
        self.sizes = folding.sizes if folding is not None else ()
        self._keep("table", None if folding is None else folding.table)
        self._keep("slot", None if folding is None else folding.slot)
        self._keep("mask", None if folding is None else folding.mask)
        self.rel_bias: nn.Parameter | None = None
        if rel_bias:
            if folding is None:
                raise ValueError(f"rel_bias must be False for {grid_pattern}: it does not fall into dense groups")
            self.rel_bias = nn.Parameter(torch.zeros(heads, *(2 * s - 1 for s in folding.sizes)))
            self._keep("offset", _offsets(folding))

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of the grid's tokens; ``context``, ``pattern`` and ``state`` are refused."""
        refuse(self, context=context, pattern=pattern, state=state)
        need_length(self, x.shape[1], self.grid.shape)
        if not self.folded:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = attend(q, k, v, self.grid, q_start=0)
            assert isinstance(y, Tensor)  # no lse was asked for
            return self.proj(y.transpose(1, 2).flatten(2))
        groups, size = self.table.shape
        gathered = x.index_select(1, self.table.flatten().clamp(min=0))
        q, k, v = self.qkv(gathered).unflatten(-1, (3, self.heads, -1)).unbind(2)
        bias = self._scores(x.dtype)
        apart = (
            bias is not None and len(bias) > 1
        )  # groups differ: they stand beside the heads, where a mask can differ
        q, k, v = (self._split(t, groups, size, apart) for t in (q, k, v))
        if apart:
            assert bias is not None
            bias = bias.expand(groups, self.heads, size, size).flatten(0, 1)[None]
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.unflatten(1, (groups, self.heads)) if apart else y.unflatten(0, (-1, groups))
        y = y.transpose(2, 3).flatten(1, 2).flatten(2)  # [batch, groups * size, dim]
        return self.proj(y.index_select(1, self.slot))

    def _split(self, t: Tensor, groups: int, size: int, apart: bool) -> Tensor:
        """[batch, groups * size, heads, d] to [batch, groups * heads, size, d] or [batch * groups, heads, size, d]."""
        t = t.unflatten(1, (groups, size)).transpose(2, 3)
        return t.flatten(1, 2) if apart else t.flatten(0, 1)

    def _scores(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, [groups or 1, heads or 1, size, size]: the relative bias, -inf, or booleans."""
        mask = None if self.mask is None else self.mask[:, None]
        if self.rel_bias is None:
            return mask
        bias = self.rel_bias.flatten(1)[:, self.offset][None].to(dtype)
        return bias if mask is None else bias.masked_fill(~mask, -math.inf)


def _offsets(folding: Folding) -> Tensor:
    """The index into the flattened bias of each pair of slots, [slots, slots]."""
    place = torch.cartesian_prod(*(torch.arange(s) for s in folding.sizes)).reshape(-1, len(folding.sizes))
    offset = torch.zeros(len(place), len(place), dtype=torch.long)
    for d, s in enumerate(folding.sizes):
        offset = offset * (2 * s - 1) + place[:, None, d] - place[None, :, d] + s - 1
    return offset


def windowed(
    dim: int,
    heads: int,
    shape: tuple[int, ...],
    window: int,
    mode: Mode = "plain",
    rel_bias: bool = False,
) -> GridAttention:
    """Window attention over a map: windows of ``window`` tokens a side.

    - ``plain``: contiguous windows; the last ones are smaller where the window does not divide the side.
    - ``shifted``: Swin's masked form, cut at ``w/2, 3w/2, ...``; what Swin rolls and masks is here a partition.
    - ``grid``: MaxViT's strided grid, ``window`` tokens a side, each ``side / window`` from the next.

    Raises:
        ValueError: a window that is not in 1..side, is odd where shifted, or does not divide a side in grid mode.
    """
    return GridAttention(dim, heads, window_grid(shape, window, mode), rel_bias)


def window_grid(shape: tuple[int, ...], window: int, mode: Mode = "plain") -> Grid:
    """The pattern of `windowed`."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    if not 1 <= window <= min(shape):
        raise ValueError(f"window must be in 1..{min(shape)}, the shortest side of {shape}, got {window}")
    if mode == "plain":
        return Grid((Blocks(window),) * len(shape), tuple(shape))
    if mode == "grid":
        if any(n % window for n in shape):
            raise ValueError(
                f"window must divide every side of {shape} in grid mode (padding changes the strides), got {window}"
            )
        return Grid(tuple(Congruent(n // window) for n in shape), tuple(shape))
    if window % 2:
        raise ValueError(f"window must be even to be shifted by half, got {window}")
    return Grid(tuple(Segments(tuple((i + window // 2) // window for i in range(n))) for n in shape), tuple(shape))
