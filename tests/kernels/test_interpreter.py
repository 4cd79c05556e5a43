"""The corrected interpreter computes bfloat16 as torch does: every case is wrong in the interpreter as it comes."""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled where there is a CUDA device", allow_module_level=True)

import interpreter
import triton
import triton.language as tl

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _corrected() -> None:
    interpreter.install()


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, compare_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, -x)
    tl.store(out_ptr + 4 * N + i, tl.maximum(x, y))
    tl.store(out_ptr + 5 * N + i, tl.minimum(x, y))
    tl.store(out_ptr + 6 * N + i, tl.where(x < y, x, y * 0.5))
    tl.store(out_ptr + 7 * N + i, tl.abs(x))
    tl.store(out_ptr + 8 * N + i, tl.clamp(x, -0.5, 0.5))
    tl.store(compare_ptr + i, x < y)


def test_elementwise() -> None:
    x, y = torch.randn(2, 64).to(BF16)
    x[:3] = torch.tensor([float("nan"), float("inf"), 0.0])
    out, compared = torch.empty(9, 64, dtype=BF16), torch.empty(64, dtype=torch.bool)
    _elementwise_kernel[(1,)](x, y, out, compared, N=64)
    want = [x + y, x - y, x * y, -x, torch.fmax(x, y), torch.fmin(x, y)]
    want += [torch.where(x < y, x, y * 0.5), x.abs(), x.clamp(-0.5, 0.5)]
    for i, value in enumerate(want[:8]):
        assert torch.equal(out[i].view(torch.int16)[1:], value.view(torch.int16)[1:]), i
        assert bool(out[i, 0].isnan()) == bool(value[0].isnan()), i
    assert torch.equal(out[8, 1:], want[8][1:])
    assert torch.equal(compared, x < y)


@triton.jit
def _cast_kernel(x_ptr, narrow_ptr, wide_ptr, half_ptr, integer_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    narrow = x.to(tl.bfloat16)
    tl.store(narrow_ptr + i, narrow)
    tl.store(narrow_ptr + N + i, x)  # the store casts
    tl.store(narrow_ptr + 2 * N + i, x.to(tl.float16).to(tl.bfloat16))
    tl.store(narrow_ptr + 3 * N + i, i.to(tl.bfloat16))
    tl.store(wide_ptr + i, narrow.to(tl.float32))
    tl.store(half_ptr + i, narrow.to(tl.float16))
    tl.store(integer_ptr + i, narrow.to(tl.int32))


def test_casts_round_to_nearest_even() -> None:
    x = torch.randn(1024)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 1e-40])  # halfway, overflow, subnormal
    x[:5] = ties
    x[5:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    narrow, wide = torch.empty(4, 1024, dtype=BF16), torch.empty(1024)
    half, integer = torch.empty(1024, dtype=torch.float16), torch.empty(1024, dtype=torch.int32)
    _cast_kernel[(1,)](x, narrow, wide, half, integer, N=1024)
    torch.testing.assert_close(narrow[0], x.to(BF16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrow[1], x.to(BF16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrow[2], x.half().to(BF16), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(narrow[3], torch.arange(1024).to(BF16))
    torch.testing.assert_close(wide, x.to(BF16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(half, x.to(BF16).half(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(integer[9:], x.to(BF16).int()[9:])


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    i = tl.arange(0, M)
    tl.store(out_ptr + i, tl.sum(x, 1))
    tl.store(out_ptr + M + i, tl.max(x, 1))
    tl.store(out_ptr + 2 * M + i, tl.min(x, 1))
    tl.store(out_ptr + 3 * M + i, tl.reduce(x, 1, _add))
    tl.store(index_ptr + i, tl.argmax(x, 1))
    tl.store(index_ptr + M + i, tl.argmin(x, 1))


def test_reductions() -> None:
    x = torch.randn(8, 32).to(BF16)
    out, index = torch.empty(4, 8, dtype=BF16), torch.empty(2, 8, dtype=torch.int32)
    _reduce_kernel[(1,)](x, out, index, M=8, N=32)
    torch.testing.assert_close(out[0], x.float().sum(1).to(BF16), rtol=2**-7, atol=2**-7)
    assert torch.equal(out[1], x.amax(1))
    assert torch.equal(out[2], x.amin(1))
    running = x[:, 0]
    for column in x.T[1:]:
        running = running + column
    assert torch.equal(out[3], running)
    assert torch.equal(index, torch.stack([x.argmax(1), x.argmin(1)]).int())


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


def test_dot() -> None:
    a, b = torch.randn(2, 32, 32).to(BF16)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def _scan_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.associative_scan(x, -1, _add))
    tl.store(out_ptr + M * N + i, tl.cumsum(x, -1))
    tl.store(out_ptr + 2 * M * N + i, tl.associative_scan(x, -2, _add, reverse=True))


def test_scans_along_a_negative_axis() -> None:
    x = torch.randn(4, 8)
    out = torch.empty(3, 4, 8)
    _scan_kernel[(1,)](x, out, M=4, N=8)
    torch.testing.assert_close(out[0], x.cumsum(1))
    torch.testing.assert_close(out[1], x.cumsum(1))
    torch.testing.assert_close(out[2], x.flip(0).cumsum(0).flip(0))


@triton.jit
def _mask_kernel(x_ptr, limit_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    small = tl.load(limit_ptr) < 7  # a comparison of integers as a mask
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=small, other=-1.0))


def test_a_comparison_is_a_mask() -> None:
    x, out = torch.randn(8), torch.empty(8)
    _mask_kernel[(1,)](x, torch.tensor([3]), out, N=8)
    assert torch.equal(out, x)
    _mask_kernel[(1,)](x, torch.tensor([9]), out, N=8)
    assert (out == -1).all()


@triton.jit
def _shifted_kernel(x_ptr, out_ptr, load_at, store_at, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + load_at + i, mask=i < N - 1)
    tl.store(out_ptr + store_at + i, x, mask=i < N - 1)


@pytest.mark.parametrize(("load_at", "store_at"), [(0, 0), (1, 0), (-1, 0), (0, 2), (0, -1)])
def test_no_access_outside_the_tensors(load_at: int, store_at: int) -> None:
    """The values are discarded or land in unused memory: nothing but the addresses shows it."""
    memory = torch.zeros(2, 64)
    x, out = memory[0, 16:23], memory[1, 16:23]
    if load_at == store_at == 0:
        _shifted_kernel[(1,)](x, out, load_at, store_at, N=8)
    else:
        kind = "load" if load_at else "store"
        with pytest.raises(
            triton.runtime.errors.InterpreterError, match=f"masked_{kind} of 7 elements, some .* outside"
        ):
            _shifted_kernel[(1,)](x, out, load_at, store_at, N=8)


def test_encoding_agrees_with_torch() -> None:
    bits = torch.arange(-(2**31), 2**31 - 1, 65521, dtype=torch.int64).to(torch.int32)
    values: Tensor = bits.view(torch.float32)
    ours = interpreter.encode(values.numpy()).astype(np.int32)
    theirs = values.to(BF16).view(torch.int16).numpy().astype(np.int32) & 0xFFFF
    finite = ~values.isnan().numpy()
    assert (ours == theirs)[finite].all()
    assert np.isnan(interpreter.decode(ours.astype(np.uint16))[~finite]).all()
