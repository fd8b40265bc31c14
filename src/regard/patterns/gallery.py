"""The catalogue as a page: one picture and one line for each pattern.

``python -m regard.patterns.gallery docs`` writes ``docs/patterns.md`` and the pictures under ``docs/patterns``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import NamedTuple

from regard._pages import write_pages
from regard.patterns import (
    Arrow,
    BlockCausal,
    BlockDiffusion,
    Blocks,
    BlockWindow,
    Causal,
    Columns,
    Congruent,
    Diagonals,
    Dilated,
    DilatedBlocks,
    Full,
    Grid,
    HopWindow,
    LastTokenPeek,
    Line,
    LongNet,
    Neighborhood,
    Neighborhood1d,
    Pattern,
    Plus,
    PowerOfTwo,
    Prefix,
    Queries,
    Radial,
    Rings,
    Same,
    Sections,
    Segments,
    SelfAnd,
    Sinks,
    StepCausal,
    Strided,
    StrideSlash,
    TileOrder,
    Window,
    Within,
    concentric_causal,
    per_head,
    per_sample,
)

__all__ = ["CATALOGUE", "Example", "main", "pages"]


class Example(NamedTuple):
    """A pattern to draw and how one writes it, over ``length`` tokens in blocks of 8."""

    code: str
    pattern: Pattern
    length: int = 48
    line: str | None = None  # None: the first line of the class's docstring
    name: str | None = None  # None: the class's

    @property
    def title(self) -> str:
        """The name it goes by."""
        return self.name or type(self.pattern).__name__


CATALOGUE: dict[str, list[Example]] = {
    "Windows and columns": [
        Example("Full()", Full()),
        Example("Causal()", Causal()),
        Example("Window(9, 3)", Window(9, 3)),
        Example("Sinks(4)", Sinks(4)),
        Example("Columns(((4, 7), (30, 36)))", Columns(((4, 7), (30, 36)))),
        Example("Queries(((4, 7), (30, 36)))", Queries(((4, 7), (30, 36)))),
        Example("Prefix(14)", Prefix(14)),
        Example("Arrow(4, 2)", Arrow(4, 2)),
        Example("SelfAnd((0, 1, 2))", SelfAnd((0, 1, 2))),
        Example("LastTokenPeek(40)", LastTokenPeek(40)),
    ],
    "Distances": [
        Example("Diagonals(12, 1)", Diagonals(12, 1)),
        Example("Strided(6)", Strided(6)),
        Example("Dilated(3, 4, 2)", Dilated(3, 4, 2)),
        Example(
            "Line([28, 29, 30, 31, 32, 33, 34, 35], [5, 6, 7, 8, 9, 10, 11, 12], 1)",
            Line([28, 29, 30, 31, 32, 33, 34, 35], [5, 6, 7, 8, 9, 10, 11, 12], 1),
        ),
    ],
    "Segments and blocks": [
        Example("Segments.from_lengths([11, 20, 5, 12])", Segments.from_lengths([11, 20, 5, 12])),
        Example("Blocks(8)", Blocks(8)),
        Example("BlockCausal(8)", BlockCausal(8)),
        Example("StepCausal((0, 1, 5, 14, 30, 48))", StepCausal((0, 1, 5, 14, 30, 48))),
        Example(
            "Sections([10, 26, 12], [[Causal(), None, None], [Full(), Window(3), None], [Full(), Full(), Causal()]])",
            Sections([10, 26, 12], [[Causal(), None, None], [Full(), Window(3), None], [Full(), Full(), Causal()]]),
        ),
        Example("BlockDiffusion(24, 6)", BlockDiffusion(24, 6)),
        Example("Within(Window(6), 10, 40)", Within(Window(6), 10, 40)),
    ],
    "Blocks at a distance": [
        Example("PowerOfTwo(4, 2, 1)", PowerOfTwo(4, 2, 1), 96),
        Example("BlockWindow(4, 4, 1)", BlockWindow(4, 4, 1), 96),
        Example("StrideSlash(4, 3, 6, 1)", StrideSlash(4, 3, 6, 1), 96),
        Example("DilatedBlocks(4, 14, 2)", DilatedBlocks(4, 14, 2), 96),
        Example("LongNet(4, 4, 3)", LongNet(4, 4, 3), 96),
    ],
    "Images and video": [
        Example("Neighborhood((8, 8), (3, 5))", Neighborhood((8, 8), (3, 5)), 64),
        Example("Grid([Full(), Same()], (8, 8))", Grid([Full(), Same()], (8, 8)), 64),
        Example("Plus(8, 8)", Plus(8, 8), 64),
        Example("Rings(8, 8)", Rings(8, 8), 64),
        Example("Radial(12, 8)", Radial(12, 8), 96),
    ],
    "Axes of a grid": [
        Example("Neighborhood1d(48, 9, 3)", Neighborhood1d(48, 9, 3)),
        Example("Same()", Same()),
        Example("Congruent(6)", Congruent(6)),
    ],
    "Graphs in text": [
        Example(
            "HopWindow([3, 8, 13, 21, 26, 34, 39], [[abs(i - j) for j in range(7)] for i in range(7)], 2)",
            HopWindow([3, 8, 13, 21, 26, 34, 39], [[abs(i - j) for j in range(7)] for i in range(7)], 2),
        ),
    ],
    "Compositions with a name": [
        Example(
            "per_head([Causal(), Causal(future=True)])",
            per_head([Causal(), Causal(future=True)]),
            32,
            "One half of the heads looks back, the other forward: order without positions (arXiv 2604.18603).",
            "Dual triangles",
        ),
        Example(
            "Causal() & Segments.from_lengths([11, 20, 5, 12])",
            Causal() & Segments.from_lengths([11, 20, 5, 12]),
            line="Documents packed into one sequence, each causal.",
            name="Causal documents",
        ),
        Example(
            "Grid([Segments.from_lengths([2, 4, 2])] * 2, (8, 8))",
            Grid([Segments.from_lengths([2, 4, 2])] * 2, (8, 8)),
            64,
            "Windows of 4 x 4, shifted by half a window (Swin, arXiv 2103.14030); ``wrap=True`` joins the borders.",
            "Shifted windows",
        ),
        Example(
            "Grid([Congruent(2), Congruent(2)], (8, 8))",
            Grid([Congruent(2), Congruent(2)], (8, 8)),
            64,
            "Every second row and column: the grid attention of MaxViT (arXiv 2204.01697).",
            "Grid attention",
        ),
        Example(
            "concentric_causal(8, 5, 6, 10)",
            concentric_causal(8, 5, 6, 10),
            line="Text, an image causal over rings, text (arXiv 2410.15926).",
            name="concentric_causal",
        ),
    ],
    "Algebra": [
        Example(
            "Window(9) & ~Sinks(4)",
            Window(9) & ~Sinks(4),
            line="Pairs that both parts allow; ``~`` takes those that a part forbids.",
        ),
        Example(
            "Window(5) | Sinks(3) | Diagonals(16)",
            Window(5) | Sinks(3) | Diagonals(16),
            line="Pairs that at least one part allows.",
        ),
        Example("~Window(6, 6)", ~Window(6, 6), line="Pairs that the part forbids."),
        Example("per_head([Causal(), Window(4, 4)])", per_head([Causal(), Window(4, 4)]), 32),
        Example(
            "per_sample([Causal(), Causal() & Columns(((8, 32),))])",
            per_sample([Causal(), Causal() & Columns(((8, 32),))]),
            32,
        ),
        Example("(Window(5) | Sinks(3)).snap(8)", (Window(5) | Sinks(3)).snap(8)),
        Example(
            "Neighborhood((6, 8), (3, 3)).permute(TileOrder((6, 8), (2, 4)))",
            Neighborhood((6, 8), (3, 3)).permute(TileOrder((6, 8), (2, 4))),
        ),
        Example(
            "HopWindow([3, 8, 13, 21], [[0] * 4] * 4, 0).transpose()",
            HopWindow([3, 8, 13, 21], [[0] * 4] * 4, 0).transpose(),
        ),
    ],
}

INTRO = """# Patterns

