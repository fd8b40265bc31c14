"""Tiny random models of many makers, with inputs: for the tests of anatomy and interventions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, LAYERS, VOCAB = 32, 4, 2, 64

_COMMON = {
    "hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SEQ2SEQ = {"vocab_size": VOCAB, "pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class OwnBlock(nn.Module):
    """Hand-written, pre-norm, returning a tensor; the MLP is two layers in the open."""

    def __init__(self, parallel: bool = False):
        super().__init__()
        self.parallel = parallel
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attend(self.norm1(x)) + self.down(F.gelu(self.up(self.norm2(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class OwnModel(nn.Module):
    """No config, no final norm, weights of embedding and output tied."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(OwnBlock(parallel) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def ids(batch: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(name: str) -> tuple[nn.Module, Any, Any]:
    """(model in eval mode, inputs, other inputs of the same shape)."""
    torch.manual_seed(0)
    model = _MODELS[name]().eval()
    # Larger weights than an untrained model has: what is tested must matter to the output.
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3.0 if float(p.std()) < 0.05 else 1.0)
    return model, _inputs(name, 0), _inputs(name, 1)


def _inputs(name: str, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    if name in ("vit", "timm", "layer-scale"):
        image = torch.randn(2, 3, 16, 16, generator=draw)
        return {"pixel_values": image} if name == "vit" else image
    if name in ("t5", "bart"):
        return {"input_ids": ids(2, 8, seed), "decoder_input_ids": ids(2, 6, seed + 10)}
    if name in ("post-norm encoder", "pre-norm encoder"):
        return torch.randn(2, 8, DIM, generator=draw)
    return ids(2, 8, seed) if name in ("own", "own parallel") else {"input_ids": ids(2, 8, seed)}


def _llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=2, **more))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**_GPT2))


def _neox(parallel: bool) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON, use_parallel_residual=parallel))


def _phi() -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**_COMMON))


def _falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "bos_token_id", "eos_token_id")
    return FalconForCausalLM(FalconConfig(**{n: _COMMON[n] for n in names}))


def _granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**_COMMON, num_key_value_heads=2, residual_multiplier=0.22))


def _olmo2() -> nn.Module:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(Olmo2Config(**_COMMON, num_key_value_heads=2))


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(hidden_size=DIM, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCAB,
                  word_embed_proj_dim=DIM, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_COMMON))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=DIM, d_ff=48, num_layers=LAYERS, num_heads=HEADS, d_kv=8, **_SEQ2SEQ)
    )


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(d_model=DIM, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
                   decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                   **_SEQ2SEQ)
    )  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=DIM, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                  image_size=16, patch_size=4, num_labels=5)
    )  # fmt: skip


def _timm(scale: float | None = None) -> nn.Module:
    from tests.vision import import_timm

    timm = import_timm()

    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=DIM, depth=LAYERS, num_heads=HEADS, num_classes=5, init_values=scale
    )


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(DIM) if norm_first else None)


_MODELS = {
    "llama": _llama,
    "gpt2": _gpt2,
    "neox": lambda: _neox(False),
    "neox parallel": lambda: _neox(True),
    "phi": _phi,
    "falcon": _falcon,
    "granite": _granite,
    "olmo2": _olmo2,
    "opt": _opt,
    "bert": _bert,
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "timm": _timm,
    "layer-scale": lambda: _timm(0.5),
    "post-norm encoder": lambda: _encoder(False),
    "pre-norm encoder": lambda: _encoder(True),
    "own": OwnModel,
    "own parallel": lambda: OwnModel(parallel=True),
}
NAMES = tuple(_MODELS)
PARALLEL = ("neox parallel", "phi", "falcon", "own parallel")


class PlainBlock(nn.Module):
    """The block of `tests/oracles/transformer.py`, with fused attention."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int = 6, parallel: bool = False):
        super().__init__()
        self.heads, self.kv_heads, self.parallel = heads, kv_heads, parallel
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q = nn.Linear(DIM, heads * head_dim)
        self.k, self.v = nn.Linear(DIM, kv_heads * head_dim), nn.Linear(DIM, kv_heads * head_dim)
        self.out = nn.Linear(heads * head_dim, DIM)
        self.up, self.down = nn.Linear(DIM, 24), nn.Linear(24, DIM)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f in (self.k, self.v))
        gqa = self.heads != self.kv_heads
        z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
        mid = x + self.out(z.transpose(1, 2).flatten(2))
        return mid + self.down(torch.tanh(self.up(self.norm2(x if self.parallel else mid)))), None


class Plain(nn.Module):
    """The model of `tests/oracles/transformer.py`.

    `bias` [heads, max, max] makes its masks additive; `parallel` blocks read the stream once; `tied`: one matrix for
    embedding and output; `normed`: False leaves the last norm out.
    """

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 2,
        bias: bool = False,
        seed: int = 0,
        parallel: bool = False,
        tied: bool = False,
        normed: bool = True,
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.kv_heads, self.parallel = heads, kv_heads, parallel
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(PlainBlock(heads, kv_heads, parallel=parallel) for _ in range(layers))
        self.norm = nn.LayerNorm(DIM) if normed else None
        self.head = nn.Linear(DIM, VOCAB)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("bias", torch.randn(heads, 32, 32) * 2 if bias else None)
        for block in self.blocks:
            for p in (block.q.weight, block.k.weight):
                p.data *= 3

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length, mask = input_ids.shape[1], None
        if attention_mask is not None:
            mask = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
        if self.bias is not None:
            seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
            added = self.bias[:, :length, :length].to(self.head.weight.dtype)
            mask = torch.where(seen, added, torch.finfo(added.dtype).min)
        x = self.embed(input_ids)
        for block in self.blocks:
            x, _ = block(x, mask)
        return self.head(x if self.norm is None else self.norm(x))

    def oracle(self, input_ids: Tensor, valid: Tensor | None = None, **more: Any) -> Tensor:
        from tests.oracles import transformer

        length = input_ids.shape[1]
        bias = None if self.bias is None else self.bias[:, :length, :length]
        return transformer.forward(
            dict(self.state_dict()),
            input_ids,
            heads=self.heads,
            kv_heads=self.kv_heads,
            valid=valid,
            bias=bias,
            parallel=self.parallel,
            **more,
        )


KINDS = {
    "own keys": {"kv_heads": 4},
    "shared keys, tied weights, no final norm": {"tied": True, "normed": False},
    "parallel blocks": {"parallel": True},
}
"""Kinds of `Plain` on which every causal result is compared with the decoder in plain float64."""
