"""Function vectors, shrunk: edits that act, controls that are controls, a gate that can close."""

import numpy as np
import pytest
import torch

from regard.studies import function_vectors as study
from regard.tasks.maps import ContextMaps
from regard.tasks.symbolic import SYMBOLIC
from regard.tasks.testbeds import load


@pytest.fixture(scope="module")
def model():
    return load("testbed:maps").model


def test_prompts_hold_the_symbols_they_should():
    task = ContextMaps(0, template=1, options=False)
    ids = study.every(task, torch.tensor([4, 9]), 3)
    for row, x in zip(ids, (4, 9), strict=True):
        assert row.tolist()[1] == task.vocabulary["s0"] + x
        assert int(row[-1]) - task.vocabulary["s0"] == task.table[3, x]
    some = torch.arange(8, 20)
    few = study.prompts(ContextMaps(5, 0, False), some, 2, 30, torch.Generator().manual_seed(0))
    x = few[:, 1::4] - task.vocabulary["s0"]
    assert x.shape == (30, 6)
    assert torch.isin(x, some).all()
    assert torch.equal(few[:, 3::4] - task.vocabulary["s0"], task.table[2][x])
    with pytest.raises(ValueError, match="at least 6 symbols, got 3"):
        study.prompts(ContextMaps(5, 0, False), some[:3], 2, 4, torch.Generator())


def test_a_shrunk_study_of_the_shipped_model(monkeypatch, model):
    monkeypatch.setattr(study, "DRAWS", 1)
    monkeypatch.setattr(study, "ALPHAS", (1.0,))
    monkeypatch.setattr(study, "PARTS", 2)  # the vector then sees the judged symbols too
    monkeypatch.setattr(ContextMaps, "maps", 3)
    found = study.judge(model, (0, 0), 0)
    assert found["lens"].shape[1] == model.config.num_hidden_layers - 1
    assert found["steered"].mean() > found["plain"].mean() + 0.3
    assert found["random"].mean() < found["steered"].mean() - 0.3
    gap = study._gap([found], 0)
    assert gap.state == "holds"
    assert gap.interval[0] < gap.figure < gap.interval[1]
    assert study._lens(model, 0).state == "holds"


def test_a_vector_of_zero_changes_nothing_and_a_read_state_is_the_models(model):
    ids = study.every(ContextMaps(0, 0, False), torch.arange(16), 1)
    nothing = study.steer(model, ids, 1, torch.zeros(model.config.hidden_size))
    top = model(input_ids=ids[:, :-1]).logits[:, -1].argmax(-1)
    assert (nothing == (top == ids[:, -1]).double().numpy()).all()
    last = model.config.num_hidden_layers - 1
    assert (study.lens(model, ids, [last])[0] == nothing).all()


def test_a_probe_finds_what_is_there_and_nothing_else():
    x = torch.eye(12)
    values = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert study.probe(x, x, values, 0) == 1.0
    assert study.probe(x, x.roll(1, 0), values, 0) < 0.5


def test_cells_count_tasks_and_templates_of_every_model(model, monkeypatch):
    monkeypatch.setattr(study, "PROBE_STEPS", 3)
    asked = []

    def judged(network, templates, seed):
        asked.append(templates)
        lens = np.zeros((2, 3, 4))
        lens[0, 1] = 1  # the first task is read, the second one steered
        return {"lens": lens, "steered": np.array([[0.0] * 4, [1.0] * 4])}

    monkeypatch.setattr(study, "judge", judged)
    finding = study._cells([model, model], 0, model)
    assert asked[:4] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (finding.figure, finding.state) == (0.5, "does not hold")
    assert finding.details["cells"] == {"neither": 0, "decoded only": 8, "steered only": 8, "both": 0}
    assert set(finding.details["readings"]) == {"tuned", "probe", "control"}
    assert study._cells([], 0, model).state == "not measured"


def test_the_best_layer_is_that_of_each_task():
    hits = np.zeros((2, 3, 4))
    hits[0, 1], hits[1, 2, :2] = 1, 1
    assert study._best(hits).mean(1).tolist() == [1.0, 0.5]


def test_below_the_gate_nothing_is_measured(tmp_path):
    SYMBOLIC["maps"].build(0).save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text(
        '{"gates": {"values": {"five_shot": 0.2, "zero_shot": 0.2}, "thresholds": {"five_shot": 0.95},'
        ' "ceilings": {"zero_shot": 0.3}}}'
    )
    findings = study.run(model=str(tmp_path))
    assert [f.state for f in findings] == ["not measured"] * len(study.CLAIMS)
    assert "five_shot 0.2 < 0.95" in findings[0].reason
