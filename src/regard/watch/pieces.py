"""Running a batch a few samples at a time: which samples together, the inputs of some, the logits of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from regard.watch.edits import Edit
from regard.watch.site import Site

CPU_TOKENS = 2048
"""What a forward pass on a CPU should hold at most: more leaves the cache, and its memory is made anew each time."""

SHARED = ("cache_position",)
"""Arguments whose first dimension is never the batch."""


def pieces(
    model: nn.Module, inputs: Any, copies: int, rows: int | None, changes: Iterable[Edit | Site]
) -> list[slice] | None:
    """The samples that run together, `rows` at a time; None: all of them.

    Args:
        model: on a CPU `rows=None` means as many as make 2,048 tokens with the copies.
        inputs: as for `trace`.
        copies: of each sample in a pass.
        rows: how many; None: see `model`.
        changes: what is done to them.

    Raises:
        ValueError: rows were asked for, and an edit tells samples apart, or the inputs hold no token numbers.
    """
    shape = _token_shape(inputs)
    apart = next((e for e in changes if tells_apart(e)), None)
    if rows is None:
        device = next((p.device.type for p in model.parameters()), "cpu")
        if shape is None or apart is not None or device != "cpu":
            return None
        rows = max(1, CPU_TOKENS // (copies * shape[1]))
    elif shape is None:
        raise ValueError(f"rows={rows}: the inputs hold no token numbers [batch, length] to be split; leave it out")
    elif apart is not None and rows < shape[0]:
        raise ValueError(
            f"rows={rows}: {apart if isinstance(apart, Site) else apart.site} tells the samples of the batch apart "
            "(their mean, one for another, values or positions for each), so they run together: leave rows out"
        )
    batch = shape[0]
    return None if rows >= batch else [slice(at, min(at + rows, batch)) for at in range(0, batch, rows)]


def tells_apart(change: Edit | Site) -> bool:
    """Whether a change depends on which samples share the batch. What a patch sets is cut along with them."""
    site = change if isinstance(change, Site) else change.site
    if isinstance(site.pos, tuple) and isinstance(site.pos[0], tuple):
        return True
    if isinstance(change, Site):
        return False
    if change.op == "resample" or (change.op == "mean" and change.value is None):
        return True
    return change.op != "mean" and isinstance(change.value, Tensor) and change.value.ndim > 1 and len(change.value) > 1


def part_of(inputs: Any, piece: slice, batch: int) -> Any:
    """The inputs with some samples of every tensor that has `batch` of them."""
    if isinstance(inputs, Mapping):
        return {name: x if name in SHARED else part_of(x, piece, batch) for name, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(part_of(x, piece, batch) for x in inputs)
    if isinstance(inputs, Tensor) and inputs.ndim and len(inputs) == batch:
        return inputs[piece]
    return inputs


class Gathered:
    """The logits of several copies of a batch, put together from the passes over its pieces."""

    def __init__(self, copies: int) -> None:
        self.logits: list[Tensor] = []
        self.copies = copies

    def add(self, logits: Tensor, piece: slice | None, batch: int) -> None:
        """What a pass over the copies of a piece gave."""
        parts = logits.split(len(logits) // self.copies)
        if piece is None:
            self.logits = list(parts)
            return
        if not self.logits:
            self.logits = [part.new_empty(batch, *part.shape[1:]) for part in parts]
        for whole, part in zip(self.logits, parts, strict=True):
            whole[piece] = part


def _token_shape(inputs: Any) -> tuple[int, int] | None:
    values: Sequence[Any]
    if isinstance(inputs, Mapping):
        values = [inputs.get("input_ids")]
    else:
        values = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    if any(hasattr(x, "get_seq_length") for x in (inputs.values() if isinstance(inputs, Mapping) else values)):
        return None  # a cache, which `stack` refuses by name
    for x in values:
        if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point():
            return x.shape[0], x.shape[1]
    return None
