"""The gradient of rows, recomputed from some columns of a tile or of logits, or made of the held unscaled gradient:
against float64, through guard bands and poison."""

import pytest
import torch
from cases import (
    DTYPES,
    FLOAT,
    OPTIONS,
    ROWS,
    assert_gradient,
    assert_stats,
    combined,
    fold,
    gradient,
    held_bwd,
    options_of,
    tile_bwd,
    upstream,
    with_special_rows,
)
from torch import Tensor

from prefkern import testing
from prefkern.kernels.interface import Factors, Logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "entropy"), [*((name, True) for name in OPTIONS), ("plain", False), ("all", False)])
def test_gradient(name: str, dtype: torch.dtype, entropy: bool, device: torch.device, columns: int) -> None:
    """Of logits of any dtype, in it."""
    case = testing.logit_case(ROWS, columns, dtype=dtype, device=device, masked=0.1)
    options = options_of(name, device)
    stats, _ = fold(*case, wanted="e" if entropy else "", **options)
    loss = upstream(device)
    loss = loss if entropy else Factors(loss.c)
    assert_gradient(gradient(*case, stats, loss, **options), *case, loss, **options)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_special_rows(name: str, device: torch.device, columns: int) -> None:
    tile, targets = with_special_rows(testing.logit_case(ROWS, columns, device=device, ignored=0.0))
    options = options_of(name, device)
    stats, held = fold(tile, targets, FLOAT, **options)
    factors = upstream(device)
    want, eager = (combined(tile, targets, factors, dtype, **options) for dtype in (torch.float64, FLOAT))
    testing.assert_not_worse(tile_bwd(tile, targets, stats, factors, **options), want, eager, name="tile_bwd")
    if name == "plain":
        assert held is not None
        testing.assert_not_worse(held_bwd(held, targets, stats, factors), want, eager, name="held_bwd")
    assert_gradient(gradient(tile, targets, stats, factors, **options), tile, targets, factors, **options)


def test_ignored_rows_are_zero_and_not_read(device: torch.device, columns: int) -> None:
    case = testing.logit_case(ROWS, columns, device=device, ignored=0.4)
    ignored = case.targets == testing.IGNORE
    assert 2 <= ignored.sum() < ROWS
    tile = case.logits.masked_fill(ignored[:, None], float("nan"))
    options = options_of("plain", device)
    stats, held = fold(tile, case.targets, FLOAT, **options)
    assert_stats(stats, case.logits, case.targets, **options)
    assert held is not None
    poisoned = held.masked_fill(ignored[:, None], float("nan"))
    factors = Factors._make(value.masked_fill(ignored, float("nan")) for value in upstream(device))
    for value in stats[:4]:
        value[ignored] = float("nan")  # nor are their statistics
    temperature = torch.ones(ROWS, device=device).masked_fill(ignored, float("nan"))
    for out in (
        held,
        tile_bwd(tile, case.targets, stats, factors, **options),
        tile_bwd(tile, case.targets, stats, factors, **options | {"temperature": temperature}),
        held_bwd(poisoned, case.targets, stats, factors),
    ):
        assert not out[ignored].any()
        assert out[~ignored].isfinite().all()


@pytest.mark.parametrize("given", ["u", "c", "e", "c and e"])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_recomputed_gradient(name: str, dtype: torch.dtype, given: str, device: torch.device, columns: int) -> None:
    """In two slices of the vocabulary, the target in one of them."""
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of(name, device) | {"bias": torch.randn(columns).to(device), "logit_scale": 1.3}
    stats, _ = fold(*case, **options)
    factors = Factors._make(
        value if letter in given else None for value, letter in zip(upstream(device), "ce", strict=True)
    )
    cut = columns // 2 + 1
    parts = [
        tile_bwd(
            case.logits[:, part],
            case.targets,
            stats,
            factors,
            dtype,
            part.start,
            **options | {"bias": options["bias"][part]},
        )
        for part in (slice(0, cut), slice(cut, columns))
    ]
    want = combined(*case, factors, **options)
    eager = combined(*case, factors, FLOAT, **options).to(dtype)
    testing.assert_not_worse(torch.cat(parts, 1), want, eager, name="out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_from_the_held_tile(dtype: torch.dtype, device: torch.device, columns: int) -> None:
    """In two slices of the vocabulary. The float64 value of the same rounded tile is the oracle."""
    case = testing.logit_case(ROWS, columns, device=device)
    options = options_of("cold", device)
    stats, held = fold(*case, dtype, wanted="e", **options)
    assert held is not None
    c, e = factors = upstream(device)
    cut = columns // 2 + 1
    parts = [
        held_bwd(held[:, part], case.targets, stats, factors, dtype, part.start)
        for part in (slice(0, cut), slice(cut, columns))
    ]
    got = torch.cat(parts, 1)
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
        want, eager = combined(*case, factors, **options), combined(*case, factors, FLOAT, **options)
        testing.assert_not_worse(got, want, eager, name="g")


def test_targets_outside_a_slice_have_no_entry(device: torch.device, columns: int) -> None:
    case = testing.logit_case(4, columns, device=device, ignored=0.0)
    options = options_of("plain", device, 4)
    stats, held = fold(*case, FLOAT, **options)
    assert held is not None
    factors = Factors(torch.ones(4, device=device), torch.zeros(4, device=device))
    softmax = torch.softmax(case.logits.double(), -1).float()
    for outside in (-1, -101, columns, columns + 300, 2**32 + 1):
        targets = torch.full((4,), outside, device=device)
        plain = held.scatter(1, case.targets[:, None], softmax.gather(1, case.targets[:, None]))
        torch.testing.assert_close(held_bwd(plain, targets, stats, factors), plain, rtol=1e-6, atol=0)
        moved = held_bwd(plain, targets + 1000, stats, factors, v_start=1000)
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=0)
    narrow = slice(0, columns - 7)
    late = torch.full((4,), columns - 3, device=device)
    torch.testing.assert_close(
        tile_bwd(case.logits[:, narrow], late, stats, **options), softmax[:, narrow], rtol=1e-5, atol=1e-9
    )


