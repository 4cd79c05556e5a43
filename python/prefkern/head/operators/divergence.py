"""The operators of the divergences: schemas, fakes, autograd and dispatch, as in `prefkern.head.operators.logprobs`.

Two pairs, from hidden states and from logits. Only the policy's side is differentiable. ``rows [5, N]`` are the
statistics that the backward needs, `DivergenceStats`; ``held`` is ``[min(N, k_max), V]`` in the fake.
"""

from typing import Any

import torch
from torch import Tensor

from prefkern import operators
from prefkern.head.engine import two_heads
from prefkern.head.engine.gradients import Gradients
from prefkern.head.engine.head import Head
from prefkern.head.engine.two_heads import TwoHeads
from prefkern.head.operators.statistics import empty_grads, logits_of, returned
from prefkern.kernels.interface import DivergenceResults, DivergenceStats, TilePair, wide_dtype
from prefkern.kernels.reference import divergence as plain

_FORM = "Tensor? row_temperature, float temperature, float? softcap, float logit_scale"
_REF_FORM = "Tensor? ref_row_temperature, float ref_temperature, float? ref_softcap, float ref_logit_scale"
_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor? scored"
)
_LOGITS = (
    "Tensor logits, Tensor ref_logits, Tensor? scored, Tensor? row_temperature, float temperature, "
    "Tensor? ref_row_temperature, float ref_temperature, float beta"
)


def _rows(stacked: Tensor) -> DivergenceStats:
    return DivergenceStats._make(stacked.unbind(0))


# ------------------------------------------------------------------------------------------------ from hidden states

Arguments = tuple[Any, ...]


def _heads(heads: Arguments, scored: Tensor | None, forms: Arguments, options: Arguments) -> TwoHeads:
    """Returns both heads of an operator's arguments ``_HEADS``, ``_FORM`` and ``_REF_FORM``, with beta and dtypes."""

    def head(tensors: Arguments, form: Arguments, dtype: torch.dtype) -> Head:
        hidden, weight, bias = tensors
        row_temperature, temperature, softcap, logit_scale = form
        logits = logits_of(bias, dtype, row_temperature, temperature, softcap, logit_scale=logit_scale)
        return Head(hidden, weight, logits, dtype)

    beta, dtype, ref_dtype = options
    return TwoHeads(head(heads[:3], forms[:4], dtype), head(heads[3:], forms[4:], ref_dtype), scored, beta)


