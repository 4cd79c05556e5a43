"""Rewards of tokens for PPO, from the score of their completion."""

from typing import Any, Literal

from prefkern import check
from prefkern.data.arrays.grid import grid
from prefkern.data.arrays.views import core, threads

WHERE = "data.token_rewards"


def token_rewards(
    logps: Any,
    ref_logps: Any,
    scores: Any,
    *,
    mask: Any = None,
    kl_coef: float = 0.05,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    score_at: Literal["last", "after_last"] = "last",
    cu_seqlens: Any = None,
) -> Any:
    r"""``-kl_coef k`` at every scored position, and the row's score added at the last scored one; 0 elsewhere.

    k estimates ``KL(policy || reference)`` with ``x = lp_ref - lp``: k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - x - 1``.
    `Fine-Tuning Language Models from Human Preferences <https://arxiv.org/abs/1909.08593>`_.

    ``logps`` and ``ref_logps``: float32 or float64 ``[B, T]``, or packed ``[N]`` with ``cu_seqlens [S + 1]``, as numpy
    arrays or torch CPU tensors; lists of lists and Arrow list arrays of unequal lengths too. ``scores``: one for each
    row. ``mask`` (bool or 0/1) marks scored positions; others are not read. The result is of the kind of ``logps``.
    Sums run in float64.

    ``score_at="after_last"`` puts the score on the position after the last scored one, which is the first padding, and
    on the last scored one only where the row ends there. TRL's PPOTrainer does so; `prefkern.data.gae` then reads it
    with ``masked="none"``, and needs values there::

        >>> for score_at in ("last", "after_last"):
        ...     token_rewards([[-1, -2, 0]], [[-2, -2, 0]], [8], mask=[[1, 1, 0]], kl_coef=0.5, score_at=score_at)
        [[-0.5, 8.0, 0.0]]
        [[-0.5, 0.0, 8.0]]

    Raises ValueError or TypeError for scores that are not finite, a score other than 0 in a row without a scored
    position, a penalty that is NaN or infinite (each with its rows), shapes or dtypes that differ, a negative
    ``kl_coef``, masks that are not 0 and 1, tensors on an accelerator or that require a gradient.
    """
    kl_coef = check.number(WHERE, "kl_coef", kl_coef, low=0.0)
    check.one_of(WHERE, "kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    check.one_of(WHERE, "score_at", score_at, ("last", "after_last"))
    rows = grid(WHERE, "logps", logps, cu_seqlens)
    rewards = rows.fresh()
    core().token_rewards(
        rows.cells,
        rows.like("ref_logps", ref_logps),
        rows.per_row("scores", scores),
        rewards,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        after_last=score_at == "after_last",
        mask=rows.flags("mask", mask),
        cu_seqlens=rows.offsets,
        threads=threads(),
    )
    return rows.restore(rewards)
