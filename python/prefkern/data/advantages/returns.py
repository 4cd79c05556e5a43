"""Discounted returns on the CPU."""

from typing import Any, Literal

from prefkern import check
from prefkern.data.arrays.grid import grid
from prefkern.data.arrays.views import core, threads

WHERE = "data.discounted_returns"


def discounted_returns(
    rewards: Any,
    *,
    gamma: float = 0.99,
    terminated: Any = None,
    mask: Any = None,
    bootstrap: Any = None,
    masked: Literal["skip", "zero", "none"] = "skip",
    cu_seqlens: Any = None,
) -> Any:
    r"""The discounted sum of the rewards from each position on: ``G_t = r_t + gamma (1 - done_t) G_{t+1}``.

    The returns of `prefkern.data.gae` with ``lam=1``, which need no values. `Reinforcement Learning: An Introduction
    <http://incompleteideas.net/book/the-book-2nd.html>`_, section 3.3.

    ``rewards`` are float32 or float64 ``[B, T]``, or packed ``[N]`` with ``cu_seqlens [S + 1]``: a numpy array or a
    torch CPU tensor, read without a copy where it is contiguous. Lists of lists and Arrow list arrays of unequal
    lengths are taken too. The result is of the same kind, dtype and shape. Sums run in float64.

    ``terminated`` (bool or 0/1, shaped like ``rewards``): nothing after such a position, NaN included, has an effect on
    it. ``bootstrap`` (one value for each row, 0 by default) is the return after the last scored position of a row
    (``masked="skip"``) or after its last position (``"zero"``, ``"none"``).

    ``mask`` (bool or 0/1) marks scored positions; the result is 0 elsewhere. ``masked`` says what the recursion does
    there: ``"skip"`` goes on at the next scored position, ``"zero"`` runs through with reward 0, and neither reads
    anything there; ``"none"`` reads masked positions like any other::

        >>> for masked in ("skip", "zero", "none"):
        ...     discounted_returns([[1, 2, 8]], gamma=0.5, mask=[[1, 0, 1]], masked=masked)
        [[5.0, 0.0, 8.0]]
        [[3.0, 0.0, 8.0]]
        [[4.0, 0.0, 8.0]]

    Raises ValueError or TypeError for shapes or dtypes that differ, a ``gamma`` outside ``[0, 1]``, masks that are not
    0 and 1, offsets that decrease, tensors on an accelerator or that require a gradient.
    """
    gamma = check.number(WHERE, "gamma", gamma, low=0.0, high=1.0)
    check.one_of(WHERE, "masked", masked, ("skip", "zero", "none"))
    rows = grid(WHERE, "rewards", rewards, cu_seqlens)
    returns = rows.fresh()
    core().discounted_returns(
        rows.cells,
        returns,
        gamma=gamma,
        masked=masked,
        terminated=rows.flags("terminated", terminated),
        mask=rows.flags("mask", mask),
        bootstrap=None if bootstrap is None else rows.per_row("bootstrap", bootstrap),
        cu_seqlens=rows.offsets,
        threads=threads(),
    )
    return rows.restore(returns)
