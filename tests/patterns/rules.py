"""Static patterns beside their plain definitions, for property tests.

`problems()` draws a `Problem`: a pattern (maybe a composition), its rule over two integers, and lengths that fit it.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from hypothesis import strategies as st

from regard import patterns as p

LONGEST = 40


@dataclass(frozen=True)
class Case:
    """A pattern and its definition; `bound` says which lengths must be n: 0 none, 1 the keys', 2 all."""

    pattern: p.Pattern
    rule: Any
    bound: int = 0


@dataclass(frozen=True)
class Problem:
    """A pattern, its definition, and lengths to try it on."""

    pattern: p.Pattern
    rule: Any
    q_len: int
    kv_len: int
    q_start: int

    @property
    def pairs(self):
        """The pairs allowed, one by one from the definition, `[q_len, kv_len]`."""
        queries = range(self.q_start, self.q_start + self.q_len)
        allowed = [[bool(self.rule(i, j)) for j in range(self.kv_len)] for i in queries]
        return torch.tensor(allowed, dtype=torch.bool).view(self.q_len, self.kv_len)


def ints(low=0, high=12):
    return st.integers(low, high)


def sets_of(intervals):
    return {x for lo, hi in intervals for x in range(lo, hi)}


@st.composite
def intervals(draw):
    return tuple((lo, lo + size) for lo, size in draw(st.lists(st.tuples(ints(0, 30), ints(1, 6)), max_size=3)))


def places():
    return st.lists(ints(0, 30), max_size=3).map(tuple)


