"""`without_noise`: two passes in train mode are one, and equal to eval mode."""

from typing import Any

import pytest
import torch
from tiny_heads import GPT2, head_logps, tiny, tokens

from prefkern.integrations.transformers import without_noise

DROPOUT = 0.3
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"attention_dropout": DROPOUT}),
    "modules": ("gpt2", GPT2 | {"resid_pdrop": DROPOUT, "embd_pdrop": DROPOUT, "attn_pdrop": DROPOUT}),
    "functional, and layers left out": (
        "opt",
        {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": DROPOUT, "attention_dropout": DROPOUT, "layerdrop": 0.5},
    ),
    "BioGPT": ("biogpt", {"hidden_dropout_prob": DROPOUT, "layerdrop": 0.5, "activation_dropout": DROPOUT}),
    "XGLM": (
        "xglm",
        {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2, "dropout": DROPOUT, "layerdrop": 0.5},
    ),
    "of the hidden states, in the module": ("bloom", {"n_layer": 2, "n_head": 2, "hidden_dropout": DROPOUT}),
    "of the hidden states, in the configuration": ("falcon", {"hidden_dropout": DROPOUT, "attention_dropout": DROPOUT}),
    "Persimmon": ("persimmon", {"hidden_dropout": DROPOUT, "attention_dropout": DROPOUT}),
    "a router's jitter": ("mixtral", {"router_jitter_noise": DROPOUT, "num_local_experts": 4}),
    "a router that samples": (
        "phimoe",
        {"input_jitter_noise": DROPOUT, "router_jitter_noise": 0.01, "num_local_experts": 4},
    ),
}


def passes(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(3, 12)
    with torch.no_grad():
        return head_logps(model, ids, ids), head_logps(model, ids, ids)


@pytest.mark.parametrize("case", MODELS)
def test_two_passes_in_train_mode_are_one(case: str) -> None:
    kind, changes = MODELS[case]
    model = tiny(kind, **changes)
    expected, _ = passes(model)
    first, second = passes(model.train())
    assert (first - second).abs().max() > 1e-3  # it is noisy as it is
    without_noise(model)
    first, second = passes(model)
    assert torch.equal(first, second)
    assert torch.equal(first, expected)
    first, second = passes(model.eval().train())
    assert torch.equal(first, expected)


@pytest.mark.parametrize("case", MODELS)
def test_the_noise_is_back_after_the_block(case: str) -> None:
    kind, changes = MODELS[case]
    model = tiny(kind, **changes).train()
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    config = model.config
    with without_noise(model):
        first, second = passes(model)
        assert torch.equal(first, second)
    first, second = passes(model)
    assert (first - second).abs().max() > 1e-3
    assert rates == [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert model.config is config
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_saved_configuration_keeps_its_rates() -> None:
    model = tiny("falcon", hidden_dropout=DROPOUT, attention_dropout=DROPOUT)
    without_noise(model)
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (DROPOUT, DROPOUT)
    assert model.transformer.h[0].config.hidden_dropout == 0.0


def test_the_threshold_of_a_router_is_no_noise() -> None:
    model = tiny("phimoe", router_jitter_noise=0.3, num_local_experts=4)
    expected, _ = passes(model)
    without_noise(model)
    assert torch.equal(passes(model)[0], expected)


def test_modes_stay_for_gradient_checkpointing() -> None:
    model = tiny("llama", attention_dropout=DROPOUT).train()
    without_noise(model)
    assert all(module.training for module in model.modules())
