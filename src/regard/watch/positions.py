"""Where the queries and keys of a call stand on their token axes: caches, windows, cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regard.watch.context import Frame

if TYPE_CHECKING:
    from regard.watch.call import Call

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "kv_cache", "cache")
SOURCE_NAMES = (
    "key_value_states",
    "encoder_hidden_states",
    "encoder_output",
    "encoder_outputs",
    "encoder_out",
    "context",
    "memory",
    "source",
    "cond",
    "key",
    "keys",
    "kv",
    "x_kv",
)
START_NAMES = ("cache_position", "input_pos", "start_pos")


@dataclass(frozen=True, eq=False)
class Positions:
    """Absolute positions of one call, on the padded token axis."""

    q: Int[Tensor, "q_len"]
    kv: Int[Tensor, "kv_len"]
    first: int
    """Position of the first query."""
    q_start: int
    """Index of the first query on the key axis (0 for cross-attention)."""
    total: int
    """Tokens written so far: keys at this position or later hold nothing yet."""
    known: bool
    """False when positions are only a guess by index."""


def kind_of(call: Call) -> Literal["self", "cross"]:
    """`cross` when the calling module was handed another sequence of the keys' length to read from."""
    frame = own_frame(call)
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    bound = frame.bound
    if isinstance(frame.module, nn.MultiheadAttention):
        query, key = bound.get("query"), bound.get("key")
        return "self" if query is None or key is None or _same(query, key) else "cross"
    hidden = frame.hidden
    for name in SOURCE_NAMES:
        source = bound.get(name)
        if isinstance(source, Tensor) and source is not hidden and 2 <= source.ndim <= 3 and source.shape[-2] == kv_len:
            return "cross" if hidden is None or not _same(hidden, source) else "self"
    if q_len != kv_len and hidden is not None and find_cache(call) is None:
        # latents that read the whole input, or a second input of the keys' length under any name
        if hidden.ndim == 3 and hidden.shape[-2] == kv_len:
            return "cross"
        others = [x for x in bound.values() if isinstance(x, Tensor) and x.is_floating_point() and x is not hidden]
        if any(x.ndim == 3 and x.shape[-2] == kv_len and x.shape[-1] > 1 for x in others):
            return "cross"
    return "self"


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.data_ptr() == b.data_ptr() or bool(torch.equal(a, b))


def own_frame(call: Call) -> Frame:
    """The innermost module with weights that was handed a sequence rather than heads: the attention layer itself."""
    for frame in reversed(call.frames[-3:]):
        hidden = frame.hidden
        if hidden is not None and hidden.ndim <= 3 and next(frame.module.parameters(), None) is not None:
            return frame
    return call.frames[-1]


def find_cache(call: Call) -> Any | None:
    """The key-value cache that the calling layer was handed, for the side of attention it does."""
    stop = own_frame(call)
    for frame in reversed(call.frames):
        for name in CACHE_NAMES:
            cache = frame.bound.get(name)
            if cache is not None and hasattr(cache, "get_seq_length"):
                return getattr(cache, "self_attention_cache", cache)
        if frame is stop:
            return None
    return None


def layer_index(call: Call) -> int:
    """The layer's index in the cache; 0 when the modules do not say."""
    for frame in reversed(call.frames):
        index = getattr(frame.module, "layer_idx", None)
        if isinstance(index, int):
            return index
    return 0


