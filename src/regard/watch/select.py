"""Reading and writing the part of a tensor that a site names: samples, heads, tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """Part of a tensor [batch, length, ...] or, with `has_heads`, [batch, heads, length, ...].

    Args:
        has_heads: whether dimension 1 counts heads.
        batch: samples, None for all.
        heads: heads, None for all.
        columns: for each selected sample the columns of the wanted tokens, None for all.
        active: whether that token is there; those that are not are read as what lies there and never written.
        drop_head, drop_column: an int was asked for, so the dimension goes.
    """

    has_heads: bool
    batch: slice | None = None
    heads: tuple[int, ...] | None = None
    columns: Int[Tensor, "rows picks"] | None = None
    active: Bool[Tensor, "rows picks"] | None = None
    drop_head: bool = False
    drop_column: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.batch is None and self.heads is None and self.columns is None

    def pick(self, x: Tensor) -> Tensor:
        """The selected part, with dropped dimensions."""
        y = self._full(x)
        if self.drop_column:
            y = y.squeeze(2 if self.has_heads else 1)
        return y.squeeze(1) if self.drop_head else y

    def put(self, x: Tensor, y: Tensor) -> Tensor:
        """x with the selected part replaced by y (in the shape `pick` gives), out of place."""
        if self.drop_head:
            y = y.unsqueeze(1)
        if self.drop_column:
            y = y.unsqueeze(2 if self.has_heads else 1)
        return self.put_full(x, y)

    def put_full(self, x: Tensor, y: Tensor) -> Tensor:
        """Like `put`, for a y that has all dimensions."""
        if self.whole:
            return y
        if self.active is not None and not bool(self.active.all()):
            keep = self.active[:, None] if self.has_heads else self.active
            y = torch.where(keep.reshape(*keep.shape, *[1] * (y.ndim - keep.ndim)), y, self._full(x))
        out = x.clone()
        out[self._index(x)] = y
        return out

    def _full(self, x: Tensor) -> Tensor:
        return x if self.whole else x[self._index(x)]

    def _index(self, x: Tensor) -> tuple:
        samples = torch.arange(len(x), device=x.device)
        if self.batch is not None:
            samples = samples[self.batch]
        if self.heads is None and self.columns is None:
            return (samples,)
        if not self.has_heads:
            return samples[:, None], self.columns
        heads = torch.arange(x.shape[1], device=x.device)
        if self.heads is not None:
            heads = torch.tensor(self.heads, device=x.device)
        if self.columns is None:
            return samples[:, None], heads[None]
        return samples[:, None, None], heads[None, :, None], self.columns[:, None]
