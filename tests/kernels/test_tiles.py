"""The tile pass and its reducers against dense float64 attention."""

from dataclasses import dataclass
from inspect import unwrap  # the shape checks of the tests would answer first

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels import stats, tiles
from regard.kernels.scope import make_scope
from regard.patterns import Pattern, Sinks, Window
from tests.kernels.problems import assert_close, problems
from tests.oracles import attention as oracle


def sink_mass(lse, kwargs):
    if "sink" not in kwargs:
        return None
    return torch.where(lse == -torch.inf, 0.0, (kwargs["sink"].double()[None, :, None] - lse).exp())


@given(problems(), st.sampled_from([None, None, 1, 7, 64]))
def test_row_statistics(problem, tile):
    q, k, kwargs, _, g = problem
    weights, lse, _ = oracle.attention(q, k, **kwargs)
    features = torch.randn(k.shape[2], 3, generator=g)
    reducers = [stats.Lse(), stats.Entropy(), stats.Features(features), stats.Squares(), stats.Top()]
    got = stats.tile_pass(q, k, reducers, tile=tile, **kwargs)
    # Scores round relative to their size, and the entropy and lse inherit that.
    assert_close(got[0], lse)
    assert_close(got[1], oracle.entropy(weights, sink_mass(lse, kwargs)), 2e-5)
    assert_close(got[2], weights @ features.double())
    assert_close(got[3], weights.square().sum(-1))
    weight, index = got[4]
    assert_close(weight, weights.amax(-1))
    assert torch.equal(index < 0, weights.amax(-1) == 0)
    assert_close(weights.gather(-1, index.clamp(min=0)[..., None])[..., 0], weights.amax(-1))


