"""Which tokens of an answer get more of its advantage, by where the model looks (arXiv 2510.13554).

Two signals of each token of a response: WAAD, how far back the locally looking heads see from it, and FAI, how much
later tokens look at it in the globally looking heads. From them, or without them, a factor for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy
from regard.watch.intervene import Site, trace

__all__ = ["STRATEGIES", "crediting", "random_gain", "rhythm", "token_gain"]

STRATEGIES = ("local", "global", "coupled")
NAMES = ("uniform", "random", *STRATEGIES)
MOST, SHARE, BACK, THRESHOLD = 1.5, 0.4, 3, 0.6
"""The largest gain, the share of tokens that get it, how far before an anchor a jump may lie, its least quantile."""


def crediting(
    name: str, start: int, *, near: int = 10, far: int = 100
) -> Callable[[nn.Module, Tensor, torch.Generator], Tensor] | None:
    """The ``credit`` of `regard.train.policy.grpo` by name; None for "uniform".

    "random" is `random_gain`; the paper's strategies read `rhythm` off the weights of all layers of the model that is
    trained, on the answers it has just given.

    Args:
        name: "uniform", "random", "local", "global" or "coupled".
        start: the first token of the answer.
        near, far: as in `rhythm`.

    Raises:
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "uniform":
        return None
    known: list[Anatomy] = []

    def gain(model: nn.Module, ids: Int[Tensor, "batch length"], generator: torch.Generator) -> Tensor:
        if name == "random":
            return random_gain(len(ids), ids.shape[1] - start, generator).to(ids.device)
        if not known:
            known.append(anatomy(model, (ids[:2],)))
        layers = [layer for layer, heads in enumerate(known[0].heads) if heads]
        weights = trace(model, (ids,), [Site(layer, "weights") for layer in layers], anatomy=known[0])
        return token_gain(*rhythm(list(weights.values()), start, near=near, far=far), name)

    return gain


def rhythm(
    weights: Sequence[Float[Tensor, "batch heads length length"]],
    start: int,
    *,
    window: int = 10,
    near: int = 10,
    far: int = 100,
    share: float = 0.3,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """WAAD and FAI of every token from `start` on, from the weights of one or several layers.

    ``WAAD_t = sum_s Pbar_local[t, s] min(t - s, window)``; ``FAI_s`` is the mean of ``Pbar_global[t, s]`` over rows
    ``s + near <= t <= s + far``, NaN where there is none. Local and global are the `share` of all heads that look
    nearest and farthest, by their mean distance over the rows of the response.

    Args:
        weights: of causal attention, one tensor a layer; short sequences, as they are matrices.
        start: the first row of the response.
        window, near, far: in tokens.
        share: of all heads, at least one.
    """
    p = torch.cat([w.detach().float() for w in weights], 1)
    n = p.shape[2]
    t, s = torch.arange(n, device=p.device)[:, None], torch.arange(n, device=p.device)
    distance = (p * (t - s).clamp(min=0)).sum(-1)[:, :, start:].mean((0, 2))
    heads = max(1, round(share * p.shape[1]))
    order = distance.argsort()
    local, distant = p[:, order[:heads]].mean(1), p[:, order[-heads:]].mean(1)
    back = (local * (t - s).clamp(0, window)).sum(-1)
    band = (t - s >= near) & (t - s <= far) & (t >= start)
    rows = band.sum(0)
    ahead = torch.where(rows > 0, (distant * band).sum(1) / rows.clamp(min=1), torch.nan)
    return back[:, start:], ahead[:, start:]


def token_gain(
    waad: Float[Tensor, "batch response"], fai: Float[Tensor, "batch response"], strategy: str, *, a: float = 0.5
) -> Float[Tensor, "batch response"]:
    """What each token's advantage is multiplied by.

    ``D_t = |WAAD_t - WAAD_(t+1)|``. "local": the 40 % of tokens with the largest D get 1.5. "global": the 40 % with the
    largest FAI, the anchors, get 1.5. "coupled": an anchor with WAAD at most the response's median that has, among the
    three tokens before it, one with D at or above the 60th percentile keeps ``1 + (1 - a) / 2`` and gives ``1 + a / 2``
    to the one of them with the largest D; other anchors get 1.5. A token with two claims has the larger.

    Args:
        waad, fai: as `rhythm` gives them; a NaN has no claim.
        strategy: "local", "global" or "coupled".
        a: how much of an anchor's gain is handed back.

    Raises:
        ValueError: another strategy, or a outside 0..1.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not 0 <= a <= 1:
        raise ValueError(f"a must be in [0, 1], got {a}")
    jump = (waad - waad.roll(-1, 1)).abs()
    jump[:, -1] = torch.nan  # no token after the last
    if strategy == "local":
        return _raised(_largest(jump))
    anchors = _largest(fai)
    gain = _raised(anchors)
    if strategy == "global":
        return gain
    low = waad <= waad.nanmedian(1, keepdim=True).values
    high = jump.nan_to_num(-1.0)
    enough = high >= torch.nanquantile(jump, THRESHOLD, 1, keepdim=True)
    length = waad.shape[1]
    before = torch.stack([_later(high, k) for k in range(1, BACK + 1)], 2)
    strong = torch.stack([_later(torch.where(enough, high, -1.0), k) for k in range(1, BACK + 1)], 2)
    handed = anchors & low & (strong.amax(2) >= 0)
    gain = torch.where(handed, gain.new_tensor(1 + (1 - a) / 2), gain)
    sample, at = handed.nonzero(as_tuple=True)
    to = at - 1 - before[sample, at].argmax(1)
    flat = gain.flatten().scatter_reduce(0, sample * length + to, gain.new_full((len(to),), 1 + a / 2), "amax")
    return flat.view_as(gain)


def random_gain(batch: int, response: int, generator: torch.Generator) -> Float[Tensor, "batch response"]:
    """1.5 for 40 % of the tokens of each response, drawn anew: as much credit as "local", without looking."""
    return _raised(_largest(torch.rand(batch, response, generator=generator)))


def _largest(x: Tensor) -> Tensor:
    """True at the 40 % of each row with the largest values, NaN left out."""
    count = max(1, round(SHARE * x.shape[1]))
    top = x.nan_to_num(-torch.inf).topk(count, 1).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter(1, top, True) & ~x.isnan()


def _raised(chosen: Tensor) -> Tensor:
    return torch.where(chosen, MOST, 1.0)


def _later(x: Tensor, steps: int) -> Tensor:
    """x moved to the right; -1 where nothing comes in."""
    out = torch.full_like(x, -1.0)
    out[:, steps:] = x[:, : max(x.shape[1] - steps, 0)]
    return out
