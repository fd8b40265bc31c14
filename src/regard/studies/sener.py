"""Long text extraction with arrow attention and attention among spans in a plus (SENER, arXiv 2502.07286).

The encoder sees a window and one global token, whose scores grow with the log of the length; candidate spans are a band
of cells (start, end) that attend along their row and their column. The trained half extracts marked spans
(`regard.tasks.spans`) with and without the plus attention; the rest of both heads is the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "sener"
MODEL = None
FULL_ONLY = "only the full size trains span extractors (minutes on a GPU)"
CLAIMS = [
    Claim(
        "arrow",
        "arrow attention is a window, a column and a row: its pairs are those of the definition",
        kind="instrument",
        ours="pairs of 600 tokens, window 128, that differ",
        holds_if="none",
    ),
    Claim(
        "plus",
        "attention in a plus on a band equals attention along rows and columns of the whole square",
        kind="instrument",
        ours="largest difference over both ways of joining, float64",
        holds_if="at most 1e-12",
    ),
    Claim(
        "candidates",
        "a band holds far fewer candidate spans than all pairs",
        kind="mechanism",
        paper="less memory (no figure in the abstract)",
        ours="all pairs over the cells of the band, 2048 tokens, width 128 (times)",
        holds_if="at least 4",
    ),
    Claim(
        "logn",
        "with LogN a key that stands out by log 512 keeps its weight at any length, without it the weight falls away",
        kind="mechanism",
        ours="weight of the key at 8192 tokens without LogN",
        holds_if="at most 0.06, and 1/(1+(n-1)/n) with LogN at every n in 128..8192, to 1e-12",
    ),
    Claim(
        "memory",
        "training on a band keeps far less in memory than on all pairs",
        kind="mechanism",
        paper="less memory (no figure in the abstract)",
        ours="bytes kept for the backward pass by two layers, band over all pairs, width a sixteenth of the length",
        holds_if="at most 0.3",
    ),
    Claim(
        "f1",
        "plus attention among candidate spans lifts span extraction",
        kind="mechanism",
        paper="state of the art on three long NER sets",
        ours="points of span F1, with plus attention less without",
        holds_if="at least 2",
    ),
    Claim(
        "long-ner",
        "state of the art on Scholar-XL, SciREX and Profiling-07",
        kind="replication",
        paper="state of the art on three long NER sets",
        ours="span F1",
        holds_if="at the paper's figures or above",
        waits="needs the weights of DeBERTa-v3 and the three data sets, which are not here",
    ),
]
WIDTH, BASE = 128, 512
SQUARES = {"smoke": 128, "full": 512}  # length of the memory claim
# The trained half: length of the training texts, lengths of the tests, width, batch, steps, seeds.
TRAINED = (256, (256, 1024, 2048), 128, 4, 1500, 5)
LR, WARMUP, TESTS = 1e-3, 50, 24


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """The exact half; the full size trains span extractors too."""
    findings = [_arrow(), _plus(seed), _candidates(), _logn(), _memory(SQUARES[size], device, seed)]
    if size == "full":
        return [*findings, _f1(device, seed)]
    return [*findings, Finding("f1", "not measured", reason=FULL_ONLY)]


def _arrow() -> Finding:
    import torch

    from regard.patterns import Arrow, Queries, Sinks, Window

    n, at = 600, torch.arange(600)
    definition = ((at[:, None] - at).abs() <= WIDTH) | (at == 0) | (at[:, None] == 0)
    composed = Window(WIDTH, WIDTH) | Sinks(1) | Queries(((0, 1),))
    wrong = 0
    for pattern in (Arrow(WIDTH), composed):
        wrong += int((pattern.allows(at[:, None], at[None]) != definition).sum())
        wrong += int((pattern.row_counts(n, n) != definition.sum(1)).sum())
    reason = f"density {Arrow(WIDTH).density(2048, 2048):.3f} at 2048 tokens"
    return Finding("arrow", verdict(not wrong), float(wrong), floor=0.0, reason=reason)


def square(layer: Any, x: Any, width: int) -> Any:
    """The layer's two attentions on the whole square ``[batch, n, n, dim]``, by masks: what the band must equal."""
    import torch

    at = torch.arange(x.shape[1], device=x.device)
    near = (at[:, None] - at).abs() <= width

    def along(cells: Any, project: Any) -> Any:  # along the last axis but one: positions are its tokens
        q, k, v = project(cells).chunk(3, -1)
        q, k = layer.rope.rotate(q, k, at, at)
        scores = (q @ k.mT / layer.dim**0.5).masked_fill(~near[:, None], -torch.inf)
        return scores.softmax(-1) @ v

    rows, columns = along(x, layer.row_qkv), along(x.transpose(1, 2), layer.column_qkv)
    columns = columns.transpose(1, 2) if layer.joined == "cell" else columns
    return layer.merge(torch.cat([rows, columns], -1)) * near[..., None]


