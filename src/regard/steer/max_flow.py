"""Attention flow: the largest flow from an input token to one row of the last layer (arXiv 2005.00928).

The one attribution here that needs every layer's whole matrix, so it is for short inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["LONGEST", "attention_flow"]

#: Longest input that is taken.
LONGEST = 64
#: Capacities are whole multiples of its inverse: scipy's maximum flow is one of integers.
UNITS = 1_000_000


def attention_flow(
    model: nn.Module, inputs: Any, pos: int = -1, *, residual: float = 0.5, anatomy: Anatomy | None = None
) -> Float[Tensor, "batch length"]:
    """The maximum flow from each token's embedding to the row `pos` of the last layer, each token by itself.

    The graph has a node for every token after every layer, and an edge from token j before a layer to token i after it
    of capacity `residual * (i = j) + (1 - residual) * Pbar_ij`, Pbar the mean over heads. Capacities are rounded to a
    millionth. Costs one maximum flow a token, O(length^2 layers) edges each.

    Args:
        pos: the column of the row, negative from the end.
        residual: share that the residual stream carries past attention.

    Returns:
        In 0..1; unlike rollout's shares the flows of the tokens do not add up to 1.

    Raises:
        ValueError: residual outside [0, 1), or an input of more than 64 tokens.
        IndexError: the input has no such column.
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual}")
    parts = anatomy_for(model, inputs, anatomy)
    sites = [Site(name, "weights") for name in parts.attn if name is not None]
    found = trace(model, inputs, sites, anatomy=parts)
    means = torch.stack([found[site].double().mean(1) for site in sites], dim=1)
    length = means.shape[-1]
    if length > LONGEST:
        raise ValueError(f"inputs must be of at most {LONGEST} tokens, got {length}; rollout takes longer ones")
    if not -length <= pos < length:
        raise IndexError(f"pos={pos}: the sequence has {length} columns")
    edges = residual * torch.eye(length, dtype=means.dtype, device=means.device) + (1 - residual) * means
    flows = [_flows(sample.cpu().numpy(), pos % length) for sample in edges]
    return torch.tensor(np.stack(flows), dtype=torch.float32, device=means.device)


def _flows(edges: NDArray[np.float64], row: int) -> NDArray[np.float64]:
    """The maximum flow from every token to one row; ``edges[layer, i, j]`` goes from j up to i."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    layers, length, _ = edges.shape
    capacity = np.zeros(((layers + 1) * length,) * 2, dtype=np.int32)
    for layer in range(layers):
        below, above = slice(layer * length, (layer + 1) * length), slice((layer + 1) * length, (layer + 2) * length)
        capacity[below, above] = np.rint(edges[layer].T * UNITS)
    graph = csr_array(capacity)
    top = layers * length + row
    return np.array([maximum_flow(graph, token, top).flow_value for token in range(length)]) / UNITS
