"""What each role is called and looks like wherever it is shown, and in which words a measure is named."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """A role's two-letter code (so that colour is never the only sign), its colours, and what it means."""

    code: str
    light: str
    dark: str
    meaning: str


LOOKS: dict[str, Look] = {
    "retrieval": Look("Re", "#c2410c", "#ff8f5a", "copies tokens of a needle from wherever they stand in the text"),
    "induction": Look("In", "#a8327a", "#f08bcb", "looks at the token that followed the last time this token occurred"),
    "previous-token": Look("Pr", "#1d5fb4", "#6db3f8", "looks at the token just before"),
    "sink": Look("Si", "#8a6100", "#ecc248", "rests on the first token, which says nothing about the query"),
    "multi-diagonal": Look("Md", "#5b43b5", "#b3a4fa", "looks back by multiples of a fixed lag"),
    "diagonal": Look("Di", "#0b7285", "#5ccde0", "looks at a narrow band around the query"),
    "skewed line": Look("Sk", "#6b2f8a", "#d3a0f0", "looks from each token of a list at its counterpart in another"),
    "vertical stripe": Look("St", "#7d4a2a", "#d8a681", "looks at the same few keys from every query"),
    "block": Look("Bl", "#5c6b00", "#bfcb4e", "looks within its own block or segment"),
    "local": Look("Lo", "#0a7a55", "#4fd1a0", "looks within a sixteenth of the length"),
    "streaming": Look("Sm", "#2c6e6a", "#86cfc9", "needs only the first tokens and a recent window"),
    "uniform": Look("Un", "#51647a", "#a9bacb", "spreads evenly over the keys it may see"),
    "global": Look("Gl", "#8e1f3f", "#ff8ba0", "looks far away, neither locally nor evenly"),
    "mixed": Look("Mx", "#6d6862", "#a39e97", "none of the roles holds"),
}


def slug(role: str) -> str:
    """The role's name as it may stand in a style sheet."""
    return role.replace(" ", "-")


MEASURES: dict[str, str] = {
    "sink": "Sink",
    "entropy": "Entropy",
    "entropy_norm": "Entropy share",
    "top1": "Top weight",
    "mean_distance": "Distance",
    "distance_norm": "Distance share",
    "previous_token": "Previous",
    "self_token": "Self",
    "duplicate": "Duplicate",
    "induction": "Induction",
    "induction_lift": "Induction lift",
    "stripe": "Stripe",
    "stripe_lift": "Stripe lift",
    "received_kurtosis": "Kurtosis",
    "retrieval": "Copy-paste",
    "participation": "Keys in use",
    "ring_strength": "Ring",
}

SCORES: dict[str, str] = {
    "retrieval": "copy-paste rate",
    "induction": "induction mass",
    "induction/lift": "times chance",
    "previous-token": "mean weight",
    "previous-token/argmax": "share of rows",
    "sink": "mass on first token",
    "multi-diagonal": "recall",
    "multi-diagonal/lift": "lift",
    "multi-diagonal/main": "main diagonal’s part",
    "multi-diagonal/density": "density",
    "diagonal": "recall, |i−j| ≤ L/64",
    "diagonal/lift": "lift",
    "diagonal/density": "density",
    "skewed line": "mass on the line",
    "skewed line/lift": "lift",
    "skewed line/density": "density",
    "vertical stripe": "mass on 5% of keys",
    "vertical stripe/lift": "times chance",
    "block": "recall",
    "block/lift": "lift",
    "block/density": "density",
    "local": "mass within L/16",
    "local/density": "density",
    "streaming": "mass, 4 sinks + L/16",
    "streaming/density": "density",
    "uniform": "entropy / log n",
    "uniform/top1": "top weight",
    "global": "distance share",
}

UNJUDGED: dict[str, str] = {
    "retrieval": "needs needles to copy, which this text does not mark (probes=, or --probe)",
    "induction": "needs token ids",
    "skewed line": "needs two lists of tokens (templates={'skewed line': Line(...)})",
    "block": "needs a pattern to judge by (templates={'block': ...})",
}
"""Why a role was judged for no head, in the words of who can change it."""
