"""Routed patterns against sets of pairs written down one by one; what is refused; files."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import (
    BlockLayout,
    BlockTopK,
    Causal,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    Refresh,
    Routed,
    Sinks,
    Window,
    above,
    candidates,
    mass,
    per_head,
    per_sample,
    ratio,
    topk,
)
from tests.oracles.layout import blocks as blocks_of
from tests.patterns.routes import routed


def dense_blocks(pairs, block):
    """(listed, full), [samples, heads, query blocks, key blocks]."""
    each = [[blocks_of(head, block) for head in sample] for sample in pairs]
    return (torch.stack([torch.stack([head[n] for head in sample]) for sample in each]) for n in range(2))


def told_apart(case):
    """Its pairs, one for each head and sample that it tells apart."""
    r = case.routed
    return case.pairs()[: r.samples or 1, : r.heads or 1]


@given(routed())
def test_pairs(case):
    r = case.routed
    i, j = torch.arange(-2, r.q_len + 3)[:, None] + r.q_start, torch.arange(-2, r.kv_len + 3)
    head, sample = torch.arange(case.heads)[:, None, None], torch.arange(case.batch)[:, None, None, None]
    got = r.allows(i, j, head, sample).expand(case.batch, case.heads, r.q_len + 5, r.kv_len + 5)
    want = torch.zeros_like(got)
    want[:, :, 2:-3, 2:-3] = case.pairs()
    assert torch.equal(got, want)


@given(routed(), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.booleans())
def test_layouts(case, block, own):
    r = case.routed
    block = r.block if own else block
    want = told_apart(case)
    some, every = dense_blocks(want, block)
    layout = r.layout(r.q_len, r.kv_len, block, r.q_start)
    assert layout.equal(BlockLayout.from_dense(some, every, r.q_len, r.kv_len, block))
    assert r.pairs(r.q_len, r.kv_len, r.q_start) == int(want.sum())
    assert r.density(r.q_len, r.kv_len, r.q_start) == pytest.approx(float(want.float().mean()))


@given(routed(("blocks", "tokens")))
def test_the_table_is_the_layout_in_padded_rows(case):
    r = case.routed
    found = r.table()
    some, every = r.layout(r.q_len, r.kv_len, r.block, r.q_start).dense()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in some.shape[:3])).tolist():
        b, h, row = place
        n = int(found.count[b, h, row])
        listed = found.index[b, h, row]
        assert listed[:n].tolist() == some[b, h, row].nonzero()[:, 0].tolist()
        assert (listed[n:] == -1).all()
        assert found.full[b, h, row, :n].tolist() == every[b, h, row][some[b, h, row]].tolist()


@given(routed(("ordered", "groups", "merge")))
def test_slots_are_the_tokens_they_hold(case):
    r, inside = case.routed, case.routed.slots()
    i, j = torch.arange(inside.q_len)[:, None], torch.arange(inside.kv_len)
    lead = (case.batch, case.heads)
    head, sample = torch.arange(case.heads)[:, None, None], torch.arange(case.batch)[:, None, None, None]
    got = inside.allows(i, j, head, sample).expand(*lead, inside.q_len, inside.kv_len)

    def each(x):  # [samples, decisions, ...] for every sample and head
        return x.repeat_interleave(case.heads // x.shape[1], 1).expand(*lead, *x.shape[2:])

    q, k = (each(x) for x in (r.q_order, r.kv_order))
    listed = torch.zeros(*lead, r.n_rows, r.n_columns + 1, dtype=torch.bool)
    listed.scatter_(3, each(r.index).long() % (r.n_columns + 1), True)  # -1 falls into the last column
    want = listed[:, :, i // r.block[0], j // r.block[1]]

    def on_slots(pattern):
        rows = case.static(pattern).gather(2, q.clamp(min=0)[..., None].expand(*q.shape, r.kv_len))
        return rows.gather(3, k.clamp(min=0)[:, :, None].expand(*q.shape, k.shape[2]))

    if r.keep is not None:
        want = want | on_slots(r.keep)
    if r.within is not None:
        want = want & on_slots(r.within)
    assert torch.equal(got, want & (q >= 0)[..., None] & (k >= 0)[:, :, None])
    some, every = dense_blocks(got[: inside.samples or 1, : inside.heads or 1], r.block)
    layout = inside.layout(inside.q_len, inside.kv_len, r.block, 0)
    assert layout.equal(BlockLayout.from_dense(some, every, inside.q_len, inside.kv_len, r.block))


@given(case=routed())
def test_files(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("routed") / "x.safetensors"
    case.routed.save(path)
    found = Routed.load(path)
    assert found.equal(case.routed)
    assert found == case.routed
    assert torch.equal(told_apart(case), told_apart(replace(case, routed=found)))
    assert found.index is None or torch.equal(found.codes, case.routed.codes)


def test_files_of_others_and_with_wrong_blocks(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"was not written by Routed.save"):
        Routed.load(tmp_path / "x.safetensors")
    wrong = Routed.blocks(torch.tensor([[[[2, 1]]]]), block=4, q_len=4, kv_len=12, check=False)
    wrong.save(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="unsorted blocks, 1"):
        Routed.load(tmp_path / "y.safetensors")

    class Own(Window):
        """No pattern of the library."""

    with pytest.raises(ValueError, match=r"only patterns.*of regard.patterns can be written"):
        blocks([[0]], within=Own(3)).save(tmp_path / "z.safetensors")


def blocks(rows, **how):
    index = torch.tensor(rows)[None, None]
    return Routed.blocks(index, **{"block": 4, "q_len": 4 * len(rows), "kv_len": 12, "q_start": 0} | how)


def test_equal():
    one = blocks([[0, 1], [1, 2], [2, -1]], within=Causal())
    assert one.equal(blocks([[0, 1], [1, 2], [2, -1]], within=Causal()))
    assert not one.equal(blocks([[0, 1], [1, 2], [2, -1]]))
    assert not one.equal(blocks([[0, 1], [1, 2], [1, -1]], within=Causal()))
    assert (one & Causal()) == (one & Causal())
    assert isinstance(one & Window(3), Routed)
    assert not isinstance(one & one, Routed)
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
    assert one.to("cpu").equal(one)


@pytest.mark.parametrize(
    ("rows", "how", "told"),
    [
        ([[1, 1]], {}, "ascending: got repeated blocks, 1 at sample 0, decision 0, row 0"),
        ([[2, 0]], {}, "ascending: got unsorted blocks, 0"),
        ([[0, 3]], {}, r"got a block outside \[0, 3\), 3 at sample 0, decision 0, row 0, place 1"),
        ([[-2, 1]], {}, r"got a block outside \[0, 3\), -2"),
        ([[0, -1, 1]], {}, "-1 after all blocks where no count is given, got one before a block at sample 0"),
        ([[0, -1]], {"count": torch.tensor([[[2]]])}, r"got -1 \(padding\) inside the counted part, -1"),
        ([[0, 1]], {"count": torch.tensor([[[3]]])}, r"count must lie in \[0, 2\], the width of index, got 3"),
        ([[0, 1]], {"count": torch.tensor([[2]])}, r"count must be an integer tensor \[1, 1, 1\]"),
        ([[0, 1]], {"score": torch.tensor([[[[0.0, torch.nan]]]])}, "score must not be NaN, got NaN at sample 0"),
        ([[0, 1]], {"score": torch.zeros(1, 1, 1, 3)}, r"score must be a floating tensor \[1, 1, 1, 2\]"),
        ([[0, 1]], {"q_len": 9}, "index must have 3 rows of query blocks"),
        ([[0, 1]], {"heads": 0}, "heads must be a multiple of the 1 decisions, got 0"),
        ([[0, 1]], {"kv_order": torch.tensor([[[0, 1, 1]]])}, "kv_order must hold each token at most once"),
        (
            [[0, 1]],
            {"q_order": torch.tensor([[[0, 4]]])},
            r"q_order must hold tokens in \[0, 4\) and -1 for padding, got 4",
        ),
        ([[0, 1]], {"q_order": torch.tensor([0, 1])}, "q_order must be an integer tensor"),
        (
            [[0]],
            {"kv_order": torch.tensor([[[3, 0, -1]]]), "keep": Sinks(1)},
            "kv_order must hold every token where keep",
        ),
    ],
)
def test_bad_blocks_are_refused(rows, how, told):
    with pytest.raises(ValueError, match=told):
        blocks(rows, **how)


def test_what_lies_behind_the_count_does_not_matter():
    padded = blocks([[0, 2, 2, -1]], count=torch.tensor([[[2]]]), score=torch.tensor([[[[0.5, 1, torch.nan, 0]]]]))
    assert padded.index.tolist() == [[[[0, 2, -1, -1]]]]
    assert blocks([[-1, -1]]).pairs(4, 12, 0) == 0


def test_bad_spans_groups_and_choices_are_refused():
    def spans(start, stop):
        return Routed.spans(torch.tensor([[[[start]]]]), torch.tensor([[[[stop]]]]), q_len=1, kv_len=5)

    with pytest.raises(ValueError, match=r"0 <= start <= stop <= kv_len = 5, got \[3, 2\) at sample 0"):
        spans(3, 2)
    with pytest.raises(ValueError, match=r"got \[3, 6\)"):
        spans(3, 6)
    assert spans(3, 3).pairs(1, 5) == 0
    g = torch.tensor([[[[0, 1], [1, 2]]]])
    how = {"q_len": 4, "kv_len": 4}
    with pytest.raises(ValueError, match="q_groups must hold each token at most once"):
        Routed.groups(g, g, "error", **how)
    with pytest.raises(
        ValueError, match=r'repeats="merge".*got query 1 with key 1 in 2 groups \(sample 0, decision 0\)'
    ):
        Routed.groups(g, g, "merge", **how)
    with pytest.raises(ValueError, match="kv_groups must hold each token at most once in a group"):
        Routed.groups(g, torch.tensor([[[[0, 0], [1, 2]]]]), **how)
    with pytest.raises(ValueError, match="as many groups, got 2 and 1"):
        Routed.groups(g, g[:, :, :1], **how)
    with pytest.raises(ValueError, match="which must be numbers of the 1 patterns, got 1"):
        Routed.choose([Causal()], torch.tensor([[1]]), **how)
    with pytest.raises(ValueError, match="patterns must be alike for all heads and samples"):
        Routed.choose([per_head([Causal(), Full()])], torch.tensor([[0]]), **how)


def test_fits_its_lengths_alone():
    one = blocks([[0], [1], [2]], within=Causal())
    with pytest.raises(ValueError, match=r"decided for q_len=12, kv_len=12, q_start=0, got q_len=12, kv_len=13"):
        one.layout(12, 13, 4, 0)
    with pytest.raises(ValueError, match="samples apart"):
        Routed.blocks(
            torch.zeros(3, 1, 1, 1, dtype=torch.int), block=4, q_len=4, kv_len=4, within=per_sample([Full()] * 2)
        )
    with pytest.raises(ValueError, match="head must be given"):
        Routed.blocks(torch.zeros(1, 2, 1, 1, dtype=torch.int), block=4, q_len=4, kv_len=4).allows(
            *torch.zeros(2, 1).long()
        )
    assert blocks([[0], [0], [0]], cost=100).flops(12, 12, 8) == 2 * 16 * 48 + 200
    assert blocks([[0], [0], [0]], cost=100).density(12, 12) == pytest.approx(1 / 3)


# Routes


def qk(batch=2, heads=4, kv_heads=2, q_len=21, kv_len=21, dim=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, generator=g, dtype=dtype)
    return q, torch.randn(batch, kv_heads, kv_len, dim, generator=g, dtype=dtype)


def chosen_by_hand(q, k, block, n, heads, within, start):
    """Sets of blocks of each sample, decision and row, from loops."""
    (bq, bk), group, every = block, q.shape[1] // k.shape[1], torch.arange(k.shape[2])
    out = []
    for b in range(q.shape[0]):
        per_head_ = []
        for h in range(q.shape[1]):
            per_head_.append([])
            for r, rows in enumerate(q[b, h].split(bq)):
                # keys up to the last one that the row may see
                i = torch.arange(start + r * bq, start + r * bq + len(rows))
                seen = torch.ones(len(i), k.shape[2]) if within is None else within.allows(i[:, None], every[None])
                end = int(seen.expand(len(i), -1).nonzero()[:, 1].max()) + 1 if seen.any() else k.shape[2]
                blocks_ = [keys[: max(end - j * bk, 1)] for j, keys in enumerate(k[b, h // group].split(bk))]
                per_head_[h].append([float(rows.mean(0) @ keys.mean(0)) for keys in blocks_])
        scores = torch.tensor(per_head_, dtype=torch.float64)
        if heads == "kv":
            scores = scores.view(-1, group, *scores.shape[1:]).mean(1)
        if heads == "all":
            scores = scores.sum(0, keepdim=True)
        decided = []
        for of in scores.tolist():
            rows = []
            for r, row in enumerate(of):
                queries = range(start + r * bq, start + min((r + 1) * bq, q.shape[2]))
                may = [
                    j
                    for j in range(len(row))
                    if any(
                        within is None or bool(within.allows(torch.tensor(i), torch.tensor(c)))
                        for i in queries
                        for c in range(j * bk, min((j + 1) * bk, k.shape[2]))
                    )
                ]
                rows.append(sorted(sorted(may, key=lambda j: (-row[j], j))[:n]))
            decided.append(rows)
        out.append(decided)
    return out


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 4),
    st.sampled_from(["each", "kv", "all"]),
    st.sampled_from([None, Causal(), Window(6, 1), Columns(((0, 3),)), Columns(())]),
    st.integers(1, 21),
    st.integers(0, 10),
    st.booleans(),
)
def test_block_topk(block, n, heads, within, q_len, seed, centre):
    q, k = qk(q_len=q_len, seed=seed)
    route = BlockTopK(block, select=topk(n), heads=heads, centre_k=centre)
    got = (route & within if within else route)(q, k)
    want = chosen_by_hand(q, k, block, n, heads, within, 21 - q_len)
    found = [[[[x for x in row if x >= 0] for row in d] for d in b] for b in got.index.tolist()]
    assert found == want
    assert got.q_start == 21 - q_len
    assert got.within == within
    assert got.equal(route(q, k, within=within))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6), st.booleans())
def test_a_summary_appended_to_is_the_summary_of_all(parts, size, half):
    q, k = qk(kv_len=sum(parts), q_len=1, dtype=torch.bfloat16 if half else torch.float32)
    route = BlockTopK((1, size), select=mass(0.6), within=Causal())
    summary = None
    for part in k.split(parts, 2):
        summary = route.summarize(part, past=summary)
    whole = route.summarize(k)
    assert summary.length == whole.length == sum(parts)
    for name in ("mean", "tail"):
        assert torch.equal(summary[name], whole[name]), name
    assert torch.equal(route.settle(summary)["recent"], summary["tail"])
    assert route.select(q, summary).equal(route(q, k))
    assert summary.nbytes > 0


def test_within_comes_before_selection():
    """The best blocks are in the future: a route inside causality takes others, and uses up its whole budget."""
    q = torch.ones(1, 1, 16, 2)
    k = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 2)
    route = BlockTopK(4, select=topk(2))
    assert route(q, k).index.tolist() == [[[[2, 3]] * 4]]
    assert (route & Causal())(q, k).index.tolist() == [[[[0, -1], [0, 1], [1, 2], [2, 3]]]]
    assert (Causal() & route).within == Causal()
    assert ((route & Causal()) & Window(8)).within == Causal() & Window(8)
    with pytest.raises(TypeError):
        route & 3


def test_candidates():
    for within in (Causal(), per_head([Causal(), Full()]), per_sample([Window(2), Causal(), Columns(())])):
        got = candidates(within, 5, 9, (2, 3), q_start=2, decisions=within.heads or 1)
        i, j = torch.arange(2, 7)[:, None], torch.arange(9)
        shape = (within.samples or 1, within.heads or 1, 5, 9)
        head, sample = torch.arange(shape[1])[:, None, None], torch.arange(shape[0])[:, None, None, None]
        want, _ = dense_blocks(within.allows(i, j, head, sample).expand(shape), (2, 3))
        assert torch.equal(got, want)
    either = candidates(per_head([Columns(((0, 1),)), Columns(((3, 4),))] * 2), 4, 4, 2, decisions=2)
    assert either.shape == (1, 2, 2, 2)
    assert either.all()
    with pytest.raises(ValueError, match="3 heads apart, which 2 decisions do not divide"):
        candidates(per_head([Full()] * 3), 4, 4, 2, decisions=2)


def test_a_route_with_an_order_decides_on_its_blocks():
    from regard.patterns import TileOrder

    order = TileOrder((4, 6), (2, 3), prefix=1)
    q, k = qk(q_len=25, kv_len=25)
    route = BlockTopK(6, select=topk(2), order=order, heads="all", centre_k=True)
    got = route(q, k)
    slots = [[t for t in block if t >= 0] for block in order.forward.view(-1, 6).tolist()]
    for b in range(2):
        scores = torch.zeros(len(slots), len(slots), dtype=torch.float64)
        for h in range(4):
            rows = torch.stack([q[b, h, s].mean(0) for s in slots])
            scores += rows @ torch.stack([k[b, h // 2, s].mean(0) for s in slots]).T
        want = scores.sort(descending=True, stable=True).indices[:, :2].sort().values
        assert got.index[b, 0].tolist() == want.tolist()
    grid = BlockTopK(6, select=topk(2), order=order, within=Neighborhood((5, 5), 3))
    assert grid(q, k).heads == 4
    assert not route.appends
    with pytest.raises(ValueError, match="past= cannot be appended to"):
        route.summarize(k, past=route.summarize(k))
    with pytest.raises(ValueError, match="order is of 25 tokens, got q_len=1"):
        route(q[:, :, :1], k)


def test_nan_is_refused():
    q, k = qk()
    k[1, 0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"scores must be numbers.*got NaN at"):
        BlockTopK(4, select=topk(2))(q, k)


def test_gradients_reach_the_scores_and_nothing_else():
    q, k = (x.requires_grad_() for x in qk())
    got = BlockTopK(4, select=topk(2))(q, k)
    assert got.score.requires_grad
    assert not got.index.is_floating_point()
    got.score.sum().backward()
    assert q.grad.abs().sum() > 0


def test_arguments_of_block_topk():
    with pytest.raises(ValueError, match="select must be one of"):
        BlockTopK.__init__.__wrapped__(object.__new__(BlockTopK), 4, select=3)
    assert BlockTopK(4, select=topk(2)) == BlockTopK((4, 4), select=topk(2))
    assert BlockTopK(4, select=topk(2)) != BlockTopK(4, select=ratio(0.5))
    assert hash(BlockTopK(4, select=topk(2)) & Causal())
    assert BlockTopK(4, select=topk(2)).with_select(above(0.5)).rule == above(0.5)
    assert BlockTopK((2, 4), select=topk(2)).cost(10, 21, 8) == (10 + 42 + 5 * 6) * 8


def test_refresh():
    route = BlockTopK((1, 4), select=topk(1), keep=Window(2), within=Causal())
    every = Refresh(route, 3)
    q, k = qk(q_len=12, kv_len=32)
    summary, decided = route.summarize(k[:, :, :20]), []
    for step in range(12):
        one = q[:, :, step : step + 1]
        got = every.select(one, summary)
        assert got.kv_len == 20 + step
        assert got.q_start == 19 + step
        decided.append(got.index)
        if step % 3 == 0:
            assert got.equal(route.select(one, summary))
        summary = route.summarize(k[:, :, 20 + step : 21 + step], past=summary)
    assert all(torch.equal(decided[n], decided[n - n % 3]) for n in range(12))
    assert not torch.equal(decided[0], decided[3])
    assert every.cost(1, 32, 8) == -(-route.cost(1, 32, 8) // 3)
    every.reset()
    summary = route.summarize(k)
    assert every.select(q, summary, q_start=0).equal(route.select(q, summary, q_start=0))
    longer = every.select(q[:, :, :5], summary)  # other rows: decided
    assert longer.equal(route.select(q[:, :, :5], summary))
    shorter = route.summarize(k[:, :, :9])
    assert every.select(q[:, :, :5], shorter).equal(route.select(q[:, :, :5], shorter))  # fewer keys: decided
    assert isinstance(every & Causal(), Refresh)
    assert every.fresh() is not every
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        Refresh(route, 0)


def test_patterns_as_plain_values():
    from regard.patterns import gallery
    from regard.patterns.text import from_plain, to_plain

    for examples in gallery.CATALOGUE.values():
        for example in examples:
            tensors = {}
            plain = json.loads(json.dumps(to_plain(example.pattern, tensors)))
            assert from_plain(plain, tensors) == example.pattern, example
    route = BlockTopK(4, select=topk(2), keep=Sinks(1), heads="kv")
    assert from_plain(json.loads(json.dumps(to_plain(route)))) == route
    with pytest.raises(ValueError, match=r"'Evil' is no class of regard.patterns"):
        from_plain({"Evil": {}})
    assert isinstance(from_plain({"Sinks": {"n": 2}}), Pattern)


@given(st.sampled_from(["each", "kv", "all"]), st.sampled_from([Causal(), Window(6), Window(3, 2)]), st.booleans())
def test_a_prompt_decides_as_its_tokens_would_one_by_one(heads, within, centre):
    q, k = qk(q_len=21, kv_len=21)
    route = BlockTopK((1, 4), select=topk(2), heads=heads, within=within, centre_k=centre)
    whole = route(q, k)
    ahead = getattr(within, "right", 0)
    for n in range(1, 22):
        seen = min(n + ahead, 21)  # what the query may see at all
        one = route(q[:, :, n - 1 : n], k[:, :, :seen], q_start=n - 1)
        a, b = whole.index[:, :, n - 1], one.index[:, :, 0]
        width = max(a.shape[2], b.shape[2])
        a, b = (torch.nn.functional.pad(x, (0, width - x.shape[2]), value=-1) for x in (a, b))
        assert torch.equal(a, b)


def test_a_summary_that_no_longer_knows_the_keys_says_so():
    q, k = qk()
    route = BlockTopK((1, 4), select=topk(2), within=Causal())
    summary = route.summarize(k[:, :, 17:], past=route.summarize(k[:, :, :17]))
    assert route.select(q[:, :, 16:], summary).equal(route(q[:, :, 16:], k))
    with pytest.raises(ValueError, match="the summary knows the keys before 16 as whole blocks alone"):
        route.select(q, summary)


def test_a_choice_under_autocast_is_the_choice_without():
    q, k = torch.randn(2, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    route = BlockTopK(8, select=topk(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = route(q, k)
    assert found.equal(route(q, k))


@given(routed(), st.sampled_from([Causal(), Window(3, 1), Columns(((1, 5),))]))
def test_algebra(case, other):
    """``&`` stays routed, everything else goes by its pairs; layouts of both."""
    r, at = case.routed, case.static(other)
    for made, want in (
        (r & other, case.pairs() & at),
        (other & r, case.pairs() & at),
        (r | other, case.pairs() | at),
        (~r, ~case.pairs()),
    ):
        want = want[: r.samples or 1, : r.heads or 1]
        some, every = dense_blocks(want, (3, 4))
        layout = made.layout(r.q_len, r.kv_len, (3, 4), r.q_start)
        assert layout.equal(BlockLayout.from_dense(some, every, r.q_len, r.kv_len, (3, 4)))
