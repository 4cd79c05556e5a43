"""The waist: logits, or hidden states and the output matrix, to per-token log-probabilities.

Every loss of this library is ordinary autograd on what these two functions return. Checks and casts of the rows happen
here; the work is in the operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import prefkern.head.operators.logprobs  # noqa: F401 - defines the operators
from prefkern import check
from prefkern.head.engine import blocks, memory
from prefkern.head.inputs import adapter, allowed_only, check_head
from prefkern.head.rows import Rows
from prefkern.types import LoRA, Output, Temperature, TokenStats


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
    rows = Rows(where, logits, targets, temperature, softcap, ignore_index, outputs, entropy_grad, logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    results = torch.ops.prefkern.logprobs_fwd(flat, *rows.arguments, list(rows.outputs))
    return rows.stats(results)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
    vocab_mask: Tensor | None = None,
    lora: LoRA | None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
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
            among them. 0 recomputes all logits (4 products); None is the plan's default: ``4 V H`` bytes, at least
            1 GiB (`prefkern.plan`).
        num_scored: how many targets are scored, where the caller knows: spares an accelerator the wait for the count.
        vocab_mask: ``[V]`` bool, the tokens that may be sampled: the others count as logits of -inf.
        lora: ``(A [r, H], B [V, r], scale)``, an adapter of the weight: logits of ``W + scale B A``, which is never
            formed. Gradients reach A and B.
        group: reserved; must be None.

    Several targets per row (``targets [..., Kt]``): ``logps [..., Kt]`` under one softmax, the other statistics one per
    row; entries of ``ignore_index`` are 0. Their gradient recomputes the logits: 4 products, 3 frozen.

    Raises:
        ValueError, TypeError: as `token_logprobs`.
    """
    return bounded_token_logprobs(
        hidden,
        weight,
        targets,
        blocks.SCRATCH_BYTES,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        outputs=outputs,
        entropy_grad=entropy_grad,
        vocab_mask=vocab_mask,
        lora=lora,
        compute_dtype=compute_dtype,
        max_memory=max_memory,
        num_scored=num_scored,
        group=group,
    )


def bounded_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scratch_bytes: int,
    *,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
    vocab_mask: Tensor | None = None,
    lora: LoRA | None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> TokenStats:
    """`linear_token_logprobs` with scratch of so many bytes at a time, for a caller whose own peak is the bound. With
    less than the usual scratch nothing is kept from forward to backward."""
    where = "linear_token_logprobs"
    dtype = check_head(where, hidden, weight, targets, bias, logit_scale, compute_dtype, max_memory, num_scored, group)
    V, H = weight.shape
    a, b, lora_scale = (None, None, 1.0) if lora is None else adapter(where, lora, hidden, V)
    if vocab_mask is not None:
        bias = allowed_only(where, vocab_mask, bias, weight)

    rows = Rows(where, hidden, targets, temperature, softcap, ignore_index, outputs, entropy_grad, V)
    flat = rows.compact(hidden.reshape(-1, H), num_scored)
    wants = [
        torch.is_grad_enabled() and value is not None and value.requires_grad for value in (hidden, weight, bias, a, b)
    ]
    limits = memory.Limits(0, 0)
    if any(wants) and not rows.several and scratch_bytes >= blocks.SCRATCH_BYTES:
        frozen = not any(wants[1:]) and a is None
        left = memory.left(memory.budget(H, V, max_memory), hidden.device)
        size = 4 if frozen and dtype == torch.float16 else dtype.itemsize  # as `ops` allocates it
        limits = memory.limits(H, V, size, left, frozen=frozen, entropy_grad=entropy_grad)
    # the operators compute in `compute_dtype`; autocast must not touch their inputs a second time
    results = torch.ops.prefkern.linear_logprobs_fwd(
        flat,
        weight,
        bias,
        a,
        b,
        *rows.arguments,
        float(logit_scale),
        lora_scale,
        list(rows.outputs),
        dtype,
        *limits,
        entropy_grad,
        scratch_bytes,
    )
    if any(wants):
        memory.watch(results[-3:])
    return rows.stats(results)
