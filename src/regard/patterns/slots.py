"""A routed pattern in the order that it was decided in: slots in place of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.pattern import Pattern

if TYPE_CHECKING:
    from regard.patterns.decided import Routed

__all__ = ["OnSlots", "in_slots", "refined"]


@dataclass(frozen=True, eq=False)
class OnSlots(Pattern):
    """``part`` of the tokens that slots hold; padding meets nothing. Equal if of the same tensors.

    ``q_tokens``, ``kv_tokens``: ``[samples|1, decisions|1, slots]``, queries counted from ``q_start`` and keys, -1 for
    padding; decision r is that of heads ``[r n, (r + 1) n)`` of ``q_heads``.
    """

    part: Pattern | None
    q_tokens: Tensor
    kv_tokens: Tensor
    q_start: int
    q_heads: int | None
    head: int | None = None
    sample: int | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OnSlots):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return id(self.q_tokens), id(self.kv_tokens), self.q_start, self.part, self.q_heads, self.head, self.sample

    @property
    def decisions(self) -> int:
        """Orders a sample."""
        return max(self.q_tokens.shape[1], self.kv_tokens.shape[1])

    @property
    def heads(self) -> int | None:
        """Query heads, where their orders differ or the part tells them apart."""
        if self.head is not None:
            return None
        own = self.q_heads if self.decisions > 1 else None
        return own or (None if self.part is None else self.part.heads)

    @property
    def samples(self) -> int | None:
        """Samples, where their orders differ or the part tells them apart."""
        if self.sample is not None:
            return None
        own = max(self.q_tokens.shape[0], self.kv_tokens.shape[0])
        return own if own > 1 else None if self.part is None else self.part.samples

    @property
    def closed_form(self) -> bool:
        """No."""
        return False

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """Of one head of one sample."""
        if self.heads is None and self.samples is None:
            return self
        return replace(self, head=head if self.heads else self.head, sample=sample if self.samples else self.sample)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``part.allows(token of q, token of k)`` where both slots hold one."""
        h = torch.tensor(self.head, device=q_idx.device) if self.head is not None else head
        b = torch.tensor(self.sample, device=q_idx.device) if self.sample is not None else batch
        q, k = self._token(self.q_tokens, q_idx, h, b), self._token(self.kv_tokens, kv_idx, h, b)
        there = (q >= 0) & (k >= 0)
        if self.part is None:
            return there
        return self.part.allows(q.clamp(min=0) + self.q_start, k.clamp(min=0), h, b) & there

    def _token(self, tokens: Tensor, idx: Tensor, head: Tensor | None, batch: Tensor | None) -> Tensor:
        inside = (idx >= 0) & (idx < tokens.shape[2])
        zero = torch.zeros((), dtype=torch.long, device=idx.device)
        d = b = zero
        if tokens.shape[1] > 1:
            if head is None:
                raise ValueError("head must be given: orders differ between heads")
            d = head // max((self.q_heads or self.decisions) // tokens.shape[1], 1)
        if tokens.shape[0] > 1:
            if batch is None:
                raise ValueError("batch must be given: orders differ between samples")
            b = batch
        at = idx.clamp(0, max(tokens.shape[2] - 1, 0)).long()
        return torch.where(inside, tokens.to(idx.device)[b, d, at], -1)


def in_slots(routed: Routed) -> Routed:
    """The same decision over slots: query i and key j of it are the tokens ``q_order[..., i]``, ``kv_order[..., j]``.

    Give attention ``q``, ``k`` and ``v`` in these orders and put the outputs back.
    """
    r = routed
    if not r.ordered:
        return r
    orders = zip((r.q_order, r.kv_order), (r.q_len, r.kv_len), strict=True)
    q, k = (torch.arange(n, device=r.device)[None, None] if order is None else order for order, n in orders)
    heads = r.q_heads or (r.decisions if r.decisions > 1 else None)
    within = None
    if r.within is not None or bool((k < 0).any()) or bool((q < 0).any()):
        within = OnSlots(r.within, q, k, r.q_start, heads)
    keep = None if r.keep is None else OnSlots(r.keep, q, k, r.q_start, heads)
    return replace(
        r, q_len=q.shape[2], kv_len=k.shape[2], q_start=0, q_order=None, kv_order=None, repeats="error", within=within,
        keep=keep,
    )  # fmt: skip


def refined(routed: Routed, block: tuple[int, int]) -> Routed:
    """The same decision in smaller blocks, which divide its own. Of tokens in order; scores are left out."""
    r = routed
    assert r.index is not None
    assert r.count is not None
    rows, columns = r.block[0] // block[0], r.block[1] // block[1]
    n_rows, n_columns = -(-r.q_len // block[0]), -(-r.kv_len // block[1])
    index = r.index[..., None] * columns + torch.arange(columns, device=r.device, dtype=torch.int32)
    index = torch.where((r.index[..., None] >= 0) & (index < n_columns), index, -1).flatten(3)
    index = index.repeat_interleave(rows, 2)[:, :, :n_rows]
    return replace(r, block=block, index=index, count=(index >= 0).sum(-1, dtype=torch.int32), score=None)
