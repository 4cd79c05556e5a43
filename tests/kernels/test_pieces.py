"""The benchmark's row pieces call the kernels as they are, find them right, and do not time them when they are not."""

from types import SimpleNamespace

import pytest
import torch

from prefkern.commands.benchmark.head.operands import Shape
from prefkern.commands.benchmark.head.pieces import fold_kernels, row_kernels
from prefkern.commands.benchmark.measure import Budget

MEASURES = {"rows of logits": row_kernels, "fold": fold_kernels}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_are_right_and_so_are_timed(
    name: str, dtype: torch.dtype, device: torch.device, columns: int
) -> None:
    from prefkern.kernels.triton import logprobs as kernels

    budget = Budget(None if device.type == "cuda" else 0.0)
    found = list(MEASURES[name](kernels, Shape(3, 1, columns), dtype, device, budget))
    assert len(found) == {"rows of logits": 2, "fold": 3}[name]
    for piece in found:
        assert piece.error < max(torch.finfo(dtype).eps, 1e-5)
        assert piece.note == ("" if device.type == "cuda" else "not timed: out of time")


@pytest.mark.parametrize("name", MEASURES)
def test_a_kernel_that_is_wrong_is_not_timed(name: str, device: torch.device, columns: int) -> None:
    from prefkern.kernels.triton import logprobs as kernels

    def wrong(tile, *rest, **options):
        return kernels.tile_fwd(tile.flip(0), *rest, **options)

    broken = SimpleNamespace(**{**vars(kernels), "tile_fwd": wrong})
    piece = next(iter(MEASURES[name](broken, Shape(3, 1, columns), torch.float32, device, Budget(None))))
    assert piece.time is None
    assert "exceeds" in piece.note
