"""Patterns, orders and selects as plain JSON values and back: a class of `regard.patterns` and its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from regard.patterns.order import Order
from regard.patterns.pattern import Pattern
from regard.patterns.select import Select

__all__ = ["from_plain", "to_plain"]

_PLAIN = (int, float, bool, str, type(None))


@cache
def _classes() -> dict[str, type]:
    """Every class of `regard.patterns` that can be written, by name."""
    import regard.patterns as all_of_them
    from regard.patterns.permuted import ListedOrder
    from regard.patterns.routed import Route

    found: dict[str, type] = {"ListedOrder": ListedOrder}
    for name in all_of_them.__all__:
        value = getattr(all_of_them, name)
        if isinstance(value, type) and issubclass(value, (Pattern, Order, Select, Route)):
            found[name] = value
    return found


def to_plain(value: Any, tensors: dict[str, Tensor] | None = None) -> Any:
    """A pattern (order, select, route without parameters) as dicts, lists, numbers and text, for JSON.

    Args:
        value: what to write.
        tensors: where its tensors go, each under a name that is written in its place; None: tensors are refused.

    Raises:
        ValueError: for what holds tensors (without ``tensors``) or is no class of `regard.patterns`.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor) and tensors is not None:
        name = f"tensor {len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return [to_plain(x, tensors) for x in value]
    name = type(value).__name__
    if _classes().get(name) is not type(value):
        raise ValueError(f"only patterns, orders and routes of regard.patterns can be written as JSON, got {value!r}")
    arguments = {}
    for parameter in inspect.signature(type(value)).parameters.values():
        arguments[parameter.name] = to_plain(_argument(value, parameter.name), tensors)
    return {name: arguments}


def _argument(value: Any, name: str) -> Any:
    if name == "select" and hasattr(value, "rule"):
        return value.rule
    return getattr(value, name)


def from_plain(plain: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """What `to_plain` wrote, with the tensors it set apart.

    Raises:
        ValueError: for a name that is no class of `regard.patterns`, arguments that it does not take, and a tensor
            that is not there.
    """
    if isinstance(plain, _PLAIN):
        return plain
    if isinstance(plain, list):
        return tuple(from_plain(x, tensors) for x in plain)
    if not isinstance(plain, dict) or len(plain) != 1:
        raise ValueError(f"expected {{class: arguments}}, got {plain!r}")
    (name, arguments), classes = next(iter(plain.items())), _classes()
    if name == "tensor":
        if not tensors or arguments not in tensors:
            raise ValueError(f"{arguments!r} is none of the tensors given: {', '.join(tensors or ()) or 'none'}")
        return tensors[arguments]
    if name not in classes:
        raise ValueError(f"{name!r} is no class of regard.patterns; there are {', '.join(sorted(classes))}")
    signature = inspect.signature(classes[name])
    given = {key: from_plain(x, tensors) for key, x in arguments.items()}
    if set(given) != set(signature.parameters):
        raise ValueError(f"{name} takes {', '.join(signature.parameters)}, got {', '.join(given)}")
    return classes[name](**given)
