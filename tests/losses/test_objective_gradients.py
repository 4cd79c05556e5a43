"""Every objective's gradient in float64 against finite differences, away from its kinks."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from prefkern.losses import pair_logps, sequence_logps
from prefkern.losses.cpo import CPO
from prefkern.losses.dpo import DPO
from prefkern.losses.grpo import GRPO
from prefkern.losses.kto import KTO, UNPAIRED_LOSSES
from prefkern.losses.objective import OBJECTIVES
from prefkern.losses.orpo import log_odds_ratio
from prefkern.losses.policy import POLICY_LOSSES
from prefkern.losses.preference import PAIR_LOSSES, Pairs
from prefkern.losses.ratios import log_ratio
from prefkern.losses.surrogates import Tokens


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CHOSEN, REJECTED = rows(2.0, -1.0, 0.3, 40.0), rows(-1.0, 3.0, 0.2, -25.0)
REF_DIFFERENCE = rows(0.5, -1.0, 2.0, 0.1)
N_CHOSEN, N_REJECTED = torch.tensor([4, 2, 1, 7]), torch.tensor([2, 3, 5, 6])
MASK = torch.tensor([[True, True, False], [False, False, False], [True, True, True], [True, False, True]])


def pair(name: str, smoothing: float = 0.0):
    def values(chosen: Tensor, rejected: Tensor) -> Tensor:
        nll = -chosen.sum() / N_CHOSEN.sum()
        pairs = Pairs(chosen, rejected, N_CHOSEN, N_REJECTED, None, chosen - rejected, REF_DIFFERENCE, nll)
        return PAIR_LOSSES[name].function(pairs, DPO(0.5, name, smoothing))

    return values, (CHOSEN, REJECTED)


def unpaired(name: str):
    labels = torch.tensor([True, False, False, True])
    return lambda D: UNPAIRED_LOSSES[name].function(D, labels, 0.4, KTO(0.5, 1.5, 0.8)), (CHOSEN,)


def contrastive(loss_type: str, smoothing: float, alpha: float):
    options = CPO(0.5, loss_type, smoothing, simpo_gamma=0.7, alpha=alpha)
    return lambda c, r: OBJECTIVES["cpo.cpo"](c, r, options), (rows(-0.1, -1.0, -3.0), rows(-0.7, -0.05, -2.5))


LP, OLD = rows(-1.0, -2.0, -0.5, -3.0, -1.0, -9.0), rows(-1.1, -1.0, -0.9, -3.05, -2.0, -3.0)
A = rows(1.0, -2.0, 0.5, -1.0, -3.0, 2.0)

STOPPED = {"cispo", "vespo", "gspo_token", "dppo_tv", "dppo_kl"}
"""What stops a gradient is not the derivative of its value: `test_policy_losses` compares it with the formula."""


def sampled(name: str, **options: float):
    options = GRPO(loss_type=name, **{**POLICY_LOSSES[name].example, **options})

    def values(logps: Tensor) -> Tensor:
        draws, cu_seqlens = torch.Generator().manual_seed(0), torch.tensor([0, 2, 3, 6])
        tokens = Tokens(logps, OLD, A, log_ratio(logps, OLD), cu_seqlens=cu_seqlens, generator=draws)
        return POLICY_LOSSES[name].function(tokens, options)

    return values, (LP,)


STUDENT = torch.tensor([[0.2, 0.3, 0.1], [0.6, 0.1, 0.299], [1e-3, 1e-4, 2e-5]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.5, 0.2, 0.0], [0.3, 0.3, 0.3], [0.9, 0.05, 0.04]], dtype=torch.float64).log()

CASES = {
    **{f"pair {name}": pair(name, 0.2 if row.smoothing else 0.0) for name, row in PAIR_LOSSES.items()},
    "pair sigmoid, no smoothing": pair("sigmoid"),
    **{f"unpaired {name}": unpaired(name) for name in UNPAIRED_LOSSES},
    "cpo.cpo sigmoid": contrastive("sigmoid", 0.1, 0.0),
    "cpo.cpo simpo": contrastive("simpo", 0.0, 0.3),
    "cpo.cpo hinge": contrastive("hinge", 0.0, -0.4),
    "cpo.cpo ipo": contrastive("ipo", 0.0, 0.0),
    "orpo.odds_ratio": (OBJECTIVES["orpo.odds_ratio"], (rows(-0.1, -1.0, -3.0), rows(-0.7, -0.05, -2.5))),
    "orpo.log_odds_ratio": (log_odds_ratio, (rows(-0.01, -30.0), rows(-5.0, -0.69))),
    "cross_entropy.negative_log_likelihood": (
        lambda lp: OBJECTIVES["cross_entropy.negative_log_likelihood"](lp, A > 0, OLD),
        (LP,),
    ),
    **{f"policy {name}": sampled(name) for name in POLICY_LOSSES if name not in STOPPED},
    "policy grpo dual": sampled("grpo", epsilon_high=0.3, delta=1.5),
    "ratios.sequence_log_ratio": (
        lambda lp: OBJECTIVES["ratios.sequence_log_ratio"](lp, OLD, A > -2.5, torch.tensor([0, 2, 2, 6]), "sequence"),
        (LP,),
    ),
    "ratios.sequence_log_ratio product": (
        lambda lp: OBJECTIVES["ratios.sequence_log_ratio"](lp, OLD[:3], None, torch.tensor([0, 2, 3, 6]), "product"),
        (LP,),
    ),
    "ratios.kl_penalty k1": (lambda lp: OBJECTIVES["ratios.kl_penalty"](lp, OLD, "k1"), (LP,)),
    "ratios.kl_penalty k2": (lambda lp: OBJECTIVES["ratios.kl_penalty"](lp, OLD, "k2"), (LP,)),
    "ratios.kl_penalty k3": (lambda lp: OBJECTIVES["ratios.kl_penalty"](lp, OLD, "k3"), (LP,)),
    "value.clipped_value": (lambda v: OBJECTIVES["value.clipped_value"](v, OLD, A, 0.2), (LP,)),
    "distillation.topk_divergence": (
        lambda lp: OBJECTIVES["distillation.topk_divergence"](lp, TEACHER, True),
        (STUDENT,),
    ),
    "distillation.reverse_topk_divergence": (
        lambda lp: OBJECTIVES["distillation.reverse_topk_divergence"](lp, TEACHER, True),
        (STUDENT,),
    ),
    "distillation.reverse_topk_divergence no tail": (
        lambda lp: OBJECTIVES["distillation.reverse_topk_divergence"](lp, TEACHER, False),
        (STUDENT,),
    ),
    "reward_model.bradley_terry": (
        lambda c, r: OBJECTIVES["reward_model.bradley_terry"](c, r, rows(0.5, 0.0, 2.0, 1.0), 0.1),
        (CHOSEN, REJECTED),
    ),
    "weighted.score_weighted": (lambda lp: OBJECTIVES["weighted.score_weighted"](lp, OLD, 0.3), (LP,)),
    "distillation.topk_divergence no tail": (
        lambda lp: OBJECTIVES["distillation.topk_divergence"](lp, TEACHER, False),
        (STUDENT,),
    ),
    "sequence_logps": (lambda lp: sequence_logps(lp, mask=MASK, average=True), (-torch.rand(4, 3).double(),)),
    "sequence_logps packed": (
        lambda lp: sequence_logps(lp, mask=A > 0, cu_seqlens=torch.tensor([0, 0, 4, 4, 6])),
        (LP,),
    ),
    "pair_logps": (
        lambda lp: pair_logps(lp, mask=MASK, ld_alpha=0.4)[:2],
        (-torch.rand(4, 3).double(),),
    ),
}


def test_every_differentiable_objective_has_a_case() -> None:
    in_tables = {row.function for table in (PAIR_LOSSES, UNPAIRED_LOSSES, POLICY_LOSSES) for row in table.values()}
    others = {name for name, function in OBJECTIVES.items() if function not in in_tables}
    assert others - {"kto.kto_kl", "ratios.unbiased_kl_penalty"} <= {name.split()[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    function, inputs = CASES[name]
    assert gradcheck(function, tuple(x.clone().requires_grad_() for x in inputs), atol=1e-7)


def test_kto_kl_has_no_gradient() -> None:
    assert not OBJECTIVES["kto.kto_kl"](LP.requires_grad_(), OLD).requires_grad
