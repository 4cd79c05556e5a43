"""Public losses: reductions, weights, metrics, what carries a gradient, low precision."""

import math

import pytest
import torch

from prefkern.losses import dpo_loss, kto_kl, kto_loss, orpo_loss, ppo_loss, value_loss

CHOSEN, REJECTED = torch.tensor([-3.0, -8.0]), torch.tensor([-7.0, -4.0])
REF_CHOSEN, REF_REJECTED = torch.tensor([-5.0, -7.0]), torch.tensor([-6.0, -7.0])  # D = (2, -1), (-1, 3)
PAIRS = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


def close(got: torch.Tensor, want: float | list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-6, atol=1e-7)


def values(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def test_dpo_reductions_weights_and_metrics() -> None:
    per_pair = [0.20141328, 2.12692801]
    close(dpo_loss(*PAIRS, beta=0.5, reduction="none").loss, per_pair)
    close(dpo_loss(*PAIRS, beta=0.5, reduction="sum").loss, sum(per_pair))
    loss, metrics = dpo_loss(*PAIRS, beta=0.5)
    close(loss, sum(per_pair) / 2)
    weighted = dpo_loss(*PAIRS, beta=0.5, weights=torch.tensor([3.0, 0.5])).loss
    close(weighted, (3 * per_pair[0] + 0.5 * per_pair[1]) / 2)
    assert values(metrics) == pytest.approx(
        {
            "rewards/chosen": 0.25,
            "rewards/rejected": 0.5,
            "rewards/accuracies": 0.5,
            "rewards/margins": -0.25,
            "logps/chosen": -5.5,
            "logps/rejected": -5.5,
        }
    )


def test_dpo_on_raw_scores_is_the_form_with_reference_zero() -> None:
    zero = torch.zeros(2)
    want = -torch.log(torch.exp(0.1 * CHOSEN) / (torch.exp(0.1 * CHOSEN) + torch.exp(0.1 * REJECTED))).mean()
    torch.testing.assert_close(dpo_loss(CHOSEN, REJECTED, zero, zero).loss, want)


def test_kto_reductions_and_metrics() -> None:
    lp, ref, labels = torch.tensor([-1.0, -4.0, -2.5]), torch.tensor([-3.0, -3.0, -3.0]), torch.tensor([1, 0, 1])
    options = {"kl": 0.4, "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    per_example = [0.46503827, 0.26544978, 0.73125391]
    close(kto_loss(lp, ref, labels, reduction="none", **options).loss, per_example)
    loss, metrics = kto_loss(lp, ref, labels, **options)
    close(loss, sum(per_example) / 3)
    assert values(metrics) == pytest.approx(
        {
            "rewards/chosen": 0.625,
            "rewards/rejected": -0.5,
            "rewards/margins": 1.125,
            "logps/chosen": -1.75,
            "logps/rejected": -4.0,
            "count/chosen": 2,
            "count/rejected": 1,
            "kl": 0.4,
        }
    )


@pytest.mark.parametrize("kl", [0.4, torch.tensor(0.4), torch.tensor([0.4]), torch.tensor([0.4, 0.4])])
def test_kto_baselines_of_every_kind_agree(kl) -> None:
    lp, ref, labels = torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -3.0]), torch.tensor([True, False])
    close(kto_loss(lp, ref, labels, kl=kl, beta=0.5).loss, (1 / (1 + math.exp(0.8)) + 1 / (1 + math.exp(0.7))) / 2)


def test_kto_takes_the_baseline_as_it_is() -> None:
    """Only kto_kl clamps and averages; a NaN propagates."""
    lp, ref, labels = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([True, True])
    got = kto_loss(lp, ref, labels, kl=torch.tensor([-2.0, 2.0]), beta=1.0, reduction="none").loss
    close(got, [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])
    assert kto_loss(lp, ref, labels, kl=torch.tensor(math.nan)).loss.isnan()


