"""Models of this library in a folder: config.json and model.safetensors, as transformers keeps its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["is_saved", "load_saved", "save_model"]

LIBRARY = "regard"


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Writes a model whose ``config`` is a dataclass of plain values."""
    config: Any = model.config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"library": LIBRARY, "architectures": [type(model).__name__], **asdict(config)}
    (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def is_saved(folder: str | Path) -> bool:
    """Whether a folder's config.json says that `save_model` wrote it."""
    path = Path(folder) / "config.json"
    return path.exists() and json.loads(path.read_text()).get("library") == LIBRARY


def load_saved(folder: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that `save_model` wrote there, in evaluation mode.

    Raises:
        ValueError: a class that this regard does not have.
        FileNotFoundError: no weights.
    """
    folder = Path(folder)
    told = json.loads((folder / "config.json").read_text())
    name = told.pop("architectures")[0]
    del told["library"]
    known = _classes()
    if name not in known:
        raise ValueError(f"{str(folder)!r} holds a {name}; this regard knows {', '.join(known)}")
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"{str(folder)!r} has no model.safetensors beside its config.json")
    model = known[name](told)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return (model if dtype is None else model.to(dtype)).eval()


def _classes() -> dict[str, Callable[[dict[str, Any]], nn.Module]]:
    from regard.models.dit import DiTConfig, VideoDiT

    def video(told: dict[str, Any]) -> VideoDiT:
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        return VideoDiT(DiTConfig(**shape))

    return {"VideoDiT": video}
