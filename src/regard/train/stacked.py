"""Training of several small models at once: one forward pass of all, a decay for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

__all__ = ["fit_stacked"]


class _Calls(nn.Module):
    """A loss as the forward pass of a module, so that `functional_call` gives it parameters."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        return self.loss(self.model, batch)


def fit_stacked(
    models: Sequence[nn.Module],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    steps: int,
    lr: float | int,
    decays: Sequence[float | int],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Full-batch AdamW for models of one shape, stacked by `torch.func`; decay acts on every parameter of a model.

    Each model goes as it would alone, up to rounding. The models are changed in place (after every step, so that
    `on_step` may look at them) and left in eval mode. Nothing is clipped and the rate is constant.

    Args:
        models: of one class and shape, on one device; attention must be one that `vmap` passes through
            (``backend="reference"`` of `MultiHead` is).
        loss: of a model and the batch, a scalar.
        batch: the same for every model and step.
        steps, lr, betas: of AdamW.
        decays: decoupled weight decay of each model.
        on_step: told (steps done, losses ``[models]`` before the last one).

    Returns:
        losses ``[steps, models]``.

    Raises:
        ValueError: as many decays as there are not models.
        FloatingPointError: a loss is not finite.
    """
    if len(decays) != len(models):
        raise ValueError(f"decays must be one for each of {len(models)} models, got {len(decays)}")
    calls = [_Calls(model.eval(), loss) for model in models]
    weights, buffers = stack_module_state(calls)
    weights = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr, betas=betas, weight_decay=0.0)
    device = next(iter(weights.values())).device
    keep = torch.tensor([1 - lr * d for d in decays], dtype=torch.float64, device=device)

    def one(parameters: dict[str, Tensor], held: dict[str, Tensor]) -> Tensor:
        return functional_call(calls[0], (parameters, held), (batch,))

    step_of_all = vmap(grad_and_value(one), randomness="error")
    losses = []
    for step in range(steps):
        gradients, values = step_of_all(weights, buffers)
        if not bool(values.isfinite().all()):
            raise FloatingPointError(f"loss at step {step} must be finite, got {values.tolist()}")
        with torch.no_grad():
            for name, w in weights.items():
                w.grad = gradients[name].detach()
                w.mul_(keep.to(w.dtype).view(-1, *[1] * (w.ndim - 1)))
        optimizer.step()
        losses.append(values.detach())
        if on_step is not None or step == steps - 1:
            with torch.no_grad():
                for i, call in enumerate(calls):
                    for name, p in call.named_parameters():
                        p.copy_(weights[name][i])
        if on_step is not None:
            on_step(step + 1, values.detach())
    return torch.stack(losses)
