"""Random attention problems: shapes, grouping, masks, patterns, offsets."""

import torch
from hypothesis import strategies as st

from regard.patterns import Causal, Diagonals, Full, Sinks, Window
from regard.patterns import Columns as KeyColumns

PATTERNS = [
    Full(),
    Causal(),
    Window(3),
    Window(5, 2),
    Window(20) & Causal(),
    Window(4) | Sinks(2),
    ~Window(2),
    Diagonals(7, 1),
    Diagonals(5, 0, causal=False) | Sinks(1),
    KeyColumns(((2, 5), (9, 40))),
]
SMALL_OR_LONG = st.one_of(st.integers(1, 24), st.integers(25, 300))


@st.composite
def problems(draw, normaliser=True, bias=True, dtype=torch.float32, lengths=SMALL_OR_LONG):
    """(q, k, keyword arguments, first query's index, generator)."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    q_len = draw(lengths)
    kv_len = draw(st.one_of(st.just(q_len), lengths))
    dim = draw(st.sampled_from([3, 8, 16]))
    heads = kv_heads * group
    # Non-contiguous on purpose: models hand over [batch, length, heads, dim] transposed.
    q = torch.randn(batch, q_len, heads, dim, generator=g).transpose(1, 2).to(dtype)
    k = torch.randn(batch, kv_len, kv_heads, dim, generator=g).transpose(1, 2).to(dtype)
    if draw(st.booleans()):
        k = k + 3 * torch.randn(1, 1, 1, dim, generator=g).to(dtype)
    kwargs = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        kwargs["q_start"] = draw(st.sampled_from([kv_len - q_len, 0, 3, -2]))
    mask_shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, q_len, kv_len)]
    kind = draw(st.sampled_from(["none", "bool", "padding"] + (["bias", "bias-inf"] if bias else [])))
    if kind == "bool":
        kwargs["mask"] = torch.rand(mask_shape, generator=g) < 0.6
    elif kind == "padding":
        start = torch.randint(0, kv_len + 1, (batch,), generator=g)
        kwargs["mask"] = (torch.arange(kv_len) >= start[:, None])[:, None, None]
    elif kind != "none":
        kwargs["mask"] = torch.randn(mask_shape, generator=g)
        if kind == "bias-inf":
            kwargs["mask"].masked_fill_(torch.rand(mask_shape, generator=g) < 0.4, -torch.inf)
    if draw(st.booleans()):
        kwargs["pattern"] = draw(st.sampled_from(PATTERNS))
    if draw(st.booleans()):
        kwargs["valid"] = torch.rand(draw(st.sampled_from([1, batch])), q_len, generator=g) < 0.8
    if draw(st.booleans()):
        kwargs["scale"] = draw(st.sampled_from([0.1, 1.0]))
    if normaliser and draw(st.integers(0, 3)) == 0:
        kwargs["softcap"] = 3.0
    if normaliser and draw(st.integers(0, 3)) == 0:
        kwargs["sink"] = torch.randn(heads, generator=g)
    start = kwargs.get("q_start")
    start = start if start is not None else 0 if kwargs["is_causal"] else kv_len - q_len
    return q, k, kwargs, start, g


def assert_close(got, want, tolerance=1e-5):
    """Largest error at most ``tolerance`` times the largest value (or 1); -inf must match exactly."""
    want = want.double()
    assert got.shape == want.shape
    finite = want != -torch.inf
    assert torch.equal(got != -torch.inf, finite)
    got, want = got.double()[finite], want[finite]
    assert not got.isnan().any()
    if got.numel():
        error, size = (got - want).abs().max().item(), max(1.0, want.abs().max().item())
        assert error <= tolerance * size, f"error {error:.2e} of {size:.2e}"
