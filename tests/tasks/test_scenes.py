"""Scenes: what is drawn, what is said of it, a solver that sees it, and probes that cannot be guessed."""

import pytest
import torch

from regard.tasks import hallucination as h
from regard.tasks.scene_text import (
    EOS,
    IMAGE,
    NO,
    VOCABULARY,
    YES,
    caption,
    caption_lesson,
    captions,
    mentions,
    positions,
    question_lesson,
    questions,
    token_classes,
)
from regard.tasks.scenes import (
    CELL,
    MEAN,
    OBJECTS,
    PAIRS,
    SPREAD,
    Scenes,
    backgrounds,
    colours,
    glyphs,
    partner_of,
    solve,
)

HOW = {"patches": 36, "patch": 4}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def number(name):
    return OBJECTS.index(name)


@pytest.fixture(scope="module")
def drawn():
    return Scenes(together=0.9, hidden=0.2).draw(600, generator())


def test_no_two_objects_look_alike_and_pairs_differ_in_shape_and_colour():
    looks = {(glyphs()[o].numpy().tobytes(), tuple(colours()[o].tolist())) for o in range(16)}
    assert len(looks) == 16
    for leader, partner in PAIRS:
        a, b = number(leader), number(partner)
        assert partner_of(a) == b
        assert not torch.equal(glyphs()[a], glyphs()[b])
        assert not torch.equal(colours()[a], colours()[b])


