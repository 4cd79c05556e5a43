"""What is known of each model: found at the first use, kept as long as the model lives."""

import contextlib
import sys
import warnings
from collections.abc import Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from prefkern import check as checks
from prefkern.integrations.transformers.matrix import Matrix
from prefkern.integrations.transformers.probe import Form, NotThisForm, numbers, probe


class Known:
    """Of one model: a form for each state of its head (an adapter switched off is another), and what was compared."""

    def __init__(self) -> None:
        self.forms: dict[Hashable, Form] = {}
        self.checked: set[Hashable] = set()
        self.positions: str | None = None
        """Who counts the positions of a padded row: 'mask', the 'model' itself, or nobody ('right': pad there)."""
        self.packed: dict[str, float] = {}
        """By attention implementation: how far the hidden states of packed sequences are from their own, relative to
        the largest."""


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known(model: nn.Module) -> Known:
    if model not in _KNOWN:
        _KNOWN[model] = Known()
    return _KNOWN[model]


def state(model: Any, layer: nn.Module, matrix: Matrix) -> Hashable:
    """Changes with everything that a form depends on: an edited configuration, another vocabulary, another adapter."""
    return (
        type(layer).__name__.removeprefix("FSDP"),
        shape_of(matrix),
        matrix.weight.dtype,
        matrix.bias is None,
        None if matrix.lora is None else (matrix.lora[0].shape, matrix.lora[2]),
        tuple(numbers(model).items()),
    )


def shape_of(matrix: Matrix) -> tuple[int, int]:
    V, H = getattr(matrix.weight, "ds_shape", matrix.weight.shape)  # ZeRO-3 leaves an empty tensor
    return int(V), int(H)


def form_of(where: str, model: Any, layer: nn.Module, matrix: Matrix) -> Form:
    forms, key = known(model).forms, state(model, layer, matrix)
    if key not in forms:
        V, H = shape_of(matrix)
        try:
            with undisturbed(model):
                forms[key] = probe(model, layer, V, getattr(model.config.get_text_config(), "hidden_size", None) or H)
        except NotThisForm as seen:
            checks.fail(
                where,
                f"{type(model).__name__} must make its logits as softcap(logit_scale (h W^T + bias)), but {seen}: pass "
                "the logits of model(...) to the losses on log-probabilities instead",
            )
    return forms[key]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A look at the model that leaves no trace: no gradient, no autocast, nothing compiled, dropout off; its modes and
    the random numbers as before, the warnings of its code unheard."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {each.device for each in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([each.index or 0 for each in devices if each.type == "cuda"]))
        for kind in {each.type for each in devices} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
