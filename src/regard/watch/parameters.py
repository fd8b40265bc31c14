"""Heads read from their parameters alone: composition of heads, components of a head's output, outlier columns.

Rows are vectors: a head maps x to ``x W_OV`` and scores x against y by ``x W_QK y^T``. Both matrices have rank head_dim
and are kept as two thin factors; no matrix of dim x dim is made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for

__all__ = ["Components", "Factored", "HeadMatrices", "component_scores", "components", "composition", "head_matrices"]
__all__ += ["outlier_columns"]

_NORMS = ("input_layernorm", "norm1", "ln_1", "layernorm_before", "self_attn_layer_norm")


class Factored(NamedTuple):
    """``left @ right``, a matrix of low rank that is never multiplied out."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def T(self) -> Factored:
        """The transpose."""
        return Factored(self.right.T, self.left.T)

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm."""
        return _between(self.left, torch.eye(self.left.shape[1]).to(self.left), self.right)


class Components(NamedTuple):
    """``W = sum_c sigma_c u_c^T v_c``; signs, and the order of equal values, are arbitrary.

    `sigma` falls; u_c is what a head reads, v_c what it writes.
    """

    u: Float[Tensor, "rank rows"]
    sigma: Float[Tensor, "rank"]
    v: Float[Tensor, "rank columns"]


class HeadMatrices(NamedTuple):
    """One head's two matrices, gains of the norm before attention folded in."""

    qk: Factored
    ov: Factored


def composition(a: Factored, b: Factored) -> float:
    """``||A B||_F / (||A||_F ||B||_F)`` of a writer's W_OV and what a later head reads with (Elhage et al. 2021).

    B is the later head's W_QK for its queries, the transpose for its keys, its W_OV for its values. With
    ``A = A1 A2``, ``B = B1 B2`` only ``A2 B1`` and triangular factors are multiplied. In 0..1; random matrices score
    about ``dim^-1/2``, so report the ratio to that. Rotary positions turn between W_Q and W_K: scores with W_QK hold
    for offset 0 only.

    Raises:
        ValueError: A has other columns than B has rows, or one of them is 0.
    """
    _meet(a.right.shape[1], b)
    both = _positive("a", a) * _positive("b", b)
    return float(_between(a.left, a.right @ b.left, b.right) / both)


def components(w: Factored) -> Components:
    """The singular value decomposition, from those of the thin factors: O(dim rank^2)."""
    q1, r1 = torch.linalg.qr(w.left)
    q2, r2 = torch.linalg.qr(w.right.T)
    u, sigma, v = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    return Components((q1 @ u).T, sigma, v @ q2.T)


def component_scores(parts: Components, b: Factored) -> Float[Tensor, "rank"]:
    """``||v_c B||_F / ||B||_F``: how well a later head reads each component (arXiv 2406.09519).

    In 0..1, about ``dim^-1/2`` for random matrices.
    """
    _meet(parts.v.shape[1], b)
    r = torch.linalg.qr(b.right.T)[1]
    return (parts.v @ b.left @ r.T).norm(dim=-1) / _positive("b", b)


def head_matrices(
    model: nn.Module, layer: int, head: int, *, norm: str | None = None, anatomy: Anatomy | None = None
) -> HeadMatrices:
    """``W_QK = G W_Q W_K^T G^T`` and ``W_OV = G W_V W_O`` of one head, in float64 or the parameters' own width.

    G is what the norm before attention does to its normalised input: its gain, and for a LayerNorm the removal of the
    mean. The gain is measured by running the norm, so one that computes ``1 + weight`` is right too. Query heads of a
    group share W_K and W_V. Biases are left out.

    Args:
        model: with projections named q_proj, k_proj, v_proj and o_proj, or c_attn and c_proj, in its attention.
        layer, head: of the query head.
        norm: name of the norm before attention within the block; None: found by its name.
        anatomy: where `anatomy(model)` cannot find the parts.

    Raises:
        LookupError: projections or norm not found; IndexError: no such layer or head.
        ValueError: norms of queries and keys, which are no matrix.
    """
    parts = anatomy_for(model, None, anatomy)
    at = parts.block(layer)
    attention = model.get_submodule(parts.attention(at))
    heads, kv_heads = parts.heads[at], parts.kv_heads[at]
    if heads is None or kv_heads is None or not 0 <= head < heads:
        raise IndexError(f"head must be one of the {heads} heads of layer {layer}, got {head}")
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(attention, name, nn.Identity()), nn.Identity):
            raise ValueError(f"{parts.attn[at]}.{name}: queries and keys are normed, so W_QK is no matrix")
    q, k, v, o = (w.detach() for w in _projections(attention, str(parts.attn[at]), heads, kv_heads))
    group = head // (heads // kv_heads)
    block = model.get_submodule(parts.blocks[at])
    before = _norm(block, parts.blocks[at], norm)

    def one(w: Tensor, count: int, index: int) -> Tensor:
        return _fold(before, w.unflatten(1, (count, -1))[:, index])

    out = o.unflatten(0, (heads, -1))[head]
    return HeadMatrices(
        Factored(one(q, heads, head), one(k, kv_heads, group).T), Factored(one(v, kv_heads, group), out)
    )


