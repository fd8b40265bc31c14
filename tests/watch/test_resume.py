"""Running from a block on gives the numbers of the whole run, bit for bit, and leaves the model as it was."""

import pytest
import torch

from regard.watch.anatomy import anatomy
from regard.watch.intervene import Edit, Site, scan
from regard.watch.probe import run
from regard.watch.resume import Prefix, first_block, resumable
from tests.watch.zoo import build

CHAINS = ["llama", "gpt2", "neox", "vit", "own", "own parallel", "pre-norm encoder"]


@pytest.mark.parametrize("name", CHAINS)
def test_from_any_block_on_the_output_is_the_same(name):
    model, inputs, other = build(name)
    parts = anatomy(model, inputs)
    assert resumable(model, parts)
    prefix = Prefix(model, inputs, parts, 2)
    with torch.no_grad():
        whole = _first(run(model, inputs))
        for at in range(len(parts)):
            prefix.advance(at)
            # The prefix decides: other inputs with it give the same.
            with prefix.running(1):
                assert torch.equal(_first(run(model, inputs if at == 0 else other)), whole) or name == "vit"
        assert torch.equal(_first(run(model, inputs)), whole)
    assert all("forward" not in block.__dict__ for block in prefix.blocks)


@pytest.mark.parametrize("name", [*CHAINS, "t5"])
def test_a_scan_gives_the_numbers_of_whole_runs(name):
    model, inputs, other = build(name)
    parts = anatomy(model, inputs)
    last = len(parts) - 1
    edits = [
        [Edit(Site(last, "z", head=1), "zero"), Edit(Site(0, "z", head=0), "zero")],
        Edit(Site(last, "z", head=2), "zero"),
        Edit(Site(None, "embed"), "scale", alpha=0.5),
        Edit(Site(last, "mlp_out"), "zero"),
        Site(1, "resid_pre"),
        Edit(Site(None, "logits"), "scale", alpha=2.0),
    ]
    if parts.embed is None or name == "t5":  # an encoder-decoder embeds twice
        del edits[2]
    metric = lambda x: x.flatten(1)[:, -5:].sum(1)  # noqa: E731
    ran = []
    first = dict(model.named_modules())[parts.blocks[0]]
    handle = first.register_forward_pre_hook(lambda *a: ran.append("forward" in first.__dict__))
    found = scan(model, inputs, other, edits, metric, chunk=2, anatomy=parts)
    handle.remove()
    assert any(ran) == (name != "t5")
    whole = scan(model, inputs, other, edits, metric, chunk=2, resume=False, anatomy=parts)
    torch.testing.assert_close(found.values, whole.values, rtol=1e-5, atol=1e-6)


def test_where_edits_start():
    model, inputs, _ = build("llama")
    parts = anatomy(model, inputs)
    assert first_block([Site(1, "z"), Site(0, "q")], parts) == 0
    assert first_block([Site(parts.attn[1], "z")], parts) == 1
    assert first_block([Site(None, "embed"), Site(1, "z")], parts) == 0
    assert first_block([Site(None, "final")], parts) == len(parts) - 1


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]
