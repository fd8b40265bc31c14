"""A decoder in plain float64 with every tensor in the open, and each edit written from its formula.

`forward(weights, ids, ...)` calls `at(layer, part, x)` at every site and goes on with what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

At = Callable[[int | None, str, Tensor], Tensor]


def forward(
    weights: dict[str, Tensor],
    ids: Tensor,
    *,
    heads: int,
    kv_heads: int,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    parallel: bool = False,
    at: At = lambda layer, part, x: x,
) -> Tensor:
    """Logits [batch, length, vocab]. `valid` False: a key nobody sees; `bias` [heads, length, length] is added.

    `parallel`: the MLP reads what attention read, and there is no `resid_mid`.
    """
    w = {name: x.double() for name, x in weights.items()}
    batch, length = ids.shape
    x = at(None, "embed", w["embed.weight"][ids])
    layer = 0
    while f"blocks.{layer}.q.weight" in w:
        x = at(layer, "resid_pre", x)
        h = norm(x, w, f"blocks.{layer}.norm1")
        q = at(layer, "q", split(linear(h, w, f"blocks.{layer}.q"), heads))
        k = at(layer, "k", split(linear(h, w, f"blocks.{layer}.k"), kv_heads))
        v = at(layer, "v", split(linear(h, w, f"blocks.{layer}.v"), kv_heads))
        k, v = (t if t.shape[1] == heads else per_head(t, heads) for t in (k, v))
        p = at(layer, "weights", softmax(scores(q, k, bias), allowed(length, valid, batch)))
        z = at(layer, "z", torch.einsum("bhij,bhjd->bhid", p, v))
        before = x
        x = x + at(layer, "attn_out", linear(z.transpose(1, 2).reshape(batch, length, -1), w, f"blocks.{layer}.out"))
        x = x if parallel else at(layer, "resid_mid", x)
        h = norm(before if parallel else x, w, f"blocks.{layer}.norm2")
        x = x + at(layer, "mlp_out", linear(torch.tanh(linear(h, w, f"blocks.{layer}.up")), w, f"blocks.{layer}.down"))
        x = at(layer, "resid_post", x)
        layer += 1
    x = at(None, "final", norm(x, w, "norm") if "norm.weight" in w else x)
    return at(None, "logits", linear(x, w, "head"))


def allowed(length: int, valid: Tensor | None, batch: int) -> Tensor:
    """[batch, 1, length, length]: j <= i and j no padding."""
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, length, length)
    return seen if valid is None else seen & valid[:, None, None, :]


def scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    return s if bias is None else s + bias.double()


def softmax(s: Tensor, open_: Tensor) -> Tensor:
    """Rows over the open pairs; a row without any is 0."""
    e = torch.where(open_, (s - torch.where(open_, s, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0)).exp(), 0)
    return e / torch.where(open_.any(-1, keepdim=True), e.sum(-1, keepdim=True), 1)


def split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def per_head(x: Tensor, heads: int) -> Tensor:
    return torch.stack([x[:, h // (heads // x.shape[1])] for h in range(heads)], dim=1)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c / ((c * c).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def uniform(p: Tensor, open_: Tensor) -> Tensor:
    """1/n_i on every open key."""
    n = open_.sum(-1, keepdim=True)
    return torch.where(open_, 1.0 / n.clamp(min=1).double(), torch.zeros((), dtype=torch.float64)).expand_as(p)


def close(p: Tensor, kept: Tensor) -> Tensor:
    """Only kept pairs, renormalised; an emptied row is 0."""
    cut = p * kept
    total = cut.sum(-1, keepdim=True)
    return torch.where(total > 0, cut / torch.where(total > 0, total, 1), 0)


def reweight(p: Tensor, factor: Tensor, renormalize: bool) -> Tensor:
    """Each weight times its pair's coefficient."""
    cut = p * factor
    if not renormalize:
        return cut
    total = cut.sum(-1, keepdim=True)
    return torch.where(total != 0, cut / torch.where(total != 0, total, 1), 0)


def project(x: Tensor, basis: Tensor) -> Tensor:
    """Orthogonal projection on the span of the rows of basis, by Gram-Schmidt."""
    kept: list[Tensor] = []
    for row in basis.double():
        for e in kept:
            row = row - (row @ e) * e
        if row.norm() > 1e-9:
            kept.append(row / row.norm())
    out = torch.zeros_like(x)
    for e in kept:
        out = out + (x * e).sum(-1, keepdim=True) * e
    return out


def norm_cap(x: Tensor, cap: float, basis: Tensor | None, cosine: float) -> Tensor:
    out = x.clone()
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[:-1]]).reshape(-1, x.ndim - 1).tolist():
        row = x[tuple(index)]
        like = basis is None or any(float(row @ b / row.norm() / b.norm()) > cosine for b in basis.double())
        if like and row.norm() > cap:
            out[tuple(index)] = row * cap / row.norm()
    return out
