"""What the operators of every file have in common: schemas, registration, and dispatch by the tensor's device."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefkern import reference
from prefkern._check import require
from prefkern.products import wide_dtype
from prefkern.tiles import Logits
from prefkern.types import RowStats, Temperature

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
LOGITS = "Tensor? row_temperature, float temperature, float? softcap, int ignore_index"
STATS = (
    "Tensor logps, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logit, "
    "Tensor is_top1"
)

_library = torch.library.Library("prefkern", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., None] | None = None,
) -> None:
    """Defines the operator ``prefkern::name(...)`` of a schema for every device, with its fake and its gradient."""
    name = schema[: schema.index("(")]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, _outside_autocast(run), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"prefkern::{name}", fake, lib=_library)
    torch.library.register_autograd(f"prefkern::{name}", backward, setup_context=setup, lib=_library)


def _outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """The operands' dtype is decided by the wrapper: autocast must not cast inside, where a product is float32."""

    def outside(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *args)

    return outside


def no_second_derivative(what: str, instead: str) -> Callable[..., NoReturn]:
    """The backward of a backward."""

    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"prefkern: {what} have no second derivative (create_graph=True, torch.func.hessian ...); for one, compute "
            f"them with {instead}"
        )

    return refuse


def kernels_for(like: Tensor, name: str, plain: ModuleType = reference) -> Any:
    """The Triton kernels on CUDA (and ROCm) tensors; plain torch elsewhere, and for float64 everywhere."""
    if like.is_cuda and like.dtype != torch.float64:
        return require(f"prefkern.kernels.{name}", "prefkern on an accelerator", "install it with: pip install triton")
    return plain


def empty_stats(rows: Tensor, targets: Tensor, outputs: list[str], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """logps, row_max, log_sum and the optional statistics of every row; those not asked for have no elements."""
    N, wide = rows.shape[0], wide_dtype(dtype)
    always = [rows.new_empty(shape, dtype=wide) for shape in (targets.shape, (N,), (N,))]
    optional = [
        rows.new_empty(N if name in outputs else 0, dtype=torch.bool if name == "is_top1" else wide)
        for name in OPTIONAL
    ]
    return *always, *optional


def row_stats(tensors: tuple[Tensor, ...], outputs: list[str]) -> RowStats:
    given = (value if name in outputs else None for name, value in zip(OPTIONAL, tensors[3:7], strict=True))
    return RowStats(*tensors[:3], *given)


def temperature_of(rows: Tensor | None, scalar: float) -> Temperature:
    return scalar if rows is None else rows


def logits_of(
    bias: Tensor | None,
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    row_temperature: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> Logits:
    wide_bias = None if bias is None else bias.to(wide_dtype(dtype))
    return Logits(wide_bias, logit_scale, softcap, temperature_of(row_temperature, temperature), ignore_index)
