"""What a benchmark ran on."""

import os
from pathlib import Path


def cpu() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), "")


def use_threads() -> int:
    """Gives torch REGARD_BENCH_THREADS cores, or 2, and says how many.

    Only where it does not have as many already: `torch.set_num_threads` also turns MKL_DYNAMIC off, which costs the
    small products inside of attention's own threads about 5 %, and no user who leaves the default pays that.
    """
    import torch

    threads = int(os.environ.get("REGARD_BENCH_THREADS", "2"))
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads
