"""Products of 16-bit operands on a CPU: float32 sums, whatever the slices in which operands are upcast."""

import pytest
import torch

from prefkern.head.engine import products


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(7, 90, 5), (90, 7, 5), (1, 1, 1), (16, 16, 3)])
@pytest.mark.parametrize("out_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_products(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    shape: tuple[int, int, int],
    accumulate: bool,
) -> None:
    monkeypatch.setattr(products, "native", lambda dtype: False)
    monkeypatch.setattr(products.blocks, "CAST_BYTES", 600)  # several slices, the last of them short
    M, K, P = shape
    a, b = torch.randn(K, M).to(dtype).T, torch.randn(K, P).to(dtype)
    out = torch.randn(M, P).to(out_dtype or dtype)
    want = a.double() @ b.double() + (out.double() if accumulate else 0.0)
    size = a.double().abs() @ b.double().abs() + out.double().abs()
    with products.count_products() as count:
        products.mm(a, b, out, accumulate=accumulate)
    assert count.multiply_adds == M * K * P
    # sums of K terms in float32, and one rounding of what is added, one of the result, where that has 16 bits
    rounding = (K + 1) * torch.finfo(torch.float32).eps * size
    if out.dtype != torch.float32:
        rounding += torch.finfo(dtype).eps * (size if accumulate else want.abs()) + torch.finfo(dtype).smallest_normal
    assert ((out.double() - want).abs() <= rounding).all()


def test_bfloat16_is_multiplied_in_16_bits_only_where_the_processor_can() -> None:
    flags = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT"):
        assert not products.native(torch.bfloat16)
    elif flags:
        assert products.native(torch.bfloat16)
    assert not products.native(torch.float16)
    assert products.native(torch.float32)
