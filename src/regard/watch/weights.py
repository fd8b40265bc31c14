"""Operations on attention weights: what a chain of edits makes of some rows of one call.

A row of weights is kept as `P_ij = c_ij e^(s_ij) / sum_j d_ij e^(s_ij)`, s the scores over the pairs that may meet:
`uniform` empties s, `pattern` closes pairs, `reweight` multiplies c (and d, when rows are renormalised). So a chain of
them needs no matrix of weights a head. Where c = d, not negative, log c joins the scores and one fused call gives
`sum_g c_g e^(lse_g) z_g / sum_g c_g e^(lse_g)` over the groups g; otherwise tiles of rows are rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.watch.call import Call
from regard.watch.edits import WEIGHT_OPS, Edit
from regard.watch.padding import allowed
from regard.watch.passes import Axis, columns, token_index
from regard.watch.select import Selection

TILE = 256


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of the weights of one call, edited. Pair tensors broadcast to [batch, heads, rows, kv_len]."""

    q: Float[Tensor, "batch heads rows head_dim"]
    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    v: Float[Tensor, "batch kv_heads kv_len v_dim"]
    scale: float
    dropout: float
    q_token: Int[Tensor, "#batch rows"]
    kv_token: Int[Tensor, "#batch kv_len"]
    head: Int[Tensor, "heads"]
    sample: Int[Tensor, "batch"]
    open: Bool[Tensor, "#batch #heads #rows kv_len"] | None = None
    causal: bool = False
    """Instead of `open`: row r sees keys 0 ... r. Only for all rows."""
    bias: Float[Tensor, "#batch #heads #rows kv_len"] | None = None
    c: Float[Tensor, "#batch #heads #rows kv_len"] | None = None
    d: Float[Tensor, "#batch #heads #rows kv_len"] | None = None
    weights: Float[Tensor, "batch heads rows kv_len"] | None = None
    """The weights themselves, once an edit has set them (reference backend)."""


