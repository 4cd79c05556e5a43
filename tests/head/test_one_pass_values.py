"""The head in one pass against the definition of the loss in float64, whatever the memory, the dtype and the form."""

from typing import Any

import pytest
import torch

import prefkern as pk
from prefkern import testing
from prefkern.head.engine import one_pass
from prefkern.losses.cross_entropy import negative_log_likelihood
from prefkern.losses.reduce import masked_mean

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, H, V = 45, 24, 301
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "row temperature": {"temperature": torch.linspace(0.4, 1.6, N)},
    "scale and cap": {"logit_scale": 1.3, "softcap": 5.0, "temperature": 0.9},
}
WEIGHTS = torch.linspace(0.0, 2.0, N)


def leaves(case: testing.HeadCase) -> list[torch.Tensor]:
    given = (case.hidden, case.weight, case.bias)
    return [value.detach().clone().requires_grad_() for value in given if value is not None]


def ours(case: testing.HeadCase, upstream: float = 1.0, **options: Any) -> tuple[torch.Tensor, ...]:
    inputs = leaves(case)
    bias = inputs[2] if case.bias is not None else None
    loss = pk.linear_cross_entropy(inputs[0], inputs[1], case.targets, bias=bias, **options).loss
    return loss.detach(), *torch.autograd.grad(loss * upstream, inputs)


def defined(case: testing.HeadCase, dtype: torch.dtype, upstream: float = 1.0, **options: Any) -> list[torch.Tensor]:
    """The objective and its reduction on the oracle's log-probabilities, by autograd in ``dtype``."""
    inputs = [value.detach().to(dtype).requires_grad_() for value in case[:3] if value is not None]
    form = {k: v for k, v in options.items() if k in ("temperature", "logit_scale", "softcap")}
    bias = inputs[2] if case.bias is not None else None
    logps = testing.stats_from_hidden(inputs[0], inputs[1], case.targets, dtype=dtype, bias=bias, **form).logps
    mask = case.targets != -100
    losses = negative_log_likelihood(logps, mask, options.get("token_weights"))
    reduced = options.get("reduction", "mean") == "mean"
    loss = masked_mean(losses, mask, options.get("normalizer")) if reduced else losses.sum()
    return [loss.detach(), *torch.autograd.grad(loss * upstream, inputs)]


def assert_right(case: testing.HeadCase, dtype: torch.dtype, upstream: float = 1.0, **options: Any) -> None:
    got = ours(case, upstream, **options)
    options.pop("max_memory", None)
    want, eager = (defined(case, d, upstream, **options) for d in (torch.float64, dtype))
    for name, value, expected, plain in zip(("loss", "hidden", "weight", "bias"), got, want, eager, strict=False):
        assert value.dtype == (dtype if name != "loss" else torch.promote_types(dtype, torch.float32))
        if dtype == torch.float64:  # the oracle is its own eager twin
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13, msg=name)
        else:
            testing.assert_not_worse(value, expected, plain, name=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [None, 7, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(dtype: torch.dtype, rows: int | None, form: str) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, bias=True, seed=3)
    memory = None if rows is None else rows * V * max(dtype.itemsize, 4)
    assert_right(case, dtype, token_weights=WEIGHTS, max_memory=memory, **FORMS[form])


@pytest.mark.parametrize("upstream", [1.0, -0.3, 0.0])
@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"normalizer": 40}, {"normalizer": torch.tensor(31)}, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_and_upstream_gradients(dtype: torch.dtype, options: dict[str, Any], upstream: float) -> None:
    assert_right(testing.head_case(N, H, V, dtype=dtype), dtype, upstream, **options)


def test_masked_vocabulary() -> None:
    assert_right(testing.head_case(N, H, V, bias=True, masked=0.3), torch.float32, max_memory=11 * V * 4)


def test_gradcheck() -> None:
    case = testing.head_case(7, 5, 11, dtype=torch.float64, bias=True, confident=0.0)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {"softcap": 6.0, "temperature": 0.8, "logit_scale": 1.2, "max_memory": 3 * 11 * 8}
        return pk.linear_cross_entropy(hidden, weight, case.targets, bias=bias, **options).loss.exp()

    assert torch.autograd.gradcheck(loss, leaves(case))


