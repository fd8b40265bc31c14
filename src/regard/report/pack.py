"""Numbers on their way into the page: weights as one byte each, everything gzipped into one blob.

A weight w becomes code 0 if w < floor, else 1 + round((levels - 1) log(w / floor) / log(1 / floor)): each is kept to
within `error` of its own value, whatever its size.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Quantiser:
    """Logarithmic codes 1 .. levels for weights in [floor, 1]; code 0 stands for less than the floor."""

    floor: float
    levels: int = 255

    @property
    def error(self) -> float:
        """Largest relative error of a kept weight: half a step of the logarithmic scale."""
        return (1 / self.floor) ** (0.5 / (self.levels - 1)) - 1

    def encode(self, weights: np.ndarray) -> np.ndarray:
        """Codes of an array of weights; NaN counts as 0."""
        w = np.nan_to_num(np.asarray(weights, dtype=np.float64), nan=0.0)
        kept = np.log(np.maximum(w, self.floor) / self.floor) / -math.log(self.floor)
        codes = 1 + np.rint((self.levels - 1) * np.minimum(kept, 1.0))
        return np.where(w < self.floor, 0, codes).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What the page shows for each code."""
        power = (codes.astype(np.float64) - 1) / (self.levels - 1)
        return np.where(codes == 0, 0.0, self.floor * (1 / self.floor) ** power)


def quantiser_for(longest: int, cells: int) -> Quantiser:
    """Floor below a tenth of a uniform weight over `longest` keys; fewer levels where there are many cells."""
    floor = 10.0 ** min(-4, math.floor(math.log10(0.1 / max(1, longest))))
    return Quantiser(floor, 255 if cells <= 3_500_000 else 63)


_TYPES = {np.dtype("u1"): "u8", np.dtype("<u2"): "u16", np.dtype("<u4"): "u32", np.dtype("<f4"): "f32"}


@dataclass
class Blob:
    """Arrays laid one behind the other, each aligned to four bytes."""

    parts: list[bytes] = field(default_factory=list)
    index: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0

    def add(self, name: str, values: np.ndarray) -> None:
        """Append an array of a type the page can read (uint8, uint16, uint32, float32)."""
        raw = np.ascontiguousarray(values)
        self.index[name] = {"dtype": _TYPES[raw.dtype], "offset": self.size, "length": raw.size}
        data = raw.tobytes()
        data += b"\0" * (-len(data) % 4)
        self.parts.append(data)
        self.size += len(data)

    def base64(self) -> str:
        """The blob, gzipped (no time stamp, so the same numbers give the same page), in base64."""
        return base64.b64encode(gzip.compress(b"".join(self.parts), 9, mtime=0)).decode("ascii")


def triangle(maps: np.ndarray) -> tuple[np.ndarray, bool]:
    """Maps [n, rows, cols] flattened row by row; only the lower triangle where the rest is zero."""
    rows, cols = maps.shape[1:]
    if rows == cols and not np.any(np.triu(np.nan_to_num(maps), 1)):
        return maps[:, *np.tril_indices(rows)].reshape(-1), True
    return maps.reshape(-1), False


def rounded(values: Any, digits: int = 4) -> Any:
    """Nested lists of numbers with `digits` significant digits; None for NaN and infinities."""
    if isinstance(values, np.ndarray):
        return rounded(values.tolist(), digits)
    if isinstance(values, list):
        return [rounded(v, digits) for v in values]
    return float(f"{values:.{digits}g}") if values is not None and math.isfinite(values) else None


def script_json(value: Any) -> str:
    """JSON that cannot end or open anything in HTML: `<`, `>`, `&` and all non-ASCII are escaped."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
