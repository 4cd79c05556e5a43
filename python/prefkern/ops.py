"""The operators: schemas, fakes, autograd and dispatch by the tensor's device.

Two pairs, from hidden states and from logits. Everything that a Python branch could turn into a guard on the number of
rows is below them: the chunk loop is inside, ``held`` is ``[min(N, k_max), V]`` in the fake, so one graph serves all
lengths. An output that the loss does not use costs nothing (``set_materialize_grads(False)``), and the held tile never
gets a gradient of its own (``mark_non_differentiable``).
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefkern import head, head_bwd, plan, reference
from prefkern._check import require
from prefkern.products import wide_dtype
from prefkern.tiles import Logits
from prefkern.types import RowStats, Temperature

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
_LOGITS = "Tensor? row_temperature, float temperature, float? softcap, int ignore_index"
_STATS = "Tensor logps, Tensor row_max, Tensor log_sum, Tensor entropy"

_library = torch.library.Library("prefkern", "DEF")  # type: ignore[no-untyped-call]
_define: Callable[[str], object] = _library.define
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor targets"
_KEPT = "Tensor held, Tensor kept_logps, Tensor kept_entropy"
_HEAD_LOGITS = f"{_LOGITS}, float logit_scale, float lora_scale"
_define(
    f"linear_logprobs_fwd({_HEAD}, {_HEAD_LOGITS}, str[] outputs, ScalarType compute_dtype, int held_rows, "
    f"int frozen_rows, bool entropy_grad) -> ({_STATS}, Tensor log_sum_sq_probs, Tensor mean_logit, Tensor is_top1, "
    f"{_KEPT})"
)
_define(
    f"linear_logprobs_bwd({_HEAD}, {_KEPT}, {_STATS}, Tensor? g_logps, Tensor? g_entropy, {_HEAD_LOGITS}, "
    "bool[] needed) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_a, Tensor grad_b)"
)
_define(
    f"logprobs_fwd(Tensor logits, Tensor targets, {_LOGITS}, str[] outputs) -> ({_STATS}, Tensor log_sum_sq_probs, "
    "Tensor mean_logit, Tensor is_top1)"
)
_define(
    f"logprobs_bwd(Tensor logits, Tensor targets, {_STATS}, Tensor? g_logps, Tensor? g_entropy, {_LOGITS}) -> Tensor"
)


def _kernels(like: Tensor, name: str) -> Any:
    """The Triton kernels on CUDA (and ROCm) tensors; plain torch elsewhere, and for float64 everywhere."""
    if like.is_cuda and like.dtype != torch.float64:
        return require(f"prefkern.kernels.{name}", "prefkern on an accelerator", "install it with: pip install triton")
    return reference


def _empty_stats(rows: Tensor, targets: Tensor, outputs: list[str], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """logps, row_max, log_sum and the optional statistics of every row; those not asked for have no elements."""
    N, wide = rows.shape[0], wide_dtype(dtype)
    always = [rows.new_empty(shape, dtype=wide) for shape in (targets.shape, (N,), (N,))]
    optional = [
        rows.new_empty(N if name in outputs else 0, dtype=torch.bool if name == "is_top1" else wide)
        for name in OPTIONAL
    ]
    return *always, *optional


def _row_stats(tensors: tuple[Tensor, ...], outputs: list[str]) -> RowStats:
    given = (value if name in outputs else None for name, value in zip(OPTIONAL, tensors[3:7], strict=True))
    return RowStats(*tensors[:3], *given)


def _temperature(rows: Tensor | None, scalar: float) -> Temperature:
    return scalar if rows is None else rows


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
) -> tuple[Tensor, ...]:
    N = hidden.shape[0]
    tensors = _empty_stats(hidden, targets, outputs, compute_dtype)
    kept = _empty_kept(hidden, weight, compute_dtype, min(N, held_rows), min(N, frozen_rows), entropy_grad)
    if kept.held.shape[1] > weight.shape[0]:
        kept.held[:, weight.shape[0] :] = 0.0  # no element of an output is left unwritten
    head.forward(
        hidden,
        weight,
        _adapter(lora_a, lora_b, lora_scale),
        targets,
        _row_stats(tensors, outputs),
        kept,
        _logits(bias, compute_dtype, logit_scale, softcap, row_temperature, temperature, ignore_index),
        _kernels(kept.held, "fold"),
    )
    return *tensors, *kept


def _linear_fwd_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, outputs, compute_dtype, held_rows, frozen_rows, entropy_grad = rest
    N = hidden.shape[0]
    rows = torch.sym_min(N, held_rows), torch.sym_min(N, frozen_rows)
    kept = _empty_kept(hidden, weight, compute_dtype, *rows, entropy_grad)
    return *_empty_stats(hidden, targets, outputs, compute_dtype), *kept


def _empty_kept(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, held_rows: int, frozen_rows: int, entropy_grad: bool
) -> head.Kept:
    V, H = weight.shape
    width = plan.row_elements(V, dtype.itemsize, hidden.device.type != "cpu")
    frozen = torch.float32 if dtype == torch.float16 else dtype  # in which a small gradient would lose its digits
    return head.Kept(
        hidden.new_empty(held_rows, width, dtype=dtype),
        hidden.new_empty(frozen_rows, H, dtype=frozen),
        hidden.new_empty(frozen_rows if entropy_grad else 0, H, dtype=frozen),
    )


def _adapter(a: Tensor | None, b: Tensor | None, scale: float) -> head.Adapter | None:
    return None if a is None or b is None else head.Adapter(a, b, scale)


def _logits(
    bias: Tensor | None,
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    row_temperature: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> Logits:
    wide_bias = None if bias is None else bias.to(wide_dtype(dtype))
    return Logits(wide_bias, logit_scale, softcap, _temperature(row_temperature, temperature), ignore_index)


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
    needed: list[bool],
) -> tuple[Tensor, ...]:
    grads = head_bwd.backward(
        head.Kept(held, kept_logps, kept_entropy),
        hidden,
        weight,
        _adapter(lora_a, lora_b, lora_scale),
        targets,
        RowStats(logps, row_max, log_sum, entropy if entropy.numel() else None),
        _logits(bias, held.dtype, logit_scale, softcap, row_temperature, temperature, ignore_index),
        _kernels(held, "fold"),
        g_logps,
        g_entropy,
        head_bwd.Need(*needed),
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
    ctx.options = (temperature, softcap, ignore_index, logit_scale, lora_scale)


def _linear_backward(ctx: Any, g_logps: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, row_temperature = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    grads = torch.ops.prefkern.linear_logprobs_bwd(*saved, g_logps, others[2], row_temperature, *ctx.options, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 12


# ------------------------------------------------------------------------------------------------------- from logits


def _logits_fwd(
    logits: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    outputs: list[str],
) -> tuple[Tensor, ...]:
    tensors = _empty_stats(logits, targets, outputs, logits.dtype)
    _kernels(logits, "rowwise").logprobs_fwd(
        logits,
        targets,
        _row_stats(tensors, outputs),
        softcap=softcap,
        temperature=_temperature(row_temperature, temperature),
        ignore_index=ignore_index,
    )
    return tensors


def _logits_fwd_fake(logits: Tensor, targets: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty_stats(logits, targets, others[-1], logits.dtype)


def _logits_bwd(
    logits: Tensor,
    targets: Tensor,
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
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if g_logps is None and g_entropy is None:
        return grad.zero_()
    stats = RowStats(logps, row_max, log_sum, entropy if entropy.numel() else None)
    c = torch.zeros_like(logps) if g_logps is None else g_logps.to(logps.dtype).contiguous()
    e = None if g_entropy is None else g_entropy.to(logps.dtype).contiguous()
    _kernels(logits, "rowwise").logprobs_bwd(
        logits,
        targets,
        stats,
        c,
        e,
        grad,
        softcap=softcap,
        temperature=_temperature(row_temperature, temperature),
        ignore_index=ignore_index,
    )
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


# ----------------------------------------------------------------------------------------------------- registration


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "prefkern: token log-probabilities have no second derivative (create_graph=True, torch.func.hessian ...); "
        "for one, compute them with torch.log_softmax"
    )


def _outside_autocast(impl: Callable[..., Any]) -> Callable[..., Any]:
    """The operands' dtype is decided by the wrapper: autocast must not cast inside, where a product is float32."""

    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return impl(first, *args)

    return run


for _name, _impl, _fake, _autograd in (
    ("linear_logprobs_fwd", _linear_fwd, _linear_fwd_fake, (_linear_backward, _linear_setup)),
    ("linear_logprobs_bwd", _linear_bwd, _linear_bwd_fake, (_no_double_backward, None)),
    ("logprobs_fwd", _logits_fwd, _logits_fwd_fake, (_logits_backward, _logits_setup)),
    ("logprobs_bwd", _logits_bwd, _logits_bwd_fake, (_no_double_backward, None)),
):
    _library.impl(_name, _outside_autocast(_impl), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"prefkern::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"prefkern::{_name}", _autograd[0], setup_context=_autograd[1], lib=_library)
