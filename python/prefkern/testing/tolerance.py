"""Tolerance is derived, not chosen: a result may err as much as the plain computation in its dtype does, times two."""

import torch
from torch import Tensor


def assert_not_worse(
    got: Tensor,
    want64: Tensor,
    eager: Tensor,
    *,
    dtype: torch.dtype | None = None,
    name: str = "result",
    factor: float = 2.0,
    dim: int | None = None,
) -> None:
    """``max |got - want| <= factor * max |eager - want| + eps * max |want|``, else an AssertionError with both errors.

    ``want64`` is the float64 oracle, ``eager`` the plain computation in the same dtype, ``eps`` the rounding of
    ``dtype`` (default: that of ``got``). With ``dim`` the maxima run along that dimension only: each row stands by
    itself. NaN and infinities must stand exactly where the oracle has them.
    """
    assert got.shape == want64.shape == eager.shape, f"{name}: shapes {got.shape}, {want64.shape}, {eager.shape}"
    found, want, plain = (value.detach().double().cpu() for value in (got, want64, eager))
    finite = want.isfinite()
    same = torch.where(finite, found.isfinite(), (found == want) | (found.isnan() & want.isnan()))
    if not bool(same.all()):
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} elements should be finite and are not, or the other way "
            f"round; the first at {at}: got {found[at].item()}, expected {want[at].item()}"
        )
    if not found.numel():
        return

    def largest(value: Tensor, where: Tensor) -> Tensor:
        size = value.masked_fill(~where, 0.0).abs()
        return size.amax() if dim is None else size.amax(dim)

    error, reference = largest(found - want, finite), largest(plain - want, finite & plain.isfinite())
    rounding = torch.finfo(dtype or got.dtype).eps * largest(want, finite)
    excess = error - (factor * reference + rounding)
    if bool((excess > 0).any()):
        at_worst = int(excess.argmax())
        raise AssertionError(
            f"{name}: error {error.flatten()[at_worst]:.3e} against float64, allowed {factor:g} x that of eager "
            f"{reference.flatten()[at_worst]:.3e} + a rounding of {rounding.flatten()[at_worst]:.3e}"
            + ("" if dim is None else f" (row {at_worst})")
        )
