"""Where in a model: a `Site` names one tensor of one layer, for reading (`trace`) and for changing (`intervene`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SEAM_PARTS = ("q", "k", "v", "weights", "z")
"""Parts met inside the attention call, [batch, heads, length, head_dim] (weights: [batch, heads, q_len, kv_len])."""

BLOCK_PARTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Parts of the stream around one block, shaped [batch, length, dim]."""

MODEL_PARTS = ("embed", "final", "logits")
"""Parts that the model has once: token embeddings, the stream after the final norm, the output scores."""

PARTS = SEAM_PARTS + BLOCK_PARTS + MODEL_PARTS
STEPS = ("all", "prompt", "generated")


@dataclass(frozen=True)
class Site:
    """One tensor of a model.

    Args:
        layer: number of the block (negative from the end), or the module name of a block or of an attention
            module (a decoder's cross-attention has its own name); None for `embed`, `final` and `logits`.
        part: `q`, `k`, `v`, `weights`, `z` (head outputs before the output projection); `resid_pre`, `attn_out`,
            `resid_mid`, `mlp_out`, `resid_post`; `embed`, `final`, `logits`.
        head: one query head, several, or None for all; attention parts only.
        pos: which tokens, counted without padding, per sample, negative from the end (in a cached decoding step
            the end is the newest token): an int, several ints, a `range`, or one tuple per sample, all equally
            long. None: every token, padding included. For `k` and `v` tokens are keys, else queries.
        steps: `all` forward passes, those of the `prompt`, or those of `generated` tokens.

    What is read has the part's shape, with an int `head` or `pos` dropping its dimension.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """

    layer: int | str | None
    part: str
    head: int | Sequence[int] | None = None
    pos: int | Sequence[int] | Sequence[Sequence[int]] | None = None
    steps: str = "all"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            hint = " (the order is Site(layer, part))" if self.layer in PARTS else ""
            raise ValueError(f"part={self.part!r} is not a part of a model{hint}; accepted: {', '.join(PARTS)}")
        if self.steps not in STEPS:
            raise ValueError(f"steps={self.steps!r}; accepted: {', '.join(STEPS)}")
        object.__setattr__(self, "layer", _layer(self.layer, self.part))
        object.__setattr__(self, "head", _heads(self.head, self.part))
        object.__setattr__(self, "pos", _positions(self.pos))

    @property
    def in_attention(self) -> bool:
        """Whether the site is met inside the attention call (else by a hook on a module)."""
        return self.part in SEAM_PARTS

    def __str__(self) -> str:
        bits = [] if self.layer is None else [repr(self.layer)]
        bits += [repr(self.part)]
        bits += [f"{name}={getattr(self, name)!r}" for name in ("head", "pos") if getattr(self, name) is not None]
        bits += [f"steps={self.steps!r}"] if self.steps != "all" else []
        return f"Site({', '.join(bits)})"


def _integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _layer(layer: Any, part: str) -> int | str | None:
    if layer is not None and not _integer(layer) and not isinstance(layer, str):
        raise TypeError(f"layer={layer!r}: give the number of a block, or a module's name, or None")
    if layer is None and part not in MODEL_PARTS:
        raise ValueError(f"{part!r} exists once per layer: give layer= a number or a module's name")
    if layer is not None and part in MODEL_PARTS:
        raise ValueError(f"{part!r} exists once per model: give layer=None, not {layer!r}")
    return layer


def _heads(head: Any, part: str) -> int | tuple[int, ...] | None:
    if head is None:
        return None
    if part not in SEAM_PARTS:
        raise ValueError(
            f"head={head!r}: {part!r} has no heads (they are summed by the output projection); "
            f"the parts with heads are {', '.join(SEAM_PARTS)}; use 'z' for what one head writes"
        )
    if _integer(head):
        if head < 0:
            raise ValueError(f"head={head}: heads are counted from 0")
        return head
    several = _ints(head)
    if several is None or min(several) < 0 or len(set(several)) < len(several):
        raise TypeError(f"head={head!r}: give an int, or different ints counted from 0, or None for all heads")
    return several


def _positions(pos: Any) -> Any:
    if pos is None or _integer(pos):
        return pos
    if isinstance(pos, range) and len(pos):
        return pos
    several = _ints(pos)
    if several is not None:
        return several
    if isinstance(pos, (list, tuple)) and pos and all(_ints(p) for p in pos):
        rows = tuple(_ints(p) or () for p in pos)
        if len({len(r) for r in rows}) == 1:
            return rows
        raise ValueError(f"pos={pos!r}: per-sample positions must be equally many for every sample")
    raise TypeError(f"pos={pos!r}: give an int, ints, a range, one tuple of ints per sample, or None for all tokens")


def _ints(xs: Any) -> tuple[int, ...] | None:
    ok = isinstance(xs, (list, tuple, range)) and len(xs) > 0 and all(_integer(x) for x in xs)
    return tuple(xs) if ok else None
