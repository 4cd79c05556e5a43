"""The waist: logits, or hidden states and the output matrix, to per-token log-probabilities.

Every loss of this library is ordinary autograd on what these two functions return. Checks and casts of the rows happen
here; the work is in the operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefkern import _check, plan
from prefkern.ops import OPTIONAL
from prefkern.types import Output, Temperature, TokenStats


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Temperature = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
) -> TokenStats:
    """Log-probability of each target under ``softmax(z)``, ``z = softcap(logits) / temperature``.

    ``logp = z_y - log sum_v exp z_v`` in float32 whatever the dtype of the logits (float64 for float64), computed as
    ``(x_y - max x) / T - log sum``, so that an offset common to all logits costs no accuracy. Never above 0.

    Args:
        logits: ``[..., V]``; float16, bfloat16, float32 or float64. Entries of -inf are legal: their probability and
            gradient are 0.
        targets: ``[...]`` int64 or int32, aligned: row t of the logits is scored against ``targets[t]``.
        temperature: a positive number, or a tensor of one per row, shaped like ``targets``.
        softcap: ``c tanh(x / c)`` applied before the temperature.
        ignore_index: targets with this value are not scored: 0 in every result, no gradient.
        outputs: which fields to compute, among ``logps``, ``entropy``, ``log_sum_sq_probs``, ``mean_logit`` and
            ``is_top1``; ``logps`` is always computed.
        entropy_grad: whether the entropy carries a gradient, ``d entropy / dz = -p (log p + entropy)``.

    Raises:
        ValueError, TypeError: with the argument's name, what was expected and what was got. A target outside the
            vocabulary is an error on the CPU; on an accelerator that token becomes NaN instead of waiting for it.
    """
    where = "token_logprobs"
    _check.tensor(where, "logits", logits)
    _check.tensor(where, "targets", targets)
    _check.floating(where, logits=logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        _check.fail(where, f"logits must be [..., V] with V >= 1, got {_check.describe(logits)}")
    rows = _Rows(where, logits, targets, temperature, softcap, ignore_index, outputs, entropy_grad, logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    results = torch.ops.prefkern.logprobs_fwd(flat, *rows.arguments, list(rows.outputs))
    return rows.stats(results)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Temperature = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[Output] = ("logps",),
    entropy_grad: bool = False,
    lora: None = None,
    compute_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    num_scored: int | None = None,
    group: None = None,
) -> TokenStats:
    """Log-probability of each target under the head ``z = softcap(logit_scale (h W^T + b)) / temperature``, without
    the [N, V] logits: 3 matrix products with their backward (2 for a frozen weight, 1 without gradients).

    The products take operands of ``compute_dtype`` and accumulate in float32; logits are never rounded to 16 bits, so
    the log-probabilities are as exact as float32 ones. Differentiable once, in ``hidden``, ``weight`` and ``bias``.
    Do not wrap it in ``torch.utils.checkpoint``, which would run its product twice: it already keeps what it needs.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``, the output embedding.
        targets: ``[...]`` int64 or int32, aligned: row t of ``hidden`` is scored against ``targets[t]``
            (`shift_labels` makes them from input ids).
        bias: ``[V]``.
        temperature: a positive number, or a tensor of one per row, shaped like ``targets``.
        logit_scale, softcap: as the model's configuration names them.
        ignore_index: targets with this value are not scored: 0 in every result, no gradient, and no product where
            their number is known.
        outputs, entropy_grad: as in `token_logprobs`.
        compute_dtype: dtype of the operands; default: the autocast dtype where autocast is on, else that of ``hidden``.
        max_memory: bytes that may stay held from forward to backward. 0 recomputes all logits (4 products); None is
            the plan's default: ``4 V H`` bytes, at least 1 GiB.
        num_scored: how many targets are scored, where the caller knows: spares an accelerator the wait for the count.
        lora, group: reserved; must be None.

    Raises:
        ValueError, TypeError: as `token_logprobs`.
    """
    where = "linear_token_logprobs"
    for name, required in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        _check.tensor(where, name, required)
    _check.floating(where, hidden=hidden, weight=weight, bias=bias)
    _check.same_device(where, hidden=hidden, weight=weight, bias=bias, targets=targets)
    for name, value in (("lora", lora), ("group", group)):
        if value is not None:
            _check.fail(where, f"{name} is not supported by this version: merge the adapter or gather the weight first")
    if type(weight).__name__ == "DTensor" or type(hidden).__name__ == "DTensor":
        _check.fail_type(
            where,
            "hidden and weight must be plain tensors, got a DTensor: call this inside the wrapped "
            "model's forward, or pass weight.full_tensor()",
        )
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        _check.fail(
            where,
            "hidden must be [..., H] and weight [V, H] with one H, got "
            f"{_check.describe(hidden)} and {_check.describe(weight)}",
        )
    V, H = weight.shape
    if bias is not None and bias.shape != (V,):
        _check.fail(where, f"bias must be [V] = [{V}], got {_check.describe(bias)}")
    _check.number(where, "logit_scale", logit_scale)
    for name, count in (("max_memory", max_memory), ("num_scored", num_scored)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            _check.fail(where, f"{name} must be None or an int >= 0, got {count!r}")
    dtype = _compute_dtype(where, compute_dtype, hidden)

    rows = _Rows(where, hidden, targets, temperature, softcap, ignore_index, outputs, entropy_grad, V)
    flat = rows.compact(hidden.reshape(-1, H), num_scored)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    k_max = plan.max_held_rows(H, V, dtype.itemsize, max_memory) if needs_grad else 0
    # the operators compute in `compute_dtype`; autocast must not touch their inputs a second time
    results = torch.ops.prefkern.linear_logprobs_fwd(
        flat, weight, bias, *rows.arguments, float(logit_scale), list(rows.outputs), dtype, k_max
    )
    return rows.stats(results)


def _compute_dtype(where: str, given: torch.dtype | None, hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if given is None:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if given not in _check.FLOATS:
        _check.fail_type(where, f"compute_dtype must be float16, bfloat16, float32 or float64, got {given!r}")
    return given


class _Rows:
    """Targets and temperature as flat rows, what is to be computed for each, and the way back to their shape."""

    def __init__(
        self,
        where: str,
        source: Tensor,
        targets: Tensor,
        temperature: Temperature,
        softcap: float | None,
        ignore_index: int,
        outputs: Sequence[Output],
        entropy_grad: bool,
        V: int,
    ) -> None:
        _check.no_functorch(where)
        _check.integer(where, targets=targets)
        _check.same_device(where, **{"logits" if where == "token_logprobs" else "hidden": source}, targets=targets)
        if targets.shape != source.shape[:-1]:
            kind = (
                "several targets per row are not supported by this version"
                if (targets.shape[:-1] == source.shape[:-1] and targets.ndim == source.ndim)
                else "one per row"
            )
            _check.fail(
                where, f"targets must have shape {tuple(source.shape[:-1])} ({kind}), got {_check.describe(targets)}"
            )
        if softcap is not None:
            _check.number(where, "softcap", softcap, low=0.0, open_low=True)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            _check.fail_type(where, f"ignore_index must be an int, got {ignore_index!r}")
        for name in outputs:
            _check.one_of(where, "every entry of outputs", name, ("logps", *OPTIONAL))
        if entropy_grad and "entropy" not in outputs:
            _check.fail(where, f"entropy_grad=True needs 'entropy' in outputs, got outputs={tuple(outputs)!r}")
        self._where = where
        self._shape = targets.shape
        self._index: Tensor | None = None
        self._poison: Tensor | None = None
        self._entropy_grad = entropy_grad
        self.outputs = tuple(name for name in OPTIONAL if name in outputs)
        self._targets = targets.reshape(-1).to(torch.int64).contiguous()
        self._temperature = self._check_temperature(temperature)
        self._softcap = None if softcap is None else float(softcap)
        self._ignore_index = ignore_index
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = ((self._targets < 0) | (self._targets >= V)) & (self._targets != ignore_index)
            if outside.any():
                row = int(outside.nonzero()[0])
                _check.fail(
                    where,
                    f"targets must lie in [0, {V}) or be ignore_index={ignore_index}, "
                    f"got {int(self._targets[row])} at row {row}",
                )

    def _check_temperature(self, temperature: Temperature) -> Temperature:
        if not isinstance(temperature, Tensor):
            return _check.number(self._where, "temperature", temperature, low=0.0, open_low=True)
        _check.floating(self._where, temperature=temperature)
        if temperature.shape != self._shape or temperature.device != self._targets.device:
            _check.fail(
                self._where,
                f"temperature must be a number or a tensor shaped like targets "
                f"{tuple(self._shape)}, got {_check.describe(temperature)}",
            )
        if temperature.requires_grad:
            _check.fail(self._where, "temperature gets no gradient: pass temperature.detach(), or divide the logits")
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not (temperature > 0).all():
            _check.fail(self._where, "temperature must be positive in every row")
        wide = torch.float64 if temperature.dtype == torch.float64 else torch.float32
        return temperature.reshape(-1).to(wide).contiguous()

    def compact(self, rows: Tensor, num_scored: int | None) -> Tensor:
        """Only the scored rows: without a wait where their number is known, after one ``nonzero`` in eager mode;
        under compilation or graph capture all rows are kept, since shapes must not depend on values."""
        N = self._targets.shape[0]
        on_cpu = rows.device.type == "cpu"
        if torch.compiler.is_compiling() or (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
            return rows
        if num_scored == N and not on_cpu:
            return rows
        scored = self._targets != self._ignore_index
        if on_cpu or num_scored is None:
            index = scored.nonzero().squeeze(-1)
            if num_scored is not None and index.shape[0] != num_scored:
                _check.fail(
                    self._where, f"num_scored must be the number of scored targets, {index.shape[0]}, got {num_scored}"
                )
        else:
            index = torch.nonzero_static(scored, size=num_scored, fill_value=0).squeeze(-1)
            # a wrong count must not give a plausible number, and checking it must not wait for the device
            self._poison = torch.where(scored.sum() == num_scored, 0.0, torch.nan)
        if index.shape[0] == N:
            return rows
        self._index = index
        self._targets = self._targets[index]
        if isinstance(self._temperature, Tensor):
            self._temperature = self._temperature[index]
        return rows.index_select(0, index)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """targets, row_temperature, temperature, softcap, ignore_index: as every operator takes them."""
        per_row = isinstance(self._temperature, Tensor)
        return (
            self._targets,
            self._temperature if per_row else None,
            1.0 if per_row else self._temperature,
            self._softcap,
            self._ignore_index,
        )

    def stats(self, results: Sequence[Tensor]) -> TokenStats:
        """Back to the shape of the targets; 0 where not scored."""
        logps = results[0] if self._poison is None else results[0] + self._poison
        named = dict(zip(OPTIONAL, results[3:7], strict=True))
        if not self._entropy_grad:
            named["entropy"] = named["entropy"].detach()
        return TokenStats(self._full(logps), *(self._full(named[n]) if n in self.outputs else None for n in OPTIONAL))

    def _full(self, value: Tensor) -> Tensor:
        if self._index is not None:
            N = self._shape.numel()
            value = value.new_zeros(N).index_copy(0, self._index, value)
        return value.view(self._shape)
