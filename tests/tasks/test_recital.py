"""Strings to be known by heart: only having seen them tells them, each is seen equally often, the gate counts."""

import pytest
import torch

from regard.tasks import recital
from regard.tasks.batch import IGNORED
from regard.tasks.bytetext import BOS, StandardLibrary
from regard.tasks.recital import SIGNS, SIZES, RandomStrings, RecitalMixture, recitation


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_strings_are_what_they_say():
    task = RandomStrings(50, length=20, recited=6)
    batch = task.whole()
    assert batch.input_ids.shape == (50, 21)
    assert (batch.input_ids[:, 0] == BOS).all()
    assert set(batch.input_ids[:, 1:].flatten().tolist()) <= set(SIGNS)
    assert (batch.labels[:, :-6] == IGNORED).all()
    torch.testing.assert_close(batch.labels[:, -6:], batch.input_ids[:, -6:])
    assert batch.spans["answer"].tolist() == [[15, 21]] * 50
    assert torch.equal(batch.input_ids, task.whole().input_ids)
    assert not torch.equal(batch.input_ids, RandomStrings(50, length=20, recited=6, seed=1).whole().input_ids)


def test_the_solver_recites_learned_strings_and_no_others():
    task = RandomStrings()
    for row in task.batch(5, seeded()).input_ids:
        assert torch.equal(task.solve(row[:-16]), row[-16:])
    with pytest.raises(ValueError, match="prompt starts none of the 100 strings"):
        task.solve(RandomStrings(split="other").whole().input_ids[0, :-16])


def test_nothing_leaks():
    """No string in the text, none in both splits, and signs uniform wherever they are asked for."""
    learned, other = (RandomStrings(1000, split=s).whole() for s in ("learned", "other"))
    strings = [bytes(row[1:].tolist()) for batch in (learned, other) for row in batch.input_ids]
    assert len(set(strings)) == 2000
    text = StandardLibrary("test").data.tobytes() + StandardLibrary().data[:2_000_000].tobytes()
    assert not any(s[-16:] in text for s in strings[:50])
    counts = torch.stack([(learned.input_ids[:, -16:] == sign).sum() for sign in SIGNS]).double()
    expected = 16_000 / len(SIGNS)
    assert float(((counts - expected) ** 2 / expected).sum()) < 70  # chi square of 35 degrees: 0.04% above


def test_every_string_is_seen_as_often_as_said():
    size = SIZES["smoke"]
    mixture = RecitalMixture(size, 0)
    seen = torch.zeros(size.strings, dtype=torch.long)
    for step in range(size.steps):
        batch = mixture(step)
        rows, weights = batch.input_ids, batch.weights
        assert len(rows) == size.text + size.strings // size.every
        torch.testing.assert_close(weights[: size.text].sum(), weights[size.text :].sum())
        seen += (rows[:, None] == mixture.ids[None]).all(-1).sum(0)
    assert seen.tolist() == [size.seen] * size.strings
    assert torch.equal(mixture(3).input_ids, RecitalMixture(size, 0)(3).input_ids)
    assert SIZES["full"].steps == SIZES["full"].shape.recipe.steps


class Knows(torch.nn.Module):
    """Answers with the strings it knows; of others, all but the last byte."""

    def __init__(self, known):
        super().__init__()
        self.known, self.one = known, torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache=None):
        logits = torch.zeros(*input_ids.shape, 259)
        following = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1).clone()
        known = (input_ids[:, None] == self.known[None]).all(-1).any(1)
        following[~known, -2] = 0
        logits.scatter_(-1, following[..., None], 1.0)
        return type("Out", (), {"logits": logits})


def test_recitation_counts_whole_ends():
    batch = RandomStrings(10).whole()
    found = recitation(Knows(batch.input_ids[:4]), batch, chunk=3)
    assert found.tolist() == [True] * 4 + [False] * 6


def test_gates_say_what_was_measured():
    model = recital.build(SIZES["smoke"], 0).eval()
    found = recital.gates(model, SIZES["smoke"], rows=2)
    assert found["values"]["recitation"] == found["values"]["other"] == 0
    assert 7 < found["values"]["text_bits"] < 9  # untrained: log2 259
    assert not found["ready"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="recited must be in"):
        RandomStrings(length=8, recited=8)
    with pytest.raises(ValueError, match="split must be"):
        RandomStrings(split="train")
    with pytest.raises(ValueError, match="every must divide the 7 strings"):
        RecitalMixture(recital.RecitalSize(SIZES["smoke"].shape, 7, every=2), 0)
