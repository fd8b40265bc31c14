import pytest

from regard.studies import protocol, vsa


def test_instruments_hold_and_their_controls_are_far_off():
    found = {f.claim: f for f in protocol.study("vsa")}
    assert {found[c].state for c in ("start", "moved", "learns")} == {"holds"}
    assert found["start"].floor > 0.1
    assert found["moved"].floor > 0.1
    assert {found[c].state for c in ("pointer", "imagenet", "resolution")} == {"not measured"}


def test_pointer_trains_every_arm(monkeypatch):
    for name, value in (("STEPS", 2), ("SEEDS", 1), ("TEST", 8), ("SIDE", 8), ("BATCH", 2)):
        monkeypatch.setattr(vsa, name, value)
    found = vsa._pointer([0], "cpu")
    assert found.state == "not measured"  # two steps teach nobody
    assert "premise not met" in found.reason
    assert {arm: len(s) for arm, s in found.details["scores"].items()} == dict.fromkeys(vsa.ARMS, 1)


@pytest.mark.parametrize(
    ("varied", "dense", "state"),
    [(0.9, 0.95, "holds"), (0.55, 0.95, "does not hold"), (0.8, 0.95, "does not hold"), (0.5, 0.5, "not measured")],
)
def test_what_pointer_says(monkeypatch, varied, dense, state):
    from regard.tasks import vision
    from regard.train import simple

    monkeypatch.setattr(simple, "fit", lambda *_args: None)
    monkeypatch.setattr(vsa, "_model", lambda arm, *_args: Arm(arm))
    monkeypatch.setattr(
        vision, "asked_accuracy", lambda net, _: {"varied": varied, "frozen": 0.38, "dense": dense}[net]
    )
    assert vsa._pointer([0, 1], "cpu").state == state


class Arm(str):
    def to(self, _):
        return str(self)


def test_frozen_windows_are_the_fixed_ones():
    from regard.tasks.pointer import WindowPointer

    frozen = vsa._model("frozen", WindowPointer(), 0)
    free = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert len(free) == 4 * vsa.LAYERS
    assert all(p.requires_grad for p in vsa._model("varied", WindowPointer(), 0).parameters())