def test_a_bad_target_is_nan_in_every_slice(device: torch.device, columns: int) -> None:
    tile = torch.randn(3, columns, device=device)
    targets = torch.tensor([-7, columns, 2**32 + 5], device=device)
    options = options_of("plain", device, 3)
    stats, held = fold(tile, targets, torch.bfloat16, **options)
    assert held is not None
    assert held.isnan().all()
    half = columns // 2
    assert tile_bwd(tile[:, half:], targets, stats, v_start=half, **options).isnan().all()
    assert held_bwd(held, targets, stats, upstream(device, 3)).isnan().all()


def test_targets_far_outside(device: torch.device, columns: int) -> None:
    """Beyond 32 bits: a target that a narrowing would fold back into the vocabulary."""
    logits = torch.randn(3, columns, device=device)
    targets = torch.tensor([-7, 2**32 + 5, 2**31], device=device)
    options = options_of("plain", device)
    stats, _ = fold(logits, targets, **options)
    assert_stats(stats, logits, targets, **options)
    assert gradient(logits, targets, stats, upstream(device, 3), **options).isnan().all()


@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (2, 3), (3, 64), (3, 128), (2, 129)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_small_and_exact_shapes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    case = testing.logit_case(*shape, dtype=dtype, device=device, ignored=0.0)
    options = options_of("plain", device)
    stats, held = fold(*case, FLOAT, **options)
    assert_stats(stats, *case, **options)
    factors = upstream(device, shape[0])
    assert_gradient(gradient(*case, stats, factors, **options), *case, factors, **options)
    assert held is not None
    wide = testing.LogitCase(case.logits.float(), case.targets)
    eager = testing.unscaled_from_logits(*wide, dtype=FLOAT, **options)
    testing.assert_not_worse(held, testing.unscaled_from_logits(*wide, **options), eager, name="u")
    want, eager = combined(*wide, factors, **options), combined(*wide, factors, FLOAT, **options)
    testing.assert_not_worse(tile_bwd(*case, stats, factors, **options), want, eager, name="tile_bwd")
    testing.assert_not_worse(held_bwd(held, case.targets, stats, factors), want, eager, name="held_bwd")


def test_a_held_tile_beyond_32_bits(device: torch.device, columns: int) -> None:
    """The last row begins after 2^31 elements, though its number and the stride fit in 32 bits."""
    from prefkern.kernels.triton import logprobs as kernels

    stride = 2**30 + 24

    def far() -> Tensor:
        memory = torch.empty(2 * stride + columns, dtype=torch.bfloat16, device=device)
        return memory.as_strided((3, columns), (stride, 1))

    case = testing.logit_case(3, columns, device=device, ignored=0.0)
    stats, near = fold(*case, torch.bfloat16)
    assert near is not None
    held, out = far(), far()
    held.copy_(near)
    kernels.tile_bwd(case.logits, case.targets, stats, Factors(), out, Logits())
    assert torch.equal(out, tile_bwd(*case, stats, Factors(), torch.bfloat16))
    factors = upstream(device, 3)
    kernels.held_bwd(held, case.targets, stats, factors, out, Logits())
    assert torch.equal(out, held_bwd(near, case.targets, stats, factors, torch.bfloat16))
