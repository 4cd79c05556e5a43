"""Log-probabilities of rows, of a head's float32 tile or of logits in any dtype: statistics and unscaled gradient
against float64, through guard bands and poison."""

from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FLOAT,
    OPTIONS,
    ROWS,
    assert_gradient,
    assert_stats,
    fold,
    gradient,
    options_of,
    poisoned_stats,
    tile_bwd,
    upstream,
    with_special_rows,
)
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import Factors, Logits, RowStats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_forward(name: str, dtype: torch.dtype, device: torch.device, columns: int) -> None:
    """A head's tile: statistics, and the unscaled gradient in any dtype."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_statistics(name: str, dtype: torch.dtype, device: torch.device, columns: int) -> None:
    """Logits of any dtype."""
    case = testing.logit_case(ROWS, columns, dtype=dtype, device=device, masked=0.1)
    options = options_of(name, device)
    stats, _ = fold(*case, **options)
    assert_stats(stats, *case, **options)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_special_rows(name: str, device: torch.device, columns: int) -> None:
    tile, targets = with_special_rows(testing.logit_case(ROWS, columns, device=device, ignored=0.0))
    options = options_of(name, device)
    stats, held = fold(tile, targets, FLOAT, **options)
    assert_stats(stats, tile, targets, **options)
    want = testing.unscaled_from_logits(tile, targets, **options)
    assert held is not None
    testing.assert_not_worse(held, want, testing.unscaled_from_logits(tile, targets, dtype=FLOAT, **options), name="u")


def test_without_a_held_tile(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of("plain", device)
    stats, held = fold(*case, wanted="e", **options)
    assert held is None
    assert_stats(stats, *case, **options)


@pytest.mark.parametrize("wanted", ["", "e", "q", "m", "t"])
def test_each_statistic_alone_is_the_same(wanted: str, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, dtype=torch.bfloat16, device=device)
    options = options_of("all", device)
    whole, _ = fold(*case, **options)
    alone, _ = fold(*case, wanted=wanted, **options)
    for name, value in alone._asdict().items():
        if value is not None:
            testing.assert_not_worse(value.double(), getattr(whole, name).double(), getattr(whole, name), name=name)


def test_first_argmax(device: torch.device, columns: int) -> None:
    logits = torch.zeros(ROWS, columns, device=device)
    last = columns - 1
    for row, best in enumerate([[7, 9], [7, 9], [3, 131], [3, 131], [0, last], [0, last], [last], [127, 128], [0]]):
        logits[row, best] = 2.0
    logits[9:] = torch.randint(0, 3, (3, columns), device=device).float()
    targets = torch.tensor([7, 9, 3, 131, 0, last, last, 128, testing.IGNORE, 1, 2, 3], device=device)
    stats, _ = fold(logits, targets, wanted="t", **options_of("plain", device))
    assert stats.is_top1 is not None
    assert stats.is_top1.tolist()[:8] == [True, False, True, False, True, False, True, False]
    assert torch.equal(stats.is_top1, logits.argmax(-1) == targets)


@pytest.mark.parametrize("offset", [3e4, -3e4])
def test_a_common_offset_costs_nothing(offset: float, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device, offset=offset)
    options = options_of("cold", device)
    stats, _ = fold(*case, wanted="eq", **options)
    want = testing.stats_from_logits(*case, **options)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        error = (getattr(stats, name).double() - getattr(want, name)).abs()
        assert error.max() <= 4e-7 * getattr(want, name).abs().clamp(min=4.0).max(), name
    loss = Factors(torch.ones(ROWS, device=device))
    grad = gradient(*case, stats, loss, **options)
    want_grad = testing.grads_from_logits(*case, *loss, **options)
    assert (grad.double() - want_grad).abs().max() <= 1e-5


def test_the_lowest_logits(device: torch.device, columns: int) -> None:
    """Rows masked by the lowest float rather than -inf: uniform where nothing else is left."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.randn(4, columns, device=device)
    logits[0] = lowest
    logits[1, : columns - 5] = lowest
    logits[2, 9:] = lowest
    logits[3] -= 1e30
    targets = torch.tensor([3, columns - 2, 4, 7], device=device)
    options = options_of("plain", device, 4)
    stats, _ = fold(logits, targets, wanted="eq", **options)
    assert_stats(stats, logits, targets, **options)
    assert stats.logps[0].item() == pytest.approx(-torch.tensor(columns).log().item(), rel=1e-6)
    loss = upstream(device, 4)
    assert_gradient(gradient(logits, targets, stats, loss, **options), logits, targets, loss, **options)


def test_log_probabilities_are_never_positive(device: torch.device, columns: int) -> None:
    logits = torch.full((4, columns), -40.0, device=device)
    targets = torch.arange(4, device=device)
    logits[targets, targets] = torch.tensor([0.1, 7.7, 23.3, 31.0], device=device)
    stats, _ = fold(logits, targets, wanted="e", softcap=30.0, temperature=0.7)
    assert stats.entropy is not None
    assert (stats.logps <= 0).all()
    assert stats.logps.abs().max() < 1e-6
    assert stats.entropy.abs().max() < 1e-5


