import pytest
import torch

from regard.patterns import Radial
from regard.studies import protocol
from regard.studies import radial_attention as study


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(study.SHAPE, "smoke", (8, 32))
    monkeypatch.setitem(study.BLOCK, "smoke", 4)


def test_instruments_hold_and_a_head_that_looks_everywhere_gains_nothing(monkeypatch):
    monkeypatch.setattr(study, "_complexity", lambda: protocol.Finding("complexity", "holds", 0.5))
    found = {f.claim: f for f in protocol.study("radial-attention")}
    assert found["recall"].state == found["decay"].state == "holds"
    assert found["global"].figure == pytest.approx(1, abs=0.05)
    assert found["error"].ceiling < found["error"].figure < found["error"].baseline < found["error"].floor
    assert found["video"].state == found["speed"].state == "not measured"


def test_planted_scores_are_what_they_should_be():
    q, k = study.planted(3, 5, 0.4, 0.1, 2, 0, "cpu")
    place = torch.arange(15)
    frame = (place[:, None] // 5 - place[None] // 5).abs()
    space = (place[:, None] % 5 - place[None] % 5).abs()
    clean = q[..., : -study.NOISE_DIM] @ k[..., : -study.NOISE_DIM].mT
    assert torch.allclose(clean[0, 0], -0.4 * frame - 0.1 * space, atol=1e-5)


def test_windows_meet_the_density_they_are_asked_for():
    n = 8 * 32
    for pairs in (n * 5, n * 60, n * n):
        for parts in study.windows(8, 32, pairs).values():
            assert sum(x.density(n, n) * share for x, share in parts) == pytest.approx(pairs / n**2)
            assert sum(share for _, share in parts) == pytest.approx(1) or pairs < 8 * n


def test_blocks_of_the_released_rule():
    """Where no rounding can happen they are the rule; blocks of one token keep every pair."""
    rule = Radial(4, 8, sink=False, rule="release", decay=0.95, block=1)
    place = torch.arange(32)
    assert torch.equal(study.released_blocks(4, 8, 1, 0.95), rule.allows(place[:, None], place[None]))
    assert study.released_blocks(3, 8, 8, 0.95).all()
    assert study.released_blocks(3, 6, 4, 0.95).shape == (4, 4)  # 18 tokens, the last two in no block
