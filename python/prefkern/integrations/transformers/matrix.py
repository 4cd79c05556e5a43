"""The output matrix as it is now: weight, bias and the active adapter of peft."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefkern import check as checks
from prefkern.types import LoRA


class Matrix(NamedTuple):
    """``y = x W^T + bias``, with ``W + scale B A`` in place of W where there is an adapter."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora: LoRA | None
    dropout: float  # of the adapter's input, in train mode

    def product(self, x: Tensor) -> Tensor:
        """The raw logits of a few rows, as the model's own layer rounds them."""
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        if self.lora is None:
            return y
        a, b, scale = self.lora
        return y + (x.to(a.dtype) @ a.T @ b.T * scale).to(y.dtype)


def output_matrix(where: str, layer: Any) -> Matrix:
    """Reads an output layer, through peft's LoRA and modules_to_save; refuses quantised weights and other adapters."""
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        layer = _saved(layer)
    lora, bias, dropout = None, None, 0.0
    if hasattr(layer, "base_layer"):
        if not hasattr(layer, "lora_A"):
            checks.fail(
                where,
                f"the adapter on the output layer must be LoRA, got {type(layer).__name__}: leave the output layer out "
                "of the adapter's targets, or merge the adapter first",
            )
        lora, bias, dropout = _lora(where, layer)
        layer = layer.get_base_layer()
    weight = _weight(where, layer)
    own: Tensor | None = getattr(layer, "bias", None)
    if bias is not None:
        own = bias if own is None else own + bias
    return Matrix(weight, own, lora, dropout)


def computable(model: nn.Module) -> bool:
    """Whether one can compute with the weights here: none on meta, none a shard (FSDP, ZeRO-3, tensor parallelism)."""
    return not any(
        each.is_meta or type(each).__name__ == "DTensor" or hasattr(each, "ds_id") for each in model.parameters()
    )


def _saved(wrapper: Any) -> Any:
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    if not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _lora(where: str, layer: Any) -> tuple[LoRA | None, Tensor | None, float]:
    """The active adapters in one, the bias they add, and their dropout."""
    if layer.disable_adapters:
        if layer.merged:
            checks.fail(
                where, "the adapter on the output layer must be unmerged before it is disabled: unmerge_adapter()"
            )
        return None, None, 0.0
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or not active:
        return None, None, 0.0
    variants = getattr(layer, "lora_variant", {})
    odd = next((type(variants[name]).__name__ for name in active if name in variants), None)
    if odd:
        checks.fail(
            where, f"the adapter on the output layer must be plain LoRA, got {odd}: merge it first (merge_adapter)"
        )
    a, b, scales = (
        [layer.lora_A[name].weight for name in active],
        [layer.lora_B[name].weight for name in active],
        [float(layer.scaling[name]) for name in active],
    )
    biases = [
        layer.lora_B[name].bias * scale
        for name, scale in zip(active, scales, strict=True)
        if layer.lora_B[name].bias is not None
    ]
    dropout = max(float(getattr(layer.lora_dropout[name], "p", 0.0)) for name in active)
    if len(active) == 1:
        lora = a[0], b[0], scales[0]
    else:  # side by side they are one adapter of the summed rank
        lora = torch.cat(a), torch.cat([each * scale for each, scale in zip(b, scales, strict=True)], 1), 1.0
    return lora, sum(biases[1:], biases[0]) if biases else None, dropout


def _weight(where: str, layer: object) -> Tensor:
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        checks.fail(
            where,
            f"the output layer must be one matrix [V, H] with a weight, got {type(layer).__name__}"
            + (": dequantise it, or leave it out of the quantisation" if hasattr(layer, "qweight") else ""),
        )
    quantised = weight.dtype not in checks.FLOATS or not (
        type(weight) in (Tensor, nn.Parameter) or type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id")
    )
    if quantised:
        checks.fail_type(
            where,
            f"the output matrix must be a plain floating-point tensor, got {type(weight).__name__} of {weight.dtype}: "
            "leave it out of the quantisation (llm_int8_skip_modules=['lm_head'], modules_to_not_convert), or "
            "dequantise it",
        )
    if weight.ndim != 2 and weight.numel() and not hasattr(weight, "ds_id"):
        checks.fail(where, f"the output matrix must be [V, H], got {tuple(weight.shape)} in {type(layer).__name__}")
    return weight
