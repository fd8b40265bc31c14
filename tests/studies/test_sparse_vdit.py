import numpy as np
import pytest
import torch

from regard.models.dit import DiTConfig, VideoDiT
from regard.studies import protocol
from regard.studies import sparse_vdit as study
from regard.tasks import testbeds, video
from regard.tasks.moving_digits import WORDS


def test_planted_heads_are_found_and_the_rest_waits(monkeypatch):
    monkeypatch.setitem(study.DRAWS, "smoke", 1)
    found = {f.claim: f for f in protocol.study("sparse-vdit")}
    assert found["shapes"].figure == 0
    assert found["named"].figure >= 11
    assert found["error"].figure < 0.5
    assert all(found[c].state == "not measured" for c in ("agree", "shuffled", "skipped", "models"))


def test_heads_planted_elsewhere_are_not_named_so(monkeypatch):
    """The control: the same search on heads whose shapes were shuffled names few of them as before."""
    monkeypatch.setattr(study, "PLANTED", study.PLANTED[::-1])
    heads = study.planted(0, "cpu")
    named, _ = study._planted([heads])
    assert named.figure < 11  # what grid_qk planted in heads 0 to 5 stands where the list has other shapes
    assert named.state == "does not hold"


def test_a_head_that_says_nothing_loses_nothing():
    from regard.patterns import Full, Window

    heads = study.planted(0, "cpu")
    errors = study._errors(heads, {"full": Full(), "near": Window(3, 3), "skip": ~Full()})
    assert (errors[-1] == 0).all()
    assert np.allclose(errors[:-1, 2], 1, atol=1e-6)
    assert (errors[:, 0] < 1e-10).all()


@pytest.fixture
def tiny_video(monkeypatch):
    """An untrained video model on a small grid in place of the testbed."""
    torch.manual_seed(0)
    model = VideoDiT(DiTConfig(words=len(WORDS), dim=32, layers=2, heads=2, pairs=(2, 3, 3))).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    monkeypatch.setattr(testbeds, "load", lambda name, **_: testbeds.Loaded(model, None, "untrained"))
    monkeypatch.setattr(video, "SHAPE", (4, 8, 8))
    return model


def test_the_full_size_plans_a_video_model(monkeypatch, tiny_video):
    for name, value in {"PROMPTS": 1, "VIDEOS": 2, "STEPS": 3, "EVERY": 2, "EPS": 100.0, "BLOCK": 8}.items():
        monkeypatch.setattr(study, name, value)
    found = {f.claim: f for f in study._video("untrained", "cpu", 0)}
    assert set(found) == {"agree", "shuffled", "skipped"}
    assert all(f.state != "not measured" for f in found.values())
    assert 0 <= found["agree"].figure <= 1
    assert found["shuffled"].details["plan"]["operations"] >= study.RATIO - 1e-6
    assert len(found["shuffled"].details["plan"]["psnr"]) == 2


def test_other_models_are_refused(monkeypatch):
    monkeypatch.setattr(testbeds, "load", lambda name, **_: testbeds.Loaded(torch.nn.Linear(2, 2), None, name))
    with pytest.raises(ValueError, match=r"model must be a VideoDiT, .* got Linear"):
        study._video("other", "cpu", 0)
