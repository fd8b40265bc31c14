"""Answer attentiveness, shrunk: prompts that differ where they should, claims that can fail."""

import numpy as np
import pytest
import torch

from regard.studies import answer_attentiveness as study
from regard.tasks.maps import ContextMaps
from regard.tasks.testbeds import load


def test_prompts_of_one_item_differ_in_examples_and_options_alone():
    batch = study.items(20, 0)
    task = ContextMaps()
    for shots in study.SHOTS:
        plain, listed = study.prompt(batch, shots, False), study.prompt(batch, shots, True)
        assert plain.shape[1] == 3 + 4 * shots
        assert torch.equal(plain[:, 1:], listed[:, 7:])
        assert torch.equal(listed[:, :7], batch.input_ids[:, :7])
        for ids, answer in zip(listed, batch.input_ids[:, -1], strict=True):
            assert int(answer) in task.solve(ids)
    assert (study.choices(batch) == batch.input_ids[:, -1:]).sum(1).eq(1).all()


def test_a_shrunk_study_of_the_shipped_model(monkeypatch):
    monkeypatch.setitem(study.ITEMS, "smoke", 48)
    found = {f.claim: f for f in study.run()}
    assert found["mass"].state == found["example"].state == "holds"
    assert 0 < found["example"].interval[0] < found["example"].figure < 1
    assert found["pmi"].state == "not measured"
    table = found["example"].details["conditions"]
    assert table["8 examples, no options"]["hit"] > 0.95
    assert table["0 examples, no options"]["open"] < 0.4


def test_an_untrained_model_shows_nothing():
    from regard.tasks.symbolic import SYMBOLIC

    network = SYMBOLIC["maps"].build(0).eval()
    found = study.conditions(network, study.items(64, 0))
    assert abs(found[0, False]["hit"].mean() - 0.25) < 0.2
    assert found[1, True]["pma"].mean() < 0.3


def test_stages_are_tenths_of_a_training(monkeypatch):
    from dataclasses import replace

    from regard.tasks.symbolic import SYMBOLIC

    bed = SYMBOLIC["maps"]
    short = replace(bed, rows=2, recipe=replace(bed.recipe, steps=10, warmup=1, decay=1))
    monkeypatch.setitem(SYMBOLIC, "maps", short)
    found = study.stages(study.items(8, 0), 0, "cpu")
    assert len(found) == study.STAGES
    assert not np.array_equal(found[0][1, True]["pma"], found[-1][1, True]["pma"])


def test_falls_of_accuracy_are_found_among_conditions_and_no_others():
    rng = np.random.default_rng(0)

    def each(pma, hit):
        return {"pma": np.full(400, pma), "hit": (rng.random(400) < hit).astype(float), "pmi": np.ones(400)}

    rising = [
        {(0, False): each(0.2, 0.3), (1, True): each(0.5, 0.6)},
        {(0, False): each(0.7, 0.9), (1, True): each(0.9, 1)},
    ]
    finding = study._not_accuracy(rising, 0)
    assert finding.state == "does not hold"
    assert finding.details["spearman"][0] == pytest.approx(1)
    falling = [*rising, {(0, False): each(0.95, 0.1), (1, True): each(0.9, 1)}]
    finding = study._not_accuracy(falling, 0)
    assert finding.state == "holds"
    assert finding.figure == pytest.approx(0.8, abs=0.1)
    assert study._pmi(rising, 0).state == "does not hold"


def test_conditions_are_those_of_the_model():
    model, batch = load("testbed:maps").model, study.items(16, 1)
    found = study.conditions(model, batch)
    assert set(found) == {(k, o) for k in study.SHOTS for o in (False, True)}
    p = model(input_ids=study.prompt(batch, 2, True)).logits[:, -1].double().softmax(-1)
    np.testing.assert_allclose(found[2, True]["pma"], p.gather(1, study.choices(batch)).sum(1).detach(), atol=1e-9)
