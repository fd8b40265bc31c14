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

from regard.watch.atlas import Atlas


def as_inputs(model: nn.Module, image: Any, processor: Any = None) -> tuple[dict[str, Tensor], Tensor]:
    """The model's keyword arguments for a picture, and the picture as the model gets it, [channels, height, width] in
    0..1: three channels, or one (grey) where the model's config says so.

    Args:
        model: an image model of transformers or timm, or any that takes [batch, channels, height, width] first.
        image: a path or a PIL image.
        processor: a transformers image processor, or a callable from a PIL image to a tensor [channels, height, width].
            None resizes to the size the model's config names and normalises by its mean and deviation.

    Raises:
        ValueError: a model whose config names no image size (a text or a video model, say), other channels than 1 or
            3, or what a processor gives in another shape.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"image must be a path or a PIL image, got {type(image).__name__}")
    channels = _channels(model)
    image = image.convert("RGB" if channels == 3 else "L")
    mean, std = _normalisation(model, processor, channels)
    if processor is None:
        height, width = _size(model)
        raw = torch.frombuffer(
            bytearray(image.resize((width, height), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8
        )
        shown = raw.view(height, width, channels).permute(2, 0, 1).float() / 255
        pixels = (shown - mean) / std
    else:
        made = processor(images=image, return_tensors="pt") if hasattr(processor, "preprocess") else processor(image)
        pixels = made["pixel_values"][0] if not isinstance(made, Tensor) else made
        if pixels.ndim != 3 or pixels.shape[0] != channels:
            raise ValueError(f"processor must give a tensor [{channels}, height, width], got {list(pixels.shape)}")
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
        raise ValueError(
            f"image: the config of {type(model).__name__} names no image size, so it takes no pictures; for one that "
            "does, pass the picture's processor as tokenizer=, or the model's own inputs as inputs="
        )
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _channels(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    found = getattr(getattr(config, "vision_config", config), "num_channels", None)
    if found is None:
        found = ((getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3,))[0]
    if found not in (1, 3):
        raise ValueError(f"image: the model takes {found} channels; a picture has 3, or 1 in grey: pass inputs=")
    return int(found)


def _normalisation(model: nn.Module, processor: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation a channel: the processor's, the model's, else 0.5 and 0.5."""
    config = getattr(model, "pretrained_cfg", None) or {}
    told = ((getattr(processor, "image_mean", None), "mean"), (getattr(processor, "image_std", None), "std"))
    mean, std = (torch.tensor(own or config.get(name) or (0.5,) * channels) for own, name in told)
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


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


@torch.no_grad()
def watch_picture(model: nn.Module, image: Any, statistics: str = "default") -> Atlas:
    """The atlas of a model on one picture; distances and rings are those of the grid of its patches.

    Raises:
        ValueError: as `as_inputs`.
    """
    from regard.watch.recorder import Watch, watch
    from regard.watch.seam import Seam

    ready, shown = as_inputs(model, image)
    lengths: list[int] = []
    with Seam(model, lambda call: lengths.append(call.q.shape[2])):
        model(**ready)
    grid, prefix = patch_grid(model, shown, max(lengths))
    with watch(model, statistics=Watch(statistics, grid=grid, prefix=prefix)) as seen:
        model(**ready)
    return seen.atlas


def png(shown: Tensor) -> str:
    """The picture as a data URL."""
    from PIL import Image

    three = shown.expand(3, -1, -1)  # one channel is grey
    pixels = (three.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
