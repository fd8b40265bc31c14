"""Routes in models of others: against attention by hand, and while a cache grows, shrinks and is swapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from regard.patterns import AxisOrder, BlockTopK, Causal, Full, Pattern, Refresh, Route, Window, mass, topk
from regard.watch.attend_with import attend_with
from regard.watch.call import Call
from regard.watch.seam import Seam
from tests.watch.test_attend_with import llama, mistral, output
from tests.watch.zoo import ids

ROUTE = BlockTopK((1, 4), select=topk(2), keep=Window(1))
WIDE = BlockTopK((3, 2), select=mass(0.5), heads="kv")


class ByHand:
    """Each sample by itself, its own tokens cut out, attention by the formula under what the route decides."""

    def __init__(self, route: Route, within: Pattern, starts: tuple[int, ...] = (0,)):
        self.route, self.within, self.starts = route, within, starts

    def __call__(self, call: Call) -> Tensor:
        out = torch.zeros(*call.q.shape[:3], call.v.shape[3])
        group = call.q.shape[1] // call.k.shape[1]
        for b in range(call.q.shape[0]):
            start, stop = self.starts[b % len(self.starts)], int(call.q_pos[-1]) + 1
            first = max(start - int(call.q_pos[0]), 0)
            q, k, v = call.q[b : b + 1, :, first:], call.k[b : b + 1, :, start:stop], call.v[b : b + 1, :, start:stop]
            routed = self.route(q, k, within=self.within)
            i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
            head, sample = torch.arange(q.shape[1])[:, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long)
            allowed = routed.allows(i, torch.arange(k.shape[2]), head, sample)
            scores = q.double() @ k.double().repeat_interleave(group, 1).mT * call.scale
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
            out[b : b + 1, :, first:] = (p @ v.double().repeat_interleave(group, 1)).float()
        return out


@pytest.mark.parametrize("route", [ROUTE, WIDE], ids=["one query", "blocks of queries"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_decoder_against_attention_by_hand(route, backend):
    model, inputs = llama(), {"input_ids": ids(2, 19)}
    with Seam(model, ByHand(route, Causal()), edits=True):
        want = output(model, inputs)
    with attend_with(model, route, backend=backend) as changed:
        got = output(model, inputs)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, output(model, inputs), atol=1e-3)
    assert sum(changed.used.values()) == 2
    assert (changed.summaries.made, changed.summaries.appended) == (2, 0)


def test_a_window_of_the_model_stays_in_force():
    model, inputs = mistral(), {"input_ids": ids(2, 23)}
    window = model.config.sliding_window
    with Seam(model, ByHand(ROUTE, Window(window - 1)), edits=True):
        want = output(model, inputs)
    with attend_with(model, ROUTE):
        assert torch.allclose(output(model, inputs), want, rtol=1e-4, atol=1e-4)


def test_padding_decides_each_sample_alone():
    model, tokens = llama(), ids(2, 17)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with Seam(model, ByHand(ROUTE, Causal(), (6, 0)), edits=True):
        want = output(model, inputs)
    with attend_with(model, ROUTE):
        got = output(model, inputs)
        alone = output(model, {"input_ids": tokens[:1, 6:]})
    assert torch.allclose(got[0, 6:], want[0, 6:], rtol=1e-4, atol=1e-4)
    assert torch.allclose(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(got[0, 6:], alone[0], rtol=1e-4, atol=1e-4)


GENERATE: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("how", ["dynamic", "static", "padded", "beams"])
def test_generate(how):
    """With a cache as without one; what is known is made once a layer and appended to."""
    model, tokens = llama(), ids(2, 18).clamp(min=1)
    more: dict[str, Any] = {}
    if how == "padded":
        more = {"attention_mask": (torch.arange(18) >= torch.tensor([[5], [0]])).long()}
    if how == "beams":
        more = {"num_beams": 2}
    with attend_with(model, ROUTE):
        want = model.generate(tokens, use_cache=False, **GENERATE, **more)
    cache = {"cache_implementation": "static"} if how == "static" else {}
    with attend_with(model, ROUTE) as changed:
        got = model.generate(tokens, **GENERATE, **more, **cache)
    assert torch.equal(got, want)
    layers = 2 * (2 if how == "padded" else 1)
    counts = (changed.summaries.made, changed.summaries.appended)
    # beams: their keys are put together anew in each step
    assert counts == ((layers * 9, 0) if how == "beams" else (layers, layers * 8))


def logits(model, tokens, cache):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


def test_a_cache_that_is_swapped_cut_or_changed_is_summed_up_again():
    model = llama()
    one, other, new = ids(1, 12), ids(1, 12, seed=5), ids(1, 3, seed=9)
    with torch.no_grad(), attend_with(model, ROUTE):
        fresh = [model(torch.cat([text, new], 1)).logits[:, 12:] for text in (one, other)]
        cut = model(torch.cat([one[:, :7], new], 1)).logits[:, 7:]
        flipped = model(torch.cat([other, new.flip(1)], 1)).logits[:, 12:]
    assert not torch.allclose(fresh[0], fresh[1], atol=1e-4)
    with attend_with(model, ROUTE) as changed:
        caches = [DynamicCache(), DynamicCache()]
        logits(model, one, caches[0])
        logits(model, other, caches[1])
        assert changed.summaries.made == 4

        # another cache of the same length than the last one
        assert torch.allclose(logits(model, new, copy.deepcopy(caches[0])), fresh[0], atol=1e-5)
        assert changed.summaries.made == 6
        # the same object, but cut back by as many as it grew
        again = copy.deepcopy(caches[1])
        assert torch.allclose(logits(model, new, again), fresh[1], atol=1e-5)
        again.crop(-3)
        assert torch.allclose(logits(model, new.flip(1), again), flipped, atol=1e-5)
        assert changed.summaries.made == 10
        # and further
        shorter = caches[0]
        shorter.crop(-5)
        assert torch.allclose(logits(model, new, shorter), cut, atol=1e-5)
        made = changed.summaries.made

        # keys overwritten in place
        logits(model, ids(1, 1), shorter)
        assert changed.summaries.made == made
        made = changed.summaries.made
        for layer in shorter.layers:
            layer.keys[:, :, :4] = 0
        got = logits(model, new, shorter)
        assert changed.summaries.made == made + 2
    with attend_with(model, ROUTE):
        shorter.crop(-3)
        assert torch.allclose(logits(model, new, shorter), got, atol=1e-5)


def test_chunks_and_single_tokens_are_appended_without_a_copy_of_the_keys():
    model, tokens = llama(), ids(1, 16)
    with torch.no_grad(), attend_with(model, ROUTE) as changed:
        want = model(tokens).logits
        cache, made = DynamicCache(), changed.summaries.made
        parts = [logits(model, part, cache) for part in tokens.split([7, 1, 4, 1, 3], 1)]
        assert torch.allclose(torch.cat(parts, 1), want, atol=1e-5)
        assert changed.summaries.made == made + 2
        assert changed.summaries.appended == 2 * 4
        assert all(known.held is not None and not known.copies for known in changed.summaries._known.values())


def test_a_static_cache_that_is_used_again():
    """Its buffer stays the same object: what was known is compared with a copy."""
    from transformers import StaticCache

    model = llama()
    texts = [ids(1, 10), ids(1, 10, seed=3)]
    cache = StaticCache(config=model.config, max_cache_len=16)
    with attend_with(model, ROUTE) as changed:
        for text in texts:
            cache.reset()
            parts = [logits(model, part, cache) for part in text.split([8, 1, 1], 1)]
            whole = torch.cat(parts, 1)
            with torch.no_grad():
                assert torch.allclose(whole, model(text).logits, atol=1e-5)
        assert changed.summaries.appended == 2 * 2 * 2


class Own(nn.Module):
    """Attention with buffers of its own, which no cache object tells of, and whatever mask it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.held: list[Tensor] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, *new = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        self.held = [torch.cat([old, t], 2) for old, t in zip(self.held, new, strict=True)] if self.held else list(new)
        out = F.scaled_dot_product_attention(q, *self.held, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


def test_buffers_of_the_model_itself():
    model, x = Own(), torch.randn(2, 14, 16)
    causal = torch.ones(14, 14, dtype=torch.bool).tril()
    with torch.no_grad(), attend_with(model, ROUTE) as changed:
        want = model(x, causal)
        model.held = []
        parts = []
        for lo, hi in ((0, 9), (9, 10), (10, 13), (13, 14)):
            parts.append(model(x[:, lo:hi], causal[lo:hi, :hi]))
        assert torch.allclose(torch.cat(parts, 1), want, atol=1e-5)
        assert changed.summaries.appended == 2  # the keys before the second call were not kept: no cache was seen
        model.held[0][:, :, 2] += 1  # in place: compared with a copy
        made = changed.summaries.made
        model(x[:, :1], None)
        assert changed.summaries.made == made + 1


def test_a_mask_that_is_no_pattern_takes_part_in_the_decision():
    """Blocks that it forbids are no candidates, a float mask's values are added."""
    g = torch.Generator().manual_seed(2)
    model, x = Own(), torch.randn(2, 12, 16, generator=g)
    allowed = torch.rand(2, 1, 12, 12, generator=g) < 0.3
    allowed[..., 0] = True
    for mask in (allowed, torch.randn(2, 2, 12, 12, generator=g).masked_fill(~allowed, -torch.inf)):
        seen: list[Call] = []
        model.held = []
        with torch.no_grad(), attend_with(model, ROUTE):
            got = model(x, mask)
        model.held = []
        with torch.no_grad(), Seam(model, seen.append):
            model(x, mask)
        call = seen[0]
        scores = torch.zeros(2, 2, 12, 3)
        for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).tolist():
            end = max(int(allowed[b, 0, i].nonzero().max()) + 1, 4 * j + 1)  # up to the last key that is seen
            scores[b, h, i, j] = call.q[b, h, i] @ call.k[b, h, 4 * j : min(4 * j + 4, end)].mean(0)
        may = torch.stack([part.any(3) for part in allowed.split(4, 3)], 3)
        best = scores.masked_fill(~may, -torch.inf).topk(2).indices
        listed = torch.zeros(2, 2, 12, 3, dtype=torch.bool).scatter_(3, best, True).repeat_interleave(4, 3)
        back = torch.arange(12)[:, None] - torch.arange(12)
        pairs = (listed | (back == 0) | (back == 1)) & allowed
        weights = call.q @ call.k.mT * call.scale
        weights = weights if mask.dtype == torch.bool else weights + mask
        p = weights.masked_fill(~pairs, -torch.inf).softmax(-1).nan_to_num(0)
        assert torch.allclose(got, (p @ call.v).transpose(1, 2).flatten(2), atol=1e-5)


