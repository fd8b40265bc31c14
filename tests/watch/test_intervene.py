"""Interventions against the plain float64 decoder, and identities on models of many makers."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from regard.patterns.static import Causal, Columns, Sinks, Window
from regard.watch.anatomy import Anatomy, anatomy
from regard.watch.edits import change
from regard.watch.intervene import Edit, Site, intervene, mask_heads, reweight, trace
from regard.watch.probe import first_tensor, run
from regard.watch.seam import Seam, SeamError
from tests.oracles import transformer as oracle
from tests.watch.zoo import NAMES, PARALLEL, Plain, build, ids

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
BLOCK = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
SEAM = ("q", "k", "v", "z")


@pytest.fixture(autouse=True)
def ordinary_path():
    """nn.TransformerEncoder's fast path, off under any hook, rounds differently: compare with the ordinary one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        x = first_tensor(run(model, inputs))
    assert x is not None
    return x


def every_site(name: str, parts: Anatomy) -> list[Site]:
    layers = (1, 2) if name in ("t5", "bart") else (0, 1)
    sites = [Site(i, p) for i in layers for p in (*BLOCK, *SEAM) if p != "resid_mid" or name not in PARALLEL]
    sites += [Site(c, p) for c in parts.cross[-1:] if c for p in (*SEAM, "attn_out")]
    sites += [Site(None, "final"), Site(-1, "resid_post")]
    sites += [Site(None, "embed")] if parts.embed and name not in ("t5", "bart") else []
    return sites


# -- identities on every maker's model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_own_values_put_back_change_no_bit(name):
    """And another input's change something, and are what is then read."""
    model, inputs, other = build(name)
    plain = output(model, inputs)
    with intervene(model, []):
        assert torch.equal(output(model, inputs), plain)
    parts = anatomy(model, inputs)
    sites = every_site(name, parts)
    values, theirs = (trace(model, x, sites, anatomy=parts) for x in (inputs, other))
    for site in sites:
        with intervene(model, [Edit(site, "set", value=values[site])], anatomy=parts):
            assert torch.equal(output(model, inputs), plain), site
        probe = [site, Site(-1, "resid_post")]
        read = trace(model, inputs, probe, edits=Edit(site, "set", value=theirs[site]), anatomy=parts)
        assert torch.equal(read[site], theirs[site]), site
        if site.part not in ("final", "embed"):
            assert not torch.equal(read[probe[1]], values[probe[1]]) or name in ("t5", "bart"), site
    with intervene(model, freeze=values, anatomy=parts):
        assert torch.equal(output(model, inputs), plain)
    assert torch.equal(output(model, inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("t5", "bart")])
def test_the_other_stream_gives_the_other_output(name):
    """Every resid_post (or resid_mid with resid_pre's branch gone) set to the other input's: the rest of its run."""
    model, inputs, other = build(name)
    parts = anatomy(model, inputs)
    for layer in range(len(parts)):
        for part in ("resid_pre", "resid_post") + (() if name in PARALLEL else ("resid_mid",)):
            site = Site(layer, part)
            value = trace(model, other, site, anatomy=parts)[site]
            with intervene(model, Edit(site, "set", value=value), anatomy=parts):
                torch.testing.assert_close(output(model, inputs), output_plain(model, other), rtol=0, atol=1e-6)


def output_plain(model: nn.Module, inputs: Any) -> Tensor:
    """What the model gives without the edits around."""
    import copy

    return output(copy.deepcopy(model), inputs)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder_streams(name):
    """The decoder's last block and what it reads from the encoder settle the output."""
    model, inputs, other = build(name)
    site = Site(-1, "resid_post")
    value = trace(model, other, site)[site]
    with intervene(model, Edit(site, "set", value=value)):
        assert torch.equal(output(model, inputs), output_plain(model, other))
    # The encoder's last stream: what the decoder then says depends on its own tokens and that stream alone.
    site = Site(1, "resid_post")
    value = trace(model, other, site)[site]
    mixed = {"input_ids": other["input_ids"], "decoder_input_ids": inputs["decoder_input_ids"]}
    with intervene(model, Edit(site, "set", value=value)):
        assert torch.equal(output(model, inputs), output_plain(model, mixed))


def test_a_parallel_block_has_no_middle():
    model, inputs, _ = build("neox parallel")
    with pytest.raises(LookupError, match="parallel block: attention and MLP both read resid_pre"):
        trace(model, inputs, Site(0, "resid_mid"))


def test_block_outputs_may_be_tensors_or_tuples():
    tuples, tensors = Plain().eval(), build("own")[0]
    x = ids(2, 6)
    with torch.no_grad():
        assert isinstance(tuples.blocks[0](tuples.embed(x), None), tuple)
        assert isinstance(tensors.blocks[0](tensors.embed(x)), Tensor)
    for model in (tuples, tensors):
        with intervene(model, Edit(Site(0, "resid_post"), "zero"), anatomy=anatomy(model, x)):
            zero = output(model, x)
        assert torch.equal(zero[0], zero[1])


# -- operations against the oracle -------------------------------------------------------------------------------------


