"""The policy with its value function, in one module, and the reference.

The head is called inside this module's forward, where DDP counts the gradients and FSDP2 has gathered the parameters;
logits over the vocabulary are never made. What the model does around its output matrix is found by `head_of`. A value
head on the policy's own trunk costs no second pass.
"""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefkern.head.logprobs import linear_token_logprobs
from prefkern.integrations.ppo.config import PPOConfig
from prefkern.integrations.transformers import head_of, last_hidden
from prefkern.integrations.transformers.known import known
from prefkern.losses.reduce import widen


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
            self.value_trunk = plain_model(value_model).base_model
            self.value_head = getattr(plain_model(value_model), "score", None)
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
            hidden = last_hidden(self.policy, batch.input_ids, batch.attention_mask)
            head = head_of(self.policy, check=False)  # compared when the trainer was made
        hidden = hidden.flatten(0, 1).index_select(0, batch.cells)
        stats = linear_token_logprobs(
            hidden,
            targets=batch.targets,
            temperature=temperature,
            outputs=("logps", "entropy") if entropy else ("logps",),
            entropy_grad=entropy_grad,
            max_memory=max_memory,
            num_scored=batch.num_scored,
            **head,
        )
        value = None
        if values:
            if self.value_trunk is not None:
                trunk = self.value_trunk(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                hidden = trunk.last_hidden_state.flatten(0, 1).index_select(0, batch.cells)
            with torch.autocast(hidden.device.type, enabled=False):
                value = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
            value = widen(value).clone()
        # clones, as FSDP2 warns of views; they have one number for each cell
        return Scores(stats.logps.clone(), None if stats.entropy is None else stats.entropy.clone(), value)

    def generate(self, **options: Any) -> Any:
        return self.policy.generate(**options)


def ignores_left_padding(policy: Any) -> bool:
    """Whether the hidden states of a row padded on the left are those of the row alone, as far as that was compared."""
    return known(plain_model(policy)).positions != "right"


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def text_config(model: Any) -> Any:
    return plain_model(model).config.get_text_config()


def prepare_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model; then its ``generate`` gathers parameters as its forward does."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    fsdp = importlib.import_module("torch.distributed.fsdp")
    if not isinstance(model, fsdp.FSDPModule):
        return False
    fsdp.register_fsdp_forward_method(model, "generate")
    return True


def plain_model(model: Any) -> Any:
    """The transformers model inside a peft one."""
    return model.get_base_model() if is_peft(model) else model


def make_reference(model: Any, ref_model: Any, args: PPOConfig) -> ActorCritic | None:
    """The frozen reference: the given model or a copy of the policy. None where there is none (``kl_coef=0``), where
    the policy without its adapter is it, or where its log-probabilities are given."""
    if ref_model is None:
        if args.reference == "given" or is_peft(model) or not args.kl_coef:
            return None
        ref_model = copy.deepcopy(model)
    return ActorCritic(ref_model.eval().requires_grad_(False), critic=False)


def checkpoint_activations(model: Any) -> None:
    """Gradient checkpointing of the trunk, by the name that the installed transformers has for it."""
    plain = plain_model(model)
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable()
    if is_peft(model):
        plain.enable_input_require_grads()


@contextlib.contextmanager
def plain_generation(policy: Any, transformers: Any) -> Iterator[None]:
    """Without the model's own defaults (a stop token, top-k, penalties), which ``generate`` would merge into what it
    is told: samples must come from the distribution that is scored."""
    owners = [policy, plain_model(policy)]
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, own, strict=True):
            owner.generation_config = config
