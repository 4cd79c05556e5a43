"""Distillation from k tokens of each row, and from the tokens that the student wrote itself."""

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import inputs
from prefkern.losses.objective import objective
from prefkern.losses.reduce import log1mexp, masked_mean, scored
from prefkern.types import Direction, LossOutput, Reduction

MASS_LIMIT = 1.05
"""What log-probabilities rounded to bfloat16 may sum to; logits sum to anything."""


@objective("token")
def topk_divergence(logps: Tensor, teacher_logps: Tensor, tail: bool) -> Tensor:
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
    return divergence + remainder(t_mass) * (log_remainder(t_mass) - log_remainder(s_mass))


@objective("token")
def reverse_topk_divergence(logps: Tensor, teacher_logps: Tensor, tail: bool) -> Tensor:
    """``sum_k p_s (log p_s - log p_t)``, and with tail ``r_s (log r_s - log r_t)``, ``r = 1 - sum_k p`` the others.

    Entries whose teacher has -inf are not among the k: their mass is the student's remainder. A remainder that rounding
    leaves at or below 0 is 0 where it weighs, and half a rounding in its logarithm, without a gradient. The gradient
    is ``p_s [(log p_s - log p_t) - (log r_s - log r_t)]``, and without the tail ``p_s (log p_s - log p_t + 1)``.
    """
    teacher_logps = teacher_logps.detach()
    kept = teacher_logps != -torch.inf
    t, s = teacher_logps.masked_fill(~kept, 0.0), logps.masked_fill(~kept, -torch.inf)
    difference = torch.where(s == -torch.inf, 0.0, logps.masked_fill(~kept, 0.0) - t)  # a token of no probability is 0
    divergence = (s.exp() * difference).sum(-1)
    if not tail:
        return divergence
    s_mass, t_mass = log_mass(logps, kept), log_mass(teacher_logps, kept)
    return divergence + remainder(s_mass) * (log_remainder(s_mass) - log_remainder(t_mass))


def remainder(mass: Tensor) -> Tensor:
    """``1 - e^mass``, not below 0."""
    return (-torch.expm1(mass)).clamp(min=0.0)


def log_remainder(mass: Tensor) -> Tensor:
    """``log(1 - e^mass)``, at least that of half a rounding, without a gradient there."""
    return log1mexp(mass.clamp(max=-torch.finfo(mass.dtype).eps / 2))


DIVERGENCES = {"forward": topk_divergence, "reverse": reverse_topk_divergence}


def log_mass(logps: Tensor, kept: Tensor) -> Tensor:
    """``log sum_k p`` over what is kept, -inf or the least number for nothing: the largest term, then the others
    relative to it, which keeps the digits of a sum near 1 that ``logsumexp`` rounds away."""
    inside = logps.masked_fill(~kept, -torch.inf)
    top, index = inside.max(dim=-1, keepdim=True)
    top = top.clamp(min=torch.finfo(logps.dtype).min)  # -inf - -inf is NaN
    others = (inside - top).exp().scatter(-1, index, 0.0).sum(-1)
    return top.squeeze(-1) + others.log1p()


