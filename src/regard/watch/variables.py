"""What an atlas may hold: every variable with its dimensions, how two runs of it merge, its unit and its meaning.

Merge rules: `sum` (add; float64), `max`, `concat` (append along `sample`). Ratios are never stored; measures take them.
"""

from __future__ import annotations

from dataclasses import dataclass

SUM, MAX, CONCAT = "sum", "max", "concat"
MERGES = (SUM, MAX, CONCAT)


@dataclass(frozen=True)
class Variable:
    """One variable of the atlas: its dimensions (in order), merge rule, unit and meaning."""

    dims: tuple[str, ...]
    merge: str
    units: str
    long_name: str

    @property
    def attrs(self) -> dict[str, str]:
        """The attributes every stored array of this variable carries."""
        return {"merge": self.merge, "units": self.units, "long_name": self.long_name}


LH = ("layer", "head")
TOKENWISE = (*LH, "sample", "position")
STREAM = ("layer", "sample", "position")

VARIABLES: dict[str, Variable] = {
    "rows": Variable(LH, SUM, "rows", "rows counted (query positions that are not padding and may see a key)"),
    "entropy": Variable(LH, SUM, "nat", "sum over rows of the entropy of the weights"),
    "entropy_norm": Variable(LH, SUM, "1", "sum of entropy / log(allowed keys), rows with at least 2 allowed keys"),
    "entropy_norm_rows": Variable(LH, SUM, "rows", "rows with at least 2 allowed keys"),
    "entropy_at": Variable((*LH, "bin"), SUM, "nat", "sum of entropy over the rows of each relative position"),
    "rows_at": Variable((*LH, "bin"), SUM, "rows", "rows of each relative position"),
    "distance": Variable(LH, SUM, "tokens", "sum over rows of the mean |i-j|"),
    "distance_norm": Variable(LH, SUM, "1", "sum over rows of mean |i-j| / the longest possible |i-j| of the row"),
    "near": Variable((*LH, "offset"), SUM, "mass", "sum over rows of P[i, i-offset]"),
    "near_rows": Variable(("layer", "offset"), SUM, "rows", "rows that have a key at the offset"),
    "window": Variable((*LH, "width"), SUM, "mass", "sum over rows of the mass on |i-j| < width"),
    "group": Variable((*LH, "q_group", "k_group"), SUM, "mass", "mass from rows of a group to keys of a group"),
    "group_rows": Variable((*LH, "q_group"), SUM, "rows", "rows of the group"),
    "group_keys": Variable((*LH, "q_group", "k_group"), SUM, "keys", "sum over rows of the allowed keys in the group"),
    "group_max": Variable(
        ("layer", "q_group", "k_group"), SUM, "mass", "sum over rows of the largest mass any head puts on the group"
    ),
    "later": Variable(
        (*LH, "k_group"), SUM, "mass", "mass on the group from rows after its last key (both ways: outside)"
    ),
    "later_rows": Variable((*LH, "k_group"), SUM, "rows", "rows after the group's last key (both ways: outside it)"),
    "received": Variable(
        (*LH, "key_bin"), SUM, "mass per row", "sum over keys of received mass / rows that may see it"
    ),
    "received_keys": Variable((*LH, "key_bin"), SUM, "keys", "keys of each relative position that some row may see"),
    "received_kurtosis": Variable(LH, SUM, "1", "sum over samples of the excess kurtosis of the received profile"),
    "received_samples": Variable(LH, SUM, "samples", "samples with a received profile of at least 4 keys"),
    "blocks": Variable((*LH, "q_block", "k_block"), SUM, "mass", "mass on a grid of relative positions"),
    "stripe": Variable(LH, SUM, "mass", "odd rows' mass on the 5% of keys that even rows favour, first key left out"),
    "stripe_rows": Variable(LH, SUM, "rows", "odd rows"),
    "stripe_density": Variable(LH, SUM, "rows", "odd rows' mass on the same keys if the weights were uniform"),
    "relation_mass": Variable((*LH, "relation"), SUM, "mass", "mass on the keys related to the row"),
    "relation_rows": Variable((*LH, "relation"), SUM, "rows", "rows with at least one related key"),
    "relation_chance": Variable((*LH, "relation"), SUM, "rows", "the same mass if the weights were uniform"),
    "template_mass": Variable((*LH, "template"), SUM, "mass", "mass that the template keeps"),
    "template_density": Variable((*LH, "template"), SUM, "rows", "the same mass if the weights were uniform"),
    "ring_mass": Variable((*LH, "ring"), SUM, "mass", "mass from patches to patches at a Chebyshev distance"),
    "ring_patches": Variable(("layer", "ring"), SUM, "patches", "sum over patch rows of the patches at that distance"),
    "ring_rows": Variable(LH, SUM, "rows", "patch rows counted"),
    "top1_weight": Variable(LH, SUM, "mass", "sum over rows of the largest weight"),
    "top1_offset": Variable((*LH, "offset_class"), SUM, "rows", "rows whose largest weight has an offset of the class"),
    "sq": Variable(LH, SUM, "1", "sum over rows and keys of the squared weight"),
    "head_gram": Variable((*LH, "head2"), SUM, "1", "sum over rows and keys of the product of two heads' weights"),
    # per sample
    "received_raw": Variable(
        (*LH, "sample", "key"), CONCAT, "mass per row", "received mass / rows that may see the key"
    ),
    "entropy_raw": Variable(TOKENWISE, CONCAT, "nat", "entropy of each row"),
    "clipped_raw": Variable(TOKENWISE, CONCAT, "tokens", "sum_s P[t,s] min(t-s, 10) of each row t"),
    "banded_raw": Variable(
        (*LH, "sample", "key"), CONCAT, "mass per row", "mean of P[t,s] over rows s+10 <= t <= s+100"
    ),
    "group_max_raw": Variable(
        ("layer", "sample", "k_group"), CONCAT, "mass", "mean over rows of the largest mass any head puts on the group"
    ),
    "group_raw": Variable(
        (*LH, "sample", "q_group", "k_group"),
        CONCAT,
        "mass",
        "mean over rows of a group of the mass on keys of a group",
    ),
    "copy_hits": Variable(
        (*LH, "sample"), CONCAT, "hits", "answer rows whose top key is the needle token being written"
    ),
    "copy_distinct": Variable((*LH, "sample"), CONCAT, "tokens", "needle tokens copied at least once"),
    "copy_steps": Variable(("sample",), CONCAT, "rows", "answer rows judged"),
    "needle_tokens": Variable(("sample",), CONCAT, "tokens", "tokens of the needle"),
    # residual stream
    "resid_norm": Variable(STREAM, CONCAT, "1", "Euclidean norm of the block's output"),
    "resid_absmax": Variable(STREAM, CONCAT, "1", "largest absolute feature of the block's output"),
    "resid_absmax_dim": Variable(STREAM, CONCAT, "index", "which feature that is (-1: none)"),
    "resid_absmedian": Variable(STREAM, CONCAT, "1", "median absolute feature of the block's output"),
    "resid_absmean": Variable(STREAM, CONCAT, "1", "mean absolute feature of the block's output"),
    "bos_cos": Variable(STREAM, CONCAT, "1", "cosine of the block's output to that of the sample's first token"),
    "bos_embed_norm": Variable(("sample",), CONCAT, "1", "norm of the first token's state before the first block"),
    # the samples
    "n_tokens": Variable(("sample",), CONCAT, "tokens", "length of the sample without padding"),
    "token_ids": Variable(("sample", "position"), CONCAT, "id", "token ids (-1: past the end)"),
    "tokens": Variable(("sample", "position"), CONCAT, "text", "token text (empty past the end)"),
}

