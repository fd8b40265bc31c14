"""Draws: the model's own distribution, reproducible by the caller's numbers, and edited where it is steered."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.tasks.sampling import sample
from regard.watch.intervene import Edit, Site, intervene


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=5, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    network = LlamaForCausalLM(config).eval()
    network.lm_head.weight.data.mul_(20)
    return network


PROMPT = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_they_are_likely(model, temperature):
    numbers = (torch.arange(1000) + 0.5).div(1000)[:, None]
    drawn = sample(model, PROMPT.expand(1000, -1), numbers, temperature=temperature)
    p = (model(PROMPT).logits[0, -1].double() / temperature).softmax(-1)
    share = torch.bincount(drawn[:, 0], minlength=5) / 1000
    assert (share - p).abs().max() <= 1.01e-3


def test_later_tokens_follow_from_the_earlier_ones(model):
    numbers = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    drawn = sample(model, PROMPT.expand(6, -1), numbers)
    whole = torch.cat([PROMPT.expand(6, -1), drawn], 1)
    total = model(whole).logits.double().softmax(-1).cumsum(-1)[:, 2:-1]
    below = torch.where(drawn > 0, total.gather(-1, (drawn - 1).clamp(min=0)[..., None])[..., 0], 0)
    at = total.gather(-1, drawn[..., None])[..., 0]
    assert ((below - 1e-6 <= numbers) & (numbers <= at + 1e-6)).all()


def test_only_tokens_that_may_come(model):
    among = torch.tensor([False, True, False, True, False])
    drawn = sample(model, PROMPT.expand(50, -1), torch.rand(50, 3), among=among)
    assert set(drawn.flatten().tolist()) <= {1, 3}
    assert sample(model, PROMPT, torch.full((1, 1), 1 - 1e-7), among=among).item() == 3


def test_edits_act_at_every_step(model):
    push = Edit(Site(None, "logits"), "add", value=torch.tensor([0.0, 0, 0, 0, 1e4]))
    with intervene(model, push):
        assert (sample(model, PROMPT.expand(3, -1), torch.rand(3, 4)) == 4).all()


def test_what_cannot_be_drawn_is_refused(model):
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        sample(model, PROMPT, torch.rand(1, 1), temperature=0)
    with pytest.raises(ValueError, match="a row a prompt, 1, got 2"):
        sample(model, PROMPT, torch.rand(2, 1))
    assert sample(model, PROMPT, torch.rand(1, 0)).shape == (1, 0)
