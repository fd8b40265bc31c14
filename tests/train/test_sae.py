"""Sparse autoencoders: formulas, training that finds planted features, attribution that sums to the feature."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.patterns import Causal, Sinks, Window, per_head
from regard.train.sae import SAE, head_attribution, head_share, source_attribution, train_sae
from tests.oracles import sae as oracle


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(d, m, seed=0):
    sae = SAE(d, m, torch.Generator().manual_seed(seed)).double().requires_grad_(False)
    sae.encoder.copy_(drawn(seed + 1, m, d))
    sae.encoder_bias.copy_(drawn(seed + 2, m))
    sae.decoder_bias.copy_(drawn(seed + 3, d))
    sae.scale.fill_(1.7)
    return sae


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 99))
def test_it_computes_its_formula(d, m, seed):
    sae, x = some(d, m, seed), drawn(seed + 9, 3, d)
    for row, features, back in zip(x, sae.encode(x), sae(x), strict=True):
        f, xhat = oracle.forward(sae, row)
        torch.testing.assert_close(features, f)
        torch.testing.assert_close(back, xhat)
        some_of_them = torch.arange(0, m, 2)
        left = [v - 1.7 * sum(float(f[k]) * sae.decoder[k, i] for k in some_of_them) for i, v in enumerate(row)]
        torch.testing.assert_close(sae.without(row, some_of_them), torch.stack(left))
    assert sae.l0(x) == pytest.approx(float((sae.encode(x) > 0).sum(-1).double().mean()))
    torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(m).double())


def planted(n=4000, d=24, features=32, active=0.04, seed=17):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=-1)
    on = torch.rand(n, features, generator=generator) < active
    size = 1 + torch.rand(n, features, generator=generator)
    return truth, 5 * ((on * size) @ truth) + 3


@pytest.fixture(scope="module")
def learned():
    truth, x = planted()
    log = []
    sae = train_sae(x, 64, 0.8, steps=1200, batch=256, lr=4e-3, resample=200, on_step=lambda i, e: log.append(e))
    return truth, x, sae, log


def test_training_finds_planted_features(learned):
    truth, x, sae, log = learned
    best = (truth @ sae.decoder.T).amax(1)
    assert (best > 0.9).float().mean() > 0.8  # random directions never do, see below
    untrained = SAE(24, 64, torch.Generator().manual_seed(0))
    assert ((truth @ untrained.decoder.T).amax(1) > 0.9).float().mean() < 0.2
    assert float((x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()) < 0.1
    assert sae.l0(x) < 6
    assert log[-1]["loss"] < log[0]["loss"] / 3
    torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(64))


def test_training_is_the_same_twice_and_in_any_unit():
    _, x = planted(500)
    first, again, larger = (train_sae(y, 20, 0.3, steps=30, batch=64, seed=3) for y in (x, x, 1024 * x))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.testing.assert_close(larger(1024 * x), 1024 * first(x), rtol=1e-3, atol=1e-1)
    other = train_sae(x, 20, 0.3, steps=30, batch=64, seed=4)
    assert not torch.equal(first.encoder, other.encoder)


def test_dead_features_start_again():
    _, x = planted(500)
    log = []
    # So much sparsity that every feature dies at first.
    sae = train_sae(x, 30, 30.0, steps=120, batch=64, lr=2e-2, resample=30, on_step=lambda i, e: log.append(e))
    # They fire before they die, so the second time is the first that finds them dead.
    assert next(i for i, e in enumerate(log) if e["resampled"]) == 59
    assert all(e["resampled"] == 0 for e in log[91:])
    torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(30))
    log.clear()
    train_sae(x, 30, 30.0, steps=120, batch=64, lr=2e-2, resample=0, on_step=lambda i, e: log.append(e))
    assert sum(e["resampled"] for e in log) == 0


def test_what_does_not_fit_is_refused():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="rows that differ"):
        train_sae(torch.ones(5, 4), 8, 0.1)
    with pytest.raises(ValueError, match="all finite"):
        train_sae(x * torch.nan, 8, 0.1)
    with pytest.raises(ValueError, match="lam"):
        train_sae(x, 8, -0.1)
    with pytest.raises(ValueError, match="not a multiple of 3 heads"):
        head_share(SAE(4, 8), 3)


def test_head_share_is_one_head_for_a_row_in_its_slice():
    sae = SAE(6, 3).requires_grad_(False)
    sae.decoder.copy_(torch.tensor([[0, 0, 1, 0, 0, 0], [0.6, 0, 0, 0, 0.8, 0], [0.5, 0.5, 0, 0, 0.5, 0.5]]))
    r = 0.5
    expected = torch.tensor([[0, 1, 0], [0.6 / 1.4, 0, 0.8 / 1.4], [r, 0, r]])
    torch.testing.assert_close(head_share(sae, 3), expected)


@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 17),
    st.sampled_from(["all", "causal", "window", "by head"]),
    st.integers(0, 99),
)
def test_sources_are_those_of_the_matrices_and_sum_to_the_feature(heads, length, which, seed):
    (heads, kv_heads), d = heads, 3
    pattern = {
        "all": None,
        "causal": Causal(),
        "window": Window(2) & ~Sinks(1),  # the first row may see nothing
        "by head": per_head([Causal(), Window(1), Causal() & ~Sinks(2), Causal()][:heads]),
    }[which]
    q, k, v = (
        drawn(seed, 2, heads, length, 5),
        drawn(seed + 1, 2, kv_heads, length, 5),
        drawn(seed + 2, 2, kv_heads, length, d),
    )
    sae = some(heads * d, 7, seed)
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randint(n, (6,), generator=generator) for n in (2, length)], 1)
    features = torch.randint(7, (6,), generator=generator)
    c = source_attribution(sae, q, k, v, places, features, pattern=pattern)
    at = torch.arange(length)
    every = torch.ones(heads, length, length, dtype=torch.bool)
    allowed = every
    if pattern is not None:
        allowed = pattern.allows(at[:, None], at[None], torch.arange(heads)[:, None, None]) & every
    z = attend(q, k, v, pattern).transpose(1, 2)
    offset = sae.encoder_bias - sae.encoder @ sae.decoder_bias
    before = sae.before(z.flatten(2))
    for n, ((sample, row), f) in enumerate(zip(places.tolist(), features.tolist(), strict=True)):
        expected = oracle.sources(sae, q, k, v, sample, row, f, allowed[:, row])
        torch.testing.assert_close(c[n], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c[n].sum() + offset[f], before[sample, row, f], rtol=1e-5, atol=1e-5)
    heads_give = head_attribution(sae, z[places[:, 0], places[:, 1]], features)
    torch.testing.assert_close(heads_give.sum(-1), c.sum(-1), rtol=1e-5, atol=1e-5)


def test_sources_of_other_widths_are_refused():
    q, v = drawn(0, 1, 4, 5, 3), drawn(1, 1, 2, 5, 3)
    with pytest.raises(ValueError, match=r"heads \* v_dim = 9"):
        source_attribution(SAE(9, 4), q, v, v, torch.zeros(1, 2).long(), torch.zeros(1).long())
