"""PowerAttention (arXiv 2503.03588): keys at power-of-two distances, whose reach doubles with each layer.

The passkey probe asks for one digit among filler; whether the asking token can know it is decided by its pattern's
reach alone. Every pattern spends the same number of keys a query. In the smoke size blocks are single tokens: power
{0, 1, 2, 3, 4, 8, 16, 32} against a window of 8. The full size has blocks of 8 tokens, 10 blocks a query, 128 blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "power-attention"
MODEL = None
CLAIMS = [
    Claim(
        "reach",
        "reach and depth from interval rows equal those of boolean matrix powers",
        kind="instrument",
        ours="share of (pattern, layers, query) whose reach is equal, and of patterns whose depth is",
        holds_if="all equal",
    ),
    Claim(
        "doubling",
        "reach doubles with each layer and has no holes",
        kind="mechanism",
        paper="2^d tokens in d layers",
        ours="first distance out of reach after 5 layers, blocks, window 5",
        holds_if="2^(L+2) - 3 after each of L = 1..5 layers (125 after 5)",
    ),
    Claim(
        "fewest-layers",
        "with 10 blocks a query it covers all before in fewer layers than other static patterns",
        kind="mechanism",
        ours="layers until the last of 128 blocks reaches all; the baseline is the best other pattern",
        holds_if="6, against 8 (stride slash), 16 (window) and never (dilated, LongNet)",
    ),
    Claim(
        "inside",
        "a trained model answers from inside its pattern's reach and guesses from outside",
        kind="mechanism",
        ours="lowest accuracy inside the reach over the patterns; the floor is the highest outside",
        holds_if="at least 0.95 inside and at most 0.15 outside, for every pattern",
    ),
    Claim(
        "passkey",
        "at the same keys a query it recalls from further back than a window",
        kind="mechanism",
        paper="5-40% better than other static sparse patterns",
        ours="accuracy on the passkey, power less window",
        holds_if="at least 0.3",
    ),
    Claim(
        "perplexity",
        "it costs no perplexity beside a window of as many keys",
        kind="mechanism",
        ours="perplexity a byte on held-out Python sources, over the window's",
        holds_if="perplexity at most 3% above the window's",
    ),
    Claim(
        "ruler",
        "it is ahead of other static patterns on long-context benchmarks",
        kind="replication",
        paper="RULER 32k average 50.74, window 34.91, stride slash 45.07",
        ours="RULER average of a fine-tuned model",
        holds_if="above window and stride slash",
        waits="needs a 7B model from the hub, fine-tuned under each pattern on GPUs",
    ),
    Claim(
        "speed",
        "it is faster than full attention at long prefill",
        kind="replication",
        paper="3.0x at 128K",
        ours="time of full attention over its time, 128K tokens on a GPU",
        holds_if="at least 2",
        waits="needs a GPU",
    ),
]
BLOCKS = 128  # of the exact claims
# The probe of a size: length, block, layers, width, heads, batch, steps, rate, seeds; its arms, two or all.
PROBE = {"smoke": (64, 1, 3, 48, 4, 24, 250, 4e-3, 1), "full": (1024, 8, 6, 64, 4, 16, 3000, 2e-3, 3)}
ARMS = {
    "smoke": ("power", "window"),
    "full": ("power", "window", "stride slash", "dilated", "LongNet", "random keys", "dense"),
}
VOCAB, TESTS = 16, 2000
BYTES = (8, 2000, 3e-3)  # batch, steps, rate
FULL_ONLY = "only the full size trains it (a GPU, or an hour of a CPU core)"


def patterns(block: int, length: int, seed: int = 0) -> dict[str, Any]:
    """The arms: 8 keys a query at block 1 (powers of two up to 32), 10 blocks a query at larger blocks."""
    from regard.patterns import BlockWindow, Causal, DilatedBlocks, LongNet, PowerOfTwo, StrideSlash

    if block == 1:
        return {
            "power": PowerOfTwo(1, 4, 0),
            "window": BlockWindow(1, 8, 0),
            "stride slash": StrideSlash(1, 5, 16, 0),
            "dilated": DilatedBlocks(1, 16, 2),
            "LongNet": LongNet(1, 8, 4),
            "random keys": random_keys(8, length, seed),
            "dense": Causal(),
        }
    return {
        "power": PowerOfTwo(block, 5, 1),
        "window": BlockWindow(block, 9, 1),
        "stride slash": StrideSlash(block, 6, 32, 1),
        "dilated": DilatedBlocks(block, 20, 2),
        "LongNet": LongNet(block, 8, 5),
        "random keys": random_keys(10 * block, length, seed),
        "dense": Causal(),
    }


def random_keys(keys: int, length: int, seed: int) -> Any:
    """A pattern: each query meets itself and as many earlier keys, drawn at random, as make ``keys`` in all."""
    import torch

    from regard.patterns import Pattern

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(length, length, generator=generator).masked_fill_(torch.ones(length, length).triu(1) > 0, -1)
    drawn.fill_diagonal_(2)
    table = torch.zeros(length, length, dtype=torch.bool)
    table.scatter_(1, drawn.topk(min(keys, length)).indices, True)
    table &= torch.ones(length, length).tril() > 0

    class RandomKeys(Pattern):
        def allows(self, q_idx: Any, kv_idx: Any, head: Any = None, batch: Any = None) -> Any:
            q_idx, kv_idx = torch.broadcast_tensors(q_idx, kv_idx)
            return table.to(q_idx.device)[q_idx.long(), kv_idx.long()]

    return RandomKeys()


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Judge the geometry exactly, then train the passkey probe; the full size trains byte models too."""
    findings = [_reach(), _doubling(), _fewest_layers(), *_probe(size, device, seed)]
    if size == "full":
        return [*findings, _perplexity(device, seed)]
    return [*findings, Finding("perplexity", "not measured", reason=FULL_ONLY)]


