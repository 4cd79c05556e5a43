"""Rows of logits as the hidden states and the head that they come from, and what is asked of them from there."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from prefkern.head.logprobs import linear_token_logprobs
from prefkern.integrations.transformers.matrix import Matrix
from prefkern.losses.cross_entropy import linear_cross_entropy
from prefkern.types import Output, TokenStats

NO_TARGET = -(1 << 62)  # every index of a gather counts
_CHUNK = 1 << 24  # logits made at a time where the largest of each row is looked for


class Rows(NamedTuple):
    """``z = f(h W^T + b)`` over some columns of W, with f what the model and the trainer did to the products so far:
    ``scale y``, or ``cap tanh(scale y)``, divided by a temperature of each row."""

    hidden: Tensor  # [..., H]
    matrix: Matrix
    compute_dtype: torch.dtype
    columns: slice
    check: Callable[[], None]
    """Raises where the weight is no longer the one that these logits belong to."""
    scale: float = 1.0
    cap: float | None = None
    temperature: Tensor | None = None  # [..., 1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.vocabulary))

    @property
    def vocabulary(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that the logits are made of, but for the hidden states."""
        a, b, _ = self.matrix.lora or (None, None, 1.0)
        return [leaf for leaf in (self.matrix.weight, self.matrix.bias, a, b) if leaf is not None]

    # ------------------------------------------------------------------------------------- what is done to logits

    def times(self, factor: float) -> "Rows | None":
        """Returns the rows times a number; None where the logits would no longer be of the form."""
        if not math.isfinite(factor) or factor == 0.0:
            return None
        return self._replace(scale=self.scale * factor) if self.cap is None else self._replace(cap=self.cap * factor)

    def tanh(self) -> "Rows | None":
        return self._replace(cap=1.0) if self.cap is None and self.temperature is None else None

    def divided_by_rows(self, temperature: Tensor) -> "Rows | None":
        """Returns the rows divided by one positive number each, ``[..., 1]`` or what becomes that by expansion."""
        lead = self.hidden.shape[:-1]
        if temperature.requires_grad or not temperature.ndim or temperature.shape[-1] != 1:
            return None
        if temperature.ndim > len(lead) + 1 or any(
            have not in (1, want) for have, want in zip(temperature.shape[-2::-1], lead[::-1], strict=False)
        ):
            return None
        wide = temperature.to(torch.promote_types(temperature.dtype, torch.float32)).expand(*lead, 1)
        return self._replace(temperature=wide if self.temperature is None else self.temperature * wide)

    def cut(self, columns: slice) -> "Rows":
        start, stop, _ = columns.indices(self.vocabulary)
        first = self.columns.start
        return self._replace(columns=slice(first + start, first + max(start, stop)))

    def lead(self, function: Any) -> "Rows":
        """Returns the rows after a change of the leading dimensions, given as a function of a tensor ``[..., X]``."""
        temperature = None if self.temperature is None else function(self.temperature)
        return self._replace(hidden=function(self.hidden), temperature=temperature)

    def detached(self) -> "Rows":
        if not any(leaf.requires_grad for leaf in (self.hidden, *self.leaves)):
            return self
        lora = self.matrix.lora
        matrix = Matrix(
            self.matrix.weight.detach(),
            None if self.matrix.bias is None else self.matrix.bias.detach(),
            None if lora is None else (lora[0].detach(), lora[1].detach(), lora[2]),
            self.matrix.dropout,
        )
        return self._replace(hidden=self.hidden.detach(), matrix=matrix)

    # ------------------------------------------------------------------------------------- what is asked of them

    def stats(self, targets: Tensor, outputs: tuple[Output, ...] = ("logps",), *, grad: bool = False) -> TokenStats:
        """`linear_token_logprobs` of the rows; no target is ignored."""
        return linear_token_logprobs(
            self.hidden, targets=targets, outputs=outputs, entropy_grad=grad, ignore_index=NO_TARGET, **self._options()
        )

    def some_stats(self, outputs: tuple[Output, ...], *, grad: bool = False) -> TokenStats:
        """Statistics that depend on no target."""
        return self.stats(self.hidden.new_zeros(self.hidden.shape[:-1], dtype=torch.int64), outputs, grad=grad)

    def cross_entropy(self, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """``torch.nn.functional.cross_entropy``; a mean over no token at all is NaN, as there."""
        loss = linear_cross_entropy(
            self.hidden,
            targets=targets,
            ignore_index=ignore_index,
            reduction="none" if reduction == "none" else "sum",
            metrics=False,
            **self._options(),
        ).loss
        return loss / (targets != ignore_index).sum() if reduction == "mean" else loss

    def logits_at(self, index: Tensor) -> Tensor:
        """Returns the logits of the given tokens, ``[..., K]``, in float32 (float64)."""
        _, hidden = self._operands()
        rows = functional.embedding(self.columns.start + index, self.matrix.weight)
        y = self._dot(hidden, rows)
        if self.matrix.lora is not None:
            a, b, scale = self.matrix.lora
            inner = functional.linear(self.hidden.to(a.dtype), a).to(y.dtype)
            y = y + scale * self._dot(inner, functional.embedding(self.columns.start + index, b))
        if self.matrix.bias is not None:
            y = y + self.matrix.bias[self.columns.start + index].to(y.dtype)
        return self._form(y)

    def mean(self) -> Tensor | None:
        """Returns the mean logit of each row; None where its gradient would need all of them."""
        if self.cap is not None:
            return None if self._needs_grad() else self.some_stats(("mean_logit",)).mean_logit
        wide, hidden = self._operands()
        weight, columns = self.matrix.weight, self.columns
        y = hidden.to(wide) @ weight[columns].mean(0, dtype=wide)
        if self.matrix.lora is not None:
            a, b, scale = self.matrix.lora
            inner = functional.linear(self.hidden.to(a.dtype), a)
            y = y + scale * (inner.to(wide) @ b[columns].mean(0, dtype=wide))
        if self.matrix.bias is not None:
            y = y + self.matrix.bias[columns].mean(dtype=wide)
        return self._form(y.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def largest(self) -> tuple[Tensor, Tensor]:
        """Returns the largest logit of each row and its token, from a few rows at a time."""
        flat = self.detached().lead(lambda x: x.reshape(-1, x.shape[-1]))
        size = max(1, _CHUNK // max(1, self.vocabulary))
        found = []
        for start in range(0, len(flat.hidden), size):
            part = flat.lead(lambda x, start=start: x[start : start + size])
            found.append(part._form(part._products()).max(-1))
        lead = self.hidden.shape[:-1]
        if not found:
            return self.hidden.new_zeros(lead), self.hidden.new_zeros(lead, dtype=torch.int64)
        return torch.cat([each.values for each in found]).view(lead), torch.cat([each.indices for each in found]).view(
            lead
        )

    def _options(self) -> dict[str, Any]:
        self.check()
        weight, bias, lora, columns = self.matrix.weight, self.matrix.bias, self.matrix.lora, self.columns
        if self.vocabulary != len(weight):
            weight, bias = weight[columns], None if bias is None else bias[columns]
            lora = None if lora is None else (lora[0], lora[1][columns], lora[2])
        options: dict[str, Any] = {"weight": weight, "bias": bias, "lora": lora, "compute_dtype": self.compute_dtype}
        options["logit_scale"] = self.scale if self.cap is None else self.scale * self.cap
        options["softcap"] = None if self.cap is None else abs(self.cap)
        if self.temperature is not None:
            options["temperature"] = self.temperature.detach().squeeze(-1)
        return options

    def _form(self, y: Tensor) -> Tensor:
        """Returns the logits of products, ``[..., K]``."""
        z = self.scale * y if self.cap is None else self.cap * torch.tanh(self.scale * y)
        return z if self.temperature is None else z / self.temperature

    def _operands(self) -> tuple[torch.dtype, Tensor]:
        """The dtype of sums, and the hidden states as the head's products read them."""
        self.check()
        wide = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        return wide, self.hidden.to(self.compute_dtype)

    def _dot(self, hidden: Tensor, rows: Tensor) -> Tensor:
        rounded = rows.to(self.compute_dtype).to(torch.promote_types(hidden.dtype, torch.float32))
        return (hidden.to(rounded.dtype).unsqueeze(-2) * rounded).sum(-1)

    def _products(self) -> Tensor:
        weight, bias, lora, columns = self.matrix.weight, self.matrix.bias, self.matrix.lora, self.columns
        _, hidden = self._operands()
        y = functional.linear(hidden, weight[columns].to(self.compute_dtype)).to(self._operands()[0])
        if lora is not None:
            a, b, scale = lora
            y += scale * (functional.linear(functional.linear(self.hidden.to(a.dtype), a), b[columns])).to(y.dtype)
        return y if bias is None else y + bias[columns].to(y.dtype)

    def _needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (self.hidden, *self.leaves))
