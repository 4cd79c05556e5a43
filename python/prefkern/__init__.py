"""prefkern: losses for preference and policy optimisation of language models.

Token log-probabilities from hidden states in the fewest matrix products, exact to float32, and every loss as ordinary
autograd on them. Importing this package loads torch only: operators, Triton, the compiled core and the trainers load at
first use.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

__version__ = version("prefkern")

if TYPE_CHECKING:  # what type checkers see; at run time a name is loaded when it is first asked for
    from prefkern import data as data
    from prefkern import integrations as integrations
    from prefkern.check import MissingDependency as MissingDependency
    from prefkern.head import plan as plan
    from prefkern.head.divergence import kl_divergence as kl_divergence
    from prefkern.head.divergence import linear_kl_divergence as linear_kl_divergence
    from prefkern.head.logprobs import linear_token_logprobs as linear_token_logprobs
    from prefkern.head.logprobs import token_logprobs as token_logprobs
    from prefkern.integrations.transformers import head_of as head_of
    from prefkern.integrations.transformers import last_hidden as last_hidden
    from prefkern.losses import *  # noqa: F403 - its __all__ is the list
    from prefkern.types import LossOutput as LossOutput
    from prefkern.types import PairLogps as PairLogps
    from prefkern.types import TokenDivergence as TokenDivergence
    from prefkern.types import TokenStats as TokenStats

_MODULES = {"data": "data", "integrations": "integrations", "plan": "head.plan"}
_NAMES = {
    "check": ("MissingDependency",),
    "head.divergence": ("kl_divergence", "linear_kl_divergence"),
    "head.logprobs": ("linear_token_logprobs", "token_logprobs"),
    "integrations.transformers": ("head_of", "last_hidden"),
    "losses": (
        "CPOLoss",
        "DPOLoss",
        "GRPOLoss",
        "KLGuidedDPOLoss",
        "KTOLoss",
        "ORPOLoss",
        "PPOLoss",
        "RLOOLoss",
        "RewardLoss",
        "RewardRegularizedLoss",
        "ScoreWeightedLoss",
        "cpo_loss",
        "dpo_loss",
        "grpo_loss",
        "importance_weights",
        "kl_guided_dpo_loss",
        "kto_kl",
        "kto_loss",
        "linear_cpo_loss",
        "linear_cross_entropy",
        "linear_dpo_loss",
        "linear_grpo_loss",
        "linear_kl_guided_dpo_loss",
        "linear_kto_loss",
        "linear_loss",
        "linear_orpo_loss",
        "linear_ppo_loss",
        "linear_reward_regularized_loss",
        "linear_rloo_loss",
        "linear_score_weighted_loss",
        "orpo_loss",
        "pair_logps",
        "ppo_loss",
        "ref_kl_advantages",
        "reward_loss",
        "reward_regularized_loss",
        "rloo_loss",
        "score_weighted_loss",
        "sequence_logps",
        "shift_labels",
        "topk_kl",
        "value_loss",
        "wpo_weights",
    ),
    "types": ("LossOutput", "PairLogps", "TokenDivergence", "TokenStats"),
}
"""Which module defines which public names; a test holds those of the losses to `prefkern.losses`."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:
    __all__ = sorted([*_HOMES, *_MODULES])

    def __getattr__(name: str) -> object:
        """Loads what is asked for when it is first asked for: a script pays for the operators that it uses."""
        if name in _MODULES:
            return importlib.import_module(f"prefkern.{_MODULES[name]}")
        if name not in _HOMES:
            raise AttributeError(f"module 'prefkern' has no attribute {name!r}{_nearest(name)}")
        value = getattr(importlib.import_module(f"prefkern.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def _nearest(name: str) -> str:
        import difflib

        near = difflib.get_close_matches(name, __all__, n=1)
        return f": did you mean {near[0]!r}?" if near else ""

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
