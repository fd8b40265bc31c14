"""A small trainer: any model, any batches, checkpoints without pickle, the same weights after an interruption."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard.train.auxiliary import clear_aux, collect_aux

History = list[dict[str, float]]


class Interrupted(Exception):
    """Training stopped at a signal; its checkpoint is written and the same call goes on from it."""


class WeightedIds(Protocol):
    """What the trainer reads of a batch: tokens and what predicting each of them counts."""

    @property
    def input_ids(self) -> Int[Tensor, "batch length"]:
        """The tokens."""
        ...

    @property
    def weights(self) -> Float[Tensor, "batch length"]:
        """What predicting each counts."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a run steps: warm-up, a constant rate, a linear decay over the last steps (so that a shorter run is the same
    run up to its decay), Muon for the hidden matrices and AdamW for the rest.

    Args:
        steps: optimizer steps in all.
        lr: greatest learning rate of AdamW, and of Muon in AdamW's units (its updates are scaled to AdamW's size).
        warmup, decay: steps of the linear rise and of the final linear fall to ``floor * lr``.
        weight_decay: decoupled, on the hidden matrices alone.
        clip: greatest norm of the gradient.
        autocast: matrix products in bfloat16 (weights, gradients and states stay float32).
        muon: False steps everything with AdamW.
    """

    steps: int
    lr: float = 3e-3
    warmup: int = 100
    decay: int = 0
    floor: float = 0.02
    weight_decay: float = 0.05
    clip: float = 1.0
    autocast: bool = False
    muon: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup + decay must be in 0..steps = {self.steps}, got {self.warmup} + {self.decay}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of lr."""
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        left = self.steps - step
        fall = self.floor + (1 - self.floor) * left / self.decay if left < self.decay else 1.0
        return min(rise, fall)


def token_loss(model: nn.Module, batch: WeightedIds, **how: Tensor) -> Tensor:
    """``sum_p w_p CE(logits_(p-1), x_p) / sum_p w_p`` over the tokens p >= 1 of a causal language model.

    ``how`` goes to the model beside the ids.
    """
    logits = model(input_ids=batch.input_ids, use_cache=False, **how).logits[:, :-1].float()
    weights = batch.weights[:, 1:]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    return (each * weights.flatten()).sum() / weights.sum()


