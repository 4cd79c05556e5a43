"""Log-probabilities from logits: forward and backward against float64, through guard bands and poison."""

from typing import Any

import pytest
import torch
from cases import DTYPES, OPTIONS, ROWS, assert_stats, options_of, poisoned_stats, with_special_rows
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import RowStats


def forward(
    logits: Tensor, targets: Tensor, wanted: str = "eqmt", row_gap: int = 0, **options: Any
) -> tuple[RowStats, Tensor]:
    from prefkern.kernels.triton import rowwise

    guard = testing.Guards()
    stats = poisoned_stats(len(targets), logits.device, guard, wanted)
    view = guard(logits, row_gap=row_gap)
    temperature = options.pop("temperature")
    rows = guard(temperature) if isinstance(temperature, Tensor) else temperature
    rowwise.logprobs_fwd(view, guard(targets), stats, temperature=rows, **options)
    guard.check()
    assert torch.equal(view.nan_to_num(3.0), logits.nan_to_num(3.0))  # not written
    return stats, view


def backward(
    logits: Tensor, targets: Tensor, stats: RowStats, c: Tensor, e: Tensor | None, row_gap: int = 0, **options: Any
) -> Tensor:
    from prefkern.kernels.triton import rowwise

    guard = testing.Guards()
    grad = guard(testing.poisoned(*logits.shape, dtype=logits.dtype, device=logits.device), row_gap=row_gap)
    guarded = RowStats._make(map(guard, stats))
    rowwise.logprobs_bwd(guard(logits), guard(targets), guarded, guard(c), guard(e), grad, **options)
    guard.check()
    return grad


def upstream(device: torch.device, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows).to(device), torch.randn(rows).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_statistics(name: str, dtype: torch.dtype, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, dtype=dtype, device=device, masked=0.1)
    options = options_of(name, device)
    stats, _ = forward(*case, row_gap=7, **options)
    assert_stats(stats, *case, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "entropy"), [*((name, True) for name in OPTIONS), ("plain", False), ("all", False)])
def test_gradient(name: str, dtype: torch.dtype, entropy: bool, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, dtype=dtype, device=device, masked=0.1)
    options = options_of(name, device)
    stats, _ = forward(*case, "e" if entropy else "", **options)
    c, e = upstream(device)
    grad = backward(*case, stats, c, e if entropy else None, row_gap=5, **options)
    want = testing.grads_from_logits(*case, c, e if entropy else None, **options)
    eager = testing.grads_from_logits(*case, c, e if entropy else None, dtype=dtype, **options)
    testing.assert_not_worse(grad, want, eager, name="grad")


@pytest.mark.parametrize("name", ["plain", "all"])
def test_special_rows(name: str, device: torch.device, columns: int) -> None:
    case = with_special_rows(testing.logit_case(ROWS, columns, device=device, ignored=0.0))
    options = options_of(name, device)
    stats, _ = forward(*case, **options)
    assert_stats(stats, *case, **options)
    c, e = upstream(device)
    grad = backward(*case, stats, c, e, **options)
    want = testing.grads_from_logits(*case, c, e, **options)
    eager = testing.grads_from_logits(*case, c, e, dtype=torch.float32, **options)
    testing.assert_not_worse(grad, want, eager, name="grad")


def test_ignored_rows_are_zero_and_not_read(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device, ignored=0.4)
    ignored = case.targets == testing.IGNORE
    assert 2 <= ignored.sum() < ROWS
    logits = case.logits.masked_fill(ignored[:, None], float("nan"))
    options = options_of("plain", device)
    stats, _ = forward(logits, case.targets, **options)
    assert_stats(stats, case.logits, case.targets, **options)
    c, e = (value.masked_fill(ignored, float("nan")) for value in upstream(device))
    for value in stats[:4]:
        value[ignored] = float("nan")  # nor are their statistics
    options["temperature"] = torch.ones(ROWS, device=device).masked_fill(ignored, float("nan"))
    grad = backward(logits, case.targets, stats, c, e, **options)
    assert not grad[ignored].any()
    assert grad[~ignored].isfinite().all()


