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

from prefkern import head, reference
from prefkern._check import require
from prefkern.types import RowStats, Temperature

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
_LOGITS = "Tensor? row_temperature, float temperature, float? softcap, int ignore_index"
_STATS = "Tensor logps, Tensor row_max, Tensor log_sum, Tensor entropy"

_library = torch.library.Library("prefkern", "DEF")  # type: ignore[no-untyped-call]
_define: Callable[[str], object] = _library.define
_define(
    f"linear_logprobs_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_LOGITS}, float logit_scale, "
    f"str[] outputs, ScalarType compute_dtype, int k_max) -> ({_STATS}, Tensor log_sum_sq_probs, Tensor mean_logit, "
    "Tensor is_top1, Tensor held)"
)
_define(
    f"linear_logprobs_bwd(Tensor held, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_STATS}, "
    f"Tensor? g_logps, Tensor? g_entropy, {_LOGITS}, float logit_scale, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_stats(like: Tensor, outputs: list[str], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """logps, row_max, log_sum and the optional statistics of every row; those not asked for have no elements."""
    N = like.shape[0]
    rows = [like.new_empty(N, dtype=dtype) for _ in range(3)]
    optional = [
        like.new_empty(N if name in outputs else 0, dtype=torch.bool if name == "is_top1" else dtype)
        for name in OPTIONAL
    ]
    return *rows, *optional


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
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    logit_scale: float,
    outputs: list[str],
    compute_dtype: torch.dtype,
    k_max: int,
) -> tuple[Tensor, ...]:
    tensors = _empty_stats(hidden, outputs, _wide(compute_dtype))
    held = hidden.new_empty(min(hidden.shape[0], k_max), weight.shape[0], dtype=compute_dtype)
    logits = head.Logits(
        None if bias is None else bias.to(_wide(compute_dtype)),
        logit_scale,
        softcap,
        _temperature(row_temperature, temperature),
        ignore_index,
    )
    tiles = _kernels(held, "fold")
    head.forward(hidden, weight, targets, _row_stats(tensors, outputs), held, logits, tiles)
    return *tensors, held


def _linear_fwd_fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, outputs, compute_dtype, k_max = others
    held = hidden.new_empty(torch.sym_min(hidden.shape[0], k_max), weight.shape[0], dtype=compute_dtype)
    return *_empty_stats(hidden, outputs, _wide(compute_dtype)), held


def _linear_bwd(
    held: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    logit_scale: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide_bias = None if bias is None else bias.to(logps.dtype)
    logits = head.Logits(wide_bias, logit_scale, softcap, _temperature(row_temperature, temperature), ignore_index)
    stats = RowStats(logps, row_max, log_sum, entropy if entropy.numel() else None)
    grads = head.backward(
        held,
        hidden,
        weight,
        targets,
        stats,
        logits,
        _kernels(held, "fold"),
        g_logps,
        g_entropy,
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    grad_bias = None if grads.bias is None or bias is None else grads.bias.to(bias.dtype)
    return _or_empty(grads.hidden, hidden), _or_empty(grads.weight, hidden), _or_empty(grad_bias, hidden)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _linear_bwd_fake(
    held: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def like(value: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if not needed or value is None else value.new_empty(value.shape)

    need_hidden, need_weight, need_bias = others[-3:]
    return like(hidden, need_hidden), like(weight, need_weight), like(bias, need_bias)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, row_temperature, temperature, softcap, ignore_index, logit_scale = inputs[:9]
    logps, row_max, log_sum, entropy, *others, held = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum, *others, held)
    ctx.save_for_backward(held, hidden, weight, bias, targets, logps, row_max, log_sum, entropy, row_temperature)
    ctx.options = (temperature, softcap, ignore_index, logit_scale)


def _linear_backward(ctx: Any, g_logps: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, row_temperature = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = torch.ops.prefkern.linear_logprobs_bwd(*saved, g_logps, others[2], row_temperature, *ctx.options, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 9


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
    tensors = _empty_stats(logits, outputs, _wide(logits.dtype))
    _kernels(logits, "rowwise").logprobs_fwd(
        logits,
        targets,
        _row_stats(tensors, outputs),
        softcap=softcap,
        temperature=_temperature(row_temperature, temperature),
        ignore_index=ignore_index,
    )
    return tensors


def _logits_fwd_fake(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty_stats(logits, others[-1], _wide(logits.dtype))


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
