"""What goes into the page: codes within their stated error, maps that unpack, JSON that cannot leave its element."""

import base64
import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.report.pack import Blob, Quantiser, quantiser_for, rounded, script_json, triangle


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50),
    st.sampled_from([1e-4, 1e-5, 1e-7]),
    st.sampled_from([63, 255]),
)
def test_a_kept_weight_is_within_the_stated_error(weights, floor, levels):
    quantiser = Quantiser(floor, levels)
    w = np.array(weights, dtype=np.float64)
    back = quantiser.decode(quantiser.encode(w))
    kept = w >= floor
    assert (np.abs(back[kept] / w[kept] - 1) <= quantiser.error * 1.0001).all()
    assert (back[~kept] == 0).all()
    assert quantiser.encode(np.array([np.nan, 1.0])).tolist() == [0, levels]


@pytest.mark.parametrize("longest", [1, 50, 4096, 100_000])
def test_the_floor_lies_below_a_uniform_weight(longest):
    quantiser = quantiser_for(longest, 0)
    assert quantiser.floor <= 0.1 / longest * 1.0001
    assert quantiser.error < 0.035


def test_fewer_levels_where_there_is_much():
    assert quantiser_for(200, 6_000_000).levels < quantiser_for(200, 1000).levels


def test_only_the_lower_triangle_of_causal_maps():
    maps = np.tril(np.arange(1, 19).reshape(2, 3, 3)).astype(np.uint8)
    flat, tri = triangle(maps)
    assert tri
    assert flat.tolist() == [1, 4, 5, 7, 8, 9, 10, 13, 14, 16, 17, 18]
    maps[1, 0, 2] = 1
    flat, tri = triangle(maps)
    assert not tri
    assert flat.tolist() == maps.ravel().tolist()


def test_the_blob_unpacks_aligned_and_is_the_same_each_time():
    blob = Blob()
    arrays = {"a": np.arange(5, dtype=np.uint8), "b": np.array([1.5, -2], "<f4"), "c": np.array([7, 65535], "<u2")}
    for name, values in arrays.items():
        blob.add(name, values)
    raw = gzip.decompress(base64.b64decode(blob.base64()))
    for name, values in arrays.items():
        spec = blob.index[name]
        assert spec["offset"] % 4 == 0
        np.testing.assert_array_equal(np.frombuffer(raw, values.dtype, spec["length"], spec["offset"]), values)
    assert blob.base64() == blob.base64()


@given(st.text())
def test_json_cannot_end_its_element(text):
    written = script_json({"t": text + "</script><!--\u2028&"})
    assert not set("<>&\u2028\u2029") & set(written)
    assert written.isascii()
    assert json.loads(written)["t"] == text + "</script><!--\u2028&"


def test_rounded_gives_none_for_what_is_no_number():
    assert rounded([[0.123456, math.nan], [math.inf, 1234567.0]]) == [[0.1235, None], [None, 1235000.0]]
