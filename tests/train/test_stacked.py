"""Stacked training: every model goes as it would alone under PyTorch's AdamW."""

import copy

import pytest
import torch
from torch import nn

from regard.train.stacked import fit_stacked

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sin().sum(1, keepdim=True)


def made(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def test_each_model_goes_as_it_would_alone():
    models, decays = [made(0), made(1), made(1)], [0.0, 1.0, 0.1]
    alone = copy.deepcopy(models)
    seen = []
    losses = fit_stacked(models, loss, (X, Y), 30, 1e-2, decays, on_step=lambda n, v: seen.append((n, float(v[0]))))
    assert losses.shape == (30, 3)
    assert [n for n, _ in seen] == list(range(1, 31))
    for i, (model, decay) in enumerate(zip(alone, decays, strict=True)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=decay)
        for step in range(30):
            value = loss(model, (X, Y))
            assert float(losses[step, i]) == pytest.approx(value.item(), rel=1e-9)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        for mine, theirs in zip(models[i].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert not torch.equal(models[1][0].weight, models[2][0].weight)


def test_refusals():
    with pytest.raises(ValueError, match="decays must be one for each of 2 models, got 1"):
        fit_stacked([made(0), made(1)], loss, (X, Y), 1, 1e-2, [0.0])
    with pytest.raises(FloatingPointError, match="loss at step 0 must be finite"):
        fit_stacked([made(0)], loss, (X, Y * float("nan")), 1, 1e-2, [0.0])
