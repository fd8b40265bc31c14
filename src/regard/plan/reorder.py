"""One order of the tokens for each head, so that what it attends to becomes dense blocks (arXiv 2506.16054).

Tokens that a head lets meet lie far apart in memory where the head looks along the time axis, say. In the order with
that axis innermost they are neighbours, the same blocks serve many of them, and the other blocks stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.fused import row_expectation
from regard.kernels.tiles import Add, Frame, Reducer, Tile, tile_pass
from regard.patterns import AxisOrder, Order, Routed
from regard.patterns.layout import block_size
from regard.patterns.order import with_ends

__all__ = [
    "Figures",
    "axis_orders",
    "block_mass",
    "choose_order",
    "heaviest",
    "needed_density",
    "order_figures",
    "reordered",
]

Block = int | tuple[int, int]
QK = Float[Tensor, "batch heads length head_dim"]


def axis_orders(shape: Sequence[int]) -> list[AxisOrder]:
    """Every order of the axes of a grid, the grid's own first: 6 of three axes."""
    return [AxisOrder(tuple(shape), axes) for axes in permutations(range(len(shape)))]


def block_mass(
    q: QK,
    k: Float[Tensor, "batch kv_heads length head_dim"],
    orders: Sequence[Order],
    block: Block,
    *,
    prefix: int = 0,
    suffix: int = 0,
    **scope: Any,
) -> list[Float[Tensor, "batch heads q_blocks kv_blocks"]]:
    """``S[a, b]``, the mean over the queries of block a of the weight that falls on the keys of block b; one an order.

    An attention call whose values are the blocks' indicator columns, all orders in one: no map of pairs is made.

    Args:
        q, k: as the model has them, in memory order, of all tokens.
        orders: of the tokens between ``prefix`` and ``suffix``.
        block: tokens of a block, or ``(queries, keys)``, counted in the order, padding included.
        prefix, suffix: tokens (text) at either end that no order holds: as keys they take their part of the weights.
        scope: mask, is_causal, pattern, scale as in `regard.kernels.fused.row_expectation`.
    """
    bq, bk = block_size(block)
    n = _check(q, k, orders, prefix, suffix)
    columns = [_member(order, bk) for order in orders]
    features = torch.cat(columns, 1).to(q.device, q.dtype)
    features = torch.nn.functional.pad(features, (0, 0, prefix, suffix))
    expected, _ = row_expectation(q, k, features, **scope)
    image = expected[:, :, prefix : prefix + n].split([c.shape[1] for c in columns], -1)
    found = []
    for order, mass in zip(orders, image, strict=True):
        rows = _member(order, bq).to(mass)
        found.append((rows / rows.sum(0).clamp(min=1)).t() @ mass)
    return found


@dataclass(frozen=True, eq=False)
class Figures:
    """Two numbers of each order and head. Of several calls (prompts, steps) take the `mean`."""

    sparse: Float[Tensor, "orders heads"]
    """Share of the blocks with less mass than eps: large is good, they can be left out."""
    peak: Float[Tensor, "orders heads"]
    """Mean over blocks of the largest weight over the mean weight: small is good, few bits lose little."""

    @classmethod
    def mean(cls, parts: Sequence[Figures]) -> Figures:
        """Over calls of equal weight."""
        return cls(*(torch.stack([getattr(p, name) for p in parts]).mean(0) for name in ("sparse", "peak")))

    def score(self, a: float | int = 0.5) -> Float[Tensor, "orders heads"]:
        """``(sparse / sum sparse)^a (1 - peak / sum peak)^(1 - a)``, sums over the orders; none sparse: equal shares.

        ``a = 1`` asks for sparsity alone, ``a = 0`` for flat blocks alone.
        """
        if not 0 <= a <= 1:
            raise ValueError(f"a must be in [0, 1], got {a}")
        total = self.sparse.sum(0)
        share = torch.where(total > 0, self.sparse / torch.where(total > 0, total, 1), 1 / len(self.sparse))
        return share**a * (1 - self.peak / self.peak.sum(0)) ** (1 - a)

    def best(self, a: float | int = 0.5) -> Int[Tensor, "heads"]:
        """The order of each head; among equals the first."""
        score = self.score(a)
        return (score == score.amax(0)).int().argmax(0)


