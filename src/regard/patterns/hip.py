"""HiP's route (arXiv 2406.09827): the key blocks that matter most, found by halving ranges of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.patterns.candidates import candidates
from regard.patterns.decided import Routed, both
from regard.patterns.layout import block_size
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.routed import Route, Summary
from regard.patterns.select import best, checked, to_index
from regard.patterns.static import Causal, Sinks, Window, need_int

__all__ = ["HiP"]

BYTES = 1 << 23  # of keys and scores looked at together


@dataclass(frozen=True)
class HiP(Route):
    """Hierarchical pruning: about the ``k / kv_block`` best key blocks of each query block, in ``O(log T)`` halvings.

    The candidates of a query block are the key blocks between the sinks and the window of its last query. They are
    split into ``M = k / kv_block`` nearly equal ranges; each is halved, a half being scored by its block in the middle
    (the greatest ``q . k`` over the scored queries and the block's keys), and the M best halves stay, until every range
    is one block. With at most M candidates all are taken. Sinks and window are kept beside them. Good where
    neighbouring keys score alike; the tree sees nothing of a key that stands alone. One decision a query head.

    ``2 k`` dot products a round for each scored query, and ``log2(T / k)`` rounds: 5 at 16,384 keys.

    Args:
        k: keys in the chosen blocks, a multiple of the key block.
        block: ``(query block, key block)``.
        stride: every stride-th query of a block is scored, the first one included.
        window: keys kept up to each query, its own included; at least a query block, so that no candidate is to come.
        sink: first keys kept.
        within: what may meet at all; see `Route`. A query sees nothing after itself in any case.

    Raises:
        ValueError: k that the key block does not divide, a window below the query block, or a number out of range.
    """

    k: int = 512
    block: tuple[int, int] = (64, 2)
    stride: int = 2
    window: int = 256
    sink: int = 16
    within: Pattern | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", block_size(self.block))
        need_int("k", self.k, 1)
        need_int("stride", self.stride, 1)
        need_int("sink", self.sink, 0)
        need_int("window", self.window, 1)
        if self.k % self.block[1]:
            raise ValueError(f"k must be a multiple of the key block {self.block[1]}, got {self.k}")
        if self.window < self.block[0]:
            raise ValueError(
                f"window must be >= the query block {self.block[0]}, or keys after a query would be candidates, got "
                f"{self.window}"
            )

    @property
    def heads(self) -> Literal["each", "kv", "all"]:  # type: ignore[override]
        """Each query head decides."""
        return "each"

    @property
    def keep(self) -> Pattern:
        """Sinks and window."""
        window: Pattern = Window(self.window - 1)
        return window | (Sinks(self.sink) & Causal()) if self.sink else window

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """``keys``: all of them; the tree may look at any."""
        keys = k if past is None else torch.cat([past["keys"], k.to(past["keys"].dtype)], 2)
        return Summary(keys.shape[2], {"keys": keys})

    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """Blocks of ``block``, without scores."""
        within = both(self.within, within)
        batch, heads, q_len = q.shape[:3]
        kv_len, start = summary.length, resolve_q_start(q.shape[2], summary.length, q_start)
        first, stop = (x.to(q.device) for x in self._reach(q_len, kv_len, start))
        lead = (1, 1)
        may = None
        if within is not None:
            may = candidates(within, q_len, kv_len, self.block, q_start=start, decisions=heads, device=q.device)
            first, stop, may = _narrowed(may, first, stop)
            lead = (first.shape[0], first.shape[1])
        first, stop = (x.expand(*lead, -1).expand(batch, heads, -1) for x in (first, stop))
        with torch.no_grad():
            low, high = self._searched(q.detach(), summary["keys"].detach(), first, stop, may)
        there = low < high
        if may is not None:
            there = there & _looked_up(may, low)
        index, count = to_index(there)
        blocks = torch.where(index < 0, -1, low.gather(-1, index.clamp(min=0).long())).to(torch.int32)
        return Routed.blocks(
            blocks, count, block=self.block, q_len=q_len, kv_len=kv_len, q_start=start, within=within, keep=self.keep,
            cost=self.cost(q_len, kv_len, q.shape[3]), check=False,
        )  # fmt: skip

    def _reach(self, q_len: int, kv_len: int, q_start: int) -> tuple[Int[Tensor, "1 1 rows"], Int[Tensor, "1 1 rows"]]:
        """The key blocks ``[first, stop)`` that each query block may choose from."""
        bq, bk = self.block
        last = q_start + (torch.arange(-(-q_len // bq)) + 1).mul(bq).clamp(max=q_len) - 1
        stop = ((last - self.window + 1) // bk).clamp(0, kv_len // bk)
        first = torch.full_like(stop, self.sink // bk)
        return first[None, None], torch.maximum(first, stop)[None, None]

    def _searched(self, q: Tensor, k: Tensor, first: Tensor, stop: Tensor, may: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ranges ``[batch, heads, rows, M]`` of at most one block, ascending; empty ones are (0, 0)."""
        m = self.k // self.block[1]
        place = torch.arange(m + 1, device=q.device)
        n = (stop - first)[..., None]
        edges = first[..., None] + torch.where(n > m, place * n // m, torch.minimum(place, n))
        low, high = edges[..., :-1].contiguous(), edges[..., 1:].contiguous()
        queries = self._scored(q)
        while True:
            open_rows = ((high - low).amax(-1) > 1).any(1).any(0).nonzero().flatten()
            if not len(open_rows):
                return torch.where(low < high, low, 0), torch.where(low < high, high, 0)
            rows = slice(int(open_rows[0]), int(open_rows[-1]) + 1)  # later rows have more candidates
            a, b = low[:, :, rows], high[:, :, rows]
            middle = a + (b - a + 1) // 2
            a, b = torch.stack([a, middle], -1).flatten(-2), torch.stack([middle, b], -1).flatten(-2)
            centre = (a + (b - a) // 2).clamp(max=k.shape[2] // self.block[1] - 1)
            scores = self._scores(queries[:, :, rows], k, centre)
            open_ = a < b
            if may is not None:
                open_ = open_ & _looked_up(may[:, :, rows] if may.shape[2] > 1 else may, centre)
            index, _ = to_index(best(checked(scores).masked_fill(~open_, -torch.inf), m))
            index = torch.nn.functional.pad(index, (0, m - index.shape[-1]), value=-1).long()
            at, none = index.clamp(min=0), index < 0
            low[:, :, rows] = a.gather(-1, at).masked_fill(none, 0)
            high[:, :, rows] = b.gather(-1, at).masked_fill(none, 0)

    def _scored(self, q: Tensor) -> Tensor:
        """The scored queries ``[batch, heads, rows, scored, dim]``; a short block repeats its last."""
        (bq, _), q_len = self.block, q.shape[2]
        row = torch.arange(-(-q_len // bq), device=q.device)[:, None] * bq
        count = (torch.clamp(q_len - row, max=min(bq, q_len)) - 1) // self.stride
        nth = torch.arange(-(-min(bq, q_len) // self.stride), device=q.device)
        return q[:, :, row + torch.minimum(nth, count) * self.stride]

    def _scores(self, queries: Tensor, k: Tensor, centre: Tensor) -> Tensor:
        """The greatest dot product of a row's queries with the keys of each block, ``[batch, heads, rows, blocks]``."""
        (batch, heads, rows, n), (kv_len, dim), bk = centre.shape, k.shape[2:], self.block[1]
        group = heads // k.shape[1]
        head = torch.arange(batch * heads, device=k.device).view(batch, heads, 1, 1) // group
        whole = kv_len % bk == 0
        flat = k.reshape(-1, bk * dim if whole else dim)
        if whole:
            at = (head * (kv_len // bk) + centre).view(-1, n)
        else:
            tokens = centre[..., None] * bk + torch.arange(bk, device=k.device)
            at = (head[..., None] * kv_len + tokens).view(-1, n * bk)
        queries = queries.reshape(batch * heads * rows, -1, dim).to(k.dtype)
        many = queries.shape[1]
        step = BYTES if k.device.type == "cpu" else 64 * BYTES
        step = max(1, min(len(at), step // (n * bk * (dim + many) * k.element_size())))
        keys, dots = flat.new_empty(step * at.shape[1], flat.shape[1]), flat.new_empty(step, n * bk, many)
        found = flat.new_empty(len(at), n)
        for lo in range(0, len(at), step):
            part = at[lo : lo + step]
            here, into = keys[: part.numel()], dots[: len(part)]
            torch.index_select(flat, 0, part.flatten(), out=here)
            torch.bmm(here.view(len(part), n * bk, dim), queries[lo : lo + step].transpose(1, 2), out=into)
            torch.amax(into.view(len(part), n, -1), -1, out=found[lo : lo + step])
        return found.view(batch, heads, rows, n)

    def rounds(self, q_len: int, kv_len: int, q_start: int | None = None) -> Int[Tensor, "rows"]:
        """Halvings of each query block, ``ceil(log2(ceil(n / M)))`` of n candidates: ``M`` ranges that are halved."""
        first, stop = self._reach(q_len, kv_len, resolve_q_start(q_len, kv_len, q_start))
        n, m = (stop - first)[0, 0], self.k // self.block[1]
        largest = torch.where(n > m, -(-n // m), 1)
        return torch.ceil(torch.log2(largest.double())).long()

    def dots(self, q_len: int, kv_len: int, q_start: int | None = None) -> int:
        """Dot products of deciding, per query head: ``2 k`` a round for each scored query."""
        bq = min(self.block[0], q_len)
        return int(self.rounds(q_len, kv_len, q_start).sum()) * 2 * self.k * -(-bq // self.stride)

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """``head_dim`` for each of `dots`, the queries being the last ones."""
        return self.dots(q_len, kv_len) * head_dim


def _narrowed(may: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ranges from the first to the last candidate in them; and the candidates, where some between are none."""
    column = torch.arange(may.shape[-1], device=may.device)
    inside = may & (column >= first[..., None]) & (column < stop[..., None])
    some = inside.any(-1)
    low = torch.where(some, inside.int().argmax(-1), 0)
    high = torch.where(some, may.shape[-1] - inside.int().flip(-1).argmax(-1), 0)
    holes = bool((inside.sum(-1) < high - low).any())
    return low, high, inside if holes else None


def _looked_up(may: Tensor, blocks: Tensor) -> Tensor:
    """Whether blocks ``[batch, heads, rows, n]`` are candidates, of ``[batch|1, heads|1, rows, columns]``."""
    return may.expand(*blocks.shape[:3], -1).gather(-1, blocks)
