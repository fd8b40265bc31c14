"""The vision-language testbed: its model, its step, and the shipped weights and gates."""

import json

import pytest
import torch
from rich.console import Console

from regard.models.vlm import VLMShape, decoder_blocks, decoder_parts, embed_inputs, see
from regard.steer.iri import Injection
from regard.tasks import testbeds, vlm
from regard.tasks.hallucination import answer, chair, describe, pope, probe_questions
from regard.tasks.scene_text import VOCABULARY, captions
from regard.tasks.scenes import Scenes
from regard.watch.intervene import Edit, Site, intervene, trace

HOW = {"patches": 36, "patch": 4}
SMOKE = vlm.SIZES["smoke"]


@pytest.fixture(scope="module")
def model():
    return vlm.build(SMOKE, 0).eval()


@pytest.fixture(scope="module")
def probes():
    return probe_questions(6, torch.Generator().manual_seed(0), **HOW)


def test_what_the_decoder_gets_is_what_transformers_gives_it(model, probes):
    patches, whole = see(model, probes.scenes.pixels)
    theirs = model.model.get_image_features(probes.scenes.pixels, return_dict=True).pooler_output
    assert torch.equal(torch.stack(list(theirs)), patches)
    assert whole.shape == (6, 32)
    given = embed_inputs(model, probes.tokens.input_ids, patches)
    torch.testing.assert_close(model(**given).logits, model(**probes.inputs).logits)
    with pytest.raises(ValueError, match="ids hold"):
        embed_inputs(model, probes.tokens.input_ids, patches[:, :-1])


def test_the_decoder_is_found_and_its_sites_are_exact(model, probes):
    parts = decoder_parts(model, probes.inputs)
    assert parts.blocks == tuple(decoder_blocks(model)) == tuple(f"model.language_model.layers.{i}" for i in range(2))
    assert parts.heads == (2, 2)
    assert parts.kv_heads == (1, 1)
    assert not parts.missing
    plain = model(**probes.inputs).logits
    sites = [Site(i, part, pos=-1) for i in range(2) for part in ("attn_out", "mlp_out", "resid_post")] + [Site(1, "z")]
    held = trace(model, probes.inputs, sites, anatomy=parts)
    with intervene(model, [Edit(s, "set", value=v) for s, v in held.items()], anatomy=parts):
        assert torch.equal(model(**probes.inputs).logits, plain)


def test_what_mlps_wrote_is_injected_too(model, probes):
    parts, plain = decoder_parts(model, probes.inputs), model(**probes.inputs).logits
    rates = {"attn_out": torch.tensor([0.5, 0.1]), "mlp_out": torch.tensor([0.4, 0.2])}
    how = {"sources": 1, "targets": 2, "anatomy": parts}
    with Injection(model, rates, lam=0, **how):
        assert torch.equal(model(**probes.inputs).logits, plain)
    with Injection(model, rates, lam={"attn_out": 0.0, "mlp_out": 0.5}, **how):
        change = (model(**probes.inputs).logits - plain).abs().amax((0, 2))
    assert change[-1] > 1e-4
    assert not change[:-1].any()


def test_captions_word_by_word_are_those_of_generate(model):
    scenes = Scenes().draw(4, torch.Generator().manual_seed(1))
    ours = describe(model, scenes, 36, most=6)
    inputs = captions(scenes, 36).inputs
    theirs = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs[:, inputs["input_ids"].shape[1] :], ours)


def test_a_step_follows_from_its_number_and_every_part_of_the_model_learns(model):
    mixture = vlm.Mixture(SMOKE, 3)
    a, b = mixture(4), mixture(4)
    assert torch.equal(a.pixels, b.pixels)
    assert not torch.equal(a.pixels, mixture(5).pixels)
    fresh = vlm.build(SMOKE, 1)
    vlm.lesson_loss(fresh, a).backward()
    silent = {n for n, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().any()}
    assert not {n for n in silent if "bias" not in n}  # a bias of keys has no effect


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_words(model):
    """Against the same from the model called as a user calls it, row by row, without padding."""
    step = vlm.Mixture(SMOKE, 0)(0)
    total, weight = 0.0, 0.0
    for lesson in step.lessons:
        for ids, weights, picture in zip(lesson.input_ids, lesson.weights, lesson.picture.tolist(), strict=True):
            inputs = {"input_ids": ids[None]} | ({"pixel_values": step.pixels[picture][None]} if picture >= 0 else {})
            told = model(**inputs).logits[0, :-1].log_softmax(-1)
            each = -told[torch.arange(len(ids) - 1), ids[1:]]
            total, weight = total + float((each * weights[1:]).sum()), weight + float(weights[1:].sum())
    whole = see(model, step.pixels)[1]
    words = model.lm_head.weight[VOCABULARY["cup"] : VOCABULARY["lock"] + 1]
    seen = torch.nn.functional.binary_cross_entropy_with_logits(whole @ words.T, step.named.float())
    assert vlm.lesson_loss(model, step).item() == pytest.approx(total / weight + seen.item(), rel=1e-5)


def test_an_untrained_model_is_not_ready(model):
    found = vlm.gates(model, 16)
    assert not found["ready"]
    assert set(found["thresholds"]) | set(found["ceilings"]) <= set(found["values"])


def test_training_writes_what_load_reads(tmp_path):
    record = testbeds.train("vlm", tmp_path / "made", size="smoke", steps=2, console=Console(quiet=True))
    assert record["testbed"] == "vlm"
    eye = vlm.seer(str(tmp_path / "made"))
    assert (eye.patches, eye.patch) == (36, 4)
    assert eye.questions(4, 0).tokens.input_ids.shape == (4, 42)
    with pytest.raises(ValueError, match="does not know the words of the scenes"):
        vlm.seer("testbed:numbers")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="patch must divide"):
        VLMShape(patch=5)
    with pytest.raises(ValueError, match="at least 2"):
        VLMShape(vision_layers=1)


def test_the_shipped_model_captions_and_passes_its_gates():
    folder = testbeds.TESTBEDS["vlm"]
    record = json.loads((folder / "training.json").read_text())
    assert (folder / "model.safetensors").stat().st_size < 4e6
    gates = record["gates"]
    missed = {k for k, least in gates["thresholds"].items() if gates["values"][k] < least}
    missed |= {k for k, most in gates["ceilings"].items() if gates["values"][k] > most}
    assert gates["ready"]
    assert not missed
    eye = vlm.seer("testbed:vlm")
    probes = eye.questions(96, 5)
    margins, masses = answer(eye.model, probes)
    assert pope(margins, probes.answers)["accuracy"] > 0.7
    assert masses.mean() > 0.9
    scenes = Scenes().draw(60, torch.Generator().manual_seed(5))
    told = chair(describe(eye.model, scenes, 36), scenes)
    assert told["f1"] > 0.7
    assert told["chair_i"] > 0.05
