"""Dual triangle attention (arXiv 2604.18603): order without positions, from two softmaxes a head.

The probe: which index holds the first of the largest tokens? Tokens are embedded without positions, two or four layers
of one kind of attention follow, and the read-out is a mean over tokens (a read-out at the last token would hand causal
attention the answer's end of the sequence). Every arm has the same parameters, batches and steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "dual-triangle"
MODEL = None
FULL_ONLY = "only the full size trains it (minutes on a CPU core)"
CLAIMS = [
    Claim(
        "halves",
        "half 0 of every head sees no future and half 1 no past, and the layer equals two attentions on the halves",
        kind="instrument",
        ours="largest difference from the two attentions, float64",
        holds_if="at most 1e-12, and the derivative of every forbidden pair is exactly 0",
    ),
    Claim(
        "bidirectional",
        "bidirectional attention without positions cannot tell where a token stands",
        kind="mechanism",
        paper="bidirectional attention cannot learn positions without embeddings",
        ours="accuracy on the position of the first maximum",
        holds_if="at most the exact ceiling of models that see no order, plus 0.01",
    ),
    Claim(
        "dual",
        "dual triangle attention learns positions without embeddings",
        kind="mechanism",
        paper="dual triangle attention learns positions without embeddings",
        ours="accuracy on the position of the first maximum",
        holds_if="at least 0.5",
    ),
    Claim(
        "causal",
        "causal attention learns positions without embeddings",
        kind="mechanism",
        paper="causal attention learns positions without embeddings",
        ours="accuracy on the position of the first maximum",
        holds_if="at least 0.4",
    ),
    Claim(
        "longer",
        "in masked language modelling, dual triangle with rotary positions extends to longer texts best",
        kind="mechanism",
        paper="dual triangle with RoPE extends context best",
        ours="rise of the loss from 128 to 512 bytes, dual triangle less bidirectional, both with RoPE (nats a byte)",
        holds_if="at most 0",
    ),
    Claim(
        "order",
        "in masked language modelling without positions, dual triangle is far ahead of bidirectional attention",
        kind="mechanism",
        paper="effective bidirectional attention without positional embeddings",
        ours="loss of bidirectional less that of dual triangle, neither with positions (nats a byte)",
        holds_if="above 0.1",
    ),
]
# The probe of a size: length, vocabulary, layers, width, heads, steps, seeds; its arms.
PROBE = {"smoke": (16, 32, 2, 48, 4, 300, 1), "full": (128, 128, 4, 64, 4, 1000, 5)}
ARMS = {"smoke": ("bidirectional", "dual", "causal"), "full": ("bidirectional", "dual", "causal", "bidirectional+rope")}
BATCH, LR, WARMUP, TESTS = 64, 3e-3, 20, 4000
# Masked bytes: trained length, tested length, layers, width, heads, batch, steps, seeds; share of bytes masked.
BYTES = (128, 512, 4, 64, 4, 16, 1000, 3)
MASKED = 0.15
BYTE_ARMS = ("dual+rope", "bidirectional+rope", "dual", "bidirectional")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Train the probe under each kind of attention; the full size trains masked language models too."""
    findings = [_halves(seed), *_probe(size, device, seed)]
    if size == "full":
        return findings + _bytes(device, seed)
    return findings + [Finding(claim, "not measured", reason=FULL_ONLY) for claim in ("longer", "order")]


def build(arm: str, vocab: int, outputs: int, layers: int, dim: int, heads: int, seed: int) -> Any:
    """A model of one arm, "bidirectional", "dual" or "causal", with "+rope" where it has positions."""
    import torch

    from regard.layers.dual_triangle import DualTriangleAttention
    from regard.layers.position import Rope
    from regard.models.decoder import Decoder
    from regard.patterns import Causal

    kind, _, positions = arm.partition("+")

    def dual(_: int) -> Any:
        return DualTriangleAttention(dim, heads, Rope(dim // heads // 2) if positions else None)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(
            vocab,
            dim,
            layers,
            heads,
            pattern=Causal() if kind == "causal" else None,
            theta=10_000.0 if positions else None,
            attention=dual if kind == "dual" else None,
            outputs=outputs,
        )


def pooled(model: Any, ids: Any) -> Any:
    """Logits from the mean over tokens."""
    return model.head(model.hidden(ids).mean(1))


def _halves(seed: int) -> Finding:
    import torch

    from regard.layers.dual_triangle import DualTriangleAttention

    dim, heads, length = 24, 3, 9
    half = dim // heads // 2
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = DualTriangleAttention(dim, heads).double()
    x = torch.randn(1, length, dim, generator=generator, dtype=torch.float64)
    q, k, v = (p(x)[0].unflatten(-1, (heads, 2, half)).permute(1, 2, 0, 3) for p in _projections(layer))
    later = torch.ones(length, length).triu(1).bool()
    forbidden = torch.stack([later, later.T])  # of the halves
    weights = (q @ k.mT / half**0.5).masked_fill(forbidden, -torch.inf).softmax(-1)
    z = (weights @ v).permute(2, 0, 1, 3).flatten(1)  # features as (head, half, dimension)
    worst = float((layer.o_proj(z) - layer(x)[0]).detach().abs().max())
    layer.o_proj = torch.nn.Identity()  # type: ignore[assignment]
    moved = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)[:, :, 0].abs().amax(-1)
    moved = moved.unflatten(1, (heads, 2, half)).amax(3)  # [query, head, half, key]
    leaks = int((moved.permute(1, 2, 0, 3)[:, forbidden] > 0).sum())
    reason = f"{leaks} forbidden pairs of {heads} heads have a derivative"
    return Finding("halves", verdict(worst <= 1e-12 and not leaks), worst, reason=reason)


