"""Landmark attention's route (arXiv 2305.16300): a token at the end of each block says whether to open the block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.patterns.candidates import candidates
from regard.patterns.decided import Routed, both
from regard.patterns.pattern import Pattern, Rows, resolve_q_start
from regard.patterns.routed import Route, Summary
from regard.patterns.select import best, checked, join_rows, pieces, to_index
from regard.patterns.static import StaticPattern, multiples, need_int, one_interval

__all__ = ["LandmarkRoute", "OwnBlock"]


@dataclass(frozen=True)
class OwnBlock(StaticPattern):
    """A query meets the keys of its own block of P, up to its own, but for the landmark, which is the block's last."""

    P: int

    def __post_init__(self) -> None:
        need_int("P", self.P, 2)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``k <= q``, ``k // P == q // P`` and ``k % P != P - 1``."""
        return (kv_idx <= q_idx) & (kv_idx // self.P == q_idx // self.P) & (kv_idx % self.P != self.P - 1)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of P."""
        return multiples(self.P, a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[IP, min(b, IP + P - 1))``, all ``[IP, min(a + 1, IP + P - 1))``, I the run's block."""
        first = q0 // self.P * self.P
        last = first + self.P - 1
        some = one_interval(first, torch.minimum(q1, last), kv_len, q0)
        return Rows(some, one_interval(first, torch.minimum(q0 + 1, last), kv_len, q0))


@dataclass(frozen=True)
class LandmarkRoute(Route):
    """The ``topk`` finished blocks whose landmarks weigh most in a softmax over all landmarks, for each query and head.

    Blocks are of ``every + 1`` tokens, the last being the landmark. A query's candidates are the blocks finished before
    its own block, or before the ``chunk`` of tokens that it was read in.

    Args:
        topk: blocks of a query.
        every: tokens of a block before its landmark.
        share: "each" query and head decides; "max_heads": the greatest weight over the heads, one decision for all of
            them; "max_queries": the greatest weight over the queries of a chunk, one decision for all of those.
        chunk: tokens read at a time; None: each query by itself.
        turn: rotates vectors to positions, ``turn(x, positions)`` (`regard.kernels.rotary.rotate` with the model's
            frequencies); q and k are then given **before** rotation, and scored at the places they have in reading:
            the first unfinished block of what was read with the query in block ``topk + 1``, the last topk landmarks
            in blocks 1 .. topk, all older ones in block 0. None: scored as they are given.
        within: what may meet at all; see `Route`.

    Raises:
        ValueError: a number below 1, another share, or ``share="max_queries"`` without a chunk.
    """

    topk: int
    every: int = 50
    share: Literal["each", "max_heads", "max_queries"] = "each"
    chunk: int | None = None
    turn: Callable[[Tensor, Tensor], Tensor] | None = None
    within: Pattern | None = None

    def __post_init__(self) -> None:
        need_int("topk", self.topk, 1)
        need_int("every", self.every, 1)
        if self.chunk is not None:
            need_int("chunk", self.chunk, 1)
        if self.share not in ("each", "max_heads", "max_queries"):
            raise ValueError(f'share must be "each", "max_heads" or "max_queries", got {self.share!r}')
        if self.share == "max_queries" and self.chunk is None:
            raise ValueError('chunk must be given with share="max_queries": its queries share a decision')

    @property
    def block(self) -> tuple[int, int]:  # type: ignore[override]
        """``(1, every + 1)``."""
        return 1, self.every + 1

    @property
    def heads(self) -> Literal["each", "kv", "all"]:  # type: ignore[override]
        """One decision a head, but for ``share="max_heads"``."""
        return "all" if self.share == "max_heads" else "each"

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """``landmark``: the keys of the landmarks, ``[batch, kv_heads, finished blocks, head_dim]``."""
        old, P = 0 if past is None else past.length, self.every + 1
        new = k[:, :, (self.every - old) % P :: P]
        found = new.clone() if past is None else torch.cat([past["landmark"], new], 2)
        return Summary(old + k.shape[2], {"landmark": found})

    def seen(self, positions: Int[Tensor, "q_len"]) -> Int[Tensor, "q_len"]:
        """How many blocks, from the first, are candidates of the query at each position."""
        start = positions if self.chunk is None else positions // self.chunk * self.chunk
        return start // (self.every + 1)

    def slots(
        self, index: Int[Tensor, "*rows q_len width"], seen: Int[Tensor, "q_len"]
    ) -> Int[Tensor, "*rows q_len width"]:
        """Where each chosen block is read: the j-th at block j, or j + 1 if it is one of the last topk candidates."""
        place = torch.arange(index.shape[-1], device=index.device)
        return place + (index >= (seen - self.topk)[:, None]).long()

    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """The blocks, landmark included; `Routed.score` holds their landmarks' weights."""
        within = both(self.within, within)
        q_len, kv_len = q.shape[2], summary.length
        start = resolve_q_start(q_len, kv_len, q_start)
        at = torch.arange(start, start + q_len, device=q.device)
        landmark = summary["landmark"]
        allowed = None
        if within is not None:
            each = q.shape[1] if self.heads == "each" else 1
            allowed = candidates(within, q_len, kv_len, self.block, q_start=start, decisions=each, device=q.device)
        per_row = q.shape[0] * q.shape[1] * landmark.shape[2]
        found = [
            self._choose(q[:, :, rows], landmark, at[rows], None if allowed is None else allowed[:, :, rows])
            for rows in self._pieces(at, per_row)
        ]
        index = join_rows([part for part, _ in found])
        count = (index >= 0).sum(-1, dtype=torch.int32)
        weights = torch.cat([pad(part, (0, index.shape[-1] - part.shape[-1])) for _, part in found], -2)
        return Routed.blocks(
            index,
            count,
            block=self.block,
            q_len=q_len,
            kv_len=kv_len,
            q_start=start,
            score=weights,
            within=within,
            heads=q.shape[1] if index.shape[1] > 1 else None,
            cost=self.cost(q_len, kv_len, q.shape[3]),
            check=False,
        )

    def _pieces(self, at: Int[Tensor, "q_len"], per_row: int) -> list[slice]:
        """Queries looked at together; those that share a decision are never parted."""
        if self.share != "max_queries" or not len(at):
            return pieces(len(at), per_row) or [slice(0, 0)]
        assert self.chunk is not None
        cuts = [0, *((at[1:] // self.chunk != at[:-1] // self.chunk).nonzero()[:, 0] + 1).tolist(), len(at)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts)]

    @torch.no_grad()
    def _choose(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        landmark: Float[Tensor, "batch kv_heads blocks head_dim"],
        at: Int[Tensor, "q_len"],
        allowed: Bool[Tensor, "samples decisions q_len columns"] | None,
    ) -> tuple[Int[Tensor, "batch shared q_len width"], Float[Tensor, "batch shared q_len width"]]:
        """The blocks of some queries and their landmarks' weights, 0 after the last."""
        seen = self.seen(at)
        blocks = min(landmark.shape[2], int(seen.max()) if len(at) else 0)
        may = torch.arange(blocks, device=q.device) < seen[:, None]
        if allowed is not None:
            may = may & allowed[..., :blocks]
        scores = checked(self.scores(q, landmark[:, :, :blocks], at))
        open_to_all = int(may.flatten(0, -2).all(0).int().cumprod(0).sum())  # only what is behind needs a mask
        scores[..., open_to_all:].masked_fill_(~may[..., open_to_all:], -torch.inf)
        total = scores.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # -inf without a candidate
        if self.share == "max_heads":
            scores, total = (scores - total).amax(1, keepdim=True), total.new_zeros(())
        elif self.share == "max_queries":
            scores, total = (scores - total).amax(2, keepdim=True).expand_as(scores), total.new_zeros(())
            scores = scores.masked_fill(~may, -torch.inf)
        index, _ = to_index(best(scores, self.topk))
        at_chosen = index.clamp(min=0).long()
        chosen = scores.gather(-1, at_chosen) - total if blocks else scores
        return index, torch.where(index >= 0, chosen.exp(), 0)

    def scores(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        landmark: Float[Tensor, "batch kv_heads blocks head_dim"],
        at: Int[Tensor, "q_len"],
    ) -> Float[Tensor, "batch heads q_len blocks"]:
        """``q . landmark / sqrt(head_dim)`` at the places of scoring; what is no candidate may have any value."""
        landmark, P = landmark.repeat_interleave(q.shape[1] // landmark.shape[1], 1), self.every + 1
        if self.turn is None:
            return (q * q.shape[3] ** -0.5) @ landmark.mT
        # Only differences of places count: landmarks stay at the end of block 0, and queries move.
        ends = torch.full((landmark.shape[2],), P - 1, device=q.device)
        landmark = self.turn(landmark, ends)
        seen = self.seen(at)
        local = at - seen * P
        scores = self.turn(q, (self.topk + 1) * P + local) @ landmark.mT
        rows = torch.arange(len(at), device=q.device)
        for s in range(1, self.topk + 1):
            block = seen - self.topk + s - 1
            there = block >= 0
            near = self.turn(q, (self.topk + 1 - s) * P + local)[:, :, there]
            found = (near * landmark[:, :, block[there]]).sum(-1)
            scores[:, :, rows[there], block[there]] = found
        return q.shape[3] ** -0.5 * scores

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """A product with every landmark."""
        return q_len * (kv_len // (self.every + 1)) * head_dim
