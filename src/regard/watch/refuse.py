"""What the seam cannot catch, found before the model runs and refused by name with the way out."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn

# diffusers' attention processors that do not call scaled_dot_product_attention
_OLD_PROCESSORS = ("AttnProcessor", "AttnAddedKVProcessor", "CustomDiffusionAttnProcessor", "IPAdapterAttnProcessor")
_OLD_PARTS = ("Sliced", "XFormers", "NPU", "XLA")


class SeamError(RuntimeError):
    """Attention that cannot be caught, or a handler's answer that cannot be used; the message says what to do."""


def require_module(model: object) -> nn.Module:
    """`model` if it is a module, else an error."""
    if not isinstance(model, nn.Module):
        raise SeamError(
            f"model is {type(model).__name__}; accepted is a torch.nn.Module (of a pipeline, the model inside it)"
        )
    return model


def refusals(model: nn.Module, edits: bool) -> Iterator[str]:
    """Reasons why some attention of `model` would pass the seam unseen."""
    modules = list(model.named_modules())
    yield from _compiled(modules)
    yield from _spread(modules)
    yield from _transformers(modules)
    yield from _diffusers(modules)
    unfused = [name for name, m in modules if getattr(m, "fused_attn", None) is False]
    if unfused:
        yield (
            f"{_names(unfused)} compute attention by matrix products (fused_attn is False); set `fused_attn = True` on "
            "these modules, or build the model after `timm.layers.set_fused_attn(True, True)`"
        )
    if edits:
        yield from _checkpointed(modules)


def _names(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(repr(name) if name else "the model" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _compiled(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    # asked of what is loaded: where torch.compile was never imported nothing is compiled
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    for name, m in modules:
        where = repr(name) if name else "the model"
        if dynamo is not None and isinstance(m, dynamo.OptimizedModule):
            yield (
                f"{where} is compiled (torch.compile), and compiled code runs past the seam; give the module it was "
                "made from, `model._orig_mod`, and run that"
            )
        elif getattr(m, "_compiled_call_impl", None) is not None:
            yield (
                f"{where} ({type(m).__name__}) was compiled in place; undo it with "
                "`module._compiled_call_impl = None`, or watch it before `module.compile()`"
            )
        elif hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            yield f"{where} ({type(m).__name__}) has a compiled forward; undo it with `del module.forward`"
        elif isinstance(m, torch.jit.ScriptModule):
            yield f"{where} is TorchScript, which runs past Python; watch the module it was scripted from"


def _spread(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    sharded = sys.modules.get("torch.distributed.tensor")
    for name, m in modules:
        where = repr(name) if name else "the model"
        kinds = {c.__name__ for c in type(m).__mro__}
        if "DataParallel" in kinds:
            yield f"{where} is nn.DataParallel, which runs copies in other threads; give `model.module`"
        elif kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            yield f"{where} is fully sharded; watch an unsharded copy, one process a GPU"
        elif sharded is not None and any(isinstance(p, sharded.DTensor) for p in m._parameters.values()):
            yield (
                f"{where} ({type(m).__name__}) has sharded parameters (DTensor), so each process sees only its own "
                "heads; watch an unsharded copy"
            )


def _transformers(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    bad: dict[str, list[str]] = {}
    able = True
    for name, m in modules:
        if not any(c.__name__ == "PreTrainedModel" for c in type(m).__mro__):
            continue
        implementation = getattr(m.config, "_attn_implementation", None)
        if isinstance(implementation, str) and _unseen(implementation):
            bad.setdefault(implementation, []).append(f"{name or 'the model'} ({type(m).__name__})")
            able = able and getattr(m, "_supports_sdpa", True)
    for implementation, names in bad.items():
        fix = (
            'call `model.set_attn_implementation("sdpa")` first, or load it with `attn_implementation="sdpa"`'
            if able
            else "this class has no sdpa attention in this version of transformers, so it cannot be watched"
        )
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f'{", ".join(names[:3])}{more} run attention as "{implementation}", which the seam does not see; {fix}'


def _unseen(implementation: str) -> bool:
    name = implementation.split("|")[-1]
    return name == "eager" or "flash" in name or "flex" in name or "/" in name or implementation.startswith("paged|")


def _diffusers(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    old: dict[str, list[str]] = {}
    other: dict[str, list[str]] = {}
    for name, m in modules:
        processor = getattr(m, "processor", None)
        if processor is None or not type(processor).__module__.startswith("diffusers"):
            continue
        kind = type(processor).__name__
        if kind in _OLD_PROCESSORS or any(part in kind for part in _OLD_PARTS):
            old.setdefault(kind, []).append(name)
        backend = getattr(processor, "_attention_backend", None)
        backend_name = str(getattr(backend, "value", backend))
        if backend is not None and "native" not in backend_name.lower():
            other.setdefault(backend_name, []).append(name)
    for kind, names in old.items():
        yield (
            f"{_names(names)} run attention by diffusers' {kind}, which the seam does not see; call "
            "`model.set_attn_processor(AttnProcessor2_0())` (diffusers.models.attention_processor)"
        )
    for backend_name, names in other.items():
        yield (
            f"{_names(names)} run attention by diffusers' backend {backend_name!r}, which the seam does not see; call "
            '`model.set_attention_backend("native")`'
        )


def _checkpointed(modules: list[tuple[str, nn.Module]]) -> Iterator[str]:
    names = [
        name
        for name, m in modules
        if getattr(m, "gradient_checkpointing", False) is True or getattr(m, "grad_checkpointing", False) is True
    ]
    if names:
        yield (
            f"{_names(names)} have gradient checkpointing on: the recomputed forward does not pass through the seam, "
            "so an edit would be missing from it and gradients would be wrong; call "
            "`model.gradient_checkpointing_disable()` (timm: `model.set_grad_checkpointing(False)`)"
        )
