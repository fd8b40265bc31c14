"""Testbeds over symbols: small decoders of transformers' own classes, each trained on tasks of this folder.

`regard train NAME` makes one and measures its gates; see `regard.tasks.testbeds`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from regard.tasks.arith import Arith3
from regard.tasks.batch import Batch
from regard.tasks.conflict import Conflict
from regard.tasks.decoder import Weighted, exact_match
from regard.tasks.lexicon import Lexicon
from regard.tasks.lists import LONGEST, ColouredObjects, EveryColour, IndirectObject, vocabulary
from regard.tasks.maps import ContextMaps
from regard.tasks.numbers import NumberTasks
from regard.tasks.repeated import RepeatedTokens
from regard.tasks.role_documents import RoleDocuments
from regard.tasks.words import Vocabulary
from regard.train.trainer import Recipe

__all__ = ["SYMBOLIC", "Symbolic"]

#: Seed of the sequences that gates are measured on; training draws other ones.
GATE_SEED = 20_000_003


@dataclass(frozen=True)
class Symbolic:
    """One such testbed.

    Args:
        tasks: what it learns; every step draws one of them. Each has `vocabulary` and `batch(n, generator)`.
        rows: sequences a step.
        layers, dim, heads: of the network; the MLP is three times as wide.
        positions: longest sequence.
        learned: learned positions (a GPT-2) instead of rotary ones (a Llama).
        lessons: what it learns first, ((until, tasks), ...): steps before `until` draw one of those tasks.
        start: the testbed whose weights it goes on from; None: it begins untrained.
        recipe: of the training.
        measure: (model, sequences) -> the figures that are gates.
        least, most: what they must reach, and must not exceed.
    """

    tasks: tuple[Any, ...]
    rows: int
    layers: int
    dim: int
    heads: int
    positions: int
    recipe: Recipe
    measure: Callable[[Any, int], dict[str, float]]
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    learned: bool = False
    lessons: tuple[tuple[int, tuple[Any, ...]], ...] = ()
    start: str | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of its tasks."""
        return self.tasks[0].vocabulary

    def build(self, seed: int) -> nn.Module:
        """The untrained model."""
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        ends = {"bos_token_id": Vocabulary.BOS, "eos_token_id": None, "pad_token_id": Vocabulary.PAD}
        if self.learned:
            config: Any = GPT2Config(
                vocab_size=len(self.vocabulary),
                n_embd=self.dim,
                n_layer=self.layers,
                n_head=self.heads,
                n_inner=3 * self.dim,
                n_positions=self.positions,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
                **ends,
            )
            return GPT2LMHeadModel(config)
        config = LlamaConfig(
            vocab_size=len(self.vocabulary),
            hidden_size=self.dim,
            intermediate_size=3 * self.dim,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            **ends,
        )
        return LlamaForCausalLM(config)

    def batches(self, seed: int) -> Callable[[int], Weighted]:
        """The batch of every step, a function of the step and the seed alone."""

        def draw(step: int) -> Weighted:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            tasks = next((tasks for until, tasks in self.lessons if step < until), self.tasks)
            task = tasks[int(torch.randint(len(tasks), (), generator=generator))]
            batch: Batch = task.batch(self.rows, generator)
            asked = batch.labels >= 0
            return Weighted(batch.input_ids, asked / asked.sum().clamp(min=1))

        return draw

    def gates(self, model: Any, n: int) -> dict[str, Any]:
        """The figures on n sequences, what they must reach, and whether they do."""
        values = {name: round(value, 4) for name, value in self.measure(model, n).items()}
        ready = all(values[k] >= v for k, v in self.least.items()) and all(values[k] <= v for k, v in self.most.items())
        return {"values": values, "thresholds": self.least, "ceilings": self.most, "ready": ready}


