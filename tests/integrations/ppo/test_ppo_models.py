"""Models of every kind: their own log-probabilities, a ratio of exactly 1 where nothing was learned, or a refusal."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_ppo
import torch
import transformers
from tiny_heads import GPT2, configuration, grown, tiny, tokens
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Qwen2ForCausalLM

from prefkern.integrations.ppo import PPOConfig, PPOTrainer

NOISE = 0.3
_ENCODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_BART = _ENCODER | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_GEMMA = {"head_dim": 8, "lru_width": 16, "num_hidden_layers": 3}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "a cap under another name": ("recurrent_gemma", _GEMMA | {"logits_soft_cap": 2.5}),
    "a layer before the matrix": ("modernbert-decoder", {}),
    "a layer before the matrix, of BERT": ("bert", {"is_decoder": True}),
    "a scale that no code applies": ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "logit_scale": 0.25}),
    "a bias": ("gptj", GPT2 | {"rotary_dim": 4}),
}
NOISY: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": NOISE, "attention_dropout": NOISE}),
    "OPT, layers left out": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0, "layerdrop": 0.5}),
    "BioGPT": ("biogpt", {"hidden_dropout_prob": NOISE, "layerdrop": 0.5, "activation_dropout": NOISE}),
    "XGLM": ("xglm", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2, "layerdrop": 0.5}),
    "Bloom": ("bloom", {"n_layer": 2, "n_head": 2, "hidden_dropout": NOISE}),
    "Falcon": ("falcon", {"hidden_dropout": NOISE, "attention_dropout": NOISE}),
    "Persimmon": ("persimmon", {"hidden_dropout": NOISE, "attention_dropout": NOISE}),
    "Mixtral, a router's jitter": ("mixtral", {"router_jitter_noise": NOISE, "num_local_experts": 4}),
    "PhiMoE, a router that samples": ("phimoe", {"input_jitter_noise": NOISE, "num_local_experts": 4}),
    "GPT-2": ("gpt2", GPT2 | {"resid_pdrop": NOISE, "embd_pdrop": NOISE, "attn_pdrop": NOISE}),
}


def own_logps(model: Any, queries: list[Tensor], responses: list[Tensor], temperature: float) -> Tensor:
    """Row by row, without padding, of the model's own logits, in float64."""
    rows = []
    for query, response in zip(queries, responses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1].double()
        rows.append((logits / temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0])
    return torch.cat(rows)


def unlearned(model: Any, **options: Any) -> tuple[PPOTrainer, dict[str, float]]:
    """A step that changes nothing, in train mode, three times over the rollout."""
    args = PPOConfig(learning_rate=0.0, num_ppo_epochs=3, temperature=0.7, disable_tqdm=True, **options)
    trainer = PPOTrainer(model, None, None, args)
    return trainer, trainer.step(*tiny_ppo.episodes())


@pytest.mark.parametrize("case", [*HEADS, *NOISY])
def test_log_probabilities_are_the_models_own_and_the_ratio_is_one(case: str) -> None:
    kind, changes = (HEADS | NOISY)[case]
    model = tiny(kind, **changes)
    queries, responses, _ = tiny_ppo.episodes()
    expected = own_logps(model, queries, responses, 0.7)
    if case in NOISY:
        ids = tokens(3, 12)
        with torch.no_grad():
            first, second = (model.train()(input_ids=ids).logits for _ in range(2))
        assert (first - second).abs().max() > 1e-3  # it is noisy as it is
        model.eval()
    trainer, stats = unlearned(model)
    assert trainer.model.training
    # float32 logits of the model itself are as far from float64, and padding sums in another order
    torch.testing.assert_close(trainer.last_rollout.logps.double(), expected, rtol=0, atol=1e-5)
    assert (stats["val/ratio"], stats["val/ratio_var"], stats["policy/approxkl_avg"]) == (1.0, 0.0, 0.0)
    assert stats["objective/kl"] == 0.0  # of the frozen copy


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "bench")
    return importlib.import_module("small_models").build


def test_a_divisor_and_a_padded_vocabulary(build: Any) -> None:
    queries, responses, rewards = tiny_ppo.episodes()
    for kind in ("inkling_text", "inkling2_text"):
        model = build(kind)
        expected = own_logps(model, queries, responses, 0.7)
        trainer, _ = unlearned(model)
        torch.testing.assert_close(trainer.last_rollout.logps.double(), expected, rtol=0, atol=1e-5)
    assert len(model.get_output_embeddings().weight) == 96
    responses[2][0] = 90  # there is a row in the matrix, but no logit
    with pytest.raises(ValueError, match=r"responses\[2\] must hold ids in \[0, 90\), the model's vocabulary, got 90"):
        trainer.step(queries, responses, rewards)


@pytest.mark.slow
def test_every_architecture_is_right_or_refused(build: Any) -> None:
    kinds = importlib.import_module("architectures").kinds()
    queries, responses, _ = tiny_ppo.episodes()
    right, refused, wrong = [], [], []
    for kind in kinds:
        try:
            model = build(kind)
            expected = own_logps(model, queries, responses, 0.7)
        except Exception:  # not of the shapes that the rules make
            continue
        try:
            trainer, stats = unlearned(model)
        except (TypeError, ValueError):
            refused.append(kind)
            continue
        apart = float((trainer.last_rollout.logps.double() - expected).abs().max())
        # an attention mask with a gradient takes another path through torch (Doge): a rounding, and no noise
        ratio = abs(stats["val/ratio"] - 1.0) <= 2**-23 and stats["policy/approxkl_avg"] < 1e-12
        (right if apart < 5e-5 and ratio else wrong).append((kind, apart, stats["val/ratio"]))
    assert wrong == []
    assert set(refused) <= {"cpmant", "prophetnet", "xlm", "xlnet"}
    assert len(right) >= 0.9 * len(kinds)


