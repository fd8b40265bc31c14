"""Channels between heads, shrunk: a channel that is built is found, and a scaled component scales what is written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from regard.studies import talking_heads as study
from regard.tasks.lists import IndirectObject
from regard.tasks.symbolic import SYMBOLIC
from regard.watch.anatomy import anatomy
from regard.watch.intervene import Site, intervene, trace


@pytest.fixture(scope="module")
def model():
    return replace(SYMBOLIC["lists"], layers=2, dim=32, heads=4).build(0).eval()


@pytest.fixture(scope="module")
def read(model):
    parts = anatomy(model)
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    return parts, heads, study.head_parts(model, parts, heads)


@pytest.fixture(scope="module")
def prompts():
    clean = IndirectObject().batch(4, torch.Generator().manual_seed(0))
    return clean, IndirectObject().corrupted(clean)


def test_the_whole_study_on_prompts_of_any_kind(model, prompts, monkeypatch, tmp_path):
    model.save_pretrained(tmp_path)
    SYMBOLIC["lists"].vocabulary.tokenizer(80).save_pretrained(tmp_path)
    for table in (study.PROMPTS, study.CHOSEN_ON, study.TESTED_ON):
        monkeypatch.setitem(table, "smoke", 3)
    untrained = {f.claim: f for f in study.run(model=str(tmp_path))}
    assert untrained["scores"].state == "holds"
    assert untrained["components"].state == untrained["lists"].state == "not measured"
    monkeypatch.setattr(study, "prompts", lambda *_: prompts)
    monkeypatch.setattr(study, "FACTORS", (0.0, 2.0))
    monkeypatch.setattr(study, "LISTS", (9, 10))
    found = {f.claim: f for f in study.run(model=str(tmp_path))}
    assert set(found) == {c.id for c in study.CLAIMS if not c.waits}
    assert found["components"].details["pairs"] == 16
    assert found["lists"].state == "does not hold"
    assert len(found["lists"].details["curves"]) == 1 + study.RANDOM["smoke"]


def test_a_channel_that_is_built_is_found_by_its_component_and_not_by_the_whole(read):
    """One reader asks along the smallest direction that a writer writes: the whole matrix hardly notices."""
    parts, heads, matrices = read
    (writer, own), reader = matrices[heads[0]], heads[4]
    tuned = writer.ov._replace(left=writer.ov.left.clone())
    own = own._replace(sigma=torch.tensor([8.0, 4.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.5]))
    tuned = tuned._replace(left=(own.u.T * own.sigma), right=own.v)
    v = own.v[7]
    qk = matrices[reader][0].qk._replace(left=v[:, None].repeat(1, 8), right=matrices[reader][0].qk.right)
    built = {
        **matrices,
        heads[0]: (writer._replace(ov=tuned), own),
        reader: (matrices[reader][0]._replace(qk=qk), None),
    }
    best, whole, which = study.pair_scores(parts, heads, {**built, reader: (built[reader][0], matrices[reader][1])})
    assert which[0, 4] == 7
    assert best[0, 4] == pytest.approx(1, abs=1e-4)
    assert whole[0, 4] < 0.1
    assert np.isnan(best[4:]).all()  # nothing comes after the last layer
    assert np.isnan(best[:, :4]).all()


def test_scaling_a_component_scales_what_is_written_along_it(model, read, prompts):
    _, heads, matrices = read
    inputs = study.inputs_of(model, prompts[0])
    head, (own, components) = heads[5], matrices[heads[5]]
    out, v = own.ov.right, components.v[1]
    site = Site(head[0], "z", head=head[1], pos=-1)
    before = trace(model, inputs, site)[site] @ out
    for alpha in (-2.0, 0.0, 3.0):
        edits = study.scaled(model, head, out, v, alpha, inputs)
        after = trace(model, inputs, site, edits=edits)[site] @ out
        along = (before @ v)[:, None] * v
        torch.testing.assert_close(after, before + (alpha - 1) * along, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), intervene(model, study.scaled(model, head, out, v, 1.0, inputs)):
        torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits)


def test_correlation_counts_pairs_that_have_both():
    scores, effects = np.full((4, 4), np.nan), np.full((4, 4), np.nan)
    scores[0, 1:], effects[0, 1:] = (1, 2, 3), (-0.1, 0.2, -0.5)
    scores[1, 1] = 9
    assert study.correlation(scores, effects) == pytest.approx(1)


def test_a_score_must_do_better_than_the_whole_matrix():
    draw = np.random.default_rng(0)
    scores, other = draw.random((2, 8, 8))
    effects = -scores + 0.1 * draw.standard_normal((8, 8))
    found = study._components(scores, other, effects, 0)
    assert found.state == "holds"
    assert found.figure > 0.8 > found.baseline
    assert study._components(scores, scores, effects, 0).state == "does not hold"
    assert study._components(other, scores, effects, 0).state == "does not hold"
