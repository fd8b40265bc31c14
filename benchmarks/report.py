"""How large is the report, and how long does it take? One page of a random 12 x 12-head model at 4,096 tokens.

    python benchmarks/report.py
    python benchmarks/report.py --length 1024 --std 0.05

Random weights are the hard case for size: nothing in their maps repeats. `--std` is the scale of the weights; larger
ones make the attention more uneven.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--std", type=float, default=0.02)
    args = parser.parse_args()

    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from regard.report.build import build_report

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=64 * args.heads,
        intermediate_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
        initializer_range=args.std,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 32_000, (1, args.length))}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        start = time.perf_counter()
        model(**inputs, use_cache=False)
        plain = time.perf_counter() - start
        start = time.perf_counter()
        page = build_report(model, None, inputs=inputs, out=Path(folder) / "report.html")
        seconds = time.perf_counter() - start
    print(
        f"{args.layers} x {args.heads} heads, {args.length:,} tokens, std {args.std}: {page.size / 1e6:.2f} MB, "
        f"{seconds:.1f} s ({seconds / plain:.1f} plain forwards of {plain:.1f} s)"
    )


if __name__ == "__main__":
    main()