def applied(edit: Edit, shape: tuple[int, ...] | None = None):
    """The edit written from its formula, for a whole site."""
    value = edit.value.double() if isinstance(edit.value, Tensor) else edit.value

    def formula(x: Tensor) -> Tensor:
        if edit.op == "set":
            return torch.as_tensor(value, dtype=torch.float64).expand(x.shape)
        if edit.op == "add":
            return x + edit.alpha * value
        if edit.op == "scale":
            return x * edit.alpha * (1 if value is None else value)
        if edit.op == "zero":
            return x * 0
        if edit.op == "mean":
            return (x if value is None else value).mean(0).expand(x.shape)
        if edit.op == "resample":
            return torch.stack([x[i - 1] for i in range(len(x))])
        assert edit.basis is not None or edit.op == "norm_cap"
        if edit.op == "project_out":
            return x - edit.alpha * oracle.project(x, edit.basis)
        if edit.op == "keep_only":
            return x + edit.alpha * (oracle.project(x, edit.basis) - x)
        return oracle.norm_cap(x, edit.alpha, edit.basis, 0.98 if value is None else value)

    return formula


SIZES = {"q": 6, "k": 6, "v": 6, "z": 6, "logits": 64}
PARTS = ("embed", *BLOCK, *SEAM, "final", "logits")


@st.composite
def tensor_edits(draw) -> tuple[Edit, int, int, bool]:
    part = draw(st.sampled_from(PARTS))
    layer = None if part in ("embed", "final", "logits") else draw(st.integers(0, 1))
    batch, length = draw(st.integers(2, 3)), draw(st.integers(1, 9))
    op = draw(
        st.sampled_from(("set", "add", "scale", "zero", "mean", "resample", "project_out", "keep_only", "norm_cap"))
    )
    dim = SIZES.get(part, 32)
    alpha = draw(st.sampled_from((0.5, 1.0, -2.0)))
    torch.manual_seed(draw(st.integers(0, 99)))
    more: dict[str, Any] = {"alpha": alpha}
    if op in ("set", "add"):
        more["value"] = draw(
            st.sampled_from((torch.randn(dim), torch.randn(batch, *[1] * (2 if part in SEAM else 1), dim)))
        )
    if op in ("project_out", "keep_only"):
        more["basis"] = torch.randn(draw(st.integers(1, 3)), dim)
        if draw(st.booleans()):
            more["basis"] = torch.cat([more["basis"], 2 * more["basis"][:1]])
    if op == "norm_cap":
        more["alpha"] = draw(st.sampled_from((0.5, 2.0)))
        if draw(st.booleans()):
            more |= {"basis": torch.randn(2, dim), "value": 0.1}
    return Edit(Site(layer, part), op, **more), batch, length, draw(st.booleans())


@given(tensor_edits())
def test_operations_on_tensors(case):
    edit, batch, length, bias = case
    model, x = Plain(bias=bias).eval(), ids(batch, length)
    formula = applied(edit)

    def at(layer, part, t):
        return formula(t) if (layer, part) == (edit.site.layer, edit.site.part) else t

    with intervene(model, edit, anatomy=anatomy(model, ids(2, 5))):
        got = output(model, x)
    torch.testing.assert_close(got.double(), model.oracle(x, at=at), **CLOSE)


