"""A task whose best policy is known in closed form: what PPO must reach, on any machine, within a minute.

A model that takes all V tokens with equal probability gets ``1 / LENGTH`` for every TOKEN in an answer of LENGTH.
``E[reward] - kl_coef KL(policy || first policy)`` is largest where every position takes TOKEN with a probability
proportional to ``exp(1 / (LENGTH kl_coef))``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern.check import require
from prefkern.integrations.ppo import PPOConfig, PPOTrainer

VOCABULARY, TOKEN, LENGTH, KL_COEF = 24, 5, 8, 0.02


class Reached(NamedTuple):
    """Per answer: ``objective = reward - KL_COEF kl``."""

    objective: float
    reward: float
    kl: float


def best() -> Reached:
    weight, V = math.exp(1 / (LENGTH * KL_COEF)), VOCABULARY
    p = weight / (weight + V - 1)
    kl = LENGTH * (p * math.log(V * p) + (1 - p) * math.log(V * (1 - p) / (V - 1)))
    return Reached(p - KL_COEF * kl, p, kl)


def learn(seed: int, steps: int) -> list[dict[str, float]]:
    """The statistics of each step of a model with one layer."""
    args = PPOConfig(
        learning_rate=1e-2,
        batch_size=32,
        num_ppo_epochs=2,
        total_episodes=32 * steps,
        response_length=LENGTH,
        temperature=1.0,
        kl_coef=KL_COEF,
        disable_tqdm=True,
        seed=seed,
    )
    return PPOTrainer(_uniform(seed), None, None, args).train([[2 + i % 5, 3, 4] for i in range(64)], _share)


def reached(history: list[dict[str, float]], last: int = 20) -> Reached:
    """The mean of the last steps."""
    names = ("objective/rlhf_reward", "objective/scores", "objective/kl")
    return Reached(*(sum(stats[name] for stats in history[-last:]) / last for name in names))


def _uniform(seed: int) -> Any:
    transformers = require("transformers", "prefkern.integrations.ppo.known_optimum", "pip install 'prefkern[ppo]'")
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.05,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def _share(prompts: list[Any], responses: list[Tensor]) -> list[float]:
    return [float((response == TOKEN).float().mean()) for response in responses]
