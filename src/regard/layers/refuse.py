"""What a layer cannot take, it says by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def refuse(layer: object, **given: Any) -> None:
    """Raise for every argument that is not None: this layer has no use for it.

    Raises:
        ValueError: naming the argument, what came, and the layer.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be None: {type(layer).__name__} takes no {name}, got {type(value).__name__}")


def need_length(layer: object, length: int, shape: Sequence[int]) -> None:
    """Raise unless a sequence holds exactly the tokens of the grid."""
    expected = 1
    for n in shape:
        expected *= n
    if length != expected:
        sides = " x ".join(map(str, shape))
        raise ValueError(
            f"x must have {expected} tokens, {sides} in row-major order for {type(layer).__name__}, got {length}"
        )


def need_heads(dim: int, heads: int, name: str = "heads") -> None:
    """Raise unless the heads divide the width."""
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"{name} must be at least 1 and divide dim, got dim={dim}, {name}={heads}")
