"""How one attention call packs heads and batch, and the way to the plain form and back.

Models differ: keys come with `kv_heads`, repeated to `heads`, or once for all; transformers folds the heads of a
single query into the query axis (`[batch, kv_heads, groups, head_dim]`); others pass `[batch * heads, length, width]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.watch.context import Frame


@dataclass(frozen=True, eq=False)
class Layout:
    """The caller's tensors and how they map to `[batch, heads, length, width]`."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    packed: bool
    """One query a sample, its heads folded into the query axis."""
    repeated: bool
    """Keys came repeated to all heads."""
    own_q: Tensor
    own_k: Tensor
    own_v: Tensor
    own_mask: Tensor | None
    enable_gqa: bool
    out_lead: tuple[int, ...]
    """Leading axes of the caller's output."""

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def plain(self) -> bool:
        """Whether the caller's q already is `[batch, heads, q_len, head_dim]`."""
        return not self.packed and self.own_q.ndim == 4

    def open_q(self) -> Tensor:
        """The caller's q as `[batch, heads, q_len, head_dim]` (a view)."""
        q = self.own_q
        if not self.plain:
            q = q.reshape(-1, self.heads, self.q_len, q.shape[-1])
        return q if q.shape[:2] == (self.batch, self.heads) else q.expand(self.batch, self.heads, -1, -1)

    def open_kv(self, own: Tensor) -> Tensor:
        """The caller's k or v as `[batch, kv_heads, kv_len, width]` (a view)."""
        x = own
        if x.ndim != 4:
            heads = self.heads if self.repeated else self.kv_heads
            x = x.reshape(-1, heads, *x.shape[-2:])
        if self.repeated:
            x = x[:, :: self.groups]
        return x if x.shape[0] == self.batch else x.expand(self.batch, -1, -1, -1)

    def open_mask(self) -> Tensor | None:
        """The caller's mask, broadcastable to `[batch, heads, q_len, kv_len]`."""
        mask = self.own_mask
        if mask is None or (mask.ndim == 4 and self.plain):
            return mask
        if self.packed:
            if mask.ndim == 4 and mask.shape[1] > 1:
                return mask.reshape(mask.shape[0], self.heads, 1, mask.shape[-1])
            return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        lead = tuple(mask.shape[:-2])
        if math.prod(lead) == 1:
            return mask.reshape(1, 1, *mask.shape[-2:])
        if self.own_q.ndim == 4:
            return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        full = mask.expand(*self.out_lead, *mask.shape[-2:])
        return full.reshape(self.batch, self.heads, *mask.shape[-2:])

    def open_output(self, out: Tensor) -> Tensor:
        """The caller's output as `[batch, heads, q_len, v_dim]`."""
        return out if self.plain else out.reshape(self.batch, self.heads, self.q_len, out.shape[-1])

    def close_output(self, out: Tensor) -> Tensor:
        """Back from `open_output`."""
        if self.plain:
            return out
        if self.packed:
            return out.reshape(self.batch, self.kv_heads, self.groups, out.shape[-1])
        return out.reshape(*self.out_lead, self.q_len, out.shape[-1])

    def run(
        self,
        function: Callable[..., Tensor],
        *,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        mask: Tensor | None,
        same_mask: bool,
        **kwargs: Any,
    ) -> Tensor:
        """Call `function` with replacements, packed as the caller packed its own where that can be."""
        whole = any(x is not None and x.shape[1] == self.heads != self.kv_heads for x in (k, v))
        moved = q is not None and q.shape[2] != self.q_len
        if self.own_q.ndim != 4 or (self.packed and (whole or moved)):
            return self._run_plain(function, q, k, v, mask, **kwargs)
        own_q = self.own_q
        if q is not None:
            own_q = q.reshape(self.batch, self.kv_heads, self.groups, q.shape[-1]) if self.packed else q
        own_mask = self.own_mask if same_mask else mask
        if self.packed and not same_mask and mask is not None and mask.ndim == 4 and mask.shape[1] == self.heads:
            own_mask = mask.reshape(mask.shape[0], self.kv_heads, self.groups, mask.shape[-1])
        own_k, own_v = self._close_kv(k, self.own_k, whole), self._close_kv(v, self.own_v, whole)
        if self.enable_gqa:
            kwargs["enable_gqa"] = True
        return self.open_output(function(own_q, own_k, own_v, attn_mask=own_mask, **kwargs))

    def _close_kv(self, new: Tensor | None, own: Tensor, whole: bool) -> Tensor:
        """k or v in the caller's form: its own, or a new one repeated where the caller's was."""
        x = own if new is None else new
        if x.shape[1] == self.kv_heads < self.heads and (whole or (self.repeated and new is not None)):
            return x.repeat_interleave(self.groups, dim=1)
        return x

    def _run_plain(
        self,
        function: Callable[..., Tensor],
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Call `function` with four-dimensional tensors and all heads."""
        q = self.open_q() if q is None else q
        k = self.open_kv(self.own_k) if k is None else k
        v = self.open_kv(self.own_v) if v is None else v
        k, v = (x.repeat_interleave(self.heads // x.shape[1], dim=1) if x.shape[1] < self.heads else x for x in (k, v))
        return function(q, k, v, attn_mask=mask, **kwargs)


def layout_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    enable_gqa: bool,
    frame: Frame,
    batches: Callable[[], set[int]],
    trusted: dict[int, bool],
) -> Layout:
    """Find out how a call's tensors are packed. `trusted` remembers per module whether its keys really repeat.

    `batches` tells what the batch may be; it is asked only for tensors of three dimensions.
    """
    if q.ndim == 4:
        batch = k.shape[0] if q.shape[0] == 1 else q.shape[0]
        heads, q_len, kv_heads = q.shape[1], q.shape[2], k.shape[1]
        out_lead: tuple[int, ...] = (batch, max(heads, kv_heads))
        module = frame.module
        groups, declared = declared_groups(module), declared_heads(module)
        packed = groups > 1 and heads == kv_heads and q_len == groups
        packed = packed and (declared == heads * groups if declared else frame.query_length() == 1)
        repeated = not packed and groups > 1 and heads == kv_heads and heads % groups == 0
        if repeated:
            if id(module) not in trusted:
                trusted[id(module)] = repeats(k, groups) and repeats(v, groups)
            repeated = trusted[id(module)]
        if packed:
            heads, q_len = heads * groups, 1
        elif repeated:
            kv_heads = heads // groups
        heads = max(heads, kv_heads)
        return Layout(batch, heads, kv_heads, q_len, packed, repeated, q, k, v, mask, enable_gqa, out_lead)
    out_lead = tuple(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])) if not enable_gqa else tuple(q.shape[:-2])
    total = math.prod(out_lead)
    if q.ndim == 3:
        # [batch * heads, ...] when the model's batch divides it, else [heads, ...]
        batch = next((b for b in sorted(batches(), reverse=True) if b and total % b == 0), 1)
    else:
        batch = math.prod(out_lead[:-1])
    heads = total // batch
    kv_heads = max(1, math.prod(k.shape[:-2]) // batch)
    return Layout(batch, heads, kv_heads, q.shape[-2], False, False, q, k, v, mask, enable_gqa, out_lead)


def declared_heads(module: nn.Module) -> int:
    """Query heads as the module or its config states them; 0 when it does not."""
    config = getattr(module, "config", None)
    for holder, names in (
        (config, ("num_attention_heads", "n_head", "num_heads")),
        (module, ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")),
    ):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def declared_groups(module: nn.Module) -> int:
    """Query heads per key head as the module or its config states it; 1 when nothing does."""
    for name in ("num_key_value_groups", "n_rep", "num_queries_per_kv"):
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    config = getattr(module, "config", None)
    for holder in (module, config):
        for name in ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads"):
            value = getattr(holder, name, None)
            heads = declared_heads(module)
            if isinstance(value, int) and 0 < value <= heads and heads % value == 0:
                return heads // value
    return 1


def repeats(x: Tensor, groups: int) -> bool:
    """Whether heads of `[batch, heads, length, width]` come in equal runs of `groups`, by three positions."""
    if not x.shape[2]:
        return False
    rows = x[:, :, [0, x.shape[2] // 2, x.shape[2] - 1]].unflatten(1, (-1, groups))
    return bool(torch.equal(rows, rows[:, :, :1].expand_as(rows)))
