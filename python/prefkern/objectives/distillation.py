"""Distillation from the k likeliest tokens of a teacher: one value per row of them."""

import torch
from torch import Tensor

from prefkern.losses.objective import objective
from prefkern.objectives.orpo import log1mexp


@objective("token")
def topk_kl(logps: Tensor, teacher_logps: Tensor, tail: bool) -> Tensor:
    """``sum_k p_t (log p_t - log p_s)``, and with tail ``r_t (log r_t - log r_s)``, ``r = 1 - sum_k p`` the others.

    Entries whose teacher has -inf are not among the k. A remainder that rounding leaves at or below 0 is 0 for the
    teacher, and for the student held at half a rounding, without a gradient. The gradient is ``-p_t + r_t p_s / r_s``.
    """
    teacher_logps = teacher_logps.detach()
    kept = teacher_logps != -torch.inf
    t, s = teacher_logps.masked_fill(~kept, 0.0), logps.masked_fill(~kept, 0.0)
    divergence = (t.exp() * (t - s)).sum(-1)
    if not tail:
        return divergence
    t_mass, s_mass = log_mass(teacher_logps, kept), log_mass(logps, kept)
    ceiling = -torch.finfo(logps.dtype).eps / 2
    log_ratio = log1mexp(t_mass.clamp(max=ceiling)) - log1mexp(s_mass.clamp(max=ceiling))
    return divergence + (-torch.expm1(t_mass)).clamp(min=0.0) * log_ratio


def log_mass(logps: Tensor, kept: Tensor) -> Tensor:
    """``log sum_k p`` over what is kept, -inf or the least number for nothing: the largest term, then the others
    relative to it, which keeps the digits of a sum near 1 that ``logsumexp`` rounds away."""
    inside = logps.masked_fill(~kept, -torch.inf)
    top, index = inside.max(dim=-1, keepdim=True)
    top = top.clamp(min=torch.finfo(logps.dtype).min)  # -inf - -inf is NaN
    others = (inside - top).exp().scatter(-1, index, 0.0).sum(-1)
    return top.squeeze(-1) + others.log1p()
