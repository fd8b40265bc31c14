"""A plan: what each head of a model is given, why, what that was found to cost and to gain; applied, saved, loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regard.plan.apply import Applied
from regard.plan.cost import CostModel, Shape
from regard.plan.groups import grouped
from regard.plan.identity import differences
from regard.plan.options import DENSE, Option
from regard.plan.serial import option_from_plain, option_to_plain

__all__ = ["Plan", "PlanError", "load_plan"]

FORMAT = 1


class PlanError(ValueError):
    """A plan that does not fit the model, or a file that holds none."""


@dataclass(eq=False)
class Plan:
    """One option for each head of each layer; layers not named are left dense.

    Attributes:
        layers: by attention module (``name#1`` for a module's second call): the option of each head, in their order.
            Heads with the very same `Option` run together.
        shapes: by layer: what it was planned on, ``(batch, heads, kv_heads, q_len, kv_len, head_dim, v_dim)``.
        model: whose plan it is, see `regard.plan.identity`.
        causal: by layer: whether no query may see a later key.
        heads: of each head a record: layer, head, role, given, why, its error, mass and seconds, and those of every
            candidate considered.
        costs: the seconds that the search went by.
        predicted: attention seconds of a calibration sequence, dense and planned, their ratio, and kept mass.
        calibration: the budget, what was measured on the calibration sequences, and what planning took.
        measured: what `regard.plan.measure` found on other inputs; None until then.
    """

    layers: dict[str, tuple[Option, ...]]
    shapes: dict[str, Shape]
    model: dict[str, Any]
    causal: dict[str, bool] = field(default_factory=dict)
    heads: list[dict[str, Any]] = field(default_factory=list)
    costs: CostModel = field(default_factory=CostModel)
    predicted: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] | None = None

    # -- use

    def applied(self, model: nn.Module, *, any_weights: bool = False) -> Applied:
        """``with plan.applied(model): model.generate(...)``: the model attends as the plan says.

        What the model itself forbids (causality, windows, padding) stays forbidden. Positions count in each sample's
        own tokens.

        Args:
            model: the model that the plan was made on.
            any_weights: accept other weights of the same architecture (a fine-tuned copy).

        Raises:
            PlanError: for another model, with the differences named.
            ValueError: while running, for a plan bound to another length, naming what binds it, and for calls without
                known positions or with dropout.
            regard.watch.seam.SeamError: for attention that cannot be caught; on closing, for a layer of the plan
                that made no call.
        """
        found = differences(self.model, model, weights=not any_weights)
        if found:
            raise PlanError(f"this plan was made on another model ({self.model['name']}): {'; '.join(found)}")
        return Applied(model, self.layers, {name: shape[4] for name, shape in self.shapes.items()})

    def given(self, layer: str, head: int) -> Option:
        """What a head was given."""
        if layer not in self.layers:
            raise KeyError(f"layer {layer!r} is not in the plan; there are {', '.join(self.layers)}")
        return self.layers[layer][head]

    @property
    def options(self) -> list[Option]:
        """Every option that some head was given, in order of first use."""
        return list({id(o): o for options in self.layers.values() for o in options}.values())

    @property
    def counts(self) -> dict[str, int]:
        """Heads by option, most first."""
        found: dict[str, int] = {}
        for options in self.layers.values():
            for option in options:
                found[option.name] = found.get(option.name, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def length(self) -> dict[str, list[str]]:
        """Options by what they mean at another length: "any", "scales" or "bound"."""
        found: dict[str, list[str]] = {}
        for option in self.options:
            found.setdefault(option.length, []).append(option.name)
        return found

    def seconds(self, dense: bool = False) -> float | None:
        """Predicted attention time of a calibration sequence (all layers dense with `dense`); None: not timed."""
        total = 0.0
        for name, options in self.layers.items():
            groups = grouped([DENSE] * len(options) if dense else options)
            try:
                total += self.costs.layer(self.shapes[name], groups)
            except KeyError:
                return None
        return total

    def __str__(self) -> str:
        lines = [
            f"plan of {self.model['name']}, {sum(map(len, self.layers.values()))} heads in {len(self.layers)} layers"
        ]
        lines += [f"  {n:4d}  {name}" for name, n in self.counts.items()]
        if self.predicted:
            p = self.predicted
            lines.append(
                f"predicted   attention {1e3 * p['attention_seconds']:.1f} ms a sequence instead of "
                f"{1e3 * p['dense_attention_seconds']:.1f} ({p['attention_speedup']:.2f}x), "
                f"{100 * p['kept_mass']:.1f} % of the mass kept"
            )
        if self.calibration:
            c = self.calibration
            harms = ", ".join(f"{name} {value:+.5f}" for name, value in c["harm"].items())
            lines.append(f"calibrated  {harms} {c['unit']} (budget {c['budget']})")
            lines.append(
                f"planning    {c['seconds']:.1f} s, {c['passes_per_sequence']:.2f} forward passes for each of "
                f"{c['sequences']} sequences"
            )
        for what, names in self.length.items():
            if what != "any":
                said = "grow with the length" if what == "scales" else "hold for the plan's own length only"
                lines.append(f"length      {', '.join(names)}: {said}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<regard.Plan of {self.model['name']}: {', '.join(f'{n} {k}' for k, n in self.counts.items())}>"

    # -- files

    def save(self, path: str | Path) -> None:
        """Write JSON, its folder too; tensors of patterns go beside it, with the suffix ``.safetensors``. No pickle."""
        from safetensors.torch import save_file

        path, tensors = Path(path), dict[str, Tensor]()
        path.parent.mkdir(parents=True, exist_ok=True)
        options = self.options
        number = {id(o): n for n, o in enumerate(options)}
        whole = {
            "regard.plan": FORMAT,
            "model": self.model,
            "options": [option_to_plain(o, tensors) for o in options],
            "layers": {name: [number[id(o)] for o in given] for name, given in self.layers.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "causal": self.causal,
            "heads": self.heads,
            "costs": self.costs.to_plain(),
            "predicted": self.predicted,
            "calibration": self.calibration,
            "measured": self.measured,
        }
        text = json.dumps(whole, indent=1, allow_nan=False)
        beside = _beside(path)
        if tensors:
            save_file(tensors, str(beside))
        elif beside.exists():
            beside.unlink()
        path.write_text(text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """What `save` wrote.

        Raises:
            PlanError: for a file that is no plan, or that names what this version does not know.
            FileNotFoundError: for no file, or one whose tensors are missing.
        """
        from safetensors.torch import load_file

        path = Path(path)
        try:
            whole = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} is no plan: it holds no JSON ({error})") from error
        if not isinstance(whole, dict) or whole.get("regard.plan") != FORMAT:
            said = whole.get("regard.plan") if isinstance(whole, dict) else None
            raise PlanError(f'{path} is no plan of format {FORMAT}: "regard.plan" is {said!r}')
        needs = '"tensor"' in json.dumps(whole["options"])
        tensors = load_file(str(_beside(path))) if needs else {}
        try:
            options = [option_from_plain(o, tensors) for o in whole["options"]]
            layers = {name: tuple(options[n] for n in given) for name, given in whole["layers"].items()}
            return cls(
                layers=layers,
                shapes={name: _shape(x) for name, x in whole["shapes"].items()},
                model=whole["model"],
                causal=whole["causal"],
                heads=whole["heads"],
                costs=CostModel.from_plain(whole["costs"]),
                predicted=whole["predicted"],
                calibration=whole["calibration"],
                measured=whole["measured"],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PlanError(f"{path} is no plan that can be read: {error}") from error


def load_plan(path: str | Path) -> Plan:
    """The plan that `Plan.save` wrote; see `Plan.load`."""
    return Plan.load(path)


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _shape(x: Any) -> Shape:
    if not isinstance(x, list) or len(x) != 7:
        raise ValueError(f"a shape has seven sizes, got {x!r}")
    a, b, c, d, e, f, g = map(int, x)
    return a, b, c, d, e, f, g
