"""Another attention pattern in a model that someone else wrote, while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.kernels.attend import attend
from regard.patterns import Full, Pattern, Route
from regard.watch.anatomy import Anatomy, anatomy
from regard.watch.call import Call
from regard.watch.own_mask import own_mask
from regard.watch.route_call import attend_route
from regard.watch.seam import Seam, SeamError
from regard.watch.summaries import Summaries

__all__ = ["AttendWith", "attend_with"]

Table = Mapping[int | str, Pattern | Route | None]


def attend_with(
    model: nn.Module,
    pattern: Pattern | Route | Table,
    *,
    keep_mask: bool = True,
    backend: str = "auto",
    anatomy: Anatomy | None = None,
) -> AttendWith:
    """Let `model` attend under a pattern: `with attend_with(model, Window(256) | Sinks(4)): model.generate(...)`.

    The pattern counts in each sample's own tokens: padding on either side moves it along, as the model's padding mask
    or its position ids tell it, and cached keys have the positions they were read at. Gradients pass. The model's own
    causality, window and padding stay in force.

    A route (`BlockTopK` and its kin) decides anew in each call, from the call's own q and k, inside the model's
    causality and padding; blocks count from each sample's first token. While a cache grows, what the route knows of the
    keys is appended to; where the keys are other ones than before (a new cache, one cut back, beams in another order)
    it is made again.

    Args:
        model: the module that is called.
        pattern: a pattern or route for every self-attention, or a table ``{layer: pattern, route or None}`` for the
            layers it names (None, or not named: left as they are). A layer is the number of a block or the name of an
            attention module, as `regard.anatomy` has them; cross-attention is changed only where it is named. Heads
            that differ: `per_head([...])`, one pattern for each query head.
        keep_mask: False: the pattern stands in place of the model's causality or window; padding stays out all the
            same.
        backend: of `regard.attend`.
        anatomy: the model's parts, for tables with numbers, where the model does not say enough of itself.

    A recorder opened inside sees the calls as the model makes them, without the pattern; one outside sees them with it.

    Raises:
        LookupError: on opening, for a layer that the model does not have.
        ValueError: on opening, for what is no pattern; while running, naming the layer, for a pattern that does not fit
            its heads or lengths, and for a call whose positions are not known or that drops out weights.
        SeamError: for attention that cannot be caught (see `Seam`); on closing, for a layer of the table that made no
            call though the model ran.
    """
    return AttendWith(model, pattern, keep_mask=keep_mask, backend=backend, parts=anatomy)


class AttendWith:
    """The context that `attend_with` gives. `used` counts the changed calls of each layer; `summaries` says how often
    what a route knows was appended to and how often it was made."""

    def __init__(self, model: nn.Module, pattern: Any, *, keep_mask: bool, backend: str, parts: Anatomy | None):
        self.model, self.keep_mask, self.backend = model, keep_mask, backend
        self._everywhere = pattern if isinstance(pattern, (Pattern, Route)) else None
        self._table = {} if self._everywhere is not None else _by_name(model, pattern, parts)
        self.summaries = Summaries()
        self._looking: RemovableHandle | None = None
        self._seam = Seam(model, self._answer, edits=True)
        self.used: dict[str, int] = {}

    def __enter__(self) -> AttendWith:
        self.used = {}
        self.summaries.clear()
        self._seam.__enter__()
        self._looking = self.model.register_forward_pre_hook(lambda *_: self.summaries.look())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._looking is not None:
            self._looking.remove()
        self.summaries.forget()
        self._seam.__exit__(kind, error, trace)
        idle = [name for name, p in self._table.items() if p is not None and name not in self.used]
        if kind is None and idle and self._seam._ran:
            raise SeamError(f"{', '.join(idle)}: the model ran and made no attention call there")

    def _answer(self, call: Call) -> Tensor | None:
        pattern = self._table.get(call.layer)
        if self._everywhere is not None and call.kind == "self":
            pattern = self._everywhere
        if pattern is None:
            return None
        self.used[call.layer] = self.used.get(call.layer, 0) + 1
        try:
            return self._attend(call, pattern)
        except ValueError as error:
            raise ValueError(f"layer {call.layer!r}: {error}") from error

    def _attend(self, call: Call, pattern: Pattern | Route) -> Tensor:
        _check(call)
        own = own_mask(call)
        if not self.keep_mask and own.valued and own.shape != Full():
            raise ValueError(
                "its mask adds values to the scores and forbids pairs besides, so keep_mask=False cannot tell what it "
                "would add there; use keep_mask=True"
            )
        if isinstance(pattern, Route):
            return attend_route(call, pattern, own, self.summaries, keep=self.keep_mask, backend=self.backend)
        bias = own.bias if self.keep_mask or own.valued else None
        cross = call.kind == "cross"
        dtype = call.result_dtype
        found = attend(
            call.q.to(dtype),
            call.k.to(dtype),
            call.v.to(dtype),
            own.around(pattern, self.keep_mask, shifted=not cross),
            q_start=call.positions.first if cross else call.q_start,
            bias=bias,
            scale=call.scale,
            backend=self.backend,
        )
        assert isinstance(found, Tensor)
        return found


def _by_name(model: nn.Module, table: Any, parts: Anatomy | None) -> dict[str, Pattern | Route | None]:
    if not isinstance(table, Mapping):
        raise ValueError(
            "pattern must be a regard Pattern, a Route or a table {layer: pattern, route or None}, got "
            f"{type(table).__name__}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    out: dict[str, Pattern | Route | None] = {}
    for layer, pattern in table.items():
        if pattern is not None and not isinstance(pattern, (Pattern, Route)):
            raise ValueError(
                f"pattern of layer {layer!r} must be a Pattern, a Route or None, got {type(pattern).__name__}"
            )
        if isinstance(layer, int) and not isinstance(layer, bool):
            parts = anatomy(model) if parts is None else parts
            name = parts.attention(layer)
        elif isinstance(layer, str) and layer in modules:
            name = layer
        else:
            near = difflib.get_close_matches(str(layer), modules, n=3, cutoff=0.3)
            raise LookupError(
                f"layer {layer!r}: the model has no such module; accepted is a block's number or the name of an "
                f"attention module" + (f", near it {', '.join(near)}" if near else "")
            )
        if name in out:
            raise ValueError(f"layer {layer!r} is named twice in the table: it is {name}")
        out[name] = pattern
    return out


def _check(call: Call) -> None:
    if call.dropout:
        raise ValueError(
            f"the call drops out {call.dropout:g} of its weights, which attention under a pattern does not; call "
            "model.eval(), or set the model's attention dropout to 0"
        )
    if call.folded:
        raise ValueError(
            "the model folds windows or axes into the batch before attention, so positions there are not those of its "
            "tokens; name other layers in a table"
        )
    if not call.positions_known:
        raise ValueError(
            "nothing says where the keys stand (evicted from a cache, pooled, or no tokens), so a pattern cannot be "
            "placed"
        )
    gone = call.kind == "self" and call.positions.first > call.q_start
    if gone and not bool((call.kv_pos.diff() == 1).all()):
        raise ValueError("the cache holds keys that do not follow one another, and a pattern needs them to")
