"""The decoder computes what Llama computes, steps as it runs, and decodes token by token and block by block."""

import pytest
import torch
from torch import nn

from regard.layers.dual_triangle import DualTriangleAttention
from regard.layers.state import RecurrentState
from regard.models.decoder import Decoder
from regard.models.generate import generate, generate_blocks
from regard.patterns import BlockCausal, Causal, Full, Window

VOCAB = 11


def make(seed=0, **how):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(VOCAB, 16, 2, 2, **how)


def draw(batch=2, length=9, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def llama(**how):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}} | how,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def test_it_is_llama():
    theirs, ids = llama().double(), draw(2, 13)
    ours = Decoder.from_llama(theirs)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)  # its angles are float32
    assert not ours.training
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = theirs.generate(ids, max_new_tokens=6, **how)
    assert torch.equal(generate(ours, ids, 6), told)
    ours.head.weight += 1
    assert not torch.equal(ours.head.weight, theirs.lm_head.weight)  # a copy


@torch.no_grad()
def test_the_shipped_decoder_becomes_one():
    from regard.tasks.testbeds import load

    loaded = load("testbed:decoder")
    ids = loaded.tokenizer("def main():\n    return", return_tensors="pt").input_ids
    torch.testing.assert_close(Decoder.from_llama(loaded.model)(ids), loaded.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_another_model_is_refused():
    scaled = llama(rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0})
    with pytest.raises(ValueError, match="rope_type = 'default', got 'linear'"):
        Decoder.from_llama(scaled)
    with pytest.raises(ValueError, match="attention_bias = False, got True"):
        Decoder.from_llama(llama(attention_bias=True))


