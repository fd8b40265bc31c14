"""What this machine does per second: the dense attention kernel, and copying memory. Measured once a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["Rates", "rates"]

LENGTH, HEADS, COPY = 1024, 4, 1 << 26


class Rates(NamedTuple):
    """Rates of one device."""

    attention: float
    """Operations a second of dense `scaled_dot_product_attention`, ``2 (head_dim + v_dim)`` a pair."""
    copy: float
    """Bytes a second moved by a copy, read and written."""


def rates(device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int) -> Rates:
    """Rates at this dtype and these widths: medians of three runs after one."""
    return Rates(_attention(str(device), dtype, head_dim, v_dim, torch.get_num_threads()), _copy(str(device)))


@cache
def _attention(device: str, dtype: torch.dtype, head_dim: int, v_dim: int, threads: int) -> float:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        q, k = (torch.randn(1, HEADS, LENGTH, head_dim).to(device, dtype) for _ in range(2))
        v = torch.randn(1, HEADS, LENGTH, v_dim).to(device, dtype)
    operations = 2 * (head_dim + v_dim) * HEADS * LENGTH * LENGTH
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return operations / _seconds(lambda: F.scaled_dot_product_attention(q, k, v), q.device)


@cache
def _copy(device: str) -> float:
    x = torch.zeros(COPY, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * COPY / _seconds(lambda: y.copy_(x), x.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[1]
