"""The seam on transformers' models: grouping, caches, padding, windows, cross-attention."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.watch.seam_models import watched


def llama(kv_heads: int = 2, **more) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, pad_token_id=0, attn_implementation="sdpa", **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_llama_prompt(kv_heads):
    model, ids = llama(kv_heads), torch.randint(1, 64, (2, 9))
    spy = watched(model, lambda: model(ids, use_cache=False))
    assert spy.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for call in spy.calls:
        assert call.q.shape == (2, 4, 9, 8)
        assert call.k.shape == call.v.shape == (2, kv_heads, 9, 8)
        assert call.groups == 4 // kv_heads
        assert call.is_causal
        assert call.causal
        assert call.kind == "self"
        assert call.mask is None
        assert call.step == "prompt"
        assert call.forward == 0
        assert call.index == 0
        assert call.q_pos.tolist() == call.kv_pos.tolist() == list(range(9))
        assert call.q_start == 0
        assert call.valid.all()
        assert call.kv_valid.all()
        assert not call.folded
        assert call.positions_known
        assert torch.equal(call.inputs["input_ids"], ids)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_llama_left_padding(kv_heads):
    model, ids = llama(kv_heads), torch.randint(1, 64, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    spy = watched(model, lambda: model(ids, attention_mask=mask, use_cache=False))
    for call in spy.calls:
        assert call.mask is not None
        assert call.k.shape[1] == kv_heads
        assert torch.equal(call.valid, mask.bool())
        assert torch.equal(call.kv_valid, mask.bool())
        assert call.causal
        assert call.q_pos.tolist() == list(range(9))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_llama_generate(kv_heads, cache):
    model, ids = llama(kv_heads), torch.randint(1, 64, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    how = {"cache_implementation": "static"} if cache == "static" else {}
    spy = watched(
        model,
        lambda: model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, **how),
    )
    assert [call.forward for call in spy.calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    for call in spy.calls:
        n = 6 + call.forward
        assert call.step == ("generated" if call.forward else "prompt")
        assert call.q.shape[1] == 4
        assert call.k.shape[1] == kv_heads
        assert call.q_pos.tolist() == ([n - 1] if call.forward else list(range(6)))
        assert call.kv_pos.tolist() == list(range(call.k.shape[2]))
        assert call.q_start == call.q_pos[0]
        assert call.causal
        assert call.kv_valid[1, :n].all()
        assert not call.kv_valid[0, :2].any()
        assert not call.kv_valid[:, n:].any()
        assert call.valid.sum(1).tolist() == ([1, 1] if call.forward else [4, 6])


@torch.no_grad()
def test_bert():
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, attn_implementation="sdpa",
    )  # fmt: skip
    model = BertModel(config).eval()
    ids, mask = torch.randint(1, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    spy = watched(model, lambda: model(ids, attention_mask=mask))
    assert spy.layers == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    for call in spy.calls:
        assert not call.causal
        assert call.kind == "self"
        assert call.step == "prompt"
        assert torch.equal(call.valid, mask.bool())
        assert torch.equal(call.kv_valid, mask.bool())
