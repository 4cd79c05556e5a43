"""The proof harness proves itself: oracles against hand-computed numbers, and every check seen to fail."""

import math

import pytest
import torch

from prefkern import testing

F64 = torch.float64


def test_statistics_of_a_hand_computed_row() -> None:
    # probabilities 1/2, 1/4, 1/4: entropy 3/2 log 2, sum p^2 = 3/8
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]], dtype=F64) + 5
    got = testing.stats_from_logits(logits, torch.tensor([0]))
    assert got.entropy is not None
    assert got.log_sum_sq_probs is not None
    assert got.mean_logit is not None
    assert got.is_top1 is not None
    assert got.logps.item() == pytest.approx(-math.log(2), abs=1e-14)
    assert got.row_max.item() == pytest.approx(5 + math.log(2))
    assert got.log_sum.item() == pytest.approx(math.log(2))
    assert got.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert got.log_sum_sq_probs.item() == pytest.approx(math.log(3 / 8))
    assert got.mean_logit.item() == pytest.approx(5 + math.log(2) / 3)
    assert got.is_top1.item() is True


def test_scale_softcap_and_temperature_are_applied_in_order() -> None:
    tile, targets = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([1])
    got = testing.stats_from_logits(
        tile,
        targets,
        bias=torch.tensor([0.5, 0.0], dtype=F64),
        logit_scale=2.0,
        softcap=3.0,
        temperature=torch.tensor([0.5]),
    )
    x = [3 * math.tanh(2 * 1.5 / 3), 3 * math.tanh(2 * -2.0 / 3)]
    expected = x[1] / 0.5 - math.log(sum(math.exp(v / 0.5) for v in x))
    assert got.logps.item() == pytest.approx(expected, rel=1e-13)
    assert got.row_max.item() == pytest.approx(x[0])


def test_special_rows() -> None:
    logits = torch.randn(5, 7, dtype=F64)
    logits[1] = -math.inf  # no logit at all
    logits[2, 4] = -math.inf  # a target of -inf
    targets = torch.tensor([-100, 3, 4, 7, 0])
    got = testing.stats_from_logits(logits, targets, softcap=2.0)
    assert [value.item() for value in got.logps[:3]] == [0.0, -math.inf, -math.inf]
    for value in got[:6]:
        assert value is not None
        assert value[0].item() == 0.0
        assert math.isnan(value[3].item())
    assert got.entropy is not None
    assert got.entropy[1].item() == 0.0
    grad = testing.grads_from_logits(logits, targets, torch.ones(5), softcap=2.0)
    u = testing.unscaled_from_logits(logits, targets, softcap=2.0)
    for gradient in (grad, u):
        assert not gradient[:2].any()
        assert gradient[2, 4].item() == 0.0
        assert gradient[3].isnan().all()
    assert u[2].sum() > 0.1


def test_the_unscaled_gradient_is_the_autograd_gradient_without_the_row_factor() -> None:
    case = testing.logit_case(9, 31, masked=0.2)
    options = {"logit_scale": 0.7, "softcap": 5.0, "temperature": torch.rand(9, dtype=F64) + 0.5}
    grad = testing.grads_from_logits(case.logits, case.targets, torch.ones(9), **options)
    u = testing.unscaled_from_logits(case.logits, case.targets, **options)
    torch.testing.assert_close(u, -grad * options["temperature"][:, None] / 0.7, rtol=1e-12, atol=1e-14)


