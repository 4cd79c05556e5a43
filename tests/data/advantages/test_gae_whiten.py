"""gae(whiten=True) against gae followed by whiten, over ranks, and its refusals."""

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
from prefkern.data import gae, masked_stats, whiten

RNG = np.random.default_rng(11)
SHAPE = (9, 5000)  # more than one block of statistics in a row
REWARDS, VALUES = RNG.normal(3, 2, (2, *SHAPE)).astype(np.float32)
MASK = (np.arange(SHAPE[1]) >= RNG.integers(0, 900, (9, 1))) & (np.arange(SHAPE[1]) < RNG.integers(3000, 5001, (9, 1)))
MASK[4] = False
# Each is rounded once; the statistics are float64 sums in another order.
ULP = 2.01 * 2.0**-24


@pytest.mark.parametrize("masked", ["skip", "zero", "none"])
@pytest.mark.parametrize("exact", [False, True])
def test_it_is_gae_then_whiten(masked, exact):
    raw = gae(REWARDS, VALUES, mask=MASK, masked=masked, exact=exact)
    got = gae(REWARDS, VALUES, mask=MASK, masked=masked, exact=exact, whiten=True)
    np.testing.assert_array_equal(got.returns, raw.returns)
    np.testing.assert_allclose(got.advantages, whiten(raw.advantages, mask=MASK), rtol=ULP, atol=1e-12)
    assert not got.advantages[~MASK].any()
    numbers = got.advantages[MASK].astype(np.float64)
    assert abs(numbers.mean()) < 1e-6
    assert numbers.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_without_a_mask_and_in_float64():
    rewards, values = REWARDS.astype(np.float64), VALUES.astype(np.float64)
    got = gae(rewards, values, whiten=True)
    np.testing.assert_allclose(got.advantages, whiten(gae(rewards, values).advantages), rtol=1e-12, atol=1e-12)


def test_kinds_and_out():
    expected = gae(REWARDS, VALUES, mask=MASK, whiten=True)
    out = (torch.full(SHAPE, torch.nan), torch.full(SHAPE, torch.nan))
    got = gae(torch.from_numpy(REWARDS), torch.from_numpy(VALUES), mask=torch.from_numpy(MASK), whiten=True, out=out)
    assert got.advantages is out[0]
    np.testing.assert_array_equal(got.advantages.numpy(), expected.advantages)
    flat = gae(
        REWARDS[MASK], VALUES[MASK], cu_seqlens=np.concatenate([[0], MASK.sum(1).cumsum()]), whiten=True, exact=True
    )
    wanted = gae(REWARDS, VALUES, mask=MASK, whiten=True, exact=True).advantages[MASK]
    np.testing.assert_allclose(flat.advantages, wanted, rtol=ULP, atol=1e-12)
    # advantages [3, 2], [], [4]: mean 3, variance 1
    rows = gae(pa.array([[1.0, 2.0], [], [4.0]]), pa.array([[0.0, 0.0], [], [0.0]]), gamma=1.0, lam=1.0, whiten=True)
    assert np.round(rows.advantages.flatten(), 6).tolist() == [0.0, -1.0, 1.0]


def test_threads_change_nothing():
    rows, width = 300, 4096
    rewards, values = np.random.default_rng(0).normal(size=(2, rows, width)).astype(np.float32)
    options = {"gamma": 0.99, "lam": 0.95, "masked": "skip", "moments": True}
    out = np.empty_like(rewards), np.empty_like(rewards)
    found = [_core.gae(rewards, values, *out, **options, threads=threads) for threads in (1, 2, 7)]
    assert found[0] == found[1] == found[2]
    stats = masked_stats(out[0])
    assert found[0][0] == stats.n
    assert found[0][1:] == pytest.approx(stats[1:], rel=1e-10)


def test_inputs_are_not_overwritten():
    rewards, values = REWARDS.copy(), VALUES.copy()
    for out in [(rewards, np.empty_like(values)), (np.empty_like(rewards), values), (values, rewards)]:
        with pytest.raises(ValueError, match="out must not be rewards or values with whiten=True"):
            gae(rewards, values, whiten=True, out=out)
    np.testing.assert_array_equal(rewards, REWARDS)
    np.testing.assert_array_equal(values, VALUES)


def test_few_numbers():
    assert gae([[5.0]], [[1.0]], whiten=True).advantages == [[0.0]]
    assert gae([[5.0, 1.0]], [[1.0, 1.0]], mask=[[0, 0]], whiten=True) == ([[0.0, 0.0]], [[0.0, 0.0]])
    assert gae([], [], whiten=True).advantages == []


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("rewards must be finite where they are read to be whitened, got nan at [1, 2]", {"rewards": np.nan}),
        ("values must be finite where they are read to be whitened, got inf at [1, 2]", {"values": np.inf}),
        ("advantages have a variance beyond float64", {"scale": 1e300}),
    ],
)
def test_not_finite(message, arguments):
    rewards, values = np.ones((2, 3)), np.ones((2, 3))
    rewards[0, 0] = 2
    rewards[1, 2] = arguments.get("rewards", 1.0)
    values[1, 2] = arguments.get("values", 1.0)
    rewards *= arguments.get("scale", 1.0)
    with pytest.raises(ValueError, match=re.escape(f"prefkern.data.gae: {message}")):
        gae(rewards, values, whiten=True)
    mask = np.ones((2, 3), bool)
    if "scale" not in arguments:
        mask[1, 2] = False
        assert np.isfinite(gae(rewards, values, mask=mask, whiten=True).advantages).all()


def test_refusals():
    rewards, values = np.ones((2, 3)), np.ones((2, 3))
    for out in ((rewards, values), (np.empty((2, 3)), rewards), (values, np.empty((2, 3)))):
        with pytest.raises(ValueError, match="out must not be rewards or values with whiten=True"):
            gae(rewards, values, whiten=True, out=out)
    assert (rewards == 1).all()
    assert (values == 1).all()
    with pytest.raises(ValueError, match="group is for whiten=True"):
        gae(rewards, values, group="gloo")
    with pytest.raises(TypeError, match="group must be a process group"):
        gae(rewards, values, whiten=True, group="gloo")


def rank(index, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=index, world_size=3)
    rows = slice(3 * index, 3 * index + 3)
    found = gae(REWARDS[rows], VALUES[rows], mask=MASK[rows], whiten=True, group=dist.group.WORLD)
    results.put((index, found.advantages))
    dist.destroy_process_group()


def test_ranks_are_whitened_together(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=rank, args=(index, tmp_path / "store", results)) for index in range(3)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    whole = gae(REWARDS, VALUES, mask=MASK, whiten=True).advantages
    np.testing.assert_allclose(np.concatenate([found[index] for index in range(3)]), whole, rtol=ULP, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.floats(-1e6, 1e6), st.floats(2.0**-30, 2.0**30), st.booleans(), st.integers(0, 2**32 - 1))
def test_the_line_is_rounded_once(cells, center, scale, masked, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=cells) * 10.0 ** rng.integers(-3, 4) + center).astype(np.float32)
    mask = rng.integers(0, 2, cells).astype(np.uint8) if masked else None
    out = np.full_like(x, np.nan)
    _core.standardise("x", x, out, center=center, scale=scale, shift=0.0, mask=mask)
    wanted = ((x.astype(np.float64) - center) * scale).astype(np.float32)
    np.testing.assert_array_equal(out, wanted if mask is None else np.where(mask != 0, wanted, 0))
