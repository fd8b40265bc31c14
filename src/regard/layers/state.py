"""What a layer remembers between calls, so that stepping token by token gives the numbers of the parallel form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["KeyValueState", "RecurrentState"]


class RecurrentState:
    """Named tensors and the number of tokens they stand for; a layer updates it in place."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def clone(self) -> RecurrentState:
        """A copy that later calls on this one do not change."""
        other = type(self)()
        other.tensors, other.length = {k: t.clone() for k, t in self.tensors.items()}, self.length
        return other

    def reset(self) -> None:
        """Forget everything."""
        self.tensors, self.length = {}, 0

    def cut(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, where the layer's state can.

        Raises:
            ValueError: it cannot, or there are fewer tokens.
        """
        raise ValueError(f"{type(self).__name__} cannot go back to length {length}; clone() it before the call instead")


class KeyValueState(RecurrentState):
    """The keys (rotated), values and positions of every token so far: ``k``, ``v`` ``[batch, kv_heads, length, d]``."""

    def append(
        self,
        k: Float[Tensor, "batch kv_heads length head_dim"],
        v: Float[Tensor, "batch kv_heads length v_dim"],
        positions: Int[Tensor, "length"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the newest tokens; returns all keys, values and positions.

        Raises:
            ValueError: another batch size than before.
        """
        if self.length:
            held = self.tensors["k"].shape[0]
            if held != k.shape[0]:
                raise ValueError(f"state holds a batch of {held}, got x of a batch of {k.shape[0]}")
            k, v = torch.cat([self.tensors["k"], k], 2), torch.cat([self.tensors["v"], v], 2)
            positions = torch.cat([self.tensors["positions"], positions])
        self.tensors = {"k": k, "v": v, "positions": positions}
        self.length = k.shape[2]
        return k, v, positions

    def cut(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in 0..{self.length}, the tokens held, got {length}")
        if length == 0:
            return self.reset()
        k, v, positions = (self.tensors[name] for name in ("k", "v", "positions"))
        self.tensors = {"k": k[:, :, :length], "v": v[:, :, :length], "positions": positions[:length]}
        self.length = length
