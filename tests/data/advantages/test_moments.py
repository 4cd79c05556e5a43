"""masked_stats and whiten against numpy in float64, TRL's masked_whiten, and their invariances."""

import functools
import math
import multiprocessing
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern import _core
from prefkern.data.advantages.moments import masked_stats, whiten
from prefkern.data.types import MaskedStats

EPS = np.finfo(np.float64).eps


@st.composite
def problems(draw, max_cells=40, dtypes=(np.float32, np.float64)):
    shape = draw(
        st.sampled_from([(draw(st.integers(0, max_cells)),), (draw(st.integers(0, 4)), draw(st.integers(0, 9)))])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset = draw(st.sampled_from([0.0, -3.0, 1e4]))
    x = (rng.normal(offset, draw(st.sampled_from([1e-3, 1.0, 50.0])), shape)).astype(draw(st.sampled_from(dtypes)))
    mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])) if draw(st.booleans()) else None
    return x, mask


def scored(x, mask):
    return x.reshape(-1).astype(np.float64) if mask is None else x[mask].astype(np.float64)


def assert_stats(got, numbers):
    assert got.n == len(numbers)
    if len(numbers) == 0:
        assert got == (0, 0.0, 0.0)
        return
    size = np.abs(numbers).max()
    np.testing.assert_allclose(got.mean, np.mean(numbers), rtol=4 * EPS, atol=len(numbers) * EPS * size)
    exact = np.square(numbers.astype(np.longdouble) - numbers.astype(np.longdouble).mean()).sum()
    np.testing.assert_allclose(got.m2, float(exact), rtol=4 * len(numbers) * EPS, atol=len(numbers) * (EPS * size) ** 2)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_stats_equal_numpy(problem):
    x, mask = problem
    assert_stats(masked_stats(x, mask=mask), scored(x, mask))


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_merge_over_any_split(problem, data):
    x, mask = problem
    flat, flags = x.reshape(-1), None if mask is None else mask.reshape(-1)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=5)))
    parts = zip([0, *cuts], [*cuts, len(flat)], strict=True)
    stats = [masked_stats(flat[a:b], mask=None if flags is None else flags[a:b]) for a, b in parts]
    for order in (stats, stats[::-1]):
        merged = functools.reduce(MaskedStats.merge, order)
        whole = scored(x, mask)
        assert merged.n == len(whole)
        if len(whole):
            size = np.abs(whole).max()
            np.testing.assert_allclose(merged.mean, whole.mean(), rtol=0, atol=2 * len(whole) * EPS * size)
            centred = ((whole - whole.mean()) ** 2).sum()
            slack = 8 * len(whole) * EPS * (centred + size * np.sqrt(centred)) + len(whole) * (EPS * size) ** 2 * 16
            np.testing.assert_allclose(merged.m2, centred, rtol=0, atol=slack)


def test_the_textbook_formula_would_fail_here():
    x = 1e9 + np.tile([-1.0, 1.0], 50_000)
    stats = masked_stats(x)
    assert stats.mean == 1e9
    assert stats.variance == pytest.approx(1e5 / (1e5 - 1), rel=1e-12)
    assert np.mean(x * x) - np.mean(x) ** 2 != pytest.approx(1.0, rel=1e-3)


def test_the_mean_is_right_to_the_last_digit():
    rng = np.random.default_rng(0)
    for offset in (0.1, 1e6, -1e12):
        x = offset + rng.random(4000)
        stats, mean = masked_stats(x), math.fsum(x) / len(x)
        assert abs(stats.mean - mean) <= np.spacing(abs(mean))
        centred = x.astype(np.longdouble) - np.longdouble(mean)
        exact = float(np.square(centred).sum() - centred.sum() ** 2 / len(x))
        assert stats.m2 == pytest.approx(exact, rel=1e-14)


