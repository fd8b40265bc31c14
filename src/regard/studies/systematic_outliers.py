"""Systematic outliers (arXiv 2502.06415): where the largest activations sit, and attention that has no need of them.

The ratio of a layer is `max |h| / mean |h|` over a sample's tokens and features at its output. A model of this size
reaches no ratio of 1000, so ratios are compared. The outlier tokens of a layer are the three of 256 with the largest
activation; the rising layer of a sample is the one whose output gains most in ratio. Strong delimiters are line ends
and .;:!?, weak tokens are function words, spaces and all other marks (our reading; the text is Python source).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import DEFAULT_MODEL, Claim, Finding, verdict

PAPER = "systematic-outliers"
TRAINS = "trains nine models of four layers, dim 256; `--size full` does"
CLAIMS = [
    Claim(
        "variants",
        "a learned key and value beside the tokens' need z and lse of one fused call alone",
        kind="instrument",
        ours="largest difference of variants (c) and (d) from an explicit concatenation",
        holds_if="at most 1e-5",
    ),
    Claim(
        "places",
        "activation outliers sit at the first token, at delimiters and at weak tokens",
        kind="mechanism",
        paper="initial token, '.', line ends, and words such as 'and', 'of'",
        ours="share of outlier tokens after the first of the text that are of these classes; the floor is their share "
        "of all such tokens",
        holds_if="every text's first token is an outlier, and the share is better than the floor",
    ),
    Claim(
        "attention",
        "the same tokens are outliers of the attention weights",
        kind="mechanism",
        ours="share of the mass of later layers' rows on the tokens that were outliers below; the floor is what "
        "uniform rows give them, the baseline what as many random tokens get",
        holds_if="better than the floor and the baseline",
    ),
    Claim(
        "parameters",
        "the MLP that makes the outliers holds outlier columns",
        kind="mechanism",
        ours="largest `max |W_c| / mean |W|` over columns of the rising layer's W_down; the floor is that of a "
        "Gaussian matrix, the baseline the largest of the other layers",
        holds_if="above both",
    ),
    Claim(
        "scaling-removes",
        "explicit scaling removes the outliers, a fixed bias does not",
        kind="mechanism",
        paper="GPT-2 124M: only context-aware scaling is free of them",
        ours="ratio of (e), 2 sigmoid(W x + b), over that of plain attention; the baseline is that of (b), a bias",
        holds_if="below 0.3, and the baseline above 0.5",
    ),
    Claim(
        "convergence",
        "without outliers a model learns no worse",
        kind="mechanism",
        paper="removal speeds convergence",
        ours="loss on held-out text of plain attention less that of (e), nats a byte",
        holds_if="the interval reaches above 0",
    ),
    Claim(
        "compression",
        "without outliers 8-bit integers cost less",
        kind="mechanism",
        ours="what the loss rises by with weights and activations rounded to 8 bits: plain attention less (e)",
        holds_if="better than 0",
    ),
]
SEEDS, SAMPLES, LENGTH, TOKENS, DRAWS = {"smoke": 3, "full": 10}, 8, 256, 3, 5
# Steps, rows a step, dim, layers, heads, learning rate.
TRAINING = (2000, 16, 256, 4, 8, 1e-3)
ARMS = {"softmax": 2, "value": 2, "scale": 2, "correction": 1, "pair": 1, "sigmoid": 1}  # kinds and seeds
STRONG = set(".;:!?\n")
WORDS = (
    "a an and as at be but by def else for from has have if import in is it its not of on or return self that the then "
    "this to was were which will with"
)
WEAK = set(WORDS.split())


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = DEFAULT_MODEL) -> list[Finding]:
    """Look at a trained model; at full size also train the six attentions."""
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    looks = [look(loaded, s, device) for s in range(seed, seed + SEEDS[size])]
    findings = [_variants(seed), _places(looks), _attention(looks), _parameters(looks)]
    if size == "smoke":
        return findings + [Finding(c.id, "not measured", reason=TRAINS) for c in CLAIMS[4:]]
    arms = {kind: [trained(kind, s, device) for s in range(seed, seed + n)] for kind, n in ARMS.items()}
    return findings + judge(arms)


def look(loaded: Any, seed: int, device: str) -> dict[str, Any]:
    """Outliers of one draw of texts: classes of tokens, mass on them, columns of the rising layer."""
    import torch

    import regard
    from regard.measures.sinks import massive
    from regard.tasks.retoken import texts
    from regard.watch.settings import Watch

    ids = texts(loaded, SAMPLES, LENGTH, seed).to(device)
    settings = Watch((), per_sample=("received_raw",), stream=True, tokens=False)
    with torch.no_grad(), regard.watch(loaded.model, statistics=settings) as watched:
        loaded.model(input_ids=ids, use_cache=False)
    atlas = watched.atlas
    most = atlas.need("resid_absmax").values  # [layer, sample, position]
    ratio = most.max(-1) / atlas.need("resid_absmean").values.mean(-1)  # [layer, sample]
    top = np.argsort(-most, axis=-1, kind="stable")[..., :TOKENS]
    highest = ratio.argmax(0)
    kinds = np.array([classes([loaded.tokenizer.decode([t]) for t in row]) for row in ids.tolist()])
    rows = np.arange(SAMPLES)
    there = top[highest, rows]  # [sample, token] of each sample's most outlying layer
    marked = np.isin(np.take_along_axis(kinds, there, 1), ("strong", "weak"))
    later = there != 0
    received = atlas.need("received_raw").values  # [layer, head, sample, key]
    seen_by = LENGTH - np.arange(LENGTH)
    share = received * seen_by / LENGTH  # of all mass, on each key
    uniform = np.array([(1 / np.arange(k + 1, LENGTH + 1)).sum() for k in range(LENGTH)]) / LENGTH

    def mass(keys: Any) -> Any:
        """Mean over layers above the first and heads of the share on each layer's keys [layer - 1, sample, token]."""
        picked = np.take_along_axis(share[1:], keys[:, None], -1)
        return picked.sum(-1).mean((0, 1))

    generator = np.random.default_rng(seed)
    random = [generator.permuted(np.tile(np.arange(LENGTH), (*top[1:].shape[:2], 1)), axis=-1) for _ in range(DRAWS)]
    columns = down_columns(loaded.model, ids)
    rising = np.diff(ratio, axis=0, prepend=1.0).argmax(0)
    return {
        "ratio": ratio,
        "massive": {str(r): int(massive(atlas, ratio=float(r), over="mean").sum()) for r in (10, 30, 100, 1000)},
        "first": (there == 0).any(1),
        "marked": np.array([m[i].mean() if i.any() else np.nan for m, i in zip(marked, later, strict=True)]),
        "base": np.isin(kinds[:, 1:], ("strong", "weak")).mean(1),
        "classes": {k: float((np.take_along_axis(kinds, there, 1) == k).mean()) for k in CLASSES},
        "mass": mass(top[:-1]),
        "uniform": uniform[top[:-1]].sum(-1).mean(0),
        "random": np.mean([mass(r[..., :TOKENS]) for r in random], axis=0),
        "columns": columns,
        "rising": rising,
    }


