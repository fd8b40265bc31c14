"""How the model rotated the queries and keys of a call, where it has rotary positions: what undoes it exactly."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.rotary import rotate, unrotate
from regard.watch.context import Frame
from regard.watch.positions import own_frame
from regard.watch.refuse import SeamError

if TYPE_CHECKING:
    from regard.watch.call import Call

__all__ = ["Rotary"]

# Arguments by which models hand rotations to their layers in forms other than transformers' (cos, sin).
_OTHER_NAMES = ("rotary_emb", "image_rotary_emb", "rotary_pos_emb", "rope", "freqs_cis")
_ROTATES = re.compile(r"Rotary|Rope|RoPE")  # names of parts that do
_PROBED = 8  # queries on which the rotation is compared with what the model computes


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one call: vector x at position p came in as ``scaling * rotate(x, p, inv_freq)``.

    Positions are those the model rotated by, its position ids, which differ from indices on the padded token axis
    where padding stands on the left. Those of padding keys in a cache are not known: they are the indices, moved as
    the other keys of their row are.
    """

    inv_freq: Float[Tensor, "pairs"]
    """Radians a position; fewer than ``head_dim / 2`` where the model leaves the last dimensions as they are."""
    interleaved: bool
    """Pairs are dimensions (2p, 2p + 1), else (p, p + pairs)."""
    scaling: float
    """What models with stretched frequencies multiply rotated dimensions by; 1 in others."""
    q_pos: Int[Tensor, "#batch q_len"]
    kv_pos: Int[Tensor, "#batch kv_len"]

    def unrotate_q(self, q: Float[Tensor, "batch heads q_len head_dim"]) -> Float[Tensor, "batch heads q_len head_dim"]:
        """The queries before rotation and scaling."""
        return self._undo(q, self.q_pos)

    def unrotate_k(
        self, k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    ) -> Float[Tensor, "batch kv_heads kv_len head_dim"]:
        """The keys before rotation and scaling."""
        return self._undo(k, self.kv_pos)

    def rotate(
        self, x: Float[Tensor, "*rows head_dim"], positions: Int[Tensor, "..."]
    ) -> Float[Tensor, "*rows head_dim"]:
        """Vectors as the model would give them at these positions, which broadcast to their rows."""
        return self._scaled(rotate(x, positions, self.inv_freq, interleaved=self.interleaved), self.scaling)

    def _undo(self, x: Tensor, positions: Tensor) -> Tensor:
        x = self._scaled(x, 1 / self.scaling)
        return unrotate(x, positions[:, None], self.inv_freq, interleaved=self.interleaved)

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        width = 2 * len(self.inv_freq)
        return x if factor == 1 else torch.cat([x[..., :width] * factor, x[..., width:]], -1)


def rotary_of(call: Call) -> Rotary | None:
    """The rotation of a call; None where its layer has none.

    Known of this project's layers (a `Rope` plug) and of transformers' models, whose layers are handed ``(cos, sin)``:
    frequencies, scaling and form are those by which the model's own function turns probes as `rotate` does.

    Raises:
        SeamError: the layer rotates, or may, in a way that cannot be told.
    """
    frame = own_frame(call)
    plug = getattr(frame.module, "position", None)
    if isinstance(plug, nn.Module) and isinstance(getattr(plug, "inv_freq", None), Tensor):
        q_pos, kv_pos = _own_positions(call, frame)
        inv_freq = plug.inv_freq
        assert isinstance(inv_freq, Tensor)
        return Rotary(inv_freq.to(call.q.device), False, 1.0, q_pos, kv_pos)
    handed = _handed(call)
    if handed is None:
        _refuse_if_other(call)
        return None
    if call.kind == "cross":
        raise SeamError(
            f"layer {call.layer!r} attends across sequences with rotary positions; where keys stand is unknown"
        )
    if getattr(frame.module, "use_rope", True) in (False, 0) or _plain(call, frame):
        return None
    q_pos, kv_pos = _positions(call)
    inv_freq, interleaved, scaling = _matched(call, frame, handed, q_pos)
    return Rotary(inv_freq, interleaved, scaling, q_pos, kv_pos)


def _own_positions(call: Call, frame: Frame) -> tuple[Tensor, Tensor]:
    """Positions of a `MultiHead`: what it was given, or its state's."""
    q_len, kv_len, device = call.q.shape[2], call.k.shape[2], call.q.device
    state, given = frame.bound.get("state"), frame.bound.get("positions")
    if state is not None:
        held = state.tensors["positions"]
        return held[None, -q_len:], held[None]
    q_pos = torch.arange(q_len, device=device) if given is None else given
    across = getattr(frame.module, "source", "self") == "cross"
    return q_pos[None], (torch.arange(kv_len, device=device) if across else q_pos)[None]


def _handed(call: Call) -> tuple[Tensor, Tensor] | None:
    """The ``(cos, sin)`` that the calling layer was handed, ``[batch or 1, q_len, width]``."""
    for frame in reversed(call.frames[-3:]):
        given = frame.bound.get("position_embeddings")
        if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(x, Tensor) for x in given):
            return given[0], given[1]
    return None


def _refuse_if_other(call: Call) -> None:
    for frame in reversed(call.frames[-3:]):
        for name in _OTHER_NAMES:
            if frame.bound.get(name) is not None:
                raise SeamError(
                    f"layer {call.layer!r} was handed its rotary positions as {name!r}; the seam knows them as "
                    "position_embeddings=(cos, sin) and as the Rope of this project's layers"
                )
    inside = [m for m in own_frame(call).module.modules() if _ROTATES.search(type(m).__name__)]
    if inside:
        raise SeamError(
            f"layer {call.layer!r} rotates by a part of its own, {type(inside[0]).__name__}; the seam knows rotary "
            "positions handed to layers as position_embeddings=(cos, sin) and the Rope of this project's layers"
        )


