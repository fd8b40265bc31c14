"""Losses that layers bring along: ``layer.aux``, a dict of scalars that a forward pass leaves and a trainer adds."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["clear_aux", "collect_aux"]


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
