"""The route of block-sparse attention: blocks chosen by the scores of their means."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regard.patterns.candidates import candidates, last_keys
from regard.patterns.decided import Routed, both
from regard.patterns.layout import block_size
from regard.patterns.order import Order
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.routed import Route, Summary
from regard.patterns.select import Select, pool_blocks

__all__ = ["BlockTopK", "pooled_scores", "row_scores"]


@dataclass(frozen=True, init=False)
class BlockTopK(Route):
    """Score of a pair of blocks: ``scale * mean(q) . mean(k)``; the select takes key blocks for each query block.

    The mean of a key block is over its keys up to the last one that the query block may see: the block in which a
    causal query stands is scored by what has been, not by what will be. So with one query in a row a prompt decides as
    decoding would, token by token; longer rows share the mean of their queries.

    The route of BiFormer (arXiv 2303.08810), SLA (2509.24006) and Rectified SpaAttn (2511.19835), with other arguments.

    Args:
        block: tokens in a block, or ``(query block, key block)``.
        order: blocks are of the tokens in this order; the call must then be the whole sequence, and cannot be appended.
        select: of `regard.patterns.select`, as ``topk(8)``.
        keep: joined to what is selected, by position, as ``Sinks(4) | Window(64)``; uses up no budget.
        heads: "each" query head decides; "kv": the mean over the query heads of a kv head; "all": the sum over all
            heads, which is the dot product of the concatenated heads.
        centre_k: take the mean of all keys off first. It moves all scores of a row alike: no choice changes, sums of
            large numbers lose less.
        within: what may meet at all; see `Route`.
        scale: None: ``1 / sqrt(head_dim)``. It matters to ``mass`` and ``above`` alone.
    """

    block: tuple[int, int]
    order: Order | None
    rule: Select
    keep: Pattern | None
    heads: Literal["each", "kv", "all"]
    centre_k: bool
    within: Pattern | None
    scale: float | int | None

    def __init__(
        self,
        block: int | tuple[int, int],
        *,
        select: Select,
        order: Order | None = None,
        keep: Pattern | None = None,
        heads: Literal["each", "kv", "all"] = "each",
        centre_k: bool = False,
        within: Pattern | None = None,
        scale: float | int | None = None,
    ) -> None:
        if not isinstance(select, Select):
            raise ValueError(f"select must be one of regard.patterns.select, as topk(8), got {select!r}")
        if heads not in ("each", "kv", "all"):
            raise ValueError(f'heads must be "each", "kv" or "all", got {heads!r}')
        values = {"block": block_size(block), "order": order, "rule": select, "keep": keep, "heads": heads,
                  "centre_k": centre_k, "within": within, "scale": scale}  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def appends(self) -> bool:
        """Not with an order."""
        return self.order is None

    def with_select(self, select: Select) -> BlockTopK:
        """The same route with another select."""
        narrowed = self._with("rule", select)
        assert isinstance(narrowed, BlockTopK)
        return narrowed

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """``mean``: of each whole block; ``tail``: keys of the unfinished one; ``recent``: those of every block that
        holds one of these k. With an order, means of all.
        """
        if self.order is not None:
            if past is not None:
                raise ValueError("a route with an order decides on the whole sequence: past= cannot be appended to")
            if k.shape[2] != self.order.n:
                raise ValueError(f"order is of {self.order.n} tokens, got {k.shape[2]} keys")
            means = pool_blocks(k, self.block[1], order=self.order)
            return Summary(k.shape[2], {"mean": means, "tail": k[:, :, :0], "recent": k[:, :, :0]})
        size = self.block[1]
        old = 0 if past is None else past.length
        keys = k if past is None else torch.cat([past["tail"].to(k.dtype), k], 2)
        whole = keys.shape[2] // size * size
        means = pool_blocks(keys[:, :, :whole], size)
        if past is not None:
            means = torch.cat([past["mean"], means], 2)
        return Summary(old + k.shape[2], {"mean": means, "tail": keys[:, :, whole:].clone(), "recent": keys})

    def settle(self, summary: Summary) -> Summary:
        """Without ``recent``, which only queries beside these keys need."""
        return Summary(summary.length, {**summary.parts, "recent": summary["tail"]})

    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """Blocks of ``block``; `Routed.score` holds the scores of those that were selected."""
        within = both(self.within, within)
        q_len, kv_len = q.shape[2], summary.length
        start = resolve_q_start(q_len, kv_len, q_start)
        if self.order is not None and (q_len, kv_len, start) != (self.order.n, self.order.n, 0):
            raise ValueError(f"order is of {self.order.n} tokens, got q_len={q_len}, kv_len={kv_len}, q_start={start}")
        scores = self.scores(q, summary, within, start)
        may = candidates(within, q_len, kv_len, self.block, q_start=start, decisions=scores.shape[1], order=self.order,
                         device=q.device)  # fmt: skip
        index, count = self.rule(scores.detach().masked_fill(~may, -torch.inf))
        slots = None if self.order is None else self.order.forward.to(q.device)[None, None]
        return Routed.blocks(
            index, count, block=self.block, q_len=q_len, kv_len=kv_len, q_start=start, within=within, keep=self.keep,
            score=scores.gather(-1, index.clamp(min=0).long()), q_order=slots, kv_order=slots,
            heads=q.shape[1] if scores.shape[1] > 1 else None, cost=self.cost(q_len, kv_len, q.shape[3]), check=False,
        )  # fmt: skip

    def scores(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Float[Tensor, "batch decisions rows columns"]:
        """The score of every pair of blocks, candidate or not; differentiable, float32 or float64."""
        means, tail = summary["mean"], summary["tail"]
        if tail.shape[2]:
            means = torch.cat([means, pool_blocks(tail, self.block[1])], 2)
        pooled = pool_blocks(q, self.block[0], order=self.order)
        scale = 1 / sqrt(q.shape[3]) if self.scale is None else float(self.scale)
        centre = self._centre(means, summary.length) if self.centre_k else None
        with torch.autocast(q.device.type, enabled=False):  # the choice is of the means, in float32
            scores = pooled_scores(pooled, means if centre is None else means - centre, self.heads, scale)
        if within is None or self.order is not None:
            return scores
        start = resolve_q_start(q.shape[2], summary.length, q_start)
        last = last_keys(within, q.shape[2], summary.length, self.block, q_start=start, decisions=scores.shape[1],
                         device=q.device)  # fmt: skip
        return self._cut(scores, pooled, last, summary, centre, scale)

    def _centre(self, means: Tensor, length: int) -> Tensor:
        """The mean of all keys, from those of the blocks."""
        sizes = torch.full((means.shape[2], 1), self.block[1], device=means.device, dtype=means.dtype)
        if self.order is not None:
            real = (self.order.forward >= 0).to(means)
            sizes = (
                torch.nn.functional.pad(real, (0, -len(real) % self.block[1])).view(-1, self.block[1]).sum(1)[:, None]
            )
        elif length % self.block[1]:
            sizes[-1] = length % self.block[1]
        return (means * sizes).sum(2, keepdim=True) / length

    def _cut(
        self, scores: Tensor, pooled: Tensor, last: Tensor, summary: Summary, centre: Tensor | None, scale: float
    ) -> Tensor:
        """Scores in which the last block that a row may see counts up to the last key ``last[..., row]`` of it."""
        size, length = self.block[1], summary.length
        column = last.clamp(min=0) // size
        cut = (last >= 0) & (last + 1 < ((column + 1) * size).clamp(max=length))
        if not bool(cut.any()):
            return scores
        recent, first = summary["recent"], length - summary["recent"].shape[2]
        if int(last[cut].min()) < first:
            raise ValueError(
                f"the summary knows the keys before {first} as whole blocks alone, and queries that see a part of one "
                "of them cannot be decided for: select for the queries of the keys that were last summarized"
            )
        # sums inside each block, up to each of its keys
        keys = recent if recent.dtype == torch.float64 else recent.float()
        keys = torch.nn.functional.pad(keys, (0, 0, 0, -keys.shape[2] % size)).unflatten(2, (-1, size))
        at = torch.where(cut, last - first, 0)
        lead = (keys.shape[0], last.shape[1])
        at, cut, column = (x.expand(lead[0], *x.shape[1:]) for x in (at, cut, column))
        # keys of each decision's rows: [batch, kv_heads, rows, dim] where all are alike, else one for each decision
        sums = keys.cumsum(3).flatten(2, 3)
        if lead[1] > 1 and lead[1] != sums.shape[1]:
            sums = sums.repeat_interleave(lead[1] // sums.shape[1], 1)
        rows = at[..., None].expand(-1, sums.shape[1], -1, sums.shape[3])
        own = sums.gather(2, rows) / (at % size + 1)[..., None]
        if centre is not None:
            own = own - (centre.repeat_interleave(own.shape[1] // centre.shape[1], 1))
        exact = row_scores(pooled, own, self.heads, scale)
        rows = column.expand(-1, exact.shape[1], -1)[..., None]
        value = torch.where(cut, exact, scores.gather(3, rows)[..., 0])
        return scores.scatter(3, rows, value[..., None])

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """Two poolings, sums inside blocks, and the products of the means."""
        rows, columns = -(-q_len // self.block[0]), -(-kv_len // self.block[1])
        return (q_len + 2 * kv_len + rows * columns) * head_dim


def pooled_scores(q: Any, k: Any, heads: Literal["each", "kv", "all"], scale: float | int = 1.0) -> Tensor:
    """``scale * q . k`` of means ``[batch, heads, rows, dim]`` and ``[batch, kv_heads, columns, dim]``.

    ``[batch, heads, rows, columns]`` for "each", ``[batch, kv_heads, ...]``, the mean over the query heads, for "kv",
    and ``[batch, 1, ...]``, the sum over all heads, for "all".
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    k = k.to(grouped.dtype) * scale
    if heads == "each":
        return (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)
    if heads == "kv":
        return grouped.mean(2) @ k.transpose(-1, -2)
    return (grouped.sum(2) @ k.transpose(-1, -2)).sum(1, keepdim=True)


def row_scores(q: Tensor, k: Tensor, heads: Literal["each", "kv", "all"], scale: float | int = 1.0) -> Tensor:
    """As `pooled_scores`, of each row with a key of its own: k is ``[batch, kv_heads or heads, rows, dim]``."""
    dots = (q.unflatten(1, (k.shape[1], -1)) * k[:, :, None].to(q.dtype)).sum(-1) * scale
    if heads == "each":
        return dots.flatten(1, 2)
    return dots.mean(2) if heads == "kv" else dots.sum((1, 2))[:, None]
