"""One caught attention call: what it computes on, where it was made, and the way to run it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.watch.context import Forward, Frame
from regard.watch.layout import Layout
from regard.watch.padding import key_mask, row_mask, survey
from regard.watch.positions import Positions, kind_of, locate
from regard.watch.refuse import SeamError
from regard.watch.rotary import Rotary, rotary_of


class _Keep:
    """Stands for "as it was" where None already means something."""

    def __repr__(self) -> str:
        return "KEEP"


KEEP = _Keep()


@dataclass(eq=False)
class Call:
    """One `scaled_dot_product_attention` of the model, in one form whatever way the model packed it.

    q is `[batch, heads, q_len, head_dim]`, k and v `[batch, kv_heads, kv_len, ...]` with repetition undone
    (query head h reads key head `h // groups`), mask broadcasts to `[batch, heads, q_len, kv_len]` (bool: True may
    meet; float: added to the scores). Positions are indices on the padded token axis, so the first real token of a
    left-padded row is not 0. What is derived (`positions`, `valid`, `kind`, `causal`, `step`) is computed when asked
    for, while the handler runs.
    """

    layer: str
    """Qualified name of the innermost module that was running; the model itself is `""`."""
    module: nn.Module
    index: int
    """This is the module's `index`-th call in this forward, from 0."""
    forward: int
    """Number of the model forward the call belongs to, from 0, counted from the moment the seam opened."""
    q: Float[Tensor, "batch heads q_len head_dim"]
    k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    v: Float[Tensor, "batch kv_heads kv_len v_dim"]
    mask: Bool[Tensor, "#batch #heads #q_len #kv_len"] | Float[Tensor, "#batch #heads #q_len #kv_len"] | None
    is_causal: bool
    scale: float
    dropout: float
    enable_gqa: bool
    keys_before: int | None = field(repr=False)
    """kv_len of this layer's call in the forward before; None at its first."""
    layout: Layout = field(repr=False)
    """How the model's own tensors were packed."""
    frames: tuple[Frame, ...] = field(repr=False)
    state: Forward = field(repr=False)
    original: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]] = field(repr=False)

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's current forward by name (`input_ids`, `attention_mask`, ...)."""
        return self.state.inputs

    @property
    def folded(self) -> bool:
        """Whether the model folded something else into the batch (windows, axes), so rows are not whole samples.

        True when the batch of q is the batch of no tensor the model was given. Positions then count inside a fold.
        """
        batches = self.state.batches(self.frames, self.q.shape[2])
        return self.q.shape[0] > 1 and bool(batches) and self.q.shape[0] not in batches

    @cached_property
    def kind(self) -> Literal["self", "cross"]:
        """`cross` when the keys come from another sequence than the queries."""
        return kind_of(self)

    @cached_property
    def positions(self) -> Positions:
        """Where queries and keys stand on their token axes."""
        return locate(self)

    @property
    def q_pos(self) -> Int[Tensor, "q_len"]:
        """Absolute position of each query."""
        return self.positions.q

    @property
    def kv_pos(self) -> Int[Tensor, "kv_len"]:
        """Absolute position of each key (on the other sequence's axis when `kind` is cross)."""
        return self.positions.kv

    @property
    def q_start(self) -> int:
        """Index on the key axis of the first query, as the kernels want it; 0 for cross-attention."""
        return self.positions.q_start

    @property
    def positions_known(self) -> bool:
        """False when nothing says where the keys stand (evicted, pooled): position statistics must then refuse."""
        return self.positions.known

    @cached_property
    def rotary(self) -> Rotary | None:
        """How the layer rotated queries and keys by their positions, to undo it; None where it did not.

        Raises:
            SeamError: it did, and how cannot be told.
        """
        return rotary_of(self)

    @cached_property
    def valid(self) -> Bool[Tensor, "batch q_len"]:
        """False for padding queries and for queries whose mask allows no key."""
        return row_mask(self)

    @cached_property
    def kv_valid(self) -> Bool[Tensor, "batch kv_len"]:
        """False for padding keys and for slots of a cache that hold no token yet."""
        return key_mask(self)

    @cached_property
    def causal(self) -> bool:
        """Whether no query of this call may see a later key: said by the call or checked in the mask."""
        if self.kind == "cross":
            return False
        if self.is_causal:
            return True
        where = self.positions
        if self.mask is None:
            return where.q_start >= self.k.shape[2] - 1
        return survey(self).causal

    @property
    def step(self) -> Literal["prompt", "generated"]:
        """`generated` for a single query that follows earlier tokens, else `prompt`.

        A prompt fed in chunks of several tokens stays `prompt`; generation without a cache runs the whole text
        again each time and is `prompt` too.
        """
        where = self.positions
        return "generated" if self.q.shape[2] == 1 and where.first > 0 else "prompt"

    def run(
        self,
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        mask: Tensor | _Keep | None = KEEP,
        is_causal: bool | None = None,
        scale: float | None = None,
        dropout: float | None = None,
    ) -> Float[Tensor, "batch heads q_len v_dim"]:
        """The original attention, with replacements; with none, on exactly the original arguments.

        k and v may have `kv_heads` or all `heads`. A new mask leaves `is_causal` standing: the two are merged,
        since the kernel takes one or the other (as in it, causal counts both axes from 0).

        Raises:
            SeamError: a replacement whose batch, heads or width do not fit.
        """
        function, args, kwargs = self.original
        if (
            q is None
            and k is None
            and v is None
            and mask is KEEP
            and is_causal is None
            and scale is None
            and dropout is None
        ):
            return self.layout.open_output(function(*args, **kwargs))
        for name, given, heads in (
            ("q", q, (self.q.shape[1],)),
            ("k", k, (self.k.shape[1], self.q.shape[1])),
            ("v", v, (self.k.shape[1], self.q.shape[1])),
        ):
            if given is not None and (
                given.ndim != 4 or given.shape[0] != self.q.shape[0] or given.shape[1] not in heads
            ):
                accepted = " or ".join(str(h) for h in dict.fromkeys(heads))
                raise SeamError(
                    f"layer {self.layer!r}: run({name}=...) got shape {list(given.shape)}; accepted is "
                    f"[{self.q.shape[0]}, {accepted}, length, width]"
                )
        causal = self.is_causal if is_causal is None else is_causal
        new_mask = self.mask if isinstance(mask, _Keep) else mask
        if causal and new_mask is not None:
            rows = (q if q is not None else self.q).shape[2]
            columns = (k if k is not None else self.k).shape[2]
            new_mask, causal = _merge_causal(new_mask, rows, columns), False
        out = self.layout.run(
            function,
            q=q,
            k=k,
            v=v,
            mask=new_mask,
            same_mask=isinstance(mask, _Keep) and new_mask is self.mask,
            dropout_p=self.dropout if dropout is None else dropout,
            is_causal=causal,
            scale=self.scale if scale is None else scale,
        )
        return out

    def give(self, out: object) -> Tensor:
        """A handler's answer in the form the model expects, checked."""
        batch, heads, q_len, _ = self.q.shape
        shape = (batch, heads, q_len, self.v.shape[3])
        where = f"layer {self.layer!r}: the handler returned"
        if not isinstance(out, Tensor):
            raise SeamError(f"{where} {type(out).__name__}; accepted is None or a tensor of shape {list(shape)}")
        if tuple(out.shape) != shape:
            raise SeamError(f"{where} shape {list(out.shape)}; accepted is {list(shape)}")
        dtype = self.result_dtype
        if out.dtype != dtype:
            raise SeamError(f"{where} dtype {out.dtype}; accepted is {dtype}")
        if out.device != self.q.device:
            raise SeamError(f"{where} a tensor on {out.device}; accepted is {self.q.device}")
        return self.layout.close_output(out)

    @property
    def result_dtype(self) -> torch.dtype:
        """What the call's output is: q's dtype, or autocast's where that is on."""
        device = self.q.device.type
        if self.q.dtype != torch.float64 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.q.dtype


def _merge_causal(mask: Tensor, rows: int, columns: int) -> Tensor:
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril()
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, float("-inf"))
