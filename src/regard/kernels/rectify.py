"""Rectified sparse attention (arXiv 2511.19835): pooled weights tell what mass a route keeps, and what it leaves."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.attend import attend
from regard.kernels.combine import complete
from regard.patterns.candidates import candidates
from regard.patterns.listed import places
from regard.patterns.permuted import ListedOrder
from regard.patterns.routed import Routed

__all__ = ["Gate", "Rest", "pooled_rest", "rectified"]

Gate = Literal["gapr", "all", "none"]


class Rest(NamedTuple):
    """What `complete` needs of the blocks that a route left out."""

    kept: Float[Tensor, "batch heads q_len"]
    """Estimated share of a query's full mass that what it attends to stands for, R."""
    rest: Float[Tensor, "batch heads q_len v_dim"]
    """What the other blocks add: each its estimated mass times the mean of its values."""


def pooled_rest(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    routed: Routed,
    *,
    gate: Gate = "gapr",
    text: int = 0,
    valid: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | int | None = None,
) -> Rest:
    """Estimates of the mass that block-sparse attention keeps, and of the output that it leaves out.

    With ``q_I`` and ``k_J`` the means of blocks, ``n_J`` the tokens of key block J, and text keys t not pooled,

        P_IJ = n_J exp(scale q_I . k_J) / Z,   P_It = exp(scale q_I . k_t) / Z,   Z so that a row sums to 1:

    a pooled weight stands for all tokens of its block (the paper's isolated-pooling attention reallocation). Block
    (I, J) may be rectified, by ``gate="gapr"``, where its pooled score is larger than what pooling may lose,

        |q_I . k_J| > |mean |dq|_I . k_J| + |q_I . mean |dk|_J|,

    dq and dk the tokens less their block's mean; by "all" every block may be, by "none" no block. Then
    ``rest = sum_J P_IJ mean(V_J)`` over the blocks that may be rectified and that the pattern leaves out, and
    ``kept = 1 -`` their mass. `combine.complete` puts both onto the attention under the pattern:
    ``kept * out + rest``. ``kept`` estimates ``exp(lse_pattern - lse_full)``.

    Sums in float32 at least, under autocast too. Memory is of the block pairs, and of text keys for each query block.

    Args:
        q, k, v: as in `attend`; query head h reads kv head ``h // (heads / kv_heads)``.
        routed: blocks listed by a route over these lengths, in an order or none. A block that ``keep`` reaches at all
            counts as attended to; make ``keep`` of whole blocks. An order must be alike for all samples and heads
            where there is a ``keep``.
        gate: see above.
        text: so many last keys are not pooled. They must fill blocks of their own, and every query must attend to all
            of them (``keep=Columns(...)``).
        valid: keys that may be attended to; the others (the padding of prompts) enter no mean and no sum. Must be
            given, and say the same, where ``routed.within`` forbids keys; no other ``within`` can be rectified.
        scale: of the attention; None: ``1 / sqrt(head_dim)``.

    Raises:
        ValueError: a route that lists no blocks, lengths that are not its own, text that shares a block with other
            keys or is not attended to, a ``within`` without ``valid``.
    """
    if gate not in get_args(Gate):
        raise ValueError(f"gate must be one of {get_args(Gate)}, got {gate!r}")
    _check(q, k, routed, text, valid)
    with torch.autocast(q.device.type, enabled=False):
        return _pooled_rest(q, k, v, routed, gate, text, valid, q.shape[3] ** -0.5 if scale is None else scale)


