"""Random calls of `attend`: shapes, grouping, dtypes, offsets, patterns, biases, sinks, normalisers."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

import regard.patterns as rp
from regard.kernels.normalize import PHI, Elementwise
from tests.patterns import catalogue

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ANY_LENGTH = [
    rp.Full(),
    rp.Causal(),
    rp.Causal(future=True),
    rp.Window(0),
    rp.Window(5, 2),
    rp.Window(40),
    rp.Window(130) & rp.Causal(),
    rp.Window(4) | rp.Sinks(2),
    ~rp.Window(2),
    rp.Causal() & ~rp.Window(20, 20),
    rp.Diagonals(7, 1),
    rp.Columns(((2, 5), (9, 40), (150, 151))),
    rp.Columns(()),
    rp.Queries(((3, 9), (64, 200))),
    rp.Blocks(16) | rp.Sinks(1),
    rp.BlockCausal(8, strict=True),
    rp.Prefix(10),
    rp.PowerOfTwo(16, 1),
]
LENGTHS = st.one_of(st.integers(1, 40), st.integers(41, 180), st.integers(181, 600))


@dataclass
class Drawn:
    """Arguments of one call; `oracle` are those of the normaliser in the oracle's words."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pattern: rp.Pattern | None
    kwargs: dict
    oracle: dict = field(default_factory=dict)

    @property
    def inputs(self):
        """Everything that may have a gradient, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        return named | {n: self.kwargs[n] for n in ("bias", "sink") if n in self.kwargs}


@st.composite
def calls(draw, dtypes=(torch.float32,), lengths=LENGTHS, normalisers=False, dims=(8, 16, 24, 64, 80, 128, 256)):
    """A `Drawn`."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads, group = draw(st.sampled_from([1, 1, 2, 3, 0])), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * group
    kv_len = draw(lengths)
    q_len = draw(st.one_of(st.just(kv_len), lengths))
    kwargs = {}
    if draw(st.integers(0, 3)) == 0 and kv_len <= catalogue.LONGEST:  # one bound to a shape, or a composition
        pattern = draw(catalogue.leaf(kv_len) | catalogue.cases(per_head=False).map(lambda case: case[0]))
        if not catalogue.fits(pattern, q_len, kv_len, kv_len - q_len):
            q_len, kwargs["q_start"] = kv_len, 0
        if not catalogue.fits(pattern, q_len, kv_len, kwargs.get("q_start", kv_len - q_len)):
            pattern = None
    else:
        pattern = draw(st.one_of(st.none(), st.sampled_from(ANY_LENGTH), _several(heads, batch)))
        if draw(st.booleans()):
            kwargs["q_start"] = draw(st.sampled_from([0, 3, kv_len - q_len, kv_len, 1000]))
    dim = draw(st.sampled_from(dims))
    v_dim = draw(st.sampled_from([dim, dim, 8, 40]))
    # Non-contiguous on purpose: models hand over [batch, length, heads, dim] transposed.
    shapes = ((q_len, heads, dim), (kv_len, kv_heads, dim), (kv_len, kv_heads, v_dim))
    q, k, v = (torch.randn(batch, *s, generator=g).to(dtype).transpose(1, 2) for s in shapes)
    if draw(st.integers(0, 2)) == 0:
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, q_len, kv_len)]
        bias = torch.randn(shape, generator=g)
        if draw(st.booleans()):
            bias.masked_fill_(torch.rand(shape, generator=g) < 0.3, -torch.inf)
        kwargs["bias"] = bias.to(dtype)
    if draw(st.integers(0, 2)) == 0:
        kwargs["scale"] = draw(st.sampled_from([0.1, 1.0]))
    if draw(st.integers(0, 3)) == 0:
        kwargs["softcap"] = 3.0
    oracle = {}
    if normalisers and draw(st.booleans()):
        oracle = {
            "phi": draw(st.sampled_from(sorted(PHI))),
            "shift": draw(st.sampled_from([0.0, 0.5, "log_n"])),
            "l1": draw(st.booleans()),
        }
        if oracle["phi"] == "identity":  # a signed sum may come near zero, where no error bound holds
            oracle["l1"] = False
        kwargs["normalize"] = Elementwise(**oracle)
    elif draw(st.integers(0, 3)) == 0:
        kwargs["sink"] = torch.randn(heads, generator=g).to(dtype)
    return Drawn(q, k, v, pattern, kwargs, oracle)


def _several(heads, batch):
    one = st.sampled_from(ANY_LENGTH)
    options = [st.lists(one, min_size=heads, max_size=heads).map(rp.per_head)]
    if batch:
        options += [st.lists(one, min_size=batch, max_size=batch).map(rp.per_sample)]
    return st.one_of(options)


def oracle_arguments(drawn):
    """Keyword arguments for `tests.oracles.attention.attended`."""
    return {n: x for n, x in drawn.kwargs.items() if n != "normalize"} | drawn.oracle
