"""Which options are tried for the heads of a layer: a few for every head, and those that a head's role suggests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.patterns import BlockTopK, Columns, Diagonals, Or, Pattern, Sinks, Window, topk
from regard.patterns.routed import Route
from regard.plan.observe import SINKS, Evidence, role_of
from regard.plan.options import DENSE, NOTHING, Option, ScaledWindow

__all__ = ["candidates", "own_routes", "window_widths"]

BLOCK = 64
"""Keys are cut into blocks of this many by the kernel on a CPU; a column costs as much as its block."""
LAST = 128
"""Queries at the end that may see all, as an option of causal heads: what is looked up is asked for there."""
STRIPES = (4, 16)
"""Blocks of columns that are tried for heads with vertical stripes."""


def window_widths(length: int) -> list[int]:
    """Widths of windows worth trying: about 1/128 and 1/32 of the keys, at least 32."""
    widths = {max(32, 1 << max(1, round(length / part)).bit_length() - 1) for part in (128, 32)}
    return sorted(w for w in widths if w < length // 2) or [max(1, length // 4)]


def own_routes(length: int, causal: bool) -> list[Route]:
    """Routes worth trying: 1/16 and 1/8 of the blocks of keys, chosen by their means, beside sinks and what is near."""
    blocks = length // BLOCK
    keep = Sinks(SINKS) | (Window(BLOCK) if causal else Window(BLOCK // 2, BLOCK // 2))
    return [BlockTopK(BLOCK, select=topk(blocks // part), keep=keep) for part in (16, 8) if blocks // part >= 2]


def candidates(
    evidence: Evidence,
    *,
    windows: Sequence[int | float] | None = None,
    routes: Sequence[Route] | None = None,
    extra: Sequence[Pattern] = (),
    roles: Sequence[str] | None = None,
    known: dict[Any, Option] | None = None,
) -> tuple[list[Option], dict[int, list[Option]], list[tuple[str, dict[str, float]]]]:
    """Options for every head, options for some, and each head's role with the shares behind it.

    Args:
        evidence: of the layer's heads.
        windows: widths; numbers below 1 are shares of the keys, and those windows grow with the length. None: as
            `window_widths` says.
        routes: tried for every head; None: as `own_routes` says.
        extra: patterns tried for every head.
        roles: names given by an atlas, one a head; None: from the evidence.
        known: options by what they are, so that layers share them.
    """
    known = {} if known is None else known
    causal, length = evidence.causal, evidence.length
    widths = window_widths(length) if windows is None else list(windows)
    everyone = [DENSE, NOTHING, _option(known, f"sinks {SINKS}", Sinks(SINKS))]
    for width in widths:
        if isinstance(width, float) and width < 1:
            made: Any = ScaledWindow(width, SINKS, right=not causal)
            name = f"sinks {SINKS} + window {width:g} of the keys"
        else:
            w = int(width)
            made = Window(w) | Sinks(SINKS) if causal else Window(w // 2, w // 2) | Sinks(SINKS)
            name = f"sinks {SINKS} + window {w}"
        everyone.append(_option(known, name, made))
    if causal and length >= 8 * LAST and windows is None:
        how = ScaledWindow(0, SINKS, last=LAST)
        everyone.append(_option(known, f"sinks {SINKS} + window 64 + last {LAST} queries", how))
    everyone += [_option(known, str(pattern), pattern) for pattern in extra]
    chosen = own_routes(length, causal) if routes is None else routes
    everyone += [_option(known, _route_name(route), route) for route in chosen]
    named = [role_of(evidence, head, period) for head, period in enumerate(evidence.periods())]
    if roles is not None:
        named = [(role, shares) for role, (_, shares) in zip(roles, named, strict=True)]
    some: dict[int, list[Option]] = {}
    for head, (role, shares) in enumerate(named):
        some[head] = _of_role(known, evidence, head, role, shares, min(_whole(widths, length)))
    return everyone, some, named


def _route_name(route: Route) -> str:
    """``BlockTopK 64, topk(k=8) + sinks 4 + window 64``: its blocks, its rule, and what it keeps besides."""
    rule, keep = getattr(route, "rule", None), getattr(route, "keep", None)
    if rule is None:
        return str(route)
    block = "x".join(map(str, dict.fromkeys(route.block)))
    return f"{type(route).__name__} {block}, {rule}" + ("" if keep is None else f" + {_pattern_name(keep)}")


def _pattern_name(pattern: Pattern) -> str:
    if isinstance(pattern, Or):
        return f"{_pattern_name(pattern.left)} + {_pattern_name(pattern.right)}"
    if isinstance(pattern, Sinks):
        return f"sinks {pattern.n}"
    if isinstance(pattern, Window) and not pattern.right:
        return f"window {pattern.left}"
    return str(pattern)


def _whole(widths: Sequence[int | float], length: int) -> list[int]:
    return [int(w * length) if isinstance(w, float) and w < 1 else int(w) for w in widths]


def _of_role(
    known: dict[Any, Option], evidence: Evidence, head: int, role: str, shares: dict[str, float], width: int
) -> list[Option]:
    """Options that a role suggests beside those of every head."""
    causal, length = evidence.causal, evidence.length
    side = max(width // 2, 1)
    near = Window(width) if causal else Window(side, side)
    if role in ("previous-token", "diagonal"):
        small = Window(8) if causal else Window(8, 8)
        return [_option(known, "diagonal band of 8", small)]
    if role == "multi-diagonal" or (shares["multi-diagonal"] >= 0.15 and shares["multi-diagonal/lift"] >= 3):
        period = int(shares["multi-diagonal/period"])
        found = []
        for half in (1, max(1, period // 16)):
            bands: Pattern = Diagonals(period, half, causal)
            found.append(_option(known, f"diagonals every {period}, {2 * half + 1} wide", bands | near))
        return found
    if role == "vertical stripe" and not causal:
        return [_columns(known, evidence, head, n, near) for n in STRIPES if n * BLOCK < length // 2]
    return []


def _columns(known: dict[Any, Option], evidence: Evidence, head: int, n: int, near: Pattern) -> Option:
    """The n blocks of keys that receive most, and what is near."""
    assert evidence.received is not None
    received, length = evidence.received[head], evidence.length
    blocks = -(-length // BLOCK)
    padded = received.new_zeros(blocks * BLOCK)
    padded[:length] = received
    best = sorted(padded.view(blocks, BLOCK).sum(1).topk(min(n, blocks)).indices.tolist())
    runs: list[tuple[int, int]] = []
    for b in best:
        lo, hi = b * BLOCK, min((b + 1) * BLOCK, length)
        if runs and runs[-1][1] == lo:
            runs[-1] = (runs[-1][0], hi)
        else:
            runs.append((lo, hi))
    at = ", ".join(f"{lo}-{hi}" for lo, hi in runs)
    return _option(known, f"columns {at} + near", Columns(tuple(runs)) | near)


def _option(known: dict[Any, Option], name: str, how: Any) -> Option:
    try:
        key: Any = hash(how) and (type(how), how)
    except TypeError:  # holds tensors
        key = id(how)
    if key not in known:
        known[key] = Option(name, how)
    return known[key]
