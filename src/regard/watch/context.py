"""Where in the model a call is made: the stack of running modules and the current forward."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
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
    function = getattr(module.forward, "__func__", None)
    return _of_method(function) if function is not None else _named(_parameters(module.forward))


@lru_cache(maxsize=4096)
def _of_method(function: Callable) -> tuple[str, ...]:
    parameters = _parameters(function)
    takes_self = bool(parameters) and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    return _named(parameters[1:] if takes_self else parameters)


def _parameters(function: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _named(parameters: list[inspect.Parameter]) -> tuple[str, ...]:
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

    def batches(self, frames: Sequence[Frame], q_len: int) -> set[int]:
        """What may be the batch of a call: the leading sizes of the tensors the model was given.

        Their second sizes where the attention layer was handed its sequence first, as `[length, batch, width]`.
        """
        if "batches" not in self.notes:
            shapes = list(_shapes(self.top.bound.values()))
            self.notes["batches"] = {s[0] for s in shapes}, {s[1] for s in shapes if 2 <= len(s) <= 3}
        first, second = self.notes["batches"]
        for frame in reversed(frames[-3:]):
            hidden = frame.hidden
            if hidden is not None and hidden.ndim == 3 and q_len in hidden.shape[:2]:
                return {hidden.shape[1]} if hidden.shape[1] != q_len and hidden.shape[1] in second else first
        return first


def _shapes(values: Iterable[Any]) -> Iterator[torch.Size]:
    for value in values:
        if isinstance(value, Tensor):
            if value.ndim:
                yield value.shape
        elif isinstance(value, (list, tuple)):
            yield from _shapes(value)
        elif isinstance(value, Mapping):
            yield from _shapes(value.values())
