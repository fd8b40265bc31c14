"""What a backend of `attend` is asked to compute: the arguments, checked and brought to one form."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.kernels.normalize import Elementwise, Normalizer, Softmax
from regard.patterns.decided import Routed
from regard.patterns.pattern import Pattern
from regard.patterns.static import Full

__all__ = ["Request", "kept_layout", "make_request"]


@dataclass(frozen=True, eq=False)
class Request:
    """One call of `attend`, every argument checked. A backend gives ``(out, lse)`` for it or refuses it by name.

    The softmax is over ``softcap(scale * q . k) + bias`` of the pairs that ``pattern`` allows. A query without a key:
    zeros and lse = -inf. ``sink`` is not the backend's: `attend` applies it to the out and lse it gets.
    """

    q: Tensor  # [batch, heads, q_len, head_dim]
    k: Tensor  # [batch, kv_heads, kv_len, head_dim]
    v: Tensor  # [batch, kv_heads, kv_len, v_dim]
    pattern: Pattern  # Full() where none was given
    q_start: int  # absolute index of the first query
    bias: Tensor | None  # [batch|1, heads|1, q_len|1, kv_len|1], floating
    scale: float
    softcap: float | None
    sink: Tensor | None  # [heads]
    normalize: Normalizer
    need_lse: bool
    layout: Any | None  # BlockLayout of the pattern, made before

    @property
    def batch(self) -> int:
        """Samples."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """Heads of k and v; query head h reads ``h // group``."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads a kv head."""
        return self.heads // self.kv_heads

    @property
    def q_len(self) -> int:
        """Queries."""
        return self.q.shape[2]

    @property
    def kv_len(self) -> int:
        """Keys."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Width of q and k."""
        return self.q.shape[3]

    @property
    def v_dim(self) -> int:
        """Width of v."""
        return self.v.shape[3]

    @property
    def empty(self) -> bool:
        """No output numbers, or no key to read."""
        return 0 in (self.batch, self.heads, self.q_len, self.kv_len, self.head_dim)

    @property
    def needs_grad(self) -> bool:
        """Whether autograd records this call."""
        tensors = (self.q, self.k, self.v, self.bias, self.sink)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    @property
    def work_dtype(self) -> torch.dtype:
        """What sums are carried in, and the dtype of the lse: float32, float64 for float64 input."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @cached_property
    def whole(self) -> bool:
        """Every pair is allowed, by a pattern that says so."""
        return isinstance(self.pattern, Full)

    def allowed(self, rows: slice | None = None) -> Tensor:
        """Bool ``[batch|1, heads|1, rows, kv_len]``: the pattern's pairs, evaluated one by one."""
        rows = slice(0, self.q_len) if rows is None else rows
        device = self.q.device
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.q_start
        j = torch.arange(self.kv_len, device=device)[None]
        head = torch.arange(self.heads, device=device)[:, None, None]
        sample = torch.arange(self.batch, device=device)[:, None, None, None]
        found = self.pattern.allows(i, j, head, sample)
        found = found.reshape((1,) * (4 - found.ndim) + tuple(found.shape))
        return found.expand(*found.shape[:2], rows.stop - rows.start, self.kv_len)

    def block_layout(self, block: int | tuple[int, int]) -> Any:
        """The pattern's layout at this block size: the one that was given if it fits, else made, and kept by value."""
        block = (block, block) if isinstance(block, int) else block
        if self.layout is not None and self.layout.block == block:
            return self.layout
        return kept_layout(self.pattern, self.q_len, self.kv_len, block, self.q_start)


_KEPT: OrderedDict[Any, Any] = OrderedDict()
_KEPT_BYTES = 1 << 28


def kept_layout(pattern: Pattern, q_len: int, kv_len: int, block: tuple[int, int], q_start: int) -> Any:
    """Layouts by value of the pattern, the latest used of them, `_KEPT_BYTES` in all."""
    try:
        key = (pattern, q_len, kv_len, block, q_start)
        found = _KEPT.get(key)
    except TypeError:  # a routed pattern holds tensors and has no hash
        return pattern.layout(q_len, kv_len, block, q_start)
    if found is None:
        found = pattern.layout(q_len, kv_len, block, q_start)
        _KEPT[key] = found
        while len(_KEPT) > 1 and sum(x.nbytes for x in _KEPT.values()) > _KEPT_BYTES:
            _KEPT.popitem(last=False)
    else:
        _KEPT.move_to_end(key)
    return found


