"""A small vision-language model of transformers' own classes: CLIP's encoder, LLaVA's projector, Llama's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy

__all__ = ["VLMShape", "build_vlm", "decoder_blocks", "decoder_parts", "embed_inputs", "see"]


@dataclass(frozen=True)
class VLMShape:
    """Shape of the model.

    Args:
        image, patch: sides in pixels; the patch divides the image.
        vision_dim, vision_layers, vision_heads: of the encoder, which puts a class token before the patches.
        vision_mlp: width of its MLP.
        dim, layers, heads, kv_heads, mlp: of the decoder.
        positions: longest sequence that the configuration promises.
    """

    image: int = 24
    patch: int = 4
    vision_dim: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 192
    dim: int = 96
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    mlp: int = 256
    positions: int = 256

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise ValueError(f"patch must divide the image of {self.image} pixels, got {self.patch}")
        if self.vision_layers < 2:
            raise ValueError(f"vision_layers must be at least 2 (patches leave before the last), {self.vision_layers}")

    @property
    def patches(self) -> int:
        """Visual tokens of one picture."""
        return (self.image // self.patch) ** 2


def build_vlm(
    shape: VLMShape, vocabulary: int, *, image_token: int, pad: int, bos: int, eos: int, seed: int = 0
) -> nn.Module:
    """An untrained ``LlavaForConditionalGeneration``, ready for `save_pretrained` and `generate`.

    As in LLaVA, the patches leave the encoder before its last layer and without the class token; a projector of two
    linear maps brings them to the decoder, where they stand for the tokens ``image_token`` of ``input_ids``. Called
    with ``input_ids`` [batch, length] and ``pixel_values`` [batch, 3, image, image].

    Args:
        shape: see `VLMShape`.
        vocabulary: number of words.
        image_token, pad, bos, eos: ids of words.
        seed: of the weights.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_dim,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
        projection_dim=shape.dim,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.dim,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=shape.patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        embeddings = model.model.vision_tower.embeddings
        with torch.no_grad():  # as narrow as CLIP starts them, places are told apart only after hundreds of steps
            embeddings.position_embedding.weight.normal_(std=0.5)
            embeddings.patch_embedding.weight.normal_(std=0.15)
    return model


def see(
    model: Any, pixels: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch patches dim"], Float[Tensor, "batch dim"]]:
    """What the decoder gets of a picture, and the class token brought to the same space by the same projector."""
    tower = model.model.vision_tower
    out = tower(pixel_values=pixels, output_hidden_states=True)
    patches = out.hidden_states[model.config.vision_feature_layer][:, 1:]
    project = model.model.multi_modal_projector
    return project(patches), project(out.pooler_output)


def decoder_blocks(model: Any) -> list[str]:
    """Names of the decoder's blocks, in their order."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model.model.language_model
    name = next((n for n, m in model.named_modules() if m is inner), None)
    layers = getattr(inner, "layers", None)
    if name is None or layers is None:
        raise LookupError(f"{type(model).__name__} has no decoder with a list `layers`; give anatomy its blocks")
    return [f"{name}.layers.{i}" for i in range(len(layers))]


def decoder_parts(model: Any, inputs: Any) -> Anatomy:
    """The anatomy of the decoder alone: layers are counted from its first, the picture's encoder has no number.

    Args:
        inputs: a small batch with ``input_ids`` and ``pixel_values``.
    """
    return anatomy(model, inputs, blocks=decoder_blocks(model))


def embed_inputs(
    model: Any, ids: Int[Tensor, "batch length"], features: Float[Tensor, "batch tokens dim"]
) -> dict[str, Tensor]:
    """What to call the model with where its visual tokens are given: ``inputs_embeds``.

    Args:
        ids: with as many image tokens a sample as there are features.
        features: what stands there, in their order, as `see` gives them.

    Raises:
        ValueError: another number of image tokens.
    """
    image = ids == model.config.image_token_id
    if not bool((image.sum(1) == features.shape[1]).all()):
        counts = sorted(set(image.sum(1).tolist()))
        raise ValueError(f"ids hold {counts} image tokens a sample, features {features.shape[1]}")
    vectors = model.get_input_embeddings()(ids)
    return {"inputs_embeds": vectors.masked_scatter(image[..., None], features.to(vectors))}
