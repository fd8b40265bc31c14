"""How long a layout takes and how much memory, beside FlexAttention's `create_block_mask`.

    python benchmarks/pattern_layouts.py                # the table, on one core
    python benchmarks/pattern_layouts.py --tokens 16384

Every figure comes from a process of its own: the median of `--repeats` calls after one, and the growth of the process's
peak memory over all of them. `create_block_mask` evaluates every pair; it runs under a memory limit, so that where it
dies it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from regard import patterns as rp

BLOCK = 128
LIMIT = 8 << 30  # bytes of address space that create_block_mask may take
SECONDS = 120  # that it may take


def documents(n: int) -> rp.Pattern:
    """Causal documents of 1,000 tokens, the last one shorter."""
    return rp.Causal() & rp.Segments.from_bounds([*range(0, n, 1000), n])


PATTERNS: dict[str, Callable[[int], rp.Pattern]] = {
    "window 1,024": lambda n: rp.Window(1023),
    "dilated window": lambda n: rp.Dilated(4, 256),
    "power of two": lambda n: rp.PowerOfTwo(256, 5),
    "radial": lambda n: rp.Radial(n // 4096, 4096),
    "3-D neighborhood": lambda n: rp.Neighborhood((n >> 14, 128, 128), (min(9, n >> 14), 9, 9)),
    "causal documents": documents,
    "union of three": lambda n: rp.Window(1023) | rp.Sinks(128) | rp.PowerOfTwo(256, 5),
    "union with radial": lambda n: rp.Window(1023) | rp.Sinks(128) | rp.Radial(n // 4096, 4096, sink=False),
}


def peak() -> int:
    """Bytes that this process has held at most (what getrusage tells would be the parent's, where that held more)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def ours(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Our layout of one pattern."""
    pattern = PATTERNS[name](tokens)
    rp.Window(3).layout(1024, 1024, BLOCK)  # what the first call of all imports
    before = peak()
    seconds, layout = timed(lambda: pattern.layout(tokens, tokens, BLOCK, 0), repeats)
    return {"ms": 1e3 * seconds, "blocks": layout.n_blocks, "bytes": layout.nbytes, "peak": peak() - before}


def create(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """FlexAttention's, from the same predicate."""
    from torch.nn.attention.flex_attention import create_block_mask

    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    pattern = PATTERNS[name](tokens)
    before = peak()

    def call() -> Any:
        return create_block_mask(lambda b, h, q, k: pattern.allows(q, k), None, None, tokens, tokens, "cpu", BLOCK)

    try:
        seconds, mask = timed(call, repeats)
    except (RuntimeError, MemoryError) as error:
        return {"died": str(error).split("\n")[0][:200]}
    tables = [t for t in mask.as_tuple(flatten=True) if hasattr(t, "element_size")]
    return {"ms": 1e3 * seconds, "bytes": sum(t.numel() * t.element_size() for t in tables), "peak": peak() - before}


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of some calls after the first, and what they return."""
    made, seconds = call(), []
    for _ in range(repeats):
        made = None  # one at a time
        start = time.perf_counter()
        made = call()
        seconds.append(time.perf_counter() - start)
    return median(seconds), made


def apart(arm: str, name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--pattern", name, "--tokens", str(tokens)]
    try:
        done = subprocess.run(
            [*command, "--repeats", str(repeats)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
    except subprocess.TimeoutExpired:
        return {"died": f"not done after {SECONDS} s"}
    if done.returncode:
        return {"died": (done.stderr.strip().split("\n") or ["killed"])[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.split("\n")[-2])
    return result


def layout_arms(
    lengths: Sequence[int] = (16384, 65536, 1048576), repeats: int = 5, names: Sequence[str] = tuple(PATTERNS)
) -> list[dict[str, Any]]:
    """A row for each pattern and length.

    Returns:
        dicts with ``pattern``, ``tokens``, ``blocks``, ``ms`` and ``create_ms`` (None where it died, and ``died`` says
        how), ``bytes`` of our layout, ``peak_ratio`` (growth of peak memory over these bytes) and ``bytes_ratio``
        (create_block_mask's growth of peak memory over ours).
    """
    rows = []
    for tokens in lengths:
        for name in names:
            mine = apart("ours", name, tokens, repeats)
            if "died" in mine:
                raise RuntimeError(f"{name} at {tokens} tokens: {mine['died']}")
            # Past the first length, one pattern is enough to see where it dies.
            theirs = apart("create", name, tokens, 1) if tokens == min(lengths) or name == names[0] else {}
            rows.append(
                {
                    "pattern": name,
                    "tokens": tokens,
                    "blocks": mine["blocks"],
                    "ms": mine["ms"],
                    "create_ms": theirs.get("ms"),
                    "died": theirs.get("died"),
                    "bytes": mine["bytes"],
                    "peak_ratio": mine["peak"] / mine["bytes"],
                    "bytes_ratio": theirs["peak"] / max(mine["peak"], mine["bytes"]) if "peak" in theirs else None,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pattern | tokens | blocks | layout, ms | create_block_mask, ms | layout, MB | peak growth / layout "
        "| its peak / ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        theirs = f"{row['create_ms']:,.0f}" if row["create_ms"] is not None else "died" if row["died"] else ""
        ratio = f"{row['bytes_ratio']:,.0f}" if row["bytes_ratio"] is not None else ""
        lines.append(
            f"| {row['pattern']} | {row['tokens']:,} | {row['blocks']:,} | {row['ms']:.1f} | {theirs} | "
            f"{row['bytes'] / 1e6:.2f} | {row['peak_ratio']:.1f} | {ratio} |"
        )
    died = dict.fromkeys(f"{row['tokens']:,} tokens: {row['died']}" for row in rows if row["died"])
    return "\n".join([*lines, "", *(f"create_block_mask under {LIMIT >> 30} GiB, {x}\n" for x in died)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536, 1048576])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pattern", choices=list(PATTERNS))
    parser.add_argument("--arm", choices=["ours", "create"], help="one arm of one pattern, as JSON")
    args = parser.parse_args()
    if args.arm:
        arm = ours if args.arm == "ours" else create
        print(json.dumps(arm(args.pattern or next(iter(PATTERNS)), args.tokens[0], args.repeats)))
        return
    print(table(layout_arms(args.tokens, args.repeats, [args.pattern] if args.pattern else list(PATTERNS))))


if __name__ == "__main__":
    main()
