"""Proximal policy optimisation of a language model: `PPOTrainer` and its `PPOConfig`.

    from prefkern.integrations.ppo import PPOConfig, PPOTrainer

    trainer = PPOTrainer(model, ref_model, tokenizer, PPOConfig(learning_rate=1e-5))
    responses = trainer.generate(queries)
    stats = trainer.step(queries, responses, rewards)

Needs accelerate and transformers (``pip install 'prefkern[ppo]'``), which load when a trainer is made. Read
`prefkern.integrations.ppo.trainer` from top to bottom: ``step`` is the algorithm.
"""

from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
