"""Row scaling against float64, through guard bands and poison."""

from typing import Any

import pytest
import torch
from cases import DTYPES
from torch import Tensor

from prefkern import testing

FLOAT = torch.float32
N = 11


def scale_rows(x: Tensor, row: Tensor, dtype: torch.dtype, post: Tensor | None = None, other: Any = None) -> Tensor:
    """The kernel behind guards, with gaps between the rows, into poison."""
    from prefkern.kernels.triton import scale as kernels

    guard = testing.Guards()
    out = guard(testing.poisoned(*x.shape, dtype=dtype, device=x.device), row_gap=3)
    if other is not None:
        other = guard(other[0], row_gap=5), guard(other[1])
    kernels.scale_rows(guard(x, row_gap=2), guard(row), out, post=guard(post), other=other)
    guard.check()
    return out


def exact(x: Tensor, row: Tensor, post: Tensor | None = None, other: Any = None, wide: Any = torch.float64) -> Tensor:
    out = x.to(wide) * row.to(wide)[:, None]
    if other is not None:
        out = out + other[0].to(wide) * other[1].to(wide)[:, None]
    return out if post is None else out * post.to(wide)


def operands(width: int, dtype: torch.dtype, device: torch.device, rows: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x, row = torch.randn(rows, width, generator=generator), torch.randn(rows, generator=generator)
    return x.to(dtype).to(device), row.to(device)


@pytest.mark.parametrize("form", ["plain", "post", "other", "other and post"])
@pytest.mark.parametrize("written", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_once(dtype: torch.dtype, written: torch.dtype, form: str, device: torch.device, columns: int) -> None:
    x, row = operands(columns, dtype, device)
    post = torch.tensor(2.0**-9, device=device) if "post" in form else None
    other = operands(columns, dtype, device) if "other" in form else None
    if other is not None:
        other = other[0].flip(0) * 3, other[1].flip(0)
    got = scale_rows(x, row, written, post, other)
    eager = exact(x, row, post, other, FLOAT).to(written)
    testing.assert_not_worse(got, exact(x, row, post, other), eager, name=form)
    if other is None:  # one product in float32, one rounding: no two ways
        assert torch.equal(got, eager)


@pytest.mark.parametrize("width", [1, 16, 128, 129, 256])
def test_widths_at_the_edges_of_a_tile(width: int, device: torch.device) -> None:
    for dtype in (FLOAT, torch.bfloat16):
        x, row = operands(width, dtype, device)
        assert torch.equal(scale_rows(x, row, dtype), exact(x, row, wide=FLOAT).to(dtype))
    assert scale_rows(x[:0], row[:0], dtype).shape == (0, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype, device: torch.device, columns: int) -> None:
    from prefkern.kernels.triton import scale as kernels

    x, row = operands(columns, dtype, device)
    want = exact(x, row, wide=FLOAT).to(dtype)
    kernels.scale_rows(x, row, x)
    assert torch.equal(x, want)


def test_rows_without_a_factor_are_zero_and_not_read(device: torch.device, columns: int) -> None:
    x, row = operands(columns, torch.bfloat16, device)
    dead = torch.arange(N, device=device) % 3 == 1
    row = row.masked_fill(dead, -0.0)
    x = x.masked_fill(dead[:, None], float("nan"))
    got = scale_rows(x, row, torch.bfloat16)
    assert not got[dead].any()
    assert torch.equal(got[~dead], exact(x, row, wide=FLOAT).to(x.dtype)[~dead])
    other = operands(columns, torch.bfloat16, device)
    half = other[1].masked_fill(torch.arange(N, device=device) % 2 == 0, 0.0)
    alive = x.masked_fill(dead[:, None], 7.0)
    both = dead & (half == 0)
    assert both.any()
    poisoned = [value.masked_fill(both[:, None], float("inf")) for value in (alive, other[0])]
    got = scale_rows(poisoned[0], row, FLOAT, None, (poisoned[1], half))
    assert not got[both].any()
    want = exact(alive, row, None, (other[0], half))
    eager = exact(alive, row, None, (other[0], half), FLOAT)
    testing.assert_not_worse(got, want.masked_fill(both[:, None], 0), eager.masked_fill(both[:, None], 0))


def test_a_nan_or_infinite_factor_shows(device: torch.device, columns: int) -> None:
    x, row = operands(columns, FLOAT, device)
    row[2], row[3] = float("nan"), float("inf")
    got = scale_rows(x, row, FLOAT)
    assert got[2].isnan().all()
    assert got[3].isinf().all()
    assert got[4:].isfinite().all()


def test_one_factor_for_all_rows(device: torch.device, columns: int) -> None:
    from prefkern.kernels.triton import scale as kernels

    x, _ = operands(columns, torch.bfloat16, device)
    factor = torch.tensor(0.3, device=device)
    want = (x.float() * factor).to(x.dtype)
    kernels.scale_rows(x, factor.expand(N), x)
    assert torch.equal(x, want)
    flat = x.reshape(-1)[None]  # as for a gradient of one dimension
    want = (flat.float() * factor).to(x.dtype)
    kernels.scale_rows(flat, factor.expand(1), flat)
    assert torch.equal(flat, want)


def test_wide_and_strided_operands(device: torch.device) -> None:
    from prefkern.kernels.triton import scale as kernels

    x, row = operands(N, FLOAT, device)
    out = torch.empty(N, N, device=device)
    kernels.scale_rows(x.T, row, out)
    assert torch.equal(out, x.T * row[:, None])
    kernels.scale_rows(x.double(), row, out)
    assert torch.equal(out, x * row[:, None])
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.scale_rows: out must have a unit stride"):
        kernels.scale_rows(x, row, out.T)
    with pytest.raises(ValueError, match=r"prefkern\.kernels\.scale_rows: other must have a unit stride"):
        kernels.scale_rows(x, row, out, other=(out.T, row))


def test_offsets_beyond_32_bits(device: torch.device, columns: int) -> None:
    """The last row begins after 2^31 elements, though its number and the stride fit in 32 bits."""
    from prefkern.kernels.triton import scale as kernels

    def far() -> Tensor:
        stride = 2**30 + 8
        memory = torch.empty(2 * stride + columns, dtype=torch.bfloat16, device=device)
        return memory.as_strided((3, columns), (stride, 1))

    x, row = operands(columns, torch.bfloat16, device, 3)
    wide, other, out = far(), far(), far()
    wide.copy_(x)
    other.copy_(x.flip(0))
    kernels.scale_rows(wide, row, out, other=(other, row))
    assert torch.equal(out, scale_rows(x, row, x.dtype, None, (x.flip(0), row)))


def test_rows_lie_on_the_first_axis_of_the_grid(device: torch.device, spied: Any) -> None:
    """The others end at 65535."""
    from prefkern.kernels.triton import scale as kernels

    grids = spied(kernels, "_scale_rows_kernel")
    x = torch.zeros(1, 8, device=device).expand(70_000, 8)
    kernels.scale_rows(x, x[:, 0], x)
    assert grids == [(70_000,)]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_torch_is_the_same(dtype: torch.dtype, other: bool, device: torch.device, columns: int) -> None:
    """What a CPU runs, in the same cases: rows that are not read, a power of two, float64 operands."""
    from prefkern.kernels.reference import logprobs

    x, row = operands(columns, dtype, device)
    second = (x.flip(0), row.flip(0)) if other else None
    row = row.masked_fill(torch.arange(N, device=device) == 5, 0.0)  # the middle: of both
    x = x.masked_fill((torch.arange(N, device=device) == 5)[:, None], float("nan"))
    if second is not None:
        second = second[0], second[1].masked_fill(torch.arange(N, device=device) == 5, 0.0)
    post = torch.tensor(0.25, device=device)
    out = torch.full_like(x, float("nan"))
    logprobs.scale_rows(x, row, out, post=post, other=second)
    if not other:
        assert torch.equal(out, scale_rows(x, row, dtype, post))
    want = exact(x, row, post, second).nan_to_num()
    testing.assert_not_worse(out, want, exact(x, row, post, second, FLOAT).nan_to_num().to(dtype))
    assert not out[5].any()


@pytest.mark.gpu
def test_new_numbers_compile_nothing_new() -> None:
    from prefkern.kernels.triton import scale as kernels

    compiled = []
    for i, width in enumerate((320, 336, 4096, 9600)):
        x, row = operands(width, torch.bfloat16, torch.device("cuda:0"), 3 + i)
        kernels.scale_rows(x, row, x)
        compiled.append(sum(len(cache[0]) for cache in kernels._scale_rows_kernel.device_caches.values()))
    assert compiled[0] == compiled[-1]