def topk_kl(
    logps_k: Tensor,
    teacher_logps_k: Tensor,
    *,
    direction: Direction = "forward",
    tail: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    metrics: bool = True,
) -> LossOutput:
    """KL of teacher and student over k tokens of each row and all others as one, https://arxiv.org/abs/1503.02531.

    With p_t and p_s the probabilities of those tokens under teacher and student, ``r = 1 - sum_k p`` of all others::

        forward   sum_k p_t (log p_t - log p_s)  +  r_t (log r_t - log r_s)      the second term with tail=True
        reverse   sum_k p_s (log p_s - log p_t)  +  r_s (log r_s - log r_t)      the gradient reaches p_s too

    With the tail it is the KL of two distributions over k + 1 outcomes: not negative, at most the full KL, and equal to
    it at k = V. Without, it is only a part of that sum, which raising (forward) or lowering (reverse) every p_s lowers.
    The log-probabilities come from the waist, with one target per kept token: forward the teacher's likeliest, reverse
    the student's own::

        teacher_logps, tokens = teacher_logits.log_softmax(-1).topk(64)
        student = pk.linear_token_logprobs(hidden, weight, tokens).logps   # [B, T, 64]: row t predicts token t + 1
        rows = pk.shift_labels(input_ids, mask=completion_mask) != -100    # [B, T]: the rows that predict completions
        loss = pk.topk_kl(student, teacher_logps, mask=rows).loss

        with torch.no_grad():                                              # reverse: the student's own likeliest
            tokens = model.lm_head(hidden).topk(64).indices
            teacher = pk.linear_token_logprobs(teacher_hidden, teacher_weight, tokens).logps
        student = pk.linear_token_logprobs(hidden, weight, tokens).logps
        loss = pk.topk_kl(student, teacher, direction="reverse", mask=rows).loss

    Args:
        logps_k: the student's log-probabilities ``[..., Kt]`` of distinct tokens; the gradient reaches them.
        teacher_logps_k: the teacher's, of the same tokens; not renormalised. Rows of fewer tokens are filled with -inf:
            such an entry is not kept, whatever the student's says.
        direction: ``forward`` covers what the teacher does, ``reverse`` seeks what the student does too much of.
        tail: the term of the remaining mass. A remainder that rounding leaves at 0 or below counts 0 (the teacher's) or
            half a rounding, without a gradient (the student's; reverse: the other way round).
        mask: scored rows, bool or 0/1, ``[...]``; what it excludes may hold anything. Rows, not tokens: TRL's
            ``completion_mask`` is of tokens, and one position later.
        reduction: ``mean`` (sum / normalizer, by default the scored rows of this call), ``sum``, or ``none`` for
            ``[...]``, 0 where not scored.
        normalizer: the count of the whole batch, for equal gradients under accumulation; a number or a device tensor.
        metrics: False gives an empty dict.

    Returns:
        ``LossOutput(loss, metrics)``, float32 (float64 for float64). Metrics, row means: ``kl``, ``mass/student`` and
        ``mass/teacher``, the probability of the kept tokens. Nothing scored gives 0, with a graph.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name; on the CPU, rows that are no
        log-probabilities because they sum to more than 1.
    """
    where = "topk_kl"
    check.one_of(where, "direction", direction, tuple(DIVERGENCES))
    check.one_of(where, "reduction", reduction, ("mean", "sum", "none"))
    inputs.required(where, logps_k=logps_k, teacher_logps_k=teacher_logps_k)
    check.floating(where, logps_k=logps_k, teacher_logps_k=teacher_logps_k)
    check.same_shape(where, logps_k=logps_k, teacher_logps_k=teacher_logps_k)
    if logps_k.ndim == 0 or logps_k.shape[-1] == 0:
        check.fail(where, f"logps_k must be [..., Kt] with Kt >= 1, got {check.describe(logps_k)}")
    mask = check.mask(where, "mask", mask, logps_k.shape[:-1])
    check.same_device(where, logps_k=logps_k, teacher_logps_k=teacher_logps_k, mask=mask)
    normalizer = inputs.normalizer(where, normalizer, reduction, logps_k)
    every = None if mask is None else mask.unsqueeze(-1)
    student, teacher = scored(logps_k, every), scored(teacher_logps_k, every).detach()
    masses = _masses(student, teacher)
    _check_masses(where, masses, mask)
    losses = scored(DIVERGENCES[direction](student, teacher, tail), mask)
    loss = masked_mean(losses, mask, normalizer) if reduction == "mean" else losses
    shown = {"kl": losses.detach(), **masses} if metrics else {}
    return LossOutput(
        loss.sum() if reduction == "sum" else loss, {name: masked_mean(value, mask) for name, value in shown.items()}
    )


@torch.no_grad()
def _masses(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """The probability of the kept tokens of each row."""
    kept = teacher != -torch.inf
    named = {"mass/student": student, "mass/teacher": teacher}
    return {name: log_mass(logps, kept).exp() for name, logps in named.items()}


def _check_masses(where: str, masses: dict[str, Tensor], mask: Tensor | None) -> None:
    """On the CPU, what is summed are probabilities."""
    for name, mass in masses.items():
        if mass.device.type != "cpu" or torch.compiler.is_compiling() or not mass.numel():
            return
        largest = scored(mass, mask).max().item()
        if largest > MASS_LIMIT:
            argument = "teacher_logps_k" if name == "mass/teacher" else "logps_k"
            check.fail(
                where,
                f"{argument} must hold log-probabilities of distinct tokens, whose probabilities sum to at most 1, "
                f"got a row that sums to {largest:.4g}: apply log_softmax over the vocabulary before picking the k",
            )


def ref_kl_advantages(logps: Tensor, ref_logps: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``lp_ref - lp`` of sampled tokens as their advantages: reverse KL as a policy gradient, on-policy distillation.

    The gradient of ``KL(pi || pi_ref)`` is that of ``E[lp (lp - lp_ref)]`` with the bracket held fixed, so that any
    policy loss lowers it on tokens that the policy wrote, its clip and its importance weights included::

        advantages = pk.ref_kl_advantages(old_logps, teacher_logps, mask=mask)
        loss = pk.ppo_loss(logps, old_logps, advantages, mask).loss

    It sees one token of each row, at the price of one log-probability of the teacher: ``topk_kl(direction="reverse")``
    sees k and has less noise.

    Args:
        logps: of the policy that wrote the tokens, of any shape.
        ref_logps: of the reference or teacher, of the same shape.
        mask: scored tokens, bool or 0/1, of the same shape; 0 elsewhere.

    Returns:
        Advantages of the shape of ``logps``, float32 (float64 for float64), without a gradient.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or mask value, by name.
    """
    where = "ref_kl_advantages"
    inputs.required(where, logps=logps, ref_logps=ref_logps)
    check.floating(where, logps=logps, ref_logps=ref_logps)
    check.same_shape(where, logps=logps, ref_logps=ref_logps)
    mask = check.mask(where, "mask", mask, logps.shape)
    check.same_device(where, logps=logps, ref_logps=ref_logps, mask=mask)
    return scored(ref_logps, mask).detach() - scored(logps, mask).detach()
