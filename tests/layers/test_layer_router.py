"""The layer router: its feature and gates by their formulas, decisions that are kept, training through gates."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import regard
from regard.kernels.attend import attend
from regard.kernels.rotary import inverse_frequencies, rotate
from regard.layers.layer_router import FULL, LayerRouter, temperature
from regard.models.decoder import Decoder
from regard.patterns import Causal, Sinks, Window, per_head
from regard.steer.layer_gates import LayerGates
from regard.train.objectives import BudgetMultiplier

SPARSE = Sinks(1) | Window(2, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def router(head_dim=8, towards=None, seed=0, **how):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LayerRouter(head_dim, SPARSE, **how)
    with torch.no_grad():
        if towards is not None:
            made.decide[-1].bias.copy_(torch.tensor([5.0, -5.0] if towards == "full" else [-5.0, 5.0]))
    return made


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 60))
def test_the_feature_is_the_mean_of_both_ends_and_never_of_the_answer(length, pooled, seed):
    made = router(pooled=pooled, inv_freq=inverse_frequencies(8, 100.0)).double()
    plain = drawn(3, 2, length, 8, seed=seed)
    at = torch.arange(length)
    q = rotate(plain, at, made.inv_freq)
    asked = torch.randint(1, length + 1, (3,), generator=seeded(seed))
    found = made.features(q, asked)
    for b, n in enumerate(asked.tolist()):
        rows = plain[b].numpy()[:, :n]
        ends = np.concatenate([rows[:, :pooled], rows[:, max(n - pooled, 0) :]], 1)
        np.testing.assert_allclose(found[b].numpy(), ends.mean((0, 1)), atol=1e-6)
    answered = torch.where((at < asked[:, None])[:, None, :, None], q, 7.0)
    torch.testing.assert_close(made.features(answered, asked), found)


def test_it_starts_at_full_and_is_as_large_as_said():
    made = LayerRouter(8)
    assert made.patterns[1] == Sinks(128) | Window(1024, 0)
    logits = made.logits(torch.randn(5, 2, 30, 8))
    torch.testing.assert_close(logits, torch.tensor([[4.5, 0.0]]).expand(5, 2))
    widths = [m.out_features for m in made.modules() if isinstance(m, nn.Linear)]
    assert widths == [64, 16, 32, 8, 2]
    d = 8
    assert made.cost(300, 300, d) == 2 * 100 * d + d * (8 * d + 2) + 16 * d * d + 8 * d * d + 4 * d * d


def test_gates_are_hard_and_their_gradient_is_soft():
    made = router()
    logits = drawn(6, 2).requires_grad_()
    z = made.sample(logits, 1.3, seeded(4))
    assert set(z.tolist()) <= {0.0, 1.0}
    gumbel = -torch.log(-torch.log(torch.rand(6, 2, generator=seeded(4)).double()))
    soft = ((logits + gumbel) / 1.3).softmax(-1)[:, FULL]
    assert torch.equal(z.detach() > 0.5, soft > 0.5)
    (weight,) = torch.autograd.grad((z * torch.arange(6)).sum(), logits)
    (want,) = torch.autograd.grad((soft * torch.arange(6)).sum(), logits)
    torch.testing.assert_close(weight, want)
    many = made.sample(torch.tensor([[1.0, 0.0]]).expand(20_000, 2), 1.0, seeded())
    assert float(many.mean()) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.015)
    with pytest.raises(ValueError, match="tau must be above 0, got 0"):
        made.sample(logits, 0)


def test_a_hard_gate_is_attention_under_the_chosen_pattern():
    made = router().double()
    q, k, v = drawn(2, 2, 9, 8), drawn(2, 1, 9, 8, seed=1), drawn(2, 1, 9, 5, seed=2)
    found = made.mixed(torch.tensor([1.0, 0.0]).double(), q, k, v, within=Causal(), q_start=0)
    for b, pattern in enumerate((Causal(), Causal() & SPARSE)):
        torch.testing.assert_close(found[b], attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern)[0])
    half = made.mixed(torch.tensor([0.5, 0.5]).double(), q, k, v, within=Causal(), q_start=0)
    other = made.mixed(torch.tensor([0.0, 1.0]).double(), q, k, v, within=Causal(), q_start=0)
    torch.testing.assert_close(half, (found + other) / 2)


def test_as_a_route_it_decides_for_each_sample_once():
    made = router(pooled=3).double()
    with torch.no_grad():
        made.decide[-1].weight.normal_(std=3, generator=seeded(1))
        q, k, v = (drawn(8, 2, 10, 8, seed=s) * 3 for s in range(3))
        logits = made.logits(q)
        made.decide[-1].bias.sub_(logits.median(0).values)  # so that half of the samples go either way
    found = made(q, k, within=Causal())
    assert found.which[:, 0].tolist() == made.logits(q).argmax(-1).tolist()
    assert 0 < found.which.sum() < 8  # both are there
    out = attend(q, k, v, found)
    for b in range(8):
        pattern = (Causal(), Causal() & SPARSE)[int(found.which[b, 0])]
        torch.testing.assert_close(out[b], attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern)[0])
    own = made.fresh()
    first = own.select(q[:, :, :9], own.summarize(k[:, :, :9]))
    later = own.select(q[:, :, 9:] * -50, own.summarize(k[:, :, 9:], past=own.summarize(k[:, :, :9])))
    assert torch.equal(first.which, later.which)
    assert (later.q_start, later.kv_len) == (9, 10)
    with pytest.raises(ValueError, match="q_start must be 0 where a layer is decided, from the prompt, got 9"):
        made.select(q[:, :, 9:], made.summarize(k))
    assert own.encoder is made.encoder  # the weights are shared, the memory is not


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]


def test_at_the_seam_a_decision_made_at_prefill_holds_while_decoding(llama):
    ids = torch.randint(1, 32, (2, 15), generator=seeded())
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    choice = {LAYERS[0]: "full", LAYERS[1]: "sparse", LAYERS[2]: "sparse"}
    routers = {name: router(towards=t) for name, t in choice.items()}
    asked = []
    for name, made in routers.items():
        made.encoder.register_forward_hook(lambda module, given, out, name=name: asked.append(name))
    with regard.attend_with(llama, routers) as used:
        found = llama.generate(ids, **how)
    assert sorted(asked) == LAYERS  # once each, at prefill
    assert set(used.used.values()) == {12}
    with regard.attend_with(llama, {name: SPARSE for name, t in choice.items() if t == "sparse"}):
        want = llama.generate(ids, **how)
    assert torch.equal(found, want)
    assert not torch.equal(found, llama.generate(ids, **how))
    with regard.attend_with(llama, routers):  # another sequence is another decision
        llama(input_ids=ids, use_cache=False)
    assert len(asked) == 6


def test_gates_train_routers_of_a_frozen_model(llama):
    ids = torch.randint(1, 32, (4, 15), generator=seeded())
    routers = nn.ModuleDict({str(i): router() for i in range(2)})
    table = dict(zip(LAYERS[1:], routers.values(), strict=True))
    llama.requires_grad_(False)
    budget = BudgetMultiplier([1.0], seeded())
    with LayerGates(llama, table, tau=1.2, generator=seeded()) as gates:
        logits = llama(input_ids=ids, use_cache=False).logits
        loss = logits.square().mean() + budget(gates.sparse, torch.zeros(4, dtype=torch.long))
    assert gates.sparse.shape == (4,)
    assert set(gates.gates) == set(LAYERS[1:])
    loss.backward()
    assert all(made.decide[-1].bias.grad.abs().sum() > 0 for made in routers.values())
    assert all(p.grad is None for p in llama.parameters())
    for made in routers.values():  # all full: nothing has changed
        with torch.no_grad():
            made.decide[-1].bias.copy_(torch.tensor([90.0, -90.0]))
    with torch.no_grad(), LayerGates(llama, table):
        torch.testing.assert_close(llama(input_ids=ids).logits, llama(input_ids=ids).logits)
    plain = llama(input_ids=ids, use_cache=False).logits
    with torch.no_grad(), LayerGates(llama, table) as gates:
        torch.testing.assert_close(llama(input_ids=ids, use_cache=False).logits, plain, rtol=1e-3, atol=1e-3)
    assert gates.sparse.tolist() == [0, 0, 0, 0]


def test_without_noise_gates_take_what_the_prompt_prefers(llama):
    ids = torch.randint(1, 32, (4, 15), generator=seeded())
    made = router(pooled=4)
    with torch.no_grad():
        made.decide[-1].weight.normal_(std=50, generator=seeded(1))
        made.decide[-1].bias.zero_()
        asked = torch.tensor([9, 9, 12, 12])
        with LayerGates(llama, {LAYERS[0]: made}, tau=None, asked=asked) as gates:
            llama(input_ids=ids, use_cache=False)
        first = gates.sparse
        for b, n in enumerate(asked.tolist()):
            with LayerGates(llama, {LAYERS[0]: made}, tau=None) as gates:
                llama(input_ids=ids[b : b + 1, :n], use_cache=False)
            assert gates.sparse.item() == first[b].item()


def test_gates_on_our_own_decoder_and_what_they_refuse(llama):
    torch.manual_seed(0)
    model = Decoder(32, 32, 2, 4)
    with LayerGates(model, {"blocks.0.attention": router(towards="sparse")}) as gates:
        model(torch.randint(32, (3, 9), generator=seeded()))
    assert gates.sparse.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no layer was gated; run the model first"):
        _ = LayerGates(model, {}).sparse
    with pytest.raises(LookupError, match=r"layer 'blocks.9': the model has no such module"):
        with LayerGates(model, {"blocks.9": router()}):
            pass
    ids, mask = torch.randint(1, 32, (2, 9), generator=seeded()), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=r"self_attn': gates take whole sequences, without cached keys, padding"):
        with LayerGates(llama, {LAYERS[0]: router()}):
            llama(input_ids=ids, attention_mask=mask)


def test_the_temperature_falls_and_stays():
    taus = [temperature(s, 100) for s in range(101)]
    assert taus[0] == 1.5
    assert taus[30] == pytest.approx(1.25)
    assert taus[60:] == [1.0] * 41
    assert all(a >= b for a, b in pairwise(taus))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        temperature(0, 0)


def test_refusals():
    with pytest.raises(ValueError, match="pooled must be at least 1, got 0"):
        LayerRouter(8, pooled=0)
    with pytest.raises(ValueError, match=r"inv_freq must be at most head_dim / 2 = 4 numbers, got 5"):
        LayerRouter(8, inv_freq=torch.ones(5))
    with pytest.raises(ValueError, match="sparse must be a Pattern alike for all heads"):
        LayerRouter(8, of_heads())
    with pytest.raises(ValueError, match=r"asked must be in 1\.\.9, got 0\.\.9"):
        router().features(drawn(2, 2, 9, 8).float(), torch.tensor([0, 9]))


def of_heads():
    return per_head([Causal(), Window(2, 0)])
