"""Advantages do not depend on where the numbers lie, nor on who computes them."""

import numpy as np
import pytest

from prefkern import _core
from prefkern.data import gae


def test_in_place_and_blocks_of_every_length():
    """Lengths around the cells of a window and of a block, every placement of the outputs, rows that start anywhere."""
    rng = np.random.default_rng(3)
    for width in (*range(40), 63, 64, 65, 127, 128, 129, 255):
        rewards, values = rng.normal(size=(2, 3, width)).astype(np.float32)
        expected = gae(rewards, values)
        for order in ((0, 1), (1, 0)):
            both = [rewards.copy(), values.copy()]
            out = (both[order[0]], both[order[1]])
            for got, wanted in zip(gae(*both, out=out), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)
        for first, second in ((0, 1), (1, 0)):
            both = [rewards.copy(), values.copy()]
            out = [np.full_like(rewards, np.nan), np.full_like(rewards, np.nan)]
            out[first] = both[second]
            for got, wanted in zip(gae(*both, out=tuple(out)), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_threads_change_nothing(packed):
    rng = np.random.default_rng(0)
    rows, width = 300, 4096  # 4.9 MB an array, above what one thread does alone
    rewards, values = rng.normal(size=(2, rows, width)).astype(np.float32)
    mask = (rng.random((rows, width)) < 0.9).view(np.uint8)
    offsets = None
    if packed:
        cuts = np.sort(rng.integers(0, rows * width, 500))
        offsets = np.concatenate([[0], cuts, [rows * width]])
        rewards, values, mask = rewards.reshape(-1), values.reshape(-1), mask.reshape(-1)
    results = []
    for threads in (1, 2, 7):
        out = np.full_like(rewards, np.nan), np.full_like(rewards, np.nan)
        options = {"gamma": 0.99, "lam": 0.95, "masked": "skip", "mask": mask, "cu_seqlens": offsets}
        _core.gae(rewards, values, *out, **options, threads=threads)
        results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert np.isfinite(results[0]).all()


def test_batches_beyond_the_caches_are_their_parts():
    """On any number of threads, and wherever the outputs begin, before and behind which nothing is written."""
    rng = np.random.default_rng(0)
    rows, width = 800, 4096
    rewards, values = rng.normal(size=(2, rows, width)).astype(np.float32)
    half = rows // 2
    parts = [gae(rewards[part], values[part]) for part in (slice(half), slice(half, None))]
    expected = [np.concatenate(pair) for pair in zip(*parts, strict=True)]
    for offset in (0, 1, 16):
        memory = np.full((2, rows * width + 32), np.nan, np.float32)
        out = tuple(cells[offset : offset + rows * width].reshape(rows, width) for cells in memory)
        for threads in (1, 3):
            options = {"gamma": 0.99, "lam": 0.95, "masked": "skip", "threads": threads}
            _core.gae(rewards, values, *out, **options)
            np.testing.assert_array_equal(out, expected)
        assert np.isnan(memory[:, :offset]).all()
        assert np.isnan(memory[:, offset + rows * width :]).all()
