"""A call's rotary positions: queries and keys turned back are what the model projected, in every form models have."""

import pytest
import torch
import transformers

from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.patterns import Causal
from regard.watch.refuse import SeamError
from regard.watch.seam import Seam

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# class, what it has of its own, whether pairs are interleaved, pairs that turn
MODELS = {
    "half-split": ("Llama", {}, False, 8),
    "interleaved": ("Cohere", {}, True, 8),
    "stretched": ("Llama", {"rope_parameters": YARN}, False, 8),
    "in part": ("Phi", {}, False, 4),
    "in part, interleaved": ("Glm", {"head_dim": 16}, True, 4),
    "two bases": ("Gemma3", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6}, False, 8),
}


def made(kind):
    name, own, *_ = MODELS[kind]
    name = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{name}Config")(**SMALL | own, attn_implementation="sdpa")
    torch.manual_seed(0)
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


def heads_of(model, layer, name):
    """What the projection of a layer gave (after its norm, where it has one), as heads."""
    attention = model.model.layers[layer].self_attn
    norm = getattr(attention, f"{name}_norm", None)
    kept = []

    def hook(module, args, out):
        kept.append(out.detach() if norm is not None else out.detach().unflatten(-1, (-1, 16)).transpose(1, 2))

    part = norm if norm is not None else getattr(attention, f"{name}_proj")
    return part.register_forward_hook(hook), kept


@pytest.mark.parametrize("kind", MODELS)
def test_turned_back_is_what_was_projected(kind):
    model, (_, _, interleaved, pairs) = made(kind), MODELS[kind]
    hooks = {(i, n): heads_of(model, i, n) for i in range(len(model.model.layers)) for n in "qk"}
    seen = []

    def look(call):
        rotary = call.rotary
        assert rotary.interleaved == interleaved
        assert len(rotary.inv_freq) == pairs
        assert (rotary.scaling != 1) == (kind == "stretched")
        q, k = rotary.unrotate_q(call.q), rotary.unrotate_k(call.k)
        seen.append((q, k))
        turned = rotary.rotate(k, rotary.kv_pos[:, None])
        torch.testing.assert_close(turned, call.k, rtol=1e-5, atol=1e-5)
        return None

    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Seam(model, look):
        model(ids)
    for i, (q, k) in enumerate(seen):
        torch.testing.assert_close(q, hooks[i, "q"][1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(k, hooks[i, "k"][1][0], rtol=1e-5, atol=1e-5)
    assert len(seen) == len(model.model.layers)


def test_left_padding_and_cached_keys_turn_back_by_position_ids():
    model = made("half-split")
    hooks = {n: heads_of(model, 1, n) for n in "qk"}
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    seen = []

    def look(call):
        if call.layer.endswith("1.self_attn"):
            seen.append((call.rotary.unrotate_q(call.q), call.rotary.unrotate_k(call.k), call.rotary.q_pos))
        return None

    with torch.no_grad(), Seam(model, look):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert len(seen) == 4
    real = torch.cat([mask.bool(), torch.ones(2, 3, dtype=torch.bool)], 1)
    for step, (q, k, at) in enumerate(seen):
        torch.testing.assert_close(q, hooks["q"][1][step], rtol=1e-5, atol=1e-5)
        want = torch.cat(hooks["k"][1][: step + 1], 2)
        some = real[:, : want.shape[2]]
        torch.testing.assert_close(k.transpose(1, 2)[some], want.transpose(1, 2)[some], rtol=1e-5, atol=1e-5)
        if step:
            assert at.flatten().tolist() == [8 + step, 4 + step]


def test_this_projects_layers_with_positions_and_a_state():
    layer = MultiHead(16, 2, position=Rope(8, 100.0), pattern=Causal(), backend="reference")
    at, x = torch.tensor([3, 7, 8, 20]), torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    plain = layer.k_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
    seen = []
    with torch.no_grad(), Seam(layer, lambda call: seen.append(call.rotary.unrotate_k(call.k))):
        layer(x, positions=at)
        layer(x)
        state = layer.new_state()
        layer(x[:, :3], state=state, positions=at[:3])
        layer(x[:, 3:], state=state, positions=at[3:])
    for got, length in zip(seen, (4, 4, 3, 4), strict=True):
        torch.testing.assert_close(got, plain[:, :, :length], rtol=1e-5, atol=1e-5)


def test_none_without_rotary_positions():
    found = []
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, attn_implementation="sdpa")
    with torch.no_grad(), Seam(model := transformers.GPT2LMHeadModel(config).eval(), lambda c: found.append(c.rotary)):
        model(torch.arange(5)[None])
    layer = MultiHead(16, 2, pattern=Causal())
    with torch.no_grad(), Seam(layer, lambda call: found.append(call.rotary)):
        layer(torch.randn(1, 4, 16))
    assert found == [None, None]


def test_layers_that_leave_their_positions_unused_have_none():
    config = transformers.Cohere2Config(
        **SMALL | {"num_hidden_layers": 4}, sliding_window=8, attn_implementation="sdpa"
    )
    model, found = transformers.Cohere2ForCausalLM(config).eval(), []
    with torch.no_grad(), Seam(model, lambda call: found.append(call.rotary is None)):
        model(torch.randint(3, 50, (1, 12)))
    assert found == [kind == "full_attention" for kind in config.layer_types]


def test_a_way_of_turning_that_is_not_known_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = made("half-split")
    theirs = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **how: theirs(q, k, cos, sin * 0.9)
    )
    with torch.no_grad(), pytest.raises(SeamError, match="in a way that none of the model's frequencies"):
        with Seam(model, lambda call: call.rotary and None):
            model(torch.arange(3, 20)[None])


def test_rotations_handed_over_in_another_form_are_refused():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(64, 64)

        def forward(self, x, rope):
            q = self.project(x).unflatten(-1, (4, 16)).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    with torch.no_grad(), pytest.raises(SeamError, match="handed its rotary positions as 'rope'"):
        with Seam(foreign := Foreign(), lambda call: call.rotary and None):
            foreign(torch.randn(1, 5, 64), rope=torch.ones(5, 16))


def test_parts_that_rotate_in_another_way_are_refused():
    from regard.layers.grid_rope import GridRope

    class OnGrid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.rope = torch.nn.Linear(8, 8), GridRope(8, (2, 2))

        def forward(self, x):
            q = self.rope(self.project(x)[:, None], self.rope.angles((2, 3)))
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    with torch.no_grad(), pytest.raises(SeamError, match="rotates by a part of its own, GridRope"):
        with Seam(model := OnGrid(), lambda call: call.rotary and None):
            model(torch.randn(1, 6, 8))
