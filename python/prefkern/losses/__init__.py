"""The public losses: an input form composed with an objective, checked at the door."""

from prefkern.losses.cpo import cpo_loss, linear_cpo_loss
from prefkern.losses.cross_entropy import linear_cross_entropy
from prefkern.losses.distillation import ref_kl_advantages, topk_kl
from prefkern.losses.dpo import dpo_loss, linear_dpo_loss
from prefkern.losses.guided import kl_guided_dpo_loss, linear_kl_guided_dpo_loss
from prefkern.losses.kto import kto_kl, kto_loss, linear_kto_loss
from prefkern.losses.linear import linear_loss
from prefkern.losses.modules import (
    CPOLoss,
    DPOLoss,
    KLGuidedDPOLoss,
    KTOLoss,
    ORPOLoss,
    PPOLoss,
    RewardLoss,
    RewardRegularizedLoss,
    ScoreWeightedLoss,
)
from prefkern.losses.orpo import linear_orpo_loss, orpo_loss
from prefkern.losses.ppo import linear_ppo_loss, ppo_loss, value_loss
from prefkern.losses.reward_model import reward_loss
from prefkern.losses.sequences import pair_logps, sequence_logps, shift_labels, wpo_weights
from prefkern.losses.weighted import (
    linear_reward_regularized_loss,
    linear_score_weighted_loss,
    reward_regularized_loss,
    score_weighted_loss,
)

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "KLGuidedDPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PPOLoss",
    "RewardLoss",
    "RewardRegularizedLoss",
    "ScoreWeightedLoss",
    "cpo_loss",
    "dpo_loss",
    "kl_guided_dpo_loss",
    "kto_kl",
    "kto_loss",
    "linear_cpo_loss",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kl_guided_dpo_loss",
    "linear_kto_loss",
    "linear_loss",
    "linear_orpo_loss",
    "linear_ppo_loss",
    "linear_reward_regularized_loss",
    "linear_score_weighted_loss",
    "orpo_loss",
    "pair_logps",
    "ppo_loss",
    "ref_kl_advantages",
    "reward_loss",
    "reward_regularized_loss",
    "score_weighted_loss",
    "sequence_logps",
    "shift_labels",
    "topk_kl",
    "value_loss",
    "wpo_weights",
]
