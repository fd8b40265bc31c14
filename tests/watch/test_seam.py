"""What the seam promises whatever the model: opening, closing, nesting, running again, and refusals by name."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.watch.call import Call
from regard.watch.padding import _survey
from regard.watch.refuse import SeamError, require_module
from regard.watch.seam import Seam, SeamWarning
from tests.watch.seam_models import OwnAttention, OwnModel, Spy, same, watched
from tests.watch.test_seam_transformers import ids, llama, ones


def x(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def clean(model: nn.Module) -> bool:
    return hooks(model) == 0 and torch._C._len_torch_function_stack() == 0


def calls(model: nn.Module, *args, handler=None, **kwargs) -> list[Call]:
    spy = Spy()
    with Seam(model, handler or spy):
        model(*args, **kwargs)
    return spy.calls


# -- running again


@pytest.fixture(scope="module")
def gqa() -> tr.LlamaForCausalLM:
    return llama(kv_heads=2, layers=1)


WAYS = {
    "kv_heads": lambda c: c.run(k=c.k, v=c.v),
    "heads": lambda c: c.run(k=c.k.repeat_interleave(c.groups, 1), v=c.v.repeat_interleave(c.groups, 1)),
    "only k": lambda c: c.run(k=c.k.repeat_interleave(c.groups, 1)),
    "only v": lambda c: c.run(v=c.v),
    "q": lambda c: c.run(q=c.q.clone()),
    "mask": lambda c: c.run(mask=c.mask),
    "scale": lambda c: c.run(scale=c.scale, dropout=c.dropout),
    "causal": lambda c: c.run(is_causal=c.is_causal),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_replacing_by_the_same_changes_nothing(gqa, way, padding):
    """In prompts and in decoding, with keys as they are, repeated, or the heads of one query packed."""

    def run():
        return gqa.generate(
            ids(), attention_mask=ones(left=padding), max_new_tokens=3, min_new_tokens=3, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        ).logits  # fmt: skip

    plain = run()
    with Seam(gqa, WAYS[way]):
        edited = run()
    for a, b in zip(plain, edited, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if way in ("kv_heads", "only v", "q"):
        assert same(plain, edited)


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_replacements_are_used(gqa, padding):
    for call in calls(gqa, ids(), attention_mask=ones(left=padding), use_cache=True):
        k = torch.zeros_like(call.k)
        uniform = call.run(k=k)  # equal scores: the mean of the values each query may see
        kept = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() & ones(left=padding).bool()[:, None, None]
        weights = kept / kept.sum(-1, keepdim=True).clamp(min=1)
        v = call.v.repeat_interleave(call.groups, 1)
        torch.testing.assert_close(uniform * call.valid[:, None, :, None], weights @ v * call.valid[:, None, :, None])


def test_a_new_mask_leaves_causality_standing():
    (first, _) = calls(OwnModel(), x(2, 6, 32))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 2] = False
    mask[2, 2] = True
    expected = F.scaled_dot_product_attention(first.q, first.k, first.v, attn_mask=mask & torch.ones_like(mask).tril())
    torch.testing.assert_close(first.run(mask=mask[None, None]), expected)
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(first.run(mask=additive), expected)
    open_ = F.scaled_dot_product_attention(first.q, first.k, first.v, attn_mask=mask)
    torch.testing.assert_close(first.run(mask=mask[None, None], is_causal=False), open_)
    full = F.scaled_dot_product_attention(first.q, first.k, first.v)
    torch.testing.assert_close(first.run(is_causal=False), full)


def test_run_with_fewer_keys_and_queries():
    (first, _) = calls(OwnModel(), x(2, 6, 32))
    out = first.run(q=first.q[:, :, :2], k=first.k[:, :, :3], v=first.v[:, :, :3], is_causal=False)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(first.q[:, :, :2], first.k[:, :, :3], first.v[:, :, :3])
    )


def test_run_refuses_what_does_not_fit(gqa):
    (call,) = calls(gqa, ids())
    with pytest.raises(
        SeamError, match=r"run\(k=...\) got shape \[2, 3, 9, 8\]; accepted is \[2, 2 or 4, length, width\]"
    ):
        call.run(k=torch.zeros(2, 3, 9, 8))
    with pytest.raises(SeamError, match=r"run\(q=...\) got shape \[4, 9, 8\]"):
        call.run(q=call.q[0])


# -- the handler's answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda c: 3,
            r"layer 'blocks.0': the handler returned int; accepted is None or a tensor of shape \[2, 4, 6, 8\]",
        ),
        (lambda c: c.run()[:, :2], r"layer 'blocks.0': .* shape \[2, 2, 6, 8\]; accepted is \[2, 4, 6, 8\]"),
        (lambda c: c.run().double(), r"layer 'blocks.0': .* dtype torch.float64; accepted is torch.float32"),
        (lambda c: c.run().to("meta"), r"layer 'blocks.0': .* a tensor on meta; accepted is cpu"),
    ],
)
def test_wrong_answers_are_refused(answer, message):
    model = OwnModel()
    with pytest.raises(SeamError, match=message), Seam(model, answer):
        model(x(2, 6, 32))
    assert clean(model)
    assert len(calls(model, x(2, 6, 32))) == 2


def test_an_error_of_the_handler_leaves_the_model_as_before():
    model, given = OwnModel(), x(2, 6, 32)
    plain = model(given)

    def fail(call):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), Seam(model, fail):
        model(given)
    assert clean(model)
    assert same(model(given), plain)


def test_an_error_inside_the_seam_can_be_survived():
    """The stack of modules is right again after a forward that failed halfway."""
    model, spy = OwnModel(), Spy()
    with Seam(model, spy):
        with pytest.raises(RuntimeError):
            model(x(2, 6, 32), x(2, 5, 7))  # the context is too narrow
        model(x(2, 6, 32))
    assert [(c.layer, c.forward) for c in spy.calls] == [
        ("blocks.0", 0),
        ("blocks.1", 0),
        ("blocks.0", 1),
        ("blocks.1", 1),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_inference_mode(dtype):
    model, given = OwnModel(), x(2, 6, 32)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        (first, *_) = watched(model, lambda: model(given)).calls
        assert first.result_dtype == dtype


# -- several seams, other calls


def test_seams_nest_and_the_inner_one_runs_through_the_outer():
    model, given, order = OwnAttention(), x(1, 5, 32), []

    def make(name, change):
        def handler(call):
            order.append((name, call.layer))
            return change(call.run())

        return handler

    z = calls(model, given)[0].run()
    with Seam(model, make("outer", lambda z: z + 1)), Seam(model, make("inner", lambda z: z * 2)):
        out = model(given)
    assert order == [("inner", ""), ("outer", "")]
    torch.testing.assert_close(out, model.out(((z + 1) * 2).transpose(1, 2).flatten(2)))


def test_the_seam_of_a_part_sees_only_that_part():
    model, spy = OwnModel(), Spy()
    with Seam(model.blocks[1], spy):
        model(x(2, 6, 32))
        F.scaled_dot_product_attention(x(1, 1, 3, 4), x(1, 1, 3, 4), x(1, 1, 3, 4))  # made by no module of the model
    assert [(c.layer, c.module is model.blocks[1]) for c in spy.calls] == [("", True)]


class Wrapper(nn.Module):
    """As adapters and data parallelism wrap: arguments passed on without names."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@torch.no_grad()
