"""The gates' figures of heads, against loops over every row and key and against the atlas."""

from types import SimpleNamespace

import pytest
import torch

import regard
from regard.tasks.bytetext import VOCAB, StandardLibrary
from regard.tasks.decoder import SIZES, bits_per_byte, build, exact_match, repeated_at
from regard.tasks.gates import _copying_heads, _induction_heads, _text_heads, _weights, dense
from regard.tasks.needle import Needle
from regard.tasks.testbeds import load


@pytest.fixture(scope="module")
def model():
    return build(SIZES["smoke"], seed=1).eval()


@torch.no_grad()
def test_figures_of_heads_equal_loops(model):
    ids = repeated_at(40).batch(2, torch.Generator().manual_seed(0)).input_ids
    with dense(model):
        weights = torch.stack(list(_weights(model, ids)))  # sample, layer, head, row, key
        found = {**_text_heads(model, ids), **_induction_heads(model, ids)}
    samples, layers, heads, length, _ = weights.shape
    for layer in range(layers):
        for head in range(heads):
            w = weights[:, layer, head]
            previous = [w[s, i, i - 1] for s in range(samples) for i in range(1, length)]
            sink = [w[s, i, 0] for s in range(samples) for i in range(1, length)]
            mass, chance = [], []
            for s in range(samples):
                for i in range(length):
                    related = [j for j in range(1, i) if ids[s, j - 1] == ids[s, i]]
                    if related:
                        mass.append(sum(w[s, i, j] for j in related))
                        chance.append(len(related) / (i + 1))
            expected = {"previous_token": previous, "sink": sink, "induction": mass}
            for name, values in expected.items():
                assert found[name][layer, head].item() == pytest.approx(float(sum(values)) / len(values), rel=1e-6)
            assert found["chance"].item() == pytest.approx(sum(chance) / len(chance), rel=1e-6)


@torch.no_grad()
def test_copying_is_the_share_of_answer_tokens_whose_row_looks_at_them_in_the_needle(model):
    rates = _copying(model, n=3)
    with dense(model):
        found = _copying_heads(model, 3, torch.Generator().manual_seed(5))
    assert torch.allclose(found, rates)


def _copying(model, n):
    batch = Needle(256, split="test").batch(n, torch.Generator().manual_seed(5))
    rates = torch.zeros(2, 4, dtype=torch.double)
    with dense(model):
        for one, weights in zip(batch, _weights(model, batch.input_ids), strict=True):
            a, b = one.spans["needle"][0].tolist()
            for p in range(*one.spans["answer"][0].tolist()):
                for layer in range(2):
                    for head in range(4):
                        j = int(weights[layer, head, p - 1].argmax())
                        rates[layer, head] += a <= j < b and one.input_ids[0, j] == one.input_ids[0, p]
    return rates / (5 * n)


@torch.no_grad()
def test_the_atlas_finds_the_same_sink_and_previous_token_heads():
    decoder = load("testbed:decoder").model
    ids = StandardLibrary("test").cut(2, 192, torch.Generator().manual_seed(2))
    with dense(decoder):
        found = _text_heads(decoder, ids)
    with regard.watch(decoder) as watched:
        decoder(input_ids=ids, use_cache=False)
    for name in ("sink", "previous_token"):
        measured = torch.as_tensor(watched.atlas.measure(name).values).squeeze().double()
        assert torch.allclose(measured, found[name], atol=2e-3), name


class AlwaysRight:
    """Gives all its mass to the token that comes, but for the last token of the first few samples it sees."""

    def __init__(self, mistakes=0):
        self.mistakes = mistakes

    def __call__(self, input_ids, use_cache):
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), VOCAB).float() * 100
        if self.mistakes:
            logits[0, -2] = 0
            self.mistakes -= 1
        return SimpleNamespace(logits=logits)


class Unsure:
    """Gives every byte the same mass."""

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))


def test_exact_match_and_bits_agree_with_the_definition():
    task = Needle(256)
    ids = task.batch(20, torch.Generator().manual_seed(0)).input_ids
    one_mistake = AlwaysRight(mistakes=1)
    assert exact_match(one_mistake, task, 20, torch.Generator().manual_seed(0)) == pytest.approx(19 / 20)
    assert bits_per_byte(AlwaysRight(), ids) == pytest.approx(0, abs=1e-5)
    assert bits_per_byte(Unsure(), ids) == pytest.approx(8, rel=1e-5)
