"""Small models, plans made by hand, and seconds that do not depend on the machine."""

from __future__ import annotations

import torch
from torch import nn

from regard.patterns import Causal, Columns, Full, Pattern
from regard.plan.cost import CostModel, shape_of
from regard.plan.identity import identity
from regard.plan.options import DENSE, NOTHING, Option
from regard.plan.plan import Plan
from regard.watch.probe import quiet, run
from regard.watch.seam import Seam

__all__ = ["FixedCosts", "by_hand", "llama", "shapes_of"]


def llama(length: int = 128, heads: int = 4, kv_heads: int = 2, layers: int = 2, seed: int = 0) -> nn.Module:
    """An untrained decoder with sharp attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=64, max_position_embeddings=length, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="sdpa", initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class FixedCosts(CostModel):
    """Seconds by the pairs that an option allows (routes: a quarter), and a little for each call."""

    def time(self, call, options):
        shape = shape_of(call)
        heads, q_len, kv_len = shape[1], shape[3], shape[4]
        within = Causal() if call.place(Full()) == Causal() else Full()
        for option in options:
            how = option.at(kv_len)
            if option.kind == "dense":
                share = within.density(q_len, kv_len)
            else:
                share = (how & within).density(q_len, kv_len) if isinstance(how, Pattern) else 0.25
            self.times[shape, option.name] = {n: 1e-5 + n * share * 1e-2 for n in (1, heads)}


def shapes_of(model, inputs):
    """By layer: the shape of its first self-attention call."""
    found = {}

    def look(call):
        if call.kind == "self":
            (batch, heads, q_len, width), kv = call.q.shape, call.v.shape
            found.setdefault(call.layer, (batch, heads, kv[1], q_len, kv[2], width, kv[3]))

    with quiet(model), Seam(model, look):
        run(model, inputs)
    return found


def by_hand(model, inputs, options):
    """A plan that gives the options to the heads of each layer in turn, over and over."""
    shapes = shapes_of(model, inputs)
    layers, n = {}, 0
    for name, shape in shapes.items():
        layers[name] = tuple(options[(n + head) % len(options)] for head in range(shape[1]))
        n += shape[1] + 1
    return Plan(layers, shapes, identity(model, layers))


def pattern_of(option: Option) -> Pattern:
    """What the option is as a pattern."""
    if option is DENSE:
        return Full()
    return Columns(()) if option is NOTHING else option.how
