"""Faster neighborhood attention (arXiv 2403.04690): windows as dense tiles, against the gather of every query's keys.

The naive way gathers the w keys and values of every query and multiplies them query by query. The tiled way is
`attend` with a `Neighborhood`: tiles of queries and keys, masks inside partial tiles only. Both get tensors in memory
order, so the tiled arm pays for its permutations. What depends on the pattern alone is made once for both: the index of
the gather, and the tiles. Arms take turns; ratios are medians over turns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

from regard.studies.protocol import Claim, Finding, verdict
from regard.studies.timing import peak_bytes, ratio, take_turns

PAPER = "faster-na"
MODEL = None
FULL_ONLY = "only the full size times it"
CLAIMS = [
    Claim(
        "equal",
        "tiled neighborhood attention equals the gather of every query's keys, forward and backward",
        kind="instrument",
        ours="largest difference of outputs and gradients: 1-D to 3-D, even windows, strides, dilations, causal axes",
        holds_if="at most 1e-5 in float32",
    ),
    Claim(
        "faster",
        "tiles beat the gather",
        kind="mechanism",
        paper="fused 2-D kernels beat naive ones by 581 % in half precision, unfused GEMM kernels by 272 % in full",
        ours="time of the gather over time of the tiles, 64 x 64 tokens, window 13 x 13, float32",
        holds_if="at least 1.5",
    ),
    Claim(
        "memory",
        "tiles take a fraction of the gather's memory",
        kind="mechanism",
        paper="memory stays constant in the window",
        ours="peak bytes of the tiles over those of the gather, beyond the inputs, same case",
        holds_if="at most 0.25",
    ),
    Claim(
        "constant",
        "memory does not grow with the window",
        kind="mechanism",
        paper="memory stays constant in the window",
        ours="peak bytes at window 25 x 25 over those at 7 x 7, beyond the inputs",
        holds_if="at most 1.1",
    ),
    Claim(
        "dense",
        "below a density of 0.15 neighborhoods are faster than dense attention",
        kind="mechanism",
        paper="a window runs at the speed of dense fused attention on fewer keys",
        ours="time of dense attention over time of the tiles, the least of 56 x 56 and 4096 tokens, windows 7 to 49",
        holds_if="above 1 wherever the density is at most 0.15",
    ),
    Claim(
        "gpu",
        "in half precision on a GPU, fused 2-D kernels beat the gather",
        kind="replication",
        paper="581 % faster on average in 2-D, half precision",
        ours="time of the gather over time of the tiles, the least over 2-D windows 7 to 49, 56 x 56 tokens, float16",
        holds_if="at least 3",
    ),
]
SHAPE, WINDOW, HEAD_DIM = (64, 64), 13, 32
TURNS = {"smoke": 11, "full": 25}
GROWTH = (7, 25)
SWEEP = [(shape, w) for shape in ((56, 56), (4096,)) for w in (7, 13, 25, 49)]
DENSITY = 0.15
# shape, window, stride, dilation, causal
SAMPLES: list[tuple[Any, ...]] = [
    ((40,), 7, 1, 1, False),
    ((41,), 6, 4, 3, False),
    ((37,), 8, 5, 1, True),
    ((9, 14), (4, 5), (1, 3), (2, 1), False),
    ((11, 12), 5, 2, 1, (True, False)),
    ((5, 6, 7), (3, 4, 3), (1, 2, 3), 1, (True, False, False)),
    ((64, 64), 13, 1, 1, False),
]


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Compare with the gather, time both, count their memory; the full size sweeps windows against dense attention."""
    findings = [_equal(device, seed), _faster(size, device, seed), _memory(device, seed), _constant(device, seed)]
    if size != "full":
        return findings + [Finding(claim, "not measured", reason=FULL_ONLY) for claim in ("dense", "gpu")]
    findings.append(_dense(device, seed))
    if device != "cuda":
        return [*findings, Finding("gpu", "not measured", reason=f"needs a GPU, this ran on {device}")]
    return [*findings, _gpu(seed)]