@given(st.data())
def test_heads_and_tokens(data):
    """Only the named heads and tokens change; tokens are counted without padding, per sample."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 9))
    pads = [data.draw(st.integers(0, 2)) for _ in range(batch)]
    left = data.draw(st.booleans())
    part = data.draw(st.sampled_from(("q", "z", *BLOCK, "logits")))
    layer = None if part == "logits" else data.draw(st.integers(0, 1))
    head = data.draw(st.sampled_from((None, 2, (0, 3)))) if part in SEAM else None
    pos = data.draw(st.sampled_from((None, 0, 1, -1, -2, (0, -1), range(2), tuple((b % 2, -1) for b in range(batch)))))
    model, x = Plain().eval(), ids(batch, length)
    valid = torch.ones(batch, length, dtype=torch.bool)
    for b, n in enumerate(pads):
        valid[b, :n] = not left
        valid[b, length - n :] &= left
    wanted = [pos] * batch if not (isinstance(pos, tuple) and isinstance(pos[0], tuple)) else list(pos)

    def columns(b: int) -> list[int]:
        own = valid[b].nonzero()[:, 0].tolist()
        if pos is None:
            return list(range(length))
        return [own[p] for p in ([wanted[b]] if isinstance(wanted[b], int) else wanted[b])]

    def at(where, name, t):
        if (where, name) != (layer, part):
            return t
        t = t.clone()
        for b in range(batch):
            for c in columns(b):
                for h in [head] if isinstance(head, int) else list(range(4)) if head is None else list(head):
                    if part in SEAM:
                        t[b, h, c] = -0.5 * t[b, h, c]
                if part not in SEAM:
                    t[b, c] = -0.5 * t[b, c]
        return t

    inputs = {"input_ids": x, "attention_mask": valid.long()}
    parts = anatomy(model, ids(2, 5))
    site = Site(layer, part, head=head, pos=pos)
    before = trace(model, inputs, site, anatomy=parts)[site]
    with intervene(model, Edit(site, "scale", alpha=-0.5), anatomy=parts):
        got = output(model, inputs)
        assert torch.equal(trace(model, inputs, site, anatomy=parts)[site], -0.5 * before)
    rows = valid[..., None].expand_as(got)
    torch.testing.assert_close(got.double()[rows], model.oracle(x, valid=valid, at=at)[rows], **CLOSE)


def test_shapes_of_what_is_read():
    model, x = Plain().eval(), ids(2, 7)
    parts = anatomy(model, x)
    shapes = {
        Site(0, "q"): (2, 4, 7, 6),
        Site(0, "k"): (2, 2, 7, 6),
        Site(0, "k", head=3): (2, 7, 6),
        Site(0, "k", head=(0, 1)): (2, 1, 7, 6),
        Site(0, "weights"): (2, 4, 7, 7),
        Site(0, "weights", head=1, pos=-1): (2, 7),
        Site(0, "z", head=1): (2, 7, 6),
        Site(0, "z", head=(1,), pos=(0, 2)): (2, 1, 2, 6),
        Site(0, "z", head=1, pos=0): (2, 6),
        Site(0, "resid_post", pos=-1): (2, 32),
        Site(None, "logits"): (2, 7, 64),
    }
    for site, value in trace(model, x, list(shapes), anatomy=parts).items():
        assert tuple(value.shape) == shapes[site], site


@st.composite
def weight_cases(draw) -> dict[str, Any]:
    length, batch = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    pads = [draw(st.integers(0, length - 1)) for _ in range(batch)]
    head = draw(st.sampled_from((None, 1, (0, 3))))
    pos = draw(st.sampled_from((None, -1, 0)))
    op = draw(st.sampled_from(("uniform", "pattern", "reweight", "reweight raw")))
    kept = draw(st.sampled_from((Sinks(1), Window(2), Window(1) | Sinks(1), ~Sinks(2), Columns(((1, 3),)), Causal())))
    c = draw(st.tuples(st.sampled_from((0.0, 0.3, 2.0)), st.sampled_from((1.0, 0.9, -0.5, 0.0))))
    return locals() | {"bias": draw(st.booleans()), "layers": draw(st.sampled_from(((0,), (0, 1))))}


def weight_formula(case: dict[str, Any], valid: Tensor, length: int):
    """The same edit on the oracle's weights, with loops over what the pattern says of tokens."""
    batch = len(valid)
    token = (valid.long().cumsum(1) - 1).clamp_min(0)
    inside = torch.stack(
        [case["kept"].allows(token[b][:, None], token[b][None]).expand(length, length) for b in range(batch)]
    )
    open_ = oracle.allowed(length, valid, batch)

    def at(layer, part, p):
        if part != "weights" or layer not in case["layers"]:
            return p
        if case["op"] == "uniform":
            new = oracle.uniform(p, open_)
        elif case["op"] == "pattern":
            new = oracle.close(p, inside[:, None])
        else:
            factor = torch.where(inside, case["c"][0], case["c"][1]).double()[:, None]
            new = oracle.reweight(p, factor, renormalize=case["op"] == "reweight")
        out = p.clone()
        for b in range(batch):
            rows = list(range(length)) if case["pos"] is None else [int(valid[b].nonzero()[case["pos"], 0])]
            heads = (
                range(4) if case["head"] is None else [case["head"]] if isinstance(case["head"], int) else case["head"]
            )
            for h in heads:
                out[b, h, rows] = new[b, h, rows]
        return out

    return at


def weight_edits(case: dict[str, Any]) -> list[Edit]:
    edits = []
    for layer in case["layers"]:
        site = Site(layer, "weights", head=case["head"], pos=case["pos"])
        if case["op"] == "uniform":
            edits.append(Edit(site, "uniform"))
        elif case["op"] == "pattern":
            edits.append(Edit(site, "pattern", value=case["kept"]))
        else:
            groups = {case["kept"]: case["c"][0], ~case["kept"]: case["c"][1]}
            edits.append(reweight(site, groups, renormalize=case["op"] == "reweight"))
    return edits


@given(weight_cases())
def test_operations_on_weights(case):
    length, batch = case["length"], case["batch"]
    model, x = Plain(bias=case["bias"]).double().eval(), ids(batch, length)
    valid = torch.ones(batch, length, dtype=torch.bool)
    for b, n in enumerate(case["pads"]):
        valid[b, :n] = False
    inputs = {"input_ids": x, "attention_mask": valid.long()} if any(case["pads"]) else {"input_ids": x}
    parts = anatomy(model, ids(2, 5))
    expected = model.oracle(x, valid=valid, at=weight_formula(case, valid, length))
    rows = valid[..., None].expand_as(expected)
    for backend in ("fused", "reference"):
        with intervene(model, weight_edits(case), anatomy=parts, backend=backend):
            got = output(model, inputs)
        torch.testing.assert_close(got[rows], expected[rows], rtol=1e-8, atol=1e-8)
    # What trace reads of edited weights is what acted.
    seen: dict[int, Tensor] = {}
    formula = weight_formula(case, valid, length)

    def note(layer, part, t):
        t = formula(layer, part, t)
        if part == "weights":
            seen[layer] = t
        return t

    model.oracle(x, valid=valid, at=note)
    with intervene(model, weight_edits(case), anatomy=parts):
        read = trace(model, inputs, [Site(0, "weights"), Site(1, "weights")], anatomy=parts)
    pairs = valid[:, None, :, None].expand(batch, 4, length, length)
    for layer in (0, 1):
        torch.testing.assert_close(read[Site(layer, "weights")][pairs], seen[layer][pairs], rtol=1e-8, atol=1e-8)


