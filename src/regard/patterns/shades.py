"""What a picture of a pattern shows: pairs one by one, densities of cells, or blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from regard.patterns import states as st

if TYPE_CHECKING:
    from regard.patterns.pattern import Pattern

__all__ = ["PAIRS", "Panel", "blocks", "densities", "pairs"]

PAIRS = 1 << 16  # pairs drawn one by one; more are drawn as densities
SIDE = 64  # cells or blocks a side, at most
SAMPLES = 64  # queries that a row of cells is estimated from
WORK = 1 << 22  # interval ends or pairs worked on at once
EVALUATED = 1 << 26  # pairs evaluated at most for a pattern without rows


class Panel(NamedTuple):
    """One square of a picture.

    ``cells``: the share of allowed pairs of each cell, ``[rows, columns]``. ``states``: 0 absent, 1 partial, 2 full,
    of each block of ``block`` cells; None where blocks are not asked for.
    """

    cells: np.ndarray | None
    states: np.ndarray | None
    block: tuple[int, int]
    title: str


def pairs(pattern: Pattern, q_len: int, kv_len: int, start: int) -> np.ndarray:
    """1.0 where a pair is allowed."""
    allowed = pattern.allows(torch.arange(start, start + q_len)[:, None], torch.arange(kv_len)[None])
    return allowed.expand(q_len, kv_len).numpy().astype(float)


def blocks(pattern: Pattern, q_len: int, kv_len: int, start: int, block: tuple[int, int]) -> np.ndarray:
    """State of each block; more than `SIDE` a side are put together."""
    layout = pattern.layout(q_len, kv_len, block, start)
    factor = (max(1, -(-layout.n_q_blocks // SIDE)), max(1, -(-layout.n_kv_blocks // SIDE)))
    some, every = (layout if factor == (1, 1) else layout.coarsen(factor)).dense()
    return (some.int() + every.int())[0, 0].numpy()


def densities(pattern: Pattern, q_len: int, kv_len: int, start: int) -> np.ndarray:
    """The share of allowed pairs in each of at most `SIDE` x `SIDE` cells.

    Estimated from at most `SAMPLES` queries of a row of cells, with all their keys; but a cell that is surely empty or
    full is 0 or 1, and one that is surely neither is neither.
    """
    cq, ck = -(-q_len // SIDE), -(-kv_len // SIDE)
    frame = st.Frame(start, q_len, 0, kv_len, cq, ck, kv_len)
    known = pattern.states(frame, 0, frame.n_q)
    lengths = np.diff(known.at, append=known.rows * known.cols)
    sure = np.repeat(known.bits, lengths).reshape(known.rows, known.cols)
    most = SAMPLES if pattern.closed_form else max(2, min(SAMPLES, EVALUATED // max(frame.n_q * kv_len, 1)))
    out = np.zeros((frame.n_q, frame.n_kv))
    for i in range(frame.n_q):
        size = min(cq, q_len - i * cq)
        # Steps of the golden ratio: no period of a pattern falls in with them.
        spread = np.arange(min(size, most)) * 0.6180339887498949 % 1
        queries = np.unique(np.arange(size) if size <= most else (spread * size).astype(np.int64))
        out[i] = _shares(pattern, torch.from_numpy(queries + start + i * cq), frame)
    neither = (sure & st.ABSENT == 0) & (sure & st.FULL == 0)
    out = np.where(neither, out.clip(0.01, 0.99), out)
    return np.where(sure == st.ABSENT, 0.0, np.where(sure == st.FULL, 1.0, out))


def _shares(pattern: Pattern, queries: torch.Tensor, frame: st.Frame) -> np.ndarray:
    """Mean over these queries of the share of each cell's keys that they may see."""
    edges = np.minimum(np.arange(frame.n_kv + 1) * frame.bk, frame.kv_len)
    before = np.zeros(len(edges))
    lo, step = 0, 1  # the first query tells how many there can be at once
    while lo < len(queries):
        part = queries[lo : lo + step]
        rows = pattern.rows(part, part + 1, frame.kv_len)
        if rows is None:
            allowed = pattern.allows(part[:, None], torch.arange(frame.kv_len)[None]).expand(len(part), frame.kv_len)
            before += np.append(0, allowed.sum(0).cumsum(0).numpy())[edges]
            size = frame.kv_len
        else:
            ends = rows.any.numpy()[..., None]
            before += (np.minimum(edges, ends[..., 1, :]) - ends[..., 0, :]).clip(0).sum((0, 1))
            size = ends.shape[1] * len(edges)
        lo, step = lo + step, max(1, WORK // max(size, 1))
    return np.diff(before) / np.diff(edges) / len(queries)
