"""Pairs of tokens near each other, kept as a band, and attention along rows and columns of it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from regard.layers.position import Rope
from regard.layers.refuse import refuse

__all__ = ["PlusAttention", "band_valid", "from_band", "to_band", "transpose_band"]

JOINED = ("cell", "mirror")


def band_valid(
    n: int, width: int, lengths: Int[Tensor, "batch"] | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "batch {n} cells"]:
    """Which cells of a band are pairs of tokens, ``[batch, n, 2 width + 1]`` (batch 1 without lengths).

    Cell (i, c) is the pair (i, j) with ``j = i + c - width``: there if ``0 <= j < length`` and ``i < length``.
    """
    _check(n, width)
    lengths = torch.tensor([n], device=device) if lengths is None else lengths
    row = torch.arange(n, device=lengths.device)[:, None]
    column = _columns(n, width, lengths.device)
    size = lengths[:, None, None]
    return (column >= 0) & (column < size) & (row < size)


def to_band(square: Shaped[Tensor, "batch n n *features"], width: int) -> Shaped[Tensor, "batch n cells *features"]:
    """``band[:, i, c] = square[:, i, i + c - width]``, zeros beside the square; pairs farther apart are lost."""
    n = square.shape[1]
    _check(n, width)
    column = _columns(n, width, square.device)
    row = torch.arange(n, device=square.device)[:, None]
    band = square[:, row, column.clamp(0, max(n - 1, 0))]
    return band.masked_fill(~_like(band_valid(n, width, device=square.device), band), 0)


def from_band(
    band: Shaped[Tensor, "batch n cells *features"], fill: float | int | bool = 0
) -> Shaped[Tensor, "batch n n *features"]:
    """``square[:, i, j] = band[:, i, j - i + width]``, and ``fill`` where ``|i - j| > width``."""
    n, width = band.shape[1], _width(band)
    row = torch.arange(n, device=band.device)
    cell = row - row[:, None] + width
    square = band[:, row[:, None], cell.clamp(0, 2 * width)]
    return square.masked_fill(~_like(((cell >= 0) & (cell <= 2 * width))[None], square), fill)


def transpose_band(band: Shaped[Tensor, "batch n cells *features"]) -> Shaped[Tensor, "batch n cells *features"]:
    """The band of the transposed square: cell (i, j) takes what stands at (j, i); zeros beside the square."""
    n, width = band.shape[1], _width(band)
    column = _columns(n, width, band.device)
    mirror = torch.arange(2 * width, -1, -1, device=band.device).expand_as(column)
    turned = band[:, column.clamp(0, max(n - 1, 0)), mirror]
    return turned.masked_fill(~_like(band_valid(n, width, device=band.device), turned), 0)


class PlusAttention(nn.Module):
    """Each pair (i, j) attends to the pairs of its row i and to those of its column j: a plus (arXiv 2502.07286).

    Row attention: one head over the cells of row i, scale ``1 / sqrt(dim)``, rotary positions on the cell. Column
    attention: the same with weights of its own on the transposed band. Both results side by side, projected to dim.

    Args:
        dim: of a cell, even.
        theta: base of the rotary positions.
        joined: what stands beside the row result of cell (i, j): "cell" its own column result, over the pairs (., j);
            "mirror" that of cell (j, i), over the pairs (., i), as the authors' released code has it (labels must
            then be symmetric for the two to speak of one span).
    """

    def __init__(self, dim: int, theta: float | int = 10_000.0, joined: str = "cell") -> None:
        super().__init__()
        if joined not in JOINED:
            raise ValueError(f"joined must be 'cell' or 'mirror', got {joined!r}")
        self.dim, self.joined = dim, joined
        self.rope = Rope(dim, theta)
        self.row_qkv, self.column_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.merge = nn.Linear(2 * dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch n cells {self.dim}"],
        *,
        lengths: Int[Tensor, "batch"] | None = None,
        context: Any = None,
        pattern: Any = None,
        state: Any = None,
    ) -> Float[Tensor, "batch n cells {self.dim}"]:
        """The band after both attentions; cells that are no pair of tokens are not attended to and give zeros.

        Args:
            x: a band of ``cells = 2 width + 1``.
            lengths: true length of each sample; None: n.
            context, pattern, state: refused.
        """
        refuse(self, context=context, pattern=pattern, state=state)
        valid = band_valid(x.shape[1], _width(x), lengths, x.device)
        x = x.masked_fill(~valid[..., None], 0)
        rows = self._along(x, self.row_qkv, valid)
        # The cells that are there are the same ones after transposing.
        columns = self._along(transpose_band(x), self.column_qkv, valid)
        if self.joined == "cell":
            columns = transpose_band(columns)
        return self.merge(torch.cat([rows, columns], dim=-1)).masked_fill(~valid[..., None], 0)

    def _along(self, x: Tensor, project: nn.Linear, valid: Tensor) -> Tensor:
        batch, n, cells, _ = x.shape
        q, k, v = (part.reshape(batch * n, 1, cells, self.dim) for part in project(x).chunk(3, dim=-1))
        place = torch.arange(cells, device=x.device)
        q, k = self.rope.rotate(q, k, place, place)
        keys = valid.expand(batch, n, cells).reshape(batch * n, 1, 1, cells)
        keys = keys | ~keys.any(-1, keepdim=True)  # rows of padding look anywhere; their results are dropped
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys).reshape(x.shape)

    def extra_repr(self) -> str:
        """Width of a cell and how the two are joined."""
        return f"{self.dim}, joined={self.joined!r}"


def _check(n: int, width: int) -> None:
    if n < 0 or width < 0:
        raise ValueError(f"n and width must be >= 0, got n={n}, width={width}")


def _width(band: Tensor) -> int:
    if band.shape[2] % 2 == 0:
        raise ValueError(f"band must have 2 width + 1 cells a row, an odd number, got {band.shape[2]}")
    return band.shape[2] // 2


def _columns(n: int, width: int, device: torch.device | str | None) -> Tensor:
    """j of every cell, [n, 2 width + 1]; beside [0, n) where there is no pair."""
    return torch.arange(n, device=device)[:, None] + torch.arange(-width, width + 1, device=device)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
