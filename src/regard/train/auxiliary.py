"""Losses beside the main one: ``layer.aux``, scalars that layers leave and a trainer adds, and what blocks gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["block_outputs", "clear_aux", "collect_aux"]


def clear_aux(model: nn.Module) -> None:
    """Empties ``aux`` of every layer that has one, so that nothing of an earlier forward pass is added again."""
    for module in model.modules():
        if isinstance(getattr(module, "aux", None), dict):
            module.aux.clear()  # type: ignore[union-attr, operator]


def collect_aux(model: nn.Module) -> dict[str, Tensor]:
    """The auxiliary losses of the last forward pass, summed over the layers by name; empty where no layer has any.

    Raises:
        ValueError: an entry that is not a tensor of one element, naming the layer and the entry.
    """
    found: dict[str, Tensor] = {}
    for layer, module in model.named_modules():
        aux = getattr(module, "aux", None)
        if not isinstance(aux, dict):
            continue
        for name, value in aux.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"aux[{name!r}] of {layer or 'the model'!r} must be a scalar tensor, got {given}")
            value = value.reshape(())
            found[name] = found[name] + value if name in found else value
    return found


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While inside: what each block gave in the last forward pass, gradients included, for losses on hidden states.

    Of a block that returns a tuple it is the first entry. Before a forward pass the entries are empty tensors.
    """
    given = [torch.empty(0) for _ in blocks]

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            given[index] = out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()
