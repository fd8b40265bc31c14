"""Intermediate representation injection: what mid layers wrote at the last token is written again by later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.places import replace_first

__all__ = ["Injection"]

PARTS = ("attn_out", "mlp_out")


class Injection:
    """``with Injection(model, {"attn_out": rr}, sources=3, targets=10, lam={"attn_out": 0.26}): model(...)``.

    At the last token of every forward pass, for each part by itself: the `sources` layers k and the `targets` layers l
    of largest recovery rate are chosen, and

        ``a~_l = (a_l + lam * sum_(k in sources, k < l) rr_k a_k) * |a_l| / |a_l + ...|``

    with a_k as layer k would have written it, before any injection into k itself. (arXiv 2511.05923, where lam is 0.26
    for attention and 0.16 for MLPs, 3 sources and 10 targets of 32 layers.)

    Args:
        model: the module that is called.
        rates: recovery rate of every layer, by part: "attn_out" and "mlp_out".
        sources, targets: how many layers of each part.
        lam: strength, one number or one a part; 0 changes no bit.
        anatomy: the model's parts, where they cannot be found or only some are to be counted as layers.
        inputs: a small batch to find them with, where the model says nothing of itself.

    Raises:
        ValueError: rates for unknown parts or another number of layers, or more sources or targets than layers.
        LookupError: a layer without such a part.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Mapping[str, Float[Tensor, "layers"]],
        *,
        sources: int = 3,
        targets: int = 10,
        lam: float | int | Mapping[str, float | int] = 0.26,
        anatomy: Anatomy | None = None,
        inputs: Any = None,
    ) -> None:
        self.model, self.parts = model, anatomy_for(model, inputs, anatomy)
        layers = len(self.parts)
        if not rates or set(rates) - set(PARTS):
            raise ValueError(
                f"rates must be given for parts among {', '.join(PARTS)}, got {', '.join(rates) or 'none'}"
            )
        for name, value in (("sources", sources), ("targets", targets)):
            if not 1 <= value <= layers:
                raise ValueError(f"{name} must be between 1 and the {layers} layers, got {value}")
        self.rates = {part: torch.as_tensor(rate) for part, rate in rates.items()}
        for part, rate in self.rates.items():
            if rate.shape != (layers,):
                raise ValueError(f"rates[{part!r}] must have one number a layer, {layers}, got {tuple(rate.shape)}")
        strength = lam if isinstance(lam, Mapping) else dict.fromkeys(self.rates, lam)
        if set(strength) != set(self.rates):
            raise ValueError(f"lam must be given for {', '.join(self.rates)}, got {', '.join(strength)}")
        self.lam = {part: float(value) for part, value in strength.items()}
        self.sources = {part: _largest(rate, sources) for part, rate in self.rates.items()}
        self.targets = {part: _largest(rate, targets) for part, rate in self.rates.items()}
        self._written: dict[tuple[str, int], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Injection:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for part in self.rates:
            names = self.parts.attn_out if part == "attn_out" else self.parts.mlp
            for layer in sorted(self.sources[part] | self.targets[part]):
                name = names[layer]
                if name is None:
                    raise LookupError(f"{self.parts.blocks[layer]} has no {part}; leave the part out of rates")
                self._handles.append(modules[name].register_forward_hook(self._hook(part, layer)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._written = [], {}

    def _hook(self, part: str, layer: int) -> Any:
        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            x, put = replace_first(output)
            own = x[:, -1]
            self._written[part, layer] = own
            earlier = [k for k in sorted(self.sources[part]) if k < layer]
            if layer not in self.targets[part] or not earlier or self.lam[part] == 0:
                return None
            rate = self.rates[part].to(own)
            new = own + self.lam[part] * sum(rate[k] * self._written[part, k] for k in earlier)
            new = new * own.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            return put(torch.cat([x[:, :-1], new[:, None]], dim=1))

        return after


def _largest(rate: Tensor, n: int) -> set[int]:
    """The layers of the n largest rates; the earlier of equal ones."""
    return set(rate.argsort(descending=True, stable=True)[:n].tolist())
