"""Orders and block masks of a model: recorded, stored, applied step by step; and videos from the same noise."""

import pytest
import torch

from regard.models.dit import DiTConfig, VideoDiT, sample
from regard.patterns import Routed
from regard.plan import block_plan as bp
from regard.plan.options import Option
from regard.plan.reorder import axis_orders, block_mass, heaviest
from regard.plan.shape_plan import record_shapes
from regard.tasks.planned_video import calibration, compare, rivals
from regard.watch.seam import Seam, SeamError

GRID, BLOCK, STEPS = (4, 4, 4), 8, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DiTConfig(words=6, dim=32, layers=2, heads=2, pairs=(2, 3, 3))
    model = VideoDiT(config).eval()
    for p in model.parameters():
        p.data += 0.15 * torch.randn(p.shape)
    return model


@pytest.fixture(scope="module")
def given():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 4, 8, 8, generator=g), torch.tensor([[1, 0], [2, 3]])


@pytest.fixture(scope="module")
def inputs(model, given):
    return calibration(model, *given, steps=STEPS)


def test_calibration_is_what_the_model_sees(model, given, inputs):
    assert len(inputs) == STEPS
    x, t, words = inputs[0]
    assert torch.equal(x, torch.cat([given[0]] * 2))
    assert t.tolist() == [1.0] * 4
    assert words[2:].eq(model.config.null).all()
    with torch.no_grad():
        told, plain = model(*inputs[-1]).chunk(2)
    last = inputs[-1][0][:2] - inputs[-1][1][0] * (plain + 2.0 * (told - plain))
    assert torch.allclose(last, sample(model, *given, steps=STEPS), atol=1e-5)


def test_maps_and_orders_are_means_over_the_calls(model, inputs):
    orders = bp.record_orders(model, inputs[:2], GRID, BLOCK)
    assert set(orders) == {"blocks.0.self_attention", "blocks.1.self_attention"}
    assert all(o in axis_orders(GRID) for given in orders.values() for o in given)
    mixed = {name: axis_orders(GRID)[2:4] for name in orders}
    maps = bp.record_maps(model, inputs[:2], mixed, BLOCK)
    seen = {name: [] for name in mixed}
    with torch.no_grad(), Seam(model, lambda c: seen[c.layer].append((c.q, c.k)) if c.kind == "self" else None):
        for x in inputs[:2]:
            model(*x)
    for name, calls in seen.items():
        wanted = torch.zeros_like(maps[name])
        for q, k in calls:
            for head, order in enumerate(mixed[name]):
                (mass,) = block_mass(q, k, [order], BLOCK)
                wanted[head] += mass[:, head].mean(0) / 2
        assert torch.allclose(maps[name], wanted, atol=1e-6)


def test_each_part_of_the_sampling_has_its_routes(model, given, inputs, tmp_path):
    orders = bp.record_orders(model, inputs[:1], GRID, BLOCK)
    groups = []
    for part in (inputs[:2], inputs[2:]):
        maps = bp.record_maps(model, part, orders, BLOCK)
        groups.append(bp.routes_of(maps, orders, 0.5, BLOCK))
    for name, routed in groups[0].items():
        assert routed.density(64, 64, 0) == pytest.approx(0.5)
        routed.save(tmp_path / "route.safetensors")
        assert Routed.load(tmp_path / "route.safetensors").equal(routed)
        kept = heaviest(bp.record_maps(model, inputs[:2], orders, BLOCK)[name], 0.5)
        assert int(routed.count.sum()) == int(kept.sum())
    plain = sample(model, *given, steps=STEPS)
    with bp.StepRoutes(model, groups, STEPS) as context:
        both = sample(model, *given, steps=STEPS)
        assert torch.equal(sample(model, *given, steps=STEPS), both)  # a second sampling begins anew
    assert sum(context.used.values()) == 2 * 2 * STEPS
    with bp.StepRoutes(model, [groups[0]], STEPS):
        first = sample(model, *given, steps=STEPS)
    assert not torch.allclose(both, plain)
    assert not torch.allclose(both, first)
    whole = bp.routes_of({n: torch.ones(2, 8, 8) for n in orders}, orders, 1.0, BLOCK)
    with bp.StepRoutes(model, [whole], STEPS):
        assert torch.allclose(sample(model, *given, steps=STEPS), plain, atol=1e-4)


