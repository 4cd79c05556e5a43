"""Every policy loss: its value of the example, and value and gradient against float64 written from the formula."""

import math
import typing

import pytest
import torch
from policy_oracle import OWN, oracle
from torch import Tensor

from prefkern.losses import grpo_loss, ppo_loss, ratios, rloo_loss
from prefkern.losses.grpo import GRPO
from prefkern.losses.policy import EXAMPLE, POLICY_LOSSES, PolicyLossType

B, T = 5, 7
LENGTHS = torch.tensor([7, 0, 3, 1, 6])
MASK = torch.arange(T) < LENGTHS[:, None]
MASK[0, 2] = False
NEEDED = {"epsilon_high": 1.3, "dro_beta": 0.4}


def options_of(name: str) -> dict[str, float]:
    """What the loss needs, and covariances within reach of a small batch."""
    options = {key: NEEDED[key] for key in POLICY_LOSSES[name].needs if key in NEEDED}
    if name in ("clip_cov", "kl_cov"):
        options |= {"cov_ratio": 0.3, "clip_cov_low": 0.4, "clip_cov_high": 0.9}
    return options


def normalizer_of(name: str) -> dict[str, float]:
    return {"normalizer": 13.0} if "normalizer" in POLICY_LOSSES[name].needs else {}


