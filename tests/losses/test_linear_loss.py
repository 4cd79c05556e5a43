"""A user's own objective on hidden states: the engine's value and gradient, its products, and what is refused."""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F

from prefkern.head.engine.products import count_products
from prefkern.losses import linear_loss, pair_logps
from prefkern.types import LossOutput, TokenStats

R, T, H, V = 4, 6, 8, 11


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = torch.randint(0, V, (R, T))
    for row, length in enumerate((6, 3, 5, 1)):
        targets[row, length:] = -100
    hidden, weight = torch.randn(R, T, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_any_function_of_the_statistics_against_full_logits() -> None:
    """SimPO with an entropy bonus, whose gradient reaches the head, and a weight per token."""
    hidden, weight, targets = case()
    scored = targets != -100
    weights = torch.rand(R, T).double()

    def fn(stats: TokenStats) -> LossOutput:
        pairs = pair_logps(weights * stats.logps, targets=targets, average=True)
        bonus = stats.entropy[scored].mean()
        simpo = -F.logsigmoid(2.0 * (pairs.chosen - pairs.rejected) - 0.5).mean()
        return LossOutput(simpo - 0.3 * bonus, {"bonus": bonus, "top": stats.is_top1[scored].double().mean()})

    def want() -> torch.Tensor:
        lp = ((hidden @ weight.T) * 0.7).log_softmax(-1)
        per_token = weights * lp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * scored
        average = per_token.sum(-1) / scored.sum(-1)
        entropy = -(lp.exp() * lp).sum(-1)[scored].mean()
        return -F.logsigmoid(2.0 * (average[:2] - average[2:]) - 0.5).mean() - 0.3 * entropy

    outputs = ("logps", "entropy", "is_top1")
    loss, metrics = linear_loss(hidden, weight, targets, fn, logit_scale=0.7, outputs=outputs, entropy_grad=True)
    torch.testing.assert_close(loss, want(), rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, [hidden, weight]) for x in (loss, want()))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert set(metrics) == {"bonus", "top"}
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("options", "frozen", "products"), [({}, False, 3), ({}, True, 2), ({"max_memory": 0}, False, 4)]
)
def test_products(options, frozen, products) -> None:
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=not frozen)
    targets = torch.randint(0, 300, (40,))
    with count_products() as count:
        linear_loss(hidden, weight, targets, lambda stats: stats.logps.exp().mean(), **options).loss.backward()
    assert count.products(40, 16, 300) == products


def test_scoring_is_one_product_and_needs_no_graph() -> None:
    hidden, weight, targets = case(torch.float32)
    with torch.no_grad(), count_products() as count:
        loss, metrics = linear_loss(hidden, weight, targets, lambda stats: (stats.logps.mean(), {"a": stats.logps}))
    assert count.products(int((targets != -100).sum()), H, V) == 1
    assert not loss.requires_grad
    assert metrics["a"].shape == targets.shape
    frozen = linear_loss(hidden.detach(), weight.detach(), targets, lambda stats: stats.logps.detach().mean())
    assert frozen.loss == loss


def test_an_unreduced_loss_is_passed_on() -> None:
    hidden, weight, targets = case()
    loss = linear_loss(hidden, weight, targets, lambda stats: stats.logps.sum(-1)).loss
    assert loss.shape == (R,)
    assert loss.requires_grad


def test_the_gradient_may_come_from_another_branch_too() -> None:
    """A term of one's own beside the log-probabilities, with leaves of its own."""
    hidden, weight, targets = case()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = linear_loss(hidden, weight, targets, lambda stats: (scale * stats.logps).sum() + scale.square()).loss
    plain = linear_loss(hidden, weight, targets, lambda stats: stats.logps.sum()).loss
    got = torch.autograd.grad(loss, [scale, hidden], retain_graph=True)
    torch.testing.assert_close(got[0], plain.detach() + 4.0)
    torch.testing.assert_close(got[1], 2.0 * torch.autograd.grad(plain, hidden)[0])


REFUSED = {
    "float": (
        lambda s: s.logps.mean().item(),
        TypeError,
        r"fn must return a floating tensor, .* got float -.*: return",
    ),
    "none": (lambda s: None, TypeError, r"fn must return a floating tensor, or \(tensor, metrics\), got NoneType"),
    "integers": (lambda s: s.logps.sum().long(), TypeError, "fn must return a floating tensor, .* got int64"),
    "statistics": (lambda s: s, TypeError, "fn must return a floating tensor, .* got TokenStats"),
    "detached": (
        lambda s: s.logps.detach().mean(),
        ValueError,
        r"fn must return a loss with a graph .* \.detach\(\)",
    ),
    "rewrapped": (lambda s: torch.tensor(s.logps.sum().item()), ValueError, r"fn must return a loss with a graph"),
    "entropy": (lambda s: s.entropy.mean(), ValueError, ".*entropy has a gradient only with entropy_grad=True"),
    "entropy beside": (
        lambda s: -(s.logps.sum() + 10 * s.entropy.sum()),
        ValueError,
        r"the loss of fn depends on stats\.entropy, which has no gradient \(stats\.entropy has a gradient only with "
        r"entropy_grad=True\): write stats\.entropy\.detach\(\) where it is a constant",
    ),
    "logit": (
        lambda s: s.logps.sum() * s.mean_logit.mean(),
        ValueError,
        r"the loss of fn depends on stats\.mean_logit, which has no gradient: write stats\.mean_logit\.detach",
    ),
    "list": (lambda s: (s.logps.sum(), [1]), TypeError, "the metrics of fn must be a dict of tensors, got list"),
    "number": (
        lambda s: (s.logps.sum(), {"a": 1.5}),
        TypeError,
        r"metrics\['a'\] of fn must be a tensor, got float 1\.5: return tensors as they are, without \.item\(\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name) -> None:
    fn, error, message = REFUSED[name]
    with pytest.raises(error, match=rf"^prefkern\.linear_loss: {message}"):
        linear_loss(*case(), fn, outputs=("logps", "entropy", "mean_logit"))


def test_statistics_without_a_gradient_serve_as_metrics_and_as_constants() -> None:
    hidden, weight, targets = case()

    def fn(stats: TokenStats) -> LossOutput:
        entropy = stats.entropy
        metrics = {"entropy": entropy.mean(), "sum": stats.entropy.sum()}
        entropy.clamp_(max=1.5)  # fn may write into what it is handed
        return LossOutput(-(entropy.detach() * stats.logps).sum(), metrics)

    outputs = ("logps", "entropy", "is_top1", "log_sum_sq_probs")
    got = linear_loss(hidden, weight, targets, fn, outputs=outputs)
    with torch.no_grad():
        want = linear_loss(hidden, weight, targets, fn, outputs=outputs)
    torch.testing.assert_close(got.loss.detach(), want.loss, rtol=0, atol=0)
    torch.testing.assert_close(got.metrics, want.metrics, rtol=0, atol=0)
    assert not any(value.requires_grad for value in got.metrics.values())
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h: linear_loss(h, weight, targets, fn, outputs=outputs).loss, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(hidden), got.loss)


def test_a_loss_in_place_of_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^prefkern\.linear_loss: fn must be a function of TokenStats .* got float32"):
        linear_loss(*case(), torch.tensor(1.0))


def test_example() -> None:
    found = doctest.testmod(importlib.import_module("prefkern.losses.linear"))
    assert found.attempted >= 5
    assert found.failed == 0