@given(problems(), st.sampled_from([None, None, 1, 7, 64]), st.booleans(), st.booleans())
def test_column_statistics(problem, tile, narrow, shared):
    q, k, kwargs, start, g = problem
    weights, _, _ = oracle.attention(q, k, **kwargs)
    batch, _, q_len, _ = q.shape
    kv_len = k.shape[2]
    w = torch.randn(1 if shared else batch, q_len, 4, generator=g)
    w[:, : q_len // 2, 0] = 0
    w[:, q_len // 3 :, 2] = 0
    lo, hi = (1, 1 + kv_len // 2) if narrow else (-kv_len - 5, abs(start) + q_len + 5)
    reducers = [stats.Columns(w), stats.Offsets(lo, hi), stats.Offsets(lo, hi, w)]
    columns, offsets, weighted = stats.tile_pass(q, k, reducers, tile=tile, **kwargs)
    by_row = torch.stack(
        [oracle.offsets(weights * w.double()[:, None, :, c, None], lo, hi, start) for c in range(4)], 2
    )
    assert_close(weighted, by_row)
    assert_close(columns, torch.einsum("bqc,bhqk->bhck", w.double().expand(batch, -1, -1), weights))
    assert_close(offsets, oracle.offsets(weights, lo, hi, start))


@given(problems(), st.booleans(), st.booleans())
def test_relations_patterns_and_heads(problem, as_lists, per_sample):
    q, k, kwargs, start, g = problem
    weights, _, _ = oracle.attention(q, k, **kwargs)
    batch, _, q_len, kv_len = weights.shape
    relation = torch.rand(batch if per_sample else 1, q_len, kv_len, generator=g) < 0.1
    given_as = relation
    if as_lists:
        given_as = tuple(relation.nonzero().unbind(1)) if per_sample else tuple(relation[0].nonzero().unbind(1))
    patterns = [Window(3), Sinks(1), Window(2, 2) | Sinks(2)]
    i, j = torch.arange(q_len)[:, None] + start, torch.arange(kv_len)[None]
    reducers = [stats.Pairs(given_as), stats.Pairs(given_as, total=True), stats.PatternMass(patterns)]
    pairs, total, mass = stats.tile_pass(q, k, reducers, **kwargs)
    (gram,) = stats.tile_pass(q, k, [stats.Gram()], **kwargs)
    assert_close(total, (weights * relation[:, None]).sum((-2, -1)))
    assert_close(pairs, (weights * relation[:, None]).sum(-1))
    assert_close(mass, torch.stack([(weights * p.allows(i, j)).sum(-1) for p in patterns], -1))
    assert_close(gram, torch.einsum("bhqk,bgqk->bhg", weights, weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@given(data=st.data())
def test_dtypes(dtype, data):
    """Half precision inputs give the weights of exactly those inputs; float64 stays float64."""
    q, k, kwargs, start, _ = data.draw(problems(dtype=dtype, lengths=st.integers(1, 90)))
    weights, lse, _ = oracle.attention(q, k, **kwargs)
    got_lse, entropy, offsets = stats.tile_pass(q, k, [stats.Lse(), stats.Entropy(), stats.Offsets(-3, 9)], **kwargs)
    assert got_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    if dtype == torch.float64 and "mask" in kwargs and kwargs["mask"].is_floating_point():
        kwargs["mask"] = kwargs["mask"].double()
    assert_close(got_lse, lse, tolerance)
    assert_close(entropy, oracle.entropy(weights, sink_mass(lse, kwargs)), tolerance)
    assert_close(offsets, oracle.offsets(weights, -3, 9, start), tolerance)


def test_entropy_of_bf16_keys_that_share_a_component():
    """Scores up to about 200 from a common component: the naive form is off by tenths of a nat."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 257, 64, generator=g)
    q = (q + 12 * torch.nn.functional.normalize(torch.ones(64), dim=0)).bfloat16()
    k = (torch.randn(1, 2, 257, 64, generator=g) + 16.0).bfloat16()
    weights, lse, scores = oracle.attention(q, k, is_causal=True)
    assert scores.masked_fill(scores == -torch.inf, 0).abs().max() > 150
    (got,) = stats.tile_pass(q, k, [stats.Entropy()], is_causal=True)
    want = oracle.entropy(weights)
    assert (got - want).abs().max() < 1e-4
    assert (stats.row_entropy(q, k, is_causal=True) - want).abs().max() < 1e-4
    # The form the formula warns of, in the precision of the inputs:
    naive = lse.bfloat16() - (q * (weights.bfloat16() @ k)).sum(-1) * 64**-0.5
    assert (naive - want).abs().max() > 0.1


def test_empty_batch_and_no_keys():
    reducers = [stats.Lse(), stats.Columns(torch.ones(1, 5, 2)), stats.Offsets(0, 3), stats.Top()]
    lse, columns, offsets, _ = stats.tile_pass(torch.zeros(0, 2, 5, 4), torch.zeros(0, 1, 5, 4), reducers)
    assert lse.shape == (0, 2, 5)
    assert columns.shape == (0, 2, 2, 5)
    assert offsets.shape == (0, 2, 3)
    lse, columns, offsets, (top, index) = stats.tile_pass(torch.zeros(1, 2, 5, 4), torch.zeros(1, 1, 0, 4), reducers)
    assert torch.all(lse == -torch.inf)
    assert columns.shape == (1, 2, 2, 0)
    assert not offsets.any()
    assert not top.any()
    assert torch.all(index == -1)


def test_finfo_min_is_not_allowed():
    """Additive masks often hold the smallest finite number where they mean -inf."""
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 4, 8, generator=g), torch.randn(1, 1, 4, 8, generator=g)
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[0] = torch.finfo(torch.float32).min
    lse, entropy = stats.tile_pass(q, k, [stats.Lse(), stats.Entropy()], mask=mask)
    _, want, _ = oracle.attention(q, k, is_causal=True)
    assert lse[0, 0, 0] == -torch.inf
    assert entropy[0, 0, 0] == 0
    assert_close(lse[:, :, 1:], want[:, :, 1:])


def test_autocast_does_not_reach_the_pass():
    g = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 2, 40, 8, generator=g), torch.randn(1, 2, 40, 8, generator=g)
    (plain,) = stats.tile_pass(q, k, [stats.Lse()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (cast,) = stats.tile_pass(q, k, [stats.Lse()])
    assert torch.equal(plain, cast)


def test_window_pattern_skips_keys_outside_the_band(monkeypatch):
    """A window of 8 over 4096 keys must not compute 4096 x 4096 scores."""
    done = []
    real = torch.mm

    def counting(a, b, **kw):
        done.append(a.shape[0] * b.shape[1])
        return real(a, b, **kw)

    monkeypatch.setattr(torch, "mm", counting)
    q = torch.randn(1, 1, 4096, 8, generator=torch.Generator().manual_seed(3))
    stats.tile_pass(q, q, [stats.Lse()], pattern=Window(8))
    assert 0 < sum(done) < 4096 * 4096 / 10


def bad(**changes):
    g = torch.Generator().manual_seed(0)
    arguments = {
        "q": torch.randn(2, 4, 5, 8, generator=g),
        "k": torch.randn(2, 2, 6, 8, generator=g),
        "reducers": [stats.Lse()],
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.full((2, 4, 5, 8), torch.nan)}, "q holds NaN"),
        ({"k": torch.full((2, 2, 6, 8), torch.inf)}, "k holds NaN or infinite"),
        ({"k": torch.zeros(2, 3, 6, 8)}, "divides the 4"),
        ({"k": torch.zeros(1, 2, 6, 8)}, "agree in batch"),
        ({"k": torch.zeros(2, 2, 6, 8, dtype=torch.float64)}, "share dtype"),
        ({"mask": torch.zeros(3, 6)}, "mask must broadcast"),
        ({"mask": torch.zeros(5, 6, dtype=torch.long)}, "mask must be bool"),
        ({"mask": torch.full((5, 6), torch.nan)}, "mask is additive and holds NaN"),
        ({"softcap": 0.0}, "softcap must be > 0"),
        ({"tile": 0}, "tile must be"),
        ({"reducers": [stats.Columns(torch.zeros(1, 4, 2))]}, "row_weights must be"),
        ({"reducers": [stats.Offsets(0, 3, torch.zeros(1, 4, 2))]}, "row_weights must be"),
        ({"reducers": [stats.Pairs(torch.zeros(1, 4, 6, dtype=torch.bool))]}, "relation must be"),
        ({"reducers": [stats.Features(torch.zeros(4, 2))]}, "features must be"),
        ({"reducers": [stats.Pairs((torch.tensor([0]), torch.tensor([6])))]}, "kv_idx must lie"),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = bad(**changes)
    with pytest.raises(ValueError, match=message):
        unwrap(stats.tile_pass)(arguments.pop("q"), arguments.pop("k"), arguments.pop("reducers"), **arguments)


def test_a_tensor_is_no_pattern():
    where = {"mask": None, "is_causal": False, "q_start": None, "valid": None}
    with pytest.raises(ValueError, match="pattern must be a regard Pattern, got Tensor"):
        unwrap(make_scope)((1, 1, 5, 6), torch.device("cpu"), pattern=torch.ones(5, 6), **where)


def test_pairs_in_any_order():
    g = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 2, 30, 8, generator=g), torch.randn(2, 1, 30, 8, generator=g)
    weights, _, _ = oracle.attention(q, k, is_causal=True)
    b, i, j = (torch.randint(0, n, (80,), generator=g) for n in (2, 30, 30))
    want = torch.zeros(2, 2, 30, dtype=torch.float64)
    for sample, row, key in zip(b.tolist(), i.tolist(), j.tolist(), strict=True):
        want[sample, :, row] += weights[sample, :, row, key]  # a pair listed twice counts twice
    (got,) = stats.tile_pass(q, k, [stats.Pairs((b, i, j))], is_causal=True, tile=7)
    assert_close(got, want)


@dataclass(frozen=True)
class Shifted(Pattern):
    """A pattern that differs between heads and samples."""

    def allows(self, q_idx, kv_idx, head=None, batch=None):
        return kv_idx <= q_idx - head - 2 * batch


def test_patterns_that_differ_between_heads_and_samples(monkeypatch):
    """One unit a tile: a mask kept for the next head would be the wrong one."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 3, 40, 8, generator=g), torch.randn(2, 3, 40, 8, generator=g)
    i, j = torch.arange(40)[:, None], torch.arange(40)[None]
    head, batch = torch.arange(3)[:, None, None], torch.arange(2)[:, None, None, None]
    allowed = Shifted().allows(i, j, head, batch)
    full, _, _ = oracle.attention(q, k)
    _, lse, _ = oracle.attention(q, k, mask=allowed)
    for budget in (1, 1 << 18):  # one head of one sample a tile; all of them
        monkeypatch.setattr(tiles, "_budget", lambda device, budget=budget: budget)
        (mass,) = stats.tile_pass(q, k, [stats.PatternMass([Shifted()])])
        assert_close(mass[..., 0], (full * allowed).sum(-1))
        (got,) = stats.tile_pass(q, k, [stats.Lse()], pattern=Shifted())
        assert_close(got, lse)
