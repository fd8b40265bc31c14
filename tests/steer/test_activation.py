"""Steering edits against the formulas, on a small decoder."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.steer import directions
from regard.steer.activation import add_direction, remove_at_each, remove_directions, take_elsewhere
from regard.watch.intervene import Site, trace

SITE = Site(0, "resid_post")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


def states(model, edits=()):
    ids = torch.arange(10).view(2, 5)
    return trace(model, {"input_ids": ids}, SITE, edits=edits)[SITE]


def test_a_direction_is_added_in_units_of_the_scale(model):
    d = torch.randn(8)
    moved = states(model, add_direction(SITE, d, -2, scale=3.0)) - states(model)
    torch.testing.assert_close(moved, (-6 * d / d.norm()).expand_as(moved), atol=1e-5, rtol=1e-5)


def test_every_sample_may_have_a_direction_of_its_own(model):
    d = torch.randn(2, 1, 8)
    moved = states(model, add_direction(SITE, d, 0.5)) - states(model)
    torch.testing.assert_close(moved, (0.5 * d / d.norm(dim=-1, keepdim=True)).expand_as(moved), atol=1e-5, rtol=1e-5)


def test_removal_is_the_formula_and_leaves_the_mean(model):
    x = states(model)
    basis, mean = directions.gram_schmidt(torch.randn(3, 8)), x.mean((0, 1))
    for around in (None, mean):
        removed = states(model, remove_directions(SITE, basis, around))
        torch.testing.assert_close(removed, directions.remove(x, basis, around), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(removed.mean((0, 1)), mean, atol=1e-5, rtol=1e-5)


def test_they_steer(model):
    ids = torch.arange(10).view(2, 5)
    plain = model(ids).logits
    with regard.steer(model, add_direction(SITE, torch.ones(8), 4)):
        assert (model(ids).logits - plain).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, plain)


def test_what_points_nowhere_is_refused():
    with pytest.raises(ValueError, match="direction has length 0"):
        add_direction(SITE, torch.zeros(8), 1)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        add_direction(SITE, torch.ones(8), 1, scale=0)


def test_removal_at_each_layer_says_what_it_takes_and_the_control_takes_as_much(model):
    inputs = {"input_ids": torch.arange(10).view(2, 5)}
    sites = [Site(layer, "resid_post", pos=-1) for layer in range(2)]
    bases = [directions.gram_schmidt(torch.randn(2, 8)) for _ in sites]
    means = [torch.randn(8) for _ in sites]
    edits, taken = remove_at_each(model, inputs, sites, bases, means)
    plain, removed = trace(model, inputs, sites), trace(model, inputs, sites, edits=edits)
    torch.testing.assert_close(taken[0], (plain[sites[0]] - means[0]) @ bases[0].T, atol=1e-5, rtol=1e-5)
    for site, basis, mean in zip(sites, bases, means, strict=True):
        torch.testing.assert_close((removed[site] - mean) @ basis.T, torch.zeros(2, 2), atol=1e-5, rtol=0)
    before = trace(model, inputs, sites[1], edits=edits[:2])[sites[1]]
    torch.testing.assert_close(taken[1], (before - means[1]) @ bases[1].T, atol=1e-5, rtol=1e-5)

    control = take_elsewhere(sites, taken, 8, torch.Generator().manual_seed(0))
    for edit, amount in zip(control, taken, strict=True):
        torch.testing.assert_close(edit.value.norm(dim=-1), amount.norm(dim=-1), atol=1e-5, rtol=1e-5)
