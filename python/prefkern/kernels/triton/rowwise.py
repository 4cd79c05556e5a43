"""Token log-probabilities from logits ``[N, V]`` in float16, bfloat16 or float32; one program a row.

Forward: with ``x = softcap(logits)``, temperature T and target y

    lp = (x_y - m) / T - log s     m = max_v x_v     s = sum_v exp((x_v - m) / T)

and, where asked for, the entropy, ``log sum p^2``, the mean of ``x / T`` and whether y is the first argmax.

Backward: with ``u = (p - 1[v = y]) (1 - t)(1 + t)``, t the softcap's tanh (no such factor without softcap)

    dL/d logits = -(1 / T) [dL/d lp u + dL/d entropy p (log p + entropy) (1 - t)(1 + t)]

written in the logits' dtype to a tensor of its own. The passes over a row are those of `_statistics` and `_gradient`.
Ignored rows are 0 and are not read; rows whose target is outside the vocabulary are NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from prefkern.kernels.triton.launch import Tile, check_rows, on_device, row_temperature
from prefkern.kernels.triton.row import write_statistics
from prefkern.kernels.triton.row_gradient import write_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.kernels.interface import RowStats
    from prefkern.types import Temperature


@triton.jit(do_not_specialize=["ignore_index", "V"])
def _logprobs_fwd_kernel(
    logits_ptr,  # [N, V]
    targets_ptr,  # [N]
    temperature_ptr,  # [N] or None
    logps_ptr,  # [N], as all that follow; None where not asked for
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    log_sq_ptr,
    mean_ptr,
    top1_ptr,
    softcap,
    temperature,
    ignore_index,
    V,
    stride,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQ: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    write_statistics(
        row,
        logits_ptr + row * stride,
        logits_ptr,
        tl.load(targets_ptr + row).to(tl.int64),
        logps_ptr,
        row_max_ptr,
        log_sum_ptr,
        entropy_ptr,
        log_sq_ptr,
        mean_ptr,
        top1_ptr,
        1.0,
        softcap,
        temperature,
        ignore_index,
        V,
        False,
        False,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        HAS_SQ,
        HAS_MEAN,
        HAS_TOP1,
        LANES,
        PER_LANE,
        STAGES,
    )


@triton.jit(do_not_specialize=["ignore_index", "V"])
def _logprobs_bwd_kernel(
    logits_ptr,  # [N, V]
    targets_ptr,  # [N]
    temperature_ptr,  # [N] or None
    logps_ptr,  # [N], as all that follow; entropy and e are None where its gradient is not asked for
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    c_ptr,
    e_ptr,
    grad_ptr,  # [N, V]
    softcap,
    temperature,
    ignore_index,
    V,
    stride,
    grad_stride,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_E: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    target = tl.load(targets_ptr + row).to(tl.int64)
    write_gradient(
        logits_ptr + row * stride,
        logits_ptr,
        grad_ptr + row * grad_stride,
        target != ignore_index,
        target,
        tl.load(logps_ptr + row),
        tl.load(row_max_ptr + row),
        tl.load(log_sum_ptr + row),
        tl.load(entropy_ptr + row) if HAS_E else 0.0,
        -tl.load(c_ptr + row) / temperature,
        -tl.load(e_ptr + row) / temperature if HAS_E else 0.0,
        1.0,
        softcap,
        temperature,
        V,
        False,
        False,
        HAS_SOFTCAP,
        True,
        HAS_E,
        LANES,
        PER_LANE,
        STAGES,
    )


# Chosen by the compile report. A lane reads 16 bytes at once: with 8 float32 a lane two threads would share a lane and
# meet in every step. Two loads are in flight a thread where registers allow. Prefetch (num_stages=3) copies through
# shared memory, which costs instructions and registers, and occupancy hides the latency without it.
FORWARD = {2: Tile(lanes=512, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}
SOFTCAP_FORWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}
BACKWARD = {2: Tile(lanes=256, per_lane=8, num_warps=8, num_stages=1), 4: Tile(512, 4, 8, 1)}


def logprobs_fwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    stats: RowStats,
    *,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Fills ``stats`` from logits; the logits are not changed."""
    N, V = logits.shape
    if N == 0:
        return
    rows, scalar = row_temperature(temperature)
    check_rows("kernels.logprobs_fwd", logits=logits, targets=targets, temperature=rows)
    check_rows("kernels.logprobs_fwd", **stats._asdict())
    tile = (FORWARD if softcap is None else SOFTCAP_FORWARD)[logits.element_size()]
    with on_device(logits):
        _logprobs_fwd_kernel[(N,)](
            logits,
            targets,
            rows,
            *stats,
            1.0 if softcap is None else softcap,
            scalar,
            ignore_index,
            V,
            logits.stride(0),
            HAS_TEMPERATURE=rows is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_ENTROPY=stats.entropy is not None,
            HAS_SQ=stats.log_sum_sq_probs is not None,
            HAS_MEAN=stats.mean_logit is not None,
            HAS_TOP1=stats.is_top1 is not None,
            LANES=tile.lanes,
            PER_LANE=tile.per_lane,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )


def logprobs_bwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    stats: RowStats,
    c: Tensor,  # [N]
    e: Tensor | None,  # [N]
    grad: Tensor,  # [N, V] in the logits' dtype, not aliasing them
    *,
    softcap: float | None,
    temperature: Temperature,
    ignore_index: int,
) -> None:
    """Writes ``grad``, the gradient of a loss with ``c = dL/d lp`` and ``e = dL/d entropy`` (None: 0)."""
    N, V = logits.shape
    if N == 0:
        return
    rows, scalar = row_temperature(temperature)
    check_rows("kernels.logprobs_bwd", logits=logits, targets=targets, temperature=rows, c=c, e=e, grad=grad)
    check_rows("kernels.logprobs_bwd", **stats._asdict())
    tile = BACKWARD[logits.element_size()]
    with on_device(logits):
        _logprobs_bwd_kernel[(N,)](
            logits,
            targets,
            rows,
            stats.logps,
            stats.row_max,
            stats.log_sum,
            None if e is None else stats.entropy,
            c,
            e,
            grad,
            1.0 if softcap is None else softcap,
            scalar,
            ignore_index,
            V,
            logits.stride(0),
            grad.stride(0),
            HAS_TEMPERATURE=rows is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_E=e is not None,
            LANES=tile.lanes,
            PER_LANE=tile.per_lane,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
