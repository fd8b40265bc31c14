"""Attribution at lengths whose matrices do not fit: rollout, attention x gradient, head importance, in one run.

    python benchmarks/attribution.py               # the table of docs/performance.md
    python benchmarks/attribution.py --fresh       # anew; otherwise a run that was broken off is gone on with
    python benchmarks/attribution.py --show        # the table once more, from what is kept

The shipped decoder (6 layers, 8 heads of 32) on random bytes; the metric is a logit difference at the last token, and
what is asked is the last row. Each arm lives in a process of its own, so its peak memory is its own. The matrix version
takes the weights of every layer from eager attention, and their gradients from autograd.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import cpu, use_threads

METHODS = ("rollout", "attention x gradient", "head importance")
SEED = 0


def metric(logits: Any) -> Any:
    return logits[:, -1, ord("a")] - logits[:, -1, ord("b")]


def ours(model: Any, inputs: dict[str, Any], method: str) -> Any:
    from regard.steer import flow

    if method == "rollout":
        return flow.rollout(model, inputs)
    if method == "attention x gradient":
        return flow.attention_x_grad(model, inputs, metric)[:, :, :, 0]
    return flow.head_importance(model, inputs, metric)


def from_matrices(model: Any, inputs: dict[str, Any], method: str) -> Any:
    """The same figures from the weights of every layer, and from their gradients."""
    import torch

    wanted = method != "rollout"
    with torch.set_grad_enabled(wanted):
        out = model(**inputs, output_attentions=True)
    if not wanted:
        row = torch.zeros(inputs["input_ids"].shape)
        row[:, -1] = 1
        for weights in reversed(out.attentions):
            row = row / 2 + torch.einsum("bi,bij->bj", row, weights.mean(1)) / 2
        return row
    gradients = torch.autograd.grad(metric(out.logits).sum(), out.attentions)
    each = [w.detach() * g for w, g in zip(out.attentions, gradients, strict=True)]
    if method == "head importance":
        return torch.stack([x.sum((-2, -1)).abs() for x in each])
    return torch.stack([x[:, :, -1].abs() for x in each])


ARMS: dict[str, Callable[..., Any]] = {"regard": ours, "matrices": from_matrices}


def load(arm: str, length: int) -> tuple[Any, dict[str, Any]]:
    import torch

    import regard

    use_threads()
    model = regard.load("testbed:decoder").model
    if arm == "matrices":
        model.set_attn_implementation("eager")
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(SEED))
    return model, {"input_ids": ids, "use_cache": False}


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def work(arm: str, length: int, method: str) -> None:
    """One run in this process, with its time and what it added to the memory."""
    model, inputs = load(arm, length)
    ARMS[arm](model, {**inputs, "input_ids": inputs["input_ids"][:, :64]}, method)  # the first run of a process
    before = status("VmRSS")
    start = time.perf_counter()
    ARMS[arm](model, inputs, method)
    print(json.dumps({"seconds": time.perf_counter() - start, "before": before, "peak": status("VmHWM")}))


def compare(length: int, method: str) -> float:
    """How far the two versions are apart, as a share of the largest figure."""
    a, b = (ARMS[arm](*load(arm, length), method).detach() for arm in ARMS)
    return float((a - b).abs().max() / b.abs().max())


def measure(short: int, long: int, keep: Callable[[dict[str, Any]], None], kept: dict[str, Any]) -> None:
    """Every arm that is not kept yet, each handed over as soon as it is measured."""
    config = load("regard", 64)[0].config
    matrices = config.num_hidden_layers * config.num_attention_heads * 4
    sizes = {"short": short, "long": long, "matrices_bytes": {str(n): matrices * n * n for n in (short, long)}}
    if any(kept.get(name) != value for name, value in sizes.items()):
        kept = {**sizes, "arms": [], "difference": {}}
    for method in METHODS:
        for arm, length in (("matrices", short), ("regard", short), ("regard", long)):
            if any((a["method"], a["arm"], a["length"]) == (method, arm, length) for a in kept["arms"]):
                continue
            command = [sys.executable, __file__, "--worker", arm, str(length), method]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            kept["arms"].append({"method": method, "arm": arm, "length": length, **json.loads(said)})
            keep(kept)
        if method not in kept["difference"]:
            kept["difference"][method] = compare(short, method)
            keep(kept)


def page(kept: dict[str, Any]) -> str:
    short, long = kept["short"], kept["long"]
    weights = {n: size / 2**30 for n, size in kept["matrices_bytes"].items()}
    lines = [
        f"### The decoder at {short:,} and {long:,} tokens",
        "",
        f"The weights of all layers take {weights[str(short)]:.2f} GiB at {short:,} tokens and "
        f"{weights[str(long)]:.0f} GiB at {long:,}, and as much again with their gradients.",
        "",
        "| method | version | tokens | time | memory added | matrices alone | largest difference |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for arm in kept["arms"]:
        needs = weights[str(arm["length"])] * (1 if arm["method"] == "rollout" else 2)
        apart = f"{kept['difference'][arm['method']]:.1e}" if arm["arm"] == "regard" and arm["length"] == short else "-"
        added = (arm["peak"] - arm["before"]) / 2**30
        lines.append(
            f"| {arm['method']} | {arm['arm']} | {arm['length']:,} | {arm['seconds']:.2f} s | {added:.2f} GiB |"
            f" {needs:.1f} GiB | {apart} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=2048, help="tokens of both versions")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the version without matrices")
    parser.add_argument("--fresh", action="store_true", help="measure anew what is kept in --out too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attribution.json")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], int(args.worker[1]), args.worker[2])
        return
    if args.show:
        print(page(json.loads(args.out.read_text())))
        return
    import torch
    import transformers

    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu(),
        "threads": int(os.environ.get("REGARD_BENCH_THREADS", "2")),
        "command": " ".join(["python", "benchmarks/attribution.py", *sys.argv[1:]]),
        "seed": SEED,
    }

    def keep(kept: dict[str, Any]) -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**kept, "provenance": provenance}, indent=1) + "\n")

    before = json.loads(args.out.read_text()) if args.out.exists() and not args.fresh else {}
    measure(args.short, args.long, keep, before)
    print(page(json.loads(args.out.read_text())))
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
