"""From the blocks of a layout to batches of equal tiles, each of which is one call of a dense kernel.

A tile is one anchor block (of queries in the forward pass, of keys in the backward pass) with all it meets on the
other axis. Tiles with equally many tokens and the same mask go into one batch. Where the blocks of a row follow each
other, and the rows do so in equal steps, the batch is a strided view of the tensors, so nothing is copied; any other
batch is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Blocks", "make_batches"]

FULL, OPEN = -1, -2  # kinds of blocks beside the numbers of masks: no mask; a mask that is evaluated in each call
Evaluate = Callable[[Tensor, Tensor], Tensor]  # (anchor blocks, other blocks) -> bool [n, anchor block, other block]
ALONE = 1 << 16  # pairs of a tile that is worth a call of its own
RUN = 4  # tiles in a row that are worth a call
MASKS = 1 << 27  # bytes of the different masks that are kept; beyond, they are put together in each call


@dataclass(frozen=True, eq=False)
class Batch:
    """Tiles of ``size`` anchor tokens with ``n`` tokens of the other axis each."""

    anchors: Tensor  # [tiles] number of the anchor block
    size: int
    n: int
    step: int | None  # anchor blocks from one tile to the next, where that is the same for all
    start: int  # first token of the other axis of tile 0
    shift: int | None  # tokens from one tile to the next; None: gathered
    blocks: Tensor | None  # [tiles, m] numbers of the blocks of the other axis, where gathered
    masks: Tensor | None  # bool [masks, size, n]; None: every pair is allowed, or `kinds` says what is
    which: Tensor | None  # [tiles] number of the mask; None: the first is everyone's
    kinds: Tensor | None  # [tiles, m] kind of each block, where the mask is put together in each call

    def __len__(self) -> int:
        return len(self.anchors)

    @property
    def plain(self) -> bool:
        """No mask."""
        return self.masks is None and self.kinds is None

    @property
    def nbytes(self) -> int:
        """Bytes of its own tensors."""
        given = (self.anchors, self.blocks, self.masks, self.which, self.kinds)
        return sum(t.numel() * t.element_size() for t in given if t is not None)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Listed blocks of one head, sorted by anchor block and then by block of the other axis."""

    anchor: np.ndarray
    other: np.ndarray
    kind: np.ndarray  # FULL, OPEN or the number of its mask
    tiles: Tensor  # bool [kinds, anchor block, other block]
    lengths: tuple[int, int]  # tokens of the anchor axis and of the other one
    block: tuple[int, int]
    evaluate: Evaluate

    def flip(self) -> Blocks:
        """The same blocks with the axes exchanged."""
        order = np.lexsort((self.anchor, self.other))
        return Blocks(
            self.other[order],
            self.anchor[order],
            self.kind[order],
            self.tiles.transpose(1, 2),
            self.lengths[::-1],
            self.block[::-1],
            lambda anchor, other: self.evaluate(other, anchor).transpose(1, 2),
        )

    def assemble(self, kinds: np.ndarray, size: int, n: int) -> Tensor:
        """Bool ``[tiles, size, n]`` from the kinds of the blocks of each tile, ``[tiles, m]``."""
        picked = torch.from_numpy(np.where(kinds < 0, len(self.tiles), kinds))
        whole = torch.ones(1, *self.block, dtype=torch.bool)
        found = torch.cat([self.tiles, whole])[picked]
        return found.transpose(1, 2).reshape(len(kinds), self.block[0], -1)[:, :size, :n]

    def in_call(self, batch: Batch, tiles: slice) -> Tensor:
        """The masks of some tiles of a batch that keeps none."""
        assert batch.kinds is not None
        assert batch.blocks is not None
        kinds, others = batch.kinds[tiles], batch.blocks[tiles]
        if not bool((kinds == OPEN).any()):
            return self.assemble(kinds.numpy(), batch.size, batch.n)
        found = torch.ones(*kinds.shape, *self.block, dtype=torch.bool)
        tile, m = (kinds == OPEN).nonzero().unbind(1)
        found[tile, m] = self.evaluate(batch.anchors[tiles][tile], others[tile, m])
        return found.transpose(1, 2).reshape(len(kinds), self.block[0], -1)[:, : batch.size, : batch.n]


