"""Superlinear multi-step attention: search for spans with one query, attend inside them with another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.kernels.combine import gate, merge
from regard.kernels.slots import attend_slots
from regard.layers.multihead import MultiHead
from regard.layers.position import Position
from regard.patterns import Causal, Pattern, Routed
from regard.patterns.superlinear import Superlinear

__all__ = ["SuperlinearAttention"]

Distill = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class SuperlinearAttention(MultiHead):
    """Attention to a window and to k spans found by search, ``O = sum_j softmax_j(score) O_j`` (arXiv 2601.18401).

    ``O_j`` is the attention of the second query over the window and span j together; the scores are those of the first
    query at the spans' anchors, scaled by ``1 / sqrt(head_dim)`` (the authors' code leaves them unscaled). A query
    without a span has its window. The search learns through the gate alone: keys and values are shared, and a layer
    below must gather what lies around a position into it, or anchors say nothing of their spans. Overlapping spans
    count twice in the gate, by design.

    ``layer.aux`` holds ``span_mass`` after a forward pass in training, where ``distill`` is given.

    Args:
        dim, heads, kv_heads: as in `MultiHead`.
        route: `Superlinear`, the geometry and k.
        position: as in `MultiHead`; both queries are rotated.
        distill: a loss of (search scores of all anchors, starts, stops, q, k) that teaches the search directly
            (`regard.train.objectives.span_mass`); q and k are given detached.
        backend: of `attend`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        route: Superlinear | None = None,
        *,
        kv_heads: int | None = None,
        position: Position | None = None,
        distill: Distill | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads, position=position, backend=backend)
        self.route = Superlinear() if route is None else route
        self.search_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.distill = distill
        self.aux: dict[str, Float[Tensor, ""]] = {}
        self.routed: Routed | None = None
        """The last decision."""

    def forward(
        self, x: Float[Tensor, "batch length {self.dim}"], **how: Any
    ) -> Float[Tensor, "batch length {self.dim}"]:
        """Attend, as `MultiHead`.

        Raises:
            ValueError: as `MultiHead`, and for a pattern other than Causal().
        """
        pattern: Pattern | None = how.get("pattern")
        if pattern is not None and pattern != Causal():
            raise ValueError(f"pattern must be None or Causal(), which superlinear attention is, got {pattern}")
        return super().forward(x, **how | {"pattern": Causal()})

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern | None,
        start: int,
        bias: Tensor | None,
        x: Tensor,
        pos_q: Tensor,
    ) -> Any:
        if bias is not None:
            raise ValueError("position must add nothing to the scores: spans are attended to without a bias")
        search = self.search_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.position is not None:
            search, _ = self.position.rotate(search, k[:, :, :0], pos_q, pos_q[:0])
        routed = self.routed = self.route.select(search, self.route.summarize(k), q_start=start)
        window = attend(q, k, v, self.route.window & Causal(), q_start=start, return_lse=True, backend=self.backend)
        self.aux = {}
        if self.training and self.distill is not None:
            steps = self.route.steps(start + q.shape[2])
            at = torch.arange(start, start + q.shape[2], device=q.device)
            scores = self.route.scores(search, k, start, steps)
            self.aux["span_mass"] = self.distill(scores, *self.route.spans(at, steps), q.detach(), k.detach())
        assert routed.score is not None
        if not routed.score.shape[3]:
            return window[0]
        outs, lses = attend_slots(q, k, v, routed, backend=self.backend)
        joined = [merge([window[0], out], [window[1], lse])[0] for out, lse in zip(outs, lses, strict=True)]
        some = (routed.score > -torch.inf).any(-1, keepdim=True)
        shares = torch.where(some, routed.score, 0).softmax(-1) * some
        alone = (~some[..., 0]).to(q.dtype)
        return gate([window[0], *joined], [alone, *shares.unbind(-1)])
