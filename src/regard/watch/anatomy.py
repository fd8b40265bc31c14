"""The parts of a model: which modules are its blocks, and what each adds to the stream.

Parts are found by numbers, not by names: a short run notes every module's input and output, and the module whose
output `o` satisfies `stream_after = stream_before + c * o` is the one that writes to the stream.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.watch.probe import Attended, Event, Probe, example_inputs, first_tensor, probe, quiet, run


@dataclass(frozen=True)
class Anatomy:
    """Module names of a model's parts, one entry a block; None where there is none.

    Attributes:
        blocks: the residual blocks, in the order they run (an encoder's before its decoder's).
        attn: the module that makes the block's self-attention call.
        attn_out: the module whose output is added to the stream (after any norm, gate or dropout of its own).
        mlp: the same for the MLP.
        mid: (module, "input" or "output"): where the stream between attention and MLP is met.
        out_proj: the module that mixes the heads' outputs.
        cross: the cross-attention module, and in `cross_out` the module whose output is added.
        parallel: attention and MLP read the same stream, so there is no middle.
        decoder: the block belongs to the decoder of an encoder-decoder.
        heads, kv_heads: how many.
        embed: the token (or patch) embedding; unembed: the last projection; final_norm: the norm after the last block.
        tied: `embed` and `unembed` share their weight.
        missing: what was not found: {field: why, and how to give it}.
    """

    blocks: tuple[str, ...]
    attn: tuple[str | None, ...]
    attn_out: tuple[str | None, ...]
    mlp: tuple[str | None, ...]
    mid: tuple[tuple[str, str] | None, ...]
    out_proj: tuple[str | None, ...]
    cross: tuple[str | None, ...]
    cross_out: tuple[str | None, ...]
    parallel: tuple[bool, ...]
    decoder: tuple[bool, ...]
    heads: tuple[int | None, ...]
    kv_heads: tuple[int | None, ...]
    embed: str | None = None
    unembed: str | None = None
    final_norm: str | None = None
    tied: bool = False
    missing: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, layer: int | str) -> int:
        """The number of a block, given as a number (negative from the end) or by the name of it or its attention."""
        if isinstance(layer, int):
            if not -len(self) <= layer < len(self):
                raise IndexError(f"layer={layer}: the model has {len(self)} blocks, 0 to {len(self) - 1}")
            return layer % len(self)
        for names in (self.blocks, self.attn, self.cross):
            if layer in names:
                return names.index(layer)
        known = [n for n in (*self.blocks, *self.attn, *self.cross) if n]
        near = difflib.get_close_matches(layer, known, n=3, cutoff=0.3) or known[:3]
        raise KeyError(f"layer={layer!r} is neither a block nor an attention module; near it: {', '.join(near)}")

    def attention(self, layer: int | str) -> str:
        """The attention module of a layer: itself if named, else the block's self-attention."""
        at = self.block(layer)
        if isinstance(layer, str) and layer in (self.attn[at], self.cross[at]):
            return layer
        name = self.attn[at]
        if name is None:
            raise LookupError(f"{self.blocks[at]} makes no self-attention call")
        return name

    def __str__(self) -> str:
        lines = [f"{len(self)} blocks; embed {self.embed}; final_norm {self.final_norm}; unembed {self.unembed}"]
        lines[0] += " (tied)" if self.tied else ""
        for i, name in enumerate(self.blocks):
            mid = "parallel" if self.parallel[i] else self.mid[i] and " ".join(self.mid[i] or ())
            short = [
                f"{label} {str(part)[len(name) + 1 :] if str(part).startswith(name + '.') else part}"
                for label, part in (
                    ("attn", self.attn[i]),
                    ("out_proj", self.out_proj[i]),
                    ("attn_out", self.attn_out[i]),
                    ("cross", self.cross[i]),
                    ("mid", mid),
                    ("mlp", self.mlp[i]),
                )
                if part
            ]
            lines.append(f"{i:3d} {name}: {', '.join(short)}; {self.heads[i]} heads, {self.kv_heads[i]} of keys")
        return "\n".join(lines + [f"missing {k}: {v}" for k, v in self.missing.items()])