CLASSES = ("initial", "strong", "weak", "other")


def classes(tokens: list[str]) -> list[str]:
    """The class of each token of a text: of the first, of what it spells, or of the word that it is part of."""
    found, text, at = [], "".join(tokens), 0
    words = {i: m.group().lower() for m in re.finditer(r"[A-Za-z]+", text) for i in range(m.start(), m.end())}
    for place, token in enumerate(tokens):
        letters = [words[i] for i in range(at, at + len(token)) if i in words]
        at += len(token)
        if place == 0:
            found.append("initial")
        elif set(token) & STRONG:
            found.append("strong")
        elif letters:
            found.append("weak" if all(word in WEAK for word in letters) else "other")
        else:
            found.append("other" if any(c.isalnum() for c in token) else "weak")
    return found


def down_columns(model: Any, ids: Any) -> list[tuple[float, float]]:
    """Largest outlier column of every layer's W_down, and of a Gaussian matrix of its shape."""
    import torch

    import regard
    from regard.watch.parameters import outlier_columns

    parts, found = regard.anatomy(model, {"input_ids": ids[:2]}), []
    for name in parts.mlp:
        linear = [m for m in model.get_submodule(str(name)).modules() if isinstance(m, torch.nn.Linear)][-1]
        noise = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0))
        found.append((float(outlier_columns(linear.weight).max()), float(outlier_columns(noise).max())))
    return found


