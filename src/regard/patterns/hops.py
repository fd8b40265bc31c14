"""Windows over a graph that is told in text: node tokens see nodes a few hops away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Rows
from regard.patterns.static import Allowed, Causal, Index, StaticPattern, need_bool, need_int

__all__ = ["HopWindow"]


class HopWindow(StaticPattern):
    """Node tokens see node tokens at most K hops away, all else is causal.

    A node query and a node key: ``hops <= K`` (and ``k <= q`` unless ``bidirectional``); every other pair ``k <= q``.
    K = 0: a node sees no other node. Graph windows (arXiv 2505.02130).

    Args:
        positions: the position of each node token, strictly ascending, ``[nodes]``. A node mentioned twice is two
            tokens.
        hops: number of links between two nodes, ``[nodes, nodes]``, 0 on the diagonal; negative where no path leads.
        K: hops that are seen.
        bidirectional: whether a node also sees nodes that come later in the text.
    """

    def __init__(
        self,
        positions: Sequence[int] | Int[Tensor, "nodes"],
        hops: Sequence[Sequence[int]] | Int[Tensor, "nodes nodes"],
        K: int,
        bidirectional: bool = True,
    ):
        need_int("K", K, 0)
        need_bool("bidirectional", bidirectional)
        where, table = torch.as_tensor(positions).detach().cpu(), torch.as_tensor(hops).detach().cpu()
        if where.ndim != 1 or where.is_floating_point() or (where[:1] < 0).any() or (where[1:] <= where[:-1]).any():
            raise ValueError(f"positions must be integers >= 0, strictly ascending, got {positions!r}")
        n = len(where)
        if table.shape != (n, n) or table.is_floating_point():
            raise ValueError(f"hops must be integers [{n}, {n}], one for each pair of positions, got {table.shape}")
        if (table.diagonal() != 0).any():
            raise ValueError(f"hops must be 0 on the diagonal, got {table.diagonal().tolist()}")
        self.positions, self.K, self.bidirectional = where.long(), K, bidirectional
        self.hops = table.long()
        self._value = (K, bidirectional, n, self.positions.numpy().tobytes(), self.hops.contiguous().numpy().tobytes())
        self._hash = hash(self._value)

    @cached_property
    def linked(self) -> Tensor:
        """Whether node query i sees node key j, ``[nodes, nodes]``."""
        near = (self.hops >= 0) & (self.hops <= self.K)
        return near if self.bidirectional else near.tril()

    @cached_property
    def _node(self) -> Tensor:
        """The node at each position up to the last node, -1 for text; one more position that is text."""
        last = int(self.positions[-1]) if len(self.positions) else -1
        node = torch.full((last + 2,), -1)
        node[self.positions] = torch.arange(len(self.positions))
        return node

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HopWindow) and self._value == other._value

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"HopWindow({len(self.positions)} nodes, K={self.K}, bidirectional={self.bidirectional})"

    def _node_at(self, idx: Tensor) -> Tensor:
        node = self._node.to(idx.device)
        return torch.where(idx < 0, -1, node[idx.clamp(0, len(node) - 1).long()])

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """Between nodes by hops, else ``k <= q``."""
        causal = kv_idx <= q_idx
        if not len(self.positions):
            return causal
        q, k = self._node_at(q_idx), self._node_at(kv_idx)
        near = self.linked.to(q.device)[q.clamp(min=0), k.clamp(min=0)]
        return torch.where((q >= 0) & (k >= 0), near, causal)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Before and after each node token."""
        edges = torch.cat([self.positions, self.positions + 1]).unique()
        return edges[(edges > a) & (edges < b)]

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """Text: as `Causal`. A node: the text before it, and the nodes that it sees."""
        node = self._node_at(q0)
        here = (node >= 0).nonzero().flatten()
        text = Causal().rows(q0, q1, kv_len)
        if not len(here):
            return text
        at = self.positions.to(q0.device)
        before = torch.cat([at.new_zeros(1), at + 1])  # text lies between one node's end and the next node
        after = torch.minimum(torch.cat([at, at.new_tensor([kv_len])]), q0[here, None] + 1)
        gaps = torch.stack([before.expand_as(after), after.maximum(before)], -1)
        seen = self.linked.to(q0.device)[node[here]]
        nodes = torch.stack([at.expand_as(seen), at + seen], -1)
        both = gaps.new_empty(len(here), 2 * len(at) + 1, 2)
        both[:, 0::2], both[:, 1::2] = gaps, nodes
        both = iv.clip(both, kv_len)
        return Rows(_replaced(text.any, here, both), _replaced(text.all, here, both))


def _replaced(keys: Tensor, here: Tensor, by: Tensor) -> Tensor:
    """Some rows replaced by others with another number of intervals."""
    out = keys.new_zeros(len(keys), max(keys.shape[1], by.shape[1]), 2)
    out[:, : keys.shape[1]] = keys
    out[here] = 0
    out[here, : by.shape[1]] = by
    return out
