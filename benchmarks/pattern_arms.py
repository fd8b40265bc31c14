"""The cases of benchmarks/patterns.py: what is computed, by whom, and what it must take at least."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels import blocked_choice
from regard.kernels.attend import attend
from regard.patterns import BlockLayout, Causal, Neighborhood, Segments, Tiled, Window, tile_cost
from regard.patterns.pattern import Pattern

HEADS, DIM, WINDOW, BLOCK = 4, 64, 1024, 128


@dataclass
class Case:
    """Arms that compute the same, or what they are compared with: the first arm."""

    name: str
    arms: dict[str, Callable[[], Any]]
    pairs: int  # that the pattern allows, one head
    dense_pairs: int  # that the first arm computes
    before: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds spent once, by arm and by what
    notes: dict[str, str] = field(default_factory=dict)  # by arm
    backward: bool = False
    repeats: int = 7
    between: Callable[[], None] = lambda: None  # before each repeat: what changes from call to call
    copies: float = 2.0  # tensors as large as q that must be read and written, in pairs of one read and one write
    missing: dict[str, str] = field(default_factory=dict)  # arms that cannot run here, and why


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    sync(device)
    start = time.perf_counter()
    run()
    sync(device)
    return time.perf_counter() - start


def tensors(length: int, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    made = (torch.randn(1, HEADS, length, DIM, generator=g).to(device, dtype) for _ in range(3))
    return tuple(x.requires_grad_(grad) for x in made)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Callable[[], Any]:
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def blocked(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **kwargs: Any) -> Callable[[], Any]:
    return lambda: attend(q, k, v, pattern, q_start=0, backend="blocked", **kwargs)


def strided(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Callable[[], Any]:
    """The window by hand: SDPA over overlapping views, one mask for all blocks; the first rows by a causal call."""
    length, n = q.shape[2], WINDOW + block
    starts = torch.arange(0, length - n + 1, block)
    i, j = torch.arange(block)[:, None] + WINDOW, torch.arange(n)
    mask = ((j <= i) & (j > i - WINDOW)).to(q.dtype).log()

    def views(x: Tensor, first: int, rows: int) -> Tensor:
        return x.as_strided(
            (len(starts), HEADS, rows, DIM), (block * DIM, length * DIM, DIM, 1), x.storage_offset() + first * DIM
        )

    def run() -> Tensor:
        head = F.scaled_dot_product_attention(*(x[:, :, :WINDOW] for x in (q, k, v)), is_causal=True)
        rest = F.scaled_dot_product_attention(views(q, WINDOW, block), views(k, 0, n), views(v, 0, n), attn_mask=mask)
        return torch.cat([head, rest.transpose(0, 1).reshape(1, HEADS, -1, DIM)], 2)

    return run


def compiled_flex(
    before: dict[str, float], device: str, mask: Any, q: Tensor, k: Tensor, v: Tensor
) -> Callable[[], Any]:
    """FlexAttention as its documentation says, compiled; the block mask made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, made = q.shape[2], []
    make = partial(create_block_mask, mask, None, None, length, length, device=device)
    before["create_block_mask"] = timed(lambda: made.append(make()), device)
    flex = torch.compile(flex_attention, dynamic=False)

    def run() -> Any:
        with torch.no_grad():
            return flex(q, k, v, block_mask=made[0])

    before["compile"] = timed(run, device)
    return run


def planned(before: dict[str, float], run: Callable[[], Any]) -> Callable[[], Any]:
    """The first call, which makes the plan, less a second one."""
    blocked_choice._KEPT.clear()  # of an earlier case
    first = timed(run)
    before["plan"] = max(0.0, first - timed(run))
    return run