def rows_of(call: Call, q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, Axis], part: Selection) -> Rows:
    """The rows of `call` that a site names, unedited.

    Args:
        call: the attention call.
        q, k, v: its tensors, edited or not.
        axes: the token axes of queries and keys.
        part: which samples, heads and rows.
    """
    device, q_len, kv_len = q.device, q.shape[2], k.shape[2]
    batch, heads, picks = part.batch, part.heads, part.columns
    samples = torch.arange(len(q), device=device)
    samples = samples if batch is None else samples[batch]
    chosen = torch.arange(q.shape[1], device=device) if heads is None else torch.tensor(heads, device=device)
    rows = torch.arange(q_len, device=device).expand(len(samples), -1) if picks is None else picks
    whole = picks is None
    mask = call.mask
    open_, bias = None, None
    if mask is not None:
        mask = _cut(mask.expand(*mask.shape[:2], q_len, kv_len), samples, chosen, rows, whole)
        open_ = allowed(mask)
        if mask.dtype != torch.bool:
            bias = mask.masked_fill(~open_, 0)
            open_ = None if bool(open_.all()) else open_
    causal = call.is_causal
    if causal and not (whole and open_ is None):
        seen = torch.arange(kv_len, device=device) <= rows[..., None]
        open_ = seen[:, None] if open_ is None else open_ & seen[:, None]
        causal = False
    if k.shape[1] != v.shape[1]:  # one of them was expanded
        k, v = per_head(k, q.shape[1]), per_head(v, q.shape[1])
    groups = q.shape[1] // k.shape[1]
    if batch is not None:
        q, k, v = q[batch], k[batch], v[batch]
    if heads is not None:
        q, k, v = q[:, chosen], k[:, chosen // groups], v[:, chosen // groups]
    if not whole:
        q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    q_token = _tokens(axes[0], call.q_pos, len(call.q), samples)
    q_token = q_token.expand(len(rows), -1).gather(1, rows) if not whole else q_token
    return Rows(
        q=q,
        k=k,
        v=v,
        scale=call.scale,
        dropout=call.dropout,
        q_token=q_token,
        kv_token=_tokens(axes[1], call.kv_pos, len(call.q), samples),
        head=chosen,
        sample=samples,
        open=open_,
        causal=causal,
        bias=bias,
    )


def edited(rows: Rows, edit: Edit, where: Bool[Tensor, "batch heads rows"] | None) -> Rows:
    """The rows after one more edit; `where`: only there (None: everywhere)."""
    if edit.op not in WEIGHT_OPS or rows.weights is not None:
        return _edited_dense(rows, edit, where)
    return {"uniform": _uniform, "pattern": _pattern, "reweight": _reweight}[edit.op](rows, edit, where)


def attend(rows: Rows) -> Float[Tensor, "batch heads rows v_dim"]:
    """`z_i = sum_j P_ij v_j` with the edited weights; a row without keys gives 0."""
    if rows.weights is not None:
        v = per_head(rows.v, rows.q.shape[1])
        return (rows.weights @ v.to(rows.weights.dtype)).to(rows.q.dtype)
    if rows.c is not None:
        if rows.d is not rows.c or bool((rows.c < 0).any()):
            return _attend_tiles(rows)
        return attend(_as_bias(rows)).to(rows.q.dtype)
    mask, causal, empty = kernel_mask(rows)
    z = F.scaled_dot_product_attention(
        rows.q,
        rows.k,
        rows.v,
        attn_mask=mask,
        dropout_p=rows.dropout,
        is_causal=causal,
        scale=rows.scale,
        enable_gqa=rows.q.shape[1] != rows.k.shape[1],
    )
    return z if empty is None else z.masked_fill(empty, 0)


def _as_bias(rows: Rows) -> Rows:
    """Coefficients as log c among the scores, in float32 or wider: half precision would round the coefficient."""
    assert rows.c is not None
    wide = rows.c.dtype
    bias = rows.c.log().masked_fill(rows.c == 0, 0)
    bias = bias if rows.bias is None else bias + rows.bias.to(wide)
    q, k, v = rows.q.to(wide), rows.k.to(wide), rows.v.to(wide)
    return replace(rows, q=q, k=k, v=v, bias=bias, open=_open(rows) & (rows.c != 0), causal=False, c=None, d=None)


def kernel_mask(rows: Rows) -> tuple[Tensor | None, bool, Tensor | None]:
    """(mask, is_causal, rows without keys) for a fused kernel.

    A row without keys is opened for the kernel, to be emptied after it: neither kernel nor gradient meets -inf alone.
    """
    if rows.causal and rows.bias is not None:
        rows = replace(rows, open=_open(rows), causal=False)
    empty = None if rows.open is None else ~rows.open.any(-1, keepdim=True)
    mask = None if rows.open is None or empty is None else rows.open | empty
    if rows.bias is not None:
        bias = rows.bias.expand(*rows.bias.shape[:2], rows.q.shape[2], rows.k.shape[2])
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return mask, rows.causal, empty


def shared_cells(
    part: Selection, other: Selection, batch: int, heads: int, q_len: int, device: torch.device
) -> Bool[Tensor, "samples heads rows"] | None:
    """Which cells of `part` also belong to `other`; None: all of them."""
    if other.whole or part is other:
        return None
    everyone = torch.arange(batch, device=device)
    theirs = everyone if other.batch is None else everyone[other.batch]
    count = torch.zeros(batch, q_len, dtype=torch.int32, device=device)
    if other.columns is None or other.active is None:
        count[theirs] = 1
    else:
        count.index_put_((theirs[:, None], other.columns), other.active.int(), accumulate=True)
    ours = everyone if part.batch is None else everyone[part.batch]
    rows = torch.arange(q_len, device=device).expand(len(ours), -1) if part.columns is None else part.columns
    head = torch.zeros(heads, dtype=torch.bool, device=device)
    head[list(range(heads)) if other.heads is None else list(other.heads)] = True
    mine = head if part.heads is None else head[list(part.heads)]
    shared = (count[ours[:, None], rows] > 0)[:, None] & mine[None, :, None]
    return None if bool(shared.all()) else shared


def with_weights(rows: Rows, p: Tensor) -> Rows:
    """The rows with these weights, whatever they were."""
    return replace(rows, weights=p, open=_open(rows), causal=False)


def weight_gradient(
    z_gradient: Float[Tensor, "batch heads q_len v_dim"], v: Float[Tensor, "batch kv_heads kv_len v_dim"]
) -> Float[Tensor, "batch heads q_len kv_len"]:
    """`dm/dP_ij = g_i . v_j`, g_i = dm/dz_i: the gradient by each weight, exact whatever kernel ran."""
    return z_gradient @ per_head(v, z_gradient.shape[1]).transpose(-1, -2).to(z_gradient.dtype)


def per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values repeated to one a query head."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x


def weights(rows: Rows) -> Float[Tensor, "batch heads rows kv_len"]:
    """The edited weights as a matrix, in float32 (float64 for float64)."""
    if rows.weights is not None:
        return rows.weights
    e, c, d = _exponentials(rows, slice(None))
    return _divide(c * e, (d * e).sum(-1, keepdim=True))


def _uniform(rows: Rows, edit: Edit, where: Tensor | None) -> Rows:
    q = torch.zeros_like(rows.q) if where is None else rows.q.masked_fill(where[..., None], 0)
    bias = rows.bias
    if bias is not None:
        bias = None if where is None else bias.masked_fill(where[..., None], 0)
    c, d = rows.c, rows.d
    if c is not None and d is not None:
        c = None if where is None else c.masked_fill(where[..., None], 1)
        d = c if where is None or rows.d is rows.c else d.masked_fill(where[..., None], 1)
    return replace(rows, q=q, bias=bias, c=c, d=d)


def _pattern(rows: Rows, edit: Edit, where: Tensor | None) -> Rows:
    kept = _allows(rows, edit.value)
    if where is not None:
        kept = kept | ~where[..., None]
    return replace(rows, open=_open(rows) & kept, causal=False)


def _reweight(rows: Rows, edit: Edit, where: Tensor | None) -> Rows:
    dtype = torch.float64 if rows.q.dtype == torch.float64 else torch.float32
    factor, count = torch.zeros((), dtype=dtype, device=rows.q.device), torch.zeros((), dtype=torch.int32)
    count = count.to(rows.q.device)
    for pattern, coefficient in edit.value.items():
        inside = _allows(rows, pattern)
        factor = factor + coefficient * inside.to(dtype)
        count = count + inside.to(torch.int32)
    _check_partition(rows, edit, count)
    if where is not None:
        factor = torch.where(where[..., None], factor, torch.ones((), dtype=dtype, device=factor.device))
    c = factor if rows.c is None else rows.c * factor
    d = rows.d if rows.d is not None else torch.ones((1, 1, 1, rows.k.shape[2]), dtype=dtype, device=rows.q.device)
    if edit.renormalize:
        same = where is None or rows.c is None or rows.d is rows.c
        d = c if same else torch.where(where[..., None], c, d)  # type: ignore[index]
    return replace(rows, c=c, d=d)


def _check_partition(rows: Rows, edit: Edit, count: Tensor) -> None:
    wrong = _open(rows) & (count != 1)
    if not bool(wrong.any()):
        return
    at = wrong.nonzero()[0].tolist()
    many = int(count.expand(wrong.shape)[tuple(at)])
    query = int(rows.q_token.expand(len(rows.sample), -1)[at[0], at[2]])
    key = int(rows.kv_token.expand(len(rows.sample), -1)[at[0], at[3]])
    said = "none" if many == 0 else str(many)
    raise ValueError(
        f"{edit.site}: the groups of 'reweight' must hold each allowed pair exactly once, but query {query} and key "
        f"{key} lie in {said} of them; for one pattern P and the rest write {{P: c, ~P: 1.0}}, for two that overlap "
        "{P: c, Q & ~P: d, ~P & ~Q: 1.0}"
    )


def _edited_dense(rows: Rows, edit: Edit, where: Tensor | None) -> Rows:
    """Edits on the matrix itself; the site's selection has been made, so the edit sees exactly its rows."""
    p = weights(rows)
    open_ = _open(rows)
    if edit.op == "uniform":
        new = _divide(open_.to(p.dtype), open_.sum(-1, keepdim=True).to(p.dtype)).expand_as(p)
    elif edit.op == "pattern":
        open_ = open_ & (_allows(rows, edit.value) if where is None else _allows(rows, edit.value) | ~where[..., None])
        new = _divide(p * open_, (p * open_).sum(-1, keepdim=True))
    elif edit.op == "reweight":
        unit = replace(rows, c=None, d=None, weights=None)
        factor = _reweight(unit, edit, None).c
        assert factor is not None
        new = p * factor
        new = _divide(new, new.sum(-1, keepdim=True)) if edit.renormalize else new
    else:
        raise AssertionError(f"{edit.op} on weights is applied by the session")
    p = new if where is None else torch.where(where[..., None], new, p)
    return replace(rows, weights=p, open=open_, causal=False)


def _attend_tiles(rows: Rows) -> Tensor:
    if rows.dropout > 0:
        raise ValueError("'reweight' has no attention dropout: call model.eval(), or set the dropout to 0")
    v = per_head(rows.v, rows.q.shape[1])
    parts = []
    for begin in range(0, rows.q.shape[2], TILE):
        e, c, d = _exponentials(rows, slice(begin, begin + TILE))
        parts.append(_divide((c * e) @ v.to(e.dtype), (d * e).sum(-1, keepdim=True)))
    z = torch.cat(parts, dim=2) if parts else rows.q.new_zeros((*rows.q.shape[:3], v.shape[-1]))
    return z.to(rows.q.dtype)


def _exponentials(rows: Rows, tile: slice) -> tuple[Tensor, Tensor, Tensor]:
    """`e^(s - m)` of a tile of rows, m the largest score that counts, with the coefficients c and d."""
    dtype = torch.float64 if rows.q.dtype == torch.float64 else torch.float32
    q, k = rows.q[:, :, tile].to(dtype), per_head(rows.k, rows.q.shape[1]).to(dtype)
    s = (q @ k.transpose(-1, -2)) * rows.scale
    one = torch.ones((), dtype=dtype, device=s.device)
    c = one if rows.c is None else _tile(rows.c, tile)
    d = one if rows.d is None else _tile(rows.d, tile)
    if rows.bias is not None:
        s = s + _tile(rows.bias, tile).to(dtype)
    counts = (c != 0) | (d != 0)
    open_ = _tile(_open(rows), tile) & counts
    # The largest is a constant for gradients: it cancels.
    m = s.detach().masked_fill(~open_, float("-inf")).amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
    return (s - m).masked_fill(~open_, float("-inf")).exp(), c, d


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0 (no key left), without a NaN in the gradient."""
    none = b == 0
    return (a / b.masked_fill(none, 1)).masked_fill(none, 0)


def _open(rows: Rows) -> Tensor:
    """Which pairs may meet, always as a tensor."""
    if rows.open is not None:
        return rows.open
    kv_len, device = rows.k.shape[2], rows.q.device
    if rows.causal:
        return torch.ones(rows.q.shape[2], kv_len, dtype=torch.bool, device=device).tril()[None, None]
    return torch.ones(1, 1, 1, kv_len, dtype=torch.bool, device=device)


def _allows(rows: Rows, pattern: object) -> Tensor:
    """The pattern over the tokens of these rows, [batch or 1, heads or 1, rows, kv_len]."""
    q_idx, kv_idx = rows.q_token[:, None, :, None], rows.kv_token[:, None, None, :]
    inside = pattern.allows(q_idx, kv_idx, head=rows.head[None, :, None, None], batch=rows.sample[:, None, None, None])  # type: ignore[attr-defined]
    full = torch.broadcast_shapes(inside.shape, q_idx.shape, kv_idx.shape)
    return inside.expand(full)


def _tile(x: Tensor, tile: slice) -> Tensor:
    return x if x.shape[2] == 1 else x[:, :, tile]


def _cut(mask: Tensor, samples: Tensor, heads: Tensor, rows: Tensor, whole: bool) -> Tensor:
    if mask.shape[0] > 1:
        mask = mask[samples]
    if mask.shape[1] > 1:
        mask = mask[:, heads]
    if whole:
        return mask
    mask = mask.expand(len(samples), -1, -1, -1)
    return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def _tokens(axis: Axis, positions: Tensor, batch: int, samples: Tensor) -> Tensor:
    if axis.valid is None:
        return positions[None]
    _, total = columns(axis, len(positions))
    index = token_index(axis, batch, total, positions.device)
    index = index if len(index) == 1 else index[samples]
    return index[:, positions.clamp(max=total - 1)]
