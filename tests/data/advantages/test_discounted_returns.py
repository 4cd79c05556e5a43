"""discounted_returns against the definition in float64, and against gae with lambda 1."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern import _core
from prefkern.data.advantages.gae import gae
from prefkern.data.advantages.returns import discounted_returns

MODES = ("skip", "zero", "none")


@st.composite
def cases(draw):
    rows, width = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    case = {"rewards": rng.normal(0, 3, (rows, width)).astype(dtype)}
    if draw(st.booleans()):
        case["mask"] = rng.random((rows, width)) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    if draw(st.booleans()):
        case["terminated"] = rng.random((rows, width)) < 0.3
    if draw(st.booleans()):
        case["bootstrap"] = rng.normal(0, 3, rows).astype(dtype)
    return case


def tolerance(rewards):
    return {"rtol": np.finfo(rewards.dtype).eps, "atol": 16 * np.finfo(np.float64).eps * 40 * rewards.shape[-1]}


def discounted_sum(rewards, done, bootstrap, gamma):
    """The definition, position by position: no recursion."""
    returns = np.zeros(len(rewards))
    for t in range(len(rewards)):
        last = next((k for k in range(t, len(rewards)) if done[k]), None)
        stop = len(rewards) if last is None else last + 1
        returns[t] = sum(gamma ** (k - t) * rewards[k] for k in range(t, stop))
        if last is None:
            returns[t] += gamma ** (stop - t) * bootstrap
    return returns


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.sampled_from(MODES))
def test_equals_the_definition(case, gamma, masked):
    rewards = case["rewards"]
    mask = case.get("mask", np.ones(rewards.shape, bool))
    done = case.get("terminated", np.zeros(rewards.shape, bool))
    bootstrap = case.get("bootstrap", np.zeros(len(rewards)))
    expected = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        cells = np.flatnonzero(mask[row]) if masked == "skip" else np.arange(rewards.shape[1])
        read = mask[row] if masked == "zero" else np.ones_like(mask[row])
        r, d = np.where(read, rewards[row].astype(np.float64), 0)[cells], (done[row] & read)[cells]
        expected[row, cells] = discounted_sum(r, d, float(bootstrap[row]), gamma)
    got = discounted_returns(**case, gamma=gamma, masked=masked)
    assert got.dtype == rewards.dtype
    np.testing.assert_allclose(got, np.where(mask, expected, 0), **tolerance(rewards))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(MODES), st.integers(0, 2**32))
def test_are_the_returns_of_gae_with_lambda_1_whatever_the_values(case, masked, seed):
    # "zero" and "none" put the value 0, or the masked cell's own, between two scored cells; with lambda 1 it cancels.
    values = np.random.default_rng(seed).normal(size=case["rewards"].shape).astype(case["rewards"].dtype)
    given = {name: value for name, value in case.items() if name != "rewards"}
    expected = gae(case["rewards"], values, **given, lam=1, masked=masked, exact=True)
    np.testing.assert_allclose(
        discounted_returns(**case, masked=masked), expected.returns, **tolerance(case["rewards"])
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.data(), st.sampled_from(MODES))
def test_packed_equals_row_by_row(case, data, masked):
    rows, width = case["rewards"].shape
    lengths = [data.draw(st.integers(0, width)) for _ in range(rows)]
    inside = np.arange(width) < np.array(lengths, dtype=int).reshape(-1, 1)
    flat = {name: array if name == "bootstrap" else array[inside] for name, array in case.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    got = discounted_returns(**flat, cu_seqlens=offsets, masked=masked)
    for row, length in enumerate(lengths):
        one = {n: a[row : row + 1] if n == "bootstrap" else a[row : row + 1, :length] for n, a in case.items()}
        np.testing.assert_array_equal(got[offsets[row] : offsets[row + 1]], discounted_returns(**one, masked=masked)[0])


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(("skip", "zero")), st.sampled_from([np.nan, np.inf]))
def test_masked_cells_are_never_read(case, masked, garbage):
    mask = case.setdefault("mask", np.zeros(case["rewards"].shape, bool))
    dirty = case | {"rewards": np.where(mask, case["rewards"], case["rewards"].dtype.type(garbage))}
    if "terminated" in case:
        dirty["terminated"] = case["terminated"] | ~mask
    np.testing.assert_array_equal(discounted_returns(**dirty, masked=masked), discounted_returns(**case, masked=masked))


def test_termination_hides_what_follows():
    got = discounted_returns(np.array([[1.0, 2.0, np.nan]]), gamma=0.5, terminated=np.array([[0, 1, 0]]))
    np.testing.assert_array_equal(got, [[2.0, 2.0, np.nan]])


def test_threads_change_nothing():
    rewards = np.random.default_rng(0).normal(size=(300, 4096)).astype(np.float32)
    results = []
    for threads in (1, 2, 7):
        results.append(np.full_like(rewards, np.nan))
        _core.discounted_returns(rewards, results[-1], gamma=0.99, masked="skip", threads=threads)
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    np.testing.assert_allclose(results[0][:, -1], rewards[:, -1], rtol=0)


def test_kinds():
    rows = [[1.0, 2.0], [], [4.0]]
    expected = [[4.0, 6.0], [], [8.0]]
    options = {"gamma": 0.5, "bootstrap": [8, 0, 8]}
    assert discounted_returns(rows, **options) == expected
    arrow = pa.array(rows, pa.list_(pa.float32()))
    assert discounted_returns(arrow, **options).to_pylist() == expected
    assert discounted_returns(arrow, **options).type == arrow.type
    flat = torch.tensor([1.0, 2.0, 4.0])
    packed = discounted_returns(flat, cu_seqlens=torch.tensor([0, 2, 2, 3]), **options)
    assert isinstance(packed, torch.Tensor)
    assert packed.tolist() == [4.0, 6.0, 8.0]
    assert discounted_returns([1.0, 2.0, 4.0], cu_seqlens=[0, 2, 2, 3], **options) == [4.0, 6.0, 8.0]
    assert discounted_returns(np.zeros((0, 5))).shape == (0, 5)
    assert discounted_returns([]) == []


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "gamma must be a finite number in [0.0, 1.0], got -0.5", {"gamma": -0.5}),
        (ValueError, "masked must be one of 'skip', 'zero', 'none', got 'x'", {"masked": "x"}),
        (
            ValueError,
            "rewards and mask must have the same shape, got (2, 3) and (3, 2)",
            {"mask": np.ones((3, 2), bool)},
        ),
        (ValueError, "terminated must hold only 0 and 1 (or be bool), got 2 at [0, 0]", {"terminated": [[2] * 3] * 2}),
        (ValueError, "bootstrap must hold one value for each of the 2 rows, got shape (1,)", {"bootstrap": [1.0]}),
        (
            TypeError,
            "rewards and bootstrap must have the same dtype, got float64 and float32",
            {"bootstrap": np.float32([1, 2])},
        ),
        (TypeError, "rewards must be float32 or float64, got int64 (2, 3)", {"rewards": np.ones((2, 3), int)}),
        (ValueError, "rewards must be [B, T], or packed [N] with cu_seqlens, got shape (3,)", {"rewards": np.ones(3)}),
        (ValueError, "rewards must not require a gradient", {"rewards": torch.ones(2, 3, requires_grad=True)}),
        (TypeError, "rewards[1][0] must be a number, got NoneType None", {"rewards": [[1.0], [None]]}),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.discounted_returns: {message}")):
        discounted_returns(**{"rewards": np.ones((2, 3))} | arguments)
