"""Every loss of pairs against its formula, written plainly in float64; extremes, mixtures, properties, compilation."""

import math
import typing
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from prefkern.losses import cpo_loss, dpo_loss, kto_loss, pair_logps, wpo_weights
from prefkern.losses.cpo import CPO_LOSSES
from prefkern.losses.kto import UNPAIRED_LOSSES
from prefkern.losses.links import LINKS
from prefkern.losses.preference import PAIR_LOSSES, DPOLossType

B, BETA, TAU, A = 7, 0.3, 0.05, 0.3
N_CHOSEN, N_REJECTED = torch.tensor([3, 1, 5, 2, 9, 4, 6]), torch.tensor([2, 7, 1, 4, 8, 3, 5])


def s(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def ls(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def average(x: Tensor, n: Tensor) -> Tensor:
    return x / n


LINK_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - torch.exp(-x),
    "js_divergence": lambda x: math.log(2) + ls(x),
    "alpha_divergence": lambda x: (torch.exp((A - 1) * x) - 1) / (A - 1),
}
LINK_FORMULAS |= {"js": LINK_FORMULAS["js_divergence"], "alpha": LINK_FORMULAS["alpha_divergence"]}
"""``g(D)``."""


def oracle(
    name: str, lp: tuple[Tensor, ...], smoothing: float, link: str = "reverse_kl", margin: Tensor | float = 0.0
) -> Tensor:
    """The loss of each pair from the sums of policy and reference, float64."""
    c, r, ref_c, ref_r = lp
    D_c, D_r, g, b, e = c - ref_c, r - ref_r, LINK_FORMULAS[link], BETA, smoothing
    u = b * (g(D_c) - g(D_r)) - margin
    norm = average(g(D_c), N_CHOSEN) - average(g(D_r), N_REJECTED)
    w = torch.sigmoid(u / TAU)  # not s(), whose gradient is inf / inf far out
    formulas: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -(1 - e) * ls(u) - e * ls(-u),
        "hinge": lambda: torch.clamp(1 - u, min=0),
        "ipo": lambda: (norm - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: s(u) * (ls(u) - math.log(1 - e)) + s(-u) * (ls(-u) - math.log(e)),
        "nca_pair": lambda: -ls(b * D_c) - ls(-b * D_c) / 2 - ls(-b * D_r) / 2,
        "robust": lambda: (-(1 - e) * ls(u) + e * ls(-u)) / (1 - 2 * e),
        "bco_pair": lambda: -ls(b * D_c) - ls(-b * D_r),
        "sppo_hard": lambda: (D_c - 1 / (2 * b)) ** 2 + (D_r + 1 / (2 * b)) ** 2,
        "aot": lambda: smoothed(b * ((c - r).sort().values - (ref_c - ref_r).sort().values), e),
        "aot_unpaired": lambda: smoothed(b * (D_c.sort().values - D_r.sort().values), e),
        "apo_zero": lambda: 1 - s(b * D_c) + s(b * D_r),
        "apo_down": lambda: s(b * D_c) + 1 - s(b * (D_c - D_r)),
        "discopop": lambda: -ls(u) * (1 - w) + torch.exp(-u) * w,
        "sigmoid_norm": lambda: -ls(b * norm - margin),
        "sft": lambda: -(c.sum() / N_CHOSEN.sum()).expand(B),
    }
    return formulas[name]()


def smoothed(x: Tensor, e: float) -> Tensor:
    return -(1 - e) * ls(x) - e * ls(-x)


def sums(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    c, r, ref_c, ref_r = (-8.0 * torch.rand(B, dtype=torch.float64) for _ in range(4))
    return tuple(x.to(dtype) for x in (c, r, ref_c, ref_r))


def call(name: str | list[str], lp: tuple[Tensor, ...], **options: object) -> Tensor:
    lengths = {"chosen_lengths": N_CHOSEN, "rejected_lengths": N_REJECTED}
    options = {"beta": BETA, "f_alpha_divergence_coef": A, "reduction": "none", **lengths, **options}
    return dpo_loss(*lp, loss_type=name, **options).loss


def smoothing_of(name: str) -> float:
    return 0.2 if PAIR_LOSSES[name].smoothing is not None else 0.0


def assert_is_oracle(name: str, got: Tensor, leaves: tuple[Tensor, ...], want: Callable[..., Tensor]) -> None:
    """Value and gradient, both sides, to 1e-5 relative to the largest."""
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in leaves)
    expected, upstream = want(exact), torch.linspace(0.5, 2.0, B)
    reading = {"sft": 1}.get(name, 2)
    ours = torch.autograd.grad((got * upstream).sum(), leaves[:reading])
    theirs = torch.autograd.grad((expected * upstream.double()).sum(), exact[:reading])
    for value, correct in zip((got, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(value.double(), correct, rtol=1e-5, atol=1e-5 * correct.abs().max().item())


CASES = [(name, link) for name, row in PAIR_LOSSES.items() for link in (LINKS if row.links else ("reverse_kl",))]


def test_the_table_is_what_type_checkers_know() -> None:
    assert tuple(PAIR_LOSSES) == typing.get_args(DPOLossType)


@pytest.mark.parametrize(("name", "link"), CASES)
def test_every_loss_and_its_gradient_are_the_formula(name, link) -> None:
    lp, e = sums(), smoothing_of(name)
    leaves = (lp[0].requires_grad_(), lp[1].requires_grad_(), *lp[2:])
    got = call(name, leaves, label_smoothing=e, f_divergence_type=link)
    assert_is_oracle(name, got, leaves, lambda exact: oracle(name, exact, e, link))


@pytest.mark.parametrize("name", [name for name, row in PAIR_LOSSES.items() if row.margin])
def test_a_margin_is_taken_from_the_difference_of_the_rewards(name) -> None:
    lp, e, margin = sums(), smoothing_of(name), torch.rand(B).requires_grad_()
    leaves = (lp[0].requires_grad_(), lp[1].requires_grad_(), *lp[2:])
    got = call(name, leaves, label_smoothing=e, margin=margin)
    fixed = margin.detach().double()
    assert_is_oracle(name, got, leaves, lambda exact: oracle(name, exact, e, margin=fixed))
    assert torch.autograd.grad(got.sum(), margin, allow_unused=True)[0] is None


@pytest.mark.parametrize("coefficient", [1.0, 1.0 + 1e-7])
def test_the_alpha_divergence_is_the_reverse_kl_at_one(coefficient) -> None:
    lp = sums()
    got = call("sigmoid", lp, f_divergence_type="alpha", f_alpha_divergence_coef=coefficient)
    assert torch.equal(got, call("sigmoid", lp))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_keeps_its_relative_accuracy_when_satisfied(name) -> None:
    """Chosen far ahead: 1 - s(x) and its like are small numbers, not roundings of 1. In float32, whose 1 - 1e-7 is 1,
    against float64, whose rounding of 1 is 1e-5 of the least of them."""
    D, zero = torch.linspace(5.0, 35.0, B), torch.zeros(B)
    lp, e = (D, -D, zero, zero), 1e-3 if PAIR_LOSSES[name].smoothing is not None else 0.0
    got, want = call(name, lp, label_smoothing=e), oracle(name, tuple(x.double() for x in lp), e)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("link", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_is_finite_at_log_ratios_of_ten_thousand(name, link) -> None:
    """Value and gradient. The square of a link of e^80 alone is beyond float32, and infinite."""
    if not PAIR_LOSSES[name].links and link != "reverse_kl":
        return
    far = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 1e4, -1e4])
    chosen, rejected = far.clone().requires_grad_(), -far.roll(1).requires_grad_()
    e = smoothing_of(name)
    loss = call(name, (chosen, rejected, torch.zeros(B), torch.zeros(B)), label_smoothing=e, f_divergence_type=link)
    squared = name == "ipo" and link in ("forward_kl", "alpha_divergence")
    assert not loss.isnan().any()
    assert loss.isfinite().all() or squared
    for grad in torch.autograd.grad(loss.sum(), (chosen, rejected), allow_unused=True):
        assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_masked_values_never_leak(name) -> None:
    """NaN and inf outside the mask reach neither value nor gradient, of a row without tokens either."""
    mask = torch.rand(2 * B, 5) < 0.6
    mask[3] = mask[B + 1] = False
    clean, ref = -torch.rand(2 * B, 5), torch.zeros(2 * B)

    def loss(logps: Tensor) -> Tensor:
        policy = pair_logps(logps, mask=mask)
        lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
        return call(
            name, (policy.chosen, policy.rejected, *ref.chunk(2)), label_smoothing=smoothing_of(name), **lengths
        )

    want = loss(clean)
    for bad in (math.nan, math.inf, -math.inf):
        dirty = torch.where(mask, clean, bad).requires_grad_()
        got = loss(dirty)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        (grad,) = torch.autograd.grad(got.sum(), dirty)
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_an_empty_batch_is_zero_with_a_graph(name) -> None:
    x, none = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.long)
    lengths = {"chosen_lengths": none, "rejected_lengths": none, "reduction": "mean"}
    out = call(name, (x, x, x, x), label_smoothing=smoothing_of(name), **lengths)
    assert out.item() == 0.0
    assert torch.autograd.grad(out, x)[0].shape == (0,)


MIXTURES = st.lists(st.sampled_from([name for name in PAIR_LOSSES if name != "exo_pair"]), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(names=MIXTURES, weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_a_mixture_is_the_weighted_sum_of_its_losses(names, weights, seed) -> None:
    torch.manual_seed(seed)
    lp, weights = sums(torch.float64), weights[: len(names)]
    want = sum(weight * call(name, lp) for name, weight in zip(names, weights, strict=True))
    torch.testing.assert_close(call(names, lp, loss_weights=weights), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call(tuple(names), lp), sum(call(name, lp) for name in names), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(PAIR_LOSSES)), seed=st.integers(0, 99), padding=st.integers(1, 4))
def test_padding_and_order_of_the_pairs_do_not_matter(name, seed, padding) -> None:
    g = torch.Generator().manual_seed(seed)
    logps, mask = -torch.rand(2 * B, 6, generator=g, dtype=torch.float64), torch.rand(2 * B, 6, generator=g) < 0.7
    ref = -torch.rand(2, B, generator=g, dtype=torch.float64)

    def mean(lp: Tensor, scored: Tensor, ref: Tensor) -> Tensor:
        policy = pair_logps(lp, mask=scored)
        lengths = {"chosen_lengths": policy.chosen_lengths, "rejected_lengths": policy.rejected_lengths}
        sides = (policy.chosen, policy.rejected, *ref)
        return call(name, sides, label_smoothing=smoothing_of(name), reduction="mean", **lengths)

    want = mean(logps, mask, ref)
    wider = torch.cat([logps, torch.full((2 * B, padding), math.nan, dtype=torch.float64)], 1)
    unscored = torch.cat([mask, torch.zeros(2 * B, padding, dtype=torch.bool)], 1)
    torch.testing.assert_close(mean(wider, unscored, ref), want, rtol=1e-12, atol=1e-12)
    order = torch.randperm(B, generator=g)
    both = torch.cat([order, order + B])
    torch.testing.assert_close(mean(logps[both], mask[both], ref[:, order]), want, rtol=1e-12, atol=1e-12)


def test_wpo_weights_are_how_likely_the_policy_is_to_write_the_pair() -> None:
    """exp of the mean of lp - log sum p^2, of the chosen times the rejected; padded, packed, and a row of nothing."""
    logps, squares = -torch.rand(4, 3), -torch.rand(4, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    means = [
        sum((logps[r, t] - squares[r, t]).item() for t in range(3) if mask[r, t]) / max(mask[r].sum().item(), 1)
        for r in range(4)
    ]
    want = torch.tensor([math.exp(means[0]) * math.exp(means[2]), math.exp(means[1])])
    dirty = torch.where(mask, logps, math.nan).requires_grad_()
    got = wpo_weights(dirty, squares, mask=mask)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    cu = torch.tensor([0, 2, 5, 6, 6])
    torch.testing.assert_close(wpo_weights(logps[mask], squares[mask], cu_seqlens=cu), want)
    with pytest.raises(ValueError, match="wpo_weights: a mean over tokens counts the scored tokens of each row"):
        wpo_weights(logps, squares)


def compiled(options: dict[str, object]) -> Callable[..., Tensor]:
    def function(*lp: Tensor) -> Tensor:
        return call(options["loss_type"], lp, **{key: value for key, value in options.items() if key != "loss_type"})

    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_compiles_to_one_graph(name) -> None:
    torch._dynamo.reset()
    options = {"label_smoothing": smoothing_of(name), "margin": torch.rand(B) if PAIR_LOSSES[name].margin else None}
    if PAIR_LOSSES[name].links:
        options["f_divergence_type"] = "js"
    lp = sums()
    lp[0].requires_grad_()
    got, want = compiled({"loss_type": name, **options})(*lp), call(name, lp, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), lp[0])[0] for x in (got, want)))


def test_a_mixture_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    lp, names = sums(), ["sigmoid", "bco_pair", "sft"]
    got = compiled({"loss_type": names, "loss_weights": [0.8, 0.2, 1.0]})(*lp)
    torch.testing.assert_close(got, call(names, lp, loss_weights=[0.8, 0.2, 1.0]))


@pytest.mark.parametrize("name", [*UNPAIRED_LOSSES, *CPO_LOSSES])
def test_unpaired_and_contrastive_losses_compile_to_one_graph(name) -> None:
    torch._dynamo.reset()
    c, r, ref_c, _ = sums()
    c.requires_grad_()
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()

    def loss(c: Tensor, r: Tensor) -> Tensor:
        if name in UNPAIRED_LOSSES:
            return kto_loss(c, ref_c, labels, kl=0.3, loss_type=name).loss
        out = cpo_loss(c, r, None if name == "simpo" else -c, loss_type=name, alpha=0.2)
        return out.loss + out.metrics["rewards/margins"]

    got, want = torch.compile(loss, fullgraph=True, backend="eager")(c, r), loss(c, r)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, c)[0] for x in (got, want)))