def order_figures(
    q: QK,
    k: Float[Tensor, "batch kv_heads length head_dim"],
    orders: Sequence[Order],
    block: Block,
    *,
    eps: float = 0.015,
    prefix: int = 0,
    suffix: int = 0,
    **scope: Any,
) -> Figures:
    """How sparse and how flat the blocks of each head are in each order, the mean over the batch.

    Weights are those of all keys, blocks those of the ordered tokens. Arguments as in `block_mass`; the largest weights
    take one pass over row tiles, for all orders together. eps is our reading of the paper.
    """
    mass = block_mass(q, k, orders, block, prefix=prefix, suffix=suffix, **scope)
    n = q.shape[2] - prefix - suffix
    (tops,) = tile_pass(q, k, [_Largest(orders, block_size(block), prefix, n)], **scope)
    sparse, peak = [], []
    for order, s, top in zip(orders, mass, tops, strict=True):
        keys = _member(order, block_size(block)[1]).sum(0).to(s)
        queries = _member(order, block_size(block)[0]).sum(0)
        there = ((queries > 0)[:, None] & (keys > 0)).to(s.device)  # a block of padding alone is no block
        mean = s / keys.clamp(min=1)
        ratio = torch.where(mean > 0, top / torch.where(mean > 0, mean, 1), 1.0)
        sparse.append((s < eps)[..., there].to(s.dtype).mean((0, 2)))
        peak.append(ratio[..., there].mean((0, 2)))
    return Figures(torch.stack(sparse), torch.stack(peak))


def choose_order(
    q: QK,
    k: Float[Tensor, "batch kv_heads length head_dim"],
    shape: Sequence[int],
    block: Block = 64,
    *,
    eps: float = 0.015,
    a: float = 0.5,
    prefix: int = 0,
    suffix: int = 0,
    **scope: Any,
) -> list[AxisOrder]:
    """The order of axes that suits each head best, by `Figures.score`; arguments as in `order_figures`.

    Args:
        shape: tokens along each axis of the grid, row-major; ``prefix + prod(shape) + suffix`` tokens in all.
        a: what sparsity counts against flatness.

    One call's choice; over several calls take ``Figures.mean`` of their `order_figures`, and its ``best``.
    """
    n = q.shape[2] - prefix - suffix
    if n != prod(shape):
        raise ValueError(f"shape must have the {n} tokens between prefix and suffix, got {tuple(shape)}")
    orders = axis_orders(shape)
    figures = order_figures(q, k, orders, block, eps=eps, prefix=prefix, suffix=suffix, **scope)
    return [orders[i] for i in figures.best(a).tolist()]


def needed_density(mass: Float[Tensor, "*lead q_blocks kv_blocks"], share: float = 0.9) -> Float[Tensor, "*lead"]:
    """The share of the blocks, heaviest first, that hold ``share`` of the map's mass."""
    flat = mass.flatten(-2).sort(-1, descending=True).values.cumsum(-1)
    wanted = share * flat[..., -1:]
    return ((flat < wanted * (1 - 1e-6)).sum(-1) + 1).clamp(max=flat.shape[-1]) / flat.shape[-1]


