"""The losses as modules: options in the constructor, where they are checked, and tensors in the call."""

from typing import Any

from torch import Tensor, nn

from prefkern.losses import dpo, kto, orpo, ppo
from prefkern.losses.policy import KLEstimator
from prefkern.losses.reduce import TokenReduction
from prefkern.types import LossOutput, Reduction


class _Loss(nn.Module):
    """Keeps the options by name and shows them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DPOLoss(_Loss):
    """``dpo_loss`` with fixed options, https://arxiv.org/abs/2305.18290."""

    def __init__(
        self,
        beta: float = 0.1,
        *,
        loss_type: dpo.DPOLossType = "sigmoid",
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        metrics: bool = True,
    ) -> None:
        dpo.check_options("DPOLoss", beta, loss_type, label_smoothing, reduction)
        super().__init__(
            beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, reduction=reduction, metrics=metrics
        )

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> LossOutput:
        return dpo.dpo_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=weights,
            **self.options,
        )


class KTOLoss(_Loss):
    """``kto_loss`` with fixed options, https://arxiv.org/abs/2402.01306."""

    def __init__(
        self,
        beta: float = 0.1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: kto.KTOLossType = "kto",
        reduction: Reduction = "mean",
        metrics: bool = True,
    ) -> None:
        kto.check_options("KTOLoss", beta, desirable_weight, undesirable_weight, loss_type, reduction)
        super().__init__(
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            loss_type=loss_type,
            reduction=reduction,
            metrics=metrics,
        )

    def forward(
        self, logps: Tensor, ref_logps: Tensor, is_desirable: Tensor, *, kl: Tensor | float | None = None
    ) -> LossOutput:
        return kto.kto_loss(logps, ref_logps, is_desirable, kl=kl, **self.options)


class ORPOLoss(_Loss):
    """``orpo_loss`` with fixed options, https://arxiv.org/abs/2403.07691."""

    def __init__(self, beta: float = 0.1, *, reduction: Reduction = "mean", metrics: bool = True) -> None:
        orpo.check_options("ORPOLoss", beta, reduction)
        super().__init__(beta=beta, reduction=reduction, metrics=metrics)

    def forward(self, chosen_avg_logps: Tensor, rejected_avg_logps: Tensor, chosen_nll: Tensor) -> LossOutput:
        return orpo.orpo_loss(chosen_avg_logps, rejected_avg_logps, chosen_nll, **self.options)


class PPOLoss(_Loss):
    """``ppo_loss`` with fixed options, https://arxiv.org/abs/1707.06347."""

    def __init__(
        self,
        cliprange: float = 0.2,
        *,
        cliprange_high: float | None = None,
        delta: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        entropy_coef: float = 0.0,
        vf_coef: float = 0.1,
        cliprange_value: float = 0.2,
        reduction: TokenReduction = "token",
        metrics: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "cliprange": cliprange,
            "cliprange_high": cliprange_high,
            "delta": delta,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
            "entropy_coef": entropy_coef,
            "vf_coef": vf_coef,
            "cliprange_value": cliprange_value,
            "reduction": reduction,
        }
        ppo.check_options("PPOLoss", **options)
        super().__init__(**options, metrics=metrics)

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        entropy: Tensor | None = None,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        value_mask: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        return ppo.ppo_loss(
            logps,
            old_logps,
            advantages,
            mask,
            ref_logps=ref_logps,
            entropy=entropy,
            values=values,
            old_values=old_values,
            returns=returns,
            value_mask=value_mask,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            **self.options,
        )
