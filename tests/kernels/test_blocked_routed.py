"""Routed patterns on the blocked backend from inside: chunks, masks made late, decoding, memory, what is shared."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regard
from regard.kernels import (
    routed_columns,
    routed_columns_flash,
    routed_flash,
    routed_keep,
    routed_kinds,
    routed_math,
    routed_spans,
    routed_tiles,
)
from regard.kernels.attend import attend
from regard.kernels.request import make_request
from regard.kernels.routed_tiles import make_tiles
from regard.patterns import Blocks, Causal, Diagonals, Full, Sinks, Window, Within, per_head, per_sample
from regard.patterns.block_topk import BlockTopK
from regard.patterns.decided import Routed
from regard.patterns.select import to_index, topk
from regard.plan.rounded import rounded
from tests.kernels.test_attend import near
from tests.kernels.test_blocked import Largest
from tests.oracles.attention import attended

WITHIN = [None, Full(), Causal(), Window(9), Window(6, 4), Blocks(11) & Causal()]
KEEP = [None, Sinks(2), Window(3, 2), Sinks(1) | Window(4)]


@st.composite
def routes(draw):
    """(routed, batch, heads, kv_heads, generator): blocks, single keys, spans, groups; in order or in slots."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    heads = kv_heads * group
    kv_len = draw(st.integers(1, 50))
    q_len = draw(st.sampled_from([kv_len, 1, kv_len // 2 + 1]))
    q_start = draw(st.sampled_from([None, None, 0, 5]))
    decisions, samples = draw(st.sampled_from(sorted({1, kv_heads, heads}))), draw(st.sampled_from([1, batch]))
    bq, bk = draw(st.sampled_from([(1, 1), (1, 5), (4, 4), (8, 3), (7, 16), (64, 64)]))
    within = draw(
        st.sampled_from([*WITHIN, per_sample([Within(Causal(), 0, 50)] * batch), per_head([Causal()] * heads)])
    )
    how = {"q_len": q_len, "kv_len": kv_len, "q_start": q_start, "within": within, "heads": heads}
    how["heads"] = heads if decisions > 1 else None
    kind = draw(st.sampled_from(["blocks", "blocks", "spans", "slots", "groups"]))
    keep = draw(st.sampled_from(KEEP))
    if kind == "spans":
        shape = (samples, decisions, -(-q_len // bq), draw(st.integers(0, 3)))
        start = torch.randint(0, kv_len + 1, shape, generator=g)
        stop = (start + torch.randint(0, 9, shape, generator=g)).clamp(max=kv_len)
        return Routed.spans(start, stop, block=bq, keep=keep, **how), batch, heads, kv_heads, g
    if kind == "groups":
        groups, width, kv_width = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
        repeats = draw(st.sampled_from(["mean", "merge"]))
        tables = []
        for length, size in ((q_len, width), (kv_len, kv_width)):
            rows = torch.rand(samples, decisions, groups, length, generator=g).argsort(-1)[..., :size]
            if repeats == "merge" and length == kv_len and size == kv_width:  # each key in one group
                rows = torch.rand(samples, decisions, length, generator=g).argsort(-1)
                rows = torch.nn.functional.pad(rows, (0, groups * size), value=-1)[..., : groups * size]
                rows = rows.unflatten(-1, (groups, size))
            tables.append(rows)
        return Routed.groups(tables[0], tables[1], repeats, **how), batch, heads, kv_heads, g
    orders, slots = {}, [q_len, kv_len]
    if kind == "slots":
        for n, name in enumerate(("q_order", "kv_order")):
            order = torch.rand(samples, decisions, slots[n], generator=g).argsort(-1)
            orders[name] = torch.nn.functional.pad(order, (n, 2), value=-1)
            slots[n] += 2 + n
    index, count = to_index(torch.rand(samples, decisions, -(-slots[0] // bq), -(-slots[1] // bk), generator=g) < 0.4)
    routed = Routed.blocks(index, count, block=(bq, bk), keep=keep, **orders, **how)
    return routed, batch, heads, kv_heads, g


def compare(routed, batch, heads, kv_heads, g, dim=8, v_dim=8, **kwargs):
    """Outputs, lse and gradients beside the oracle's, float64."""
    shapes = (routed.q_len, heads, dim), (routed.kv_len, kv_heads, dim), (routed.kv_len, kv_heads, v_dim)
    q, k, v = (torch.randn(batch, *s, generator=g, dtype=torch.float64).transpose(1, 2) for s in shapes)
    weight = torch.randn(batch, heads, routed.q_len, v_dim, generator=g, dtype=torch.float64)
    mean = routed.repeats == "mean"
    found = []
    for backend in ("blocked", "reference" if mean else None):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        if mean:
            got = [attend(*inputs, routed, q_start=routed.q_start, backend=backend, **kwargs)]
        elif backend:
            got = attend(*inputs, routed, q_start=routed.q_start, return_lse=True, backend=backend, **kwargs)
        else:
            got = attended(*inputs, routed, q_start=routed.q_start, **kwargs)
        loss = (got[0] * weight).sum()
        if not mean:
            loss = loss + torch.where(got[1] > -torch.inf, got[1], 0).sin().sum()
        found.append([*got, *torch.autograd.grad(loss, inputs)])
    for mine, its in zip(*found, strict=True):
        near(mine.detach(), its.detach(), 1e-10)


def chosen(kind: str, length: int = 512):
    """Decisions of single queries, one for two heads: three blocks of 16, or a span and a window."""
    g = torch.Generator().manual_seed(0)
    if kind == "blocks":
        index, count = to_index(torch.rand(1, 2, length, length // 16, generator=g) < 3 / (length // 16))
        return Routed.blocks(index, count, block=(1, 16), q_len=length, kv_len=length, heads=4, within=Causal())
    start = torch.randint(0, length, (1, 2, length, 1), generator=g)
    return Routed.spans(
        start, (start + 40).clamp(max=length), q_len=length, kv_len=length, heads=4, within=Causal(), keep=Window(5)
    )


@pytest.mark.parametrize("kind", ["blocks", "spans"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_rows_are_put_together_by_the_block_they_share(kind, dtype):
    g = torch.Generator().manual_seed(1)
    routed = chosen(kind)
    q, k, v = (torch.randn(2, h, 512, 16, generator=g).to(dtype) for h in (4, 2, 2))
    tiles = make_tiles(routed, 2, 4, 2)
    assert tiles.units.shared == 2
    assert tiles.columns is not None
    assert "by block of keys" in regard.explain(q, k, v, routed).order
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, routed, return_lse=True, backend="blocked")
    want, want_lse = attended(q.double(), k.double(), v.double(), routed, q_start=0)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    near(out.detach(), want.detach(), tolerance)
    near(lse.detach(), want_lse.detach(), tolerance)
    weight = torch.randn(out.shape, generator=g)
    for mine, its in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, want)), strict=True):
        near(mine, its.double(), 20 * tolerance)


def test_results_wait_for_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(routed_columns, "RESULTS", 256)
    columns = make_tiles(chosen("blocks", 2048), 1, 4, 2).columns
    assert columns is not None
    assert len(columns.stages) > 2 * 2048 * 3 // 256 // 4
    listed = [sum(rows.numel() for _, rows, _ in s.merges) for s in columns.stages]
    assert sum(listed) <= 2 * 2048
    assert max(sum(places.numel() for _, _, places in s.merges) for s in columns.stages) * 2 <= 256


def test_few_queries_and_long_rows_stay_together():
    """Decoding, rows of many queries, and blocks that few list are tiles of queries."""
    g = torch.Generator().manual_seed(0)
    index, count = to_index(torch.rand(1, 2, 64, 64, generator=g) < 0.05)
    spread = Routed.blocks(index, count, block=(1, 16), q_len=64, kv_len=1024)
    assert make_tiles(spread, 1, 2, 2).columns is None
    step = Routed.blocks(torch.arange(4).view(1, 1, 1, 4).expand(1, 2, 1, 4), block=(1, 16), q_len=1, kv_len=512)
    assert make_tiles(step, 1, 2, 2).columns is None
    q = torch.randn(1, 2, 512, 8, generator=g)
    assert make_tiles(BlockTopK(64, select=topk(3))(q, q, within=Causal()), 1, 2, 2).columns is None


@given(
    case=routes(),
    room=st.sampled_from([1, 1 << 10, 1 << 22]),
    long=st.sampled_from([1, 3, 1 << 11]),
    results=st.sampled_from([1, 64, 1 << 18]),
    block=st.sampled_from([3, 16, 64]),
)
def test_any_route_block_by_block(case, room, long, results, block):
    """Short rows put together by the block of keys they share: the same outputs, lse and gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed_tiles, "SHORT", 1 << 30)
        patch.setattr(routed_tiles, "BLOCK", block)
        patch.setattr(routed_spans, "BLOCK", block)
        patch.setattr(routed_columns, "MANY", 0)
        patch.setattr(routed_columns, "WIDE", 1)
        patch.setattr(routed_columns, "LONG", long)
        patch.setattr(routed_columns, "RESULTS", results)
        patch.setattr(routed_columns_flash, "ROOM", room)
        compare(*case)


@given(case=routes(), room=st.sampled_from([1, 1 << 10, 1 << 22]), softcap=st.sampled_from([None, None, 2.0]))
def test_any_route_in_any_chunks(case, room, softcap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed_flash, "ROOM", room)
        patch.setattr(routed_math, "ROOM", room)
        compare(*case, softcap=softcap)


@given(case=routes(), v_dim=st.sampled_from([8, 3, 12]))
def test_masks_made_in_the_call(case, v_dim):
    """Where masks are too many to be kept, chunks evaluate their pairs; the numbers are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed_kinds, "KEPT", 0)
        patch.setattr(routed_keep, "_KEPT", type(routed_keep._KEPT)())
        compare(*case, v_dim=v_dim)


@given(case=routes(), data=st.data())
def test_a_bias_by_token(case, data):
    routed, batch, heads, _, g = case
    shape = [data.draw(st.sampled_from([1, n])) for n in (batch, heads, routed.q_len, routed.kv_len)]
    bias = torch.randn(shape, generator=g, dtype=torch.float64)
    compare(*case, bias=bias.masked_fill(bias > 1.5, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", ["each", "kv", "all"])
def test_dtypes(dtype, heads):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 300, 16, generator=g).to(dtype) for h in (4, 2, 2))
    routed = BlockTopK((32, 16), select=topk(3), heads=heads, keep=Sinks(2) | Window(5))(
        q.float(), k.float(), within=Causal()
    )
    out, lse = attend(q, k, v, routed, return_lse=True, backend="blocked")
    want, want_lse = attended(q.double(), k.double(), v.double(), routed, q_start=0)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    near(out, want, tolerance)
    near(lse, want_lse, tolerance)


def test_a_step_of_decoding_reads_what_is_listed():
    """One query: no more keys are copied than are listed, the short last block included."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 1, 16, generator=g), torch.randn(1, 2, 4099, 16, generator=g)
    index = torch.tensor([[[[0, 3, 60, 64]]]]).expand(1, 4, 1, 4)
    routed = Routed.blocks(index, block=64, q_len=1, kv_len=4099, within=Causal())
    tiles = make_tiles(routed, 1, 4, 2)
    assert tiles.gathered == 4 * 4 * 64
    assert tiles.size == 1
    out = attend(q, k, k, routed, backend="blocked")
    near(out, attended(q.double(), k.double(), k.double(), routed, q_start=4098)[0], 2e-5)


def test_nothing_as_large_as_all_pairs():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 8, generator=g).requires_grad_() for _ in range(3))
    routed = BlockTopK(64, select=topk(4), keep=Sinks(4))(q, k, within=Causal())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed_flash, "ROOM", 1 << 18)
        with Largest() as largest:
            out = attend(q, k, v, routed, backend="blocked")
            torch.autograd.grad(out.sum(), (q, k, v))
    assert largest.bytes < 4096 * 4096 * 4 / 8


def test_most_tiles_share_a_mask_and_little_is_computed_beside_what_is_listed():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 2048, 8, generator=g) for _ in range(2))
    routed = BlockTopK(32, select=topk(6), keep=Sinks(4) | Window(40))(q, k, within=Causal())
    tiles = make_tiles(routed, 1, 2, 2)
    assert sum(len(b) for b in tiles.batches) == 2 * 64
    assert sum(len(b) for b in tiles.batches if not b.masked) > 0.7 * 2 * 64
    listed, full = tiles.listed
    assert tiles.pairs == listed * 32 * 32
    assert full > 0.5 * listed
    layout = routed.layout(2048, 2048, 32, 0)
    assert listed == layout.n_blocks


def test_heads_that_share_a_decision_gather_their_keys_once():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 8, 256, 8, generator=g), torch.randn(1, 2, 256, 8, generator=g)
    gathered = {}
    for heads in ("each", "kv", "all"):
        routed = BlockTopK(32, select=topk(2), heads=heads)(q, k)
        request = make_request(q, k, k, routed)
        gathered[heads] = make_tiles(request.pattern, 1, 8, 2).gathered
    assert gathered["kv"] == gathered["all"] == gathered["each"] // 4


def test_what_is_kept_is_settled_once(monkeypatch):
    monkeypatch.setattr(routed_keep, "_KEPT", type(routed_keep._KEPT)())
    made = []
    real = routed_keep.kept_layout
    monkeypatch.setattr(routed_keep, "kept_layout", lambda *args: made.append(args) or real(*args))
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        q, k = (torch.randn(1, 2, 128, 8, generator=g) for _ in range(2))
        routed = BlockTopK(16, select=topk(2), keep=Window(20) | Sinks(3))(q, k, within=Causal())
        out = attend(q, k, k, routed, backend="blocked")
        near(out, attended(q.double(), k.double(), k.double(), routed, q_start=0)[0], 2e-5)
    assert len(made) == 1


def test_rows_of_about_the_same_length_go_together():
    g = torch.Generator().manual_seed(0)
    start = torch.zeros(1, 2, 600, 1, dtype=torch.int)
    stop = start + torch.randint(1, 400, start.shape, generator=g)
    tiles = make_tiles(Routed.spans(start, stop, q_len=600, kv_len=600), 1, 2, 2)
    assert len(tiles.batches) < 150
    keys = int(stop.sum())
    assert keys <= tiles.gathered <= keys * (1 + 1 / routed_spans.WASTE) + 1200
    assert tiles.listed == (keys, keys)


def test_explain_tells_what_is_gathered():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 128, 8, generator=g) for _ in range(2))
    routed = BlockTopK(16, select=topk(2))(q, k, within=Causal())
    told = regard.explain(q, k, k, routed)
    assert told.backend == "blocked"
    assert told.blocks == routed.layout(128, 128, 16, 0).n_blocks
    assert "16" in str(told)


def test_double_backward_is_refused_by_name():
    q = torch.randn(1, 1, 32, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routed = BlockTopK(8, select=topk(2))(q, q, within=Causal())
    for softcap in (None, 2.0):
        out = attend(q, q, q, routed, softcap=softcap, backend="blocked")
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"blocked.*no double backward"):
            torch.autograd.grad(grad.sum(), q)


@given(
    st.integers(0, 2**31),
    st.sampled_from([(Window(9, 9), 70), (Window(5, 0), 64), (Diagonals(16, 3, causal=False), 80)]),
)
def test_bands_are_read_where_they_stand(seed, case):
    """Whole blocks side by side are not copied; what wraps around is; a sample and head each reads its own keys."""
    pattern, length = case
    g = torch.Generator().manual_seed(seed)
    kv_heads, group, size = 1 + seed % 2, 1 + seed % 3, (8, 16)[seed % 2]
    routed = rounded(pattern, length, size)
    q = torch.randn(2, kv_heads * group, length, 8, generator=g)
    k, v = torch.randn(2, 2, kv_heads, length, 8, generator=g)
    with torch.no_grad():
        out, lse = attend(q, k, v, routed, backend="blocked", return_lse=True)
    want, want_lse = attended(q, k, v, routed)
    near(out, want, 2e-5)
    near(lse, want_lse, 2e-5)


def test_a_stored_route_is_cut_into_tiles_once_for_each_shape_of_call():
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[[[0, 1], [1, 2], [2, 3], [3, -1]]]])
    routed = Routed.blocks(index, block=8, q_len=32, kv_len=32, q_order=order[None, None], kv_order=order[None, None])
    assert make_tiles(routed, 2, 3, 3) is make_tiles(routed, 2, 3, 3)
    assert make_tiles(routed, 2, 3, 1) is not make_tiles(routed, 2, 3, 3)
    assert make_tiles(routed.over(3), 2, 3, 3) is not make_tiles(routed, 2, 3, 3)  # another pattern
    for batch, heads in ((1, 2), (3, 2), (1, 2), *((1, n) for n in range(1, 12))):
        q, k, v = torch.randn(3, batch, heads, 32, 8, dtype=torch.float64)
        out, lse = attend(q, k, v, routed, return_lse=True)
        want, want_lse = attended(q, k, v, routed)
        near(out, want, 1e-9)
        near(lse, want_lse, 1e-9)
    assert len(routed.kept) <= 10


def test_rows_of_a_band_are_runs():
    routed = rounded(Window(16, 16), 128, 16)  # 8 rows of 3 blocks, but the first and the last
    tiles = make_tiles(routed, 2, 3, 3)
    found = tiles.runs
    assert all(others is None for _, others in found)
    runs = sorted(run for some, _ in found for run in some)
    assert runs == [(0, 1, 0, 0), (1, 6, 0, 16), (7, 1, 96, 0)]
    spread = Routed.blocks(torch.tensor([[[[0, 2], [1, 3], [0, 3], [0, 2]]]]), block=(8, 8), q_len=32, kv_len=32)
    tiles = make_tiles(spread, 1, 1, 1)
    ((runs, others),) = tiles.runs
    assert [tuple(run) for run in runs] == []
    assert len(others) == 4
