"""Reductions in both layouts, and the mean over nothing."""

import pytest
import torch

from prefkern.losses.reduce import (
    divide,
    masked_mean,
    masked_means,
    per_token,
    reduce_rows,
    reduce_tokens,
    scored,
    sequence_ids,
    sequence_lengths,
    sequence_sums,
    widen,
)

X = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
MASK = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
PACKED = torch.tensor([1.0, 2.0, 4.0, 64.0, 128.0, 256.0])
PACKED_MASK = torch.tensor([True, True, False, True, False, True])
CU = torch.tensor([0, 3, 3, 6])


@pytest.mark.parametrize(
    ("reduction", "normalizer", "want"),
    [
        ("token", None, 323.0 / 4),
        ("token", 10, 32.3),
        ("token", torch.tensor(10), 32.3),
        ("sequence", None, (1.5 + 0 + 160.0) / 3),
        ("sequence", 2.0, 161.5 / 2),
        ("sequence_sum", None, 323.0 / 3),
        ("sequence_sum", torch.tensor(2.0), 161.5),
    ],
)
@pytest.mark.parametrize("cu_dtype", [torch.int64, torch.int32])
def test_values(reduction, normalizer, want, cu_dtype) -> None:
    padded = reduce_tokens(X, MASK, reduction=reduction, normalizer=normalizer)
    cu = CU.to(cu_dtype)
    packed = reduce_tokens(PACKED, PACKED_MASK, reduction=reduction, normalizer=normalizer, cu_seqlens=cu)
    assert padded.shape == packed.shape == ()
    torch.testing.assert_close(padded, torch.tensor(want))
    torch.testing.assert_close(packed, torch.tensor(want))


def test_none_is_per_token() -> None:
    assert reduce_tokens(X, MASK, reduction="none").tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [64.0, 0.0, 256.0]]


def test_without_a_mask_every_token_is_scored() -> None:
    assert reduce_tokens(X, None, reduction="token") == X.mean()
    assert reduce_tokens(PACKED, None, reduction="sequence", cu_seqlens=CU).item() == pytest.approx((7 + 448) / 3 / 3)


@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0,), (5,)])
@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0), torch.tensor(0.0)])
def test_nothing_scored_is_zero_with_a_graph(reduction, shape, normalizer) -> None:
    x = torch.full(shape, float("inf"), requires_grad=True)
    cu = torch.tensor([0, shape[0], shape[0]]) if len(shape) == 1 else None
    loss = reduce_tokens(
        x, torch.zeros(shape, dtype=torch.bool), reduction=reduction, normalizer=normalizer, cu_seqlens=cu
    )
    assert loss.item() == 0.0
    loss.backward()
    assert x.grad.shape == x.shape
    assert (x.grad == 0).all()


def test_divide_by_zero_has_zero_gradient() -> None:
    total = torch.tensor([3.0, 5.0], requires_grad=True)
    divide(total, torch.tensor([0, 2])).sum().backward()
    assert total.grad.tolist() == [0.0, 0.5]
    total.grad = None
    divide(total, 0).sum().backward()
    assert divide(total, 0).tolist() == total.grad.tolist() == [0.0, 0.0]


def test_masked_values_never_leak() -> None:
    for bad in (float("nan"), float("inf"), 1e38):
        x = X.clone()
        x[~MASK] = bad
        x.requires_grad_()
        masked_mean(x, MASK).backward()
        assert masked_mean(x, MASK).item() == 323.0 / 4
        assert x.grad.tolist() == (MASK / 4.0).tolist()


def test_rows() -> None:
    x = torch.tensor([1.0, 2.0, 6.0])
    assert reduce_rows(x, "mean").item() == 3.0
    assert reduce_rows(x, "sum").item() == 9.0
    assert reduce_rows(x, "none") is x
    assert reduce_rows(x[:0], "mean").item() == 0.0


def test_layout_helpers_with_empty_sequences() -> None:
    cu = torch.tensor([0, 0, 2, 2, 5, 5])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert sequence_ids(cu, 5).tolist() == [1, 1, 3, 3, 3]
    assert sequence_sums(x, cu).tolist() == [0.0, 3.0, 0.0, 12.0, 0.0]
    assert sequence_lengths(x, None, cu).tolist() == [0, 2, 0, 3, 0]
    assert sequence_lengths(x, x > 1.5, cu).tolist() == [0, 1, 0, 3, 0]
    assert per_token(torch.arange(5), x, cu).tolist() == [1, 1, 3, 3, 3]
    assert sequence_sums(x[:0], torch.tensor([0])).shape == (0,)


def test_widen() -> None:
    assert {str(d): widen(torch.zeros(1, dtype=d)).dtype for d in (torch.float16, torch.bfloat16, torch.float32)} == {
        "torch.float16": torch.float32,
        "torch.bfloat16": torch.float32,
        "torch.float32": torch.float32,
    }
    assert widen(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert scored(torch.ones(2, dtype=torch.bfloat16), torch.tensor([True, False])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("mask", [MASK, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_of_several_are_each_its_mean(mask, dtype) -> None:
    named = {"a": X.to(dtype), "flag": X > 3.0, "c": X.to(dtype).exp().reciprocal()}
    for name, mean in masked_means(named, mask).items():
        want = masked_mean(named[name], mask)
        assert (mean.item(), mean.dtype) == (want.item(), want.dtype)


def test_fixed_lengths() -> None:
    want = {None: 323.0 / 3 / 3, 10.0: 323.0 / 3 / 10}
    for length, value in want.items():
        assert reduce_tokens(X, MASK, reduction="fixed", length=length).item() == pytest.approx(value)
    packed = reduce_tokens(
        PACKED, PACKED_MASK, reduction="fixed", length=10.0, cu_seqlens=CU, normalizer=torch.tensor(2)
    )
    assert packed.item() == pytest.approx(323.0 / 2 / 10)
