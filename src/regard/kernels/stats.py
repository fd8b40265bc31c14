"""Statistics of attention without the matrix of weights: one name for each, all exact.

| function | gives | time, memory |
|---|---|---|
| `tile_pass` with reducers | any statistics of the weights, many at once | about one attention call, O(tile * L) |
| `row_expectation` | ``sum_j P_ij f_j`` and the lse | one fused call a head_dim columns, O(L) |
| `row_entropy` | entropy of each row | one fused call, O(L) |
| `column_mass` | ``sum_i w_i P_ij`` | one tile pass, or one fused backward, O(L) |
| `pair_weights` | ``P_ij`` of listed pairs | O(pairs * head_dim) |
| `band_weights` | ``P[i, i - o]`` for a band of offsets | O(L * band * head_dim) |
| `pattern_mass` | the mass a pattern keeps | O(kept pairs * head_dim) |

The weights are ``P_ij = exp(s_ij - lse_i)``, ``s_ij = scale q_i . k_j + b_ij``; shapes as in
`torch.nn.functional.scaled_dot_product_attention`, keys never repeated for grouped queries.
"""

from regard.kernels.fused import column_mass, row_entropy, row_expectation
from regard.kernels.pairs import band_weights, pair_weights, pattern_mass
from regard.kernels.reducers import (
    Columns,
    Entropy,
    Features,
    Gram,
    Lse,
    Offsets,
    Pairs,
    PatternMass,
    Squares,
    Top,
)
from regard.kernels.tiles import tile_pass

__all__ = [
    "Columns",
    "Entropy",
    "Features",
    "Gram",
    "Lse",
    "Offsets",
    "Pairs",
    "PatternMass",
    "Squares",
    "Top",
    "band_weights",
    "column_mass",
    "pair_weights",
    "pattern_mass",
    "row_entropy",
    "row_expectation",
    "tile_pass",
]