def _projections(layer: Any) -> tuple[Any, ...]:
    return layer.q_proj, layer.k_proj, layer.v_proj


def _probe(size: str, device: str, seed: int) -> list[Finding]:
    import torch
    from torch import nn

    from regard.tasks.position import ArgmaxPosition
    from regard.train.simple import fit

    length, vocab, layers, dim, heads, steps, seeds = PROBE[size]
    task = ArgmaxPosition(length, vocab)

    def loss(model: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(pooled(model, batch[0].to(device)), batch[1].to(device))

    right: dict[str, Any] = {}
    for arm in ARMS[size]:
        each = []
        for s in range(seed, seed + seeds):
            model = build(arm, vocab, length, layers, dim, heads, s).to(device)
            fit(model, loss, lambda g: task.draw(BATCH, g), steps, LR, s, warmup=WARMUP)
            ids, answer = task.draw(TESTS, torch.Generator().manual_seed(1_000_000_007 + s))
            with torch.no_grad():
                top = torch.cat([pooled(model, part.to(device)).argmax(-1).cpu() for part in ids.split(500)])
            each.append((top == answer).double().numpy())
        right[arm] = np.array(each)
    means = {arm: float(r.mean()) for arm, r in right.items()}
    reason = (
        f"L={length}, V={vocab}, {layers} layers of width {dim}, {steps} steps, {seeds} seed{'s' * (seeds > 1)}; "
        f"no order, no more than {task.ceiling:.4f}; " + ", ".join(f"{arm} {m:.3f}" for arm, m in means.items())
    )
    holds = {
        "bidirectional": means["bidirectional"] <= task.ceiling + 0.01,
        "dual": means["dual"] >= 0.5,
        "causal": means["causal"] >= 0.4,
    }
    details = {"by_seed": {arm: r.mean(1).tolist() for arm, r in right.items()}, "order_blind": task.ceiling}
    return [
        Finding(
            arm,
            verdict(ok),
            means[arm],
            evidence.seeds_and_items(right[arm]),
            floor=1 / length,
            ceiling=task.ceiling if arm == "bidirectional" else 1.0,
            baseline=means["causal" if arm == "bidirectional" else "bidirectional"],
            reason=reason,
            details=details,
        )
        for arm, ok in holds.items()
    ]


def _bytes(device: str, seed: int) -> list[Finding]:
    """Masked language models on Python sources, tested at the length trained on and at a longer one."""
    import torch

    from regard.tasks.bytetext import PAD, VOCAB, StandardLibrary
    from regard.train.simple import fit

    short, far, layers, dim, heads, batch, steps, seeds = BYTES
    train, test = StandardLibrary(), StandardLibrary("test")
    losses: dict[str, Any] = {}
    for arm in BYTE_ARMS:
        each = []
        for s in range(seed, seed + seeds):
            model = build(arm, VOCAB, VOCAB, layers, dim, heads, s).to(device)

            def draw(g: Any, text: Any = train, n: int = batch, length: int = short) -> tuple[Any, Any]:
                ids = text.cut(n, length, g)
                return ids.to(device), (torch.rand(ids.shape, generator=g) < MASKED).to(device)

            def loss(model: Any, drawn: Any, reduction: str = "mean") -> Any:
                ids, hidden = drawn
                logits = model(ids.masked_fill(hidden, PAD))[hidden]
                return torch.nn.functional.cross_entropy(logits, ids[hidden], reduction=reduction)

            fit(model, loss, draw, steps, LR, s, warmup=steps // 10, decay=steps // 4)
            found = []
            for length in (short, far):
                g = torch.Generator().manual_seed(1_000_000_007 + s)
                with torch.no_grad():
                    parts = [loss(model, draw(g, test, 16, length), "none") for _ in range(8 * far // length)]
                found.append(float(torch.cat(parts).mean()))
            each.append(found)
        losses[arm] = np.array(each)  # [seed, length]
    rise = {arm: x[:, 1] - x[:, 0] for arm, x in losses.items()}
    extra = rise["dual+rope"] - rise["bidirectional+rope"]
    gap = losses["bidirectional"][:, 0] - losses["dual"][:, 0]
    shown = ", ".join(f"{arm} {x.mean(0)[0]:.3f} -> {x.mean(0)[1]:.3f}" for arm, x in losses.items())
    reason = f"loss at {short} -> {far} bytes, {steps} steps of {batch} windows, {seeds} seeds: {shown}"
    details = {"losses": {arm: x.tolist() for arm, x in losses.items()}}
    return [
        Finding(
            "longer",
            verdict(extra.mean() <= 0),
            float(extra.mean()),
            evidence.bootstrap(extra),
            baseline=float(rise["bidirectional+rope"].mean()),
            reason=reason,
            details=details,
        ),
        Finding(
            "order",
            verdict(gap.mean() > 0.1),
            float(gap.mean()),
            evidence.bootstrap(gap),
            floor=0.0,
            reason=reason,
            details=details,
        ),
    ]
