"""Following the stream through one block: which module writes what it gains.

A writer is found by the sum that defines it: `stream after = stream before + c * its output`, c one number (a residual
multiplier; nearly always 1). In a pre-norm block the sum is what the next norm reads, in a post-norm block the norm's
result is the new stream, in a parallel block `block output = input + attention + mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from regard.watch.probe import Attended, Event, Probe


@dataclass
class BlockParts:
    """What the walk along the stream of one block found."""

    attn: Attended | None = None
    attn_out: str | None = None
    cross: Attended | None = None
    cross_out: str | None = None
    mid: tuple[str, str] | None = None
    mlp: str | None = None
    parallel: bool = False
    out_proj: str | None = None
    why: dict[str, str] = field(default_factory=dict)


def walk(model: nn.Module, block: str, seen: Probe) -> BlockParts:
    """Follow the stream through one block: before, after attention, after cross-attention, after the MLP."""
    parts = BlockParts()
    runs = [e for e in seen.events if e.name == block]
    if len(runs) != 1:
        parts.why["attn_out"] = parts.why["mlp"] = f"ran {len(runs)} times in one forward pass"
        return parts
    whole = runs[0]
    inner = [e for e in seen.events if whole.start < e.start and e.end < whole.end]
    calls = [c for c in seen.calls if whole.start < c.time < whole.end]
    parts.attn = next((c for c in calls if c.kind == "self"), None)
    parts.cross = next((c for c in calls if c.kind == "cross"), None)
    if parts.attn is not None:
        parts.out_proj = _out_proj(model, parts.attn, inner)
    x, y = whole.given, whole.result
    if x is None or y is None or x.ndim != 3 or x.shape != y.shape:
        parts.why["attn_out"] = parts.why["mlp"] = "its first input and output are not streams of one shape [b, n, d]"
        return parts
    # Some models flatten batch and length inside a block; a module that runs twice cannot be told apart.
    names = [e.name for e in inner]
    inner = [_as_stream(e, x.shape) for e in inner if names.count(e.name) == 1]
    stream = [e for e in inner if e.result is not None and e.result.shape == x.shape]
    # Possible states of the stream, each with where it is met: an input (before a norm) or an output (after one).
    states: list[tuple[Tensor, tuple[str, str] | None, int]] = [(x, None, whole.start)]
    for call in (parts.attn, parts.cross):
        if call is None:
            continue
        step = _next_state(states, call, stream, inner)
        if step is None:
            break
        writer, reader = step
        if call is parts.attn:
            parts.attn_out = writer.name
        else:
            parts.cross_out = writer.name
        assert reader.given is not None
        states = [(reader.given, (reader.name, "input"), reader.start)]
        if reader.result is not None and reader.result.shape == x.shape:
            states.append((reader.result, (reader.name, "output"), reader.end))
    if parts.attn is not None and parts.attn_out is None:
        _walk_parallel(parts, x, y, stream)
    else:
        _walk_mlp(parts, states, y, stream)
    if parts.attn is not None and parts.attn_out is None:
        parts.why["attn_out"] = "no module's output is what the stream gains by attention"
    if parts.cross is not None and parts.cross_out is None:
        parts.why["cross_out"] = "no module's output is what the stream gains by cross-attention"
    if parts.mlp is None:
        parts.why["mlp"] = "no module's output is what the stream gains after attention"
    return parts


def _as_stream(e: Event, shape: torch.Size) -> Event:
    flat = (shape[0] * shape[1], shape[2])
    given = e.given.view(shape) if e.given is not None and e.given.shape == flat else e.given
    result = e.result.view(shape) if e.result is not None and e.result.shape == flat else e.result
    return replace(e, given=given, result=result)


def _next_state(states: list, call: Attended, stream: list[Event], inner: list[Event]) -> tuple[Event, Event] | None:
    """The writer w and the reader r with `r's input = state + c * w's output`: the first reader, the last writer."""
    shape = states[0][0].shape
    readers = [e for e in inner if e.start > call.time and e.given is not None and e.given.shape == shape]
    for reader in readers:
        for writer in sorted((e for e in stream if call.time < e.end < reader.start), key=lambda e: -e.end):
            if any(adds(state, writer.result, reader.given) for state, _, _ in states):
                return writer, reader
    return None


def _walk_mlp(parts: BlockParts, states: list, y: Tensor, stream: list[Event]) -> None:
    """The last writer w with `y = state + c * w's output`, or with a norm from that sum to y."""
    ends = [(y, float("inf"))]
    ends += [(e.given, e.start) for e in stream if e.given is not None and torch.equal(e.result, y)]  # type: ignore[arg-type]
    for state, where, time in states:
        for target, limit in ends:
            for writer in sorted((e for e in stream if time < e.end < limit), key=lambda e: -e.end):
                if writer.start > time and adds(state, writer.result, target):
                    parts.mlp = writer.name
                    parts.mid = where
                    return


def _walk_parallel(parts: BlockParts, x: Tensor, y: Tensor, stream: list[Event]) -> None:
    """`y = x + attention + mlp`, both read from x."""
    assert parts.attn is not None
    name = parts.attn.layer
    around = [e for e in stream if name == e.name or name.startswith(e.name + ".")]
    if around:
        beside = [e for e in stream if e not in around and not e.name.startswith(name + ".")]
    else:  # the block itself makes the call
        around = [e for e in stream if e.name == parts.out_proj]
        beside = [e for e in stream if e not in around]
    for attended in sorted(around, key=lambda e: -e.end):
        assert attended.result is not None
        for writer in sorted(beside, key=lambda e: -e.end):
            if adds(x + attended.result, writer.result, y, tolerance=32.0):
                parts.attn_out, parts.mlp, parts.parallel = attended.name, writer.name, True
                return


def adds(state: Tensor, gain: Tensor | None, after: Tensor | None, tolerance: float = 8.0) -> bool:
    """Whether `after = state + c * gain` for one number c, to the rounding of their dtype."""
    if gain is None or after is None or gain.shape != after.shape or state.shape != after.shape:
        return False
    if torch.equal(state + gain, after) and not torch.equal(state, after):
        return True
    eps = torch.finfo(after.dtype).eps
    s, g, a = state.double(), gain.double(), after.double()
    difference = a - s
    power = (g * g).sum()
    # One, up to the order of the sums; else a residual multiplier.
    for c in (1.0, float((difference * g).sum() / power) if power > 0 else 0.0):
        if abs(c) < 1e-3:
            continue
        error = (difference - c * g).abs()
        bound = tolerance * eps * (s.abs() + a.abs() + (c * g).abs())
        # A gain far below the rounding of the stream proves nothing.
        if bool((error <= bound).all()) and bool((c * g).norm() > 64 * eps * a.norm()):
            return True
    return False


def _out_proj(model: nn.Module, call: Attended, inner: list[Event]) -> str | None:
    """The module that first reads the heads' outputs side by side."""
    merged = call.z.transpose(1, 2).flatten(2)
    for e in inner:
        same = e.start > call.time and e.given is not None and e.given.numel() == merged.numel()
        if same and e.given is not None and torch.equal(e.given.reshape(-1), merged.reshape(-1)):
            own = dict(model.named_modules())[e.name]
            if isinstance(getattr(own, "weight", None), Tensor):
                return e.name
    # nn.MultiheadAttention reads the weight of its projection without calling it.
    own = dict(model.named_modules(remove_duplicate=False))[call.layer]
    return f"{call.layer}.out_proj" if isinstance(getattr(own, "out_proj", None), nn.Module) else None
