"""Adapters of peft: in the trunk, on the output layer, in its place; switched off, merged, several at once."""

from typing import Any

import pytest
import torch
from tiny_heads import GPT2, adapted, head_logps, in_peft, own_logps, tiny, tokens
from torch import Tensor

import prefkern as pk
from prefkern.integrations.transformers import head_of, last_hidden, without_noise

peft = pytest.importorskip("peft")

ADAPTERS: dict[str, dict[str, Any]] = {
    "in the trunk": {},
    "on the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "rank stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "in the place of the output layer": {"modules_to_save": ["lm_head"]},
    "of another kind in the trunk": {"use_dora": True},
}


def close(model: Any) -> None:
    ids, targets = tokens(), tokens(seed=2)
    torch.testing.assert_close(
        head_logps(model, ids, targets).double(), own_logps(model, ids, targets), rtol=0, atol=2e-6
    )


def moved(model: Any) -> Any:
    """What modules_to_save copies begins as the original: moved away from it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("place", ADAPTERS)
def test_an_adapter_counts_wherever_it_is(place: str) -> None:
    model = moved(adapted(tiny(), **ADAPTERS[place]))
    close(model)
    with model.disable_adapter():
        close(model)
        assert "lora" not in head_of(model)
    close(model)
    assert ("lora" in head_of(model)) == ("lm_head" in ADAPTERS[place].get("target_modules", []))
    if place == "with a bias":
        return  # peft merges a bias into a layer with a bias only
    if place != "in the place of the output layer":
        model.merge_adapter()
        assert "lora" not in head_of(model)
        close(model)
        model.unmerge_adapter()
        close(model)
    close(model.merge_and_unload())


@pytest.mark.parametrize(
    "place", ["in the trunk", "on the output layer", "with a bias", "in the place of the output layer"]
)
def test_gradients_reach_the_adapter(place: str) -> None:
    ids, targets = tokens(), tokens(seed=2)
    both = []
    for logps in (head_logps, own_logps):
        torch.manual_seed(0)
        model = moved(adapted(tiny("llama", torch.float64), **ADAPTERS[place]).double())
        logps(model, ids, targets).sum().backward()
        both.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    assert both[0]
    for name, grad in both[0].items():
        torch.testing.assert_close(
            grad, both[1][name], rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_adapters_at_once_are_one_of_the_summed_rank() -> None:
    model = adapted(tiny(), target_modules=["lm_head"])
    torch.manual_seed(5)
    model.add_adapter("second", peft.LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=9, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    assert head_of(model)["lora"][0].shape == (6, 16)
    close(model)
    model.set_adapter("second")
    assert head_of(model)["lora"][0].shape == (2, 16)
    close(model)


def test_an_adapter_on_a_head_with_a_cap_or_a_scale() -> None:
    for kind, changes in (
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 3.0}),
    ):
        close(adapted(tiny(kind, tie_word_embeddings=False, **changes), target_modules=["lm_head"]))


def test_tied_embeddings_under_an_adapter() -> None:
    close(adapted(tiny("gpt2", **GPT2), target_modules=["c_attn"], fan_in_fan_out=True))


def test_hidden_states_are_those_of_the_adapted_trunk() -> None:
    model, ids = adapted(tiny()), tokens()
    got = last_hidden(model, ids)
    torch.testing.assert_close(got, model.get_base_model().model(input_ids=ids).last_hidden_state)
    with model.disable_adapter():
        assert not torch.allclose(got, last_hidden(model, ids))


def test_dropout_on_the_output_layer_is_refused_in_train_mode() -> None:
    model = adapted(tiny(), target_modules=["lm_head"], lora_dropout=0.1)
    head_of(model)
    with pytest.raises(
        ValueError, match=r"must have no dropout in train mode, .* got lora_dropout=0\.1: call without_noise"
    ):
        head_of(model.train())
    with without_noise(model):
        ids: Tensor = tokens()
        torch.testing.assert_close(head_logps(model, ids, ids).double(), own_logps(model, ids, ids), rtol=0, atol=2e-6)


def test_adapters_that_are_not_lora_are_refused() -> None:
    for config, message in (
        (
            peft.LoraConfig(target_modules=["lm_head"], use_dora=True),
            "must be plain LoRA, got DoraLinearVariant: merge it first",
        ),
        (
            peft.LoHaConfig(target_modules=["lm_head"]),
            "must be LoRA, got .*: leave the output layer out of the adapter's targets",
        ),
    ):
        model = in_peft(tiny(), config)
        with pytest.raises(ValueError, match=message):
            head_of(model)


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = in_peft(tiny(), config)
    for function in (head_of, lambda model: last_hidden(model, tokens())):
        with pytest.raises(ValueError, match="must not have a prompt-learning adapter, whose virtual tokens"):
            function(model)


def test_a_reference_with_an_adapter_on_its_head_is_refused() -> None:
    with pytest.raises(
        ValueError, match="a reference model must not have an adapter on its output layer: pass ref_logps"
    ):
        head_of(adapted(tiny(), target_modules=["lm_head"]), reference=True)


def test_policy_and_reference_of_one_model_in_a_loss() -> None:
    model, ids = adapted(tiny(), target_modules=["q_proj", "lm_head"]), tokens(4)
    targets = pk.shift_labels(ids)

    def sums(logps: Tensor) -> Tensor:
        return pk.sequence_logps(logps, targets=targets)

    with torch.no_grad(), model.disable_adapter():
        hidden = last_hidden(model, ids)
        ref = sums(pk.linear_token_logprobs(hidden, targets=targets, **head_of(model)).logps)
        expected_ref = own_logps(model, ids, targets.clamp(min=0)).masked_fill(targets == -100, 0).sum(-1)
    torch.testing.assert_close(ref.double(), expected_ref, rtol=1e-6, atol=1e-6)
    loss = pk.linear_dpo_loss(last_hidden(model, ids), targets=targets, ref_logps=ref, beta=0.5, **head_of(model)).loss
    own = own_logps(model, ids, targets.clamp(min=0)).masked_fill(targets == -100, 0).sum(-1) - expected_ref
    expected = -torch.nn.functional.logsigmoid(0.5 * (own[:2] - own[2:])).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
