"""Concentric Causal Attention (arXiv 2410.15926): image tokens numbered and masked by rings, from the border inwards.

Under RoPE a text token weighs an image token by their distance in positions. In raster order the first rows of the
image are hundreds of positions away; by rings no image token is farther than half a side. The exact half of the paper
is checked here: mask, positions, distances, and what RoPE alone makes of them, with queries and keys that hold nothing
else (all ones, so a score is ``2 sum_i cos(distance * theta_i) / sqrt(head_dim)``).
"""

from __future__ import annotations

from itertools import product
from typing import Any

from regard.studies.protocol import Claim, Finding, verdict

PAPER = "concentric-causal"
MODEL = None
CLAIMS = [
    Claim(
        "mask",
        "the pattern and the positions are those of the released code",
        kind="instrument",
        ours="pairs and positions that differ, over prompts of several sizes",
        holds_if="0",
    ),
    Claim(
        "distance",
        "rings bring every image token within half an image side of the text",
        kind="mechanism",
        paper="at most half the side: 12 positions at 24 x 24 tokens",
        ours="mean distance in positions from an image token to the first text token",
        holds_if="the largest is at most half the side, and the mean below that of raster order",
    ),
    Claim(
        "row-bias",
        "under RoPE alone, text sees the rows of an image more evenly by rings than in raster order",
        kind="mechanism",
        paper="long-term decay of RoPE causes object hallucination (no figure for the weights)",
        ours="largest over smallest mass of a row, for the first text token after the image, by rings",
        holds_if="below half of raster order's, for every head_dim and base of RoPE tried",
    ),
    Claim(
        "row-bias-far",
        "text tokens farther down still see the rows more evenly by rings",
        kind="mechanism",
        ours="the same ratio as a share of raster order's, the largest over text up to 256 tokens after the image",
        holds_if="below half",
    ),
    Claim(
        "probe",
        "a model trained with rings finds objects equally well in every row of the image",
        kind="mechanism",
        paper="hallucination grows with the distance between object and instruction",
        ours="spread of a yes/no probe's accuracy over object rows, as a share of raster order's",
        holds_if="at most 0.7, with mean accuracy not lower; beside: mask alone, positions alone, raster in reverse",
        waits="needs a vision-language model trained with rings, and one in raster order to compare with",
    ),
    Claim(
        "benchmarks",
        "LLaVA-1.5 trained with concentric causal attention hallucinates less",
        kind="replication",
        paper="ahead of other mitigations on POPE, CHAIR and MME by large margins",
        ours="POPE accuracy",
        holds_if="above LLaVA-1.5's",
        waits="needs LLaVA-1.5's weights and training data, which cannot be fetched here",
    ),
]
SIDE = 24
HEAD_DIM, THETA = 64, 10_000.0
GRID = {
    "smoke": {"head_dim": (64, 128), "theta": (1e4,), "after": (256,)},
    "full": {"head_dim": (32, 64, 128, 256), "theta": (1e4, 5e5), "after": (16, 64, 256)},
}


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Compare mask and positions with the released loops, measure distances, and let RoPE alone weigh the rows."""
    return [_mask(), _distance(), *_rows(GRID[size], device)]


def released_positions(side: int) -> Any:
    """Ring of each image token as the released code draws it, frame by frame from the middle, [side, side]."""
    import torch

    position = torch.zeros(side, side, dtype=torch.long)
    top, left, bottom, right = side // 2 - 1, side // 2 - 1, side // 2, side // 2
    for ring in range(side // 2 - 1, -1, -1):
        position[top : bottom + 1, left] = position[top : bottom + 1, right] = ring
        position[top, left : right + 1] = position[bottom, left : right + 1] = ring
        top, left, bottom, right = top - 1, left - 1, bottom + 1, right + 1
    return position


def released_mask(before: int, side: int, after: int) -> tuple[Any, Any]:
    """The mask of a whole prompt and its positions as the released code makes them."""
    import torch

    image = side * side
    rings = released_positions(side).flatten() + before
    text = torch.arange(before + side // 2, before + side // 2 + after)
    positions = torch.cat([torch.arange(before), rings, text])
    mask = torch.ones(len(positions), len(positions)).tril().bool()
    mask[before : before + image, before : before + image] = False
    for ring in range(before, before + side // 2):
        keys = (positions <= ring) & (positions >= before)
        queries = (positions == ring) & (positions >= before)
        mask |= queries[:, None] & keys[None]
    return mask, positions


def row_mass(image: Any, text: int, head_dim: int, theta: float, device: str) -> Any:
    """Mass that a text token at position `text` puts on each row of the image, RoPE being all there is, [rows].

    Args:
        image: the positions of the image tokens, [rows, columns].
    """
    import torch

    from regard.kernels.attend import attend
    from regard.layers.position import Rope

    rows, n = image.shape[0], image.numel()
    rope = Rope(head_dim, theta).to(device)
    q = torch.ones(1, 1, 1, head_dim, dtype=torch.float64, device=device)
    k = torch.ones(1, 1, n, head_dim, dtype=torch.float64, device=device)
    q, k = rope.rotate(q, k, torch.tensor([text], device=device), image.flatten().to(device))
    row_of = torch.arange(n, device=device)[:, None] // image.shape[1] == torch.arange(rows, device=device)
    out: Any = attend(q, k, row_of.double()[None, None])
    return out[0, 0, 0].cpu()


def orders(side: int) -> dict[str, tuple[Any, int]]:
    """Positions of the image tokens and of the first text token after them, in each order."""
    import torch

    from regard.patterns import ring_count, ring_positions

    raster = torch.arange(side * side).view(side, side)
    rings = ring_positions(side, side).view(side, side)
    return {
        "rings": (rings, ring_count(side, side)),
        "raster": (raster, side * side),
        "reverse": (raster.flip(0, 1), side * side),
    }


def _mask() -> Finding:
    import torch

    from regard.patterns import concentric_causal, ring_count, ring_positions

    different, pairs = 0, 0
    for before, side, after in ((0, 2, 3), (5, 6, 0), (35, SIDE, 40)):
        mask, positions = released_mask(before, side, after)
        place = torch.arange(len(positions))
        different += int(
            (concentric_causal(before, side, side, after).allows(place[:, None], place[None]) != mask).sum()
        )
        following = torch.arange(after) + before + ring_count(side, side)
        ours = torch.cat([torch.arange(before), ring_positions(side, side, before), following])
        different += int((ours != positions).sum())
        pairs += mask.numel()
    return Finding("mask", verdict(different == 0), float(different), ceiling=0.0, reason=f"{pairs} pairs in 3 prompts")


def _distance() -> Finding:
    found = {name: (text - image).double() for name, (image, text) in orders(SIDE).items()}
    mean = {name: float(x.mean()) for name, x in found.items()}
    largest = {name: float(x.max()) for name, x in found.items()}
    holds = largest["rings"] <= SIDE / 2 and mean["rings"] < mean["raster"]
    reason = f"largest {largest['rings']:.0f} by rings, {largest['raster']:.0f} in raster order"
    details = {"mean": mean, "largest": largest}
    return Finding("distance", verdict(holds), mean["rings"], baseline=mean["raster"], reason=reason, details=details)


def _rows(grid: dict[str, tuple[float, ...]], device: str) -> list[Finding]:
    found: dict[str, dict[str, float]] = {}
    shares: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for head_dim, theta, after in product(grid["head_dim"], grid["theta"], (0, *grid["after"])):
        ratio = {}
        for name, (image, text) in orders(SIDE).items():
            mass = row_mass(image, text + int(after), int(head_dim), theta, device)
            ratio[name] = float(mass.max() / mass.min())
        setting = f"head_dim {head_dim}, theta {theta:g}, {after} tokens on"
        found[setting], shares[after == 0][setting] = ratio, ratio["rings"] / ratio["raster"]
    one = found[f"head_dim {HEAD_DIM}, theta {THETA:g}, 0 tokens on"]
    near, far = shares[True], shares[False]
    worst = max(far, key=lambda name: far[name])
    return [
        Finding(
            "row-bias",
            verdict(max(near.values()) < 0.5),
            one["rings"],
            ceiling=1.0,
            baseline=one["raster"],
            reason=f"at head_dim {HEAD_DIM}, theta {THETA:g}; over {len(near)} settings rings / raster is "
            f"{min(near.values()):.3f} to {max(near.values()):.3f}; raster read in reverse {one['reverse']:.1f}",
            details={"ratios": found},
        ),
        Finding(
            "row-bias-far",
            verdict(far[worst] < 0.5),
            far[worst],
            baseline=1.0,
            reason=f"{len(far)} settings, {min(far.values()):.3f} to {far[worst]:.3f}, largest at {worst}: "
            f"{found[worst]['rings']:.2f} by rings, {found[worst]['raster']:.2f} in raster order",
        ),
    ]
