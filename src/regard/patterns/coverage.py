"""How far a pattern carries over layers: what a query can reach, and how much of each token arrives.

A pattern is a graph with an edge from key k to query q wherever the pair is allowed; L layers are paths of L edges.
Heads (and samples) that a pattern tells apart are united in `reach` and averaged in `influence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, expm1
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.boxes import axis_rows
from regard.patterns.pattern import CHUNK, Pattern

__all__ = ["centers", "depth", "first_gap", "influence", "reach"]

Layers = Pattern | Sequence[Pattern]
Keys = Int[Tensor, "intervals 2"]
STEP = 1 << 15  # queries whose rows are held at once


def reach(pattern: Layers, layers: int, query: int, length: int) -> Keys:
    """The input tokens that a query's output depends on after so many layers, as sorted disjoint intervals ``[m, 2]``.

    ``R <- union of the keys of R``, from the last layer down: exact, from the rows of R's runs, never L x L.

    Args:
        pattern: one for all layers, or one a layer, the first layer first.
        layers: how many; 0 gives the query itself.
        query: whose output, in [0, length).
        length: tokens.

    Raises:
        ValueError: a query outside the tokens, layers < 0, or another number of patterns than layers.
    """
    found = _start(pattern, query, length)
    for layer in _top_down(pattern, layers):
        found = _keys(layer, found, length)
    return found


def depth(pattern: Layers, query: int, length: int, *, whole: bool = False) -> int | None:
    """The least number of layers after which `reach` holds every token ``[0, query]``; None if it never does.

    Args:
        pattern: one for all layers, or a period of layers, the first one first, of which the query's layer is the last.
        query, length: as `reach`.
        whole: ask for all `length` tokens, those after the query too.
    """
    found = _start(pattern, query, length)
    wanted = found.new_tensor([[[0, length if whole else query + 1]]])
    period = [pattern] if isinstance(pattern, Pattern) else list(pattern)[::-1]
    seen: set[tuple[int, tuple[int, ...]]] = set()
    layers = 0
    while not _covers(found, wanted, length):
        state = (layers % len(period), tuple(found.flatten().tolist()))
        if state in seen:
            return None
        seen.add(state)
        found = _keys(period[layers % len(period)], found, length)
        layers += 1
    return layers


def first_gap(pattern: Layers, layers: int, query: int, length: int) -> int | None:
    """The smallest distance ``query - k >= 0`` that `reach` leaves out after so many layers; None if none is."""
    missing = iv.complement(reach(pattern, layers, query, length)[None], length)[0]
    below = [(lo, hi) for lo, hi in missing.tolist() if lo < hi and lo <= query]
    return max(0, query + 1 - below[-1][1]) if below else None


def influence(
    pattern: Layers,
    layers: int,
    query: int,
    length: int,
    *,
    weights: Literal["uniform", "decay"] = "uniform",
    decay: float | int | None = None,
    residual: float | int = 0.0,
) -> Float[Tensor, "{layers} {length}"]:
    """The share of each input token in a query's output, after 1, 2, ... layers: the rollout of the mask.

    ``r <- residual * r + (1 - residual) * r A`` from ``r = e_query``, with A row-stochastic over the allowed keys:
    uniform, ``A[q, k] = 1 / n_q``, or with a decay m ``A[q, k] ~ exp(-m (q - k))``. Row t is the share over the last
    t + 1 layers. A query without keys passes nothing on. Attention rollout over masks (arXiv 2502.01951).

    Uniform takes any pattern, O(length * intervals of a row) a layer; a decay takes causal windows (every query sees
    its last w keys), O(length log w) a layer.

    Args:
        pattern, layers, query, length: as `reach`.
        weights: "uniform", or "decay" with `decay`; a decay alone is enough.
        decay: m >= 0, by position.
        residual: weight of the residual connection, in [0, 1].

    Returns:
        float64 ``[layers, length]``, exact to rounding (absolute: about 1e-15); rows sum to 1 where every query has a
        key, and tokens that nothing reaches have exactly 0.
    """
    if weights not in ("uniform", "decay") or (weights == "decay" and decay is None):
        raise ValueError(f"weights must be 'uniform', or 'decay' with decay=m, got {weights!r} with decay={decay}")
    if decay is not None and not decay >= 0:
        raise ValueError(f"decay must be >= 0, got {decay}")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must be in [0, 1], got {residual}")
    _start(pattern, query, length)
    row = torch.zeros(length, dtype=torch.float64)
    row[query] = 1
    out = row.new_zeros(layers, length)
    widths: dict[Pattern, int] = {}
    for t, layer in enumerate(_top_down(pattern, layers)):
        parts = _parts(layer)
        if decay is not None:
            widths.update({p: _causal_width(p, length) for p in parts if p not in widths})
            mixed = [_decayed(row, widths[p], float(decay)) for p in parts]
        else:
            mixed = [_uniform(p, row, length) for p in parts]
        row = residual * row + (1 - residual) * sum(mixed[1:], mixed[0]) / len(mixed)
        out[t] = row
    return out


def centers(pattern: Pattern, length: int) -> Keys:
    """The tokens that every query reaches at some depth, as sorted disjoint intervals (none: ``[0, 2]``).

    Where attention has no residual, depth moves all weight to them: token 0 under `Causal`, the prefix under `Prefix`,
    every token in a two-sided window. They are the one set of tokens that reach each other and nothing else, if there
    is just one such set. A token reaches itself (depth 0).
    """
    _start(pattern, 0, length)
    found = _closure(pattern, torch.tensor([[0, 1]]), length)
    turn = 0
    while True:  # down to a set that leads nowhere else
        members = _members(found)
        pick = int(members[(0, len(members) - 1, len(members) // 2)[turn % 3]])
        turn += 1
        below = _closure(pattern, torch.tensor([[pick, pick + 1]]), length)
        same = _reached_by(pattern, pick, length) & _indicator(below, length)
        if int(same.sum()) == int(iv.length(below[None])):
            break
        found = _runs(_indicator(below, length) & ~same)
    everyone = _reached_by(pattern, pick, length)
    return below if bool(everyone.all()) else below[:0]


def _start(pattern: Layers, query: int, length: int) -> Tensor:
    if not 0 <= query < length:
        raise ValueError(f"query must lie in [0, length), got query={query}, length={length}")
    each = [pattern] if isinstance(pattern, Pattern) else list(pattern)
    if not each or not all(isinstance(p, Pattern) for p in each):
        raise ValueError(f"pattern must be a Pattern or a list of them, one a layer, got {pattern!r}")
    for one in each:
        one.fits(length, length, 0)
    return torch.tensor([[query, query + 1]])


def _top_down(pattern: Layers, layers: int) -> list[Pattern]:
    if layers < 0:
        raise ValueError(f"layers must be >= 0, got {layers}")
    if isinstance(pattern, Pattern):
        return [pattern] * layers
    if len(pattern) != layers:
        raise ValueError(f"layers must be the number of patterns, {len(pattern)}, got {layers}")
    return list(pattern)[::-1]


def _parts(pattern: Pattern) -> list[Pattern]:
    """The pattern of each head and sample; itself where all are alike."""
    heads, samples = range(pattern.heads or 1), range(pattern.samples or 1)
    return [pattern.of(h, s) for s in samples for h in heads]


def _keys(pattern: Pattern, queries: Tensor, length: int) -> Tensor:
    """Union of the keys of the queries in a set of intervals."""
    found = queries.new_zeros(1, 0, 2)
    queries = queries[queries[:, 0] < queries[:, 1]]
    for part in dict.fromkeys(_parts(pattern)):
        rows = axis_rows(part, queries[:, 0], queries[:, 1], length)
        if rows is not None and rows.exact[0]:
            found = iv.union(found, rows.any.flatten(0, 1)[None], length)
            continue
        for _, keys in _single(part, _members(queries), length):
            found = iv.union(found, keys.flatten(0, 1)[None], length)
    return found[0][found[0, :, 0] < found[0, :, 1]]


def _single(pattern: Pattern, queries: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries, some at a time, with the keys of each as intervals: from its rows, else from its pairs."""
    step = STEP
    while len(queries):
        some, rest = queries[:step], queries[step:]
        rows = pattern.rows(some, some + 1, length)
        if rows is None or not rows.exact[0]:
            step = max(1, CHUNK // length)
            some, rest = queries[:step], queries[step:]
            allowed = pattern.allows(some[:, None], torch.arange(length)[None]).expand(len(some), length)
            keys = _row_intervals(allowed)
        else:
            keys = rows.any
        yield some, keys
        queries = rest


def _row_intervals(allowed: Bool[Tensor, "rows length"]) -> Int[Tensor, "rows m 2"]:
    edge = torch.nn.functional.pad(allowed.int(), (1, 1)).diff()
    begins, ends = (edge == 1).nonzero(), (edge == -1).nonzero()
    counts = (edge == 1).sum(1)
    nth = torch.arange(len(begins)) - (counts.cumsum(0) - counts)[begins[:, 0]]
    out = torch.zeros(len(allowed), int(counts.max()) if len(counts) else 0, 2, dtype=torch.long)
    out[begins[:, 0], nth, 0], out[begins[:, 0], nth, 1] = begins[:, 1], ends[:, 1]
    return out


def _covers(found: Tensor, wanted: Tensor, length: int) -> bool:
    return int(iv.length(iv.intersect(found[None], wanted, length))) == int(iv.length(wanted))


def _members(found: Tensor) -> Tensor:
    return torch.cat([torch.arange(lo, hi) for lo, hi in found.tolist()] or [found.new_zeros(0)])


def _indicator(found: Tensor, length: int) -> Tensor:
    inside = torch.zeros(length, dtype=torch.bool)
    inside[_members(found)] = True
    return inside


def _runs(inside: Tensor) -> Tensor:
    return _row_intervals(inside[None])[0]


def _closure(pattern: Pattern, found: Tensor, length: int) -> Tensor:
    """Everything reached at any depth, 0 included."""
    new = found
    while len(new):
        more = iv.union(found[None], _keys(pattern, new, length)[None], length)[0]
        more = more[more[:, 0] < more[:, 1]]
        new = iv.intersect(more[None], iv.complement(found[None], length), length)[0]
        found, new = more, new[new[:, 0] < new[:, 1]]
    return found


def _reached_by(pattern: Pattern, key: int, length: int) -> Tensor:
    """Which queries reach a key at some depth, 0 included: each round those whose keys meet the ones before."""
    inside = torch.zeros(length, dtype=torch.bool)
    inside[key] = True
    while True:
        before = torch.nn.functional.pad(inside.long().cumsum(0), (1, 0))
        more = inside.clone()
        for part in dict.fromkeys(_parts(pattern)):
            for queries, keys in _single(part, (~more).nonzero().flatten(), length):
                more[queries] |= (before[keys[..., 1]] > before[keys[..., 0]]).any(1)
        if torch.equal(more, inside):
            return inside
        inside = more


def _uniform(pattern: Pattern, row: Tensor, length: int) -> Tensor:
    """``row @ A`` for uniform A: query q adds ``r_q / n_q`` over its intervals, as differences and one running sum."""
    steps, ends = row.new_zeros(length + 1), torch.zeros(length + 1, dtype=torch.long)
    for queries, keys in _single(pattern, row.nonzero().flatten(), length):
        n = iv.length(keys)
        there = keys[..., 0] < keys[..., 1]
        each = (row[queries] / n.clamp(min=1))[:, None] * there
        for side, sign in ((0, 1), (1, -1)):
            steps.index_add_(0, keys[..., side].flatten(), sign * each.flatten())
            ends.index_add_(0, keys[..., side].flatten(), sign * there.flatten().long())
    touched = ends.cumsum(0)[:length] > 0
    return torch.where(touched, steps.cumsum(0)[:length].clamp(min=0), 0)  # rounding leaves no mass where none came


def _causal_width(pattern: Pattern, length: int) -> int:
    """w, where every query q sees exactly its last keys ``(q - w, q]``."""
    width = 0
    for queries, keys in _single(pattern, torch.arange(length), length):
        n = iv.length(keys)
        width = max(width, int(n.max()))
        full = (keys[..., 1].amax(1) == queries + 1) & (n == (queries + 1).clamp(max=width))
        one = (keys[..., 0] < keys[..., 1]).sum(1) == 1
        if not bool((full & one).all()):
            raise ValueError(f"decay takes causal windows, where every query sees just its last keys, got {pattern!r}")
    return width


def _decayed(row: Tensor, width: int, m: float) -> Tensor:
    """``row @ A`` for ``A[q, k] ~ exp(-m (q - k))`` over the last `width` keys, by sums of doubled reach."""
    length = len(row)
    n = torch.arange(1, length + 1, dtype=torch.float64).clamp(max=width)
    norm = n if m == 0 else torch.expm1(-m * n) / expm1(-m)
    doubled, total, offset, span = row / norm, torch.zeros_like(row), 0, 1

    def later(x: Tensor, by: int) -> Tensor:
        return torch.nn.functional.pad(x[by:], (0, min(by, length))) * exp(-m * by)

    while span <= width:  # doubled[k] = sum over j < span of exp(-m j) row[k + j] / norm[k + j]
        if width & span:
            total, offset = total + later(doubled, offset), offset + span
        doubled, span = doubled + later(doubled, span), 2 * span
    return total
