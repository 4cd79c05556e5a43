"""The operators: schemas, fakes, autograd and dispatch by the tensor's device.

Two pairs, from hidden states and from logits. Everything that a Python branch could turn into a guard on the number of
rows is below them: the chunk loop is inside, ``held`` is ``[min(N, k_max), V]`` in the fake, so one graph serves all
lengths. An output that the loss does not use costs nothing (``set_materialize_grads(False)``), and the held tile never
gets a gradient of its own (``mark_non_differentiable``).
"""

from typing import Any

import torch
from torch import Tensor

from prefkern import operators
from prefkern.head.engine import backward, blocks, forward
from prefkern.head.engine.adapter import Adapter
from prefkern.head.operators import statistics
from prefkern.head.operators.statistics import LOGITS, STATS
from prefkern.kernels.interface import Factors, RowStats
from prefkern.kernels.reference import logprobs as reference

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor targets"
_KEPT = "Tensor held, Tensor kept_logps, Tensor kept_entropy"
_BACKWARD = "Tensor logps, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor? g_logps, Tensor? g_entropy"
_HEAD_LOGITS = f"{LOGITS}, float logit_scale, float lora_scale"


# ------------------------------------------------------------------------------------------------ from hidden states


def _linear_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float,
    lora_scale: float,
    outputs: list[str],
    compute_dtype: torch.dtype,
    held_rows: int,
    frozen_rows: int,
    entropy_grad: bool,
    scratch_bytes: int,
) -> tuple[Tensor, ...]:
    N = hidden.shape[0]
    tensors = statistics.empty_stats(hidden, targets, outputs, compute_dtype)
    kept = _empty_kept(hidden, weight, compute_dtype, min(N, held_rows), min(N, frozen_rows), entropy_grad)
    if kept.held.shape[1] > weight.shape[0]:
        kept.held[:, weight.shape[0] :] = 0.0  # no element of an output is left unwritten
    forward.forward(
        hidden,
        weight,
        _adapter(lora_a, lora_b, lora_scale),
        targets,
        statistics.row_stats(tensors, outputs),
        kept,
        statistics.logits_of(bias, compute_dtype, row_temperature, temperature, softcap, ignore_index, logit_scale),
        operators.implementation(kept.held, "logprobs", reference),
        scratch_bytes,
    )
    return *tensors, *kept


def _linear_fwd_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, outputs, compute_dtype, held_rows, frozen_rows, entropy_grad, _ = rest
    N = hidden.shape[0]
    rows = torch.sym_min(N, held_rows), torch.sym_min(N, frozen_rows)
    kept = _empty_kept(hidden, weight, compute_dtype, *rows, entropy_grad)
    return *statistics.empty_stats(hidden, targets, outputs, compute_dtype), *kept


def _empty_kept(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, held_rows: int, frozen_rows: int, entropy_grad: bool
) -> forward.Kept:
    V, H = weight.shape
    width = blocks.row_elements(V, dtype.itemsize, hidden.device.type != "cpu")
    frozen = torch.float32 if dtype == torch.float16 else dtype  # in which a small gradient would lose its digits
    return forward.Kept(
        hidden.new_empty(held_rows, width, dtype=dtype),
        hidden.new_empty(frozen_rows, H, dtype=frozen),
        hidden.new_empty(frozen_rows if entropy_grad else 0, H, dtype=frozen),
    )


def _adapter(a: Tensor | None, b: Tensor | None, scale: float) -> Adapter | None:
    return None if a is None or b is None else Adapter(a, b, scale)


def _linear_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    targets: Tensor,
    held: Tensor,
    kept_logps: Tensor,
    kept_entropy: Tensor,
    logps: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float,
    lora_scale: float,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    grads = backward.backward(
        forward.Kept(held, kept_logps, kept_entropy),
        hidden,
        weight,
        _adapter(lora_a, lora_b, lora_scale),
        targets,
        RowStats(logps, row_max, log_sum, entropy if entropy.numel() else None),
        statistics.logits_of(bias, held.dtype, row_temperature, temperature, softcap, ignore_index, logit_scale),
        operators.implementation(held, "logprobs", reference),
        g_logps,
        g_entropy,
        backward.Need(*needed),
        scratch_bytes,
    )
    if grads.bias is not None and bias is not None:
        grads = grads._replace(bias=grads.bias.to(bias.dtype))
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