# Which variables each statistic of `watch(statistics=...)` brings. `rows` always comes.
STATISTICS: dict[str, tuple[str, ...]] = {
    "entropy": ("entropy", "entropy_norm", "entropy_norm_rows", "entropy_at", "rows_at"),
    "distance": ("distance", "distance_norm"),
    "near": ("near", "near_rows"),
    "window": ("window",),
    "group": ("group", "group_rows", "group_keys", "later", "later_rows"),
    "received": ("received", "received_keys"),
    "kurtosis": ("received_kurtosis", "received_samples"),
    "blocks": ("blocks", "rows_at"),
    "stripe": ("stripe", "stripe_rows", "stripe_density"),
    "relation": ("relation_mass", "relation_rows", "relation_chance"),
    "template": ("template_mass", "template_density"),
    "group_max": ("group_max",),
    "top1": ("top1_weight", "top1_offset"),
    "sq": ("sq",),
    "head_gram": ("head_gram",),
    "ring": ("ring_mass", "ring_patches", "ring_rows"),
}
LIGHT = ("entropy", "distance", "group", "received")
DEFAULT = (*LIGHT, "near", "window", "kurtosis", "blocks", "stripe", "relation", "template", "top1")
FULL = (*DEFAULT, "group_max", "sq", "head_gram")
PRESETS: dict[str, tuple[str, ...]] = {"light": LIGHT, "default": DEFAULT, "full": FULL}

# Which variables each name of `watch(per_sample=...)` brings.
PER_SAMPLE: dict[str, tuple[str, ...]] = {
    "received_raw": ("received_raw",),
    "entropy_raw": ("entropy_raw",),
    "rhythm": ("clipped_raw", "banded_raw"),
    "group_max_raw": ("group_max_raw",),
    "group_raw": ("group_raw",),
    "copy_hits": ("copy_hits", "copy_distinct", "copy_steps", "needle_tokens"),
}
STREAM_VARIABLES = (*(name for name, v in VARIABLES.items() if v.dims == STREAM), "bos_embed_norm")


def how_to_ask(name: str) -> str:
    """The argument of `regard.watch` that makes the atlas hold a variable."""
    if name == "ring_mass":
        return "grid=(height, width)"
    for statistic, names in STATISTICS.items():
        if name in names:
            preset = next((p for p, members in PRESETS.items() if statistic in members), None)
            return f"statistics={preset!r} (or a Watch with {statistic!r})" if preset else "grid=(height, width)"
    for option, names in PER_SAMPLE.items():
        if name in names:
            return f"per_sample=({option!r},)"
    if name in STREAM_VARIABLES:
        return "stream=True"
    return "tokens=True"