def outlier_columns(w: Float[Tensor, "rows columns"]) -> Float[Tensor, "columns"]:
    """``max_r |W_rc| / mean |W|`` of every column (arXiv 2502.06415): large where few weights carry a column.

    The mean is over the whole matrix, outliers included (our reading). An `nn.Linear` keeps ``[out, in]``: columns of
    its weight are inputs, so those of a W_down are the MLP's hidden units.

    Raises:
        ValueError: an empty matrix, or one of zeros.
    """
    if w.numel() == 0 or not bool(w.any()):
        raise ValueError(f"w must hold a value other than 0, got shape {tuple(w.shape)}")
    size = w.detach().abs()
    size = size if size.dtype == torch.float64 else size.float()
    return size.amax(0) / size.mean()


def _between(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """``||left middle right||_F``; the thin ends count through their triangular factors alone."""
    return (torch.linalg.qr(left)[1] @ middle @ torch.linalg.qr(right.T)[1].T).norm()


def _positive(name: str, w: Factored) -> Tensor:
    size = w.norm()
    if not size > 0:
        raise ValueError(f"{name} must not be 0, which no score is defined for")
    return size


def _meet(columns: int, b: Factored) -> None:
    if columns != b.left.shape[0]:
        raise ValueError(f"b must have {columns} rows, as many as the writer has columns, got {b.left.shape[0]}")


def _projections(attention: nn.Module, name: str, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V [dim, heads * head_dim] and W_O [heads * head_dim, dim]."""
    separate = [getattr(attention, f"{part}_proj", None) for part in "qkv"]
    out = next((m for n in ("o_proj", "out_proj", "c_proj") if (m := getattr(attention, n, None)) is not None), None)
    if out is not None and all(isinstance(m, nn.Linear) for m in separate) and isinstance(out, nn.Linear):
        q, k, v = (m.weight.T for m in separate if isinstance(m, nn.Linear))
        return q, k, v, out.weight.T
    fused: Any = getattr(attention, "c_attn", None)
    if out is not None and fused is not None and heads == kv_heads:
        q, k, v = _matrix(fused).chunk(3, dim=1)
        return q, k, v, _matrix(out)
    raise LookupError(
        f"{name} ({type(attention).__name__}) has no q_proj, k_proj, v_proj and o_proj, nor c_attn and c_proj; it has "
        f"{', '.join(n for n, _ in attention.named_children()) or 'no modules'}"
    )


def _matrix(module: Any) -> Tensor:
    # transformers' Conv1D keeps [in, out], a Linear [out, in].
    return module.weight.T if isinstance(module, nn.Linear) else module.weight


def _norm(block: nn.Module, name: str, given: str | None) -> nn.Module:
    for candidate in _NORMS if given is None else (given,):
        found = getattr(block, candidate, None)
        if isinstance(found, nn.Module):
            return found
    raise LookupError(
        f"norm: {name} has no {given or ' or '.join(_NORMS)}; give norm= one of "
        f"{', '.join(n for n, _ in block.named_children())}"
    )


@torch.no_grad()
def _fold(norm: nn.Module, w: Float[Tensor, "dim width"]) -> Float[Tensor, "dim width"]:
    """G W: the gain of the norm, measured at two opposite inputs so that its bias drops out, and its centring."""
    dim = w.shape[0]
    x = torch.ones(dim, dtype=w.dtype, device=w.device)
    x[1::2] = -1
    if dim % 2:
        x[-3:] = torch.tensor([2.0, -1.0, -1.0]).to(w)
    size = math.sqrt(float(x.pow(2).mean()))
    # Large inputs, beside which the norm's eps is nothing.
    high, low, moved = (norm(s[None])[0].to(w) for s in (1000 * x, -1000 * x, 1000 * x + 500))
    gain = (high - low) / 2 * size / x
    folded = gain[:, None] * w
    centred = torch.allclose(moved, high, rtol=1e-3, atol=1e-3 * float(gain.abs().amax()))
    return folded - folded.mean(0) if centred else folded
