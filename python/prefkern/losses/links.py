"""The f-divergence links of preference pairs: what a log-ratio counts for under another divergence than reverse KL."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "js", "alpha"]
EXPONENT_LIMIT = 80.0
"""The largest exponent: e^80 fits float32. No gradient beyond."""
NEAR_ONE = 1e-6
"""A coefficient nearer to 1 than this is 1, where the alpha-divergence is the reverse KL."""


def _reverse_kl(x: Tensor, alpha: float) -> Tensor:
    return x


def _forward_kl(x: Tensor, alpha: float) -> Tensor:
    return -torch.expm1((-x).clamp(max=EXPONENT_LIMIT))


def _js_divergence(x: Tensor, alpha: float) -> Tensor:
    return math.log(2.0) + F.logsigmoid(x)


def _alpha_divergence(x: Tensor, alpha: float) -> Tensor:
    power = alpha - 1.0
    return x if abs(power) < NEAR_ONE else torch.expm1((power * x).clamp(max=EXPONENT_LIMIT)) / power


LINKS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
    "js": _js_divergence,
    "alpha": _alpha_divergence,
}
"""``g(D)`` with ``f'(t) = g(log t)``, by TRL's names and two short ones, https://arxiv.org/abs/2309.16240."""
