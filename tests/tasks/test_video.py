"""The video testbed: its batches, its training, what is read of its heads, PSNR from the same noise."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from regard.models.dit import DiTConfig, VideoDiT
from regard.patterns import Window
from regard.tasks import video
from regard.tasks.fidelity import beside_dense, noise_for, psnr
from regard.tasks.moving_digits import NULL, MovingDigits
from regard.tasks.testbeds import TESTBEDS, load, train
from regard.tasks.video_gates import GATES, asked, head_roles
from regard.tasks.video_inputs import inputs_of, watch_video
from regard.watch.attend_with import attend_with


@pytest.fixture(scope="module")
def shipped():
    return load("testbed:video")


def test_batches_follow_from_the_step_and_each_phase_has_its_shapes():
    size = video.SIZES["full"]
    draw = video.VideoMixture(size, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(draw(5), draw(5), strict=True))
    assert not torch.equal(draw(5).x, draw(6).x)
    assert draw(0).x.shape == (24, 1, 8, 16, 16)
    assert draw(0).x.max(2).values.min() > -1  # the canvas has a texture
    assert {draw(step).x.shape[3] for step in range(1400, 1410)} == {16, 24, 32}
    long = video.VideoMixture(video.SIZES["long"], seed=0)(0)
    assert long.x.shape == (2, 1, *video.SHAPE)


def test_noise_times_and_prompts_left_out():
    size = video.SIZES["long"]
    videos = MovingDigits((1, 8, 8), most=1).batch(4000, torch.Generator().manual_seed(0))
    batch = video.noised(videos, size, torch.Generator().manual_seed(1))
    dropped = (batch.words == NULL).all(1)
    assert abs(dropped.double().mean() - size.drop) < 0.02
    assert torch.equal(batch.words[~dropped], videos.words[~dropped])
    assert batch.t.min() > 0
    assert batch.t.max() < 1
    assert abs(batch.t.median() - 3 / 4) < 0.02  # one half, shifted by 3


def test_a_smoke_training_is_written_and_loads(tmp_path):
    record = train("video", tmp_path / "video", size="smoke", seed=3, console=Console(quiet=True))
    assert {p.name for p in (tmp_path / "video").iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert record["command"] == "regard train video --out video --size smoke --seed 3"
    assert not record["gates"]["ready"]
    loaded = load(tmp_path / "video", dtype="float64")
    assert isinstance(loaded.model, VideoDiT)
    assert loaded.model.config == video.SIZES["smoke"].model
    assert loaded.model.head.weight.dtype == torch.float64
    assert record["curve"][0]["loss"] > 1


def test_a_second_training_needs_the_first(tmp_path):
    with pytest.raises(ValueError, match="start must name what size 'full' wrote"):
        train("video", tmp_path, size="long", console=Console(quiet=True))
    with pytest.raises(ValueError, match="start must be a video testbed, 'testbed:decoder' is a Llama"):
        train("video", tmp_path, size="long", start="testbed:decoder", console=Console(quiet=True))
    with pytest.raises(ValueError, match="start goes with size 'long'"):
        train("video", tmp_path, size="smoke", start="testbed:video", console=Console(quiet=True))


def test_the_shipped_model_is_small_and_says_where_it_comes_from(shipped):
    folder = TESTBEDS["video"]
    record = json.loads((folder / "training.json").read_text())
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert (folder / "model.safetensors").stat().st_size < 8e6
    assert shipped.tokenizer is None
    assert shipped.model.config.layers >= 4
    assert shipped.model.config.heads >= 4
    assert math.prod(shipped.model.config.grid(video.SHAPE)) == 2048
    assert sum(p.numel() for p in shipped.model.parameters()) == record["parameters"]
    assert set(record["gates"]["values"]) == set(GATES)
    assert record["gates"]["ready"] == all(record["gates"]["values"][k] >= v for k, v in GATES.items())
    assert record["command"].startswith("regard train video")
    if "--size long" in record["command"]:
        assert record["start"]["training"]["command"].startswith("regard train video")


@torch.no_grad()
def test_the_shipped_model_knows_the_flow(shipped):
    """Its loss on held-out videos is far below that of the best constant."""
    size = video.SIZES["long"]
    generator = torch.Generator().manual_seed(5)
    batch = video.noised(size.task((8, 16, 16), 1, "test").batch(8, generator), size, generator)
    flow = batch.noise - batch.x
    assert video.video_loss(shipped.model, batch) < 0.4 * flow.var()


def test_prompts_asked_for_are_different_objects():
    words = asked(50, 3, torch.Generator().manual_seed(0))
    assert words.min() >= 1
    assert words.max() < NULL
    assert (words[:, :-1] > words[:, 1:]).all()
    assert (asked(5, 1, torch.Generator().manual_seed(0))[:, 1:] == 0).all()


def test_psnr_is_the_formula():
    x = torch.zeros(2, 1, 2, 2, 2)
    y = x.clone()
    y[0] += 0.1
    assert psnr(y, x)[0].item() == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-3)
    assert psnr(y, x)[1] == math.inf
    assert psnr(x + 3, x + 1.5)[0] == math.inf  # both shown as white
    assert psnr(x + 0.1, x, peak=1)[0].item() == pytest.approx(20, abs=1e-3)
    with pytest.raises(ValueError, match="must have the shape of reference"):
        psnr(x, x[:1])


def test_noise_of_a_video_does_not_depend_on_how_many_there_are():
    assert torch.equal(noise_for(3, (2, 4, 4), 7)[:2], noise_for(2, (2, 4, 4), 7))
    assert not torch.equal(noise_for(1, (2, 4, 4), 7), noise_for(1, (2, 4, 4), 8))


def test_beside_dense():
    torch.manual_seed(0)
    model = VideoDiT(DiTConfig(words=16, dim=24, layers=1, heads=2, pairs=(2, 2, 2)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    noise, words = noise_for(2, (2, 4, 4), 0), torch.tensor([[3, 0, 0], [4, 5, 0]])
    found = beside_dense(model, attend_with(model, Window(1, 1)), noise, words, steps=2)
    assert (found.psnr < 60).all()
    again = beside_dense(model, attend_with(model, Window(8, 8)), noise, words, steps=2, dense=found.dense)
    assert (again.psnr > 90).all()


def made_heads():
    """A model whose first head sees its own place in every frame, and whose second sees its own frame alone."""
    torch.manual_seed(0)
    model = VideoDiT(DiTConfig(words=16, dim=32, layers=1, heads=2, pairs=(2, 3, 3), theta=3.0)).eval()
    attention = model.blocks[0].self_attention
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        for head, axes in enumerate((range(2, 8), range(2))):
            for pair in axes:
                for part in (0, 32):
                    attention.qkv.bias[part + 16 * head + pair] = 1.0
        attention.norm_q.weight.fill_(4.0)
        attention.norm_k.weight.fill_(4.0)
    return model


def test_roles_of_heads_that_were_made():
    model = made_heads()
    videos = MovingDigits((8, 16, 16), most=1).batch(1, torch.Generator().manual_seed(0))
    table = head_roles(model, videos.x, videos.words, times=(0.5,))
    assert table.names.values.tolist() == [["multi-diagonal", "block"]]


def test_heads_start_out_leaning_to_their_frame_or_their_place():
    """Of an untrained model: the first to its own frame, the second to its place in all frames, the last to neither."""
    torch.manual_seed(0)
    config = replace(video.SIZES["smoke"].model, dim=64, heads=4, layers=1, pairs=(2, 3, 3))
    videos = MovingDigits((8, 32, 32), most=1).batch(1, torch.Generator().manual_seed(0))
    found = {}
    for lean in (config.lean, 0.0):
        model = VideoDiT(replace(config, lean=lean)).eval()
        scores = head_roles(model, videos.x, videos.words, times=(0.5,)).scores[0]
        found[lean] = [scores.sel(role=r).values for r in ("block", "multi-diagonal", "multi-diagonal/main")]
    frame, place, main = found.pop(config.lean)
    assert frame[0] > 0.6
    assert frame[[1, 3]].max() < 0.25
    assert place[1] > 0.7
    assert place[[0, 3]].max() < 0.4
    assert main[1] < 0.2  # in all frames, not its own
    for plain in found.values():
        assert plain[0].max() < 0.25
        assert plain[1].max() < 0.45


def test_the_shipped_model_is_watched_on_a_prompt(shipped):
    asked_for = inputs_of("3 square", 0.5)
    assert set(asked_for) == {"x", "t", "words"}
    assert asked_for["x"].shape == (1, 1, *video.SHAPE)
    atlas = watch_video(shipped.model, asked_for["x"], asked_for["words"], "light", times=(0.5,))
    assert atlas.sizes["layer"] == 4
    with pytest.raises(ValueError, match="text must be words among 0, 1"):
        inputs_of("a dog")