def test_refused_by_name(model, given, inputs):
    orders = {"blocks.0.self_attention": axis_orders(GRID)[:2]}
    routes = bp.routes_of({"blocks.0.self_attention": torch.rand(2, 8, 8)}, orders, 0.5, BLOCK)
    with pytest.raises(ValueError, match="groups must be from 1 to steps = 4 parts, got 5"):
        bp.StepRoutes(model, [routes] * 5, 4)
    with pytest.raises(ValueError, match="at least one calibration input"):
        bp.record_orders(model, [], GRID)
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attention.* shape|orders must be of the 64 tokens"):
        bp.record_orders(model, inputs[:1], (4, 4, 5))
    with pytest.raises(SeamError, match="made no attention call"), torch.no_grad():
        with bp.StepRoutes(model, [{"blocks.7.self_attention": routes["blocks.0.self_attention"]}], STEPS):
            model(*inputs[0])
    longer = torch.randn(2, 1, 4, 8, 16)
    with pytest.raises(ValueError, match=r"layer 'blocks.0.self_attention': .*decided for q_len=64"), torch.no_grad():
        with bp.StepRoutes(model, [routes], STEPS):
            model(longer, inputs[0][1][:2], given[1])


def test_plans_beside_dense_from_the_same_noise(model, given, inputs):
    found = record_shapes(model, inputs[::2], GRID)
    arms = rivals(model, found, 0.6, GRID, eps=10, shuffles=2)
    assert list(arms) == ["plan", "shuffled", "shuffled 2", "all diagonal", "all multi-diagonal", "all stripe"]
    timed = record_shapes(model, inputs[:1], GRID, timed=True)
    assert list(rivals(model, timed, 0.6, GRID, eps=10))[:2] == ["plan", "plan by seconds"]
    outcomes = compare(model, arms, *given, steps=STEPS)
    assert list(outcomes) == ["dense", *arms]
    assert outcomes["dense"].psnr.isinf().all()
    mine = outcomes["plan"]
    assert mine.operations >= 1 / 0.6
    assert outcomes["shuffled"].operations == pytest.approx(mine.operations)
    for name in ("all diagonal", "all multi-diagonal", "all stripe"):
        assert outcomes[name].operations <= mine.operations
    assert all(0 < o.attention_seconds < o.seconds for o in outcomes.values())
    whole = compare(model, {"nothing changed": bp.StepRoutes(model, [{}], STEPS)}, *given, steps=STEPS)
    assert whole["nothing changed"].psnr.isinf().all()
    assert whole["nothing changed"].operations is None


def test_an_option_of_a_plan_may_be_a_stored_route(model, given, inputs, tmp_path):
    """One head's own order and blocks in a `Plan`: saved, loaded, applied."""
    from regard.plan.baselines import bare
    from regard.plan.controls import operations_ratio
    from regard.plan.plan import load_plan
    from regard.plan.shape_plan import planned

    found = record_shapes(model, inputs[:1], GRID)
    plan = planned(model, found, torch.zeros(2, 2, dtype=torch.long).numpy())
    orders = bp.record_orders(model, inputs[:1], GRID, BLOCK)
    maps = bp.record_maps(model, inputs[:1], orders, BLOCK)
    layers, routes = {}, bp.routes_of(maps, orders, 0.25, BLOCK)
    for name in found.layers:
        alone = [
            bp.routes_of({name: maps[name][h : h + 1]}, {name: orders[name][h : h + 1]}, 0.25, BLOCK)[name]
            for h in range(2)
        ]
        layers[name] = [Option(f"blocks of {name}, head {h}", routed) for h, routed in enumerate(alone)]
    stored = bare(plan, layers)
    assert operations_ratio(stored) == pytest.approx(4)
    with torch.no_grad(), bp.StepRoutes(model, [routes], STEPS):
        wanted = model(*inputs[0])
    stored.save(tmp_path / "plan.json")
    with torch.no_grad(), load_plan(tmp_path / "plan.json").applied(model):
        assert torch.allclose(model(*inputs[0]), wanted, atol=1e-5)
