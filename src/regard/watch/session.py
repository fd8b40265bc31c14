"""The one mechanism behind `intervene`, `trace` and `scan`: changes and readings at sites while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy
from regard.watch.at_attention import AtAttention
from regard.watch.at_modules import AtModules
from regard.watch.edits import WEIGHT_OPS, Edit
from regard.watch.passes import open_pass
from regard.watch.places import place_of
from regard.watch.refuse import _checkpointed, _compiled
from regard.watch.running import Action, Backend
from regard.watch.seam import Seam, SeamError
from regard.watch.site import Site

_active: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()


class Session(AtModules, AtAttention):
    """Edits, frozen values and readings on a model, active inside `with`.

    A session opened inside another on the same model takes over the outer one's edits, so that all edits at a site act
    in the order they were given, frozen values after them, readings last.
    """

    def __init__(
        self,
        model: nn.Module,
        actions: Sequence[tuple[Edit, slice | None]] = (),
        freeze: Mapping[Site, Tensor] | None = None,
        reads: Sequence[Site] = (),
        *,
        parts: Anatomy | None = None,
        inputs: Any = None,
        valid: Bool[Tensor, "batch total"] | None = None,
        backend: Backend = "fused",
        grad: bool = False,
    ):
        if backend not in ("fused", "reference"):
            raise ValueError(f"backend={backend!r}; accepted: 'fused', 'reference'")
        self.model, self.valid, self.backend, self.grad = model, valid, backend, grad
        self._parts, self._inputs = parts, inputs
        frozen = [(Edit(site, "set", value=value), None) for site, value in (freeze or {}).items()]
        for edit, _ in (*actions, *frozen):
            self._check(edit)
        self.actions = [self._action(e.site, e, batch=b) for e, b in actions]
        self.actions += [self._action(e.site, e, frozen=True) for e, _ in frozen]
        self.reads = [self._action(site) for site in dict.fromkeys(reads)]
        self.own = list(self.actions)
        self.readings = {}
        self.suspended = False
        self.passes = 0
        self.generated = False
        self._pass = None
        self._depth = 0
        self._runs = {}
        self._handles: list[Any] = []
        self._seam: Seam | None = None

    def _check(self, edit: Edit) -> None:
        if edit.site.part == "weights" and edit.op not in WEIGHT_OPS and self.backend != "reference":
            raise ValueError(
                f"op={edit.op!r} on 'weights' needs each weight, which a fused kernel never holds: pass "
                f"backend='reference' (dense, for short inputs), or use one of {', '.join(WEIGHT_OPS)}, "
                "or edit part 'z'"
            )

    def _action(self, site: Site, edit: Edit | None = None, frozen: bool = False, batch: slice | None = None) -> Action:
        return Action(site, place_of(site, self.model, lambda: self.parts), edit, frozen, batch)

    # -- opening and closing ------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        stack = _active.setdefault(self.model, [])
        if stack:
            outer = stack[-1]
            edits = [a for a in outer.actions if not a.frozen] + [a for a in self.actions if not a.frozen]
            self.actions = edits + [a for s in (outer, self) for a in s.actions if a.frozen]
            self.valid = outer.valid if self.valid is None else self.valid
            self.backend = outer.backend if self.backend == "fused" else self.backend
        if self.actions or self.grad:
            _refuse(self.model)
        if stack:
            stack[-1].suspended = True
        stack.append(self)
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._remove(kind, error, trace)
        if error is None:
            self._report_idle()

    def _install(self) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        everything = self.actions + self.reads
        at_hooks = dict.fromkeys((a.place.module, a.place.door) for a in everything if a.place.door != "attention")
        # The pass opens before any other hook on the root and closes after all of them.
        entries = {"": self.model} if everything or self.backend == "reference" else {}
        encoder = _encoder(self.model) if entries else None
        if encoder is not None:
            entries["encoder"] = encoder
        for entry in entries.values():
            self._handles.append(entry.register_forward_pre_hook(self._open(entry), with_kwargs=True))
        for name, door in at_hooks:
            self._handles.append(self._hook(modules[name], name, door))
        for entry in entries.values():
            self._handles.append(entry.register_forward_hook(self._close, always_call=True))
        if self.backend == "reference" or any(a.place.door == "attention" for a in everything):
            seam = Seam(self.model, self._attend, edits=True)
            seam.__enter__()
            self._seam = seam

    def _remove(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        stack = _active.get(self.model, [])
        if self in stack:
            stack.remove(self)
        if stack:
            stack[-1].suspended = False
            stack[-1].passes += self.passes
            stack[-1].generated |= self.generated
        if self._seam is not None:
            seam, self._seam = self._seam, None
            seam.__exit__(kind, error, trace)

    def _report_idle(self) -> None:
        for a in self.own if self.passes else ():
            if a.acted:
                continue
            if a.site.steps == "generated" and not self.generated:
                raise RuntimeError(f"{a.site}: the model ran, but never on a generated token")
            raise RuntimeError(
                f"{a.site}: the model ran {self.passes} times, but this edit never acted: "
                f"{'no token had that position' if a.site.pos is not None else 'its module did not run'}"
            )

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def _open(self, entry: nn.Module) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.suspended:
                return
            self._depth += 1
            if self._depth > 1:
                return
            own_decoder = entry is self.model and _encoder(self.model) is not None
            self._pass = open_pass(module, args, kwargs, self.valid, own_decoder)
            self.passes += 1
            self.generated |= self._pass.step == "generated"
            self._runs = {}

        return hook

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.suspended:
            return
        self._depth -= 1
        if self._depth == 0:
            self._pass = None


def _refuse(model: nn.Module) -> None:
    """What hooks cannot reach, or would reach twice."""
    modules = list(model.named_modules())
    found = [*_compiled(modules), *_checkpointed(modules)]
    if found:
        raise SeamError("cannot edit this model: " + "; ".join(found))


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder, which generation runs on its own."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    ask: Any = getattr(model, "get_encoder", None)
    encoder = ask() if callable(ask) else None
    return encoder if isinstance(encoder, nn.Module) else None
