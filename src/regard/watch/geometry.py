"""Where the rows and keys of a call stand in their samples, and what a head with uniform weights would show there.

All layers of a forward that share mask and positions share one `Geometry`. Densities, chances and counts of allowed
keys are the statistics of the uniform head: the same pass with scores of zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .call import Call
from .padding import allowed

BINS = 32


@dataclass
class Geometry:
    """Positions within the samples; rows and keys count from each sample's first token that is not padding."""

    call_kind: str
    causal: bool
    q_first: Int[Tensor, "batch"]
    """Padded-axis position of each sample's first query token."""
    k_first: Int[Tensor, "batch"]
    length: Int[Tensor, "batch"]
    """Keys of each sample so far."""
    q_pos: Int[Tensor, "batch q_len"]
    k_pos: Int[Tensor, "batch kv_len"]
    rows: Bool[Tensor, "batch q_len"]
    """Rows that count."""
    keys: Bool[Tensor, "batch kv_len"]
    """Keys that hold a token."""
    q_start: int
    longest: Int[Tensor, "batch q_len"]
    """The longest |i-j| a row could have (at least 1)."""
    q_bin: Int[Tensor, "batch q_len"]
    k_bin: Int[Tensor, "batch kv_len"]
    allowed: Bool[Tensor, "#batch #heads #q_len #kv_len"] | None
    """The mask as bool; None if the call had none."""
    is_causal: bool
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Samples."""
        return self.q_pos.shape[0]

    @property
    def positional(self) -> bool:
        """Whether a query's position may be compared with a key's."""
        return self.call_kind == "self"

    @property
    def offsets(self) -> tuple[int, int]:
        """All offsets i - j that the call can have: lo <= offset < hi."""
        kv_len, q_len = self.k_pos.shape[1], self.q_pos.shape[1]
        return (0 if self.causal else self.q_start - kv_len + 1), self.q_start + q_len


def geometry_of(
    call: Call,
    rows: Bool[Tensor, "batch q_len"],
    first: tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]] | None,
) -> Geometry:
    """The geometry of a call; `first` from an earlier call of the same sequence and layer, if there was one."""
    q_abs, k_abs, valid, keys = call.q_pos, call.kv_pos, call.valid, call.kv_valid
    if first is None:
        k_first = _first(k_abs, keys)
        q_first = k_first if call.kind == "self" else _first(q_abs, valid)
    else:
        q_first, k_first = first
    q_pos, k_pos = q_abs[None] - q_first[:, None], k_abs[None] - k_first[:, None]
    keys = keys & (k_pos >= 0)
    length = torch.where(keys, k_pos + 1, 0).amax(1).clamp(min=1)
    if call.kind == "self":
        q_length = length
        longest = q_pos if call.causal else torch.maximum(q_pos, length[:, None] - 1 - q_pos)
    else:
        q_length = torch.where(valid, q_pos + 1, 0).amax(1).clamp(min=1)
        longest = torch.ones_like(q_pos)
    mask = None if call.mask is None else allowed(call.mask)
    if mask is not None and mask.shape[1] > 1 and bool((mask == mask[:, :1]).all()):
        mask = mask[:, :1]
    return Geometry(
        call_kind=call.kind,
        causal=call.causal,
        q_first=q_first,
        k_first=k_first,
        length=length,
        q_pos=q_pos,
        k_pos=k_pos,
        rows=rows & valid,
        keys=keys,
        q_start=call.q_start,
        longest=longest.clamp(min=1),
        q_bin=_bins(q_pos, q_length),
        k_bin=_bins(k_pos, length),
        allowed=mask,
        is_causal=call.is_causal,
    )


def _first(positions: Tensor, valid: Tensor) -> Tensor:
    beyond = torch.full_like(positions, 2**31 - 1)
    first = torch.where(valid, positions[None], beyond[None]).amin(1)
    return torch.where(valid.any(1), first, torch.zeros_like(first))


def _bins(positions: Tensor, length: Tensor) -> Tensor:
    return (positions * BINS // length[:, None]).clamp(0, BINS - 1)


def one_hot(bins: Int[Tensor, "batch n"], used: Bool[Tensor, "batch n"], dtype: torch.dtype) -> Tensor:
    """Indicators [batch, n, BINS] of the used places."""
    out = torch.zeros(*bins.shape, BINS, dtype=dtype, device=bins.device)
    return out.scatter_(2, bins[..., None], used[..., None].to(dtype))


def pad_positions(values: Tensor, length: int) -> Tensor:
    """`values` [..., n] grown with zeros to [..., length]."""
    return torch.nn.functional.pad(values, (0, length - values.shape[-1])) if values.shape[-1] < length else values