_PER_BLOCK = ("attn", "attn_out", "mlp", "mid", "out_proj", "cross", "cross_out", "parallel", "decoder")
_ONCE = ("embed", "unembed", "final_norm")
# What was found, kept while the model has the same modules.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], Anatomy]] = weakref.WeakKeyDictionary()


def anatomy(model: nn.Module, inputs: Any = None, **given: Any) -> Anatomy:
    """Find the parts of `model` by one short run (and one more that checks the middle of the blocks).

    Args:
        model: any module whose attention goes through `scaled_dot_product_attention`.
        inputs: a small batch: a dict for `model(**inputs)`, a tuple for `model(*inputs)`, or a tensor. None: made
            from what a transformers, timm or `nn.TransformerEncoder` model says about itself.
        given: any field of `Anatomy`, where the search fails or is unwanted. `blocks` is a sequence of names; the
            other fields of blocks are sequences with one entry a block, or a template in which `{}` stands for
            the block's name (`mlp="{}.ff"`, `mid=("{}.norm2", "input")`).

    Raises:
        ValueError: for inputs that cannot be made, a field or module that does not exist.
    """
    unknown = set(given) - set(_PER_BLOCK) - set(_ONCE) - {"blocks"}
    if unknown:
        raise TypeError(f"no field {sorted(unknown)}; accepted: blocks, {', '.join(_PER_BLOCK + _ONCE)}")
    modules = [id(m) for m in model.modules()]
    if inputs is None and not given and model in _known and _known[model][0] == modules:
        return _known[model][1]
    batch = example_inputs(model) if inputs is None else inputs
    seen = probe(model, batch)
    blocks = tuple(given["blocks"]) if "blocks" in given else _blocks(model, seen)
    _exist(model, "blocks", blocks)
    found = _assemble(model, blocks, seen)
    for name, value in given.items():
        if name in _ONCE:
            _exist(model, name, (value,))
            found = replace(found, **{name: value})
        elif name != "blocks":
            found = replace(found, **{name: _per_block(model, name, value, blocks)})
    found = _check_mid(model, batch, found, checked="mid" not in given)
    found = replace(found, missing={k: v for k, v in found.missing.items() if k not in given})
    if inputs is None and not given:
        _known[model] = (modules, found)
    return found


def _per_block(model: nn.Module, name: str, value: Any, blocks: tuple[str, ...]) -> tuple:
    if name == "mid" and isinstance(value, tuple) and len(value) == 2 and value[1] in ("input", "output"):
        rows: tuple = tuple((value[0].format(b), value[1]) for b in blocks)
    elif isinstance(value, str) and name != "mid":
        rows = tuple(value.format(b) for b in blocks)
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(blocks):
        rows = tuple(value)
    else:
        raise ValueError(f"{name}={value!r}: give one entry for each of the {len(blocks)} blocks, or a template")
    if name not in ("parallel", "decoder"):
        _exist(model, name, tuple(r[0] if name == "mid" and r else r for r in rows))
    return rows


def _exist(model: nn.Module, field_name: str, names: tuple[str | None, ...]) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"{field_name}: the model has no module {name!r}" + (f"; near it: {near}" if near else ""))


def _blocks(model: nn.Module, seen: Probe) -> tuple[str, ...]:
    """The items of the ModuleList (or Sequential) that hold one self-attention each.

    Of nested lists the one with most such items wins; on equal counts a ModuleList, then the outermost.
    """
    names = list(dict.fromkeys(c.layer for c in seen.calls))
    own = {c.layer for c in seen.calls if c.kind == "self"} or set(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[str] = []
    for name in names:
        parts = name.split(".")
        best: tuple[tuple[int, bool, int], str] | None = None
        for depth in range(len(parts)):
            holder, item = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
            if not isinstance(modules[holder], (nn.ModuleList, nn.Sequential)):
                continue
            inside: dict[str, int] = {}
            for other in own:
                if not holder or other.startswith(holder + "."):
                    key = ".".join(other.split(".")[: depth + 1])
                    inside[key] = inside.get(key, 0) + 1
            if inside.get(item) == 1 and max(inside.values()) == 1:
                rank = (len(inside), isinstance(modules[holder], nn.ModuleList), -depth)
                if best is None or rank > best[0]:
                    best = (rank, item)
        # Outside any list: the module around the attention.
        block = best[1] if best else ".".join(parts[:-1])
        if block not in found:
            found.append(block)
    starts = {e.name: e.start for e in reversed(seen.events)}
    return tuple(sorted(found, key=lambda b: starts.get(b, 0)))


@dataclass
class _Parts:
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


def _assemble(model: nn.Module, blocks: tuple[str, ...], seen: Probe) -> Anatomy:
    walked = [_walk(model, name, seen) for name in blocks]
    with_cross = {b.rpartition(".")[0] for b, w in zip(blocks, walked, strict=True) if w.cross}
    missing: dict[str, str] = {}
    for name, parts in zip(blocks, walked, strict=True):
        for what, why in parts.why.items():
            missing.setdefault(what, f"{name}: {why}; give {what}= to anatomy()")
    embed, unembed = _embed(model, blocks, seen), _unembed(model, seen)
    if embed is None:
        missing["embed"] = "no module turned the input into vectors; give embed="
    if unembed is None:
        missing["unembed"] = "no module gives the model's output; give unembed= if there is one"
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = [getattr(modules[n], "weight", None) if n is not None else None for n in (embed, unembed)]
    return Anatomy(
        blocks=blocks,
        attn=tuple(w.attn and w.attn.layer for w in walked),
        attn_out=tuple(w.attn_out for w in walked),
        mlp=tuple(w.mlp for w in walked),
        mid=tuple(w.mid for w in walked),
        out_proj=tuple(w.out_proj for w in walked),
        cross=tuple(w.cross and w.cross.layer for w in walked),
        cross_out=tuple(w.cross_out for w in walked),
        parallel=tuple(w.parallel for w in walked),
        decoder=tuple(b.rpartition(".")[0] in with_cross for b in blocks),
        heads=tuple(w.attn and w.attn.heads for w in walked),
        kv_heads=tuple(w.attn and w.attn.kv_heads for w in walked),
        embed=embed,
        unembed=unembed,
        final_norm=_final_norm(model, blocks, seen),
        tied=weights[0] is not None and weights[0] is weights[1],
        missing=missing,
    )


def _walk(model: nn.Module, block: str, seen: Probe) -> _Parts:
    """Follow the stream through one block: before, after attention, after cross-attention, after the MLP."""
    parts = _Parts()
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
            if any(_adds(state, writer.result, reader.given) for state, _, _ in states):
                return writer, reader
    return None


def _walk_mlp(parts: _Parts, states: list, y: Tensor, stream: list[Event]) -> None:
    """The last writer w with `y = state + c * w's output`, or with a norm from that sum to y."""
    ends = [(y, float("inf"))]
    ends += [(e.given, e.start) for e in stream if e.given is not None and torch.equal(e.result, y)]  # type: ignore[arg-type]
    for state, where, time in states:
        for target, limit in ends:
            for writer in sorted((e for e in stream if time < e.end < limit), key=lambda e: -e.end):
                if writer.start > time and _adds(state, writer.result, target):
                    parts.mlp = writer.name
                    parts.mid = where
                    return


def _walk_parallel(parts: _Parts, x: Tensor, y: Tensor, stream: list[Event]) -> None:
    """`y = x + attention + mlp`, both read from x."""
    assert parts.attn is not None
    name = parts.attn.layer
    around = [e for e in stream if name == e.name or name.startswith(e.name + ".")]
    beside = [e for e in stream if e not in around and not e.name.startswith(name + ".")]
    for attended in sorted(around, key=lambda e: -e.end):
        assert attended.result is not None
        for writer in sorted(beside, key=lambda e: -e.end):
            if _adds(x + attended.result, writer.result, y, tolerance=32.0):
                parts.attn_out, parts.mlp, parts.parallel = attended.name, writer.name, True
                return


def _adds(state: Tensor, gain: Tensor | None, after: Tensor | None, tolerance: float = 8.0) -> bool:
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


def _embed(model: nn.Module, blocks: tuple[str, ...], seen: Probe) -> str | None:
    names = {m: n for n, m in model.named_modules()}
    if hasattr(model, "get_input_embeddings"):
        try:
            name = names.get(model.get_input_embeddings())
        except (NotImplementedError, AttributeError):
            name = None
        if name is not None:
            return name
    first = next((e for e in seen.events if e.name in blocks), None)
    if first is None or first.given is None:
        return None
    before = [e for e in seen.events if 0 <= e.end < first.start and e.result is not None]
    before = [e for e in before if e.result.ndim == 3 and e.result.shape[-1] == first.given.shape[-1]]  # type: ignore[union-attr]
    if not before:
        return None
    earliest = min(before, key=lambda e: (not e.integers, e.end))
    # A module that only passes on what its last child returned is the one to name.
    same = [e for e in before if e.start <= earliest.start and e.end >= earliest.end]
    same = [e for e in same if e.result.shape == earliest.result.shape and torch.equal(e.result, earliest.result)]  # type: ignore[union-attr,arg-type]
    return max(same, key=lambda e: e.end).name


def _unembed(model: nn.Module, seen: Probe) -> str | None:
    names = {m: n for n, m in model.named_modules()}
    if hasattr(model, "get_output_embeddings"):
        try:
            name = names.get(model.get_output_embeddings())
        except (NotImplementedError, AttributeError):
            name = None
        if name is not None:
            return name
    modules = dict(model.named_modules())
    for e in reversed(seen.events):
        if seen.output is None or e.result is None or not isinstance(modules[e.name], nn.Linear):
            continue
        if e.result.shape == seen.output.shape and torch.equal(e.result, seen.output):
            return e.name
    return None


def _final_norm(model: nn.Module, blocks: tuple[str, ...], seen: Probe) -> str | None:
    """The norm that reads what the last block returned; None where the model has none."""
    modules = dict(model.named_modules())
    last = max((e for e in seen.events if e.name in blocks), key=lambda e: e.end, default=None)
    if last is None or last.result is None:
        return None
    for e in seen.events:
        if e.start > last.end and e.given is not None and e.given.shape == last.result.shape:
            if "norm" in type(modules[e.name]).__name__.lower() and torch.equal(e.given, last.result):
                return e.name
    return None


def _check_mid(model: nn.Module, inputs: Any, found: Anatomy, checked: bool) -> Anatomy:
    """Drop a `mid` that an edit in place would not carry to both branches (a stream kept in another dtype, a copy).

    All middles are changed in one more run; then `block output = changed middle + mlp output` must still hold.
    """
    spots = [(i, m[0]) for i, m in enumerate(found.mid) if m is not None and m[1] == "input" and found.mlp[i]]
    if not checked or not spots:
        return found
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []

    def disturb(i: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_tensor((*args, *kwargs.values()))
            assert x is not None
            x.mul_(1.5).add_(0.125)
            seen[i, "mid"] = x.clone()

        return hook

    def note(i: int, what: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            x = first_tensor(output)
            assert x is not None
            seen[i, what] = x.clone()

        return hook

    try:
        for i, name in spots:
            handles.append(modules[name].register_forward_pre_hook(disturb(i), with_kwargs=True))
            handles.append(modules[found.mlp[i] or ""].register_forward_hook(note(i, "mlp")))
            handles.append(modules[found.blocks[i]].register_forward_hook(note(i, "out")))
        with quiet(model):
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    mid, missing = list(found.mid), dict(found.missing)
    for i, _ in spots:
        out = seen[i, "out"]
        if not _adds(seen[i, "mid"].reshape(out.shape), seen[i, "mlp"].reshape(out.shape), out):
            mid[i] = None
            missing.setdefault("mid", f"{found.blocks[i]}: its two branches read different tensors; give mid=")
    return replace(found, mid=tuple(mid), missing=missing)


__all__ = ["Anatomy", "anatomy"]