def _geometry() -> dict[str, Any]:
    return {name: p for name, p in patterns(2, 2).items() if name not in ("random keys", "dense")}


def _of_blocks() -> dict[str, Any]:
    """The five patterns with 10 blocks a query, a block being a token."""
    from dataclasses import replace

    return {name: replace(p, block=1) for name, p in _geometry().items()}


def _reach() -> Finding:
    import torch

    from regard.patterns.coverage import depth, reach

    length, same = BLOCKS, []
    for pattern in _of_blocks().values():
        at = torch.arange(length)
        once = pattern.allows(at[:, None], at[None]).double()
        found, deepest = torch.eye(length, dtype=torch.float64), None
        for layers in range(1, 2 * length):
            after = ((found @ once) > 0).double()
            if layers in (1, 2, 3, 5, 8):
                for query in (length - 1, length // 2 + 3):
                    mine = torch.zeros(length, dtype=torch.bool)
                    for lo, hi in reach(pattern, layers, query, length).tolist():
                        mine[lo:hi] = True
                    same.append(bool((mine == (after[query] > 0)).all()))
            if deepest is None and bool(after[-1].all()):
                deepest = layers
            if bool((after == found).all()):
                break
            found = after
        same.append(depth(pattern, length - 1, length) == deepest)
    share = float(np.mean(same))
    return Finding("reach", verdict(share == 1), share, ceiling=1.0, reason=f"{len(same)} comparisons")


def _doubling() -> Finding:
    from regard.patterns import PowerOfTwo
    from regard.patterns.coverage import first_gap

    length, layers = 512, range(1, 6)
    gaps = [first_gap(PowerOfTwo(1, 5, 0), n, length - 1, length) for n in layers]
    holds = gaps == [2 ** (n + 2) - 3 for n in layers]
    reason = f"first gap after 1..5 layers: {', '.join(map(str, gaps))}"
    last = gaps[-1]
    return Finding("doubling", verdict(holds), float(last) if last is not None else float(length), reason=reason)


def _fewest_layers() -> Finding:
    from regard.patterns.coverage import depth

    found = {name: depth(p, BLOCKS - 1, BLOCKS) for name, p in _of_blocks().items()}
    expected = {"power": 6, "window": 16, "stride slash": 8, "dilated": None, "LongNet": None}
    shown = ", ".join(f"{name} {'never' if n is None else n}" for name, n in found.items())
    others = [n for name, n in found.items() if name != "power" and n is not None]
    if found["power"] is None:
        return Finding("fewest-layers", "does not hold", float("inf"), reason=shown)
    state = verdict(found == expected)
    return Finding("fewest-layers", state, float(found["power"]), baseline=float(min(others)), reason=shown)


def build(pattern: Any, vocab: int, layers: int, dim: int, heads: int, seed: int) -> Any:
    """A decoder under a pattern, with rotary positions."""
    import torch

    from regard.models.decoder import Decoder

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(vocab, dim, layers, heads, pattern=pattern)


def _probe(size: str, device: str, seed: int) -> list[Finding]:
    import torch
    from torch import nn

    from regard.patterns.coverage import reach
    from regard.tasks.recall import Passkey
    from regard.train.simple import fit

    length, block, layers, dim, heads, batch, steps, rate, seeds = PROBE[size]
    task = Passkey(length, VOCAB)

    def last(model: Any, drawn: Any) -> Any:
        return model.head(model.hidden(drawn.input_ids[:, :-1].to(device))[:, -1])

    def loss(model: Any, drawn: Any) -> Any:
        return nn.functional.cross_entropy(last(model, drawn), drawn.labels[:, -1].to(device))

    right: dict[str, Any] = {}
    inside: dict[str, Any] = {}
    for arm in ARMS[size]:
        each, near = [], []
        for s in range(seed, seed + seeds):
            pattern = patterns(block, length, s)[arm]
            model = build(pattern, VOCAB, layers, dim, heads, s).to(device)
            fit(model, loss, lambda g: task.batch(batch, g), steps, rate, s, warmup=min(100, steps // 12))
            tests = task.batch(TESTS, torch.Generator().manual_seed(1_000_000_007 + s))
            with torch.no_grad():
                parts = [last(model, tests[i : i + 50]).argmax(-1).cpu() for i in range(0, TESTS, 50)]
            each.append((torch.cat(parts) == tests.labels[:, -1]).double().numpy())
            seen = torch.zeros(length, dtype=torch.bool)
            for lo, hi in reach(pattern, layers, length - 1, length).tolist():
                seen[lo:hi] = True
            near.append(seen[tests.spans["key"][:, 0]].numpy())
        right[arm], inside[arm] = np.array(each), np.array(near)
    within = {arm: float(right[arm][inside[arm]].mean()) for arm in right}
    beyond = {arm: float(right[arm][~inside[arm]].mean()) for arm in right if not inside[arm].all()}
    shown = ", ".join(
        f"{arm} {within[arm]:.3f}"
        + (f" and {beyond[arm]:.3f} outside, {inside[arm].mean():.0%} of the digits inside" if arm in beyond else "")
        for arm in right
    )
    reason = f"L={length}, {layers} layers of width {dim}, {steps} steps of {batch}, {seeds} seed{'s' * (seeds > 1)}: "
    details = {
        "accuracy_by_seed": {arm: r.mean(1).tolist() for arm, r in right.items()},
        "inside": within,
        "outside": beyond,
        "share_inside": {arm: float(i.mean()) for arm, i in inside.items()},
    }
    judged = [arm for arm in right if arm != "dense"]
    worst = min(judged, key=within.__getitem__)
    ok = within[worst] >= 0.95 and max(beyond.values()) <= 0.15
    gap = right["power"] - right["window"]
    return [
        Finding(
            "inside",
            verdict(ok),
            within[worst],
            floor=max(beyond.values()),
            ceiling=1.0,
            reason=reason + shown,
            details=details,
        ),
        Finding(
            "passkey",
            verdict(gap.mean() >= 0.3),
            float(gap.mean()),
            evidence.seeds_and_items(gap),
            floor=0.0,
            ceiling=float(inside["power"].mean() - inside["window"].mean()) * 0.9,
            reason=reason + ", ".join(f"{arm} {r.mean():.3f}" for arm, r in right.items()),
            details=details,
        ),
    ]


def _perplexity(device: str, seed: int) -> Finding:
    """Byte models under power and window, the same batches."""
    import torch

    from regard.tasks.bytetext import VOCAB as BYTE_VOCAB
    from regard.tasks.bytetext import StandardLibrary
    from regard.train.objectives import likelihood
    from regard.train.simple import fit

    length, block, layers, dim, heads, _, _, _, seeds = PROBE["full"]
    batch, steps, rate = BYTES
    train, test = StandardLibrary(), StandardLibrary("test")
    nats: dict[str, list[float]] = {"power": [], "window": [], "dense": []}
    for arm, found in nats.items():
        for s in range(seed, seed + seeds):
            model = build(patterns(block, length, s)[arm], BYTE_VOCAB, layers, dim, heads, s).to(device)

            def draw(g: Any) -> Any:
                return train.cut(batch, length, g).to(device)

            fit(model, likelihood, draw, steps, rate, s, warmup=steps // 10, decay=steps // 4)
            held = test.cut(64, length, torch.Generator().manual_seed(1_000_000_007 + s)).to(device)
            with torch.no_grad():
                found.append(float(torch.stack([likelihood(model, part) for part in held.split(8)]).mean()))
    ratio = np.exp(np.array(nats["power"]) - np.array(nats["window"]))
    shown = ", ".join(f"{arm} {np.mean(x):.3f}" for arm, x in nats.items())
    reason = f"nats a byte at {length} bytes, {steps} steps of {batch} windows, {seeds} seeds: {shown}"
    state = verdict(ratio.mean() <= 1.03)
    interval = evidence.bootstrap(ratio)
    return Finding("perplexity", state, float(ratio.mean()), interval, reason=reason, details={"nats": nats})
