"""Windows that a model folds into the batch, unfolded: the same attention with the tokens' true positions.

Swin, MaxViT and their kin cut the feature map into windows and attend in a batch of them. What the seam catches are
many small dense calls whose positions are places in a window. A `Fold` says which token stands where; unfolded, the
call is one over whole images, whose pairs of different windows are forbidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regard.patterns import Blocks, Congruent, Grid, Order, Pattern, Segments

if TYPE_CHECKING:
    from regard.watch.call import Call

__all__ = ["Fold", "Listed", "known_fold", "strided", "windows"]


@dataclass(frozen=True, eq=False)
class Listed(Order):
    """An order told token by token."""

    tokens: Int[Tensor, "n"]

    @property
    def forward(self) -> Int[Tensor, "n"]:
        """The original index at each position."""
        return self.tokens

    @property
    def n(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Fold:
    """``(sample * windows + window, place) <-> (sample, token)``.

    Args:
        grid: which tokens meet, as the model means it; bound to the shape of the map.
        order: the token at each position, windows one after another. Without padding: a model that pads lets the
            padding take part in attention, which no order of the tokens can tell.

    Raises:
        ValueError: for an order with padding.
    """

    grid: Pattern
    order: Order

    def __post_init__(self) -> None:
        if self.order.n_padded != self.order.n:
            raise ValueError(
                f"order must have no padding, got {self.order.n_padded - self.order.n} padded positions beside "
                f"{self.order.n} tokens: padded windows attend to what is no token"
            )

    def unfold(self, call: Call) -> Call:
        """The call over whole samples. Its mask has ``[tokens, tokens]`` numbers a head.

        Raises:
            ValueError: if the call's windows are not those of the order, or the grid lets windows meet.
        """
        folded, heads, size, _ = call.q.shape
        n = self.order.n
        if call.k.shape[2] != size or n % size or folded % (n // size):
            raise ValueError(
                f"the fold is one of {n} tokens, and the layer attends over {folded} windows of {size} x "
                f"{call.k.shape[2]}"
            )
        tokens = self.order.forward.view(-1, size).to(call.q.device)
        self._check_windows(tokens)
        q, k, v = (self._whole(x) for x in (call.q, call.k, call.v))
        mask = self._mask(call, tokens)
        layout = replace(
            call.layout,
            batch=q.shape[0],
            heads=heads,
            kv_heads=k.shape[1],
            q_len=n,
            packed=False,
            repeated=False,
            own_q=q,
            own_k=k,
            own_v=v,
            own_mask=mask,
            out_lead=(q.shape[0], heads),
        )
        return replace(call, q=q, k=k, v=v, mask=mask, is_causal=False, layout=layout)

    def _whole(self, x: Tensor) -> Tensor:
        """``[samples * windows, heads, size, width]`` as ``[samples, heads, tokens, width]``."""
        count = self.order.n // x.shape[2]
        return self.order.undo(x.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3))

    def _mask(self, call: Call, tokens: Tensor) -> Tensor:
        count, size = tokens.shape
        own = call.mask
        if own is None:
            own = torch.zeros(1, 1, 1, 1, dtype=call.q.dtype, device=call.q.device)
        elif own.dtype == torch.bool:
            own = torch.zeros(own.shape, dtype=call.q.dtype, device=own.device).masked_fill_(~own, -torch.inf)
        if call.is_causal:
            own = own.masked_fill(~torch.ones(size, size, dtype=torch.bool, device=own.device).tril(), -torch.inf)
        own = own.expand(*own.shape[:2], size, size)
        own = own.unflatten(0, (-1, count)) if len(own) > 1 else own[:, None].expand(-1, count, -1, -1, -1)
        if len(own) > 1 and torch.equal(own, own[:1].expand_as(own)):
            own = own[:1]
        n = self.order.n
        out = torch.full((len(own), own.shape[2], n, n), -torch.inf, dtype=own.dtype, device=own.device)
        out[:, :, tokens[:, :, None], tokens[:, None, :]] = own.transpose(1, 2)
        return out

    def _check_windows(self, tokens: Tensor) -> None:
        window = torch.empty(self.order.n, dtype=torch.long)
        window[tokens.cpu()] = torch.arange(len(tokens))[:, None].expand_as(tokens)
        i = torch.arange(self.order.n)
        self.grid.fits(self.order.n, self.order.n, 0)
        for rows in i.split(max(1, (1 << 22) // self.order.n)):
            met = self.grid.allows(rows[:, None], i[None]) & (window[rows][:, None] != window[None])
            if bool(met.any()):
                a, b = met.nonzero()[0].tolist()
                raise ValueError(f"grid lets tokens {int(rows[a])} and {b} meet, which are in different windows")


@lru_cache(maxsize=64)
def windows(shape: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Fold:
    """Windows of a map ``[height, width]`` rolled by ``-shift``; what the roll brings together does not meet.

    Raises:
        ValueError: where the window does not divide the map.
    """
    _divide(shape, window)
    index = torch.arange(shape[0] * shape[1]).view(shape).roll((-shift[0], -shift[1]), (0, 1))
    tokens = index.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten()
    axes = []
    for n, w, s in zip(shape, window, shift, strict=True):
        axes.append(Segments.from_bounds(sorted({0, *range(s, n, w), n})) if s else Blocks(w))
    return Fold(Grid(axes, shape), Listed(tokens))


@lru_cache(maxsize=64)
def strided(shape: tuple[int, int], groups: tuple[int, int]) -> Fold:
    """Grid attention: a window is ``groups`` tokens spread evenly over the map ``[height, width]``.

    Raises:
        ValueError: where the groups do not divide the map.
    """
    _divide(shape, groups)
    steps = (shape[0] // groups[0], shape[1] // groups[1])
    index = torch.arange(shape[0] * shape[1]).view(groups[0], steps[0], groups[1], steps[1])
    return Fold(Grid([Congruent(s) for s in steps], shape), Listed(index.permute(1, 3, 0, 2).flatten()))


def _divide(shape: tuple[int, int], window: tuple[int, int]) -> None:
    if shape[0] % window[0] or shape[1] % window[1]:
        raise ValueError(
            f"windows of {window[0]} x {window[1]} do not divide the map of {shape[0]} x {shape[1]}: a model pads it, "
            "and padding takes part in attention"
        )


def _swin(block: nn.Module, shape: tuple[int, int]) -> Fold:
    return windows(shape, _pair(block.window_size), _pair(block.shift_size))


def _maxvit(block: nn.Module, shape: tuple[int, int]) -> Fold:
    return (windows if block.partition_block else strided)(shape, _pair(block.partition_size))


def _pair(x: Any) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


_KNOWN: dict[str, Callable[[nn.Module, tuple[int, int]], Fold]] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _swin,
    "timm.models.maxxvit.PartitionAttentionCl": _maxvit,
}
"""Modules around the attention layer that fold a map ``[batch, height, width, channels]``, by class."""


def known_fold(call: Call) -> Fold | None:
    """The fold of a model that is known to fold; None for any other, and where its windows do not divide the map."""
    for frame in reversed(call.frames):
        kind = type(frame.module)
        build = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
        if build is not None and frame.hidden is not None and frame.hidden.ndim == 4:
            try:
                return build(frame.module, (frame.hidden.shape[1], frame.hidden.shape[2]))
            except ValueError:
                return None
    return None
