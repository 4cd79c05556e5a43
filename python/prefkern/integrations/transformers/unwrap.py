"""The causal language model inside its wrappers, and the module that makes its logits."""

from typing import Any, NoReturn

from torch import nn

from prefkern import check as checks

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
}
_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM")


def unwrap(where: str, model: Any) -> Any:
    """The transformers model inside torch.compile, DDP and peft, in any order; refuses what cannot be unwrapped."""
    while True:
        name = type(model).__name__
        if name in _WRAPPERS:
            model = getattr(model, _WRAPPERS[name])
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                checks.fail(
                    where,
                    "model must not have a prompt-learning adapter, whose virtual tokens its own forward puts before "
                    "every row: use LoRA, or pass the logits of model(...) to the losses on log-probabilities",
                )
            model = model.get_base_model()
        else:
            return model


def causal_model(where: str, model: Any) -> tuple[Any, nn.Module]:
    """The unwrapped model and its output layer; refuses by name what is not a causal language model."""
    model = unwrap(where, model)
    name = type(model).__name__
    inner: Any = model
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        checks.fail_type(
            where,
            "model must be a causal language model of transformers, alone or in peft, DDP or torch.compile, "
            f"got {name}",
        )
    if getattr(model.config, "is_encoder_decoder", False):
        _not_causal(where, f"{name}, an encoder-decoder")
    task = next((task for task in _TASKS if task in name), None)
    head: Any = None if task else inner.get_output_embeddings()
    if task or head is None:
        _not_causal(where, f"{name}, which has no output layer for next-token logits")
    return model, head


def _not_causal(where: str, got: str) -> NoReturn:
    checks.fail_type(where, f"model must be a causal language model (AutoModelForCausalLM), got {got}")
