"""Values and gradients of the waist against float64, under every plan, operand dtype and form of logits."""

from typing import Any

import pytest
import torch

import prefkern as pk
from prefkern import testing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("logps", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
N, H, V = 45, 24, 301

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "row temperature": {"temperature": torch.linspace(0.4, 1.6, N)},
    "scale and cap": {"logit_scale": 1.3, "softcap": 5.0, "temperature": 0.9},
}


def assert_gradient(got: torch.Tensor, want: torch.Tensor, eager: torch.Tensor, name: str) -> None:
    """The derived tolerance; in float64 the oracle is the eager twin itself, so there a bound of its own."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13 * max(1.0, want.abs().max().item()), msg=name)
    else:
        testing.assert_not_worse(got, want, eager, name=name)


def head(dtype: torch.dtype, *, bias: bool = False, masked: float = 0.0) -> testing.HeadCase:
    return testing.head_case(N, H, V, dtype=dtype, bias=bias, masked=masked, seed=3)


def leaves(case: testing.HeadCase) -> list[torch.Tensor]:
    given = (case.hidden, case.weight, case.bias)
    return [value.detach().clone().requires_grad_() for value in given if value is not None]


def ours(case: testing.HeadCase, c: torch.Tensor, e: torch.Tensor | None, **options: Any):
    inputs = leaves(case)
    stats = pk.linear_token_logprobs(
        inputs[0],
        inputs[1],
        case.targets,
        bias=inputs[2] if case.bias is not None else None,
        outputs=OUTPUTS,
        entropy_grad=e is not None,
        **options,
    )
    loss = (stats.logps * c).sum() + (0.0 if e is None else (stats.entropy * e).sum())
    return stats, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_equal_float64(dtype: torch.dtype, with_bias: bool, form: str) -> None:
    case = head(dtype, bias=with_bias, masked=0.1 if with_bias else 0.0)
    want = testing.stats_from_hidden(*case[:2], case.targets, bias=case.bias, **FORMS[form])
    got = pk.linear_token_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, outputs=OUTPUTS, **FORMS[form]
    )
    assert got.logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name in OUTPUTS[:3]:
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=0, atol=tolerance)
    torch.testing.assert_close(got.mean_logit.double(), want.mean_logit, rtol=1e-5, atol=tolerance)
    assert torch.equal(got.is_top1, want.is_top1)
    assert (got.logps <= 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_memory", [None, 17 * V * 4, 0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_no_worse_than_eager(
    dtype: torch.dtype, entropy: bool, max_memory: int | None, form: str
) -> None:
    case = head(dtype, bias=True)
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(N, generator=generator)
    e = torch.randn(N, generator=generator) if entropy else None
    _, got = ours(case, c, e, max_memory=max_memory, **FORMS[form])
    oracle = testing.grads_from_hidden(*case[:2], case.targets, c, e, bias=case.bias, **FORMS[form])
    eager = testing.grads_from_hidden(*case[:2], case.targets, c, e, bias=case.bias, dtype=dtype, **FORMS[form])
    for name, ours_, want, plain in zip(oracle._fields, got, oracle, eager, strict=True):
        assert ours_.dtype == dtype
        assert_gradient(ours_, want, plain, f"grad_{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_gradients_are_exact_to_1e_5(dtype: torch.dtype) -> None:
    case = testing.head_case(300, 64, 1000, dtype=dtype, ignored=0.1)
    c = torch.randn(300, generator=torch.Generator().manual_seed(2)) / 300
    _, got = ours(case, c, None)
    want = testing.grads_from_hidden(*case[:2], case.targets, c)
    bound = 1e-5 if dtype == torch.float32 else 2 * 2.0**-8
    for value, expected in zip(got, want[:2], strict=True):
        assert ((value.double() - expected).abs().max() / expected.abs().max()).item() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_lose_nothing_in_the_logits(dtype: torch.dtype) -> None:
    case = testing.head_case(256, 512, 4096, dtype=dtype)
    want = testing.stats_from_hidden(*case[:2], case.targets)
    got = pk.linear_token_logprobs(*case[:2], case.targets, outputs=("logps", "entropy"))
    eager = testing.stats_from_hidden(*case[:2], case.targets, dtype=dtype)
    assert (got.logps.double() - want.logps).abs().max().item() <= 1e-5
    assert (got.entropy.double() - want.entropy).abs().max().item() <= 1e-5
    assert (eager.logps.double() - want.logps).abs().max().item() > 1e-3  # what rounding the logits costs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_from_logits(dtype: torch.dtype, form: str) -> None:
    case = testing.logit_case(N, V, dtype=dtype, masked=0.1)
    logits = case.logits.clone().requires_grad_()
    c, e = torch.randn(2, N, generator=torch.Generator().manual_seed(4))
    options = {k: v for k, v in FORMS[form].items() if k != "logit_scale"}
    got = pk.token_logprobs(logits, case.targets, outputs=OUTPUTS, entropy_grad=True, **options)
    (grad,) = torch.autograd.grad((got.logps * c).sum() + (got.entropy * e).sum(), logits)
    want = testing.stats_from_logits(case.logits, case.targets, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name in OUTPUTS[:3]:
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=0, atol=tolerance)
    assert torch.equal(got.is_top1, want.is_top1)
    assert_gradient(
        grad,
        testing.grads_from_logits(case.logits, case.targets, c, e, **options),
        testing.grads_from_logits(case.logits, case.targets, c, e, dtype=dtype, **options),
        "grad_logits",
    )


def test_gradcheck() -> None:
    case = testing.head_case(7, 5, 11, dtype=torch.float64, bias=True, ignored=0.2, confident=0.0)
    inputs = leaves(case)

    def both(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, memory: int | None):
        stats = pk.linear_token_logprobs(
            h,
            w,
            case.targets,
            bias=b,
            softcap=6.0,
            temperature=0.8,
            logit_scale=1.2,
            outputs=("logps", "entropy"),
            entropy_grad=True,
            max_memory=memory,
        )
        return stats.logps, stats.entropy

    for memory in (None, 3 * 11 * 8, 0):
        assert torch.autograd.gradcheck(lambda *a, m=memory: both(*a, m), inputs)
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: pk.token_logprobs(z, torch.arange(6), softcap=3.0).logps, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_plan(dtype: torch.dtype) -> None:
    case = head(dtype, bias=True)
    c = torch.randn(N, generator=torch.Generator().manual_seed(5))
    whole, first = ours(case, c, None)
    for memory in (0, V * 4, 20 * V * 4, 44 * V * 4):
        stats, grads = ours(case, c, None, max_memory=memory)
        assert (stats.logps - whole.logps).abs().max().item() <= 4e-6  # the product's blocking may differ
        for value, expected in zip(grads, first, strict=True):
            bound = 8 * torch.finfo(dtype).eps * expected.abs().max()  # sums of up to N terms in another order
            assert ((value - expected).abs().max() <= bound).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_memory", [None, 20 * V * 4, 0])
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, max_memory: int | None) -> None:
    case = head(dtype)
    c, e = torch.randn(2, N, generator=torch.Generator().manual_seed(6))
    one, two = (ours(case, c, e, max_memory=max_memory) for _ in range(2))
    assert torch.equal(one[0].logps, two[0].logps)
    assert torch.equal(one[0].entropy, two[0].entropy)
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def test_every_output_is_written() -> None:
    case = head(torch.bfloat16, bias=True)
    c, e = torch.randn(2, N, generator=torch.Generator().manual_seed(7))
    for memory in (None, 20 * V * 2, 0):
        clean, grads = ours(case, c, e, max_memory=memory)
        with testing.poison_empty():
            poisoned, poisoned_grads = ours(case, c, e, max_memory=memory)
        for a, b in zip((*clean, *grads), (*poisoned, *poisoned_grads), strict=True):
            assert torch.equal(a, b)