def test_threads_and_blocks_change_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, 2_000_003)
    mask = (rng.random(len(x)) < 0.7).view(np.uint8)
    found = [_core.masked_moments("x", x, mask=mask, threads=threads) for threads in (1, 2, 7)]
    assert found[0] == found[1] == found[2]
    assert_stats(masked_stats(x, mask=mask), x[mask == 1])
    out = [np.full_like(x, np.nan) for _ in range(2)]
    for threads, target in zip((1, 5), out, strict=True):
        _core.standardise("x", x, target, center=5.0, scale=0.5, shift=1.0, mask=mask, threads=threads)
    np.testing.assert_array_equal(out[0], np.where(mask == 1, (x - 5) * 0.5 + 1, 0))
    np.testing.assert_array_equal(out[0], out[1])


@settings(max_examples=100, deadline=None)
@given(problems(), st.booleans())
def test_whiten_equals_the_formula(problem, keep_mean):
    x, mask = problem
    numbers = scored(x, mask)
    expected = np.zeros(x.shape)
    if len(numbers):
        var = numbers.var(ddof=1) if len(numbers) > 1 else 0.0
        white = (x.astype(np.float64) - numbers.mean()) / np.sqrt(var + 1e-8) + keep_mean * numbers.mean()
        expected = white if mask is None else np.where(mask, white, 0)
    got = whiten(x, mask=mask, keep_mean=keep_mean)
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    scale = np.abs(numbers).max(initial=1) * 1e4  # of x / sqrt(var + 1e-8)
    np.testing.assert_allclose(got, expected, rtol=np.finfo(x.dtype).eps, atol=64 * EPS * scale * max(len(numbers), 1))


@settings(max_examples=60, deadline=None)
@given(problems(dtypes=(np.float64,)), st.sampled_from([1e3, -1e6]))
def test_whiten_has_the_moments_and_ignores_a_shift(problem, shift):
    x, mask = problem
    white = whiten(x, mask=mask)
    stats = masked_stats(white, mask=mask)
    # x + shift is rounded to a unit of the shift before whiten sees it
    tolerance = 64 * EPS * max(stats.n, 1) * (abs(shift) + 1e4) / np.sqrt(masked_stats(x, mask=mask).variance + 1e-8)
    assert stats.mean == pytest.approx(0, abs=tolerance)
    if stats.n > 1:
        spread = masked_stats(x, mask=mask).variance
        assert stats.variance == pytest.approx(spread / (spread + 1e-8), rel=1e-9)
    np.testing.assert_allclose(whiten(x + shift, mask=mask), white, rtol=1e-7, atol=tolerance)
    kept = masked_stats(whiten(x, mask=mask, keep_mean=True), mask=mask)
    assert kept.mean == pytest.approx(masked_stats(x, mask=mask).mean, rel=1e-12, abs=1e-10)


def trl_masked_whiten(values, mask, shift_mean=True):
    """TRL 1.12's PPO formula."""
    count = mask.sum().double()
    mean = (values * mask).sum() / count
    var = (((values - mean) ** 2) * mask).sum() / count * (count / (count - 1))
    white = (values - mean) * torch.rsqrt(var + 1e-8)
    return white if shift_mean else white + mean


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whiten_equals_trl(keep_mean):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, 33, dtype=torch.float64, generator=rng)
    mask = torch.rand(7, 33, generator=rng) < 0.7
    expected = trl_masked_whiten(x, mask, shift_mean=not keep_mean).masked_fill(~mask, 0)
    got = whiten(x, mask=mask, keep_mean=keep_mean)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_masked_cells_are_never_read(garbage):
    x = np.random.default_rng(3).normal(size=(50, 200))
    mask = np.random.default_rng(4).random(x.shape) < 0.5
    dirty = np.where(mask, x, garbage)
    assert masked_stats(dirty, mask=mask) == masked_stats(x, mask=mask)
    np.testing.assert_array_equal(whiten(dirty, mask=mask), whiten(x, mask=mask))
    assert not whiten(dirty, mask=mask)[~mask].any()


def test_few_numbers():
    assert whiten([]) == []
    assert whiten([7.0]) == [0.0]
    assert whiten([7.0, 7.0, 7.0], keep_mean=True) == [7.0] * 3
    assert whiten([7.0, 1.0], mask=[1, 0], keep_mean=True) == [7.0, 0.0]
    assert whiten(np.full((2, 2), 0.1)).tolist() == [[0, 0], [0, 0]]
    assert not whiten(np.ones((2, 2)), mask=np.zeros((2, 2), bool)).any()
    assert masked_stats([1.0]).variance == masked_stats([]).variance == 0.0
    assert np.isnan(masked_stats([1.0, np.nan]).mean)


