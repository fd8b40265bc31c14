"""The vision testbed: digits that are held out, a solver, gates that a model without attention does not pass."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from regard.tasks import testbeds, vit
from regard.tasks.testbeds import TESTBEDS, load, train
from regard.tasks.vision import Digits, Images, digits, jitter, nearest_digit, normalised


@pytest.fixture(scope="module")
def shipped():
    return load("testbed:vit")


def test_no_test_digit_is_among_the_training_ones():
    seen = {x.numpy().tobytes() for x in digits("train").x}
    assert not any(x.numpy().tobytes() in seen for x in digits("test").x)
    drawn = Digits("train").batch(200, torch.Generator().manual_seed(0)).x
    assert all(x.numpy().tobytes() in seen for x in drawn)


def test_the_solver_names_digits_from_their_pixels():
    test, train_ = digits("test"), digits("train")
    assert torch.equal(nearest_digit(train_.x[:50]), train_.labels[:50])
    assert (nearest_digit(test.x) == test.labels).double().mean() > 0.97
    alone = Images(train_.x[:1], train_.labels[:1])
    assert (nearest_digit(test.x, alone) == train_.labels[0]).all()


def test_jitter_moves_each_image_by_itself_and_loses_nothing_but_the_border():
    images = Images(torch.arange(64.0).view(1, 1, 8, 8).repeat(60, 1, 1, 1) + 1, torch.zeros(60, dtype=torch.long))
    moved = jitter(images, torch.Generator().manual_seed(0))
    padded = np.pad(images.x[0, 0].numpy(), 1)
    ways = {padded[r : r + 8, c : c + 8].tobytes() for r in range(3) for c in range(3)}
    found = {x[0].numpy().tobytes() for x in moved.x}
    assert found == ways
    assert torch.equal(moved.x, jitter(images, torch.Generator().manual_seed(0)).x)
    assert torch.equal(jitter(images, torch.Generator(), most=0).x, images.x)


def test_batches_follow_from_the_step():
    draw = vit.batches(vit.SIZES["smoke"], seed=2)
    assert torch.equal(draw(5).x, draw(5).x)
    assert not torch.equal(draw(5).x, draw(6).x)
    assert draw(0).x.shape == (16, 1, 8, 8)


def test_the_shipped_model_is_small_and_passes_its_gates_again(shipped):
    folder = TESTBEDS["vit"]
    record = json.loads((folder / "training.json").read_text())
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert (folder / "model.safetensors").stat().st_size < 1e6
    assert shipped.tokenizer is None
    again = vit.gates(shipped.model)
    assert again["ready"]
    assert record["gates"]["values"]["accuracy"] == pytest.approx(again["values"]["accuracy"], abs=0.01)
    assert record["seconds"] < 180
    assert sum(p.numel() for p in shipped.model.parameters()) == record["parameters"]


def test_uniform_attention_is_a_mean_and_leaves_the_model_as_it_was(shipped):
    x = normalised(digits("test").x[:3])
    seen = []
    layer = shipped.model.vit.layers[0].attention
    hook = layer.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    values = layer.v_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        plain = shipped.model(pixel_values=x).logits
        seen.clear()
        with vit.uniform_attention(shipped.model):
            shipped.model(pixel_values=x)
        hook.remove(), values.remove()
        v, mixed = seen
        torch.testing.assert_close(mixed, v.mean(1, keepdim=True).expand_as(mixed), rtol=1e-4, atol=1e-5)
        assert torch.equal(shipped.model(pixel_values=x).logits, plain)


def test_the_command_makes_a_folder_that_loads_and_says_that_it_is_not_ready(tmp_path):
    record = train("vit", tmp_path / "vit", size="smoke", seed=1, steps=6, console=Console(quiet=True))
    assert not record["gates"]["ready"]
    assert record["command"].endswith("--steps 6")
    loaded = load(tmp_path / "vit")
    assert loaded.model.config.num_channels == 1
    train("vit", tmp_path / "again", size="smoke", seed=1, steps=6, console=Console(quiet=True))
    one, again = loaded.model.state_dict(), load(tmp_path / "again").model.state_dict()
    assert all(torch.equal(one[k], again[k]) for k in one)


def test_a_shorter_recipe_keeps_its_rise_and_shortens_its_fall():
    full = vit.SIZES["full"].recipe
    short = vit.shortened(full, 40)
    assert (short.steps, short.warmup, short.decay) == (40, 16, 24)
    assert vit.shortened(full, full.steps) == full
    assert "vit" in testbeds._MADE