def make_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | None = None,
    *,
    q_start: int | None = None,
    bias: Tensor | None = None,
    scale: float | int | None = None,
    softcap: float | int | None = None,
    sink: Tensor | None = None,
    normalize: Normalizer | None = None,
    return_lse: bool = False,
    layout: Any | None = None,
) -> Request:
    """Check every argument of `attend`.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """
    batch, heads, q_len, kv_len, head_dim = _check_tensors(q, k, v)
    pattern = _check_pattern(pattern, batch, heads, k.shape[1])
    start = _check_start(q_start, q_len, kv_len)
    pattern.fits(q_len, kv_len, start)
    normalize = Softmax() if normalize is None else normalize
    if not isinstance(normalize, Normalizer):
        raise ValueError(f"normalize must be a Normalizer, Softmax() or Elementwise(...), got {normalize!r}")
    if return_lse and not normalize.has_lse():
        raise ValueError(
            f"return_lse: {normalize} has no log of a row's sum (it needs l1=True and a phi that is never negative)"
        )
    if isinstance(pattern, Routed) and pattern.repeats == "mean" and (return_lse or sink is not None):
        raise ValueError(
            ("return_lse" if return_lse else "sink")
            + ': groups with repeats="mean" average several softmaxes, which have no common log of a sum; use '
            'repeats="merge" or "error"'
        )
    if softcap is not None and not (_finite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a number > 0 (scores become softcap * tanh(s / softcap)), got {softcap!r}")
    if scale is not None and not _finite(scale):
        raise ValueError(f"scale must be a finite number, or None for 1 / sqrt(head_dim), got {scale!r}")
    if sink is not None:
        if isinstance(normalize, Elementwise):
            raise ValueError(f"sink is one more logit of the softmax, and {normalize} is none; leave one of them out")
        if not isinstance(sink, Tensor) or tuple(sink.shape) != (heads,) or not sink.is_floating_point():
            raise ValueError(f"sink must be a floating tensor [heads] = [{heads}], got {_told(sink)}")
        if sink.device != q.device:
            raise ValueError(f"sink must be on the device of q, {q.device}, got {sink.device}")
    return Request(
        q=q,
        k=k,
        v=v,
        pattern=pattern,
        q_start=start,
        bias=_check_bias(bias, (batch, heads, q_len, kv_len), q.device),
        scale=(1 / math.sqrt(head_dim) if head_dim else 1.0) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        sink=sink,
        normalize=normalize,
        need_lse=return_lse or sink is not None,
        layout=_check_layout(layout, (batch, heads, q_len, kv_len)),
    )


def _check_tensors(q: Any, k: Any, v: Any) -> tuple[int, int, int, int, int]:
    for name, x, form in (("q", q, "heads, q_len"), ("k", k, "kv_heads, kv_len"), ("v", v, "kv_heads, kv_len")):
        if not isinstance(x, Tensor) or x.ndim != 4:
            width = "v_dim" if name == "v" else "head_dim"
            raise ValueError(f"{name} must be a tensor [batch, {form}, {width}], got {_told(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, got q {q.dtype} on {q.device} and {name} {x.dtype} on "
                f"{x.device}; nothing is cast here"
            )
    batch, heads, q_len, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must have q's batch {batch} and head_dim {head_dim}, got {list(k.shape)}")
    if tuple(v.shape[:3]) != tuple(k.shape[:3]):
        raise ValueError(
            f"v must have k's batch, kv_heads and kv_len {list(k.shape[:3])}, got {list(v.shape)}; its width is free"
        )
    kv_heads = k.shape[1]
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"k and v must have a number of heads that divides the {heads} of q, got {kv_heads}")
    return batch, heads, q_len, k.shape[2], head_dim


def _check_pattern(pattern: Any, batch: int, heads: int, kv_heads: int) -> Pattern:
    if pattern is None:
        return Full()
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"pattern must be a regard Pattern or None, got {type(pattern).__name__}; "
            "an additive mask goes to bias=, with -inf for pairs that may not meet"
        )
    if isinstance(pattern, Routed) and pattern.q_heads is None and pattern.decisions == kv_heads:
        pattern = pattern.over(heads)  # a decision for each kv head
    for name, given, here in (
        ("heads", getattr(pattern, "heads", None), heads),
        ("samples", getattr(pattern, "samples", None), batch),
    ):
        if given is not None and given != here:
            raise ValueError(f"pattern is one of {given} {name}, got q with {here}")
    return pattern


def _check_start(q_start: Any, q_len: int, kv_len: int) -> int:
    if q_start is None:
        return kv_len - q_len
    if not isinstance(q_start, int) or isinstance(q_start, bool):
        raise ValueError(f"q_start must be an integer, the absolute index of the first query, or None, got {q_start!r}")
    return q_start


def _check_bias(bias: Any, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise ValueError(
            f"bias must be a floating tensor that is added to the scores (-inf forbids a pair), got {_told(bias)}; "
            "which pairs may meet is the pattern's"
        )
    if bias.ndim > 4 or any(m not in (1, n) for m, n in zip(bias.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"bias must broadcast to [batch, heads, q_len, kv_len] = {list(shape)}, got {_told(bias)}")
    if bias.device != device:
        raise ValueError(f"bias must be on the device of q, {device}, got {bias.device}")
    return bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))


def _check_layout(layout: Any, shape: tuple[int, int, int, int]) -> Any:
    if layout is None:
        return None
    batch, heads, q_len, kv_len = shape
    have = [getattr(layout, name, None) for name in ("q_len", "kv_len", "heads", "samples")]
    if have[:2] != [q_len, kv_len] or have[2] not in (1, heads) or have[3] not in (1, batch):
        raise ValueError(
            f"layout must be the pattern's BlockLayout with q_len {q_len}, kv_len {kv_len}, heads 1 or {heads} and "
            f"samples 1 or {batch}, got {type(layout).__name__} with q_len {have[0]}, kv_len {have[1]}, "
            f"heads {have[2]} and samples {have[3]}"
        )
    return layout


def _finite(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _told(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