def _linear_bwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, needed = arguments[0], arguments[-1]
    return tuple(
        value.new_empty(value.shape) if need and value is not None else hidden.new_empty(0)
        for value, need in zip(arguments[:5], needed, strict=True)
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, row_temperature, temperature, softcap, ignore_index, logit_scale, lora_scale = inputs[:12]
    logps, row_max, log_sum, entropy, *others = output
    kept = others[-3:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum, *others)
    ctx.save_for_backward(*given, *kept, logps, row_max, log_sum, entropy, row_temperature)
    ctx.options = (temperature, softcap, ignore_index, logit_scale, lora_scale, inputs[-1])


def _linear_backward(ctx: Any, g_logps: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, row_temperature = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    grads = torch.ops.prefkern.linear_logprobs_bwd(*saved, g_logps, others[2], row_temperature, *ctx.options, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 13


# ------------------------------------------------------------------------------------------------------- from logits


def _logits_fwd(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *form, outputs = options
    tensors = statistics.empty_stats(logits, targets, outputs, logits.dtype)
    stats, how = statistics.row_stats(tensors, outputs), statistics.logits_of(None, logits.dtype, *form)
    operators.implementation(logits, "logprobs", reference).tile_fwd(logits, targets, stats, None, how, keep_tile=True)
    return tensors


def _logits_fwd_fake(logits: Tensor, targets: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return statistics.empty_stats(logits, targets, others[-1], logits.dtype)


def _logits_bwd(
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    *form: Any,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if g_logps is None and g_entropy is None:
        return grad.zero_()
    stats = RowStats(logps, row_max, log_sum, entropy if entropy.numel() else None)
    how = statistics.logits_of(None, logits.dtype, *form)
    # a tile function writes the gradient of minus the loss, without the 1 / T of the logits
    given = (torch.zeros_like(logps) if g_logps is None else g_logps, g_entropy)
    factors = Factors._make(None if g is None else -(g.to(logps.dtype) / how.temperature) for g in given)
    tiles = operators.implementation(logits, "logprobs", reference)
    tiles.tile_bwd(logits, targets, stats, factors, grad, how, keep_tile=True)
    return grad


def _logits_bwd_fake(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, row_temperature, temperature, softcap, ignore_index, _ = inputs
    logps, row_max, log_sum, entropy, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum, *others)
    ctx.save_for_backward(logits, targets, logps, row_max, log_sum, entropy, row_temperature)
    ctx.options = (temperature, softcap, ignore_index)


def _logits_backward(ctx: Any, g_logps: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, row_temperature = ctx.saved_tensors
    grad = torch.ops.prefkern.logprobs_bwd(*saved, g_logps, others[2], row_temperature, *ctx.options)
    return grad, *(None,) * 6


_NO_SECOND = operators.no_second_derivative("token log-probabilities", "torch.log_softmax")

operators.define(
    f"linear_logprobs_fwd({_HEAD}, {_HEAD_LOGITS}, str[] outputs, ScalarType compute_dtype, int held_rows, "
    f"int frozen_rows, bool entropy_grad, int scratch_bytes) -> ({STATS}, {_KEPT})",
    _linear_fwd,
    _linear_fwd_fake,
    _linear_backward,
    _linear_setup,
)
operators.define(
    f"linear_logprobs_bwd({_HEAD}, {_KEPT}, {_BACKWARD}, {_HEAD_LOGITS}, int scratch_bytes, bool[] needed) -> "
    "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_a, Tensor grad_b)",
    _linear_bwd,
    _linear_bwd_fake,
    _NO_SECOND,
)
operators.define(
    f"logprobs_fwd(Tensor logits, Tensor targets, {LOGITS}, str[] outputs) -> ({STATS})",
    _logits_fwd,
    _logits_fwd_fake,
    _logits_backward,
    _logits_setup,
)
operators.define(
    f"logprobs_bwd(Tensor logits, Tensor targets, {_BACKWARD}, {LOGITS}) -> Tensor",
    _logits_bwd,
    _logits_bwd_fake,
    _NO_SECOND,
)
