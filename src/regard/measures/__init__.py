"""Named figures of an atlas and the roles of its heads. `names()` lists the measures, `get(name)(atlas)` takes one."""

from . import context, distance, entropy, groups, modality, relations, retrieval, rhythm, sinks, spatial
from .registry import Measure, get, measure, names

__all__ = [
    "Measure",
    "context",
    "distance",
    "entropy",
    "get",
    "groups",
    "measure",
    "modality",
    "names",
    "relations",
    "retrieval",
    "rhythm",
    "sinks",
    "spatial",
]
