"""Marking of the examples whose answer depends on the user's context (arXiv 2411.02688)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Indicated", "with_indicator"]


class Indicated(NamedTuple):
    """Sequences, one token longer: `ids` and `labels` [n, length + 1], and which of them are `marked` [n]."""

    ids: Tensor
    labels: Tensor
    marked: Tensor


def with_indicator(
    ids: Int[Tensor, "n length"],
    labels: Int[Tensor, "n length"],
    at: Int[Tensor, "n"],
    score: Float[Tensor, "n"],
    indicator: int,
    *,
    threshold: float | int | None = None,
    quantile: float | int | None = None,
    pad: int = 0,
    ignored: int = -100,
) -> Indicated:
    """Put the indicator at the end of the user's turn where the score exceeds a threshold.

    A threshold of one layer and model (0.6 in the paper) says little about another's: a quantile marks the same share.

    Args:
        ids, labels: the examples; a label stands where its token does.
        at: where the indicator goes: the first position after the user's words; what stands there moves on.
        score: how much each answer depends on the context (`regard.measures.context.user_attention`).
        indicator: the token.
        threshold: of the score; above it is marked.
        quantile: or the threshold is this quantile of the scores. Give one of the two.
        pad, ignored: token and label at the end of the examples that are not marked.

    Raises:
        ValueError: neither or both of threshold and quantile; a position or quantile out of range.
    """
    if (threshold is None) == (quantile is None):
        raise ValueError(f"give threshold or quantile, got threshold={threshold}, quantile={quantile}")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    length = ids.shape[1]
    if len(at) and not 0 <= int(at.min()) <= int(at.max()) <= length:
        raise ValueError(f"at must be in 0..{length}, got {int(at.min())}..{int(at.max())}")
    least = float(threshold) if threshold is not None else float(torch.quantile(score.double(), float(quantile or 0)))
    marked: Bool[Tensor, "n"] = score.double() > least
    place = torch.arange(length + 1, device=ids.device)
    moved = marked[:, None] & (place > at[:, None])
    source = (place - moved.long()).clamp(max=length)
    wide = (torch.nn.functional.pad(x, (0, 1), value=v) for x, v in ((ids, pad), (labels, ignored)))
    new_ids, new_labels = (x.gather(1, source) for x in wide)
    here = marked[:, None] & (place == at[:, None])
    return Indicated(new_ids.masked_fill(here, indicator), new_labels.masked_fill(here, ignored), marked)
