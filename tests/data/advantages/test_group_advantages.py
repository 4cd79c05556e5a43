"""group_advantages against the formulas in float64, TRL's own lines, and their invariances."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from prefkern.data.advantages.groups import group_advantages
from prefkern.data.advantages.moments import whiten

VARIANTS = [
    {"method": "grpo"},
    {"method": "grpo", "scale": "batch"},
    {"method": "grpo", "scale": "none"},
    {"method": "dr_grpo"},
    {"method": "rloo"},
    {"method": "reinforce++"},
]
EPS = np.finfo(np.float64).eps
variants = st.sampled_from(VARIANTS)


@st.composite
def problems(draw, dtypes=(np.float32, np.float64)):
    rows = draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = np.array(draw(st.sampled_from([[0, 1, 2, 3], [-5, 7, 1, 0], [2**63 - 1, -(2**63), 0, 10**12]])))
    rewards = rng.normal(draw(st.sampled_from([0, 100])), 2, rows).astype(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):
        rewards = np.round(rewards)  # ties
    rewards[rng.random(rows) < draw(st.sampled_from([0.0, 0.4]))] = np.nan
    return rewards, names[rng.integers(0, 4, rows)]


def std(numbers):
    return numbers.std(ddof=1) if len(numbers) > 1 else 0.0


def formula(rewards, groups, method, scale="group"):
    rewards, good = rewards.astype(np.float64), ~np.isnan(rewards)
    advantages = np.zeros(len(rewards))
    for row in np.flatnonzero(good):
        others = rewards[good & (groups == groups[row])]
        if len(others) == 1:
            continue
        if method == "rloo":
            advantages[row] = rewards[row] - (others.sum() - rewards[row]) / (len(others) - 1)
            continue
        advantages[row] = rewards[row] - others.mean()
        if method == "grpo" and scale != "none":
            advantages[row] /= std(others if scale == "group" else rewards[good]) + 1e-4
    if method == "reinforce++" and good.any():
        advantages[good] = (advantages[good] - advantages[good].mean()) / np.sqrt(std(advantages[good]) ** 2 + 1e-8)
    return advantages


def tolerance(rewards):
    """Rounding of the formula's sums of numbers near 100, over a std of at least 1e-4."""
    return {"rtol": np.finfo(rewards.dtype).eps, "atol": 8 * len(rewards) * EPS * 110 * 1e4}


@settings(max_examples=200, deadline=None)
@given(problems(), variants)
def test_equals_the_formula(problem, variant):
    rewards, groups = problem
    got = group_advantages(rewards, groups, **variant)
    assert got.dtype == rewards.dtype
    np.testing.assert_allclose(got, formula(rewards, groups, **variant), **tolerance(rewards))


@settings(max_examples=80, deadline=None)
@given(problems(), variants)
def test_sums_to_zero_in_each_group(problem, variant):
    rewards, groups = problem
    got = group_advantages(rewards, groups, **variant).astype(np.float64)
    for group in np.unique(groups):
        mine = got[groups == group]
        assert abs(mine.sum()) <= 2 * np.finfo(rewards.dtype).eps * np.abs(mine).sum() + 1e-8
    assert not got[np.isnan(rewards)].any()


@settings(max_examples=80, deadline=None)
@given(problems(), variants, st.randoms(use_true_random=False))
def test_order_and_names_of_groups_do_not_matter(problem, variant, random):
    rewards, groups = problem
    order = np.array(random.sample(range(len(rewards)), len(rewards)), dtype=int)
    expected = group_advantages(rewards, groups, **variant)
    shuffled = group_advantages(rewards[order], groups[order], **variant)
    np.testing.assert_allclose(shuffled, expected[order], **tolerance(rewards))
    names = dict(zip(np.unique(groups).tolist(), random.sample(range(-9, 9), 4), strict=False))
    renamed = np.array([names[group] for group in groups.tolist()], dtype=np.int32)
    np.testing.assert_array_equal(group_advantages(rewards, renamed, **variant), expected)


@settings(max_examples=60, deadline=None)
@given(problems(dtypes=(np.float64,)), st.sampled_from([-1000.0, 7.0]))
def test_a_shift_of_all_rewards_does_not_matter(problem, shift):
    rewards, groups = problem
    for variant in VARIANTS:
        expected = group_advantages(rewards, groups, **variant)
        np.testing.assert_allclose(group_advantages(rewards + shift, groups, **variant), expected, rtol=1e-9, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 6), variants)
