"""The losses as modules: options in the constructor, where they are checked, and tensors in the call."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from torch import nn

from prefkern.losses.cpo import CPO, CPOOptions, cpo_loss
from prefkern.losses.dpo import DPO, DPOOptions, dpo_loss
from prefkern.losses.grpo import GRPO, GRPOOptions, grpo_loss
from prefkern.losses.guided import KLGuidedDPO, KLGuidedDPOOptions, kl_guided_dpo_loss
from prefkern.losses.kto import KTO, KTOOptions, kto_loss
from prefkern.losses.orpo import ORPO, ORPOOptions, orpo_loss
from prefkern.losses.ppo import PPO, PPOOptions, ppo_loss
from prefkern.losses.reward_model import Reward, RewardOptions, reward_loss
from prefkern.losses.rloo import RLOO, RLOOOptions, rloo_loss
from prefkern.losses.weighted import (
    RewardRegularized,
    RewardRegularizedOptions,
    ScoreWeighted,
    ScoreWeightedOptions,
    reward_regularized_loss,
    score_weighted_loss,
)
from prefkern.options import checked, fields, read
from prefkern.types import LossOutput


class _Loss(nn.Module):
    """Keeps the options as one checked object; each is an attribute, and setting one checks it again."""

    function: ClassVar[Callable[..., LossOutput]]
    kind: ClassVar[type[Any]]
    options: Any

    def __init_subclass__(cls) -> None:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        loss, options = inspect.signature(cls.function), [name for name, _, _ in fields(cls.kind)]
        tensors = [parameter for name, parameter in loss.parameters.items() if name not in options]
        forward = cls.forward

        def shown(self: Any, *args: Any, **kwargs: Any) -> LossOutput:
            return forward(self, *args, **kwargs)

        shown.__doc__ = f"Returns ``{cls.function.__name__}`` of these tensors with the module's options."
        shown.__signature__ = loss.replace(parameters=[own, *tensors])  # type: ignore[attr-defined]
        cls.forward = shown  # type: ignore[method-assign]
        first, *others = [loss.parameters[name] for name in options]
        first = first.replace(kind=first.POSITIONAL_OR_KEYWORD)
        cls.__signature__ = inspect.Signature([first, *others])  # type: ignore[attr-defined]

    def __init__(self, first: object, options: Any) -> None:
        super().__init__()
        if first is not None:
            options = {self.kind._fields[0]: first, **options}
        object.__setattr__(self, "options", read(type(self).__name__, options, self.kind))

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options")
        if options is not None and name in options._fields:
            return getattr(options, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.kind._fields:
            value = checked(type(self).__name__, self.options._replace(**{name: value}))
            object.__setattr__(self, "options", value)
        else:
            super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> LossOutput:
        return type(self).function(*args, **kwargs, **self.options._asdict())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())

    if TYPE_CHECKING:
        __call__: Callable[..., LossOutput]


class DPOLoss(_Loss):
    """`dpo_loss` with fixed options, https://arxiv.org/abs/2305.18290."""

    function, kind = staticmethod(dpo_loss), DPO

    def __init__(self, beta: float | None = None, /, **options: Unpack[DPOOptions]) -> None:
        super().__init__(beta, options)


class KTOLoss(_Loss):
    """`kto_loss` with fixed options, https://arxiv.org/abs/2402.01306."""

    function, kind = staticmethod(kto_loss), KTO

    def __init__(self, beta: float | None = None, /, **options: Unpack[KTOOptions]) -> None:
        super().__init__(beta, options)


class ORPOLoss(_Loss):
    """`orpo_loss` with fixed options, https://arxiv.org/abs/2403.07691."""

    function, kind = staticmethod(orpo_loss), ORPO

    def __init__(self, beta: float | None = None, /, **options: Unpack[ORPOOptions]) -> None:
        super().__init__(beta, options)


class CPOLoss(_Loss):
    """`cpo_loss` with fixed options, https://arxiv.org/abs/2401.08417."""

    function, kind = staticmethod(cpo_loss), CPO

    def __init__(self, beta: float | None = None, /, **options: Unpack[CPOOptions]) -> None:
        super().__init__(beta, options)


class RewardLoss(_Loss):
    """`reward_loss` with fixed options: Bradley-Terry, https://arxiv.org/abs/2203.02155."""

    function, kind = staticmethod(reward_loss), Reward

    def __init__(self, center_coefficient: float | None = None, /, **options: Unpack[RewardOptions]) -> None:
        super().__init__(center_coefficient, options)


class KLGuidedDPOLoss(_Loss):
    """`kl_guided_dpo_loss` with fixed options."""

    function, kind = staticmethod(kl_guided_dpo_loss), KLGuidedDPO

    def __init__(self, beta: float | None = None, /, **options: Unpack[KLGuidedDPOOptions]) -> None:
        super().__init__(beta, options)


class RewardRegularizedLoss(_Loss):
    """`reward_regularized_loss` with fixed options."""

    function, kind = staticmethod(reward_regularized_loss), RewardRegularized

    def __init__(self, reward_coef: float | None = None, /, **options: Unpack[RewardRegularizedOptions]) -> None:
        super().__init__(reward_coef, options)


class ScoreWeightedLoss(_Loss):
    """`score_weighted_loss` with fixed options."""

    function, kind = staticmethod(score_weighted_loss), ScoreWeighted

    def __init__(self, baseline: float | None = None, /, **options: Unpack[ScoreWeightedOptions]) -> None:
        super().__init__(baseline, options)


class PPOLoss(_Loss):
    """`ppo_loss` with fixed options, https://arxiv.org/abs/1707.06347."""

    function, kind = staticmethod(ppo_loss), PPO

    def __init__(self, cliprange: float | None = None, /, **options: Unpack[PPOOptions]) -> None:
        super().__init__(cliprange, options)


class GRPOLoss(_Loss):
    """`grpo_loss` with fixed options, https://arxiv.org/abs/2402.03300."""

    function, kind = staticmethod(grpo_loss), GRPO

    def __init__(self, epsilon: float | None = None, /, **options: Unpack[GRPOOptions]) -> None:
        super().__init__(epsilon, options)


class RLOOLoss(_Loss):
    """`rloo_loss` with fixed options, https://arxiv.org/abs/2402.14740."""

    function, kind = staticmethod(rloo_loss), RLOO

    def __init__(self, epsilon: float | None = None, /, **options: Unpack[RLOOOptions]) -> None:
        super().__init__(epsilon, options)
