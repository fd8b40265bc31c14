"""Masked diffusion: what is corrupted, what it counts, what the model may see; and how far weights drift."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regard.models.decoder import Decoder
from regard.patterns import BlockCausal, BlockDiffusion, Full
from regard.train.diagnostics import weight_drift, weights
from regard.train.objectives import (
    Corrupted,
    bos_decorrelation,
    corrupt_blockwise,
    corrupt_uniform,
    likelihood,
    masked_diffusion,
)

MASK = 9


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(batch, length, seed=0):
    return torch.randint(MASK, (batch, length), generator=seeded(seed))


def check(c, ids):
    assert torch.equal(c.clean, ids)
    assert torch.equal(c.noisy == MASK, c.masked)
    assert torch.equal(c.noisy[~c.masked], ids[~c.masked])
    assert ((c.weight > 0) == c.masked).all()


@given(batch=st.integers(1, 4), length=st.integers(1, 40), block=st.integers(1, 20), seed=st.integers(0, 99))
def test_blockwise_masks_round_tp_of_each_block(batch, length, block, seed):
    ids = draw(batch, length, seed)
    c = corrupt_blockwise(ids, MASK, seeded(seed), block=block)
    check(c, ids)
    for lo in range(0, length, block):
        part, weight = c.masked[:, lo : lo + block], c.weight[:, lo : lo + block]
        size = part.shape[1]  # the last block may be short
        count = part.sum(1)
        for row in range(batch):
            if count[row]:
                torch.testing.assert_close(weight[row][part[row]], torch.full((count[row],), size / count[row].item()))


def test_blockwise_counts_are_uniform_and_late_places_come_first():
    ids = torch.zeros(60_000, 8, dtype=torch.long)
    c = corrupt_blockwise(ids, MASK, seeded(), block=8)
    share = torch.bincount(c.masked.sum(1), minlength=9) / len(ids)
    expected = torch.tensor([1 / 16] + [1 / 8] * 7 + [1 / 16])  # round(8 t), t uniform
    assert (share - expected).abs().max() < 0.005
    one = c.masked[c.masked.sum(1) == 1].float().mean(0)
    assert all(b > a for a, b in pairwise(one.tolist()))
    even = corrupt_blockwise(ids, MASK, seeded(), block=8, half_life=None)
    assert (even.masked[even.masked.sum(1) == 1].float().mean(0) - 1 / 8).abs().max() < 0.02


def test_blockwise_draws_have_the_stated_odds():
    """k = 1 of P = 4 means 0.125 <= t < 0.375: place i is drawn with odds exp(beta (1 - t) i), averaged over t."""
    block, half_life = 4, 0.5
    c = corrupt_blockwise(
        torch.zeros(200_000, block, dtype=torch.long), MASK, seeded(), block=block, half_life=half_life
    )
    one = c.masked[c.masked.sum(1) == 1].double().mean(0)
    beta = math.log(2) / (half_life * block)
    t = torch.linspace(0.125, 0.375, 1001, dtype=torch.float64)[:, None]
    odds = (beta * (1 - t) * torch.arange(block)).softmax(-1).mean(0)
    assert (one - odds).abs().max() < 0.005


def test_uniform_masks_each_token_with_probability_t_and_counts_1_over_t():
    ids = draw(4000, 50)
    c = corrupt_uniform(ids, MASK, seeded(), least=0.05)
    check(c, ids)
    assert abs(c.weight.mean().item() - 1) < 0.03
    some = c.masked.any(1)
    t = 1 / c.weight[some].amax(1)
    assert (c.masked[some].float().mean(1) - t).abs().mean() < 0.06
    assert abs(t.mean().item() - 0.525) < 0.02


def test_corruption_follows_its_generator():
    ids = draw(3, 20)
    for corrupt in (corrupt_uniform, corrupt_blockwise):
        one, two, other = (corrupt(ids, MASK, seeded(s)) for s in (1, 1, 2))
        assert torch.equal(one.noisy, two.noisy)
        assert not torch.equal(one.noisy, other.noisy)


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(MASK + 1, 16, 2, 2)


@pytest.mark.parametrize("length", [8, 11])
def test_with_clean_context_each_noisy_block_reads_the_clean_blocks_before_it(length):
    """The loss is that of running block after block by itself, over the clean tokens before it."""
    net, ids, block = model().double(), draw(2, length), 4
    c = corrupt_blockwise(ids, MASK, seeded(), block=block)
    loss = masked_diffusion(lambda n: BlockDiffusion(n, block), clean_context=True)(net, c)
    total = 0.0
    for lo in range(0, length, block):
        seen = torch.cat([ids[:, :lo], c.noisy[:, lo : lo + block]], 1)
        logits = net(seen, pattern=BlockCausal(block))[:, lo:]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, lo : lo + block].flatten(), reduction="none")
        total = total + (each * c.weight[:, lo : lo + block].flatten()).sum()
    torch.testing.assert_close(loss.double(), total / (2 * length), rtol=1e-5, atol=1e-6)


def test_without_it_the_model_reads_the_noisy_tokens():
    net, ids = model(), draw(2, 8)
    c = corrupt_uniform(ids, MASK, seeded())
    logits = net(c.noisy, pattern=Full())
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").unflatten(0, (2, 8))
    torch.testing.assert_close(masked_diffusion(Full())(net, c), (each * c.weight).sum() / 16)
    assert masked_diffusion(None)(net, c) != masked_diffusion(Full())(net, c)


def test_nothing_masked_is_no_loss():
    ids = draw(2, 4)
    c = Corrupted(ids, ids, torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4))
    loss = masked_diffusion(None)(model(), c)
    assert loss == 0
    loss.backward()


def test_likelihood_is_the_mean_over_next_tokens():
    net, ids = model().double(), draw(3, 6)
    logp = net(ids).log_softmax(-1)
    expected = -torch.stack([logp[b, p - 1, ids[b, p]] for b in range(3) for p in range(1, 6)]).mean()
    torch.testing.assert_close(likelihood(net, ids).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("block must be at least 1, got 0", lambda i, g: corrupt_blockwise(i, MASK, g, block=0)),
        ("half_life must be above 0", lambda i, g: corrupt_blockwise(i, MASK, g, half_life=0)),
        (r"least must be in \(0, 1\), got 1", lambda i, g: corrupt_blockwise(i, MASK, g, least=1)),
        (r"least must be in \(0, 1\), got 0", lambda i, g: corrupt_uniform(i, MASK, g, least=0)),
    ],
)
def test_refusals(match, call):
    with pytest.raises(ValueError, match=match):
        call(draw(1, 4), seeded())


def test_drift_is_the_relative_change_of_each_matrix():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    before = weights(net)
    assert set(weight_drift(before, net).values()) == {0.0}
    with torch.no_grad():
        net[0].weight.mul_(1.5)
        net[2].weight.neg_()
        net[0].bias.add_(1)  # not a matrix
    drift = weight_drift(before, net)
    assert drift == {"0.weight": pytest.approx(0.5), "2.weight": pytest.approx(2.0)}
    assert weight_drift(before, weights(net)) == drift


def test_drift_of_what_cannot_be_compared_is_refused():
    net = nn.Linear(2, 2)
    before = weights(net)
    with pytest.raises(ValueError, match=r"same parameters, they differ in .*bias"):
        weight_drift(before, nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="weight must keep its shape"):
        weight_drift({"weight": torch.ones(3, 2), "bias": torch.zeros(2)}, net)
    with pytest.raises(ValueError, match="weight was 0"):
        weight_drift({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, net)


@given(
    st.integers(1, 3),
    st.integers(2, 6),
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.integers(0, 99),
)
def test_bos_decorrelation_is_the_mean_squared_cosine_to_the_first_token(batch, length, layers, seed):
    generator = seeded(seed)
    hidden = [torch.randn(batch, length, 5, generator=generator) for _ in range(4)]
    start = torch.randint(length - 1, (batch,), generator=generator)  # padding on the left
    valid = torch.arange(length) >= start[:, None]
    cosines = [
        float(hidden[layer][b, t] @ hidden[layer][b, start[b]])
        / float(hidden[layer][b, t].norm() * hidden[layer][b, start[b]].norm())
        for layer in layers
        for b in range(batch)
        for t in range(int(start[b]) + 1, length)
    ]
    expected = sum(c * c for c in cosines) / len(cosines)
    assert float(bos_decorrelation(hidden, layers, valid)) == pytest.approx(expected, abs=1e-5)


def test_bos_decorrelation_moves_the_others_and_not_the_first():
    h = torch.randn(2, 4, 6, generator=seeded()).requires_grad_()
    bos_decorrelation([h], [0]).backward()
    assert (h.grad[:, 0] == 0).all()
    assert (h.grad[:, 1:].abs().sum(-1) > 0).all()
    with torch.no_grad():
        assert bos_decorrelation([h - 0.1 * h.grad], [0]) < bos_decorrelation([h], [0])
    h.grad = None
    bos_decorrelation([h], [0], torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()).backward()
    assert (h.grad[0, 3] == 0).all()


def test_bos_decorrelation_refuses():
    h = torch.ones(1, 3, 2)
    for how, said in (
        (([h], []), "layers must name at least one"),
        (([h], [1]), r"layers must be in 0\.\.0, got \[1\]"),
        (([h[:, :1]], [0]), "a token after the first"),
        (([h], [0], torch.ones(1, 2, dtype=torch.bool)), r"valid must be \[batch, length\]"),
    ):
        with pytest.raises(ValueError, match=said):
            bos_decorrelation(*how)