A pattern says which queries may meet which keys. It is an immutable value: patterns combine with `&`, `|` and `~`,
differ between heads with `per_head`, and go wherever attention is computed: `regard.attend(q, k, v, pattern)`,
`regard.attend_with(model, pattern)`.

```python
from regard.patterns import Causal, Segments, Sinks, Window

documents = Segments.from_lengths([700, 1300, 48])
pattern = (Window(256) | Sinks(4)) & Causal() & documents
print(pattern.show(64))  # a picture in the terminal; a notebook shows SVG; .save("x.svg") writes a file
layout = pattern.layout(2048, 2048, 128)  # the blocks of 128 that hold an allowed pair, and which of them are full
mask = layout.to_block_mask(pattern)  # FlexAttention's BlockMask
```

`layout` is exact and takes no mask: it follows from intervals of keys, at the cost of the blocks listed. `density`,
`flops` and `row_counts` come from the same intervals; `transpose`, `snap` and `permute` give patterns again.

The pictures below have queries downwards and keys rightwards. Dark: an allowed pair. Tinted: a block of 8 that is
partial; blocks that are full or absent need no mask. This page is made by `python -m regard.patterns.gallery docs`.
"""


def pages() -> dict[str, str]:
    """The page and its pictures: text of each file, by its path below ``docs``."""
    files: dict[str, str] = {}
    parts = [INTRO]
    for heading, examples in CATALOGUE.items():
        parts.append(f"## {heading}\n")
        for example in examples:
            pattern, name = example.pattern, f"patterns/{example.title.lower().replace(' ', '-')}.svg"
            assert name not in files, name
            files[name] = pattern.show(example.length, example.length, 0, block=8).svg() + "\n"
            doc = (inspect.getdoc(type(pattern)) or "").split("\n\n")[0].replace("\n", " ")
            line = (example.line or doc).replace("``", "`")
            size = 200 * (pattern.heads or 1) * (pattern.samples or 1)
            parts.append(f"### {example.title}\n\n![{example.title}]({name}){{ width={size} }}\n")
            parts.append(f"`{example.code}`\n\n{line}\n")
    files["patterns.md"] = "\n".join(parts)
    return files


def main(arguments: Sequence[str]) -> int:
    """Write the files below the folder named."""
    return write_pages("regard.patterns.gallery", pages, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
