"""shift_labels, sequence_logps and pair_logps against plain loops, padded and packed alike."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefkern.losses import pair_logps, sequence_logps, shift_labels

IGNORE = -100


@st.composite
def ragged(draw, even: bool = False):
    """Rows of (token, scored, log-prob), some of them empty, and as padded tensors and packed ones."""
    count = draw(st.integers(1, 3)) * 2 if even else draw(st.integers(1, 5))
    token = st.tuples(st.integers(0, 9), st.booleans(), st.floats(-30.0, 0.0, width=32))
    return [draw(st.lists(token, max_size=6)) for _ in range(count)]


def padded(rows, column: int, fill: float, dtype: torch.dtype) -> Tensor:
    T = max((len(row) for row in rows), default=0)
    return torch.tensor([[item[column] for item in row] + [fill] * (T - len(row)) for row in rows], dtype=dtype).view(
        len(rows), T
    )


def packed(rows, column: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([item[column] for row in rows for item in row], dtype=dtype)


def offsets(rows) -> Tensor:
    return torch.tensor([0] + [len(row) for row in rows]).cumsum(0)


@given(ragged())
@settings(deadline=None)
def test_shift_labels(rows) -> None:
    want = [[b[0] if b[1] else IGNORE for b in row[1:]] + [IGNORE] * bool(row) for row in rows]
    flat = shift_labels(packed(rows, 0, torch.int64), mask=packed(rows, 1, torch.bool), cu_seqlens=offsets(rows))
    assert flat.tolist() == [target for row in want for target in row]
    square = shift_labels(padded(rows, 0, 5, torch.int64), mask=padded(rows, 1, 0, torch.bool))
    for row, target in zip(want, square.tolist(), strict=True):
        assert target[: len(row)] == row
        assert set(target[len(row) :]) <= {IGNORE}


def test_shift_labels_keeps_dtype_and_ignored_labels() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8]], dtype=torch.int32)
    targets = shift_labels(labels)
    assert targets.dtype == torch.int32
    assert targets.tolist() == [[IGNORE, 7, 8, IGNORE]]
    assert labels.tolist() == [[IGNORE, IGNORE, 7, 8]]
    assert shift_labels(torch.tensor([1, 2, 3]), ignore_index=-1).tolist() == [2, 3, -1]


@given(ragged(), st.booleans(), st.sampled_from([torch.int64, torch.int32]))
@settings(deadline=None)
def test_sequence_logps(rows, average, cu_dtype) -> None:
    want = []
    for row in rows:
        kept = [item[2] for item in row if item[1]]
        want.append(math.fsum(kept) / (max(len(kept), 1) if average else 1))
    want = torch.tensor(want, dtype=torch.float64)
    square, flat = padded(rows, 2, math.nan, torch.float64), packed(rows, 2, torch.float64)
    mask = padded(rows, 1, 0, torch.bool)
    targets = torch.where(packed(rows, 1, torch.bool), packed(rows, 0, torch.int64), IGNORE)
    torch.testing.assert_close(sequence_logps(square, mask=mask, average=average), want)
    cu = offsets(rows).to(cu_dtype)
    torch.testing.assert_close(sequence_logps(flat, targets=targets, cu_seqlens=cu, average=average), want)


@given(ragged(even=True), st.sampled_from([None, 0.0, 0.3, 1.0]), st.booleans())
@settings(deadline=None)
def test_pair_logps(rows, ld_alpha, average) -> None:
    B = len(rows) // 2
    lengths = [sum(item[1] for item in row) for row in rows]
    sums = []
    for i, row in enumerate(rows):
        kept = [item[2] for item in row if item[1]]
        shared = min(lengths[i % B], lengths[i % B + B])
        tail = 1.0 if ld_alpha is None else ld_alpha
        total = math.fsum(kept[:shared]) + tail * math.fsum(kept[shared:])
        sums.append(total / max(lengths[i], 1) if average else total)
    mask = padded(rows, 1, 0, torch.bool)
    square = pair_logps(padded(rows, 2, math.inf, torch.float64), mask=mask, ld_alpha=ld_alpha, average=average)
    flat = pair_logps(
        packed(rows, 2, torch.float64),
        mask=packed(rows, 1, torch.bool),
        cu_seqlens=offsets(rows),
        ld_alpha=ld_alpha,
        average=average,
    )
    for got in (square, flat):
        torch.testing.assert_close(torch.cat([got.chosen, got.rejected]), torch.tensor(sums, dtype=torch.float64))
        assert torch.cat([got.chosen_lengths, got.rejected_lengths]).tolist() == lengths


def test_mask_and_targets_both_exclude() -> None:
    logps = torch.tensor([[-1.0, -2.0, -4.0, -8.0]])
    targets, mask = torch.tensor([[3, IGNORE, 3, 3]]), torch.tensor([[1, 1, 0, 1]])
    assert sequence_logps(logps, mask=mask, targets=targets).item() == -9.0
    assert sequence_logps(logps, mask=mask, targets=targets, average=True).item() == -4.5
    assert sequence_logps(logps, targets=targets + 103, ignore_index=3).item() == -2.0 - 0.0 - 13.0 + 2.0
    assert sequence_logps(logps).item() == -15.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype) -> None:
    """4096 log-probs of -1/8: a 16-bit running sum would stall."""
    logps = torch.full((2, 4096), -0.125, dtype=dtype, requires_grad=True)
    got = pair_logps(logps)
    assert got.chosen.dtype == torch.float32
    assert got.chosen.item() == -512.0
    flat = sequence_logps(logps.view(-1), cu_seqlens=torch.tensor([0, 4096, 8192]))
    assert flat.tolist() == [-512.0, -512.0]
    got.chosen.sum().backward()
    assert logps.grad.dtype == dtype


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fully_masked_rows_are_zero_with_a_graph(average, bad) -> None:
    logps = torch.tensor([[-1.0, bad], [bad, bad]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    got = sequence_logps(logps, mask=mask, average=average)
    assert got.tolist() == [-1.0, 0.0]
    got.sum().backward()
    assert logps.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_what_counts_tokens_needs_to_know_which_are_scored() -> None:
    """Sums are right without, since padding is 0 there; a mean would be over the padding too."""
    logps = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])  # the last entries are padding
    assert sequence_logps(logps).tolist() == [-3.0, -1.0]
    assert pair_logps(logps).chosen.tolist() == [-3.0]
    message = "counts the scored tokens of each row, and padding cannot be told from them: pass the targets"
    with pytest.raises(ValueError, match=rf"^prefkern\.sequence_logps: average=True {message}"):
        sequence_logps(logps, average=True)
    with pytest.raises(ValueError, match=rf"^prefkern\.pair_logps: average=True {message}"):
        pair_logps(logps, average=True)
    with pytest.raises(ValueError, match=rf"^prefkern\.pair_logps: ld_alpha {message}"):
        pair_logps(logps, ld_alpha=0.5)
    assert sequence_logps(logps, mask=torch.ones(2, 4), average=True).tolist() == [-0.75, -0.25]
    packed = pair_logps(logps[:, :2].flatten(), cu_seqlens=torch.tensor([0, 2, 4]), average=True, ld_alpha=1.0)
    assert (packed.chosen.item(), packed.rejected.item()) == (-1.5, -0.5)