def test_inputs_are_known_by_name_through_wrappers():
    model, tokens = Wrapper(Wrapper(llama(layers=1))), ids()
    for args, kwargs in (((tokens, ones(left=2)), {}), ((), {"input_ids": tokens, "attention_mask": ones(left=2)})):
        spy = watched(model, lambda a=args, k=kwargs: model(*a, **k))
        (call,) = spy.calls
        assert call.layer == "inner.inner.model.layers.0.self_attn"
        assert torch.equal(call.inputs["input_ids"], tokens)
        assert call.valid.sum(1).tolist() == [9, 7]
        assert not call.folded


def test_opening_twice_and_again():
    model, spy = OwnModel(), Spy()
    seam = Seam(model, spy)
    for forward in range(2):
        with seam:
            model(x(2, 6, 32))
            with pytest.raises(SeamError, match="already open"):
                seam.__enter__()
        assert [c.forward for c in spy.calls[-2:]] == [0, 0], forward
    assert clean(model)


def test_without_a_handler_nothing_is_attached():
    model = OwnModel()
    with Seam(model):
        assert clean(model)
        assert torch._C._len_torch_function_stack() == 0


def test_another_thread_is_refused():
    model, error = OwnModel(), []

    def run():
        try:
            model(x(2, 6, 32))
        except SeamError as e:
            error.append(str(e))

    with Seam(model, Spy()):
        model(x(2, 6, 32))
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert error
    assert "OwnModel runs in another thread" in error[0]
    assert "open the seam inside that thread" in error[0]


