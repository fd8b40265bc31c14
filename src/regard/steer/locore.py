"""Local coherence reinforcement: the weights on the last output tokens grow, the rest of the row shrinks."""

from __future__ import annotations

from collections.abc import Iterable

from regard.patterns import Columns, Window
from regard.watch.edits import Edit, reweight
from regard.watch.site import Site

__all__ = ["locore"]

#: Further than any sequence goes.
_END = 1 << 30


def locore(layers: Iterable[int | str], *, prompt: int, width: int = 8, beta: float | int = 0.15) -> list[Edit]:
    """Edits that multiply weights on output keys less than `width` tokens back by ``1 + beta`` and renormalise rows.

    ``P'_ij = c_ij P_ij / sum_j c_ij P_ij``, c = 1 + beta where ``i - width < j <= i`` and ``j >= prompt``, else 1.
    (LocoRE, arXiv 2601.20279: beta 0.15 for LLaVA-1.5, 0.20 for Qwen2-VL; the width is our reading.)

    Args:
        layers: which, as in `Site`.
        prompt: tokens before the first output token, the same for all samples.
        width: how many keys, the query's own included.
        beta: 0 changes nothing but rounding.
    """
    if prompt < 1 or width < 1:
        raise ValueError(f"prompt and width must be at least 1, got {prompt} and {width}")
    if beta < -1:
        raise ValueError(f"beta must be at least -1, got {beta}")
    recent = Window(width - 1) & Columns(((prompt, _END),))
    groups = {recent: 1.0 + beta, ~recent: 1.0}
    return [reweight(Site(layer, "weights"), groups) for layer in layers]
