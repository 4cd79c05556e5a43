"""token_rewards against TRL 1.12's lines and the definition in float64."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern import _core
from prefkern.data.advantages.gae import gae
from prefkern.data.advantages.rewards import token_rewards
from prefkern.losses.ratios import kl_penalty

PLACES = ("last", "after_last")
KINDS = ("k1", "k2", "k3")


@st.composite
def cases(draw, contiguous=False):
    rows, width = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    logps, ref = (-np.abs(rng.normal(0, 2, (2, rows, width)))).astype(dtype)
    if contiguous:
        mask = np.arange(width) < rng.integers(1, width + 1, rows).reshape(-1, 1)
    else:
        mask = rng.random((rows, width)) < 0.6
        mask[np.arange(rows), rng.integers(0, width, rows)] = True
    return {"logps": logps, "ref_logps": ref, "scores": rng.normal(0, 3, rows).astype(dtype), "mask": mask}


def tolerance(case):
    return {"rtol": np.finfo(case["logps"].dtype).eps, "atol": 1e-13}


def definition(logps, ref_logps, scores, mask, kl_coef, kl_estimator, score_at):
    kl = kl_penalty(torch.from_numpy(logps).double(), torch.from_numpy(ref_logps).double(), kl_estimator).numpy()
    rewards = np.where(mask, -kl_coef * kl, 0)
    for row, score in enumerate(scores):
        place = np.flatnonzero(mask[row])[-1]
        if score_at == "after_last" and place + 1 < mask.shape[1]:
            place += 1
        rewards[row, place] += np.float64(score)
    return rewards


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.05, 2.0]), st.sampled_from(KINDS), st.sampled_from(PLACES))
def test_equals_the_definition(case, kl_coef, kl_estimator, score_at):
    options = {"kl_coef": kl_coef, "kl_estimator": kl_estimator, "score_at": score_at}
    got = token_rewards(**case, **options)
    assert got.dtype == case["logps"].dtype
    np.testing.assert_allclose(got, definition(**case, **options), **tolerance(case))


def trl_rewards(logprobs, ref_logprobs, scores, sequence_lengths, kl_coef, kl_estimator):
    """PPOTrainer of TRL 1.12; ``sequence_lengths`` are the positions of the last tokens."""
    padding = torch.arange(logprobs.shape[1]) > sequence_lengths.unsqueeze(1)
    logprobs, ref_logprobs = (x.masked_fill(padding, 1.0) for x in (logprobs, ref_logprobs))
    logr = ref_logprobs - logprobs
    kl = -logr if kl_estimator == "k1" else (logr.exp() - 1) - logr
    rewards = -kl_coef * kl
    after = sequence_lengths + 1
    end = torch.where(after < rewards.size(1), after, sequence_lengths)
    rewards[torch.arange(len(rewards)), end] += scores
    return rewards


@settings(max_examples=80, deadline=None)
@given(cases(contiguous=True), st.sampled_from(("k1", "k3")))
def test_equals_trl(case, kl_estimator):
    tensors = {name: torch.from_numpy(array) for name, array in case.items()}
    last = tensors["mask"].sum(1) - 1
    wide = [tensors[name].double() for name in ("logps", "ref_logps", "scores")]
    expected = trl_rewards(*wide, last, 0.05, kl_estimator)
    got = token_rewards(**tensors, kl_estimator=kl_estimator, score_at="after_last")
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got, expected, **tolerance(case))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(PLACES), st.sampled_from([np.nan, np.inf]))
def test_unscored_positions_are_never_read(case, score_at, garbage):
    dirty = case | {n: np.where(case["mask"], case[n], case[n].dtype.type(garbage)) for n in ("logps", "ref_logps")}
    np.testing.assert_array_equal(token_rewards(**dirty, score_at=score_at), token_rewards(**case, score_at=score_at))


@settings(max_examples=60, deadline=None)
@given(cases(contiguous=True), st.sampled_from(PLACES), st.sampled_from(KINDS))
def test_packed_and_lists_equal_padded(case, score_at, kl_estimator):
    mask, options = case["mask"], {"score_at": score_at, "kl_estimator": kl_estimator}
    keep = np.arange(mask.shape[1]) < (mask.sum(1) + 1).reshape(-1, 1)  # one padding position, where there is one
    lengths = keep.sum(1)
    padded = token_rewards(**case, **options)
    flat = {name: array if name == "scores" else array[keep] for name, array in case.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.testing.assert_array_equal(token_rewards(**flat, cu_seqlens=offsets, **options), padded[keep])
    columns = {
        name: list(array) if name == "scores" else [row[:n].tolist() for row, n in zip(array, lengths, strict=True)]
        for name, array in (case | {"mask": mask.astype(int)}).items()
    }
    rows = token_rewards(**columns, **options)
    np.testing.assert_allclose(np.concatenate([*rows, []]), padded[keep], **tolerance(case))


def test_a_small_divergence_keeps_its_digits():
    x = 2.0 ** -np.arange(10, 24, dtype=float)  # exact as a difference from -1
    got = -token_rewards(np.full((1, 14), -1.0), -1.0 + x[None], [0.0], kl_coef=1.0, kl_estimator="k3")[0]
    series = x**2 / 2 + x**3 / 6 + x**4 / 24 + x**5 / 120
    assert (np.abs(got - series) <= 4 * np.finfo(float).eps * x).all()


def test_the_two_places_give_one_discounted_sum_without_discount():
    rng = np.random.default_rng(0)
    logps, ref = -rng.random((2, 3, 6))
    mask = np.arange(6) < np.array([[3], [6], [1]])
    sums = []
    for score_at, masked in (("last", "skip"), ("after_last", "none")):
        rewards = token_rewards(logps, ref, [1.0, 2.0, 3.0], mask=mask, score_at=score_at)
        sums.append(gae(rewards, np.zeros_like(rewards), gamma=1, lam=1, mask=mask, masked=masked).advantages)
    np.testing.assert_allclose(*sums, rtol=1e-14)


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    logps, ref = rng.normal(size=(2, 300, 4096)).astype(np.float32)
    scores, results = rng.normal(size=300).astype(np.float32), []
    for threads in (1, 2, 7):
        results.append(np.full_like(logps, np.nan))
        options = {"kl_coef": 0.1, "kl_estimator": "k2", "after_last": False}
        _core.token_rewards(logps, ref, scores, results[-1], **options, threads=threads)
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert np.isfinite(results[0]).all()


def test_kinds():
    arrow = pa.array([[-1.0, -2.0], [-3.0]], pa.large_list(pa.float32()))
    got = token_rewards(arrow, arrow, [4, 5])
    assert got.type == arrow.type
    assert got.to_pylist() == [[0.0, 4.0], [5.0]]
    assert token_rewards([], [], []) == []
    assert token_rewards(np.zeros((2, 0)), np.zeros((2, 0)), [0, 0]).shape == (2, 0)
    silent = token_rewards([[-1.0], [-1.0]], [[-2.0], [-2.0]], [0, 3], mask=[[0], [1]], kl_coef=0)
    assert silent == [[0.0], [3.0]]


ROWS = np.full((3, 2), -1.0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "scores must be finite, got nan in rows 0 and 2: drop rows", {"scores": [np.nan, 1, np.inf]}),
        (
            ValueError,
            "scores of rows without a scored position must be 0, because nothing can carry them, got others in row 1",
            {"mask": [[1, 1], [0, 0], [0, 1]]},
        ),
        (ValueError, "scores must hold one value for each of the 3 rows, got shape (2,)", {"scores": [1, 2]}),
        (
            TypeError,
            "logps and scores must have the same dtype, got float64 and float32",
            {"scores": np.ones(3, np.float32)},
        ),
        (
            ValueError,
            "logps and ref_logps must give a finite penalty at every scored position, got NaN or infinity in row 2",
            {"ref_logps": np.array([[-1.0, -1], [-1, -1], [-1, -np.inf]])},
        ),
        (
            ValueError,
            "logps and ref_logps must give a finite penalty at every scored position, got NaN or infinity in row 0",
            {"logps": np.array([[-1e4, -1], [-1, -1], [-1, -1]]), "kl_estimator": "k3"},
        ),
        (
            ValueError,
            "logps and ref_logps must have the same shape, got (3, 2) and (2, 3)",
            {"ref_logps": ROWS.reshape(2, 3)},
        ),
        (ValueError, "logps and mask must have the same shape, got (3, 2) and (3, 3)", {"mask": np.ones((3, 3), bool)}),
        (
            ValueError,
            "logps must be [B, T], or packed [N] with cu_seqlens, got shape (3, 2) with cu_seqlens",
            {"cu_seqlens": [0, 6]},
        ),
        (ValueError, "kl_coef must be a finite number in [0.0, inf), got -1", {"kl_coef": -1}),
        (ValueError, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'", {"kl_estimator": "k4"}),
        (ValueError, "score_at must be one of 'last', 'after_last', got 'first'", {"score_at": "first"}),
        (ValueError, "logps must not require a gradient", {"logps": torch.ones(3, 2, requires_grad=True)}),
    ],
)
def test_refusals(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(f"prefkern.data.token_rewards: {message}")):
        token_rewards(**{"logps": ROWS, "ref_logps": ROWS, "scores": [1.0, 2.0, 3.0]} | arguments)
