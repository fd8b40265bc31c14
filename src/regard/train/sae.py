"""Sparse autoencoders on head outputs, and what a feature owes to heads and to source positions.

arXiv 2406.17759. The rows ``x = concat_h z_h`` are the head outputs before the output projection, all heads of a layer
side by side, ``[rows, heads * head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.patterns import Pattern

__all__ = ["SAE", "head_attribution", "head_share", "source_attribution", "train_sae"]


class SAE(nn.Module):
    """``f = relu(W_e (x / s - b_d) + b_e)``, ``xhat = s (W_d^T f + b_d)``, rows of W_d of unit norm.

    The scale s is a number kept beside the weights, so that x and xhat are in the units of the stream and lambda means
    the same at every layer; b_d does the centring and starts at the mean (see `train_sae`).

    Args:
        d: width of x.
        m: number of features.
        generator: draws W_d; W_e starts as a copy of it, the biases at 0. None: one seeded with 0.
    """

    scale: Tensor

    def __init__(self, d: int, m: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if d < 1 or m < 1:
            raise ValueError(f"d and m must be at least 1, got {d} and {m}")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        rows = nn.functional.normalize(torch.randn(m, d, generator=generator), dim=-1)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.encoder_bias, self.decoder_bias = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))

    def before(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows m"]:
        """The features before the relu."""
        return (x / self.scale - self.decoder_bias) @ self.encoder.T + self.encoder_bias

    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows m"]:
        """The features."""
        return self.before(x).relu()

    def decode(self, features: Float[Tensor, "*rows m"]) -> Float[Tensor, "*rows d"]:
        """The rows that features stand for."""
        return (features @ self.decoder + self.decoder_bias) * self.scale

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """xhat."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def without(self, x: Float[Tensor, "*rows d"], features: Int[Tensor, "some"]) -> Float[Tensor, "*rows d"]:
        """``x - s sum_k f_k W_d[k]`` over some features: rows less what these write; what no feature holds stays."""
        return x - self.scale * (self.encode(x)[..., features] @ self.decoder[features])

    @torch.no_grad()
    def l0(self, x: Float[Tensor, "*rows d"]) -> float:
        """Active features a row, on average."""
        return float((self.before(x) > 0).sum(-1).double().mean())

    @torch.no_grad()
    def normalize(self) -> None:
        """Decoder rows to unit norm."""
        self.decoder.div_(self.decoder.norm(dim=-1, keepdim=True))


def train_sae(
    stream: Float[Tensor, "n d"],
    m: int,
    lam: float,
    *,
    steps: int = 2000,
    batch: int = 512,
    lr: float = 2e-3,
    resample: int = 400,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> SAE:
    """A sparse autoencoder of m features, by Adam on ``||x/s - xhat/s||^2 + lam ||f||_1``, averaged over rows.

    s makes the mean squared distance of a row from the mean equal d. The rows of a step are drawn from the whole
    stream, so a document's rows do not come together. The gradient of W_d keeps only what turns its rows, which are set
    to unit norm after every step. Every `resample` steps of the first three quarters, each feature that was 0 on all
    rows since the last time starts again at a row drawn with probability proportional to its squared error
    (Bricken et al. 2023); its bias is 0, its encoder a fifth of the mean norm, its moments of Adam 0. The last fifth
    of the steps lowers the rate to 0.

    Args:
        stream: rows spread over documents.
        m: features, 16 to 32 times d in the paper.
        lam: weight of sparsity, at unit variance a dimension.
        steps, batch, lr: of the optimizer.
        resample: 0 never resamples.
        seed: of the weights and the rows.
        on_step: told (step, {"loss", "error", "l0", "resampled"}) after every step; `error` is the share of variance
            left.

    Raises:
        ValueError: fewer than two rows, rows that are all alike or not finite, a number out of range.
    """
    if len(stream) < 2 or not bool(stream.isfinite().all()):
        raise ValueError(f"stream must hold at least two rows, all finite, got shape {tuple(stream.shape)}")
    if lam < 0 or steps < 1 or batch < 1 or lr <= 0 or resample < 0:
        raise ValueError(
            "lam and resample must be at least 0, steps and batch at least 1, lr above 0, got "
            f"lam={lam}, resample={resample}, steps={steps}, batch={batch}, lr={lr}"
        )
    generator = torch.Generator().manual_seed(seed)
    x = stream.detach().float()
    mean = x.mean(0)
    scale = (x - mean).pow(2).mean().sqrt()
    if scale == 0:
        raise ValueError("stream must hold rows that differ, got the same row everywhere")
    sae = SAE(x.shape[1], m, generator).to(x.device)
    with torch.no_grad():
        sae.scale.copy_(scale)
        sae.decoder_bias.copy_(mean / scale)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    fired = torch.zeros(m, dtype=torch.bool, device=x.device)
    decay = max(1, steps // 5)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (steps - step) / decay)
        rows = x[torch.randint(len(x), (batch,), generator=generator).to(x.device)]
        features = sae.encode(rows)
        error = (rows - sae.decode(features)).div(scale).pow(2).sum(-1)
        loss = error.mean() + lam * features.sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        _turn_only(sae.decoder)
        optimizer.step()
        sae.normalize()
        fired |= (features > 0).any(0)
        again = 0
        if resample and (step + 1) % resample == 0:
            if step + 1 <= 0.75 * steps:
                again = _resample(sae, optimizer, ~fired, rows, error.detach(), generator)
            fired.zero_()
        if on_step is not None:
            l0 = float((features > 0).sum(-1).double().mean())
            left = float(error.detach().mean()) / x.shape[1]
            on_step(step, {"loss": float(loss.detach()), "error": left, "l0": l0, "resampled": again})
    return sae.requires_grad_(False)


@torch.no_grad()
def _turn_only(decoder: nn.Parameter) -> None:
    grad = decoder.grad
    assert grad is not None
    grad.sub_((grad * decoder).sum(-1, keepdim=True) * decoder)


@torch.no_grad()
def _resample(
    sae: SAE, optimizer: torch.optim.Adam, dead: Tensor, rows: Tensor, error: Tensor, generator: torch.Generator
) -> int:
    count = int(dead.sum())
    alive = ~dead
    weight = error.pow(2)
    if count == 0 or not bool(weight.sum() > 0):
        return 0
    drawn = torch.multinomial(weight.cpu(), count, replacement=True, generator=generator).to(rows.device)
    away = rows[drawn] / sae.scale - sae.decoder_bias
    direction = nn.functional.normalize(away, dim=-1)
    size = sae.encoder[alive].norm(dim=-1).mean() if bool(alive.any()) else torch.ones((), device=rows.device)
    sae.decoder[dead] = direction
    sae.encoder[dead] = 0.2 * size * direction
    sae.encoder_bias[dead] = 0
    for parameter in (sae.decoder, sae.encoder, sae.encoder_bias):
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name][dead] = 0
    return count


def head_share(sae: SAE, heads: int) -> Float[Tensor, "m heads"]:
    """``||W_d[f, slice h]|| / sum_h' ||W_d[f, slice h']||``: from parameters, how far a feature is each head's.

    Raises:
        ValueError: heads that do not divide the width.
    """
    norms = _by_head("heads", sae.decoder, heads).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True)


