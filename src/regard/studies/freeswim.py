"""FreeSwim (arXiv 2511.14712): videos larger than any in training, through windows of the trained size.

A video model that was trained on 16 x 16 tokens a frame makes 32 x 32 ones. Each query keeps a window of the trained
size, pushed inwards at the borders; a row with full attention runs beside it from the same latent and lends it its
cross-attention, so that what was asked for once is not painted in every window. Both start from the upsampled video
of the trained size, noised to 0.7.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "freeswim"
MODEL = "testbed:video"
FULL_ONLY = "only the full size samples videos"
CLAIMS = [
    Claim(
        "window",
        "the inward window is the neighbourhood of 2 d + 1 keys along each axis, over the whole of time",
        kind="instrument",
        ours="pairs that differ between the paper's rule and the pattern, over random grids",
        holds_if="none, and every query has exactly min(2 d_h + 1, H) min(2 d_w + 1, W) T keys",
    ),
    Claim(
        "border",
        "a window that is cut at the border instead leaves its queries fewer keys",
        kind="mechanism",
        ours="keys of a corner query under the cut window over those under the inward one, 32 x 32 and d = 8",
        holds_if="below 1 at the corner and 1 in the middle",
    ),
    Claim(
        "override",
        "the window row takes exactly the full row's cross-attention, and nothing else of it",
        kind="instrument",
        ours="largest difference of the two rows' cross-attention; of the full row's flow from that of the row alone",
        holds_if="the first 0, kept outputs those of the last full step, the flows within 1e-5: batches round apart",
    ),
    Claim(
        "repetition",
        "the override keeps what was asked for once from being painted several times",
        kind="replication",
        paper="shown in pictures",
        ours="mean number of objects beyond the trained size, one digit asked: window alone less with override",
        holds_if="at least 0.3",
    ),
    Claim(
        "detail",
        "windows keep the detail that full attention loses beyond the trained size",
        kind="replication",
        paper="VBench imaging quality and aesthetics above full attention",
        ours="sharpness (gradient energy) of windows with override over that of full attention",
        holds_if="at least 1.1",
    ),
    Claim(
        "caching",
        "the full row every second step, for the prompted branch alone, makes the whole more than twice as fast",
        kind="replication",
        paper="above 2x",
        ours="time of the sampling with a full row in every step over that with kept cross-attention",
        holds_if="above 2",
    ),
    Claim(
        "wan",
        "Wan2.1 makes 1080p and 4K videos without training, better than what was trained for it",
        kind="replication",
        paper="VBench, table 1",
        ours="the same figures",
        holds_if="within the paper's differences",
        waits="needs Wan2.1, a GPU and VBench's models, which cannot be had here",
    ),
]
GRIDS = {"smoke": 40, "full": 400}
BEYOND, HALF = (32, 32), 8
# Sampling: pixels beyond the trained size, videos, steps, guidance, shift of the times, how much noise, steps a cache.
SHAPE, NATIVE, VIDEOS, STEPS = (4, 128, 128), (4, 64, 64), 8, 10
GUIDANCE, SHIFT, STRENGTH, CACHE = 2.0, 3.0, 0.7, 2


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check window and override; in full, sample beyond the trained size."""
    loaded = _model(model, device)
    findings = [_window(GRIDS[size], seed), _border(), _override(loaded, device, seed)]
    if size == "smoke":
        return [*findings, *(Finding(c, "not measured", reason=FULL_ONLY) for c in ("repetition", "detail", "caching"))]
    return [*findings, *_beyond(loaded, device, seed)]


def _model(name: str | None, device: str) -> Any:
    from regard.models.dit import VideoDiT
    from regard.tasks import testbeds

    model = testbeds.load(name or MODEL, device=device).model
    if not isinstance(model, VideoDiT):
        raise ValueError(f"model must be a VideoDiT such as {MODEL}, got a {type(model).__name__}")
    return model


def inward(shape: tuple[int, int, int], half: tuple[int, int]) -> Any:
    """The pattern of the paper's window on (frames, rows, columns) of tokens."""
    from regard.patterns import Full, Grid
    from regard.patterns.axes import Neighborhood1d

    sides = zip(shape[1:], half, strict=True)
    return Grid((Full(), *(Neighborhood1d(n, min(2 * d + 1, n)) for n, d in sides)), shape)


def by_rule(shape: tuple[int, int, int], half: tuple[int, int]) -> Any:
    """The same from the paper's formula, ``[tokens, tokens]`` bool: every axis's interval written out."""
    import torch

    meets = torch.ones(shape[0], shape[0], dtype=torch.bool)
    for n, d in zip(shape[1:], half, strict=True):
        q, k = torch.arange(n)[:, None], torch.arange(n)
        below, above = (d - q).clamp(min=0), (d + q - n + 1).clamp(min=0)
        axis = (k >= q - d - above) & (k <= q + d + below)
        meets = (meets[:, None, :, None] & axis[None, :, None]).flatten(2, 3).flatten(0, 1)
    return meets


