"""A decoder learns from its own answers, and does not where nothing is rewarded."""

import copy

import pytest
import torch

from regard.models.decoder import Decoder
from regard.train.policy import Policy, grpo


def echo(seed):
    """Answer the token shown: 0 -> 1, 1 -> 2, ..."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(5, 16, 1, 2)


def questions(n, generator):
    return torch.randint(5, (n, 1), generator=generator)


def right(ids):
    return ids[:, 1] == (ids[:, 0] + 1) % 5


def test_rewarded_answers_become_likely():
    model = echo(0)
    rewards = grpo(model, questions, right, 2, Policy(60, 8, 8, lr=1e-2))
    assert len(rewards) == 60
    assert sum(rewards[:5]) / 5 < 0.5 < sum(rewards[-5:]) / 5
    again = echo(0)
    assert grpo(again, questions, right, 2, Policy(60, 8, 8, lr=1e-2)) == rewards


def test_equal_rewards_change_nothing_and_credit_is_used():
    model, seen = echo(1), []
    before = copy.deepcopy(model.state_dict())
    grpo(model, questions, lambda ids: torch.ones(len(ids)), 2, Policy(3, 2, 4))
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)

    def nothing(model, ids, generator):
        seen.append(tuple(ids.shape))
        return torch.zeros(len(ids), 2)

    grpo(model, questions, right, 2, Policy(3, 2, 4), credit=nothing)
    assert seen == [(8, 3)] * 3
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="group >= 2"):
        Policy(3, 2, 1)