def test_kinds():
    rows = [[1.0, 2.0], [], [6.0]]
    scale = 1 / np.sqrt(7 + 1e-8)
    white = [[-2 * scale, -1 * scale], [], [3 * scale]]
    assert whiten(rows) == white
    assert whiten(rows, mask=[[1, 1], [], [0]])[2] == [0.0]
    arrow = pa.chunked_array([pa.array(rows[:1]), pa.array(rows[1:])])
    assert whiten(arrow).to_pylist() == white
    assert whiten(torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)).tolist() == [white[0] + white[2]]
    arrays = whiten([np.float32([1, 2]), np.float32([6])])
    assert [a.dtype for a in arrays] == [np.float32] * 2
    cube = np.random.default_rng(0).normal(size=(2, 3, 4)).T
    np.testing.assert_array_equal(whiten(cube), whiten(np.ascontiguousarray(cube)))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            "x must be finite where it is scored, got nan at [1, 2]; mask it",
            {"x": np.where(np.arange(6) == 5, np.nan, 1).reshape(2, 3)},
        ),
        (ValueError, "x must be finite where it is scored, got inf at [1, 0]; mask it", {"x": [[1.0, 2.0], [np.inf]]}),
        (
            ValueError,
            "x must be finite where it is scored, got nan at [2]",
            {"x": [np.nan, 1.0, np.nan], "mask": [0, 1, 1]},
        ),
        (ValueError, "x has a variance beyond float64", {"x": [-1e300, 1e300]}),
        (
            ValueError,
            "x and mask must have the same shape, got (2, 3) and (3,)",
            {"x": np.ones((2, 3)), "mask": np.ones(3, bool)},
        ),
        (
            ValueError,
            "x[1] and mask[1] must have the same length, got 1 and 2",
            {"x": [[1.0], [2.0]], "mask": [[1], [1, 1]]},
        ),
        (ValueError, "mask must hold only 0 and 1 (or be bool), got 3 at [0]", {"x": [1.0], "mask": [3]}),
        (TypeError, "x must be float32 or float64, got int64 (2,)", {"x": np.array([1, 2])}),
        (ValueError, "x must have at least one dimension, got the number 3.0", {"x": np.array(3.0)}),
        (TypeError, "x must be a numpy array or a torch tensor, got str 'x'", {"x": "x"}),
        (ValueError, "x must not require a gradient", {"x": torch.ones(3, requires_grad=True)}),
        (TypeError, "x[1] must be a number, got NoneType None", {"x": [1.0, None]}),
        (
            TypeError,
            "group must be a process group that this process belongs to, got str 'gloo'",
            {"x": [1.0], "group": "gloo"},
        ),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.whiten: {message}")):
        whiten(**arguments)


PARTS = ([1.0, 2.0, 1e6], [], [5.0, -4.0])


def rank(index, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=index, world_size=len(PARTS))
    group = dist.group.WORLD
    results.put((index, whiten(np.array(PARTS[index]), group=group)))
    try:
        whiten([np.nan if index == 2 else 1.0], group=group)
    except ValueError as error:
        results.put((index, str(error)))
    dist.destroy_process_group()


def test_whiten_over_ranks_is_whiten_of_the_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=rank, args=(index, tmp_path / "store", results)) for index in range(len(PARTS))]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in range(2 * len(PARTS))]
    for worker in workers:
        worker.join(timeout=60)
    white = dict(item for item in found if not isinstance(item[1], str))
    errors = dict(item for item in found if isinstance(item[1], str))
    expected = whiten(np.concatenate(PARTS))
    np.testing.assert_allclose(np.concatenate([white[index] for index in range(len(PARTS))]), expected, rtol=1e-13)
    assert "got nan at [0]" in errors[2]
    assert "another rank's x is not finite" in errors[0]
    assert "another rank's x is not finite" in errors[1]
