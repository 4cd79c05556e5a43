"""Unpaired preferences: one value per example, and the baseline that couples a batch."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prefkern.losses.objective import Objective, objective
from prefkern.losses.reduce import divide, masked_mean, widen


class KTOOptions(NamedTuple):
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@objective("sequence")
def kto(log_ratios: Tensor, is_desirable: Tensor, kl: Tensor | float, options: KTOOptions) -> Tensor:
    """Desirable ``w_d (1 - s(beta (D - kl)))``, undesirable ``w_u (1 - s(beta (kl - D)))``, each as ``s`` of the
    opposite argument, which keeps its relative accuracy near 0."""
    x = options.beta * (log_ratios - kl)
    return torch.where(
        is_desirable,
        options.desirable_weight * torch.sigmoid(-x),
        options.undesirable_weight * torch.sigmoid(x),
    )


@objective("sequence")
def apo_zero_unpaired(log_ratios: Tensor, is_desirable: Tensor, kl: Tensor | float, options: KTOOptions) -> Tensor:
    """Desirable ``w_d (1 - s(beta D))``, undesirable ``w_u s(beta D)``; the baseline is not used."""
    return kto(log_ratios, is_desirable, 0.0, options)


UNPAIRED_LOSSES: dict[str, Objective[[Tensor, Tensor, Tensor | float, KTOOptions], Tensor]] = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
}


@objective("batch")
@torch.no_grad()
def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``relu(mean(lp_theta - lp_ref))`` over the mismatched completions of every rank of ``group``, detached."""
    differences = widen(kl_logps) - widen(ref_kl_logps)
    total = torch.stack([differences.sum(), differences.new_full((), differences.numel())])
    if group is not None:
        dist.all_reduce(total, group=group)
    return divide(total[0], total[1]).clamp(min=0.0)


@torch.no_grad()
def unpaired_metrics(
    log_ratios: Tensor, logps: Tensor, is_desirable: Tensor, kl: Tensor | float, beta: float
) -> dict[str, Tensor]:
    """Means over each class (0 for an absent one, whose count is 0) and the mean baseline, under TRL's names."""
    rewards, logps = beta * log_ratios, widen(logps)
    chosen, rejected = masked_mean(rewards, is_desirable), masked_mean(rewards, ~is_desirable)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": masked_mean(logps, is_desirable),
        "logps/rejected": masked_mean(logps, ~is_desirable),
        "count/chosen": is_desirable.sum(),
        "count/rejected": (~is_desirable).sum(),
        "kl": kl.mean() if isinstance(kl, Tensor) else rewards.new_full((), kl),
    }
