"""The value loss of PPO, on the value model's tokens. The mask is applied to the inputs, before any mathematics."""

from typing import Annotated, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from prefkern.losses import inputs
from prefkern.losses.objective import objective
from prefkern.losses.reduce import divide, masked_mean, scored
from prefkern.options import above, read, takes
from prefkern.types import LossOutput


class Critic(NamedTuple):
    """What `ppo_loss` reads of the value model, per token, and its mask; None: no value term."""

    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    value_mask: Tensor | None = None


class CriticOptions(TypedDict, total=False):
    """The keywords of `ppo_loss` on the value model."""

    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    value_mask: Tensor | None


@objective("token")
def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """``max((v - R)^2, (v_clipped - R)^2) / 2``, ``v_clipped = v_old + clamp(v - v_old, -c, c)``."""
    old_values, returns = old_values.detach(), returns.detach()
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


class Value(NamedTuple):
    """The options of `value_loss`, complete."""

    cliprange_value: Annotated[float, above(0.0)] = 0.2
    metrics: bool = True


class ValueOptions(TypedDict, total=False):
    """The keywords of `value_loss` that are no tensors."""

    cliprange_value: float
    metrics: bool


@takes(Value)
def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[ValueOptions],
) -> LossOutput:
    """The clipped value loss of PPO, ``mean max((v - R)^2, (clip(v, v_old +- c) - R)^2) / 2``.

    The clip around the old values is that of the implementations, https://arxiv.org/abs/2005.12729.

    Args:
        values, old_values, returns: per token, padded ``[B, T]`` or packed ``[N]``; the gradient reaches ``values``.
        mask: scored tokens, bool or 0/1; what it excludes may hold anything.
        cliprange_value: c, above 0.
        normalizer: divides the sum, by default the number of scored tokens of this call.

    Returns:
        ``LossOutput(loss, metrics)``, metrics ``loss/value_avg``, ``val/clipfrac_avg``, ``val/var_explained``.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, option or range, by name.
    """
    where = "value_loss"
    cliprange_value, metrics = read(where, options, Value)
    inputs.tokens(where, cu_seqlens, values=values, old_values=old_values, returns=returns)
    mask = inputs.scored(where, values, mask, None)
    normalizer = inputs.normalizer(where, normalizer, "token", values)
    return reduced_value(values, old_values, returns, mask, cliprange_value, normalizer, metrics)


def reduced_value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    cliprange: float,
    normalizer: Tensor | float | None,
    metrics: bool,
) -> LossOutput:
    """The clipped value loss of checked tensors, with its metrics."""
    v, old, R = scored(values, mask), scored(old_values, mask), scored(returns, mask)
    losses = clipped_value(v, old, R, cliprange)
    loss = masked_mean(losses, mask, normalizer)
    if not metrics:
        return LossOutput(loss, {})
    shown = {"loss/value_avg": masked_mean(losses.detach(), mask)}
    return LossOutput(loss, shown | value_metrics(v, old, R, mask, cliprange))


@torch.no_grad()
def value_metrics(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None, cliprange: float
) -> dict[str, Tensor]:
    """How often the value clip is the larger error, and ``1 - var(R - v) / var(R)`` (0 where the returns are equal)."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    errors, spread = scored(returns - values, mask), returns - masked_mean(returns, mask)
    residual = masked_mean((errors - masked_mean(errors, mask)).square(), mask)
    variance = masked_mean(spread.square(), mask)
    return {
        "val/clipfrac_avg": masked_mean((clipped - returns).square() > (values - returns).square(), mask),
        "val/var_explained": divide(variance - residual, variance),
    }
