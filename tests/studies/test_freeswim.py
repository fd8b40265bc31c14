"""FreeSwim, shrunk: wrong windows and overrides are seen; sampling beyond the trained size runs."""

import pytest
import torch

from regard.models.dit import DiTConfig, VideoDiT
from regard.studies import freeswim, protocol
from regard.tasks import testbeds


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    model = VideoDiT(DiTConfig(words=16, dim=24, layers=2, heads=2, pairs=(2, 2, 2), mlp_ratio=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    monkeypatch.setattr(testbeds, "load", lambda *_, **__: testbeds.Loaded(model, None, "small"))
    monkeypatch.setattr(freeswim, "GRIDS", {"smoke": 5, "full": 5})
    monkeypatch.setattr(freeswim, "SHAPE", (2, 16, 16))
    monkeypatch.setattr(freeswim, "NATIVE", (2, 8, 8))
    monkeypatch.setattr(freeswim, "HALF", 2)
    monkeypatch.setattr(freeswim, "VIDEOS", 2)
    monkeypatch.setattr(freeswim, "STEPS", 4)
    return model


def test_smoke(small):
    found = {f["claim"]: f for f in protocol.run_and_record("freeswim")["findings"]}
    for claim in ("window", "border", "override"):
        assert found[claim]["state"] == "holds", found[claim]
    assert {c for c, f in found.items() if f["state"] == "not measured"} == {"repetition", "detail", "caching", "wan"}


def test_full_runs_every_arm(small):
    found = {f.claim: f for f in freeswim.run("full")}
    assert set(found) == {c.id for c in freeswim.CLAIMS if not c.waits}
    assert {"native", "full", "window", "override", "cached"} == set(found["repetition"].details["objects"])
    assert found["detail"].figure > 0
    assert found["caching"].figure > 0


def test_a_wrong_window_is_seen(small, monkeypatch):
    right = freeswim.inward
    monkeypatch.setattr(freeswim, "inward", lambda shape, half: right(shape, (half[0] + 1, half[1])))
    assert freeswim._window(20, 0).state == "does not hold"


def test_lending_is_what_changes_the_windows(small):
    noise, init = torch.randn(2, 1, 1, 2, 16, 16)
    words = torch.tensor([[3, 0, 0]])
    alone = freeswim.swim(small, noise, words, init, lend=False)
    lent = freeswim.swim(small, noise, words, init, lend=True)
    cached = freeswim.swim(small, noise, words, init, lend=True, every=2)
    assert (alone - lent).abs().max() > 1e-5
    assert (cached - lent).abs().max() > 1e-5
    assert torch.isfinite(cached).all()


def test_a_window_as_large_as_the_grid_is_full_attention(small):
    x, t, words = torch.randn(1, 1, 2, 8, 8), torch.tensor([0.5]), torch.tensor([[3, 0, 0]])
    with torch.no_grad():
        plain = small(x, t, words)
        with freeswim.Windowed(small, 1, (4, 4), scaled=False):
            torch.testing.assert_close(small(x, t, words), plain, atol=1e-5, rtol=1e-4)
        with freeswim.Windowed(small, 1, (1, 1), scaled=False):
            assert (small(x, t, words) - plain).abs().max() > 1e-4


def test_other_models_are_refused(monkeypatch):
    monkeypatch.setattr(testbeds, "load", lambda *_, **__: testbeds.Loaded(torch.nn.Linear(1, 1), None, "other"))
    with pytest.raises(ValueError, match=r"model must be a VideoDiT such as testbed:video, got a Linear"):
        freeswim.run()