def backward_of(out: Tensor, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def window(length: int, dtype: torch.dtype) -> Case:
    """1,024 keys a query, its own included."""
    q, k, v = tensors(length, dtype)
    before: dict[str, dict[str, float]] = {"blocked": {}, "FlexAttention": {}}
    arms = {
        "dense causal SDPA": dense(q, k, v),
        "blocked": planned(before["blocked"], blocked(q, k, v, Window(WINDOW - 1))),
        "SDPA over strided views": strided(q, k, v),
        "FlexAttention": compiled_flex(
            before["FlexAttention"], "cpu", lambda b, h, i, j: (j <= i) & (j > i - WINDOW), q, k, v
        ),
    }
    want, got = arms["SDPA over strided views"](), arms["blocked"]()
    assert (want - got).abs().max() < (1e-4 if dtype == torch.float32 else 0.05), "the arms do not compute the same"
    pairs = int(Window(WINDOW - 1).row_counts(length, length, 0).sum())
    return Case(f"causal window of {WINDOW:,}, {told(dtype)}", arms, pairs, triangle(length), before)


def told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def triangle(length: int) -> int:
    return length * (length + 1) // 2


def window_backward(length: int, dtype: torch.dtype) -> Case:
    inputs = tensors(length, dtype, grad=True)
    pattern = Window(WINDOW - 1)
    arms = {
        "dense causal SDPA": backward_of(dense(*inputs)(), inputs),
        "blocked": backward_of(blocked(*inputs, pattern)(), inputs),
    }
    before: dict[str, dict[str, float]] = {"blocked": {}}
    planned(before["blocked"], arms["blocked"])
    pairs = int(pattern.row_counts(length, length, 0).sum())
    name = f"causal window of {WINDOW:,}, backward, {told(dtype)}"
    missing = {"FlexAttention": "has no backward pass on a CPU"}
    return Case(name, arms, pairs, triangle(length), before, backward=True, repeats=5, copies=4, missing=missing)


@dataclass(frozen=True, eq=False)
class RandomBlocks(Pattern):
    """Causal, within blocks of `BLOCK` of a table; no closed form but the table."""

    table: Tensor

    def allows(self, q_idx: Tensor, kv_idx: Tensor, head: Any = None, batch: Any = None) -> Tensor:
        table = self.table.to(q_idx.device)
        return table[q_idx // BLOCK, kv_idx // BLOCK] & (kv_idx <= q_idx)

    def made(self, length: int) -> BlockLayout:
        full = self.table & ~torch.eye(len(self.table), dtype=torch.bool)
        return BlockLayout.from_dense(self.table, full, length, length, BLOCK)


def random_blocks(length: int) -> RandomBlocks:
    """An eighth of the causal blocks, the diagonal ones among them, the others drawn evenly."""
    n = length // BLOCK
    below = torch.ones(n, n).tril(-1).nonzero()
    keep = max(0, n * (n + 1) // 2 // 8 - n)
    pick = below[torch.randperm(len(below), generator=torch.Generator().manual_seed(0))[:keep]]
    table = torch.eye(n, dtype=torch.bool)
    table[pick[:, 0], pick[:, 1]] = True
    return RandomBlocks(table)


def irregular(length: int, dtype: torch.dtype, backward: bool = False) -> Case:
    pattern = random_blocks(length)
    layout = pattern.made(length)
    q, k, v = inputs = tensors(length, dtype, grad=backward)
    name = f"random blocks of {BLOCK}, an eighth of causal, {'backward, ' if backward else ''}{told(dtype)}"
    n = length // BLOCK
    computed = int(pattern.table.sum()) * BLOCK * BLOCK
    causal = n * (n + 1) // 2 * BLOCK * BLOCK
    run = blocked(q, k, v, pattern, layout=layout)
    if backward:
        arms = {
            "dense causal SDPA": backward_of(dense(q, k, v)(), inputs),
            "blocked": backward_of(run(), inputs),
        }
        missing = {"FlexAttention": "has no backward pass on a CPU"}
        return Case(name, arms, computed, causal, backward=True, repeats=5, copies=4, missing=missing)
    before: dict[str, dict[str, float]] = {"blocked": {}, "FlexAttention": {}}
    table = pattern.table
    arms = {
        "dense causal SDPA": dense(q, k, v),
        "blocked": planned(before["blocked"], run),
        "FlexAttention": compiled_flex(
            before["FlexAttention"], "cpu", lambda b, h, i, j: table[i // BLOCK, j // BLOCK] & (j <= i), q, k, v
        ),
    }
    # The ideal is taken over blocks, as the layout lists them: 8 x.
    return Case(name, arms, computed, causal, before)


@dataclass(frozen=True, eq=False)
class InTiles(Pattern):
    """A grid in the order of its tiles, as a pattern over positions."""

    tiled: Tiled

    def allows(self, q_idx: Tensor, kv_idx: Tensor, head: Any = None, batch: Any = None) -> Tensor:
        return self.tiled.allows(q_idx, kv_idx)


def neighborhood(shape: tuple[int, ...], kernel: tuple[int, ...], tile: tuple[int, ...], dtype: torch.dtype) -> Case:
    """The permutations are part of every arm's time."""
    grid = Neighborhood(shape, kernel)
    length = int(torch.Size(shape).numel())
    q, k, v = tensors(length, dtype)
    before: dict[str, dict[str, float]] = {"blocked": {}}
    tiled = grid.tiled(tile)
    in_tiles = InTiles(tiled)

    def same_tiles() -> Tensor:
        x, y, z = tiled.q_order.apply(q), tiled.kv_order.apply(k), tiled.kv_order.apply(v)
        out = attend(x, y, z, in_tiles, q_start=0, layout=tiled.layout, backend="blocked")
        return tiled.q_order.undo(out)

    def flex() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v, grid, q_start=0, backend="flex")

    sides = "x".join(map(str, tile))
    arms = {
        "dense SDPA, no mask": dense(q, k, v, causal=False),
        "blocked": planned(before["blocked"], blocked(q, k, v, grid)),
        f"blocked in tiles of {sides}": same_tiles,
        f"FlexAttention in tiles of {sides}": flex,
    }
    before[f"FlexAttention in tiles of {sides}"] = {"layout, masks and compile": timed(flex)}
    want, got = arms[f"blocked in tiles of {sides}"](), arms["blocked"]()
    assert (want - got).abs().max() < 1e-4, "the arms do not compute the same"
    bound = tile_cost(grid, tile, tile)
    notes = {f"{who} in tiles of {sides}": f"tiles allow {bound.mean:.1f} x" for who in ("blocked", "FlexAttention")}
    from regard.kernels.explain import explain

    own = explain(q, k, v, grid, q_start=0, backend="blocked")
    notes["blocked"] = f"its own tiles allow {length * length * HEADS / own.computed:.1f} x"
    missing = {}
    natten = natten_arm(q, k, v, shape, kernel)
    if callable(natten):
        arms["NATTEN"] = natten
    else:
        missing["NATTEN"] = natten
    name = f"neighborhood {'x'.join(map(str, kernel))} on {'x'.join(map(str, shape))}, {told(dtype)}"
    pairs = int(grid.row_counts(length, length, 0).sum())
    return Case(name, arms, pairs, length * length, before, notes, repeats=5, missing=missing)


def natten_arm(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...]) -> Any:
    try:
        import natten
    except ImportError:
        return "is not installed"
    run = getattr(natten, f"na{len(shape)}d")
    q, k, v = (x.transpose(1, 2).reshape(1, *shape, HEADS, DIM) for x in (q, k, v))
    try:
        run(q, k, v, kernel_size=kernel)
    except (RuntimeError, NotImplementedError, ValueError) as wrong:
        return f"does not run here: {wrong}"
    return lambda: run(q, k, v, kernel_size=kernel)


class Documents:
    """Texts of random lengths, drawn anew for each repeat."""

    def __init__(self, length: int, device: str) -> None:
        self.length, self.g = length, torch.Generator().manual_seed(2)
        self.ids = torch.zeros(length, dtype=torch.int64, device=device)
        self.pattern: Pattern = Causal()
        self.draw()

    def draw(self) -> None:
        lengths: list[int] = []
        while sum(lengths) < self.length:
            lengths.append(int(torch.randint(64, self.length // 8, (), generator=self.g)))
        lengths[-1] -= sum(lengths) - self.length
        of = Segments.from_lengths(lengths)
        self.pattern = of & Causal()
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.ids.copy_(ids)


def documents(length: int, dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> Case:
    """A mask that changes with each call, as in packed training: layout, masks and attention are all timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = tensors(length, dtype, device)
    docs = Documents(length, device)
    flex = torch.compile(flex_attention, dynamic=False)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (docs.ids[i] == docs.ids[j]) & (j <= i)

    def theirs() -> Tensor:
        with torch.no_grad():
            made = create_block_mask(mask, None, None, length, length, device=device)
            return flex(q, k, v, block_mask=made)

    def ours() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v, docs.pattern, q_start=0, backend="flex")

    arms: dict[str, Callable[[], Any]] = {"dense causal SDPA": dense(q, k, v)}
    if device == "cpu":
        arms["blocked"] = lambda: attend(q, k, v, docs.pattern, q_start=0, backend="blocked")
    arms["FlexAttention with our layouts"] = ours
    arms["FlexAttention with create_block_mask"] = theirs
    before = {
        "FlexAttention with our layouts": {"first call": timed(ours, device)},
        "FlexAttention with create_block_mask": {"first call": timed(theirs, device)},
    }
    pairs = int(docs.pattern.row_counts(length, length, 0).sum())
    name = f"documents that change with each call, {length:,} tokens, {told(dtype)}, {device}"
    return Case(name, arms, pairs, triangle(length), before, between=docs.draw, repeats=repeats)


def cases(device: str, length: int) -> list[Callable[[], Case]]:
    """What makes each case, in order; making one compiles and plans."""
    f32, bf16 = torch.float32, torch.bfloat16
    if device == "cuda":
        return [partial(documents, n, bf16, "cuda") for n in (8192, 16384, 32768, 65536, 131072)]
    found = [partial(window, length, f32), partial(window, length, bf16)]
    found += [partial(window_backward, length, f32), partial(window_backward, length, bf16)]
    found += [partial(irregular, length, f32), partial(irregular, length, bf16), partial(irregular, length, f32, True)]
    if length == 16384:
        found += [partial(neighborhood, (128, 128), (13, 13), (8, 16), f32)]
        found += [partial(neighborhood, (16, 32, 32), (5, 9, 9), (4, 4, 8), f32)]
    return [*found, partial(documents, length, f32)]


os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # seconds of compiling are those of a first time
