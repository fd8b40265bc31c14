"""A picture as an image model's input, and back: what the page shows under the patches is what the model saw."""

from __future__ import annotations

import base64
import inspect
import io
import math
import os
from typing import Any

import torch
from torch import Tensor, nn


def as_inputs(model: nn.Module, image: Any, processor: Any = None) -> tuple[dict[str, Tensor], Tensor]:
    """The model's keyword arguments for a picture, and the picture as the model gets it, [3, height, width] in 0..1.

    Args:
        model: an image model of transformers or timm, or any that takes [batch, 3, height, width] first.
        image: a path or a PIL image.
        processor: a transformers image processor, or a callable from a PIL image to a tensor [3, height, width].
            None resizes to the size the model's config names and normalises by its mean and deviation.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"image must be a path or a PIL image, got {type(image).__name__}")
    image = image.convert("RGB")
    mean, std = _normalisation(model, processor)
    if processor is None:
        height, width = _size(model)
        raw = torch.frombuffer(
            bytearray(image.resize((width, height), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8
        )
        shown = raw.view(height, width, 3).permute(2, 0, 1).float() / 255
        pixels = (shown - mean) / std
    else:
        made = processor(images=image, return_tensors="pt") if hasattr(processor, "preprocess") else processor(image)
        pixels = made["pixel_values"][0] if not isinstance(made, Tensor) else made
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(f"processor must give a tensor [3, height, width], got {list(pixels.shape)}")
        shown = (pixels.float() * std + mean).clamp(0, 1)
    parameter = next(model.parameters())
    pixels = pixels.to(parameter.device, parameter.dtype)[None]
    names = list(inspect.signature(model.forward).parameters)
    return {"pixel_values" if "pixel_values" in names else names[0]: pixels}, shown


def _size(model: nn.Module) -> tuple[int, int]:
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise ValueError("image: the model's config names no image size; pass the picture's processor as tokenizer=")
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _normalisation(model: nn.Module, processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation a channel: the processor's, the model's, else 0.5 and 0.5."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean = getattr(processor, "image_mean", None) or config.get("mean") or (0.5, 0.5, 0.5)
    std = getattr(processor, "image_std", None) or config.get("std") or (0.5, 0.5, 0.5)
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def patch_grid(model: nn.Module, shown: Tensor, tokens: int) -> tuple[tuple[int, int] | None, int]:
    """(rows, columns) of the patches and how many tokens stand before them; None if the tokens are no such grid."""
    height, width = shown.shape[1:]
    config = getattr(model, "config", None)
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if patch is None:
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None:
        ph, pw = (patch, patch) if isinstance(patch, int) else (int(patch[-2]), int(patch[-1]))
        rows, cols = height // ph, width // pw
    else:
        rows = cols = math.isqrt(tokens)
    prefix = tokens - rows * cols
    return ((rows, cols), prefix) if 0 <= prefix <= 16 and rows * cols > 1 else (None, 1)


def png(shown: Tensor) -> str:
    """The picture as a data URL."""
    from PIL import Image

    pixels = (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
