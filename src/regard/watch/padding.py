"""Which rows and keys of a call are real: padding masks of the model's inputs, and rows whose mask allows no key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.watch.context import Frame

if TYPE_CHECKING:
    from regard.watch.call import Call

TILE = 256  # rows of a mask looked at together
_OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")


@dataclass(frozen=True, eq=False)
class Survey:
    """What a mask allows, summed up."""

    rows: Bool[Tensor, "batch q_len"]
    """The query may see some key, in some head."""
    keys: Bool[Tensor, "batch kv_len"]
    """Some query may see the key, in some head."""
    causal: bool
    """No query may see a key after it."""


def allowed(mask: Tensor) -> Bool[Tensor, "..."]:
    """Which pairs a mask lets meet: True, or any additive value that is not −inf or the dtype's lowest."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def survey(call: Call) -> Survey:
    """Rows, keys and causality of the call's mask, read once a forward for layers that share it."""
    mask, where = call.mask, call.positions
    assert mask is not None
    key = f"survey {where.q_start}"
    shared = call.layout.own_mask
    assert shared is not None
    found = call.state.recall(key, shared)
    if found is None:
        found = _survey(mask, call.q.shape[2], call.k.shape[2], where.q_start)
        call.state.note(key, shared, found)
    return found


def _survey(mask: Tensor, q_len: int, kv_len: int, q_start: int) -> Survey:
    mask = mask.expand(mask.shape[0], mask.shape[1], q_len, kv_len)
    rows = torch.zeros(mask.shape[0], q_len, dtype=torch.uint8, device=mask.device)
    keys = torch.zeros(mask.shape[0], kv_len, dtype=torch.uint8, device=mask.device)
    later = torch.zeros((), dtype=torch.uint8, device=mask.device)
    for begin in range(0, q_len if kv_len else 0, TILE):
        # as bytes: their maximum is found a hundred times faster than `any` of booleans
        part = allowed(mask[:, :, begin : begin + TILE]).view(torch.uint8)
        rows[:, begin : begin + TILE] = part.amax((1, 3))
        keys = torch.maximum(keys, part.amax((1, 2)))
        # beside the tile's triangle every key is later than every row
        first, end = max(0, q_start + begin + 1), max(0, q_start + begin + part.shape[2])
        for future in (part[..., first:end].triu(min(0, q_start + begin + 1)), part[..., end:]):
            if future.numel():
                later = torch.maximum(later, future.amax())
    return Survey(rows.bool(), keys.bool(), not bool(later))


def row_mask(call: Call) -> Bool[Tensor, "batch q_len"]:
    """Rows that are no padding and may see some key."""
    batch, q_len = call.q.shape[0], call.q.shape[2]
    keep = torch.ones(batch, q_len, dtype=torch.bool, device=call.q.device)
    padding = padding_of(call, "rows")
    if padding is not None:
        keep &= _at(padding, call.positions.q, batch)
    if call.mask is not None:
        keep &= survey(call).rows
        if padding is None and call.kind == "self" and not call.causal and q_len == call.k.shape[2]:
            keep &= survey(call).keys  # nothing states it, but a token that nobody sees is padding
    return keep


def key_mask(call: Call) -> Bool[Tensor, "batch kv_len"]:
    """Keys that hold a token and are no padding.

    Where no padding mask is stated but an attention mask is (transformers prepares 4-d masks for static caches), the
    keys that no query of this call may see are left out: padding, and what lies outside a window.
    """
    batch, kv_len = call.q.shape[0], call.k.shape[2]
    where = call.positions
    keep = (where.kv < where.total).expand(batch, kv_len).clone()
    padding = padding_of(call, "keys")
    if padding is not None:
        keep &= _at(padding, where.kv, batch)
    elif call.mask is not None:
        keep &= survey(call).keys
    return keep


def _at(padding: Bool[Tensor, "n length"], positions: Tensor, batch: int) -> Bool[Tensor, "batch positions"]:
    """The padding mask at these positions; what lies beyond it counts as padding, as transformers reads it."""
    inside = positions < padding.shape[1]
    picked = padding[:, positions.clamp(max=padding.shape[1] - 1)] & inside
    if picked.shape[0] == 1:
        return picked.expand(batch, -1)
    return picked


def padding_of(call: Call, side: str) -> Bool[Tensor, "n length"] | None:
    """The padding mask of the queries' or the keys' sequence as True for tokens; None when nothing states one."""
    found = _stated(call, side)
    if found is None:
        return None
    mask, ignored = found
    key = f"padding {ignored}"
    real = call.state.recall(key, mask)
    if real is None:
        real = _real(mask, ignored)
        call.state.note(key, mask, real)
    where = call.positions
    lengths = {where.first + call.q.shape[2]} if side == "rows" else {where.total, call.k.shape[2]}
    if call.kind == "self":
        lengths |= {where.total, call.k.shape[2]}
    # a mask of another length belongs to another axis (samples of sound, words beside an image)
    return real if real.shape[0] in (1, call.q.shape[0]) and real.shape[1] in lengths else None


def _real(mask: Tensor, ignored: bool) -> Bool[Tensor, "n length"]:
    if mask.ndim == 1:
        mask = mask[None]
    if mask.is_floating_point():
        # 0/1 floats mark tokens; additive ones hold 0 for tokens and something very negative for padding
        additive = ignored or bool((mask < 0).any()) or not bool(mask.any())
        return mask > -1000.0 if additive else mask > 0
    return ~mask.bool() if ignored else mask.bool()


def _stated(call: Call, side: str) -> tuple[Tensor, bool] | None:
    """The padding mask nearest to the call, with whether True means "ignore" (PyTorch's own modules)."""
    cross, keys = call.kind == "cross", side == "keys"
    decoder = False
    for frame in reversed(call.frames):
        bound, params = frame.bound, frame.params
        if "key_padding_mask" in params and (keys or not cross):
            found = _flat(bound.get("key_padding_mask"), True)
            if found is not None:
                return found
        if "tgt_key_padding_mask" in params:
            name = "memory_key_padding_mask" if cross and keys else "tgt_key_padding_mask"
            if "src_key_padding_mask" not in params or _inside(call, frame, "decoder"):
                return _flat(bound.get(name), True)
        if "src_key_padding_mask" in params:
            found = _flat(bound.get("src_key_padding_mask"), True)
            if found is not None or "tgt_key_padding_mask" in params:
                return found
        if "decoder_attention_mask" in params:
            reads_decoder = decoder and not (cross and keys)
            return _flat(bound.get("decoder_attention_mask" if reads_decoder else "attention_mask"), False)
        if "attention_mask" not in params and any(name in params for name in _OTHER_INPUTS):
            return None  # a tower of its own; masks further out are for the text
        mask = bound.get("encoder_attention_mask") if cross and keys else bound.get("attention_mask")
        found = _flat(mask, False)
        if found is not None:
            return found
        decoder = decoder or bound.get("encoder_hidden_states") is not None or bound.get("key_value_states") is not None
    return None


def _inside(call: Call, frame: Frame, part: str) -> bool:
    below = call.layer[len(frame.name) :].lstrip(".") if frame.name else call.layer
    return below.split(".")[0] == part


def _flat(mask: object, ignored: bool) -> tuple[Tensor, bool] | None:
    if isinstance(mask, Tensor) and (mask.ndim == 2 or (ignored and mask.ndim == 1)):
        return mask, ignored
    return None
