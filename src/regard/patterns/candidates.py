"""Which key blocks a row of queries may choose from."""

from __future__ import annotations

from collections import OrderedDict

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.patterns.layout import block_size
from regard.patterns.order import Order
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.static import Full

__all__ = ["candidates"]

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
    key: tuple[object, ...] = (within, q_len, kv_len, sizes, start, order)
    try:
        found = _KEPT.get(key)
    except TypeError:
        key, found = (), None
    if found is None:
        if order is None:
            within.fits(q_len, kv_len, start)
            found = within.layout(q_len, kv_len, sizes, start).dense()[0]
        else:
            if (q_len, kv_len, start) != (order.n, order.n, 0):
                raise ValueError(f"order is of {order.n} tokens, got q_len={q_len}, kv_len={kv_len}, q_start={start}")
            found = within.permute(order).layout(order.n_padded, order.n_padded, sizes, 0).dense()[0]
        if key:
            _KEPT[key] = found
            while len(_KEPT) > 1 and sum(x.numel() for x in _KEPT.values()) > _KEPT_BYTES:
                _KEPT.popitem(last=False)
    else:
        _KEPT.move_to_end(key)
    heads = found.shape[1]
    if heads > 1 and heads != decisions:
        if heads % decisions:
            raise ValueError(f"within tells {heads} heads apart, which {decisions} decisions do not divide")
        found = found.unflatten(1, (decisions, -1)).any(2)
    return found if device is None else found.to(device)
