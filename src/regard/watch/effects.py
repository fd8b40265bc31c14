"""How much of a difference an intervention makes, and the metrics it is read in."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SMALL_GAP = 1e-3
"""A clean-corrupt difference below this share of the metric's spread says nothing about a patch."""


def recovery(
    patched: Float[Tensor, "*edits batch"],
    clean: Float[Tensor, "batch"],
    corrupt: Float[Tensor, "batch"],
    spread: float | None = None,
) -> Float[Tensor, "*edits batch"]:
    """Denoising: `(m_patched - m_corrupt) / (m_clean - m_corrupt)`, 1 where the patch restores the clean metric.

    Args:
        patched: the metric of the corrupted run with clean values put in, one a sample, for any number of edits.
        clean, corrupt: the metric of the two runs.
        spread: the metric's spread; None: the standard deviation over all clean and corrupt values.

    Returns:
        NaN, with a warning, for samples with `abs(m_clean - m_corrupt) < 1e-3 * spread`.
    """
    return (patched - corrupt) / _gap(clean, corrupt, spread)


def damage(
    patched: Float[Tensor, "*edits batch"],
    clean: Float[Tensor, "batch"],
    corrupt: Float[Tensor, "batch"],
    spread: float | None = None,
) -> Float[Tensor, "*edits batch"]:
    """Noising: `(m_patched - m_clean) / (m_corrupt - m_clean)`, 1 where the patch does the harm of the corruption.

    Arguments and NaN as in `recovery`; `patched` is the metric of the clean run with corrupted values put in.
    """
    return (patched - clean) / _gap(corrupt, clean, spread)


def _gap(a: Tensor, b: Tensor, spread: float | None) -> Tensor:
    gap = a - b
    values = torch.cat([a, b])
    scale = float(values.std(correction=0)) if spread is None else spread
    small = (gap.abs() < SMALL_GAP * scale) | (gap == 0)
    if bool(small.any()):
        warnings.warn(
            f"{int(small.sum())} of {len(gap)} samples have a clean-corrupt difference below {SMALL_GAP} of the "
            f"metric's spread {scale:.3g}: their effect is NaN",
            stacklevel=3,
        )
    return gap.masked_fill(small, float("nan"))


Metric = Callable[[Tensor], Tensor]


def logit_difference(
    answer: Int[Tensor, "batch"], distractor: Int[Tensor, "batch"], *, pos: int = -1, valid: Tensor | None = None
) -> Metric:
    """Metric: logit of the answer minus logit of the distractor.

    Args:
        answer, distractor: token (or class) numbers, one a sample.
        pos: which token, counted without padding, negative from the end; unused for logits [batch, classes].
        valid: bool [batch, length], True for tokens; None: no padding, or on the left only with a negative `pos`.
    """

    def metric(logits: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch"]:
        at = _at(logits, pos, valid)
        return _of(at, answer) - _of(at, distractor)

    return metric


def probability(answer: Int[Tensor, "batch"], *, pos: int = -1, valid: Tensor | None = None) -> Metric:
    """Metric: softmax probability of the answer; arguments as in `logit_difference`."""

    def metric(logits: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch"]:
        return _of(_at(logits, pos, valid).softmax(-1), answer)

    return metric


def kl(reference: Float[Tensor, "batch *rest"], *, pos: int = -1, valid: Tensor | None = None) -> Metric:
    """Metric: `KL(reference || model)` in nats of the distributions at `pos`, `reference` being other logits."""

    def metric(logits: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch"]:
        p, q = (_at(x, pos, valid).log_softmax(-1) for x in (reference.to(logits.device), logits))
        return (p.exp() * (p - q)).sum(-1)

    return metric


def loss(labels: Int[Tensor, "batch *length"], *, shift: bool = True, ignore: int = -100) -> Metric:
    """Metric: mean cross-entropy a sample, in nats.

    Args:
        labels: token numbers [batch, length], or classes [batch].
        shift: the logits of one token predict the label of the next (language models); unused for classes.
        ignore: label that is not counted. A sample without any counted label gives NaN.
    """

    def metric(logits: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch"]:
        scores, wanted = _wide(logits), labels.to(logits.device)
        if wanted.ndim == 1:
            return F.cross_entropy(scores, wanted, ignore_index=ignore, reduction="none")
        if shift:
            scores, wanted = scores[:, :-1], wanted[:, 1:]
        nll = F.cross_entropy(scores.transpose(1, 2), wanted, ignore_index=ignore, reduction="none")
        return nll.sum(1) / (wanted != ignore).sum(1)

    return metric


def _at(logits: Tensor, pos: int, valid: Bool[Tensor, "batch length"] | None) -> Tensor:
    """The scores of one token a sample, in float32 or wider."""
    if logits.ndim == 2:
        return _wide(logits)
    if valid is None:
        return _wide(logits[:, pos])
    valid = valid.to(logits.device)
    target = torch.full((len(logits), 1), pos, device=logits.device)
    target = torch.where(target < 0, target + valid.sum(1, keepdim=True), target)
    if bool((target < 0).any() or (target >= valid.sum(1, keepdim=True)).any()):
        raise IndexError(f"pos={pos}: some sample has fewer tokens")
    order = torch.argsort((~valid.bool()).to(torch.int8), dim=1, stable=True)
    column = order.gather(1, target)
    return _wide(logits[torch.arange(len(logits), device=logits.device), column[:, 0]])


def _of(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(-1, index.to(scores.device)[:, None])[:, 0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
