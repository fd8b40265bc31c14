"""Which input tokens a metric of the output depends on, by gradients or by changing inputs: one score a token.

Every method is `f(model, inputs, metric, ...) -> [batch, length]`, where the metric maps logits to one number a sample
(`regard.watch.effects`: logit difference, probability, loss) and scores are signed: positive where the token raises
the metric. Those that read attention are in `regard.steer.flow`. Padding, where the inputs say what it is, scores 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy
from regard.watch.edits import Edit
from regard.watch.effects import Metric
from regard.watch.places import find_logits
from regard.watch.probe import run
from regard.watch.scan import score, stack
from regard.watch.session import Session
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["grad_shap", "grad_x_input", "integrated_gradients", "lime", "occlusion", "valid_tokens"]

EMBED = Site(None, "embed")


def grad_x_input(
    model: nn.Module, inputs: Any, metric: Metric, *, anatomy: Anatomy | None = None
) -> Float[Tensor, "batch length"]:
    """`x_t . dm/dx_t`, x the token embeddings (Simonyan et al. 2014; Shrikumar et al. 2017)."""
    x, gradient = trace(model, inputs, EMBED, grad=True, metric=metric, anatomy=anatomy)[EMBED]
    return _scores(x * gradient, inputs)


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    steps: int = 50,
    baseline: Float[Tensor, "#batch #length dim"] | None = None,
    chunk: int = 10,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch length"]:
    """`(x - x') . mean_k dm/dx(x' + a_k (x - x'))`, `a_k = (k + 1/2) / steps` (Sundararajan et al. 2017).

    The scores of a sample add up to `m(x) - m(x')`, to the error of the midpoint rule.

    Args:
        baseline: x'; None: embeddings of zero.
        steps: points on the line; chunk: how many share a pass.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    x = trace(model, inputs, EMBED, anatomy=anatomy)[EMBED]
    start = torch.zeros_like(x) if baseline is None else baseline.expand_as(x)
    points = [start + (k + 0.5) / steps * (x - start) for k in range(steps)]
    total = sum(_gradients(model, inputs, metric, points, chunk, anatomy))
    return _scores((x - start) * total / steps, inputs)


