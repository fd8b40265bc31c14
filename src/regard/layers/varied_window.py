"""Windows whose place and size are predicted from what they hold (VSA, arXiv 2204.08446)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.kernels.attend import attend
from regard.layers.conv import ConvPosition
from regard.layers.maps import to_map
from regard.layers.refuse import need_heads, need_length, refuse
from regard.patterns import TileOrder

__all__ = ["VariedWindowAttention", "coverage"]


class VariedWindowAttention(nn.Module):
    """Window attention whose keys and values each window and head samples where it wants, at its own scale.

    Queries are those of the default windows of ``w x w`` tokens. Of each window the mean of x goes through a LeakyReLU
    and two linear maps to a scale s and an offset o along both axes, one pair a head. Key n of a window, which stands
    at ``c + d_n`` by default (c the window's centre), is read at

        p_n = c + d_n (1 + s) + o (side - 1) / (2 windows)        along each axis, in tokens,

    from the maps of k and of v, between four tokens bilinearly and zero outside the map; then plain attention of the
    window's queries over its w * w keys, with a relative bias indexed as in the default window. An offset of
    ``2 side / (side - 1)`` moves by one window; ``side`` and ``windows`` count the padding to whole windows. s and o
    start at 0: the layer starts as window attention (`layers.grid.windowed`).

    A key sampled outside the map has k = v = 0 and score 0 (plus its bias), and takes mass from the others: so the
    released model has it. ``mask_outside`` forbids those keys instead (points that lie beyond the outermost tokens); a
    window that samples nothing inside gives zeros.

    No existing key is selected, so this is no route. (Other work uses "VSA" for video sparse attention.)

    Args:
        dim: width.
        heads: must divide dim.
        shape: (height, width) of the map.
        window: tokens a side, 7 in the paper; at most the shorter side.
        position_kernel: side of the depthwise convolution added to x before attention, odd (7: our reading); None: no
            convolution. It reaches over the borders of windows.
        rel_bias: the relative bias ``[heads, 2 w - 1, 2 w - 1]``, which starts at 0.
        mask_outside: see above.
        bias: of the q, k, v projection.

    Raises:
        ValueError: heads that do not divide dim, a window that does not fit the map, an even kernel.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: Sequence[int],
        window: int = 7,
        *,
        position_kernel: int | None = 7,
        rel_bias: bool = True,
        mask_outside: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        need_heads(dim, heads)
        if len(shape) != 2:
            raise ValueError(f"shape must be (height, width), got {tuple(shape)}")
        if not 1 <= window <= min(shape):
            raise ValueError(f"window must be in 1..{min(shape)}, the shortest side of {tuple(shape)}, got {window}")
        self.heads, self.window, self.mask_outside = heads, window, mask_outside
        self.shape = (shape[0], shape[1])
        self.order = TileOrder(self.shape, window)
        self.position = None if position_kernel is None else ConvPosition(dim, self.shape, position_kernel)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim)
        self.scale, self.offset = nn.Linear(dim, 2 * heads), nn.Linear(dim, 2 * heads)
        for p in (*self.scale.parameters(), *self.offset.parameters()):
            nn.init.zeros_(p)
        self.rel_bias = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1)) if rel_bias else None

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of the map's tokens, row-major; ``context``, ``pattern`` and ``state`` are refused."""
        refuse(self, context=context, pattern=pattern, state=state)
        need_length(self, x.shape[1], self.shape)
        x = x if self.position is None else self.position(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        points = self._points(x)
        k, v = self._sampled(torch.cat([k, v], -1), points).chunk(2, -1)
        windows, slots = math.prod(self.order.tiles), self.window**2
        q = self.order.apply(q).unflatten(2, (windows, slots)).transpose(1, 2)  # [batch, windows, heads, slots, d]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        y = attend(q, k, v, bias=self._bias(points, x.dtype), q_start=0)
        assert isinstance(y, Tensor)  # no lse was asked for
        y = y.unflatten(0, (len(x), windows)).transpose(2, 3).flatten(3)  # [batch, windows, slots, dim]
        return self.proj(self.order.undo(y.flatten(1, 2)))

    def points(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch heads rows columns w w yx"]:
        """Where each head of each window reads its keys for this x, in tokens from the first one: (y, x).

        Default windows hold whole numbers; points may lie outside the map.
        """
        need_length(self, x.shape[1], self.shape)
        return self._points(x if self.position is None else self.position(x))

    def _points(self, x: Tensor) -> Tensor:
        w, tiles = self.window, self.order.tiles
        work = torch.promote_types(x.dtype, torch.float32)  # eight bits cannot tell the tokens of a wide map apart
        sides = [n * w for n in tiles]
        (below, right) = (s - n for s, n in zip(sides, self.shape, strict=True))
        means = F.avg_pool2d(F.pad(to_map(x, self.shape), (0, right, 0, below)), w)
        means = F.leaky_relu(means).permute(0, 2, 3, 1)

        def predicted(of: nn.Linear) -> Tensor:  # [batch, rows, columns, 2 heads], (x, y) as released, to (y, x)
            found = of(means).to(work).unflatten(-1, (self.heads, 2)).flip(-1)
            return found.permute(0, 3, 1, 2, 4)[:, :, :, :, None, None]

        def grid(*axes: Tensor) -> Tensor:
            return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).to(x.device, work)

        step = grid(*(torch.arange(w) - (w - 1) / 2,) * 2)
        centre = grid(*(torch.arange(n) * w + (w - 1) / 2 for n in tiles))[:, :, None, None]
        reach = x.new_tensor([(s - 1) / (2 * n) for s, n in zip(sides, tiles, strict=True)], dtype=work)
        return centre + step * (1 + predicted(self.scale)) + reach * predicted(self.offset)

    def _sampled(self, maps: Float[Tensor, "batch heads length d"], points: Tensor) -> Tensor:
        """The maps at the points, ``[batch, windows, heads, w * w, d]``; zero outside."""
        batch, heads = maps.shape[:2]
        size = points.new_tensor(self.shape)
        # corners not aligned: the same tokens as with, and an axis of one token divides by nothing
        grid = ((2 * points + 1) / size - 1).flip(-1).flatten(0, 1).flatten(1, 2).flatten(2, 3)
        image = maps.flatten(0, 1).transpose(1, 2).unflatten(2, self.shape).to(points.dtype)
        with torch.autocast(maps.device.type, enabled=False):
            found = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return found.to(maps.dtype).unflatten(0, (batch, heads)).permute(0, 3, 1, 4, 2)

    def _bias(self, points: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, ``[batch * windows or 1, heads, w * w or 1, w * w]``."""
        bias = None
        if self.rel_bias is not None:
            at = torch.arange(self.window**2)
            row, column = at // self.window, at % self.window
            down, along = (c[:, None] - c[None] + self.window - 1 for c in (row, column))
            bias = self.rel_bias[:, down, along][None].to(dtype)
        if not self.mask_outside:
            return bias
        outside = ~self._inside(points).flatten(4).flatten(2, 3).transpose(1, 2).flatten(0, 1)[:, :, None]
        if bias is None:
            bias = torch.zeros(1, 1, 1, self.window**2, dtype=dtype, device=points.device)
        return bias.expand(len(outside), self.heads, -1, -1).masked_fill(outside, -math.inf)

    def _inside(self, points: Tensor) -> Bool[Tensor, "batch heads rows columns w w"]:
        last = points.new_tensor(self.shape) - 1
        slack = 1e-4  # of a token: the sums that place a key at the border are rounded
        return ((points >= -slack) & (points <= last + slack)).all(-1)


@torch.no_grad()
def coverage(
    layer: VariedWindowAttention, x: Float[Tensor, "batch length dim"]
) -> Float[Tensor, "batch heads rows columns sides"]:
    """The box that each head of each window samples: (top, left, bottom, right) in tokens, the outermost points.

    A default window of w tokens from row r is ``(r, ..., r + w - 1, ...)``; boxes may reach outside the map.
    """
    points = layer.points(x).flatten(4, 5)
    return torch.cat([points.amin(4), points.amax(4)], -1)
