"""Credit of tokens and the loss that uses it, against the papers' words."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from regard.models.decoder import Decoder
from regard.tasks.countdown import Countdown
from regard.train.credit import STRATEGIES, crediting, random_gain, rhythm, token_gain
from regard.train.objectives import group_advantage, grpo_loss
from tests.oracles import credit as oracle


def causal(batch, heads, n, seed):
    scores = torch.randn(batch, heads, n, n, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


@given(
    st.integers(0, 99), st.integers(1, 3), st.integers(4, 14), st.integers(0, 3), st.integers(1, 5), st.integers(0, 6)
)
def test_rhythm_is_its_definition(seed, heads, n, start, near, more):
    weights = [causal(2, heads, n, seed), causal(2, heads, n, seed + 1)]
    waad, fai = rhythm(weights, start, window=4, near=near, far=near + more)
    want = oracle.rhythm(weights, start, 4, near, near + more, 0.3)
    np.testing.assert_allclose(waad, want[0], atol=1e-5)
    np.testing.assert_allclose(fai, want[1], atol=1e-6)


@given(
    st.integers(0, 999), st.integers(2, 20), st.integers(0, 6), st.sampled_from(STRATEGIES), st.sampled_from((0.2, 0.5))
)
def test_gains_are_the_papers(seed, n, unread, strategy, a):
    draw = torch.Generator().manual_seed(seed)
    waad, fai = torch.rand(2, 3, n, generator=draw, dtype=torch.float64)
    fai[:, max(0, n - unread) :] = torch.nan
    got = token_gain(waad, fai, strategy, a=a)
    want = [oracle.token_gain(w, f, strategy, a) for w, f in zip(waad.tolist(), fai.tolist(), strict=True)]
    np.testing.assert_allclose(got, want)
    assert (got[fai.isnan()] == 1).all() or strategy != "global"


def test_coupling_hands_credit_back():
    """Anchors at 2, 3, 6 and 9: after a jump, above the median, after a jump that is an anchor, after small jumps."""
    waad = torch.tensor([[9.0, 9, 1, 1.5, 1, 1.4, 1, 1.3, 1, 1.2]])
    fai = torch.tensor([[0.0, 0, 9, 8, 0, 0, 6, 0, 0, 7]])
    assert token_gain(waad, fai, "global")[0].tolist() == [1, 1, 1.5, 1.5, 1, 1, 1.5, 1, 1, 1.5]
    assert token_gain(waad, fai, "coupled")[0].tolist() == [1, 1.25, 1.25, 1.5, 1, 1, 1.25, 1, 1, 1.5]


def test_credit_reads_the_models_own_weights():
    """The factors of an arm are those of weights computed by hand from the layers' projections."""
    task = Countdown()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(task.vocab, 64, 2, 4).eval()
    ids = task.batch(5, torch.Generator().manual_seed(1)).input_ids
    n = ids.shape[1]
    weights = []
    with torch.no_grad():
        x = model.embed(ids)
        for block in model.blocks:
            layer, h = block.attention, block.norm1(x)
            q, k = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
            q, k = layer.position.rotate(q, k, torch.arange(n), torch.arange(n))
            scores = q @ k.mT * layer.head_dim**-0.5
            weights.append(scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1))
            x = block(x, pattern=model.patterns[0])
    signals = rhythm(weights, task.prompt, near=3, far=12)
    for arm in ("local", "global", "coupled"):
        got = crediting(arm, task.prompt, near=3, far=12)(model, ids, None)
        assert got.shape == (5, task.answer)
        torch.testing.assert_close(got, token_gain(*signals, arm))
    assert crediting("uniform", task.prompt) is None
    drawn = crediting("random", task.prompt)(model, ids, torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == task.answer + 0.5 * round(0.4 * task.answer)).all()
    with pytest.raises(ValueError, match="name must be one of uniform, random, local, global, coupled, got 'near'"):
        crediting("near", task.prompt)


def test_random_credit_is_as_much_as_local_credit():
    gain = random_gain(50, 12, torch.Generator().manual_seed(0))
    assert ((gain == 1.5).sum(1) == 5).all()
    assert (gain == 1.5).any(0).all()
    local = token_gain(torch.rand(4, 12), torch.rand(4, 12), "local")
    assert local.sum(1).tolist() == gain[:4].sum(1).tolist()
    with pytest.raises(ValueError, match="strategy must be one of local"):
        token_gain(torch.rand(1, 3), torch.rand(1, 3), "nearby")
    with pytest.raises(ValueError, match="a must be in"):
        token_gain(torch.rand(1, 3), torch.rand(1, 3), "local", a=2)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 4), st.integers(1, 5))
def test_the_loss_is_its_definition(seed, prompts, group, tokens):
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(prompts, group, tokens, generator=draw, dtype=torch.float64)
    logp = old + 0.4 * torch.randn(prompts, group, tokens, generator=draw, dtype=torch.float64)
    rewards = torch.randint(2, (prompts, group), generator=draw).double()
    gain = 1 + torch.rand(prompts, group, tokens, generator=draw, dtype=torch.float64)
    advantage = group_advantage(rewards).flatten()
    flat = [x.flatten(0, 1) for x in (logp, old, gain)]
    got = grpo_loss(flat[0], flat[1], advantage, token_gain=flat[2])
    want = oracle.grpo_loss(logp.tolist(), old.tolist(), rewards.tolist(), gain.tolist(), 0.2)
    assert float(got) == pytest.approx(want, abs=1e-9)


def test_the_gain_scales_a_tokens_gradient_and_gets_none():
    logp = torch.randn(3, 4, requires_grad=True)
    gain = (1 + torch.rand(3, 4)).requires_grad_()
    advantage = torch.tensor([1.0, -1, 0.5])
    (plain,) = torch.autograd.grad(grpo_loss(logp, logp.detach(), advantage), logp)
    loss = grpo_loss(logp, logp.detach(), advantage, token_gain=gain)
    got, none = torch.autograd.grad(loss, (logp, gain), allow_unused=True)
    torch.testing.assert_close(got, plain * gain.detach())
    assert none is None
    mask = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(grpo_loss(logp, logp.detach(), advantage, mask), -advantage.mean())
    mask[:, 2:] = False
    (cut,) = torch.autograd.grad(grpo_loss(logp, logp.detach(), advantage, mask), logp)
    torch.testing.assert_close(cut[:, :2], 2 * plain[:, :2])
    assert (cut[:, 2:] == 0).all()
    assert (group_advantage(torch.ones(2, 4)) == 0).all()
    for bad in ({"mask": mask[:2]}, {"token_gain": gain[:, :2]}):
        with pytest.raises(ValueError, match="shape of logp"):
            grpo_loss(logp, logp.detach(), advantage, **bad)
    with pytest.raises(ValueError, match="advantage must be"):
        grpo_loss(logp, logp.detach(), advantage[:2])
    with pytest.raises(ValueError, match="clip must be positive"):
        grpo_loss(logp, logp.detach(), advantage, clip=0)
