"""A tiny model, episodes and a trainer for the tests of PPO; nothing is downloaded."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from prefkern.integrations.ppo import PPOConfig, PPOTrainer

VOCABULARY = 24
PAD, EOS = 0, 1


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
        "initializer_range": 0.1,  # log-probabilities that differ
    }
    made = AutoModelForCausalLM.from_config(Qwen2Config(**shape | changes), attn_implementation="eager")
    return made.to(dtype)


def adapted(seed: int = 0, **options: Any) -> Any:
    """The model with a LoRA adapter that is not at its start."""
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False, "lora_dropout": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by an old name
        return peft.get_peft_model(model(seed), peft.LoraConfig(**settings | options))


def episodes(
    lengths: tuple[tuple[int, int], ...] = ((3, 5), (4, 2), (2, 7), (5, 7), (3, 1)), seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Queries and responses of these lengths, and scores."""
    made = torch.Generator().manual_seed(seed)
    queries = [torch.randint(2, VOCABULARY, (q,), generator=made) for q, _ in lengths]
    responses = [torch.randint(2, VOCABULARY, (r,), generator=made) for _, r in lengths]
    return queries, responses, torch.randn(len(lengths), generator=made, dtype=torch.float64).tolist()


def trainer(policy: Any = None, ref_model: Any = None, tokenizer: Any = None, **options: Any) -> PPOTrainer:
    """A trainer whose value head is not at its start; a reference that is not the policy."""
    extra = {name: options.pop(name) for name in ("value_model", "optimizer", "accelerator") if name in options}
    settings = {"disable_tqdm": True, "stop_token_id": EOS, "temperature": 0.7, "learning_rate": 1e-3}
    policy = model() if policy is None else policy
    if ref_model is None and options.get("reference") != "given" and not hasattr(policy, "peft_config"):
        ref_model = model(1, policy.dtype)
    made = PPOTrainer(policy, ref_model, tokenizer, PPOConfig(**settings | options), **extra)
    head = made.accelerator.unwrap_model(made.model).value_head
    if "value_model" not in extra:
        weight = torch.linspace(-1, 1, head.weight.numel(), dtype=head.weight.dtype).view(head.weight.shape)
        if isinstance(head.weight, DTensor):
            weight = distribute_tensor(weight, head.weight.device_mesh, head.weight.placements)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.fill_(0.1)
    return made


def state(trainer: PPOTrainer) -> dict[str, Any]:
    """Everything that a refused step must leave alone, as it is now."""
    return {
        "model": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": [
            {name: value.clone() for name, value in each.items()} for each in trainer.optimizer.state.values()
        ],
        "random": torch.get_rng_state().clone(),
        "step": trainer.global_step,
        "kl_coef": trainer.controller.coef,
        "lr": trainer.optimizer.param_groups[0]["lr"],
    }


def assert_same(first: Any, second: Any) -> None:
    """Bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second
