"""The plan's predictions against what the engine does."""

import pytest
import torch

import prefkern as pk
from prefkern import plan, testing
from prefkern.products import count_products

N, H, V = 40, 16, 300


def held_rows(case: testing.HeadCase, max_memory: int | None) -> int:
    """Rows of the held tile among the saved tensors."""
    rows: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor.shape[1] == V and tensor.shape[0] <= N:
            rows.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pk.linear_token_logprobs(*case[:2], case.targets, max_memory=max_memory)
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 0, 1, 25, 1000])
def test_explain_agrees_with_the_engine(rows: int | None, dtype: torch.dtype) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, ignored=0.0)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    memory = None if rows is None else rows * V * dtype.itemsize
    predicted = plan.explain(N, H, V, dtype.itemsize, max_memory=memory)
    assert predicted.held_rows == held_rows(case, memory)
    assert predicted.held_bytes == predicted.held_rows * V * dtype.itemsize
    assert memory is None or predicted.held_bytes <= memory
    with count_products() as count:
        pk.linear_token_logprobs(*case[:2], case.targets, max_memory=memory).logps.sum().backward()
    assert count.products(N, H, V) == pytest.approx(predicted.products)


def test_the_default_is_peak_neutral_and_independent_of_the_length() -> None:
    assert plan.max_held_rows(4096, 128256, 2, None) == 2 * 4096  # 4VH bytes: a float32 gradient of the weight
    assert plan.max_held_rows(64, 32768, 4, None) == (1 << 30) // (32768 * 4)  # the floor of 1 GiB
    assert plan.explain(100, 64, 32768, 4, score=True).products == 1
    assert plan.explain(100, 64, 32768, 4, trainable=False).products == 2
    assert plan.explain(0, 64, 32768, 4).products == 3


def test_blocks_cover_the_vocabulary_in_aligned_slices() -> None:
    for rows, columns, itemsize in ((7, 50257, 6), (100_000, 151_936, 6), (1, 1, 4), (4096, 262_144, 8)):
        step = plan.slice_columns(rows, columns, itemsize)
        assert 1 <= step <= columns
        assert step == columns or step % plan.ALIGNMENT == 0
        assert step <= plan.ALIGNMENT or rows * step * itemsize <= plan.SCRATCH_BYTES
