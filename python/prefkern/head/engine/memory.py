"""Bytes that earlier forwards of the head still hold for a backward that has not run, per device.

Several forwards before one backward (policy and reference, chosen and rejected, micro-batches of one loss) share one
``max_memory``. Counted by the storages that are alive, so that a graph that is dropped counts no more; the same program
gives the same counts. Under compilation memory is planned by the compiler, and nothing is counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MIN_HELD_BYTES = 1 << 30


class Limits(NamedTuple):
    """Rows that are kept at most: of unscaled gradient ``[K, V]``, and of a frozen head's gradient ``[F, H]``."""

    held: int
    frozen: int


def budget(H: int, V: int, max_memory: int | None) -> int:
    """Returns the bytes that may stay held: ``max_memory``, or the ``4 V H`` that a float32 accumulator of grad_weight
    would take, and at least 1 GiB."""
    return max(4 * V * H, MIN_HELD_BYTES) if max_memory is None else max_memory


def limits(H: int, V: int, itemsize: int, bytes_: int, *, frozen: bool = False, entropy_grad: bool = False) -> Limits:
    """Returns the rows of ``itemsize`` bytes per entry that fit into so many bytes. Independent of N: one graph for all
    lengths."""
    if frozen:
        return Limits(0, bytes_ // (H * itemsize * (1 + entropy_grad)))
    return Limits(bytes_ // (V * itemsize), 0)


_held: dict[torch.device, list[tuple[Any, int]]] = {}


def watch(kept: Sequence[Tensor]) -> None:
    """Counts these tensors' bytes for as long as anything keeps their storage."""
    if torch.compiler.is_compiling():
        return
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            weak: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            _held.setdefault(tensor.device, []).append((weak, storage.nbytes()))


def held_bytes(device: torch.device) -> int:
    """Returns the bytes held on a device now."""
    alive = [(storage, nbytes) for storage, nbytes in _held.get(device, ()) if not storage.expired()]
    _held[device] = alive
    return sum(nbytes for _, nbytes in alive)


def left(budget: int, device: torch.device) -> int:
    """Returns the part of a budget that earlier forwards have not taken."""
    return budget if torch.compiler.is_compiling() else max(0, budget - held_bytes(device))
