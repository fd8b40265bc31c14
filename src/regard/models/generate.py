"""Decoding with a `Decoder`: token by token, and block by block as block diffusion does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.models.decoder import Decoder
from regard.patterns import BlockCausal

__all__ = ["Blocks", "generate", "generate_blocks"]


@torch.no_grad()
def generate(
    model: Decoder,
    ids: Int[Tensor, "batch prompt"],
    tokens: int,
    *,
    temperature: float | int = 0.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch length"]:
    """The prompt and ``tokens`` more, one at a time, each step reading one token with the state of the earlier ones.

    Args:
        model: whose patterns let no query see a later key.
        ids: the prompt, at least one token.
        tokens: how many to add.
        temperature: 0 takes the likeliest token; above, one is drawn from ``softmax(logits / temperature)``.
        generator: of the draws.

    Raises:
        ValueError: an empty prompt, a negative number, or a layer that keeps no state.
    """
    _check(ids, tokens, temperature)
    state, newest = model.new_state(), ids
    for _ in range(tokens):
        logits = model(newest, state=state)[:, -1]
        newest = _pick(logits, temperature, generator)[0][:, None]
        ids = torch.cat([ids, newest], 1)
    return ids


class Blocks(NamedTuple):
    """What `generate_blocks` gives: the tokens ``[batch, length]`` and how often the model was called."""

    ids: Tensor
    forwards: int


@torch.no_grad()
def generate_blocks(
    model: Decoder,
    ids: Int[Tensor, "batch prompt"],
    tokens: int,
    block: int,
    mask_id: int,
    *,
    threshold: float | int = 0.9,
    temperature: float | int = 0.0,
    generator: torch.Generator | None = None,
    cached: bool = True,
) -> Blocks:
    """Block diffusion: the prompt and ``tokens`` more, a block of tokens at a time (arXiv 2512.14067).

    Blocks lie at multiples of ``block``. The whole blocks of the prompt go to the state. Then, for each block: its
    unknown tokens start as ``mask_id``; the model reads the block over the clean ones before it, and every unknown
    token of confidence above ``threshold`` is revealed, in each sample at least the surest one, until none is left;
    the clean block then goes to the state in one more call. The last block stops once the tokens asked for are known.

    Args:
        model: trained with `masked_diffusion`; run under ``BlockCausal(block)``.
        ids: the prompt; it may be shorter than a block, or empty.
        tokens: how many to add.
        block: tokens of a block.
        mask_id: the id that stands for an unknown token; it is never revealed.
        threshold: confidence (probability of the picked token) above which a token is revealed.
        temperature: 0 picks the likeliest token; above, one is drawn from ``softmax(logits / temperature)``.
        generator: of the draws.
        cached: False keeps no state: every call reads all tokens up to the end of the block, under the model's own
            patterns. For models whose queries see later keys.

    Raises:
        ValueError: a number out of range, or a layer that keeps no state, or one that cannot be cut.
    """
    _check(ids, tokens, temperature, prompt=0)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    pattern, state = BlockCausal(block), model.new_state() if cached else []
    batch, start = ids.shape
    end, forwards = start + tokens, 0
    whole = start // block * block
    canvas = torch.full((batch, -(-end // block) * block), mask_id, dtype=ids.dtype, device=ids.device)
    canvas[:, :start] = ids
    if whole and tokens and cached:
        model(ids[:, :whole], pattern=pattern, state=state)
        forwards += 1
    for lo in range(whole, end if tokens else whole, block):
        here = canvas[:, lo : lo + block]
        unknown = torch.arange(lo, lo + block, device=ids.device).expand(batch, -1) >= start
        while unknown[:, : end - lo].any():
            logits = model(here, pattern=pattern, state=state) if cached else model(canvas[:, : lo + block])[:, lo:]
            for part in state:
                part.cut(lo)  # the block is not clean yet
            forwards += 1
            logits[..., mask_id] = -torch.inf
            token, sure = _pick(logits, temperature, generator)
            sure = sure.masked_fill(~unknown, -1.0)
            surest = torch.zeros_like(unknown).scatter(1, sure.argmax(1, keepdim=True), True)
            shown = ((sure > threshold) | surest) & unknown
            here[shown] = token[shown]
            unknown = unknown & ~shown
        if lo + block < end and cached:
            model(here, pattern=pattern, state=state)
            forwards += 1
    return Blocks(canvas[:, :end], forwards)


def _pick(
    logits: Float[Tensor, "... vocab"], temperature: float | int, generator: torch.Generator | None
) -> tuple[Int[Tensor, "..."], Float[Tensor, "..."]]:
    """A token for each row of logits and its probability."""
    if temperature == 0:
        sure, token = logits.softmax(-1).max(-1)
        return token, sure
    odds = (logits / temperature).softmax(-1)
    token = torch.multinomial(odds.flatten(0, -2), 1, generator=generator).reshape(logits.shape[:-1])
    return token, odds.gather(-1, token[..., None])[..., 0]


def _check(ids: Tensor, tokens: int, temperature: float | int, prompt: int = 1) -> None:
    if ids.shape[1] < prompt:
        raise ValueError(f"ids must hold at least {prompt} token of prompt, got shape {tuple(ids.shape)}")
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
