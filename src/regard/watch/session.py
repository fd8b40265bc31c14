"""The one mechanism behind `intervene`, `trace` and `scan`: changes and readings at sites while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.watch import weights as weigh
from regard.watch.anatomy import Anatomy, anatomy
from regard.watch.call import Call
from regard.watch.edits import WEIGHT_OPS, Edit, change
from regard.watch.passes import Axis, Pass, columns, open_pass, token_columns
from regard.watch.places import Place, find_logits, place_of, read_input, replace_first, write_input
from regard.watch.refuse import _checkpointed, _compiled
from regard.watch.seam import Seam, SeamError
from regard.watch.select import Selection
from regard.watch.site import BLOCK_PARTS, MODEL_PARTS, Site

Backend = Literal["fused", "reference"]

_active: weakref.WeakKeyDictionary[nn.Module, list[Session]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Action:
    """One change or reading at one site, for some samples of the batch."""

    site: Site
    place: Place
    edit: Edit | None = None
    frozen: bool = False
    batch: slice | None = None
    acted: bool = False


@dataclass(eq=False)
class Reading:
    """What was read at a site: in gradient mode also the tensor to differentiate by, and how to cut its gradient."""

    value: Tensor
    source: Tensor | None = None
    cut: Callable[[Tensor], Tensor] = field(default=lambda g: g)


class Session:
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
        self.readings: dict[Site, Reading] = {}
        self.suspended = False
        self.passes = 0
        self.generated = False
        self._pass: Pass | None = None
        self._depth = 0
        self._runs: dict[str, int] = {}
        self._handles: list[Any] = []
        self._seam: Seam | None = None

    @property
    def parts(self) -> Anatomy:
        """The model's anatomy, found when first needed."""
        if self._parts is None:
            try:
                self._parts = anatomy(self.model)
            except ValueError:
                if self._inputs is None:
                    raise
                self._parts = anatomy(self.model, self._inputs)
        return self._parts

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
        idle = [a for a in self.actions if not a.acted]
        if not self.passes or not idle:
            return
        inner = any(a not in self.actions for a in idle)
        for a in idle if not inner else ():
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

    def _now(self, site: Site) -> Pass:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{site}: the module ran again during the backward pass (activation checkpointing): an edit would "
                "differ between the two runs and the gradient be wrong; switch checkpointing off"
            )
        if self._pass is None:
            raise RuntimeError(
                f"{site}: its module ran outside a forward pass of {type(self.model).__name__}: "
                "give the model that you call"
            )
        return self._pass

    def _due(self, place: Place) -> list[Action]:
        """The actions at a place in this pass, in order: edits, frozen values, readings."""
        return [a for a in self.actions + self.reads if a.place == place and self._in_step(a.site)]

    def _in_step(self, site: Site) -> bool:
        return site.steps == "all" or self._now(site).step == site.steps

    # -- hooks on modules ---------------------------------------------------------------------------------------------

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

    def _once(self, site: Site, key: str) -> None:
        """A site names one tensor of a pass; a module that runs again has another."""
        self._now(site)
        self._runs[key] = self._runs.get(key, 0) + 1
        if self._runs[key] > 1:
            raise RuntimeError(
                f"{site}: its module ran {self._runs[key]} times in one forward pass (weights shared between layers, "
                "or windows), and a site cannot say which run is meant"
            )

    def _axis(self, site: Site) -> Axis:
        now = self._now(site)
        if site.part in MODEL_PARTS:
            return now.axis(site.part != "embed" and now.decoder is not now.main)
        if now.decoder is now.main or site.layer is None:
            return now.main
        return now.axis(self.parts.decoder[self.parts.block(site.layer)])

    def _changed(self, a: Action, x: Tensor, axis: Axis) -> Tensor:
        assert a.edit is not None
        a.acted = True
        padded = a.site.pos is None and axis.valid is not None and not bool(axis.valid.all())
        y = change(a.edit, x, padded=padded)
        return y

    def _select(
        self,
        a: Action,
        axis: Axis,
        batch: int,
        held: Tensor,
        total: int,
        has_heads: bool,
        heads: tuple[int, ...] | None = None,
    ) -> Selection | None:
        """The part of a tensor that an action names; None when none of its tokens is held by this tensor."""
        site = a.site
        drop = isinstance(site.head, int)
        if site.pos is None:
            return Selection(has_heads, a.batch, heads, drop_head=drop)
        own = batch if a.batch is None else len(range(batch)[a.batch])
        per_sample = a.batch is not None and axis.valid is not None and len(axis.valid) == batch
        cut = Axis(axis.total, axis.valid[a.batch], axis.unread) if per_sample else axis  # type: ignore[index]
        column, there = token_columns(cut, site.pos, own, total, held.device, str(site))
        if not bool(there.all()):
            late = self._now(site).step == "prompt" and site.steps != "prompt" and a.edit is not None
            if not (late and not bool(there.any())):
                short = int((~there).any(1).nonzero()[0])
                raise IndexError(f"{site}: sample {short} of the batch has no token at that position")
        index = torch.full((total,), -1, dtype=torch.long, device=held.device)
        index[held] = torch.arange(len(held), device=held.device)
        at = index[column]
        there = there & (at >= 0)
        if not bool(there.any()):
            if a.edit is None:
                raise IndexError(f"{site}: no sample holds that token in this pass")
            return None
        return Selection(has_heads, a.batch, heads, at.clamp_min(0), there, drop, isinstance(site.pos, int))

    def _read(self, a: Action, x: Tensor, selection: Selection) -> tuple[Tensor, bool]:
        a.acted = True
        if not self.grad:
            self.readings[a.site] = Reading(selection.pick(x).detach().clone())
            return x, False
        # A copy to differentiate by, and a copy to go on with: what follows may write in place.
        source = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        self.readings[a.site] = Reading(selection.pick(source).detach().clone(), source, selection.pick)
        return source.clone(), True

    # -- attention ----------------------------------------------------------------------------------------------------

    def _attend(self, call: Call) -> Tensor | None:
        if self.suspended:
            return None
        at = {p: self._due(Place(call.layer, "attention", p)) for p in ("q", "k", "v", "weights", "z")}
        due = [a for actions in at.values() for a in actions]
        if not due and self.backend != "reference":
            return None
        if due:
            self._once(due[0].site, call.layer)
            self._refuse_folds(call, due)
        now = self._pass
        assert now is not None
        inside = call.kind == "cross" or self._in_decoder(call.layer)
        axes = (now.axis(inside), now.main if call.kind == "cross" else now.axis(inside))
        tensors = {"q": call.q, "k": call.k, "v": call.v}
        for part in ("q", "k", "v"):
            for a in at[part]:
                tensors[part] = self._act_heads(a, tensors[part], call, axes)
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        z = self._weigh(call, q, k, v, at["weights"], axes)
        for a in at["z"]:
            z = self._act_heads(a, z, call, axes)
        return z

    def _in_decoder(self, layer: str) -> bool:
        now = self._pass
        return now is not None and now.decoder is not now.main and self.parts.decoder[self.parts.block(layer)]

    def _refuse_folds(self, call: Call, due: list[Action]) -> None:
        if call.folded and any(a.site.pos is not None or a.batch is not None for a in due):
            raise ValueError(
                f"{due[0].site}: {call.layer} folds windows or axes into the batch, so its rows are not whole samples: "
                "pos and per-sample edits have no meaning there"
            )

    def _act_heads(self, a: Action, x: Tensor, call: Call, axes: tuple[Axis, Axis]) -> Tensor:
        """One action on q, k, v or z, [batch, heads, length, width]."""
        keys = a.site.part in ("k", "v")
        heads = _heads_of(a, call)
        if keys and heads is not None:
            x, heads = _key_heads(a, x, heads, call)
        selection = self._where(a, call, axes, heads, keys)
        if selection is None:
            return x
        if a.edit is None:
            return self._read(a, x, selection)[0]
        return selection.put(x, self._changed(a, selection.pick(x), axes[1] if keys else axes[0]))

    def _where(
        self, a: Action, call: Call, axes: tuple[Axis, Axis], heads: tuple[int, ...] | None, keys: bool
    ) -> Selection | None:
        if a.site.pos is None:
            return self._select(a, axes[0], len(call.q), call.q_pos[:0], 0, True, heads)
        if not call.positions_known:
            raise ValueError(f"{a.site}: {call.layer} does not say where its keys stand, so pos cannot be resolved")
        axis, held = (axes[1], call.kv_pos) if keys else (axes[0], call.q_pos)
        # Keys of self-attention end with the queries: a preallocated cache is longer than what was written.
        end = call.kv_pos if keys and call.kind == "cross" else call.q_pos
        total = max(axis.total or 0, int(end.max()) + 1)
        inside = (held < total) & (held >= 0)
        return self._select(a, axis, len(call.q), held[inside], total, True, heads)

    def _weigh(self, call: Call, q: Tensor, k: Tensor, v: Tensor, due: list[Action], axes: tuple[Axis, Axis]) -> Tensor:
        """The attention call with its edits on weights, and readings of weights."""
        edits = [a for a in due if a.edit is not None]
        reads = [a for a in due if a.edit is None]
        where = [(a, self._where(a, call, axes, _heads_of(a, call), keys=False)) for a in edits]
        chain = [(a, s) for a, s in where if s is not None]
        if self.backend == "reference":
            p = self._dense(call, q, k, v, chain, axes)
            z = (p @ weigh.per_head(v, q.shape[1]).to(p.dtype)).to(q.dtype)
        else:
            z = self._fused(call, q, k, v, chain, axes)
            p = None
        for a in reads:
            with torch.no_grad():
                p = self._dense(call, q, k, v, chain, axes) if p is None else p.detach()
            selection = self._where(a, call, axes, _heads_of(a, call), keys=False)
            assert selection is not None
            z = self._read_weights(a, selection, p, v, z)
        return z

    def _fused(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chain: list[tuple[Action, Selection]],
        axes: tuple[Axis, Axis],
    ) -> Tensor:
        new = {n: x for n, x, old in (("q", q, call.q), ("k", k, call.k), ("v", v, call.v)) if x is not old}
        z = None
        for i, (a, selection) in enumerate(chain):
            a.acted = True
            rows = weigh.rows_of(call, q, k, v, axes, selection)
            for b, other in chain[: i + 1]:
                assert b.edit is not None
                shared = weigh.shared_cells(selection, other, q.shape[0], q.shape[1], q.shape[2], q.device)
                if shared is None or bool(shared.any()):
                    rows = weigh.edited(rows, b.edit, shared)
            if selection.whole and rows.c is None:
                # One call with other arguments: what watches from outside sees the edited attention.
                mask, causal, empty = weigh.kernel_mask(rows)
                new["q"] = rows.q
                z = call.run(**new, mask=mask, is_causal=causal)
                z = z if empty is None else z.masked_fill(empty, 0)
            else:
                z = call.run(**new) if z is None else z
                z = selection.put_full(z, weigh.attend(rows).to(z.dtype))
        return call.run(**new) if z is None else z

    def _dense(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chain: list[tuple[Action, Selection]],
        axes: tuple[Axis, Axis],
    ) -> Tensor:
        """The matrix of weights after the edits, [batch, heads, q_len, kv_len]."""
        everything = Selection(has_heads=True)
        rows = weigh.rows_of(call, q, k, v, axes, everything)
        for a, selection in chain:
            assert a.edit is not None
            a.acted = True
            if a.edit.op in WEIGHT_OPS:
                shared = weigh.shared_cells(everything, selection, q.shape[0], q.shape[1], q.shape[2], q.device)
                rows = weigh.edited(rows, a.edit, shared)
            else:
                p = weigh.weights(rows)
                rows = weigh.with_weights(rows, selection.put(p, self._changed(a, selection.pick(p), axes[0])))
        return weigh.weights(rows)

    def _read_weights(self, a: Action, selection: Selection, p: Tensor, v: Tensor, z: Tensor) -> Tensor:
        a.acted = True
        if not self.grad:
            self.readings[a.site] = Reading(selection.pick(p).clone())
            return z
        source = z.clone() if z.requires_grad else z.detach().clone().requires_grad_()
        values = v.detach()
        self.readings[a.site] = Reading(
            selection.pick(p).clone(), source, lambda g: selection.pick(weigh.weight_gradient(g, values))
        )
        return source.clone()


