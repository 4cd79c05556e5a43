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
from prefkern.head.engine.gradients import Gradients
from prefkern.head.engine.head import Head
from prefkern.head.operators import statistics
from prefkern.head.operators.statistics import LOGITS, STATS
from prefkern.kernels.interface import Factors, RowStats
from prefkern.kernels.reference import logprobs as reference

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor targets"
_KEPT = "Tensor held, Tensor kept_logps, Tensor kept_entropy"
_BACKWARD = "Tensor logps, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor? g_logps, Tensor? g_entropy"
_HEAD_LOGITS = f"{LOGITS}, float logit_scale, float lora_scale"


# ------------------------------------------------------------------------------------------------ from hidden states


def _head(tensors: tuple[Any, ...], form: tuple[Any, ...], dtype: torch.dtype) -> Head:
    """Returns the head of an operator's arguments `_HEAD`, without the targets, and `_HEAD_LOGITS`."""
    hidden, weight, bias, lora_a, lora_b = tensors
    *logits, lora_scale = form
    adapter = None if lora_a is None or lora_b is None else Adapter(lora_a, lora_b, lora_scale)
    return Head(hidden, weight, statistics.logits_of(bias, dtype, *logits), dtype, adapter)


def _linear_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, targets, form = arguments[:5], arguments[5], arguments[6:12]
    outputs, dtype, held_rows, frozen_rows, entropy_grad, scratch_bytes = arguments[12:]
    head = _head(tensors, form, dtype)
    N, V = head.hidden.shape[0], head.weight.shape[0]
    results = statistics.empty_stats(head.hidden, targets, outputs, dtype)
    kept = _empty_kept(head.hidden, head.weight, dtype, min(N, held_rows), min(N, frozen_rows), entropy_grad)
    if kept.held.shape[1] > V:
        kept.held[:, V:] = 0.0  # no element of an output is left unwritten
    tiles = operators.implementation(kept.held, "logprobs", reference)
    forward.forward(head, targets, statistics.row_stats(results, outputs), kept, tiles, scratch_bytes)
    return *results, *kept


def _linear_fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, targets = arguments[0], arguments[1], arguments[5]
    outputs, dtype, held_rows, frozen_rows, entropy_grad, _ = arguments[12:]
    N = hidden.shape[0]
    rows = torch.sym_min(N, held_rows), torch.sym_min(N, frozen_rows)
    kept = _empty_kept(hidden, weight, dtype, *rows, entropy_grad)
    return *statistics.empty_stats(hidden, targets, outputs, dtype), *kept


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


def _linear_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, targets, kept = arguments[:5], arguments[5], forward.Kept(*arguments[6:9])
    logps, row_max, log_sum, entropy = arguments[9:13]
    upstream = backward.Upstream(*arguments[13:15])
    form, (scratch_bytes, needed) = arguments[15:21], arguments[21:]
    head = _head(tensors, form, kept.held.dtype)
    stats = RowStats(logps, row_max, log_sum, entropy if entropy.numel() else None)
    given = (head.hidden, head.weight, head.logits.bias, *tensors[3:])
    grads = Gradients(*statistics.empty_grads(given, needed))
    tiles = operators.implementation(kept.held, "logprobs", reference)
    backward.backward(head, targets, stats, kept, upstream, grads, tiles, scratch_bytes)
    return statistics.returned(grads, tensors)


def _linear_bwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return statistics.returned(statistics.empty_grads(arguments[:5], arguments[-1]), arguments[:5])


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