def test_every_object_has_a_cell_of_its_own(drawn):
    assert drawn.pixels.shape == (600, 3, 24, 24)
    for visible, corner in zip(drawn.visible, drawn.corner, strict=True):
        cells = [tuple((c // CELL).tolist()) for c in corner[visible]]
        assert len(set(cells)) == len(cells)
        assert (corner[~visible] == -1).all()
    assert ((drawn.corner[drawn.visible] % CELL) <= 1).all()


def test_only_partners_beside_their_leader_stay_undrawn(drawn):
    unseen = drawn.named & ~drawn.visible
    assert unseen.any()
    row, o = unseen.nonzero(as_tuple=True)
    assert (o % 2 == 1).all()
    assert drawn.named[row, o - 1].all()
    assert not (drawn.visible & ~drawn.named).any()
    assert drawn.named.any(1).all()
    plain = Scenes().draw(200, generator(1))
    assert torch.equal(plain.named, plain.visible)


def test_the_frequencies_are_those_asked_for():
    d = Scenes(together=0.9, hidden=0.2).draw(4000, generator(2))
    at = torch.arange(4000)
    leader, partner = d.named[at, 4 * d.context], d.named[at, 4 * d.context + 1]
    assert abs(leader.double().mean() - 0.7) < 0.04  # and a guest now and then
    assert abs(partner[leader].double().mean() - 0.9) < 0.03
    seen = d.visible[at, 4 * d.context + 1]
    assert abs(1 - seen[leader & partner].double().mean() - 0.2) < 0.03
    # What a caption's reader learns: with the leader seen and the partner not, it is named more often than not.
    assert 0.5 < partner[leader & ~seen].double().mean() < 0.75


def test_scenes_follow_from_the_generator_and_arguments_are_checked():
    a, b = (Scenes().draw(5, generator(3)) for _ in range(2))
    assert torch.equal(a.pixels, b.pixels)
    with pytest.raises(ValueError, match="hidden must be in"):
        Scenes(hidden=1.2)


def test_the_solver_reads_pictures(drawn):
    context, seen = solve(drawn.pixels)
    assert (context == drawn.context).all()
    assert (seen == drawn.visible).double().mean() > 0.999
    blank = solve((backgrounds() - MEAN) / SPREAD)[1]
    assert blank.sum() == 0


def test_patches_that_hold_an_object(drawn):
    held = drawn.held(4)
    assert held.shape == (600, 16, 36)
    assert torch.equal(held.any(-1), drawn.visible)
    assert held.sum(-1)[drawn.visible].min() >= 2
    assert held.sum(-1).max() <= 4
    row, o = (x[0].item() for x in drawn.visible.nonzero(as_tuple=True))
    y, x = (drawn.corner[row, o] + 2).tolist()  # the middle belongs to every shape
    assert held[row, o, y // 4 * 6 + x // 4]


def test_captions_name_leaders_before_partners_and_guests_last():
    words = caption(0, [number("bus"), number("saucer"), number("cup")])
    assert " ".join(words) == "a kitchen with a cup , a saucer and a bus . <eos>"
    assert " ".join(caption(3, [number("bus")])) == "a street with a bus . <eos>"
    ids = torch.tensor([VOCABULARY.ids(words) + VOCABULARY.ids(["lamp"])])
    assert mentions(ids)[0].nonzero()[:, 0].tolist() == [number("cup"), number("saucer"), number("bus")]


def test_lessons_weigh_rows_alike_and_ask_for_words_alone(drawn):
    some = drawn.pick(torch.arange(8))
    told, asked = caption_lesson(some, 36), question_lesson(some, 36, generator())
    blind = caption_lesson(some, 36, pictures=False, weight=0.2)
    for lesson, weight in ((told, 1.0), (asked, 1.0), (blind, 0.2)):
        assert torch.allclose(lesson.weights.sum(1), torch.full((8,), weight))
        assert (lesson.weights[lesson.input_ids == VOCABULARY[IMAGE]] == 0).all()
    assert (blind.input_ids != VOCABULARY[IMAGE]).all()
    assert (blind.picture == -1).all()
    assert ((told.input_ids == VOCABULARY[EOS]) & (told.weights > 0)).any(1).all()
    answers = asked.input_ids[asked.weights > 0].view(8, 4)
    assert ((answers == YES).sum(1) == 2).all()
    assert ((answers == NO).sum(1) == 2).all()
    for row, (ids, weights) in enumerate(zip(asked.input_ids, asked.weights, strict=True)):
        for at in weights.nonzero()[:, 0].tolist():
            o = int(ids[at - 2]) - VOCABULARY[OBJECTS[0]]
            assert (int(ids[at]) == YES) == bool(some.named[row, o])


@pytest.mark.parametrize("split", ["balanced", "random", "adversarial"])
def test_probes_are_balanced_true_and_not_to_be_guessed(split):
    p = h.probe_questions(200, generator(4), split=split, **HOW)
    assert p.answers.sum() == 100
    there = p.scenes.visible[torch.arange(200), p.asked]
    assert torch.equal(there, p.answers)
    own = p.asked // 4 == p.scenes.context
    if split == "balanced":
        assert own[p.answers].sum() == own[~p.answers].sum() == 50
        assert h.leak(p) < 0.6
    if split == "random":  # what an easy split gives away is found
        assert h.leak(p) > 0.75
    assert p.tokens.input_ids.shape == (200, 42)
    assert VOCABULARY.text(p.tokens.input_ids[0, 37:]) == f"is there a {OBJECTS[p.asked[0]]} ?"
    assert torch.equal(p.tokens.groups["object"].any(1), p.answers)
    if split == "adversarial":
        other = p.scenes.visible[torch.arange(200), p.asked ^ 1]
        assert torch.equal(other, ~p.answers)


def test_a_task_whose_names_give_answers_away_is_found_out():
    d = Scenes(together=0.5).draw(400, generator(5))
    asked = torch.where(torch.arange(400) % 2 == 0, 0, 1)
    told = questions(d, asked, asked == 0, 36, 4)
    assert h.leak(told) == 1.0


def test_balanced_lessons_pair_answers_within_contexts(drawn):
    some = drawn.pick(torch.arange(200))
    lesson = question_lesson(some, 36, generator(1), balanced=True)
    at = (lesson.weights > 0).nonzero()[:, 1].view(200, 4)
    answers = lesson.input_ids.gather(1, at)
    own = (lesson.input_ids.gather(1, at - 2) - VOCABULARY[OBJECTS[0]]) // 4 == some.context[:, None]
    assert ((answers == YES).sum(1) == 2).all()
    both = (own & (answers == YES)).sum(1) == (own & (answers == NO)).sum(1)
    assert both.double().mean() > 0.65  # where every object of the context is named, none is left to deny
    plain = question_lesson(some, 36, generator(1))
    at = (plain.weights > 0).nonzero()[:, 1].view(200, 4)
    own = (plain.input_ids.gather(1, at - 2) - VOCABULARY[OBJECTS[0]]) // 4 == some.context[:, None]
    yes = plain.input_ids.gather(1, at) == YES
    assert own[yes].double().mean() > 0.6 > 0.3 > own[~yes].double().mean()


def test_the_solver_answers_all_probes():
    p = h.probe_questions(100, generator(6), **HOW)
    _, seen = solve(p.scenes.pixels)
    assert (seen[torch.arange(100), p.asked] == p.answers).double().mean() > 0.98


def test_classes_of_tokens_are_a_partition():
    p = h.probe_questions(60, generator(7), **HOW)
    yes = p.pick(p.answers.nonzero()[:, 0])
    classes = token_classes(yes)
    assert list(classes) == ["early visual", "object visual", "late visual", "early textual", "object textual", "last"]
    assert (sum(m.int() for m in classes.values()) == 1).all()
    places = positions(classes["object visual"])
    assert len({len(row) for row in places}) == 1
    for row, mask in zip(places, classes["object visual"], strict=True):
        assert sorted(set(row)) == mask.nonzero()[:, 0].tolist()
    with pytest.raises(ValueError, match="pick those that are to be answered yes"):
        token_classes(p)
    with pytest.raises(ValueError, match="ask for no object"):
        token_classes(captions(p.scenes, 36))
    with pytest.raises(ValueError, match="1 of 2 samples"):
        positions(torch.tensor([[True], [False]]))


def test_pope_and_chair_by_hand():
    margins = torch.tensor([1.0, -1.0, 2.0, -2.0])
    figures = h.pope(margins, torch.tensor([True, True, False, False]))
    assert (figures["accuracy"], figures["precision"], figures["recall"], figures["yes_rate"]) == (0.5, 0.5, 0.5, 0.5)
    assert figures["auroc"] == 0.5
    assert h.auroc(torch.tensor([1.0, 1.0]), torch.tensor([True, False])) == 0.5
    d = Scenes().draw(1, generator(8))
    there = d.visible[0].nonzero()[:, 0].tolist()
    missing = next(o for o in range(16) if o not in there)
    words = torch.tensor([VOCABULARY.ids([*(OBJECTS[o] for o in there), OBJECTS[missing], EOS])])
    table = h.counts(words, d)
    assert table.tolist() == [[1, len(there) + 1, len(there), len(there)]]
    found = h.chair(words, d)
    assert found["recall"] == 1
    assert found["chair_s"] == 1
    assert found["exact"] == 0
    assert found["chair_i"] == pytest.approx(1 / (len(there) + 1))
    assert found["f1"] == pytest.approx(2 * len(there) / (2 * len(there) + 1))


def test_the_stop_curve_is_read_between_its_points():
    curve = [(0.2, 0.1), (0.8, 0.3)]
    assert h.on_curve(curve, 0.5) == pytest.approx(0.2)
    assert h.on_curve(curve, 0.9) != h.on_curve(curve, 0.9)  # NaN


def test_probes_refuse_what_they_cannot_balance():
    with pytest.raises(ValueError, match="n must be even"):
        h.probe_questions(3, generator(), **HOW)
    with pytest.raises(ValueError, match="split must be"):
        h.probe_questions(4, generator(), split="popular", **HOW)
