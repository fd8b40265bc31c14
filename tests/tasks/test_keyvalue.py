"""KeyValueRetrieval: an object that is JSON, spans that hold what they say, a solver, and no leak."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.tasks.bytetext import BOS, decode
from regard.tasks.keyvalue import KeyValueRetrieval


def draw(task, n=20, seed=0):
    return task.batch(n, torch.Generator().manual_seed(seed))


@settings(max_examples=10)
@given(length=st.integers(800, 1500), shots=st.integers(0, 3), key=st.integers(4, 32), seed=st.integers(0, 99))
def test_spans_hold_what_they_say(length, shots, key, seed):
    task = KeyValueRetrieval(length, shots, key)
    batch = draw(task, 2, seed)
    assert batch.input_ids.shape == (2, length)
    assert (batch.input_ids[:, 0] == BOS).all()
    for one in batch:
        ids = one.input_ids[0]
        said = {name: decode(ids[slice(*span[0].tolist())]) for name, span in one.spans.items()}
        head, tail = decode(ids).split("}\n")
        entries = json.loads(head + "}")
        asked = said["question"].removeprefix("what is ")[:key]
        assert entries[asked] == said["value"] == said["answer"]
        assert len(said["value"]) <= 30
        assert said["needle"] == f'"{asked}": "{said["value"]}"'
        assert said["question"] == f'what is {asked}? "{asked}": "'
        assert len({*entries}) == len(entries) == len({*entries.values()})
        assert tail.count("what is") == shots + 1
        places = {name: decode(ids[mask[0]]) for name, mask in one.groups.items()}
        assert places["needle"] == said["needle"]
        assert places["question"] == said["question"]
        assert places["distractors"].count('": "') == len(entries) - 1
        shown = [line.split("? ") for line in places["shots"].splitlines()]
        assert len(shown) == shots
        for question, answer in shown:
            shown_key = question.removeprefix("what is ")
            assert shown_key != asked
            assert answer == f'"{shown_key}": "{entries[shown_key]}"'
        start, end = one.spans["answer"][0].tolist()
        assert end == length
        assert torch.equal(one.labels[0, start:], ids[start:])
        assert (one.labels[0, :start] == -100).all()


def test_the_solver_answers_from_the_prompt_alone_and_only_the_entry_tells():
    for one in draw(KeyValueRetrieval(900)):
        start = int(one.spans["answer"][0, 0])
        prompt = one.input_ids[0, :start].clone()
        assert KeyValueRetrieval().solve(prompt) == one.input_ids[0, start:].tolist()
        value = one.spans["value"][0]
        prompt[slice(*value.tolist())] = ord("x")
        answer = decode(one.input_ids[0, start:])
        assert answer not in decode(prompt)
        prompt[slice(*one.spans["needle"][0].tolist())] = ord("x")
        assert KeyValueRetrieval().solve(prompt) is None


def test_the_entry_asked_for_stands_anywhere_but_last():
    batch = draw(KeyValueRetrieval(1024), 200)
    last = batch.groups["distractors"].long().cumsum(1).argmax(1)
    place = batch.spans["needle"][:, 0]
    assert (place < last).all()
    share = (place - 2).double() / last
    assert 0.25 < float(share.mean()) < 0.45  # up to the last entry, and the shots' lines are not of the object
    assert place.unique().numel() > 20


def test_refusals():
    with pytest.raises(ValueError, match="length must be at least"):
        KeyValueRetrieval(300)
    with pytest.raises(ValueError, match="key must be at least 4"):
        KeyValueRetrieval(key=2)
    with pytest.raises(ValueError, match="shots must be at least 0"):
        KeyValueRetrieval(shots=-1)
