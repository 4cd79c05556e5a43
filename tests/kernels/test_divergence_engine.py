"""The divergences end to end on the Triton kernels: in the interpreter, where the operators' dispatch is turned to
them, and on a CUDA device as users run them."""

import importlib
from typing import Any

import pytest
import torch

import prefkern as pk
from prefkern import operators, testing
from prefkern.head.engine.products import count_products
from prefkern.kernels.interface import Logits

N, H, REF_H, V = 13, 16, 12, 301
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "forward": (0.0, {}),
    "reverse": (1.0, {"direction": "reverse"}),
    "jsd": (0.3, {"jsd_beta": 0.3}),
}


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if device.type == "cpu":
        module = importlib.import_module("prefkern.kernels.triton.divergence")
        monkeypatch.setattr(operators, "implementation", lambda like, name, plain: module)
    return device


@pytest.mark.parametrize(
    ("dtype", "rows", "kind"),
    [
        (torch.float32, None, "forward"),
        (torch.float32, 5, "jsd"),
        (torch.bfloat16, None, "reverse"),
        (torch.bfloat16, 0, "forward"),
        (torch.float16, 5, "reverse"),
        (torch.float16, None, "jsd"),
    ],
)
def test_head(kernels: torch.device, dtype: torch.dtype, rows: int | None, kind: str) -> None:
    case = testing.divergence_case(N, H, REF_H, V, dtype=dtype, bias=True, masked=0.05, device=kernels)
    temperature = torch.linspace(0.6, 1.4, N).to(kernels)
    form, ref_form = Logits(None, 1.2, 6.0, temperature), Logits(None, 0.8, 9.0, 1.1)
    beta, options = KINDS[kind]
    options = options | {"temperature": temperature, "softcap": 6.0, "logit_scale": 1.2}
    options |= {"ref_temperature": 1.1, "ref_softcap": 9.0, "ref_logit_scale": 0.8}
    leaves = [value.clone().requires_grad_() for value in case[:3]]
    g = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(kernels)
    memory = None if rows is None else rows * V * dtype.itemsize
    with testing.poison_empty():
        got = pk.linear_kl_divergence(
            leaves[0],
            leaves[1],
            *case[3:5],
            case.targets,
            bias=leaves[2],
            ref_bias=case.ref_bias,
            outputs=("divergence", "entropy"),
            max_memory=memory,
            **options,
        )
        grads = torch.autograd.grad((got.divergence * g).sum(), leaves)
    oracle = {"beta": beta, "scored": case.targets != testing.IGNORE, "form": form, "ref_form": ref_form}
    want = testing.divergence_from_hidden(case, **oracle)
    assert (got.divergence.double() - want).abs().max().item() <= 1e-5
    wide, eager = (testing.divergence_grads(case, g, dtype=d, **oracle) for d in (torch.float64, dtype))
    for name, value, expected, plain in zip(wide._fields, grads, wide, eager, strict=True):
        testing.assert_not_worse(value, expected, plain, name=f"grad_{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(kernels: torch.device, dtype: torch.dtype) -> None:
    one, two = (testing.logit_case(N, V, dtype=dtype, seed=seed, device=kernels) for seed in (0, 1))
    logits = one.logits.clone().requires_grad_()
    got = pk.kl_divergence(logits, two.logits, one.targets, temperature=0.7, direction="reverse")
    g = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(kernels)
    (grad,) = torch.autograd.grad(got, logits, g)
    form = Logits(temperature=0.7)
    oracle = {"beta": 1.0, "scored": one.targets != testing.IGNORE, "form": form, "ref_form": form}
    want = testing.divergence_from_logits(one.logits, two.logits, **oracle)
    assert (got.double() - want).abs().max().item() <= 1e-5
    factor = g[:, None].double() / 0.7
    wide, eager = (
        testing.unscaled_divergence(one.logits, two.logits, dtype=d, **oracle) for d in (torch.float64, dtype)
    )
    testing.assert_not_worse(grad, wide * factor, (eager.double() * factor).to(dtype))


# ------------------------------------------------------------------------------------- what only a device can show


@pytest.mark.gpu
def test_four_products_without_waiting_for_the_device() -> None:
    case = testing.divergence_case(256, 64, 64, 4000, device="cuda", dtype=torch.bfloat16, ignored=0.0)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with count_products() as count:
            pk.linear_kl_divergence(hidden, weight, *case[3:5], case.targets, num_scored=256).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count.products(256, 64, 4000) == 4


@pytest.mark.gpu
def test_two_runs_are_bitwise_equal_on_the_device() -> None:
    case = testing.divergence_case(300, 128, 64, 4000, device="cuda", dtype=torch.bfloat16)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        value = pk.linear_kl_divergence(hidden, weight, *case[3:5], jsd_beta=0.5)
        return value, *torch.autograd.grad(value.sum(), (hidden, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
