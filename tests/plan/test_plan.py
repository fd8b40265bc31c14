"""Planning from end to end on small models: what is recorded, budgets, baselines, measuring, files."""

import json
import math

import numpy as np
import pytest
import torch

import regard
from regard.patterns import (
    BlockTopK,
    Causal,
    Columns,
    Diagonals,
    Full,
    Refresh,
    Sinks,
    Window,
    above,
    mass,
    ratio,
    topk,
)
from regard.patterns.decided import Routed
from regard.patterns.gallery import CATALOGUE
from regard.patterns.orders import HilbertOrder
from regard.plan.baselines import random_plan, single
from regard.plan.build import _objective
from regard.plan.candidates import candidates, window_widths
from regard.plan.judge import LossOf, OutputError, TokenLoss
from regard.plan.measure import measure
from regard.plan.observe import observe, role_of
from regard.plan.options import DENSE, NOTHING, Option, ScaledWindow
from regard.plan.plan import Plan, PlanError
from regard.plan.record import Recording, projections
from regard.plan.serial import option_from_plain, option_to_plain
from regard.watch.anatomy import anatomy
from regard.watch.probe import quiet
from tests.plan.makers import FixedCosts, by_hand, llama
from tests.watch.zoo import build, ids

LENGTH = 96
ROUTE = BlockTopK(8, select=topk(2), keep=Window(4))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def sequences():
    return [{"input_ids": ids(1, LENGTH, seed)} for seed in range(4)]


@pytest.fixture(scope="module")
def made(model, sequences):
    return regard.plan(model, sequences, loss=0.05, windows=(8, 32), routes=(ROUTE,), costs=FixedCosts())


# -- what is recorded


def test_mass_errors_and_effects_are_those_of_the_formula(model, sequences):
    recording = Recording(
        model, FixedCosts(), {"windows": (8,), "routes": ()}, {}, projections(model, anatomy(model)), TokenLoss()
    )
    kept = {}
    recording_keep = recording._keep

    def keep(call, name):
        out = recording_keep(call, name)
        kept[name] = recording._kept[-1]
        return out

    recording._keep = keep
    with quiet(model):
        recording.run(sequences[0], sequences[0])
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    for name, layer in recording.layers.items():
        x = kept[name].inputs
        weight = model.get_submodule(layer.projected).weight.detach().double()
        k, v = (t.double().repeat_interleave(2, 1) for t in (x.k, x.v))
        scores = (x.q.double() @ k.mT * x.scale).masked_fill(j > i, -torch.inf)
        full = scores.softmax(-1)
        whole = ((full @ v).transpose(1, 2).flatten(2) @ weight.T).norm(dim=-1)[0]
        n = [o.name for o in layer.options].index("sinks 4 + window 8")
        allowed = (Window(8) | Sinks(4)).allows(i, j)
        part = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        masses = (full * allowed).sum(-1)[0]
        np.testing.assert_allclose(layer.mean("mass")[:, n], masses.mean(-1), rtol=1e-5)
        np.testing.assert_allclose(layer.mean("least_mass")[:, n], masses.amin(-1), rtol=1e-4, atol=1e-6)
        for head in range(4):
            change = ((part - full) @ v)[0, head] @ weight[:, 8 * head : 8 * head + 8].T
            error = change.norm(dim=-1) / whole
            assert layer.mean("error")[head, n] == pytest.approx(float(error.mean()), rel=1e-3)
            assert layer.mean("worst")[head, n] == pytest.approx(float(error.max()), rel=1e-3)
        nothing = [o.name for o in layer.options].index("nothing")
        assert (layer.mean("mass")[:, nothing] == 0).all()
        assert (layer.mean("effect")[:, nothing] > 0).all()
        assert (layer.mean("effect")[:, layer.options.index(DENSE)] == 0).all()


