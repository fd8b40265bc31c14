import pytest
import torch

from regard.models.dit import DiTConfig, VideoDiT
from regard.studies import paro as study
from regard.studies import protocol
from regard.tasks import testbeds, video
from regard.tasks.moving_digits import WORDS


def test_instruments_hold_and_orders_matter(monkeypatch):
    monkeypatch.setitem(study.DRAWS, "smoke", 1)
    found = {f.claim: f for f in protocol.study("paro")}
    assert found["map"].state == found["dropped"].state == "holds"
    assert found["dense blocks"].figure <= 0.5
    assert found["random order"].figure > 1
    assert found["chosen"].figure <= 1.25
    assert all(found[c].state == "not measured" for c in ("video", "masks", "speed"))
    weights = found["bits"].details["errors"]
    assert all(a < b for a, b in zip(weights["8"][0][0], weights["4"][0][0], strict=True))


def test_heads_without_structure_gain_nothing_by_an_order():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, len(study.WIDTHS), 512, study.HEAD_DIM, generator=g)
    dense, random, _ = study._needed([(q, k)], 0)
    assert dense.state == random.state == "does not hold"
    assert dense.figure > 0.9


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


def test_the_full_size_reorders_a_video_model(monkeypatch, tiny_video):
    for name, value in {"VIDEOS": 2, "STEPS": 4, "GROUPS": 2, "EVERY": 2, "VIDEO_BLOCK": 8}.items():
        monkeypatch.setattr(study, name, value)
    found = {f.claim: f for f in study._video("untrained", "cpu", 0)}
    assert set(found) == {"video", "masks"}
    assert all(f.state != "not measured" for f in found.values())
    psnr = found["video"].details["psnr"]
    assert found["video"].figure == pytest.approx(sum(psnr["order"]) / 2 - sum(psnr["memory"]) / 2)


def test_other_models_are_refused(monkeypatch):
    monkeypatch.setattr(testbeds, "load", lambda name, **_: testbeds.Loaded(torch.nn.Linear(2, 2), None, name))
    with pytest.raises(ValueError, match=r"model must be a VideoDiT, .* got Linear"):
        study._video("other", "cpu", 0)
