"""Sparse-linear attention: softmax over the few critical blocks, linear attention over the rest (SLA)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.kernels.linear import Feature, block_linear, channel_softmax
from regard.patterns.block_topk import BlockTopK
from regard.patterns.layout import BlockLayout
from regard.patterns.select import three_way
from regard.patterns.static import Full

__all__ = ["Linear", "SparseLinearAttention"]

Linear = Literal["marginal", "rest", "all"]


class SparseLinearAttention(nn.Module):
    """Attention of q, k and v in heads, in place of `scaled_dot_product_attention` (SLA, arXiv 2509.24006).

    For every query block, the pooled weights ``softmax(mean(Q_I) . mean(K_J) / sqrt(head_dim))`` sort the key blocks:
    the highest share ``critical`` of them (at least one), the lowest share ``negligible``, and the marginal ones
    between. Then

        O = softmax attention over the critical blocks + W block_linear(q, k, v, the marginal blocks),

    with ``regard.kernels.linear.block_linear`` and one matrix W ``[head_dim, head_dim]`` for all heads, which starts at
    0: untouched, this is sparse attention with weights that sum to 1, and the linear part is learned (in the paper by a
    few thousand steps of fine-tuning of the whole model). Gradients flow through both parts, not through the classes.
    Not for causal attention: a block is taken whole.

    Args:
        head_dim: of q, k and v.
        critical: share of the key blocks, 0.05 in the paper (our reading of its default).
        negligible: share of the key blocks, 0.1 in the paper (likewise); with ``linear="marginal"`` alone.
        linear: what the linear part reads: the "marginal" blocks (the paper), the "rest", all that are not critical, or
            "all" blocks (released variants).
        block: tokens of a query and of a key block, 64 in the paper.
        feature: phi of the linear part, softmax over the channels in the paper.
        eps: added to the denominator of the linear part.
        backend: of `attend`.

    Raises:
        ValueError: shares outside [0, 1] or together above 1, another name for ``linear``.
    """

    def __init__(
        self,
        head_dim: int,
        critical: float | int = 0.05,
        negligible: float | int = 0.1,
        linear: Linear = "marginal",
        *,
        block: int = 64,
        feature: Feature = channel_softmax,
        eps: float = 1e-5,
        backend: str = "auto",
    ):
        super().__init__()
        if linear not in get_args(Linear):
            raise ValueError(f"linear must be one of {get_args(Linear)}, got {linear!r}")
        if critical + negligible > 1:
            raise ValueError(f"critical and negligible must add to 1 at most, got {critical} and {negligible}")
        self.head_dim, self.linear, self.feature, self.eps, self.backend = head_dim, linear, feature, eps, backend
        self.share = three_way(critical, negligible if linear == "marginal" else 0)
        # keys centred: no choice changes, and the sums of their means lose less
        self.route = BlockTopK(block, select=self.share, centre_k=True)
        self.proj = nn.Linear(head_dim, head_dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(
        self,
        q: Float[Tensor, "batch heads q_len {self.head_dim}"],
        k: Float[Tensor, "batch kv_heads kv_len {self.head_dim}"],
        v: Float[Tensor, "batch kv_heads kv_len {self.head_dim}"],
    ) -> Float[Tensor, "batch heads q_len {self.head_dim}"]:
        """O of the formula; query head h reads kv head ``h // (heads / kv_heads)``."""
        sparse, rest = self.parts(q, k, v)
        return sparse + self.proj(rest)

    def parts(
        self,
        q: Float[Tensor, "batch heads q_len {self.head_dim}"],
        k: Float[Tensor, "batch kv_heads kv_len {self.head_dim}"],
        v: Float[Tensor, "batch kv_heads kv_len {self.head_dim}"],
    ) -> tuple[Float[Tensor, "batch heads q_len {self.head_dim}"], Float[Tensor, "batch heads q_len {self.head_dim}"]]:
        """The softmax part and the linear part, before W."""
        at, choose = (q.detach(), self.route.summarize(k.detach())), self.route.with_select
        critical = self.route.select(*at, q_start=0)
        sparse = attend(q, k, v, critical, q_start=0, backend=self.backend)
        assert isinstance(sparse, Tensor)  # no lse was asked for
        sizes = (q.shape[2], k.shape[2], self.route.block, 0)
        layout: BlockLayout
        if self.linear == "all":
            layout = Full().layout(*sizes)
        else:
            layout = choose(self.share.marginal).select(*at, q_start=0).layout(*sizes)
        return sparse, block_linear(q, k, v, layout, feature=self.feature, eps=self.eps)

    @torch.no_grad()
    def classes(
        self,
        q: Float[Tensor, "batch heads q_len {self.head_dim}"],
        k: Float[Tensor, "batch kv_heads kv_len {self.head_dim}"],
    ) -> Int[Tensor, "batch heads q_blocks kv_blocks"]:
        """The class of each pair of blocks: 1 critical, 0 marginal, -1 negligible (int8)."""
        return self.share.classes(self.route.scores(q, self.route.summarize(k)))
