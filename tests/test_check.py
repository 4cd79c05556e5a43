"""Sizes, counts and messages: what the argument checks make of them."""

import math

import numpy as np
import pytest
import torch

from prefkern import check


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, None),
        (0, 0),
        (10**30, check.MOST_BYTES),
        (math.inf, check.MOST_BYTES),
        (1e9, 10**9),
        (np.int64(7), 7),
        ("2GB", 2 * 10**9),
        ("1.5 gib", 3 << 29),
        ("512 MiB", 512 << 20),
        ("100", 100),
        ("8k", 8000),
    ],
)
def test_sizes(given, want) -> None:
    assert check.size("here", "max_memory", given) == want


@pytest.mark.parametrize("given", [-1, 1.5, True, "much", "-3GB", math.nan, torch.ones(2), [1]])
def test_what_is_no_size_is_refused(given) -> None:
    with pytest.raises(ValueError, match=r"^prefkern\.here: max_memory must be bytes >= 0: an int, a text such as"):
        check.size("here", "max_memory", given)


@pytest.mark.parametrize(
    "value",
    [[1.5] * 200_000, "x" * 10**6, 10**3000, {i: i for i in range(10**5)}, torch.nn.Linear(3, 3), (("a",) * 99,)],
)
def test_no_message_is_long(value) -> None:
    assert len(check.describe(value)) < 500


def test_intervals_show_what_they_allow() -> None:
    with pytest.raises(ValueError, match=r"beta must be a finite number in \(0\.0, inf\), got inf"):
        check.number("here", "beta", math.inf, low=0.0, open_low=True)
    with pytest.raises(ValueError, match=r"share must be a finite number in \[0\.0, 1\.0\], got 2"):
        check.number("here", "share", 2, low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"scale must be a finite number in \(-inf, inf\), got nan"):
        check.number("here", "scale", math.nan)