def _plus(seed: int) -> Finding:
    import torch

    from regard.layers.band import PlusAttention, from_band, to_band

    worst = 0.0
    x = torch.randn(1, 23, 23, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for joined in ("cell", "mirror"):
            layer = PlusAttention(8, joined=joined).double()
            for width in (0, 5, 22):
                found = from_band(layer(to_band(x, width)))
                worst = max(worst, float((found - square(layer, x, width)).abs().max()))
    return Finding("plus", verdict(worst <= 1e-12), worst, floor=0.0)


def _candidates() -> Finding:
    from regard.layers.band import band_valid

    n = 2048
    cells, there = n * (2 * WIDTH + 1), int(band_valid(n, WIDTH).sum())
    reason = f"{cells} cells of {n * n} pairs; {there} of the cells are pairs of tokens, the others beside the square"
    return Finding("candidates", verdict(n * n / cells >= 4), n * n / cells, baseline=1.0, reason=reason)


def _logn() -> Finding:
    import torch

    from regard.layers.logn import logn_scale

    away, plain = 0.0, 0.0
    for n in (2**k for k in range(7, 14)):
        scores = torch.zeros(n, dtype=torch.float64)
        scores[0] = math.log(BASE)
        factor = logn_scale(n, BASE, queries=[(0, 1)], dtype=torch.float64)[0]
        kept = float((scores * factor).softmax(0)[0])
        away = max(away, abs(kept - 1 / (1 + (n - 1) / n)))
        plain = float(scores.softmax(0)[0])
    reason = f"with LogN {kept:.4f} at 8192 tokens, off the formula by at most {away:.1e}"
    return Finding(
        "logn", verdict(plain <= 0.06 and away <= 1e-12), plain, floor=1 / 8192, baseline=kept, reason=reason
    )


def kept_bytes(run: Any) -> int:
    """Bytes that autograd keeps for the backward pass of ``run()``, each storage once; weights are not counted."""
    import torch

    seen: dict[int, tuple[int, Any]] = {}

    def pack(x: Any) -> Any:
        if not x.is_leaf:
            seen[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(size for size, _ in seen.values())


def _memory(n: int, device: str, seed: int) -> Finding:
    """Two span layers on the band and on the whole square, which attends along whole rows and columns."""
    import torch

    from regard.layers.band import band_valid
    from regard.models.spans import SpanLayer

    dim, width = 32, n // 16
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [SpanLayer(dim).to(device) for _ in range(2)]
    generator = torch.Generator().manual_seed(seed)

    def whole(layer: Any, x: Any) -> Any:  # the same attentions, along all n cells of a row and of a column
        every = torch.ones(1, *x.shape[1:3], dtype=torch.bool, device=device)
        rows = layer._along(x, layer.row_qkv, every)
        columns = layer._along(x.transpose(1, 2), layer.column_qkv, every).transpose(1, 2)
        return layer.merge(torch.cat([rows, columns], -1))

    kept = {}
    for name, cells in (("band", 2 * width + 1), ("all pairs", n)):
        x = torch.randn(1, n, cells, dim, generator=generator).to(device).requires_grad_()
        valid = band_valid(n, width, device=device) if name == "band" else torch.ones_like(x[..., 0], dtype=torch.bool)
        attend = None if name == "band" else whole

        def forward(x: Any = x, valid: Any = valid, attend: Any = attend) -> None:
            for layer in layers:
                x = layer(x, valid, attend)

        kept[name] = kept_bytes(forward)
    ratio = kept["band"] / kept["all pairs"]
    reason = f"{n} tokens, width {width}: " + ", ".join(f"{name} {x / 2**20:.1f} MiB" for name, x in kept.items())
    return Finding("memory", verdict(ratio <= 0.3), ratio, baseline=1.0, floor=(2 * width + 1) / n, reason=reason)


def _f1(device: str, seed: int) -> Finding:
    """Train both heads with every seed; spans of all test lengths count together."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from regard.layers.band import band_valid, to_band
    from regard.models.spans import SpanExtractor
    from regard.tasks.spans import MarkedSpans, span_f1
    from regard.train.simple import fit

    short, lengths, width, batch, steps, seeds = TRAINED
    task = MarkedSpans(short, longest=min(100, short - 1))
    valid = band_valid(short, width)[..., None]

    def draw(generator: Any) -> tuple[Any, Any]:
        drawn = task.batch(batch, generator)
        return drawn.ids.to(device), to_band(task.labels(drawn.spans), width).float().to(device)

    def loss(model: Any, drawn: Any) -> Any:  # summed over cells, a text at a time
        each = binary_cross_entropy_with_logits(model(drawn[0]), drawn[1], reduction="none")
        return (each * valid.to(device)).sum() / len(drawn[0])

    scores: dict[str, list[list[float]]] = {}
    sizes = {}
    naive: dict[int, float] = {}
    for arm in ("plus", "without"):
        scores[arm] = []
        for s in range(seed, seed + seeds):
            with torch.random.fork_rng():
                torch.manual_seed(s)
                model = SpanExtractor(task.vocab, task.types, width, plus=arm == "plus", base=BASE).to(device)
            sizes[arm] = sum(p.numel() for p in model.parameters())
            fit(model, loss, draw, steps, LR, s, warmup=min(WARMUP, steps))
            each = []
            for length in lengths:
                test = MarkedSpans(length, longest=task.longest)
                drawn = test.batch(TESTS, torch.Generator().manual_seed(1_000_000_007 + s))
                found = [one for ids in drawn.ids.split(1) for one in model.extract(ids.to(device))]
                each.append(100 * span_f1(found, drawn.spans)[0])
                naive[length] = 100 * span_f1([test.naive(ids) for ids in drawn.ids], drawn.spans)[0]
            scores[arm].append(each)
    arrays = {arm: np.array(x) for arm, x in scores.items()}
    gain = (arrays["plus"] - arrays["without"]).mean(1)
    means = {arm: x.mean(0).tolist() for arm, x in arrays.items()}
    details = {"f1": scores, "lengths": list(lengths), "parameters": sizes, "naive": naive}
    if max(x.mean() for x in arrays.values()) < 2:
        return Finding("f1", "not measured", reason=f"not learned: F1 {means} after {steps} steps", details=details)
    shown = "; ".join(f"{arm} " + ", ".join(f"{x:.1f}" for x in m) for arm, m in means.items())
    return Finding(
        "f1",
        verdict(gain.mean() >= 2),
        float(gain.mean()),
        evidence.bootstrap(gain),
        floor=0.0,
        ceiling=100 - float(arrays["without"].mean()),
        baseline=float(arrays["without"].mean()),
        reason=(
            f"F1 at {', '.join(map(str, lengths))} tokens, trained at {short}, {steps} steps: {shown}; "
            f"parameters {sizes['plus']} and {sizes['without']}"
        ),
        details=details,
    )
