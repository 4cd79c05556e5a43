"""Expected arrays worked out by hand from the formulas (beta = 1/2 unless said otherwise)."""

import math

import pytest
import torch

from prefkern.losses import cpo, kto, orpo, preference, ratios, surrogates, value
from prefkern.losses.cpo import CPO
from prefkern.losses.dpo import DPO
from prefkern.losses.grpo import GRPO
from prefkern.losses.kto import KTO, UNPAIRED_LOSSES
from prefkern.losses.preference import EXAMPLE, EXAMPLE_BETA, EXAMPLE_SMOOTHING, PAIR_LOSSES, Pairs

D_CHOSEN, D_REJECTED = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([-1.0, 3.0, 0.0])
LENGTHS = torch.tensor([4, 2, 0]), torch.tensor([2, 3, 1])


def close(got: torch.Tensor, want: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_pair_loss_has_its_value_of_the_example(name: str) -> None:
    row = PAIR_LOSSES[name]
    options = DPO(EXAMPLE_BETA, name, EXAMPLE_SMOOTHING if row.smoothing else 0.0)
    close(row.function(EXAMPLE, options), list(row.expected))


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_every_unpaired_loss_has_its_value_of_the_example(name: str) -> None:
    row = UNPAIRED_LOSSES[name]
    log_ratios, labels = torch.tensor([1.0, -0.5]), torch.tensor([True, False])
    close(row.function(log_ratios, labels, 0.2, KTO(0.5, undesirable_weight=2.0)), list(row.expected))


@pytest.mark.parametrize(
    ("name", "smoothing", "want"),
    [
        ("sigmoid", 0.0, [0.20141328, 2.12692801, 0.69314718]),  # log(1 + e^-1.5), log(1 + e^2), log 2
        ("sigmoid", 0.1, [0.35141328, 1.92692801, 0.69314718]),  # 0.9 and 0.1 of x = 1.5, -2: + 0.1 x
        ("hinge", 0.0, [0.0, 3.0, 1.0]),  # 1 - 1.5, 1 + 2, 1
        ("ipo", 0.0, [0.0, 6.25, 1.0]),  # (0.5 + 0.5 - 1)^2, (-0.5 - 1 - 1)^2, (0 - 1)^2
    ],
)
def test_pairs(name, smoothing, want) -> None:
    pairs = Pairs(D_CHOSEN, D_REJECTED, *LENGTHS)
    close(preference.PAIR_LOSSES[name].function(pairs, DPO(0.5, name, smoothing)), want)


def test_pair_losses_stay_finite_far_out() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = preference.sigmoid(Pairs(far, -far), DPO(1.0))
    close(loss, [0.0, 2e4])
    loss.sum().backward()
    close(far.grad, [0.0, -2.0])


@pytest.mark.parametrize(
    ("loss_type", "options", "want"),
    [
        ("sigmoid", {}, [0.20141328, 2.12692801]),  # x = 3, -4: log(1 + e^-1.5), log(1 + e^2)
        ("sigmoid", {"label_smoothing": 0.1}, [0.35141328, 1.92692801]),  # + 0.1 (x / 2)
        ("hinge", {}, [0.0, 3.0]),
        ("ipo", {}, [4.0, 25.0]),  # (x - 1)^2
        ("simpo", {"simpo_gamma": 0.5}, [0.31326169, 2.57888973]),  # log(1 + e^-1), log(1 + e^2.5)
        # rewards 2 (1 - e^(-lp / 2)): x = 2 (e^2 - e^0.5), 2 (e^0.5 - e^2.5); relu(1 - x / 2)
        ("hinge", {"alpha": 0.5}, [0.0, 11.53377269]),
    ],
)
def test_cpo(loss_type, options, want) -> None:
    chosen, rejected = torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -1.0])
    close(cpo.cpo(chosen, rejected, CPO(0.5, loss_type, **options)), want)


def test_cpo_reward_of_an_improbable_sequence_is_finite() -> None:
    """p^-alpha of a sum of -1000 is held at e^80, without a gradient; a small alpha is near the log-probability."""
    logps = torch.tensor([-1000.0, -2.0], dtype=torch.float64, requires_grad=True)
    rewards = cpo.reward(logps, 0.25)
    assert rewards.tolist() == pytest.approx([-4.0 * math.expm1(80.0), -4.0 * math.expm1(0.5)], rel=1e-14)
    assert torch.autograd.grad(rewards.sum(), logps)[0].tolist() == pytest.approx([0.0, math.exp(0.5)], rel=1e-14)
    assert cpo.reward(logps, 1e-12)[1].item() == pytest.approx(-2.0, rel=1e-11)
    assert cpo.reward(logps, 0.0).tolist() == [-1000.0, -2.0]


def test_kto() -> None:
    log_ratios, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, True])
    options = KTO(0.5, 1.5, 0.8)
    # 1.5 s(-0.8), 0.8 s(-0.7), 1.5 s(-0.05)
    close(kto.kto(log_ratios, labels, 0.4, options), [0.46503827, 0.26544978, 0.73125391])
    # 1.5 s(-1), 0.8 s(-0.5), 1.5 s(-0.25)
    close(kto.apo_zero_unpaired(log_ratios, labels, 0.4, options), [0.40341213, 0.30203253, 0.65673561])
    per_example = torch.tensor([0.4, -1.0, 0.5])
    close(kto.kto(log_ratios, labels, per_example, options), [0.46503827, 0.4, 0.75])


def test_kto_keeps_relative_accuracy_when_satisfied() -> None:
    """1 - s(60) is 0 in float32; the loss and its gradient are e^-60."""
    x = torch.tensor([60.0], requires_grad=True)
    loss = kto.kto(x, torch.tensor([True]), 0.0, KTO(1.0))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([math.exp(-60)]), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad, torch.tensor([-math.exp(-60)]), rtol=1e-5, atol=0)