def _refuse(model: nn.Module) -> None:
    """What hooks cannot reach, or would reach twice."""
    modules = list(model.named_modules())
    found = [*_compiled(modules), *_checkpointed(modules)]
    if found:
        raise SeamError("cannot edit this model: " + "; ".join(found))


def _heads_of(a: Action, call: Call) -> tuple[int, ...] | None:
    head, heads = a.site.head, call.q.shape[1]
    if head is None:
        return None
    several = (head,) if isinstance(head, int) else tuple(head)
    if max(several) >= heads:
        raise IndexError(f"{a.site}: {call.layer} has {heads} heads, 0 to {heads - 1}")
    return several


def _key_heads(a: Action, x: Tensor, heads: tuple[int, ...], call: Call) -> tuple[Tensor, tuple[int, ...]]:
    """The key heads that these query heads read; edits must name whole groups, or expand the keys."""
    groups = call.groups
    expanded = x.shape[1] == call.q.shape[1]
    if groups == 1 or (expanded and a.edit is None):
        return x, heads
    if a.edit is None:
        return x, tuple(dict.fromkeys(h // groups for h in heads)) if len(heads) > 1 else (heads[0] // groups,)
    if a.edit.expand or expanded:
        if not expanded:
            x = x.repeat_interleave(groups, dim=1)
        return x, heads
    shared = sorted({h // groups for h in heads})
    if len(heads) != len(shared) * groups:
        together = [list(range(g * groups, (g + 1) * groups)) for g in shared]
        raise ValueError(
            f"{a.site}: query heads share keys and values in groups of {groups}, and this would change them for all of "
            f"{together}: pass expand=True to the Edit to change them for the named heads alone, or name whole groups"
        )
    return x, tuple(shared)


def _encoder(model: nn.Module) -> nn.Module | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    return encoder if isinstance(encoder, nn.Module) else None
