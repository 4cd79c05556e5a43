"""The head of a model as arguments of the functions on hidden states, against the model's own logits."""

import copy
import doctest
import gc
import importlib
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from tiny_heads import GPT2, V, configuration, grown, head_logps, own_logps, tiny, tokens
from torch import Tensor, nn

import prefkern as pk
from prefkern.integrations.transformers import head_of, known, last_hidden

HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a matrix": ("llama", {}, {}),
    "tied": ("gpt2", GPT2, {}),
    "functional dropout": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, {}),
    "a bias": ("phi", {}, {"bias": True}),
    "a cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}, {"softcap": 3.0}),
    "a cap under another name": (
        "recurrent_gemma",
        {"logits_soft_cap": 2.5, "head_dim": 8, "lru_width": 16, "num_hidden_layers": 3},
        {"softcap": 2.5},
    ),
    "a factor": ("cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "a divisor": ("granite", {"logits_scaling": 3.0}, {"logit_scale": 1 / 3}),
    "a divisor before the matrix": (
        "minicpm3",
        {
            "dim_model_base": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        {"logit_scale": 0.25},
    ),
    "the same name as a factor": ("hyperclovax", {"logits_scaling": 3.0}, {"logit_scale": 3.0}),
    "a scale that no code applies": ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "logit_scale": 0.25}, {}),
    "a layer before the matrix": ("modernbert-decoder", {}, {"bias": True}),
    "a layer before the matrix, of BERT": ("bert", {"is_decoder": True}, {"bias": True}),
}


