"""The page of a plan: what each head was given and why, what that gains and loses; one HTML file, no network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from regard import __version__
from regard.patterns import Causal, Full, Pattern
from regard.plan.options import Option
from regard.plan.plan import Plan

from . import frame
from .pack import rounded, script_json
from .taxonomy import LOOKS, slug

__all__ = ["outcome", "plan_report"]

SCRIPTS = ("dom", "plan", "theme")
CELLS = 32
"""Rows and columns of a small map."""


def plan_report(plan: Plan, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the page of a plan: every head with its role, what it was given, its candidates and their figures.

    Args:
        plan: made by `regard.plan` or loaded. Plans without records of heads (shuffled ones, say) show what is given.
        path: the HTML file to write; its folder must exist.
        title: heading of the page; default the model's name.
    """
    path = Path(path)
    path.write_text(render(plan, title), encoding="utf-8", newline="\n")
    return path


def render(plan: Plan, title: str | None = None) -> str:
    """The page as a string."""
    style, script = frame.style("plan.css"), frame.script(SCRIPTS)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    name = str(plan.model.get("name", "")).rstrip("/\\") or "a model"
    return environment.from_string(frame.page_file("plan.html.j2")).render(
        title=title or (os.path.basename(name) if os.path.isabs(name) else name),
        facts=_facts(plan),
        gains=_gains(plan),
        losses=_losses(plan),
        measured=plan.measured is not None,
        notes=_notes(plan),
        version=__version__,
        date=str((plan.measured or {}).get("date", ""))[:10],
        style=Markup(style),
        script=Markup(script),
        style_hash=frame.digest(style),
        script_hash=frame.digest(script),
        header=Markup(script_json(payload(plan))),
    )


def payload(plan: Plan) -> dict[str, Any]:
    """What the page's script reads: options with small maps, and heads with their records."""
    options: list[dict[str, Any]] = []
    number: dict[int, int] = {}
    for option in plan.options:
        number[id(option)] = len(options)
        options.append(_option(plan, option))
    records = {(r["layer"], r["head"]): r for r in plan.heads}
    layers = []
    for index, (name, given) in enumerate(plan.layers.items()):
        heads = [
            {"option": number[id(option)], **_record(records.get((name, head)))} for head, option in enumerate(given)
        ]
        layers.append({"name": name, "index": index, "heads": heads})
    roles = [{"id": slug(role), "label": role, "code": look.code} for role, look in LOOKS.items()]
    return {"layers": layers, "options": options, "roles": roles, "cells": CELLS}


