"""Every pattern of the catalogue against its definition, pair by pair, and its rows against the pairs."""

from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import patterns as p
from tests.patterns import rules as c

# The annotations' checker looks at a random item of a sequence, which hypothesis notices where it draws one.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

# Where any and all are exact for runs of every size. Sections are as exact as what they hold.
ONE = st.deferred(
    lambda: st.integers(1, c.LONGEST).flatmap(
        lambda n: st.tuples(st.just(n), st.one_of(*c.unbound(n).values(), *c.bound(n).values()))
    )
)


def as_set(keys, kv_len):
    inside = torch.zeros(kv_len, dtype=torch.bool)
    for lo, hi in keys.tolist():
        inside[lo:hi] = True
    return inside


def check_rows(problem, step, exact=None):
    pattern, kv_len, start = problem.pattern, problem.kv_len, problem.q_start
    edges = c.run_edges(pattern, start, start + problem.q_len, step)
    q0, q1 = (torch.tensor(x) for x in zip(*edges, strict=True))
    rows, pairs = pattern.rows(q0, q1, kv_len), problem.pairs
    assert exact is None or rows.exact == exact
    for n, (a, b) in enumerate(edges):
        some, every = as_set(rows.any[n], kv_len), as_set(rows.all[n], kv_len)
        true_some, true_every = pairs[a - start : b - start].any(0), pairs[a - start : b - start].all(0)
        assert torch.equal(some, true_some) if rows.exact[0] else not (true_some & ~some).any()
        assert torch.equal(every, true_every) if rows.exact[1] else not (every & ~true_every).any()
        for keys in (rows.any[n], rows.all[n]):
            there = keys[:, 0] < keys[:, 1]
            assert not keys[~there].any(), "empties are (0, 0)"
            assert not (there[1:] & ~there[:-1]).any(), "empties come last"
            ends = keys[there].flatten()
            assert (ends[1:] > ends[:-1]).all(), "intervals are sorted, disjoint and merged where they abut"


@settings(max_examples=300)
@given(st.data(), ONE, st.integers(1, 9))
def test_rows_are_exact(data, drawn, step):
    n, case = drawn
    problem = c.Problem(case.pattern, case.rule, *data.draw(c.lengths(n, case.bound)))
    check_rows(problem, step, exact=(True, True))


@settings(max_examples=100)
@given(c.problems(only=c.sections), st.integers(1, 9))
def test_rows_of_sections(problem, step):
    check_rows(problem, step, exact=(True, True))


@settings(max_examples=300)
@given(c.problems(only=c.simple))
def test_allows_and_counts(problem):
    q = torch.arange(problem.q_start, problem.q_start + problem.q_len)[:, None]
    k = torch.arange(problem.kv_len)[None]
    allowed = problem.pattern.allows(q, k).expand(problem.q_len, problem.kv_len)
    assert torch.equal(allowed, problem.pairs)
    counts = problem.pattern.row_counts(problem.q_len, problem.kv_len, problem.q_start)
    assert torch.equal(counts, problem.pairs.sum(1))


@given(c.problems(only=c.simple), c.problems(only=c.simple))
def test_values(one, other):
    """Equal patterns have equal hashes and allow the same pairs."""
    assert hash(one.pattern) == hash(one.pattern)
    assert one.pattern == one.pattern
    if one.pattern == other.pattern:
        assert hash(one.pattern) == hash(other.pattern)
    assert isinstance(repr(one.pattern), str)


def test_segments_are_what_they_join():
    assert p.Segments((0, 0, 1, 2, 2)) == p.Segments.from_bounds((0, 2, 3, 5)) == p.Segments.from_lengths([2, 1, 2])
    assert p.Segments((5, 5, 3, 5)) == p.Segments(torch.tensor([0, 0, 9, 0]))
    assert hash(p.Segments((5, 5, 3, 5))) == hash(p.Segments([0, 0, 9, 0]))
    assert p.Segments.from_bounds((0, 2, 6, 8), wrap=True) == p.Segments((0, 0, 1, 1, 1, 1, 0, 0))
    assert p.Segments.from_bounds((0, 2, 6, 8), wrap=True).ids.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert p.Segments((0, 1, 1)) != p.Segments((0, 1, 1, 1))
    assert p.Segments((0, 0, 1)).pieces.tolist() == [[0, 2, 0], [2, 3, 1]]


