"""Landmark tokens at the end of every block of a text."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["insert_landmarks", "is_landmark"]


@overload
def insert_landmarks(ids: Tensor, every: int, landmark: int) -> Tensor: ...


@overload
def insert_landmarks(ids: Batch, every: int, landmark: int) -> Batch: ...


def insert_landmarks(ids: Tensor | Batch, every: int, landmark: int) -> Tensor | Batch:
    """A landmark after every ``every`` tokens: blocks of ``every + 1``; the last may lack its end.

    Landmark attention, arXiv 2305.16300. A `Batch` keeps its meaning: labels of landmarks are ``IGNORED`` (one is never
    asked for; leave its logit out of the loss, and never emit it), spans and groups move along, and a span that goes
    over a landmark holds it. The token after a landmark is predicted by the landmark's row.

    Args:
        ids: ``[..., length]``, or a batch.
        every: tokens of a block before its landmark, at least 1.
        landmark: its id.

    Raises:
        ValueError: every is below 1, or ids hold the landmark already.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if isinstance(ids, Tensor):
        if bool((ids == landmark).any()):
            raise ValueError(f"landmark must be an id that the text does not have, got {landmark}")
        return _spread(ids, every, landmark)
    assert ids.valid is not None
    moved = {name: _moved(span, every) for name, span in ids.spans.items()}
    groups = {name: _spread(group, every, False) for name, group in ids.groups.items()}
    return Batch(
        insert_landmarks(ids.input_ids, every, landmark),
        _spread(ids.labels, every, IGNORED),
        moved,
        groups,
        _spread(ids.valid, every, True),
    )


def is_landmark(length: int, every: int) -> Tensor:
    """Which of the positions ``0..length-1`` of a text with landmarks hold one, bool ``[length]``."""
    return torch.arange(length) % (every + 1) == every


def _spread(x: Tensor, every: int, fill: int | bool) -> Tensor:
    length = x.shape[-1]
    out = x.new_full((*x.shape[:-1], length + length // every), fill)
    at = torch.arange(length, device=x.device)
    out[..., at + at // every] = x
    return out


def _moved(span: Tensor, every: int) -> Tensor:
    """Starts and ends of spans; an end is one past the last token's new place."""
    start, stop = span.unbind(1)
    last = (stop - 1).clamp(min=0)
    end = torch.where(stop > start, last + last // every + 1, start + start // every)
    return torch.stack([start + start // every, end], 1)
