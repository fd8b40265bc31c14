"""Do head roles agree with causes? What a task costs without the heads that a role names, and without as many others.

    python benchmarks/roles.py           # measures, and keeps benchmarks/results/roles.json
    python benchmarks/roles.py --show    # prints the table of docs/performance.md from what is kept

For every seed: induction heads are named on random segments that repeat and retrieval heads on needles (`probe`), then
other prompts are answered without the named heads, and without as many drawn at random from those that the role does
not name. The cost is what the loss of the answers rises by, in nats a token. The ratio is the mean cost over the mean
of the draws; its 95% interval resamples seeds, then prompts.
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

HERE = Path(__file__).parent
CASES = {"induction": "repeated", "retrieval": "needle"}
KINDS = ("zero", "uniform", "mean", "resample")
LEAST = 5.0


def named(loaded: Any, probes: int, length: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """The heads of each role, whether or not it is their first one."""
    import regard
    from regard.tasks.probes import probe

    found = {}
    for role, atlas in probe(loaded, n=probes, length=length, seed=seed).items():
        table = regard.roles(atlas).evidence.values()
        found[role] = [(e["layer_index"], e["head"]) for e in table if e["roles"][role]["holds"]]
    return found


def measure(model: str, seeds: int, prompts: int, length: int, draws: int) -> list[dict[str, Any]]:
    """One entry a role, kind of removal and seed."""
    import regard
    from regard.steer.causal import heads_of
    from regard.studies import evidence
    from regard.tasks.heads import remove_heads

    loaded = regard.load(model)
    heads = heads_of(regard.anatomy(loaded.model))
    results = []
    for seed in range(seeds):
        for role, chosen in named(loaded, 8, length, seed).items():
            others = [head for head in heads if head not in chosen]
            random = evidence.random_equal(others, len(chosen), draws=draws, seed=seed)
            for kind in KINDS:
                cost = remove_heads(
                    loaded,
                    CASES[role],
                    [chosen, *random],
                    kind=kind,
                    prompts=prompts,
                    length=length,
                    seed=1000 + seed,
                    chunk=2,
                )
                found = {"role": role, "task": CASES[role], "kind": kind, "seed": seed, "heads": chosen}
                found |= {"random": random, "length": length, "of": len(heads), "plain": float(cost["plain"].mean())}
                results.append(found | {"cost": [[round(x, 6) for x in row] for row in cost.values.tolist()]})
    return results


def ratio(costs: Any, generator: Any = None) -> float:
    """Mean cost of the named heads over that of the draws; costs [seed][set, prompt]."""
    import numpy as np

    ours, others = [], []
    for cost in costs:
        rows = slice(None) if generator is None else generator.integers(cost.shape[1], size=cost.shape[1])
        ours.append(cost[0, rows].mean())
        others.append(cost[1:, rows].mean())
    return float(np.mean(ours) / np.mean(others))


def interval(costs: list[Any], resamples: int = 2000) -> tuple[float, float]:
    import numpy as np

    generator = np.random.default_rng(0)
    drawn = [
        ratio([costs[i] for i in generator.integers(len(costs), size=len(costs))], generator) for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def table(results: list[dict[str, Any]]) -> str:
    import numpy as np

    lines = [
        "| role | heads named | task | taken out as | loss | rises by | as many random ones, mean | median draw | "
        "ratio of means, 95 % | by seed |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for role, task in CASES.items():
        for kind in KINDS:
            some = [r for r in results if (r["role"], r["kind"]) == (role, kind)]
            if not some:
                continue
            costs = [np.array(r["cost"]) for r in some]
            sizes = sorted({len(r["heads"]) for r in some})
            low, high = interval(costs)
            mark = "" if low >= LEAST else " ✗"
            lines.append(
                f"| {role} | {'-'.join(str(n) for n in sizes)} of {some[0]['of']} | {task} | {kind} | "
                f"{np.mean([r['plain'] for r in some]):.3f} | {np.mean([c[0].mean() for c in costs]):.3f} | "
                f"{np.mean([c[1:].mean() for c in costs]):.3f} | "
                f"{np.median([c[1:].mean(1) for c in costs]):.3f} | "
                f"{ratio(costs):.1f} ({low:.1f} to {high:.1f}){mark} | "
                f"{', '.join(f'{ratio([c]):.1f}' for c in costs)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:decoder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "roles.json")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.out.read_text())["results"]))
        return
    import torch

    began = time.perf_counter()
    results = measure(args.model, args.seeds, args.prompts, args.length, args.draws)
    print(table(results))
    kept = {
        "provenance": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": " ".join(["python", "benchmarks/roles.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began, 1),
        },
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(kept, indent=None, separators=(",", ":")).replace('{"role"', '\n{"role"') + "\n")
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
