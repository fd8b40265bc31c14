"""The tasks of symbols: solvers agree with generators, nothing leaks, generators know their own entropy."""

import itertools
import math

import pytest
import torch

from regard.tasks.arith import Arith3
from regard.tasks.lexicon import GRAMMAR, KINDS, Lexicon
from regard.tasks.lists import LONGEST, NAMES, ColouredObjects, EveryColour, IndirectObject
from regard.tasks.maps import ContextMaps
from regard.tasks.numbers import TASKS, NumberTasks
from regard.tasks.role_documents import RoleDocuments
from regard.tasks.symbolic import SYMBOLIC
from regard.tasks.words import Vocabulary


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def at(batch, span):
    start, end = batch.spans[span][:, 0], batch.spans[span][:, 1]
    assert (end - start == 1).all()
    return batch.input_ids.gather(1, start[:, None])[:, 0]


SOLVED = [
    Arith3(),
    Arith3("test", most=9),
    NumberTasks(),
    NumberTasks("prime"),
    IndirectObject(),
    IndirectObject(lead=None),
    ColouredObjects(),
    ColouredObjects((3, 8), lead=None),
    ColouredObjects(20),
]


@pytest.mark.parametrize("task", SOLVED, ids=repr)
def test_the_answer_follows_from_the_prompt(task):
    batch = task.batch(40, generator())
    for one in batch:
        assert task.solve(one.input_ids[0, :-1]) == int(one.input_ids[0, -1])
        assert (one.labels[0, :-1] < 0).all()
        assert one.labels[0, -1] == one.input_ids[0, -1]
    assert torch.equal(batch.input_ids, task.batch(40, generator()).input_ids)
    assert not torch.equal(batch.input_ids[:, 1:], task.batch(40, generator(1)).input_ids[:, 1:])


@pytest.mark.parametrize("task", [EveryColour(), EveryColour((2, 5), sign=False), EveryColour(8)], ids=repr)
def test_every_listed_object_is_asked_for_once(task):
    words = task.vocabulary
    for one in task.batch(20, generator()):
        ids, asked = one.input_ids[0], (one.labels[0] >= 0).nonzero()[:, 0]
        assert all(task.solve(ids[:p]) == int(ids[p]) for p in asked)
        listed = ids[1 : int((ids == words["?"]).nonzero())]
        assert sorted(ids[asked].tolist()) == sorted(listed[::3].tolist())
        assert ids[asked].tolist() != listed[::3].tolist() or len(asked) < 4
        assert ids[-1] == ids[asked[-1]]


def test_a_vocabulary_and_its_tokenizer_agree():
    words = Vocabulary.of(("a", "b"), ("c",))
    tokenizer = words.tokenizer(16)
    assert tokenizer("c a b").input_ids == [1, *words.ids("cab")]
    assert words.text([4, 2]) == "c a"
    assert tokenizer.decode([4, 2]) == "c a"
    with pytest.raises(ValueError, match="got a more than once"):
        Vocabulary.of(("a", "a"))


def test_held_out_triples_are_a_fifth_and_never_trained_on():
    every = torch.tensor(list(itertools.product(range(24), repeat=3)))
    assert Arith3().held_out(every).double().mean() == pytest.approx(0.2, abs=0.01)
    for split in ("train", "test"):
        ids = Arith3(split).batch(200, generator()).input_ids
        triples = ids[:, 1::2][:, :3] - Arith3().vocabulary["0"]
        assert (Arith3().held_out(triples) == (split == "test")).all()
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        Arith3("valid")


@pytest.mark.parametrize("options", [False, True])
def test_examples_narrow_the_maps_down(options):
    many = ContextMaps(5, options=options).batch(60, generator())
    for one in many:
        assert ContextMaps().solve(one.input_ids[0, :-1]) == {int(one.input_ids[0, -1])}
    none = ContextMaps(0, options=options).batch(60, generator())
    left = [ContextMaps(0).solve(one.input_ids[0, :-1]) for one in none]
    assert all(int(one.input_ids[0, -1]) in found for one, found in zip(none, left, strict=True))
    if not options:
        assert sum(1 / len(found) for found in left) / 60 < 0.3  # what guessing reaches without an example
        assert "options" not in many.spans
    else:
        start, end = many.spans["options"][0].tolist()
        listed = many.input_ids[:, start:end]
        assert (listed == many.input_ids[:, -1:]).sum(1).tolist() == [1] * 60
        places = (listed == many.input_ids[:, -1:]).double().mean(0)
        assert places.min() > 0.05  # the right one stands anywhere


def test_every_y_of_a_context_is_asked_for_and_nothing_else():
    task = ContextMaps(3, template=1, options=False)
    batch = task.batch(4, generator())
    assert [i for i, x in enumerate(batch.labels[0].tolist()) if x >= 0] == [3, 7, 11, 15]
    assert set(batch.input_ids[:, 2].tolist()) == {task.vocabulary[":"]}


def test_claims_are_echoed_as_often_as_said():
    task = NumberTasks("parity", claim=True)
    batch = task.batch(4000, generator())
    right = torch.tensor([task.solve(ids) for ids in batch.input_ids])
    answer, claimed = batch.input_ids[:, -1], batch.input_ids[:, -2]
    assert ((answer == right) | (answer == claimed)).all()
    wrong = claimed != right
    assert (answer[wrong] == right[wrong]).double().mean() == pytest.approx(0.6, abs=0.03)
    assert wrong.double().mean() == pytest.approx(0.5, abs=0.03)  # a claim says nothing of the number
    assert set(TASKS) == {"copy", "parity", "at-least-50", "mod-3", "prime"}


