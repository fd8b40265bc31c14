"""What acts while a model runs: actions at sites, the current pass, and which tokens a site names in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.edits import Edit, change
from regard.watch.passes import Axis, Pass, token_columns
from regard.watch.places import Place
from regard.watch.select import Selection
from regard.watch.site import MODEL_PARTS, Site

Backend = Literal["fused", "reference"]


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


class Running:
    """The state of one session that hooks and the attention handler share."""

    model: nn.Module
    valid: Bool[Tensor, "batch total"] | None
    backend: Backend
    grad: bool
    actions: list[Action]
    reads: list[Action]
    readings: dict[Site, Reading]
    suspended: bool
    _parts: Anatomy | None
    _inputs: object
    _pass: Pass | None
    _runs: dict[str, int]

    @property
    def parts(self) -> Anatomy:
        """The model's anatomy, found when first needed."""
        if self._parts is None:
            self._parts = anatomy_for(self.model, self._inputs)
        return self._parts

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
