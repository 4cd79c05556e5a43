"""What every function on hidden states requires of the head, and its options turned into operands."""

import math

import torch
from torch import Tensor

from prefkern import check


def check_head(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    compute_dtype: torch.dtype | None,
    max_memory: int | None,
    num_scored: int | None,
    group: None,
) -> torch.dtype:
    """Checks the head's arguments, named ``where``; returns the compute dtype."""
    for name, required in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check.tensor(where, name, required)
    check.floating(where, hidden=hidden, weight=weight, bias=bias)
    check.same_device(where, hidden=hidden, weight=weight, bias=bias, targets=targets)
    if group is not None:
        check.fail(where, "group is not supported by this version: gather the weight first")
    if type(weight).__name__ == "DTensor" or type(hidden).__name__ == "DTensor":
        check.fail_type(
            where,
            "hidden and weight must be plain tensors, got a DTensor: call this inside the wrapped "
            "model's forward, or pass weight.full_tensor()",
        )
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        check.fail(
            where,
            "hidden must be [..., H] and weight [V, H] with one H, got "
            f"{check.describe(hidden)} and {check.describe(weight)}",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        check.fail(where, f"bias must be [V] = [{weight.shape[0]}], got {check.describe(bias)}")
    check.number(where, "logit_scale", logit_scale)
    for name, count in (("max_memory", max_memory), ("num_scored", num_scored)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            check.fail(where, f"{name} must be None or an int >= 0, got {count!r}")
    return compute_dtype_of(where, compute_dtype, hidden)


def adapter(where: str, lora: object, hidden: Tensor, V: int) -> tuple[Tensor, Tensor, float]:
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        check.fail_type(where, f"lora must be (A [r, H], B [V, r], scale), got {check.describe(lora)}")
    a, b, scale = lora
    for name, value in (("lora A", a), ("lora B", b)):
        check.tensor(where, name, value)
    check.floating(where, **{"lora A": a, "lora B": b})
    check.same_device(where, hidden=hidden, **{"lora A": a, "lora B": b})
    H = hidden.shape[-1]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != H or b.shape[0] != V or a.shape[0] != b.shape[1] or not a.shape[0]:
        check.fail(
            where,
            f"lora must be A [r, H = {H}] and B [V = {V}, r] with one r >= 1, got {check.describe(a)} and "
            f"{check.describe(b)}",
        )
    return a, b, check.number(where, "lora's scale", scale)


def allowed_only(where: str, vocab_mask: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """The bias, and -inf at the tokens that are not allowed."""
    allowed = check.mask(where, "vocab_mask", vocab_mask, weight.shape[:1])
    check.same_device(where, weight=weight, vocab_mask=vocab_mask)
    assert allowed is not None
    return torch.where(allowed, weight.new_zeros(()) if bias is None else bias, -torch.inf)


def compute_dtype_of(where: str, given: torch.dtype | None, hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if given is None:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if given not in check.FLOATS:
        check.fail_type(where, f"compute_dtype must be float16, bfloat16, float32 or float64, got {given!r}")
    return given


def reference_form(
    where: str,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ref_bias: Tensor | None,
    ref_logit_scale: float | None,
    ref_softcap: float | None,
) -> tuple[float, float | None]:
    """The reference's scale and softcap. Neither is guessed from the policy's: two models may differ there."""
    for name, given, missing, none in (
        ("bias", bias is not None, ref_bias is None, "zeros"),
        ("logit_scale", logit_scale != 1.0, ref_logit_scale is None, "1.0"),
        ("softcap", softcap is not None, ref_softcap is None, "math.inf"),
    ):
        if given and missing:
            check.fail(where, f"{name} is given, so the reference's head needs its own: pass ref_{name} ({none}: none)")
    return (
        1.0 if ref_logit_scale is None else ref_logit_scale,
        None if ref_softcap == math.inf else ref_softcap,
    )
