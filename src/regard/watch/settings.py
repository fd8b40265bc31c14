"""What to watch: `Watch` holds every choice, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regard.patterns.pattern import Pattern

from .fold import Fold
from .variables import PER_SAMPLE, PRESETS, STATISTICS

RELATIONS = ("self", "previous", "duplicate", "induction")
BUDGETS = {"1/16": 16, "1/8": 8, "1/4": 4}
WIDTHS = tuple(2**n for n in range(21))
POSITIONLESS = ("entropy", "sq", "head_gram")

GroupLike = Tensor | AbstractSet[int] | Callable[[Tensor], Tensor]
"""A key mask [length] or [batch, length] on the padded axis, a set of token ids, or a function of token ids."""
TemplateLike = Pattern | Callable[[int], Pattern]
"""A pattern over positions from the sample's first token, or a function of the sample's length that gives one."""


@dataclass(frozen=True)
class Watch:
    """Every choice of a watch. `Watch("light", near=64)`; `regard.watch(model, statistics=Watch(...))`.

    Args:
        statistics: "light", "default", "full", or names of `regard.watch.variables.STATISTICS`.
        rows: which rows count: "all", "prompt", "generated", or a mask [length] or [batch, length].
        groups: named groups of tokens; each is a group of rows and of keys beside "all" and "first". None: given for
            each forward with `Recorder.annotate`.
        relations: which of self, previous, duplicate, induction (the last two need token ids).
        templates: named patterns beside the built-in ones; the roles "block" and "skewed line" are judged by those of
            that name.
        near: offsets |i-j| < near are kept one by one.
        widths: window widths.
        period: lag of the "diagonals" template (tokens a frame, width of a grid); default the grid's width.
        grid: (height, width) of an image's patches, for ring statistics.
        prefix: tokens before the first patch (class token, registers).
        per_sample: names of `regard.watch.variables.PER_SAMPLE`.
        stream: also the residual stream after every block.
        tokens: keep token ids (and texts, with a tokenizer) in the atlas.
        layers: shell-style patterns of layer names; None watches every layer.
        folds: for layers that fold windows into the batch, by shell-style patterns of their names, what they fold
            (`regard.watch.fold.Fold`); Swin and MaxViT of timm need none.
    """

    statistics: str | Sequence[str] = "default"
    rows: str | Tensor = "all"
    groups: Mapping[str, GroupLike | None] = field(default_factory=dict)
    relations: Sequence[str] = RELATIONS
    templates: Mapping[str, TemplateLike] = field(default_factory=dict)
    near: int = 256
    widths: Sequence[int] = WIDTHS
    period: int | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 1
    per_sample: Sequence[str] = ()
    stream: bool = False
    tokens: bool = True
    layers: Sequence[str] | None = None
    folds: Mapping[str, Fold] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_names("statistics", self.names, STATISTICS)
        self._check_names("relations", tuple(self.relations), RELATIONS)
        if isinstance(self.per_sample, str):
            raise ValueError(f"per_sample: must be a sequence of names, got the string {self.per_sample!r}")
        self._check_names("per_sample", tuple(self.per_sample), PER_SAMPLE)
        if isinstance(self.rows, str) and self.rows not in ("all", "prompt", "generated"):
            raise ValueError(f"rows: {self.rows!r} is none of 'all', 'prompt', 'generated'; or give a bool mask")
        for name in self.groups:
            if name in ("all", "first"):
                raise ValueError(f"groups: {name!r} is a group every atlas has; choose another name")
        built_in = set(self.own_templates)
        for name in self.templates:
            if name in built_in:
                raise ValueError(f"templates: {name!r} is built in; choose another name")
        for name, value in (("near", self.near), ("prefix", self.prefix), ("period", self.period)):
            least = 0 if name == "prefix" else 2 if name == "period" else 1
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: must be an integer >= {least}, got {value!r}")
        widths = tuple(self.widths)
        if not widths or sorted(set(widths)) != list(widths) or widths[0] < 1:
            raise ValueError(f"widths: must be rising integers >= 1, got {widths}")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid: must be (height, width) of at least 1, got {self.grid!r}")

    @staticmethod
    def _check_names(argument: str, names: Sequence[str], known: Any) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: no {name!r}; there are {', '.join(known)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics by name, in the order of the table."""
        if isinstance(self.statistics, str):
            if self.statistics not in PRESETS:
                raise ValueError(
                    f"statistics: {self.statistics!r} is none of {', '.join(map(repr, PRESETS))}; "
                    f"or give a sequence of names: {', '.join(STATISTICS)}"
                )
            chosen = PRESETS[self.statistics]
        else:
            chosen = tuple(self.statistics)
        if self.grid is not None and "ring" not in chosen:
            chosen = (*chosen, "ring")
        return tuple(s for s in STATISTICS if s in chosen) + tuple(s for s in chosen if s not in STATISTICS)

    @property
    def lag(self) -> int | None:
        """The period of the "diagonals" template."""
        return self.period if self.period is not None else self.grid[1] if self.grid and self.grid[1] > 1 else None

    @property
    def own_templates(self) -> tuple[str, ...]:
        """Templates every atlas with "template" has."""
        own = (*(f"sinks4+window{b}" for b in BUDGETS), "window1/16", "diagonal")
        return (*own, "diagonals", "diagonals m=0") if self.lag is not None else own

    @property
    def template_names(self) -> tuple[str, ...]:
        """All templates: the built-in ones and the user's."""
        return (*self.own_templates, *self.templates)

    @property
    def k_groups(self) -> tuple[str, ...]:
        """All groups of keys."""
        return ("first", *self.groups)

    @property
    def q_groups(self) -> tuple[str, ...]:
        """All groups of rows."""
        return ("all", *self.groups)

    def has(self, *names: str) -> bool:
        """Whether any of these statistics is watched."""
        return any(name in self.names for name in names)

    def sampled(self, *names: str) -> bool:
        """Whether any of these per-sample variables is watched."""
        return any(name in self.per_sample for name in names)

    def to_json(self) -> str:
        """What two runs must share to be merged."""
        return json.dumps(
            {
                "statistics": list(self.names),
                "rows": self.rows if isinstance(self.rows, str) else "mask",
                "groups": list(self.groups),
                "relations": list(self.relations),
                "templates": {k: v if isinstance(v, str) else _describe(v) for k, v in self.templates.items()},
                "near": self.near,
                "widths": list(self.widths),
                "period": self.lag,
                "grid": self.grid and list(self.grid),
                "per_sample": list(self.per_sample),
                "stream": self.stream,
                "layers": None if self.layers is None else list(self.layers),
            }
        )


def _describe(template: TemplateLike) -> str:
    return repr(template) if isinstance(template, Pattern) else getattr(template, "__qualname__", "function")
