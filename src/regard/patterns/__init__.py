"""Which pairs meet: static geometry and its algebra."""

from regard.patterns.pattern import And, Not, Or, Pattern
from regard.patterns.static import Causal, Columns, Diagonals, Full, Segments, Sinks, StaticPattern, Window

__all__ = [
    "And",
    "Causal",
    "Columns",
    "Diagonals",
    "Full",
    "Not",
    "Or",
    "Pattern",
    "Segments",
    "Sinks",
    "StaticPattern",
    "Window",
]
