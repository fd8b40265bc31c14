"""Pictures on the command line: watched, named and reported on a model of one channel; refused elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard import cli
from regard.report.picture import as_inputs, png, watch_picture
from regard.tasks.vision import digits, normalised

DIGIT = Path(cli.__file__).parent / "data" / "digit.png"


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture(scope="module")
def model():
    return regard.load("testbed:vit").model


def test_the_shipped_picture_is_the_digit_the_model_was_tested_on(model):
    inputs, shown = as_inputs(model, DIGIT)
    torch.testing.assert_close(shown, digits("test").x[3], atol=1 / 255, rtol=0)
    torch.testing.assert_close(inputs["pixel_values"], normalised(digits("test").x[3:4]), atol=0.01, rtol=0)
    assert model(**inputs).logits.argmax() == digits("test").labels[3]
    assert png(shown).startswith("data:image/png;base64,")


def test_watch_roles_and_report_take_a_picture(run, tmp_path):
    code, out, err = run("roles", "testbed:vit", "--image", DIGIT, "--json")
    assert code == 0, err
    named = json.loads(out)
    code, out, _ = run("watch", "testbed:vit", "--image", DIGIT, "--statistics", "full", "-o", tmp_path / "a", "--json")
    assert code == 0
    assert {"ring_mass", "distance"} <= set(json.loads(out)["variables"])
    _, out, _ = run("roles", "--atlas", tmp_path / "a", "--json")
    assert json.loads(out) == named
    code, out, _ = run("report", "testbed:vit", "--image", DIGIT, "-o", tmp_path / "r.html", "--json")
    assert code == 0
    assert "data:image/png;base64," in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_distances_on_a_picture_are_those_of_its_grid(model):
    """Rings are by the larger of the two offsets of patches; the token of class is in none."""
    atlas = watch_picture(model, DIGIT)
    assert atlas.sizes["ring"] == 8
    place = np.stack(np.divmod(np.arange(64), 8), -1)
    counts = np.bincount(np.abs(place[:, None] - place[None]).max(-1).ravel(), minlength=8)
    np.testing.assert_allclose(atlas["ring_patches"].values[0], counts)


REFUSED = [
    (["roles", "testbed:decoder", "--image", DIGIT], 1, "LlamaForCausalLM names no image size, so it takes no"),
    (["roles", "testbed:vit", "--text", __file__], 2, "no tokenizer, so it takes no text; for pictures"),
    (["roles", "testbed:vit", "--image", DIGIT, "--text", __file__], 2, "give exactly one"),
    (["roles", "testbed:vit", "--image", DIGIT, "--tokens", "9"], 2, "a picture has no tokens to cut"),
    (["watch", "testbed:vit", "--image", DIGIT, "--resume", "-o", "x"], 2, "only a corpus run can be resumed"),
    (["watch", "testbed:vit", "-o", "x"], 2, "give one of them"),
    (["scan", "testbed:vit"], 2, "no tokenizer, so it takes no prompts"),
]


@pytest.mark.parametrize(
    ("arguments", "wanted", "says"), REFUSED, ids=[f"{a[0]} {n}" for n, (a, *_) in enumerate(REFUSED)]
)
def test_what_does_not_fit_says_why(run, arguments, wanted, says):
    code, out, err = run(*arguments)
    assert code == wanted
    assert out == ""
    assert says in " ".join(err.replace("│", " ").split())


def test_other_channels_are_refused_by_name(model):
    class Infrared(torch.nn.Module):
        config = type("Config", (), {"num_channels": 5, "image_size": 8})()

    with pytest.raises(ValueError, match="image: the model takes 5 channels; a picture has 3, or 1 in grey"):
        as_inputs(Infrared(), Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match=r"processor must give a tensor \[1, height, width\], got \[3, 8, 8\]"):
        as_inputs(model, Image.new("RGB", (8, 8)), lambda image: torch.zeros(3, 8, 8))
