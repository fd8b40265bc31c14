"""Multi-head attention with places to plug mechanisms in: a mechanism is a plug, or a few lines that make one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.kernels.normalize import Normalizer, Softmax
from regard.layers.position import Position
from regard.layers.state import KeyValueState
from regard.patterns import Full, Pattern

__all__ = ["MultiHead"]

Source = Literal["self", "cross", "guide"]
Norm = Literal["rms", "layer", "l2"]
GateAt = Literal["z", "q", "k", "v", "out"]
_NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class MultiHead(nn.Module):
    """Attention in heads: ``y = W_o concat_h z_h``, ``z_h = softmax(scale q_h K_h^T + bias) V_h`` under a pattern.

    The stages run in this order, and each but the first, fifth and last is empty unless something is plugged in:

    1. project: q, k, v, heads split off; `source` says from what;
    2. norm: ``qk_norm`` over the head dimension of q and k;
    3. position: ``position.rotate`` and later ``position.bias``;
    4. temper: ``temper(q, n) -> q``, a factor for each query; n ``[1 or heads, length, 1]`` is the number of keys it
       may see (with one more axis in front where the pattern differs between samples);
    5. attend: under ``pattern & self.pattern``;
    6. weigh: ``weigh(z, lse, q, v, n, x) -> z``, whatever is affine in the weights;
    7. gate: ``gate(x, z) -> z``, or of q, k, v (right after the projection) or the output, as ``gate_at`` says;
    8. mix: ``mixer(z, x) -> z'`` ``[batch, heads', length, v_dim']`` with ``heads' * v_dim' = heads * v_dim``;
    9. merge: heads concatenated, projected back to ``dim``.

    No plug sees the weights; only ``normalize`` does. A query that may see no key has z = 0 before stage 6.

    Args:
        dim: of x and y.
        heads: query heads.
        kv_heads: key and value heads, a divisor of ``heads``; None: as many.
        head_dim: of a query or key; None: ``dim / heads``, which must be whole.
        v_dim: of a value; None: ``head_dim``.
        bias: whether the projections have one.
        source: "self": all from x. "cross": q from x, k and v from context. "guide": q and k from context, v from x.
        qk_norm: "rms" or "layer" (learned scale), "l2" (unit vectors), or None.
        position, temper, weigh, gate, mixer: the plugs; Modules, so that hooks can read them.
        pattern: of this layer; a pattern given in a call is met with it. None: every pair.
        normalize: "softmax" or a `Normalizer`.
        gate_at: what the gate is applied to: "z", "q", "k", "v" or "out".
        backend: of `attend`.

    Raises:
        ValueError: a number or name that does not fit, each named.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        v_dim: int | None = None,
        bias: bool = False,
        source: Source = "self",
        qk_norm: Norm | None = None,
        position: Position | None = None,
        temper: nn.Module | None = None,
        pattern: Pattern | None = None,
        normalize: Normalizer | Literal["softmax"] = "softmax",
        weigh: nn.Module | None = None,
        gate: nn.Module | None = None,
        gate_at: GateAt = "z",
        mixer: nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        given = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "v_dim": v_dim}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim = {dim} unless head_dim is given, got {heads}")
        _one_of("source", source, get_args(Source))
        _one_of("qk_norm", qk_norm, (None, *get_args(Norm)))
        _one_of("gate_at", gate_at, get_args(GateAt))
        if isinstance(normalize, str) and normalize != "softmax":
            raise ValueError(f"normalize must be 'softmax' or a Normalizer, got {normalize!r}")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.v_dim = self.head_dim if v_dim is None else v_dim
        self.source, self.gate_at, self.backend, self.pattern = source, gate_at, backend, pattern
        self.normalize: Normalizer = Softmax() if isinstance(normalize, str) else normalize
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.v_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.v_dim, dim, bias=bias)
        self.q_norm, self.k_norm = _norm(qk_norm, self.head_dim), _norm(qk_norm, self.head_dim)
        self.position, self.temper, self.weigh, self.gate, self.mixer = position, temper, weigh, gate, mixer

    def forward(
        self,
        x: Float[Tensor, "batch length {self.dim}"],
        *,
        context: Float[Tensor, "batch c_len {self.dim}"] | None = None,
        pattern: Pattern | None = None,
        state: KeyValueState | None = None,
        positions: Int[Tensor, "length"] | None = None,
    ) -> Float[Tensor, "batch length {self.dim}"]:
        """Attend.

        Args:
            x: the sequence; with a state, its newest tokens.
            context: the other sequence, where ``source`` needs one.
            pattern: met with the layer's own.
            state: what `new_state` gave; keys and values of x are added to it.
            positions: of x, for the position plug; None: ``state.length, state.length + 1, ...``. Patterns always go
                by index.

        Raises:
            ValueError: a shape that does not fit; context without use for it, or none where one is needed; context of
                another length under "guide"; a state under another source than "self", or under a pattern by which
                tokens would see keys that come later (stepping would not give the numbers of the parallel form).
        """
        self._check(x, context, state, positions)
        start = 0 if state is None else state.length
        end = start + x.shape[1]
        pattern = _meet(pattern, self.pattern)
        if state is not None:
            _need_no_later_key(pattern, start, end, self.heads)
        at = torch.arange(start, end, device=x.device) if positions is None else positions
        q, k, v, pos_q, pos_k = self._project(x, context, at)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.position is not None:
            q, k = self.position.rotate(q, k, pos_q, pos_k)
        if state is not None:
            k, v, pos_k = state.append(k, v, pos_k)
        bias = None if self.position is None else self.position.bias(q, pos_q, pos_k)
        n = None
        if self.temper is not None or self.weigh is not None:
            n = _seen(pattern, q.shape[2], k.shape[2], start).to(x.device)
        if self.temper is not None:
            q = self.temper(q, n)
        given = self._attend(q, k, v, pattern, start, bias, x, pos_q)
        z: Any = given if self.weigh is None else self.weigh(*given, q, v, n, x)
        z = self._gated("z", x, z)
        if self.mixer is not None:
            z = self.mixer(z, x)
        y = self.o_proj(z.transpose(1, 2).flatten(2))
        return self._gated("out", x, y)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: Pattern | None,
        start: int,
        bias: Tensor | None,
        x: Tensor,
        pos_q: Tensor,
    ) -> Any:
        """Stage 5, ``out`` or, with `weigh`, ``(out, lse)``: replaced by layers that are not one softmax.

        x is what the queries came from and pos_q their positions.
        """
        return attend(
            q,
            k,
            v,
            pattern,
            q_start=start,
            bias=bias,
            scale=self.head_dim**-0.5,
            normalize=self.normalize,
            return_lse=self.weigh is not None,
            backend=self.backend,
        )

    def new_state(self) -> KeyValueState:
        """An empty state for stepping.

        Raises:
            ValueError: keys and values come from another sequence than the queries.
        """
        if self.source != "self":
            raise ValueError(f"state must be None: with source={self.source!r} nothing is carried between calls")
        return KeyValueState()

    def _check(self, x: Tensor, context: Tensor | None, state: KeyValueState | None, positions: Tensor | None) -> None:
        for name, value in (("x", x), ("context", context)):
            if value is not None and (value.ndim != 3 or value.shape[-1] != self.dim):
                raise ValueError(f"{name} must be [batch, length, {self.dim}], got shape {tuple(value.shape)}")
        if positions is not None and positions.shape != x.shape[1:2]:
            raise ValueError(f"positions must be [length] = [{x.shape[1]}], got shape {tuple(positions.shape)}")
        if self.source == "self" and context is not None:
            raise ValueError(f"context must be None with source='self', got shape {tuple(context.shape)}")
        if self.source != "self" and context is None:
            raise ValueError(f"context must be given with source={self.source!r}, got None")
        if self.source == "guide" and context is not None and context.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"context must have the batch and length of x with source='guide', {tuple(x.shape[:2])}, "
                f"got {tuple(context.shape[:2])}"
            )
        if self.source != "self" and state is not None:
            raise ValueError(f"state must be None: with source={self.source!r} nothing is carried between calls")

    def _project(self, x: Tensor, context: Tensor | None, at: Tensor) -> tuple[Tensor, ...]:
        """q, k, v ``[batch, heads, length, d]`` and the positions of queries and keys."""
        for_q = context if self.source == "guide" and context is not None else x
        for_k = x if context is None else context
        for_v = context if self.source == "cross" and context is not None else x
        q = _split(self._gated("q", for_q, self.q_proj(for_q)), self.heads)
        k = _split(self._gated("k", for_k, self.k_proj(for_k)), self.kv_heads)
        v = _split(self._gated("v", for_v, self.v_proj(for_v)), self.kv_heads)
        pos_k = torch.arange(for_k.shape[1], device=x.device) if self.source == "cross" else at
        return q, k, v, at, pos_k

    def _gated(self, place: str, source: Tensor, value: Tensor) -> Tensor:
        return self.gate(source, value) if self.gate is not None and self.gate_at == place else value

    def extra_repr(self) -> str:
        """Shapes and pattern."""
        shape = f"{self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return f"{shape}, v_dim={self.v_dim}, source={self.source!r}, pattern={self.pattern}"


