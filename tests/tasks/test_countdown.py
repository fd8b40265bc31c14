"""Countdown: what is drawn is right, what is wrong is told, held-out triples stay out, nothing tells the answer."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from regard.tasks.batch import IGNORED
from regard.tasks.countdown import Countdown

TASK = Countdown(most=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def judged(ids, task):
    """Right or wrong by reading the answer as text."""
    words = {task.sign(s): s for s in ("+", "-", "*", "=", ";", "END")}
    text = [words.get(i, i) for i in ids[task.prompt :]]
    x, o, y, e1, r, semi, u, p, v, e2, t, end = text
    if (e1, semi, e2, end) != ("=", ";", "=", "END") or {o, p} - set("+-*"):
        return False
    if any(not isinstance(n, int) or n > task.limit for n in (x, y, r, u, v, t)):
        return False
    of = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    if of[o](x, y) != r or of[p](u, v) != t or t != ids[5]:
        return False
    return any(m == r and sorted((x, y, other)) == sorted(ids[1:4]) for m, other in ((u, v), (v, u)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_drawn_answers_are_right_and_what_is_asked_for(split):
    batch = TASK.batch(200, seeded(), split)
    assert TASK.right(batch.input_ids).all()
    assert all(judged(row, TASK) for row in batch.input_ids.tolist())
    assert (batch.labels[:, : TASK.prompt] == IGNORED).all()
    assert torch.equal(batch.labels[:, TASK.prompt :], batch.input_ids[:, TASK.prompt :])
    assert batch.spans["answer"][0].tolist() == [7, 19]
    assert int(batch.input_ids.max()) < TASK.vocab


@settings(max_examples=30)
@given(st.integers(0, 9999))
def test_changed_answers_are_judged_as_the_text_says(seed):
    draw = seeded(seed)
    ids = TASK.batch(8, draw, "train").input_ids
    at = torch.randint(TASK.prompt, 19, (8, 1), generator=draw)
    ids = ids.scatter(1, at, torch.randint(TASK.vocab, (8, 1), generator=draw))
    assert TASK.right(ids).tolist() == [judged(row, TASK) for row in ids.tolist()]


def test_the_solver_answers_every_question():
    for split in ("train", "test"):
        for row in TASK.batch(40, seeded(1), split).input_ids:
            answer = TASK.solve(row[: TASK.prompt])
            assert TASK.right(torch.cat([row[: TASK.prompt], answer])[None]).all()
    impossible = TASK.batch(1, seeded(), "train").input_ids[0, : TASK.prompt].clone()
    impossible[1:4], impossible[5] = 1, 90
    assert TASK.solve(impossible) is None


def test_no_held_out_triple_is_trained_on():
    drawn = {}
    for split in ("train", "test"):
        ids = TASK.batch(4000, seeded(2), split).input_ids
        drawn[split] = set(map(tuple, ids[:, 1:4].sort(1).values.tolist()))
    assert not drawn["train"] & drawn["test"]
    assert len(drawn["test"]) == round(0.2 * 120)
    assert Countdown(most=8, seed=1)._triples != TASK._triples


def test_neither_the_order_nor_the_target_gives_the_answer_away():
    """Always the same expression in the order shown, and the answer most often right for a target: both fail."""
    task = Countdown()
    ids = task.batch(3000, seeded(3), "test").input_ids
    a, b, c, t = ids[:, 1], ids[:, 2], ids[:, 3], ids[:, 5]
    of = (lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y)
    fixed = max(
        float((of[p](of[o](x, y), z) == t).float().mean())
        for x, y, z in ((a, b, c), (a, c, b), (b, c, a), (b, a, c), (c, a, b), (c, b, a))
        for o in range(3)
        for p in range(3)
    )
    assert fixed < 0.15
    replies = Counter(tuple(row) for row in task.batch(3000, seeded(4)).input_ids[:, 7:].tolist())
    common = torch.tensor(replies.most_common(1)[0][0])
    assert float(task.right(torch.cat([ids[:, :7], common.expand(len(ids), -1)], 1)).float().mean()) < 0.02


def test_questions_are_equally_likely():
    task = Countdown(most=3)
    drawn = task.batch(20_000, seeded(5)).input_ids
    asked = Counter((*sorted(row[1:4]), row[5]) for row in drawn.tolist())
    _, first, count = task._answers["train"]
    assert len(asked) == len(first)
    assert max(asked.values()) < 1.4 * 20_000 / len(first) < 2 * min(asked.values())
    assert int(count.sum()) == len(task._answers["train"][0])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"most must be in 2\.\.limit"):
        Countdown(most=100)
    with pytest.raises(ValueError, match="held_out"):
        Countdown(held_out=1)
    with pytest.raises(ValueError, match="split must be one of"):
        TASK.batch(1, seeded(), "dev")
    with pytest.raises(ValueError, match="19 columns"):
        TASK.right(torch.zeros(1, 12, dtype=torch.long))
