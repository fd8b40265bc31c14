"""Attention under a pattern: blocked tiles, FlexAttention and strided SDPA beside dense SDPA, in one run.

    python benchmarks/patterns.py                     # the tables of docs/performance.md
    python benchmarks/patterns.py --length 4096 --repeats 2 --out /tmp/patterns.json
    python benchmarks/patterns.py --device cuda       # FlexAttention with our layouts and with create_block_mask
    python benchmarks/patterns.py --show              # the tables once more, from what is kept

The arms of a case take turns, one repeat each, in one process; times are medians, ratios are medians of the ratios of
neighbouring repeats. What is done once (compiling, block masks, plans) is timed apart. The floor is the larger of two:
the allowed pairs at the rate of the dense kernel in the same run, and the tensors read and written once at the speed of
a copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import cpu, use_threads

HERE = Path(__file__).parent


def measure(case: Any, repeats: int | None, device: str, copy_seconds: float) -> dict[str, Any]:
    """All arms of a case, taking turns."""
    from pattern_arms import timed

    times: dict[str, list[float]] = {name: [] for name in case.arms}
    for run in case.arms.values():
        timed(run, device)  # warm
        gc.collect()
    for _ in range(repeats or case.repeats):
        case.between()
        for name, run in case.arms.items():
            times[name].append(timed(run, device))
    first = next(iter(times))
    base = times[first]
    operations = median(base) * case.pairs / case.dense_pairs
    floor = max(operations, case.copies * copy_seconds)
    return {
        "case": case.name,
        "pairs": case.pairs,
        "dense_pairs": case.dense_pairs,
        "floor_operations_seconds": operations,
        "floor_bytes_seconds": case.copies * copy_seconds,
        "missing": case.missing,
        "arms": {
            name: {
                "seconds": median(values),
                "ratio": median(b / a for a, b in zip(values, base, strict=True)),
                "of_floor": floor / median(values),
                "before": case.before.get(name, {}),
                "note": case.notes.get(name, ""),
                "all_seconds": values,
            }
            for name, values in times.items()
        },
    }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        ops, moved = r["floor_operations_seconds"], r["floor_bytes_seconds"]
        ideal = r["dense_pairs"] / r["pairs"]
        first = next(iter(r["arms"]))
        lines += [
            f"### {r['case'][0].upper()}{r['case'][1:]}",
            "",
            f"The pattern allows {r['pairs']:,} pairs a head, {ideal:.2f} times fewer than {first} computes. Floor: "
            f"{milliseconds(ops)} of operations, {milliseconds(moved)} of reading and writing.",
            "",
            f"| arm | time | × faster than {first} | floor ÷ time | once, before |",
            "|---|---:|---:|---:|---|",
        ]
        for name, arm in r["arms"].items():
            once = ", ".join(f"{what} {milliseconds(s)}" for what, s in arm["before"].items())
            told = "; ".join(x for x in (once, arm["note"]) if x) or "-"
            share = "-" if name == first else f"{arm['of_floor']:.0%}"
            lines.append(f"| {name} | {milliseconds(arm['seconds'])} | {arm['ratio']:.2f} | {share} | {told} |")
        for name, why in r["missing"].items():
            lines.append(f"| {name} | {why} | - | - | - |")
        lines.append("")
    return "\n".join(lines)


def page(kept: dict[str, Any]) -> str:
    """Every table of a run."""
    shown = table(kept["results"])
    if kept.get("layouts"):
        import pattern_layouts

        shown += f"\n### Layouts beside create_block_mask, one core\n\n{pattern_layouts.table(kept['layouts'])}\n"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--repeats", type=int, help="for every case; each has its own number by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="only cases with this in their name; needs --out")
    parser.add_argument("--layouts", action="store_true", help="measure the layouts again, in what is kept in --out")
    parser.add_argument("--out", type=Path, help="default: results/patterns.json, patterns-cuda.json on a GPU")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    args = parser.parse_args()
    out = args.out or HERE / "results" / ("patterns.json" if args.device == "cpu" else f"patterns-{args.device}.json")
    sys.path.insert(0, str(HERE))
    if args.only and not args.out:
        parser.error("--only measures a part and would replace what is kept of all; say --out FILE")
    if args.show:
        print(page(json.loads(out.read_text())))
        return
    if args.layouts:
        import pattern_layouts

        kept = json.loads(out.read_text())
        kept["layouts"] = pattern_layouts.layout_arms()
        kept["provenance"]["layouts"] = datetime.now(UTC).isoformat(timespec="seconds")
        out.write_text(json.dumps(kept, indent=1) + "\n")
        print(pattern_layouts.table(kept["layouts"]))
        return
    import torch

    from pattern_arms import WINDOW, cases, tensors, timed

    if args.length <= WINDOW or args.length % 256:
        parser.error(f"--length must be a multiple of 256 above the window of {WINDOW}, got {args.length}")

    threads = use_threads()
    results = []
    began = time.perf_counter()
    for make in cases(args.device, args.length):
        if args.only and args.only not in getattr(make.func, "__name__", ""):
            continue
        case = make()
        dtype = torch.bfloat16 if "bfloat16" in case.name else torch.float32
        (x, _, _) = tensors(args.length, dtype, args.device)
        copy = median(timed(x.clone, args.device) for _ in range(9))
        results.append(measure(case, args.repeats, args.device, copy))
        print(table(results[-1:]), flush=True)
        del case
        gc.collect()
    layouts = []
    if args.device == "cpu" and not args.only:
        import pattern_layouts

        layouts = pattern_layouts.layout_arms()
        print(pattern_layouts.table(layouts), flush=True)
    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "command": " ".join(["python", "benchmarks/patterns.py", *sys.argv[1:]]),
        "seconds": time.perf_counter() - began,
        "seed": 0,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"provenance": provenance, "results": results, "layouts": layouts}, indent=1) + "\n")
    print(f"written: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
