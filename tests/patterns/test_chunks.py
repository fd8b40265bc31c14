"""Chunks chosen by their keys, put side by side: against gathering and rotating, one query at a time."""

from functools import partial

import pytest
import torch

from regard.kernels.attend import attend
from regard.kernels.renumbered import renumbered
from regard.kernels.rotary import inverse_frequencies, rotate
from regard.patterns import Causal, Window
from regard.patterns.chunks import ChunkRoute
from tests.oracles import chunks as oracle

INV_FREQ = inverse_frequencies(4, 50.0, dtype=torch.float64)
TURN = partial(rotate, inv_freq=INV_FREQ)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(length, seed=0):
    return (
        drawn(2, 4, length, 4, seed=seed),
        drawn(2, 2, length, 4, seed=seed + 1),
        drawn(2, 2, length, 4, seed=seed + 2),
    )


def summed(route, q, k, v, past=None):
    return route.summarize(k, past=past, **({"q": q, "v": v} if route.representation == "paper" else {}))


@pytest.mark.parametrize("representation", ["paper", "mean", "max"])
@pytest.mark.parametrize(("total", "first", "last"), [(4, 1, 2), (2, 0, 1), (5, 2, 1)])
def test_slots_are_the_chunks_gathered_and_rotated(representation, total, first, last):
    q, k, v = made(26)
    route = ChunkRoute(3, total, first, last, representation, TURN)
    routed = route.select(q, summed(route, q, k, v), within=Causal())
    out, _ = renumbered(q, k, v, routed, TURN)
    for b in range(2):
        for h in range(4):
            x = q[b, h], k[b, h // 2], v[b, h // 2]
            want, chosen = oracle.read(*x, 3, total, INV_FREQ, representation, first, last)
            for t, picked in enumerate(chosen):
                assert routed.index[b, h, t][: routed.count[b, h, t]].tolist() == picked
            torch.testing.assert_close(out[b, h], torch.tensor(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("total", [4, 9])
def test_texts_no_longer_than_the_chunks_are_read_as_they_are(total):
    q, k, v = made(26)
    route = ChunkRoute(3, total, turn=TURN)
    out, lse = renumbered(q, k, v, route.select(q, summed(route, q, k, v), within=Causal()), TURN)
    at = torch.arange(26)
    want, told = attend(TURN(q, at), TURN(k, at), v, Causal(), return_lse=True)
    same = min(26, total * 3)
    torch.testing.assert_close(out[:, :, :same], want[:, :, :same], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse[:, :, :same], told[:, :, :same], rtol=0, atol=1e-12)
    assert (total == 9) == torch.allclose(out, want, atol=1e-6)


@pytest.mark.parametrize("representation", ["paper", "mean", "max"])
def test_appending_equals_summing_up_at_once(representation):
    q, k, v = made(26)
    route = ChunkRoute(3, 4, representation=representation, turn=TURN)
    whole, past, start = summed(route, q, k, v), None, 0
    for size in (5, 1, 9, 0, 11):
        part = slice(start, start + size)
        past = summed(route, q[:, :, part], k[:, :, part], v[:, :, part], past)
        start += size
    assert past.length == whole.length
    for name in whole.parts:
        torch.testing.assert_close(past[name], whole[name], rtol=0, atol=1e-12)
    one = route.select(q[:, :, -1:], past, within=Causal())
    assert one.index.tolist() == route.select(q, whole, within=Causal()).index[:, :, -1:, : one.index.shape[3]].tolist()


def test_choices_are_by_unrotated_queries():
    """Turning q by its position changes what is chosen: the route must be given it as it was before."""
    q, k, v = made(60)
    route = ChunkRoute(3, 4, turn=TURN)
    summary = summed(route, q, k, v)
    plain = route.select(q, summary, within=Causal()).index
    assert not torch.equal(plain, route.select(TURN(q, torch.arange(60)), summary, within=Causal()).index)


def test_what_lies_within_uses_up_no_choice():
    q, k, v = made(40)
    route = ChunkRoute(3, 4, representation="mean", within=Window(17))
    routed = route.select(q, summed(route, q, k, v), within=Causal())
    for t in range(40):
        told = routed.index[0, 0, t][: routed.count[0, 0, t]].tolist()
        near = [g for g in range(t // 3 + 1) if 3 * g + 2 >= t - 17]
        assert set(told) <= set(near)
        assert len(told) == min(len(near), 4)


def test_what_does_not_fit():
    q, k, v = made(9)
    for how, told in (
        ({"chunk": 0}, "chunk must be an integer >= 1"),
        ({"total": 2}, r"total must be an integer >= 3, got 2, first \+ last"),
        ({"last": 0}, "last must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=told):
            ChunkRoute(**how)
    with pytest.raises(ValueError, match='q and v must be given with representation="paper"'):
        ChunkRoute(3, 4).summarize(k)
    from regard.patterns import Routed

    spans = Routed.spans(torch.zeros(1, 1, 9, 1).int(), torch.ones(1, 1, 9, 1).int(), q_len=9, kv_len=9)
    with pytest.raises(ValueError, match=r"routed must list blocks \(1, chunk\)"):
        renumbered(q, k, v, spans, TURN)
