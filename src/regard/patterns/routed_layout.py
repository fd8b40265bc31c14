"""Blocks of a routed pattern, from the table of what it lists: all samples and heads at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regard.patterns import states as st
from regard.patterns.layout import BlockLayout
from regard.patterns.pattern import Pattern

if TYPE_CHECKING:
    from regard.patterns.decided import Routed

__all__ = ["Table", "kinds", "own_layout", "padded"]


@dataclass(frozen=True, eq=False)
class Table:
    """Blocks of a layout as FlexAttention has them: padded rows ``[samples, heads, rows, width]``."""

    index: Tensor
    """int32, key blocks, ascending; -1 after the last."""
    count: Tensor
    """int32 ``[samples, heads, rows]``."""
    full: Tensor
    """bool: every pair of the block is allowed; False for padding."""


def own_layout(routed: Routed) -> BlockLayout:
    """The layout at the route's own block: what it lists within `within`, and what `keep` adds. Without orders."""
    r = routed
    heads, samples, n_q, n_kv = r.heads or 1, r.samples or 1, r.n_rows, r.n_columns
    frame = st.Frame(r.q_start, r.q_len, 0, r.kv_len, *r.block, r.kv_len)
    cells, group = _listed(r, heads, samples)
    kind = np.full(len(cells), st.FULL, np.uint8)
    if r.within is not None:
        for within, groups in _alike(r.within, heads, samples).items():
            mine = np.flatnonzero(np.isin(group, groups)) if len(groups) < heads * samples else slice(None)
            kind[mine] = kinds(within, frame, cells[mine])
    there = kind != st.ABSENT
    code, full = group[there] * (n_q * n_kv) + cells[there], kind[there] == st.FULL
    if r.keep is not None:
        kept = (r.keep if r.within is None else r.keep & r.within).layout(r.q_len, r.kv_len, r.block, r.q_start)
        some, whole = _spread(kept, heads, samples)
        new = ~np.isin(some, code, assume_unique=True)
        code, full = np.concatenate([code, some[new]]), np.concatenate([full, whole[new]])
        order = np.argsort(code, kind="stable")
        code, full = code[order], full[order]
    row, column = np.divmod(code, max(n_kv, 1))
    indptr = np.zeros(samples * heads * n_q + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=len(indptr) - 1), out=indptr[1:])
    parts = [torch.from_numpy(x) for x in (indptr, column.astype(np.int32), full)]
    return BlockLayout(parts[0], parts[1], parts[2], r.q_len, r.kv_len, r.block, heads, samples)


def _listed(r: Routed, heads: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """``(row * columns + block, sample * heads + head)`` of each listed block, ascending in (group, cell)."""
    area = max(r.n_rows * r.n_columns, 1)
    own, cells = np.divmod(r.codes.cpu().numpy(), area)
    if (samples, heads) == (r.batch, r.decisions):
        return cells, own
    ends = np.searchsorted(own, np.arange(r.batch * r.decisions + 1))
    decision = np.array([r.decision(h) for h in range(heads)])
    sample = np.arange(samples) if r.batch > 1 else np.zeros(samples, np.int64)
    source = (sample[:, None] * r.decisions + decision).ravel()
    parts = [cells[ends[n] : ends[n + 1]] for n in source]
    return np.concatenate(parts), np.repeat(np.arange(len(source)), [len(p) for p in parts])


def _alike(pattern: Pattern, heads: int, samples: int) -> dict[Pattern, list[int]]:
    """The groups ``sample * heads + head`` of each different part."""
    found: dict[Pattern, list[int]] = {}
    for sample in range(samples):
        for head in range(heads):
            found.setdefault(pattern.of(head, sample), []).append(sample * heads + head)
    return found


def _spread(layout: BlockLayout, heads: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and fullness of a layout's blocks, repeated for all heads and samples."""
    area = layout.n_q_blocks * layout.n_kv_blocks
    code = layout.rows.numpy() * layout.n_kv_blocks + layout.indices.numpy()
    full = layout.full.numpy()
    own, cells = np.divmod(code, max(area, 1))
    h = np.arange(heads) if layout.heads > 1 else np.zeros(heads, np.int64)
    s = np.arange(samples) if layout.samples > 1 else np.zeros(samples, np.int64)
    source = (s[:, None] * layout.heads + h).ravel()
    ends = np.searchsorted(own, np.arange(layout.samples * layout.heads + 1))
    codes = [n * area + cells[ends[m] : ends[m + 1]] for n, m in enumerate(source)]
    return np.concatenate(codes), np.concatenate([full[ends[m] : ends[m + 1]] for m in source])


def kinds(pattern: Pattern, frame: st.Frame, cells: np.ndarray) -> np.ndarray:
    """ABSENT, PARTIAL or FULL of some blocks, ``row * columns + column``, of a pattern that tells no heads apart.

    Only what is asked about is settled.
    """
    if not len(cells):
        return np.zeros(0, np.uint8)
    states = pattern.states(frame, 0, frame.n_q)
    bits = states.bits[np.searchsorted(states.at, cells, side="right") - 1]
    open_ = np.flatnonzero(st.OPEN[bits])
    if len(open_):
        asked, back = np.unique(cells[open_], return_inverse=True)
        first = np.searchsorted(states.at, asked, side="right") - 1
        bits[open_] = st.settle_cells(asked, states.bits[first], pattern, frame)[back]
    return bits


def padded(layout: BlockLayout, device: torch.device) -> Table:
    """A layout in padded rows."""
    lead = (layout.samples, layout.heads, layout.n_q_blocks)
    counts = layout.counts
    width = int(counts.max()) if len(counts) else 0
    there = torch.arange(width) < counts[:, None]
    index = torch.full((len(counts), width), -1, dtype=torch.int32)
    full = torch.zeros(len(counts), width, dtype=torch.bool)
    index[there], full[there] = layout.indices, layout.full
    made = (index.view(*lead, width), counts.to(torch.int32).view(lead), full.view(*lead, width))
    return Table(*(x.to(device) for x in made))
