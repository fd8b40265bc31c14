"""The blocks that a route keeps beside what it lists, and what of them it allows.

They hang on no tensor, so where tokens are in order they are settled once and kept by value of the pattern.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard.kernels.request import kept_layout
from regard.kernels.routed_kinds import ABSENT, Kinds
from regard.patterns.decided import Routed
from regard.patterns.pattern import Pattern

__all__ = ["Entries", "kept_entries"]

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns and kinds of blocks, sorted by row
KindOf = Callable[[Pattern | None, np.ndarray, np.ndarray], np.ndarray]


class _Static(NamedTuple):
    rows: np.ndarray
    cols: np.ndarray
    kind: np.ndarray
    bits: Tensor

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.cols.nbytes + self.kind.nbytes + self.bits.nbytes


_KEPT: OrderedDict[Any, _Static] = OrderedDict()
_KEPT_BYTES = 1 << 27


def kept_entries(
    keep: Pattern,
    routed: Routed,
    sizes: tuple[int, int],
    members: list[int],
    listed: tuple[np.ndarray, np.ndarray],
    kinds: Kinds,
    kind_of: KindOf,
) -> Entries:
    """Blocks with a pair of ``keep`` that are not listed, of the lists `members`; `keep` tells no heads apart.

    Args:
        listed: rows (``list * rows + row``) and columns of what is listed, ascending.
        kind_of: the kinds of such blocks under a pattern.
    """
    n_rows, n_cols = routed.n_rows, routed.n_columns
    if routed.ordered:
        i, j = (x.reshape(-1) for x in np.indices((n_rows, n_cols)))
        own = None
    else:
        i, j, own = _static(keep, routed, sizes, kinds)
    unit = np.asarray(members, np.int64)[:, None]
    at, to = (unit * n_rows + i).reshape(-1), np.broadcast_to(j, (len(members), len(j))).reshape(-1)
    code, have = at * n_cols + to, listed[0] * n_cols + listed[1]
    new = np.ones(len(code), bool)
    if len(have):
        new = have[np.minimum(np.searchsorted(have, code), len(have) - 1)] != code
    at, to = at[new], to[new]
    kind = kind_of(keep, at, to) if own is None else np.broadcast_to(own, (len(members), len(j))).reshape(-1)[new]
    there = kind != ABSENT
    return at[there], to[there], kind[there]


def _static(keep: Pattern, routed: Routed, sizes: tuple[int, int], kinds: Kinds) -> Entries:
    """Rows, columns and kinds, in the numbers of `kinds`, of all blocks with a pair of ``keep``."""
    key = (keep, routed.q_len, routed.kv_len, sizes, routed.q_start)
    found = _KEPT.get(key)
    if found is None:
        layout = kept_layout(keep, routed.q_len, routed.kv_len, sizes, routed.q_start)
        rows, cols = layout.rows.numpy(), layout.indices.numpy().astype(np.int64)
        alone = Kinds(kinds.q, kinds.k, kinds.frame, kinds.kv_len)
        kind = alone.of(keep, rows, cols)
        if alone.late:  # masks too many to be kept
            return rows, cols, kinds.of(keep, rows, cols)
        bits = torch.cat(alone.bits) if alone.bits else torch.zeros(0, *sizes, dtype=torch.bool)
        found = _KEPT[key] = _Static(rows, cols, kind, bits)
        while len(_KEPT) > 1 and sum(x.nbytes for x in _KEPT.values()) > _KEPT_BYTES:
            _KEPT.popitem(last=False)
    else:
        _KEPT.move_to_end(key)
    return found.rows, found.cols, kinds.adopt(found.kind, found.bits)