def _record(record: dict[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {"role": None, "why": None, "candidates": []}
    keys = ("error", "worst_error", "mass", "least_mass", "seconds")
    tried = [
        {"name": c["name"], "kind": c["kind"], **{k: rounded(c.get(k), 4) for k in keys}}
        for c in sorted(record.get("candidates", []), key=lambda c: c["seconds"])
    ]
    role = record["role"] if record["role"] in LOOKS else None
    own = {k: rounded(record.get(k), 4) for k in keys}
    return {"role": role and slug(role), "given": record["given"], "why": record["why"], **own, "candidates": tried}


def _option(plan: Plan, option: Option) -> dict[str, Any]:
    lengths = {"any": "means the same at every length", "scales": "grows with the length", "bound": "of this length"}
    return {
        "name": option.name,
        "kind": option.kind,
        "heads": sum(o is option for given in plan.layers.values() for o in given),
        "length": lengths[option.length],
        "map": _small_map(plan, option),
    }


def _small_map(plan: Plan, option: Option) -> str | None:
    """Rows of digits: 0 nothing of a cell of pairs is computed, 1 some, 2 all; None: decided while running."""
    name = next(n for n, given in plan.layers.items() if any(o is option for o in given))
    q_len, kv_len = plan.shapes[name][3:5]
    how: Any = option.at(kv_len)
    how = Full() if how is None else how
    if not isinstance(how, Pattern):
        return None
    if plan.causal.get(name):
        how = how & Causal()
    block = (max(1, -(-q_len // CELLS)), max(1, -(-kv_len // CELLS)))
    some, whole = how.of(0, 0).layout(q_len, kv_len, block).dense()
    levels = (some.int() + whole.int())[0, 0]
    return "/".join("".join(map(str, row)) for row in levels.tolist())


def outcome(plan: Plan) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """What the plan gains and what it costs: rows of (what, dense, planned, change) under a heading each."""
    return [(name, rows) for name, rows in (("gained", _gains(plan)), ("lost", _losses(plan))) if rows]


# -- words and figures -----------------------------------------------------------------------------------------------


def _seconds(x: float | None) -> str:
    if x is None:
        return "–"
    return f"{x:.2f} s" if x >= 1 else f"{1e3 * x:.1f} ms"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    heads = sum(map(len, plan.layers.values()))
    lengths = sorted({shape[4] for shape in plan.shapes.values()})
    facts = [
        ("Heads", f"{heads} in {len(plan.layers)} layers"),
        ("Planned at", " and ".join(f"{n:,}" for n in lengths) + " tokens"),
    ]
    c = plan.calibration
    if c:
        facts.append(("Budget", str(c["budget"])))
        facts.append(("Calibrated on", f"{c['sequences']} sequence{'s' if c['sequences'] != 1 else ''}"))
        passes = f"{c['passes_per_sequence']:.1f} forward passes a sequence"
        facts.append(("Planning took", f"{passes} ({c['seconds']:.0f} s)"))
    return facts


def _gains(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(what, dense, planned, times) of what was measured, and of what was predicted."""
    rows = []
    m, p = plan.measured, plan.predicted
    if m:
        for what, key in (("Attention, measured", "attention"), ("Whole forward, measured", "forward")):
            both = m[f"{key}_seconds"]
            rows.append((what, _seconds(both["dense"]), _seconds(both["planned"]), _times(m[f"{key}_speedup"])))
        if m.get("memory"):
            dense, planned = (m["memory"][how] / 2**20 for how in ("dense", "planned"))
            if min(dense, planned) >= 1:  # below that the system's count says nothing
                change = _times(dense / planned, "less")
                rows.append(("Peak memory of a run", f"{dense:.0f} MiB", f"{planned:.0f} MiB", change))
    if p:
        rows.append(
            (
                "Attention, predicted",
                _seconds(p["dense_attention_seconds"]),
                _seconds(p["attention_seconds"]),
                _times(p["attention_speedup"]),
            )
        )
    return rows


def _times(x: float | None, word: str = "faster") -> str:
    return "–" if x is None else f"{x:.2f}× {word}"


def _losses(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(what, dense, planned, change) by kind of sequences; of the calibration where nothing else was measured."""
    rows = []
    m, c = plan.measured, plan.calibration
    if m:
        for name, harm in m["harm"].items():
            of = "" if name == "all" else f", {name}"
            if "perplexity" in m:
                both = m["perplexity"][name]
                change = f"{100 * (both['planned'] / both['dense'] - 1):+.2f} %"
                rows.append((f"Perplexity{of}", f"{both['dense']:.4g}", f"{both['planned']:.4g}", change))
            elif "loss" in m:
                both = m["loss"][name]
                rows.append((f"Loss{of}", f"{both['dense']:.4g}", f"{both['planned']:.4g}", f"{harm:+.3g}"))
            else:
                rows.append((f"{m['unit'].capitalize()}{of}", "0", f"{harm:.3g}", f"{harm:+.3g}"))
        for name, both in m.get("score", {}).items():
            change = f"{100 * (both['planned'] - both['dense']):+.1f} points"
            rows.append((f"Answers right, {name}", f"{both['dense']:.1%}", f"{both['planned']:.1%}", change))
    if c:
        for name, harm in c["harm"].items():
            of = "" if name == "all" else f", {name}"
            rows.append((f"On the calibration sequences{of}", "0", f"{harm:+.3g}", str(c["unit"])))
    if plan.predicted:
        kept = plan.predicted["kept_mass"]
        rows.append(("Mass kept, mean over heads", "100.0 %", f"{100 * kept:.1f} %", f"{100 * (kept - 1):+.1f} %"))
    return rows


def _notes(plan: Plan) -> list[tuple[str, str]]:
    notes = [
        (
            "Mass kept",
            "exp(lse of the keys that are left − lse of all keys), averaged over queries; the smaller figure is the "
            "mean over the worst 1 % of queries. It is exact, on the calibration sequences.",
        ),
        (
            "Error",
            "How far the head’s output, after the layer’s output projection, moves from what it was, as a share of "
            "the whole layer’s attention output at that query; beside it the same over the worst 1 % of queries.",
        ),
        (
            "Time",
            "Measured on the machine that planned, for groups of heads of one layer that run in one kernel call; a "
            "head’s time is its share of its group’s.",
        ),
        (
            "The choice",
            "Over all heads together, the options with the least error for the time, or the least time for the error. "
            "Plans found this way are run on the calibration sequences until the measured loss meets the budget.",
        ),
    ]
    bound = plan.length.get("bound")
    if bound:
        notes.append(("At this length only", f"{', '.join(bound)}: holds positions of the sequences planned on."))
    return notes