# -- refused by name: before


def opening(model, **how) -> str:
    before = hooks(model)
    with pytest.raises(SeamError) as caught, Seam(model, Spy(), **how):
        pass
    assert hooks(model) == before
    return str(caught.value)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_implementations_are_refused(implementation):
    model = llama(layers=1)
    model.set_attn_implementation(implementation)
    message = opening(model)
    assert "LlamaForCausalLM" in message
    assert f'"{implementation}"' in message
    assert 'model.set_attn_implementation("sdpa")' in message
    model.set_attn_implementation("sdpa")
    assert len(calls(model, ids())) == 1


def test_classes_without_sdpa_are_refused():
    message = opening(tr.BloomForCausalLM(tr.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)))
    assert "BloomForCausalLM" in message
    assert "no sdpa attention in this version of transformers" in message


def test_compiled_models_are_refused():
    model = OwnModel()
    assert "_orig_mod" in opening(torch.compile(model, backend="eager"))
    model.blocks[0].compile(backend="eager")
    assert "'blocks.0' (OwnAttention) was compiled in place" in opening(model)
    model.blocks[0]._compiled_call_impl = None
    model.blocks[1].forward = torch.compile(model.blocks[1].forward, backend="eager")
    assert "'blocks.1' (OwnAttention) has a compiled forward" in opening(model)
    del model.blocks[1].forward
    assert len(calls(model, x(2, 6, 32))) == 2


def test_scripted_and_replicated_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Linear(3, 3), x(1, 3))
    assert "'1' is TorchScript" in opening(nn.Sequential(OwnAttention(), traced))
    assert "give `model.module`" in opening(nn.DataParallel(OwnModel()))


@pytest.fixture
def one_process():
    distributed = torch.distributed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_models_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1,))
    parallel = parallelize_module(OwnModel(), mesh, {"blocks.0.qkv": ColwiseParallel()})
    assert "'blocks.0.qkv' (Linear) has sharded parameters" in opening(parallel)
    assert "the model is fully sharded" in opening(fully_shard(OwnModel(), mesh=mesh))
    replicated = nn.parallel.DistributedDataParallel(OwnModel())  # whole in each process
    spy = watched(replicated, lambda: replicated(x(2, 6, 32)))
    assert [(c.layer, c.folded) for c in spy.calls] == [("module.blocks.0", False), ("module.blocks.1", False)]


def test_not_a_module_is_refused():
    with pytest.raises(SeamError, match=r"model is function; accepted is a torch\.nn\.Module"):
        require_module(lambda x: x)