def _window(grids: int, seed: int) -> Finding:
    import torch

    generator = np.random.default_rng(seed)
    wrong, uneven = 0, 0
    for _ in range(grids):
        frames, rows, columns = (int(generator.integers(1, n)) for n in (4, 13, 13))
        half = (int(generator.integers(0, 7)), int(generator.integers(0, 7)))
        shape = (frames, rows, columns)
        at = torch.arange(frames * rows * columns)
        ours, paper = inward(shape, half).allows(at[:, None], at), by_rule(shape, half)
        wrong += int((ours != paper).sum())
        keys = frames * min(2 * half[0] + 1, rows) * min(2 * half[1] + 1, columns)
        uneven += int((paper.sum(1) != keys).sum())
    return Finding(
        "window",
        verdict(wrong == uneven == 0),
        wrong,
        ceiling=0,
        reason=f"{grids} grids; {uneven} queries with another number of keys",
    )


def _border() -> Finding:
    import torch

    rows, columns = (torch.arange(n) for n in BEYOND)

    def keys(at: tuple[int, int]) -> int:
        near = ((rows - at[0]).abs() <= HALF)[:, None] & ((columns - at[1]).abs() <= HALF)
        return int(near.sum())

    inner = (2 * HALF + 1) ** 2
    corner, middle = keys((0, 0)) / inner, keys((BEYOND[0] // 2, BEYOND[1] // 2)) / inner
    return Finding(
        "border",
        verdict(corner < 1 and middle == 1),
        corner,
        baseline=middle,
        reason=f"{keys((0, 0))} of {inner} keys a frame at the corner, all of them in the middle",
    )


def _override(model: Any, device: str, seed: int) -> Finding:
    """Rows 0 (windowed) and 1 (full) from one latent; then row 0 alone, with what was kept."""
    import torch

    from regard.steer.override import override

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, 2, 24, 24, generator=generator).to(device)
    t, words = torch.full((1,), 0.6, device=device), torch.tensor([[4, 0, 0]], device=device)
    both = (x.repeat(2, 1, 1, 1, 1), t.repeat(2), words.repeat(2, 1))
    given: dict[str, list[Any]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, seen, name=name: given.setdefault(name, []).append(seen[0].clone()))
        for name, module in model.named_modules()
        if name.endswith("cross_attention.out")
    ]
    try:
        with torch.no_grad(), Windowed(model, 1, (3, 3)), override(model, 1, 0, every=2):
            flow = model(*both)
            model(x, t, words)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        alone = model(x, t, words)
    rows = max(float((first[0] - first[1]).abs().max()) for first, _ in given.values())
    kept = max(float((then[0] - first[1]).abs().max()) for first, then in given.values())
    full = float((flow[1] - alone[0]).abs().max())
    apart = float((flow[0] - flow[1]).abs().max())
    return Finding(
        "override",
        verdict(rows == 0 and kept == 0 and full <= 1e-5 and apart > 0),
        rows,
        ceiling=0,
        reason=f"the full row's flow is off by {full:.1e} from that of the row alone, kept outputs by {kept:.1e}; the "
        f"window row's flow differs from the full row's by up to {apart:.2f}",
    )


class Windowed:
    """The first ``rows`` of a batch attend through the inward window, with the entropy scale; the others fully.

    Args:
        model: a `VideoDiT`.
        rows: how many, or more than there are: all.
        half: half of the trained rows and columns of tokens.
        scaled: with the paper's scale, ``sqrt(log 2n / log n)`` for the n tokens of a trained frame.
    """

    def __init__(self, model: Any, rows: int, half: tuple[int, int], scaled: bool = True) -> None:
        from regard.kernels.entropy_scale import entropy_scale
        from regard.watch.seam import Seam

        n = 4 * half[0] * half[1]
        self.model, self.rows, self.half = model, rows, half
        self.factor = entropy_scale(2 * n, n) if scaled else 1.0
        self._grid: tuple[int, int, int] = (0, 0, 0)
        self._seam = Seam(model, self._answer, edits=True)
        self._hook: Any = None

    def __enter__(self) -> Windowed:
        self._hook = self.model.register_forward_pre_hook(self._note)
        self._seam.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._hook.remove()
        self._seam.__exit__(kind, error, trace)

    def _note(self, _: Any, args: tuple[Any, ...]) -> None:
        self._grid = self.model.config.grid(tuple(args[0].shape[2:]))

    def _answer(self, call: Any) -> Any:
        import torch

        from regard.kernels.attend import attend

        if call.kind == "cross":
            return None
        q, k, v = (x[: self.rows] for x in (call.q, call.k, call.v))
        out: Any = attend(q, k, v, inward(self._grid, self.half), q_start=0, scale=call.scale * self.factor)
        if len(call.q) <= self.rows:
            return out
        q, k, v = (x[self.rows :] for x in (call.q, call.k, call.v))
        return torch.cat([out, torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=call.scale)])


