"""Reading hidden states through the model's own output: the logit lens and the tuned lens.

nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al., arXiv 2303.08112, "Eliciting Latent
Predictions from Transformers with the Tuned Lens".
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for

__all__ = ["TunedLens", "logit_lens"]


def logit_lens(
    model: nn.Module, hidden: Float[Tensor, "*rows dim"], anatomy: Anatomy | None = None
) -> Float[Tensor, "*rows vocab"]:
    """`unembed(final_norm(h))` of states of any layer. At the last layer's `resid_post` these are the model's logits.

    Raises:
        LookupError: a model without `unembed`; one without a final norm is read without.
    """
    parts = anatomy_for(model, None, anatomy)
    if parts.unembed is None:
        raise LookupError(f"unembed: {parts.missing.get('unembed', 'the model has none')}")
    modules = dict(model.named_modules(remove_duplicate=False))
    normed = hidden if parts.final_norm is None else modules[parts.final_norm](hidden)
    return modules[parts.unembed](normed)


class TunedLens(nn.Module):
    """A diagonal map a layer, `T_l(h) = (1 + a_l) * h + b_l`, that leads states to those of the last layer.

    Args:
        layers: how many layers are read.
        dim: width of the stream.
    """

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(layers, dim))
        self.shift = nn.Parameter(torch.zeros(layers, dim))

    def forward(self, hidden: Float[Tensor, "layers *rows dim"]) -> Float[Tensor, "layers *rows dim"]:
        """Each layer's states under its own map."""
        shape = (len(self.gain), *[1] * (hidden.ndim - 2), -1)
        return (1 + self.gain.view(shape)) * hidden + self.shift.view(shape)

    def fit(
        self,
        hidden: Float[Tensor, "layers n dim"],
        last: Float[Tensor, "n dim"],
        *,
        held_out: float = 0.2,
        epochs: int = 200,
        patience: int = 15,
        seed: int = 0,
    ) -> list[float]:
        """Fit all layers to `last` by mean squared error: AdamW 1e-3, decay 0.01, full batches, early stopping.

        Args:
            hidden, last: states of each layer and of the last one, for the same n tokens.
            held_out: share of the tokens that decides when to stop; the best weights are kept.
            epochs, patience: at most, and how many without a better held-out loss.
            seed: of the split.

        Returns:
            The held-out loss of every epoch.
        """
        count = round(held_out * len(last))
        if not 0 < count < len(last):
            raise ValueError(
                f"held_out={held_out} of {len(last)} tokens leaves {count} to test on; both parts need one"
            )
        order = torch.randperm(len(last), generator=torch.Generator().manual_seed(seed)).to(last.device)
        test, train = order[:count], order[count:]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)
        losses: list[float] = []
        best = {name: value.clone() for name, value in self.state_dict().items()}
        since = 0
        for _ in range(epochs):
            optimizer.zero_grad()
            (self(hidden[:, train]) - last[train]).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                loss = float((self(hidden[:, test]) - last[test]).square().mean())
            since = 0 if not losses or loss < min(losses) else since + 1
            losses.append(loss)
            if since == 0:
                best = {name: value.clone() for name, value in self.state_dict().items()}
            if since >= patience:
                break
        self.load_state_dict(best)
        return losses
