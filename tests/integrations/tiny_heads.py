"""Tiny models of every kind of head, with weights that make logits of some size; nothing is downloaded."""

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

import prefkern as pk
from prefkern.integrations.transformers import head_of, last_hidden

V = 48
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of this type, in eval mode; under seed 0 always the same one."""
    torch.manual_seed(seed)
    return grown(transformers.AutoModelForCausalLM.from_config(configuration(kind, **changes)), seed).to(dtype)


def configuration(kind: str, **changes: Any) -> Any:
    transformers.logging.set_verbosity_error()
    return transformers.CONFIG_MAPPING[kind](**SHAPE | changes)


def grown(model: Any, seed: int = 0) -> Any:
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=made).to(parameter.dtype))
    return model.eval()


def tokens(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(2, V - 8, (rows, length), generator=torch.Generator().manual_seed(seed))


def own_logps(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """The log-probabilities of the model's own logits, in float64."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def head_logps(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    return pk.linear_token_logprobs(last_hidden(model, ids), targets=targets, **head_of(model)).logps


def adapted(model: Any, **options: Any) -> Any:
    """The model in peft, with a LoRA adapter that is not at its start."""
    import peft

    settings = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "init_lora_weights": False}
    return in_peft(model, peft.LoraConfig(**settings | options))


def in_peft(model: Any, config: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, and of names that transformers has changed
        return peft.get_peft_model(model, config).eval()
