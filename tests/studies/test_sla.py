import pytest
import torch

from regard.studies import protocol, sla


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(sla.DRAWS, "smoke", 1)
    monkeypatch.setattr(sla, "LENGTH", 640)


def test_claims_of_the_small_size():
    found = {f.claim: f for f in protocol.study("sla")}
    assert found["layer"].state == "holds"
    assert found["ranks"].figure > 1
    figures = {name: v[0] for name, v in found["ranks"].details["figures"].items()}
    assert figures["linear"] > figures["sparse"] > figures["sparse-linear"] > 0
    assert {found[c].state for c in ("tuned", "speed")} == {"not measured"}


def test_stable_rank():
    assert sla.stable_rank(torch.eye(5)) == pytest.approx(5)
    assert sla.stable_rank(torch.ones(4, 7)) == pytest.approx(1)


def tiny():
    from regard.models.dit import DiTConfig, VideoDiT

    torch.manual_seed(0)
    net = VideoDiT(DiTConfig(dim=16, layers=2, heads=2, pairs=(1, 1, 2), patch=(1, 4, 4))).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.3)
    return net


def test_each_arm_is_tuned_from_the_same_weights(monkeypatch):
    from regard.tasks import testbeds, video

    net = tiny()
    monkeypatch.setattr(testbeds, "load", lambda *_args, **_how: testbeds.Loaded(net, None, "own"))
    monkeypatch.setattr(video, "SHAPE", (4, 32, 32))
    for name, value in (("STEPS", 2), ("BATCH", 1), ("HELD_OUT", 2)):
        monkeypatch.setattr(sla, name, value)
    old = {n: p.clone() for n, p in net.named_parameters()}
    found = sla._tuned("own", "cpu", 0)
    assert found.details["before"]["sparse"] == found.details["before"]["sparse-linear"]  # the matrix starts at 0
    assert found.details["before"]["linear"] != found.details["before"]["sparse"]
    assert len(set(found.details["losses"].values())) == 3
    assert all(torch.equal(p, old[n]) for n, p in net.named_parameters())


def test_what_is_tuned():
    arms = {arm: sla.tuning(tiny(), arm) for arm in (*sla.ARMS, "dense")}
    counts = {arm: sum(p.requires_grad for p in whole.heads.parameters()) for arm, whole in arms.items()}
    assert counts == {"sparse-linear": 2, "sparse": 0, "linear": 2, "dense": 0}
    assert torch.equal(next(iter(arms["linear"].heads.values())).proj.weight, torch.eye(8))
