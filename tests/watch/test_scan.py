"""Scans, effects and metrics."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from regard.patterns.static import Sinks
from regard.watch import pieces as piecewise
from regard.watch.anatomy import anatomy
from regard.watch.effects import damage, kl, logit_difference, loss, probability, recovery
from regard.watch.intervene import Edit, Site, intervene, mask_heads, scan, trace
from regard.watch.pieces import tells_apart
from tests.watch.zoo import Plain, build, ids

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def every_kind() -> list:
    """Patches, ablations of every kind, at seam and hook sites, single and in groups."""
    return [
        Site(0, "resid_post", pos=-1),
        Site(1, "z", head=2),
        Site(0, "k", head=(0, 1), pos=1),
        Edit(Site(0, "weights", head=1), "uniform"),
        Edit(Site(1, "weights"), "pattern", value=Sinks(2)),
        mask_heads([(0, 0), (1, 3)], "zero"),
        mask_heads([(0, 2)], "mean"),
        mask_heads([(1, 2)], "resample"),
        [Site(0, "mlp_out", pos=0), Edit(Site(1, "resid_mid"), "scale", alpha=0.5)],
        [
            Edit(Site(0, "weights", head=2, pos=-1), "uniform"),
            Edit(Site(0, "weights", head=2), "pattern", value=Sinks(1)),
        ],
        Edit(Site(0, "k", head=1), "zero", expand=True),
        Site(None, "embed", pos=2),
        Edit(Site(None, "logits"), "scale", alpha=2.0),
    ]


@settings(max_examples=6)
@given(chunk=st.integers(1, 14), pads=st.sampled_from(((0, 0), (2, 0))), bias=st.booleans())
def test_stacked_edits_give_the_numbers_they_give_alone(chunk, pads, bias):
    model = Plain(bias=bias).eval()
    parts = anatomy(model, ids(2, 5))
    mask = torch.ones(2, 7, dtype=torch.long)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    clean, corrupt = ({"input_ids": ids(2, 7, seed), "attention_mask": mask} for seed in (0, 1))
    edits = every_kind()
    if any(pads):  # samples of different lengths cannot be averaged or exchanged
        del edits[6:8]
    for direction, base, other in (("denoise", corrupt, clean), ("noise", clean, corrupt)):
        got = scan(model, clean, corrupt, edits, metric, chunk, direction=direction, anatomy=parts)
        assert got.values.shape == (len(edits), 2)
        for i, group in enumerate(edits):
            several = group if isinstance(group, list) else [group]
            alone = [
                Edit(e, "set", value=trace(model, other, e, anatomy=parts)[e]) if isinstance(e, Site) else e
                for e in several
            ]
            with torch.no_grad(), intervene(model, alone, anatomy=parts):
                torch.testing.assert_close(got.values[i], metric(model(**base)), **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(got.clean, metric(model(**clean)), **CLOSE)
            torch.testing.assert_close(got.corrupt, metric(model(**corrupt)), **CLOSE)


@settings(max_examples=8)
@given(
    chunk=st.integers(1, 5), rows=st.integers(1, 6), pads=st.booleans(), told=st.booleans(), tokens=st.integers(6, 60)
)
def test_a_batch_in_pieces_gives_the_numbers_of_the_whole(chunk, rows, pads, told, tokens):
    """Rows asked for, and rows chosen for the tokens of a pass; padding that the model names, and that valid= names."""
    model = Plain().eval()
    parts = anatomy(model, ids(2, 5))
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[[1, 4], :2] = 1 - int(pads)
    extra = {"attention_mask": mask} if told else {}
    clean, corrupt = ({"input_ids": ids(5, 7, seed), **extra} for seed in (0, 1))
    how = {"anatomy": parts, "valid": None if told else mask.bool()}
    edits = [e for e in every_kind() if not tells_apart(e[0] if isinstance(e, list) else e)]
    assert len(edits) == len(every_kind()) - 2
    whole = scan(model, clean, corrupt, edits, metric, chunk, rows=5, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecewise, "CPU_TOKENS", tokens)
        for several in (rows, None):
            got = scan(model, clean, corrupt, edits, metric, chunk, rows=several, **how)
            for name in ("values", "clean", "corrupt"):
                torch.testing.assert_close(getattr(got, name), getattr(whole, name), **CLOSE)


def test_pieces_are_no_larger_than_asked_and_run_once():
    model, seen = Plain().eval(), []
    parts = anatomy(model, ids(2, 5))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    edits = [Edit(Site(layer, "z", head=h), "zero") for layer in range(2) for h in range(2)]
    scan(model, {"input_ids": ids(5, 7)}, None, edits, metric, 2, rows=2, anatomy=parts)
    # The plain run; two copies of each piece for the heads of layer 0; what comes before layer 1, and two copies of
    # each piece there, pieces of one size together.
    assert seen == [2, 2, 1, 4, 4, 2, 2, 2, 4, 4, 1, 2]


def test_edits_that_tell_samples_apart_keep_the_batch_whole(monkeypatch):
    monkeypatch.setattr(piecewise, "CPU_TOKENS", 1)
    model, clean = Plain().eval(), ids(3, 6)
    parts = anatomy(model, clean)
    for edit in (
        *mask_heads([(0, 1)], "mean"),
        *mask_heads([(0, 1)], "resample"),
        Edit(Site(0, "resid_post"), "add", value=torch.randn(3, 1, 32)),
        Edit(Site(0, "z", pos=((0,), (1,), (2,))), "zero"),
    ):
        got = scan(model, clean, None, [edit], metric, anatomy=parts)
        with torch.no_grad(), intervene(model, edit, anatomy=parts):
            torch.testing.assert_close(got.values[0], metric(model(clean)), **CLOSE)
        with pytest.raises(ValueError, match=r"rows=2: Site.*together"):
            scan(model, clean, None, [edit], metric, rows=2, anatomy=parts)
    shared = Edit(Site(0, "resid_post"), "add", value=torch.randn(32))
    assert scan(model, clean, None, [shared], metric, rows=1, anatomy=parts).values.shape == (1, 3)
    with pytest.raises(ValueError, match="rows=0"):
        scan(model, clean, None, [shared], metric, rows=0, anatomy=parts)
    vit, pixels, _ = build("vit")
    with pytest.raises(ValueError, match="no token numbers"):
        scan(vit, pixels, None, [Edit(Site(0, "z"), "zero")], lambda s: s[:, 0], rows=1)


def test_scan_on_others_models():
    for name in ("gpt2", "bert", "vit", "t5", "own"):
        model, clean, corrupt = build(name)
        parts = anatomy(model, clean)
        sites = [Site(0, "resid_post"), Site(-1, "resid_post"), Site(1, "z", head=1)]
        score = (lambda s: s[:, 0]) if name == "vit" else metric
        got = scan(model, clean, corrupt, sites, score, 2, anatomy=parts)
        if name != "t5":
            torch.testing.assert_close(got.values[:2], got.clean.expand(2, -1), **CLOSE)
            torch.testing.assert_close(got.recovery()[:2], torch.ones(2, 2), rtol=1e-3, atol=1e-3)
        back = scan(model, clean, corrupt, sites, score, 2, direction="noise", anatomy=parts)
        if name != "t5":
            torch.testing.assert_close(back.damage()[:2], torch.ones(2, 2), rtol=1e-3, atol=1e-3)


def test_scan_without_corruption():
    model, clean = Plain().eval(), ids(2, 6)
    parts = anatomy(model, clean)
    heads = [(layer, h) for layer in range(2) for h in range(4)]
    got = scan(model, clean, None, [mask_heads([h], "zero") for h in heads], metric, 3, anatomy=parts)
    assert got.corrupt is None
    assert got.values.shape == (8, 2)
    with pytest.raises(ValueError, match="no corrupt inputs"):
        got.recovery()
    with pytest.raises(ValueError, match="corrupt=None"):
        scan(model, clean, None, [Site(0, "z")], metric, anatomy=parts)
    with pytest.raises(ValueError, match="one number a sample"):
        scan(model, clean, None, [], lambda s: s.sum(), anatomy=parts)
    with pytest.raises(ValueError, match="direction='up'"):
        scan(model, clean, None, [], metric, direction="up", anatomy=parts)
    empty = scan(model, clean, None, [], metric, anatomy=parts)
    assert empty.values.shape == (0, 2)


def test_padding_that_the_model_does_not_name():
    """valid= says what is padding; positions then count tokens, in a scan too."""
    model, clean, corrupt = build("own")
    parts = anatomy(model, clean)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, :3] = False
    site = Site(0, "resid_post", pos=0)
    whole = trace(model, clean, Site(0, "resid_post"), anatomy=parts)[Site(0, "resid_post")]
    got = trace(model, clean, site, anatomy=parts, valid=valid)[site]
    assert torch.equal(got, torch.stack([whole[0, 3], whole[1, 0]]))
    one = scan(model, clean, corrupt, [site, site], metric, 2, anatomy=parts, valid=valid)
    value = trace(model, clean, site, anatomy=parts, valid=valid)[site]
    with torch.no_grad(), intervene(model, Edit(site, "set", value=value), anatomy=parts, valid=valid):
        torch.testing.assert_close(one.values, metric(model(corrupt)).expand(2, -1), **CLOSE)


# -- effects -----------------------------------------------------------------------------------------------------------


def test_effects():
    clean, corrupt = torch.tensor([4.0, 1.0, 2.0]), torch.tensor([0.0, 3.0, -2.0])
    patched = torch.tensor([[4.0, 3.0, 0.0], [1.0, 2.0, -2.0]])
    assert torch.equal(recovery(patched, clean, corrupt), torch.tensor([[1.0, 0.0, 0.5], [0.25, 0.5, 0.0]]))
    assert torch.equal(damage(patched, clean, corrupt), torch.tensor([[0.0, 1.0, 0.5], [0.75, 0.5, 1.0]]))


def test_a_small_gap_is_nan_with_a_warning():
    clean, corrupt = torch.tensor([4.0, 1.0005, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    with pytest.warns(UserWarning, match="2 of 3 samples"):
        got = recovery(torch.ones(3), clean, corrupt)
    assert got[0] == 0.25
    assert got[1:].isnan().all()
    with pytest.warns(UserWarning, match="1 of 3 samples"):
        assert damage(torch.ones(3), clean, corrupt, spread=1e-9).isnan().tolist() == [False, False, True]


def test_metrics():
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    answer, other = torch.tensor([1, 2, 3]), torch.tensor([0, 6, 4])
    for b in range(3):
        p = [math.exp(float(x)) for x in logits[b, -1]]
        p = [x / sum(p) for x in p]
        assert float(probability(answer)(logits)[b]) == pytest.approx(p[int(answer[b])])
        gap = float(logits[b, -1, answer[b]] - logits[b, -1, other[b]])
        assert float(logit_difference(answer, other)(logits)[b]) == pytest.approx(gap)
        q = torch.tensor(p, dtype=torch.float64)
        reference = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        r = reference[b, -1].softmax(-1)
        assert float(kl(reference)(logits)[b]) == pytest.approx(float((r * (r / q).log()).sum()))
    assert torch.equal(kl(logits)(logits), torch.zeros(3, dtype=torch.float64))
    labels = torch.randint(0, 7, (3, 5))
    labels[0, 2:4] = -100
    for b in range(3):
        terms = [-logits[b, i].log_softmax(-1)[labels[b, i + 1]] for i in range(4) if labels[b, i + 1] != -100]
        assert float(loss(labels)(logits)[b]) == pytest.approx(float(sum(terms) / len(terms)))
    torch.testing.assert_close(loss(answer)(logits[:, 0]), F.cross_entropy(logits[:, 0], answer, reduction="none"))
    assert torch.equal(
        logit_difference(answer, other)(logits[:, 0]), logits[range(3), 0, answer] - logits[range(3), 0, other]
    )


def test_metrics_count_tokens():
    logits = torch.randn(2, 5, 7)
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    answer = torch.tensor([1, 2])
    for pos, columns in ((-1, (4, 3)), (0, (2, 0)), (2, (4, 2))):
        got = probability(answer, pos=pos, valid=valid)(logits)
        expected = torch.stack([logits[b, columns[b]].softmax(-1)[answer[b]] for b in range(2)])
        torch.testing.assert_close(got, expected)
    with pytest.raises(IndexError, match="fewer tokens"):
        probability(answer, pos=3, valid=valid)(logits)
