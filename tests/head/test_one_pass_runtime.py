"""The head in one pass inside the runtime: products, memory, who owns a gradient, compilation, and what is refused."""

from typing import Any

import pytest
import torch
from torch.library import opcheck

import prefkern as pk
from prefkern import testing
from prefkern.commands.benchmark.measure import peak_extra_bytes
from prefkern.head.engine.products import count_products

CPU = torch.device("cpu")
N, H, V = 40, 16, 300


def case_of(dtype: torch.dtype = torch.float32, **options: Any) -> testing.HeadCase:
    case = testing.head_case(N, H, V, dtype=dtype, ignored=0.0, **options)
    return case._replace(hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_())


def loss_of(case: testing.HeadCase, **options: Any) -> torch.Tensor:
    return pk.linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, **options).loss


# ------------------------------------------------------------------------------------------------ products and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, 20, 3])
def test_three_products_two_frozen_one_without_gradients(rows: int | None, dtype: torch.dtype) -> None:
    case = case_of(dtype)
    memory = None if rows is None else rows * V * 4
    for hidden, weight, products in ((True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)):
        case.hidden.requires_grad_(hidden), case.weight.requires_grad_(weight)
        with count_products() as count:
            loss = loss_of(case, max_memory=memory)
            if loss.requires_grad:
                loss.backward()
        assert count.products(N, H, V) == products
    case.weight.requires_grad_()
    with torch.no_grad(), count_products() as count:
        assert not loss_of(case, max_memory=memory).requires_grad
    assert count.products(N, H, V) == 1


def test_only_scored_rows_are_multiplied() -> None:
    case = testing.head_case(N, H, V, ignored=0.5)
    scored = int((case.targets != -100).sum())
    with count_products() as count:
        pk.linear_cross_entropy(case.hidden.requires_grad_(), case.weight, case.targets).loss.backward()
    assert count.products(scored, H, V) == 2
    assert scored < N


