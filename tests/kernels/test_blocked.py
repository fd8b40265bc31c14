"""The blocked backend from inside: plans, views and gathers, chunks, masks made in the call, memory, grids in tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from regard.kernels import blocked_choice, blocked_flash, blocked_math, blocked_plan
from regard.kernels.attend import attend
from regard.kernels.blocked_choice import make_plan
from regard.patterns import Causal, Full, Grid, Neighborhood, Segments, Sinks, Window, per_head
from tests.kernels.test_attend import near
from tests.oracles.attention import attended
from tests.patterns import catalogue


@pytest.fixture(autouse=True)
def no_plans_of_other_tests(monkeypatch):
    monkeypatch.setattr(blocked_choice, "_KEPT", type(blocked_choice._KEPT)())


def both(pattern, q_len, kv_len, q_start, heads=2, kv_heads=1, batch=1, seed=0, **kwargs):
    """Outputs, lse and gradients of the backend and of the oracle, float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = (q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads)
    q, k, v = (torch.randn(batch, n, h, 8, generator=g, dtype=torch.float64).transpose(1, 2) for n, h in shapes)
    weight = torch.randn(batch, heads, q_len, 8, generator=g, dtype=torch.float64)
    extra = torch.randn(batch, heads, q_len, generator=g, dtype=torch.float64)
    bias = kwargs.pop("bias", None)
    found = []
    for mine in (True, False):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, bias) if x is not None]
        rest = kwargs if bias is None else {**kwargs, "bias": inputs[3]}
        if mine:
            out, lse = attend(*inputs[:3], pattern, q_start=q_start, return_lse=True, backend="blocked", **rest)
        else:
            rest.pop("layout", None)
            out, lse = attended(*inputs[:3], pattern, q_start=q_start, **rest)
        loss = (out * weight).sum() + (torch.where(lse > -torch.inf, lse, 0) * extra).sum()
        found.append([out, lse, *torch.autograd.grad(loss, inputs)])
    return zip(*found, strict=True)


def same(*args, **kwargs):
    for mine, its in both(*args, **kwargs):
        near(mine.detach(), its.detach(), 1e-10)


def heads_of(pattern):
    """(heads, kv_heads, batch) that the pattern takes."""
    return (pattern.heads, pattern.heads, pattern.samples or 1) if pattern.heads else (2, 1, pattern.samples or 2)


@given(
    case=catalogue.cases(per_head=True),
    fine=st.sampled_from([2, 4, 7]),
    room=st.sampled_from([1, 1 << 12, 1 << 23]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_any_pattern_cut_finely(case, fine, room, softcap):
    """Small blocks, chunks of one tile, views of short runs: everything that long sequences meet."""
    pattern, q_len, kv_len, q_start, _ = case
    heads, kv_heads, batch = heads_of(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_choice, "BASE", fine)
        patch.setattr(blocked_choice, "_KEPT", type(blocked_choice._KEPT)())
        patch.setattr(blocked_choice, "GRID_TILES", (2, 16))
        patch.setattr(blocked_plan, "RUN", 2)
        patch.setattr(blocked_plan, "ALONE", fine * 8)
        patch.setattr(blocked_flash, "ROOM", room)
        patch.setattr(blocked_math, "ROOM", room)
        same(pattern, q_len, kv_len, q_start, heads, kv_heads, batch, softcap=softcap)


@given(case=catalogue.cases(per_head=True), keep=st.booleans())
def test_masks_made_in_the_call(case, keep):
    """Where masks are too many to be kept, each call makes them; the numbers are the same."""
    pattern, q_len, kv_len, q_start, _ = case
    heads, kv_heads, batch = heads_of(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_choice, "_KEPT", type(blocked_choice._KEPT)())
        patch.setattr(blocked_choice, "BASE", 4)
        patch.setattr(blocked_choice, "PAIRS", blocked_choice.PAIRS if keep else 0)
        patch.setattr(blocked_plan, "MASKS", 0)
        same(pattern, q_len, kv_len, q_start, heads, kv_heads, batch)


@given(case=catalogue.cases(per_head=True))
def test_a_layout_that_was_made_before(case):
    pattern, q_len, kv_len, q_start, block = case
    heads, kv_heads, batch = heads_of(pattern)
    layout = pattern.layout(q_len, kv_len, block, q_start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_choice, "_KEPT", type(blocked_choice._KEPT)())
        same(pattern, q_len, kv_len, q_start, heads, kv_heads, batch, layout=layout)


LONG = [
    (Window(300), 1500, 1500, 0),
    (Window(90, 40), 1100, 1300, 200),
    (Window(200) | Sinks(3), 900, 1700, 800),
    (Causal(), 1000, 1000, 0),
    (Causal(), 700, 1000, 300),
    (~Window(50, 50), 640, 600, -20),
    (Segments.from_lengths([100, 500, 7, 393, 200]) & Causal(), 1200, 1200, 0),
    (Neighborhood((30, 41), (7, 5)), 1230, 1230, 0),
    (Neighborhood((6, 14, 15), (3, 7, 5), stride=(1, 3, 2), dilation=(2, 1, 2)), 1260, 1260, 0),
    (Grid([Window(3, 3), Causal()], shape=(20, 50)), 1000, 1000, 0),
]


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "q_start"), LONG, ids=lambda x: str(x)[:40])
def test_long_sequences(pattern, q_len, kv_len, q_start):
    same(pattern, q_len, kv_len, q_start, heads=2, kv_heads=2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(90, 90), (40, 90), (90, 40)])