class Trainer:
    """Steps a model over ``batches(step)``.

    What layers leave in ``aux`` (see `regard.train.auxiliary`) is added to the loss; the history has its sum by name,
    ``aux/NAME``, beside the loss without it.

    The batch of a step is a function of the step alone, and a checkpoint holds weights, optimizer states and the
    history: a run that was interrupted ends with the bits of one that was not (same machine, same threads).

    Args:
        model: trained in place.
        batches: the batch of a step.
        recipe: rates and lengths.
        out: folder of the checkpoints ``step-N`` (the last one is kept); None keeps nothing and stops at a signal as
            any Python does.
        loss: of a model and a batch.
        evaluate: figures of the model, called every ``evaluate_every`` steps and at the end; they go to the history.
        checkpoint_every: steps between checkpoints.
        on_step: told (step, entry of the history) after every step.
        run_name: what makes this run this one (data, shape, seed); checkpoints of another name are not taken up.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], Any],
        recipe: Recipe,
        out: Path | None,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = token_loss,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        evaluate_every: int = 200,
        checkpoint_every: int = 200,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        run_name: str = "",
    ) -> None:
        self.model, self.batches, self.recipe, self.loss = model, batches, recipe, loss
        self.out = None if out is None else Path(out)
        self.evaluate, self.evaluate_every, self.checkpoint_every = evaluate, evaluate_every, checkpoint_every
        self.on_step, self.run_name = on_step, run_name
        self.step = 0
        self.seconds = 0.0
        self.history: History = []
        self.starts: list[dict[str, int]] = []  # where a call of run took up the work, and with how many threads
        self.optimizers = _optimizers(model, recipe)

    def run(self) -> History:
        """Trains from the last checkpoint (or the start) to the end; returns the history.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the checkpoint of the step under way.
            FloatingPointError: where the loss is not finite.
        """
        if self.out is not None:
            self.restore()
        self.starts.append({"step": self.step, "threads": torch.get_num_threads()})
        with _signals(caught=self.out is not None) as stop:
            while self.step < self.recipe.steps:
                began = time.perf_counter()
                entry = self._one_step()
                self.step += 1
                if self.evaluate and (self.step % self.evaluate_every == 0 or self.step == self.recipe.steps):
                    self.model.eval()
                    with torch.no_grad():
                        entry |= self.evaluate(self.model)
                self.seconds += time.perf_counter() - began
                self.history.append(entry | {"seconds": round(self.seconds, 1)})
                if self.on_step:
                    self.on_step(self.step, self.history[-1])
                due = self.step % self.checkpoint_every == 0 or self.step == self.recipe.steps
                if self.out is not None and (stop.is_set() or due):
                    self.save()
                if stop.is_set() and self.step < self.recipe.steps:
                    raise Interrupted(f"stopped after step {self.step} of {self.recipe.steps}; {self.out} goes on")
        self.model.eval()
        return self.history

    def _one_step(self) -> dict[str, float]:
        self.model.train()
        batch = self.batches(self.step)
        device = next(self.model.parameters()).device.type
        clear_aux(self.model)
        with torch.autocast(device, torch.bfloat16, enabled=self.recipe.autocast):
            loss = self.loss(self.model, batch)
        extra = collect_aux(self.model)
        total = sum(extra.values(), start=loss)
        if not math.isfinite(total.item()):
            told = "".join(f", aux {name} {value.item()}" for name, value in extra.items())
            raise FloatingPointError(f"the loss of step {self.step} is {loss.item()}{told}")
        total.backward()
        clear_aux(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        rate = self.recipe.rate(self.step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * self.recipe.lr
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        entry = {"step": self.step + 1, "loss": loss.item(), "grad_norm": norm.item(), "rate": rate}
        return entry | {f"aux/{name}": value.item() for name, value in extra.items()}

    def _folder(self) -> Path:
        if self.out is None:
            raise ValueError("out is None, so this trainer keeps no checkpoints; name a folder")
        return self.out

    def save(self) -> Path:
        """Writes the checkpoint beside the last one, then removes that: killed at any time, one is whole."""
        folder = self._folder()
        target = folder / f"step-{self.step:06d}"
        draft = folder / f"draft-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        # Copies: tied weights share memory, which the format refuses.
        weights = {k: v.clone(memory_format=torch.contiguous_format) for k, v in self.model.state_dict().items()}
        save_file(weights, draft / "model.safetensors")
        tensors: dict[str, Tensor] = {}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"{name}.{index}.{key}"] = torch.as_tensor(value).contiguous()
        save_file(tensors, draft / "optimizer.safetensors")
        state = {
            "run_name": self.run_name,
            "step": self.step,
            "seconds": self.seconds,
            "starts": self.starts,
            "history": self.history,
        }
        (draft / "state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        for old in folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old)
        return target

    def restore(self) -> None:
        """Takes up the last checkpoint in ``out``, if there is one.

        Raises:
            ValueError: it belongs to another run, or is past this recipe's end.
        """
        folder = self._folder()
        for draft in folder.glob("draft-*"):  # of a process killed while writing
            shutil.rmtree(draft)
        found = sorted(p for p in folder.glob("step-*") if (p / "state.json").exists())
        if not found:
            return
        state = json.loads((found[-1] / "state.json").read_text())
        if state["run_name"] != self.run_name:
            raise ValueError(
                f"{found[-1]} belongs to {state['run_name']!r}, this run is {self.run_name!r}; name another folder"
            )
        if state["step"] > self.recipe.steps:
            raise ValueError(f"{found[-1]} is past the recipe's {self.recipe.steps} steps; name another folder")
        self.model.load_state_dict(load_file(found[-1] / "model.safetensors"))
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.optimizers}
        for key, value in load_file(found[-1] / "optimizer.safetensors").items():
            name, index, field = key.split(".", 2)
            states[name].setdefault(int(index), {})[field] = value
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states[name], "param_groups": groups})
        self.step, self.seconds = state["step"], state["seconds"]
        self.starts, self.history = state["starts"], state["history"]


def _optimizers(model: nn.Module, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for embeddings, heads, norms and biases."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named: Any = getattr(model, "get_output_embeddings", None)
    head = named() if named is not None else None
    if head is not None:
        ends.add(id(head.weight))
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.ndim == 2 and id(p) not in ends]
    rest = [p for p in trained if p.ndim != 2 or id(p) in ends]
    decay = recipe.weight_decay
    found: dict[str, torch.optim.Optimizer] = {}
    if hidden and recipe.muon:
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise RuntimeError(f"torch {torch.__version__} has no torch.optim.Muon (2.9 and later do); set muon=False")
        found["muon"] = muon(hidden, lr=recipe.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": rest, "weight_decay": 0.0}]
    if not recipe.muon:
        groups.insert(0, {"params": hidden, "weight_decay": decay})
    groups = [g for g in groups if g["params"]]
    if groups:
        found["adamw"] = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-10)
    return found


@contextmanager
def _signals(caught: bool = True) -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into an event while training (in the main thread; elsewhere signals do not arrive)."""
    stop = threading.Event()
    if not caught or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
