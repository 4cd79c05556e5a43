"""On a CUDA device: the CPU's numbers, without one wait for the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefkern.losses import (
    dpo_loss,
    grpo_loss,
    importance_weights,
    kto_kl,
    kto_loss,
    orpo_loss,
    pair_logps,
    ppo_loss,
    rloo_loss,
    sequence_logps,
    shift_labels,
)
from prefkern.losses.policy import POLICY_LOSSES

T, B = 40, 4
OFFSETS = torch.tensor([0, 0, 35, 70, 2 * B * T // 2, 200, 260, 300, 2 * B * T])


def dpo(x: dict[str, Tensor], cu: Tensor | None) -> Tensor:
    targets = shift_labels(x["ids"], mask=x["mask"], cu_seqlens=cu)
    policy, ref = (pair_logps(x[k], targets=targets, cu_seqlens=cu, ld_alpha=0.3) for k in ("logps", "ref"))
    lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
    loss, metrics = dpo_loss(policy.chosen, policy.rejected, ref.chosen, ref.rejected, loss_type="ipo", **lengths)
    return torch.stack([loss, *metrics.values()])


def kto(x: dict[str, Tensor], cu: Tensor | None) -> Tensor:
    logps, ref = (sequence_logps(x[k], mask=x["mask"], cu_seqlens=cu) for k in ("logps", "ref"))
    loss, metrics = kto_loss(logps, ref, x["labels"], kl=kto_kl(logps, ref))
    return torch.stack([loss, *metrics.values()])


def orpo(x: dict[str, Tensor], cu: Tensor | None) -> Tensor:
    pairs = pair_logps(x["logps"], mask=x["mask"], cu_seqlens=cu, average=True)
    loss, metrics = orpo_loss(pairs.chosen, pairs.rejected, -pairs.chosen)
    return torch.stack([loss, *metrics.values()])


def ppo(x: dict[str, Tensor], cu: Tensor | None) -> Tensor:
    options = {"reduction": "sequence", "kl_coef": 0.1, "cu_seqlens": cu, "normalizer": x["count"]}
    value = {"values": x["logps"], "old_values": x["ref"], "returns": x["ref"] + 0.5}
    loss, metrics = ppo_loss(x["logps"], x["ref"], x["advantages"], x["mask"], ref_logps=x["ref"], **value, **options)
    return torch.stack([loss, *metrics.values()])


def grpo(name: str) -> Callable[[dict[str, Tensor], Tensor | None], Tensor]:
    needed = {"epsilon_high": 1.3, "dro_beta": 0.4}
    options = {key: needed[key] for key in POLICY_LOSSES[name].needs if key in needed}
    options |= {"cov_ratio": 1.0, "clip_cov_low": 0.1} if name == "clip_cov" else {}  # no draw decides

    def function(x: dict[str, Tensor], cu: Tensor | None) -> Tensor:
        given = {"cu_seqlens": cu, "normalizer": x["count"], "max_completion_length": 50.0, "beta": 0.1}
        given |= {"is_correct": x["labels"], "positive_nll_coef": 0.1, "token_weights": x["ref"].exp()}
        tensors = x["logps"], x["ref"], x["advantages"], x["mask"]
        loss, metrics = grpo_loss(*tensors, ref_logps=x["ref"], loss_type=name, **given, **options)
        return torch.stack([loss, *metrics.values()])

    return function


def corrected_rloo(x: dict[str, Tensor], cu: Tensor | None) -> Tensor:
    options = {"level": "sequence", "mode": "mask", "low": 1e-8, "high": 1e8, "cu_seqlens": cu}
    gate = {"gate": "kl", "gate_level": "sequence_max", "gate_high": 0.3}
    weights, mask, shown = importance_weights(x["ref"], x["logps"].detach(), x["mask"], **options, **gate)
    loss, metrics = rloo_loss(x["logps"], None, x["advantages"], mask, token_weights=weights, cu_seqlens=cu)
    return torch.stack([loss, *metrics.values(), *shown.values()])


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", [dpo, kto, orpo, ppo, corrected_rloo, *map(grpo, POLICY_LOSSES)])
def test_cuda_equals_cpu_without_a_wait(function: Callable[[dict[str, Tensor], Tensor | None], Tensor], packed) -> None:
    shape = (2 * B * T,) if packed else (2 * B, T)
    x = {
        "logps": -torch.rand(shape),
        "ref": -torch.rand(shape),
        "ids": torch.randint(0, 9, shape),
        "mask": torch.rand(shape) < 0.8,
        "labels": torch.rand(2 * B) < 0.5,
        "advantages": torch.randn(2 * B),
        "count": torch.tensor(11),
    }
    there = {name: value.cuda() for name, value in x.items()}
    cu = OFFSETS.cuda() if packed else None
    for leaf in (x["logps"], there["logps"]):
        leaf.requires_grad_()
    want = function(x, OFFSETS if packed else None)
    function(there, cu)  # the first call may load kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = function(there, cu)
        got[0].backward()
        again = function(there, cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want[0].backward()
    assert torch.equal(got, again)
    torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(there["logps"].grad.cpu(), x["logps"].grad)
