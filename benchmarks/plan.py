"""What a plan gains and costs: searched plans beside dense attention and beside what they must beat, in one run.

    python benchmarks/plan.py                    # the tables of docs/performance.md
    python benchmarks/plan.py --only decoder --tokens 2048 --out /tmp/plan.json
    python benchmarks/plan.py --show             # the tables once more, from what is kept

decoder: the shipped decoder at 8,192 tokens, on held-out text and needles. Beside the searched plan: the widest window
with sinks, one for all heads, that takes no more attention time than the plan; and random blocks at the plan's density.
video: the shipped video transformer, sampled from the same noise dense and planned. Plans are searched by operations,
as in the paper, and by seconds of this machine. Beside them: heads shuffled inside each layer, and one shape for all
heads at no lower cost.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import cpu, use_threads

HERE = Path(__file__).parent
SEED = 0
BLOCK, WIDTHS = 64, (32, 16, 8, 4, 3, 2)
"""Of the video model's shapes: rounded up to blocks of so many tokens, so that time follows the operations."""
PAPER = {"2.09": 24.13, "2.38": 27.09, "1.67": 22.59}
"""Operations of Sparse-vDiT (arXiv 2506.03065), times fewer, and its PSNR in dB."""


def decoder(tokens: int, texts: int, needles: int) -> dict[str, Any]:
    """The decoder's arms, each measured on the same held-out sequences."""
    import torch

    import regard
    from regard.patterns import Sinks, Window
    from regard.plan.baselines import random_plan, single
    from regard.plan.measure import measure
    from regard.tasks import planning

    loaded = regard.load("testbed:decoder")
    material = planning.Material()
    material.add("text", *planning.windows(loaded, planning.library_text(), tokens, 3, texts))
    material.add("needles", *planning.needles(loaded, tokens, 3, needles, SEED))
    kinds, others = material.calibration_kinds, material.held_out_kinds
    plan = regard.plan(loaded.model, material.calibration, groups=kinds, loss=0.008)
    arms = {"searched plan": measure(loaded.model, plan, material.held_out, groups=others)}
    limit = arms["searched plan"]["attention_seconds"]["planned"]
    width, step = 0, tokens // 64
    low, high = 1, 63
    while low <= high:  # the widest window that is as fast, in steps of a sixty-fourth of the length
        middle = (low + high) // 2
        tried = measure(loaded.model, single(plan, Sinks(4) | Window(middle * step)), material.held_out[:1], repeats=3)
        if tried["attention_seconds"]["planned"] <= limit:
            width, low = middle * step, middle + 1
        else:
            high = middle - 1
    width = width or step
    arms[f"sinks + window {width}, all heads"] = measure(
        loaded.model, single(plan, Sinks(4) | Window(width)), material.held_out, groups=others
    )
    generator = torch.Generator().manual_seed(SEED)
    arms["random blocks at its density"] = measure(
        loaded.model, random_plan(plan, generator), material.held_out, groups=others
    )
    return {
        "tokens": tokens,
        "plan": str(plan),
        "options": plan.counts,
        "predicted": plan.predicted,
        "calibration": plan.calibration,
        "arms": arms,
    }


def video(samples: int, steps: int, budgets: list[float]) -> dict[str, Any]:
    """The video model's arms: PSNR to the dense video, operations and attention time."""
    import torch

    import regard
    from regard.plan.shape_plan import record_shapes
    from regard.tasks import planned_video
    from regard.tasks.video import SHAPE

    model = regard.load("testbed:video").model
    grid = model.config.grid(SHAPE)
    generator = torch.Generator().manual_seed(SEED)

    def noise(n: int) -> torch.Tensor:
        return torch.randn(n, model.config.channels, *SHAPE, generator=generator)

    prompts = planned_video.different_prompts(2 + samples, SEED)
    seen = planned_video.calibration(model, noise(2), prompts[:2], steps=steps)
    found = record_shapes(model, seen[:: max(1, steps // 4)], grid, block=BLOCK, widths=WIDTHS, timed=True)
    held_noise, words = noise(samples), prompts[2:]
    results = []
    for budget in budgets:
        arms = planned_video.rivals(model, found, 1 / budget, grid, seed=SEED)
        outcome = planned_video.compare(model, arms, held_noise, words, steps=steps)
        dense = outcome["dense"]
        results.append(
            {
                "asked": budget,
                "arms": {
                    name: {
                        "psnr": [float(x) for x in one.psnr],
                        "operations": one.operations,
                        "attention_seconds": one.attention_seconds,
                        "seconds": one.seconds,
                        "attention_speedup": dense.attention_seconds / one.attention_seconds
                        if dense.attention_seconds and one.attention_seconds
                        else None,
                    }
                    for name, one in outcome.items()
                },
            }
        )
    return {"grid": list(grid), "samples": samples, "steps": steps, "budgets": results}


# -- tables


def seconds(x: float) -> str:
    return f"{1e3 * x:,.0f} ms" if x < 1 else f"{x:,.2f} s"


def decoder_table(r: dict[str, Any]) -> str:
    c, p = r["calibration"], r["predicted"]
    mine = r["arms"]["searched plan"]
    lines = [
        f"### The decoder at {r['tokens']:,} tokens",
        "",
        f"Planned on {c['sequences']} sequences ({c['passes_per_sequence']:.1f} forward passes each), measured on "
        f"{mine['sequences']} others. {', '.join(f'{n} heads {name}' for name, n in r['options'].items())}.",
        "",
        "| arm | attention | × faster than dense | whole forward | perplexity of text | needles right |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    dense = mine["attention_seconds"]["dense"]
    words = mine["perplexity"]["text"]["dense"]
    right = mine["score"]["needles"]["dense"]
    lines.append(
        f"| dense | {seconds(dense)} | 1.00 | {seconds(mine['forward_seconds']['dense'])} | {words:.4f} | {right:.1%} |"
    )
    for name, m in r["arms"].items():
        both, score = m["perplexity"]["text"], m["score"]["needles"]
        lines.append(
            f"| {name} | {seconds(m['attention_seconds']['planned'])} | {m['attention_speedup']:.2f} | "
            f"{seconds(m['forward_seconds']['planned'])} | {both['planned']:.4f} "
            f"({100 * (both['planned'] / both['dense'] - 1):+.2f} %) | {score['planned']:.1%} |"
        )
    ratio, took = mine["predicted_over_measured"], mine["attention_seconds"]["planned"]
    lines += [
        "",
        f"Predicted attention time {seconds(p['attention_seconds'])}, measured {seconds(took)}"
        + (f": {ratio:.2f} of it" if ratio else "")
        + f". Mass kept, mean over heads, {100 * p['kept_mass']:.1f} %.",
        "",
    ]
    return "\n".join(lines)


def video_table(r: dict[str, Any]) -> str:
    lines = [
        f"### The video transformer, {'×'.join(map(str, r['grid']))} tokens",
        "",
        f"{r['samples']} videos of {r['steps']} steps, each from its dense twin's noise; PSNR is the mean over them.",
        "",
        "| asked | arm | operations, × fewer | attention, × faster | PSNR |",
        "|---|---|---:|---:|---:|",
    ]
    for budget in r["budgets"]:
        for name, arm in budget["arms"].items():
            if name == "dense":
                continue
            psnr = sum(arm["psnr"]) / len(arm["psnr"])
            faster = f"{arm['attention_speedup']:.2f}" if arm["attention_speedup"] else "-"
            fewer = f"{arm['operations']:.2f}" if arm["operations"] else "-"
            lines.append(f"| {budget['asked']:.2f} | {name} | {fewer} | {faster} | {psnr:.1f} dB |")
        paper = PAPER.get(f"{budget['asked']:.2f}")
        if paper:
            lines.append(
                f"| {budget['asked']:.2f} | Sparse-vDiT, its own models | {budget['asked']:.2f} | - | {paper} dB |"
            )
    return "\n".join([*lines, ""])


def page(kept: dict[str, Any]) -> str:
    parts = [decoder_table(kept["decoder"])] if kept.get("decoder") else []
    parts += [video_table(kept["video"])] if kept.get("video") else []
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("decoder", "video"), help="one of them; the other is kept as it is in --out")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=4, help="held-out texts")
    parser.add_argument("--needles", type=int, default=16, help="held-out needles")
    parser.add_argument("--samples", type=int, default=4, help="held-out videos")
    parser.add_argument("--steps", type=int, default=12, help="of a video")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.67, 2.09, 2.38])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plan.json")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.show:
        print(page(kept))
        return
    import torch

    threads = use_threads()
    for name in ("decoder", "video"):
        if args.only not in (None, name):
            continue
        began = time.perf_counter()
        if name == "decoder":
            kept[name] = decoder(args.tokens, args.texts, args.needles)
            print(decoder_table(kept[name]), flush=True)
        else:
            kept[name] = video(args.samples, args.steps, args.budgets)
            print(video_table(kept[name]), flush=True)
        kept[name]["provenance"] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": cpu(),
            "threads": threads,
            "command": " ".join(["python", "benchmarks/plan.py", *sys.argv[1:]]),
            "seconds": time.perf_counter() - began,
            "seed": SEED,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
