"""The options of the waist, written once for every linear form, and the reference's log-probabilities."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import reference_form
from prefkern.head.logprobs import linear_token_logprobs
from prefkern.types import LoRA, Temperature


class Head(NamedTuple):
    """The options of ``linear_token_logprobs`` that every linear form takes and passes on, in its order: all but
    ``outputs`` and ``entropy_grad``, which the loss decides."""

    bias: Tensor | None
    temperature: Temperature
    logit_scale: float
    softcap: float | None
    ignore_index: int
    vocab_mask: Tensor | None
    lora: LoRA | None
    compute_dtype: torch.dtype | None
    max_memory: int | None
    num_scored: int | None
    group: None


class Reference(NamedTuple):
    """A reference model, by its log-probabilities or by its hidden states and head; or none.

    The temperature is that of the policy unless another is given; the bias, scale and softcap are the model's own and
    are never taken from the policy's.
    """

    ref_logps: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    ref_temperature: Temperature | None
    ref_logit_scale: float | None
    ref_softcap: float | None

    def per_sequence(
        self, where: str, shape: str, head: Head, targets: Tensor, rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``ref_logps``, of this shape, or ``rows`` of the log-probabilities that its head gives the targets."""
        logps = self.per_token(where, head, targets, shape)
        if logps is None:
            check.fail(where, f"the reference must be {_either(shape)}, got none")
        return logps if self.ref_logps is not None else rows(logps)

    def per_token(self, where: str, head: Head, targets: Tensor, shape: str = "shaped like targets") -> Tensor | None:
        """``ref_logps``, or what its head gives the targets, without a gradient; None where there is no reference."""
        if all(value is None for value in self[1:]):
            return self.ref_logps
        if self.ref_logps is not None or self.ref_hidden is None or self.ref_weight is None:
            check.fail(where, f"the reference must be {_either(shape)}")
        form = head.bias, head.logit_scale, head.softcap
        logit_scale, softcap = reference_form(where, *form, self.ref_bias, self.ref_logit_scale, self.ref_softcap)
        check.number(where, "ref_logit_scale", logit_scale)
        if softcap is not None:
            check.number(where, "ref_softcap", softcap, low=0.0, open_low=True)
        options = head._replace(
            bias=self.ref_bias, logit_scale=logit_scale, softcap=softcap, lora=None, max_memory=None
        )
        if self.ref_temperature is not None:
            options = options._replace(temperature=self.ref_temperature)
        with torch.no_grad():
            return linear_token_logprobs(self.ref_hidden, self.ref_weight, targets, **options._asdict()).logps


def _either(shape: str) -> str:
    return f"either ref_logps {shape}, or ref_hidden and ref_weight"
