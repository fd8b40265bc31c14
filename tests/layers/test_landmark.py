"""Landmark attention: three forms agree, rows sum to 1, reading in chunks is its definition and the training form."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.rotary import inverse_frequencies
from regard.layers.landmark import LandmarkAttention, landmark_attention
from regard.layers.position import Rope
from regard.models.decoder import Decoder
from regard.patterns import Causal, Window, select
from regard.patterns.landmarks import LandmarkRoute, OwnBlock
from tests.oracles import landmark as oracle


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.integers(1, 30), st.integers(1, 6), st.sampled_from([(1, 1), (4, 2)]), st.integers(0, 50))
def test_three_forms_agree(length, block, heads, seed):
    q, k = drawn(2, heads[0], length, 4, seed=seed), drawn(2, heads[1], length, 4, seed=seed + 1)
    v = torch.eye(length, dtype=torch.float64).expand(2, heads[1], length, length).contiguous()
    given_ = landmark_attention(q, k, v, block)
    scores = q @ k.repeat_interleave(heads[0] // heads[1], 1).mT / 2
    for b in range(2):
        for h in range(heads[0]):
            want = oracle.weights(scores[b, h].numpy(), block)
            np.testing.assert_allclose(oracle.by_masks(scores[b, h].numpy(), block), want, atol=1e-12)
            np.testing.assert_allclose(given_[b, h], want, atol=1e-12)
            np.testing.assert_allclose(want.sum(1), 1, atol=1e-12)
            assert (want[:, block :: block + 1] == 0).all()


def test_the_last_queries_alone_and_small_tiles_give_the_same(monkeypatch):
    q, k, v = (drawn(1, 2, 23, 4, seed=s) for s in range(3))
    whole = landmark_attention(q, k, v, 3)
    torch.testing.assert_close(landmark_attention(q[:, :, 9:], k, v, 3), whole[:, :, 9:], rtol=0, atol=1e-12)
    monkeypatch.setattr("regard.layers.landmark.TILE", 1)
    torch.testing.assert_close(landmark_attention(q, k, v, 3), whole, rtol=0, atol=1e-12)


def test_gradients():
    q, k, v = (drawn(1, 1, 8, 2, seed=s).requires_grad_() for s in range(3))
    torch.autograd.gradcheck(lambda *x: landmark_attention(*x, 3, backend="reference"), (q, k, v))


@pytest.mark.parametrize(("topk", "chunk"), [(1, 5), (2, 8), (3, 1)])
@pytest.mark.parametrize("rope", [False, True])
def test_reading_is_its_definition(topk, chunk, rope):
    layer = made(topk=topk, chunk=chunk, rope=rope)
    x = drawn(2, 30, 8)
    read = layer(x, state=layer.new_state())
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    inv_freq = inverse_frequencies(4, 50.0) if rope else None
    found = torch.zeros(2, 2, 30, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            out, opened = oracle.read(q[b, h], k[b, h], v[b, h], 3, topk, chunk, inv_freq)
            found[b, h] = torch.tensor(out)
            assert max(map(len, opened)) == topk
    torch.testing.assert_close(read, layer.o_proj(found.transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)


def made(topk=2, chunk=8, rope=True, share="each", block=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        position = Rope(4, 50.0) if rope else None
        return LandmarkAttention(8, 2, block, position=position, topk=topk, chunk=chunk, share=share).double()


@pytest.mark.parametrize("share", ["each", "max_heads"])
@pytest.mark.parametrize("rope", [False, True])
def test_reading_in_any_pieces_gives_the_same(share, rope):
    layer, x = made(share=share, rope=rope), drawn(1, 30, 8)
    whole = layer(x, state=layer.new_state())
    for pieces in ([1] * 30, [13, 1, 16], [7, 23]):
        state = layer.new_state()
        parts = [layer(part, state=state) for part in x.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    state = layer.new_state()
    layer(x[:, :20], state=state)
    other = state.clone()
    layer(x[:, 20:], state=other)
    state.cut(11)
    torch.testing.assert_close(layer(x[:, 11:], state=state), whole[:, 11:], rtol=0, atol=1e-9)
    torch.testing.assert_close(other.summary["landmark"], state.summary["landmark"])


def test_reading_with_every_block_open_is_the_training_form():
    x = drawn(1, 30, 8)
    plain = made(topk=9, rope=False)
    torch.testing.assert_close(plain(x, state=plain.new_state()), plain(x), rtol=0, atol=1e-9)
    turned = made(topk=4, chunk=16)  # 4 blocks finished before the second chunk: places follow on as in training
    read = turned(x, state=turned.new_state())
    torch.testing.assert_close(read, turned(x), rtol=0, atol=1e-6)  # frequencies are float32
    assert not torch.allclose(made(topk=1, chunk=16)(x, state=turned.new_state()), turned(x), atol=1e-3)


def test_sharing_makes_one_decision_of_heads_or_of_queries():
    q, k = drawn(2, 4, 6, 4), drawn(2, 2, 40, 4, seed=1)
    each, heads, queries = (
        LandmarkRoute(2, 3, share, chunk=3)(q, k, within=Causal()) for share in ("each", "max_heads", "max_queries")
    )
    assert each.index.shape[:3] == (2, 4, 6)
    assert heads.index.shape[:3] == (2, 1, 6)
    assert (queries.index[:, :, 2] == queries.index[:, :, 4]).all()  # queries 36..38 are one chunk
    assert not (each.index[:, :, 2] == each.index[:, :, 4]).all()
    weights = (0.5 * q @ k[:, :, 3::4].repeat_interleave(2, 1).mT)[..., :8].softmax(-1).amax(1)
    assert heads.index[0, 0, 0].tolist() == weights[0, 0].topk(2).indices.sort().values.tolist()


def test_what_lies_within_uses_up_no_choice():
    q, k = drawn(1, 2, 40, 4), drawn(1, 2, 40, 4, seed=1)
    routed = LandmarkRoute(2, 3)(q, k, within=Causal() & Window(11))
    for i in range(40):
        told = routed.index[0, 0, i][: routed.count[0, 0, i]].tolist()
        near = [g for g in range(i // 4) if 4 * g + 3 >= i - 11]
        assert set(told) <= set(near)
        assert len(told) == min(2, len(near))


@pytest.mark.parametrize("share", ["each", "max_heads", "max_queries"])
def test_queries_looked_at_in_pieces_choose_the_same(monkeypatch, share):
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 2, 4, 57, 8, generator=generator)
    route = LandmarkRoute(2, every=4, share=share, chunk=7 if share == "max_queries" else None, within=Causal())
    whole = route(q, k)
    monkeypatch.setattr(select, "_CACHED", 1)
    pieces = route(q, k)
    assert torch.equal(pieces.index, whole.index)
    torch.testing.assert_close(pieces.score, whole.score)
    assert not torch.equal(whole.index, route(q.flip(2), k).index)


def test_own_block_is_its_rule():
    pattern = OwnBlock(4)
    rule = torch.tensor([[j <= i and j // 4 == i // 4 and j % 4 != 3 for j in range(14)] for i in range(14)])
    at = torch.arange(14)
    assert torch.equal(pattern.allows(at[:, None], at), rule)
    assert torch.equal(pattern.row_counts(14, 14), rule.sum(1))
    for block in (1, 3, (2, 5)):
        some, full = pattern.layout(14, 14, block).dense()
        assert torch.equal(some, pattern.permute(list(range(14))).layout(14, 14, block, 0).dense()[0])
        assert torch.equal(full, pattern.permute(list(range(14))).layout(14, 14, block, 0).dense()[1])
    with pytest.raises(ValueError, match="P must be an integer >= 2"):
        OwnBlock(1)


def test_in_a_decoder_and_what_it_refuses():
    model = Decoder(20, 8, 2, 2, attention=lambda _: made().float())
    ids = torch.randint(20, (1, 26), generator=torch.Generator().manual_seed(0))
    state = model.new_state()
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], state=state) for i in range(26)]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids, state=model.new_state()), rtol=1e-4, atol=1e-4)
    layer, x = made(), drawn(1, 5, 8)
    with pytest.raises(ValueError, match=r"pattern must be None or Causal\(\)"):
        layer(x, pattern=Window(3))
    with pytest.raises(ValueError, match="context must be None"):
        layer(x, context=x)
    with pytest.raises(ValueError, match="positions must be None with a state"):
        layer(x, state=layer.new_state(), positions=torch.arange(5))
    with pytest.raises(ValueError, match=r"state must be what new_state\(\) gave"):
        layer(x, state=Decoder(4, 8, 1, 2).new_state()[0])
    for how, told in (({"topk": 0}, "topk"), ({"block": 0}, "every"), ({"chunk": 0}, "chunk")):
        with pytest.raises(ValueError, match=told):
            made(**how)
    with pytest.raises(ValueError, match="chunk must be given"):
        LandmarkRoute(2, share="max_queries")
