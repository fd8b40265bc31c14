"""What a changed output costs: nats a token for language models, relative error for others, or a loss of the user's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.watch.probe import first_tensor

__all__ = ["Judge", "LossOf", "OutputError", "TokenLoss", "judge_of"]


class Judge(ABC):
    """Compares a changed run with the dense one of the same inputs; `unit` is that of its figures."""

    unit: str
    dropped: tuple[str, ...] = ()
    """Inputs that are the judge's and not the model's."""

    power: int = 1
    """What of ``g . change`` adds up over queries and heads: its size (1) or its square (2)."""
    guess: float = 1.0
    """Effect that is tried first, for each unit of the budget."""

    def probe(self, output: Any, inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor | None:
        """A number of the dense run whose gradient g says what a change costs; None: there is none."""
        return None

    def asked(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Bool ``[batch, length]``: the few queries whose outputs are judged; None: all are."""
        return None

    @abstractmethod
    def keep(self, output: Any, inputs: Mapping[str, Any]) -> Any:
        """What it must know of the dense run."""

    @abstractmethod
    def harm(self, kept: Any, output: Any, inputs: Mapping[str, Any]) -> float:
        """How much worse the changed run is: 0 where nothing is, at most the budget where a plan passes."""

    def value(self, kept: Any) -> float | None:
        """The dense run's own loss; None where there is none."""
        return None


@dataclass(frozen=True)
class TokenLoss(Judge):
    """Mean increase of ``-log p(token | those before)`` in nats, over ``inputs["labels"]`` where given, else all.

    Labels below 0 do not count, nor does padding. ``exp`` of it is the ratio of the perplexities. The model is not
    given the labels.
    """

    unit: str = "nats a token"
    dropped: tuple[str, ...] = ("labels",)
    guess: float = 25.0  # sizes are summed as if no two changes met with opposite signs

    def probe(self, output: Any, inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The mean loss of tokens drawn from the model's own distribution, where tokens count.

        Its gradients have the Fisher information for their square: they vanish nowhere, as those of a true token do
        once the model is sure of it.
        """
        logits, labels = _logits(output)[:, :-1].float(), self._labels(inputs)
        with torch.no_grad():
            share = logits.softmax(-1).flatten(0, 1).cpu()
            drawn = torch.multinomial(share, 1, generator=generator).view(labels.shape).to(logits.device)
        nll = F.cross_entropy(logits.transpose(1, 2), drawn, reduction="none")
        counts = labels >= 0
        return (nll * counts).sum() / counts.sum()

    def asked(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Queries that predict a token that counts, where ``labels`` say which do."""
        if inputs.get("labels") is None:
            return None
        return F.pad(self._labels(inputs) >= 0, (0, 1))

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor:
        ids = inputs["input_ids"]
        labels = inputs.get("labels")
        labels = ids if labels is None else labels
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            real = mask.bool()
            before = torch.cat([real[:, :1] & False, real[:, :-1]], 1)
            labels = labels.masked_fill(~(real & before), -100)
        return labels[:, 1:]

    def keep(self, output: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss of each token, and which count."""
        logits, labels = _logits(output), self._labels(inputs)
        nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels.clamp(min=0), reduction="none")
        counts = labels >= 0
        if not bool(counts.any()):
            raise ValueError("labels: no token counts, so no loss is measured; give labels >= 0 for some")
        return nll, counts

    def harm(self, kept: tuple[Tensor, Tensor], output: Any, inputs: Mapping[str, Any]) -> float:
        """Nats a token."""
        now, counts = self.keep(output, inputs)
        return float((now - kept[0])[counts].double().mean())

    def value(self, kept: tuple[Tensor, Tensor]) -> float:
        """Nats a token of the dense run."""
        return float(kept[0][kept[1]].double().mean())

    def score(self, output: Any, inputs: Mapping[str, Any]) -> float:
        """Share of sequences whose counted tokens are all the first choice, given the true ones before them."""
        labels = self._labels(inputs)
        right = _logits(output)[:, :-1].argmax(-1) == labels
        return float((right | (labels < 0)).all(-1).double().mean())


@dataclass(frozen=True)
class OutputError(Judge):
    """``|y - y_dense|^2 / |y_dense|^2`` of the model's first output tensor."""

    unit: str = "squared relative error of the output"
    power: int = 2

    def probe(self, output: Any, inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """``r . y / |y|`` with r drawn from N(0, 1): the mean square of its change is the relative error itself."""
        y = self.keep(output, inputs).float()
        drawn = torch.randn(y.shape, generator=generator).to(y.device)
        return (drawn * y).sum() / y.detach().norm().clamp(min=1e-30)

    def keep(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The output."""
        y = first_tensor((output,))
        if y is None:
            raise ValueError("the model's output holds no floating tensor to compare; give judge=, a loss of your own")
        return y

    def harm(self, kept: Tensor, output: Any, inputs: Mapping[str, Any]) -> float:
        """A share of the output's energy."""
        y = self.keep(output, inputs)
        return float((y - kept).double().square().sum() / kept.double().square().sum())


@dataclass(frozen=True)
class LossOf(Judge):
    """``loss(output, inputs) -> number``, less that of the dense run."""

    loss: Callable[[Any, Mapping[str, Any]], Any]
    unit: str = "of the loss given"
    guess: float = 25.0

    def probe(self, output: Any, inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor | None:
        """The loss, where it is a tensor that can be differentiated."""
        found = self.loss(output, inputs)
        return found if isinstance(found, Tensor) and found.requires_grad and found.numel() == 1 else None

    def keep(self, output: Any, inputs: Mapping[str, Any]) -> float:
        """The dense run's loss."""
        return float(self.loss(output, inputs))

    def harm(self, kept: float, output: Any, inputs: Mapping[str, Any]) -> float:
        """The increase."""
        return float(self.loss(output, inputs)) - kept

    def value(self, kept: float) -> float:
        """The dense run's loss."""
        return kept


def judge_of(given: Any, model: Any, inputs: Mapping[str, Any]) -> Judge:
    """The judge given, or by what the model is: one that predicts the next token, or another.

    Raises:
        ValueError: for what is neither a `Judge` nor callable.
    """
    if isinstance(given, Judge):
        return given
    if given is not None:
        if not callable(given):
            raise ValueError(
                f"judge must be a Judge or a callable loss(output, inputs) -> number, got {type(given).__name__}"
            )
        return LossOf(given)
    config = getattr(model, "config", None)
    named = str(getattr(config, "architectures", None) or type(model).__name__)
    speaks = "ForCausalLM" in named or "LMHead" in named or "ForCausalLM" in type(model).__name__
    if speaks and isinstance(inputs.get("input_ids"), Tensor):
        return TokenLoss()
    return OutputError()


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    logits = found if isinstance(found, Tensor) else first_tensor((output,))
    if logits is None or logits.ndim != 3:
        raise ValueError(
            "the model's output has no logits [batch, length, vocabulary]; give judge=, a loss of your own"
        )
    return logits
