"""Physical floors, measured in the same run: the bare matrix products, and the bandwidth of a copy."""

import torch
from torch import Tensor

from prefkern.commands.benchmark.head.operands import Case, Operands
from prefkern.commands.benchmark.measure import Step, time_repeated

_ROWS = 8192
FLOOR = "bare products"


def bare_products(operands: Operands, case: Case) -> Step:
    """The products that the case cannot do without, into preallocated results: logits in float32, the gradient of
    hidden in float32, the gradient of the weight in its own dtype; operands as given, except that a CPU, which has no
    product of 16-bit operands with a float32 result, gets upcast operands for the logits."""
    hidden, weight = operands.hidden, operands.weight
    N, H, V = case.shape
    device, cuda = hidden.device, hidden.is_cuda
    upcast = case.dtype != torch.float32 and not cuda
    logit_hidden, logit_weight = (hidden.float(), weight.float()) if upcast else (hidden, weight)
    tile = torch.empty(min(N, _ROWS), V, device=device)
    grad_logits = tile
    if case.head != "scoring" and (case.dtype != torch.float32 or N > _ROWS):
        grad_logits = torch.empty(N, V, dtype=case.dtype, device=device)
        for rows in torch.split(grad_logits, _ROWS):  # never zeros: products of zeros can be faster
            rows.normal_()
    grad_hidden = torch.empty(N, H, device=device)
    grad_weight = torch.empty_like(weight)

    def step() -> tuple[Tensor, ...]:
        for rows in torch.split(logit_hidden, _ROWS):
            _mm(rows, logit_weight.T, tile[: rows.shape[0]])
        if case.head != "scoring":
            _mm(grad_logits, weight, grad_hidden)
        if case.trains_weight:
            _mm(grad_logits.T, hidden, grad_weight)
        return ()

    return step


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b)


def tile_bytes(case: Case) -> int:
    """What must move besides the products: the float32 tile once in, the unscaled gradient once out."""
    written = 0 if case.head == "scoring" else case.dtype.itemsize
    return case.shape.N * case.shape.V * (4 + written)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second of a large copy, bytes read plus bytes written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def step() -> tuple[Tensor, ...]:
        target.copy_(source)
        return ()

    return 2 * size / time_repeated(step, device).median
