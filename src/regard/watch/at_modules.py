"""Sites met at the door of a module: hooks that read and change its input or output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.watch.passes import columns
from regard.watch.places import Place, find_logits, read_input, replace_first, write_input
from regard.watch.running import Action, Running
from regard.watch.site import BLOCK_PARTS


class AtModules(Running):
    """Hooks on modules."""

    def _hook(self, module: nn.Module, name: str, door: str) -> Any:
        place = Place(name, door)
        if door in ("input", "in_place"):

            def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
                if self.suspended:
                    return None
                x, slot = read_input(args, kwargs)
                if door == "input":
                    new = self._act(place, x)
                    return None if new is x else write_input(args, kwargs, slot, new)
                # The stream is read by two branches through one tensor: it changes where it lies. What is computed on
                # the way must not lean on the tensor that is about to change.
                self._act(place, x, in_place=True)
                return None

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if self.suspended:
                return None
            if door == "logits":
                x, put = find_logits(output)
            else:
                x, put = replace_first(output)
            new = self._act(place, x)
            return None if new is x else put(new)

        return module.register_forward_hook(after)

    def _act(self, place: Place, x: Tensor, in_place: bool = False) -> Tensor:
        due = self._due(place)
        if not due:
            return x
        self._once(due[0].site, f"{place.module} {place.door}")
        met, shape, batch = x, x.shape, self._now(due[0].site).batch
        if x.ndim == 2 and batch is not None and due[0].site.part in BLOCK_PARTS and len(x) % batch == 0:
            x = x.view(batch, -1, shape[1])  # a block that flattened batch and length
        new = x.clone() if in_place else x
        changed = False
        if any(_tells_samples_apart(a) for a in due) and _sequence_first(self.model):
            raise ValueError(
                f"{due[0].site}: the model has nn.MultiheadAttention with batch_first=False, so dimension 0 of its "
                "stream is the length: pos, scan, and mean or resample over the batch need batch_first=True"
            )
        for a in due:
            axis = self._axis(a.site)
            length = x.shape[1] if x.ndim > 2 else 1
            if x.ndim <= 2 and a.site.pos is not None:
                raise ValueError(f"{a.site}: the tensor there is {tuple(x.shape)}, without a token dimension")
            first, total = columns(axis, length)
            selection = self._select(a, axis, len(x), torch.arange(first, total, device=x.device), total, False)
            if selection is None:
                continue
            if a.edit is None:
                new, captured = self._read(a, new, selection)
                changed = changed or captured
            else:
                new = selection.put(new, self._changed(a, selection.pick(new), axis))
                changed = True
        if in_place and changed:
            x.copy_(new)
            return met
        return new.view(shape) if changed else met


def _tells_samples_apart(a: Action) -> bool:
    mixes = a.edit is not None and a.edit.op in ("mean", "resample") and a.edit.value is None
    return a.site.pos is not None or a.batch is not None or mixes


def _sequence_first(model: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())
