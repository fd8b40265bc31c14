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

from torch import Tensor, nn

from regard.watch import ends
from regard.watch.probe import Probe, example_inputs, first_tensor, probe, quiet, run
from regard.watch.stream import adds, walk


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
    blocks = tuple(given["blocks"]) if "blocks" in given else ends.blocks(model, seen)
    _exist(model, "blocks", blocks)
    found = _assemble(model, blocks, seen)
    for name, value in given.items():
        if name in _ONCE:
            _exist(model, name, (value,))
            found = replace(found, **{name: value})
        elif name != "blocks":
            rows: dict[str, Any] = {name: _per_block(model, name, value, blocks)}
            found = replace(found, **rows)
    found = _check_mid(model, batch, found, checked="mid" not in given)
    found = replace(found, missing={k: v for k, v in found.missing.items() if k not in given})
    if inputs is None and not given:
        _known[model] = (modules, found)
    return found


def anatomy_for(model: nn.Module, inputs: Any, given: Anatomy | None = None) -> Anatomy:
    """The parts given, else found: from what the model says of itself, or with these inputs where it says nothing."""
    if given is not None:
        return given
    try:
        return anatomy(model)
    except ValueError:
        if inputs is None:
            raise
        return anatomy(model, inputs)


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


def _assemble(model: nn.Module, blocks: tuple[str, ...], seen: Probe) -> Anatomy:
    walked = [walk(model, name, seen) for name in blocks]
    with_cross = {b.rpartition(".")[0] for b, w in zip(blocks, walked, strict=True) if w.cross}
    missing: dict[str, str] = {}
    for name, parts in zip(blocks, walked, strict=True):
        for what, why in parts.why.items():
            missing.setdefault(what, f"{name}: {why}; give {what}= to anatomy()")
    embed, unembed = ends.embed(model, blocks, seen), ends.unembed(model, seen)
    if embed is None:
        missing["embed"] = "no module turned the input into vectors; give embed="
    if unembed is None:
        missing["unembed"] = "no module gives the model's output; give unembed= if there is one"
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = [getattr(modules[n], "weight", None) if n is not None else None for n in (embed, unembed)]
    return Anatomy(
        blocks=blocks,
        attn=tuple(w.attn.layer if w.attn else None for w in walked),
        attn_out=tuple(w.attn_out for w in walked),
        mlp=tuple(w.mlp for w in walked),
        mid=tuple(w.mid for w in walked),
        out_proj=tuple(w.out_proj for w in walked),
        cross=tuple(w.cross.layer if w.cross else None for w in walked),
        cross_out=tuple(w.cross_out for w in walked),
        parallel=tuple(w.parallel for w in walked),
        decoder=tuple(b.rpartition(".")[0] in with_cross for b in blocks),
        heads=tuple(w.attn.heads if w.attn else None for w in walked),
        kv_heads=tuple(w.attn.kv_heads if w.attn else None for w in walked),
        embed=embed,
        unembed=unembed,
        final_norm=ends.final_norm(model, blocks, seen),
        tied=weights[0] is not None and weights[0] is weights[1],
        missing=missing,
    )


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
        if not adds(seen[i, "mid"].reshape(out.shape), seen[i, "mlp"].reshape(out.shape), out):
            mid[i] = None
            missing.setdefault("mid", f"{found.blocks[i]}: its two branches read different tensors; give mid=")
    return replace(found, mid=tuple(mid), missing=missing)
