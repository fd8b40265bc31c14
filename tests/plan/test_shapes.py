"""Shapes of video heads: the options, the errors of a model against explicit weights, the choice, its controls."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.models.dit import DiTConfig, VideoDiT
from regard.patterns import Columns, Full, Window
from regard.plan import shape_plan as sp
from regard.plan.baselines import bare
from regard.plan.controls import operations_ratio, shuffled, shuffled_heads, with_patterns
from regard.plan.options import DENSE, NOTHING
from regard.plan.plan import PlanError, load_plan
from regard.plan.shapes import kind_of_shape, offered, one_for_all, search_shapes, stripes, video_options

GRID = (3, 4, 4)


@pytest.fixture(scope="module")
def model():
    """An untrained video model whose outputs are not zero."""
    torch.manual_seed(0)
    config = DiTConfig(words=6, dim=32, layers=2, heads=2, pairs=(2, 3, 3))
    model = VideoDiT(config).eval()
    for p in model.parameters():
        p.data += 0.15 * torch.randn(p.shape)
    return model


def inputs(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 1, 3, 8, 8, generator=g), torch.rand(2, generator=g), torch.tensor([[1, 0], [2, 3]]))] * n


@pytest.fixture(scope="module")
def found(model):
    return sp.record_shapes(model, inputs(1) + inputs(1, 1), GRID)


@given(st.integers(0, 99), st.sampled_from([(2, 4, 8), (4, 3, 3), (2, 1, 16)]), st.integers(0, 4), st.integers(0, 4))
def test_options_are_the_formulas_and_text_joins_them(seed, shape, prefix, suffix):
    g = torch.Generator().manual_seed(seed)
    n, length = shape[1] * shape[2], shape[0] * shape[1] * shape[2]
    whole = prefix + length + suffix
    received = torch.rand(2, whole, generator=g)
    options = video_options(shape, received, prefix=prefix, suffix=suffix)
    i, j = torch.arange(whole)[:, None], torch.arange(whole)[None]
    text = torch.zeros(whole, dtype=torch.bool)
    text[:prefix] = text[prefix + length :] = True
    text = text[:, None] | text[None]
    r = torch.remainder(i - j, n)
    for part in (32, 16, 8):
        assert torch.equal(options[f"diagonal/{part}"].allows(i, j), ((i - j).abs() <= length // part) | text)
        w = min(n // part, (n - 1) // 2)
        assert torch.equal(options[f"multi-diagonal/{part}"].allows(i, j), (torch.minimum(r, n - r) <= w) | text)
    video = received[:, prefix : prefix + length]
    for head in range(2):
        best = set((video[head].topk(max(1, length // 16)).indices + prefix).tolist())
        wanted = torch.tensor([k in best for k in range(whole)])[None] | text
        assert torch.equal(options["stripe"].of(head).allows(i, j), wanted)
    assert options["full"] == Full()
    assert not options["skip"].allows(i, j).any()
    assert {kind_of_shape(name) for name in options} == {"full", "diagonal", "multi-diagonal", "stripe", "skip"}


def test_one_for_all_is_no_cheaper_and_no_wider_than_need_be():
    received = torch.rand(2, 66, generator=torch.Generator().manual_seed(0))
    for least in (0.05, 0.3, 0.7):
        for kind, pattern in one_for_all((4, 4, 4), least, received, prefix=2).items():
            assert pattern.density(66, 66, 0) >= least, kind
            assert pattern.density(66, 66, 0) < least + 0.15, kind


def test_what_is_not_on_offer():
    errors = np.array([[0.0, 0.2, 0.05], [0.0, 0.5, 1.0]])
    assert np.isinf(offered(errors, ["full", "a", "b"], 0.1)).tolist() == [[False, True, False], [False, True, True]]
    with pytest.raises(ValueError, match='"full" among them'):
        offered(errors, ["a", "b", "c"], 0.1)


def test_eps_is_raised_as_far_as_the_budget_asks():
    errors = np.array([[[0.0, 0.2, 0.05], [0.0, 0.5, 1.0]]])
    names, costs = ["full", "a", "skip"], [1.0, 0.5, 0.0]
    for budget, which, eps in ((1.0, [2, 0], 0.1), (0.5, [2, 1], 0.5), (0.0, [2, 2], 1.0)):
        found, limit = search_shapes(errors, names, costs, budget, 0.1)
        assert (found.which.tolist(), limit) == ([which], eps)
    with pytest.raises(ValueError, match="met by no choice"):
        search_shapes(errors, names, costs, -1.0, 0.1)


@torch.no_grad()
def explicit(model, found, given):
    """Errors of every option by weights written out, float64 [layers, heads, options], and the mass kept."""
    seen = {}
    hooks = []
    for name, module in model.named_modules():
        if name in found.layers:

            def keep(module, args, out, name=name):
                seen.setdefault(name, []).append(args)

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        for x in given:
            model(*x)
    for hook in hooks:
        hook.remove()
    length = int(np.prod(GRID))
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    errors, masses = [], []
    for name in found.layers:
        module = model.get_submodule(name)
        lost, size, mass = 0, 0, []
        for x, angles in seen[name]:
            with torch.no_grad():
                q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in module.qkv(x).chunk(3, -1))
                q, k = module.rope(module.norm_q(q), angles), module.rope(module.norm_k(k), angles)
            scores = (q.double() @ k.double().mT) / q.shape[-1] ** 0.5
            w = module.out.weight.double().view(-1, 2, q.shape[-1]).permute(1, 2, 0)
            full = scores.softmax(-1)
            part = []
            for option in found.options:
                pattern = found.patterns[name][option]
                allowed = torch.stack([pattern.of(h).allows(i, j).expand(length, length) for h in range(2)])
                p = torch.where(allowed, scores, -torch.inf).softmax(-1).nan_to_num(0)
                part.append(((full - p) @ v.double() @ w).square().sum((0, 2, 3)))
                mass.append((full * allowed).sum(-1).mean((0, 2)))
            lost = lost + torch.stack(part, 1)
            size = size + (full @ v.double() @ w).square().sum((0, 2, 3))
        errors.append(lost / size[:, None])
        masses.append(torch.stack(mass).view(len(given), -1, 2).mean(0).T)
    return torch.stack(errors).numpy(), torch.stack(masses).numpy()


def test_errors_of_a_model_are_those_of_explicit_weights(model, found):
    errors, mass = explicit(model, found, inputs(1) + inputs(1, 1))
    assert found.layers == ["blocks.0.self_attention", "blocks.1.self_attention"]
    assert found.projected
    assert np.allclose(found.errors, errors, atol=1e-5)
    assert np.allclose(found.mass, mass, atol=1e-5)
    assert np.allclose(found.density, [p.density(48, 48, 0) for p in found.patterns[found.layers[0]].values()])


def test_a_plan_of_shapes_is_applied_saved_and_compared(model, found, tmp_path):
    which = sp.plan_shapes(found, 0.6, eps=10)
    plan = sp.planned(model, found, which)
    assert found.density[which].mean() <= 0.6
    assert operations_ratio(plan) == pytest.approx(1 / found.density[which].mean(), rel=1e-6)
    (given,) = inputs(1)
    with torch.no_grad():
        dense = model(*given)
        with plan.applied(model) as applied:
            changed = model(*given)
        whole = sp.planned(model, found, np.zeros_like(which))
        with whole.applied(model):
            assert torch.equal(model(*given), dense)
    assert sum(applied.used.values()) == 2
    assert not torch.allclose(changed, dense)
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    with torch.no_grad(), again.applied(model):
        assert torch.equal(model(*given), changed)
    records = {(h["layer"], h["head"]): h for h in plan.heads}
    for n, name in enumerate(found.layers):
        for head in range(2):
            assert records[name, head]["role"] == kind_of_shape(found.options[which[n, head]])
            assert records[name, head]["given"] == plan.given(name, head).name
    other = VideoDiT(DiTConfig(words=6, dim=32, layers=1, heads=2, pairs=(2, 3, 3)))
    with pytest.raises(PlanError, match="another model"):
        plan.applied(other)


def test_shapes_rounded_up_to_blocks_lose_less_and_are_stored(model, found, tmp_path):
    more = sp.record_shapes(model, inputs(1) + inputs(1, 1), GRID, block=8)
    assert (more.density >= found.density - 1e-9).all()
    assert (more.mass >= found.mass - 1e-5).all()
    which = np.array([[1, 4], [7, 4]])
    plan = sp.planned(model, more, which)
    assert plan.given(more.layers[0], 1) is plan.given(more.layers[1], 1)  # one option, one kernel call
    assert operations_ratio(plan) == pytest.approx(4 / more.density[which].sum())
    (given,) = inputs(1)
    with torch.no_grad(), plan.applied(model):
        changed = model(*given)
    plan.save(tmp_path / "plan.json")
    with torch.no_grad(), load_plan(tmp_path / "plan.json").applied(model):
        assert torch.allclose(model(*given), changed, atol=1e-6)
    singles = {name: more.patterns[name]["stripe"] for name in more.layers}
    assert operations_ratio(with_patterns(plan, singles, "stripe")) == pytest.approx(1 / more.density[7])


def test_plans_by_seconds_follow_the_clock_of_this_machine(model, found):
    timed = sp.record_shapes(model, inputs(1), GRID, timed=True)
    assert found.seconds is None
    assert timed.seconds.shape == timed.density.shape
    assert (timed.seconds > 0).all()
    # A clock on which the widest diagonal is as slow as dense attention and stripes are next to free.
    told = {"full": 1.0, "diagonal/8": 1.0, "stripe": 0.01}
    seconds = np.array([told.get(name, 0.5) for name in timed.options])
    clocked = replace(timed, seconds=seconds)
    best = None
    for choice in itertools.product(range(len(seconds)), repeat=4):
        if seconds[list(choice)].sum() <= 4 * 0.4 + 1e-9:
            loss = sum(timed.errors[i // 2, i % 2, m] for i, m in enumerate(choice))
            best = loss if best is None else min(best, loss)
    which = sp.plan_shapes(clocked, 0.4, eps=10, by="seconds")
    assert seconds[which].sum() <= 4 * 0.4 + 1e-9
    assert np.take_along_axis(timed.errors, which[..., None], 2).sum() == pytest.approx(best)
    assert not np.array_equal(which, sp.plan_shapes(clocked, 0.4, eps=10))


def test_skip_and_full_are_the_planner_s_own_options(model, found):
    skip = found.options.index("skip")
    plan = sp.planned(model, found, [[0, skip], [skip, skip]])
    assert [plan.given(name, h) for name in found.layers for h in range(2)] == [DENSE, NOTHING, NOTHING, NOTHING]
    assert operations_ratio(plan) == 4
    with torch.no_grad(), plan.applied(model):
        assert bool(model(*inputs(1)[0]).isfinite().all())


def test_controls(model, found):
    g = torch.Generator().manual_seed(0)
    which = np.array([[0, 0], [1, 2]])
    mixed = shuffled_heads(which, g)
    assert mixed.tolist() == [[0, 0], [2, 1]]
    plan = sp.planned(model, found, which)
    other = shuffled(plan, g)
    assert [o.name for o in other.layers[found.layers[1]]] == [o.name for o in plan.layers[found.layers[1]]][::-1]
    assert operations_ratio(other) == operations_ratio(plan)
    same = with_patterns(plan, dict.fromkeys(found.layers, Window(3, 3)), "near")
    assert same.counts == {"near": 4}
    stripe = {name: found.patterns[name]["stripe"] for name in found.layers}
    apart = with_patterns(plan, stripe, "stripe")
    assert apart.given(found.layers[0], 1).how == stripe[found.layers[0]].of(1)
    assert operations_ratio(bare(plan, dict.fromkeys(found.layers, (DENSE, DENSE)))) == 1


def test_stripes_are_the_keys_that_receive_most_the_lower_of_equals():
    received = torch.tensor([[0.0, 3.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert stripes(received, 2).patterns == (Columns(((1, 2), (2, 3))), Columns(((0, 1), (1, 2))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, f: sp.record_shapes(m, [], GRID), "at least one calibration input"),
        (lambda m, f: sp.record_shapes(m, inputs(1), (3, 4, 5)), "attends over 48 tokens, .* say 60"),
        (lambda m, f: sp.plan_shapes(f, -0.1), "met by no choice"),
        (lambda m, f: sp.plan_shapes(f, 0.5, by="seconds"), r"record_shapes\(..., timed=True\)"),
        (lambda m, f: sp.plan_shapes(f, 0.5, by="hours"), "by must be"),
        (lambda m, f: video_options(GRID, torch.rand(2, 47)), r"received must be \[heads, 48\]"),
    ],
)
def test_refused_by_name(model, found, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, found)
