"""`regard.attend` inside a watched model: brought to the form of the one call that the seam knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.kernels.attend import attend
from regard.kernels.normalize import Softmax
from regard.kernels.request import Request, make_request
from regard.patterns import Causal
from regard.watch.refuse import SeamError

__all__ = ["as_sdpa", "attend"]

#: Pairs of the mask that stands for a pattern: 128 MiB of them.
MOST_PAIRS = 1 << 27


def as_sdpa(layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `scaled_dot_product_attention` that compute what a call of `attend` does, but for its lse.

    Raises:
        SeamError: attention that is no softmax of scores plus a mask, or a mask too large to write out.
    """
    given = {name: value for name, value in kwargs.items() if name != "backend"}
    request = make_request(*args, **given)
    softcap, sink, normalize = request.softcap, request.sink, request.normalize
    unusual = [
        f"{name}={value!r}" if name == "normalize" else name
        for name, value in (("softcap", softcap), ("sink", sink), ("normalize", normalize))
        if value is not None and not isinstance(value, Softmax)
    ]
    if unusual:
        raise SeamError(
            f"layer {layer!r} calls regard.attend with {', '.join(unusual)}, which the seam does not watch; it takes "
            "the softmax of scores plus a mask"
        )
    causal = request.pattern == Causal() and request.q_start == 0 and request.bias is None
    mask = None if causal else _mask(layer, request)
    same = {"scale": request.scale, "enable_gqa": request.heads != request.kv_heads}
    return (request.q, request.k, request.v, mask, 0.0, causal), same


def _mask(layer: str, request: Request) -> Tensor | None:
    if request.whole:
        return request.bias
    heads, samples = request.pattern.heads or 1, request.pattern.samples or 1
    pairs = heads * samples * request.q_len * request.kv_len
    if pairs > MOST_PAIRS:
        raise SeamError(
            f"layer {layer!r} calls regard.attend under {request.pattern!r} on {request.q_len} x {request.kv_len} "
            f"pairs ({pairs} with its heads and samples); the seam writes it out as a mask, at most {MOST_PAIRS}"
        )
    allowed = request.allowed()
    if request.bias is None:
        return allowed
    return request.bias.to(request.q.dtype).masked_fill(~allowed, -torch.inf)
