"""The divergence operators inside the runtime: opcheck, compilation, products counted, what is saved and refused."""

import pytest
import torch
from divergence_cases import KINDS
from torch.library import opcheck

import prefkern as pk
from prefkern import testing
from prefkern.head.engine.products import count_products


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("dtype", "k_max"), [(torch.float32, 100), (torch.bfloat16, 4), (torch.float32, 0)])
def test_opcheck_from_hidden(dtype: torch.dtype, k_max: int) -> None:
    case = testing.divergence_case(9, 8, 6, 32, dtype=dtype, bias=True)
    leaves = [value.clone().requires_grad_() for value in case[:3]]
    form, ref_form = (torch.linspace(0.5, 1.5, 9), 1.0, 3.0, 1.2), (None, 0.8, None, 0.9)
    arguments = (*leaves, *case[3:6], case.targets != -100, *form, *ref_form, 0.4, dtype, dtype, True, k_max)
    results = opcheck(torch.ops.prefkern.linear_divergence_fwd, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_opcheck_from_logits() -> None:
    logits, ref_logits = torch.randn(9, 32, requires_grad=True), torch.randn(9, 32)
    arguments = (logits, ref_logits, torch.rand(9) > 0.3, torch.rand(9) + 0.5, 1.0, None, 0.7, 1.0)
    assert set(opcheck(torch.ops.prefkern.divergence_fwd, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("source", "kind"), [("hidden", "jsd"), ("logits", "reverse")])
def test_one_compilation_for_many_lengths(source: str, kind: str) -> None:
    torch._dynamo.reset()
    weight, ref_weight = torch.randn(32, 8, requires_grad=True), torch.randn(32, 4)

    def loss(hidden: torch.Tensor, ref_hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if source == "hidden":
            return pk.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight, targets, **KINDS[kind]).mean()
        return pk.kl_divergence(hidden @ weight.T, ref_hidden @ ref_weight.T, targets, **KINDS[kind]).mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)

    def both(n: int) -> None:
        hidden, ref_hidden, targets = torch.randn(n, 8), torch.randn(n, 4), torch.randint(0, 32, (n,))
        targets[0] = -100  # ignored rows stay in the batch under compilation
        values = []
        for function in (compiled, loss):
            leaf = hidden.clone().requires_grad_()
            weight.grad = None
            value = function(leaf, ref_hidden, targets)
            value.backward()
            values.append((value.detach(), leaf.grad, weight.grad))
        for got, want in zip(*values, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    both(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in range(2, 102, 9):
            both(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("memory_rows", "frozen", "products"),
    [(None, False, 4), (None, True, 3), (0, False, 6), (0, True, 5), (20, False, 5)],
)
def test_products(memory_rows: int | None, frozen: bool, products: float, kind: str, dtype: torch.dtype) -> None:
    n, h, v = 40, 16, 300
    case = testing.divergence_case(n, h, h, v, dtype=dtype, ignored=0.0)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    memory = None if memory_rows is None else memory_rows * v * dtype.itemsize
    with count_products() as count:
        pk.linear_kl_divergence(hidden, weight, *case[3:5], max_memory=memory, **KINDS[kind]).sum().backward()
    assert count.products(n, h, v) == products


def test_scoring_is_two_products_of_the_scored_rows_only() -> None:
    case = testing.divergence_case(40, 16, 16, 300, ignored=0.5)
    scored = int((case.targets != -100).sum())
    weight = case.weight.requires_grad_()
    with torch.no_grad(), count_products() as count:
        got = pk.linear_kl_divergence(case.hidden, weight, *case[3:5], case.targets, outputs=("entropy",))
    assert count.products(scored, 16, 300) == 2
    assert scored < 40
    assert got.entropy.shape == (40,)


def test_the_reference_gets_no_gradient() -> None:
    case = testing.divergence_case(10, 8, 6, 32)
    tensors = [value.requires_grad_() for value in (*case[:2], *case[3:5])]
    pk.linear_kl_divergence(*tensors).sum().backward()
    assert [value.grad is None for value in tensors] == [False, False, True, True]
    with torch.no_grad():
        assert not pk.linear_kl_divergence(*tensors).requires_grad
    frozen = [tensors[0].detach(), tensors[1].detach(), *tensors[2:]]
    assert not pk.linear_kl_divergence(*frozen).requires_grad
    logits, ref_logits = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    pk.kl_divergence(logits, ref_logits).sum().backward()
    assert logits.grad is not None
    assert ref_logits.grad is None


def test_only_one_tile_of_gradient_is_kept_and_none_without_gradients() -> None:
    case = testing.divergence_case(40, 16, 12, 300, ignored=0.0)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pk.linear_kl_divergence(*case[:2], *case[3:5])
        assert saved == []
        hidden = case.hidden.requires_grad_()
        pk.linear_kl_divergence(hidden, case.weight, *case[3:5])
        assert saved.count(torch.Size((40, 300))) == 1
        saved.clear()
        pk.linear_kl_divergence(hidden, case.weight, *case[3:5], max_memory=0)
    assert all(shape.numel() < 300 * 17 for shape in saved)


def test_second_derivatives_are_refused_with_a_sentence() -> None:
    case = testing.divergence_case(5, 8, 6, 32)
    hidden = case.hidden.requires_grad_()
    value = pk.linear_kl_divergence(hidden, case.weight, *case[3:5])
    (grad,) = torch.autograd.grad(value.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="divergences have no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functorch_is_refused_with_a_sentence(transform) -> None:
    case = testing.divergence_case(5, 8, 6, 32)
    function = transform(lambda hidden: pk.linear_kl_divergence(hidden, case.weight, *case[3:5]).sum())
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        function(case.hidden)


def test_inputs_are_not_written() -> None:
    case = testing.divergence_case(10, 8, 6, 32, bias=True)
    before = [value.clone() for value in case]
    pk.linear_kl_divergence(
        case.hidden.requires_grad_(), *case[1:2], *case[3:5], case.targets, bias=case.bias, ref_bias=case.ref_bias
    ).sum().backward()
    logits = torch.randn(3, 5)
    copy = logits.clone()
    pk.kl_divergence(logits.requires_grad_(), copy + 1).sum().backward()
    assert torch.equal(logits, copy)
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))
