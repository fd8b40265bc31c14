"""Attention along one axis of a grid at a time (arXiv 1912.12180): ``O(N (H + W))`` for a row and a column layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.layers.grid import GridAttention
from regard.layers.refuse import refuse
from regard.patterns import Causal, Full, Grid, Same


class AxialState:
    """Keys and values of the steps taken so far, ``[batch, heads, lines, steps, head_dim]``."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Steps taken."""
        return 0 if self.keys is None else self.keys.shape[3]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take one more step; returns all keys and values."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            if keys.shape[:3] != self.keys.shape[:3]:
                raise ValueError(
                    f"x must go on with the state's batch, heads and lines {tuple(self.keys.shape[:3])}, "
                    f"got {tuple(keys.shape[:3])}"
                )
            self.keys = torch.cat([self.keys, keys], 3)
            self.values = torch.cat([self.values, values], 3)
        return self.keys, self.values


class AxialAttention(GridAttention):
    """Multi-head attention of tokens that differ in one coordinate only; the others are a batch.

    In 2-D, ``axis=0`` attends along columns (over rows of one column) and ``axis=1`` along rows. Causal layers take a
    ``state`` (`new_state`) and then one step along the axis at a time: x holds the tokens of that step, one for each
    line, a line being the tokens that differ in the axis alone. The numbers are those of the whole grid at once.

    Args:
        dim: width.
        heads: must divide dim.
        shape: sides of the grid.
        axis: the one attended along, 0..len(shape) - 1.
        causal: only coordinates up to the token's own.
        rel_bias: a learned bias ``[heads, 2 n - 1]`` by difference of coordinates; a stepping layer has none.
        bias: of the q, k, v projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: Sequence[int],
        axis: int,
        causal: bool = False,
        rel_bias: bool = False,
        bias: bool = True,
    ):
        if not 0 <= axis < len(shape):
            raise ValueError(f"axis must be in 0..{len(shape) - 1} for the shape {tuple(shape)}, got {axis}")
        along = Causal() if causal else Full()
        axes = tuple(along if d == axis else Same() for d in range(len(shape)))
        super().__init__(dim, heads, Grid(axes, tuple(shape)), rel_bias, bias)
        self.axis, self.causal, self.steps = axis, causal, shape[axis]

    def new_state(self) -> AxialState:
        """An empty state; each batch of lines needs its own.

        Raises:
            ValueError: the layer is not causal, or has a relative bias.
        """
        if not self.causal or self.rel_bias is not None:
            raise ValueError(
                "state needs causal=True and rel_bias=False, got "
                f"causal={self.causal}, rel_bias={self.rel_bias is not None}"
            )
        return AxialState()

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """The whole grid, or with ``state`` the next step of as many lines as x has tokens."""
        if state is None:
            return super().forward(x, context=context, pattern=pattern)
        refuse(self, context=context, pattern=pattern)
        if not self.causal or self.rel_bias is not None:
            raise ValueError("state must be None: the layer is not causal, or has a relative bias")
        if not isinstance(state, AxialState):
            raise TypeError(f"state must come from new_state() of this layer, got {type(state).__name__}")
        if state.length >= self.steps:
            raise ValueError(f"state has taken all {self.steps} steps of axis {self.axis}; start a new one")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unsqueeze(4)
        keys, values = state.append(k, v)
        q, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (q, keys, values))  # lines are a batch
        y = scaled_dot_product_attention(q, keys, values)
        return self.proj(y.flatten(1).unflatten(0, (x.shape[0], x.shape[1])))


__all__ = ["AxialAttention", "AxialState"]