def test_gradients_agree_with_finite_differences() -> None:
    case = testing.head_case(4, 5, 11, dtype=F64, bias=True, ignored=0.0)
    c, e = torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        stats = testing.stats_from_hidden(hidden, weight, case.targets, bias=bias, softcap=4.0)
        assert stats.entropy is not None
        return (c * stats.logps + e * stats.entropy).sum()

    grads = testing.grads_from_hidden(case.hidden, case.weight, case.targets, c, e, bias=case.bias, softcap=4.0)
    inputs = [case.hidden, case.weight, case.bias]
    for i, (value, grad) in enumerate(zip(inputs, grads, strict=True)):
        assert value is not None
        direction = torch.randn_like(value)
        ahead, behind = list(inputs), list(inputs)
        ahead[i], behind[i] = value + 1e-6 * direction, value - 1e-6 * direction
        slope = (loss(*ahead) - loss(*behind)) / 2e-6
        assert slope.item() == pytest.approx((grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cases_hold_what_they_promise(dtype: torch.dtype) -> None:
    case = testing.logit_case(64, 200, dtype=dtype, masked=0.3)
    assert case.logits.dtype == dtype
    assert (case.targets == testing.IGNORE).float().mean().item() == pytest.approx(0.2, abs=0.15)
    assert case.logits.isinf().float().mean().item() == pytest.approx(0.3, abs=0.1)
    p = testing.stats_from_logits(case.logits, case.targets).logps.exp()
    assert ((p > 0.99) & (case.targets >= 0)).sum() >= 4
    assert p.min() > 0  # no target is masked
    head = testing.head_case(64, 32, 200, dtype=dtype, bias=True, masked=0.3)
    p = testing.stats_from_hidden(head.hidden, head.weight, head.targets, bias=head.bias).logps.exp()
    assert ((p > 0.9) & (head.targets >= 0)).sum() >= 4
    again = testing.head_case(64, 32, 200, dtype=dtype, bias=True, masked=0.3)
    assert torch.equal(head.weight, again.weight)
    with pytest.raises(ValueError, match="bias=True"):
        testing.head_case(2, 2, 2, masked=0.5)


def test_the_tolerance_is_twice_the_eager_error_and_one_rounding() -> None:
    want = torch.tensor([1.0, -2.0], dtype=F64)
    eager = (want + torch.tensor([1e-5, 0.0])).float()
    testing.assert_not_worse((want + 1.9e-5).float(), want, eager)
    with pytest.raises(AssertionError, match=r"grad: error 2\.2\d*e-05 .* eager 1\.\d*e-05"):
        testing.assert_not_worse((want + 2.2e-5).float(), want, eager, name="grad")
    with pytest.raises(AssertionError, match="row 1"):
        testing.assert_not_worse((want + 1e-5).float()[:, None], want[:, None], eager[:, None], dim=1)


def test_infinities_must_stand_where_the_oracle_has_them() -> None:
    want = torch.tensor([1.0, -math.inf, math.nan], dtype=F64)
    testing.assert_not_worse(want.float(), want, want.float())
    for wrong in ([1.0, 3.0, math.nan], [1.0, -math.inf, 0.0], [math.nan, -math.inf, math.nan], [1.0, math.inf, 0.0]):
        with pytest.raises(AssertionError, match="finite"):
            testing.assert_not_worse(torch.tensor(wrong), want, want.float())


def test_guards_show_reads_and_writes_outside() -> None:
    view, check = testing.guarded(torch.ones(3, 4, dtype=torch.bfloat16), row_gap=2)
    assert view.stride() == (6, 1)
    whole = view.as_strided((1,), (1,), view.storage_offset() - 1)
    assert whole.isnan().all()
    view.mul_(2)
    check()
    view.as_strided((1,), (1,), view.storage_offset() + 5).fill_(1.0)
    with pytest.raises(AssertionError, match="offset 5"):
        check()
    guards = testing.Guards()
    assert guards(None) is None
    indices = guards(torch.zeros(4, dtype=torch.int64))
    guards.check()
    indices.as_strided((1,), (1,), indices.storage_offset() + 4).zero_()
    with pytest.raises(AssertionError, match="offset 4"):
        guards.check()


def test_poison_fills_new_memory_and_leaves_torch_as_it_was() -> None:
    original = torch.empty
    with testing.poison_empty():
        assert torch.empty(2, 3).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.int32))[0] == 2**31 - 1
        assert torch.zeros(1).new_empty(2, dtype=torch.float16).isnan().all()
        assert torch.empty_strided((2, 2), (1, 2), dtype=torch.bool).all()
        assert torch.empty(2, requires_grad=True).requires_grad
        assert torch.empty(2, device="meta").shape == (2,)
        assert not torch.zeros(3).any()
    assert torch.empty is original
    assert testing.poisoned(2, dtype=torch.int64)[0] == 2**63 - 1
