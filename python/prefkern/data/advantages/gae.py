"""Generalised advantage estimation on the CPU."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from prefkern import check
from prefkern.data.advantages.moments import finite_stats, standardise
from prefkern.data.arrays.grid import Grid, grid
from prefkern.data.arrays.views import Array, core, threads, view
from prefkern.data.types import Advantages, MaskedStats

if TYPE_CHECKING:
    import torch.distributed as dist

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
    whiten: bool = False,
    group: "dist.ProcessGroup | None" = None,
    exact: bool = False,
) -> Advantages:
    r"""Advantages and returns of each row, last position first.

    ``delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t``, ``A_t = delta_t + gamma lam (1 - done_t) A_{t+1}``, and the
    returns are ``A + V``. `High-Dimensional Continuous Control Using Generalized Advantage Estimation
    <https://arxiv.org/abs/1506.02438>`_.

    ``rewards`` and ``values`` are float32 or float64 ``[B, T]``, or packed ``[N]`` with ``cu_seqlens [S + 1]``: numpy
    arrays or torch CPU tensors, read without a copy where they are contiguous. Lists of lists and Arrow list arrays of
    unequal lengths are taken too. The result is of the kind of ``rewards``.

    Sums run in float64 and are rounded once; threads, other rows and padding change no digit, nor does the processor.
    float64 is summed cell by cell. float32 is summed eight cells at a time, in less than half the time, and
    ``exact=True`` sums it cell by cell too: then masked positions within a row change no digit either (else one in many
    millions, where a sum lies in the middle between two float32).

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

    ``whiten=True`` shifts and scales the scored advantages to mean 0 and variance 1, as `whiten` does; the returns are
    those of the advantages before. ``group`` takes the statistics over the ranks of a process group, all of which must
    call.

    ``out=(advantages, returns)``: contiguous arrays to write into, which spares the first touch of fresh memory. Each
    may be exactly ``rewards`` or ``values``, unless ``whiten`` is set; any other overlap is refused.

    Raises ValueError or TypeError for shapes or dtypes that differ, values outside ``[0, 1]`` of ``gamma`` and ``lam``,
    masks that are not 0 and 1, offsets that decrease, tensors on an accelerator or that require a gradient; with
    ``whiten`` for advantages that are NaN or infinite (on every rank, where one has such).
    """
    gamma = check.number(WHERE, "gamma", gamma, low=0.0, high=1.0)
    lam = check.number(WHERE, "lam", lam, low=0.0, high=1.0)
    check.one_of(WHERE, "masked", masked, ("skip", "zero", "none"))
    rows = grid(WHERE, "rewards", rewards, cu_seqlens)
    if rows.lists and out is not None:
        check.fail(WHERE, "out needs rewards that are a numpy array or a torch tensor")
    second = rows.like("values", values)
    targets = (rows.fresh(), rows.fresh()) if out is None else _outputs(out, rows.cells)
    if group is not None and not whiten:
        check.fail(WHERE, "group is for whiten=True: nothing else is taken over ranks")
    scored = rows.flags("mask", mask)
    found = core().gae(
        rows.cells,
        second,
        *targets,
        gamma=gamma,
        lam=lam,
        masked=masked,
        terminated=rows.flags("terminated", terminated),
        exact=bool(exact),
        moments=bool(whiten),
        mask=scored,
        bootstrap=None if bootstrap is None else rows.per_row("bootstrap", bootstrap),
        cu_seqlens=rows.offsets,
        threads=threads(),
    )
    if whiten:
        stats = finite_stats(rows, MaskedStats(*found), group, partial(_not_finite, rows, second, scored, masked))
        standardise(rows, stats, targets[0], targets[0], scored)
    if out is not None:
        return Advantages(*out)
    return Advantages(*(rows.restore(target) for target in targets))


def _not_finite(rows: Grid, values: Array, scored: Array | None, masked: str) -> NoReturn:
    for name, cells in (("rewards", rows.cells), ("values", values)):
        at = rows.not_finite(cells, None if masked == "none" else scored)
        if at is not None:
            check.fail(WHERE, f"{name} must be finite where they are read to be whitened, got {at}")
    check.fail(WHERE, "advantages have a variance beyond float64, or those of another rank are not finite")


def _outputs(out: Any, rewards: Array) -> tuple[Array, Array]:
    if not isinstance(out, list | tuple) or len(out) != 2:
        check.fail_type(WHERE, f"out must be the pair (advantages, returns), got {check.describe(out)}")
    return _output("out[0]", out[0], rewards), _output("out[1]", out[1], rewards)


def _output(name: str, given: Any, rewards: Array) -> Array:
    array = view(WHERE, name, given)
    if array.dtype != rewards.dtype:
        check.fail_type(WHERE, f"rewards and {name} must have the same dtype, got {rewards.dtype} and {array.dtype}")
    return array
