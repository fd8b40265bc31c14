"""Causal experiments against a decoder in plain float64, one experiment at a time."""

import dataclasses

import numpy as np
import pytest
import torch

from regard.steer.causal import conditional_mean, head_ablation, patch_grid, path_patch
from regard.steer.paths import head_paths
from regard.watch.anatomy import anatomy
from regard.watch.intervene import Site
from tests.oracles import transformer
from tests.watch.zoo import KINDS, Plain, ids


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


@pytest.fixture(params=KINDS)
def model(request):
    return Plain(**KINDS[request.param]).eval()


def oracle(model, inputs, at=lambda layer, part, x: x):
    return model.oracle(inputs, at=at)


def states(model, inputs):
    seen = {}

    def at(layer, part, x):
        seen[layer, part] = x.clone()
        return x

    logits = oracle(model, inputs, at)
    return seen, logits


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["zero", "uniform", "mean", "resample"])
def test_every_head_taken_out_on_its_own(model, kind):
    x = ids(3, 6)
    parts = anatomy(model, x)
    found = head_ablation(model, {"input_ids": x}, metric, kind=kind, anatomy=parts, chunk=3)
    plain = metric(oracle(model, x))
    close(found.plain, plain)
    assert found.dims == ("layer", "head", "sample")
    for layer in range(len(parts)):
        for head in range(4):

            def at(i, part, t, layer=layer, head=head):
                if i != layer:
                    return t
                t = t.clone()
                if part == "weights" and kind == "uniform":
                    t[:, head] = transformer.uniform(t, transformer.allowed(6, None, 3))[:, head]
                if part == "z" and kind != "uniform":
                    own = t[:, head]
                    t[:, head] = {
                        "zero": own * 0,
                        "mean": own.mean(0, True).expand_as(own),
                        "resample": own.roll(1, 0),
                    }[kind]
                return t

            close(found[layer, head], metric(oracle(model, x, at)) - plain)


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize(
    "receivers",
    [
        [Site(None, "final")],
        [Site(1, "q", head=2)],
        [Site(1, "v", head=1), Site(1, "k", head=1)],
        [Site(1, "z", head=3)],
        [Site(1, "resid_mid")],
    ],
    ids=lambda sites: " ".join(s.part for s in sites),
)
def test_paths_from_every_head(model, receivers, freeze_mlps):
    clean, corrupt = ids(2, 5), ids(2, 5, 1)
    parts = anatomy(model, clean)
    if model.parallel and receivers[0].part == "resid_mid":
        with pytest.raises(LookupError, match="parallel block"):
            path_patch(model, {"input_ids": clean}, {"input_ids": corrupt}, receivers, metric, anatomy=parts)
        return
    found = path_patch(
        model,
        {"input_ids": clean},
        {"input_ids": corrupt},
        receivers,
        metric,
        freeze_mlps=freeze_mlps,
        anatomy=parts,
        chunk=3,
    )
    a, logits = states(model, clean)
    b, other = states(model, corrupt)
    wanted = {(s.layer, s.part): s.head for s in receivers}
    own_z = {h for (layer, part), h in wanted.items() if part == "z"}
    last = {"final": 2, "resid_mid": 2}.get(receivers[0].part, 1)
    for layer in range(len(parts)):
        for head in range(4):
            if layer >= last:
                assert np.isnan(found[layer, head]).all()
                continue
            noted = {}

            def first(i, part, t, layer=layer, head=head, noted=noted):
                if part == "z":
                    z = a[i, part].clone()
                    for h in own_z if i == 1 else ():
                        z[:, h] = t[:, h]
                    if i == layer:
                        z[:, head, -1] = b[i, part][:, head, -1]
                    t = z
                if part == "mlp_out" and freeze_mlps:
                    t = a[i, part]
                if (i, part) in wanted:
                    noted[i, part] = t.clone()
                return t

            def second(i, part, t, noted=noted):
                if (i, part) in wanted:
                    h = slice(None) if wanted[i, part] is None else wanted[i, part]
                    t, new = (transformer.per_head(x, 4) if part in "kv" else x.clone() for x in (t, noted[i, part]))
                    t[:, h] = new[:, h]
                return t

            oracle(model, clean, first)
            value = metric(oracle(model, clean, second))
            close(found[layer, head], (value - metric(logits)) / (metric(other) - metric(logits)))


def test_paths_into_many_receivers_are_those_into_each(model):
    inputs = {"input_ids": ids(2, 5)}, {"input_ids": ids(2, 5, 1)}
    parts = anatomy(model, inputs[0]["input_ids"])
    receivers = [Site(1, "q", head=2, pos=-1), Site(1, "k", head=0), Site(1, "v", head=3)]
    found = head_paths(model, *inputs, receivers, metric, chunk=3, anatomy=parts)
    for n, site in enumerate(receivers):
        close(found[n], path_patch(model, *inputs, site, metric, anatomy=parts))
    with pytest.raises(ValueError, match=r"part 'q', 'k' or 'v', got Site\(1, 'z'\)"):
        head_paths(model, *inputs, [Site(1, "z")], metric, anatomy=parts)