def heaviest(
    mass: Float[Tensor, "*lead q_blocks kv_blocks"], density: float, at_least: int = 1
) -> Bool[Tensor, "*lead q_blocks kv_blocks"]:
    """The heaviest blocks of each map, ``max(floor(density * blocks), at_least * q_blocks)`` of them.

    One threshold a map, so rows with scattered mass get more than others. The ``at_least`` heaviest blocks of each row
    are among them (0: a row may be left with none, its output zeros). Ties go to the lower index.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    *lead, n_q, n_kv = mass.shape
    if not 0 <= at_least <= n_kv:
        raise ValueError(f"at_least must be in [0, {n_kv}], the blocks of a row, got {at_least}")
    rank = torch.empty_like(mass, dtype=torch.long)
    by_row = mass.argsort(dim=-1, descending=True, stable=True)
    rank.scatter_(-1, by_row, torch.arange(n_kv, device=mass.device).expand_as(by_row).contiguous())
    first = torch.where(rank < at_least, torch.inf, mass.double())
    count = max(int(density * n_q * n_kv + 1e-9), at_least * n_q)
    order = first.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(*lead, n_q * n_kv, dtype=torch.bool, device=mass.device)
    return kept.scatter_(-1, order[..., :count], True).unflatten(-1, (n_q, n_kv))


def reordered(
    blocks: Bool[Tensor, "heads q_blocks kv_blocks"],
    orders: Sequence[Order],
    block: Block,
    *,
    prefix: int = 0,
    suffix: int = 0,
) -> Routed:
    """Listed blocks of each head in its own order as a stored route: a `Pattern` for `attend` and for a plan.

    Text at either end stays in place, in blocks of its own that are padded and always on, as rows and as columns.

    Args:
        blocks: which blocks of the ordered tokens each head has, in its order.
        orders: one for each head, all of the same tokens.
        block, prefix, suffix: as in `block_mass`.

    Raises:
        ValueError: for orders of different lengths, or blocks that are not theirs.
    """
    bq, bk = block_size(block)
    sizes = {(order.n, order.n_padded) for order in orders}
    if len(sizes) != 1 or len(orders) != len(blocks):
        raise ValueError(
            f"orders must be one for each of the {len(blocks)} heads, of the same tokens, got {len(orders)} of "
            f"(tokens, positions) {sorted(sizes)}"
        )
    ((n, padded),) = sizes
    want = (-(-padded // bq), -(-padded // bk))
    if tuple(blocks.shape[1:]) != want:
        raise ValueError(
            f"blocks must be [heads, {want[0]}, {want[1]}] for {padded} positions by {(bq, bk)}, "
            f"got {list(blocks.shape)}"
        )
    slots = [torch.stack([with_ends(order.forward, prefix, suffix, size) for order in orders]) for size in (bq, bk)]
    text = [-(-prefix // bq), -(-prefix // bk), -(-suffix // bq), -(-suffix // bk)]
    whole = torch.nn.functional.pad(blocks, (text[1], text[3], text[0], text[2]), value=True)
    count = whole.sum(-1)
    width = max(int(count.max()), 1)
    # stable: among the listed (0 before 1) the lower index first
    index = (~whole).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    index = torch.where(torch.arange(width) < count[..., None], index, -1)
    length = prefix + n + suffix
    return Routed.blocks(
        index[None],
        count[None],
        block=(bq, bk),
        q_len=length,
        kv_len=length,
        q_start=0,
        q_order=slots[0][None],
        kv_order=slots[1][None],
    )


class _Largest(Reducer):
    """The largest weight of each block of tokens ``[prefix, prefix + n)``; an order: [b, h, q_blocks, kv_blocks]."""

    by_tile = True

    def __init__(self, orders: Sequence[Order], block: tuple[int, int], prefix: int, n: int) -> None:
        self.orders, self.block, self.prefix, self.n = list(orders), block, prefix, n

    def start(self, frame: Frame) -> tuple[Add | None, Any]:
        """See `Reducer`."""
        (bq, bk), a, b = self.block, self.prefix, self.prefix + self.n
        outs, keys, rows = [], [], []
        for order in self.orders:
            n_q, n_kv = (-(-order.n_padded // size) for size in (bq, bk))
            outs.append(frame.zeros(n_q, n_kv))
            forward = torch.nn.functional.pad(order.forward, (0, n_kv * bk - order.n_padded), value=-1)
            keys.append(torch.where(forward >= 0, forward, self.n).to(frame.device))  # n: a column of zeros
            rows.append((order.inverse // bq).to(frame.device))

        def add(tile: Tile) -> None:
            i0, i1 = max(tile.rows.start, a), min(tile.rows.stop, b)
            if i0 >= i1:
                return
            lo, hi = max(tile.lo, a), min(tile.hi, b)
            seen = tile.weights[:, i0 - tile.rows.start : i1 - tile.rows.start, lo - tile.lo : max(hi, lo) - tile.lo]
            whole = torch.nn.functional.pad(seen, (lo - a, b - max(hi, lo) + 1))
            for out, key, row in zip(outs, keys, rows, strict=True):
                top = whole.index_select(-1, key).unflatten(-1, (-1, bk)).amax(-1)
                at = row[i0 - a : i1 - a, None].expand(*top.shape)
                out[tile.units].scatter_reduce_(1, at, top, "amax")

        return add, lambda: [frame.per_head(out) for out in outs]


def _member(order: Order, block: int) -> Float[Tensor, "n blocks"]:
    """Which block of the order each token is in, as indicator columns."""
    blocks = -(-order.n_padded // block)
    return torch.nn.functional.one_hot(order.inverse // block, blocks).float()


def _check(q: Tensor, k: Tensor, orders: Sequence[Order], prefix: int, suffix: int) -> int:
    if not orders:
        raise ValueError("orders must hold at least one Order")
    n = q.shape[2] - prefix - suffix
    if q.shape[2] != k.shape[2] or prefix < 0 or suffix < 0:
        raise ValueError(
            f"q and k must have the same tokens, prefix and suffix >= 0, got {q.shape[2]} and {k.shape[2]} tokens, "
            f"prefix={prefix}, suffix={suffix}"
        )
    for order in orders:
        if order.n != n:
            raise ValueError(f"orders must be of the {n} tokens between prefix and suffix, got one of {order.n}")
    return n
