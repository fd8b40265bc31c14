"""Where in the model a call is made: the stack of running modules and the current forward."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class Frame:
    """A running module with the arguments it was called with."""

    __slots__ = ("_bound", "args", "kwargs", "module", "name", "params")

    def __init__(
        self, module: nn.Module, name: str, params: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        self.module, self.name, self.params, self.args, self.kwargs = module, name, params, args, kwargs
        self._bound: dict[str, Any] | None = None

    @property
    def bound(self) -> dict[str, Any]:
        """Arguments by the names of `forward`'s parameters."""
        if self._bound is None:
            self._bound = dict(zip(self.params, self.args, strict=False)) | self.kwargs
        return self._bound

    @property
    def wraps(self) -> bool:
        """Whether it was handed arguments its `forward` has no names for (`*args`): a module around the real one."""
        return len(self.args) > len(self.params)

    @property
    def hidden(self) -> Tensor | None:
        """The first floating-point tensor argument."""
        for value in self.bound.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        return None

    def query_length(self) -> int | None:
        """Length of the sequence the module was handed, where that can be told."""
        hidden = self.hidden
        return None if hidden is None or hidden.ndim != 3 else hidden.shape[-2]


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of `module.forward`, in order, without `*args` and `**kwargs`."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


class Forward:
    """One forward of the model: its inputs, and what was already found out while it runs."""

    def __init__(self, top: Frame):
        self.top = top
        self.grad = torch.is_grad_enabled()
        self.counts: dict[str, int] = {}
        self.notes: dict[Any, Any] = {}
        self._by_tensor: dict[tuple[str, int], tuple[weakref.ref[Tensor], Any]] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the outermost running module by name."""
        return self.top.bound

    def recall(self, what: str, tensor: Tensor) -> Any | None:
        """What was noted about this very tensor (None: nothing)."""
        found = self._by_tensor.get((what, id(tensor)))
        return found[1] if found is not None and found[0]() is tensor else None

    def note(self, what: str, tensor: Tensor, value: Any) -> None:
        """Note something about a tensor without keeping it alive."""
        self._by_tensor[(what, id(tensor))] = (weakref.ref(tensor), value)

    def batches(self, module: nn.Module) -> set[int]:
        """Batch sizes of the tensors the model was given (both leading axes where the model is sequence-first)."""
        axes = 1 if getattr(module, "batch_first", True) else 2
        key = ("batches", axes)
        if key not in self.notes:
            self.notes[key] = set(_batches(self.top.bound.values(), axes))
        return self.notes[key]


def _batches(values: Any, axes: int) -> list[int]:
    sizes: list[int] = []
    for value in values:
        if isinstance(value, Tensor):
            sizes.extend(value.shape[:axes] if value.ndim > 1 else (value.shape[0],) if value.ndim else ())
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            sizes.extend(_batches(value, axes))
        elif isinstance(value, dict) or (hasattr(value, "items") and hasattr(value, "keys")):
            sizes.extend(_batches(value.values(), axes))
    return sizes
