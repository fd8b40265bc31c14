"""What a head attends to, from some of its rows: enough to name it and to say which patterns are worth trying.

Full rows of weights of `ROWS` queries a sample, spread evenly: ``ROWS / length`` of what all weights would cost. Whole
statistics, over all queries, are `regard.watch`'s; where an atlas has named the heads, its names stand instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.measures.roles import DEFAULT, MIXED

__all__ = ["Evidence", "observe", "role_of"]

ROWS = 128
SINKS = 4
NEAR = 64
"""Keys on each side that count as near; fewer in short sequences, an eighth of them."""


@dataclass(eq=False)
class Evidence:
    """Sums over the rows looked at, of each head of a layer; divide by `rows`."""

    causal: bool
    length: int
    sums: dict[str, Float[Tensor, "heads"]] = field(default_factory=dict)
    received: Float[Tensor, "heads length"] | None = None
    """Mass that each key receives."""
    offset: Float[Tensor, "heads offsets"] | None = None
    """Mass at each distance ``q - k``, from ``1 - length`` to ``length - 1``."""
    seen: Float[Tensor, "offsets"] | None = None
    """Mass at each distance if weights were even."""
    rows: int = 0

    def mean(self, name: str) -> Float[Tensor, "heads"]:
        """A share of mass, in [0, 1]."""
        return self.sums[name] / max(self.rows, 1)

    def add(self, other: Evidence) -> None:
        """Rows of another call of the same layer; one of another length is left out."""
        if other.length != self.length or other.causal != self.causal:
            return
        assert self.received is not None
        assert other.received is not None
        assert self.offset is not None
        assert other.offset is not None
        self.sums = {name: x + other.sums[name] for name, x in self.sums.items()}
        self.received, self.offset = self.received + other.received, self.offset + other.offset
        self.rows += other.rows

    def periods(self) -> list[tuple[int, float, float]]:
        """Of each head the distance whose multiples (but 0) hold most mass: ``(period, share, lift over even ones)``.

        Each diagonal is three keys wide. (0, 0, 0) where there is none.
        """
        assert self.offset is not None
        assert self.seen is not None
        n, heads = self.length, len(self.offset)
        mass = self.offset.double().cpu().numpy() / max(self.rows, 1)
        even = self.seen.double().cpu().numpy()[None]
        both = np.concatenate([mass, even])
        # three keys wide, and distances of both signs added up
        wide = both + np.pad(both, ((0, 0), (1, 0)))[:, :-1] + np.pad(both, ((0, 0), (0, 1)))[:, 1:]
        ahead = wide[:, n - 1 :]
        if not self.causal:
            ahead = ahead + wide[:, n - 1 :: -1]
        periods = range(8, n // 2 + 1)
        held = np.array([ahead[:, period::period].sum(1) for period in periods]).reshape(-1, heads + 1)
        found = []
        for head in range(heads):
            lift = held[:, head] / np.maximum(held[:, -1], 1e-12)
            most = held[lift >= 2, head].max(initial=0.0)
            # multiples of half a period are no fewer: of those that hold nearly all, the most telling
            at = np.flatnonzero((lift >= 2) & (held[:, head] >= 0.9 * most) & (held[:, head] > 0))
            if not len(at):
                found.append((0, 0.0, 0.0))
                continue
            best = int(at[lift[at].argmax()])
            found.append((periods[best], float(held[best, head]), float(lift[best])))
        return found


def observe(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    *,
    scale: float,
    q_start: int,
    causal: bool,
    mask: Tensor | None = None,
    rows: Int[Tensor, "n"] | None = None,
) -> Evidence:
    """Evidence from some rows; ``mask``: that of the call, bool or added to the scores."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if rows is None:
        rows = torch.linspace(0, q_len - 1, min(ROWS, q_len), device=q.device).round().long().unique()
    group = q.shape[1] // k.shape[1]
    scores = q.index_select(2, rows).float() @ k.repeat_interleave(group, 1).float().transpose(2, 3) * scale
    at = rows + q_start
    distance = at[:, None] - torch.arange(kv_len, device=q.device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        part = mask.expand(*mask.shape[:2], q_len, kv_len).index_select(2, rows)
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    weights = scores.softmax(-1).nan_to_num(0.0).mean(0)  # a row without a key has no weights
    found = Evidence(causal, kv_len, rows=len(rows))
    near = min(NEAR, max(1, kv_len // 8))
    local = (distance.abs() <= near) & allowed
    first = (torch.arange(kv_len, device=q.device) < SINKS)[None] & allowed
    parts = {
        "sink": first,
        "previous-token": distance == 1,
        "own": distance == 0,
        "local": local,
        "streaming": local | first,
    }
    found.sums = {name: (weights * part).sum((1, 2)) for name, part in parts.items()}
    many = allowed.sum(1).clamp(min=1)
    even = allowed / many[:, None]
    # how even the weights are: the entropy as a share of its greatest value
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    found.sums["uniform"] = (entropy / many.log().clamp(min=1e-9)).clamp(max=1).sum(-1)
    found.received = weights.sum(1)
    index = (distance + kv_len - 1).flatten()
    found.offset = torch.zeros(q.shape[1], 2 * kv_len - 1, device=q.device)
    found.offset.index_add_(1, index, weights.flatten(1))
    seen = torch.zeros(2 * kv_len - 1, device=q.device).index_add_(0, index, even.flatten())
    found.seen = seen / max(len(rows), 1)
    return found


def role_of(evidence: Evidence, head: int, period: tuple[int, float, float]) -> tuple[str, dict[str, float]]:
    """A name in the words of `regard.roles`, and the shares of mass behind it.

    By the thresholds of `regard.measures.roles` where they are on these shares. Retrieval and induction need a task
    and are not told from rows: such heads are "global" or "mixed" here.
    """
    shares = {name: float(evidence.mean(name)[head]) for name in evidence.sums}
    distance, share, lift = period
    assert evidence.received is not None
    received = evidence.received[head] / max(evidence.rows, 1)
    columns = int(min(16, max(1, evidence.length // 8)))
    shares["vertical stripe"] = float(received.topk(columns).values.sum())
    shares |= {"multi-diagonal": share, "multi-diagonal/period": float(distance), "multi-diagonal/lift": lift}
    diagonal = shares["own"] + shares["previous-token"]
    if shares["previous-token"] > DEFAULT["previous-token"]:
        return "previous-token", shares
    if shares["sink"] > DEFAULT["sink"]:
        return "sink", shares
    if share >= 0.3 and lift >= 2:
        return "multi-diagonal", shares
    if diagonal >= 0.5:
        return "diagonal", shares
    if shares["vertical stripe"] >= 0.5 and columns * 8 <= evidence.length:
        return "vertical stripe", shares
    if shares["local"] >= DEFAULT["local"]:
        return "local", shares
    if shares["streaming"] >= DEFAULT["streaming"]:
        return "streaming", shares
    if shares["uniform"] >= DEFAULT["uniform"]:
        return "uniform", shares
    return ("global" if shares["local"] < 0.35 else MIXED), shares
