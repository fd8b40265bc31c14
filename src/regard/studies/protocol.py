"""What a study is, what it finds, and how findings are kept.

A study is a module of this folder, named after the paper's slug, with

- `PAPER`: the slug, a row of data/papers.tsv;
- `CLAIMS`: a list of `Claim`;
- `MODEL`, where it is not "testbed:decoder": what it runs on unless told otherwise, None if it brings its own models;
- `run(size, device, seed, model) -> list[Finding]`: one finding for every claim it judged.

Nothing here imports torch: `regard papers` reads claims and findings without it.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

Kind = Literal["instrument", "mechanism", "replication"]
State = Literal["holds", "does not hold", "not measured"]
Size = Literal["smoke", "full"]

DEFAULT_MODEL = "testbed:decoder"
SHIPPED = Path(__file__).parent.parent / "data" / "findings"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, or of our own instrument.

    Attributes:
        id: short name, unique in the study.
        text: what is claimed.
        kind: instrument (our part equals the definition), mechanism (the phenomenon shows on a testbed) or
            replication (the paper's own setting).
        paper: the paper's figure, in words; empty where the paper gives none.
        ours: what our figure is, with its unit.
        holds_if: the condition under which it holds.
        waits: why it cannot be measured yet; empty where it can.
    """

    id: str
    text: str
    kind: Kind
    ours: str
    holds_if: str
    paper: str = ""
    waits: str = ""


@dataclass(frozen=True)
class Finding:
    """What was measured for one claim.

    Attributes:
        claim: the id of the claim.
        state: holds, does not hold, or not measured; the last one needs a `reason`.
        figure: our figure (None: not measured).
        interval: its 95% interval, over items, and over seeds first where models were trained.
        floor: the figure when nothing is there (chance, an untrained model, no needle).
        ceiling: the best that could be reached.
        baseline: the honest alternative at equal cost.
        reason: why this state, in one sentence.
        details: anything else worth keeping; JSON values.
    """

    claim: str
    state: State
    figure: float | None = None
    interval: tuple[float, float] | None = None
    floor: float | None = None
    ceiling: float | None = None
    baseline: float | None = None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise ValueError(f"state must be one of {get_args(State)}, got {self.state!r}")
        if self.state == "not measured" and not self.reason:
            raise ValueError(f"claim {self.claim!r} is 'not measured' without a reason")
        if self.state != "not measured" and (self.figure is None or self.figure != self.figure):
            raise ValueError(f"claim {self.claim!r} is {self.state!r} without a figure (got {self.figure})")


def unmeasured(claims: Sequence[Claim], reason: str) -> list[Finding]:
    """A finding for each of the claims, but for those that wait anyway: not measured, for this reason."""
    return [Finding(claim.id, "not measured", reason=reason) for claim in claims if not claim.waits]


def verdict(condition: Any) -> State:
    """The state of a claim that was measured."""
    return "holds" if condition else "does not hold"


class Study(Protocol):
    """The module of one study."""

    PAPER: str
    CLAIMS: Sequence[Claim]  # and maybe MODEL: see `default_model`
    run: Callable[..., list[Finding]]


def names() -> list[str]:
    """Slugs of the papers that have a study."""
    here = Path(__file__).parent
    shared = {"__init__", "protocol", "papers", "evidence", "long_reading", "testbed", "timing"}
    return sorted(p.stem.replace("_", "-") for p in here.glob("*.py") if p.stem not in shared)


def get(name: str) -> Study:
    """The study of a paper.

    Raises:
        KeyError: no such study; the message lists those there are.
    """
    if name not in names():
        raise KeyError(f"no study named {name!r}; there are {', '.join(names())}")
    return cast(Study, importlib.import_module(f"regard.studies.{name.replace('-', '_')}"))


def default_model(name: str) -> str | None:
    """The model a study runs on unless told otherwise; None: it brings its own and takes no other."""
    return getattr(get(name), "MODEL", DEFAULT_MODEL)


def study(
    name: str, size: Size = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None
) -> list[Finding]:
    """Run the study of a paper and return its findings, one for every claim.

    Args:
        name: the paper's slug, as `regard papers` lists it.
        size: "smoke" (seconds on two CPU cores) or "full" (minutes on one GPU).
        device: where the model runs, "cpu" or "cuda".
        seed: of everything drawn.
        model: "testbed:decoder", a folder or a hub name; None: the study's own choice.

    Raises:
        KeyError: no such study.
        ValueError: size is neither, the study takes no model and one is given, or it judged another set of claims
            than it states.
    """
    found = get(name)
    if size not in get_args(Size):
        raise ValueError(f"size must be one of {get_args(Size)}, got {size!r}")
    default = default_model(name)
    if default is None and model is not None:
        raise ValueError(f"study {name!r} brings its own models and takes no other, got model={model!r}")
    model = default if model is None else model
    findings = found.run(size=size, device=device, seed=seed, model=model)
    for claim in found.CLAIMS:
        if claim.waits:
            findings.append(Finding(claim.id, "not measured", reason=claim.waits))
    stated, judged = [c.id for c in found.CLAIMS], [f.claim for f in findings]
    if sorted(stated) != sorted(judged):
        raise ValueError(f"study {name!r} states the claims {stated} and judged {judged}")
    return sorted(findings, key=lambda f: stated.index(f.claim))


def run_and_record(name: str, **arguments: Any) -> dict[str, Any]:
    """`study`, with where the findings come from: a JSON-ready record."""
    began = time.perf_counter()
    findings = study(name, **arguments)
    seconds = time.perf_counter() - began
    return {
        "paper": name,
        **{"size": "smoke", "seed": 0, "device": "cpu"} | arguments,
        "model": arguments.get("model") or default_model(name),
        "findings": [asdict(f) for f in findings],
        "provenance": provenance(seconds),
    }


def provenance(seconds: float) -> dict[str, Any]:
    """Versions, machine, date and command of the present process."""
    from importlib.metadata import version

    command = ["regard", *sys.argv[1:]] if Path(sys.argv[0]).stem in ("regard", "__main__") else [sys.argv[0]]
    return {
        "versions": {p: version(p) for p in ("regard", "torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "seconds": round(seconds, 1),
    }


def keep(record: dict[str, Any], folder: Path) -> Path:
    """Write a record beside the earlier ones of its paper, in place of one of the same size, model and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['paper']}.json"

    def same(other: dict[str, Any]) -> bool:
        return all(other[key] == record[key] for key in ("size", "model", "seed"))

    records = [r for r in records_of(record["paper"], folder) if not same(r)] + [record]
    records.sort(key=lambda r: (r["size"], r["model"] or "", r["seed"]))
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    whole.replace(path)
    return path


def records_of(name: str, folder: Path = SHIPPED) -> list[dict[str, Any]]:
    """Every record of a paper kept in a folder."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []
