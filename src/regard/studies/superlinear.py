"""Superlinear multi-step attention (arXiv 2601.18401): search at sqrt(L) anchors, attend inside the best spans.

The geometry is counted exactly. Whether the search can be learnt is asked of one layer over a causal moving average
(`regard.tasks.recall.Passkey`): a digit behind the window, and the share of digits that lie inside the chosen spans.
The search is taught by the gate alone, as in the paper, or by the mass of dense attention besides
(`regard.train.objectives.span_mass`, ours); without the average an anchor's key knows nothing of its span.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "superlinear"
MODEL = None
FULL_ONLY = "only the full size trains for it"
CLAIMS = [
    Claim(
        "covered",
        "no position is excluded for good: the spans of all anchors and the window hold every past key",
        kind="mechanism",
        paper="by design",
        ours="queries below 4,096 with a key that no span holds, reach b = 2 behind the anchor",
        holds_if="none, and some at b = 1, f = 1, where the same count must see gaps",
    ),
    Claim(
        "growth",
        "pairs scored and attended to grow as L^1.5",
        kind="mechanism",
        paper="O(L^(3/2))",
        ours="slope of log pairs over log L, 2^12 to 2^17, three spans of any anchors alike",
        holds_if="in [1.45, 1.55]",
    ),
    Claim(
        "gate",
        "the search query learns through the gate alone",
        kind="instrument",
        ours="greatest gradient of the search projection with the gate cut off, and with a single span",
        holds_if="0, and above 0 with three spans and the gate",
    ),
    Claim(
        "end-to-end",
        "search learns end to end which spans to choose",
        kind="mechanism",
        paper="needle in a haystack learnt up to 256K",
        ours="share of passkeys inside the chosen spans at 1,024 tokens, less that of random spans",
        holds_if="at least 0.3",
    ),
    Claim(
        "distilled",
        "taught the mass of dense attention besides, search finds the span, if keys stand for their spans",
        kind="mechanism",
        ours="share of passkeys inside the chosen spans at 1,024 tokens",
        holds_if="at least 0.7, and at most 0.3 without the moving average",
    ),
    Claim(
        "speed",
        "decoding at 1M and 10M tokens on one GPU",
        kind="replication",
        paper="114 and 80 tokens a second",
        ours="tokens a second",
        holds_if="at least half of the paper's",
        waits="needs a 30B model and a B200, which are not here",
    ),
]
COUNTED, LENGTHS = 4096, (12, 17)
DIM, HEADS, BATCH, LR, WARMUP = 48, 1, 64, 3e-3, 50
AVERAGE = 64  # tokens of the moving average
# Lengths of training, tested lengths, steps, seeds, questions of a test.
TRAINED, TESTED, STEPS, SEEDS, QUESTIONS = (64, 128, 256, 512, 1024), (1024, 4096), 900, 3, 500
ARMS = {"gate": (True, False), "distilled": (True, True), "no average": (False, True)}


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Count the geometry and look at gradients; the full size trains."""
    findings = [_covered(), _growth(), _gate(seed)]
    if size == "full":
        return findings + _learned(device, seed)
    return findings + [Finding(name, "not measured", reason=FULL_ONLY) for name in ("end-to-end", "distilled")]


def gaps(route: Any, queries: int) -> Any:
    """How many past keys no span of each query holds, nor its window ``[queries]``."""
    import torch

    steps = route.steps(queries)
    start, stop = route.spans(torch.arange(queries), steps)
    edges = torch.zeros(queries, queries + 1, dtype=torch.int32)
    there = (start < stop).int()
    edges.scatter_add_(1, start, there)
    edges.scatter_add_(1, stop, -there)
    at = torch.arange(queries)
    held = (edges[:, :-1].cumsum(1) > 0) | (at > at[:, None] - route.window.left - 1)
    return (~held & (at <= at[:, None])).sum(1)


def _covered() -> Finding:
    from regard.patterns.superlinear import Superlinear

    whole, wide, short = (gaps(Superlinear(b=b, f=f), COUNTED) for b, f in ((2, 0), (3, 1), (1, 1)))
    figure, seen = float((whole > 0).sum() + (wide > 0).sum()), int((short > 0).sum())
    first = int((short[:700] > 0).sum())
    reason = (
        f"b = 2, f = 0 and b = 3, f = 1; at b = f = 1 {seen} queries lack up to {int(short.max())} keys, {first} of "
        f"the first 700 up to {int(short[:700].max())}"
    )
    return Finding("covered", verdict(figure == 0 and seen > 0), figure, floor=float(seen), ceiling=0.0, reason=reason)


def _growth() -> Finding:
    import torch

    from regard.patterns.superlinear import Superlinear

    route, most = Superlinear(), 2 ** LENGTHS[1]
    steps, each = route.steps(most), []
    for part in torch.arange(most).split(8192):
        start, stop = route.spans(part, steps)
        sizes = (stop - start).clamp(min=0).double()
        anchors = (sizes > 0).sum(1)
        spans = sizes.sum(1) / anchors.clamp(min=1) * anchors.clamp(max=route.k)
        each.append(anchors + spans + (part + 1).clamp(max=route.window.left + 1))
    pairs = torch.cat(each).cumsum(0)
    logs = np.arange(LENGTHS[0], LENGTHS[1] + 1)
    counts = pairs[2**logs - 1].numpy()
    slope = float(np.polyfit(logs, np.log2(counts), 1)[0])
    share = counts[-1] / (most * (most + 1) / 2)
    reason = f"{counts[-1] / most:.0f} pairs a query at 2^{LENGTHS[1]}, {100 * share:.1f} % of all causal ones"
    details = {"length": (2**logs).tolist(), "pairs": counts.tolist()}
    return Finding("growth", verdict(1.45 <= slope <= 1.55), slope, baseline=2.0, reason=reason, details=details)


def _gate(seed: int) -> Finding:
    from dataclasses import replace

    import torch

    from regard.layers.superlinear import SuperlinearAttention
    from regard.patterns.superlinear import Superlinear

    class Cut(Superlinear):
        """Scores without their gradient."""

        def select(self, *given: Any, **how: Any) -> Any:
            """The same spans."""
            routed = super().select(*given, **how)
            assert routed.score is not None
            return replace(routed, score=routed.score.detach())

    found = {}
    for name, route in (("gate", Superlinear()), ("cut", Cut()), ("one", Superlinear(k=1))):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = SuperlinearAttention(32, 2, route)
            x = torch.randn(2, 200, 32)
        layer(x).square().sum().backward()
        gradient = layer.search_proj.weight.grad
        found[name] = 0.0 if gradient is None else float(gradient.abs().max())
    figure = max(found["cut"], found["one"])
    reason = (
        f"with the gate and three spans {found['gate']:.2g}, cut off {found['cut']:.1g}, one span {found['one']:.1g}"
    )
    return Finding("gate", verdict(figure == 0 < found["gate"]), figure, floor=0.0, reason=reason, details=found)


def build(average: bool, distill: bool, seed: int) -> Any:
    """Embedding, moving average, one layer read at the last token, a linear head."""
    import torch
    from torch import nn

    from regard.layers.superlinear import SuperlinearAttention
    from regard.tasks.recall import Passkey
    from regard.train.objectives import span_mass

    vocab = Passkey().vocab

    class Reader(nn.Module):
        """Answers at the last token: one query, so that training at long lengths costs keys and values alone."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(vocab, DIM), nn.Linear(DIM, vocab, bias=False)
            nn.init.normal_(self.embed.weight, std=DIM**-0.5)
            self.norm, self.last = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
            self.attention = SuperlinearAttention(DIM, HEADS, distill=span_mass if distill else None)

        def forward(self, ids: Any) -> Any:
            x = self.embed(ids)
            if average:  # over sqrt(AVERAGE) tokens' worth: a sum of independent tokens keeps its size
                sums = nn.functional.pad(x.cumsum(1), (0, 0, AVERAGE, 0))
                x = x + (sums[:, AVERAGE:] - sums[:, :-AVERAGE]) * AVERAGE**-0.5
            h, state = self.norm(x), self.attention.new_state()
            k, v = (
                proj(h[:, :-1]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for proj in (self.attention.k_proj, self.attention.v_proj)
            )
            state.append(k, v, torch.arange(ids.shape[1] - 1, device=ids.device))
            return self.head(self.last(x[:, -1:] + self.attention(h[:, -1:], state=state)))[:, 0]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Reader()


def train(arm: str, seed: int, device: str) -> Any:
    """A reader trained on passkeys of all the lengths, one length a batch."""
    import torch
    from torch.nn.functional import cross_entropy

    from regard.tasks.recall import Passkey
    from regard.train.simple import fit

    def batch(generator: Any) -> Any:
        length = TRAINED[int(torch.randint(len(TRAINED), (1,), generator=generator))]
        return Passkey(length).batch(BATCH, generator).input_ids.to(device)

    def loss(model: Any, ids: Any) -> Any:
        answer = cross_entropy(model(ids[:, :-1]), ids[:, -1])
        return answer + sum(model.attention.aux.values())

    model = build(*ARMS[arm], seed).to(device)
    fit(model, loss, batch, STEPS, LR, seed, warmup=min(WARMUP, STEPS))
    return model


def inside(model: Any, length: int, device: str, seed: int, spans: str = "chosen") -> tuple[Any, Any]:
    """Of questions with the digit behind the window: 1 where it is in the chosen spans; 1 where the answer is right."""
    import torch

    from regard.patterns.superlinear import Superlinear
    from regard.tasks.recall import Passkey

    generator = torch.Generator().manual_seed(1_000_000_007 + seed)

    class Random(Superlinear):
        """Any spans."""

        def scores(self, q: Any, key: Any, q_start: int, steps: Any) -> Any:
            """Noise."""
            return torch.rand(*q.shape[:3], len(steps), generator=generator).to(q)

    task = Passkey(length)
    batch = task.batch(QUESTIONS, generator)
    model.attention.route = Random() if spans == "random" else Superlinear()
    found: list[Any] = []
    right: list[Any] = []
    with torch.no_grad():
        for part, where in zip(batch.input_ids.split(100), batch.spans["key"].split(100), strict=True):
            right.append(model(part[:, :-1].to(device)).argmax(-1).cpu() == part[:, -1])
            routed = model.attention.routed
            place, start, stop = where[:, 0].to(device)[:, None, None], routed.start[:, :, 0], routed.stop[:, :, 0]
            found.append(((start <= place) & (place < stop)).any((1, 2)))
    behind = (task.distance(batch) > Superlinear().window.left).numpy()
    return torch.cat(found).cpu().numpy()[behind].astype(float), torch.cat(right).numpy()[behind].astype(float)


def _learned(device: str, seed: int) -> list[Finding]:
    seeds = range(seed, seed + SEEDS)
    models = {arm: [train(arm, s, device) for s in seeds] for arm in ARMS}

    def share(arm: str, length: int, spans: str = "chosen") -> tuple[Any, Any]:
        found = [inside(m, length, device, seed, spans) for m in models[arm]]
        return np.stack([x for x, _ in found]), np.stack([y for _, y in found])

    shares = {arm: {n: share(arm, n) for n in TESTED} for arm in ARMS}
    chance = share("gate", TESTED[0], "random")[0]
    means = {arm: {n: float(x.mean()) for n, (x, _) in each.items()} for arm, each in shares.items()}
    right = {arm: {n: float(y.mean()) for n, (_, y) in each.items()} for arm, each in shares.items()}

    def told(arm: str) -> str:
        return ", ".join(f"{means[arm][n]:.2f} at {n:,} ({right[arm][n]:.2f} answered right)" for n in TESTED)

    details = {
        "share": {arm: {str(n): x for n, x in each.items()} for arm, each in means.items()},
        "answered": {arm: {str(n): x for n, x in each.items()} for arm, each in right.items()},
        "random": float(chance.mean()),
        "by_seed": {arm: each[TESTED[0]][0].mean(1).tolist() for arm, each in shares.items()},
    }
    first, second = shares["gate"][TESTED[0]][0], shares["distilled"][TESTED[0]][0]
    gain = first - chance
    blind = means["no average"][TESTED[0]]
    shape = f"{STEPS} steps, {SEEDS} seeds, one layer over an average of {AVERAGE} tokens"
    return [
        Finding(
            "end-to-end",
            verdict(gain.mean() >= 0.3),
            float(gain.mean()),
            evidence.seeds_and_items(gain),
            floor=0.0,
            ceiling=1 - float(chance.mean()),
            baseline=float(chance.mean()),
            reason=f"{shape}: {told('gate')}; random spans {chance.mean():.2f}",
            details=details,
        ),
        Finding(
            "distilled",
            verdict(second.mean() >= 0.7 and blind <= 0.3),
            float(second.mean()),
            evidence.seeds_and_items(second),
            floor=float(chance.mean()),
            ceiling=1.0,
            baseline=float(first.mean()),
            reason=f"{shape}: {told('distilled')}; without the average {told('no average')}",
        ),
    ]
