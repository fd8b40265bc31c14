"""The page of a causal scan: what a task's answers cost without each head, as a heat map; one HTML file, no network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from regard import __version__

from . import frame
from .pack import rounded, script_json

__all__ = ["scan_report"]

SCRIPTS = ("dom", "scan", "theme")
KINDS = {
    "zero": "Taken out by zero: the head’s output is 0 before the layer’s output projection.",
    "uniform": "Taken out by uniform: the head’s weights are the same on every key it may see.",
    "mean": "Taken out by mean: the head’s output is the mean over the other prompts.",
    "resample": "Taken out by resample: the head’s output is that on another prompt.",
}


def scan_report(
    scans: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    model: str = "",
    title: str | None = None,
    overlap: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page of one scan, or of several of the same model side by side.

    Args:
        scans: records as `regard scan --json` prints them: task, kind, prompts, loss, and heads with layer, head,
            increase and interval.
        path: the HTML file to write; its folder must exist.
        model: its name.
        title: heading of the page; default "Heads of MODEL that TASK needs".
        overlap: what `regard.tasks.heads.overlap` found, with `share`: named in words, and shared heads marked.

    Raises:
        ValueError: no scan, or one without heads.
    """
    if not scans or not all(s["heads"] for s in scans):
        raise ValueError("scans must hold at least one scan, each with at least one head")
    path = Path(path)
    path.write_text(render(scans, model, title, overlap), encoding="utf-8", newline="\n")
    return path


def render(scans: Sequence[Mapping[str, Any]], model: str, title: str | None, overlap: Mapping[str, Any] | None) -> str:
    """The page as a string."""
    style, script = frame.style("scan.css"), frame.script(SCRIPTS)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    name = model.rstrip("/\\") or "a model"
    name = os.path.basename(name) if os.path.isabs(name) else name
    tasks = " and ".join(str(s["task"]) for s in scans)
    return environment.from_string(frame.page_file("scan.html.j2")).render(
        heading=title or f"Heads of {name} that {tasks} need{'s' if len(scans) == 1 else ''}",
        facts=_facts(scans, name),
        verdict=None if overlap is None else in_words(overlap, [str(s["task"]) for s in scans]),
        ranking=_ranking(scans),
        notes=_notes(scans),
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        style_hash=frame.digest(style),
        script_hash=frame.digest(script),
        header=Markup(script_json(payload(scans, overlap))),
    )


def payload(scans: Sequence[Mapping[str, Any]], overlap: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page's script reads: every head's figures, the most needed first, and the largest of them."""
    told = []
    for s in scans:
        heads = [
            {
                "key": f"{h['layer']}.{h['head']}",
                "increase": rounded(h["increase"]),
                "low": rounded(h["interval"][0]),
                "high": rounded(h["interval"][1]),
            }
            for h in _ordered(s)
        ]
        told.append(
            {
                "task": str(s["task"]),
                "kind": str(s["kind"]),
                "layers": 1 + max(h["layer"] for h in s["heads"]),
                "width": 1 + max(h["head"] for h in s["heads"]),
                "most": max(abs(h["increase"]) for h in heads),
                "heads": heads,
            }
        )
    shared = [] if overlap is None else [f"{layer}.{head}" for layer, head in overlap["shared"]]
    return {"scans": told, "shared": shared}


def in_words(overlap: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """What two circuits share, beside chance."""
    shared = ", ".join(f"{layer}.{head}" for layer, head in overlap["shared"]) or "none"
    return (
        f"{tasks[0]} and {tasks[1]} share {overlap['overlap']:.0%} of the {len(overlap['heads'][0])} heads that each "
        f"needs most: {shared}. Random circuits of this size share {overlap['chance']:.0%}, 1 % of them "
        f"{overlap['chance_99']:.0%} or more."
    )


def _ordered(scan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(scan["heads"], key=lambda h: -h["increase"])


def _signed(x: float) -> str:
    return f"{x:+.3g}".replace("-", "−")


def _facts(scans: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, str]]:
    facts = [("Model", name)]
    for s in scans:
        facts.append((f"Task {s['task']}", f"{s['prompts']} prompts, loss of the whole model {s['loss']:.3g} nat"))
    facts.append(("Heads", str(len(scans[0]["heads"]))))
    return facts


def _ranking(scans: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    return [
        (
            str(s["task"]),
            f"{h['layer']}.{h['head']}",
            _signed(h["increase"]),
            f"{_signed(h['interval'][0])} to {_signed(h['interval'][1])}",
        )
        for s in scans
        for h in _ordered(s)
    ]


def _notes(scans: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    notes = [
        (
            "The figure",
            "How much the mean loss of the task’s answers grows when one head alone is taken out, in nats, over the "
            "same prompts. Below 0: the answers are better without it.",
        ),
        ("Intervals", "95 %, by drawing prompts anew (bootstrap); they say nothing about other models or tasks."),
        (
            "One at a time",
            "Heads that stand in for one another look idle here: taken out alone, none of them is missed.",
        ),
    ]
    notes += [(f"By {kind}", KINDS.get(kind, kind)) for kind in dict.fromkeys(str(s["kind"]) for s in scans)]
    return notes
