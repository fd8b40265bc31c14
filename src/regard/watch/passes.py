"""One forward pass of the watched model: which columns hold which token, and whether it reads or generates."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

# The masks whose meaning is known: parameter name -> whether True (or nonzero) marks padding.
_MASKS = {"attention_mask": False, "src_key_padding_mask": True, "key_padding_mask": True, "padding_mask": True}
_DECODER_MASKS = {"decoder_attention_mask": False, "tgt_key_padding_mask": True}
_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass
class Axis:
    """One sequence of tokens (a decoder-only model's, an encoder's, a decoder's) in this pass."""

    total: int | None
    """Tokens with padding, cached ones included; None: as long as the tensor that is met."""
    valid: Bool[Tensor, "batch total"] | None
    """False for padding; None: no padding."""
    unread: str | None = None
    """An argument that looks like a padding mask but whose meaning is not known."""


@dataclass
class Pass:
    """One forward pass."""

    step: str
    main: Axis
    decoder: Axis
    batch: int | None = None
    """Samples, where an argument says so."""

    def axis(self, decoder: bool) -> Axis:
        """The axis of a block: the decoder's, or the only one."""
        return self.decoder if decoder else self.main


def open_pass(
    model: nn.Module, args: tuple, kwargs: dict, valid: Bool[Tensor, "batch total"] | None, own_decoder: bool
) -> Pass:
    """Read a pass from the arguments of the model's forward.

    Args:
        model: the module called.
        args, kwargs: what it was called with.
        valid: which columns hold tokens, where the user says so: it wins over the model's own masks.
        own_decoder: an encoder-decoder: `decoder_*` arguments describe the second axis.
    """
    named = _bind(model, args, kwargs)
    past = _past(named.get("past_key_values"))
    fed = _length(named, _DECODER_TOKENS if own_decoder else _TOKENS)
    step = "generated" if fed == 1 and past > 0 else "prompt"
    main = _axis(named, _MASKS, fed=_length(named, _TOKENS), past=0 if own_decoder else past)
    if valid is not None:
        main = Axis(valid.shape[1], valid.bool())
    decoder = _axis(named, _DECODER_MASKS, fed=fed, past=past) if own_decoder else main
    sizes = [len(x) for x in named.values() if isinstance(x, Tensor) and x.ndim > 1]
    return Pass(step, main, decoder, sizes[0] if sizes else None)


def columns(axis: Axis, length: int) -> tuple[int, int]:
    """(first, total): a tensor of `length` tokens holds the columns first ... total - 1, the last ones of the axis."""
    total = length if axis.total is None or length > axis.total else axis.total
    return total - length, total


def token_columns(
    axis: Axis, pos: Any, batch: int, total: int, device: torch.device, where: str
) -> tuple[Int[Tensor, "batch picks"], Bool[Tensor, "batch picks"]]:
    """The column of each wanted token, and whether the sample has it.

    Args:
        axis: the sequence.
        pos: `Site.pos`.
        batch, total, device: of the tensor met.
        where: the site, for errors.
    """
    wanted = _wanted(pos, batch, where).to(device)
    valid = axis.valid
    if valid is None or valid.shape[1] != total or valid.shape[0] not in (1, batch):
        if axis.unread is not None:
            raise ValueError(
                f"{where}: pos counts tokens without padding, and the model's argument {axis.unread!r} may say what "
                "is padding in a way unknown here: pass valid= a bool tensor [batch, length], True for tokens"
            )
        target = torch.where(wanted < 0, wanted + total, wanted)
        return target.clamp(0, total - 1), (target >= 0) & (target < total)
    valid = valid.to(device).expand(batch, total)
    counts = valid.sum(1, keepdim=True)
    target = torch.where(wanted < 0, wanted + counts, wanted)
    # Tokens first, in their order: the t-th token's column is entry t.
    order = torch.argsort((~valid).to(torch.int8), dim=1, stable=True)
    return order.gather(1, target.clamp(0, total - 1)), (target >= 0) & (target < counts)


def token_index(axis: Axis, batch: int, total: int, device: torch.device) -> Int[Tensor, "rows total"]:
    """Which token each column holds, counted without padding; padding counts as the token before it (at least 0)."""
    valid = axis.valid
    if valid is None or valid.shape[1] != total or valid.shape[0] not in (1, batch):
        return torch.arange(total, device=device)[None]
    return (valid.to(device).long().cumsum(1) - 1).clamp_min(0)


def _wanted(pos: Any, batch: int, where: str) -> Tensor:
    if isinstance(pos, int):
        pos = (pos,)
    if isinstance(pos, tuple) and isinstance(pos[0], tuple):
        if len(pos) != batch:
            raise ValueError(f"{where}: pos has {len(pos)} samples, the batch {batch}")
        return torch.tensor(pos)
    return torch.tensor(tuple(pos)).expand(batch, -1)


def _bind(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return dict(kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _past(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _length(named: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        if isinstance(named.get(name), Tensor):
            return named[name].shape[1]
    return None


def _axis(named: Mapping[str, Any], masks: Mapping[str, bool], fed: int | None, past: int) -> Axis:
    total = None if fed is None else fed + past
    for name, marks_padding in masks.items():
        mask = named.get(name)
        if not isinstance(mask, Tensor):
            continue
        if mask.ndim != 2 or (mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all())):
            return Axis(total, None, unread=name)
        valid = mask == 0 if marks_padding else mask != 0
        return Axis(valid.shape[1], valid)
    return Axis(total, None, unread=_looks_like_mask(named, masks))


def _looks_like_mask(named: Mapping[str, Any], known: Mapping[str, bool]) -> str | None:
    others = {*_MASKS, *_DECODER_MASKS} - set(known)
    for name, value in named.items():
        if "mask" in name and name not in others and isinstance(value, Tensor) and value.ndim == 2:
            return name
    return None
