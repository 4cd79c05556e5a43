"""The operators of the head in one pass: ``sum_t c_t log p_t`` with its gradients beside it, and their scaling.

The gradients leave the forward as outputs that autograd saves; the backward multiplies them by the upstream gradient,
which is one number. Where the graph is not kept, they are nobody else's: they are multiplied in place, or handed on as
they are where a CPU sees that the number is 1. Where the graph is kept, or the backward itself is recorded or traced,
they are copied: whoever gets a gradient may write to it, and the next backward starts from the same numbers.
"""

from typing import Any

import torch
from torch import Tensor

from prefkern import operators
from prefkern.head.engine import one_pass
from prefkern.head.engine.gradients import Gradients
from prefkern.head.engine.head import Head
from prefkern.head.operators import statistics
from prefkern.head.operators.statistics import LOGITS, STATS
from prefkern.kernels.interface import wide_dtype
from prefkern.kernels.reference import logprobs as reference


def _sum_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    (hidden, weight, bias, targets, coefficients), form = arguments[:5], arguments[5:10]
    outputs, dtype, max_memory, needed = arguments[10:]
    tensors = statistics.empty_stats(hidden, targets, outputs, dtype)
    grads = _empty_grads(hidden, weight, bias, needed)
    factors = coefficients.to(wide_dtype(dtype))
    one_pass.run(
        Head(hidden, weight, statistics.logits_of(bias, dtype, *form), dtype),
        targets,
        factors,
        statistics.row_stats(tensors, outputs),
        Gradients(*(grad if need else None for grad, need in zip(grads, needed, strict=True))),
        operators.implementation(tensors[0], "logprobs", reference),
        max_memory,
    )
    return (factors * tensors[0]).sum(), *tensors, *grads


def _empty_grads(hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]) -> list[Tensor]:
    """A gradient of float16 is kept in float32: what a loss scale must lift would underflow before it comes."""
    return [
        hidden.new_empty(0)
        if not need or value is None
        else value.new_empty(value.shape, dtype=torch.float32 if value.dtype == torch.float16 else value.dtype)
        for value, need in zip((hidden, weight, bias), needed, strict=True)
    ]


def _sum_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, outputs, compute_dtype, _, needed = others
    stats = statistics.empty_stats(hidden, targets, outputs, compute_dtype)
    return hidden.new_empty((), dtype=wide_dtype(compute_dtype)), *stats, *_empty_grads(hidden, weight, bias, needed)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:])
    ctx.dtypes = [None if value is None else value.dtype for value in inputs[:3]]


def _sum_backward(ctx: Any, g_total: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None, None]
    if g_total is not None:
        for i, gradient in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[i]:
                grads[i] = _scaled(gradient, g_total).to(ctx.dtypes[i])
    return *grads, *(None,) * 11


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    if _exclusive(gradient):
        if factor.device.type == "cpu" and factor.item() == 1.0:
            return gradient
        return _scale_(gradient, factor)
    # in a backward that is itself differentiated: what the refusal of a second derivative hangs on
    anchor = torch.empty(0, requires_grad=True) if torch.is_grad_enabled() else None
    scaled: Tensor = torch.ops.prefkern.scaled_gradient(gradient, factor, anchor)
    return scaled


def _scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient * factor`` in place, rounded once, without a wait for the device; returns ``gradient``."""
    if gradient.device.type == "cpu" or gradient.dtype == factor.dtype:
        return gradient.mul_(factor)  # a CPU multiplies 16 bits by a wider number without rounding that first
    rows = gradient if gradient.ndim == 2 else gradient.unsqueeze(0)
    operators.implementation(gradient, "logprobs", reference).scale_rows(rows, factor.expand(rows.shape[0]), rows)
    return gradient


def _exclusive(gradient: Tensor) -> bool:
    """Whether this backward is the last reader of a saved gradient: it runs now, unrecorded, and frees the graph."""
    return not (
        torch.is_grad_enabled()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._len_torch_dispatch_stack()
        or type(gradient) is not Tensor
    )


def _scaled_gradient(gradient: Tensor, factor: Tensor, anchor: Tensor | None) -> Tensor:
    return _scale_(gradient.clone(memory_format=torch.contiguous_format), factor)


def _scaled_gradient_fake(gradient: Tensor, factor: Tensor, anchor: Tensor | None) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


operators.define(
    "linear_logprob_sum(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor coefficients, "
    f"{LOGITS}, float logit_scale, str[] outputs, ScalarType compute_dtype, int? max_memory, bool[] needed) -> "
    f"(Tensor total, {STATS}, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _sum_fwd,
    _sum_fake,
    _sum_backward,
    _sum_setup,
)
operators.define(
    "scaled_gradient(Tensor gradient, Tensor factor, Tensor? anchor) -> Tensor",
    _scaled_gradient,
    _scaled_gradient_fake,
    operators.no_second_derivative("linear cross-entropies", "torch.nn.functional.cross_entropy"),
)
