"""K-means routing against its definition; what leaks and what does not; centroids that move only when told to."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from regard.kernels.attend import attend
from regard.layers.routing import KMeansRoute, RoutingAttention
from regard.patterns import Causal, Columns, Segments
from tests.oracles import routing as oracle


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def route(heads=2, head_dim=6, centroids=3, seed=0, **how):
    return KMeansRoute(heads, head_dim, centroids, generator=seeded(seed), **how).double()


@settings(max_examples=15)
@given(st.integers(0, 13), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.integers(0, 50))
def test_balanced_groups_and_their_attention(length, centroids, batch, causal, seed):
    made = route(centroids=centroids, seed=seed)
    q, k = drawn(batch, 2, length, 6, seed=seed), drawn(batch, 1, length, 6, seed=seed + 1)
    v = drawn(batch, 1, length, 5, seed=seed + 2)
    within = Causal() if causal else None
    found = made(q, k, within=within)
    out = attend(q, k, v, found)
    width = -(-length // centroids)
    for b in range(batch):
        for h in range(2):
            mu = made.centroids[h].numpy()
            groups = [oracle.balanced(oracle.normed(x), mu, width) for x in (q[b, h].numpy(), k[b, 0].numpy())]
            for order, group in zip((found.q_order, found.kv_order), groups, strict=True):
                listed = order[b, h].view(centroids, -1)
                assert [[t for t in row if t >= 0] for row in listed.tolist()] == group
            want = oracle.attention(q[b, h].numpy(), k[b, 0].numpy(), v[b, 0].numpy(), *groups, causal)
            np.testing.assert_allclose(out[b, h].numpy(), want, atol=1e-9)
    assert found.cost == 2 * length * centroids * 6


@given(st.integers(0, 14), st.integers(0, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 50))
def test_nearest_lists_the_last_keys_of_the_cluster(queries, start, centroids, width, seed):
    made = route(centroids=centroids, seed=seed, members="nearest", width=width)
    keys = start + queries
    q, k = drawn(2, 2, queries, 6, seed=seed), drawn(2, 2, keys, 6, seed=seed + 1)
    found = made(q, k)
    place = torch.arange(keys)
    for b in range(2):
        for h in range(2):
            x_q, x_k = oracle.normed(q[b, h]), oracle.normed(k[b, h])
            want = oracle.last_of_cluster(x_q, x_k, made.centroids[h].numpy(), width, start)
            allowed = found.of(h, b).allows(place[start:, None], place[None])
            assert [row.nonzero()[:, 0].tolist() for row in allowed] == want


def test_of_equal_tokens_the_earlier_one_is_taken():
    made = route(centroids=2, width=3)
    one = drawn(1, 2, 1, 6).expand(-1, -1, 9, -1)
    found = made(one, one)
    assert found.q_order[0, 0].tolist() == found.kv_order[0, 0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("members", ["balanced", "nearest"])
def test_what_may_not_meet_uses_up_no_budget(members):
    made = route(members=members, width=3)
    q, k = drawn(1, 2, 12, 6), drawn(1, 2, 12, 6, seed=1)
    padded = Columns(((4, 12),)) & Causal()  # the first four keys are padding
    found, cut = made(q, k, within=padded), made(q, k[:, :, 4:].repeat(1, 1, 2, 1)[:, :, :12], within=Causal())
    allowed = found.allows(torch.arange(12)[:, None], torch.arange(12)[None], torch.arange(2)[:, None, None])
    assert not allowed[..., :4].any()
    if members == "balanced":
        assert (found.kv_order >= 4).all()  # groups are full of real keys
    else:
        alone = made(q[:, :, 4:], k[:, :, 4:])
        rows = torch.arange(8)
        inner = alone.allows(rows[:, None], rows[None], torch.arange(2)[:, None, None])
        assert torch.equal(allowed[:, 4:, 4:], inner)
    assert not found.equal(cut)
    assert found.equal((made & padded)(q, k))  # the route can hold it as well


def changed_before(layer, x, t):
    """Whether outputs before token t move when that token becomes another."""
    other = x.clone()
    other[:, t] = drawn(x.shape[0], x.shape[2], seed=99)
    with torch.no_grad():
        return not torch.equal(layer(x)[:, :t], layer(other)[:, :t])


def test_a_causal_layer_tells_nothing_of_the_future_and_the_papers_rule_does():
    x = drawn(2, 24, 16)
    for members, leaks in (("nearest", False), ("balanced", True)):
        layer = RoutingAttention(16, 4, 4, window=3, members=members, generator=seeded()).double().eval()
        assert any(changed_before(layer, x, t) for t in range(1, 24, 3)) == leaks
    assert RoutingAttention(16, 4, 4).route.members == "nearest"


def test_steps_give_the_decisions_of_the_whole():
    made = route(members="nearest", width=4)
    q, k = drawn(2, 2, 15, 6), drawn(2, 1, 15, 6, seed=1)
    whole, place, heads, samples = made(q, k), torch.arange(15), torch.arange(2)[:, None, None], torch.arange(2)
    at = (heads, samples[:, None, None, None])
    want = whole.allows(place[:, None], place[None], *at)
    summary = made.summarize(k[:, :, :7])
    first = made.select(q[:, :, :7], summary)
    assert torch.equal(first.allows(place[:7, None], place[None, :7], *at), want[:, :, :7, :7])
    for t in range(7, 15):
        summary = made.summarize(k[:, :, t : t + 1], past=summary)
        step = made.select(q[:, :, t : t + 1], summary)
        assert torch.equal(step.allows(place[t, None], place[None, : t + 1], *at)[:, :, 0], want[:, :, t, : t + 1])
    with pytest.raises(ValueError, match="members='balanced' fills groups from the whole sequence, got 1 queries"):
        route().select(q[:, :, 14:], summary)


@given(st.integers(1, 9), st.integers(1, 5), st.floats(0, 1), st.integers(0, 50))
def test_centroids_move_by_the_formula(length, centroids, decay, seed):
    made = route(centroids=centroids, seed=seed, decay=decay).train()
    q, k = drawn(2, 2, length, 6, seed=seed), drawn(2, 2, length, 6, seed=seed + 1)
    want = [
        oracle.update(made.centroids[h].numpy(), *(oracle.normed(x[:, h].flatten(0, 1)) for x in (q, k)), decay)
        for h in range(2)
    ]
    made.update(q, k)
    np.testing.assert_allclose(made.centroids.numpy(), want, atol=1e-9)


def test_centroids_stay_in_evaluation_and_travel_with_the_weights():
    layer = RoutingAttention(16, 4, 3, window=4, decay=0.5, generator=seeded())
    x = drawn(2, 20, 16, dtype=torch.float32)
    start = layer.route.centroids.clone()
    layer.eval()(x)
    assert torch.equal(layer.route.centroids, start)
    assert layer.aux == {}
    with pytest.raises(ValueError, match="update moves the centroids"):
        layer.route.update(x[:, None, :, :4], x[:, None, :, :4])
    layer.train()(x)
    assert not torch.equal(layer.route.centroids, start)
    twin = RoutingAttention(16, 4, 3, window=4, decay=0.5, generator=seeded(1))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.eval()(x), layer.eval()(x))


def test_the_auxiliary_loss_pulls_tokens_and_leaves_centroids():
    layer = RoutingAttention(16, 4, 3, window=4, beta=0.5, generator=seeded()).double().train()
    x = drawn(2, 10, 16)
    mu = layer.route.centroids.clone()
    layer(x)
    q = layer.qk_proj(x).unflatten(-1, (4, 4)).transpose(1, 2)[:, 2:].detach()
    far = []
    for b in range(2):
        for h in range(2):
            z = oracle.normed(q[b, h])
            far += [
                ((t - mu[h, c].numpy()) ** 2).sum() for t, c in zip(z, oracle.nearest(z, mu[h].numpy()), strict=True)
            ]
    assert layer.aux["routing"].item() == pytest.approx(0.5 * np.mean(far))
    layer.aux["routing"].backward()
    assert layer.qk_proj.weight.grad.abs().sum() > 0
    assert layer.v_proj.weight.grad is None
    assert not layer.route.centroids.requires_grad


def test_heads_are_local_and_routed_and_gradients_pass():
    layer = RoutingAttention(16, 4, 3, window=2, local=3, generator=seeded()).double()
    x = drawn(1, 12, 16).requires_grad_()
    layer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.eval()
    all_local = RoutingAttention(16, 4, 3, window=2, local=4).double().eval()
    all_local.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("route")})
    assert not torch.allclose(all_local(x), layer(x))
    other = x.detach().clone()
    other[:, 0] += 1.0  # out of every local window of the last tokens
    assert torch.equal(all_local(x)[:, 5:], all_local(other)[:, 5:])
    both = RoutingAttention(16, 4, 3, causal=False, window=2).double().eval()
    assert both.route.members == "balanced"
    assert both(x).shape == x.shape
    documents = Segments((0,) * 6 + (1,) * 6)
    assert torch.equal(layer(x, pattern=documents)[:, 6:], layer(other.clone(), pattern=documents)[:, 6:])


def test_processes_agree_on_the_centroids(monkeypatch):
    """Two with half of the batch each move them as one with all of it; threads stand for the processes."""
    meet, shared = threading.Barrier(2), {}

    def all_reduce(x):
        shared[threading.get_ident()] = x.clone()
        meet.wait(30)
        x.copy_(sum(shared.values()))
        meet.wait(30)

    def work(rank):
        halves[rank].update(drawn(1, 2, 9, 6, seed=rank), drawn(1, 2, 9, 6, seed=rank + 10))

    halves = [route(decay=0.5).train() for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "all_reduce", all_reduce)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    whole = route(decay=0.5).train()
    whole.update(*(torch.cat([drawn(1, 2, 9, 6, seed=s) for s in seeds]) for seeds in ((0, 1), (10, 11))))
    for half in halves:
        torch.testing.assert_close(half.centroids, whole.centroids)
    assert torch.equal(halves[0].centroids, halves[1].centroids)


def test_refusals():
    with pytest.raises((ValueError, TypeCheckError), match="members"):
        route(members="top")
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2"):
        route(decay=2)
    with pytest.raises(ValueError, match="centroids must be at least 1, got 0"):
        route(centroids=0)
    with pytest.raises(ValueError, match=r"k must have a divisor of 2 heads and head_dim 6, got \[1, 3, 4, 6\]"):
        route()(drawn(1, 2, 4, 6), drawn(1, 3, 4, 6))
    with pytest.raises(ValueError, match=r"q must have a divisor of 2 heads and head_dim 6"):
        route()(drawn(1, 2, 4, 5), drawn(1, 2, 4, 6))
    with pytest.raises(ValueError, match=r"local must be in 0\.\.4, got 5"):
        RoutingAttention(16, 4, 3, local=5)
    with pytest.raises(ValueError, match="state must be None"):
        RoutingAttention(16, 4, 3)(drawn(1, 4, 16, dtype=torch.float32), state=object())
