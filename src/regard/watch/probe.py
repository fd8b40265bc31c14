"""One short forward pass that notes what every module received and returned: the raw material of `anatomy`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.watch.seam import Call, Seam

# Encoder and decoder lengths differ, so that a tensor's length says where it belongs.
_LENGTH, _DECODER_LENGTH, _BATCH = 9, 7, 2


@dataclass
class Event:
    """One run of one module: when it began and ended, its first floating tensor argument, its first tensor result."""

    name: str
    start: int
    end: int = -1
    given: Tensor | None = None
    result: Tensor | None = None
    integers: bool = False


@dataclass
class Attended:
    """One attention call: the module that made it, when, with how many heads, and what came out."""

    layer: str
    time: int
    kind: str
    heads: int
    kv_heads: int
    z: Tensor


@dataclass
class Probe:
    """What one forward pass showed."""

    events: list[Event] = field(default_factory=list)
    calls: list[Attended] = field(default_factory=list)
    output: Tensor | None = None


def probe(model: nn.Module, inputs: Any) -> Probe:
    """Run `model` once in eval mode without gradients and note every module's input and output."""
    seen = Probe()
    clock = iter(range(1 << 62))
    open_events: list[Event] = []

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            first = first_tensor((*args, *kwargs.values()))
            event = Event(name, next(clock), given=_copy(first))
            event.integers = any(isinstance(a, Tensor) and not a.is_floating_point() for a in (*args, *kwargs.values()))
            seen.events.append(event)
            open_events.append(event)

        return hook

    def finish(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            event = open_events.pop()
            event.end, event.result = next(clock), _copy(first_tensor(output))

        return hook

    def attend(call: Call) -> Tensor:
        z = call.run()
        seen.calls.append(
            Attended(call.layer, next(clock), call.kind, call.q.shape[1], call.k.shape[1], z.detach().clone())
        )
        return z

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(begin(name), with_kwargs=True))
            handles.append(module.register_forward_hook(finish(name)))
        with quiet(model), Seam(model, attend):
            seen.output = first_tensor(run(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, each module's mode put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple, `model(inputs)` for a tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def first_tensor(x: Any) -> Tensor | None:
    """The first floating tensor in a tensor, sequence or mapping (a model output, a block's tuple)."""
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else None
    if isinstance(x, Mapping):
        x = x.values()
    elif not isinstance(x, (list, tuple)):
        return None
    return next((t for t in map(first_tensor, x) if t is not None), None)


def example_inputs(model: nn.Module) -> Any:
    """Small inputs made from what the model says about itself, or what its own ``example_inputs()`` gives.

    Raises:
        ValueError: when it says too little; inputs must then be given.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return own()
    config = getattr(model, "config", None)
    device, dtype = _place(model)
    main = getattr(model, "main_input_name", None)
    if config is not None and main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        if getattr(vision, "image_size", None) is not None:
            return {"pixel_values": _image(getattr(vision, "num_channels", 3), vision.image_size, device, dtype)}
    if config is not None and main == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        inputs = {"input_ids": _ids(_LENGTH, text.vocab_size, device)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _ids(_DECODER_LENGTH, text.vocab_size, device)
        return inputs
    # timm: what was built, else what the architecture was made for.
    timm = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    patches: Any = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or timm.get("input_size", (None,))[1:]
    if size:
        return _image(getattr(getattr(patches, "proj", None), "in_channels", 3), size, device, dtype)
    if isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        layer = model.layers[0] if isinstance(model, nn.TransformerEncoder) else model
        first = layer.self_attn.batch_first
        shape = (_BATCH, _LENGTH) if first else (_LENGTH, _BATCH)
        return _noise((*shape, layer.self_attn.embed_dim), device, dtype)
    raise ValueError(
        f"example_inputs: {type(model).__name__} does not say what it takes; give a small batch, a dict for "
        "model(**inputs), a tuple for model(*inputs) or a tensor"
    )


def _ids(length: int, vocab: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocab - 1), vocab, (_BATCH, length), generator=draw).to(device)


def _image(channels: int, size: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return _noise((_BATCH, channels, height, width), device, dtype)


def _noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.device("cpu"), torch.float32


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()
