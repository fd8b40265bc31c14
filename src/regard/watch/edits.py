"""What to do at a site: an `Edit`, and the operations on tensors.

The operations on attention weights are in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.watch.site import Site

TENSOR_OPS = ("set", "add", "scale", "zero", "mean", "resample", "project_out", "keep_only", "norm_cap")
WEIGHT_OPS = ("uniform", "pattern", "reweight")
_NEEDS_VALUE = ("set", "add", "pattern", "reweight")
_TAKES_VALUE = (*_NEEDS_VALUE, "scale", "mean", "resample", "norm_cap")
_NEEDS_BASIS = ("project_out", "keep_only")


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site. x is the tensor at the site, in the shape that `trace` gives for it.

    Operations on tensors (every part but `weights`; on `weights` only with `backend="reference"`):

    ===========  ==================================================================================================
    set          `value`, broadcast to x's shape; a number fills it
    add          `x + alpha * value`
    scale        `x * alpha`, or `x * (alpha * value)` with a value
    zero         0
    mean         the mean over samples (dimension 0) of `value`, a trace of other inputs; without one, of this batch
    resample     sample b takes a sample of `value` drawn with `seed`; without one, the sample before it in the batch
    project_out  `x - alpha * proj(x)`, proj the orthogonal projection on the span of the rows of `basis` [n, dim]
    keep_only    `x + alpha * (proj(x) - x)`
    norm_cap     vectors longer than `alpha` are shortened to it; with `basis` only those whose cosine with one of its
                 rows exceeds `value` (default 0.98)
    ===========  ==================================================================================================

    Operations on `weights`, exact with fused kernels:

    ===========  ==================================================================================================
    uniform      1/n_i on each of the n_i keys that query i may see; an additive bias is dropped
    pattern      keys outside the Pattern `value` are closed, the rest renormalised; a row left without keys gives 0
    reweight     `value` = {Pattern: coefficient}, a partition of the allowed pairs: weights times the coefficient of
                 their group, rows renormalised unless `renormalize=False`
    ===========  ==================================================================================================

    Args:
        site: where.
        op: one of the above.
        value: see the table. A tensor has the site's dtype and device: nothing is cast.
        alpha: strength, see the table.
        basis: directions, one a row; they need not be orthogonal.
        renormalize: of `reweight`.
        expand: for `k` and `v` of single query heads where several share one key head: repeat keys to one a query
            head, and edit only those named.
        seed: of `resample`.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    site: Site
    op: str
    value: Any = None
    alpha: float | int = 1.0
    basis: Tensor | None = None
    renormalize: bool = True
    expand: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.site, Site):
            raise TypeError(f"site must be a Site, not {type(self.site).__name__}")
        if self.op not in TENSOR_OPS + WEIGHT_OPS:
            raise ValueError(f"op={self.op!r}; accepted: {', '.join(TENSOR_OPS + WEIGHT_OPS)}")
        if self.op in WEIGHT_OPS and self.site.part != "weights":
            raise ValueError(f"op={self.op!r} acts on part 'weights', not on {self.site.part!r}")
        if self.op in _NEEDS_VALUE and self.value is None:
            raise ValueError(f"op={self.op!r} needs value=")
        if self.op not in _TAKES_VALUE and self.value is not None:
            raise ValueError(f"op={self.op!r} takes no value=")
        if self.op in _NEEDS_BASIS and self.basis is None:
            raise ValueError(f"op={self.op!r} needs basis=, directions as rows [n, dim]")
        if self.basis is not None and self.op not in (*_NEEDS_BASIS, "norm_cap"):
            raise ValueError(f"op={self.op!r} takes no basis=")
        if self.basis is not None and (self.basis.ndim != 2 or not self.basis.is_floating_point()):
            raise ValueError(f"basis must be a floating tensor [n, dim], got {_says(self.basis)}")
        if self.op == "norm_cap" and not self.alpha > 0:
            raise ValueError(f"norm_cap needs alpha > 0, the largest norm allowed; got {self.alpha}")
        if self.expand and self.site.part not in ("k", "v"):
            raise ValueError(f"expand=True is for parts 'k' and 'v', not {self.site.part!r}")
        if self.op == "pattern" and not _is_pattern(self.value):
            raise ValueError(f"op='pattern' needs value= a Pattern, not {type(self.value).__name__}")
        if self.op == "reweight":
            _check_groups(self.value)
        elif self.op in ("set", "add", "scale") and not isinstance(self.value, (Tensor, int, float, type(None))):
            raise TypeError(f"value must be a tensor or a number for op={self.op!r}, not {type(self.value).__name__}")
        elif self.op in ("mean", "resample") and not isinstance(self.value, (Tensor, type(None))):
            raise TypeError(f"value must be a tensor or None for op={self.op!r}, not {type(self.value).__name__}")
        elif self.op == "norm_cap" and not isinstance(self.value, (int, float, type(None))):
            raise TypeError(f"value of norm_cap is a cosine, a number, not {type(self.value).__name__}")


def reweight(site: Site, groups: Mapping[Any, float | int], renormalize: bool = True) -> Edit:
    """Multiply the weights of each group of pairs by a coefficient: `Edit(site, "reweight", groups)`.

    `groups` = {Pattern: coefficient} must be a partition of the pairs that may meet: each in exactly one pattern.
    """
    return Edit(site, "reweight", value=groups, renormalize=renormalize)


def change(edit: Edit, x: Float[Tensor, "batch *rest"], *, padded: bool = False) -> Float[Tensor, "batch *rest"]:
    """What `edit` (an operation on tensors) makes of x, out of place.

    Args:
        edit: the edit; its site has been resolved by the caller.
        x: the tensor at the site, in the shape that `trace` gives.
        padded: whether x holds padding in places that differ between samples.
    """
    return _CHANGES[edit.op](edit, x, padded)


def _set(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    return _value(edit, x).expand_as(x).clone()


def _add(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    return x + edit.alpha * _value(edit, x)


def _scale(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    return x * edit.alpha if edit.value is None else x * (edit.alpha * _value(edit, x))


def _zero(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    return torch.zeros_like(x)


def _mean(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    samples = _samples(edit, x, padded)
    return _fits(edit, samples.mean(dim=0, keepdim=True), x).expand_as(x).clone()


def _resample(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    if edit.value is None:
        return _samples(edit, x, padded).roll(1, dims=0)
    samples = _samples(edit, x, padded)
    draw = torch.Generator().manual_seed(edit.seed)
    index = torch.randint(len(samples), (len(x),), generator=draw).to(samples.device)
    return _fits(edit, samples[index], x).expand_as(x).clone()


def _project_out(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    wide = x.to(_wide(x))
    return (wide - edit.alpha * _projection(edit, wide)).to(x.dtype)


def _keep_only(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    wide = x.to(_wide(x))
    return (wide + edit.alpha * (_projection(edit, wide) - wide)).to(x.dtype)


def _norm_cap(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    wide = x.to(_wide(x))
    norm = wide.norm(dim=-1, keepdim=True)
    capped = norm > edit.alpha
    if edit.basis is not None:
        unit = torch.nn.functional.normalize(_basis(edit, wide), dim=-1)
        cosine = torch.nn.functional.normalize(wide, dim=-1) @ unit.T
        capped = capped & (cosine > (0.98 if edit.value is None else edit.value)).any(dim=-1, keepdim=True)
    # Vectors that are short enough keep their bits.
    return torch.where(capped, (wide * (edit.alpha / norm.clamp_min(1e-30))).to(x.dtype), x)


_CHANGES = {
    "set": _set,
    "add": _add,
    "scale": _scale,
    "zero": _zero,
    "mean": _mean,
    "resample": _resample,
    "project_out": _project_out,
    "keep_only": _keep_only,
    "norm_cap": _norm_cap,
}


def _value(edit: Edit, x: Tensor) -> Tensor:
    if isinstance(edit.value, Tensor):
        return _fits(edit, edit.value, x)
    return torch.full((), edit.value, dtype=x.dtype, device=x.device)


def _fits(edit: Edit, value: Tensor, x: Tensor) -> Tensor:
    """`value`, if it broadcasts to x without a cast."""
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"value of {edit.op!r} at {edit.site} is {value.dtype} on {value.device}, the site is {x.dtype} on "
            f"{x.device}: convert it yourself with value.to(...), nothing is cast"
        )
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"value of {edit.op!r} at {edit.site} has shape {tuple(value.shape)}, "
            f"which does not broadcast to the site's {tuple(x.shape)}"
        )
    return value


def _samples(edit: Edit, x: Tensor, padded: bool) -> Tensor:
    """The samples that `mean` and `resample` draw on: the value's, or this batch's."""
    if isinstance(edit.value, Tensor):
        if edit.value.ndim != x.ndim:
            raise ValueError(
                f"value of {edit.op!r} at {edit.site} needs {x.ndim} dimensions, samples first, "
                f"as trace gives them; got {_says(edit.value)}"
            )
        return edit.value
    if padded:
        raise ValueError(
            f"{edit.op!r} at {edit.site} without value= mixes tokens with padding: the samples have different "
            "lengths; give pos=, or value= a trace of other inputs"
        )
    if len(x) < 2:
        raise ValueError(
            f"{edit.op!r} at {edit.site} without value= draws on this batch, which has one sample, so it would "
            "change nothing: give value= a trace of other inputs, or a larger batch"
        )
    return x


def _basis(edit: Edit, wide: Tensor) -> Tensor:
    basis = edit.basis
    assert basis is not None
    if basis.shape[1] != wide.shape[-1]:
        raise ValueError(f"basis at {edit.site} has dim {basis.shape[1]}, the site {wide.shape[-1]}")
    return basis.to(wide)


def _projection(edit: Edit, wide: Tensor) -> Tensor:
    """Orthogonal projection of each vector on the span of the basis; dependent rows count once."""
    # In float64 and by SVD: rows may be nearly parallel, and QR alone would then keep a direction made of rounding.
    _, sizes, rows = torch.linalg.svd(_basis(edit, wide).double(), full_matrices=False)
    rows = rows[sizes > sizes.max() * 1e-6].to(wide.dtype)
    return (wide @ rows.T) @ rows


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_pattern(value: Any) -> bool:
    return callable(getattr(value, "allows", None))


def _check_groups(value: Any) -> None:
    ok = isinstance(value, Mapping) and len(value) > 0 and all(_is_pattern(p) for p in value)
    if not ok or not all(isinstance(c, (int, float)) for c in value.values()):
        raise ValueError(f"op='reweight' needs value= {{Pattern: coefficient}}, got {type(value).__name__}")


def _says(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