@pytest.mark.parametrize("case", HEADS)
def test_gives_the_log_probabilities_of_the_models_own_logits(case: str) -> None:
    kind, changes, options = HEADS[case]
    model, ids = tiny(kind, **changes), tokens()
    targets = tokens(seed=2)
    head: Any = head_of(model)
    assert {
        name: True if isinstance(value, Tensor) else value for name, value in head.items() if name != "weight"
    } == options
    assert head["weight"] is model.get_output_embeddings().weight
    torch.testing.assert_close(
        head_logps(model, ids, targets).double(), own_logps(model, ids, targets), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("case", ["a matrix", "a cap", "a divisor before the matrix", "a layer before the matrix"])
def test_gives_the_gradients_of_the_models_own_logits(case: str) -> None:
    kind, changes, _ = HEADS[case]
    ids, targets = tokens(), tokens(seed=2)
    ours, theirs = tiny(kind, torch.float64, **changes), tiny(kind, torch.float64, **changes)
    head_logps(ours, ids, targets).sum().backward()
    own_logps(theirs, ids, targets).sum().backward()
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, expected.grad, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_splats_into_a_linear_loss() -> None:
    model, ids = tiny("gemma2", head_dim=8, final_logit_softcapping=3.0), tokens(4)
    targets = pk.shift_labels(ids)
    ref = torch.zeros(2 * 2)
    got = pk.linear_dpo_loss(last_hidden(model, ids), targets=targets, ref_logps=ref, beta=0.1, **head_of(model)).loss
    sums = own_logps(model, ids, targets.clamp(min=0)).masked_fill(targets == -100, 0).sum(-1)
    expected = -torch.nn.functional.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_a_bias_beside_a_divisor_before_the_matrix() -> None:
    kind, changes, _ = HEADS["a divisor before the matrix"]
    model, ids = tiny(kind, **changes), tokens()
    model.lm_head = grown(nn.Linear(16, V))
    assert head_of(model)["logit_scale"] == 0.25
    torch.testing.assert_close(head_logps(model, ids, ids).double(), own_logps(model, ids, ids), rtol=0, atol=2e-6)
    h = model.model(input_ids=ids).last_hidden_state  # what else one might take for the hidden states
    torch.testing.assert_close(last_hidden(model, ids), h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "case", ["a cap", "a factor", "a divisor", "a divisor before the matrix", "a layer before the matrix"]
)
def test_constants_are_exact_in_every_dtype(case: str, dtype: torch.dtype) -> None:
    kind, changes, options = HEADS[case]
    head: Any = head_of(tiny(kind, dtype, **changes))
    assert {name: value for name, value in head.items() if not isinstance(value, Tensor)} == {
        name: value for name, value in options.items() if name != "bias"
    }


def test_cuts_a_padded_vocabulary_off() -> None:
    class Padded(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits[..., : V - 5]
            return output

    model = grown(Padded(configuration("llama")))
    head = head_of(model)
    assert head["weight"].shape == (V - 5, 16)
    ids = tokens()
    torch.testing.assert_close(head_logps(model, ids, ids).double(), own_logps(model, ids, ids), rtol=0, atol=2e-6)
    head_logps(model, ids, ids).sum().backward()
    assert model.lm_head.weight.grad[V - 5 :].abs().max() == 0.0


def test_masks_tokens_whose_logits_are_masked() -> None:
    class Masked(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits.clone()
            output.logits[..., 10:20] = -torch.inf
            return output

    model, ids = grown(Masked(configuration("llama"))), tokens() % 10
    assert head_of(model)["vocab_mask"].logical_not().nonzero()[:, 0].tolist() == list(range(10, 20))
    torch.testing.assert_close(head_logps(model, ids, ids).double(), own_logps(model, ids, ids), rtol=0, atol=2e-6)


def test_a_reference_names_its_scale_and_cap_always() -> None:
    head = head_of(tiny(), reference=True)
    assert (head["ref_logit_scale"], head["ref_softcap"], "ref_bias" in head) == (1.0, float("inf"), False)
    policy, reference = tiny("cohere", logit_scale=0.25), tiny("phi", seed=1)
    ids = tokens(4)
    targets = pk.shift_labels(ids)
    given = pk.linear_token_logprobs(last_hidden(reference, ids), targets=targets, **head_of(reference)).logps
    hidden, head = last_hidden(policy, ids), head_of(policy)
    expected = pk.linear_dpo_loss(
        hidden, targets=targets, ref_logps=pk.sequence_logps(given, targets=targets), **head
    ).loss
    got = pk.linear_dpo_loss(
        hidden, targets=targets, ref_hidden=last_hidden(reference, ids), **head, **head_of(reference, reference=True)
    ).loss
    torch.testing.assert_close(got, expected)


def test_costs_a_forward_at_first_sight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    head_of(model)
    assert calls
    calls.clear()
    head_of(model)
    copy.copy(head_of(model, check=False))
    assert not calls


def test_sees_a_configuration_that_is_edited_later() -> None:
    model = tiny("gemma2", head_dim=8, final_logit_softcapping=3.0)
    assert head_of(model)["softcap"] == 3.0
    model.config.final_logit_softcapping = 5.0
    assert head_of(model)["softcap"] == 5.0
    model.config.final_logit_softcapping = None
    assert "softcap" not in head_of(model)


def test_sees_a_vocabulary_that_is_resized() -> None:
    model = tiny()
    head_of(model)
    model.resize_token_embeddings(V + 8)
    assert head_of(model)["weight"].shape == (V + 8, 16)


def test_forgets_a_model_that_is_gone() -> None:
    model = tiny()
    head_of(model)
    seen = weakref.ref(model)
    assert known.known(model).checked
    del model
    gc.collect()
    assert seen() is None


def test_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = tiny("opt", ffn_dim=24, word_embed_proj_dim=16).train()
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    children = [list(module._modules.items()) for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    head_of(model)
    last_hidden(model, tokens(), torch.ones(2, 7, dtype=torch.long))
    assert modes == [module.training for module in model.modules()]
    assert children == [list(module._modules.items()) for module in model.modules()]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    pickle.dumps(model.state_dict())


def test_leaves_the_random_numbers_of_a_model_that_draws_some() -> None:
    model = _changed(lambda _, z, ids: z + 0 * torch.rand(()))
    before = torch.get_rng_state()
    head_of(model)
    assert torch.equal(before, torch.get_rng_state())


def test_takes_a_model_in_its_wrappers() -> None:
    model = tiny("cohere", logit_scale=0.25)
    assert head_of(torch.compile(model))["weight"] is model.lm_head.weight
    assert last_hidden(torch.compile(model), tokens()).shape == (2, 7, 16)


def test_comparisons_are_not_made_under_autocast() -> None:
    model, ids = tiny("gpt2", **GPT2), tokens()
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with torch.autocast("cpu", torch.bfloat16):
        head_of(model)
        hidden = last_hidden(model, ids, mask)
    assert known.known(model).positions == "mask"
    assert hidden.isfinite().all()


def test_meta_weights_need_check_false() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            configuration("gemma2", head_dim=8, final_logit_softcapping=3.0)
        )
    with pytest.raises(ValueError, match="sharded or on meta, so that its logits cannot be compared: call head_of"):
        head_of(model)
    head = head_of(model, check=False)
    assert (head["weight"].is_meta, head["softcap"]) == (True, 3.0)


def _changed(change: Any) -> Any:
    class Changed(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **options: Any) -> Any:
            output = super().forward(input_ids=input_ids, **options)
            output.logits = change(self, output.logits, input_ids)
            return output

    return grown(Changed(configuration("llama")))


def test_refuses_what_is_not_of_the_form() -> None:
    offset = torch.linspace(0, 1, V)
    for change, message in (
        (lambda _, z, ids: z.clamp(-2, 2), "is not a scale and a tanh cap .nearest: scale 1, cap 2.0"),
        (lambda _, z, ids: z + offset, "something is added to the products behind the matrix"),
        (lambda _, z, ids: z[:, -1], r"it makes logits of torch.Size\(\[1, 48\]\)"),
        (lambda _, z, ids: z.log_softmax(-1) * 2, "something is added"),
    ):
        with pytest.raises(ValueError, match=message):
            head_of(_changed(change))


def test_refuses_logits_that_depend_on_more_with_the_largest_difference() -> None:
    model = _changed(
        lambda self, z, ids: z + self.model.embed_tokens.weight[ids].sum(-1, keepdim=True) * z.new_ones(V).cumsum(0)
    )
    with pytest.raises(ValueError, match=r"something is added|differ from its own by up to [0-9.]+ .scale 1, cap None"):
        head_of(model)
    model = _changed(lambda self, z, ids: z + torch.rand(()) * (ids.max() > 0) * torch.linspace(0, 1, V))
    with pytest.raises(ValueError, match=r"differ from its own by up to 0\.[0-9]+ .* two passes over the same tokens"):
        head_of(model)


def test_refuses_an_output_layer_that_does_more() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    model = tiny()
    layer = Twice(16, V, bias=False)
    layer.weight = model.lm_head.weight
    model.lm_head = layer
    with pytest.raises(ValueError, match=r"but Twice does more: its products differ by up to [0-9.]+"):
        head_of(model)


def test_refuses_what_is_no_causal_language_model_by_name() -> None:
    bart = transformers.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    for model, message in (
        (transformers.BartForConditionalGeneration(bart), "got BartForConditionalGeneration, an encoder-decoder"),
        (
            transformers.BertForMaskedLM(configuration("bert")),
            "got BertForMaskedLM, which has no output layer for next-token",
        ),
        (
            transformers.LlamaForSequenceClassification(configuration("llama")),
            "got LlamaForSequenceClassification, which",
        ),
        (tiny().model, "got LlamaModel, which has no output layer"),
        (nn.Linear(2, 2), "got Linear"),
        ("gpt2", "got str"),
    ):
        for function in (head_of, lambda model: last_hidden(model, tokens())):
            with pytest.raises(TypeError, match=message):
                function(model)
    with pytest.raises(
        TypeError, match=r"model must be causal, got BertLMHeadModel, whose logits of a token change by [0-9.]+"
    ):
        head_of(tiny("bert"))


def test_refuses_quantised_weights() -> None:
    model = tiny()
    model.lm_head.weight = nn.Parameter(torch.zeros(V, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"got Parameter of torch\.int8: leave it out of the quantisation"):
        head_of(model)
    model = tiny()
    model.lm_head = nn.Module()
    with pytest.raises(ValueError, match=r"must be one matrix \[V, H\] with a weight, got Module"):
        head_of(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["head", "hidden", "noise"])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"prefkern.integrations.transformers.{name}")
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 2) == (0, True)
