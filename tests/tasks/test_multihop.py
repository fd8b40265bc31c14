"""Two chains: the answer follows from the two gold facts and from nothing less; every order is what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.batch import IGNORED
from regard.tasks.multihop import ASK, BOS, FIRST_ENTITY, TwoChains


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def tasks(draw):
    docs = draw(st.integers(4, 9))
    orders = ["mixed", "forward", "backward", *(f"forward_{i}" for i in range(docs - 1))]
    return TwoChains(2 * docs - 2 + draw(st.integers(2, 20)), docs, draw(st.sampled_from(orders)))


def chain(task, ids):
    """The gold documents' places, read from the tokens."""
    body = ids[1 : 1 + 2 * task.docs].view(-1, 2).tolist()
    first = next(i for i, (head, _) in enumerate(body) if head == int(ids[-2]))
    second = next(i for i, (head, _) in enumerate(body) if head == body[first][1])
    return first, second


@given(tasks(), st.integers(0, 2**31))
def test_every_part_is_where_it_says(task, seed):
    batch = task.batch(5, generator(seed))
    assert batch.input_ids.shape == (5, task.length)
    assert (batch.input_ids[:, 0] == BOS).all()
    assert (batch.input_ids[:, task.prompt - 2] == ASK).all()
    for one in batch:
        ids = one.input_ids[0]
        asked = one.labels[0] != IGNORED
        assert asked.nonzero().flatten().tolist() == [task.prompt]
        places = chain(task, ids)
        for name, place in zip(("first", "second"), places, strict=True):
            assert one.spans[name][0].tolist() == [1 + 2 * place, 3 + 2 * place]
            assert one.groups[f"document_{place}"][0].nonzero().flatten().tolist() == [1 + 2 * place, 2 + 2 * place]
        assert one.groups["gold"][0].nonzero().flatten().tolist() == sorted(
            [1 + 2 * p + i for p in places for i in (0, 1)]
        )
        parts = torch.stack([one.groups[g][0] for g in ("bos", *task.documents, "question")]).sum(0)
        assert parts.tolist() == [1] * task.prompt + [0]
        body = ids[1 : 1 + 2 * task.docs]
        counts = body.bincount(minlength=task.vocab)
        assert counts.max() == 2
        assert (counts == 2).sum() == 2  # b and b', so the head said before fits two documents
        assert (counts > 0).sum() == task.used
        assert body.min() >= FIRST_ENTITY


@given(tasks(), st.integers(0, 2**31))
def test_the_solver_finds_the_labels_from_the_prompt_alone(task, seed):
    for one in task.batch(5, generator(seed)):
        assert task.solve(one.input_ids[0, : task.prompt]) == int(one.labels[0, -1])


@given(tasks(), st.integers(0, 2**31), st.sampled_from(["first", "second"]))
def test_without_either_gold_document_there_is_no_answer(task, seed, document):
    batch = task.batch(5, generator(seed))
    for one, before in zip(task.without(batch, document, generator(seed + 1)), batch, strict=True):
        assert task.solve(one.input_ids[0, : task.prompt]) is None
        start, end = before.spans[document][0].tolist()
        changed = (one.input_ids[0] != before.input_ids[0]).nonzero().flatten().tolist()
        assert changed == list(range(start, end))
        assert not set(one.input_ids[0, start:end].tolist()) & set(before.input_ids[0].tolist())


@given(tasks(), st.integers(0, 2**31))
def test_orders(task, seed):
    for one in task.batch(6, generator(seed)):
        first, second = chain(task, one.input_ids[0])
        if task.order == "forward":
            assert first < second
        elif task.order == "backward":
            assert first > second
        elif task.gap is not None:
            assert second == task.docs - 1
            assert first == task.docs - 2 - task.gap


def test_neither_place_nor_name_tells_the_answer():
    """No rule that looks at places, or at the answer's own id, beats chance by more than four standard deviations."""
    task = TwoChains(24, 6)
    n = 6000
    batch = task.batch(n, generator(0))
    answers = batch.input_ids[:, -1]
    for place in range(1, 1 + 2 * task.docs):
        rate = float((batch.input_ids[:, place] == answers).double().mean())
        expected = 0.0 if place % 2 else 1 / task.docs  # answers are tails, in any document alike
        assert abs(rate - expected) < 4 * (expected / n) ** 0.5 + 1e-9
    counts = (answers - FIRST_ENTITY).bincount(minlength=24).double() / n
    assert (counts - 1 / 24).abs().max() < 4 * (1 / 24 / n) ** 0.5


def test_the_shortcut_is_half_right():
    task = TwoChains(24, 6)
    right = 0
    for one in task.batch(800, generator(1)):
        body = one.input_ids[0, 1 : 1 + 2 * task.docs].view(-1, 2).tolist()
        tails = {tail for _, tail in body}
        ends = [tail for head, tail in body if head in tails]
        assert len(ends) == 2
        right += ends[0] == int(one.input_ids[0, -1])
    assert abs(right / 800 - task.shortcut) < 0.08


def test_the_same_facts_in_other_orders_have_the_same_answer():
    task = TwoChains(24, 6)
    facts = task.facts(8, generator(0))
    one, two = (task.compose(facts, task.places(8, generator(s))) for s in (1, 2))
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.input_ids.sort(1).values, two.input_ids.sort(1).values)


def test_the_same_seed_gives_the_same_batch():
    one, two = (TwoChains().batch(4, generator(7)).input_ids for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, TwoChains().batch(4, generator(8)).input_ids)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"docs": 3}, "docs must be at least 4"),
        ({"entities": 9}, "entities must be at least 10"),
        ({"order": "sideways"}, "order must be"),
        ({"order": "forward_5"}, "only 4 are others"),
    ],
)
def test_errors_name_the_argument(wrong, said):
    with pytest.raises(ValueError, match=said):
        TwoChains(**wrong)


def test_taking_away_needs_a_gold_document_and_unused_entities():
    task = TwoChains(10, 6)
    batch = task.batch(1, generator(0))
    with pytest.raises(ValueError, match="document must be 'first' or 'second'"):
        task.without(batch, "third", generator(0))
    with pytest.raises(ValueError, match="entities must be at least 12"):
        task.without(batch, "first", generator(0))
