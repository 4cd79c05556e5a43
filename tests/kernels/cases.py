"""What the kernel tests share: options of the waist, the kernels behind guard bands, comparison with the oracle."""

from typing import Any

import torch
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import Factors, Logits, RowStats

ROWS = 12
FLOAT = torch.float32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "cold": {"temperature": 0.3},
    "rows": {"temperature": "rows"},
    "all": {"softcap": 4.0, "temperature": "rows"},
}


def options_of(name: str, device: torch.device, rows: int = ROWS) -> dict[str, Any]:
    """``softcap``, ``temperature`` and ``ignore_index`` of a case; ``rows`` stands for one temperature per row."""
    options = {"softcap": None, "temperature": 1.0} | OPTIONS[name]
    if options["temperature"] == "rows":
        options["temperature"] = torch.linspace(0.5, 1.7, rows).to(device)
    return options | {"ignore_index": testing.IGNORE}


def guarded(logits: Logits, guard: testing.Guards) -> Logits:
    """The same with its tensors behind guards."""
    temperature = guard(logits.temperature) if isinstance(logits.temperature, Tensor) else logits.temperature
    return logits._replace(bias=guard(logits.bias), temperature=temperature)


def poisoned_stats(rows: int, device: torch.device, guard: testing.Guards, wanted: str = "eqmt") -> RowStats:
    """Unwritten statistics behind guard bands; ``wanted``: entropy, log sum p^2, mean logit, top-1."""

    def new(dtype: torch.dtype) -> Tensor:
        return guard(testing.poisoned(rows, dtype=dtype, device=device))

    floats = [new(torch.float32) if letter in wanted else None for letter in "eqm"]
    top1 = new(torch.bool) if "t" in wanted else None
    return RowStats(new(torch.float32), new(torch.float32), new(torch.float32), *floats, top1)


def fold(
    tile: Tensor, targets: Tensor, held_dtype: torch.dtype | None = None, wanted: str = "eqmt", **options: Any
) -> tuple[RowStats, Tensor | None]:
    """`tile_fwd` behind guards, with gaps between the rows; the tile is not written."""
    from prefkern.kernels.triton import logprobs as kernels

    guard = testing.Guards()
    stats = poisoned_stats(len(targets), tile.device, guard, wanted)
    held = None
    if held_dtype is not None:
        held = guard(testing.poisoned(*tile.shape, dtype=held_dtype, device=tile.device), row_gap=3)
    view = guard(tile, row_gap=5)
    kernels.tile_fwd(view, guard(targets), stats, held, guarded(Logits(**options), guard))
    guard.check()
    assert torch.equal(view.nan_to_num(3.0), tile.nan_to_num(3.0))
    return stats, held


def tile_bwd(
    tile: Tensor,
    targets: Tensor,
    stats: RowStats,
    factors: Factors = Factors(),  # noqa: B008 - immutable
    dtype: torch.dtype = FLOAT,
    v_start: int = 0,
    **options: Any,
) -> Tensor:
    from prefkern.kernels.triton import logprobs as kernels

    guard = testing.Guards()
    out = guard(testing.poisoned(*tile.shape, dtype=dtype, device=tile.device), row_gap=4)
    given = (guard(tile, row_gap=2), guard(targets), RowStats._make(map(guard, stats)))
    logits = guarded(Logits(**options), guard)
    kernels.tile_bwd(*given, Factors._make(map(guard, factors)), out, logits, v_start=v_start)
    guard.check()
    return out


def held_bwd(
    held: Tensor, targets: Tensor, stats: RowStats, factors: Factors, dtype: torch.dtype = FLOAT, v_start: int = 0
) -> Tensor:
    from prefkern.kernels.triton import logprobs as kernels

    guard = testing.Guards()
    out = guard(testing.poisoned(*held.shape, dtype=dtype, device=held.device), row_gap=4)
    given = (guard(held, row_gap=2), guard(targets), RowStats._make(map(guard, stats)))
    kernels.held_bwd(*given, Factors._make(map(guard, factors)), out, Logits(), v_start=v_start)
    guard.check()
    return out


def gradient(logits: Tensor, targets: Tensor, stats: RowStats, loss: Factors, **options: Any) -> Tensor:
    """The gradient with respect to logits of a loss with ``dL/d lp`` and ``dL/d entropy``, in their dtype."""
    temperature = options.get("temperature", 1.0)
    factors = Factors._make(None if value is None else -value / temperature for value in loss)
    return tile_bwd(logits, targets, stats, factors, logits.dtype, **options)


def upstream(device: torch.device, rows: int = ROWS) -> Factors:
    return Factors(torch.randn(rows).to(device), torch.randn(rows).to(device))


def combined(
    tile: Tensor, targets: Tensor, factors: Factors, dtype: torch.dtype = torch.float64, **options: Any
) -> Tensor:
    """``c u + e p (log p + entropy) (1 - t)(1 + t)``: the gradient without minus the row's factor."""
    c = torch.ones(len(targets), device=tile.device) if factors.c is None else factors.c
    grad = testing.grads_from_logits(tile, targets, c, factors.e, dtype=dtype, **options)
    temperature = options.get("temperature", 1.0)
    factor = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    return -grad * factor / options.get("logit_scale", 1.0)


def assert_stats(got: RowStats, logits: Tensor, targets: Tensor, **options: Any) -> None:
    """Every statistic that was asked for, against float64 and against plain float32."""
    want = testing.stats_from_logits(logits, targets, **options)
    eager = testing.stats_from_logits(logits, targets, dtype=torch.float32, **options)
    for name, value in got._asdict().items():
        if name == "is_top1" and value is not None:
            assert torch.equal(value, want.is_top1), name
        elif value is not None:
            testing.assert_not_worse(value, getattr(want, name), getattr(eager, name), name=name)


def assert_gradient(got: Tensor, logits: Tensor, targets: Tensor, loss: Factors, **options: Any) -> None:
    """The gradient with respect to logits, against float64 and against the eager one in their dtype."""
    want = testing.grads_from_logits(logits, targets, *loss, **options)
    eager = testing.grads_from_logits(logits, targets, *loss, dtype=logits.dtype, **options)
    testing.assert_not_worse(got, want, eager, name="grad")


def with_special_rows(case: testing.LogitCase) -> testing.LogitCase:
    """Rows 3 to 8: no finite logit, a target of -inf, whole tiles of -inf, targets just outside the vocabulary.
    Rows 9 to 11: targets at the edges of a small tile."""
    logits, targets = case.logits.clone(), case.targets.clone()
    V = logits.shape[1]
    logits[3] = float("-inf")
    targets[3] = 5
    targets[4] = V // 2
    logits[4, V // 2] = float("-inf")
    logits[5, : V - 3] = float("-inf")
    targets[5] = V - 2
    logits[6, 3:] = float("-inf")
    targets[6] = 1
    targets[7], targets[8] = V, -1
    targets[9], targets[10], targets[11] = 127, 128, 256
    return testing.LogitCase(logits, targets)
