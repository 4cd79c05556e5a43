"""Logits that exist only if somebody really needs them: any trainer that reads ``.logits`` on prefkern's head.

    from prefkern.integrations.transformers import patch

    patch(model)
    transformers.Trainer(model, ...).train()

The output layer hands out a tensor that knows its hidden states and its weight in place of ``[B, T, V]`` numbers.
Shifts, slices, casts, a temperature, a cap, ``cross_entropy``, ``log_softmax`` with ``gather``, ``logsumexp``,
entropies, means and ``argmax`` are answered from there by `linear_token_logprobs` and `linear_cross_entropy`; anything
else makes the real logits with the model's own product, once, and says at which line.
"""

import types
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from prefkern import check as checks
from prefkern.integrations.transformers import lazy_numbers, lazy_views  # noqa: F401 - they register their answers
from prefkern.integrations.transformers.head import head_of
from prefkern.integrations.transformers.lazy_rows import Rows
from prefkern.integrations.transformers.lazy_tensor import Book, Cell, LazyLogits, Origin, RealLogitsWarning
from prefkern.integrations.transformers.matrix import Matrix, output_matrix
from prefkern.integrations.transformers.unwrap import causal_model

__all__ = ["LazyPatch", "RealLogitsWarning", "lazy_logits", "patch", "unpatch"]

_WHERE = "lazy_logits"
_MARK = "_prefkern_lazy"
_Layer = Any


class _Installed:
    """What stands on an output layer while its logits are lazy. It moves with the layer into copies of the model."""

    def __init__(self, before: Callable[..., Tensor] | None) -> None:
        self.before = before
        """The layer's own ``forward``, if it had one that is not its class's."""
        self.book = Book()
        self.holders: list[object] = []
        """Patches that have not ended."""

    def product(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs) if self.before is None else self.before(*args, **kwargs)


class LazyPatch:
    """What `patch` and `lazy_logits` return. As a context manager it ends with the block."""

    def __init__(self, places: list[tuple[Any, _Layer]]) -> None:
        self._places = [(model, layer, _install(model, layer, self)) for model, layer in places]
        self._books = [
            (installed.book, installed.book.made_real, installed.book.answered) for _, _, installed in self._places
        ]

    @property
    def made_real(self) -> int:
        """How often real logits were made since `patch`."""
        return sum(book.made_real - before for book, before, _ in self._books)

    @property
    def answered(self) -> int:
        """How many results came from hidden states since `patch`."""
        return sum(book.answered - before for book, _, before in self._books)

    def __enter__(self) -> "LazyPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._places:
            model, layer, installed = self._places.pop()
            if self not in installed.holders:  # unpatch(model) has ended it
                continue
            installed.holders.remove(self)
            if not installed.holders:
                _remove(model, layer, installed)


def lazy_logits(*models: Any, check: bool = True) -> LazyPatch:
    """`patch` for a ``with`` block: the logits of the models, the policy and its reference, say, are lazy within it.

    Example:
        >>> import torch, transformers
        >>> from prefkern.integrations.transformers import lazy_logits
        >>> config = transformers.Qwen2Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.AutoModelForCausalLM.from_config(config)
        >>> input_ids = torch.arange(12).view(2, 6)
        >>> with lazy_logits(model) as lazy:
        ...     model(input_ids=input_ids, labels=input_ids).loss.backward()
        >>> lazy.made_real, lazy.answered
        (0, 1)
    """
    return patch(*models, check=check)


def patch(*models: Any, check: bool = True) -> LazyPatch:
    """Makes the logits of the models lazy from now on, until `unpatch`, or the end of the block where the result is
    used in ``with``. Patching twice changes nothing; logits stay lazy until every block has ended.

    The model's own code runs as it is, on logits that are a scale, a cap or a slice of what its output layer hands out,
    and so do its losses and those of a trainer. Their values are as exact as float32 logits; gradients reach the hidden
    states, the weight, the bias and a LoRA adapter on the layer. What is not answered makes the real logits through
    the model's own layer, once for each forward, and warns (`RealLogitsWarning`) with the line that asked.

    One position without a gradient, as in ``generate``, is made at once. Under ``torch.compile`` of the whole model
    logits are real: compile the trunk alone (``model.model = torch.compile(model.model)``). Under FSDP the loss must be
    made inside the wrapped forward (pass ``labels``); DeepSpeed ZeRO-3 is refused.

    Args:
        models: causal language models of transformers, alone or in peft, DDP or torch.compile.
        check: whether `head_of` compares each model's head with its own logits at first sight; weights that are sharded
            already need ``check=False``.

    Raises:
        TypeError, ValueError: what `head_of` refuses: no causal language model, no output layer, a quantised matrix, an
            adapter with dropout in train mode, logits that are not of its form. Nothing is replaced then.
    """
    if not models:
        checks.fail_type(_WHERE, "at least one model is needed, got none")
    places = []
    for model in models:
        inner, layer = causal_model(_WHERE, model)
        _refuse_sharded(output_matrix(_WHERE, layer))
        head_of(model, check=check)
        places.append((inner, layer))
    return LazyPatch(places)


