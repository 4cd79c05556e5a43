"""Odds-ratio preference optimisation on hidden states."""

from functools import partial

import torch
from torch import Tensor

from prefkern.losses._forms import ChosenLikelihood, check_pairs, first_half, sequence_form
from prefkern.losses._head import Head
from prefkern.losses.orpo import check_options, orpo_loss
from prefkern.losses.sequences import pair_logps
from prefkern.types import LoRA, LossOutput, Reduction, Temperature


def linear_orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    nll_targets: Tensor | None = None,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    metrics: bool = True,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_mask: Tensor | None = None,
    lora: LoRA | None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> LossOutput:
    """``orpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    The negative log-likelihood is the mean over the tokens of all chosen rows that are scored in ``nll_targets``; pairs
    and likelihood come from one pass of the head. See ``orpo_loss`` for the formulas, https://arxiv.org/abs/2403.07691,
    and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``): the completions; ``ignore_index`` is not scored.
        nll_targets: shaped like ``targets``, by default the same. TRL scores prompts here too: ``shift_labels`` of the
            unmasked chosen rows. Its rejected rows are not read; in chosen rows it must equal ``targets`` wherever
            both are scored (checked on the CPU; NaN at that token on an accelerator).
        beta, reduction, metrics: as in ``orpo_loss``.
        num_scored: counts a chosen token once that is scored in ``targets`` or in ``nll_targets``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``orpo_loss``, and means over the tokens of ``targets``:
        ``entropy``, ``logits/chosen``, ``logits/rejected`` (TRL's are over all positions, padding included),
        ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows; what the parts refuse, by name.
    """
    where = "linear_orpo_loss"
    check_options(where, beta, reduction)
    check_pairs(where, targets, cu_seqlens)
    logits = bias, temperature, logit_scale, softcap, ignore_index
    head = Head(*logits, vocab_mask, lora, compute_dtype, max_memory, num_scored, group)
    chosen, scored = first_half(targets, cu_seqlens), targets != ignore_index
    likelihood = ChosenLikelihood(where, targets, nll_targets, chosen, ignore_index)
    rows = partial(pair_logps, mask=scored, cu_seqlens=cu_seqlens, average=True)

    def fn(logps: Tensor) -> LossOutput:
        pairs, nll = rows(logps), likelihood.nll(logps)
        return orpo_loss(pairs.chosen, pairs.rejected, nll, beta=beta, reduction=reduction, metrics=metrics)

    return sequence_form(hidden, weight, likelihood.targets, fn, head, chosen=chosen, metrics=metrics, scored=scored)
