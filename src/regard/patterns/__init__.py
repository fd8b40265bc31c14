"""Which pairs meet: static geometry and its algebra."""

from regard.patterns.algebra import And, Not, Or, PerHead, PerSample, per_head, per_sample
from regard.patterns.axes import Congruent, Neighborhood1d, Same
from regard.patterns.diagonals import Diagonals, Dilated, Strided
from regard.patterns.grid import Grid, Neighborhood
from regard.patterns.layout import BlockLayout
from regard.patterns.order import Order, TileOrder
from regard.patterns.pattern import Pattern
from regard.patterns.segments import BlockCausal, Blocks, Segments
from regard.patterns.static import Causal, Columns, Full, Prefix, Queries, Sinks, StaticPattern, Window

__all__ = [
    "And",
    "BlockCausal",
    "BlockLayout",
    "Blocks",
    "Causal",
    "Columns",
    "Congruent",
    "Diagonals",
    "Dilated",
    "Full",
    "Grid",
    "Neighborhood",
    "Neighborhood1d",
    "Not",
    "Or",
    "Order",
    "Pattern",
    "PerHead",
    "PerSample",
    "Prefix",
    "Queries",
    "Same",
    "Segments",
    "Sinks",
    "StaticPattern",
    "Strided",
    "TileOrder",
    "Window",
    "per_head",
    "per_sample",
]
