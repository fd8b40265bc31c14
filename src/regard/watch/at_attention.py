"""Sites met inside the attention call: q, k and v first, then weights, then z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.watch import weights as weigh
from regard.watch.call import Call
from regard.watch.edits import WEIGHT_OPS
from regard.watch.passes import Axis
from regard.watch.places import Place
from regard.watch.running import Action, Reading, Running
from regard.watch.select import Selection

Axes = tuple[Axis, Axis]
"""The token axes of queries and of keys."""


class AtAttention(Running):
    """The handler of the seam."""

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

    def _act_heads(self, a: Action, x: Tensor, call: Call, axes: Axes) -> Tensor:
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

    def _where(self, a: Action, call: Call, axes: Axes, heads: tuple[int, ...] | None, keys: bool) -> Selection | None:
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

    def _weigh(self, call: Call, q: Tensor, k: Tensor, v: Tensor, due: list[Action], axes: Axes) -> Tensor:
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
        axes: Axes,
    ) -> Tensor:
        new: dict[str, Any] = {
            n: x for n, x, old in (("q", q, call.q), ("k", k, call.k), ("v", v, call.v)) if x is not old
        }
        z: Tensor | None = None
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
        axes: Axes,
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
