"""The pieces of the head on a CUDA device: the row kernels' bandwidth against that of a copy, and the rates of the
products that the design rests on. Each kernel is compared with float64 on some of its rows before it is timed."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern.commands.benchmark.head.operands import Shape
from prefkern.commands.benchmark.measure import OUT_OF_TIME, Budget, Spread, Step, time_repeated
from prefkern.kernels.interface import Factors, Logits, RowStats

_CHECKED_ROWS = 64
_PLAIN = Logits()


class Piece(NamedTuple):
    """``amount`` is bytes that must move (``unit`` B/s) or floating-point operations (FLOP/s). ``error``: the largest
    one of the checked rows, None for products. ``note`` says why ``time`` is None."""

    name: str
    shape: str
    amount: float
    unit: str
    time: Spread | None
    error: float | None = None
    note: str = ""

    @property
    def rate(self) -> float | None:
        return None if self.time is None else self.amount / self.time.median


class _Rows(NamedTuple):
    """Rotating buffers: a tile that was just written is read from memory, as in real use, not from the cache."""

    tiles: list[Tensor]
    targets: Tensor
    stats: RowStats


def _rows(N: int, V: int, dtype: torch.dtype, device: torch.device, *, copies: int) -> _Rows:
    generator = torch.Generator(device).manual_seed(0)
    tiles = []
    for _ in range(copies):
        tile = torch.empty(N, V, dtype=dtype, device=device)
        tiles.append(tile.normal_(0.0, 3.0, generator=generator))
    targets = torch.randint(V, (N,), device=device, generator=generator)
    return _Rows(tiles, targets, RowStats(*(torch.full((N,), math.nan, device=device) for _ in range(3))))


def _truth(tile: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the unscaled gradient ``p - 1[v = y]`` of the first rows, in float64."""
    columns = targets[:_CHECKED_ROWS, None]
    logps = torch.log_softmax(tile[:_CHECKED_ROWS].double(), -1)
    at_target = logps.gather(-1, columns)
    return at_target.squeeze(-1), logps.exp().scatter(-1, columns, at_target.expm1())


def _error(got: Tensor, want: Tensor) -> float:
    return float((got[:_CHECKED_ROWS].double() - want).abs().amax())


