"""A windowed model run at several phases of its window grid, the results averaged (DITO, arXiv 2310.00161)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.maps import MapLayer


class PhaseAverage(MapLayer):
    """``y = mean_s roll(module(roll(x, (-s, +s))), (+s, -s))`` over the shifts, with the same weights.

    The rolls are cyclic, over (height, width); nothing masks the windows that a roll joins across the border. For
    windows of w tokens the paper has ``shifts=(0, w // 2)`` and adds the position embedding after the roll, so put it
    inside the module. Costs one run of the module a shift.

    Args:
        module: a layer on maps (`as_map` makes one of a layer on sequences).
        shifts: integers s, or pairs (down, right) of what the map is rolled by before the module; s stands for (-s, s).
    """

    def __init__(self, module: nn.Module, shifts: Sequence[int | tuple[int, int]] = (0,)):
        super().__init__()
        if not shifts:
            raise ValueError("shifts must hold at least one shift, got none")
        pairs = [(-s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in shifts]
        self.module, self.shifts = module, tuple(pairs)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The average over the shifts, in their order."""
        total: Tensor | None = None
        for down, right in self.shifts:
            y = self.module(torch.roll(x, (down, right), (2, 3)))
            y = torch.roll(y, (-down, -right), (2, 3))
            total = y if total is None else total + y
        assert total is not None
        return total / len(self.shifts)
