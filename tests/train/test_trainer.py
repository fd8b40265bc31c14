"""The trainer learns, stops, goes on with the same bits, and writes nothing that is pickled."""

import json
import os
import signal
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from regard.train.trainer import Interrupted, Recipe, Trainer, token_loss

RECIPE = Recipe(steps=12, lr=1e-2, warmup=3, decay=4)


@dataclass
class Ids:
    input_ids: torch.Tensor
    weights: torch.Tensor


class Tiny(nn.Module):
    """A causal model of one hidden matrix, with the call signature and output of transformers' ones."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(torch.tanh(self.hidden(self.embed(input_ids)))))


def tiny(seed=0, tied=False):
    torch.manual_seed(seed)
    return Tiny(tied)


def counting(step):
    """Sequences in which every token is the one before plus one."""
    start = torch.randint(11, (8, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + torch.arange(6)) % 11
    return Ids(ids, torch.ones(ids.shape))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns(tmp_path):
    history = Trainer(tiny(), counting, replace(RECIPE, steps=150), tmp_path).run()
    assert [h["step"] for h in history] == list(range(1, 151))
    assert history[0]["loss"] > 2
    assert history[-1]["loss"] < 0.2


@pytest.mark.parametrize(
    ("stop", "muon", "tied"),
    [(1, True, False), (5, True, False), (9, True, True), (1, False, True), (5, False, False), (9, False, False)],
)
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, stop, muon, tied):
    recipe = replace(RECIPE, muon=muon)
    whole = tiny(tied=tied)
    history = Trainer(whole, counting, recipe, tmp_path / "whole").run()

    def interrupt(step, _):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"step {stop} of 12"):
        Trainer(tiny(tied=tied), counting, recipe, tmp_path / "cut", on_step=interrupt).run()
    resumed = tiny(seed=1, tied=tied)  # whatever it starts with is replaced
    again = Trainer(resumed, counting, recipe, tmp_path / "cut").run()
    assert same(weights(whole), weights(resumed))
    assert [h["loss"] for h in again] == [h["loss"] for h in history]
    found = json.loads((tmp_path / "cut" / "step-000012" / "state.json").read_text())["starts"]
    assert [start["step"] for start in found] == [0, stop]


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    Trainer(tiny(), counting, RECIPE, tmp_path).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_checkpoint_half_written_is_not_taken_up(tmp_path):
    Trainer(tiny(), counting, RECIPE, tmp_path, checkpoint_every=5).run()
    (tmp_path / "step-000099").mkdir()  # no state.json: not a checkpoint
    (tmp_path / "draft-1").mkdir()  # of a process killed while writing
    trainer = Trainer(tiny(), counting, RECIPE, tmp_path)
    trainer.restore()
    assert trainer.step == 12
    assert not (tmp_path / "draft-1").exists()
    found = [p.name for p in (tmp_path / "step-000012").iterdir()]
    assert sorted(found) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((tmp_path / "step-000012" / "state.json").read_text())["step"] == 12


def test_a_shorter_recipe_is_the_same_run_up_to_its_decay(tmp_path):
    long = Trainer(tiny(), counting, RECIPE, tmp_path / "long").run()
    short = Trainer(tiny(), counting, replace(RECIPE, steps=9), tmp_path / "short").run()
    assert [h["loss"] for h in long[:6]] == [h["loss"] for h in short[:6]]  # 5 steps, the 6th loss is before its step
    assert long[8]["loss"] != short[8]["loss"]


def test_the_rate_rises_stays_and_falls():
    rates = [RECIPE.rate(s) for s in range(12)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[3:9] == [1.0] * 6
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert RECIPE.floor < rates[11] < 0.5


def test_evaluation_goes_to_the_history(tmp_path):
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"figure": 7.0}

    history = Trainer(tiny(), counting, RECIPE, tmp_path, evaluate=evaluate, evaluate_every=5).run()
    assert [h["step"] for h in history if "figure" in h] == [5, 10, 12]
    assert modes == [(False, False)] * 3


def test_token_loss_counts_weights_alone():
    model = tiny()
    batch = counting(0)
    halved = Ids(batch.input_ids, torch.zeros_like(batch.weights))
    halved.weights[:, 3] = 2.0
    logits = model(batch.input_ids).logits[:, 2].double()
    expected = -torch.log_softmax(logits, -1)[torch.arange(8), batch.input_ids[:, 3]].mean()
    assert token_loss(model, halved).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="step 0"):
        Trainer(tiny(), counting, RECIPE, tmp_path, loss=lambda m, b: token_loss(m, b) * float("nan")).run()


def test_recipes_and_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="warmup"):
        Recipe(steps=5, warmup=4, decay=4)
    with pytest.raises(ValueError, match="steps"):
        Recipe(steps=0)
    Trainer(tiny(), counting, RECIPE, tmp_path).run()
    with pytest.raises(ValueError, match="belongs to '', this run is 'other'"):
        Trainer(tiny(), counting, RECIPE, tmp_path, run_name="other").run()
    with pytest.raises(ValueError, match="past the recipe"):
        Trainer(tiny(), counting, replace(RECIPE, steps=8), tmp_path).run()