@pytest.mark.parametrize("pattern", [Causal(), Full()])
def test_patterns_that_are_one_call_of_the_kernel(pattern, lengths, kv_heads):
    same(pattern, *lengths, 0, heads=4, kv_heads=kv_heads, batch=2)


@pytest.mark.parametrize("shape", [(1, 2, 900, 900), (2, 1, 900, 1), (1, 1, 1, 900)])
def test_a_bias_on_long_sequences(shape):
    g = torch.Generator().manual_seed(3)
    bias = torch.randn(shape, generator=g, dtype=torch.float64)
    same(Window(100), 900, 900, 0, batch=2, bias=bias.masked_fill(bias > 1.5, -torch.inf))
    if shape[-1] == 900:
        same(Neighborhood((30, 30), (5, 7)), 900, 900, 0, batch=2, bias=bias)


def test_a_window_copies_no_keys():
    """All but the short first rows are one strided view with one mask, and little more than the window is computed."""
    length, keys = 16384, 1024
    plan = make_plan(Window(keys - 1), length, length, 0)
    assert sum(len(batch) for batch in plan.batches if batch.shift is None) <= 1  # the first, short one
    largest = max(plan.batches, key=len)
    assert len(largest) * largest.size > 0.9 * length
    assert largest.masks is not None
    assert len(largest.masks) == 1
    assert plan.pairs <= 1.25 * int(Window(keys - 1).row_counts(length, length, 0).sum())
    assert plan.nbytes < 1 << 23


def test_a_neighborhood_goes_in_tiles():
    grid = Neighborhood((64, 64), 13)
    plan = make_plan(grid, 4096, 4096, 0)
    assert plan.order.startswith("tiles of")
    assert plan.pairs < 2 * 4096 * 169
    flat = sum(grid.layout(4096, 4096, 64, 0).counts.tolist()) * 64 * 64
    assert plan.pairs < flat / 2


def test_plans_are_kept_by_value_and_within_bounds(monkeypatch):
    first = make_plan(Window(9), 300, 300, 0)
    assert make_plan(Window(9), 300, 300, 0) is first
    assert make_plan(Window(9), 300, 300, 0, keys=True) is not first
    monkeypatch.setattr(blocked_choice, "_KEPT_BYTES", 2 * first.nbytes)
    for left in range(10, 20):
        make_plan(Window(left), 300, 300, 0)
    assert len(blocked_choice._KEPT) <= 3
    assert make_plan(Window(9), 300, 300, 0) is not first


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gives back in memory of its own."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x._base is None:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("pattern", [Window(100), Window(60) | Sinks(2), Neighborhood((64, 64), 5)])
def test_nothing_as_large_as_all_pairs(pattern, softcap, monkeypatch):
    monkeypatch.setattr(blocked_math, "ROOM", 1 << 20)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 8, generator=g).requires_grad_() for _ in range(3))
    with Largest() as largest:
        out = attend(q, k, v, pattern, q_start=0, softcap=softcap, backend="blocked")
        torch.autograd.grad(out.sum(), (q, k, v))
    assert largest.bytes < 4096 * 4096 * 4 / 8


def test_double_backward_is_refused_by_name():
    q = torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for softcap in (None, 2.0):
        out = attend(q, q, q, Causal(), softcap=softcap, backend="blocked")
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"blocked.*no double backward.*reference"):
            torch.autograd.grad(grad.sum(), q)


def test_a_kv_head_is_gathered_once_for_its_group():
    """Eight query heads over one kv head gather as many keys as one query head does."""
    pattern = Window(40) | Sinks(2)
    g = torch.Generator().manual_seed(0)
    sizes = []
    for heads in (1, 8):
        q = torch.randn(1, heads, 2000, 8, generator=g)
        k, v = (torch.randn(1, 1, 2000, 8, generator=g) for _ in range(2))
        moved = []
        real = torch.index_select

        def counting(*args, moved=moved, real=real, **kwargs):
            found = real(*args, **kwargs)
            moved.append(found.numel())
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "index_select", counting)
            attend(q, k, v, pattern, backend="blocked")
        sizes.append(sum(moved))
    assert sizes[0] > 0
    assert sizes[0] == sizes[1]


def test_heads_with_patterns_of_their_own_share_plans(monkeypatch):
    made = []
    real = blocked_choice._make
    monkeypatch.setattr(blocked_choice, "_make", lambda *args: made.append(args[0]) or real(*args))
    q = torch.randn(2, 4, 50, 8, generator=torch.Generator().manual_seed(0))
    attend(q, q, q, per_head([Causal(), Window(3), Causal(), Full()]), backend="blocked")
    assert sorted(map(str, made)) == sorted(map(str, [Causal(), Window(3), Full()]))


@pytest.mark.parametrize("pattern", [None, Causal(), Window(3)], ids=str)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_inputs_whose_rows_do_not_lie_together_in_memory(pattern, which):
    """The flash kernel takes any stride between rows, and reads a row on whatever its own stride says."""
    g = torch.Generator().manual_seed(0)
    tensors = list(torch.randn(4, 1, 2, 16, 8, generator=g, dtype=torch.float64))
    found = []
    for turned in ((), which):
        *inputs, weight = (x.mT.contiguous().mT if n in turned else x for n, x in enumerate(tensors))
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*inputs, pattern, q_start=0, return_lse=True, backend="blocked")
        found.append([out, lse, *torch.autograd.grad(out, inputs, weight)])
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its)
