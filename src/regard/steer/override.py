"""Rows of a batch that take another row's attention output: one pass tells another what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from regard.watch.call import Call
from regard.watch.seam import Seam

__all__ = ["Override", "override"]

PAPER = "FreeSwim, arXiv 2511.14712"


def override(
    model: nn.Module,
    source_row: int | Sequence[int],
    target_row: int | Sequence[int],
    layers: Sequence[str] | None = None,
    *,
    every: int = 1,
) -> Override:
    """In chosen attention layers, rows of the batch get the output of other rows: ``with override(model, 1, 0): ...``.

    ``out[target] = out[source]``, heads and tokens alike, before the layer's output projection; the sources keep their
    own. FreeSwim (arXiv 2511.14712) runs a windowed row and a full row from one latent and gives both the full row's
    cross-attention.

    Args:
        model: the module that is called.
        source_row, target_row: rows of the batch, as many of the one as of the other; no row may be both.
        layers: shell-style patterns of the attention modules' names; None: all cross-attention.
        every: the batch holds the sources in forwards 0, every, 2 every, ... counted from opening; what they gave is
            kept, and given to the targets in the forwards between, whose batch is without the sources. `Override.due`
            tells which comes next.

    Raises:
        ValueError: rows that are no rows, or are source and target at once, or ``every`` below 1; while running, naming
            the layer: a batch without these rows, other tokens than those kept, or windows folded into the batch.
        RuntimeError: on closing, for a model that ran without any such layer.
    """
    return Override(model, source_row, target_row, layers, every)


class Override:
    """The context that `override` gives."""

    def __init__(
        self,
        model: nn.Module,
        source_row: int | Sequence[int],
        target_row: int | Sequence[int],
        layers: Sequence[str] | None,
        every: int,
    ) -> None:
        self.sources, self.targets = _rows("source_row", source_row), _rows("target_row", target_row)
        if len(self.sources) != len(self.targets):
            raise ValueError(
                f"source_row and target_row must be as many rows, got {len(self.sources)} and {len(self.targets)}"
            )
        both = set(self.sources) & set(self.targets)
        if both or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"target_row must be rows that are none of source_row and none twice, got {list(self.targets)} "
                f"beside {list(self.sources)}"
            )
        if isinstance(layers, str):
            raise ValueError(f"layers must be a sequence of names, got the string {layers!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.layers, self.every = None if layers is None else tuple(layers), every
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._next, self._ran = 0, False
        self._hook: Any = None
        self._model = model
        self._seam = Seam(model, self._answer, edits=True)

    @property
    def due(self) -> bool:
        """Whether the next forward must hold the sources."""
        return self._next % self.every == 0

    def __enter__(self) -> Override:
        self._kept, self._next, self._ran = {}, 0, False
        self._seam.__enter__()
        self._hook = self._model.register_forward_hook(self._count)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._hook.remove()
        self._kept = {}
        self._seam.__exit__(kind, error, trace)
        if error is None and self._next and not self._ran:
            which = "no cross-attention" if self.layers is None else f"no attention layer like {', '.join(self.layers)}"
            raise RuntimeError(f"{type(self._model).__name__} ran {self._next} times with {which}; nothing was changed")

    def _count(self, *_: Any) -> None:
        self._next += 1

    def _meant(self, call: Call) -> bool:
        if self.layers is None:
            return call.kind == "cross"
        return any(fnmatchcase(call.layer, like) for like in self.layers)

    def _answer(self, call: Call) -> Tensor | None:
        if not self._meant(call):
            return None
        if call.folded:
            raise ValueError(f"layer {call.layer!r} folds windows into the batch, so its rows are not the model's")
        self._ran = True
        out, key = call.run(), (call.layer, call.index)
        asked = max(self.targets + (self.sources if self.due else ()))
        if asked >= len(out):
            raise ValueError(
                f"layer {call.layer!r} ran on a batch of {len(out)}, which has no row {asked}"
                + ("" if self.every == 1 else f" (forward {self._next}, sources every {self.every})")
            )
        if self.due:
            self._kept[key] = out[list(self.sources)]
        kept = self._kept.get(key)
        if kept is None or kept.shape[1:] != out.shape[1:]:
            told = "nothing" if kept is None else str(tuple(kept.shape[1:]))
            raise ValueError(
                f"layer {call.layer!r}: rows give [heads, tokens, width] {tuple(out.shape[1:])}, kept is {told}"
            )
        index = torch.tensor(self.targets, device=out.device)
        return out.index_copy(0, index, kept.to(out.dtype))


def _rows(name: str, rows: int | Sequence[int]) -> tuple[int, ...]:
    found = (rows,) if isinstance(rows, int) else tuple(rows)
    if not found or any(not isinstance(r, int) or r < 0 for r in found):
        raise ValueError(f"{name} must be rows of the batch from 0, got {rows!r}")
    return found
