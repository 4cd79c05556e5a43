"""The coefficient of the KL penalty: fixed, or steered towards a target."""

from prefkern.integrations.ppo.config import PPOConfig


class KLController:
    """``coef``, and how it changes after a step: `Fine-Tuning Language Models from Human Preferences
    <https://arxiv.org/abs/1909.08593>`_, section 2.2."""

    def __init__(self, args: PPOConfig) -> None:
        self._args = args
        self.coef = args.kl_coef

    def update(self, kl: float | None, episodes: int) -> None:
        """``kl``: of the last rollout, summed over a response and averaged over its ``episodes``."""
        if self._args.kl_controller == "fixed" or kl is None:
            return
        error = min(max(kl / self._args.kl_target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * episodes / self._args.kl_horizon