def head_attribution(
    sae: SAE, z: Float[Tensor, "*rows heads head_dim"], features: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows heads"]:
    """``W_e[f, slice h] . z_h / s``: what each head gives to one feature of each row.

    Its sum over heads plus ``b_e[f] - W_e[f] . b_d`` is the feature before the relu.
    """
    if z.shape[-2] * z.shape[-1] != sae.encoder.shape[1]:
        raise ValueError(f"z must have heads * head_dim = {sae.encoder.shape[1]}, got shape {tuple(z.shape)}")
    weights = _by_head("z", sae.encoder, z.shape[-2]).to(z)
    return (weights[features] * z).sum(-1) / sae.scale.to(z)


@torch.no_grad()
def source_attribution(
    sae: SAE,
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    places: Int[Tensor, "n 2"],
    features: Int[Tensor, "n"],
    *,
    pattern: Pattern | None = None,
    q_start: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "n kv_len"]:
    """``c_j = sum_h P^h_ij W_e[f, slice h] . v^h_j / s``: what each source position gives to a feature at row i.

    Its sum over j plus ``b_e[f] - W_e[f] . b_d`` is the feature before the relu. Each row costs O(kv_len): nothing of
    size q_len x kv_len is made, and keys and values stay one a group of query heads.

    Args:
        sae: trained on the concatenated outputs of all these heads.
        q, k, v: as attention used them, so after rotary positions: ``trace(model, inputs, Site(layer, "q"))``.
        places: (sample, row) of every attribution, the row counted in q.
        features: one a place.
        pattern: which pairs may meet; None: every pair.
        q_start: index of the first query; None: ``kv_len - q_len``.
        scale: of scores; None: ``head_dim^-1/2``.

    Raises:
        ValueError: heads that kv_heads do not divide, or that do not make up the width of the autoencoder.
    """
    heads, kv_heads, kv_len = q.shape[1], k.shape[1], k.shape[2]
    if heads % kv_heads or heads * v.shape[-1] != sae.encoder.shape[1]:
        raise ValueError(
            f"q, k, v must have heads a multiple of kv_heads and heads * v_dim = {sae.encoder.shape[1]}, got shapes "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    start = kv_len - q.shape[2] if q_start is None else q_start
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    encoder = _by_head("q", sae.encoder, heads).to(v)
    kv_idx, head_idx = torch.arange(kv_len, device=q.device), torch.arange(heads, device=q.device)
    found = torch.zeros(len(places), kv_len, dtype=v.dtype, device=v.device)
    for sample in places[:, 0].unique().tolist():
        mine = (places[:, 0] == sample).nonzero()[:, 0]
        rows, group = places[mine, 1], heads // kv_heads
        queries = q[sample][:, rows].unflatten(0, (kv_heads, group))
        scores = torch.einsum("kgnd,kjd->kgnj", queries, k[sample]).flatten(0, 1).float() * scale
        if pattern is not None:
            at = (start + rows)[None, :, None]
            scores = scores.masked_fill(
                ~_allowed(pattern, at, kv_idx[None, None], head_idx[:, None, None], sample), -torch.inf
            )
        read = encoder[features[mine]].transpose(0, 1).unflatten(0, (kv_heads, group))
        given = torch.einsum("kgnd,kjd->kgnj", read, v[sample]).flatten(0, 1)
        # A row that may see no key gives nothing.
        weights = scores.softmax(-1).nan_to_num(0.0).to(given)
        found[mine] = (weights * given).sum(0)
    return found / sae.scale.to(found)


def _allowed(pattern: Pattern, rows: Tensor, keys: Tensor, heads: Tensor, sample: int) -> Any:
    how = {} if pattern.heads is None else {"head": heads}
    how |= {} if pattern.samples is None else {"batch": torch.full_like(rows, sample)}
    return pattern.allows(rows, keys, **how)


def _by_head(name: str, weights: Tensor, heads: int) -> Tensor:
    if heads < 1 or weights.shape[1] % heads:
        raise ValueError(f"{name}: the width {weights.shape[1]} is not a multiple of {heads} heads")
    return weights.unflatten(1, (heads, -1))