def test_errors_at_the_queries_that_are_asked_for_count_beside_the_effect(model, sequences):
    """A query is asked for where the next token's label counts; no labels: nothing is asked for in particular."""
    ids = sequences[0]["input_ids"]
    labels = torch.full_like(ids, -100)
    places = [5, LENGTH - 1]  # of tokens; the queries before them predict them
    labels[:, places] = ids[:, places]
    inputs = {"input_ids": ids, "labels": labels}
    asked = TokenLoss().asked(inputs)
    assert asked.shape == ids.shape
    assert asked[0].nonzero().flatten().tolist() == [p - 1 for p in places]
    assert TokenLoss().asked({"input_ids": ids}) is None
    recording = Recording(
        model, FixedCosts(), {"windows": (8,), "routes": ()}, {}, projections(model, anatomy(model)), TokenLoss()
    )
    sizes = {}
    change = recording._change

    def keep(layer, given, option, heads, full, lse):
        found = change(layer, given, option, heads, full, lse)
        weight = recording._per_head(layer.name, given)
        scale = recording._scale(layer.name, full)
        sizes[layer.name, option.name] = ((found[0] @ weight[heads]).norm(dim=-1) / scale)[0]
        return found

    recording._change = keep
    with quiet(model):
        recording.run({"input_ids": ids}, inputs)
    for name, layer in recording.layers.items():
        n = [o.name for o in layer.options].index("sinks 4 + window 8")
        want = sizes[name, "sinks 4 + window 8"][:, [p - 1 for p in places]].square().mean(-1)
        np.testing.assert_allclose(layer.mean("asked")[:, n], want, rtol=1e-5, atol=1e-12)
        assert (layer.mean("asked")[:, layer.options.index(DENSE)] == 0).all()
        np.testing.assert_allclose(_objective(layer)[:, n], (layer.mean("effect") + layer.mean("asked"))[:, n])
    before = {name: layer.sums["asked"].copy() for name, layer in recording.layers.items()}
    with quiet(model):
        recording.run({"input_ids": ids}, {"input_ids": ids})
    for name, layer in recording.layers.items():
        np.testing.assert_array_equal(layer.sums["asked"], before[name])


def test_effects_are_the_gradients_share(model, sequences):
    """The effect of giving a head nothing, beside the probe's own gradient at its outputs."""
    recording = Recording(model, FixedCosts(), {"windows": (8,), "routes": ()}, {}, {}, LossOf(_squares))
    seen = {}
    gradients = recording._gradients

    def look(output, inputs):
        found = gradients(output, inputs)
        for kept, g in zip(recording._kept, found, strict=True):
            seen[kept.layer.name] = (kept.full.detach(), g)
        return found

    recording._gradients = look
    with quiet(model):
        recording.run(sequences[0], sequences[0])
    for name, layer in recording.layers.items():
        full, g = seen[name]
        want = (full.double() * g.double()).sum(-1).abs().sum((0, 2))
        n = layer.options.index(NOTHING)
        np.testing.assert_allclose(layer.mean("effect")[:, n], want, rtol=1e-5)
        assert (want > 0).all()


def _squares(output, inputs):
    return output.logits.square().mean()


def test_nan_in_scores_is_refused_by_name(sequences):
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn'.*NaN"):
        regard.plan(broken, sequences, costs=FixedCosts())


# -- roles and candidates


def heads_of(*weights):
    """q and k whose softmax is nearly the weights given, [length, length] each."""
    logits = torch.stack([(w + 1e-6).log() for w in weights])[None]
    eye = torch.eye(logits.shape[-1]).expand_as(logits).contiguous()
    return logits, eye


def test_roles_from_some_rows():
    n = 64
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    before = ((i - j == 1) | ((i == 0) & (j == 0))).float()
    first = (j == 0).float().expand(n, n)
    even = torch.ones(n, n)
    lines = (torch.remainder(i - j, 16) == 0).float()
    stripes = ((j == 20) | (j == 41)).float().expand(n, n)
    near = ((i - j).abs() <= 3).float()
    q, k = heads_of(before, first, even, lines, stripes, near)
    found = observe(q, k, scale=1.0, q_start=0, causal=False)
    roles = [role_of(found, head, period)[0] for head, period in enumerate(found.periods())]
    assert roles == ["previous-token", "sink", "uniform", "multi-diagonal", "vertical stripe", "local"]
    assert found.periods()[3][0] == 16
    everyone, some, named = candidates(found, windows=(8,), routes=())
    assert [o.name for o in everyone] == ["dense", "nothing", "sinks 4", "sinks 4 + window 8"]
    assert [role for role, _ in named] == roles
    assert any(isinstance(part, Diagonals) for o in some[3] for part in (o.how.left, o.how.right))
    assert all(o.length == "any" for head in (0, 3) for o in some[head])
    given = candidates(found, windows=(0.25,), routes=(), roles=["local"] * 6)
    assert [role for role, _ in given[2]] == ["local"] * 6
    assert isinstance(given[0][-1].how, ScaledWindow)


