"""The head in one pass on the Triton kernels: panels of ``u`` in the operands' dtype, filled through a float32 tile."""

import importlib

import pytest
import torch

import prefkern as pk
from prefkern import operators, testing
from prefkern.head.engine import one_pass
from prefkern.head.engine.products import count_products

N, H, V = 37, 16, 600


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if device.type == "cpu":
        monkeypatch.setattr(
            operators,
            "implementation",
            lambda like, name, plain: importlib.import_module(f"prefkern.kernels.triton.{name}"),
        )
    return device


@pytest.mark.parametrize(
    ("dtype", "tiling"),
    [
        (torch.float32, (20, 8)),
        (torch.bfloat16, (37, 37)),
        (torch.bfloat16, (20, 8)),
        (torch.float16, (37, 8)),
        (torch.float16, (4, 4)),
    ],
)
def test_cross_entropy(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tiling: tuple[int, int]
) -> None:
    monkeypatch.setattr(one_pass, "tiling", lambda *sizes: one_pass.Tiling(*tiling))
    case = testing.head_case(N, H, V, dtype=dtype, bias=True, masked=0.05, device=kernels)
    options = {"softcap": 6.0, "logit_scale": 1.2, "temperature": torch.linspace(0.5, 1.5, N).to(kernels)}
    leaves = [value.clone().requires_grad_() for value in case[:3]]
    scored = int((case.targets != -100).sum())
    with testing.poison_empty(), count_products() as count:
        loss, metrics = pk.linear_cross_entropy(leaves[0], leaves[1], case.targets, bias=leaves[2], **options)
        kept = torch.autograd.grad(loss * 0.3, leaves, retain_graph=True)
        got = torch.autograd.grad(loss * 0.3, leaves)
    assert count.products(scored, H, V) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, got, strict=True))
    c = torch.full((N,), -0.3 / scored, dtype=torch.float64, device=kernels)
    want = testing.grads_from_hidden(*case[:2], case.targets, c, bias=case.bias, **options)
    eager = testing.grads_from_hidden(*case[:2], case.targets, c, bias=case.bias, dtype=dtype, **options)
    for name, value, expected, plain in zip(want._fields, got, want, eager, strict=True):
        testing.assert_not_worse(value, expected, plain, name=f"grad_{name}")
    stats = testing.stats_from_hidden(*case[:2], case.targets, bias=case.bias, **options)
    mask = case.targets != -100
    assert loss.item() == pytest.approx(-stats.logps[mask].mean().item(), abs=1e-5)
    assert metrics["entropy"].item() == pytest.approx(stats.entropy[mask].mean().item(), abs=1e-5)


@pytest.mark.gpu
def test_no_wait_for_the_device() -> None:
    case = testing.head_case(200, 64, V, device="cuda", dtype=torch.bfloat16, ignored=0.3)
    count = int((case.targets != -100).sum())
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    want = torch.autograd.grad(pk.linear_cross_entropy(*leaves, case.targets).loss * 0.3, leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        options = {"normalizer": torch.tensor(count, device="cuda"), "num_scored": count}
        got = torch.autograd.grad(pk.linear_cross_entropy(*leaves, case.targets, **options).loss * 0.3, leaves)
        wrong = pk.linear_cross_entropy(*leaves, case.targets, num_scored=count - 1).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert wrong.isnan()
