"""PPO learns: one token is rewarded, and the best reachable trade of reward against KL is known in closed form."""

import math
import os
from typing import NamedTuple

import pytest
import tiny_ppo
import torch
from torch import Tensor

from prefkern.integrations.ppo import PPOConfig, PPOTrainer

TOKEN, LENGTH, KL_COEF = 5, 8, 0.02


class Best(NamedTuple):
    objective: float
    reward: float
    kl: float


def best() -> Best:
    """Of ``E[reward] - KL_COEF KL(policy || uniform)``, with a reward of 1 / LENGTH for each TOKEN: each position
    takes it with probability proportional to ``exp(1 / (LENGTH KL_COEF))``."""
    weight, V = math.exp(1 / (LENGTH * KL_COEF)), tiny_ppo.VOCABULARY
    p = weight / (weight + V - 1)
    kl = LENGTH * (p * math.log(V * p) + (1 - p) * math.log(V * (1 - p) / (V - 1)))
    return Best(p - KL_COEF * kl, p, kl)


def share(prompts: list[list[int]], responses: list[Tensor]) -> list[float]:
    return [float((response == TOKEN).float().mean()) for response in responses]


def learn(seed: int, steps: int) -> list[dict[str, float]]:
    """A model whose first policy, which is the reference, takes every token with equal probability."""
    policy = tiny_ppo.model(seed, num_hidden_layers=1, initializer_range=0.05)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
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
    return PPOTrainer(policy, None, None, args).train([[2 + i % 5, 3, 4] for i in range(64)], share)


def tail(history: list[dict[str, float]], name: str, last: int = 20) -> float:
    return sum(stats[name] for stats in history[-last:]) / last


def test_the_rewarded_token_is_learnt() -> None:
    history = learn(seed=0, steps=40)
    assert history[0]["objective/scores"] < 0.1
    assert history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert tail(history, "objective/scores") > 0.85 * best().reward


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("CI")), reason="takes two minutes; the test above is its beginning")
@pytest.mark.parametrize("seed", range(5))
def test_every_seed_comes_within_ten_percent_of_the_best(seed: int) -> None:
    history = learn(seed, steps=200)
    assert tail(history, "objective/rlhf_reward") > 0.9 * best().objective
    assert tail(history, "objective/scores") > 0.9 * best().reward
    assert tail(history, "objective/kl") == pytest.approx(best().kl, rel=0.2)
