"""Saliency of earlier output against the matrices and autograd; the rules of decoding that use it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.steer.decoding import saliency_sampling
from regard.steer.locore import locore
from regard.steer.saliency import token_saliency
from regard.watch.intervene import Site, intervene, trace


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.randint(2, 19, (3, 9), generator=torch.Generator().manual_seed(0))


def dense(model, ids, word, prompt, layers):
    """|P dloss/dP| from eager attention: heads averaged, rows of norm 1, mean over output keys and layers."""
    model.set_attn_implementation("eager")
    try:
        out = model(input_ids=ids[None], output_attentions=True, use_cache=False)
        loss = -out.logits[0, -1].log_softmax(-1)[word]
        slopes = torch.autograd.grad(loss, out.attentions)
    finally:
        model.set_attn_implementation("sdpa")
    found = []
    for layer in layers:
        s = (out.attentions[layer] * slopes[layer]).abs()[0, :, -1].mean(0)
        found.append((s / s.norm())[prompt:].mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("layers", [[0], [1, 2]])
def test_saliency_is_that_of_the_matrices(model, layers):
    words = torch.tensor([[4, 7], [11, 2], [3, 18]])
    ours = token_saliency(model, {"input_ids": IDS}, words, prompt=5, layers=layers)
    for row in range(3):
        for place in range(2):
            wanted = dense(model, IDS[row], words[row, place], 5, layers)
            torch.testing.assert_close(ours[row, place], wanted.detach(), rtol=1e-4, atol=1e-6)


def test_without_output_there_is_none(model):
    none = token_saliency(model, {"input_ids": IDS}, torch.ones(3, 1, dtype=torch.long), prompt=9, layers=[0])
    assert torch.equal(none, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="layers must name"):
        token_saliency(model, {"input_ids": IDS}, torch.ones(3, 1, dtype=torch.long), prompt=5, layers=[])


def sampled(model, **how):
    how = {"layers": (1, 2), "eos": 99, "pad": 0, "most": 5, "generator": torch.Generator().manual_seed(3)} | how
    return saliency_sampling(model, {"input_ids": IDS}, **how)


def test_every_draw_is_taken_where_nothing_is_asked_of_it(model):
    found = sampled(model, alpha=0.0)
    assert not found.rejected.any()
    assert not found.fell_back.any()
    ids = torch.cat([IDS, found.words], dim=1)
    for step in range(5):
        logits = model(input_ids=ids[:, : 9 + step]).logits[:, -1]
        assert (logits.topk(5).indices == found.words[:, step, None]).any(1).all()
        here = token_saliency(
            model, {"input_ids": ids[:, : 9 + step]}, found.words[:, step, None], prompt=9, layers=(1, 2)
        )
        torch.testing.assert_close(found.saliency[:, step], here[:, 0])


def test_a_demand_that_nothing_meets_takes_the_largest_saliency(model):
    found = sampled(model, alpha=1e6, most=4)
    assert (found.fell_back >= 2).all()  # the first two have nothing to compare with
    ids = torch.cat([IDS, found.words], dim=1)
    now = {"input_ids": ids[:, :12]}
    best = model(**now).logits[:, -1].topk(5).indices
    each = token_saliency(model, now, best, prompt=9, layers=(1, 2))
    assert torch.equal(best.gather(1, each.argmax(-1, keepdim=True))[:, 0], found.words[:, 3])


def test_one_candidate_is_greedy_and_words_that_are_never_meant_do_not_come(model):
    greedy = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)[:, 9:]
    assert torch.equal(sampled(model, top=1, most=4).words, greedy)
    never = sampled(model, never=tuple(range(2, 12)), most=4)
    assert not ((never.words >= 2) & (never.words < 12)).any()


def test_samples_end_on_their_own(model):
    eos = int(sampled(model, alpha=0.0).words[0, 1])
    found = sampled(model, alpha=0.0, eos=eos)
    assert (found.words[0, 2:] == 0).all()
    assert found.saliency[0, 2:].isnan().all()


def test_locore_is_the_formula(model):
    edits = locore([0, 2], prompt=5, width=3, beta=0.5)
    site = [Site(i, "weights") for i in range(3)]
    plain = trace(model, {"input_ids": IDS}, site[:1])[site[0]].double()
    with intervene(model, edits):
        held = trace(model, {"input_ids": IDS}, site)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    c = 1 + 0.5 * ((j >= 5) & (j > i - 3) & (j <= i))
    wanted = plain * c
    wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(held[site[0]].double(), wanted, rtol=1e-4, atol=1e-6)


def test_locore_acts_the_same_through_a_cache(model):
    edits = locore(range(3), prompt=9, width=2, beta=0.8)
    with intervene(model, edits):
        whole = model(input_ids=IDS).logits
        far = torch.cat([IDS, IDS[:, :3]], dim=1)
        at_once = model(input_ids=far, use_cache=False).logits[:, -1]
        out = model(input_ids=far[:, :-1], use_cache=True)
        stepped = model(input_ids=far[:, -1:], past_key_values=out.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(at_once, stepped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)  # no output yet
    assert not torch.allclose(at_once, model(input_ids=far).logits[:, -1], atol=1e-3)
    with pytest.raises(ValueError, match="at least 1"):
        locore([0], prompt=0)
    with pytest.raises(ValueError, match="beta"):
        locore([0], prompt=4, beta=-2)
