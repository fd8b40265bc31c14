"""The second training of the decoder: positions, batches, and the command that runs it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks import decoder, stretch, testbeds
from regard.tasks.gates import _bits_saved
from regard.train.trainer import token_loss


@given(st.integers(1, 4), st.integers(4, 60), st.integers(0, 200), st.integers(1, 4), st.integers(0, 10**6))
def test_positions_start_at_0_ascend_and_stay_below_the_reach(rows, length, more, pieces, seed):
    got = stretch.skipped_positions(rows, length, length + more, torch.Generator().manual_seed(seed), pieces)
    assert got.shape == (rows, length)
    assert (got[:, 0] == 0).all()
    steps = got.diff()
    assert (steps >= 1).all()
    assert ((steps > 1).sum(1) <= pieces - 1).all()
    assert (got[:, -1] < length + more).all()


def test_positions_reach_every_distance():
    got = stretch.skipped_positions(4000, 16, 64, torch.Generator().manual_seed(0))
    last = got[:, -1]
    assert last.min() == 15
    assert last.max() == 63
    assert (torch.bincount(last - 15, minlength=49) / 4000 - 1 / 49).abs().max() < 0.015  # uniform
    assert torch.equal(stretch.skipped_positions(2, 16, 16, torch.Generator()), torch.arange(16).repeat(2, 1))


@pytest.mark.parametrize(
    ("how", "said"), [((8, 7), "reach must be at least length = 8"), ((3, 9), "pieces must be in")]
)
def test_positions_that_do_not_fit(how, said):
    with pytest.raises(ValueError, match=said):
        stretch.skipped_positions(1, *how, torch.Generator())


def test_a_batch_is_a_function_of_the_step_and_the_seed():
    mixture = stretch.StretchMixture(stretch.STRETCH, 3)
    lengths = set()
    for step in (0, 1, 2, 455, 460, 470, 700, 701, 702, 703):
        a, b = mixture(step), mixture(step)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.positions, b.positions)
        rows, length = a.input_ids.shape
        assert rows == max(1, 4096 // length)
        assert a.positions.shape == a.weights.shape == (rows, length)
        assert a.positions.max() < max(8192, length)
        assert (a.weights >= 0).all()
        assert a.weights[:, 1:].sum() > 0
        lengths.add(length)
    assert max(lengths) >= 4096
    assert not torch.equal(mixture(0).input_ids[:, :9], stretch.StretchMixture(stretch.STRETCH, 4)(0).input_ids[:, :9])


def test_jumps_begin_no_new_document():
    """A token's loss under positions that jump is that of a dense model told the same positions."""
    torch.manual_seed(0)
    model = decoder.build(decoder.SIZES["smoke"], seed=0).eval()
    ids = torch.randint(256, (2, 24))
    weights = torch.rand(2, 24)
    plain = torch.arange(24).repeat(2, 1)
    same = stretch.placed_loss(model, stretch.Placed(ids, weights, plain))
    torch.testing.assert_close(same, token_loss(model, decoder.Weighted(ids, weights)))
    jumped = plain + 100 * (plain >= 12)
    moved = stretch.placed_loss(model, stretch.Placed(ids, weights, jumped))
    assert abs(moved - same) > 1e-6
    only = torch.zeros_like(weights)
    only[:, 20] = 1
    before = ids.clone()
    before[:, 3] = (before[:, 3] + 1) % 256  # a token before the jump is still seen after it
    a, b = (stretch.placed_loss(model, stretch.Placed(x, only, jumped)) for x in (ids, before))
    assert abs(a - b) > 1e-7


def test_bits_saved_compares_the_same_bytes():
    """A model that looks at nothing but the last byte saves nothing; the windows' first bytes are scored alike."""

    class Bigram(torch.nn.Module):
        def forward(self, input_ids, use_cache=False):
            torch.manual_seed(0)
            return type("Out", (), {"logits": torch.randn(259, 259)[input_ids]})

    saved = _bits_saved(Bigram(), 2, torch.Generator().manual_seed(0))
    # only the first byte of each later piece has another byte (BOS) before it
    assert abs(saved) < 0.02


def test_the_second_training_goes_on_from_the_first(tmp_path):
    decoder.build(decoder.SIZES["smoke"], seed=0).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="start must name what size 'full' wrote"):
        testbeds.train("decoder", tmp_path / "x", size="long")
    with pytest.raises(ValueError, match="start goes with size 'long'"):
        testbeds.train("decoder", tmp_path / "x", size="smoke", start=tmp_path / "base")
    with pytest.raises(ValueError, match=r"size of 'maps' must be one of full, smoke, got 'long'"):
        testbeds.train("maps", tmp_path / "x", size="long")


def test_a_shorter_second_training(tmp_path, monkeypatch):
    from dataclasses import replace

    start = decoder.build(decoder.SIZES["smoke"], seed=0)
    start.save_pretrained(tmp_path / "base")
    short = replace(stretch.STRETCH, tokens=256, stages=(stretch.Stage(10**9, (256,), reach=1024),))
    monkeypatch.setattr(stretch, "STRETCH", short)
    monkeypatch.setattr(decoder, "Evaluation", lambda **_: None)
    monkeypatch.setattr("regard.tasks.gates.gates", lambda model, long: {"long": long})
    record = testbeds.train("decoder", tmp_path / "out", size="long", start=tmp_path / "base", steps=3)
    assert record["command"] == "regard train decoder --out out --size long --seed 0 --start base --steps 3"
    assert len(record["start"]["sha256"]) == 64
    assert record["start"]["training"] is None
    assert record["gates"]["long"]
    assert json.loads((tmp_path / "out" / "training.json").read_text())["size"]["tokens"] == 256
    trained = testbeds.load(tmp_path / "out").model
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    assert all(moved)
