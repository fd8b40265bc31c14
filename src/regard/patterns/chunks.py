"""LongHeads' route (arXiv 2402.10685): each query and head reads a few chunks, chosen before rotation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from regard.patterns.candidates import candidates
from regard.patterns.decided import Routed, both
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.routed import Route, Summary
from regard.patterns.select import best, checked, join_rows, pieces, to_index
from regard.patterns.static import need_int

__all__ = ["ChunkRoute"]

Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ChunkRoute(Route):
    """``total`` chunks for each query and head: the first, the last up to its own, and the best scored between.

    The score of a past chunk g is ``q . c_g``, q and k being given **before** rotation. Its key c_g is, by
    ``representation``:

    - "paper": o = attention inside the chunk, not causal, q and k rotated by their place in the chunk; ``m`` its mean;
      ``c = softmax(m K^T / sqrt(d)) K``. m is a mean of values that acts as a query: so in the authors' code.
      Needs q and v: ``summarize(k, q=, v=)``.
    - "mean": the mean of the chunk's keys.
    - "max": none; the score is the greatest of the chunk's keys, which is what choosing by keys could do at best.

    A query of chunk b < total reads all chunks up to its own. The model's causality comes by ``within``.

    Args:
        chunk: tokens of a chunk, l.
        total: chunks of a query, K.
        first, last: chunks always read at the start and at the end, the query's own, unfinished one included.
        representation: see above.
        turn: rotates vectors to positions, ``turn(x, positions)`` (`regard.kernels.rotary.rotate` with the model's
            frequencies); None: no rotation. Of "paper" alone.
        within: what may meet at all; see `Route`.

    Raises:
        ValueError: a number that does not fit, ``total < first + last``, or another representation.
    """

    chunk: int = 256
    total: int = 16
    first: int = 1
    last: int = 2
    representation: Literal["paper", "mean", "max"] = "paper"
    turn: Turn | None = None
    within: Pattern | None = None

    heads = "each"

    def __post_init__(self) -> None:
        need_int("chunk", self.chunk, 1)
        need_int("first", self.first, 0)
        need_int("last", self.last, 1, "; a query always reads its own chunk")
        need_int("total", self.total, self.first + self.last, f", first + last of {self.first} + {self.last}")
        if self.representation not in ("paper", "mean", "max"):
            raise ValueError(f'representation must be "paper", "mean" or "max", got {self.representation!r}')

    @property
    def block(self) -> tuple[int, int]:  # type: ignore[override]
        """``(1, chunk)``."""
        return 1, self.chunk

    def summarize(
        self,
        k: Float[Tensor, "batch kv_heads length head_dim"],
        *,
        past: Summary | None = None,
        q: Float[Tensor, "batch heads length head_dim"] | None = None,
        v: Float[Tensor, "batch kv_heads length v_dim"] | None = None,
    ) -> Summary:
        """``key``: of each finished chunk, for each query head ("paper") or kv head; all keys for "max".

        ``tail_k``, and ``tail_q`` and ``tail_v`` for "paper": the tokens of the unfinished chunk.

        Raises:
            ValueError: "paper" without q and v of the same tokens, or with values of another width than keys.
        """
        given = {"k": k}
        if self.representation == "paper":
            if q is None or v is None or q.shape[2] != k.shape[2] or v.shape != k.shape:
                raise ValueError(
                    'q and v must be given with representation="paper", of the tokens and the width of k '
                    f"{list(k.shape)}, got {[None if x is None else list(x.shape) for x in (q, v)]}"
                )
            given |= {"q": q, "v": v}
        if past is not None:
            given = {name: torch.cat([past[f"tail_{name}"], x], 2) for name, x in given.items()}
        whole = given["k"].shape[2] // self.chunk * self.chunk
        key = self._keys({name: x[:, :, :whole] for name, x in given.items()})
        if past is not None:
            key = torch.cat([past["key"], key], 2)
        tails = {f"tail_{name}": x[:, :, whole:].clone() for name, x in given.items()}
        return Summary(k.shape[2] + (0 if past is None else past.length), {"key": key, **tails})

    def _keys(self, given: dict[str, Tensor]) -> Tensor:
        """Of whole chunks ``[batch, heads, length, dim]``."""
        k = given["k"]
        if self.representation == "max":
            return k.clone()
        parts = {name: x.unflatten(2, (-1, self.chunk)) for name, x in given.items()}  # [batch, heads, chunks, l, d]
        if self.representation == "mean":
            return parts["k"].mean(3)
        at = torch.arange(self.chunk, device=k.device)
        q, k, v = parts["q"], parts["k"], parts["v"]
        q, k = (x if self.turn is None else self.turn(x, at) for x in (q, k))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        if not q.shape[2]:
            return q[:, :, :, 0]
        m = _sdpa(q, k, v).mean(3, keepdim=True)
        return _sdpa(m, k, k)[:, :, :, 0]

    def scores(self, q: Float[Tensor, "batch heads q_len head_dim"], summary: Summary) -> Tensor:
        """``q . c`` of every finished chunk, ``[batch, heads, q_len, chunks]``."""
        key = summary["key"]
        key = key.repeat_interleave(q.shape[1] // key.shape[1], 1)
        if self.representation != "max":
            return q @ key.mT
        found = [(q @ part.mT).amax(-1) for part in key.split(self.chunk, 2)]
        return torch.stack(found, -1) if found else q.new_zeros(*q.shape[:3], 0)

    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """The chunks, ascending, the query's own last; `Routed.score` holds scores, 0 for chunks always read."""
        within = both(self.within, within)
        q_len, kv_len = q.shape[2], summary.length
        start = resolve_q_start(q_len, kv_len, q_start)
        may = candidates(within, q_len, kv_len, self.block, q_start=start, decisions=q.shape[1], device=q.device)
        parts = pieces(q_len, q.shape[0] * q.shape[1] * max(may.shape[-1], q.shape[3])) or [slice(0, 0)]
        found = [self._choose(q[:, :, rows], summary, kv_len, start + rows.start, may[:, :, rows]) for rows in parts]
        index = join_rows([part for part, _, _ in found])
        return Routed.blocks(
            index,
            torch.cat([part for _, part, _ in found], 2),
            block=self.block,
            q_len=q_len,
            kv_len=kv_len,
            q_start=start,
            score=torch.cat([pad(part, (0, index.shape[-1] - part.shape[-1])) for _, _, part in found], 2),
            within=within,
            heads=q.shape[1],
            cost=self.cost(q_len, kv_len, q.shape[3]),
            check=False,
        )

    def _choose(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        kv_len: int,
        start: int,
        may: Bool[Tensor, "samples decisions rows columns"],
    ) -> tuple[
        Int[Tensor, "batch heads q_len width"],
        Int[Tensor, "batch heads q_len"],
        Float[Tensor, "batch heads q_len width"],
    ]:
        """The chunks of some queries, how many, and their scores."""
        own = torch.arange(start, start + q.shape[2], device=q.device)[:, None] // self.chunk
        chunk = torch.arange(may.shape[-1], device=q.device)
        forced = (chunk <= own) & ((chunk < self.first) | (chunk > own - self.last)) & may
        free = may & ~forced & (chunk <= own - self.last)
        scores = pad(self.scores(q, summary), (0, len(chunk) - kv_len // self.chunk))
        # what is always read counts among the total, and stands before the rest
        ranked = checked(scores).masked_fill(~free, -torch.inf).masked_fill_(forced, torch.inf)
        index, count = to_index(best(ranked, self.total))
        at = index.clamp(min=0).long()
        always = forced.expand(scores.shape).gather(-1, at)
        return index, count, scores.gather(-1, at).masked_fill(always, 0)

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """A product with each chunk's key ("max": each key), and attention inside chunks for "paper"."""
        chunks = kv_len // self.chunk
        each = {"paper": chunks, "mean": chunks, "max": kv_len}[self.representation]
        inside = 2 * (self.chunk + 1) * self.chunk * chunks if self.representation == "paper" else 0
        return (q_len * each + inside) * head_dim


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `[batch, heads, chunks, rows, dim]`, each chunk by itself."""
    return sdpa(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)).unflatten(1, q.shape[1:3])