def test_paths_that_cannot_be_are_refused(model):
    clean = {"input_ids": ids(2, 5)}
    parts = anatomy(model, clean["input_ids"])
    with pytest.raises(ValueError, match=r"no path leads from any head to Site\(0, 'q', head=0\)"):
        path_patch(model, clean, clean, Site(0, "q", head=0), metric, anatomy=parts)
    with pytest.raises(ValueError, match=r"no path leads from \[\(1, 0\)\]"):
        path_patch(model, clean, clean, Site(1, "q", head=0), metric, senders=[(1, 0)], anatomy=parts)
    with pytest.raises(ValueError, match="at least one Site"):
        path_patch(model, clean, clean, [], metric, anatomy=parts)


def test_where_clean_and_corrupt_coincide_the_effect_is_nan_and_says_so(model):
    """Sample 1 has the same inputs twice; all other samples keep their numbers."""
    clean, corrupt = ids(3, 5), ids(3, 5, 1)
    corrupt[1] = clean[1]
    parts = anatomy(model, clean)
    inputs = {"input_ids": clean}, {"input_ids": corrupt}
    for run in (
        lambda a, b: path_patch(model, a, b, Site(None, "final"), metric, anatomy=parts),
        lambda a, b: patch_grid(model, a, b, ["resid_post"], {"last": -1}, metric, anatomy=parts),
        lambda a, b: patch_grid(model, a, b, ["z"], {"last": -1}, metric, direction="noise", anatomy=parts),
    ):
        with pytest.warns(UserWarning, match="1 of 3 samples have a clean-corrupt difference below"):
            found = run(*inputs)
        held = ~np.isnan(found.isel(sample=0))
        assert held.any()
        assert np.isnan(found.isel(sample=1)).all()
        assert np.isfinite(found.isel(sample=2).values[held]).all()
        with pytest.warns(UserWarning, match="3 of 3 samples"):
            assert np.isnan(run(inputs[0], inputs[0])).all()


def test_mlps_that_are_not_found_cannot_be_frozen(model):
    clean, corrupt = ({"input_ids": ids(2, 5, seed)} for seed in (0, 1))
    parts = dataclasses.replace(anatomy(model, clean["input_ids"]), mlp=(None, None))
    with pytest.raises(LookupError, match="mlp_out"):
        path_patch(model, clean, corrupt, Site(None, "final"), metric, freeze_mlps=True, anatomy=parts)


def test_grid_of_parts_layers_and_classes(model):
    clean, corrupt = ids(2, 6), ids(2, 6, 1)
    parts = anatomy(model, clean)
    classes = {"early": ((0, 1), (1, 2)), "last": -1}
    inputs = {"input_ids": clean}, {"input_ids": corrupt}
    found = patch_grid(model, *inputs, ["attn_out", "resid_post"], classes, metric, anatomy=parts)
    assert found.sizes == {"part": 2, "layer": 2, "class": 2, "sample": 2}
    a, logits = states(model, clean)
    _, other = states(model, corrupt)
    for part in ("attn_out", "resid_post"):
        for layer in range(2):
            for name, rows in (("early", [[0, 1], [1, 2]]), ("last", [[5], [5]])):

                def at(i, p, t, layer=layer, part=part, rows=rows):
                    if (i, p) == (layer, part):
                        t = t.clone()
                        for sample, columns in enumerate(rows):
                            t[sample, columns] = a[i, p][sample, columns]
                    return t

                value = metric(oracle(model, corrupt, at))
                want = (value - metric(other)) / (metric(logits) - metric(other))
                close(found.sel({"part": part, "layer": layer, "class": name}), want)
    noise = patch_grid(model, *inputs, ["resid_post"], {"last": -1}, metric, direction="noise", anatomy=parts)
    close(noise.sel(layer=1)[0, 0], [1, 1])  # the last state decides


def test_conditional_mean_keeps_the_token_and_averages_the_rest(model):
    x = ids(2, 4)
    parts = anatomy(model, x)
    drawn = {}

    def sampler(at, token, draws, generator):
        out = torch.randint(1, 8, (draws, 4), generator=generator)
        out[:, at] = token
        drawn[at, token] = out
        return out

    site = Site(0, "resid_post")
    found = conditional_mean(model, x, sampler, site, 5, anatomy=parts)
    for row in range(2):
        for at, token in enumerate(x[row].tolist()):
            seen, _ = states(model, drawn[at, token])
            close(found[row, at], seen[0, "resid_post"][:, at].mean(0))
    again = conditional_mean(model, x[1:], sampler, site, 5, anatomy=parts)
    assert torch.equal(again[0], found[1])
    with pytest.raises(ValueError, match="accepted is"):
        conditional_mean(model, x, lambda at, token, n, g: torch.zeros(n, 4, dtype=torch.long), site, 5, anatomy=parts)
    with pytest.raises(ValueError, match="one of the stream"):
        conditional_mean(model, x, sampler, Site(0, "z"), 5, anatomy=parts)
