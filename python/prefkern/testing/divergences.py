"""Divergences of two heads and their gradients by plain torch and autograd, in a dtype of choice: the direct formulas.

As in `prefkern.testing.oracles`: with ``dtype=torch.float64`` (the default) the truth, with the operands' own dtype the
plain eager computation; row mathematics is float32 or wider. ``beta`` is 0 for KL(q || p), 1 for KL(p || q), between
them the generalised Jensen-Shannon divergence ``beta KL(q || m) + (1 - beta) KL(p || m)``, m = (1 - beta) p + beta q.

A term with no probability in front is 0; one with none behind only is infinite. A row without a finite logit is NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.kernels.interface import Logits
from prefkern.testing.inputs import HeadCase, head_case
from prefkern.testing.oracles import HeadGrads, _cast, _logits, _wide

_INF = float("inf")
_PLAIN = Logits()


class DivergenceCase(NamedTuple):
    """A seeded policy and reference: ``hidden [N, H]``, ``weight [V, H]``, ``bias [V]`` or None, and the targets."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    targets: Tensor


def divergence_case(
    n: int,
    h: int,
    ref_h: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    ref_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 2.0,
    bias: bool = False,
    ignored: float = 0.2,
    confident: float = 0.2,
    masked: float = 0.0,
) -> DivergenceCase:
    """Two heads of their own widths; with ``masked`` the same columns of both are -inf (in the bias)."""

    def head(width: int, kind: torch.dtype, seed: int) -> HeadCase:
        return head_case(
            n,
            width,
            v,
            dtype=kind,
            device=device,
            seed=seed,
            scale=scale,
            bias=bias,
            ignored=ignored,
            confident=confident,
        )

    policy, reference = head(h, dtype, seed), head(ref_h, ref_dtype or dtype, seed + 1)
    biases = [policy.bias, reference.bias]
    if masked:
        columns = torch.rand(v, generator=torch.Generator().manual_seed(seed)) < masked
        biases = [None if b is None else b.masked_fill(columns.to(device), -_INF) for b in biases]
    return DivergenceCase(
        policy.hidden, policy.weight, biases[0], reference.hidden, reference.weight, biases[1], policy.targets
    )


def _log_probs(tile: Tensor, form: Logits) -> tuple[Tensor, Tensor | float]:
    """Log-probabilities and the softcap's derivative."""
    none = torch.zeros(len(tile), dtype=torch.int64, device=tile.device)
    options = form._asdict()
    at = _logits(tile, _cast(options.pop("bias"), tile.dtype), none, **options)
    return torch.log_softmax(at.x / at.temperature, -1), at.slope


def _gap(lp: Tensor, lq: Tensor) -> Tensor:
    """``p (log p - log q)`` of each entry."""
    empty, open_ = lp == -_INF, (lq == -_INF) & (lp > -_INF)
    a, b = lp.masked_fill(empty, 0.0), lq.masked_fill(lq == -_INF, 0.0)
    return (lp.exp() * (a - b)).masked_fill(empty, 0.0).masked_fill(open_, _INF)


def _mixture(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    neither = (lp == -_INF) & (lq == -_INF)
    a, b = lp.masked_fill(neither, 0.0), lq.masked_fill(neither, 0.0)
    return torch.logaddexp(a + math.log1p(-beta), b + math.log(beta)).masked_fill(neither, -_INF)


def _divergence(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return _gap(lq, lp).sum(-1)
    if beta == 1.0:
        return _gap(lp, lq).sum(-1)
    lm = _mixture(lp, lq, beta)
    return beta * _gap(lq, lm).sum(-1) + (1.0 - beta) * _gap(lp, lm).sum(-1)


def divergence_from_logits(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    beta: float,
    scored: Tensor | None = None,
    form: Logits = _PLAIN,
    ref_form: Logits = _PLAIN,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The divergence of each row of ``logits [N, V]`` (or raw products) from ``ref_logits``; 0 where not ``scored``."""
    tiles = [tile.to(dtype).to(_wide(dtype)) for tile in (logits, ref_logits)]
    value = _divergence(_log_probs(tiles[0], form)[0], _log_probs(tiles[1], ref_form)[0], beta)
    return value if scored is None else value.masked_fill(~scored, 0.0)


def unscaled_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    beta: float,
    scored: Tensor | None = None,
    form: Logits = _PLAIN,
    ref_form: Logits = _PLAIN,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``dD / d tile`` without the row's factor ``logit_scale / temperature``, in closed form, rounded to ``dtype``.

    0 at every logit of -inf; NaN elsewhere in a row whose reverse divergence is infinite.
    """
    tiles = [tile.to(dtype).to(_wide(dtype)) for tile in (logits, ref_logits)]
    (lp, slope), (lq, _) = _log_probs(tiles[0], form), _log_probs(tiles[1], ref_form)
    p = lp.exp()
    if beta == 0.0:
        u = p - lq.exp()
    else:
        gap = _gap(lp, lq if beta == 1.0 else _mixture(lp, lq, beta))
        center = gap.sum(-1, keepdim=True)
        u = (1.0 if beta == 1.0 else 1.0 - beta) * (gap - p * center.masked_fill(center == _INF, float("nan")))
    u = u.masked_fill(lp == -_INF, 0.0) * slope
    u = u if scored is None else u.masked_fill(~scored[:, None], 0.0)
    return u.to(dtype)


def divergence_from_hidden(
    case: DivergenceCase,
    *,
    beta: float,
    scored: Tensor | None = None,
    form: Logits = _PLAIN,
    ref_form: Logits = _PLAIN,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The divergence of two heads whose products are made (and rounded) in ``dtype``; their biases are the case's."""
    tiles = [h.to(dtype) @ w.to(dtype).T for h, w in ((case.hidden, case.weight), (case.ref_hidden, case.ref_weight))]
    form, ref_form = form._replace(bias=case.bias), ref_form._replace(bias=case.ref_bias)
    return divergence_from_logits(
        tiles[0], tiles[1], beta=beta, scored=scored, form=form, ref_form=ref_form, dtype=dtype
    )


def divergence_grads(
    case: DivergenceCase,
    g: Tensor,
    *,
    beta: float,
    scored: Tensor | None = None,
    form: Logits = _PLAIN,
    ref_form: Logits = _PLAIN,
    dtype: torch.dtype = torch.float64,
) -> HeadGrads:
    """Gradients of ``sum_t g_t D_t`` with respect to the policy's head, by autograd, in ``dtype``."""
    given = [value for value in case[:3] if value is not None]
    leaves = [value.detach().to(dtype).requires_grad_() for value in given]
    own = case._replace(**dict(zip(("hidden", "weight", "bias"), leaves, strict=False)))
    value = divergence_from_hidden(own, beta=beta, scored=scored, form=form, ref_form=ref_form, dtype=dtype)
    grads = torch.autograd.grad(value, leaves, g.to(value.dtype))
    return HeadGrads(grads[0], grads[1], grads[2] if len(grads) == 3 else None)