def _rounding(logps: Tensor) -> float:
    """A few float32 roundings of the largest log-probability."""
    return 4 * torch.finfo(torch.float32).eps * max(float(logps.abs().amax()), 1.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _timed(
    name: str, shape: str, amount: float, step: Step, device: torch.device, error: float, bound: float, left: Budget
) -> Piece:
    if not error <= bound:  # nor is NaN
        return Piece(name, shape, amount, "B/s", None, error, f"not timed: error {error:.1e} exceeds {bound:.1e}")
    if left.left() <= 0:
        return Piece(name, shape, amount, "B/s", None, error, OUT_OF_TIME)
    return Piece(name, shape, amount, "B/s", time_repeated(step, device), error)


def row_kernels(
    kernels: Any, shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget
) -> Iterator[Piece]:
    """Log-probabilities from logits ``[N, V]``, forward and backward: each logit in once, each gradient out once."""
    N, _, V = shape
    tiles, targets, stats = _rows(N, V, dtype, device, copies=1)
    logits = tiles[0]
    logps, unscaled = _truth(logits, targets)
    label = f"[{N}, {V}] {_name(dtype)}"
    rounding = _rounding(logps)

    def forward() -> tuple[Tensor, ...]:
        kernels.tile_fwd(logits, targets, stats, None, _PLAIN, keep_tile=True)
        return ()

    forward()
    error = _error(stats.logps, logps)
    yield _timed("log-probs, forward", label, logits.nbytes, forward, device, error, rounding, budget)
    grad, factors = torch.full_like(logits, math.nan), Factors(-torch.ones(N, device=device))

    def backward() -> tuple[Tensor, ...]:
        kernels.tile_bwd(logits, targets, stats, factors, grad, _PLAIN, keep_tile=True)
        return ()

    backward()
    error, bound = _error(grad, -unscaled), torch.finfo(dtype).eps + rounding
    yield _timed("log-probs, backward", label, 2 * logits.nbytes, backward, device, error, bound, budget)


def fold_kernels(
    kernels: Any, shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget
) -> Iterator[Piece]:
    """The fold of float32 logit tiles, of as many rows as a chunk of the head has, and of more."""
    for C in sorted({min(shape.N, rows) for rows in (256, 4096)}):
        yield from _fold(kernels, C, shape.V, dtype, device, budget)


def _fold(kernels: Any, C: int, V: int, dtype: torch.dtype, device: torch.device, budget: Budget) -> Iterator[Piece]:
    """Statistics only; with the unscaled gradient; the unscaled gradient recomputed. Each logit in, each result out."""
    tiles, targets, stats = _rows(C, V, torch.float32, device, copies=max(1, min(8, (1 << 30) // (C * V * 4))))
    logps, unscaled = _truth(tiles[0], targets)
    held = torch.full((C, V), math.nan, dtype=dtype, device=device)
    turns = itertools.cycle(tiles)
    label = f"[{C}, {V}] -> {_name(dtype)}"
    rounding = _rounding(logps)
    bound = torch.finfo(dtype).eps + rounding

    def forward(tile: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
        kernels.tile_fwd(tile, targets, stats, out, _PLAIN)
        return ()

    def backward(tile: Tensor) -> tuple[Tensor, ...]:
        kernels.tile_bwd(tile, targets, stats, Factors(), held, _PLAIN)
        return ()

    forward(tiles[0].clone(), held)  # a fold may overwrite its tile
    errors = [_error(stats.logps, logps), _error(held, unscaled)]
    held.fill_(math.nan)
    backward(tiles[0].clone())
    errors.append(_error(held, unscaled))
    read, moved = C * V * 4, C * V * (4 + dtype.itemsize)
    yield _timed(
        "fold, statistics", label, read, lambda: forward(next(turns), None), device, errors[0], rounding, budget
    )
    yield _timed("fold, forward", label, moved, lambda: forward(next(turns), held), device, errors[1], bound, budget)
    yield _timed("fold, recomputed", label, moved, lambda: backward(next(turns)), device, errors[2], bound, budget)


def products(shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget) -> Iterator[Piece]:
    """The logits' product with a result in its own dtype and in float32, by rows at a time; the gradient of the weight
    accumulated in float32, likewise."""
    N, H, V = shape
    hidden = torch.randn(N, H, device=device).to(dtype)
    weight = torch.randn(V, H, device=device).to(dtype)
    name = _name(dtype)
    for rows in sorted({min(N, count) for count in (256, 1024, 4096, 8192)}):
        work = 2.0 * rows * H * V
        narrow = torch.empty(rows, V, dtype=dtype, device=device)
        wide = torch.empty(rows, V, device=device)
        some = hidden[:rows]

        def to_narrow(some: Tensor = some, out: Tensor = narrow) -> tuple[Tensor, ...]:
            torch.mm(some, weight.T, out=out)
            return ()

        def to_wide(some: Tensor = some, out: Tensor = wide) -> tuple[Tensor, ...]:
            torch.mm(some, weight.T, out_dtype=torch.float32, out=out)
            return ()

        for label, step in ((f"mm, {name} out", to_narrow), ("mm, float32 out", to_wide)):
            yield _product(label, f"[{rows}, {H}] x [{H}, {V}]", work, step, device, budget)
        del wide
        total = torch.zeros(V, H, device=device)

        def accumulate(some: Tensor = some, out: Tensor = total, grads: Tensor = narrow) -> tuple[Tensor, ...]:
            torch.addmm(out, grads.T, some, out_dtype=torch.float32, out=out)
            return ()

        yield _product(f"addmm {name}, float32 sum", f"[{V}, {rows}] x [{rows}, {H}]", work, accumulate, device, budget)


def _product(name: str, shape: str, work: float, step: Step, device: torch.device, budget: Budget) -> Piece:
    if budget.left() <= 0:
        return Piece(name, shape, work, "FLOP/s", None, note=OUT_OF_TIME)
    return Piece(name, shape, work, "FLOP/s", time_repeated(step, device))
