"""Needles: exact lengths, spans that hold what they say, answers that follow from the prompt and the needle alone."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.batch import IGNORED
from regard.tasks.bytetext import BOS, StandardLibrary, decode
from regard.tasks.needle import Needle, draw_name, least_length, lines_of, sentences


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def needles(draw):
    lo = draw(st.integers(0, 4))
    hi = draw(st.integers(lo, 5))
    questions = draw(st.integers(1, lo + 1))
    digits = draw(st.integers(1, 7))
    length = least_length(hi, questions, digits) + draw(st.integers(0, 300))
    depth = draw(st.none() | st.floats(0, 1))
    return Needle(length, digits, (lo, hi), depth, questions, draw(st.sampled_from(["train", "test"])))


@given(needles(), st.integers(0, 2**31))
def test_every_part_is_where_it_says(task, seed):
    batch = task.batch(3, generator(seed))
    assert batch.input_ids.shape == (3, task.length)
    assert (batch.input_ids[:, 0] == BOS).all()
    for one in batch:
        ids = one.input_ids[0]
        said = {name: decode(ids[slice(*span[0].tolist())]) for name, span in one.spans.items()}
        assert said["answer"] == said["value"]
        assert len(said["value"]) == task.digits
        assert said["value"].isdigit()
        name = said["question"].removeprefix("what is the code of ").split("?")[0]
        assert said["needle"] == f"the code of {name} is {said['value']}. "
        assert said["question"] == f"what is the code of {name}? the code of {name} is "
        assert one.spans["answer"][0, 1] == task.length
        assert decode(ids[one.groups["needle"][0]]) == said["needle"]
        told = decode(ids[one.groups["distractors"][0]])
        count = told.count("the code of ")
        assert task.distractors[0] <= count <= task.distractors[1]
        assert f"the code of {name} is" not in told
        asked = one.labels[0] != IGNORED
        assert int(asked.sum()) == task.questions * task.digits
        assert (one.labels[0][asked] == ids[asked]).all()
        together = torch.stack(list(one.groups.values())).sum(0)
        assert together.max() <= 1  # no key in two groups
        assert not one.groups["filler"][0, 0]


@given(needles(), st.integers(0, 2**31))
def test_the_solver_finds_the_labels_from_the_prompt_alone(task, seed):
    for one in task.batch(3, generator(seed)):
        start, end = one.spans["answer"][0].tolist()
        assert task.solve(one.input_ids[0, :start]) == one.labels[0, start:end].tolist()


@given(needles(), st.integers(0, 2**31))
def test_without_the_needle_there_is_no_answer(task, seed):
    batch = task.batch(3, generator(seed))
    bare = task.without_needle(batch, generator(seed + 1))
    for one, before in zip(bare, batch, strict=True):
        start = int(one.spans["answer"][0, 0])
        assert task.solve(one.input_ids[0, :start]) is None
        kept = ~before.groups["needle"][0]
        assert torch.equal(one.input_ids[0][kept], before.input_ids[0][kept])
        hidden = one.input_ids[0][before.groups["needle"][0]]
        assert not set(hidden.tolist()) & set(b"0123456789")
        assert one.groups["needle"].sum() == 0


def test_codes_do_not_follow_from_names():
    task = Needle(160, distractors=(0, 1))
    first = [decode(b.input_ids[0][slice(*b.spans["value"][0].tolist())]) for b in task.batch(400, generator(0))]
    counts = torch.zeros(5, 10)
    for code in first:
        for place, digit in enumerate(code):
            counts[place, int(digit)] += 1
    assert (counts / 400 - 0.1).abs().max() < 0.06  # four standard deviations


def test_splits_share_no_name():
    rng = random.Random(0)
    train = {draw_name(rng, "train") for _ in range(2000)}
    test = {draw_name(rng, "test") for _ in range(2000)}
    assert not train & test
    assert len(train) > 1900
    assert len(test) > 1700


@pytest.mark.parametrize(("depth", "lo", "hi"), [(0.0, 0.0, 0.15), (0.5, 0.35, 0.65), (1.0, 0.85, 1.0)])
def test_depth_places_the_needle(depth, lo, hi):
    batch = Needle(1024, distractors=(0, 0), depth=depth).batch(8, generator(3))
    room = batch.spans["question"][:, 0] - (batch.spans["needle"][:, 1] - batch.spans["needle"][:, 0])
    place = batch.spans["needle"][:, 0] / room
    assert ((place >= lo) & (place <= hi + 0.01)).all()


def test_the_same_seed_gives_the_same_batch():
    one, two = (Needle(256).batch(4, generator(7)).input_ids for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, Needle(256).batch(4, generator(8)).input_ids)


def test_a_haystack_of_text():
    text = StandardLibrary("test").data.tobytes()[:20_000]
    batch = Needle(512, filler=lines_of(text)).batch(4, generator(0))
    hay = bytes(batch.input_ids[0][batch.groups["filler"][0]].tolist())
    assert hay in text
    with pytest.raises(ValueError, match="haystack needs"):
        Needle(512, filler=lines_of(b"short")).batch(1, generator(0))


@given(st.integers(0, 400), st.integers(0, 1000))
def test_filler_has_the_length_asked_for_and_its_places_lie_within(room, seed):
    hay, places = sentences(random.Random(seed), room)
    assert len(hay) == room
    assert places[0] == 0
    assert all(0 <= p <= room for p in places)
    assert all(hay[p - 2 : p] == b". " for p in places[1:] if p >= 2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"length": 40}, "length must be at least"),
        ({"distractors": (3, 1)}, "distractors"),
        ({"depth": 1.5}, "depth"),
        ({"split": "dev"}, "split"),
        ({"questions": 3, "distractors": (1, 4)}, "questions"),
        ({"digits": 0}, "digits"),
    ],
)
def test_errors_name_the_argument(wrong, said):
    with pytest.raises(ValueError, match=said):
        Needle(**wrong)
