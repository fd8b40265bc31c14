"""Interventions: change what a model computes at chosen sites while it runs.

    with regard.intervene(model, [Edit(Site(3, "z", head=5), "zero")]):
        model.generate(...)

The names of the whole mechanism are gathered here: `Site`, `Edit`, `reweight`, `mask_heads`, `trace`, `scan`,
`recovery`, `damage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy
from regard.watch.edits import Edit, reweight
from regard.watch.effects import damage, recovery
from regard.watch.heads import mask_heads
from regard.watch.running import Backend
from regard.watch.scan import Scan, scan
from regard.watch.session import Session
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["Edit", "Scan", "Site", "damage", "intervene", "mask_heads", "recovery", "reweight", "scan", "trace"]


def intervene(
    model: nn.Module,
    edits: Sequence[Edit] | Edit = (),
    *,
    freeze: Mapping[Site, Tensor] | None = None,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
    backend: Backend = "fused",
) -> Session:
    """Apply `edits` while the model runs: `with intervene(model, edits): model(...)`.

    Edits at one site act in list order, then frozen values are set. Within an attention call `q`, `k`, `v` are edited
    first, then `weights`, then `z`. Contexts nest: the inner one's edits act after the outer one's. With no edits, and
    with `set` of what `trace` read in the same run, the output is bit for bit what it was.

    Cached generation works, each step edited as it comes: an edit of `k` or `v` acts on the keys that attention reads,
    not on those the cache stores. A recorder opened inside sees q, k and mask as the model made them; one opened
    outside sees edited q, k, v, and weights edited for all heads and rows.

    Args:
        model: the module that is called.
        edits: one or several.
        freeze: {site: value}, set last; a value is what `trace` returns for the site.
        anatomy: the model's parts, where `anatomy(model)` cannot find them.
        valid: which columns hold tokens (True) and which padding, for models whose own mask has no known name.
        backend: "fused", or "reference": attention computed densely in float32 or wider, needed to set single weights.

    Raises:
        LookupError: a part the model does not have, a head or position out of range.
        ValueError: an edit that cannot be exact.
        SeamError: a model whose modules or attention cannot be reached (compiled, eager attention, checkpointing).
        RuntimeError: on closing, if the model ran and an edit never acted.
    """
    several = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in several:
        if not isinstance(edit, Edit):
            raise TypeError(f"edits: expected Edit, got {type(edit).__name__}")
    return Session(model, [(e, None) for e in several], freeze, parts=anatomy, valid=valid, backend=backend)