def test_any_ignore_index(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of("plain", device) | {"ignore_index": int(case.targets[0])}
    stats, _ = fold(*case, **options)
    assert stats.logps[0] == 0
    assert stats.logps[2].isnan()  # -100 is now outside
    assert_stats(stats, *case, **options)
    grad = gradient(*case, stats, upstream(device), **options)
    assert not grad[0].any()
    assert grad[2].isnan().all()


def test_int32_targets(device: torch.device, columns: int) -> None:
    case = testing.logit_case(4, columns, device=device)
    options = options_of("plain", device)
    wide, _ = fold(*case, **options)
    narrow, _ = fold(case.logits, case.targets.int(), **options)
    assert all(map(torch.equal, wide, narrow))


def test_a_row_does_not_depend_on_the_others(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, dtype=torch.bfloat16, device=device)
    options = options_of("softcap", device)
    whole, _ = fold(*case, **options)
    part, _ = fold(case.logits[4:7], case.targets[4:7], **options)
    for a, b in zip(whole, part, strict=True):
        assert a is not None
        assert torch.equal(a[4:7], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_offsets_beyond_32_bits(dtype: torch.dtype, device: torch.device, columns: int) -> None:
    """The last row begins after 2^31 elements, though its number and the stride fit in 32 bits."""
    from prefkern.kernels.triton import logprobs as kernels

    stride = 2**30 + 24

    def far(dtype: torch.dtype) -> Tensor:
        memory = torch.empty(2 * stride + columns, dtype=dtype, device=device)
        return memory.as_strided((3, columns), (stride, 1))

    case = testing.logit_case(3, columns, dtype=dtype, device=device, ignored=0.0)
    options = options_of("plain", device, 3)
    tile, held, out = far(dtype), far(torch.bfloat16), far(dtype)
    tile.copy_(case.logits)
    stats = poisoned_stats(3, device, testing.Guards())
    kernels.tile_fwd(tile, case.targets, stats, held, Logits(**options))
    near, near_held = fold(*case, torch.bfloat16, **options)
    assert all(map(torch.equal, stats, near))
    assert near_held is not None
    assert torch.equal(held, near_held)
    factors = upstream(device, 3)
    kernels.tile_bwd(tile, case.targets, stats, factors, out, Logits(**options))
    assert torch.equal(out, tile_bwd(*case, near, factors, dtype, **options))


def test_rows_lie_on_the_first_axis_of_the_grid(device: torch.device, spied: Any) -> None:
    """The others end at 65535."""
    from prefkern.kernels.triton import logprobs as kernels

    grids = spied(kernels, "_tile_fwd_kernel", "_tile_bwd_kernel", "_held_bwd_kernel")
    N = 70_000
    tile, row = torch.zeros(1, 8, device=device).expand(N, 8), torch.zeros(N, device=device)
    given, logits = (tile, row.long(), RowStats(row, row, row, row)), Logits(**options_of("plain", device))
    kernels.tile_fwd(*given, None, logits)
    kernels.tile_bwd(*given, Factors(), tile, logits)
    kernels.held_bwd(*given, Factors(row, row), tile, logits)
    assert grids == [(N,)] * 3


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds() -> None:
    case = testing.logit_case(70_000, 40, device="cuda:0")
    options = options_of("plain", torch.device("cuda:0"))
    stats, _ = fold(*case, **options)
    assert_stats(stats, *case, **options)


def test_columns_must_be_contiguous(device: torch.device) -> None:
    from prefkern.kernels.triton import logprobs as kernels

    good, row = torch.zeros(4, 6, device=device), torch.zeros(4, device=device)
    bad = torch.zeros(6, 4, device=device).T
    two = torch.zeros(4, 2, device=device)[:, 0]
    targets, stats, logits = row.long(), RowStats(row, row, row, row), Logits()
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_fwd: tile must have a unit stride .*\(1, 4\)"):
        kernels.tile_fwd(bad, targets, stats, None, logits)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_fwd: held must have a unit stride"):
        kernels.tile_fwd(good, targets, stats, bad, logits)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_fwd: log_sum must have a unit stride"):
        kernels.tile_fwd(good, targets, stats._replace(log_sum=two), None, logits)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_fwd: row_temperature must have a unit stride"):
        kernels.tile_fwd(good, targets, stats, None, Logits(temperature=two))
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_bwd: out must have a unit stride"):
        kernels.tile_bwd(good, targets, stats, Factors(), bad, logits)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.tile_bwd: c must have a unit stride"):
        kernels.tile_bwd(good, targets, stats, Factors(two), good.clone(), logits)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.held_bwd: held must have a unit stride"):
        kernels.held_bwd(bad, targets, stats, Factors(row, row), good, logits)
    assert kernels.IN_PLACE is False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_the_size_that_runs_on_a_gpu(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefkern.kernels.triton import logprobs
    from prefkern.kernels.triton.launch import Tile

    tiles = {2: Tile(512, 8, 8, 1), 4: Tile(512, 4, 8, 1)}
    monkeypatch.setattr(logprobs, "SOFTCAP_FORWARD", tiles)
    monkeypatch.setattr(logprobs, "BACKWARD", tiles)
    case = testing.logit_case(3, 2 * 4096 + 1001, dtype=dtype, device=device)
    options = options_of("all", device, 3)
    stats, _ = fold(*case, **options)
    assert_stats(stats, *case, **options)
    loss = upstream(device, 3)
    assert_gradient(gradient(*case, stats, loss, **options), *case, loss, **options)


@pytest.mark.gpu
def test_new_numbers_compile_nothing_new() -> None:
    """Temperature, scale, softcap and lengths are runtime values; a scale of 1 is left out."""
    from prefkern.kernels.triton import logprobs as kernels

    device = torch.device("cuda:0")
    compiled = []
    for i, V in enumerate((320, 336, 4096, 9600)):
        case = testing.logit_case(3 + i, V, device=device)
        options = options_of("softcap", device) | {"softcap": 3.0 + i, "temperature": 0.5 + i}
        fold(*case, FLOAT, logit_scale=1.5 + i, **options)
        compiled.append(sum(len(cache[0]) for cache in kernels._tile_fwd_kernel.device_caches.values()))
    assert compiled[0] == compiled[-1]