def batch(spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of policy, sampler and reference, and per-token advantages of both signs, one of them 0."""
    lp = -torch.rand(B, T) * 2
    old, ref = lp + spread * torch.randn(B, T), lp + 0.5 * torch.randn(B, T)
    A = torch.randn(B, T)
    A[0, 0] = 0.0
    return lp, old.clamp(max=-1e-3), ref, A


def compare(got: Tensor, want: Tensor, lp: Tensor, wide: Tensor) -> None:
    """Value and gradient, to 1e-5 of the largest."""
    (grad,), (exact,) = torch.autograd.grad(got, lp), torch.autograd.grad(want, wide)
    assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    assert exact.abs().max() > 0
    assert (grad.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def check(name: str, A: Tensor, spread: float = 0.3, weights: Tensor | None = None, **options: object) -> None:
    lp, old, ref, _ = batch(spread)
    given = {**options_of(name), **normalizer_of(name), **options}
    lp.requires_grad_()
    wide = lp.detach().double().requires_grad_()
    tensors = {"ref_logps": ref} if given.get("beta") else {}
    got = grpo_loss(lp, old, A, MASK, loss_type=name, token_weights=weights, **tensors, **given).loss
    per_token = A if A.ndim == 2 else A[:, None].expand(B, T)
    dense = None if weights is None else weights if weights.ndim == 2 else weights[:, None].expand(B, T)
    want = oracle(
        name,
        wide,
        old.double(),
        per_token.double(),
        MASK,
        ref=ref.double(),
        weights=None if dense is None else dense.double(),
        **given,
    )
    compare(got, want, lp, wide)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_policy_loss_has_its_value_of_the_example(name) -> None:
    row = POLICY_LOSSES[name]
    got = row.function(EXAMPLE, GRPO(loss_type=name, **row.example))
    torch.testing.assert_close(got, torch.tensor(row.expected), rtol=1e-6, atol=1e-7)


def test_the_names_of_type_checkers_are_those_of_the_table() -> None:
    assert set(typing.get_args(PolicyLossType)) == set(POLICY_LOSSES) == set(OWN)
    assert {name: row.reduction for name, row in POLICY_LOSSES.items()} == OWN


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_value_and_gradient_are_those_of_the_formula(name, per_sequence) -> None:
    _, _, _, A = batch()
    check(name, A[:, 1] if per_sequence else A)


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name, row in POLICY_LOSSES.items() for level in row.levels if level != "token"],
)
def test_the_ratio_at_other_levels(name, level) -> None:
    _, _, _, A = batch()
    check(name, A, importance_sampling_level=level, beta=0.2)
    check(name, A[:, 2], importance_sampling_level=level, spread=0.1)


@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum", "fixed"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_takes_every_reduction(name, reduction) -> None:
    _, _, _, A = batch()
    check(name, A, reduction=reduction, normalizer=11.0)
    if reduction != "token":
        check(name, A, reduction=reduction, normalizer=None)
    if reduction == "fixed":
        check(name, A, reduction=reduction, max_completion_length=31.0)


@pytest.mark.parametrize("gradient", ["plain", "unbiased"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["grpo", "dapo", "vespo", "reinforce"])
def test_the_divergence_from_the_reference(name, estimator, gradient, corrected) -> None:
    _, _, _, A = batch()
    options = {"kl_estimator": estimator, "kl_gradient": gradient, "use_bias_correction_kl": corrected}
    check(name, A, beta=0.7, **options)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_corrections_multiply_the_policy_term_alone(name) -> None:
    _, _, _, A = batch()
    weights = torch.rand(B, T) * 2
    weights[0, 0] = 0.0
    check(name, A, weights=weights, beta=0.3)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gmpo", "reinforce"])
def test_corrections_may_be_per_sequence(name) -> None:
    _, _, _, A = batch()
    check(name, A, weights=torch.rand(B) * 2)


def test_vespo_counts_the_correction_of_a_sequence_once() -> None:
    lp, old, _, A = batch()
    per_sequence, whole = torch.rand(B) + 0.5, torch.ones(B, T)
    whole[:, 0] = per_sequence
    options = {"loss_type": "vespo", "normalizer": 3}
    once = grpo_loss(lp, old, A, MASK, token_weights=per_sequence, **options).loss
    torch.testing.assert_close(once, grpo_loss(lp, old, A, MASK, token_weights=whole, **options).loss)
    assert once.item() != grpo_loss(lp, old, A, MASK, **options).loss.item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.6}),
        ("luspo", {"delta": 1.05}),
        ("sapo", {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.1}),
        ("vespo", {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 0.5}),
        ("gmpo", {"epsilon": 0.05, "epsilon_high": 0.3}),
        ("dppo_tv", {"epsilon": 0.02, "epsilon_high": 0.1, "delta": 1.1}),
        ("dppo_kl", {"epsilon": 0.002, "epsilon_high": 0.01}),
        ("importance_mask", {"epsilon": 0.02, "epsilon_high": 0.1, "importance_tau": 0.5}),
        ("kl_cov", {"kl_cov_coef": 2.0}),
        ("gspo_token", {"epsilon": 0.01, "epsilon_high": 0.02}),
    ],
)
def test_the_options_of_a_loss(name, options) -> None:
    _, _, _, A = batch()
    check(name, A, **options)


def test_without_old_logps_the_policy_is_its_own_sampler() -> None:
    lp, _, ref, A = batch()
    lp.requires_grad_()
    for name, row in POLICY_LOSSES.items():
        if "old_logps" in row.needs:
            continue
        options = {**options_of(name), **normalizer_of(name), "loss_type": name, "ref_logps": ref, "beta": 0.1}
        none, own = (grpo_loss(lp, old, A, MASK, **options).loss for old in (None, lp.detach()))
        assert none.item() == own.item()
        assert torch.equal(*(torch.autograd.grad(loss, lp)[0] for loss in (none, own)))


@pytest.mark.parametrize("old_sums", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_rloo_is_the_clipped_ratio_of_sequences(old_sums, per_token) -> None:
    lp, old, _, A = batch(0.05)
    lp.requires_grad_()
    wide = lp.detach().double().requires_grad_()
    A = A if per_token else A[:, 0]
    sampled = (old * MASK).sum(1) if old_sums else old
    got = rloo_loss(lp, sampled, A, MASK, epsilon_high=0.05).loss
    dense = A if per_token else A[:, None].expand(B, T)
    options = {"importance_sampling_level": "product", "epsilon_high": 0.05}
    compare(got, oracle("grpo", wide, old.double(), dense.double(), MASK, **options), lp, wide)


def test_ppo_is_the_clipped_loss_of_the_table() -> None:
    lp, old, ref, A = batch()
    mine = {"kl_estimator": "k1", "kl_gradient": "unbiased", "delta": 1.4, "ref_logps": ref}
    shared = {"token_weights": torch.rand(B), "is_correct": torch.tensor([1, 0, 0, 1, 0]), "positive_nll_coef": 0.3}
    for reduction in ("token", "sequence", "sequence_sum", "fixed"):
        ours = ppo_loss(lp, old, A, MASK, cliprange=0.1, kl_coef=0.2, reduction=reduction, **mine, **shared)
        table = grpo_loss(
            lp, old, A, MASK, loss_type="bnpo", epsilon=0.1, beta=0.2, reduction=reduction, **mine, **shared
        )
        assert ours.loss.item() == table.loss.item()


def test_entropy_and_likelihood_terms_are_means_of_this_call() -> None:
    lp, old, _, A = batch()
    entropy, right = torch.rand(B, T).requires_grad_(), torch.tensor([1, 1, 0, 1, 0])
    plain = grpo_loss(lp, old, A, MASK, normalizer=100).loss
    terms = {"entropy": entropy, "entropy_coef": 0.3, "is_correct": right, "positive_nll_coef": 0.5}
    got = grpo_loss(lp, old, A, MASK, normalizer=100, **terms)
    nll = -lp[MASK & (right[:, None] == 1)].mean()
    torch.testing.assert_close(got.loss, plain - 0.3 * entropy[MASK].mean() + 0.5 * nll)
    none = grpo_loss(lp, old, A, MASK, normalizer=100, is_correct=torch.zeros(B), positive_nll_coef=0.5)
    assert none.loss.item() == plain.item()


def test_metrics() -> None:
    lp, old, ref, A = batch()
    entropy = torch.rand(B, T)
    _, metrics = grpo_loss(lp, old, A, MASK, normalizer=9, ref_logps=ref, beta=0.1, entropy=entropy)
    c = (lp - old).exp()
    low, high = (c < 0.8) & (A < 0), (c > 1.2) & (A > 0)
    k3 = ((ref - lp).exp() - (ref - lp) - 1) * c
    want = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
        "policy/approxkl_avg": (lp - old) ** 2 / 2,
        "val/ratio": c,
        "kl": k3,
        "entropy": entropy,
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {k: v[MASK].float().mean().item() for k, v in want.items()}, rel=1e-5
    )
    _, metrics = grpo_loss(lp, old, A[:, 1], MASK, normalizer=9, importance_sampling_level="sequence", entropy=entropy)
    rows = torch.stack([(lp - old)[i, MASK[i]].mean() if MASK[i].any() else torch.tensor(0.0) for i in range(B)])
    assert metrics["policy/approxkl_avg"].item() == pytest.approx((rows**2 / 2).mean().item(), rel=1e-5)
    assert metrics["entropy"].item() == pytest.approx(entropy[MASK].mean().item(), rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


def test_unbiased_gradient_is_that_of_the_divergence_on_average() -> None:
    """Over all three outcomes, weighted by their probability: the exact gradient of KL(policy || reference)."""
    logits = torch.tensor([0.3, -1.0, 0.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.5, 0.4, 0.2], dtype=torch.float64).log_softmax(0)
    sampler = torch.tensor([0.1, 0.1, -0.6], dtype=torch.float64).log_softmax(0)
    lp = logits.log_softmax(0)
    (want,) = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), logits, retain_graph=True)
    for estimator in ("k1", "k2", "k3"):
        k = ratios.unbiased_kl_penalty(lp, ref, (lp - sampler).exp().detach(), estimator)
        assert torch.equal(k.detach(), ratios.kl_penalty(lp, ref, estimator).detach())
        (got,) = torch.autograd.grad((sampler.exp() * k).sum(), logits, retain_graph=True)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rest", [0.7, 1e-4, 1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("shift", [1e-3, 0.5, 3.0])
def test_binary_divergence_is_exact_near_certainty(rest, shift) -> None:
    """``1 - p`` moves by a factor while p rounds to 1: the divergence is of the order of ``1 - p``, far below 1e-7."""
    lp, lq = (torch.tensor([math.log1p(-r)]) for r in (rest * math.exp(-shift), rest))
    x, y = lp.double().item(), lq.double().item()
    taken, not_taken = math.exp(y) * (y - x), -math.expm1(y) * math.log(math.expm1(y) / math.expm1(x))
    # each term within a few roundings, of the logarithm of a ratio near 1 in absolute terms
    allowed = 3 * torch.finfo(torch.float32).eps * (abs(taken) + abs(not_taken) - math.expm1(y))
    assert ratios.binary_kl(lp, lq).item() == pytest.approx(taken + not_taken, rel=0, abs=allowed)


def test_binary_divergence_at_its_ends() -> None:
    sure, never, half = torch.tensor([0.0]), torch.tensor([-math.inf]), torch.tensor([math.log(0.5)])
    assert ratios.binary_kl(sure, sure).item() == ratios.binary_kl(never, never).item() == 0.0
    assert ratios.binary_kl(sure, half).item() == ratios.binary_kl(never, half).item() == math.inf
    assert ratios.binary_kl(half, sure).item() == pytest.approx(math.log(2.0))
    assert ratios.binary_kl(half, never).item() == pytest.approx(math.log(2.0))
