"""Layers on feature maps ``[batch, dim, height, width]``, and the way between maps and sequences (row-major)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.refuse import need_length, refuse

__all__ = ["MapLayer", "as_map", "as_sequence", "to_map", "to_sequence"]


def to_map(x: Float[Tensor, "batch length dim"], shape: Sequence[int]) -> Float[Tensor, "batch dim height width"]:
    """Tokens in row-major order as a map; ``length = height * width``."""
    height, width = shape
    return x.transpose(1, 2).unflatten(2, (height, width))


def to_sequence(x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch length dim"]:
    """A map as tokens in row-major order."""
    return x.flatten(2).transpose(1, 2)


class MapLayer(nn.Module, ABC):
    """A layer from maps to maps of the same shape."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The map, transformed."""


class _AsMap(MapLayer):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The layer over the map's tokens."""
        return to_map(self.layer(to_sequence(x)), x.shape[2:])


class _AsSequence(nn.Module):
    def __init__(self, layer: nn.Module, shape: tuple[int, int]):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """The map layer over the tokens laid out as a map."""
        refuse(self.layer, context=context, pattern=pattern, state=state)
        need_length(self.layer, x.shape[1], self.shape)
        return to_sequence(self.layer(to_map(x, self.shape)))


def as_map(layer: nn.Module) -> MapLayer:
    """A layer on sequences, used on maps: their tokens in row-major order, and back."""
    return _AsMap(layer)


def as_sequence(layer: nn.Module, height: int, width: int) -> nn.Module:
    """A layer on maps, used on sequences of ``height * width`` tokens in row-major order."""
    return _AsSequence(layer, (height, width))
