"""Shared by the operators of every file: schemas, registration, and dispatch by the tensor's device."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefkern.check import require

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
    """Returns the same without autocast: the wrapper has decided the operands' dtype, and a float32 product stays
    one."""

    def outside(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *args)

    return outside


def no_second_derivative(what: str, instead: str) -> Callable[..., NoReturn]:
    """Returns the backward of a backward, which refuses."""

    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"prefkern: {what} have no second derivative (create_graph=True, torch.func.hessian ...); for one, compute "
            f"them with {instead}"
        )

    return refuse


def implementation(like: Tensor, kernels: str, plain: ModuleType) -> Any:
    """Returns the Triton kernels of that name for CUDA (and ROCm) tensors; ``plain`` elsewhere, and for float64."""
    if like.is_cuda and like.dtype != torch.float64:
        name = f"prefkern.kernels.triton.{kernels}"
        return require(name, "prefkern on an accelerator", "install it with: pip install triton")
    return plain