def test_columns_are_the_blocks_that_receive_most():
    n = 640
    j = torch.arange(n)[None]
    q, k = heads_of(((j // 64) == 5).float().expand(n, n))
    found = observe(q, k, scale=1.0, q_start=0, causal=False)
    _, some, _ = candidates(found, windows=(8,), routes=(), roles=["vertical stripe"])
    runs = some[0][0].how.left.intervals
    assert any(lo <= 320 and hi >= 384 for lo, hi in runs)
    assert sum(hi - lo for lo, hi in runs) == 4 * 64
    assert some[0][0].length == "bound"


def test_widths_grow_with_the_length():
    assert window_widths(8192) == [64, 256]
    assert window_widths(1024) == [32]
    assert window_widths(16) == [4]


# -- budgets


def test_a_plan_meets_its_loss_and_says_what_it_took(model, sequences, made):
    told = made.calibration
    assert max(told["harm"].values()) <= 0.05
    assert told["sequences"] == 4
    assert told["passes_per_sequence"] > 0
    assert made.predicted["attention_seconds"] <= made.predicted["dense_attention_seconds"]
    assert made.predicted["attention_speedup"] == pytest.approx(made.seconds(dense=True) / made.seconds())
    harms = []
    for inputs in sequences:
        with torch.no_grad():
            dense = TokenLoss().keep(model(**inputs), inputs)
            with made.applied(model):
                harms.append(TokenLoss().harm(dense, model(**inputs), inputs))
    assert np.mean(harms) == pytest.approx(told["harm"]["all"], abs=1e-5)
    assert "forward passes for each of 4 sequences" in str(made)
    assert len(made.heads) == 8
    one = made.heads[0]
    assert {c["name"] for c in one["candidates"]} >= {"dense", "nothing", "sinks 4 + window 8", one["given"]}
    assert one["why"]
    assert made.given(one["layer"], 0).name == one["given"]


def test_a_larger_budget_is_no_slower(model, sequences):
    times = []
    for loss in (0.0, 0.02, 5.0):
        found = regard.plan(model, sequences, loss=loss, windows=(8, 32), routes=(), costs=FixedCosts())
        assert max(found.calibration["harm"].values()) <= loss + 1e-9
        times.append(found.predicted["attention_seconds"])
    assert times[0] >= times[1] >= times[2]
    assert times[2] < 0.7 * times[0]


def test_a_budget_on_speed_takes_the_least_effect(model, sequences):
    found = regard.plan(model, sequences, speed=1.5, windows=(8, 32), routes=(), costs=FixedCosts())
    assert found.predicted["attention_speedup"] >= 1.5 * (1 - 1e-9)
    with pytest.raises(ValueError, match=r"speed=1e\+09 is met by no plan; the fastest is"):
        regard.plan(model, sequences, speed=1e9, windows=(8,), routes=(), costs=FixedCosts())


def test_every_group_must_keep_its_loss(model):
    text = [{"input_ids": ids(1, LENGTH, n)} for n in range(2)]
    asked = []
    for n in range(2):
        labels = torch.full((1, LENGTH), -100)
        labels[:, -4:] = text[n]["input_ids"][:, -4:]
        asked.append({**text[n], "labels": labels})
    found = regard.plan(
        model, text + asked, loss=0.05, groups=["text", "text", "asked", "asked"], windows=(8, 32), routes=(),
        costs=FixedCosts(),
    )  # fmt: skip
    assert set(found.calibration["harm"]) == {"text", "asked"}
    assert max(found.calibration["harm"].values()) <= 0.05


@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_models_that_are_no_decoders_are_judged_by_their_output(kind):
    model, inputs, other = build(kind)
    found = regard.plan(model, [inputs, other], loss=0.05, windows=(4,), routes=(), costs=FixedCosts())
    assert found.calibration["unit"] == OutputError().unit
    assert max(found.calibration["harm"].values()) <= 0.05
    assert not any(found.causal.values())


def test_a_loss_of_ones_own_and_no_gradients(model, sequences):
    calls = []

    def loss(output, inputs):
        calls.append(1)
        return float(output.logits.detach().float().square().mean())

    found = regard.plan(model, sequences[:2], loss=0.5, judge=loss, windows=(8,), routes=(), costs=FixedCosts())
    assert calls
    assert found.calibration["unit"] == LossOf(loss).unit
    plain = regard.plan(
        model, sequences[:2], loss=0.05, sensitivity="error", windows=(8,), routes=(), costs=FixedCosts()
    )
    for head in plain.heads:
        for c in head["candidates"]:
            assert c["effect"] >= c["error"] ** 2 * (1 - 1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": []}, "at least one calibration sequence"),
        ({"loss": 0.1, "speed": 2.0}, "two budgets"),
        ({"loss": -1}, "loss must be"),
        ({"speed": 0.5}, "speed must be"),
        ({"groups": ["a"]}, "groups must name each of the 4"),
        ({"judge": 3}, "judge must be"),
        ({"sensitivity": "none"}, "sensitivity must be"),
    ],
)
def test_refuses_by_name(model, sequences, change, said):
    given = {"inputs": sequences} | change
    with pytest.raises(ValueError, match=said):
        regard.plan(model, given.pop("inputs"), costs=FixedCosts(), **given)


def test_sequences_of_two_lengths_are_refused(model):
    with pytest.raises(ValueError, match="must be of one length"):
        regard.plan(
            model, [{"input_ids": ids(1, 40)}, {"input_ids": ids(1, 50)}], groups=["a", "b"], costs=FixedCosts()
        )


# -- baselines and measuring


def test_random_plans_compute_as_many_blocks(model):
    tokens = {"input_ids": ids(1, 300)}
    like = by_hand(model, tokens, [DENSE, Option("near", Window(70) | Sinks(1)), NOTHING])
    like.causal = dict.fromkeys(like.layers, True)
    drawn = random_plan(like, torch.Generator().manual_seed(0))
    for name, options in drawn.layers.items():
        many = [sum(o.name == what for o in like.layers[name]) for what in ("dense", "nothing")]
        assert [sum(o.name == what for o in options) for what in ("dense", "nothing")] == many
        routed = next(o.how for o in options if isinstance(o.how, Routed))
        layout = ((Window(70) | Sinks(1)) & Causal()).layout(300, 300, 64)
        assert routed.count[0, 0].tolist() == layout.counts.tolist()
        assert routed.decisions == sum(isinstance(o.how, Routed) for o in options)
        index = routed.index
        assert ((index[..., 1:] > index[..., :-1]) | (index[..., 1:] < 0)).all()
        assert all(row in index[0, 0, row].tolist() for row in range(5))
    with drawn.applied(model), torch.no_grad():
        assert model(**tokens).logits.isfinite().all()
    other = random_plan(like, torch.Generator().manual_seed(1))
    assert any(a.name != b.name for n in like.layers for a, b in zip(drawn.layers[n], other.layers[n], strict=True))
    routed = by_hand(model, tokens, [Option("route", ROUTE)])
    routed.causal = dict.fromkeys(routed.layers, True)
    for options in random_plan(routed, torch.Generator().manual_seed(0)).layers.values():
        assert options[0].how.keep == ROUTE.keep
        assert int(options[0].how.count.max()) == 2


def test_measured_dense_beside_planned(model, sequences, made):
    labels = torch.full((1, LENGTH), -100)
    labels[:, -3:] = sequences[0]["input_ids"][:, -3:]
    inputs = [*sequences[:2], {**sequences[0], "labels": labels}]
    found = measure(model, made, inputs, groups=["text", "text", "asked"])
    assert found["attention_speedup"] == pytest.approx(
        found["attention_seconds"]["dense"] / found["attention_seconds"]["planned"]
    )
    assert found["perplexity_ratio"] == pytest.approx(math.exp(max(found["harm"].values())))
    assert set(found["loss"]) == {"text", "asked"}
    assert set(found["score"]) == {"asked"}
    assert found["predicted_attention_seconds"] == pytest.approx(made.seconds())
    assert made.measured is found
    json.dumps(found, allow_nan=False)
    nothing = single(made, Columns(()))
    worse = measure(model, nothing, inputs[:1])
    assert worse["harm"]["all"] != pytest.approx(found["harm"]["text"], abs=1e-4)
    assert worse["predicted_over_measured"] is None
    same = measure(model, single(made, Full()), inputs[:1])
    assert same["harm"]["all"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="at least one sequence"):
        measure(model, made, [])


# -- files


HOWS = [
    None,
    ScaledWindow(0.125, 4),
    ROUTE,
    BlockTopK((64, 32), select=mass(0.9, 2), heads="kv", centre_k=True, within=Causal(), scale=0.5),
    BlockTopK(4, select=ratio(0.3), order=HilbertOrder((4, 4))),
    Refresh(BlockTopK(8, select=above(0.0)), 3),
    Routed.blocks(torch.tensor([[[[0, 1], [1, -1]]]], dtype=torch.int32), block=4, q_len=8, kv_len=8),
    *(example.pattern for part in CATALOGUE.values() for example in part if example.pattern.heads is None),
]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: type(how).__name__)
def test_options_survive_being_written(how):
    tensors = {}
    plain = json.loads(json.dumps(option_to_plain(Option("it", how), tensors)))
    found = option_from_plain(plain, tensors)
    assert found.name == "it"
    if isinstance(how, Routed):
        assert found.how.equal(how)
    elif isinstance(how, Refresh):
        assert (found.how.route, found.how.every) == (how.route, how.every)
    else:
        assert found.how == how
    assert found.length == Option("it", how).length


def test_save_and_load(tmp_path, model, sequences, made):
    made.measured = None
    made.save(tmp_path / "plan.json")
    again = regard.load_plan(tmp_path / "plan.json")
    assert [o.name for o in again.options] == [o.name for o in made.options]
    assert (again.heads, again.predicted, again.calibration) == (made.heads, made.predicted, made.calibration)
    assert (again.shapes, again.causal, again.seconds()) == (made.shapes, made.causal, made.seconds())
    assert not (tmp_path / "plan.safetensors").exists()
    with torch.no_grad(), made.applied(model):
        want = model(**sequences[0]).logits
    with torch.no_grad(), again.applied(model):
        assert torch.equal(model(**sequences[0]).logits, want)
    with pytest.raises(PlanError, match="another model"):
        again.applied(llama(seed=3))


def test_tensors_go_beside(tmp_path, model):
    like = by_hand(model, {"input_ids": ids(1, 200)}, [Option("near", Window(70)), DENSE])
    like.causal = dict.fromkeys(like.layers, True)
    drawn = random_plan(like, torch.Generator().manual_seed(0))
    drawn.save(tmp_path / "random.json")
    assert (tmp_path / "random.safetensors").exists()
    again = Plan.load(tmp_path / "random.json")
    for name, options in drawn.layers.items():
        for a, b in zip(options, again.layers[name], strict=True):
            assert a.name == b.name
            assert a.how is None or a.how.equal(b.how)
    (tmp_path / "random.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "random.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no", "holds no JSON"),
        ("[1]", "no plan of format"),
        ('{"regard.plan": 99}', "no plan of format 1"),
        ('{"regard.plan": 1, "options": [{"name": "x", "how": {"Nope": {}}}]}', "Nope"),
        ('{"regard.plan": 1, "options": [], "layers": {"a": [3]}}', "cannot|can be read"),
    ],
)
def test_files_that_are_no_plans(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=said):
        Plan.load(path)
