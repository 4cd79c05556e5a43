"""Contrastive preference optimisation (CPO, SimPO, AlphaPO) on hidden states."""

from functools import partial

import torch
from torch import Tensor

from prefkern.losses._forms import ChosenLikelihood, check_pairs, first_half, sequence_form
from prefkern.losses._head import Head
from prefkern.losses.cpo import check_options, cpo_loss
from prefkern.losses.sequences import pair_logps
from prefkern.objectives.cpo import CPOLossType
from prefkern.types import LoRA, LossOutput, Reduction, Temperature


def linear_cpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    nll_targets: Tensor | None = None,
    beta: float = 0.1,
    loss_type: CPOLossType = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
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
    """``cpo_loss`` of ``linear_token_logprobs(hidden, weight, targets)``, equal to it in value and gradient.

    The log-probabilities are sums over tokens, and means for ``ipo`` and ``simpo``; the negative log-likelihood is the
    mean over the tokens of all chosen rows that are scored in ``nll_targets``, from the same pass of the head. See
    ``cpo_loss`` for the formulas, https://arxiv.org/abs/2401.08417, and ``linear_token_logprobs`` for the head.

    Args:
        hidden: ``[2B, T, H]``, all chosen rows, then all rejected; or packed ``[N, H]`` with ``cu_seqlens [2B + 1]``.
        weight: ``[V, H]``.
        targets: ``[2B, T]`` or ``[N]``, aligned (``shift_labels``): the completions; ``ignore_index`` is not scored.
        nll_targets: shaped like ``targets``, by default the same, as in TRL; see ``linear_orpo_loss``.
        beta, ..., metrics: as in ``cpo_loss``.
        num_scored: counts a chosen token once that is scored in ``targets`` or in ``nll_targets``.
        bias, temperature, ..., group: as in ``linear_token_logprobs``.

    Returns:
        ``LossOutput(loss, metrics)``: the metrics of ``cpo_loss``, and means over the tokens of ``targets``:
        ``entropy``, ``logits/chosen``, ``logits/rejected`` (TRL's are over all positions, padding included),
        ``mean_token_accuracy`` (chosen).

    Raises:
        TypeError, ValueError: an odd number of rows; what the parts refuse, by name.
    """
    where = "linear_cpo_loss"
    check_options(where, beta, loss_type, label_smoothing, cpo_alpha, simpo_gamma, alpha, reduction)
    check_pairs(where, targets, cu_seqlens)
    logits = bias, temperature, logit_scale, softcap, ignore_index
    head = Head(*logits, vocab_mask, lora, compute_dtype, max_memory, num_scored, group)
    chosen, scored = first_half(targets, cu_seqlens), targets != ignore_index
    likelihood = ChosenLikelihood(where, targets, nll_targets, chosen, ignore_index)
    rows = partial(pair_logps, mask=scored, cu_seqlens=cu_seqlens, average=loss_type in ("ipo", "simpo"))
    loss = partial(cpo_loss, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, cpo_alpha=cpo_alpha)
    loss = partial(loss, simpo_gamma=simpo_gamma, alpha=alpha, reduction=reduction, metrics=metrics)

    def fn(logps: Tensor) -> LossOutput:
        return loss(*rows(logps)[:2], likelihood.nll(logps))

    return sequence_form(hidden, weight, likelihood.targets, fn, head, chosen=chosen, metrics=metrics, scored=scored)
