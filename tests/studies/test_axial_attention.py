import pytest
import torch

from regard.studies import axial_attention as study
from regard.studies import protocol


def test_smoke_holds():
    found = {f.claim: f for f in protocol.study("axial-attention")}
    assert all(found[c].state == "holds" for c in ("raster", "steps", "parallel"))
    calls = found["parallel"].details["calls"]
    assert calls == {"upper": 7, "inner": 64}
    assert all(found[c].state == "not measured" for c in ("bits", "context", "imagenet"))


def test_a_leak_would_be_seen(monkeypatch):
    """Without the move down, the upper stack hands each pixel its own row."""
    from regard.models import axial

    monkeypatch.setattr(axial, "pad", lambda x, _: torch.cat([x, x[:, :1]], 1))
    finding = study._raster()
    assert finding.state == "does not hold"
    assert finding.figure > 0


def test_the_dense_rival_is_causal_in_raster_order_and_as_large():
    net = study.dense_decoder(3, 2, 0).double()
    x = torch.zeros(1, 1, 3, 3, dtype=torch.long)
    base = net(x)
    for k in range(9):
        moved = x.clone()
        moved.view(-1)[k] = 1
        changed = (net(moved) != base).any(-1).flatten()
        assert changed.tolist() == [i > k for i in range(9)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (study.dense_decoder(8, 4, 0), study._decoder(8))]
    assert sizes[0] == sizes[1]


def test_the_full_size_scores_in_bits(monkeypatch):
    monkeypatch.setattr(study, "STEPS", 5)
    bits, context = study._bits([0], "cpu")
    assert bits.details["bits"].keys() == {"axial", "dense", "row only"}
    assert all(1 < b[0] < 3.5 for b in bits.details["bits"].values())
    assert bits.details["independent"] < 3
    assert bits.figure == pytest.approx(bits.details["bits"]["axial"][0] - bits.details["bits"]["dense"][0])
    assert context.claim == "context"
