"""What `attend` would do with a call, before it does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.kernels.attend import backend as backend_named
from regard.kernels.attend import choose
from regard.kernels.calibrate import Rates, rates
from regard.kernels.request import Request, make_request
from regard.patterns.pattern import Pattern

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """The backend of a call, its blocks and its cost; `print` it. Of the forward pass."""

    pattern: Pattern
    backend: str
    left: dict[str, str]
    """Why each other backend was not taken."""
    tier: str
    """What the normaliser needs of a kernel: "fused" or "tiles"."""
    closed_form: bool
    """Blocks follow from intervals; False: the pairs were evaluated to find them."""
    kernel: str
    """What computes a tile."""
    order: str
    """In which order the blocks are cut: memory order, or tiles of a grid."""
    block: list[tuple[int, int]]
    """Sizes of the blocks, (queries, keys); none for a backend that computes every pair."""
    blocks: int
    """Listed blocks, over all samples and heads."""
    full: int
    """Listed blocks that need no mask."""
    pairs: int
    """batch * heads * q_len * kv_len."""
    allowed: int
    """Pairs that the pattern allows."""
    computed: int
    """Pairs in what the backend works through."""
    operations: int
    """``2 (head_dim + v_dim)`` for each computed pair."""
    bytes: int
    """Read and written."""
    rates: Rates
    predicted: float
    """Seconds: operations at the dense kernel's rate or bytes at copy speed, whichever takes longer (of the dense
    backend, one after the other)."""

    @property
    def partial(self) -> int:
        """Listed blocks of which some pairs are forbidden."""
        return self.blocks - self.full

    @property
    def density(self) -> float:
        """Allowed pairs of all pairs, in [0, 1]."""
        return self.allowed / self.pairs if self.pairs else 0.0

    def __str__(self) -> str:
        source = "closed form" if self.closed_form else "evaluated pair by pair: the pattern has no closed form"
        lines = [f"{self.pattern}", f"backend     {self.backend} ({self.tier} normaliser)"]
        lines += [f"            not {name}: {why}" for name, why in self.left.items()]
        if self.block:
            sizes = ", ".join(f"{a} x {b}" for a, b in self.block)
            lines += [
                f"blocks      {self.blocks:,} of {sizes} ({self.full:,} full, {self.partial:,} partial), {source}, "
                f"{self.order}, {self.kernel}"
            ]
        else:
            lines += [f"blocks      none: every pair is computed, {self.kernel}"]
        share = self.computed / self.pairs if self.pairs else 0.0
        lines += [
            f"density     {self.density:.4f} of {self.pairs:,} pairs allowed, {share:.4f} computed",
            f"operations  {self.operations / 1e9:.3f} G",
            f"bytes       {self.bytes / 2**20:.2f} MiB",
            f"predicted   {1e3 * self.predicted:.3f} ms at {self.rates.attention / 1e9:.0f} G operations/s (dense "
            f"attention here) and {self.rates.copy / 1e9:.1f} GB/s (copying here)",
        ]
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None = None, *, backend: str = "auto", **arguments: Any
) -> Explanation:
    """What `attend` would do with the same arguments: which backend and why not the others, blocks, density, cost.

    Counts are exact; the predicted time is that of the forward pass at the rates of this machine, which are measured
    once a process (some 50 ms). Nothing of the call itself is computed.

    Raises:
        ValueError: as `attend` does for the same arguments.
    """
    r = make_request(q, k, v, pattern, **arguments)
    if backend == "auto":
        name, left = choose(r)
    else:
        name, left = backend, {}
        why = backend_named(name).refuses(r)
        if why is not None:
            raise ValueError(f'backend="{name}" refuses this call: {why}')
    told = backend_named(name).describe(r)
    speed = rates(r.q.device, r.q.dtype, r.head_dim, r.v_dim)
    compute, memory = told["operations"] / speed.attention, told["bytes"] / speed.copy
    return Explanation(
        pattern=r.pattern,
        backend=name,
        left=left,
        tier=r.normalize.tier,
        closed_form=r.pattern.closed_form,
        pairs=r.batch * r.heads * r.q_len * r.kv_len,
        allowed=_allowed(r),
        rates=speed,
        predicted=max(compute, memory) if told["block"] else compute + memory,
        **told,
    )


def _allowed(r: Request) -> int:
    told_apart = (r.pattern.heads or 1) * (r.pattern.samples or 1)
    return r.pattern.pairs(r.q_len, r.kv_len, r.q_start) * (r.batch * r.heads // told_apart)
