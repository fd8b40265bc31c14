"""Every statistic of the atlas from explicit matrices of weights: plain, slow, float64, one sample at a time.

A `Dense` holds one layer. `add` takes one forward of one sample without its padding: weights [heads, rows, keys], which
pairs are allowed [rows, keys], and the rows' positions; keys are 0 .. n - 1. `end` closes the sample.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

BINS = 32


def softmax(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Rows without an allowed key are all 0."""
    scores = np.where(allowed, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = e.sum(-1, keepdims=True)
    return np.where(total > 0, e / np.where(total > 0, total, 1), 0)


def offset_label(offset: int) -> int:
    if offset == 0:
        return 0
    size = 1
    while size * 2 <= abs(offset):
        size *= 2
    return size if offset > 0 else -size


def related(kind: str, i: int, ids: list[int], allowed: np.ndarray) -> list[int]:
    """Allowed keys related to row i."""
    n = len(allowed)
    if kind == "self":
        keys = [i]
    elif kind == "previous":
        keys = [i - 1]
    elif ids is None:
        keys = []
    elif kind == "duplicate":
        keys = [j for j in range(min(i, n)) if ids[j] == ids[i]]
    else:
        keys = [j for j in range(1, min(i, n)) if ids[j - 1] == ids[i]]
    return [j for j in keys if 0 <= j < n and allowed[j]]


def template(name: str, i: int, n: int, causal: bool, lag: int | None = None) -> list[int]:
    if name.startswith("sinks4"):
        budget = max(2, n // int(name.rsplit("/", 1)[1]))
        sinks = min(4, budget // 2)
        window = budget - sinks
        reach = window - 1 if causal else (window - 1) // 2
        return [j for j in range(n) if abs(i - j) <= reach or j < sinks]
    if name == "window1/16":
        return [j for j in range(n) if abs(i - j) < max(1, n // 16)]
    if name == "diagonal":
        return [j for j in range(n) if abs(i - j) <= max(1, n // 64)]
    width = max(1, lag // 8)
    if name == "diagonals":
        return [j for j in range(n) if min((i - j) % lag, (j - i) % lag) <= width]
    return [j for j in range(n) if abs(i - j) <= width]


class Dense:
    def __init__(self, *, near: int = 256, widths: tuple[int, ...], templates: tuple[str, ...], lag: int | None = None):
        self.near, self.widths, self.templates, self.lag = near, widths, templates, lag
        self.out: dict = defaultdict(float)
        self.raw: dict = defaultdict(list)
        self.sample = None

    def add(self, p, allowed, at, ids=None, causal=True, groups=None, positional=True, length=None):
        """p [h, q, k] float64, allowed [q, k], at: row positions, ids: tokens of keys, groups: name -> bool [keys]."""
        out, (heads, _, n) = self.out, p.shape
        # A row's own position is among the keys of self-attention; cross-attention has another axis for rows.
        length = n if length is None else length
        if self.sample is None:
            self.sample = {"rows": [], "groups": groups or {}, "q_total": 0}
        self.sample["n"] = n
        groups = groups or {}
        counts = allowed.sum(1)
        live = counts > 0
        for key in ("entropy_norm", "entropy_norm_rows", "top1_weight", "sq"):
            out.setdefault(key, np.zeros(heads))
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
        out["rows"] += live.sum() * np.ones(heads)
        out["entropy"] += entropy.sum(1)
        for r, i in enumerate(at):
            if not live[r]:
                continue
            w, c = p[:, r], counts[r]
            self.sample["rows"].append((i, w, allowed[r]))
            if c >= 2:
                out["entropy_norm"] += entropy[:, r] / math.log(c)
                out["entropy_norm_rows"] += np.ones(heads)
            bins = out.setdefault("entropy_at", np.zeros((heads, BINS)))
            bins[:, i * BINS // length] += entropy[:, r]
            out.setdefault("rows_at", np.zeros((heads, BINS)))[:, i * BINS // length] += 1
            blocks = out.setdefault("blocks", np.zeros((heads, BINS, BINS)))
            for j in range(n):
                blocks[:, i * BINS // length, j * BINS // n] += w[:, j]
            out["top1_weight"] += w.max(-1)
            out["sq"] += (w**2).sum(-1)
            out["head_gram"] += w @ w.T
            self._groups(i, w, allowed[r], groups, causal, positional)
            if positional:
                self._positions(i, w, allowed[r], n, ids, causal)

    def _groups(self, i, w, allowed, groups, causal, positional):
        out, n = self.out, len(allowed)
        keys = {"first": np.arange(n) == 0, **groups}
        rows = {"all": True, **{g: bool(m[i]) if positional else False for g, m in groups.items()}}
        shape = (w.shape[0], len(rows), len(keys))
        mass, count = out.setdefault("group", np.zeros(shape)), out.setdefault("group_keys", np.zeros(shape))
        most = out.setdefault("group_max", np.zeros(shape[1:]))
        group_rows = out.setdefault("group_rows", np.zeros(shape[:2]))
        later = out.setdefault("later", np.zeros((shape[0], shape[2])))
        later_rows = out.setdefault("later_rows", np.zeros((shape[0], shape[2])))
        for a, inside in enumerate(rows.values()):
            group_rows[:, a] += inside
            for b, mask in enumerate(keys.values()):
                mass[:, a, b] += inside * w[:, mask].sum(-1)
                count[:, a, b] += inside * (mask & allowed).sum()
                most[a, b] += inside * w[:, mask].sum(-1).max()
        for b, mask in enumerate(keys.values()):
            if not mask.any():
                continue
            after = True if not positional else i > np.flatnonzero(mask).max() if causal else not mask[i]
            later[:, b] += after * w[:, mask].sum(-1)
            later_rows[:, b] += after

    def _positions(self, i, w, allowed, n, ids, causal):
        out, heads = self.out, w.shape[0]
        j = np.arange(n)
        far = np.abs(i - j)
        out["distance"] += w @ far
        out["distance_norm"] += (w @ far) / max(i if causal else max(i, n - 1 - i), 1)
        offsets = range(0 if causal else 1 - self.near, self.near)
        near = out.setdefault("near", np.zeros((heads, len(offsets))))
        near_rows = out.setdefault("near_rows", np.zeros(len(offsets)))
        for x, o in enumerate(offsets):
            if 0 <= i - o < n:
                near[:, x] += w[:, i - o]
                near_rows[x] += 1
        window = out.setdefault("window", np.zeros((heads, len(self.widths))))
        for x, width in enumerate(self.widths):
            window[:, x] += w[:, far < width].sum(-1)
        names = ("self", "previous", "duplicate", "induction")
        for key in ("relation_mass", "relation_rows", "relation_chance"):
            out.setdefault(key, np.zeros((heads, 4)))
        for x, name in enumerate(names):
            keys = related(name, i, ids, allowed)
            out["relation_mass"][:, x] += w[:, keys].sum(-1)
            out["relation_rows"][:, x] += bool(keys)
            out["relation_chance"][:, x] += len(keys) / allowed.sum()
        for key in ("template_mass", "template_density"):
            out.setdefault(key, np.zeros((heads, len(self.templates))))
        for x, name in enumerate(self.templates):
            keys = [k for k in template(name, i, n, causal, self.lag) if allowed[k]]
            out["template_mass"][:, x] += w[:, keys].sum(-1)
            out["template_density"][:, x] += len(keys) / allowed.sum()
        classes = out.setdefault("top1_offset", defaultdict(lambda: np.zeros(heads)))
        for h in range(heads):
            classes[offset_label(i - int(w[h].argmax()))][h] += 1

    def end(self):
        """Close the sample: what needs all of its rows."""
        out, n = self.out, self.sample["n"]
        rows, self.sample = self.sample["rows"], None
        heads = rows[0][1].shape[0] if rows else 0
        if not rows:
            return
        mass, seen, halves = np.zeros((heads, n)), np.zeros(n), np.zeros((2, heads, n))
        chance = np.zeros(n)
        for i, w, allowed in rows:
            k = len(allowed)
            mass[:, :k] += w
            seen[:k] += allowed
            halves[i % 2][:, :k] += w
            if i % 2:
                chance[:k] += allowed / allowed.sum()
        profile = np.where(seen > 0, mass / np.maximum(seen, 1), np.nan)
        self.raw["received_raw"].append(profile)
        got = out.setdefault("received", np.zeros((heads, BINS)))
        keys = out.setdefault("received_keys", np.zeros((heads, BINS)))
        for j in range(n):
            if seen[j]:
                got[:, j * BINS // n] += profile[:, j]
                keys[:, j * BINS // n] += 1
        x = profile[:, seen > 0]
        out.setdefault("received_kurtosis", np.zeros(heads))
        out.setdefault("received_samples", np.zeros(heads))
        out.setdefault("flatness", np.zeros(heads))
        if x.shape[1] >= 4:
            d = x - x.mean(-1, keepdims=True)
            m2 = (d**2).mean(-1)
            good = m2 > 1e-24
            flat = np.abs(x.mean(-1)) / np.sqrt(np.maximum(m2, 1e-24))
            out["flatness"] = np.maximum(out.get("flatness", 0), flat)
            out["received_kurtosis"] += np.where(good, (d**4).mean(-1) / np.where(good, m2, 1) ** 2 - 3, 0)
            out["received_samples"] += good
        for key in ("stripe", "stripe_rows", "stripe_density"):
            out.setdefault(key, np.zeros(heads))
        out["stripe_rows"] += sum(i % 2 for i, _, _ in rows)
        if n >= 2:
            for h in range(heads):
                order = np.argsort(-halves[0][h, 1:], kind="stable")[: min(math.ceil(0.05 * n), n - 1)] + 1
                out["stripe"][h] += halves[1][h, order].sum()
                out["stripe_density"][h] += chance[order].sum()
        by_row = {i: (w, allowed) for i, w, allowed in rows}
        size = max(max(by_row) + 1, n)
        entropy, clipped = np.full((heads, size), np.nan), np.full((heads, size), np.nan)
        banded = np.full((heads, n), np.nan)
        for i, (w, _) in by_row.items():
            entropy[:, i] = -(w * np.log(np.where(w > 0, w, 1))).sum(-1)
            j = np.arange(w.shape[1])
            clipped[:, i] = w @ np.clip(i - j, 0, 10)
        for s in range(n):
            band = [w[:, s] for i, (w, _) in by_row.items() if s + 10 <= i <= s + 100 and s < w.shape[1]]
            if band:
                banded[:, s] = np.mean(band, 0)
        self.raw["entropy_raw"].append(entropy)
        self.raw["clipped_raw"].append(clipped)
        self.raw["banded_raw"].append(banded)
