"""Packages called by their own name: `regard.watch(model)` works beside `from regard.watch.seam import Seam`."""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


def resolve(target: str) -> Any:
    """The object that "package.module:name" names, imported now."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class _CallablePackage(ModuleType):
    """A module that passes a call on to one function of its own, imported at the first call."""

    _entry: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return resolve(self._entry)(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(resolve(self._entry))


def make_callable(package: str, entry: str) -> None:
    """Make the imported `package` callable: a call goes to `entry`, "package.module:function"."""
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    module._entry = entry  # type: ignore[attr-defined]
