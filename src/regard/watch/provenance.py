"""Where a run came from: the model, the versions, the seed, the date, the command."""

from __future__ import annotations

import hashlib
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("regard", "torch", "transformers", "xarray", "numpy")


def fingerprint(model: nn.Module) -> str:
    """A short hash of the parameters' names and shapes and of the first values of up to 64 of them.

    The same weights give the same fingerprint on any device; two checkpoints of one class differ.
    """
    digest = hashlib.sha256()
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    for name, parameter in named:
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
    chosen = [p for _, p in named[:: max(1, len(named) // 64)] if p.numel() and p.device.type != "meta"]
    if chosen:
        values = [p.detach().flatten()[:8].to("cpu", torch.float32) for p in chosen]
        digest.update(torch.cat(values).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_name(model: nn.Module) -> str:
    """What the model calls itself: the folder or hub name it was loaded from, else its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "name_or_path", "")
    return str(name) or type(model).__name__


def provenance(model: nn.Module) -> dict[str, Any]:
    """Facts of this run, as plain values."""
    parameter = next(model.parameters(), None)
    return {
        "model": model_name(model),
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(parameter.device) if parameter is not None else "cpu",
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else "none",
        "seed": torch.initial_seed(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
