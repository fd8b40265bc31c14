"""Group mass and information contribution against explicit sums, each sample with groups of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tr

from regard import measures
from regard.measures.roles import roles
from regard.patterns import Line
from regard.watch.atlas import AtlasError
from regard.watch.recorder import watch
from regard.watch.settings import Watch
from tests.oracles import groups as oracle
from tests.watch.dense import take

LENGTH, LAYERS = 21, 3
DOCUMENTS = ("one", "two")


def mask(*indices):
    out = torch.zeros(LENGTH, dtype=torch.bool)
    out[list(indices)] = True
    return out


# rows and keys of each sample: "two" is empty in the second
GROUPS = [
    {"one": range(1, 6), "two": range(6, 9), "answer": [17, 20]},
    {"one": range(3, 4), "two": [], "answer": [8]},
]


@pytest.fixture(scope="module")
def watched():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tr.LlamaConfig(
            vocab_size=9,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = tr.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= 25
                layer.self_attn.k_proj.weight *= 10
        ids = torch.randint(0, 9, (2, LENGTH))
    named = {g: torch.stack([mask(*sample[g]) for sample in GROUPS]) for g in GROUPS[0]}

    def run():
        model(ids, use_cache=False)

    settings = Watch(("group",), groups=dict.fromkeys(named), per_sample=("group_raw",))
    with torch.no_grad(), watch(model, statistics=settings) as w:
        w.annotate(groups=named)
        run()
    return w.atlas, np.stack([c.weights for c in take(model, run)]), model, ids, named


def test_group_mass_is_the_explicit_sum(watched):
    atlas, weights, *_ = watched
    by_sample = atlas.measure("group_mass", by_sample=True)
    whole = atlas.measure("group_mass")
    everything = [{**s, "all": range(LENGTH), "first": [0]} for s in GROUPS]
    compared = 0
    for rows in ("all", *GROUPS[0]):
        for keys in ("first", *GROUPS[0]):
            mass, count = np.zeros((LAYERS, 4)), 0
            for b, sample in enumerate(everything):
                want = np.stack([oracle.group_mass(layer[b], sample[rows], sample[keys]) for layer in weights])
                got = by_sample.isel(sample=b).sel(q_group=rows, k_group=keys).values
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
                mass += np.nan_to_num(want) * len(sample[rows])
                count += len(sample[rows])
                compared += int(np.isfinite(want).all())
            got = whole.sel(q_group=rows, k_group=keys).values
            np.testing.assert_allclose(got, mass / count, rtol=1e-5, atol=1e-7)
            picked = atlas.measure("group_mass", rows=rows, keys=keys)
            np.testing.assert_array_equal(picked.values, got)
            assert picked.dims == ("layer", "head")
    assert compared == 4 * 4 + 3 * 4  # the second sample has no rows in "two"


def test_masses_of_a_partition_add_up_to_one(watched):
    _, _, model, ids, _ = watched
    parts = {f"part{i}": torch.arange(LENGTH) % 3 == i for i in range(3)}
    with torch.no_grad(), watch(model, statistics=("group",), groups=parts) as w:
        model(ids, use_cache=False)
    total = w.atlas.measure("group_mass").sel(k_group=list(parts)).sum("k_group")
    np.testing.assert_allclose(total.values, 1, rtol=1e-5)


def test_information_contribution_sums_layers(watched):
    atlas, weights, *_ = watched
    found = atlas.measure("information_contribution", documents=DOCUMENTS, by_sample=True)
    running = atlas.measure("information_contribution", documents=DOCUMENTS, by_sample=True, by_layer=True)
    assert found.dims == ("sample", "k_group")
    for b, sample in enumerate(GROUPS):
        want = oracle.information_contribution(
            [w[b] for w in weights], sample["answer"], [sample[d] for d in DOCUMENTS]
        )
        np.testing.assert_allclose(running.isel(sample=b).values, want, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.isel(sample=b).values, want[-1], rtol=1e-5, atol=1e-7)
    pooled = atlas.measure("information_contribution")
    assert pooled["k_group"].values.tolist() == list(DOCUMENTS)
    rows = np.array([len(s["answer"]) for s in GROUPS], dtype=float)
    np.testing.assert_allclose(pooled.values, (found.values * rows[:, None]).sum(0) / rows.sum(), rtol=1e-5)


def test_two_runs_put_their_samples_one_after_another(watched):
    atlas, _, model, ids, named = watched
    settings = Watch(("group",), groups=dict.fromkeys(named), per_sample=("group_raw",))
    halves = []
    for b in range(2):
        with torch.no_grad(), watch(model, statistics=settings) as w:
            w.annotate(groups={k: v[b : b + 1] for k, v in named.items()})
            model(ids[b : b + 1], use_cache=False)
        halves.append(w.atlas)
    together = halves[0] + halves[1]
    np.testing.assert_allclose(together["group_raw"].values, atlas["group_raw"].values, rtol=1e-5, atol=1e-7)


def test_generation_step_by_step_gives_the_rows_of_one_pass(watched):
    """With a cache the rows come one call at a time; the means are over all of them."""
    atlas, _, model, ids, named = watched
    settings = Watch(("group",), groups=dict.fromkeys(named), per_sample=("group_raw",))
    with torch.no_grad(), watch(model, statistics=settings) as w:
        w.annotate(groups=named)
        cache = None
        for a, b in ((0, 9), (9, 17), (17, 18), (18, LENGTH)):
            cache = model(ids[:, a:b], past_key_values=cache, use_cache=True).past_key_values
    np.testing.assert_allclose(w.atlas["group_raw"].values, atlas["group_raw"].values, rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_said(watched):
    atlas, _, model, ids, _ = watched
    with pytest.raises(AtlasError, match="documents: no group three"):
        atlas.measure("information_contribution", documents=("one", "three"))
    with pytest.raises(AtlasError, match="documents: must be the names"):
        atlas.measure("information_contribution", documents="one")
    with pytest.raises(AtlasError, match="rows: no group 'question'"):
        atlas.measure("group_mass", rows="question")
    with torch.no_grad(), watch(model, statistics=("group",)) as w:
        model(ids, use_cache=False)
    with pytest.raises(AtlasError, match=r"per_sample=\('group_raw',\)"):
        w.atlas.measure("group_mass", by_sample=True)
    assert {"group_mass", "information_contribution"} <= set(measures.names())


def test_a_head_that_reads_one_list_from_another_draws_a_skewed_line():
    """Second list at 20..27, counterparts at 4..11; one head looks there, one at the token before, one evenly."""
    length, second, first = 28, range(20, 28), range(4, 12)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    scores = torch.stack([(i - j == 16) * 20.0, (i - j == 1) * 20.0, torch.zeros(length, length)])

    class Heads(torch.nn.Module):
        def forward(self, x):
            q = scores[None] * length**0.5
            k = torch.eye(length).expand(1, 3, -1, -1)
            return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)

    rows = torch.zeros(length, dtype=torch.bool)
    rows[list(second)] = True
    settings = Watch(("template",), rows=rows, templates={"skewed line": Line(second, first)}, relations=())
    with torch.no_grad(), watch(model := Heads(), statistics=settings) as w:
        model(torch.zeros(1, length, 1))
    table = roles(w.atlas)
    held = [table.head(0, h)["roles"]["skewed line"]["holds"] for h in range(3)]
    assert held == [True, False, False]
    assert table.head(0, 0)["role"] == "skewed line"
    with torch.no_grad(), watch(model, statistics=("template",)) as w:
        model(torch.zeros(1, length, 1))
    assert "skewed line" in roles(w.atlas).not_measured()
