"""The project's own layers, and models under another pattern, are seen by the seam like any other attention."""

import pytest
import torch

import regard
from regard.layers.multihead import MultiHead
from regard.models.decoder import Decoder
from regard.patterns import Causal, Full, Sinks, Window, per_head
from regard.watch.attend_with import attend_with
from regard.watch.intervene import Edit, Site, intervene, trace
from regard.watch.seam import Seam, SeamError


def decoder(pattern, **how):
    torch.manual_seed(0)
    return Decoder(32, 32, 2, 4, kv_heads=2, pattern=pattern, **how).eval()


IDS = torch.randint(0, 32, (2, 21), generator=torch.Generator().manual_seed(0))
PATTERNS = [Causal(), Full(), Window(3) | Sinks(2), per_head([Causal(), Window(2), Window(4, 1), Full()])]


@pytest.mark.parametrize("pattern", PATTERNS, ids=["causal", "full", "window and sinks", "by head"])
def test_a_decoder_is_watched_with_the_weights_it_has(pattern):
    model = decoder(pattern)
    calls = []
    with torch.no_grad(), Seam(model, lambda call: calls.append(call)):
        out = model(IDS)
    assert torch.equal(out, model(IDS))  # a handler that looks on changes nothing
    assert [c.layer for c in calls] == ["blocks.0.attention", "blocks.1.attention"]
    for call in calls:
        assert call.groups == 2
        weights = trace(model, {"ids": IDS}, Site(call.layer, "weights"))[Site(call.layer, "weights")]
        rows = torch.arange(21)
        allowed = pattern.allows(rows[:, None], rows[None], torch.arange(4)[:, None, None]).expand(4, 21, 21)
        assert (weights[:, ~allowed] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 21))


def test_its_statistics_are_those_of_the_definition():
    model = decoder(Window(3) | Sinks(2))
    with torch.no_grad(), regard.watch(model, tokens=False) as watched:
        model(IDS)
    site = Site("blocks.1.attention", "weights")
    weights = trace(model, {"ids": IDS}, site)[site].double()
    entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1).sum((0, 2))
    torch.testing.assert_close(
        torch.as_tensor(watched.atlas.entropy[1].values[:4]).double(), entropy, rtol=1e-4, atol=1e-4
    )


def test_edits_act_in_it():
    model = decoder(Causal())
    with torch.no_grad():
        with intervene(model, Edit(Site("blocks.0.attention", "z", head=1), "zero")):
            edited = model(IDS)
        plain = model(IDS)
    assert not torch.allclose(edited, plain)


def test_a_recorder_outside_sees_the_pattern_that_attend_with_put_in():
    loaded = regard.load("testbed:decoder")
    ids = torch.arange(1, 30)[None]
    seen = {}
    with torch.no_grad(), Seam(loaded.model, lambda call: seen.setdefault(call.layer, call) and None):
        with attend_with(loaded.model, Window(4)):
            loaded.model(input_ids=ids, use_cache=False)
    assert len(seen) == 6
    call = next(iter(seen.values()))
    rows = torch.arange(29)
    assert torch.equal(call.mask[0, 0], Window(4).allows(rows[:, None], rows[None]))


def test_the_form_computes_the_same():
    from regard.watch.own_attend import as_sdpa

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=generator) for h in (4, 2, 2))
    bias = torch.randn(1, 4, 9, 9, generator=generator)
    pattern = per_head([Causal(), Window(2), Window(4, 1), Full()])
    args, how = as_sdpa("here", (q, k, v, pattern), {"bias": bias, "scale": 0.3})
    found = torch.nn.functional.scaled_dot_product_attention(*args, **how)
    torch.testing.assert_close(found, regard.attend(q, k, v, pattern, bias=bias, scale=0.3), rtol=1e-5, atol=1e-5)


def test_what_has_no_such_form_is_refused(monkeypatch):
    class Capped(torch.nn.Module):
        def forward(self, x):
            return regard.attend(x, x, x, Causal(), softcap=5.0)

    x = torch.randn(1, 2, 5, 8)
    model = torch.nn.ModuleList([Capped()])[0]
    with pytest.raises(SeamError, match=r"regard\.attend with softcap"), Seam(model, lambda call: None):
        model(x)
    from regard.watch import own_attend

    monkeypatch.setattr(own_attend, "MOST_PAIRS", 24)
    layer = MultiHead(16, 2, pattern=Window(2))
    with pytest.raises(SeamError, match=r"Window.* on 5 x 5 pairs"), Seam(layer, lambda call: None):
        layer(torch.randn(1, 5, 16))