def test_uniform_is_exactly_one_over_n_without_the_bias():
    """T5's additive position bias goes; what is left is the mean of the values of the keys that may be seen."""
    model, inputs, _ = build("t5")
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    inputs = inputs | {"attention_mask": mask}
    layers = [0, 2, "decoder.block.1.layer.1.EncDecAttention"]
    edits = [Edit(Site(layer, "weights"), "uniform") for layer in layers]
    sites = [Site(layer, part) for layer in layers for part in ("weights", "v", "z")]
    got = trace(model, inputs, sites, edits=edits)
    for layer in layers:
        p, v, z = (got[Site(layer, part)] for part in ("weights", "v", "z"))
        open_ = torch.ones_like(p, dtype=torch.bool)
        open_ = open_.tril() if layer == 2 else open_ & mask.bool()[:, None, None]
        expected = open_ / open_.sum(-1, keepdim=True)
        rows = mask.bool() if layer == 0 else torch.ones(2, p.shape[2], dtype=torch.bool)
        at = rows[:, None, :, None]
        torch.testing.assert_close(p * at, expected * at, rtol=1e-6, atol=0)
        torch.testing.assert_close(z * at, expected @ v * at, rtol=1e-4, atol=1e-5)


def test_edits_at_one_site_act_in_order_and_frozen_ones_last():
    model, x = Plain().eval(), ids(2, 6)
    parts = anatomy(model, x)
    site = Site(0, "mlp_out")
    value = trace(model, x, site, anatomy=parts)[site]
    add, scale = Edit(site, "add", value=1.0), Edit(site, "scale", alpha=3.0)
    for edits, expected in (([add, scale], (value + 1) * 3), ([scale, add], value * 3 + 1)):
        assert torch.equal(trace(model, x, site, edits=edits, anatomy=parts)[site], expected)
        assert torch.equal(trace(model, x, site, edits=edits, freeze={site: value}, anatomy=parts)[site], value)
    with intervene(model, add, anatomy=parts), intervene(model, scale, anatomy=parts):
        assert torch.equal(trace(model, x, site, anatomy=parts)[site], (value + 1) * 3)
    with intervene(model, add, freeze={site: value}, anatomy=parts), intervene(model, scale, anatomy=parts):
        assert torch.equal(trace(model, x, site, anatomy=parts)[site], value)


def test_overlapping_edits_of_weights_compose():
    """A pattern on all heads, then one head uniform, then a row reweighted: as on the matrix, in list order."""
    model, x = Plain(bias=True).double().eval(), ids(2, 8)
    parts = anatomy(model, ids(2, 5))
    edits = [
        Edit(Site(0, "weights"), "pattern", value=Window(3)),
        Edit(Site(0, "weights", head=1), "uniform"),
        reweight(Site(0, "weights", head=(1, 2), pos=-1), {Sinks(6): 0.25, ~Sinks(6): 1.0}),
        Edit(Site(0, "weights", pos=0), "uniform"),
    ]
    i = torch.arange(8)
    near = (i[:, None] - i <= 3) & (i[:, None] >= i)

    def at(layer, part, p):
        if (layer, part) != (0, "weights"):
            return p
        p = oracle.close(p, near).clone()
        p[:, 1] = oracle.uniform(p, near[None, None])[:, 1]
        factor = torch.where(i < 6, 0.25, 1.0).double()
        p[:, 1:3, -1] = oracle.reweight(p, factor, True)[:, 1:3, -1]
        p[:, :, 0] = oracle.uniform(p, near[None, None])[:, :, 0]
        return p

    for backend in ("fused", "reference"):
        with intervene(model, edits, anatomy=parts, backend=backend):
            torch.testing.assert_close(output(model, x), model.oracle(x, at=at), rtol=1e-8, atol=1e-8)


def test_a_row_left_without_keys_gives_zero_and_a_finite_gradient():
    model, x = Plain().eval(), ids(1, 6)
    parts = anatomy(model, x)
    edit = Edit(Site(0, "weights"), "pattern", value=~Sinks(2))
    z = trace(model, x, Site(0, "z"), edits=edit, anatomy=parts)[Site(0, "z")]
    assert not z[:, :, :2].any()
    assert z[:, :, 2:].abs().min() > 0
    site = Site(0, "q")
    _, g = trace(model, x, site, grad=True, metric=lambda s: s[:, -1, 3], edits=edit, anatomy=parts)[site]
    assert torch.isfinite(g).all()
    assert not g[:, :, :2].any()


def test_groups_must_be_a_partition():
    model, x = Plain().eval(), ids(1, 6)
    parts = anatomy(model, x)
    for groups, count in (({Sinks(2): 0.5, Window(1): 1.0}, "2"), ({Sinks(2): 0.5}, "none")):
        with intervene(model, reweight(Site(0, "weights"), groups), anatomy=parts):
            with pytest.raises(ValueError, match=f"lie in {count} of them"):
                output(model, x)


