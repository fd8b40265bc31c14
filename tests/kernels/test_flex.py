"""FlexAttention on our layouts: a few compiled cases, all of one shape where that can be, and every refusal."""

import pytest
import torch

from regard.kernels import flex
from regard.kernels.attend import attend, run
from regard.kernels.normalize import Elementwise
from regard.kernels.request import make_request
from regard.patterns import Causal, Columns, Full, Neighborhood, Segments, Sinks, Window, per_head, per_sample
from tests.oracles.attention import attended

NO_CPU_KERNEL = flex._refuses_on_cpu(make_request(*[torch.zeros(1, 1, 4, 8)] * 3))
compiled = pytest.mark.skipif(NO_CPU_KERNEL is not None, reason=str(NO_CPU_KERNEL))


def problem(q_len, kv_len, dtype=torch.float32, batch=2):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, q_len, 4, 16, generator=g).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, kv_len, 2, 16, generator=g).to(dtype).transpose(2, 3)
    return q, k, v


def judge(q, k, v, pattern, tolerance=1e-5, **kwargs):
    got = attend(q, k, v, pattern, backend="flex", **kwargs)
    want, _ = attended(q, k, v, pattern, **kwargs)
    assert got.dtype == q.dtype
    assert (got.double() - want).abs().max() <= tolerance


@compiled
def test_patterns_share_one_kernel():
    """Windows, documents, empty rows, a composition and a grid in tiles: compiled once together."""
    q, k, v = (x.contiguous() for x in problem(512, 512))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    documents = Segments(tuple(int(i > 90) + int(i > 250) for i in range(512)))
    for pattern in (Window(50), Window(20) | Sinks(3), documents, Window(9) & ~Columns(((0, 100),)), Columns(())):
        judge(q, k, v, pattern)
    pattern = Neighborhood((11, 18), (3, 5))  # padded to 2 x 2 tiles of 128 tokens
    q, k, v = problem(198, 198)
    judge(q, k, v, pattern, q_start=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    told = flex.describe(make_request(q, k, v, pattern, q_start=0))
    assert told["order"] == "tiles of 8x16"
    assert told["block"] == [(128, 128)]
    assert told["blocks"] <= q.shape[0] * q.shape[1] * 4 * 4  # at most all of the 4 x 4 tiles


@compiled
def test_heads_samples_offset_bias_and_half_precision():
    """All that changes what is compiled, at once."""
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 4, 1, 260, generator=g).masked_fill_(torch.rand(1, 4, 1, 260, generator=g) < 0.4, -torch.inf)
    heads = per_head([Window(30), Causal(), ~Window(5), Full()])
    pattern = per_sample([heads, Causal() & heads])
    q, k, v = problem(70, 260, torch.bfloat16)
    judge(q, k, v, pattern, q_start=100, bias=bias.bfloat16(), softcap=3.0, scale=0.4, tolerance=3e-2)


def test_a_grid_smaller_than_a_tile_stays_in_memory_order():
    told = flex.describe(make_request(*problem(12, 12), Neighborhood((3, 4), (1, 3)), q_start=0))
    assert told["order"] == "memory order"


def request(dtype=torch.float32, grad=False, **kwargs):
    q, k, v = (x.requires_grad_(grad) for x in problem(8, 8, dtype))
    return make_request(q, k, v, Causal(), **kwargs)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: request(torch.float64), "not torch.float64"),
        (lambda: request(normalize=Elementwise("relu")), "FlexAttention has the softmax alone"),
        (lambda: request(layout=Causal().layout(8, 8, 4)), r"layouts in blocks of 128, not \(4, 4\)"),
        (lambda: request(grad=True), "no backward pass on a CPU"),
        (lambda: request(return_lse=True), "no lse on a CPU$"),
        (lambda: request(sink=torch.zeros(4)), "no lse on a CPU, which a sink needs"),
    ],
)
def test_refusals_say_why(made, reason):
    made = made()
    with pytest.raises(ValueError, match=f'backend="flex" refuses this call: .*{reason}'):
        run(made, "flex")


def test_no_compiler_is_told(monkeypatch):
    monkeypatch.setattr(flex.shutil, "which", lambda name: None)
    assert "there is no compiler" in flex.refuses(request())
