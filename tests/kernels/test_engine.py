"""The waist end to end on the Triton kernels: in the interpreter, where the operators' dispatch is turned to them, and
on a CUDA device as users run it."""

import importlib
from typing import Any

import pytest
import torch

import prefkern as pk
from prefkern import operators, testing
from prefkern.head import costs
from prefkern.head.engine.products import count_products
from prefkern.head.inputs import Head
from prefkern.head.logprobs import token_stats

N, H, V = 37, 16, 1100
OUTPUTS = ("logps", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap, scale and row temperature": {
        "softcap": 6.0,
        "logit_scale": 1.2,
        "temperature": torch.linspace(0.5, 1.5, N),
    },
}


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if device.type == "cpu":
        monkeypatch.setattr(
            operators,
            "implementation",
            lambda like, name, plain: importlib.import_module(f"prefkern.kernels.triton.{name}"),
        )
    return device


def on(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [None, 11, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head(kernels: torch.device, dtype: torch.dtype, rows: int | None, form: str) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, bias=True, masked=0.05, device=kernels)
    options = on(kernels, FORMS[form])
    leaves = [value.clone().requires_grad_() for value in case[:3]]
    c, e = torch.randn(2, N, generator=torch.Generator().manual_seed(1)).to(kernels)
    memory = None if rows is None else rows * V * dtype.itemsize
    with testing.poison_empty():
        stats = pk.linear_token_logprobs(
            leaves[0],
            leaves[1],
            case.targets,
            bias=leaves[2],
            outputs=OUTPUTS,
            entropy_grad=True,
            max_memory=memory,
            **options,
        )
        for entropy in (False, True):
            loss = (stats.logps * c).sum() + (stats.entropy * e).sum() * entropy
            got = torch.autograd.grad(loss, leaves, retain_graph=True)
            given = (*case[:2], case.targets, c, e * entropy if entropy else None)
            want = testing.grads_from_hidden(*given, bias=case.bias, **options)
            eager = testing.grads_from_hidden(*given, bias=case.bias, dtype=dtype, **options)
            for name, value, expected, plain in zip(want._fields, got, want, eager, strict=True):
                testing.assert_not_worse(value, expected, plain, name=f"grad_{name}, entropy {entropy}")
    expected = testing.stats_from_hidden(*case[:2], case.targets, bias=case.bias, **options)
    for name in OUTPUTS[:3]:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(expected, name), rtol=0, atol=1e-5, msg=name)
    assert torch.equal(stats.is_top1, expected.is_top1)


@pytest.mark.parametrize("form", FORMS)
def test_scoring_by_slices_of_the_vocabulary(kernels: torch.device, form: str) -> None:
    """Rows and columns of a tile are those that little scratch allows: one row and 256 columns, the last narrower."""
    case = testing.head_case(9, H, V, dtype=torch.bfloat16, bias=True, masked=0.05, device=kernels)
    options = {k: v[:9] if isinstance(v, torch.Tensor) else v for k, v in on(kernels, FORMS[form]).items()}
    with testing.poison_empty():
        head = Head(bias=case.bias, **options)
        got = token_stats("a test", *case[:2], case.targets, head, OUTPUTS, scratch_bytes=1024)
    want = testing.stats_from_hidden(*case[:2], case.targets, bias=case.bias, **options)
    for name in OUTPUTS[:3]:
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=0, atol=1e-5, msg=name)
    assert torch.equal(got.is_top1, want.is_top1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(kernels: torch.device, dtype: torch.dtype) -> None:
    case = testing.logit_case(N, V, dtype=dtype, device=kernels)
    logits = case.logits.clone().requires_grad_()
    c, e = torch.randn(2, N, generator=torch.Generator().manual_seed(2)).to(kernels)
    stats = pk.token_logprobs(logits, case.targets, softcap=9.0, outputs=("logps", "entropy"), entropy_grad=True)
    (got,) = torch.autograd.grad((stats.logps * c).sum() + (stats.entropy * e).sum(), logits)
    given = (case.logits, case.targets, c, e)
    testing.assert_not_worse(
        got,
        testing.grads_from_logits(*given, softcap=9.0),
        testing.grads_from_logits(*given, softcap=9.0, dtype=dtype),
    )
    want = testing.stats_from_logits(case.logits, case.targets, softcap=9.0)
    assert (stats.logps.double() - want.logps).abs().max().item() <= 1e-5


def test_out_of_range_target_is_nan_not_a_plausible_number(device: torch.device) -> None:
    """On an accelerator the values of targets are not read on the host; the token becomes NaN, the others do not."""
    if device.type == "cpu":
        return  # there it is an error: tests/waist/test_errors.py
    case = testing.head_case(8, H, V, device=device, ignored=0.0)
    targets = case.targets.clone()
    targets[3] = V
    logps = pk.linear_token_logprobs(case.hidden, case.weight, targets).logps
    assert logps.isnan().tolist() == [i == 3 for i in range(8)]


# ------------------------------------------------------------------------------------- what only a device can show


@pytest.mark.gpu
def test_a_known_count_does_not_wait_for_the_device() -> None:
    case = testing.head_case(200, 64, V, device="cuda", dtype=torch.bfloat16, ignored=0.3)
    count = int((case.targets != -100).sum())
    hidden = case.hidden.requires_grad_()
    want = pk.linear_token_logprobs(hidden, case.weight, case.targets).logps
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = pk.linear_token_logprobs(hidden, case.weight, case.targets, num_scored=count).logps
        got.sum().backward()
        wrong = pk.linear_token_logprobs(hidden, case.weight, case.targets, num_scored=count - 1).logps
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    assert wrong.isnan().any()  # a wrong count never gives a plausible number


@pytest.mark.gpu
def test_graph_capture() -> None:
    case = testing.head_case(64, 64, V, device="cuda", dtype=torch.bfloat16)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def step() -> torch.Tensor:
        logps = pk.linear_token_logprobs(hidden, weight, case.targets).logps
        return torch.autograd.grad(logps.sum(), weight)[0]

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    bound = 4 * torch.finfo(torch.bfloat16).eps * want.float().abs().max()
    assert ((got - want).float().abs().max() <= bound).item()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, 512, 0])
def test_peak_memory_is_what_the_plan_says(rows: int | None) -> None:
    n, h, v = 4096, 1024, 65536
    case = testing.head_case(n, h, 64, device="cuda", dtype=torch.bfloat16, ignored=0.0)
    hidden = case.hidden.requires_grad_()
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16).requires_grad_()
    memory = None if rows is None else rows * v * 2
    predicted = costs.choose(costs.Call(n, h, v, 2, 2, 2), memory)

    def step() -> None:
        pk.linear_token_logprobs(hidden, weight, case.targets, max_memory=memory).logps.sum().backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with count_products() as count:
        step()
    peak = torch.cuda.max_memory_allocated() - before
    assert abs(peak - predicted.gradient_bytes - predicted.extra_bytes) <= 0.05 * predicted.extra_bytes + (64 << 20)
    assert count.products(n, h, v) == pytest.approx(predicted.products)


@pytest.mark.gpu
def test_two_runs_are_bitwise_equal_on_the_device() -> None:
    case = testing.head_case(300, 128, 4000, device="cuda", dtype=torch.bfloat16)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        stats = pk.linear_token_logprobs(hidden, weight, case.targets, outputs=("logps", "entropy"), entropy_grad=True)
        return stats.logps, *torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), (hidden, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