def test_orpo_reductions_and_metrics() -> None:
    chosen, rejected = torch.tensor([-0.1, -1.0, -3.0]), torch.tensor([-0.7, -0.05, -2.5])
    penalty = [0.09870818, 3.54135504, 0.99574255]
    close(orpo_loss(chosen, rejected, torch.tensor(2.0), beta=0.5, reduction="none").loss, [2 + p / 2 for p in penalty])
    per_pair = orpo_loss(chosen, rejected, torch.tensor([1.0, 2.0, 6.0]), beta=0.5)
    close(per_pair.loss, 3 + sum(penalty) / 6)
    assert per_pair.metrics["nll_loss"].item() == 3.0
    assert per_pair.metrics["log_odds_ratio"].item() == pytest.approx(-sum(penalty) / 3)
    assert per_pair.metrics["rewards/accuracies"].item() == pytest.approx(1 / 3)


def test_ppo_terms_add_up() -> None:
    lp = torch.tensor([[0.5, 2.0]]).log()
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    policy = (-0.5 - 1.2) / 2
    kl = ((0.5 - 1 - math.log(0.5)) * 0 + (2 - 1 - math.log(2.0)) + (0.5 - 1 - math.log(0.5))) / 2  # e^x - x - 1
    got = ppo_loss(
        lp,
        zeros,
        ones,
        ref_logps=zeros,
        kl_coef=0.3,
        entropy=torch.tensor([[1.0, 3.0]]),
        entropy_coef=0.5,
        values=torch.tensor([[1.0, 5.0]]),
        old_values=zeros,
        returns=torch.tensor([[2.0, 5.0]]),
        value_mask=torch.tensor([[1, 0]]),
        vf_coef=0.25,
    )
    close(got.loss, policy + 0.3 * kl - 0.5 * 2.0 + 0.25 * 1.62)
    assert values(got.metrics) == pytest.approx(
        {
            "loss/policy_avg": policy,
            "kl": kl,
            "policy/entropy_avg": 2.0,
            "policy/clipfrac_avg": 0.5,
            "policy/clipfrac_low": 0.0,
            "policy/clipfrac_high": 0.5,
            "policy/approxkl_avg": math.log(2) ** 2 / 2,
            "val/ratio": 1.25,
            "val/ratio_var": 0.5625,
            "loss/value_avg": 1.62,
            "val/clipfrac_avg": 1.0,
            "val/var_explained": 0.0,
        }
    )


def test_ppo_metrics_without_their_terms() -> None:
    """A reference or an entropy without a coefficient is a metric and adds nothing."""
    lp, zeros = torch.tensor([[0.5, 2.0]]).log(), torch.zeros(1, 2)
    bare = ppo_loss(lp, zeros, zeros + 1)
    watched = ppo_loss(lp, zeros, zeros + 1, ref_logps=zeros, entropy=zeros + 3)
    assert torch.equal(bare.loss, watched.loss)
    assert set(watched.metrics) - set(bare.metrics) == {"kl", "policy/entropy_avg"}


def test_unreduced_ppo() -> None:
    lp = torch.tensor([[0.5, 2.0], [1.0, 1.0]]).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    close(
        ppo_loss(lp, torch.zeros(2, 2), torch.tensor([1.0, 2.0]), mask, reduction="none").loss,
        [[-0.5, -1.2], [-2.0, 0.0]],
    )


def test_explained_variance() -> None:
    returns, v = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.5, 3.0, 3.5])
    got = value_loss(v, v, returns).metrics["val/var_explained"]
    close(got, 1 - (returns - v).var().item() / returns.var().item())


def test_gradients_reach_the_policy_only() -> None:
    def leaves(count: int, shape: tuple[int, ...] = (4,)) -> list[torch.Tensor]:
        return [(-torch.rand(shape)).requires_grad_() for _ in range(count)]

    a, b, c, d = leaves(4)
    dpo_loss(a, b, c, d).loss.backward()
    assert [x.grad is None for x in (a, b, c, d)] == [False, False, True, True]
    a, b, c = leaves(3)
    kto_loss(a, b, torch.tensor([1, 0, 1, 0]), kl=c).loss.backward()
    assert [x.grad is None for x in (a, b, c)] == [False, True, True]
    assert not kto_kl(a, b).requires_grad
    lp, old, A, ref, entropy, v, old_v, returns = leaves(8, (2, 3))
    out = ppo_loss(
        lp,
        old,
        A,
        ref_logps=ref,
        kl_coef=1.0,
        entropy=entropy,
        entropy_coef=1.0,
        values=v,
        old_values=old_v,
        returns=returns,
    )
    out.loss.backward()
    assert [x.grad is None for x in (lp, entropy, v)] == [False] * 3
    assert [x.grad is None for x in (old, A, ref, old_v, returns)] == [True] * 5
    assert not any(value.requires_grad for value in out.metrics.values())


