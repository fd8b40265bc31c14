"""Circuits of two tasks, shrunk: an untrained model; overlaps of circuits that are known; what forbidding does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from regard.studies import circuit_reuse as study
from regard.tasks.lists import ColouredObjects, IndirectObject
from regard.tasks.symbolic import SYMBOLIC


@pytest.fixture(scope="module")
def model():
    return replace(SYMBOLIC["lists"], layers=3, dim=32, heads=4).build(0).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("lists")
    model.save_pretrained(path)
    SYMBOLIC["lists"].vocabulary.tokenizer(80).save_pretrained(path)
    return path


def test_an_untrained_model_is_not_measured(folder):
    findings = study.run(model=str(folder))
    assert {f.claim for f in findings} == {c.id for c in study.CLAIMS if not c.waits}
    assert all("too few prompts" in f.reason for f in findings)
    gates = {"values": {"indirect_object": 0.2}, "thresholds": {"indirect_object": 0.95}}
    (folder / "training.json").write_text(json.dumps({"gates": gates}))
    assert all("testbed below its gate" in f.reason for f in study.run(model=str(folder)))
    (folder / "training.json").unlink()


def test_the_whole_study_on_prompts_of_any_kind(model, folder, monkeypatch):
    def any_prompts(_, task, n, generator):
        clean = task.batch(n, generator)
        return clean, task.corrupted(clean)

    monkeypatch.setattr(study, "prompts", any_prompts)
    monkeypatch.setitem(study.PROMPTS, "smoke", 3)
    monkeypatch.setitem(study.LONG, "smoke", 5)
    monkeypatch.setattr(study, "DRAWS", 500)
    monkeypatch.setattr(study, "BOOTSTRAP", 10)
    found = {f.claim: f for f in study.run(model=str(folder))}
    assert set(found) == {c.id for c in study.CLAIMS if not c.waits}
    for claim in ("shared", "levels"):
        assert 0 <= found[claim].figure <= 1
        assert found[claim].interval[0] <= found[claim].interval[1]
    assert [len(side) for side in found["shared"].details["circuits"]] == [1, 1]
    assert len(found["shared"].details["circuits"][0][0]) == 2  # of 12
    assert len(found["repair"].details["heads"]) == 4
    assert found["repair"].state == "does not hold"
    assert found["direct"].state == "holds"


def test_a_wrong_direct_effect_is_seen(model):
    task, generator = IndirectObject(), torch.Generator().manual_seed(0)
    clean = task.batch(4, generator)
    pair = clean, task.corrupted(clean)
    right = study.direct_effects(model, *pair)
    assert study._direct(model, [pair], [right]).state == "holds"
    wrong = right.copy()
    wrong[-1, 0, 0] += 1e-3
    assert study._direct(model, [pair], [wrong]).state == "does not hold"


def effect(values):
    return xr.DataArray(values[..., None] + np.zeros(4), dims=("layer", "head", "sample"))


def test_equal_circuits_overlap_wholly_and_random_ones_by_chance():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 6, 8))
    assert study._overlap("shared", [[effect(a)], [effect(a)]], 0.2, 0).figure == 1
    same = study._overlap("shared", [[effect(a)], [effect(-a)]], 0.2, 0)
    assert (same.figure, same.state) == (0, "does not hold")
    anyhow, _ = study.by_chance([a], [b], 0.2, 0)
    assert anyhow.mean() == pytest.approx(10 / 48, abs=0.01)
    assert np.quantile(anyhow, 0.99) >= 0.5
    # Circuits that fill one layer share it, whatever the task.
    one = np.zeros((6, 8))
    one[5] = 1
    assert study.by_chance([one], [one], 8 / 48, 0)[1].mean() == 1
    blind = a.copy()
    blind[3:] = np.nan  # heads that no path leads from
    assert np.isfinite([blind[h] for h in study.top(blind, 0.2)]).all()
    anyhow, _ = study.by_chance([blind], [blind], 0.2, 0)
    assert anyhow.mean() == pytest.approx(10 / 24, abs=0.01)


def test_forbidding_closes_the_wrong_items_alone(model):
    from regard.watch.intervene import Site, trace

    batch = ColouredObjects(study.ITEMS).batch(6, torch.Generator().manual_seed(0))
    heads = [(1, 1), (2, 3)]
    rows_seen = []
    for rows, edits in study.forbidden(batch, heads):
        rows_seen += rows.tolist()
        ids = {"input_ids": batch.input_ids[rows][:, :-1], "use_cache": False}
        for layer, head in heads:
            site = Site(layer, "weights", head=head)
            weights = trace(model, ids, site, edits=edits)[site]
            spans = {k: v[rows] for k, v in batch.spans.items()}
            for n, own in enumerate(spans["colour"][:, 0].tolist()):
                last = weights[n, -1]
                assert (last[own : own + 2] > 0).all()
                wrong = [p for i in range(study.ITEMS) for p in (1 + 3 * i, 2 + 3 * i) if 1 + 3 * i != own]
                assert (last[wrong] == 0).all()
                assert last[int(spans["query"][n, 0])] > 0
                assert (weights[n, -2, :-1] > 0).all()  # other rows see everything
    assert sorted(rows_seen) == list(range(6))


def test_corruption_turns_the_answer(model):
    for task in (IndirectObject(), ColouredObjects(3)):
        clean = task.batch(20, torch.Generator().manual_seed(0))
        corrupt = task.corrupted(clean)
        for a, b in zip(clean.input_ids, corrupt.input_ids, strict=True):
            assert task.solve(a[:-1]) == a[-1]
            assert task.solve(b[:-1]) == b[-1] != a[-1]
        # Against itself no head does any harm.
        with pytest.warns(UserWarning, match="clean-corrupt difference"):
            assert np.isnan(study.direct_effects(model, clean[:2], clean[:2])).all()
