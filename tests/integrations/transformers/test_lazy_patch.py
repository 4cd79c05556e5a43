"""Where lazy logits begin and end: patches, copies, wrappers, and what is refused."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny_heads import adapted, grown, tiny, tokens
from torch import nn

from prefkern.integrations.transformers import RealLogitsWarning, lazy_logits, patch, unpatch, without_noise
from prefkern.integrations.transformers.lazy_tensor import LazyLogits

IDS = tokens()


def is_lazy(model: Any) -> bool:
    return isinstance(model(input_ids=IDS).logits, LazyLogits)


def clean(model: Any) -> bool:
    """Whether nothing of a patch is left in the model."""
    return not model._forward_pre_hooks and not any(
        "lazy" in name or name == "forward" for each in model.modules() for name in vars(each)
    )


def test_patch_holds_until_unpatch() -> None:
    model = tiny()
    patch(model)
    assert is_lazy(model)
    unpatch(model)
    assert not is_lazy(model)
    assert clean(model)
    unpatch(model)


def test_patching_twice_is_one_patch_that_ends_with_the_last() -> None:
    model = tiny()
    first, second = patch(model), lazy_logits(model)
    first.__exit__(None, None, None)
    assert is_lazy(model)
    first.__exit__(None, None, None)
    assert is_lazy(model)
    second.__exit__(None, None, None)
    assert not is_lazy(model)
    assert clean(model)


def test_an_old_patch_does_not_end_a_new_one() -> None:
    model = tiny()
    old = patch(model)
    unpatch(model)
    patch(model)
    old.__exit__(None, None, None)
    assert is_lazy(model)


def test_unpatching_within_a_block_ends_it() -> None:
    model = tiny()
    with lazy_logits(model):
        unpatch(model)
        assert not is_lazy(model)
    assert clean(model)


def test_two_models_at_once() -> None:
    policy, reference = tiny(), tiny(seed=1)
    with lazy_logits(policy, reference) as lazy:
        for model in (policy, reference):
            model(input_ids=IDS, labels=IDS)
    assert lazy.answered == 2
    assert clean(policy)
    assert clean(reference)


def test_nothing_is_replaced_where_one_of_the_models_is_refused() -> None:
    model = tiny()
    with pytest.raises(TypeError, match="model must be a causal language model"):
        patch(model, nn.Linear(2, 2))
    assert clean(model)
    with pytest.raises(TypeError, match="at least one model is needed"):
        patch()


def test_a_model_without_an_output_layer_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for kind in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        with pytest.raises(TypeError, match=r"prefkern.lazy_logits: model must be a causal language model"):
            patch(kind(config))


def test_a_quantised_head_is_refused() -> None:
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="leave it out of the quantisation"):
        patch(model)
    assert clean(model)


def test_a_head_that_is_not_of_the_form_is_refused() -> None:
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits.square()
            return output

    with pytest.raises(ValueError, match="must make its logits as softcap"):
        patch(Squared(tiny().config))


def test_a_copy_has_its_own_weight_and_its_own_patch() -> None:
    model = tiny()
    patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2.0)
    assert is_lazy(other)
    got = other(input_ids=IDS, labels=IDS).loss
    unpatch(model)
    assert is_lazy(other)
    unpatch(other)
    assert clean(other)
    torch.testing.assert_close(got, other(input_ids=IDS, labels=IDS).loss)


def test_the_states_of_a_patched_model_are_those_of_the_model() -> None:
    model = tiny()
    names = list(model.state_dict())
    with lazy_logits(model):
        assert list(model.state_dict()) == names
        file = io.BytesIO()
        torch.save(model.state_dict(), file)


def test_a_model_that_was_moved_or_cast_after_patch_goes_on() -> None:
    model = tiny()
    with lazy_logits(model) as lazy:
        model.double()
        loss = model(input_ids=IDS, labels=IDS).loss
        assert loss.dtype == torch.float32  # transformers makes it in float32
        model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
        assert model.lm_head.weight.grad.dtype == torch.float64
    assert lazy.made_real == 0


def test_a_head_that_was_replaced_after_patch_is_refused_until_the_patch_is_renewed() -> None:
    model = tiny()
    patch(model)
    model.resize_token_embeddings(52)
    with pytest.raises(
        ValueError, match=r"output layer of LlamaForCausalLM was replaced after patch\(model\).*call unpatch"
    ):
        model(input_ids=IDS)
    unpatch(model)
    assert clean(model)
    patch(model)
    assert is_lazy(model)


def test_a_forward_that_somebody_wraps_after_patch_is_left_alone() -> None:
    model = tiny()
    expected = model(input_ids=IDS).logits
    lazy = patch(model)
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: inner(x)
    assert is_lazy(model)
    lazy.__exit__(None, None, None)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    patch(model)
    assert is_lazy(model)
    unpatch(model)
    assert not is_lazy(model)


def test_a_forward_that_was_there_before_is_called_for_real_logits_and_given_back() -> None:
    model, calls = tiny(), []
    own = model.lm_head.forward

    def forward(x: Any) -> Any:
        calls.append(1)
        return own(x)

    model.lm_head.forward = forward
    with lazy_logits(model, check=False), pytest.warns(RealLogitsWarning):  # noqa: PT031
        before = len(calls)
        model(input_ids=IDS).logits.sort(-1)
        assert len(calls) == before + 1
    assert model.lm_head.forward is forward


def test_the_next_token_of_generate_is_made_without_a_word() -> None:
    model = tiny()
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with lazy_logits(model) as lazy, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
    assert lazy.made_real == 0


def test_logits_whose_weight_was_stepped_on_are_refused() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lazy_logits(model):
        kept = model(input_ids=IDS).logits
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        with pytest.raises(ValueError, match=r"changed in place after these logits were made \(an optimizer step"):
            kept.logsumexp(-1)


def test_one_warning_for_each_line() -> None:
    model = tiny()
    with lazy_logits(model) as lazy, pytest.warns(RealLogitsWarning) as told:  # noqa: PT031
        for _ in range(3):
            model(input_ids=IDS).logits.sort(-1)
        model(input_ids=IDS).logits.sort(-1)
    assert lazy.made_real == 4
    assert len(told) == 2
    assert [each.filename for each in told] == [__file__] * 2


def test_the_gradient_of_the_logits_is_for_whoever_hooks_on_to_them() -> None:
    model, seen = tiny(), []
    with lazy_logits(model), pytest.warns(RealLogitsWarning, match="register_hook"):  # noqa: PT031
        logits = model(input_ids=IDS).logits
        logits.register_hook(seen.append)
        logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(seen[0], logits.softmax(-1))


# -------------------------------------------------------------------------------------------------------------- peft


def test_a_lora_with_dropout_on_the_head_is_refused_in_train_mode() -> None:
    model = adapted(tiny(), target_modules=["lm_head"], lora_dropout=0.1)
    with lazy_logits(model):
        model.eval()
        assert is_lazy(model)
        model.train()
        with pytest.raises(ValueError, match=r"no dropout in train mode.*lora_dropout=0.1: call without_noise"):
            model(input_ids=IDS)
        with without_noise(model):
            assert is_lazy(model)


def test_an_adapter_may_be_switched_off_for_the_reference() -> None:
    model = adapted(tiny(), target_modules=["lm_head", "q_proj"])
    with model.disable_adapter():
        expected = model(input_ids=IDS, labels=IDS).loss
    with lazy_logits(model) as lazy, model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)
    assert lazy.made_real == 0


def test_an_adapter_that_wraps_a_patched_head_makes_real_logits_and_says_so() -> None:
    model = grown(tiny())
    patch(model)
    wrapped = adapted(model, target_modules=["lm_head"])
    with pytest.warns(RealLogitsWarning, match="needs the logits themselves"):
        got = wrapped(input_ids=IDS, labels=IDS).loss
    unpatch(wrapped)
    torch.testing.assert_close(got, wrapped(input_ids=IDS, labels=IDS).loss)


# ----------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_has_real_logits_and_says_how_to_keep_them_lazy() -> None:
    model = tiny()
    expected = model(input_ids=IDS, labels=IDS).loss
    compiled = torch.compile(model, backend="eager")
    with lazy_logits(model) as lazy, pytest.warns(RealLogitsWarning, match="compile the trunk alone"):
        torch.testing.assert_close(compiled(input_ids=IDS, labels=IDS).loss, expected)
    torch._dynamo.reset()
    model.model = torch.compile(model.model, backend="eager")
    with lazy_logits(model) as lazy:
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)
    assert (lazy.made_real, lazy.answered) == (0, 1)
    torch._dynamo.reset()
