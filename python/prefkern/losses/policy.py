"""Policy losses: the table, each row one function of the sampled tokens and what a call of it needs.

To add a loss, write its function in `prefkern.losses.surrogates`, with its declared coupling, and its row in
``POLICY_LOSSES``: its reduction, what it cannot do without, and its values for `EXAMPLE`, worked out by hand. Its name
in ``PolicyLossType`` lets type checkers know it. Everything else (checks, messages, tests, the reference page) follows
from the row.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from prefkern import check
from prefkern.losses import surrogates
from prefkern.losses.objective import Objective
from prefkern.losses.ratios import RatioLevel
from prefkern.losses.reduce import TokenReduction
from prefkern.losses.surrogates import Tokens

if TYPE_CHECKING:
    from prefkern.losses.grpo import GRPO

PolicyLossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo_token", "gmpo", "dppo_tv", "dppo_kl",
    "importance_mask", "clip_cov", "kl_cov", "importance_sampling", "reinforce", "dro",
]  # fmt: skip


class PolicyLoss(NamedTuple):
    """A row of the table: a function of the tokens, and what a call of it needs."""

    function: "Objective[[Tokens, GRPO], Tensor]"
    expected: tuple[float, float, float]
    """Its values for `EXAMPLE`."""
    reduction: TokenReduction
    source: str
    levels: tuple[RatioLevel, ...] = ("token",)
    """The levels of the ratio that its definition allows."""
    needs: tuple[str, ...] = ()
    """Options and tensors without which it is not defined."""
    example: Mapping[str, float] = MappingProxyType({})
    """Options with which it states its values; the others are the defaults."""
    weighs_itself: bool = False
    """It reads the corrections of the sampler itself: they are not multiplied on its result."""
    differs: str = ""
    """How it differs from the trainer that it is compared with, where it does."""


EXAMPLE = Tokens(
    logps=torch.tensor([0.6, 0.2, 0.8]).log(),
    old_logps=torch.tensor([0.4, 0.4, 0.4]).log(),
    advantages=torch.tensor([1.0, 1.0, -1.0]),
    log_ratio=torch.tensor([1.5, 0.5, 2.0]).log(),
    cu_seqlens=torch.tensor([0, 2, 3]),
)
"""A sequence of two tokens and one of one token, packed, with which every row states its values."""

_EVERY: tuple[RatioLevel, ...] = ("token", "sequence", "product")
_CLIPPED = (-1.2, -0.5, 2.0)
_PPO_SOURCE = "https://arxiv.org/abs/1707.06347"

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(
        surrogates.clipped, _CLIPPED, "sequence", source="https://arxiv.org/abs/2402.03300", levels=_EVERY
    ),
    "bnpo": PolicyLoss(surrogates.clipped, _CLIPPED, "token", source=_PPO_SOURCE, levels=_EVERY),
    "dr_grpo": PolicyLoss(
        surrogates.clipped, _CLIPPED, "fixed", source="https://arxiv.org/abs/2503.20783", levels=_EVERY
    ),
    "dapo": PolicyLoss(
        surrogates.clipped,
        _CLIPPED,
        "token",
        source="https://arxiv.org/abs/2503.14476",
        levels=_EVERY,
        needs=("normalizer",),
    ),
    "luspo": PolicyLoss(
        surrogates.clipped, _CLIPPED, "sequence_sum", source="https://arxiv.org/abs/2602.05261", levels=_EVERY
    ),
    "cispo": PolicyLoss(
        surrogates.cispo,
        (0.76623844, 0.80471896, -0.35702968),
        "token",
        source="https://arxiv.org/abs/2506.13585",
        levels=("token", "sequence"),
        needs=("normalizer", "epsilon_high"),
        example={"epsilon_high": 1.6},
        differs="verl 0.9.1 caps at 1 + clip_ratio_high and floors at 1 - clip_ratio_low; here epsilon_high is the cap",
    ),
    "sapo": PolicyLoss(
        surrogates.sapo,
        (-2.48983732, -1.51016268, 2.82199950),
        "sequence",
        source="https://arxiv.org/abs/2511.20347",
        levels=("token", "sequence"),
    ),
    "vespo": PolicyLoss(
        surrogates.vespo,
        (0.60829754, 1.91653880, -0.24159357),
        "token",
        source="https://arxiv.org/abs/2602.10693",
        levels=("token", "sequence"),
        needs=("normalizer",),
        weighs_itself=True,
    ),
    "gspo_token": PolicyLoss(
        surrogates.gspo_token,
        (-0.86602540, -0.86602540, 2.0),
        "sequence",
        source="https://arxiv.org/abs/2507.18071",
        differs="verl 0.9.1 (gspo) caps the log-ratio at 10, and means over tokens",
    ),
    "gmpo": PolicyLoss(
        surrogates.gmpo,
        (-0.78147385, -0.78147385, 2.0),
        "sequence",
        source="https://arxiv.org/abs/2507.20673",
        differs="verl 0.9.1 (geo_mean) does not hold log-ratios, and takes the geometric mean of correction weights",
    ),
    "dppo_tv": PolicyLoss(
        surrogates.dppo_tv,
        (0.0, 0.80471896, -0.44628710),
        "token",
        source="https://arxiv.org/abs/2602.04879",
        needs=("old_logps",),
        example={"epsilon": 0.3, "epsilon_high": 0.1},
    ),
    "dppo_kl": PolicyLoss(
        surrogates.dppo_kl,
        (0.0, 0.80471896, -0.44628710),
        "token",
        source="https://arxiv.org/abs/2602.04879",
        needs=("old_logps",),
        example={"epsilon": 0.3, "epsilon_high": 0.05},
        differs="verl 0.9.1 adds 1e-8 inside the logarithm; here the divergence is exact where p is near 1",
    ),
    "importance_mask": PolicyLoss(
        surrogates.importance_mask,
        (-1.48355980, -0.45195470, 0.04804530),
        "token",
        source="https://github.com/PrimeIntellect-ai/prime-rl",
        needs=("old_logps",),
        example={"epsilon": 0.3, "importance_tau": 0.1},
    ),
    "clip_cov": PolicyLoss(
        surrogates.clip_cov,
        (-1.2, 0.0, 2.0),
        "token",
        source="https://arxiv.org/abs/2505.22617",
        example={"clip_cov_low": -0.7, "clip_cov_high": 0.1},
        differs="verl 0.9.1 draws from the global generator",
    ),
    "kl_cov": PolicyLoss(
        surrogates.kl_cov, (-1.45945349, -0.5, 2.0), "token", source="https://arxiv.org/abs/2505.22617"
    ),
    "importance_sampling": PolicyLoss(
        surrogates.importance_sampling,
        (-1.5, -0.5, 2.0),
        "token",
        source="https://tinker-docs.thinkingmachines.ai/losses",
        levels=_EVERY,
        needs=("old_logps",),
    ),
    "reinforce": PolicyLoss(
        surrogates.reinforce, (0.51082562, 1.60943791, -0.22314355), "token", source="https://arxiv.org/abs/2504.02546"
    ),
    "dro": PolicyLoss(
        surrogates.dro,
        (0.55192611, 1.72955116, -0.10303030),
        "token",
        source="https://arxiv.org/abs/2405.19107",
        needs=("old_logps", "dro_beta"),
        example={"dro_beta": 0.5},
    ),
}


def check_policy_options(where: str, options: "GRPO") -> None:
    """Checks that the options of a loss are those that its definition allows and needs."""
    row = POLICY_LOSSES[options.loss_type]
    what, level = f"loss_type={options.loss_type!r}", options.importance_sampling_level
    if level not in row.levels:
        allowed = " or ".join(map(repr, row.levels))
        check.fail(where, f"{what} has importance_sampling_level={allowed}, got {level!r}")
    if "epsilon_high" in row.needs and options.epsilon_high is None:
        check.fail(where, f"{what} caps the ratio at epsilon_high (5.0 is usual), got None")
    if "dro_beta" in row.needs and options.dro_beta is None:
        check.fail(where, f"{what} weighs the square of the log-ratio by dro_beta (0.05 is usual), got None")
