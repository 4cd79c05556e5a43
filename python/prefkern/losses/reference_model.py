"""A reference model of a linear form: by its log-probabilities, or by its hidden states and head; or none."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern import check
from prefkern.head.inputs import Head, Reference, check_head
from prefkern.head.logprobs import token_stats


class ReferenceModel(NamedTuple):
    """What a linear form was given of the reference."""

    logps: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    form: Reference

    def per_sequence(
        self, where: str, shape: str, head: Head, targets: Tensor, rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Returns ``ref_logps``, of this shape, or ``rows`` of the log-probabilities that its head gives."""
        logps = self.per_token(where, head, targets, shape)
        if logps is None:
            check.fail(where, f"the reference must be {_either(shape)}, got none")
        return logps if self.logps is not None else rows(logps)

    def per_token(self, where: str, head: Head, targets: Tensor, shape: str = "shaped like targets") -> Tensor | None:
        """Returns ``ref_logps``, or what its head gives the targets, without a gradient; None without a reference."""
        if self.hidden is None and self.weight is None and all(value is None for value in self.form):
            return self.logps
        if self.logps is not None or self.hidden is None or self.weight is None:
            check.fail(where, f"the reference must be {_either(shape)}")
        reference = self.form.head(where, head)
        check_head(where, self.hidden, self.weight, reference.bias, prefix="ref_")
        with torch.no_grad():
            return token_stats(where, self.hidden, self.weight, targets, reference).logps


def _either(shape: str) -> str:
    return f"either ref_logps {shape}, or ref_hidden and ref_weight"
