"""Every objective is coupled as it declares: no wider, and no narrower."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefkern.losses.cpo import CPO
from prefkern.losses.dpo import DPO
from prefkern.losses.grpo import GRPO
from prefkern.losses.kto import KTO, UNPAIRED_LOSSES
from prefkern.losses.objective import OBJECTIVES
from prefkern.losses.policy import POLICY_LOSSES
from prefkern.losses.preference import PAIR_LOSSES, Pairs
from prefkern.losses.ratios import log_ratio
from prefkern.losses.surrogates import Tokens

R, T = 6, 3  # rows (chosen 0..2, rejected 3..5) and positions
OTHER = torch.linspace(-2.0, 1.0, R * T, dtype=torch.float64).view(R, T).flip(1)
LEADS = torch.tensor([0.5, 0.1, 0.2])
REF = OTHER.flip(0).exp()  # its pairs differ from each other, and the first chosen row has the least log-ratio
LABELS = torch.tensor([True, False, True, True, False, False])


def pairs(logps: Tensor) -> Pairs:
    chosen, rejected = (logps - REF).sum(1).chunk(2)
    lengths = torch.full((R // 2,), T)
    policy, ref = ((x[: R // 2] - x[R // 2 :]).sum(1) for x in (logps, REF))
    return Pairs(chosen, rejected, lengths, lengths, None, policy, ref, -logps[: R // 2].mean())


def call(name: str, *arguments: object) -> Tensor:
    return OBJECTIVES[name](*arguments)


def of_table(function: Callable[..., Tensor]) -> str:
    """The name under which an objective of a table is declared."""
    return next(name for name, declared in OBJECTIVES.items() if declared is function)


def pair_case(name: str) -> Callable[[Tensor], Tensor]:
    row = PAIR_LOSSES[name]
    options = DPO(beta=0.05, loss_type=name, label_smoothing=0.1 if row.smoothing else 0.0)
    return lambda lp: row.function(pairs(lp), options)


def unpaired_case(name: str) -> Callable[[Tensor], Tensor]:
    return lambda lp: UNPAIRED_LOSSES[name].function((lp - OTHER).sum(1), LABELS, 0.2, KTO(0.3))


def policy_case(name: str) -> Callable[[Tensor], Tensor]:
    """In a region without clips, where every token moves; half of the tokens have a covariance within its bounds."""
    wide = {"epsilon": 0.9, "epsilon_high": 50.0, "dro_beta": 0.1, "vespo_lambda_pos": 0.01, "vespo_lambda_neg": 0.01}
    options = GRPO(loss_type=name, cov_ratio=0.5, clip_cov_low=0.05, clip_cov_high=1e3, **wide)

    def values(logps: Tensor) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        tokens = Tokens(logps, OTHER, OTHER.flip(0), log_ratio(logps, OTHER), generator=draws)
        return POLICY_LOSSES[name].function(tokens, options)

    return values


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    **{of_table(row.function): policy_case(name) for name, row in POLICY_LOSSES.items()},
    **{of_table(row.function): pair_case(name) for name, row in PAIR_LOSSES.items()},
    **{of_table(row.function): unpaired_case(name) for name, row in UNPAIRED_LOSSES.items()},
    "cpo.cpo": lambda lp: call("cpo.cpo", *lp.sum(1).chunk(2), CPO(0.3, "simpo", 0.1, simpo_gamma=0.5, alpha=0.4)),
    "kto.kto_kl": lambda lp: call(
        "kto.kto", (lp - OTHER).sum(1), LABELS, call("kto.kto_kl", lp.sum(1), OTHER.sum(1) - 9.0), KTO(0.3)
    ),
    "reward_model.bradley_terry": lambda lp: call("reward_model.bradley_terry", *lp.sum(1).chunk(2), LEADS, 0.1),
    "weighted.score_weighted": lambda lp: call("weighted.score_weighted", lp.sum(1), OTHER.sum(1), 0.3),
    "orpo.odds_ratio": lambda lp: call("orpo.odds_ratio", *lp.mean(1).chunk(2)),
    "cross_entropy.negative_log_likelihood": lambda lp: call("cross_entropy.negative_log_likelihood", lp, None, OTHER),
    "ratios.sequence_log_ratio": lambda lp: call("ratios.sequence_log_ratio", lp, OTHER, None, None, "sequence").exp(),
    "ratios.kl_penalty": lambda lp: call("ratios.kl_penalty", lp, OTHER, "k3"),
    "ratios.unbiased_kl_penalty": lambda lp: call("ratios.unbiased_kl_penalty", lp, OTHER, lp.detach().exp(), "k3"),
    "distillation.topk_divergence": lambda lp: call(
        "distillation.topk_divergence",
        torch.stack([lp - 1.0, lp - 2.0], -1),
        torch.stack([OTHER, OTHER - 1.0], -1) - 3.0,
        True,
    ),
    "value.clipped_value": lambda lp: call("value.clipped_value", lp, OTHER, OTHER.flip(0), 9.0),
    "distillation.reverse_topk_divergence": lambda lp: call(
        "distillation.reverse_topk_divergence",
        torch.stack([lp - 1.0, lp - 2.0], -1),
        torch.stack([OTHER, OTHER - 1.0], -1) - 3.0,
        True,
    ),
}

GROUPS = {
    "token": {(0, 0)},
    "sequence": {(0, t) for t in range(T)},
    "pair": {(r, t) for r in (0, R // 2) for t in range(T)},
    "batch": {(r, t) for r in range(R) for t in range(T)},
}
NARROWER = {"token": None, "sequence": "token", "pair": "sequence", "batch": "pair"}


def gradient(values: Callable[[Tensor], Tensor], logps: Tensor) -> float:
    logps = logps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(values(logps).sum(), logps)
    return grad[0, 0].item()


def test_every_objective_has_a_case() -> None:
    assert set(CASES) == set(OBJECTIVES)


@pytest.mark.parametrize("name", CASES)
def test_gradient_depends_on_its_group_and_on_nothing_else(name: str) -> None:
    coupling = OBJECTIVES[name].coupling
    base = -torch.rand(R, T, dtype=torch.float64) - 0.1
    before = gradient(CASES[name], base)
    assert before != 0.0
    changed = set()
    for r, t in GROUPS["batch"] - {(0, 0)}:
        for moved in (-0.05, -90.0):
            perturbed = base.clone()
            perturbed[r, t] += moved
            if gradient(CASES[name], perturbed) != before:
                changed.add((r, t))
    assert changed <= GROUPS[coupling], "a token outside the declared group changes the gradient"
    narrower = NARROWER[coupling]
    if narrower is not None:
        assert changed - GROUPS[narrower], f"nothing beyond the {narrower} matters: the declaration is too wide"