def test_single_weights_need_the_reference():
    model, x = Plain().eval(), ids(2, 6)
    parts = anatomy(model, x)
    site = Site(0, "weights")
    with pytest.raises(ValueError, match="backend='reference'"):
        intervene(model, Edit(site, "set", value=0.0))
    with intervene(model, backend="reference"):
        dense = output(model, x)
        p = trace(model, x, site, anatomy=parts)[site]
    with intervene(model, Edit(site, "set", value=p), anatomy=parts, backend="reference"):
        assert torch.equal(output(model, x), dense)
    torch.testing.assert_close(dense, output(model, x), **CLOSE)
    swapped = p.flip(1)
    with intervene(model, Edit(site, "set", value=swapped), anatomy=parts, backend="reference"):
        got = output(model, x)
    expected = model.oracle(x, at=lambda layer, part, t: swapped.double() if (layer, part) == (0, "weights") else t)
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.parametrize("part", ["k", "v"])
def test_keys_of_one_query_head_under_gqa(part):
    model, x = Plain().eval(), ids(2, 6)
    parts = anatomy(model, x)
    with pytest.raises(ValueError, match="expand=True"):
        with intervene(model, Edit(Site(0, part, head=1), "zero"), anatomy=parts):
            output(model, x)

    def expanded(layer, name, t):
        if (layer, name) != (0, part):
            return t
        t = oracle.per_head(t, 4).clone()
        t[:, 1] = 0
        return t

    with intervene(model, Edit(Site(0, part, head=1), "zero", expand=True), anatomy=parts):
        torch.testing.assert_close(output(model, x).double(), model.oracle(x, at=expanded), **CLOSE)

    def group(layer, name, t):
        return torch.cat([t[:, :1], t[:, 1:] * 0], 1) if (layer, name) == (0, part) else t

    with intervene(model, Edit(Site(0, part, head=(2, 3)), "zero"), anatomy=parts):
        torch.testing.assert_close(output(model, x).double(), model.oracle(x, at=group), **CLOSE)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_the_oracles(bias):
    model, x = Plain(bias=bias).double().eval(), ids(2, 7)
    parts = anatomy(model, x)
    sites = [Site(layer, part) for layer in (0, 1) for part in (*BLOCK, *SEAM, "weights")]
    sites += [Site(None, part) for part in ("embed", "final", "logits")]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].log_softmax(-1)[:, 5] + logits[:, 2, 7]

    kept: dict[tuple, Tensor] = {}

    def at(layer, part, t):
        kept[layer, part] = t.clone().requires_grad_() if not t.requires_grad else t.clone()
        return kept[layer, part]

    metric(model.oracle(x, at=at)).sum()
    expected = torch.autograd.grad(metric(model.oracle(x, at=at)).sum(), list(kept.values()))
    got = trace(model, x, sites, grad=True, metric=metric, anatomy=parts)
    for (layer, part), g in zip(kept, expected, strict=True):
        value, gradient = got[Site(layer, part)]
        torch.testing.assert_close(value, kept[layer, part].detach(), rtol=1e-8, atol=1e-8)
        if part == "weights":  # outside the mask the oracle's matrix has a gradient that nothing can use
            torch.testing.assert_close(gradient.tril(), g.tril(), rtol=1e-7, atol=1e-9)
        else:
            torch.testing.assert_close(gradient, g, rtol=1e-7, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "falcon", "neox parallel", "bert", "post-norm encoder", "bart", "opt"])
def test_gradients_by_finite_differences(name):
    model, inputs, _ = build(name)
    model.double()
    inputs = inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
    parts = anatomy(model, inputs)
    sites = [s for s in every_site(name, parts) if s.layer != 1]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, 1, 4]

    for p in model.parameters():
        p.requires_grad_(False)  # a frozen model has gradients by its activations too
    got = trace(model, inputs, sites, grad=True, metric=metric, anatomy=parts)
    step = 1e-5
    for site in sites:
        value, gradient = got[site]
        direction = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0))
        ends = []
        for sign in (1, -1):
            with intervene(model, Edit(site, "add", value=direction, alpha=sign * step), anatomy=parts):
                ends.append(metric(output(model, inputs)).sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6, msg=str(site))


def test_gradient_of_some_heads_and_tokens_is_that_part():
    model, x = Plain().eval(), ids(2, 6)
    parts = anatomy(model, x)
    whole, part = Site(0, "z"), Site(0, "z", head=2, pos=-1)
    row = Site(0, "weights", head=2, pos=-1)
    got = trace(model, x, [whole, part, row], grad=True, metric=lambda s: s[:, -1, 3], anatomy=parts)
    assert torch.equal(got[part][1], got[whole][1][:, 2, -1])
    v = trace(model, x, Site(0, "v"), anatomy=parts)[Site(0, "v")][:, 1]
    torch.testing.assert_close(got[row][1], torch.einsum("bd,bjd->bj", got[part][1], v))


# -- generation, padding, precision ------------------------------------------------------------------------------------


