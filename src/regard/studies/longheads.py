"""LongHeads (arXiv 2402.10685): each head reads the chunks it needs, at positions it knows; nothing is trained.

The cheap form, keys rotated once and queries once for each slot, is set against gathering and rotating. Small decoders
with rotary positions learn to answer for a key (`regard.tasks.recall.KeyedPasskey`) at 64 tokens and read 1,024, under
`regard.steer.long_heads` with eight chunks of eight chosen in several ways, or with a window of as many keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from regard.studies import evidence
from regard.studies.long_reading import answered, learn, read_long, unmeasured
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "longheads"
MODEL = None
FULL_ONLY = "only the full size trains for it"
CLAIMS = [
    Claim(
        "slots",
        "queries rotated for each slot and merged by lse give what gathered and rotated chunks give",
        kind="instrument",
        ours="largest difference of outputs, float32 against float64",
        holds_if="at most 1e-5",
    ),
    Claim(
        "short",
        "the first queries, of as many tokens as all slots hold, attend as without chunks",
        kind="instrument",
        ours="largest difference from dense attention, float64",
        holds_if="at most 1e-10",
    ),
    Claim(
        "all",
        "with a slot for every chunk the last query attends as without chunks",
        kind="instrument",
        ours="largest difference from dense attention, float64",
        holds_if="at most 1e-10",
    ),
    Claim(
        "renumbering",
        "at renumbered positions the best chunks serve as the trained length does",
        kind="mechanism",
        ours="points of accuracy, the trained length less 16 times as much with chunks chosen by their best key",
        holds_if="at most 5 points",
    ),
    Claim(
        "chunks",
        "chunks chosen by the paper's keys serve better than a window or random chunks of as many keys",
        kind="mechanism",
        ours="points of accuracy at 16 times the trained length, less the better of the two",
        holds_if="at least 20 points",
    ),
    Claim(
        "llama",
        "LLaMA-2-7B, trained on 4k, finds a pass key at 128k",
        kind="replication",
        paper="100 of 100",
        ours="accuracy",
        holds_if="at least 95 of 100",
        waits="needs the weights of LLaMA-2-7B, which are not here",
    ),
]
# Compared tensors: samples, heads, kv_heads, length, head_dim; chunk and slots.
COMPARED, SHAPE = (1, 4, 2, 340, 32), (16, 6)
BASE = 10_000.0
CHUNK, TOTAL = 8, 8
DIM, HEADS, LAYERS, BATCH, LR, WARMUP = 48, 1, 1, 64, 3e-3, 50
# Lengths with the question, steps, seeds, questions of a test.
TRAINED, TESTED, STEPS, SEEDS, QUESTIONS = 64, 1024, 500, 3, 250
GATE = 0.7  # of accuracy at the trained length
ARMS = ("paper", "mean", "max", "random", "window", "dense")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Compare the forms; the full size trains and reads."""
    findings = _forms(seed)
    if size == "full":
        return findings + _read_long(device, seed)
    return findings + unmeasured(FULL_ONLY, "renumbering", "chunks")


