import pytest
import torch

from regard.studies import biformer, protocol


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(biformer.DRAWS, "smoke", 1)


def test_the_layer_is_the_formula_and_the_controls_are_controls():
    found = {f.claim: f for f in protocol.study("biformer")}
    assert found["layer"].state == "holds"
    assert {found[c].state for c in ("marks", "imagenet", "swin")} == {"not measured"}
    kept = found["routing"].details["kept"]
    assert set(kept) == {"8", "1"}
    assert abs(kept["8"]["random"][0] - 8 / 64) < 0.06
    for arms in kept.values():
        assert all(0 <= v[0] <= 1 for v in arms.values())
        assert arms["best"][0] > arms["random"][0] + 0.1


def test_scenes_are_what_they_say():
    x, marked = biformer.scene(torch.Generator().manual_seed(3))
    assert x.shape == (1, 1, 1024, 32)
    assert int(marked.sum()) == 8 * 36
    flat = x[0, 0] / biformer.AMP**0.5
    near = torch.cdist(flat[marked], flat[marked]) < 8  # noise alone is about 4 apart, identities about 9
    assert 60 <= float(near.double().sum(1).mean()) <= 90  # about the 72 tokens of an identity
    assert float(flat[~marked].std()) == pytest.approx((0.2**2 + 0.5**2) ** 0.5, rel=0.03)
    same, _ = biformer.scene(torch.Generator().manual_seed(3))
    assert torch.equal(x, same)


def test_nearest_regions_hold_their_own_and_its_neighbours():
    x, _ = biformer.scene(torch.Generator().manual_seed(0))
    from regard.patterns import TileOrder
    from regard.patterns.block_topk import BlockTopK
    from regard.patterns.select import topk

    routed = BlockTopK(16, order=TileOrder((32, 32), 4), select=topk(8), heads="all")(x, x, q_start=0)
    near = biformer._nearest(routed)
    assert (near.count == 8).all()
    middle = near.index[0, 0, 3 * 8 + 3].tolist()
    assert {27, 26, 28, 19, 35} <= set(middle)


def test_marks_trains_every_arm(monkeypatch):
    for name, value in (("STEPS", 1), ("TEST", 8), ("MARKS", 16), ("BATCH", 2)):
        monkeypatch.setattr(biformer, name, value)
    found = biformer._marks([0], "cpu")
    assert found.state == "not measured"
    assert "premise not met" in found.reason
    assert len(set(found.details["parameters"].values())) == 1


@pytest.mark.parametrize(
    ("routed", "window", "dense", "state"),
    [(0.97, 0.5, 0.99, "holds"), (0.9, 0.5, 0.99, "does not hold"), (0.97, 0.8, 0.99, "does not hold"),
     (0.6, 0.5, 0.6, "not measured")],
)  # fmt: skip
def test_what_marks_says(monkeypatch, routed, window, dense, state):
    from regard.tasks import vision
    from regard.train import simple

    found = iter([routed, window, dense] * 2)
    monkeypatch.setattr(simple, "fit", lambda *_args: None)
    monkeypatch.setattr(vision, "asked_accuracy", lambda *_args: next(found))
    assert biformer._marks([0, 1], "cpu").state == state
