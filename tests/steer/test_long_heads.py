"""A model under long_heads: short texts as they are, long ones by chunks, decoding with the numbers of one pass."""

import pytest
import torch
import transformers

from regard.steer.long_heads import long_heads
from tests.oracles import chunks as oracle

CONFIG = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    for p in made.parameters():
        p.data.mul_(3 if p.ndim == 2 else 1)  # weights that choose
    return made


def text(length, seed=0):
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_text_within_the_chunks_is_read_as_the_model_reads_it(model):
    ids = text(12)
    want = model(ids).logits
    with long_heads(model, 3, 4):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        longer = model(text(30)).logits
    assert not torch.allclose(longer, model(text(30)).logits, atol=1e-2)


@torch.no_grad()
def test_a_layer_reads_as_the_definition_says(model):
    ids, kept = text(22), {}

    def hook(name):
        return lambda module, args, out: kept.__setitem__(name, out.unflatten(-1, (-1, 4)).transpose(1, 2))

    attention = model.model.layers[0].self_attn
    hooks = [getattr(attention, f"{n}_proj").register_forward_hook(hook(n)) for n in "qkv"]
    hooks.append(attention.o_proj.register_forward_pre_hook(lambda module, args: kept.__setitem__("out", args[0])))
    with long_heads(model, 3, 4):
        model(ids)
    for handle in hooks:
        handle.remove()
    got = kept["out"].unflatten(-1, (4, 4)).transpose(1, 2)
    for h in range(4):
        x = kept["q"][1, h], kept["k"][1, h // 2], kept["v"][1, h // 2]
        want, _ = oracle.read(*x, 3, 4, model.model.rotary_emb.inv_freq)
        torch.testing.assert_close(got[1, h].double(), torch.tensor(want), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("representation", ["paper", "mean"])
def test_decoding_gives_the_numbers_of_one_pass(model, representation):
    ids = text(25)
    with long_heads(model, 3, 4, representation=representation) as context:
        made = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert context.chosen["model.layers.1.self_attn"].count.max() == 4
        again = model(made[:, :-1]).logits[:, 24:].argmax(-1)
    assert torch.equal(again, made[:, 25:])


@torch.no_grad()
def test_what_it_cannot_read_is_refused_by_name(model):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn': its mask is not causality alone"):
        with long_heads(model, 3, 4):
            model(text(9), attention_mask=mask)
    cache = model(text(9)).past_key_values
    with pytest.raises(ValueError, match="goes on from 9 tokens and nothing was read"):
        with long_heads(model, 3, 4):
            model(text(3, seed=1), past_key_values=cache)
    with long_heads(model, 3, 4):
        model(text(10, seed=2))
        cache = model.model(text(10)).past_key_values
        model(text(10, seed=3))
        with pytest.raises(ValueError, match="goes on from 10 tokens and 10 tokens of another text were read"):
            model(text(3, seed=1), past_key_values=cache)
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, attn_implementation="sdpa")
    ).eval()
    with pytest.raises(ValueError, match="the layer has no rotary positions"):
        with long_heads(other, 3, 4):
            other(text(9))
