"""gae against the recursion in float64, and the identities that any implementation must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern.data import gae

MODES = ("skip", "zero", "none")
EPS = {np.dtype(np.float32): np.finfo(np.float32).eps, np.dtype(np.float64): np.finfo(np.float64).eps}


def recursion(rewards, values, done, bootstrap, gamma, lam):
    """One row by the definition, in Python floats."""
    advantages = [0.0] * len(rewards)
    next_value, next_advantage = bootstrap, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        alive = 0.0 if done[t] else 1.0
        delta = rewards[t] + gamma * next_value * alive - values[t]
        next_advantage = delta + gamma * lam * alive * next_advantage
        next_value = values[t]
        advantages[t] = next_advantage
    return np.array(advantages), np.array(advantages) + np.array(values)


def oracle(case, gamma, lam, masked):
    rewards, values = case["rewards"].astype(np.float64), case["values"].astype(np.float64)
    mask = np.ones(rewards.shape, bool) if case.get("mask") is None else case["mask"]
    done = np.zeros(rewards.shape, bool) if case.get("terminated") is None else case["terminated"]
    bootstrap = np.zeros(len(rewards)) if case.get("bootstrap") is None else case["bootstrap"].astype(np.float64)
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row in range(len(rewards)):
        scored = np.flatnonzero(mask[row])
        if masked == "skip":
            cells = scored
            inputs = (rewards[row, cells], values[row, cells], done[row, cells])
        else:
            cells = np.arange(rewards.shape[1])
            inputs = (rewards[row], values[row], done[row])
            if masked == "zero":
                inputs = tuple(np.where(mask[row], x, 0) for x in inputs)
        a, r = recursion(*inputs, bootstrap[row], gamma, lam)
        keep = np.isin(cells, scored)
        advantages[row, scored], returns[row, scored] = a[keep], r[keep]
    return advantages, returns


def terms(case, gamma, lam, masked):
    """The sum of the absolute terms of every advantage: gae of rewards for which nothing cancels."""
    size = {name: np.abs(case[name].astype(np.float64)) for name in ("rewards", "values", "bootstrap") if name in case}
    return oracle(case | size | {"rewards": size["rewards"] + 2 * size["values"]}, gamma, lam, masked)[0]


def assert_close(got, expected, case, gamma, lam, masked="skip"):
    """float32 results are float64 sums rounded once. In float64 each of T steps rounds five times, here and in what is
    expected."""
    dtype, (rows, width) = case["rewards"].dtype, case["rewards"].shape
    error = 10 * width * np.finfo(np.float64).eps * terms(case, gamma, lam, masked)
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        assert actual.shape == (rows, width)
        tolerance = error + EPS[dtype] / 2 * (1 + 2.0**-20) * np.abs(wanted)
        over = ~(np.abs(actual - wanted) <= tolerance)
        assert not over.any(), (actual[over], wanted[over], tolerance[over])


@st.composite
def cases(draw, min_width=0, masks=True, dones=True, dtypes=(np.float32, np.float64)):
    rows, width = draw(st.integers(0, 4)), draw(st.integers(min_width, draw(st.sampled_from([12, 75]))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(dtypes))
    case = {name: rng.normal(0, 3, (rows, width)).astype(dtype) for name in ("rewards", "values")}
    if masks and draw(st.booleans()):
        case["mask"] = rng.random((rows, width)) < draw(st.sampled_from([0.0, 0.5, 0.9, 0.98]))
    if dones and draw(st.booleans()):
        case["terminated"] = rng.random((rows, width)) < draw(st.sampled_from([0.02, 0.3]))
    if draw(st.booleans()):
        case["bootstrap"] = rng.normal(0, 3, rows).astype(dtype)
    return case


unit = st.sampled_from([0.0, 0.3, 0.95, 1.0])


@settings(max_examples=300, deadline=None)
@given(cases(), unit, unit, st.sampled_from(MODES), st.booleans())
def test_equals_the_recursion(case, gamma, lam, masked, exact):
    got = gae(**case, gamma=gamma, lam=lam, masked=masked, exact=exact)
    assert_close(got, oracle(case, gamma, lam, masked), case, gamma, lam, masked)


@settings(max_examples=50, deadline=None)
@given(cases(masks=False, dones=False), unit)
def test_lambda_1_is_monte_carlo(case, gamma):
    width = case["rewards"].shape[1]
    bootstrap = case.get("bootstrap", np.zeros(len(case["rewards"]))).astype(np.float64)
    returns = np.zeros(case["rewards"].shape)
    for t in range(width):
        discounts = gamma ** np.arange(width - t)
        returns[:, t] = case["rewards"][:, t:].astype(np.float64) @ discounts + gamma ** (width - t) * bootstrap
    assert_close(gae(**case, gamma=gamma, lam=1.0), (returns - case["values"], returns), case, gamma, 1.0)


@settings(max_examples=50, deadline=None)
@given(cases(masks=False, dones=False, min_width=1), unit)
def test_lambda_0_is_the_td_error(case, gamma):
    bootstrap = case.get("bootstrap", np.zeros(len(case["rewards"])))[:, None]
    successors = np.concatenate([case["values"][:, 1:], bootstrap], axis=1).astype(np.float64)
    delta = case["rewards"] + gamma * successors - case["values"]
    assert_close(gae(**case, gamma=gamma, lam=0.0), (delta, delta + case["values"]), case, gamma, 0.0)


@settings(max_examples=50, deadline=None)
@given(cases(dtypes=(np.float64,)), st.integers(0, 2**32), st.sampled_from(MODES))
def test_linear_in_rewards_and_values(case, seed, masked):
    rng = np.random.default_rng(seed)
    numbers = [name for name in ("rewards", "values", "bootstrap") if name in case]
    other = case | {name: rng.normal(size=case[name].shape) for name in numbers}
    both = case | {name: 2.0 * case[name] - 0.5 * other[name] for name in numbers}
    first, second, third = (gae(**x, gamma=0.9, lam=0.8, masked=masked) for x in (case, other, both))
    sums = {name: 2 * np.abs(case[name]) + 0.5 * np.abs(other[name]) for name in numbers}
    combined = [2.0 * a - 0.5 * b for a, b in zip(first, second, strict=True)]
    assert_close(third, combined, case | sums, 0.9, 0.8, masked)


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from(MODES))
def test_rows_are_independent(case, masked):
    whole = gae(**case, masked=masked)
    for row in range(len(case["rewards"])):
        alone = gae(**{name: array[row : row + 1] for name, array in case.items()}, masked=masked)
        for one, many in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(one[0], many[row])


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from(("skip", "zero")), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_masked_cells_are_never_read(case, masked, garbage):
    mask = case.setdefault("mask", np.zeros(case["rewards"].shape, bool))
    expected = gae(**case, masked=masked)
    dirty = case | {name: np.where(mask, case[name], case[name].dtype.type(garbage)) for name in ("rewards", "values")}
    if "terminated" in case:
        dirty["terminated"] = case["terminated"] | ~mask
    for got, wanted in zip(gae(**dirty, masked=masked), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert not got[~mask].any()


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from(("skip", "zero")), st.integers(1, 5))
def test_appended_padding_changes_nothing(case, masked, extra):
    if masked == "zero":
        case.pop("bootstrap", None)  # it is the value after the last position, masked or not
    case.setdefault("mask", np.ones(case["rewards"].shape, bool))
    padded = {
        name: array if name == "bootstrap" else np.pad(array, ((0, 0), (0, extra))) for name, array in case.items()
    }
    for got, wanted in zip(gae(**padded, masked=masked), gae(**case, masked=masked), strict=True):
        np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)
        assert not got[:, wanted.shape[1] :].any()


@settings(max_examples=50, deadline=None)
@given(cases(min_width=1, masks=False))
def test_concatenated_episodes_are_separate_rows(case):
    case.pop("bootstrap", None)
    case.setdefault("terminated", np.zeros(case["rewards"].shape, bool))[:, -1] = True
    separate = gae(**case)
    joined = gae(**{name: array.reshape(1, -1) for name, array in case.items()})
    for one, many in zip(joined, separate, strict=True):
        np.testing.assert_array_equal(one.reshape(many.shape), many)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data(), st.sampled_from(MODES), st.sampled_from([np.int32, np.int64]))
def test_packed_equals_row_by_row(case, data, masked, index_type):
    rows, width = case["rewards"].shape
    lengths = [data.draw(st.integers(0, width)) for _ in range(rows)]
    inside = np.arange(width) < np.array(lengths, dtype=int).reshape(-1, 1)
    flat = {name: array if name == "bootstrap" else array[inside] for name, array in case.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(index_type)
    got = gae(**flat, cu_seqlens=offsets, masked=masked)
    for row, length in enumerate(lengths):
        one = {n: a[row : row + 1] if n == "bootstrap" else a[row : row + 1, :length] for n, a in case.items()}
        for packed, alone in zip(got, gae(**one, masked=masked), strict=True):
            np.testing.assert_array_equal(packed[offsets[row] : offsets[row + 1]], alone[0])


def test_termination_hides_what_follows():
    rewards = np.array([[1.0, 2.0, np.nan]])
    values = np.array([[0.5, 0.25, np.inf]])
    got = gae(rewards, values, gamma=0.5, lam=0.5, terminated=np.array([[False, True, False]]))
    np.testing.assert_array_equal(got.advantages[0, :2], [1 + 0.125 - 0.5 + 0.25 * 1.75, 1.75])
    assert np.isnan(got.advantages[0, 2])


def test_a_nan_reward_reaches_only_what_precedes_it():
    rewards = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]], np.float32)
    got = gae(rewards, np.zeros_like(rewards))
    assert np.isnan(got.advantages).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("exact", [False, True])
def test_errors_do_not_grow_with_the_row(exact):
    rewards = np.full((1, 1 << 20), 0.1, np.float32)
    got = gae(rewards, np.zeros_like(rewards), gamma=1.0, lam=1.0, exact=exact).advantages
    wanted = np.float64(np.float32(0.1)) * np.arange(rewards.size, 0, -1)
    np.testing.assert_allclose(got[0], wanted, rtol=np.finfo(np.float32).eps / 2 * 1.01)


def test_four_cells_at_a_time_or_one():
    """Each within a rounding of float64."""
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 5, 3000)).astype(np.float32)
    case = {"rewards": rewards, "values": values, "mask": np.arange(3000) % 700 < 650, "bootstrap": values[:, 7].copy()}
    case["mask"] = np.broadcast_to(case["mask"], rewards.shape).copy()
    for gamma, lam in ((1.0, 1.0), (0.99, 0.95), (0.3, 0.1), (1e-30, 1.0), (0.0, 0.5)):
        wanted = oracle(case, gamma, lam, "skip")
        for exact in (False, True):
            assert_close(gae(**case, gamma=gamma, lam=lam, exact=exact), wanted, case, gamma, lam)


def test_four_at_a_time_is_what_runs():
    """Else the tests above would pass without it. Cell by cell, 1 is lost in 1 + 2^60 - 2^60; in pairs it is not."""
    rewards = np.zeros((1, 8), np.float32)
    rewards[0, [4, 5, 7]] = -(2.0**60), 2.0**60, 1.0
    values = np.zeros_like(rewards)
    assert gae(rewards, values, gamma=1.0, lam=1.0).advantages[0, 0] == 1.0
    assert gae(rewards, values, gamma=1.0, lam=1.0, exact=True).advantages[0, 0] == 0.0
    wide = (rewards.astype(np.float64), values.astype(np.float64))
    for exact in (False, True):
        assert gae(*wide, gamma=1.0, lam=1.0, exact=exact).advantages[0, 0] == 0.0


def test_numbers_near_the_largest_float32_do_not_overflow_on_the_way():
    rewards, values = np.full((2, 1, 9), 3e38, np.float32)
    for exact in (False, True):
        got = gae(rewards, values, gamma=1.0, lam=0.0, exact=exact)  # 3e38 + 3e38 - 3e38
        np.testing.assert_array_equal(got.advantages, [[np.float32(3e38)] * 8 + [0.0]])


@settings(max_examples=60, deadline=None)
@given(cases(dones=False), st.booleans())
def test_skip_is_compress_run_scatter(case, exact):
    mask = case.setdefault("mask", np.ones(case["rewards"].shape, bool))
    got = gae(**case, gamma=0.9, lam=0.9, exact=exact)
    for row in range(len(mask)):
        kept = {n: a[row : row + 1] if n == "bootstrap" else a[row : row + 1, mask[row]] for n, a in case.items()}
        del kept["mask"]
        alone = tuple(a.astype(np.float64) for a in gae(**kept, gamma=0.9, lam=0.9, exact=True))
        here = tuple(a[row : row + 1, mask[row]] for a in got)
        if exact or case["rewards"].dtype == np.float64:
            np.testing.assert_array_equal(here, alone)
            continue
        tolerance = 1e-12 * terms(kept, 0.9, 0.9, "skip")
        for actual, wanted in zip(here, alone, strict=True):  # what is wanted is itself rounded once
            assert (np.abs(actual - wanted) <= EPS[np.dtype(np.float32)] * np.abs(wanted) + tolerance).all()
