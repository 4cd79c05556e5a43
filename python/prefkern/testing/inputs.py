"""Seeded inputs as language models make them: logits with a spread, confident rows, masked vocabulary, ignored rows."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
_CONFIDENCE = 7.0  # a confident target stands this far above the log-sum of the rest: 1 - p is about 1e-3


class LogitCase(NamedTuple):
    """Seeded ``logits [N, V]`` and ``targets [N]`` (int64)."""

    logits: Tensor
    targets: Tensor


class HeadCase(NamedTuple):
    """A seeded head: ``hidden [N, H]``, ``weight [V, H]``, ``bias [V]`` or None, ``targets [N]`` (int64)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor


def _allowed(v: int, masked: float, generator: torch.Generator) -> Tensor:
    """Which columns are not -inf: at least one."""
    allowed = torch.rand(v, generator=generator) >= masked
    allowed[torch.randint(v, (1,), generator=generator)] = True
    return allowed


def _targets(n: int, allowed: Tensor, ignored: float, generator: torch.Generator) -> Tensor:
    """Allowed columns, the first and the last among them; from three rows on one is ignored, unless none should be."""
    columns = allowed.nonzero().flatten()
    targets = columns[torch.randint(len(columns), (n,), generator=generator)]
    skipped = torch.rand(n, generator=generator) < ignored
    if n >= 3:
        targets[0], targets[1] = columns[0], columns[-1]
        skipped[:3] = torch.tensor([False, False, ignored > 0])
    return targets.masked_fill(skipped, IGNORE)


def logit_case(
    n: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 3.0,
    offset: float = 0.0,
    ignored: float = 0.2,
    confident: float = 0.2,
    masked: float = 0.0,
) -> LogitCase:
    """Logits of standard deviation ``scale`` around ``offset``.

    ``ignored``: the share of targets set to -100. ``confident``: the share of rows whose target has ``1 - p`` of about
    1e-3. ``masked``: the share of the vocabulary that is -inf (never a target).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator, dtype=torch.float64) * scale
    allowed = _allowed(v, masked, generator)
    targets = _targets(n, allowed, ignored, generator)
    logits[:, ~allowed] = float("-inf")
    rows = (torch.rand(n, generator=generator) < confident) & (targets >= 0)
    top = logits.logsumexp(-1, keepdim=True) + _CONFIDENCE
    lifted = logits.scatter(1, targets.clamp(min=0)[:, None], top)
    logits = torch.where(rows[:, None], lifted, logits) + offset
    return LogitCase(logits.to(dtype).to(device), targets.to(device))


def head_case(
    n: int,
    h: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 3.0,
    bias: bool = False,
    ignored: float = 0.2,
    confident: float = 0.2,
    masked: float = 0.0,
) -> HeadCase:
    """A head whose logits have standard deviation ``scale``; the shares are those of :func:`logit_case`.

    Confident rows point along their target's row of the weight. Masked columns are -inf in the bias, so they need
    ``bias=True``.
    """
    if masked and not bias:
        raise ValueError("prefkern.testing.head_case: masked columns are -inf in the bias: pass bias=True")
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * (scale / h**0.5)
    allowed = _allowed(v, masked, generator)
    targets = _targets(n, allowed, ignored, generator)
    shift = torch.randn(v, generator=generator).masked_fill(~allowed, float("-inf")) if bias else None
    rows = (torch.rand(n, generator=generator) < confident) & (targets >= 0)
    along = weight[targets.clamp(min=0)]
    missing = torch.logsumexp(hidden @ weight.T, -1) + _CONFIDENCE - (hidden * along).sum(-1)
    lifted = hidden + along * (missing / along.square().sum(-1).clamp(min=1e-6))[:, None]
    hidden = torch.where(rows[:, None], lifted, hidden)
    return HeadCase(
        hidden.to(dtype).to(device),
        weight.to(weight_dtype or dtype).to(device),
        None if shift is None else shift.to(weight_dtype or dtype).to(device),
        targets.to(device),
    )
