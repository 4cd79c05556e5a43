"""Divergences between the policy's and a reference's next-token distributions, per token, exact over the vocabulary.

Checks and casts of the rows happen here; the work is in the operators.
"""

from collections.abc import Sequence
from typing import Unpack, overload

import torch
from torch import Tensor

import prefkern.head.operators.divergence  # noqa: F401 - defines the operators
from prefkern import check
from prefkern.head.engine import memory
from prefkern.head.inputs import (
    Head,
    HeadOptions,
    Reference,
    ReferenceOptions,
    allowed_only,
    check_head,
    check_options,
    compute_dtype_of,
)
from prefkern.head.rows import Rows, check_targets, flat_temperature, operator_temperature
from prefkern.options import read, takes
from prefkern.types import Direction, DivergenceOutput, Temperature, TokenDivergence

_DIRECTIONS = {"forward": 0.0, "reverse": 1.0}


class LinearDivergenceOptions(HeadOptions, ReferenceOptions, total=False):
    """The keywords of `linear_kl_divergence` on both heads."""


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor | None = None,
    *,
    direction: Direction = "forward",
    jsd_beta: float | None = None,
    temperature: Temperature = 1.0,
    ref_temperature: Temperature | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Divergence of ``p = softmax(logits / T)`` from ``q = softmax(ref_logits / T_ref)``, per token.

    ``forward``: ``KL(q || p) = sum_v q_v log(q_v / p_v)``. ``reverse``: ``KL(p || q)``. With ``jsd_beta`` b, the
    generalised Jensen-Shannon divergence of TRL and https://arxiv.org/abs/2306.13649:
    ``b KL(q || m) + (1 - b) KL(p || m)``, ``m = (1 - b) p + b q``; as there, b = 0 is forward and b = 1 reverse.

    In float32 whatever the dtype of the logits (float64 for float64); an offset common to a row's logits costs no
    accuracy. Differentiable once, in ``logits`` only. No factor ``T^2`` is applied.

    Args:
        logits, ref_logits: ``[..., V]``, of one shape; float16, bfloat16, float32 or float64, also mixed.
        targets: ``[...]`` int64 or int32: decides only which rows count, those with ``ignore_index`` give 0. None: all.
        direction: ``forward`` or ``reverse``; leave it when ``jsd_beta`` is given.
        jsd_beta: a number in [0, 1].
        temperature: a positive number, or a tensor of one per row; ``ref_temperature`` likewise, default the same.

    Returns:
        ``[...]``, never negative, float32 (float64 for float64). A logit of -inf is legal: no probability, no gradient.
        Infinite where the distribution in front gives a token probability and the other gives it none (its gradient is
        then NaN in the reverse direction; Jensen-Shannon is always finite). NaN where a row has no finite logit.

    Raises:
        ValueError, TypeError: with the argument's name, what was expected and what was got.
    """
    where = "kl_divergence"
    check.no_functorch(where)
    for name, value in (("logits", logits), ("ref_logits", ref_logits)):
        check.tensor(where, name, value)
    check.floating(where, logits=logits, ref_logits=ref_logits)
    check.same_device(where, logits=logits, ref_logits=ref_logits, targets=targets)
    check.same_shape(where, logits=logits, ref_logits=ref_logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        check.fail(where, f"logits must be [..., V] with V >= 1, got {check.describe(logits)}")
    beta = beta_of(where, direction, jsd_beta)
    rows = _divergence_rows(where, logits, targets, temperature, ignore_index, logits.shape[-1])
    of_reference = _ref_temperature(where, rows, temperature, ref_temperature, logits)
    if torch.float64 in (logits.dtype, ref_logits.dtype):
        logits, ref_logits = logits.double(), ref_logits.double()
    results = torch.ops.prefkern.divergence_fwd(
        _flat(logits), _flat(ref_logits.detach()), rows.scored, *rows.temperature, *of_reference, beta
    )
    return rows.full(rows.checked(results[0]))


@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor | None = None,
    *,
    direction: Direction = "forward",
    jsd_beta: float | None = None,
    outputs: None = None,
    **options: Unpack[LinearDivergenceOptions],
) -> Tensor: ...
@overload
def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor | None = None,
    *,
    direction: Direction = "forward",
    jsd_beta: float | None = None,
    outputs: Sequence[DivergenceOutput],
    **options: Unpack[LinearDivergenceOptions],
) -> TokenDivergence: ...
@takes(Reference, Head)
def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor | None = None,
    *,
    direction: Direction = "forward",
    jsd_beta: float | None = None,
    outputs: Sequence[DivergenceOutput] | None = None,
    **options: Unpack[LinearDivergenceOptions],
) -> Tensor | TokenDivergence:
    """`kl_divergence` of two heads ``z = softcap(logit_scale (h W^T + b)) / temperature``, without their [N, V] logits.

    Four matrix products with the backward of a trainable head (logits of both, grad_hidden, grad_weight), 3 with a
    frozen one, 2 without gradients. Operands of 16 bits are multiplied into float32 logits, which are never rounded.
    ``forward``: ``KL(q || p)``, q the reference, p the policy; ``reverse``: ``KL(p || q)``; ``jsd_beta``: the
    generalised Jensen-Shannon divergence of https://arxiv.org/abs/2306.13649, see `kl_divergence`. Differentiable once,
    in ``hidden``, ``weight`` and ``bias``; the reference gets no gradient.

    Args:
        hidden, weight: ``[..., H]`` and ``[V, H]`` of the policy.
        ref_hidden, ref_weight: ``[..., H_ref]`` and ``[V, H_ref]`` of the reference: the same rows, the same
            vocabulary, any width.
        targets: ``[...]`` int64 or int32: decides only which rows count, those with ``ignore_index`` give 0 and cost no
            product where their number is known. None: all.
        direction, jsd_beta: as in `kl_divergence`.
        bias, temperature, logit_scale, softcap: of the policy's head, as in `linear_token_logprobs`.
        ref_bias, ref_logit_scale, ref_softcap: of the reference's head. Where the policy has one, the reference's must
            be given too: zeros, 1.0 or ``math.inf`` say that it has none.
        ref_temperature: default: that of the policy.
        outputs: None returns the divergence alone; a sequence of ``divergence`` and ``entropy`` returns a
            `TokenDivergence`, with the policy's entropy (without a gradient) where asked for. It costs no product.
        compute_dtype: dtype of the operands of both heads; default: the autocast dtype where autocast is on, else that
            of ``hidden`` and of ``ref_hidden`` each (float64 for both where one is).
        vocab_mask: ``[V]`` bool, the tokens that both distributions are over. ``lora`` and ``group`` are refused.
        max_memory: bytes that may stay held from forward to backward; the rows beyond them are recomputed, 6 products
            for 0. None is the plan's default: ``4 V H`` bytes, at least 1 GiB.
        num_scored: how many targets are scored, where the caller knows: spares an accelerator the wait for the count.

    Returns:
        ``[...]`` float32 (float64 for float64 operands), 0 where not scored, never negative; infinite and NaN as in
        `kl_divergence`. Nothing scored gives zeros with a graph, and zero gradients.

    Raises:
        ValueError, TypeError: with the argument's name, what was expected and what was got.
    """
    where = "linear_kl_divergence"
    check.no_functorch(where)
    reference, head = read(where, options, Reference, Head)
    head = check_options(where, head)
    if head.lora is not None:
        check.fail(where, "lora is not supported here: merge the adapter into the weight first")
    check.tensor(where, "hidden", hidden)
    check.tensor(where, "ref_hidden", ref_hidden)
    check_head(where, hidden, weight, head.bias)
    ref = reference.head(where, head)
    check_head(where, ref_hidden, ref_weight, ref.bias, prefix="ref_")
    check.same_device(where, hidden=hidden, ref_hidden=ref_hidden, targets=targets)
    (V, H), (ref_V, ref_H) = weight.shape, ref_weight.shape
    beta = beta_of(where, direction, jsd_beta)
    if ref_V != V or hidden.shape[:-1] != ref_hidden.shape[:-1]:
        check.fail(
            where,
            "hidden and ref_hidden must have the same rows, and weight and ref_weight the same vocabulary (slice a "
            f"padded one to it), got {check.describe(hidden)} with {check.describe(weight)} and "
            f"{check.describe(ref_hidden)} with {check.describe(ref_weight)}",
        )
    for name in outputs or ():
        check.one_of(where, "every entry of outputs", name, ("divergence", "entropy"))
    dtype, ref_dtype = (compute_dtype_of(where, head.compute_dtype, given) for given in (hidden, ref_hidden))
    if torch.float64 in (dtype, ref_dtype):
        dtype = ref_dtype = torch.float64
    bias = allowed_only(where, head.vocab_mask, head.bias, weight)
    ref_bias = allowed_only(where, head.vocab_mask, ref.bias, ref_weight)

    rows = _divergence_rows(where, hidden, targets, head.temperature, head.ignore_index, V)
    flat = rows.compact(hidden.reshape(-1, H), head.num_scored)
    ref_flat = rows.take_rows(ref_hidden.detach().reshape(-1, ref_H))
    ref_temperature = _ref_temperature(where, rows, head.temperature, reference.ref_temperature, hidden)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    max_memory = check.size(where, "max_memory", head.max_memory)
    bytes_ = memory.left(memory.budget(H, V, max_memory), hidden.device)
    k_max = memory.limits(H, V, dtype.itemsize, bytes_).held if needs_grad else 0
    results = torch.ops.prefkern.linear_divergence_fwd(
        flat,
        weight,
        bias,
        ref_flat,
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        rows.scored,
        *rows.temperature,
        head.softcap,
        head.logit_scale,
        *ref_temperature,
        ref.softcap,
        ref.logit_scale,
        beta,
        dtype,
        ref_dtype,
        "entropy" in (outputs or ()),
        k_max,
    )
    if needs_grad:
        memory.watch(results[-1:])
    divergence = rows.full(rows.checked(results[0]))
    if outputs is None:
        return divergence
    return TokenDivergence(divergence, rows.full(rows.checked(results[1])) if "entropy" in outputs else None)


def beta_of(where: str, direction: Direction, jsd_beta: float | None) -> float:
    """Returns the divergence as one number: 0 forward, 1 reverse, between them Jensen-Shannon."""
    check.one_of(where, "direction", direction, tuple(_DIRECTIONS))
    if jsd_beta is None:
        return _DIRECTIONS[direction]
    if direction != "forward":
        check.fail(where, f"direction must be left at its default when jsd_beta is given, got {direction!r}")
    return check.number(where, "jsd_beta", jsd_beta, low=0.0, high=1.0)


def _divergence_rows(
    where: str, source: Tensor, targets: Tensor | None, temperature: Temperature, ignore_index: int, V: int
) -> Rows:
    if targets is None:
        return Rows.without_targets(where, source, temperature)
    shape = source.shape[:-1]
    check.tensor(where, "targets", targets)
    check_targets(where, targets, shape, V, ignore_index)
    if targets.shape != shape:
        check.fail(where, f"targets must have shape {tuple(shape)}, got {check.describe(targets)}")
    return Rows(where, shape, targets, temperature, ignore_index)


def _ref_temperature(
    where: str, rows: Rows, temperature: Temperature, given: Temperature | None, source: Tensor
) -> tuple[Tensor | None, float]:
    """Returns the reference's temperature of the computed rows: the given one, else the policy's."""
    name, chosen = ("temperature", temperature) if given is None else ("ref_temperature", given)
    flat = flat_temperature(where, name, chosen, source.shape[:-1], source.device)
    return operator_temperature(rows.take_rows(flat))


def _flat(logits: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