def _empty_results(hidden: Tensor, wide: torch.dtype, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    N = hidden.shape[0]
    return (
        hidden.new_empty(N, dtype=wide),
        hidden.new_empty(N if entropy else 0, dtype=wide),
        hidden.new_empty(5, N, dtype=wide),
    )


def _linear_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    heads = _heads(arguments[:6], arguments[6], arguments[7:15], arguments[15:18])
    entropy, k_max = arguments[18:]
    hidden, dtype = heads.policy.hidden, heads.policy.dtype
    divergence, entropies, rows = _empty_results(hidden, wide_dtype(dtype), entropy)
    held = hidden.new_empty(min(hidden.shape[0], k_max), heads.policy.weight.shape[0], dtype=dtype)
    results = DivergenceResults(divergence, entropies if entropy else None, _rows(rows))
    two_heads.forward(heads, results, held, operators.implementation(held, "divergence", plain))
    return divergence, entropies, rows, held


def _linear_fwd_fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dtype, _, entropy, k_max = others[-4:]
    held = hidden.new_empty(torch.sym_min(hidden.shape[0], k_max), weight.shape[0], dtype=dtype)
    return *_empty_results(hidden, wide_dtype(dtype), entropy), held


def _linear_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    scored, rows, held, g = arguments[6:10]
    heads = _heads(arguments[:6], scored, arguments[10:18], arguments[18:21])
    given = (heads.policy.hidden, heads.policy.weight, heads.policy.logits.bias)
    grads = Gradients(*empty_grads(given, arguments[21:]))
    two_heads.backward(heads, _rows(rows), held, g, grads, operators.implementation(held, "divergence", plain))
    return returned(grads[:3], arguments[:3])


def _linear_bwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return returned(empty_grads(arguments[:3], arguments[21:]), arguments[:3])


def _linear_setup(ctx: Any, inputs: Arguments, output: tuple[Tensor, ...]) -> None:
    _, entropy, rows, held = output
    *tensors, row_temperature, temperature, softcap, logit_scale = inputs[:11]
    ref_row_temperature, *options = inputs[11:18]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(entropy, rows, held)
    ctx.save_for_backward(*tensors, rows, held, row_temperature, ref_row_temperature)
    ctx.options = (temperature, softcap, logit_scale), options


def _linear_backward(ctx: Any, g: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 20
    *saved, row_temperature, ref_row_temperature = ctx.saved_tensors
    form, others_ = ctx.options
    needed = ctx.needs_input_grad[:3]
    grads = torch.ops.prefkern.linear_divergence_bwd(
        *saved, g, row_temperature, *form, ref_row_temperature, *others_, *needed
    )
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 17


# ------------------------------------------------------------------------------------------------------- from logits


def _pair(logits: Tensor, ref_logits: Tensor, scored: Tensor | None, options: Arguments) -> TilePair:
    """Both heads' logits, of an operator's arguments ``_LOGITS``; beta is the last of them."""
    row_temperature, temperature, ref_row_temperature, ref_temperature, _ = options
    forms = (
        logits_of(None, logits.dtype, row_temperature, temperature, None),
        logits_of(None, logits.dtype, ref_row_temperature, ref_temperature, None),
    )
    return TilePair(logits, ref_logits, scored, *forms)


def _logits_fwd(logits: Tensor, ref_logits: Tensor, scored: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    divergence, _, rows = _empty_results(logits, wide_dtype(logits.dtype), False)
    results = DivergenceResults(divergence, None, _rows(rows))
    tiles = operators.implementation(logits, "divergence", plain)
    tiles.tile_fwd(_pair(logits, ref_logits, scored, options), results, None, beta=options[-1], peak=None)
    return divergence, rows


def _logits_fwd_fake(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    divergence, _, rows = _empty_results(logits, wide_dtype(logits.dtype), False)
    return divergence, rows


def _logits_bwd(
    rows: Tensor, g: Tensor, logits: Tensor, ref_logits: Tensor, scored: Tensor | None, *options: Any
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    pair = _pair(logits, ref_logits, scored, options)
    c = g.to(rows.dtype) / pair.logits.temperature
    tiles = operators.implementation(logits, "divergence", plain)
    tiles.tile_bwd(pair, _rows(rows), c, grad, beta=options[-1], peak=None)
    return grad


def _logits_bwd_fake(rows: Tensor, g: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logits_setup(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    logits, ref_logits, scored, row_temperature, temperature, ref_row_temperature, ref_temperature, beta = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logits, ref_logits, scored, row_temperature, ref_row_temperature)
    ctx.options = temperature, ref_temperature, beta


def _logits_backward(ctx: Any, g: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    rows, logits, ref_logits, scored, row_temperature, ref_row_temperature = ctx.saved_tensors
    temperature, ref_temperature, beta = ctx.options
    grad = torch.ops.prefkern.divergence_bwd(
        rows, g, logits, ref_logits, scored, row_temperature, temperature, ref_row_temperature, ref_temperature, beta
    )
    return grad, *(None,) * 7


_NO_SECOND = operators.no_second_derivative("divergences", "torch.nn.functional.kl_div")

operators.define(
    f"linear_divergence_fwd({_HEADS}, {_FORM}, {_REF_FORM}, float beta, ScalarType compute_dtype, "
    "ScalarType ref_dtype, bool entropy, int k_max) -> (Tensor divergence, Tensor entropy, Tensor rows, Tensor held)",
    _linear_fwd,
    _linear_fwd_fake,
    _linear_backward,
    _linear_setup,
)
operators.define(
    f"linear_divergence_bwd({_HEADS}, Tensor rows, Tensor held, Tensor g, {_FORM}, {_REF_FORM}, float beta, "
    "ScalarType compute_dtype, ScalarType ref_dtype, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _linear_bwd,
    _linear_bwd_fake,
    _NO_SECOND,
)
operators.define(
    f"divergence_fwd({_LOGITS}) -> (Tensor divergence, Tensor rows)",
    _logits_fwd,
    _logits_fwd_fake,
    _logits_backward,
    _logits_setup,
)
operators.define(
    f"divergence_bwd(Tensor rows, Tensor g, {_LOGITS}) -> Tensor", _logits_bwd, _logits_bwd_fake, _NO_SECOND
)