def test_documents_of_a_long_sequence():
    """A hundred thousand documents cost their bounds, not pairs."""
    documents = p.Segments.from_lengths(torch.full((100_000,), 10))
    counts = documents.row_counts(1_000_000, 1_000_000)
    assert counts.unique().tolist() == [10]
    scattered = p.Segments(torch.arange(4096) % 64)
    assert scattered.row_counts(4096, 4096).unique().tolist() == [64]


@given(st.integers(1, 9), st.integers(1, 9))
def test_rings_in_ring_order(height, width):
    """In its own order the pattern is causal over steps, and the order is a permutation."""
    order = p.RingOrder(height, width)
    n = height * width
    x = torch.arange(n)[:, None].float()
    assert torch.equal(order.undo(order.apply(x)), x)
    i = order.forward
    want = p.Rings(height, width).allows(i[:, None], i[None])
    there = torch.arange(n)
    assert torch.equal(order.pattern.allows(there[:, None], there[None]), want)


def test_ring_positions():
    assert p.ring_positions(4, 4, 10).view(4, 4).tolist() == [
        [10, 10, 10, 10],
        [10, 11, 11, 10],
        [10, 11, 11, 10],
        [10, 10, 10, 10],
    ]
    assert p.ring_positions(3, 5).view(3, 5)[1].tolist() == [0, 1, 1, 1, 0]  # the last ring is a line
    assert [p.ring_count(*s) for s in ((24, 24), (3, 5), (1, 7))] == [12, 2, 1]


def test_a_prompt_with_an_image():
    """Text, image, text: the image sees the text before it and its own outer rings."""
    pattern = p.concentric_causal(2, 3, 3, 2)
    i = torch.arange(13)
    allowed = pattern.allows(i[:, None], i[None])
    assert torch.equal(allowed[:2, :], (i[None] <= i[:2, None]))
    assert allowed[2:11, :2].all()
    assert not allowed[2:11, 11:].any()
    assert torch.equal(allowed[2:11, 2:11], p.Rings(3, 3).allows(torch.arange(9)[:, None], torch.arange(9)[None]))
    assert allowed[11:].tolist() == (i[None] <= i[11:, None]).tolist()


def test_shapes_are_their_compositions():
    i = torch.arange(30)
    arrow = p.Window(3, 3) | p.Sinks(2) | p.Queries(((0, 2),))
    assert torch.equal(p.Arrow(3, 2).allows(i[:, None], i[None]), arrow.allows(i[:, None], i[None]))
    window = p.Strided(3, 12)
    assert torch.equal(window.allows(i[:, None], i[None]), p.Dilated(3, 4).allows(i[:, None], i[None]))


@pytest.mark.parametrize(
    ("pattern", "depth"),
    [
        (p.PowerOfTwo(1, 5, 1), 6),
        (p.StrideSlash(1, 6, 32, 1), 8),
        (p.BlockWindow(1, 9, 1), 16),
        (p.DilatedBlocks(1, 20, 2), None),
        (p.LongNet(1), None),
    ],
)
def test_layers_that_power_attention_needs(pattern, depth):
    """128 blocks, at most 10 a row: the layers after which the last block has seen every other (arXiv 2503.03588)."""
    assert pattern.row_counts(128, 128).max() <= 13
    i = torch.arange(128)
    step = pattern.allows(i[:, None], i[None])
    reach, layers = step, 1
    while not reach[-1].all():
        wider = (reach.float() @ step.float()) > 0
        if torch.equal(wider, reach):
            layers = None
            break
        reach, layers = wider, layers + 1
    assert layers == depth


@pytest.mark.parametrize(("window", "gap"), [(1, lambda L: 2 ** (L + 1) - 1), (5, lambda L: 2 ** (L + 2) - 3)])
def test_first_gap_of_powers_of_two(window, gap):
    i = torch.arange(300)
    step = p.PowerOfTwo(1, window, 0).allows(i[:, None], i[None]).float()
    reach = torch.eye(300)
    for layer in range(1, 6):
        reach = ((reach @ step) > 0).float()
        assert int((reach[-1].flip(0) == 0).int().argmax()) == gap(layer)


