"""Generalised advantage estimation on the CPU."""

from typing import Any, Literal

import numpy as np

from prefkern import _check
from prefkern.data._arrays import Array, core, flags, floats, indices, is_array, is_arrow, threads, vector, view
from prefkern.data._ragged import Ragged, is_column, like_array, like_column, ragged, rectangle, same_rows
from prefkern.types import Advantages

WHERE = "data.gae"


def gae(
    rewards: Any,
    values: Any,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    terminated: Any = None,
    mask: Any = None,
    bootstrap: Any = None,
    masked: Literal["skip", "zero", "none"] = "skip",
    cu_seqlens: Any = None,
    out: tuple[Any, Any] | None = None,
) -> Advantages:
    r"""Advantages and returns of each row, last position first.

    ``delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t``, ``A_t = delta_t + gamma lam (1 - done_t) A_{t+1}``, and the
    returns are ``A + V``. `High-Dimensional Continuous Control Using Generalized Advantage Estimation
    <https://arxiv.org/abs/1506.02438>`_.

    ``rewards`` and ``values`` are float32 or float64 ``[B, T]``, or packed ``[N]`` with ``cu_seqlens [S + 1]``: numpy
    arrays or torch CPU tensors, read without a copy where they are contiguous. Lists of lists and Arrow list arrays of
    unequal lengths are taken too. The result is of the kind of ``rewards``. Sums run in float64.

    ``terminated`` (bool or 0/1, shaped like ``rewards``): nothing after such a position, NaN included, has an effect on
    it. A truncation is not a termination: end the row there and give its ``bootstrap``.

    ``bootstrap`` (one value for each row, 0 by default) is the value after the last scored position of a row
    (``masked="skip"``) or after its last position (``"zero"``, ``"none"``).

    ``mask`` (bool or 0/1) marks scored positions. Both outputs are 0 elsewhere. ``masked`` says what the recursion does
    there: ``"skip"`` goes on at the next scored position, as verl does; ``"zero"`` runs through with reward and value
    0, as OpenRLHF does; neither reads anything at a masked position, terminations included. ``"none"`` reads masked
    positions like any other, for a score that was put on the first padding token, as TRL does. One row, three ways::

        >>> for masked in ("skip", "zero", "none"):
        ...     gae([[1, 2, 3]], [[2, 4, 8]], gamma=0.5, lam=0.5, mask=[[1, 0, 1]], masked=masked).advantages
        [[1.75, 0.0, -5.0]]
        [[-0.3125, 0.0, -5.0]]
        [[1.1875, 0.0, -5.0]]

    ``out=(advantages, returns)``: contiguous arrays to write into, which spares the first touch of fresh memory. Each
    may be exactly ``rewards`` or ``values``; any other overlap is refused.

    Raises ValueError or TypeError for shapes or dtypes that differ, values outside ``[0, 1]`` of ``gamma`` and ``lam``,
    masks that are not 0 and 1, offsets that decrease, tensors on an accelerator or that require a gradient.
    """
    gamma = _check.number(WHERE, "gamma", gamma, low=0.0, high=1.0)
    lam = _check.number(WHERE, "lam", lam, low=0.0, high=1.0)
    _check.one_of(WHERE, "masked", masked, ("skip", "zero", "none"))
    options = {"gamma": gamma, "lam": lam, "masked": masked}
    if is_arrow(rewards) or (is_column(rewards) and cu_seqlens is None):
        return _rows_of_lists(rewards, values, terminated, mask, bootstrap, cu_seqlens, out, options)

    first = floats(WHERE, "rewards", vector(WHERE, "rewards", rewards, integers=False))
    second = _like(first, "values", vector(WHERE, "values", values, integers=False))
    offsets = None if cu_seqlens is None else indices(WHERE, "cu_seqlens", cu_seqlens)
    targets = _fresh(first) if out is None else _outputs(out, first)
    core().gae(
        first,
        second,
        *targets,
        terminated=_flags("terminated", terminated, flat=offsets is not None),
        mask=_flags("mask", mask, flat=offsets is not None),
        bootstrap=_bootstrap(bootstrap, first),
        cu_seqlens=offsets,
        threads=threads(),
        **options,
    )
    if out is not None:
        return Advantages(*out)
    return Advantages(*(like_array(target, rewards) for target in targets))


def _rows_of_lists(
    rewards: Any,
    values: Any,
    terminated: Any,
    mask: Any,
    bootstrap: Any,
    cu_seqlens: Any,
    out: Any,
    options: dict[str, Any],
) -> Advantages:
    if cu_seqlens is not None:
        _check.fail(WHERE, "cu_seqlens is for packed arrays; rows that are lists have lengths of their own")
    if out is not None:
        _check.fail(WHERE, "out needs rewards that are a numpy array or a torch tensor")
    first = ragged(WHERE, "rewards", rewards, integers=False)
    second = ragged(WHERE, "values", values, integers=False)
    same_rows(WHERE, "values", second, "rewards", first)
    flat = floats(WHERE, "rewards", first.values)
    targets = _fresh(flat)
    core().gae(
        flat,
        _like(flat, "values", second.values),
        *targets,
        terminated=_ragged_flags("terminated", terminated, first),
        mask=_ragged_flags("mask", mask, first),
        bootstrap=_bootstrap(bootstrap, flat),
        cu_seqlens=first.offsets,
        threads=threads(),
        **options,
    )
    return Advantages(*(like_column(target, first.offsets, rewards) for target in targets))


def _like(rewards: Array, name: str, array: Array) -> Array:
    if array.dtype != rewards.dtype:
        _check.fail_type(WHERE, f"rewards and {name} must have the same dtype, got {rewards.dtype} and {array.dtype}")
    return floats(WHERE, name, array)


def _flags(name: str, given: Any, *, flat: bool) -> Array | None:
    if given is None:
        return None
    if is_array(given):
        array = view(WHERE, name, given)
    elif flat:
        array = vector(WHERE, name, given, integers=True)
    else:
        array = rectangle(WHERE, name, given)
    return flags(WHERE, name, array)


def _ragged_flags(name: str, given: Any, like: Ragged) -> Array | None:
    if given is None:
        return None
    rows = ragged(WHERE, name, given, integers=True)
    same_rows(WHERE, name, rows, "rewards", like)
    return flags(WHERE, name, rows.values)


def _bootstrap(given: Any, rewards: Array) -> Array | None:
    if given is None:
        return None
    array = vector(WHERE, "bootstrap", given, integers=False)
    if isinstance(given, list | tuple):
        array = array.astype(rewards.dtype)
    return _like(rewards, "bootstrap", array)


def _fresh(like: Array) -> tuple[Array, Array]:
    return np.empty(like.shape, like.dtype), np.empty(like.shape, like.dtype)


def _outputs(out: Any, rewards: Array) -> tuple[Array, Array]:
    if not isinstance(out, list | tuple) or len(out) != 2:
        _check.fail_type(WHERE, f"out must be the pair (advantages, returns), got {_check.describe(out)}")
    first, second = (view(WHERE, f"out[{index}]", array) for index, array in enumerate(out))
    for name, array in (("out[0]", first), ("out[1]", second)):
        if array.dtype != rewards.dtype:
            _check.fail_type(
                WHERE, f"rewards and {name} must have the same dtype, got {rewards.dtype} and {array.dtype}"
            )
    return first, second
