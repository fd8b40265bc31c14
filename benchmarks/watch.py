"""What does watching cost? Plain forward, regard.watch and eager attention with matrices, side by side in one run.

    python benchmarks/watch.py                        # the table of docs/performance.md
    python benchmarks/watch.py --lengths 1024 --repeats 1
    python benchmarks/watch.py --show                 # the table once more, from what is kept

Every arm lives in a process of its own, so that its peak memory is its own; the processes take turns, one repeat
each, so that a busy moment of the machine meets all arms alike. Times are medians, ratios are medians of the ratios
of neighbouring repeats. The eager arm computes the same figures from the matrices that `output_attentions=True`
returns, one layer at a time, but for relations between tokens, in whose place it sums the squares of the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import cpu, use_threads

VOCAB, HEAD_DIM = 32_000, 64


@dataclass(frozen=True)
class Case:
    """One question: a model of this shape and dtype on a text of this length, and the arms that answer it."""

    length: int
    layers: int
    dtype: str
    device: str
    arms: tuple[str, ...]
    heads: int = 12
    kv_heads: int = 12
    mlp: int = 2048

    @property
    def name(self) -> str:
        heads = f"{self.heads} heads" + (f" ({self.kv_heads} for keys)" if self.kv_heads != self.heads else "")
        return f"{self.length:,} tokens, {self.layers} layers, {heads}, {self.dtype}, {self.device}"


def peak_bytes(device: str) -> int:
    """The most memory this process has held since it started (CPU) or since the last reset (CUDA)."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def build(case: Case, attention: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=case.heads * HEAD_DIM,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=max(case.length, 2048),
        attn_implementation=attention,
    )
    # At one layer the logits would be most of the memory: the question there is the attention.
    cls = LlamaModel if case.layers == 1 else LlamaForCausalLM
    return cls(config).to(device=case.device, dtype=getattr(torch, case.dtype)).eval()