def test_a_size_is_consecutive_groups(problem, size, variant):
    rewards, _ = problem
    rewards = rewards[: len(rewards) // size * size]
    ids = np.repeat(np.arange(len(rewards) // size), size)
    by_size = group_advantages(rewards, size, **variant)
    np.testing.assert_array_equal(by_size, group_advantages(rewards, ids, **variant))


def trl_grpo(rewards, size, scale):
    """GRPOTrainer's lines, with its nanstd."""
    mean = torch.nanmean(rewards.view(-1, size), dim=1).repeat_interleave(size)
    if scale == "batch":
        deviation = nanstd(rewards).expand_as(rewards)
    else:
        deviation = nanstd(rewards.view(-1, size), dim=1).repeat_interleave(size)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / (deviation + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


def trl_rloo(rewards, size):
    """RLOOTrainer's lines."""
    grouped = rewards.view(-1, size)
    count = (~torch.isnan(grouped)).sum(dim=1, keepdim=True)
    baselines = (torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (count - 1)
    return torch.nan_to_num(rewards - baselines.view(-1), nan=0.0)


@settings(max_examples=60, deadline=None)
@given(problems(dtypes=(np.float64,)), st.integers(2, 6))
def test_equals_trl(problem, size):
    rewards, _ = problem
    rewards = torch.from_numpy(rewards[: len(rewards) // size * size])
    assume(len(rewards))
    for scale in ("group", "batch", "none"):
        got = group_advantages(rewards, size, scale=scale)
        assert isinstance(got, torch.Tensor)
        expected = trl_grpo(rewards, size, scale)
        # nanstd divides two integer tensors: its n / (n - 1) is a float32
        options = tolerance(rewards.numpy()) | {"rtol": np.finfo(np.float32).eps}
        np.testing.assert_allclose(got, expected, **options)
    got = group_advantages(rewards, size, method="rloo")
    np.testing.assert_allclose(got, trl_rloo(rewards, size), **tolerance(rewards.numpy()))


def test_reinforce_is_whitened_dr_grpo():
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(3, 2, 500), rng.integers(0, 60, 500)
    rewards[::7] = np.nan
    centred = group_advantages(rewards, groups, method="dr_grpo")
    expected = whiten(centred, mask=~np.isnan(rewards))
    got = group_advantages(rewards, groups, method="reinforce++")
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reward", [0.1, -1e10 / 3, 1e150])
def test_equal_rewards_give_exactly_0(variant, reward):
    assert group_advantages([reward] * 7, 7, **variant) == [0.0] * 7
    assert group_advantages([reward] * 3 + [float("nan")], 4, **variant) == [0.0] * 4
    assert group_advantages([reward, 5.0], [3, 4], **variant) == [0.0, 0.0]


def test_a_large_common_offset_costs_no_digits():
    assert group_advantages([1e16, 1e16 + 2, -5.0], [0, 0, 1], method="dr_grpo") == [-1.0, 1.0, 0.0]
    assert group_advantages([1e16, 1e16 + 2, -5.0], [0, 0, 1], method="rloo") == [-2.0, 2.0, 0.0]


def test_kinds_and_empty():
    assert group_advantages([1, 3, 10], (5, 5, 6), method="dr_grpo") == [-1.0, 1.0, 0.0]
    got = group_advantages(torch.tensor([1.0, 3.0]), torch.tensor([5, 5], dtype=torch.int32), method="rloo")
    assert isinstance(got, torch.Tensor)
    assert got.tolist() == [-2.0, 2.0]
    assert group_advantages(np.float32([1, 3])[::-1], np.int64(2), method="rloo").tolist() == [2.0, -2.0]
    assert group_advantages([], []) == []
    assert group_advantages([], 4) == []
    assert group_advantages([float("nan")] * 2, 2, method="reinforce++") == [0.0, 0.0]


LIMITS = "rewards must be finite and within +-1e150, or NaN where a completion could not be scored, "


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            LIMITS + "got inf in rows 1 and 3",
            {"rewards": [1.0, np.inf, 2.0, -np.inf]},
        ),
        (
            ValueError,
            LIMITS + "got -1e200 in row 0",
            {"rewards": [-1e200, 1.0, 2.0, 3.0]},
        ),
        (ValueError, "rewards must hold whole groups of 3 rows, got 4 rows", {"groups": 3}),
        (ValueError, "groups must be an integer of at least 1 that fits int64, got 0", {"groups": 0}),
        (TypeError, "groups must be an integer, got bool True", {"groups": True}),
        (ValueError, "rewards and groups must have the same shape, got (4,) and (3,)", {"groups": [1, 2, 3]}),
        (TypeError, "groups must hold integers that fit int64, got float64 (4,)", {"groups": np.ones(4)}),
        (TypeError, "groups[1] must be an integer that fits int64, got str 'a'", {"groups": [1, "a", 2, 3]}),
        (
            ValueError,
            "rewards must have one dimension, one for each completion, got shape (2, 2)",
            {"rewards": np.ones((2, 2))},
        ),
        (TypeError, "rewards must be float32 or float64, got int64 (4,)", {"rewards": np.arange(4)}),
        (TypeError, "rewards[2] must be a number, got NoneType None", {"rewards": [1.0, 2.0, None, 3.0]}),
        (ValueError, "rewards must not require a gradient", {"rewards": torch.ones(4, requires_grad=True)}),
        (ValueError, "method must be one of 'grpo', 'dr_grpo', 'rloo', 'reinforce++', got 'ppo'", {"method": "ppo"}),
        (ValueError, "scale must be one of 'group', 'batch', 'none', got True", {"scale": True}),
        (
            ValueError,
            "scale is for method='grpo', got scale='batch' with method='rloo'",
            {"method": "rloo", "scale": "batch"},
        ),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.group_advantages: {message}")):
        group_advantages(**{"rewards": [1.0, 2.0, 3.0, 4.0], "groups": [0, 0, 1, 1]} | arguments)
