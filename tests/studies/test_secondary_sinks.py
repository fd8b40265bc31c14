"""Levels of secondary sinks are counted, with an interval over texts."""

import numpy as np
import xarray as xr

from regard.studies.secondary_sinks import _levels


def lifetimes(kind, first, life):
    dims = ("sample", "position")
    return xr.DataArray(life, dims=dims).assign_coords(first=(dims, first), kind=(dims, kind))


def test_levels_are_pairs_of_first_block_and_lifetime():
    kind = np.array([["", "secondary", "secondary"], ["", "noise", "secondary"], ["", "bos-like", "secondary"]], object)
    first = np.array([[-1, 2, 3], [-1, 4, 3], [-1, 0, 3]])
    life = np.array([[np.nan, 2.0, 2.0], [np.nan, 1.0, 2.0], [np.nan, 6.0, 2.0]])
    finding = _levels(lifetimes(kind, first, life), 6)
    assert (finding.state, finding.figure) == ("holds", 2)
    assert finding.interval == (1, 2)  # level (2, 2) is in one text of three
    assert finding.details["levels"] == [
        {"first": 2, "lifetime": 2, "tokens": 1},
        {"first": 3, "lifetime": 2, "tokens": 3},
    ]
    assert finding.details["tokens"] == {"secondary": 4, "bos-like": 1, "noise": 1}


def test_no_secondary_sink_has_no_level():
    kind = np.full((2, 3), "", object)
    finding = _levels(lifetimes(kind, np.full((2, 3), -1), np.zeros((2, 3))), 6)
    assert (finding.state, finding.figure, finding.interval) == ("does not hold", 0, None)