def gradients(n: int, dtype: torch.dtype, **options: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(8192, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(8192, (n,), generator=generator)
    loss = pk.linear_cross_entropy(hidden, weight, targets, num_scored=n, **options).loss
    return torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_the_tile_and_does_not_grow_with_the_tokens(dtype: torch.dtype) -> None:
    tile = 256 * 8192 * 4
    small, large = (peak_extra_bytes(lambda n=n: gradients(n, dtype, max_memory=tile), CPU) for n in (512, 1536))
    wide_weights = 0 if dtype == torch.float32 else 3 * 8192 * 16 * 4  # the sum, and casts of the weight
    # the passes over a tile take a few rows of it at a time, with up to three temporaries of a quarter of this tile
    assert tile <= small <= 1.75 * tile + wide_weights + (1 << 19)
    assert large - small <= (1536 - 512) * (10 * 8 + 2 * 16 * 4)  # ten values a token, and its hidden state


# ------------------------------------------------------------------------------------------------- who owns a gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_second_backward_starts_from_the_same_numbers(dtype: torch.dtype) -> None:
    case = case_of(dtype, bias=True)
    inputs = [case.hidden, case.weight, case.bias.requires_grad_()]
    loss = loss_of(case)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    before = [value.clone() for value in first]
    for value in first:
        value.fill_(torch.nan)  # what a hook, a clipping in place or an optimiser may do
    loss.backward(retain_graph=True)
    grads = [value.grad for value in inputs]
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    loss.backward(torch.tensor(2.0), retain_graph=True)  # adds to .grad in place
    bound, least = 2 * torch.finfo(dtype).eps, 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for value, expected in zip(inputs, before, strict=True):
        torch.testing.assert_close(value.grad, 3 * expected, rtol=bound, atol=least)
    last = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(last, before, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_loss_used_twice_in_one_graph() -> None:
    case = case_of()
    loss = loss_of(case)
    (loss * 0.5 + loss).backward()
    other = case_of()
    loss_of(other).backward()
    torch.testing.assert_close(case.weight.grad, 1.5 * other.weight.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_is_applied_without_a_copy_and_another_number_in_place(dtype: torch.dtype) -> None:
    saved: dict[torch.Size, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.shape] = tensor.data_ptr(), tensor.clone()
        return tensor

    for upstream in (1.0, 0.3):
        case = case_of(dtype)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(case, metrics=False)
        loss.backward(torch.tensor(upstream))
        for leaf in (case.hidden, case.weight):
            address, before = saved[leaf.shape]
            assert leaf.grad.data_ptr() == address
            expected = (before.double() * upstream).to(dtype)
            torch.testing.assert_close(leaf.grad, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_the_backward_takes_no_memory() -> None:
    n = 64
    hidden, weight = torch.randn(n, 32).requires_grad_(), torch.randn(4096, 32).requires_grad_()
    losses = [pk.linear_cross_entropy(hidden, weight, torch.arange(n)).loss for _ in range(2)]

    def step() -> list[torch.Tensor]:
        losses.pop().backward(torch.tensor(0.3))
        return []

    assert peak_extra_bytes(step, CPU) < 1000  # .grad is what the forward had made
    weight.grad = None


def test_several_forwards_before_one_backward_and_tied_weights() -> None:
    case, other = case_of(), case_of()
    (loss_of(case) + 2 * loss_of(case, max_memory=V * 4) + case.weight.sum()).backward()
    loss_of(other).backward()
    torch.testing.assert_close(case.hidden.grad, 3 * other.hidden.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(case.weight.grad, 3 * other.weight.grad + 1, rtol=1e-5, atol=1e-6)


def test_checkpointing_offloading_and_hooks() -> None:
    plain, other = case_of(), case_of()
    loss_of(plain).mul(0.3).backward()
    for use_reentrant in (False, True):
        other.hidden.grad = other.weight.grad = None
        loss = torch.utils.checkpoint.checkpoint(
            lambda hidden: loss_of(other._replace(hidden=hidden)), other.hidden, use_reentrant=use_reentrant
        )
        loss.mul(0.3).backward()
        assert torch.equal(other.weight.grad, plain.weight.grad)
        assert torch.equal(other.hidden.grad, plain.hidden.grad)
    other.hidden.grad = other.weight.grad = None
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(other)
    loss.mul(0.3).backward()
    assert torch.equal(other.weight.grad, plain.weight.grad)


# --------------------------------------------------------------------------------------- operators and compilation


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needed", [[True, True, True], [True, False, False]])
def test_opcheck(dtype: torch.dtype, needed: list[bool]) -> None:
    case = testing.head_case(9, 8, 32, dtype=dtype, bias=True)
    inputs = [value.clone().requires_grad_(need) for value, need in zip(case[:3], needed, strict=True)]
    rest = (None, 0.7, 3.0, -100, 1.2, ["entropy", "is_top1"], dtype, 3 * 32 * 4, needed)
    results = opcheck(torch.ops.prefkern.linear_logprob_sum, (*inputs, case.targets, torch.randn(9), *rest))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_opcheck_of_the_scaling() -> None:
    arguments = (torch.randn(5, 8, dtype=torch.bfloat16), torch.tensor(0.3), torch.empty(0))
    assert set(opcheck(torch.ops.prefkern.scaled_gradient, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_compilation_for_many_lengths(reduction: str) -> None:
    torch._dynamo.reset()
    weight = torch.randn(32, 8, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)

    def loss(hidden: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        out = pk.linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, token_weights=token_weights, max_memory=700
        )
        return out.loss * 0.5 + out.metrics["entropy"]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)

    def both(n: int) -> None:
        hidden, targets = torch.randn(n, 8), torch.randint(0, 32, (n,))
        targets[0] = -100
        token_weights = torch.rand(n)
        values = []
        for function in (compiled, loss):
            leaf = hidden.clone().requires_grad_()
            weight.grad = bias.grad = None
            value = function(leaf, targets, token_weights)
            value.backward()
            values.append((value.detach(), leaf.grad, weight.grad, bias.grad))
        for got, want in zip(*values, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    both(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in range(2, 62, 3):
            both(n)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_inductor_keeps_the_numbers() -> None:
    torch._dynamo.reset()
    case = case_of()

    def loss(hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return pk.linear_cross_entropy(hidden, case.weight, case.targets, softcap=4.0).loss * scale

    leaf, plain = (case.hidden.detach().clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True)
    for scale in (1.0, 0.3):
        leaf.grad = plain.grad = None
        compiled(leaf, torch.tensor(scale)).backward()
        loss(plain, torch.tensor(scale)).backward()
        torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("again", [lambda grad: grad.sum(), lambda grad: grad.square().sum()])
def test_second_derivatives_are_refused_with_a_sentence(again) -> None:
    case = case_of()
    for upstream in (None, torch.tensor(2.0, requires_grad=True)):
        (grad,) = torch.autograd.grad(loss_of(case), case.hidden, upstream, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            again(grad).backward()


def test_functorch_and_bad_memory_are_refused_with_a_sentence() -> None:
    case = case_of()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda hidden: loss_of(case._replace(hidden=hidden)))(case.hidden)
    for memory in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"^prefkern\.linear_cross_entropy: max_memory must be bytes >= 0: an int"):
            loss_of(case, max_memory=memory)