def gathered(q: Any, k: Any, v: Any, routed: Any, inv_freq: Any, query: int) -> Any:
    """One query's output ``[batch, heads, head_dim]``, its chunks gathered and rotated anew; float64."""
    import torch

    from regard.kernels.rotary import rotate

    batch, heads, _, dim = q.shape
    size, share = routed.block[1], heads // k.shape[1]
    out = q.new_zeros(batch, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            chunks = routed.index[b, h, query][: routed.count[b, h, query]].long()
            places = torch.arange(len(chunks) * size)
            tokens = (chunks[:, None] * size + torch.arange(size)).flatten()
            places, tokens = places[tokens <= query], tokens[tokens <= query]
            keys = rotate(k[b, h // share, tokens].double(), places, inv_freq)
            at = torch.tensor([(len(chunks) - 1) * size + query % size])
            mine = rotate(q[b, h, query, None].double(), at, inv_freq)
            weights = (mine @ keys.mT * dim**-0.5).softmax(-1)
            out[b, h] = (weights @ v[b, h // share, tokens].double())[0]
    return out


def _forms(seed: int) -> list[Finding]:
    import torch

    from regard.kernels.attend import attend
    from regard.kernels.renumbered import renumbered
    from regard.kernels.rotary import inverse_frequencies, rotate
    from regard.patterns import Causal
    from regard.patterns.chunks import ChunkRoute

    batch, heads, kv_heads, length, dim = COMPARED
    chunk, total = SHAPE
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, length, dim, generator=generator, dtype=torch.float64)
    inv_freq = inverse_frequencies(dim, BASE, dtype=torch.float64)
    turn = partial(rotate, inv_freq=inv_freq)

    def read(slots: int, dtype: Any = torch.float64) -> tuple[Any, Any]:
        a, b, c = (t.to(dtype) for t in (q, k, v))
        route = ChunkRoute(chunk, slots, turn=turn)
        routed = route.select(a, route.summarize(b, q=a, v=c), within=Causal())
        return renumbered(a, b, c, routed, turn)[0], routed

    out, routed = read(total, torch.float32)
    queries = range(0, length, 7)
    given = torch.stack([gathered(q, k, v, routed, inv_freq, t) for t in queries], 2)
    apart = float((out[:, :, ::7] - given).abs().max())
    at = torch.arange(length)
    dense = attend(turn(q, at), turn(k, at), v, Causal(), backend="reference")
    first = total * chunk
    short = float((read(total)[0] - dense)[:, :, :first].abs().max())
    whole = float((read(-(-length // chunk))[0] - dense)[:, :, -1].abs().max())
    beyond = float((out - dense)[:, :, first:].abs().max())
    listed = int((routed.count[:, :, ::7] == total).sum())
    return [
        Finding(
            "slots",
            verdict(apart <= 1e-5),
            apart,
            floor=0.0,
            reason=f"{given[..., 0].numel()} outputs of heads, {listed} of them with {total} chunks of {chunk}",
        ),
        Finding(
            "short",
            verdict(short <= 1e-10),
            short,
            floor=0.0,
            reason=f"{first} queries; the others differ by up to {beyond:.2g}, as they should",
        ),
        Finding(
            "all",
            verdict(whole <= 1e-10),
            whole,
            floor=0.0,
            reason=f"{-(-length // chunk)} chunks, the last unfinished",
        ),
    ]


def build(seed: int) -> Any:
    """A decoder with rotary positions for the task."""
    import torch

    from regard.models.decoder import Decoder
    from regard.tasks.recall import KeyedPasskey

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(KeyedPasskey().vocab, DIM, LAYERS, HEADS, theta=BASE)


def train(seed: int, device: str) -> Any:
    """The decoder, trained on the answers of short texts."""
    return learn(build(seed), TRAINED, device, seed, batch=BATCH, steps=STEPS, lr=LR, warmup=WARMUP)


def routes(seed: int) -> dict[str, Any]:
    """The ways to choose chunks, of equal width."""
    import torch

    from regard.patterns.chunks import ChunkRoute

    generator = torch.Generator().manual_seed(seed)

    class Random(ChunkRoute):
        """Any past chunks between those that are always read."""

        def scores(self, q: Any, summary: Any) -> Any:
            """Noise."""
            return torch.rand(*q.shape[:3], summary.length // self.chunk, generator=generator).to(q)

    made = {name: ChunkRoute(CHUNK, TOTAL, representation=name) for name in ("paper", "mean", "max")}
    return made | {"random": Random(CHUNK, TOTAL, representation="mean")}


def answers(model: Any, batch: Any, arm: str, device: str, seed: int = 0) -> Any:
    """1 for every right answer."""
    from contextlib import nullcontext

    from regard.patterns import Causal, Window
    from regard.steer.long_heads import LongHeads

    pattern = Causal() & Window(TOTAL * CHUNK - 1) if arm == "window" else None
    with nullcontext() if arm in ("window", "dense") else LongHeads(model, routes(seed)[arm]):
        return answered(batch, lambda prompts: model(prompts.to(device), pattern=pattern)[:, -1], 25)


def _read_long(device: str, seed: int) -> list[Finding]:
    models = [train(s, device) for s in range(seed, seed + SEEDS)]
    read = read_long(
        models,
        lambda model, batch, arm: answers(model, batch, arm, device, seed),
        ARMS,
        trained=TRAINED,
        tested=TESTED,
        questions=QUESTIONS,
        seed=seed,
        first="dense",
        what=f"{TOTAL} chunks of {CHUNK}",
        gate=GATE,
        steps=STEPS,
    )
    if isinstance(read, str):
        return unmeasured(read, "renumbering", "chunks")
    other, means = read.better("window", "random"), read.means
    lost, gain = 100 * (read.short - read.arms["max"]), 100 * (read.arms["paper"] - read.arms[other])
    return [
        Finding(
            "renumbering",
            verdict(lost.mean() <= 5),
            float(lost.mean()),
            evidence.seeds_and_items(lost),
            floor=0.0,
            baseline=100 * float(read.short.mean()) - means["dense"],
            reason=read.told,
            details=read.details,
        ),
        Finding(
            "chunks",
            verdict(gain.mean() >= 20),
            float(gain.mean()),
            evidence.seeds_and_items(gain),
            floor=0.0,
            ceiling=means["max"] - means[other],
            baseline=means[other],
            reason=f"{other} is the better of the two; {read.told}",
        ),
    ]
