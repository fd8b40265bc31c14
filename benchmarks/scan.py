"""What does a causal scan cost? Every head of a 12 x 12-head model taken out in turn, beside the same with hooks.

    python benchmarks/scan.py                       # the table of docs/performance.md
    python benchmarks/scan.py --prompts 8
    python benchmarks/scan.py --layers 0-2          # a part, kept beside the others in --out
    python benchmarks/scan.py --show                # the table once more, from what is kept

The model is GPT-2 small with random weights and a vocabulary of 1,024, in float32. Its measure is the mean loss of
every prompt. TransformerLens and nnsight, where they are installed, take some heads of every layer out, in the same
pieces of the batch. All take turns: after the heads of a layer come a plain forward pass and the peers, so that a busy
moment of the machine meets all alike.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from machine import cpu, use_threads

LAYERS = HEADS = 12
VOCAB, SEED = 1024, 0


def build(length: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(vocab_size=VOCAB, n_positions=length, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


class Peer:
    """A library that takes one head out of the model by hooks, for some prompts."""

    def __init__(self, package: str, logits: Callable[[Any, int, int], Any]) -> None:
        self.name = f"{package} {importlib.metadata.version(package)}"
        self.logits = logits


def nnsight(model: Any) -> Peer:
    from nnsight import NNsight

    wrapped = NNsight(model)
    width = model.config.n_embd // HEADS

    def logits(ids: Any, layer: int, head: int) -> Any:
        with wrapped.trace(input_ids=ids, use_cache=False):
            wrapped.transformer.h[layer].attn.c_proj.input[:, :, head * width : (head + 1) * width] = 0
            out = wrapped.lm_head.output.save()
        return out

    return Peer("nnsight", logits)


def transformer_lens(model: Any) -> Peer:
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="1")
    # A copy: it sets the model it is given to eager attention.
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
    )

    def logits(ids: Any, layer: int, head: int) -> Any:
        def hook(z: Any, hook: Any) -> Any:
            z[:, :, head] = 0
            return z

        return bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])

    return Peer("transformer-lens", logits)


def installed(model: Any) -> list[Peer]:
    peers = []
    for make in (nnsight, transformer_lens):
        try:
            peers.append(make(model))
        except ImportError as error:
            print(f"left out: {make.__name__} ({error})", file=sys.stderr)
    return peers


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


class Turns:
    """A metric that a scan calls after every head: each head's seconds, and the others' turns in between, uncounted."""

    def __init__(self, metric: Callable[[Any], Any], between: Callable[[int], None]) -> None:
        self.metric, self.between = metric, between
        self.seconds: list[float] = []
        self.began = time.perf_counter()

    def __call__(self, logits: Any) -> Any:
        value = self.metric(logits)
        self.seconds.append(time.perf_counter() - self.began)
        self.between(len(self.seconds) - 1)  # heads done; the first call is that of the whole model
        self.began = time.perf_counter()
        return value


def measure(prompts: int, length: int, layers: range, theirs: int) -> dict[str, Any]:
    """One scan of the heads of some layers; after each layer a plain forward pass, and some of its heads by peers."""
    import torch

    from regard.steer.causal import head_ablation
    from regard.watch.effects import loss
    from regard.watch.pieces import CPU_TOKENS

    model = build(length)
    ids = torch.randint(VOCAB, (prompts, length), generator=torch.Generator().manual_seed(1))
    rows = max(1, CPU_TOKENS // length)
    metric = loss(ids)
    peers = installed(model)
    forwards: list[float] = []
    took: dict[str, list[list[float]]] = {peer.name: [] for peer in peers}
    values: dict[tuple[str, int, int], Any] = {}

    def in_pieces(logits: Callable[[Any], Any]) -> Any:
        return metric(torch.cat([logits(piece) for piece in ids.split(rows)]))

    def forward() -> Any:
        return in_pieces(lambda piece: model(input_ids=piece, use_cache=False).logits)

    def between(done: int) -> None:
        if done % HEADS:
            return
        forwards.append(timed(forward)[0])
        layer = layers.start + done // HEADS - 1
        for peer in peers if done else ():
            took[peer.name].append([])
            for head in range(0, HEADS, HEADS // theirs):
                seconds, value = timed(lambda: in_pieces(lambda x: peer.logits(x, layer, head)))  # noqa: B023
                took[peer.name][-1].append(seconds)
                values[peer.name, layer, head] = value
        print(f"{done} of {len(layers) * HEADS} heads", file=sys.stderr, flush=True)

    with torch.no_grad():
        model(input_ids=ids[:rows])  # the first run of a process costs more, of a peer too
        for peer in peers:
            peer.logits(ids[:rows], 0, 0)
        turns = Turns(metric, between)
        heads = [(layer, head) for layer in layers for head in range(HEADS)]
        table = head_ablation(model, {"input_ids": ids, "use_cache": False}, turns, heads=heads, chunk=1)
    ours = table.values + table.plain.values
    apart = {
        peer.name: max(
            float(abs(ours[layer, head] - value.numpy()).max())
            for (name, layer, head), value in values.items()
            if name == peer.name
        )
        for peer in peers
    }
    return {
        "layers": list(layers),
        "rows": rows,
        "plain": turns.seconds[0],
        "heads": turns.seconds[1:],
        "forwards": forwards,
        "peers": took,
        "largest_difference": apart,
        "largest_effect": float(abs(table).max()),
    }


def page(kept: dict[str, Any]) -> str:
    """Every layer's seconds stand beside the mean of the two forward passes around them."""
    parts = sorted(kept["parts"], key=lambda part: part["layers"])
    around = {
        layer: (a + b) / 2
        for part in parts
        for layer, (a, b) in zip(part["layers"], pairwise(part["forwards"]), strict=True)
    }
    forward, count, rows = median(around.values()), HEADS * len(around), parts[0]["rows"]
    passes = HEADS * sum(around.values())
    floor = HEADS * sum(f * (LAYERS - layer) / LAYERS for layer, f in around.items())
    ours = sum(part["plain"] + sum(part["heads"]) for part in parts)
    together = "" if rows >= kept["prompts"] else f", {rows} at a time,"
    lines = [
        f"### {kept['prompts']} prompts of {kept['length']} tokens, {count} heads taken out in turn",
        "",
        f"One forward pass of all prompts{together} takes {forward:.2f} s; {count} passes {passes:.0f} s, and without "
        f"the blocks before the head that is taken out {floor:.0f} s.",
        "",
        f"| arm | heads timed | a head | {count} heads | × {count} passes | × the floor | largest difference |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| regard | {count} | {ours / count:.2f} s | {ours:.0f} s | {ours / passes:.2f} | {ours / floor:.2f} | - |",
    ]
    for name in dict.fromkeys(name for part in parts for name in part["peers"]):
        shares, apart = [], 0.0
        for part in parts:
            for layer, some in zip(part["layers"], part["peers"].get(name, []), strict=False):
                shares += [t / around[layer] for t in some]
            apart = max(apart, part["largest_difference"].get(name, 0.0))
        whole = sum(shares) / len(shares) * passes
        lines.append(
            f"| {name} | {len(shares)} | {whole / count:.2f} s | {whole:.0f} s | {whole / passes:.2f} |"
            f" {whole / floor:.2f} | {apart:.1e} |"
        )
    effect = max(part["largest_effect"] for part in parts)
    return "\n".join([*lines, "", f"The largest effect of a head on the loss of a prompt is {effect:.3f} nat."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", default=f"0-{LAYERS - 1}", help="first-last of those whose heads are taken out")
    parser.add_argument("--peer-heads", type=int, default=2, help="heads of each layer that each peer takes out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scan.json")
    parser.add_argument("--show", action="store_true", help="measure nothing; print what is kept in --out")
    args = parser.parse_args()
    if args.show:
        print(page(json.loads(args.out.read_text())))
        return
    import torch

    threads = use_threads()
    first, last = map(int, args.layers.split("-"))
    part = measure(args.prompts, args.length, range(first, last + 1), args.peer_heads)
    size = {"prompts": args.prompts, "length": args.length}
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    if {name: kept.get(name) for name in size} != size:
        kept = {**size, "parts": []}
    kept["parts"] = [p for p in kept["parts"] if not set(p["layers"]) & set(part["layers"])] + [part]
    kept["provenance"] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "cpu": cpu(),
        "threads": threads,
        "command": " ".join(["python", "benchmarks/scan.py", *sys.argv[1:]]),
        "seed": SEED,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(page(kept))
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
