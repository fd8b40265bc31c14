"""Small models and hostile tokens for the report's tests."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "&amp;",
    "\u2028",
    "\u202e",
    "<script>alert(2)</script>",
    "\"'`${alert(3)}",
    "]]>",
    " ",
    "\n",
    "\t",
    "\x00",
    "é",
]


class Pieces:
    """A tokenizer whose tokens are markup, white space and words."""

    def decode(self, ids: list[int]) -> str:
        return HOSTILE[ids[0]] if ids[0] < len(HOSTILE) else f" word{ids[0]}"


def llama(layers: int = 2, heads: int = 4, kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8 * heads,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


def ids(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (1, length), generator=generator)


def text_ids() -> Tensor:
    """700 tokens that begin and nearly end with every piece of markup."""
    x = ids(700)
    x[0, : len(HOSTILE)] = torch.arange(len(HOSTILE))
    x[0, -len(HOSTILE) - 1 : -1] = torch.arange(len(HOSTILE))
    return x


def vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=48,
        patch_size=8,
        initializer_range=0.5,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


class Bare(nn.Module):
    """One attention over given q, k, v: what the seam sees is what the test gave."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **self.options)
