"""A plan at work in models of several makers, against dense attention by the formula at the same seam."""

import pytest
import torch

from regard.patterns import BlockTopK, Causal, Columns, Full, PerHead, Queries, Sinks, Window, per_head, topk
from regard.plan.groups import Inputs, grouped, run_groups
from regard.plan.options import DENSE, NOTHING, Option, ScaledWindow
from regard.plan.plan import PlanError
from regard.watch.attend_with import attend_with
from regard.watch.seam import Seam, SeamError
from tests.plan.makers import by_hand, llama, pattern_of, shapes_of
from tests.watch.test_attend_with import Dense, output
from tests.watch.zoo import build, ids

NEAR = Option("near", Window(2, 1) | Sinks(1))
FIRST = Option("first", Sinks(2))
OPTIONS = [DENSE, NEAR, NOTHING, FIRST]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Reference:
    """Each layer's calls under its own heads' patterns, by the formula."""

    def __init__(self, plan, starts=(0,)):
        self.by = {name: Dense(per_head([pattern_of(o) for o in given]), starts) for name, given in plan.layers.items()}

    def __call__(self, call):
        return self.by[call.layer](call) if call.layer in self.by else None


def wanted(model, plan, inputs, starts=(0,)):
    with Seam(model, Reference(plan, starts), edits=True):
        return output(model, inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "timm"])