@torch.no_grad()
@pytest.mark.parametrize("pattern", [Causal(), [Window(2), Causal()]], ids=["causal", "two"])
def test_stepping_is_the_parallel_form(pattern):
    model, ids = make(pattern=pattern), draw()
    state = model.new_state()
    steps = torch.cat([model(ids[:, i : i + 1], state=state) for i in range(9)], 1)
    torch.testing.assert_close(steps, model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_pattern_in_a_call_replaces_the_own_and_patterns_for_good():
    model, ids = make(), draw()
    full = model(ids, pattern=Full())
    assert not torch.allclose(full, model(ids))
    model.patterns = Full()
    assert torch.equal(model(ids), full)
    model.patterns = None
    torch.testing.assert_close(model(ids), full)
    assert model.patterns == (None, None)


def test_each_layer_has_its_pattern():
    """Two windows of 2 reach 4 tokens back, a window and the diagonal 2."""
    for patterns, reach in (([Window(2), Window(2)], 4), ([Window(2), Window(0)], 2)):
        model, ids = make(pattern=patterns), draw(1, 9)
        embedded = model.embed(ids).detach().requires_grad_()
        model.embed.forward = lambda _, embedded=embedded: embedded
        model(ids)[0, 8].square().sum().backward()
        moved = embedded.grad[0].abs().amax(-1) > 0
        assert moved.nonzero().min() == 8 - reach


@torch.no_grad()
def test_another_attention_layer_is_plugged_in():
    model = make(pattern=None, attention=lambda i: DualTriangleAttention(16, 2), outputs=5)
    assert model(draw()).shape == (2, 9, 5)
    with pytest.raises(ValueError, match="half of every head"):
        model.new_state()


def test_positions_make_order_and_without_them_there_is_none():
    ids = draw(1, 6)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    for theta, equal in ((None, True), (10_000.0, False)):
        model = make(pattern=None, theta=theta).double()
        assert torch.allclose(model(ids[:, order]), model(ids)[:, order]) == equal


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Decoder(5, 8, 0, 2)
    with pytest.raises(ValueError, match="one for each of 2 layers, got 3"):
        make(pattern=[Causal()] * 3)

    class Plain(nn.Module):
        def forward(self, x, pattern=None, state=None):
            return x

    with pytest.raises(ValueError, match="Plain of block 0 keeps no state"):
        make(attention=lambda i: Plain()).new_state()


class TestGenerate:
    def test_greedy_is_the_argmax_of_whole_passes(self):
        model, ids = make(), draw(3, 4)
        slow = ids
        with torch.no_grad():
            for _ in range(5):
                slow = torch.cat([slow, model(slow)[:, -1:].argmax(-1)], 1)
        assert torch.equal(generate(model, ids, 5), slow)
        assert torch.equal(generate(model, ids, 0), ids)

    def test_draws_follow_the_generator_and_the_model(self):
        model, ids = make(), draw(1, 3).expand(4000, 3)
        one, two = (generate(model, ids, 1, temperature=0.5, generator=torch.Generator().manual_seed(4)) for _ in "ab")
        assert torch.equal(one, two)
        with torch.no_grad():
            odds = (model(ids[:1])[0, -1] / 0.5).softmax(-1)
        share = torch.bincount(one[:, -1], minlength=VOCAB) / 4000
        assert (share - odds).abs().max() < 0.03

    def test_refusals(self):
        model = make()
        with pytest.raises(ValueError, match="at least 1 token of prompt"):
            generate(model, draw(1, 0), 3)
        with pytest.raises(ValueError, match="tokens must be at least 0, got -1"):
            generate(model, draw(), -1)
        with pytest.raises(ValueError, match="temperature must be at least 0"):
            generate(model, draw(), 1, temperature=-1)
        with pytest.raises(ValueError, match="has not come"):
            generate(make(pattern=Full()), draw(), 1)


def slow_blocks(model, ids, tokens, block, mask_id, threshold):
    """Block by block with whole passes and no state, one sample at a time."""
    rows = []
    for row in ids:
        end = len(row) + tokens
        canvas = torch.full((1, -(-end // block) * block), mask_id)
        canvas[0, : len(row)] = row
        unknown = torch.arange(canvas.shape[1]) >= len(row)
        for lo in range(0, canvas.shape[1], block):
            while unknown[lo : min(lo + block, end)].any():
                logits = model(canvas[:, : lo + block], pattern=BlockCausal(block))[0, lo:]
                logits[:, mask_id] = -torch.inf
                sure, token = logits.softmax(-1).max(-1)
                left = unknown[lo : lo + block].nonzero().flatten()
                best = left[sure[left].argmax()]
                for i in left.tolist():
                    if sure[i] > threshold or i == best:
                        canvas[0, lo + i], unknown[lo + i] = token[i], False
        rows.append(canvas[0, :end])
    return torch.stack(rows)


class TestBlocks:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("prompt", "tokens", "threshold"),
        # without a prompt the places of the first block are alike, and only by rounding is one of them the surest
        [*((p, n, t) for p, n in ((8, 8), (5, 6), (3, 1), (9, 0)) for t in (0.2, 0.9)), (0, 7, 0.0)],
    )
    def test_equal_to_whole_passes_without_a_state(self, prompt, tokens, threshold):
        model, ids = make(), draw(3, prompt)
        for p in model.parameters():
            p.mul_(2)
        out = generate_blocks(model, ids, tokens, 4, 10, threshold=threshold)
        assert torch.equal(out.ids, slow_blocks(model, ids, tokens, 4, 10, threshold))
        assert (out.ids[:, prompt:] != 10).all()

    @torch.no_grad()
    @pytest.mark.parametrize("threshold", [0.2, 0.9])
    def test_without_a_state_under_the_own_patterns(self, threshold):
        """A model whose own pattern is block-causal decodes the same with and without a state."""
        model, ids = make(pattern=BlockCausal(4)), draw(2, 6)
        slow = generate_blocks(model, ids, 9, 4, 10, threshold=threshold, cached=False)
        assert torch.equal(slow.ids, generate_blocks(model, ids, 9, 4, 10, threshold=threshold).ids)
        full = make(pattern=Full())
        with torch.no_grad():
            first = full(torch.cat([ids, torch.full((2, 2), 10)], 1))[:, 6:]
        first[..., 10] = -torch.inf
        assert torch.equal(
            generate_blocks(full, ids, 2, 4, 10, threshold=0.0, cached=False).ids[:, 6:], first.argmax(-1)
        )

    @torch.no_grad()
    def test_a_low_threshold_needs_one_pass_a_block_and_a_high_one_a_pass_a_token(self):
        model, ids = make(), draw(1, 4)
        # the prompt, then for each block the passes that reveal it, and one that keeps it, but for the last
        assert generate_blocks(model, ids, 8, 4, 10, threshold=0.0).forwards == 1 + (1 + 1) + 1
        assert generate_blocks(model, ids, 8, 4, 10, threshold=1.0).forwards == 1 + (4 + 1) + 4
        assert generate_blocks(model, ids, 0, 4, 10).forwards == 0

    @torch.no_grad()
    def test_block_1_is_a_token_at_a_time(self):
        """A model that reads the mask token at the place asked for: shifted by one, that is greedy decoding."""
        model, ids = make(), draw(2, 3)
        out = generate_blocks(model, ids, 4, 1, 10).ids
        slow = ids
        for _ in range(4):
            masked = torch.cat([slow, torch.full((2, 1), 10)], 1)
            logits = model(masked)[:, -1]
            logits[:, 10] = -torch.inf
            slow = torch.cat([slow, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(out, slow)

    def test_refusals(self):
        with pytest.raises(ValueError, match="block must be at least 1, got 0"):
            generate_blocks(make(), draw(), 4, 0, 10)

        class Keeps(nn.Module):
            def new_state(self):
                return RecurrentState()

            def forward(self, x, pattern=None, state=None):
                return x

        with pytest.raises(ValueError, match="cannot go back to length"):
            generate_blocks(make(attention=lambda i: Keeps()), draw(), 4, 4, 10)
