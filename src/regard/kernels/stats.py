"""Statistics of attention without the matrix of weights."""

from regard.kernels.reducers import (
    Columns,
    Entropy,
    Features,
    Gram,
    Lse,
    Offsets,
    Pairs,
    PatternMass,
    Squares,
    Top,
)
from regard.kernels.tiles import tile_pass

__all__ = [
    "Columns",
    "Entropy",
    "Features",
    "Gram",
    "Lse",
    "Offsets",
    "Pairs",
    "PatternMass",
    "Squares",
    "Top",
    "tile_pass",
]