def test_metrics_are_those_of_the_unreduced_loss() -> None:
    case = testing.head_case(N, H, V)
    want = pk.linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none").metrics
    for memory in (None, 1):
        hidden = case.hidden.clone().requires_grad_()
        got = pk.linear_cross_entropy(hidden, case.weight, case.targets, max_memory=memory).metrics
        assert not any(value.requires_grad for value in got.values())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_panels_are_as_accurate_as_one(dtype: torch.dtype) -> None:
    n, v = 300, 64
    case = testing.head_case(n, H, v, dtype=dtype, ignored=0.0, confident=0.0)
    want = defined(case, torch.float64)
    eps = torch.finfo(dtype).eps
    errors = []
    for rows in (n, 1):
        got = ours(case, max_memory=rows * v * 4)
        errors.append([(a.double() - b).abs().max() / b.abs().max() for a, b in zip(got[1:], want[1:], strict=True)])
    for one, many in zip(*errors, strict=True):
        # rounded once to the operands' dtype, and sums of n terms in float32
        assert many <= max(one, eps / 2) + n * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_are_bitwise_equal_and_every_output_is_written(dtype: torch.dtype) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, bias=True)
    for memory in (None, 7 * V * 4):
        one, two = (ours(case, 0.7, max_memory=memory) for _ in range(2))
        with testing.poison_empty():
            poisoned = ours(case, 0.7, max_memory=memory)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, poisoned, strict=True))


def test_float16_gradients_below_its_range_survive_to_the_loss_scale() -> None:
    """1 / N of small gradients underflows in float16; a loss scale must find them as they were."""
    case = testing.head_case(N, H, V, dtype=torch.float16, scale=0.3, confident=0.0)
    options = {"normalizer": float(2**24)}
    got, want = ours(case, 2.0**22, **options), defined(case, torch.float64, 2.0**22, **options)
    assert want[2].abs().max() / 2.0**22 < torch.finfo(torch.float16).smallest_normal / 64
    for value, expected in zip(got[1:], want[1:], strict=True):
        error = (value.double() - expected).abs().max() / expected.abs().max()
        assert error <= torch.finfo(torch.float16).eps


def test_autocast_takes_16_bit_operands_and_returns_float32_gradients() -> None:
    case = testing.head_case(N, H, V)
    rounded = testing.HeadCase(case.hidden.bfloat16(), case.weight.bfloat16(), None, case.targets)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(case)
    want = defined(rounded, torch.float64)
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_scored_is_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, bias=True)
    nothing = case._replace(targets=torch.full_like(case.targets, -100))
    empty = case._replace(hidden=case.hidden[:0], targets=case.targets[:0])
    for given, options in ((nothing, {}), (empty, {}), (nothing, {"reduction": "sum"}), (case, {"normalizer": 0})):
        loss, *grads = ours(given, **options)
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)
    with pytest.raises(ValueError, match=r"^prefkern\.linear_cross_entropy: targets must lie in"):
        ours(case._replace(targets=torch.full_like(case.targets, V)))


def test_tiles_are_as_large_as_the_memory_allows_and_never_nothing() -> None:
    assert one_pass.tiling(1024, 32768, 4, 0, None) == (512, 512)
    assert one_pass.tiling(1024, 32768, 4, 0, 100 * 32768 * 4) == (100, 100)
    assert one_pass.tiling(1024, 32768, 4, 0, 0) == (1, 1)
    panel, chunk = one_pass.tiling(4096, 128256, 4, 2, None)
    assert panel == 2 * 4096
    assert chunk == 512
    for memory in (0, 10**6, 10**8, 10**9, 10**10):
        panel, chunk = one_pass.tiling(4096, 128256, 4, 2, memory)
        assert panel >= chunk >= 1
        assert panel * 2 + chunk * 4 <= max(memory // 128256, 6)