def _plain(call: Call, frame: Frame) -> bool:
    """Whether the last query is its projection as it stands: a layer that leaves its positions unused."""
    project, hidden = getattr(frame.module, "q_proj", None), frame.hidden
    if hidden is None or hidden.ndim != 3 or not isinstance(project, nn.Linear) or hasattr(frame.module, "q_norm"):
        return False
    row = nn.functional.linear(hidden[:, -1], project.weight, project.bias)
    q = call.q[:, :, -1].flatten(1)
    some = int(call.q_pos[-1]) > 0
    return some and row.shape == q.shape and torch.allclose(row.to(q.dtype), q, rtol=1e-4, atol=1e-6)


def _positions(call: Call) -> tuple[Tensor, Tensor]:
    """Position ids of queries and keys."""
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    ids = next((x for x in _ids(call) if x.shape[-1] == q_len), None)
    if ids is not None and ids.ndim != 2:
        raise SeamError(
            f"layer {call.layer!r} has position ids of shape {list(ids.shape)}, several numbers a token; accepted is "
            "[batch, q_len]"
        )
    q_pos = call.q_pos[None] if ids is None else ids.to(call.q.device)
    if kv_len == q_len:
        return q_pos, q_pos
    if not call.positions_known:
        raise SeamError(
            f"layer {call.layer!r}: where its {kv_len} keys stand is not known, so they cannot be turned back"
        )
    moved = q_pos - call.q_pos
    if bool((moved != moved[:, -1:]).any()):
        raise SeamError(
            f"layer {call.layer!r}: its position ids do not follow on from each other; those of cached keys are unknown"
        )
    return q_pos, call.kv_pos[None] + moved[:, -1:]


def _ids(call: Call) -> Iterator[Tensor]:
    for frame in reversed(call.frames):
        ids = frame.bound.get("position_ids")
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            yield ids


def _matched(
    call: Call, frame: Frame, handed: tuple[Tensor, Tensor], q_pos: Tensor
) -> tuple[Float[Tensor, "pairs"], bool, float]:
    """Frequencies, form and scaling by which `rotate` gives what the model's own function gives."""
    turn = _function(frame.module)
    where = f"layer {call.layer!r} ({type(frame.module).__name__})"
    if turn is None:
        raise SeamError(
            f"{where} has rotary positions and its module no apply_rotary_pos_emb, so how they turn is unknown"
        )
    cos, sin = handed
    rows = torch.linspace(0, cos.shape[1] - 1, min(_PROBED, cos.shape[1]), device=cos.device).round().long()
    cos, sin, at = cos[:, rows], sin[:, rows], q_pos[:, rows]
    probe = torch.randn(1, 1, len(rows), call.q.shape[3], generator=torch.Generator().manual_seed(0)).to(cos)
    probe = probe.expand(cos.shape[0], -1, -1, -1)
    given = _tried(turn, probe, cos, sin)
    found = []
    if given is not None:
        quarter = _tried(turn, probe[..., : given.shape[-1]], torch.zeros_like(cos), torch.ones_like(sin))
        for inv_freq, scaling in _frequencies(call):
            inv_freq = inv_freq.to(cos.device)
            if 2 * len(inv_freq) > given.shape[-1]:
                continue
            right = torch.full_like(inv_freq, math.pi / 2)
            x = probe[..., : given.shape[-1]]
            for interleaved in (False, True)[: len(inv_freq)]:  # one pair: both forms are the same
                one = torch.ones_like(at[:, None])
                mine = Rotary(inv_freq, interleaved, scaling, at, at)
                whole = Rotary(right, interleaved, 1.0, at, at)
                if _close(whole.rotate(x, one), quarter) and _close(mine.rotate(x, at[:, None]), given):
                    found.append((inv_freq, interleaved, scaling))
    if not found:
        raise SeamError(
            f"{where} turns its queries in a way that none of the model's frequencies and neither form (half-split, "
            "interleaved) gives; accepted is one angle a pair, position times inv_freq"
        )
    if any(not torch.equal(found[0][0], other[0]) or found[0][1:] != other[1:] for other in found[1:]):
        raise SeamError(
            f"{where}: {len(found)} of the model's rotations give the same at these positions; run more tokens"
        )
    return found[0]


def _function(module: nn.Module) -> Callable[..., Any] | None:
    return getattr(sys.modules.get(type(module).__module__), "apply_rotary_pos_emb", None)


def _tried(turn: Callable[..., Any], probe: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """The model's function on probes as wide as a head, else as what it turns (the layer splits off the rest)."""
    for width in dict.fromkeys((probe.shape[-1], cos.shape[-1])):
        try:
            given = turn(probe[..., :width], probe[..., :width], cos, sin)[0]
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        if isinstance(given, Tensor) and given.shape == probe[..., :width].shape:
            return given
    return None


def _frequencies(call: Call) -> list[tuple[Tensor, float]]:
    """Every ``inv_freq`` of the model with its scaling (``<kind>_inv_freq`` where layers differ)."""
    notes = call.state.notes
    if "inv_freq" not in notes:
        notes["inv_freq"] = [
            (x, float(getattr(m, name.replace("inv_freq", "attention_scaling"), 1.0)))
            for m in call.state.top.module.modules()
            for name, x in m._buffers.items()
            if x is not None and name.endswith("inv_freq") and "original" not in name and x.ndim == 1
        ]
    return notes["inv_freq"]


def _close(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.shape != b.shape:
        return False
    close = 1e-4 if b.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(a.float(), b.float(), rtol=close, atol=close)
