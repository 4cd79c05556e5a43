"""The waist: logits, or hidden states and the output matrix, to per-token log-probabilities.

Every loss of this library is ordinary autograd on what these functions return. Checks and casts of the rows happen
here; the work is in the operators.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

import prefkern.head.operators.logprob_sum
import prefkern.head.operators.logprobs  # noqa: F401 - they define the operators
from prefkern import check
from prefkern.head.engine import blocks, memory
from prefkern.head.inputs import (
    Head,
    HeadOptions,
    adapter,
    allowed_only,
    check_allowed,
    check_head,
    check_options,
    compute_dtype_of,
)
from prefkern.head.operators.statistics import OPTIONAL
from prefkern.head.rows import Rows, check_outputs, check_targets
from prefkern.options import read, takes
from prefkern.types import Output, Temperature, TokenStats


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Temperature = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
) -> TokenStats:
    """Log-probability of each target under ``softmax(z)``, ``z = softcap(logits) / temperature``.

    ``logp = z_y - log sum_v exp z_v`` in float32 whatever the dtype of the logits (float64 for float64), computed as
    ``(x_y - max x) / T - log sum``, so that an offset common to all logits costs no accuracy. Never above 0.

    Args:
        logits: ``[..., V]``; float16, bfloat16, float32 or float64. Entries of -inf are legal: their probability and
            gradient are 0.
        targets: ``[...]`` int64 or int32, aligned: row t of the logits is scored against ``targets[t]``.
        temperature: a positive number, or a tensor of one per row, shaped like ``targets``.
        softcap: ``c tanh(x / c)`` applied before the temperature.
        ignore_index: targets with this value are not scored: 0 in every result, no gradient.
        outputs: which fields to compute, among ``logps``, ``entropy``, ``log_sum_sq_probs``, ``mean_logit`` and
            ``is_top1``; ``logps`` is always computed.
        entropy_grad: whether the entropy carries a gradient, ``d entropy / dz = -p (log p + entropy)``.

    Raises:
        ValueError, TypeError: with the argument's name, what was expected and what was got. A target outside the
            vocabulary is an error on the CPU; on an accelerator that token becomes NaN instead of waiting for it.
    """
    where = "token_logprobs"
    check.tensor(where, "logits", logits)
    check.tensor(where, "targets", targets)
    check.floating(where, logits=logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        check.fail(where, f"logits must be [..., V] with V >= 1, got {check.describe(logits)}")
    V, shape = logits.shape[-1], logits.shape[:-1]
    check.no_functorch(where)
    check.same_device(where, logits=logits, targets=targets)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        check.fail_type(where, f"ignore_index must be an int, got {ignore_index!r}")
    check_targets(where, targets, shape, V, ignore_index)
    if targets.shape != shape:
        check.fail(where, "several targets per row are for linear_token_logprobs: gather from torch.log_softmax")
    check_outputs(where, targets, shape, outputs, entropy_grad)
    if softcap is not None:
        softcap = check.number(where, "softcap", softcap, low=0.0, open_low=True)
    rows = Rows(where, shape, targets, temperature, ignore_index)
    flat = logits.reshape(-1, V)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    optional = [name for name in OPTIONAL if name in outputs]
    results = torch.ops.prefkern.logprobs_fwd(flat, *rows.arguments(softcap), optional)
    return rows.stats(results, outputs, entropy_grad=entropy_grad)


@takes(Head)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
    **options: Unpack[HeadOptions],
) -> TokenStats:
    """Log-probability of each target under the head ``z = softcap(logit_scale (h W^T + b)) / temperature``, without
    the [N, V] logits: 3 matrix products with their backward (2 for a frozen weight, 1 without gradients).

    The products take operands of ``compute_dtype`` and accumulate in float32; logits are never rounded to 16 bits, so
    the log-probabilities are as exact as float32 ones. Differentiable once, in ``hidden``, ``weight`` and ``bias``.
    Do not wrap it in ``torch.utils.checkpoint``, which would run its product twice: it already keeps what it needs.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``, the output embedding.
        targets: ``[...]`` int64 or int32, aligned: row t of ``hidden`` is scored against ``targets[t]``
            (`shift_labels` makes them from input ids).
        bias: ``[V]``.
        temperature: a positive number, or a tensor of one per row, shaped like ``targets``.
        logit_scale, softcap: as the model's configuration names them.
        ignore_index: targets with this value are not scored: 0 in every result, no gradient, and no product where
            their number is known.
        outputs, entropy_grad: as in `token_logprobs`.
        compute_dtype: dtype of the operands; default: the autocast dtype where autocast is on, else that of ``hidden``.
        max_memory: bytes that may stay held from forward to backward, those of earlier calls whose backward has not run
            among them: an int, a text such as ``"2GB"``, or ``math.inf``. 0 recomputes all logits (4 products); None is
            the plan's default: ``4 V H`` bytes, at least 1 GiB (`prefkern.plan`).
        num_scored: how many targets are scored, where the caller knows: spares an accelerator the wait for the count.
        vocab_mask: ``[V]`` bool, the tokens that may be sampled: the others count as logits of -inf. A target among
            them is an error on the CPU, and -inf on an accelerator.
        lora: ``(A [r, H], B [V, r], scale)``, an adapter of the weight: logits of ``W + scale B A``, which is never
            formed. Gradients reach A and B.
        group: reserved; must be None.

    Several targets per row (``targets [..., Kt]``): ``logps [..., Kt]`` under one softmax, the other statistics one per
    row; entries of ``ignore_index`` are 0. Their gradient recomputes the logits: 4 products, 3 frozen.

    Raises:
        ValueError, TypeError: as `token_logprobs`.
    """
    where = "linear_token_logprobs"
    return token_stats(where, hidden, weight, targets, read(where, options, Head), outputs, entropy_grad=entropy_grad)


def token_stats(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: Head,
    outputs: Sequence[Output] = ("logps",),
    *,
    entropy_grad: bool = False,
    scratch_bytes: int = blocks.SCRATCH_BYTES,
) -> TokenStats:
    """`linear_token_logprobs` of complete options, with scratch of so many bytes at a time, for a caller whose own peak
    is the bound. With less than the usual scratch nothing is kept from forward to backward."""
    head, rows, flat = _rows(where, hidden, weight, targets, head)
    check_outputs(where, targets, hidden.shape[:-1], outputs, entropy_grad)
    (V, H), dtype = weight.shape, compute_dtype_of(where, head.compute_dtype, hidden)
    a, b, lora_scale = (None, None, 1.0) if head.lora is None else adapter(where, head.lora, hidden, V)
    wants = [
        torch.is_grad_enabled() and value is not None and value.requires_grad
        for value in (hidden, weight, head.bias, a, b)
    ]
    limits = memory.Limits(0, 0)
    if any(wants) and not rows.several and scratch_bytes >= blocks.SCRATCH_BYTES:
        frozen = not any(wants[1:]) and a is None
        max_memory = check.size(where, "max_memory", head.max_memory)
        left = memory.left(memory.budget(H, V, max_memory), hidden.device)
        size = 4 if frozen and dtype == torch.float16 else dtype.itemsize  # as the operator allocates it
        limits = memory.limits(H, V, size, left, frozen=frozen, entropy_grad=entropy_grad)
    # the operators compute in `compute_dtype`; autocast must not touch their inputs a second time
    results = torch.ops.prefkern.linear_logprobs_fwd(
        flat,
        weight,
        head.bias,
        a,
        b,
        *rows.arguments(head.softcap),
        head.logit_scale,
        lora_scale,
        [name for name in OPTIONAL if name in outputs],
        dtype,
        *limits,
        entropy_grad,
        scratch_bytes,
    )
    if any(wants):
        memory.watch(results[-3:])
    return rows.stats(results, outputs, entropy_grad=entropy_grad)


def linear_logprob_sum(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    head: Head,
    outputs: Sequence[Output] = ("logps",),
) -> tuple[Tensor, TokenStats]:
    """Returns ``sum_t coefficients_t log p_t`` over the scored tokens, and the statistics of each without a gradient.

    ``coefficients`` is shaped like ``targets`` and has no gradient. The gradients are made in the forward, in 3
    products (2 for a frozen weight, 1 without gradients), and nothing of the size of the logits is kept:
    ``max_memory`` bounds the transient tile. ``where`` names the caller in errors.
    """
    head, rows, flat = _rows(where, hidden, weight, targets, head)
    check_outputs(where, targets, hidden.shape[:-1], outputs, entropy_grad=False)
    leaves = (hidden, weight, head.bias)
    needed = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    y, *logits = rows.arguments(head.softcap)
    total, *results = torch.ops.prefkern.linear_logprob_sum(
        flat,
        weight,
        head.bias,
        y,
        rows.take_tokens(coefficients.detach()),
        *logits,
        head.logit_scale,
        [name for name in OPTIONAL if name in outputs],
        compute_dtype_of(where, head.compute_dtype, hidden),
        check.size(where, "max_memory", head.max_memory),
        needed,
    )
    return rows.checked(total), rows.stats(results, outputs, entropy_grad=False)


def _rows(where: str, hidden: Tensor, weight: Tensor, targets: Tensor, head: Head) -> tuple[Head, Rows, Tensor]:
    """Checks the arguments; returns the options with the allowed vocabulary in the bias, the rows, and the hidden
    states of those that are scored."""
    check.no_functorch(where)
    for name, required in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check.tensor(where, name, required)
    head = check_options(where, head)
    check_head(where, hidden, weight, head.bias)
    check.same_device(where, hidden=hidden, weight=weight, targets=targets)
    (V, H), shape = weight.shape, hidden.shape[:-1]
    check_targets(where, targets, shape, V, head.ignore_index)
    bias = allowed_only(where, head.vocab_mask, head.bias, weight)
    check_allowed(where, head.vocab_mask, targets, head.ignore_index)
    head = head._replace(bias=bias, vocab_mask=None)
    rows = Rows(where, shape, targets, head.temperature, head.ignore_index)
    return head, rows, rows.compact(hidden.reshape(-1, H), head.num_scored)
