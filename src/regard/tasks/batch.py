"""What every task hands out: token ids with labels, named spans and named groups of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

#: Label of a position whose token is not asked for (the ``ignore_index`` of PyTorch and transformers).
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A batch of one task.

    Attributes:
        input_ids: token ids ``[batch, length]``.
        labels: ``labels[b, p]`` is ``input_ids[b, p]`` where the token at p is asked for (predicted by the row of
            p - 1, as in transformers' causal models) and ``IGNORED`` elsewhere.
        spans: named stretches of tokens, ``[batch, 2]`` holding (start, end), end excluded.
        groups: named sets of keys, masks ``[batch, length]``.
        valid: False at padding ``[batch, length]``.
    """

    input_ids: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    spans: dict[str, Int[Tensor, "batch 2"]] = field(default_factory=dict)
    groups: dict[str, Bool[Tensor, "batch length"]] = field(default_factory=dict)
    valid: Bool[Tensor, "batch length"] | None = None

    def __post_init__(self) -> None:
        if self.valid is None:
            object.__setattr__(self, "valid", torch.ones_like(self.input_ids, dtype=torch.bool))
        shape = self.input_ids.shape
        if len(shape) != 2:
            raise ValueError(f"input_ids must be [batch, length], got shape {tuple(shape)}")
        whole = {"labels": self.labels, "valid": self.valid} | {f"groups[{k!r}]": v for k, v in self.groups.items()}
        for name, value in whole.items():
            if value is None or value.shape != shape:
                raise ValueError(f"{name} must have the shape of input_ids, {tuple(shape)}")
        for name, span in self.spans.items():
            if span.shape != (shape[0], 2):
                raise ValueError(f"spans[{name!r}] must be [batch, 2] = [{shape[0]}, 2], got {tuple(span.shape)}")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __iter__(self) -> Iterator[Batch]:
        """The samples, each as a batch of one."""
        return (self[i : i + 1] for i in range(len(self)))

    def __getitem__(self, rows: slice | Int[Tensor, "rows"]) -> Batch:
        """Some of the samples, as a batch: a slice of them, or their numbers."""
        if not isinstance(rows, (slice, Tensor)):
            raise TypeError(f"a Batch is indexed by slices of its samples or tensors, got {type(rows).__name__}")
        assert self.valid is not None
        return Batch(
            self.input_ids[rows],
            self.labels[rows],
            {k: v[rows] for k, v in self.spans.items()},
            {k: v[rows] for k, v in self.groups.items()},
            self.valid[rows],
        )
