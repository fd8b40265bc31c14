"""Layouts of patterns that look the same from every frame: each row is a slice of one long row."""

from __future__ import annotations

import numpy as np
import torch

from regard.patterns import states as st
from regard.patterns.layout import BlockLayout
from regard.patterns.pattern import Pattern, layout_of

__all__ = ["sliced"]


def sliced(middle: Pattern, frames: int, tokens: int, frame: st.Frame, sink: bool) -> BlockLayout:
    """The layout of a video whose pairs depend on the distance of frames, made of the blocks of one frame's queries.

    Args:
        middle: the same pattern over ``2 frames - 1`` frames, of which the middle one's queries are looked at.
        frames, tokens: of the video. Both block sizes must divide ``tokens``, and the query block the queries.
        frame: queries and keys; the keys are all there are.
        sink: whether every query meets the whole first frame.
    """
    rows, columns = tokens // frame.bq, tokens // frame.bk  # blocks of a frame
    all_keys = (2 * frames - 1) * tokens
    long = layout_of([middle], st.Frame((frames - 1) * tokens, tokens, 0, all_keys, frame.bq, frame.bk, all_keys))
    indices, full, indptr = long.indices.numpy(), long.full.numpy(), long.indptr.numpy()
    keys = indices + np.repeat(np.arange(rows), np.diff(indptr)) * 2 * frames * columns
    starts = np.arange(rows)[:, None] * 2 * frames * columns + np.arange(2 * frames) * columns
    edges = np.searchsorted(keys, starts)  # where each frame of each long row begins

    first, count = frame.q_start // frame.bq, frame.q_len // frame.bq
    own, row = np.divmod(np.arange(first, first + count), rows)
    begin, end = edges[row, frames - 1 - own + sink], edges[row, 2 * frames - 1 - own]
    extra = columns * sink
    ends = np.cumsum(end - begin + extra)
    out, whole = np.empty(ends[-1], np.int32), np.empty(ends[-1], bool)
    shift = ((frames - 1 - own) * columns).astype(np.int32)
    first_frame = np.arange(extra, dtype=np.int32)
    for a, z, stop, back in zip(begin.tolist(), end.tolist(), ends.tolist(), shift, strict=True):
        start = stop - (z - a)
        np.subtract(indices[a:z], back, out=out[start:stop])
        whole[start:stop] = full[a:z]
        if extra:
            out[start - extra : start], whole[start - extra : start] = first_frame, True
    counts = np.append(0, ends)
    return BlockLayout(
        torch.from_numpy(counts),
        torch.from_numpy(out),
        torch.from_numpy(whole),
        frame.q_len,
        frame.kv_len,
        (frame.bq, frame.bk),
    )
