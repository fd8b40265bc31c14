"""Sequences to plan on and to measure on: lengths, that they do not overlap, and errors that teach."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks import bytetext, decoder, planning
from regard.tasks.testbeds import Loaded


@pytest.fixture(scope="module")
def loaded():
    return Loaded(decoder.build(decoder.SIZES["smoke"], seed=0), bytetext.byte_tokenizer(8192), "small")


@given(st.integers(60, 900), st.integers(9, 40), st.integers(1, 5), st.integers(1, 5))
def test_stretches_have_their_length_and_do_not_overlap(loaded, size, tokens, calibration, held_out):
    text = "".join(chr(33 + n % 90) for n in range(size))
    if size // (tokens - 1) < 2:
        return
    mine, others = planning.windows(loaded, text, tokens, calibration, held_out)
    assert 1 <= len(mine) <= calibration
    assert 1 <= len(others) <= held_out
    have = size // (tokens - 1)
    assert len(mine) + len(others) == min(have, calibration + held_out)
    seen = []
    for x in (*mine, *others):
        assert x["input_ids"].shape == (1, tokens)
        assert x["input_ids"][0, 0] == bytetext.BOS
        piece = bytetext.decode(x["input_ids"][0, 1:])
        at = text.find(piece)
        assert at % (tokens - 1) == 0 or text.count(piece) > 1
        seen.append(piece)
    if size <= 90:  # no character comes twice, so neither does a piece
        assert len(set(seen)) == len(seen)


def test_needles_ask_for_their_digits_alone(loaded):
    mine, others = planning.needles(loaded, 256, 2, 3, seed=1)
    assert (len(mine), len(others)) == (2, 3)
    for x in (*mine, *others):
        assert x["input_ids"].shape == x["labels"].shape == (1, 256)
        asked = x["labels"] >= 0
        assert asked.sum() == 5
        assert torch.equal(x["labels"][asked], x["input_ids"][asked])
    again, _ = planning.needles(loaded, 256, 2, 0, seed=1)
    assert torch.equal(again[0]["input_ids"], mine[0]["input_ids"])


def test_material_keeps_the_kinds():
    material = planning.Material()
    material.add("text", [{}], [{}, {}])
    material.add("needles", [{}, {}], [{}])
    assert material.calibration_kinds == ["text", "needles", "needles"]
    assert material.held_out_kinds == ["text", "text", "needles"]


def test_errors_say_what_would_do(loaded):
    with pytest.raises(ValueError, match=r"tokens must be in 2\.\.8192 for 'small', got 9000"):
        planning.windows(loaded, "text", 9000, 1, 1)
    with pytest.raises(ValueError, match=r"text has 100 tokens, less than two stretches of 63.*--tokens 50"):
        planning.windows(loaded, "x" * 100, 64, 1, 1)
    with pytest.raises(ValueError, match="has no tokenizer"):
        planning.windows(Loaded(loaded.model, None, "vit"), "x" * 100, 8, 1, 1)


def test_the_library_text_is_held_out():
    text = planning.library_text()
    assert len(text) > 100_000
    assert text[:2000] not in bytetext.StandardLibrary("train").data.tobytes().decode(errors="replace")
