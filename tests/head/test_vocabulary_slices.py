"""Scoring by slices of the vocabulary: the same statistics as from whole rows, in as much scratch as was allowed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefkern import testing
from prefkern.commands.benchmark.measure import peak_extra_bytes
from prefkern.head import costs
from prefkern.head.engine import blocks, products
from prefkern.head.engine.products import count_products
from prefkern.head.inputs import Head
from prefkern.head.logprobs import token_stats
from prefkern.types import TokenStats

N, H, V = 7, 8, 9000
SCRATCH = 3 * 4096 * 4  # three rows, three slices: chunks of 3, 3 and 1 row
OUTPUTS = ("logps", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")


def stats(case: testing.HeadCase, scratch: int = SCRATCH, **options: Any) -> TokenStats:
    head = Head(bias=case.bias, **options)
    return token_stats("a test", *case[:2], case.targets, head, OUTPUTS, scratch_bytes=scratch)


def test_the_shape_of_a_tile() -> None:
    assert blocks.tile_shape(N, V, 4, False, SCRATCH) == (3, 4096)
    assert blocks.tile_shape(100, 128256, 4, True, blocks.SCRATCH_BYTES) == (100, 128256)
    assert blocks.tile_shape(1000, 128256, 4, True, blocks.SCRATCH_BYTES) == (512, 128256)
    assert blocks.tile_shape(1000, 128256, 4, True, 64 << 20) == (1000, 16640)
    assert blocks.tile_shape(100_000, 128256, 4, True, 64 << 20) == (4096, 4096)
    assert blocks.tile_shape(100_000, 1000, 4, True, 64 << 20) == ((64 << 20) // 4000, 1000)  # whole rows fit
    assert blocks.tile_shape(5, 128256, 4, True, 1) == (1, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "logit_scale": 1.5, "temperature": torch.linspace(0.3, 2.0, N)}, {"temperature": 0.1}],
    ids=["plain", "cap, scale, row temperature", "cold"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_as_exact_as_from_whole_rows(dtype: torch.dtype, options: dict[str, Any], bias: bool) -> None:
    case = testing.head_case(N, H, V, dtype=dtype, bias=bias, masked=0.05 if bias else 0.0)
    got, whole = stats(case, **options), stats(case, blocks.SCRATCH_BYTES, **options)
    want = testing.stats_from_hidden(*case[:2], case.targets, bias=case.bias, **options)
    # one rounding of the slice's own statistics more than from whole rows
    eps = torch.finfo(whole.logps.dtype).eps
    for name in OUTPUTS[:4]:
        one, other, exact = (getattr(value, name) for value in (got, whole, want))
        assert one.dtype == other.dtype
        finite = exact.isfinite()
        assert torch.equal(one[~finite].double(), exact[~finite])
        scale = exact[finite].abs().amax() + math.log(V)
        worst = (one.double() - exact)[finite].abs().max()
        assert worst <= (other.double() - exact)[finite].abs().max() + 2 * eps * scale, name
    assert torch.equal(got.is_top1, want.is_top1)


def gradients(
    case: testing.HeadCase, trained: tuple[int, ...], scratch: int, c: Tensor, e: Tensor
) -> tuple[float, list[Tensor]]:
    """Products, and the gradients of those of hidden and weight that are trained."""
    leaves = [case[i].clone().requires_grad_(i in trained) for i in (0, 1)]
    with count_products() as counted:
        head, options = Head(max_memory=0), {"entropy_grad": True, "scratch_bytes": scratch}
        got = token_stats("a test", *leaves, case.targets, head, ("entropy",), **options)
        assert got.entropy is not None
        grads = torch.autograd.grad((got.logps * c).sum() + (got.entropy * e).sum(), [leaves[i] for i in trained])
    return counted.products(N, H, V), list(grads)


@pytest.mark.parametrize(("trained", "count"), [((0,), 3.0), ((0, 1), 4.0)])
def test_gradients_and_products(trained: tuple[int, ...], count: float) -> None:
    case = testing.head_case(N, H, V, ignored=0.0)
    c, e = torch.randn(2, N)
    found, got = gradients(case, trained, SCRATCH, c, e)
    _, whole = gradients(case, trained, blocks.SCRATCH_BYTES, c, e)
    want = testing.grads_from_hidden(*case[:2], case.targets, c, e)
    assert found == count
    for i, one, other in zip(trained, got, whole, strict=True):
        testing.assert_not_worse(one, want[i], other)
    with count_products() as counted:
        stats(case)
    assert counted.products(N, H, V) == 1.0


def edge(bias: Tensor, targets: list[int]) -> TokenStats:
    """Logits that are the bias alone."""
    n = len(targets)
    case = testing.HeadCase(torch.zeros(n, H), torch.zeros(V, H), bias, torch.tensor(targets))
    return stats(case)


def test_a_tie_goes_to_the_first_of_the_largest() -> None:
    bias = torch.zeros(V)
    bias[[10, 5000, 8999]] = 4.0
    assert edge(bias, [10, 5000, 8999, 11]).is_top1.tolist() == [True, False, False, False]
    bias[10] = 3.0
    assert edge(bias, [10, 5000, 8999, 11]).is_top1.tolist() == [False, True, False, False]


def test_slices_without_a_finite_logit() -> None:
    bias = torch.full((V,), -math.inf)
    bias[5000:5004] = 1000.0
    got = edge(bias, [5001, 20, 8999, -100])
    assert got.logps.tolist() == [pytest.approx(-math.log(4)), -math.inf, -math.inf, 0.0]
    assert got.entropy.tolist() == [pytest.approx(math.log(4))] * 3 + [0.0]
    assert got.log_sum_sq_probs.tolist() == [pytest.approx(-math.log(4))] * 3 + [0.0]
    nothing = edge(torch.full((V,), -math.inf), [0, 5000])
    whole = stats(
        testing.HeadCase(torch.zeros(2, H), torch.zeros(V, H), torch.full((V,), -math.inf), torch.tensor([0, 5000])),
        blocks.SCRATCH_BYTES,
    )
    for one, other in zip(nothing, whole, strict=True):
        assert torch.equal(one, other)


def test_a_logit_that_is_not_a_number_reaches_every_statistic() -> None:
    bias = torch.zeros(V)
    bias[6000] = math.nan
    got = edge(bias, [1, 6000, 8999])
    for name in OUTPUTS[:4]:
        assert getattr(got, name).isnan().all(), name


def test_an_offset_common_to_all_logits_costs_nothing() -> None:
    torch.manual_seed(3)
    bias = torch.randn(V).mul_(1024).round_().div_(1024)  # exact also beside the offset
    assert torch.equal(edge(bias, [5, 5005]).logps, edge(bias + 4096, [5, 5005]).logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["nothing", "hidden", "all"])
def test_predicted_bytes(trained: str, dtype: torch.dtype) -> None:
    rows, width, vocab, scratch = 150, 64, 49152, 4 << 20
    size = dtype.itemsize
    case = testing.head_case(rows, width, vocab, dtype=dtype, ignored=0.0)
    head = costs.Call(
        rows, width, vocab, size, size, size, trained != "nothing", trained == "all", accelerator=False,
        native=products.native(dtype), scratch=scratch,
    )  # fmt: skip
    hidden = case.hidden.requires_grad_(trained != "nothing")
    weight = case.weight.requires_grad_(trained == "all")

    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def step() -> list[Tensor]:
        head = Head(num_scored=rows)
        logps = token_stats("a test", hidden, weight, case.targets, head, scratch_bytes=scratch).logps
        return list(torch.autograd.grad(logps.sum(), leaves)) if leaves else [logps]

    forward, backward = costs.forward_bytes(head, 0, 0), costs.backward_bytes(head, 0, 0)
    predicted = max(forward - head.gradient_bytes, backward) if leaves else forward
    assert peak_extra_bytes(step, torch.device("cpu")) == pytest.approx(predicted, rel=0.05)
    assert predicted < 4 * scratch
