"""The token statistics and their gradients by plain torch and autograd, in a dtype of choice.

With ``dtype=torch.float64`` (the default) they are the truth; with the operands' own dtype they are the plain eager
computation that a result is compared with. Row mathematics is float32 or wider in both.

Per row: ``x = softcap(logit_scale * (tile + bias))``, ``z = x / temperature``, ``softcap(v) = c tanh(v / c)``,
``lp_v = log_softmax(z)_v``. A logit of -inf stays -inf under the cap and has no gradient. Ignored rows are 0. A row
whose target is outside the vocabulary is NaN. A row whose every logit is -inf has ``lp = -inf`` and entropy 0.

``options`` are those of the waist: ``logit_scale``, ``softcap``, ``temperature`` (float or ``[N]``), ``ignore_index``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern.kernels.interface import RowStats
from prefkern.testing.inputs import IGNORE

_INF = float("inf")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


class _Logits(NamedTuple):
    x: Tensor  # before the temperature, -inf where masked
    slope: Tensor | float  # the softcap's derivative
    temperature: Tensor | float  # one per row as [N, 1]
    dead: Tensor  # [N, 1], every logit is -inf
    y: Tensor  # [N, 1], a legal column everywhere
    ignored: Tensor
    outside: Tensor


def _logits(
    tile: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = IGNORE,
) -> _Logits:
    raw = logit_scale * (tile if bias is None else tile + bias)
    masked = raw == -_INF
    t = None if softcap is None else torch.tanh(raw / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(tile.dtype)[:, None]
    ignored = targets == ignore_index
    outside = ((targets < 0) | (targets >= tile.shape[1])) & ~ignored
    return _Logits(
        x=(raw if softcap is None or t is None else softcap * t).masked_fill(masked, -_INF),
        slope=1.0 if t is None else ((1 - t) * (1 + t)).detach(),
        temperature=temperature,
        dead=masked.all(-1, keepdim=True),
        y=targets.long().masked_fill(ignored | outside, 0)[:, None],
        ignored=ignored,
        outside=outside,
    )


def _statistics(tile: Tensor, bias: Tensor | None, targets: Tensor, options: dict[str, Any]) -> RowStats:
    at = _logits(tile, bias, targets, **options)
    logp = torch.log_softmax((at.x / at.temperature).masked_fill(at.dead, 0.0), -1)
    fixed, dead = at.x.detach(), at.dead.squeeze(1)
    row_max = fixed.amax(-1)
    spread = (fixed - row_max.masked_fill(dead, 0.0)[:, None]) / at.temperature
    entropy = -(logp.exp() * logp.masked_fill(logp == -_INF, 0.0)).sum(-1)
    lp = logp.gather(1, at.y).squeeze(1).masked_fill(dead, -_INF)

    def final(value: Tensor) -> Tensor:
        return value.masked_fill(at.outside, float("nan")).masked_fill(at.ignored, 0.0)

    return RowStats(
        logps=final(lp),
        row_max=final(row_max),
        log_sum=final(spread.logsumexp(-1).masked_fill(dead, 0.0)),
        entropy=final(entropy.masked_fill(dead, 0.0)),
        log_sum_sq_probs=final((2 * logp.detach()).logsumexp(-1).masked_fill(dead, -_INF)),
        mean_logit=final((fixed / at.temperature).mean(-1)),
        is_top1=(fixed.argmax(-1) == targets) & ~at.ignored,
    )


def stats_from_logits(
    logits: Tensor, targets: Tensor, *, dtype: torch.dtype = torch.float64, bias: Tensor | None = None, **options: Any
) -> RowStats:
    """Row statistics of ``logits [N, V]``, differentiable in ``logps`` and ``entropy``."""
    wide = _wide(dtype)
    return _statistics(logits.to(dtype).to(wide), _cast(bias, wide), targets, options)


def stats_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    bias: Tensor | None = None,
    **options: Any,
) -> RowStats:
    """Row statistics of ``hidden [N, H] @ weight [V, H].T``, whose product is made (and rounded) in ``dtype``."""
    wide = _wide(dtype)
    tile = hidden.to(dtype) @ weight.to(dtype).T
    return _statistics(tile.to(wide), _cast(bias, wide), targets, options)


def _differentiate(stats: RowStats, leaves: list[Tensor], c: Tensor | None, e: Tensor | None) -> list[Tensor]:
    """Gradients of ``sum c lp + e entropy``, taken from the outputs: a value of -inf has a finite gradient too."""
    pairs = [(value, factor) for value, factor in ((stats.logps, c), (stats.entropy, e)) if factor is not None]
    outputs = [value for value, _ in pairs if value is not None]
    factors = [factor.to(value.dtype) for value, factor in pairs if value is not None]
    return list(torch.autograd.grad(outputs, leaves, factors))


def grads_from_logits(
    logits: Tensor,
    targets: Tensor,
    c: Tensor | None,
    e: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``d/d logits`` of ``sum_t c_t lp_t + e_t entropy_t`` by autograd, rounded to ``dtype``."""
    leaf = logits.detach().to(dtype).requires_grad_()
    stats = stats_from_logits(leaf, targets, dtype=dtype, bias=bias, **options)
    (grad,) = _differentiate(stats, [leaf], c, e)
    return grad.masked_fill(stats.logps.isnan()[:, None], float("nan"))


def unscaled_from_logits(
    logits: Tensor, targets: Tensor, *, dtype: torch.dtype = torch.float64, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The unscaled gradient ``u_v = (p_v - 1[v = y]) (1 - t_v)(1 + t_v)``, in closed form, rounded to ``dtype``.

    It is ``d(-lp)/d tile`` without the row's factor ``logit_scale / temperature``; 0 at every -inf, also at the target.
    """
    wide = _wide(dtype)
    at = _logits(logits.to(dtype).to(wide), _cast(bias, wide), targets, **options)
    p = torch.softmax((at.x / at.temperature).masked_fill(at.dead, 0.0), -1)
    u = (p - torch.zeros_like(p).scatter(1, at.y, 1.0)).masked_fill(at.x == -_INF, 0.0) * at.slope
    u = u.masked_fill(at.ignored[:, None], 0.0).masked_fill(at.outside[:, None], float("nan"))
    return u.to(dtype)


class HeadGrads(NamedTuple):
    """Gradients of a head, shaped like their inputs; ``bias`` is None where the head has none."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def grads_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    c: Tensor | None,
    e: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    bias: Tensor | None = None,
    **options: Any,
) -> HeadGrads:
    """Gradients of ``sum_t c_t lp_t + e_t entropy_t`` by autograd through :func:`stats_from_hidden`, in ``dtype``."""
    given = [hidden, weight] if bias is None else [hidden, weight, bias]
    leaves = [value.detach().to(dtype).requires_grad_() for value in given]
    shift = None if bias is None else leaves[2]
    stats = stats_from_hidden(leaves[0], leaves[1], targets, dtype=dtype, bias=shift, **options)
    grads = _differentiate(stats, leaves, c, e)
    return HeadGrads(grads[0], grads[1], None if bias is None else grads[2])
