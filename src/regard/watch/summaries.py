"""What routes know of the keys of a cache: appended to while it grows, made again where it is another one.

A summary may be appended to only if the keys that it was made of are still the first ones of the cache. Lengths do not
tell: beams are put in another order, a cache is cut back and filled again, another one of the same length is handed in.
So either nothing has touched the cache's own tensor since (the very object, in the very version), or the keys are
compared with a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.patterns.routed import Route, Summary
from regard.watch.positions import find_cache, layer_index

if TYPE_CHECKING:
    from regard.watch.call import Call

__all__ = ["Summaries"]

CHUNKS = 64  # copies of keys, before they are put together


@dataclass
class _Known:
    """A summary, the route that made it, and how to tell that the keys are still those."""

    route: Route
    summary: Summary
    held: _Held | None
    copies: list[Tensor]


class _Held:
    """The tensor in which a cache of transformers keeps a layer's keys, which grows by making a new one."""

    def __init__(self, layer: Any):
        self._layer = weakref.ref(layer)
        self._keys, self._version = weakref.ref(layer.keys), layer.keys._version
        self.same_in: int | None = None

    def look(self, forward: int) -> None:
        """Note, as a forward begins, whether nothing was changed since."""
        layer, keys = self._layer(), self._keys()
        if layer is not None and keys is not None and layer.keys is keys and keys._version == self._version:
            self.same_in = forward

    def is_of(self, layer: Any) -> bool:
        """Whether it is this layer's."""
        return self._layer() is layer


class Summaries:
    """Summaries by name (a layer, a group of its heads or samples); `look` must be called as each forward begins."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}
        self._forward = 0
        self.appended = 0
        """How often a summary was appended to."""
        self.made = 0
        """How often one was made from all keys."""

    def forget(self) -> None:
        """Let all summaries and copies go."""
        self._known = {}

    def clear(self) -> None:
        """Forget all, and count from 0."""
        self.forget()
        self.appended = self.made = 0

    def look(self) -> None:
        """A forward begins: see which caches are as they were left."""
        self._forward += 1
        for known in self._known.values():
            if known.held is not None:
                known.held.look(self._forward)

    def of(
        self, name: Hashable, route: Route, k: Tensor, call: Call, queries: int, whole: bool = True
    ) -> tuple[Route, Summary]:
        """``(route, summary)`` of the keys ``k [batch, kv_heads, length, head_dim]`` of a call, for its last queries.

        The route given back is the one to select with: a route with a state has its own for each name, a new one where
        the keys are not those it knew. ``queries``: how many of the keys are those of the call's own tokens, which
        must be new. ``whole``: k is all that the call's cache holds, for all samples.
        """
        layer = _layer(call) if whole else None
        known = self._known.get(name)
        new = self._new_keys(known, k, layer) if known is not None else None
        if known is None or new is None or new.shape[2] < queries:
            self.made += 1
            known = _Known(route.fresh(), route.summarize(k), None, [])
            new = k
        elif new.shape[2]:
            self.appended += 1
            known.summary = known.route.summarize(new, past=known.summary)
        grows = find_cache(call) is not None or call.q.shape[2] < call.k.shape[2]
        if not grows or not route.appends or (torch.is_grad_enabled() and k.requires_grad):
            self._known.pop(name, None)
            return known.route, known.summary
        known.held = _Held(layer) if layer is not None else None
        found = known.summary
        known.summary = known.route.settle(found) if queries else found
        if known.held is not None:
            known.copies = []
        elif new.shape[2]:
            # of all keys where what was known had no copy
            known.copies.append((new if known.copies else k).detach().clone())
            if len(known.copies) > CHUNKS:
                known.copies = [torch.cat(known.copies, 2)]
        self._known[name] = known
        return known.route, found

    def _new_keys(self, known: _Known, k: Tensor, layer: Any) -> Tensor | None:
        """The keys after those that are known; None where it cannot be appended to."""
        length = known.summary.length
        if length > k.shape[2]:
            return None
        if known.held is not None:
            same = layer is not None and known.held.same_in == self._forward and known.held.is_of(layer)
            known.held.same_in = None  # a second call of the same forward is not the one that was looked at
            return k[:, :, length:] if same else None
        at = 0
        for part in known.copies:
            old = k[:, :, at : at + part.shape[2]]
            if old.shape != part.shape or old.dtype != part.dtype or old.device != part.device:
                return None
            if not torch.equal(old, part):
                return None
            at += part.shape[2]
        return k[:, :, length:]


def _layer(call: Call) -> Any | None:
    """The layer of the call's cache, where its keys are the call's and a change of them can be told."""
    layers = getattr(find_cache(call), "layers", None)
    index = layer_index(call)
    if not isinstance(layers, list) or index >= len(layers) or call.kind != "self":
        return None
    layer = layers[index]
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    keys = getattr(layer, "keys", None)
    if kind != "transformers.cache_utils.DynamicLayer" or not isinstance(keys, Tensor) or keys.is_inference():
        return None
    if keys.shape != call.k.shape or keys.dtype != call.k.dtype or keys.device != call.k.device:
        return None
    # models that repeat keys for their groups hand over a copy
    return layer if keys.data_ptr() == call.k.data_ptr() or torch.equal(keys, call.k) else None
