"""The residual stream: figures of every block's output, by forward hooks (no attention call carries it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Items of the outermost lists of like modules: the candidates for blocks, by qualified name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            items = list(module.named_children())
            if items and len({type(m) for _, m in items}) == 1 and next(items[0][1].children(), None) is not None:
                found |= {f"{name}.{n}" if name else n: m for n, m in items}
    return found


def hidden_of(value: Any) -> Tensor | None:
    """The hidden state in a block's arguments or output: its first floating tensor [batch, length, dim]."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim == 3 else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((h for h in map(hidden_of, value) if h is not None), None)
    return None


def figures(hidden: Tensor, first: Tensor) -> dict[str, Tensor]:
    """Norm, largest, median and mean absolute feature and cosine to `first` [batch, dim]: [batch, length] each."""
    x = hidden.detach().float()
    size = x.abs()
    largest, place = size.max(-1)
    norm = x.norm(dim=-1)
    cosine = (x * first[:, None]).sum(-1) / (norm * first.norm(dim=-1)[:, None]).clamp(min=1e-30)
    return {
        "resid_norm": norm,
        "resid_absmax": largest,
        "resid_absmax_dim": place.float(),
        "resid_absmedian": size.median(-1).values,
        "resid_absmean": size.mean(-1),
        "bos_cos": cosine,
    }


def attach(
    model: nn.Module, before: Callable[[str, Tensor], None], after: Callable[[str, Tensor], None]
) -> list[RemovableHandle]:
    """Call `before(block, hidden)` and `after(block, hidden)` around every candidate block; returns the hooks."""
    hooks = []
    for name, module in blocks_of(model).items():

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            hidden = hidden_of([*args, *kwargs.values()])
            if hidden is not None:
                before(name, hidden)

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            hidden = hidden_of(output)
            if hidden is not None:
                after(name, hidden)

        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    return hooks


def scatter(kept: Tensor | None, values: Tensor, positions: Tensor, rows: Tensor, size: int) -> Tensor:
    """Put [batch, length] values at their positions in [batch, size], NaN where nothing was seen."""
    if kept is None:
        kept = torch.full((values.shape[0], size), torch.nan, device=values.device)
    elif kept.shape[1] < size:
        kept = torch.nn.functional.pad(kept, (0, size - kept.shape[1]), value=torch.nan)
    for b in range(values.shape[0]):
        kept[b, positions[b, rows[b]]] = values[b, rows[b]]
    return kept
