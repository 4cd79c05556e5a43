"""drop_zero_advantage: which rows stay, and that loss and gradient are those of the whole batch."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefkern as pk
from prefkern.data import drop_zero_advantage


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_kept_rows(data):
    rows, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    ids = np.array(data.draw(st.lists(st.integers(-2, 2), min_size=rows, max_size=rows)))
    numbers = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.5, float("nan")])
    per_token = data.draw(st.booleans())
    shape, count = ((rows, width), rows * width) if per_token else ((rows,), rows)
    advantages = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count))).view(shape)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))).view(rows, -1)
    batch = {"advantages": advantages, "completion_mask": mask, "name": list(range(rows)), "width": width}
    batch |= {"array": np.arange(rows)}
    kept = drop_zero_advantage(batch, ids)

    def moves(row):
        values = advantages[row][mask[row]] if per_token else advantages[row : row + 1]
        return bool(mask[row].any()) and any(value != 0 for value in values.tolist())

    expected = [row for row in range(rows) if any(moves(other) for other in range(rows) if ids[other] == ids[row])]
    assert kept.indices.tolist() == kept.batch["name"] == kept.batch["array"].tolist() == expected
    np.testing.assert_array_equal(kept.batch["advantages"], advantages[expected])
    assert kept.batch["width"] == width
    assert (kept.tokens, kept.rows) == (int(mask.sum()), rows)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_loss_is_that_of_all_rows(reduction):
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    batch = {
        "old_logps": logps.detach() + 0.1 * torch.rand(6, 5, generator=generator, dtype=torch.float64),
        "completion_mask": torch.arange(5) < torch.tensor([[5], [2], [3], [1], [4], [5]]),
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0], dtype=torch.float64),
    }

    def loss(batch, logps, **options):
        mask = batch["completion_mask"]
        return pk.ppo_loss(logps, batch["old_logps"], batch["advantages"], mask, reduction=reduction, **options).loss

    kept = drop_zero_advantage(batch, 2)
    assert kept.indices.tolist() == [2, 3]
    normalizer = kept.tokens if reduction == "token" else kept.rows
    whole, part = loss(batch, logps), loss(kept.batch, logps[kept.indices], normalizer=normalizer)
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logps)[0] for value in (whole, part)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)
    assert gradients[0][kept.indices].abs().sum() > 0


def test_nothing_left():
    batch = {"advantages": torch.zeros(2), "completion_mask": torch.ones(2, 3)}
    kept = drop_zero_advantage(batch, 2)
    assert kept.batch["completion_mask"].shape == (0, 3)
    assert (kept.tokens, kept.rows) == (6, 2)


@pytest.mark.parametrize(
    ("batch", "groups", "message"),
    [
        (
            {"advantages": torch.zeros(2)},
            1,
            "batch must have the keys advantages and completion_mask, got ['advantages']",
        ),
        ([1], 1, "batch must have the keys advantages and completion_mask, got a list of 1"),
        (
            {"advantages": torch.zeros(2), "completion_mask": torch.ones(2)},
            1,
            "completion_mask must be [B, T], got float32",
        ),
        (
            {"advantages": torch.zeros(3), "completion_mask": torch.ones(2, 2)},
            1,
            "advantages must be [B] or [B, T] for",
        ),
        (
            {"advantages": torch.zeros(2), "completion_mask": torch.full((2, 2), 2)},
            1,
            "completion_mask must hold only 0 and",
        ),
        (
            {"advantages": torch.zeros(3), "completion_mask": torch.ones(3, 2)},
            2,
            "groups must divide the number of rows, got",
        ),
        (
            {"advantages": torch.zeros(2), "completion_mask": torch.ones(2, 2)},
            [1],
            "groups must hold one id for each of the",
        ),
    ],
)
def test_refused(batch, groups, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"prefkern.data.drop_zero_advantage: {message}")):
        drop_zero_advantage(batch, groups)