def from_matrices(matrices: Any, light: bool = False) -> dict[str, Any]:
    """The figures of the default statistics, from the weights themselves."""
    import torch

    rows: dict[str, list] = {}

    def put(name: str, value: Any) -> None:
        rows.setdefault(name, []).append(value)

    for weights in matrices:
        p = weights[0].float()
        heads, length, _ = p.shape
        i = torch.arange(length, device=p.device)
        entropy = torch.special.entr(p).sum(-1)
        put("entropy", entropy.sum(-1))
        put("entropy_norm", (entropy[:, 1:] / torch.log(i[1:] + 1.0)).sum(-1))
        distance = i - p @ i.float()
        put("distance", distance.sum(-1))
        put("distance_norm", (distance / i.clamp(min=1)).sum(-1))
        put("first", p[:, 1:, 0].sum(-1))
        received = p.sum(1) / (length - i)
        put("received", received)
        if light:
            continue
        centred = received - received.mean(-1, keepdim=True)
        put("received_kurtosis", (centred**4).mean(-1) / (centred**2).mean(-1) ** 2 - 3)
        profile = torch.stack([p.diagonal(-o, dim1=1, dim2=2).sum(-1) for o in range(length)], -1)
        put("near", profile[:, :256])
        widths = 2 ** torch.arange(length.bit_length())
        put("window", profile.cumsum(-1)[:, widths.clamp(max=length) - 1])
        put("stripe", torch.stack([p[:, 0::2].sum(1), p[:, 1::2].sum(1)], 1))
        cell = -(-length // 32)
        pad = torch.nn.functional.pad(p, (0, 32 * cell - length, 0, 32 * cell - length))
        put("blocks", pad.view(heads, 32, cell, 32, cell).sum((2, 4)))
        for part in (16, 8, 4):
            far = [p[:, length // part - 4 + j :, j].sum(-1) for j in range(4)]
            put("template", profile[:, : length // part - 4].sum(-1) + torch.stack(far).sum(0))
        top, where = p.max(-1)
        put("top1", top.sum(-1))
        put("top1_offset", (i - where).float().mean(-1))
        put("sq", (p * p).sum((1, 2)))
    return {name: torch.stack(values) for name, values in rows.items()}


def work(case: Case, arm: str) -> None:
    """The life of one arm: build the model, then run once for each line read, and print what it took."""
    import torch

    use_threads()
    import regard

    model = build(case, "eager" if arm == "eager" else "sdpa")
    tokens = torch.randint(0, VOCAB, (1, case.length), generator=torch.Generator().manual_seed(1)).to(case.device)

    def run() -> None:
        if arm == "plain":
            model(input_ids=tokens, use_cache=False)
        elif arm == "eager":
            out = model(input_ids=tokens, use_cache=False, output_attentions=True)
            from_matrices(out.attentions)
        else:
            with regard.watch(model, statistics=arm.removeprefix("watch-")) as w:
                model(input_ids=tokens, use_cache=False)
            w.atlas  # noqa: B018  the atlas is part of the price

    with torch.inference_mode():
        for _ in sys.stdin:
            if case.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            if case.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            gc.collect()
            print(json.dumps({"seconds": seconds, "peak": peak_bytes(case.device)}), flush=True)


def attention_call(case: Case, repeats: int) -> float:
    """Seconds of one layer's causal SDPA call: the unit of the floors."""
    code = f"""
import sys, time, torch
sys.path.append({str(Path(__file__).parent)!r})
from machine import use_threads
use_threads()
q, k, v = torch.randn(3, 1, {case.heads}, {case.length}, {HEAD_DIM}, device={case.device!r}).to(torch.{case.dtype})
f = torch.nn.functional.scaled_dot_product_attention
sync = torch.cuda.synchronize if {case.device!r} == "cuda" else (lambda: None)
times = []
with torch.inference_mode():
    for _ in range({repeats} + 1):
        sync(); t = time.perf_counter(); f(q, k, v, is_causal=True); sync(); times.append(time.perf_counter() - t)
print(sorted(times[1:])[len(times[1:]) // 2])
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def ask(worker: subprocess.Popen[str]) -> dict[str, Any] | None:
    """One run of a worker; None if it died of it."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write("\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        return None


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """All arms of one case, taking turns."""
    workers = {}
    for arm in case.arms:
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(case)), "--arm", arm]
        workers[arm] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    times: dict[str, list[float]] = {arm: [] for arm in case.arms}
    peaks: dict[str, int] = {}
    warm_up = case.device == "cuda" or case.length < 16384  # a run of minutes needs none
    for turn in range(repeats + warm_up):
        for arm, worker in list(workers.items()):
            answer = ask(worker)
            if answer is None:  # out of memory, most likely: that is a result too
                print(f"{arm} died at {case.name}", file=sys.stderr)
                del workers[arm]
                continue
            peaks[arm] = answer["peak"]
            if turn >= warm_up:
                times[arm].append(answer["seconds"])
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    if "plain" not in workers:
        raise SystemExit(f"the plain forward did not survive {case.name}: nothing to compare with")
    call = attention_call(case, repeats)
    base = times["plain"]
    return {
        "case": asdict(case),
        "attention_call_seconds": call,
        "arms": {
            arm: {
                "seconds": median(times[arm]),
                "time_ratio": median(a / b for a, b in zip(times[arm], base, strict=True)),
                "peak_bytes": peaks[arm],
                "memory_ratio": peaks[arm] / peaks["plain"],
                "added_attention_calls": (median(times[arm]) - median(base)) / (call * case.layers),
                "all_seconds": times[arm],
            }
            if arm in workers
            else None
            for arm in case.arms
        },
    }


# Attention-sized products beyond the model's own two (a call is two: q k^T and P v). "light" and "default" need the
# scores once more and the product P K of the entropy: one call. Column sums and offsets are passes over the tile.
FLOOR_CALLS = {"plain": 0.0, "watch-light": 1.0, "watch-default": 1.0, "watch-full": 1.0}


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        case = Case(**{**result["case"], "arms": tuple(result["case"]["arms"])})
        call = result["attention_call_seconds"]
        plain = result["arms"]["plain"]["seconds"]
        lines += [
            f"### {case.name}",
            "",
            f"One layer's attention call takes {call:.3f} s.",
            "",
            "| arm | time | × plain | attention calls added per layer | floor × plain | peak memory | × plain |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for arm, r in result["arms"].items():
            if r is None:
                lines.append(f"| {arm} | died | - | - | - | - | - |")
                continue
            floor = f"{(plain + FLOOR_CALLS[arm] * call * case.layers) / plain:.2f}" if arm in FLOOR_CALLS else "-"
            lines.append(
                f"| {arm} | {r['seconds']:.2f} s | {r['time_ratio']:.2f} | {r['added_attention_calls']:.2f} | {floor} |"
                f" {r['peak_bytes'] / 2**30:.2f} GiB | {r['memory_ratio']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def cases(args: argparse.Namespace) -> list[Case]:
    watch = ("plain", "watch-light", "watch-default")
    if args.lengths:
        arms = (*watch, "eager") if args.eager else watch
        return [Case(n, args.layers, args.dtype, args.device, arms) for n in args.lengths]
    if args.device == "cuda":
        # The shape of a Llama of one billion parameters.
        arms = (*watch, "eager")
        return [Case(n, 16, "bfloat16", "cuda", arms, 32, 8, 8192) for n in (8192, 32768, 131072)]
    return [
        Case(4096, 12, "float32", "cpu", (*watch, "watch-full", "eager")),
        Case(4096, 12, "bfloat16", "cpu", watch),
        Case(16384, 12, "float32", "cpu", watch),
        Case(16384, 1, "float32", "cpu", ("plain", "watch-default")),
        Case(65536, 1, "float32", "cpu", ("plain", "watch-default")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", help="only these lengths")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="with --lengths: the eager arm too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "watch.json")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        raw = json.loads(args.worker)
        work(Case(**{**raw, "arms": tuple(raw["arms"])}), args.arm)
        return
    if args.show:
        print(table(json.loads(args.out.read_text())["results"]))
        return
    results = []
    for case in cases(args):
        # A long case is its own average: one counted repeat of minutes says as much as three of seconds.
        results.append(measure(case, 1 if case.length >= 16384 and case.device == "cpu" else args.repeats))
        print(table(results[-1:]), flush=True)
    import torch
    import transformers

    provenance = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": int(os.environ.get("REGARD_BENCH_THREADS", "2")),
        "command": " ".join(["python", "benchmarks/watch.py", *sys.argv[1:]]),
        "seed": 0,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1) + "\n")
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
