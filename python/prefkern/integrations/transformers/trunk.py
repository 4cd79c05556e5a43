"""A model's trunk: how it is called, and what it makes of padding and of packed sequences."""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from prefkern import check as checks
from prefkern.integrations.transformers.known import known, undisturbed
from prefkern.integrations.transformers.matrix import computable
from prefkern.integrations.transformers.positions import count_positions, pack
from prefkern.integrations.transformers.probe import Form

_IMAGES = ("pixel_values", "image", "video", "audio", "input_features")
"""Inputs of models that take more than text: they count positions over these too."""

MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError)
"""What a model's code raises on inputs that it does not take."""


class Trunk:
    """Calls the trunk; or the whole model without its product, where a layer lies between trunk and matrix."""

    def __init__(self, model: Any, layer: nn.Module, form: Form) -> None:
        self._model, self._layer = model, layer
        self._direct = form.trunk is not None
        self._called: Any = model.get_submodule(form.trunk) if form.trunk is not None else model
        parameters = inspect.signature(self._called.forward).parameters.values()
        self._any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        self._names = {each.name for each in parameters}

    def __call__(self, **inputs: Any) -> Tensor:
        inputs = without_cache(self._called) | inputs
        if not self._any:
            inputs = {
                name: value
                for name, value in inputs.items()
                if name in self._names or ("_length" not in name and "seq_lens" not in name)
            }
        if not self._direct:
            return self._without_product(inputs)
        output = self._called(**inputs)
        hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        return hidden

    def counts_from_mask(self, where: str, attention_mask: Tensor, inputs: dict[str, Any]) -> bool:
        """Whether positions must be counted for it. Refuses padding on the left that it cannot ignore."""
        if any(name.startswith(_IMAGES) for name in inputs):
            return False
        facts = known(self._model)
        if facts.positions is None:
            if not computable(self._model):
                return "position_ids" in self._names  # weights are sharded: nothing can be compared
            facts.positions = self._compare_padding()
        if facts.positions == "right" and bool((attention_mask[:, :1] == 0).any()):
            checks.fail(
                where,
                f"attention_mask must have its padding on the right for {type(self._model).__name__}, whose hidden "
                "states of a row padded on the left are not those of the row alone",
            )
        return facts.positions == "mask"

    def must_tell_sequences_apart(self, where: str) -> None:
        packed, attention = known(self._model).packed, str(getattr(self._model.config, "_attn_implementation", None))
        if attention not in packed:
            if not computable(self._model):
                return  # weights are sharded: nothing can be compared
            packed[attention] = self._compare_packing()
        apart, name = packed[attention], type(self._model).__name__
        if not apart <= self._tolerance():
            checks.fail(
                where,
                f"{name} (attn_implementation={attention!r}) does not tell packed sequences apart: hidden states "
                f"differ from those of each sequence alone by {apart:.2g} of the largest. Pass "
                "padded rows with an attention_mask, or load the model with another attn_implementation",
            )

    def _compare_padding(self) -> str:
        pad = getattr(self._model.config.get_text_config(), "pad_token_id", None)
        pad = pad if isinstance(pad, int) and pad >= 0 else 0
        row = self._row()[:, 5:]
        padded = torch.cat([row.new_full((1, 5), pad), row], 1)
        mask = torch.ones_like(padded)
        mask[:, :5] = 0
        ways: dict[str, dict[str, Tensor]] = {"mask": {"position_ids": count_positions(mask)}, "model": {}}
        if "position_ids" not in self._names:
            del ways["mask"]
        with undisturbed(self._model):
            alone = self(input_ids=row)
            for way, positions in ways.items():
                with contextlib.suppress(*MODEL_ERRORS):
                    there = self(input_ids=padded, attention_mask=mask, **positions)[:, 5:]
                    if _apart(there, alone) <= self._tolerance():
                        return way
        return "right"

    def _compare_packing(self) -> float:
        if not self._any and "position_ids" not in self._names:
            return float("inf")
        row = self._row()
        N, first = row.shape[1], 2 * row.shape[1] // 5
        offsets = torch.tensor([0, first, N], device=row.device)
        with undisturbed(self._model), contextlib.suppress(*MODEL_ERRORS):
            together = self(input_ids=row, **pack("last_hidden", row, offsets))
            alone = torch.cat([self(input_ids=row[:, :first]), self(input_ids=row[:, first:])], 1)
            return _apart(together, alone)
        return float("inf")

    def _row(self) -> Tensor:
        """Long enough for layers that work on blocks of tokens, if the model takes as many."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 64
        return some_tokens(self._model, max(8, min(64, most - 8)))[None]

    def _tolerance(self) -> float:
        """Between what reordered sums differ by through many layers and what another position does."""
        return float(torch.finfo(next(self._model.parameters()).dtype).eps ** 0.5)

    def _without_product(self, inputs: dict[str, Any]) -> Tensor:
        """The model's own forward, with an output layer that keeps what it is given and makes one column of it."""
        given: list[Tensor] = []

        def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
            given.append(x)
            return x[..., :1]

        layer = self._layer.__dict__
        before = layer.get("forward")
        layer["forward"] = forward
        try:
            self._model(**inputs)
        finally:
            if before is None:
                del layer["forward"]
            else:
                layer["forward"] = before
        return given[-1]


def without_cache(module: nn.Module) -> dict[str, bool]:
    """The argument that says so, for a module that has it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def some_tokens(model: Any, length: int) -> Tensor:
    """Distinct ordinary tokens ``[length]``, on the device of the embeddings."""
    embeddings: Tensor = model.get_input_embeddings().weight
    V = embeddings.shape[0]
    return (V // 3 + torch.arange(length, device=embeddings.device)) % V


def _apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest number."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))
