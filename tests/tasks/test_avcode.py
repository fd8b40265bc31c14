"""AVCode: frames that tell the text and nothing else does, its solver, error rates, and a decoder that reads it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks import decoder
from regard.tasks.avcode import SYMBOLS, AVCode, Transcriber, error_rate
from regard.tasks.bytetext import BOS, EOS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_frames_are_the_symbols_codes_and_noise():
    task = AVCode(symbols=11, noise=0.5)
    batch = task.batch(64, seeded())
    assert batch.frames.shape == (64, 44, 16)
    assert set(batch.text.flatten().tolist()) <= set(SYMBOLS)
    index = torch.tensor([[SYMBOLS.index(s) for s in row] for row in batch.text.tolist()])
    rest = batch.frames - task.book[index].flatten(1, 2)
    assert abs(float(rest.mean())) < 0.01
    assert float(rest.std()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(task.batch(64, seeded()).frames, batch.frames)
    assert not torch.equal(AVCode(11, 0.5, codes=1).book, task.book)


def test_the_solver_reads_the_frames_and_nothing_else_tells_the_text():
    clean, noisy = AVCode(noise=0.0).batch(8, seeded()), AVCode(noise=2.0).batch(200, seeded())
    assert torch.equal(AVCode().solve(clean.frames), clean.text)
    task = AVCode()
    assert 0.01 < float(error_rate(task.solve(noisy.frames), noisy.text).mean()) < 0.3
    # Frames of other texts say no more than guessing does.
    wrong = (task.solve(noisy.frames.flip(0)) != noisy.text).double().mean()
    rate = torch.bincount(noisy.text.flatten(), minlength=256).double() / noisy.text.numel()
    assert float(wrong) == pytest.approx(1 - float(rate.square().sum()), abs=0.02)


def edits(a, b):
    """By recursion over both ends."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_the_error_rate_is_the_edit_distance(a, b):
    assert float(error_rate(torch.tensor([a]), torch.tensor([b]))) == pytest.approx(edits(a, b) / len(b))


@pytest.mark.parametrize("stack", [2, 8])
def test_a_decoder_reads_stacked_frames_and_writes(stack):
    task = AVCode(symbols=6)
    batch = task.batch(3, seeded())
    with torch.random.fork_rng():
        model = Transcriber(decoder.build(decoder.SIZES["smoke"], 0), stack).eval()
    prompt = model.prompt(batch.frames)
    assert prompt.shape == (3, 2 + 24 // stack, 32)
    embed = model.decoder.get_input_embeddings()
    torch.testing.assert_close(prompt[:, [0, -1]], embed(torch.tensor([[BOS, EOS]])).expand(3, -1, -1))
    logits = model(batch.frames, batch.text)
    assert logits.shape[:2] == batch.text.shape
    written = model.transcribe(batch.frames, 6)
    assert written.shape == (3, 6)
    # What it writes is its own first choice, given what it has written.
    assert torch.equal(model(batch.frames, written).argmax(-1)[:, :1], written[:, :1])
    later = batch.text.clone()
    later[:, 3:] = ord("a")
    torch.testing.assert_close(model(batch.frames, later)[:, :4], logits[:, :4], atol=1e-5, rtol=1e-5)
    model.loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.project.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="noise must be at least 0"):
        AVCode(noise=-1)
    with pytest.raises(ValueError, match="symbols must be at least 1"):
        AVCode(symbols=0)
    model = Transcriber(decoder.build(decoder.SIZES["smoke"], 0), 8)
    with pytest.raises(ValueError, match="frames must be a multiple of stack = 8, got 12"):
        model.prompt(torch.zeros(1, 12, 16))