def test_radial_density():
    """16 frames of 64 tokens without the sink; and at most 4 s n (log2 n - log2 s) entries."""
    assert p.Radial(16, 64, sink=False).density(1024, 1024) == pytest.approx(0.538, abs=5e-4)
    for frames in (8, 32, 128):
        n = frames * 16
        assert p.Radial(frames, 16, sink=False).row_counts(n, n).sum() <= 4 * 16 * n * log2(frames)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: p.Queries(((3, 3),)), "0 <= lo < hi"),
        (lambda: p.Prefix(0), "c must be an integer >= 1, got 0"),
        (lambda: p.SelfAnd((-1,)), "keep must be an integer >= 0, got -1"),
        (lambda: p.LastTokenPeek(-1), "last must be an integer >= 0, got -1"),
        (lambda: p.Strided(0), "stride must be an integer >= 1, got 0"),
        (lambda: p.Strided(2, -1), "window must be an integer >= 0, got -1"),
        (lambda: p.Dilated(2, -1), "left must be an integer >= 0, got -1; Dilated counts keys beside"),
        (lambda: p.Blocks(0), "P must be an integer >= 1, got 0"),
        (lambda: p.BlockCausal(-4), "P must be an integer >= 1, got -4"),
        (lambda: p.StepCausal((0, 3, 3)), "ascend strictly"),
        (lambda: p.Segments.from_bounds((1, 3)), "start with 0 and ascend strictly"),
        (lambda: p.Segments.from_lengths([2, 0]), "lengths must be integers >= 1"),
        (lambda: p.Segments.from_lengths([2, 3]).row_counts(6, 6), "kv_len must be <= 5, the number of ids, got 6"),
        (lambda: p.Segments.from_lengths([2, 3]).row_counts(3, 2, 3), r"got 3 to 5"),
        (lambda: p.PowerOfTwo(0, 5), "block must be an integer >= 1, got 0"),
        (lambda: p.PowerOfTwo(256, 0), "window must be an integer >= 1, got 0 blocks, the query's own included"),
        (lambda: p.PowerOfTwo(256, 5, -1), "sinks must be an integer >= 0, got -1"),
        (lambda: p.StrideSlash(256, 6, 0), "stride must be an integer >= 1"),
        (lambda: p.LongNet(256, 6), "segment must be a power of two, got 6"),
        (lambda: p.Radial(4, 0), "tokens must be an integer >= 1, got 0"),
        (lambda: p.Radial(4, 8, rule="code"), 'rule must be "paper" or "release", got \'code\''),
        (lambda: p.Radial(4, 8, decay=0.2), 'decay and block belong to rule="release"'),
        (lambda: p.Radial(4, 8, rule="release", decay=2.0), r"decay must lie in \(0, 1\], got 2.0"),
        (lambda: p.Radial(4, 8).row_counts(30, 30), "kv_len must be 32 and the queries lie in"),
        (lambda: p.Rings(0, 4), "height must be an integer >= 1, got 0"),
        (lambda: p.Rings(3, 4).density(11, 11), "covers 12 tokens: kv_len must be 12"),
        (lambda: p.Plus(3, 4).density(13, 12), r"queries \[-1, 12\)"),
        (lambda: p.Arrow(-1), "window must be an integer >= 0, got -1; Arrow counts keys beside"),
        (lambda: p.HopWindow((3, 2), torch.zeros(2, 2, dtype=torch.long), 1), "strictly ascending"),
        (lambda: p.HopWindow((2, 3), torch.zeros(3, 3, dtype=torch.long), 1), r"hops must be integers \[2, 2\]"),
        (lambda: p.HopWindow((2, 3), torch.ones(2, 2, dtype=torch.long), 1), "0 on the diagonal"),
        (lambda: p.Sections([3, 4], [[p.Full()]]), r"table must have 2 rows of 2 patterns"),
        (lambda: p.Sections([3], [[p.Rings(2, 2)]]), r"table\[0\]\[0\] does not fit 3 queries and 3 keys"),
        (lambda: p.Sections([3], [[p.Full()]]).density(4, 4), "cover 3 tokens"),
        (lambda: p.BlockDiffusion(8, 0), "P must be an integer >= 1"),
        (lambda: p.BlockDiffusion(8, 4).density(17, 17), "cover 16 tokens"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@settings(max_examples=60)
@given(c.problems(only=c.simple, longest=24))
def test_allows_one_pair_at_a_time(problem):
    """As FlexAttention's mask_mod: scalar indices under vmap."""
    q = torch.arange(problem.q_start, problem.q_start + problem.q_len)
    zero = torch.zeros((), dtype=torch.long)
    one = torch.vmap(lambda i, j: problem.pattern.allows(i, j, zero, zero), (None, 0))
    got = torch.vmap(one, (0, None))(q, torch.arange(problem.kv_len))
    assert torch.equal(got, problem.pairs)
