"""Routing Transformer (arXiv 2003.05997): queries and keys of one k-means cluster attend to each other.

Two rules of who is in a cluster run side by side. The paper's fills each with its nearest queries and keys of the whole
sequence, so that whether a query is in a group at all hangs on later tokens; ours takes the last keys with the query's
own nearest centroid, of which no part hangs on them. Centroids learn on other sequences than those judged.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "routing-transformer"
MODEL = None
CLAIMS = [
    Claim(
        "groups",
        "attention in groups is the mean over a query's groups of softmax attention inside each",
        kind="instrument",
        ours="largest difference from dense masked attention of each group, float64",
        holds_if="at most 1e-10, with queries in several groups and in none",
    ),
    Claim(
        "update",
        "centroids move by the paper's moving average over queries and keys, while training alone",
        kind="instrument",
        ours="largest difference from the formula, float64",
        holds_if="at most 1e-10, and the centroids refuse to move in evaluation",
    ),
    Claim(
        "mass",
        "learned clusters keep more of the attention's mass than a window of equal width",
        kind="mechanism",
        paper="content-based sparsity beats local attention (18.3 to 15.8 perplexity on Wikitext-103)",
        ours="mass kept of causal attention, 512 tokens of 16 kinds, 16 clusters of 32, rows 256 on; the paper's rule",
        holds_if="at least the window of 32 keys + 0.3",
    ),
    Claim(
        "learned",
        "it is learning that finds the clusters",
        kind="mechanism",
        ours="mass kept after 200 updates, less that of the random centroids they started from; the paper's rule",
        holds_if="at least 0.2",
    ),
    Claim(
        "membership",
        "under the paper's rule nothing before a token depends on it",
        kind="mechanism",
        paper="used as an autoregressive model",
        ours="share of changes of one token that change an output before it, causal mask inside the groups",
        holds_if="0",
    ),
    Claim(
        "causal-membership",
        "a rule of which nothing depends on later tokens keeps as much mass",
        kind="mechanism",
        ours="mass kept by the last keys, 25 to 32 of them, with the query's nearest centroid",
        holds_if="no change of a token changes an output before it, and at least the paper's rule's mass - 0.02",
    ),
    Claim(
        "loss",
        "half of the heads routed predict text with far repeats better than local heads at equal operations",
        kind="mechanism",
        ours="nats a byte of a 4-layer decoder, 1,024 bytes: local + routed (nothing of later tokens) less all local",
        holds_if="at most -0.02 in the mean over seeds",
    ),
    Claim(
        "wikitext",
        "Wikitext-103: 15.8 perplexity, against 18.3 of local attention",
        kind="replication",
        paper="15.8 vs 18.3",
        ours="test perplexity",
        holds_if="at least 2 less than local attention",
        waits="needs Wikitext-103 and days of training, or the authors' weights, which cannot be fetched here",
    ),
    Claim(
        "imagenet-64",
        "ImageNet-64: 3.43 bits a dimension against 3.44 of sparse transformers",
        kind="replication",
        paper="3.43 vs 3.44 bits/dim; PG-19 33.2 perplexity",
        ours="test bits a dimension",
        holds_if="at most 3.44",
        waits="needs ImageNet-64 and weeks of training, which cannot be had here",
    ),
]
LENGTH, KINDS, DIM, NOISE, AMP = 512, 16, 32, 0.5, 2.0
CLUSTERS, UPDATES, DECAY = 16, 200, 0.9
HEADS, PROBES = 2, 24
SEEDS = {"smoke": 3, "full": 5}
# of the decoders of the full size, and their training
TEXT = {"length": 1024, "dim": 128, "heads": 8, "layers": 4, "window": 256, "clusters": 32}
TRAIN = {"rows": 8, "steps": 1500, "seeds": 3, "tests": 64}
LR = 2e-3
RULES: tuple[Literal["balanced", "nearest"], ...] = ("balanced", "nearest")  # the paper's, and ours


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Judge both rules on clustered queries and keys; in full, train decoders on text."""
    drawn = [_clusters(s, device) for s in range(seed, seed + SEEDS[size])]
    found = [_groups(seed), _update(seed), *_mass(drawn, seed), *_membership(drawn)]
    if size == "smoke":
        return [*found, Finding("loss", "not measured", reason="only the full size trains decoders")]
    return [*found, _loss([seed + s for s in range(TRAIN["seeds"])], device)]