def test_tables_and_decisions_taken_over():
    model, tokens = llama(), ids(2, 15)
    with attend_with(model, {0: ROUTE, 1: Window(3)}) as changed:
        output(model, {"input_ids": tokens})
    assert len(changed.used) == 2
    assert changed.summaries.made == 1
    every = BlockTopK((1, 4), select=topk(1), keep=Window(4))
    with attend_with(model, Refresh(every, 1)):
        one = model.generate(tokens, **GENERATE)
    with attend_with(model, every):
        assert torch.equal(one, model.generate(tokens, **GENERATE))
    with attend_with(model, Refresh(every, 3)):
        first = model.generate(tokens, **GENERATE)
        assert torch.equal(first, model.generate(tokens, **GENERATE))  # another cache: decided anew


def test_gradients_and_training():
    model, inputs = llama().train(), {"input_ids": ids(2, 13)}
    with attend_with(model, ROUTE) as changed:
        loss = model(**inputs).logits.square().mean()
        loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with attend_with(model, ROUTE, backend="reference"):
        model(**inputs).logits.square().mean().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-6)
    assert changed.summaries._known == {}


def test_a_vision_transformer_in_another_order():
    from tests.vision import import_timm

    torch.manual_seed(0)
    vit = import_timm().models.vision_transformer.VisionTransformer
    model = vit(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    route = BlockTopK(8, select=topk(3), order=AxisOrder((8, 8), (1, 0), prefix=1, block=8), heads="all")
    x = torch.randn(2, 3, 32, 32)
    with Seam(model, ByHand(route, Full()), edits=True):
        want = output(model, x)
    with attend_with(model, route) as changed:
        assert torch.allclose(output(model, x), want, rtol=1e-4, atol=1e-4)
    assert changed.summaries._known == {}


def test_errors_name_the_layer():
    model, inputs = llama(), {"input_ids": ids(1, 8)}
    broken = BlockTopK(4, select=topk(2), order=AxisOrder((3, 3), (1, 0)))
    with attend_with(model, broken):
        with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn': order is of 9 tokens, got 8 keys"):
            output(model, inputs)