def test_padding_changes_nothing():
    """An edit of a padded batch gives each sample the numbers it has alone."""
    model, _, _ = build("llama")
    prompts = [ids(1, n, seed=n) for n in (4, 7, 6)]
    padded = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for b, p in enumerate(prompts):
        padded[b, 7 - p.shape[1] :], mask[b, 7 - p.shape[1] :] = p[0], 1
    edits = [
        Edit(Site(0, "z", head=1, pos=2), "scale", alpha=3.0),
        Edit(Site(0, "k", head=(2, 3), pos=1), "zero"),
        Edit(Site(1, "resid_mid", pos=(0, -2)), "add", value=0.5),
        Edit(Site(1, "weights", head=2), "pattern", value=Sinks(1) | Window(1)),
        Edit(Site(1, "weights", head=0, pos=-1), "uniform"),
        Edit(Site(0, "resid_post", pos=-1), "scale", alpha=2.0),
    ]
    with intervene(model, edits):
        together = output(model, {"input_ids": padded, "attention_mask": mask})
        for b, p in enumerate(prompts):
            alone = output(model, {"input_ids": p})
            torch.testing.assert_close(together[b, 7 - p.shape[1] :], alone[0], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cached_generation_is_full_recomputation(name):
    model, inputs, _ = build(name)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    edits = [
        Edit(Site(0, "weights", head=1), "uniform"),
        Edit(Site(1, "weights"), "pattern", value=Sinks(1) | Window(3)),
        Edit(Site(0, "z", head=2), "scale", alpha=-1.0),
        Edit(Site(1, "mlp_out"), "scale", alpha=0.5),
        Edit(Site(0, "v", pos=1), "zero"),
        Edit(Site(0, "resid_post", pos=2), "scale", alpha=2.0),
    ]
    how = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with intervene(model, edits):
        out = model.generate(inputs["input_ids"], attention_mask=mask, eos_token_id=None, **how)
        tokens = out.sequences
        grown = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
        places = (grown.cumsum(1) - 1).clamp_min(0)
        full = output(model, {"input_ids": tokens, "attention_mask": grown, "position_ids": places})
    steps = torch.stack(out.logits, 1)
    torch.testing.assert_close(steps, full[:, 7:-1], **CLOSE)
    plain = model.generate(inputs["input_ids"], attention_mask=mask, eos_token_id=None, **how)
    assert not torch.equal(plain.sequences, tokens)


def test_steps():
    model, inputs, _ = build("llama")
    how = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": None,
    }
    prompt = inputs["input_ids"]
    plain = model.generate(prompt, **how)
    with intervene(model, Edit(Site(1, "z"), "zero", value=None), anatomy=None):
        everywhere = model.generate(prompt, **how)
    with intervene(model, Edit(Site(1, "z", steps="generated"), "zero")):
        later = model.generate(prompt, **how)
    with intervene(model, Edit(Site(1, "z", steps="prompt"), "zero")):
        first = model.generate(prompt, **how)
    assert torch.equal(later.logits[0], plain.logits[0])
    assert torch.equal(first.logits[0], everywhere.logits[0])
    assert not torch.equal(later.logits[1], plain.logits[1])
    # -1 is the newest token of every step.
    with intervene(model, Edit(Site(0, "resid_post", pos=-1, steps="generated"), "scale", alpha=0.0)):
        zeroed = model.generate(prompt, **how)
    with intervene(model, Edit(Site(0, "resid_post", steps="generated"), "zero")):
        assert torch.equal(torch.stack(model.generate(prompt, **how).logits), torch.stack(zeroed.logits))


def test_a_reading_inside_later_edits_asks_nothing_of_them():
    """A trace within `intervene` is one pass: edits of generated tokens wait for theirs."""
    model, inputs, _ = build("llama")
    prompt = inputs["input_ids"]
    with intervene(model, Edit(Site(1, "z", steps="generated"), "zero")):
        read = trace(model, inputs, Site(1, "z"))[Site(1, "z")]
        model.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert torch.equal(read, trace(model, inputs, Site(1, "z"))[Site(1, "z")])


def test_encoder_decoder_generation():
    model, inputs, _ = build("t5")
    how = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": None,
    }
    source = inputs["input_ids"]
    edits = [
        Edit(Site(0, "resid_post", pos=1), "scale", alpha=-2.0),
        Edit(Site("decoder.block.0.layer.1.EncDecAttention", "v", pos=-1), "zero"),
        Edit(Site(2, "z", head=1), "scale", alpha=2.0),
    ]
    with intervene(model, edits):
        out = model.generate(source, **how)
        full = output(model, {"input_ids": source, "decoder_input_ids": out.sequences})
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, :-1], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model, x = Plain().eval(), ids(2, 6)
    low = Plain().eval().to(dtype)
    parts = anatomy(model, x)
    for edits in (
        [Edit(Site(0, "weights", head=1), "uniform")],
        [reweight(Site(0, "weights"), {Sinks(1): 0.2, ~Sinks(1): 1.0})],
        [Edit(Site(1, "mlp_out"), "project_out", basis=torch.eye(32)[:3])],
        [Edit(Site(0, "resid_mid"), "norm_cap", alpha=4.0)],
    ):
        with intervene(low, edits, anatomy=parts):
            got = output(low, x)
        with intervene(model, edits, anatomy=parts):
            expected = output(model, x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.08)
    site = Site(0, "resid_post")
    with intervene(low, Edit(site, "set", value=torch.zeros(32)), anatomy=parts):
        with pytest.raises(ValueError, match="nothing is cast"):
            output(low, x)


# -- the four ways to mask a head --------------------------------------------------------------------------------------


def test_masking_heads():
    model, x, y = Plain().eval(), ids(3, 6), ids(3, 6, seed=5)
    parts = anatomy(model, x)
    heads = [(1, 2), (0, 1), (0, 3)]
    theirs = trace(model, y, [Site(0, "z"), Site(1, "z")], anatomy=parts)
    values = {layer: theirs[Site(layer, "z")] for layer in (0, 1)}
    open_ = oracle.allowed(6, None, 3)

    def masked(formula):
        def at(layer, part, t):
            if part != formula[0]:
                return t
            t = t.clone()
            for h in (h for at_layer, h in heads if at_layer == layer):
                t[:, h] = formula[1](layer, t)[:, h]
            return t

        return model.oracle(x, at=at)

    z = {layer: values[layer].double() for layer in (0, 1)}
    for kind, given_values, formula in (
        ("zero", None, ("z", lambda layer, t: t * 0)),
        ("uniform", None, ("weights", lambda layer, t: oracle.uniform(t, open_))),
        ("mean", values, ("z", lambda layer, t: z[layer].mean(0).expand(t.shape))),
        ("mean", None, ("z", lambda layer, t: t.mean(0).expand(t.shape))),
        ("resample", None, ("z", lambda layer, t: t.roll(1, 0))),
    ):
        edits = mask_heads(heads, kind, values=given_values)
        assert [e.site.layer for e in edits] == [0, 1]
        with intervene(model, edits, anatomy=parts):
            torch.testing.assert_close(output(model, x).double(), masked(formula), **CLOSE)
    drawn = torch.randint(3, (3,), generator=torch.Generator().manual_seed(7))
    with intervene(model, mask_heads(heads, "resample", values=values, seed=7), anatomy=parts):
        got = output(model, x)
    torch.testing.assert_close(got.double(), masked(("z", lambda layer, t: z[layer][drawn])), **CLOSE)
    with pytest.raises(ValueError, match="one of zero, uniform, mean, resample"):
        mask_heads(heads, "off")


