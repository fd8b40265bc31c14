"""Do token scores say what the model uses, and do two sets of scores say the same?

Soft sufficiency and comprehensiveness (Zhao & Aletras, arXiv 2305.10496); rank agreement of two attributions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.steer.attribution import EMBED, embedded, valid_tokens
from regard.steer.ranks import kendall, kendall_topk, spearman
from regard.watch.anatomy import Anatomy
from regard.watch.places import find_logits
from regard.watch.probe import run
from regard.watch.session import Session
from regard.watch.trace import trace

__all__ = ["Faithfulness", "hellinger", "rank_agreement", "soft_faithfulness"]


class Faithfulness(NamedTuple):
    """Normalised soft sufficiency and comprehensiveness, one a sample; larger is more faithful."""

    sufficiency: Float[Tensor, "batch"]
    comprehensiveness: Float[Tensor, "batch"]


def hellinger(p: Float[Tensor, "*rows n"], q: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Hellinger distance of two distributions, `sqrt(sum (sqrt p - sqrt q)^2 / 2)`, in [0, 1]."""
    return ((p.sqrt() - q.sqrt()).square().sum(-1) / 2).sqrt()


KINDS = ("kendall", "kendall_topk", "spearman")


def rank_agreement(
    a: Float[Tensor, "batch length"],
    b: Float[Tensor, "batch length"],
    kind: str = "kendall",
    *,
    k: int | float | None = None,
    counted: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch"]:
    """How far two attributions order the tokens of a sample alike, in [-1, 1]; arXiv 2205.04559.

    Scores are compared as they come: give absolute ones to compare importance whatever its sign.

    Args:
        kind: "kendall" (tau-b), "spearman", or "kendall_topk" (Fagin et al. with penalty 1/2).
        k: of "kendall_topk": how many tokens, or a share of a sample's tokens (at least one).
        counted: which tokens; None: all. Leave out special tokens, on which most methods agree.

    Returns:
        NaN where a sample has fewer than two tokens, or one side gives all the same score.

    Raises:
        ValueError: an unknown kind, a `k` that is missing or out of place, or more than a sample's tokens.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if (k is None) == (kind == "kendall_topk") or (k is not None and k <= 0):
        raise ValueError(f"k must be a number of tokens or a share of them with kind='kendall_topk' only, got {k}")
    rows = torch.ones_like(a, dtype=torch.bool) if counted is None else counted
    found = []
    for x, y, some in zip(a.double().cpu(), b.double().cpu(), rows.cpu(), strict=True):
        first, second = x[some].numpy(), y[some].numpy()
        if len(first) < 2:
            found.append(float("nan"))
        elif kind == "kendall_topk":
            assert k is not None
            most = max(1, round(k * len(first))) if isinstance(k, float) else k
            found.append(kendall_topk(first, second, most))
        else:
            found.append((kendall if kind == "kendall" else spearman)(first, second))
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def soft_faithfulness(
    model: nn.Module,
    inputs: Any,
    scores: Float[Tensor, "batch length"],
    *,
    pos: int | Int[Tensor, "batch"] = -1,
    masks: int = 20,
    seed: int = 0,
    chunk: int = 10,
    anatomy: Anatomy | None = None,
) -> Faithfulness:
    """How far the output distribution moves when embeddings are dropped in proportion to the scores.

    Scores are scaled to [0, 1] in each sample. Every element of token t's embedding is kept with probability a_t
    (sufficiency) or 1 - a_t (comprehensiveness), H is the mean Hellinger distance over `masks` draws to the whole
    model's distribution at `pos`: `S = 1 - H_suff`, S0 the same with all embeddings zero,
    `sufficiency = max(0, S - S0) / (1 - S0)`, `comprehensiveness = H_comp / (1 - S0)`.

    Args:
        scores: larger is more important; padding is left as it is.
        pos: the column whose distribution is read, or one a sample; unused for logits [batch, classes].

    Returns:
        NaN where dropping everything does not move the distribution.
    """
    if masks < 1:
        raise ValueError(f"masks must be >= 1, got {masks}")
    x = trace(model, inputs, EMBED, anatomy=anatomy)[EMBED]
    batch, length = x.shape[:2]
    if tuple(scores.shape) != (batch, length):
        raise ValueError(f"scores must be [batch, length] = {[batch, length]}, got {list(scores.shape)}")
    valid = valid_tokens(inputs, batch, length)
    real = torch.ones(batch, length, dtype=torch.bool, device=x.device) if valid is None else valid
    low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    a = torch.where(real & (high > low), (scores - low) / (high - low), 0.0)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(x.shape, generator=generator).to(x) for _ in range(masks)]
    at = torch.as_tensor(pos, device=x.device).expand(batch)

    def moved(values: Iterable[Tensor]) -> Tensor:
        """Mean Hellinger distance to the whole model's distribution over these embeddings."""
        runs = embedded(model, inputs, values, chunk, anatomy)
        return torch.stack([hellinger(plain, _distribution(logits, at)) for logits in runs]).mean(0).to(x.device)

    with Session(model, parts=anatomy, inputs=inputs):
        plain = _distribution(find_logits(run(model, inputs))[0], at)
    kept = real[..., None]
    suff = moved(torch.where(kept & (u >= a[..., None]), 0.0, x) for u in draws)
    comp = moved(torch.where(kept & (u < a[..., None]), 0.0, x) for u in draws)
    most = moved([torch.where(kept, 0.0, x)])  # 1 - S0
    most = torch.where(most > 0, most, torch.nan)
    return Faithfulness((most - suff).clamp_min(0) / most, comp / most)


def _distribution(logits: Tensor, at: Int[Tensor, "batch"]) -> Float[Tensor, "batch vocab"]:
    wide = logits.float() if logits.dtype != torch.float64 else logits
    if wide.ndim == 3:
        wide = wide[torch.arange(len(wide), device=wide.device), at]
    return wide.softmax(-1)