def test_people_are_told_apart_by_nothing_but_how_often_they_are_named():
    task = IndirectObject()
    batch = task.batch(4000, generator())
    io, s1, s2 = (at(batch, name) for name in ("io", "s1", "s2"))
    assert (s1 == s2).all()
    assert (io == batch.input_ids[:, -1]).all()
    assert (io != s1).all()
    first = batch.spans["io"][:, 0] < batch.spans["s1"][:, 0]
    assert first.double().mean() == pytest.approx(0.5, abs=0.03)
    counts = torch.bincount(io - task.vocabulary["name0"], minlength=NAMES)
    assert counts.max() < 2 * counts.min()
    other = task.corrupted(batch)
    for one in other[:20]:
        assert task.solve(one.input_ids[0, :-1]) == int(one.input_ids[0, -1])
    changed = batch.input_ids != other.input_ids
    assert changed.sum(1).tolist() == [2] * 4000  # the second mention and the answer


def test_a_colour_is_no_guess_from_its_place():
    task = ColouredObjects(4)
    batch = task.batch(2000, generator())
    asked = (batch.spans["colour"][:, 0] - 1) // 3
    assert torch.bincount(asked, minlength=4).min() > 400
    assert (at(batch, "object") == at(batch, "query")).all()
    assert (at(batch, "colour") == batch.input_ids[:, -1]).all()
    other = task.corrupted(batch)
    for one in other[:20]:
        assert task.solve(one.input_ids[0, :-1]) == int(one.input_ids[0, -1])
    assert (other.input_ids[:, -1] == at(batch, "other")).all()
    assert ((batch.input_ids != other.input_ids).sum(1) == 2).all()
    lengths = {ColouredObjects((3, 20), lead=None).batch(1, generator(s)).input_ids.shape[1] for s in range(30)}
    assert max(lengths) <= LONGEST
    with pytest.raises(ValueError, match=r"items must lie in 2\.\.24"):
        ColouredObjects(30)


def test_registers_follow_the_level_and_the_judge_sees_it():
    task = RoleDocuments(words=60)
    role = torch.arange(75).repeat(4)
    batch = task.batch(300, generator(), role)
    register = (batch.input_ids[:, 2:] - task.vocabulary["r1w0"]) // task.each + 1
    level = task.level(role)
    for g in (1, 3, 5):
        share = torch.bincount(register[level == g].flatten(), minlength=6)[1:].double()
        want = torch.exp(-((torch.arange(1, 6) - g) ** 2) / 2.0)
        torch.testing.assert_close(share / share.sum(), (want / want.sum()).double(), atol=0.03, rtol=0)
    judged = task.judge(batch.input_ids[:, 2:])
    assert (judged - level).abs().mean() < 0.2
    none = torch.zeros(1, 8, dtype=torch.long)  # no word at all: the prior's mean
    torch.testing.assert_close(task.judge(none), torch.tensor([3.0], dtype=torch.float64))


def test_documents_know_their_own_likelihood():
    task = RoleDocuments(words=2, roles=1, registers=2, each=3, topic=1)
    every = torch.tensor(list(itertools.product(range(6), repeat=2))) + task.vocabulary["r1w0"]
    for role in range(3):  # the last one is nobody
        head = torch.tensor([[1, task.vocabulary["role0"] + role]]).expand(len(every), 2)
        assert task.log_likelihood(torch.cat([head, every], 1)).exp().sum() == pytest.approx(1)
    p = task.of_register[0][0] * task.of_topic[0, 0, 1]
    one = torch.tensor([[1, task.vocabulary["role0"], task.vocabulary["r1w1"], task.vocabulary["r1w1"]]])
    assert float(task.log_likelihood(one)[0]) == pytest.approx(2 * math.log(p))


def test_sentences_follow_the_grammar_and_know_their_likelihood():
    assert sum(n for n, _, _ in KINDS.values()) == 400
    for kind, following in GRAMMAR.values():
        assert kind in KINDS
        assert sum(p for _, p in following) == pytest.approx(1)
    task = Lexicon(30)
    ids = task.batch(400, generator()).input_ids
    told = task.log_likelihood(ids)
    assert told.isfinite().all()
    # Sampled entropy against the exact one: the mean of -log p over samples of a shorter text, all of which are summed.
    short = Lexicon(3)
    kinds = torch.arange(2, 402)
    pairs = torch.cartesian_prod(kinds, kinds)
    head = torch.ones(len(pairs), 1, dtype=torch.long)
    assert short.log_likelihood(torch.cat([head, pairs], 1)).exp().sum() == pytest.approx(1)
    assert (task.function.sum(), task.animate.sum()) == (28, 100)
    scrambled = ids.clone()
    scrambled[:, 1:] = ids[:, 1:].flip(1)
    assert (task.log_likelihood(scrambled) < told).double().mean() > 0.99
    counts = torch.bincount(ids.flatten(), minlength=402)[task.kind == 5].double()  # animate nouns, by rank
    assert counts[:5].sum() > counts[50:].sum()


@pytest.mark.parametrize("name", SYMBOLIC)
def test_a_testbed_is_built_and_its_batches_are_its_own(name):
    bed = SYMBOLIC[name]
    draw = bed.batches(3)
    first, again, later = draw(5), bed.batches(3)(5), draw(6)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.input_ids.shape != later.input_ids.shape or not torch.equal(first.input_ids, later.input_ids)
    assert float(first.weights.sum()) == pytest.approx(1)
    assert first.input_ids.shape[1] <= bed.positions
    model = bed.build(0).eval()
    assert model.config.vocab_size == len(bed.vocabulary)
    found = bed.gates(model, 8)
    assert not found["ready"]  # an untrained model is below every gate
    assert set(found["values"]) == set(bed.least) | set(bed.most)
