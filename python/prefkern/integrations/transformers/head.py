"""What makes logits of a model's hidden states, as arguments of every function on hidden states."""

import math
from typing import Any, Literal, Required, TypedDict, overload

import torch
from torch import Tensor, nn

from prefkern import check as checks
from prefkern.integrations.transformers.known import form_of, known, state, undisturbed
from prefkern.integrations.transformers.matrix import Matrix, computable, output_matrix
from prefkern.integrations.transformers.probe import Form
from prefkern.integrations.transformers.trunk import MODEL_ERRORS, Trunk, some_tokens, without_cache
from prefkern.integrations.transformers.unwrap import causal_model
from prefkern.types import LoRA

_WHERE = "head_of"
_LOGITS = "pass the logits of model(...) to the losses on log-probabilities instead"


class ModelHead(TypedDict, total=False):
    """Arguments of `linear_token_logprobs` and of every linear loss, but for those that the model does not have."""

    weight: Required[Tensor]
    bias: Tensor
    logit_scale: float
    softcap: float
    vocab_mask: Tensor
    lora: LoRA


class ReferenceHead(TypedDict, total=False):
    """The same of a reference model; scale and cap always, as they are never taken from the policy."""

    ref_weight: Required[Tensor]
    ref_bias: Tensor
    ref_logit_scale: Required[float]
    ref_softcap: Required[float]


@overload
def head_of(model: Any, *, check: bool = True, reference: Literal[False] = False) -> ModelHead: ...
@overload
def head_of(model: Any, *, check: bool = True, reference: Literal[True]) -> ReferenceHead: ...
def head_of(model: Any, *, check: bool = True, reference: bool = False) -> ModelHead | ReferenceHead:
    """Returns what makes logits of the hidden states of `last_hidden`: ``softcap(logit_scale (h W^T + bias))``, with
    ``W + scale B A`` for W under a LoRA adapter of peft on the output layer.

        pk.linear_dpo_loss(hidden, targets=targets, ref_logps=ref, beta=0.1, **pk.head_of(model))

    Scale and cap are not read from names in the configuration (``final_logit_softcapping``, ``logits_scaling``, which
    one model multiplies by and another divides by, or a ``logit_scale`` that no code applies): the model's own forward
    runs around stand-ins for its trunk and its matrix, and shows what becomes of given numbers. Then the hidden states
    of a few tokens go through the result, and must give the model's own logits.

    The weight is the live parameter, so call this in every step: what was found and compared is remembered for as long
    as the model object lives, and found anew where its configuration, its vocabulary or the state of its adapter
    changes. A vocabulary padded behind the last token is cut from weight and bias. The model is left as it was: no
    gradient, its modes, hooks and the state of the random numbers untouched.

    Args:
        model: a causal language model of transformers, alone or in peft (LoRA or modules_to_save on the output layer,
            merged, disabled), DDP or torch.compile.
        check: whether to compare with the model's own logits at first sight. Weights that nothing can be computed with
            here (on meta, sharded by FSDP or ZeRO-3) need ``check=False``, or a first call before they are sharded.
        reference: whether to name the results ``ref_weight``, ``ref_bias``, ``ref_logit_scale``, ``ref_softcap``.

    Raises:
        TypeError: no causal language model (an encoder-decoder, a masked language model, a classifier, a bare trunk);
            a quantised output matrix.
        ValueError: logits that are not of this form, with the largest difference and the part that causes it; a model
            whose logits depend on later tokens; an adapter with dropout on the output layer in train mode.

    Example:
        >>> import torch, transformers, prefkern as pk
        >>> config = transformers.CohereConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.AutoModelForCausalLM.from_config(config)
        >>> input_ids = torch.arange(12).view(2, 6)
        >>> from prefkern.integrations.transformers import head_of, last_hidden
        >>> sorted(head_of(model)), head_of(model)["logit_scale"]
        (['logit_scale', 'weight'], 0.0625)
        >>> hidden, targets = last_hidden(model, input_ids), pk.shift_labels(input_ids)
        >>> pk.linear_token_logprobs(hidden, targets=targets, **head_of(model)).logps.shape
        torch.Size([2, 6])
    """
    inner, layer = causal_model(_WHERE, model)
    matrix = output_matrix(_WHERE, layer)
    form = form_of(_WHERE, inner, layer, matrix)
    if check:
        form = _checked(inner, layer, matrix, form)
    return _reference(matrix, form) if reference else _policy(layer, matrix, form)


def _policy(layer: nn.Module, matrix: Matrix, form: Form) -> ModelHead:
    if matrix.dropout and layer.training:
        checks.fail(
            _WHERE,
            f"the adapter on the output layer must have no dropout in train mode, which the functions on hidden states "
            f"do not apply, got lora_dropout={matrix.dropout}: call without_noise(model)",
        )
    V, whole = form.vocabulary, len(matrix.weight) == form.vocabulary
    head = ModelHead(weight=matrix.weight if whole else matrix.weight[:V])
    bias = _bias(matrix, form)
    if bias is not None:
        head["bias"] = bias
    if form.logit_scale != 1.0:
        head["logit_scale"] = form.logit_scale
    if form.softcap is not None:
        head["softcap"] = form.softcap
    if form.allowed is not None:
        head["vocab_mask"] = form.allowed.to(matrix.weight.device)
    if matrix.lora is not None:
        a, b, scale = matrix.lora
        head["lora"] = (a, b if whole else b[:V], scale)
    return head


def _reference(matrix: Matrix, form: Form) -> ReferenceHead:
    if matrix.lora is not None or form.allowed is not None:
        what = "an adapter on its output layer" if matrix.lora is not None else "masked tokens in its vocabulary"
        checks.fail(_WHERE, f"a reference model must not have {what}: pass ref_logps, made with head_of(model)")
    head = ReferenceHead(
        ref_weight=matrix.weight[: form.vocabulary],
        ref_logit_scale=form.logit_scale,
        ref_softcap=math.inf if form.softcap is None else form.softcap,
    )
    bias = _bias(matrix, form)
    if bias is not None:
        head["ref_bias"] = bias
    return head


def _bias(matrix: Matrix, form: Form) -> Tensor | None:
    bias = matrix.bias if matrix.bias is None or form.divisor == 1.0 else matrix.bias * form.divisor
    return bias if bias is None or len(bias) == form.vocabulary else bias[: form.vocabulary]


def _checked(model: Any, layer: nn.Module, matrix: Matrix, form: Form) -> Form:
    """The form, compared with the model's own logits where that was not done before."""
    facts, key = known(model), state(model, layer, matrix)
    if key in facts.checked:
        return form
    if not computable(model):
        checks.fail(
            _WHERE,
            f"the weights of {type(model).__name__} are sharded or on meta, so that its logits cannot be compared: "
            "call head_of(model) once before they are sharded, or pass check=False",
        )
    with undisturbed(model):
        try:
            seen = _Seen(model, layer)
        except MODEL_ERRORS as error:
            checks.fail(
                _WHERE,
                f"{type(model).__name__} must run on input_ids alone to be compared, but its forward raises "
                f"{type(error).__name__}: {str(error)[:200]}. Pass check=False if the head is known to be right",
            )
        if form.trunk is not None and not seen.same_input(form):  # something that depends on more than t
            form = form._replace(trunk=None, logit_scale=form.logit_scale * form.divisor, divisor=1.0)
        _compare(model, layer, matrix, form, seen)
    facts.forms[key] = form
    facts.checked.add(key)
    return form


class _Seen:
    """Two rows that differ in the last token, as the model itself makes logits of them."""

    def __init__(self, model: Any, layer: nn.Module) -> None:
        self._model, self._layer = model, layer
        row = some_tokens(model, 7)
        self.ids = torch.stack([row[:6], torch.cat([row[:5], row[6:]])])
        self.x, self.y = row, row
        hook = layer.register_forward_hook(self._keep)
        try:
            output = model(input_ids=self.ids, **without_cache(model))
        finally:
            hook.remove()
        self.z: Tensor = output.logits if hasattr(output, "logits") else output[0]

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.x, self.y = inputs[0], output.clone()  # some models mask their logits in place

    def hidden(self, form: Form) -> Tensor:
        return Trunk(self._model, self._layer, form)(input_ids=self.ids)

    def same_input(self, form: Form) -> bool:
        hidden = self.hidden(form)
        return hidden.shape == self.x.shape and not _differs(hidden / form.divisor, self.x, self.x)


def _compare(model: Any, layer: nn.Module, matrix: Matrix, form: Form, seen: _Seen) -> None:
    name = type(model).__name__
    own = seen.z if form.allowed is None else seen.z[..., form.allowed]
    earlier = own[:, :-1]
    if _differs(earlier[0], earlier[1], own):
        checks.fail_type(
            _WHERE,
            f"model must be causal, got {name}, whose logits of a token change by "
            f"{_largest(earlier[0], earlier[1]):.3g} when the token after it does: "
            "a masked language model, or a decoder without is_decoder=True",
        )
    product = matrix.product(seen.x)
    if _differs(product, seen.y, seen.y):
        checks.fail(
            _WHERE,
            f"{name}'s output layer must be its matrix and bias alone, but {type(layer).__name__} does more: its "
            f"products differ by up to {_largest(product, seen.y):.3g}. {_LOGITS.capitalize()}",
        )
    V = form.vocabulary
    y = matrix.product(seen.hidden(form) / form.divisor)[..., :V].double() * (form.logit_scale * form.divisor)
    z = y if form.softcap is None else form.softcap * torch.tanh(y / form.softcap)
    if form.allowed is not None:
        z = z[..., form.allowed]
    if _differs(z, own, own):
        checks.fail(
            _WHERE,
            f"{name} must make its logits as softcap(logit_scale (h W^T + bias)), but they differ from its own by "
            f"up to {_largest(z, own):.3g} (scale {form.logit_scale:g}, cap {form.softcap}): two passes over the "
            f"same tokens differ, or the logits depend on more than the hidden states. {_LOGITS.capitalize()}",
        )


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _differs(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """By more than sums of another order do, in units of the last place of the largest number."""
    eps = torch.finfo(scale.dtype).eps
    units = 512 if eps < 1e-5 else 8
    return not _largest(a, b) <= units * eps * float(scale.double().abs().max())