def _one_of(name: str, value: Any, accepted: Sequence[Any]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _norm(kind: Norm | None, head_dim: int) -> nn.Module:
    return nn.Identity() if kind is None else UnitVectors() if kind == "l2" else _NORMS[kind](head_dim)


class UnitVectors(nn.Module):
    """``x / |x|`` over the last dimension."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The vectors at length 1 (those of length 0 stay)."""
        return nn.functional.normalize(x, dim=-1)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _meet(given: Pattern | None, own: Pattern | None) -> Pattern | None:
    if given is None or own is None:
        return own if given is None else given
    return own & given


def _seen(pattern: Pattern | None, q_len: int, kv_len: int, start: int) -> Tensor:
    """How many keys each query may see, ``[1 or heads, q_len, 1]``; ``[samples, ...]`` where samples differ."""
    pattern = Full() if pattern is None else pattern
    heads, samples = range(pattern.heads or 1), range(pattern.samples or 1)
    each = [[pattern.of(h, s).row_counts(q_len, kv_len, start) for h in heads] for s in samples]
    counts = torch.stack([torch.stack(rows) for rows in each])[..., None]
    return counts if pattern.samples else counts[0]


def _need_no_later_key(pattern: Pattern | None, start: int, end: int, heads: int) -> None:
    """Raise if a query of ``[start, end)`` may see key ``end``, the next to come."""
    pattern = Full() if pattern is None else pattern
    rows, key, head = torch.arange(start, end)[:, None], torch.tensor([[end]]), torch.arange(heads)[:, None, None]
    sample = torch.arange(pattern.samples or 1)[:, None, None, None]
    try:
        some = bool(pattern.allows(rows, key, head, sample).any())
    except ValueError:
        return  # the pattern knows no such index, so none comes later
    if some:
        raise ValueError(
            f"state: under the pattern {pattern} a query of {start}..{end - 1} sees key {end}, which has not come; "
            "stepping takes a pattern like Causal(), or whole blocks of BlockCausal"
        )