def test_checkpointing_is_refused_under_edits_only():
    model, seen = llama(layers=1).train(), []
    model.gradient_checkpointing_enable()
    assert "gradient_checkpointing_disable()" in opening(model, edits=True)
    with Seam(model, lambda call: seen.append(call.layer)):
        model(ids(), labels=ids()).loss.backward()  # recomputation is no further call
    assert seen == ["model.layers.0.self_attn"]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = OwnAttention(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_written_by_hand(reentrant):
    model, given = Checkpointed(reentrant), x(2, 6, 32).requires_grad_()
    with pytest.raises(SeamError, match=r"layer 'inner' runs under torch.utils.checkpoint"):
        with Seam(model, lambda call: call.run(), edits=True):
            model(given)
    assert clean(model)
    with torch.no_grad(), Seam(model, lambda call: call.run(), edits=True):
        model(given)  # nothing is recomputed without gradients
    model(given).sum().backward()
    expected, given.grad, seen = given.grad, None, []
    with Seam(model, lambda call: seen.append(call.forward)):
        model(given).sum().backward()
    assert seen == [0]
    assert same(given.grad, expected)


# -- refused by name: while running


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return self.function(x, x, x)


def flex(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


def aten(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "name"), [(flex, "flex_attention"), (aten, "_scaled_dot_product_flash")])
def test_other_kernels_are_refused(function, name):
    model = Calls(function)
    with pytest.raises(SeamError, match=rf"layer '' calls {name}.*scaled_dot_product_attention"):
        with Seam(model, Spy()):
            model(x(2, 16, 16))
    assert clean(model)


def test_the_operator_itself_is_caught():
    model = Calls(torch.ops.aten.scaled_dot_product_attention)
    assert len(watched(model, lambda: model(x(2, 5, 16))).calls) == 1


# -- refused by name: after


def by_hand(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def test_a_model_that_made_no_call_is_refused():
    model = Calls(by_hand)
    with pytest.raises(SeamError, match=r"Calls ran and made no scaled_dot_product_attention call.*matrix products"):
        with Seam(model, Spy()):
            model(x(2, 5, 16))


def test_a_model_that_was_not_run_warns():
    model, other = OwnModel(), OwnModel()
    with pytest.warns(SeamWarning, match=r"OwnModel was not run"), Seam(model, Spy()):
        other(x(2, 6, 32))


class MatmulAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(by_hand(*self.qkv(x).chunk(3, -1)))


def test_attention_that_made_no_call_is_named():
    model = nn.Sequential(OwnAttention(), MatmulAttention())
    with pytest.warns(SeamWarning, match=r"^1: ran without a scaled_dot_product_attention call"), Seam(model, Spy()):
        model(x(2, 6, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(OwnModel(), x(2, 6, 32))
        calls(llama(), ids())


# -- the mask's survey


@given(
    q_len=st.integers(1, 12),
    extra=st.integers(0, 9),
    cut=st.integers(0, 5),
    heads=st.sampled_from([1, 3]),
    kind=st.sampled_from(["causal", "window", "future", "random"]),
    tile=st.sampled_from([1, 3, 100]),
    seed=st.integers(0, 99),
)
def test_survey_of_masks(q_len, extra, cut, heads, kind, tile, seed):
    kv_len, q_start = q_len + extra, max(0, extra - cut)
    i, j = torch.arange(q_len)[:, None] + q_start, torch.arange(kv_len)
    allowed = {
        "causal": j <= i,
        "window": (j <= i) & (j > i - 3),
        "future": j <= i + 1,
        "random": torch.rand(q_len, kv_len, generator=torch.Generator().manual_seed(seed)) < 0.4,
    }[kind]
    mask = allowed.expand(2, heads, q_len, kv_len).clone()
    mask[1, :, :, : cut + 1] = False
    import regard.watch.padding as padding

    old, padding.TILE = padding.TILE, tile
    try:
        found = _survey(mask, q_len, kv_len, q_start)
        additive = _survey(torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), q_len, kv_len, q_start)
    finally:
        padding.TILE = old
    for result in (found, additive):
        assert torch.equal(result.rows, mask.any(-1).any(1))
        assert torch.equal(result.keys, mask.any(-2).any(1))
        assert result.causal == (not bool((mask & (j > i)).any()))
