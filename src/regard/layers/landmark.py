"""Landmark attention: the weight of a token at a block's end opens the block, near or far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.kernels.attend import attend
from regard.kernels.combine import gate
from regard.kernels.rotary import rotate
from regard.kernels.slots import attend_slots
from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.layers.state import KeyValueState
from regard.patterns import Causal, Pattern, Routed
from regard.patterns.landmarks import LandmarkRoute, OwnBlock
from regard.patterns.routed import Summary

__all__ = ["LandmarkAttention", "landmark_attention"]

TILE = 1 << 22  # numbers of one tile of block outputs


def landmark_attention(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    block: int,
    *,
    far: tuple[Sequence[Float[Tensor, "batch heads q_len v_dim"]], Sequence[Float[Tensor, "batch heads q_len"]]]
    | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len v_dim"]:
    """Attention in groups, gated by landmarks (arXiv 2305.16300): ``p_0 o_own + sum_g p_g o_g``.

    Position ``j % (block + 1) == block`` is a landmark. For a query i in block b, ``o_own`` is its attention over the
    regular keys of b up to i, ``o_g`` that over the regular keys of an earlier block g, and
    ``p = softmax([lse_own, s_g, ...])`` with the score s_g of g's landmark: own keys and earlier landmarks share one
    softmax. Landmarks have no weight of their own; a query that is one ignores itself. The queries are the last ones.

    Args:
        q, k, v: scores are ``q . k / sqrt(head_dim)``.
        block: regular tokens of a block.
        far: more blocks, of keys that are not in k: ``o_g`` and ``s_g`` of each (-inf where a query has none).
        backend: of `attend`.
    """
    P, start, q_len = block + 1, k.shape[2] - q.shape[2], q.shape[2]
    group, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    own, lse = attend(q, k, v, OwnBlock(P), q_start=start, return_lse=True, backend=backend)
    finished = (start + q_len - 1) // P  # blocks before that of the last query
    landmark = k[:, :, block::P][:, :, :finished].repeat_interleave(group, 1)
    at = torch.arange(start, start + q_len, device=q.device)
    later = at[:, None] // P > torch.arange(finished, device=q.device)
    score = (scale * (q @ landmark.mT)).to(lse.dtype).masked_fill(~later, -torch.inf)
    far_outs, far_scores = ((), ()) if far is None else far
    logits = torch.cat([lse[..., None], score, *(s[..., None].to(lse.dtype) for s in far_scores)], -1)
    p = logits.softmax(-1)
    out = gate([own, *far_outs], [p[..., 0], *p[..., 1 + finished :].unbind(-1)])
    each = max(1, TILE // max(1, q.shape[0] * q.shape[1] * q_len * v.shape[3]))
    for g in range(0, finished, each):
        stop = min(g + each, finished)
        rows = max(0, (g + 1) * P - start)  # the first query after block g
        found = _blocks(q[:, :, rows:], k, v, range(g, stop), P, backend)
        part = gate(found, p[:, :, rows:, 1 + g : 1 + stop].unbind(-1))
        out = torch.cat([out[:, :, :rows], out[:, :, rows:] + part], 2)
    return out


def _blocks(q: Tensor, k: Tensor, v: Tensor, blocks: range, P: int, backend: str) -> Sequence[Tensor]:
    """Attention of every query over the regular keys of each block by itself, as one batch."""
    span, n, batch = slice(blocks.start * P, blocks.stop * P), len(blocks), q.shape[0]
    keys, values = (x[:, :, span].unflatten(2, (n, P))[:, :, :, :-1].transpose(1, 2).flatten(0, 1) for x in (k, v))
    queries = q[:, None].expand(batch, n, *q.shape[1:]).flatten(0, 1)
    out = attend(queries, keys, values, q_start=0, backend=backend)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, n)).unbind(1)


class LandmarkState(KeyValueState):
    """Keys rotated by their place **in their block**, values and positions of every token so far, and the landmarks.

    ``block`` is the length of a block, landmark included.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.summary: Summary | None = None

    def clone(self) -> LandmarkState:
        """A copy that later calls on this one do not change."""
        other = LandmarkState(self.block)
        other.tensors, other.length = {k: t.clone() for k, t in self.tensors.items()}, self.length
        other.summary = self.summary  # never changed in place
        return other

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.summary = None

    def cut(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        super().cut(length)
        if self.summary is not None:
            finished = self.summary["landmark"][:, :, : length // self.block]
            self.summary = Summary(length, {"landmark": finished})


class LandmarkAttention(MultiHead):
    """Multi-head landmark attention (arXiv 2305.16300). The text has a landmark after every ``block`` tokens.

    Without a state every block is open, as in training: see `landmark_attention`. With a state the text is **read in
    chunks**: a query and head open the ``topk`` finished blocks, of those before its chunk, whose landmarks weigh
    most, and join them by the same rule to its local part, the tokens from the first unfinished block at the start of
    the chunk on. With rotary positions the local part starts at position ``(topk + 1) (block + 1)`` and the j-th opened
    block is read in block j, or j + 1 if it is one of the last topk: positions stay within ``topk + 2`` blocks and a
    chunk at any length. Where just topk blocks are finished the numbers are those of the form without a state.

    Args:
        dim, heads, kv_heads: as in `MultiHead`.
        block: tokens of a block before its landmark.
        position: rotary positions, `Rope(dim / heads)`, or None.
        topk, chunk, share: of reading; see `LandmarkRoute`. topk may be set at any time between texts.
        backend: of `attend`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        block: int = 50,
        *,
        kv_heads: int | None = None,
        position: Rope | None = None,
        topk: int = 4,
        chunk: int = 250,
        share: Literal["each", "max_heads", "max_queries"] = "each",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads, position=position, backend=backend)
        self.block, self.topk, self.chunk, self.share = block, topk, chunk, share
        self.chooser: type[LandmarkRoute] = LandmarkRoute
        """The class of `route`: another one chooses other blocks, for comparison."""
        _ = self.route  # refuses numbers that do not fit

    @property
    def route(self) -> LandmarkRoute:
        """What opens blocks in reading; keys and queries are given to it before rotation."""
        turn = None if self.position is None else self._turn
        return self.chooser(self.topk, self.block, self.share, self.chunk, turn)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.position is None:
            return x
        assert isinstance(self.position, Rope)
        return rotate(x, positions, self.position.inv_freq.to(x.device))

    def forward(
        self,
        x: Float[Tensor, "batch length {self.dim}"],
        *,
        context: Float[Tensor, "batch c_len {self.dim}"] | None = None,
        pattern: Pattern | None = None,
        state: KeyValueState | None = None,
        positions: Int[Tensor, "length"] | None = None,
    ) -> Float[Tensor, "batch length {self.dim}"]:
        """Attend; with a state, to what was read before.

        Raises:
            ValueError: a pattern other than Causal(), a context, positions with a state, or an x that does not fit.
        """
        if pattern is not None and pattern != Causal():
            raise ValueError(f"pattern must be None or Causal(), which landmark attention is, got {pattern}")
        if state is None:
            return super().forward(x, context=context, positions=positions)
        if positions is not None:
            raise ValueError("positions must be None with a state: what is read is renumbered")
        if not isinstance(state, LandmarkState):
            raise ValueError(f"state must be what new_state() gave, got {type(state).__name__}")
        self._check(x, context, None, None)
        at = torch.arange(state.length, state.length + x.shape[1], device=x.device)
        q, k, v, *_ = self._project(x, context, at)
        route, done = self.route, state.length
        state.summary = route.summarize(k, past=state.summary)
        keys, values, _ = state.append(self._turn(k, at % (self.block + 1)), v, at)
        start, outs = done, []
        while start < state.length:
            stop = min(start // self.chunk * self.chunk + self.chunk, state.length)
            queries = q[:, :, start - done : stop - done]
            outs.append(self._read(queries, keys, values, start, stop, route, state.summary))
            start = stop
        z = torch.cat(outs, 2) if outs else q
        return self.o_proj(z.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Any, start: int, *_: Any) -> Any:
        return landmark_attention(q, k, v, self.block, backend=self.backend)

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, route: LandmarkRoute, summary: Summary
    ) -> Tensor:
        """The queries ``[start, stop)`` of one chunk."""
        P, turn = self.block + 1, self._turn
        blocks = start // self.chunk * self.chunk // P  # finished before the chunk
        first = blocks * P
        place = torch.arange(first, stop, device=q.device) - first + (self.topk + 1) * P
        here = place[start - first :]
        mine, near = turn(q, here), (turn(k[:, :, first:stop], place // P * P), v[:, :, first:stop])
        if not blocks:
            return landmark_attention(mine, *near, self.block, backend=self.backend)
        chosen = route.select(q, summary, q_start=start)
        assert chosen.index is not None
        index = chosen.index.long()
        slots = route.slots(index, torch.full((stop - start,), blocks, device=q.device))
        # Only differences of places count: the opened blocks stay in block 0, and their readers move.
        moved = [turn(q, here - slots[..., n] * P) for n in range(index.shape[3])]
        far = k[:, :, :first]
        opened = torch.where(index >= 0, index, 0)
        spans = Routed.spans(
            opened * P,
            opened * P + torch.where(index >= 0, self.block, 0),
            q_len=stop - start,
            kv_len=first,
            q_start=start,
            heads=q.shape[1] if index.shape[1] > 1 else None,
            check=False,
        )
        outs, _ = attend_slots(moved, far, v[:, :, :first], spans, backend=self.backend)
        landmark = far[:, :, self.block :: P].repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = []
        for n, reader in enumerate(moved):
            at = opened[..., n].expand(*q.shape[:3])
            key = landmark.gather(2, at[..., None].expand(*at.shape, q.shape[3]))
            score = (reader * key).sum(-1) * q.shape[3] ** -0.5
            scores.append(score.masked_fill(index[..., n] < 0, -torch.inf))
        return landmark_attention(mine, *near, self.block, far=(outs, scores), backend=self.backend)

    def new_state(self) -> LandmarkState:
        """An empty state for reading."""
        return LandmarkState(self.block + 1)
