"""Several attentions into one: exactly, by their lse; with any weights; or completed by a rest.

All differentiable, through the lse too: a gate or a route learns by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["complete", "gate", "merge"]


def merge(
    outs: Sequence[Float[Tensor, "*rows v_dim"]], lses: Sequence[Float[Tensor, "*rows"]]
) -> tuple[Float[Tensor, "*rows v_dim"], Float[Tensor, "*rows"]]:
    """Attention over the union of disjoint sets of keys, from each set's output and lse. Exact.

    ``lse = log sum_n exp(lse_n)`` and ``out = sum_n exp(lse_n - lse) out_n``. A part with lse = -inf has no key and
    weighs nothing; a row without a key in any part stays zeros with lse = -inf. Sums in the dtype of the lses, ``out``
    in that of the outs. A sink's logit must be in one part only (or applied after).

    Raises:
        ValueError: for no part, or parts of different shapes, dtypes or numbers.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, at least one, got {len(outs)} and {len(lses)}")
    _alike("outs", outs, tuple(outs[0].shape))
    _alike("lses", lses, tuple(outs[0].shape[:-1]))
    stack = torch.stack(lses)
    some = (stack.detach() != -torch.inf).any(0)
    # a row of -inf has no gradient; it is replaced here, and set back below
    finite = torch.where(some, stack, 0)
    total = torch.logsumexp(finite, 0)
    shares = torch.where(some, (finite - total).exp(), 0)
    out = sum((share[..., None] * x.to(share.dtype) for share, x in zip(shares, outs, strict=True)), start=0)
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), torch.where(some, total, -torch.inf)


def gate(
    outs: Sequence[Float[Tensor, "*rows v_dim"]], weights: Sequence[Float[Tensor, "..."]]
) -> Float[Tensor, "*rows v_dim"]:
    """``sum_n w_n out_n`` with any weights, each broadcast to the rows ``[batch, heads, q_len]``.

    The keys of the parts may overlap and the weights need not sum to 1. Sums and result in the dtype of the outs.

    Raises:
        ValueError: for no part, parts of different shapes or numbers, or a weight that does not broadcast.
    """
    outs, weights = list(outs), list(weights)
    if not outs or len(outs) != len(weights):
        raise ValueError(f"outs and weights must be as many, at least one, got {len(outs)} and {len(weights)}")
    rows = tuple(outs[0].shape[:-1])
    _alike("outs", outs, tuple(outs[0].shape))
    out = torch.zeros_like(outs[0])
    for n, (x, w) in enumerate(zip(outs, weights, strict=True)):
        out = out + _factor(f"weights[{n}]", w, rows).to(x.dtype) * x
    return out


def complete(
    out: Float[Tensor, "*rows v_dim"], kept: Float[Tensor, "..."], rest: Float[Tensor, "*rows v_dim"]
) -> Float[Tensor, "*rows v_dim"]:
    """``kept * out + rest``: a sparse attention given back its true mass, and what the other keys would have added.

    ``kept`` is the mass that the pattern keeps of the full row (``exp(lse_pattern - lse_full)``, or an estimate of it),
    broadcast to the rows; ``rest`` already carries its mass. Rectified sparse attention, arXiv 2511.19835.

    Raises:
        ValueError: if rest has another shape than out, or kept does not broadcast.
    """
    _alike("rest", [rest], tuple(out.shape))
    return _factor("kept", kept, tuple(out.shape[:-1])).to(out.dtype) * out + rest


def _alike(name: str, parts: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    for n, x in enumerate(parts):
        if tuple(x.shape) != shape or x.dtype != parts[0].dtype:
            raise ValueError(
                f"{name} must be {parts[0].dtype} of shape {list(shape)}, got {x.dtype} {list(x.shape)} at {n}"
            )


def _factor(name: str, x: Tensor, rows: tuple[int, ...]) -> Tensor:
    if x.ndim > len(rows) or any(m not in (1, n) for m, n in zip(x.shape[::-1], rows[::-1], strict=False)):
        raise ValueError(f"{name} must broadcast to the rows {list(rows)}, got {list(x.shape)}")
    return x[..., None]
