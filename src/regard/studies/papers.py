"""The catalogue: every paper, whether its study has run, and what was found."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regard.studies import protocol

TABLE = Path(__file__).parent.parent / "data" / "papers.tsv"
STATUSES = ("open", "holds", "does not hold", "not measured")


def papers(folders: tuple[Path, ...] = (protocol.SHIPPED,)) -> list[dict[str, Any]]:
    """Every row of the catalogue with its status and findings.

    The status of a paper: "open" (no study has run), "not measured" (a study has run and at least one claim still
    waits: its finding says for what), "does not hold" (all claims judged, at least one refuted) or "holds" (all claims
    judged, none refuted). A claim's finding is taken from a full run where there is one, else from a smoke run; among
    equals from the latest.

    Args:
        folders: where records of runs are kept; those shipped with the package unless told otherwise.
    """
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    studied = set(protocol.names())
    return [_row(row, folders if row["slug"] in studied else ()) for row in rows]


def _row(row: dict[str, str], folders: tuple[Path, ...]) -> dict[str, Any]:
    findings = _findings(row["slug"], folders)
    return {
        "slug": row["slug"],
        "family": row["family"],
        "title": row["title"],
        "seeds": row["seeds"].split(","),
        "date": row["date"],
        "status": status([f["state"] for f in findings]),
        "findings": findings,
    }


def status(states: list[str]) -> str:
    """The status of a paper from the states of its claims."""
    if not states:
        return "open"
    return next((s for s in ("not measured", "does not hold") if s in states), "holds")


def summary(findings: list[dict[str, Any]]) -> str:
    """How many claims are in each state, in words: "2 hold, 1 does not hold, 1 not measured"."""
    counts = {s: sum(f["state"] == s for f in findings) for s in STATUSES}
    plural = {"holds": "hold", "does not hold": "do not hold"}
    return ", ".join(f"{n} {state if n == 1 else plural.get(state, state)}" for state, n in counts.items() if n)


def _findings(slug: str, folders: tuple[Path, ...]) -> list[dict[str, Any]]:
    """One finding a claim, the strongest, with the claim's words and the run it comes from."""
    records = [r for folder in folders for r in protocol.records_of(slug, folder)]
    if not records:
        return []
    return [_strongest(claim, records) for claim in protocol.get(slug).CLAIMS]


def _strongest(claim: protocol.Claim, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A judged claim beats one not measured, a full run a smoke run, a later run an earlier one."""
    options = [(f, r) for r in records for f in r["findings"] if f["claim"] == claim.id]
    none = asdict(protocol.Finding(claim.id, "not measured", reason="no run kept here has judged this claim"))
    best, record = max(
        options,
        key=lambda o: (o[0]["state"] != "not measured", o[1]["size"] == "full", o[1]["provenance"]["date"]),
        default=(none, None),
    )
    of_run = (
        {k: record[k] for k in ("size", "model", "seed", "device")} | {"date": record["provenance"]["date"]}
        if record
        else None
    )
    return {
        "claim": claim.id,
        "text": claim.text,
        "kind": claim.kind,
        "paper": claim.paper,
        "ours": claim.ours,
        "holds_if": claim.holds_if,
        **{k: best[k] for k in ("state", "figure", "interval", "floor", "ceiling", "baseline", "reason")},
        "run": of_run,
    }