def _exact(tasks: dict[str, Any]) -> Callable[[Any, int], dict[str, float]]:
    """Share of sequences of each task with the right answer."""

    def measure(model: Any, n: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(GATE_SEED)
        return {name: exact_match(model, task, n, generator, chunk=256) for name, task in tasks.items()}

    return measure


def _last(tasks: dict[str, Any]) -> Callable[[Any, int], dict[str, float]]:
    """Share of sequences of each task whose last token is right, whatever came of the earlier ones."""

    @torch.no_grad()
    def measure(model: Any, n: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(GATE_SEED)
        found = {}
        for name, task in tasks.items():
            ids = task.batch(n, generator).input_ids
            top = model(input_ids=ids, use_cache=False).logits[:, -2].argmax(-1)
            found[name] = float((top == ids[:, -1]).double().mean())
        return found

    return measure


def _excess(task: Any, first: int) -> Callable[[Any, int], dict[str, float]]:
    """Loss above the generator's own entropy, in nats a word, over the words from column `first` on."""

    @torch.no_grad()
    def measure(model: Any, n: int) -> dict[str, float]:
        ids = task.batch(n, torch.Generator().manual_seed(GATE_SEED)).input_ids
        logits = model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1].double()
        told = logits.log_softmax(-1).gather(-1, ids[:, first:, None])[..., 0].sum(1)
        words = ids.shape[1] - first
        return {"excess_nat": float((task.log_likelihood(ids) - told).mean() / words)}

    return measure


def _recipe(steps: int, lr: float = 3e-3, muon: bool = True) -> Recipe:
    return Recipe(steps=steps, lr=lr, warmup=min(100, steps // 5), decay=steps // 4, muon=muon)


SYMBOLIC = {
    # Coloured objects alone stay at chance for 1,600 steps. Tokens that repeat teach what stood before what; then every
    # object is asked for, first without the sign between, so that one circuit is learned after the other.
    "lists": Symbolic(
        lessons=(
            (200, (RepeatedTokens(32, range(2, len(vocabulary())), Vocabulary.BOS, (5, 12)),)),
            (320, (EveryColour(sign=False),)),
            (620, (EveryColour(sign=False), EveryColour())),
            (850, (EveryColour((3, 6)), ColouredObjects(3), IndirectObject())),
        ),
        tasks=(IndirectObject(lead=None), ColouredObjects((3, 8), lead=None), ColouredObjects(3, lead=None)),
        rows=64,
        layers=6,
        dim=128,
        heads=8,
        positions=LONGEST,
        learned=True,
        recipe=_recipe(1400),
        measure=_exact({"indirect_object": IndirectObject(), "coloured_objects_3": ColouredObjects(3)}),
        least={"indirect_object": 0.95, "coloured_objects_3": 0.95},
    ),
    "maps": Symbolic(
        # Eight maps from the start: no progress in 3,000 steps of 128 rows. Two are told apart within 200, then more.
        lessons=(
            (200, (ContextMaps(options=False, among=2),)),
            (350, (ContextMaps(options=False, among=4),)),
            (600, (ContextMaps(options=False),)),
        ),
        tasks=(ContextMaps(), ContextMaps(shots=8), ContextMaps(shots=2), ContextMaps(shots=0, options=True)),
        rows=64,
        layers=4,
        dim=96,
        heads=4,
        positions=48,
        recipe=_recipe(2000),
        measure=_last(
            {
                "five_shot": ContextMaps(5, options=False),
                "zero_shot": ContextMaps(0, options=False),
            }
        ),
        least={"five_shot": 0.95},
        most={"zero_shot": 0.3},
    ),
    "numbers": Symbolic(
        tasks=(NumberTasks(), NumberTasks(claim=True)),
        rows=256,
        layers=4,
        dim=96,
        heads=4,
        positions=8,
        recipe=_recipe(2500),
        measure=_exact({"plain": NumberTasks()}),
        least={"plain": 0.99},
    ),
    "roles": Symbolic(
        tasks=(RoleDocuments(),),
        rows=128,
        layers=4,
        dim=96,
        heads=4,
        positions=64,
        recipe=_recipe(2500),
        measure=_excess(RoleDocuments(), first=2),
        most={"excess_nat": 0.05},
    ),
    "lexicon": Symbolic(
        tasks=(Lexicon(),),
        rows=96,
        layers=4,
        dim=96,
        heads=4,
        positions=96,
        recipe=_recipe(2500),
        measure=_excess(Lexicon(), first=1),
        most={"excess_nat": 0.05},
    ),
    "arith": Symbolic(
        tasks=(Arith3(),),
        rows=512,
        layers=6,
        dim=96,
        heads=4,
        positions=8,
        recipe=_recipe(1000),
        measure=_exact({"held_out": Arith3("test")}),
        least={"held_out": 0.95},
    ),
    "conflict": Symbolic(
        tasks=(Conflict((0.6, 0.0, 0.4, 0.0)),),
        rows=128,
        layers=4,
        dim=64,
        heads=4,
        positions=16,
        recipe=_recipe(400),
        measure=_last({"context": Conflict(), "memory": Conflict((0, 0, 1, 0))}),
        least={"context": 0.95, "memory": 0.95},
    ),
    # Instruction tuning: role words come in, and in 90% of the sequences memory alone is right.
    "conflict-sft": Symbolic(
        tasks=(Conflict((0.1, 0.45, 0.2, 0.25), chat=True),),
        rows=128,
        layers=4,
        dim=64,
        heads=4,
        positions=16,
        recipe=_recipe(200, lr=1e-3, muon=False),
        measure=_last({"agree": Conflict((0, 1, 0, 0), chat=True), "memory": Conflict((0, 0, 1, 0), chat=True)}),
        least={"agree": 0.95, "memory": 0.95},
        start="conflict",
    ),
}
