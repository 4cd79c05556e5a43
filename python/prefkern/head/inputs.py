"""The options of the head, written once, and the checks of what every function on hidden states takes."""

import math
from typing import Annotated, NamedTuple, TypedDict

import torch
from torch import Tensor

from prefkern import check
from prefkern.options import FINITE, above
from prefkern.types import LoRA, Temperature


class Head(NamedTuple):
    """How a head makes logits of hidden states, and what a call may take: the options of `linear_token_logprobs`,
    complete. They travel as this object from the public door to the operators."""

    bias: Tensor | None = None
    temperature: Temperature = 1.0
    logit_scale: Annotated[float, FINITE] = 1.0
    softcap: Annotated[float | None, above(0.0)] = None
    ignore_index: int = -100
    vocab_mask: Tensor | None = None
    lora: LoRA | None = None
    compute_dtype: torch.dtype | None = None
    max_memory: int | float | str | None = None
    num_scored: int | None = None
    group: None = None


class HeadOptions(TypedDict, total=False):
    """The keywords of `linear_token_logprobs`, which every linear form takes and passes on."""

    bias: Tensor | None
    temperature: Temperature
    logit_scale: float
    softcap: float | None
    ignore_index: int
    vocab_mask: Tensor | None
    lora: LoRA | None
    compute_dtype: torch.dtype | None
    max_memory: int | float | str | None
    num_scored: int | None
    group: None


def check_head(where: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """Checks a head's tensors; their names begin with ``prefix``."""
    h, w, b = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    check.tensor(where, h, hidden)
    check.tensor(where, w, weight)
    check.floating(where, **{h: hidden, w: weight, b: bias})
    check.same_device(where, **{h: hidden, w: weight, b: bias})
    if type(weight).__name__ == "DTensor" or type(hidden).__name__ == "DTensor":
        check.fail_type(
            where,
            f"{h} and {w} must be plain tensors, got a DTensor: call this inside the wrapped "
            f"model's forward, or pass {w}.full_tensor()",
        )
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        check.fail(
            where,
            f"{h} must be [..., H] and {w} [V, H] with one H, got {check.describe(hidden)} and "
            f"{check.describe(weight)}",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        check.fail(where, f"{b} must be [V] = [{weight.shape[0]}], got {check.describe(bias)}")


def check_options(where: str, head: Head) -> Head:
    """Returns the options with ``num_scored`` as an int; refuses what is no number and what is reserved."""
    if head.group is not None:
        check.fail(where, "group is not supported by this version: gather the weight first")
    if isinstance(head.ignore_index, bool) or not isinstance(head.ignore_index, int):
        check.fail_type(where, f"ignore_index must be an int, got {head.ignore_index!r}")
    check.size(where, "max_memory", head.max_memory)
    return head._replace(num_scored=check.count(where, "num_scored", head.num_scored))


def adapter(where: str, lora: object, hidden: Tensor, V: int) -> tuple[Tensor, Tensor, float]:
    """Returns the checked adapter ``(A [r, H], B [V, r], scale)``."""
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


def allowed_only(where: str, vocab_mask: Tensor | None, bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """Returns the bias, with -inf at the tokens that the mask excludes."""
    if vocab_mask is None:
        return bias
    allowed = check.mask(where, "vocab_mask", vocab_mask, weight.shape[:1])
    check.same_device(where, weight=weight, vocab_mask=vocab_mask)
    assert allowed is not None
    return torch.where(allowed, weight.new_zeros(()) if bias is None else bias, -torch.inf)


def check_allowed(where: str, vocab_mask: Tensor | None, targets: Tensor, ignore_index: int) -> None:
    """On the CPU, every scored target is a token that the mask allows: another has the probability 0."""
    if vocab_mask is None or targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    scored = targets[targets != ignore_index]
    excluded = scored[vocab_mask[scored] == 0]
    if excluded.numel():
        check.fail(
            where,
            f"vocab_mask excludes {excluded.numel()} of {scored.numel()} scored targets, token {int(excluded[0])} "
            f"first, whose log-probability would be -inf: allow them, or give them ignore_index={ignore_index}",
        )


def compute_dtype_of(where: str, given: torch.dtype | None, hidden: Tensor) -> torch.dtype:
    """Returns the dtype of the operands: the given one, that of autocast where it is on, else that of ``hidden``."""
    device = hidden.device.type
    if given is None:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if given not in check.FLOATS:
        check.fail_type(where, f"compute_dtype must be float16, bfloat16, float32 or float64, got {given!r}")
    return given


class Reference(NamedTuple):
    """How a reference's head makes logits, complete.

    The temperature is that of the policy unless another is given; bias, scale and softcap are the model's own and are
    never taken from the policy's.
    """

    ref_bias: Tensor | None = None
    ref_temperature: Temperature | None = None
    ref_logit_scale: Annotated[float | None, FINITE] = None
    ref_softcap: float | None = None

    def head(self, where: str, policy: Head) -> Head:
        """Returns the options of its head beside the policy's, with the same ``ignore_index``, dtype and count.

        Neither bias, scale nor softcap is guessed from the policy's: two models may differ there.
        """
        for name, given, missing, none in (
            ("bias", policy.bias is not None, self.ref_bias is None, "zeros"),
            ("logit_scale", policy.logit_scale != 1.0, self.ref_logit_scale is None, "1.0"),
            ("softcap", policy.softcap is not None, self.ref_softcap is None, "math.inf"),
        ):
            if given and missing:
                check.fail(
                    where, f"{name} is given, so the reference's head needs its own: pass ref_{name} ({none}: none)"
                )
        softcap = None if self.ref_softcap == math.inf else self.ref_softcap
        if softcap is not None:
            softcap = check.number(where, "ref_softcap", softcap, low=0.0, open_low=True)
        return policy._replace(
            bias=self.ref_bias,
            temperature=policy.temperature if self.ref_temperature is None else self.ref_temperature,
            logit_scale=1.0 if self.ref_logit_scale is None else self.ref_logit_scale,
            softcap=softcap,
            lora=None,
            max_memory=None,
        )


class ReferenceOptions(TypedDict, total=False):
    """The keywords of a reference's head."""

    ref_bias: Tensor | None
    ref_temperature: Temperature | None
    ref_logit_scale: float | None
    ref_softcap: float | None