def test_kto_kl() -> None:
    assert kto.kto_kl(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])).item() == 1.0
    assert kto.kto_kl(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])).item() == 0.0
    assert kto.kto_kl(torch.zeros(0), torch.zeros(0)).item() == 0.0
    assert math.isnan(kto.kto_kl(torch.tensor([math.nan, 1.0]), torch.zeros(2)).item())


def test_odds() -> None:
    chosen, rejected = torch.tensor([-0.1, -1.0, -3.0]), torch.tensor([-0.7, -0.05, -2.5])
    close(orpo.log_odds_ratio(chosen, rejected), [2.26582746, -3.51195296, -0.53458130])
    close(orpo.odds_ratio(chosen, rejected), [0.09870818, 3.54135504, 0.99574255])


def test_log1mexp_against_float64() -> None:
    x = -torch.logspace(-7, 1.9, 400, dtype=torch.float64)
    exact = torch.where(x > -1, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    low = orpo.log1mexp(x.float())
    # an argument off by one rounding moves the result by at most eps * |x| e^x / (1 - e^x), plus its own rounding
    eps = torch.finfo(torch.float32).eps
    allowed = eps * (x.abs() * x.exp() / -torch.expm1(x)) + 2 * eps * exact.abs()
    assert ((low.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("x", [-1e-30, -1e-9, -0.69, -0.7, -200.0, -math.inf])
def test_log1mexp_gradient(x) -> None:
    """d/dx log(1 - e^x) = -e^x / (1 - e^x), whatever the branch not taken would give."""
    leaf = torch.tensor(x, requires_grad=True)
    orpo.log1mexp(leaf).backward()
    want = -math.exp(x) / -math.expm1(x)
    torch.testing.assert_close(leaf.grad, torch.tensor(want), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("average", [0.0, -1e-30, -1e-9])
@pytest.mark.parametrize("side", [0, 1])
def test_odds_of_certainty_are_finite(average, side) -> None:
    sides = [torch.tensor([-0.7, -0.7]), torch.tensor([-0.2, -0.2])]
    sides[side][0] = average
    chosen, rejected = (x.requires_grad_() for x in sides)
    loss = orpo.odds_ratio(chosen, rejected)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()
    assert (chosen, rejected)[side].grad[0] == 0.0
    assert (chosen, rejected)[side].grad[1] != 0.0


def clipped(logps: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, options: GRPO) -> torch.Tensor:
    tokens = surrogates.Tokens(logps, old, advantages, ratios.log_ratio(logps, old))
    return surrogates.clipped(tokens, options)


def test_clipped_policy() -> None:
    """Ratios 1/2, 1, 1.1, 2, 4 with advantages +1 and -1, clip 0.2 and 0.3, then with the dual clip at 3."""
    w = torch.tensor([0.5, 1.0, 1.1, 2.0, 4.0]).log()
    options, old = GRPO(0.2, 0.3), torch.zeros(5)
    close(clipped(w, old, torch.ones(5), options), [-0.5, -1.0, -1.1, -1.3, -1.3])
    close(clipped(w, old, -torch.ones(5), options), [0.8, 1.0, 1.1, 2.0, 4.0])
    dual = GRPO(0.2, 0.3, 3.0)
    close(clipped(w, old, torch.ones(5), dual), [-0.5, -1.0, -1.1, -1.3, -1.3])
    close(clipped(w, old, -torch.ones(5), dual), [0.8, 1.0, 1.1, 2.0, 3.0])


def test_clipped_policy_gradient() -> None:
    """d loss / d lp = -c1 A where the clip is not active, 0 where it is."""
    lp = torch.tensor([0.5, 1.1, 2.0, 0.5, 4.0]).log().requires_grad_()
    A = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    clipped(lp, torch.zeros(5), A, GRPO(0.2, 0.3, 3.0)).sum().backward()
    close(lp.grad, [-1.0, -2.2, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("estimator", "want"), [("k1", [1.0, -1.0]), ("k2", [0.5, 0.5]), ("k3", [0.36787944, 0.71828183])]
)
def test_kl_penalty(estimator, want) -> None:
    close(ratios.kl_penalty(torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0]), estimator), want)


def test_k3_is_accurate_near_zero() -> None:
    """x^2 / 2 for a small x: e^x - x - 1 in float32 would give 0 or noise."""
    k3 = ratios.kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-12]), "k3")
    torch.testing.assert_close(k3, torch.tensor([2.0**-25]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("w", [25.0, -25.0, 1e5, -1e5, math.inf, -math.inf])
def test_extreme_log_ratios_are_held_without_a_gradient(w) -> None:
    other = torch.tensor([0.0])
    held = math.copysign(20.0, w)
    for function in (
        lambda lp: clipped(lp, other, torch.tensor([-1.0]), GRPO(0.2, 1e12)),
        lambda lp: ratios.kl_penalty(lp, other, "k1"),
        lambda lp: ratios.kl_penalty(lp, other, "k2"),
        lambda lp: ratios.kl_penalty(lp, other, "k3"),
    ):
        lp = torch.tensor([w], requires_grad=True)
        loss = function(lp)
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), function(torch.tensor([held])))
        assert lp.grad.item() == 0.0


def test_clipped_value() -> None:
    values, old, returns = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 1.0])
    # clipped to 0.2: (0.2 - 2)^2 > (1 - 2)^2; (1 - 0)^2 > 0.2^2; not clipped: (0.1 - 1)^2
    close(value.clipped_value(values, old, returns, 0.2), [1.62, 0.5, 0.405])