def keys_of(grid: Any) -> Any:
    """The keys of every query of a neighborhood, ``[tokens, most keys]``, and which of them are there, written apart
    from the pattern: the window of the nearest coordinates along each axis, in plain loops."""
    import torch

    axes = []
    for axis in grid.axes:
        along = []
        for q in range(axis.length):
            residue, i = q % axis.dilation, q // axis.dilation
            n = len(range(residue, axis.length, axis.dilation))
            first = i - i % axis.stride
            if axis.causal:
                leader = min(first + axis.stride - 1, n - 1)
                keys = range(max(leader - axis.window + 1, 0), i + 1)
            else:
                leader = min(first + axis.stride // 2, n - 1)
                start = min(max(leader - axis.window // 2, 0), n - axis.window)
                keys = range(start, start + axis.window)
            along.append([residue + j * axis.dilation for j in keys])
        axes.append(along)
    step = [prod(grid.shape[d + 1 :]) for d in range(len(axes))]
    rows = []
    for cell in product(*(range(n) for n in grid.shape)):
        each = [[k * s for k in along[x]] for along, x, s in zip(axes, cell, step, strict=True)]
        rows.append([sum(k) for k in product(*each)])
    most = max(map(len, rows))
    index = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    there = torch.arange(most) < torch.tensor([len(row) for row in rows])[:, None]
    return index, None if bool(there.all()) else there


def gather_attention(q: Any, k: Any, v: Any, index: Any, there: Any = None) -> Any:
    """Naive neighborhood attention: gather every query's keys, one row of scores a query."""
    import torch

    scores = (q[..., None, :] @ k[:, :, index].mT) * q.shape[-1] ** -0.5
    if there is not None:
        scores = scores.masked_fill(~there[:, None], -torch.inf)
    return (scores.softmax(-1) @ v[:, :, index])[..., 0, :]


def _inputs(n: int, device: str, seed: int, heads: int = 1, dtype: Any = None) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, 1, heads, n, HEAD_DIM, generator=generator)
    return tuple(x.to(device, dtype) for x in qkv)


def _tiles(q: Any, k: Any, v: Any, grid: Any) -> Any:
    from regard.kernels.attend import attend

    return attend(q, k, v, grid, q_start=0, backend="blocked" if q.device.type == "cpu" else "auto")


def _equal(device: str, seed: int) -> Finding:
    from regard.patterns import Neighborhood

    worst: dict[str, float] = {}
    for sample in SAMPLES:
        grid = Neighborhood(*sample)
        index, there = (x if x is None else x.to(device) for x in keys_of(grid))
        inputs = [x.requires_grad_() for x in _inputs(prod(grid.shape), device, seed)]
        weight = _inputs(prod(grid.shape), device, seed + 1)[0]
        results = []
        q, k, v = inputs
        for out in (_tiles(q, k, v, grid), gather_attention(q, k, v, index, there)):
            results.append([out.detach(), *_grads((out * weight).sum(), inputs)])
        worst[str(grid)] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    figure = max(worst.values())
    reason = f"{len(worst)} neighborhoods; the worst is {max(worst, key=lambda name: worst[name])}"
    return Finding("equal", verdict(figure <= 1e-5), figure, ceiling=0.0, reason=reason, details={"differences": worst})


def _grads(loss: Any, inputs: list[Any]) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad(loss, inputs)


def _arms(
    shape: tuple[int, ...], window: int, device: str, seed: int, dtype: Any = None
) -> dict[str, Callable[[], Any]]:
    """Gather, tiles, dense attention, and dense attention under the neighborhood's mask."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from regard.patterns import Neighborhood

    grid, n = Neighborhood(shape, window), prod(shape)
    q, k, v = _inputs(n, device, seed, dtype=dtype)
    index = keys_of(grid)[0].to(device)
    place = torch.arange(n, device=device)
    mask = grid.allows(place[:, None], place)
    return {
        "gather": lambda: gather_attention(q, k, v, index),
        "tiles": lambda: _tiles(q, k, v, grid),
        "dense": lambda: sdpa(q, k, v),
        "masked": lambda: sdpa(q, k, v, attn_mask=mask),
    }


def _faster(size: str, device: str, seed: int) -> Finding:
    import torch

    with torch.no_grad():
        seconds = take_turns(_arms(SHAPE, WINDOW, device, seed), TURNS[size], device)
    figure, interval = ratio(seconds["gather"], seconds["tiles"])
    baseline, _ = ratio(seconds["gather"], seconds["masked"])
    medians = {name: float(sorted(each)[len(each) // 2]) for name, each in seconds.items()}
    reason = (
        f"medians {1e3 * medians['gather']:.1f} ms against {1e3 * medians['tiles']:.1f} ms, permutations included; "
        f"baseline is dense attention under a mask ({1e3 * medians['masked']:.1f} ms); dense attention without one "
        f"takes {1e3 * medians['dense']:.1f} ms"
    )
    details = {"seconds": medians, "turns": TURNS[size], "threads": torch.get_num_threads()}
    return Finding("faster", verdict(figure >= 1.5), figure, interval, 1.0, None, baseline, reason, details)


def _memory(device: str, seed: int) -> Finding:
    import torch

    with torch.no_grad():
        peaks = {name: peak_bytes(arm, device) for name, arm in _arms(SHAPE, WINDOW, device, seed).items()}
    figure = peaks["tiles"] / peaks["gather"]
    reason = f"{peaks['tiles'] / 2**20:.1f} MiB against {peaks['gather'] / 2**20:.1f} MiB; baseline is dense attention"
    baseline = peaks["dense"] / peaks["gather"]
    return Finding(
        "memory", verdict(figure <= 0.25), figure, baseline=baseline, reason=reason, details={"peak_bytes": peaks}
    )


def _constant(device: str, seed: int) -> Finding:
    import torch

    peaks: dict[str, list[int]] = {"tiles": [], "gather": []}
    with torch.no_grad():
        for window in GROWTH:
            arms = _arms(SHAPE, window, device, seed)
            arms["tiles"]()  # what depends on the pattern alone is made once
            for name, found in peaks.items():
                found.append(peak_bytes(arms[name], device))
    figure, baseline = (after / before for before, after in (peaks["tiles"], peaks["gather"]))
    shown = " and ".join(f"{p / 2**20:.1f}" for p in peaks["tiles"])
    reason = f"{shown} MiB; the gather's grows {baseline:.1f} times"
    return Finding(
        "constant",
        verdict(figure <= 1.1),
        figure,
        floor=1.0,
        baseline=baseline,
        reason=reason,
        details={"peaks": peaks},
    )


def _dense(device: str, seed: int) -> Finding:
    """Time of dense attention over time of the tiles, at every shape and window of the sweep."""
    import torch

    found = {}
    for shape, window in SWEEP:
        arms = _arms(shape, window, device, seed, torch.float16 if device == "cuda" else None)
        with torch.no_grad():
            seconds = take_turns({name: arms[name] for name in ("dense", "tiles")}, TURNS["full"], device)
        found[shape, window] = ratio(seconds["dense"], seconds["tiles"])
    density = {(shape, window): (window / shape[0]) ** len(shape) for shape, window in SWEEP}
    least = min((at for at in found if density[at] <= DENSITY), key=lambda at: found[at][0])
    shown = ", ".join(f"{r:.2f} at {density[at]:.3f} ({len(at[0])}-D)" for at, (r, _) in found.items())
    details = {
        "sweep": [[*at, density[at], *of] for at, of in found.items()],
        "device": device,
        "threads": torch.get_num_threads(),
    }
    return Finding(
        "dense",
        verdict(found[least][0] > 1),
        *found[least],
        floor=1.0,
        ceiling=1 / density[least],
        reason=f"ratio at each density: {shown}",
        details=details,
    )


def _gpu(seed: int) -> Finding:
    import torch

    found = {}
    for shape, window in SWEEP:
        if len(shape) == 2:
            arms = _arms(shape, window, "cuda", seed, torch.float16)
            with torch.no_grad():
                seconds = take_turns({n: arms[n] for n in ("gather", "tiles")}, TURNS["full"], "cuda")
            found[window] = ratio(seconds["gather"], seconds["tiles"])
    window = min(found, key=lambda w: found[w][0])
    shown = ", ".join(f"{r:.1f} at {w} x {w}" for w, (r, _) in found.items())
    return Finding("gpu", verdict(found[window][0] >= 3), *found[window], floor=1.0, reason=f"ratio: {shown}")
