"""The public losses: an input form composed with an objective, checked at the door."""

from prefkern.losses.cpo import cpo_loss, linear_cpo_loss
from prefkern.losses.cross_entropy import linear_cross_entropy
from prefkern.losses.distillation import ref_kl_advantages, topk_kl
from prefkern.losses.dpo import dpo_loss, linear_dpo_loss
from prefkern.losses.grpo import grpo_loss, linear_grpo_loss
from prefkern.losses.guided import kl_guided_dpo_loss, linear_kl_guided_dpo_loss
from prefkern.losses.importance import importance_weights
from prefkern.losses.kto import kto_kl, kto_loss, linear_kto_loss
from prefkern.losses.linear import linear_loss
from prefkern.losses.modules import (
    CPOLoss,
    DPOLoss,
    GRPOLoss,
    KLGuidedDPOLoss,
    KTOLoss,
    ORPOLoss,
    PPOLoss,
    RewardLoss,
    RewardRegularizedLoss,
    RLOOLoss,
    ScoreWeightedLoss,
)
from prefkern.losses.orpo import linear_orpo_loss, orpo_loss
from prefkern.losses.ppo import linear_ppo_loss, ppo_loss
from prefkern.losses.reward_model import reward_loss
from prefkern.losses.rloo import linear_rloo_loss, rloo_loss
from prefkern.losses.sequences import pair_logps, sequence_logps, shift_labels, wpo_weights
from prefkern.losses.value import value_loss
from prefkern.losses.weighted import (
    linear_reward_regularized_loss,
    linear_score_weighted_loss,
    reward_regularized_loss,
    score_weighted_loss,
)

__all__ = [
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
]