def test_any_ignore_index(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of("plain", device) | {"ignore_index": int(case.targets[0])}
    stats, _ = forward(*case, **options)
    assert stats.logps[0] == 0
    assert stats.logps[2].isnan()  # -100 is now outside
    assert_stats(stats, *case, **options)
    c, e = upstream(device)
    grad = backward(*case, stats, c, e, **options)
    assert not grad[0].any()
    assert grad[2].isnan().all()


@pytest.mark.parametrize("wanted", ["", "e", "q", "m", "t"])
def test_each_statistic_alone_is_the_same(wanted: str, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, dtype=torch.bfloat16, device=device)
    options = options_of("all", device)
    whole, _ = forward(*case, **options)
    alone, _ = forward(*case, wanted, **options)
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
    stats, _ = forward(logits, targets, "t", **options_of("plain", device))
    assert stats.is_top1 is not None
    assert stats.is_top1.tolist()[:8] == [True, False, True, False, True, False, True, False]
    assert torch.equal(stats.is_top1, logits.argmax(-1) == targets)


@pytest.mark.parametrize("offset", [3e4, -3e4])
def test_a_common_offset_costs_nothing(offset: float, device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device, offset=offset)
    options = options_of("cold", device)
    stats, _ = forward(*case, "eq", **options)
    want = testing.stats_from_logits(*case, **options)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        error = (getattr(stats, name).double() - getattr(want, name)).abs()
        assert error.max() <= 4e-7 * getattr(want, name).abs().clamp(min=4.0).max(), name
    grad = backward(*case, stats, torch.ones(ROWS, device=device), None, **options)
    want_grad = testing.grads_from_logits(*case, torch.ones(ROWS, device=device), **options)
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
    stats, _ = forward(logits, targets, "eq", **options)
    assert_stats(stats, logits, targets, **options)
    assert stats.logps[0].item() == pytest.approx(-torch.tensor(columns).log().item(), rel=1e-6)
    c, e = upstream(device, 4)
    grad = backward(logits, targets, stats, c, e, **options)
    want = testing.grads_from_logits(logits, targets, c, e, **options)
    eager = testing.grads_from_logits(logits, targets, c, e, dtype=torch.float32, **options)
    testing.assert_not_worse(grad, want, eager, name="grad")


def test_log_probabilities_are_never_positive(device: torch.device, columns: int) -> None:
    logits = torch.full((4, columns), -40.0, device=device)
    targets = torch.arange(4, device=device)
    logits[targets, targets] = torch.tensor([0.1, 7.7, 23.3, 31.0], device=device)
    stats, _ = forward(logits, targets, "e", softcap=30.0, temperature=0.7, ignore_index=-100)
    assert stats.entropy is not None
    assert (stats.logps <= 0).all()
    assert stats.logps.abs().max() < 1e-6
    assert stats.entropy.abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (2, 3), (3, 64), (3, 128), (2, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_and_exact_shapes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    case = testing.logit_case(*shape, dtype=dtype, device=device, ignored=0.0)
    options = options_of("plain", device)
    stats, _ = forward(*case, **options)
    assert_stats(stats, *case, **options)
    c, e = upstream(device, shape[0])
    grad = backward(*case, stats, c, e, **options)
    want = testing.grads_from_logits(*case, c, e, **options)
    eager = testing.grads_from_logits(*case, c, e, dtype=dtype, **options)
    testing.assert_not_worse(grad, want, eager, name="grad")


def test_int32_targets(device: torch.device, columns: int) -> None:
    case = testing.logit_case(4, columns, device=device)
    options = options_of("plain", device)
    wide, _ = forward(*case, **options)
    narrow, _ = forward(case.logits, case.targets.int(), **options)
    assert all(map(torch.equal, wide, narrow))


def test_targets_far_outside(device: torch.device, columns: int) -> None:
    """Beyond 32 bits: a target that a narrowing would fold back into the vocabulary."""
    logits = torch.randn(3, columns, device=device)
    targets = torch.tensor([-7, 2**32 + 5, 2**31], device=device)
    options = options_of("plain", device)
    stats, _ = forward(logits, targets, **options)
    assert_stats(stats, logits, targets, **options)
    assert backward(logits, targets, stats, *upstream(device, 3), **options).isnan().all()


def test_a_row_does_not_depend_on_the_others(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, dtype=torch.bfloat16, device=device)
    options = options_of("softcap", device)
    whole, _ = forward(*case, **options)
    part, _ = forward(case.logits[4:7], case.targets[4:7], **options)
    for a, b in zip(whole, part, strict=True):
        assert a is not None
        assert torch.equal(a[4:7], b)


def test_offsets_beyond_32_bits(device: torch.device, columns: int) -> None:
    """The last row begins after 2^31 elements, though its number and the stride fit in 32 bits."""
    from prefkern.kernels.triton import rowwise

    stride = 2**30 + 24

    def far() -> Tensor:
        memory = torch.empty(2 * stride + columns, dtype=torch.float16, device=device)
        return memory.as_strided((3, columns), (stride, 1))

    case = testing.logit_case(3, columns, dtype=torch.float16, device=device, ignored=0.0)
    logits, grad = far(), far()
    logits.copy_(case.logits)
    options = options_of("plain", device, 3)
    stats = poisoned_stats(3, device, testing.Guards())
    rowwise.logprobs_fwd(logits, case.targets, stats, **options)
    near, _ = forward(*case, **options)
    assert all(map(torch.equal, stats, near))
    c, e = upstream(device, 3)
    rowwise.logprobs_bwd(logits, case.targets, stats, c, e, grad, **options)
    assert torch.equal(grad, backward(*case, near, c, e, **options))


def test_rows_lie_on_the_first_axis_of_the_grid(device: torch.device, spied: Any) -> None:
    """The others end at 65535."""
    from prefkern.kernels.triton import rowwise

    grids = spied(rowwise, "_logprobs_fwd_kernel", "_logprobs_bwd_kernel")
    N = 70_000
    logits, row = torch.zeros(1, 8, device=device).expand(N, 8), torch.zeros(N, device=device)
    stats = RowStats(row, row, row)
    options = options_of("plain", device)
    rowwise.logprobs_fwd(logits, row.long(), stats, **options)
    rowwise.logprobs_bwd(logits, row.long(), stats, row, None, torch.empty(N, 8, device=device), **options)
    assert grids == [(N,), (N,)]


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds() -> None:
    case = testing.logit_case(70_000, 40, device="cuda:0")
    options = options_of("plain", torch.device("cuda:0"))
    stats, _ = forward(*case, **options)
    assert_stats(stats, *case, **options)


def test_columns_must_be_contiguous(device: torch.device) -> None:
    from prefkern.kernels.triton import rowwise

    logits = torch.randn(9, 4, device=device).T
    row = torch.zeros(4, device=device)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.logprobs_fwd: logits must have a unit stride .*\(1, 4\)"):
        rowwise.logprobs_fwd(logits, row.long(), RowStats(row, row, row), **options_of("plain", device))
    two = torch.zeros(4, 2, device=device)[:, 0]
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.logprobs_bwd: c must have a unit stride"):
        rowwise.logprobs_bwd(
            logits.contiguous(),
            row.long(),
            RowStats(row, row, row),
            two,
            None,
            logits.clone(),
            **options_of("plain", device),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_the_size_that_runs_on_a_gpu(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefkern.kernels.triton import rowwise
    from prefkern.kernels.triton.launch import Tile

    tiles = {2: Tile(512, 8, 8, 1), 4: Tile(512, 4, 8, 1)}
    monkeypatch.setattr(rowwise, "SOFTCAP_FORWARD", tiles)
    monkeypatch.setattr(rowwise, "BACKWARD", tiles)
    case = testing.logit_case(3, 2 * 4096 + 1001, dtype=dtype, device=device)
    options = options_of("all", device, 3)
    stats, _ = forward(*case, **options)
    assert_stats(stats, *case, **options)
    c, e = upstream(device, 3)
    grad = backward(*case, stats, c, e, **options)
    want = testing.grads_from_logits(*case, c, e, **options)
    eager = testing.grads_from_logits(*case, c, e, dtype=dtype, **options)
    testing.assert_not_worse(grad, want, eager, name="grad")
