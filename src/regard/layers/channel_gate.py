"""Gates that scale each channel of a map by what the whole map holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.maps import MapLayer


class SE(MapLayer):
    """Squeeze and excite (arXiv 1709.01507): ``y = x * sigmoid(W2 act(W1 mean_hw x))``, W1 to ``dim // r`` channels.

    Args:
        dim: channels.
        r: how many times narrower the middle is; at least one channel is left.
        bias: of both matrices.
        act: between them, ReLU in the paper.
    """

    def __init__(self, dim: int, r: int = 16, bias: bool = True, act: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        if dim < 1 or r < 1:
            raise ValueError(f"dim and r must be at least 1, got dim={dim}, r={r}")
        middle = max(1, dim // r)
        self.squeeze, self.act, self.excite = nn.Linear(dim, middle, bias), act(), nn.Linear(middle, dim, bias)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The map with every channel scaled by its gate, in (0, 1)."""
        gate = torch.sigmoid(self.excite(self.act(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]
