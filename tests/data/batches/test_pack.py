"""pack against TRL's packer, and what any packing must keep."""

import itertools
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import _pack_bfd

from prefkern.data import pack


def bins(packs):
    return [part.tolist() for part in np.split(packs.order, packs.offsets[1:-1])] if len(packs.offsets) > 1 else []


def trl_bins(lengths, capacity):
    """The items of each of TRL's bins, read back from sequences whose tokens are the item's number."""
    table = pa.table({"ids": pa.array([[item] * length for item, length in enumerate(lengths)], pa.list_(pa.int64()))})
    packed = _pack_bfd(table, capacity)
    result = []
    for tokens, parts in zip(packed["ids"].to_pylist(), packed["seq_lengths"].to_pylist(), strict=True):
        starts = np.cumsum([0, *parts[:-1]])
        result.append([tokens[start] for start in starts])
    return result


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60).filter(any), st.integers(20, 45))
def test_bins_are_trl_s(lengths, capacity):
    assert bins(pack(lengths, capacity)) == trl_bins(lengths, capacity)


def test_many_bins_are_trl_s():
    lengths = np.random.default_rng(0).geometric(1 / 30, 5000).clip(max=256)
    assert bins(pack(lengths, 256)) == trl_bins(lengths.tolist(), 256)


def test_trl_truncates_what_we_refuse():
    lengths = [3, 12, 7]
    assert bins(pack(np.minimum(lengths, 8), 8)) == trl_bins(lengths, 8)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=80), st.integers(50, 200))
def test_every_item_once_within_capacity(lengths, capacity):
    packs = pack(lengths, capacity)
    assert sorted(packs.order.tolist()) == [item for item, length in enumerate(lengths) if length > 0]
    filled = [sum(lengths[item] for item in items) for items in bins(packs)]
    assert all(0 < total <= capacity for total in filled)
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(packs.order)
    # no two bins could be one
    assert all(a + b > capacity for a, b in itertools.combinations(filled, 2))
    again = pack(lengths, capacity)
    np.testing.assert_array_equal(again.order, packs.order)
    np.testing.assert_array_equal(again.offsets, packs.offsets)


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 7, 0, 5, 6, 4, 3],
        (3, 7, 0, 5, 6, 4, 3),
        np.array([3, 7, 0, 5, 6, 4, 3], np.int32),
        np.array([3, 7, 0, 5, 6, 4, 3], np.uint8),
        np.array([3, -1, 7, -1, 0, -1, 5, -1, 6, -1, 4, -1, 3])[::2],
        torch.tensor([3, 7, 0, 5, 6, 4, 3]),
        pa.array([3, 7, 0, 5, 6, 4, 3], pa.int32()),
        pa.array([9, 3, 7, 0, 5, 6, 4, 3])[1:],
        pa.chunked_array([[3, 7, 0], [], [5, 6, 4, 3]]),
    ],
)
def test_kinds(lengths):
    packs = pack(lengths, 10)
    assert packs.order.dtype == packs.offsets.dtype == np.int64
    assert packs.order.tolist() == [1, 0, 4, 5, 3, 6]
    assert packs.offsets.tolist() == [0, 2, 4, 6]


def test_nothing_to_pack():
    for lengths in ([], [0, 0]):
        packs = pack(lengths, 5)
        assert packs.order.tolist() == []
        assert packs.offsets.tolist() == [0]


def test_a_huge_capacity_costs_nothing():
    assert bins(pack([1, 2**62], 2**62)) == [[1], [0]]


@pytest.mark.parametrize(
    ("lengths", "capacity", "error", "message"),
    [
        ([1, 9, 2, 8], 5, ValueError, "lengths must not exceed capacity 5, got 9 in rows 1 and 3: truncate or split"),
        (
            [9] * 20,
            5,
            ValueError,
            "lengths must not exceed capacity 5, got 9 in rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more",
        ),
        ([5, 6], 5, ValueError, "lengths must not exceed capacity 5, got 6 in row 1"),
        ([1, -2, 3], 5, ValueError, "lengths must not be negative, got -2 in row 1"),
        ([1, 2.5], 5, TypeError, "lengths[1] must be an integer that fits int64, got float 2.5"),
        ([1, 2**63], 5, TypeError, "lengths[1] must be an integer that fits int64, got int 9223372036854775808"),
        (np.array([1.0]), 5, TypeError, "lengths must hold integers that fit int64, got float64 (1,)"),
        (np.array([True]), 5, TypeError, "lengths must hold integers that fit int64, got bool (1,)"),
        (np.array([1], np.uint64), 5, TypeError, "lengths must hold integers that fit int64, got uint64 (1,)"),
        (np.array([[1]]), 5, ValueError, "lengths must have one dimension, got int64 (1, 1)"),
        (pa.array([1, None]), 5, ValueError, "lengths[1] is null"),
        (pa.array([[1]]), 5, TypeError, "lengths must be an Arrow array of integers, got"),
        (pa.table({"n": [1]}), 5, TypeError, "lengths must be an Arrow array of integers, got"),
        (7, 5, TypeError, "lengths must be a numpy array or a torch tensor, got int 7"),
        ([1], 0, ValueError, "capacity must be an integer of at least 1 that fits int64, got 0"),
        ([1], 2**63, ValueError, "capacity must be an integer of at least 1 that fits int64, got 9223372036854775808"),
        ([1], 5.0, TypeError, "capacity must be an integer, got float 5.0"),
        ([1], True, TypeError, "capacity must be an integer, got bool True"),
    ],
)
def test_refused(lengths, capacity, error, message):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.pack: {message}")):
        pack(lengths, capacity)
