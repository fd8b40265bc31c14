"""Block layouts: which key blocks each query block meets, and which of them need no mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from regard.patterns.pattern import Pattern

__all__ = ["BlockLayout", "block_size"]


def block_size(block: int | tuple[int, int], name: str = "block") -> tuple[int, int]:
    """``(query block, key block)`` from one number or two."""
    sizes = (block, block) if isinstance(block, int) else tuple(block)
    if len(sizes) != 2 or any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in sizes):
        raise ValueError(f"{name} must be an integer >= 1 or a pair (query block, key block) of them, got {block!r}")
    return sizes[0], sizes[1]


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Blocks with an allowed pair, row by row (CSR), of a pattern over ``q_len`` queries and ``kv_len`` keys.

    Row ``r = (sample * heads + head) * n_q_blocks + i`` is query block i; it meets the key blocks
    ``indices[indptr[r]:indptr[r + 1]]``, ascending, and ``full`` says of each whether every pair of it is allowed.
    The last block of either axis may be short: "every pair" is judged on the cells that exist.

    Args:
        indptr: int64 ``[samples * heads * n_q_blocks + 1]``, from 0.
        indices: key block of each listed block; any integer type comes in, int32 is kept.
        full: bool, one for each listed block.
        q_len, kv_len: tokens on each axis.
        block: ``(query block, key block)`` in tokens.
        heads, samples: rows are laid out for so many heads and samples; 1 where all are alike.
    """

    indptr: Int[Tensor, "rows_and_one"]
    indices: Int[Tensor, "listed"]
    full: Bool[Tensor, "listed"]
    q_len: int
    kv_len: int
    block: tuple[int, int]
    heads: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", block_size(self.block))
        object.__setattr__(self, "indptr", self.indptr.to(torch.int64))
        object.__setattr__(self, "indices", self.indices.to(torch.int32))
        rows = self.samples * self.heads * self.n_q_blocks
        if len(self.indptr) != rows + 1:
            raise ValueError(
                f"indptr must have samples * heads * n_q_blocks + 1 = {rows + 1} entries, got {len(self.indptr)}"
            )
        listed = int(self.indptr[-1])
        if len(self.indices) != listed or len(self.full) != listed:
            raise ValueError(
                f"indices and full must have indptr[-1] = {listed} entries, "
                f"got {len(self.indices)} and {len(self.full)}"
            )

    @classmethod
    def from_dense(
        cls,
        some: Bool[Tensor, "*lead q_blocks kv_blocks"],
        every: Bool[Tensor, "*lead q_blocks kv_blocks"],
        q_len: int,
        kv_len: int,
        block: int | tuple[int, int],
    ) -> BlockLayout:
        """From block matrices ``[q_blocks, kv_blocks]``, ``[heads, ...]`` or ``[samples, heads, ...]``.

        ``some``: the block holds an allowed pair; ``every``: all its pairs are allowed.
        """
        block = block_size(block)
        lead = some.shape[:-2]
        if len(lead) > 2:
            raise ValueError(f"some must have 2 to 4 dimensions, got {tuple(some.shape)}")
        samples, heads = (1,) * (2 - len(lead)) + tuple(lead)
        want = (-(-q_len // block[0]), -(-kv_len // block[1]))
        if tuple(some.shape[-2:]) != want:
            raise ValueError(
                f"some must end in {want} blocks for {q_len} x {kv_len} by {block}, got {tuple(some.shape)}"
            )
        flat = some.reshape(-1, want[1])
        indptr = torch.zeros(len(flat) + 1, dtype=torch.int64)
        torch.cumsum(flat.sum(1), 0, out=indptr[1:])
        return cls(
            indptr,
            flat.nonzero()[:, 1].cpu(),
            every.reshape(-1, want[1])[flat].cpu(),
            q_len,
            kv_len,
            block,
            heads,
            samples,
        )

    @property
    def n_q_blocks(self) -> int:
        """Query blocks, the short last one included."""
        return -(-self.q_len // self.block[0])

    @property
    def n_kv_blocks(self) -> int:
        """Key blocks, the short last one included."""
        return -(-self.kv_len // self.block[1])

    @property
    def n_blocks(self) -> int:
        """Listed blocks, over all heads and samples."""
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Bytes of the layout's own tensors."""
        return sum(t.numel() * t.element_size() for t in (self.indptr, self.indices, self.full))

    @property
    def counts(self) -> Int[Tensor, "rows"]:
        """Listed key blocks of each row."""
        return self.indptr.diff()

    @property
    def rows(self) -> Int[Tensor, "listed"]:
        """The row ``(sample, head, query block)`` of each listed block."""
        counts = self.counts
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    @property
    def density(self) -> float:
        """Share of all pairs that lie in listed blocks, what a kernel computes, in [0, 1]; 0.0 without pairs."""
        pairs = self.samples * self.heads * self.q_len * self.kv_len
        return self._area(self.rows, self.indices) / pairs if pairs else 0.0

    def _area(self, rows: Tensor, indices: Tensor) -> int:
        (bq, bk), cells = self.block, len(indices) * self.block[0] * self.block[1]
        short_q, short_k = self.n_q_blocks * bq - self.q_len, self.n_kv_blocks * bk - self.kv_len
        last_q, last_k = rows % max(self.n_q_blocks, 1) == self.n_q_blocks - 1, indices == self.n_kv_blocks - 1
        missing = int(last_q.sum()) * short_q * bk + int(last_k.sum()) * short_k * bq
        return cells - missing + int((last_q & last_k).sum()) * short_q * short_k

    def dense(
        self,
    ) -> tuple[
        Bool[Tensor, "{self.samples} {self.heads} q_blocks kv_blocks"],
        Bool[Tensor, "{self.samples} {self.heads} q_blocks kv_blocks"],
    ]:
        """``(some, every)``: block matrices ``[samples, heads, n_q_blocks, n_kv_blocks]``."""
        shape = (self.samples, self.heads, self.n_q_blocks, self.n_kv_blocks)
        some, every = torch.zeros(2, self.samples * self.heads * self.n_q_blocks, self.n_kv_blocks, dtype=torch.bool)
        rows, cols = self.rows, self.indices.long()
        some[rows, cols] = True
        every[rows, cols] = self.full
        return some.view(shape), every.view(shape)

    def equal(self, other: BlockLayout) -> bool:
        """Same sizes and the same blocks."""
        mine, its = ((x.q_len, x.kv_len, x.block, x.heads, x.samples) for x in (self, other))
        pairs = ((self.indptr, other.indptr), (self.indices, other.indices), (self.full, other.full))
        return mine == its and all(torch.equal(a, b) for a, b in pairs)

    def __eq__(self, other: object) -> bool:
        return self.equal(other) if isinstance(other, BlockLayout) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kinds = f"{self.n_blocks} blocks ({int(self.full.sum())} full)"
        shared = f", heads={self.heads}, samples={self.samples}" if self.heads * self.samples > 1 else ""
        return f"BlockLayout({self.q_len} x {self.kv_len} by {self.block}: {kinds}, density {self.density:.4f}{shared})"

    def transpose(self) -> BlockLayout:
        """Key-major: row j lists the query blocks that meet key block j (what the backward pass walks)."""
        rows, cols = self.rows.numpy(), self.indices.numpy()
        groups, n_q, n_kv = self.samples * self.heads, self.n_q_blocks, self.n_kv_blocks
        group, i = np.divmod(rows, max(n_q, 1))
        target = group * n_kv + cols
        narrow = next(t for t in (np.uint16, np.int64) if groups * n_kv <= np.iinfo(t).max)
        order = np.argsort(target.astype(narrow), kind="stable")  # 16 bits: a radix sort
        indptr = np.zeros(groups * n_kv + 1, dtype=np.int64)
        np.cumsum(np.bincount(target, minlength=groups * n_kv), out=indptr[1:])
        return BlockLayout(
            torch.from_numpy(indptr),
            torch.from_numpy(i[order]),
            self.full[torch.from_numpy(order)],
            self.kv_len,
            self.q_len,
            (self.block[1], self.block[0]),
            self.heads,
            self.samples,
        )

    def coarsen(self, factor: int | tuple[int, int]) -> BlockLayout:
        """The layout for blocks ``factor`` times as large; full where every small block that exists is full."""
        fq, fk = block_size(factor, "factor")
        n_q, n_kv = -(-self.n_q_blocks // fq), -(-self.n_kv_blocks // fk)
        group, i = np.divmod(self.rows.numpy(), max(self.n_q_blocks, 1))
        key = (group * n_q + i // fq) * n_kv + self.indices.numpy() // fk
        blocks, inverse = np.unique(key, return_inverse=True)
        n_full = np.bincount(inverse, weights=self.full.numpy(), minlength=len(blocks))
        row, j = np.divmod(blocks, max(n_kv, 1))
        there = np.minimum(fq, self.n_q_blocks - row % max(n_q, 1) * fq) * np.minimum(fk, self.n_kv_blocks - j * fk)
        indptr = np.zeros(self.samples * self.heads * n_q + 1, dtype=np.int64)
        np.cumsum(np.bincount(row, minlength=len(indptr) - 1), out=indptr[1:])
        return BlockLayout(
            torch.from_numpy(indptr),
            torch.from_numpy(j),
            torch.from_numpy(n_full == there),
            self.q_len,
            self.kv_len,
            (self.block[0] * fq, self.block[1] * fk),
            self.heads,
            self.samples,
        )

    def to_block_mask(
        self, pattern: Pattern, q_start: int | None = None, device: torch.device | str | None = None
    ) -> BlockMask:
        """FlexAttention's BlockMask; partial blocks are masked by ``pattern.allows`` (see `to_block_mask`)."""
        from regard.patterns.block_mask import to_block_mask

        return to_block_mask(self, pattern, q_start, device)

    @classmethod
    def from_block_mask(cls, mask: BlockMask) -> BlockLayout:
        """From FlexAttention's BlockMask; a mask without separate full blocks gives partial ones alone."""
        from regard.patterns.block_mask import from_block_mask

        return from_block_mask(mask)