def make_batches(blocks: Blocks, views: bool = True) -> list[Batch]:
    """The batches of all anchor blocks that meet anything. ``views=False``: tokens are reordered, and gathered."""
    rows, first = np.unique(blocks.anchor, return_index=True)
    if not len(rows):
        return []
    ends = np.append(first[1:], len(blocks.anchor))
    (la, lo), (ba, bo) = blocks.lengths, blocks.block
    missing = np.where(blocks.other[ends - 1] == -(-lo // bo) - 1, -(-lo // bo) * bo - lo, 0)
    tokens = (ends - first) * bo - missing
    sizes = np.minimum(ba, la - rows * ba)
    close = (blocks.other[ends - 1] - blocks.other[first] + 1 == ends - first) & views

    groups: dict[tuple[int, int, bytes], list[int]] = {}
    for r in range(len(rows)):
        kind = blocks.kind[first[r] : ends[r]]
        name = b"" if (kind == FULL).all() else b"open" if (kind == OPEN).any() else kind.tobytes()
        groups.setdefault((int(sizes[r]), int(tokens[r]), name), []).append(r)

    found: list[Batch] = []
    rest: dict[tuple[int, int, bytes], list[int]] = {}
    kept = 0
    for (size, n, name), members in groups.items():
        left = []
        for run in _runs(members, rows, blocks.other[first], close):
            if close[run[0]] and name != b"open" and (len(run) >= RUN or size * n >= ALONE):
                found.append(_view(blocks, run, rows, first, ends, size, n, name))
            else:
                left += run
        if left:
            own = name if name in (b"", b"open") or len(left) >= RUN else b"mixed"
            rest.setdefault((size, n, own), []).extend(left)
    for (size, n, name), members in rest.items():
        kept += len(members) * size * n if name == b"mixed" else 0
        found.append(_gathered(blocks, sorted(members), rows, first, ends, size, n, name, kept <= MASKS))
    return found


def _runs(members: list[int], rows: np.ndarray, start: np.ndarray, close: np.ndarray) -> Iterator[list[int]]:
    """Members in sequences of equal steps of both axes; what is not close is a sequence of its own."""
    run: list[int] = []
    step: tuple[int, int] | None = None
    for r in members:
        if run and close[r] and close[run[-1]]:
            here = (int(rows[r] - rows[run[-1]]), int(start[r] - start[run[-1]]))
            if (step is None or here == step) and here[1] >= 0:
                run.append(r)
                step = here
                continue
        if run:
            yield run
        run, step = [r], None
    if run:
        yield run


def _view(
    blocks: Blocks,
    run: list[int],
    rows: np.ndarray,
    first: np.ndarray,
    ends: np.ndarray,
    size: int,
    n: int,
    name: bytes,
) -> Batch:
    a, b = run[0], run[min(1, len(run) - 1)]
    bo = blocks.block[1]
    start = int(blocks.other[first[a]])
    masks = None if not name else blocks.assemble(blocks.kind[None, first[a] : ends[a]], size, n)
    return Batch(
        anchors=torch.from_numpy(rows[run]),
        size=size,
        n=n,
        step=max(int(rows[b] - rows[a]), 1),
        start=start * bo,
        shift=(int(blocks.other[first[b]]) - start) * bo,
        blocks=None,
        masks=masks,
        which=None,
        kinds=None,
    )


def _gathered(
    blocks: Blocks,
    members: list[int],
    rows: np.ndarray,
    first: np.ndarray,
    ends: np.ndarray,
    size: int,
    n: int,
    name: bytes,
    keep: bool,
) -> Batch:
    m = int(ends[members[0]] - first[members[0]])
    at = first[members][:, None] + np.arange(m)
    masks = which = kinds = None
    if name == b"mixed" and keep:
        different, number = np.unique(blocks.kind[at], axis=0, return_inverse=True)
        masks, which = blocks.assemble(different, size, n), torch.from_numpy(number.reshape(-1))
    elif name in (b"mixed", b"open"):
        kinds = torch.from_numpy(blocks.kind[at])
    elif name:
        masks = blocks.assemble(blocks.kind[at[:1]], size, n)
    steps = np.diff(rows[members])
    even = len(set(steps.tolist())) <= 1
    return Batch(
        anchors=torch.from_numpy(rows[members]),
        size=size,
        n=n,
        step=(int(steps[0]) if len(steps) else 1) if even else None,
        start=0,
        shift=None,
        blocks=torch.from_numpy(blocks.other[at].astype(np.int64)),
        masks=masks,
        which=which,
        kinds=kinds,
    )
