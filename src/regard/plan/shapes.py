"""Shapes of the heads of video transformers (Sparse-vDiT, arXiv 2506.03065).

Tokens are in the order (frame, row, column), n a frame, maybe with text before or behind, which joins every shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import lcm, prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.patterns import AxisOrder, Columns, Diagonals, Full, Pattern, PerHead, Queries, Window
from regard.patterns.layout import block_size
from regard.plan.rounded import density_of, rounded, rounded_columns
from regard.plan.search import Found, search

__all__ = ["SHAPES", "kind_of_shape", "offered", "one_for_all", "search_shapes", "stripes", "video_options"]

SHAPES = ("full", "diagonal", "multi-diagonal", "stripe", "skip")
WIDTHS = (32, 16, 8)  # parts of the length, or of a frame, that a diagonal reaches to either side


def video_options(
    shape: Sequence[int],
    received: Float[Tensor, "heads length"] | None = None,
    *,
    prefix: int = 0,
    suffix: int = 0,
    block: int | tuple[int, int] | None = None,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, Pattern]:
    """The options of a head by name: "full", "diagonal/32" and on (``|i - j| <= L / 32``), "multi-diagonal/32" and on
    (``|i - j - m n| <= n / 32`` for some m, n tokens a frame), "stripe" (see `stripes`), "skip" (no key: output 0).

    Args:
        shape: ``(frames, rows, columns)`` of tokens, ``L = prod(shape)``.
        received: mass that each key receives, text included; None: no stripes are offered.
        prefix, suffix: tokens of text before and behind the video: every query sees them, and they see every key, but
            under "skip".
        block: None: pair by pair, as said. Else every shape is rounded up to whole blocks of so many tokens, or of
            (queries, keys), and stored as a route, which a kernel runs without masks: multi-diagonals in the order that
            puts the frames of a place together, stripes with their keys gathered. Blocks of more queries make larger
            products and copy fewer keys.
        widths: the parts 32, 16, 8 of the length, or of a frame. For budgets near the whole, 4, 3 and 2 besides:
            else heads are dense or narrow, and one wide diagonal for all may lose less.
    """
    length, n = prod(shape), prod(shape[1:])
    joined = _Text(prefix, length, suffix, block, tuple(shape))
    options: dict[str, Pattern] = {"full": Full()}
    for part in widths:
        options[f"diagonal/{part}"] = joined.diagonal(length // part)
    for part in widths:
        options[f"multi-diagonal/{part}"] = joined.multi_diagonal(min(n // part, (n - 1) // 2))
    if received is not None:
        options["stripe"] = joined.stripes(received, max(1, length // 16))
    options["skip"] = Columns(())
    return options


def search_shapes(
    errors: Any, options: Sequence[str], costs: Any, budget: float | int, eps: float | int = 0.1
) -> tuple[Found, float]:
    """The option of each head with the least summed error within the budget, of those on offer (see `offered`).

    Where so many heads must stay full that nothing meets the budget, eps is raised to the least value at which
    something does.

    Args:
        errors: ``[layers, heads, options]``.
        costs: ``[options]``, of a head.
        budget: the most that all heads may cost together.

    Returns:
        (what `search` found, the eps that was used).

    Raises:
        ValueError: for a budget that no choice meets at any eps.
    """
    given, cost = np.asarray(errors, dtype=float), np.asarray(costs, dtype=float)

    def least(limit: float) -> float:
        return float(np.where(np.isfinite(offered(given, options, limit)), cost, np.inf).min(-1).sum())

    limit = float(eps)
    if least(limit) > budget:
        higher = np.unique(given[given > limit])
        low, high = 0, len(higher) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if least(higher[middle]) <= budget else (middle + 1, high)
        limit = float(higher[low]) if len(higher) else limit
    return search(offered(given, options, limit), cost, budget), limit


def one_for_all(
    shape: Sequence[int],
    least: float | int,
    received: Float[Tensor, "heads length"] | None = None,
    *,
    prefix: int = 0,
    suffix: int = 0,
    block: int | tuple[int, int] | None = None,
) -> dict[str, Pattern]:
    """Of each sparse shape the narrowest pattern of at least this density, for all heads: what a plan has to beat.

    Stripes are those of each head's own columns. Arguments as in `video_options`.
    """
    length, n = prod(shape), prod(shape[1:])
    joined = _Text(prefix, length, suffix, block, tuple(shape))

    def narrowest(family: Callable[[int], Pattern], low: int, high: int) -> Pattern:
        while low < high:  # wider is denser
            middle = (low + high) // 2
            enough = joined.density(family(middle)) >= least
            low, high = (low, middle) if enough else (middle + 1, high)
        return family(low)

    found = {
        "diagonal": narrowest(joined.diagonal, 0, length),
        "multi-diagonal": narrowest(joined.multi_diagonal, 0, (n + 1) // 2),
    }
    if received is not None:
        found["stripe"] = narrowest(lambda count: joined.stripes(received, count), 1, length)
    return found


class _Text:
    """The shapes of all tokens, text joined, exact or rounded up to blocks."""

    def __init__(
        self, prefix: int, length: int, suffix: int, block: int | tuple[int, int] | None, shape: tuple[int, ...]
    ) -> None:
        self.prefix, self.suffix, self.end, self.whole = prefix, suffix, prefix + length, prefix + length + suffix
        self.text = tuple((a, b) for a, b in ((0, prefix), (self.end, self.whole)) if a < b)
        self.block, self.shape = None if block is None else block_size(block), shape

    def diagonal(self, width: int) -> Pattern:
        return self._rounded(Window(width, width), tuple(range(len(self.shape))))

    def multi_diagonal(self, width: int) -> Pattern:
        bands = Diagonals(prod(self.shape[1:]), width, causal=False)
        return self._rounded(bands, (*range(1, len(self.shape)), 0))

    def stripes(self, received: Tensor, count: int) -> Pattern:
        if received.shape[1] != self.whole:
            raise ValueError(f"received must be [heads, {self.whole}], text included, got {list(received.shape)}")
        video = received.clone()
        video[:, : self.prefix] = video[:, self.end :] = -1  # text is seen anyway
        found = stripes(video, count)
        if self.block is None:
            return PerHead(tuple(self._joined(p) for p in found.patterns))
        keys = torch.tensor([[lo for lo, _ in p.intervals] for p in found.patterns if isinstance(p, Columns)])
        return rounded_columns(keys, self.whole, self.block, prefix=self.prefix, suffix=self.suffix)

    def density(self, pattern: Pattern) -> float:
        return density_of(pattern, self.whole, self.whole)

    def _joined(self, pattern: Pattern) -> Pattern:
        return pattern | Columns(self.text) | Queries(self.text) if self.text else pattern

    def _rounded(self, pattern: Pattern, axes: tuple[int, ...]) -> Pattern:
        pattern = self._joined(pattern)
        if self.block is None:
            return pattern
        order = None
        if axes != tuple(range(len(axes))) or self.text:
            order = AxisOrder(self.shape, axes, self.prefix, self.suffix, lcm(*self.block))
        return _kept(pattern, self.whole, self.block, order)


@lru_cache(maxsize=128)
def _kept(pattern: Pattern, length: int, block: tuple[int, int], order: AxisOrder | None) -> Pattern:
    return rounded(pattern, length, block, order)


def stripes(received: Float[Tensor, "heads length"], count: int) -> PerHead:
    """For each head the `count` keys that receive the most mass, for every query; ties go to the lower index."""
    best = received.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    return PerHead(tuple(Columns(tuple((j, j + 1) for j in row)) for row in best.tolist()))


def kind_of_shape(option: str) -> str:
    """The shape of an option of `video_options`: its name without the width."""
    return option.split("/")[0]


def offered(errors: Any, options: Sequence[str], eps: float) -> np.ndarray:
    """Errors ``[..., options]`` with every option above eps taken off offer (infinite), but "full".

    So a head stays full where no shape comes below eps, as in the paper; what is left goes to `search`.
    """
    found = np.array(errors, dtype=float)
    if found.shape[-1] != len(options) or "full" not in options:
        raise ValueError(f'options must be the {found.shape[-1]} of errors, "full" among them, got {list(options)}')
    sparse = np.array([name != "full" for name in options])
    found[(found > eps) & sparse] = np.inf
    return found
