"""Single pairs of a routed pattern."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.patterns import listed as ls

if TYPE_CHECKING:
    from regard.patterns.decided import Routed

__all__ = ["each_group", "need_disjoint", "selected"]


def selected(routed: Routed, q_idx: Tensor, kv_idx: Tensor, decision: Tensor | None, sample: Tensor | None) -> Tensor:
    """Whether pairs were listed, before ``keep`` and ``within``; the arguments broadcast."""
    r, device = routed, q_idx.device
    zero = torch.zeros((), dtype=torch.long, device=device)
    d, b = (zero if x is None else x for x in (decision, sample))
    shape = torch.broadcast_shapes(q_idx.shape, kv_idx.shape, d.shape, b.shape)
    q = q_idx - r.q_start
    there = (q >= 0) & (q < r.q_len) & (kv_idx >= 0) & (kv_idx < r.kv_len)
    there = (there & (d >= 0) & (d < r.decisions) & (b >= 0) & (b < r.batch)).expand(shape)
    if 0 in (r.q_len, r.kv_len) or there.numel() == 0:
        return torch.zeros(shape, dtype=torch.bool, device=device)
    q, k = q.clamp(0, r.q_len - 1).long(), kv_idx.clamp(0, r.kv_len - 1).long()
    d, b = d.clamp(0, r.decisions - 1).long(), b.clamp(0, r.batch - 1).long()
    if r.which is not None:
        found = torch.zeros(shape, dtype=torch.bool, device=device)
        assert r.patterns is not None
        mine = r.which.to(device)[b, d]
        for n, pattern in enumerate(r.patterns):
            if bool((r.which == n).any()):
                found = found | ((mine == n) & pattern.allows(q_idx, kv_idx))
        return found & there
    if r.start is not None and r.stop is not None:
        row = q // r.block[0]
        found = torch.zeros(shape, dtype=torch.bool, device=device)
        for n in range(r.start.shape[3]):
            lo, hi = (x.to(device)[b, d, row, n] for x in (r.start, r.stop))
            found = found | ((lo <= k) & (k < hi))
        return found & there
    q_slots = _slots(r.q_order, r.q_len, q, d, b)
    k_slots = _slots(r.kv_order, r.kv_len, k, d, b)
    lead, listed = b * r.decisions + d, r.codes.to(device)
    found = torch.zeros(shape, dtype=torch.bool, device=device)
    for i in q_slots:
        for j in k_slots:
            code = (lead * r.n_rows + i // r.block[0]) * r.n_columns + j // r.block[1]
            code, real = torch.broadcast_tensors(code, (i >= 0) & (j >= 0))
            found = found | (ls.holds(listed, code) & real)
    return found & there


def _slots(order: Tensor | None, length: int, idx: Tensor, decision: Tensor, sample: Tensor) -> list[Tensor]:
    """The slots of tokens, one tensor for each that a token can have; -1: none."""
    if order is None:
        return [idx]
    found = ls.places(order, length).to(idx.device)
    d = decision if order.shape[1] > 1 else torch.zeros_like(decision)
    b = sample if order.shape[0] > 1 else torch.zeros_like(sample)
    return [found[b, d, idx, n] for n in range(found.shape[-1])]


def each_group(routed: Routed) -> Iterator[tuple[Tensor, Tensor]]:
    """Of groups: for the first group of every query, then the second, ...: the pairs of that group alone inside
    ``within``, bool ``[samples, heads, q_len, kv_len]``, and which queries have one, ``[samples, heads, q_len]``.

    Dense: for the reference backend, and for what is judged pair by pair.
    """
    r = routed
    assert r.q_order is not None
    assert r.kv_order is not None
    heads, samples, device = r.heads or 1, r.samples or 1, r.device
    head = torch.arange(heads, device=device)[:, None, None]
    sample = torch.arange(samples, device=device)[:, None, None, None]
    decision = head // max(heads // r.decisions, 1)
    own = sample if r.batch > 1 else sample.new_zeros(1, 1, 1, 1)
    q, k = torch.arange(r.q_len, device=device)[:, None], torch.arange(r.kv_len, device=device)
    may = torch.ones((), dtype=torch.bool, device=device)
    if r.within is not None:
        may = r.within.allows(q + r.q_start, k, head, sample)
    k_slots = _slots(r.kv_order, r.kv_len, k, decision, own)
    for slot in _slots(r.q_order, r.q_len, q, decision, own):
        there = slot >= 0
        group = slot // r.block[0]
        pairs = torch.zeros((), dtype=torch.bool, device=device)
        for other in k_slots:
            pairs = pairs | ((other >= 0) & (other // r.block[1] == group))
        shape = (samples, heads, r.q_len, r.kv_len)
        yield (pairs & there & may).expand(shape), there.expand(*shape[:3], 1)[..., 0]


def need_disjoint(routed: Routed) -> None:
    """Refuse groups of which two hold the same query and the same key.

    Raises:
        ValueError: naming such a query.
    """
    r = routed
    assert r.q_order is not None
    assert r.kv_order is not None
    lead = (r.batch, r.decisions)
    queries = r.q_order.expand(*lead, -1).view(*lead, r.n_rows, r.block[0])
    keys = r.kv_order.expand(*lead, -1).view(*lead, r.n_rows, r.block[1])
    for b in range(lead[0]):
        for d in range(lead[1]):
            in_group = [torch.zeros(r.n_rows, n + 1, dtype=torch.float32, device=r.device) for n in (r.q_len, r.kv_len)]
            for table, tokens, n in zip(in_group, (queries[b, d], keys[b, d]), (r.q_len, r.kv_len), strict=True):
                table.scatter_(1, torch.where(tokens < 0, n, tokens), 1)
            meets = in_group[0][:, :-1].T @ in_group[1][:, :-1]
            if bool((meets > 1).any()):
                query, key = (meets > 1).nonzero()[0].tolist()
                raise ValueError(
                    'repeats="merge" takes groups that share no key for the same query, got query '
                    f"{query} with key {key} in {int(meets[query, key])} groups (sample {b}, decision {d})"
                )
