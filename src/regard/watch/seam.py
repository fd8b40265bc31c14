"""The seam: every `scaled_dot_product_attention` of any PyTorch model, with the module that made it.

Watching, planning and steering are handlers of this one seam; no model class is patched.

What the seam sees: `torch.nn.functional.scaled_dot_product_attention` under any name it was imported by, the same
operator in exported programs, `regard.attend` (as the call of SDPA that computes the same), and
`F.multi_head_attention_forward`, which is what `nn.MultiheadAttention`, `nn.TransformerEncoder` and `nn.Transformer`
use. Under a handler those modules take their ordinary path, not the fused "fast path" of evaluation: outputs agree to
rounding, and padded positions hold values instead of zeros.

What is refused by name: see `regard.watch.refuse`; FlexAttention and direct calls of `torch.ops.aten._scaled_dot_*`
when they happen. What cannot be known: attention written as matrix products by hand (modules whose name says attention
and that made no call are named in a warning), and kernels of other packages called directly (flash_attn, xformers).
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import FlexAttentionHOP
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from regard.watch.call import Call
from regard.watch.context import Forward, Frame, parameter_names
from regard.watch.layout import layout_of
from regard.watch.mha import Relay, WeightedAttention
from regard.watch.own_attend import as_sdpa, attend
from regard.watch.refuse import SeamError, refusals, require_module

__all__ = ["Call", "Handler", "Seam", "SeamError", "SeamWarning"]

Handler = Callable[[Call], "Tensor | None"]

_SDPA = F.scaled_dot_product_attention
_MHA = F.multi_head_attention_forward
_OPERATORS = frozenset((OpOverload, OpOverloadPacket, FlexAttentionHOP))
_SIMPLE = re.compile(r"norm|embedding|activation|dropout|droppath|gelu|silu|linear$|^conv", re.IGNORECASE)
_MHA_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class SeamWarning(UserWarning):
    """Something about the model that the seam could not make sure of."""


class Seam(TorchFunctionMode):
    """Catch the attention of `model` while open: `with Seam(model, handler): model(...)`.

    Args:
        model: any `nn.Module`; calls made outside its modules pass untouched.
        handler: gets each `Call` and returns what the call shall give (`[batch, heads, q_len, v_dim]`), or None to
            leave it as it was. It runs with the seam off, so it may compute attention itself (one that only looks does
            so under `torch.no_grad()`, or what it computes is kept for the backward pass). Without a handler the seam
            does nothing at all.
        edits: the handler changes what the model computes. Gradient checkpointing is then refused, as the recomputed
            forward does not reach the seam.

    Seams nest: what an inner handler runs by `call.run()` reaches the outer seam. A seam belongs to the thread that
    opened it. Hooks are removed when it closes, on errors too.

    Raises:
        SeamError: on opening, for what could not be caught; while running, for FlexAttention, other threads, and
            handlers' answers of a wrong shape, dtype or device; on closing, if the model ran and made no call.
    """

    def __init__(self, model: nn.Module, handler: Handler | None = None, *, edits: bool = False):
        super().__init__()
        self.model, self.handler, self.edits = require_module(model), handler, edits
        self._hooks: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._thread = threading.get_ident()
        self._stack: list[Frame] = []
        self._state: Forward | None = None
        self._tops: set[int] = set()
        self._forward = -1
        self._busy = False
        self._ran: set[str] = set()
        self._made: set[str] = set()
        self._callers: set[str] = set()
        self._trusted: dict[int, bool] = {}
        self._lengths: dict[tuple[str, int], int] = {}

    # -- opening and closing

    def __enter__(self) -> Seam:
        if self.handler is None:
            return self
        if self._hooks:
            raise SeamError("this seam is already open; make another one to nest them")
        found = list(refusals(self.model, self.edits))
        if found:
            raise SeamError("cannot catch all attention of this model: " + "; ".join(found))
        self._reset()
        try:
            for name, module in self.model.named_modules():
                if module is self.model or not _attends_to_nothing(module):
                    self._attach(name, module)
            super().__enter__()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if self.handler is None:
            return
        try:
            super().__exit__(exc_type, exc_value, traceback)
        finally:
            self._detach()
            self._stack, self._state = [], None
        if exc_type is None:
            self._check_seen()
        elif exc_type is not SeamError:
            # raised while torch.compile was tracing (FlexAttention compiles itself), and wrapped by it
            inner = re.search(r'SeamError\("(.+?)"\)', str(exc_value))
            if inner:
                raise SeamError(inner[1]) from exc_value

    def _attach(self, name: str, module: nn.Module) -> None:
        params = parameter_names(module)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter_module(Frame(module, name, params, args, kwargs))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._leave_module(module)

        self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _check_seen(self) -> None:
        kind = type(self.model).__name__
        if not self._ran:
            warnings.warn(
                f"the seam was open but {kind} was not run in it; run the very model that was given, by calling it "
                "(`model(...)`, not `model.forward(...)`)",
                SeamWarning,
                stacklevel=3,
            )
            return
        if not self._callers:
            raise SeamError(
                f"{kind} ran and made no scaled_dot_product_attention call, so nothing of its attention was seen. "
                "Likely causes: it computes attention by matrix products or by a kernel of another package (use its "
                "option for scaled_dot_product_attention), or it has no attention"
            )
        silent = [
            name
            for name, module in self.model.named_modules()
            if name in self._ran - self._made and _looks_like_attention(module) and not self._inside_caller(name)
        ]
        if silent:
            shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
            warnings.warn(
                f"{shown}: ran without a scaled_dot_product_attention call though the name says attention; what they "
                "compute was not seen",
                SeamWarning,
                stacklevel=3,
            )

    def _inside_caller(self, name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in self._callers for i in range(1, len(parts)))

    # -- the stack of running modules

    def _enter_module(self, frame: Frame) -> None:
        if self._busy:
            return
        if torch._C._current_graph_task_id() != -1:  # a checkpointed part, recomputed in the backward pass
            if self.edits:
                raise SeamError(_RECOMPUTED.format(frame.name))
            return
        if threading.get_ident() != self._thread:
            raise SeamError(
                f"{type(self.model).__name__} runs in another thread than the one that opened the seam, where its "
                "attention cannot be caught; open the seam inside that thread"
            )
        top = frame.module is self.model
        if top or not self._stack:
            if top or not self._tops or id(frame.module) in self._tops:
                self._forward += 1
                self._state = Forward(frame)
                self._tops = set()
                self._stack.clear()  # left over where the model was interrupted
            self._tops.add(id(frame.module))
        elif self._state is not None and self._state.top.wraps:
            self._state.top = frame  # the module inside knows the names of its arguments
        self._ran.add(frame.name)
        self._stack.append(frame)

    def _leave_module(self, module: nn.Module) -> None:
        if self._busy or not self._stack:
            return
        if torch._C._current_graph_task_id() != -1 or threading.get_ident() != self._thread:
            return
        if any(frame.module is module for frame in reversed(self._stack)):
            while self._stack.pop().module is not module:
                pass
        if module is self.model:
            self._tops = set()

    # -- the calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._catch(func, args, kwargs)
        if func is _MHA:
            return self._multi_head(args, kwargs)
        if func is attend:
            return self._own(args, kwargs)
        if type(func) in _OPERATORS and self._stack and not self._busy:
            name = str(getattr(func, "__name__", func))
            if name.split(".")[0] == "scaled_dot_product_attention":
                return self._catch(func, args, kwargs)
            if "scaled_dot_product" in name or name.startswith("flex_attention"):
                raise SeamError(
                    f"layer {self._stack[-1].name!r} calls {name}, which the seam does not watch; let it call "
                    "torch.nn.functional.scaled_dot_product_attention"
                )
        return func(*args, **kwargs)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`regard.attend`: the handler sees the call of SDPA that computes the same; left alone, it runs as it is."""
        if not self._stack or self._busy or self._state is None:
            return attend(*args, **kwargs)
        like, how = as_sdpa(self._stack[-1].name, args, kwargs)
        out = self._answer(_SDPA, like, how)
        if out is None:
            return attend(*args, **kwargs)
        if kwargs.get("return_lse"):
            raise SeamError(
                f"layer {self._stack[-1].name!r} asks regard.attend for the lse, which a changed output does not have"
            )
        return out

    def _catch(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not self._stack or self._busy or self._state is None:
            return func(*args, **kwargs)
        out = self._answer(func, args, kwargs)
        return func(*args, **kwargs) if out is None else out

    def _answer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What the handler gives for a call, in the caller's form."""
        frame = self._stack[-1]
        if frame.name not in self._callers:
            self._first_call(frame)
        call = self._call(frame, func, args, kwargs)
        assert self.handler is not None
        self._busy = True
        try:
            out = self.handler(call)
        finally:
            self._busy = False
        return None if out is None else call.give(out)

    def _first_call(self, frame: Frame) -> None:
        self._callers.add(frame.name)
        self._made.update(f.name for f in self._stack)
        if self.edits and self._state is not None and self._state.grad and _in_checkpoint():
            self._callers.discard(frame.name)
            raise SeamError(_RECOMPUTED.format(frame.name))

    def _call(self, frame: Frame, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        state = self._state
        assert state is not None
        q, k, v, mask, dropout, causal, scale, gqa = _arguments(*args, **kwargs)
        if q.is_nested or k.is_nested:
            raise SeamError(f"layer {frame.name!r} attends over nested tensors; accepted are padded ones")
        layout = layout_of(q, k, v, mask, gqa, frame, lambda: state.batches(self._stack, q.shape[-2]), self._trusted)
        index = state.counts.get(frame.name, 0)
        state.counts[frame.name] = index + 1
        before = self._lengths.get((frame.name, index))
        self._lengths[frame.name, index] = k.shape[-2]
        return Call(
            layer=frame.name,
            module=frame.module,
            index=index,
            forward=self._forward,
            q=layout.open_q(),
            k=layout.open_kv(k),
            v=layout.open_kv(v),
            mask=layout.open_mask(),
            is_causal=causal,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            dropout=dropout,
            enable_gqa=gqa,
            keys_before=before,
            layout=layout,
            frames=tuple(self._stack),
            state=state,
            original=(func, args, kwargs),
        )

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`F.multi_head_attention_forward`, inside which torch-function modes are off: stand in for what it calls."""
        if not self._stack or self._busy:
            return _MHA(*args, **kwargs)
        bound = _MHA_SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not given["need_weights"] or (given["is_causal"] and given["attn_mask"] is None):
            with Relay.of(self._catch):
                return _MHA(*args, **kwargs)
        # Weights are wanted: take the branch that calls attention, but give it the arithmetic of the other one.
        given["need_weights"], given["is_causal"] = False, False
        attention = WeightedAttention(self._stack[-1].name)
        with Relay.of(attention.watched(self._catch), attention):
            out, _ = _MHA(*bound.args, **bound.kwargs)
        return out, attention.weights_for(given["average_attn_weights"], given["query"].dim() == 3)


_RECOMPUTED = (
    "layer {!r} runs under torch.utils.checkpoint: its recomputed forward does not pass through the seam, so an edit "
    "would be missing from it and gradients would be wrong; turn checkpointing off, or run without gradients"
)


def _in_checkpoint() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/utils/checkpoint.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool]:
    return query, key, value, attn_mask, float(dropout_p), bool(is_causal), scale, enable_gqa


def _attends_to_nothing(module: nn.Module) -> bool:
    """Layers without parts that are PyTorch's own (Linear, LayerNorm, ...) or named as such: not worth a hook."""
    kind = type(module)
    return not module._modules and (
        kind.__module__.startswith("torch.nn.modules.") or bool(_SIMPLE.search(kind.__name__))
    )


def _looks_like_attention(module: nn.Module) -> bool:
    if not re.search(r"attention|attn", type(module).__name__, re.IGNORECASE):
        return False
    projections = [m for m in module.modules() if "Linear" in type(m).__name__ or "Conv" in type(m).__name__]
    return len(projections) >= 2
