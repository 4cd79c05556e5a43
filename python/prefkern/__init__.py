"""prefkern: losses for preference and policy optimisation of language models.

Token log-probabilities from hidden states in the fewest matrix products, exact to float32, and every loss as ordinary
autograd on them. Importing this package loads torch only: operators, Triton, the compiled core and the trainers load at
first use.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from prefkern.check import MissingDependency

if TYPE_CHECKING:
    from prefkern import data, integrations
    from prefkern.head import plan
    from prefkern.head.divergence import kl_divergence, linear_kl_divergence
    from prefkern.head.logprobs import linear_token_logprobs, token_logprobs
    from prefkern.losses import (
        CPOLoss,
        DPOLoss,
        KLGuidedDPOLoss,
        KTOLoss,
        ORPOLoss,
        PPOLoss,
        RewardLoss,
        RewardRegularizedLoss,
        ScoreWeightedLoss,
        cpo_loss,
        dpo_loss,
        kl_guided_dpo_loss,
        kto_kl,
        kto_loss,
        linear_cpo_loss,
        linear_dpo_loss,
        linear_kl_guided_dpo_loss,
        linear_kto_loss,
        linear_loss,
        linear_orpo_loss,
        linear_ppo_loss,
        linear_reward_regularized_loss,
        linear_score_weighted_loss,
        orpo_loss,
        pair_logps,
        ppo_loss,
        ref_kl_advantages,
        reward_loss,
        reward_regularized_loss,
        score_weighted_loss,
        sequence_logps,
        shift_labels,
        topk_kl,
        value_loss,
        wpo_weights,
    )
    from prefkern.losses.cross_entropy import linear_cross_entropy
    from prefkern.types import LossOutput, PairLogps, TokenDivergence, TokenStats

__version__ = version("prefkern")

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "KLGuidedDPOLoss",
    "KTOLoss",
    "LossOutput",
    "MissingDependency",
    "ORPOLoss",
    "PPOLoss",
    "PairLogps",
    "RewardLoss",
    "RewardRegularizedLoss",
    "ScoreWeightedLoss",
    "TokenDivergence",
    "TokenStats",
    "cpo_loss",
    "data",
    "dpo_loss",
    "integrations",
    "kl_divergence",
    "kl_guided_dpo_loss",
    "kto_kl",
    "kto_loss",
    "linear_cpo_loss",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kl_divergence",
    "linear_kl_guided_dpo_loss",
    "linear_kto_loss",
    "linear_loss",
    "linear_orpo_loss",
    "linear_ppo_loss",
    "linear_reward_regularized_loss",
    "linear_score_weighted_loss",
    "linear_token_logprobs",
    "orpo_loss",
    "pair_logps",
    "plan",
    "ppo_loss",
    "ref_kl_advantages",
    "reward_loss",
    "reward_regularized_loss",
    "score_weighted_loss",
    "sequence_logps",
    "shift_labels",
    "token_logprobs",
    "topk_kl",
    "value_loss",
    "wpo_weights",
]


_PARTS = {"data": "data", "integrations": "integrations", "plan": "head.plan"}
_HOMES = {
    "kl_divergence": "head.divergence",
    "linear_kl_divergence": "head.divergence",
    "linear_token_logprobs": "head.logprobs",
    "token_logprobs": "head.logprobs",
    "LossOutput": "types",
    "PairLogps": "types",
    "TokenDivergence": "types",
    "TokenStats": "types",
}
"""Where a public name is defined, if not in `prefkern.losses`."""


def __getattr__(name: str) -> object:
    """Loads what is asked for when it is first asked for: a script pays for the operators that it uses."""
    if name in _PARTS:
        return importlib.import_module(f"prefkern.{_PARTS[name]}")
    if name not in __all__:
        raise AttributeError(f"module 'prefkern' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"prefkern.{_HOMES.get(name, 'losses')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
