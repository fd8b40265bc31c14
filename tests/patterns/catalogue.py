"""Every pattern class, with strategies that draw it for n tokens, and compositions with lengths and blocks.

`LEAVES[cls](n)` draws a pattern of that class for n tokens (None where the class has none for n); `cases()` draws what
`Pattern.layout` takes.
"""

from functools import partial

from hypothesis import strategies as st

import regard.patterns as rp
from tests.patterns import rules

LONGEST = 40


def ints(low=0, high=12):
    return st.integers(low, high)


@st.composite
def along(draw, n, causal=True):
    """A neighborhood on an axis of n tokens."""
    window = draw(ints(1, n))
    dilation = draw(ints(1, max(1, n // window)))
    return rp.Neighborhood1d(n, window, draw(ints(1, window)), dilation, draw(st.booleans()) if causal else False)


@st.composite
def shapes(draw, n):
    """Up to three axes with n tokens together."""
    first = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    second = draw(st.sampled_from([d for d in range(1, n // first + 1) if n // first % d == 0]))
    return draw(st.sampled_from([(n,), (first, n // first), (first, second, n // first // second)]))


@st.composite
def neighborhoods(draw, n):
    shape = draw(shapes(n))
    axes = [draw(along(size)) for size in shape]
    fields = [tuple(getattr(axis, name) for axis in axes) for name in ("window", "stride", "dilation", "causal")]
    return rp.Neighborhood(shape, *fields)


@st.composite
def grids(draw, n):
    shape = draw(shapes(n))
    axes = []
    for size in shape:
        options = [along(size), rules.unbound(size)[rp.Causal].map(lambda c: c.pattern), st.just(rp.Full())]
        options += [st.just(rp.Same()), st.builds(rp.Congruent, ints(1, size)), st.builds(rp.Blocks, ints(1, size))]
        options += [st.builds(rp.Window, ints(), ints())]
        axes.append(draw(st.one_of(options)))
    return rp.Grid(tuple(axes), shape)


@st.composite
def lines(draw, n):
    queries = sorted(draw(st.sets(ints(0, n), max_size=8)))
    keys = [draw(ints(0, n)) for _ in queries]
    return rp.Line(queries, keys, draw(ints(0, 3)))


@st.composite
def stretches(draw, n):
    start = draw(ints(-5, n))
    return rp.Within(draw(st.one_of(*rules.unbound(n).values())).pattern, start, draw(ints(max(start, 0), n + 5)))


def _ruled(cls, n):
    drawn = {**rules.unbound(n), **rules.bound(n)}.get(cls)
    return None if drawn is None else drawn.map(lambda case: case.pattern)


LEAVES = {cls: partial(_ruled, cls) for cls in {**rules.unbound(2), **rules.bound(2)}} | {
    rp.Sections: lambda n: rules.sections(n).map(lambda case: case.pattern),
    rp.Same: lambda n: st.just(rp.Same()),
    rp.Congruent: lambda n: st.builds(rp.Congruent, ints(1)),
    rp.Neighborhood1d: along,
    rp.Neighborhood: neighborhoods,
    rp.Grid: grids,
    rp.Line: lines,
    rp.Within: stretches,
}


def fits(pattern, q_len, kv_len, q_start):
    """Whether the pattern takes these lengths."""
    try:
        pattern.fits(q_len, kv_len, q_start)
    except ValueError:
        return False
    return True


def leaf(n):
    """Any single pattern for n tokens."""
    return st.one_of([drawn for cls in LEAVES if (drawn := LEAVES[cls](n)) is not None])


@st.composite
def cases(draw, per_head=False):
    """``(pattern, q_len, kv_len, q_start, block)``; with `per_head`, heads and samples may differ."""
    n = draw(ints(1, LONGEST))
    one = st.recursive(
        leaf(n),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            inner.map(lambda a: ~a),
        ),
        max_leaves=4,
    )
    options = [one]
    if per_head:
        several = st.lists(one, min_size=1, max_size=3)
        options += [several.map(rp.per_head), several.map(rp.per_sample)]
    pattern = draw(st.one_of(options))
    size = draw(st.tuples(ints(1, LONGEST), ints(1, LONGEST), ints(0, LONGEST)))
    block = draw(ints(1, 17) | st.tuples(ints(1, 17), ints(1, 17)))
    return pattern, *(size if fits(pattern, *size) else (n, n, 0)), block
