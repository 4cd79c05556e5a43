"""The fold of a float32 logit tile, forward and backward, against float64, through guard bands and poison."""

from typing import Any

import pytest
import torch
from cases import DTYPES, OPTIONS, ROWS, assert_stats, options_of, poisoned_stats, with_special_rows
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import RowStats

FLOAT = torch.float32


def fold(
    tile: Tensor,
    targets: Tensor,
    held_dtype: torch.dtype | None,
    *,
    bias: Tensor | None = None,
    wanted: str = "eqmt",
    logit_scale: float = 1.0,
    **options: Any,
) -> tuple[RowStats, Tensor | None]:
    """`tile_fwd` behind guards, with gaps between the rows."""
    from prefkern.kernels.triton import logprobs as kernels

    guard = testing.Guards()
    stats = poisoned_stats(len(targets), tile.device, guard, wanted)
    held = None
    if held_dtype is not None:
        held = guard(testing.poisoned(*tile.shape, dtype=held_dtype, device=tile.device), row_gap=3)
    kernels.tile_fwd(
        guard(tile, row_gap=5), guard(bias), guard(targets), stats, held, logit_scale=logit_scale, **options
    )
    guard.check()
    return stats, held


def tile_bwd(
    tile: Tensor,
    targets: Tensor,
    stats: RowStats,
    c: Tensor | None,
    e: Tensor | None,
    dtype: torch.dtype = FLOAT,
    *,
    bias: Tensor | None = None,
    v_start: int = 0,
    logit_scale: float = 1.0,
    **options: Any,
) -> Tensor:
    from prefkern.kernels.triton import logprobs as kernels

    guard = testing.Guards()
    out = guard(testing.poisoned(*tile.shape, dtype=dtype, device=tile.device), row_gap=4)
    kernels.tile_bwd(
        guard(tile, row_gap=2),
        guard(bias),
        guard(targets),
        RowStats._make(map(guard, stats)),
        guard(c),
        guard(e),
        out,
        v_start=v_start,
        logit_scale=logit_scale,
        **options,
    )
    guard.check()
    return out


def held_bwd(
    held: Tensor, targets: Tensor, stats: RowStats, c: Tensor, e: Tensor, dtype: torch.dtype, ignore_index: int = -100
) -> Tensor:
    from prefkern.kernels.triton import logprobs as kernels

    guard = testing.Guards()
    out = guard(testing.poisoned(*held.shape, dtype=dtype, device=held.device), row_gap=4)
    kernels.held_bwd(
        guard(held, row_gap=2),
        guard(targets),
        guard(stats.logps),
        guard(stats.entropy),
        guard(c),
        guard(e),
        out,
        ignore_index=ignore_index,
    )
    guard.check()
    return out