# -- path patching by its definition -----------------------------------------------------------------------------------


def test_freezing_the_other_heads_leaves_the_direct_path():
    """A sender's corrupted z with every other z frozen clean: the oracle with the same replacements."""
    model, clean, corrupt = Plain().eval(), ids(2, 6), ids(2, 6, seed=3)
    parts = anatomy(model, clean)
    sender = Site(0, "z", head=1, pos=-1)
    value = trace(model, corrupt, sender, anatomy=parts)[sender]
    others = [Site(0, "z", head=(0, 2, 3)), Site(1, "z")]
    frozen = trace(model, clean, others, anatomy=parts)
    receiver = Site(1, "q", head=2)
    record = trace(model, clean, receiver, edits=Edit(sender, "set", value=value), freeze=frozen, anatomy=parts)[
        receiver
    ]
    plain = {}

    def note(layer, part, t):
        plain[layer, part] = t
        return t

    model.oracle(clean, at=note)
    bad: dict[tuple, Tensor] = {}

    def note_bad(layer, part, t):
        bad[layer, part] = t
        return t

    model.oracle(corrupt, at=note_bad)
    got = {}

    def at(layer, part, t):
        if part == "z":
            t = plain[layer, part].clone()
            if layer == 0:
                t[:, 1, -1] = bad[0, "z"][:, 1, -1]
        got[layer, part] = t
        return t

    model.oracle(clean, at=at)
    torch.testing.assert_close(record.double(), got[1, "q"][:, 2], **CLOSE)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "attention"), "part='attention' is not a part"),
        ((None, "z"), "exists once per layer"),
        ((0, "logits"), "exists once per model"),
        ((0, "resid_mid", 1), "has no heads"),
        ((0, "z", -1), "counted from 0"),
        ((0, "z", None, ((1, 2), (3,))), "equally many"),
        ((0, "z", None, None, "later"), "accepted: all, prompt, generated"),
    ],
)
def test_impossible_sites(arguments, message):
    with pytest.raises(ValueError, match=message):
        Site(*arguments)


@pytest.mark.parametrize(
    "arguments", [(1.5, "z"), (0, "z", "3"), (0, "z", (1, 1)), (0, "z", None, 1.0), (0, "z", None, ())]
)
def test_sites_of_wrong_types(arguments):
    with pytest.raises(TypeError):
        Site(*arguments)


@pytest.mark.parametrize(
    ("site", "op", "more", "message"),
    [
        (Site(0, "z"), "uniform", {}, "acts on part 'weights'"),
        (Site(0, "z"), "erase", {}, "accepted: set, add"),
        (Site(0, "z"), "set", {}, "needs value="),
        (Site(0, "z"), "zero", {"value": 1.0}, "takes no value="),
        (Site(0, "z"), "project_out", {}, "needs basis="),
        (Site(0, "z"), "project_out", {"basis": torch.zeros(3)}, r"\[n, dim\]"),
        (Site(0, "z"), "norm_cap", {"alpha": 0.0}, "alpha > 0"),
        (Site(0, "z"), "zero", {"expand": True}, "parts 'k' and 'v'"),
        (Site(0, "weights"), "pattern", {"value": 3}, "a Pattern"),
        (Site(0, "weights"), "reweight", {"value": {}}, "Pattern: coefficient"),
    ],
)
def test_impossible_edits(site, op, more, message):
    with pytest.raises(ValueError, match=message):
        Edit(site, op, **more)


def test_sites_are_keys():
    assert Site(0, "z", head=[1, 2]) == Site(0, "z", head=(1, 2))
    assert len({Site(0, "z"), Site(0, "z"), Site(0, "z", pos=range(3))}) == 2
    assert str(Site(-1, "z", head=2)) == "Site(-1, 'z', head=2)"


def test_what_cannot_be_reached_is_refused():
    model, inputs, _ = build("llama")
    edit = Edit(Site(0, "resid_post"), "zero")
    model.gradient_checkpointing_enable()
    for run_it in (
        lambda: intervene(model, edit).__enter__(),
        lambda: trace(model, inputs, Site(0, "z"), grad=True, metric=lambda s: s[:, -1, 0]),
    ):
        with pytest.raises(SeamError, match="checkpointing"):
            run_it()
    model.gradient_checkpointing_disable()
    with pytest.raises(SeamError, match="compiled"):
        intervene(torch.compile(model), Edit(Site(0, "z"), "zero"), anatomy=anatomy(model)).__enter__()
    model.set_attn_implementation("eager")
    with pytest.raises(SeamError, match="set_attn_implementation"):
        trace(model, inputs, Site("model.layers.0.self_attn", "z"))


