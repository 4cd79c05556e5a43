"""Losses, gradients and metrics against TRL's own code, run on the same tensors with a scripted model."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prefkern.losses import (
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    pair_logps,
    ppo_loss,
    sequence_logps,
    value_loss,
    wpo_weights,
)
from prefkern.losses.cpo import AVERAGED
from prefkern.losses.preference import PAIR_LOSSES

pytest.importorskip("trl")

R, T = 6, 9
LENGTHS = torch.tensor([8, 3, 5, 6, 6, 2])


class Scripted(torch.nn.Module):
    """A model whose fused head returns given log-probs, zero where the label is not scored, as TRL's does."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor, log_sum_sq_probs: Tensor | None = None) -> None:
        super().__init__()
        self.logps = logps
        self.log_sum_sq_probs = torch.zeros_like(logps) if log_sum_sq_probs is None else log_sum_sq_probs

    def forward(self, labels: Tensor, **kwargs: object) -> SimpleNamespace:
        scored = labels[:, 1:] != -100
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=torch.where(scored, self.logps, 0.0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=scored,
            log_sum_sq_probs=self.log_sum_sq_probs,
        )


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(model: Scripted, ref_model: Scripted, **attributes: object) -> SimpleNamespace:
    return SimpleNamespace(
        model=model,
        ref_model=ref_model,
        accelerator=accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of policy and reference ``[R, T - 1]``, the completion mask ``[R, T]``, and that mask shifted."""
    logps = (-torch.rand(R, T - 1) * 4).requires_grad_()
    completion = (torch.arange(T) >= 1) & (torch.arange(T) <= LENGTHS[:, None])
    return logps, -torch.rand(R, T - 1) * 4, completion.long(), completion[:, 1:]


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: Tensor, log: dict[str, list[float]], logps: Tensor
) -> None:
    torch.testing.assert_close(ours[0], theirs, rtol=1e-6, atol=1e-6)
    (want,) = torch.autograd.grad(theirs, logps)
    (got,) = torch.autograd.grad(ours[0], logps)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert want.abs().max() > 0
    for name, value in ours[1].items():
        if not name.startswith("count/"):
            assert value.item() == pytest.approx(log[name][0], rel=1e-6, abs=1e-6), name


LINKS = {"reverse_kl": 0.5, "forward_kl": 0.5, "js_divergence": 0.5, "alpha_divergence": 0.3}
MIXTURE = ("sigmoid", "bco_pair", "sft")
NOT_WEIGHTED = ("aot", "aot_unpaired", "hinge", "sft")
"""The sorted losses have no weights; TRL multiplies the others in place, which autograd refuses."""
DPO_CASES = [
    *(((name,), None, "reverse_kl", ld_alpha, False) for name in PAIR_LOSSES for ld_alpha in (None, 0.0, 0.3)),
    *(((name,), None, link, None, False) for name, row in PAIR_LOSSES.items() for link in LINKS if row.links),
    *(((name,), None, "reverse_kl", 0.3, True) for name in PAIR_LOSSES if name not in NOT_WEIGHTED),
    *((MIXTURE, weights, "reverse_kl", ld, False) for weights in (None, [0.8, 0.2, 1.0]) for ld in (None, 0.3)),
]


@pytest.mark.parametrize(("loss_types", "weights", "link", "ld_alpha", "use_weighting"), DPO_CASES)
def test_dpo(loss_types, weights, link, ld_alpha, use_weighting) -> None:
    """``DPOTrainer._compute_loss``, unbound: every loss of the table, its links, mixtures, LD-DPO and WPO weights. The
    smoothing of ``sigmoid`` is 0 here, since TRL ignores it there."""
    from trl import DPOTrainer

    logps, ref_logps, completion, mask = batch()
    row = PAIR_LOSSES[loss_types[0]]
    smoothing = 0.1 if row.smoothing is not None and loss_types[0] != "sigmoid" else 0.0
    squares = -torch.rand(R, T - 1) * 3
    model = Scripted(logps, squares)
    trl = trainer(
        model,
        Scripted(ref_logps),
        beta=0.3,
        loss_types=list(loss_types),
        loss_weights=weights or [1.0] * len(loss_types),
        label_smoothing=smoothing,
        f_divergence_type=link,
        f_alpha_divergence_coef=LINKS[link],
        ld_alpha=ld_alpha,
        precompute_ref_logps=False,
    )
    trl.use_weighting, trl.args.discopop_tau = use_weighting, 0.05
    inputs = {
        "input_ids": torch.ones(R, T, dtype=torch.long),
        "attention_mask": torch.ones(R, T, dtype=torch.long),
        "completion_mask": completion,
    }
    theirs = DPOTrainer._compute_loss(trl, model, inputs, return_outputs=False)
    policy, ref = (pair_logps(lp, mask=mask, ld_alpha=ld_alpha) for lp in (logps, ref_logps))
    ours = dpo_loss(
        policy.chosen,
        policy.rejected,
        ref.chosen,
        ref.rejected,
        beta=0.3,
        loss_type=list(loss_types),
        loss_weights=weights,
        label_smoothing=smoothing,
        f_divergence_type=link,
        f_alpha_divergence_coef=LINKS[link],
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        chosen_nll=-logps[: R // 2][mask[: R // 2]].mean(),
        weights=wpo_weights(logps, squares, mask=mask) if use_weighting else None,
    )
    assert_same(ours, theirs, trl._metrics["train"], logps)


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1, 0], [1] * 6, [0] * 6])
@pytest.mark.parametrize(("loss_type", "offset"), [("kto", 2.0), ("kto", -40.0), ("apo_zero_unpaired", 0.0)])
def test_kto(loss_type, offset, labels) -> None:
    """``KTOTrainer._compute_loss``, unbound, its baseline included (above 0 and clamped to 0)."""
    from trl import KTOTrainer

    logps, ref_logps, completion, mask = batch()
    kl_logps, ref_kl_logps = -torch.rand(R) + offset, -torch.rand(R)
    model = Scripted(logps)
    trl = trainer(
        model,
        Scripted(ref_logps),
        beta=0.3,
        loss_type=loss_type,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=False,
        _compute_kl_logps=lambda m, batch: kl_logps if m is model else ref_kl_logps,
    )
    inputs = {
        "input_ids": torch.ones(R, T, dtype=torch.long),
        "attention_mask": torch.ones(R, T, dtype=torch.long),
        "completion_mask": completion,
        "label": torch.tensor(labels, dtype=torch.bool),
    }
    theirs = KTOTrainer._compute_loss(trl, model, inputs, return_outputs=False)
    kl = kto_kl(kl_logps, ref_kl_logps) if loss_type == "kto" else None
    ours = kto_loss(
        sequence_logps(logps, mask=mask),
        sequence_logps(ref_logps, mask=mask),
        torch.tensor(labels),
        kl=kl,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        loss_type=loss_type,
    )
    log = trl._metrics["train"]
    absent = {side for side, count in (("chosen", sum(labels)), ("rejected", R - sum(labels))) if not count}
    for side in absent:  # TRL leaves them out; here they are 0 and their count says so
        assert ours.metrics[f"count/{side}"].item() == 0
        log |= {f"rewards/{side}": [0.0], f"logps/{side}": [0.0]}
    if absent:
        log["rewards/margins"] = [log["rewards/chosen"][0] - log["rewards/rejected"][0]]
    assert_same(ours, theirs, log, logps)


def test_orpo() -> None:
    """``ORPOTrainer.odds_ratio_loss``, unbound, and the sum in ``get_batch_loss_metrics``:
    ``loss = policy_nll_loss - losses.mean()``."""
    from trl.experimental.orpo import ORPOTrainer

    logps, _, _, mask = batch()
    nll = torch.tensor(1.7)
    averages = pair_logps(logps, mask=mask, average=True)
    trl = SimpleNamespace(beta=0.3, accelerator=accelerator())
    losses, chosen, rejected, ratio, odds = ORPOTrainer.odds_ratio_loss(trl, averages.chosen, averages.rejected)
    log = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": averages.chosen,
        "logps/rejected": averages.rejected,
        "log_odds_ratio": ratio,
        "log_odds_chosen": odds,
        "nll_loss": nll,
    }
    ours = orpo_loss(averages.chosen, averages.rejected, nll, beta=0.3)
    theirs = nll - losses.mean()
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (ours.loss, theirs)))
    assert {k: v.item() for k, v in ours.metrics.items()} == pytest.approx({k: v.mean().item() for k, v in log.items()})


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("cpo_simpo", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_cpo(loss_type, smoothing, alpha) -> None:
    """``CPOTrainer.cpo_loss``, unbound, and the sum in ``get_batch_loss_metrics``:
    ``loss = losses.mean() + cpo_alpha * policy_nll_loss``. In float64: TRL's powers of probabilities round."""
    from trl.experimental.cpo import CPOTrainer

    logps, _, _, mask = batch()
    logps = logps.detach().double().requires_grad_()
    nll = -logps[:3][mask[:3]].mean()
    pairs = pair_logps(logps, mask=mask, average=loss_type in AVERAGED)
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": smoothing, "simpo_gamma": 0.6, "alpha": alpha}
    trl = SimpleNamespace(**{**options, "loss_type": loss_type.removeprefix("cpo_")}, accelerator=accelerator())
    losses, chosen, rejected = CPOTrainer.cpo_loss(trl, pairs.chosen, pairs.rejected)
    ours, theirs = cpo_loss(pairs.chosen, pairs.rejected, nll, cpo_alpha=0.7, **options), losses.mean() + 0.7 * nll
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (ours.loss, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    log = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "nll_loss": nll,
    }
    assert {k: v.item() for k, v in ours.metrics.items()} == pytest.approx({k: v.mean().item() for k, v in log.items()})
    simple = cpo_loss(pairs.chosen, pairs.rejected, cpo_alpha=0, **options)
    torch.testing.assert_close(simple.loss, losses.mean(), rtol=1e-12, atol=1e-12)
    assert "nll_loss" not in simple.metrics
    if loss_type == "cpo_simpo":  # SimPO, which TRL gives with cpo_alpha=0
        alone = cpo_loss(pairs.chosen, pairs.rejected, nll, **{**options, "loss_type": "simpo"})
        torch.testing.assert_close(alone.loss, losses.mean(), rtol=1e-12, atol=1e-12)


def test_ppo() -> None:
    """The inner loop of TRL 1.12's ``PPOTrainer.train``, transcribed (TRL 1.16 has no PPO trainer)."""

    def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    logps, old, _, mask = batch()
    old = logps.detach() + 0.4 * torch.randn_like(old)
    advantage, mb_return, mb_values = (torch.randn(R, T - 1) for _ in range(3))
    vpred = torch.randn(R, T - 1, requires_grad=True)

    vpredclipped = torch.clamp(vpred, mb_values - 0.25, mb_values + 0.25)
    vf_losses1 = torch.square(vpred - mb_return)
    vf_losses2 = torch.square(vpredclipped - mb_return)
    vf_loss = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), mask)
    ratio = torch.exp(logps - old)
    pg_losses = -advantage * ratio
    pg_losses2 = -advantage * torch.clamp(ratio, 1.0 - 0.2, 1.0 + 0.2)
    pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), mask)
    theirs = pg_loss + 0.1 * vf_loss

    ours = ppo_loss(
        logps, old, advantage, mask, values=vpred, old_values=mb_values, returns=mb_return, cliprange_value=0.25
    )
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(loss, (logps, vpred), retain_graph=True) for loss in (ours.loss, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    log = {
        "loss/policy_avg": pg_loss,
        "loss/value_avg": vf_loss,
        "policy/clipfrac_avg": masked_mean((pg_losses2 > pg_losses).float(), mask),
        "val/clipfrac_avg": masked_mean((vf_losses2 > vf_losses1).float(), mask),
        "policy/approxkl_avg": masked_mean(0.5 * (logps - old) ** 2, mask),  # TRL means over padding too
        "val/ratio": masked_mean(ratio, mask),
    }
    for name, value in log.items():
        assert ours.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    value = value_loss(vpred, mb_values, mb_return, mask, cliprange_value=0.25)
    torch.testing.assert_close(value.loss, vf_loss, rtol=1e-6, atol=1e-6)
