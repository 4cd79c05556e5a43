"""Which rows go together: parts of equal work, and batches under a budget of tokens."""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefkern import check
from prefkern.data.arrays.views import Array, core, whole
from prefkern.data.batches.packing import integers

Indices = npt.NDArray[np.int64]


def balance(lengths: Any, k: int, *, equal_size: bool = False) -> list[Indices]:
    """The indices of ``lengths`` in k parts whose sums differ little, by the largest differencing method.

    ``lengths [n]``: integers in a list, a numpy array, a torch CPU tensor or an Arrow array: tokens of sequences, or
    any other measure of their work. Returns k int64 numpy arrays of increasing indices, in the order of falling sums;
    every index is in one of them. ``equal_size`` puts n / k indices into each. The parts are those of verl's
    ``get_seqlen_balanced_partitions``, ties included. `Multi-Way Number Partitioning
    <https://www.ijcai.org/Proceedings/09/Papers/096.pdf>`_.

        >>> [part.tolist() for part in balance([8, 7, 6, 5, 4], 2)]
        [[1, 3, 4], [0, 2]]

    Raises ValueError for negative lengths (with their rows), fewer lengths than parts, and a k that does not divide n
    with ``equal_size``.
    """
    where = "data.balance"
    items = integers(where, "lengths", lengths)
    k = whole(where, "k", k, low=1)
    part_of = np.empty(len(items), dtype=np.int64)
    core().balance_lengths(items, k, equal_size, part_of)
    # numpy sorts 16 bits by their digits, wider integers by comparing
    order = np.argsort(part_of.astype(np.uint16) if k <= 1 << 16 else part_of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(part_of, minlength=k))[:-1])


def token_batches(
    lengths: Any, budget: int, ranks: int = 1, seed: int = 0, *, rank: int | None = None, padded: bool = True
) -> "TokenBatches":
    """Batches of at most ``budget`` tokens, shuffled, as many for every rank: a ``batch_sampler`` for a DataLoader.

    ``lengths [n]``: tokens of the rows, as for `balance`. A batch costs the cells of its padded tensor, rows times the
    longest, or with ``padded=False`` its tokens; padded batches are cut from windows sorted by length, others packed by
    best-fit decreasing, and at every step the ranks' batches cost about the same. Within an epoch every row is in
    exactly one batch of one rank, and all ranks have the same number of batches; a batch is split where that takes it.

    Iterating yields lists of indices, as torch's samplers do: those of ``rank``, or with None those of all ranks by
    turns, as Accelerate deals them out. Each complete pass is an epoch with a shuffle of its own, from ``seed`` and
    ``epoch`` alone and on every machine the same; ``set_epoch`` sets it. ``len`` is the number of batches of the
    present epoch.

    ``state_dict()`` says where iteration stands and ``load_state_dict`` continues there; workers of a DataLoader are
    ahead of the training: ``state_dict(done)`` takes the number of this epoch's batches that were trained on::

        >>> batches = token_batches([5, 3, 9, 2, 4], budget=10)
        >>> for batch in batches:
        ...     print(batch)
        [2]
        [1, 3]
        [0, 4]

    Raises ValueError for lengths that are negative or exceed ``budget`` (with their rows), and for rows too few to give
    every rank as many batches.
    """
    return TokenBatches(lengths, budget, ranks, seed, rank=rank, padded=padded)


class TokenBatches(torch.utils.data.Sampler[list[int]]):
    """What `token_batches` returns."""

    def __init__(self, lengths: Any, budget: int, ranks: int, seed: int, *, rank: int | None, padded: bool) -> None:
        where = "data.token_batches"
        self.lengths = integers(where, "lengths", lengths).copy()
        self.budget, self.ranks = whole(where, "budget", budget, low=1), whole(where, "ranks", ranks, low=1)
        self.seed = whole(where, "seed", seed, low=0)
        self.rank = None if rank is None else whole(where, "rank", rank, low=0)
        if self.rank is not None and self.rank >= self.ranks:
            check.fail(where, f"rank must be below ranks={self.ranks}, got {rank}")
        self.padded, self.epoch = padded, 0
        self._begin = 0  # the first batch of the next pass
        self._done = 0  # the batches of this epoch that were handed out
        self._plan: tuple[int, Array, Array] | None = None
        self._batches()

    def __iter__(self) -> Iterator[list[int]]:
        begin, self._begin = self._begin, 0
        order, offsets = self._batches()
        step = 1 if self.rank is None else self.ranks
        epoch, mine = self.epoch, range(self.rank or 0, len(offsets) - 1, step)
        self._done = begin
        if begin == len(mine):  # nothing is left, or there is nothing: this pass is an epoch all the same
            self.epoch, self._done = epoch + 1, 0
        for done, batch in enumerate(mine[begin:], start=begin + 1):
            self._done = done
            if done == len(mine):
                self.epoch, self._done = epoch + 1, 0
            indices: list[int] = order[offsets[batch] : offsets[batch + 1]].tolist()
            yield indices

    def __len__(self) -> int:
        count = len(self._batches()[1]) - 1
        return count if self.rank is None else count // self.ranks

    def set_epoch(self, epoch: int) -> None:
        """Makes ``epoch`` the next pass; that of a loaded state keeps its place."""
        epoch = whole("data.token_batches", "epoch", epoch, low=0)
        if epoch != self.epoch:
            self.epoch, self._begin, self._done = epoch, 0, 0

    def state_dict(self, done: int | None = None) -> dict[str, int]:
        """Where iteration stands, behind ``done`` batches of this epoch (by default those that were handed out)."""
        if done is not None:
            done = whole("data.token_batches", "done", done, low=0)
        return {"epoch": self.epoch, "done": self._done if done is None else done, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues behind the batches of ``state``, which must be that of the same rows, budget, ranks and seed."""
        where = "data.token_batches"
        for name, value in self._identity().items():
            if state.get(name) != value:
                check.fail(where, f"state must be of the same {name}, got {state.get(name)}, not {value}")
        self.epoch = whole(where, "state['epoch']", state["epoch"], low=0)
        self._begin = self._done = whole(where, "state['done']", state["done"], low=0)
        if self._begin > len(self):
            check.fail(where, f"state['done'] must be at most the epoch's {len(self)} batches, got {self._begin}")

    def _identity(self) -> dict[str, int]:
        return {
            "rows": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "lengths": zlib.crc32(self.lengths.tobytes()),
            "budget": self.budget,
            "ranks": self.ranks,
            "seed": self.seed,
            "padded": int(self.padded),
        }

    def _batches(self) -> tuple[Array, Array]:
        if self._plan is None or self._plan[0] != self.epoch:
            order, offsets = np.empty(len(self.lengths), np.int64), np.empty(len(self.lengths) + 1, np.int64)
            count = core().token_batches(
                self.lengths,
                order,
                offsets,
                budget=self.budget,
                padded=self.padded,
                ranks=self.ranks,
                seed=self.seed,
                epoch=self.epoch,
            )
            self._plan = (self.epoch, order, offsets[: count + 1].copy())
        return self._plan[1:]
