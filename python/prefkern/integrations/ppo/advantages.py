"""From scores to advantages: the KL penalty with its coefficient, the score, whitening, generalised advantage
estimation; on the CPU, in Rust, over the episodes of all processes."""

import torch

from prefkern import data
from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.ppo.rollout import Rollout


def fill(rollout: Rollout, args: PPOConfig, kl_coef: float) -> None:
    """Sets ``kl``, ``rewards``, ``advantages`` and ``returns`` of a rollout that has log-probabilities and values."""
    logps, mask, cu_seqlens = rollout.logps, rollout.mask, rollout.cu_seqlens
    scores = rollout.scores.to(logps.dtype)
    reference = logps if rollout.ref_logps is None else rollout.ref_logps
    rollout.kl = None
    if rollout.ref_logps is not None:
        rollout.kl = -data.token_rewards(
            logps,
            reference,
            torch.zeros_like(scores),
            mask=mask,
            kl_coef=1.0,
            kl_estimator=args.kl_estimator,
            cu_seqlens=cu_seqlens,
        )
    rewards = data.token_rewards(
        logps,
        reference,
        scores,
        mask=mask,
        kl_coef=kl_coef if args.kl_in == "reward" else 0.0,
        kl_estimator=args.kl_estimator,
        score_at=args.score_at,
        cu_seqlens=cu_seqlens,
    )
    per_token = rollout.spread("rewards", rewards.dtype)
    if per_token is not None:
        rewards = rewards + per_token
    if args.whiten_rewards:
        rewards = data.whiten(rewards, mask=rollout.value_mask, keep_mean=True)
    advantages, returns = data.gae(
        rewards,
        rollout.values,
        gamma=args.gamma,
        lam=args.lam,
        mask=rollout.value_mask,
        masked="skip",  # what a tool wrote is passed over: the next token of the policy is the successor
        cu_seqlens=cu_seqlens,
    )
    if args.whiten_advantages:
        advantages = data.whiten(advantages, mask=mask)
    rollout.rewards, rollout.advantages, rollout.returns = rewards, advantages, returns


class KLController:
    """``coef``, the coefficient of the KL penalty, fixed or steered towards a target after each step:
    `Fine-Tuning Language Models from Human Preferences <https://arxiv.org/abs/1909.08593>`_, section 2.2."""

    def __init__(self, args: PPOConfig) -> None:
        self._args = args
        self.coef = args.kl_coef

    def update(self, kl: float | None, episodes: int) -> None:
        """Takes the KL of the last rollout, summed over a response and averaged over its ``episodes``."""
        if self._args.kl_controller == "fixed" or kl is None:
            return
        error = min(max(kl / self._args.kl_target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * episodes / self._args.kl_horizon
