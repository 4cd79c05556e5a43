"""Padded equals packed, accumulation equals one large batch, nothing scored is zero with a graph: for every loss."""

import math

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
)

B, T = 3, 7
LENGTHS = torch.tensor([7, 0, 3, 5, 6, 1])
CU = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
INSIDE = torch.arange(T) < LENGTHS[:, None]
N_SCORED_ROW = 3  # a row that has tokens, none of them scored


def token_tensor() -> Tensor:
    return torch.randn(2 * B, T, dtype=torch.float64)


def mask_tensor() -> Tensor:
    mask = INSIDE & (torch.rand(2 * B, T) < 0.7)
    mask[N_SCORED_ROW] = False
    return mask


def dpo(lp: Tensor, mask: Tensor, cu: Tensor | None, **options: object) -> Tensor:
    policy = pair_logps(lp, mask=mask, cu_seqlens=cu, ld_alpha=options.pop("ld_alpha", None))
    ref = torch.linspace(-9.0, -1.0, 2 * B, dtype=lp.dtype)
    lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
    return dpo_loss(policy.chosen, policy.rejected, ref[:B], ref[B:], **lengths, **options).loss


def kto(lp: Tensor, mask: Tensor, cu: Tensor | None, **options: object) -> Tensor:
    ref = torch.linspace(-9.0, -1.0, 2 * B, dtype=lp.dtype)
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    logps = sequence_logps(lp, mask=mask, cu_seqlens=cu)
    return kto_loss(logps, ref, labels, kl=kto_kl(logps + 3.0, ref), **options).loss


def orpo(lp: Tensor, mask: Tensor, cu: Tensor | None) -> Tensor:
    average = pair_logps(-lp.abs(), mask=mask, cu_seqlens=cu, average=True)
    return orpo_loss(average.chosen, average.rejected, -average.chosen).loss


def cpo(lp: Tensor, mask: Tensor, cu: Tensor | None) -> Tensor:
    average = pair_logps(-lp.abs(), mask=mask, cu_seqlens=cu, average=True)
    return cpo_loss(average.chosen, average.rejected, -average.chosen, loss_type="simpo", alpha=0.2).loss


CASES = {
    "dpo sigmoid": dpo,
    "dpo hinge": lambda lp, mask, cu: dpo(lp, mask, cu, loss_type="hinge"),
    "dpo ipo ld": lambda lp, mask, cu: dpo(lp, mask, cu, loss_type="ipo", ld_alpha=0.4),
    "kto": kto,
    "kto apo": lambda lp, mask, cu: kto(lp, mask, cu, loss_type="apo_zero_unpaired"),
    "orpo": orpo,
    "cpo": cpo,
}


@pytest.mark.parametrize("name", CASES)
def test_padded_equals_packed(name) -> None:
    padded, mask = token_tensor().requires_grad_(), mask_tensor()
    packed = padded.detach()[INSIDE].requires_grad_()
    loss, same = CASES[name](padded, mask, None), CASES[name](packed, mask[INSIDE], CU)
    loss.backward()
    same.backward()
    torch.testing.assert_close(same, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed.grad, padded.grad[INSIDE], rtol=1e-12, atol=1e-12)
    assert (padded.grad[~mask] == 0).all()


POLICY = {
    "token": {},
    "token normalized": {"normalizer": torch.tensor(31)},
    "sequence": {"reduction": "sequence"},
    "sequence_sum": {"reduction": "sequence_sum", "normalizer": 11},
}


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("name", POLICY)
def test_ppo_padded_equals_packed(name, per_sequence) -> None:
    mask = mask_tensor()
    tensors = {key: token_tensor() for key in ("old_logps", "ref_logps", "old_values", "returns")}
    leaves = {key: token_tensor().requires_grad_() for key in ("logps", "entropy", "values")}
    advantages = torch.randn(2 * B).double() if per_sequence else token_tensor()
    coefficients = {"kl_coef": 0.2, "entropy_coef": 0.1, "vf_coef": 0.3, **POLICY[name]}
    padded = ppo_loss(advantages=advantages, mask=mask, **leaves, **tensors, **coefficients)
    flat = {key: value.detach()[INSIDE].requires_grad_() for key, value in leaves.items()}
    packed = ppo_loss(
        advantages=advantages if per_sequence else advantages[INSIDE],
        mask=mask[INSIDE],
        cu_seqlens=CU.to(torch.int32),
        **flat,
        **{key: value[INSIDE] for key, value in tensors.items()},
        **coefficients,
    )
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-12)
    padded.loss.backward()
    packed.loss.backward()
    for key in leaves:
        torch.testing.assert_close(flat[key].grad, leaves[key].grad[INSIDE], rtol=1e-12, atol=1e-12)
        assert (leaves[key].grad[~mask] == 0).all()
        assert leaves[key].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("reduction", "normalizer"), [("token", "tokens"), ("sequence", "rows"), ("sequence_sum", "rows")]
)
def test_ppo_accumulation_equals_one_batch(reduction, normalizer) -> None:
    mask, lp, old = mask_tensor(), token_tensor().requires_grad_(), token_tensor()
    A, ref = torch.randn(2 * B).double(), token_tensor()
    count = {"tokens": mask.sum(), "rows": torch.tensor(2 * B)}[normalizer]
    options = {"reduction": reduction, "kl_coef": 0.1}
    whole = ppo_loss(lp, old, A, mask, ref_logps=ref, **options).loss
    (want,) = torch.autograd.grad(whole, lp)
    parts = [slice(0, 1), slice(1, 2), slice(2, 6)]
    losses = [ppo_loss(lp[s], old[s], A[s], mask[s], ref_logps=ref[s], normalizer=count, **options).loss for s in parts]
    (got,) = torch.autograd.grad(sum(losses), lp)
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(got, want)


