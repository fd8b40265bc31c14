import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.moving_digits import NULL, WORDS, MovingDigits, prompt, spell
from regard.tasks.video_reading import counts, kinds, sharpness, steadiness
from regard.tasks.vision import digits
from tests.oracles.moving_digits import path, render


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    frames=st.integers(1, 6),
    room=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    step=st.integers(1, 3),
    hold=st.integers(1, 3),
    speed=st.integers(0, 3),
    seed=st.integers(0, 99),
    texture=st.sampled_from([0.0, 0.3]),
)
def test_every_pixel_is_the_oracle_s(frames, room, step, hold, speed, seed, texture):
    height, width = (8 + step * (n // step) for n in room)
    task = MovingDigits((frames, height, width), speed=speed, texture=texture, step=step, hold=hold)
    scenes = task.scenes(1, gen(seed))
    assert not (scenes.start % step).any()
    assert not (scenes.velocity % step).any()
    video = task.render(scenes)
    for i, one in enumerate(zip(*scenes, strict=True)):
        assert torch.equal(video[i], render(task.shape, *one, hold))


@given(st.integers(0, 12), st.integers(-5, 5), st.integers(0, 12))
def test_objects_turn_round_at_the_walls(start, velocity, room):
    start = min(start, room)
    task = MovingDigits((9, room + 8, 8))
    found = task.places(torch.tensor([start, 0]), torch.tensor([velocity, 0]))
    assert found[:, 0].tolist() == path(start, velocity, room, 9)


def test_scenes_show_what_the_words_say():
    task = MovingDigits((2, 32, 32), split="test")
    scenes = task.scenes(200, gen())
    test, train = digits("test"), digits("train")
    assert set((scenes.kind > 0).sum(1).tolist()) == {1, 2, 3}
    assert scenes.kind.max() == NULL - 1
    for kind, glyph in zip(scenes.kind.flatten(), scenes.glyph.flatten(0, 1), strict=True):
        if kind == 0:
            assert glyph.max() == 0
        elif kind <= 10:
            assert (test.x[test.labels == kind - 1, 0] == glyph).all((1, 2)).any()
            assert not (train.x[:, 0] == glyph).all((1, 2)).any()
        else:
            assert set(glyph.unique().tolist()) == {0.0, 1.0}


def test_asked_words_are_heeded():
    words = torch.stack([prompt("3 7 square"), prompt("cross"), prompt("")])
    videos = MovingDigits().batch(3, gen(), words)
    assert torch.equal(videos.words, words)
    assert videos.x.shape == (3, 1, 8, 32, 32)
    assert videos.x[2].max() == -1
    assert videos.x[:2].flatten(1).amax(1).tolist() == [1, 1]
    assert spell(words[0]) == "square 7 3"


def test_the_first_frame_does_not_tell_the_motion():
    """The same objects at the same places move differently: velocities are drawn without looking at them."""
    task = MovingDigits(most=1)
    scenes = task.scenes(4000, gen())
    digit, speed = scenes.kind[:, 0].double(), scenes.velocity[:, 0, 1].double()
    assert abs(torch.corrcoef(torch.stack([digit, speed]))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack([scenes.start[:, 0, 1].double(), speed]))[0, 1]) < 0.06


def test_batches_follow_the_generator():
    task = MovingDigits((3, 16, 24))
    assert torch.equal(task.batch(4, gen(1)).x, task.batch(4, gen(1)).x)
    assert not torch.equal(task.batch(4, gen(1)).x, task.batch(4, gen(2)).x)


def test_readings_of_true_videos():
    task = MovingDigits(split="test")
    one = MovingDigits(most=1, split="test").batch(12, gen())
    assert (counts(one.x) == 1).all()
    assert (kinds(one.x) == one.words[:, 0]).double().mean() > 0.9
    assert steadiness(one.x, reach=2).min() > 0.999
    many = task.batch(60, gen(1))
    told = (many.words > 0).sum(1)
    assert (counts(many.x).mode(1).values == told).double().mean() > 0.85
    noise = torch.rand(12, 1, 8, 32, 32, generator=gen()) * 2 - 1
    assert steadiness(noise).max() < 0.9
    assert (kinds(noise) == one.words[:, 0]).double().mean() < 0.4
    flicker = torch.where(torch.arange(8)[:, None, None] % 2 == 0, one.x, torch.tensor(-1.0))
    assert (counts(flicker) == torch.tensor([1, 0] * 4)).all()


def test_sharpness_is_the_mean_square_of_both_differences():
    x = torch.full((1, 1, 1, 2, 2), -1.0)
    x[..., 0, 0] = 1.0
    assert sharpness(x).item() == pytest.approx(4 / 2 + 4 / 2)
    assert sharpness(torch.zeros(1, 1, 2, 4, 4)).item() == 0


def test_the_canvas_stands_still_and_is_darker_than_objects():
    videos = MovingDigits(texture=0.3).batch(3, gen(), torch.zeros(3, 3, dtype=torch.long))
    assert (videos.x == videos.x[:, :, :1]).all()
    assert -0.45 < videos.x.max() < -0.4
    assert counts(videos.x).max() == 0
    assert abs(videos.x.mean() + 0.7) < 0.02
    one = MovingDigits(most=1, texture=0.3).batch(12, gen())
    assert (counts(one.x) == 1).all()
    assert (kinds(one.x) == one.words[:, 0]).double().mean() > 0.9


def test_refusals():
    with pytest.raises(ValueError, match="got 'horse'"):
        prompt("3 horse")
    with pytest.raises(ValueError, match="at most 3 objects, got 4"):
        prompt("1 2 3 4")
    with pytest.raises(ValueError, match="height >= 8"):
        MovingDigits((8, 7, 16))
    with pytest.raises(ValueError, match=r"most must be in 1\.\.3, got 4"):
        MovingDigits(most=4)
    with pytest.raises(ValueError, match="speed must be at least 0"):
        MovingDigits(speed=-1)
    with pytest.raises(ValueError, match=r"texture must be in \[0, 0\.5\)"):
        MovingDigits(texture=0.5)
    with pytest.raises(ValueError, match="hold must be at least 1, got 0"):
        MovingDigits(hold=0)
    with pytest.raises(ValueError, match=r"8 and a multiple of step = 4, got \(32, 30\)"):
        MovingDigits((8, 32, 30), step=4)
    with pytest.raises(ValueError, match=r"2 prompts of ids in 0\.\.14"):
        MovingDigits().scenes(2, gen(), torch.full((2, 3), NULL))
    assert len(WORDS) == 16
