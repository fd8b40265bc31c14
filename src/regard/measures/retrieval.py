"""Retrieval heads: how often a head's top key is the needle token being copied."""

from __future__ import annotations

from typing import Literal

import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .registry import measure, ratio

PAPER = "Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574"


@measure("retrieval", formula="mean over tests of copied needle tokens / needle tokens", range=(0, 1), paper=PAPER)
def retrieval(atlas: Atlas, count: Literal["set", "hits"] = "set") -> xr.DataArray:
    """Mean copy-paste rate, [layer, head]; tests without a needle are left out.

    A head copies at the row that writes token w if its top key j* lies in the needle and x_(j*) = w. `count="set"`
    counts each needle position once (the paper), "hits" every such row (the released code; may exceed 1).
    """
    if count not in ("set", "hits"):
        raise AtlasError(f"count: {count!r} is neither 'set' nor 'hits'")
    hits = atlas.need("copy_distinct" if count == "set" else "copy_hits")
    return ratio(hits, atlas.need("needle_tokens")).mean("sample", skipna=True)
