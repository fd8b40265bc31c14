"""Pictures of patterns: in a terminal, in a notebook, in a file."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regard.patterns import shades
from regard.patterns.layout import block_size
from regard.patterns.shades import Panel

if TYPE_CHECKING:
    from regard.patterns.pattern import Pattern

__all__ = ["Picture", "draw"]

PANELS = 64
LEVELS = 8  # shades of a density
TEXT = "·░▒▓█"  # none, up to a third, up to two thirds, more, all
INK = (31, 78, 140)
PAPER = (238, 241, 245)
TINTS = (PAPER, (250, 214, 165), (183, 209, 240))  # an absent, a partial, a full block under its pairs
PLAIN = (PAPER, (136, 172, 216), INK)  # the same, alone
SIZE, GAP = 320, 24  # pixels of a panel's longer side, and between panels


class Picture:
    """A pattern drawn: queries downwards, keys rightwards; one panel for each head and sample that it tells apart.

    ``print(picture)`` draws in text, a notebook shows SVG, `save` writes a file. A cell is a pair, or the share of
    allowed pairs where there are many; with blocks, the tint says which are absent, partial and full.
    """

    def __init__(self, panels: list[Panel], caption: str):
        self.panels = panels
        self.caption = caption

    def __str__(self) -> str:
        drawn = [_text(panel) for panel in self.panels]
        if len(drawn) == 1:
            return drawn[0]
        return "\n\n".join(f"{panel.title}\n{text}" for panel, text in zip(self.panels, drawn, strict=True))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<figure>{self.svg()}<figcaption>{escape(self.caption)}</figcaption></figure>"

    def svg(self) -> str:
        """The picture as an SVG document."""
        parts, x, height = [], 0.0, 0.0
        for panel in self.panels:
            rows, columns = _extent(panel)
            scale = SIZE / max(rows, columns, 1)
            top = GAP if panel.title else 0
            if panel.title:
                parts.append(
                    f'<text x="{x:g}" y="16" font-family="sans-serif" font-size="14">{escape(panel.title)}</text>'
                )
            parts.append(f'<g transform="translate({x:g} {top}) scale({scale:.6g})">{_shapes(panel)}</g>')
            x, height = x + columns * scale + GAP, max(height, rows * scale + top)
        width = max(x - GAP, 0)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" shape-rendering="crispEdges" role="img">'
            f"<title>{escape(self.caption)}</title>{''.join(parts)}</svg>"
        )

    def save(self, path: str | Path) -> Path:
        """Write the picture: ``.svg``, ``.png`` (drawn with matplotlib) or ``.txt``."""
        path = Path(path)
        if path.suffix == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        elif path.suffix == ".txt":
            path.write_text(f"{self}\n", encoding="utf-8")
        elif path.suffix == ".png":
            from matplotlib.image import imsave

            imsave(path, self._pixels())
        else:
            raise ValueError(f"path must end in .svg, .png or .txt, got {str(path)!r}")
        return path

    def _pixels(self) -> np.ndarray:
        """The panels side by side, ``[height, width, 3]`` in 0..255, at least two pixels a cell."""
        images = [_image(panel) for panel in self.panels]
        height = max(len(image) for image in images)
        padded = [np.pad(image, ((0, height - len(image)), (0, GAP), (0, 0)), constant_values=255) for image in images]
        return np.concatenate(padded, axis=1)[:, : -GAP or None]


def draw(pattern: Pattern, q_len: int, kv_len: int, start: int, block: int | tuple[int, int] | None = None) -> Picture:
    """See `Pattern.show`."""
    pattern.fits(q_len, kv_len, start)
    sizes = None if block is None else block_size(block)
    heads, samples = pattern.heads, pattern.samples
    count = (heads or 1) * (samples or 1)
    if count > PANELS:
        raise ValueError(f"show() draws at most {PANELS} heads and samples, this pattern has {count}: pattern.of(head)")
    panels = []
    for sample in range(samples or 1):
        for head in range(heads or 1):
            names = [f"sample {sample}"] * (samples is not None) + [f"head {head}"] * (heads is not None)
            panels.append(_panel(pattern.of(head, sample), q_len, kv_len, start, sizes, ", ".join(names)))
    caption = f"{pattern}: {q_len} queries from {start}, {kv_len} keys"
    return Picture(panels, caption if sizes is None else f"{caption}, blocks of {sizes[0]} x {sizes[1]}")


def _panel(pattern: Pattern, q_len: int, kv_len: int, start: int, block: tuple[int, int] | None, title: str) -> Panel:
    few = q_len * kv_len <= shades.PAIRS
    if block is None:
        cells = (shades.pairs if few else shades.densities)(pattern, q_len, kv_len, start)
        return Panel(cells, None, (1, 1), title)
    states = shades.blocks(pattern, q_len, kv_len, start, block)
    if few and states.shape == (-(-q_len // block[0]), -(-kv_len // block[1])):
        return Panel(shades.pairs(pattern, q_len, kv_len, start), states, block, title)
    return Panel(None, states, (1, 1), title)


def _extent(panel: Panel) -> tuple[int, int]:
    drawn = panel.states if panel.cells is None else panel.cells
    assert drawn is not None
    return drawn.shape[0], drawn.shape[1]


def _text(panel: Panel) -> str:
    if panel.states is not None:
        return "\n".join("".join("·▒█"[x] for x in row) for row in panel.states)
    assert panel.cells is not None
    return "\n".join("".join(_shade(x) for x in row) for row in panel.cells)


def _shade(x: float | int) -> str:
    return TEXT[0] if x <= 0 else TEXT[-1] if x >= 1 else TEXT[1 + min(int(x * 3), 2)]


def _shapes(panel: Panel) -> str:
    rows, columns = _extent(panel)
    out = [f'<path d="M0 0h{columns}v{rows}h-{columns}z" fill="{_hex(PAPER)}"/>']
    (bq, bk), states = panel.block, panel.states
    if states is not None:
        colours = PLAIN if panel.cells is None else TINTS
        for state in (1, 2):
            out.append(_path(states == state, bq, bk, rows, columns, colours[state], 1))
    if panel.cells is not None:
        level = np.ceil(panel.cells * LEVELS).astype(int)
        for n in range(1, LEVELS + 1):
            out.append(_path(level == n, 1, 1, rows, columns, INK, n / LEVELS))
    if states is not None and max(states.shape) <= shades.SIDE / 2:
        lines = [f"M0 {i * bq:g}h{columns}" for i in range(1, states.shape[0])]
        lines += [f"M{j * bk:g} 0v{rows}" for j in range(1, states.shape[1])]
        out.append(f'<path d="{"".join(lines)}" stroke="#fff" stroke-width="{max(rows, columns) / SIZE:.3g}"/>')
    return "".join(out)


def _path(
    where: np.ndarray, high: int, wide: int, rows: int, columns: int, ink: tuple[int, ...], opacity: float | int
) -> str:
    """The cells of one colour, those side by side as one rectangle; the last ones may be cut off."""
    edge = np.diff(np.pad(where, ((0, 0), (1, 1))).astype(int), axis=1)
    drawn = []
    for (i, a), (_, b) in zip(np.argwhere(edge == 1), np.argwhere(edge == -1), strict=True):
        x, y, end = a * wide, i * high, min(b * wide, columns)
        drawn.append(f"M{x:g} {y:g}h{end - x:g}v{min(high, rows - y):g}h-{end - x:g}z")
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:g}"'
    return f'<path d="{"".join(drawn)}" fill="{_hex(ink)}"{shade}/>' if drawn else ""


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)


def _image(panel: Panel) -> np.ndarray:
    rows, columns = _extent(panel)
    colours = np.array(PLAIN if panel.cells is None else TINTS)
    image = np.broadcast_to(np.array(PAPER), (rows, columns, 3))
    if panel.states is not None:
        bq, bk = panel.block
        image = colours[panel.states].repeat(bq, 0).repeat(bk, 1)[:rows, :columns]
    if panel.cells is not None:
        share = panel.cells[..., None]
        image = image * (1 - share) + np.array(INK) * share
    scale = max(2, round(SIZE / max(rows, columns, 1)))
    image = image.repeat(scale, 0).repeat(scale, 1).round().astype(np.uint8)
    if panel.states is not None and max(panel.states.shape) <= shades.SIDE / 2:
        image[panel.block[0] * scale :: panel.block[0] * scale] = 255
        image[:, panel.block[1] * scale :: panel.block[1] * scale] = 255
    return image
