"""Efficient-DLM (arXiv 2512.14067): an autoregressive model turned into a block diffusion model.

Four ways to go on training the same autoregressive start with the same batches and steps: (a) bidirectional masked
diffusion, (b) block-wise, noisy blocks seeing noisy blocks, (c) block-wise with clean context, (d) c with masking that
prefers the end of a block. Masking is exact-k a block in (b) and (c), at equal odds for its places.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import DEFAULT_MODEL, Claim, Finding, verdict

PAPER = "efficient-dlm"
CLAIMS = [
    Claim(
        "mask",
        "one pass over noisy and clean tokens is every noisy block read after its clean past",
        kind="instrument",
        ours="largest difference of the logits, float64",
        holds_if="at most 1e-9",
    ),
    Claim(
        "drift",
        "block-wise training with clean context keeps the weights closer to the start than bidirectional training",
        kind="mechanism",
        paper="block-wise attention better preserves the pretrained weights",
        ours="drift |W - W0| / |W0| of the attention matrices, clean context over bidirectional",
        holds_if="below 1, with its interval over seeds",
    ),
    Claim(
        "accuracy",
        "clean context beats block-wise training without it, which beats bidirectional training",
        kind="mechanism",
        ours="exact match of copying held-out segments, clean context less without",
        holds_if="above 0, and without less bidirectional above 0",
    ),
    Claim(
        "places",
        "masking the end of blocks more often is no worse",
        kind="mechanism",
        ours="exact match, with place-dependent masking less without",
        holds_if="at least 0",
    ),
    Claim(
        "speed",
        "it decodes several tokens a pass at the accuracy of the autoregressive model",
        kind="mechanism",
        paper="4.5x the throughput of Dream 7B, 2.7x that of Qwen3 4B, at higher accuracy",
        ours="tokens a pass of block decoding",
        holds_if="at least 2, with exact match within 2 points of the autoregressive start",
    ),
    Claim(
        "8b",
        "at 8B parameters it is more accurate and faster than diffusion and autoregressive models",
        kind="replication",
        paper="+5.4% / +2.7% accuracy at 4.5x / 2.7x the throughput of Dream 7B / Qwen3 4B",
        ours="benchmark accuracy and throughput",
        holds_if="ahead of both",
        waits="needs the 8B model and GPUs",
    ),
]
ARMS = ("bidirectional", "noisy blocks", "clean context", "clean context, places")
BLOCK, LR, THRESHOLD = 16, 1e-3, 0.9
# The small start: length, layers, width, heads, batch, steps of likelihood, rate; then steps of each arm, seeds.
SMALL = (64, 2, 64, 4, 16, 150, 3e-3)
SMOKE = (60, 2)
# From the testbed: length, batch, steps of each arm, seeds, probes.
FULL = (128, 32, 2000, 3, 256)
SEGMENT, GIVEN = (24, 40), 7  # of the copy probe: length of a segment, and how much of its repetition is given
FULL_ONLY = "only the full size trains far enough to decode (a GPU)"


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = DEFAULT_MODEL) -> list[Finding]:
    """Turn a start into a diffusion model in four ways; the smoke size makes a small start of its own.

    Raises:
        ValueError: smoke with another model than the default, which it would not use.
    """
    if size == "full":
        return [_mask(seed), *_full(device, seed, model)]
    if model != DEFAULT_MODEL:
        raise ValueError(f"the smoke size trains a small start of its own and takes no model, got {model!r}")
    waiting = [Finding(claim, "not measured", reason=FULL_ONLY) for claim in ("accuracy", "places", "speed")]
    return [_mask(seed), _smoke(device, seed), *waiting]


def recipe(arm: str) -> tuple[Any, Any]:
    """How an arm corrupts a batch, ``(ids, mask_id, generator) -> Corrupted``, and its loss."""
    from regard.patterns import BlockCausal, BlockDiffusion, Full
    from regard.train.objectives import corrupt_blockwise, corrupt_uniform, masked_diffusion

    even = partial(corrupt_blockwise, block=BLOCK, half_life=None)
    clean = masked_diffusion(lambda n: BlockDiffusion(n, BLOCK), clean_context=True)
    return {
        "bidirectional": (corrupt_uniform, masked_diffusion(Full())),
        "noisy blocks": (even, masked_diffusion(BlockCausal(BLOCK))),
        "clean context": (even, clean),
        "clean context, places": (partial(corrupt_blockwise, block=BLOCK), clean),
    }[arm]


def turn(start: Any, arm: str, draw: Any, steps: int, seed: int) -> tuple[Any, float]:
    """A copy of the start trained as the arm says, and the mean drift of its attention matrices."""
    from copy import deepcopy

    from regard.tasks.bytetext import PAD
    from regard.train.diagnostics import weight_drift, weights
    from regard.train.simple import fit

    model = deepcopy(start)
    corrupt, loss = recipe(arm)
    fit(model, loss, lambda g: corrupt(draw(g), PAD, g), steps, LR, seed, warmup=steps // 10)
    drift = weight_drift(weights(start), model)
    return model, float(np.mean([d for name, d in drift.items() if "attention" in name]))


def _mask(seed: int) -> Finding:
    import torch

    from regard.models.decoder import Decoder
    from regard.patterns import BlockCausal, BlockDiffusion

    length, block, vocab = 27, 8, 20  # the last block is short
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(vocab, 32, 2, 4).double()
    noisy, clean = torch.randint(vocab, (2, 3, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).repeat(2)
    with torch.no_grad():
        both = torch.cat([noisy, clean], 1)
        once = model(both, pattern=BlockDiffusion(length, block), positions=positions)[:, :length]
        worst = 0.0
        for lo in range(0, length, block):
            alone = model(torch.cat([clean[:, :lo], noisy[:, lo : lo + block]], 1), pattern=BlockCausal(block))[:, lo:]
            worst = max(worst, float((alone - once[:, lo : lo + block]).abs().max()))
    reason = f"{length} tokens in blocks of {block}"
    return Finding("mask", verdict(worst <= 1e-9), worst, reason=reason)


def small_start(text: Any, device: str, seed: int) -> Any:
    """A small decoder trained by likelihood on bytes."""
    import torch

    from regard.models.decoder import Decoder
    from regard.tasks.bytetext import VOCAB
    from regard.train.objectives import likelihood
    from regard.train.simple import fit

    length, layers, dim, heads, batch, steps, rate = SMALL
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(VOCAB, dim, layers, heads).to(device)
    fit(model, likelihood, lambda g: text.cut(batch, length, g).to(device), steps, rate, seed, warmup=steps // 10)
    return model


def _smoke(device: str, seed: int) -> Finding:
    from regard.tasks.bytetext import StandardLibrary

    text, (steps, seeds) = StandardLibrary(), SMOKE
    length, _, _, _, batch, begun, _ = SMALL
    drifts: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for s in range(seed, seed + seeds):
        start = small_start(text, device, s)
        for arm, found in drifts.items():
            found.append(turn(start, arm, lambda g: text.cut(batch, length, g).to(device), steps, s)[1])
    told = f"a {SMALL[1]}-layer start of {begun} steps, {steps} steps each"
    return _drift(drifts, told)


def _drift(drifts: dict[str, list[float]], told: str) -> Finding:
    ratio = np.array(drifts["clean context"]) / np.array(drifts["bidirectional"])
    low, high = evidence.bootstrap(ratio)
    shown = ", ".join(f"{arm} {np.mean(d):.4f}" for arm, d in drifts.items())
    reason = f"{told}, {len(ratio)} seed{'s' * (len(ratio) > 1)}: drift {shown}"
    return Finding(
        "drift", verdict(high < 1), float(ratio.mean()), (low, high), baseline=1.0, reason=reason, details=drifts
    )


def _full(device: str, seed: int, model: str) -> list[Finding]:
    import torch

    from regard.models.decoder import Decoder
    from regard.models.generate import generate, generate_blocks
    from regard.studies.testbed import below_gate
    from regard.tasks.bytetext import BOS, PAD, VOCAB, StandardLibrary
    from regard.tasks.decoder import PRINTABLE
    from regard.tasks.repeated import RepeatedTokens
    from regard.tasks.testbeds import load

    length, batch, steps, seeds, probes = FULL
    loaded = load(model, device=device)
    if loaded.model.config.vocab_size != VOCAB:
        vocab = loaded.model.config.vocab_size
        raise ValueError(f"model must be of the byte vocabulary, {VOCAB} ids, got {model!r} with {vocab}")
    if reason := below_gate(loaded, "needle_256"):
        return [Finding(c, "not measured", reason=reason) for c in ("drift", "accuracy", "places", "speed")]
    start, text = Decoder.from_llama(loaded.model), StandardLibrary()
    least = SEGMENT[0]
    copies = RepeatedTokens(length, PRINTABLE, BOS, SEGMENT)

    def draw(g: torch.Generator) -> Any:
        """Half text, half repeated segments."""
        half = batch // 2
        return torch.cat([text.cut(batch - half, length, g), copies.batch(half, g).input_ids]).to(device)

    # A segment, the first tokens of its repetition, and then the next block, which is asked for.
    task = RepeatedTokens(1 + least + GIVEN + BLOCK, PRINTABLE, BOS, (least, least))
    asked = task.batch(probes, torch.Generator().manual_seed(1_000_000_007 + seed)).input_ids.to(device)
    prompt, answer = asked[:, :-BLOCK], asked[:, -BLOCK:]
    ahead = (generate(start, prompt, BLOCK)[:, -BLOCK:] == answer).all(1).double().cpu().numpy()
    drifts: dict[str, list[float]] = {arm: [] for arm in ARMS}
    right: dict[str, Any] = {arm: [] for arm in ARMS}
    passes: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for s in range(seed, seed + seeds):
        for arm in ARMS:
            turned, drift = turn(start, arm, draw, steps, s)
            drifts[arm].append(drift)
            bidirectional = arm == "bidirectional"
            if bidirectional:
                turned.patterns = None
            hits, calls = [], 0
            for row in prompt:  # one by one, so that passes are those of one sequence
                out = generate_blocks(
                    turned, row[None], BLOCK, BLOCK, PAD, threshold=THRESHOLD, cached=not bidirectional
                )
                hits.append(out.ids[0, -BLOCK:])
                calls += out.forwards
            right[arm].append((torch.stack(hits) == answer).all(1).double().cpu().numpy())
            passes[arm].append(BLOCK * len(prompt) / calls)
    return _judged(drifts, {arm: np.array(r) for arm, r in right.items()}, passes, ahead, steps)


def _judged(
    drifts: dict[str, list[float]], right: dict[str, Any], passes: dict[str, list[float]], ahead: Any, steps: int
) -> list[Finding]:
    means = {arm: float(r.mean()) for arm, r in right.items()}
    clean, noisy, both = (right[a] for a in ("clean context", "noisy blocks", "bidirectional"))
    placed = right["clean context, places"]
    shown = ", ".join(f"{arm} {m:.3f}" for arm, m in means.items())
    reason = f"exact match on {len(ahead)} copies of {BLOCK} bytes, {steps} steps: {shown}, start {ahead.mean():.3f}"
    details = {"by_seed": {arm: r.mean(1).tolist() for arm, r in right.items()}, "tokens_a_pass": passes}
    pace = np.array(passes["clean context, places"])
    near = means["clean context, places"] >= ahead.mean() - 0.02
    told = f"from the testbed, {steps} steps each"
    return [
        _drift(drifts, told),
        Finding(
            "accuracy",
            verdict((clean - noisy).mean() > 0 and (noisy - both).mean() > 0),
            float((clean - noisy).mean()),
            evidence.seeds_and_items(clean - noisy),
            floor=0.0,
            baseline=float(ahead.mean()),
            reason=reason,
            details=details,
        ),
        Finding(
            "places",
            verdict((placed - clean).mean() >= 0),
            float((placed - clean).mean()),
            evidence.seeds_and_items(placed - clean),
            reason=reason,
        ),
        Finding(
            "speed",
            verdict(pace.mean() >= 2 and near),
            float(pace.mean()),
            evidence.bootstrap(pace),
            floor=1.0,
            ceiling=float(BLOCK),
            baseline=1.0,
            reason=f"{reason}; prompt and clean blocks count as passes",
        ),
    ]