def locate(call: Call) -> Positions:
    """Positions of one call. Self-attention: the queries are the last of the tokens written so far.

    A cache that keeps only its last tokens (sliding window) has keys `total - kv_len ... total - 1`; one longer than
    what was written (static) has keys `0 ... kv_len - 1`, of which the first `total` hold tokens; a cache whose layer
    has an integer tensor `positions` (`[kv_len]`) is believed. `known` is False where a position id beyond the tokens
    held shows that keys were evicted, or where the keys are not tokens of the sequence.
    """
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    if call.kind == "cross":
        return _build(call, first=_decoder_past(call), kv_first=0, q_start=0, total=kv_len)
    cache = find_cache(call)
    if cache is not None:
        written = _written(call, cache)
        if written >= q_len and (written <= kv_len or written >= kv_len >= q_len):
            held = _held_positions(call, cache)
            if held is not None:
                last = int(held[-1])
                q_pos = held[kv_len - q_len :]
                return Positions(q_pos, held, int(q_pos[0]), kv_len - q_len, last + 1, True)
            kv_first = max(0, written - kv_len)
            first = written - q_len
            return _build(
                call,
                first=first,
                kv_first=kv_first,
                q_start=first - kv_first,
                total=written,
                known=not _evicted(call, written),
            )
    if call.is_causal:
        return _build(call, first=0, kv_first=0, q_start=0, total=kv_len)
    if kv_len == q_len:
        return _build(call, first=0, kv_first=0, q_start=0, total=kv_len)
    if isinstance(call.module, nn.MultiheadAttention):
        # bias_k and add_zero_attn append keys that are no tokens
        extra = call.module.add_zero_attn or call.module.bias_k is not None
        return _build(call, first=0, kv_first=0, q_start=0, total=kv_len, known=not extra)
    if kv_len < q_len:
        return _build(call, first=0, kv_first=0, q_start=0, total=kv_len, known=False)
    # Keys held by the layer itself. Taken as the tokens before when something says so: a position it was handed, a
    # mask that ends before the buffer does, or the layer's last call, which had just these keys.
    start, last = _stated_start(call), _last_allowed(call)
    known = start is not None or last < kv_len - 1 or call.keys_before == kv_len - q_len
    if start is None:
        start = last + 1 - q_len
    known = known and 0 <= start <= kv_len - q_len
    return _build(call, first=start, kv_first=0, q_start=start, total=start + q_len, known=known)


def _build(call: Call, *, first: int, kv_first: int, q_start: int, total: int, known: bool = True) -> Positions:
    device, q_len, kv_len = call.q.device, call.q.shape[2], call.k.shape[2]
    q = torch.arange(first, first + q_len, device=device)
    return Positions(q, torch.arange(kv_first, kv_first + kv_len, device=device), first, q_start, total, known)


def _written(call: Call, cache: Any) -> int:
    """Tokens the cache has seen, this call's included (it was updated just before)."""
    index = layer_index(call)
    length = cache.get_seq_length(index)
    if isinstance(length, Tensor):
        # one read a forward: static layers all stand at the same length, and reading waits for the device
        key = ("static length", call.q.shape[2])
        if key not in call.state.notes:
            call.state.notes[key] = int(length)
        return call.state.notes[key]
    if length < call.q.shape[2]:  # layers that share another layer's cache
        length = int(cache.get_seq_length())
    return int(length)


def _held_positions(call: Call, cache: Any) -> Tensor | None:
    """What a cache that evicts says about its keys."""
    layers = getattr(cache, "layers", None)
    index = layer_index(call)
    if layers is None or index >= len(layers):
        return None
    held = getattr(layers[index], "positions", None)
    if isinstance(held, Tensor) and held.ndim == 1 and held.shape[0] == call.k.shape[2]:
        return held.to(call.q.device)
    return None


def _evicted(call: Call, written: int) -> bool:
    """Whether position ids run past the tokens the cache counts, so earlier keys must be gone."""
    q_len = call.q.shape[2]
    if written == q_len:
        return False
    for frame in reversed(call.frames):
        ids = frame.bound.get("position_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[-1] == q_len:
            last = call.state.recall("last position", ids)
            if last is None:
                last = int(ids.max())
                call.state.note("last position", ids, last)
            return bool(last > written - 1)
    return False


def _decoder_past(call: Call) -> int:
    """Tokens the decoder had read before this call, for the queries of cross-attention."""
    cache = find_cache(call)
    if cache is None:
        return 0
    length = cache.get_seq_length(layer_index(call))
    return max(0, int(length) - call.q.shape[2])


def _stated_start(call: Call) -> int | None:
    """Position of the first query where the layer was told it."""
    for frame in reversed(call.frames):
        for name in START_NAMES:
            start = frame.bound.get(name)
            if isinstance(start, int):
                return start
            if isinstance(start, Tensor) and not start.is_floating_point() and start.ndim <= 1 and start.numel():
                return int(start.flatten()[0])
    return None


def _last_allowed(call: Call) -> int:
    """Index of the last key the last query may see: a preallocated buffer is longer than what it holds."""
    from regard.watch.padding import allowed

    kv_len = call.k.shape[2]
    if call.mask is None:
        return kv_len - 1
    row = allowed(call.mask[..., -1, :]).flatten(0, -2).any(0)
    if row.shape[0] != kv_len or not bool(row.any()):
        return kv_len - 1
    return int(row.nonzero()[-1])
