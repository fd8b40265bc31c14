"""Which pairs meet: static geometry and its algebra."""

from regard.patterns.algebra import And, Not, Or
from regard.patterns.axes import Congruent, Neighborhood1d, Same
from regard.patterns.block_topk import BlockTopK
from regard.patterns.candidates import candidates
from regard.patterns.coverage import centers, depth, first_gap, influence, reach
from regard.patterns.diagonals import Diagonals, Dilated, Strided
from regard.patterns.each import PerHead, PerSample, per_head, per_sample
from regard.patterns.grid import Grid, Neighborhood
from regard.patterns.hip import HiP
from regard.patterns.hops import HopWindow
from regard.patterns.last_token import LastTokenPeek, SelfAnd
from regard.patterns.layout import BlockLayout
from regard.patterns.line import Line
from regard.patterns.order import Order, TileOrder
from regard.patterns.orders import AxisOrder, GridOrder, HilbertOrder
from regard.patterns.pattern import Pattern
from regard.patterns.permuted import Permuted
from regard.patterns.power import BlockWindow, DilatedBlocks, LongNet, PowerOfTwo, StrideSlash
from regard.patterns.radial import Radial
from regard.patterns.rings import RingOrder, Rings, concentric_causal, ring_count, ring_positions
from regard.patterns.routed import Refresh, Route, Routed, Summary
from regard.patterns.sections import BlockDiffusion, Sections
from regard.patterns.segments import BlockCausal, Blocks, Segments, StepCausal
from regard.patterns.select import Select, above, mass, pool_blocks, ratio, three_way, topk
from regard.patterns.shapes import Arrow, Plus
from regard.patterns.snap import Snap
from regard.patterns.static import Causal, Columns, Full, Prefix, Queries, Sinks, StaticPattern, Window
from regard.patterns.tile_cost import TileCost, best_strides, best_tiles, end_to_end, tile_cost
from regard.patterns.tiled import Tiled
from regard.patterns.transposed import Transposed
from regard.patterns.within import Within

__all__ = [
    "And",
    "Arrow",
    "AxisOrder",
    "BlockCausal",
    "BlockDiffusion",
    "BlockLayout",
    "BlockTopK",
    "BlockWindow",
    "Blocks",
    "Causal",
    "Columns",
    "Congruent",
    "Diagonals",
    "Dilated",
    "DilatedBlocks",
    "Full",
    "Grid",
    "GridOrder",
    "HiP",
    "HilbertOrder",
    "HopWindow",
    "LastTokenPeek",
    "Line",
    "LongNet",
    "Neighborhood",
    "Neighborhood1d",
    "Not",
    "Or",
    "Order",
    "Pattern",
    "PerHead",
    "PerSample",
    "Permuted",
    "Plus",
    "PowerOfTwo",
    "Prefix",
    "Queries",
    "Radial",
    "Refresh",
    "RingOrder",
    "Rings",
    "Route",
    "Routed",
    "Same",
    "Sections",
    "Segments",
    "Select",
    "SelfAnd",
    "Sinks",
    "Snap",
    "StaticPattern",
    "StepCausal",
    "StrideSlash",
    "Strided",
    "Summary",
    "TileCost",
    "TileOrder",
    "Tiled",
    "Transposed",
    "Window",
    "Within",
    "above",
    "best_strides",
    "best_tiles",
    "candidates",
    "centers",
    "concentric_causal",
    "depth",
    "end_to_end",
    "first_gap",
    "influence",
    "mass",
    "per_head",
    "per_sample",
    "pool_blocks",
    "ratio",
    "reach",
    "ring_count",
    "ring_positions",
    "three_way",
    "tile_cost",
    "topk",
]