def grad_shap(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    samples: int = 50,
    baselines: Float[Tensor, "n dim"] | None = None,
    noise: float = 0.0,
    seed: int = 0,
    chunk: int = 10,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch length"]:
    """`E[(x~ - x') . dm/dx(x' + a (x~ - x'))]`, a ~ U(0, 1), x' a drawn baseline, x~ = x + noise.

    (Lundberg & Lee 2017.)

    Args:
        samples: draws.
        baselines: vectors that stand for no information, one drawn for each token; None: zero.
        noise: standard deviation of x~, in units of that of the embeddings at hand.
        seed: of the draws.
    """
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    x = trace(model, inputs, EMBED, anatomy=anatomy)[EMBED]
    moved, points = [], []
    for _ in range(samples):
        start = torch.zeros_like(x)
        if baselines is not None:
            start = baselines[torch.randint(len(baselines), x.shape[:2], generator=generator).to(baselines.device)]
        jitter = torch.randn(x.shape, generator=generator).to(x) * (noise * x.std())
        share = torch.rand(len(x), 1, 1, generator=generator).to(x)
        moved.append(x + jitter - start)
        points.append(start + share * moved[-1])
    gradients = _gradients(model, inputs, metric, points, chunk, anatomy)
    return _scores(sum(d * g for d, g in zip(moved, gradients, strict=True)) / samples, inputs)


def occlusion(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    fill: Float[Tensor, "dim"] | None = None,
    chunk: int = 16,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch length"]:
    """`m(x) - m(x with token t's embedding replaced)` for every t (Zeiler & Fergus 2014).

    Args:
        fill: what stands in a token's place; None: zero.
        chunk: how many tokens share a pass.
    """
    x = trace(model, inputs, EMBED, anatomy=anatomy)[EMBED]
    away = torch.zeros_like(x[0, 0]) if fill is None else fill
    length = x.shape[1]
    keep = ~torch.eye(length, dtype=torch.bool, device=x.device)
    values = _masked(model, inputs, metric, x, away, keep[:, None].expand(-1, len(x), -1), chunk, anatomy)
    with torch.no_grad():
        plain = score(model, inputs, metric, anatomy=anatomy)
    return _silent(plain[:, None] - values.T, inputs)


def lime(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    samples: int = 512,
    fill: Float[Tensor, "dim"] | None = None,
    width: float = 0.25,
    penalty: float = 1e-3,
    words: Bool[Tensor, "batch length"] | None = None,
    seed: int = 0,
    chunk: int = 16,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch length"]:
    """Weights of a linear model of the metric in which tokens are kept (Ribeiro et al. 2016).

    z ~ Bernoulli(1/2) a token; the fit is weighted by `exp(-D^2 / width^2)`, D = 1 - cosine(z, 1), with a ridge
    penalty and an unpenalised offset.

    Args:
        samples: masks drawn; seed: of them.
        fill: the embedding of a token left out; None: zero.
        width, penalty: of the kernel, and of the ridge.
        words: tokens that may be left out, the others score 0; None: all but padding. Leave special tokens in, if the
            model reads its answer there.
    """
    x = trace(model, inputs, EMBED, anatomy=anatomy)[EMBED]
    away = torch.zeros_like(x[0, 0]) if fill is None else fill
    batch, length = x.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(samples, batch, length, generator=generator) < 0.5).to(x.device)
    valid = valid_tokens(inputs, batch, length)
    if words is not None:
        valid = words.to(x.device) if valid is None else valid & words.to(x.device)
    keep = keep if valid is None else keep | ~valid
    values = _masked(model, inputs, metric, x, away, keep, chunk, anatomy).double()
    out = torch.zeros(batch, length, dtype=torch.float64, device=x.device)
    for b in range(batch):
        real = torch.ones(length, dtype=torch.bool, device=x.device) if valid is None else valid[b]
        z = keep[:, b, real].double()
        cosine = z.sum(1).sqrt() / float(real.sum()) ** 0.5  # |z| of 0/1 entries against all ones
        weight = torch.exp(-((1 - cosine) / width).square())
        z1 = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        gram = (z1 * weight[:, None]).T @ z1
        ridge = penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        ridge[-1, -1] = 0
        out[b, real] = torch.linalg.solve(gram + ridge, (z1 * weight[:, None]).T @ values[:, b])[:-1]
    return out.to(x.dtype)


def _gradients(
    model: nn.Module, inputs: Any, metric: Metric, points: list[Tensor], chunk: int, anatomy: Anatomy | None
) -> list[Tensor]:
    """The gradient of the metric by the embeddings, at each of the points."""
    batch = len(points[0])
    found: list[Tensor] = []
    for some in batched(points, chunk):

        def split(logits: Tensor) -> Tensor:
            return torch.cat([metric(part) for part in logits.split(batch)])

        edit = Edit(EMBED, "set", value=torch.cat(some))
        read = trace(
            model, stack(inputs, len(some), batch), EMBED, grad=True, metric=split, edits=edit, anatomy=anatomy
        )
        found += read[EMBED][1].split(batch)
    return found


@torch.no_grad()
def _masked(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    x: Float[Tensor, "batch length dim"],
    fill: Float[Tensor, "dim"],
    keep: Bool[Tensor, "masks batch length"],
    chunk: int,
    anatomy: Anatomy | None,
) -> Float[Tensor, "masks batch"]:
    """The metric with the embeddings that a mask drops replaced by `fill`."""
    values = (torch.where(k[..., None], x, fill) for k in keep)
    return torch.stack([metric(logits) for logits in embedded(model, inputs, values, chunk, anatomy)])


def embedded(
    model: nn.Module,
    inputs: Any,
    values: Iterable[Float[Tensor, "batch length dim"]],
    chunk: int,
    anatomy: Anatomy | None = None,
) -> Iterator[Float[Tensor, "batch *rest"]]:
    """The logits with each of these embeddings in place of the tokens' own, `chunk` of them sharing a pass."""
    for some in batched(values, chunk):
        edit = [(Edit(EMBED, "set", value=torch.cat(some)), None)]
        with Session(model, edit, parts=anatomy, inputs=inputs):
            logits = find_logits(run(model, stack(inputs, len(some), len(some[0]))))[0]
        yield from logits.split(len(some[0]))


def batched(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The items in lists of `size`, the last one shorter."""
    source = iter(items)
    while some := list(islice(source, size)):
        yield some


def valid_tokens(inputs: Any, batch: int, length: int) -> Bool[Tensor, "batch length"] | None:
    """False for padding, where the inputs hold an attention mask that says so."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == (batch, length) else None


def _scores(x: Tensor, inputs: Any) -> Float[Tensor, "batch length"]:
    return _silent(x.sum(-1), inputs)


def _silent(scores: Float[Tensor, "batch length"], inputs: Any) -> Float[Tensor, "batch length"]:
    """Scores with 0 at padding."""
    valid = valid_tokens(inputs, *scores.shape)
    return scores if valid is None else scores.masked_fill(~valid, 0)