def swim(model: Any, noise: Any, words: Any, init: Any, *, lend: bool, every: int = 1) -> Any:
    """Videos beyond the trained size from windows, from ``init`` noised to `STRENGTH`.

    Rows are windowed ones under the prompt and without it, then, where cross-attention is lent, full ones: both
    branches in every step, or with ``every`` above 1 the prompted one alone in every so many steps. Only the windowed
    rows' flow moves the latent.
    """
    from contextlib import nullcontext

    import torch

    from regard.models.dit import timesteps
    from regard.steer.override import override

    n, null = len(words), torch.full_like(words, model.config.null)
    windowed = torch.cat([words, null])
    lenders = windowed if every == 1 else words
    rows = list(range(len(lenders)))
    passing: Any = override(model, [2 * n + r for r in rows], rows, every=every) if lend else nullcontext()
    times = timesteps(STEPS, SHIFT, STRENGTH)
    x = (1 - times[0]) * init + times[0] * noise
    with torch.no_grad(), Windowed(model, 2 * n, (HALF, HALF)), passing:
        for now, after in itertools.pairwise(times):
            asked = torch.cat([windowed, lenders]) if lend and passing.due else windowed
            t = torch.full((len(asked),), now, device=x.device)
            flow = model(x.repeat(len(asked) // n, 1, 1, 1, 1), t, asked)
            told, plain = flow[:n], flow[n : 2 * n]
            x = x + (after - now) * (plain + GUIDANCE * (told - plain))
    return x


def _beyond(model: Any, device: str, seed: int) -> list[Finding]:
    import torch

    from regard.models.dit import sample
    from regard.tasks.fidelity import noise_for
    from regard.tasks.video_reading import counts, sharpness

    words = torch.zeros(VIDEOS, 3, dtype=torch.long, device=device)
    words[:, 0] = torch.arange(VIDEOS) % 10 + 1  # one digit each
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "shift": SHIFT}
    native = sample(model, noise_for(VIDEOS, NATIVE, seed).to(device), words, **how)
    scale = tuple(a / b for a, b in zip(SHAPE, NATIVE, strict=True))
    init = torch.nn.functional.interpolate(native, scale_factor=scale, mode="trilinear").clamp(-1, 1)
    noise = noise_for(VIDEOS, SHAPE, seed + 1).to(device)
    arms = {
        "full": lambda: sample(model, noise, words, **how, init=init, strength=STRENGTH),
        "window": lambda: swim(model, noise, words, init, lend=False),
        "override": lambda: swim(model, noise, words, init, lend=True),
        "cached": lambda: swim(model, noise, words, init, lend=True, every=CACHE),
    }
    made, seconds = {}, {}
    for name, arm in arms.items():
        began = time.perf_counter()
        made[name] = arm().cpu()
        seconds[name] = time.perf_counter() - began
    objects = {name: counts(x).double().mean(1).numpy() for name, x in ({"native": native.cpu()} | made).items()}
    sharp = {name: sharpness(x).double().numpy() for name, x in made.items()}
    told = ", ".join(f"{name} {v.mean():.2f}" for name, v in objects.items())
    details = {
        "objects": {k: v.tolist() for k, v in objects.items()},
        "sharpness": {k: v.tolist() for k, v in sharp.items()},
    }
    fewer, low, high = evidence.paired_difference(objects["window"], objects["override"])
    if objects["window"].mean() <= 1.3:
        repetition = Finding(
            "repetition", "not measured", reason=f"premise not met, windows alone do not repeat; objects: {told}",
            details=details,
        )  # fmt: skip
    else:
        repetition = Finding(
            "repetition", verdict(fewer >= 0.3), fewer, (low, high), floor=0.0,
            baseline=float(objects["full"].mean()), reason=f"objects: {told}", details=details,
        )  # fmt: skip
    gain = float(sharp["override"].mean() / sharp["full"].mean())
    pairs = np.stack([sharp["override"], sharp["full"]], 1)
    interval = evidence.bootstrap(pairs, lambda rows: float(rows[:, 0].mean() / rows[:, 1].mean()), seed=seed)
    faster = seconds["override"] / seconds["cached"]
    took = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    return [
        repetition,
        Finding(
            "detail", verdict(gain >= 1.1), gain, interval, floor=1.0,
            reason=", ".join(f"{name} {v.mean():.3f}" for name, v in sharp.items()),
        ),
        Finding("caching", verdict(faster > 2), faster, floor=1.0, reason=f"{VIDEOS} videos of {SHAPE}: {took}"),
    ]  # fmt: skip