def test_on_policy_ratio_one_has_the_full_gradient() -> None:
    """old_logps = logps, not detached: the gradient is that of -A lp."""
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    ppo_loss(lp, lp, torch.tensor([3.0, -5.0])).loss.backward()
    assert lp.grad.tolist() == [-1.5, 2.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_float32_or_wider(dtype) -> None:
    """16-bit inputs give exactly what their widened values give: nothing in between is rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = [(-torch.rand(2, 5) * 4).to(dtype) for _ in range(6)]
    labels = torch.tensor([1, 0, 1, 1, 0])
    low, high = ([t.to(kind) for t in x] for kind in (dtype, wide))
    for run in (
        lambda t: dpo_loss(t[0][0], t[1][0], t[2][0], t[3][0], weights=t[4][0]),
        lambda t: kto_loss(t[0][0], t[1][0], labels, kl=t[2][0]),
        lambda t: orpo_loss(t[0][0], t[1][0], t[2][0].abs()),
        lambda t: ppo_loss(
            t[0], t[1], t[2], ref_logps=t[3], kl_coef=0.1, values=t[3], old_values=t[4], returns=t[5], entropy=t[5]
        ),
    ):
        got, want = run(low), run(high)
        assert got.loss.dtype == wide
        assert torch.equal(got.loss, want.loss)
        assert values(got.metrics) == values(want.metrics)


def test_a_small_normalized_gradient_survives_float16() -> None:
    """1 / 100000 is below float16's smallest normal number; the division happens in float32."""
    lp = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    out = ppo_loss(lp, torch.zeros(4, dtype=torch.float16), torch.full((4,), 512.0), normalizer=100000)
    out.loss.backward()
    torch.testing.assert_close(lp.grad, torch.full((4,), -512e-5).half())


@pytest.mark.parametrize("beta", [0.1, 10.0])
def test_scale_of_extreme_log_probs(beta) -> None:
    """Sums of tens of thousands stay finite in value and gradient."""
    chosen, rejected = torch.tensor([-5e4, -1.0], requires_grad=True), torch.tensor([-1.0, -5e4], requires_grad=True)
    for out in (
        dpo_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), beta=beta),
        kto_loss(chosen, torch.zeros(2), torch.tensor([1, 0]), beta=beta),
        orpo_loss(chosen, rejected, torch.tensor(0.0), beta=beta),
    ):
        assert out.loss.isfinite()
        assert all(
            g is None or g.isfinite().all()
            for g in torch.autograd.grad(out.loss, (chosen, rejected), allow_unused=True)
        )


def test_metrics_can_be_left_out() -> None:
    x = -torch.rand(4)
    assert dpo_loss(x, x, x, x, metrics=False).metrics == {}
    assert kto_loss(x, x, x > 0, metrics=False).metrics == {}
    assert orpo_loss(x, x, x, metrics=False).metrics == {}
    assert ppo_loss(x, x, x, ref_logps=x, values=x, old_values=x, returns=x, metrics=False).metrics == {}
    assert value_loss(x, x, x, metrics=False).metrics == {}


def test_accuracy_is_a_strictly_larger_reward() -> None:
    chosen, rejected = -torch.tensor([1.0, 1.0, 1.0, 1.1]), -torch.tensor([1.0, 1.1, 0.9, 1.0])
    zero = torch.zeros(4)
    assert dpo_loss(chosen, rejected, zero, zero).metrics["rewards/accuracies"].item() == 0.25
    assert orpo_loss(chosen, rejected, zero).metrics["rewards/accuracies"].item() == 0.25