# -- clustered queries and keys


def _clusters(seed: int, device: str) -> dict[str, Any]:
    """What one draw of centres gives: routes of both rules before and after learning, and sequences to judge on."""
    import torch

    from regard.layers.routing import KMeansRoute
    from regard.tasks.qk import clusters_qk

    generator = torch.Generator().manual_seed(seed)
    many = (UPDATES + 1) * LENGTH  # of the same centres; each stretch of LENGTH is a sequence
    q, k = clusters_qk(many, KINDS, DIM, NOISE, AMP, generator, heads=HEADS)
    q, k = (x.unflatten(2, (UPDATES + 1, LENGTH))[0].transpose(0, 1).to(device) for x in (q, k))
    routes = {}
    for rule in RULES:
        for learned in (False, True):
            start = torch.Generator().manual_seed(1_000_003 + seed)
            route = KMeansRoute(HEADS, DIM, CLUSTERS, members=rule, decay=DECAY, generator=start).to(device)
            if learned:
                route.train()
                for step in range(UPDATES):
                    route.update(q[step : step + 1], k[step : step + 1])
            routes[rule, learned] = route.eval()
    return {"seed": seed, "q": q[UPDATES:], "k": k[UPDATES:], "routes": routes}


def _kept(q: Any, k: Any, pattern: Any) -> Any:
    """Mass kept by each head in the rows that are judged, mean over them, [heads]."""
    from regard.kernels.recall import kept_mass
    from regard.patterns import Causal, Routed, per_head

    if isinstance(pattern, Routed) and pattern.repeats == "mean":  # the keys of all groups of a query together
        pattern = per_head([pattern.of(h) for h in range(q.shape[1])])
    return kept_mass(q, k, pattern, within=Causal())[0, :, LENGTH // 2 :].double().mean(-1).cpu().numpy()


def last_keys(length: int, width: int) -> Any:
    """The window of ``width`` keys up to the query's own, as a routed pattern."""
    import torch

    from regard.patterns import Causal, Routed

    at = torch.arange(length)[:, None] - width + 1 + torch.arange(width)
    at = at.masked_fill(at < 0, length).sort(-1).values  # -1 stands after the listed keys
    return Routed.tokens(
        at.masked_fill(at == length, -1).int()[None, None], q_len=length, kv_len=length, within=Causal()
    )


def _mass(drawn: list[dict[str, Any]], seed: int) -> list[Finding]:
    import torch

    from regard.kernels.recall import oracle_blocks, random_blocks
    from regard.patterns import Causal

    local = last_keys(LENGTH, LENGTH // CLUSTERS)
    mass: dict[str, list[Any]] = {}
    alone = []
    for one in drawn:
        q, k = one["q"], one["k"]
        found: dict[str, Any] = {
            f"{rule} {learned}": route(q, k, within=Causal()) for (rule, learned), route in one["routes"].items()
        }
        members = found["balanced True"].q_order[0]
        alone += [1 - len(set(row[row >= 0].tolist())) / LENGTH for row in members]
        here = local.to(q.device)
        found |= {
            "local": here,
            "random": random_blocks(here, torch.Generator().manual_seed(one["seed"])),
            "oracle": oracle_blocks(q, k, here),
        }
        for name, pattern in found.items():
            mass.setdefault(name, []).append(_kept(q, k, pattern))
    each = {name: np.stack(values) for name, values in mass.items()}  # [seed, head]
    mean = {name: float(values.mean()) for name, values in each.items()}
    paper, ours = each["balanced True"], each["nearest True"]
    draws = f"{len(drawn)} draws of {HEADS} heads"
    none = float(np.mean(alone))
    gain = paper - each["balanced False"]
    return [
        Finding(
            "mass",
            verdict(mean["balanced True"] >= mean["local"] + 0.3),
            mean["balanced True"],
            evidence.seeds_and_items(paper, seed=seed),
            floor=mean["random"],
            ceiling=mean["oracle"],
            baseline=mean["local"],
            reason=f"{draws}; {100 * none:.0f} % of queries are in no cluster and keep 0",
            details={"mass": mean, "queries_in_no_cluster": none},
        ),
        Finding(
            "learned",
            verdict(gain.mean() >= 0.2),
            float(gain.mean()),
            evidence.seeds_and_items(gain, seed=seed),
            floor=0.0,
            ceiling=mean["oracle"] - mean["balanced False"],
            reason=f"{draws}: {mean['balanced True']:.3f} after {UPDATES} updates, {mean['balanced False']:.3f} before",
        ),
        Finding(
            "causal-membership",
            verdict(_leaks(drawn, "nearest") == 0 and mean["nearest True"] >= mean["balanced True"] - 0.02),
            mean["nearest True"],
            evidence.seeds_and_items(ours, seed=seed),
            floor=mean["random"],
            ceiling=mean["oracle"],
            baseline=mean["balanced True"],
            reason=f"{draws}; {_leaks(drawn, 'nearest'):.0%} of changes reach an earlier output",
        ),
    ]


def _leaks(drawn: list[dict[str, Any]], rule: str) -> float:
    """Share of changes of one token, over draws and places, that change an output before it.

    By more than 1e-5: rows that run beside others are rounded in another order.
    """
    import torch

    from regard.kernels.attend import attend
    from regard.patterns import Causal

    changed = []
    for one in drawn:
        route, k = one["routes"][rule, True], one["k"]
        generator = torch.Generator().manual_seed(one["seed"])
        places = torch.randint(LENGTH // 2, LENGTH, (PROBES // len(drawn) or 1,), generator=generator).tolist()
        v = torch.randn(k.shape, generator=generator).to(k)

        def out(k: Any, route: Any = route, v: Any = v) -> Any:
            return attend(AMP * k, k, v, route(AMP * k, k, within=Causal()), q_start=0)

        before = out(k)
        for t in places:
            other = k.clone()
            other[:, :, t] = other[:, :, t].roll(DIM // 2, -1)  # another vector of the same mean and length
            changed.append(float((out(other) - before)[:, :, :t].abs().max()) > 1e-5)
    return float(np.mean(changed))


def _membership(drawn: list[dict[str, Any]]) -> list[Finding]:
    share = _leaks(drawn, "balanced")
    told = "a later token takes an earlier one's place in a group: outputs before it change, though the mask is causal"
    reason = told if share else "no change of a token reached an earlier output"
    return [
        Finding(
            "membership",
            verdict(share == 0),
            share,
            floor=0.0,
            ceiling=1.0,
            baseline=_leaks(drawn, "nearest"),
            reason=reason,
        )
    ]


# -- the parts against their definitions


def _small(seed: int) -> Any:
    import torch

    from regard.layers.routing import KMeansRoute

    generator = torch.Generator().manual_seed(seed)
    route = KMeansRoute(2, 8, 6, width=7, decay=DECAY, generator=generator).double()
    return route, [torch.randn(2, 2, 41, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def _groups(seed: int) -> Finding:
    import torch

    from regard.kernels.attend import attend
    from regard.patterns import Causal

    route, (q, k, v) = _small(seed)
    found = route(q, k, within=Causal())
    out = cast(torch.Tensor, attend(q, k, v, found, q_start=0))
    width, later = found.block[0], torch.ones(41, 41, dtype=torch.bool).triu(1)
    total, counts = torch.zeros_like(out), torch.zeros(2, 2, 41, 1, dtype=torch.float64)
    for group in range(route.centroids.shape[1]):
        at = slice(group * width, (group + 1) * width)
        of_q, of_k = (
            torch.zeros(2, 2, 42, dtype=torch.bool).scatter_(2, order[:, :, at] % 42, True)[..., :41]
            for order in (found.q_order, found.kv_order)
        )
        scores = (q @ k.mT / 8**0.5).masked_fill(~of_k[:, :, None] | later, -torch.inf)
        part = torch.nan_to_num(scores.softmax(-1)) @ v
        total, counts = total + part * of_q[..., None], counts + of_q[..., None]
    worst = float((out - total / counts.clamp(min=1)).abs().max())
    several, none = int((counts > 1).sum()), int((counts == 0).sum())
    return Finding(
        "groups",
        verdict(worst <= 1e-10 and several and none),
        worst,
        floor=0.0,
        reason=f"{counts.numel()} queries, {several} of them in several groups, {none} in none",
    )


def _update(seed: int) -> Finding:
    import torch
    import torch.nn.functional as F

    route, (q, k, _) = _small(seed)
    start = route.centroids.clone()
    want = DECAY * start
    for x in (q, k):
        x = F.layer_norm(x, (8,))
        nearest = torch.cdist(x, start[None].expand(2, -1, -1, -1)).argmin(-1)
        for head in range(2):
            for c in range(start.shape[1]):
                mine = x[:, head][nearest[:, head] == c]
                want[head, c] += (1 - DECAY) / 2 * (mine.mean(0) if len(mine) else start[head, c])
    route.train().update(q, k)
    worst = float((route.centroids - want).abs().max())
    try:
        route.eval().update(q, k)
        still = False
    except ValueError:
        still = True
    reason = "evaluation refuses to move them" if still else "centroids moved in evaluation"
    return Finding("update", verdict(worst <= 1e-10 and still), worst, floor=0.0, reason=reason)


# -- text


def far_repeats(rows: int, length: int, generator: Any, split: str = "train") -> Any:
    """Text of which a stretch of an eighth comes back after half of the sequence, ``[rows, length]``."""
    import torch

    from regard.tasks.bytetext import StandardLibrary

    ids = StandardLibrary(split).cut(rows, length, generator)
    size = length // 8
    for row in range(rows):
        first = int(torch.randint(1, length // 2 - size, (), generator=generator))
        again = int(torch.randint(first + length // 2, length - size + 1, (), generator=generator))
        ids[row, again : again + size] = ids[row, first : first + size].clone()
    return ids


def decoder(arm: str, seed: int) -> Any:
    """A decoder whose heads are local, dense, or half local and half routed by a rule of `RULES`.

    Operations of attention are equal for local and routed arms: a routed head costs its groups and the products with
    the centroids, and the window of the local arm is the mean of what both kinds of heads cost.
    """
    import torch

    from regard.layers.multihead import MultiHead
    from regard.layers.position import Rope
    from regard.layers.routing import RoutingAttention
    from regard.models.decoder import Decoder
    from regard.patterns import Causal, Window
    from regard.tasks.bytetext import VOCAB

    t = TEXT
    dim, heads, clusters, window = t["dim"], t["heads"], t["clusters"], t["window"]
    width = -(-t["length"] // clusters)
    equal = (window + 1 + width + clusters) // 2 - 1  # keys beside the query's own

    def layer(_: int) -> Any:
        rope = Rope(dim // heads)
        if arm in RULES:
            return RoutingAttention(dim, heads, clusters, window=window, members=arm, position=rope)
        return MultiHead(dim, heads, position=rope, pattern=Window(equal, 0) if arm == "local" else None)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(VOCAB, dim, t["layers"], heads, pattern=Causal(), attention=layer)


def _loss(seeds: list[int], device: str) -> Finding:
    import torch

    from regard.train.objectives import likelihood
    from regard.train.simple import fit

    length, losses = TEXT["length"], cast(dict[str, list[list[float]]], {})
    for arm in ("local", *RULES, "dense"):
        for seed in seeds:
            net = decoder(arm, seed).to(device)
            steps = TRAIN["steps"]
            fit(
                net,
                likelihood,
                lambda g: far_repeats(TRAIN["rows"], length, g).to(device),
                steps,
                LR,
                seed,
                warmup=steps // 10,
                decay=steps // 3,
            )
            tests = far_repeats(TRAIN["tests"], length, torch.Generator().manual_seed(99 + seed), "test").to(device)
            with torch.no_grad():
                each = [float(likelihood(net, rows)) for rows in tests.split(TRAIN["rows"])]
            losses.setdefault(arm, []).append(each)
    found = {arm: np.array(values) for arm, values in losses.items()}  # [seed, batch]
    gain = found["nearest"] - found["local"]
    mean = {arm: float(x.mean()) for arm, x in found.items()}
    return Finding(
        "loss",
        verdict(gain.mean() <= -0.02),
        float(gain.mean()),
        evidence.seeds_and_items(gain, seed=seeds[0]),
        floor=0.0,
        ceiling=mean["dense"] - mean["local"],
        baseline=mean["balanced"] - mean["local"],
        reason=f"{len(seeds)} seeds, nats a byte: "
        + ", ".join(f"{a} {x:.3f}" for a, x in mean.items())
        + "; balanced leaks",
        details={"by_seed": {arm: x.mean(1).tolist() for arm, x in found.items()}},
    )
