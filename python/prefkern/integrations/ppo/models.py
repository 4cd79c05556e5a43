"""The policy with its value function, in one module, and the reference.

The head is called inside this module's forward, where DDP counts the gradients and FSDP2 has gathered the parameters;
logits over the vocabulary are never made. A value head on the policy's own trunk costs no second pass.
"""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefkern import check
from prefkern.head.logprobs import linear_token_logprobs
from prefkern.integrations.ppo.config import PPOConfig
from prefkern.losses.reduce import widen

WHERE = "PPOTrainer"


class Batch(NamedTuple):
    """Episodes padded on the right to ``[b, T]``, and their n cells: for each token of a response the position that
    predicts it, counted over the flattened ``[b T]``, and the token itself (-100 where it is not scored)."""

    input_ids: Tensor
    attention_mask: Tensor
    cells: Tensor
    targets: Tensor
    num_scored: int


class Scores(NamedTuple):
    """Of each cell ``[n]``; None where it was not asked for."""

    logps: Tensor
    entropy: Tensor | None
    values: Tensor | None


class ActorCritic(nn.Module):
    """``policy`` with a value function on its trunk, on that of ``value_model``, or (``critic=False``) none."""

    def __init__(self, policy: Any, value_model: Any = None, *, critic: bool = True) -> None:
        super().__init__()
        self.policy = policy
        self.value_trunk: Any = None
        self.value_head: Any = None
        if not critic:
            return
        width = policy.get_output_embeddings().weight.shape[1]
        if value_model is not None:
            self.value_trunk = _plain(value_model).base_model
            self.value_head = getattr(_plain(value_model), "score", None)
            width = text_config(value_model).hidden_size
        if self.value_head is None:
            dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
            self.value_head = nn.Linear(width, 1, dtype=dtype, device=policy.device)
            nn.init.zeros_(self.value_head.weight)  # the first advantages are the rewards
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        batch: Batch,
        *,
        temperature: float,
        values: bool = True,
        entropy: bool = False,
        entropy_grad: bool = False,
        max_memory: int | None = None,
        adapter: bool = True,
    ) -> Scores:
        """``adapter=False``: the reference of a peft model, which is the same weights with the adapter switched off."""
        with contextlib.nullcontext() if adapter else self.policy.disable_adapter():
            hidden = self._hidden(_plain(self.policy).base_model, batch)
        head = self.policy.get_output_embeddings()
        stats = linear_token_logprobs(
            hidden,
            head.weight,
            batch.targets,
            bias=head.bias,
            temperature=temperature,
            outputs=("logps", "entropy") if entropy else ("logps",),
            entropy_grad=entropy_grad,
            max_memory=max_memory,
            num_scored=batch.num_scored,
            **head_options(text_config(self.policy)),
        )
        value = None
        if values:
            if self.value_trunk is not None:
                hidden = self._hidden(self.value_trunk, batch)
            with torch.autocast(hidden.device.type, enabled=False):
                value = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
            value = widen(value).clone()
        # clones, as FSDP2 warns of views; they have one number for each cell
        return Scores(stats.logps.clone(), None if stats.entropy is None else stats.entropy.clone(), value)

    def generate(self, **options: Any) -> Any:
        return self.policy.generate(**options)

    @staticmethod
    def _hidden(trunk: Any, batch: Batch) -> Tensor:
        """The last hidden states of the cells, ``[n, H]``."""
        output = trunk(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.cells)


def head_options(config: Any) -> dict[str, Any]:
    """How the model makes logits of the product, from the names that configurations have for it."""
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return {
        "logit_scale": 1.0 if scale is None else float(scale),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def text_config(model: Any) -> Any:
    return _plain(model).config.get_text_config()


def prepare_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model; then its ``generate`` gathers parameters as its forward does."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    fsdp = importlib.import_module("torch.distributed.fsdp")
    if not isinstance(model, fsdp.FSDPModule):
        return False
    fsdp.register_fsdp_forward_method(model, "generate")
    return True


def _plain(model: Any) -> Any:
    """The transformers model inside a peft one."""
    return model.get_base_model() if is_peft(model) else model


def check_policy(name: str, model: Any) -> None:
    """A causal language model of transformers, with an ordinary head."""
    if not hasattr(model, "get_output_embeddings") or getattr(_plain(model), "base_model", None) in (
        None,
        _plain(model),
    ):
        check.fail_type(
            WHERE, f"{name} must be a causal language model of transformers (or peft), got {type(model).__name__}"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or hasattr(head, "lora_A"):
        check.fail(
            WHERE,
            f"{name} must have a plain linear output layer, got {type(head).__name__}: leave it out of the adapter's "
            "target_modules and modules_to_save, or merge the adapter first",
        )
    if is_peft(model) and model.active_peft_config.is_prompt_learning:
        check.fail(WHERE, f"{name} must not have a prompt-learning adapter, whose virtual tokens shift every position")


def check_reference(model: Any, ref_model: Any) -> None:
    check_policy("ref_model", ref_model)
    if ref_model is model:
        check.fail(WHERE, "ref_model must be another object than model (None makes a frozen copy)")
    vocabularies = [each.get_output_embeddings().weight.shape[0] for each in (model, ref_model)]
    if vocabularies[0] != vocabularies[1]:
        check.fail(
            WHERE,
            "model and ref_model must have one vocabulary, got "
            f"{vocabularies[0]} and {vocabularies[1]} rows in their output layers",
        )


def check_value_model(value_model: Any) -> None:
    if not hasattr(_plain(value_model), "base_model") or not hasattr(value_model, "config"):
        check.fail_type(
            WHERE,
            "value_model must be a model of transformers, such as AutoModelForSequenceClassification with "
            f"num_labels=1, got {type(value_model).__name__}",
        )
    score = getattr(_plain(value_model), "score", None)
    if score is not None and score.weight.shape[0] != 1:
        check.fail(WHERE, f"value_model must have one label (num_labels=1), got {score.weight.shape[0]}")


def make_reference(model: Any, ref_model: Any, args: PPOConfig) -> ActorCritic | None:
    """The frozen reference: the given model or a copy of the policy. None where there is none (``kl_coef=0``), where
    the policy without its adapter is it, or where its log-probabilities are given."""
    if ref_model is None:
        if args.reference == "given" or is_peft(model) or not args.kl_coef:
            return None
        ref_model = copy.deepcopy(model)
    else:
        check_reference(model, ref_model)
    return ActorCritic(ref_model.eval().requires_grad_(False), critic=False)


def without_dropout(module: nn.Module) -> nn.Module:
    """Old and new log-probabilities must differ by the update only: dropout is off, as in TRL."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0  # type: ignore[assignment]
    return module


def checkpoint_activations(model: Any) -> None:
    """Gradient checkpointing of the trunk, by the name that the installed transformers has for it."""
    plain = _plain(model)
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable()
    if is_peft(model):
        plain.enable_input_require_grads()


@contextlib.contextmanager
def plain_generation(policy: Any, transformers: Any) -> Iterator[None]:
    """Without the model's own defaults (a stop token, top-k, penalties), which ``generate`` would merge into what it
    is told: samples must come from the distribution that is scored."""
    owners = [policy, _plain(policy)]
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, own, strict=True):
            owner.generation_config = config
