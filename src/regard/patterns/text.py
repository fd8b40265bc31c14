"""Patterns, orders and selects as plain JSON values and back: a class of `regard.patterns` and its arguments."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

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


def to_plain(value: Any) -> Any:
    """A pattern (order, select, route without parameters) as dicts, lists, numbers and text, for JSON.

    Raises:
        ValueError: for what holds tensors or is no class of `regard.patterns`.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [to_plain(x) for x in value]
    name = type(value).__name__
    if _classes().get(name) is not type(value):
        raise ValueError(f"only patterns, orders and routes of regard.patterns can be written as JSON, got {value!r}")
    arguments = {}
    for parameter in inspect.signature(type(value)).parameters.values():
        arguments[parameter.name] = to_plain(_argument(value, parameter.name))
    return {name: arguments}


def _argument(value: Any, name: str) -> Any:
    if name == "select" and hasattr(value, "rule"):
        return value.rule
    return getattr(value, name)


def from_plain(plain: Any) -> Any:
    """What `to_plain` wrote.

    Raises:
        ValueError: for a name that is no class of `regard.patterns`, or arguments that it does not take.
    """
    if isinstance(plain, _PLAIN):
        return plain
    if isinstance(plain, list):
        return tuple(from_plain(x) for x in plain)
    if not isinstance(plain, dict) or len(plain) != 1:
        raise ValueError(f"expected {{class: arguments}}, got {plain!r}")
    (name, arguments), classes = next(iter(plain.items())), _classes()
    if name not in classes:
        raise ValueError(f"{name!r} is no class of regard.patterns; there are {', '.join(sorted(classes))}")
    signature = inspect.signature(classes[name])
    given = {key: from_plain(x) for key, x in arguments.items()}
    if set(given) != set(signature.parameters):
        raise ValueError(f"{name} takes {', '.join(signature.parameters)}, got {', '.join(given)}")
    return classes[name](**given)
