"""Which key blocks a row of queries may choose from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.layout import block_size
from regard.patterns.order import Order
from regard.patterns.pattern import CHUNK, Pattern, resolve_q_start
from regard.patterns.static import Full

__all__ = ["candidates", "last_keys"]

_KEPT: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_KEPT_BYTES = 1 << 26


def candidates(
    within: Pattern | None,
    q_len: int,
    kv_len: int,
    block: int | tuple[int, int],
    *,
    q_start: int | None = None,
    decisions: int = 1,
    order: Order | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "samples decisions rows columns"]:
    """Blocks that hold an allowed pair: any of the row's queries may see any of the block's keys.

    ``samples`` and ``decisions`` are 1 where all are alike; where `within` tells more heads apart than there are
    decisions, a block is a candidate if it is one for any head of the decision. With an order, blocks are of its slots.
    """
    sizes, start = block_size(block), resolve_q_start(q_len, kv_len, q_start)
    within = Full() if within is None else within

    def make() -> Tensor:
        if order is None:
            within.fits(q_len, kv_len, start)
            return within.layout(q_len, kv_len, sizes, start).dense()[0]
        if (q_len, kv_len, start) != (order.n, order.n, 0):
            raise ValueError(f"order is of {order.n} tokens, got q_len={q_len}, kv_len={kv_len}, q_start={start}")
        return within.permute(order).layout(order.n_padded, order.n_padded, sizes, 0).dense()[0]

    found = _kept(("blocks", within, q_len, kv_len, sizes, start, order), make)
    found = _grouped(found, decisions)
    return found if device is None else found.to(device)


def last_keys(
    within: Pattern,
    q_len: int,
    kv_len: int,
    block: tuple[int, int],
    *,
    q_start: int,
    decisions: int = 1,
    device: torch.device | str | None = None,
) -> Int[Tensor, "samples decisions rows"]:
    """The last key that any query of each row may see, -1 where there is none; shaped as `candidates` is."""

    def make() -> Tensor:
        may = candidates(within, q_len, kv_len, block, q_start=q_start, decisions=within.heads or 1)
        (bq, bk), n_kv = block, may.shape[3]
        last = n_kv - 1 - may.flip(-1).int().argmax(-1)
        head = torch.arange(may.shape[1])[:, None, None, None]
        sample = torch.arange(may.shape[0])[:, None, None, None, None]
        found = []
        step = max(1, CHUNK // (bq * bk * may.shape[0] * may.shape[1]))
        for row in torch.arange(may.shape[2]).split(step):
            q = (row[:, None, None] * bq + torch.arange(bq)[:, None]).clamp(max=q_len - 1) + q_start
            k = last[:, :, row, None, None] * bk + torch.arange(bk)
            seen = within.allows(q, k.clamp(max=kv_len - 1), head, sample) & (k < kv_len)
            found.append(torch.where(seen, k, -1).amax((-1, -2)))
        return torch.where(may.any(-1), torch.cat(found, 2), -1)

    found = _grouped(_kept(("last", within, q_len, kv_len, block, q_start), make), decisions)
    return found if device is None else found.to(device)


def _grouped(found: Tensor, decisions: int) -> Tensor:
    """Heads put together that share a decision: the largest of their values."""
    heads = found.shape[1]
    if heads in (1, decisions):
        return found
    if heads % decisions:
        raise ValueError(f"within tells {heads} heads apart, which {decisions} decisions do not divide")
    return found.unflatten(1, (decisions, -1)).amax(2)


def _kept(key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
    """What was made before for the same key: the latest used, `_KEPT_BYTES` in all, none for keys without a hash."""
    try:
        found = _KEPT.get(key)
    except TypeError:
        return make()
    if found is None:
        found = _KEPT[key] = make()
        while len(_KEPT) > 1 and sum(x.numel() * x.element_size() for x in _KEPT.values()) > _KEPT_BYTES:
            _KEPT.popitem(last=False)
    else:
        _KEPT.move_to_end(key)
    return found
