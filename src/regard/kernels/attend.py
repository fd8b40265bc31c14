"""Attention under a pattern: one call, several backends, each of which computes exactly this or refuses by name."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from regard.kernels.normalize import Normalizer, Softmax
from regard.kernels.request import Request, make_request
from regard.patterns.pattern import Pattern

__all__ = ["BACKENDS", "Backend", "attend", "choose"]

BACKENDS = {
    "reference": "regard.kernels.reference",
    "blocked": "regard.kernels.blocked",
    "flex": "regard.kernels.flex",
}
DENSE_LIMIT = 1 << 26  # pairs that "auto" gives to `reference`, where no other backend takes the call


@runtime_checkable
class Backend(Protocol):
    """What a backend module has."""

    def refuses(self, request: Request) -> str | None:
        """Why it cannot compute this request, or None."""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """``(out [batch, heads, q_len, v_dim] in q's dtype, lse [batch, heads, q_len] or None)``."""

    def describe(self, request: Request) -> dict[str, Any]:
        """What it would do in the forward pass, for `explain`.

        ``kernel`` (what computes a tile), ``order`` (of the tokens), ``block`` (list of block sizes; none: dense),
        ``blocks`` and ``full`` (listed blocks over all heads and samples, and those without a mask), ``computed``
        (pairs), ``operations``, ``bytes``.
        """


def backend(name: str) -> Backend:
    """The backend of this name."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def choose(request: Request) -> tuple[str, dict[str, str]]:
    """What ``backend="auto"`` takes, and why each of the others was left: the first of these that does not refuse.

    On a GPU ``flex``, then ``blocked``; on a CPU ``blocked`` (no compiling, and ``flex`` is only taken when asked for
    by name); last ``reference``, for at most ``DENSE_LIMIT`` pairs.
    """
    gpu = request.q.device.type == "cuda"
    left = {} if gpu else {"flex": "compiles for seconds on a CPU; taken there only when named"}
    for name in ("flex", "blocked") if gpu else ("blocked",):
        why = backend(name).refuses(request)
        if why is None:
            left.setdefault("reference", "computes every pair, allowed or not")
            for other in BACKENDS:
                if other != name:
                    left.setdefault(other, f"{name} comes first here")
            return name, left
        left[name] = why
    pairs = request.batch * request.heads * request.q_len * request.kv_len
    if pairs > DENSE_LIMIT:
        told = "; ".join(f"{name}: {why}" for name, why in left.items())
        raise ValueError(
            f"no backend but reference takes this call ({told}), and its {pairs} pairs would be computed densely, over "
            f'the {DENSE_LIMIT} that "auto" allows; backend="reference" does it all the same, in about '
            f"{4 * pairs * request.work_dtype.itemsize / 2**30:.1f} GiB"
        )
    return "reference", left


def attend(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    pattern: Pattern | None = None,
    *,
    q_start: int | None = None,
    bias: Float[Tensor, "..."] | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    sink: Float[Tensor, "heads"] | None = None,
    normalize: Normalizer = Softmax(),  # noqa: B008 - an immutable value
    return_lse: bool = False,
    layout: Any | None = None,
    backend: str = "auto",
) -> (
    Float[Tensor, "batch heads q_len v_dim"]
    | tuple[Float[Tensor, "batch heads q_len v_dim"], Float[Tensor, "batch heads q_len"]]
):
    """Attention over the pairs that a pattern allows, ``out_i = sum_j P_ij v_j``, and its log-sum-exp.

    ``s_ij = softcap(scale q_i . k_j) + bias_ij`` with ``softcap(s) = softcap tanh(s / softcap)``, over the allowed j;
    ``P_ij = exp(s_ij - lse_i)`` with ``lse_i = log sum_j exp(s_ij)``. Differentiable in q, k, v, bias and sink, through
    ``out`` and through ``lse``.

    Args:
        q: queries; query head h reads kv head ``h // (heads / kv_heads)``.
        k: keys.
        v: values; v_dim may differ from head_dim.
        pattern: which pairs may meet; None: all.
        q_start: absolute index of the first query; None: the queries are the last, ``kv_len - q_len``.
        bias: added to the scores, broadcast to ``[batch, heads, q_len, kv_len]``; -inf forbids a pair.
        scale: None: ``1 / sqrt(head_dim)``.
        softcap: bound of the scores before the bias, > 0.
        sink: one more logit a head, with no value: ``out`` is multiplied by ``sigmoid(lse - sink)``, and the lse given
            back is ``logaddexp(lse, sink)``.
        normalize: `Softmax` or `Elementwise`.
        return_lse: give ``(out, lse)``; lse is float32, float64 for float64 input.
        layout: the pattern's `BlockLayout`, where it was made before; backends that use layouts of its block size
            need not make it again.
        backend: "auto" (see `choose`; `regard.explain` tells what it takes and why), "reference", "blocked" or "flex".

    A query without a key gives zeros and lse = -inf, with a sink too.

    Raises:
        ValueError: for an argument that is not as said above, a pattern that does not fit the lengths, heads or
            samples, and a backend that refuses the call, with its reason.
    """
    how: dict[str, Any] = {
        "q_start": q_start,
        "bias": bias,
        "scale": scale,
        "softcap": softcap,
        "sink": sink,
        "normalize": normalize,
        "return_lse": return_lse,
        "layout": layout,
    }
    if has_torch_function((q, k, v)):  # a mode that looks on, as `regard.watch` does
        return handle_torch_function(attend, (q, k, v), q, k, v, pattern, backend=backend, **how)
    request = make_request(q, k, v, pattern, **how)
    out, lse = run(request, backend)
    return (out, cast(Tensor, lse)) if return_lse else out


def run(request: Request, name: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Run a request on a backend; the sink is applied here, to what any of them gives."""
    r = request
    if r.empty:
        # Zeros that hang on the inputs, so that their gradients are zeros too and not None.
        nothing = sum(x.sum() * 0 for x in (r.q, r.k, r.v) if x.requires_grad)
        out = r.q.new_zeros(r.batch, r.heads, r.q_len, r.v_dim) + nothing
        lse = r.q.new_full((r.batch, r.heads, r.q_len), -torch.inf, dtype=r.work_dtype)
        if name != "auto":
            backend(name)
        return out.to(r.q.dtype), lse if r.need_lse else None
    if name == "auto":
        name, _ = choose(r)
    else:
        why = backend(name).refuses(r)
        if why is not None:
            raise ValueError(f'backend="{name}" refuses this call: {why}')
    with torch.autocast(r.q.device.type, enabled=False):
        found = backend(name).run(r)
        return found if r.sink is None else _with_sink(*found, r.sink)


def _with_sink(out: Tensor, lse: Tensor | None, sink: Tensor) -> tuple[Tensor, Tensor]:
    """``sigmoid(lse - sink) * out`` and ``logaddexp(lse, sink)``; rows without a key stay as they are."""
    assert lse is not None
    some = lse.detach() != -torch.inf
    finite = torch.where(some, lse, 0)
    logit = sink.to(lse.dtype)[None, :, None]
    share = torch.where(some, torch.sigmoid(finite - logit), 0)
    total = torch.where(some, torch.logaddexp(finite, logit.expand_as(finite)), -torch.inf)
    return (out * share[..., None].to(out.dtype)).to(out.dtype), total
