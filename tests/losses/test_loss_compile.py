"""Losses under torch.compile: one graph for every length, and the eager numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefkern.losses import (
    dpo_loss,
    kto_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_orpo_loss,
    linear_ppo_loss,
    orpo_loss,
    pair_logps,
    ppo_loss,
    sequence_logps,
    shift_labels,
)


def padded_dpo(ids: Tensor, lp: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    policy = pair_logps(lp, targets=shift_labels(ids, mask=mask), ld_alpha=0.5)
    ref = torch.zeros_like(policy.chosen)
    lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
    return dpo_loss(policy.chosen, policy.rejected, ref, ref, loss_type="ipo", **lengths).loss


def packed_dpo(ids: Tensor, lp: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    targets = shift_labels(ids.view(-1), cu_seqlens=cu)
    policy = pair_logps(lp.view(-1), targets=targets, cu_seqlens=cu, ld_alpha=0.5)
    ref = torch.zeros_like(policy.chosen)
    loss, metrics = dpo_loss(policy.chosen, policy.rejected, ref, ref)
    return loss + metrics["rewards/margins"]


def kto_and_orpo(ids: Tensor, lp: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    sums, pairs = sequence_logps(lp, mask=mask), pair_logps(lp, mask=mask, average=True)
    labels = mask[:, 0]
    orpo = orpo_loss(pairs.chosen, pairs.rejected, -pairs.chosen).loss
    return kto_loss(sums, torch.zeros_like(sums), labels, kl=0.1).loss + orpo


def packed_ppo(ids: Tensor, lp: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    flat, keep = lp.view(-1), mask.view(-1)
    old = flat.detach() - 0.1
    advantages = torch.linspace(-1.0, 1.0, cu.shape[0] - 1)
    out = ppo_loss(flat, old, advantages, keep, ref_logps=old, kl_coef=0.1, reduction="sequence", cu_seqlens=cu)
    return out.loss + out.metrics["val/ratio"]


def hidden_of(lp: Tensor) -> Tensor:
    return torch.stack([lp, 1.0 - lp, lp.square()], dim=-1)


WEIGHT = torch.linspace(-1.0, 1.0, 27).view(9, 3)


def linear_pairs(ids: Tensor, lp: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    targets = shift_labels(ids, mask=mask)
    dpo = linear_dpo_loss(hidden_of(lp), WEIGHT, targets, torch.zeros(4), ld_alpha=0.5)
    orpo = linear_orpo_loss(hidden_of(lp), WEIGHT, targets, nll_targets=shift_labels(ids))
    return dpo.loss + orpo.loss + dpo.metrics["entropy"]


def packed_linear_kto_and_ppo(ids: Tensor, lp: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    targets, hidden = shift_labels(ids.view(-1), cu_seqlens=cu), hidden_of(lp.view(-1))
    reference = {"ref_hidden": hidden.detach(), "ref_weight": WEIGHT + 0.1}
    kto = linear_kto_loss(hidden, WEIGHT, targets, mask[:, 0], kl=0.1, cu_seqlens=cu, **reference)
    old, options = torch.zeros_like(hidden[:, 0]), {"entropy_coef": 0.1, "kl_coef": 0.1, "cu_seqlens": cu}
    ppo = linear_ppo_loss(hidden, WEIGHT, targets, old, old + 1.0, mask.view(-1), **options, **reference)
    return kto.loss + ppo.loss + ppo.metrics["policy/entropy_avg"]


LENGTHS = [7, 9, 3, 17, 64, 11, *range(20, 50)]  # not 5: equal sizes become one symbol


@pytest.mark.slow
@pytest.mark.parametrize("function", [padded_dpo, packed_dpo, kto_and_orpo, packed_ppo])
def test_one_compilation_for_every_length(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    assert_one_graph(function, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("function", [linear_pairs, packed_linear_kto_and_ppo])
def test_linear_forms_are_one_compilation(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    assert_one_graph(function, LENGTHS[:4])


def assert_one_graph(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], lengths: list[int]) -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for T in lengths:
        ids, mask = torch.randint(0, 9, (4, T)), torch.rand(4, T) < 0.8
        cu = torch.tensor([0, T // 2, T, 2 * T, 4 * T])
        lp = (-torch.rand(4, T)).requires_grad_()
        got, want = (f(ids, lp, mask, cu) for f in (compiled, function))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, lp)[0] for loss in (got, want)))
    assert graphs == 1
    torch._dynamo.reset()