def combined(
    tile: Tensor,
    targets: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor:
    """``c u + e p (log p + entropy) (1 - t)(1 + t)``: the gradient without minus the row's factor."""
    ones = torch.ones(len(targets), device=tile.device)
    grad = testing.grads_from_logits(tile, targets, ones if c is None else c, e, dtype=dtype, **options)
    temperature = options.get("temperature", 1.0)
    factor = temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature
    return -grad * factor / options.get("logit_scale", 1.0)


def upstream(device: torch.device, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows).to(device), torch.randn(rows).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_forward(name: str, dtype: torch.dtype, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device)
    bias = torch.randn(columns).to(device) if name in ("plain", "all") else None
    if bias is not None:
        bias[40:45] = float("-inf")
    targets = case.targets.masked_fill((case.targets >= 40) & (case.targets < 45), 3)
    options = options_of(name, device) | {"bias": bias, "logit_scale": 0.8}
    stats, held = fold(case.logits, targets, dtype, **options)
    assert_stats(stats, case.logits, targets, **options)
    want = testing.unscaled_from_logits(case.logits, targets, **options)
    eager = testing.unscaled_from_logits(case.logits, targets, dtype=FLOAT, **options).to(dtype)
    assert held is not None
    testing.assert_not_worse(held, want, eager, name="u")


@pytest.mark.parametrize("name", ["plain", "all"])
def test_special_rows(name: str, device: torch.device, columns: int) -> None:
    tile, targets = with_special_rows(testing.logit_case(ROWS, columns, device=device))
    options = options_of(name, device)
    stats, held = fold(tile, targets, FLOAT, **options)
    assert_stats(stats, tile, targets, **options)
    want = testing.unscaled_from_logits(tile, targets, **options)
    assert held is not None
    testing.assert_not_worse(held, want, testing.unscaled_from_logits(tile, targets, dtype=FLOAT, **options), name="u")
    c, e = upstream(device)
    got = tile_bwd(tile, targets, stats, c, e, **options)
    want = combined(tile, targets, c, e, **options)
    testing.assert_not_worse(got, want, combined(tile, targets, c, e, FLOAT, **options), name="tile_bwd")
    if name == "plain":
        got = held_bwd(held, targets, stats, c, e, FLOAT)
        testing.assert_not_worse(got, want, combined(tile, targets, c, e, FLOAT, **options), name="held_bwd")


def test_without_a_held_tile(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of("plain", device)
    stats, held = fold(*case, None, wanted="e", **options)
    assert held is None
    assert_stats(stats, *case, **options)


def test_ignored_rows_are_zero_and_not_read(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device, ignored=0.4)
    ignored = case.targets == testing.IGNORE
    assert 2 <= ignored.sum() < ROWS
    tile = case.logits.masked_fill(ignored[:, None], float("nan"))
    options = options_of("plain", device)
    stats, held = fold(tile, case.targets, FLOAT, **options)
    assert held is not None
    c, e = (value.masked_fill(ignored, float("nan")) for value in upstream(device))
    poisoned = held.masked_fill(ignored[:, None], float("nan"))
    for value in stats[:4]:
        value[ignored] = float("nan")  # nor are their statistics
    for out in (
        held,
        tile_bwd(tile, case.targets, stats, c, e, **options),
        held_bwd(poisoned, case.targets, stats, c, e, FLOAT),
    ):
        assert not out[ignored].any()
        assert out[~ignored].isfinite().all()


@pytest.mark.parametrize("given", ["u", "c", "e", "c and e"])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_recomputed_gradient(name: str, dtype: torch.dtype, given: str, device: torch.device, columns: int) -> None:
    """In two slices of the vocabulary, the target in one of them."""
    case = testing.logit_case(ROWS, columns, device=device)
    bias = torch.randn(columns).to(device)
    options = options_of(name, device)
    stats, _ = fold(*case, None, bias=bias, logit_scale=1.3, **options)
    c, e = upstream(device)
    c, e = (value if letter in given else None for value, letter in ((c, "c"), (e, "e")))
    cut = columns // 2 + 1
    parts = [
        tile_bwd(
            case.logits[:, part],
            case.targets,
            stats,
            c,
            e,
            dtype,
            bias=bias[part],
            v_start=part.start,
            logit_scale=1.3,
            **options,
        )
        for part in (slice(0, cut), slice(cut, columns))
    ]
    options |= {"bias": bias, "logit_scale": 1.3}
    want = combined(*case, c, e, **options)
    eager = combined(*case, c, e, FLOAT, **options).to(dtype)
    testing.assert_not_worse(torch.cat(parts, 1), want, eager, name="out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_from_the_held_tile(dtype: torch.dtype, device: torch.device, columns: int) -> None:
    """In two slices, with targets relative to them. The float64 value of the same rounded tile is the oracle."""
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of("cold", device)
    stats, held = fold(*case, dtype, wanted="e", **options)
    assert held is not None
    c, e = upstream(device)
    cut = columns // 2 + 1
    got = torch.cat(
        [
            held_bwd(held[:, part], case.targets - part.start, stats, c, e, dtype, ignore_index=-100 - part.start)
            for part in (slice(0, cut), slice(cut, columns))
        ],
        1,
    )
    results = []
    for wide in (torch.float64, FLOAT):
        u, lp = held.to(wide), stats.logps.to(wide)
        at_target = torch.arange(columns, device=device) == case.targets[:, None]
        p = torch.where(at_target, lp.exp()[:, None], u)
        u = torch.where(at_target, lp.expm1()[:, None], u)
        logp = torch.where(p > 0, p, 1.0).log()
        results.append(c[:, None].to(wide) * u + e[:, None].to(wide) * p * (logp + stats.entropy.to(wide)[:, None]))
    want = results[0].masked_fill((case.targets == testing.IGNORE)[:, None], 0.0)
    eager = results[1].masked_fill((case.targets == testing.IGNORE)[:, None], 0.0)
    testing.assert_not_worse(got, want, eager.to(dtype), name="out")
    if dtype == FLOAT:  # and it is the gradient
        testing.assert_not_worse(
            got, combined(*case, c, e, **options), combined(*case, c, e, FLOAT, **options), name="g"
        )


def test_targets_outside_a_slice_have_no_entry(device: torch.device, columns: int) -> None:
    case = testing.logit_case(4, columns, device=device, ignored=0.0)
    options = options_of("plain", device, 4)
    stats, held = fold(*case, FLOAT, **options)
    assert held is not None
    zeros, ones = torch.zeros(4, device=device), torch.ones(4, device=device)
    softmax = torch.softmax(case.logits.double(), -1).float()
    for outside in (-1, -101, columns, columns + 300, 2**32 + 1):
        targets = torch.full((4,), outside, device=device)
        plain = held.scatter(1, case.targets[:, None], softmax.gather(1, case.targets[:, None]))
        torch.testing.assert_close(held_bwd(plain, targets, stats, ones, zeros, FLOAT), plain, rtol=1e-6, atol=0)
    narrow = slice(0, columns - 7)
    late = torch.full((4,), columns - 3, device=device)
    torch.testing.assert_close(
        tile_bwd(case.logits[:, narrow], late, stats, None, None, **options), softmax[:, narrow], rtol=1e-5, atol=1e-9
    )


def test_a_bad_target_is_nan_in_every_slice(device: torch.device, columns: int) -> None:
    tile = torch.randn(3, columns, device=device)
    targets = torch.tensor([-7, columns, 2**32 + 5], device=device)
    options = options_of("plain", device, 3)
    stats, held = fold(tile, targets, torch.bfloat16, **options)
    assert held is not None
    assert held.isnan().all()
    half = columns // 2
    assert tile_bwd(tile[:, half:], targets, stats, None, None, v_start=half, **options).isnan().all()
    c, e = upstream(device, 3)
    assert held_bwd(held, targets, stats, c, e, FLOAT).isnan().all()


@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (2, 3), (3, 128), (2, 129)], ids=str)
def test_small_and_exact_shapes(shape: tuple[int, int], device: torch.device) -> None:
    case = testing.logit_case(*shape, device=device, ignored=0.0)
    options = options_of("plain", device)
    stats, held = fold(*case, FLOAT, **options)
    assert_stats(stats, *case, **options)
    assert held is not None
    eager = testing.unscaled_from_logits(*case, dtype=FLOAT, **options)
    testing.assert_not_worse(held, testing.unscaled_from_logits(*case, **options), eager, name="u")
    c, e = upstream(device, shape[0])
    want, eager = combined(*case, c, e, **options), combined(*case, c, e, FLOAT, **options)
    testing.assert_not_worse(tile_bwd(*case, stats, c, e, **options), want, eager, name="tile_bwd")
    testing.assert_not_worse(held_bwd(held, case.targets, stats, c, e, FLOAT), want, eager, name="held_bwd")


def test_offsets_beyond_32_bits(device: torch.device, columns: int) -> None:
    """The last row begins after 2^31 elements, though its number and the stride fit in 32 bits."""
    from prefkern.kernels.triton import logprobs as kernels

    stride = 2**30 + 24

    def far(dtype: torch.dtype) -> Tensor:
        memory = torch.empty(2 * stride + columns, dtype=dtype, device=device)
        return memory.as_strided((3, columns), (stride, 1))

    case = testing.logit_case(3, columns, device=device, ignored=0.0)
    options = options_of("plain", device, 3) | {"logit_scale": 1.0}
    tile, held, out = far(FLOAT), far(torch.bfloat16), far(torch.bfloat16)
    tile.copy_(case.logits)
    stats = poisoned_stats(3, device, testing.Guards())
    kernels.tile_fwd(tile, None, case.targets, stats, held, **options)
    near, near_held = fold(*case, torch.bfloat16, **options)
    assert all(map(torch.equal, stats, near))
    assert near_held is not None
    assert torch.equal(held, near_held)
    kernels.tile_bwd(tile, None, case.targets, stats, None, None, out, v_start=0, **options)
    assert torch.equal(out, tile_bwd(*case, near, None, None, torch.bfloat16, **options))
    c, e = upstream(device, 3)
    kernels.held_bwd(held, case.targets, stats.logps, stats.entropy, c, e, out, ignore_index=-100)
    assert torch.equal(out, held_bwd(near_held, case.targets, near, c, e, torch.bfloat16))


def test_rows_lie_on_the_first_axis_of_the_grid(device: torch.device, spied: Any) -> None:
    """The others end at 65535."""
    from prefkern.kernels.triton import logprobs as kernels
    from prefkern.kernels.triton import logprobs_bwd

    grids = spied(kernels, "_tile_fwd_kernel")
    spied(logprobs_bwd, "_tile_bwd_kernel", "_held_bwd_kernel")
    N = 70_000
    tile, row = torch.zeros(1, 8, device=device).expand(N, 8), torch.zeros(N, device=device)
    stats = RowStats(row, row, row)
    options = options_of("plain", device) | {"logit_scale": 1.0}
    kernels.tile_fwd(tile, None, row.long(), stats, None, **options)
    kernels.tile_bwd(tile, None, row.long(), stats, None, None, tile, v_start=0, **options)
    kernels.held_bwd(tile, row.long(), row, row, row, row, tile, ignore_index=-100)
    assert grids == [(N,)] * 3


def test_columns_must_be_contiguous(device: torch.device) -> None:
    from prefkern.kernels.triton import logprobs as kernels

    good, row = torch.zeros(4, 6, device=device), torch.zeros(4, device=device)
    bad = torch.zeros(6, 4, device=device).T
    stats = RowStats(row, row, row)
    options = options_of("plain", device) | {"logit_scale": 1.0}
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_fwd: held must have a unit stride"):
        kernels.tile_fwd(good, None, row.long(), stats, bad, **options)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_bwd: out must have a unit stride"):
        kernels.tile_bwd(good, None, row.long(), stats, None, None, bad, v_start=0, **options)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.held_bwd: held must have a unit stride"):
        kernels.held_bwd(bad, row.long(), row, row, row, row, good, ignore_index=-100)
    assert kernels.IN_PLACE is False


@pytest.mark.gpu
def test_new_numbers_compile_nothing_new() -> None:
    """Temperature, scale, softcap and lengths are runtime values."""
    from prefkern.kernels.triton import logprobs as kernels

    device = torch.device("cuda:0")
    compiled = []
    for i, V in enumerate((320, 336, 4096, 9600)):
        case = testing.logit_case(3 + i, V, device=device)
        options = options_of("softcap", device) | {"softcap": 3.0 + i, "temperature": 0.5 + i}
        fold(*case, FLOAT, logit_scale=1.0 + i, **options)
        compiled.append(sum(len(cache[0]) for cache in kernels._tile_fwd_kernel.device_caches.values()))
    assert compiled[0] == compiled[-1]