def unbound(n):
    """Patterns that take any length, a strategy of cases for each class."""

    def diagonals(period, width, causal):
        def rule(q, k):
            return any(abs(q - k - m * period) <= width for m in range(-60, 61)) and (k <= q or not causal)

        return Case(p.Diagonals(period, width, causal), rule)

    def strided(stride, window, causal):
        def rule(q, k):
            near = abs(q - k) % stride == 0 and (window is None or abs(q - k) <= window)
            return near and (k <= q or not causal)

        return Case(p.Strided(stride, window, causal), rule)

    def steps(bounds, strict):
        ends = [0, *bounds]

        def step(x):
            return sum(x >= end for end in ends)

        return Case(p.StepCausal(tuple(ends), strict), lambda q, k: step(k) < step(q) + (not strict))

    return {
        p.Full: st.just(Case(p.Full(), lambda q, k: True)),
        p.Causal: st.booleans().map(lambda f: Case(p.Causal(f), lambda q, k: k >= q if f else k <= q)),
        p.Window: st.builds(lambda a, b: Case(p.Window(a, b), lambda q, k: q - a <= k <= q + b), ints(), ints()),
        p.Sinks: st.builds(lambda m: Case(p.Sinks(m), lambda q, k: k < m), ints(1)),
        p.Columns: st.builds(lambda x: Case(p.Columns(x), lambda q, k: k in sets_of(x)), intervals()),
        p.Queries: st.builds(lambda x: Case(p.Queries(x), lambda q, k: q in sets_of(x)), intervals()),
        p.Prefix: st.builds(lambda c: Case(p.Prefix(c), lambda q, k: k < c or k <= q), ints(1)),
        p.SelfAnd: st.builds(lambda m: Case(p.SelfAnd(m), lambda q, k: k == q or (k in m and k <= q)), places()),
        p.LastTokenPeek: st.builds(
            lambda n, m: Case(p.LastTokenPeek(n, m), lambda q, k: k == q or (k <= q and (q == n or k in m))),
            ints(),
            places(),
        ),
        p.Diagonals: st.builds(diagonals, ints(1), ints(0, 5), st.booleans()),
        p.Strided: st.builds(strided, ints(1, 9), st.none() | ints(0, 20), st.booleans()),
        p.Dilated: st.builds(
            lambda d, a, b: Case(p.Dilated(d, a, b), lambda q, k: any(k == q - m * d for m in range(-b, a + 1))),
            ints(1, 7),
            ints(0, 6),
            ints(0, 6),
        ),
        p.Blocks: st.builds(lambda P: Case(p.Blocks(P), lambda q, k: q // P == k // P), ints(1)),
        p.BlockCausal: st.builds(
            lambda P, s: Case(p.BlockCausal(P, s), lambda q, k: k // P < q // P or (k // P == q // P and not s)),
            ints(1),
            st.booleans(),
        ),
        p.StepCausal: st.builds(
            steps, st.lists(ints(1, 45), min_size=1, max_size=6, unique=True).map(sorted), st.booleans()
        ),
        p.Arrow: st.builds(
            lambda w, t: Case(p.Arrow(w, t), lambda q, k: abs(q - k) <= w or k < t or q < t), ints(0, 9), ints(1, 4)
        ),
        **over_blocks(),
        p.HopWindow: hop_windows(),
    }


def over_blocks():
    """Patterns over blocks of tokens: whole earlier blocks, and the own one causally."""

    def case(pattern, meets):
        P = pattern.block
        return Case(pattern, lambda q, k: k <= q and meets(q // P, k // P))

    def longnet(P, segment, levels):
        def meets(i, j):
            return any(
                i // (segment << t) == j // (segment << t) and i % (1 << t) == 0 and j % (1 << t) == 0
                for t in range(levels)
            )

        return case(p.LongNet(P, segment, levels), meets)

    powers = {1 << t for t in range(8)}
    block, window, sinks = ints(1, 5), ints(1, 5), ints(0, 2)
    return {
        p.PowerOfTwo: st.builds(
            lambda P, w, s: case(p.PowerOfTwo(P, w, s), lambda i, j: i - j < w or i - j in powers or j < s),
            block,
            window,
            sinks,
        ),
        p.BlockWindow: st.builds(
            lambda P, w, s: case(p.BlockWindow(P, w, s), lambda i, j: i - j < w or j < s), block, window, sinks
        ),
        p.StrideSlash: st.builds(
            lambda P, w, t, s: case(p.StrideSlash(P, w, t, s), lambda i, j: i - j < w or (i - j) % t == 0 or j < s),
            block,
            window,
            ints(1, 7),
            sinks,
        ),
        p.DilatedBlocks: st.builds(
            lambda P, w, d: case(p.DilatedBlocks(P, w, d), lambda i, j: i - j < w and (i - j) % d == 0),
            block,
            ints(1, 12),
            ints(1, 4),
        ),
        p.LongNet: st.builds(longnet, block, st.sampled_from([1, 2, 4, 8]), ints(1, 4)),
    }


@st.composite
def hop_windows(draw):
    where = sorted(draw(st.sets(ints(0, 45), max_size=8)))
    g = len(where)
    hops = [[0] * g for _ in range(g)]
    for i in range(g):
        for j in range(i):
            hops[i][j] = hops[j][i] = draw(ints(-1, 4))
    K, both = draw(ints(0, 4)), draw(st.booleans())

    def rule(q, k):
        if q in where and k in where:
            return 0 <= hops[where.index(q)][where.index(k)] <= K and (both or k <= q)
        return k <= q

    table = torch.tensor(hops, dtype=torch.long).view(g, g)
    return Case(p.HopWindow(torch.tensor(where, dtype=torch.long), table, K, both), rule)


def ring(x, height, width):
    h, w = divmod(x, width)
    return min(h, w, height - 1 - h, width - 1 - w)


def radial(frames, tokens, sink):
    def rule(q, k):
        (i, u), (j, v) = divmod(q, tokens), divmod(k, tokens)
        distance = abs(i - j)
        power = max(2**e for e in range(12) if 2**e <= max(distance, 1))
        near = power <= tokens and (abs(u - v) + 1) * power <= tokens
        return near or (distance % -(-power // tokens) == 0 and u == v) or (sink and j == 0)

    return Case(p.Radial(frames, tokens, sink), rule, 1)


def released(frames, tokens, sink, decay, block):
    def rule(q, k):
        (i, u), (j, v) = divmod(q, tokens), divmod(k, tokens)
        distance = abs(i - j)
        z = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
        kept = z >= block or distance % int(block / z) == 0
        width = tokens if distance <= 1 else max(z * decay, block)
        return (sink and j == 0) or (kept and abs(u - v) <= width)

    return Case(p.Radial(frames, tokens, sink, "release", decay, block), rule, 1)


def bound(n):
    """Patterns that belong to n tokens, a strategy of cases for each class."""

    def segments(ids):
        return Case(p.Segments(tuple(ids)), lambda q, k: ids[q] == ids[k])

    def documents(lengths, wrap):
        ends = [x for x in accumulate(lengths) if x < n] + [n]

        def document(x):
            found = sum(x >= end for end in ends)
            return 0 if wrap and found == len(ends) - 1 else found

        return Case(p.Segments.from_bounds((0, *ends), wrap), lambda q, k: document(q) == document(k))

    def plus(height, width):
        return Case(p.Plus(height, width), lambda q, k: q // width == k // width or q % width == k % width, 1)

    def rings(height, width):
        return Case(p.Rings(height, width), lambda q, k: ring(k, height, width) <= ring(q, height, width), 1)

    shapes = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    grid = st.sampled_from(shapes)
    cases = {
        p.Segments: st.builds(segments, st.lists(ints(0, 4), min_size=n, max_size=n))
        | st.builds(documents, st.lists(ints(1, 9), min_size=1, max_size=8), st.booleans()),
        p.Plus: st.builds(lambda s: plus(*s), grid),
        p.Rings: st.builds(lambda s: rings(*s), grid),
        p.Radial: st.builds(lambda s, sink: radial(*s, sink), grid, st.booleans())
        | st.builds(
            lambda s, sink, decay, block: released(*s, sink, decay, block),
            grid,
            st.booleans(),
            st.sampled_from([0.2, 0.5, 0.95]),
            st.sampled_from([1, 2, 4]),
        ),
    }
    if n % 2 == 0:
        cases[p.BlockDiffusion] = st.builds(diffusion, st.just(n // 2), ints(1, 9))
    return cases


def diffusion(n, P):
    def rule(q, k):
        if q < n:
            return q // P == k // P if k < n else (k - n) // P < q // P
        return k >= n and (k - n) // P <= (q - n) // P

    return Case(p.BlockDiffusion(n, P), rule)


@st.composite
def sections(draw, n):
    """A block matrix of patterns, each in coordinates of its own."""
    ends = sorted(draw(st.sets(st.integers(1, n), max_size=2)) | {n})
    starts = [0, *ends[:-1]]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    table, rules = [], []
    for i in lengths:
        row = []
        for j in lengths:
            options = [*unbound(n).values(), *(bound(i).values() if i == j else [])]
            row.append(draw(st.none() | st.one_of(options)))
        table.append([cell and cell.pattern for cell in row])
        rules.append([cell and cell.rule for cell in row])

    def rule(q, k):
        i, j = (next(s for s, end in enumerate(ends) if x < end) for x in (q, k))
        return rules[i][j] is not None and rules[i][j](q - starts[i], k - starts[j])

    return Case(p.Sections(lengths, table), rule)


def simple(n):
    """One pattern, no composition, that takes n tokens."""
    return st.one_of(*unbound(n).values(), *bound(n).values(), sections(n))


def composed(n):
    """Patterns put together by ``&``, ``|`` and ``~``."""
    return st.recursive(
        simple(n),
        lambda inner: st.one_of(
            st.builds(
                lambda a, b: Case(
                    a.pattern & b.pattern, lambda q, k: a.rule(q, k) and b.rule(q, k), max(a.bound, b.bound)
                ),
                inner,
                inner,
            ),
            st.builds(
                lambda a, b: Case(
                    a.pattern | b.pattern, lambda q, k: a.rule(q, k) or b.rule(q, k), max(a.bound, b.bound)
                ),
                inner,
                inner,
            ),
            st.builds(lambda a: Case(~a.pattern, lambda q, k: not a.rule(q, k), a.bound), inner),
        ),
        max_leaves=4,
    )


@st.composite
def lengths(draw, n, bound):
    """``(q_len, kv_len, q_start)`` that fit n tokens."""
    if bound == 2:
        return n, n, 0
    kv_len = n if bound else draw(st.integers(1, n))
    q_len = draw(st.integers(1, n))
    return q_len, kv_len, draw(st.integers(0, n - q_len))


@st.composite
def problems(draw, only=None, longest=LONGEST):
    """A pattern with its definition and lengths that fit it; `only`: a strategy of cases for n tokens."""
    n = draw(st.integers(1, longest))
    case = draw((only or composed)(n))
    return Problem(case.pattern, case.rule, *draw(lengths(n, case.bound)))


def run_edges(pattern, start, end, step):
    """Ends of runs of at most `step` queries, cut where the pattern must be."""
    return list(pairwise(sorted({*range(start, end, step), end, *pattern.cuts(start, end).tolist()})))
