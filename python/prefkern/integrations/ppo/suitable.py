"""Which models PPO takes: refused by name, before anything has changed, is what would be scored or valued wrongly."""

from typing import Any, NoReturn

import torch

from prefkern import check
from prefkern.integrations.ppo.models import plain_model
from prefkern.integrations.transformers import ModelHead, head_of, last_hidden
from prefkern.integrations.transformers.known import undisturbed
from prefkern.integrations.transformers.matrix import computable
from prefkern.integrations.transformers.trunk import some_tokens

WHERE = "PPOTrainer"


def check_policy(name: str, model: Any) -> ModelHead:
    """A causal language model whose log-probabilities of a few tokens, from hidden states, are those of its own logits;
    what makes them is returned. Who counts the positions of padded rows is found here too, while the weights are
    whole."""
    if hasattr(model, "v_head") and hasattr(model, "pretrained_model"):
        check.fail_type(
            WHERE,
            f"{name} must be a causal language model of transformers, got {type(model).__name__}: pass its "
            "pretrained_model; the trainer adds a value head of its own",
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        check.fail(
            WHERE,
            f"{name} must have a plain linear output layer, got {type(head).__name__}: leave it out of the adapter's "
            "target_modules and modules_to_save, or merge the adapter first",
        )
    try:
        found = head_of(model, check=not isinstance(model, torch.nn.Module) or computable(model))
        if computable(model):
            row = some_tokens(plain_model(model), 4)[None]
            with undisturbed(model):
                last_hidden(model, row, torch.ones_like(row))
    except (TypeError, ValueError) as error:
        why = str(error).removeprefix("prefkern.head_of: ").replace("model must", f"{name} must", 1)
        raise type(error)(f"prefkern.{WHERE}: {why}") from error
    return found


def check_models(model: Any, ref_model: Any, value_model: Any) -> ModelHead:
    """All three, of which the latter two may be None; the head of the policy."""
    head = check_policy("model", model)
    if ref_model is not None:
        rows = len(check_policy("ref_model", ref_model)["weight"])
        if ref_model is model:
            check.fail(WHERE, "ref_model must be another object than model (None makes a frozen copy)")
        if rows != len(head["weight"]):
            check.fail(
                WHERE,
                "model and ref_model must have one vocabulary, got "
                f"{len(head['weight'])} and {rows} rows in their output layers",
            )
    if value_model is not None:
        check_value_model(value_model)
    return head


def check_value_model(value_model: Any) -> None:
    """A model of transformers with one label, whose hidden states of a token do not know the tokens after it."""
    if not hasattr(plain_model(value_model), "base_model") or not hasattr(value_model, "config"):
        check.fail_type(
            WHERE,
            "value_model must be a model of transformers, such as AutoModelForSequenceClassification with "
            f"num_labels=1, got {type(value_model).__name__}",
        )
    if getattr(value_model.config, "is_encoder_decoder", False):
        _not_causal(value_model, "an encoder-decoder")
    score = getattr(plain_model(value_model), "score", None)
    if score is not None and score.weight.shape[0] != 1:
        check.fail(WHERE, f"value_model must have one label (num_labels=1), got {score.weight.shape[0]}")
    if not computable(value_model):
        return
    row = some_tokens(value_model, 7)
    rows = torch.stack([row[:6], torch.cat([row[:5], row[6:]])])  # they differ in the last token
    with undisturbed(value_model):
        hidden = plain_model(value_model).base_model(rows, use_cache=False).last_hidden_state[:, :-1].double()
    apart, largest = float((hidden[0] - hidden[1]).abs().max()), float(hidden.abs().max())
    if not apart <= torch.finfo(value_model.dtype).eps ** 0.5 * largest:
        _not_causal(value_model, f"whose hidden states of a token change by {apart:.3g} when the token after it does")


def _not_causal(value_model: Any, what: str) -> NoReturn:
    name = type(plain_model(value_model)).__name__
    check.fail_type(WHERE, f"value_model must be a causal decoder, got {name}, {what}")
