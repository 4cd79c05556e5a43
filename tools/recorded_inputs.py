"""A recorded call, and its inputs: seeded one by one, so that a new call changes no other."""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Case(NamedTuple):
    """One call of ``PUBLIC[name]``, or of the module of that name, made with the options and called with the rest."""

    name: str
    label: str
    arguments: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    context: AbstractContextManager[Any] = nullcontext()
    retain: bool = False
    """Whether the gradients are those of a second backward of a kept graph."""

    def __str__(self) -> str:
        plain = (str, int, float, type(None))
        shown = [f"{key}={value}" if isinstance(value, plain) else key for key, value in self.options.items()]
        return f"{self.name}({', '.join([self.label, *shown] if self.label else shown)})"


Cases = Iterator[Case]


# ------------------------------------------------------------------------------------------------ inputs


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = F32, grad: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale
    return values.to(dtype).requires_grad_(grad)


def logps(*shape: int, seed: int, dtype: torch.dtype = F32, grad: bool = False) -> Tensor:
    return normal(*shape, seed=seed).abs().neg().to(dtype).requires_grad_(grad)


def flags(*shape: int, seed: int, share: float = 0.7) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def token_ids(*shape: int, V: int, seed: int, ignored: float = 0.2) -> Tensor:
    ids = torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(flags(*shape, seed=seed + 1, share=ignored), -100)


def choices(**options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Every combination."""
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def head(*rows: int, H: int = 16, V: int = 101, dtype: torch.dtype = F32, trained: str = "hidden weight") -> Any:
    return {
        "hidden": normal(*rows, H, seed=1, dtype=dtype, grad="hidden" in trained),
        "weight": normal(V, H, seed=2, scale=3 / H**0.5, dtype=dtype, grad="weight" in trained),
        "targets": token_ids(*rows, V=V, seed=3),
    }


def reference(*rows: int, H: int = 12, V: int = 101, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    other = head(*rows, H=H, V=V, dtype=dtype, trained="")
    return {"ref_hidden": other["hidden"], "ref_weight": other["weight"]}


def head_options(*rows: int, trained: bool, V: int = 101, H: int = 16) -> dict[str, dict[str, Any]]:
    """What a head may have, by name."""
    bias = {"bias": normal(V, seed=4, grad=trained)}
    a, b = normal(3, H, seed=5, grad=trained), normal(V, 3, seed=6, grad=trained)
    per_row = {"temperature": normal(*rows, seed=7).abs() + 0.5}
    seen = token_ids(*rows, V=V, seed=3).clamp(min=0).flatten()
    return {
        "bias": bias,
        "temperature": {"temperature": 0.7},
        "temperature per row": per_row,
        "softcap": {"softcap": 5.0},
        "logit_scale": {"logit_scale": 0.5},
        "vocab_mask": {"vocab_mask": flags(V, seed=8, share=0.9).index_fill(0, seen, True)},
        "lora": {"lora": (a, b, 0.5)},
        "together": {**bias, **per_row, "softcap": 5.0, "logit_scale": 0.5, "lora": (a, b, 0.5)},
    }


def rows_of(names: str, *shape: int, trained: str, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    """Log-probabilities by name; those in ``trained`` require a gradient."""
    return {
        name: logps(*shape, seed=seed, dtype=dtype, grad=name in trained.split())
        for seed, name in enumerate(names.split(), start=20)
    }
