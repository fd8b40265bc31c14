"""The measures as a page: what each looks for, in heads whose weights are made for it, with the figures it gives them.

``python -m regard.measures.gallery docs`` writes ``docs/measures.md`` and the pictures under ``docs/measures``. Heads
are watched like those of any model: their weights are ``softmax(q k^T)``, k being the identity and q their logarithm.
"""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard._pages import write_pages
from regard.measures.registry import Measure, get, names
from regard.patterns import Causal, Pattern, Window
from regard.watch.atlas import Atlas
from regard.watch.recorder import watch

__all__ = ["PICTURES", "Shown", "main", "pages", "watched"]

Number = float | int

LENGTH = 24
TEXT = [ord(c) - 96 for c in "abcdefgabcdefgabcdefgabc"]  # a stretch of seven letters, again and again
SIDE, GAP, CHART = 168, 26, 58  # pixels
LEVELS = 8
INK, PAPER, MARK, MUTED = "#1f4e8c", "#eef1f5", "#c2410c", "#5b6470"


# -- heads made for it -----------------------------------------------------------------------------------------------


def _grid(causal: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    return i, j, (j <= i) if causal else torch.ones(LENGTH, LENGTH, dtype=torch.bool)


def rows(weight: Tensor, causal: bool = True) -> Tensor:
    """Weights ``[24, 24]`` from what is not yet normalised; a row of zeros looks at the first token."""
    allowed = _grid(causal)[2]
    kept = torch.where(allowed, weight.double(), 0.0)
    empty = kept.sum(-1) == 0
    kept[empty, 0] = 1.0
    return kept / kept.sum(-1, keepdim=True)


def uniform(causal: bool = True) -> Tensor:
    """Every key alike."""
    return rows(torch.ones(LENGTH, LENGTH), causal)


def mostly(looked: Tensor, share: Number = 0.9, causal: bool = True) -> Tensor:
    """`share` of the mass on the pairs looked at, the rest even."""
    return share * rows(looked.double(), causal) + (1 - share) * uniform(causal)


def previous() -> Tensor:
    """The token before."""
    i, j, _ = _grid()
    return mostly(j == i - 1)


def itself() -> Tensor:
    """The token itself."""
    i, j, _ = _grid()
    return mostly(j == i)


def first() -> Tensor:
    """The first token."""
    _, j, _ = _grid()
    return mostly((j == 0).expand(LENGTH, LENGTH))


def near(causal: bool = True) -> Tensor:
    """What is near."""
    i, j, _ = _grid(causal)
    return rows(torch.exp(-(i - j).abs() / 1.5), causal)


def far() -> Tensor:
    """What is far."""
    i, j, _ = _grid()
    return rows(torch.exp((i - j).abs() / 2.0))


def copies() -> Tensor:
    """The same token, earlier."""
    i, j, _ = _grid()
    x = torch.tensor(TEXT)
    return mostly((x[:, None] == x[None]) & (j < i))


def followed() -> Tensor:
    """The token after an earlier occurrence of this one."""
    i, j, _ = _grid()
    before = torch.tensor([0, *TEXT[:-1]])
    return mostly((before[None] == torch.tensor(TEXT)[:, None]) & (j < i) & (j > 0))


def keys(chosen: Sequence[int], share: Number = 0.8, causal: bool = True) -> Tensor:
    """A few keys, from every query."""
    looked = torch.zeros(LENGTH, LENGTH)
    looked[:, list(chosen)] = 1
    return mostly(looked, share, causal)


def ring(radius: int) -> Tensor:
    """Patches of a 4 x 6 picture at one distance."""
    at = torch.stack([torch.arange(LENGTH) // 6, torch.arange(LENGTH) % 6], 1)
    distance = (at[:, None] - at[None]).abs().amax(-1)
    return mostly(distance == radius, causal=False)


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal, scale=1.0)


class _Block(nn.Module):
    def __init__(self, weights: Tensor, causal: bool, adds: Tensor) -> None:
        super().__init__()
        self.attn, self.causal, self.adds = _Attention(), causal, adds
        self.q = weights.clamp(min=1e-13).log().float()[None]

    def forward(self, x: Tensor) -> Tensor:
        eye = torch.eye(LENGTH).expand(1, self.q.shape[1], LENGTH, LENGTH)
        self.attn(self.q, eye, self.causal)
        return x + self.adds


class _Heads(nn.Module):
    """Layers of heads with the weights given, and a residual stream to which each layer adds what is given."""

    def __init__(self, layers: Sequence[Sequence[Tensor]], causal: bool, stream: Sequence[Tensor] | None) -> None:
        super().__init__()
        steps = list(stream or [torch.full((LENGTH, 4), 0.25)] * (len(layers) + 1))
        adds = [b - a for a, b in pairwise(steps)]
        self.start = steps[0]
        self.layers = nn.ModuleList(
            [_Block(torch.stack(list(heads)), causal, add) for heads, add in zip(layers, adds, strict=True)]
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.start[None]
        for layer in self.layers:
            x = layer(x)
        return x


def watched(
    layers: Sequence[Sequence[Tensor]], *, causal: bool = True, hidden: Sequence[Tensor] | None = None, **choices: Any
) -> Atlas:
    """The atlas of heads with these weights, over `TEXT`."""
    model = _Heads(layers, causal, hidden)
    with watch(model, **{"statistics": "full", **choices}) as seen, torch.no_grad():
        model(torch.tensor([TEXT]))
    return seen.atlas


# -- what is shown of each measure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Some heads of one layer, watched alone; what is drawn is the first head, or ``drawn``."""

    caption: str
    heads: Sequence[Tensor]
    layers: int = 1
    stream: Sequence[Tensor] | None = None
    drawn: Tensor | None = None


@dataclass(frozen=True)
class Shown:
    """How a measure is shown: panels, the pairs it sums over, what is watched and the measure's options."""

    panels: Sequence[Panel]
    counted: Callable[[Tensor, Tensor], Tensor] | None = None
    how: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = True
    spans: Mapping[str, Any] | None = None

    def atlas(self, panel: Panel) -> Atlas:
        """What is watched of a panel."""
        made = [list(panel.heads)] * panel.layers
        if self.spans is None:
            return watched(made, causal=self.causal, hidden=panel.stream, **self.how)
        model = _Heads(made, self.causal, panel.stream)
        with watch(model, **{"statistics": "full", **self.how}) as seen, torch.no_grad():
            seen.annotate(spans=self.spans)
            model(torch.tensor([TEXT]))
        return seen.atlas

    def values(self, measure: Measure, panel: Panel) -> NDArray[np.float64]:
        """What the measure gives the panel: one number, or a row of them."""
        found = measure(self.atlas(panel), **self.options)
        for dim in ("layer", "head"):
            if dim in found.dims:
                found = found.isel({dim: -1 if dim == "layer" else 0})
        return np.asarray(found.values, dtype=float).squeeze()


def _pair(high: tuple[str, Tensor], low: tuple[str, Tensor], counted: Any = None, **how: Any) -> Shown:
    return Shown([Panel(high[0], [high[1]]), Panel(low[0], [low[1]])], counted, **how)


UNIFORM = ("even weights", uniform())
NEAR, FAR = ("near keys", near()), ("far keys", far())
DOCS = {"answer": range(20, 24), "document 1": range(1, 9), "document 2": range(9, 20)}
TWO = {"text": range(1, 7), "other": range(7, 24)}


def _groups(parts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    masks = {name: torch.zeros(LENGTH, dtype=torch.bool) for name in parts}
    for name, positions in parts.items():
        masks[name][list(positions)] = True
    return {"groups": masks}


def _looks_at(parts: Sequence[int], at: Sequence[int] = range(LENGTH)) -> Tensor:
    looked = torch.zeros(LENGTH, LENGTH)
    for i in at:
        looked[i, list(parts)] = 1
    return mostly(looked)


def _looks_at_each(chosen: Mapping[int, int]) -> Tensor:
    looked = torch.zeros(LENGTH, LENGTH)
    for i, j in chosen.items():
        looked[i, j] = 1
    return mostly(looked)


def _template(pattern: Pattern) -> dict[str, Any]:
    return {"how": {"templates": {"six near": pattern}}, "options": {"template": "six near"}}


def _repeats(i: Tensor, j: Tensor) -> Tensor:
    x = torch.tensor(TEXT)
    return (x[i] == x[j]) & (j < i)


def _follows(i: Tensor, j: Tensor) -> Tensor:
    x = torch.tensor(TEXT)
    return (x[(j - 1).clamp(min=0)] == x[i]) & (j < i) & (j > 0)


def _stream(massive: int | None, sizes: Sequence[Number]) -> tuple[list[Tensor], Tensor]:
    """A stream of 16 channels over the layers, of which the first token is the more like the others the less."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(LENGTH, 16, generator=generator)
    steps = []
    for size in sizes:
        x = base.clone()
        if massive is not None:
            x[massive, 3] = size
        steps.append(x)
    return steps, steps[-1].abs()


def _turned(layers: int, until: int) -> tuple[list[Tensor], Tensor]:
    """A stream in which token 9 points where the first one does until a layer, and away from there on."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(LENGTH, 16, generator=generator)
    steps = []
    for layer in range(layers + 1):
        x = base.clone()
        if layer <= until:
            x[9] = x[0] + 0.05 * x[9]
        if layer:
            x[0] = 20 * x[0]  # the first token's norm rises in the first block and stays
        steps.append(x)
    stacked = torch.stack(steps[1:])
    cos = nn.functional.cosine_similarity(stacked, stacked[:, :1], dim=-1).abs()
    return steps, cos


def _pictures() -> dict[str, Shown]:
    heavy, heavy_size = _stream(5, (1.0, 2000.0))
    plain, plain_size = _stream(None, (1.0, 1.0))
    long, long_cos = _turned(6, 6)
    short, short_cos = _turned(6, 2)
    stripes = keys((3, 11, 17))
    rhythm = {"how": {"per_sample": ("rhythm",)}, "options": {"share": 1.0, "layers": 1}}
    return {
        "aei": _pair(("text", _looks_at(TWO["text"])), ("the other tokens", _looks_at(TWO["other"])),
                     lambda i, j: ((j >= 1) & (j < 7)).expand(LENGTH, LENGTH), how=_groups(TWO)),
        "distance_norm": _pair(FAR, NEAR),
        "duplicate": _pair(("the same token, earlier", copies()), UNIFORM, _repeats),
        "entropy": _pair(UNIFORM, ("the token before", previous())),
        "entropy_at": _pair(UNIFORM, ("near keys", near())),
        "entropy_norm": _pair(UNIFORM, ("the token before", previous())),
        "entropy_spread": Shown([Panel("two heads, one even and one sharp", [uniform(), previous()]),
                                 Panel("two even heads", [uniform(), uniform()])]),
        "fai": _pair(("key 3 is looked at from afar", keys((3,), 0.7)), UNIFORM, lambda i, j: (i - j >= 10), **rhythm),
        "group_mass": _pair(("from the answer to document 1", _looks_at(DOCS["document 1"], DOCS["answer"])), UNIFORM,
                            lambda i, j: (i >= 20) & (j >= 1) & (j < 9), how=_groups(DOCS),
                            options={"rows": "answer", "keys": "document 1"}),
        "head_similarity": Shown([Panel("two heads alike", [previous(), previous()]),
                                  Panel("two heads, one near and one far", [previous(), far()])]),
        "induction": _pair(("what followed this token earlier", followed()), UNIFORM, _follows),
        "induction_lift": _pair(("what followed this token earlier", followed()), UNIFORM, _follows),
        "information_contribution": _pair(
            ("the answer reads document 1", _looks_at(DOCS["document 1"], DOCS["answer"])), UNIFORM,
            lambda i, j: (i >= 20) & (j >= 1) & (j < 20), how=_groups(DOCS)),
        "massive": Shown([Panel("channel 3 of token 5 is 2,000", [uniform()], 1, heavy, heavy_size),
                          Panel("no such channel", [uniform()], 1, plain, plain_size)], how={"stream": True}),
        "mdi": _pair(("text", _looks_at(TWO["text"])), ("the other tokens", _looks_at(TWO["other"])),
                     lambda i, j: ((j >= 1) & (j < 7)).expand(LENGTH, LENGTH), how=_groups(TWO)),
        "mean_distance": _pair(FAR, NEAR),
        "offset_profile": _pair(("the token before", previous()), NEAR),
        "participation": _pair(UNIFORM, ("the token before", previous())),
        "previous_token": _pair(("the token before", previous()), UNIFORM, lambda i, j: j == i - 1),
        "received": _pair(("three keys", stripes), UNIFORM),
        "received_kurtosis": _pair(("one key", keys((9,))), UNIFORM, how={"per_sample": ("received_raw",)}),
        "retrieval": _pair(
            ("each answer copies its needle token", _looks_at_each({20: 7, 21: 8, 22: 9})), UNIFORM,
            lambda i, j: (i >= 20) & (i < 23) & (j == i - 13),
            how={"per_sample": ("copy_hits",)}, spans={"needle": [[7, 10]], "answer": [[21, 24]]}),
        "ring_strength": Shown([Panel("patches beside one’s own", [ring(1)]), Panel("patches two away", [ring(2)])],
                               how={"grid": (4, 6), "prefix": 0}, causal=False),
        "self_token": _pair(("the token itself", itself()), UNIFORM, lambda i, j: i == j),
        "sink": _pair(("the first token", first()), UNIFORM, lambda i, j: (j == 0) & (i > 0)),
        "sink_lifetime": Shown([Panel("token 9 points like the first all through", [uniform()], 6, long, long_cos),
                                Panel("token 9 turns away after two layers", [uniform()], 6, short, short_cos)],
                               how={"stream": True}),
        "stripe": _pair(("three keys", stripes), UNIFORM),
        "stripe_lift": _pair(("three keys", stripes), UNIFORM),
        "template_lift": _pair(NEAR, FAR, lambda i, j: (i - j >= 0) & (i - j < 6), **_template(Window(5) & Causal())),
        "template_recall": _pair(NEAR, FAR, lambda i, j: (i - j >= 0) & (i - j < 6), **_template(Window(5) & Causal())),
        "template_share": _pair(NEAR, FAR, lambda i, j: (i - j >= 0) & (i - j < 6), **_template(Window(5) & Causal())),
        "top1": _pair(("the token before", previous()), UNIFORM),
        "user_attention": Shown(
            [Panel("one of two heads reads what the user said", [_looks_at(range(1, 9)), far()]),
             Panel("neither does", [near(), previous()])], lambda i, j: ((j >= 1) & (j < 9)).expand(LENGTH, LENGTH),
            how={**_groups({"user": range(1, 9)}), "per_sample": ("group_max_raw",)}),
        "waad": _pair(FAR, NEAR, **rhythm),
        "window_mass": _pair(NEAR, FAR),
    }  # fmt: skip


PICTURES = _pictures()


# -- drawing ---------------------------------------------------------------------------------------------------------


def _cells(weights: Tensor, x: Number, y: Number, width: Number, height: Number) -> str:
    """A map of weights in eight shades of ink, the square root of a weight over the largest."""
    n, m = weights.shape
    level = (weights.clamp(min=0) / weights.max()).sqrt().mul(LEVELS).round().int()
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{PAPER}"/>']
    for shade in range(1, LEVELS + 1):
        at = (level == shade).nonzero().tolist()
        if at:
            path = "".join(f"M{j} {i}h1v1h-1z" for i, j in at)
            parts.append(
                f'<path transform="translate({x:g} {y:g}) scale({width / m:.5g} {height / n:.5g})" d="{path}" '
                f'fill="{INK}" fill-opacity="{shade / LEVELS:g}"/>'
            )
    return "".join(parts)


def _outline(counted: Tensor, x: Number, y: Number, size: Number) -> str:
    """The border of a set of pairs."""
    n = len(counted)
    inside = nn.functional.pad(counted, (1, 1, 1, 1))
    lines = []
    for i, j in inside[1:, 1:-1].ne(inside[:-1, 1:-1]).nonzero().tolist():
        lines.append(f"M{j} {i}h1")
    for i, j in inside[1:-1, 1:].ne(inside[1:-1, :-1]).nonzero().tolist():
        lines.append(f"M{j} {i}v1")
    scale = size / n
    return (
        f'<path transform="translate({x:g} {y:g}) scale({scale:.5g})" d="{"".join(lines)}" fill="none" stroke="{MARK}" '
        f'stroke-width="{1.3 / scale:.3g}"/>'
    )


def _curve(values: NDArray[np.float64], top: Number, x: Number, y: Number, width: Number, height: Number) -> str:
    known = [(n, v) for n, v in enumerate(values) if math.isfinite(v)]
    if not known:
        return ""
    last = max(n for n, _ in known) or 1
    points = " ".join(f"{x + n / last * width:.1f},{y + height - v / top * height:.1f}" for n, v in known)
    return (
        f'<path d="M{x:g} {y + height:g}h{width:g}" stroke="{MUTED}" stroke-width=".7" fill="none"/>'
        f'<polyline points="{points}" fill="none" stroke="{INK}" stroke-width="1.6"/>'
    )


def _number(value: Number) -> str:
    return "–" if not math.isfinite(value) else f"{value:.3g}"


def draw(name: str) -> str:
    """The picture of a measure as an SVG document: heads, the pairs it counts outlined, and what it gives them."""
    shown, measure = PICTURES[name], get(name)
    values = [shown.values(measure, panel) for panel in shown.panels]
    curves = any(v.ndim for v in values)
    top = max((float(np.nanmax(v)) for v in values if np.isfinite(v).any()), default=1.0) or 1.0
    counted = None
    if shown.counted is not None:
        i, j, allowed = _grid(shown.causal)
        counted = shown.counted(i, j) & allowed
    height = 20 + SIDE + 20 + (CHART if curves else 0)
    parts, x = [], 0.0
    for panel, value in zip(shown.panels, values, strict=True):
        text = html.escape(panel.caption)
        parts.append(f'<text x="{x:g}" y="13" font-size="11.5" fill="{MUTED}">{text}</text>')
        if panel.drawn is not None:
            parts.append(_cells(panel.drawn, x, 20, SIDE, SIDE))
        else:
            each = panel.heads if name in GROUPED else panel.heads[:1]
            side = (SIDE - 6 * (len(each) - 1)) / len(each)
            for n, head in enumerate(each):
                parts.append(_cells(head, x + n * (side + 6), 20, side, side))
                if counted is not None:
                    parts.append(_outline(counted, x + n * (side + 6), 20, side))
        if value.ndim:
            parts.append(_curve(value, top, x, 20 + SIDE + 14, SIDE, CHART - 16))
            said = f"largest {_number(float(np.nanmax(value)))}"
        else:
            said = _number(float(value))
        parts.append(
            f'<text x="{x:g}" y="{height - 3:g}" font-size="13" fill="{INK}">{html.escape(name)} {said}</text>'
        )
        x += max(SIDE, 6.1 * len(panel.caption), 7.5 * len(f"{name} {said}")) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - GAP:g}" height="{height:g}" viewBox="0 0 {x - GAP:g} '
        f'{height:g}" font-family="sans-serif" role="img"><title>{html.escape(name)}</title>{"".join(parts)}</svg>\n'
    )


GROUPED = {"entropy_spread", "head_similarity", "user_attention"}
"""Measures of several heads of a layer, all of which are drawn."""

INTRODUCTION = """# Measures

A measure is a named figure of an atlas: `atlas.measure("sink")` gives it for every head; `regard measures` lists all of
them. Each picture shows two made-up heads over 24 tokens (seven letters, again and again), queries downwards,
keys rightwards, darker for more weight, and what the measure gives them; where it counts certain pairs, these are
outlined. A measure with several values a head (one for each offset, position or width) is drawn as a curve. The page is
made by `python -m regard.measures.gallery docs`, from the registry and from heads that are watched like any others.

For the heads of your own model see [roles](roles.md); for what the statistics behind the measures cost,
[statistics](statistics.md).
"""


def pages() -> dict[str, str]:
    """The page and its pictures, by file name."""
    made, lines = {}, [INTRODUCTION]
    for name in names():
        measure = get(name)
        told = " ".join((measure.function.__doc__ or "").split("\n\n")[0].split())
        low, high = ("∞" if math.isinf(x) else f"{x:g}" for x in measure.range)
        facts = [f"range {low} to {high}", *([f"in {measure.units}"] if measure.units != "1" else [])]
        lines += [f"## {name}", "", f"`{measure.formula}`", "", f"{told} ({', '.join(facts)})", ""]
        if name in PICTURES:
            made[f"measures/{name}.svg"] = draw(name)
            lines += [f"![{name}](measures/{name}.svg)", ""]
        if measure.paper:
            lines += [f"From: {measure.paper}.", ""]
    return {"measures.md": "\n".join(lines).rstrip() + "\n", **made}


def main(arguments: Sequence[str]) -> int:
    """Write the files below the folder named."""
    return write_pages("regard.measures.gallery", pages, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
