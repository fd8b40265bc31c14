"""Heads of a vision transformer, shrunk: rings and pruning against dense weights, controls that are controls."""

import numpy as np
import pytest
import torch

from regard.studies import protocol
from regard.studies import vit_visual_analytics as study
from regard.tasks import vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained ViT, without a record of gates."""
    out = tmp_path_factory.mktemp("vit")
    vit.build(vit.SIZES["smoke"], 0).save_pretrained(out)
    return str(out)


@pytest.fixture
def model(folder):
    from regard.tasks.testbeds import load

    return load(folder).model


@pytest.fixture
def small(monkeypatch):
    values = {
        "IMAGES": {"smoke": 12, "full": 20},
        "CHUNK": 5,
        "TOP": 1,
        "DRAWS": 2,
        "MAPPED": 6,
        "KINDS": 3,
        "STEPS": 3,
    }
    for name, value in values.items():
        monkeypatch.setattr(study, name, value)


def test_smoke(small, folder, tmp_path):
    record = protocol.run_and_record("vit-visual-analytics", seed=1, model=folder)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["rings"]["state"] == "holds"
    assert found["importance"]["state"] == found["clusters"]["state"] == "not measured"
    # An untrained model names one digit in ten, with or without a head.
    assert found["top-heads"]["state"] == "does not hold"
    assert abs(found["depth"]["figure"]) < 0.3


def test_full_judges_every_claim(small, folder):
    findings = {f.claim: f for f in study.run("full", seed=0, model=folder)}
    assert set(findings) == {c.id for c in study.CLAIMS}
    assert all(f.state != "not measured" for f in findings.values())
    assert findings["clusters"].interval[0] <= findings["clusters"].figure <= findings["clusters"].interval[1]


def test_divergence():
    logits = torch.tensor([[100.0, 0, 0], [0, 0, 100], [1, 2, 3]])
    found = study.divergence(logits)(torch.tensor([[0, 100.0, 0], [0, 0, 100], [11, 12, 13]]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1, 1]).log().double())


def test_pruning_views_against_the_weights(model):
    """What each view leaves of a head, from dense weights: the divergence of the last layer's heads by hand."""
    images, _ = study.drawn(3, "test", 0, "cpu")
    views = study.importance(model, images, study.VIEWS)
    from regard.watch.intervene import Edit, Site, intervene, trace

    given, at = study.inputs(images), Site(1, "z")
    parts = trace(model, given, [Site(1, "weights"), Site(1, "v"), at])
    weights, v, z = parts[Site(1, "weights")], parts[Site(1, "v")], parts[at]
    with torch.no_grad():
        moved = study.divergence(model(**given).logits)

    def set_to(value):
        with torch.no_grad(), intervene(model, Edit(at, "set", value=value)):
            return moved(model(**given).logits).numpy()

    for head in range(2):
        zero, alone, row, pairs = z.clone(), torch.zeros_like(z), z.clone(), z.clone()
        zero[:, head] = 0
        alone[:, head] = z[:, head]
        row[:, head, 0] = 0
        pairs[:, head, 1:] = weights[:, head, 1:, :1] * v[:, head, :1]
        by_hand = {"divergence": zero, "alone": alone, "class rows": row, "patch pairs": pairs}
        for view, value in by_hand.items():
            np.testing.assert_allclose(views[view][1, head], set_to(value), atol=1e-6, err_msg=view)


def test_draws_beyond_the_digits_are_moved_copies():
    images, index = study.drawn(400, "test", 0, "cpu")
    assert len(images.labels) == 400
    assert len(set(index.tolist())) == 360
    again = index.tolist().index(index[399].item())
    assert images.labels[again] == images.labels[399]
