"""`fit`: it learns, is a function of its seed, leaves the global generators alone and writes nothing."""

import pytest
import torch
from torch import nn

from regard.train.simple import fit
from regard.train.trainer import Recipe, Trainer


def model(seed=0, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


def batch(generator):
    x = torch.randn(32, 4, generator=generator)
    return x, x[:, :1] * x[:, 1:2]


def squared(net, drawn):
    return (net(drawn[0]) - drawn[1]).square().mean()


def test_it_learns():
    net = model()
    losses = fit(net, squared, batch, 300, 1e-2)
    assert len(losses) == 300
    assert losses[0] > 0.5
    assert sum(losses[-20:]) / 20 < 0.1
    assert not net.training


def test_equal_arguments_end_with_equal_weights_and_another_seed_does_not():
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))  # the global seed is of no account
        net = model(dropout=0.2)
        fit(net, squared, batch, 5, seed=seed)
        runs.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_global_generator_is_left_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(model(dropout=0.5), squared, batch, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rate_warms_up_and_decays():
    rates = []
    fit(model(), squared, batch, 10, 1e-2, warmup=2, decay=4, on_step=lambda _, entry: rates.append(entry["rate"]))
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:6] == [1.0] * 4
    assert rates[-1] < rates[-2] < 1.0


def test_nothing_is_written_and_a_loss_that_is_not_finite_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(model(), squared, batch, 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(model(), lambda net, drawn: squared(net, drawn) * float("nan"), batch, 2)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        fit(model(), squared, batch, 0)


def test_a_trainer_without_a_folder_refuses_to_save():
    trainer = Trainer(model(), lambda step: batch(torch.Generator().manual_seed(step)), Recipe(3, warmup=0), None)
    for call in (trainer.save, trainer.restore):
        with pytest.raises(ValueError, match="out is None"):
            call()
