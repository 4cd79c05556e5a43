"""Statistics of scored numbers, over one process or several, and whitening by them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from prefkern import check
from prefkern.data.arrays.grid import Grid, any_shape
from prefkern.data.arrays.views import Array, core, threads
from prefkern.data.types import MaskedStats

VARIANCE_EPSILON = 1e-8


def masked_stats(x: Any, *, mask: Any = None) -> MaskedStats:
    """Number, mean and sum of squared deviations of the numbers where ``mask`` is set, in float64.

    Two passes over blocks, merged by Chan's formula: as exact under a large common offset as without one. `Algorithms
    for Computing the Sample Variance <https://doi.org/10.1080/00031305.1983.10483115>`_. The number of threads does not
    change the result.

    ``x`` is float32 or float64, of any shape: a numpy array, a torch CPU tensor, a list, a list of lists, an Arrow list
    array. ``mask`` (bool or 0/1) has its shape; masked numbers are not read. ``MaskedStats(n, mean, m2)`` of parts
    of the data, such as ranks or batches, `merge` into those of the whole::

        >>> masked_stats([1.0, 2.0]).merge(masked_stats([3.0, 6.0, 9.0], mask=[1, 1, 0]))
        MaskedStats(n=4, mean=3.0, m2=14.0)

    Nothing scored: n, mean and m2 are 0. A NaN that is scored makes mean and m2 NaN. Raises ValueError or TypeError
    for shapes that differ, other dtypes, masks that are not 0 and 1, tensors on an accelerator or that require a
    gradient.
    """
    cells = any_shape("data.masked_stats", "x", x)
    return _stats(cells, cells.flags("mask", mask))


def whiten(x: Any, *, mask: Any = None, keep_mean: bool = False, group: "dist.ProcessGroup | None" = None) -> Any:
    """Numbers shifted to mean 0 and scaled to variance 1: ``(x - mean) / sqrt(var + 1e-8)``, 0 where masked.

    ``mean`` and ``var = m2 / (n - 1)`` are those of the n scored numbers (`masked_stats`). With ``keep_mean`` the mean
    is added again, as PPO does with rewards. `Secrets of RLHF in Large Language Models Part I: PPO
    <https://arxiv.org/abs/2307.04964>`_. With fewer than two scored numbers the variance is 0.

    ``x`` is float32 or float64, of any shape: a numpy array, a torch CPU tensor, a list, a list of lists, an Arrow list
    array. ``mask`` (bool or 0/1) has its shape. The result is of the kind, dtype and shape of ``x``.

    ``group``, a process group of ``torch.distributed``, takes the statistics over all its ranks: each rank passes its
    own numbers (or none) and all of them must call; three float64 numbers a rank are exchanged. Ranks get the same mean
    and variance to the last bit.

    Raises ValueError or TypeError for scored numbers that are NaN or infinite (on every rank, where one has such),
    shapes that differ, other dtypes, masks that are not 0 and 1, tensors on an accelerator or that require a gradient.
    """
    where = "data.whiten"
    cells = any_shape(where, "x", x)
    flags = cells.flags("mask", mask)
    stats = finite_stats(cells, _stats(cells, flags), group, functools.partial(_refuse, cells, flags))
    out = cells.fresh()
    standardise(cells, stats, cells.cells, out, flags, shift=stats.mean if keep_mean else 0.0)
    return cells.restore(out)


def finite_stats(
    cells: Grid, stats: MaskedStats, group: "dist.ProcessGroup | None", refuse: Callable[[], NoReturn]
) -> MaskedStats:
    """The statistics over all ranks of the group; ``refuse`` says what is not finite, where they are not."""
    if group is not None:
        stats = _over_ranks(cells.where, stats, group)
    if not math.isfinite(stats.mean) or not math.isfinite(stats.m2):
        refuse()
    return stats


def standardise(
    cells: Grid,
    stats: MaskedStats,
    x: Array,
    out: Array,
    flags: Array | None,
    *,
    shift: float = 0.0,
) -> None:
    """Fills ``out``, which may be ``x``: mean ``shift`` and variance 1, rounded once."""
    core().standardise(
        f"prefkern.{cells.where}",
        x,
        out,
        center=stats.mean,
        scale=1 / math.sqrt(stats.variance + VARIANCE_EPSILON),
        shift=shift,
        mask=flags,
        threads=threads(),
    )


def _stats(cells: Grid, flags: Array | None) -> MaskedStats:
    found = core().masked_moments(f"prefkern.{cells.where}", cells.cells, mask=flags, threads=threads())
    return MaskedStats(*found)


def _over_ranks(where: str, stats: MaskedStats, group: "dist.ProcessGroup") -> MaskedStats:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        check.fail_type(
            where, f"group must be a process group that this process belongs to, got {check.describe(group)}"
        )
    mine = torch.tensor(stats, dtype=torch.float64, device=_device(group))
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    ranks = [MaskedStats(int(n), mean, m2) for n, mean, m2 in (part.tolist() for part in gathered)]
    return functools.reduce(MaskedStats.merge, ranks)


def _device(group: "dist.ProcessGroup") -> torch.device:
    """Where the group's tensors must lie: NCCL, for one, takes none on the CPU."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return torch.device(accelerator.type if accelerator else "cpu", torch.accelerator.current_device_index())


def _refuse(cells: Grid, flags: Array | None) -> NoReturn:
    at = cells.not_finite(cells.cells, flags)
    if at is None:
        check.fail(cells.where, "x has a variance beyond float64, or another rank's x is not finite")
    check.fail(cells.where, f"x must be finite where it is scored, got {at}; mask it")
