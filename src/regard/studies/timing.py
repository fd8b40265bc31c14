"""How studies measure time and memory: arms take turns, ratios are taken within a turn, memory is counted."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from regard.studies.evidence import Floats, bootstrap


def take_turns(arms: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, Floats]:
    """Seconds of each arm in each of `repeats` turns, in which every arm runs once; a first turn is not counted.

    The arms of a turn run one after the other, so that a slow moment of the machine meets all of them.
    """
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, arm in arms.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            arm()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(each) for name, each in seconds.items()}


def ratio(slow: Floats, fast: Floats, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median over the turns of slow / fast, and its 95% interval over them."""
    ratios = np.asarray(slow) / np.asarray(fast)
    return float(np.median(ratios)), bootstrap(ratios, lambda r: float(np.median(r)), seed=seed)


def peak_bytes(arm: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensors that a call holds at once, its result included, beyond what was there before.

    On a CPU the storages that its operations return are followed; buffers inside one operation are not seen.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = arm()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with _storages() as held:
        kept = arm()
    del kept
    return held.peak


def _storages() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Held(TorchDispatchMode):
        """Follows every new storage until it is freed."""

        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.known: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {self._key(x) for x in _tensors((args, kwargs))}
            out = func(*args, **(kwargs or {}))
            for x in _tensors(out):
                storage, key = x.untyped_storage(), self._key(x)
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return out

        @staticmethod
        def _key(x: Any) -> int:
            return int(x.untyped_storage()._cdata)

        def _free(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    def _tensors(tree: Any) -> list[Any]:
        return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]

    return Held()
