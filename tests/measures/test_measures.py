"""Measures against their formulas on explicit weights, and on atlases made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tr
import xarray as xr

from regard import measures
from regard.measures.rhythm import middle_layers
from regard.measures.sinks import sink_window
from regard.watch.atlas import Atlas, AtlasError, variable
from regard.watch.recorder import watch
from tests.watch.dense import take

LENGTH = 40


@pytest.fixture(scope="module")
def watched():
    """A random decoder, sharpened, with everything watched; and its weights [layer, batch, head, q, k]."""
    torch.manual_seed(0)
    config = tr.LlamaConfig(
        vocab_size=9,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = tr.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 25
            layer.self_attn.k_proj.weight *= 10
    ids = torch.randint(0, 9, (2, LENGTH))
    groups = {
        "text": torch.arange(LENGTH) < 25,
        "other": torch.arange(LENGTH) >= 30,
        "user": torch.arange(LENGTH) % 4 == 1,
    }

    def run():
        model(ids, use_cache=False, output_hidden_states=True)

    with (
        torch.no_grad(),
        watch(
            model,
            statistics="full",
            groups=groups,
            per_sample=("received_raw", "entropy_raw", "rhythm", "group_max_raw", "copy_hits"),
            stream=True,
        ) as w,
    ):
        w.annotate(spans={"needle": [[5, 9], [3, 11]], "answer": [[20, 24], [30, 36]]})
        run()
    weights = np.stack([c.weights for c in take(model, run)])
    with torch.no_grad():
        hidden = []
        hooks = [block.register_forward_hook(lambda m, a, out: hidden.append(out)) for block in model.model.layers]
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        embed = model.model.embed_tokens(ids)
    states = np.stack([h[0].numpy() if isinstance(h, tuple) else h.numpy() for h in hidden]).astype(float)
    return w.atlas, weights, ids.numpy(), groups, states, embed.numpy()


def near(got: xr.DataArray, want: np.ndarray, rtol: float = 2e-5) -> None:
    np.testing.assert_allclose(got.values, want, rtol=rtol, atol=2e-6)


def mean(values: np.ndarray) -> np.ndarray:
    """Over samples and rows: [layer, batch, head, q] to [layer, head]."""
    return values.mean((1, 3))


def test_spread(watched):
    atlas, p, *_ = watched
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    n = np.arange(1, LENGTH + 1)
    near(atlas.measure("entropy"), mean(entropy))
    near(atlas.measure("entropy_norm"), mean((entropy / np.log(np.maximum(n, 2)))[..., 1:]))
    near(atlas.measure("entropy_spread"), mean(entropy).std(-1))
    near(atlas.measure("top1"), mean(p.max(-1)))
    near(atlas.measure("participation"), 1 / mean((p**2).sum(-1)))
    flat = p.transpose(0, 2, 1, 3, 4).reshape(6, 4, -1)
    unit = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    cosine = unit @ unit.transpose(0, 2, 1)
    near(atlas.measure("head_similarity"), (cosine.sum((1, 2)) - 4) / 12)


def test_distance(watched):
    atlas, p, *_ = watched
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    far = (p * np.abs(i - j)).sum(-1)
    near(atlas.measure("mean_distance"), mean(far))
    near(atlas.measure("distance_norm"), mean(far / np.maximum(np.arange(LENGTH), 1)))
    near(atlas.measure("window_mass", width=8), mean((p * (i - j < 8)).sum(-1)))
    near(
        atlas.measure("offset_profile").sel(offset=3),
        np.stack([p[..., o, o - 3] for o in range(3, LENGTH)]).mean((0, 2)),
    )
    near(atlas.measure("template_recall", template="diagonal"), mean((p * (i - j <= 1)).sum(-1)))
    with pytest.raises(AtlasError, match="width: 3 was not recorded"):
        atlas.measure("window_mass", width=3)
    with pytest.raises(AtlasError, match="no 'nothing'"):
        atlas.measure("template_recall", template="nothing")


def test_relations(watched):
    atlas, p, ids, *_ = watched
    near(atlas.measure("self_token"), np.einsum("lbhii->lh", p) / (2 * LENGTH))
    near(atlas.measure("previous_token"), np.stack([p[..., i, i - 1] for i in range(1, LENGTH)]).mean((0, 2)))
    for name, back in (("duplicate", 0), ("induction", 1)):
        total, rows = np.zeros((6, 4)), 0
        for b in range(2):
            for i in range(LENGTH):
                keys = [j for j in range(back, i) if ids[b, j - back] == ids[b, i]]
                total += p[:, b, :, i][..., keys].sum(-1)
                rows += bool(keys)
        near(atlas.measure(name), total / rows)


def test_sinks(watched):
    atlas, p, _, groups, _, _ = watched
    near(atlas.measure("sink"), mean(p[..., 1:, 0]))
    user = groups["user"].numpy()
    near(atlas.measure("sink", keys="user"), mean(p[..., user].sum(-1)[..., 38:]))
    received = p.sum(-2) / (LENGTH - np.arange(LENGTH))
    d = received - received.mean(-1, keepdims=True)
    near(atlas.measure("received_kurtosis"), ((d**4).mean(-1) / (d**2).mean(-1) ** 2 - 3).mean(1), rtol=1e-3)
    with pytest.raises(AtlasError, match="keys: no group 'x'"):
        atlas.measure("sink", keys="x")


def test_context_and_modality(watched):
    atlas, p, _, groups, _, _ = watched
    user, text, other = (groups[g].numpy() for g in ("user", "text", "other"))
    most = p[..., user].sum(-1).max(2)  # [layer, batch, q]
    near(atlas.measure("user_attention"), most.mean((1, 2)))
    near(atlas.measure("user_attention", by_sample=True), most.mean(2))
    seen = np.tril(np.ones((LENGTH, LENGTH)))
    counts = [2 * 4 * seen[:, g].sum() for g in (text, other)]
    masses = [p[..., g].sum((1, 2, 3, 4)) for g in (text, other)]
    mdi, aei = atlas.measure("mdi"), atlas.measure("aei")
    near(mdi, (masses[0] / counts[0]) / (masses[1] / counts[1]))
    q = counts[0] / sum(counts)
    np.testing.assert_allclose(aei.values, mdi.values / (mdi.values * q + 1 - q), rtol=1e-6)
    thirds = atlas.measure("mdi", by="third")
    early = (masses[0][:2].sum() / masses[1][:2].sum()) / (counts[0] / counts[1])
    np.testing.assert_allclose(thirds.sel(third="early").item(), early, rtol=1e-5)


def test_rhythm(watched):
    atlas, p, *_ = watched
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    chosen = middle_layers(6)
    assert chosen == [2, 3]
    far = mean((p * np.abs(i - j)).sum(-1))[chosen]
    order = np.dstack(np.unravel_index(np.argsort(far.ravel()), far.shape))[0]
    count = round(0.3 * far.size)
    local = np.mean([p[chosen[a], :, h] for a, h in order[:count]], 0)
    wide = np.mean([p[chosen[a], :, h] for a, h in order[-count:]], 0)
    near(atlas.measure("waad"), (local * np.minimum(np.abs(i - j), 10)).sum(-1))
    band = (i - j >= 10) & (i - j <= 100)
    rows = band.sum(0)
    fai = (wide * band).sum(1) / np.where(rows > 0, rows, np.nan)
    got = atlas.measure("fai").values
    np.testing.assert_allclose(got, fai, rtol=1e-4, atol=1e-7)
    assert np.isnan(got[:, -10:]).all()  # no row lies in the band: not 0


def test_retrieval(watched):
    atlas, p, ids, *_ = watched
    spans = [((5, 9), (20, 24)), ((3, 11), (30, 36))]
    distinct, hits = np.zeros((6, 4, 2)), np.zeros((6, 4, 2))
    for b, ((a, e), (s, t)) in enumerate(spans):
        for layer in range(6):
            for h in range(4):
                copied = set()
                for at in range(s, t):
                    top = int(p[layer, b, h, at - 1].argmax())
                    if a <= top < e and ids[b, top] == ids[b, at]:
                        copied.add(top)
                        hits[layer, h, b] += 1
                distinct[layer, h, b] = len(copied)
    assert hits.sum() > 3  # the comparison has something to compare
    sizes = np.array([4, 8])
    near(atlas.measure("retrieval"), (distinct / sizes).mean(-1))
    near(atlas.measure("retrieval", count="hits"), (hits / sizes).mean(-1))
    assert atlas["copy_steps"].values.tolist() == [4, 6]


def test_stream(watched):
    atlas, _, _, _, states, embed = watched
    size = np.abs(states)
    near(atlas["resid_norm"], np.linalg.norm(states, axis=-1))
    near(atlas["resid_absmax"], size.max(-1))
    assert (atlas["resid_absmax_dim"].values == size.argmax(-1)).all()
    near(atlas["resid_absmean"], size.mean(-1))
    median = torch.from_numpy(size).median(-1).values.numpy()
    near(atlas["resid_absmedian"], median)
    first = states[:, :, :1]
    norms = np.linalg.norm(states, axis=-1) * np.linalg.norm(first, axis=-1)
    near(atlas["bos_cos"], (states * first).sum(-1) / norms)
    near(atlas["bos_embed_norm"], np.linalg.norm(embed[:, 0], axis=-1))
    ratio = 4.0
    assert (atlas.measure("massive", ratio=ratio).values == (size.max(-1) > ratio * median)).all()
    over_mean = size.max(-1) > ratio * size.mean((2, 3))[..., None]
    assert (atlas.measure("massive", ratio=ratio, over="mean").values == over_mean).all()


def test_sink_lifetime_by_hand():
    layers = np.array([f"b{n}" for n in range(10)], dtype=object)
    norm = np.ones((10, 1, 4))
    norm[2:7, 0, 0] = 50  # the first token is large after blocks 2 .. 6
    cos = np.full((10, 1, 4), 0.1)
    cos[:, 0, 0] = 1
    cos[3:7, 0, 1] = 0.95  # 4 blocks of the window
    cos[2:10, 0, 2] = -0.99  # antiparallel counts; 5 blocks of the window
    atlas = Atlas(
        {
            "resid_norm": variable("resid_norm", norm),
            "bos_cos": variable("bos_cos", cos),
            "bos_embed_norm": variable("bos_embed_norm", np.ones(1)),
        },
        {"layer": layers, "sample": np.array(["0"], dtype=object), "position": np.arange(4)},
    )
    assert sink_window(atlas).values[:, 0].nonzero()[0].tolist() == [2, 3, 4, 5, 6]
    life = atlas.measure("sink_lifetime")
    np.testing.assert_array_equal(life.values, [[np.nan, 4, 5, 0]])
    assert life["first"].values.tolist() == [[2, 3, 2, -1]]
    assert life["kind"].values.tolist() == [["", "secondary", "secondary", ""]]


def test_every_measure_says_what_it_is_and_what_it_lacks():
    empty = Atlas({}, {})
    promised = {
        *("entropy", "entropy_spread", "head_similarity", "mean_distance", "waad", "fai", "sink", "window_mass"),
        *("previous_token", "duplicate", "induction", "retrieval", "received_kurtosis", "mdi", "aei", "massive"),
        *("user_attention", "ring_strength", "template_recall", "top1", "participation", "sink_lifetime"),
    }
    assert promised <= set(measures.names())
    for name in measures.names():
        measure = measures.get(name)
        assert measure.formula
        assert measure.range[0] < measure.range[1]
        with pytest.raises((AtlasError, KeyError)):
            measure(empty)
    with pytest.raises(AtlasError, match="no measure 'x'"):
        measures.get("x")
    with pytest.raises(AtlasError, match=r"takes a regard\.Atlas"):
        measures.get("sink")(xr.Dataset())
