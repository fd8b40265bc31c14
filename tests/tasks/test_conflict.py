"""Facts and contexts against them: the solver agrees, nothing leaks, spans and groups are where they should be."""

import json

import pytest
import torch
from rich.console import Console

from regard.tasks.conflict import KINDS, Conflict
from regard.tasks.testbeds import TESTBEDS, load, train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def only(kind, **how):
    return Conflict(tuple(float(k == kind) for k in KINDS), **how)


EVERY = [only(kind, **how) for kind in KINDS for how in ({}, {"chat": True}, {"chat": True, "indicator": True})]


@pytest.mark.parametrize("task", [*EVERY, Conflict((0.1, 0.4, 0.3, 0.2), chat=True)], ids=repr)
def test_the_answer_follows_from_the_prompt_and_the_facts(task):
    batch = task.batch(60, generator())
    for one in batch:
        start, end = one.spans["answer"][0].tolist()
        assert end - start == 1
        assert (one.labels[0] >= 0).nonzero().flatten().tolist() == [start]
        assert one.labels[0, start] == one.input_ids[0, start] == task.solve(one.input_ids[0, :start])
        assert one.valid[0].tolist() == [True] * end + [False] * (one.input_ids.shape[1] - end)
        assert (one.input_ids[0, end:] == task.vocabulary.PAD).all()
    assert torch.equal(batch.input_ids, task.batch(60, generator()).input_ids)


def test_what_is_said_agrees_with_memory_only_where_it_should():
    for kind in KINDS:
        task = only(kind)
        batch = task.batch(400, generator())
        words = task.vocabulary
        at = batch.spans["answer"][:, :1]
        known = words["o0"] + task.facts[batch.input_ids.gather(1, at - 2)[:, 0] - words["s0"]]
        answer = batch.input_ids.gather(1, at)[:, 0]
        told = batch.spans["context"][:, 1] > batch.spans["context"][:, 0]
        assert told.all() == (kind != "none")
        assert told.any() == (kind != "none")
        assert (answer == known).all() == (kind != "conflict")
        if kind in ("conflict", "agree"):
            assert (batch.input_ids[:, 3] == batch.input_ids[:, 9]).all()
            assert ((batch.input_ids[:, 5] == known) == (kind == "agree")).all()
            assert (batch.input_ids[:, 5] == answer).all()
        if kind == "other":
            assert (batch.input_ids[:, 3] != batch.input_ids[:, 9]).all()
    # A conflicting object is no hint of the remembered one: every other object is as likely.
    shift = (batch_of_conflicts() - 1).bincount(minlength=49)
    assert shift.min() > 0.5 * shift.double().mean()


def batch_of_conflicts():
    task = Conflict()
    ids = task.batch(10000, generator()).input_ids
    words = task.vocabulary
    return (ids[:, 5] - words["o0"] - task.facts[ids[:, 3] - words["s0"]]) % task.objects


def test_the_users_words_are_a_group():
    task = Conflict((1.0, 0.0, 1.0, 0.0), chat=True, indicator=True)
    batch = task.batch(50, generator())
    words = task.vocabulary
    signs = torch.tensor([words[w] for w in ("<pad>", "<bos>", "<user>", "<assistant>", "[IND]")])
    at = torch.arange(batch.input_ids.shape[1])
    expected = ~torch.isin(batch.input_ids, signs) & (at < batch.spans["answer"][:, :1])
    assert torch.equal(batch.groups["user"], expected)
    plain = Conflict().batch(3, generator())
    assert plain.groups["user"].tolist() == [[False] + [True] * 10 + [False]] * 3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs chat=True"):
        Conflict(indicator=True)
    with pytest.raises(ValueError, match="shares must be 4 numbers >= 0, not all 0"):
        Conflict((0.0, 0.0, 0.0, 0.0))


def test_both_stages_are_shipped_and_the_second_goes_on_from_the_first(tmp_path):
    records = {
        name: json.loads((TESTBEDS[name] / "training.json").read_text()) for name in ("conflict", "conflict-sft")
    }
    assert all(record["gates"]["ready"] for record in records.values())
    made = records["conflict-sft"]["start"]["training"]
    assert made["date"] == records["conflict"]["date"]
    quiet = Console(quiet=True)
    short = train("conflict-sft", tmp_path / "sft", size="smoke", start=TESTBEDS["conflict"], console=quiet)
    assert short["start"]["sha256"] == records["conflict-sft"]["start"]["sha256"]
    before, after = load("testbed:conflict").model, load(tmp_path / "sft").model
    moved = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1
    with pytest.raises(ValueError, match="start must be a conflict testbed"):
        train("conflict-sft", tmp_path / "other", start=TESTBEDS["maps"], console=quiet)
