"""Head roles: which names a head has earned, with the evidence behind each.

Several roles may hold; the primary one is the first that holds in the order of `RULES` (specific before general), and
a head with none is "mixed". A role whose scores the atlas lacks is "not measured", which is neither yes nor no.
A template that keeps more than half of the allowed keys names nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

from regard.watch.atlas import Atlas

from .scores import role_scores

GU = "Gu et al. 2024, arXiv 2410.10781, epsilon = 0.3"
CLARK = "Clark et al. 2019; Voita et al. 2019"
FASTGEN = "FastGen's recovery ratio 0.95; the rest our reading"
OURS = "our reading"


@dataclass(frozen=True)
class Condition:
    """One comparison of a score with a threshold: `score op threshold`, and where the threshold is from."""

    score: str
    op: Literal[">=", ">", "<=", "<"]
    threshold: float
    where_from: str

    def check(self, value: float, threshold: float) -> bool | None:
        """Whether it holds; None if the score was not measured."""
        if np.isnan(value):
            return None
        return {
            ">=": value >= threshold,
            ">": value > threshold,
            "<=": value <= threshold,
            "<": value < threshold,
        }[self.op]


@dataclass(frozen=True)
class Rule:
    """A role: all (or any) of its conditions, and roles that exclude it."""

    role: str
    conditions: tuple[Condition, ...]
    combine: Literal["all", "any"] = "all"
    unless: tuple[str, ...] = ()


def _template(role: str, *more: Condition, lift: bool = True, where_from: str = FASTGEN) -> Rule:
    conditions = [Condition(role, ">=", 0.95, where_from)]
    if lift:
        conditions.append(Condition(f"{role}/lift", ">=", 2.0, OURS))
    return Rule(role, (*conditions, Condition(f"{role}/density", "<=", 0.5, OURS), *more))


RULES: tuple[Rule, ...] = (
    Rule("retrieval", (Condition("retrieval", ">=", 0.1, "Wu et al. 2024, bands 0 / 0-0.1 / 0.1-0.5 / 0.5-1"),)),
    Rule(
        "induction",
        (
            Condition("induction", ">=", 0.4, "prefix matching, Olsson et al. 2022; threshold our reading"),
            Condition("induction/lift", ">=", 10.0, OURS),
        ),
    ),
    Rule(
        "previous-token",
        (Condition("previous-token", ">", 0.5, CLARK), Condition("previous-token/argmax", ">=", 0.9, CLARK)),
        combine="any",
    ),
    Rule("sink", (Condition("sink", ">", 0.3, GU),)),
    _template("multi-diagonal", Condition("multi-diagonal/main", "<", 0.8, OURS)),
    _template("diagonal"),
    Rule(
        "skewed line",
        (
            Condition("skewed line", ">=", 0.5, OURS),
            Condition("skewed line/lift", ">=", 5.0, OURS),
            Condition("skewed line/density", "<=", 0.5, OURS),
        ),
    ),
    Rule(
        "vertical stripe",
        (Condition("vertical stripe", ">=", 0.5, OURS), Condition("vertical stripe/lift", ">=", 5.0, OURS)),
    ),
    _template("block"),
    _template("local", lift=False),
    _template("streaming", lift=False),
    Rule(
        "uniform",
        (Condition("uniform", ">=", 0.9, OURS), Condition("uniform/top1", "<=", 0.1, "Clark et al. 2019")),
    ),
    Rule("global", (Condition("global", ">=", 0.35, OURS),), unless=("local", "uniform")),
)

ROLES: tuple[str, ...] = tuple(rule.role for rule in RULES)
MIXED = "mixed"
DEFAULT: dict[str, float] = {c.score: c.threshold for rule in RULES for c in rule.conditions}
"""The threshold of every score; pass `DEFAULT | {"sink": 0.5}` to `name_heads` to change one."""


@dataclass(frozen=True)
class RoleTable:
    """Every head's primary role (`names`, [layer, head], "" where a layer has no such head) and the evidence."""

    names: xr.DataArray
    evidence: dict[tuple[str, int], dict[str, Any]]
    scores: xr.DataArray
    missing: dict[str, str] = field(default_factory=dict)

    def head(self, layer: str | int, head: int) -> dict[str, Any]:
        """The evidence of one head; the layer by name or by its place in the atlas."""
        labels = self.names["layer"].values.tolist()
        name = labels[layer] if isinstance(layer, int) else layer
        if (name, head) not in self.evidence:
            raise KeyError(f"layer, head: no head {head} in layer {layer!r}; layers are {', '.join(labels)}")
        return self.evidence[name, head]

    def counts(self) -> dict[str, int]:
        """How many heads have each primary role, in the order of the table."""
        seen = Counter(str(v) for v in self.names.values.ravel() if v)
        return {role: seen[role] for role in (*ROLES, MIXED) if seen[role]}

    def not_measured(self) -> dict[str, str]:
        """Roles that could be judged for no head at all, and what to watch to judge them."""
        out = {}
        for rule in RULES:
            lacking = [self.missing[c.score] for c in rule.conditions if c.score in self.missing]
            if all(e["roles"][rule.role]["holds"] is None for e in self.evidence.values()):
                out[rule.role] = lacking[0] if lacking else "nothing of this kind occurred in what was watched"
        return out

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON: counts, what was not measured, and one entry a head."""
        whole = {"counts": self.counts(), "not_measured": self.not_measured(), "heads": list(self.evidence.values())}
        return json.dumps(whole, indent=indent, allow_nan=False)

    def __repr__(self) -> str:
        lines = ["<regard.RoleTable>", *(f"  {role}: {n}" for role, n in self.counts().items())]
        lines += [f"  {role}: not measured" for role in self.not_measured()]
        return "\n".join(lines)


def name_heads(scores: xr.DataArray, thresholds: Mapping[str, float] = DEFAULT) -> RoleTable:
    """Judge every head by its scores ([layer, head, role], from `role_scores`).

    Args:
        scores: what `role_scores` returned.
        thresholds: the threshold of each score; names as in `DEFAULT`, those left out keep their default.
    """
    unknown = set(thresholds) - set(DEFAULT)
    if unknown:
        raise ValueError(f"thresholds: no score is named {', '.join(sorted(unknown))}; there are {', '.join(DEFAULT)}")
    limits = {**DEFAULT, **thresholds}
    labels = scores["role"].values.tolist()
    layers = scores["layer"].values.tolist()
    heads = scores["heads"].values if "heads" in scores.coords else np.full(len(layers), scores.sizes["head"])
    kinds = scores["kind"].values.tolist() if "kind" in scores.coords else ["self"] * len(layers)
    names = np.full(scores.shape[:2], "", dtype=object)
    evidence: dict[tuple[str, int], dict[str, Any]] = {}
    for li, layer in enumerate(layers):
        for h in range(int(heads[li])):
            values = dict(zip(labels, scores.values[li, h].tolist(), strict=True))
            judged = _judge(values, limits)
            held = [role for role in ROLES if judged[role]["holds"]]
            names[li, h] = held[0] if held else MIXED
            evidence[layer, h] = {
                "layer": layer,
                "layer_index": li,
                "head": h,
                "kind": kinds[li],
                "role": names[li, h],
                "also": held[1:],
                "not_measured": [role for role in ROLES if judged[role]["holds"] is None],
                "roles": judged,
            }
    table = xr.DataArray(
        names, dims=("layer", "head"), coords={k: c for k, c in scores.coords.items() if k != "role"}, name="role"
    )
    return RoleTable(table, evidence, scores, dict(scores.attrs.get("missing", {})))


def roles(atlas: Atlas, thresholds: Mapping[str, float] = DEFAULT) -> RoleTable:
    """The role of every head of an atlas, with its evidence."""
    return name_heads(role_scores(atlas), thresholds)


def _judge(values: dict[str, float], limits: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        checks = []
        for c in rule.conditions:
            value = values.get(c.score, float("nan"))
            checks.append(
                {
                    "score": c.score,
                    "value": None if np.isnan(value) else float(value),
                    "op": c.op,
                    "threshold": limits[c.score],
                    "passes": None if np.isnan(value) else bool(c.check(value, limits[c.score])),
                    "where_from": c.where_from,
                }
            )
        holds = _combine([check["passes"] for check in checks], rule.combine)
        for other in rule.unless:
            holds = _combine([holds, _not(out[other]["holds"])], "all")
        out[rule.role] = {"holds": holds, "combine": rule.combine, "scores": checks}
        if rule.role == "retrieval" and holds:
            out[rule.role]["strong"] = values["retrieval"] >= 0.5
    return out


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _combine(passes: list[Any], how: str) -> bool | None:
    """All or any of yes, no and unknown: unknown only where it could decide."""
    decisive = how == "any"
    if any(p is decisive for p in passes):
        return decisive
    return None if any(p is None for p in passes) else not decisive
