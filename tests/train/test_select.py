"""Choosing documents: losses against the definition, uniform masks against running means, ranks within domains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.models.decoder import Decoder
from regard.tasks import decoder
from regard.train.select import attention_influence, document_losses, keep_top


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        return decoder.build(decoder.SIZES["smoke"], 0).eval()


def draw(n, length, seed=0):
    return torch.randint(250, (n, length), generator=torch.Generator().manual_seed(seed))


def dense(model, ids, masked=()):
    """Losses of the same weights in float64, written from the definition; masked heads have rows of 1 / (i + 1)."""
    own = Decoder.from_llama(model).double()
    x = own.embed(ids)
    n = ids.shape[1]
    allow = torch.ones(n, n, dtype=torch.bool).tril()
    for layer, block in enumerate(own.blocks):
        a, h = block.attention, block.norm1(x)
        q = a.q_proj(h).unflatten(-1, (a.heads, -1)).transpose(1, 2)
        k, v = (p(h).unflatten(-1, (a.kv_heads, -1)).transpose(1, 2) for p in (a.k_proj, a.v_proj))
        q, k = a.position.rotate(q, k, torch.arange(n), torch.arange(n))
        k, v = (t.repeat_interleave(a.heads // a.kv_heads, 1) for t in (k, v))
        weights = (q @ k.mT / a.head_dim**0.5).masked_fill(~allow, -torch.inf).softmax(-1)
        for masked_layer, head in masked:
            if masked_layer == layer:
                weights[:, head] = allow / allow.sum(1, keepdim=True)
        x = x + a.o_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    logs = own.head(own.norm(x)).log_softmax(-1)[:, :-1]
    return -logs.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


@settings(max_examples=8)
@given(n=st.integers(1, 5), length=st.integers(2, 12), seed=st.integers(0, 99))
def test_scores_against_the_definition(model, n, length, seed):
    ids, heads = draw(n, length, seed), [(0, 1), (1, 0), (1, 3)]
    with torch.no_grad():
        base, masked = dense(model, ids), dense(model, ids, heads)
    found = attention_influence(model, heads, ids, chunk=2)
    torch.testing.assert_close(found.base, base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.masked, masked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.score, (found.masked - found.base) / found.base)
    again = attention_influence(model, heads, ids, base=found.base)
    torch.testing.assert_close(again.score, found.score, atol=1e-6, rtol=1e-4)


def test_padding_is_not_predicted_and_a_mask_leaves_nothing_behind(model):
    ids = draw(3, 9)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 5:] = False
    losses = document_losses(model, ids, valid=valid)
    torch.testing.assert_close(losses[1:2], document_losses(model, ids[1:2, :5]), atol=1e-6, rtol=1e-5)
    before = document_losses(model, ids)
    document_losses(model, ids, [(0, 0)])
    assert torch.equal(document_losses(model, ids), before)
    assert not torch.allclose(document_losses(model, ids, [(0, 0)], kind="zero"), before)


def test_a_model_that_takes_ids_by_place(model):
    own, ids = Decoder.from_llama(model), draw(2, 7)
    one = attention_influence(own, [(0, 0)], ids, inputs=lambda x: (x,))
    torch.testing.assert_close(one.score, attention_influence(model, [(0, 0)], ids).score, atol=1e-4, rtol=1e-3)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(0.01, 1), st.integers(1, 3))
def test_the_best_of_each_domain_are_kept(values, share, domains):
    score = torch.tensor(values)
    domain = [i % domains for i in range(len(values))]
    kept = keep_top(score, domain, share)
    for name in set(domain):
        rows = [i for i in range(len(values)) if domain[i] == name]
        count = sum(bool(kept[i]) for i in rows)
        assert count == round(share * len(rows))
        best = sorted(rows, key=lambda i: (-float(score[i]), i))[:count]
        assert sorted(best) == [i for i in rows if kept[i]]


def test_refusals(model):
    ids = draw(2, 4)
    with pytest.raises(ValueError, match="heads must name at least one"):
        attention_influence(model, [], ids)
    with pytest.raises(ValueError, match=r"base must be \[2\]"):
        attention_influence(model, [(0, 0)], ids, base=torch.ones(3))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        document_losses(model, ids[:, :1])
    with pytest.raises(ValueError, match="valid must have the shape"):
        document_losses(model, ids, valid=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        keep_top(torch.ones(3), share=0)
    with pytest.raises(ValueError, match="domain must hold 3"):
        keep_top(torch.ones(3), ["a"])
    with pytest.raises(ValueError, match="1 NaN"):
        keep_top(torch.tensor([1.0, float("nan")]))