def test_a_given_normalizer_makes_tokens_independent_of_the_batch() -> None:
    """The local count couples a token to the masks of the others; a given count does not."""
    lp, old, A, mask = token_tensor().requires_grad_(), token_tensor(), token_tensor(), INSIDE.clone()
    fewer = mask.clone()
    fewer[2:] = False

    def gradient(scored: Tensor, **options: object) -> Tensor:
        return torch.autograd.grad(ppo_loss(lp, old, A, scored, **options).loss, lp)[0][0]

    assert torch.equal(gradient(mask, normalizer=20), gradient(fewer, normalizer=20))
    assert not torch.equal(gradient(mask), gradient(fewer))


def test_value_loss_accumulation_and_layouts() -> None:
    mask, values, old, returns = mask_tensor(), token_tensor().requires_grad_(), token_tensor(), token_tensor()
    whole = value_loss(values, old, returns, mask)
    parts = [
        value_loss(values[s], old[s], returns[s], mask[s], normalizer=mask.sum()).loss
        for s in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    flat = value_loss(values[INSIDE], old[INSIDE], returns[INSIDE], mask[INSIDE], cu_seqlens=CU)
    torch.testing.assert_close(flat, whole)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_everything_masked(name, bad) -> None:
    lp = torch.full((2 * B, T), bad, requires_grad=True)
    CASES[name](lp, torch.zeros(2 * B, T, dtype=torch.bool), None).backward()
    assert (lp.grad == 0).all()


@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("scored", [0, 2])
def test_ppo_masked_values_never_leak(reduction, bad, scored) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, :scored] = True
    clean = {key: torch.randn(2, 3) for key in ("logps", "old_logps", "ref_logps", "entropy", "values", "old_values")}
    clean |= {"returns": torch.randn(2, 3), "advantages": torch.randn(2, 3)}
    options = {"kl_coef": 0.1, "entropy_coef": 0.1, "reduction": reduction, "delta": 2.0}
    want = ppo_loss(**{**clean, "entropy": clean["entropy"].requires_grad_()}, mask=mask, **options)
    dirty = {key: torch.where(mask, value.detach(), bad) for key, value in clean.items()}
    leaves = {key: dirty[key].requires_grad_() for key in ("logps", "entropy", "values")}
    got = ppo_loss(**{**dirty, **leaves}, mask=mask, **options)
    torch.testing.assert_close(got, want)
    assert all(value.isfinite() for value in got.metrics.values())
    if scored == 0:
        assert got.loss.item() == 0.0
        assert {value.item() for value in got.metrics.values()} == {0.0}
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        got.loss.backward()
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[~mask] == 0).all()


def test_empty_batches_are_zero_with_a_graph() -> None:
    x = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    losses = [
        dpo_loss(x, empty, empty, empty),
        dpo_loss(x, empty, empty, empty, loss_type="ipo", chosen_lengths=empty, rejected_lengths=empty),
        kto_loss(x, empty, empty.bool()),
        cpo_loss(x, empty, torch.tensor(2.0)),
        orpo_loss(x, empty, torch.tensor(2.0)),
        orpo_loss(x, empty, empty),
        ppo_loss(x, empty, empty),
        ppo_loss(x, empty, torch.zeros(2), cu_seqlens=torch.tensor([0, 0, 0]), reduction="sequence"),
        ppo_loss(x.view(0, 3), empty.view(0, 3), empty),
        value_loss(x, empty, empty),
    ]
    for loss, metrics in losses:
        assert loss.item() == 0.0
        assert loss.requires_grad
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.shape == (0,)
        assert all(value.isfinite() for value in metrics.values())