def trained(kind: Any, seed: int, device: str) -> dict[str, Any]:
    """One decoder over bytes with this attention: its largest ratio, and its losses, plain and in 8 bits."""
    import torch

    from regard.layers.outlier_free import OutlierFree
    from regard.layers.position import Rope
    from regard.models.decoder import Decoder
    from regard.tasks.bytetext import VOCAB, StandardLibrary
    from regard.train.diagnostics import eight_bits
    from regard.train.objectives import likelihood
    from regard.train.select import document_losses
    from regard.train.simple import fit

    steps, rows, dim, layers, heads, lr = TRAINING
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Decoder(
            VOCAB, dim, layers, heads, attention=lambda _: OutlierFree(kind, dim, heads, position=Rope(dim // heads))
        ).to(device)
    text, held_out = StandardLibrary(), StandardLibrary("test")
    fit(
        network,
        likelihood,
        lambda g: text.cut(rows, LENGTH, g).to(device),
        steps,
        lr,
        seed,
        warmup=steps // 20,
        decay=steps // 4,
    )
    ids, ratios = held_out.cut(4 * SAMPLES, LENGTH, torch.Generator().manual_seed(10_000_019 + seed)), []

    def note(_module: Any, _given: Any, out: Any) -> None:
        size = out.abs()
        ratios.append((size.amax((1, 2)) / size.mean((1, 2))).cpu().numpy())

    hooks = [block.register_forward_hook(note) for block in network.blocks]
    with torch.no_grad():
        network(ids.to(device))
    for hook in hooks:
        hook.remove()
    plain = document_losses(network, ids, inputs=lambda x: (x,)).numpy()
    with eight_bits(network):
        rounded = document_losses(network, ids, inputs=lambda x: (x,)).numpy()
    return {"ratio": float(np.mean(ratios, axis=1).max()), "loss": plain, "rounded": rounded}


def _variants(seed: int) -> Finding:
    import torch

    from regard.layers.outlier_free import OutlierFree
    from regard.patterns import Causal

    worst, heads, length = 0.0, 4, 96
    kinds: tuple[Any, ...] = ("correction", "pair")
    for kind in kinds:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            layer: Any
            layer, x = OutlierFree(kind, 64, heads), torch.randn(2, length, 64)
            for p in (layer.weigh.key, layer.weigh.value):
                p.normal_()
            q, k, v = (
                f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj)
            )
            key, value = (p[:, None].expand(2, -1, -1, -1) for p in (layer.weigh.key, layer.weigh.value))
            allowed = torch.nn.functional.pad(torch.ones(length, length, dtype=torch.bool).tril(), (1, 0), value=True)
            scores = q @ torch.cat([key, k], 2).mT / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            own = weights[..., 1:] @ v
            own = own / weights[..., 1:].sum(-1, keepdim=True) if kind == "correction" else own
            explicit = layer.o_proj((own + weights[..., :1] * value).transpose(1, 2).flatten(2))
            worst = max(worst, float((layer(x, pattern=Causal()) - explicit).abs().max()))
    return Finding(
        "variants", verdict(worst <= 1e-5), worst, floor=0.0, reason=f"{length} tokens, {heads} heads, float32"
    )


def _both(looks: list[dict[str, Any]], name: str) -> Any:
    return np.stack([x[name] for x in looks]).astype(float)


def _places(looks: list[dict[str, Any]]) -> Finding:
    marked, base = _both(looks, "marked"), _both(looks, "base")
    first = float(_both(looks, "first").mean())
    low, high = evidence.seeds_and_items(marked)
    better = evidence.seeds_and_items(marked - base)[0] > 0
    ratios = _both(looks, "ratio").mean((0, 2))
    shown = ", ".join(f"{r:.0f}" for r in ratios)
    details: dict[str, Any] = {"ratio_by_layer": ratios.tolist(), "first": first}
    details["classes"] = {k: float(np.mean([x["classes"][k] for x in looks])) for k in CLASSES}
    details["flagged"] = {r: int(sum(x["massive"][r] for x in looks)) for r in looks[0]["massive"]}
    reason = f"max/mean by layer {shown}; the first token is an outlier in {first:.0%} of texts"
    figure = float(marked.mean())
    return Finding(
        "places",
        verdict(better and first == 1),
        figure,
        (low, high),
        float(base.mean()),
        1.0,
        reason=reason,
        details=details,
    )


def _attention(looks: list[dict[str, Any]]) -> Finding:
    mass, uniform, random = (_both(looks, name) for name in ("mass", "uniform", "random"))
    better = all(evidence.seeds_and_items(mass - other)[0] > 0 for other in (uniform, random))
    reason = f"{TOKENS} of {LENGTH} tokens, mean of heads and of layers above the first"
    interval = evidence.seeds_and_items(mass)
    return Finding(
        "attention",
        verdict(better),
        float(mass.mean()),
        interval,
        float(uniform.mean()),
        1.0,
        float(random.mean()),
        reason,
    )


def _parameters(looks: list[dict[str, Any]]) -> Finding:
    ours, gaussian = np.array(looks[0]["columns"]).T
    rising = np.stack([x["rising"] for x in looks])
    own = ours[rising]
    others = np.array([np.delete(ours, layer).max() for layer in range(len(ours))])[rising]
    layer = int(np.bincount(rising.ravel()).argmax())
    reason = f"layer {layer} rises in {float((rising == layer).mean()):.0%} of texts; largest column by layer: "
    reason += ", ".join(f"{x:.1f}" for x in ours)
    state = verdict(evidence.seeds_and_items(own - others)[0] > 0 and own.mean() > gaussian.max())
    return Finding(
        "parameters", state, float(own.mean()), evidence.seeds_and_items(own), float(gaussian.max()), None,
        float(others.mean()), reason,
    )  # fmt: skip


def judge(arms: dict[str, list[dict[str, Any]]]) -> list[Finding]:
    """What the trained attentions say."""
    plain, bias, scaled = (arms[kind] for kind in ("softmax", "value", "scale"))
    over = [s["ratio"] / p["ratio"] for s, p in zip(scaled, plain, strict=True)]
    fixed = float(np.mean([b["ratio"] / p["ratio"] for b, p in zip(bias, plain, strict=True)]))
    ratios = {kind: [x["ratio"] for x in found] for kind, found in arms.items()}
    losses = {kind: [float(x["loss"].mean()) for x in found] for kind, found in arms.items()}
    rises = {kind: [float((x["rounded"] - x["loss"]).mean()) for x in found] for kind, found in arms.items()}
    figure = float(np.mean(over))
    better = np.stack([p["loss"] - s["loss"] for p, s in zip(plain, scaled, strict=True)])
    saved = np.stack([p["rounded"] - p["loss"] - s["rounded"] + s["loss"] for p, s in zip(plain, scaled, strict=True)])
    gain, save = evidence.seeds_and_items(better), evidence.seeds_and_items(saved)
    seeds = f"{len(over)} seeds of (a), (b), (e), one of the others"
    return [
        Finding(
            "scaling-removes", verdict(figure < 0.3 and fixed > 0.5), figure, evidence.bootstrap(over),
            baseline=fixed, reason=seeds, details={"ratio": ratios},
        ),
        Finding(
            "convergence", verdict(gain[1] > 0), float(better.mean()), gain, reason=seeds, details={"loss": losses}
        ),
        Finding("compression", verdict(save[0] > 0), float(saved.mean()), save, reason=seeds, details={"rise": rises}),
    ]  # fmt: skip
