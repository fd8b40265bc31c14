"""The low-rank route against loops in float64; what it keeps, what it costs, what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.kernels.recall import kept_mass
from regard.layers.lowrank_route import LowRankRoute
from regard.patterns import Columns
from regard.train.objectives import weights_mse
from regard.train.simple import fit


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def route(length=13, head_dim=6, seed=0, **how):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LowRankRoute(head_dim, length, generator=seeded(seed), **how).double()
    with torch.no_grad():  # E and U as wide as after training, so that nothing is nearly equal
        made.mix.normal_(generator=seeded(seed + 1))
        made.basis.normal_(std=0.05, generator=seeded(seed + 2))
    return made


def guess(made, q, k, cut):
    """A of one head, by loops."""
    w = {name: p.detach().numpy() for name, p in made.named_parameters()}
    qc = q @ w["q_proj.weight"].T + w["q_proj.bias"]
    kc = k @ w["k_proj.weight"].T + w["k_proj.bias"]
    rows = []
    for i in range(made.prefix, made.length):
        scores = np.array(
            [sum(qc[i] @ kc[j] * w["mix"][j, r] for j in range(made.length)) for r in range(made.basis.shape[1])]
        )
        scores = scores / np.sqrt(qc.shape[1])
        c = np.exp(scores - scores.max())
        c /= c.sum()
        u = w["basis"]
        if cut:
            keep = np.argsort(-c, kind="stable")[: made.coefficients]
            c = np.where(np.isin(np.arange(len(c)), keep), c, 0)
            u = np.where(np.abs(u) > made.threshold, np.abs(u), 0)
        rows.append(u @ c)
    return np.array(rows)


@given(
    st.integers(2, 15),
    st.integers(0, 1),
    st.sampled_from([0.1, 0.25, 0.6, 1]),
    st.sampled_from([1, 2, None]),
    st.integers(0, 50),
)
def test_the_guess_and_the_keys_are_the_formulas(length, prefix, share, coefficients, seed):
    made = route(length, prefix=prefix, share=share, rank=4, coefficients=coefficients, seed=seed)
    q, k = drawn(2, 2, length, 6, seed=seed), drawn(2, 1, length, 6, seed=seed + 1)
    found, soft = made(q, k), made.predict(q, k).detach().numpy()
    place = torch.arange(length)
    keep = int(np.ceil(share * length - 1e-9))
    for b in range(2):
        for h in range(2):
            np.testing.assert_allclose(soft[b, h], guess(made, q[b, h].numpy(), k[b, 0].numpy(), False), atol=1e-9)
            hard = guess(made, q[b, h].numpy(), k[b, 0].numpy(), True)
            want = np.zeros((length, length), dtype=bool)
            want[:prefix] = True
            for i, row in enumerate(hard):
                want[prefix + i, np.argsort(-row.round(12), kind="stable")[:keep]] = True
            allowed = found.of(h, b).allows(place[:, None], place[None])
            assert allowed[prefix:].sum(1).tolist() == [keep] * (length - prefix)
            np.testing.assert_array_equal(allowed.numpy(), want)


def test_what_may_not_meet_uses_up_no_budget():
    made = route(12, share=0.5)
    q, k, v = (drawn(1, 2, 12, 6, seed=s) for s in range(3))
    seen = Columns(((2, 10),))
    found = made(q, k, within=seen)
    assert (found.count[:, :, 1:] == 6).all()
    assert ((found.index >= 2) & (found.index < 10) | (found.index == -1)).all()
    assert found.equal((made & seen)(q, k))
    out = attend(q, k, v, found)
    torch.testing.assert_close(out[:, :, :1], attend(q, k, v, seen)[:, :, :1])  # the class token sees all there is


def test_keeping_all_is_dense_attention():
    made = route(9, share=1)
    q, k, v = (drawn(2, 2, 9, 6, seed=s) for s in range(3))
    torch.testing.assert_close(attend(q, k, v, made(q, k)), attend(q, k, v))


def test_the_cost_counts_every_product():
    made = LowRankRoute(64, 197, rank=32)
    assert made.cost(197, 197, 64) == 2 * 197 * 64 * 32 + 2 * 197 * 32 * 32 + 8 * 197**2
    q = drawn(1, 1, 197, 64).float()
    found = made(q, q)
    pairs = 197 + 196 * 50
    assert found.flops(197, 197, 64) == 4 * 64 * pairs + 2 * made.cost(197, 197, 64)


def test_it_learns_weights_that_follow_a_rule():
    """Keys of one of four kinds, queries ask for a kind: after 200 steps the kept quarter holds most of the mass."""
    torch.manual_seed(0)
    made = LowRankRoute(8, 16, prefix=0, rank=8, generator=seeded())
    kinds = torch.eye(8)[:4] * 4

    def draw(generator, n=16):
        which = torch.arange(16) % 4
        asked = torch.randint(4, (n, 1, 16), generator=generator)
        return kinds[asked], kinds[which].expand(n, 1, 16, 8)

    def loss(model, batch):
        q, k = batch
        return weights_mse(model.predict(q, k), (q @ k.mT / 8**0.5).softmax(-1))

    q, k = draw(seeded(5))
    before = kept_mass(q, k, made(q, k)).mean()
    fit(made, loss, draw, 200, 1e-2)
    after = kept_mass(q, k, made(q, k)).mean()
    assert before < 0.6
    assert after > 0.9


def test_the_mask_passes_no_gradient_and_the_guess_does():
    made = route()
    q, k = (drawn(1, 2, 13, 6, seed=s).requires_grad_() for s in range(2))
    assert not made(q, k).index.requires_grad
    made.predict(q, k).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())


def test_it_routes_a_model_at_the_seam():
    import regard
    from regard.tasks.vision import digits, normalised

    model = regard.load("testbed:vit").model
    x = normalised(digits("test").x[:4])
    layers = [f"vit.layers.{i}.attention" for i in range(4)]
    with torch.no_grad():
        plain = model(pixel_values=x).logits
        with regard.attend_with(model, {n: LowRankRoute(16, 65, share=1) for n in layers}):
            torch.testing.assert_close(model(pixel_values=x).logits, plain, rtol=1e-3, atol=1e-3)
        torch.manual_seed(0)
        with regard.attend_with(model, {n: LowRankRoute(16, 65) for n in layers}) as changed:
            assert not torch.allclose(model(pixel_values=x).logits, plain, atol=0.1)
        assert changed.used == dict.fromkeys(layers, 1)
        with pytest.raises(ValueError, match=r"layer 'vit.layers.0.attention': k must have the 64 tokens"):
            with regard.attend_with(model, LowRankRoute(16, 64)):
                model(pixel_values=x)


def test_refusals():
    with pytest.raises(ValueError, match=r"prefix must be in 0\.\.4, got 5"):
        LowRankRoute(6, 5, prefix=5)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        LowRankRoute(6, 5, share=0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LowRankRoute(6, 5, rank=0)
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        LowRankRoute(6, 5, threshold=-1)
    made = route()
    q = drawn(1, 2, 13, 6)
    with pytest.raises(ValueError, match="q must have the 13 tokens of the route, got 4"):
        made(q[:, :, :4], q)
    with pytest.raises(ValueError, match="k must have a divisor of the 2 heads of q, got 3"):
        made(q, drawn(1, 3, 13, 6))
    with pytest.raises(ValueError, match="past must be None: the route is made for 13 tokens at once"):
        made.summarize(q, past=made.summarize(q))
    assert not made.appends
