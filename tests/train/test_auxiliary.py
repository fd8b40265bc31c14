"""Auxiliary losses: layers leave them, the trainer adds them once, and what does not fit is named."""

import pytest
import torch
from torch import nn

from regard.train.auxiliary import clear_aux, collect_aux
from regard.train.simple import fit
from regard.train.trainer import Recipe, Trainer


class Shrinking(nn.Module):
    """A layer that asks for small weights beside what its model asks for."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.weight, self.factor, self.aux = nn.Parameter(torch.tensor([2.0, -3.0])), factor, {}

    def forward(self, x):
        self.aux["size"] = self.factor * self.weight.square().sum()
        return x * self.weight


def model(*factors):
    return nn.Sequential(*(Shrinking(f) for f in factors))


def test_they_are_summed_by_name_over_layers():
    net = model(1.0, 10.0)
    assert collect_aux(net) == {}
    net(torch.ones(2))
    found = collect_aux(net)
    assert found.keys() == {"size"}
    assert found["size"].item() == pytest.approx(13 + 130)
    clear_aux(net)
    assert collect_aux(net) == {}


def test_the_trainer_adds_them_and_tells_them_apart():
    x = torch.ones(2)

    def loss(net, batch):
        return net(batch).square().sum()

    def grads(add):
        net = model(0.5)
        total = loss(net, x) + sum(collect_aux(net).values()) if add else loss(net, x)
        total.backward()
        return net[0].weight.grad

    seen = []
    net = model(0.5)
    net[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    history = Trainer(net, lambda step: x, Recipe(1, 0.1, warmup=0, muon=False), None, loss=loss).run()
    torch.testing.assert_close(seen[0], grads(add=True))
    assert not torch.allclose(seen[0], grads(add=False))
    assert history[0]["loss"] == pytest.approx(13.0)  # of the model alone
    assert history[0]["aux/size"] == pytest.approx(6.5)
    assert collect_aux(net) == {}  # no graph is kept


def test_what_an_earlier_pass_left_is_not_added():
    net = model(1.0)
    net(torch.ones(2))  # outside of training: its graph is old, and used up below
    sum(collect_aux(net).values()).backward()
    fit(net, lambda m, b: m[0].weight.sum() * 0 + b.sum(), lambda g: torch.ones(2), 2, warmup=0)


def test_a_loss_that_is_not_finite_says_which_part():
    with pytest.raises(FloatingPointError, match=r"loss of step 0 is 13\.0, aux size inf"):
        fit(model(torch.inf), lambda m, b: m(b).square().sum(), lambda g: torch.ones(2), 1)


def test_what_is_no_scalar_is_refused():
    net = model(1.0)
    net[0].aux["size"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"aux\['size'\] of '0' must be a scalar tensor, got \[2\]"):
        collect_aux(net)
    net[0].aux["size"] = 1.0
    with pytest.raises(ValueError, match="got float"):
        collect_aux(net)
