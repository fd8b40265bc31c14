"""Options as plain JSON values, tensors beside: a class of `regard.patterns` (or `ScaledWindow`) and its arguments."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from regard.patterns.text import from_plain, to_plain
from regard.plan.options import Option, ScaledWindow

__all__ = ["option_from_plain", "option_to_plain"]


def option_to_plain(option: Option, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``{"name", "how"}``; tensors of its parts are put into `tensors` and named.

    Raises:
        ValueError: for what is no class of `regard.patterns`.
    """
    how = option.how
    if isinstance(how, ScaledWindow):
        said: Any = {"ScaledWindow": {f.name: getattr(how, f.name) for f in fields(how)}}
    else:
        said = to_plain(how, tensors)
    return {"name": option.name, "how": said}


def option_from_plain(plain: Any, tensors: dict[str, Tensor]) -> Option:
    """What `option_to_plain` gave.

    Raises:
        ValueError: for what it cannot have given.
    """
    if not isinstance(plain, dict) or set(plain) != {"name", "how"}:
        raise ValueError(f'an option must be {{"name", "how"}}, got {plain!r}')
    how = plain["how"]
    if isinstance(how, dict) and set(how) == {"ScaledWindow"}:
        given = how["ScaledWindow"]
        if not isinstance(given, dict) or set(given) != {f.name for f in fields(ScaledWindow)}:
            raise ValueError(f"ScaledWindow takes share, sinks, right, last, got {given!r}")
        return Option(plain["name"], ScaledWindow(**given))
    return Option(plain["name"], from_plain(how, tensors))
