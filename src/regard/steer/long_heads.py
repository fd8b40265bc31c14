"""LongHeads (arXiv 2402.10685): a model reads texts longer than it was trained on, each head a few chunks at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.kernels.renumbered import renumbered
from regard.patterns import Causal, Full, Summary
from regard.patterns.chunks import ChunkRoute
from regard.watch.call import Call
from regard.watch.own_mask import own_mask
from regard.watch.seam import Seam

__all__ = ["LongHeads", "long_heads"]

CAUSAL, FULL = Causal(), Full()  # one query that sees every key: both


def long_heads(
    model: nn.Module,
    chunk: int = 256,
    total: int = 16,
    *,
    first: int = 1,
    last: int = 2,
    representation: Literal["paper", "mean", "max"] = "paper",
    backend: str = "auto",
) -> LongHeads:
    """Let a causal model with rotary positions read any length: ``with long_heads(model): model.generate(...)``.

    Each query and head chooses ``total`` chunks, `ChunkRoute`, and meets them as if they followed on from each other,
    `renumbered`: no position passes ``total * chunk``, which should be the length it was trained on. Texts no longer
    than that are read as the model reads them. Nothing is trained. Decoding goes on with the same numbers; a chunk is
    summed up once it is full. Open it before a text begins: queries of earlier tokens are part of what is summed up.

    Args:
        model: the module that is called; all its self-attention is changed.
        chunk, total, first, last, representation: of `ChunkRoute`.
        backend: of `regard.attend`.

    Raises:
        ValueError: while running, naming the layer: no rotary positions, a mask other than causality (as padding or
            windows), dropout, or a text whose beginning, or its cache's order, is another than what was read.
        SeamError: attention that cannot be caught, or rotary positions that cannot be told.
    """
    return LongHeads(model, ChunkRoute(chunk, total, first, last, representation), backend)


class LongHeads:
    """The context that `long_heads` gives. `chosen` holds the last decision of each layer."""

    def __init__(self, model: nn.Module, route: ChunkRoute, backend: str = "auto") -> None:
        self.route, self.backend = route, backend
        self.chosen: dict[str, Any] = {}
        self._known: dict[tuple[str, int], Summary] = {}
        self._seam = Seam(model, self._answer, edits=True)

    def __enter__(self) -> LongHeads:
        self._known, self.chosen = {}, {}
        self._seam.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._known = {}
        self._seam.__exit__(kind, error, trace)

    def _answer(self, call: Call) -> Tensor | None:
        if call.kind == "cross":
            return None
        try:
            return self._read(call)
        except ValueError as error:
            raise ValueError(f"layer {call.layer!r}: {error}") from error

    def _read(self, call: Call) -> Tensor:
        rotary = call.rotary
        if rotary is None:
            raise ValueError("the layer has no rotary positions to renumber")
        if call.dropout:
            raise ValueError(f"the call drops out {call.dropout:g} of its weights; call model.eval()")
        own = own_mask(call)
        whole = own.bias is None and own.spans == ((0, call.k.shape[2]),) and own.columns == (None,)
        if own.shape not in (CAUSAL, FULL) or not call.causal or not whole:
            raise ValueError("its mask is not causality alone; padding and windows cannot be read in chunks")
        q, k = rotary.unrotate_q(call.q), rotary.unrotate_k(call.k)
        route = replace(self.route, turn=rotary.rotate)
        summary = self._summed(call, route, q, k)
        routed = route.select(q, summary, within=CAUSAL, q_start=call.q_start)
        self.chosen[call.layer] = routed
        out, _ = renumbered(q, k, call.v, routed, rotary.rotate, scale=call.scale, backend=self.backend)
        return out.to(call.result_dtype)

    def _summed(self, call: Call, route: ChunkRoute, q: Tensor, k: Tensor) -> Summary:
        """What is known of all keys of the call; appended to while a text goes on."""
        key, start = (call.layer, call.index), call.q_start
        past = self._known.get(key) if start else None
        if start and (past is None or past.length != start or not _follows(past, k[:, :, :start], route.chunk)):
            told = "nothing was read" if past is None else f"{past.length} tokens of another text were read"
            raise ValueError(
                f"the call goes on from {start} tokens and {told} under long_heads; open it before the text begins, "
                "and decode without beams"
            )
        new = slice(start, None)
        own = {"q": q, "v": call.v[:, :, new]} if route.representation == "paper" else {}
        self._known[key] = route.summarize(k[:, :, new], past=past, **own)
        return self._known[key]


def _follows(past: Summary, k: Tensor, chunk: int) -> bool:
    """Whether the keys are those that were summed up: the same in the unfinished chunk, as far as there is one."""
    tail = past["tail_k"]
    if k.shape[0] != tail.shape[0] or past.length // chunk * chunk + tail.shape[2] != k.shape[2]:
        return False
    return torch.allclose(k[:, :, k.shape[2] - tail.shape[2] :], tail, rtol=1e-3, atol=1e-3)