def unpatch(model: Any) -> None:
    """Gives the model its own logits back, whatever patches are in force; does nothing where none is. Lazy logits that
    were handed out before go on as they are."""
    inner, _ = causal_model(_WHERE, model)
    for layer in inner.modules():
        installed = vars(layer).get(_MARK)
        if installed is not None:
            installed.holders = []
            _remove(inner, layer, installed)
    _unhook(inner)


def _install(model: Any, layer: _Layer, holder: object) -> _Installed:
    state: dict[str, Any] = layer.__dict__
    if _MARK not in state:
        state[_MARK] = _Installed(state.get("forward"))
        state["forward"] = types.MethodType(_forward, layer)  # a method: a copy of the layer gets one of its own
    installed: _Installed = state[_MARK]
    installed.holders.append(holder)
    if _same_head not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_same_head)
    return installed


def _remove(model: Any, layer: _Layer, installed: _Installed) -> None:
    state: dict[str, Any] = layer.__dict__
    mine = state.get("forward")
    if getattr(mine, "__func__", None) is _forward:
        del state["forward"], state[_MARK]
        if installed.before is not None:
            state["forward"] = installed.before
    # else somebody has wrapped it since: without holders it passes on to what was there before
    _unhook(model)


def _unhook(model: Any) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _same_head]:
        del model._forward_pre_hooks[key]


def _same_head(model: Any, inputs: Any) -> None:
    """Refuses to run a patched model whose output layer is another one now."""
    if torch.compiler.is_compiling():
        return
    layer = model.get_output_embeddings()
    layer = getattr(layer, "original_module", getattr(layer, "base_layer", layer))
    if not any(_MARK in vars(each) for each in (layer, model.get_output_embeddings())):
        checks.fail(
            _WHERE,
            f"the output layer of {type(model).__name__} was replaced after patch(model), so that its logits are no "
            "longer lazy: call unpatch(model), and patch(model) again once the model is complete",
        )


# ------------------------------------------------------------------------------------------------------- one forward


def _forward(layer: _Layer, *args: Any, **kwargs: Any) -> Any:
    """Stands in place of the output layer's ``forward``."""
    installed: _Installed = vars(layer)[_MARK]
    if not installed.holders or len(args) != 1 or kwargs or not _can_be_lazy(args[0]):
        return installed.product(layer, *args, **kwargs)
    hidden: Tensor = args[0]
    matrix = output_matrix(_WHERE, layer)
    _refuse_sharded(matrix)
    if matrix.dropout and layer.training:
        head_of_dropout = f"lora_dropout={matrix.dropout}"
        checks.fail(
            _WHERE,
            "the adapter on the output layer must have no dropout in train mode, which lazy logits cannot apply, got "
            f"{head_of_dropout}: call without_noise(model), or leave the output layer out of the adapter's targets",
        )
    device = hidden.device.type
    enabled, autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    dtype = autocast if enabled and hidden.dtype != torch.float64 else hidden.dtype
    if not enabled and hidden.dtype != matrix.weight.dtype:
        return installed.product(layer, hidden)  # which says what is wrong

    def product(x: Tensor) -> Tensor:
        with torch.autocast(device, autocast, enabled=enabled):
            made: Tensor = installed.product(layer, x)
        return made

    columns = slice(0, len(matrix.weight))
    rows = Rows(hidden, matrix, dtype, columns, _unchanged(layer, hidden, matrix.weight))
    return LazyLogits.of(Cell("logits", rows, dtype, Origin(product, installed.book)))


def _can_be_lazy(hidden: Any) -> bool:
    if torch.compiler.is_compiling():
        return not _compiled()
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.is_meta or hidden.ndim < 2:
        return False
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch.is_grad_enabled() or hidden.shape[-2] != 1  # the next token of generate


def _compiled() -> bool:
    """True; says so once, while the model is traced."""
    warnings.warn(
        "prefkern: torch.compile traces the whole model, where its logits are real: compile the trunk alone, "
        "`model.model = torch.compile(model.model)`, to keep them lazy",
        RealLogitsWarning,
        stacklevel=2,
    )
    return True


# what `torch.compiler.assume_constant_result` sets; the decorator itself would load the compiler, and Triton, at import
_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_sharded(matrix: Matrix) -> None:
    if hasattr(matrix.weight, "ds_id"):
        checks.fail(
            _WHERE,
            "DeepSpeed ZeRO-3 takes the output layer's weight away as soon as that layer has run, and lazy logits need "
            "it later: train with ZeRO-2 or FSDP2",
        )


def _unchanged(layer: _Layer, hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """Returns a check that weight and hidden states are what they were."""
    versions = _versions(hidden, weight)

    def check() -> None:
        now: Any = output_matrix(_WHERE, layer).weight
        if type(now).__name__ == "DTensor" or now is not weight:
            checks.fail(
                _WHERE,
                "the output layer's weight is not the one of the forward any more, because FSDP has sharded it again, "
                "or it was replaced: make the loss inside the wrapped forward (pass labels to model(...)), before "
                "anything else is done to the model, or call unpatch(model)",
            )
        if _versions(hidden, weight) != versions:
            checks.fail(
                _WHERE,
                "weight or hidden states were changed in place after these logits were made (an optimizer step does "
                "that), and logits that do not exist would follow: use them before, or call unpatch(model)",
            )

    return check


def _versions(*tensors: Tensor) -> list[int]:
    return [0 if each.is_inference() else each._version for each in tensors]