class Wavy(Qwen2ForCausalLM):
    """Logits that are more than a scale and a cap."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits + output.logits.sin()
        return output


class Masked(Qwen2ForCausalLM):
    """Token 7 is never said."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        masked = torch.arange(output.logits.shape[-1]) == 7
        output.logits = output.logits.masked_fill(masked, torch.finfo(output.logits.dtype).min)
        return output


def test_a_head_of_no_known_form_is_refused() -> None:
    sentence = "prefkern.PPOTrainer: Wavy must make its logits as softcap"
    for models in ((Wavy(configuration("qwen2")), None), (tiny("qwen2"), Wavy(configuration("qwen2")))):
        with pytest.raises(ValueError, match=sentence):
            PPOTrainer(*models)


def test_a_token_that_the_model_masks_is_refused_in_a_response() -> None:
    torch.manual_seed(0)
    trainer, stats = unlearned(grown(Masked(configuration("qwen2"))))
    assert stats["val/ratio"] == 1.0
    queries, responses, rewards = tiny_ppo.episodes()
    responses[1][1] = 7
    with pytest.raises(
        ValueError, match=r"responses\[1\] must hold ids that the model can say, got 7, whose logit it masks"
    ):
        trainer.step(queries, responses, rewards)
    responses[1][1], queries[1][1] = 8, 7
    trainer.step(queries, responses, rewards)


class WithValueHead(torch.nn.Module):
    """As TRL wrapped a model before 0.12."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = tiny(), torch.nn.Linear(16, 1)


REFUSED = {
    "an encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(configuration("bart", **_BART)),
        "BartForConditionalGeneration, an encoder-decoder",
    ),
    "a masked language model": (lambda: transformers.BertForMaskedLM(configuration("bert")), "got BertForMaskedLM"),
    "an encoder with a causal name": (
        lambda: transformers.BertLMHeadModel(configuration("bert")).eval(),
        "must be causal, got BertLMHeadModel, whose logits of a token change",
    ),
    "a classifier": (
        lambda: transformers.LlamaForSequenceClassification(configuration("llama")),
        "got LlamaForSequenceClassification, which has no output layer for next-token logits",
    ),
    "a trunk": (lambda: transformers.LlamaModel(configuration("llama")), "got LlamaModel"),
    "a model with a value head": (
        WithValueHead,
        "got WithValueHead: pass its pretrained_model; the trainer adds a value head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_causal_language_model_is_refused_by_name(case: str) -> None:
    make, sentence = REFUSED[case]
    for name, models in (("model", (make(), None)), ("ref_model", (tiny(), make()))):
        with pytest.raises(TypeError, match=sentence) as refused:
            PPOTrainer(*models)
        assert str(refused.value).startswith(f"prefkern.PPOTrainer: {name} must")
        assert "target_modules" not in str(refused.value)


def _classifier(kind: str, **changes: Any) -> Any:
    return AutoModelForSequenceClassification.from_config(configuration(kind, num_labels=1, **changes)).eval()


def test_a_value_model_that_sees_what_comes_is_refused() -> None:
    for kind, changes, sentence in (
        ("bart", _BART, "must be a causal decoder, got BartForSequenceClassification, an encoder-decoder"),
        (
            "bert",
            {},
            "got BertForSequenceClassification, whose hidden states of a token change by .* when the token after",
        ),
    ):
        with pytest.raises(TypeError, match=f"prefkern.PPOTrainer: value_model .*{sentence}"):
            PPOTrainer(tiny(), value_model=_classifier(kind, **changes))


def test_a_value_model_has_no_noise_either() -> None:
    opt = _classifier("opt", ffn_dim=24, word_embed_proj_dim=16, dropout=NOISE)
    trainer = PPOTrainer(tiny(), None, None, PPOConfig(learning_rate=0.0, disable_tqdm=True), value_model=opt)
    trainer.step(*tiny_ppo.episodes())
    batch = trainer.last_rollout.batch(np.arange(5), 0, "cpu")
    first, second = (trainer.model.train()(batch, temperature=1.0).values for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["bart", "opt", "llama"])
def test_responses_to_padded_queries_are_those_to_each_alone(kind: str) -> None:
    """Also of a model that counts padding on the left as tokens."""
    changes = {"bart": _BART, "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16}, "llama": {}}[kind]
    model = tiny(kind, **changes)
    args = PPOConfig(response_length=6, kl_coef=0.0, disable_tqdm=True)
    trainer = PPOTrainer(model, None, None, args)
    queries = [row[: 2 + i % 4] for i, row in enumerate(tokens(7, 6))]
    for query, response in zip(queries, trainer.generate(queries, do_sample=False), strict=True):
        row = torch.cat([query, response])
        with torch.no_grad():
            best = model(input_ids=row[None]).logits[0, len(query) - 1 : -1].argmax(-1)
        assert torch.equal(best, response)
    if kind == "bart":
        trainer.sharded = True  # as many calls on every process
        with pytest.raises(ValueError, match="queries must be of one length where FSDP2 shards a model"):
            trainer.generate(queries)