def test_heads_attend_as_the_plan_says(name):
    model, inputs, _ = build(name)
    plan = by_hand(model, inputs, OPTIONS)
    with plan.applied(model) as applied:
        found = output(model, inputs)
    torch.testing.assert_close(found, wanted(model, plan, inputs), **CLOSE)
    assert set(applied.used) == set(plan.layers) == set(applied.seconds)
    torch.testing.assert_close(output(model, inputs), wanted(model, by_hand(model, inputs, [DENSE]), inputs), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_patterns_along(side):
    model, tokens = llama(), ids(3, 12)
    mask = torch.ones_like(tokens)
    pads = [0, 3, 7]
    for row, n in enumerate(pads):
        mask[row, :n] = mask[row, :n] * (side != "left")
        if side == "right" and n:
            mask[row, -n:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    plan = by_hand(model, inputs, OPTIONS)
    with plan.applied(model):
        found = output(model, inputs)
    reference = wanted(model, plan, inputs, tuple(pads) if side == "left" else (0,))
    torch.testing.assert_close(found[mask.bool()], reference[mask.bool()], **CLOSE)


def test_generate_and_its_cache_agree_with_whole_texts():
    model, tokens = llama(), ids(2, 9)
    plan = by_hand(model, {"input_ids": tokens}, [DENSE, NEAR, FIRST, NOTHING])
    made = []
    for cache in (True, False):
        with plan.applied(model):
            made.append(model.generate(tokens, **GREEDY, use_cache=cache, attention_mask=torch.ones_like(tokens)))
    assert made[0].tolist() == made[1].tolist()


def test_routes_append_to_what_they_know_while_decoding():
    model, tokens = llama(kv_heads=4), ids(2, 9)
    route = BlockTopK(2, select=topk(2), keep=Window(1))
    plan = by_hand(model, {"input_ids": tokens}, [Option("route", route)])
    with plan.applied(model) as applied:
        found = model.generate(tokens, **GREEDY, attention_mask=torch.ones_like(tokens))
    assert applied.summaries.appended > 0
    with attend_with(model, route):
        wanted = model.generate(tokens, **GREEDY, attention_mask=torch.ones_like(tokens))
    assert found.tolist() == wanted.tolist()


def test_a_head_given_nothing_gives_zeros_at_every_step():
    model, tokens = llama(), ids(1, 7)
    plan = by_hand(model, {"input_ids": tokens}, [NOTHING])
    with plan.applied(model):
        planned = model(input_ids=tokens).logits
        step = model(input_ids=tokens[:, :6], use_cache=True)
        last = model(input_ids=tokens[:, 6:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(planned, wanted(model, plan, {"input_ids": tokens}), **CLOSE)
    torch.testing.assert_close(last[:, -1], planned[:, -1], **CLOSE)


def test_gradients_pass():
    model, tokens = llama(), ids(1, 8)
    plan = by_hand(model, {"input_ids": tokens}, OPTIONS)
    grads = []
    for context in (plan.applied(model), Seam(model, Reference(plan), edits=True)):
        model.zero_grad()
        with context:
            model(input_ids=tokens).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_heads_with_the_same_option_run_together():
    groups = grouped([DENSE, NEAR, DENSE, NOTHING, NEAR])
    assert [(g.option.name, g.heads, g.everyone) for g in groups] == [
        ("dense", (0, 2), False),
        ("near", (1, 4), False),
        ("nothing", (3,), False),
    ]
    assert grouped([NEAR, NEAR])[0].everyone


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_groups_read_their_own_keys(kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 5)
    call = Inputs(q, k, v, 0.3, 0, None, True, lambda p: p & Causal())
    found = run_groups(call, grouped([NEAR, DENSE, NOTHING, NEAR]))
    keys = k.repeat_interleave(4 // kv_heads, 1)
    scores = q @ keys.mT * 0.3
    i, j = torch.arange(9)[:, None], torch.arange(9)[None]
    for head, pattern in enumerate([NEAR.how, Full(), None, NEAR.how]):
        if pattern is None:
            assert not found[:, head].any()
            continue
        weights = scores[:, head].masked_fill(~(pattern.allows(i, j) & (j <= i)), -torch.inf).softmax(-1)
        want = weights @ v.repeat_interleave(4 // kv_heads, 1)[:, head]
        torch.testing.assert_close(found[:, head], want, rtol=1e-4, atol=1e-5)


# -- lengths


def test_plans_at_another_length():
    model, short, long = llama(), ids(1, 70), ids(1, 100)
    scaled = Option("share", ScaledWindow(0.1, sinks=2))
    plan = by_hand(model, {"input_ids": short}, [scaled, NEAR])
    assert plan.length == {"scales": ["share"], "any": ["near"]}
    assert (scaled.at(70), scaled.at(1000)) == (Window(64) | Sinks(2), Window(128) | Sinks(2))
    last = ScaledWindow(0, last=5)
    assert (last.at(3), last.at(70)) == (Window(64) | Queries(((0, 3),)), Window(64) | Queries(((65, 70),)))
    with plan.applied(model):
        assert model(input_ids=long).logits.isfinite().all()
    bound = by_hand(model, {"input_ids": short}, [Option("stripes", Columns(((3, 9),)) | Window(4)), NEAR])
    assert bound.length["bound"] == ["stripes"]
    with bound.applied(model):
        model(input_ids=short)
        with pytest.raises(ValueError, match=r"'stripes' .* 70 tokens \(Columns.*this call has 100"):
            model(input_ids=long)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_scales_does_so_by_the_tokens_of_each_sample(side):
    model, tokens = llama(), ids(2, 80)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 8) if side == "left" else slice(72, 80)] = 0
    option = Option("last", ScaledWindow(0, last=4))
    plan = by_hand(model, {"input_ids": tokens, "attention_mask": mask}, [option])
    with torch.no_grad(), plan.applied(model):
        both = model(input_ids=tokens, attention_mask=mask).logits
        alone = model(input_ids=tokens[1:][mask[1:].bool()][None]).logits
    torch.testing.assert_close(both[1][mask[1].bool()], alone[0], **CLOSE)


# -- refusals


def test_refuses_another_model_and_names_the_difference():
    model, other = llama(), llama(layers=3)
    plan = by_hand(model, {"input_ids": ids(1, 8)}, OPTIONS)
    with pytest.raises(PlanError, match="parameters, the plan's model"):
        plan.applied(other)
    with pytest.raises(PlanError, match=r"it is a .*GPT2.*LlamaForCausalLM"):
        plan.applied(build("gpt2")[0])
    with pytest.raises(PlanError, match=r"its weights are others \(fingerprint"):
        plan.applied(llama(seed=1))
    with plan.applied(llama(seed=1), any_weights=True) as applied:
        applied.model(input_ids=ids(1, 8))
    # the same size with the heads cut otherwise
    with pytest.raises(PlanError, match="has other weights"):
        plan.applied(llama(kv_heads=1), any_weights=True)


def test_refuses_other_heads_dropout_and_silent_layers():
    model, tokens = llama(), ids(1, 8)
    plan = by_hand(model, {"input_ids": tokens}, OPTIONS)
    first = next(iter(plan.layers))
    plan.layers[first] = plan.layers[first][:3]
    with pytest.raises(ValueError, match="4 heads, the plan gives something to 3"), plan.applied(model):
        model(input_ids=tokens)
    plan = by_hand(model, {"input_ids": tokens}, OPTIONS)
    plan.layers["lm_head"] = (NEAR,) * 4
    with pytest.raises(SeamError, match="lm_head: the plan has it"), plan.applied(model):
        model(input_ids=tokens)
    gpt, inputs, _ = build("gpt2")
    plan = by_hand(gpt, inputs, OPTIONS)
    gpt.train()
    gpt.config.attn_pdrop = 0.5
    for block in gpt.transformer.h if hasattr(gpt, "transformer") else gpt.h:
        block.attn.attn_dropout.p = 0.5
    with pytest.raises(ValueError, match=r"drops out 0\.5"), plan.applied(gpt):
        output(gpt, inputs)


def test_options_refuse_what_they_are_not():
    with pytest.raises(ValueError, match="name must be a text"):
        Option("", None)
    with pytest.raises(ValueError, match="must be a Pattern"):
        Option("x", 3)
    with pytest.raises(ValueError, match="for one head"):
        Option("x", PerHead((Full(), Causal())))
    with pytest.raises(ValueError, match="share must lie"):
        ScaledWindow(1.5)


def test_shapes_are_those_of_the_calls():
    model = llama()
    assert set(shapes_of(model, {"input_ids": ids(2, 9)}).values()) == {(2, 4, 2, 9, 9, 8, 8)}