def rectified(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    routed: Routed,
    *,
    gate: Gate = "gapr",
    text: int = 0,
    valid: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len v_dim"]:
    """Attention under a route, rectified: ``complete(attend(q, k, v, routed), *pooled_rest(...))``."""
    out = attend(q, k, v, routed, q_start=routed.q_start, scale=scale, backend=backend)
    assert isinstance(out, Tensor)  # no lse was asked for
    return complete(out, *pooled_rest(q, k, v, routed, gate=gate, text=text, valid=valid, scale=scale))


def _pooled_rest(
    q: Tensor, k: Tensor, v: Tensor, routed: Routed, gate: Gate, text: int, valid: Tensor | None, scale: float | int
) -> Rest:
    kv_len = k.shape[2]
    group = q.shape[1] // k.shape[1]
    queries, q_there = _in_blocks(q, routed.q_order, routed.block[0], group=1)
    keys, k_there = _in_blocks(k, routed.kv_order, routed.block[1], group, valid)
    values, _ = _in_blocks(v, routed.kv_order, routed.block[1], group, valid)
    q_mean, k_mean, v_mean = (_mean(x, n) for x, n in ((queries, q_there), (keys, k_there), (values, k_there)))
    critical = _critical(routed)
    size = k_there.sum(-1).to(q_mean)  # [batch or 1, heads or 1, columns]
    pooled = q_mean @ k_mean.mT
    scores = scale * pooled + size.log()[:, :, None]
    if text:
        is_text = _text_blocks(routed, text)
        if not bool((critical | ~is_text).all()):
            raise ValueError(
                f"routed must keep all {text} text keys for every query (keep=Columns(...)), it leaves some out"
            )
        told = scale * (q_mean @ k[:, :, kv_len - text :].to(q_mean).repeat_interleave(group, 1).mT)
        if valid is not None:
            told = told.masked_fill(~valid[:, None, None, kv_len - text :], -torch.inf)
        both = torch.cat([scores.masked_fill(is_text, -torch.inf), told], -1)
        mass = _softmax(both)[..., : scores.shape[-1]]
    else:
        mass = _softmax(scores)
    left = ~critical & (size > 0)[:, :, None]
    if gate == "gapr":
        q_off, k_off = (_mean((x - m[..., None, :]).abs(), n) for x, m, n in (
            (queries, q_mean, q_there), (keys, k_mean, k_there)
        ))  # fmt: skip
        left = left & (pooled.abs() > (q_off @ k_mean.mT).abs() + (q_mean @ k_off.mT).abs())
    elif gate == "none":
        left = torch.zeros_like(left)
    mass = mass * left
    kept, rest = 1 - mass.sum(-1), mass @ v_mean
    row = _row_of_each_query(routed, q.device)
    if row.ndim == 1:
        return Rest(kept[:, :, row], rest[:, :, row].to(v.dtype))
    row = row.expand(*kept.shape[:2], -1)
    return Rest(kept.gather(2, row), rest.gather(2, row[..., None].expand(-1, -1, -1, rest.shape[-1])).to(v.dtype))


def _check(q: Tensor, k: Tensor, routed: Routed, text: int, valid: Tensor | None) -> None:
    if routed.index is None or routed.repeats != "error":
        raise ValueError(f"routed must list blocks of keys (Routed.blocks, BlockTopK), got {routed!r}")
    if (q.shape[2], k.shape[2]) != (routed.q_len, routed.kv_len):
        raise ValueError(
            f"routed was decided for q_len={routed.q_len}, kv_len={routed.kv_len}, got {q.shape[2]} and {k.shape[2]}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"kv_heads must divide the {q.shape[1]} heads of q, got {k.shape[1]}")
    if (routed.heads or q.shape[1]) != q.shape[1] or (routed.samples or q.shape[0]) != q.shape[0]:
        raise ValueError(
            f"routed was decided for {routed.heads} heads and {routed.samples} samples, "
            f"got {q.shape[1]} and {q.shape[0]}"
        )
    if not 0 <= text <= k.shape[2]:
        raise ValueError(f"text must be in 0..{k.shape[2]}, the keys, got {text}")
    if routed.within is not None and valid is None:
        raise ValueError(f"valid must say which keys routed.within allows, got None with within={routed.within}")


def _in_blocks(
    x: Tensor, order: Tensor | None, size: int, group: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(x [batch, heads, blocks, size, dim], which of its tokens are there [batch or 1, heads or 1, blocks, size])``.

    In float32 at least, zeros where no token is; kv heads repeated ``group`` times.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(group, 1)
    there = torch.ones(1, 1, x.shape[2], dtype=torch.bool, device=x.device) if valid is None else valid[:, None]
    if order is not None:
        heads = order.shape[1] if order.shape[1] == 1 else x.shape[1]
        slots = order.to(x.device).repeat_interleave(heads // order.shape[1], 1)
        at = slots.clamp(min=0)
        lead = torch.broadcast_shapes(there.shape[:2], at.shape[:2])
        there = there.expand(*lead, -1).gather(2, at.expand(*lead, -1)) & (slots >= 0)
        x = x.gather(2, at.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[3]))
    x = x.masked_fill(~there[..., None], 0)
    short = -x.shape[2] % size
    x, there = F.pad(x, (0, 0, 0, short)), F.pad(there, (0, short))
    return x.unflatten(2, (-1, size)), there.unflatten(2, (-1, size))


def _mean(x: Tensor, there: Tensor) -> Tensor:
    """The mean over a block's tokens; zeros for a block without one."""
    return (x * there[..., None]).sum(-2) / there.sum(-1).clamp(min=1)[..., None]


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis; zeros for a row of -inf."""
    some = (scores > -torch.inf).any(-1, keepdim=True)
    return torch.where(some, scores, 0).softmax(-1) * some


def _critical(routed: Routed) -> Bool[Tensor, "samples heads rows columns"]:
    """Blocks that hold a pair of the pattern: what is listed, and what ``keep`` adds."""
    index = routed.index
    assert index is not None
    lists = index.new_zeros(*index.shape[:3], routed.n_columns + 1, dtype=torch.bool)
    at = torch.where(index < 0, routed.n_columns, index).long()
    table = lists.scatter_(-1, at, True)[..., :-1]
    if routed.decisions > 1:
        table = table.repeat_interleave((routed.heads or routed.decisions) // routed.decisions, 1)
    if routed.keep is None:
        return table
    order = None
    if routed.ordered:
        given = [routed.q_order, routed.kv_order]
        if any(x is None or x.shape[:2] != (1, 1) for x in given) or not torch.equal(*given):  # type: ignore[arg-type]
            raise ValueError(
                "routed must have one order for queries and keys of all samples and heads where it has keep"
            )
        order = ListedOrder(tuple(routed.q_order[0, 0].tolist()))  # type: ignore[index]
    kept = candidates(
        routed.keep, routed.q_len, routed.kv_len, routed.block, q_start=routed.q_start, order=order,
        decisions=routed.keep.heads or 1, device=index.device,
    )  # fmt: skip
    return table | kept


def _text_blocks(routed: Routed, text: int) -> Bool[Tensor, "samples heads #rows columns"]:
    """Which key blocks hold text."""
    order, size = routed.kv_order, routed.block[1]
    if order is None:
        order = torch.arange(routed.kv_len)[None, None]
    told = F.pad(
        torch.where(order < 0, 2, (order >= routed.kv_len - text).int()), (0, -order.shape[-1] % size), value=2
    )
    told = told.unflatten(2, (-1, size))
    some, other = (told == 1).any(-1), (told == 0).any(-1)
    if bool((some & other).any()):
        raise ValueError(
            f"text must fill blocks of its own (an order with suffix=, or a multiple of {size} other keys), "
            f"got {text} text keys of {routed.kv_len} that share a block of {size} with others"
        )
    lead = some.repeat_interleave((routed.heads or 1) // some.shape[1], 1) if some.shape[1] > 1 else some
    assert routed.index is not None
    return lead[:, :, None].to(routed.index.device)


def _row_of_each_query(routed: Routed, device: torch.device) -> Tensor:
    """The row of queries that each query is in, ``[q_len]`` or ``[batch or 1, heads, q_len]``."""
    size = routed.block[0]
    if routed.q_order is None:
        return torch.arange(routed.q_len, device=device) // size
    slots = places(routed.q_order, routed.q_len)[..., 0].to(device)
    rows = slots // size
    if rows.shape[:2] == (1, 1):
        return rows[0, 0]
    return rows.repeat_interleave((routed.heads or 1) // rows.shape[1], 1) if rows.shape[1] > 1 else rows
