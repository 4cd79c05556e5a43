"""What a step computes: products of the head, passes of the trunk, and the largest tensor it makes."""

from collections import Counter
from typing import Any

import pytest
import tiny_ppo
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefkern.head.engine.products import count_products

V, H = 512, 16


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns; the head's returns what it holds for the backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{"num_ppo_epochs": 1}, {"num_ppo_epochs": 2, "num_mini_batches": 2}])
def test_a_step_multiplies_scored_tokens_only_and_passes_each_trunk_once(options: dict[str, int], masked: bool) -> None:
    trainer = tiny_ppo.trainer(tiny_ppo.model(vocab_size=V), tiny_ppo.model(1, vocab_size=V), **options)
    queries, responses, rewards = tiny_ppo.episodes()
    masks = [(torch.arange(len(row)) % 3 != 1).long() if masked else torch.ones(len(row)) for row in responses]
    scored = int(sum(mask.sum() for mask in masks))
    passes: Counter[str] = Counter()
    for name, module in (("policy", trainer.model), ("reference", trainer.reference)):
        trunk = module.policy.base_model
        trunk.register_forward_hook(lambda *_, name=name: passes.update([name]))
    with count_products() as counted, Largest() as largest:
        trainer.step(queries, responses, rewards, masks)

    # scoring takes one product for the policy and one for the reference; an update three: forward, two gradients
    epochs, updates = options["num_ppo_epochs"], options["num_ppo_epochs"] * options.get("num_mini_batches", 1)
    assert counted.products(scored, H, V) == pytest.approx(2 + 3 * epochs)
    assert passes == {"policy": 1 + updates, "reference": 1}
    # the unscaled gradient of the scored tokens, or the output matrix; never logits of all positions
    widest = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True))
    assert largest.elements <= max(scored, H) * V < len(queries) * (widest - 1) * V
    if updates == 1:
        assert largest.elements == max(scored, H) * V
