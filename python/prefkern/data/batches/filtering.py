"""Rows that cannot move a policy, dropped before the backbone reads them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from prefkern import check
from prefkern.data.arrays.views import describe, indices, whole
from prefkern.data.types import Kept

WHERE = "data.drop_zero_advantage"


def drop_zero_advantage(
    batch: Mapping[str, Any],
    groups: Any = 1,
    *,
    advantages: str = "advantages",
    mask: str = "completion_mask",
) -> Kept:
    """The batch without the groups whose advantages are all zero, which cost a forward and move nothing.

    ``batch``: a mapping with the tensors ``advantages`` ``[B]`` or ``[B, T]`` and ``mask [B, T]`` (bool or 0/1). Its
    tensors and numpy arrays of B rows lose those of the dropped groups; lists of B elements too; everything else stays
    as it is. ``groups``: integer ids ``[B]``, or one integer, the size of consecutive groups (1: every row for itself).
    Advantages ``[B, T]`` count where ``mask`` is 1. A NaN advantage is not zero. DAPO's dynamic sampling, without the
    sampling: `DAPO <https://arxiv.org/abs/2503.14476>`_.

    ``Kept(indices, batch, tokens, rows)``: the kept rows in their order, their batch, and the number of scored tokens
    and of rows before anything was dropped. With ``normalizer=kept.tokens`` (token means) or ``kept.rows`` (means over
    sequences) in a policy loss such as `prefkern.ppo_loss`, loss and gradient are those of the whole batch. That holds
    for the policy term only: with a KL penalty, an entropy bonus or a value loss, zero-advantage rows still pull.

        >>> import torch
        >>> full = {"input_ids": torch.arange(8).view(4, 2), "completion_mask": torch.ones(4, 2)}
        >>> kept = drop_zero_advantage(full | {"advantages": torch.tensor([0.0, 0.0, 1.0, -1.0])}, 2)
        >>> kept.indices.tolist(), kept.batch["input_ids"].tolist(), kept.tokens, kept.rows
        ([2, 3], [[4, 5], [6, 7]], 8, 4)

    Where all advantages are zero, no row is left: a process whose peers wait for its gradients must still run its
    backward. Raises ValueError or TypeError for missing keys, shapes that differ and sizes that do not divide B.
    """
    for name in (advantages, mask):
        if not isinstance(batch, Mapping) or name not in batch:
            given = list(batch) if isinstance(batch, Mapping) else describe(batch)
            check.fail(WHERE, f"batch must have the keys {advantages} and {mask}, got {given}")
    values, scored = torch.as_tensor(batch[advantages]), torch.as_tensor(batch[mask])
    if scored.ndim != 2:
        check.fail(WHERE, f"{mask} must be [B, T], got {describe(scored)}")
    kept_cells = check.mask(WHERE, mask, scored, scored.shape)
    assert kept_cells is not None
    rows = len(scored)
    if values.shape not in (scored.shape, scored.shape[:1]):
        check.fail(
            WHERE, f"{advantages} must be [B] or [B, T] for {mask} {tuple(scored.shape)}, got {describe(values)}"
        )
    alive = values != 0
    if values.ndim == 2:
        alive = (alive & kept_cells).any(dim=1)
    alive = alive & kept_cells.any(dim=1)
    group_of = torch.from_numpy(_group_of(groups, rows)).to(alive.device)
    hits = torch.zeros(rows, dtype=torch.int64, device=alive.device).index_add(0, group_of, alive.long())
    keep = (hits[group_of] > 0).nonzero().flatten()
    chosen = {name: _select(value, keep, rows) for name, value in batch.items()}
    return Kept(keep, chosen, int(kept_cells.sum()), rows)


def _group_of(groups: Any, rows: int) -> Any:
    """The group of each row, numbered from 0."""
    if isinstance(groups, int | np.integer):
        size = whole(WHERE, "groups", groups, low=1)
        if rows % size:
            check.fail(WHERE, f"groups must divide the number of rows, got groups of {size} and {rows} rows")
        return np.arange(rows) // size
    given = groups.cpu() if isinstance(groups, torch.Tensor) else groups
    ids = indices(WHERE, "groups", given)
    if len(ids) != rows:
        check.fail(WHERE, f"groups must hold one id for each of the {rows} rows, got {len(ids)}")
    return np.unique(ids, return_inverse=True)[1].reshape(-1)


def _select(value: Any, keep: torch.Tensor, rows: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
        return value[keep.to(value.device)]
    if isinstance(value, np.ndarray) and value.ndim and len(value) == rows:
        return value[keep.cpu().numpy()]
    if isinstance(value, list) and len(value) == rows:
        return [value[index] for index in keep.tolist()]
    return value
