"""Choosing training documents by what a small model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.watch.anatomy import anatomy_for
from regard.watch.effects import loss
from regard.watch.heads import mask_heads
from regard.watch.intervene import intervene
from regard.watch.places import find_logits
from regard.watch.probe import run

__all__ = ["Influence", "attention_influence", "document_losses", "keep_top"]

IGNORED = -100


class Influence(NamedTuple):
    """What `attention_influence` gives.

    Attributes:
        score: ``(masked - base) / base``.
        base: mean cross-entropy of a token under the whole model, nats.
        masked: the same with the heads masked.
    """

    score: Float[Tensor, "n"]
    base: Float[Tensor, "n"]
    masked: Float[Tensor, "n"]


def attention_influence(
    model: nn.Module,
    heads: Iterable[tuple[int, int]],
    documents: Int[Tensor, "n length"],
    *,
    kind: str = "uniform",
    valid: Bool[Tensor, "n length"] | None = None,
    base: Float[Tensor, "n"] | None = None,
    chunk: int = 16,
    inputs: Callable[[Tensor], Any] | None = None,
) -> Influence:
    """How much of a document's loss is what some heads do: ``(L_masked - L_base) / L_base`` (arXiv 2505.07293).

    With retrieval heads masked it is high for documents whose tokens follow from earlier ones. Documents of one length
    compare; dividing by ``L_base`` favours easy ones, so rank within a domain (`keep_top`).

    Args:
        model: a causal language model; run without gradients.
        heads: (layer, head) pairs to mask, at least one.
        documents: token ids.
        kind: of masking, see `mask_heads`; "uniform" puts ``1/(i + 1)`` on each key that row i may see.
        valid: False at padding on the right, whose tokens are not predicted.
        base: the losses of the whole model, where they are known from an earlier call.
        chunk: documents a forward pass.
        inputs: token ids to what `model` is called with; None: ``model(input_ids=ids, use_cache=False)``.

    Raises:
        ValueError: no head, a base of another length, and what `document_losses` raises.
    """
    chosen = list(heads)
    if not chosen:
        raise ValueError("heads must name at least one (layer, head), got none")
    if base is not None and base.shape != (len(documents),):
        raise ValueError(f"base must be [{len(documents)}], one a document, got {list(base.shape)}")
    how: dict[str, Any] = {"valid": valid, "chunk": chunk, "inputs": inputs}
    whole = document_losses(model, documents, **how) if base is None else base
    masked = document_losses(model, documents, chosen, kind=kind, **how)
    return Influence((masked - whole) / whole, whole, masked)


@torch.no_grad()
def document_losses(
    model: nn.Module,
    documents: Int[Tensor, "n length"],
    masked: Sequence[tuple[int, int]] = (),
    *,
    kind: str = "uniform",
    valid: Bool[Tensor, "n length"] | None = None,
    chunk: int = 16,
    inputs: Callable[[Tensor], Any] | None = None,
) -> Float[Tensor, "n"]:
    """Mean of ``-log p(x_p | x_<p)`` over the tokens p >= 1 of each document, nats, float64.

    Args:
        model, documents, kind, valid, chunk, inputs: as in `attention_influence`.
        masked: heads to mask; none: the whole model.

    Raises:
        ValueError: documents of fewer than two tokens, or ``valid`` of another shape.
    """
    if documents.ndim != 2 or documents.shape[1] < 2:
        raise ValueError(f"documents must be [n, length] with at least 2 tokens, got {list(documents.shape)}")
    if valid is not None and valid.shape != documents.shape:
        raise ValueError(f"valid must have the shape of documents, {list(documents.shape)}, got {list(valid.shape)}")
    device = next(model.parameters()).device
    call = _named if inputs is None else inputs
    edits = mask_heads(masked, kind)
    parts = anatomy_for(model, call(documents[:1].to(device)), None) if edits else None
    losses = []
    for start in range(0, len(documents), chunk):
        ids = documents[start : start + chunk]
        labels = ids if valid is None else ids.masked_fill(~valid[start : start + chunk], IGNORED)
        if edits:
            with intervene(model, edits, anatomy=parts):
                output = run(model, call(ids.to(device)))
        else:
            output = run(model, call(ids.to(device)))
        losses.append(loss(labels)(find_logits(output)[0]).double().cpu())
    return torch.cat(losses)


def keep_top(
    score: Float[Tensor, "n"], domain: Sequence[Hashable] | None = None, share: float = 0.2
) -> Bool[Tensor, "n"]:
    """Which documents to keep: the `share` of highest score of each domain, rounded, the earlier one of equals.

    Args:
        score: of each document.
        domain: of each; None: all of one.
        share: in (0, 1].

    Raises:
        ValueError: another number of domains than of scores, a share outside its range, or a score that is NaN.
    """
    names = [0] * len(score) if domain is None else list(domain)
    if len(names) != len(score):
        raise ValueError(f"domain must hold {len(score)} names, one a score, got {len(names)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if bool(score.isnan().any()):
        raise ValueError(f"score holds {int(score.isnan().sum())} NaN")
    kept = torch.zeros(len(score), dtype=torch.bool)
    for name in dict.fromkeys(names):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name])
        order = score.cpu()[rows].argsort(descending=True, stable=True)
        kept[rows[order[: round(share * len(rows))]]] = True
    return kept


def _named(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "use_cache": False}
