"""The correctness gate: errors against float64 of the same operands, and the tolerance that prefkern must meet.

The tolerance is derived. Log-probabilities: twice the error of the device's own product with a float32 result under a
plain log-softmax, plus one float32 rounding (for their mean one per level of its sum), and never more than 1e-4.
Gradients: twice the error of the plain eager computation in the operands' dtype, plus one rounding to it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.commands.benchmark.head.operands import Case, Operands

_ROWS = 512
_MOST = 1e-4


class HeadValues(NamedTuple):
    """Log-probabilities ``[N]``, gradients of hidden ``[N, H]`` and weight ``[V, H]`` for one upstream gradient."""

    logps: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


class Errors(NamedTuple):
    """Log-probabilities: largest absolute error. Gradients: largest error over the largest entry of the truth; None
    where the case has no such gradient."""

    logps: float
    grad_hidden: float | None = None
    grad_weight: float | None = None

    def within(self, tolerance: "Errors") -> bool:
        """Whether each error is a number and at most the tolerance's."""
        return all(
            error is None or (bound is not None and error <= bound)
            for error, bound in zip(self, tolerance, strict=True)
        )


def head_values(operands: Operands, dtype: torch.dtype) -> HeadValues:
    """The head and its gradients with products in ``dtype`` and row mathematics in float32 or wider, a few rows at a
    time: float64 is the truth, the operands' own dtype the eager computation."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden, weight = operands.hidden.to(dtype), operands.weight.to(dtype)
    N = hidden.shape[0]
    logps = torch.empty(N, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    for start in range(0, N, _ROWS):
        rows = slice(start, min(start + _ROWS, N))
        targets = operands.targets[rows].unsqueeze(-1)
        grad = torch.log_softmax((hidden[rows] @ weight.T).to(wide), -1)
        at_target = grad.gather(-1, targets)
        logps[rows] = at_target.squeeze(-1)
        grad.exp_().scatter_(-1, targets, at_target.expm1())  # p - 1[v = y], without the cancellation at p near 1
        grad.mul_(-operands.upstream[rows].to(wide).unsqueeze(-1))
        narrow = grad.to(dtype)
        grad_hidden[rows] = narrow @ weight
        grad_weight += narrow.T @ hidden[rows]
    return HeadValues(logps, grad_hidden, grad_weight.to(dtype))


def case_values(operands: Operands, case: Case, dtype: torch.dtype) -> HeadValues:
    """What the case gives back: for the cross-entropy the loss, of one element, in place of the log-probabilities."""
    if case.head != "cross-entropy":
        return head_values(operands, dtype)
    N = case.shape.N
    values = head_values(
        operands._replace(upstream=torch.full_like(operands.upstream, -1.0 / N, dtype=torch.float64)), dtype
    )
    return values._replace(logps=-values.logps.mean().view(1))


def errors(found: Sequence[Tensor], truth: HeadValues) -> Errors:
    """Of ``(logps[, grad_hidden[, grad_weight]])``. NaN and infinities give NaN, which passes no tolerance."""
    logps = _largest_difference(found[0], truth.logps)
    relative = [
        _largest_difference(got, want) / max(float(want.abs().amax()), math.ulp(0.0))
        for got, want in zip(found[1:], truth[1:], strict=False)
    ]
    return Errors(logps, *relative)


def tolerance(operands: Operands, case: Case, truth: HeadValues) -> Errors:
    eager = errors(case_values(operands, case, operands.hidden.dtype), truth)
    wide = _wide_logps(operands)
    exact = errors([-wide.mean().view(1) if case.head == "cross-entropy" else wide], truth)
    rounding = torch.finfo(torch.float32).eps * float(truth.logps.abs().amax())
    if case.head == "cross-entropy":
        rounding *= 1 + math.ceil(math.log2(case.shape.N))  # one for each level of a mean summed in pairs
    eps = torch.finfo(operands.hidden.dtype).eps
    gradients = [2.0 * error + eps for error in eager[1:] if error is not None]
    return Errors(min(2.0 * exact.logps + rounding, _MOST), *gradients)


def _wide_logps(operands: Operands) -> Tensor:
    """Eager log-probabilities from logits that were accumulated and kept in float32."""
    hidden, weight, targets, _ = operands
    if not hidden.is_cuda:
        hidden, weight = hidden.float(), weight.float()
    found = []
    for rows, columns in zip(torch.split(hidden, _ROWS), torch.split(targets, _ROWS), strict=True):
        narrow = rows.dtype != torch.float32
        logits = torch.mm(rows, weight.T, out_dtype=torch.float32) if narrow else torch.mm(rows, weight.T)
        found.append(torch.log_softmax(logits, -1).gather(-1, columns.unsqueeze(-1)).squeeze(-1))
    return torch.cat(found)


def _largest_difference(got: Tensor, want: Tensor) -> float:
    """Some rows at a time: a float64 copy of a weight's gradient is large."""
    largest = 0.0
    for a, b in zip(torch.split(got, 4096), torch.split(want, 4096), strict=True):
        worst = float((a.to(b.dtype) - b).abs().amax())
        if not math.isfinite(worst):
            return math.nan
        largest = max(largest, worst)
    return largest