def test_recomputation_in_the_backward_pass_is_refused():
    from torch.utils.checkpoint import checkpoint

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, x):
            inner = self.inner
            h = inner.embed(x)
            for block in inner.blocks:
                h = checkpoint(lambda t, b=block: b(t, None)[0], h, use_reentrant=False)
            return inner.head(inner.norm(h))

    model, x = Wrapped(), ids(2, 5)
    parts = anatomy(model, x)
    with intervene(model, Edit(Site(0, "attn_out"), "scale", alpha=0.5), anatomy=parts):
        scores = model(x)
        with pytest.raises(RuntimeError, match="again during the backward pass"):
            scores.sum().backward()


def test_what_is_not_there_is_said():
    model, x = Plain().eval(), ids(2, 5)
    parts = anatomy(model, x)
    for site, kind, message in (
        (Site(7, "z"), IndexError, "the model has 2 blocks"),
        (Site("blocks.9", "z"), KeyError, "near it: blocks"),
        (Site(0, "z", head=4), IndexError, "has 4 heads"),
        (Site(0, "z", pos=5), IndexError, "has no token at that position"),
        (Site(0, "resid_pre", pos=-6), IndexError, "has no token at that position"),
        (Site(0, "z", pos=((0,), (1,), (2,))), ValueError, "pos has 3 samples, the batch 2"),
        (Site(0, "z", steps="generated"), RuntimeError, "did not run"),
    ):
        with pytest.raises(kind, match=message):
            trace(model, x, site, anatomy=parts)
    with pytest.raises(RuntimeError, match="never acted"):
        with intervene(model, Edit(Site(0, "z", pos=5), "zero"), anatomy=parts):
            output(model, x)
    with pytest.raises(RuntimeError, match="never on a generated token"):
        with intervene(model, Edit(Site(0, "z", steps="generated"), "zero"), anatomy=parts):
            output(model, x)
    bert = build("bert")[0].bert
    with pytest.raises(LookupError, match="no logits"):
        trace(bert, {"input_ids": x}, Site(None, "logits"))
    with pytest.raises(ValueError, match="does not broadcast"):
        trace(model, x, Site(0, "z"), edits=Edit(Site(0, "z"), "set", value=torch.zeros(2, 4, 3, 6)), anatomy=parts)
    with pytest.raises(ValueError, match="has one sample"):
        trace(model, x[:1], Site(0, "z"), edits=mask_heads([(0, 1)], "mean"), anatomy=parts)
    padded = {"input_ids": x, "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1] * 5])}
    with pytest.raises(ValueError, match="mixes tokens with padding"):
        trace(model, padded, Site(0, "z"), edits=mask_heads([(0, 1)], "resample"), anatomy=parts)


def test_sequence_first_streams():
    """Whole streams work; what would take the length for the batch is refused."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48), 2).eval()
    x = torch.randn(6, 2, 32)
    site = Site(0, "resid_post")
    value = trace(model, x, site)[site]
    with intervene(model, Edit(site, "set", value=value)):
        assert torch.equal(output(model, x), output_plain(model, x))
    for edit in (Edit(Site(0, "resid_post", pos=0), "zero"), Edit(site, "mean")):
        with pytest.raises(ValueError, match="batch_first=False"):
            trace(model, x, site, edits=edit)
    z = Site(0, "z", head=1, pos=-1)
    assert trace(model, x, z, edits=Edit(z, "zero"))[z].shape == (2, 8)


def test_a_layer_that_runs_twice_has_no_single_site():
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    model = AlbertModel(
        AlbertConfig(
            hidden_size=32,
            embedding_size=16,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
        )
    ).eval()
    found = anatomy(model)
    assert "ran 2 times" in found.missing["attn_out"]
    name = next(n for n, m in model.named_modules() if type(m).__name__ == "AlbertAttention")
    with pytest.raises(RuntimeError, match="cannot say which run is meant"):
        trace(model, {"input_ids": ids(2, 5)}, Site(name, "z"), anatomy=None)


def test_hooks_and_modes_go_even_after_errors():
    model, x = Plain().eval(), ids(2, 5)
    parts = anatomy(model, x)
    plain = output(model, x)
    with pytest.raises(ValueError, match="stop"):
        with intervene(model, Edit(Site(0, "weights"), "uniform"), anatomy=parts):
            raise ValueError("stop")
    with pytest.raises(IndexError):
        with intervene(model, Edit(Site(0, "z", head=9), "zero"), anatomy=parts):
            output(model, x)
    assert torch.equal(output(model, x), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # An error inside a forward pass leaves the next session whole.
    with intervene(model, Edit(Site(0, "z", head=1), "zero"), anatomy=parts):
        assert not torch.equal(output(model, x), plain)


def test_a_seam_outside_sees_the_edited_call():
    model, x = Plain().eval(), ids(2, 6)
    parts = anatomy(model, x)
    seen = []

    def look(call):
        seen.append((call.layer, bool(call.q.any()), call.mask is not None))

    with Seam(model, look), intervene(model, Edit(Site(0, "weights"), "uniform"), anatomy=parts):
        output(model, x)
    assert seen == [("blocks.0", False, False), ("blocks.1", True, False)]


def test_change_is_out_of_place():
    x = torch.randn(3, 4, 6)
    kept = x.clone()
    for op, more in (
        ("set", {"value": 1.0}),
        ("zero", {}),
        ("scale", {"alpha": 2.0}),
        ("norm_cap", {"alpha": 0.1}),
        ("mean", {}),
    ):
        assert not torch.equal(change(Edit(Site(0, "z"), op, **more), x), kept)
        assert torch.equal(x, kept)
