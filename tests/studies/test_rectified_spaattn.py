from types import SimpleNamespace

import pytest
import torch

from regard.studies import protocol
from regard.studies import rectified_spaattn as study


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(study.DRAWS, "smoke", 1)
    monkeypatch.setattr(study, "NOISY", (16, 8, 32))


def test_claims_of_the_small_size():
    found = {f.claim: f for f in protocol.study("rectified-spaattn")}
    assert found["exact"].state == "holds"
    assert found["exact"].baseline > 0.5
    assert found["text"].figure < 1
    assert found["error"].figure < 1
    figures = found["error"].details["figures"]
    assert figures["scaled alone"][0] != figures["sparse"][0]
    assert found["error"].baseline < 1
    assert {found[c].state for c in ("video", "speed")} == {"not measured"}


def test_without_noise_every_figure_of_an_error_is_zero(monkeypatch):
    monkeypatch.setattr(study, "NOISE", 0.0)
    found = study.noisy(0)
    assert max(found[n] for n in ("gapr", "all", "all, exact mass", "mass off", "mass off, gapr")) < 1e-12
    assert found["sparse"] > 0.5
    assert found["mass off, 1"] == pytest.approx(1 - found["mass"])


def test_videos_under_each_arm(monkeypatch):
    """An untrained model, small videos: dense steps stay dense, and the arms differ."""
    from regard.models.dit import DiTConfig, VideoDiT
    from regard.tasks import testbeds, video

    torch.manual_seed(0)
    net = VideoDiT(DiTConfig(dim=16, layers=1, heads=2, pairs=(1, 1, 2), patch=(1, 4, 4))).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.3)
    loaded = testbeds.Loaded(net, None, "own")
    monkeypatch.setattr(testbeds, "load", lambda *_args, **_how: loaded)
    monkeypatch.setattr(video, "SHAPE", (4, 16, 16))
    for name, value in (("BLOCK", 8), ("VIDEOS", 2), ("SAMPLING", {"steps": 4, "guidance": 2.0, "shift": 3.0})):
        monkeypatch.setattr(study, name, value)
    found = study._video("own", "cpu", 0)
    assert set(found.details["psnr"]) == {"sparse", "gapr", "all"}
    assert all(len(v) == 2 and all(x < 100 for x in v) for v in found.details["psnr"].values())
    assert found.details["psnr"]["sparse"] != found.details["psnr"]["all"]


def test_what_the_seam_answers():
    route = study.video_route((2, 8, 8))
    q, k, v = torch.randn(3, 1, 2, 128, 8, generator=torch.Generator().manual_seed(0))
    call = SimpleNamespace(kind="self", forward=study.DENSE_STEPS, q=q, k=k, v=v, scale=0.3)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    off = {arm: float((study.answer(route, arm)(call) - dense).norm()) for arm in ("sparse", "gapr", "all", "none")}
    assert 0 < off["all"] < off["sparse"] == pytest.approx(off["none"])
    for other in ({"kind": "cross"}, {"forward": study.DENSE_STEPS - 1}):
        assert study.answer(route, "all")(SimpleNamespace(**(vars(call) | other))) is None
