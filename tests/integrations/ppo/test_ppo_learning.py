"""PPO learns a task whose best policy is known in closed form."""

import os

import pytest

from prefkern.integrations.ppo import known_optimum


def test_the_best_is_that_of_any_other_probability() -> None:
    import math

    best, V = known_optimum.best(), known_optimum.VOCABULARY

    def objective(p: float) -> float:
        kl = known_optimum.LENGTH * (p * math.log(V * p) + (1 - p) * math.log(V * (1 - p) / (V - 1)))
        return p - known_optimum.KL_COEF * kl

    assert best.objective == pytest.approx(objective(best.reward), abs=1e-12)
    assert all(objective(p / 1000) < best.objective + 1e-12 for p in range(1, 1000))


def test_the_rewarded_token_is_learnt() -> None:
    history = known_optimum.learn(seed=0, steps=40)
    assert history[0]["objective/scores"] < 0.1
    assert history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert known_optimum.reached(history, last=10).reward > 0.85 * known_optimum.best().reward


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("CI")), reason="takes two minutes; the test above is its beginning")
@pytest.mark.parametrize("seed", range(5))
def test_every_seed_comes_within_ten_percent_of_the_best(seed: int) -> None:
    found, best = known_optimum.reached(known_optimum.learn(seed, steps=200)), known_optimum.best()
    assert found.objective > 0.9 * best.objective
    assert found.reward > 0.9 * best.reward
    assert found.kl == pytest.approx(best.kl, rel=0.2)
