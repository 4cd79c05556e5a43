"""The waist's short cut: a weighted sum of token log-probabilities whose weights are known beforehand."""

from collections.abc import Sequence

import torch
from torch import Tensor

import prefkern.head.operators.logprob_sum  # noqa: F401 - defines the operators
from prefkern.head.inputs import allowed_only, check_head
from prefkern.head.rows import Rows
from prefkern.types import Output, Temperature, TokenStats


def linear_logprob_sum(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    vocab_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> tuple[Tensor, TokenStats]:
    """``sum_t coefficients_t log p_t`` over the scored tokens, and the statistics of each, which carry no gradient.

    The head and its options are those of ``linear_token_logprobs``; ``coefficients`` is shaped like ``targets`` and has
    no gradient. The gradients are made in the forward, in 3 products (2 for a frozen weight, 1 without gradients), and
    nothing of the size of the logits is kept: ``max_memory`` bounds the transient tile. ``where`` names the caller in
    errors.
    """
    dtype = check_head(where, hidden, weight, targets, bias, logit_scale, compute_dtype, max_memory, num_scored, group)
    if vocab_mask is not None:
        bias = allowed_only(where, vocab_mask, bias, weight)
    V, H = weight.shape
    rows = Rows(where, hidden, targets, temperature, softcap, ignore_index, outputs, False, V)
    flat = rows.compact(hidden.reshape(-1, H), num_scored)
    leaves = (hidden, weight, bias)
    needed = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    y, *options = rows.arguments
    total, *results = torch.ops.prefkern.linear_logprob_sum(
        flat,
        weight,
        bias,
        y,
        rows.take(coefficients.detach()),
        *options,
        float(logit_scale),
        list(rows.outputs),
        dtype,
        max_memory,
        needed,
    )
    return rows.checked(total), rows.stats(results)
