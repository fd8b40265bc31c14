"""Landmark attention (arXiv 2305.16300): the weight of a token at a block's end opens the block.

Three ways to compute it are set against each other, and reading in chunks against the form of training. Small decoders
learn to answer for a key (`regard.tasks.recall.KeyedPasskey`) from texts of eight blocks and then read texts of 128: by
the blocks whose landmarks weigh most, the last blocks, random blocks, or all of them. Choosing happens in every layer
and head; all arms read with the same weights at the same positions.
"""

from __future__ import annotations

from typing import Any

from regard.studies import evidence
from regard.studies.long_reading import answered, learn, read_long, unmeasured
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "landmark"
MODEL = None
FULL_ONLY = "only the full size trains for it"
CLAIMS = [
    Claim(
        "forms",
        "softmax in groups, gates over the lse of blocks, and the authors' masks are the same attention",
        kind="instrument",
        ours="largest difference of weights among the three, float64",
        holds_if="at most 1e-12",
    ),
    Claim(
        "rows",
        "weights of a query sum to 1, and landmarks have none",
        kind="instrument",
        ours="largest distance of a row's sum from 1, or weight of a landmark",
        holds_if="at most 1e-12",
    ),
    Claim(
        "reading",
        "reading in chunks with every finished block open is the form of training",
        kind="instrument",
        ours="largest difference of outputs, float64, with rotary positions (float32 frequencies) and without",
        holds_if="at most 1e-6",
    ),
    Claim(
        "chosen",
        "a model trained on short texts finds the block it needs in long ones",
        kind="mechanism",
        paper="comparable to Transformer-XL with far fewer retrieved tokens",
        ours="points of accuracy at 16 times the trained length, 4 of 128 blocks: by landmarks, less the better of the "
        "last and of random ones",
        holds_if="at least 30 points",
    ),
    Claim(
        "few",
        "a few chosen blocks serve better than all: gates dilute with length",
        kind="mechanism",
        ours="points of accuracy, 4 chosen blocks less all of 128",
        holds_if="at least 0",
    ),
    Claim(
        "llama",
        "LLaMA-7B fine-tuned with landmarks reads 32k tokens",
        kind="replication",
        paper="32k, the context of GPT-4 then",
        ours="accuracy of retrieving a pass key at 32k",
        holds_if="at least 90 of 100",
        waits="needs the weights of LLaMA-7B and its fine-tuning on RedPajama, which are not here",
    ),
]
# Compared tensors: samples, heads, length, head_dim, block; two thirds of a block are left over.
COMPARED = (2, 4, 88, 16, 9)
BLOCK, TOPK, CHUNK = 8, 4, 18
DIM, HEADS, LAYERS, BATCH, LR, WARMUP = 48, 1, 2, 64, 3e-3, 50
# Lengths with the question, steps, seeds, questions of a test.
TRAINED, TESTED, STEPS, SEEDS, QUESTIONS = 65, 1025, 500, 3, 250
GATE = 0.7  # of accuracy at the trained length
ARMS = ("chosen", "last", "random", "all")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Compare the forms; the full size trains and reads."""
    findings = [*_forms(seed), _reading(seed)]
    if size == "full":
        return findings + _read_long(device, seed)
    return findings + unmeasured(FULL_ONLY, "chosen", "few")


def by_groups(scores: Any, block: int) -> Any:
    """Weights ``[..., length, length]`` by the definition: a softmax inside each group, times its landmark's."""
    import torch

    n, P = scores.shape[-1], block + 1
    at = torch.arange(n)
    is_landmark, own = at % P == block, at[:, None] // P == at // P
    seen = (at <= at[:, None]) & ~((at == at[:, None]) & is_landmark)
    first = seen & (own | is_landmark) & ~(own & is_landmark)
    weights = scores.masked_fill(~first, -torch.inf).softmax(-1)
    out = weights * (own & ~is_landmark)
    for g in range(n // P):
        keys = slice(g * P, g * P + block)
        later = (at // P > g)[:, None]
        out[..., keys] += later * weights[..., g * P + block, None] * scores[..., keys].softmax(-1)
    return out


def by_masks(scores: Any, block: int) -> Any:
    """Weights as the authors' code has them: a bucket for each key, softmax in buckets, products of gathered gates."""
    import torch

    n, P = scores.shape[-1], block + 1
    at = torch.arange(n)
    is_mem = at % P == block
    last_section = at[:, None] // P == at // P
    seen = (at <= at[:, None]) & ~((at == at[:, None]) & is_mem)
    buckets = n // P + 1  # the authors' code has a fixed number, too small for long texts
    bucket = torch.where(last_section | is_mem, buckets - 1, at // P).expand(scores.shape)
    masked = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    peak = scores.new_full((*scores.shape[:-1], buckets), torch.finfo(scores.dtype).min)
    peak = peak.scatter_reduce(-1, bucket, masked, "amax")
    powers = (masked - peak.gather(-1, bucket)).exp() * seen
    sums = scores.new_zeros(peak.shape).scatter_add(-1, bucket, powers)
    probs = powers / sums.gather(-1, bucket).clamp(min=torch.finfo(scores.dtype).tiny)
    gates = probs[..., block::P]
    gates = torch.nn.functional.pad(gates, (0, buckets - gates.shape[-1])).gather(-1, (at // P).expand(scores.shape))
    return torch.where(last_section, probs, probs * gates).masked_fill(is_mem, 0)


def _forms(seed: int) -> list[Finding]:
    import torch

    from regard.layers.landmark import landmark_attention

    batch, heads, length, dim, block = COMPARED
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, length, dim, generator=generator, dtype=torch.float64)
    scores = q @ k.mT * dim**-0.5
    eye = torch.eye(length, dtype=torch.float64).expand(batch, heads, length, length)
    forms = {
        "gates": landmark_attention(q, k, eye, block),
        "groups": by_groups(scores, block),
        "masks": by_masks(scores, block),
    }
    pairs = {f"{a}, {b}": float((forms[a] - forms[b]).abs().max()) for a in forms for b in forms if a < b}
    worst, rows = max(pairs.values()), forms["gates"]
    off = max(float((rows.sum(-1) - 1).abs().max()), float(rows[..., block :: block + 1].abs().max()))
    reason = f"{rows.numel()} weights of queries in blocks of {block + 1}, the last one unfinished"
    return [
        Finding("forms", verdict(worst <= 1e-12), worst, floor=0.0, reason=reason, details=pairs),
        Finding("rows", verdict(off <= 1e-12), off, floor=0.0, reason=f"{rows[..., 0].numel()} rows"),
    ]


def _reading(seed: int) -> Finding:
    import torch

    from regard.layers.landmark import LandmarkAttention
    from regard.layers.position import Rope

    _, heads, length, dim, block = COMPARED
    worst = {}
    for name, position in (("rotary", Rope(dim)), ("none", None)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            chunk = 2 * (block + 1)  # with positions: just topk blocks are finished before the second chunk
            layer = LandmarkAttention(heads * dim, heads, block, position=position, topk=2, chunk=chunk).double()
            x = torch.randn(1, 2 * chunk if position else length, heads * dim, dtype=torch.float64)
        layer.topk = 2 if position else length
        with torch.no_grad():
            worst[name] = float((layer(x, state=layer.new_state()) - layer(x)).abs().max())
    figure = max(worst.values())
    reason = ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    return Finding("reading", verdict(figure <= 1e-6), figure, floor=0.0, reason=reason, details=worst)


def build(seed: int) -> Any:
    """A decoder of landmark attention for the task and its landmarks."""
    import torch

    from regard.layers.landmark import LandmarkAttention
    from regard.layers.position import Rope
    from regard.models.decoder import Decoder
    from regard.tasks.recall import KeyedPasskey

    def attention(_: int) -> Any:
        return LandmarkAttention(DIM, HEADS, BLOCK, position=Rope(DIM // HEADS), topk=TOPK, chunk=CHUNK)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(KeyedPasskey().vocab + 1, DIM, LAYERS, HEADS, attention=attention)


def train(seed: int, device: str) -> Any:
    """The decoder, trained on the answers of short texts."""
    from regard.tasks.landmarks import insert_landmarks
    from regard.tasks.recall import KeyedPasskey

    def prepare(ids: Any) -> Any:
        return insert_landmarks(ids, BLOCK, KeyedPasskey().vocab)

    made = build(seed)
    return learn(made, TRAINED, device, seed, batch=BATCH, steps=STEPS, lr=LR, warmup=WARMUP, prepare=prepare)


def answers(model: Any, batch: Any, arm: str, device: str, seed: int = 0) -> Any:
    """1 for every right answer; ``arm`` says which blocks are opened, "trained": the form of training."""
    from regard.tasks.landmarks import insert_landmarks

    landmark = model.embed.num_embeddings - 1
    for block in model.blocks:
        block.attention.chooser = choosers(seed)[arm if arm in ("last", "random") else "chosen"]
        block.attention.topk = batch.input_ids.shape[1] if arm == "all" else TOPK

    def read(prompts: Any) -> Any:
        ids = insert_landmarks(prompts, BLOCK, landmark).to(device)
        return model(ids, state=None if arm == "trained" else model.new_state())[:, -1, :landmark]

    return answered(batch, read, 50)


def choosers(seed: int) -> dict[str, Any]:
    """Routes of equal width that open other blocks."""
    import torch

    from regard.patterns.landmarks import LandmarkRoute

    generator = torch.Generator().manual_seed(seed)

    class Last(LandmarkRoute):
        """The blocks before the chunk."""

        def scores(self, q: Any, landmark: Any, at: Any) -> Any:
            """The number of each block."""
            return torch.arange(landmark.shape[2], device=q.device).to(q).expand(*q.shape[:3], -1)

    class Random(LandmarkRoute):
        """Any blocks."""

        def scores(self, q: Any, landmark: Any, at: Any) -> Any:
            """Noise."""
            return torch.rand(*q.shape[:3], landmark.shape[2], generator=generator).to(q)

    return {"chosen": LandmarkRoute, "last": Last, "random": Random}


def _read_long(device: str, seed: int) -> list[Finding]:
    models = [train(s, device) for s in range(seed, seed + SEEDS)]
    blocks = (TESTED - 1) // BLOCK
    read = read_long(
        models,
        lambda model, batch, arm: answers(model, batch, arm, device, seed),
        ARMS,
        trained=TRAINED,
        tested=TESTED,
        questions=QUESTIONS,
        seed=seed,
        first="trained",
        what=f"{TOPK} of {blocks} blocks",
        gate=GATE,
        steps=STEPS,
    )
    if isinstance(read, str):
        return unmeasured(read, "chosen", "few")
    other, means = read.better("last", "random"), read.means
    far, few = 100 * (read.arms["chosen"] - read.arms[other]), 100 * (read.arms["chosen"] - read.arms["all"])
    return [
        Finding(
            "chosen",
            verdict(far.mean() >= 30),
            float(far.mean()),
            evidence.seeds_and_items(far),
            floor=0.0,
            ceiling=100 * float(read.short.mean()) - means[other],
            baseline=means[other],
            reason=read.told,
            details=read.details,
        ),
        Finding(
            "few",
            verdict(few.mean() >= 0),
            float(few.mean()),
            evidence.seeds_and_items(few),
            floor=0.0,
            baseline=means["all"],
            reason=f"all {blocks} blocks stand at positions that training never had; {read.told}",
        ),
    ]
