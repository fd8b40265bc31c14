"""What routes cost: deciding beside the dense attention it replaces, and attention over what was decided, in one run.

    python benchmarks/routes.py                           # the tables of docs/performance.md, case by case
    python benchmarks/routes.py --only HiP                # cases with this in their name, put into what is kept
    python benchmarks/routes.py --length 4096 --repeats 1 --out /tmp/routes.json
    python benchmarks/routes.py --show                    # the tables once more, from what is kept

8 heads of 64, 16,384 tokens, causal, float32; neighbouring queries and keys are alike (`ar_qk`, rho = 0.97). Dense
causal `scaled_dot_product_attention`, deciding and routed attention take turns in one process; times are medians,
ratios medians of the ratios of neighbouring turns. The limit of routed attention is the time of its allowed pairs at
the rate of the dense kernel in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import cpu, use_threads

HERE = Path(__file__).parent
HEADS, HEAD_DIM = 8, 64
SHARE = 0.10
"""Of the dense time, what deciding may take."""
LEFT_OUT = {
    "LowRankRoute (Sparsifiner)": "guesses a weight for each of the N x N pairs of a length that it is made for, a few "
    "hundred tokens of an image",
    "LayerRoute (Flux)": "decides once a sequence, from 200 queries",
}


def cases(length: int) -> dict[str, Callable[[], tuple[Any, str]]]:
    """Routes by name: the route, and what its constants are."""
    import torch

    from regard.layers.routing import KMeansRoute
    from regard.patterns import BlockTopK, Causal, HiP, topk
    from regard.patterns.chunks import ChunkRoute
    from regard.patterns.landmarks import LandmarkRoute
    from regard.patterns.superlinear import Superlinear

    root = int(length**0.5)
    eighth = max(1, length // 64 // 8)
    within = Causal()

    def kmeans(members: Any) -> Any:
        made = KMeansRoute(
            HEADS, HEAD_DIM, root, members=members, within=within, generator=torch.Generator().manual_seed(0)
        )
        return made.eval()

    return {
        "BlockTopK, blocks of 64": lambda: (
            BlockTopK(64, select=topk(eighth), within=within),
            f"{eighth} of {length // 64} key blocks",
        ),
        "BlockTopK, blocks of 128": lambda: (
            BlockTopK(128, select=topk(max(1, eighth // 2)), within=within),
            f"{max(1, eighth // 2)} of {length // 128} key blocks",
        ),
        "BlockTopK, one for all heads": lambda: (
            BlockTopK(64, select=topk(eighth), heads="all", within=within),
            f"{eighth} of {length // 64} key blocks",
        ),
        "HiP, the paper's constants": lambda: (HiP(within=within), "k = 512, blocks of 64 x 2, every 2nd query scored"),
        "HiP, fewer queries scored": lambda: (
            HiP(block=(128, 2), stride=8, within=within),
            "k = 512, blocks of 128 x 2, every 8th query scored",
        ),
        "KMeansRoute, balanced": lambda: (kmeans("balanced"), f"{root} groups of {length // root}"),
        "KMeansRoute, nearest": lambda: (kmeans("nearest"), f"{root} centroids, {length // root} keys a query"),
        "LandmarkRoute": lambda: (LandmarkRoute(8, within=within), "8 blocks of 51 a query"),
        "ChunkRoute, means": lambda: (
            ChunkRoute(256, 4, representation="mean", within=within),
            "4 chunks of 256 a query",
        ),
        "Superlinear": lambda: (Superlinear(within=within), "3 spans and a window a query"),
    }


def allowed_pairs(tiles: Any) -> int:
    """Pairs that are allowed, over all heads: what the masks of all tiles leave."""
    u, total = tiles.units, 0
    for batch in tiles.batches:
        for lo in range(0, len(batch), 1024):
            at = slice(lo, min(lo + 1024, len(batch)))
            allow = batch.allow(at)
            count = at.stop - lo
            if allow is None:
                total += count * batch.size * batch.n
            else:
                total += int(allow.sum()) * batch.size // allow.shape[1] * count // len(allow)
    return total * u.each


def measure(name: str, make: Any, length: int, repeats: int, backward: bool, device: str) -> dict[str, Any]:
    """One route: dense, deciding and attending in turns."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from regard.kernels.attend import attend
    from regard.kernels.routed_tiles import make_tiles
    from regard.tasks.qk import ar_qk

    generator = torch.Generator().manual_seed(0)
    q, k = ar_qk(length, HEAD_DIM, 0.97, 2, generator, heads=HEADS)
    v = torch.randn(k.shape, generator=generator)
    q, k, v = (x.to(device) for x in (q, k, v))
    route, constants = make()
    with torch.no_grad():
        routed = route(q, k)
    tiles = make_tiles(routed, 1, HEADS, HEADS)
    pairs, computed = allowed_pairs(tiles), tiles.pairs
    dense_pairs = HEADS * length * (length + 1) // 2
    arms: dict[str, Callable[[], Any]] = {}
    if backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        grad = torch.randn(v.shape, generator=generator).to(device)

        def gradient(out: Any) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        arms["dense"] = gradient(sdpa(q, k, v, is_causal=True))
        arms["attend"] = gradient(attend(q, k, v, routed, backend="blocked"))
    else:
        arms["dense"] = lambda: sdpa(q, k, v, is_causal=True)
        arms["decide"] = lambda: route(q, k)
        # a new one each time, of which nothing is kept
        arms["attend"] = lambda: attend(q, k, v, replace(routed), backend="blocked")
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.set_grad_enabled(backward):
        for turn in range(repeats + 1):
            gc.collect()
            for arm, run in arms.items():
                if device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn or repeats == 0:  # the first warms up
                    times[arm].append(time.perf_counter() - began)

    def share(arm: str) -> float:
        return median(a / d for a, d in zip(times[arm], times["dense"], strict=True)) if arm in times else 0.0

    return {
        "route": name,
        "constants": constants,
        "backward": backward,
        "length": length,
        "pairs": pairs,
        "computed": computed,
        "dense_pairs": dense_pairs,
        "keys": pairs / HEADS / length,
        "seconds": {arm: median(each) for arm, each in times.items()},
        "all_seconds": times,
        "decide_share": share("decide"),
        "attend_share": share("attend"),
        "limit_share": pairs / dense_pairs,
        "operations_share": None if backward else float(HEADS * routed.cost / (2 * HEAD_DIM * dense_pairs)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def table(results: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = [
        "| route | keys a query | deciding | of dense | attention | its limit | limit ÷ time | × faster than dense |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in (r for r in results if not r["backward"]):
        total = 1 / (r["decide_share"] + r["attend_share"])
        limit = r["limit_share"] * r["seconds"]["dense"]
        mark = "" if r["decide_share"] <= SHARE else " ✗"
        lines.append(
            f"| {r['route']}: {r['constants']} | {r['keys']:,.0f} | {milliseconds(r['seconds']['decide'])} | "
            f"{100 * r['decide_share']:.1f} %{mark} | {milliseconds(r['seconds']['attend'])} | {milliseconds(limit)} | "
            f"{100 * r['limit_share'] / r['attend_share']:.0f} % | {total:.2f} |"
        )
    back = [r for r in results if r["backward"]]
    if back:
        lines += ["", "| backward pass | dense | routed | its limit | limit ÷ time |", "|---|---:|---:|---:|---:|"]
    for r in back:
        limit = r["limit_share"] * r["seconds"]["dense"]
        lines.append(
            f"| {r['route']} | {milliseconds(r['seconds']['dense'])} | {milliseconds(r['seconds']['attend'])} | "
            f"{milliseconds(limit)} | {100 * r['limit_share'] / r['attend_share']:.0f} % |"
        )
    lines += ["", *(f"Left out: {name}, which {why}." for name, why in LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="cases with this in their name; the others are kept as they are")
    parser.add_argument("--backward", action="store_true", help="the backward pass in place of the forward one")
    parser.add_argument("--out", type=Path, help="default: results/routes.json, routes-cuda.json on a GPU")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    args = parser.parse_args()
    out = args.out or HERE / "results" / ("routes.json" if args.device == "cpu" else f"routes-{args.device}.json")
    kept = json.loads(out.read_text()) if out.exists() else {"provenance": {}, "results": []}
    if args.show:
        print(table(kept["results"]))
        return
    import torch

    use_threads()
    named = {name: make for name, make in cases(args.length).items() if args.only in name}
    if not named:
        parser.error(f"no case has {args.only!r} in its name; there are {', '.join(cases(args.length))}")
    for name, make in named.items():
        found = measure(name, make, args.length, args.repeats, args.backward, args.device)
        print(table([found]), flush=True)
        kept["results"] = [r for r in kept["results"] if (r["route"], r["backward"]) != (name, args.backward)] + [found]
    order = list(cases(args.length))
    kept["results"].sort(key=lambda r: (r["backward"], order.index(r["route"])))
    kept["provenance"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "last command": " ".join(["python", "benchmarks/routes.py", *sys.argv[1:]]),
        "seed": 0,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
